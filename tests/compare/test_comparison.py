"""Comparisons: rows equal the single commands, alternatives equal textbook references, and what cannot run says why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import hf
from kvfold.cli.main import run_command
from kvfold.compare import weights
from kvfold.compare.comparison import PAGE, compare
from kvfold.compare.settings import CompareSettings
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.record import Record, read_all
from kvfold.errors import CheckpointError, OutputError, SettingError
from kvfold.evaluate.bench import bench
from kvfold.evaluate.evaluation import evaluate
from kvfold.evaluate.memory import peak_bytes, weight_bytes
from kvfold.report.comparison import Place, comparisons
from kvfold.report.reading import record_fault
from kvfold.run.recipe import Recipe
from kvfold.run.runner import run

Make = Callable[..., Path]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
SMALL: dict[str, Any] = {
    "eval_tokens": 96,
    "sequence_length": 32,
    "copy_distances": (4,),
    "copy_trials": 2,
    "context": (64,),
    "new_tokens": 2,
    "repeats": 1,
}


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A multi-head teacher and its multi-query student."""
    teacher = tiny_checkpoint("llama", **HEADS)
    return teacher, convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1})


def named(made: list[Record]) -> dict[str, Record]:
    return {each.settings["row"]["name"]: each for each in made[1:]}


