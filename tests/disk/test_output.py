"""Outputs: whole or absent, named by their inputs, and never somebody else's files."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from kvfold.disk import lock
from kvfold.disk.output import (
    CLAIM,
    MANIFEST,
    check_apart,
    disk_errors,
    fingerprint,
    free_bytes,
    open_output,
    prepare_cache,
    read_json,
    tidy,
    write_json,
)
from kvfold.disk.source import locate
from kvfold.errors import CheckpointError, DataError, OutputError
from kvfold.report.folder import collect


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
    assert line.startswith(f"{tmp_path / 'out'}: exists, made from other inputs or settings")
    assert "--overwrite" in line
    finish(tmp_path / "out", {"a": 2}, overwrite=True)
    assert (tmp_path / "out" / "made").read_text() == "{'a': 2}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    open_output(tmp_path / "out", {"a": 2}, overwrite=True)
    assert (tmp_path / "out" / "made").read_text() == "{'a': 1}"


class Killed(BaseException):
    """What a process does not live to handle."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`killed_after(n)`: the process ends before change number n of the disk, counted from 0."""

    def arm(number: int) -> None:
        left = iter([None] * number)

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*given: Any, **named: Any) -> Any:
                if next(left, Killed) is Killed:
                    raise Killed
                return change(*given, **named)

            return changed

        for place, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
            monkeypatch.setattr(place, name, counted(getattr(place, name)))

    return arm


@pytest.mark.parametrize("moment", range(9))
@pytest.mark.parametrize("old", [True, False])
def test_a_commit_that_is_killed_at_any_moment_loses_nothing_and_leaves_no_rest_behind(
    tmp_path: Path, killed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, old: bool, moment: int
) -> None:
    if old:
        finish(tmp_path / "out", {"a": 1})
    output = open_output(tmp_path / "out", {"a": 2}, overwrite=True)
    write_json(output.work / MANIFEST, {"inputs": output.inputs})
    (output.work / "made").write_text("{'a': 2}")
    (output.work / "kvfold.json.0123abcd.tmp").write_text("of an earlier kill")
    killed_after(moment)
    with suppress(Killed):
        output.commit()
    monkeypatch.undo()
    del output
    there = [path.read_text() for path in tmp_path.rglob("made")]
    assert "{'a': 2}" in there, "the finished work is there"
    in_place = (tmp_path / "out" / "made").exists() and (tmp_path / "out" / "made").read_text() == "{'a': 2}"
    assert in_place or len(there) == 1 + old, "and so is what it replaces, until it is in place"

    again = open_output(tmp_path / "out", {"a": 2}, overwrite=not in_place)
    assert again.complete == in_place
    if not in_place:
        assert again.written()
        again.commit()
    assert (tmp_path / "out" / "made").read_text() == "{'a': 2}"
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "made", MANIFEST}


