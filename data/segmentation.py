"""Masks for images that have none: YOLOv8-seg trained on those that do; lungs by TorchXRayVision.

    python -m data.prepare segmenter train --data_dir runs/breast --output_dir runs/segmenter --epochs 100 --imgsz 256
    python -m data.prepare segmenter evaluate --data_dir runs/breast --model runs/segmenter
    python -m data.prepare segmenter predict --data_dir runs/more --model runs/segmenter --confidence 0.25

The only importer of ultralytics (AGPL-3.0). It is kept from the network, from reporting usage, from fetching fonts,
weights and packages, and from the settings in the user's home. Its checkpoints are pickles: they are read by its own
restricted reader, which runs no code, and what is trained here is stored as model.safetensors beside model.json.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.sources.writer import write_png
from tiger import manifest
from tiger.conditions import Gray, read_gray, read_mask
from tiger.errors import InputError
from tiger.files import atomic_path, read_json, write_json
from tiger.manifest import Manifest

TARGETS = {"nodule": "condition_fg", "organ": "organ_mask"}
MODEL = "yolov8n-seg.yaml"  # an architecture, in the wheel; its weights start at random
LUNG_WEIGHTS = "pspnet_chestxray_best_model_4.pth"
LUNG_URL = f"https://github.com/mlmed/torchxrayvision/releases/download/v1/{LUNG_WEIGHTS}"
BOOTSTRAPS = 2000
LOG = "segmenter.jsonl"  # one line an image that was looked at


def ultralytics() -> Any:
    """The package, alone with itself: no network, no usage reports, no font, no file outside a temporary folder."""
    folder = Path(os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics-")))
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "ULTRALYTICS_SAFE_LOAD": "true"}
    os.environ.setdefault("YOLO_VERBOSE", "false")
    from matplotlib import get_data_path

    (folder / "Ultralytics").mkdir(parents=True, exist_ok=True)
    font = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    shutil.copyfile(font, folder / "Ultralytics" / "Arial.ttf")  # it fetches a font of this name where there is none
    opener = Image.open
    import ultralytics as package

    Image.open = opener  # what it puts there would install a package to read a damaged image with
    off = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb", "vscode_msg", "openvino_msg")
    package.settings.update(dict.fromkeys(off, False))
    return package


# ------------------------------------------------------------------------------------------------------------- labels


def polygons(mask: Gray) -> list[NDArray[np.float64]]:
    """Mask HxW of 0/255 → one polygon (k, 2) of x, y in 0 … 1 for each component.

    A hole is cut out by a slit of no width: the outline runs to the hole, around it, and back. Components of fewer than
    three outline pixels are no polygon and are left out.
    """
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    shapes = []
    for index, contour in enumerate(contours):
        if tree[0][index][3] >= 0 or len(contour) < 3:  # a hole, or no area
            continue
        outline = contour[:, 0]
        hole = tree[0][index][2]
        while hole >= 0:
            outline = _cut(outline, contours[hole][:, 0])
            hole = tree[0][hole][0]
        shapes.append((outline + 0.5) / (mask.shape[1], mask.shape[0]))
    return shapes


def _cut(outline: NDArray[Any], hole: NDArray[Any]) -> NDArray[Any]:
    """Join a hole to an outline where the two are nearest."""
    distances = ((outline[:, None] - hole[None]) ** 2).sum(-1)
    i, j = np.unravel_index(int(distances.argmin()), distances.shape)
    around = np.concatenate([hole[j:], hole[: j + 1]])
    return np.concatenate([outline[: i + 1], around, outline[i:]])


def fill(shapes: Sequence[NDArray[np.float64]], height: int, width: int) -> Gray:
    """Polygons → mask, the inverse of `polygons`."""
    mask = np.zeros((height, width), np.uint8)
    for shape in shapes:
        cv2.fillPoly(mask, [np.rint(shape * (width, height) - 0.5).astype(np.int32)], 255)
    return mask


def write_yolo(data: Manifest, target: str, folder: Path) -> Path:
    """Write images and labels of the train and valid rows that have a mask in YOLO's layout; return its data.yaml.

    Images are gray PNGs. Raises InputError where a split has none.
    """
    column = TARGETS[target]
    for split in ("train", "valid"):
        rows = [row for row in data.select(split=split, synthetic=False).rows if getattr(row, column)]
        if not rows:
            raise InputError(
                f"{data.path}: no {split} row has {column}: add masks, or split by python -m data.prepare split"
            )
        for number, row in enumerate(tqdm(rows, desc=f"labels, {split}", unit="image")):
            lines = [
                " ".join(["0", *(f"{value:.6f}" for value in shape.ravel())])
                for shape in polygons(read_mask(data.file(row, column)))
            ]
            write_png(folder / "images" / split / f"{number:06d}.png", read_gray(data.file(row, "file_name")))
            label = folder / "labels" / split / f"{number:06d}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = folder / "data.yaml"
    names = {"path": str(folder.resolve()), "train": "images/train", "val": "images/valid", "names": {0: target}}
    config.write_text(yaml.safe_dump(names), encoding="utf-8")
    return config


# -------------------------------------------------------------------------------------------------------------- model


def train(
    data_dir: str, output_dir: str, *, target: str, start: str, epochs: int, imgsz: int, batch: int, seed: int,
    device: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Train on the masks of a data set and store the epoch that is best on valid; return its scores on every split.

    Args:
        target: "nodule" (condition_fg) or "organ" (organ_mask).
        start: see `load_start`.
    """
    data, folder = read_split(data_dir), Path(output_dir)
    yolo = load_start(start)
    with tempfile.TemporaryDirectory(prefix="segmenter-") as scratch:
        config = write_yolo(data, target, Path(scratch) / "data")
        yolo.train(
            data=str(config), epochs=epochs, imgsz=imgsz, batch=batch, seed=seed, device=device, project=scratch,
            name="run", pretrained=bool(yolo.ckpt), single_cls=True, plots=False, workers=0, verbose=False,
            amp=False,  # it would fetch weights to test itself on
            nbs=batch,  # an update each batch; its default gathers 64 images, which small sets hardly have
        )  # fmt: skip
        save(yolo.trainer.best, folder, {"target": target, "imgsz": imgsz, "epochs": epochs, "seed": seed})
    scores = evaluate(data_dir, output_dir, device=device)
    write_json(folder / "scores.json", scores)
    return scores


