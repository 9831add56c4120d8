"""What a downstream study is made of: its images, its trials, and what each trial may draw from."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from eval.arms import EXTRA, PLAIN, REAL, UPPER, Group, Mixing, phases_of
from eval.images import load_images
from eval.leakage import keys_of, looks_of, refuse_copies, refuse_near_copies, with_mirrored
from tiger.errors import InputError, name_rows
from tiger.manifest import SPLITS, Manifest

ALL = "all"  # the task of telling all classes apart
NEGATIVE = "benign"  # the class that the others are set against, unless another is named
RESAMPLES = 1000  # of the bootstrap, unless a number is given


@dataclass(frozen=True)
class Sources:
    """The manifests of one fold."""

    real: Manifest
    fakes: dict[str, Manifest]  # name of the synthetic set -> its rows
    extra: Manifest | None
    unchecked: tuple[str, ...] = ()  # what could not be checked for leaks

    def named(self) -> list[Manifest]:
        """All of them."""
        return [self.real, *self.fakes.values(), *([self.extra] if self.extra is not None else [])]


@dataclass(frozen=True)
class Held:
    """Images that are looked at and never trained on."""

    images: np.ndarray  # (N, S, S) uint8
    y: np.ndarray  # (N,) class index
    file_names: np.ndarray  # (N,) str
    patients: np.ndarray  # (N,) str

    @property
    def names(self) -> dict[str, list[str]]:
        """What the scores of the images are saved with."""
        return {"file_name": self.file_names.tolist(), "patient_id": self.patients.tolist()}

    def only(self, rows: np.ndarray) -> "Held":
        """Those at `rows`."""
        return Held(self.images[rows], self.y[rows], self.file_names[rows], self.patients[rows])


@dataclass(frozen=True)
class Data:
    """Everything that may be trained on, and the two real splits that are looked at."""

    classes: list[str]
    images: np.ndarray  # (N, S, S) uint8
    y: np.ndarray  # (N,) class index
    origin: np.ndarray  # (N,) str: REAL, EXTRA or the name of a synthetic set
    patients: np.ndarray  # (N,) str
    keys: list[bytes]  # a digest of each of the images
    valid: Held | None
    test: Held

    @cached_property
    def held_out_key(self) -> str:
        """Changes with any held-out image or label."""
        hashed = hashlib.sha256()
        for held in filter(None, (self.valid, self.test)):
            hashed.update(b"".join(keys_of(held.images)) + held.y.tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Trial:
    """One training."""

    task: str  # ALL, or the class that a net of its own tells from the negative one
    arm: str
    seed: int
    fold: int | None = None
    amount: int | None = None  # synthetic images a class; None: all
    real_share: float = 1.0  # of the real training patients of each class

    @property
    def condition(self) -> str:
        """The arm, with how much of what it had where that is not all."""
        parts = [self.arm]
        parts += [f"{self.amount} a class"] if self.amount is not None else []
        parts += [f"{self.real_share:.4g} of the real"] if self.real_share < 1 else []
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """The name of its file."""
        parts = [self.arm, *([] if self.task == ALL else [f"task{self.task}"])]
        parts += [f"amount{self.amount}"] if self.amount is not None else []
        parts += [f"real{self.real_share:.4g}"] if self.real_share < 1 else []
        parts += [f"fold{self.fold}"] if self.fold is not None else []
        return "-".join(parts).replace("/", "_").replace(" ", "_") + f"-seed{self.seed}"


def read_condition(condition: str) -> dict[str, Any]:
    """ "tiger_f, 100 a class" -> {arm, amount, real_share} of the trials that have this `Trial.condition`.

    Raises ValueError where no trial has it. A share has the four digits that it is written with.
    """
    match = re.fullmatch(r"([^,]+)(?:, (\d+) a class)?(?:, ([\d.e-]+) of the real)?", condition)
    if match is None:
        raise ValueError(f"'{condition}' is no arm with its amount and its share of the real images")
    arm, amount, share = match.groups()
    return {"arm": arm, "amount": int(amount) if amount else None, "real_share": float(share or 1)}


def trials(
    arms: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    folds: Sequence[int | None],
    amounts: Sequence[int | None],
    real_shares: Sequence[float],
) -> Iterator[Trial]:
    """All combinations, each once, those of a fold together; amounts are for the arms that add images."""
    for fold in folds:
        for seed in seeds:
            for task in tasks:
                for share in real_shares:
                    for arm in arms:
                        for amount in [None] if arm in PLAIN else amounts:
                            yield Trial(task, arm, seed, fold, amount, share)


# ------------------------------------------------------------------------------------------------------------ reading


def classes_of(real: Manifest, order: Sequence[str]) -> list[str]:
    """The classes of the real training rows, in the order given. Raises InputError where a split lacks some."""
    splits = {split: real.select(split=split) for split in SPLITS}
    for split in ("train", "test"):
        if not splits[split].rows:
            raise InputError(f"{real.path}: no rows in split '{split}'; run `python -m data.prepare split`")
    present = {str(row.label) for row in splits["train"].rows}
    classes = sorted(present, key=lambda label: (order.index(label) if label in order else len(order), label))
    if len(classes) < 2:
        raise InputError(f"{real.path}: split 'train' has one class only ({classes[0]}); nothing to classify")
    tested, watched = ({str(row.label) for row in splits[split].rows} for split in ("test", "valid"))
    if tested != present or watched - present or len(watched) == 1:
        found = f"train has {sorted(present)}, valid {sorted(watched)}, test {sorted(tested)}"
        raise InputError(f"{real.path}: {found}; test needs the classes of train, valid two of them or no rows")
    return classes


def load(sources: Sources, classes: list[str], image_size: int) -> Data:
    """Read all images. Raises InputError where one that is trained on shows the same picture as a held-out one, one of
    valid the same as one of test, or a further real one is a copy of one that is trained on.
    """
    pools = {REAL: sources.real.select(split="train")}
    pools |= {name: fake.select(labels=classes) for name, fake in sources.fakes.items()}
    if sources.extra is not None:
        pools[EXTRA] = sources.extra.select(labels=classes)
    images = {name: load_images(pool, image_size) for name, pool in pools.items()}
    kept_out = {split: sources.real.select(split=split) for split in ("valid", "test")}
    looked_at = {split: load_images(rows, image_size) for split, rows in kept_out.items()}
    keys, kept_out_keys = ({name: keys_of(of_one) for name, of_one in of.items()} for of in (images, looked_at))
    for name, split in itertools.product(pools, kept_out):  # a synthetic set may be called "test"
        refuse_copies(pools[name], keys[name], kept_out[split], kept_out_keys[split])
    refuse_copies(kept_out["valid"], kept_out_keys["valid"], kept_out["test"], kept_out_keys["test"])
    kept_out_looks = {split: looks_of(with_mirrored(of_split)) for split, of_split in looked_at.items()}
    for name, pool in pools.items():
        looks = looks_of(images[name])
        for split, rows in kept_out.items():
            refuse_near_copies(pool, looks, rows, kept_out_looks[split])
    refuse_near_copies(kept_out["valid"], looks_of(looked_at["valid"]), kept_out["test"], kept_out_looks["test"])
    if EXTRA in pools:
        refuse_copies(pools[EXTRA], keys[EXTRA], pools[REAL], keys[REAL])

    def column(m: Manifest, value: str) -> np.ndarray:
        return np.array([getattr(row, value) or row.file_name for row in m.rows], dtype=str)

    def indices(m: Manifest) -> np.ndarray:
        return np.array([classes.index(str(row.label)) for row in m.rows], dtype=np.int64)

    valid, test = (
        Held(looked_at[split], indices(rows), column(rows, "file_name"), column(rows, "patient_id"))
        for split, rows in kept_out.items()
    )
    return Data(
        classes=classes,
        images=np.concatenate(list(images.values())),
        y=np.concatenate([indices(pool) for pool in pools.values()]),
        origin=np.repeat(list(pools), [len(pool.rows) for pool in pools.values()]),
        patients=np.concatenate([column(pool, "patient_id") for pool in pools.values()]),
        keys=[key for name in pools for key in keys[name]],
        valid=valid if len(valid.y) else None,
        test=test,
    )


def refuse_unlabelled(sources: Sources) -> None:
    """Raise InputError where a row has no label."""
    for rows in sources.named():
        if names := [row.file_name for row in rows.rows if row.label is None]:
            raise InputError(f"{rows.path}: rows without a label: {name_rows(names)}")


# ------------------------------------------------------------------------------------------------- what a trial draws


@dataclass(frozen=True)
class Plan:
    """One trial's part of the data: its classes, and what it draws its batches from."""

    labels: list[str]
    y: np.ndarray  # (N,) index into `labels`, -1 where an image is none of them
    phases: list[list[Group]]
    valid: Held | None
    test: Held


