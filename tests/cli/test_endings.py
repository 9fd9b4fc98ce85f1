"""How a command ends: 0, 2, 3 or 130; anything else is a fault of kvfold, and says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli.commands import COMMANDS
from kvfold.cli.console import ERR, OUT, table
from kvfold.cli.flags import Command
from kvfold.cli.main import run_command

PLAN = [sys.executable, "-m", "kvfold", "plan", "kvfold:demo", "--kv-heads", "2"]


def _raise(error: BaseException) -> Callable[..., None]:
    def run(*given: object, **named: object) -> None:
        raise error

    return run


def test_a_fault_of_ours_says_so_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "plan", Command(_raise(KeyError("\x1b[31m lost")), ()))
    assert run_command(["plan"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("Traceback")
    assert any("KeyError" in line for line in told)
    assert told[-1].startswith("kvfold: this is a bug in kvfold")
    assert "report" in told[-1]
    assert all(line.isprintable() for line in told)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 2, "the memory is used up"),
        (OSError(28, "No space left on device"), 2, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_no_fault_is_one_line(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(COMMANDS, "plan", Command(_raise(error), ()))
    assert run_command(["plan"]) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert says in told[0]


def test_an_import_that_makes_another_error_of_ctrl_c_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def imports(*given: object, **named: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("KeyboardInterrupt") from None

    monkeypatch.setitem(COMMANDS, "plan", Command(imports, ()))
    before = signal.getsignal(signal.SIGINT)
    assert run_command(["plan"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "arguments",
    [
        *(["nothing"], ["plan"], ["--nothing"], ["plan", "a", "b"], ["plan", "kvfold:demo", "--nothing", "1"], [""]),
        *(["plan", "\udcff"], ["plan", "a\x00b"], ["plan", "x" * 5000], ["\x1b[31m"], ["convert", "kvfold:demo"]),
        *(["plan", "kvfold:demo", "--kv-heads"], ["plan", "kvfold:demo", "--kv-heads", "\x1b[31m" * 900], ["run"]),
        *(
            ["plan", "kvfold:demo", "--context", value]
            for value in ("-1", "nan", "1e400", "9" * 5000, "1T\n", "\udcff")
        ),
        *(["bench", "kvfold:demo", "--context", value] for value in (",", "1,,x", "1,-1", "9" * 30, "[1]")),
        ["evaluate", "kvfold:demo", "--data", "stdlib", "--gate", "loss<=1e400"],
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:40],
)
def test_a_usage_error_is_one_printable_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("kvfold: ")
    assert said.err.count("\n") == 1
    assert said.err.rstrip("\n").isprintable()
    assert len(said.err) < 4200


def test_a_repeated_flag_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "kvfold:demo", "--kv-heads", "9", "--kv-heads", "2"]) == 0
    assert "2" in capsys.readouterr().out


def test_tables_and_lines_hold_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table("\x1b[31m[/red]", ["[bold]\x07"], [["\x1b]0;title\x07 [/]"]])
    OUT.show(":warning: [red]\x1b[0m")
    ERR.show("\u202e")
    said = capsys.readouterr()
    assert not set("\x1b\x07\u202e") & set(said.out + said.err)
    assert ":warning: [red]" in said.out


@pytest.mark.slow
@pytest.mark.parametrize(("command", "wants"), [("| head -1", "0"), ("| true", "0"), ("> /dev/full", "2")])
def test_a_reader_that_leaves_is_no_fault(command: str, wants: str, tmp_path: Path) -> None:
    script = f'{" ".join(PLAN)} {command}; echo "${{PIPESTATUS[0]}}" >&2'
    made = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=120)
    assert "Traceback" not in made.stderr
    assert "Exception ignored" not in made.stderr
    assert made.stderr.splitlines()[-1] == wants
    assert len(made.stderr.splitlines()) == (1 if wants == "0" else 2)


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    """The signal comes from an import itself, so that no time has to be guessed."""
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'kvfold.cli.commands': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from kvfold.__main__ import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", script, "families"]
    made = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stdout, made.stderr) == (130, "", "kvfold: interrupted\n")
