"""A tiny CLIP learns where the disc is from texts, is stored as transformers has it, and judges images by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_samples import assert_leaks_are_refused, write_dataset

from eval import clip_train, features
from tiger import manifest
from tiger.errors import InputError, run

TINY = ["--resolution", "32", "--width", "48", "--train_batch_size", "16", "--learning_rate", "0.0003"]
COUNTS = {"train": {"benign": 80}, "test": {"benign": 40}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, data folder)"""
    folder = tmp_path_factory.mktemp("clip")
    data = write_dataset(folder / "data", COUNTS).root
    clip_train.main(
        ["train", "--data_dir", str(data), "--output_dir", str(folder / "model"), "--max_train_steps", "200", *TINY]
    )
    return folder / "model", data


def test_it_learns_and_judges(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = trained
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["command"].startswith("python -m eval.clip_train train --data_dir ")
    location = metrics["categories"]["location"]
    assert location["low"] > location["majority"]
    fake = write_dataset(tmp_path / "fake", {"train": {"benign": 30}}, seed=5, synthetic=True, prefix="S")
    rows = fake.path.read_text().splitlines()
    wrong = fake.path.with_name("wrong.jsonl")  # the same images, each with another's text and location
    said = [{key: json.loads(row)[key] for key in ("text_fg", "attributes")} for row in rows]
    wrong.write_text("\n".join(json.dumps(json.loads(r) | s) for r, s in zip(rows, said[1:] + said[:1], strict=True)))
    found = {}
    for name, path in (("right", fake.path), ("wrong", wrong)):
        output = tmp_path / f"{name}.json"
        given = ["--model", str(model), "--real", str(data), "--fake", str(path), "--output", str(output)]
        clip_train.main(["evaluate", *given])
        found[name] = json.loads(output.read_text())
    right, wrong_ones = found["right"]["synthetic"], found["wrong"]["synthetic"]
    assert right["agreement"]["low"] > 0.6 > wrong_ones["agreement"]["value"]
    for name, interval in right["categories"]["location"].items():  # the only category
        assert name not in right["agreement"] or right["agreement"][name] == pytest.approx(interval, abs=0.02)
    assert right["agreement_shuffled"] < 0.55
    assert found["right"]["able"] == ["location"]
    assert right["by_label"] == {"benign": right["agreement"]}
    assert right["clip_score"]["value"] > right["shuffled"]["value"]
    assert found["right"]["real"] == found["wrong"]["real"]
    assert found["right"]["real"]["n"] == right["n"] == 30  # of 40
    assert found["right"]["real"]["agreement"]["value"] == pytest.approx(metrics["agreement"]["value"], abs=0.1)
    assert found["right"]["resize"] == metrics["resize"] == features.RESIZE
    assert found["right"]["model_made_by"] == metrics["command"]


def test_what_is_stored_is_an_extractor_and_a_start(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = trained
    clip = clip_train.load_clip(model).eval()
    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32)).astype(np.uint8)
    with torch.inference_mode():
        np.testing.assert_allclose(
            features.load_extractor(str(model))(pictures), clip.embed_images(pictures).numpy(), atol=1e-5
        )
        alone, beside = (
            clip.embed_texts(["upper pole"]),
            clip.embed_texts(["upper pole", "a much longer text, of pole"]),
        )
    np.testing.assert_allclose(alone[0].numpy(), beside[0].numpy(), atol=1e-5)
    given = ["--data_dir", str(data), "--output_dir", str(tmp_path / "more"), "--train_batch_size", "8"]
    clip_train.main(["train", *given, "--pretrained_model", str(model), "--max_train_steps", "1"])
    again = clip_train.load_clip(tmp_path / "more")
    drift = max(float((a - b).detach().abs().max()) for a, b in zip(clip.parameters(), again.parameters(), strict=True))
    assert 0 < drift < 1e-3  # at the low rate of fine-tuning


