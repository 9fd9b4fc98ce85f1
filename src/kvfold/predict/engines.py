"""The engines that load a student, and what was tested of each.

A student with its source's architecture loads in every engine that knows the architecture. If its layers differ in
their key/value heads, the engine must take a number for each layer. If its layers share keys and values, or group their
value heads apart from their key heads, or it needs another of kvfold's own classes, it loads in transformers with
kvfold installed.

`refusal` decides for the engines that kvfold exports to, so a plan lists exactly what an export writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvfold.contracts.method import Student
from kvfold.contracts.runtimes import IN_VLLM, LAYERS, MLA, PAIRS, STOCK, mixed
from kvfold.contracts.site import Attention, Rope, Shape
from kvfold.contracts.student_site import KERNELS, WITH_KERNELS
from kvfold.errors import UnsupportedModel, plain

NOT_RUN = "not run with"
"""Begins what is said of an engine whose support of an architecture was read, and not tried."""


ONE_GROUPING = "reads the value head of a query's own key head"
"""Why no engine but transformers loads layers that group their value heads apart from their key heads."""


@dataclass(frozen=True)
class Engine:
    """An engine: whether it loads the student, how, or why not, and what was tested."""

    name: str
    loads: bool
    how: str
    checked: str


@dataclass(frozen=True)
class _Known:
    """What is known of an engine: the architectures that it implements, those that were run, and the result."""

    name: str
    how: str
    model_types: frozenset[str]
    ran: frozenset[str]
    checked: str
    others: Mapping[str, str] = field(default_factory=dict)  # architectures that it runs in another way, and how


_LAYOUT = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LLAMA = frozenset({"llama"})
_GGUF = _LAYOUT | {"phi"}
_GGUF_CHECKED = "logits within 5e-5, a Phi's within 2e-3"
_GGUF_ALONE = {"phi": "kvfold export; its own converter ignores the key/value heads"}
_CT2 = _LAYOUT | {
    *("gemma", "gemma3_text", "granite", "internlm3", "starcoder2", "smollm3", "olmo", "ministral", "seed_oss"),
    *("ernie4_5", "helium", "glm", "glm4", "cohere", "cohere2", "phi", "phi3", "stablelm", "gpt_bigcode"),
}
"""Decoders whose every fact has a place in CTranslate2, or in the weights."""

_VLLM = _LAYOUT | {
    *("gemma", "granite", "ministral", "ministral3", "cohere", "cohere2", "glm4", "gemma2", "gemma3_text", "stablelm"),
    *("phi3", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "olmoe", "gpt_oss"),
}
_VLLM_BACKEND = dict.fromkeys(
    ("phi", "starcoder2", "smollm3", "olmo", "olmo2", "olmo3", "glm"), "its backend for transformers' classes"
)

_PLUGGED = "with kvfold's plug-in"
_VLLM_CHECKED = "0.32 on a CPU: same tokens as transformers"

_KNOWN = (
    _Known("transformers", "AutoModelForCausalLM, without kvfold", STOCK.models, STOCK.models, "loaded in the tests"),
    _Known("vLLM", "its own class", _VLLM, _LLAMA, _VLLM_CHECKED, _VLLM_BACKEND),
    _Known("llama.cpp", "kvfold export, or its own converter", _GGUF, _LLAMA | {"phi"}, _GGUF_CHECKED, _GGUF_ALONE),
    _Known("CTranslate2", "kvfold export", _CT2, _CT2, "4.8: same tokens as transformers"),
    _Known("SGLang", "its own class", _LAYOUT, frozenset(), ""),
)

_MIXED = (  # heads for which the stock class has no field, such as those that differ by layer: `per_layer_config`
    _Known("transformers", "with kvfold installed", LAYERS.models, LAYERS.models, "loaded in the tests"),
    _Known("vLLM", _PLUGGED, IN_VLLM, _LLAMA, _VLLM_CHECKED),
    _Known("llama.cpp", "GGUF of its architecture deci", _LAYOUT - {"qwen3"}, _LLAMA, "logits within 5e-5"),
    _Known("CTranslate2", "kvfold export", _CT2, _CT2, "4.8: same tokens as transformers"),
    _Known("SGLang", "one number of key/value heads for all layers", frozenset(), frozenset(), ""),
)


_MLA = (  # a stock deepseek_v3 without experts, whose latent has a bias
    _Known("transformers", "AutoModelForCausalLM, without kvfold", MLA.models, MLA.models, "loaded in the tests"),
    _Known(
        "vLLM",
        "its backend for transformers' classes: --model-impl transformers",
        MLA.models,
        MLA.models,
        _VLLM_CHECKED,
    ),
    _Known("llama.cpp", "its deepseek2 has no bias in front of the norm of the latent", frozenset(), frozenset(), ""),
    _Known("CTranslate2", "has no latent attention", frozenset(), frozenset(), ""),
    _Known("SGLang", "its class has no bias in front of the norm of the latent", frozenset(), frozenset(), ""),
)

_T5 = frozenset({"t5", "mt5", "umt5"})
_BART = frozenset({"bart", "mbart", "plbart", "m2m_100", "marian", "pegasus", "blenderbot"})
"""Encoder-decoders with absolute positions that CTranslate2 has."""
_T5GEMMA = frozenset({"t5gemma"})
_PAIRED = PAIRS.models

_GROUPED_T5 = (  # encoder-decoders with shared heads, in an architecture of kvfold's own
    _Known("transformers", "with kvfold installed", _PAIRED, _PAIRED, "loaded in the tests"),
    _Known("vLLM", "has no T5", frozenset(), frozenset(), ""),
    _Known("llama.cpp", "its T5 has as many key/value heads as query heads", frozenset(), frozenset(), ""),
    _Known("CTranslate2", "kvfold export", _T5 | _BART, _T5 | _BART, "4.8: same tokens as transformers"),
    _Known("SGLang", "has no T5", frozenset(), frozenset(), ""),
)

_PLAIN_T5 = (
    _Known("transformers", "AutoModelForSeq2SeqLM, without kvfold", _PAIRED, _PAIRED, "loaded in the tests"),
    _GROUPED_T5[1],
    _Known("llama.cpp", "its own converter knows T5, kvfold export does not", frozenset(), frozenset(), ""),
    *_GROUPED_T5[3:],
)

_ONE_NUMBER = (  # one number of key/value heads for the whole decoder, which a stock config expresses
    _Known("transformers", "AutoModelForSeq2SeqLM, without kvfold", _T5GEMMA, _T5GEMMA, "loaded in the tests"),
    _Known("vLLM", "no support for T5Gemma was found", frozenset(), frozenset(), ""),
    _Known("llama.cpp", "no support for T5Gemma was found", frozenset(), frozenset(), ""),
    _Known("CTranslate2", "its T5Gemma has no soft caps, and one window for all layers", frozenset(), frozenset(), ""),
    _Known("SGLang", "no support for T5Gemma was found", frozenset(), frozenset(), ""),
)


def _table(student: Student) -> tuple[_Known, ...]:
    sites = student.shape.sites
    if any(site.kind == "cross" for site in sites):
        counts = {attention.num_key_value_heads for site, attention in sites.items() if site.kind != "encoder"}
        if student.shape.model_type in _T5GEMMA and len(counts) == 1:
            return _ONE_NUMBER
        return _GROUPED_T5 if any(attention.query_group > 1 for attention in sites.values()) else _PLAIN_T5
    return _MIXED if LAYERS.holds(student.shape) else _KNOWN


def engines(student: Student, config: Mapping[str, Any]) -> tuple[Engine, ...]:
    """Every known engine, for a student of a source with this config.json."""
    shape = student.shape
    if shape.model_type in MLA.models:
        return tuple(_engine(known, shape, config) for known in _MLA)
    kept = next((each.cached for each in shape.sites.values() if each.kept is not None), None)
    own = student.model_type
    if own is not None or kept is not None or shape.layer_sparse:
        sparse = "cross-attention in some layers alone" if shape.layer_sparse else own
        what = sparse if kept is None else f"attention that keeps {' and '.join(kept)}"
        return _ours_alone(f"does not know {what}")
    if shape.decoupled:
        return _ours_alone(ONE_GROUPING)
    if shape.owners:
        return _sharing(shape.model_type)
    return tuple(_engine(known, shape, config) for known in _table(student))


def _ours_alone(why: str) -> tuple[Engine, ...]:
    """The engines for a student that only transformers loads."""
    ours = Engine("transformers", True, "with kvfold installed", "loaded in the tests")
    return (ours, *(Engine(known.name, False, why, "no") for known in _KNOWN[1:]))


def _engine(known: _Known, shape: Shape, config: Mapping[str, Any]) -> Engine:
    """One engine, by the check of its export if there is one, else by its table."""
    problem: str | None = None
    if known.name in EXPORTED:
        found = refusal(known.name, config, shape)
        problem = None if found is None else found.line
    elif shape.model_type not in known.model_types and shape.model_type not in known.others:
        problem = f"does not know {shape.model_type}"
    elif known.name in _SILU_ALONE and shape.model_type in _LAYOUT and activation(config, shape) not in _SILU:
        problem = f"its MLP supports only silu (got {activation(config, shape)})"
    elif known.name == "vLLM" and MLA.holds(shape) and _widths(shape) not in KERNELS:
        problem = f"has kernels for latents of {WITH_KERNELS}"
    elif known.name == "vLLM" and shape.model_type == "olmoe" and config.get("clip_qkv") is not None:
        problem = f"its class does not clip q, k and v (got clip_qkv {config['clip_qkv']:g})"
    if problem is not None and not known.model_types:  # the table says why it loads no model of this kind
        problem = known.how
    tried = known.checked if shape.model_type in known.ran else f"{NOT_RUN} {shape.model_type}"
    how = known.others.get(shape.model_type, known.how)
    return Engine(known.name, problem is None, problem or how, tried if problem is None else "no")


def _widths(shape: Shape) -> tuple[int, int]:
    """The widths of the latent and of the rotated key."""
    cached = next(iter(shape.sites.values())).cached
    return cached["latent"], cached["rotated"]


def _sharing(model_type: str) -> tuple[Engine, ...]:
    """The engines for layers that read another layer's keys and values, which only kvfold's own classes do."""
    why = {"llama.cpp": "shares layers only in Gemma's architectures", "CTranslate2": "cannot share layers"}
    found = [Engine("transformers", True, "with kvfold installed", "loaded in the tests")]
    for known in _MIXED[1:]:
        if model_type in known.model_types and known.how == _PLUGGED:
            checked = known.checked if model_type in known.ran else f"{NOT_RUN} {model_type}"
            found.append(Engine(known.name, True, known.how, checked))
        else:
            found.append(Engine(known.name, False, why.get(known.name, "does not find kvfold's classes"), "no"))
    return tuple(found)


# --- what an export cannot write ------------------------------------------------------------------------------------

DECODERS = {"llama.cpp": _GGUF, "CTranslate2": _CT2}
"""Engine -> the decoders that can be exported to it."""

ACTIVATIONS = {
    **{"relu": "RELU", "gelu": "GELU", "gelu_new": "GELUTanh", "gelu_pytorch_tanh": "GELUTanh"},
    **{"silu": "SWISH", "swish": "SWISH"},
}
"""Activation of an MLP -> its name in CTranslate2."""

_OTHER_ACTIVATIONS = {
    **dict.fromkeys(("gemma", "gemma3_text", "starcoder2", "gpt_bigcode"), "gelu_pytorch_tanh"),
    "phi": "gelu_new",
}
"""What transformers takes where config.json is silent, of architectures that do not take silu."""

EXPORTED = ("llama.cpp", "CTranslate2")
_SILU = ("silu", "swish")  # the same function
_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # llama.cpp computes all by tanh, in float16
_SILU_ALONE = ("vLLM", "SGLang")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""RoPE scalings that can be exported, and the numbers that each needs."""


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be exported to an engine."""

    what: str
    got: object = None
    allowed: object = None
    next: str | None = None

    @property
    def line(self) -> str:
        """The refusal in a plan."""
        return self.what if self.got is None else f"{self.what} (got {plain(self.got, 80)})"

    def error(self, engine: str, where: object) -> UnsupportedModel:
        """The refusal as an error."""
        return UnsupportedModel(
            f"cannot be exported to {engine}: {self.what}",
            where=where,
            got=self.got,
            allowed=self.allowed,
            next=self.next,
        )


def refusal(engine: str, config: Mapping[str, Any], shape: Shape) -> Refusal | None:
    """Why kvfold cannot export a model of this config.json and shape to an engine of `EXPORTED`; None if it can."""
    if engine == "CTranslate2" and any(site.kind == "cross" for site in shape.sites):
        return _of_paired(config, shape)
    if MLA.holds(shape):
        return Refusal(next(known.how for known in _MLA if known.name == engine))
    if shape.model_type not in DECODERS[engine]:
        allowed = ", ".join(sorted(DECODERS[engine]))
        return Refusal("its architecture is not supported", shape.model_type, allowed)
    if shape.owners:
        return Refusal("its layers share keys and values", f"{len(shape.owners)} owners", "a cache for each layer")
    if shape.decoupled:
        return Refusal(f"it {ONE_GROUPING}", next="make the student without --no-servable")
    return _kept(shape) or (_of_ct2 if engine == "CTranslate2" else _of_gguf)(config, shape) or _of_ropes(shape)


def rope_kind(rope: Rope) -> str:
    """The name of the RoPE scaling in config.json."""
    scaling = rope.scaling or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def activation(config: Mapping[str, Any], shape: Shape) -> object:
    """The activation of a decoder's MLP by its name in transformers."""
    names = {"gemma3_text": "hidden_activation", "gpt_bigcode": "activation_function"}
    usual = _OTHER_ACTIVATIONS.get(shape.model_type, "silu")
    found = config.get(names.get(shape.model_type, "hidden_act"), usual)
    return usual if shape.model_type == "gemma" and found == "gelu" else found  # transformers too reads it so


