"""Faults of the machine: in whatever error they hide they are one line, and the same command goes on afterwards."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from kvfold.cli import main
from kvfold.convert.conversion import convert
from kvfold.errors import Interrupted, OutputError
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.faults import disk_errors, fault_of
from kvfold.predict.roofline import Hardware
from kvfold.progress import SILENT
from kvfold.report import report
from kvfold.text import tokens
from kvfold.text.tokens import text_facts, token_file
from kvfold.train import state
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]

QUICK: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "tokens": 192, "loss": "ce", "checkpoint_steps": 1}
LARGE = {"a": torch.zeros(1000, 100)}


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as a full disk would: the system's own refusal, EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(LARGE, file)


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.zeros(50_000).tofile(file)


def _tokenizer(path: Path) -> None:
    words = {f"word {number}": number for number in range(5000)}
    Tokenizer(models.WordLevel(vocab=words, unk_token="word 0")).save(str(path))


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": _torch,
    "torch-by-name": lambda path: torch.save(LARGE, path),
    "safetensors": lambda path: save_file(LARGE, path),
    "numpy": _numpy,
    "numpy-archive": lambda path: np.savez(path, a=np.zeros(50_000)),
    "tokenizers": _tokenizer,
    "python": lambda path: path.write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_to_its_end_is_one_line(writer: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, largest_file(4096), disk_errors(tmp_path):
        WRITERS[writer](tmp_path / "file.npz")
    line = str(caught.value)
    assert line.startswith(str(tmp_path))
    assert "larger than the system allows" in line or "could not be written to its end" in line
    assert "\n" not in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("writer", ["torch", "numpy", "python"])
def test_a_full_disk_is_one_line(writer: str) -> None:
    with pytest.raises(OutputError, match="disk is full|is the disk full"), disk_errors("out"):
        WRITERS[writer](Path("/dev/full"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "x"), "too many files are open; raise the limit (ulimit -n)"),
        (OSError(errno.ENFILE, "x"), "too many files are open on this machine"),
        (OSError(errno.EFBIG, "x"), "the file is larger than the system allows; raise the limit (ulimit -f)"),
        (OSError(errno.EIO, "x"), "the disk cannot be read or written"),
        (OSError(errno.ENOMEM, "x"), "the memory is used up"),
        (MemoryError(), "the memory is used up"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory is used"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the memory is used up"),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError("4096 requested and 12 written"), "could not be written to its end: is the disk full?"),
        (OSError(errno.EACCES, "x"), None),
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (ValueError("28"), None),
        (KeyError("os error"), None),
        (RuntimeError("shapes do not fit"), None),
    ],
)
def test_what_is_the_machines_fault(error: Exception, said: str | None) -> None:
    found = fault_of(error, "out")
    assert (found is None) == (said is None)
    if said is not None:
        assert said in str(found)
        assert found is not None
        assert found.exit_code == 2


def test_a_mistake_of_ours_behind_a_refusal_keeps_its_traceback(tmp_path: Path) -> None:
    def handle() -> None:
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError:
            {}["a"]

    with pytest.raises(KeyError), disk_errors(tmp_path):
        handle()
    with pytest.raises(IsADirectoryError):
        tmp_path.write_text("x")
    with pytest.raises(OutputError, match="a directory is there"), disk_errors(tmp_path):
        tmp_path.write_text("x")


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open", 2),
        (MemoryError(), "the memory is used up", 2),
        (OSError(errno.ENOSPC, "No space left"), "the disk is full", 2),
    ],
)
def test_wherever_the_machine_fails_a_command_ends_in_one_line(
    error: Exception, said: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(import_module("kvfold.predict.plan"), "plan", fail)
    assert main.run_command(["plan", "anything", "--kv-heads", "1"]) == code
    signal.signal(signal.SIGTERM, before)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said in shown.err


# --- whole stages ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("limit", "background"), [(30_000, False), (30_000, True), (110_000, False)])
def test_a_training_whose_disk_was_full_goes_on_to_the_same_weights(
    tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, background: bool
) -> None:
    monkeypatch.setattr(state, "background", lambda content: background)
    teacher, settings = tiny_checkpoint(), UptrainSettings(data=str(text), **QUICK)
    token_file(text, teacher)  # the cache is warm: what is full is the disk of the run
    with (
        pytest.raises(OutputError, match=r"out.partial: the file is larger than the system allows"),
        largest_file(limit),
    ):
        uptrain(teacher, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    made, other = uptrain(teacher, tmp_path / "out", settings), uptrain(teacher, tmp_path / "other", settings)
    ours, theirs = (load_file(path / "model.safetensors") for path in (made, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "package"), [("gguf", "gguf"), ("ctranslate2", "ctranslate2")])
@pytest.mark.parametrize("limit", [4096, 100_000])
def test_an_export_whose_disk_is_full_leaves_nothing(
    engine: str, package: str, limit: int, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    from kvfold.export.exporting import ExportSettings, export

    teacher = tiny_checkpoint()
    with pytest.raises(OutputError) as caught, largest_file(limit):
        export(teacher, tmp_path / "out", engine, ExportSettings("float32", 12, 4))
    assert "larger than the system allows" in str(caught.value) or "written to its end" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    export(teacher, tmp_path / "out", engine, ExportSettings("float32", 12, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher"]


FULL = """
import sys
from pathlib import Path
import kvfold.cli.main
sys.exit(kvfold.cli.main.run_command(["convert", sys.argv[1], str(Path(sys.argv[2]) / "out"), "--kv-heads", "2"]))
"""


@pytest.mark.slow
def test_a_small_file_system_that_fills_up_is_one_line(tiny_checkpoint: Make, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = f'mount -t tmpfs -o size=4k,nr_inodes=20 none {small} && exec "$0" -c "$1" "$2" {small}'
    command = ["unshare", "-rm", "sh", "-c", mounted, sys.executable, FULL, str(tiny_checkpoint())]
    try:
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(small)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a mount of its own")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvfold: ")
    assert "not enough space on the disk" in done.stderr or "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_second_ctrl_c_during_a_save_loses_nothing(
    tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint()
    settings = UptrainSettings(data=str(text), **QUICK)
    saves = iter(range(10))

    def pressed(*given: Any) -> None:
        """Write a slot; while the second is written, Ctrl-C is pressed twice."""
        if next(saves) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        save_file(*given)

    monkeypatch.setattr(state, "save_file", pressed)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        uptrain(teacher, tmp_path / "out", settings)
    monkeypatch.undo()
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    assert not (tmp_path / "out").exists()
    made, other = uptrain(teacher, tmp_path / "out", settings), uptrain(teacher, tmp_path / "other", settings)
    ours, theirs = (load_file(path / "model.safetensors") for path in (made, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_ctrl_c_that_a_library_makes_an_error_of_is_still_one() -> None:
    def save() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as PyTorch's writer does when its file is closed

    with pytest.raises(Interrupted, match="stopped; the same command continues"), disk_errors("out"):
        save()


# --- two at once ----------------------------------------------------------------------------------------------------


def test_two_trainings_of_one_tokenizer_agree_on_the_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process is done while the first is about to put its own in place."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    pretrain: Any = import_module("kvfold.train.pretrain")
    facts, prepare, other = text_facts(text), pretrain.prepare_cache, []

    def train() -> Any:
        return pretrain.train_tokenizer([str(text)], facts, 300, 64, SILENT)

    def late(folder: Path) -> None:
        monkeypatch.setattr(pretrain, "prepare_cache", prepare)
        other.append(train())
        other.append((other[0] / "tokenizer.json").stat().st_ino)
        prepare(folder)

    monkeypatch.setattr(pretrain, "prepare_cache", late)
    made = train()
    assert [made, (made / "tokenizer.json").stat().st_ino] == other
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_two_tokenisations_of_one_text_agree(
    text: Path, byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, other = tokens.prepare_cache, []

    def late(folder: Path) -> None:
        monkeypatch.setattr(tokens, "prepare_cache", prepare)
        other.append(token_file(text, byte_tokenizer, cache_dir=tmp_path / "cache"))
        prepare(folder)

    monkeypatch.setattr(tokens, "prepare_cache", late)
    made = token_file(text, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert made.path == other[0].path
    assert np.array_equal(made.tokens, other[0].tokens)
    assert not list(made.path.parent.glob("*.tmp"))


def test_a_cold_cache_is_left_whole_by_a_full_disk(text: Path, byte_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="larger than the system allows"), largest_file(1000):
        token_file(text, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(token_file(text, byte_tokenizer, cache_dir=tmp_path / "cache")) > 1000


def test_a_conversion_whose_disk_is_full_goes_on(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    with pytest.raises(OutputError, match="larger than the system allows"), largest_file(50_000):
        convert(teacher, tmp_path / "out", "gqa", {"kv_heads": 2})
    made = convert(teacher, tmp_path / "out", "gqa", {"kv_heads": 2})
    other = convert(teacher, tmp_path / "other", "gqa", {"kv_heads": 2})
    assert (made / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_measurements_and_reports_on_a_full_disk_leave_nothing_half_written(
    tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Hardware("local", "made-up", 10**9, 1e9, {"float32": 1e30})  # measuring this one takes seconds
    for module in ("bench", "timing"):
        monkeypatch.setattr(import_module(f"kvfold.evaluate.{module}"), "hardware", lambda name: made)
    teacher, records = tiny_checkpoint(), tmp_path / "records"
    asked = EvaluateSettings(str(text), tokens=300, sequence_length=64, copy_trials=2, samples=0)
    timed = BenchSettings((4,), (1,), new_tokens=1, repeats=1, fp8=False)
    token_file(text, teacher, max_tokens=301)  # what fails is the record
    for measure in (
        lambda: evaluate(teacher, asked, records=records),
        lambda: bench([teacher], timed, records=records),
        lambda: report(records),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with (
            pytest.raises(OutputError, match="the file is larger than the system allows") as caught,
            largest_file(1000),
        ):
            measure()
        assert "\n" not in str(caught.value)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for unfinished in [path for path in after if path.suffix == ".partial"]:  # with whole measurements
            assert "kvfold_measures" in json.loads(after.pop(unfinished))
        assert after == before
        measure()
        assert not list(records.glob("*.partial"))
    assert (records / "report.html").is_file()
