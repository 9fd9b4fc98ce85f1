"""Files from outside: regular, bounded in size and depth, and quoted safely."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfold.errors import CheckpointError, KvfoldError, plain
from kvfold.inputs import DEPTH, load_json, parse_json, read_bytes, read_text


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_text(tmp_path / "config.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_a_device_and_a_directory_are_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_bytes(Path(path))


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(CheckpointError, match="too large"):
        read_bytes(path, limit=4)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_json(path) == {"a": 1}


@pytest.mark.parametrize("depth", [DEPTH + 1, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = opening * depth + "1" + closing * depth
        with pytest.raises(CheckpointError, match="nested too deeply"):
            parse_json(text, where="here")
    assert parse_json("[" * DEPTH + "]" * DEPTH, where="here")


def test_an_error_is_one_bounded_line_without_control_characters() -> None:
    error = KvfoldError("bad\x1b[31m\nname", where="a\x07b", got="x" * 10**6, next="\u202eright to left \ud800")
    line = str(error)
    assert len(line) < 3000
    assert line.isprintable()
    assert "\\x1b[31m" in line
    assert plain("é 漢", 10) == "é 漢"
