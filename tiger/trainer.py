"""The one training loop, shared by both stages.

Everything random is a function of (seed, optimizer step, place in the global batch), so a run that resumes from a
checkpoint continues as if it had never stopped, and no random state needs saving.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from tiger import checkpoint, fsdp, guard
from tiger.dataset import StepSampler, TigerDataset, batch_indices, places
from tiger.errors import WorkFailed
from tiger.files import atomic_path, read_json, write_json
from tiger.stage import SampleNoise, Stage, derive_seed
from tiger.tracking import Log

NAMED = 8  # images that a message names


class Ema:
    """Power-function moving average of parameters: its decay rises as (1 + n) / (10 + n) with step n, up to a limit.

    Until the limit is reached, step k counts in proportion to (k + 2) … (k + 9), about k⁸: the average spans the same
    share of a run of any length, with a relative width of 9 % (Karras et al. 2024, https://arxiv.org/abs/2312.02696,
    section 3.1, at γ = 8). This is also the warm-up of tf.train.ExponentialMovingAverage.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], max_decay: float):
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.max_decay = max_decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step` (from 0)."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        averages, values = ([fsdp.share(t) for t in kept.values()] for kept in (self.average, self.parameters))
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this block the parameters have the averages as their values."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange parameters and averages."""
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read the averages."""
        for name, value in load_file(str(path)).items():
            self.average[name] = fsdp.laid_out(value, like=self.average[name])


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
    card: str,
    max_train_steps: int,
    train_batch_size: int,
    gradient_accumulation_steps: int,
    lr_scheduler: str,
    lr_warmup_steps: int,
    max_grad_norm: float,
    max_loss: float,
    skip_bad_steps: int,
    ema_decay: float | None,
    seed: int,
    checkpointing_steps: int,
    checkpoints_total_limit: int,
    validation_steps: int,
    log_steps: int,
    flops_per_image: float | None = None,
    dataloader_num_workers: int,
) -> bool:
    """Train `stage` from the newest valid checkpoint in `output_dir`, or from the start; the finished model goes there.

    weights: (N,) drawing probabilities of the rows, or None. card: the finished model's README.md.
    ema_decay: None for no average. Returns False if a signal stopped it early; then a checkpoint of the last step was
    saved. Raises WorkFailed where steps go wrong (see guard.Guard).
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in stage.optimizers]
    resumed = newest_checkpoint(accelerator, output_dir, checkpoints_total_limit)
    start = checkpoint.step_of(resumed) if resumed else 0
    if resumed:
        stage.load(resumed)
    model = stage.trainable  # the stage's own, where what is trained is sharded
    stage.trainable = fsdp.prepare(accelerator, model, stage.optimizers)
    trained = accelerator.unwrap_model(stage.trainable)
    parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    ema = Ema(parameters, ema_decay) if ema_decay is not None else None
    if resumed:
        load(resumed, stage, ema, accelerator)
    cut = {"batch_size": train_batch_size, "accumulation": gradient_accumulation_steps, "rank": rank, "world": world}
    sampler = StepSampler(len(dataset), weights, seed=seed, start=start, stop=max_train_steps, **cut)
    images_per_step = train_batch_size * gradient_accumulation_steps * world
    rows_of = functools.partial(
        batch_indices, seed, batch_size=images_per_step, count=len(dataset), weights=weights
    )  # of a step
    log = Log(accelerator, output_dir, start, max_train_steps, images_per_step, flops_per_image)

    def shown(averaged: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, the main process may read the stage's weights, or their averages."""
        averages = ema if averaged else None
        if accelerator.is_fsdp2:
            return fsdp.assembled(accelerator, model, averages.average if averages else parameters)
        return averages.applied() if averages else contextlib.nullcontext()

    def due(every: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == max_train_steps)

    def export(folder: Path) -> None:
        stage.export(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    step = start
    with guard.stop_signal() as stop, contextlib.closing(log):
        watch = guard.Guard(
            accelerator, stop, max_loss=max_loss, skip_bad_steps=skip_bad_steps,
            describe=lambda step: name_files(dataset, rows_of(step)),
        )  # fmt: skip
        pinned = accelerator.device.type == "cuda"  # or copying a batch to the GPU would wait for it
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=dataloader_num_workers, pin_memory=pinned)
        batches = iter(loader)
        while True:
            if due(validation_steps):  # here, so that a run stopped between checkpoint and grid still draws it
                with shown(averaged=True):
                    if accelerator.is_main_process and (step > start or not grid_path(output_dir, step).exists()):
                        grid = stage.validate()
                        save_grid(grid, output_dir, step)
                        log.add_image(grid, step)
                accelerator.wait_for_everyone()
            if step >= max_train_steps:
                break
            log.begin()
            factor = lr_factor(lr_scheduler, step, lr_warmup_steps, max_train_steps)
            set_rates(stage.optimizers, peak_rates, factor)
            stage.begin_step([dataset.texts(row) for row in rows_of(step)])
            logged = accumulate(accelerator, stage, batches, seed, step, **cut)
            norm = accelerator.clip_grad_norm_(parameters.values(), max_grad_norm)
            logged["grad_norm"] = fsdp.whole(torch.as_tensor(norm))
            bad = watch.judge(step, logged["loss"], logged["grad_norm"])
            guard.apply(stage.optimizers, bad, accelerator.scaler)
            if ema:
                ema.update(step)
            step += 1
            log.add(logged, bad)
            pausing = due(log_steps) or due(checkpointing_steps) or due(validation_steps)
            stopping = watch.settle(everything=pausing)
            if pausing or stopping:
                log.write(step, peak_rates[0][0] * factor)
            if due(checkpointing_steps) or stopping:
                with shown(averaged=False):
                    tensors = collect(stage, ema, accelerator)
                    if accelerator.is_main_process:
                        write = functools.partial(save, stage, tensors, accelerator, config_text)
                        checkpoint.save(output_dir, step, write)
                        checkpoint.rotate(output_dir, checkpoints_total_limit, newest=step)
                accelerator.wait_for_everyone()
            if stopping:
                return False
    with shown(averaged=True):
        if accelerator.is_main_process:
            checkpoint.publish(output_dir, step, export)
    accelerator.wait_for_everyone()
    return True


def newest_checkpoint(accelerator: Accelerator, output_dir: Path, keep: int) -> Path | None:
    """Where to go on from, None at the start: found by the main process, the same for all.

    Those that a killed run should have rotated away are deleted here.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process and (newest := checkpoint.newest_valid(output_dir)):
        checkpoint.rotate(output_dir, keep, newest=checkpoint.step_of(newest))
        found = [newest]
    broadcast_object_list(found)
    if found[0] and not found[0].is_dir():
        raise WorkFailed(
            f"process {accelerator.process_index} cannot see {found[0]}: --output_dir must be shared by all"
        )
    return found[0]


def name_files(dataset: TigerDataset, rows: np.ndarray) -> str:
    """The image files of a global batch; only the first of many."""
    names = [dataset.row(row).file_name for row in rows]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


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


def collect(stage: Stage, ema: Ema | None, accelerator: Accelerator) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that a checkpoint holds besides the model's, by file: all processes take part in the gathering."""
    files = {f"optimizer-{i}": checkpoint.optimizer_tensors(optimizer) for i, optimizer in enumerate(stage.optimizers)}
    if ema:
        files["ema"] = ema.average
    return {name: fsdp.gathered(tensors, keep=accelerator.is_main_process) for name, tensors in files.items()}


def save(
    stage: Stage, tensors: dict[str, dict[str, torch.Tensor]], accelerator: Accelerator, config_text: str, folder: Path
) -> None:
    """Write all that resuming needs into a checkpoint folder. tensors: what `collect` returned."""
    stage.save(folder)
    for index, optimizer in enumerate(stage.optimizers):
        name = f"optimizer-{index}"
        checkpoint.save_optimizer(optimizer, folder / f"{name}.safetensors", tensors[name])
    if "ema" in tensors:
        save_file({name: value.contiguous() for name, value in tensors["ema"].items()}, folder / "ema.safetensors")
    if accelerator.scaler:  # fp16's gradient scale
        write_json(folder / "scaler.json", accelerator.scaler.state_dict())
    (folder / "config.yaml").write_text(config_text, encoding="utf-8")


def load(folder: Path, stage: Stage, ema: Ema | None, accelerator: Accelerator) -> None:
    """Read what `save` wrote, the model excepted."""
    for index, optimizer in enumerate(stage.optimizers):
        checkpoint.load_optimizer(optimizer, folder / f"optimizer-{index}.safetensors")
    if ema:
        ema.load(folder / "ema.safetensors")
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(read_json(folder / "scaler.json"))


def save_grid(grid: Image.Image, output_dir: Path, step: int) -> None:
    """Write a validation grid."""
    with atomic_path(grid_path(output_dir, step)) as path:
        grid.save(path)


def grid_path(output_dir: Path, step: int) -> Path:
    """Where the validation grid of a step is."""
    return output_dir / "validation" / f"step-{step}.png"
