"""Saved scores -> every figure with its interval, and tests between conditions. Nothing here trains or sees an image.

A figure is the mean over training seeds, and over folds. Its interval is a bootstrap over whole patients, within each
fold; of several seeds Student's t, with the variance over patients and that over seeds, of which a few seeds tell
little. Differences are paired and have the latter. Thresholds are those of Youden's index on `valid`, one a training
(0.5 where a class is missing there).
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
from eval.study import ALL
from tiger.errors import InputError, name_rows
from tiger.files import read_json
from tiger.manifest import SPLITS

Array = NDArray[np.float64]
GROUPS, CHOICES = 10, 25  # of Hosmer and Lemeshow; of one image of each patient
DELONG, BOOTSTRAP = "DeLong, clustered by patient", "bootstrap over patients"


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
    """What a file of `eval.runs` holds. Raises InputError where a probability is no number."""

    def part(name: str) -> Scores | None:
        if name not in saved:
            return None
        rows = saved[name]
        p = np.array(rows["probabilities"], float)
        if not np.isfinite(p).all():
            what = f"the scores of {saved['condition']}, seed {saved['settings']['seed']}, on {name}"
            raise InputError(f"{what}: probabilities that are no numbers; that training failed, make it anew")
        y = np.array([saved["classes"].index(label) for label in rows["label"]], np.int64)
        return Scores(y, p, rows["patient_id"], rows["file_name"])

    test = part("test")
    assert test is not None
    settings = saved["settings"]
    where = settings["task"], settings["seed"], settings["fold"]
    return Run(saved["condition"], *where, saved["classes"], part("valid"), test, saved)


def pair_scores(scores: Scores, negative: int, positive: int) -> tuple[NDArray[np.bool_], Array, NDArray[np.int64]]:
    """(y, p_positive / (p_negative + p_positive), rows) of the images of two classes; 0.5 where both are 0."""
    rows = np.flatnonzero((scores.y == negative) | (scores.y == positive))
    p, both = scores.p[rows, positive], scores.p[rows][:, [negative, positive]].sum(1)
    return scores.y[rows] == positive, np.divide(p, both, out=np.full(len(p), 0.5), where=both > 0), rows


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
    values: dict[str, Array]  # figure -> (1 + resamples,): on the sample, then on resamples of patients
    per_seed: dict[str, Array]  # figure -> (seeds,): on the sample


def draw(runs: Sequence[Run], negative: str, resamples: int) -> dict[str, Drawn]:
    """condition -> its figures on the sample and on each resample, of which a fold is left out if it lacks a class."""
    seeds = sorted({run.seed for run in runs})

    @cache
    def weights(split: str, fold: int, patients: tuple[str, ...]) -> Array:
        rng = np.random.default_rng([SPLITS.index(split), fold])
        return scoring.resample_weights(patients, resamples, rng)

    found: dict[str, Drawn] = {}
    for condition in dict.fromkeys(run.condition for run in runs):
        mine = [run for run in runs if run.condition == condition]
        figures: dict[str, list[tuple[int, Array]]] = {}  # figure -> (seed's place, values) of each training
        for run in mine:
            test_w = weights("test", run.fold or 0, tuple(run.test.patients))
            valid_w = weights("valid", run.fold or 0, tuple(run.valid.patients)) if run.valid is not None else None
            for name, values in figures_of(run, negative, test_w, valid_w).items():
                figures.setdefault(name, []).append((seeds.index(run.seed), values))
        found[condition] = Drawn(mine, {}, {})
        for name, parts in figures.items():
            places, table = np.array([place for place, _ in parts]), np.stack([values for _, values in parts])
            found[condition].values[name] = mean_there(table)
            found[condition].per_seed[name] = np.array([table[places == k, 0].mean() for k in range(len(seeds))])
    return found


def mean_there(values: Array) -> Array:
    """(R,) of (N, R) values, of those that are there; nan where there are none."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(values) * there).sum(0) / there.sum(0)


def estimate(name: str, values: Array, per_seed: Array) -> dict[str, float]:
    """{value, low, high} of a figure; values: on the sample, then on resamples of patients; per_seed: on the sample."""
    value, by_seed = float(values[0]), per_seed[np.isfinite(per_seed)]
    if len(by_seed) < 2:
        low, high = statistics.percentile_interval(values[1:])
    else:
        low, high, _ = statistics.t_interval(value, [(bootstrap_variance(values), math.inf), over_seeds(by_seed)])
    least = -1 if name.split()[0] in ("mcc", "kappa") else 0
    most = 2 if name == "brier" else 1  # that of several classes is a sum
    return {"value": value, "low": float(np.clip(low, least, most)), "high": float(np.clip(high, least, most))}


