"""What the decoder families share: q, k, v and o apart, half-split rotation, RMS norms, a gated MLP.

A model whose layers all have as many key/value heads, and each its own, is of its source's own `model_type`. One whose
layers differ or share says so with transformers' own fields, `per_layer_config` and `kv_source_layers`, under a
`model_type` of ours (`kvfold_llama`): the stock classes build every layer alike, and `kvfold.hf` has those that do not.
One with latent keys and values is a `kvfold_latent_llama`, one with linear attention a `kvfold_linear_llama`.
`Shape.model_type` is the stock architecture for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

from kvfold.contracts.config import (
    ACTIVATION,
    EPSILON,
    HEADS,
    LAYERS,
    POSITIONS,
    SHARE,
    TEXTS,
    VOCABULARY,
    WHOLES,
    WIDTH,
    YES_NO,
    Fields,
    Rule,
    Rules,
    check_parts,
    check_rope,
    check_tokens,
    decimal,
    one_of,
    only,
    whole,
)
from kvfold.contracts.family import Body, Json, own_type, stock_type
from kvfold.contracts.runtimes import with_latent, with_linear
from kvfold.contracts.site import Attention, Linear, Rope, Shape, Site
from kvfold.errors import UnsupportedModel

TENSORS = {
    **{role: f"{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"{role}_proj.bias" for role in "qkvo"},
    **{f"{role}_norm": f"{role}_norm.weight" for role in "qk"},
    "k_rope_bias": "k_rope.bias",  # of latent attention; its other roles are named after themselves
    "v_up_bias": "v_up.bias",
    "planes": "planes",
    "phi_bias": "phi.bias",  # of linear attention
    "window_gate": "window_gate",
}

GATED = {**{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}, "act": "mlp.act_fn"}
BODY = Body(mlp=GATED)

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2"}
"""Stock model types that can have layers of their own, and what transformers' classes for them begin with."""

LATENT = frozenset({"llama", "mistral", "qwen2"})
"""Those of them that can have latent keys and values: no norm stands between a key and its latent."""

LINEAR = frozenset({"llama", "mistral", "qwen2", "qwen3", "olmo2"})
"""Those of them that can have linear attention."""

LINEAR_LAYER = "kvfold_linear"
"""What `layer_types` of config.json calls a layer of linear attention, and transformers' caches its cache layer."""

_HEADS = "num_key_value_heads"
_SOURCES = "kv_source_layers"
_TYPES, _SETTINGS = "layer_types", "linear_attention"
OURS = ("per_layer_config", _SOURCES, _TYPES, _SETTINGS)
"""What config.json says of a model type of ours beyond what it says of a stock one."""

_PLANES, _WIDTHS = "rope_chunks", "latent_dims"


DECODER: Rules = {
    "hidden_size": WIDTH.needed,
    "num_attention_heads": HEADS.needed,
    "num_hidden_layers": LAYERS.needed,
    "intermediate_size": WIDTH.needed,
    "vocab_size": VOCABULARY.needed,
    "head_dim": WIDTH.or_null,
    "max_position_embeddings": POSITIONS,
    "hidden_act": ACTIVATION,
    "rms_norm_eps": EPSILON,
    "initializer_range": decimal(0, 1),
    "attention_dropout": SHARE,
    "is_encoder_decoder": only(False, "false"),
    _TYPES: TEXTS.or_null,
    "mlp_layer_types": TEXTS.or_null,
    "per_layer_config": Rule(dict[str, dict[str, Any]], "a mapping of layers to fields").or_null,
    _SOURCES: WHOLES.or_null,
    _PLANES: WHOLES.or_null,
    _WIDTHS: WHOLES.or_null,
    _SETTINGS: Rule(dict[str, Any], "a mapping").or_null,
}
"""What the fields of every decoder of this layout may be."""

QWEN: Rules = {
    "num_key_value_heads": HEADS.needed,
    "use_sliding_window": YES_NO,
    "sliding_window": POSITIONS.or_null,
    "max_window_layers": whole(0, 1 << 20),
}
"""And those of a Qwen."""

_LINEAR_PARTS: Rules = {
    "features": one_of("relu", "hedgehog", "none").needed,
    "feature_dim": whole(0, 1 << 16).needed,
    "rope": one_of("before", "after").needed,
    "norm": one_of("groupnorm", "denominator").needed,
    "decay": one_of("none", "slopes", "retnet").needed,
    "window": whole(0, 1 << 31).needed,
    "sinks": whole(0, 1 << 31).needed,
}


