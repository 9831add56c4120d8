"""The one schema of `metadata.jsonl`: read, check, select, write. One JSON object a line, paths relative to the file.

manifest = read("runs/phantom")               # structure: every bad line at once
check(manifest, conditions=True)              # files: every bad row at once
"""

import difflib
import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tiger import shards
from tiger.errors import InputError
from tiger.files import atomic_path
from tiger.knowledge import Knowledge, Parsed

FILE_NAME = "metadata.jsonl"
SPLITS = ("train", "valid", "test")
MOST_SHOWN = 20  # problems that one error lists
FILE_COLUMNS = ("file_name", "condition_fg", "condition_bg", "organ_mask")
# Names that the published code and other tools use for the same columns.
ALIASES = {
    "condition_nd": "condition_fg", "condition_FG": "condition_fg", "condition_bd": "condition_bg",
    "condition_BG": "condition_bg", "text_nd": "text_fg", "text_bd": "text_bg",
}  # fmt: skip
SPLIT_ALIASES = {"val": "valid", "validation": "valid"}
# A "left transverse plane" is a transverse one; the side plays no part here.
PLANE = re.compile(
    r"(?:(?:left|middle|right) )?(longitudinal|transverse)(?: plane| view)?(?: (?:left|middle|right))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Row:
    """One image. Paths are relative to the manifest's folder, with forward slashes, and may lead into a tar shard."""

    file_name: str
    text_fg: str
    text_bg: str
    condition_fg: str | None = None  # nodule mask
    condition_bg: str | None = None  # Sobel map
    organ_mask: str | None = None  # mask of the organ, for placing masks
    label: str | None = None
    patient_id: str | None = None
    split: str | None = None  # train, valid or test
    attributes: dict[str, str] = field(default_factory=dict)  # category -> canonical term
    plane: str | None = None  # longitudinal or transverse
    source: str | None = None
    synthetic: bool = False
    seed: int | None = None
    model: str | None = None
    derived_from: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The joint prompt: foreground text, then background text."""
        return ", ".join(filter(None, (self.text_fg, self.text_bg)))


@dataclass(frozen=True)
class Manifest:
    """The rows of one metadata.jsonl at `path`."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def root(self) -> Path:
        """The folder that the rows' paths are relative to."""
        return self.path.parent

    def file(self, row: Row, column: str) -> Path:
        """Where one of the row's files lies: `column` is one of FILE_COLUMNS. The column must be filled."""
        value = getattr(row, column)
        if value is None:
            raise InputError(f"{self.path}: {row.file_name}: has no {column}")
        return self.root / value

    def select(
        self, split: str | None = None, labels: Iterable[str] | None = None, synthetic: bool | None = None
    ) -> "Manifest":
        """The rows that match; None matches all. A row without a split counts as "train"."""
        wanted = None if labels is None else set(labels)
        rows = (
            row for row in self.rows
            if (split is None or (row.split or "train") == split)
            and (wanted is None or row.label in wanted)
            and (synthetic is None or row.synthetic == synthetic)
        )  # fmt: skip
        return replace(self, rows=tuple(rows))


# ------------------------------------------------------------------------------------------------------------- reading


def manifest_path(data_dir: str | Path) -> Path:
    """`data_dir` is a folder with a metadata.jsonl, or that file."""
    path = Path(data_dir)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give a folder with a {FILE_NAME}, or make one: python -m data.prepare build --help"
        )
    return path


def read(data_dir: str | Path, knowledge: Knowledge | None = None) -> Manifest:
    """Read a manifest and check its structure, not its files (that is `check`).

    Args:
        data_dir: folder with a metadata.jsonl, or that file.
        knowledge: needed only where rows have one `text` column, which it splits into foreground and background.
    Raises one InputError that lists every bad line: JSON, columns, types, paths that leave the folder.
    """
    manifest, problems = scan(data_dir, knowledge)
    refuse(manifest.path, problems)
    return manifest


def scan(data_dir: str | Path, knowledge: Knowledge | None = None) -> tuple[Manifest, list[str]]:
    """The rows of a manifest whose structure is good, and what is wrong with the other lines. See `read`."""
    path = manifest_path(data_dir)
    rows: list[Row] = []
    problems: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse_row(json.loads(line), knowledge)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not valid JSON: {error.msg} at column {error.colno}")
        except _BadRow as error:
            problems.extend(f"line {number}: {problem}" for problem in error.problems)
        else:
            if row.file_name in first_line:
                first = first_line[row.file_name]
                problems.append(f"line {number}: {row.file_name} is already in line {first}: drop one")
            first_line.setdefault(row.file_name, number)
            rows.append(row)
    if not rows and not problems:
        problems.append("has no rows: add one JSON object a line")
    return Manifest(path, tuple(rows)), problems


