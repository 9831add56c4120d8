"""Two processes on one machine (gloo): the same training as one, and an end of one is an end of all."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from training_samples import flags, save_base, save_data

from tiger import checkpoint, finetune, pretrain
from tiger.coarse import CoarseStage
from tiger.fine import FineStage

UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "controlnet/fg/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def tell_saves(rank: int) -> None:
    """Have each call of checkpoint.save and checkpoint.publish print a line on the process's stderr."""
    for name in ("save", "publish"):
        original = getattr(checkpoint, name)

        def told(folder, step, write, name=name, original=original):
            print(f"\n{name} {step}", file=sys.stderr)  # apart from the progress bar
            return original(folder, step, write)

        setattr(checkpoint, name, told)


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "weights"), [("coarse", UNET), ("fine", ENCODER)])
def test_two_processes_train_as_one(stage, weights, base, data, tmp_path):
    """Equal losses also mean equal term frequencies: they are those of the global batch, and weigh the attention."""
    main = {"coarse": pretrain.main, "fine": finetune.main}[stage]
    argv = flags(
        pretrained_model=base, data_dir=data, max_train_steps=3, checkpointing_steps=2, validation_steps=2,
        learning_rate=1e-4, lr_scheduler="cosine", use_ema="true",
    )  # fmt: skip
    main([*argv, f"--output_dir={tmp_path / 'one'}", "--train_batch_size=4"])
    two = [*argv, f"--output_dir={tmp_path / 'two'}", "--train_batch_size=2"]
    codes = launch(main, two, 2, tmp_path, tell_saves)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    saves = [[line for line in text.splitlines() if line.startswith(("save ", "publish "))] for text in said]
    assert saves == [["save 2", "save 3", "publish 3"], []]  # written once
    one, both = (read_log(tmp_path / run) for run in ("one", "two"))
    assert [line["step"] for line in both] == [1, 2, 3]  # written once too
    assert [line["learning_rate"] for line in both] == [line["learning_rate"] for line in one]
    assert len({line["learning_rate"] for line in one}) == 3
    for name in [name for name in one[0] if name.startswith("loss")] + ["grad_norm"]:
        assert [line[name] for line in both] == pytest.approx([line[name] for line in one], rel=1e-4)
    for name, value in load_file(tmp_path / "one" / weights).items():
        apart = (load_file(tmp_path / "two" / weights)[name] - value).abs()
        # AdamW divides by a gradient's size: where one is next to nothing, a processor's rounding decides the step.
        assert apart.max() < 1e-4 and (apart > 1e-5).float().mean() < 1e-3
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint.newest_valid(tmp_path / "two") == tmp_path / "two" / "checkpoint-3"
    if stage == "fine":
        counts = [(tmp_path / run / "controlnet" / "term_frequencies.json").read_text() for run in ("one", "two")]
        assert counts[0] == counts[1]


def at_step(stage: type, step: int, act) -> None:
    """Have `act(loss, values)` replace what a stage's loss returns at one step (from 0)."""
    original = stage.loss

    def loss(self, batch, noise, now):
        found = original(self, batch, noise, now)
        return act(*found) if now == step else found

    stage.loss = loss


def kill_one(rank: int) -> None:
    if rank == 1:
        at_step(CoarseStage, 2, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def signal_one(rank: int) -> None:
    if rank == 1:
        at_step(CoarseStage, 2, lambda *found: os.kill(os.getpid(), signal.SIGTERM) or found)


def spoil_one(rank: int) -> None:
    if rank == 1:  # too high a loss, but no gradient that would show it to the other
        at_step(FineStage, 1, lambda loss, values: (loss, values | {"loss": values["loss"] + 1e6}))


def small_disk(rank: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file: logs fit, weights do not


def test_a_killed_process_ends_the_other_with_a_message(base, data, tmp_path):
    argv = flags(pretrained_model=base, data_dir=data, output_dir=tmp_path / "out", max_train_steps=9)
    assert launch(pretrain.main, [*argv, "--checkpointing_steps=1"], 2, tmp_path, kill_one) == [1, -9]
    said = (tmp_path / "0.txt").read_text().splitlines()[-1]
    assert said.startswith("error: process 0 lost another one") and "checkpoint-2 is intact" in said


def test_a_signal_to_one_process_stops_all_at_the_same_step(base, data, tmp_path):
    argv = flags(pretrained_model=base, data_dir=data, output_dir=tmp_path / "out", max_train_steps=9, log_steps=9)
    assert launch(pretrain.main, argv, 2, tmp_path, signal_one) == [143, 143]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all(base, data, tmp_path):
    """The other's weights must not move either: they would differ from then on."""
    argv = flags(pretrained_model=base, data_dir=data, output_dir=tmp_path / "out", max_train_steps=3)
    argv += ["--checkpointing_steps=1", "--skip_bad_steps=1", "--checkpoints_total_limit=9"]
    assert launch(finetune.main, argv, 2, tmp_path, spoil_one) == [0, 0]
    assert (tmp_path / "0.txt").read_text().count("warning: step 2 went wrong") == 1
    assert "went wrong" not in (tmp_path / "1.txt").read_text()
    before, after, later = (load_file(tmp_path / "out" / f"checkpoint-{n}" / ENCODER) for n in (1, 2, 3))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not all(torch.equal(value, later[name]) for name, value in before.items())


def test_a_full_disk_ends_in_one_line_and_loses_nothing(base, data, tmp_path):
    argv = flags(pretrained_model=base, data_dir=data, output_dir=tmp_path / "out", checkpointing_steps=2)
    pretrain.main([*argv, "--max_train_steps=2"])
    assert launch(pretrain.main, [*argv, "--max_train_steps=4"], 1, tmp_path, small_disk) == [1]
    said = (tmp_path / "0.txt").read_text().splitlines()[-1]
    assert said.startswith(f"error: the disk of {tmp_path / 'out'} is full") and "checkpoint-2 is intact" in said
    assert checkpoint.newest_valid(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    assert launch(pretrain.main, [*argv, "--max_train_steps=4"], 1, tmp_path) == [0]  # room was made
