"""SQuAD's metrics against cases computed by hand."""

from __future__ import annotations

import pytest

from kvfold.evaluate.squad import best, exact_match, f1, normalised


def test_answers_are_compared_without_case_punctuation_articles_and_blanks() -> None:
    assert normalised(" The  Battle of an Oak-Tree, (1066)! ") == "battle of oaktree 1066"
    assert normalised("theory and a thing") == "theory and thing"
    assert exact_match("the U.S.", "us") == 1
    assert exact_match("Ann", "Anna") == 0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("a red fox", "the red fox", 1.0),
        ("red fox", "red hen house", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),  # precision 1/2, recall 1/3
        ("red red fox", "red", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a word counts as often as both have it
        ("fox", "hen", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "fox", 0.0),
    ],
)
def test_f1_is_that_of_words(answer: str, right: str, expected: float) -> None:
    assert f1(answer, right) == pytest.approx(expected)
    assert f1(right, answer) == pytest.approx(expected)


def test_the_best_of_right_answers_counts() -> None:
    right = [["fox", "red fox"], ["hen"]]
    assert best(exact_match, ["the red fox", "cock"], right) == 0.5
    assert best(f1, ["fox red big", "hen hut"], right) == pytest.approx((0.8 + 2 / 3) / 2)
