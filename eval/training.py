"""The one small training loop behind the judges and the classifiers: AdamW, warm-up and cosine, a progress bar."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiger.errors import WorkFailed


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
) -> float:
    """Train `net` in place for `steps` optimizer steps; returns optimizer steps a second.

    Args:
        loss: row indices and a generator for augmentation -> scalar loss.
        batch: draws the row indices of a step from a numpy generator, which depends on (seed, step) alone.
        learning_rate: peak of the schedule: linear warm-up over the first 5 % of the steps, then cosine to 0.
        validate: called with the step every `validation_steps` and after the last; its values are shown on the bar.
        bf16: the loss under autocast to bfloat16, for GPUs; weights and optimizer stay float32.
    Raises WorkFailed where the loss is no number.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    generator = torch.Generator().manual_seed(seed)
    shown: dict[str, float] = {}
    started = time.perf_counter()
    net.train()
    with tqdm(total=steps, desc=description, unit="step", dynamic_ncols=True) as bar:
        for step in range(1, steps + 1):
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
    net.eval()
    return steps / (time.perf_counter() - started)


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
