"""Runtimes: what a student's attention caches, the classes that compute it, and the fields of config.json that say so.

A student of the source's own architecture with other numbers is stock. Others have a model type of kvfold's own, whose
name begins with the runtime's prefix: `kvfold_llama`, `kvfold_latent_llama`. `Shape.model_type` is the stock
architecture for all. `kvfold.hf` registers the classes of these tables with transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, get_args, get_type_hints

from kvfold.contracts.config import WIDTH, Fields, Rule, Rules, one_of, whole
from kvfold.contracts.paired_fields import COUNT, KINDS, heads_by_kind, read_kinds
from kvfold.contracts.site import Attention, Linear, Shape, Site
from kvfold.contracts.stock import HEADS as HEADS
from kvfold.contracts.stock import PAIRED, stock_class
from kvfold.contracts.student_site import with_latent, with_linear, with_mla
from kvfold.errors import UnsupportedModel

Json = Mapping[str, Any]
Sites = dict[Site, Attention]

OWN = "kvfold_"


@dataclass(frozen=True)
class Runtime:
    """A kind of attention, the architectures that have it, and how config.json describes it."""

    name: str
    prefix: str  # of the model type
    stem: str  # of the classes' names
    models: frozenset[str]  # stock model types
    holds: Callable[[Shape], bool]  # does a student of this shape need it?
    fields: Callable[[Shape], dict[str, Any]]  # the fields of its config.json
    read: Callable[[Json, Sites], Sites]  # the inverse: sites with what these fields say
    rules: Rules = field(default_factory=dict)

    def model_type(self, stock: str) -> str:
        """The model type for a stock architecture."""
        return f"{self.prefix}{stock}"

    def architecture(self, stock: str, end: str) -> str:
        """The class of a stock architecture."""
        return f"{self.stem}{stock_class(stock, end)}"


def stock_type(config: Json) -> str:
    """The stock architecture of a config.json of any runtime."""
    name = str(config["model_type"])
    longest = max((each.prefix for each in RUNTIMES if name.startswith(each.prefix)), key=len)
    return name.removeprefix(longest)


def architectures(runtimes: Sequence[Runtime], end: str, *stock: str) -> dict[str, str]:
    """The class of each model type of these runtimes and stock architectures, the stock ones first."""
    return {
        each.model_type(name): each.architecture(name, end)
        for each in reversed(runtimes)
        for name in stock
        if name in each.models
    }


def read(config: Json, sites: Sites, runtimes: Iterable[Runtime]) -> Sites:
    """The sites of a config.json, from those of its stock architecture. Raises UnsupportedModel."""
    stock = stock_type(config)
    runtime = next(each for each in runtimes if each.model_type(stock) == config["model_type"] and stock in each.models)
    found = runtime.read(config, sites)
    for attention in found.values():
        if attention.num_attention_heads % attention.num_key_value_heads:
            raise UnsupportedModel(
                f"config.json: {attention.num_key_value_heads} key/value heads do not divide "
                f"{attention.num_attention_heads} query heads"
            )
    return found


def runtime_for(shape: Shape, runtimes: Iterable[Runtime], where: str | None = None) -> Runtime:
    """The first runtime that holds a student. Raises UnsupportedModel where its architecture does not have it."""
    found = next(each for each in runtimes if each.holds(shape))
    if shape.model_type not in found.models:
        raise UnsupportedModel(
            f"{shape.model_type} has no classes for {found.name}",
            where=where,
            allowed=", ".join(sorted(found.models)),
            next="choose another method",
        )
    return found


def check(student: Shape, method: str) -> None:
    """Refuse a student of a method for which no classes exist, with UnsupportedModel."""
    paired = any(site.kind == "cross" for site in student.sites)
    runtime_for(student, ENCODER_DECODERS if paired else DECODERS, method)


def fields(shape: Shape, runtimes: Iterable[Runtime], end: str) -> dict[str, Any]:
    """The fields of a student's config.json. Raises UnsupportedModel where no classes exist for it."""
    found = runtime_for(shape, runtimes)
    return {
        "model_type": found.model_type(shape.model_type),
        "architectures": [found.architecture(shape.model_type, end)],
        **found.fields(shape),
    }


