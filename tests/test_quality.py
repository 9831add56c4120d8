"""Likeness of two images against reference values that nobody here made; the comparison of two manifests."""

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import imagehash
import numpy as np
import pytest
import skimage.data
from eval_samples import write_dataset
from PIL import Image

from eval import images, quality, similarity, statistics
from tiger import manifest as manifests
from tiger.conditions import read_gray
from tiger.errors import InputError, run
from tiger.manifest import Manifest

CLASSES = {"benign": 16, "FTC": 16}


# ------------------------------------------------------------------------------------------------------------ likeness


def test_ssim_is_that_of_scikit_image() -> None:
    camera = skimage.data.camera()
    noise = 20 * np.random.RandomState(5).randn(*camera.shape)  # scikit-image's own tests have this figure
    noisy = np.clip(camera + noise, 0, 255).astype(camera.dtype)
    assert quality.ssim(camera, noisy) == pytest.approx(0.3674518327910367, abs=1e-12)
    assert quality.ssim(camera, camera) == 1.0


# Liu, Lin & Narwaria 2012, fig. 2, times 16; the other two are these, turned.
HORIZONTAL = [[0, 0, 0, 0, 0], [1, 3, 8, 3, 1], [0, 0, 0, 0, 0], [-1, -3, -8, -3, -1], [0, 0, 0, 0, 0]]
DIAGONAL = [[0, 0, 1, 0, 0], [0, 8, 3, 0, 0], [1, 3, 0, -3, -1], [0, 0, -3, -8, 0], [0, 0, -1, 0, 0]]


