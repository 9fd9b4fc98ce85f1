from collections.abc import Callable

import pytest

from kvfold.cli import console

After = Callable[[float, float], str]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> After:
    """What is shown when a task of 1,000 tokens that began with 600 of them advances after so many seconds."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    lines = console.Lines()
    lines.start("train", 1000, "tokens", 600)

    def advance(seconds: float, amount: float) -> str:
        nonlocal now
        now = seconds
        lines.advance(amount)
        return capsys.readouterr().err

    return advance


def test_the_time_left_counts_only_what_this_run_did(after: After) -> None:
    assert "train: 70%, 90 s left\n" in after(30, 100)  # 300 of 400 are left, at 100 in 30 s
    assert "train: 70%, 180 s left\n" in after(60, 0)


def test_no_time_is_left_to_estimate_before_the_first_advance(after: After) -> None:
    assert "left" not in after(30, 0)