# --- decoders -------------------------------------------------------------------------------------------------------

PER_LAYER, SOURCES, VALUES = "per_layer_config", "kv_source_layers", "value_heads"
PLANES, WIDTHS = "rope_chunks", "latent_dims"
TYPES, SETTINGS = "layer_types", "linear_attention"

LINEAR_LAYER = "kvfold_linear"
"""The name of a layer of linear attention in `layer_types`, and of its cache layer in transformers' caches."""

_COUNTS = Rule(list[COUNT], "a list of positive whole numbers").or_null
_LINEAR_FIELDS: Rules = {
    name: (whole(0, 1 << 31) if kind is int else one_of(*get_args(kind))).needed
    for name, kind in get_type_hints(Linear).items()
}


def _heads(shape: Shape) -> dict[str, Any]:
    """One number of key/value heads, that of the first layer."""
    return {HEADS: next(iter(shape.sites.values())).num_key_value_heads}


def _without(names: Iterable[str], why: str, config: Json, sites: Sites) -> Sites:
    """The sites as they are, of a config.json without these fields."""
    for name in names:
        if config.get(name) not in (None, {}):
            raise UnsupportedModel(
                f"config.json: {name}, and transformers {why} {config['model_type']}",
                next=f"is its model_type {OWN}{config['model_type']}?",
            )
    return sites


def mixed(shape: Shape) -> bool:
    """Whether layers differ in their key/value heads."""
    return len({each.num_key_value_heads for each in shape.sites.values()}) > 1


def _one_or_all(shape: Shape) -> bool:
    """Whether each site has one key/value head, or as many as query heads."""
    return all(each.num_key_value_heads in (1, each.num_attention_heads) for each in shape.sites.values())


def _heads_by_layer(shape: Shape) -> dict[str, Any]:
    """The commonest number of heads, the larger of two, for all layers, and those of the others in `per_layer_config`.

    `kv_source_layers` names the owner of each layer's keys and values, where layers share, and `value_heads` the value
    head of each query head, in layers that group them apart from key heads.
    """
    heads = {site.layer: attention.num_key_value_heads for site, attention in shape.sites.items()}
    times = Counter(heads.values())
    common = max(times, key=lambda count: (times[count], count))
    found: dict[str, Any] = {HEADS: common}
    if len(times) > 1:
        found[PER_LAYER] = {str(layer): {HEADS: count} for layer, count in heads.items() if count != common}
    if shape.owners:
        sources = {site.layer: attention.source for site, attention in shape.sites.items()}
        found[SOURCES] = [layer if source is None else source for layer, source in sources.items()]
    if shape.decoupled:
        found[VALUES] = [None if each.value_heads is None else [*each.value_heads] for each in shape.sites.values()]
    return found


def _read_layers(config: Json, sites: Sites) -> Sites:
    """Sites with the heads of `per_layer_config`, the owners of `kv_source_layers`, and `value_heads`."""
    found = dict(sites)
    for layer, changes in (config.get(PER_LAYER) or {}).items():
        if not str(layer).isdecimal() or int(layer) >= len(sites):
            raise UnsupportedModel(f"config.json: {PER_LAYER} of layer {layer}", allowed=f"0 to {len(sites) - 1}")
        if other := sorted(set(changes) - {HEADS}):
            raise UnsupportedModel(
                f"config.json: {PER_LAYER} changes {', '.join(other)} of layer {layer}", allowed=HEADS
            )
        Fields(changes, part=f"{PER_LAYER}.{layer}.").check({HEADS: WIDTH.needed})
        found[Site(int(layer))] = replace(found[Site(int(layer))], num_key_value_heads=changes[HEADS])
    stated = list(range(len(sites))) if config.get(SOURCES) is None else config[SOURCES]
    if len(stated) != len(sites):
        raise UnsupportedModel(f"config.json: {SOURCES} must name a layer for each of {len(sites)}", got=repr(stated))
    for layer, source in enumerate(stated):
        if not 0 <= source <= layer or stated[source] != source:
            raise UnsupportedModel(f"config.json: layer {layer} cannot read keys and values of layer {source}")
        mine, theirs = found[Site(layer)], found[Site(source)]
        if (mine.num_key_value_heads, mine.window) != (theirs.num_key_value_heads, theirs.window):
            raise UnsupportedModel(
                f"config.json: layer {layer} reads keys and values of layer {source}, "
                "and differs from it in key/value heads or window"
            )
    found = {
        site: replace(attention, source=None if stated[site.layer] == site.layer else stated[site.layer])
        for site, attention in found.items()
    }
    return _read_values(config, found)


