"""The downstream comparison: arms, mixing, leakage, intervals, reuse."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_samples import write_dataset

from eval import classifier, classify, realism
from eval.images import source_patients
from tiger import manifest
from tiger.errors import InputError, run
from tiger.manifest import Manifest, Row

CLASSES = ("benign", "PTC", "FTC")
SMALL = ["--model", "resnet18", "--image_size", "32", "--train_batch_size", "8", "--resamples", "50"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A long-tailed real set, a synthetic one derived from its training rows, and further real images."""
    root = tmp_path_factory.mktemp("classify")
    held_out = {split: dict.fromkeys(CLASSES, 8) for split in ("valid", "test")}
    real = write_dataset(root / "real", {"train": {"benign": 20, "PTC": 12, "FTC": 4}, **held_out})
    sources = [row.file_name for row in real.select(split="train").rows]
    counts = {"train": dict.fromkeys(CLASSES, 8)}
    write_dataset(root / "fake", counts, seed=1, synthetic=True, prefix="S", sources=sources)
    write_dataset(root / "extra", {"train": dict.fromkeys(CLASSES, 12)}, seed=2, prefix="E")
    return {name: root / name for name in ("real", "fake", "extra")}


def arguments(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    given = ["--real", folders["real"], "--fake", folders["fake"], "--output", output]
    return [*map(str, given), *SMALL, "--max_train_steps", "2", *more]


def make_data(y: list[int], origin: list[int]) -> classify.Data:
    images = np.arange(len(y) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    test = (images[:2], np.array([0, 1]))
    rows = Manifest(Path("m"), ())
    return classify.Data(["benign", "FTC"], images, np.array(y), np.array(origin), None, test, rows)


def draws(arm: str, data: classify.Data, share: float = 0.25) -> np.ndarray:
    """(batches, 8) row indices"""
    groups = classify.groups_of(arm, data, share)
    return np.stack([classify.draw_batch(groups, 8, np.random.default_rng([0, i])) for i in range(300)])


def test_every_class_gets_the_same_synthetic_share_in_every_batch() -> None:
    data = make_data(y=[0] * 50 + [1] * 5 + [0] * 10 + [1] * 40, origin=[0] * 55 + [1] * 50)
    rows = draws("tiger_f", data)
    y, origin = data.y[rows], data.origin[rows]
    for label in (0, 1):
        assert set((y == label).sum(1)) == {4}
        assert set(((y == label) & (origin == classify.FAKE)).sum(1)) == {1}  # a quarter of four, always
    assert set(np.unique(rows)) == set(range(105))
    assert np.array_equal(rows, draws("tiger_f", data))


def test_shares_that_do_not_fit_a_batch_are_right_on_average() -> None:
    data = make_data(y=[0, 0, 1, 1, 0, 1], origin=[0, 0, 0, 0, 1, 1])
    rows = draws("tiger_f", data, share=0.1)
    synthetic = data.origin[rows] == classify.FAKE
    assert set(synthetic.sum(1)) <= {0, 1, 2}
    for label in (0, 1):
        assert (synthetic & (data.y[rows] == label)).mean() == pytest.approx(0.05, abs=0.015)


def test_arms_draw_from_their_own_images() -> None:
    data = make_data(y=[0] * 30 + [1] * 10 + [0, 1] * 5 + [0, 1] * 5, origin=[0] * 40 + [1] * 10 + [2] * 10)
    assert data.y[draws("none", data)].mean() == pytest.approx(0.25, abs=0.03)
    for arm, origins in (("none", {0}), ("oversampling", {0}), ("tiger_f", {0, 1}), ("real_upper", {0, 2})):
        rows = draws(arm, data)
        assert set(np.unique(data.origin[rows])) == origins
        if arm != "none":
            assert set((data.y[rows] == 1).sum(1)) == {4}


def test_a_class_without_synthetic_images_is_refused() -> None:
    with pytest.raises(InputError, match="arm tiger_f: no images of class benign"):
        classify.groups_of("tiger_f", make_data(y=[0, 1, 1], origin=[0, 0, 1]), 0.25)


def test_pair_auc_looks_at_the_two_classes_only() -> None:
    y = np.array([0, 0, 1, 1, 2])
    p = np.array([[0.6, 0.1, 0.3], [0.2, 0.1, 0.7], [0.3, 0.2, 0.5], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]])
    # p1 / (p0 + p1): negatives 1/7, 1/3; positives .4, 6/7
    assert classify.pair_auc(0, 1)(y, p) == 1.0
    p[2] = [0.5, 0.2, 0.3]  # 2/7 lies between the negatives
    assert classify.pair_auc(0, 1)(y, p) == 0.75
    assert classifier.macro_auc(y[:4], p[:4, :2]) == pytest.approx((0.75 + 1.0) / 2)


def test_report_scores_and_reuse(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.json"
    given = arguments(folders, output, "--extra_real", str(folders["extra"]), "--seeds", "0", "1")
    classify.main(given)
    report = json.loads(output.read_text())
    assert list(report["arms"]) == list(classify.ARMS)
    assert report["n"]["train"] == {"benign": 20, "PTC": 12, "FTC": 4}
    assert report["n"]["extra_real"] == report["n"]["synthetic"] == dict.fromkeys(CLASSES, 8)  # equally many
    assert report["command"].startswith("python -m eval.classify --real ")
    tiger = report["arms"]["tiger_f"]
    assert set(tiger) >= {"macro_auc", "auc benign vs PTC", "auc benign vs FTC"}
    assert len(tiger["macro_auc"]["per_seed"]) == 2
    assert tiger["macro_auc"]["low"] <= tiger["macro_auc"]["value"] <= tiger["macro_auc"]["high"]
    assert "minus_oversampling" in tiger["auc benign vs FTC"]
    realism_figures = report["real_vs_synthetic"]
    assert realism_figures["n_train"] > 0 and realism_figures["n_test"] > 0
    assert [realism_figures[name] for name in ("model", "image_size", "max_train_steps")] == ["resnet18", 32, 1]
    with open(tmp_path / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 24
    ours = [row for row in rows if row["arm"] == "tiger_f" and row["seed"] == "1"]
    y = np.array([CLASSES.index(row["label"]) for row in ours])
    p = np.array([[float(row[f"p_{label}"]) for label in CLASSES] for row in ours])
    assert classifier.macro_auc(y, p) == tiger["macro_auc"]["per_seed"][1]  # tables can be made again from the scores

    trained: list[str] = []
    train = classifier.train

    def counting(*args, **kwargs):
        trained.append(kwargs["description"])
        return train(*args, **kwargs)

    monkeypatch.setattr(classifier, "train", counting)
    (tmp_path / "scores" / "tiger_f-seed1.json").unlink()
    classify.main(given)
    assert trained == ["tiger_f, seed 1"]
    again = json.loads(output.read_text())
    assert again["arms"] == report["arms"] | {"tiger_f": again["arms"]["tiger_f"]}
    assert again["real_vs_synthetic"] == report["real_vs_synthetic"]
    assert again["arms"]["tiger_f"]["macro_auc"] == tiger["macro_auc"]  # a training is a function of its seed
    trained.clear()
    changed = arguments(
        folders, output, "--arms", "oversampling", "tiger_f", "--synthetic_share", "0.5", "--no_realism"
    )
    classify.main(changed)
    assert trained == ["tiger_f, seed 0"]  # the other arm does not depend on the share


def test_a_classifier_learns_and_keeps_its_best_state(folders: dict[str, Path]) -> None:
    recipe = classifier.Recipe(model="resnet18", max_train_steps=24, train_batch_size=12, validations=4)
    real = manifest.read(folders["real"])
    images = {split: classify.load_images(real.select(split=split), 32) for split in ("train", "test")}
    y = {s: np.array([CLASSES.index(str(row.label)) for row in real.select(split=s).rows]) for s in images}
    data = images["train"], y["train"]
    test = images["test"], y["test"]
    net, notes = classifier.train(
        recipe, *data, lambda rng: rng.integers(36, size=12), test, classes=3, seed=0, description="test"
    )
    assert classifier.macro_auc(y["test"], classifier.predict(net, images["test"])) == notes["valid_macro_auc"] > 0.75


def test_the_state_is_selected_on_valid(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest.read(folders["real"]).select(split="valid")
    valid = classify.load_images(rows, 32), np.array([CLASSES.index(str(row.label)) for row in rows.rows])
    looks: list[tuple[float, np.ndarray]] = []

    def scripted(y: np.ndarray, p: np.ndarray, classes: list[int]) -> float:
        assert np.array_equal(y, valid[1])
        looks.append(((0.5, 0.9, 0.3, 0.9)[len(looks)], p))
        return looks[-1][0]

    monkeypatch.setattr(classifier, "macro_auc", scripted)
    recipe = classifier.Recipe(model="resnet18", max_train_steps=4, train_batch_size=8, validations=4)
    net, notes = classifier.train(
        recipe, *valid, lambda rng: rng.integers(24, size=8), valid, classes=3, seed=0, description="test"
    )
    assert (notes["selected_step"], notes["valid_macro_auc"]) == (2, 0.9)
    np.testing.assert_allclose(classifier.predict(net, valid[0]), looks[1][1], atol=1e-6)


def spoil(source: Path, folder: Path, change) -> Path:
    """A manifest beside the pictures of `source` in which `change(row)` has been applied to every row."""
    path = source / f"{folder.name}.jsonl"
    manifest.write(path, [change(row) for row in manifest.read(source).rows])
    return path


def in_test(row: Row) -> bool:
    return row.split == "test" and row.label == "FTC"


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("real", lambda row: replace(row, synthetic=in_test(row)), "synthetic rows; give them as --fake: images/P"),
        (
            "real",
            lambda row: replace(row, derived_from=("images/P0000.png",) if in_test(row) else ()),
            "derived_from in valid or test: images/P",
        ),
        (
            "real",
            lambda row: replace(row, patient_id="P-train-PTC-0" if in_test(row) else row.patient_id),
            "PTC-0: is in",
        ),
        ("fake", lambda row: replace(row, synthetic=False), "rows not marked synthetic: images/S0000.png"),
        (
            "fake",
            lambda row: replace(row, derived_from=("images/P0045.png",)),
            "rows derived from valid or test images of .*: images/S0000.png",
        ),
        ("extra", lambda row: replace(row, patient_id="P-test-FTC-1"), "patients who are in valid or test"),
        ("extra", lambda row: replace(row, synthetic=True), "synthetic rows: images/E0000.png"),
    ],
)
def test_leakage_is_refused_by_name(folders: dict[str, Path], tmp_path: Path, which: str, change, message: str) -> None:
    folders = folders | {which: spoil(folders[which], tmp_path, change)}
    extra = ("--extra_real", str(folders["extra"]), "--dry_run")
    with pytest.raises(InputError, match=message):
        classify.main(arguments(folders, tmp_path / "report.json", *extra))


def test_a_copy_of_a_test_image_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = write_dataset(tmp_path, {"train": dict.fromkeys(CLASSES, 8)}, seed=3, prefix="E")
    test_image = (folders["real"] / "images" / "P0055.png").read_bytes()
    (tmp_path / extra.rows[1].file_name).write_bytes(test_image)
    with pytest.raises(InputError, match="images/E0001.png = images/P0055.png"):
        classify.main(arguments(folders, tmp_path / "r.json", "--extra_real", str(tmp_path), "--dry_run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "real_upper"], "arm real_upper: needs further real images"),
        (["--synthetic_share", "1.5"], "--synthetic_share 1.5: must be"),
        (["--weights", "no.pth"], "no.pth: no such file"),
    ],
)
def test_wrong_input_is_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run(classify.main, arguments(folders, tmp_path / "r.json", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_dry_run_trains_nothing(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classify.main(arguments(folders, tmp_path / "r.json", "--dry_run"))
    assert "nothing trained" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_local_weights_are_loaded(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(1)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    net = classifier.build(classifier.Recipe(model="resnet18", weights=str(tmp_path / "resnet18.pth")), classes=4)
    assert torch.equal(net.state_dict()["layer3.0.conv1.weight"].cpu(), weights["layer3.0.conv1.weight"])
    assert net.state_dict()["fc.weight"].shape == (4, 512)


def test_realism_halves_share_no_patient() -> None:
    def row(name: str, patient: str, label: str, derived_from: tuple[str, ...] = ()) -> Row:
        return Row(name, "solid", "sonogram", label=label, patient_id=patient, derived_from=derived_from)

    train = {f"t{i}": f"T{i // 2}" for i in range(40)}  # file -> patient
    real = [row(f"r{i}", f"R{i // 3}", ("benign", "FTC")[i // 3 % 2]) for i in range(60)]
    rng = np.random.default_rng(0)
    fake = [
        row(f"f{i}", f"S{i}", ("benign", "FTC")[i % 2], tuple(f"t{k}" for k in rng.integers(40, size=1 + i % 2)))
        for i in range(80)
    ]
    first, second = realism.halves(real, fake, train, seed=0)
    assert not {r.patient_id for r in first[0]} & {r.patient_id for r in second[0]}
    patients = [{p for r in part[1] for p in source_patients(r, train)} for part in (first, second)]
    assert not patients[0] & patients[1]
    for real_rows, fake_rows in (first, second):
        assert sorted(str(r.label) for r in real_rows) == sorted(str(r.label) for r in fake_rows)
        assert len({r.label for r in real_rows}) == 2
        assert len(fake_rows) > 10


def test_realism_is_one_half_for_real_and_one_for_obvious_fakes(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = classifier.Recipe(model="resnet18", max_train_steps=20, train_batch_size=8)
    counts = {"train": dict.fromkeys(CLASSES, 24)}
    real = write_dataset(tmp_path / "real", {"test": dict.fromkeys(CLASSES, 24)}, seed=4)
    same = write_dataset(tmp_path / "same", counts, seed=5, prefix="S", synthetic=True)
    grainy = write_dataset(tmp_path / "grainy", counts, seed=6, prefix="S", synthetic=True, grain=60)
    assert realism.measure(real, grainy, list(real.rows), recipe, 32, 0, 50)["auc"] > 0.95
    result = realism.measure(real, same, list(real.rows), recipe, 32, 0, 50)
    assert 0.2 < result["auc"] < 0.8
    assert result["n_train"] == result["n_test"] == 72
