"""What the words mean: one YAML file an organ (`configs/knowledge/`) read into a vocabulary that can parse a report,
split it into foreground and background, compose prompts, sample attributes, and class each term of a prompt.

    knowledge = Knowledge.load("thyroid")
    knowledge.parse("Malignant papillary nodule, solid, ill-defined. Sonogram transverse middle.")
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from tiger.errors import InputError

KNOWLEDGE_DIR = Path(__file__).resolve().parents[1] / "configs" / "knowledge"

# Words that carry no finding: left over between terms, they are not reported as unknown.
_FILLER = re.compile(
    r"a|an|and|are|as|at|be|by|has|have|in|is|it|its|of|on|or|shows?|showing|seen|the|there|this|to|was|were|which|with|"
    r"plane|view|image|left|right|sized?|shaped?|margins?|echo"
)
_NEGATION = re.compile(
    r"\b(?:no|not|non|never|without|absence of|no evidence of|no signs? of|negative for)[\s-]+$", re.IGNORECASE
)
_SEPARATOR = r"[\s_\-\u2010-\u2013]+"  # words of one phrase may be joined by spaces or any hyphen
_PIECES = re.compile(r"[,;:()\n]+|\.(?!\d)")


@dataclass(frozen=True)
class Category:
    """One attribute. `terms` maps each canonical term to its synonyms, in the order of the file."""

    role: Literal["fg", "bg"]
    terms: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Subtype:
    """One label. `frequencies[category][term]` is P(term | subtype); it sums to 1, or is empty if not applicable."""

    name: str
    status: str
    rare: bool
    synonyms: tuple[str, ...]
    particular: frozenset[str]
    joint: frozenset[str]
    frequencies: dict[str, dict[str, float]]
    sources: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Parsed:
    """What a report says. Where it contradicts itself, the first mention stands and `contradictions` names both."""

    status: str | None
    label: str | None
    attributes: dict[str, str]
    unknown: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TermSpan:
    """A known term at text[start:end]; `term` is its canonical form."""

    term: str
    start: int
    end: int
    kind: Literal["particular", "joint", "common"]


@dataclass(frozen=True)
class _Meaning:
    """What a phrase stands for: a category's term, a status (`category` = "status") or a subtype ("subtype")."""

    category: str
    term: str  # for a subtype, its label


