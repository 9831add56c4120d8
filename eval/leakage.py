"""What must never be in a test: synthetic images, sources of synthetic ones, patients or pictures seen in training."""

import hashlib
from collections.abc import Iterable

import numpy as np

from eval.images import name_rows
from tiger.errors import InputError
from tiger.manifest import Manifest, Row, straddling_patients


def held_out(manifest: Manifest) -> list[Row]:
    """The rows of valid and test."""
    return [row for row in manifest.rows if row.split in ("valid", "test")]


def refuse_leakage(real: Manifest, fake: Manifest, extra: Manifest | None = None) -> None:
    """Raise one InputError that names the rows by which held-out data could reach a training."""
    problems = [
        _problem(real, "synthetic rows; give them as --fake", (row for row in real.rows if row.synthetic)),
        _problem(real, "derived_from in valid or test", (row for row in held_out(real) if row.derived_from)),
        _problem(fake, "rows not marked synthetic", (row for row in fake.rows if not row.synthetic)),
    ]
    kept_out = {row.file_name for row in held_out(real)}
    made_from = (row for row in fake.rows if kept_out.intersection(row.derived_from))
    problems.append(_problem(fake, f"rows derived from valid or test images of {real.path}", made_from))
    problems += [f"{real.path}: {problem}" for problem in straddling_patients(real.rows)]
    if extra is not None:
        patients = {row.patient_id for row in held_out(real)} - {None}
        problems.append(_problem(extra, "synthetic rows", (row for row in extra.rows if row.synthetic)))
        shared = (row for row in extra.rows if row.patient_id in patients)
        problems.append(_problem(extra, f"patients who are in valid or test of {real.path}", shared))
    found = [problem for problem in problems if problem]
    if found:
        raise InputError("; ".join(found))


def _problem(manifest: Manifest, what: str, rows: Iterable[Row]) -> str | None:
    names = [row.file_name for row in rows]
    return f"{manifest.path}: {what}: {name_rows(names)}" if names else None


def refuse_copies(training: Manifest, images: np.ndarray, kept_out: Manifest, kept_out_images: np.ndarray) -> None:
    """Raise an InputError that names training images, (N, H, W), whose every pixel equals a held-out image's."""
    known = {_digest(image): row.file_name for row, image in zip(kept_out.rows, kept_out_images, strict=True)}
    copies = [
        f"{row.file_name} = {known[_digest(image)]}"
        for row, image in zip(training.rows, images, strict=True)
        if _digest(image) in known
    ]
    if copies:
        where = f"valid or test of {kept_out.path}"
        raise InputError(f"{training.path}: images that are also in {where}: {name_rows(copies)}; drop them")


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
