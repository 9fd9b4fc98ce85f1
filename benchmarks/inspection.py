"""Whether an inspection predicts what it says: the loss of uniform folds, and the heads that copy.

A text is cut in two. `kvfold inspect` reads the first half. On the second one, this measures students with every
suggested number of heads, converted on the first half without repair, and the copy gain of the model without the five
heads that the inspection names, beside five heads drawn at random.

    python benchmarks/inspection.py kvfold:demo --data stdlib:heldout --name demo
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import hf
from kvfold.cli.console import Lines
from kvfold.convert.conversion import convert
from kvfold.convert.settings import ConvertSettings
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.record import Record
from kvfold.evaluate import loss
from kvfold.evaluate.recall import copy_loss
from kvfold.inspection.inspection import inspect
from kvfold.inspection.settings import InspectSettings
from kvfold.inspection.suggestion import NAMED
from kvfold.text.copies import copy_rows
from kvfold.text.documents import read_texts
from kvfold.text.tokens import token_file
from recall import mean_outputs, output_of, replaced

ROW = 256  # tokens of a window, and of a row over which the outputs of heads are averaged
MEAN_TOKENS = 2048
DISTANCE, TRIALS, SEED = 64, 64, 1  # of copies: other rows than those of the inspection
DRAWS = 20  # of five heads


def main() -> None:
    """Inspect, measure, print, and write both records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="of the second half that are measured")
    parser.add_argument("--sensitivity-tokens", type=int, default=InspectSettings.sensitivity_tokens)
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    start, texts = time.perf_counter(), "\n".join(read_texts(given.data))
    source = Checkpoint.open(given.source)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first.txt", Path(folder) / "second.txt"
        first.write_text(texts[: len(texts) // 2], encoding="utf-8")
        second.write_text(texts[len(texts) // 2 :], encoding="utf-8")
        settings = InspectSettings(str(first), sensitivity_tokens=given.sensitivity_tokens)
        made = inspect(
            given.source, settings, out=Path(folder) / "page", name=f"inspection/{given.name}", progress=Lines()
        )
        ids_N = torch.from_numpy(token_file(second, source.path).tokens[:].astype("int64"))
        metrics = {
            "folds": list(folds(source, made, first, ids_N[: given.tokens + 1], Path(folder))),
            "recall": recall(source, made, ids_N),
            "load_average": os.getloadavg()[0],
        }
    named = {"source": source.name, "data": os.path.basename(given.data)}
    kept = replace(made, settings={**made.settings, **named}, identity="")
    asked = {"tokens": given.tokens, "note": given.note, **named}
    hashes = {"source": source.hash(), "data": made.hashes["data"]}
    seconds = round(time.perf_counter() - start, 1)
    mine = record.make("benchmark", made.name, asked, metrics, seed=SEED, hashes=hashes, wall_seconds=seconds)
    for each in (kept, mine):
        print(record.write(each, given.results), flush=True)


def folds(source: Checkpoint, made: Record, text: Path, ids_N: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """Predicted KL of each number of heads in all layers, and the KL and the rise of the loss of a student."""
    teacher = hf.load(source.path)
    for heads, predicted in made.metrics["predicted"].items():
        options = ConvertSettings(calibration=str(text), repair=("none",))
        student = convert(source.path, folder / heads, "gqa", {"kv_heads": heads}, options=options, progress=Lines())
        models = {"student": hf.load(student), "teacher": teacher}
        with torch.inference_mode():
            sums = loss.score(models, ids_N, length=ROW, stride=ROW, batch_size=8)
        found = loss.distance(sums)
        row = {"kv_heads": int(heads), "predicted": predicted["kl"], "kl": found["kl"], "loss_gap": found["loss_gap"]}
        print(row, flush=True)
        yield row


@torch.inference_mode()
def recall(source: Checkpoint, made: Record, ids_N: Tensor) -> dict[str, Any]:
    """The copy gain that the model loses without the heads named, and without as many drawn at random."""
    model, rows = hf.load(source.path), made.metrics["layers"]
    special = hf.load_tokenizer(source.path).all_special_ids
    copied_BT = copy_rows(ids_N, DISTANCE, trials=TRIALS, seed=SEED, special=special)
    means = mean_outputs(model, source, ids_N[:MEAN_TOKENS].view(-1, ROW))
    heads = [(row["layer"], head, rise) for row in rows for head, rise in enumerate(row["rise"])]
    named = [each[:2] for each in sorted(heads, key=lambda each: -each[2])[:NAMED]]

    def gain(without: Sequence[tuple[int, int]]) -> float:
        with removed(model, source, without, means):
            first, second = copy_loss(model, copied_BT, batch_size=8)
        return first - second

    whole, drawn = gain(()), random.Random(SEED)
    lost = [whole - gain([each[:2] for each in drawn.sample(heads, NAMED)]) for _ in range(DRAWS)]
    found = {"gain": whole, "named": named, "lost": whole - gain(named), "lost_at_random": sum(lost) / DRAWS}
    print(found, flush=True)
    return {**found, "draws": lost}


@contextmanager
def removed(
    model: Any, source: Checkpoint, heads: Sequence[tuple[int, int]], means: Sequence[Tensor]
) -> Iterator[None]:
    """A context in which the readers of these key/value heads put out their means over a text."""
    with ExitStack() as stack:
        for layer, head in heads:
            site = next(each for each in source.shape.cached_sites if each.layer == layer)
            width = source.shape.sites[site].query_group * source.shape.sites[site].head_dim
            columns, output = slice(head * width, (head + 1) * width), output_of(model, source, site)
            stack.enter_context(replaced(output, columns, means[layer]))
        yield


if __name__ == "__main__":
    main()
