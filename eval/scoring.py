"""What a classifier's scores are worth: every figure for all resamples of a bootstrap at once.

`w`, (R, N), says how often each image is in each of R resamples; a row of ones is the sample itself. Every figure comes
back as (R,), nan where a resample lacks what it needs. Scores are better the higher; y is 1 for positives.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
FPRS = (0.01, 0.05, 0.1)  # budgets of recall_at_fpr


def resample_weights(groups: Sequence[str], resamples: int, rng: np.random.Generator) -> Array:
    """(1 + resamples, N): a row of ones, then how often each image is drawn when whole groups (patients) are."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = int(index.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, index]
    return np.concatenate([np.ones((1, len(index))), drawn]).astype(np.float64)


def _by_threshold(y: NDArray[np.bool_], s: Array, w: Array) -> tuple[Array, Array]:
    """(R, T) weights of positives and of negatives at each of the T distinct scores, the highest first."""
    if not len(s):
        return np.zeros((len(w), 1)), np.zeros((len(w), 1))
    order = np.argsort(-s, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(s[order]) != 0))
    positives, negatives = (np.add.reduceat(w[:, order] * of[order], starts, axis=1) for of in (y, ~y))
    return positives, negatives


def auc(y: ArrayLike, s: ArrayLike, w: Array) -> Array:
    """Area under the ROC curve, ties counted half."""
    positives, negatives = _by_threshold(np.asarray(y, bool), np.asarray(s, float), w)
    m, n = positives.sum(1), negatives.sum(1)
    lower = n[:, None] - np.cumsum(negatives, axis=1)  # negatives with a lower score
    with np.errstate(invalid="ignore"):
        return (positives * (lower + negatives / 2)).sum(1) / (m * n)


def recall_at_fpr(y: ArrayLike, s: ArrayLike, w: Array, fpr: float) -> Array:
    """The highest recall of any threshold whose false positive rate does not exceed `fpr`."""
    positives, negatives = _by_threshold(np.asarray(y, bool), np.asarray(s, float), w)
    with np.errstate(invalid="ignore"):
        recall = np.cumsum(positives, axis=1) / positives.sum(1, keepdims=True)
        false_rate = np.cumsum(negatives, axis=1) / negatives.sum(1, keepdims=True)
    best = np.where(false_rate <= fpr + 1e-12, recall, 0).max(axis=1)
    return np.where(np.isnan(recall[:, -1] + false_rate[:, -1]), np.nan, best)


def class_aucs(y: ArrayLike, p: Array, w: Array) -> Array:
    """(C, R): the AUC of each class against all others; y (N,) class indices, p (N, C)."""
    return np.stack([auc(np.asarray(y) == c, p[:, c], w) for c in range(p.shape[1])])


def brier(y: ArrayLike, p: Array, w: Array) -> Array:
    """Mean squared distance of the probabilities from the truth.

    Args:
        p: (N,) probabilities of the positive, its squares alone: 0 to 1. Or (N, C) of the classes, whose squares are
            summed (Brier 1950): 0 to 2, and of two classes twice the other.
    """
    y = np.asarray(y)
    error = (p - y) ** 2 if p.ndim == 1 else ((p - np.eye(p.shape[1])[y]) ** 2).sum(1)
    return w @ error / w.sum(1)


def confusion(y: ArrayLike, predicted: ArrayLike, w: Array, classes: int) -> Array:
    """(R, classes, classes): weight of images of the class of a row that are taken for the class of a column."""
    cell = np.asarray(y, np.int64) * classes + np.asarray(predicted, np.int64)
    return (w @ np.eye(classes**2)[cell]).reshape(-1, classes, classes)


def agreement(table: Array) -> dict[str, Array]:
    """Accuracy, mean recall, Matthews' coefficient for any number of classes (Gorodkin 2004) and Cohen's kappa."""
    true, found = table.sum(2), table.sum(1)  # (R, C)
    n, right = table.sum((1, 2)), np.trace(table, axis1=1, axis2=2)
    chance = (true * found).sum(1)
    spread = np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (found**2).sum(1)))
    with np.errstate(invalid="ignore", divide="ignore"):
        recalls = np.diagonal(table, axis1=1, axis2=2) / true
        return {
            "accuracy": right / n,
            "balanced_accuracy": recalls.mean(1),
            "mcc": np.where(spread > 0, (right * n - chance) / spread, 0.0),  # 0 as in scikit-learn
            "kappa": (right * n - chance) / (n**2 - chance),
        }


