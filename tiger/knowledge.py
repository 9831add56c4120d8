"""What the words mean: one YAML file an organ (`configs/knowledge/`) read into a vocabulary that can parse a report,
split it into foreground and background, compose prompts, sample attributes, and class each term of a prompt.

    knowledge = Knowledge.load("thyroid")
    knowledge.parse("Malignant papillary nodule, solid, ill-defined. Sonogram transverse middle.")
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from tiger.errors import InputError

SELDOM = 0.01  # frequencies of common subtypes below this say no more than that a term is seldom among them
KNOWLEDGE_DIR = Path(__file__).resolve().parents[1] / "configs" / "knowledge"

# Words that carry no finding: left over between terms, they are not reported as unknown.
_FILLER = re.compile(
    r"a|an|and|are|as|at|be|by|has|have|in|is|it|its|of|on|or|shows?|showing|seen|the|there|this|to|was|were|which|with|"
    r"plane|view|image|left|right|sized?|shaped?|margins?|echo"
)
# Negation in the manner of NegEx (Chapman et al., J Biomed Inform 2001;34:301-310): a cue and what may stand between it
# and a phrase, a cue after a phrase, and lists: one that ends in "or" is negated as a whole.
_BETWEEN = r"(?:(?:any|definite|obvious|significant|suspicious|visible|further|evidence of|signs? of)[\s-]+)*"
_CUE = r"(?<![\w-])(?:no|not|non|never|without|absence of|free of|lacks|lacking|negative for)[\s-]+" + _BETWEEN
_CUE_HERE, _CUE_BEFORE = re.compile(_CUE, re.I), re.compile(_CUE + "$", re.I)
_CUE_AFTER = re.compile(
    r"\s*(?::|is|are|was|were)?\s*(?:not (?:seen|identified|present|visible|detected|evident)|none)\b", re.I
)
_CUE_REACH = 60  # characters before a phrase in which its cue may begin
_OR = re.compile(rf"(?!.*\b(?:but|and|with|is|are)\b)([^.;:()\n]{{0,40}})\b(?:or|nor)\s+{_BETWEEN}", re.I)
_COMMA = re.compile(r"\s*,\s*")
_WORD = re.compile(r"[^\W_]+")
_SEPARATOR = re.compile(r"[\s_/'\u2019\-\u2010-\u2013]+")  # what may join the words of one phrase
_PIECES = re.compile(r"[,;:()\n]+|\.(?!\d)")


@dataclass(frozen=True)
class Category:
    """One attribute. `terms` maps each canonical term to its synonyms, in the order of the file.

    An `optional` one is a finding whose absence prompts leave unsaid; any other is always said, where it applies.
    """

    role: Literal["fg", "bg"]
    terms: dict[str, tuple[str, ...]]
    optional: bool = False


@dataclass(frozen=True)
class Source:
    """What the frequencies of the categories `about` rest on; `uncertain` ones are a judgement or from memory."""

    claim: str
    reference: str
    about: tuple[str, ...]
    uncertain: bool = False


@dataclass(frozen=True)
class Placement:
    """Which words say how a lesion's mask looks and where it lies. Empty for an organ whose words do not."""

    traits: tuple[str, ...] = ()  # categories that the mask itself shows
    size: str | None = None  # the one of them that is its size
    plane: str | None = None  # category that names the scan plane
    location: str | None = None  # category that names a part of the organ
    parts: tuple[str, ...] = ()  # its terms, from the image's left or top
    axis: dict[str, str] = field(default_factory=dict)  # plane -> horizontal or vertical: the axis they lie along
    extension: str | None = None  # term that lets the mask cross the organ's upper edge


@dataclass(frozen=True)
class Subtype:
    """One label. `frequencies[category][term]` is P(term | subtype).

    It sums to 1, or to less in an optional category, and is empty if the category does not apply.
    """

    name: str
    status: str
    rare: bool
    synonyms: tuple[str, ...]
    particular: frozenset[str]
    joint: frozenset[str]
    frequencies: dict[str, dict[str, float]]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Parsed:
    """What a report says. Where it contradicts itself, the first mention stands and `contradictions` names both."""

    status: str | None
    label: str | None
    attributes: dict[str, str]
    absent: list[str] = field(default_factory=list)  # terms of optional categories that the text denies
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
    absent: bool = False  # the text says that it is not there


