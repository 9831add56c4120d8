"""Small manifests of simple pictures, for the tests of `eval/`: a disc on noise, whose level tells the class."""

from pathlib import Path

import numpy as np
from PIL import Image

from tiger import manifest
from tiger.conditions import sobel_map
from tiger.manifest import Manifest, Row

LEVELS = {"benign": 60, "PTC": 120, "FTC": 180, "MTC": 240}
PLACES = ("upper pole", "middle pole", "inferior pole")


def picture(label: str, rng: np.random.Generator, size: int, grain: float) -> tuple[np.ndarray, np.ndarray, str]:
    """(image, mask, location), a disc of the class's level in one of three places."""
    place = int(rng.integers(3))
    y, x = np.mgrid[:size, :size]
    disc = np.hypot(y - size * rng.uniform(0.4, 0.6), x - size * (place + 0.5) / 3) < size * rng.uniform(0.1, 0.15)
    image = np.where(disc, LEVELS[label], 30) + rng.normal(0, grain, (size, size))
    return np.clip(image, 0, 255).astype(np.uint8), np.where(disc, 255, 0).astype(np.uint8), PLACES[place]


def write_dataset(
    folder: Path,
    counts: dict[str, dict[str, int]],
    *,
    seed: int = 0,
    size: int = 32,
    grain: float = 12.0,
    synthetic: bool = False,
    prefix: str = "P",
    sources: list[str] | None = None,
) -> Manifest:
    """`counts` is split -> label -> images; a patient has two. Synthetic rows are derived from `sources` in turn."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for split, labels in counts.items():
        for label, count in labels.items():
            for i in range(count):
                image, mask, place = picture(label, rng, size, grain)
                name = f"{prefix}{len(rows):04d}.png"
                arrays = {"images": image, "condition_fg": mask, "condition_bg": sobel_map(image)}
                for column, array in arrays.items():
                    (folder / column).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(folder / column / name)
                row = Row(
                    file_name=f"images/{name}",
                    text_fg=f"{place}",
                    text_bg="sonogram longitudinal plane",
                    condition_fg=f"condition_fg/{name}",
                    condition_bg=f"condition_bg/{name}",
                    label=label,
                    patient_id=f"{prefix}-{split}-{label}-{i // 2}",
                    split=split,
                    attributes={"location": place},
                    synthetic=synthetic,
                    derived_from=(sources[len(rows) % len(sources)],) if sources else (),
                )
                rows.append(row)
    manifest.write(folder / "metadata.jsonl", rows)
    return manifest.read(folder)
