"""AdamW with moments in 8 bits: bitsandbytes, where it is installed."""

import importlib.util

import pytest
import torch
from training_samples import flags

from tiger import checkpoint
from tiger.config import PretrainConfig, parse
from tiger.errors import InputError
from tiger.optimizer import adamw

NAMES = {"pretrained_model": "base", "data_dir": "data", "output_dir": "out"}


def train(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in its layout, as autograd makes it
        optimizer.step()


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = (64, 64, 3, 3), (10,)  # bitsandbytes leaves small ones in 32 bits
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    made[0].data = made[0].data.contiguous(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("eight_bit", [False, True])
def test_resuming_is_bit_equal(eight_bit, tmp_path):
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    whole, cut = parameters(), parameters()
    optimizer = adamw(whole, 1e-2, 0.01, eight_bit)
    train(whole, optimizer, range(4))
    first = adamw(cut, 1e-2, 0.01, eight_bit)
    train(cut, first, range(2))
    checkpoint.save_optimizer(first, tmp_path / "optimizer.safetensors")
    second = adamw(cut, 1e-2, 0.01, eight_bit)
    checkpoint.load_optimizer(second, tmp_path / "optimizer.safetensors")
    train(cut, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_moments_take_a_quarter_of_the_memory(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes, trained = [], []
    for eight_bit in (False, True):
        made = parameters()
        optimizer = adamw(made, 1e-2, 0.01, eight_bit)
        train(made, optimizer, range(2))
        checkpoint.save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
        sizes.append((tmp_path / "optimizer.safetensors").stat().st_size)
        trained.append(made)
    assert sizes[1] < 0.35 * sizes[0]
    for exact, rounded in zip(*trained, strict=True):
        assert (exact - rounded).abs().mean() < 1e-3  # after two steps of up to 1e-2


def test_what_is_missing_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'bitsandbytes"):
        parse(PretrainConfig, flags(**NAMES, use_8bit_adam="true"))
