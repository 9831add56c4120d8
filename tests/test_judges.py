"""The judge nets: they learn, are stored and loaded, and answer for the image alone."""

import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.fft
import torch
from eval_samples import PLACES, write_dataset
from PIL import Image
from safetensors.torch import load_file

from eval import attributes, clip_train, judges, segment, training
from tiger import manifest
from tiger.errors import InputError, run
from tiger.files import read_json

TERMS = {"location": list(PLACES), "extension": ["no extension", "extension"]}
COUNTS = {"train": {"benign": 30, "MTC": 30}, "test": {"benign": 20, "MTC": 20}}
TINY = ["--resolution", "32", "--width", "8", "--train_batch_size", "16", "--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("judges"), COUNTS).root


def pictures(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, size, size)).astype(np.uint8)


def test_the_segmenter_learns_and_is_measured(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "segmenter"
    segment.main(["train", "--data_dir", str(data), "--output_dir", str(folder), "--max_train_steps", "60", *TINY])
    metrics = read_json(folder / "metrics.json")
    assert metrics["iou"] > 0.6
    assert metrics["n"] == 40
    assert metrics["command"].startswith("python -m eval.segment train --data_dir ")
    output = tmp_path / "measured.json"
    segment.main(["evaluate", "--data_dir", str(data), "--model", str(folder), "--output", str(output)])
    measured = read_json(output)
    assert measured["iou"] == pytest.approx(metrics["iou"], abs=0.01)  # stored as fp16
    assert measured["dice"] == pytest.approx(metrics["dice"], abs=0.01)


def test_the_attribute_net_learns_and_is_measured(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "attributes"
    attributes.main(["train", "--data_dir", str(data), "--output_dir", str(folder), "--max_train_steps", "60", *TINY])
    metrics = read_json(folder / "metrics.json")
    assert metrics["categories"]["location"]["accuracy"] > 0.8 > metrics["categories"]["location"]["majority"]
    net = judges.load_attribute_net(folder)
    assert sorted(net.categories["location"]) == sorted(PLACES)  # only what the rows state
    output = tmp_path / "measured.json"
    attributes.main(["evaluate", "--data_dir", str(data), "--model", str(folder), "--output", str(output)])
    assert read_json(output)["accuracy"] == pytest.approx(metrics["accuracy"], abs=0.06)


@pytest.mark.parametrize("module", [segment, attributes, clip_train])
def test_a_training_that_was_killed_ends_bit_equal(
    module: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(folder: str, steps: int = 9) -> list[str]:
        flags = ["--data_dir", str(data), "--output_dir", str(tmp_path / folder), "--max_train_steps", str(steps)]
        return ["train", *flags, *(TINY if module is not clip_train else [*TINY[:2], "--width", "48", *TINY[4:]])]

    module.main(given("whole"))
    monkeypatch.setattr(training, "CHECKPOINTING_STEPS", 3)
    rotate = training.checkpoint.rotate

    def killed(folder: Path, keep: int, newest: int) -> None:
        if newest == 6:
            raise KeyboardInterrupt
        rotate(folder, keep=keep, newest=newest)

    monkeypatch.setattr(training.checkpoint, "rotate", killed)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.yaml").write_text("max_train_steps: 5")  # of a training that came to no checkpoint
    with pytest.raises(KeyboardInterrupt):
        module.main(given("cut"))
    assert not (tmp_path / "cut" / "metrics.json").exists()
    monkeypatch.setattr(training.checkpoint, "rotate", rotate)
    with pytest.raises(
        InputError, match="cut holds another training: max_train_steps was 9, is 8; give another --outp"
    ):
        module.main(given("cut", 8))
    capsys.readouterr()
    module.main(given("cut"))
    assert "6/9" in capsys.readouterr().err  # went on from there
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    monkeypatch.chdir(tmp_path)
    there = given("cut")
    there[there.index(str(data))] = os.path.relpath(data)
    module.main(there)
    assert "cut holds the finished net: nothing to do" in capsys.readouterr().out
    mask = data / str(manifest.read(data).select(split="train").rows[0].condition_fg)
    redrawn = mask.read_bytes()
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(mask)
    with pytest.raises(
        InputError, match="cut holds another training: other rows than before; give another --output_dir"
    ):
        module.main(given("cut"))
    mask.write_bytes(redrawn)
    (tmp_path / "cut" / "config.yaml").unlink()
    with pytest.raises(InputError, match="holds a net that does not say how it was trained"):
        module.main(given("cut"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max_train_steps", "0"], "--max_train_steps 0: must be 1 or more"),
        (["--train_batch_size", "0"], "--train_batch_size 0: must be 1 or more"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be a number above 0"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--resolution", "0"], "--resolution 0: must be 1 or more"),
        (["--width", "-8"], "--width -8: must be 1 or more"),
    ],
)
@pytest.mark.parametrize("module", [segment, attributes, clip_train])
def test_numbers_that_make_no_training_are_refused(
    module: ModuleType, data: Path, tmp_path: Path, flags: list[str], told: str
) -> None:
    given = ["train", "--data_dir", str(data), "--output_dir", str(tmp_path / "net"), "--resolution", "32", *flags]
    with pytest.raises(InputError, match=told):
        module.main(given)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("net", [judges.Segmenter(4, 32), judges.AttributeNet(TERMS, 4, 32)])
def test_saved_and_loaded_judges_agree(net: torch.nn.Module, tmp_path: Path) -> None:
    net.half().float().eval()  # what fp16 can hold
    judges.save_judge(net, tmp_path)  # pyright: ignore[reportArgumentType]
    load = judges.load_segmenter if isinstance(net, judges.Segmenter) else judges.load_attribute_net
    loaded = load(tmp_path).cpu()
    assert not loaded.training
    for (name, a), (_, b) in zip(net.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_shipped_sizes_are_small() -> None:
    fifteen = {f"category {i}": list("abcd") for i in range(15)}
    for net in (judges.Segmenter(), judges.AttributeNet(fifteen)):
        assert 2 * sum(parameter.numel() for parameter in net.parameters()) < 3e6  # bytes in fp16


def test_shapes_and_batches() -> None:
    segmenter, net = judges.Segmenter(4, 64).eval(), judges.AttributeNet(TERMS, 4, 64).eval()
    images = pictures(5, 64)
    found = judges.segment(segmenter, images, batch_size=2)
    assert found.shape == (5, 64, 64)
    assert found.dtype == bool
    assert np.array_equal(found, judges.segment(segmenter, images))
    logits, where = net(judges.normalise(torch.from_numpy(images)))
    assert {name: tuple(values.shape) for name, values in logits.items()} == {"location": (5, 3), "extension": (5, 2)}
    assert where.shape == (5, 1, 8, 8)
    predictions = judges.predict_attributes(net, images, batch_size=2)
    assert len(predictions) == 5
    assert all(p["location"] in PLACES for p in predictions)
    assert predictions == judges.predict_attributes(net, images)


def test_local_spectrum_is_the_dct_of_blocks() -> None:
    image = pictures(1, 16)
    found = judges.local_spectrum(judges.normalise(torch.from_numpy(image)))[0].numpy()
    scaled = image[0] / 127.5 - 1
    blocks = [scaled[y : y + 8, x : x + 8] for y in (0, 4, 8) for x in (0, 4, 8)]
    powers = [np.log(scipy.fft.dctn(block, norm="ortho").ravel()[1:] ** 2 + 1e-4) for block in blocks]
    np.testing.assert_allclose(found, np.mean(powers, axis=0), rtol=1e-3, atol=1e-3)


def test_mask_iou_by_hand() -> None:
    a, b = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0] = True
    assert judges.mask_iou(a, b) == pytest.approx([4 / 12, 0, 1])


def test_segmentation_loss_prefers_the_truth() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[:, :, 2:5, 2:5] = 1
    right, wrong = 20 * (2 * masks - 1), 20 * (1 - 2 * masks)
    assert segment.segmentation_loss(right, masks) < 0.01 < 1 < segment.segmentation_loss(wrong, masks)
    empty = torch.full_like(masks, -20.0)
    # background alone: cross-entropy forgives a missed small nodule, Dice does not
    assert float(segment.segmentation_loss(empty, masks)) == pytest.approx(0.9 + 20 * 9 / 64, rel=1e-4)


def test_agreement_counts_only_what_is_stated() -> None:
    predicted = [{"a": "x", "b": "p"}, {"a": "y", "b": "q"}, {"a": "x", "b": "q"}]
    stated = [{"a": "x"}, {"a": "x", "b": "q"}, {"a": "x", "b": "p"}]
    found = attributes.agreement(predicted, stated)
    assert found["a"] == {"n": 3, "accuracy": pytest.approx(2 / 3), "majority": 1.0}
    assert found["b"] == {"n": 2, "accuracy": 0.5, "majority": 0.5}


def test_wrong_input_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(main, *argv: str) -> str:
        assert run(main, list(argv)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    out = ["--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
    assert "--resolution 30: must be a multiple of 32" in error(segment.main, "train", *out, "--resolution", "30")
    assert "no row with split 'valid'" in error(segment.main, "evaluate", *out[:2], "--split", "valid")
    assert "no config.json; train this judge first" in error(
        attributes.main, "evaluate", *out[:2], "--model", str(tmp_path)
    )
    judges.save_judge(judges.Segmenter(4, 32), tmp_path / "judge")
    assert "this is a Segmenter, but a AttributeNet is needed" in error(
        attributes.main, "evaluate", *out[:2], "--model", str(tmp_path / "judge")
    )
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[3]["attributes"]["location"] = "left"
    (data / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    odd = ["--data_dir", str(data / "odd.jsonl"), *out[2:]]
    assert "images/P0003.png (location=left)" in error(attributes.main, "train", *odd)
    assert not (tmp_path / "out").exists()


def test_dry_run_trains_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (segment, attributes):
        module.main(["train", "--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--dry_run"])
        assert "60 training and 40 test images" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
