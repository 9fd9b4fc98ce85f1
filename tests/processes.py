"""Processes of two ranks, for what one process cannot test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

HEAD = """
import json, os, sys
from pathlib import Path

import torch

from kvfold import ranks

torch.set_num_threads(1)
arguments = sys.argv[1:]
"""
TAIL = """
with ranks.joined(ranks.of_environment()):
    ranks.lead(command)
"""


def start_ranks(code: str, arguments: Sequence[object] = (), world: int = 2) -> list[subprocess.Popen[str]]:
    """Start ranks that run the function `command` of `code`, which reads `arguments`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HEAD + code + TAIL, *map(str, arguments)],
            env={
                **os.environ,
                **{name: str(value) for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()},
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def on_ranks(code: str, arguments: Sequence[object] = (), world: int = 2) -> list[str]:
    """What each rank prints, once all have ended well."""
    running = start_ranks(code, arguments, world)
    ended = [each.communicate() for each in running]
    assert not any(each.returncode for each in running), "\n".join(error[-4000:] for _, error in ended)
    return [said for said, _ in ended]
