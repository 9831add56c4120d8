"""What must never be in a test: synthetic images, sources of synthetic ones, patients or pictures seen in training.

What cannot be found out is no leak, but it is said, on stderr and in the report: images of other tools do not say which
model made them, a model's folder may be elsewhere, and rows may not say whose images they are.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from data.duplicates import NEAR_BITS, NEAR_CORRELATION, perceptual_hash, same_picture, thumbnail
from eval.images import load_images, load_native
from tiger import manifest as manifests
from tiger.errors import InputError, name_rows
from tiger.files import read_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, straddling_patients
from tiger.output import model_fingerprint
from tiger.shards import content_hash, exists

CONFIG, INPUTS = "config.yaml", "inputs.json"  # which every training of ours leaves in its output folder
LOOK_SIZE = 64  # px at which images are compared that a command does not load in one size itself
Looks = tuple[NDArray[np.uint64], NDArray[np.uint8]]  # perceptual hashes (N,), thumbnails (N, 32, 32)


def held_out(manifest: Manifest) -> list[Row]:
    """The rows of valid and test."""
    return [row for row in manifest.rows if row.split in ("valid", "test")]


class Checked(NamedTuple):
    """What a search for leaks that found none can tell besides."""

    unchecked: list[str]  # what could not be checked, a sentence each
    seen: set[str]  # names of the real rows that a generator is known to have been trained on


def refuse_leakage(real: Manifest, fakes: Sequence[Manifest], extra: Manifest | None = None) -> Checked:
    """Raise one InputError that names the rows by which held-out data could reach a training.

    What could not be checked is said on stderr too.
    """
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
    unchecked, every_seen = [text for fake in fakes for text in unknown_makers(real, fake)], set[str]()
    unchecked += [text for rows in (real, extra) if rows is not None for text in unknown_patients(rows)]
    for folder, noted in dict.fromkeys(maker for fake in fakes for maker in generators(fake)):
        of_one, untold, seen = check_trainings(real, f"the generator {folder}", folder, noted, hash_of)
        problems += of_one
        unchecked += untold
        every_seen |= seen
    if extra is not None:
        patients = {row.patient_id for row in held_out(real)} - {None}
        problems.append(_problem(extra, "synthetic rows", (row for row in extra.rows if row.synthetic)))
        shared = (row for row in extra.rows if row.patient_id in patients)
        problems.append(_problem(extra, f"patients who are in valid or test of {real.path}", shared))
    found = list(dict.fromkeys(problem for problem in problems if problem))
    if found:
        raise InputError("; ".join(found))
    return Checked(said(unchecked), every_seen)


def said(unchecked: Iterable[str]) -> list[str]:
    """Each once, and on stderr too."""
    found = list(dict.fromkeys(unchecked))
    for text in found:
        print(f"warning: {text}", file=sys.stderr)
    return found


def check_trainings(
    real: Manifest, net: str, folder: Path, noted: str, hash_of: Callable[[str], str]
) -> tuple[list[str], list[str], set[str]]:
    """(problems, what could not be checked, names of the real rows seen) of the trainings behind a net's folder; net:
    what to call it, noted: see trainings."""
    problems: list[str] = []
    unchecked: list[str] = []
    names = set[str]()
    for stage in trainings(folder, noted):
        seen = seen_rows(real, stage, hash_of)
        names |= {row.file_name for row in seen}
        problems += [text for text in [trained_on(real, net, seen)] if text]
        told = (stage.unknown, unfound(real, folder, stage, hash_of), same_names(real, folder, stage))
        unchecked += [text for text in told if text]
    return problems, unchecked, names


def unknown_patients(real: Manifest) -> list[str]:
    """What real rows without a patient leave unsaid; nothing where every row names one."""
    names = dict.fromkeys(row.file_name for row in real.rows)
    nameless = dict.fromkeys(row.file_name for row in real.rows if row.patient_id is None)
    if not nameless:
        return []
    return [
        f"{real.path}: {len(nameless)} of {len(names)} rows have no patient_id: {name_rows(list(nameless))}: each of "
        "these images counts as a patient of its own, so a patient who is in several splits is not noticed, and "
        "intervals may be too narrow; fill the column in (with the file's name where every image is of another patient)"
    ]


def unknown_weights(path: str | None) -> list[str]:
    """What a checkpoint that came from elsewhere leaves unsaid, on stderr too; nothing where there is none."""
    if path is None:
        return []
    text = f"what {path} was trained on is not known: it must have seen no image and no patient of valid or test"
    return said([text])


def refuse_trained(real: Manifest, folder: Path) -> list[str]:
    """What the folder of a net that judges leaves unsaid of its training, on stderr too.

    Raises InputError where it says that the net was trained on held-out images or their patients.
    """
    if not (folder / CONFIG).is_file():
        return unknown_weights(str(folder))
    hash_of = functools.cache(lambda name: _hash_if_there(real.root / name))
    problems, unchecked, _ = check_trainings(real, f"the net {folder}", folder, "", hash_of)
    if problems:
        raise InputError("; ".join(dict.fromkeys(problems)))
    return said(unchecked)


def _problem(manifest: Manifest, what: str, rows: Iterable[Row]) -> str | None:
    names = [row.file_name for row in rows]
    return f"{manifest.path}: {what}: {name_rows(names)}" if names else None


def unknown_makers(real: Manifest, fake: Manifest) -> list[str]:
    """What synthetic rows leave unsaid: which generator made them, or what the images are that they were made from."""
    nameless = [row.file_name for row in fake.rows if not row.model]
    known = {row.file_name for row in real.rows}  # another copy of the data set, such as its shards, has other names
    strange = [row.file_name for row in fake.rows if set(row.derived_from) - known]
    found = [
        ("do not say which model made them, so nothing is known of what it was trained on", nameless),
        (f"are derived from images that {real.path} does not name, so not checked", strange),
    ]
    return [f"{fake.path}: {len(names)} rows {what}: {name_rows(names)}" for what, names in found if names]


def generators(fake: Manifest) -> list[tuple[Path, str]]:
    """(folder, fingerprint) of the models that made synthetic rows, as far as the rows say so; "" where they note no
    fingerprint."""
    parts = {row.model.rpartition("@") for row in fake.rows if row.model}  # a name without an @ is the last part
    return [(located(name or last, fake.path), last if name else "") for name, _, last in sorted(parts)]


def located(name: str, beside: Path) -> Path:
    """The path `name` that a file or folder gives, relative to where its command ran, which it does not say: that was
    most likely in a folder around it, the present one if that is among them, else the nearest that has such a path.

    The present folder alone will not do: where it is another checkout, it may have another model of that name.
    """
    around = sorted(beside.resolve().parents, key=lambda folder: folder != Path.cwd())
    return next((folder / name for folder in around if (folder / name).exists()), Path(name))


@dataclass(frozen=True)
class Training:
    """What one stage of a generator was trained on."""

    files: dict[str, str]  # image -> hash of its file, noted when it was trained; empty for models of older code
    rows: Manifest | None  # the same rows as their data set has them now, where it is still there
    unknown: str = ""  # why neither can be told


def trainings(folder: Path, noted: str) -> Iterator[Training]:
    """What a generator was trained on, then the model that it started from, and so on as far as they are here.

    Others' bases have no config.yaml and say nothing; of one that is not here nobody can tell whether it is another's.
    Where a folder holds another model by now, such as one that was trained anew, that is said.

    noted: the fingerprint of the model that made the images; "" where it is not known.
    """
    passed: set[Path] = set()
    while folder.resolve() not in passed:
        if not (folder / CONFIG).is_file():
            if not passed or not folder.is_dir():
                where = f"it is not here (no {folder.resolve() / CONFIG})"
                yield Training({}, None, f"what {folder} was trained on is not checked: {where}")
            return
        passed.add(folder.resolve())
        if noted and noted != model_fingerprint(folder):
            what = f"{folder} holds another model by now than {noted}, which was used and is not checked"
            yield Training({}, None, what)
        config: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        inputs = folder / INPUTS
        known: dict[str, Any] = read_json(inputs) if inputs.is_file() else {}
        files, noted = known.get("files", {}), known.get("base", "")
        data, rows = located(str(config.get("data_dir")), folder), None
        if data.exists():
            rows = manifests.read(data, Knowledge.load(config.get("knowledge") or "thyroid"))
            split = config.get("split") or "train"
            named = tuple(row for row in rows.rows if row.file_name in files)  # whatever split they are in now
            rows = replace(rows, rows=named) if files else rows.select(split=split)
        unknown = f"what {folder} was trained on is not checked: it did not note its files, and {data} is not here"
        yield Training(files, rows, "" if files or rows is not None else unknown)
        if not config.get("pretrained_model"):
            return
        folder = located(config["pretrained_model"], folder)


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


def trained_on(real: Manifest, net: str, seen: Iterable[Row]) -> str | None:
    """What is wrong where a net, as it is to be called, has seen a held-out image, its patient, or a copy of it
    elsewhere."""
    names, patients = ({getattr(row, name) for row in seen} - {None} for name in ("file_name", "patient_id"))
    found = [row for row in held_out(real) if row.file_name in names or row.patient_id in patients]
    return _problem(real, f"{net} was trained on patients of valid or test", found)


def unfound(real: Manifest, generator: Path, training: Training, hash_of: Callable[[str], str]) -> str | None:
    """What files cannot tell: images that a generator has seen and that nobody has any more as they were then."""
    if not training.files:
        return None
    here = {hash_of(row.file_name) for row in real.rows}
    if (rows := training.rows) is not None:
        one_folder = rows.root.resolve() == real.root.resolve()
        of_rows = hash_of if one_folder else lambda name: _hash_if_there(rows.root / name)
        here |= {of_rows(row.file_name) for row in rows.rows}
    gone = [name for name, noted in training.files.items() if noted not in here]
    if not gone:
        return None
    what = f"{generator} was trained on {len(training.files)} images, of which {len(gone)} are not among {real.path}"
    return f"{what} and not in its data set any more as they were: not checked: {name_rows(gone)}"


def same_names(real: Manifest, generator: Path, training: Training) -> str | None:
    """What pixels cannot tell: other pictures of the same patients, where a generator's data set is another one."""
    rows = training.rows
    if rows is None or rows.root.resolve() == real.root.resolve():
        return None
    patients = {row.patient_id for row in held_out(real)} - {None}
    if not (shared := sorted({str(row.patient_id) for row in rows.rows if row.patient_id in patients})):
        return None
    return (
        f"{generator} was trained on {rows.path}, which names {len(shared)} patients as valid or test of {real.path} "
        f"does ({name_rows(shared)}): where they are the same, it has seen held-out patients"
    )


