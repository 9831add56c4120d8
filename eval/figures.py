"""Saved scores -> every figure with its interval, and tests between conditions. Nothing here trains or sees an image.

A figure is the mean over training seeds, and over folds. Its interval is a bootstrap over whole patients, within each
fold, and over the seeds; all conditions are tried on the same resamples, so that differences are paired. Thresholds are
those of Youden's index on `valid`, one a training (0.5 where there is no valid).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from eval import scoring, statistics
from eval.arms import PLAIN
from eval.images import name_rows
from eval.study import ALL
from tiger.errors import InputError
from tiger.files import read_json
from tiger.manifest import SPLITS

Array = NDArray[np.float64]
DELONG = "DeLong, clustered by patient, with the variance over seeds"
BOOTSTRAP = "bootstrap over patients and seeds"


@dataclass(frozen=True)
class Scores:
    """One training's scores of one split."""

    y: NDArray[np.int64]  # (N,)
    p: Array  # (N, C)
    patients: list[str]
    file_names: list[str]


@dataclass(frozen=True)
class Run:
    """One training's scores and notes."""

    condition: str
    task: str
    seed: int
    fold: int | None
    classes: list[str]
    valid: Scores | None
    test: Scores
    notes: Mapping[str, Any]


def read_run(saved: Mapping[str, Any]) -> Run:
    """What a file of `eval.runs` holds."""

    def part(name: str) -> Scores | None:
        if name not in saved:
            return None
        rows = saved[name]
        y = np.array([saved["classes"].index(label) for label in rows["label"]], np.int64)
        return Scores(y, np.array(rows["probabilities"], float), rows["patient_id"], rows["file_name"])

    test = part("test")
    assert test is not None
    settings = saved["settings"]
    where = settings["task"], settings["seed"], settings["fold"]
    return Run(saved["condition"], *where, saved["classes"], part("valid"), test, saved)


def pair_scores(scores: Scores, negative: int, positive: int) -> tuple[NDArray[np.bool_], Array, NDArray[np.int64]]:
    """(y, p_positive / (p_negative + p_positive), rows) of the images of two classes."""
    rows = np.flatnonzero((scores.y == negative) | (scores.y == positive))
    p = scores.p[rows]
    return scores.y[rows] == positive, p[:, positive] / np.maximum(p[:, negative] + p[:, positive], 1e-12), rows


def pairs(run: Run, negative: str) -> dict[str, tuple[int, int]]:
    """name of a binary task -> (negative, positive) class index; a net of two classes says that it is one."""
    if negative not in run.classes:
        return {}
    n = run.classes.index(negative)
    own = "" if run.task == ALL else ", own net"
    return {f"{negative} vs {label}{own}": (n, c) for c, label in enumerate(run.classes) if c != n}


def figures_of(run: Run, negative: str, test_w: Array, valid_w: Array | None) -> dict[str, Array]:
    """Every figure of one training, for each row of the weights."""
    found: dict[str, Array] = {}
    if run.task == ALL:
        found |= scoring.multiclass_figures(run.test.y, run.test.p, run.classes, test_w)
    for task, (n, c) in pairs(run, negative).items():
        y, p, rows = pair_scores(run.test, n, c)
        threshold = 0.5
        if run.valid is not None and valid_w is not None:
            valid_y, valid_p, valid_rows = pair_scores(run.valid, n, c)
            threshold = scoring.youden_threshold(valid_y, valid_p)
            found[f"valid auc {task}"] = scoring.auc(valid_y, valid_p, valid_w[:, valid_rows])
        of_task = scoring.binary_figures(y, p, threshold, test_w[:, rows])
        found |= {f"{name} {task}": values for name, values in of_task.items()}
    return found


