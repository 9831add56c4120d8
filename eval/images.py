"""Manifest rows -> arrays in memory, for everything in `eval/` that looks at pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiger import manifest as manifests
from tiger.conditions import read_gray, read_mask
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row


def read_split(data_dir: str | Path, split: str | None, *, synthetic: bool | None = None) -> Manifest:
    """The rows of one split (None: all rows). A split without rows is an error, for no judgement can be made on it."""
    rows = manifests.read(data_dir, Knowledge.load("thyroid"))
    chosen = rows.select(split=split, synthetic=synthetic) if split is not None else rows.select(synthetic=synthetic)
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
    """All images as (N, size, size) uint8 grey, resized by PIL with antialiasing where they differ in size."""
    return _stack([read_gray(manifest.file(row, "file_name"), size) for row in manifest.rows], size)


def load_masks(manifest: Manifest, size: int) -> np.ndarray:
    """All nodule masks as (N, size, size) bool."""
    require_column(manifest, "condition_fg")
    return _stack([read_mask(manifest.file(row, "condition_fg"), size) for row in manifest.rows], size) > 0


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


def name_rows(names: Sequence[str], most: int = 8) -> str:
    """`a.png, b.png and 7 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def group_of(row: Row) -> str:
    """Images of one group are not independent: those of a patient, synthetic ones drawn after the same real image."""
    return row.derived_from[0] if row.derived_from else row.patient_id or row.file_name
