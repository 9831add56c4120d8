"""The loop, on a toy stage of a few numbers."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tiger import checkpoint
from tiger.errors import WorkFailed
from tiger.guard import apply
from tiger.stage import SampleNoise, image_grid
from tiger.tracking import drop_lines_after, start_trackers
from tiger.trainer import Ema, lr_factor, set_rates, train

ROWS = 10


class ToyData(torch.utils.data.Dataset):
    """Row i is the number i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor(float(index))}

    def texts(self, index: int) -> dict[str, str]:
        return {"text": str(index)}

    def row(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(file_name=f"{index}.png")


class ToyStage:
    """Fits a line to noisy numbers; `at_step` is called before each loss."""

    def __init__(self, at_step=lambda step: None, dropout: float = 0.0):
        self.dropout = dropout
        torch.manual_seed(0)
        self.trainable: nn.Module = nn.Linear(1, 1)
        self.model = self.trainable
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)]
        self.at_step = at_step
        self.global_batches: list[list[str]] = []

    def begin_step(self, texts) -> None:
        self.global_batches.append([text["text"] for text in texts])

    def loss(self, batch, noise: SampleNoise, step: int):
        self.at_step(step)
        x = batch["x"][:, None]
        drop = nn.functional.dropout(torch.ones_like(x), self.dropout)  # draws from torch's global generator
        error = drop * self.trainable(x / ROWS + 0.1 * noise.randn((1,))) - 2 * x
        loss = error.square().mean()
        return loss, {"loss": loss.detach()}

    def save(self, folder: Path) -> None:
        save_file(self.model.state_dict(), folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def validate(self) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def export(self, folder: Path) -> None:
        self.save(folder)
        (folder / "model_index.json").write_text("{}")


def fit(
    output_dir: Path, stage: ToyStage | None = None, accelerator: Accelerator | None = None, **changes: Any
) -> bool:
    output_dir.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "max_train_steps": 6, "train_batch_size": 4, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine",
        "lr_warmup_steps": 2, "max_grad_norm": 1.0, "max_loss": 1000.0, "skip_bad_steps": 0, "ema_decay": 0.99,
        "seed": 0, "checkpointing_steps": 2,
        "checkpoints_total_limit": 9, "validation_steps": 0, "log_steps": 2, "dataloader_num_workers": 0,
    }  # fmt: skip
    data: Any = ToyData()
    return train(
        accelerator or Accelerator(cpu=True),
        stage or ToyStage(),
        data,
        None,
        output_dir=output_dir,
        config_text="",
        card="",
        **options | changes,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    pass


def kill_at(step: int):
    def at_step(now: int) -> None:
        if now == step:
            raise Killed

    return at_step


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_killed_run_ends_bit_equal(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    fit(tmp_path / "whole", ToyStage(dropout=0.5), **options)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", ToyStage(kill_at(3), dropout=0.5), **options)
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*")) == ["checkpoint-2"]
    assert fit(tmp_path / "cut", ToyStage(dropout=0.5), **options)
    assert same(tmp_path / "whole", tmp_path / "cut")
    for name in ("model", "ema", "optimizer-0"):
        first, second = (load_file(tmp_path / run / "checkpoint-6" / f"{name}.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_metrics_hold_each_step_once_after_a_resume(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, ToyStage(kill_at(5)), checkpointing_steps=3)  # logged up to 4, saved at 3
    fit(tmp_path, checkpointing_steps=3)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]  # a checkpoint closes a window: its mean is whole again
    assert {"loss", "grad_norm", "learning_rate", "images_per_second"} <= lines[0].keys()


def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys):
    fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "cut", ToyStage(kill_at(5)))
    (tmp_path / "cut" / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    fit(tmp_path / "cut")
    assert "checkpoint-4 is damaged" in capsys.readouterr().err
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_accumulation_is_a_larger_batch(tmp_path):
    small, large = ToyStage(), ToyStage()
    fit(tmp_path / "small", small, train_batch_size=2, gradient_accumulation_steps=2)
    fit(tmp_path / "large", large, train_batch_size=4, gradient_accumulation_steps=1)
    for name, value in weights(tmp_path / "small").items():
        assert torch.allclose(value, weights(tmp_path / "large")[name], atol=1e-6)
    assert small.global_batches == large.global_batches and len(small.global_batches[0]) == 4
    norms = [read_log(tmp_path / run)[0] for run in ("small", "large")]
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"])


def test_the_average_is_what_is_published(tmp_path):
    fit(tmp_path)
    raw, average = weights(tmp_path / "checkpoint-6"), load_file(tmp_path / "checkpoint-6" / "ema.safetensors")
    assert torch.equal(weights(tmp_path)["weight"], average["weight"])
    assert not torch.equal(weights(tmp_path)["weight"], raw["weight"])


def test_a_longer_run_goes_on(tmp_path):
    fit(tmp_path, max_train_steps=4, lr_scheduler="constant")
    stage = ToyStage()
    fit(tmp_path, stage, max_train_steps=6, lr_scheduler="constant")
    assert len(stage.global_batches) == 2
    fit(tmp_path / "whole", lr_scheduler="constant")
    assert same(tmp_path, tmp_path / "whole")


def poisoned(value: float, *steps: int) -> ToyStage:
    """A stage whose loss is `value` in some steps (from 0)."""
    stage = ToyStage()
    stage.loss = lambda batch, noise, step: scaled(
        ToyStage.loss(stage, batch, noise, step), value if step in steps else 1
    )
    return stage


def scaled(losses: tuple[torch.Tensor, dict[str, torch.Tensor]], factor: float):
    loss = losses[0] * factor
    return loss, {"loss": loss.detach()}


NAN = float("nan")


@pytest.mark.parametrize(("factor", "named"), [(NAN, "loss nan, gradient norm nan"), (1e4, r"loss \d.*e\+0\d")])
def test_a_diverged_run_names_step_and_images_and_saves_nothing_bad(tmp_path, factor, named):
    stage = poisoned(factor, 4)
    with pytest.raises(WorkFailed, match=rf"step 5 went wrong: {named}.* on .*\.png.*--skip_bad_steps") as error:
        fit(tmp_path, stage, checkpointing_steps=3)
    assert all(f"{text}.png" in str(error.value) for text in stage.global_batches[4])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]


def test_a_bad_step_is_skipped_as_if_it_had_not_been(tmp_path, capsys):
    """Weights and optimizer stay bit for bit; the log counts the good steps alone."""
    stage = poisoned(float("nan"), 2)
    assert fit(tmp_path, stage, skip_bad_steps=1, checkpointing_steps=1, log_steps=6)
    assert "warning: step 3 went wrong: loss nan" in capsys.readouterr().err
    assert same(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    assert not same(tmp_path / "checkpoint-3", tmp_path / "checkpoint-4")
    before, after = (load_file(tmp_path / f"checkpoint-{n}" / "optimizer-0.safetensors") for n in (2, 3))
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and after["0.step"] == 2
    assert all(isinstance(line["loss"], float) and line["loss"] == line["loss"] for line in read_log(tmp_path))


def test_more_bad_steps_in_a_row_than_allowed_end_it(tmp_path):
    fit(tmp_path / "apart", poisoned(float("nan"), 1, 3, 5), skip_bad_steps=1)
    with pytest.raises(WorkFailed, match="step 3 went wrong"):
        fit(tmp_path / "together", poisoned(float("nan"), 1, 2), skip_bad_steps=1)


def test_an_optimizer_without_a_device_flag_skips_too():
    weight = nn.Parameter(torch.ones(1))
    for optimizer in (torch.optim.SGD([weight], lr=1.0), torch.optim.AdamW([weight], lr=1.0, fused=True)):
        for bad in (1.0, 0.0):
            weight.grad, before = torch.ones(1), weight.item()
            apply([optimizer], torch.tensor(bad))
            assert (weight.item() == before) == bool(bad)


@pytest.fixture
def fp16() -> Iterator[Accelerator]:
    """An accelerator with a gradient scaler, which accelerate makes for GPUs alone."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    yield accelerator
    AcceleratorState._reset_state(True)


def test_with_fp16_a_loss_too_high_changes_nothing_and_leaves_the_scale(tmp_path, fp16, capsys):
    """The loss is finite, and so are its gradients: the scaler alone would take the step."""
    options = {"skip_bad_steps": 1, "checkpointing_steps": 1}
    assert fit(tmp_path, poisoned(10.0, 2), fp16, max_loss=200.0, **options)
    assert "warning: step 3 went wrong" in capsys.readouterr().err
    assert same(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    assert not same(tmp_path / "checkpoint-3", tmp_path / "checkpoint-4")
    scales = [json.loads((tmp_path / f"checkpoint-{n}" / "scaler.json").read_text())["scale"] for n in (1, 2, 3, 6)]
    assert scales == [64, 128, 128, 512]  # doubled after every second step without an overflow


def test_with_fp16_an_overflow_is_left_to_the_scaler(tmp_path, fp16, capsys):
    assert fp16.scaler is not None
    fp16.scaler.load_state_dict(fp16.scaler.state_dict() | {"scale": 2.0**126})
    assert fit(tmp_path, accelerator=fp16, checkpointing_steps=1)
    assert "went wrong" not in capsys.readouterr().err
    assert same(tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    scales = [json.loads((tmp_path / f"checkpoint-{n}" / "scaler.json").read_text())["scale"] for n in (1, 2)]
    assert scales == [2.0**125, 2.0**124]
    assert all(line["grad_norm"] < 1e9 for line in read_log(tmp_path))


def test_with_fp16_several_optimizers_share_one_scale():
    """Each takes its gradients unscaled once, and the scale grows once a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([weight], lr=1.0, fused=True) for weight in weights]
    scaler.scale(sum(weights)).backward()  # type: ignore[arg-type, union-attr]
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    apply(optimizers, torch.zeros(()), scaler)
    assert [weight.item() for weight in weights] == [-1, -1, -1] and scaler.get_scale() == 128


def test_sigterm_saves_and_resume_is_bit_equal(tmp_path):
    def terminate(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert not fit(tmp_path / "cut", ToyStage(terminate), checkpointing_steps=100)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "cut" / "checkpoint-3").is_dir()
    assert fit(tmp_path / "cut", checkpointing_steps=100)
    fit(tmp_path / "whole", checkpointing_steps=100)
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_validation_changes_nothing(tmp_path):
    fit(tmp_path / "plain")
    fit(tmp_path / "shown", validation_steps=4)
    assert same(tmp_path / "plain", tmp_path / "shown")
    assert sorted(path.name for path in (tmp_path / "shown" / "validation").iterdir()) == ["step-4.png", "step-6.png"]


def test_a_grid_that_a_kill_prevented_is_drawn_on_resume(tmp_path):
    stage = ToyStage()
    stage.validate = lambda: (_ for _ in ()).throw(Killed())
    with pytest.raises(Killed):
        fit(tmp_path, stage, validation_steps=4)
    stage = ToyStage()
    fit(tmp_path, stage, validation_steps=4)
    assert (tmp_path / "validation" / "step-4.png").exists() and len(stage.global_batches) == 2


def test_a_torn_newest_checkpoint_never_costs_the_valid_one(tmp_path):
    """With a limit of one, the torn checkpoint of a later step must not push out what was just saved."""
    with pytest.raises(Killed):
        fit(tmp_path, ToyStage(kill_at(5)), checkpointing_steps=2)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Killed):
        fit(tmp_path, ToyStage(kill_at(3)), checkpointing_steps=1, checkpoints_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "checkpoint-3"


def test_reading_ahead_changes_nothing(tmp_path):
    fit(tmp_path / "plain")
    fit(tmp_path / "ahead", dataloader_num_workers=1)
    assert same(tmp_path / "plain", tmp_path / "ahead")


def test_learning_rates():
    assert [lr_factor("constant", step, 4, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    assert lr_factor("linear", 10, 10, 110) == 1 and lr_factor("linear", 60, 10, 110) == 0.5
    assert lr_factor("cosine", 60, 10, 110) == pytest.approx(0.5) and lr_factor("cosine", 110, 10, 110) == 0
    assert lr_factor("cosine", 85, 10, 110) == pytest.approx(0.1464466)


def test_every_optimizer_follows_the_schedule():
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1, 0.4)
    ]
    set_rates(optimizers, [[0.1], [0.4]], 0.5)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.05, 0.2]


