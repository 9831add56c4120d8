"""DICOM in, gray PNGs out, and nothing that names a patient.

    python -m data.prepare dicom --input export --output_dir runs/deid --key_file site.key --table reports.csv

The output is a folder that `build --source folder` reads: images/<code>.png and metadata.csv. No DICOM is written, so
no attribute can be left behind and no confidentiality profile (PS3.15 E) is needed: the images hold pixels only, and
the table holds a coded patient id and what training needs. Codes are HMAC-SHA256 under a key: with --key_file they are
the same in every run of a site, otherwise the key is random and forgotten. As a file's name may name a patient, files
are called by their number in sorted order (`find export -type f | LC_ALL=C sort | sed -n 17p` shows number 17).
"""

import contextlib
import csv
import hashlib
import hmac
import logging
import multiprocessing
import os
import secrets
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import config, dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, iter_pixels
from tqdm import tqdm

from data.burned_in import Box, blacken, text_boxes
from data.sources.writer import write_png
from tiger.conditions import Gray
from tiger.errors import InputError
from tiger.files import atomic_path, write_json
from tiger.knowledge import Knowledge

MODALITIES = ("US", "CR", "DX")  # other files of an export are report pages, dose sheets, segmentations
TEXT_POLICIES = ("mask", "refuse", "keep")
KEY_BYTES = 16  # the least that a key file must hold
# Columns of --table: one that says which image a line is about, and what a manifest may take from it.
JOIN_COLUMNS = ("file", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID")
TABLE_COLUMNS = ("text", "label", "split", "plane")

# pydicom quotes values in what it warns of and logs.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").disabled = True


class Unusable(Exception):
    """A file that gives no image. The message is one of a few fixed texts and quotes nothing of the file."""


# ------------------------------------------------------------------------------------------------------------- pixels


def reason(error: Exception) -> str:
    """Why a file gives no image, quoting nothing of it. pydicom and its decoders raise anything on a damaged file."""
    if isinstance(error, RuntimeError):  # of pydicom: no decoder managed
        return "its pixels cannot be decoded (damaged, or lossy JPEG of 12 bits)"
    return str(error) if isinstance(error, Unusable) else f"damaged: {type(error).__name__}"


def read(path: str | Path) -> Dataset:
    """Read a DICOM file with pixels. Raises Unusable, and whatever pydicom does."""
    try:
        dataset = dcmread(path)
    except InvalidDicomError as error:
        raise Unusable("no DICOM file") from error
    if "PixelData" not in dataset:
        raise Unusable("has no pixels of 16 bits or less")
    return dataset


def read_image(path: str | Path) -> Gray:
    """The first frame of a file as HxW uint8. Raises InputError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return next(gray_frames(read(path), [0]))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a DICOM image ({reason(error)}): replace the file") from error


def frame_count(dataset: Dataset) -> int:
    """How many frames the file holds."""
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def gray_frames(dataset: Dataset, indices: Sequence[int]) -> Iterator[Gray]:
    """HxW uint8 of each asked frame, as a viewer would show it.

    Transfer syntaxes are decoded by pydicom with GDCM, which cuts off bits that hold an overlay; YBR becomes RGB,
    palettes are looked up, and colour is converted by its luma. Of gray images rescale, then VOI LUT or the first
    window (PS3.3 C.11) give the display range; without a window it is all that 8 bits hold, and of deeper images the
    frame's own, as in viewers. MONOCHROME1 and the INVERSE presentation are turned over, so that air is black.
    Raises Unusable, and whatever the decoders do.
    """
    for pixels in iter_pixels(dataset, indices=list(indices)):
        yield _to_gray(pixels, dataset)


def _to_gray(pixels: NDArray[Any], dataset: Dataset) -> Gray:
    """One decoded frame, HxW or HxWx3, → HxW uint8."""
    if dataset.BitsAllocated > 16:
        raise Unusable("has no pixels of 16 bits or less")
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        depth = 8 * pixels.itemsize
    else:
        depth = int(dataset.BitsStored)
    if pixels.ndim == 3:
        return np.array(Image.fromarray((pixels >> max(0, depth - 8)).astype(np.uint8)).convert("L"))
    return _displayed(pixels.astype(np.int32), dataset)


def _displayed(values: NDArray[np.int32], dataset: Dataset) -> Gray:
    """Stored values → display values by one table, which holds the whole transfer of rescale, window and inversion."""
    padding = np.isin(values, _padding(dataset))
    image = values if padding.all() else values[~padding]
    low, high = int(image.min()), int(image.max())
    table = np.asarray(apply_modality_lut(np.arange(low, high + 1), dataset), np.float64)
    if dataset.get("VOILUTSequence"):
        black, white = 0, (1 << dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
        table = np.asarray(apply_voi(table, dataset), np.float64)
    elif "WindowCenter" in dataset:  # the ends of its range, whether or not the frame reaches them
        *table, black, white = apply_windowing(np.append(table, (-np.inf, np.inf)), dataset)
    elif dataset.BitsStored <= 8:  # what a screen shows as it is
        first = -(1 << dataset.BitsStored - 1) if dataset.PixelRepresentation else 0
        ends = apply_modality_lut(np.array((first, first + (1 << dataset.BitsStored) - 1)), dataset)
        black, white = min(ends), max(ends)
    else:
        black, white = table.min(), table.max()
    table = np.clip((np.asarray(table) - black) / ((white - black) or 1), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        table = 1 - table
    shown = np.rint(table * 255).astype(np.uint8)[np.clip(values, low, high) - low]
    return np.where(padding, 0, shown).astype(np.uint8)


def _padding(dataset: Dataset) -> NDArray[np.int64]:
    """The stored values that are no image but padding around it."""
    first = dataset.get("PixelPaddingValue")
    if not isinstance(first, int):
        return np.empty(0, np.int64)
    last = dataset.get("PixelPaddingRangeLimit", first)
    return np.arange(min(first, last), max(first, last) + 1)


def scan_regions(dataset: Dataset) -> list[Box]:
    """The 2D tissue and colour flow areas of an ultrasound image (PS3.3 C.8.5.5), without what lies in another of them.

    An empty list says that the file does not tell; Doppler, M-mode and waveform areas are no images.
    """
    boxes = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or ():
        if item.get("RegionSpatialFormat") == 1 and item.get("RegionDataType") in (1, 2):
            x0, y0 = max(0, item.RegionLocationMinX0), max(0, item.RegionLocationMinY0)
            x1 = min(dataset.Columns, item.RegionLocationMaxX1 + 1)
            y1 = min(dataset.Rows, item.RegionLocationMaxY1 + 1)
            boxes.append((x0, y0, x1, y1))
    if any(x1 <= x0 or y1 <= y0 for x0, y0, x1, y1 in boxes):
        raise Unusable("its ultrasound regions lie outside the image")
    boxes = list(dict.fromkeys(boxes))
    return [a for a in boxes if not any(a != b and _within(a, b) for b in boxes)]


def _within(inner: Box, outer: Box) -> bool:
    (x0, y0, x1, y1), (left, top, right, bottom) = inner, outer
    return left <= x0 and top <= y0 and x1 <= right and y1 <= bottom


# ------------------------------------------------------------------------------------------------------------- coding


def read_key(path: str | Path | None) -> bytes:
    """The bytes of a key file, or a random key. Raises InputError on a missing or short file."""
    if path is None:
        return secrets.token_bytes(32)
    if not Path(path).is_file():
        raise InputError(
            f"--key_file {path}: no such file; make one: openssl rand -hex 32 > {path}, and keep it secret"
        )
    key = Path(path).read_bytes().strip()
    if len(key) < KEY_BYTES:
        raise InputError(f"--key_file {path}: holds {len(key)} bytes, too few to be a secret: give {KEY_BYTES} or more")
    return key


def code(key: bytes, kind: str, value: str) -> str:
    """16 hex digits that stand for `value`: the same for the same key, and of no use without it."""
    return hmac.new(key, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:16]


def patient_code(key: bytes, dataset: Dataset) -> tuple[str, bool]:
    """The patient's code, and whether it is known: without a PatientID each study counts as a patient of its own."""
    if patient := str(dataset.get("PatientID") or "").strip():
        return code(key, "patient", patient), True
    return code(key, "study", str(dataset.get("StudyInstanceUID") or dataset.get("SOPInstanceUID"))), False


# -------------------------------------------------------------------------------------------------------- one file


@dataclass
class Result:
    """What became of one file."""

    images: list[str] = field(default_factory=list)
    patient: str = ""  # code
    patient_known: bool = True
    lookup: dict[str, str] = field(default_factory=dict)  # values of JOIN_COLUMNS; they stay in memory
    left_out: str | None = None
    removed: set[str] = field(default_factory=set)  # keywords of its attributes, none of which is kept
    cropped: bool = False
    text_boxes: int = 0
    images_with_text: int = 0


@dataclass(frozen=True)
class Options:
    """How files are converted; `frames` 0 is all."""

    key: bytes
    frames: int
    text: Literal["mask", "refuse", "keep"]
    modalities: tuple[str, ...]
    dry_run: bool


def convert(path: Path, input_dir: Path, output_dir: Path, options: Options) -> Result:
    """Write the images of one file."""
    result = Result()
    try:
        with warnings.catch_warnings(action="ignore"):
            images = render(read(path), path.relative_to(input_dir).as_posix(), options, result)
    except InputError:
        raise
    except Exception as error:  # its traceback could quote the file
        result.left_out = reason(error)
        return result
    for file_name, image in images.items():
        if not options.dry_run:
            write_png(output_dir / file_name, image)
    result.images = list(images)
    return result


def render(dataset: Dataset, file: str, options: Options, result: Result) -> dict[str, Gray]:
    """File name → image for each frame and region; what is learnt of the file goes into `result`. Raises Unusable."""
    result.removed = set(attributes(dataset))
    if dataset.get("Modality") not in options.modalities:
        raise Unusable("of another modality (--modalities)")
    regions = scan_regions(dataset)
    result.cropped = bool(regions)
    result.patient, result.patient_known = patient_code(options.key, dataset)
    result.lookup = {name: str(dataset.get(name) or "").strip() for name in JOIN_COLUMNS} | {"file": file}
    declared = dataset.get("BurnedInAnnotation") == "YES" and not regions
    name = code(options.key, "image", str(dataset.get("SOPInstanceUID") or file))
    picked = pick_frames(frame_count(dataset), options.frames)
    images = {}
    for index, frame in zip(picked, gray_frames(dataset, picked), strict=True):
        for place, (x0, y0, x1, y1) in enumerate(regions or [(0, 0, frame.shape[1], frame.shape[0])]):
            image = clean_text(frame[y0:y1, x0:x1], declared, options.text, result)
            images[f"images/{name}-{index:04d}-{place}.png"] = image
    return images


def attributes(dataset: Dataset) -> Iterator[str]:
    """The keyword of every attribute, in nested sequences too; private ones and unknown ones under one name each."""
    for element in dataset.iterall():
        yield "private" if element.tag.is_private else keyword_for_tag(element.tag) or "unknown"


def pick_frames(count: int, wanted: int) -> list[int]:
    """`wanted` frames spread evenly over a clip, each from the middle of its part; 0 is all."""
    wanted = count if wanted == 0 else min(count, wanted)
    return [int((part + 0.5) * count / wanted) for part in range(wanted)]


def clean_text(image: Gray, declared: bool, policy: str, result: Result) -> Gray:
    """Mask or refuse burned-in text, and count it. Raises Unusable.

    Args:
        declared: the file says that it bears text, and no crop has taken it off: none found then means not found.
    """
    if policy == "keep":
        return image
    boxes = text_boxes(image)
    result.text_boxes += len(boxes)
    result.images_with_text += bool(boxes)
    if boxes and policy == "refuse":
        raise Unusable("bears text")
    if declared and not boxes:
        raise Unusable("says that it bears text, but none was found")
    return blacken(image, boxes)


# ----------------------------------------------------------------------------------------------------------- a folder


def deidentify(
    input_dir: Path, output_dir: Path, *, key_file: str | None, table: str | None, knowledge: Knowledge, frames: int,
    text: Literal["mask", "refuse", "keep"], modalities: Sequence[str], workers: int, dry_run: bool,
) -> dict[str, Any]:  # fmt: skip
    """Convert every file below `input_dir`; write images/, metadata.csv and report.json, and return the report.

    Args:
        table: CSV with one of JOIN_COLUMNS and any of TABLE_COLUMNS, or None. Of its texts only the terms of
            `knowledge` are kept, so that a name in a report goes nowhere.
        frames: frames of a clip, spread evenly; 0 is all.
    """
    options = Options(read_key(key_file), frames, text, tuple(modalities), dry_run)
    if not input_dir.is_dir():
        raise InputError(f"--input {input_dir}: no such folder")
    if key_file and Path(key_file).resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"--key_file {key_file}: lies in the output, which is to be handed on: keep it elsewhere")
    labels = Table.read(table, knowledge) if table else None
    paths = sorted((path for path in input_dir.rglob("*") if path.is_file()), key=lambda path: os.fsencode(path))
    if not paths:
        raise InputError(f"--input {input_dir}: holds no files")
    work = partial(convert, input_dir=input_dir, output_dir=output_dir, options=options)
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a forked child inherits OpenCV's threads as locked locks
            run = partial(stack.enter_context(ProcessPoolExecutor(workers, spawn)).map, chunksize=4)
        results = list(tqdm(run(work, paths), total=len(paths), desc="DICOM", unit="file"))
    rows = {  # one of several copies
        name: {"file_name": name, "patient_id": result.patient, **(labels.of(result.lookup) if labels else {})}
        for result in results
        for name in result.images
    }
    report = summarise(results, rows, options, key_file, labels)
    if not dry_run:
        write_csv(output_dir / "metadata.csv", list(rows.values()))
        write_json(output_dir / "report.json", report)
    if not rows:
        told = "; ".join(f"{len(numbers)}: {why}" for why, numbers in report["left_out"].items())
        raise InputError(f"--input {input_dir}: none of {len(paths)} files gave an image ({told})")
    return report


