"""What a real language model keeps, written between marks: goals beside the best student, and which runs are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kept_records import records
from kvfold.disk.record import Record
from pages.kept import GOALS, goal_tables, short_tables, task_figure
from pages.marks import END, START, with_tables


def named(run: str) -> list[Record]:
    return [replace(each, name=f"{run}/{each.name}", identity="") for each in records()]


def test_goals_stand_beside_the_best_student_of_their_bytes_and_training() -> None:
    table, _ = goal_tables(named("r"))
    lines = {
        tuple(cells[:2]): cells[2:]
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:])
    }
    assert len(lines) == len(GOALS) == 9
    # the student of half the bytes keeps 75%, 80% and 50%; the goal without training is 90%
    assert lines["50%", "none"][0] == "elitekv, cache ratio 0.5"
    assert [cell.partition(" ")[0] for cell in lines["50%", "none"][1:]] == ["75%", "80%", "50%"]
    assert all(cell.endswith("of 90%") for cell in lines["50%", "none"][1:])
    assert lines["33%", "none"] == ["not measured", "– of 50%", "– of 75%", "– of 75%"]
    assert lines["12.5%", "none"][1] == "0% ± 5"  # stated, without a goal


def test_a_goal_that_is_reached_is_bold() -> None:
    found = named("r")
    teacher, half = found[0], found[1]
    same = replace(half, metrics={**half.metrics, "lm_eval": teacher.metrics["lm_eval"]})
    table, _ = goal_tables([teacher, same])
    assert "**100% ± 7 of 90%**" in table


def test_a_mark_takes_the_first_runs_that_have_records() -> None:
    page = f"{START.format('kept-short real | demo')}\n{END}"
    demo = [
        replace(each, metrics={"loss": each.metrics["loss"], "cache": each.metrics["cache"]}) for each in named("demo")
    ]
    text = with_tables(page, demo)
    assert "The included checkpoint" in text
    assert "LAMBADA kept" not in text
    both = with_tables(page, [*demo, *named("real")])
    assert "SmolLM2-135M-Instruct" in both
    assert "LAMBADA kept" in both
    assert "copy gain" not in both.partition("\n\nLoss")[0]  # of the columns of the whole table
    assert with_tables(with_tables(page, demo), [*demo, *named("real")]) == both


@pytest.mark.slow
def test_the_figure_shows_the_share_of_a_task_that_is_lost() -> None:
    drawn = task_figure(named("r"))
    assert drawn is not None
    assert "75% kept" in drawn
    assert task_figure(named("r"), task="SciQ") is None
    assert list(short_tables([replace(each, metrics={"loss": 1.0}) for each in named("r")])) == []