def knowledge_path(name_or_path: str | Path) -> Path:
    """The YAML file of a name in configs/knowledge, or that which a path names."""
    path = Path(name_or_path)
    return path if path.suffix in (".yaml", ".yml") else KNOWLEDGE_DIR / f"{name_or_path}.yaml"


@dataclass(frozen=True, eq=False)
class Knowledge:
    """The vocabulary of one organ. Build it with `Knowledge.load`."""

    organ: str
    background: str
    status: dict[str, tuple[str, ...]]
    categories: dict[str, Category]
    subtypes: dict[str, Subtype]
    exclusions: tuple[frozenset[str], ...]
    placement: Placement
    ignore: frozenset[str]
    ambiguous: frozenset[str]

    @staticmethod
    def load(name_or_path: str | Path) -> "Knowledge":
        """Read `configs/knowledge/<name>.yaml`, or the YAML file at a path.

        Raises InputError naming file and line when the file does not hold a complete, consistent knowledge base.
        """
        path = knowledge_path(name_or_path)
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

        A negated phrase means what "no" before it means ("no evidence of halo": "no halo"); is there no such term, it
        is absent if its category is optional, and else asserts nothing and is reported as unknown ("not solid").
        """
        found: dict[str, str] = {}
        absent: dict[str, str] = {}  # term -> category
        contradictions: dict[str, None] = {}  # an ordered set
        ambiguous: list[str] = []
        matches = self._matches(text)
        for start, end, meaning in matches:
            if meaning.absent:
                absent[meaning.term] = meaning.category
                continue
            if _normal(text[start:end]) in self.ambiguous:
                ambiguous.append(text[start:end])
            first = found.setdefault(meaning.category, meaning.term)
            if first != meaning.term:
                contradictions[f"{meaning.category}: {first!r} and {meaning.term!r}"] = None
        for term, category in absent.items():
            if found.get(category) == term:
                contradictions[f"{category}: {term!r} and its negation"] = None
        status, label = found.get("status"), found.get("subtype")
        if label is not None:
            expected = self.subtypes[label].status
            if status not in (None, expected):
                contradictions[f"status: {status!r} and {label} ({expected})"] = None
            status = expected
        elif status is not None:
            label = self._unnamed_subtype(status)
        attributes = {category: found[category] for category in self.categories if category in found}
        unknown = self._unknown(text, matches)
        return Parsed(status, label, attributes, list(absent), unknown, list(contradictions), ambiguous)

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

    def sample(
        self,
        label: str,
        rng: np.random.Generator,
        mode: Literal["full", "names"] = "full",
        emphasis: float = 0.0,
    ) -> dict[str, str]:
        """Draw a term for every category from the subtype's frequencies ("full", Tiger-F), or none ("names", Tiger-N).

        Categories are drawn in the file's order, each from its frequencies without the terms that what was drawn
        before excludes, so earlier categories keep their frequencies exactly. No draw holds two terms that exclude
        each other. An optional category may be left out. emphasis: see `emphasised`.
        """
        self._check_label(label)
        attributes: dict[str, str] = {}
        if mode == "names":
            return attributes
        for key, category in self.categories.items():
            frequencies = self.emphasised(label, key, emphasis)
            if category.optional and rng.random() >= sum(frequencies.values()):
                continue
            possible = [term for term in frequencies if not self.excluded(term, attributes)]
            weights = np.array([frequencies[term] for term in possible])
            if weights.any():  # `load` has seen to it that only optional and inapplicable categories have nothing left
                attributes[key] = possible[rng.choice(len(possible), p=weights / weights.sum())]
        return attributes

    def emphasised(self, label: str, category: str, emphasis: float) -> dict[str, float]:
        """P(term | subtype) of a category, shifted towards the terms that tell a rare subtype from the common ones.

        `q(t) ∝ p(t) · (p(t) / p̄(t))^γ`, which sums to 1; γ = `emphasis`, 0 to 10; p̄ the mean over the common subtypes,
        at least SELDOM. The term of the highest ratio gains most, at the cost of the others. Saying nothing of an
        optional category counts as a term of it. With γ = 0, for a common subtype, and where none is common, the
        frequencies are as they were.
        """
        row = self.subtypes[label].frequencies[category]
        common = [_whole(subtype.frequencies[category]) for subtype in self.subtypes.values() if not subtype.rare]
        if not emphasis or not self.subtypes[label].rare or not common:
            return row
        raised = {}
        for term, p in _whole(row).items():
            mean = sum(other.get(term, 0.0) for other in common) / len(common)
            raised[term] = p * (p / max(mean, SELDOM)) ** emphasis
        total = sum(raised.values())
        return {term: raised[term] / total for term in row}

    def _check_label(self, label: str) -> None:
        if label not in self.subtypes:
            known = f"{list(self.subtypes)} ({self.organ} knowledge base)"
            raise InputError(f"label {label!r} is not one of {known}: name another vocabulary by --knowledge")

    def excluded(self, term: str, attributes: dict[str, str]) -> bool:
        """Whether `term` cannot be true of a lesion that has `attributes`."""
        return any(frozenset((term, other)) in self.exclusions for other in attributes.values())

    def impossible(self, attributes: dict[str, str]) -> list[tuple[str, str]]:
        """The pairs among `attributes` that exclude each other."""
        terms = list(attributes.values())
        pairs = ((a, b) for i, a in enumerate(terms) for b in terms[i + 1 :])
        return [pair for pair in pairs if frozenset(pair) in self.exclusions]

    @functools.lru_cache(maxsize=20_000)  # noqa: B019  # training asks for the same prompts at every step
    def term_classes(self, text: str) -> tuple[TermSpan, ...]:
        """Every known term of `text`, in order, with its class for the subtype that the text names.

        Status and subtype names are "common", as is every term when the text names no subtype.
        """
        matches = [match for match in self._matches(text) if not match[2].absent]
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
        present = [(category, attributes[key]) for key, category in self.categories.items() if key in attributes]
        names = [status or "", self.subtypes[label].name if label else ""]
        fg = names + [term for category, term in present if category.role == "fg"]
        bg = [(category, term) for category, term in present if category.role == "bg"]
        opening = self.background
        if bg and not bg[0][0].optional:
            opening += f" {bg.pop(0)[1]}"  # "sonogram transverse plane"
        return ", ".join(filter(None, fg)), ", ".join([opening, *(term for _, term in bg)])

    def _unnamed_subtype(self, status: str) -> str | None:
        """The label that a status alone stands for (benign), if there is one."""
        return next((label for label, s in self.subtypes.items() if not s.name and s.status == status), None)

    @functools.cached_property
    def _phrases(self) -> dict[str, _Meaning]:
        """Normalised phrase → meaning, for every canonical term and synonym."""
        vocabulary = _vocabulary(self.status, self.categories, self.subtypes)
        return {_normal(phrase): meaning for phrase, meaning in vocabulary}

    @functools.cached_property
    def _forms(self) -> dict[str, str]:
        """Every form in which a normalised phrase may stand in a text, singular and plural → the phrase."""
        forms = {f"{phrase}{ending}": phrase for phrase in self._phrases for ending in ("s", "es")}
        forms |= {f"{phrase[:-1]}ies": phrase for phrase in self._phrases if phrase.endswith("y")}
        return forms | {phrase: phrase for phrase in self._phrases}

    @functools.cached_property
    def _longest(self) -> int:
        """Words of the longest phrase."""
        return max(phrase.count(" ") + 1 for phrase in self._phrases)

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, phrase) of each phrase in `text`, asserted or not, in order, never overlapping.

        The longest phrase that starts at a word is taken, so 'irregular margin' is never read as 'irregular', nor
        'unclear' as 'clear'. One that a hyphen joins to another word ('non-solid') is none. A cue before a phrase that
        only exists as a negative is read as "no" ("no evidence of halo": "no halo").
        """
        words = list(_WORD.finditer(text))
        found = []
        at = 0
        while at < len(words):
            cue = _CUE_HERE.match(text, words[at].start())
            first = next((i for i in range(at, len(words)) if cue and words[i].start() >= cue.end()), None)
            hit = self._longest_from(text, words, at) or (
                None if first is None else self._longest_from(text, words, first, "no ")
            )
            if hit is None:
                at += 1
            else:
                found.append((words[at].start(), words[hit[0]].end(), hit[1]))
                at = hit[0] + 1
        return found

    def _longest_from(
        self, text: str, words: Sequence[re.Match[str]], first: int, before: str = ""
    ) -> tuple[int, str] | None:
        """(index of the last word, phrase) of the longest phrase of `before` and the words from `first` on."""
        if text[: words[first].start()].endswith(("-", "_")):
            return None
        best, key = None, before
        for last in range(first, min(first + self._longest, len(words))):
            if last > first:
                if not _SEPARATOR.fullmatch(text, words[last - 1].end(), words[last].start()):
                    break
                key += " "
            key += words[last].group().lower()
            if key in self._forms and not text.startswith(("-", "_"), words[last].end()):
                best = last, self._forms[key]
        return best

    def _matches(self, text: str) -> list[tuple[int, int, _Meaning]]:
        """(start, end, meaning) of each phrase that says something, in order, never overlapping.

        A negated phrase is there if "no …" is a term (with that meaning) or if its category is optional (as absent);
        its span takes in the cue.
        """
        found = self._found(text)
        matches = []
        for (start, end, phrase), negated in zip(found, _negations(text, found), strict=True):
            meaning = self._phrases[phrase]
            if negated is None:
                matches.append((start, end, meaning))
            elif negative := self._phrases.get(f"no {phrase}"):
                matches.append((*negated, negative))
            elif meaning.category in self.categories and self.categories[meaning.category].optional:
                matches.append((*negated, _Meaning(meaning.category, meaning.term, absent=True)))
        return matches

    def _unknown(self, text: str, matches: Sequence[tuple[int, int, _Meaning]]) -> list[str]:
        """The pieces of `text` that are neither terms nor filler."""
        rest = list(text)
        for start, end, _ in matches:
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
        forms = {word, word.removesuffix("s"), word.removesuffix("es")}
        return not word or bool(_FILLER.fullmatch(word)) or not forms.isdisjoint(self.ignore)


