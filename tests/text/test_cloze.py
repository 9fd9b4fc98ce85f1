"""The reading task: what every question owes, whatever the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfold.errors import DataError, OutputError, SettingError
from kvfold.text.cloze import ClozeSettings, cloze

ANIMALS = ("badger", "falcon", "lizard", "otter")
PLACES = ("river", "forest", "meadow", "harbor", "valley")
SMALL = ClozeSettings(records=12, passages=3, words=12, around=3, occurrences=2)


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Sixty sentences that share most of their words."""
    path = tmp_path / "text.txt"
    lines = [
        f"On day {n} the {ANIMALS[n % 4]} crossed a {PLACES[n % 5]} near Oak{chr(97 + n % 26)} at noon."
        for n in range(60)
    ]
    path.write_text(" ".join(lines) + "\nToo short.\n" + "word " * 40 + ".\n")
    return path


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_answer_stands_in_one_passage_whose_words_the_question_repeats(told: Path, tmp_path: Path) -> None:
    made = records(cloze(told, tmp_path / "q.jsonl", SMALL))
    assert len(made) == 12
    places = set()
    for each in made:
        question, (answer,) = str(each["question"]), each["answers"]  # type: ignore[misc]
        texts = [passage["text"] for passage in each["ctxs"]]  # type: ignore[attr-defined]
        assert len(set(texts)) == len(texts) == 3
        holding = [number for number, text in enumerate(texts) if answer in text.lower().replace(".", "").split()]
        assert len(holding) == 1
        assert question.split().count(SMALL.blank) == 1
        assert len(question.split()) <= 7
        left, right = question.split(SMALL.blank)
        assert left.strip() in texts[holding[0]]
        assert right.strip() in texts[holding[0]]
        assert answer not in question.lower().split()
        assert str(each["target"]).lower() == f" {answer}"
        assert f"{each['target']} " in texts[holding[0]].replace(".", " "), "the target is what a reader can copy"
        places.add(holding[0])
    assert len(places) > 1, "the passage that holds the answer stands anywhere"


def test_several_words_may_be_left_out(told: Path, tmp_path: Path) -> None:
    settings = ClozeSettings(**{**vars(SMALL), "passages": 1, "gap": 3})
    for each in records(cloze(told, tmp_path / "q.jsonl", settings)):
        filled = str(each["question"]).replace(f" {settings.blank}", str(each["target"]))
        assert filled.replace(".", "") in each["ctxs"][0]["text"].replace(".", "")  # type: ignore[index]
        assert len(str(each["target"]).split()) == 3


def test_shuffled_sentences_have_the_same_words_in_another_order(told: Path, tmp_path: Path) -> None:
    def words(shuffle: bool) -> list[list[str]]:
        settings = ClozeSettings(**{**vars(SMALL), "records": 40, "passages": 1, "shuffle": shuffle})
        made = records(cloze(told, tmp_path / f"{shuffle}.jsonl", settings))
        return [each["ctxs"][0]["text"].split() for each in made]  # type: ignore[index]

    plain, shuffled = words(False), words(True)
    assert plain != shuffled
    assert {tuple(sorted(each)) for each in shuffled} <= {tuple(sorted(each)) for each in map(list, _sentences(told))}


def _sentences(told: Path) -> list[list[str]]:
    return [sentence.split() for sentence in told.read_text().replace("noon. ", "noon.|").splitlines()[0].split("|")]


def test_it_follows_from_text_and_seed(told: Path, tmp_path: Path) -> None:
    one, two = (cloze(told, tmp_path / name, SMALL).read_bytes() for name in ("a.jsonl", "b.jsonl"))
    other = cloze(told, tmp_path / "c.jsonl", ClozeSettings(**{**vars(SMALL), "seed": 1})).read_bytes()
    assert one == two != other


def test_what_cannot_be_made_is_one_line(told: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer questions than asked for"):
        cloze(told, tmp_path / "q.jsonl", ClozeSettings(**{**vars(SMALL), "records": 61}))
    with pytest.raises(DataError, match="too few sentences"):
        cloze(told, tmp_path / "q.jsonl", ClozeSettings(**{**vars(SMALL), "passages": 61}))
    with pytest.raises(SettingError, match="passages"):
        ClozeSettings(passages=0)
    assert not (tmp_path / "q.jsonl").exists()
    cloze(told, tmp_path / "q.jsonl", SMALL)
    with pytest.raises(OutputError, match="--overwrite"):
        cloze(told, tmp_path / "q.jsonl", SMALL)


def test_only_questions_are_overwritten(told: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.jsonl"
    first = cloze(told, out, SMALL).read_bytes()
    other = ClozeSettings(**{**vars(SMALL), "seed": 1})
    assert cloze(told, out, other, overwrite=True).read_bytes() != first
    kept = out.read_bytes()
    with pytest.raises(OutputError, match="the text itself"):
        cloze(out, out, SMALL, overwrite=True)
    assert out.read_bytes() == kept
    (tmp_path / "link.jsonl").symlink_to(out)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "mine"}\n')
    for name in ("link.jsonl", "folder", "empty", "bytes", "rows.jsonl", "text.txt"):
        with pytest.raises(OutputError, match="holds no questions"):
            cloze(told, tmp_path / name, SMALL, overwrite=True)
    assert (tmp_path / "rows.jsonl").read_text() == '{"text": "mine"}\n'
