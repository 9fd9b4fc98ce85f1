"""The benchmark: bytes to the byte, turns and medians on a made-up clock, its record and what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold import hf
from kvfold.contracts.cache import CacheSpec, Slot, grouped_cache
from kvfold.contracts.site import Shape
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, KvfoldError, OutputError, SettingError
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.evaluate.timing import KERNELS, interleave
from kvfold.predict.roofline import Hardware
from kvfold.progress import Silent
from tolerance import assert_same

TIMING: Any = importlib.import_module("kvfold.evaluate.timing")
MODULE: Any = importlib.import_module("kvfold.evaluate.bench")
Make = Callable[..., Path]
SMALL = BenchSettings(context=(12,), batch=(1, 3), new_tokens=5, repeats=1)
ONE = BenchSettings(context=(4,), batch=(1,), new_tokens=1, repeats=1, fp8=False)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


class Listener(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte a nanosecond, and operations cost nothing."""
    made = Hardware("local", "made-up", 10**9, 1e9, {"float32": 1e30, "bfloat16": 1e30})
    for module in (MODULE, TIMING):
        monkeypatch.setattr(module, "hardware", lambda name: made)


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A multi-head teacher and its multi-query student."""
    teacher = tiny_checkpoint("llama", **HEADS)
    return teacher, convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1})


def rows_of(made: record.Record, **same: Any) -> list[dict[str, Any]]:
    return [row for row in made.metrics["rows"] if all(row[key] == value for key, value in same.items())]


# --- bytes -----------------------------------------------------------------------------------------------------------

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "grouped already": ("llama", {"num_key_value_heads": 2}),
    "window left behind": ("llama", {**MISTRAL, "sliding_window": 10}),
    "window filled while decoding": ("llama", {**MISTRAL, "sliding_window": 15}),
    "qwen2": ("qwen2", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_measured_bytes_are_those_of_the_plan(case: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    family, changes = FAMILIES[case]
    teacher = tiny_checkpoint(family, **{**HEADS, **changes})
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1})
    made = bench([teacher, student], SMALL, records=tmp_path)
    sites = {path.name: Checkpoint.open(path).shape.sites.values() for path in (teacher, student)}
    window = changes.get("sliding_window", 10**9)
    for row in rows_of(made, cache="native"):
        width = sum(2 * site.num_key_value_heads * site.head_dim for site in sites[row["model"]])
        assert row["cache_bytes"] == row["predicted_cache_bytes"] == width * min(12 + 5, window) * row["batch"] * 4
        assert row["prefill_s"] > 0 < row["decode_s_per_token"]
        kernel, form = row["kernel"].split(", ")
        assert kernel in KERNELS
        assert form == ("growing cache" if "window" in case else "static cache")
    assert made.metrics["bytes_as_predicted"]
    ratios = [row["cache_ratio"] for row in made.metrics["ratios"] if row["cache"] == "native"]
    assert ratios == [1 / changes.get("num_key_value_heads", 4)] * 2


@pytest.mark.slow
def test_an_encoder_decoder_is_measured_from_its_input_on(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5")
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})
    made = bench([teacher, student], SMALL, records=tmp_path)
    own, crossed = {"teacher": (4, 4), "student": (2, 1)}, SMALL.new_tokens + 1  # the first token is the start
    for row in made.metrics["rows"]:
        heads = own[row["model"]]
        elements = 4 * 2 * 8 * (heads[0] * crossed + heads[1] * row["context"])
        assert row["cache_bytes"] == row["predicted_cache_bytes"] == 4 * row["batch"] * elements
        assert row["kernel"] in ("kvfold, static cache", "sdpa, static cache")
    assert made.metrics["notes"] == ["teacher with an fp8 cache: transformers has no fp8 cache for encoder-decoders"]


@pytest.mark.slow
def test_half_precision_halves_the_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, half = (
        bench(pair, BenchSettings((8,), (2,), 2, 1, dtype, fp8=False), records=tmp_path).metrics["rows"]
        for dtype in ("float32", "bfloat16")
    )
    assert [2 * row["cache_bytes"] for row in half] == [row["cache_bytes"] for row in whole]


@pytest.mark.slow
def test_the_teacher_has_an_fp8_cache_beside_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = bench(pair, SMALL, records=tmp_path)
    layers = Checkpoint.open(pair[0]).shape.num_layers
    for batch in SMALL.batch:
        teacher, folded, student = rows_of(made, batch=batch)
        assert [row["cache"] for row in (teacher, folded, student)] == ["native", "fp8", "native"]
        assert folded["model"] == teacher["model"] == "teacher"
        assert folded["cache_bytes"] == teacher["cache_bytes"] / 4 + 2 * 4 * layers  # and its scales
        assert folded["cache_bytes"] == folded["predicted_cache_bytes"]


def test_a_window_has_no_fp8_cache_and_the_record_says_so(tiny_checkpoint: Make, tmp_path: Path) -> None:
    made = bench([tiny_checkpoint("llama", **MISTRAL, sliding_window=10)], SMALL, records=tmp_path)
    assert {row["cache"] for row in made.metrics["rows"]} == {"native"}
    assert made.metrics["notes"] == [
        "teacher with an fp8 cache: transformers has no fp8 cache for layers with a window"
    ]


@pytest.mark.slow
def test_other_bytes_than_promised_are_an_error_with_a_record(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(shape: Shape) -> CacheSpec:
        return CacheSpec((*grouped_cache(shape).slots, Slot("forgotten", constant=1)))

    with monkeypatch.context() as patched:
        patched.setattr(TIMING, "grouped_cache", one_more)
        with pytest.raises(
            KvfoldError, match="teacher, native cache.*holds other bytes than the plan predicts"
        ) as raised:
            bench(pair, SMALL, records=tmp_path / "records")
    assert "\n" not in str(raised.value)
    (kept,) = record.read_all(tmp_path / "records")
    assert (kept.status, kept.error) == ("failed", str(raised.value))
    assert not kept.metrics["bytes_as_predicted"]
    assert all(row["predicted_cache_bytes"] > row["cache_bytes"] for row in rows_of(kept, cache="native"))
    assert bench(pair, SMALL, records=tmp_path / "records").status == "done"  # a failure is measured again


# --- caches ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "static", "window"])
def test_every_fork_of_a_cache_starts_from_the_same_place(kind: str, tiny_checkpoint: Make) -> None:
    model: Any = hf.load(tiny_checkpoint("llama", **({**MISTRAL, "sliding_window": 6} if kind == "window" else {})))
    ids_BT = torch.arange(24).reshape(2, 12)
    cache = hf.new_cache(model, "static" if kind == "static" else "growing", 12)
    hf.read(model, ids_BT[:, :8], cache)
    whole_BTV = model(ids_BT).logits
    for _ in range(3):
        live = hf.fork(cache)
        for t in range(8, 12):
            logits_BV = hf.read(model, ids_BT[:, t : t + 1], live)
            assert_same(logits_BV, whole_BTV[:, t])
        assert (int(cache.get_seq_length()), int(live.get_seq_length())) == (8, 12)


# --- turns and medians -----------------------------------------------------------------------------------------------


def test_works_take_turns_and_only_their_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(TIMING, "clock", lambda: clock.now)

    def work(name: str, seconds: float) -> Callable[[], Callable[[], None]]:
        def ready() -> Callable[[], None]:
            clock.now += 100  # making ready takes long and does not count

            def call() -> None:
                ran.append(name)
                clock.now += seconds * len(ran)

            return call

        return ready

    seconds = interleave({name: work(name, unit) for name, unit in (("a", 1.0), ("b", 2.0), ("c", 4.0))}, 4)
    assert "".join(ran) == "abcbcacababc"
    assert seconds == {"a": [1, 6, 8, 10], "b": [4, 8, 18, 22], "c": [12, 20, 28, 48]}


def test_rows_and_ratios_are_medians_over_the_rounds_with_the_fastest_kernel(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All times are made up: one for every prompt and step, by the model, its cache, its kernel and the round."""
    steps = {"teacher": [8.0, 80.0, 4.0], "fp8": [16.0] * 3, "student": [2.0, 1.0, 20.0]}
    best = {"teacher": "eager", "fp8": "sdpa", "student": "kvfold"}
    clock, seen, read = SimpleNamespace(now=0.0), [], hf.read
    monkeypatch.setattr(TIMING, "clock", lambda: clock.now)

    def timed_read(model: Any, ids_BT: torch.Tensor, cache: Any, encoded: Any = None) -> torch.Tensor:
        kernel = model.config._attn_implementation
        who = "student" if model.config.num_key_value_heads == 1 else "teacher"
        who = "fp8" if "Quantized" in type(cache).__name__ else who
        if ids_BT.shape[1] > 1:
            clock.now += 1.0
        else:
            tries = seen.count((who, "step"))
            seen.append((who, "step"))
            trial = tries < 3 * len(KERNELS)
            turn = 0 if trial else (tries - 3 * len(KERNELS)) // 4
            clock.now += (1.0 if kernel == best[who] else 3.0) if trial else steps[who][turn]
            assert trial or kernel == best[who]
        return read(model, ids_BT, cache)

    monkeypatch.setattr(hf, "read", timed_read)
    made = bench(pair, BenchSettings((8,), (2,), new_tokens=4, repeats=3), records=tmp_path)
    for row, who in zip(made.metrics["rows"], steps, strict=True):
        assert row["kernel"] == best[who] + ("" if who == "fp8" else ", static cache")
        assert row["decode_s_per_token"] == median(steps[who])
        assert row["tokens_per_s"] == 2 / median(steps[who])
        assert row["prefill_s"] == 1.0
    assert [raw["decode"] for raw in made.metrics["seconds"]] == [[4 * s for s in steps[who]] for who in steps]
    assert {len(raw["prefill"]) for raw in made.metrics["seconds"]} == {1}  # slow prompts are read once
    folded, student = made.metrics["ratios"]
    assert (folded["decode_speedup"], student["decode_speedup"]) == (0.5, 4.0)
    # the roofline of a machine that only reads: weights (but not the whole embedding) and cache
    read_bytes = [
        4 * (each.parameters - each.vocab_size * each.hidden_size) + grouped_cache(each).bytes(8, batch=2, itemsize=4)
        for each in (Checkpoint.open(path).shape for path in pair)
    ]
    assert student["roofline_speedup"] == pytest.approx(read_bytes[0] / read_bytes[1])


