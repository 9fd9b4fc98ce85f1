"""SIGKILL random ranks of a training on two gloo ranks until it has ended, again and again; compare with a whole run.

    python benchmarks/kills.py [KILLS [SEED]]

A run that a kill ended is continued by the same call, until it is complete; then another begins. Each must end with
the bytes of the run that nobody killed. Ranks are forks of this process, so that a start costs no imports.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

from kvfold import ranks
from kvfold.convert.conversion import convert
from kvfold.errors import KvfoldError
from kvfold.train.uptrain import UptrainSettings, uptrain

WORLD = 2
SETTINGS = UptrainSettings(
    data="stdlib", tokens=60 * 256, sequence_length=32, batch_size=8, precision="fp32", log_every=1, checkpoint_steps=3
)


def start(student: Path, out: Path) -> list[int]:
    """Start the ranks and return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(WORLD):
        pid = os.fork()
        if not pid:
            numbers = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": WORLD}
            os.environ |= {name: str(value) for name, value in numbers.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = 1
            try:
                with ranks.joined(ranks.of_environment()):
                    ranks.lead(lambda: uptrain(student, out, SETTINGS) and None)
                status = 0
            except KvfoldError as error:
                print(f"rank {rank}: {error}", flush=True)
            except RuntimeError as error:  # the other rank has ended
                print(f"rank {rank}: {str(error).splitlines()[0][:200]}", flush=True)
            finally:
                os._exit(status)
        started.append(pid)
    return started


def ended(pids: list[int], wait: float) -> list[int]:
    """The statuses of processes; those that do not end by themselves are killed, and that is an error."""
    found: dict[int, int] = {}
    until = time.monotonic() + wait
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = status
        if time.monotonic() > until:
            for pid in set(pids) - found.keys():
                os.kill(pid, signal.SIGKILL)
            sys.exit("a rank did not end after the other was killed")
        time.sleep(0.01)
    return [found[pid] for pid in pids]


def bytes_of(path: Path) -> bytes:
    """The trained weights."""
    return (path / "model.safetensors").read_bytes()


def main() -> None:
    """Kill and continue."""
    wanted, seed = (int(given) for given in (sys.argv[1:] + ["50", "0"][len(sys.argv) - 1 :]))
    generator = random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        student = convert("kvfold:demo", root / "student", "gqa", {"kv_heads": 2})
        began = time.monotonic()
        assert ended(start(student, root / "whole"), 3600) == [0] * WORLD
        length = time.monotonic() - began
        whole, kills, runs = bytes_of(root / "whole"), 0, 0
        print(f"a whole run: {length:.1f} s", flush=True)
        while kills < wanted:
            out = root / f"cut-{runs}"
            while not out.exists():
                pids = start(student, out)
                time.sleep(generator.uniform(0.1, 0.9) * length)
                victim = generator.randrange(WORLD)
                done, status = os.waitpid(pids[victim], os.WNOHANG)
                if done:  # with status 1 if OpenMP did not survive the fork: that counts as no kill
                    ended(pids[:victim] + pids[victim + 1 :], 600)
                    print(
                        f"rank {victim} ended before its kill, status {os.waitstatus_to_exitcode(status)}", flush=True
                    )
                    continue
                os.kill(pids[victim], signal.SIGKILL)
                ended(pids, 600)
                kills += 1
                print(f"kill {kills}: rank {victim}", flush=True)
            assert bytes_of(out) == whole, f"run {runs} ended with other weights"
            runs += 1
            print(f"run {runs} ended with the bytes of the whole run", flush=True)
        print(f"{kills} kills in {runs} runs: all ended with the bytes of the whole run")


if __name__ == "__main__":
    main()
