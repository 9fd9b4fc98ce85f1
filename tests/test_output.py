"""Outputs: whole or absent, named by their inputs, and never somebody else's files."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvfold import lock
from kvfold.errors import OutputError
from kvfold.output import CLAIM, MANIFEST, disk_errors, fingerprint, free_bytes, open_output, read_json, write_json


def finish(path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Make a complete output, as a stage does."""
    output = open_output(path, settings, overwrite=overwrite)
    write_json(output.work / MANIFEST, {"inputs": output.inputs})
    (output.work / "made").write_text(str(settings))
    output.commit()


def refusal(path: Path, settings: dict[str, Any], **given: Any) -> str:
    with pytest.raises(OutputError) as caught:
        open_output(path, settings, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_nothing_is_there_until_commit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    output = open_output(path, {"a": 1})
    assert (output.complete, output.resumed) == (False, False)
    (output.work / "made").write_text("x")
    assert not path.exists()
    output.commit()
    assert [file.name for file in path.iterdir()] == ["made"]
    assert not output.work.exists()


def test_the_same_inputs_are_complete(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    assert open_output(tmp_path / "out", {"a": 1}).complete
    assert not (tmp_path / "out.partial").exists()


def test_other_inputs_are_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    line = refusal(tmp_path / "out", {"a": 2})
    assert line.startswith(f"{tmp_path / 'out'}: the output exists, from other inputs or settings")
    assert "--overwrite" in line
    finish(tmp_path / "out", {"a": 2}, overwrite=True)
    assert (tmp_path / "out" / "made").read_text() == "{'a': 2}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    open_output(tmp_path / "out", {"a": 2}, overwrite=True)
    assert (tmp_path / "out" / "made").read_text() == "{'a': 1}"


def test_a_commit_that_was_killed_leaves_no_rest_behind(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "rest").write_text("x")
    finish(tmp_path / "out", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    assert "is no output of kvfold" in refusal(tmp_path / "home", {}, overwrite=overwrite)
    (tmp_path / "file").write_text("dear")
    assert "is no output of kvfold" in refusal(tmp_path / "file", {}, overwrite=overwrite)
    assert (tmp_path / "home" / "letter").read_text() == (tmp_path / "file").read_text() == "dear"


def test_an_empty_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out", {})
    assert (tmp_path / "out" / "made").exists()


def test_unfinished_work_is_continued_by_its_own_command_alone(tmp_path: Path) -> None:
    work = open_output(tmp_path / "out", {"a": 1}).work
    (work / "half").write_text("x")
    again = open_output(tmp_path / "out", {"a": 1})
    assert again.resumed
    assert (again.work / "half").exists()
    assert "unfinished work of other inputs" in refusal(tmp_path / "out", {"a": 2})
    other = open_output(tmp_path / "out", {"a": 2}, overwrite=True)
    assert not other.resumed
    assert {path.name for path in other.work.iterdir()} == {CLAIM, lock.FILE}


def test_a_partial_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").write_text("x")
    assert "is not unfinished work of kvfold; move it away" in refusal(tmp_path / "out", {}, overwrite=True)


# --- one process at a time ------------------------------------------------------------------------------------------

WORKER = """
import sys
from kvfold.output import open_output

output = open_output(sys.argv[1], {"a": 1})
print("at work", flush=True)
if sys.stdin.readline().strip() == "commit":
    output.commit()
"""


@contextmanager
def worker(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed an output."""
    command = [sys.executable, "-c", WORKER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("asked", [{"a": 1}, {"a": 2}])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_is_told_of_the_first_and_changes_nothing(
    tmp_path: Path, asked: dict[str, int], overwrite: bool
) -> None:
    with worker(tmp_path / "out") as first:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        line = refusal(tmp_path / "out", asked, overwrite=overwrite)
        assert line.startswith(f"{tmp_path / 'out.partial'}: another kvfold process is writing here")
        assert f"(got process {first.pid} on " in line
        assert line.endswith("wait until it is done, stop it, or choose another path")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
        first.communicate("commit")
    assert not list((tmp_path / "out").iterdir()), "neither claim nor lock is left in what was committed"


def test_a_killed_process_locks_nobody_out(tmp_path: Path) -> None:
    with worker(tmp_path / "out") as first:
        refusal(tmp_path / "out", {"a": 1})
        first.kill()
        first.wait()
        assert (tmp_path / "out.partial" / lock.FILE).exists()
        assert open_output(tmp_path / "out", {"a": 1}).resumed


def test_work_that_was_dropped_is_free_and_work_in_hand_is_not(tmp_path: Path) -> None:
    def free() -> bool:
        with (tmp_path / "out.partial" / lock.FILE).open() as other:  # as another process would ask
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    first = open_output(tmp_path / "out", {"a": 1})
    second = open_output(tmp_path / "out", {"a": 1})  # the same process, after an error whose traceback is kept
    assert not free()
    del first
    assert not free()
    del second
    assert free()
    third = open_output(tmp_path / "out", {"a": 1})
    assert not free()
    third.commit()
    assert open_output(tmp_path / "out", {"a": 2}, overwrite=True).held is not third.held


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    finish(tmp_path / "out", {"a": 1})
    assert (tmp_path / "out" / "made").exists()


def test_another_process_may_finish_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = lock.Lock.take

    def late(folder: Path) -> lock.Lock:
        monkeypatch.undo()
        folder.rename(tmp_path / "aside")
        finish(tmp_path / "out", {"a": 1})
        (tmp_path / "aside").rename(folder)
        return take(folder)

    monkeypatch.setattr(lock.Lock, "take", late)
    assert open_output(tmp_path / "out", {"a": 1}).complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- places that refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", ".", ".."])
def test_a_path_without_a_name(path: str) -> None:
    assert "is no name for an output" in refusal(Path(path), {})


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "a part of the path is a file; choose another path" in refusal(tmp_path / "file" / "out", {})


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a file system that refuses even root: /sys")
def test_a_place_that_cannot_be_written() -> None:
    line = refusal(Path("/sys/kernel/out"), {})
    assert line.startswith("/sys/kernel/out")
    assert line.endswith("choose another path")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; free some space; the same command goes on from here"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "no permission to write; choose another path"),
        (errno.EPERM, "no permission to write"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENAMETOOLONG, "the name is too long"),
    ],
)
def test_refusals_of_the_operating_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(path: Path, *args: object, **given: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert said in refusal(tmp_path / "out", {})


def test_a_disk_that_is_really_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OutputError, match="/dev/full: the disk is full"), disk_errors("/dev/full"):
        Path("/dev/full").write_text("x")


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "nothing").read_text()


def test_json_is_replaced_at_once(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": "é"})
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="Circular"):
        write_json(tmp_path / "a.json", cycle)
    assert read_json(tmp_path / "a.json") == {"old": "é"}
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    assert read_json(tmp_path / "bad.json") is None


def test_free_bytes_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)
