"""VinDr-PCXR (PediCXR): 9,125 chest x-rays of children as DICOM, with 36 findings in boxes and 15 diseases.

Pham et al., Sci Data 2023;10:240, doi:10.13026/k8qc-na36 (PhysioNet, restricted access, its own data use agreement).

    python -m data.prepare build --source vindr_pcxr --input vindr-pcxr/1.0.0 --output_dir runs/pcxr --size 256
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data.dicom import read_image
from data.sources.writer import collect_rows, read_csv, write_case
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, assign_splits

# The four diseases of the Tiger paper's Table 5, column → label; the spelling is the data set's.
DISEASES = {"Bronchitis": "bronchitis", "Pneumonia": "pneumonia", "Brocho-pneumonia": "broncho-pneumonia",
            "Bronchiolitis": "bronchiolitis"}  # fmt: skip
RARE = "pneumonia"
VIEW = "PA view"  # every image of the set is one
FRACTIONS = {"train": 0.9, "valid": 0.1}


def build(input_dir: Path, output_dir: Path, size: int | None, seed: int, rare_share: float) -> list[Row]:
    """Write gray images and Sobel maps of the four-disease task of the Tiger paper's Table 5; return the rows.

    The findings of an image (`annotations_*.csv`) are its prompt, its disease (`image_labels_*.csv`) the label. Images
    of none or several of the four diseases are left out, and counted. The published test images are the test split.
    The headers name no patients; each study is of another child, so each image counts as one.

    Args:
        rare_share: pneumonia in train is cut to this share of train's commonest class, by chance; 1 keeps all.
    """
    knowledge = Knowledge.load("chest_xray")
    labels: dict[str, str] = {}
    splits: dict[str, str] = {}
    findings: defaultdict[str, list[str]] = defaultdict(list)
    total = 0
    for split in ("train", "test"):
        for record in read_csv(input_dir / f"image_labels_{split}.csv", ("image_id", *DISEASES)):
            total += 1
            diseases = [label for column, label in DISEASES.items() if float(record.get(column) or 0) == 1]
            if len(diseases) == 1:
                labels[record["image_id"]], splits[record["image_id"]] = diseases[0], split
        for record in read_csv(input_dir / f"annotations_{split}.csv", ("image_id", "class_name")):
            findings[record["image_id"]].append(record["class_name"])
    print(f"left out {total - len(labels)} of {total} images: of none or several of {', '.join(DISEASES)}")
    kept = thinned(labels, splits, rare_share, seed)
    print(f"left out {len(labels) - len(kept)} training images of {RARE}: it is to be rare")

    def row(image: str) -> Row:
        if Path(image).name != image:
            raise InputError(f"{image!r} is no file name")
        gray = read_image(input_dir / splits[image] / f"{image}.dicom")
        columns = write_case(output_dir, image, gray, None, size)
        attributes = knowledge.parse(", ".join([*sorted(set(findings[image]) - {"No finding"}), VIEW])).attributes
        text_fg, text_bg = knowledge.compose(labels[image], attributes)
        return Row(**columns, text_fg=text_fg, text_bg=text_bg, label=labels[image], attributes=attributes,
                   source="VinDr-PCXR", split=splits[image], patient_id=image)  # fmt: skip

    rows = collect_rows(row, kept, "VinDr-PCXR", input_dir)
    train = assign_splits([row for row in rows if row.split == "train"], FRACTIONS, seed)
    return [*train, *(row for row in rows if row.split == "test")]


def thinned(labels: dict[str, str], splits: dict[str, str], share: float, seed: int) -> list[str]:
    """The images that stay when the rare class in train is cut to `share` of its commonest class."""
    counts = Counter(label for image, label in labels.items() if splits[image] == "train")
    rare = sorted(image for image, label in labels.items() if label == RARE and splits[image] == "train")
    wanted = math.ceil(share * max(counts.values(), default=0))
    dropped = set(np.random.default_rng(seed).permutation(rare)[wanted:].tolist())
    return [image for image in labels if image not in dropped]
