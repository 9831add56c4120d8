"""Copies are found, honest images are not accused; the page shows the pairs."""

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_samples import write_dataset
from PIL import Image
from scipy import stats

from eval import page, privacy, statistics
from tiger import manifest
from tiger.errors import InputError, run
from tiger.manifest import Manifest

COUNTS = {"train": {"benign": 60, "FTC": 60}, "test": {"benign": 60, "FTC": 60}}


class Pixels:
    """An extractor that takes no time: the image at 8×8."""

    name = "8×8 pixels"
    resize = "PIL"
    head = None

    def __call__(self, images) -> np.ndarray:
        return np.array([np.asarray(Image.fromarray(image).resize((8, 8))).ravel() for image in images], np.float32)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("real"), COUNTS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("honest")
    return write_dataset(folder, {"train": COUNTS["train"]}, seed=9, synthetic=True, prefix="S")


@pytest.fixture
def copied(tmp_path: Path, real: Manifest, honest: Manifest) -> Manifest:
    """Training images with a little noise, under the names of synthetic ones."""
    rng = np.random.default_rng(0)
    train = real.select(split="train")
    (tmp_path / "copied" / "images").mkdir(parents=True)
    for row, source in zip(honest.rows, train.rows, strict=True):
        image = np.asarray(Image.open(train.file(source, "file_name"))).astype(float)
        noisy = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "copied" / row.file_name)
    rows = [replace(row, derived_from=(source.file_name,)) for row, source in zip(honest.rows, train.rows, strict=True)]
    manifest.write(tmp_path / "copied" / "metadata.jsonl", rows)
    return manifest.read(tmp_path / "copied")


def report_of(real: Manifest, fake: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(privacy, "load_extractor", lambda name, weights: Pixels())
    monkeypatch.setattr(privacy, "RESAMPLES", 60)
    output = folder / "privacy.json"
    given = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(output)]
    privacy.main([*given, "--cache_dir", str(folder / "cache"), "--extractor", "pixels"])
    return json.loads(output.read_text())