def test_loss_counts_every_text_that_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(4, 4, generator=generator)
    own = torch.eye(4, dtype=torch.bool)
    clip_loss = torch.nn.functional.cross_entropy(similarity, torch.arange(4)) / 2
    clip_loss += torch.nn.functional.cross_entropy(similarity.T, torch.arange(4)) / 2
    assert clip_train.contrastive_loss(similarity, own).item() == pytest.approx(clip_loss.item(), rel=1e-6)
    fits = own.clone()
    fits[0, 1] = True  # text 1 is true of image 0 as well
    sure = torch.where(fits, 20.0, -20.0)
    # Only image 0 and text 1 have two partners, half each: ln 2 of entropy in two of the eight rows.
    assert clip_train.contrastive_loss(sure, fits).item() == pytest.approx(2 * np.log(2) / 8, rel=1e-3)


def test_phrases_are_drawn_in_order() -> None:
    phrases = clip_train.phrases_of("benign, solid , , upper pole")
    assert phrases == ["benign", "solid", "upper pole"]
    drawn = {tuple(clip_train.some(phrases, np.random.default_rng(seed))) for seed in range(60)}
    assert drawn == {
        ("benign",), ("solid",), ("upper pole",), ("benign", "solid"), ("benign", "upper pole"),
        ("solid", "upper pole"), ("benign", "solid", "upper pole"),
    }  # fmt: skip


def test_agreement_is_a_plain_mean_over_the_categories_that_are_stated() -> None:
    nan = np.nan
    assert clip_train.mean_share(np.array([[1, nan, 0], [0, nan, nan], [1, nan, nan], [0, nan, nan]])) == 0.25


def test_both_sides_have_the_same_classes(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = trained
    real = write_dataset(tmp_path / "real", {"test": {"benign": 9, "FTC": 3, "PTC": 4}}, seed=2)
    made = {"train": {"benign": 5, "FTC": 8, "MTC": 2}}
    fake = write_dataset(tmp_path / "fake", made, seed=3, synthetic=True, prefix="S")
    given = ["--model", str(model), "--fake", str(fake.root), "--output", str(tmp_path / "clip.json")]
    clip_train.main(["evaluate", *given, "--real", str(real.root)])
    report = json.loads((tmp_path / "clip.json").read_text())
    for side in ("synthetic", "real"):
        assert report[side]["n"] == 5 + 3
        assert set(report[side]["by_label"]) == {"benign", "FTC"}
    other = write_dataset(tmp_path / "other", {"test": {"PTC": 2}})
    with pytest.raises(InputError, match="no class in common with split 'test'"):
        clip_train.main(["evaluate", *given, "--real", str(other.root)])


def test_what_has_seen_the_test_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A generator, images drawn after test images, and the CLIP itself; of another's CLIP it is said."""
    model, data = trained
    fake = write_dataset(tmp_path / "fake", {"train": {"benign": 4}}, seed=5, synthetic=True, prefix="S")
    given = ["evaluate", "--fake", str(fake.root), "--output", str(tmp_path / "clip.json")]
    own = [*given, "--model", str(model), "--real", str(data)]
    clip_train.main(own)
    (unknown,) = json.loads((tmp_path / "clip.json").read_text())["unchecked"]
    assert "4 rows do not say which model made them" in unknown
    assert_leaks_are_refused(lambda: clip_train.main(own), fake, data, "images/P0080.png", tmp_path)
    swapped = {"train": "test", "test": "train"}  # what the CLIP was trained on is now the test
    manifest.write(data / "swapped.jsonl", [replace(r, split=swapped[str(r.split)]) for r in manifest.read(data).rows])
    with pytest.raises(InputError, match="the net .*model was trained on patients of valid or test: images/P0000.png"):
        clip_train.main([*given, "--model", str(model), "--real", str(data / "swapped.jsonl")])
    other = shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("config.yaml"))
    capsys.readouterr()
    clip_train.main([*given, "--model", str(other), "--real", str(data), "--dry_run"])
    assert f"what {other} was trained on is not known" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_help_names_no_default_where_there_is_none(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        clip_train.main([mode, "--help"])
    told = capsys.readouterr().out
    assert "None" not in told and "(default: thyroid)" in told


def test_wrong_input_is_one_line(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, data = trained
    given = ["--data_dir", str(data), "--output_dir", str(tmp_path / "x"), "--pretrained_model", str(tmp_path)]
    assert run(clip_train.main, ["train", *given]) == 2
    assert "has no config.json; give a folder of transformers' CLIP" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