def _read_values(config: Json, sites: Sites) -> Sites:
    """Sites with the value heads that their query heads read: as many query heads read each."""
    stated = config.get(VALUES)
    if not stated:
        return sites
    if config.get(SOURCES) or stock_type(config) not in DECOUPLED.models:
        other = SOURCES if config.get(SOURCES) else config["model_type"]
        raise UnsupportedModel(f"config.json: {VALUES} does not go with {other}")
    if len(stated) != len(sites):
        raise UnsupportedModel(f"config.json: {VALUES} of {len(stated)} layers", allowed=f"{len(sites)}, or null")
    for (site, attention), heads in zip(sites.items(), stated, strict=True):
        readers = Counter(heads)
        if heads is not None and (
            len(heads) != attention.num_attention_heads
            or set(readers) != set(range(len(readers)))
            or len(set(readers.values())) > 1
        ):
            allowed = f"a value head for each of {attention.num_attention_heads} query heads, each read by as many"
            raise UnsupportedModel(f"config.json: {VALUES} of {site}", got=repr(heads), allowed=allowed)
    return {
        site: replace(attention, value_heads=None if heads is None else tuple(heads))
        for (site, attention), heads in zip(sites.items(), stated, strict=True)
    }


def _latent_fields(shape: Shape) -> dict[str, Any]:
    """Planes and latent width of each layer."""
    kept = [attention.kept or {} for attention in shape.sites.values()]
    heads = _heads(shape)
    planes = [each["rotated"] // (2 * heads[HEADS]) for each in kept]
    return {**heads, PLANES: planes, WIDTHS: [each["latent"] for each in kept]}


def _read_latent(config: Json, sites: Sites) -> Sites:
    for name in (PLANES, WIDTHS):
        values = config.get(name)
        if not isinstance(values, list) or len(values) != len(sites):
            raise UnsupportedModel(f"config.json: {name} must be a list of {len(sites)} numbers", got=repr(values))
    found = {}
    for (site, attention), planes, width in zip(sites.items(), config[PLANES], config[WIDTHS], strict=True):
        if planes > attention.head_dim // 2:
            raise UnsupportedModel(f"config.json: {PLANES} must not be above {attention.head_dim // 2}", got=planes)
        found[site] = with_latent(attention, planes, width)
    return found


def _mla_fields(shape: Shape) -> dict[str, Any]:
    """The widths of heads and of the latent, in a model without experts."""
    attention = next(iter(shape.sites.values()))
    kept, heads, rope = attention.cached, attention.num_attention_heads, attention.rope
    assert rope is not None
    return {
        HEADS: heads,
        "kv_lora_rank": kept["latent"],
        "q_lora_rank": attention.extra.get("q_down", (None,))[0],
        "qk_nope_head_dim": attention.head_dim - kept["rotated"],
        "qk_rope_head_dim": kept["rotated"],
        "head_dim": kept["rotated"],  # as transformers writes it: rotary frequencies are computed for this width
        "v_head_dim": attention.extra["o"][1] // heads,
        "attention_bias": "o_bias" in attention.extra,
        "rope_interleave": True,
        "rope_parameters": dict(rope.scaling or {"rope_type": "default", "rope_theta": rope.theta}),
        "first_k_dense_replace": shape.num_layers,
        "num_nextn_predict_layers": 0,
    }


def _read_mla(config: Json, sites: Sites) -> Sites:
    names = {"rotated": "qk_rope_head_dim", "free": "qk_nope_head_dim", "value": "v_head_dim", "width": "kv_lora_rank"}
    sizes = {name: config[field] for name, field in names.items()}
    biased = bool(config.get("attention_bias"))
    queries = config.get("q_lora_rank")
    return {site: with_mla(attention, biased=biased, queries=queries, **sizes) for site, attention in sites.items()}


def _linear_fields(shape: Shape) -> dict[str, Any]:
    """The layers of linear attention, and its settings."""
    linear = next(each.linear for each in shape.sites.values() if each.linear is not None)
    kinds = ["full_attention" if each.linear is None else LINEAR_LAYER for each in shape.sites.values()]
    return {**_heads(shape), TYPES: kinds, SETTINGS: asdict(linear)}


def _read_linear(config: Json, sites: Sites) -> Sites:
    stated = Fields(config).inside(SETTINGS)
    stated.check(_LINEAR_FIELDS)
    if other := sorted(set(stated.config) - set(_LINEAR_FIELDS)):
        raise stated.refusal(f"{other[0]} is not known", allowed=", ".join(_LINEAR_FIELDS))
    linear, kinds = Linear(**stated.config), config.get(TYPES) or [LINEAR_LAYER] * len(sites)
    if any(attention.window is not None for attention in sites.values()):
        raise UnsupportedModel(
            "config.json: sliding_window bounds the cache of layers that are linear", next="set it to null"
        )
    if problem := _contradiction(linear, next(iter(sites.values())).head_dim):
        raise stated.refusal(problem)
    return {
        site: with_linear(attention, linear) if kinds[site.layer] == LINEAR_LAYER else attention
        for site, attention in sites.items()
    }


def _contradiction(linear: Linear, head_dim: int) -> str | None:
    """What settings of linear attention do not go together."""
    features, width, window = linear.features, linear.feature_dim, linear.window
    if (features == "none") != (width == 0):
        return f"feature_dim {width} cannot be of features {features}"
    if features == "hedgehog" and width % 2:
        return f"feature_dim {width} is odd, and hedgehog takes both signs of each number"
    if (features == "none" or linear.sinks) and not window:
        return "features none and sinks need a window, and window is 0"
    if features != "none" and linear.norm == "groupnorm" and window:
        return f"norm groupnorm has no denominator that a window of {window} could share"
    if features != "none" and linear.rope == "after" and linear.norm == "denominator":
        return "norm denominator needs positive scores, and with rope after features they have either sign"
    if features != "none" and linear.rope == "after" and width != head_dim:
        return f"feature_dim {width} cannot be rotated as heads of {head_dim} are"
    return None


_PLAIN = frozenset({"llama", "mistral", "qwen2", "gemma", "granite", "ministral", "arcee"})
"""Rotated in halves, without norms of q and k, dropout behind o, or positions in the queries."""

_NEIGHBOURS = frozenset({"ernie4_5", "helium", "glm", "glm4", "cohere"})
"""Neighbouring coordinates rotate together."""

_APART = _PLAIN | _NEIGHBOURS | {"qwen3", "olmo2", "starcoder2", "seed_oss", "smollm3", "olmo", "ministral3", "cohere2"}
"""Maps of q, k, v and o apart, in classes of their own."""

_FUSED = frozenset({"phi3", "gpt_neox", "gptj", "codegen", "falcon", "gpt2", "gpt_bigcode", "opt"})
"""q, k and v in one tensor, or no field for key/value heads."""

_EXPERTS = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "gpt_oss"})
_NORMED = frozenset({"olmo3", "gemma2", "gemma3_text", "exaone4", "stablelm"})

