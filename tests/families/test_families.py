from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kvfold
from examples import paired, read
from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.family import Family, with_fields
from kvfold.contracts.runtimes import DECOUPLED, LAYERS
from kvfold.contracts.site import Attention, Site
from kvfold.errors import UnsupportedModel
from kvfold.families import all_families, family_of

FAMILIES = all_families()
OUR_T5 = {"model_type": "kvfold_t5"}
OUR_BART = {"model_type": "kvfold_bart"}
OUR_GEMMA = {"model_type": "kvfold_t5gemma"}
GEMMA = FAMILIES["t5gemma"].tiny()
WIDE = {"encoder": {**GEMMA["encoder"], "hidden_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}}
PAIRED = paired()
CROSS = {"cross_num_key_value_heads": 2}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
DECODERS = [name for name in FAMILIES if name in LAYERS.models]  # with classes for layers that differ
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    **{f"{name}, grouped": (name, {"num_key_value_heads": 2}) for name in DECODERS},
    **{f"{name}, tied": (name, {"tie_word_embeddings": True}) for name in DECODERS},
    **{f"{name}, wide heads": (name, {"head_dim": 16}) for name in ("llama", "qwen3")},
    **{
        f"{name}, mixed": (
            name,
            {
                "model_type": f"kvfold_{name}",
                "num_key_value_heads": 2,
                "per_layer_config": {"00": {"num_key_value_heads": 4}, "3": {"num_key_value_heads": 1}},
            },
        )
        for name in DECODERS
    },
    **{
        f"{name}, decoupled": (
            name,
            {
                "model_type": f"kvfold_{name}",
                "num_key_value_heads": 2,
                "per_layer_config": {"3": {"num_key_value_heads": 1}},
                "value_heads": [[0, 1, 1, 0], None, [0, 1, 2, 3], [1, 0, 0, 1]],
            },
        )
        for name in DECODERS
        if name in DECOUPLED.models
    },
    **{
        f"{model_type}, latent": (
            "qwen2" if model_type == "qwen2" else "llama",
            {
                **(MISTRAL if model_type == "mistral" else {}),
                "model_type": f"kvfold_latent_{model_type}",
                "num_key_value_heads": 2,
                "rope_chunks": [1, 2, 3, 4],
                "latent_dims": [9, 5, 7, 16],
            },
        )
        for model_type in ("llama", "mistral", "qwen2")
    },
    "phi, grouped": ("phi", {"num_key_value_heads": 2}),
    "phi, tied": ("phi", {"tie_word_embeddings": True}),
    "gpt_neox, tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    "phi3, windows": ("phi3", {"sliding_window": 16}),
    "phi3, a part rotated": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gptj, wide": ("gptj", {"n_inner": None, "rotary_dim": 8, "tie_word_embeddings": True}),
    "codegen, eight heads": ("codegen", {"n_head": 8, "rotary_dim": 2}),
    "gpt2, wide": ("gpt2", {"n_inner": None, "tie_word_embeddings": True}),
    "gpt_bigcode, one head": ("gpt_bigcode", {"multi_query": True, "num_key_value_heads": 1}),
    "gpt_bigcode, grouped": ("gpt_bigcode", {"model_type": "kvfold_gpt_bigcode", "num_key_value_heads": 2}),
    "opt, no biases": ("opt", {"enable_bias": False, "tie_word_embeddings": True}),
    "falcon, tied": ("falcon", {"bias": True, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": True}),
    "falcon, wide": ("falcon", {"ffn_hidden_size": None}),
    "gemma, biases": ("gemma", {"attention_bias": True}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False, "sliding_window": 16}),
    "smollm3, windows": (
        "smollm3",
        {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 16, "mlp_bias": True},
    ),
    "smollm3, each second": ("smollm3", {"no_rope_layer_interval": 2, "attention_bias": True}),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 0.5}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5, "attention_bias": True}),
    "ministral, all windows": ("ministral", {"layer_types": None}),
    "ministral, window of full layers": ("ministral", {"layer_types": ["full_attention"] * 4}),
    "ministral3, window": ("ministral3", {"sliding_window": 16}),
    "seed_oss, other biases": (
        "seed_oss",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "arcee, biases": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "ernie4_5, biases": ("ernie4_5", {"use_bias": True}),
    "helium, biases": ("helium", {"attention_bias": True, "mlp_bias": True}),
    **{f"{name}, no biases": (name, {"attention_bias": False}) for name in ("glm", "glm4")},
    "cohere, biases": ("cohere", {"attention_bias": True, "head_dim": 16}),
    "cohere2, pattern": ("cohere2", {"sliding_window_pattern": 2, "attention_bias": True}),
    "olmo2, biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama, no head_dim": ("llama", {"head_dim": None}),
    "mistral": ("llama", {**MISTRAL, "num_key_value_heads": 2}),
    "mistral, mixed": (
        "llama",
        {**MISTRAL, "model_type": "kvfold_mistral", "per_layer_config": {"2": {"num_key_value_heads": 1}}},
    ),
    **{
        f"{name}, windows": (name, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3})
        for name in ("qwen2", "qwen3")
    },
    "qwen2, no window": ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
    "qwen3, layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3, biases": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "t5, grouped": ("t5", {**OUR_T5, "num_key_value_heads": 2, "cross_num_key_value_heads": 1}),
    "t5, mixed": ("t5", {**OUR_T5, "num_key_value_heads": [1, 2, 4, 2]}),
    "t5, untied": ("t5", {"tie_word_embeddings": False}),
    "t5, not gated": ("t5", {"feed_forward_proj": "relu", "d_kv": 16}),
    "t5, deep encoder": ("t5", {"num_layers": 6, "num_decoder_layers": 4}),
    "bart, grouped": ("bart", {**OUR_BART, "num_key_value_heads": 2, "cross_num_key_value_heads": [1, 2, 4, 2]}),
    "bart, uneven": ("bart", {"encoder_layers": 5, "decoder_layers": 3, "encoder_attention_heads": 2}),
    "bart, uneven MLPs": ("bart", {"decoder_ffn_dim": 40, "scale_embedding": True}),
    "bart, latent": ("bart", {**OUR_BART, "cross_latent_dim": 12, "cross_num_key_value_heads": 2}),
    "bart, the encoder's output": ("bart", {**OUR_BART, "cross_latent_dim": 32}),
    **PAIRED,
    **{
        f"{name}, grouped": (
            family,
            {**changes, "model_type": f"kvfold_{name}", "num_key_value_heads": [4, 2, 4, 1], **CROSS},
        )
        for name, (family, changes) in PAIRED.items()
    },
    "whisper, grouped": (
        "whisper",
        {"model_type": "kvfold_whisper", "self_num_key_value_heads": [4, 2, 4, 1], **CROSS},
    ),
    "whisper, latent": ("whisper", {"model_type": "kvfold_whisper", "cross_latent_dim": 12, **CROSS}),
    "umt5, latent": ("t5", {"model_type": "kvfold_umt5", "cross_latent_dim": 5, **CROSS}),
    "marian, latent": ("bart", {"model_type": "kvfold_marian", "cross_latent_dim": 5, **CROSS}),
    "t5, latent": ("t5", {**OUR_T5, "cross_latent_dim": 12, "cross_num_key_value_heads": [1, 2, 4, 2]}),
    "t5, the encoder's output": ("t5", {**OUR_T5, "cross_latent_dim": 32}),
    "t5gemma, grouped": ("t5gemma", {"decoder": {**GEMMA["decoder"], "num_key_value_heads": 2}}),
    "t5gemma, mixed": ("t5gemma", {**OUR_GEMMA, "num_key_value_heads": 2, "cross_num_key_value_heads": [1, 2, 4, 2]}),
    "t5gemma, wide encoder": ("t5gemma", {**WIDE, "tie_word_embeddings": False}),
    "t5gemma, wide heads": ("t5gemma", {"decoder": {**GEMMA["decoder"], "head_dim": 16, "attention_bias": True}}),
    "t5gemma, no caps": ("t5gemma", {"decoder": {**GEMMA["decoder"], "attn_logit_softcapping": None}}),
    "t5gemma, layer types": (
        "t5gemma",
        {"decoder": {**GEMMA["decoder"], "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}},
    ),
    "t5gemma, latent": ("t5gemma", {**OUR_GEMMA, **WIDE, "cross_latent_dim": 12, "num_key_value_heads": 2}),
    "t5gemma, the encoder's output": ("t5gemma", {**OUR_GEMMA, **WIDE, "cross_latent_dim": 48}),
    "mt5, latent": ("t5", {"model_type": "kvfold_mt5", "cross_latent_dim": 5, "num_decoder_layers": 2}),
}


def config_of(variant: str) -> dict[str, Any]:
    family, changes = VARIANTS[variant]
    return {**FAMILIES[family].tiny(), **changes}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shape_is_what_transformers_builds(variant: str) -> None:
    config = config_of(variant)
    family = family_of(config)
    assert family.name == VARIANTS[variant][0]
    shape = family.shape(config)
    model = hf.build(config, seed=0)
    tables = [name for name, each in model.named_modules() if "Sinusoidal" in type(each).__name__]  # are constants
    written = {name: each for name, each in model.named_parameters() if name.removesuffix(".weight") not in tables}
    assert shape.parameters == sum(parameter.numel() for parameter in written.values())
    assert shape.model_type == model.config.model_type.removeprefix("kvfold_").removeprefix("latent_")
    assert family.fields(shape)["model_type"] == model.config.to_dict()["model_type"]
    decoder = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
    most = getattr(decoder, "max_target_positions", 1 << 15)  # of a Whisper; T5 has no end
    assert shape.max_positions == getattr(decoder, "max_position_embeddings", most)
    saved = model.state_dict().keys()
    stored = [*model.named_parameters(), *((name, each) for name, each in model.named_buffers() if name in saved)]
    tensors = {name: tuple(tensor.shape) for name, tensor in stored}
    for site, attention in shape.sites.items():
        named = {name: family.form(attention, roles) for name, roles in family.stored(site, attention).items()}
        below = {name: form for name, form in tensors.items() if name.startswith(f"{family.module(site)}.")}
        assert named == below, f"the roles of {site} are not the parameters of {family.module(site)}"
        assert attention.parameters == sum(
            parameter.numel() for parameter in model.get_submodule(family.module(site)).parameters()
        )
    found = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    found = [name for name in found if ".vision_tower." not in name]
    modules = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    assert modules == {family.module(site) for site in shape.sites}
    if family.encoder_decoder:
        own = set(model.get_decoder().parameters())  # an embedding that both have is the decoder's
        read = (each for each in model.get_encoder().parameters() if each not in own)
        assert shape.encoder_parameters == sum(each.numel() for each in read if each in set(written.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_are_those_of_the_model(variant: str) -> None:
    config = config_of(variant)
    made = transformers.AutoConfig.for_model(**config)
    shape = family_of(config).shape(config)
    for site, attention in shape.sites.items():
        part = getattr(made, "encoder" if site.kind == "encoder" else "decoder", made.get_text_config())
        kinds = getattr(part, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if getattr(part, "sliding_window", None) else "full_attention"] * (
                site.layer + 1
            )
        windowed = kinds[site.layer] == "sliding_attention" and site.kind != "cross"
        assert attention.window == (part.sliding_window if windowed else None)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_predicted_cache_is_the_live_cache(variant: str) -> None:
    config = config_of(variant)
    shape = family_of(config).shape(config)
    predicted = grouped_cache(shape)
    model = hf.build(config, seed=0).eval()
    ids_BT = 1 + torch.arange(2 * 24).view(2, 24) % 90
    given: dict[str, Any] = {}
    name = "input_ids"
    if family_of(config).encoder_decoder:
        given, name = {"encoder_outputs": model.get_encoder()(**read(model, ids_BT[:, :11]))}, "decoder_input_ids"
    with torch.inference_mode():
        cache = model(**given, **{name: ids_BT[:, :23]}, use_cache=True).past_key_values
        model(**given, **{name: ids_BT[:, 23:]}, past_key_values=cache, use_cache=True)
    assert hf.live_cache_bytes(cache) == predicted.bytes(
        24, batch=2, itemsize=4, encoder_tokens=shape.encoder_positions or 11
    )


ONE_FIELD = [name for name in DECODERS if name != "gpt_bigcode"]  # which also says `multi_query`


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ONE_FIELD], ids=ONE_FIELD)
def test_a_student_of_the_same_architecture_is_said_by_its_fields(family: Family) -> None:
    config = family.tiny()
    shape = family.shape(config)
    fewer = {
        site: Attention(**{**vars(attention), "num_key_value_heads": 2}) for site, attention in shape.sites.items()
    }
    student = shape.with_sites(fewer)
    assert family.shape(config | family.fields(student)) == student
    assert family.fields(student) == family.fields(shape) | {"num_key_value_heads": 2}
    mixed = shape.with_sites({Site(0): fewer[Site(0)]})
    assert family.shape(config | family.fields(mixed)) == mixed
    assert family.fields(mixed) == {
        "model_type": f"kvfold_{config['model_type']}",
        "architectures": [f"Kvfold{config['architectures'][0]}"],
        "num_key_value_heads": 4,
        "per_layer_config": {"0": {"num_key_value_heads": 2}},
    }


def test_a_gpt_bigcode_is_stock_with_one_head_or_all() -> None:
    family, config = FAMILIES["gpt_bigcode"], FAMILIES["gpt_bigcode"].tiny()
    shape = family.shape(config)
    for heads, stock in ((1, True), (2, False), (4, True)):
        student = shape.with_sites(
            {site: replace(each, num_key_value_heads=heads) for site, each in shape.sites.items()}
        )
        fields = family.fields(student)
        assert fields["model_type"] == ("gpt_bigcode" if stock else "kvfold_gpt_bigcode")
        assert (fields["multi_query"], fields["num_key_value_heads"]) == (heads == 1, heads)
        assert family.shape(config | fields) == student
    mixed = shape.with_sites({Site(0): replace(shape.sites[Site(0)], num_key_value_heads=1)})
    assert family.fields(mixed)["per_layer_config"] == {"0": {"num_key_value_heads": 1}}
    assert family.shape(config | family.fields(mixed)) == mixed


def test_a_t5_with_shared_heads_is_an_architecture_of_ours() -> None:
    family, config = FAMILIES["t5"], FAMILIES["t5"].tiny()
    shape = family.shape(config)
    assert family.fields(shape) == {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    crossed = {site: replace(each, num_key_value_heads=1) for site, each in shape.sites.items() if site.kind == "cross"}
    student = shape.with_sites(crossed)
    assert family.fields(student) == {
        "model_type": "kvfold_t5",
        "architectures": ["KvfoldT5ForConditionalGeneration"],
        "num_key_value_heads": 4,
        "cross_num_key_value_heads": 1,
    }
    mixed = student.with_sites({Site(1): replace(shape.sites[Site(1)], num_key_value_heads=2)})
    assert family.fields(mixed)["num_key_value_heads"] == [4, 2, 4, 4]
    for made in (student, mixed):
        assert family.shape(config | family.fields(made)) == made


def test_heads_of_a_t5_keep_their_places_where_a_bias_of_positions_is_theirs() -> None:
    """Heads of a self-attention exchanged, with all that reads them: another model; of a cross-attention: the same."""
    family, model = FAMILIES["t5"], hf.build(FAMILIES["t5"].tiny(), seed=0, dtype="float64").eval()
    ids_BT = torch.arange(2 * 12).view(2, 12)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    order = torch.tensor([2, 0, 3, 1])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            found = model(input_ids=ids_BT, decoder_input_ids=ids_BT.flip(1)).logits
        assert isinstance(found, torch.Tensor)
        return found

    for kind in ("self", "cross"):
        before = logits()
        attention: Any = model.get_submodule(family.module(Site(2, kind)))
        for each in (attention.q, attention.k, attention.v):
            each.weight.data = each.weight.data.view(4, 8, -1)[order].flatten(0, 1)
        attention.o.weight.data = attention.o.weight.data.view(-1, 4, 8)[:, order].flatten(1)
        same = torch.allclose(logits(), before, rtol=0, atol=1e-9)
        assert same == (kind == "cross")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tiny_models_are_tiny_and_can_be_folded_twice(family: Family) -> None:
    shape = family.shape(family.tiny())
    assert shape.parameters < 100_000
    assert shape.num_layers >= 4
    assert {attention.num_key_value_heads for attention in shape.sites.values()} == {4}
    assert family.about
    assert family.tiny()["model_type"] in family.model_types


def test_only_families_know_where_a_model_keeps_its_parts() -> None:
    """Or a family whose parts have other names would fail somewhere else."""
    named = re.compile(r"\.(embed_tokens|self_attn|lm_head|final_layernorm)\b|base_model\.(layers|norm)\b")
    package = Path(kvfold.__file__).parent
    assert named.search("model.base_model.layers[0].self_attn")
    for path in package.rglob("*.py"):
        written = path.read_text(encoding="utf-8")
        if not re.search("embed_tokens|self_attn|lm_head|final_layernorm|base_model", written):
            continue
        code = ast.parse(written)
        docs = {id(node.value) for node in ast.walk(code) if isinstance(node, ast.Expr)}
        for node in ast.walk(code):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else getattr(node, "value", "")
            if isinstance(text, str) and id(node) not in docs and path.parent.name != "families":
                assert not named.search(text) or path.name == "family.py", f"{path}: {text}"


def test_a_model_type_belongs_to_one_family() -> None:
    named = [model_type for family in FAMILIES.values() for model_type in family.model_types]
    assert len(named) == len(set(named))
    assert set(FAMILIES) == {family.name for family in FAMILIES.values()}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": None}, "config.json has no model_type; is this a transformers checkpoint?"),
        ({"model_type": "qwen22"}, "architecture 'qwen22' is not supported; allowed: "),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the weights are quantised (gptq); folding needs the numbers that quantising threw away; convert the",
        ),
        (
            {"per_layer_config": {"1": {"num_key_value_heads": 2}}},
            "config.json: per_layer_config, and transformers builds all layers alike in llama; is its model_type kvf",
        ),
        (
            {"model_type": "kvfold_llama", "per_layer_config": {"1": {"num_key_value_heads": 2, "hidden_size": 8}}},
            "config.json: per_layer_config changes hidden_size of layer 1; allowed: num_key_value_heads",
        ),
        (
            {"model_type": "kvfold_llama", "per_layer_config": {"4": {"num_key_value_heads": 2}}},
            "config.json: per_layer_config of layer 4; allowed: 0 to 3",
        ),
        (
            {"model_type": "kvfold_llama", "per_layer_config": {"1": {"num_key_value_heads": 3}}},
            "config.json: 3 key/value heads do not divide 4 query heads",
        ),
        ({"num_key_value_heads": 3}, "config.json: 3 key/value heads do not divide 4 query heads"),
        ({"hidden_size": "32"}, "config.json: hidden_size must be a positive whole number (got '32')"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers must be a positive whole number (got 0)"),
        ({"vocab_size": True}, "config.json: vocab_size must be a positive whole number (got True)"),
    ],
)
def test_models_that_cannot_be_taken(changes: dict[str, Any], line: str) -> None:
    config = FAMILIES["llama"].tiny() | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config).shape(config)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"num_key_value_heads": 2},
            "config.json: num_key_value_heads, and transformers ignores it in t5; is its model_type kvfold_t5?",
        ),
        ({**OUR_T5, "num_key_value_heads": 3}, "config.json: 3 key/value heads do not divide 4 query heads"),
        (
            {**OUR_T5, "cross_num_key_value_heads": [2, 2]},
            "config.json: cross_num_key_value_heads has 2 numbers for 4 decoder layers",
        ),
        ({**OUR_T5, "num_key_value_heads": [2, 2, 2, 0]}, "config.json: num_key_value_heads must be a positive whole"),
        ({"model_type": "longt5"}, "architecture 'longt5' is not supported; allowed: "),
        (
            {"cross_latent_dim": 8},
            "config.json: cross_latent_dim, and transformers ignores it in t5; is its model_type kvfold_t5?",
        ),
        ({**OUR_T5, "cross_latent_dim": 33}, "config.json: cross_latent_dim is wider than the model (got 33); allowed"),
    ],
)
def test_t5s_that_cannot_be_taken(changes: dict[str, Any], line: str) -> None:
    config = FAMILIES["t5"].tiny() | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config).shape(config)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
        ("gemma", {"num_key_value_heads": None}, "num_key_value_heads must be a positive whole number (got None)"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier must be a number (got 0.0); allowed: 1e-06 to"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must have 4 numbers (got [1, 0])"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "layer_types must name 4 layers"),
        ("ministral", {"head_dim": None}, "head_dim must be a positive whole number (got None)"),
        ("ministral", {"sliding_window": None}, "sliding_window must be a positive whole number (got None)"),
        ("ministral3", {"rope_parameters": None}, "rope_parameters must be a part with settings of its own"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias must be false: no such model is known here (got True)"),
        ("helium", {"head_dim": 16}, "head_dim is not that of this architecture (got 16); allowed: 8"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm must be false: LayerNorms of q and k are not known here"),
        ("cohere", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1: this architecture rotates whole"),
        ("cohere2", {"sliding_window": None}, "sliding_window must be a positive whole number (got None)"),
    ],
    ids=str,
)
def test_rows_refuse_what_they_do_not_know(family: str, changes: dict[str, Any], line: str) -> None:
    config = FAMILIES[family].tiny() | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config).shape(config)
    assert str(caught.value).startswith(f"config.json: {line}")


