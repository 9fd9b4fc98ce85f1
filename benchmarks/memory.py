"""Memory of uptraining on each rank, beside what `kvfold plan --gpus N` predicts, on a random model of 60M parameters.

    python benchmarks/memory.py [--worlds 1,2,4] [--results results]

One, two and four ranks train every parameter in fp32 with KL to the teacher. The measured bytes are the most that the
anonymous memory of a process grows by, from before the models are placed until the student is saved; Linux alone tells
it. A training of a small model comes first, so that what libraries allocate once does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from kvfold import ranks
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.families import all_families
from kvfold.predict.training_memory import Rank, rank_memory
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.uptrain import UptrainSettings, uptrain
from ranked import ended, start

ROWS, LENGTH, STEPS = 2, 64, 2  # rows of a pass
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "60M": {
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "vocab_size": 8192,
    },
}


class Peak(threading.Thread):
    """The most by which the anonymous memory of this process grows in a context, in bytes."""

    def __enter__(self) -> Peak:
        self.begin = self.most = self.now()
        self.over = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        """Look until the context ends."""
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now())

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    @property
    def grown(self) -> int:
        """Bytes."""
        return self.most - self.begin

    @staticmethod
    def now() -> int:
        """Bytes of this process that no file backs."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def made(folder: Path, name: str, text: Path) -> Path:
    """A student of a random teacher."""
    config = {**all_families()["llama"].tiny(), "vocab_size": 300, "tie_word_embeddings": False, **SHAPES[name]}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    few = PretrainSettings(data=str(text), tokens=1, sequence_length=16, batch_size=1, precision="fp32")
    teacher = pretrain(config, folder / f"{name}-teacher", few)
    return convert(teacher, folder / f"{name}-student", "gqa", {"kv_heads": 2})


def settings(text: Path, world: int) -> UptrainSettings:
    """Each rank has one pass in a step."""
    return UptrainSettings(
        data=str(text),
        tokens=STEPS * world * ROWS * LENGTH,
        sequence_length=LENGTH,
        batch_size=world * ROWS,
        precision="fp32",
    )


def watched(folder: Path, text: Path, world: int) -> None:
    """Train both students on this rank, and write by how much the second one lets its memory grow."""
    with ranks.joined(ranks.of_environment()):
        ranks.lead(lambda: uptrain(folder / "small-student", folder / f"small-{world}", settings(text, world)))
        with Peak() as peak:
            ranks.lead(lambda: uptrain(folder / "60M-student", folder / f"60M-{world}", settings(text, world)))
        (folder / f"{world}-{ranks.current().rank}.json").write_text(json.dumps(peak.grown))


def measured(folder: Path, text: Path, world: int) -> dict[str, Any]:
    """A row of the record."""
    assert ended(start(watched, folder, text, world, world=world)) == [0] * world
    source, guide = (Checkpoint.open(folder / f"60M-{name}") for name in ("student", "teacher"))
    rank = Rank(gpus=world, rows=ROWS, length=LENGTH, bf16=False)
    predicted = rank_memory(source.family, source.config, source.shape, guide.shape, rank)
    grown = [json.loads((folder / f"{world}-{each}.json").read_text()) for each in range(world)]
    row = {"ranks": world, "predicted_bytes": predicted.total, "measured_bytes": grown, "parts": vars(predicted)}
    print(f"{world} ranks: predicted {predicted.total / 1e6:,.0f} MB, measured", end=" ")
    print(*(f"{each / 1e6:,.0f} MB ({each / predicted.total:.2f})" for each in grown), flush=True)
    return {**row, "over_predicted": max(grown) / predicted.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks, by comma")
    parser.add_argument("--results", default="results")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        folder = Path(room)
        os.environ["KVFOLD_CACHE"] = str(folder / "cache")
        text = folder / "text.txt"
        text.write_text("".join(f"Chapter {n}: the {n * n} sheep went by, {n % 7} at a time.\n" for n in range(2000)))
        for name in SHAPES:
            made(folder, name, text)
        rows = [measured(folder, text, int(world)) for world in given.worlds.split(",")]
        parameters = Checkpoint.open(folder / "60M-teacher").shape.parameters
    asked = {"rows": ROWS, "length": LENGTH, "precision": "fp32", "loss": "kl+0.3ce", "parameters": parameters}
    found = record.make("benchmark", "memory", asked, {"rows": rows}, seed=0, wall_seconds=time.monotonic() - began)
    print(record.write(found, given.results))


if __name__ == "__main__":
    main()
