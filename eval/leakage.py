"""What must never be in a test: synthetic images, sources of synthetic ones, patients or pictures seen in training."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.images import load_native, name_rows
from tiger import manifest as manifests
from tiger.errors import InputError
from tiger.files import read_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, straddling_patients
from tiger.shards import content_hash, exists


def held_out(manifest: Manifest) -> list[Row]:
    """The rows of valid and test."""
    return [row for row in manifest.rows if row.split in ("valid", "test")]


def refuse_leakage(real: Manifest, fakes: Sequence[Manifest], extra: Manifest | None = None) -> None:
    """Raise one InputError that names the rows by which held-out data could reach a training."""
    problems = [
        _problem(real, "synthetic rows; give them as --fake", (row for row in real.rows if row.synthetic)),
        _problem(real, "derived_from in valid or test", (row for row in held_out(real) if row.derived_from)),
    ]
    problems += [f"{real.path}: {problem}" for problem in straddling_patients(real.rows)]
    kept_out = {row.file_name for row in held_out(real)}
    for fake in fakes:
        made_from = (row for row in fake.rows if kept_out.intersection(row.derived_from))
        problems += [
            _problem(fake, "rows not marked synthetic", (row for row in fake.rows if not row.synthetic)),
            _problem(fake, f"rows derived from valid or test images of {real.path}", made_from),
        ]
    hash_of = functools.cache(lambda name: _hash_if_there(real.root / name))  # for all stages of all generators
    for folder in dict.fromkeys(folder for fake in fakes for folder in generators(fake)):
        problems.append(trained_on(real, folder, hash_of))
    if extra is not None:
        patients = {row.patient_id for row in held_out(real)} - {None}
        problems.append(_problem(extra, "synthetic rows", (row for row in extra.rows if row.synthetic)))
        shared = (row for row in extra.rows if row.patient_id in patients)
        problems.append(_problem(extra, f"patients who are in valid or test of {real.path}", shared))
    found = [problem for problem in problems if problem]
    if found:
        raise InputError("; ".join(found))
    known = {row.file_name for row in real.rows}  # another copy of the data set, such as its shards, has other names
    for fake in fakes:
        if strange := [row.file_name for row in fake.rows if set(row.derived_from) - known]:
            what = f"derived from images that {real.path} does not name, so not checked: {name_rows(strange)}"
            print(f"warning: {fake.path}: {what}", file=sys.stderr)


def _problem(manifest: Manifest, what: str, rows: Iterable[Row]) -> str | None:
    names = [row.file_name for row in rows]
    return f"{manifest.path}: {what}: {name_rows(names)}" if names else None


def generators(fake: Manifest) -> list[Path]:
    """The folders of the models that made synthetic rows, as far as the rows say so; one that is not here is named."""
    names = {row.model.rpartition("@")[0] or row.model for row in fake.rows if row.model}
    found = [Path(name) for name in sorted(names)]
    for folder in found:
        if not (folder / "config.yaml").is_file():
            print(f"warning: {fake.path}: what {folder} was trained on is not checked: it is not here", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Training:
    """What one stage of a generator was trained on."""

    files: dict[str, str]  # image -> hash of its file, noted when it was trained; empty for models of older code
    rows: Manifest | None  # the same rows as their data set has them now, where it is still there


def trainings(folder: Path) -> Iterator[Training]:
    """What a generator was trained on, then the model that it started from, and so on as far as they are here."""
    passed: set[Path] = set()
    while (folder / "config.yaml").is_file() and folder.resolve() not in passed:
        passed.add(folder.resolve())
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        inputs = folder / "inputs.json"
        files: dict[str, str] = read_json(inputs).get("files", {}) if inputs.is_file() else {}
        data, rows = config.get("data_dir"), None
        if data and Path(data).exists():
            rows = manifests.read(data, Knowledge.load(config.get("knowledge") or "thyroid"))
            split = config.get("split") or "train"
            noted = tuple(row for row in rows.rows if row.file_name in files)  # whatever split they are in now
            rows = replace(rows, rows=noted) if files else rows.select(split=split)
        if not files and rows is None:
            what = f"what {folder} was trained on is not checked: it did not note its files, and {data} is not here"
            print(f"warning: {what}", file=sys.stderr)
        yield Training(files, rows)
        folder = Path(str(config.get("pretrained_model")))


def seen_rows(real: Manifest, training: Training, hash_of: Callable[[str], str]) -> list[Row]:
    """The real rows that a generator was trained on: files of the same content, the same names, or the same pixels
    under other names."""
    hashes, rows = set(training.files.values()), training.rows
    seen = [row for row in real.rows if hashes and hash_of(row.file_name) in hashes]
    if rows is None:
        return seen
    if rows.root.resolve() == real.root.resolve():
        return [*seen, *rows.rows]
    pixels = {_digest(load_native(rows, row)) for row in rows.rows}
    return seen + [row for row in real.rows if _digest(load_native(real, row)) in pixels]


def trained_on(real: Manifest, generator: Path, hash_of: Callable[[str], str]) -> str | None:
    """What is wrong where a generator has seen a held-out image, its patient, or a copy of it elsewhere.

    hash_of: name of a file of `real` -> its content_hash.
    """
    for training in trainings(generator):
        seen = seen_rows(real, training, hash_of)
        names, patients = {row.file_name for row in seen}, {row.patient_id for row in seen} - {None}
        found = [row for row in held_out(real) if row.file_name in names or row.patient_id in patients]
        if found:
            return _problem(real, f"the generator {generator} was trained on patients of valid or test", found)
    return None


def refuse_copies(
    training: Manifest, keys: Sequence[bytes], kept_out: Manifest, kept_out_keys: Sequence[bytes]
) -> None:
    """Raise an InputError that names images every pixel of which equals that of one kept out; keys: see keys_of."""
    known = {key: row.file_name for row, key in zip(kept_out.rows, kept_out_keys, strict=True)}
    copies = [f"{row.file_name} = {known[key]}" for row, key in zip(training.rows, keys, strict=True) if key in known]
    if copies:
        where = f"{kept_out.rows[0].split} of {kept_out.path}"
        raise InputError(f"{training.path}: images that are also in {where}: {name_rows(copies)}; drop them")


def keys_of(images: np.ndarray) -> list[bytes]:
    """A digest of the pixels of each of (N, H, W) images."""
    return [_digest(image) for image in images]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def _hash_if_there(path: Path) -> str:
    return content_hash(path) if exists(path) else ""  # who reads it says that it lacks
