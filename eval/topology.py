"""Geometry score: do two sets of features have equally many holes? (Khrulkov & Oseledets 2018, arXiv:1802.02664)"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

# The authors' γ, N / 640,000, leaves the complex of a few hundred images with hardly an edge; it and the number of
# landmarks are the same for every set here, so that scores of one n can be compared.
LANDMARKS = 32
GAMMA = 1 / 16
TRIALS = 100


def geometry_score(
    a: NDArray[np.floating[Any]],
    b: NDArray[np.floating[Any]],
    landmarks: int = LANDMARKS,
    gamma: float = GAMMA,
    trials: int = TRIALS,
    seed: int = 0,
) -> float:
    """Squared distance of the mean relative living times of two (N, D) sets of features; 0 is equal topology.

    Args:
        landmarks: L0, rows drawn as vertices; all rows are witnesses.
        gamma: largest relaxation of the witness complex, as a share of the largest distance to a landmark.
        trials: draws of landmarks, from `seed`, that the living times are averaged over.
    Raises ValueError where a set has fewer rows than landmarks, or features that are no numbers.
    """
    means = [mean_living_times(x, landmarks, gamma, trials, seed) for x in (a, b)]
    return score(*means)


def score(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared distance of two mean_living_times."""
    return float(((a - b) ** 2).sum())


def mean_living_times(
    x: NDArray[np.floating[Any]],
    landmarks: int = LANDMARKS,
    gamma: float = GAMMA,
    trials: int = TRIALS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """(100,) mean over draws of landmarks of the relative living times of (N, D) features; arguments as above."""
    if len(x) < landmarks:
        raise ValueError(f"{landmarks} landmarks need as many images, got {len(x)}")
    if trials < 1 or not np.isfinite(x).all():
        raise ValueError(f"need one trial or more and features that are numbers; got {trials} trials")
    draws = (np.random.default_rng([seed, i]).choice(len(x), landmarks, replace=False) for i in range(trials))
    return np.mean([relative_living_times(*holes(x, x[rows], gamma)) for rows in draws], axis=0)


def holes(
    witnesses: NDArray[np.floating[Any]], landmarks: NDArray[np.floating[Any]], gamma: float
) -> tuple[NDArray[np.float64], float]:
    """((I, 2) birth and death of each one-dimensional hole, largest relaxation) of the witness complex."""
    import gudhi

    table = cdist(witnesses, landmarks)
    order = table.argsort(1)
    most = float(table.max()) * gamma
    pairs = np.dstack([order, np.take_along_axis(table, order, 1)])  # (W, L, 2): landmark and distance, nearest first
    tree = gudhi.WitnessComplex(pairs).create_simplex_tree(max_alpha_square=most, limit_dimension=2)
    tree.compute_persistence(homology_coeff_field=2)
    return tree.persistence_intervals_in_dimension(1), most


def relative_living_times(intervals: Any, alpha_max: float, i_max: int = 100) -> NDArray[np.float64]:
    """(i_max,) share of 0 … alpha_max in which there are exactly 0, 1, … holes (eq. 2 and 3).

    Args:
        intervals: (I, 2) birth and death of each hole; a death of inf counts as alpha_max.
    """
    if alpha_max == 0:  # all points are one: no hole at any time
        return np.eye(1, i_max)[0]
    intervals = np.minimum(np.asarray(intervals, np.float64).reshape(-1, 2), alpha_max)
    edges = np.unique(np.append(intervals, [0, alpha_max]))
    middles = (edges[1:] + edges[:-1]) / 2
    alive = ((intervals[:, :1] <= middles) & (middles < intervals[:, 1:])).sum(0)
    times = np.bincount(alive, np.diff(edges), minlength=i_max)
    return times[:i_max] / alpha_max
