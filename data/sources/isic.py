"""ISIC 2018 (task 3) and 2019: dermoscopic images of skin lesions with their diagnoses, one of seven or eight classes.

Tschandl et al., Sci Data 2018;5:180161 (HAM10000); Codella et al., arXiv:1902.03368; Combalia et al., arXiv:1908.02288;
CC BY-NC 4.0.

    python -m data.prepare build --source isic --input ISIC --output_dir runs/skin --size 256
"""

from pathlib import Path

from data.sources.writer import collect_rows, read_csv, write_case
from tiger.conditions import read_gray, read_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, assign_splits

CLASSES = {"MEL": "MEL", "NV": "NV", "BCC": "BCC", "AKIEC": "AK", "AK": "AK", "BKL": "BKL", "DF": "DF", "VASC": "VASC",
           "SCC": "SCC"}  # fmt: skip  # column → label; 2018 writes AKIEC for what 2019 calls AK
FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}


def build(input_dir: Path, output_dir: Path, size: int | None, seed: int) -> list[Row]:
    """Write gray images and Sobel maps, and masks where `<image>_segmentation.png` is there; return the rows, split.

    The tables `*GroundTruth.csv` may be those of one year or of both, whose common images are taken once. ISIC names no
    patients: the unit is `lesion_id`, from `*LesionGroupings.csv` or `*Metadata.csv`, else the image. Images of unknown
    class (UNK) are left out, and counted. Raises one InputError that lists every image that is missing.
    """
    knowledge = Knowledge.load("skin")
    truths, lesions = tables(input_dir, "*GroundTruth.csv"), tables(input_dir, "*LesionGroupings.csv", "*Metadata.csv")
    if not truths:
        raise InputError(f"{input_dir}: holds no *GroundTruth.csv at any depth: give the folder of ISIC 2018 or 2019")
    files = {path.stem: path for suffix in ("jpg", "png") for path in input_dir.rglob(f"*.{suffix}")}
    label_of = {image: label for image, record in truths.items() if (label := diagnosis(record))}
    lesion_of = {image: record["lesion_id"] for image, record in lesions.items() if record.get("lesion_id")}

    def row(image: str) -> Row:
        if image not in files:
            raise InputError(f"no {image}.jpg below {input_dir}: download it, or drop its line")
        mask = files.get(f"{image}_segmentation")
        columns = write_case(output_dir, image, read_gray(files[image]), read_mask(mask) if mask else None, size)
        text_fg, text_bg = knowledge.compose(label_of[image], {})
        return Row(**columns, text_fg=text_fg, text_bg=text_bg, label=label_of[image], source="ISIC",
                   patient_id=lesion_of.get(image, image))  # fmt: skip

    rows = collect_rows(row, list(label_of), "ISIC", input_dir)
    print(f"left out {len(truths) - len(rows)} of {len(truths)} images: of unknown class")
    print(f"{len(set(label_of) - set(lesion_of))} images have no lesion_id: each counts alone")
    return list(assign_splits(rows, FRACTIONS, seed))


def tables(input_dir: Path, *patterns: str) -> dict[str, dict[str, str]]:
    """Image → its line in the first table that has one, of all tables that match and have a column `image`."""
    lines: dict[str, dict[str, str]] = {}
    for path in sorted(path for pattern in patterns for path in input_dir.rglob(pattern)):
        for record in read_csv(path, ("image",)):
            lines.setdefault(record["image"], record)
    return lines


def diagnosis(record: dict[str, str]) -> str | None:
    """The label of a one-hot line; None for UNK."""
    return next((label for column, label in CLASSES.items() if float(record.get(column) or 0) == 1), None)