def read_split(data_dir: str) -> Manifest:
    """A data set whose scores mean something. Raises InputError where a patient is in two splits."""
    data = manifest.read(data_dir)
    manifest.refuse(data.path, manifest.straddling_patients(data.rows))
    return data


def load_start(start: str) -> Any:
    """The model that a training starts from, an ultralytics.YOLO.

    Args:
        start: an architecture of the wheel such as yolov8n-seg.yaml, whose weights are random; a folder of `train`, for
            instance another organ's; or a local .pt.
    Raises InputError where it cannot be read, or not without running code.
    """
    if Path(start).is_dir():
        net = load_net(Path(start), "--start")
        yolo = ultralytics().YOLO(MODEL, task="segment")  # replaced at once; it takes none that is built already
        yolo.model, yolo.ckpt = net, {"model": net}
        return yolo
    checkpoint = Path(start).suffix == ".pt"
    if checkpoint and not Path(start).is_file():
        raise InputError(f"--start {start}: no such file; nothing is downloaded, fetch it yourself or give {MODEL}")
    try:
        return ultralytics().YOLO(start, task="segment")
    except Exception as error:  # a damaged checkpoint can raise anything
        advice = "it must load without running code" if checkpoint else f"give one such as {MODEL}"
        raise InputError(f"--start {start}: cannot be read ({type(error).__name__}): {advice}") from error


