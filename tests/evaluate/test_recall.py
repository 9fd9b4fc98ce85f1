"""Recall against models whose recall is known by construction: a perfect copier scores 1, a uniform model 0."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.errors import DataError, SettingError
from kvfold.evaluate import recall
from kvfold.evaluate.samples import decode
from kvfold.text.copies import copy_rows


class Copier(nn.Module):
    """Induction by construction: after a token that was there before, what followed it gets `strength`, all else 0.

    `match` is how many tokens must be the same; a `blind` token is never predicted.
    """

    def __init__(self, vocabulary: int, *, strength: float = 20.0, match: int = 1, blind: int = -1) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.vocabulary, self.strength, self.match, self.blind = vocabulary, strength, match, blind

    def forward(self, ids_BT: Tensor, *, logits_to_keep: int = 0, **options: Any) -> SimpleNamespace:
        logits_BTV = torch.zeros(*ids_BT.shape, self.vocabulary)
        for row, ids in enumerate(ids_BT.tolist()):
            for now in range(self.match, len(ids)):
                last = ids[now - self.match + 1 : now + 1]
                for before in range(now - 1, self.match - 2, -1):
                    if ids[before - self.match + 1 : before + 1] == last:
                        if ids[before + 1] != self.blind:
                            logits_BTV[row, now, ids[before + 1]] = self.strength
                        break
        return SimpleNamespace(logits=logits_BTV[:, -logits_to_keep:])


@pytest.fixture(name="ids_N")
def _ids() -> Tensor:
    return torch.randint(4, 200, (600,), generator=torch.Generator().manual_seed(1))


# --- copy loss -----------------------------------------------------------------------------------------------------


def test_copy_loss_of_planted_induction(ids_N: Tensor) -> None:
    """By hand: log(V) where nothing can be known, -log softmax at the strength where the span comes again."""
    rows_BT = copy_rows(ids_N, 0, trials=6, seed=0)
    for strength in (0.0, 3.0, 20.0):
        first, second = recall.copy_loss(Copier(200, strength=strength), rows_BT, batch_size=4)
        assert first == pytest.approx(math.log(200), rel=1e-6)
        assert second == pytest.approx(math.log(199 + math.exp(strength)) - strength, rel=1e-4, abs=1e-6)


def test_copy_loss_says_at_which_distance_recall_ends(ids_N: Tensor) -> None:
    class Forgetful(Copier):
        def forward(self, ids_BT: Tensor, *, logits_to_keep: int = 0, **options: Any) -> SimpleNamespace:
            parts = [super(Forgetful, self).forward(part).logits for part in torch.split(ids_BT, 48, dim=1)]
            return SimpleNamespace(logits=torch.cat(parts, dim=1)[:, -logits_to_keep:])

    near, far = (
        recall.copy_loss(Forgetful(200, match=2), copy_rows(ids_N, d, trials=4, seed=0), batch_size=4)[1]
        for d in (16, 64)
    )
    assert near < 1.0
    assert far > 5.0


# --- passkeys ------------------------------------------------------------------------------------------------------


def test_passkeys_hide_a_number_and_ask_for_it(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("the sea, the sea, " * 60)["input_ids"])
    asked = recall.passkeys(tokenizer, text_N, 250, trials=8, seed=0)
    assert asked.ids_BT.shape == (8, 250)
    depths = []
    for row, length in zip(asked.ids_BT, asked.answers, strict=True):
        text, key = decode(tokenizer, row), decode(tokenizer, row[-length:])
        assert key.strip().isdigit()
        assert len(key.strip()) == 5
        assert text.count(f"The pass key is{key}") == 2
        assert text.endswith(f"The pass key is{key}")
        depths.append(text.index("\nThe pass key is"))
    assert len(set(depths)) == 8
    assert max(depths) - min(depths) > 50


def test_passkeys_of_models_that_can_and_cannot(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("a quick fox, " * 60)["input_ids"])
    asked = recall.passkeys(tokenizer, text_N, 250, trials=6, seed=0)
    right_B, loss_B = recall.answer(Copier(260, match=6), asked, batch_size=4)
    assert right_B.tolist() == [1.0] * 6
    assert float(loss_B.max()) < 1e-3
    right_B, loss_B = recall.answer(Copier(260, strength=0.0), asked, batch_size=4)
    assert right_B.tolist() == [0.0] * 6
    assert loss_B.tolist() == pytest.approx([length * math.log(260) for length in asked.answers], rel=1e-6)


def test_an_answer_is_what_greedy_decoding_gives(byte_tokenizer: Path) -> None:
    """One pass over the row with its number equals decoding token by token, also for a model that fails at times."""
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("a quick fox, " * 60)["input_ids"])
    asked = recall.passkeys(tokenizer, text_N, 200, trials=8, seed=0)
    model = Copier(260, match=6, blind=tokenizer("7")["input_ids"][0])
    right = []
    for row, length in zip(asked.ids_BT, asked.answers, strict=True):
        ids = row[:-length]
        for _ in range(length):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        right.append(float(torch.equal(ids, row)))
    assert 0 < sum(right) < 8
    assert recall.answer(model, asked, batch_size=8)[0].tolist() == right


def test_passkeys_refuse(byte_tokenizer: Path, ids_N: Tensor) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    with pytest.raises(SettingError, match="too short for the question") as error:
        recall.passkeys(tokenizer, ids_N, 50, trials=2, seed=0)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert recall.passkeys(tokenizer, ids_N, least, trials=2, seed=0).ids_BT.shape == (2, least)
    with pytest.raises(DataError, match="too short to fill"):
        recall.passkeys(tokenizer, ids_N[:20], 250, trials=2, seed=0)


# --- last words ------------------------------------------------------------------------------------------------------

NAMES = ("Ottilie", "Casimir", "Fähnlein", "Rosamund", "Bartholomew", "Quentin", "Isolde", "Wolfram")
STORY = "Long before that, all was well with the sheep. " + "".join(
    f"The old {name} went with the sheep to the sea and there the sheep were with the old {name}; and so on. "
    f"All of the sheep went to the old sea with the dog. It was {name[::-1]}! "
    for name in NAMES
)


def by_hand(text: str, length: int) -> list[str]:
    """The passages of a text of which every byte is a token: the last word is a name, and stands there before."""
    data, found = text.encode(), []
    for end in range(length, len(data) + 1):
        for name in NAMES:
            word = name.encode()
            passage = data[end - length : end]
            if passage.endswith(b" " + word) and data[end : end + 1] in (b";", b".") and word in passage[: -len(word)]:
                found.append(passage.decode(errors="ignore"))
    return found


def test_last_words_are_rare_words_that_the_passage_contains(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    ids_N = torch.tensor(tokenizer(STORY)["input_ids"])
    asked = recall.last_words(tokenizer, ids_N, count=100, length=104)
    assert asked is not None
    assert [decode(tokenizer, row).replace("\ufffd", "") for row in asked.ids_BT] == by_hand(STORY, 104)
    assert len(asked.answers) == 8
    for row, length in zip(asked.ids_BT, asked.answers, strict=True):
        assert decode(tokenizer, row[-length:]) in NAMES  # the space before it is a token of its own
    fewer = recall.last_words(tokenizer, ids_N, count=3, length=104)
    assert fewer is not None
    assert fewer.ids_BT.tolist() == [asked.ids_BT[at].tolist() for at in (0, 4, 7)]


def test_a_text_without_such_passages_has_no_last_words(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    for text in ("", "1 2 3. ", STORY[:60], "Never a word comes back here, ever again."):
        ids_N = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
        assert recall.last_words(tokenizer, ids_N, count=9, length=96) is None


def test_a_copier_gives_every_last_word_and_a_uniform_model_none(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    asked = recall.last_words(tokenizer, torch.tensor(tokenizer(STORY)["input_ids"]), count=100, length=104)
    assert asked is not None
    perfect = recall.last_word(*recall.answer(Copier(260, match=5), asked, batch_size=3))
    assert (perfect["last_word"], perfect["last_word_stderr"], perfect["last_word_questions"]) == (1.0, 0.0, 8)
    assert perfect["last_word_perplexity"] == pytest.approx(1.0, abs=1e-4)
    uniform = recall.last_word(*recall.answer(Copier(260, strength=0.0), asked, batch_size=3))
    assert (uniform["last_word"], uniform["last_word_stderr"]) == (0.0, 0.0)
    letters = sum(len(name.encode()) for name in NAMES) / 8
    assert uniform["last_word_perplexity"] == pytest.approx(260**letters, rel=1e-4)


def test_the_standard_error_is_that_of_a_share() -> None:
    found = recall.last_word(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]).double(), torch.full((5,), math.log(7.0)).double())
    assert found["last_word"] == 0.6
    assert found["last_word_stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert found["last_word_perplexity"] == pytest.approx(7.0)
    assert recall.last_word(torch.ones(1).double(), torch.zeros(1).double())["last_word_stderr"] is None