@pytest.fixture
def half_replaced(tmp_path: Path, killed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unfinished work whose commit was killed between its two renames, when the output had left its place."""
    finish(tmp_path / "out", {"a": 1})
    output = open_output(tmp_path / "out", {"a": 2}, overwrite=True)
    write_json(output.work / MANIFEST, {"inputs": output.inputs})
    killed_after(3)
    with pytest.raises(Killed):
        output.commit()
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    return output.work


def test_a_command_that_writes_restores_an_output_whose_replacement_was_killed(
    half_replaced: Path, tmp_path: Path
) -> None:
    assert open_output(tmp_path / "out", {"a": 1}).complete
    assert (tmp_path / "out" / "made").read_text() == "{'a': 1}"
    assert half_replaced.exists()


def test_a_command_that_reads_restores_it_too(half_replaced: Path, tmp_path: Path) -> None:
    with (half_replaced / lock.FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is not finished"):  # its process is still there
            locate(tmp_path / "out")
    assert locate(tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "made").read_text() == "{'a': 1}"
    assert open_output(tmp_path / "out", {"a": 2}, overwrite=True).written(), "and the new output is not lost"


def test_a_report_restores_it_too(half_replaced: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        collect(tmp_path)
    assert (tmp_path / "out" / "made").read_text() == "{'a': 1}"
    assert open_output(tmp_path / "out", {"a": 2}, overwrite=True).written()


def test_work_that_only_lacks_its_commit_is_left_as_it_is(half_replaced: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in half_replaced.rglob("*"))
    with pytest.raises(CheckpointError, match="is unfinished work"):
        locate(half_replaced)
    tidy(half_replaced)
    assert sorted(path.name for path in half_replaced.rglob("*")) == before


def test_a_folder_that_is_called_replaced_is_not_kvfolds(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "letter").write_text("dear")
    finish(tmp_path / "out", {"a": 1})
    finish(tmp_path / "out", {"a": 2}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]
    assert (tmp_path / "out.replaced" / "letter").read_text() == "dear"


def test_what_appears_at_the_path_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    output = open_output(tmp_path / "out", {"a": 1}, overwrite=True)
    write_json(output.work / MANIFEST, {"inputs": output.inputs})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("dear")
    with pytest.raises(OutputError, match="is not a kvfold output"):
        output.commit()
    assert output.written()
    assert (tmp_path / "out" / "letter").read_text() == "dear"


@pytest.mark.parametrize("name", ["letter", "deep/letter", "README.md", "report.html", ".replaced", "kvfold.json.tmp"])
def test_an_output_with_files_of_others_is_not_overwritten(tmp_path: Path, name: str) -> None:
    finish(tmp_path / "out", {"a": 1})
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("dear")
    assert f"holds files that kvfold did not write (got {name}); move them away" in refusal(
        tmp_path / "out", {"a": 2}, overwrite=True
    )
    assert theirs.read_text() == "dear"
    assert open_output(tmp_path / "out", {"a": 1}).complete


def test_cards_pages_and_lists_are_no_files_of_others(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    (tmp_path / "out" / "README.md").write_text("---\n---\n<!-- Written by kvfold; `kvfold report` writes it anew. -->")
    (tmp_path / "out" / "report.html").write_text("<footer>Written by kvfold from the records beside this page.")
    finish(tmp_path / "out", {"a": 2}, overwrite=True)
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["files"] == [MANIFEST, "made"]
    write_json(tmp_path / "out" / MANIFEST, {"inputs": "of a version that kept no list"})
    finish(tmp_path / "out", {"a": 3}, overwrite=True)


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    finish(tmp_path / "real", {"a": 1})
    (tmp_path / "out").symlink_to(tmp_path / ("real" if there else "nowhere"))
    assert "is a symbolic link" in refusal(tmp_path / "out", {"a": 2}, overwrite=True)
    if there:
        assert open_output(tmp_path / "out", {"a": 1}).complete
    assert (tmp_path / "real" / "made").read_text() == "{'a': 1}"


@pytest.mark.parametrize("there", [True, False])
def test_unfinished_work_that_is_a_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "theirs").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "theirs")
    assert "is a symbolic link, which kvfold does not make; move it away" in refusal(
        tmp_path / "out", {}, overwrite=True
    )
    assert (tmp_path / "theirs").exists() == there
    assert not there or not list((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", lock.FILE, CLAIM, f"{CLAIM}.tmp", "deep/folder"])
def test_a_link_in_unfinished_work_is_not_followed(tmp_path: Path, name: str) -> None:
    work = open_output(tmp_path / "out", {"a": 1}).work
    (tmp_path / "theirs").write_text((work / CLAIM).read_text() if name == CLAIM else "dear")
    before = (tmp_path / "theirs").read_bytes()
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).unlink(missing_ok=True)
    (work / name).symlink_to(tmp_path / "theirs")
    for settings in ({"a": 1}, {"a": 2}):
        assert "is a symbolic link in unfinished work: kvfold makes none" in refusal(
            tmp_path / "out", settings, overwrite=True
        )
    assert (tmp_path / "theirs").read_bytes() == before


@pytest.mark.parametrize("name", [lock.FILE, f"{CLAIM}.tmp"])
def test_an_unclaimed_folder_with_a_link_or_a_file_of_others_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").write_text("dear")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / name).symlink_to(tmp_path / "theirs")
    refusal(tmp_path / "out", {}, overwrite=True)
    (tmp_path / "out.partial" / name).unlink()
    (tmp_path / "out.partial" / lock.FILE).write_text("my own")
    assert "is not unfinished work of kvfold" in refusal(tmp_path / "out", {}, overwrite=True)
    assert (tmp_path / "theirs").read_text() == "dear"
    assert (tmp_path / "out.partial" / lock.FILE).read_text() == "my own"


# --- what a command reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "read", "said"),
    [
        ("text", "text", "would overwrite the teacher"),
        ("text", "text/a.txt", "would overwrite the teacher"),
        ("text", "other/../text/a.txt", "would overwrite the teacher"),
        (".", "text", "would overwrite the teacher"),
        ("text/out", "text", "lies in the teacher"),
        ("text/deep/out", "other/../text", "lies in the teacher"),
        ("other/out", "link", "lies in the teacher"),
        ("other", "link/a.txt", "would overwrite the teacher"),
        ("link/out", "other", "lies in the teacher"),
        ("new", "new.partial/a.txt", "would overwrite the teacher"),
        ("new", "text", None),
        ("text/out", "text/a.txt", None),
        ("text2", "text", None),
        ("text", "text2", None),
        ("text", None, None),
        ("self", "self", None),
        ("stdlib", "stdlib", None),
        ("org", "org/name", None),
        ("new", "a\0b", None),
    ],
)
def test_an_output_and_what_is_read_lie_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, read: str | None, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("text", "text2", "other", "new.partial", "self", "stdlib"):
        Path(folder).mkdir()
        (Path(folder) / "a.txt").write_text("x")
    Path("link").symlink_to("other")
    for form in (Path(out), tmp_path / out):
        with pytest.raises(OutputError, match=f"{said}; choose another path") if said else nullcontext():
            check_apart(form, {"data": None, "teacher": read})


# --- what a kill leaves ----------------------------------------------------------------------------------------------


def test_what_a_kill_left_in_an_output_is_swept_and_files_of_others_are_not(tmp_path: Path) -> None:
    finish(tmp_path / "out", {"a": 1})
    out = tmp_path / "out"
    before = {path.name for path in out.iterdir()}
    for name in (CLAIM, "config.json.89abcdef.tmp", "notes.tmp"):
        (out / name).write_text("x")
    tidy(out)
    assert (out / CLAIM).exists(), "without a lock, no commit was killed"
    (out / lock.FILE).write_text("my own lock")
    tidy(out)
    assert (out / CLAIM).exists()
    (out / lock.FILE).write_text("process 1 on here")
    (out / ".replaced").mkdir()
    (out / ".replaced" / "made").write_text("old")
    with (out / lock.FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        tidy(out)
        assert (out / CLAIM).exists(), "its process is still at it"
    assert open_output(out, {"a": 1}).complete
    assert {path.name for path in out.iterdir()} == before | {"notes.tmp"}


def test_a_cache_loses_what_is_old_and_kvfolds_alone(tmp_path: Path) -> None:
    old = time.time() - 2 * 24 * 3600
    for name in ("a.bin.01234567.tmp", "b.bin.01234567.tmp", "notes.tmp", "c.json", "e.4711.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.01234567.tmp").mkdir()
    (tmp_path / "d.01234567.tmp" / "tokenizer.json").write_text("x")
    for path in tmp_path.iterdir():
        if path.name[0] != "b":
            os.utime(path, (old, old))
    prepare_cache(tmp_path)
    prepare_cache(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"b.bin.01234567.tmp", "notes.tmp", "c.json", "none"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    assert "is not a kvfold output" in refusal(tmp_path / "home", {}, overwrite=overwrite)
    (tmp_path / "file").write_text("dear")
    assert "is not a kvfold output" in refusal(tmp_path / "file", {}, overwrite=overwrite)
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
from kvfold.disk.output import open_output

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
    assert "is not a name for an output" in refusal(Path(path), {})


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
        (errno.ENOSPC, "the disk is full; free some space; the same command continues from here"),
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
    with pytest.raises(RecursionError):
        write_json(tmp_path / "a.json", cycle)
    assert read_json(tmp_path / "a.json") == {"old": "é"}
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    assert read_json(tmp_path / "bad.json") is None


def test_free_bytes_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)
