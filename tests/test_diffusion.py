"""Noise, targets and losses against their formulas."""

import math

import pytest
import torch
from conftest import make_scheduler

from tiger import diffusion


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise (3, 4, 8, 8) and timesteps."""
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])


def coefficients(scheduler, timesteps):
    """√ᾱ and √(1−ᾱ), (B, 1, 1, 1)."""
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_noise_and_target(layout, batch):
    latents, noise, timesteps = batch
    scheduler = make_scheduler(layout)
    signal, spread = coefficients(scheduler, timesteps)
    noised = diffusion.add_noise(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(noised, signal * latents + spread * noise)
    expected = noise if layout == "sd15" else signal * noise - spread * latents
    torch.testing.assert_close(diffusion.target(scheduler, latents, noise, timesteps), expected)


def test_zero_terminal_snr_leaves_only_noise(batch):
    latents, noise, timesteps = batch
    noised = diffusion.add_noise(make_scheduler("tiny"), latents, noise, timesteps)
    assert torch.allclose(noised[2], noise[2], atol=1e-6)


def test_unknown_prediction_type(batch):
    scheduler = make_scheduler("sd15")
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="sample"):
        diffusion.target(scheduler, *batch)


@pytest.mark.parametrize(("sampling", "below"), [("uniform", 0.5), ("cubic", 1 - 0.5 ** (1 / 3))])
def test_timesteps(sampling, below):
    timesteps = diffusion.timesteps(torch.linspace(0, 1, 100_001)[:-1], 1000, sampling)
    assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
    assert abs((timesteps < 500).float().mean() - below) < 1e-3  # P(1 − u³ < ½) = 1 − ½^⅓
    with pytest.raises(ValueError, match="sigmoid"):
        diffusion.timesteps(torch.zeros(1), 1000, "sigmoid")


def test_min_snr_formulas():
    timesteps = torch.tensor([10, 300, 700])
    for layout, shift in (("sd15", 0), ("sd21", 1)):
        scheduler = make_scheduler(layout)
        alpha_bar = scheduler.alphas_cumprod[timesteps].tolist()
        expected = [min(a / (1 - a), 5) / (a / (1 - a) + shift) for a in alpha_bar]
        torch.testing.assert_close(diffusion.min_snr_weights(scheduler, timesteps, 5.0), torch.tensor(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_where_the_snr_is_zero(prediction_type):
    scheduler = make_scheduler("tiny")
    scheduler.register_to_config(prediction_type=prediction_type)
    assert scheduler.alphas_cumprod[999] == 0
    weights = diffusion.min_snr_weights(scheduler, torch.arange(1000), 5.0)
    assert torch.isfinite(weights).all()
    assert weights.min() >= 0 and weights.max() <= 1


def square(size: int, top: int, left: int, side: int) -> torch.Tensor:
    """(1, 1, size, size) mask with one square."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., top : top + side, left : left + side] = 1
    return mask


def test_latent_mask_keeps_half_covered_cells():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 0:8, 0:12] = 1  # cell (0, 0) covered, cell (0, 1) by half
    mask[..., 8:11, 0:8] = 1  # cell (1, 0) by three eighths
    assert diffusion.latent_mask(mask, (2, 2)).tolist() == [[[[1, 1], [0, 0]]]]


def test_a_vanishing_mask_counts_as_one_cell():
    mask = torch.cat([square(64, 30, 37, 2), square(64, 0, 0, 64), torch.zeros(1, 1, 64, 64)])
    small = diffusion.latent_mask(mask, (8, 8))
    assert small.sum((1, 2, 3)).tolist() == [1, 64, 0]
    assert small[0, 0, 3, 4] == 1  # rows 30-31 lie in cell 3, columns 37-38 in cell 4


def test_losses_by_hand():
    prediction, goal = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)
    goal[0, :, 0, 0] = torch.tensor([1.0, 3.0])  # squared error, mean over channels: 5
    goal[0, :, 1, 1] = 2.0  # 4
    goal[1, :, 0, 1] = 1.0  # 1
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0] = 1  # first image: top row, errors 5 and 0; below 0 and 4
    mask[1, 0, 0, 1] = 1  # second: one cell, error 1; elsewhere 0
    l_fg, l_bg = diffusion.masked_losses(prediction, goal, mask)
    assert l_fg.item() == pytest.approx((5 / 2 + 1) / 2)
    assert l_bg.item() == pytest.approx((4 / 2 + 0) / 2)
    _, full = diffusion.masked_losses(prediction, goal, mask, bg_region="full")
    assert full.item() == pytest.approx((9 / 4 + 1 / 4) / 2)
    weighted, _ = diffusion.masked_losses(prediction, goal, mask, weights=torch.tensor([0.5, 2.0]))
    assert weighted.item() == pytest.approx((0.5 * 5 / 2 + 2 * 1) / 2)
    assert diffusion.loss(prediction, goal).item() == pytest.approx(torch.nn.functional.mse_loss(prediction, goal))
    emphasis = 1 + 2 * mask.repeat_interleave(4, 2).repeat_interleave(4, 3)  # 3 in the nodule, at the image's size
    expected = ((3 * 5 + 4) / 8 + 3 * 1 / 6) / 2
    assert diffusion.loss(prediction, goal, emphasis=emphasis).item() == pytest.approx(expected)


def test_losses_are_finite_without_a_region():
    error = torch.ones(1, 2, 4, 4)
    for mask in (torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)):
        losses = diffusion.masked_losses(error, torch.zeros_like(error), mask)
        assert all(math.isfinite(value) for value in losses)
        assert sorted(float(value) for value in losses) == [0, 1]
