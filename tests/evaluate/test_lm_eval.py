"""lm-eval's tasks, from files of one's own, against log-likelihoods by hand."""

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
from typing import Any

import pytest
import torch
from torch import nn

from kvfold import hf
from kvfold.errors import DataError, SettingError
from kvfold.evaluate.lm_eval import _scores, find_tasks, log_likelihoods

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
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


@pytest.mark.slow
def test_lm_eval_scores_a_task_of_ones_own(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [
        {"query": f"Question {n}?\n", "choices": ["no", f"yes {n}", "perhaps"], "gold": n % 3} for n in range(12)
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, documents)))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl")
    harness = find_tasks(("made",), str(tmp_path / "tasks"), None)
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = harness.run(model, tokenizer, batch_size=4, max_length=256)
    assert found["made"]["acc"] == by_hand(model, tokenizer, documents)
    assert 0 < found["made"]["acc_stderr"] < 1


@pytest.mark.slow
def test_lm_eval_scores_a_continuation(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [{"context": f"The {n} sheep went", "continuation": f"by {n}"} for n in range(5)]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, documents)))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl", like="local_lambada")
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = find_tasks(("made",), str(tmp_path / "tasks"), None).run(model, tokenizer, batch_size=4, max_length=256)
    lost = []
    for document in documents:
        ids_T, answer = tokenizer(f"{document['context']} {document['continuation']}")["input_ids"], len("by 0") + 1
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids_T])).logits[0].log_softmax(-1)
        lost.append(-sum(float(log_p_TV[place - 1, ids_T[place]]) for place in range(-answer, 0)))
    assert found["made"]["perplexity"] == pytest.approx(math.exp(sum(lost) / len(lost)), rel=1e-4)
    assert found["made"]["acc"] == 0.0


def test_log_likelihoods_are_those_of_lm_evals_own_wrapper(tiny_checkpoint: Callable[..., Path]) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder = tiny_checkpoint()
    model = hf.load(folder)
    generator = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(3, model.config.vocab_size, (count,), generator=generator).tolist()

    pairs = [(ids(1, 40), ids(1, 9)) for _ in range(20)]
    pairs.append((ids(80, 81), ids(4, 5)))  # longer than the window below
    greedy = int(model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs.append((pairs[0][0], [greedy]))
    wrapper = huggingface.HFLM(
        pretrained=model, tokenizer=hf.load_tokenizer(folder), batch_size=4, max_length=48, logits_cache=False
    )
    expected = wrapper._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    rows = [((context + answer)[-49:], len(answer)) for context, answer in pairs]
    found = log_likelihoods(model, rows, batch_size=4)
    assert [right for _, right in found] == [right for _, right in expected]
    assert found[-1][1]
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], rel=1e-5)


def test_lm_eval_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(SettingError, match="is not a folder"):
        find_tasks(("made",), str(tmp_path / "absent"), None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SettingError, match=r"kvfold\[eval\]"):
        find_tasks(("made",), None, None)


@pytest.mark.slow  # lm-eval reads the files of all its tasks
def test_an_unknown_task_is_looked_for_among_lm_evals_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = importlib.import_module(pytest.importorskip("lm_eval").tasks.TaskManager.__module__)
    own = Path(manager.__file__).parent  # reading all 10,000 files of it takes ten seconds: one folder stands for them
    shutil.copytree(own / "arc", tmp_path / "own" / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "own" / "manager.py"))
    write_task(tmp_path / "tasks", "made", tmp_path / "made.jsonl")
    with contextlib.suppress(DataError):  # it is known, and not SettingError's; its documents lie on the hub
        find_tasks(("arc_easy",), str(tmp_path / "tasks"), None)
    with pytest.raises(SettingError, match=r"unknown task 'arc_eazy'; did you mean 'arc_easy'\?"):
        find_tasks(("arc_eazy",), str(tmp_path / "tasks"), None)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/eval here")
@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
def test_lm_eval_offline_on_real_tasks(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text().splitlines()[:8]]
    write_task(tmp_path / "tasks", name, SHARED / f"{name}.jsonl")
    harness = find_tasks((name,), str(tmp_path / "tasks"), 8)
    folder = tiny_checkpoint(max_position_embeddings=1024)
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    found = harness.run(model, tokenizer, batch_size=4, max_length=1024)
    assert found[name]["acc"] == by_hand(model, tokenizer, documents)


def test_scores_keep_numbers_and_name_filters() -> None:
    values = {"alias": "made", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict-match": 1}
    assert _scores(values) == {"acc": 0.5, "exact_match/strict-match": 1.0}
