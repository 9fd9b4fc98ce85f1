"""Recall probes against models whose recall is known by construction; lm-eval and samples against hand computation."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.errors import DataError, SettingError
from kvfold.evaluate import probes

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"


class Copier(nn.Module):
    """Induction by construction: after a token that was there before, what followed it gets `strength`, all else 0.

    `match` is how many tokens must be the same; a `blind` token is never predicted.
    """

    def __init__(self, vocabulary: int, *, strength: float = 20.0, match: int = 1, blind: int = -1) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.vocabulary, self.strength, self.match, self.blind = vocabulary, strength, match, blind

    def forward(self, ids_BT: Tensor) -> SimpleNamespace:
        logits_BTV = torch.zeros(*ids_BT.shape, self.vocabulary)
        for row, ids in enumerate(ids_BT.tolist()):
            for now in range(self.match, len(ids)):
                last = ids[now - self.match + 1 : now + 1]
                for before in range(now - 1, self.match - 2, -1):
                    if ids[before - self.match + 1 : before + 1] == last:
                        if ids[before + 1] != self.blind:
                            logits_BTV[row, now, ids[before + 1]] = self.strength
                        break
        return SimpleNamespace(logits=logits_BTV)


@pytest.fixture(name="ids_N")
def _ids() -> Tensor:
    return torch.randint(4, 200, (600,), generator=torch.Generator().manual_seed(1))


# --- copy loss -------------------------------------------------------------------------------------------------------


def test_copy_rows_are_a_span_some_text_and_the_span_again(ids_N: Tensor) -> None:
    near_BT, far_BT = (probes.copy_rows(ids_N, distance, trials=5, seed=7) for distance in (0, 40))
    assert near_BT.shape == (5, 2 * probes.SPAN)
    assert far_BT.shape == (5, 40 + 2 * probes.SPAN)
    text = ids_N.tolist()
    for near, far in zip(near_BT.tolist(), far_BT.tolist(), strict=True):
        assert far[: probes.SPAN] == far[-probes.SPAN :] == near[: probes.SPAN] == near[probes.SPAN :]
        assert len(set(near)) == probes.SPAN
        assert set(near) <= set(text)
        between = far[probes.SPAN : -probes.SPAN]
        assert any(text[start : start + 40] == between for start in range(len(text)))
    assert torch.equal(far_BT, probes.copy_rows(ids_N, 40, trials=5, seed=7))
    assert not torch.equal(far_BT, probes.copy_rows(ids_N, 40, trials=5, seed=8))


def test_spans_hold_no_special_token(ids_N: Tensor) -> None:
    special = list(range(4, 150))
    rows_BT = probes.copy_rows(ids_N, 0, trials=20, seed=0, special=[*special, 999])
    assert int(rows_BT.min()) >= 150


def test_copy_loss_of_planted_induction(ids_N: Tensor) -> None:
    """By hand: log(V) where nothing can be known, -log softmax at the strength where the span comes again."""
    rows_BT = probes.copy_rows(ids_N, 0, trials=6, seed=0)
    for strength in (0.0, 3.0, 20.0):
        first, second = probes.copy_loss(Copier(200, strength=strength), rows_BT, batch_size=4)
        assert first == pytest.approx(math.log(200), rel=1e-6)
        assert second == pytest.approx(math.log(199 + math.exp(strength)) - strength, rel=1e-4, abs=1e-6)


def test_copy_loss_says_at_which_distance_recall_ends(ids_N: Tensor) -> None:
    class Forgetful(Copier):
        def forward(self, ids_BT: Tensor) -> SimpleNamespace:
            parts = [super(Forgetful, self).forward(part) for part in torch.split(ids_BT, 48, dim=1)]
            return SimpleNamespace(logits=torch.cat([part.logits for part in parts], dim=1))

    near, far = (
        probes.copy_loss(Forgetful(200, match=2), probes.copy_rows(ids_N, d, trials=4, seed=0), batch_size=4)[1]
        for d in (16, 64)
    )
    assert near < 1.0
    assert far > 5.0


@pytest.mark.parametrize(("tokens", "distance"), [(30, 40), (10, 0)])
def test_copy_refuses_a_text_that_is_too_short(ids_N: Tensor, tokens: int, distance: int) -> None:
    with pytest.raises(DataError, match="too short to probe copying"):
        probes.copy_rows(ids_N[:tokens], distance, trials=2, seed=0)


# --- pass keys -------------------------------------------------------------------------------------------------------


def test_passkey_rows_hide_a_number_and_ask_for_it(byte_tokenizer: Path, ids_N: Tensor) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("the sea, the sea, " * 60)["input_ids"])
    rows_BT, answers = probes.passkey_rows(tokenizer, text_N, 250, trials=8, seed=0)
    assert rows_BT.shape == (8, 250)
    depths = []
    for row, length in zip(rows_BT, answers, strict=True):
        text, key = probes.decode(tokenizer, row), probes.decode(tokenizer, row[-length:])
        assert key.strip().isdigit()
        assert len(key.strip()) == 5
        assert text.count(f"The pass key is{key}") == 2
        assert text.endswith(f"The pass key is{key}")
        depths.append(text.index("\nThe pass key is"))
    assert len(set(depths)) == 8
    assert max(depths) - min(depths) > 50


def test_passkey_of_models_that_can_and_cannot(byte_tokenizer: Path) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("a quick fox, " * 60)["input_ids"])
    rows_BT, answers = probes.passkey_rows(tokenizer, text_N, 250, trials=6, seed=0)
    exact, lost = probes.passkey(Copier(260, match=6), rows_BT, answers, batch_size=4)
    assert exact == 1.0
    assert lost < 1e-4
    exact, lost = probes.passkey(Copier(260, strength=0.0), rows_BT, answers, batch_size=4)
    assert exact == 0.0
    assert lost == pytest.approx(math.log(260), rel=1e-6)


def test_passkey_is_what_greedy_decoding_gives(byte_tokenizer: Path) -> None:
    """One pass over the row with its number equals decoding token by token, also for a model that fails at times."""
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    text_N = torch.tensor(tokenizer("a quick fox, " * 60)["input_ids"])
    rows_BT, answers = probes.passkey_rows(tokenizer, text_N, 200, trials=8, seed=0)
    model = Copier(260, match=6, blind=tokenizer("7")["input_ids"][0])
    right = 0
    for row, length in zip(rows_BT, answers, strict=True):
        ids = row[:-length]
        for _ in range(length):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        right += torch.equal(ids, row)
    assert 0 < right < 8
    assert probes.passkey(model, rows_BT, answers, batch_size=8)[0] == right / 8


def test_passkey_refuses(byte_tokenizer: Path, ids_N: Tensor) -> None:
    tokenizer = hf.load_tokenizer(byte_tokenizer)
    with pytest.raises(SettingError, match="too short for the question") as error:
        probes.passkey_rows(tokenizer, ids_N, 50, trials=2, seed=0)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert probes.passkey_rows(tokenizer, ids_N, least, trials=2, seed=0)[0].shape == (2, least)
    with pytest.raises(DataError, match="too short to fill"):
        probes.passkey_rows(tokenizer, ids_N[:20], 250, trials=2, seed=0)


# --- samples ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_are_greedy(tiny_checkpoint: Callable[..., Path], ids_N: Tensor) -> None:
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    prompts_BT = probes.prompts(ids_N, 3)
    assert prompts_BT.shape == (3, probes.PROMPT)
    assert torch.equal(prompts_BT[0], ids_N[: probes.PROMPT])
    wanted = []
    for ids_T in prompts_BT:
        for _ in range(6):
            ids_T = torch.cat([ids_T, model(ids_T[None]).logits[0, -1:].argmax(-1)])
            if int(ids_T[-1]) == tokenizer.eos_token_id:
                break
        wanted.append(probes.decode(tokenizer, ids_T[probes.PROMPT :]))
    assert probes.continuations(model, tokenizer, prompts_BT, 6) == wanted
    with pytest.raises(DataError, match="too short for a prompt"):
        probes.prompts(ids_N[:5], 1)


# --- lm-eval ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data sets made by these tests stay in their folder."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def write_task(folder: Path, name: str, file: Path, *, like: str = "local_arc_easy") -> None:
    """Write a task file that the documentation shows, with another name and path."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (each for each in blocks if f"task: {like}\n" in each)
    folder.mkdir(exist_ok=True)
    text = re.sub(r"/absolute/path/to/\S+", str(file), block).replace(like, name)
    (folder / f"{name}.yaml").write_text(text)


