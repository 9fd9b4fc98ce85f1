"""The door to transformers: loading is strict, the folded attention is transformers' own answer, padding included."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)
from transformers.utils import logging

from kvfold import hf
from kvfold.attention.grouped import reference
from kvfold.convert.conversion import convert
from kvfold.errors import CheckpointError, DataError, SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.hf.attention import through_q4
from tolerance import assert_same

TINY = all_families()["llama"].tiny()
GROUPED = {**TINY, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None}
WINDOWED = {**GROUPED, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
CONFIGS = {
    "grouped": GROUPED,
    "multi-query": {**GROUPED, "num_key_value_heads": 1},
    "multi-head": {**GROUPED, "num_key_value_heads": 4},
    "windowed": WINDOWED,
}
Maker = Callable[..., Path]


def _ids(batch: int = 2, tokens: int = 10) -> torch.Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _model(config: dict[str, Any], attention: str = "kvfold", **options: Any) -> Any:
    return hf.build(config, seed=1, attention=attention, **options).eval()


# --- the attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_own_attention(name: str) -> None:
    model, ids = _model(CONFIGS[name]), _ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for padding in (None, mask):
        ours = model(ids, attention_mask=padding).logits
        with hf.with_attention(model, "eager"):
            theirs = model(ids, attention_mask=padding).logits
        shown = slice(None) if padding is None else mask.bool()
        assert_same(ours[shown], theirs[shown])
    assert model.config._attn_implementation == "kvfold"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_rows_continue_as_they_do_alone(name: str, cache: str) -> None:
    model, ids = _model(CONFIGS[name]), _ids(tokens=12)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :5], mask[0, :5] = 0, 0
    options = {"max_new_tokens": 8, "cache_implementation": cache}
    together = hf.generate(model, padded, attention_mask=mask, **options)
    for row, start in ((0, 5), (1, 0)):
        alone = hf.generate(model, ids[row : row + 1, start:], **options)
        assert torch.equal(together[row, 12:], alone[0, 12 - start :])


def test_without_the_mask_registration_padding_would_be_read() -> None:
    forward = AttentionInterface()["kvfold"]
    AttentionInterface.register("kvfold-without-mask", forward)
    try:
        model, ids = _model(GROUPED), _ids()
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        right = model(ids, attention_mask=mask).logits[:, -1]
        alone = model(ids[:1, 5:]).logits[0, -1]
        with hf.with_attention(model, "kvfold-without-mask"):
            wrong = model(ids, attention_mask=mask).logits[:, -1]
        assert_same(right[0], alone)
        assert (wrong[0] - alone).abs().max() > 0.1  # silently, which is why this test is here
    finally:
        del AttentionInterface._global_mapping["kvfold-without-mask"]


@pytest.mark.parametrize("name", ["grouped", "windowed"])
def test_a_prompt_read_in_pieces_ends_as_the_whole(name: str) -> None:
    model, ids = _model(CONFIGS[name]), _ids(tokens=16)
    whole = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([5, 7, 1, 3], dim=1)]
        assert_same(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("seen", ["all", "causal", "padded", "weighed"])
def test_a_bias_of_positions_is_added_to_the_logits(tokens: int, seen: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, count, 8, generator=generator) for heads, count in ((4, tokens), (2, 9), (2, 9)))
    bias = torch.randn(1, 4, tokens, 9, generator=generator)
    mask: torch.Tensor | None = None
    expected = bias
    if seen == "causal":  # as a static cache is prefilled: room for 9 tokens, the first of which are there
        visible = torch.ones(tokens, 9, dtype=torch.bool).tril() if tokens > 1 else torch.ones(1, 9, dtype=torch.bool)
        expected = bias.masked_fill(~visible, -torch.inf)
    elif seen == "padded":
        mask = torch.ones(2, 1, tokens, 9, dtype=torch.bool)
        mask[0, ..., :3] = False
        expected = bias.expand(2, -1, -1, -1).masked_fill(~mask, -torch.inf)
    elif seen == "weighed":
        mask = torch.randn(2, 1, tokens, 9, generator=generator)
        expected = bias + mask
    module = type("Module", (torch.nn.Module,), {"is_causal": seen == "causal"})()
    made, _ = AttentionInterface()["kvfold"](module, q, k, v, mask, scaling=1.0, position_bias=bias)
    torch.testing.assert_close(made.transpose(1, 2), reference(q, k, v, mask=expected, scale=1.0))


def test_sinks_of_transformers_are_honoured() -> None:
    """Stock sdpa ignores `s_aux`."""
    forward, q = AttentionInterface()["kvfold"], torch.randn(1, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    sinks_H = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    made, _ = forward(torch.nn.Module(), q, q, q, None, s_aux=sinks_H)
    torch.testing.assert_close(made.transpose(1, 2), reference(q, q, q, causal=True, sinks_H=sinks_H))


def test_dropout_acts_in_training_alone() -> None:
    model, ids = _model({**GROUPED, "attention_dropout": 0.5}), _ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.inference_mode()
def test_fp8_attention_is_that_of_transformers_fp8_cache() -> None:
    """In one layer, the last token reads what a cache kept; its scale is found from the tokens before the last."""
    model = _model({**all_families()["llama"].tiny(), "num_hidden_layers": 1})
    same = 0
    for seed in range(8):
        ids_BT = torch.randint(3, 96, (1, 33), generator=torch.Generator().manual_seed(seed))
        exact_V = model(ids_BT).logits[0, -1]
        cache = hf.new_cache(model, "fp8", 33)
        model(ids_BT[:, :-1], past_key_values=cache)
        kept_V = model(ids_BT[:, -1:], past_key_values=cache).logits[0, -1]
        with hf.with_attention(model, hf.QUANTISED["fp8"][0]):
            found_V = model(ids_BT).logits[0, -1]
        assert (kept_V - exact_V).abs().max() > 1e-4  # it does round
        same += torch.allclose(found_V, kept_V, rtol=1e-5, atol=1e-6)
    assert same >= 6  # in the others the last token has the largest number


def test_the_attention_in_use_comes_back_after_an_error() -> None:
    model = _model(GROUPED, "sdpa")
    with hf.with_attention(model, "kvfold"):
        assert model.config._attn_implementation == "kvfold"
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(AttributeError), hf.with_attention(model, "kvfold"):
        model(input_ids=None, inputs_embeds=3)
    assert model.config._attn_implementation == "sdpa"


def test_attention_outputs_are_kept_with_their_gradients() -> None:
    model, ids = hf.build(GROUPED, seed=0), _ids()
    paths = [f"model.layers.{layer}.self_attn" for layer in (0, 3)]
    with hf.attention_outputs(model, paths) as found:
        model(ids)
        first = dict(found)
        assert list(found) == paths
        assert first[paths[0]].shape == (2, 10, 32)
        model(ids + 1 - 1)
        assert found[paths[0]] is not first[paths[0]]
        sum(each.square().sum() for each in found.values()).backward()
    assert model.get_submodule(paths[0]).o_proj.weight.grad.any()
    model(ids)
    assert not found  # the hooks are gone
    with (
        pytest.raises(SettingError, match=r"model\.layers\.9\.self_attn: .*no module"),
        hf.attention_outputs(model, ["model.layers.9.self_attn"]),
    ):
        pass


# --- caches --------------------------------------------------------------------------------------------------------


def _fill(model: Any, cache: Any, tokens: int) -> Any:
    for part in _ids(tokens=tokens).split([tokens - 2, 1, 1], dim=1):
        model(part, past_key_values=cache)
    return cache


def test_live_bytes_of_a_growing_cache() -> None:
    model = _model(GROUPED)
    assert hf.live_cache_bytes(DynamicCache(config=model.config)) == 0
    cache = _fill(model, DynamicCache(config=model.config), 10)
    assert hf.live_cache_bytes(cache) == 4 * 2 * (2 * 10 * 2 * 8) * 4  # layers, k and v, B S G E, float32


def test_live_bytes_of_a_window_count_what_its_view_hides() -> None:
    model = _model(WINDOWED)
    cache = _fill(model, DynamicCache(config=model.config), 10)
    assert cache.layers[0].keys.shape[2] == 5
    assert hf.live_cache_bytes(cache) == 4 * 2 * (2 * 6 * 2 * 8) * 4


def test_live_bytes_of_a_static_cache_are_its_reserve() -> None:
    model = _model(GROUPED)
    cache = _fill(model, StaticCache(config=model.config, max_cache_len=32), 10)
    assert hf.live_cache_bytes(cache) == 4 * 2 * (2 * 32 * 2 * 8) * 4


def test_a_q4_cache_rounds_as_llama_cpp_does() -> None:
    quants = pytest.importorskip("gguf.quants")
    heads_BGSE = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    heads_BGSE[0, 0, 0, :32] = 0.0
    written = quants.Q4_0.quantize(heads_BGSE.numpy())
    expected = torch.from_numpy(quants.Q4_0.dequantize(written))
    torch.testing.assert_close(through_q4(heads_BGSE), expected, rtol=1e-6, atol=1e-6)
    narrow = heads_BGSE[..., :16]  # blocks of 16: no more apart than half a step of their own
    largest = narrow.abs().amax(-1, keepdim=True)
    assert bool(((through_q4(narrow) - narrow).abs() <= largest / 8 * 1.01).all())


def test_live_bytes_of_an_fp8_cache_hold_its_scales() -> None:
    model = _model(GROUPED)
    cache = _fill(model, QuantizedCache("fp8", model.config), 10)
    assert hf.live_cache_bytes(cache) == 4 * 2 * ((2 * 10 * 2 * 8) + 4)


def test_layers_that_share_a_storage_are_counted_once() -> None:
    model = _model(GROUPED)
    cache = _fill(model, DynamicCache(config=model.config), 10)
    before = hf.live_cache_bytes(cache)
    cache.layers[1].keys, cache.layers[1].values = cache.layers[0].keys, cache.layers[0].values
    assert hf.live_cache_bytes(cache) == before * 3 // 4


# --- loading -------------------------------------------------------------------------------------------------------


def test_load_is_quiet_and_leaves_the_log_as_it_was(tiny_checkpoint: Maker, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = tiny_checkpoint()
    capfd.readouterr()
    model = hf.load(folder, dtype="bfloat16")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "kvfold"


def test_load_tokenizer(tiny_checkpoint: Maker) -> None:
    assert hf.load_tokenizer(tiny_checkpoint())("ab")["input_ids"]
    with pytest.raises(DataError, match="no tokenizer"):
        hf.load_tokenizer(tiny_checkpoint(name="bare", tokenizer=False))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_of_their_own_do_not_change_how_text_is_split(
    tiny_checkpoint: Maker, tmp_path: Path, model_type: str, name: str | None
) -> None:
    """What transformers does with the stock model type is the measure: it may overrule tokenizer_config.json."""
    family = "llama" if model_type == "mistral" else model_type
    teacher = tiny_checkpoint(family)
    config = json.loads((teacher / "config.json").read_text()) | {"model_type": model_type, "tokenizer_class": name}
    (teacher / "config.json").write_text(json.dumps(config))
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": name} if name else {})))
    student = tmp_path / "student"
    shutil.copytree(teacher, student)
    mixed = {"model_type": f"kvfold_{model_type}", "per_layer_config": {"1": {"num_key_value_heads": 2}}}
    (student / "config.json").write_text(json.dumps(config | mixed))

    text = " Fold 12345\tthe  caché\n\nNa\u0308ive's 漢字"
    stock, ours = AutoTokenizer.from_pretrained(teacher), hf.load_tokenizer(student)
    assert type(ours) is type(stock)
    assert ours(text)["input_ids"] == stock(text)["input_ids"]


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [_drop, _truncate, shutil.rmtree, lambda folder: (folder / "config.json").unlink()])
def test_a_damaged_checkpoint_is_one_clear_line(tiny_checkpoint: Maker, damage: Callable[[Path], None]) -> None:
    folder = tiny_checkpoint()
    damage(folder)
    with pytest.raises(CheckpointError) as told:
        hf.load(folder)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)


def test_tensors_that_transformers_would_make_up_are_refused(
    tiny_checkpoint: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    _drop(folder)
    config = json.loads((folder / "config.json").read_text())
    opened = type("Opened", (), {"path": folder, "config": config, "family": all_families()["llama"], "buffers": ()})
    monkeypatch.setattr("kvfold.hf.loading.Checkpoint.open", lambda path: opened)  # were its own check to miss it
    with pytest.raises(CheckpointError, match=r"missing tensors .*model\.norm\.weight"):
        hf.load(folder)


def test_an_architecture_without_a_family_is_refused(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    text = (folder / "config.json").read_text().replace('"llama"', '"mpt"')
    (folder / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match="mpt"):
        hf.load(folder)


def test_settings_that_make_no_model_are_refused() -> None:
    with pytest.raises(SettingError, match="float32, bfloat16"):
        hf.build(TINY, seed=0, dtype="int8")
    with pytest.raises(SettingError, match="no model can be built from the config"):
        hf.build({**TINY, "model_type": "lama"}, seed=0)
    with pytest.raises(SettingError, match="no model can be built from the config"):
        hf.build(TINY, seed=0, attention="fold")


def test_a_fresh_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two, three = (hf.build(GROUPED, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], three["lm_head.weight"])


def test_generate_is_greedy_and_leaves_no_graph() -> None:
    model, ids = _model(GROUPED), _ids()
    made = hf.generate(model, ids, max_new_tokens=5)
    again = hf.generate(model, ids, max_new_tokens=5)
    assert torch.equal(made, again)
    assert torch.equal(made[:, :10], ids)
    assert not made.requires_grad


# --- encoder-decoders -----------------------------------------------------------------------------------------------


def test_a_t5_with_shared_heads_is_found_by_transformers_once_kvfold_is_there(
    tiny_checkpoint: Maker, tmp_path: Path
) -> None:
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})
    model, told = AutoModelForSeq2SeqLM.from_pretrained(student, output_loading_info=True)
    assert not any(told[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "KvfoldT5ForConditionalGeneration"
    block = model.decoder.block[2]
    assert block.layer[0].SelfAttention.k.weight.shape == (16, 32)
    assert block.layer[1].EncDecAttention.v.weight.shape == (8, 32)
    assert model.encoder.block[2].layer[0].SelfAttention.k.weight.shape == (32, 32)
    assert type(AutoModel.from_pretrained(student)).__name__ == "KvfoldT5Model"
    assert hf.load_tokenizer(student).encode("fold") == hf.load_tokenizer(tmp_path / "teacher").encode("fold")


@pytest.mark.slow
def test_without_kvfold_a_t5_with_shared_heads_is_no_t5(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    """transformers would read `num_key_value_heads` of a `t5`, and build all heads; an unknown type is refused."""
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "gqa", {"kv_heads": 2})
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(student)!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode
    assert "kvfold_t5" in said.stderr


@pytest.mark.parametrize("heads", [3, 0, [2, 2]])
def test_heads_that_make_no_t5_are_refused(heads: Any) -> None:
    config = {**all_families()["t5"].tiny(), "model_type": "kvfold_t5", "num_key_value_heads": heads}
    with pytest.raises(SettingError, match="no model can be built from the config: "):
        _model(config)


def test_a_fresh_t5_is_tied_only_where_its_config_says_so() -> None:
    for tied in (True, False):
        model = hf.build({**all_families()["t5"].tiny(), "tie_word_embeddings": tied}, seed=0)
        assert (model.lm_head.weight is model.shared.weight) == tied  # type: ignore[union-attr]
        assert model.config.scale_decoder_outputs == tied  # type: ignore[union-attr]
