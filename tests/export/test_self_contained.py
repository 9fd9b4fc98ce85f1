"""Checkpoints with their own code: a process without kvfold computes what kvfold computes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvfold
from exports import QUICK, Make, found
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export import self_contained
from kvfold.export.exporting import export
from kvfold.export.self_contained import _closure, _path
from kvfold.families import all_families, module_of

PACKAGE = Path(kvfold.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}


FORKS = """
import os, runpy, sys
sys.modules["kvfold"] = None
import numpy, torch, transformers
transformers.LlamaForCausalLM, transformers.T5ForConditionalGeneration  # are loaded when they are named
for line in sys.stdin:
    if not (child := os.fork()):
        sys.argv = line.rstrip("\\n").split("\\t")
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`subprocess` whose `run` runs a script in a fork of one process without kvfold that has loaded transformers.

    `tests/disk/test_sidecar.py` exports with a process of its own, as a user does.
    """
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    command = [sys.executable, "-P", "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:

        def run(command: list[str], **options: Any) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\t".join(command[2:]) + "\n")
            process.stdin.flush()
            return SimpleNamespace(returncode=int(process.stdout.readline()), stderr="the child's, above")

        yield SimpleNamespace(run=run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("t5", "gqa", {"kv_heads": "self=2,cross=1"}),
        ("t5gemma", "crosslatent", {}),
        ("bart", "gqa", {"kv_heads": "self=4/2/1/2,cross=2"}),
        ("qwen3", "supra", {"preset": "hybrid", "window": 4, "sinks": 2}),
        ("llama", "elitekv", {"rope_chunks": 1, "latent_dim": 16, "search": "uniform", "metric": "weights"}),
        ("qwen2", "cla", {"share": 2}),
        ("starcoder2", "gqa", {"kv_heads": "4/2/1/2"}),
    ],
    ids=["t5", "latent", "bart", "sums", "elitekv", "cla", "of a table"],
)
def test_a_student_takes_its_code_along(
    family: str,
    method: str,
    settings: dict[str, Any],
    forks: Any,
    tiny_checkpoint: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The export itself compares with a process that cannot import kvfold."""
    import torch

    from kvfold import hf

    monkeypatch.setattr(self_contained, "subprocess", forks)
    student = convert(tiny_checkpoint(family), tmp_path / "student", method, settings)
    out = export(student, tmp_path / f"{family}-{method}", "transformers", QUICK)  # names the module of its code
    assert found(out)["same_tokens"] == found(out)["tokens"] > 0
    assert found(out)["max_difference"] < 1e-3
    assert not any("from kvfold." in path.read_text() for path in out.glob("*.py"))
    ours, theirs = (hf.load(each).state_dict() for each in (student, out))  # kvfold reads it as it reads the student
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert Checkpoint.open(out).hash() != Checkpoint.open(student).hash()  # of another config.json


@pytest.mark.slow
def test_value_heads_of_their_own_take_their_code_along(
    forks: Any, layered_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_contained, "subprocess", forks)
    student = layered_checkpoint("llama", (2, 4, 1, 2), None, ((0, 1, 1, 0), None, (0, 1, 2, 3), (1, 0, 1, 0)))
    out = export(student, tmp_path / "decoupled", "transformers", QUICK)
    assert found(out)["same_tokens"] == found(out)["tokens"] > 0
    assert found(out)["max_difference"] < 1e-3


def test_a_student_that_needs_no_code_is_not_given_any(tiny_checkpoint: Make, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 2})
    with pytest.raises(UnsupportedModel, match="which transformers loads without kvfold; it needs no code: copy it"):
        export(student, tmp_path / "out", "transformers", QUICK)
    mixed = convert(tiny_checkpoint("llama", name="other"), tmp_path / "mixed", "gqa", {"kv_heads": "4/2/1/2"})
    with pytest.raises(SettingError, match="the weights stay float32"):
        export(mixed, tmp_path / "out", "transformers", replace(QUICK, dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_copied_code_imports_names_and_no_modules() -> None:
    """A copy lies flat beside the checkpoint, where `from kvfold.package import module` finds nothing."""
    families = {f"kvfold.families.{module_of(name)}" for name in all_families()}
    runtimes = {f"kvfold.hf.{entry}" for entry in ("per_layer", "latent", "linear", "encoder_decoder")}
    for module in _closure(*runtimes, *families):
        for node in ast.walk(ast.parse(_path(module).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvfold":
                assert node.module != "kvfold", module
                modules = {f"{node.module}.{each.name}" for each in node.names} & MODULES
                assert not modules, f"{module} imports modules: {modules}"
            assert not (isinstance(node, ast.Import) and any(each.name.startswith("kvfold") for each in node.names))
