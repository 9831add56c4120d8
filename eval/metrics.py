"""Distances between two sets of images, over their features: pure functions of (N, D) arrays.

Every matrix of distances is made in tiles of at most CELLS numbers, so 30,000 × 30,000 images need no more memory than
their features in double precision and a few tiles. Numbers that are not finite raise ValueError, as do sets that are
not two of (N, D), N ≥ 2 and of one D, where two are asked for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating[Any]]  # (N, D)
K = 5  # neighbours, as in Naeem et al. 2020
CELLS = 2**24  # numbers in a tile: 128 MB
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # google-research/cmmd, distance.py
POINTS = 15  # sizes that FID∞ is extrapolated from, as its authors


def _two_sets(a: Features, b: Features) -> tuple[Features, Features]:
    """Both as they are. Raises ValueError where they are not two sets of features of one kind."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets of features, (N, D) with N ≥ 2 and one D; got {a.shape} and {b.shape}")
    return _finite(a), _finite(b)


def _finite(values: Features) -> Features:
    """As they are. Raises ValueError where some are no numbers."""
    if not np.isfinite(values).all():
        raise ValueError("features that are no numbers")
    return values


def _centred(a: Features, b: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Copies without their common mean: no distance changes, and rounding is that of the spread, not of the offset."""
    first, second = np.array(a, np.float64), np.array(b, np.float64)
    mean = (first.sum(0) + second.sum(0)) / (len(first) + len(second))
    first -= mean
    second -= mean
    return first, second


# ----------------------------------------------------------------------------------------------------------------- FID


def fid(a: Features, b: Features) -> float:
    """Fréchet distance of two Gaussians fitted to (N, D) features (Heusel et al. 2017), sample covariances.

    tr √(Σa Σb) is the nuclear norm of A Bᵀ for centred A, B with Σ = AᵀA, which needs no matrix root and is exact where
    N < D too; taller matrices are first reduced to their D×D triangular factors.
    """
    factors, means, traces = [], [], []
    for x in (np.asarray(one, np.float64) for one in _two_sets(a, b)):
        centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
        factors.append(np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred)
        means.append(x.mean(0))
        traces.append((centred**2).sum())
    cross = factors[0] @ factors[1].T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    root = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + traces[0] + traces[1] - 2 * root)


def fid_infinity(a: Features, b: Features, seed: int = 0) -> float:
    """FID extrapolated to infinitely many images: the intercept of a line through FID over 1/N (Chong & Forsyth 2020).

    Both sets shrink together, from all to a quarter of the smaller, so that the bias of either goes; the authors hold
    the real one fixed. The bias is linear in 1/N where N is well above D only.
    """
    rng = np.random.default_rng(seed)
    most = min(len(a), len(b))
    sizes = np.linspace(most, max(2, most // 4), POINTS).astype(int)
    values = [fid(a[rng.permutation(len(a))[:n]], b[rng.permutation(len(b))[:n]]) for n in sizes]
    return float(np.polyfit(1 / sizes, values, 1)[1])


# ----------------------------------------------------------------------------------------------------------------- MMD

Kernel = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]  # (n, D), (m, D) -> (n, m)


def kid(a: Features, b: Features) -> float:
    """Kernel distance: unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018), of all images at once; the
    original code takes the mean over subsets. It may be negative.
    """
    a, b = _two_sets(a, b)
    return _mmd2(np.asarray(a, np.float64), np.asarray(b, np.float64), _cubic)[1]


def _cubic(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    values = x @ y.T / x.shape[1] + 1
    return values * values * values  # NumPy's ** 3 takes 17 times as long


def cmmd(a: Features, b: Features, unbiased: bool = False) -> float:
    """1000 · MMD² with the Gaussian kernel of σ = 10 (Jayasumana et al. 2024), over CLIP embeddings of length 1.

    Args:
        unbiased: leave the diagonals out, as the published code does not: its value for equal distributions is about
            2000 / N · (1 − mean kernel), 0.5 at N = 20. The unbiased one is 0 on average, and may be negative.
    """
    return cmmd_estimates(a, b)[unbiased]


def cmmd_estimates(a: Features, b: Features) -> tuple[float, float]:
    """(biased, unbiased) CMMD, for the price of one."""
    gamma = 1 / (2 * CMMD_SIGMA**2)
    biased, unbiased = _mmd2(*_centred(*_two_sets(a, b)), lambda x, y: np.exp(-gamma * _squared_distances(x, y)))
    return CMMD_SCALE * biased, CMMD_SCALE * unbiased


def _mmd2(a: NDArray[np.float64], b: NDArray[np.float64], kernel: Kernel) -> tuple[float, float]:
    """(V-statistic, U-statistic): the latter leaves out each image's kernel with itself."""
    biased = unbiased = -2 * sum(float(kernel(a[tile], b).sum()) for tile in _tiles(a, b)) / (len(a) * len(b))
    for x in (a, b):
        total = diagonal = 0.0
        for tile in _tiles(x, x):
            values = kernel(x[tile], x)
            total += float(values.sum())
            diagonal += float(values.diagonal(tile.start).sum())
        biased += total / len(x) ** 2
        unbiased += (total - diagonal) / (len(x) * (len(x) - 1))
    return biased, unbiased


