"""An inspection from end to end, on a model whose heads are known: two copy, and two are images of one another."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuits import VOCABULARY, planted
from kvfold.calibrate.resumed import Resumed
from kvfold.cli.main import run_command
from kvfold.contracts.per_layer import PerSite
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.inspection.inspection import inspect
from kvfold.inspection.settings import InspectSettings
from kvfold.report import report
from kvfold.report.inspection import advice, commands

Make = Callable[..., Path]
SMALL: dict[str, Any] = {"effort": "quick", "sensitivity_tokens": 256}


@pytest.fixture
def known(tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Heads 1 of layer 0 and 2 of layer 1 copy; head 3 of layer 0 is an image of head 0. With a text of words."""
    folder = planted(tiny_checkpoint)
    tensors = load_file(folder / "model.safetensors")
    heads = {role: tensors[f"model.layers.0.self_attn.{role}_proj.weight"].view(4, 64, -1) for role in "kv"}
    real, imaginary = heads["k"][0, :32], heads["k"][0, 32:]
    heads["k"][3] = torch.cat([-2 * imaginary, 2 * real])  # by 2i in every plane
    heads["v"][3] = heads["v"][0].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    drawn = np.random.default_rng(0).integers(3, VOCABULARY, 2000)
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in drawn))
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_it_finds_what_was_planted_and_its_commands_run(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = InspectSettings("text.txt", loss=3.0, **SMALL)
    made = inspect("teacher", settings, out="out", records="results")
    named = [head[:2] for head in made.metrics["recall_heads"]]
    assert sorted(named[:2]) == [[0, 1], [1, 2]]
    assert made.metrics["duplicates"] == [[0, 0, 3]]
    assert made.metrics["copying"]
    layers = made.metrics["layers"]
    assert layers[0]["keys"][0][3] == pytest.approx(1, abs=1e-4)
    assert layers[1]["induction"][2] > 0.8
    assert all(1 <= rank <= 64 for row in layers for rank in row["key_rank"] + row["value_rank"])
    assert [sum(head) for head in layers[0]["planes"]] == pytest.approx([1] * 4, abs=1e-3)

    # the same again: nothing runs, the same bytes
    page = next(Path("out").glob("*.html"))
    before, started = page.read_bytes(), []
    monkeypatch.setattr(Resumed, "__init__", lambda *given: started.append(given))
    again = inspect("teacher", settings, out="out", records="results")
    assert again.metrics == made.metrics
    assert page.read_bytes() == before
    assert record.read_all("results") == [again]

    # the costs are those by which auto chooses, and the page's commands make students
    budget = ["--kv-heads", "auto", "--budget", "0.5", "--budget-metric", "both", "--calibration", "text.txt"]
    flags = ["--repair", "none", "--effort", "quick", "--sensitivity-tokens", "256"]
    assert run_command(["convert", "teacher", "auto", *budget, *flags]) == 0
    assert not started
    found = json.loads(Path("auto/kvfold.json").read_text())["steps"][-1]["found"]
    for row in layers:
        for count, kl in row["fold_kl"].items():
            assert found["kl"][f"layer {row['layer']}"][count] == pytest.approx(kl, abs=1e-5)
    assert "mix" in commands(made)
    for name, command in commands(made).items():
        words = shlex.split(command)
        assert words[:4] == ["kvfold", "convert", "teacher", "student"]
        assert run_command([*words[1:], "--overwrite"]) == 0
        sites = Checkpoint.open("student").shape.sites
        heads = PerSite.of({site: attention.num_key_value_heads for site, attention in sites.items()})
        assert heads.spelled() == made.metrics[name]["kv_heads"]
    assert made.metrics["mix"]["kv_heads"] == "1/4"  # layer 1 is kept: only there one head for all loses the copies


@pytest.mark.slow
def test_without_ablations_one_pass_remains(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["teacher", "--data", "text.txt", "--ablations", "none", "--effort", "quick"]
    assert run_command(["inspect", *arguments, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert not {"recall_heads", "predicted"} & metrics.keys()
    assert not {"kl", "rise", "fold_kl"} & metrics["layers"][0].keys()
    page = next(Path("inspection").glob("*.html")).read_text()
    for word in ("<script", "http://", "https://"):
        assert word not in page
    assert "so that one for both loses nothing: 0 and 3 of layer 0" in page
    assert not re.search(r"What breaks without a head", page)
    assert run_command(["inspect", *arguments]) == 0  # from the record
    printed = capsys.readouterr()
    assert "most alike keys" in printed.out
    assert "inspected already" in printed.err
    page_path = next(Path("inspection").glob("*.html"))
    page_path.write_text("somebody else's")
    assert run_command(["inspect", *arguments]) == 2
    assert "was not written by kvfold" in capsys.readouterr().err
    assert page_path.read_text() == "somebody else's"
    assert run_command(["inspect", *arguments, "--name", "other", "--records", "run"]) == 0
    assert advice(record.read_all("run")[0])
    assert "other" in report("run").read_text()


@pytest.mark.slow
def test_a_damaged_record_is_one_line(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "teacher", "--data", "text.txt", "--ablations", "none", "--effort", "quick"]
    assert run_command(arguments) == 0
    path = next(Path("inspection").glob("*.json"))
    whole = json.loads(path.read_text())
    whole["metrics"]["layers"][1]["entropy"] = [1.0]
    path.write_text(json.dumps(whole))
    capsys.readouterr()
    assert run_command(arguments) == 2
    assert (
        "the record there is damaged: metrics.layers.1: Value error, entropy needs a number" in capsys.readouterr().err
    )
    assert run_command([*arguments, "--overwrite"]) == 0


@pytest.mark.slow
def test_one_head_in_each_layer_leaves_nothing_to_fold(
    tiny_checkpoint: Make, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint("llama", num_key_value_heads=1, num_hidden_layers=2)
    monkeypatch.chdir(text.parent)
    assert run_command(["inspect", "teacher", "--data", "text.txt", "--effort", "quick"]) == 0
    printed = capsys.readouterr().out
    assert "Every layer has one head: there is nothing to fold." in printed
    assert "kvfold convert" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(("family", "planes"), [("gpt_neox", True), ("qwen3", True), ("gpt2", False)])
def test_other_wirings_are_inspected(
    tiny_checkpoint: Make, text: Path, monkeypatch: pytest.MonkeyPatch, family: str, planes: bool
) -> None:
    tiny_checkpoint(family)
    monkeypatch.chdir(text.parent)
    made = inspect("teacher", InspectSettings("text.txt", **SMALL), out="out")
    for row in made.metrics["layers"]:
        assert ("planes" in row) == planes
        assert set(row["fold_kl"]) == set(row["fold_rise"])
        assert len(row["kl"]) == len(row["rise"]) == row["heads"]


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("llama", ["teacher", "--data", "missing.txt"], "no such text"),
        ("llama", ["teacher", "--data", "short.txt"], "too few calibration tokens"),
        ("llama", ["nowhere", "--data", "text.txt"], "nowhere"),
        ("llama", ["teacher"], "data is needed"),
        ("llama", ["teacher", "--data", "text.txt", "--ablations", "layers"], "cannot be ablated"),
        ("llama", ["teacher", "--data", "text.txt", "--loss", "-1"], "loss must be at least 0"),
        ("llama", ["teacher", "--data", "text.txt", "--out", "text.txt"], "a file"),
        ("t5", ["teacher", "--data", "text.txt"], "this is an encoder-decoder"),
        ("deepseek_v3", ["teacher", "--data", "text.txt"], "caches"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    tiny_checkpoint: Make,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    given: list[str],
    words: str,
) -> None:
    tiny_checkpoint(family)
    monkeypatch.chdir(text.parent)
    Path("short.txt").write_text("foxes")
    assert run_command(["inspect", *given]) == 2
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1]
    assert [line.startswith("kvfold: ") for line in said].count(True) == 1
    assert not Path("inspection").exists()