def test_the_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(dict(model.named_parameters()), max_decay=0.15)
    for step, value in enumerate((1.0, 2.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(step)
    expected = 0.15 * (0.9 * 1.0) + 0.85 * 2.0  # decay 1/10, then 2/11 limited to 0.15
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0


def test_the_average_is_a_power_function():
    """After step n, a step k of the past counts in proportion to (k + 2) … (k + 9), about k^8."""
    weight, last = nn.Parameter(torch.zeros(1, dtype=torch.float64)), 40
    counts = []
    for step in range(last + 1):
        ema = Ema({"weight": weight}, max_decay=0.9999)
        for now in range(last + 1):
            weight.data.fill_(now == step)
            ema.update(now)
        counts.append(ema.average["weight"].item())
    powers = [math.prod(range(step + 2, step + 10)) for step in range(last + 1)]
    assert counts == pytest.approx([sum(counts) / sum(powers) * power for power in powers])
    assert sum(counts) == pytest.approx(1, abs=1e-6)  # next to nothing of what it began with


def test_noise_depends_on_seed_step_and_place_only():
    def draw(step: int, *places: int) -> torch.Tensor:
        noise = SampleNoise(5, step, range(*places), torch.device("cpu"))
        return torch.cat([noise.randn((3,)), noise.rand()[:, None]], dim=1)

    assert torch.equal(draw(1, 0, 4), torch.cat([draw(1, 0, 1), draw(1, 1, 4)]))
    assert not torch.equal(draw(1, 0, 4), draw(2, 0, 4)) and not torch.equal(draw(1, 0, 1), draw(1, 1, 2))


def test_the_share_of_the_peak_is_logged(tmp_path, monkeypatch):
    """Images a second times FLOPs of an image, over what the device could do."""
    monkeypatch.setattr("tiger.flops.peak", lambda device, half: 1e12)
    fit(tmp_path, flops_per_image=1e9)
    for line in read_log(tmp_path):
        assert line["tflops"] == pytest.approx(line["images_per_second"] * 1e-3)
        assert line["mfu"] == pytest.approx(line["tflops"])
        assert line["peak_memory_gib"] > 0


def test_wandb_stays_offline_unless_told(tmp_path, monkeypatch):
    begun: list[dict[str, Any]] = []
    accelerator: Any = SimpleNamespace(init_trackers=lambda name, init_kwargs: begun.append(init_kwargs))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    start_trackers(accelerator, tmp_path, 7)
    monkeypatch.setenv("WANDB_MODE", "online")
    start_trackers(accelerator, tmp_path, 7)
    assert [given["wandb"]["mode"] for given in begun] == ["offline", "online"]
    assert begun[0]["wandb"]["dir"] == str(tmp_path)
    assert begun[0]["tensorboard"] == {"purge_step": 7}  # what a run logged after the checkpoint it resumes from goes


def test_log_lines_after_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_grid():
    grid = image_grid([torch.zeros(3, 1, 4, 5), torch.ones(3, 3, 4, 5)])
    assert grid.size == (15, 8) and grid.getpixel((0, 0)) == (0, 0, 0) and grid.getpixel((14, 7)) == (255, 255, 255)
