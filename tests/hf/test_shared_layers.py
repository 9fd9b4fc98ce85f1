"""Layers with key/value heads of their own, or another layer's, against a textbook decoder written out here."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, silu, softmax
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from examples import APART
from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families, family_of

Sources = tuple[int, ...]
OWN: Sources = (0, 1, 2, 3)
PAIRS: Sources = (0, 0, 2, 2)
HEADS = (4, 2, 1, 2)
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any], Sources, tuple[int, ...]]] = {
    **{f"{name}, own": (name, {}, OWN, HEADS) for name in APART},
    "windows, own": ("qwen3", {**WINDOWS, "attention_bias": True, "tie_word_embeddings": True}, OWN, HEADS),
    "llama": ("llama", {}, PAIRS, (4, 4, 4, 4)),
    "one owner": ("llama", {"attention_bias": True}, (0, 0, 0, 0), (2, 2, 2, 2)),
    "crossed": ("llama", {"num_key_value_heads": 2}, (0, 1, 0, 1), (2, 1, 2, 1)),
    "trailing": ("llama", {"head_dim": 16}, (0, 1, 1, 1), (4, 2, 2, 2)),
    "mistral": ("llama", MISTRAL, PAIRS, (4, 4, 2, 2)),
    "qwen2": ("qwen2", WINDOWS, PAIRS, (2, 2, 4, 4)),
    "qwen3": ("qwen3", {}, PAIRS, (4, 4, 1, 1)),
    "olmo2": ("olmo2", {"attention_bias": True}, PAIRS, (4, 4, 1, 1)),
}
NORMS = ("input", "post_attention", "post_feedforward")
SHARED = [kind for kind, (_, _, sources, _) in MODELS.items() if sources != OWN]


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, layered_checkpoint: Callable[..., Path]) -> Path:
    family, changes, sources, heads = MODELS[request.param]
    return layered_checkpoint(family, heads, sources, **changes)


@pytest.fixture
def config(layered_checkpoint: Callable[..., Path]) -> dict[str, Any]:
    """The config.json of a llama whose layers share in pairs."""
    return config_of(layered_checkpoint("llama", (4, 4, 4, 4), PAIRS))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def sources_of(folder: Path) -> list[int]:
    """The layer whose keys and values each layer reads; its own, where none share."""
    config = config_of(folder)
    return list(config.get("kv_source_layers") or range(config["num_hidden_layers"]))


# --- the textbook --------------------------------------------------------------------------------------------------


def textbook(folder: Path, weights: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Logits of a decoder whose layers read the keys and values that `kv_source_layers` says, or its own."""
    config, shape = config_of(folder), Checkpoint.open(folder).shape
    x_BTD = weights["model.embed_tokens.weight"][ids_BT]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, source in enumerate(sources_of(folder)):
        name, site = f"model.layers.{layer}", shape.sites[Site(layer)]
        norms = {each: weights.get(f"{name}.{each}_layernorm.weight") for each in NORMS}
        h_BTD = _norm(x_BTD, norms["input"], config["rms_norm_eps"])
        made = {}
        for role in "qkv" if source == layer else "q":
            flat = h_BTD @ weights[f"{name}.self_attn.{role}_proj.weight"].T
            flat = flat + weights.get(f"{name}.self_attn.{role}_proj.bias", torch.zeros(1))
            weight = weights.get(f"{name}.self_attn.{role}_norm.weight", torch.zeros(0))
            if len(weight) > site.head_dim:  # over all heads
                flat = _norm(flat, weight, config["rms_norm_eps"])
            heads = flat.view(*ids_BT.shape, -1, site.head_dim)
            if len(weight) == site.head_dim:
                heads = _norm(heads, weight, config["rms_norm_eps"])
            made[role] = heads if role == "v" else _turn(heads)
        if source == layer:
            kept[layer] = made["k"], made["v"]
        keys, values = kept[source]
        rows = []
        for head in range(site.num_attention_heads):
            mine = head // (site.num_attention_heads // keys.shape[2])
            logits = torch.einsum("bte,bse->bts", made["q"][:, :, head], keys[:, :, mine]) / math.sqrt(site.head_dim)
            t, s = torch.arange(ids_BT.shape[1])[:, None], torch.arange(ids_BT.shape[1])[None]
            seen = (s <= t) & (t - s < (site.window or 10**6))
            rows.append(softmax(logits.masked_fill(~seen, -torch.inf), -1) @ values[:, :, mine])
        o_BTD = torch.cat(rows, -1) @ weights[f"{name}.self_attn.o_proj.weight"].T
        o_BTD = o_BTD + weights.get(f"{name}.self_attn.o_proj.bias", torch.zeros(1))
        behind = norms["post_feedforward"] is not None  # attention and MLP are normed behind, not before
        x_BTD = x_BTD + _norm(o_BTD, norms["post_attention"] if behind else None, config["rms_norm_eps"])
        h_BTD = _norm(x_BTD, None if behind else norms["post_attention"], config["rms_norm_eps"])
        gate, up, down = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        made_BTD = (silu(h_BTD @ gate.T) * (h_BTD @ up.T)) @ down.T
        x_BTD = x_BTD + _norm(made_BTD, norms["post_feedforward"], config["rms_norm_eps"])
    head_VD = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return _norm(x_BTD, weights["model.norm.weight"], config["rms_norm_eps"]) @ head_VD.T


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _turn(heads_BTHE: Tensor) -> Tensor:
    """Each plane of a head times e^{i t theta}."""
    half = heads_BTHE.shape[-1] // 2
    planes = torch.complex(heads_BTHE[..., :half], heads_BTHE[..., half:])
    theta = 10000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(heads_BTHE.shape[1])[:, None] * theta
    turned = planes * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["kvfold", "sdpa", "eager"])
