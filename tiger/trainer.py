"""The one training loop, shared by both stages.

Everything random is a function of (seed, optimizer step, place in the global batch), so a run that resumes from a
checkpoint continues as if it had never stopped, and no random state needs saving.
"""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from tiger import checkpoint
from tiger.dataset import StepSampler, TigerDataset, batch_indices, places
from tiger.files import atomic_path
from tiger.stage import SampleNoise, Stage, derive_seed


class Ema:
    """Moving average of parameters; its decay rises as (1 + n) / (10 + n) with step n, up to a limit.

    This is the warm-up of tf.train.ExponentialMovingAverage. Until the limit is reached it averages over about the last
    tenth of training, so that short runs profit too.
    """

    def __init__(self, module: torch.nn.Module, max_decay: float):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.max_decay = max_decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step` (from 0)."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged parameters inside this block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange parameters and averages."""
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def save(self, path: Path) -> None:
        """Write the averages."""
        save_file({name: value.contiguous() for name, value in self.average.items()}, str(path))

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read the averages."""
        for name, value in load_file(str(path)).items():
            self.average[name].copy_(value)


class Log:
    """Means of what steps log, to the progress bar, metrics.jsonl and tensorboard.

    Values stay on the device between two calls of `write`: no step waits for it.
    """

    def __init__(self, output_dir: Path, start: int, stop: int, images_per_step: int, enabled: bool):
        self.path = output_dir / "metrics.jsonl"
        self.images_per_step = images_per_step
        self.enabled = enabled
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.seconds = 0.0
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            drop_lines_after(self.path, start)
            self.board = SummaryWriter(str(output_dir / "logs"), purge_step=start)
        interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; log files stay short
        self.bar = tqdm(
            total=stop, initial=start, desc="training", unit="step", mininterval=interval, disable=not enabled
        )

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Take in the values of one step."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.bar.update()

    def write(self, step: int, learning_rate: float, accelerator: Accelerator) -> None:
        """Log the means since the last call."""
        self.check(step)
        sums = torch.stack(list(self.sums.values())) / self.steps
        reduced: Any = accelerator.reduce(sums, reduction="mean")
        means = dict(zip(self.sums, reduced.tolist(), strict=True))
        rate = self.images_per_step * self.steps / max(self.seconds, 1e-9)
        values = means | {"learning_rate": learning_rate, "images_per_second": rate}
        if self.enabled:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.bar.set_postfix_str(
                f"loss {means['loss']:.4f}, lr {learning_rate:.2g}, {rate:.1f} images/s", refresh=False
            )
        self.sums, self.steps, self.seconds = {}, 0, 0.0

    def check(self, step: int) -> None:
        """Raise FloatingPointError if anything logged since the last call of `write` is no longer a finite number."""
        for name, value in self.sums.items():
            if not math.isfinite(value.item()):
                raise FloatingPointError(
                    f"{name} became {value.item()} between steps {step - self.steps} and {step}; the checkpoints "
                    "before are intact; try a lower --learning_rate"
                )

    def add_image(self, image: Image.Image, step: int) -> None:
        """Show a grid in tensorboard."""
        self.board.add_image("validation", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """End the bar and flush tensorboard."""
        self.bar.close()
        if self.enabled:
            self.board.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what a run logged after the checkpoint that it now resumes from; also a last line cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def lr_factor(scheduler: str, step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if scheduler == "linear":
        return 1.0 - progress
    if scheduler == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress)
    return 1.0


def train(
    accelerator: Accelerator,
    stage: Stage,
    dataset: TigerDataset,
    weights: np.ndarray | None,
    *,
    output_dir: Path,
    config_text: str,
    max_train_steps: int,
    train_batch_size: int,
    gradient_accumulation_steps: int,
    lr_scheduler: str,
    lr_warmup_steps: int,
    max_grad_norm: float,
    ema_decay: float | None,
    seed: int,
    checkpointing_steps: int,
    checkpoints_total_limit: int,
    validation_steps: int,
    log_steps: int,
    dataloader_num_workers: int,
) -> bool:
    """Train `stage` from the newest valid checkpoint in `output_dir`, or from the start; the finished model goes there.

    weights: (N,) drawing probabilities of the rows, or None. ema_decay: None for no average.
    Returns False if a signal stopped it early; then a checkpoint of the last step was saved.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    parameters = [p for p in stage.trainable.parameters() if p.requires_grad]
    peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in stage.optimizers]
    ema = Ema(stage.trainable, ema_decay) if ema_decay is not None else None
    resumed = checkpoint.newest_valid(output_dir)
    if resumed:
        load(resumed, stage, ema)
    start = checkpoint.step_of(resumed) if resumed else 0
    stage.trainable = accelerator.prepare(stage.trainable)
    optimizers = [accelerator.prepare(optimizer) for optimizer in stage.optimizers]
    cut = {"batch_size": train_batch_size, "accumulation": gradient_accumulation_steps, "rank": rank, "world": world}
    sampler = StepSampler(len(dataset), weights, seed=seed, start=start, stop=max_train_steps, **cut)
    images_per_step = train_batch_size * gradient_accumulation_steps * world
    log = Log(output_dir, start, max_train_steps, images_per_step, accelerator.is_main_process)
    averaged = ema.applied if ema else contextlib.nullcontext
    step = start
    with stop_signal() as stop, contextlib.closing(log):
        batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=dataloader_num_workers))
        while step < max_train_steps:
            began = time.perf_counter()
            factor = lr_factor(lr_scheduler, step, lr_warmup_steps, max_train_steps)
            set_rates(stage.optimizers, peak_rates, factor)
            rows = batch_indices(seed, step, images_per_step, len(dataset), weights)
            stage.begin_step([dataset.texts(row) for row in rows])
            logged = accumulate(accelerator, stage, batches, seed, step, **cut)
            logged["grad_norm"] = torch.as_tensor(accelerator.clip_grad_norm_(parameters, max_grad_norm))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if ema:
                ema.update(step)
            step += 1
            log.add(logged)
            log.seconds += time.perf_counter() - began
            if step % log_steps == 0 or step == max_train_steps:
                log.write(step, peak_rates[0][0] * factor, accelerator)
            stopping = stop.requested(accelerator, step % log_steps == 0)
            if step % checkpointing_steps == 0 or step == max_train_steps or stopping:
                log.check(step)  # before weights that are no numbers are saved
                if accelerator.is_main_process:
                    checkpoint.save(output_dir, step, lambda folder: save(folder, stage, ema, config_text))
                    checkpoint.rotate(output_dir, checkpoints_total_limit)
                accelerator.wait_for_everyone()
            if stopping:
                return False
            if validation_steps and (step % validation_steps == 0 or step == max_train_steps):
                if accelerator.is_main_process:
                    with averaged():
                        grid = stage.validate()
                    save_grid(grid, output_dir, step)
                    log.add_image(grid, step)
                accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged():
            checkpoint.publish(output_dir, step, stage.export)
    accelerator.wait_for_everyone()
    return True


def accumulate(
    accelerator: Accelerator, stage: Stage, batches: Iterator[dict[str, Any]], seed: int, step: int, *,
    batch_size: int, accumulation: int, rank: int, world: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Leave the gradients of one optimizer step in the parameters; return the means of what the stage logs."""
    logged: dict[str, torch.Tensor] = {}
    for micro in range(accumulation):
        here = places(micro, batch_size, rank, world)
        torch.manual_seed(derive_seed(seed, step, here.start))  # for models that have dropout layers
        noise = SampleNoise(seed, step, range(here.start, here.stop), accelerator.device)
        last = micro == accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(stage.trainable):
            loss, values = stage.loss(next(batches), noise, step)
            accelerator.backward(loss / accumulation)
        for name, value in values.items():
            logged[name] = logged.get(name, 0.0) + value.detach() / accumulation
    return logged


def set_rates(optimizers: list[torch.optim.Optimizer], peak_rates: list[list[float]], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer, rates in zip(optimizers, peak_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def save(folder: Path, stage: Stage, ema: Ema | None, config_text: str) -> None:
    """Write all that resuming needs into a checkpoint folder."""
    stage.save(folder)
    for index, optimizer in enumerate(stage.optimizers):
        checkpoint.save_optimizer(optimizer, folder / f"optimizer-{index}.safetensors")
    if ema:
        ema.save(folder / "ema.safetensors")
    (folder / "config.yaml").write_text(config_text, encoding="utf-8")


def load(folder: Path, stage: Stage, ema: Ema | None) -> None:
    """Read what `save` wrote."""
    stage.load(folder)
    for index, optimizer in enumerate(stage.optimizers):
        checkpoint.load_optimizer(optimizer, folder / f"optimizer-{index}.safetensors")
    if ema:
        ema.load(folder / "ema.safetensors")


def save_grid(grid: Image.Image, output_dir: Path, step: int) -> None:
    """Write a validation grid."""
    with atomic_path(output_dir / "validation" / f"step-{step}.png") as path:
        grid.save(path)


class StopFlag:
    """Remembers the signal that asked the process to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    def requested(self, accelerator: Accelerator, agree: bool) -> bool:
        """Whether to stop now. Several processes ask each other, only when `agree`, as that waits for the device."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        if not agree:
            return False
        asked = torch.tensor(float(self.signal is not None), device=accelerator.device)
        answers: Any = accelerator.reduce(asked, reduction="sum")
        return answers.item() > 0


@contextlib.contextmanager
def stop_signal() -> Iterator[StopFlag]:
    """Inside this block SIGTERM (a cluster's warning) and SIGINT (Ctrl-C) only set the flag that is given."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