def summarise(
    results: Sequence[Result], rows: dict[str, Any], options: Options, key_file: str | None, labels: "Table | None"
) -> dict[str, Any]:
    """What was done and what was removed: counts, DICOM keywords and file numbers, no value of any file."""
    left_out: defaultdict[str, list[int]] = defaultdict(list)
    for number, result in enumerate(results, 1):
        if result.left_out:
            left_out[result.left_out].append(number)
    images = sum(len(result.images) for result in results)
    return {
        "files": len(results),
        "images": len(rows),
        "copies": images - len(rows),
        "patients": len({row["patient_id"] for row in rows.values()}),
        "files_without_patient_id": sum(not result.patient_known for result in results if result.images),
        "codes": "HMAC-SHA256 under the key file" if key_file else "HMAC-SHA256 under a random key that was not kept",
        "frames_of_a_clip": options.frames or "all",
        "files_cropped_to_scan_region": sum(result.cropped for result in results if result.images),
        "text": {
            "policy": options.text,
            "images_with_text": sum(result.images_with_text for result in results),
            "boxes": sum(result.text_boxes for result in results),
        },
        "table": None
        if labels is None
        else {
            "lines": len(labels.lines),
            "images_with_a_line": sum(len(row) > 2 for row in rows.values()),
            "phrases_left_out": labels.unknown,
        },
        "left_out": dict(sorted(left_out.items())),
        "removed_attributes": dict(sorted(Counter(name for result in results for name in result.removed).items())),
    }


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """Write metadata.csv, atomically."""
    columns = ["file_name", "patient_id", *(name for name in TABLE_COLUMNS if any(name in row for row in rows))]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class Table:
    """What a CSV says of the images, in the knowledge base's words only."""

    column: str  # one of JOIN_COLUMNS
    lines: dict[str, dict[str, str]]  # its value → columns
    unknown: int  # phrases of texts that the knowledge base does not know; they are dropped unseen

    @staticmethod
    def read(path: str, knowledge: Knowledge) -> "Table":
        """Raises one InputError that lists the bad lines by number, quoting nothing of them."""
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                records = list(reader)
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"--table {path}: cannot be read as UTF-8 CSV ({type(error).__name__})") from error
        joins = [name for name in reader.fieldnames or () if name in JOIN_COLUMNS]
        if len(joins) != 1:
            raise InputError(f"--table {path}: needs one of the columns {', '.join(JOIN_COLUMNS)}, has {len(joins)}")
        table, problems = Table(joins[0], {}, 0), []
        for number, record in enumerate(records, 2):
            identity = (record[joins[0]] or "").strip()
            columns = {name: (record.get(name) or "").strip() for name in TABLE_COLUMNS}
            if identity in table.lines:
                problems.append(f"line {number}: its {joins[0]} is in an earlier line: drop one")
            if columns["label"] and columns["label"] not in knowledge.subtypes:
                problems.append(f"line {number}: label is none of {', '.join(knowledge.subtypes)}")
            for name, allowed in (("split", ("train", "valid", "test")), ("plane", ("longitudinal", "transverse"))):
                if columns[name] and columns[name] not in allowed:
                    problems.append(f"line {number}: {name} is none of {', '.join(allowed)}")
            if columns["text"]:
                parsed = knowledge.parse(columns["text"])
                table.unknown += len(parsed.unknown)
                problems += [f"line {number}: the text contradicts itself, {what}" for what in parsed.contradictions]
                columns["text"] = ", ".join(filter(None, knowledge.split(columns["text"])))
            if identity:
                table.lines[identity] = {name: value for name, value in columns.items() if value}
        if problems:
            raise InputError("\n  ".join([f"--table {path}: {len(problems)} problems:", *problems]))
        return table

    def of(self, lookup: dict[str, str]) -> dict[str, str]:
        """The columns of the line about one image; none where there is no such line."""
        return self.lines.get(lookup[self.column], {})
