"""One optimisation step of each stage at Stable Diffusion 2.1's size, on a CPU.

Minutes, 20 GiB of memory, 40 GB of disk:

bash tests/run.sh -m slow tests/test_full_size.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from data import phantom
from tiger import finetune, pretrain
from tiger.files import write_json
from tiger.tokenizer import build_clip_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def write_sd21(folder: Path) -> None:
    """Random weights in the layout and sizes of stable-diffusion-2-1 (865 M + 340 M + 84 M parameters, float32)."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
    ).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
        hidden_act="gelu", projection_dim=512, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    build_clip_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {
        name: ["transformers", f"CLIP{kind}"]
        for name, kind in (("text_encoder", "TextModel"), ("tokenizer", "Tokenizer"))
    }
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})


def test_one_step_of_each_stage(tmp_path):
    base, coarse, fine, data = (tmp_path / name for name in ("base", "coarse", "fine", "data"))
    write_sd21(base)
    phantom.write_dataset(data, count=8, seed=1, workers=1)
    flags = ["--resolution", "256", "--max_train_steps", "1", "--train_batch_size", "1", "--validation_steps", "0",
             "--checkpointing_steps", "1", "--data_dir", str(data)]  # fmt: skip
    pretrain.main([*flags, "--pretrained_model", str(base), "--output_dir", str(coarse)])
    assert (coarse / "checkpoint-1").is_dir()
    before = UNet2DConditionModel.from_pretrained(base / "unet").conv_out.weight.detach().clone()
    after = UNet2DConditionModel.from_pretrained(coarse / "unet").conv_out.weight
    assert not torch.equal(before, after)
    shutil.rmtree(base)
    shutil.rmtree(coarse / "checkpoint-1")
    finetune.main([*flags, "--pretrained_model", str(coarse), "--output_dir", str(fine)])
    for branch in ("fg", "bg"):
        net = ControlNetModel.from_pretrained(fine / "controlnet" / branch)
        zero_convolutions = [block.weight for block in net.controlnet_down_blocks]
        assert len(zero_convolutions) == 12 and any(bool(weight.any()) for weight in zero_convolutions)