SEPARATE = _APART | _EXPERTS | _NORMED | {"phi"}
"""Architectures whose maps of q, k, v and o are modules of their own, and whose layers may differ in their heads."""

STOCK = Runtime(
    "grouped heads",
    "",
    "",
    SEPARATE | _FUSED | {"gemma3", "internlm3"},
    lambda shape: True,
    _heads,
    partial(_without, (PER_LAYER, SOURCES, VALUES), "builds all layers alike in"),
)
LAYERS = Runtime(
    "layers that differ in their key/value heads",
    OWN,
    "Kvfold",
    SEPARATE | {"phi3", "gpt_bigcode"},
    lambda shape: mixed(shape) or (shape.model_type == "gpt_bigcode" and not _one_or_all(shape)),
    _heads_by_layer,
    _read_layers,
    {
        PER_LAYER: Rule(dict[str, dict[str, Any]], "a mapping of layers to fields").or_null,
        SOURCES: Rule(list[int], "a list of whole numbers").or_null,
        VALUES: Rule(list[list[int] | None], "a list of lists of whole numbers").or_null,
    },
)
SHARING = replace(
    LAYERS,
    name="layers that share keys and values",
    models=LAYERS.models - {"phi3", "gpt_bigcode", "stablelm"},  # whose layers hand nothing on to attention
    holds=lambda shape: bool(shape.owners),
)
DECOUPLED = replace(
    SHARING, name="value heads that are grouped apart from key heads", holds=lambda shape: shape.decoupled
)
IN_VLLM = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Stock architectures of the students of `LAYERS` and `SHARING` that the plug-in of vLLM registers."""
LATENT = Runtime(
    "latent keys and values",
    f"{OWN}latent_",
    "KvfoldLatent",
    _PLAIN | {"mixtral", "qwen2_moe"},
    lambda shape: any(each.kept is not None and each.linear is None for each in shape.sites.values()),
    _latent_fields,
    _read_latent,
    {PLANES: _COUNTS, WIDTHS: _COUNTS},
)
LINEAR = Runtime(
    "linear attention",
    f"{OWN}linear_",
    "KvfoldLinear",
    _PLAIN - {"ministral"} | _NEIGHBOURS | {"qwen3", "olmo2", "mixtral", "qwen3_moe", "olmoe"},
    lambda shape: any(each.linear is not None for each in shape.sites.values()),
    _linear_fields,
    _read_linear,
    {SETTINGS: Rule(dict[str, Any], "a mapping").or_null},
)
MLA = Runtime(
    "multi-head latent attention",
    "",
    "",
    frozenset({"deepseek_v3"}),
    lambda shape: shape.model_type == "deepseek_v3",
    _mla_fields,
    _read_mla,
)
ABSORBED = replace(MLA, prefix=OWN, stem="Kvfold")
"""kvfold's own classes for the same config.json, which attend to the latent as it is: for models in memory alone."""
DECODERS = (MLA, LINEAR, LATENT, DECOUPLED, SHARING, LAYERS, STOCK)


# --- encoder-decoders -----------------------------------------------------------------------------------------------

_ignored = partial(_without, tuple(KINDS), "ignores it in")
PAIRS_STOCK = Runtime("heads of their own", "", "", frozenset(PAIRED), lambda shape: True, lambda shape: {}, _ignored)
PAIRS = Runtime(
    "fewer key/value heads or cross-attentions in the decoder, or a latent of the encoder's output",
    OWN,
    "Kvfold",
    frozenset(PAIRED),
    lambda shape: (
        shape.layer_sparse or any(each.kept is not None or each.query_group > 1 for each in shape.sites.values())
    ),
    heads_by_kind,
    read_kinds,
    KINDS,
)
ENCODER_DECODERS = (PAIRS, PAIRS_STOCK)

RUNTIMES = (*DECODERS, *ENCODER_DECODERS)

ADDED = frozenset({name for each in DECODERS for name in each.rules} | {TYPES})
"""Fields of config.json that a decoder's runtimes add to the stock architecture's."""