@dataclass(frozen=True, eq=False)
class Knowledge:
    """The vocabulary of one organ. Build it with `Knowledge.load`."""

    organ: str
    background: str
    status: dict[str, tuple[str, ...]]
    categories: dict[str, Category]
    subtypes: dict[str, Subtype]
    exclusions: tuple[frozenset[str], ...]
    ignore: frozenset[str]
    ambiguous: frozenset[str]

    @staticmethod
    def load(name_or_path: str | Path) -> "Knowledge":
        """Read `configs/knowledge/<name>.yaml`, or the YAML file at a path.

        Raises InputError naming file and line when the file does not hold a complete, consistent knowledge base.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = KNOWLEDGE_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in KNOWLEDGE_DIR.glob("*.yaml")))
            raise InputError(f"knowledge base {name_or_path!r}: no file {path}. Known: {known}, or give a .yaml file")
        return _Reader(path).knowledge()

    @functools.cached_property
    def terms(self) -> list[str]:
        """All canonical terms, sorted: statuses, subtype names and the terms of every category."""
        names = {subtype.name for subtype in self.subtypes.values()} - {""}
        return sorted(names.union(self.status, *(category.terms for category in self.categories.values())))

    def parse(self, text: str) -> Parsed:
        """Read status, subtype and attributes from free text or from a prompt.

        A phrase after a negation ("not solid") asserts nothing and is reported as unknown, unless the negated phrase
        is itself a term ("no halo").
        """
        found: dict[str, str] = {}
        contradictions: list[str] = []
        ambiguous: list[str] = []
        for start, end, meaning in self._matches(text):
            if _normal(text[start:end]) in self.ambiguous:
                ambiguous.append(text[start:end])
            first = found.setdefault(meaning.category, meaning.term)
            if first != meaning.term:
                message = f"{meaning.category}: {first!r} and {meaning.term!r}"
                if message not in contradictions:
                    contradictions.append(message)
        status, label = found.get("status"), found.get("subtype")
        if label is not None:
            expected = self.subtypes[label].status
            if status not in (None, expected):
                contradictions.append(f"status: {status!r} and {label} ({expected})")
            status = expected
        elif status is not None:
            label = self._unnamed_subtype(status)
        attributes = {category: found[category] for category in self.categories if category in found}
        return Parsed(status, label, attributes, self._unknown(text), contradictions, ambiguous)

    def split(self, text: str) -> tuple[str, str]:
        """Report → (text_fg, text_bg) in canonical terms. What `parse` calls unknown is left out."""
        parsed = self.parse(text)
        return self._texts(parsed.status, parsed.label, parsed.attributes)

    def compose(self, label: str, attributes: dict[str, str]) -> tuple[str, str]:
        """(text_fg, text_bg) of one image: "malignant, follicular, solid, …" and "sonogram transverse plane, …".

        Attributes may be partial; their order does not matter. Raises InputError on an unknown label or term.
        """
        self._check_label(label)
        for category, term in attributes.items():
            if category not in self.categories:
                raise InputError(f"attribute {category!r} is not one of {list(self.categories)}")
            if term not in self.categories[category].terms:
                raise InputError(f"{category} {term!r} is not one of {list(self.categories[category].terms)}")
        return self._texts(self.subtypes[label].status, label, attributes)

    def sample(self, label: str, rng: np.random.Generator, mode: Literal["full", "names"] = "full") -> dict[str, str]:
        """Draw a term for every category from the subtype's frequencies ("full", Tiger-F), or none ("names", Tiger-N).

        Categories are drawn in the file's order, each from its frequencies without the terms that what was drawn
        before excludes, so earlier categories keep their frequencies exactly.
        """
        self._check_label(label)
        attributes: dict[str, str] = {}
        if mode == "names":
            return attributes
        for category in self.categories:
            frequencies = self.subtypes[label].frequencies[category]
            if not frequencies:
                continue
            possible = [term for term in frequencies if not self.excluded(term, attributes)]
            weights = np.array([frequencies[term] for term in possible])
            if not weights.any():
                raise InputError(f"exclusions leave no {category} for a {label} with {attributes}: drop one of them")
            attributes[category] = possible[rng.choice(len(possible), p=weights / weights.sum())]
        return attributes

    def _check_label(self, label: str) -> None:
        if label not in self.subtypes:
            raise InputError(f"label {label!r} is not one of {list(self.subtypes)} ({self.organ} knowledge base)")

    def excluded(self, term: str, attributes: dict[str, str]) -> bool:
        """Whether `term` cannot be true of a nodule that has `attributes`."""
        return any(frozenset((term, other)) in self.exclusions for other in attributes.values())

    @functools.lru_cache(maxsize=20_000)  # noqa: B019  # training asks for the same prompts at every step
    def term_classes(self, text: str) -> tuple[TermSpan, ...]:
        """Every known term of `text`, in order, with its class for the subtype that the text names.

        Status and subtype names are "common", as is every term when the text names no subtype.
        """
        matches = list(self._matches(text))
        label = next((m.term for _, _, m in matches if m.category == "subtype"), None)
        if label is None:
            status = next((m.term for _, _, m in matches if m.category == "status"), None)
            label = self._unnamed_subtype(status) if status else None
        subtype = self.subtypes[label] if label else None
        spans = []
        for start, end, meaning in matches:
            term = meaning.term
            if meaning.category == "subtype":
                term = self.subtypes[term].name or self.subtypes[term].status
            kind: Literal["particular", "joint", "common"] = "common"
            if subtype and meaning.category in self.categories:
                kind = "particular" if term in subtype.particular else "joint" if term in subtype.joint else "common"
            spans.append(TermSpan(term, start, end, kind))
        return tuple(spans)

    def _texts(self, status: str | None, label: str | None, attributes: dict[str, str]) -> tuple[str, str]:
        present = [(category.role, attributes[key]) for key, category in self.categories.items() if key in attributes]
        names = [status or "", self.subtypes[label].name if label else ""]
        fg = names + [term for role, term in present if role == "fg"]
        bg = [term for role, term in present if role == "bg"]
        opening = " ".join([self.background, *bg[:1]])  # "sonogram transverse plane"
        return ", ".join(filter(None, fg)), ", ".join([opening, *bg[1:]])

    def _unnamed_subtype(self, status: str) -> str | None:
        """The label that a status alone stands for (benign), if there is one."""
        return next((label for label, s in self.subtypes.items() if not s.name and s.status == status), None)

    @functools.cached_property
    def _phrases(self) -> dict[str, _Meaning]:
        """Normalised phrase → meaning, for every canonical term and synonym."""
        vocabulary = _vocabulary(self.status, self.categories, self.subtypes)
        return {_normal(phrase): meaning for phrase, meaning in vocabulary}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """One alternation, longest phrase first, so 'irregular margin' is never read as 'irregular'.

        The look-arounds keep 'clear' out of 'unclear' and 'solid' out of 'non-solid'; a plural s is allowed at the end.
        """
        longest_first = sorted(self._phrases, key=lambda phrase: (-len(phrase), phrase))
        alternatives = (f"({_SEPARATOR.join(map(re.escape, phrase.split()))})" for phrase in longest_first)
        return re.compile(rf"(?<![\w-])(?:{'|'.join(alternatives)})s?(?![\w-])", re.I)

    def _matches(self, text: str) -> Iterator[tuple[int, int, _Meaning]]:
        """(start, end, meaning) of each asserted phrase, in order, never overlapping."""
        for match in self._pattern.finditer(text):
            if not _NEGATION.search(text, 0, match.start()):
                phrase = match.group(match.lastindex or 0)
                yield match.start(), match.end(), self._phrases[_normal(phrase)]

    def _unknown(self, text: str) -> list[str]:
        """The pieces of `text` that are neither terms nor filler."""
        rest = list(text)
        for start, end, _ in self._matches(text):
            rest[start:end] = "," * (end - start)
        pieces = []
        for piece in _PIECES.split("".join(rest)):
            words = piece.split()
            while words and self._is_filler(words[0]):
                words.pop(0)
            while words and self._is_filler(words[-1]):
                words.pop()
            if words:
                pieces.append(" ".join(words))
        return pieces

    def _is_filler(self, word: str) -> bool:
        word = word.lower().strip("\"'-/")
        return not word or bool(_FILLER.fullmatch(word)) or word in self.ignore or word.removesuffix("s") in self.ignore


def _normal(phrase: str) -> str:
    """Lower case, words joined by one space."""
    return " ".join(re.split(_SEPARATOR, phrase.strip().lower()))


def _vocabulary(
    status: dict[str, tuple[str, ...]], categories: dict[str, Category], subtypes: dict[str, Subtype]
) -> Iterator[tuple[str, _Meaning]]:
    """Every (phrase, meaning) of the knowledge base."""
    for term, synonyms in status.items():
        yield from ((phrase, _Meaning("status", term)) for phrase in (term, *synonyms))
    for label, subtype in subtypes.items():
        names = (subtype.name,) if subtype.name else ()
        yield from ((phrase, _Meaning("subtype", label)) for phrase in (*names, *subtype.synonyms))
    for key, category in categories.items():
        for term, synonyms in category.terms.items():
            yield from ((phrase, _Meaning(key, term)) for phrase in (term, *synonyms))


class _Reader:
    """Reads one YAML file and says on which line it is wrong."""

    def __init__(self, path: Path):
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
            self.tree = yaml.safe_load(text)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        self.lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            self._walk(node, ())

    def _walk(self, node: yaml.Node, where: tuple[str, ...]) -> None:
        self.lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*where, str(key.value))
                if inner in self.lines:
                    raise InputError(f"{self.path}:{key.start_mark.line + 1}: {key.value!r} appears twice")
                self.lines[inner] = key.start_mark.line + 1
                self._walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(value, (*where, str(index)))

    def fail(self, where: tuple[str, ...], message: str) -> InputError:
        known = where
        while known and known not in self.lines:
            known = known[:-1]
        return InputError(f"{self.path}:{self.lines.get(known, 1)}: {'.'.join(where) or 'file'}: {message}")

    def get(self, *where: str, kind: type, default: Any = None) -> Any:
        """The value at `where`; a missing one is `default`, or an error when there is no default."""
        value = self.tree
        for key in where:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            value = default
        if not isinstance(value, kind):
            names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
            found = "nothing" if value is None else repr(value)
            raise self.fail(where, f"must be {names[kind]}, found {found[:60]}")
        return value

    def texts(self, *where: str) -> tuple[str, ...]:
        """A list of texts; missing is empty."""
        values = self.get(*where, kind=list, default=[])
        for index, value in enumerate(values):
            if not isinstance(value, str):  # YAML reads a bare no / yes / 1 as something else
                raise self.fail((*where, str(index)), f"must be a text, found {value!r}: put it in quotes")
        return tuple(values)

    def knowledge(self) -> Knowledge:
        self.only(
            (),
            {
                "organ",
                "background",
                "ignore",
                "ambiguous",
                "status",
                "categories",
                "exclusions",
                "shared_frequencies",
                "subtypes",
            },
        )
        status = {term: self.texts("status", term) for term in self.get("status", kind=dict)}
        categories = {key: self.category(key) for key in self.get("categories", kind=dict)}
        exclusions = self.exclusions(categories)
        labels = self.get("subtypes", kind=dict)
        subtypes = {label: self.subtype(label, status, categories, exclusions) for label in labels}
        self.unambiguous(status, categories, subtypes)
        return Knowledge(
            organ=self.get("organ", kind=str),
            background=self.get("background", kind=str),
            status=status,
            categories=categories,
            subtypes=subtypes,
            exclusions=exclusions,
            ignore=frozenset(self.texts("ignore")),
            ambiguous=frozenset(map(_normal, self.texts("ambiguous"))),
        )

    def only(self, where: tuple[str, ...], keys: set[str]) -> None:
        for key in self.get(*where, kind=dict):
            if key not in keys:
                raise self.fail((*where, str(key)), f"unknown key, use {sorted(keys)}")

    def category(self, key: str) -> Category:
        where = ("categories", key)
        self.only(where, {"role", "terms"})
        role = self.get(*where, "role", kind=str)
        if role not in ("fg", "bg"):
            raise self.fail((*where, "role"), f"must be fg or bg, found {role!r}")
        terms = self.get(*where, "terms", kind=dict)
        if not terms:
            raise self.fail((*where, "terms"), "is empty")
        return Category(role, {term: self.texts(*where, "terms", term) for term in terms})

    def exclusions(self, categories: dict[str, Category]) -> tuple[frozenset[str], ...]:
        known = {term: key for key, category in categories.items() for term in category.terms}
        pairs = self.get("exclusions", kind=list, default=[])
        for index, pair in enumerate(pairs):
            where = ("exclusions", str(index))
            if not isinstance(pair, list) or len(pair) != 2 or not all(term in known for term in pair):
                raise self.fail(where, f"must be a pair of known terms, found {pair!r}")
            if known[pair[0]] == known[pair[1]]:
                raise self.fail(where, f"{pair} are terms of one category, which exclude each other anyway")
        return tuple(frozenset(pair) for pair in pairs)

    def subtype(
        self,
        label: str,
        status: dict[str, tuple[str, ...]],
        categories: dict[str, Category],
        exclusions: tuple[frozenset[str], ...],
    ) -> Subtype:
        where = ("subtypes", label)
        self.only(where, {"name", "synonyms", "status", "rare", "particular", "joint", "frequencies", "sources"})
        own = self.get(*where, "status", kind=str)
        if own not in status:
            raise self.fail((*where, "status"), f"must be one of {list(status)}, found {own!r}")
        fg_terms = {term for category in categories.values() if category.role == "fg" for term in category.terms}
        particular, joint = (self.texts(*where, key) for key in ("particular", "joint"))
        for key, terms in (("particular", particular), ("joint", joint)):
            for term in terms:
                if term not in fg_terms:
                    raise self.fail((*where, key), f"{term!r} is not a foreground term")
        if both := set(particular) & set(joint):
            raise self.fail((*where, "joint"), f"{sorted(both)} are also particular")
        frequencies = {key: self.frequencies(label, key, category) for key, category in categories.items()}
        for term in {term for row in frequencies.values() for term, p in row.items() if p > 0}:
            for key, row in frequencies.items():  # else sampling would find no way on after drawing `term`
                if row and not any(p > 0 and frozenset((term, other)) not in exclusions for other, p in row.items()):
                    raise self.fail(("exclusions",), f"leave no likely {key} for a {label} that is {term!r}")
        return Subtype(
            name=self.get(*where, "name", kind=str),
            status=own,
            rare=self.get(*where, "rare", kind=bool),
            synonyms=self.texts(*where, "synonyms"),
            particular=frozenset(particular),
            joint=frozenset(joint),
            frequencies=frequencies,
            sources=tuple(self.get(*where, "sources", kind=list, default=[])),
        )

    def frequencies(self, label: str, key: str, category: Category) -> dict[str, float]:
        """P(term) of one category: the subtype's own, else the one that all subtypes share."""
        where = ("subtypes", label, "frequencies", key)
        own = self.get(*where[:3], kind=dict, default={})
        if key not in own:
            where = ("shared_frequencies", key)
            if key not in self.get("shared_frequencies", kind=dict, default={}):
                raise self.fail(("subtypes", label, "frequencies"), f"has no {key!r}")
        values = self.get(*where, kind=dict)
        for term, p in values.items():
            if term not in category.terms:
                raise self.fail((*where, str(term)), f"is not a term of {key}: {list(category.terms)}")
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
                raise self.fail((*where, term), f"must be a number from 0 to 1, found {p!r}")
        if values and abs(sum(values.values()) - 1) > 1e-6:  # {} says that the category does not apply
            raise self.fail(where, f"sums to {sum(values.values()):g}, must be 1")
        return {term: float(p) for term, p in values.items()}

    def unambiguous(
        self, status: dict[str, tuple[str, ...]], categories: dict[str, Category], subtypes: dict[str, Subtype]
    ) -> None:
        """Each phrase may mean one thing only."""
        seen: dict[str, _Meaning] = {}
        for phrase, meaning in _vocabulary(status, categories, subtypes):
            first = seen.setdefault(_normal(phrase), meaning)
            if first != meaning:
                sections = {"status": ("status",), "subtype": ("subtypes",)}
                where = sections.get(meaning.category, ("categories", meaning.category, "terms"))
                raise self.fail((*where, meaning.term), f"{phrase!r} already means {first.category} {first.term!r}")
