"""Tiny random models, made offline, in the layouts that Tiger has to support."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiger.model import DualControlNet
from tiger.tokenizer import build_clip_tokenizer

TEXT_WIDTH = 16
LAYOUTS = ("sd15", "sd21", "tiny")
COUNTS_FLOPS = ("test_flops", "test_fine", "test_train_step")


def make_unet(layout: str, seed: int = 0) -> UNet2DConditionModel:
    """A random U-Net, width 16-32: "sd15" and "sd21" with Stable Diffusion's levels, "tiny" like the embedded base."""
    torch.manual_seed(seed)
    shared = {"cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8}
    if layout == "tiny":
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            block_out_channels=(16, 16, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            **shared,
        )
    heads = (1, 2, 2, 2) if layout == "sd21" else 2
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        attention_head_dim=heads,
        use_linear_projection=layout == "sd21",
        **shared,
    )


def make_scheduler(layout: str) -> DDIMScheduler:
    """ε-prediction for "sd15"; v for "sd21"; v with zero terminal SNR and trailing steps for "tiny"."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    if layout == "sd15":
        return DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False)
    if layout == "sd21":
        return DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, prediction_type="v_prediction")
    return DDIMScheduler(
        **betas, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def make_vae(latent_channels: int) -> AutoencoderKL:
    """A random VAE with factor 8: 64 px -> 8×8 latents."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
    )


def make_text_encoder() -> CLIPTextModel:
    """A random two-layer CLIP text encoder with the real vocabulary."""
    torch.manual_seed(2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    ).eval()


def awaken(model: DualControlNet, seed: int = 3) -> DualControlNet:
    """Give the zero convolutions and the fusion random weights, so that every part matters, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", autouse=True)
def uncounted_flops(request: pytest.FixtureRequest) -> Iterator[None]:
    """To count a step's FLOPs, as each training does first, takes seconds: more than a tiny model's steps.

    Processes that tests start count theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in COUNTS_FLOPS:
            patch.setattr("tiger.flops.count", lambda run, modules: 10**9)
        yield


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Each layout in turn."""
    return request.param


@pytest.fixture
def dual() -> Callable[..., DualControlNet]:
    """Build an awakened DualControlNet for a U-Net: `dual(unet, term_weighting=…, fusion=…)`."""
    return lambda unet, **options: awaken(DualControlNet.from_unet(unet, **options))


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """CLIP's real tokenizer."""
    return build_clip_tokenizer()


@pytest.fixture(scope="session")
def text_encoder() -> CLIPTextModel:
    """See make_text_encoder."""
    return make_text_encoder()


def pytest_addoption(parser: pytest.Parser) -> None:
    """See tests/test_golden.py."""
    parser.addoption("--golden-write", action="store_true", help="write tests/golden.json anew")
