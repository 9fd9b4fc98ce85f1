"""Build llama.cpp from source, fold a checkpoint, and compare what the engines compute with transformers.

`make engines`, or: python benchmarks/engines.py [--checkpoint DIR] [--kv-heads 2] [--results results]

llama-cpp-python is built from its source package, which carries llama.cpp with its own converter. The student is
written as GGUF twice, by that converter and by `kvfold export`; the tensors of the two files are compared bit by bit,
and the logits of both with those of transformers. CTranslate2 is asked the same. One record for each engine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import kvfold
from kvfold import record
from kvfold.checkpoint import Checkpoint
from kvfold.convert import convert
from kvfold.errors import CheckpointError, KvfoldError
from kvfold.export import ExportSettings, agreement, export
from kvfold.export import gguf as ggufs
from kvfold.hf import load
from kvfold.progress import Silent

LLAMA_CPP_PYTHON = "0.3.36"
DEMO = Path(kvfold.__file__).parent / "assets" / "demo"

# Runs apart, on the gguf-py and the converter classes of the source package. The converter knows a tokenizer by the
# hash of how it splits a sample text; a vocabulary of one's own is on no list, so a subclass names the split instead.
CONVERTER = """
import sys
from pathlib import Path
tree, model, out, kind, split = sys.argv[1:]
sys.path[:0] = [tree, f"{tree}/gguf-py"]
import torch, gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
hparams = ModelBase.load_hparams(Path(model), False)
base = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
class Model(base):
    model_arch = base.model_arch
    def get_vocab_base_pre(self, tokenizer):
        try:
            return super().get_vocab_base_pre(tokenizer)
        except NotImplementedError:
            print(f"tokenizer not on the converter's list: named {split}")
            return split
with torch.inference_mode():
    Model(Path(model), gguf.LlamaFileType[kind], Path(out)).write()
"""


class Lines(Silent):
    """Prints what is said."""

    def say(self, line: str) -> None:
        """Print one line."""
        print(f"  {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="the teacher (default: the one in the package)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads of the student")
    parser.add_argument("--build", type=Path, default=Path("build/engines"), help="where sources and exports lie")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the records go")
    given = parser.parse_args()
    try:
        tree, built = build(given.build)
        measure(given.checkpoint, given.kv_heads, given.build, given.results, tree, built)
    except KvfoldError as error:
        print(f"engines: {error}", file=sys.stderr)
        return error.exit_code
    return 0


# --- building -------------------------------------------------------------------------------------------------------


def build(folder: Path) -> tuple[Path, float | None]:
    """Have llama-cpp-python installed from its source package; returns llama.cpp's tree and the seconds it took."""
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / f"{name}.tar.gz"
    if not package.is_file():
        print(f"downloading the source of llama-cpp-python {LLAMA_CPP_PYTHON} (77 MB)", flush=True)
        wanted = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), wanted)
    tree = folder / name / "vendor" / "llama.cpp"
    if not (tree / "convert_hf_to_gguf.py").is_file():
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
    if installed() == LLAMA_CPP_PYTHON:
        return tree.resolve(), None
    print("building it (7 minutes on 2 cores)", flush=True)
    started = time.monotonic()
    pip("install", "--no-binary", "llama-cpp-python", str(package))
    return tree.resolve(), time.monotonic() - started