# ---------------------------------------------------------------------------------------------------------- neighbours


def _tiles(x: Features, y: Features) -> Iterator[slice]:
    """Rows of `x`, in parts of which each has at most CELLS distances to `y`."""
    step = max(1, CELLS // max(1, len(y)))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = a @ b.T  # (len(a), len(b)); the rest is in place, for memory
    squares *= -2
    squares += np.einsum("nd,nd->n", a, a)[:, None]  # (a * a).sum(1) would be a copy of the features for every tile
    squares += np.einsum("nd,nd->n", b, b)
    return np.maximum(squares, 0, out=squares)


def distances(a: Features, b: Features) -> NDArray[np.float64]:
    """(len(a), len(b)) Euclidean distances. For many tiles of one set give float64, or each makes a copy of it."""
    squares = _squared_distances(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.sqrt(squares, out=squares)


def nearest(x: Features, among: Features, skip_self: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(index of the nearest row of `among`, its distance) for each row of `x`; both empty where `among` is.

    Args:
        skip_self: `x` and `among` are the same rows, and none is its own neighbour.
    """
    indices, values = [np.zeros(0, np.int64)], [np.zeros(0)]
    x, among = _centred(_finite(x), _finite(among)) if len(among) else (x[:0], among)
    for tile in _tiles(x, among):
        block = distances(x[tile], among)
        if skip_self:
            rows = np.arange(len(block))
            block[rows, tile.start + rows] = np.inf
        indices.append(block.argmin(1))
        values.append(np.linalg.norm(x[tile] - among[indices[-1]], axis=1))  # of a copy 0, where a block has rounding
    return np.concatenate(indices), np.concatenate(values)


def radii(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """(N,) distance of each of (N, D) rows to its k-th nearest other row; k is 1 … N − 1, or ValueError is raised."""
    _finite(x)
    if not 1 <= k < len(x):
        raise ValueError(f"k must be 1 or more and less than the number of images; got k = {k}, {len(x)} images")
    # The nearest is the row itself. A column alone would be a view that keeps its whole tile in memory.
    return np.concatenate([np.partition(distances(x[tile], x), k, axis=1)[:, k].copy() for tile in _tiles(x, x)])


def neighbourhoods(real: Features, fake: Features, k: int = K) -> dict[str, float]:
    """density, coverage, precision and recall, from one pass over the distances."""
    real, fake = _centred(*_two_sets(real, fake))
    real_radii, fake_radii = radii(real, k), radii(fake, k)
    inside = covered = recalled = 0
    precise = np.zeros(len(fake), bool)
    for tile in _tiles(real, fake):
        block = distances(real[tile], fake)
        within = block < real_radii[tile, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
        precise |= within.any(0)
        recalled += int((block < fake_radii).any(1).sum())
    return {
        "density": inside / (k * len(fake)),
        "coverage": covered / len(real),
        "precision": float(precise.mean()),
        "recall": recalled / len(real),
    }


def density_coverage(real: Features, fake: Features, k: int = K) -> tuple[float, float]:
    """(density, coverage) of Naeem et al. 2020, eq. 3 and 4. Coverage needs equally many images to be comparable."""
    found = neighbourhoods(real, fake, k)
    return found["density"], found["coverage"]


def precision_recall(real: Features, fake: Features, k: int = K) -> tuple[float, float]:
    """Improved (precision, recall) of Kynkäänniemi et al. 2019, eq. 2."""
    found = neighbourhoods(real, fake, k)
    return found["precision"], found["recall"]


# -------------------------------------------------------------------------------------------------------------- classes


def inception_score(probabilities: NDArray[np.floating[Any]]) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al. 2016), over one split.

    Args:
        probabilities: (N, C), of the classifier that the features come from. 1 … C; it grows with N.
    """
    p = _finite(np.asarray(probabilities, np.float64))
    logs = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(p.mean(0), 1e-300))
    return float(np.exp((p * logs).sum(1).mean()))
