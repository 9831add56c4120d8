"""What the loop and the stages agree on: the Stage protocol, random draws, noised batches, the validation grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from tiger import diffusion
from tiger.components import Components
from tiger.dataset import sample_latents
from tiger.pipeline import TigerPipeline

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]

# How the validation grid is sampled. The rescaling (arXiv:2305.08891) keeps guided images from being overexposed.
GUIDANCE: dict[str, Any] = {"guidance_scale": 3.0, "guidance_rescale": 0.7}


class SampleNoise:
    """Random draws for one batch, each image from a generator of its own: no draw depends on how batches are cut.

    As NVlabs/edm2's StackedRandomGenerator (https://github.com/NVlabs/edm2/blob/main/generate_images.py).
    """

    def __init__(self, seed: int, step: int, places: range, device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(derive_seed(seed, step, place)) for place in places]

    def randn(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """(B, *shape) standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def rand(self) -> torch.Tensor:
        """(B,) uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g, device=g.device) for g in self.generators])


def derive_seed(*entropy: int) -> int:
    """One 64-bit seed from several integers."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


class Stage(Protocol):
    """What differs between the stages."""

    trainable: torch.nn.Module  # all that is trained, in one module; train() replaces it by accelerate's wrapper
    optimizers: list[torch.optim.Optimizer]  # over the trainable's parameters, at their peak learning rates

    @property
    def read_text(self) -> Callable[[list[str]], torch.Tensor]:
        """What turns prompts into the model's input: a TextCache, unless the text encoder is trained."""
        ...

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Called before each optimizer step with the prompts of the global batch, those of other processes too."""
        ...

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """The scalar to call backward on, and detached scalars to log, "loss" among them."""
        ...

    def flops(self, side: int) -> float:
        """FLOPs of training on one image of `side` pixels."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights being trained."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...

    def validate(self) -> Image.Image:
        """The same images drawn anew from fixed seeds, beside the real ones."""
        ...

    def export(self, folder: Path) -> None:
        """Write a complete diffusers folder."""
        ...


@dataclass(frozen=True)
class Noised:
    """A batch of latents part of the way to noise."""

    latents: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)
    target: torch.Tensor  # (B, C, h, w), what the U-Net should predict
    weights: torch.Tensor | None  # (B,) min-SNR weights


def noised(
    components: Components,
    moments: torch.Tensor,
    noise: SampleNoise,
    snr_gamma: float | None,
    timestep_sampling: str = "uniform",
    noise_offset: float = 0.0,
    stride: int = 1,
) -> Noised:
    """Draw latents from the VAE's moments (B, 2C, h, w), a timestep for each image, and noise them.

    noise_offset: standard deviation of what is added to the noise of a whole channel, so that overall brightness is
    learned too (Guttenberg 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise). stride: only the last of
    every so many timesteps is drawn.
    """
    schedule = components.noise_schedule
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    latents = sample_latents(components.vae, moments, noise.randn(shape))
    timesteps = diffusion.timesteps(noise.rand(), schedule.config["num_train_timesteps"], timestep_sampling)
    timesteps = timesteps // stride * stride + stride - 1
    epsilon = noise.randn(shape)
    if noise_offset:
        epsilon = epsilon + noise_offset * noise.randn((shape[0], 1, 1))
    return Noised(
        latents=diffusion.add_noise(schedule, latents, epsilon, timesteps),
        timesteps=timesteps,
        target=diffusion.target(schedule, latents, epsilon, timesteps),
        weights=diffusion.min_snr_weights(schedule, timesteps, snr_gamma) if snr_gamma else None,
    )


def draw(pipeline: TigerPipeline, shown: Sequence[dict[str, Any]], steps: int, **options: Any) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] for data set items, always from the same seeds."""
    pipeline.set_progress_bar_config(disable=True)
    images: Any = pipeline(
        [item["text_fg"] for item in shown],
        [item["text_bg"] for item in shown],
        num_inference_steps=steps,
        generator=[torch.Generator(pipeline.device).manual_seed(seed) for seed in range(len(shown))],
        output_type="pt",
        **(GUIDANCE | options),
    ).images
    return images


def image_grid(rows: Sequence[torch.Tensor]) -> Image.Image:
    """Rows of images, (B, 1 or 3, H, W) in [0, 1] each, the first on top."""
    lines = [torch.cat(list(row.detach().cpu().float().expand(-1, 3, -1, -1)), dim=-1) for row in rows]  # (3, H, B·W)
    pixels = torch.cat(lines, dim=-2).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
