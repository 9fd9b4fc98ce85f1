"""Speed of uptraining on two ranks with one thread each, over that of one process with two threads, on the demo.

    python benchmarks/two_ranks.py [--rounds 5] [--steps 8] [--batch-size 16] [--results results] [--note TEXT]

Both train the same steps of 16 x 256 tokens, of the demo's student with two key/value heads, in turns; each round
starts new processes. A speed is the median over the steps behind the first two. The ratio is that of the medians over
rounds. Processor seconds of all processes for a step are noted too: a machine that others use changes them less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvfold import ranks
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.progress import Silent
from kvfold.train.uptrain import UptrainSettings, uptrain
from ranked import ended, start

LAYOUTS = {"one process": (1, 2), "two ranks": (2, 1)}  # processes, and threads of each
FIRST = 2  # steps that are not counted: they allocate


class Processor(Silent):
    """The processor's time at the end of each step, in seconds."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def advance(self, amount: float, note: str = "") -> None:
        """Note the time of this process."""
        if note:
            self.at.append(time.process_time())


def trained(student: Path, out: Path, steps: int, rows: int, threads: int) -> None:
    """Train on this rank."""
    torch.set_num_threads(threads)
    settings = UptrainSettings(data="stdlib", tokens=steps * rows * 256, batch_size=rows, log_every=1)
    seen = Processor()
    with ranks.joined(ranks.of_environment()):
        ranks.lead(lambda: uptrain(student, out, settings, progress=seen))
    if seen.at:
        out.with_suffix(".json").write_text(json.dumps((seen.at[-1] - seen.at[FIRST - 1]) / (steps - FIRST)))


def turn(student: Path, out: Path, steps: int, rows: int, world: int, threads: int) -> dict[str, float]:
    """Tokens a second of one training, and processor seconds of a step on all ranks."""
    assert ended(start(trained, student, out, steps, rows, threads, world=world)) == [0] * world
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    paces = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][FIRST:]
    shutil.rmtree(out)
    return {
        "tokens_per_second": statistics.median(paces),
        "cpu": world * json.loads(out.with_suffix(".json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "2"
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        student = convert("kvfold:demo", Path(room) / "student", "gqa", {"kv_heads": 2})
        for number in range(given.rounds):
            for name, layout in LAYOUTS.items():
                turns[name].append(turn(student, Path(room) / f"{number}", given.steps, given.batch_size, *layout))
                print(name, {key: round(value, 2) for key, value in turns[name][-1].items()}, flush=True)
    rows: list[dict[str, Any]] = []
    for name, (world, threads) in LAYOUTS.items():
        pace, cpu = (statistics.median(each[key] for each in turns[name]) for key in ("tokens_per_second", "cpu"))
        rows.append({"layout": name, "ranks": world, "threads": threads, "tokens_per_second": pace, "cpu_seconds": cpu})
    ratio = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    print(f"two ranks train {ratio:.2f} of the tokens of one process")
    settings = {"rounds": given.rounds, "steps": given.steps, "batch_size": given.batch_size, "note": given.note}
    metrics = {"rows": rows, "ratio": ratio, "turns": turns}
    seconds = time.monotonic() - began
    found = record.make("benchmark", "two-ranks", settings, metrics, seed=0, wall_seconds=seconds)
    print(record.write(found, given.results))


if __name__ == "__main__":
    main()
