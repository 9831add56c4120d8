"""The U-Net in two halves, so that what its encoder found serves several sampling steps.

Encoder features change little from step to step, decoder features much: "Faster Diffusion" (Li et al. 2023,
https://arxiv.org/abs/2312.09608). A step without the encoder needs no ControlNet either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class Features:
    """What the decoder gets: one (B, C_i, h_i, w_i) a skip connection, and the middle block's output."""

    skips: tuple[torch.Tensor, ...]
    middle: torch.Tensor


def encode(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    states: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None,
) -> Features:
    """Encoder and middle block of a Stable Diffusion U-Net, ControlNet residuals added: (B, C, h, w) -> features.

    `decode(unet, encode(unet, …), timestep, states)` is what `unet` returns.
    """
    embedding, states = _embed(unet, sample, timestep, states)
    hidden = unet.conv_in(sample)
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, outputs = block(hidden_states=hidden, temb=embedding, **_text(block, states))
        skips += outputs
    middle = unet.mid_block(hidden, embedding, **_text(unet.mid_block, states))
    if residuals is not None:
        skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        middle = middle + residuals[-1]
    return Features(tuple(skips), middle)


def decode(
    unet: UNet2DConditionModel, features: Features, timestep: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Decoder: features -> (B, C, h, w), as at `timestep`."""
    embedding, states = _embed(unet, features.middle, timestep, states)
    hidden, skips = features.middle, features.skips
    for block in unet.up_blocks:
        count = len(block.resnets)  # type: ignore[arg-type]
        own, skips = skips[-count:], skips[:-count]
        size = skips[-1].shape[2:] if skips else None  # the last block does not upsample
        hidden = block(
            hidden_states=hidden,
            temb=embedding,
            res_hidden_states_tuple=own,
            upsample_size=size,
            **_text(block, states),
        )
    if unet.conv_norm_out is not None and unet.conv_act is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden)


def _embed(
    unet: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(time embedding, text states) as the blocks take them; `sample` gives batch size, device and dtype."""
    time = unet.get_time_embed(sample=sample, timestep=timestep)
    assert time is not None  # None is for U-Nets without a notion of time
    embedding = unet.time_embedding(time)
    added: Any = unet.get_aug_embed(emb=embedding, encoder_hidden_states=states, added_cond_kwargs={})
    if added is not None:
        embedding = embedding + added
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    return embedding, unet.process_encoder_hidden_states(encoder_hidden_states=states, added_cond_kwargs={})


def _text(block: Any, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The text argument of a block that attends to it."""
    return {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
