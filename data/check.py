"""What is wrong with a data set before anything is trained on it, as a report for people and for programs.

    python -m data.prepare check --data_dir mine --output report.json

Errors would stop a training or make an evaluation worthless; warnings should be looked at. Every row is opened once, in
parallel; the whole takes O(rows) time, but for the search for near duplicates (`data/duplicates.py`), and 3 kB a row.
"""

import hashlib
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from data import shards
from data.duplicates import NEAR_BITS, NEAR_CORRELATION, near_pairs, perceptual_hash, same_picture, thumbnail
from tiger import manifest
from tiger.conditions import WHITE, brightest, to_gray_alone, white_level
from tiger.knowledge import Knowledge
from tiger.manifest import SPLITS, Manifest, Problem, Row, Siblings, unit_of

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tiny-base" / "tokenizer" / "tokenizer.json"
MAX_TOKENS = 77  # what CLIP's text encoder takes, begin and end included
WORTH_A_POOL = 300  # rows: starting processes takes seconds
SHOWN = 10  # findings of one kind that are printed; the JSON report has all


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; `file_name` names the row, None is the whole data set."""

    level: Literal["error", "warning"]
    code: str
    file_name: str | None
    message: str


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    `copies` are pairs of file names that are the same picture, the one to keep first. `white` is what is white in
    images of more than 8 bits, by all of the set's.
    """

    data: Manifest
    stage: Literal["coarse", "fine"]
    white: int = WHITE
    findings: list[Finding] = field(default_factory=list)
    unknown_terms: Counter[str] = field(default_factory=Counter)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def count(self, level: str) -> int:
        """Findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "manifest": str(self.data.path),
            "rows": len(self.data.rows),
            "patients": len({row.patient_id for row in self.data.rows} - {None}),
            "stage": self.stage,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "class_counts": class_counts(self.data.rows),
            "unknown_terms": dict(self.unknown_terms.most_common()),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def text(self) -> str:
        """The report for people: errors first, the first few of each kind."""
        groups: defaultdict[tuple[str, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            groups[finding.level, finding.code].append(finding)
        lines = []
        for (level, code), found in sorted(groups.items()):
            lines.append(f"{level} {code}: {len(found)}")
            lines += [f"  {f.file_name + ': ' if f.file_name else ''}{f.message}" for f in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  and {len(found) - SHOWN} more (--output FILE lists all)")
        lines.append(summary(self.data))
        if not self.count("error"):
            lines.append(f"ready for {'both stages' if self.stage == 'fine' else 'the coarse stage'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Look:
    """What one row's files and texts show. Bytes and hash are None where the image cannot be read."""

    problems: list[Problem]
    unknown: list[str]
    impossible: list[tuple[str, str]]
    digest: bytes | None = None
    hash: int | None = None
    thumbnail: bytes | None = None
    brightest: int = 0


def examine(
    data_dir: str | Path, knowledge: Knowledge, stage: Literal["auto", "coarse", "fine"], workers: int
) -> Report:
    """Everything that is wrong with a data set.

    Args:
        stage: "fine" needs a mask and a map in every row; "auto" means fine if any row has a mask.
        workers: processes that read files; with 1, or few rows, this one reads them.
    Raises InputError only where there is no manifest at all.
    """
    data, broken = manifest.scan(data_dir, knowledge)
    fine = stage == "fine" or (stage == "auto" and any(row.condition_fg for row in data.rows))
    looks = list(look_at_all(data, knowledge, fine, workers))
    highest = [look.brightest for look in looks]
    report = Report(data, "fine" if fine else "coarse", white_level(highest))
    report.findings.extend(Finding("error", "structure", None, message) for message in broken)
    report.unknown_terms.update(unknown_words(data.path, knowledge))
    for row, look in zip(data.rows, looks, strict=True):
        report.findings.extend(Finding("error", p.code, row.file_name, p.message) for p in look.problems)
        report.findings.extend(
            Finding("warning", "impossible", row.file_name, f"says {a!r} and {b!r}, which exclude each other")
            for a, b in look.impossible
        )
        report.unknown_terms.update(word.lower() for word in look.unknown)
    report.findings.extend(
        Finding("error", "patient_in_splits", None, problem) for problem in manifest.straddling_patients(data.rows)
    )
    report.findings.extend(
        Finding("error", problem.code, row.file_name, problem.message)
        for row, problem in manifest.synthetic_leaks(data.rows)
    )
    report.findings.extend(
        Finding("error", "dark_images", None, problem) for problem in manifest.dark_images(highest, data.root)
    )
    report.findings.extend(Finding("error", "damaged_shard", None, problem) for problem in shards.damaged(data))
    add_copies(report, looks)
    report.findings.extend(prompt_findings(data.rows, knowledge))
    report.findings.extend(class_findings(data.rows))
    if report.unknown_terms:
        message = f"not in the {knowledge.organ} knowledge base and left out of the prompts: "
        shown = [f"{word!r} {count}" for word, count in report.unknown_terms.most_common(2 * SHOWN)]
        rest = len(report.unknown_terms) - len(shown)
        message += ", ".join(shown) + (f" and {rest} more" if rest else "")
        report.findings.append(Finding("warning", "unknown_terms", None, message))
    return report


