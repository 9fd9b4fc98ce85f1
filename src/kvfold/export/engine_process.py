"""An engine in a Python of its own: it reads a script from standard input, and answers one JSON object.

Neither kvfold nor its dependencies need to be installed there. Nothing is downloaded, and servers bind to loopback.

The question: `model` (a path), `prompts` (ids of one length), `new_tokens`, `dtype`, `threads`, `top`, and `options` of
the engine. The answer: `version`, `answers` (ids), `logits` (of each answer and step, `[id, logit]` of the `top` best)
and, where the engine gives it, `cache_bytes_per_token`; or `error`, and `missing` where a module is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.agreement import Logits, Reference

TOP = 20  # logits of a step: the largest number that vLLM gives by default

_MAIN = """
import json, os, sys
stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the engine prints is no answer
try:
    found = answer(json.loads(sys.argv[1]))
except ImportError as error:
    found = {"error": str(error), "missing": error.name}
except Exception as error:
    found = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(found), file=stdout, flush=True)
"""

_OFFLINE = {
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONSAFEPATH": "1"},
    **{"VLLM_HOST_IP": "127.0.0.1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"},
}


@dataclass(frozen=True)
class Answered:
    """The answer of an engine: logits are masked where it gives none."""

    version: str
    logits: list[Logits]
    answers: list[list[int]]
    cache_bytes_per_token: float | None = None


@dataclass(frozen=True)
class EngineProcess:
    """An engine that a script asks: its name, the module that it imports, and how to install it."""

    name: str
    module: str
    install: str
    script: str  # a file beside this one
    advice: str | None = None  # where it cannot run a model

    def ask(
        self,
        model: Path,
        known: Reference,
        dtype: str,
        threads: int,
        python: str | None = None,
        options: Mapping[str, Any] = {},
    ) -> Answered:
        """Continue the prompts of `known` in `python`, by default this one. `options` are the engine's own.

        Raises SettingError if the engine is not installed there, and UnsupportedModel if it cannot run the model.
        """
        python = python or sys.executable
        count = len(known.answers[0])
        asked = {"model": str(model.resolve()), "prompts": known.prompts, "new_tokens": count, "dtype": dtype}
        script = (Path(__file__).parent / self.script).read_text(encoding="utf-8") + _MAIN
        try:
            done = subprocess.run(
                [python, "-", json.dumps({**asked, "threads": threads, "top": TOP, "options": dict(options)})],
                input=script,
                env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **_OFFLINE},
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise SettingError(
                f"cannot be run: {error.strerror}", where=python, next=f"name the Python that has {self.name}"
            ) from error
        return self._read(done, python, known)

    def _read(self, done: subprocess.CompletedProcess[str], python: str, known: Reference) -> Answered:
        found = _object(done.stdout)
        if found.get("missing") == self.module:
            raise SettingError(
                f"{self.name} is not installed in this Python", where=python, next=f"{self.install}, or name another"
            )
        if "answers" not in found:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            reason = " ".join(str(found.get("error", f"it stopped: {last}")).split())
            reason = reason.partition(" Supported architectures: ")[0]  # vLLM lists all
            raise UnsupportedModel(f"{self.name} cannot run the model: {reason[-300:]}", next=self.advice)
        if [len(each) for each in found["answers"]] != [len(each) for each in known.answers]:
            raise UnsupportedModel(f"{self.name} answers with another number of tokens")
        logits = [
            _dense(known, number, steps, found["answers"][number]) for number, steps in enumerate(found["logits"])
        ]
        return Answered(found["version"], logits, found["answers"], found.get("cache_bytes_per_token"))


def _object(text: str) -> dict[str, Any]:
    """The last line as a JSON object; an empty one if it is none."""
    try:
        found = json.loads((text.strip().splitlines() or ["{}"])[-1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _dense(known: Reference, number: int, steps: list[list[tuple[int, float]]], answer: list[int]) -> Logits:
    """The logits that an engine gives for an answer, in an array as transformers', up to the first other token."""
    rows = known.logits[number]
    values = np.zeros_like(rows)
    masked = np.ones(rows.shape, dtype=bool)
    for step, given in enumerate(steps):
        for token, logit in given:
            values[known.before(number) + step, token] = logit
            masked[known.before(number) + step, token] = False
        if answer[step] != known.answers[number][step]:
            break
    return np.ma.masked_array(values, masked)