class _BadRow(Exception):
    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems


def _parse_row(record: Any, knowledge: Knowledge | None) -> Row:
    """One JSON object → Row, with the aliases understood. Raises _BadRow with everything that is wrong."""
    if not isinstance(record, dict):
        raise _BadRow([f"must be a JSON object, found {type(record).__name__}"])
    problems: list[str] = []
    values = _canonical_columns(record, problems)
    needed = ("file_name",) if "text" in values else ("file_name", "text_fg", "text_bg")
    problems += [f"has no {column}: add it" for column in needed if column not in values]
    if "text" in values and (problem := _split_text(values, knowledge)):
        problems.append(problem)
    for column, value in values.items():
        if problem := column_problem(column, value):
            problems.append(f"{column}: {problem}")
    if problems:
        raise _BadRow(problems)
    values["patient_id"] = None if values.get("patient_id") is None else str(values["patient_id"])
    values["split"] = SPLIT_ALIASES.get(values.get("split", ""), values.get("split"))
    if plane := PLANE.fullmatch(values.get("plane", "")):
        values["plane"] = plane[1].lower()
    values["derived_from"] = tuple(values.get("derived_from", ()))
    return Row(**values)


def _split_text(values: dict[str, Any], knowledge: Knowledge | None) -> str | None:
    """Put text_fg and text_bg in the place of `text`. Returns what is wrong instead."""
    text = values.pop("text")
    if "text_fg" in values or "text_bg" in values:
        return "has `text` as well as text_fg or text_bg: keep one form"
    if knowledge is None:
        return "one `text` column can only be split with a knowledge base: give text_fg and text_bg"
    if problem := _text_problem(text):
        return f"text: {problem}"
    text_fg, text_bg = knowledge.split(text)
    if not text_fg:
        return (
            f"text: {text!r} names no term on the lesion that the {knowledge.organ} knowledge base knows: use its "
            "words, choose another one by --knowledge, or give text_fg and text_bg"
        )
    values |= {"text_fg": text_fg, "text_bg": text_bg}
    return None