# ---------------------------------------------------------------------------------------------------------- row by row


def look_at_all(data: Manifest, knowledge: Knowledge, fine: bool, workers: int) -> Iterator[Look]:
    """A look at each row, in order, with a progress bar."""
    with tqdm(total=len(data.rows), desc="check", unit="row") as bar:
        if workers == 1 or len(data.rows) < WORTH_A_POOL:
            look = partial(look_at, root=data.root, knowledge=knowledge, fine=fine, siblings=Siblings(data.root))
            for row in data.rows:
                yield look(row)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")  # a forked child inherits OpenCV's threads as locks
        options = {"root": data.root, "knowledge": knowledge, "fine": fine, "siblings": Siblings(data.root)}
        with ProcessPoolExecutor(workers, spawn, _start_worker, (options,)) as pool:
            for found in pool.map(_look, data.rows, chunksize=64):
                yield found
                bar.update()


_options: dict[str, Any] = {}  # of a worker process, set once, as a knowledge base is too large to send with each row


def _start_worker(options: dict[str, Any]) -> None:
    _options.update(options)


def _look(row: Row) -> Look:
    return look_at(row, **_options)


def look_at(row: Row, root: Path, knowledge: Knowledge, fine: bool, siblings: Siblings) -> Look:
    """Open the files of one row and read its texts."""
    problems, images = manifest.file_problems(root, row, fine, siblings)
    problems = [*manifest.text_problems(row, knowledge), *problems]
    parsed = manifest.parsed(knowledge, row.text)
    impossible = knowledge.impossible(parsed.attributes)
    if "file_name" not in images:
        return Look(problems, parsed.unknown, impossible)
    # By its own bits: with 65535 as white a dark set's images are nearly black, so that all would look alike.
    gray = to_gray_alone(images["file_name"])
    digest = hashlib.blake2b(gray.tobytes() + repr(gray.shape).encode(), digest_size=16).digest()
    return Look(
        problems, parsed.unknown, impossible, digest, perceptual_hash(gray), thumbnail(gray).tobytes(),
        brightest(images["file_name"]),
    )  # fmt: skip


def unknown_words(path: Path, knowledge: Knowledge) -> Counter[str]:
    """What the `text` columns of a manifest say that the knowledge base does not know, and how often.

    `read` has split these texts, so the rows no longer hold what it left out.
    """
    words: Counter[str] = Counter()
    with open(path, encoding="utf-8-sig") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # told of already
            if isinstance(record, dict) and isinstance(record.get("text"), str):
                words.update(word.lower() for word in knowledge.parse(record["text"]).unknown)
    return words


# --------------------------------------------------------------------------------------------------------- duplicates


def add_copies(report: Report, looks: Sequence[Look]) -> None:
    """Find rows that show the same picture; across splits, or with different labels, that is an error.

    Each row is told of once at most. Near duplicates of one patient in one split (frames of a clip) are none.
    """
    rows = report.data.rows
    first_with: dict[bytes, int] = {}
    for index, look in enumerate(looks):
        if look.digest is not None and (first := first_with.setdefault(look.digest, index)) != index:
            _add_copy(report, rows[first], rows[index], "duplicate", "has the same pixels as")
    told: set[int] = set()
    for i, j in near_copies(rows, looks, np.array(list(first_with.values()), dtype=np.int64)).tolist():
        if j not in told:
            _add_copy(report, rows[i], rows[j], "near_duplicate", "looks the same as")
        told.add(j)