def _normal(phrase: str) -> str:
    """Lower case, words joined by one space."""
    return " ".join(_SEPARATOR.split(phrase.strip().lower()))


def _negations(text: str, found: Sequence[tuple[int, int, str]]) -> list[tuple[int, int] | None]:
    """For each (start, end, phrase) in order: the span that it and its negation cover, or None if it is asserted."""
    spans: list[tuple[int, int] | None] = [None] * len(found)
    gaps = [text[a[1] : b[0]] for a, b in pairwise(found)]
    for i, (start, end, phrase) in enumerate(found):
        if cue := _CUE_BEFORE.search(text, max(0, start - _CUE_REACH), start):
            spans[i] = (cue.start(), end)
            joined = list(takewhile(lambda gap: _OR.fullmatch(gap) or _COMMA.fullmatch(gap), gaps[i:]))
            while joined and not _OR.fullmatch(joined[-1]):
                joined.pop()
        elif after := _CUE_AFTER.match(text, end):
            spans[i] = (start, after.end())
            continue
        elif phrase.startswith(("no ", "without ")):  # a term that denies something; what "or" adds is denied too
            joined = list(takewhile(_OR.fullmatch, gaps[i:]))
        else:
            continue
        for k in range(i + 1, i + 1 + len(joined)):
            link = _OR.fullmatch(gaps[k - 1])  # "or any" is part of the negation, what stands before it is not
            spans[k] = (found[k - 1][1] + link.end(1) if link else found[k][0], found[k][1])
    return spans


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


