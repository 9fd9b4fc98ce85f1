"""Other engines' formats: each export is loaded by its engine and compared with transformers before it is put in place.

An export is a directory: the engine's files, the tokenizer and `kvfold.json`, whose last step says what was compared.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from kvfold.disk.checkpoint import Checkpoint, carry_over
from kvfold.disk.lineage import descend, known_root
from kvfold.disk.output import MANIFEST, check_apart, disk_errors, open_output, write_json
from kvfold.errors import Interrupted, SettingError, choices, did_you_mean
from kvfold.export import agreement, limits
from kvfold.export import ctranslate2 as _ctranslate2
from kvfold.export import gguf as _gguf
from kvfold.export import self_contained as _self_contained
from kvfold.progress import SILENT, Progress

__all__ = ["ENGINES", "ExportSettings", "export"]

ENGINES: dict[str, ModuleType] = {"ctranslate2": _ctranslate2, "gguf": _gguf, "transformers": _self_contained}
NOT_LOADED = "not loaded: llama-cpp-python is not installed"
SAMPLE = "def fold(heads):\n    return [x ** 2 for x in heads]  # it's 3 of 8, or 1024?\n\nThe café — naïve."


@dataclass(frozen=True)
class ExportSettings:
    """How an export is stored and how long the comparison with transformers is."""

    dtype: Literal["source", "float32", "float16", "bfloat16", "int8"] = field(
        default="source", metadata={"help": "Precision of the stored weights; int8 is Q8_0 in a GGUF."}
    )
    prompt_tokens: int = field(default=40, metadata={"help": "Tokens of each prompt of the comparison."})
    new_tokens: int = field(default=16, metadata={"help": "Greedy tokens after each prompt."})

    def __post_init__(self) -> None:
        """Refuse lengths that cannot be, with SettingError."""
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1", where="export", got=getattr(self, name))


def export(
    src: str | Path,
    dst: str | Path,
    to: str,
    settings: ExportSettings = ExportSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write `src` in the format of an engine to the directory `dst`, and return its path.

    `transformers` is for a student of an architecture of ours: the checkpoint with the code that it needs. The model is
    loaded in float32 for the comparison. A GGUF is loaded by llama.cpp where llama-cpp-python is installed, and
    otherwise read back with gguf-py and said to be so. Raises SettingError for an unknown engine or a missing extra,
    UnsupportedModel when the engine cannot say what the model is or computes something else, and OutputError when
    `dst` holds something else.
    """
    if to not in ENGINES:
        raise SettingError(f"no engine is called {to!r}", allowed=choices(ENGINES), next=did_you_mean(to, ENGINES))
    started, engine, dst = time.monotonic(), ENGINES[to], Path(dst)
    engine.available()
    source = Checkpoint.open(src)
    check_apart(dst, {"source": source.path, "root teacher": known_root(source)})
    engine.check(source)
    site = next(iter(source.shape.sites))
    stored = source.spec(source.family.tensor(site, "q")).dtype
    weights = stored if settings.dtype == "source" else settings.dtype
    weights = "float32" if weights == "float64" else weights  # which no engine takes
    asked = {"stage": "export", "to": to, **dataclasses.asdict(settings)}
    with disk_errors(dst):
        output = open_output(dst, {**asked, "source": source.hash(progress)}, overwrite=overwrite)
        if output.complete:
            progress.say(f"{dst} is complete: it was made from this source with these settings")
            return dst
        try:
            source.require_finite()
            carry_over(source, output.work)  # first: nothing of the source may replace what is checked
            found = _make(source, engine, output.work, weights, settings, progress)
        except Exception:  # what is there cannot be continued
            shutil.rmtree(output.work)
            raise
        except KeyboardInterrupt:
            raise Interrupted("stopped", where=dst, next="the same command starts it again") from None
        lineage = descend(
            source, inputs=output.inputs, stage="export", settings=asked, wall_seconds=time.monotonic() - started
        )
        lineage["steps"][-1]["check"] = found
        write_json(output.work / MANIFEST, {**lineage, "hash": engine.content(source, output.work)})
        output.commit()
    for line in _said(found, engine.NAME):
        progress.say(line)
    return output.path


def _make(
    source: Checkpoint, engine: ModuleType, folder: Path, weights: str, settings: ExportSettings, progress: Progress
) -> dict[str, Any]:
    """Write the engine's files and compare; returns what was found. Raises UnsupportedModel when they disagree."""
    from kvfold.hf import load  # imports transformers

    room = min(source.shape.max_positions, limits.window(source) or source.shape.max_positions)
    new_tokens = max(1, min(settings.new_tokens, room // 2))
    prompt_tokens = max(1, min(settings.prompt_tokens, room - new_tokens))
    loaded = engine is not _gguf or _gguf.loadable()
    window = None if engine.TOLD_OF_WINDOWS else limits.window(source)
    found: dict[str, Any] = {"engine": engine.version(), "weights": weights, "exact_up_to": window}
    progress.start(f"exporting to {engine.NAME}", 3, "steps")
    try:
        model = load(source.path, attention=engine.ATTENTION) if loaded else None
        known = None
        if loaded:
            known = agreement.reference(
                model, vocab_size=source.shape.vocab_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens
            )
        progress.advance(1, "transformers answered")
        found |= engine.write(source, model, folder, weights)
        del model
        progress.advance(1, "written")
        if engine is _gguf:
            found |= _gguf.inspect(source, folder, weights)
        if known is not None:
            found |= agreement.compare(known, *engine.answer(folder, known, weights))
            agreement.require(found, engine.NAME, weights)
        if engine is _gguf and loaded and not found["vocabulary"].startswith("none"):
            found["same_text_ids"] = _same_ids(source, folder)
        progress.advance(1, "compared")
    finally:
        progress.stop()
    return {**found, "loaded": loaded}


def _same_ids(source: Checkpoint, folder: Path) -> bool:
    """Does llama.cpp read a sample of text as the tokenizer does?"""
    from kvfold.hf import load_tokenizer

    return bool(_gguf.tokenize(folder, SAMPLE) == load_tokenizer(source.path).encode(SAMPLE, add_special_tokens=False))


def _said(found: dict[str, Any], name: str) -> list[str]:
    """The lines that a reader should not miss."""
    lines = []
    if found["loaded"]:
        lines.append(
            f"{name} agrees with transformers: logits within {found['max_difference']:.2g} at {found['positions']} "
            f"positions, {found['same_tokens']} of {found['tokens']} greedy tokens the same"
        )
    else:
        lines.append(f"{NOT_LOADED}; {found['tensors']} tensors were read back and are as planned")
    if found["exact_up_to"]:
        lines.append(f"{name} is not told of the sliding window: exact for contexts of {found['exact_up_to']} tokens")
    if isinstance(found.get("head_count_kv"), list):
        lines.append(f"serve it with flash attention: without it, {name} keeps V as wide as the widest layer's")
    if found.get("vocabulary", "").startswith("none"):
        lines.append(f"vocabulary: {found['vocabulary']}")
    if found.get("same_text_ids") is False:
        lines.append("vocabulary: llama.cpp splits a sample text otherwise than the tokenizer; give it token ids")
    return lines
