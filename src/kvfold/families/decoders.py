"""Decoders with q, k, v and o apart that differ from llama in a few facts each: one row a family.

The facts are those of `modeling_*.py` in transformers. A field of config.json that changes the attention or its
surroundings has a rule, and a default where transformers has one.
"""

from __future__ import annotations

from dataclasses import replace

from kvfold.contracts.config import (
    EPSILON,
    HEADS,
    LAYERS,
    POSITIONS,
    SHARE,
    WIDTH,
    YES_NO,
    Fields,
    Rule,
    Rules,
    decimal,
    number,
    only,
    whole,
)
from kvfold.contracts.family import Body, Json
from kvfold.families._decoder import BODY, FACTOR, Layout, check_head_dim, decoder

NO = only(False, "false: no such model is known here")
SCALE = decimal(1e-6, 1e6)
BIASES: Rules = dict.fromkeys(("attention_bias", "mlp_bias"), YES_NO)
GROUPS: Rules = {"num_key_value_heads": HEADS.needed, "head_dim": WIDTH}  # where transformers has defaults of its own
PLAIN = {"up": "mlp.up_proj", "act": "mlp.act_fn", "down": "mlp.down_proj"}
SLIDING, FULL = "sliding_attention", "full_attention"


def _biased(config: Json, **facts: object) -> Layout:
    """A layout with the biases of `attention_bias` and `mlp_bias`."""
    biases = "qkvo" if config.get("attention_bias") else ""
    return replace(Layout(biases=biases, mlp_biases=bool(config.get("mlp_bias"))), **facts)  # type: ignore[arg-type]


# --- windows and layers without rotation ----------------------------------------------------------------------------


def _kinds(config: Json, window: int | None, default: list[str]) -> dict[str, object]:
    """Windows by layer type, and the types that layers may have: fields of a `Layout`."""
    kinds = config.get("layer_types") or default
    return {
        "windows": [window if kind == SLIDING else None for kind in kinds],
        "kinds": (FULL,) if window is None else (FULL, SLIDING),
    }


def _windowed(config: Json, default: int | None) -> dict[str, object]:
    """The windows of layers that all have one, where config.json names no types."""
    window = config.get("sliding_window", default)
    return _kinds(config, window, [FULL if window is None else SLIDING] * config["num_hidden_layers"])


