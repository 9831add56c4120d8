"""BUSI: 780 breast ultrasound images of 600 women, benign, malignant and normal, with lesion masks.

Al-Dhabyani et al., Data in Brief 2020;28:104863, doi:10.1016/j.dib.2019.104863.

    python -m data.prepare build --source busi --input Dataset_BUSI_with_GT --output_dir runs/busi --size 256
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.duplicates import NEAR_BITS, NEAR_CORRELATION, near_pairs, perceptual_hash, same_picture, thumbnail
from data.sources.writer import collect_rows, merge_masks, write_case
from tiger.conditions import Gray, read_gray, read_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Row, assign_splits

IMAGE = re.compile(r"(benign|malignant|normal) \(\d+\)")
MASK = re.compile(rf"({IMAGE.pattern})_mask(_\d+)?")
FRACTIONS = {"train": 0.7, "valid": 0.1, "test": 0.2}


def build(input_dir: Path, output_dir: Path, size: int | None, seed: int) -> list[Row]:
    """Write images, masks (all lesions of an image in one) and Sobel maps; return the rows, split.

    BUSI names no patients and shows some lesions more than once: images that look alike get one `patient_id`, so that
    no split sees another's. Normal images have no lesion to train the foreground on: they are left out, and counted.
    Raises one InputError that lists every image without a mask.
    """
    knowledge = Knowledge.load("breast")
    files = {path.stem: path for path in input_dir.rglob("*.png")}
    names = sorted(name for name in files if IMAGE.fullmatch(name))
    if not names:
        raise InputError(f"{input_dir}: holds no 'benign (1).png' at any depth: give the folder Dataset_BUSI_with_GT")
    masks: dict[str, list[Path]] = {name: [] for name in names}
    for stem, path in files.items():
        if (match := MASK.fullmatch(stem)) and match[1] in masks:
            masks[match[1]].append(path)
    lesions = [name for name in names if not name.startswith("normal")]
    images: dict[str, Gray] = {}

    def row(name: str) -> Row:
        if not masks[name]:
            raise InputError(f"has no {name}_mask.png: download it again")
        label, stem = name.split()[0], re.sub(r"\W+", "_", name).strip("_")
        gray = read_gray(files[name])
        images[name] = gray
        columns = write_case(output_dir, stem, gray, merge_masks([read_mask(path) for path in masks[name]]), size)
        text_fg, text_bg = knowledge.compose(label, {})
        return Row(**columns, text_fg=text_fg, text_bg=text_bg, label=label, source="BUSI")

    rows = collect_rows(row, lesions, "BUSI", input_dir)
    print(f"left out {len(names) - len(lesions)} of {len(names)} images: normal, with no lesion to mask")
    groups = look_alikes([images[name] for name in lesions])
    print(f"{len(lesions)} images look like {len(set(groups))} patients")
    rows = [replace(row, patient_id=f"look-alike {group}") for row, group in zip(rows, groups, strict=True)]
    return list(assign_splits(rows, FRACTIONS, seed))


def look_alikes(images: list[Gray]) -> list[int]:
    """A number for each image, the same for those that are near-duplicates by the rule of `check`, in chains too."""
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    pairs = same_picture(
        near_pairs(hashes, NEAR_BITS), np.stack([thumbnail(image) for image in images]), NEAR_CORRELATION
    )
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (len(images), len(images)))
    return connected_components(links, directed=False)[1].tolist()