def check_decoder(
    fields: Fields, rules: Rules, kinds: Collection[str], window: int | None = None, head_dim: int | None = None
) -> None:
    """Check a config.json of this layout: its own rules, the layers that it may name, and the rotation of its heads.

    `kinds` are the types of layer that the architecture can have here; `head_dim` is that of one that does not say.
    """
    fields.check({**DECODER, **rules})
    check_parts(fields)
    check_tokens(fields, fields.config["vocab_size"])
    width = fields.get("head_dim", head_dim)
    if width is None:
        fields.check_divides("num_attention_heads", "hidden_size")
        width = fields.config["hidden_size"] // fields.config["num_attention_heads"]
    check_rope(fields, width)
    linear = fields.config["model_type"] in map(linear_type, LINEAR)
    _check_layers(fields, {"full_attention", LINEAR_LAYER} if linear else kinds)
    if linear:
        if window is not None:
            raise fields.refusal("sliding_window bounds the cache of layers that are linear", next="set it to null")
        _check_linear(fields.inside(_SETTINGS), width)
    if fields.config["model_type"] in map(latent_type, LATENT):
        for planes in fields.config.get(_PLANES) or ():
            if planes > width // 2:
                raise fields.refusal(f"{_PLANES} must not be above {width // 2}", got=planes)


def check_qwen(fields: Fields, rules: Rules, head_dim: int | None = None) -> None:
    """Check a config.json of a Qwen: its upper layers may have windows."""
    fields.check(rules)  # before the window is looked at
    window = fields.config.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    kinds = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    sliding = any(each is not None for each in upper_windows(fields.config)) if window is not None else False
    check_decoder(fields, rules, kinds, window if sliding else None, head_dim)


def _check_layers(fields: Fields, kinds: Collection[str]) -> None:
    """Check the names of layers, where config.json has them."""
    layers = fields.config["num_hidden_layers"]
    for name, known in ((_TYPES, kinds), ("mlp_layer_types", ("dense",))):
        said = fields.get(name)
        if said is not None and (len(said) != layers or set(said) - set(known)):
            raise fields.refusal(f"{name} must name {layers} layers", got=repr(said), allowed=", ".join(sorted(known)))


def _check_linear(fields: Fields, head_dim: int) -> None:
    """Check the settings of linear attention, and that they go together."""
    fields.check(_LINEAR_PARTS)
    said = fields.config
    features, width, window = said["features"], said["feature_dim"], said["window"]
    problem = None
    if (features == "none") != (width == 0):
        problem = f"feature_dim {width} cannot be of features {features}"
    elif features == "hedgehog" and width % 2:
        problem = f"feature_dim {width} is odd, and hedgehog takes both signs of each number"
    elif (features == "none" or said["sinks"]) and not window:
        problem = "features none and sinks need a window, and window is 0"
    elif features != "none" and said["norm"] == "groupnorm" and window:
        problem = f"norm groupnorm has no denominator that a window of {window} could share"
    elif features != "none" and said["rope"] == "after" and said["norm"] == "denominator":
        problem = "norm denominator needs positive scores, and with rope after features they have either sign"
    elif features != "none" and said["rope"] == "after" and width != head_dim:
        problem = f"feature_dim {width} cannot be rotated as heads of {head_dim} are"
    if problem:
        raise fields.refusal(problem)


def latent_type(model_type: str) -> str:
    """The model type of ours for a stock architecture with latent keys and values."""
    return own_type(f"latent_{model_type}")


def linear_type(model_type: str) -> str:
    """The model type of ours for a stock architecture with linear attention."""
    return own_type(f"linear_{model_type}")


def architectures(*model_types: str) -> dict[str, str]:
    """The classes of stock model types, and of those of ours that go with them."""
    end = "ForCausalLM"
    return {
        **{each: f"{CLASSES[each]}{end}" for each in model_types},
        **{own_type(each): f"Kvfold{CLASSES[each]}{end}" for each in model_types},
        **{latent_type(each): f"KvfoldLatent{CLASSES[each]}{end}" for each in model_types if each in LATENT},
        **{linear_type(each): f"KvfoldLinear{CLASSES[each]}{end}" for each in model_types if each in LINEAR},
    }


