"""What the tests of exports share: the engines that are installed, configs, and greedy decoding."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.export.exporting import ExportSettings
from kvfold.progress import Silent

Make = Callable[..., Path]


HAS_GGUF = importlib.util.find_spec("gguf") is not None


HAS_LLAMA_CPP = HAS_GGUF and importlib.util.find_spec("llama_cpp") is not None


needs_ct2 = pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")


needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="gguf is not installed")


needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


MIXED = {
    "llama": ("llama", {}),
    "biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", {**MISTRAL, "sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
QUICK = ExportSettings(prompt_tokens=12, new_tokens=8)


class Heard(Silent):
    """Keeps the lines that were said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def found(folder: Path) -> dict[str, Any]:
    """What the export's lineage says of its comparison."""
    step = json.loads((folder / "kvfold.json").read_text())["steps"][-1]
    assert step["stage"] == "export"
    return dict(step["check"])


HEADS = (4, 2, 1, 2)


def greedy(path: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    """Greedy continuations by stock transformers without a cache, and the smallest margin of a choice."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers, margin = [], float("inf")
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                best = model(torch.tensor([ids])).logits[0, -1].topk(2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                ids.append(int(best.indices[0]))
        answers.append(ids[len(prompt) :])
    return answers, margin
