"""A random base and a handful of random images, for tests of the training entry points."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import make_scheduler, make_text_encoder, make_unet, make_vae
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tiger.tokenizer import build_clip_tokenizer

SIDE = 64  # pixels
TEXTS = {
    "PTC": "malignant, papillary, solid, microcalcification, taller-than-wide",
    "FTC": "malignant, follicular, solid, uneven thick halo",
    "benign": "benign, cystic, inferior pole",
}


def save_base(folder: Path, layout: str = "tiny") -> Path:
    """A diffusers folder with random weights."""
    unet = make_unet(layout)
    StableDiffusionPipeline(
        make_vae(unet.config.in_channels), make_text_encoder(), build_clip_tokenizer(), unet, make_scheduler(layout),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_data(folder: Path, count: int = 12) -> Path:
    """Images, masks, maps and a manifest: 2/3 PTC, the rest FTC and benign; the last quarter is "valid"."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:40, 16:44] = 255
    rows = []
    for index in range(count):
        label = ("PTC", "PTC", "PTC", "PTC", "FTC", "benign")[index % 6]
        row = {"label": label, "text_fg": TEXTS[label], "text_bg": "sonogram longitudinal plane, more detail"}
        row |= {"patient_id": f"P{index}", "split": "train" if index < 0.75 * count else "valid"}
        for column, pixels in (
            ("file_name", rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)),
            ("condition_fg", np.roll(mask, index, axis=1)),
            ("condition_bg", rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)),
        ):
            row[column] = f"{column}/{index}.png"
            (folder / column).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / row[column])
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(**values: object) -> list[str]:
    """Keyword arguments as command-line flags, on top of settings that make a run short."""
    settings: dict[str, object] = {
        "max_train_steps": 2, "train_batch_size": 2, "checkpointing_steps": 100, "validation_steps": 0,
        "validation_images": 2, "validation_inference_steps": 2, "log_steps": 1, "lr_warmup_steps": 0,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (settings | values).items()]


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that two safetensors files do not share bit for bit."""
    first, second = load_file(a), load_file(b)
    return [name for name, value in first.items() if not torch.equal(value, second[name])]