def _canonical_columns(record: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Known columns under their own names, without nulls. Other columns are left out, unless one looks like a slip."""
    values: dict[str, Any] = {}
    for name, value in record.items():
        column = ALIASES.get(name, name)
        if column not in _COLUMN_CHECKS and column != "text":
            near = difflib.get_close_matches(column, [*_COLUMN_CHECKS, *ALIASES], n=1, cutoff=0.85)
            if near:
                problems.append(f"unknown column {name!r}: did you mean {near[0]!r}?")
        elif column in values and values[column] != value:
            problems.append(f"{name!r} contradicts another column for {column}: keep one")
        elif value is not None:
            values[column] = value
    return values


def _path_problem(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return f"must be a path, found {value!r}"
    path = PurePosixPath(value)
    if not path.parts:
        return f"{value!r} is the manifest's folder: name a file in it"
    if path.is_absolute() or "\\" in value or ":" in path.parts[0]:
        return f"{value!r} is not a relative path with forward slashes: write it relative to the manifest"
    if ".." in path.parts:
        return (
            f"{value!r} leaves the manifest's folder: move {FILE_NAME} up so that every path lies below it, "
            "or make a mended copy: python -m data.prepare build --help"
        )
    return None


def _text_problem(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else f"must be a text that is not empty, found {value!r}"


def _patient_problem(value: Any) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else _text_problem(value)


def _split_problem(value: Any) -> str | None:
    known = (*SPLITS, *SPLIT_ALIASES)
    return None if isinstance(value, str) and value in known else f"must be one of {', '.join(SPLITS)}, found {value!r}"


def _plane_problem(value: Any) -> str | None:
    if isinstance(value, str) and PLANE.fullmatch(value):
        return None
    return f"must be longitudinal or transverse, found {value!r}: mend it or leave it out"


def _attributes_problem(value: Any) -> str | None:
    if isinstance(value, dict) and all(isinstance(term, str) for term in value.values()):
        return None
    return f'must be an object of texts such as {{"composition": "solid"}}, found {value!r}'


def _bool_problem(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, found {value!r}"


def _integer_problem(value: Any) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else f"must be an integer, found {value!r}"


def _list_problem(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return None
    return f"must be a list of texts, found {value!r}"


_COLUMN_CHECKS: dict[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(FILE_COLUMNS, _path_problem),
    **dict.fromkeys(("text_fg", "text_bg", "label", "source", "model"), _text_problem),
    "patient_id": _patient_problem, "split": _split_problem, "attributes": _attributes_problem,
    "plane": _plane_problem, "synthetic": _bool_problem, "seed": _integer_problem, "derived_from": _list_problem,
}  # fmt: skip


def column_problem(column: str, value: Any) -> str | None:
    """What is wrong with a value of a column, called by its canonical name; None if nothing is."""
    return _COLUMN_CHECKS[column](value)


def refuse(path: Path, problems: Sequence[str]) -> None:
    """One InputError for all problems, of which it lists the first MOST_SHOWN, or nothing."""
    if len(problems) == 1:
        raise InputError(f"{path}: {problems[0]}")
    if problems:
        shown, more = list(problems[:MOST_SHOWN]), len(problems) - MOST_SHOWN
        if more > 0:
            shown.append(f"and {more} more: python -m data.prepare check --data_dir {path} --output FILE lists all")
        raise InputError("\n  ".join([f"{path}: {len(problems)} problems:", *shown]))


# ------------------------------------------------------------------------------------------------------------ checking


def check(
    manifest: Manifest,
    *,
    conditions: bool,
    knowledge: Knowledge | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> None:
    """Open every file and raise one InputError on the bad rows and what would mend them. See `refuse`.

    Args:
        conditions: whether masks and Sobel maps are needed (fine training, and coarse training that weighs the lesion).
            Those that rows name are always checked.
        knowledge: with it, texts that contradict themselves, and labels and attributes unknown to it, are listed too.
        on_row: called once a row, for a progress bar.
    """

    from tiger.conditions import brightest

    def problems_of(row: Row) -> list[str]:
        found, images = file_problems(manifest.root, row, conditions, siblings)
        if "file_name" in images:
            highest.append(brightest(images["file_name"]))
        on_row()
        return [f"{row.file_name}: {problem.message}" for problem in (*text_problems(row, knowledge), *found)]

    siblings = Siblings(manifest.root)
    highest: list[int] = []
    rows = {row.file_name: row for row in manifest.rows}  # a caller may show some rows twice
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        problems = [problem for found in pool.map(problems_of, rows.values()) for problem in found]
    refuse(manifest.path, [*problems, *straddling_patients(manifest.rows), *dark_images(highest, manifest.root)])


def dark_images(highest: Iterable[int], root: Path) -> Iterator[str]:
    """One line if images of more than 8 bits use so few of their 16 that they would be read as nearly black.

    Args:
        highest: `conditions.brightest` of each image.
    """
    from tiger.conditions import WHITE, white_level

    top = max(highest, default=0)
    if top and (white := white_level([top])) < WHITE:
        yield (
            f"the images of 16 bits hold at most {top}, of {WHITE} that is white: python -m data.prepare check "
            f"--data_dir {root} --fix FOLDER writes them in 8 bits, where {white} is white"
        )


class Problem(NamedTuple):
    """Something wrong with a row: a short machine-readable name, and a message that says what would mend it."""

    code: str
    message: str


def straddling_patients(rows: Iterable[Row]) -> list[str]:
    """One line for each patient with rows in more than one split."""
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.patient_id is not None:
            splits[row.patient_id].add(row.split or "train")
    return [
        f"patient {patient}: is in {' and '.join(sorted(found))}: keep each patient in one split "
        "(python -m data.prepare split)"
        for patient, found in splits.items() if len(found) > 1
    ]  # fmt: skip


def synthetic_leaks(rows: Iterable[Row]) -> Iterator[tuple[Row, Problem]]:
    """Synthetic rows that are held out, or that derive from images that are held out."""
    rows = list(rows)
    held_out = {row.file_name: row.split for row in rows if row.split in ("valid", "test") and not row.synthetic}
    for row in rows:
        if row.synthetic and row.split in ("valid", "test"):
            yield row, Problem("synthetic_held_out", f"is synthetic and in {row.split}: put it in train")
        for source in held_out.keys() & row.derived_from if row.synthetic else ():
            where = f"which is in {held_out[source]}"
            yield row, Problem("leaked_source", f"derives from {source}, {where}: leave the synthetic row out")


def assign_splits(rows: Sequence[Row], fractions: dict[str, float], seed: int) -> tuple[Row, ...]:
    """Give every row a split, whole patients at a time, each label in about the same proportions.

    A row without patient_id is a patient of its own. A patient with several labels counts under the rarest of them.
    Synthetic rows go to train. The result depends on the patients and the seed, not on the order of the rows. A label
    is in every split that has as many patients as there are splits; with fewer, train is served first, then test.

    Args:
        fractions: split -> share of the patients, adding up to 1.
    """
    patients: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not row.synthetic:
            patients[unit_of(row)].append(row)
    frequency = Counter(row.label for row in rows if not row.synthetic)
    strata: defaultdict[str, list[str]] = defaultdict(list)
    for patient in sorted(patients):
        label = min((row.label for row in patients[patient]), key=lambda label: (frequency[label], str(label)))
        strata[str(label)].append(patient)
    split_of: dict[str, str] = {}
    for label, members in sorted(strata.items()):
        order = np.random.default_rng((seed, *label.encode())).permutation(len(members))
        counts = _shares(len(members), fractions)
        given = (split for split, count in counts.items() for _ in range(count))
        split_of |= {members[index]: split for index, split in zip(order, given, strict=True)}
    return tuple(replace(row, split="train" if row.synthetic else split_of[unit_of(row)]) for row in rows)


def _shares(total: int, fractions: dict[str, float]) -> dict[str, int]:
    """`total` members divided by `fractions`; no split that is asked for stays empty while there are enough members."""
    ends = np.rint(np.cumsum(list(fractions.values())) * total).astype(int)
    counts = dict(zip(fractions, np.diff(ends, prepend=0).tolist(), strict=True))
    served = ["train", "test", "valid"]  # in this order, where there are not enough
    for split in [split for split in served if fractions.get(split)][:total]:
        if not counts[split]:
            counts[max(counts, key=lambda name: (counts[name], served.index(name)))] -= 1
            counts[split] = 1
    return counts


def row_weights(manifest: Manifest, balance: float) -> np.ndarray | None:
    """(N,) drawing probabilities ∝ (count of the row's class)^-balance; None when all are equal."""
    if balance == 0:
        return None
    unlabelled = [row.file_name for row in manifest.rows if not row.label]
    if unlabelled:
        raise InputError(
            f"{manifest.path}: --class_balance needs a label in every row, and {len(unlabelled)} have none, first "
            f"{unlabelled[0]}; add labels or give --class_balance 0"
        )
    counts = Counter(row.label for row in manifest.rows)
    weights = np.array([counts[row.label] ** -balance for row in manifest.rows])
    return weights / weights.sum()


def unit_of(row: Row) -> str:
    """What must never straddle splits: the patient, or the image where no patient is known."""
    return f"patient {row.patient_id}" if row.patient_id is not None else f"image {row.file_name}"


@functools.lru_cache(maxsize=4096)
def parsed(knowledge: Knowledge, text: str) -> Parsed:
    """`knowledge.parse(text)`, once for prompts that recur."""
    return knowledge.parse(text)


def text_problems(row: Row, knowledge: Knowledge | None) -> Iterator[Problem]:
    """Contradictions within the texts, and between texts, label and attributes; none without a knowledge base."""
    if knowledge is None:
        return
    remedy = "mend it, or name another vocabulary by --knowledge"
    said = parsed(knowledge, row.text)
    for contradiction in said.contradictions:
        yield Problem("contradiction", f"the text contradicts itself, {contradiction}: keep one")
    if row.label is not None and row.label not in knowledge.subtypes:
        known = f"the {knowledge.organ} knowledge base ({', '.join(knowledge.subtypes)})"
        yield Problem("unknown_label", f"label {row.label!r} is not in {known}: {remedy}")
    elif row.label is not None and said.label is not None and said.label != row.label:
        yield Problem("label_and_text", f"label {row.label!r}, but the text says {said.label}: mend one")
    for category, term in row.attributes.items():
        if category not in knowledge.categories or term not in knowledge.categories[category].terms:
            message = f"attribute {category}: {term!r} is not in the {knowledge.organ} knowledge base: {remedy}"
            yield Problem("unknown_attribute", message)


def file_problems(
    root: Path, row: Row, conditions: bool, siblings: "Siblings"
) -> tuple[list[Problem], dict[str, Image.Image]]:
    """What is wrong with the files of one row, and those that can be opened, decoded: column → image."""
    problems: list[Problem] = []
    images: dict[str, Image.Image] = {}
    if conditions and row.condition_fg is None:
        message = (
            "has no condition_fg, the lesion's mask: write masks with python -m data.prepare segmenter predict; only "
            "coarse training goes without, by --lesion_weight 1"
        )
        problems.append(Problem("no_mask", message))
    if conditions and row.condition_bg is None:
        command = f"python -m data.prepare conditions --data_dir {root}"
        problems.append(Problem("no_map", f"has no condition_bg: write the maps with {command}"))
    for column in FILE_COLUMNS:
        value = getattr(row, column)
        if value is None:
            continue
        path = root / value
        if not shards.exists(path):
            found = siblings.find(path)
            problems.append(Problem("missing_file", f"{column} {value!r} does not exist{siblings.advice(found)}"))
            if found is None:
                continue
            path = found  # what is wrong with it is worth knowing in the same go
        wrong, image = _image_problems(path, column)
        problems += [Problem(p.code, f"{column} {path.name}: {p.message}") for p in wrong]
        if image is not None:
            images[column] = image
    for column, image in images.items():
        if "file_name" in images and image.size != (size := images["file_name"].size):
            message = f"{column} is {image.size[0]}x{image.size[1]}, the image {size[0]}x{size[1]}: make them agree"
            problems.append(Problem("size", message))
    return problems, images


def _image_problems(path: Path, column: str) -> tuple[list[Problem], Image.Image | None]:
    """Problems of one image file, and the image if it opens."""
    from tiger.conditions import border_bars, open_image, to_gray  # OpenCV loads slowly, and reading needs none

    problems: list[Problem] = []
    try:
        image = open_image(path)
    except InputError as error:
        return [Problem("unreadable", str(error).removeprefix(f"{path}: "))], None
    expected = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if expected and image.format != expected:
        message = f"holds {image.format} under a {path.suffix} name: convert it to {expected}"
        problems.append(Problem("format", message))
    if column in ("condition_fg", "organ_mask"):
        mask = to_gray(image)
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        if not (mask >= 128).any():
            hint = " (its values are 0 and 1: multiply by 255)" if values.max() == 1 else ""
            problems.append(Problem("empty_mask", f"the mask is empty{hint}: draw it or drop the row"))
        elif not np.isin(values, (0, 255)).all():
            message = f"the mask has {len(values)} grey levels instead of 0 and 255: threshold it at 128"
            problems.append(Problem("gray_mask", message))
        if column == "condition_fg" and (mask >= 128).all():
            problems.append(Problem("full_mask", "the mask is full: draw the lesion alone or drop the row"))
        for side, width in border_bars(mask).items():
            message = f"the mask has a white bar of {width} px along its {side} edge: paint it black"
            problems.append(Problem("white_bar", message))
    return problems, image


class Siblings:
    """Finds where a missing file may be: below the manifest's folder or in the folders beside it."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.listing: dict[str, list[Path]] | None = None

    def find(self, missing: Path) -> Path | None:
        """A file of the same stem, rather in a folder of the same name, or None. Images only."""
        if self.listing is None:
            listing: defaultdict[str, list[Path]] = defaultdict(list)
            folders = [self.root, *(p for p in self.root.parent.iterdir() if p.is_dir() and p != self.root)]
            for path in (path for folder in folders for path in folder.glob("*")):
                listing[path.stem].append(path)
            for path in (path for path in self.root.rglob("*") if path.parent != self.root):
                listing[path.stem].append(path)
            self.listing = dict(listing)
        same_folder = [path for path in self.listing.get(missing.stem, []) if path.parent.name == missing.parent.name]
        same_suffix = [path for path in same_folder if path.suffix == missing.suffix]
        return next(iter(same_suffix or same_folder), None)

    def advice(self, found: Path | None) -> str:
        if found is None:
            return ": put it there or drop the row"
        if found.is_relative_to(self.root):
            return f": write {found.relative_to(self.root).as_posix()!r}, which does"
        outside = found.relative_to(self.root.parent).as_posix()
        return (
            f", but '../{outside}' outside the manifest's folder does: make a mended copy with "
            f"python -m data.prepare build --source tiger_thyroid --input {self.root.parent} --output_dir OUT"
        )


# ------------------------------------------------------------------------------------------------------------- writing


def to_record(row: Row) -> dict[str, Any]:
    """The row as a JSON object, without empty columns."""
    record = {column.name: getattr(row, column.name) for column in fields(row)}
    record["derived_from"] = list(row.derived_from)
    # `is`, as a seed of 0 is no empty column
    return {key: value for key, value in record.items() if not (value is None or value is False or value in ({}, []))}


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write `rows` to `path`, atomically. Empty columns are left out."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(to_record(row), ensure_ascii=False) + "\n")
