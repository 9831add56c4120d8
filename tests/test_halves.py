"""The U-Net in two halves is the U-Net."""

import pytest
import torch
from conftest import TEXT_WIDTH, make_unet

from tiger.halves import decode, encode
from tiger.model import control_encoder, unet_with_residuals


@pytest.mark.parametrize("size", [(8, 8), (10, 13)])  # the second makes the decoder upsample to odd sizes
@torch.no_grad()
def test_halves_make_the_whole(layout: str, size: tuple[int, int]) -> None:
    unet = make_unet(layout)
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, unet.config["in_channels"], *size, generator=generator)
    states = torch.randn(2, 77, TEXT_WIDTH, generator=generator)
    timestep = torch.tensor(500)
    features = encode(unet, sample, timestep, states, None)
    torch.testing.assert_close(
        decode(unet, features, timestep, states), unet_with_residuals(unet, sample, timestep, states, None)
    )
    assert len(features.skips) == len(control_encoder(unet).controlnet_down_blocks)
    residuals = [torch.randn(x.shape, generator=generator) for x in (*features.skips, features.middle)]
    steered = decode(unet, encode(unet, sample, timestep, states, residuals), timestep, states)
    torch.testing.assert_close(steered, unet_with_residuals(unet, sample, timestep, states, residuals))
