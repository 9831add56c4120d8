"""Intervals and tests for classifiers and proportions, over numpy arrays.

auc, low, high = delong_ci(y, scores)
auc, low, high = cluster_bootstrap_ci(auc, y, scores, patients, n=2000, seed=0)   # when patients have several images

`y` is 1 for positives and 0 for negatives; a higher score means more positive. Intervals are 95 %. Labels that are
neither 0 nor 1, scores that are no numbers, and columns of different lengths raise ValueError.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from eval import scoring

CONFIDENCE = 0.95
Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))  # half the width of an interval, in standard deviations


def auc(y: ArrayLike, s: ArrayLike) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney U). Raises ValueError when a class is missing."""
    y, s = _two_classes(y, s)
    return float(scoring.auc(y, s, np.ones((1, len(y))))[0])


def _cases(y: ArrayLike, s: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels and scores of the same cases. Raises ValueError where they cannot be that."""
    y, s = np.asarray(y), np.asarray(s, float)
    if y.ndim != 1 or y.dtype.kind not in "biuf" or not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be one column of 0 and 1")
    _same_length(labels=y, scores=s)
    if not np.isfinite(s).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(s))} scores are no numbers")
    return y.astype(bool), s


def _same_length(**columns: NDArray) -> None:
    """Raise ValueError where columns of the same cases differ in length."""
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(
            " and ".join(f"{len(column)} {name}" for name, column in columns.items()) + " of the same cases"
        )


def _two_classes(y: ArrayLike, s: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    y, s = _cases(y, s)
    if y.all() or not y.any():
        raise ValueError("both classes are needed")
    return y, s


def placements(y: NDArray[np.bool_], s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """DeLong's structural components (V10 for each positive, V01 for each negative), by midranks.

    Sun & Xu, IEEE Signal Processing Letters 21(11):1389, 2014, algorithm 1. Several columns of scores, (N, K), give
    the components of their mean AUC.
    """
    if s.ndim == 2:
        v10, v01 = zip(*(placements(y, column) for column in s.T), strict=True)
        return np.mean(v10, axis=0), np.mean(v01, axis=0)
    positive, negative = s[y], s[~y]
    ranks = stats.rankdata(s)
    v10 = (ranks[y] - stats.rankdata(positive)) / len(negative)
    v01 = 1 - (ranks[~y] - stats.rankdata(negative)) / len(positive)
    return v10, v01


def clustered_variance(
    y: NDArray[np.bool_], v10: NDArray[np.float64], v01: NDArray[np.float64], groups: ArrayLike | None
) -> float:
    """Variance of mean(v10) = mean(v01), an AUC or a difference of two, whose cases come in groups (patients).

    Obuchowski, Biometrics 53:567, 1997, equation 3. With a group a case it is DeLong's. nan where all positives, or all
    negatives, are of one group.
    """
    index = np.arange(len(y)) if groups is None else _group_index(groups)
    _same_length(labels=y, groups=index)
    of_positives = np.bincount(index[y], v10 - v10.mean(), minlength=index.max() + 1)  # (groups,) sums
    of_negatives = np.bincount(index[~y], v01 - v01.mean(), minlength=index.max() + 1)
    with_positives, with_negatives = len(np.unique(index[y])), len(np.unique(index[~y]))
    if min(with_positives, with_negatives) < 2:
        return math.nan

    def part(a: NDArray, b: NDArray, count: int) -> float:
        return count / (count - 1) * float(a @ b)

    m, n = len(v10), len(v01)
    variance = (
        part(of_positives, of_positives, with_positives) / m**2
        + part(of_negatives, of_negatives, with_negatives) / n**2
        + 2 * part(of_positives, of_negatives, len(of_positives)) / (m * n)
    )
    return max(0.0, variance)  # rounding


def delong_ci(y: ArrayLike, s: ArrayLike, groups: ArrayLike | None = None) -> tuple[float, float, float]:
    """(AUC, low, high): DeLong, DeLong & Clarke-Pearson 1988, normal interval cut to [0, 1] as in R's pROC.

    Args:
        s: (N,) scores, or (N, K) for the mean AUC of K classifiers.
        groups: the patient of each case; without it every case is a patient of its own.
    """
    y, s = _two_classes(y, s)
    v10, v01 = placements(y, s)
    value = float(v10.mean())
    margin = Z * math.sqrt(clustered_variance(y, v10, v01, groups))
    low, high = np.clip([value - margin, value + margin], 0, 1)
    return value, float(low), float(high)


def delong_difference(
    y: ArrayLike, s1: ArrayLike, s2: ArrayLike, groups: ArrayLike | None = None
) -> tuple[float, float]:
    """(difference, its variance) of AUC(s1) - AUC(s2) on the same cases. See delong_ci for the arguments."""
    first, second = (placements(*_two_classes(y, s)) for s in (s1, s2))
    v10, v01 = (a - b for a, b in zip(first, second, strict=True))
    return float(v10.mean()), clustered_variance(np.asarray(y, bool), v10, v01, groups)


def delong_test(y: ArrayLike, s1: ArrayLike, s2: ArrayLike, groups: ArrayLike | None = None) -> tuple[float, float]:
    """(z, two-sided p) of AUC(s1) - AUC(s2) on the same cases. Two equal curves give (0, 1)."""
    return z_test(*delong_difference(y, s1, s2, groups))


def z_test(value: float, variance: float) -> tuple[float, float]:
    """(z, two-sided p) that a normal estimate of this variance is of 0; nan where there is no variance to tell."""
    if variance == 0:
        return (0.0, 1.0) if value == 0 else (math.copysign(math.inf, value), 0.0)
    z = value / math.sqrt(variance)
    return z, float(2 * stats.norm.sf(abs(z)))


def t_interval(value: float, parts: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(low, high, two-sided p) of an estimate whose variance is a sum: 95 % interval, and test of its being 0.

    Student's t with Satterthwaite's degrees of freedom (Biometrics 2:110, 1946): a variance that few values tell is
    not taken for known.

    Args:
        parts: (variance, degrees of freedom that it has; math.inf where it is as good as known) of each part.
    """
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return value, value, float(value == 0)
    unsure = sum(part**2 / freedom for part, freedom in parts if part)
    freedom = variance**2 / unsure if unsure else math.inf
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return value - margin, value + margin, float(2 * stats.t.sf(abs(value) / math.sqrt(variance), freedom))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values of one family adjusted by Holm's step-down method (Scand. J. Statist. 6:65, 1979); nan stays nan."""
    p = np.asarray(p, float)
    adjusted = np.full(len(p), math.nan)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def hosmer_lemeshow(y: ArrayLike, p: ArrayLike, groups: int = 10, fitted: bool = True) -> tuple[float, float]:
    """(chi², p) of calibration: Hosmer & Lemeshow 1980, groups of equal size by rank of `p`, groups − 2 degrees.

    Where the edge of a group parts cases of equal `p`, they share their positives (`scoring.rank_groups`): the order of
    the rows changes nothing, and chi² is at most its mean over all orders.

    Args:
        y, p: (N,) 0 or 1, and probabilities in [0, 1].
        fitted: whether `p` was fitted on these very cases, which costs two degrees of freedom; on others it is groups.
    Raises ValueError where no degree of freedom is left, and where there are fewer cases than groups.
    """
    y, p = _cases(y, p)
    if (p < 0).any() or (p > 1).any():
        raise ValueError("probabilities must be in [0, 1]")
    freedom, n = groups - 2 if fitted else groups, len(p)
    if freedom < 1 or n < groups:
        raise ValueError(f"need {groups - freedom + 1} ≤ groups ≤ cases, got groups = {groups}, cases = {n}")
    chi2 = 0.0
    for outcomes, risks in scoring.rank_groups(y, p, groups):
        expected, observed, n = risks.sum(), outcomes.sum(), len(risks)
        spread = expected * (1 - expected / n)
        if spread > 0:
            chi2 += (observed - expected) ** 2 / spread
        elif observed != expected:  # certain and wrong
            chi2 = math.inf
    return float(chi2), float(stats.chi2.sf(chi2, freedom))


def wilson_ci(k: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of k successes in n (1927; Newcombe 1998, method 3)."""
    k, n = int(k), int(n)  # a small integer of NumPy would overflow
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"need 0 ≤ k ≤ n and n > 0, got k = {k}, n = {n}")
    centre = (k + Z**2 / 2) / (n + Z**2)
    margin = Z / (n + Z**2) * math.sqrt(k * (n - k) / n + Z**2 / 4)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def share_ci(hits: ArrayLike, groups: ArrayLike, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """{n, value, low, high} of the share of hits: mean_ci, or where none or all are hits Wilson's interval.

    There every resample has the same share, and [0, 0] would say that a hit is impossible. Images of a group are not
    independent, so it is of as many trials as groups.

    Args:
        hits: (N,) 0 and 1, or bool.
        groups: the patient of each image.
    """
    found = mean_ci(hits, groups, n, seed)
    if found["value"] in (0, 1):
        trials = len(group_members(groups))
        found["low"], found["high"] = wilson_ci(trials * int(found["value"]), trials)
    return found


def cluster_bootstrap_ci(
    metric: Callable[[NDArray, NDArray], float], y: ArrayLike, s: ArrayLike, groups: ArrayLike, n: int, seed: int
) -> tuple[float, float, float]:
    """(value, low, high): percentile bootstrap of `metric(y, s)` over whole groups (patients) drawn with replacement.

    Args:
        y, s: arrays whose first axis is the image.
        groups: the patient of each image. One patient cannot tell how patients differ: the bounds are then nan.
        n: resamples. Those on which the metric is undefined (ValueError or nan, as when a class is missing) are left
            out, with a RuntimeWarning; the bounds are nan when that is more than half of them.
    """
    y, s, groups = np.asarray(y), np.asarray(s), np.asarray(groups)
    _same_length(labels=y, scores=s, groups=groups)
    value = float(metric(y, s))
    members = group_members(groups)
    if len(members) < 2:
        return value, math.nan, math.nan
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
    """The row indices of each group. Raises ValueError where a case has none."""
    index = _group_index(groups)
    return np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])


def _group_index(groups: ArrayLike) -> NDArray[np.int64]:
    """(N,) the place of each case's group among the distinct ones. Raises ValueError where a case has none."""
    groups = np.asarray(groups)
    if missing := sum(group is None or group != group for group in groups.tolist()):
        raise ValueError(f"{missing} cases have no group; a patient that is not known must be one of its own")
    return np.unique(groups, return_inverse=True)[1]


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
    """{n, value, low, high} of a mean, by bootstrap over groups (default: every value is its own group).

    The bounds of a single group are nan.
    """
    values = np.asarray(values, float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    _same_length(values=values, groups=groups)
    members = group_members(groups)
    if len(members) < 2:
        return {"n": len(values), "value": float(values.mean()), "low": math.nan, "high": math.nan}
    sums, sizes = np.array([values[rows].sum() for rows in members]), np.array([len(rows) for rows in members])
    # How often each group is drawn, for all resamples at once: a mean needs no rows.
    drawn = np.random.default_rng(seed).multinomial(len(members), np.full(len(members), 1 / len(members)), size=n)
    low, high = percentile_interval(drawn @ sums / (drawn @ sizes))
    return {"n": len(values), "value": float(values.mean()), "low": low, "high": high}


def recall_at_fpr(y: ArrayLike, s: ArrayLike, fpr: float) -> float:
    """The highest recall of any threshold whose false positive rate does not exceed `fpr`. Raises ValueError when a
    class is missing."""
    y, s = _two_classes(y, s)
    return float(scoring.recall_at_fpr(y, s, np.ones((1, len(y))), fpr)[0])
