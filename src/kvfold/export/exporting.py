"""An export: a directory with the files of an engine, the tokenizer, and `kvfold.json`.

The last step of `kvfold.json` holds the comparison with transformers.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import descend
from kvfold.disk.output import MANIFEST, check_apart, disk_errors, open_output, write_json
from kvfold.disk.sidecar import carry_over
from kvfold.errors import Interrupted, SettingError, choices, did_you_mean
from kvfold.export import agreement, limits
from kvfold.export.ctranslate2 import CTranslate2
from kvfold.export.engine import Engine
from kvfold.export.gguf import LlamaCpp
from kvfold.export.self_contained import SelfContained
from kvfold.export.settings import ExportSettings
from kvfold.progress import SILENT, Progress, task

ENGINES: Mapping[str, Engine] = {"ctranslate2": CTranslate2(), "gguf": LlamaCpp(), "transformers": SelfContained()}


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

    `transformers` is for a student of one of kvfold's architectures: the checkpoint with the code that it needs. The
    model is loaded in float32 for the comparison. A GGUF is loaded by llama.cpp where llama-cpp-python is installed,
    and otherwise only read back with gguf-py, which the command reports. Raises SettingError for an unknown engine, a
    missing extra or a dtype that cannot be stored, UnsupportedModel when the engine cannot represent the model or
    computes something else, and OutputError when `dst` holds something else.
    """
    if to not in ENGINES:
        raise SettingError(f"no engine is called {to!r}", allowed=choices(ENGINES), next=did_you_mean(to, ENGINES))
    started, engine, dst = time.monotonic(), ENGINES[to], Path(dst)
    engine.available()
    source = Checkpoint.open(src)
    check_apart(dst, {"source": source.path, "root teacher": source.root_path})
    engine.check(source)
    weights = _stored_dtype(source, engine, settings.dtype)
    asked = {"stage": "export", "to": to, **dataclasses.asdict(settings)}
    with disk_errors(dst):
        output = open_output(dst, {**asked, "source": source.hash(progress)}, overwrite=overwrite)
        if output.complete:
            progress.say(f"{dst} is complete: it was made from this source with these settings")
            return dst
        try:
            source.require_finite()
            carry_over(source.path, output.work)  # first: nothing of the source may replace what is checked
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
    if found["loaded"]:
        progress.say(
            f"{engine.name} agrees with transformers: logits within {found['max_difference']:.2g} at "
            f"{found['positions']} positions, {found['same_tokens']} of {found['tokens']} greedy tokens the same"
        )
    if found["exact_up_to"]:
        progress.say(f"{engine.name} has no sliding window: exact for contexts of {found['exact_up_to']} tokens")
    for line in engine.notes(found):
        progress.say(line)
    return output.path


def _stored_dtype(source: Checkpoint, engine: Engine, dtype: str) -> str:
    """The dtype of the stored weights; no other engine takes float64. Raises SettingError."""
    stored = source.spec(source.family.tensor(next(iter(source.shape.sites)), "o")).dtype
    if engine.keeps_dtype and dtype not in ("source", stored):
        raise SettingError(f"the weights stay {stored}", where="dtype", got=dtype, next="leave it out")
    weights = stored if dtype == "source" else dtype
    return "float32" if weights == "float64" and not engine.keeps_dtype else weights


def _make(
    source: Checkpoint, engine: Engine, folder: Path, weights: str, settings: ExportSettings, progress: Progress
) -> dict[str, Any]:
    """Write the engine's files and compare; returns the findings. Raises UnsupportedModel when they disagree."""
    from kvfold.hf import load  # imports transformers

    window, room, known = limits.window(source), source.shape.max_positions, None
    room = min(room, window or room)
    new_tokens = max(1, min(settings.new_tokens, room // 2))
    prompt_tokens = max(1, min(settings.prompt_tokens, room - new_tokens))
    found: dict[str, Any] = {
        "engine": engine.version(),
        "weights": weights,
        "exact_up_to": None if engine.knows_windows else window,
        "loaded": engine.loadable(),
    }
    with task(progress, f"exporting to {engine.name}", 3, "steps"):
        model = load(source.path, attention=engine.attention) if found["loaded"] else None
        if model is not None:
            prompts = agreement.random_prompts(source.shape.vocab_size, prompt_tokens)
            known = agreement.reference(model, prompts, new_tokens=new_tokens)
        progress.advance(1, "transformers answered")
        found |= engine.write(source, model, folder, weights)
        del model
        progress.advance(1, "written")
        found |= engine.inspect(source, folder, weights)
        if known is not None:
            found |= agreement.compare(known, *engine.answer(folder, known, weights))
            agreement.require(found, engine.name, engine.precision(source, weights), engine.advice(weights))
        progress.advance(1, "compared")
    return found