def test_quick_prompts_are_read_in_every_round(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TIMING, "QUICK", 1e9)
    made = bench(pair, BenchSettings((8,), (1,), new_tokens=1, repeats=3, fp8=False), records=tmp_path)
    assert [len(raw["prefill"]) for raw in made.metrics["seconds"]] == [3, 3]
    assert [row["prefill_s"] for row in made.metrics["rows"]] == [
        median(raw["prefill"]) for raw in made.metrics["seconds"]
    ]


@pytest.mark.slow
def test_threads_are_given_back(tiny_checkpoint: Make, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    made = bench([tiny_checkpoint("llama")], BenchSettings((4,), (1,), 1, 1, threads=before + 1), records=tmp_path)
    assert torch.get_num_threads() == before
    assert f"{before + 1} threads" in made.device


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_record_is_on_disk_and_nothing_is_measured_twice(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(pair, SMALL, records=tmp_path / "records", name="two")
    (kept,) = record.read_all(tmp_path / "records")
    assert (kept.kind, kept.name, kept.status) == ("bench", "two", "done")
    assert kept.metrics == made.metrics
    assert kept.settings["models"] == [str(path) for path in pair]
    assert kept.hashes == {path.name: Checkpoint.open(path).hash() for path in pair}
    assert kept.metrics["beyond_positions"] is False

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hf, "load", refuse)
    listener = Listener()
    again = bench(pair, SMALL, records=tmp_path / "records", name="two", progress=listener)
    assert asdict(again) == asdict(kept)
    assert any("measured already" in line for line in listener.lines)
    with pytest.raises(AssertionError, match="a model was loaded"):
        bench(pair, SMALL, records=tmp_path / "records", name="two", overwrite=True)


def test_other_weights_under_the_same_name_are_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    records, teacher = tmp_path / "records", tiny_checkpoint("llama")
    bench([teacher], ONE, records=records)
    teacher.rename(tmp_path / "moved")
    tiny_checkpoint("llama", name="other", seed=7).rename(teacher)
    with pytest.raises(OutputError, match="another checkpoint"):
        bench([teacher], ONE, records=records)
    assert bench([teacher], ONE, records=records, overwrite=True).status == "done"


def test_models_of_one_name_are_told_apart_by_their_folders(tiny_checkpoint: Make, tmp_path: Path) -> None:
    paths = [tiny_checkpoint("llama", name=name) for name in ("one/model", "two/model", "student")]
    made = bench(paths, ONE, records=tmp_path / "records")
    assert [row["model"] for row in made.metrics["rows"]] == ["one/model", "two/model", "student"]


def test_contexts_beyond_the_positions_are_measured_and_noted(tiny_checkpoint: Make, tmp_path: Path) -> None:
    settings = BenchSettings((15,), (1,), new_tokens=2, repeats=1, fp8=False)
    made = bench([tiny_checkpoint("llama", max_position_embeddings=16)], settings, records=tmp_path / "records")
    assert made.metrics["beyond_positions"] is True
    assert made.metrics["notes"] == [
        "17 tokens are more than the 16 positions of the models: times hold, text would not"
    ]


# --- layers that share -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sharing_saves_room_and_the_record_says_what_it_does_not(
    family: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family, **HEADS)
    student = convert(teacher, tmp_path / "student", "cla", {"share": 2, "init": "copy"})
    shape = Checkpoint.open(teacher).shape
    one = grouped_cache(shape).bytes(12 + 5, itemsize=4)
    memory = 4 * shape.parameters + 4 * one
    made = bench([teacher, student], replace(SMALL, memory=memory, fp8=False), records=tmp_path)
    assert [row["cache_ratio"] for row in made.metrics["ratios"]] == [0.5, 0.5]
    assert [row["model"] for row in made.metrics["largest"]] == ["teacher", "student"]
    ours = memory - 4 * Checkpoint.open(student).shape.parameters
    assert [row["batch"] for row in made.metrics["largest"]] == [4, ours // (one // 2)]
    for row in made.metrics["largest"]:
        assert row["cache_bytes"] == row["predicted_cache_bytes"] <= memory
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["decode_s_per_token"])
    layers = shape.num_layers
    assert made.metrics["notes"] == [
        f"student: {layers // 2} of {layers} layers read the cache of another; fewer bytes are held, as many are read "
        "in a step, which gets no faster at the same batch"
    ]
    with pytest.raises(SettingError, match="not one sequence of 12 tokens fits beside the weights of teacher"):
        bench([teacher, student], replace(SMALL, memory=4 * shape.parameters), records=tmp_path)


