"""Labels keep the shape of masks; a tiny model is trained, stored, read back and used, all without a network."""

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data import segmentation
from data.prepare import main
from tiger.conditions import read_mask
from tiger.errors import InputError, run
from tiger.manifest import Manifest, Row, read, write

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
# Runs a command of data.prepare; any attempt to reach the network is written to stderr and fails.
OFFLINE = """
import os, socket, sys
def refuse(*args, **options):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from data.prepare import main
main(sys.argv[1:])
"""


def disk(x: int, y: int, radius: int, size: int = SIZE) -> np.ndarray:
    return cv2.circle(np.zeros((size, size), np.uint8), (x, y), radius, 255, -1)


def data_set(folder: Path, count: int = 24) -> Manifest:
    """Bright disks on dark noise, each with its mask; every fourth row has none and no split lacks one."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        mask = disk(*rng.integers(22, 42, 2).tolist(), int(rng.integers(9, 15)))
        image = np.clip(rng.normal(60, 20, (SIZE, SIZE)) + 120 * (mask > 0), 0, 255).astype(np.uint8)
        for name, array in (("images", image), ("condition_fg", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{i}.png")
        named = None if i % 4 == 3 else f"condition_fg/{i}.png"
        split = ("train", "train", "valid", "test")[i // 2 % 4]
        rows.append(
            Row(f"images/{i}.png", "benign", "sonogram", condition_fg=named, split=split, patient_id=f"P{i // 2}")
        )
    write(folder / "metadata.jsonl", rows)
    return read(folder)


@pytest.mark.parametrize("case", ["disk", "two", "hole", "two holes", "edge", "speck"])
def test_polygons_keep_the_mask(case: str):
    mask = disk(30, 30, 20)
    if case == "two":
        mask |= disk(56, 56, 5)
    if "hole" in case:
        mask &= ~disk(26, 30, 6)
    if case == "two holes":
        mask &= ~disk(40, 32, 4)
    if case == "edge":
        mask = disk(0, 30, 20)
    if case == "speck":
        mask[60, 60] = 255
    shapes = segmentation.polygons(mask)
    assert len(shapes) == (2 if case == "two" else 1)
    assert all(shape.min() >= 0 and shape.max() <= 1 for shape in shapes)
    again = segmentation.fill(shapes, SIZE, SIZE)
    assert segmentation.overlap(again, mask)[1] > 0.93
    if "hole" in case:
        assert again[30, 26] == 0
    assert segmentation.polygons(np.zeros_like(mask)) == []


def test_ultralytics_reads_the_labels_as_they_are_meant():
    """Its own rasteriser gives the hole back."""
    segmentation.ultralytics()
    from ultralytics.data.utils import polygon2mask

    mask = disk(30, 30, 20) & ~disk(26, 30, 6)
    (shape,) = segmentation.polygons(mask)
    theirs = polygon2mask((SIZE, SIZE), [(shape * SIZE).ravel()], color=255)
    assert segmentation.overlap(theirs, mask)[1] > 0.9 and theirs[30, 26] == 0


def test_yolo_layout(tmp_path: Path):
    data = data_set(tmp_path / "set")
    segmentation.write_yolo(data, "nodule", tmp_path / "yolo")
    labels = sorted((tmp_path / "yolo" / "labels" / "train").iterdir())
    assert len(labels) == len(list((tmp_path / "yolo" / "images" / "train").iterdir())) == 9
    values = [float(value) for value in labels[0].read_text().split()]
    shape = np.array(values[1:]).reshape(-1, 2)
    truth = segmentation.read_mask(data.file(data.rows[0], "condition_fg"))
    assert values[0] == 0 and segmentation.overlap(segmentation.fill([shape], SIZE, SIZE), truth)[0] > 0.95
    with pytest.raises(InputError, match="no train row has organ_mask"):
        segmentation.write_yolo(data, "organ", tmp_path / "other")


def test_overlap():
    a, b = np.zeros((2, 4, 4), np.uint8)
    a[:2], b[1:3] = 255, 255
    assert segmentation.overlap(a, b) == (0.5, 1 / 3)
    assert segmentation.overlap(a * 0, b * 0) == (1, 1)


def test_train_predict_and_evaluate_offline(tmp_path: Path):
    data_set(tmp_path / "set")
    folder, model = str(tmp_path / "set"), str(tmp_path / "model")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def segmenter(*argv: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, "segmenter", *argv],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0 and b"NETWORK" not in done.stderr, done.stderr.decode()[-2000:]
        return json.loads(done.stdout[done.stdout.index(b"{") :])

    options = ("--epochs", "1", "--imgsz", "64", "--batch", "8", "--device", "cpu")
    scores = segmenter("train", "--data_dir", folder, "--output_dir", model, *options)
    assert sorted(path.name for path in Path(model).iterdir()) == ["model.json", "model.safetensors", "scores.json"]
    assert not list((tmp_path / "home").rglob("*ltralytics*"))
    assert scores["test"]["images"] == 3 and scores["valid"]["patients"] == 3
    assert all(0 <= scores[split]["dice"]["low"] <= scores[split]["dice"]["high"] <= 1 for split in ("valid", "test"))
    told = segmenter("predict", "--data_dir", folder, "--model", model, "--confidence", "0.001")
    assert told["masks"] + told["without"] == 6

    from safetensors.torch import load_file
    from torch import equal

    yolo = segmentation.load_start(model)  # what another training goes on from
    weights = load_file(Path(model) / "model.safetensors")
    assert yolo.ckpt and all(equal(value, weights[name]) for name, value in yolo.model.state_dict().items())
    assert segmentation.load_start(segmentation.MODEL).ckpt == {}


SETTINGS = {"column": "condition_fg", "model": "a", "threshold": 0.25}


class Bright:
    """A segmenter that takes bright pixels, finds nothing in every other image, and can be stopped."""

    def __init__(self, stop: int | None = None):
        self.calls, self.stop = 0, stop

    def __call__(self, gray: np.ndarray) -> tuple[np.ndarray, float]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        mask = np.where(gray > 130, 255, 0).astype(np.uint8)
        return (mask * 0, 0.1) if gray[0, 0] % 2 else (mask, 0.9)


def test_masks_are_added_where_there_are_none(tmp_path: Path):
    data = data_set(tmp_path)
    before = {row.file_name: row.condition_fg for row in data.rows}
    report = segmentation.add_masks(data, Bright(), SETTINGS)
    confidence = {line["file_name"]: line["confidence"] for line in segmentation.read_log(tmp_path / "segmenter.jsonl")}
    assert report["masks"] + report["without"] == len(confidence) == 6 and 0 < report["masks"] < 6
    for row in read(tmp_path).rows:
        if before[row.file_name]:
            assert row.condition_fg == before[row.file_name] and row.file_name not in confidence
        else:
            assert (row.condition_fg is not None) == (confidence[row.file_name] == 0.9)
            assert row.condition_fg is None or segmentation.read_mask(data.root / row.condition_fg).any()


def test_a_stopped_prediction_goes_on(tmp_path: Path):
    whole, stopped = data_set(tmp_path / "whole"), data_set(tmp_path / "stopped")
    expected = segmentation.add_masks(whole, Bright(), SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        segmentation.add_masks(stopped, Bright(stop=4), SETTINGS)
    assert read(stopped.root).rows == stopped.rows  # the manifest names no mask yet
    log = stopped.root / "segmenter.jsonl"
    log.write_text(log.read_text() + '{"file_name": "images/2')  # a line that was cut off
    rest = Bright()
    report = segmentation.add_masks(read(stopped.root), rest, SETTINGS)
    assert rest.calls == 2 and report["masks"] == expected["masks"]
    assert read(stopped.root).rows == read(whole.root).rows
    assert log.read_bytes() == (whole.root / "segmenter.jsonl").read_bytes()

    again = Bright()
    segmentation.add_masks(read(whole.root), again, SETTINGS)
    assert again.calls == 0  # rows in which nothing was found are not looked at again
    other = Bright()
    segmentation.add_masks(read(whole.root), other, SETTINGS | {"threshold": 0.1})
    assert other.calls == expected["without"]
    old = {row.condition_fg for row in whole.rows}
    (whole.root / next(row.condition_fg for row in read(whole.root).rows if row.condition_fg not in old)).unlink()
    write(whole.path, whole.rows)
    lost = Bright()
    segmentation.add_masks(read(whole.root), lost, SETTINGS)
    assert lost.calls == 1  # a mask of the log that is gone is made anew


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data_set(tmp_path / "set")
    folder = ["--data_dir", str(tmp_path / "set")]
    (tmp_path / "evil.pt").write_bytes(b"junk")
    train = ["train", *folder, "--output_dir", str(tmp_path / "m")]
    for argv, told in (
        (["predict", *folder, "--model", str(tmp_path)], "holds no model.safetensors"),
        ([*train, "--start", str(tmp_path / "none.pt")], "nothing is downloaded"),
        ([*train, "--start", str(tmp_path / "evil.pt")], "must load without running code"),
        ([*train, "--start", "yolov99-seg.yaml"], "give one such as yolov8n-seg.yaml"),
        (["lungs", *folder, "--weights", str(tmp_path / "x.pth")], "give the path of pspnet"),
    ):
        assert run(main, ["segmenter", *argv]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


class Chest:
    """Stands in for TorchXRayVision's PSPNet: the left lung is what is bright on the left."""

    targets = ("Heart", "Right Lung", "Left Lung")

    def __init__(self, cache_dir: str):
        assert (Path(cache_dir) / segmentation.LUNG_WEIGHTS).is_file()

    def __call__(self, image: Any) -> Any:
        import torch

        assert image.shape == (1, 1, 512, 512) and -1024 <= image.min() < image.max() <= 1024
        bright, left = torch.where(image[:, 0] > 0, 4.0, -4.0), torch.arange(512) < 256
        nowhere = torch.full_like(bright, -4.0)
        return torch.stack([nowhere + 8, torch.where(left, nowhere, bright), torch.where(left, bright, nowhere)], 1)


