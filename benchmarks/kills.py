"""SIGKILL random ranks of trainings on two ranks, again and again, and compare each end with that of a whole run.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--results results]

A model of 48,000 parameters saves its state in every step, while training goes on, as on GPUs. At a random moment of
its start, its training, a save or its end, a random rank is killed, and the other within a second, as `--gpus` does it.
The same command then continues, until the run is complete; then another begins. Each must end with the weights of the
run that nobody killed, byte for byte, and with its losses.

Each rank is a process of its own that runs `kvfold uptrain` with the variables of torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kvfold.cli.main import run_command
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.families import all_families
from kvfold.train import state
from kvfold.train.pretrain import PretrainSettings, pretrain
from ranked import PATIENCE, ended, start

WORLD = 2
ROWS, LENGTH, STEPS = 4, 32, 24
STRETCH = 3  # a kill comes within this part of the time that a whole run takes


def made(folder: Path) -> list[str]:
    """A student, as the words of the command that trains it; the output is missing."""
    text = folder / "text.txt"
    text.write_text("".join(f"Chapter {n}: the {n * n} sheep went by, {n % 7} at a time.\n" for n in range(400)))
    config = {**all_families()["llama"].tiny(), "vocab_size": 300}
    few = PretrainSettings(data=str(text), tokens=512, sequence_length=LENGTH, batch_size=ROWS)
    teacher = pretrain(config, folder / "teacher", few)
    student = convert(teacher, folder / "student", "gqa", {"kv_heads": 1})
    words = ["uptrain", str(student), "--data", str(text), "--tokens", str(STEPS * ROWS * LENGTH)]
    words += ["--sequence-length", str(LENGTH), "--batch-size", str(ROWS), "--precision", "fp32"]
    return [*words, "--log-every", "1", "--checkpoint-steps", "1"]


def command(words: list[str], log: Path) -> None:
    """Run the command as one of the ranks, with states in the background."""
    state.background = lambda content: True
    with log.open("a") as lines:
        os.dup2(lines.fileno(), sys.stderr.fileno())
    sys.exit(run_command(words))


def run(words: list[str], out: Path) -> list[BaseProcess]:
    """Start the ranks of a run, or of its rest."""
    return start(command, [*words[:2], str(out), *words[2:]], out.with_suffix(".log"), world=WORLD)


def trained(out: Path) -> tuple[bytes, list[Any]]:
    """What must be equal: the weights, and the losses of all steps."""
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), [line.get("loss") for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="results")
    given = parser.parse_args()
    draw, began = random.Random(given.seed), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        folder = Path(room)
        os.environ["KVFOLD_CACHE"] = str(folder / "cache")
        words, length = made(folder), 0.0
        for name in ("first", "whole"):  # the first starts the server
            begun = time.monotonic()
            assert ended(run(words, folder / name)) == [0] * WORLD, (folder / f"{name}.log").read_text()
            length = time.monotonic() - begun
        whole = trained(folder / "whole")
        print(f"a whole run of {STEPS} steps: {length:.1f} s", flush=True)
        kills, runs = [0] * WORLD, 0
        while sum(kills) < given.kills:
            out = folder / f"cut-{runs}"
            while not out.exists():
                started, victim, begun = run(words, out), draw.randrange(WORLD), time.monotonic()
                started[victim].join(draw.uniform(0, length / STRETCH))
                seconds, done = time.monotonic() - begun, started[victim].exitcode is not None
                started[victim].kill()
                statuses = ended(started, PATIENCE if done else draw.random())
                if statuses[victim] == -signal.SIGKILL:
                    kills[victim] += 1
                    print(f"kill {sum(kills)}: rank {victim} after {seconds:.1f} s", flush=True)
                else:
                    assert statuses == [0] * WORLD, out.with_suffix(".log").read_text()
            assert trained(out) == whole, f"run {runs} ended with other weights or losses"
            runs += 1
            print(f"run {runs} ended with the weights and losses of the whole run", flush=True)
    settings = {"world": WORLD, "steps": STEPS, "kills": given.kills}
    metrics = {"kills": sum(kills), "of_each_rank": kills, "runs": runs}
    seconds = time.monotonic() - began
    found = record.make("benchmark", "kills", settings, metrics, seed=given.seed, wall_seconds=seconds)
    print(record.write(found, given.results))


if __name__ == "__main__":
    main()