def number(config: Json, name: str) -> int:
    """A positive whole number that config.json must state."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {name} must be a positive whole number", got=repr(value))
    return value


def decoder_shape(
    config: Json,
    family: str,
    *,
    biases: frozenset[str],
    mlp_biases: bool,
    windows: Sequence[int | None],
    norms: Literal["none", "pre_rope", "all_heads"] = "none",
) -> Shape:
    """Shape of a decoder of this layout: rotary, RMS-normed, with a gated MLP."""
    hidden, heads, layers = (
        number(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = config.get("head_dim") or hidden // heads
    rope = rope_of(config, head_dim)
    counts = _kv_heads(config, heads, layers)
    sources = _sources(config, counts, windows)
    sites = {
        Site(layer): Attention(
            hidden, heads, counts[layer], head_dim, biases, norms, rope, windows[layer], source=sources[layer]
        )
        for layer in range(layers)
    }
    if config["model_type"] in map(latent_type, LATENT):
        splits = zip(_per_layer(config, _PLANES, layers), _per_layer(config, _WIDTHS, layers), strict=True)
        sites = {
            site: with_latent(attention, *split) for (site, attention), split in zip(sites.items(), splits, strict=True)
        }
    if config["model_type"] in map(linear_type, LINEAR):
        linear, kinds = _linear(config), config.get(_TYPES) or [LINEAR_LAYER] * layers
        sites = {
            site: with_linear(attention, linear) if kinds[site.layer] == LINEAR_LAYER else attention
            for site, attention in sites.items()
        }
    vocab, mlp = number(config, "vocab_size"), number(config, "intermediate_size")
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
    per_layer = 3 * hidden * mlp + 2 * hidden + (2 * mlp + hidden if mlp_biases else 0)
    attention = sum(site.parameters for site in sites.values())
    return Shape(
        family=family,
        model_type=stock_type(config),
        sites=sites,
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=layers,
        parameters=embeddings + hidden + layers * per_layer + attention,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        max_positions=int(config.get("max_position_embeddings") or 2048),
    )


_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of RoPE scaling that transformers knows, and what it must find in config.json for each."""

_ROPE_PRETRAINED = "original_max_position_embeddings"


def rope_of(config: Json, head_dim: int) -> Rope:
    """The rotation that config.json states, in the words of new and of old versions of transformers.

    What is left out is what transformers takes: the positions of pre-training are the model's own. Raises
    UnsupportedModel for kinds that transformers does not know, and for those that lack what they need.
    """
    # the older name goes first, as in transformers
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rotated = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise UnsupportedModel(
            f"config.json: RoPE scaling {kind!r} is not known to transformers",
            allowed=", ".join(_ROPE_NEEDS),
            next='"su" is the older name of longrope: write "rope_type": "longrope"' if kind == "su" else None,
        )
    if missing := [name for name in _ROPE_NEEDS[kind] if name not in parameters]:
        raise UnsupportedModel(f"config.json: RoPE scaling {kind} has no {', '.join(missing)}")
    if kind in ("llama3", "yarn", "longrope"):
        positions = int(config.get("max_position_embeddings") or 2048)
        outside = config.get(_ROPE_PRETRAINED)
        parameters[_ROPE_PRETRAINED] = outside or parameters.get(_ROPE_PRETRAINED) or positions
        if kind == "yarn" and parameters["factor"] is None:
            parameters["factor"] = positions / parameters[_ROPE_PRETRAINED]
    return Rope(rotated, theta, scaling=parameters or None)


def _kv_heads(config: Json, heads: int, layers: int) -> list[int]:
    """Key/value heads of each layer. Raises UnsupportedModel for a `per_layer_config` that says anything else."""
    found = [config.get(_HEADS) or heads] * layers
    overrides = config.get("per_layer_config") or {}
    if overrides and config["model_type"] not in map(own_type, CLASSES):
        raise UnsupportedModel(
            f"config.json: per_layer_config, and transformers builds every layer of {config['model_type']} alike",
            next=f"is its model_type {own_type(config['model_type'])}?",
        )
    for layer, changes in overrides.items():
        if not str(layer).isdecimal() or int(layer) >= layers:
            raise UnsupportedModel(f"config.json: per_layer_config of layer {layer}", allowed=f"0 to {layers - 1}")
        if other := sorted(set(changes) - {_HEADS}):
            raise UnsupportedModel(
                f"config.json: per_layer_config changes {', '.join(other)} of layer {layer}", allowed=_HEADS
            )
        found[int(layer)] = number(changes, _HEADS)
    for kv_heads in sorted(set(found)):
        if heads % kv_heads:
            raise UnsupportedModel(f"config.json: {kv_heads} key/value heads do not divide {heads} query heads")
    return found