def test_lungs_are_both_sides_of_chest_x_rays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = data_set(tmp_path / "set")
    disks = {row.file_name: read_mask(data.file(row, "condition_fg")) for row in data.rows if row.condition_fg}
    write(data.path, [replace(row, condition_fg=None) for row in data.rows])
    (tmp_path / segmentation.LUNG_WEIGHTS).touch()
    argv = ["lungs", "--data_dir", str(data.root), "--weights", str(tmp_path / segmentation.LUNG_WEIGHTS)]
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    assert run(main, ["segmenter", *argv]) == 2
    assert "lungs need TorchXRayVision: pip install torchxrayvision" in capsys.readouterr().err
    models = types.SimpleNamespace(chestx_det=types.SimpleNamespace(PSPNet=Chest))
    monkeypatch.setitem(sys.modules, "torchxrayvision", types.SimpleNamespace(baseline_models=models))  # type: ignore
    assert run(main, ["segmenter", *argv]) == 0
    found = read(data.root)
    for row in found.rows:
        if row.file_name in disks:  # which lie on both sides
            assert segmentation.overlap(read_mask(found.file(row, "condition_fg")), disks[row.file_name])[0] > 0.9


def test_a_patient_in_two_splits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data_set(tmp_path / "set")
    data = read(tmp_path / "set")
    write(data.path, [replace(row, patient_id="P" if number > 1 else "Q") for number, row in enumerate(data.rows)])
    folder = ["--data_dir", str(tmp_path / "set")]
    assert run(main, ["segmenter", "train", *folder, "--output_dir", str(tmp_path / "m")]) == 2
    assert "patient P: is in test and train and valid: keep each patient in one split" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    with pytest.raises(InputError, match="patient P"):
        segmentation.evaluate(str(tmp_path / "set"), str(tmp_path / "m"))


def test_a_damaged_image_is_named_beside_ultralytics_too(tmp_path: Path):
    segmentation.ultralytics()
    (tmp_path / "bad.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="bad.png: cannot be read as an image"):
        read_mask(tmp_path / "bad.png")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path):
    import torch

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    data_set(tmp_path / "set")
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    options = {"target": "nodule", "epochs": 1, "imgsz": 64, "batch": 8, "seed": 0, "device": "cpu"}
    with pytest.raises(InputError, match="must load without running code"):
        segmentation.train(str(tmp_path / "set"), str(tmp_path / "m"), start=str(tmp_path / "evil.pt"), **options)
    assert not (tmp_path / "ran").exists()
