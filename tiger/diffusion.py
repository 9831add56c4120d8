"""Timesteps, noise, targets, weights and losses: pure functions.

Latents are (B, C, h, w), timesteps (B,) int64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

Scheduler = DDIMScheduler | DDPMScheduler


def timesteps(uniform: torch.Tensor, count: int, sampling: str = "uniform") -> torch.Tensor:
    """(B,) uniform draws in [0, 1) -> (B,) timesteps in 0..count-1.

    "uniform", or "cubic": `t = (1 − u³)·T`, mostly noisy steps, where conditions decide what an image shows
    (T2I-Adapter, Mou et al. 2023, https://arxiv.org/abs/2302.08453, §3.3).
    """
    if sampling == "cubic":
        uniform = 1 - uniform**3
    elif sampling != "uniform":
        raise ValueError(f"sampling is uniform or cubic, not {sampling!r}")
    return (uniform * count).long().clamp(0, count - 1)


def add_noise(
    scheduler: Scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """`z_t = √ᾱ_t·z + √(1−ᾱ_t)·ε`, (B, C, h, w) float32: half precision cannot tell √(1−ᾱ) of the last steps."""
    return scheduler.add_noise(latents.float(), noise.float(), timesteps)  # type: ignore[arg-type]  # diffusers narrows to IntTensor


def target(scheduler: Scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the U-Net is trained to predict: ε, or `v = √ᾱ_t·ε − √(1−ᾱ_t)·z`, as the scheduler's config says (eq. 4)."""
    prediction_type = scheduler.config["prediction_type"]
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents.float(), noise.float(), timesteps)  # type: ignore[arg-type]
    raise ValueError(f"prediction_type is epsilon or v_prediction, not {prediction_type!r}")


def min_snr_weights(scheduler: Scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-γ weights (B,) in (0, 1] (Hang et al. 2023, https://arxiv.org/abs/2303.09556, §3.4).

    ε: min(SNR, γ)/SNR;  v: min(SNR, γ)/(SNR + 1). With a zero-terminal-SNR schedule the SNR is 0 at the last step,
    where the ε form would divide by zero: it is clamped, which gives the limit, 1. The v form gives that step next to
    no weight.
    """
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = (alpha_bar / (1.0 - alpha_bar)).clamp(min=1e-8)
    shift = 1.0 if scheduler.config["prediction_type"] == "v_prediction" else 0.0
    return snr.clamp(max=gamma) / (snr + shift)


def latent_mask(mask: torch.Tensor, size: Any) -> torch.Tensor:
    """(B, 1, H, W) 0/1 -> (B, 1, h, w) 0/1 for `size` = (h, w): the cells that the mask covers at least half.

    A mask that covers half of no cell keeps the one it covers most. An empty mask stays empty.
    """
    cover = F.adaptive_avg_pool2d(mask.float(), tuple(size))  # share of each cell inside the mask
    kept = cover >= 0.5
    cells = torch.arange(cover[0].numel(), device=cover.device)
    fullest = (cells == cover.flatten(1).argmax(1, keepdim=True)).view_as(cover)  # one cell an image
    vanished = ~kept.flatten(1).any(1)[:, None, None, None] & (cover > 0)
    return (kept | (fullest & vanished)).to(mask.dtype if mask.is_floating_point() else torch.float32)


def masked_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    bg_region: str = "outside",
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`L_FG`: mean squared error over the nodule; `L_BG`: over the rest ("outside") or the whole image ("full").

    mask: (B, 1, H, W) 0/1, any size. Each image counts alike, however large its nodule. weights: (B,) or None.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)  # (B, C, h, w) -> (B, 1, h, w)
    fg = latent_mask(mask, error.shape[-2:]).to(error)
    bg = torch.ones_like(fg) if bg_region == "full" else 1.0 - fg
    return _region_mean(error, fg, weights), _region_mean(error, bg, weights)


def loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    emphasis: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error over everything (eq. 4), images weighted by `weights` (B,).

    emphasis: (B, 1, H, W) positive weights of each image's pixels, any size; None: all alike.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    cells = torch.ones_like(error)
    if emphasis is not None:
        cells = F.adaptive_avg_pool2d(emphasis, (error.shape[-2], error.shape[-1]))
    return _region_mean(error, cells, weights)


def _region_mean(error: torch.Tensor, region: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean of `error` over `region`, both (B, 1, h, w), an image; then the (weighted) mean over images: a scalar."""
    mean = (error * region).sum((1, 2, 3)) / region.sum((1, 2, 3)).clamp(min=1.0)  # (B,)
    return mean.mean() if weights is None else (mean * weights).mean()
