"""What must never be in a test: synthetic images, sources of synthetic ones, patients or pictures seen in training."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.images import load_native, name_rows
from tiger import manifest as manifests
from tiger.errors import InputError
from tiger.knowledge import Knowledge
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
    problems += [trained_on(real, folder) for folder in generators(fake)]
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


def generators(fake: Manifest) -> list[Path]:
    """The folders of the models that made synthetic rows, as far as the rows say so and the folders are here."""
    names = {row.model.rpartition("@")[0] or row.model for row in fake.rows if row.model}
    return [Path(name) for name in sorted(names) if (Path(name) / "config.yaml").is_file()]


def training_sets(folder: Path) -> Iterator[Manifest]:
    """What a generator was trained on: the rows that its config.yaml names, then those of the model it started from.

    Data sets and models that are no longer there are left out.
    """
    seen: set[Path] = set()
    while (folder / "config.yaml").is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        data = config.get("data_dir")
        if data and Path(data).exists():
            knowledge = Knowledge.load(config.get("knowledge") or "thyroid")
            yield manifests.read(data, knowledge).select(split=config.get("split") or "train")
        folder = Path(str(config.get("pretrained_model")))


def trained_on(real: Manifest, generator: Path) -> str | None:
    """What is wrong where a generator has seen a held-out image, its patient, or a copy of it elsewhere."""
    kept_out = held_out(real)
    names, patients = {row.file_name for row in kept_out}, {row.patient_id for row in kept_out} - {None}
    for seen in training_sets(generator):
        if seen.root.resolve() == real.root.resolve():
            found = [row for row in seen.rows if row.file_name in names or row.patient_id in patients]
        else:
            known = {_digest(load_native(real, row)) for row in kept_out}
            found = [row for row in seen.rows if _digest(load_native(seen, row)) in known]
        if found:
            return _problem(seen, f"the generator {generator} was trained on patients of valid or test", found)
    return None


def refuse_copies(
    training: Manifest, keys: Sequence[bytes], kept_out: Manifest, kept_out_keys: Sequence[bytes]
) -> None:
    """Raise an InputError that names training images whose every pixel equals a held-out image's; keys: see keys_of."""
    known = {key: row.file_name for row, key in zip(kept_out.rows, kept_out_keys, strict=True)}
    copies = [f"{row.file_name} = {known[key]}" for row, key in zip(training.rows, keys, strict=True) if key in known]
    if copies:
        where = f"valid or test of {kept_out.path}"
        raise InputError(f"{training.path}: images that are also in {where}: {name_rows(copies)}; drop them")


def keys_of(images: np.ndarray) -> list[bytes]:
    """A digest of the pixels of each of (N, H, W) images."""
    return [_digest(image) for image in images]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
