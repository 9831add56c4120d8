"""Several training processes on one machine, forked from a server that has imported everything once.

Not from the tests' own process: a process that has run a backward pass cannot be forked into one that does.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands import launch as accelerate_launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tiger.errors import run

Main = Callable[[list[str] | None], None]
Prepare = Callable[[int], None]  # of a module, not of a function: it is sent by name

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tiger.pretrain", "tiger.finetune", "tiger.trainer", "tiger.coarse", "tiger.fine"])


def nothing(rank: int) -> None:
    """The default `prepare`."""


def launch(
    main: Main, argv: list[str], world: int, logs: Path, prepare: Prepare = nothing, seconds: float = 200
) -> list[int | None]:
    """Exit codes of `world` processes that run `main(argv)`; their stderr is in logs/<rank>.txt.

    prepare(rank) is called in each before. What has not ended after `seconds` is killed; its exit code is then -9.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=process, args=(main, argv, rank, world, port, logs, prepare)) for rank in range(world)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(seconds)
        if each.is_alive():
            each.kill()
            each.join()
    return [each.exitcode for each in processes]


def process(main: Main, argv: list[str], rank: int, world: int, port: int, logs: Path, prepare: Prepare) -> None:
    """What one process does."""
    os.dup2(os.open(logs / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.enable()  # where it was, if it crashes
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    prepare(rank)
    sys.exit(run(main, argv))


def shard(config: Path) -> None:
    """Have this process share out what it trains, as an FSDP config of accelerate says; for a `prepare`.

    accelerate shards over accelerators only. torch does over CPUs too, so accelerate is told that it has one.
    """
    parser = accelerate_launch.launch_command_parser()
    args, *_ = accelerate_launch._validate_launch_command(parser.parse_args(["--config_file", str(config), "script"]))
    env = accelerate_launch.prepare_multi_gpu_env(args)
    os.environ |= {name: value for name, value in env.items() if "FSDP" in name}
    start = Accelerator.__init__

    def start_sharded(self: Accelerator, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP

    Accelerator.__init__ = start_sharded
