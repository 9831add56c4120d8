"""Figures of two sets of features, against published values and oracles: prdc, torch-fidelity, piq, scikit-learn."""

import tracemalloc

import numpy as np
import piq.gs
import prdc
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval import metrics, quality, topology


def gaussians(n: int, d: int, *, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def fid_with_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """As Heusel et al. compute it."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)))


def test_quality_offers_them_all() -> None:
    assert set(quality.__all__) >= {"fid", "kid", "cmmd", "density_coverage", "precision_recall", "geometry_score"}
    assert all(callable(getattr(quality, name)) for name in quality.__all__)


@pytest.mark.parametrize("metric", [metrics.fid, metrics.kid, metrics.cmmd, metrics.neighbourhoods])
def test_what_are_not_two_sets_of_features_is_refused(metric) -> None:
    a, b = gaussians(20, 4), gaussians(20, 4, seed=1)
    metric(a, b)
    for bad in (b[:1], b[:0], b[:, :3], b.ravel()):
        with pytest.raises(ValueError, match="need two sets of features"):
            metric(a, bad)
    for number in (np.nan, np.inf):
        broken = b.copy()
        broken[3, 2] = number
        with pytest.raises(ValueError, match="features that are no numbers"):
            metric(a, broken)
        for one in (metrics.nearest, lambda _, x: metrics.radii(x, 2), lambda _, x: metrics.inception_score(x)):
            with pytest.raises(ValueError, match="features that are no numbers"):
                one(a, broken)


def test_distances_do_not_know_where_the_origin_is() -> None:
    """Features of one spread far from 0, as of a layer without normalisation."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60, 8))
    b[:5] = a[:5]
    far = 2.0**20
    a, b = np.round(a * 2**20) / 2**20, np.round(b * 2**20) / 2**20  # so that adding `far` rounds nothing away
    assert metrics.neighbourhoods(a + far, b + far) == metrics.neighbourhoods(a, b)
    assert metrics.cmmd(a + far, b + far) == pytest.approx(metrics.cmmd(a, b), rel=1e-6)
    assert metrics.nearest(b[:5] + far, a + far)[1].max() == 0
    copies = rng.standard_normal((50, 1280), np.float32)
    assert metrics.nearest(copies, copies)[1].max() == 0


# ----------------------------------------------------------------------------------------------------------------- FID


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 300), (300, 18)])
def test_fid_is_the_formula_for_many_and_for_few_images(n: int, m: int) -> None:
    a, b = gaussians(n, 24), gaussians(m, 24, shift=0.3, seed=1)
    assert metrics.fid(a, b) == pytest.approx(fid_with_matrix_root(a, b), rel=1e-4)
    assert metrics.fid(a, b) == pytest.approx(metrics.fid(b, a), rel=1e-9)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-5)


def test_fid_of_known_gaussians() -> None:
    """|μ|² + Σ(σa − σb)² for axis-aligned Gaussians; 5000 samples, D = 4: bias of about 0.01."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5000, 4)) * [1, 2, 3, 4]
    b = rng.normal(size=(5000, 4)) * [2, 2, 2, 2] + [1, 0, 0, 0]
    assert metrics.fid(a, b) == pytest.approx(1 + 1 + 0 + 1 + 4, rel=0.05)


def test_fid_floor_grows_as_images_become_few() -> None:
    """Same distribution, D = 64: n = 50 gives about 42."""
    rng = np.random.default_rng(0)
    few = [metrics.fid(rng.normal(size=(50, 64)), rng.normal(size=(50, 64))) for _ in range(5)]
    assert np.mean(few) == pytest.approx(42, abs=3)


def test_fid_infinity_is_free_of_the_bias() -> None:
    """Equal Gaussians have distance 0 and, at N = 400 and D = 16, an FID of about 0.4; shifted ones keep |μ|² = 4."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 400, 16))
    biased, extrapolated = metrics.fid(a, b), metrics.fid_infinity(a, b)
    assert biased > 0.25
    assert abs(extrapolated) < biased / 3
    assert metrics.fid_infinity(a, b + 0.5) == pytest.approx(4, abs=0.35)
    assert metrics.fid_infinity(a, b) == extrapolated


# ----------------------------------------------------------------------------------------------------------------- MMD


