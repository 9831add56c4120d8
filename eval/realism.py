"""Can a classifier tell synthetic from real? Its AUC, 0.5 being perfect (Lopez-Paz & Oquab 2017, C2ST)."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval import classifier, statistics
from eval.classifier import Recipe
from eval.images import group_of, load_images, patients_of, source_patients
from tiger.errors import InputError
from tiger.manifest import Manifest, Row

Pair = tuple[list[Row], list[Row]]  # real and synthetic rows


def halves(real: list[Row], fake: list[Row], patient_of: Mapping[str, str], seed: int) -> list[Pair]:
    """Two disjoint (real, fake) halves: no patient is in both, nor is one that a synthetic image was made from.

    A synthetic row whose sources fall into different halves is left out. Each class has equally many real and
    synthetic rows in a half, so that the label tells nothing.
    """
    rng = np.random.default_rng(seed)
    stratum = {
        patient: f"synthetic {row.label}" for row in fake for patient in sorted(source_patients(row, patient_of))
    }
    stratum |= {row.patient_id or row.file_name: f"real {row.label}" for row in real}
    shuffled = [sorted(stratum)[i] for i in rng.permutation(len(stratum))]
    half_of = {patient: place % 2 for place, patient in enumerate(sorted(shuffled, key=stratum.__getitem__))}
    found: list[Pair] = []
    for half in (0, 1):
        real_by: defaultdict[str | None, list[Row]] = defaultdict(list)
        fake_by: defaultdict[str | None, list[Row]] = defaultdict(list)
        for row in real:
            if half_of[row.patient_id or row.file_name] == half:
                real_by[row.label].append(row)
        for row in fake:
            if {half_of[patient] for patient in source_patients(row, patient_of)} == {half}:
                fake_by[row.label].append(row)
        chosen: Pair = ([], [])
        for label in sorted(real_by.keys() & fake_by.keys(), key=str):
            count = min(len(real_by[label]), len(fake_by[label]))
            for into, rows in zip(chosen, (real_by[label], fake_by[label]), strict=True):
                into += [rows[i] for i in sorted(rng.permutation(len(rows))[:count])]
        found.append(chosen)
    return found


def parts_of(real: Manifest, fake: Manifest, kept_out: list[Row], seed: int) -> list[Pair]:
    """The halves of what `measure` is given. Raises InputError where one has fewer than two of either."""
    parts = halves(kept_out, list(fake.rows), patients_of(real.rows), seed)
    if any(len(rows) < 2 for part in parts for rows in part):
        raise InputError(f"{fake.path}: too few synthetic images share a class with held-out ones of {real.path}")
    return parts


def measure(
    real: Manifest, fake: Manifest, kept_out: list[Row], recipe: Recipe, image_size: int, seed: int, resamples: int
) -> dict[str, Any]:
    """AUC of a real-versus-synthetic classifier, trained on one half and tested on the other.

    Args:
        real: all real rows, to find the patients of `derived_from`.
        kept_out: real rows that the generator has not seen.
    """
    patient_of = patients_of(real.rows)
    images, y, groups = [], [], []
    for real_rows, fake_rows in parts_of(real, fake, kept_out, seed):
        sources = (Manifest(real.path, tuple(real_rows)), Manifest(fake.path, tuple(fake_rows)))
        images.append(np.concatenate([load_images(source, image_size) for source in sources]))
        y.append(np.repeat([0, 1], [len(real_rows), len(fake_rows)]))
        groups.append([group_of(row, patient_of) for row in (*real_rows, *fake_rows)])
    net, notes = classifier.train(
        recipe,
        images[0],
        y[0],
        lambda rng: rng.integers(len(y[0]), size=recipe.train_batch_size),
        None,
        classes=2,
        seed=seed,
        description="real or synthetic",
    )
    scores = classifier.predict(net, images[1])[:, 1]
    value, low, high = statistics.cluster_bootstrap_ci(statistics.auc, y[1], scores, groups[1], resamples, seed)
    counts = {"n_train": len(y[0]), "n_test": len(y[1])}
    return {"auc": value, "low": low, "high": high, **counts, **notes}
