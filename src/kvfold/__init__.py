"""kvfold folds the KV cache of trained transformers.

Public names are imported when they are first used: `import kvfold` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "plan": "kvfold.predict.plan",
    "inspect": "kvfold.inspection.inspection",
    "convert": "kvfold.convert.conversion",
    "uptrain": "kvfold.train.uptrain",
    "pretrain": "kvfold.train.pretrain",
    "evaluate": "kvfold.evaluate.evaluation",
    "bench": "kvfold.evaluate.bench",
    "cloze": "kvfold.text.cloze",
    "compare": "kvfold.compare.comparison",
    "report": "kvfold.report",
    "export": "kvfold.export.exporting",
    "serve_check": "kvfold.export.serve_check",
    "run": "kvfold.run.runner",
    "load": "kvfold.hf",
    "FusionInDecoder": "kvfold.hf",
    "PlanSettings": "kvfold.predict.plan",
    "InspectSettings": "kvfold.inspection.settings",
    "ConvertSettings": "kvfold.convert.settings",
    "UptrainSettings": "kvfold.train.settings",
    "PretrainSettings": "kvfold.train.settings",
    "EvaluateSettings": "kvfold.evaluate.settings",
    "BenchSettings": "kvfold.evaluate.settings",
    "ClozeSettings": "kvfold.text.cloze",
    "CompareSettings": "kvfold.compare.settings",
    "ServeSettings": "kvfold.export.settings",
    "KvfoldError": "kvfold.errors",
}

__all__ = ["__version__", *sorted(_WHERE)]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """`kvfold.convert` is the function; the package of that name is imported by `from kvfold.convert import ...`."""

    def __setattr__(self, name: str, value: object) -> None:
        # the import system binds each submodule to its package, which would hide the function of the same name
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
