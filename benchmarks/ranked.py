"""Ranks for benchmarks: processes with the variables of torchrun, which start in no time.

They come from multiprocessing's fork server, which has imported kvfold and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

IMPORTED = ["__main__", "kvfold.train.uptrain", "transformers.models.llama.modeling_llama"]
PATIENCE = 600.0  # seconds for a run that nobody kills


def start(target: Callable[..., None], *arguments: Any, world: int) -> list[BaseProcess]:
    """Start `target(*arguments)` on each of `world` ranks. What `os.environ` holds at the first call holds for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(IMPORTED)
    server = multiprocessing.get_context("forkserver")
    started: list[BaseProcess] = []
    for rank in range(world):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        variables = {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(server.Process(target=_rank, args=(variables, target, arguments)))
        started[-1].start()
    return started


def _rank(variables: dict[str, Any], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {name: str(value) for name, value in variables.items()}
    target(*arguments)


def ended(started: list[BaseProcess], patience: float = PATIENCE) -> list[int | None]:
    """The exit statuses of ranks that have ended, or are killed after so many seconds."""
    until = time.monotonic() + patience
    for each in started:
        each.join(max(0.0, until - time.monotonic()))
    for each in started:
        each.kill()
        each.join()
    return [each.exitcode for each in started]
