"""The table of docs/cluster.md: bytes on each device of an uptraining, as `kvfold plan --gpus N` predicts them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kvfold.contracts.site import Shape
from kvfold.families import all_families
from kvfold.predict.training_memory import Rank, rank_memory
from kvfold.report.tables import markdown

START, END = "<!-- memory -->", "<!-- memory end -->"
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


def with_memory(text: str) -> str:
    """A page with the table between its marks; a page without marks as it is."""
    return re.sub(f"{START}\n(?:.*?\n)??{END}", lambda _: "\n".join([START, _table(), END]), text, flags=re.S)


def _table() -> str:
    columns = ["source", "key/value heads", "trained", *(f"{count} GPU{'s' * (count > 1)}" for count in GPUS)]
    return markdown((columns, list(_rows())), words=3)


def _rows() -> Iterator[list[str]]:
    family = all_families()["llama"]
    for name, (heads, config) in MODELS.items():
        teacher: Shape = family.shape(config)
        student = family.shape({**config, "num_key_value_heads": heads})
        for converted_only, trained in ((False, "everything"), (True, "converted attention")):
            ranks = (Rank(gpus=count, checkpointing="block", converted_only=converted_only) for count in GPUS)
            found = (rank_memory(family, config, student, teacher, rank).total / 1e9 for rank in ranks)
            yield [name, f"{config['num_key_value_heads']} to {heads}", trained, *(f"{each:,.0f} GB" for each in found)]
