"""Which engines load a student, and how much of that was tried.

A student in its source's own architecture is loaded by every engine that knows the architecture; one that needs
kvfold's own classes is loaded by transformers with kvfold installed.
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


_LAYOUT = frozenset({"llama", "mistral", "qwen2"})

_KNOWN = (
    _Known("transformers", "AutoModelForCausalLM, without kvfold", _LAYOUT, _LAYOUT, "loaded in the tests"),
    _Known("vLLM", "its own class", _LAYOUT, frozenset({"llama"}), "0.32 on a CPU: same tokens as transformers"),
    _Known("llama.cpp", "GGUF, by its own converter", _LAYOUT, frozenset({"llama"}), "logits within 1e-5"),
    _Known("CTranslate2", "its own converter", _LAYOUT, frozenset({"llama"}), "4.8: same tokens as transformers"),
    _Known("SGLang", "its own class", _LAYOUT, frozenset(), ""),
)


def engines(student: Student, model_type: str) -> tuple[Engine, ...]:
    """Every engine that was looked at, for a student of this source architecture."""
    if student.model_type is not None:
        ours = Engine("transformers", True, "with kvfold installed", "loaded in the tests")
        rest = (Engine(known.name, False, f"does not know {student.model_type}", "no") for known in _KNOWN[1:])
        return (ours, *rest)
    return tuple(
        Engine(
            known.name,
            model_type in known.model_types,
            known.how if model_type in known.model_types else f"not known to implement {model_type}",
            known.checked if model_type in known.ran else f"not run with {model_type}",
        )
        for known in _KNOWN
    )
