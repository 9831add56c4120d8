"""Attentional fusion against equations 2-3 worked by hand."""

import math

import pytest
import torch

from tiger.fusion import AttentionalFusion


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def set_branch(branch: torch.nn.Sequential, first: tuple[float, float], last: tuple[float, float]) -> None:
    """Set a one-channel pointwise-ReLU-pointwise branch: (weight, bias) of each convolution."""
    with torch.no_grad():
        for layer, (weight, bias) in ((branch[0], first), (branch[2], last)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)


def randomized(fusion: AttentionalFusion) -> AttentionalFusion:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_()
    return fusion


def test_aff_by_hand():
    fusion = AttentionalFusion([1])
    set_branch(fusion.layers[0].attention.local, (0.5, 0.1), (0.8, -0.3))
    set_branch(fusion.layers[0].attention.context, (-0.2, 0.9), (2.0, 0.05))
    fg = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    bg = torch.tensor([0.0, -2.0]).view(1, 1, 1, 2)
    # S = (1, 1), GAP(S) = 1. Local: 0.8·relu(0.5·1 + 0.1) − 0.3 = 0.18. Global: 2·relu(−0.2·1 + 0.9) + 0.05 = 1.45.
    w = sigmoid(0.18 + 1.45)
    expected = torch.tensor([w * 1 + (1 - w) * 0, w * 3 + (1 - w) * -2]).view(1, 1, 1, 2)
    torch.testing.assert_close(fusion([fg], [bg])[0], expected)


def test_aff_weights_differ_over_the_image():
    fusion = AttentionalFusion([1])
    set_branch(fusion.layers[0].attention.local, (1.0, 0.0), (1.0, 0.0))
    set_branch(fusion.layers[0].attention.context, (1.0, 0.0), (-0.5, 0.0))
    fg = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
    bg = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    # S = (3, 5), GAP = 4: logits 3 − 2 and 5 − 2.
    a, b = sigmoid(1), sigmoid(3)
    expected = torch.tensor([a * 2 + (1 - a), b * 4 + (1 - b)]).view(1, 1, 1, 2)
    torch.testing.assert_close(fusion([fg], [bg])[0], expected)


def test_iaff_by_hand():
    fusion = AttentionalFusion([1], kind="iaff")
    layer = fusion.layers[0]
    set_branch(layer.initial.attention.local, (1.0, 0.0), (1.0, 0.0))
    set_branch(layer.initial.attention.context, (0.0, 0.0), (0.0, 0.0))
    set_branch(layer.attention.local, (1.0, 0.0), (1.0, -1.0))
    set_branch(layer.attention.context, (0.0, 0.0), (0.0, 0.0))
    fg, bg = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)
    inner = sigmoid(4.0)  # from the plain sum
    first = inner * 3 + (1 - inner) * 1
    w = sigmoid(first - 1.0)  # from the first fusion
    torch.testing.assert_close(fusion([fg], [bg])[0].item(), w * 3 + (1 - w) * 1)


@pytest.mark.parametrize("kind", ["aff", "iaff"])
def test_starts_balanced(kind):
    fg, bg = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(AttentionalFusion([8], kind=kind)([fg], [bg])[0], (fg + bg) / 2)
    torch.testing.assert_close(AttentionalFusion([8], kind=kind, gain=2.0)([fg], [bg])[0], fg + bg)


def test_sum_has_nothing_to_train():
    fusion = AttentionalFusion([8, 8], kind="sum")
    fg, bg = [torch.randn(2, 8, 4, 4)] * 2, [torch.randn(2, 8, 4, 4)] * 2
    assert not list(fusion.parameters())
    assert torch.equal(fusion(fg, bg)[1], fg[1] + bg[1])


def test_every_image_of_a_batch_is_fused():
    fusion = randomized(AttentionalFusion([8]))
    fg, bg = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    whole = fusion([fg], [bg])[0]
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], fusion([fg[i : i + 1]], [bg[i : i + 1]])[0])


@pytest.mark.parametrize("kind", ["aff", "iaff", "sum"])
def test_save_and_load(tmp_path, kind):
    fusion = randomized(AttentionalFusion([8, 4], kind=kind, gain=2.0))
    fusion.save_pretrained(str(tmp_path))
    loaded = AttentionalFusion.from_pretrained(str(tmp_path))
    fg, bg = ([torch.randn(1, 8, 4, 4), torch.randn(1, 4, 2, 2)] for _ in range(2))
    for a, b in zip(fusion(fg, bg), loaded(fg, bg), strict=True):
        torch.testing.assert_close(a, b)
    assert fusion.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in fusion.state_dict().items())


def test_unknown_kind():
    with pytest.raises(ValueError, match="aff, iaff, sum"):
        AttentionalFusion([8], kind="mean")