def test_a_teacher_that_shares_has_no_fp8_cache(tiny_checkpoint: Make, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("llama", **HEADS), tmp_path / "student", "cla", {"init": "copy"})
    notes = bench([student], SMALL, records=tmp_path).metrics["notes"]
    assert notes[0] == "teacher with an fp8 cache: transformers has no fp8 cache for layers that share keys and values"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"context": ()}, {"context": (0, 8)}, {"batch": (-1,)}, {"new_tokens": 0}, {"repeats": 0}, {"threads": -1}],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"bench: {next(iter(changes))} must be at least 1") as raised:
        BenchSettings(**changes)
    assert "\n" not in str(raised.value)


def test_what_is_refused_before_anything_is_loaded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(SettingError, match="no model"):
        bench([], SMALL, records=tmp_path)
    with pytest.raises(SettingError, match="named twice"):
        bench([pair[0], f"{pair[0]}/../{pair[0].name}"], SMALL, records=tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        bench([pair[0], tmp_path / "nowhere"], SMALL, records=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        bench(pair, SMALL, records=tmp_path / "file" / "records")
    with pytest.raises(SettingError, match=r"do not fit in memory \(got .* at 100,000,000 tokens x 8\)"):
        bench(pair, BenchSettings(context=(10**8,), batch=(8,)), records=tmp_path)