@pytest.mark.parametrize(
    "family", ["gemma", "seed_oss", "ernie4_5", "glm", "smollm3", "cohere", "starcoder2", "helium"]
)
def test_what_a_row_leaves_unsaid_is_what_transformers_takes(family: str) -> None:
    """Head width, base and part of the rotation, biases, and whether the output projection is the embedding."""
    said = ("head_dim", "rope_parameters", "tie_word_embeddings", "attention_bias", "use_bias")
    config = {key: value for key, value in FAMILIES[family].tiny().items() if key not in said}
    config |= {"hidden_size": 512} if family == "helium" else {}
    found, made = family_of(config), transformers.AutoConfig.for_model(**config)
    attention = found.shape(config).sites[Site(0)]
    assert found.tied(config) is made.tie_word_embeddings
    assert attention.head_dim == (getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads)
    assert attention.rope is not None
    assert attention.rope.theta == made.rope_parameters["rope_theta"]
    part = made.rope_parameters.get("partial_rotary_factor", 1.0)
    assert attention.rope.dims == part * attention.head_dim
    model = hf.build(config, seed=0)
    assert found.shape(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_barts_that_cannot_be_taken() -> None:
    config = FAMILIES["bart"].tiny()
    for changes, line in (
        ({"num_key_value_heads": 2}, "config.json: num_key_value_heads, and transformers ignores it in bart; is its"),
        ({"tie_word_embeddings": False}, "config.json: tie_word_embeddings is false"),
        ({"model_type": "led"}, "architecture 'led' is not supported"),
        ({"model_type": "marian", "share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings must"),
        ({"model_type": "marian", "decoder_vocab_size": 90}, "decoder_vocab_size is another name of vocab_size and"),
    ):
        with pytest.raises(UnsupportedModel, match=line):
            family_of(config | changes).shape(config | changes)


def test_a_t5gemma_is_one_of_ours_only_where_its_attentions_differ() -> None:
    family, config = FAMILIES["t5gemma"], FAMILIES["t5gemma"].tiny()
    shape = family.shape(config)
    fewer = {site: replace(each, num_key_value_heads=2) for site, each in shape.sites.items() if site.kind != "encoder"}
    student = shape.with_sites(fewer)
    stock = {"model_type": "t5gemma", "architectures": ["T5GemmaForConditionalGeneration"]}
    assert family.fields(student) == {**stock, "decoder.num_key_value_heads": 2}
    crossed = shape.with_sites({site: each for site, each in fewer.items() if site.kind == "cross"})
    assert family.fields(crossed) == {
        "model_type": "kvfold_t5gemma",
        "architectures": ["KvfoldT5GemmaForConditionalGeneration"],
        "num_key_value_heads": 4,
        "cross_num_key_value_heads": 2,
        "decoder.num_key_value_heads": 4,
    }
    mixed = student.with_sites({Site(1): replace(fewer[Site(1)], num_key_value_heads=1)})
    assert family.fields(mixed)["num_key_value_heads"] == [2, 1, 2, 2]
    for made in (student, crossed, mixed):
        assert family.shape(with_fields(config, family.fields(made))) == made
    assert config == family.tiny()  # a part is not changed in its place


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decoder": None}, "config.json: decoder must be a part with settings of its own (got None)"),
        (
            {"is_encoder_decoder": False},
            "config.json: is_encoder_decoder must be true: an encoder alone caches nothing",
        ),
        (
            {"num_key_value_heads": 2},
            "config.json: num_key_value_heads, and transformers ignores it in t5gemma; is its",
        ),
        (
            {"encoder": {**GEMMA["encoder"], "vocab_size": 97}},
            "config.json: encoder and decoder have different vocabularies (got 97 and 96)",
        ),
        (
            {"decoder": {**GEMMA["decoder"], "num_key_value_heads": 3}},
            "config.json: decoder.num_key_value_heads 3 does not divide num_attention_heads 4",
        ),
        (
            {"decoder": {**GEMMA["decoder"], "layer_types": ["chunked_attention"] * 4}},
            "config.json: decoder.layer_types must name 4 layers (got ['chunked_attention', ",
        ),
        (
            {"decoder": {**GEMMA["decoder"], "layer_types": ["full_attention"]}},
            "config.json: decoder.layer_types must name 4",
        ),
        (
            {
                **OUR_GEMMA,
                "cross_num_key_value_heads": [2, 4, 2, 2],
                "decoder": {**GEMMA["decoder"], "num_key_value_heads": 2},
            },
            "config.json: cross_num_key_value_heads cannot be more than the decoder's (got 4); allowed: 2",
        ),
        ({"model_type": "t5gemma2"}, "architecture 't5gemma2' is not supported; allowed: "),
    ],
    ids=str,
)
def test_t5gemmas_that_cannot_be_taken(changes: dict[str, Any], line: str) -> None:
    config = GEMMA | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config).shape(config)
    assert str(caught.value).startswith(line)


