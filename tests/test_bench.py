"""The benchmark's bookkeeping: bytes to the byte, turns, the fastest kernel, ratios; times themselves are not tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import hf, record
from kvfold.bench import KERNELS, BenchSettings, bench
from kvfold.convert import convert
from kvfold.errors import CheckpointError, SettingError

Maker = Callable[..., Path]
QUICK: dict[str, Any] = {"context": (6, 12), "batch": (1, 2), "new_tokens": 3, "repeats": 2}


@pytest.fixture(scope="module")
def module() -> Any:
    import importlib

    return importlib.import_module("kvfold.bench")


def test_bytes_rows_and_ratios(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "gqa", "gqa", {"kv_heads": 2})
    made = bench([teacher, student], BenchSettings(**QUICK), records=tmp_path / "records", name="two")
    rows, ratios = made.metrics["rows"], made.metrics["ratios"]
    assert len(rows) == 2 * 2 * 3  # contexts, batches; teacher, teacher with fp8, student
    for row in rows:
        tokens = row["batch"] * (row["context"] + 3)
        heads, itemsize, scales = {
            ("teacher", "native"): (4, 4, 0),
            ("teacher", "fp8"): (4, 1, 4 * 2 * 4),
            ("gqa", "native"): (2, 4, 0),
        }[row["model"], row["cache"]]
        assert row["cache_bytes"] == row["predicted_cache_bytes"] == 4 * 2 * heads * 8 * tokens * itemsize + scales
        assert row["prefill_s"] > 0 < row["decode_s_per_token"]
        assert row["kernel"].split(",")[0] in KERNELS
    assert len(ratios) == 2 * 2 * 2
    for ratio in ratios:
        assert 1 < ratio["roofline_speedup"] < 4
        assert ratio["cache_bytes_ratio"] == (0.5 if ratio["model"] == "gqa" else pytest.approx(0.25, abs=0.05))
    assert made.hashes.keys() == {"teacher", "gqa"}
    assert made.metrics["notes"] == []
    assert record.read_all(tmp_path / "records") == [made] or record.read_all(tmp_path / "records")[0].name == "two"


def test_a_window_bounds_the_bytes_and_has_no_fp8_cache(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=5)
    made = bench([teacher], BenchSettings(**QUICK), records=tmp_path)
    assert [row["cache_bytes"] for row in made.metrics["rows"]] == [
        4 * 2 * 4 * 8 * 5 * 4 * batch for batch in (1, 2, 1, 2)
    ]
    assert all(row["kernel"].endswith("growing cache") for row in made.metrics["rows"])
    assert made.metrics["notes"] == [
        "teacher with an fp8 cache: transformers has no fp8 cache for layers with a window"
    ]


def test_longer_than_the_positions_is_said(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    settings = BenchSettings(context=(255,), batch=(1,), new_tokens=2, repeats=1, fp8=False)
    made = bench([tiny_checkpoint()], settings, records=tmp_path)
    assert made.metrics["notes"] == [
        "257 tokens are more than the 256 positions of the models: times hold, text would not"
    ]


def test_the_fastest_kernel_is_chosen_for_each_model(
    tiny_checkpoint: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    teacher, student = tiny_checkpoint(), tiny_checkpoint(name="student", num_key_value_heads=2)
    seen = []

    def seconds(model: Any, ids_BT: torch.Tensor, cache: Any) -> float:
        hf.read(model, ids_BT, cache)
        kernel, heads = model.config._attn_implementation, model.config.num_key_value_heads
        seen.append((heads, ids_BT.shape[1], kernel))
        return 1.0 if (heads, kernel) in ((4, "eager"), (2, "kvfold")) else 2.0

    monkeypatch.setattr(module, "_seconds", seconds)
    settings = BenchSettings(context=(6,), batch=(1,), new_tokens=2, repeats=2, fp8=False)
    made = bench([teacher, student], settings, records=tmp_path)
    assert [row["kernel"] for row in made.metrics["rows"]] == ["eager, static cache", "kvfold, static cache"]
    timed = [(heads, tokens, kernel) for heads, tokens, kernel in seen[2 * 9 :]]
    turn = [(4, 6, "kvfold"), *[(4, 1, "eager")] * 2, (2, 6, "kvfold"), *[(2, 1, "kvfold")] * 2]
    assert timed == turn * 2  # they take turns, round by round


def test_other_bytes_than_promised_stop_it(
    tiny_checkpoint: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "live_cache_bytes", lambda cache: 7)
    with pytest.raises(AssertionError, match=r"teacher: the cache holds \[7\] bytes, the plan says"):
        bench([tiny_checkpoint()], BenchSettings(**QUICK), records=tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_threads_are_given_back(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    bench([tiny_checkpoint()], BenchSettings(**{**QUICK, "threads": before + 1}), records=tmp_path)
    assert torch.get_num_threads() == before


def test_models_are_named_by_what_tells_them_apart(module: Any) -> None:
    assert module._names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert module._names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(SettingError, match="twice"):
        module._names([Path("/a/x"), Path("/a/x")])


@pytest.mark.parametrize("changes", [{"context": ()}, {"batch": (0,)}, {"repeats": 0}, {"threads": -1}])
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"bench: {next(iter(changes))} must be at least 1"):
        BenchSettings(**changes)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no model"):
        bench([])
    with pytest.raises(CheckpointError, match="no such directory"):
        bench([tmp_path / "nothing"])
