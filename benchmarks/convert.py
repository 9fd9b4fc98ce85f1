"""Time and memory of a conversion, compared with copying and hashing, and with transformers' load-all conversion.

A random Llama checkpoint of 1.4 GB (bfloat16, shards of 500 MB, 32 key/value heads of 64) becomes one of 8 heads:

    convert    kvfold.convert.conversion, which hashes source and student on the way and flushes them to disk
    copy+hash  the same files copied, then source and student read and hashed by SHA-256, as `cp` and `sha256sum` would
    load-all   from_pretrained, pool every key and value, save_pretrained; nothing is hashed

Each runs in its own process, timed after its imports, in turns, with the source in the page cache and the disk idle
before each start. Memory is the largest RssAnon of the process, sampled every 5 ms: pages mapped from files can be
dropped at any time and do not count.

Predicted, before it was first run: convert copies 1.26 GB as copy+hash does, but hashes 1.4 + 0.03 GB on two threads
where the other hashes 1.4 + 1.26 GB on one. A copy through memory costs about what the kernel's own costs, so 0.7x of
copy+hash, and 0.5x of load-all; anonymous memory 0.25 GB (Python and torch take 0.15, a float64 key 0.03) against 1.6.

The records are in results/. The prediction was wrong about load-all's memory (0.46 GB: transformers maps its source
too), and the float64 copy of a whole key was the most expensive step, so `gqa` now pools head by head.

    python benchmarks/convert.py [--rounds 5] [--results results]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 11,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
KV_HEADS = 8
SHARD = 500 * 10**6
VARIANTS = ("convert", "copy+hash", "load-all")


def make_source(folder: Path) -> None:
    """Write the random checkpoint, tensor by tensor."""
    import torch

    from kvfold.disk.output import write_json
    from kvfold.disk.shards import TensorSpec, Writer
    from kvfold.families import all_families

    config = {**all_families()["llama"].tiny(), **SHAPE}
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{role}_proj.weight": (width, width) for role in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (mlp, width) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with Writer(
        folder, {name: TensorSpec(shape, "bfloat16") for name, shape in shapes.items()}, shard_bytes=SHARD
    ) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator) * 0.02)
        writer.close()
    write_json(folder / "config.json", config)


# --- the three ways, each timed in a process of its own -------------------------------------------------------------


def prepare_convert(source: Path, student: Path, out: Path) -> Callable[[], None]:
    import torch  # noqa: F401 -- convert imports it when it is called; imports are not timed

    from kvfold.convert.conversion import ConvertSettings, convert

    options = ConvertSettings(shard_size=SHARD)
    return lambda: print(convert(source, out, "gqa", {"kv_heads": KV_HEADS}, options=options), file=sys.stderr)


def prepare_copy(source: Path, student: Path, out: Path) -> Callable[[], None]:
    import hashlib

    def work() -> None:
        out.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
        for path in (*source.iterdir(), *student.iterdir()):
            with path.open("rb") as opened:
                hashlib.file_digest(opened, "sha256")

    return work


def prepare_load_all(source: Path, student: Path, out: Path) -> Callable[[], None]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        state = model.state_dict()
        for name, tensor in state.items():
            if ".k_proj." in name or ".v_proj." in name:
                heads = tensor.double().view(KV_HEADS, SHAPE["num_key_value_heads"] // KV_HEADS, SHAPE["head_dim"], -1)
                state[name] = heads.mean(1).reshape(-1, tensor.shape[1]).bfloat16()
        config = AutoConfig.from_pretrained(source, num_key_value_heads=KV_HEADS)
        with torch.device("meta"):
            pooled = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        pooled.load_state_dict(state, assign=True)
        pooled.save_pretrained(out, max_shard_size=SHARD)

    return work


PREPARE = {"convert": prepare_convert, "copy+hash": prepare_copy, "load-all": prepare_load_all}


def anonymous_mb() -> float:
    """RssAnon of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def child(variant: str, source: Path, student: Path, out: Path) -> None:
    """Run one way and print its seconds and memory as JSON."""
    work = PREPARE[variant](source, student, out)
    seen, done = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    os.sync()  # writes that the kernel had still buffered when the work returned
    durable = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "durable_seconds": durable, "before_mb": seen[0], "anonymous_mb": max(seen)}))


def measure(variant: str, source: Path, student: Path, out: Path) -> dict[str, float]:
    """One run of one way, from a warm source and a quiet disk."""
    for path in source.iterdir():
        with path.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    os.sync()
    ran = subprocess.run(
        [sys.executable, __file__, "--child", variant, str(source), str(student), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    if out != student:
        shutil.rmtree(out)
    return found


def summarise(runs: dict[str, list[dict[str, float]]], source: Path, student: Path) -> dict[str, Any]:
    """Medians, and medians of the ratios within each round."""
    middle = statistics.median
    metrics: dict[str, Any] = {
        "source_bytes": sum(path.stat().st_size for path in source.iterdir()),
        "student_bytes": sum(path.stat().st_size for path in student.iterdir()),
        "largest_layer_mb": 2
        * (4 * SHAPE["hidden_size"] ** 2 + 3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"])
        / 1e6,  # type: ignore[operator]
        "load_average": os.getloadavg()[0],
        "runs": runs,
    }
    for variant in VARIANTS:
        name = variant.replace("-", "_").replace("+", "_")
        metrics[f"{name}_seconds"] = middle(run["seconds"] for run in runs[variant])
        metrics[f"{name}_durable_seconds"] = middle(run["durable_seconds"] for run in runs[variant])
        metrics[f"{name}_anonymous_mb"] = max(run["anonymous_mb"] for run in runs[variant])
        if variant != "convert":
            pairs = list(zip(runs["convert"], runs[variant], strict=True))
            for kind in ("seconds", "durable_seconds"):
                metrics[f"ratio_to_{name}_{kind}"] = middle(mine[kind] / other[kind] for mine, other in pairs)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        variant, *paths = given.child
        child(variant, *(Path(path) for path in paths))
        return
    from kvfold.disk import record

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        source, student = Path(room) / "source", Path(room) / "student"
        make_source(source)
        measure("convert", source, student, student)
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for number in range(given.rounds):
            for variant in VARIANTS:
                runs[variant].append(measure(variant, source, student, Path(room) / "out"))
                print(f"round {number + 1}: {variant:10} {runs[variant][-1]}", flush=True)
        metrics = summarise(runs, source, student)
    settings = {**SHAPE, "kv_heads": KV_HEADS, "shard_bytes": SHARD, "rounds": given.rounds, "note": given.note}
    made = record.make("benchmark", "convert", settings, metrics, wall_seconds=time.perf_counter() - start)
    print(record.write(made, given.results))
    print(json.dumps({name: value for name, value in metrics.items() if name != "runs"}, indent=2))


if __name__ == "__main__":
    main()