def of_condition(drawn: Drawn, negative: str) -> dict[str, Any]:
    """The figures of one condition as they go into the report."""
    runs = drawn.runs
    settings = runs[0].notes["settings"]
    entry: dict[str, Any] = {
        "condition": runs[0].condition,
        **{name: settings[name] for name in ("arm", "amount", "real_share")},
        "n_test": len({(run.fold, name) for run in runs for name in run.test.file_names}),
        "seeds": sorted({run.seed for run in runs}),
    }
    notes = {"selected_steps": "selected_step", "images_per_second": "images_per_second", "shares": "share"}
    for name, note in notes.items():  # a table of scores has none of them
        if all(note in run.notes for run in runs):
            entry[name] = [run.notes[note] for run in runs]
    for name, values in drawn.values.items():
        entry[name] = estimate(name, values, drawn.per_seed[name]) | {"per_seed": drawn.per_seed[name].tolist()}
    for task in tasks_of(runs, negative):
        value, variance = mean_auc(runs, negative, task)
        low, high, _ = statistics.t_interval(value, [(variance, math.inf), over_seeds(drawn.per_seed[f"auc {task}"])])
        entry[f"auc {task}"] |= {"delong": np.clip([low, high], 0, 1).tolist()}
        chi2, p = hosmer_lemeshow(runs, negative, task)
        entry[f"hosmer_lemeshow {task}"] = {"chi2": chi2, "p": p}
    return entry


def tasks_of(runs: Iterable[Run], negative: str) -> list[str]:
    """The binary tasks of these runs."""
    return list(dict.fromkeys(task for run in runs for task in pairs(run, negative)))


def hosmer_lemeshow(runs: Iterable[Run], negative: str, task: str) -> tuple[float, float]:
    """(chi2, p) on the test split, over trainings: of seeds and folds. nan of fewer patients than groups.

    The test takes cases to be independent, so it is of one image of each patient, and is made CHOICES times where
    patients have several. chi2 is the median of all these tests, p twice the median, which is a valid p however they
    depend on each other (Rüger 1978; Vovk & Wang 2020, section 1). Probabilities are kept off 0 and 1, where chi2 is
    infinite.
    """
    found = []
    for run in runs:
        if task not in pairs(run, negative):
            continue
        y, p, rows = pair_scores(run.test, *pairs(run, negative)[task])
        images = statistics.group_members([run.test.patients[i] for i in rows])
        if len(images) < GROUPS:
            return math.nan, math.nan
        p, rng = np.clip(p, 1e-6, 1 - 1e-6), np.random.default_rng(0)
        for _ in range(CHOICES if len(images) < len(y) else 1):
            chosen = [of_patient[rng.integers(len(of_patient))] for of_patient in images]
            found.append(statistics.hosmer_lemeshow(y[chosen], p[chosen], GROUPS, fitted=False))
    chi2, value = np.median(found, axis=0)
    return float(chi2), float(value if len(found) == 1 else min(1, 2 * value))


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


def delong_variance(first: Drawn, second: Drawn, negative: str, task: str) -> float:
    """The variance over test patients of the difference of two conditions' AUC."""
    folds = zip(columns(first.runs, negative, task), columns(second.runs, negative, task), strict=True)
    variances = [statistics.delong_difference(a[0], a[1], b[1], a[2])[1] for a, b in folds]
    return sum(variances) / len(variances) ** 2


def bootstrap_variance(values: Array) -> float:
    """The variance over the resamples of a figure, whose first value is that of the sample; nan where half lack it."""
    there = values[1:][np.isfinite(values[1:])]
    return float(there.var(ddof=1)) if 2 * len(there) > len(values) - 1 else math.nan


def over_seeds(values: Array) -> tuple[float, float]:
    """(variance of the mean of one value a training seed, its degrees of freedom); 0 of one seed, which cannot tell."""
    return (float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0), len(values) - 1


def comparisons(conditions: Mapping[str, Drawn], negative: str) -> list[dict[str, Any]]:
    """Paired tests between conditions that differ in nothing but the arm; each figure's p adjusted after Holm.

    Of every figure of the test split that a table shows.
    """
    found: list[dict[str, Any]] = []
    all_runs = [run for drawn in conditions.values() for run in drawn.runs]
    of_tasks = {f"auc {task}": task for task in tasks_of(all_runs, negative)}
    of_classes = dict.fromkeys(f"auc {label}" for run in all_runs for label in run.classes)
    accuracies = [f"accuracy {task}" for task in of_tasks.values()]
    for figure in (*of_tasks, *accuracies, "macro_auc", "balanced_accuracy", "accuracy", *of_classes, "brier"):
        family = []
        for a, b in itertools.combinations(conditions, 2):
            first, second = conditions[b], conditions[a]  # later arms against earlier ones
            if not (figure in first.values and figure in second.values and are_equal(first, second)):
                continue
            if figure in of_tasks:
                test, variance = DELONG, delong_variance(first, second, negative, of_tasks[figure])
            else:
                values = first.values[figure] - second.values[figure]
                test, variance = BOOTSTRAP, bootstrap_variance(values)
            by_seed = first.per_seed[figure] - second.per_seed[figure]
            value = float(by_seed.mean())
            low, high, p = statistics.t_interval(value, [(variance, math.inf), over_seeds(by_seed)])
            test += f"; variance over {len(by_seed)} seeds; Student's t" if len(by_seed) > 1 else "; one training seed"
            entry = {"figure": figure, "arm": b, "against": a, "value": value, "low": low, "high": high}
            family.append(entry | {"p": p, "test": test})
        for entry, p in zip(family, statistics.holm([entry["p"] for entry in family]), strict=True):
            entry["p_holm"] = float(p)
        found += family
    return found


def are_equal(first: Drawn, second: Drawn) -> bool:
    """Whether two conditions have the same share of the real images and, where both add any, the same --amounts; where
    none is given they add all that they have, which may be more in one: the report has the numbers (`added`)."""
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