def test_honest_images_are_not_accused(
    real: Manifest, honest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(real, honest, tmp_path, monkeypatch)
    assert report["n"] == {"train": 120, "held_out": 120, "synthetic": 120, "each": 120, "unseen": 0}
    assert report["unchecked"][-1].startswith("what pixels was trained on is not known")
    assert report["near"]["held_out"]["value"] == pytest.approx(0.05, abs=0.01)
    assert report["near"]["synthetic"]["low"] <= 0.1
    authenticity = report["authenticity"]
    assert abs(authenticity["synthetic"]["value"] - authenticity["held_out"]["value"]) < 0.15
    floor = report["c_t"]["floor"]
    assert -3 < floor["low"] < 0 < floor["high"] < 3 and abs(report["c_t"]["value"]) < 3
    assert page.bracket(floor) in (tmp_path / "privacy.html").read_text()
    assert report["membership_auc"]["low"] < 0.5 < report["membership_auc"]["high"]


def test_copies_are_found(real: Manifest, copied: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(real, copied, tmp_path, monkeypatch)
    none = report["authenticity"]["synthetic"]  # of 120 images of 60 patients
    assert (none["n"], none["value"]) == (120, 0) and "Wilson's" in report["interval"]
    assert (none["low"], none["high"]) == pytest.approx(statistics.wilson_ci(0, 60))
    assert report["near"]["synthetic"]["value"] > 0.95
    assert report["authenticity"]["synthetic"]["value"] < 0.05 < report["authenticity"]["held_out"]["low"]
    assert report["c_t"]["high"] < -3
    assert report["c_t"]["low"] <= report["c_t"]["value"] <= report["c_t"]["high"]
    assert report["membership_auc"]["low"] > 0.9
    assert report["membership_auc"]["recall_at_fpr_0.01"] > 0.8
    matches, of_others = report["phash_matches"], report["phash_matches_of_others"]
    assert matches["synthetic"]["value"] > matches["held_out"]["value"] == of_others["held_out"]["value"]
    assert matches["synthetic"]["value"] > of_others["synthetic"]["value"]  # the copies are of their sources
    assert len(report["closest"]) == privacy.PAIRS
    train = [row.file_name for row in real.select(split="train").rows]
    for pair in report["closest"]:  # the sources, in the order that they were copied in
        assert train.index(pair["training"]) == [row.file_name for row in copied.rows].index(pair["synthetic"])
        assert not pair["authentic"]
        assert pair["ssim"] > 0.8
    text = (tmp_path / "privacy.html").read_text()
    for told in report["unchecked"]:
        assert f"<b>Not checked for leaks</b>: {html.escape(told)}." in text
    assert report["unchecked"]
    assert text.count("data:image/png;base64,") == privacy.PAIRS
    assert "<script" not in text
    assert "http" not in text
    assert report["closest"][0]["training"] in text


def test_images_that_the_generator_has_not_seen_are_no_members(
    real: Manifest, copied: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw 30 of 120 training images, and its images are copies of those."""
    few = tuple(row for row in real.select(split="train").rows[::4])
    seen = {row.file_name for row in few}
    manifest.write(real.root / "few.jsonl", few)
    (copied.root / "config.yaml").write_text(f"data_dir: {real.root / 'few.jsonl'}\n")
    rows = [replace(row, model=f"{copied.root}@abc") for row in copied.rows if seen & set(row.derived_from)]
    manifest.write(copied.root / "metadata.jsonl", rows)
    report = report_of(real, manifest.read(copied.root), tmp_path, monkeypatch)
    assert (report["n"]["train"], report["n"]["unseen"]) == (30, 90)
    assert report["membership_auc"]["low"] > 0.9
    assert "30 training images (90 others, which the generator has not seen" in (tmp_path / "privacy.html").read_text()


def test_images_that_are_not_square_have_a_page_too(
    real: Manifest, copied: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in copied.rows:
        with Image.open(copied.root / row.file_name) as image:
            narrow = image.resize((48, 64))
        narrow.save(copied.root / row.file_name)
    report = report_of(real, copied, tmp_path, monkeypatch)
    assert all(pair["ssim"] > 0.5 for pair in report["closest"])


def test_a_generator_that_saw_the_holdout_is_refused(
    real: Manifest, honest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "load_extractor", lambda name, weights: Pixels())
    (tmp_path / "images").symlink_to(honest.root / "images")
    manifest.write(tmp_path / "metadata.jsonl", [replace(row, model=f"{tmp_path}@abc") for row in honest.rows])
    given = ["--real", str(real.root), "--fake", str(tmp_path), "--output", str(tmp_path / "p.json"), "--dry_run"]
    for split in ("train", "test"):
        (tmp_path / "config.yaml").write_text(f"data_dir: {real.root}\nsplit: {split}\n")
        if split == "train":
            privacy.main(given)
        else:
            with pytest.raises(InputError, match="was trained on patients of valid or test"):
                privacy.main(given)


@pytest.mark.parametrize("where", ["synthetic", "train"])
def test_a_copy_of_a_held_out_image_is_refused(real: Manifest, honest: Manifest, tmp_path: Path, where: str) -> None:
    folders = {"synthetic": tmp_path / "fake", "train": tmp_path / "real"}
    shutil.copytree(honest.root, folders["synthetic"])
    shutil.copytree(real.root, folders["train"])
    name = {"synthetic": "images/S0004.png", "train": "images/P0004.png"}[where]
    shutil.copy(real.root / "images" / "P0150.png", folders[where] / name)
    given = ["--real", folders["train"], "--fake", folders["synthetic"], "--output", tmp_path / "p.json", "--dry_run"]
    with pytest.raises(InputError, match=f"same picture as one in test of .*: {name} = images/P0150.png; drop"):
        privacy.main([str(word) for word in given])


def test_rows_without_a_patient_are_in_the_report(
    real: Manifest, honest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").symlink_to(real.root / "images")
    manifest.write(tmp_path / "metadata.jsonl", [replace(row, patient_id=None) for row in real.rows])
    unchecked = report_of(manifest.read(tmp_path), honest, tmp_path, monkeypatch)["unchecked"]
    assert any("240 of 240 rows have no patient_id" in text for text in unchecked)


def test_authenticity_by_hand() -> None:
    train = np.array([[0.0], [1.0], [10.0]])  # nearest other: 1, 1, 9
    found = privacy.authentic(train, np.array([[0.4], [2.5], [7.0], [18.0], [20.0]]))
    assert found.tolist() == [False, True, False, False, True]


def test_data_copying_is_a_weighted_z_score() -> None:
    rng = np.random.default_rng(0)
    held, fake = rng.normal(0, 1, 100), rng.normal(0.5, 1, 110)
    held_cells, fake_cells = np.repeat([0, 1, 2], [60, 30, 10]), np.repeat([0, 1, 2], [50, 50, 10])
    expected = 0.0
    for cell, weight in ((0, 60 / 90), (1, 30 / 90)):  # the third has fewer than 20 of each
        p, q = held[held_cells == cell], fake[fake_cells == cell]
        z = stats.mannwhitneyu(q, p, use_continuity=False, method="asymptotic")
        sign = 1 if z.statistic > len(p) * len(q) / 2 else -1
        expected += weight * sign * stats.norm.isf(z.pvalue / 2)
    assert privacy.data_copying(held, fake, held_cells, fake_cells) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(privacy.data_copying(held[:10], fake[:10], held_cells[:10], fake_cells[:10]))


def test_hashes_differ_in_bits() -> None:
    hashes = np.array([0b1011, 0], np.uint64)
    among = np.array([0b0011, 0b1111], np.uint64)
    assert privacy.hash_bits(hashes, among, [(), ()]).tolist() == [1, 2]
    assert privacy.hash_bits(hashes, among, [(0,), (0, 1)]).tolist() == [1, 64]
    assert privacy.hash_bits(hashes, among, [(0, 1), (0,)]).tolist() == [64, 4]


def test_a_patient_in_training_and_in_the_holdout_is_named(
    honest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = write_dataset(tmp_path / "mixed", {"train": {"benign": 4}, "test": {"benign": 4}})
    text = (mixed.path).read_text().replace("P-test-benign-0", "P-train-benign-0")
    mixed.path.write_text(text)
    given = ["--real", str(mixed.root), "--fake", str(honest.root), "--output", str(tmp_path / "p.json")]
    assert run(privacy.main, given) == 2
    assert "patient P-train-benign-0: is in test and train" in capsys.readouterr().err
    lone = write_dataset(tmp_path / "lone", {"train": {"benign": 4}})
    assert run(privacy.main, ["--real", str(lone.root), *given[2:]]) == 2
    assert "4 training and 0 held-out images" in capsys.readouterr().err