@pytest.mark.parametrize("cells", [2**24, 700])
def test_kid_is_the_unbiased_estimator(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(metrics, "CELLS", cells)
    a, b = gaussians(60, 10), gaussians(45, 10, shift=0.5, seed=2)
    xx, yy, xy = (polynomial_kernel(*p, degree=3, gamma=1 / 10, coef0=1) for p in ((a, a), (b, b), (a, b)))
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = xx.sum() / (60 * 59) + yy.sum() / (45 * 44) - 2 * xy.mean()
    assert metrics.kid(a, b) == pytest.approx(expected, rel=1e-10)


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    rng = np.random.default_rng(3)
    values = [metrics.kid(rng.normal(size=(20, 8)), rng.normal(size=(20, 8))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_kid_is_that_of_torch_fidelity() -> None:
    """With subsets as large as the sets, theirs is one estimate, of shuffled rows."""
    a, b = (torch.from_numpy(gaussians(80, 6, shift=shift, seed=seed)) for shift, seed in ((0, 0), (0.4, 5)))
    theirs = kid_features_to_metric(
        a, b, kid_subsets=2, kid_subset_size=80, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0, verbose=False,
    )  # fmt: skip
    found = theirs["kernel_inception_distance_mean"]
    assert metrics.kid(a.numpy(), b.numpy()) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("cells", [2**24, 300])
def test_cmmd_has_the_official_constants(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(metrics, "CELLS", cells)
    a, b = gaussians(30, 8), gaussians(25, 8, shift=0.5, seed=2)
    xx, yy, xy = (rbf_kernel(*pair, gamma=1 / (2 * 10**2)) for pair in ((a, a), (b, b), (a, b)))
    assert metrics.cmmd(a, b) == pytest.approx(1000 * (xx.mean() + yy.mean() - 2 * xy.mean()), rel=1e-9)
    off = 1000 * ((xx.sum() - 30) / (30 * 29) + (yy.sum() - 25) / (25 * 24) - 2 * xy.mean())
    assert metrics.cmmd(a, b, unbiased=True) == pytest.approx(off, rel=1e-9)
    assert metrics.cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_biased_cmmd_of_equal_distributions() -> None:
    """0.49 at n = 20 for embeddings of length 1 that are half alike (cosine 0.5, so squared distance 1)."""
    rng = np.random.default_rng(0)
    common = np.eye(1, 512)
    estimates = []
    for _ in range(40):
        x = rng.normal(size=(40, 512)) / np.sqrt(512) + common
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        estimates.append(metrics.cmmd_estimates(x[:20], x[20:]))
    biased, unbiased = np.mean(estimates, axis=0)
    assert biased == pytest.approx(0.49, abs=0.02)
    assert unbiased == pytest.approx(0, abs=0.01)


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("cells", [2**24, 33 * 200])
def test_neighbourhood_metrics_are_those_of_prdc(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(metrics, "CELLS", cells)
    real, fake = gaussians(200, 12), 0.8 * gaussians(150, 12, shift=0.2)
    expected = prdc.compute_prdc(real, fake, nearest_k=4)
    assert metrics.neighbourhoods(real, fake, k=4) == pytest.approx(expected)
    assert metrics.density_coverage(real, fake, k=4) == pytest.approx((expected["density"], expected["coverage"]))
    assert metrics.precision_recall(real, fake, k=4) == pytest.approx((expected["precision"], expected["recall"]))
    assert 0.05 < expected["coverage"] < 0.95
    with pytest.raises(ValueError, match="less than the number of images; got k = 4, 4 images"):
        metrics.density_coverage(real[:4], fake, k=4)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be 1 or more .* got k = {k}"):
            metrics.density_coverage(real, fake, k=k)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    real, fake = gaussians(90, 6), 0.8 * gaussians(80, 6, shift=0.3)
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=50, verbose=False
    )
    assert metrics.precision_recall(real, fake, k=3) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_coverage_of_equal_distributions() -> None:
    """Naeem et al. 2020: 1 − 1 / 2^k in the limit; 0.969 for k = 5, N = 5000."""
    rng = np.random.default_rng(4)
    found = metrics.density_coverage(rng.normal(size=(5000, 16)), rng.normal(size=(5000, 16)), k=5)
    assert found[0] == pytest.approx(1.0, abs=0.05)
    assert found[1] == pytest.approx(0.969, abs=0.006)


@pytest.mark.parametrize("function", [metrics.neighbourhoods, metrics.kid, metrics.cmmd, metrics.nearest])
def test_memory_does_not_grow_with_the_matrix_of_distances(monkeypatch: pytest.MonkeyPatch, function) -> None:
    """2,000 × 2,000 distances are 32 MB, a tile here is 0.5 MB; a view of a column would keep its whole tile.

    Of features in single precision there is one copy in double, not one more for their squares.
    """
    monkeypatch.setattr(metrics, "CELLS", 2**16)
    rng = np.random.default_rng(0)
    for n, columns in ((2000, 4), (200, 1024)):
        a, b = (rng.standard_normal((rows, columns), np.float32) for rows in (n, 2000))
        tracemalloc.start()
        function(a, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * (a.nbytes + b.nbytes) + 4e6


def test_nearest_is_exact_in_any_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussians(70, 5), gaussians(40, 5, seed=1)
    expected = np.linalg.norm(a[:, None] - b[None], axis=2)
    within = np.linalg.norm(a[:, None] - a[None], axis=2)
    np.fill_diagonal(within, np.inf)
    for cells in (2**24, 90):
        monkeypatch.setattr(metrics, "CELLS", cells)
        rows, distance = metrics.nearest(a, b)
        assert np.array_equal(rows, expected.argmin(1))
        np.testing.assert_allclose(distance, expected.min(1))
        rows, distance = metrics.nearest(a, a, skip_self=True)
        assert np.array_equal(rows, within.argmin(1))
        np.testing.assert_allclose(distance, within.min(1))
    assert [len(part) for part in metrics.nearest(a, b[:0])] == [0, 0]


# -------------------------------------------------------------------------------------------------------------- classes


def test_inception_score_is_that_of_torch_fidelity() -> None:
    logits = torch.from_numpy(3 * np.random.default_rng(0).normal(size=(50, 7)))
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits.softmax(1).numpy()) == pytest.approx(theirs, rel=1e-9)
    assert metrics.inception_score(np.eye(7)) == pytest.approx(7)
    assert metrics.inception_score(np.full((5, 7), 1 / 7)) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- topology


def test_relative_living_times_of_the_authors_example() -> None:
    found = topology.relative_living_times([[0, 1], [0, 2], [0, np.inf]], 3)
    np.testing.assert_allclose(found[:4], [0, 1 / 3, 1 / 3, 1 / 3])
    assert not found[4:].any()
    np.testing.assert_allclose(topology.relative_living_times([], 2.0)[:2], [1, 0])
    np.testing.assert_allclose(topology.relative_living_times([], 0.0)[:2], [1, 0])  # all points are one
    rng = np.random.default_rng(0)
    intervals = np.sort(rng.uniform(0, 5, (40, 2)), axis=1)
    np.testing.assert_allclose(topology.relative_living_times(intervals, 5.0), piq.gs.relative(intervals, 5.0))


def test_holes_are_those_of_piq(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussians(120, 3)
    rows = np.random.default_rng(0).choice(120, 20, replace=False)
    monkeypatch.setattr(np.random, "choice", lambda n, size: rows)
    theirs, alpha_max = piq.gs.witness(x, sample_size=20, gamma=1 / 16)
    ours, most = topology.holes(x, x[rows], 1 / 16)
    assert len(ours) > 0
    assert most == alpha_max
    np.testing.assert_allclose(np.sort(ours, axis=0), np.sort(theirs, axis=0))


def test_geometry_score_tells_a_ring_from_a_disc() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, (3, 150))
    radius = np.stack([np.ones(150), np.ones(150), np.sqrt(rng.random(150))])
    ring, other, disc = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    ring, other, disc = (x + rng.normal(0, 0.02, x.shape) for x in (ring, other, disc))
    options = {"gamma": 1 / 4, "trials": 10, "landmarks": 16}
    same = quality.geometry_score(ring, other, **options)
    assert quality.geometry_score(ring, disc, **options) > 5 * same
    assert quality.geometry_score(ring, ring, **options) == 0
    assert quality.geometry_score(ring, disc, **options) == quality.geometry_score(ring, disc, **options)
    assert quality.geometry_score(ring, disc, **options, seed=1) != quality.geometry_score(ring, disc, **options)
    with pytest.raises(ValueError, match="32 landmarks need as many images, got 20"):
        quality.geometry_score(ring[:20], disc)
    with pytest.raises(ValueError, match="need one trial or more"):
        quality.geometry_score(ring, disc, trials=0)
    with pytest.raises(ValueError, match="features that are numbers"):
        quality.geometry_score(ring, np.where(disc == disc.max(), np.nan, disc))
