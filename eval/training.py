"""The one small training loop behind the judges, CLIP and the classifiers: AdamW, warm-up and cosine, a progress bar.

Nets that are kept have a folder (`begin`, `finish`), and a training that was interrupted goes on there.
"""

import argparse
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from eval.images import refuse_below, refuse_learning_rate
from eval.leakage import CONFIG, INPUTS
from tiger import checkpoint
from tiger.config import differs
from tiger.errors import InputError, WorkFailed
from tiger.files import atomic_path, read_json, write_json
from tiger.knowledge import knowledge_path
from tiger.manifest import Manifest
from tiger.shards import content_hash

CHECKPOINTING_STEPS = 500
METRICS = "metrics.json"  # is there once a net is finished


def device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    net: nn.Module,
    loss: Callable[[np.ndarray, torch.Generator], Tensor],
    batch: Callable[[np.random.Generator], np.ndarray],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    description: str,
    weight_decay: float = 1e-2,
    validate: Callable[[int], dict[str, float]] | None = None,
    validation_steps: int = 500,
    bf16: bool = False,
    folder: Path | None = None,
) -> float:
    """Train `net` in place for `steps` optimizer steps; returns optimizer steps a second.

    Args:
        loss: row indices and a generator for augmentation -> scalar loss.
        batch: draws the row indices of a step from a numpy generator, which depends on (seed, step) alone.
        learning_rate: peak of the schedule: linear warm-up over the first 5 % of the steps, then cosine to 0.
        validate: called with the step every `validation_steps` and after the last; its values are shown on the bar.
        bf16: the loss under autocast to bfloat16, for GPUs; weights and optimizer stay float32.
        folder: where a checkpoint is left every CHECKPOINTING_STEPS, and the newest one is gone on from, to the same
            end as without the interruption where `loss` draws from its generator and PyTorch's global one alone.
    Raises WorkFailed where the loss is no number.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    generator = torch.Generator().manual_seed(seed)
    newest = checkpoint.newest_valid(folder) if folder is not None else None
    start = checkpoint.step_of(newest) if newest is not None else 0
    if newest is not None:
        load_state(newest, net, optimizer, generator)
        schedule.last_epoch = start
    shown: dict[str, float] = {}
    started = time.perf_counter()
    net.train()
    with tqdm(total=steps, initial=start, desc=description, unit="step", dynamic_ncols=True) as bar:
        for step in range(start + 1, steps + 1):
            with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                value = loss(batch(np.random.default_rng([seed, step])), generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if validate is not None and (step % validation_steps == 0 or step == steps):
                net.eval()
                shown = validate(step)
                net.train()
            if step % 10 == 0 or step == steps:
                shown["loss"] = value.item()
                if not math.isfinite(shown["loss"]):  # once it is, it stays so
                    raise WorkFailed(
                        f"{description}: the loss is {shown['loss']} at step {step}; lower the learning rate"
                    )
                bar.set_postfix({name: f"{number:.3f}" for name, number in shown.items()}, refresh=False)
            bar.update()
            if folder is not None and step % CHECKPOINTING_STEPS == 0:
                checkpoint.save(folder, step, lambda into: save_state(into, net, optimizer, generator))
                checkpoint.rotate(folder, keep=1, newest=step)
    net.eval()
    return (steps - start) / (time.perf_counter() - started)


def save_state(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Write all that a training depends on into a checkpoint's folder; `load_state` reads it."""
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "net.safetensors")
    checkpoint.save_optimizer(optimizer, folder / "optimizer.safetensors")
    states = {"loss": generator.get_state(), "cpu": torch.get_rng_state()}
    states |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    save_file(states, folder / "random.safetensors")


def load_state(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Put net, optimizer and random numbers where `save_state` found them."""
    net.load_state_dict(load_file(folder / "net.safetensors"))
    checkpoint.load_optimizer(optimizer, folder / "optimizer.safetensors")
    states = load_file(folder / "random.safetensors")
    generator.set_state(states["loss"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def refuse_numbers(args: argparse.Namespace) -> None:
    """Raise InputError where a number of a training's flags is out of its range."""
    refuse_below(args, max_train_steps=1, train_batch_size=1, resolution=1, width=1, seed=0)
    if args.learning_rate is not None:
        refuse_learning_rate(args.learning_rate)


def begin(args: argparse.Namespace, rows: Manifest, held_out: Manifest) -> bool:
    """Note in `args.output_dir` a net's flags and what it is trained and measured on, as `eval.leakage` reads them; not
    on a dry run. Returns whether the net is finished there.

    Raises InputError where the folder has a net, or a checkpoint of one, of other flags or rows.
    """
    folder = Path(args.output_dir)
    left_out = ("mode", "output_dir", "dry_run")
    config = {name: value for name, value in vars(args).items() if name not in left_out} | {"split": "train"}
    inputs = {
        "files": _hashes(rows, "file_name"),
        "rows": _digest(rows.rows, _hashes(rows, "condition_fg")),
        "test": _digest(held_out.rows, _hashes(held_out, "file_name"), _hashes(held_out, "condition_fg")),
        "knowledge": content_hash(knowledge_path(args.knowledge)),
    }
    if (folder / METRICS).is_file() or (folder / "config.json").is_file() or checkpoint.checkpoints(folder):
        old = read_json(folder / INPUTS) if (folder / INPUTS).is_file() else {}
        if "rows" not in old or not (folder / CONFIG).is_file():
            raise InputError(f"{folder} holds a net that does not say how it was trained; give another --output_dir")
        was = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        named = [(name, was.get(name), value) for name, value in config.items()]
        changed = [f"{name} was {before}, is {value}" for name, before, value in named if differs(name, before, value)]
        changed += [f"other {name} than before" for name in inputs if old[name] != inputs[name]]
        if changed:
            raise InputError(f"{folder} holds another training: {'; '.join(changed)}; give another --output_dir")
    if (folder / METRICS).is_file():
        print(f"{folder} holds the finished net: nothing to do")
        return True
    if not args.dry_run:
        write_json(folder / INPUTS, inputs)
        with atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(config), encoding="utf-8")
    return False


def _hashes(rows: Manifest, column: str) -> dict[str, str]:
    """Image -> hash of the file that its row has in a column, of rows that have one."""
    return {row.file_name: content_hash(rows.file(row, column)) for row in rows.rows if getattr(row, column)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def finish(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Drop a net's checkpoints, and write its metrics beside it, by which it is finished."""
    for old in checkpoint.checkpoints(folder):
        shutil.rmtree(old)
    write_json(folder / METRICS, metrics)


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear to 1 over the first 5 % of the steps, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move (B, H, W) or (B, C, H, W) by up to `most` px in each direction, edges repeated.

    One shift a batch keeps it a slice, which costs nothing; over steps every image sees every shift.
    """
    if most == 0:
        return images
    dy, dx = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - dy).clamp(0, height - 1)
    columns = (torch.arange(width) - dx).clamp(0, width - 1)
    return images[..., rows, :][..., columns]
