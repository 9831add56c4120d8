"""For the tests of `eval/`: small manifests of simple pictures, a disc whose level tells the class; and scores."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.figures import Run, Scores
from tiger import manifest
from tiger.conditions import sobel_map
from tiger.errors import InputError
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


def scores(n: int, gain: float, seed: int, images: int = 1) -> Scores:
    """`n` patients of each class with so many images, told apart the better the larger `gain` is."""
    rng = np.random.default_rng([7, seed])
    y = np.repeat([0, 1], n * images)
    logit = gain * y + np.repeat(rng.normal(0, 0.7, 2 * n), images) + rng.normal(0, 0.7, 2 * n * images)
    p = 1 / (1 + np.exp(-logit))
    names = [f"i{i}" for i in range(len(y))]
    return Scores(y, np.stack([1 - p, p], 1), [f"P{i // images}" for i in range(len(y))], names)


def make_run(
    condition: str, gain: float, seed: int = 0, fold: int | None = None, noise: int = 0, images: int = 1
) -> Run:
    arm, _, amount = condition.partition(":")
    settings = {"arm": arm, "amount": int(amount) if amount else None, "real_share": 1.0}
    notes = {"selected_step": 1, "images_per_second": 1.0, "settings": settings}
    parts = (scores(60, gain, 1000 * noise + 10 * (fold or 0) + part, images) for part in (1, 2))
    return Run(condition, "all", seed, fold, ["benign", "FTC"], *parts, notes)


def assert_leaks_are_refused(
    main: Callable[[], None], fake: Manifest, data: Path, held_out: str, tmp_path: Path
) -> None:
    """Images derived from a held-out one, and a generator trained on the test of `data`; `fake` is then as it was."""
    manifest.write(fake.path, [replace(row, derived_from=(held_out,)) for row in fake.rows])
    with pytest.raises(InputError, match="rows derived from valid or test images of .*: images/S0000.png"):
        main()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.yaml").write_text(f"data_dir: {data}\nsplit: test\n")
    manifest.write(fake.path, [replace(row, model=f"{tmp_path / 'net'}@abc") for row in fake.rows])
    with pytest.raises(InputError, match="the generator .*net was trained on patients of valid or test"):
        main()
    manifest.write(fake.path, fake.rows)