def test_what_a_t5gemma_leaves_unsaid_is_what_transformers_takes() -> None:
    said = ("head_dim", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "rope_parameters")
    parts = {
        part: {key: value for key, value in GEMMA[part].items() if key not in said} for part in ("encoder", "decoder")
    }
    config = {key: value for key, value in GEMMA.items() if key != "tie_word_embeddings"} | parts
    family, made = family_of(config), transformers.AutoConfig.for_model(**config)
    shape, decoder = family.shape(config), made.decoder
    assert family.tied(config) is made.tie_word_embeddings
    for layer, kind in enumerate(decoder.layer_types):
        own = shape.sites[Site(layer)]
        assert own.window == (decoder.sliding_window if kind == "sliding_attention" else None)
        assert own.scale == decoder.query_pre_attn_scalar**-0.5
        assert (own.head_dim, own.softcap) == (decoder.head_dim, decoder.attn_logit_softcapping)
        assert own.rope is not None
        assert own.rope.theta == decoder.rope_parameters["rope_theta"]


def test_a_qwen3_that_does_not_say_has_heads_of_128() -> None:
    config = FAMILIES["qwen3"].tiny()
    del config["head_dim"]
    (form,) = {attention.roles()["k_norm"] for attention in FAMILIES["qwen3"].shape(config).sites.values()}
    assert form == hf.build(config, seed=0).get_parameter("model.layers.0.self_attn.k_norm.weight").shape == (128,)


