"""The embedded base: it loads with plain diffusers, is small, knows nothing of rare subtypes; and its recipe runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from data import phantom
from tiger import base
from tiger.errors import run

BASE = Path(__file__).parents[1] / "assets" / "tiny-base"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_dataset(folder, count=40, seed=2, preset="common", workers=1)
    return folder


def test_loads_with_plain_diffusers_and_follows_a_prompt():
    pipeline = StableDiffusionPipeline.from_pretrained(str(BASE))
    assert {p.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    pipeline.set_progress_bar_config(disable=True)

    def brightness(term: str) -> float:
        prompt = f"benign, solid, isoechoic, sonogram longitudinal plane, definition, detail, {term}"
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        images = pipeline(
            [prompt] * 4, num_inference_steps=8, guidance_scale=3.0, generator=generator, output_type="np"
        ).images
        return float(np.mean(images))

    assert brightness("high bright") > brightness("low bright") + 0.03


def test_is_small_and_holds_no_pickle():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}


def test_its_autoencoder_keeps_the_image(data):
    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    paths = sorted((data / "images").glob("*.png"))[:8]
    x = torch.stack([torch.from_numpy(np.asarray(Image.open(p)).astype(np.float32) / 127.5 - 1) for p in paths])
    x = x[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    assert 10 * torch.log10(4 / (x - y).square().mean()) > 24  # dB


def test_the_recipe_runs_and_learns(data, tmp_path):
    out = tmp_path / "init"
    common = ["--data_dir", str(data), "--output_dir", str(out)]
    base.main(["autoencoder", *common, "--max_train_steps", "12", "--train_batch_size", "4"])
    base.main(["text_encoder", *common, "--max_train_steps", "60", "--train_batch_size", "16"])
    base.main(["assemble", "--output_dir", str(out)])
    base.main(["export", "--model", str(out), "--figures", str(out), "--output_dir", str(tmp_path / "small")])
    losses = json.loads((out / "text_encoder.json").read_text())["losses"]
    assert losses[-1]["loss"] < 0.9 * losses[0]["loss"]
    StableDiffusionPipeline.from_pretrained(str(tmp_path / "small"))
    size = [sum(f.stat().st_size for f in folder.rglob("*.safetensors")) for folder in (out, tmp_path / "small")]
    assert size[1] < 0.55 * size[0]


def test_assembling_without_parts_names_what_is_missing(tmp_path, capsys):
    assert run(base.main, ["assemble", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "vae is missing" in error