def refuse_copies(
    training: Manifest, keys: Sequence[bytes], kept_out: Manifest, kept_out_keys: Sequence[bytes]
) -> None:
    """Raise an InputError that names images every pixel of which equals that of one kept out; keys: see keys_of."""
    known = {key: row.file_name for row, key in zip(kept_out.rows, kept_out_keys, strict=True)}
    copies = [f"{row.file_name} = {known[key]}" for row, key in zip(training.rows, keys, strict=True) if key in known]
    if copies:
        where = f"{kept_out.rows[0].split} of {kept_out.path}"
        raise InputError(f"{training.path}: images that are also in {where}: {name_rows(copies)}; drop them")


def refuse_near_copies(training: Manifest, looks: Looks, kept_out: Manifest, kept_out_looks: Looks) -> None:
    """Raise an InputError that names images that show the same picture as one kept out.

    They need not be equal pixel by pixel: brighter, saved again or resized, it is the same picture, as `data.prepare
    check` has it, and mirrored too. One that is cropped, turned or upside down is not found. Images of different
    patients are not taken for one: no two of 256 breast sonograms or of 1,140 chest x-rays were, at 64 and at 128 px,
    nor were 1,200 phantoms and 2,700 others.

    Args:
        looks: see looks_of.
        kept_out_looks: see looks_of; of the images kept out, then, where mirrored ones are to be found, of those.
    """
    (hashes, thumbnails), (known, known_thumbnails) = looks, kept_out_looks
    # Not `near_pairs` of all: of a generator that draws one image again and again, every pair of its images is near.
    near = [(i, j) for j, one in enumerate(known) for i in np.flatnonzero(np.bitwise_count(hashes ^ one) <= NEAR_BITS)]
    pairs = np.array(near, np.int64).reshape(-1, 2) + (0, len(hashes))
    same = same_picture(pairs, np.concatenate([thumbnails, known_thumbnails]), NEAR_CORRELATION) - (0, len(hashes))
    names = [(training.rows[i].file_name, kept_out.rows[j % len(kept_out.rows)].file_name) for i, j in same.tolist()]
    if names:
        copies = [f"{name} = {of}" for name, of in dict.fromkeys(names)]
        what = f"images that show the same picture as one in {kept_out.rows[0].split} of {kept_out.path}"
        raise InputError(f"{training.path}: {what}: {name_rows(copies)}; drop them")


