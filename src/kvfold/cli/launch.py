"""Ranks of a command on this machine: `--gpus N` starts N processes of the same command and waits for them.

Each process is what `torchrun --nproc-per-node N -m kvfold ...` starts. Ctrl-C reaches them through this process alone,
once, because each has a process group of its own. If this process is killed, they end as they do on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kvfold.errors import Interrupted, KvfoldError, SettingError
from kvfold.machine import cores
from kvfold.ranks import check_local, joined, lead, of_environment

LAUNCHER = "KVFOLD_LAUNCHER"  # in the environment of a rank: the pipe that closes when the launcher ends
LOST = 75  # exit status of a rank that lost another one, which is the cause
PATIENCE = 60.0  # seconds for the cause of a lost rank to end, and for all to end after a signal
ORPHANED = 120.0  # seconds in which ranks without a launcher save and end
POLL = 0.05  # seconds between two looks at the processes


class Ended(Exception):
    """The ranks have ended, and have reported why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def on_ranks(name: str, gpus: str | None, words: Sequence[str], command: Callable[[], None]) -> None:
    """Run a command as the ranks of the environment, or in `gpus` processes of `kvfold NAME WORDS`.

    Raises SettingError for a number that cannot be, KvfoldError for a rank that was killed, and Ended if the processes
    failed.
    """
    ranks, count = of_environment(), _count(name, gpus)
    if ranks.world > 1 and gpus is not None:
        raise SettingError(
            f"--gpus starts ranks, and this is rank {ranks.rank} of {ranks.world}", where=name, next="leave out --gpus"
        )
    if count > 1:
        _launch([name, *_without_gpus(words)], count)
        return
    _watch_launcher()
    if not ranks.main:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, _left_to_rank_0)
    with joined(ranks):
        lead(command)


def check_alone(name: str) -> None:
    """Raise SettingError for a command that ranks do not share, started by torchrun."""
    ranks = of_environment()
    if ranks.world > 1:
        got = f"rank {ranks.rank} of {ranks.world}"
        raise SettingError("this command runs on one device", where=name, got=got, next="start it without torchrun")


def launched() -> bool:
    """Whether a launcher of kvfold waits for this process, and reports a rank that was killed."""
    return LAUNCHER in os.environ


def _count(name: str, gpus: str | None) -> int:
    if gpus is None:
        return 1
    if not (gpus.isdecimal() and len(gpus) < 6 and int(gpus)):
        raise SettingError("gpus cannot be this", where=name, got=gpus, allowed="a whole number of at least 1")
    if int(gpus) > 1:
        check_local(int(gpus))
    return int(gpus)


def _without_gpus(words: Sequence[str]) -> Iterator[str]:
    """The words of a command without `--gpus N` and `--gpus=N`."""
    rest = iter(words)
    for word in rest:
        if word == "--gpus":
            next(rest)
        elif not word.startswith("--gpus="):
            yield word


def _left_to_rank_0(number: int, frame: FrameType | None) -> None:
    """Do nothing: rank 0 gets the signal too, and ends or calls the others to save."""


# --- the launcher ----------------------------------------------------------------------------------------------------


def _launch(words: Sequence[str], count: int) -> None:
    reading, writing = os.pipe()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        LAUNCHER: str(reading),
    }
    if environment.get("OMP_NUM_THREADS", str(cores())) == str(cores()):  # not set, or by `prepare_torch`
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // count))
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarded(processes) as signalled:
        try:
            for rank in range(count):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "kvfold", *words],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=[reading],
                        stdin=subprocess.DEVNULL,
                        process_group=0,
                    )
                )
            _wait(processes, signalled)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            os.close(reading)
            os.close(writing)


def _wait(processes: Sequence[subprocess.Popen[bytes]], signalled: Callable[[], bool]) -> None:
    """Wait until all ranks are done, or until one fails. Raises Interrupted, Ended or KvfoldError for the cause."""
    patient_until: float | None = None
    while True:
        ended = {rank: status for rank, each in enumerate(processes) if (status := each.poll()) is not None}
        failed = {rank: status for rank, status in ended.items() if status}
        if len(ended) == len(processes) and not failed:
            return
        if failed and patient_until is None:
            patient_until = time.monotonic() + PATIENCE
        causes = {rank: status for rank, status in failed.items() if status != LOST}
        waited = patient_until is not None and time.monotonic() > patient_until
        if signalled() and failed and (0 in ended or waited):
            if ended.get(0) == Interrupted.exit_code:
                raise Ended(Interrupted.exit_code)  # rank 0 has reported it
            raise Interrupted("stopped", where=f"rank {min(failed)}", next="the same command continues")
        if failed and not signalled() and (causes or waited):
            _raise(*min((causes or failed).items()))
        time.sleep(POLL)


def _raise(rank: int, status: int) -> None:
    """Raise the error for a rank that failed."""
    if status < 0:
        name = signal.Signals(-status).name
        raise KvfoldError(
            f"rank {rank} was ended by {name}, and the others with it",
            next="out of memory? The same command continues from what is finished",
        )
    if status == LOST:
        raise KvfoldError(f"rank {rank} lost the connection to another rank", next="the same command continues")
    raise Ended(status)


@contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[Callable[[], bool]]:
    """Forward SIGINT and SIGTERM to the processes in a context, which tells whether there was any."""
    seen = threading.Event()

    def forward(number: int, frame: FrameType | None) -> None:
        seen.set()
        for process in processes:
            process.send_signal(number)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(kind, forward)
    try:
        yield seen.is_set
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- a rank -----------------------------------------------------------------------------------------------------------


def _watch_launcher() -> None:
    """End this process, as SIGTERM does, when its launcher is gone."""
    if not launched():
        return
    descriptor = int(os.environ[LAUNCHER])

    def watch() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHANED)
        os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()
