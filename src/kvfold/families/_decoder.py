"""The decoders that transformers builds alike: rotated heads, one attention and one MLP in each layer.

`decoder` makes a family of the facts in which they differ; the fields that a student adds to config.json are those of
`kvfold.contracts.runtimes`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
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
    WIDTH,
    Fields,
    Rules,
    check_parts,
    check_rope,
    check_tokens,
    decimal,
    number,
    only,
)
from kvfold.contracts.family import Body, Family, Json
from kvfold.contracts.packed import Packed
from kvfold.contracts.runtimes import (
    DECODERS,
    LINEAR,
    LINEAR_LAYER,
    TYPES,
    architectures,
    fields,
    read,
    stock_type,
)
from kvfold.contracts.site import Attention, Rope, Shape, Site

END = "ForCausalLM"

TENSORS: Mapping[str, str | Packed] = {
    **{role: f"{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"{role}_proj.bias" for role in "qkvo"},
    **{f"{role}_norm": f"{role}_norm.weight" for role in "qk"},
    "sinks": "sinks",
    "k_rope_bias": "k_rope.bias",  # of latent attention; its other roles are named after themselves
    "v_up_bias": "v_up.bias",
    "planes": "planes",
    "phi_bias": "phi.bias",  # of linear attention
    "window_gate": "window_gate",
}

GATED = {**{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}, "act": "mlp.act_fn"}
BODY = Body(mlp=GATED)
FACTOR = number(1e-6, 1e6)  # of embeddings, logits or the residual
AFTER = Body(mlp=GATED, after={"self": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"})

MODEL: Rules = {
    "hidden_size": WIDTH.needed,
    "num_attention_heads": HEADS.needed,
    "num_hidden_layers": LAYERS.needed,
    "intermediate_size": WIDTH.needed,
    "vocab_size": VOCABULARY.needed,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": EPSILON,
    "initializer_range": decimal(0, 1),
    "attention_dropout": SHARE,
}
"""The fields of every model of this kind, also inside another."""

_RULES: Rules = {
    **MODEL,
    "num_key_value_heads": HEADS.or_null,
    "head_dim": WIDTH.or_null,
    "hidden_act": ACTIVATION,
    "is_encoder_decoder": only(False, "false"),
    TYPES: TEXTS.or_null,
    "mlp_layer_types": TEXTS.or_null,
    **{name: rule for each in DECODERS for name, rule in each.rules.items()},
}
"""The fields of every decoder."""


@dataclass(frozen=True)
class Layout:
    """What config.json says of a decoder's layers, and what it does not say because the architecture fixes it."""

    biases: str = ""  # roles with biases
    norms: Literal["none", "pre_rope", "all_heads"] = "none"
    norm_offset: float = 0.0  # added to the weights of norms
    windows: Sequence[int | None] | None = None  # by layer; None: no layer has a window
    head_dim: int | None = None  # where config.json is silent; None: hidden_size / num_attention_heads
    rotated: float = 1.0  # the part of a head that is rotated, where config.json is silent
    partial: bool = False  # config.json may name a part where that is 1
    theta: float = 10000.0  # the base of the rotation, where config.json is silent
    half_split: bool = True  # halves of a head rotate together; False: neighbouring coordinates
    rotations: Sequence[Json | None] | None = None  # by layer: fields in place of config.json's; None: not rotated
    scale: float | None = None  # of the logits; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # of the logits
    sinks: bool = False  # one more logit of each query head
    gated: bool = True  # the MLP
    mlp_biases: bool = False
    mlps: Sequence[int] | None = None  # parameters of each layer's, where some have experts
    vectors: int = 2  # of the model's width in a layer's norms, weights and biases
    last: int = 1  # the same in the last norm
    head_bias: bool = False  # of the output projection
    positions: int = 0  # learned, in a table
    kinds: Collection[str] = ("full_attention",)  # names that `layer_types` may have


def decoder(
    name: str,
    about: str,
    *stock: str,
    rules: Rules,
    layout: Callable[[Json], Layout],
    tiny: Mapping[str, Any] = {},
    check: Callable[[Fields], None] = lambda fields: None,
    ties: bool = False,
    usual: Callable[[Json], Json] | None = None,
    **facts: Any,
) -> Family:
    """A family of decoders: `stock` model types, rules for the fields that they add, and their layout.

    `tiny` has what is other than `_TINY`. `check` looks at fields that depend on each other. `ties` is the default
    of `tie_word_embeddings`. Where the architecture has names of its own for the fields of every decoder, `usual` adds
    them under their usual names, and `tiny` is whole. `facts` are other fields of `Family`.
    """
    given: dict[str, Any] = {
        "architectures": architectures(DECODERS, END, *stock),
        "attention": {"self": "model.layers.{layer}.self_attn"},
        "tensors": TENSORS,
        "fields": partial(fields, runtimes=DECODERS, end=END),
        "body": BODY,
        **facts,
    }
    first = {"model_type": stock[0], "architectures": [given["architectures"][stock[0]]]}
    return Family(
        name=name,
        about=about,
        check=partial(_check, rules=rules, layout=layout, own=check, usual=usual),
        shape=partial(_shape, family=name, layout=layout, ties=ties, usual=usual),
        ties=ties,
        tiny=lambda: deepcopy({**first, **({} if usual else _TINY), **tiny}),  # transformers changes nested fields
        **given,
    )