@torch.inference_mode()
def test_logits_are_the_textbooks(saved: Path, attention: str) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = textbook(saved, weights_of(saved), _ids(2, 20))
    assert expected.std() > 0.5  # or the comparison would say little
    for use_cache in (False, True):
        _close(model(_ids(2, 20), use_cache=use_cache).logits, expected)


@pytest.mark.parametrize("saved", SHARED, indirect=True)
@torch.inference_mode()
def test_the_source_is_felt(saved: Path) -> None:
    """Or these tests would hold for layers that made something of their own."""
    model: Any = hf.load(saved)
    for layer, source in enumerate(model.config.kv_source_layers):
        module = model.model.layers[layer].self_attn
        for own in (module.k_proj, module.v_proj):
            assert bool(list(own.parameters())) == (source == layer)
    before = textbook(saved, weights_of(saved), _ids(2, 20))
    weights = weights_of(saved)
    weights["model.layers.0.self_attn.v_proj.weight"] = weights["model.layers.0.self_attn.v_proj.weight"] * 2
    assert (textbook(saved, weights, _ids(2, 20)) - before).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.inference_mode()
def test_token_by_token_is_the_whole_prompt(saved: Path, kind: str) -> None:
    model: Any = hf.load(saved)
    cache: Any = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    )
    steps = [model(token, past_key_values=cache).logits for token in _ids(2, 20).split(1, dim=1)]
    _close(torch.cat(steps, dim=1), textbook(saved, weights_of(saved), _ids(2, 20)))


@pytest.mark.slow
@torch.inference_mode()
def test_the_cache_holds_owners_only(saved: Path) -> None:
    model: Any = hf.load(saved)
    shape = Checkpoint.open(saved).shape
    cache = hf.new_cache(model, "growing", 0)
    for ids in (_ids(3, 9), _ids(3, 1)):
        hf.read(model, ids, cache)
    sources, heads = sources_of(saved), [each.num_key_value_heads for each in shape.sites.values()]
    kept = [None if layer.keys is None else layer.keys.shape[1] for layer in cache.layers]
    assert kept == [heads[n] if source == n else None for n, source in enumerate(sources)]
    promised = grouped_cache(shape)
    assert hf.live_cache_bytes(cache) == promised.bytes(10, batch=3, itemsize=4)
    owners = 2 * sum(shape.sites[Site(n)].num_key_value_heads * shape.sites[Site(n)].head_dim for n in set(sources))
    assert promised.elements(1) == owners


