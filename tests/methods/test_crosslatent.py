"""crosslatent: one cache of the encoder's output for all cross-attentions, against stock models and the definition."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, EncoderDecoderCache

from kvfold import hf, methods
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Attention, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.export.exporting import ENGINES
from kvfold.families import all_families, family_of
from kvfold.methods import crosslatent
from kvfold.predict.plan import PlanSettings, plan
from kvfold.predict.roofline import decode_step
from kvfold.solve.encoder_latent import CrossAttention, EncoderLatent, fit_latent
from kvfold.solve.shared_heads import Moments
from tolerance import assert_same

Make = Callable[..., Path]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
WIDE = {"num_layers": 5, "num_decoder_layers": 3, "d_kv": 16}
SHARED = {
    "model_type": "kvfold_t5",
    "architectures": ["KvfoldT5ForConditionalGeneration"],
    "num_key_value_heads": 2,
    "cross_num_key_value_heads": [2, 1, 4, 2],
}
GROUPED_BART = {
    "model_type": "kvfold_bart",
    "architectures": ["KvfoldBartForConditionalGeneration"],
    "cross_num_key_value_heads": 2,
}
GEMMA = all_families()["t5gemma"].tiny()
WIDE_GEMMA = {  # the decoder's heads are those that all of its attentions have
    "encoder": {**GEMMA["encoder"], "hidden_size": 40, "num_hidden_layers": 3},
    "decoder": {**GEMMA["decoder"], "attention_bias": True},
}
MBART = {"model_type": "mbart", "architectures": ["MBartForConditionalGeneration"], "decoder_layers": 3}
CROSS = "decoder.block.{}.layer.1.EncDecAttention."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> ConvertSettings:
    (tmp_path / "text.txt").write_text(TEXT)
    return ConvertSettings(calibration=str(tmp_path / "text.txt"))


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    assert_same(found, expected, dtype=torch.float32)  # which models compute in


def written_out(student: Path) -> Any:
    """The same function as a stock model that caches keys and values of all heads of all layers."""
    config = json.loads((student / "config.json").read_text())
    tensors, family = load_file(student / "model.safetensors"), family_of(config)
    shape = family.shape(config)
    ours = ("num_key_value_heads", "cross_num_key_value_heads", "cross_latent_dim", "model_type")
    known = {key: value for key, value in config.items() if key not in ours}
    made = transformers.AutoConfig.for_model(config["model_type"].removeprefix("kvfold_"), **known)
    model = getattr(transformers, config["architectures"][0].removeprefix("Kvfold"))(made)
    down_RD = tensors.pop(
        family.tensor(Site(0, "cross"), "kv_down"), torch.eye(shape.sites[Site(0, "cross")].input_width)
    )
    for site, attention in shape.sites.items():
        module = model.get_submodule(family.module(site))
        for role in ("k", "v"):
            name = family.tensors[role].removesuffix(".weight")
            linear = getattr(module, name)
            if f"{role}_bias" in attention.roles() and linear.bias is None:
                setattr(module, name, nn.Linear(linear.in_features, linear.out_features))
        for role in ("k", "v", "k_bias", "v_bias"):
            name = family.tensor(site, role)
            if name in tensors:
                whole = tensors[name] if "bias" in role or site.kind != "cross" else tensors[name] @ down_RD
                each = whole.unflatten(0, (-1, attention.head_dim))
                tensors[name] = each.repeat_interleave(attention.query_group, dim=0).flatten(0, 1)
    there = model.state_dict()
    for name, tensor in tensors.items():
        there[name].copy_(tensor)
    return model.eval()


# --- what a student computes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [7, None], ids=["narrow", "whole"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(("t5", {}), ("t5", SHARED), ("t5", WIDE), ("bart", {}), ("bart", GROUPED_BART), ("bart", MBART)),
        *(("t5gemma", {}), ("t5gemma", WIDE_GEMMA)),
    ],
    ids=["t5", "t5-shared", "t5-wide", "bart", "bart-shared", "mbart", "t5gemma", "t5gemma-wide"],
)
def test_generation_is_that_of_keys_and_values_written_out(
    family: str,
    changes: dict[str, Any],
    width: int | None,
    tiny_checkpoint: Make,
    text: ConvertSettings,
    tmp_path: Path,
) -> None:
    teacher = tiny_checkpoint(family, eos_token_id=None, **changes)
    student = convert(teacher, tmp_path / "student", "crosslatent", {"cross_latent_dim": width}, options=text)
    model: Any = hf.load(student)
    stock, mask = written_out(student), torch.ones(3, 12, dtype=torch.long)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids(3, 12), "attention_mask": mask, "max_new_tokens": 9}
    with torch.inference_mode():
        read = {**inputs, "decoder_input_ids": ids(3, 6)}
        del read["max_new_tokens"]
        close(model(**read).logits, stock(**read).logits)
        for options in (
            {"do_sample": False},
            {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
            {"do_sample": False, "cache_implementation": "static"},
            {"do_sample": True, "top_k": 0},
        ):
            written = []
            for each in (model, stock):
                torch.manual_seed(0)
                written.append(each.generate(**inputs, **options))
            assert torch.equal(*written), options
    if width is None:
        old, new = load_file(teacher / "model.safetensors"), load_file(student / "model.safetensors")
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@torch.inference_mode()
def test_one_latent_is_cached_for_all_layers(tiny_checkpoint: Make, text: ConvertSettings, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "crosslatent", {"cross_latent_dim": 7}, options=text)
    model: Any = hf.load(student)
    cache: Any = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    encoded = hf.encode(model, ids(2, 11))
    model(encoder_outputs=(encoded,), decoder_input_ids=ids(2, 3), past_key_values=cache)
    first, *others = cache.cross_attention_cache.layers
    assert first.keys.shape == (2, 1, 11, 7)
    assert first.values.numel() == 0
    assert not any(layer.is_initialized for layer in others)
    down = load_file(student / "model.safetensors")[CROSS.format(0) + "kv_down.weight"]
    close(first.keys[:, 0], encoded @ down.T)
    own = 2 * 4 * 2 * 3 * 4 * 8 * 4  # keys and values of 4 layers: 2 rows, 3 tokens, 4 heads of 8, in float32
    assert hf.live_cache_bytes(cache) == own + 2 * 11 * 7 * 4
    held = first.keys.data_ptr()
    model(encoder_outputs=(encoded * 0,), decoder_input_ids=ids(2, 1), past_key_values=cache)  # it is not read again
    assert first.keys.data_ptr() == held


@pytest.mark.parametrize("attention", ["kvfold", "sdpa"])
@torch.inference_mode()
def test_steps_write_no_keys_and_values_out(
    attention: str, tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "crosslatent")
    model: Any = hf.load(student, attention=attention)
    encoded, tokens = hf.encode(model, ids(2, 11)), ids(2, 20)
    expected = model(encoder_outputs=(encoded,), decoder_input_ids=tokens).logits
    for block in model.decoder.block:
        for each in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v):
            monkeypatch.setattr(each, "forward", lambda x: pytest.fail("written out"))
    cache = hf.new_cache(model, "growing", 0)
    parts = tokens.split([1, 1, 3, 9, 1, 5], dim=1)  # 2 * 4 * 48 a token against 2048 to write all out: up to 10 tokens
    steps = [model(encoder_outputs=(encoded,), decoder_input_ids=each, past_key_values=cache).logits for each in parts]
    close(torch.cat(steps, dim=1), expected)


def test_eager_and_dropout_write_out_and_agree(tiny_checkpoint: Make, text: ConvertSettings, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "crosslatent", {"cross_latent_dim": 9}, options=text)
    model: Any = hf.load(student)
    inputs = {"input_ids": ids(2, 11), "decoder_input_ids": ids(2, 1)}
    with torch.inference_mode():
        absorbed = model(**inputs).logits
        with hf.with_attention(model, "eager"):
            shown = model(**inputs, output_attentions=True)
    close(absorbed, shown.logits)
    weights = shown.cross_attentions[2]
    assert weights.shape == (2, 4, 1, 11)
    close(weights.sum(-1), torch.ones(2, 4, 1))
    model.train()
    for each in model.decoder.modules():
        if hasattr(each, "key_value_proj_dim"):
            each.dropout = 0.5
    torch.manual_seed(0)
    assert not torch.allclose(model(**inputs).logits.detach(), absorbed, atol=1e-4)


def test_reentrant_checkpointing_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    model: Any = hf.load(convert(tiny_checkpoint("t5"), tmp_path / "student", "crosslatent")).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SettingError, match="reentrant checkpointing loses the gradient"):
        model(input_ids=ids(1, 5), labels=ids(1, 5), use_cache=False)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # a stock T5 hands on a view of its biases
def test_the_latent_survives_sharding_and_pickling(
    tiny_checkpoint: Make, text: ConvertSettings, tmp_path: Path, one_rank: None
) -> None:
    """FSDP2 shards `kv_down` with the first layer, whose forward alone uses it; the others are handed what it made."""
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "crosslatent", {"cross_latent_dim": 6}, options=text)
    plain: Any = hf.load(student).train()
    sharded: Any = pickle.loads(pickle.dumps(plain))
    sharded.activation_checkpointing_enable({"use_reentrant": False})
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in (*sharded.encoder.block, *sharded.decoder.block):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        model(input_ids=ids(2, 11), labels=ids(2, 9), use_cache=False).loss.backward()
    for (name, each), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert each.grad is not None, name
        close(other.grad.full_tensor(), each.grad)


# --- how the latent is found ----------------------------------------------------------------------------------------


def drawn(layers: int, groups: int = 2) -> list[CrossAttention]:
    """Cross-attentions of 4 heads of 3 over a width of 12, and moments in which averages have a third of the spread."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    attention, mean_D, samples = Attention(12, 4, groups, 3, scale=1.0), normal(12), normal(50, 12)
    spread_DD = samples.T @ samples / 50
    readers = []
    for _ in range(layers):
        queries = normal(4, 20, 3)
        own_D = normal(12)
        moments = Moments(
            spread_DD + torch.outer(mean_D, mean_D),
            mean_D,
            queries.mT @ queries / 20,
            spread_DD / 3 + torch.outer(own_D, own_D),
            own_D,
        )
        roles = {role: normal(*form) for role, form in attention.roles().items()}
        readers.append(CrossAttention(attention, roles, moments))
    return readers


