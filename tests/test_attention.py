"""Term-weighted cross-attention against equation 8 written out."""

import functools

import pytest
import torch
from conftest import make_unet
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tiger import attention
from tiger.attention import TermWeightedAttnProcessor, term_weight
from tiger.model import control_encoder


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, bias=False).double()


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image tokens (2, 5, 16), text tokens (2, 7, 12), weights (2, 7)."""
    torch.manual_seed(1)
    return torch.randn(2, 5, 16).double(), torch.randn(2, 7, 12).double(), torch.rand(2, 7).double() * 3 + 0.1


def explicit(layer: Attention, image: torch.Tensor, text: torch.Tensor, logits_of) -> torch.Tensor:
    """softmax(logits_of(QKᵀ/√d)) V, head by head, then the output layer."""
    query, key, value = layer.to_q(image), layer.to_k(text), layer.to_v(text)
    heads = []
    for start in (0, 8):
        q, k, v = (x[..., start : start + 8] for x in (query, key, value))
        logits = q @ k.transpose(1, 2) / 8**0.5  # (B, N, L)
        heads.append(torch.softmax(logits_of(logits), dim=-1) @ v)
    return layer.to_out[0](torch.cat(heads, dim=-1))


def test_mult_equals_weighted_logits(layer, tokens):
    image, text, weights = tokens
    layer.set_processor(TermWeightedAttnProcessor("mult"))
    result = layer(image, text, term_weights=weights)
    torch.testing.assert_close(result, explicit(layer, image, text, lambda x: weights[:, None] * x), rtol=0, atol=1e-14)


def test_logbias_adds_log_weights(layer, tokens):
    image, text, weights = tokens
    layer.set_processor(TermWeightedAttnProcessor("logbias"))
    result = layer(image, text, term_weights=weights)
    expected = explicit(layer, image, text, lambda x: x + weights.log()[:, None])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["mult", "logbias"])
def test_unit_weights_change_nothing(layer, tokens, mode):
    image, text, weights = tokens
    plain = layer(image, text)
    layer.set_processor(TermWeightedAttnProcessor(mode))
    torch.testing.assert_close(layer(image, text, term_weights=torch.ones_like(weights)), plain)
    assert not torch.allclose(layer(image, text, term_weights=weights), plain)


def test_self_attention_ignores_weights():
    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    image = torch.randn(2, 7, 16)
    plain = layer(image)
    layer.set_processor(TermWeightedAttnProcessor("mult"))
    assert torch.equal(layer(image, term_weights=torch.rand(2, 7)), plain)


def test_weights_reach_every_cross_attention_and_no_other(layout, monkeypatch):
    net = control_encoder(make_unet(layout))
    attention.install(net, "mult")
    names = {module: name for name, module in net.named_modules() if isinstance(module, Attention)}
    weighted = set()
    original = TermWeightedAttnProcessor.__call__

    @functools.wraps(original)  # diffusers reads the signature
    def record(self, attn, hidden_states, encoder_hidden_states=None, *args, term_weights=None, **kwargs):
        if encoder_hidden_states is not None and term_weights is not None:
            weighted.add(names[attn])
        return original(self, attn, hidden_states, encoder_hidden_states, *args, term_weights=term_weights, **kwargs)

    monkeypatch.setattr(TermWeightedAttnProcessor, "__call__", record)
    channels = net.config.in_channels
    net(
        torch.randn(1, channels, 8, 8),
        torch.tensor([5]),
        torch.randn(1, 77, 16),
        torch.rand(1, 3, 64, 64),
        cross_attention_kwargs={"term_weights": torch.ones(1, 77)},
    )
    assert weighted == {name for name in names.values() if name.endswith("attn2")}
    assert any(name.startswith("mid_block") for name in weighted)


def test_off_restores_the_plain_processor():
    net = control_encoder(make_unet("sd15"))
    attention.install(net, "mult")
    assert {type(p) for p in net.attn_processors.values()} == {TermWeightedAttnProcessor}
    attention.install(net, "off")
    assert {type(p) for p in net.attn_processors.values()} == {AttnProcessor2_0}
    with pytest.raises(ValueError, match="mult, logbias, off"):
        attention.install(net, "both")


def test_equation_9():
    assert term_weight(0.0) == pytest.approx(3.10)
    assert term_weight(1.0) == pytest.approx(0.633, abs=5e-4)
    assert term_weight(0.01) > term_weight(0.1) > term_weight(0.5)  # rarer weighs more
