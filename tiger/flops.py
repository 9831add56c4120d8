"""FLOPs of a training step, counted without computing it, and the share of the device's peak that a run reaches.

One multiply-add is two FLOPs. What counts is the maths of the step: what gradient checkpointing computes twice counts
once, as in model FLOPs utilisation, MFU (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
"""

import contextlib
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Pattern of a device's name -> dense tensor-core TFLOP/s of NVIDIA's data sheets: (bf16 and fp16 with float32 sums,
# tf32). Where a sheet prints only the figure with sparsity, half of it. The first pattern that fits counts.
PEAK_TFLOPS = {
    "B200": (2250.0, 1125.0),  # https://www.nvidia.com/en-us/data-center/dgx-b200/, an eighth of the system
    "H200 NVL": (835.5, 417.5),  # https://www.nvidia.com/en-us/data-center/h200/
    "H200": (989.5, 494.5),
    "H100 NVL": (835.5, 417.5),  # https://www.nvidia.com/en-us/data-center/h100/
    "H100 PCIe": (756.5, 378.0),
    "H100": (989.5, 494.5),
    "A100": (312.0, 156.0),  # https://www.nvidia.com/en-us/data-center/a100/
    "L40S": (362.0, 183.0),  # https://www.nvidia.com/en-us/data-center/l40s/
    "L4": (121.0, 60.0),  # https://www.nvidia.com/en-us/data-center/l4/
    "A10": (125.0, 62.5),  # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    "RTX 4090$": (165.2, 82.6),  # NVIDIA Ada GPU architecture white paper, appendix A
    "RTX 3090$": (71.0, 35.6),  # NVIDIA Ampere GA102 GPU architecture white paper, appendix A
}


def count(run: Callable[[], torch.Tensor], modules: Sequence[nn.Module]) -> int:
    """FLOPs of `run()` and of the backward pass from its result, on meta tensors: nothing is computed or allocated.

    modules: all with parameters that `run` uses. Inside, tensors are made on the meta device, and so must `run`'s be.
    """
    parts = nn.ModuleList(modules)
    step = _Step(run, parts)
    with _counted_once(parts), torch.device("meta"), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(step, {f"parts.{k}": v for k, v in _on_meta(parts).items()}, ()).backward()
    return counter.get_total_flops()


class _Step(nn.Module):
    """A function and the modules it uses, so that functional_call can give them other parameters for one call."""

    def __init__(self, run: Callable[[], torch.Tensor], parts: nn.ModuleList):
        super().__init__()
        self.run = run
        self.parts = parts

    def forward(self) -> torch.Tensor:
        return self.run()


def _on_meta(module: nn.Module) -> dict[str, torch.Tensor]:
    """Stand-ins for all parameters and buffers: float32, so that half-precision parts fit the others."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {
        name: torch.empty(
            tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype, device="meta"
        ).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def _counted_once(module: nn.Module) -> Iterator[None]:
    """No gradient checkpointing and no compiled code inside: recomputed and fused operations would be miscounted."""
    checkpointing = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpointing:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part in checkpointing:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def peak(device: torch.device, half: bool) -> float | None:
    """Peak FLOP/s of the device, None where it is unknown. half: bf16 or fp16; float32 may use tf32 units."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device), half)


def named_peak(name: str, half: bool) -> float | None:
    """The same for a device's name, as "NVIDIA A100-SXM4-80GB"."""
    rows = (row for pattern, row in PEAK_TFLOPS.items() if re.search(rf"\b{pattern}\b", name))
    row = next(rows, None)
    return None if row is None else 1e12 * row[0 if half else 1]


def product_rate(device: torch.device) -> float:
    """FLOP/s of float32 matrix products on this device, the best of a few timed: what stands for an unknown peak."""
    side = 512
    a, b = (torch.ones(side, side, device=device) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading waits for a GPU
        return time.perf_counter() - began

    return 2 * side**3 / min(seconds() for _ in range(20))


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU so far; elsewhere, the most that the process took (on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