def fitted(readers: list[CrossAttention], width: int) -> EncoderLatent:
    moments = readers[0].moments
    assert moments is not None
    return fit_latent(readers, width, (moments.gram_DD, moments.mean_D))


def test_the_fit_is_the_principal_components_of_all_layers() -> None:
    """Where averages are spread as inputs are, the optimum is known: the SVD of all keys and values, each weighed."""
    readers, width = drawn(3), 5
    found, rows, lost = fitted(readers, width), [], 0.0
    moments = readers[0].moments
    assert moments is not None
    seen_DD = moments.gram_DD - torch.outer(moments.mean_D, moments.mean_D)
    values, vectors = torch.linalg.eigh(seen_DD)
    root_DD = vectors @ values.sqrt().diag() @ vectors.T
    for reader, made in zip(readers, found.roles, strict=True):
        assert reader.moments is not None
        k, v = (reader.roles[role].view(2, 3, 12).repeat_interleave(2, 0) for role in "kv")
        o = reader.roles["o"].view(12, 4, 3).transpose(0, 1)
        apart = torch.stack([(o[h] @ v[h] @ (2 / 3 * seen_DD) @ v[h].T @ o[h].T).trace() for h in range(4)])
        for head in range(4):
            look = torch.linalg.cholesky(reader.moments.query_HEE[head]).T * (0.1 * apart[head]) ** 0.5
            behind = o[head] / 3**0.5
            rows += [look @ k[head], behind @ v[head]]
            for role, weight in (("k", look), ("v", behind)):
                old = reader.roles[role].view(2, 3, 12)[head // 2]
                new = made[role].view(2, 3, width)[head // 2] @ found.down_RD
                lost += float((weight @ (old - new) @ root_DD).square().sum())
    singular = torch.linalg.svdvals(torch.cat(rows) @ root_DD)
    assert lost == pytest.approx(float(singular[width:].square().sum()), rel=1e-6)
    assert all(0 < part < 1 for parts in found.lost for part in parts)


def test_values_keep_their_mean() -> None:
    for reader, made in zip(readers := drawn(2), (found := fitted(readers, 4)).roles, strict=True):
        assert reader.moments is not None
        mean_D = reader.moments.attended_mean_D
        close(made["v"] @ (found.down_RD @ mean_D) + made["v_bias"], reader.roles["v"] @ mean_D)


def test_keys_keep_theirs_where_a_cap_would_feel_it() -> None:
    plain = drawn(2)
    capped = [replace(each, attention=replace(each.attention, softcap=2.0)) for each in plain]
    for reader, made, other in zip(capped, (found := fitted(capped, 4)).roles, fitted(plain, 4).roles, strict=True):
        assert reader.moments is not None
        mean_D = reader.moments.mean_D
        close(made["k"] @ (found.down_RD @ mean_D) + made["k_bias"], reader.roles["k"] @ mean_D)
        assert made["k_bias"].norm() > 0.01
        close(made["k"], other["k"])
        assert "k_bias" not in other


def test_without_moments_it_is_the_svd_of_the_weights() -> None:
    readers = [replace(each, moments=None) for each in drawn(3)]
    found = fit_latent(readers, 4, None)
    stacked = torch.cat([each.roles[role] for each in readers for role in "kv"])
    kept = torch.cat([each[role] @ found.down_RD for each in found.roles for role in "kv"])
    left, values, right = torch.linalg.svd(stacked, full_matrices=False)
    close(kept, left[:, :4] @ values[:4].diag() @ right[:4])
    assert not any(each["v_bias"].any() for each in found.roles)


def test_whitened_by_inputs_keys_and_values_count_alike() -> None:
    """The SVD of both, whitened, and scaled to the same power; what a value has in common with all others stays."""
    readers = drawn(3)
    assert readers[0].moments is not None
    seen = readers[0].moments.gram_DD, readers[0].moments.mean_D
    found = fit_latent([replace(each, moments=None) for each in readers], 4, seen)
    root_DD = torch.linalg.cholesky(seen[0] - torch.outer(seen[1], seen[1]))
    white = [torch.cat([each.roles[role] for each in readers]) @ root_DD for role in "kv"]
    white = [each / each.norm() for each in white]
    kept = [torch.cat([each[role] for each in found.roles]) @ found.down_RD @ root_DD for role in "kv"]
    lost = sum(
        float((whole - part / (torch.cat([each.roles[role] for each in readers]) @ root_DD).norm()).square().sum())
        for whole, part, role in zip(white, kept, "kv", strict=True)
    )
    assert lost == pytest.approx(float(torch.linalg.svdvals(torch.cat(white))[4:].square().sum()), rel=1e-6)
    for reader, made in zip(readers, found.roles, strict=True):
        close(made["v"] @ (found.down_RD @ seen[1]) + made["v_bias"], reader.roles["v"] @ seen[1])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["outputs", "inputs", "weights"])
def test_layers_that_read_few_directions_lose_nothing(
    metric: str, tiny_checkpoint: Make, text: ConvertSettings, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("t5")
    tensors, generator = load_file(teacher / "model.safetensors"), torch.Generator().manual_seed(0)
    down_RD = torch.randn(6, 32, generator=generator) / 6
    for name in tensors:
        if "EncDecAttention" in name and name.endswith((".k.weight", ".v.weight")):
            tensors[name] = 0.3 * torch.randn(32, 6, generator=generator) @ down_RD
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    inputs, moved = {"input_ids": ids(2, 11), "decoder_input_ids": ids(2, 9)}, {}
    for width in (6, 5):
        settings = {"cross_latent_dim": width, "metric": metric}
        student = convert(teacher, tmp_path / f"{width}", "crosslatent", settings, options=text)
        with torch.inference_mode():
            logits = [hf.load(each)(**inputs).logits for each in (teacher, student)]
        moved[width] = float((logits[0] - logits[1]).abs().max())
        lineage = Checkpoint.open(student).lineage
        assert lineage is not None
        lost = lineage["steps"][-1]["found"]["sites"]
        assert set(lost) == {f"layer {layer} (cross)" for layer in range(4)}
        assert (max(part for site in lost.values() for part in site["lost"].values()) < 1e-6) == (width == 6)
    assert moved[6] < 1e-4 < 1e-3 < moved[5], moved


# --- with other methods, engines and plans --------------------------------------------------------------------------


@pytest.mark.slow
def test_self_attention_is_folded_first(tiny_checkpoint: Make, text: ConvertSettings, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5")
    folded = convert(teacher, tmp_path / "folded", "gqa", {"kv_heads": "self=2,cross=4"}, options=text)
    student = convert(folded, tmp_path / "student", "crosslatent")
    config = json.loads((student / "config.json").read_text())
    said = {"num_key_value_heads": 2, "cross_num_key_value_heads": 4, "cross_latent_dim": 32}
    assert said.items() <= config.items()
    inputs = {"input_ids": ids(2, 11), "decoder_input_ids": ids(2, 9)}
    with torch.inference_mode():
        assert torch.equal(*(hf.load(each)(**inputs).logits for each in (folded, student)))
    shape = Checkpoint.open(student).shape
    assert grouped_cache(shape).bytes_per_token() == 2 * 4 * 2 * 2 * 8
    assert grouped_cache(shape).bytes_per_encoder_token() == 2 * 32
    for method, settings in (("gqa", {"kv_heads": 1}), ("crosslatent", {})):
        with pytest.raises(SettingError, match=r"layer 0 \(cross\) caches latent already"):
            convert(student, tmp_path / "again", method, settings)


@pytest.mark.parametrize(
    ("family", "changes", "width", "line"),
    [
        ("llama", {}, None, "there is no cross-attention whose cache layers could share (got family llama)"),
        ("t5", {}, 33, "cross_latent_dim is out of range (got 33); allowed: 1 to 32: at most"),
        ("t5", {**SHARED, "cross_num_key_value_heads": 1, "num_decoder_layers": 1}, None, "allowed: 1 to 15"),
    ],
)
def test_what_cannot_be_is_one_line(family: str, changes: dict[str, Any], width: int | None, line: str) -> None:
    shape = all_families()[family].shape({**all_families()[family].tiny(), **changes})
    with pytest.raises(SettingError) as told:
        methods.check("crosslatent", crosslatent.Config(width), shape)
    assert line in str(told.value)


def test_no_engine_is_promised_and_none_is_written(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5")
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "crosslatent"))
    assert [engine.name for engine in plan(teacher, "crosslatent").engines if engine.loads] == ["transformers"]
    with pytest.raises(UnsupportedModel, match="caches keys and values of heads"):
        ENGINES["ctranslate2"].check(student)
    with pytest.raises(UnsupportedModel, match=r"its architecture is not supported \(got t5gemma\)"):
        ENGINES["ctranslate2"].check(Checkpoint.open(tiny_checkpoint("t5gemma", name="t5gemma")))


def test_a_plan_says_what_is_held_and_what_is_read(tmp_path: Path) -> None:
    """T5.1.1-XXL: 24 layers, 64 heads of 64, 4096 wide: 48 times fewer bytes, half the reads, 64 times the products."""
    config = {**all_families()["t5"].tiny(), **XXL, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = PlanSettings(context=256, encoder_context=512, batch=8)
    made = plan(tmp_path, "crosslatent", options=options)
    assert made.before.cache_bytes_per_encoder_token == 48 * made.after.cache_bytes_per_encoder_token
    assert made.after.cache_bytes_per_encoder_token == 2 * 4096
    assert made.after.parameters == made.before.parameters
    assert made.after.model_type == "kvfold_t5"
    (note,) = [line for line in made.warnings if "latent" in line]
    for words in ("4,096 numbers are held", "196,608 (48x fewer)", "98,304 are read in a step (2x fewer)", "64x as"):
        assert words in note
    shape = all_families()["t5"].shape(config)
    narrow = crosslatent.METHOD.student(crosslatent.Config(512), shape).shape
    how = {"context": 256, "batch": 8, "dtype": "bfloat16", "tied": False, "encoder_context": 512}
    before, after = (decode_step(each, grouped_cache(each), **how) for each in (shape, narrow))
    reads = 2 * 8 * 24 * (2 * 4096 * 256 + 512 * 512)  # keys and values of self-attention, and the latent in each layer
    assert after.cache_bytes == reads
    absorbed = 24 * 2 * 4096 * 512  # k and v of the latent are read in every step now; kv_down is not
    assert after.weight_bytes - before.weight_bytes == 2 * (absorbed + 24 * 4096)
    products = 24 * 2 * 64 * 512 * (2 * 512 - 2 * 64)
    assert after.flops - before.flops == 8 * (2 * (absorbed + 24 * 4096) + products)


@pytest.mark.slow
def test_bench_measures_the_bytes_that_are_planned(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5")
    student = convert(teacher, tmp_path / "student", "crosslatent", {"cross_latent_dim": 8})
    small = BenchSettings(context=(12,), batch=(2,), new_tokens=3, repeats=1)
    rows = bench([teacher, student], small, records=tmp_path / "records").metrics["rows"]
    own, of_encoder = 2 * 4 * (3 + 1) * 4 * 2 * 32, 2 * 12 * 4
    assert [row["cache_bytes"] for row in rows] == [own + of_encoder * 4 * 2 * 32, own + of_encoder * 8]
