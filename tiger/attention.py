"""Term-weighted cross-attention: `softmax(W ⊙ QKᵀ/√d) V`, one weight per key token (paper eq. 8-10)."""

import math

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

MODES = ("mult", "logbias", "off")


def term_weight(delta: float, a: float = 0.6, b: float = 5.0) -> float:
    """Equation 9: `ω = a + b / (1 + exp(b·δ))`.

    δ = 0 for a particular term (ω = 3.1), its frequency τ for a joint term, 1 for any other token (ω = 0.633).
    """
    return a + b / (1.0 + math.exp(b * delta))


class TermWeightedAttnProcessor(AttnProcessor2_0):
    """Weigh the attention logits of each key token.

    Reads `term_weights`, (B, L) float > 0, from `cross_attention_kwargs`. Self-attention, and any call without weights,
    runs diffusers' own `AttnProcessor2_0`: diffusers offers the argument to every attention layer.

    mult: logits times ω. Scaling the rows of K by ω is the same thing, so fused attention kernels stay usable.
    logbias: logits plus log ω. It never magnifies negative logits, which `mult` does.
    """

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        term_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) image tokens attend to (B, L, D) text tokens -> (B, N, C)."""
        if encoder_hidden_states is None or term_weights is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None  # true of cross-attention
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query = _split_heads(attn.to_q(hidden_states), attn.heads)  # (B, N, C) -> (B, heads, N, d)
        key = _split_heads(attn.to_k(encoder_hidden_states), attn.heads)  # (B, L, D) -> (B, heads, L, d)
        value = _split_heads(attn.to_v(encoder_hidden_states), attn.heads)

        bias = None
        weights = term_weights.to(key)
        if self.mode == "mult":
            key = key * weights[:, None, :, None]
        else:
            bias = weights.log()[:, None, None, :]  # (B, 1, 1, L), broadcast over heads and queries
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        output = output.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, C)
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor


def _split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, heads·d) -> (B, heads, T, d)"""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def install(model: ControlNetModel, mode: str) -> None:
    """Set the attention processor of every layer of `model`, the middle block included. "off" restores the plain one.

    Processors are not part of a saved model: call this again after loading.
    """
    if mode not in MODES:
        raise ValueError(f"term weighting is one of {', '.join(MODES)}, not {mode!r}")
    model.set_attn_processor(AttnProcessor2_0() if mode == "off" else TermWeightedAttnProcessor(mode))
