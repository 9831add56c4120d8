"""What may end a training before its last step: signals, and steps that go wrong."""

import contextlib
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from tiger.errors import WorkFailed


class StopFlag:
    """Remembers the signal that asked the process to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once


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


class Guard:
    """Keeps steps that go wrong from changing anything, and lets all processes agree on what happened in each step.

    A step goes wrong where its loss is no number or above `max_loss`, or where its gradients are not finite. With fp16,
    gradients overflow now and then while their scale is sought: such a step changes nothing either, but is not told of.
    Flags of a step are summed over the processes and judged on the device. The host reads them once the next step is
    queued, so that a GPU never waits for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stop: StopFlag,
        *,
        max_loss: float,
        skip_bad_steps: int,
        describe: Callable[[int], str],
    ):
        """skip_bad_steps: how many in a row may be skipped. describe(step): where that step's images come from."""
        self.accelerator = accelerator
        self.stop = stop
        self.max_loss = max_loss
        self.skip_bad_steps = skip_bad_steps
        self.describe = describe
        self.lag = 1 if accelerator.device.type == "cuda" else 0  # steps that the host's reading is behind
        self.unread: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
        self.bad_in_a_row = 0

    def judge(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """() float32, on the device: 1 if step `step` (from 0) must change nothing, on any process, else 0.

        grad_norm: of the gradients of all processes.
        """
        device = self.accelerator.device
        loss, grad_norm = loss.to(device).float(), grad_norm.to(device).float()
        bad = ~(loss <= self.max_loss)  # true for NaN
        if self.accelerator.scaler is None:
            bad |= ~grad_norm.isfinite()
        asked = torch.full_like(loss, float(self.stop.signal is not None))
        found: Any = self.accelerator.reduce(torch.stack([bad.float(), asked, loss, grad_norm]), reduction="sum")
        copied = None
        host = found.to("cpu", non_blocking=True)
        if found.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.unread.append((step, host, copied))
        return ((found[0] > 0) | ~grad_norm.isfinite()).float()

    def settle(self, *, everything: bool) -> bool:
        """Read what earlier steps found; of the newest one too, if `everything`. Returns whether to stop now.

        Raises WorkFailed where more than `skip_bad_steps` steps in a row went wrong.
        """
        asked = False
        while len(self.unread) > (0 if everything or asked else self.lag):
            step, found, copied = self.unread.popleft()
            if copied is not None:
                copied.synchronize()
            bad, stop, loss, grad_norm = found.tolist()
            asked |= stop > 0
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            if bad:
                self.report(step, loss / self.accelerator.num_processes, grad_norm / self.accelerator.num_processes)
        return asked

    def report(self, step: int, loss: float, grad_norm: float) -> None:
        """Warn of a bad step that is skipped, or raise WorkFailed."""
        what = f"step {step + 1} went wrong: loss {loss:.3g}, gradient norm {grad_norm:.3g}, on {self.describe(step)}"
        if self.bad_in_a_row > self.skip_bad_steps:
            raise WorkFailed(
                f"{what}. The checkpoints before it are intact, and the same command would meet it again: look at "
                "these images, lower --learning_rate, or leave such steps out with --skip_bad_steps"
            )
        if self.accelerator.is_main_process:
            print(f"warning: {what}; it is skipped", file=sys.stderr)


def apply(
    optimizers: Sequence[torch.optim.Optimizer], bad: torch.Tensor, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Take a step with each optimizer, unless `bad` () is 1: then weights and optimizer states stay bit for bit.

    Fused optimizers read `bad` on the device, as they do for torch.amp.GradScaler; others make the host wait for it.
    scaler: fp16's, which has unscaled the gradients. It adapts its scale here, once for all optimizers: accelerate's
    wrappers would each adapt it, and the second one unscale its gradients again.
    """
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad.item():
            optimizer.step()
        optimizer.zero_grad()
    if scaler:
        scaler.update()
