"""Compiled blocks: what torch.compile makes of them trains as they do, and a compiler that is missing is one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvfold.convert.conversion import convert
from kvfold.errors import SettingError
from kvfold.train.uptrain import UptrainSettings, uptrain

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # dynamo looks at that of each input
]


def _settings(text: Path, **changes: Any) -> UptrainSettings:
    sizes = {"tokens": 256, "sequence_length": 16, "batch_size": 4, "log_every": 1, "precision": "fp32"}
    return UptrainSettings(data=str(text), **sizes, **changes)


def _losses(path: Path) -> list[float]:
    lines = map(json.loads, (path / "train.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_compiled_blocks_train_as_others(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 1})
    plain = uptrain(student, tmp_path / "plain", _settings(text))
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    compiled = uptrain(student, tmp_path / "compiled", _settings(text, compile=True))
    assert any(node.target is nn.functional.linear for graph in graphs for node in graph.graph.nodes)
    assert _losses(compiled) == pytest.approx(_losses(plain), rel=1e-6)


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_one_line(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler\nis found")

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    with pytest.raises(SettingError, match="compile: torch.compile failed: .*no C.. compiler is found; train without"):
        uptrain(tiny_checkpoint("llama"), tmp_path / "out", _settings(text, compile=True, loss="ce"))
