"""Several training processes on one machine, forked, so that they need not import everything again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from tiger.errors import run

Main = Callable[[list[str] | None], None]


def launch(
    main: Main,
    argv: list[str],
    world: int,
    logs: Path,
    prepare: Callable[[int], None] = lambda rank: None,
    seconds: float = 200,
) -> list[int | None]:
    """Exit codes of `world` processes that run `main(argv)`; their stderr is in logs/<rank>.txt.

    prepare(rank) is called in each before. What has not ended after `seconds` is killed; its exit code is then -9.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.dup2(os.open(logs / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        torch.set_num_threads(1)  # threads of the parent's pool did not come along
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        prepare(rank)
        sys.exit(run(main, argv))

    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(world)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(seconds)
        if each.is_alive():
            each.kill()
            each.join()
    return [each.exitcode for each in processes]