@torch.no_grad()
def by_hand(model: nn.Module, tokenizer: Any, documents: list[dict[str, Any]]) -> float:
    """Accuracy of choosing the continuation with the highest log-likelihood."""
    right = 0
    for document in documents:
        likelihoods = []
        for choice in document["choices"]:
            context, answer = (tokenizer(text)["input_ids"] for text in (document["query"] + "Answer:", f" {choice}"))
            log_p_TV = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(log_p_TV[len(context) + i - 1, token]) for i, token in enumerate(answer)))
        right += likelihoods.index(max(likelihoods)) == document["gold"]
    return right / len(documents)


def test_lm_eval_scores_a_task_of_ones_own(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [
        {"query": f"Question {n}?\n", "choices": ["no", f"yes {n}", "perhaps"], "gold": n % 3} for n in range(12)
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, documents)))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl")
    harness = probes.find_tasks(("made",), str(tmp_path / "tasks"), None)
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = harness.run(model, tokenizer, batch_size=4, max_length=256)
    assert found["made"]["acc"] == by_hand(model, tokenizer, documents)
    assert 0 < found["made"]["acc_stderr"] < 1


def test_lm_eval_scores_a_continuation(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [{"context": f"The {n} sheep went", "continuation": f"by {n}"} for n in range(5)]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, documents)))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl", like="local_lambada")
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = probes.find_tasks(("made",), str(tmp_path / "tasks"), None).run(
        model, tokenizer, batch_size=4, max_length=256
    )
    lost = []
    for document in documents:
        ids_T, answer = tokenizer(f"{document['context']} {document['continuation']}")["input_ids"], len("by 0") + 1
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids_T])).logits[0].log_softmax(-1)
        lost.append(-sum(float(log_p_TV[place - 1, ids_T[place]]) for place in range(-answer, 0)))
    assert found["made"]["perplexity"] == pytest.approx(math.exp(sum(lost) / len(lost)), rel=1e-4)
    assert found["made"]["acc"] == 0.0