def labels_of(trial: Trial, data: Data, negative: str) -> list[str]:
    """The classes that a trial's net tells apart, in the order of its outputs."""
    return data.classes if trial.task == ALL else [negative, trial.task]


def plan(trial: Trial, data: Data, mixing: Mixing, negative: str) -> Plan:
    """What a trial trains on and is tested on. Raises InputError where the images do not suffice."""
    labels = labels_of(trial, data, negative)
    lookup = np.array([labels.index(label) if label in labels else -1 for label in data.classes])
    y = lookup[data.y]
    phases = phases_of(trial.arm, mixing, y, np.where(kept(trial, data, labels), data.origin, ""), labels)

    def part(held: Held) -> Held:
        chosen = held.only(np.flatnonzero(lookup[held.y] >= 0))
        return Held(chosen.images, lookup[chosen.y], chosen.file_names, chosen.patients)

    valid = part(data.valid) if data.valid is not None else None
    if valid is not None and len(np.unique(valid.y)) < 2:
        valid = None  # nothing to select on
    return Plan(labels, y, phases, valid, part(data.test))


def kept(trial: Trial, data: Data, labels: Sequence[str]) -> np.ndarray:
    """(N,) bool: the images of classes `labels` that the trial's amount and share leave. Those of a smaller one lie in
    those of a larger one of the same seed.

    Without an amount, further real images are as many of a class as the first synthetic set has, or all there are.
    Copies of an image count as so many images. Raises InputError where an amount is more than there are.
    """
    keep = np.isin(data.y, [data.classes.index(label) for label in labels])
    sets = [name for name in dict.fromkeys(data.origin.tolist()) if name not in (REAL, EXTRA)]
    place = partial(place_of, trial.seed)
    for label in labels:
        of_class = data.y == data.classes.index(label)
        if trial.real_share < 1:
            real = of_class & (data.origin == REAL)
            patients = sorted(set(data.patients[real]), key=place)
            chosen = patients[: max(1, round(trial.real_share * len(patients)))]
            keep &= ~real | np.isin(data.patients, chosen)
        if trial.arm in PLAIN:
            continue
        added = np.flatnonzero(of_class & (data.origin == source_of(trial.arm)))
        most = len(added) if trial.amount is None else trial.amount
        if trial.arm == UPPER and trial.amount is None and sets:
            most = int((of_class & (data.origin == sets[0])).sum())
        elif len(added) < most:
            raise InputError(f"arm {trial.arm}: {len(added)} images of class {label}, and --amounts asks for {most}")
        if most < len(added):
            keep[sorted(added, key=lambda i: place(data.keys[i]))[most:]] = False
    return keep