def _check(
    fields: Fields,
    rules: Rules,
    layout: Callable[[Json], Layout],
    own: Callable[[Fields], None],
    usual: Callable[[Json], Json] | None,
) -> None:
    """Check a config.json: each field by its rule, then the layers that it names, and the rotation of its heads."""
    if usual is not None:
        fields.check(rules)  # under its own names, which errors then use
        fields = replace(fields, config=usual(fields.config))
    fields.check({**_RULES, **rules})
    check_parts(fields)
    check_tokens(fields, fields.config["vocab_size"])
    own(fields)
    found = layout(fields.config)
    width = fields.get("head_dim", found.head_dim)
    if width is None:
        fields.check_divides("num_attention_heads", "hidden_size")
        width = fields.config["hidden_size"] // fields.config["num_attention_heads"]
    for rotation in _distinct(found.rotations or [{}]):
        turned = Fields({**fields.config, **rotation}, fields.where)
        check_rope(turned, width, found.rotated, partial=found.partial)
    linear = fields.config["model_type"] == LINEAR.model_type(stock_type(fields.config))
    check_layers(fields, TYPES, {"full_attention", LINEAR_LAYER} if linear else found.kinds)
    check_layers(fields, "mlp_layer_types", ("dense",))


def check_layers(fields: Fields, name: str, kinds: Collection[str]) -> None:
    """Refuse a list of other kinds of layers, or of more or fewer layers than there are, with UnsupportedModel."""
    found, layers = fields.get(name), fields.config["num_hidden_layers"]
    if found is not None and (len(found) != layers or set(found) - set(kinds)):
        raise fields.refusal(f"{name} must name {layers} layers", got=repr(found), allowed=", ".join(sorted(kinds)))


def check_head_dim(fields: Fields) -> None:
    """Refuse heads that are not together as wide as the model, with UnsupportedModel: the architecture assumes it."""
    fields.check_divides("num_attention_heads", "hidden_size")
    width = fields.config["hidden_size"] // fields.config["num_attention_heads"]
    if fields.config.get("head_dim", width) != width:
        raise fields.refusal("head_dim is not that of this architecture", got=fields.config["head_dim"], allowed=width)


def _shape(
    config: Json, family: str, layout: Callable[[Json], Layout], ties: bool, usual: Callable[[Json], Json] | None
) -> Shape:
    """The shape of a checked config.json."""
    config = config if usual is None else usual(config)
    found = layout(config)
    hidden, heads, layers, inner, vocab = (
        config[name]
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    width = config.get("head_dim") or found.head_dim or hidden // heads
    alone = (hidden, heads, config.get("num_key_value_heads") or heads, width, frozenset(found.biases), found.norms)
    ropes = [None if each is None else _rope(config, each, width, found) for each in found.rotations or [{}] * layers]
    by_layer = enumerate(zip(ropes, found.windows or [None] * layers, strict=True))
    same = Attention(*alone, scale=found.scale, softcap=found.softcap, norm_offset=found.norm_offset, sinks=found.sinks)
    own = {Site(layer): replace(same, rope=rope, window=window) for layer, (rope, window) in by_layer}
    sites = read(config, own, DECODERS)
    maps = 2 + found.gated
    mlp = maps * hidden * inner + ((maps - 1) * inner + hidden if found.mlp_biases else 0)
    outside = sum(found.mlps or [mlp] * layers) + layers * found.vectors * hidden
    ends = vocab * hidden * (1 if config.get("tie_word_embeddings", ties) else 2) + found.last * hidden
    return Shape(
        family=family,
        model_type=stock_type(config),
        sites=sites,
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=layers,
        parameters=ends
        + found.positions * hidden
        + vocab * found.head_bias
        + outside
        + sum(attention.parameters for attention in sites.values()),
        dtype=dtype_of(config),
        max_positions=int(config.get("max_position_embeddings") or 2048),
    )


def _distinct(rotations: Sequence[Json | None]) -> list[Json]:
    """Each of these once, without layers that are not rotated."""
    return [each for n, each in enumerate(rotations) if each is not None and each not in rotations[:n]]


def _rope(config: Json, own: Json, width: int, layout: Layout) -> Rope:
    """The rotation of a layer whose own fields stand in place of the whole's."""
    return replace(rope_of({**config, **own}, width, layout.rotated, layout.theta), half_split=layout.half_split)


def dtype_of(config: Json) -> str:
    """The format of the weights."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


_ROPE_PRETRAINED = "original_max_position_embeddings"


def rope_of(config: Json, head_dim: int, rotated: float = 1.0, theta: float = 10000.0) -> Rope:
    """The rotation of a checked config.json, with the field names of new or of old versions of transformers.

    `rotated` and `theta` are the architecture's defaults; those of scaling are transformers'.
    """
    # the older name goes first, as in transformers
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or theta)
    part = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or rotated
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("llama3", "yarn", "longrope"):
        positions = int(config.get("max_position_embeddings") or 2048)
        outside = config.get(_ROPE_PRETRAINED)
        parameters[_ROPE_PRETRAINED] = outside or parameters.get(_ROPE_PRETRAINED) or positions
        if kind == "yarn" and parameters["factor"] is None:
            parameters["factor"] = positions / parameters[_ROPE_PRETRAINED]
    return Rope(int(head_dim * float(part)), theta, scaling=parameters or None)


_TINY = {
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
}
"""A config.json of a few thousand parameters."""
