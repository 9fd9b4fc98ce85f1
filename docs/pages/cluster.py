"""What docs/cluster.md holds between marks: the memory that `kvfold plan --gpus N` predicts, and what was measured.

<!-- cluster: predicted -->     bytes on each device of an uptraining
<!-- cluster: memory -->        bytes on each rank, predicted and measured (benchmarks/memory.py)
<!-- cluster: kills -->         trainings whose ranks were killed (benchmarks/kills.py)
<!-- cluster: speed -->         two ranks over one process (benchmarks/two_ranks.py)
<!-- cluster end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kvfold.contracts.site import Shape
from kvfold.disk.record import Record
from kvfold.families import all_families
from kvfold.predict.training_memory import Rank, rank_memory
from kvfold.report.tables import markdown

END = "<!-- cluster end -->"
GPUS = (1, 8, 64)
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # key/value heads of the student, and the config of the source
    name: (
        heads // 4,
        {
            **all_families()["llama"].tiny(),
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": queries,
            "num_key_value_heads": heads,
            "head_dim": width // queries,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 4096,
        },
    )
    for name, width, layers, queries, heads, inner, vocabulary, tied in (
        ("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128_256, True),
        ("Llama-2-7B", 4096, 32, 32, 32, 11_008, 32_000, False),
        ("Llama-2-13B", 5120, 40, 40, 40, 13_824, 32_000, False),
        ("Llama-3-70B", 8192, 80, 64, 8, 28_672, 128_256, False),
    )
}


def with_cluster(text: str, records: Sequence[Record]) -> str:
    """A page with what it asks for between its marks; a page without marks as it is."""

    def written(found: re.Match[str]) -> str:
        part, run = PARTS[found[1]]
        return "\n".join([found[0].partition("\n")[0], *map(part, _of(records, run)), END])

    return re.sub(f"<!-- cluster: ([a-z]+) -->\n(?:.*?\n)??{END}", written, text, flags=re.S)


def _of(records: Sequence[Record], run: str) -> list[Any]:
    """The metrics of a benchmark, if it is recorded; the prediction needs none."""
    return [each.metrics for each in records if each.name == run] if run else [None]


def _predicted(_: object) -> str:
    counts = (f"{count} GPU{'s' * (count > 1)}" for count in GPUS)
    columns = ["source", "key/value heads", "trained", *counts, "1 GPU, offloaded"]
    return markdown((columns, list(_rows())), words=3)


def _memory(metrics: Any) -> str:
    rows = [
        [
            f"{row['ranks']}",
            f"{row['predicted_bytes'] / 1e6:,.0f} MB",
            f"{max(row['measured_bytes']) / 1e6:,.0f} MB",
            f"{row['over_predicted']:.2f}",
        ]
        for row in metrics["rows"]
    ]
    about = (
        "A random model of 60M parameters, trained in fp32 with KL to its teacher (`benchmarks/memory.py`), took:\n\n"
    )
    return about + markdown((["ranks", "predicted", "measured, the largest", "measured / predicted"], rows), words=0)


def _kills(metrics: Any) -> str:
    return (
        "{kills} times, a random one of two ranks was killed, at random moments of {runs} trainings. Each training "
        "ended with the weights\nand losses of one that nobody killed, bit for bit (`benchmarks/kills.py`)."
    ).format_map(metrics)


def _speed(metrics: Any) -> str:
    return (
        f"Two ranks with one thread each train {metrics['ratio']:.2f} of the tokens a second of one process with two "
        "threads, on the\ndemo (`benchmarks/two_ranks.py`)."
    )


PARTS: dict[str, tuple[Callable[[Any], str], str]] = {
    "predicted": (_predicted, ""),
    "memory": (_memory, "memory"),
    "kills": (_kills, "kills"),
    "speed": (_speed, "two-ranks"),
}


def _rows() -> Iterator[list[str]]:
    family = all_families()["llama"]
    for name, (heads, config) in MODELS.items():
        teacher: Shape = family.shape(config)
        student = family.shape({**config, "num_key_value_heads": heads})
        for converted_only, trained in ((False, "everything"), (True, "converted attention")):
            one = Rank(checkpointing="block", converted_only=converted_only)
            ranks = (*(replace(one, gpus=count) for count in GPUS), replace(one, offload="both"))
            found = [rank_memory(family, config, student, teacher, rank) for rank in ranks]
            cells = [f"{each.total / 1e9:,.0f} GB" for each in found]
            cells[-1] += f", host {found[-1].host / 1e9:,.0f} GB"
            yield [name, f"{config['num_key_value_heads']} to {heads}", trained, *cells]
