"""Intervals and tests for classifiers and proportions, over numpy arrays.

auc, low, high = delong_ci(y, scores)
auc, low, high = cluster_bootstrap_ci(auc, y, scores, patients, n=2000, seed=0)   # when patients have several images

`y` is 1 for positives and 0 for negatives; a higher score means more positive. Intervals are 95 %.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
_Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


def auc(y: ArrayLike, s: ArrayLike) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney U). Raises ValueError when a class is missing."""
    y, s = _binary(y), np.asarray(s, float)
    positives = int(y.sum())
    ranks = stats.rankdata(s)
    u = ranks[y].sum() - positives * (positives + 1) / 2
    return float(u / (positives * (len(y) - positives)))


def _binary(y: ArrayLike) -> NDArray[np.bool_]:
    y = np.asarray(y).astype(bool)
    if y.all() or not y.any():
        raise ValueError("both classes are needed")
    return y


def _placements(y: NDArray[np.bool_], s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """DeLong's structural components (V10 for each positive, V01 for each negative), by midranks.

    Sun & Xu, IEEE Signal Processing Letters 21(11):1389, 2014, algorithm 1.
    """
    positive, negative = s[y], s[~y]
    ranks = stats.rankdata(s)
    v10 = (ranks[y] - stats.rankdata(positive)) / len(negative)
    v01 = 1 - (ranks[~y] - stats.rankdata(negative)) / len(positive)
    return v10, v01


def _mean_variance(components: NDArray[np.float64]) -> float:
    return float(components.var(ddof=1) / len(components)) if len(components) > 1 else math.nan


def delong_ci(y: ArrayLike, s: ArrayLike) -> tuple[float, float, float]:
    """(AUC, low, high): DeLong, DeLong & Clarke-Pearson 1988, normal interval cut to [0, 1] as in R's pROC."""
    y, s = _binary(y), np.asarray(s, float)
    v10, v01 = _placements(y, s)
    value = float(v10.mean())
    margin = _Z * math.sqrt(_mean_variance(v10) + _mean_variance(v01))
    return value, max(0.0, value - margin), min(1.0, value + margin)


def delong_test(y: ArrayLike, s1: ArrayLike, s2: ArrayLike) -> tuple[float, float]:
    """(z, two-sided p) of AUC(s1) - AUC(s2) on the same cases. Two equal curves give (0, 1)."""
    y = _binary(y)
    first, second = (_placements(y, np.asarray(s, float)) for s in (s1, s2))
    difference = float(first[0].mean() - second[0].mean())
    variance = sum(_mean_variance(a - b) for a, b in zip(first, second, strict=True))
    if variance == 0:
        return (0.0, 1.0) if difference == 0 else (math.copysign(math.inf, difference), 0.0)
    z = difference / math.sqrt(variance)
    return z, float(2 * stats.norm.sf(abs(z)))


def hosmer_lemeshow(y: ArrayLike, p: ArrayLike, groups: int = 10) -> tuple[float, float]:
    """(chi², p) of calibration: Hosmer & Lemeshow 1980, groups of equal size by rank of `p`, groups − 2 degrees."""
    y, p = np.asarray(y, float), np.asarray(p, float)
    chi2 = 0.0
    for part in np.array_split(np.argsort(p, kind="stable"), groups):
        expected, observed, n = p[part].sum(), y[part].sum(), len(part)
        spread = expected * (1 - expected / n) if n else 0.0
        if spread > 0:
            chi2 += (observed - expected) ** 2 / spread
        elif n and observed != expected:  # certain and wrong
            chi2 = math.inf
    return float(chi2), float(stats.chi2.sf(chi2, groups - 2))


def wilson_ci(k: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of k successes in n (1927; Newcombe 1998, method 3)."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"need 0 ≤ k ≤ n and n > 0, got k = {k}, n = {n}")
    centre = (k + _Z**2 / 2) / (n + _Z**2)
    margin = _Z / (n + _Z**2) * math.sqrt(k * (n - k) / n + _Z**2 / 4)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def cluster_bootstrap_ci(
    metric: Callable[[NDArray, NDArray], float], y: ArrayLike, s: ArrayLike, groups: ArrayLike, n: int, seed: int
) -> tuple[float, float, float]:
    """(value, low, high): percentile bootstrap of `metric(y, s)` over whole groups (patients) drawn with replacement.

    Args:
        y, s: arrays whose first axis is the image.
        groups: the patient of each image.
        n: resamples. Those on which the metric is undefined (ValueError or nan, as when a class is missing) are left
            out, with a RuntimeWarning; the bounds are nan when that is more than half of them.
    """
    y, s = np.asarray(y), np.asarray(s)
    value = float(metric(y, s))
    members = group_members(groups)
    draws = []
    for i in range(n):
        rows = resample_groups(members, np.random.default_rng([seed, i]))
        try:
            draws.append(float(metric(y[rows], s[rows])))
        except ValueError:
            draws.append(math.nan)
    low, high = percentile_interval(np.array(draws))
    if undefined := int(np.isnan(draws).sum()):
        text = f"the metric is undefined on {undefined} of {n} resamples (a class is missing); they are left out"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return value, low, high


def group_members(groups: ArrayLike) -> list[NDArray[np.int64]]:
    """The row indices of each group."""
    _, inverse, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])


def resample_groups(members: list[NDArray[np.int64]], rng: np.random.Generator) -> NDArray[np.int64]:
    """Row indices of as many groups as there are, drawn with replacement."""
    return np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])


def percentile_interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile interval of the finite draws; nan when fewer than half are."""
    finite = draws[np.isfinite(draws)]
    if 2 * len(finite) < len(draws) or not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_ci(values: ArrayLike, groups: ArrayLike | None = None, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """{n, value, low, high} of a mean, by bootstrap over groups (default: every value is its own group)."""
    values = np.asarray(values, float)
    members = group_members(np.arange(len(values)) if groups is None else groups)
    sums, sizes = np.array([values[rows].sum() for rows in members]), np.array([len(rows) for rows in members])
    # How often each group is drawn, for all resamples at once: a mean needs no rows.
    drawn = np.random.default_rng(seed).multinomial(len(members), np.full(len(members), 1 / len(members)), size=n)
    low, high = percentile_interval(drawn @ sums / (drawn @ sizes))
    return {"n": len(values), "value": float(values.mean()), "low": low, "high": high}


def recall_at_fpr(y: ArrayLike, s: ArrayLike, fpr: float) -> float:
    """The highest recall of any threshold whose false positive rate does not exceed `fpr`."""
    y, s = _binary(y), np.asarray(s, float)
    order = np.argsort(-s, kind="stable")
    recall, false_rate = np.cumsum(y[order]) / y.sum(), np.cumsum(~y[order]) / (~y).sum()
    last_of_tie = np.append(s[order][1:] != s[order][:-1], True)  # a threshold cannot part equal scores
    allowed = last_of_tie & (false_rate <= fpr + 1e-12)
    return float(recall[allowed].max(initial=0.0))