def _kept(shape: Shape) -> Refusal | None:
    """Refuse latents and states, which no engine caches."""
    other = next((each for each in shape.sites.values() if each.kept is not None or each.linear is not None), None)
    if other is None:
        return None
    kept = " and ".join(other.cached)
    return Refusal("the engine caches keys and values of heads", kept, "a student of gqa, or transformers with kvfold")


def _of_paired(config: Mapping[str, Any], shape: Shape) -> Refusal | None:
    """Refuse encoder-decoders that CTranslate2 does not support."""
    if shape.model_type not in _T5 | _BART:
        return Refusal("its architecture is not supported", shape.model_type, ", ".join(sorted(_T5 | _BART)))
    name = paired_activation(config, shape)
    if name not in ACTIVATIONS:
        return Refusal("the engine lacks the activation", name, ", ".join(ACTIVATIONS))
    heads = {each.num_attention_heads for each in shape.sites.values()}
    if len(heads) > 1:
        what = "encoder and decoder have different numbers of heads, which was not tried"
        return Refusal(what, " and ".join(map(str, sorted(heads))))
    if shape.layer_sparse:
        got = f"{len(shape.crossed)} of {shape.num_layers} layers"
        return Refusal("the engine has cross-attention in every layer", got, "a student of gqa")
    return _kept(shape)


