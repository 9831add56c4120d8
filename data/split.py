"""Splits by patient: train, valid and test, or k folds, each class in each of them, or a word on why not; and classes
made rare.

    python -m data.prepare split --data_dir mine --seed 0
    python -m data.prepare split --data_dir mine --folds 5                  # mine/fold0.jsonl … mine/fold4.jsonl
    python -m data.prepare subsample --data_dir mine --most malignant=20    # mine/subsample{,_rest}.jsonl

A fold's manifest lies beside the images and is a data set of its own: `--data_dir mine/fold0.jsonl`. Its test is one
part of the patients, its valid the next part, its train the rest, so every patient is in the test of exactly one fold.

A subsample has fewer training patients of some classes, for what-ifs: how would all this do with 20 images of a
class? The rest is a data set too: the further real images of `python -m eval.classify --extra_real`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tiger import manifest
from tiger.errors import InputError
from tiger.manifest import SPLITS, Row, unit_of


def assign_folds(rows: Sequence[Row], folds: int, seed: int) -> list[tuple[Row, ...]]:
    """The rows `folds` times, each time with other splits. Synthetic rows are in every train.

    Patients are dealt to the parts one class after the other, the rarest first, each patient to the part that has the
    fewest patients of that class, then of the patient's other classes, then the fewest images. So a class with at least
    as many patients as there are folds is in every part (scikit-learn's StratifiedGroupKFold does not promise that), as
    long as its patients have no rarer class too. The result does not depend on the order of the rows.
    Raises InputError on fewer than three folds or fewer patients than folds.
    """
    labels: defaultdict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for row in rows:
        if not row.synthetic:
            labels[unit_of(row)].add(str(row.label))
            images[unit_of(row)] += 1
    if folds < 3 or len(labels) < folds:
        raise InputError(
            f"--folds {folds}: must be from 3 (train, valid, test) to the number of patients, {len(labels)}"
        )
    patients_with = Counter(label for found in labels.values() for label in found)
    rarest_first = sorted(patients_with, key=lambda label: (patients_with[label], label))
    have: list[Counter[str]] = [Counter() for _ in range(folds)]  # patients of each label in each part
    size = [0] * folds
    part_of: dict[str, int] = {}
    for label in rarest_first:
        members = sorted(unit for unit, found in labels.items() if label in found and unit not in part_of)
        for index in np.random.default_rng((seed, *label.encode())).permutation(len(members)):
            unit = members[index]
            others = sorted(labels[unit] - {label}, key=rarest_first.index)
            part = min(range(folds), key=lambda k: ([have[k][name] for name in (label, *others)], size[k], k))
            part_of[unit] = part
            have[part].update(labels[unit])
            size[part] += images[unit]

    def split_in(fold: int, row: Row) -> str:
        ahead = -1 if row.synthetic else (part_of[unit_of(row)] - fold) % folds
        return {0: "test", 1: "valid"}.get(ahead, "train")

    return [tuple(replace(row, split=split_in(fold, row)) for row in rows) for fold in range(folds)]


def keep_at_most(rows: Sequence[Row], most: Mapping[str, int], seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows with at most so many training images of some classes, and the training rows that are left out for it.

    Whole patients stay, in a random order of each class until one does not fit, the rarest class first. A patient of
    several such classes stays or goes by the rarest, with all images. Where classes share no patients, a smaller number
    keeps a part of what a larger one keeps. The order of the rows does not matter.

    Args:
        most: class -> images, at least 1.
    Raises InputError on a class of which no training row would be left, and on synthetic rows, which may show what is
    left out.
    """
    if made := [row.file_name for row in rows if row.synthetic]:
        raise InputError(f"{len(made)} rows are synthetic, such as {made[0]}: subsample real ones, then generate anew")
    train = [row for row in rows if row.split in ("train", None)]
    images = {label: Counter(unit_of(row) for row in train if row.label == label) for label in most}
    stays: dict[str, bool] = {}  # patient -> whether
    for label in sorted(most, key=lambda label: (images[label].total(), label)):
        of_class = images[label]
        members = sorted(of_class)
        order = [members[i] for i in np.random.default_rng((seed, *label.encode())).permutation(len(members))]
        order.sort(key=lambda unit: not stays.get(unit, False))  # who stays for a rarer class comes first
        fits = np.cumsum([of_class[unit] for unit in order]) <= most[label]
        for unit, fit in zip(order, fits.tolist(), strict=True):
            stays.setdefault(unit, fit)
    out = {row.file_name for row in train if not stays.get(unit_of(row), True)}
    left = {row.label for row in train if row.file_name not in out}
    for label in {row.label for row in train} | set(most):
        if label not in left:
            wanted = " ".join(f"{name}={number}" for name, number in most.items())
            raise InputError(f"--most {wanted}: no training row of {label} would be left; patients stay whole")
    return tuple(row for row in rows if row.file_name not in out), tuple(row for row in rows if row.file_name in out)


def refuse_leaks(rows: Iterable[Row], where: object) -> None:
    """Raise InputError if a synthetic row derives from an image that the split holds out."""
    leaks = [f"{row.file_name} {problem.message}" for row, problem in manifest.synthetic_leaks(rows)]
    if leaks:
        raise InputError(
            f"{where}: {len(leaks)} synthetic rows would show held-out images to training, first {leaks[0]}; split the "
            "real images first, then generate from their train split"
        )


def missing_classes(rows: Iterable[Row], names: Sequence[str]) -> list[str]:
    """One line for each class that one of the splits `names` lacks, with the reason."""
    real = [row for row in rows if not row.synthetic and row.label is not None]
    found = {(row.label, row.split) for row in real}
    patients = defaultdict(set)
    for row in real:
        patients[row.label].add(unit_of(row))
    lines = []
    for label in sorted(patients, key=str):
        if lacking := [name for name in names if (label, name) not in found]:
            count = len(patients[label])
            why = "has too few patients" if count < len(names) else "shares its patients with rarer classes"
            lines.append(f"{label} {why} ({count} for {len(names)} splits): none is in {' or '.join(lacking)}")
    return lines


def share_problem(fractions: Sequence[float]) -> str | None:
    """What is wrong with the shares of train, valid and test."""
    total = sum(fractions)
    if abs(total - 1) > 1e-6 or min(fractions) < 0:
        return f"--fractions {list(fractions)}: must be shares that add up to 1, they add up to {total:g}"
    return None


def asked_for(fractions: dict[str, float]) -> list[str]:
    """The splits that are to hold anything."""
    return [name for name in SPLITS if fractions[name]]
