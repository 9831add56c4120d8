"""Checkpoints are whole or absent, and optimizers come back bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch

from tiger import checkpoint


def write(text: str):
    def fill(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return fill


def test_the_newest_valid_one_is_found_and_torn_ones_are_named(tmp_path, capsys):
    for step in (5, 10, 15, 20, 25):
        checkpoint.save(tmp_path, step, write(f"step {step}"))
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "checkpoint-25"
    (tmp_path / "checkpoint-25" / "part" / "weights").write_text("step")  # cut short
    (tmp_path / "checkpoint-20" / "part" / "weights").unlink()
    (tmp_path / "checkpoint-15" / "manifest.json").write_text("{")
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "checkpoint-10"
    warned = capsys.readouterr().err
    assert all(f"checkpoint-{step} is damaged" in warned for step in (25, 20, 15))


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest_valid(tmp_path) is None
    assert checkpoint.newest_valid(tmp_path / "nowhere") is None


def test_a_failed_save_leaves_the_old_ones_and_no_litter(tmp_path):
    checkpoint.save(tmp_path, 1, write("one"))

    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 2, full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_torn_one_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, write("one"))
    (tmp_path / "checkpoint-1" / "part" / "weights").write_text("")
    checkpoint.save(tmp_path, 1, write("again"))
    assert checkpoint.find_problem(tmp_path / "checkpoint-1") is None


def test_rotation_keeps_the_highest_steps(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, write("x"))
    (tmp_path / ".checkpoint-11.abc").mkdir()  # what a killed save leaves
    checkpoint.rotate(tmp_path, 2, newest=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 3, generator=generator)).square().mean().backward()
    optimizer.step()


def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def test_an_optimizer_continues_bit_equal(tmp_path):
    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    checkpoint.save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    other, restored = make()
    other.load_state_dict(model.state_dict())
    checkpoint.load_optimizer(restored, tmp_path / "optimizer.safetensors")
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, restored, seed)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_an_optimizer_before_its_first_step(tmp_path):
    _, optimizer = make()
    checkpoint.save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    checkpoint.load_optimizer(optimizer, tmp_path / "optimizer.safetensors")


def export(text: str, parts: tuple[str, ...] = ("unet", "vae")):
    def write_parts(folder: Path) -> None:
        for part in parts:
            (folder / part).mkdir()
            (folder / part / "weights").write_text(text)
        (folder / "model_index.json").write_text("{}")

    return write_parts


def test_publishing_replaces_an_older_model(tmp_path):
    checkpoint.publish(tmp_path, 3, export("old"))
    assert checkpoint.finished_step(tmp_path) == 3
    checkpoint.publish(tmp_path, 6, export("new"))
    assert (tmp_path / "vae" / "weights").read_text() == "new"
    assert checkpoint.finished_step(tmp_path) == 6


def test_a_crash_while_publishing_leaves_no_model(tmp_path, monkeypatch):
    checkpoint.publish(tmp_path, 3, export("old"))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(tmp_path, 6, export("new"))
    assert checkpoint.finished_step(tmp_path) == 0
    assert not (tmp_path / "model_index.json").exists()
