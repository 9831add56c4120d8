"""Counted FLOPs: against the real step, against published figures, and the table of peaks."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step
from tiger import flops
from tiger.model import control_encoder
from tiger.stage import SampleNoise

SIZE = train_step.SIZES["tiny"]


@pytest.fixture(scope="module")
def base() -> train_step.Components:
    return train_step.random_base(SIZE)


def sample(base: train_step.Components) -> dict:
    """A batch of one image."""
    channels, cells = base.unet.config["in_channels"], SIZE.side // 8
    texts = {name: ["solid"] for name in ("text", "text_fg", "text_bg")}
    conditions = {name: torch.ones(1, 1, SIZE.side, SIZE.side) for name in ("mask", "region", "sobel")}
    return texts | conditions | {"moments": torch.zeros(1, 2 * channels, cells, cells)}


def really_counted(stage, batch: dict, step: int) -> int:
    """FLOPs of a step that is really taken, prompts being cached. The plain attention kernel recomputes nothing."""
    noise = [SampleNoise(0, 0, range(1), torch.device("cpu")) for _ in range(2)]
    stage.loss(batch, noise[0], step)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.loss(batch, noise[1], step)[0].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("update", train_step.UPDATES)
def test_the_fine_stage_counts_what_its_step_does(base, update):
    stage = train_step.fine_stage(base, Accelerator(cpu=True), update=update)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    counted = stage.flops(SIZE.side)
    assert all(p.grad is None and not p.is_meta for p in stage.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())
    assert all(counted == really_counted(stage, sample(base), step) for step in (0, 1))


def test_the_coarse_stage_counts_what_its_step_does(base):
    for options in ({}, {"train_text_encoder": True}):
        stage = train_step.coarse_stage(base, Accelerator(cpu=True), **options)
        assert stage.flops(SIZE.side) == really_counted(stage, sample(base), 0)


def test_what_checkpointing_computes_twice_counts_once(base):
    plain = train_step.coarse_stage(base, Accelerator(cpu=True))
    twice = train_step.coarse_stage(base, Accelerator(cpu=True), gradient_checkpointing=True)
    assert twice.flops(SIZE.side) == plain.flops(SIZE.side) < really_counted(twice, sample(base), 0)
    assert twice.model.unet.is_gradient_checkpointing  # still on


def test_peaks():
    tera = {
        ("NVIDIA H100 80GB HBM3", True): 989.5,
        ("NVIDIA H100 PCIe", True): 756.5,
        ("NVIDIA A100-SXM4-80GB", True): 312,
        ("NVIDIA A100-SXM4-80GB", False): 156,
        ("NVIDIA GeForce RTX 4090", True): 165.2,
    }
    for (name, half), peak in tera.items():
        assert flops.named_peak(name, half) == 1e12 * peak
    for name in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla P4"):
        assert flops.named_peak(name, True) is None
    assert flops.peak(torch.device("cpu"), True) is None
    assert 1e9 < flops.product_rate(torch.device("cpu")) < 1e14
    assert 0.1 < flops.peak_memory(torch.device("cpu")) < 1000


@pytest.mark.slow  # seconds, on meta tensors
def test_figures_of_stable_diffusion_at_512_px():
    """As counted elsewhere for SD-2.1, GFLOP an image."""
    size = train_step.SIZES["sd21"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=size.widths, cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
        )  # fmt: skip
        net = control_encoder(unet)
        vae = AutoencoderKL(
            block_out_channels=size.vae_widths, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip

    def inputs() -> tuple[torch.Tensor, ...]:
        return torch.empty(1, 4, 64, 64), torch.zeros(1).long(), torch.empty(1, 77, 1024)

    def control() -> torch.Tensor:
        down, middle = net(*inputs(), torch.empty(1, 3, 512, 512), return_dict=False)
        return torch.stack([residual.sum() for residual in (*down, middle)]).sum()

    def encode() -> torch.Tensor:
        with torch.no_grad():
            mean = vae.encode(torch.empty(1, 3, 512, 512)).latent_dist.mean
        return torch.zeros((), requires_grad=True) + mean.sum()

    counted = {
        "U-Net": flops.count(lambda: unet(*inputs()).sample.sum(), [unet]),
        "ControlNet": flops.count(control, [net]),
        "VAE": flops.count(encode, [vae]),
    }
    assert {name: round(value / 1e9) for name, value in counted.items()} == {
        "U-Net": 2409, "ControlNet": 849, "VAE": 1117
    }  # fmt: skip