def refuse_shown(kept_out: Manifest, others: Sequence[Manifest]) -> None:
    """Raise an InputError that names images of `others` that show the same picture as a held-out one, be it a copy or
    a near one; reads all images, where any is held out."""
    held = [rows for split in ("valid", "test") if (rows := kept_out.select(split=split)).rows]
    looks = [looks_of(load_images(other, LOOK_SIZE)) for other in others] if held else []
    for rows in held:
        known = looks_of(with_mirrored(load_images(rows, LOOK_SIZE)))
        for other, of_other in zip(others, looks, strict=True):
            refuse_near_copies(other, of_other, rows, known)


def with_mirrored(images: np.ndarray) -> np.ndarray:
    """(N, H, W) images -> (2N, H, W): they, then left for right."""
    return np.concatenate([images, images[:, :, ::-1]])


def looks_of(images: np.ndarray) -> Looks:
    """By what (N, H, W) uint8 images are found to show the same picture."""
    hashes = [perceptual_hash(image) for image in images]
    return np.array(hashes, np.uint64), np.array([thumbnail(image) for image in images], np.uint8).reshape(-1, 32, 32)


def keys_of(images: np.ndarray) -> list[bytes]:
    """A digest of the pixels of each of (N, H, W) images."""
    return [_digest(image) for image in images]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def _hash_if_there(path: Path) -> str:
    return content_hash(path) if exists(path) else ""  # who reads it says that it lacks