def _whole(row: Mapping[str, float]) -> dict[str, float]:
    """A category's frequencies, with that of its going unsaid under "", which no term is."""
    return {**row, "": max(0.0, 1.0 - sum(row.values()))}


def _dead_end(
    key: str, frequencies: Mapping[str, Mapping[str, float]], exclusions: Sequence[frozenset[str]]
) -> list[str] | None:
    """Terms of earlier categories that together exclude every likely term of `key`; None if sampling always goes on."""
    likely = {name: [term for term, p in row.items() if p > 0] for name, row in frequencies.items()}
    earlier = list(takewhile(lambda name: name != key, likely))

    def extend(drawn: dict[str, str]) -> list[str] | None:
        excludes = {term: {b for a in exclusions if term in a for b in a - {term}} for term in likely[key]}
        left = next((term for term in likely[key] if not excludes[term].intersection(drawn.values())), None)
        if left is None:
            return list(drawn.values())
        options = ((name, term) for name in earlier if name not in drawn for term in likely[name])
        for name, term in options:
            possible = term in excludes[left] and not any({term, other} in exclusions for other in drawn.values())
            if possible and (found := extend(drawn | {name: term})) is not None:
                return found
        return None

    return extend({})


_SECTIONS = {
    "organ", "background", "ignore", "ambiguous", "status", "categories", "exclusions", "placement",
    "shared_frequencies", "shared_sources", "subtypes",
}  # fmt: skip


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
            if isinstance(value, list):
                value = value[int(key)]
                continue
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
        self.only((), _SECTIONS)
        status = {term: self.texts("status", term) for term in self.get("status", kind=dict)}
        categories = {key: self.category(key) for key in self.get("categories", kind=dict)}
        exclusions = self.exclusions(categories)
        self.shared(categories)
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
            placement=self.placement(categories),
            ignore=frozenset(self.texts("ignore")),
            ambiguous=frozenset(map(_normal, self.texts("ambiguous"))),
        )

    def only(self, where: tuple[str, ...], keys: set[str]) -> None:
        for key in self.get(*where, kind=dict):
            if key not in keys:
                raise self.fail((*where, str(key)), f"unknown key, use {sorted(keys)}")

    def category(self, key: str) -> Category:
        where = ("categories", key)
        self.only(where, {"role", "terms", "optional"})
        role = self.get(*where, "role", kind=str)
        if role not in ("fg", "bg"):
            raise self.fail((*where, "role"), f"must be fg or bg, found {role!r}")
        terms = self.get(*where, "terms", kind=dict)
        if not terms:
            raise self.fail((*where, "terms"), "is empty")
        for term in terms:
            if not isinstance(term, str):  # YAML reads a bare no / yes / 1 as something else
                raise self.fail((*where, "terms", str(term)), f"must be a text, found {term!r}: put it in quotes")
        optional = self.get(*where, "optional", kind=bool, default=False)
        return Category(role, {term: self.texts(*where, "terms", term) for term in terms}, optional)

    def placement(self, categories: dict[str, Category]) -> Placement:
        """The section `placement`, which may be missing."""
        tree = self.get("placement", kind=dict, default={})
        if not tree:
            return Placement()
        self.only(("placement",), set(Placement.__dataclass_fields__))
        names = {key: self.get("placement", key, kind=str) for key in ("size", "plane", "location") if key in tree}
        for key, name in [("traits", name) for name in self.texts("placement", "traits")] + list(names.items()):
            if name not in categories:
                raise self.fail(("placement", key), f"{name!r} is not a category: {list(categories)}")
        parts = self.texts("placement", "parts")
        known = list(categories[names["location"]].terms) if "location" in names else []
        if sorted(parts) != sorted(known):
            raise self.fail(("placement", "parts"), f"must be the terms of the location, {known}, found {list(parts)}")
        axis = self.get("placement", "axis", kind=dict, default={})
        for plane, direction in axis.items():
            if direction not in ("horizontal", "vertical"):
                raise self.fail(("placement", "axis", str(plane)), f"must be horizontal or vertical: {direction!r}")
        if bool(axis) != bool(parts):
            raise self.fail(("placement",), "parts and axis belong together: give both or neither")
        extension = tree.get("extension")
        if extension is not None and not any(extension in category.terms for category in categories.values()):
            raise self.fail(("placement", "extension"), f"{extension!r} is not a term")
        return Placement(**names, traits=self.texts("placement", "traits"), parts=parts, axis=axis, extension=extension)

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
        for key, row in frequencies.items():
            if row and not categories[key].optional and (drawn := _dead_end(key, frequencies, exclusions)) is not None:
                raise self.fail(("exclusions",), f"leave no likely {key} for a {label} that is {' and '.join(drawn)}")
        own_rows = self.get(*where, "frequencies", kind=dict, default={})
        return Subtype(
            name=self.get(*where, "name", kind=str),
            status=own,
            rare=self.get(*where, "rare", kind=bool),
            synonyms=self.texts(*where, "synonyms"),
            particular=frozenset(particular),
            joint=frozenset(joint),
            frequencies=frequencies,
            sources=self.sources((*where, "sources"), (*where, "frequencies"), own_rows, categories),
        )

    def shared(self, categories: dict[str, Category]) -> None:
        """Check the frequencies that all subtypes share; `subtype` reads them."""
        rows = self.get("shared_frequencies", kind=dict, default={})
        for key in rows:
            if key not in categories:
                raise self.fail(("shared_frequencies", str(key)), f"is not a category: {list(categories)}")
        self.sources(("shared_sources",), ("shared_frequencies",), rows, categories)

    def sources(
        self,
        where: tuple[str, ...],
        frequencies: tuple[str, ...],
        rows: Mapping[str, Any],
        categories: dict[str, Category],
    ) -> tuple[Source, ...]:
        """The list at `where`, which must account for each row of the mapping at `frequencies` that is not empty."""
        found = []
        for index in range(len(self.get(*where, kind=list, default=[]))):
            at = (*where, str(index))
            self.only(at, {"claim", "reference", "about", "uncertain"})
            about = self.texts(*at, "about")
            if unknown := [key for key in about if key not in categories]:
                raise self.fail((*at, "about"), f"{unknown[0]!r} is not a category: {list(categories)}")
            claim, reference = (self.get(*at, key, kind=str) for key in ("claim", "reference"))
            uncertain = self.get(*at, "uncertain", kind=bool, default=False)
            found.append(Source(claim, reference, about, uncertain))
        accounted = {key for source in found for key in source.about}
        for key, row in rows.items():
            if row and key not in accounted:
                raise self.fail((*frequencies, str(key)), f"has no source: name it under `about` in {'.'.join(where)}")
        return tuple(found)

    def frequencies(self, label: str, key: str, category: Category) -> dict[str, float]:
        """P(term) of one category: the subtype's own, else the one that all subtypes share."""
        where = ("subtypes", label, "frequencies", key)
        own = self.get(*where[:3], kind=dict, default={})
        if key not in own:
            where = ("shared_frequencies", key)
            if key not in self.get("shared_frequencies", kind=dict, default={}):
                if category.optional:  # a finding that the subtype does not show
                    return {}
                raise self.fail(("subtypes", label, "frequencies"), f"has no {key!r}")
        values = self.get(*where, kind=dict)
        for term, p in values.items():
            if term not in category.terms:
                raise self.fail((*where, str(term)), f"is not a term of {key}: {list(category.terms)}")
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
                raise self.fail((*where, term), f"must be a number from 0 to 1, found {p!r}")
        total = sum(values.values())
        if category.optional and total > 1 + 1e-6:
            raise self.fail(where, f"sums to {total:g}, must be at most 1")
        if not category.optional and values and abs(total - 1) > 1e-6:  # {} says that the category does not apply
            raise self.fail(where, f"sums to {total:g}, must be 1")
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
