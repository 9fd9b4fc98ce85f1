from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfold.contracts.cache import CacheSpec, Slot, grouped_cache
from kvfold.contracts.site import Shape
from kvfold.errors import CheckpointError, SettingError, UnsupportedModel
from kvfold.families import all_families, family_of
from kvfold.formats import count, size
from kvfold.predict import roofline
from kvfold.predict.plan import Plan, PlanSettings, plan
from kvfold.predict.roofline import PUBLISHED, cache_share, decode_step, hardware

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B = LLAMA_2_7B | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A folder that holds a config.json and nothing else."""

    def save(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return save


def shape_of(config: dict[str, Any]) -> Shape:
    return family_of(config).shape(config)


# --- numbers that were checked by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_25_7B, 7_615_616_512),
    ],
    ids=["llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b"],
)
def test_parameters_are_those_that_the_model_cards_state(config: dict[str, Any], parameters: int) -> None:
    assert shape_of(config).parameters == parameters


def test_llama_2_7b(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=PlanSettings(context=4096, batch=16))
    # 32 layers x (k and v) x 32 heads x 128 elements x 2 bytes
    assert made.before.cache_bytes_per_token == 32 * 2 * 32 * 128 * 2 == 524_288
    assert made.before.cache_bytes == 524_288 * 4096 * 16 == 32 * 2**30
    assert made.after.cache_bytes_per_token == 131_072
    assert made.cache_ratio == 0.25
    # k and v lose 24 of 32 heads in each of 32 layers
    assert made.after.parameters == 6_738_415_616 - 32 * 2 * 24 * 128 * 4096
    assert made.before.weight_bytes == 2 * 6_738_415_616
    assert made.disk.student == 2 * made.after.parameters
    assert (made.before.kv_heads, made.after.kv_heads) == ("32", "8")
    assert made.warnings == ()


def test_roofline_of_llama_2_7b_by_hand(saved: Callable[..., Path]) -> None:
    one = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=PlanSettings(context=4096, hardware="h100")).before
    # all weights but the embedding table, which is only looked up, and 4096 tokens of cache, at 3350 GB/s
    moved = 2 * (6_738_415_616 - 32_000 * 4096) + 524_288 * 4096
    assert one.bound == "memory"
    assert one.step_seconds == pytest.approx(moved / 3350e9, rel=1e-12)
    assert one.tokens_per_second == pytest.approx(3350e9 / moved, rel=1e-12)
    # 90% of 80 GB, less 13,476,831,232 bytes of weights, in pieces of 2 GiB
    assert one.largest_batch == int((72e9 - 13_476_831_232) // (524_288 * 4096)) == 27


def test_a_large_batch_is_bound_by_operations(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 1}, options=PlanSettings(context=16, batch=4096))
    # 2 FLOPs a weight, and for each layer and head 2 products over 16 tokens of 128 elements, 2 FLOPs each
    flops = 4096 * (2 * (6_738_415_616 - 32_000 * 4096) + 32 * 32 * 16 * 128 * 2 * 2)
    assert made.before.bound == "compute"
    assert made.before.step_seconds == pytest.approx(flops / 989.4e12, rel=1e-12)
    assert any("bound by its operations" in warning for warning in made.warnings)


def test_uptraining_costs(saved: Callable[..., Path]) -> None:
    options = PlanSettings(alpha=0.05, pretraining_tokens=2 * 10**12, hardware="a100", utilisation=0.5)
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=options)
    cost = made.uptraining
    assert cost is not None
    assert cost.tokens == 10**11
    assert cost.flops == 1e11 * (6 * made.after.parameters + 2 * made.before.parameters)
    assert cost.device_hours == pytest.approx(cost.flops / (312e12 * 0.5) / 3600)
    assert cost.memory_bytes == 16 * made.after.parameters + made.before.weight_bytes
    assert made.disk.uptraining == 2 * 12 * made.after.parameters
    without = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=replace(options, kl=False)).uptraining
    assert without is not None
    assert without.flops == 1e11 * 6 * made.after.parameters


def test_without_tokens_nothing_is_said_of_uptraining(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8})
    assert made.uptraining is None
    assert made.disk.uptraining == 0


def test_a_window_bounds_the_cache(saved: Callable[..., Path]) -> None:
    made = plan(saved(MISTRAL_7B), settings={"kv_heads": 4}, options=PlanSettings(context=32768))
    assert made.before.cache_bytes == 32 * 2 * 8 * 128 * 2 * 4096
    assert made.before.cache_bytes_per_token == 131_072 * 4096 // 32768
    assert any("sliding window of 4,096 tokens bounds the cache of every layer" in text for text in made.warnings)
    assert any("fp8" in text for text in made.warnings)


def test_dtype_of_serving(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_3_8B), settings={"kv_heads": 2}, options=PlanSettings(dtype="float32"))
    assert made.before.cache_bytes_per_token == 2 * 131_072
    assert made.before.weight_bytes == 4 * 8_030_261_248
    assert made.disk.student == 2 * made.after.parameters  # saved as the source is


def test_tied_embeddings_are_read_by_every_step(saved: Callable[..., Path]) -> None:
    tied = plan(saved(LLAMA_3_8B | {"tie_word_embeddings": True}), "identity", options=PlanSettings(context=1)).before
    apart = plan(saved(LLAMA_3_8B), "identity", options=PlanSettings(context=1)).before
    assert tied.parameters == apart.parameters - 128256 * 4096
    assert tied.step_seconds == apart.step_seconds


def test_a_storage_that_layers_share_saves_room_and_not_reads() -> None:
    shape = shape_of(LLAMA_3_8B)
    shared = CacheSpec((Slot("pair", per_token=100), Slot("pair", per_token=100)))
    apart = CacheSpec((Slot("one", per_token=100), Slot("two", per_token=100)))
    read = [
        decode_step(shape, cache, context=10, batch=3, dtype="bfloat16", tied=False).cache_bytes
        for cache in (shared, apart)
    ]
    assert read == [2 * 100 * 10 * 3 * 2] * 2
    assert shared.bytes(10, batch=3) == read[0] / 2


# --- warnings -------------------------------------------------------------------------------------------------------


def warnings(made: Plan) -> str:
    return "\n".join(made.warnings)


def test_heads_below_the_tensor_parallel_size(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 2}, options=PlanSettings(tensor_parallel=8))
    assert "2 key/value heads on 8 devices: vLLM gives each device a whole head" in warnings(made)
    assert made.before.cache_bytes_per_device == made.before.cache_bytes // 8
    assert made.after.cache_bytes_per_device == made.after.cache_bytes // 2  # each head lies on four devices
    eight = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=PlanSettings(tensor_parallel=8))
    assert eight.after.cache_bytes_per_device == made.after.cache_bytes_per_device
    assert "whole head" not in warnings(eight)


def test_heads_that_cannot_be_split(saved: Callable[..., Path]) -> None:
    config = LLAMA_2_7B | {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 128}
    made = plan(saved(config), settings={"kv_heads": 6}, options=PlanSettings(tensor_parallel=4))
    assert "6 key/value heads cannot be split evenly over 4 devices" in warnings(made)
    assert "6 key/value heads is not a power of two" in warnings(made)
    assert "query heads cannot be split" not in warnings(made)
    odd = plan(saved(config), settings={"kv_heads": 4}, options=PlanSettings(tensor_parallel=8))
    assert "12 query heads cannot be split over 8 devices" in warnings(odd)


def test_what_the_device_holds(saved: Callable[..., Path]) -> None:
    config = saved(LLAMA_2_7B)
    small = plan(config, settings={"kv_heads": 8}, options=PlanSettings(context=512))
    assert "weights are 98% of what a decode step reads at 512 tokens x 1" in warnings(small)
    after_only = plan(config, settings={"kv_heads": 8}, options=PlanSettings(batch=32))
    assert after_only.before.largest_batch < 32 <= after_only.after.largest_batch
    assert "a batch of 32 fits on h100 only after the conversion" in warnings(after_only)
    never = plan(config, settings={"kv_heads": 8}, options=PlanSettings(batch=10**6))
    assert "a batch of 1000000 does not fit on h100, before or after" in warnings(never)
    float32 = plan(config, settings={"kv_heads": 8}, options=PlanSettings(hardware="l4", dtype="float32"))
    assert "not one sequence of 4,096 tokens fits beside the weights on l4" in warnings(float32)
    assert float32.after.largest_batch_tokens_per_second == 0
    beyond = plan(config, settings={"kv_heads": 8}, options=PlanSettings(context=5000))
    assert "a context of 5,000 is beyond the 4,096 positions" in warnings(beyond)


def test_the_control_warns_of_nothing(saved: Callable[..., Path]) -> None:
    made = plan(saved(LLAMA_3_8B), "identity")
    assert made.warnings == ()
    assert (made.cache_ratio, made.speedup) == (1, 1)


# --- sources, settings, output --------------------------------------------------------------------------------------


def test_a_plan_reads_config_json_alone(saved: Callable[..., Path]) -> None:
    folder = saved(LLAMA_2_7B)
    by_folder, by_file = (plan(src, settings={"kv_heads": 8}) for src in (folder, folder / "config.json"))
    assert replace(by_file, source=by_folder.source) == by_folder


def test_a_plan_loads_neither_torch_nor_transformers(saved: Callable[..., Path]) -> None:
    code = (
        "import sys, kvfold; made = kvfold.plan(sys.argv[1], 'gqa', {'kv_heads': 8}); "
        "print(made.after.cache_bytes_per_token, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, saved(LLAMA_2_7B)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "131072 []"


def test_a_plan_is_json_and_a_table(saved: Callable[..., Path]) -> None:
    options = PlanSettings(tokens=20_000_000, pretraining_tokens=10**9, tensor_parallel=2)
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": "8"}, options=options)
    plain = json.loads(json.dumps(made.as_dict()))
    assert plain["after"]["cache_bytes"] == made.after.cache_bytes
    assert plain["speedup"] == made.speedup > 1
    plain_gqa = {"kv_heads": "8", "init": "fit", "init_seed": 0, "budget": None}
    assert plain["settings"] == {**plain_gqa, "budget_metric": "kl", "weigh": "uniform"}
    rows = {label: (before, after) for label, before, after in made.rows()}
    assert rows["parameters"] == ("6.74B", "5.93B")
    assert rows["cache per token"] == ("512 KiB", "128 KiB")
    assert rows["uptraining tokens"] == ("", "20M (alpha 0.02)")
    assert rows["loads in"] == ("", "transformers, vLLM, llama.cpp, CTranslate2, SGLang")


def test_the_root_teacher_is_the_measure(saved: Callable[..., Path]) -> None:
    folder = saved(LLAMA_2_7B | {"num_key_value_heads": 8})
    root = {"hash": "b", "name": "teacher", "config": LLAMA_2_7B}
    lineage = {"format": 1, "inputs": "a", "hash": "c", "root": root, "steps": []}
    (folder / "kvfold.json").write_text(json.dumps(lineage))
    made = plan(folder, settings={"kv_heads": 4})
    assert made.root_cache_bytes_per_token == 524_288
    assert ("  as a part of the root teacher's", "25.0%", "12.5%") in made.rows()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"context": 0}, "plan: context must be at least 1 (got 0)"),
        ({"batch": -1}, "plan: batch must be at least 1 (got -1)"),
        ({"utilisation": 0.0}, "plan: utilisation must lie between 0 and 1 (got 0.0)"),
        ({"alpha": 0.05}, "plan: alpha is a share of the pre-training tokens, whose number is missing; add"),
        ({"alpha": 0.05, "tokens": 1}, "plan: alpha and tokens both set the length of uptraining; give one"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError) as caught:
        PlanSettings(**given)
    assert str(caught.value).startswith(line)


def test_sources_that_cannot_be(tmp_path: Path, saved: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        plan(tmp_path / "nowhere", settings={"kv_heads": 8})
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plan(tmp_path, settings={"kv_heads": 8})
    with pytest.raises(UnsupportedModel, match=r"architecture 'lama' is not supported.*did you mean 'llama'"):
        plan(saved({"model_type": "lama"}), settings={"kv_heads": 8})
    with pytest.raises(SettingError, match="method 'gpa' is not known"):
        plan(saved(LLAMA_2_7B), "gpa")
    with pytest.raises(SettingError, match="gqa: kv_heads is needed"):
        plan(saved(LLAMA_2_7B))
    with pytest.raises(SettingError, match="gqa: kv_heads 5 does not divide the 32 query heads of layer 0; choose 1"):
        plan(saved(LLAMA_2_7B), settings={"kv_heads": 5})
    with pytest.raises(UnsupportedModel, match=r"torch_dtype must be one of .*float16.* \(got 'int8'\)"):
        plan(saved(LLAMA_2_7B | {"torch_dtype": "int8"}), settings={"kv_heads": 8})


# --- hardware -------------------------------------------------------------------------------------------------------


def test_hardware_is_known_or_refused() -> None:
    assert hardware("h200") is PUBLISHED["h200"]
    assert PUBLISHED["l4"].peak("float16") == 121e12
    assert PUBLISHED["l4"].peak("float32") < PUBLISHED["l4"].peak("bfloat16")
    with pytest.raises(SettingError, match=r"'b200' is not known.*a100, h100, h200, l4 or local"):
        hardware("b200")


@pytest.mark.slow
def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    first = hardware("local")
    assert first.measured is not None
    assert first.memory > 0
    assert min(first.bandwidth, *first.flops.values()) > 1e6
    monkeypatch.setattr(roofline, "measure", lambda: pytest.fail("measured twice"))
    assert hardware("local") == first


def test_cache_share() -> None:
    shape = shape_of(LLAMA_3_8B)  # 8 heads
    assert [cache_share(shape, devices) for devices in (1, 2, 8, 16)] == [1, 0.5, 0.125, 0.125]
    assert grouped_cache(shape).bytes_per_token() == 131_072


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 1023, 524_288, 32 * 2**30, 2**41)] == ["0 B", "1023 B", "512 KiB", "32 GiB", "2 TiB"]
    assert [count(n) for n in (0.5, 9.6, 9500, 6_738_415_616, 2e12)] == ["0.5", "9.6", "9,500", "6.74B", "2T"]


def test_the_page_shows_what_the_command_says(saved: Callable[..., Path]) -> None:
    page = Path(__file__).parents[2] / "docs" / "plan.md"
    options = PlanSettings(context=4096, batch=16, hardware="h200", alpha=0.05, pretraining_tokens=2 * 10**12)
    made = plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}, options=options)
    table = "\n".join(f"| {label.strip()} | {before} | {after} |" for label, before, after in made.rows())
    assert table in page.read_text(encoding="utf-8"), f"docs/plan.md should show\n{table}"
    for card in PUBLISHED.values():
        assert f"| {card.memory / 1e9:,.0f} GB | {card.bandwidth / 1e9:,.0f} GB/s |" in page.read_text(encoding="utf-8")


def test_a_plan_says_what_norms_before_the_rotation_leave_to_merge(saved: Callable[..., Path]) -> None:
    normed = saved(all_families()["qwen3"].tiny())
    assert any(
        "matched by a rotation of each plane" in line for line in plan(normed, settings={"kv_heads": 2}).warnings
    )
    assert not any("turned" in line for line in plan(normed, settings={"kv_heads": 2, "init": "mean"}).warnings)
    assert not any("turned" in line for line in plan(saved(LLAMA_2_7B), settings={"kv_heads": 8}).warnings)
