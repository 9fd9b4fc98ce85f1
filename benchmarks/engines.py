"""Build llama.cpp from source, fold a checkpoint, and compare what the engines compute with transformers.

`make engines`, or: python benchmarks/engines.py [--checkpoint DIR] [--kv-heads 2] [--mixed 4/1/...] [--results results]

llama-cpp-python is built from its source package, which carries llama.cpp with its own converter. A student is
written as GGUF twice, by that converter and by `kvfold export`; the tensors of the two files are compared bit by bit,
and the logits of both with those of transformers. CTranslate2 is compared the same way. There are two students, one
with the same number of key/value heads in every layer and a mixed one, and one record for each student and engine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import kvfold
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, KvfoldError
from kvfold.export import agreement, limits
from kvfold.export.exporting import ExportSettings, export
from kvfold.export.gguf import LlamaCpp, byte_level_split
from kvfold.hf import load
from kvfold.progress import Silent

LLAMA_CPP_PYTHON = "0.3.36"
DEMO = Path(kvfold.__file__).parent / "assets" / "demo"
DEMO_MIXED = "4/1/1/2/2/1/2/4"

# Runs apart, on the gguf-py and the converter classes of the source package. The converter knows a tokenizer by the
# hash of how it splits a sample text; a vocabulary of one's own is on no list, so a subclass names the split instead.
# Of a DeciLM it takes every vocabulary for a SentencePiece one, except those of Llama 3's size.
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
if base.model_arch == gguf.MODEL_ARCH.DECI and split != "default":
    Model.set_vocab = base._set_vocab_gpt2
with torch.inference_mode():
    Model(Path(model), gguf.LlamaFileType[kind], Path(out)).write()
"""


class Lines(Silent):
    """Prints lines of progress."""

    def say(self, line: str) -> None:
        """Print one line."""
        print(f"  {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="the teacher (default: the one in the package)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads of the first student")
    parser.add_argument("--mixed", help=f"those of each layer of the second (the default checkpoint: {DEMO_MIXED})")
    parser.add_argument("--build", type=Path, default=Path("build/engines"), help="where sources and exports lie")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the records go")
    given = parser.parse_args()
    try:
        tree, built = build(given.build)
        measure(given.checkpoint, given.kv_heads, given.build, given.results, tree, built)
        if mixed := given.mixed or (DEMO_MIXED if given.checkpoint == DEMO else None):
            measure(given.checkpoint, mixed, given.build, given.results, tree, built)
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


def measure(teacher: Path, kv_heads: int | str, folder: Path, results: Path, tree: Path, built: float | None) -> None:
    """Fold, export, compare and write the records. Raises CheckpointError when the two GGUF files differ."""
    started, heard, mixed = time.monotonic(), Lines(), isinstance(kv_heads, str)
    folder, ending = (folder / "mixed", "-mixed") if mixed else (folder, "")
    student = convert(teacher, folder / "student", settings={"kv_heads": kv_heads}, overwrite=True, progress=heard)
    source = Checkpoint.open(student)
    settings = {"teacher": teacher.name, "method": "gqa", "kv_heads": kv_heads, "prompt_tokens": 40, "new_tokens": 16}
    hashes = {"student": source.hash(), "teacher": source.root_hash()}

    def keep(name: str, metrics: dict[str, Any]) -> None:
        seconds = time.monotonic() - started
        made = record.make("engine", name + ending, settings, metrics, hashes=hashes, wall_seconds=seconds)
        print(f"{name}: {record.write(made, results)}", flush=True)

    print(f"llama.cpp, key/value heads {kv_heads}", flush=True)
    dtypes = ("float32", "source", "int8")
    # not int8: this build of llama.cpp takes the process down with it on a processor with AMX (docs/log.md)
    rows = [row("kvfold export", student, folder / "gguf", "gguf", dtype, heard) for dtype in dtypes[:2]]
    official = convert_officially(source, folder / "official", tree)
    same = same_tensors(folder / "gguf-float32", official)
    rows.append({"written_by": "convert_hf_to_gguf", **compared(source, official)})
    print(f"  its own converter: {same} tensors, the same bits as ours; logits as above: {difference(rows[-1])}")
    if mixed:  # flash attention is what keeps each layer's V as narrow as its heads
        flash = compared(source, folder / "gguf-float32", "float16", flash_attention=True)
        rows.append({"written_by": "kvfold export", "attention": "flash", **flash})
        print(f"  with flash attention: logits {difference(flash)}")
    version = f"llama-cpp-python {LLAMA_CPP_PYTHON}"
    keep(
        "llama.cpp", {"version": version, "build_seconds": built, "tensors_equal_to_its_converter": same, "rows": rows}
    )

    print(f"CTranslate2, key/value heads {kv_heads}", flush=True)
    rows = [row("kvfold export", student, folder / "ctranslate2", "ctranslate2", dtype, heard) for dtype in dtypes]
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
    split = byte_level_split(tokenizer) or "default"
    heads = limits.kv_heads(source)
    model = as_deci(source, heads, out / "deci") if len(set(heads)) > 1 else source.path
    words = [str(tree), str(model), str(out / LlamaCpp.file), "ALL_F32", split]
    subprocess.run([sys.executable, "-c", CONVERTER, *words], check=True)
    return out


def as_deci(source: Checkpoint, heads: list[int], folder: Path) -> Path:
    """The same checkpoint as a DeciLM, the architecture that llama.cpp's converter knows mixed heads by."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.path.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    said = ("num_key_value_heads", "per_layer_config")
    kept = {key: value for key, value in source.config.items() if key not in said}
    own = {"model_type": "deci", "architectures": ["DeciLMForCausalLM"], "num_key_value_heads_per_layer": heads}
    (folder / "config.json").write_text(json.dumps(kept | own), encoding="utf-8")
    return folder


def compared(
    source: Checkpoint, folder: Path, tolerance: str = "float32", *, flash_attention: bool = False
) -> dict[str, Any]:
    """Load a float32 GGUF in llama.cpp and compare it with transformers, within what that precision is allowed."""
    defaults = ExportSettings()
    known = agreement.reference(
        load(source.path, attention="sdpa"),
        agreement.random_prompts(source.shape.vocab_size, defaults.prompt_tokens),
        new_tokens=defaults.new_tokens,
    )
    found = agreement.compare(known, *LlamaCpp(flash_attention=flash_attention).answer(folder, known, "float32"))
    agreement.require(found, LlamaCpp.name, tolerance)
    return {"weights": "float32", **found, "loaded": True}


def difference(found: dict[str, Any]) -> str:
    """A row's largest difference, in words."""
    return f"within {found['max_difference']:.2g}"


def same_tensors(ours: Path, theirs: Path) -> int:
    """The number of tensors, all equal to the last bit. Raises CheckpointError for the first that is not."""
    import gguf

    first, second = (
        {each.name: each for each in gguf.GGUFReader(folder / LlamaCpp.file).tensors} for folder in (ours, theirs)
    )
    if first.keys() != second.keys():
        raise CheckpointError("the two converters write other tensors", got=sorted(first.keys() ^ second.keys()))
    for name, tensor in first.items():
        if tensor.tensor_type != second[name].tensor_type or tensor.data.tobytes() != second[name].data.tobytes():
            raise CheckpointError(f"the two converters write another {name}")
    return len(first)


if __name__ == "__main__":
    sys.exit(main())