def read_runs(folder: Path, names: Iterable[str]) -> list[Run]:
    """The runs of these names in a study's folder. Raises InputError where one is not there."""
    paths = [folder / "scores" / f"{name}.json" for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise InputError(f"{folder / 'scores'}: lacks {name_rows(missing)}; run eval.classify again")
    return [read_run(read_json(path)) for path in paths]


@dataclass(frozen=True)
class Drawn:
    """Every figure of one condition."""

    runs: list[Run]
    values: dict[str, Array]  # figure -> (1 + resamples,): on the sample, then on each resample
    per_seed: dict[str, Array]  # figure -> (seeds,): on the sample


def draw(runs: Sequence[Run], negative: str, resamples: int) -> dict[str, Drawn]:
    """condition -> its figures on the sample and on each resample."""
    seeds = sorted({run.seed for run in runs})
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
    of_seed = np.concatenate([np.ones((1, len(seeds))), drawn]) / len(seeds)  # (1 + resamples, seeds) weights
    folds = sorted({run.fold or 0 for run in runs})

    @cache
    def weights(split: str, fold: int, patients: tuple[str, ...]) -> Array:
        rng = np.random.default_rng([SPLITS.index(split), fold])
        return scoring.resample_weights(patients, resamples, rng)

    found: dict[str, Drawn] = {}
    for condition in dict.fromkeys(run.condition for run in runs):
        mine = Drawn([run for run in runs if run.condition == condition], {}, {})
        for run in mine.runs:
            seed, fold = seeds.index(run.seed), run.fold or 0
            test_w = weights("test", fold, tuple(run.test.patients))
            valid_w = weights("valid", fold, tuple(run.valid.patients)) if run.valid is not None else None
            for name, values in figures_of(run, negative, test_w, valid_w).items():
                total = mine.values.setdefault(name, np.zeros(1 + resamples))
                total += of_seed[:, seed] * values / len(folds)
                mine.per_seed.setdefault(name, np.zeros(len(seeds)))[seed] += values[0] / len(folds)
        found[condition] = mine
    return found


def estimate(values: Array) -> dict[str, float]:
    """{value, low, high} of the value and what it was on each resample."""
    low, high = statistics.percentile_interval(values[1:])
    return {"value": float(values[0]), "low": low, "high": high}


def of_condition(drawn: Drawn, negative: str) -> dict[str, Any]:
    """The figures of one condition as they go into the report."""
    runs = drawn.runs
    settings = runs[0].notes["settings"]
    entry: dict[str, Any] = {
        "condition": runs[0].condition,
        **{name: settings[name] for name in ("arm", "amount", "real_share")},
        "n_test": len({(run.fold, name) for run in runs for name in run.test.file_names}),
        "seeds": sorted({run.seed for run in runs}),
        "selected_steps": [run.notes["selected_step"] for run in runs],
        "images_per_second": [run.notes["images_per_second"] for run in runs],
    }
    if any("share" in run.notes for run in runs):
        entry["shares"] = [run.notes["share"] for run in runs]
    for name, values in drawn.values.items():
        entry[name] = estimate(values) | {"per_seed": drawn.per_seed[name].tolist()}
    for task in tasks_of(runs, negative):
        value, variance = mean_auc(runs, negative, task)
        margin = statistics.Z * math.sqrt(variance + over_seeds(drawn.per_seed[f"auc {task}"]))
        entry[f"auc {task}"] |= {"delong": [max(0.0, value - margin), min(1.0, value + margin)]}
        found = [hosmer_lemeshow(run, negative, task) for run in runs if task in pairs(run, negative)]
        entry[f"hosmer_lemeshow {task}"] = {
            "chi2": float(np.median([chi2 for chi2, _ in found])),
            "p": float(np.median([p for _, p in found])),
        }
    return entry


def tasks_of(runs: Iterable[Run], negative: str) -> list[str]:
    """The binary tasks of these runs."""
    return list(dict.fromkeys(task for run in runs for task in pairs(run, negative)))


def hosmer_lemeshow(run: Run, negative: str, task: str) -> tuple[float, float]:
    """(chi2, p) on the test split; probabilities are kept off 0 and 1, where it is infinite."""
    y, p, _ = pair_scores(run.test, *pairs(run, negative)[task])
    return statistics.hosmer_lemeshow(y, np.clip(p, 1e-6, 1 - 1e-6))


# -------------------------------------------------------------------------------------------------------------- tests


def columns(runs: Iterable[Run], negative: str, task: str) -> list[tuple[NDArray[np.bool_], Array, list[str]]]:
    """(y, (N, seeds) scores, patients) of the test split, of each fold."""
    by_fold: defaultdict[int, list[Run]] = defaultdict(list)
    for run in runs:
        if task in pairs(run, negative):
            by_fold[run.fold or 0].append(run)
    found = []
    for _, group in sorted(by_fold.items()):
        group.sort(key=lambda run: run.seed)
        scores = [pair_scores(run.test, *pairs(run, negative)[task]) for run in group]
        rows = scores[0][2]
        patients = [group[0].test.patients[i] for i in rows]
        found.append((scores[0][0], np.stack([p for _, p, _ in scores], axis=1), patients))
    return found


def mean_auc(runs: Iterable[Run], negative: str, task: str) -> tuple[float, float]:
    """(AUC, its variance over test patients by DeLong), the mean over folds and seeds."""
    values, variances = [], []
    for y, p, patients in columns(runs, negative, task):
        v10, v01 = statistics.placements(y, p)
        values.append(float(v10.mean()))
        variances.append(statistics.clustered_variance(y, v10, v01, patients))
    return float(np.mean(values)), sum(variances) / len(values) ** 2


def delong_p(first: Drawn, second: Drawn, negative: str, task: str) -> float:
    """Two-sided p of the difference of two conditions' AUC, over test patients and training seeds."""
    value, variance, folds = 0.0, 0.0, 0
    for a, b in zip(columns(first.runs, negative, task), columns(second.runs, negative, task), strict=True):
        difference, of_fold = statistics.delong_difference(a[0], a[1], b[1], a[2])
        value, variance, folds = value + difference, variance + of_fold, folds + 1
    by_seed = first.per_seed[f"auc {task}"] - second.per_seed[f"auc {task}"]
    return statistics.z_test(value / folds, variance / folds**2 + over_seeds(by_seed))[1]


def over_seeds(values: Array) -> float:
    """The variance of the mean of one value a training seed; 0 for a single seed, which cannot tell."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def bootstrap_p(differences: Array) -> float:
    """Two-sided p of the resamples of a difference, never 0 (Davison & Hinkley 1997, section 4.2.5)."""
    differences = differences[np.isfinite(differences)]
    tails = [(differences <= 0).sum() + 1, (differences >= 0).sum() + 1]
    return min(1.0, 2 * min(tails) / (len(differences) + 1))


def comparisons(conditions: Mapping[str, Drawn], negative: str) -> list[dict[str, Any]]:
    """Paired tests between conditions that differ in nothing but the arm; each figure's p adjusted after Holm."""
    found: list[dict[str, Any]] = []
    all_runs = [run for drawn in conditions.values() for run in drawn.runs]
    of_tasks = {f"auc {task}": task for task in tasks_of(all_runs, negative)}
    for figure in (*of_tasks, "macro_auc", "balanced_accuracy"):
        family = []
        for a, b in itertools.combinations(conditions, 2):
            first, second = conditions[b], conditions[a]  # later arms against earlier ones
            if not (figure in first.values and figure in second.values and are_equal(first, second)):
                continue
            values = first.values[figure] - second.values[figure]
            entry = {"figure": figure, "arm": b, "against": a} | estimate(values)
            if figure in of_tasks:
                entry |= {"p": delong_p(first, second, negative, of_tasks[figure]), "test": DELONG}
            else:
                entry |= {"p": bootstrap_p(values[1:]), "test": BOOTSTRAP}
            family.append(entry)
        for entry, p in zip(family, statistics.holm([entry["p"] for entry in family]), strict=True):
            entry["p_holm"] = float(p)
        found += family
    return found


def are_equal(first: Drawn, second: Drawn) -> bool:
    """Whether two conditions have the same real images and, where both add any, add equally many."""
    a, b = (drawn.runs[0].notes["settings"] for drawn in (first, second))
    amounts = {a["amount"], b["amount"]} - ({None} if a["arm"] in PLAIN or b["arm"] in PLAIN else set())
    return a["real_share"] == b["real_share"] and len(amounts) <= 1


def summarise(runs: Sequence[Run], negative: str, resamples: int) -> dict[str, Any]:
    """{arms: condition -> figures, comparisons: [paired tests]}"""
    conditions = draw(runs, negative, resamples)
    arms = {condition: of_condition(drawn, negative) for condition, drawn in conditions.items()}
    return {"arms": arms, "comparisons": comparisons(conditions, negative)}


# ------------------------------------------------------------------------------------------------------------- curves


def seed_means(runs: Sequence[Run], negative: str) -> dict[str, dict[str, tuple[Array, Array]]]:
    """task -> condition -> (y, p): the test images of all folds, each with its mean score over seeds."""
    found: dict[str, dict[str, tuple[Array, Array]]] = {}
    for task in tasks_of(runs, negative):
        for condition in dict.fromkeys(run.condition for run in runs):
            folds = columns([run for run in runs if run.condition == condition], negative, task)
            if folds:
                y, p = (np.concatenate(parts) for parts in zip(*((y, p.mean(1)) for y, p, _ in folds), strict=True))
                found.setdefault(task, {})[condition] = (y, p)
    return found


def roc_curves(runs: Sequence[Run], negative: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """task -> condition -> (false, true positive rates) on the test split, of the mean score over seeds."""
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for task, of_task in seed_means(runs, negative).items():
        for condition, (y, p) in of_task.items():
            fpr, tpr, _ = roc_curve(y, p)
            curves.setdefault(task, {})[condition] = (fpr.tolist(), tpr.tolist())
    return curves


def calibration_curves(runs: Sequence[Run], negative: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """task -> condition -> (mean probability, share of positives) of ten groups of test images by rank."""
    means = seed_means(runs, negative)
    return {task: {name: scoring.calibration(*yp) for name, yp in of.items()} for task, of in means.items()}
