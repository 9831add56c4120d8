"""CheXpert v1.0: 224,316 chest x-rays of 65,240 patients with 14 observations each, read from reports by a labeller.

Irvin et al., AAAI 2019;33:590-597, arXiv:1901.07031; Stanford University Dataset Research Use Agreement.

    python -m data.prepare build --source chexpert --input CheXpert-v1.0-small --output_dir runs/chexpert --size 256
"""

from pathlib import Path, PurePosixPath

from data.sources.writer import collect_rows, read_csv, write_case
from tiger.conditions import read_gray
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, assign_splits

FINDINGS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
COLUMNS = ("Path", "Frontal/Lateral", "AP/PA", "No Finding", *FINDINGS)
UNCERTAIN = ("zeros", "ones", "ignore")  # the paper's U-Zeros, U-Ones, U-Ignore for the value -1
FRACTIONS = {"train": 0.95, "valid": 0.05}


def build(input_dir: Path, output_dir: Path, size: int | None, seed: int, uncertain: str) -> list[Row]:
    """Write gray images and Sobel maps of the frontal views; return the rows.

    Findings of value 1 go into the prompt; 0 and blank (not mentioned) are left unsaid. The label is `pneumonia` where
    that is present, `normal` where the line says No Finding, else `other disease`. Test is the published valid.csv,
    which radiologists read; valid is cut from the published training patients.

    Args:
        uncertain: what -1 means: "zeros" absent, "ones" present; "ignore" leaves the image out.
    """
    knowledge = Knowledge.load("chest_xray")
    records = {
        split: read_csv(input_dir / f"{name}.csv", COLUMNS) for split, name in (("train", "train"), ("test", "valid"))
    }
    lines = [(split, record) for split, table in records.items() for record in table]
    frontal = [line for line in lines if line[1]["Frontal/Lateral"] == "Frontal"]
    used = [
        line for line in frontal if uncertain != "ignore" or not any(value(line[1][name]) == -1 for name in FINDINGS)
    ]

    def row(line: tuple[str, dict[str, str]]) -> Row:
        split, record = line
        path = PurePosixPath(*PurePosixPath(record["Path"]).parts[1:])  # without CheXpert-v1.0 or CheXpert-v1.0-small
        if ".." in path.parts or path.is_absolute():
            raise InputError(f"{path}: leaves the folder")
        stem = "_".join(path.with_suffix("").parts[1:])
        columns = write_case(output_dir, stem, read_gray(input_dir / path), None, size)
        label, attributes = meaning(record, uncertain, knowledge)
        text_fg, text_bg = knowledge.compose(label, attributes)
        return Row(**columns, text_fg=text_fg, text_bg=text_bg, label=label, attributes=attributes, source="CheXpert",
                   split=split, patient_id=path.parts[1])  # fmt: skip

    rows = collect_rows(row, used, "CheXpert", input_dir)
    print(
        f"left out {len(lines) - len(frontal)} lateral views, {len(frontal) - len(used)} images with uncertain findings"
    )
    train = assign_splits([row for row in rows if row.split == "train"], FRACTIONS, seed)
    return [*train, *(row for row in rows if row.split == "test")]


def meaning(record: dict[str, str], uncertain: str, knowledge: Knowledge) -> tuple[str, dict[str, str]]:
    """(label, attributes) of one line."""
    present = [
        name for name in FINDINGS if value(record[name]) == 1 or (value(record[name]) == -1 and uncertain == "ones")
    ]
    view = f"{record['AP/PA']} view" if record["AP/PA"] in ("AP", "PA") else ""
    attributes = knowledge.parse(", ".join([*(name for name in present if name != "Pneumonia"), view])).attributes
    if "Pneumonia" in present:
        return "pneumonia", attributes
    return ("normal" if value(record["No Finding"]) == 1 else "other disease"), attributes


def value(cell: str) -> int:
    """1, 0 or -1; a blank is 0: not mentioned."""
    return int(float(cell or 0))