def paired_activation(config: Mapping[str, Any], shape: Shape) -> str:
    """The activation of an encoder-decoder by its name in transformers."""
    if shape.model_type in _BART:
        return str(config.get("activation_function", "relu" if shape.model_type == "m2m_100" else "gelu"))
    stated = str(config.get("feed_forward_proj", "relu"))
    return "gelu_new" if stated == "gated-gelu" else stated.removeprefix("gated-")


def _of_ct2(config: Mapping[str, Any], shape: Shape) -> Refusal | None:
    """Refuse decoders that CTranslate2 cannot express."""
    if (name := activation(config, shape)) not in tuple(ACTIVATIONS):  # it may be of any type
        return Refusal("the engine lacks the activation", name, ", ".join(ACTIVATIONS))
    if config.get("clip_qkv") is not None:
        return Refusal("the engine does not clip q, k and v", config["clip_qkv"], "clip_qkv null")
    return None


def _of_ropes(shape: Shape) -> Refusal | None:
    """Refuse the first rotation that cannot be exported."""
    ropes = (each.rope for each in shape.sites.values() if each.rope is not None)
    return next((found for rope in ropes if (found := _of_rope(rope)) is not None), None)


def _of_rope(rope: Rope) -> Refusal | None:
    """Refuse scalings that depend on the text's length or also scale logits, and those that lack a number."""
    kind, scaling = rope_kind(rope), rope.scaling or {}
    if kind not in _ROPE_KEYS:
        return Refusal(f"RoPE scaling {kind!r} cannot be exported", kind, ", ".join(_ROPE_KEYS))
    for key in _ROPE_KEYS[kind]:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return Refusal(f"RoPE scaling {kind!r} needs a positive {key}", value)
    if kind == "llama3" and scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        return Refusal("RoPE scaling 'llama3' needs two different frequency factors", scaling["low_freq_factor"])
    return None


