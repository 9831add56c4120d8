"""Several training processes on one machine, forked from a server that has imported everything once.

Not from the tests' own process: a process that has run a backward pass cannot be forked into one that does.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

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
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    prepare(rank)
    sys.exit(run(main, argv))
