"""Commands on several ranks: `--gpus`, torchrun, what their numbers are, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvfold.cli.main import run_command
from kvfold.disk import record
from kvfold.ranks import VARIABLES

KVFOLD = [sys.executable, "-m", "kvfold"]
TORCHRUN = [*KVFOLD[:2], "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kvfold"]


@pytest.fixture(autouse=True)
def _without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"Chapter {n}: the {n * n} sheep went by, {n % 7} at a time.\n" for n in range(160)))
    return path


def started(*words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=1200)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_two_ranks_has_the_numbers_of_one(
    tiny_checkpoint: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration, sensitivity, repair and evaluation share the rows, and compute what one rank does."""
    source = tiny_checkpoint(num_hidden_layers=2)
    convert = {
        "kv_heads": "auto",
        "budget": 0.75,
        "calibration": str(story),
        "repair": ["q", "o", "gate", "up", "down"],
    }
    lengths = {"calibration_length": 64, "repair_length": 32, "calibration_tokens": 8000, "sensitivity_tokens": 512}
    evaluate = {"tokens": 600, "sequence_length": 64, "copy_distances": [16], "batch_size": 2, "last_words": 5}
    recipe = tmp_path / "tiny.yaml"
    texts = {"source": str(source), "data": str(story), "heldout": str(story)}
    stages = {"convert": {**convert, **lengths}, "evaluate": {**evaluate, "samples": 1}}
    recipe.write_text(json.dumps({"name": "tiny", **texts, **stages}))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    monkeypatch.chdir(one)
    assert run_command(["run", str(recipe)]) == 0
    monkeypatch.chdir(two)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))  # without the answers of one rank
    done = started(*KVFOLD, "run", recipe, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("repairing: 2 layers\n") == 1  # one rank shows progress
    for name in ("kvfold.json", "config.json"):
        known = [json.loads(next(folder.glob(f"runs/tiny/converted/*/{name}")).read_text()) for folder in (one, two)]
        assert known[0].get("inputs") == known[1].get("inputs")
    mine, theirs = (tensors(next(folder.glob("runs/tiny/converted/*"))) for folder in (one, two))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (theirs[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    records = [record.read_all(folder / "runs/tiny/records") for folder in (one, two)]
    assert len(records[0]) == 3  # the plan, the teacher and the student
    for own, other in zip(*records, strict=True):
        assert other.identity == own.identity
        assert _differences(other.metrics, own.metrics) == []


def _differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two records differ by more than rounding: another number of threads adds in another order."""
    if isinstance(one, dict):
        return [line for key in one.keys() | other.keys() for line in _differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list):
        return _differences(dict(enumerate(one)), dict(enumerate(other)), at)
    if at.endswith("seconds"):
        return []
    same = one == pytest.approx(other, rel=1e-5, abs=1e-8) if isinstance(one, float) else one == other
    return [] if same else [f"{at}: {one} and {other}"]


@pytest.mark.slow
def test_an_encoder_decoder_on_two_ranks(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{n} and {n}\t{2 * n}\n" for n in range(40)))
    source = tiny_checkpoint("t5")
    out = tmp_path / "out"
    words = ["convert", source, out, "--method", "crosslatent", "--cross-latent-dim", "8", "--calibration", pairs]
    done = started(*KVFOLD, *words, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    assert run_command([*map(str, words[:2]), str(tmp_path / "one"), *map(str, words[3:])]) == 0
    for name, tensor in tensors(tmp_path / "one").items():
        assert (tensors(out)[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.slow
def test_torchrun_uptrains_as_one_process_does(
    tiny_checkpoint: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source, one, two = tiny_checkpoint(), tmp_path / "one", tmp_path / "two"
    words = ["--data", story, "--tokens", "1024", "--sequence-length", "32", "--batch-size", "4", "--log-every", "1"]
    words += ["--precision", "fp32", "--loss", "ce"]
    assert run_command(["uptrain", str(source), str(one), *map(str, words)]) == 0
    done = started(*TORCHRUN, "uptrain", source, two, *words)
    assert done.returncode == 0, done.stderr
    logs = [[json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()] for out in (one, two)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert tensors(one).keys() == tensors(two).keys()
    assert done.stderr.splitlines().count("train: 1,024 tokens") == 1, "one rank shows progress"


# --- endings ---------------------------------------------------------------------------------------------------------


@contextmanager
def measuring(tiny: Path, text: Path, records: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """An evaluation on two ranks, which has begun and takes minutes, and the processes of its ranks."""
    words = ["evaluate", tiny, "--data", text, "--tokens", "2M", "--sequence-length", "16", "--batch-size", "1"]
    running = subprocess.Popen(
        [*KVFOLD, *map(str, words), "--records", str(records), "--gpus", "2"], stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    try:
        while not running.stderr.readline().startswith("loss:"):
            assert running.poll() is None
        yield running, _children(running.pid)
    finally:
        running.kill()
        running.stderr.close()
        running.wait()


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_endings(tiny_checkpoint: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    """A killed rank is named in one line, and Ctrl-C is one line; nothing is written, and no process stays."""
    text = tmp_path / "long.txt"
    text.write_text(story.read_text() * 300)
    tiny, records = tiny_checkpoint(), tmp_path / "records"
    for number, status, line in (
        (signal.SIGKILL, 2, "kvfold: rank 1 was ended by SIGKILL, and the others with it"),
        (signal.SIGINT, 130, "kvfold: interrupted"),
    ):
        with measuring(tiny, text, records) as (running, ranks):
            assert len(ranks) == 2
            os.kill(ranks[1] if number == signal.SIGKILL else running.pid, number)
            _, said = running.communicate(timeout=600)
            assert running.returncode == status, said
            own = [each for each in said.splitlines() if not each.startswith("loss:")]
            assert [each[: len(line)] for each in own] == [line]
            assert all(map(_is_gone, ranks))
    assert not list(tmp_path.glob("records/*"))


@pytest.mark.slow
def test_an_error_on_two_ranks_is_one_line(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    done = started(*KVFOLD, "evaluate", tiny_checkpoint(), "--data", tmp_path / "none.txt", "--gpus", "2")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "none.txt" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        ("0", "got 0); allowed: a whole number of at least 1"),
        ("-1", "got -1)"),
        ("two", "got two)"),
        ("99999", "ranks: this machine has fewer"),
    ],
)
def test_a_number_that_cannot_be_is_refused(gpus: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", "kvfold:demo", "--data", "stdlib", f"--gpus={gpus}"]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_gpus_inside_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in zip(VARIABLES, ("0", "2", "0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert run_command(["evaluate", "kvfold:demo", "--data", "stdlib", "--gpus", "2"]) == 2
    assert "--gpus starts ranks, and this is rank 0 of 2; leave out --gpus" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # which rank 0 speaks for
    assert run_command(["evaluate", "kvfold:demo", "--data", "stdlib", "--gpus", "2"]) == 2
    assert not capsys.readouterr().err


def test_a_command_of_one_device_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "kvfold:demo", "--gpus", "2"]) == 2
    assert capsys.readouterr().err == "kvfold: bench: this command runs on one device; leave out --gpus\n"
    for name, value in zip(VARIABLES, ("0", "2", "0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert run_command(["bench", "kvfold:demo"]) == 2
    said = "kvfold: bench: this command runs on one device (got rank 0 of 2); start it without torchrun\n"
    assert capsys.readouterr().err == said


def test_incomplete_variables_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run_command(["convert", "kvfold:demo", "out", "--kv-heads", "2"]) == 2
    assert "environment: WORLD_SIZE is not set (got RANK=0)" in capsys.readouterr().err
