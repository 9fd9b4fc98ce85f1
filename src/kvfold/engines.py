"""Which engines load a student, and how much of that was tried.

A student in its source's own architecture is loaded by every engine that knows the architecture. One whose layers
differ in their key/value heads needs an engine that takes a number for each layer; one whose layers share keys and
values, or that needs another of kvfold's own classes, is loaded by transformers with kvfold installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.methods import Student


@dataclass(frozen=True)
class Engine:
    """One engine: whether it should load the student, through what, and what was tried."""

    name: str
    loads: bool
    how: str
    checked: str


@dataclass(frozen=True)
class _Known:
    """What is known of an engine: architectures that it implements, those that were run folded, and what came out."""

    name: str
    how: str
    model_types: frozenset[str]
    ran: frozenset[str]
    checked: str


_LAYOUT = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LLAMA = frozenset({"llama"})

_KNOWN = (
    _Known("transformers", "AutoModelForCausalLM, without kvfold", _LAYOUT, _LAYOUT, "loaded in the tests"),
    _Known("vLLM", "its own class", _LAYOUT, _LLAMA, "0.32 on a CPU: same tokens as transformers"),
    _Known("llama.cpp", "GGUF, by its own converter", _LAYOUT, _LLAMA, "logits within 5e-5"),
    _Known("CTranslate2", "kvfold export", _LAYOUT, _LAYOUT, "4.8: same tokens as transformers"),
    _Known("SGLang", "its own class", _LAYOUT, frozenset(), ""),
)

_MIXED = (  # key/value heads of each layer's own: `per_layer_config`
    _Known("transformers", "with kvfold installed", _LAYOUT, _LAYOUT, "loaded in the tests"),
    _Known("vLLM", "its backend for transformers does not find kvfold's classes", frozenset(), frozenset(), ""),
    _Known("llama.cpp", "GGUF of its architecture deci", _LAYOUT - {"qwen3"}, _LLAMA, "logits within 5e-5"),
    _Known("CTranslate2", "kvfold export", _LAYOUT, _LAYOUT, "4.8: same tokens as transformers"),
    _Known("SGLang", "one number of key/value heads for all layers", frozenset(), frozenset(), ""),
)


_T5 = frozenset({"t5", "mt5"})
_T5GEMMA = frozenset({"t5gemma"})
_PAIRED = _T5 | {"bart", "mbart"} | _T5GEMMA

_GROUPED_T5 = (  # encoder-decoders with shared heads: an architecture of kvfold's own
    _Known("transformers", "with kvfold installed", _PAIRED, _PAIRED, "loaded in the tests"),
    _Known("vLLM", "has no T5", frozenset(), frozenset(), ""),
    _Known("llama.cpp", "its T5 has as many key/value heads as query heads", frozenset(), frozenset(), ""),
    _Known("CTranslate2", "kvfold export", _T5, _T5, "4.8: same tokens as transformers"),
    _Known("SGLang", "has no T5", frozenset(), frozenset(), ""),
)

_PLAIN_T5 = (
    _Known("transformers", "AutoModelForSeq2SeqLM, without kvfold", _PAIRED, _PAIRED, "loaded in the tests"),
    _GROUPED_T5[1],
    _Known("llama.cpp", "GGUF, by its own converter", _T5, frozenset(), ""),
    *_GROUPED_T5[3:],
)

_ONE_NUMBER = (  # of key/value heads in the whole decoder, which the architecture has a place for
    _Known("transformers", "AutoModelForSeq2SeqLM, without kvfold", _T5GEMMA, _T5GEMMA, "loaded in the tests"),
    _Known("vLLM", "has no T5Gemma, as far as was seen", frozenset(), frozenset(), ""),
    _Known("llama.cpp", "has no T5Gemma, as far as was seen", frozenset(), frozenset(), ""),
    _Known("CTranslate2", "its T5Gemma has no soft caps, and one window for all layers", frozenset(), frozenset(), ""),
    _Known("SGLang", "has no T5Gemma, as far as was seen", frozenset(), frozenset(), ""),
)


def _table(student: Student) -> tuple[_Known, ...]:
    """What is known of students of this kind."""
    sites = student.shape.sites
    if any(site.kind == "cross" for site in sites):
        counts = {attention.num_key_value_heads for site, attention in sites.items() if site.kind != "encoder"}
        if student.shape.model_type in _T5GEMMA and len(counts) == 1:
            return _ONE_NUMBER
        return _GROUPED_T5 if any(attention.query_group > 1 for attention in sites.values()) else _PLAIN_T5
    return _MIXED if len({attention.num_key_value_heads for attention in sites.values()}) > 1 else _KNOWN


def engines(student: Student, model_type: str) -> tuple[Engine, ...]:
    """Every engine that was looked at, for a student of this source architecture."""
    kept = next((each.cached for each in student.shape.sites.values() if each.kept is not None), None)
    if student.model_type is not None or kept is not None:
        what = student.model_type if kept is None else f"attention that keeps {' and '.join(kept)}"
        ours = Engine("transformers", True, "with kvfold installed", "loaded in the tests")
        rest = (Engine(known.name, False, f"does not know {what}", "no") for known in _KNOWN[1:])
        return (ours, *rest)
    if student.shape.owners:
        return _sharing()
    return tuple(
        Engine(
            known.name,
            model_type in known.model_types,
            known.how if model_type in known.model_types or not known.model_types else f"no place for {model_type}",
            known.checked if model_type in known.ran else f"not run with {model_type}",
        )
        for known in _table(student)
    )


def _sharing() -> tuple[Engine, ...]:
    """Layers that read another layer's keys and values: kvfold's own classes, and no engine's."""
    told = {"llama.cpp": "shares the last layers of Gemma's architectures alone", "CTranslate2": "no place for it"}
    rest = (
        Engine(known.name, False, told.get(known.name, "does not find kvfold's classes"), "no") for known in _KNOWN[1:]
    )
    return (Engine("transformers", True, "with kvfold installed", "loaded in the tests"), *rest)
