"""A copy of a data set in which what needs no judgement is mended, and the rest left out; each change is told.

python -m data.prepare check --data_dir mine --fix mended
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.check import Report
from data.sources.writer import write_png
from tiger import manifest, shards
from tiger.conditions import (
    WHITE,
    Gray,
    binarize,
    brightest,
    open_image,
    remove_bars,
    sobel_map,
    to_gray,
    to_gray_alone,
)
from tiger.errors import InputError
from tiger.files import atomic_path, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Row, Siblings

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
LOG = "mended.json"


class Lost(Exception):
    """Why a row cannot be mended."""


def mend(report: Report, knowledge: Knowledge, output_dir: Path, workers: int) -> list[str]:
    """Write the mended copy; returns what was done, a line each, which `mended.json` in the copy holds too.

    Raises InputError when the folder is not new, or nothing can be kept.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise InputError(f"--fix {output_dir}: is not empty: give a new folder")
    done = [f"{finding.message}: left out" for finding in report.findings if finding.code == "structure"]
    rows = together(report.data.rows, done)
    rows = without_leaks(rows, done)
    rows = without_copies(rows, report.copies, done)
    siblings = Siblings(report.data.root)
    fix = partial(
        mend_row, root=report.data.root, output_dir=output_dir, knowledge=knowledge, siblings=siblings,
        white=report.white,
    )  # fmt: skip
    kept = []
    with ThreadPoolExecutor(workers) as pool:  # decoding and copying release the interpreter lock
        for row, told in tqdm(pool.map(fix, rows), total=len(rows), desc="mend", unit="row"):
            done += told
            if row is not None:
                kept.append(row)
    if not kept:
        raise InputError(f"{report.data.path}: no row can be mended")
    manifest.write(output_dir / manifest.FILE_NAME, kept)
    write_json(output_dir / LOG, {"from": str(report.data.path), "rows": len(kept), "changes": done})
    return [*done, f"{len(kept)} of {len(report.data.rows)} rows are in {output_dir}, {len(done)} changes in {LOG}"]


# ----------------------------------------------------------------------------------------------------- the whole set


def together(rows: Iterable[Row], done: list[str]) -> list[Row]:
    """Each patient in the split that holds most of its images, rather train; synthetic rows in train."""
    rows = list(rows)
    splits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.patient_id is not None and not row.synthetic:
            splits[row.patient_id][row.split or "train"] += 1
    home = {
        patient: max(counts, key=lambda split: (counts[split], split == "train")) for patient, counts in splits.items()
    }
    moved = []
    for row in rows:
        split = "train" if row.synthetic else home.get(row.patient_id or "", row.split)
        if split != row.split and (row.split or "train") != split:
            done.append(f"{row.file_name}: moved from {row.split or 'train'} to {split}")
            row = replace(row, split=split)
        moved.append(row)
    return moved


def without_leaks(rows: list[Row], done: list[str]) -> list[Row]:
    """Without synthetic rows that derive from held-out images."""
    leaking = {row.file_name: problem.message for row, problem in manifest.synthetic_leaks(rows)}
    done += [f"{name}: left out: {message}" for name, message in leaking.items()]
    return [row for row in rows if row.file_name not in leaking]


def without_copies(rows: list[Row], copies: list[tuple[str, str]], done: list[str]) -> list[Row]:
    """Without the second of two rows that show one picture, and without both where their labels differ.

    Near duplicates within one split stay: they may be two views of one lesion.
    """
    by_name = {row.file_name: row for row in rows}
    dropped: dict[str, str] = {}
    for kept, other in copies:
        if kept not in by_name or other not in by_name or kept in dropped:
            continue
        a, b = by_name[kept], by_name[other]
        if a.label != b.label:
            dropped |= {
                kept: f"shows what {other} shows, as {b.label}",
                other: f"shows what {kept} shows, as {a.label}",
            }
        else:
            dropped[other] = f"shows what {kept} shows"
    done += [f"{name}: left out: {why}" for name, why in dropped.items()]
    return [row for row in rows if row.file_name not in dropped]


# --------------------------------------------------------------------------------------------------------- row by row


def mend_row(
    row: Row, root: Path, output_dir: Path, knowledge: Knowledge, siblings: Siblings, white: int
) -> tuple[Row | None, list[str]]:
    """Write one row's files. Returns the row as it is now, None if it is lost, and what was done."""
    done: list[str] = []
    try:
        row = mend_texts(row, knowledge, done)
        image = mend_image(row, root, output_dir, siblings, white, done)
        columns: dict[str, str | None] = {}
        for column in ("condition_fg", "organ_mask"):
            if getattr(row, column) is None:
                continue
            try:
                mask = mend_mask(getattr(row, column), image.shape, root, siblings, done)
                if column == "condition_fg" and mask.all():
                    raise Lost(f"{row.condition_fg} is full")
                columns[column] = png_name(getattr(row, column))
                write_png(output_dir / str(columns[column]), mask)
            except Lost as lost:
                if column == "condition_fg":
                    raise
                done.append(f"organ_mask left out: {lost}")
                columns[column] = None
        if row.condition_bg is not None:
            columns["condition_bg"] = png_name(row.condition_bg)
            edges = mend_map(row.condition_bg, image, root, siblings, done)
            write_png(output_dir / str(columns["condition_bg"]), edges)
    except Lost as lost:
        return None, [f"{row.file_name}: left out: {lost}"]
    return replace(row, **columns), [f"{row.file_name}: {change}" for change in done]