@torch.inference_mode()
def test_a_falcon_of_transformers_caches_each_head_as_often_as_it_is_read() -> None:
    """More than its config.json says: engines and its students, which are Phi, cache each head once."""
    config = FAMILIES["falcon"].tiny() | {"num_kv_heads": 2}
    shape, model = FAMILIES["falcon"].shape(config), hf.build(config, seed=0).eval()
    assert {attention.num_key_value_heads for attention in shape.sites.values()} == {2}
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    cache = model(torch.arange(48).view(2, 24), use_cache=True).past_key_values
    assert hf.live_cache_bytes(cache) == 2 * grouped_cache(shape).bytes(24, batch=2, itemsize=4)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("gptj", {"num_key_value_heads": 2}, "num_key_value_heads must be absent: transformers ignores it in this"),
        ("gptj", {"n_embd": 30}, "n_head 4 does not divide n_embd 30"),
        ("gptj", {"rotary_dim": 16}, "rotary_dim is more than a head has (got 16); allowed: up to 8"),
        ("gptj", {"rotary_dim": None}, "rotary_dim must be a whole number (got None)"),
        ("gptj", {"hidden_size": 64}, "hidden_size is another name of n_embd and has another value (got 64)"),
        ("gptj", {"rope_theta": 5e5}, "rope_theta must be absent: transformers ignores it in this architecture"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be false"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be false"),
        (
            "gpt_bigcode",
            {"num_key_value_heads": 2},
            "num_key_value_heads is not what multi_query says (got 2); allowed: 4",
        ),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before must be true"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is not hidden_size (got 16); allowed: 32"),
        ("codegen", {"n_head": 2}, "n_head does not divide into 4 blocks (got 2)"),
        ("falcon", {"new_decoder_architecture": False}, "new_decoder_architecture must be true: the older layouts"),
        ("falcon", {"alibi": True}, "alibi must be false"),
        ("falcon", {"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_attention_heads 4"),
        ("phi3", {"attention_bias": True}, "attention_bias must be false: this architecture has no biases"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type is not one of this architecture (got yarn); allowed: default, longrope",
        ),
    ],
)
def test_packed_decoders_that_cannot_be_taken(family: str, changes: dict[str, Any], line: str) -> None:
    config = FAMILIES[family].tiny() | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config)
    assert str(caught.value).startswith(f"config.json: {line}")


def test_rotation_is_read_from_old_and_new_configs() -> None:
    config = FAMILIES["llama"].tiny()
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = config | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = config | {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    for given in (old, new):
        rope = family_of(given).shape(given).sites[Site(0)].rope
        assert rope is not None
        assert (rope.theta, rope.dims, rope.half_split) == (5e5, 8, True)
        assert rope.scaling is not None
        assert rope.scaling["factor"] == 8.0
