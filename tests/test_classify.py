"""The downstream comparison: arms, mixing, leakage, intervals, reuse."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from eval_samples import write_dataset
from PIL import Image, ImageOps
from training_samples import flags, save_base

from eval import classifier, classify, features, figures, leakage, realism, runs, sources, training
from eval.images import load_images, source_patients
from eval.runs import SHARES
from eval.study import Data, Held, Sources, Trial, classes_of, kept, load
from tiger import manifest, pretrain
from tiger.conditions import read_gray
from tiger.errors import InputError, WorkFailed, run
from tiger.files import read_json, write_json
from tiger.manifest import Row
from tiger.output import model_fingerprint
from tiger.shards import content_hash

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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The descriptions of all classifiers trained from here on."""
    found: list[str] = []
    train = classifier.train

    def counting(*args, **kwargs):
        found.append(kwargs["description"])
        return train(*args, **kwargs)

    monkeypatch.setattr(classifier, "train", counting)
    return found


def test_report_scores_and_reuse(folders: dict[str, Path], tmp_path: Path, trained: list[str]) -> None:
    output = tmp_path / "report.json"
    given = arguments(folders, output, "--extra_real", str(folders["extra"]), "--seeds", "0,1")
    classify.main(given)
    report = json.loads(output.read_text())
    assert list(report["arms"]) == ["none", "oversampling", "tiger_f", "real_upper"]
    assert report["n"]["train"] == {"benign": 20, "PTC": 12, "FTC": 4}
    assert report["n"]["tiger_f"] == dict.fromkeys(CLASSES, 8)
    added = {arm: entry["added"] for arm, entry in report["arms"].items()}
    assert added["none"] == dict.fromkeys(CLASSES, 0)
    assert added["tiger_f"] == added["real_upper"] == dict.fromkeys(CLASSES, 8)
    assert all(entry["real"] == report["n"]["train"] for entry in report["arms"].values())
    (unknown,) = report["unchecked"]
    assert "24 rows do not say which model made them" in unknown
    assert report["command"].startswith("python -m eval.classify --real ")
    tiger = report["arms"]["tiger_f"]
    assert set(tiger) >= {"macro_auc", "auc benign vs PTC", "auc benign vs FTC", "valid auc benign vs FTC"}
    assert len(tiger["macro_auc"]["per_seed"]) == 2
    assert tiger["macro_auc"]["low"] <= tiger["macro_auc"]["value"] <= tiger["macro_auc"]["high"]
    assert len([one for one in report["comparisons"] if one["figure"] == "auc benign vs FTC"]) == 6  # pairs of four
    looks = report["real_vs_synthetic"]["tiger_f"]
    assert looks["n_train"] > 0 and looks["n_test"] > 0
    assert [looks[name] for name in ("model", "image_size", "max_train_steps")] == ["resnet18", 32, 1]
    with open(tmp_path / "report_scores.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert len(rows) == 4 * 2 * 24
    ours = [row for row in rows if row["arm"] == "tiger_f" and row["seed"] == "1"]
    y = np.array([CLASSES.index(row["label"]) for row in ours])
    p = np.array([[float(row[f"p_{label}"]) for label in CLASSES] for row in ours])
    assert classifier.macro_auc(y, p) == pytest.approx(tiger["macro_auc"]["per_seed"][1])

    trained.clear()
    (tmp_path / "scores" / "tiger_f-seed1.json").unlink()
    classify.main(given)
    assert trained == ["tiger_f-seed1"]
    again = json.loads(output.read_text())
    assert again["arms"]["tiger_f"]["macro_auc"] == tiger["macro_auc"]  # a training is a function of its seed
    assert again["comparisons"] == report["comparisons"]

    trained.clear()
    saved = (tmp_path / "scores" / "tiger_f-seed0.json").read_bytes()
    changed = arguments(folders, output, "--arms", "oversampling", "tiger_f", "--share", "0.5", "--seeds", "0,1")
    with pytest.raises(InputError, match=r"tiger_f-seed0.json was made with other settings: share was \[0.25\], is"):
        classify.main(changed)  # the other arm does not depend on the share
    assert trained == [] and (tmp_path / "scores" / "tiger_f-seed0.json").read_bytes() == saved

    table = (tmp_path / "report_scores.csv").read_bytes()
    classify.main(arguments(folders, tmp_path / "more.json", "--arms", "none"))  # another report of the same scores
    assert trained == [] and (tmp_path / "report_scores.csv").read_bytes() == table
    assert len((tmp_path / "more_scores.csv").read_bytes()) < len(table)


def test_shards_make_every_training_once(folders: dict[str, Path], tmp_path: Path, trained: list[str]) -> None:
    output = tmp_path / "report.json"
    arms = ["none", "oversampling", "mixup", "cutmix", "erasing", "features", "basic"]
    given = arguments(folders, output, "--no_realism", "--arms", *arms, "--tasks", "all", "FTC")
    classify.main([*given, "--shard", "1/2"])
    assert len(trained) == 7 and not output.exists()
    classify.main([*given, "--shard", "0/2"])
    assert len(trained) == len(set(trained)) == 14
    report = json.loads(output.read_text())
    assert list(report["arms"]) == arms
    assert {"auc benign vs FTC", "auc benign vs FTC, own net"} <= set(report["arms"]["mixup"])
    own = read_json(tmp_path / "scores" / "mixup-taskFTC-seed0.json")
    assert own["classes"] == ["benign", "FTC"] and set(own["test"]["label"]) == {"benign", "FTC"}
    scores = {arm: read_json(tmp_path / "scores" / f"{arm}-seed0.json")["test"]["probabilities"] for arm in arms}
    assert len({str(p) for p in scores.values()}) == len(arms)  # every arm does something


def test_folds_test_every_patient_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.json"
    classify.main(arguments(folders, output, "--arms", "oversampling", "--folds", "3"))
    parts = [read_json(tmp_path / "scores" / f"oversampling-fold{fold}-seed0.json") for fold in range(3)]
    tested = [name for part in parts for name in part["test"]["file_name"]]
    assert sorted(tested) == sorted(row.file_name for row in manifest.read(folders["real"]).rows)
    for part in parts:
        assert not set(part["test"]["patient_id"]) & set(part["valid"]["patient_id"])
    report = json.loads(output.read_text())
    total = {"benign": 36, "PTC": 28, "FTC": 20}
    assert report["n"]["test"] == total
    looked_at = [label for part in parts for split in ("valid", "test") for label in part[split]["label"]]
    assert report["n"]["train"] == {label: round(n - looked_at.count(label) / 3) for label, n in total.items()}
    per_fold = [
        figures.figures_of(figures.read_run(part), "benign", np.ones((1, len(part["test"]["label"]))), None)
        for part in parts
    ]
    expected = np.mean([found["auc benign vs FTC"][0] for found in per_fold])
    assert report["arms"]["oversampling"]["auc benign vs FTC"]["value"] == pytest.approx(expected)

    looks = ["--arms", "tiger_f", "--folds", "3", "--realism_steps", "1"]
    unknown = spoil(folders["fake"], tmp_path / "unknown", lambda row: replace(row, derived_from=()))
    measure, seen = realism.measure, []

    def watched(real: manifest.Manifest, fake: manifest.Manifest, kept_out: list[Row], *more):
        seen.append({row.file_name for row in kept_out})
        return measure(real, fake, kept_out, *more)

    monkeypatch.setattr(realism, "measure", watched)
    classify.main(arguments(folders | {"fake": unknown}, output, *looks))
    found = json.loads(output.read_text())["real_vs_synthetic"]["tiger_f"]
    of_folds = [read_json(tmp_path / "scores" / f"real_vs_tiger_f-fold{fold}.json")["result"] for fold in range(3)]
    assert seen == [{*part["valid"]["file_name"], *part["test"]["file_name"]} for part in parts]
    assert found["folds"] == of_folds
    assert found["auc"] == pytest.approx(np.mean([one["auc"] for one in of_folds]))
    assert found["n_test"] == sum(one["n_test"] for one in of_folds)
    with pytest.raises(InputError, match="rows derived from valid or test images"):  # the generator has seen them
        classify.main(arguments(folders, output, "--folds", "3"))


def test_folds_that_test_a_patient_twice_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = manifest.read(folders["real"]).rows
    for fold in range(2):
        manifest.write(folders["real"] / f"fold{fold}.jsonl", rows)
    given = arguments(folders | {"real": folders["real"] / "fold{fold}.jsonl"}, tmp_path / "r.json", "--folds", "2")
    with pytest.raises(InputError, match="fold1.jsonl: patients in the test of fold 1 and of fold 0 too: P-test-FTC-0"):
        classify.main([*given, "--arms", "oversampling", "--dry_run"])


def test_amounts_and_shares_of_the_real(folders: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    given = arguments(folders, output, "--no_realism", "--arms", "oversampling", "tiger_f", "--amounts", "2,4")
    classify.main([*given, "--real_share", "0.5,1"])
    report = json.loads(output.read_text())
    said = report["unchecked"][-1]  # the generator saw what it saw
    assert said.startswith("--real_share 0.5 leaves out") and "the generators of tiger_f may have seen them" in said
    arms = ["oversampling", "tiger_f, 2 a class", "tiger_f, 4 a class"]
    assert list(report["arms"]) == [f"{arm}, 0.5 of the real" for arm in arms] + arms
    assert report["arms"]["oversampling, 0.5 of the real"]["real"] == {"benign": 10, "PTC": 6, "FTC": 2}
    with open(tmp_path / "report_scores.csv", encoding="utf-8") as file:
        nets = {(row["arm"], row["model"], row["image_size"], row["real_images"]) for row in csv.DictReader(file)}
    half = {(f"{arm}, 0.5 of the real", "resnet18", "32", "18") for arm in arms}
    assert nets == half | {(arm, "resnet18", "32", "36") for arm in arms}
    assert "10 degrees of freedom, as many as groups" in report["hosmer_lemeshow"]
    pairs = {(one["arm"], one["against"]) for one in report["comparisons"]}
    assert pairs == {(f"{arm}{of}", f"oversampling{of}") for arm in arms[1:] for of in (", 0.5 of the real", "")}
    with pytest.raises(InputError, match="arm tiger_f: 8 images of class benign, and --amounts asks for 9"):
        classify.main(arguments(folders, tmp_path / "r.json", "--amounts", "9", "--dry_run"))


def test_a_net_of_its_own_needs_images_of_its_classes_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = manifest.read(folders["fake"]).rows
    manifest.write(folders["fake"] / "no_ptc.jsonl", [row for row in rows if row.label != "PTC"])
    given = arguments(folders | {"fake": folders["fake"] / "no_ptc.jsonl"}, tmp_path / "r.json", "--arms", "tiger_f")
    given += ["--amounts", "8", "--no_realism"]
    with pytest.raises(InputError, match="arm tiger_f: 0 images of class PTC, and --amounts asks for 8"):
        classify.main([*given, "--dry_run"])
    classify.main([*given, "--tasks", "FTC"])
    entry = read_json(tmp_path / "r.json")["arms"]["tiger_f, 8 a class"]
    assert entry["added"] == {"benign": 8, "FTC": 8} and entry["real"] == {"benign": 20, "FTC": 4}


def test_scores_of_other_patients_are_not_reused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Intervals are over the patients that scores are saved with."""
    real = tmp_path / "real"
    shutil.copytree(folders["real"], real)
    given = arguments(folders | {"real": real}, tmp_path / "r.json", "--arms", "oversampling")
    classify.main(given)
    rows = manifest.read(real).rows
    manifest.write(real / "metadata.jsonl", [replace(row, patient_id=row.file_name) for row in rows])
    with pytest.raises(
        InputError, match="seed0.json was made with other settings: images of valid had other names or p"
    ):
        classify.main(given)


def test_what_amounts_and_shares_leave(folders: dict[str, Path]) -> None:
    real, fake, extra = (manifest.read(folders[name]) for name in ("real", "fake", "extra"))
    data = load(Sources(real, {"tiger_f": fake}, extra), classes_of(real, CLASSES), 32)

    def left(**given) -> dict[str, list[int]]:
        keep = kept(Trial("all", **{"arm": "tiger_f", "seed": 0} | given), data, data.classes)
        return {
            name: np.bincount(data.y[keep & (data.origin == name)], minlength=3).tolist()
            for name in ("real", "tiger_f", "extra_real")
        }

    assert left() == {"real": [20, 12, 4], "tiger_f": [8, 8, 8], "extra_real": [12, 12, 12]}
    assert left(arm="real_upper")["extra_real"] == [8, 8, 8]  # equally many
    assert left(arm="real_upper", amount=5)["extra_real"] == [5, 5, 5]
    with pytest.raises(InputError, match="arm real_upper: 12 images of class benign, and --amounts asks for 13"):
        left(arm="real_upper", amount=13)
    assert left(amount=3)["tiger_f"] == [3, 3, 3]
    assert left(real_share=0.5)["real"] == [10, 6, 2]
    half = kept(Trial("all", "oversampling", 0, real_share=0.5), data, data.classes) & (data.origin == "real")
    assert not set(data.patients[half]) & set(data.patients[~half & (data.origin == "real")])  # whole patients
    two, four, other = (
        kept(Trial("all", "tiger_f", seed, amount=amount), data, data.classes)
        for seed, amount in ((0, 2), (0, 4), (1, 2))
    )
    assert not (two & ~four).any() and (two != other).any()
    alone = load(Sources(real, {"sd": extra, "tiger_f": fake}, None), data.classes, 32)  # beside other sets
    again = kept(Trial("all", "tiger_f", 0, amount=2), alone, alone.classes)

    def of_tiger(data: Data, keep: np.ndarray) -> set[bytes]:
        return {data.keys[i] for i in np.flatnonzero(keep & (data.origin == "tiger_f"))}

    assert len(of_tiger(data, two)) == 6 and of_tiger(data, two) == of_tiger(alone, again)
    keys = [bytes([i % 3]) if data.origin[i] == "tiger_f" else key for i, key in enumerate(data.keys)]
    copies = replace(data, keys=keys)
    four, six = (kept(Trial("all", "tiger_f", 0, amount=amount), copies, data.classes) for amount in (4, 6))
    assert np.bincount(data.y[six & (data.origin == "tiger_f")]).tolist() == [6, 6, 6]  # copies count
    assert not (four & ~six).any()


def test_unequal_numbers_are_said(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = manifest.read(folders["fake"]).rows
    few = folders["fake"] / "few.jsonl"
    manifest.write(few, rows[1:])
    sets = arguments(folders | {"fake": f"tiger_f={folders['fake']}"}, tmp_path / "r.json", "--dry_run")
    place = sets.index("--output")
    given = [*sets[:place], f"sd={few}", *sets[place:]]
    classify.main([*given, "--extra_real", str(folders["extra"])])
    warning = "arms add different numbers of images, see --amounts: tiger_f benign 8, PTC 8, FTC 8; sd benign 7, PTC 8"
    assert warning in capsys.readouterr().err
    classify.main([*given, "--amounts", "7"])
    classify.main([*sets, "--extra_real", str(folders["extra"])])
    assert "different numbers" not in capsys.readouterr().err


def test_the_share_is_chosen_on_valid(folders: dict[str, Path], tmp_path: Path, trained: list[str]) -> None:
    given = arguments(folders, tmp_path / "report.json", "--no_realism", "--arms", "oversampling", "tiger_f")
    classify.main([*given, "--share", "auto"])
    assert trained == ["oversampling-seed0", *len(SHARES) * ["tiger_f-seed0"]]
    found = read_json(tmp_path / "scores" / "tiger_f-seed0.json")
    of_shares = found["valid_macro_auc_of_shares"]
    assert found["share"] == float(max(of_shares, key=of_shares.__getitem__))
    assert found["valid_macro_auc"] == max(of_shares.values())

    trained.clear()
    for split, tasks in (("valid", ["FTC"]), ("train", ["all"])):  # valid without FTC, and no valid
        rows = [
            replace(row, split="train") if row.split == "valid" and (row.label == "FTC" or split == "train") else row
            for row in manifest.read(folders["real"]).rows
        ]
        real = folders["real"] / f"no_{split}.jsonl"
        manifest.write(real, rows)
        other = arguments(folders | {"real": real}, tmp_path / "other" / "r.json", "--share", "auto", "--tasks", *tasks)
        with pytest.raises(InputError, match="--share auto: split 'valid' has fewer than two of benign, .*FTC"):
            classify.main(other)
    assert trained == []


def test_all_folds_are_checked_before_the_first_training(
    folders: dict[str, Path], tmp_path: Path, trained: list[str]
) -> None:
    given = arguments(folders, tmp_path / "report.json", "--arms", "oversampling", "--folds", "3")
    last = tmp_path / "scores" / "oversampling-fold2-seed0.json"
    write_json(last, {"settings": {"image_size": 16}})
    with pytest.raises(InputError, match="oversampling-fold2-seed0.json was made with other settings"):
        classify.main(given)
    source = manifest.read(folders["real"]).rows[0].file_name
    alike = spoil(folders["fake"], tmp_path / "alike", lambda row: replace(row, derived_from=(source,)))
    with pytest.raises(InputError, match="too few synthetic images share a class with held-out ones"):
        classify.main(arguments(folders | {"fake": alike}, tmp_path / "r.json"))
    assert trained == []


def test_images_of_the_classes_of_a_task_suffice(folders: dict[str, Path], tmp_path: Path) -> None:
    fake = folders["fake"] / "two_classes.jsonl"
    manifest.write(fake, [row for row in manifest.read(folders["fake"]).rows if row.label != "PTC"])
    output = tmp_path / "report.json"
    given = arguments(folders | {"fake": fake}, output, "--tasks", "FTC", "--arms", "tiger_f", "--realism_steps", "20")
    classify.main(given)
    assert "PTC" not in json.loads(output.read_text())["real_vs_synthetic"]["tiger_f"]["text"]


def test_small_probabilities_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.array([[1.25e-9, 3.75e-9, 1 - 5e-9]])
    monkeypatch.setattr(classifier, "predict", lambda net, images: p)
    held = Held(np.zeros((1, 4, 4), np.uint8), np.array([0]), np.array(["a"]), np.array(["P"]))
    saved = runs.scored(torch.nn.Identity(), held, list(CLASSES))["probabilities"]
    np.testing.assert_allclose(saved, p, rtol=1e-6)


def test_what_is_named_twice_is_done_once(folders: dict[str, Path], tmp_path: Path) -> None:
    twice = ["--arms", "none", "oversampling", "none", "--tasks", "FTC", "all", "FTC", "--rare", "FTC", "FTC"]
    args = classify.parse(arguments(folders, tmp_path / "r.json", *twice))
    assert (args.arms, args.tasks, args.rare) == (["none", "oversampling"], ["FTC", "all"], ["FTC"])


@pytest.mark.parametrize(("policy", "parts"), [("pretrain", 2), ("pooled", 1), ("rare", 1)])
def test_policies_train(folders: dict[str, Path], tmp_path: Path, trained: list[str], policy: str, parts: int) -> None:
    output = tmp_path / "report.json"
    classify.main(arguments(folders, output, "--arms", "tiger_f", "--policy", policy))
    assert len(trained) == parts + 1
    report = json.loads(output.read_text())
    assert report["settings"]["rare"] == ["FTC"]
    assert "tiger_f" in report["real_vs_synthetic"]["tiger_f"]["text"]


def test_a_saved_classifier_is_an_extractor(folders: dict[str, Path], tmp_path: Path, trained: list[str]) -> None:
    given = arguments(folders, tmp_path / "report.json", "--arms", "oversampling")
    classify.main(given)
    classify.main([*given, "--save_models"])
    classify.main([*given, "--save_models"])
    assert trained == 2 * ["oversampling-seed0"]
    folder = tmp_path / "models" / "oversampling-seed0"
    extractor = features.load_extractor(str(folder))
    assert "32 px" in extractor.name
    rows = manifest.read(folders["real"]).select(split="test")
    probabilities = features.probabilities(extractor(list(load_images(rows, 32))), extractor.head)
    saved = read_json(tmp_path / "scores" / "oversampling-seed0.json")["test"]["probabilities"]
    np.testing.assert_allclose(probabilities, saved, atol=1e-4)
    weights = str(folder / "model.safetensors")
    classify.main(arguments(folders, tmp_path / "more" / "r.json", "--arms", "none", "--weights", weights))
    *_, unknown = read_json(tmp_path / "more" / "r.json")["unchecked"]
    assert unknown.startswith(f"what {weights} was trained on is not known")


def test_bf16_is_for_the_training_alone() -> None:
    net, outputs = torch.nn.Linear(3, 1), []

    def loss(rows: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        outputs.append(net(torch.ones(2, 3, device=training.device())))
        return outputs[-1].float().square().mean()

    net.to(training.device())
    for bf16 in (False, True):
        options = {"steps": 1, "learning_rate": 1e-2, "seed": 0, "description": "test", "bf16": bf16}
        training.fit(net, loss, lambda rng: np.arange(2), **options)
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16]
    assert net.weight.dtype == torch.float32
    if training.device().type == "cpu":
        with pytest.raises(InputError, match="--bf16: there is no GPU here"):
            classifier.Recipe(bf16=True)
    assert "bf16" not in classifier.Recipe().settings()  # scores of older code stay valid


def test_a_classifier_learns_and_keeps_its_best_state(folders: dict[str, Path]) -> None:
    recipe = classifier.Recipe(model="resnet18", max_train_steps=24, train_batch_size=12, validations=4)
    real = manifest.read(folders["real"])
    images = {split: load_images(real.select(split=split), 32) for split in ("train", "test")}
    y = {s: np.array([CLASSES.index(str(row.label)) for row in real.select(split=s).rows]) for s in images}
    data = images["train"], y["train"]
    test = images["test"], y["test"]
    net, notes = classifier.train(
        recipe, *data, lambda rng: rng.integers(36, size=12), test, classes=3, seed=0, description="test"
    )
    assert classifier.macro_auc(y["test"], classifier.predict(net, images["test"])) == notes["valid_macro_auc"] > 0.75


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    net = torch.nn.Linear(1, 1)

    def loss(rows: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        return net(torch.full((1, 1), torch.inf)).sum()

    options = {"steps": 30, "learning_rate": 1e-2, "seed": 0, "description": "tiger_f-seed0"}
    with pytest.raises(WorkFailed, match="tiger_f-seed0: the loss is .* at step 10; lower the learning rate"):
        training.fit(net, loss, lambda rng: np.arange(2), **options)


def test_the_state_is_selected_on_valid(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest.read(folders["real"]).select(split="valid")
    valid = load_images(rows, 32), np.array([CLASSES.index(str(row.label)) for row in rows.rows])
    looks: list[tuple[float, np.ndarray]] = []

    def scripted(y: np.ndarray, p: np.ndarray) -> float:
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


def test_what_cannot_be_checked_is_said(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Images that do not say what drew them, and those drawn after another copy of the data set, of other names."""
    classify.main(arguments(folders, tmp_path / "r.json", "--dry_run"))
    told = capsys.readouterr().err
    assert "so not checked" not in told
    nameless = (
        "24 rows do not say which model made them, so nothing is known of what it was trained on: images/S0000.png"
    )
    assert f"warning: {folders['fake'] / 'metadata.jsonl'}: {nameless}" in told
    fake = spoil(
        folders["fake"], tmp_path / "other", lambda row: replace(row, derived_from=(f"shard-0.tar/{row.file_name}",))
    )
    classify.main(arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run"))
    assert "so not checked: images/" in capsys.readouterr().err


@pytest.mark.parametrize("every", [True, False])
def test_rows_without_a_patient_are_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], every: bool
) -> None:
    """Of one file where some rows lack it, of two where all do: the real ones and the further real ones."""

    def nameless(row: Row) -> Row:
        return replace(row, patient_id=None) if every or row.file_name == "images/P0002.png" else row

    real, extra = (spoil(folders[name], tmp_path / "nameless", nameless) for name in ("real", "extra"))
    classify.main(arguments(folders | {"real": real}, tmp_path / "r.json", "--extra_real", str(extra), "--dry_run"))
    told = capsys.readouterr().err
    assert f"{real}: {'84 of 84' if every else '1 of 84'} rows have no patient_id: images/P000" in told
    assert (f"{extra}: 36 of 36 rows have no patient_id" in told) == every
    assert "counts as a patient of its own" in told and "intervals may be too narrow; fill the column in" in told
    assert len(leakage.refuse_leakage(manifest.read(real), []).unchecked) == 1
    assert leakage.refuse_leakage(manifest.read(folders["real"]), []).unchecked == []


def test_a_generator_of_older_code_whose_data_are_gone_is_said(
    folders: dict[str, Path], tmp_path: Path, capsys
) -> None:
    model = tmp_path / "coarse"
    model.mkdir()
    (model / "config.yaml").write_text("data_dir: gone\npretrained_model: base\n")
    fake = spoil(folders["fake"], tmp_path / "older", lambda row: replace(row, model=f"{model}@0"))
    classify.main(arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run"))
    told = capsys.readouterr().err
    assert f"what {model} was trained on is not checked: it did not note its files" in told
    assert f"what base was trained on is not checked: it is not here (no {Path.cwd() / 'base' / 'config.yaml'})" in told
    assert "which model made them" not in told


def test_a_model_that_was_trained_anew_since_is_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generator itself, or the model that it started from."""
    model, base = tmp_path / "finetune", tmp_path / "pretrain"
    for folder, more in ((base, ""), (model, f"pretrained_model: {base}\n")):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_text("first")
        (folder / "config.yaml").write_text(f"data_dir: {folders['real']}\n{more}")
    write_json(model / "inputs.json", {"base": model_fingerprint(base)})
    made_by = f"{model}@{model_fingerprint(model)}"
    fake = spoil(folders["fake"], tmp_path / "earlier", lambda row: replace(row, model=made_by))
    given = arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run")
    classify.main(given)
    assert "another model" not in capsys.readouterr().err
    for folder in (base, model):
        (folder / "unet" / "weights").write_text("again")
        classify.main(given)
        assert f"{folder} holds another model by now than" in capsys.readouterr().err
        (folder / "unet" / "weights").write_text("first")


@pytest.mark.parametrize("how", ["same", "copied", "base"])
def test_a_generator_that_saw_test_rows_is_refused(folders: dict[str, Path], tmp_path: Path, how: str) -> None:
    """Its config.yaml names what it was trained on, or that of the model it started from does."""
    data = folders["real"]
    if how == "copied":  # another set with the same pictures under other names
        data = tmp_path / "copied"
        shutil.copytree(folders["real"], data)
        rows = manifest.read(data).rows
        for row in rows:
            (data / row.file_name).rename(data / f"images/x{Path(row.file_name).name}")
        renamed = [
            replace(r, file_name=f"images/x{Path(r.file_name).name}", patient_id=f"x{r.patient_id}") for r in rows
        ]
        manifest.write(data / "metadata.jsonl", renamed)
    model, base = tmp_path / "finetune", tmp_path / "pretrain"
    for folder, split in ((model, "train"), (base, "test")):
        folder.mkdir()
        split = "train" if how == "base" and folder == model else "test"
        text = f"data_dir: {data}\nsplit: {split}\npretrained_model: {base}\nknowledge: thyroid\n"
        (folder / "config.yaml").write_text(text)
    fake = spoil(folders["fake"], tmp_path / how, lambda row: replace(row, model=f"{model}@0123456789ab"))
    with pytest.raises(InputError, match=r"generator .*finetune was trained on patients of valid or test: images/x?P"):
        classify.main(arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run"))
    for folder in (model, base):
        text = (folder / "config.yaml").read_text().replace("split: test", "split: train")
        (folder / "config.yaml").write_text(text)
    classify.main(arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run"))


def test_relative_paths_are_those_of_the_run_that_holds_them(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another checkout, in which the command runs, has a model of the same path, and that has seen no test image."""
    for place, split in (("theirs", "test"), ("ours", "train")):
        model = tmp_path / place / "runs" / "finetune"
        model.mkdir(parents=True)
        shutil.copytree(folders["real"], tmp_path / place / "runs" / "data")
        (model / "config.yaml").write_text(f"data_dir: runs/data\nsplit: {split}\npretrained_model: base\n")
    fake = tmp_path / "theirs" / "runs" / "generated"
    shutil.copytree(folders["fake"], fake)
    rows = manifest.read(fake).rows
    manifest.write(fake / "metadata.jsonl", [replace(row, model="runs/finetune@0123456789ab") for row in rows])
    monkeypatch.chdir(tmp_path / "ours")
    given = arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run")
    with pytest.raises(InputError, match="theirs/runs/finetune was trained on patients of valid or test: images/P"):
        classify.main(given)
    nearer = tmp_path / "theirs" / "runs" / "runs" / "finetune"  # of another run, which began in that folder
    shutil.copytree(tmp_path / "ours" / "runs" / "finetune", nearer)
    monkeypatch.chdir(tmp_path / "theirs")
    with pytest.raises(InputError, match="theirs/runs/finetune was trained on patients of valid or test: images/P"):
        classify.main(given)
    monkeypatch.chdir(tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs" / "runs" / "finetune")
    shutil.rmtree(nearer)
    shutil.rmtree(tmp_path / "ours" / "runs" / "finetune")
    classify.main(given)
    missing = tmp_path / "ours" / "runs" / "finetune" / "config.yaml"
    assert f"what runs/finetune was trained on is not checked: it is not here (no {missing})" in capsys.readouterr().err


def test_what_a_generator_was_trained_on_outlives_a_new_split(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training notes its files; afterwards the splits change in place, or the images move to another folder."""
    real, model = tmp_path / "real", tmp_path / "coarse"
    shutil.copytree(folders["real"], real)
    base = save_base(tmp_path / "base")
    pretrain.main(flags(pretrained_model=base, data_dir=real, output_dir=model, max_train_steps=1))
    noted = read_json(model / "inputs.json")["files"]
    rows = manifest.read(real).rows
    assert list(noted) == [row.file_name for row in rows if row.split == "train"]
    assert read_json(model / "inputs.json")["base"] == model_fingerprint(base)
    fake = spoil(
        folders["fake"], tmp_path / "coarse_set", lambda row: replace(row, model=f"{model}@0", derived_from=())
    )
    given = arguments(folders | {"real": real, "fake": fake}, tmp_path / "r.json", "--dry_run")
    classify.main(given)
    moved = rows[0].patient_id
    again = [replace(row, split="test" if row.patient_id == moved else row.split) for row in rows]
    manifest.write(real / "metadata.jsonl", again)
    names = ", ".join(row.file_name for row in rows if row.patient_id == moved)
    refused = f"coarse was trained on patients of valid or test: {names}$"
    with pytest.raises(InputError, match=refused):
        classify.main(given)
    saved = {path: path.read_bytes() for path in (real / row.file_name for row in rows if row.patient_id == moved)}
    for path in saved:
        Image.open(path).save(path, compress_level=0)  # other bytes under the old name
    with pytest.raises(InputError, match=refused):
        classify.main(given)
    for path, content in saved.items():
        path.write_bytes(content)
    renamed = [replace(row, file_name=f"images/x{Path(row.file_name).name}") for row in again]
    for old, new in zip(again, renamed, strict=True):
        (real / old.file_name).rename(real / new.file_name)
    manifest.write(real / "metadata.jsonl", renamed)
    with pytest.raises(InputError, match="coarse was trained on patients of valid or test: images/xP0000.png"):
        classify.main(given)
    shutil.rmtree(model)
    capsys.readouterr()
    classify.main(given)
    assert f"what {model} was trained on is not checked: it is not here" in capsys.readouterr().err


def test_patients_of_another_copy_of_the_data_are_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other pixels under another root: only the names of patients tell, and they may be others' names too."""
    copy, model = tmp_path / "copy", tmp_path / "coarse"
    shutil.copytree(folders["real"], copy)
    model.mkdir()
    (model / "config.yaml").write_text(f"data_dir: {copy}\nsplit: test\n")
    for path in (copy / "images").glob("*.png"):
        with Image.open(path) as image:
            smaller = image.resize((40, 40))
        smaller.save(path)
    fake = spoil(folders["fake"], tmp_path / "set", lambda row: replace(row, model=f"{model}@0", derived_from=()))
    given = arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run")
    classify.main(given)
    told = capsys.readouterr().err
    assert f"{model} was trained on {copy / 'metadata.jsonl'}, which names" in told
    assert "patients as valid or test of" in told and "where they are the same, it has seen held-out patients" in told
    (model / "config.yaml").write_text(f"data_dir: {copy}\nsplit: train\n")
    classify.main(given)
    assert "held-out patients" not in capsys.readouterr().err
    write_json(model / "inputs.json", {"files": {"images/a.png": "0", "images/b.png": "1"}})
    shutil.rmtree(copy)
    classify.main(given)
    told = capsys.readouterr().err
    assert f"{model} was trained on 2 images, of which 2 are not among" in told
    assert "not in its data set any more as they were: not checked: images/a.png, images/b.png" in told
    names = [row.file_name for row in manifest.read(folders["real"]).select(split="train").rows[:3]]
    seen = {name: content_hash(folders["real"] / name) for name in names}
    write_json(model / "inputs.json", {"files": seen | {"images/a.png": "0"}})
    classify.main(given)  # it has seen one more than are found
    assert "trained on 4 images, of which 1 are not among" in capsys.readouterr().err
    (model / "config.yaml").write_text(f"data_dir: {folders['real']}\nsplit: train\n")
    classify.main(given)  # nor does a data set tell that is here, and has it no more
    assert "of which 1 are not among" in capsys.readouterr().err
    write_json(model / "inputs.json", {"files": seen})
    classify.main(given)
    assert "was trained on" not in capsys.readouterr().err


def test_a_copy_of_a_test_image_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = write_dataset(tmp_path, {"train": dict.fromkeys(CLASSES, 8)}, seed=3, prefix="E")
    test_image = (folders["real"] / "images" / "P0055.png").read_bytes()
    (tmp_path / extra.rows[1].file_name).write_bytes(test_image)
    with pytest.raises(InputError, match="also in valid of .*: images/E0001.png = images/P0055.png"):
        classify.main(arguments(folders, tmp_path / "r.json", "--extra_real", str(tmp_path), "--dry_run"))
    with pytest.raises(InputError, match="also in train of .*: images/P0000.png = images/P0000.png"):
        classify.main(arguments(folders, tmp_path / "r.json", "--extra_real", str(folders["real"]), "--dry_run"))
    for copy in ("P0000", "P0055"):  # of train, of valid
        real = tmp_path / copy
        shutil.copytree(folders["real"], real)
        (real / "images" / f"{copy}.png").write_bytes((real / "images" / "P0070.png").read_bytes())
        with pytest.raises(InputError, match=f"also in test of .*: images/{copy}.png = images/P0070.png"):
            classify.main(arguments(folders | {"real": real}, tmp_path / "r.json", "--dry_run"))


@pytest.mark.parametrize(("gain", "offset", "mirrored"), [(1, 1, False), (0.8, 20, False), (1, 2, True)])
def test_a_synthetic_image_that_shows_a_held_out_one_is_refused(
    folders: dict[str, Path], tmp_path: Path, gain: float, offset: int, mirrored: bool
) -> None:
    fake = tmp_path / "fake"
    shutil.copytree(folders["fake"], fake)
    for row, copied in zip(manifest.read(fake).rows[3:5], ("P0055", "P0070"), strict=True):  # of valid, of test
        with Image.open(folders["real"] / "images" / f"{copied}.png") as image:
            near = image.point(lambda level: gain * level + offset)
            (ImageOps.mirror(near) if mirrored else near).save(fake / row.file_name)
    given = arguments(folders | {"fake": fake}, tmp_path / "r.json", "--dry_run")
    with pytest.raises(
        InputError, match="show the same picture as one in valid of .*: images/S0003.png = images/P0055"
    ):
        classify.main(given)
    manifest.write(fake / "metadata.jsonl", [row for i, row in enumerate(manifest.read(fake).rows) if i != 3])
    with pytest.raises(InputError, match="show the same picture as one in test of .*: images/S0004.png = images/P0070"):
        classify.main(given)
    manifest.write(fake / "metadata.jsonl", [row for i, row in enumerate(manifest.read(fake).rows) if i != 3])
    classify.main(given)


@pytest.mark.parametrize(("copied", "of"), [("real/images/P0000", "P0070"), ("real/images/P0055", "P0070")])
def test_a_real_image_that_shows_a_held_out_one_is_refused(
    folders: dict[str, Path], tmp_path: Path, copied: str, of: str
) -> None:
    """In train and in valid, which are of other patients than test."""
    shutil.copytree(folders["real"], tmp_path / "real")
    with Image.open(folders["real"] / "images" / f"{of}.png") as image:
        image.point(lambda level: level + 2).save(tmp_path / f"{copied}.png")
    message = f"show the same picture as one in test of .*: images/{Path(copied).name}.png = images/{of}.png; drop"
    with pytest.raises(InputError, match=message):
        classify.main(arguments(folders | {"real": tmp_path / "real"}, tmp_path / "r.json", "--dry_run"))


def test_a_further_real_image_that_shows_a_held_out_one_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["extra"], tmp_path / "extra")
    with Image.open(folders["real"] / "images" / "P0055.png") as image:
        image.point(lambda level: level + 2).save(tmp_path / "extra" / "images" / "E0001.png")
    given = arguments(folders, tmp_path / "r.json", "--extra_real", str(tmp_path / "extra"), "--dry_run")
    with pytest.raises(
        InputError, match="show the same picture as one in valid of .*: images/E0001.png = images/P0055"
    ):
        classify.main(given)


def test_real_images_of_different_patients_are_not_taken_for_one() -> None:
    """Nor are their mirror images: 256 breast sonograms, a patient each."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "BrEaST"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    paths = sorted(path for path in folder.glob("*/*.png") if "_" not in path.stem)  # no masks
    images = np.stack([read_gray(path, 64) for path in paths])
    rows = [Row(path.name, "", "", split="test") for path in paths]
    training, kept_out = (manifest.Manifest(folder, tuple(part)) for part in (rows[:128], rows[128:]))
    known = leakage.looks_of(leakage.with_mirrored(images[128:]))
    leakage.refuse_near_copies(training, leakage.looks_of(images[:128]), kept_out, known)


def test_a_hash_alone_makes_no_copy(folders: dict[str, Path]) -> None:
    """Hashes of different phantoms, and of different patients' chest x-rays, can be a few bits apart."""
    fake, real = (manifest.read(folders[name]).select(split="train") for name in ("fake", "real"))
    looks = np.zeros(2, np.uint64), np.random.default_rng(0).integers(0, 256, (2, 32, 32), np.uint8)
    leakage.refuse_near_copies(fake, looks, real, (looks[0][:1], looks[1][:1] // 2 + looks[1][1:] // 2))
    with pytest.raises(InputError, match="picture as one in train of .*: images/S0001.png = images/P0000.png; drop"):
        leakage.refuse_near_copies(fake, looks, real, (looks[0][:1], looks[1][1:]))


@pytest.mark.timeout(20)  # a second; to compare them with each other takes minutes and gigabytes
def test_a_generator_that_repeats_itself_is_compared_with_held_out_images_alone(folders: dict[str, Path]) -> None:
    fake, real = (manifest.read(folders[name]).select(split="train") for name in ("fake", "real"))
    looks = np.zeros(20_000, np.uint64), np.zeros((20_000, 32, 32), np.uint8)
    other = np.array([2**64 - 1], np.uint64), np.zeros((1, 32, 32), np.uint8)
    leakage.refuse_near_copies(fake, looks, real, other)


def test_a_synthetic_set_may_have_the_name_of_a_split(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its images are still looked for among those of valid and test, and not those of the split among themselves."""
    for name in ("valid", "test"):
        named = [f"--fake={name}={folders['fake']}", "--arms", name, "--dry_run"]
        classify.main(arguments(folders, tmp_path / "r.json", *named))
    fake = tmp_path / "fake"
    shutil.copytree(folders["fake"], fake)
    row = manifest.read(fake).rows[0]
    shutil.copy(folders["real"] / "images" / "P0070.png", fake / row.file_name)
    with pytest.raises(InputError, match=f"{row.file_name} = images/P0070.png"):
        classify.main(arguments(folders, tmp_path / "r.json", f"--fake=test={fake}", "--arms", "test", "--dry_run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "real_upper"], "arm real_upper: needs further real images"),
        (["--arms", "sd"], "--arms sd: no such arm; there are none, oversampling, basic"),
        (["--fake", "real_a=fake"], "--fake real_a=fake: the name 'real_a' is taken; write NAME=PATH with another"),
        (["--share", "1.5"], "--share 1.5: must be"),
        (["--weights", "no.pth"], "no.pth: no such file"),
        (["--tasks", "MTC"], "--tasks MTC against --negative benign: must be two of benign, PTC, FTC"),
        (["--rare", "MTC"], "--rare MTC: no such class"),
        (["--negative", "MTC"], "--negative MTC: no such class"),
        (["--policy", "rare", "--tasks", "PTC"], "--policy rare: none of benign, PTC is rare"),
        (["--amounts", "0"], "--amounts [0]: must be 1 or more"),
        (["--max_train_steps", "0"], "--max_train_steps 0: must be 1 or more"),
        (["--resamples", "-1"], "--resamples -1: must be 2 or more"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a number above 0"),
        (["--seeds", "-1"], "--seeds [-1]: must be 0 or more"),
        (["--real_share", "0"], "--real_share [0.0]: must be above 0"),
        (["--shard", "2/2"], "--shard '2/2': write k/n"),
        (["--folds", "2"], "--folds 2: must be from 3"),
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
    for recipe in (classifier.Recipe(model="resnet34", weights=str(tmp_path / "resnet18.pth")),):
        with pytest.raises(InputError, match="resnet18.pth: not a resnet34"):
            classifier.build(recipe, classes=4)


@pytest.mark.parametrize(
    ("interval", "shares", "said"),
    [
        ((0.52, 0.47, 0.58), (0.25, 0.25), "AUC of 0.520, its interval below 0.6: looks tell a net of 9 steps little."),
        ((0.564, 0.44, 0.65), (0.25, 0.25), "0.564 [0.440, 0.650]: that looks tell little is not shown. Synthetic"),
        ((0.564, 0.44, 0.65), (0.25, 0.5), "little is not shown, and they are not equally frequent"),
        ((0.72, np.nan, np.nan), (0.25, 0.25), "that looks tell little is not shown. Synthetic"),
        ((0.97, 0.95, 0.98), (0.25, 0.25), "AUC of 0.970, far from 0.5. Synthetic images are as frequent in every"),
        ((0.97, 0.95, 0.98), (0.25, 0.5), "AUC of 0.970, far from 0.5, and they are not equally frequent"),
    ],
)
def test_looks_are_judged_by_the_interval(
    monkeypatch: pytest.MonkeyPatch, interval: tuple[float, ...], shares: tuple[float, ...], said: str
) -> None:
    monkeypatch.setattr(sources, "synthetic_shares", lambda *of: shares)
    plan = SimpleNamespace(phases=[[]], y=np.zeros(0), labels=["benign", "FTC"])
    study, data = SimpleNamespace(plans=lambda trial, data: [plan], policy="share"), SimpleNamespace(origin=np.zeros(0))
    result = dict(zip(("auc", "low", "high"), interval, strict=True)) | {"max_train_steps": 9}
    assert said in sources.looks(Trial("all", "tiger_f", 0), result, cast(Any, study), cast(Any, data))


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