def installed() -> str | None:
    """The version of llama-cpp-python that is installed."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*words: str) -> None:
    """Run pip of this Python, with the project's pinned versions."""
    pins = Path(__file__).parent.parent / "constraints.txt"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": str(pins)})


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(teacher: Path, kv_heads: int, folder: Path, results: Path, tree: Path, built: float | None) -> None:
    """Fold, export, compare and write the records. Raises CheckpointError when the two GGUF files differ."""
    started, heard = time.monotonic(), Lines()
    student = convert(teacher, folder / "student", settings={"kv_heads": kv_heads}, overwrite=True, progress=heard)
    source = Checkpoint.open(student)
    settings = {"teacher": teacher.name, "method": "gqa", "kv_heads": kv_heads, "prompt_tokens": 40, "new_tokens": 16}
    hashes = {"student": source.hash(), "teacher": source.root_hash()}

    def keep(name: str, metrics: dict[str, Any]) -> None:
        seconds = time.monotonic() - started
        made = record.make("engine", name, settings, metrics, hashes=hashes, wall_seconds=seconds)
        print(f"{name}: {record.write(made, results)}", flush=True)

    print("llama.cpp", flush=True)
    rows = [row("kvfold export", student, folder / "gguf", "gguf", dtype, heard) for dtype in ("float32", "source")]
    official = convert_officially(source, folder / "official", tree)
    same = same_tensors(folder / "gguf-float32", official)
    rows.append({"written_by": "convert_hf_to_gguf", **compared(source, official)})
    print(f"  its own converter: {same} tensors, the same bits as ours; logits as above: {difference(rows[-1])}")
    version = f"llama-cpp-python {LLAMA_CPP_PYTHON}"
    keep(
        "llama.cpp", {"version": version, "build_seconds": built, "tensors_equal_to_its_converter": same, "rows": rows}
    )

    print("CTranslate2", flush=True)
    rows = [
        row("kvfold export", student, folder / "ctranslate2", "ctranslate2", dtype, heard)
        for dtype in ("float32", "source", "int8")
    ]
    keep("ctranslate2", {"version": rows[0]["engine"], "rows": rows})


def row(by: str, student: Path, out: Path, to: str, dtype: Any, heard: Lines) -> dict[str, Any]:
    """Export at one precision; what its comparison with transformers found."""
    made = export(student, f"{out}-{dtype}", to, ExportSettings(dtype), overwrite=True, progress=heard)
    step = json.loads((made / "kvfold.json").read_text(encoding="utf-8"))["steps"][-1]
    return {"written_by": by, **step["check"]}


def convert_officially(source: Checkpoint, out: Path, tree: Path) -> Path:
    """A float32 GGUF of the student, by the converter that llama.cpp carries."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((source.path / "tokenizer.json").read_text(encoding="utf-8"))
    split = ggufs.byte_level_split(tokenizer) or "default"
    words = [str(tree), str(source.path), str(out / ggufs.FILE), "ALL_F32", split]
    subprocess.run([sys.executable, "-c", CONVERTER, *words], check=True)
    return out


def compared(source: Checkpoint, folder: Path) -> dict[str, Any]:
    """Load a GGUF in llama.cpp and compare it with transformers, as `kvfold export` does."""
    defaults = ExportSettings()
    known = agreement.reference(
        load(source.path, attention="sdpa"),
        vocab_size=source.shape.vocab_size,
        prompt_tokens=defaults.prompt_tokens,
        new_tokens=defaults.new_tokens,
    )
    found = agreement.compare(known, *ggufs.answer(folder, known, "float32"))
    agreement.require(found, ggufs.NAME, "float32")
    return {"weights": "float32", **found, "loaded": True}


def difference(found: dict[str, Any]) -> str:
    """A row's largest difference, in words."""
    return f"within {found['max_difference']:.2g}"


def same_tensors(ours: Path, theirs: Path) -> int:
    """The number of tensors, all equal to the last bit. Raises CheckpointError for the first that is not."""
    import gguf

    first, second = (
        {each.name: each for each in gguf.GGUFReader(folder / ggufs.FILE).tensors} for folder in (ours, theirs)
    )
    if first.keys() != second.keys():
        raise CheckpointError("the two converters write other tensors", got=sorted(first.keys() ^ second.keys()))
    for name, tensor in first.items():
        if tensor.tensor_type != second[name].tensor_type or tensor.data.tobytes() != second[name].data.tobytes():
            raise CheckpointError(f"the two converters write another {name}")
    return len(first)


if __name__ == "__main__":
    sys.exit(main())