def place_of(seed: int, name: str | bytes) -> bytes:
    """By what to sort for a random order in which two names stand the same way round whatever else is among them."""
    text = name.encode() if isinstance(name, str) else name
    return hashlib.sha256(str(seed).encode() + b"/" + text).digest()


def source_of(arm: str) -> str:
    """Where the images come from that an arm adds."""
    return EXTRA if arm == UPPER else arm


def digest(plan: Plan, data: Data) -> str:
    """Changes with any image, label or mixing that a training or its test depends on."""
    hashed = hashlib.sha256(json.dumps([plan.labels, data.images.shape[1:], data.held_out_key]).encode())
    for groups in plan.phases:
        for share, rows in groups:
            hashed.update(f"{share:.9f}".encode() + b"".join(data.keys[i] for i in rows) + plan.y[rows].tobytes())
    return hashed.hexdigest()[:16]


def counts(data: Data) -> dict[str, dict[str, int]]:
    """Images of each class in each source and split."""
    sources = dict.fromkeys(data.origin.tolist())
    found = {"train" if name == REAL else str(name): data.y[data.origin == name] for name in sources}
    found |= {"test": data.test.y} | ({"valid": data.valid.y} if data.valid is not None else {})
    return {name: by_class(y, data.classes) for name, y in found.items()}


def images_kept(trial: Trial, data: Data, negative: str) -> dict[str, dict[str, int]]:
    """Images of each class that the trial's net knows: {real: of the training split, added: to these}"""
    labels, origins = labels_of(trial, data, negative), {"real": REAL, "added": source_of(trial.arm)}
    keep = kept(trial, data, labels)
    found = {name: by_class(data.y[keep & (data.origin == of)], data.classes) for name, of in origins.items()}
    return {name: {label: of[label] for label in labels} for name, of in found.items()}


def by_class(y: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """class -> images"""
    tally = Counter(y.tolist())
    return {label: tally[c] for c, label in enumerate(classes)}
