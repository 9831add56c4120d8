"""Manifest rows -> arrays in memory, for everything in `eval/` that looks at pixels."""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tiger import manifest as manifests
from tiger.conditions import read_gray, read_mask
from tiger.errors import InputError, name_rows
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row

BRIGHT = 64  # of 255: fewer is what 14 bits in files of 16 give


def add_knowledge(parser: argparse.ArgumentParser) -> None:
    """The flag of every command that reads manifests; `read_split` takes its value."""
    parser.add_argument(
        "--knowledge",
        default="thyroid",
        help="knowledge base of prompts, reports and attributes: name or YAML file (default: %(default)s)",
    )


def refuse_below(args: argparse.Namespace, **least: int) -> None:
    """Raise InputError where a number of the command line is less than it may be; None is none."""
    for name, fewest in least.items():
        if (value := getattr(args, name)) is not None and value < fewest:
            raise InputError(f"--{name} {value}: must be {fewest} or more")


def refuse_learning_rate(value: float) -> None:
    """Raise InputError unless the flag's value is a finite number above 0."""
    if not 0 < value < math.inf:
        raise InputError(f"--learning_rate {value}: must be a number above 0")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names every default in --help, but for flags that have none, where argparse writes "None"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def read_split(
    data_dir: str | Path, split: str | None, *, synthetic: bool | None = None, knowledge: str | Path = "thyroid"
) -> Manifest:
    """The rows of one split (None: all rows), of synthetic or of real images alone where that is asked for.

    Args:
        data_dir: folder with a metadata.jsonl, or that file.
        knowledge: name or file of the knowledge base that takes reports in one `text` column apart.
    Raises InputError where there are none, for no judgement can be made on nothing, and where a patient has real rows
    in several splits.
    """
    rows = manifests.read(data_dir, Knowledge.load(knowledge))
    manifests.refuse(rows.path, list(manifests.straddling_patients(row for row in rows.rows if not row.synthetic)))
    kind = rows.select(synthetic=synthetic)
    if not kind.rows:
        found = "no row is marked synthetic; give what generation.py wrote" if synthetic else "every row is synthetic"
        raise InputError(f"{rows.path}: {found}")
    return kind if split is None else select_split(kind, split)


def select_split(rows: Manifest, split: str) -> Manifest:
    """The rows of one split. Raises InputError where there are none."""
    chosen = rows.select(split=split)
    if not chosen.rows:
        found = ", ".join(sorted({str(row.split) for row in rows.rows}))
        raise InputError(
            f"{rows.path}: no row with split '{split}' (found: {found}); run `python -m data.prepare split`"
        )
    return chosen


def load_native(manifest: Manifest, row: Row) -> np.ndarray:
    """One image as (H, W) uint8 grey, in its own size."""
    return read_gray(manifest.file(row, "file_name"))


def load_images(manifest: Manifest, size: int) -> np.ndarray:
    """All images as (N, size, size) uint8 grey, resized by PIL with antialiasing where they differ in size.

    Raises InputError where they are black (see `refuse_black`).
    """
    images = _stack([read_gray(manifest.file(row, "file_name"), size) for row in manifest.rows], size)
    refuse_black(manifest, images)
    return images


def refuse_black(manifest: Manifest, images: Iterable[np.ndarray]) -> None:
    """Raise an InputError where no pixel of a whole set's images, uint8, is BRIGHT: so look images of 10 to 14 bits in
    files of 16, and all that is said of them would be nonsense."""
    top = max((int(image.max(initial=0)) for image in images), default=BRIGHT)
    if top < BRIGHT:
        raise InputError(
            f"{manifest.path}: no pixel of {len(manifest.rows)} images is above {top} of 255; if they use few of their "
            f"16 bits, python -m data.prepare check --data_dir {manifest.root} --fix FOLDER scales them"
        )


def load_masks(manifest: Manifest, size: int) -> np.ndarray:
    """All nodule masks as (N, size, size) bool. Raises InputError where some are empty."""
    require_column(manifest, "condition_fg")
    masks = _stack([read_mask(manifest.file(row, "condition_fg"), size) for row in manifest.rows], size) > 0
    if empty := [row.file_name for row, mask in zip(manifest.rows, masks, strict=True) if not mask.any()]:
        raise InputError(
            f"{manifest.path}: empty masks of {name_rows(empty)}, where no value is 128 or more; draw them or drop the "
            f"rows, or where they hold 0 and 1: python -m data.prepare check --data_dir {manifest.root}"
        )
    return masks


def load_maps(manifest: Manifest, size: int) -> np.ndarray:
    """All Sobel maps as (N, size, size) uint8."""
    require_column(manifest, "condition_bg")
    return _stack([read_gray(manifest.file(row, "condition_bg"), size) for row in manifest.rows], size)


def _stack(arrays: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.stack(arrays) if arrays else np.zeros((0, size, size), np.uint8)


def require_column(manifest: Manifest, column: str) -> None:
    """Every row has a value in `column`, or an InputError names those that have none."""
    missing = [row.file_name for row in manifest.rows if not getattr(row, column)]
    if missing:
        raise InputError(f"{manifest.path}: column '{column}' is needed but empty in {name_rows(missing)}")


def patients_of(rows: Iterable[Row]) -> dict[str, str]:
    """File name -> patient; a row without one is a patient of its own."""
    return {row.file_name: row.patient_id or row.file_name for row in rows}


def source_patients(row: Row, patient_of: Mapping[str, str]) -> list[str]:
    """The patients a row was made from, that of its Sobel map first; its own where it is real or of unknown origin."""
    return [patient_of.get(name, name) for name in row.derived_from] or [row.patient_id or row.file_name]


def group_of(row: Row, patient_of: Mapping[str, str]) -> str:
    """Images of one group are not independent: those of a patient, and synthetic ones drawn after a patient's map."""
    return source_patients(row, patient_of)[0]


def matched(a: Sequence[Row], b: Sequence[Row], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of rows of `a` and of `b`, drawn at random: equally many of each class on both sides."""
    chosen: tuple[list[int], list[int]] = ([], [])
    for label in sorted({str(row.label) for row in a} & {str(row.label) for row in b}):
        places = [rng.permutation([i for i, row in enumerate(rows) if str(row.label) == label]) for rows in (a, b)]
        count = min(len(some) for some in places)
        for into, some in zip(chosen, places, strict=True):
            into.extend(some[:count].tolist())
    return np.array(chosen[0], int), np.array(chosen[1], int)


def shuffled(count: int) -> np.ndarray:
    """(count,) a fixed random order in which nothing keeps its place."""
    order = np.random.default_rng(0).permutation(count)
    moved = np.empty(count, np.int64)
    moved[order] = np.roll(order, 1)
    return moved
