"""What a training tells of itself: the progress bar, metrics.jsonl, tensorboard or wandb."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from tiger import flops
from tiger.files import atomic_path


class Log:
    """Means of what steps log, to the progress bar, metrics.jsonl and the accelerator's trackers.

    Values stay on the device between two calls of `write`: no step waits for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        start: int,
        stop: int,
        images_per_step: int,
        flops_per_image: float | None = None,
    ):
        self.accelerator = accelerator
        self.path = output_dir / "metrics.jsonl"
        self.images_per_step = images_per_step
        self.flops_per_image = flops_per_image
        half = accelerator.mixed_precision in ("fp16", "bf16")
        self.peak = flops.peak(accelerator.device, half)  # FLOP/s of one device
        self.sums: dict[str, torch.Tensor] = {}
        self.good = torch.zeros((), device=accelerator.device)  # steps in `sums`
        self.steps = 0  # since the last call of `write`, those that went wrong too
        self.began = 0.0  # when the first of them did
        if accelerator.is_main_process:
            drop_lines_after(self.path, start)
        start_trackers(accelerator, output_dir, start)
        interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; log files stay short
        self.bar = tqdm(
            total=stop, initial=start, desc="training", unit="step", mininterval=interval,
            disable=not accelerator.is_main_process,
        )  # fmt: skip

    def begin(self) -> None:
        """Called before each step. The clock starts at the first after `write`: what lies between is not training."""
        if not self.steps:
            self.began = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], bad: torch.Tensor) -> None:
        """Take in the values of one step; those of a `bad` one (see guard.Guard.judge) do not count."""
        for name, value in values.items():
            value = torch.where(bad > 0, 0.0, value.detach().float())
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.good = self.good + (1 - bad)
        self.steps += 1
        self.bar.update()

    def write(self, step: int, learning_rate: float) -> None:
        """Log the means since the last call."""
        sums = torch.stack(list(self.sums.values())) / self.good.clamp(min=1)
        reduced: Any = self.accelerator.reduce(sums, reduction="mean")
        means = dict(zip(self.sums, reduced.tolist(), strict=True))  # waits for the device
        values = means | {"learning_rate": learning_rate} | self.speed(time.perf_counter() - self.began)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            self.accelerator.log(values, step=step)
            told = f"loss {values['loss']:.4f}, lr {learning_rate:.2g}, {values['images_per_second']:.1f} images/s"
            if "mfu" in values:
                told += f", {values['mfu']:.0%} of the device's peak"
            self.bar.set_postfix_str(f"{told}, {values['peak_memory_gib']:.1f} GiB", refresh=False)
        self.sums, self.good, self.steps = {}, torch.zeros_like(self.good), 0

    def speed(self, seconds: float) -> dict[str, float]:
        """Images a second over all processes; one process's TFLOP/s, share of its device's peak, and peak memory."""
        rate = self.images_per_step * self.steps / seconds
        values = {"images_per_second": rate, "peak_memory_gib": flops.peak_memory(self.accelerator.device)}
        if self.flops_per_image:
            reached = rate * self.flops_per_image / self.accelerator.num_processes
            values["tflops"] = reached / 1e12
            if self.peak:
                values["mfu"] = reached / self.peak
        return values

    def add_image(self, image: Image.Image, step: int) -> None:
        """Show a grid in the trackers."""
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(image)[None]}, step=step, **options)

    def close(self) -> None:
        """End the bar and flush the trackers."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def start_trackers(accelerator: Accelerator, output_dir: Path, start: int) -> None:
    """Begin what `Accelerator(log_with=…)` named, from step `start`. wandb is offline unless WANDB_MODE says else."""
    wandb = {"name": output_dir.name, "dir": str(output_dir), "mode": os.environ.get("WANDB_MODE", "offline")}
    accelerator.init_trackers("tiger", init_kwargs={"tensorboard": {"purge_step": start}, "wandb": wandb})


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what a run logged after the checkpoint that it now resumes from; also a last line cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