def _of_gguf(config: Mapping[str, Any], shape: Shape) -> Refusal | None:
    """Refuse what the architectures of llama.cpp cannot express."""
    attention, model_type = next(iter(shape.sites.values())), shape.model_type
    own = _GELU if model_type == "phi" else _SILU
    if (name := activation(config, shape)) not in own:
        return Refusal("the engine lacks the activation", name, ", ".join(own))
    if model_type == "phi":
        return _of_phi2(attention, mixed(shape))
    if mixed(shape):
        problem = _of_deci(attention)
        what = f"deci, the architecture for layers that differ in their key/value heads, {problem}"
        return None if problem is None else Refusal(what, next="export to ctranslate2")
    if model_type == "qwen3" and attention.biases:
        return Refusal("qwen3 has no biases", ", ".join(sorted(attention.biases)))
    if attention.rope is not None and rope_kind(attention.rope) != "default" and model_type.startswith("qwen"):
        return Refusal(f"{model_type} has no scaled rotary frequencies", rope_kind(attention.rope))
    return None


def _of_phi2(attention: Attention, differing: bool) -> Refusal | None:
    if differing:
        return Refusal("phi2 has one number of key/value heads for all layers", next="export to ctranslate2")
    if attention.num_attention_heads * attention.head_dim != attention.hidden_size:
        return Refusal("phi2 has only heads that are together as wide as the model", f"head_dim {attention.head_dim}")
    if attention.rope is not None and rope_kind(attention.rope) != "default":
        return Refusal("phi2 has no scaled rotary frequencies", rope_kind(attention.rope))
    return None


def _of_deci(attention: Attention) -> str | None:
    if attention.norms != "none":
        return "has no norms of q and k"
    if "q" in attention.biases and attention.num_attention_heads * attention.head_dim != attention.hidden_size:
        return "has only biases as wide as the model"
    return None
