"""Time and peak memory of the closed form for one layer, over widths: its calibration, its merge and its repair.

    calibrate   the teacher reads the text and sums the moments that `--init fit` needs
    merge       a quarter of the heads stay: eigenvectors of small matrices, no text
    repair      q, o and the MLP are refitted, teacher and student side by side

The source is a random Llama of one layer: heads of 128, an MLP of 2.7 times the width, 2,048 words, bf16. Each width
runs in a process of its own. Memory is the largest RssAnon, sampled every 5 ms, minus that before the
phase; for the calibration, the record also holds the prediction of `calibrate.memory_bytes`. A model of L layers
takes L times as long, and no more memory: one layer is open at a time.

Predicted, before it was run, for 4k tokens on 2 cores at some 30 GFLOPS in float64 and 120 in float32: every term that
counts grows as the cube of the width, or as its square times the tokens. At 4096: calibrate 30 s (a reading, and
4 T D^2 operations in float64); merge 45 s; repair 400 s: eight readings 110 s, two times three sweeps of gate and up
100 s, two products and two inverses as wide as the MLP 120 s, the system of down 40 s. At 512 two seconds. Readings
and sweeps grow with the tokens; merge, the systems and the memory do not. Memory at 4096: calibrate 1.4 GB, within 20%
of the prediction; repair 7 GB: two layers, and five float64 matrices as wide as the MLP.

    python benchmarks/fit.py [--widths 512,1024,2048,4096] [--tokens 4k] [--no-repair] [--quick] [--results results]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEAD_DIM, VOCABULARY, KEPT = 128, 2048, 4  # of KEPT heads one stays
PHASES = ("calibrate", "merge", "repair")


def config_of(width: int) -> dict[str, Any]:
    """config.json of the source."""
    from kvfold.families import all_families

    heads = width // HEAD_DIM
    return {
        **all_families()["llama"].tiny(),
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": round(2.7 * width),
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write a checkpoint in bf16."""
    from kvfold.disk.output import write_json
    from kvfold.disk.shards import TensorSpec, Writer

    folder.mkdir(parents=True)
    with Writer(folder, {name: TensorSpec(tuple(each.shape), "bfloat16") for name, each in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    write_json(folder / "config.json", config)


def random_layer(config: dict[str, Any]) -> dict[str, Any]:
    """The source's tensors: matrices are noise that keeps the size of what goes through them, norms are 1."""
    import torch

    width, mlp, at = config["hidden_size"], config["intermediate_size"], "model.layers.0"
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes |= {f"{at}.self_attn.{role}_proj.weight": (width, width) for role in "qkvo"}
    shapes |= {f"{at}.mlp.{part}_proj.weight": (mlp, width) for part in ("gate", "up")}
    shapes |= {f"{at}.mlp.down_proj.weight": (width, mlp)}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(size, generator=generator) * size[1] ** -0.5 for name, size in shapes.items()}
    norms = (f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight", "model.norm.weight")
    return drawn | {name: torch.ones(width) for name in norms}


# --- one width, in a process of its own -----------------------------------------------------------------------------


def anonymous_mb() -> float:
    """RssAnon of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


@contextmanager
def measured(name: str, into: dict[str, float]) -> Iterator[None]:
    """Seconds of a phase, and the most memory that it held above what was there before."""
    before, done = anonymous_mb(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        yield
    finally:
        into[f"{name}_seconds"] = time.perf_counter() - begun
        done.set()
        watcher.join()
        into[f"{name}_mb"] = max(seen) - before


def fit_layer(width: int, tokens: int, room: Path, *, repaired: bool) -> dict[str, float]:
    """Fit one layer of this width: its seconds and memory by phase."""
    import numpy as np
    import torch  # noqa: F401 -- imports are not timed
    import transformers  # noqa: F401

    from kvfold import hf  # noqa: F401
    from kvfold.calibrate.decoder import CalibrationSettings, calibrate, memory_bytes
    from kvfold.contracts.site import Site, SiteTensors
    from kvfold.disk.checkpoint import Checkpoint
    from kvfold.methods import gqa
    from kvfold.repair.layers import repair
    from kvfold.text.tokens import TokenFile

    config = config_of(width)
    save(room / "source", config, random_layer(config))
    source, site = Checkpoint.open(room / "source"), Site(0)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens).astype(np.uint16)
    text = TokenFile(room / "text", ids, VOCABULARY, "random", "random tokens")
    kept = config["num_key_value_heads"] // KEPT
    wanted = gqa.Config(kv_heads=kept, init="fit")
    questions = gqa.METHOD.needs(wanted, source.shape)
    found: dict[str, float] = {}
    with measured("calibrate", found):
        answers = calibrate(source, questions, text)
    attention = source.shape.sites[site]
    old = {role: source.read(source.family.tensor(site, role)) for role in attention.roles()}
    with measured("merge", found):
        new = gqa.METHOD.convert({site: SiteTensors(attention, old)}, answers, wanted)[site]
    tensors = {name: source.read(name) for name in source.names()}
    tensors |= {source.family.tensor(site, role): tensor for role, tensor in new.items()}
    save(room / "student", {**config, "num_key_value_heads": kept}, tensors)
    student = Checkpoint.open(room / "student")
    del answers, old, new, tensors
    if repaired:
        with measured("repair", found):
            for _ in repair(source, student, gqa.METHOD.repairs(wanted), text):
                pass
    found["predicted_mb"] = memory_bytes(source.shape, questions, CalibrationSettings()) / 1e6
    return found


def measure(width: int, tokens: int, *, repaired: bool) -> dict[str, float]:
    """One width, with a cache folder of its own: nothing is recalled from an earlier run."""
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        ran = subprocess.run(
            [
                sys.executable,
                __file__,
                "--child",
                str(width),
                str(tokens),
                room,
                *([] if repaired else ["--no-repair"]),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "KVFOLD_CACHE": str(Path(room) / "cache")},
        )
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="512,1024,2048,4096")
    parser.add_argument("--tokens", default="4k", help="tokens of the calibration text; convert reads 65k")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the two smallest widths on 1k tokens: a trial of the benchmark, not a result",
    )
    parser.add_argument("--no-repair", action="store_true", help="calibrate and merge alone")
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        width, tokens, room = given.child
        print(json.dumps(fit_layer(int(width), int(tokens), Path(room), repaired=not given.no_repair)))
        return
    from kvfold.disk import record

    widths = [int(width) for width in given.widths.split(",")]
    tokens = int(given.tokens.removesuffix("k")) * (1000 if given.tokens.endswith("k") else 1)
    if given.quick:
        widths, tokens = sorted(widths)[:2], 1000
    begun = time.perf_counter()
    rows: dict[str, dict[str, float]] = {}
    for width in widths:
        rows[str(width)] = measure(width, tokens, repaired=not given.no_repair)
        print(width, {name: round(value, 2) for name, value in rows[str(width)].items()}, flush=True)
    metrics = {
        "by_width": rows,
        "load_average": os.getloadavg()[0],
        "calibrate_memory_over_predicted": {
            width: row["calibrate_mb"] / row["predicted_mb"] for width, row in rows.items()
        },
        "seconds": {width: sum(row.get(f"{phase}_seconds", 0) for phase in PHASES) for width, row in rows.items()},
    }
    settings = {
        "widths": widths,
        "tokens": tokens,
        "head_dim": HEAD_DIM,
        "vocabulary": VOCABULARY,
        "one_head_of": KEPT,
        "quick": given.quick,
        "repair": not given.no_repair,
        "note": given.note,
    }
    made = record.make("benchmark", "fit", settings, metrics, wall_seconds=round(time.perf_counter() - begun, 1))
    print(record.write(made, given.results))


if __name__ == "__main__":
    main()