@pytest.mark.slow
def test_rows_equal_evaluate_and_bench(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    settings = CompareSettings(str(text), rows=("cache", "pruning"), **SMALL)
    made = compare(pair[0], [pair[1]], settings, out=tmp_path / "out")
    rows = named(made)
    own = replace(settings.evaluation, fp8=True)
    student = evaluate(pair[1], own, teacher=pair[0], records=tmp_path / "records").metrics
    alone = evaluate(pair[0], own, records=tmp_path / "records").metrics
    found = rows["student"].metrics
    for key in ("loss", "kl", "agreement", "loss_gap", "copy_gain"):
        assert found[key] == pytest.approx(student[key], rel=1e-6), key
    assert found["cache_bytes_per_token"] == student["cache"]["student"]["bytes_per_token"]
    assert rows["fp8 cache"].metrics["loss"] == pytest.approx(alone["loss_fp8_cache"], rel=1e-6)
    assert rows["teacher"].metrics["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert rows["teacher"].metrics["kl"] == 0.0

    timed = bench(pair, replace(settings.timing, fp8=True), records=tmp_path / "records").metrics["rows"]
    assert made[0].hashes["student"] == rows["student"].hashes["student"]
    bytes_of = {(row["model"], row["cache"]): row["cache_bytes"] for row in timed}
    ours = {(row["model"], row["cache"]): row["cache_bytes"] for row in made[0].metrics["rows"]}
    assert ours["student", "native"] == bytes_of["student", "native"]
    assert ours["teacher", "native"] == bytes_of[pair[0].name, "native"]
    assert ours["fp8 cache", "fp8"] == bytes_of[pair[0].name, "fp8"]
    assert not any(row["model"] == "half of the weights" for row in made[0].metrics["rows"])  # it is no faster


@pytest.mark.slow
def test_a_row_without_its_library_says_how_to_install_it(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    settings = CompareSettings(str(text), rows=("cache", "weights", "window"), **SMALL)
    made = compare(pair[0], [], settings, out=tmp_path / "out")
    rows = named(made)
    assert all("pip install 'kvfold[compare]'" in str(rows[name].error) for name in ("int4 cache", "int4 weights"))
    assert rows["int8 weights"].status == "done"  # torch's own
    (each,) = comparisons(made)
    columns, lines = each.table()
    assert {len(line) for line in lines} == {len(columns)}
    assert "hqq" in next(line[1] for line in lines if line[0] == "int2 cache")
    assert each.places == (Place(64, 1),)
    assert "int4 cache" in (tmp_path / "out" / PAGE).read_text()

    again = compare(pair[0], [], settings, out=tmp_path / "out")
    done = [each.date for each in made if each.status == "done"]
    assert [each.date for each in again if each.status == "done"] == done  # nothing is measured twice
    text.write_text(text.read_text()[::-1])
    with pytest.raises(OutputError, match="another checkpoint or text"):
        compare(pair[0], [], settings, out=tmp_path / "out")


@pytest.mark.slow
def test_students_and_half_the_layers_stack_and_train(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    more = {"tokens": 2048, "train_data": str(text)}
    settings = CompareSettings(str(text), rows=("depth", "stack"), **SMALL, **more)
    rows = named(compare(pair[0], [pair[1]], settings, out=tmp_path / "out"))
    assert rows["half of the layers"].metrics["training_tokens"] == 2048
    deep, half = (Checkpoint.open(path).shape.num_layers for path in (pair[0], tmp_path / "out" / "depth"))
    assert half == deep / 2
    quarter, eighth = (rows[name].metrics["cache_bytes_per_token"] for name in ("student", "student, fp8 cache"))
    assert eighth == quarter * 8 / 32  # the tiny checkpoint is float32
    assert rows["student, fp8 cache"].metrics["loss"] != rows["student"].metrics["loss"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": ("caches",)}, "no row is named 'caches'.*cache"),
        ({"tokens": 10}, "both tokens and train_data"),
        ({"context": (100,)}, "multiple of 64"),
        ({"copy_trials": 0}, "copy_trials must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        CompareSettings("text", **given)


def test_models_that_cannot_be_compared_are_refused(
    tiny_checkpoint: Make, pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    settings = CompareSettings(str(text), **SMALL)
    with pytest.raises(SettingError, match="compare reads decoders"):
        compare(tiny_checkpoint("t5", name="t5"), [], settings, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="different vocabularies"):
        compare(pair[0], [tiny_checkpoint("llama", name="other", vocab_size=300)], settings, out=tmp_path / "out")
    with pytest.raises(SettingError, match="named twice"):
        compare(pair[0], [pair[0]], settings, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(pair[0]), "--data", str(text), "--rows", "window", "--out", str(tmp_path / "out")]
    words += ["--eval-tokens", "96", "--sequence-length", "32", "--copy-distances", "4", "--copy-trials", "2"]
    words += ["--context", "64", "--new-tokens", "2", "--repeats", "1"]
    assert run_command(words) == 0
    printed = capsys.readouterr().out
    assert "window: the last 16 tokens and the first 4" in printed
    assert f"report: {tmp_path / 'out' / PAGE}" in printed
    assert run_command([*words, "--json"]) == 0
    kinds = [each["kind"] for each in json.loads(capsys.readouterr().out)]
    assert kinds == ["compare", "compare-row", "compare-row"]


@pytest.mark.slow
def test_a_recipe_compares_its_students(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    compared = {**SMALL, "rows": ["window", "stack"]}
    measured = {"tokens": 96, "sequence_length": 32, "copy_distances": (), "last_words": 0, "samples": 0}
    teacher = str(tiny_checkpoint("llama", **HEADS))
    recipe = Recipe("tiny", teacher, str(text), str(text), evaluate=measured, compare=compared)
    recipe = replace(recipe, matrix=({"convert.kv_heads": [2, 1]},))
    page = run(recipe, out=tmp_path / "run")
    (found,) = comparisons(read_all(tmp_path / "run" / "records"))
    students = [line.name for line in found.lines if line.record.settings["row"]["group"] == "student"]
    assert [name.split("kv_heads-")[1] for name in students] == ["2", "1"]
    assert len(found.lines) == 2 + 2 + 4  # teacher and window, students, stacks
    assert "What else would do" in page.read_text()
    with pytest.raises(SettingError, match="no row is named"):
        run(replace(recipe, compare={"rows": ["x"]}), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- alternatives against references ---------------------------------------------------------------------------------


def test_pruning_makes_the_smaller_half_zero(pair: tuple[Path, Path]) -> None:
    before, after = hf.load(pair[0]), weights.pruned(hf.load(pair[0]))
    maps = [
        name for name, each in before.named_modules() if isinstance(each, torch.nn.Linear) and "lm_head" not in name
    ]
    old, new = (
        torch.cat([model.get_submodule(name).weight.detach().flatten() for name in maps]) for model in (before, after)
    )
    kept = new != 0
    assert int((~kept).sum()) == len(old) // 2
    assert torch.equal(old[kept], new[kept])
    assert float(old[~kept].abs().max()) <= float(old[kept].abs().min())
    assert torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight)  # type: ignore[operator]


@pytest.mark.parametrize(("change", "bits"), [(weights.int8, 8), (weights.int4, 4)])
def test_torchao_rounds_each_weight_by_less_than_a_step(
    change: Callable[[Any], Any], bits: int, tiny_checkpoint: Make
) -> None:
    pytest.importorskip("torchao", reason="torchao is the extra kvfold[compare]")
    path = tiny_checkpoint("llama", intermediate_size=64)
    before, after = hf.load(path), change(hf.load(path))
    for name in weights._maps(before):
        old, new = before.get_submodule(name).weight, after.get_submodule(name).weight.dequantize()  # type: ignore[operator]
        steps_O1 = 2 * old.abs().amax(1, keepdim=True) / (2**bits - 2)
        assert bool(((old - new).abs() <= 1.01 * steps_O1).all())
    assert torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight)  # type: ignore[operator]


def test_bytes_of_weights_count_each_tensor_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(pair[0])
    assert weight_bytes(hf.load(pair[0]), 2) == 2 * source.shape.parameters
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    model = hf.load(pair[0])
    inner = sum(each.weight.numel() for each in weights._maps(model).values())
    made = weight_bytes(weights.int8(hf.load(pair[0])), 2)
    assert 2 * (source.shape.parameters - inner) + inner <= made <= 2 * (source.shape.parameters - inner) + 1.1 * inner


def test_the_peak_is_the_most_that_is_held_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        kept = torch.zeros(1000)
        other = torch.ones(2000)
        del other
        kept.add_(1)

    assert 12_000 <= peak_bytes(work) < 13_000
    assert capfd.readouterr().err == ""


def test_a_twin_shares_weights_and_not_its_attention(pair: tuple[Path, Path]) -> None:
    model: Any = hf.load(pair[0])
    made, own = hf.twin(model, "kvfold_fp8"), hf.twin(model, hf.ATTENTION, weights=True)
    assert model.config._attn_implementation == hf.ATTENTION
    pairs = zip(model.parameters(), made.parameters(), own.parameters(), strict=True)
    assert all(each is other and each is not third for each, other, third in pairs)


# --- records of others ------------------------------------------------------------------------------------------------


def test_damaged_records_are_not_shown() -> None:
    row = {"name": "teacher", "group": "teacher", "about": ""}
    metrics = {"loss": 1.0, "kl": 0.0, "weight_bytes": 1, "cache_bytes_per_token": 2.0, "training_tokens": 0}
    assert record_fault(Record("compare-row", "a/b", {"row": row}, metrics)) is None
    assert "row" in str(record_fault(Record("compare-row", "a/b", {}, metrics)))
    assert "loss" in str(record_fault(Record("compare-row", "a/b", {"row": row}, {**metrics, "loss": "low"})))
    assert "rows" in str(record_fault(Record("compare", "a", {"rows": []}, {"peaks": {}})))