def save(best: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Store a checkpoint of ultralytics as model.safetensors and model.json."""
    from safetensors.torch import save_file
    from ultralytics.nn.tasks import torch_safe_load

    checkpoint, _ = torch_safe_load(best, safe_only=True)
    net = (checkpoint.get("ema") or checkpoint["model"]).float()
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, temporary)
    write_json(folder / "model.json", {"architecture": net.yaml, **settings})


def load_net(folder: Path, flag: str) -> Any:
    """The network that `save` stored. Raises InputError, which names the flag, where the folder holds none."""
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{flag} {folder}: holds no model.safetensors; make one: segmenter train --help")
    ultralytics()
    from safetensors.torch import load_file
    from ultralytics.nn.tasks import SegmentationModel

    settings = read_json(folder / "model.json")
    net = SegmentationModel(settings["architecture"], nc=1, verbose=False)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net.names = {0: settings["target"]}
    return net


class Segmenter:
    """A trained model of `train`."""

    def __init__(self, folder: str | Path, device: str | None = None) -> None:
        """Raises InputError where the folder holds no model."""
        net = load_net(Path(folder), "--model")
        from ultralytics.models.yolo.segment import SegmentationPredictor

        settings = read_json(Path(folder) / "model.json")
        self.column: str = TARGETS[settings["target"]]
        options = {"imgsz": settings["imgsz"], "conf": 0.001, "retina_masks": True, "device": device, "save": False,
                   "verbose": False, "mode": "predict", "task": "segment"}  # fmt: skip
        self.predictor = SegmentationPredictor(overrides=options)
        self.predictor.setup_model(net.eval(), verbose=False)

    def __call__(self, gray: Gray, confidence: float) -> tuple[Gray, float]:
        """HxW uint8 → (mask HxW of 0/255, confidence of its surest part).

        The mask is the union of all parts of at least that confidence; empty where the surest one has less.
        """
        (result,) = self.predictor([np.repeat(gray[:, :, None], 3, axis=2)])
        scores = result.boxes.conf.cpu().numpy()
        if result.masks is None or not len(scores):
            return np.zeros_like(gray), 0.0
        parts = result.masks.data.cpu().numpy()[scores >= confidence] > 0.5
        return np.where(parts.any(axis=0), 255, 0).astype(np.uint8), float(scores.max())


def evaluate(data_dir: str, model: str, confidence: float = 0.25, device: str | None = None) -> dict[str, Any]:
    """Dice and IoU of each split's real rows: mean over patients of their images' mean, with a 95 % interval.

    The interval is a percentile bootstrap over patients (2000 draws, seed 0). An image without a mask is left out.
    """
    data, segmenter = read_split(data_dir), Segmenter(model, device)
    scores: dict[str, Any] = {"confidence": confidence}
    for split in manifest.SPLITS:
        rows = [row for row in data.select(split=split, synthetic=False).rows if getattr(row, segmenter.column)]
        by_patient: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in tqdm(rows, desc=split, unit="image"):
            mask, _ = segmenter(read_gray(data.file(row, "file_name")), confidence)
            truth = read_mask(data.file(row, segmenter.column))
            by_patient[row.patient_id or row.file_name].append(overlap(mask, truth))
        if by_patient:
            means = np.array([np.mean(values, axis=0) for values in by_patient.values()])  # (patients, 2)
            draws = np.random.default_rng(0).integers(len(means), size=(BOOTSTRAPS, len(means)))
            low, high = np.percentile(means[draws].mean(axis=1), (2.5, 97.5), axis=0)
            scores[split] = {
                "images": len(rows),
                "patients": len(means),
                **{
                    name: {"mean": float(means[:, i].mean()), "low": float(low[i]), "high": float(high[i])}
                    for i, name in enumerate(("dice", "iou"))
                },
            }
    return scores


def overlap(mask: Gray, truth: Gray) -> tuple[float, float]:
    """(Dice, IoU) of two masks; 1 where both are empty."""
    both, either = np.count_nonzero(mask & truth), np.count_nonzero(mask | truth)
    return (2 * both / (both + either), both / either) if either else (1.0, 1.0)


# --------------------------------------------------------------------------------------------------------- new masks


def predict(data_dir: str, model: str, confidence: float, device: str | None = None) -> dict[str, Any]:
    """Write a mask for each row that has none and name it in the manifest; returns how many were and were not found.

    A row whose surest part is below `confidence` stays without a mask. Each confidence is in segmenter.jsonl. A stopped
    run goes on where it was on the same command.
    """
    segmenter = Segmenter(model, device)
    weights = hashlib.sha256((Path(model) / "model.safetensors").read_bytes()).hexdigest()[:16]
    settings = {"column": segmenter.column, "model": weights, "threshold": confidence}
    return add_masks(manifest.read(data_dir), lambda gray: segmenter(gray, confidence), settings)


def lungs(data_dir: str, weights: str) -> dict[str, Any]:
    """Write the lungs as foreground masks of chest x-rays that have none, by TorchXRayVision's PSPNet.

    Args:
        weights: a local copy of the file at LUNG_URL; nothing is downloaded. It is read without running code.
    """
    if Path(weights).name != LUNG_WEIGHTS or not Path(weights).is_file():
        raise InputError(f"--weights {weights}: give the path of {LUNG_WEIGHTS}; it is at {LUNG_URL}")
    try:
        import torch
        import torchxrayvision as xrv  # pyright: ignore[reportMissingImports]  # not in requirements.txt
    except ImportError as error:
        raise InputError("lungs need TorchXRayVision: pip install torchxrayvision") from error
    net = xrv.baseline_models.chestx_det.PSPNet(cache_dir=str(Path(weights).parent))
    sides = [net.targets.index(name) for name in ("Left Lung", "Right Lung")]

    def segment(gray: Gray) -> tuple[Gray, float]:
        square = cv2.resize(gray, (512, 512), interpolation=cv2.INTER_AREA).astype(np.float32)
        with torch.inference_mode():
            logits = net(torch.from_numpy(square / 255 * 2048 - 1024)[None, None])[0, sides]
        share = torch.sigmoid(logits).amax(0).numpy()
        share = cv2.resize(share, gray.shape[::-1], interpolation=cv2.INTER_LINEAR)
        inside = share >= 0.5
        return np.where(inside, 255, 0).astype(np.uint8), float(share[inside].mean()) if inside.any() else 0.0

    return add_masks(
        manifest.read(data_dir), segment, {"column": "condition_fg", "model": LUNG_WEIGHTS, "threshold": 0.5}
    )


def add_masks(
    data: Manifest, segment: Callable[[Gray], tuple[Gray, float]], settings: dict[str, Any]
) -> dict[str, Any]:
    """`segment` (gray → mask, confidence) over the rows without a mask; see `predict`.

    settings: `column`, the manifest's, and what else the masks depend on; the log has them in each line, and rows that
    it names with the same ones are done.
    """
    log, column = data.root / LOG, settings["column"]
    done = {
        line["file_name"]: line["mask"] for line in read_log(log)
        if line.items() >= settings.items() and (line["mask"] is None or (data.root / line["mask"]).is_file())
    }  # fmt: skip
    rows, found = list(data.rows), 0
    todo = [index for index, row in enumerate(rows) if getattr(row, column) is None]
    with open(log, "a", encoding="utf-8") as lines:
        for index in tqdm(todo, desc="masks", unit="image"):
            row = rows[index]
            if row.file_name not in done:
                mask, confidence = segment(read_gray(data.file(row, "file_name")))
                name = f"{column}/{Path(row.file_name).with_suffix('.png').as_posix().removeprefix('images/')}"
                done[row.file_name] = name if mask.any() else None
                if mask.any():
                    write_png(data.root / name, mask)
                record = {"file_name": row.file_name, "mask": done[row.file_name], "confidence": confidence, **settings}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
            rows[index] = replace(row, **{column: done[row.file_name]})
            found += done[row.file_name] is not None
    manifest.write(data.path, rows)
    return {"masks": found, "without": len(todo) - found, "log": str(log)}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last one that was cut off is removed from the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with atomic_path(path) as temporary:
            temporary.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