def mend_texts(row: Row, knowledge: Knowledge, done: list[str]) -> Row:
    """The row with the first of two contradictory terms, and without unknown attributes."""
    codes = {problem.code for problem in manifest.text_problems(row, knowledge)}
    if lost := codes & {"unknown_label", "label_and_text"}:
        raise Lost(f"{' and '.join(sorted(lost))}: {row.label!r}")
    if "contradiction" in codes:
        text_fg, text_bg = knowledge.split(row.text)
        done.append(f"of contradictory terms the first is kept: {text_fg}, {text_bg}")
        row = replace(row, text_fg=text_fg, text_bg=text_bg)
    if "unknown_attribute" in codes:
        known = {key: category.terms for key, category in knowledge.categories.items()}
        attributes = {key: term for key, term in row.attributes.items() if term in known.get(key, ())}
        done.append(f"attributes left out: {', '.join(sorted(row.attributes.keys() - attributes.keys()))}")
        row = replace(row, attributes=attributes)
    return row


def opened(name: str, root: Path, siblings: Siblings, done: list[str]) -> tuple[Path, Image.Image]:
    """A file of the data set, or the one that may be meant by its name."""
    path = root / name
    if not shards.exists(path):
        found = siblings.find(path)
        if found is None:
            raise Lost(f"{name} does not exist")
        done.append(f"{name} was {found.name}")
        path = found
    try:
        return path, open_image(path)
    except InputError as error:
        raise Lost(str(error)) from error


def mend_image(row: Row, root: Path, output_dir: Path, siblings: Siblings, white: int, done: list[str]) -> Gray:
    """Copy the image, in the format that its name says and in 8 bits; returns its pixels."""
    path, image = opened(row.file_name, root, siblings, done)
    wanted = FORMATS.get(Path(row.file_name).suffix.lower(), image.format)
    gray = to_gray(image, white)
    dark = bool(brightest(image)) and white < WHITE
    if dark:
        done.append(f"{row.file_name} held values up to {brightest(image)}, is in 8 bits now, where {white} is white")
    if image.format != wanted:
        done.append(f"{row.file_name} held {image.format}, is {wanted} now")
    with atomic_path(output_dir / row.file_name) as temporary:
        if dark or image.format != wanted:
            Image.fromarray(gray).save(temporary, format=wanted)
        else:
            temporary.write_bytes(shards.read_bytes(path))
    return gray


def mend_mask(name: str, shape: tuple[int, ...], root: Path, siblings: Siblings, done: list[str]) -> Gray:
    """The mask in 0 and 255, without bars, as large as the image."""
    mask = to_gray_alone(opened(name, root, siblings, done)[1])
    if mask.max(initial=0) == 1:
        done.append(f"{name} held 0 and 1, holds 0 and 255 now")
        mask = mask * np.uint8(255)
    clean = binarize(remove_bars(mask))
    if (mask[(mask > 0) & (mask < 255)]).any():
        done.append(f"{name} had grey levels, is cut at 128")
    if (binarize(mask) != clean).any():
        done.append(f"{name} had a white bar, is black there")
    if clean.shape != shape:
        clean = resized(name, clean, shape, done)
    if not clean.any():
        raise Lost(f"{name} is empty")
    return clean


def mend_map(name: str, image: Gray, root: Path, siblings: Siblings, done: list[str]) -> Gray:
    """The map, or a new one where it is missing, damaged or of another size."""
    try:
        edges = to_gray(opened(name, root, siblings, done)[1])
    except Lost as lost:
        done.append(f"{name} made anew: {lost}")
        return sobel_map(image)
    if edges.shape != image.shape:
        done.append(f"{name} made anew: it was {edges.shape[1]}x{edges.shape[0]}")
        return sobel_map(image)
    return edges


def resized(name: str, mask: Gray, shape: tuple[int, ...], done: list[str]) -> Gray:
    """A mask of the same proportions in another size."""
    proportions = [height / width for height, width in (mask.shape, shape)]
    if abs(proportions[0] / proportions[1] - 1) > 0.02:
        raise Lost(f"{name} is {mask.shape[1]}x{mask.shape[0]}, the image {shape[1]}x{shape[0]}")
    done.append(f"{name} was {mask.shape[1]}x{mask.shape[0]}, is as large as the image now")
    size = shape[1], shape[0]
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST), dtype=np.uint8)


def png_name(name: str) -> str:
    """Masks and maps are written as PNG; the old suffix stays in the name, which might be another file's without it."""
    return name if name.endswith(".png") else f"{name}.png"