def _smollm3(config: Json) -> Layout:
    """Every fourth layer is not rotated; those may have windows."""
    layers, every = range(config["num_hidden_layers"]), config.get("no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in layers]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = _kinds(config, window, [FULL if window is None or rotates[layer] else SLIDING for layer in layers])
    rotations: list[Json | None] = [{} if rotates[layer] else None for layer in layers]
    return _biased(config, rotations=rotations, theta=2e6, **kinds)


def _check_smollm3(fields: Fields) -> None:
    rotates, layers = fields.get("no_rope_layers"), fields.config["num_hidden_layers"]
    if rotates is not None and len(rotates) < layers:
        raise fields.refusal(f"no_rope_layers must have {layers} numbers", got=repr(rotates))


def _cohere2(config: Json) -> Layout:
    """Layers with a window are rotated, those without are not."""
    layers, every = range(config["num_hidden_layers"]), config.get("sliding_window_pattern", 4)
    kinds = config.get("layer_types") or [SLIDING if (layer + 1) % every else FULL for layer in layers]
    rotations: list[Json | None] = [{} if kind == SLIDING else None for kind in kinds]
    facts = _kinds(config, config.get("sliding_window", 4096), kinds)
    return _biased(config, half_split=False, rotations=rotations, vectors=1, last=1, **facts)


def _check_ministral3(fields: Fields) -> None:
    """Queries are multiplied by 1 up to the positions before scaling, and a repair reads no row beyond these."""
    before = {"original_max_position_embeddings": whole(4096, (1 << 31) - 1).needed}
    fields.inside("rope_parameters").check({"llama_4_scaling_beta": number(0, 1e3).needed, **before})


FAMILIES = (
    decoder(
        "gemma",
        "Gemma (scaled embeddings, heads wider than the model)",
        "gemma",
        examples=("google/gemma-7b", "google/gemma-2b"),
        rules={**GROUPS, "attention_bias": YES_NO, "use_bidirectional_attention": NO.or_null},
        layout=lambda config: _biased(config, head_dim=256, norm_offset=1.0),
        ties=True,
        tiny={"head_dim": 16},
    ),
    decoder(
        "granite",
        "Granite 3 (factors of embeddings, logits and residuals)",
        "granite",
        examples=("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
        rules={
            **{**BIASES, "head_dim": WIDTH},
            **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), FACTOR),
            "attention_multiplier": FACTOR,
        },
        layout=lambda config: _biased(config, scale=float(config.get("attention_multiplier", 1.0))),
        body=replace(BODY, residual="residual_multiplier"),
        tiny={
            "embedding_multiplier": 2.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    decoder(
        "starcoder2",
        "StarCoder2 (LayerNorms, biases, an MLP without a gate)",
        "starcoder2",
        examples=("bigcode/starcoder2-3b", "bigcode/starcoder2-15b"),
        rules={
            **{**GROUPS, "norm_epsilon": EPSILON, "use_bias": YES_NO, "sliding_window": POSITIONS.or_null},
            **dict.fromkeys(("residual_dropout", "embedding_dropout"), SHARE),
        },
        layout=lambda config: Layout(
            biases="qkvo" if config.get("use_bias", True) else "",
            gated=False,
            mlp_biases=config.get("use_bias", True),
            vectors=4,
            last=2,
            **_windowed(config, None),  # type: ignore[arg-type]
        ),
        ties=True,
        body=Body(mlp={"up": "mlp.c_fc", "act": "mlp.act", "down": "mlp.c_proj"}),
        tiny={"hidden_act": "gelu_pytorch_tanh"},
    ),
    decoder(
        "smollm3",
        "SmolLM3 (every fourth layer is not rotated)",
        "smollm3",
        examples=("HuggingFaceTB/SmolLM3-3B",),
        rules={
            **{**BIASES, **GROUPS, "use_sliding_window": YES_NO, "sliding_window": POSITIONS.or_null},
            "no_rope_layer_interval": whole(1, 1 << 20),
            "no_rope_layers": Rule(list[int], "a list of numbers, 0 for a layer that is not rotated").or_null,
        },
        check=_check_smollm3,
        layout=_smollm3,
        ties=True,
    ),
    decoder(
        "olmo",
        "OLMo (LayerNorms without weights; q, k and v may be clipped)",
        "olmo",
        examples=("allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf"),
        rules={"attention_bias": YES_NO, "head_dim": WIDTH, "clip_qkv": decimal(1e-6, 1e6).or_null},
        layout=lambda config: _biased(config, vectors=0, last=0),
    ),
    decoder(
        "ministral",
        "Ministral (windows by layer type)",
        "ministral",
        examples=("mistralai/Ministral-8B-Instruct-2410",),
        rules={
            "num_key_value_heads": HEADS.needed,
            "head_dim": WIDTH.needed,
            "sliding_window": POSITIONS,
        },
        layout=lambda config: Layout(**_windowed(config, 4096)),  # type: ignore[arg-type]
        tiny={"sliding_window": 16, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    ),
    decoder(
        "ministral3",
        "Ministral 3 (queries grow beyond the positions before scaling)",
        "ministral3",
        rules={**GROUPS, "sliding_window": POSITIONS.or_null},
        check=_check_ministral3,
        layout=lambda config: Layout(head_dim=128, **_windowed(config, None)),  # type: ignore[arg-type]
        tiny={
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0},
                **{"original_max_position_embeddings": 4096, "llama_4_scaling_beta": 0.1},
            }
        },
    ),
    decoder(
        "seed_oss",
        "Seed-OSS (biases on q, k and v)",
        "seed_oss",
        examples=("ByteDance-Seed/Seed-OSS-36B-Instruct",),
        rules={**BIASES, **GROUPS, "attention_out_bias": YES_NO, "residual_dropout": SHARE, "pretraining_tp": LAYERS},
        layout=lambda config: Layout(
            biases="qkv" * config.get("attention_bias", True) + "o" * config.get("attention_out_bias", False),
            mlp_biases=config.get("mlp_bias", False),
            head_dim=128,
        ),
        tiny={"attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    decoder(
        "arcee",
        "Arcee AFM (squared ReLU, no gate)",
        "arcee",
        examples=("arcee-ai/AFM-4.5B",),
        rules=BIASES,
        check=lambda fields: fields.check_divides("num_attention_heads", "hidden_size"),
        layout=lambda config: _biased(config, gated=False),
        body=Body(mlp=PLAIN),
        tiny={"hidden_act": "relu2"},
    ),
    decoder(
        "internlm3",
        "InternLM3 (a Llama of another name)",
        "internlm3",
        examples=("internlm/internlm3-8b-instruct",),
        rules={**GROUPS, **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "bias"), NO)},
        check=lambda fields: fields.check_divides("num_attention_heads", "hidden_size"),
        layout=lambda config: Layout(head_dim=128),
        aliases=("InternLM3ForCausalLM",),
    ),
    decoder(
        "ernie4_5",
        "ERNIE 4.5, dense (neighbouring coordinates rotate together)",
        "ernie4_5",
        examples=("baidu/ERNIE-4.5-0.3B-PT",),
        rules={**GROUPS, "use_bias": YES_NO},
        layout=lambda config: Layout(
            biases="qkvo" if config.get("use_bias") else "",
            mlp_biases=bool(config.get("use_bias")),
            head_dim=128,
            theta=5e5,
            half_split=False,
        ),
        ties=True,
    ),
    decoder(
        "helium",
        "Helium (neighbouring coordinates rotate together)",
        "helium",
        examples=("kyutai/helium-1-2b",),
        rules={**BIASES, **GROUPS},
        check=check_head_dim,
        layout=lambda config: replace(
            _biased(config, head_dim=128, theta=1e5, half_split=False),
            biases="qkv" if config.get("attention_bias") else "",
        ),
    ),
    decoder(
        "glm",
        "GLM-4 9B (half of each head rotated, neighbouring coordinates together)",
        "glm",
        examples=("zai-org/glm-4-9b-chat-hf",),
        rules={**GROUPS, "attention_bias": YES_NO},
        layout=lambda config: Layout(
            biases="qkv" if config.get("attention_bias", True) else "", head_dim=128, rotated=0.5, half_split=False
        ),
        body=replace(BODY, mlp={}),
    ),
    decoder(
        "glm4",
        "GLM-4-0414 (as glm, with norms behind attention and MLP too)",
        "glm4",
        examples=("zai-org/GLM-4-9B-0414", "zai-org/GLM-4-32B-0414"),
        rules={**GROUPS, "attention_bias": YES_NO},
        layout=lambda config: Layout(
            biases="qkv" if config.get("attention_bias", True) else "",
            head_dim=128,
            rotated=0.5,
            half_split=False,
            vectors=4,
        ),
        body=replace(BODY, mlp={}, after={"self": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}),
    ),
    decoder(
        "cohere",
        "Command R (attention and MLP side by side, neighbouring coordinates rotate together)",
        "cohere",
        examples=("CohereForAI/c4ai-command-r-v01",),
        rules={
            "attention_bias": YES_NO,
            "head_dim": WIDTH,
            "layer_norm_eps": EPSILON,
            "logit_scale": SCALE,
            "use_qk_norm": only(False, "false: LayerNorms of q and k are not known here"),
        },
        layout=lambda config: _biased(config, theta=5e5, half_split=False, vectors=1, last=1),
        ties=True,
    ),
    decoder(
        "cohere2",
        "Command R7B, Command A (as cohere; layers without a window are not rotated)",
        "cohere2",
        examples=("CohereForAI/c4ai-command-r7b-12-2024", "CohereForAI/c4ai-command-a-03-2025"),
        rules={
            **{"attention_bias": YES_NO, "head_dim": WIDTH, "layer_norm_eps": EPSILON, "logit_scale": SCALE},
            **{"sliding_window": POSITIONS, "sliding_window_pattern": whole(1, 1 << 20)},
        },
        check=check_head_dim,
        layout=_cohere2,
        ties=True,
        tiny={"sliding_window": 16},
    ),
)
