import pytest

from kvfold.cli import console


def test_the_time_left_counts_only_what_this_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    lines = console.Lines()
    lines.start("train", 1000, "tokens", 600)
    now = 30.0
    lines.advance(100)  # 300 of 400 are left, at 100 in 30 s
    assert "train: 70%, 90 s left\n" in capsys.readouterr().err
    now = 60.0
    lines.advance(0)
    assert "train: 70%, 180 s left\n" in capsys.readouterr().err


def test_no_time_is_left_to_estimate_before_the_first_advance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    lines = console.Lines()
    lines.start("train", 1000, "tokens", 600)
    now = 30.0
    lines.advance(0)
    assert "left" not in capsys.readouterr().err
