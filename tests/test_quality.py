"""Metrics against reference values and oracles that nobody here made; the comparison of two manifests."""

import json
from pathlib import Path

import numpy as np
import prdc
import pytest
import scipy.linalg
import skimage.data
from eval_samples import write_dataset
from sklearn.metrics.pairwise import polynomial_kernel

from eval import images, quality, similarity
from tiger.errors import InputError, run
from tiger.manifest import Manifest

CLASSES = {"benign": 16, "FTC": 16}


def gaussians(n: int, d: int, *, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def fid_with_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """As Heusel et al. compute it."""
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 300), (300, 18)])
def test_fid_is_the_formula_for_many_and_for_few_images(n: int, m: int) -> None:
    a, b = gaussians(n, 24), gaussians(m, 24, shift=0.3, seed=1)
    assert quality.fid(a, b) == pytest.approx(fid_with_matrix_root(a, b), rel=1e-4)
    assert quality.fid(a, b) == pytest.approx(quality.fid(b, a), rel=1e-9)
    assert quality.fid(a, a) == pytest.approx(0, abs=1e-5)


def test_fid_of_known_gaussians() -> None:
    """|μ|² + Σ(σa − σb)² for axis-aligned Gaussians; 5000 samples, D = 4: bias of about 0.01."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5000, 4)) * [1, 2, 3, 4]
    b = rng.normal(size=(5000, 4)) * [2, 2, 2, 2] + [1, 0, 0, 0]
    assert quality.fid(a, b) == pytest.approx(1 + 1 + 0 + 1 + 4, rel=0.05)


def test_fid_floor_grows_as_images_become_few() -> None:
    """Same distribution, D = 64: n = 50 gives about 42."""
    rng = np.random.default_rng(0)
    few = [quality.fid(rng.normal(size=(50, 64)), rng.normal(size=(50, 64))) for _ in range(5)]
    assert np.mean(few) == pytest.approx(42, abs=3)


def test_kid_is_the_unbiased_estimator() -> None:
    a, b = gaussians(60, 10), gaussians(45, 10, shift=0.5, seed=2)
    xx, yy, xy = (polynomial_kernel(*p, degree=3, gamma=1 / 10, coef0=1) for p in ((a, a), (b, b), (a, b)))
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = xx.sum() / (60 * 59) + yy.sum() / (45 * 44) - 2 * xy.mean()
    assert quality.kid(a, b) == pytest.approx(expected, rel=1e-10)
    assert quality.kid(a[:30], b[:30], subset_size=30, subsets=2) == pytest.approx(quality.kid(a[:30], b[:30]))
    assert quality.kid(a, b, subset_size=20, subsets=400) == pytest.approx(expected, rel=0.1)
    with pytest.raises(ValueError, match="subset_size 50 exceeds the 45"):
        quality.kid(a, b, subset_size=50)


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    rng = np.random.default_rng(3)
    values = [quality.kid(rng.normal(size=(20, 8)), rng.normal(size=(20, 8))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


@pytest.mark.parametrize("block", [2048, 33])
def test_neighbourhood_metrics_are_those_of_prdc(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(quality, "BLOCK", block)
    real, fake = gaussians(200, 12), 0.8 * gaussians(150, 12, shift=0.2)
    expected = prdc.compute_prdc(real, fake, nearest_k=4)
    assert quality.density_coverage(real, fake, k=4) == pytest.approx((expected["density"], expected["coverage"]))
    assert quality.precision_recall(real, fake, k=4) == pytest.approx((expected["precision"], expected["recall"]))
    assert 0.05 < expected["coverage"] < 0.95
    with pytest.raises(ValueError, match="needs more than 4 images"):
        quality.density_coverage(real[:4], fake, k=4)


def test_coverage_of_equal_distributions() -> None:
    """Naeem et al. 2020: 1 − 1 / 2^k in the limit; 0.969 for k = 5."""
    rng = np.random.default_rng(4)
    found = quality.density_coverage(rng.normal(size=(2000, 16)), rng.normal(size=(2000, 16)), k=5)
    assert found[0] == pytest.approx(1.0, abs=0.05)
    assert found[1] == pytest.approx(0.969, abs=0.01)


def test_ssim_is_that_of_scikit_image() -> None:
    camera = skimage.data.camera()
    noise = 20 * np.random.RandomState(5).randn(*camera.shape)  # scikit-image's own tests have this figure
    noisy = np.clip(camera + noise, 0, 255).astype(camera.dtype)
    assert similarity.ssim(camera, noisy) == pytest.approx(0.3674518327910367, abs=1e-12)
    assert similarity.ssim(camera, camera) == 1.0


# ----------------------------------------------------------------------------------------------------------- manifests


class Histogram:
    """An extractor that takes no time: the levels of 4×4 blocks."""

    name = "block means"

    def __call__(self, images) -> np.ndarray:
        means = [image.reshape(4, image.shape[0] // 4, 4, -1).mean((1, 3)).ravel() for image in images]
        return np.array(means, np.float32)


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, Manifest]:
    """Real images with splits and synthetic ones, just as good, drawn after training images."""
    monkeypatch.setattr(quality, "load_extractor", lambda name, weights: Histogram())
    monkeypatch.setattr(quality, "RESAMPLES", 30)
    monkeypatch.setattr(quality, "REPEATS", 4)
    real = write_dataset(tmp_path / "real", {"train": CLASSES, "test": {"benign": 30, "FTC": 24}})
    sources = [row.file_name for row in real.select(split="train").rows]
    fake = write_dataset(
        tmp_path / "fake", {"train": {"benign": 9, "FTC": 20}}, seed=1, synthetic=True, prefix="S", sources=sources
    )
    return real, fake


def test_sets_have_equal_size_and_share_no_patient(sets: tuple[Manifest, Manifest]) -> None:
    real, fake = sets
    test = real.select(split="test")
    patient_of = images.patients_of(real.rows)
    groups, left_out = quality.class_sets(test, fake, patient_of)
    assert left_out == {}
    for rows in groups["FTC"].fake:  # those drawn after the two maps of a patient are one group
        assert len({patient_of[fake.rows[k].derived_from[0]] for k in rows}) == 1
    assert len(groups["FTC"].fake) == 11  # 20 images
    assert {label: one.n for label, one in groups.items()} == {"benign": 9, "FTC": 11}  # all fakes; (24 − 2) / 2
    repeated = []
    for i in range(20):
        a, b, f = quality.split_draw(list(groups.values()), np.random.default_rng(i))
        assert len(a) == len(b) == len(f) == 20
        assert not {test.rows[k].patient_id for k in a} & {test.rows[k].patient_id for k in b}
        for part, rows in ((a, test.rows), (b, test.rows), (f, fake.rows)):
            assert [str(rows[k].label) for k in part].count("benign") == 9
            assert len(set(part)) == 20
        real_rows, fake_rows = quality.bootstrap_draw(list(groups.values()), np.random.default_rng(i))
        assert len(real_rows) == len(fake_rows) == 20
        repeated.append(len(set(real_rows)) < 20)
    assert any(repeated)


def test_uneven_patients_still_give_equal_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = np.cumsum(rng.integers(1, 6, size=int(rng.integers(2, 9))))
        one = quality.ClassSets(np.split(np.arange(cuts[-1]), cuts[:-1]), [np.arange(100)])
        a, b, f = quality.split_draw([one], rng)
        assert len(a) == len(b) == len(f) == one.n
        assert not set(a) & set(b)


def test_report(sets: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = sets
    given = ["--real", str(real.root), "--fake", str(fake.root), "--cache_dir", str(tmp_path / "cache")]
    quality.main([*given, "--output", str(tmp_path / "quality.json")])
    report = json.loads((tmp_path / "quality.json").read_text())
    assert report["command"].startswith("python -m eval.quality --real ")
    assert report["extractor"] == "block means"
    assert set(report["per_class"]) == {"benign", "FTC"}
    assert report["overall"]["n"] == 20
    for part in (report["overall"], *report["per_class"].values()):
        for metric in ("fid", "kid", "density", "coverage", "precision", "recall"):
            assert part[metric]["low"] <= part[metric]["value"] <= part[metric]["high"]
            assert "floor" in part[metric]
            assert metric not in quality.SHARES or 0 <= part[metric]["low"] <= part[metric]["high"] <= 1
        assert set(part["ssim"]) == {"random", "random real", "condition", "nearest", "nearest real"}
    for metric in ("fid", "kid"):  # just as good as real ones
        entry = report["overall"][metric]
        assert entry["floor"] <= entry["high"] + (entry["high"] - entry["low"])
    quality.main([*given, "--output", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["overall"] == report["overall"]


def test_worse_images_score_worse(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    real, fake = sets
    blurred = write_dataset(tmp_path / "grainy", {"train": CLASSES}, seed=2, synthetic=True, prefix="S", grain=90)
    scores = {}
    for name, manifest in (("good", fake), ("bad", blurred)):
        output = tmp_path / f"{name}.json"
        quality.main(
            [
                "--real",
                str(real.root),
                "--fake",
                str(manifest.root),
                "--output",
                str(output),
                "--cache_dir",
                str(tmp_path),
            ]
        )
        scores[name] = json.loads(output.read_text())["overall"]
    assert scores["bad"]["fid"]["value"] > 3 * scores["good"]["fid"]["value"]
    assert scores["bad"]["kid"]["value"] > scores["good"]["kid"]["high"]
    assert scores["bad"]["coverage"]["value"] < scores["good"]["coverage"]["low"]
    assert scores["bad"]["ssim"]["random"]["value"] < scores["good"]["ssim"]["random"]["value"]


def test_ssim_pairs_are_what_they_are_called(sets: tuple[Manifest, Manifest]) -> None:
    real, fake = sets
    train, test = real.select(split="train"), real.select(split="test")
    size = 32
    pictures = {row.file_name: image for row, image in zip(real.rows, images.load_images(real, size), strict=True)}
    nearest = [np.arange(len(m.rows)) % len(train.rows) for m in (test, fake)]
    pairs = similarity.pairs_of("FTC", test, fake, train, nearest, seed=0)
    rows = {images.load_native(fake, row).tobytes(): (k, row) for k, row in enumerate(fake.rows)}
    for ours, other, group in pairs["condition"]:
        row = rows[ours.tobytes()][1]
        assert row.label == "FTC"
        assert np.array_equal(other, pictures[row.derived_from[0]])
        assert group == next(r.patient_id for r in train.rows if r.file_name == row.derived_from[0])
    for ours, other, _ in pairs["nearest"]:
        assert np.array_equal(other, pictures[train.rows[nearest[1][rows[ours.tobytes()][0]]].file_name])
    patient_of = {images.load_native(real, row).tobytes(): (row.patient_id, row.label) for row in test.rows}
    for one, other, group in pairs["random real"]:
        assert patient_of[one.tobytes()] == (group, "FTC")
        assert patient_of[other.tobytes()][0] != group
        assert patient_of[other.tobytes()][1] == "FTC"


def test_a_small_class_is_left_out(
    sets: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_dataset(tmp_path / "few", {"train": {"benign": 9, "FTC": 1}}, synthetic=True, prefix="S")
    given = ["--real", str(sets[0].root), "--fake", str(few.root), "--cache_dir", str(tmp_path / "cache")]
    quality.main([*given, "--output", str(tmp_path / "quality.json")])
    assert "warning: class FTC has too few images and is left out" in capsys.readouterr().err
    report = json.loads((tmp_path / "quality.json").read_text())
    assert report["classes"] == list(report["per_class"]) == ["benign"]
    assert report["left_out"] == {"FTC": "24 real images of 12 patients, 1 synthetic ones"}
    assert report["overall"] == report["per_class"]["benign"]


def test_images_of_the_wrong_kind_are_named(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    real, fake = sets
    output = ["--output", str(tmp_path / "q.json")]
    with pytest.raises(InputError, match="no row is marked synthetic"):
        quality.main(["--real", str(real.root), "--fake", str(real.root), *output])
    with pytest.raises(InputError, match="every row is synthetic"):
        quality.main(["--real", str(fake.root), "--fake", str(fake.root), *output])


@pytest.mark.parametrize(
    ("fakes", "message"),
    [
        ({"MTC": 4}, "too few images on one side (benign: 30 real images of 15 patients, 0 synthetic ones; FTC"),
        ({"FTC": 1}, "FTC: 24 real images of 12 patients, 1 synthetic ones"),
    ],
)
def test_wrong_input_is_one_line(
    sets: tuple[Manifest, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fakes: dict[str, int],
    message: str,
) -> None:
    other = write_dataset(tmp_path / "other", {"train": fakes}, synthetic=True, prefix="S")
    given = ["--real", str(sets[0].root), "--fake", str(other.root), "--output", str(tmp_path / "q.json")]
    assert run(quality.main, given) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