def test_gradient_similarity_is_the_formula_of_the_paper() -> None:
    """Pixel by pixel, as printed: K' = 200, p = 0.1."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (2, 9, 7)).astype(np.uint8)
    padded = [np.pad(image.astype(float), 2, mode="reflect") for image in (x, y)]
    kernels = [np.rot90(kernel, turns) / 16 for kernel in (HORIZONTAL, DIAGONAL) for turns in (0, 1)]
    values = []
    for i, j in np.ndindex(x.shape):
        blocks = [image[i : i + 5, j : j + 5] for image in padded]
        gradients = [max(abs(float((block * kernel).sum())) for kernel in kernels) for block in blocks]
        g = 1.0  # in the corners, where the reflected block is symmetric, there is no gradient
        if max(gradients) > 0:
            r, k = abs(gradients[0] - gradients[1]) / max(gradients), 200 / max(gradients)
            g = (2 * (1 - r) + k) / (1 + (1 - r) ** 2 + k)
        e = 1 - ((float(x[i, j]) - float(y[i, j])) / 255) ** 2
        weight = 0.1 * g
        values.append((1 - weight) * g + weight * e)
    assert quality.gradient_similarity(x, y) == pytest.approx(np.mean(values), abs=1e-6)


def test_gradient_similarity_of_simple_images() -> None:
    flat = np.full((16, 16), 100, np.uint8)
    # No gradient on either side: g = 1, weight 0.1, and luminance differs by 51 of 255 grey levels.
    assert quality.gradient_similarity(flat, flat + 51) == pytest.approx(0.9 + 0.1 * (1 - 0.2**2), abs=1e-6)
    camera = skimage.data.camera()[::4, ::4]
    noise = np.random.default_rng(0).normal(size=camera.shape)
    noisy = [np.clip(camera + spread * noise, 0, 255).astype(np.uint8) for spread in (10, 40)]
    assert quality.gradient_similarity(camera, camera) == pytest.approx(1)
    values = [quality.gradient_similarity(camera, other) for other in noisy]
    assert 1 > values[0] > values[1] > 0
    assert quality.gradient_similarity(noisy[1], camera) == pytest.approx(values[1])


def test_perceptual_hash_is_that_of_imagehash() -> None:
    camera = skimage.data.camera()
    assert f"{similarity.phash(camera):016x}" == str(imagehash.phash(Image.fromarray(camera)))
    other = camera[::-1].copy()
    expected = imagehash.phash(Image.fromarray(camera)) - imagehash.phash(Image.fromarray(other))
    assert similarity.phash_distance(camera, other) == expected > 10
    assert similarity.phash_distance(camera, np.clip(camera.astype(int) + 2, 0, 255).astype(np.uint8)) <= 2
    file = next(path for path in metadata.files("ImageHash") or () if path.name == "imagehash.png")
    assert f"{similarity.phash(read_gray(Path(str(file.locate())))):016x}" == "ba8c84536bd3c366"


def test_white_is_255_or_1_as_the_numbers_say() -> None:
    camera = skimage.data.camera()[::4, ::4]
    noisy = np.clip(camera + 40 * np.random.default_rng(0).normal(size=camera.shape), 0, 255).astype(np.uint8)
    for measure in similarity.MEASURES.values():
        expected = measure(camera, noisy)
        for x, y in (
            (camera / 255, noisy / 255),
            (camera.astype(float), noisy.astype(float)),
            (camera.astype(int), noisy),
        ):
            assert measure(x, y) == pytest.approx(expected, abs=1e-5)
        for wrong in (camera / 255, camera - 1.0 * noisy, camera.astype(int) * 257, camera > 9, camera[..., None]):
            with pytest.raises(ValueError, match="images that all hold integers of 0 to 255, or floats"):
                measure(wrong, noisy)
    dark, bright = np.ones((16, 16)), 1 + 200 * np.eye(16)  # one of them alone would be white
    assert quality.ssim(dark, bright) == quality.ssim(dark.astype(int), bright.astype(int))


# ----------------------------------------------------------------------------------------------------------- manifests


class Histogram:
    """An extractor that takes no time: the levels of 4×4 blocks."""

    name = "block means"
    resize = "none"
    head = (np.random.default_rng(0).normal(0, 0.02, (5, 16)), np.zeros(5))
    has_positions = True

    def __call__(self, images) -> np.ndarray:
        means = [image.reshape(4, image.shape[0] // 4, 4, -1).mean((1, 3)).ravel() for image in images]
        return np.array(means, np.float32)

    def positions(self, images) -> list[np.ndarray]:
        return [image.reshape(16, 2, 16, 2).transpose(0, 2, 1, 3).reshape(-1, 4).astype(np.float32) for image in images]


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
    for rows in groups["FTC"].fake.values():  # those drawn after the two maps of a patient are one group
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
        patients = dict(zip("abcdefgh", np.split(np.arange(cuts[-1]), cuts[:-1]), strict=False))
        one = quality.ClassSets(patients, {"s": np.arange(100)})
        a, b, f = quality.split_draw([one], rng)
        assert len(a) == len(b) == len(f) == one.n
        assert not set(a) & set(b)


def test_a_patient_of_two_classes_is_on_one_side() -> None:
    """Each of 20 patients has an image of either class."""
    sets = [
        quality.ClassSets({f"{i}": np.array([20 * c + i]) for i in range(20)}, {"s": np.arange(50)}) for c in (0, 1)
    ]
    for i in range(20):
        a, b, f = quality.split_draw(sets, np.random.default_rng(i))
        assert not set(a % 20) & set(b % 20)
        assert len(a) == len(b) == len(f) == 2 * sets[0].n == 18  # (20 − 1) / 2


def test_a_resample_takes_any_image_of_a_large_group() -> None:
    one = quality.ClassSets({f"{i}": np.array([i]) for i in range(20)}, {"s": np.arange(40)}, most=9)
    assert one.n == 9
    drawn = [quality.bootstrap_draw([one], np.random.default_rng(i))[1] for i in range(60)]
    assert all(len(set(rows)) == 9 for rows in drawn) and len({row for rows in drawn for row in rows}) == 40


def test_cmmd_is_of_features_at_length_1() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 8)) + np.array([[[0.0]], [[0.5]]])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    found = quality.feature_metrics(a * rng.uniform(1, 9, (30, 1)), b)
    assert (found["cmmd"], found["cmmd_unbiased"]) == pytest.approx(
        (quality.cmmd(*unit), quality.cmmd(*unit, unbiased=True))
    )


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
        for metric in ("fid", "kid", "cmmd", "cmmd_unbiased", "density", "coverage", "precision", "recall"):
            assert part[metric]["low"] <= part[metric]["value"] <= part[metric]["high"]
            assert "floor" in part[metric]
            least, most = quality.RANGES.get(metric, (-np.inf, np.inf))
            assert least <= part[metric]["low"] <= part[metric]["high"] <= most
        for measure in ("ssim", "gradient_similarity", "phash_distance"):
            assert set(part[measure]) == {"random", "random real", "condition", "nearest", "nearest real"}
            assert part[measure]["random"]["n"] == part[measure]["random real"]["n"]
        assert not {"fid_infinity", "geometry_score", "inception_score", "sifid"} & part.keys()
    for metric in ("fid", "kid"):  # just as good as real ones
        entry = report["overall"][metric]
        assert entry["floor"] <= entry["high"] + (entry["high"] - entry["low"])
    quality.main([*given, "--output", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["overall"] == report["overall"]
    assert len(again["unchecked"]) == 1  # the images do not say which model made them


def test_a_checkpoint_of_unknown_training_is_said(
    sets: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, fake = sets
    given = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "q.json"), "--dry_run"]
    for flags, named in (
        ([], None),
        (["--extractor", "models/dino"], "models/dino"),
        (["--extractor", "resnet50", "--extractor_weights", "resnet50.pth"], "resnet50.pth"),
    ):
        quality.main([*given, *flags])
        said = [line for line in capsys.readouterr().err.splitlines() if "it must have seen no image" in line]
        assert len(said) == (named is not None)
        assert all(f"what {named} was trained on is not known" in line for line in said)


def test_sets_that_take_hours_are_said(
    sets: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = sets
    given = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "q.json"), "--dry_run"]
    quality.main(given)
    assert "--most" not in capsys.readouterr().err
    monkeypatch.setattr(quality, "LARGE", 10)
    quality.main(given)
    assert re.search(r"warning: \d+ images a side, compared \d+ times; .* --most takes a part", capsys.readouterr().err)
    quality.main([*given, "--most", "2"])
    assert "--most" not in capsys.readouterr().err


def test_all_metrics_on_request(
    sets: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "SLOW_RESAMPLES", 4)
    monkeypatch.setattr(quality, "REPEATS", 2)
    monkeypatch.setattr(quality.topology, "LANDMARKS", 15)
    monkeypatch.setattr(quality, "geometry_score", lambda a, b: quality.topology.geometry_score(a, b, 15, trials=3))
    real, fake = sets
    given = ["--real", str(real.root), "--fake", str(fake.root), "--cache_dir", str(tmp_path), "--metrics", "all"]
    quality.main([*given, "--output", str(tmp_path / "quality.json")])
    report = json.loads((tmp_path / "quality.json").read_text())
    for metric in ("fid_infinity", "geometry_score", "inception_score"):
        entry = report["overall"][metric]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert np.isfinite(entry["floor"])
    assert 1 <= report["overall"]["inception_score"]["value"] <= 5
    assert "geometry_score" not in report["per_class"]["FTC"]  # 11 images, 15 landmarks
    assert report["overall"]["sifid"]["condition"]["value"] > 0
    assert report["overall"]["sifid"]["random real"]["n"] > 20
    monkeypatch.setattr(Histogram, "has_positions", False)  # as a transformer's
    quality.main([*given, "--output", str(tmp_path / "without.json")])
    assert json.loads((tmp_path / "without.json").read_text())["overall"].keys() == report["overall"].keys() - {"sifid"}


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
    patient = {row.file_name: row.patient_id for row in real.rows}
    for ours, other, one, source in pairs["condition"]:
        row = rows[ours.tobytes()][1]
        assert row.label == "FTC"
        assert np.array_equal(other, pictures[row.derived_from[0]])
        assert one == source == patient[row.derived_from[0]]
    for ours, other, one, source in pairs["nearest"]:
        k, row = rows[ours.tobytes()]
        closest = train.rows[nearest[1][k]]
        assert np.array_equal(other, pictures[closest.file_name])
        assert (one, source) == (patient[row.derived_from[0]], closest.patient_id)
    patient_of = {images.load_native(real, row).tobytes(): (row.patient_id, row.label) for row in test.rows}
    for first, second, one, other in pairs["random real"]:
        assert patient_of[first.tobytes()] == (one, "FTC")
        assert patient_of[second.tobytes()] == (other, "FTC")
        assert one != other
    for ours, second, one, other in pairs["random"]:
        assert one == patient[rows[ours.tobytes()][1].derived_from[0]]
        assert patient_of[second.tobytes()] == (other, "FTC")
    assert len(pairs["random"]) == len(pairs["random real"]) == 20


def test_random_pairs_are_of_strangers(sets: tuple[Manifest, Manifest]) -> None:
    """Also where the synthetic images were drawn after those that they are compared with: after a map and a mask."""
    real, fake = sets
    train = real.select(split="train", labels=["FTC"])
    own = [(row, train.rows[i % 4].file_name, train.rows[i % 3 + 4].file_name) for i, row in enumerate(fake.rows)]
    fake = replace(fake, rows=tuple(replace(row, derived_from=tuple(names)) for row, *names in own))
    names = {images.load_native(fake, row).tobytes(): row.derived_from for row in fake.rows}
    patient = {row.file_name: row.patient_id for row in train.rows}
    nearest = [np.zeros(len(m.rows), int) for m in (train, fake)]
    for seed in range(10):
        pairs = similarity.pairs_of("FTC", train, fake, train, nearest, seed=seed)
        assert len(pairs["random"]) == 20
        for ours, _, one, other in pairs["random"]:
            assert one in (sources := {patient[name] for name in names[ours.tobytes()]}) and other not in sources
    assert similarity.strangers([["a"], ["a", "b"]], ["a", "b"], np.random.default_rng(0)) == [(0, 1)]


@pytest.mark.parametrize("kind", ["random", "random real"])
def test_interval_of_pairs_covers_the_truth_where_an_image_is_in_several(kind: str) -> None:
    """What an image adds to every pair that it is in, as 90 real ones are in those with 400 synthetic ones."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        theirs = rng.normal(size=90)
        if kind == "random":
            first, second = np.arange(400), rng.integers(90, size=400)
            values = rng.normal(size=400) + theirs[second]
        else:
            first, second = np.arange(90), rng.permutation(90)
            values = theirs[first] + theirs[second]
        people = ([f"{kind == 'random'} {i}" for i in first], [f"False {i}" for i in second])
        interval = similarity.pair_mean_ci(values, *people, n=200)
        covered += interval["low"] <= 0 <= interval["high"]
    assert covered >= 0.9 * 200


