"""FSDP2: each process keeps a share of what is trained, of its gradients, averages and optimizer states.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277; https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
accelerate shards as its configuration says (configs/accelerate/fsdp2.yaml). What is shared out are torch's DTensors.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def prepare(accelerator: Accelerator, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> nn.Module:
    """What to train in place of `model`: accelerate's wrapper of it, whose parameters the optimizers have.

    Sharding changes a module for good, so a copy is sharded. `model` itself stays whole, waits in main memory, and has
    the weights it has now until `assembled` brings others.
    """
    if accelerator.is_fsdp2:
        # In float32, computing under autocast, as without sharding. FSDP's own policy would lower every layer.
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None
        whole_model, model = model, copy.deepcopy(model)
        nn.Module.to(model, memory_format=torch.contiguous_format)  # FSDP2 knows no other
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
        twins = dict(zip(whole_model.parameters(), model.parameters(), strict=True))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["params"] = [twins[parameter] for parameter in group["params"]]
        nn.Module.to(whole_model, "cpu")
    return accelerator.prepare(model, *optimizers)[0]


@contextlib.contextmanager
def assembled(accelerator: Accelerator, model: nn.Module, shares: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the main process has `model` on its device, with the whole values of `shares` (by parameter name).

    All processes must enter.
    """
    values = gathered(shares, accelerator.is_main_process)
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])
    if accelerator.is_main_process:
        nn.Module.to(model, accelerator.device)
    try:
        yield
    finally:
        nn.Module.to(model, "cpu")


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """The tensors, those shared out whole and in main memory: all processes must take part.

    keep: whether this one wants them; else the result lacks what was shared out.
    """
    found = {}
    for name, tensor in tensors.items():
        shared = isinstance(tensor, DTensor)
        value = whole(tensor.detach())
        if keep or not shared:
            found[name] = value.cpu() if shared else value
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be shared out, on every process: all must take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that may be shared out: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, shared out, placed and ordered in memory as another of its shape is."""
    if isinstance(like, DTensor):  # every process has the value and takes its share
        value = value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()
    return like.detach().clone().copy_(value)