def detection(table: Array) -> dict[str, Array]:
    """Sensitivity, specificity, precision and F1 of (…, 2, 2) tables; precision and F1 are 0 where nothing is found."""
    (tn, fp), (fn, tp) = np.moveaxis(table, (-2, -1), (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "precision": np.where(tp + fp > 0, tp / (tp + fp), 0.0),
            "f1": np.where(2 * tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
        }


def macro_detection(table: Array) -> dict[str, Array]:
    """Specificity, precision and F1 of each class against all others, the mean over classes; nan where one is missing.

    The mean sensitivity is the balanced accuracy. table: (R, C, C).
    """
    true, tp = table.sum(2), np.diagonal(table, axis1=1, axis2=2)  # (R, C)
    fn, fp = true - tp, table.sum(1) - tp
    tn = table.sum((1, 2))[:, None] - tp - fn - fp
    of_class = detection(np.stack([tn, fp, fn, tp], -1).reshape(*tp.shape, 2, 2))
    missing = (true == 0).any(1)
    shown = ("specificity", "precision", "f1")
    return {f"macro_{name}": np.where(missing, np.nan, of_class[name].mean(1)) for name in shown}


def youden_threshold(y: ArrayLike, s: ArrayLike) -> float:
    """The score at and above which to say positive: sensitivity + specificity is at its largest (Youden 1950).

    It lies half-way to the next lower score. 0.5 where a class is missing.
    """
    y, s = np.asarray(y, bool), np.asarray(s, float)
    if y.all() or not y.any():
        return 0.5
    levels = np.unique(s)[::-1]
    positives, negatives = (part[0] for part in _by_threshold(y, s, np.ones((1, len(s)))))
    gain = np.cumsum(positives) / y.sum() - np.cumsum(negatives) / (~y).sum()
    best = int(gain.argmax())
    return float((levels[best] + levels[best + 1]) / 2) if best + 1 < len(levels) else float(levels[best])


def binary_figures(y: ArrayLike, p: Array, threshold: float, w: Array) -> dict[str, Array]:
    """Everything about one class against another. y (N,) 0 or 1, p (N,) probability of 1."""
    table = confusion(y, p >= threshold, w, 2)
    figures = {"auc": auc(y, p, w)} | detection(table) | agreement(table) | {"brier": brier(y, p, w)}
    del figures["balanced_accuracy"]  # the mean of sensitivity and specificity
    return figures | {f"recall at FPR {fpr:g}": recall_at_fpr(y, p, w, fpr) for fpr in FPRS}


def multiclass_figures(y: ArrayLike, p: Array, classes: Sequence[str], w: Array) -> dict[str, Array]:
    """Everything about all classes; the most likely one is the answer. y (N,) class indices, p (N, C)."""
    aucs, table = class_aucs(y, p, w), confusion(y, p.argmax(1), w, len(classes))
    of_class = {f"auc {label}": values for label, values in zip(classes, aucs, strict=True)}
    of_answers = agreement(table) | macro_detection(table)
    return {"macro_auc": aucs.mean(0)} | of_answers | {"brier": brier(y, p, w)} | of_class


def rank_groups(y: ArrayLike, p: ArrayLike, groups: int) -> list[tuple[Array, Array]]:
    """(y, p) of groups of equal size by rank of `p`, as Hosmer and Lemeshow's; empty ones where cases are fewer.

    Cases of equal `p` share their positives evenly, the mean over all orders in which they may stand: where the edge of
    a group parts them, no order of the rows is better than another.
    """
    y, p = np.asarray(y, float), np.asarray(p, float)
    _, tie, cases = np.unique(p, return_inverse=True, return_counts=True)
    y = (np.bincount(tie, y) / cases)[tie]
    return [(y[part], p[part]) for part in np.array_split(np.argsort(p, kind="stable"), groups)]


def calibration(y: ArrayLike, p: ArrayLike, groups: int = 10) -> tuple[list[float], list[float]]:
    """(mean probability, share of positives) of each of the `rank_groups`."""
    found = [(float(p.mean()), float(y.mean())) for y, p in rank_groups(y, p, groups) if len(p)]
    return [mean for mean, _ in found], [share for _, share in found]