@pytest.mark.slow
def test_greedy_answers_are_the_textbooks(saved: Path) -> None:
    weights, ids = weights_of(saved), _ids(2, 10)
    model: Any = hf.load(saved)
    expected = ids
    with torch.inference_mode():
        for _ in range(6):
            expected = torch.cat([expected, textbook(saved, weights, expected)[:, -1:].argmax(-1)], dim=1)
    options: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    for option in options:
        assert torch.equal(hf.generate(model, ids, max_new_tokens=6, **option), expected)
    beams = hf.generate(model, ids, max_new_tokens=6, num_beams=4)
    assert torch.equal(beams, hf.generate(model, ids, max_new_tokens=6, num_beams=4, use_cache=False))
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": hf.load(saved, attention="eager")}):
        assert torch.equal(hf.generate(model, ids[:1], max_new_tokens=6, **helper), expected[:1])


@pytest.mark.slow
def test_left_padding_does_not_change_a_row(saved: Path) -> None:
    model, ids, padding = hf.load(saved), _ids(3, 12), (5, 0, 9)
    mask = torch.stack([torch.arange(12) >= width for width in padding]).long()
    together = hf.generate(model, ids * mask, max_new_tokens=6, attention_mask=mask)[:, 12:]
    for row, width in enumerate(padding):
        alone = hf.generate(model, ids[row : row + 1, width:], max_new_tokens=6)
        assert torch.equal(together[row], alone[0, 12 - width :])


# --- gradients -----------------------------------------------------------------------------------------------------


def gradients(model: Any, use_cache: bool) -> dict[str, Tensor]:
    model.train().zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that it turns the cache off
        model(_ids(2, 16), labels=_ids(2, 16), use_cache=use_cache).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}  # None has no clone


def expected_gradients(folder: Path) -> dict[str, Tensor]:
    weights = {name: each.requires_grad_() for name, each in weights_of(folder).items()}
    logits_BTV = textbook(folder, weights, _ids(2, 16))
    cross_entropy(logits_BTV[:, :-1].flatten(0, 1), _ids(2, 16)[:, 1:].flatten()).backward()
    return {name: each.grad for name, each in weights.items() if each.grad is not None}


@pytest.mark.slow
def test_owners_learn_from_all_who_read_them(saved: Path) -> None:
    """Checkpointing on and off, cache on and off: every gradient is the textbook's."""
    expected = expected_gradients(saved)
    model: Any = hf.load(saved)
    plain = gradients(model, use_cache=False)
    assert plain.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(plain[name], gradient, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(found, plain[name]) for name, found in gradients(model, use_cache=True).items())
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    for use_cache in (False, True):
        assert all(torch.equal(found, plain[name]) for name, found in gradients(model, use_cache=use_cache).items())


def test_reentrant_checkpointing_is_refused(config: dict[str, Any]) -> None:
    model: Any = hf.build(config, seed=0)
    with pytest.raises(SettingError, match=r"loses the gradient.*got use_reentrant=True.*use_reentrant=False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    assert not model.is_activation_checkpointing
    model.model.activation_checkpointing_enable({"use_reentrant": True})  # past the door: the forward still refuses
    with pytest.raises(SettingError, match="loses the gradient"):
        model.train()(_ids(1, 5))
    alone: Any = hf.build({**config, "kv_source_layers": None}, seed=0)
    alone.activation_checkpointing_enable({"use_reentrant": True})  # nothing is shared, nothing is lost


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("saved", ["one owner", "crossed", "qwen3"], indirect=True)
def test_what_is_shared_survives_sharding(saved: Path, one_rank: None) -> None:
    """FSDP2 takes the keywords of a forward apart on their way; a plain dict would come out as another one."""
    expected = gradients(hf.load(saved), use_cache=False)
    model: Any = hf.load(saved)
    model.activation_checkpointing_enable()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, use_cache=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


# --- configs and files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_what_is_saved_is_read_again(saved: Path, tmp_path: Path) -> None:
    model: Any = hf.load(saved)
    model.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").hash() == Checkpoint.open(saved).hash()
    config, sources = AutoConfig.from_pretrained(saved), sources_of(saved)
    if config.kv_source_layers is not None:
        modes = {("store" if n in sources[n + 1 :] else None) for n in set(sources)}
        assert set(config.kv_sharing_modes) == modes | {"reuse"}
    assert pickle.loads(pickle.dumps(config)).kv_source_layers == config.kv_source_layers
    heads = [each.num_key_value_heads for each in Checkpoint.open(saved).shape.sites.values()]
    assert [own.num_key_value_heads for own in config.per_layer_config or [config] * 4] == heads
    AutoModelForCausalLM.from_config(config).load_state_dict(model.state_dict(), strict=True)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(_ids(1, 7)).logits, model(_ids(1, 7)).logits)
    with hf.with_attention(model, "eager"):
        weights = model(_ids(1, 5), output_attentions=True).attentions
    assert [tuple(each.shape) for each in weights] == [(1, 4, 5, 5)] * 4