def near_copies(rows: Sequence[Row], looks: Sequence[Look], distinct: NDArray[np.int64]) -> NDArray[np.int64]:
    """(M, 2) pairs i < j among the rows `distinct` that show one picture, but not one patient in one split."""
    hashes = np.array([looks[index].hash for index in distinct], dtype=np.uint64)
    unique, group = np.unique(hashes, return_inverse=True)
    by_group = np.argsort(group, kind="stable")  # rows of one hash stand together, the first of them leads
    leader = by_group[np.searchsorted(group[by_group], np.arange(len(unique)))]
    same_hash = np.stack([leader[group], np.arange(len(hashes))], axis=1)
    same_hash = same_hash[same_hash[:, 0] != same_hash[:, 1]]
    pairs = np.sort(np.concatenate([leader[near_pairs(unique, NEAR_BITS)], same_hash]), axis=1)
    units = np.unique([unit_of(rows[index]) for index in distinct], return_inverse=True)[1]
    splits = np.array([SPLITS.index(_split(rows[index])) for index in distinct])
    apart = (units[pairs] != units[pairs[:, ::-1]]).any(axis=1) | (splits[pairs] != splits[pairs[:, ::-1]]).any(axis=1)
    pairs = pairs[apart]
    members, place = np.unique(pairs, return_inverse=True)  # only their thumbnails are needed
    thumbnails = np.zeros((len(members), 32, 32), np.uint8)
    for number, index in enumerate(np.take(distinct, members).tolist()):
        thumbnails[number] = np.frombuffer(looks[index].thumbnail or b"", np.uint8).reshape(32, 32)
    same = same_picture(place.reshape(-1, 2), thumbnails, NEAR_CORRELATION)
    return np.take(distinct, np.take(members, same))


def _add_copy(report: Report, first: Row, second: Row, code: str, says: str) -> None:
    """Tell of one pair. The held-out row of a pair is the one to keep."""
    order = {"test": 0, "valid": 1, "train": 2}
    kept, other = sorted((first, second), key=lambda row: order[_split(row)])
    report.copies.append((kept.file_name, other.file_name))
    message = f"{says} {kept.file_name}"
    if first.label != second.label:
        message = f"{message}, but the labels are {other.label} and {kept.label}: find out which is right"
        report.findings.append(Finding("error", f"{code}_label", other.file_name, message))
    if _split(first) != _split(second):
        message = f"{says} {kept.file_name}, which is in {_split(kept)}, this in {_split(other)}: drop this row"
        report.findings.append(Finding("error", f"{code}_across_splits", other.file_name, message))
    elif first.label == second.label:
        report.findings.append(Finding("warning", code, other.file_name, f"{says} {kept.file_name}"))


def _split(row: Row) -> str:
    return row.split or "train"


# ------------------------------------------------------------------------------------------------------ the whole set


def prompt_findings(rows: Sequence[Row], knowledge: Knowledge) -> Iterator[Finding]:
    """Prompts that the text encoder cuts at 77 tokens, with the terms that fall off."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = list({text for row in rows for text in (row.text_fg, row.text_bg, row.text)})
    cut: dict[str, str] = {}
    for start in range(0, len(texts), 10_000):
        part = texts[start : start + 10_000]
        for text, encoding in zip(part, tokenizer.encode_batch(part), strict=True):
            if len(encoding.ids) > MAX_TOKENS:
                end = encoding.offsets[MAX_TOKENS - 2][1]  # the last place is the end token's
                lost = [span.term for span in knowledge.term_classes(text) if span.end > end]
                cut[text] = f"has {len(encoding.ids)} tokens, of {MAX_TOKENS} that fit: {', '.join(lost) or text[end:]}"
    for row in rows if cut else ():
        for column in ("text_fg", "text_bg", "text"):
            if problem := cut.get(getattr(row, column)):
                name = "the joint prompt" if column == "text" else column
                yield Finding("warning", "long_prompt", row.file_name, f"{name} {problem} falls off")


def class_counts(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Split → label → rows, splits in their order."""
    counts = Counter((row.split or "no split", row.label or "no label") for row in rows)
    splits = [split for split in (*SPLITS, "no split") if any(split == found for found, _ in counts)]
    return {split: {label: n for (s, label), n in sorted(counts.items()) if s == split} for split in splits}


def class_findings(rows: Sequence[Row]) -> Iterator[Finding]:
    """Classes that a split lacks, where there are splits."""
    found = {(row.split, row.label) for row in rows if row.split and row.label and not row.synthetic}
    splits = [split for split in SPLITS if any(split == other for other, _ in found)]
    for label in sorted({str(label) for _, label in found}):
        if lacking := [split for split in splits if (split, label) not in found]:
            message = f"class {label} has no real image in {' and '.join(lacking)}: measures there say nothing of it"
            yield Finding("warning", "class_missing", None, message)


def summary(data: Manifest) -> str:
    """Rows per split and label, one line each."""
    lines = [f"{data.path}: {len(data.rows)} rows, {len({row.patient_id for row in data.rows} - {None})} patients"]
    for split, labels in class_counts(data.rows).items():
        told = "  ".join(f"{label} {count}" for label, count in labels.items())
        lines.append(f"  {split:8s} {sum(labels.values()):6d}   {told}")
    return "\n".join(lines)