def _per_layer(config: Json, name: str, layers: int) -> list[int]:
    """A list of positive whole numbers in config.json, one for each layer."""
    values = config.get(name)
    if not isinstance(values, list) or len(values) != layers:
        raise UnsupportedModel(f"config.json: {name} must be a list of {layers} numbers", got=repr(values))
    return [number({name: value}, name) for value in values]


def _linear(config: Json) -> Linear:
    """The settings of linear attention in config.json. Raises UnsupportedModel when they are not all there."""
    said = config.get(_SETTINGS)
    names = {each.name for each in fields(Linear)}
    if not isinstance(said, dict) or set(said) != names:
        raise UnsupportedModel(
            f"config.json: {_SETTINGS} must say {', '.join(sorted(names))} and nothing else", got=repr(said)
        )
    return Linear(**said)


def _sources(config: Json, heads: Sequence[int], windows: Sequence[int | None]) -> list[int | None]:
    """The layer whose keys and values each layer reads, None for its own.

    Raises UnsupportedModel for what cannot be.
    """
    said = config.get(_SOURCES)
    if said is None:
        return [None] * len(heads)
    if config["model_type"] not in map(own_type, CLASSES):
        raise UnsupportedModel(f"config.json: {_SOURCES}, and {config['model_type']} has no layers that share")
    if not isinstance(said, list) or len(said) != len(heads):
        raise UnsupportedModel(f"config.json: {_SOURCES} must name a layer for each of {len(heads)}", got=repr(said))
    for layer, source in enumerate(said):
        if not isinstance(source, int) or not 0 <= source <= layer or said[source] != source:
            raise UnsupportedModel(f"config.json: layer {layer} cannot read keys and values of layer {source!r}")
        if (heads[layer], windows[layer]) != (heads[source], windows[source]):
            raise UnsupportedModel(
                f"config.json: layer {layer} reads keys and values of layer {source}, "
                "and differs from it in key/value heads or window"
            )
    return [None if source == layer else source for layer, source in enumerate(said)]


def heads_fields(shape: Shape) -> dict[str, Any]:
    """What config.json says of the attentions, architecture included.

    Key/value heads are one number, or one for each layer: where layers differ, the commonest number is everyone's (the
    larger of two), and `per_layer_config` has the rest. Where layers share, `kv_source_layers` names the owners. Of
    latent attention it says what each layer keeps, of linear attention which layers have it, and its settings.
    """
    linear = next((attention.linear for attention in shape.sites.values() if attention.linear is not None), None)
    if linear is not None:
        return {
            "model_type": linear_type(shape.model_type),
            "architectures": [f"KvfoldLinear{CLASSES[shape.model_type]}ForCausalLM"],
            _HEADS: next(iter(shape.sites.values())).num_key_value_heads,
            _TYPES: ["full_attention" if each.linear is None else LINEAR_LAYER for each in shape.sites.values()],
            _SETTINGS: asdict(linear),
        }
    kept = [attention.kept for attention in shape.sites.values() if attention.kept is not None]
    if kept:
        groups = next(iter(shape.sites.values())).num_key_value_heads
        return {
            "model_type": latent_type(shape.model_type),
            "architectures": [f"KvfoldLatent{CLASSES[shape.model_type]}ForCausalLM"],
            _HEADS: groups,
            _PLANES: [each["rotated"] // (2 * groups) for each in kept],
            _WIDTHS: [each["latent"] for each in kept],
        }
    heads = {site.layer: attention.num_key_value_heads for site, attention in shape.sites.items()}
    times = Counter(heads.values())
    common = max(times, key=lambda count: (times[count], count))
    name = f"{CLASSES[shape.model_type]}ForCausalLM"
    if len(times) == 1 and not shape.owners:
        return {"model_type": shape.model_type, "architectures": [name], _HEADS: common}
    fields: dict[str, Any] = {
        "model_type": own_type(shape.model_type),
        "architectures": [f"Kvfold{name}"],
        _HEADS: common,
    }
    if len(times) > 1:
        fields["per_layer_config"] = {str(n): {_HEADS: count} for n, count in heads.items() if count != common}
    if shape.owners:
        sources = {site.layer: attention.source for site, attention in shape.sites.items()}
        fields[_SOURCES] = [layer if source is None else source for layer, source in sources.items()]
    return fields


def upper_windows(config: Json) -> list[int | None]:
    """The window of each layer of a Qwen, by the rule of the architecture: none below `max_window_layers`."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= int(config.get("max_window_layers", 28)) else "full_attention"
        for layer in range(number(config, "num_hidden_layers"))
    ]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def tiny_decoder(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """A config.json of this layout with a few thousand parameters."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        **changes,
    }