def test_pairs_within_a_patient_are_resampled_as_patients_are() -> None:
    rng = np.random.default_rng(1)
    people = rng.integers(0, 25, 90)
    values = rng.normal(size=25)[people] + rng.normal(size=90)
    one, both = statistics.mean_ci(values, people, n=4000), similarity.pair_mean_ci(values, people, people, n=4000)
    assert both == pytest.approx(one, abs=0.02)
    assert (both["n"], both["value"]) == (90, pytest.approx(values.mean()))


def test_intervals_are_of_one_kind_for_all_metrics() -> None:
    """Normal: as wide as the estimate varies between samples, also from 30 resamples, and within what can be."""
    rng = np.random.default_rng(0)

    def figures(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
        mean = float(fake.mean() - real.mean())
        return {"fid_infinity": mean, "geometry_score": abs(mean) / 100, "coverage": 1 - abs(mean) / 100}

    rows = {str(i): np.array([i]) for i in range(100)}
    sets, found = [quality.ClassSets(rows, rows)], []
    for _ in range(40):
        real, fake = rng.normal(size=(2, 100, 1))
        found.append(quality.compare(real, fake, sets, figures, 30, 0, lambda: None))
    # 50 real and 50 synthetic images are drawn: a standard deviation of √(1/50 + 1/50) = 0.2
    widths = [one["fid_infinity"]["high"] - one["fid_infinity"]["low"] for one in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.2, rel=0.05)
    for one in found:
        centred = one["fid_infinity"]
        assert (centred["low"] + centred["high"]) / 2 == pytest.approx(centred["value"])
    assert min(one["geometry_score"]["low"] for one in found) == 0
    assert max(one["coverage"]["high"] for one in found) == 1


def test_settings_are_named(sets: tuple[Manifest, Manifest]) -> None:
    named = quality.settings(quality.load_extractor("", None))
    assert named["density, coverage, precision, recall"] == {"k": 5}
    assert named["geometry_score"] == {"L0": 32, "gamma": 1 / 16, "trials": 100}
    assert named["fid_infinity"]["sizes"] == 15
    assert named["cmmd"]["variant"].startswith("MMD² with CMMD's constants")


def test_a_generator_that_saw_the_reference_is_refused(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    real, fake = sets
    (tmp_path / "net").mkdir()
    manifests.write(fake.path, [replace(row, model=f"{tmp_path / 'net'}@abc", derived_from=()) for row in fake.rows])
    given = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "q.json"), "--dry_run"]
    for trained_on, compared_with, refused in (
        ("test", "test", True),
        ("test", "all", True),
        ("test", "train", False),
        ("train", "train", False),
        ("train", "test", False),
    ):
        (tmp_path / "net" / "config.yaml").write_text(f"data_dir: {real.root}\nsplit: {trained_on}\n")
        if refused:
            with pytest.raises(InputError, match="net was trained on patients of valid or test"):
                quality.main([*given, "--split", compared_with])
        else:
            quality.main([*given, "--split", compared_with])


@pytest.mark.parametrize("where", ["fake", "real"])
def test_a_copy_of_a_test_image_is_refused(sets: tuple[Manifest, Manifest], tmp_path: Path, where: str) -> None:
    """Among the synthetic images and among those of train; a copy of a training image is what is measured."""
    real, fake = sets
    given = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(tmp_path / "q.json"), "--dry_run"]
    (fake.root / "images" / "S0001.png").write_bytes((real.root / "images" / "P0000.png").read_bytes())
    quality.main(given)
    name = {"fake": "images/S0004.png", "real": "images/P0004.png"}[where]
    (tmp_path / where / name).write_bytes((real.root / "images" / "P0050.png").read_bytes())
    with pytest.raises(InputError, match=f"same picture as one in test of .*: {name} = images/P0050.png; drop"):
        quality.main(given)
    quality.main([*given, "--split", "train"])


def test_help_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    quick, slow = ("fid", "kid", "cmmd", "density", "coverage", *similarity.MEASURES), ("fid_infinity", "sifid")
    assert all(name in told for name in (*quick, *slow, "inception_score"))
    assert "with --metrics all also fid_infinity, geometry_score" in told


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