def test_a_shape_and_its_config_say_the_same(saved: Path) -> None:
    shape = Checkpoint.open(saved).shape
    config = config_of(saved)
    fields = family_of(config).fields(shape)
    assert {key: config[key] for key in fields} == fields
    assert sum(each.numel() for each in hf.load(saved).parameters()) == shape.parameters
    assert shape.owners == {
        source: 2 * shape.sites[Site(source)].num_key_value_heads * shape.sites[Site(source)].head_dim
        for n, source in enumerate(sources_of(saved))
        if source != n
    }


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([0, 0, 3, 2], "layer 2 cannot read"),
        ([0, 0, 1, 1], "layer 2 cannot read"),
        ([0, 0], "a layer for each of 4"),
        ([0, "0", 2, 2], "kv_source_layers must be a list of whole numbers"),
        ("0,0,2,2", "kv_source_layers must be a list of whole numbers"),
    ],
)
def test_a_config_that_cannot_be_is_refused(said: object, told: str, config: dict[str, Any]) -> None:
    config["kv_source_layers"] = said
    with pytest.raises(UnsupportedModel, match=told):
        family_of(config).shape(config)
    with pytest.raises(SettingError):
        hf.build(config, seed=0)


def test_a_stock_architecture_does_not_share(config: dict[str, Any]) -> None:
    stock = {**all_families()["llama"].tiny(), "kv_source_layers": [0, 0, 2, 2]}
    with pytest.raises(UnsupportedModel, match="transformers builds all layers alike in llama"):
        family_of(stock).shape(stock)
    mixed = {**config, "per_layer_config": {"1": {"num_key_value_heads": 2}}}
    with pytest.raises(UnsupportedModel, match="layer 1 reads keys and values of layer 0, and differs"):
        family_of(mixed).shape(mixed)


# --- one layer at a time ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layer_by_layer_is_the_whole_model(saved: Path) -> None:
    source, ids = Checkpoint.open(saved), _ids(5, 12)
    model: Any = hf.load(saved)
    expected: list[Tensor] = []
    for each in model.model.layers:
        each.register_forward_hook(lambda module, given, out: expected.append(out))
    with torch.inference_mode():
        model(ids)
    with hf.Layers(source, lengths=[12] * 5) as layers, torch.inference_mode():
        rows = list(layers.embed(ids).split(2))
        for number in range(len(layers)):
            layer = layers.open(number)
            rows = [layer.run(hidden, 2 * n) for n, hidden in enumerate(rows)]
            _close(torch.cat(rows), expected[number])


@pytest.mark.parametrize("saved", ["qwen3"], indirect=True)
def test_a_consumer_before_its_owner_is_an_error(saved: Path) -> None:
    source = Checkpoint.open(saved)
    consumer = next(site.layer for site, each in source.shape.sites.items() if each.source is not None)
    with hf.Layers(source, lengths=[4]) as layers, pytest.raises(EOFError, match="never written"):
        layers.open(consumer).run(torch.zeros(1, 4, 32))