def test_lm_eval_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(SettingError, match="is not a folder"):
        probes.find_tasks(("made",), str(tmp_path / "absent"), None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SettingError, match=r"kvfold\[eval\]"):
        probes.find_tasks(("made",), None, None)


@pytest.mark.slow  # lm-eval reads the files of all its tasks
def test_an_unknown_task_is_looked_for_among_lm_evals_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = importlib.import_module(pytest.importorskip("lm_eval").tasks.TaskManager.__module__)
    own = Path(manager.__file__).parent  # reading all 10,000 files of it takes ten seconds: one folder stands for them
    shutil.copytree(own / "arc", tmp_path / "own" / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "own" / "manager.py"))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl")
    with contextlib.suppress(DataError):  # it is known, and not SettingError's; its documents lie on the hub
        probes.find_tasks(("arc_easy",), str(tmp_path / "tasks"), None)
    with pytest.raises(SettingError, match=r"unknown task 'arc_eazy'; did you mean 'arc_easy'\?"):
        probes.find_tasks(("arc_eazy",), str(tmp_path / "tasks"), None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/eval here")
@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
def test_lm_eval_offline_on_real_tasks(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text().splitlines()[:8]]
    write_task(tmp_path / "tasks", name, SHARED / f"{name}.jsonl")
    harness = probes.find_tasks((name,), str(tmp_path / "tasks"), 8)
    folder = tiny_checkpoint(max_position_embeddings=1024)
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = harness.run(model, tokenizer, batch_size=4, max_length=1024)
    assert found[name]["acc"] == by_hand(model, tokenizer, documents)


def test_scores_keep_numbers_and_name_filters() -> None:
    values = {"alias": "made", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict-match": 1}
    assert probes._scores(values) == {"acc": 0.5, "exact_match/strict-match": 1.0}
