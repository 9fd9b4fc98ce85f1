"""Tasks of lm-eval: found and loaded before any model, then run on models in memory."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TextIO

import numpy
import torch
from torch import nn

from kvfold import ranks
from kvfold.errors import DataError, SettingError, did_you_mean
from kvfold.progress import SILENT, Progress

SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval with the names of their metrics."""

    tasks: tuple[str, ...]
    metrics: Mapping[str, tuple[str, ...]]  # by task; a group has those of its tasks
    manager: Any
    limit: int | None
    folder: str | None = None  # of more task files

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it by its tasks: the process that unpickles it finds them itself."""
        return find_tasks, (self.tasks, self.folder, self.limit)

    def run(
        self, model: nn.Module, tokenizer: Any, *, batch_size: int, max_length: int, progress: Progress = SILENT
    ) -> dict[str, dict[str, float]]:
        """Scores by task (and by group) and metric, each with its standard error where lm-eval has one.

        As `lm_eval.simple_evaluate` with its default seeds, which also asks git for a commit and prints git's errors.
        """
        from lm_eval import evaluate

        wrapper = _wrapper(progress, sys.stderr)
        with _quiet():
            found = self.manager.load(list(self.tasks))
            for task in found["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=SEED)
            random.seed(0)
            numpy.random.seed(SEED)
            torch.manual_seed(SEED)
            scores = evaluate(
                lm=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
                task_dict=found,
                limit=self.limit,
                bootstrap_iters=100,
                log_samples=False,
            )
        return {task: _scores(values) for task, values in scores["results"].items()}


def _wrapper(progress: Progress, stderr: TextIO) -> Any:
    """lm-eval's wrapper of transformers' models, with kvfold's progress in place of its bars."""
    from lm_eval.models.huggingface import HFLM

    @contextlib.contextmanager
    def shown(requests: int) -> Iterator[None]:
        with contextlib.redirect_stderr(stderr):
            progress.start("lm-eval", requests, "requests")
            try:
                yield
            finally:
                progress.stop()

    class Wrapper(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            with shown(len(requests)):
                return log_likelihoods(
                    self.model,
                    [((*context, *answer)[-self.max_length - 1 :], len(answer)) for _, context, answer in requests],
                    batch_size=self.batch_size,
                    progress=progress,
                )

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            def options(at: int) -> str:
                return str(requests[at].args[1])

            order = sorted(range(len(requests)), key=lambda at: (options(at), -len(requests[at].args[0])))
            groups, size = [list(same) for _, same in groupby(order, key=options)], int(self.batch_size)
            parts = [group[first : first + size] for group in groups for first in range(0, len(group), size)]

            def answer(part: list[int]) -> list[str]:
                return list(HFLM.generate_until(self, [requests[at] for at in part], disable_tqdm=True))

            with shown(len(requests)):
                found = ranks.each(parts, answer, progress=progress, amounts=[len(part) for part in parts])
            texts = dict(zip(chain(*parts), chain(*found), strict=True))
            return [texts[at] for at in range(len(requests))]

    return Wrapper


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], int]], *, batch_size: int, progress: Progress = SILENT
) -> list[tuple[float, bool]]:
    """Of each row `(ids, answer)`: the log-likelihood of its last `answer` tokens, and whether greedy gives them.

    Logits are computed for the answers alone, and in float32: lm-eval's own wrapper computes those of every token. The
    longest rows come first.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda at: -len(rows[at][0]))

    def read(part: Sequence[int]) -> list[tuple[float, bool]]:
        batch = [rows[at] for at in part]
        ids = [torch.tensor(ids[:-1]) for ids, _ in batch]
        ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # behind a row, where causal attention does not look
        kept = ids_BT.shape[1] - min(len(ids) - 1 - answer for ids, answer in batch)
        logits_BTV = model(ids_BT.to(device), use_cache=False, logits_to_keep=kept).logits
        found = []
        for (row, answer), logits_TV in zip(batch, logits_BTV, strict=True):
            end = len(row) - 1 - ids_BT.shape[1] + kept
            logits_AV = logits_TV[end - answer : end].float()
            target_A = torch.tensor(row[-answer:], device=device)
            likelihood = logits_AV.log_softmax(-1).gather(1, target_A[:, None]).sum()
            found.append((float(likelihood), bool((logits_AV.argmax(-1) == target_A).all())))
        return found

    parts = [order[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    scores = ranks.each(parts, read, progress=progress, amounts=[len(part) for part in parts])
    found = dict(zip(order, chain(*scores), strict=True))
    return [found[at] for at in range(len(rows))]


def find_tasks(tasks: Sequence[str], folder: str | None, limit: int | None) -> Harness:
    """Find tasks in a folder of task files first, then among lm-eval's own.

    Raises SettingError when lm-eval is not installed, the folder does not exist, or no task has that name, and
    DataError when a task's data cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SettingError("tasks need lm-eval", where="lm_eval", next="pip install 'kvfold[eval]'") from error
    if folder is not None and not os.path.isdir(folder):
        raise SettingError("is not a folder", where="lm_eval_tasks_dir", got=folder)
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in manager.all_tasks:
            raise SettingError(
                f"unknown task {task!r}",
                where="lm_eval",
                next=did_you_mean(task, manager.all_tasks) or "put its file in --lm-eval-tasks-dir",
            )
    try:
        with _quiet():
            found = manager.load(list(tasks))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"lm-eval cannot load its tasks: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where="lm_eval",
            got=", ".join(tasks),
            next="check the data's path in the task's file, or the network",
        ) from error
    metrics = {name: tuple(task.aggregation()) for name, task in found["tasks"].items()}
    for group in found["groups"]:
        metrics[group] = tuple(dict.fromkeys(each for name in list(metrics) for each in metrics[name]))
    return Harness(tuple(tasks), metrics, manager, limit, folder)


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.3, "acc_stderr,none": 0.01}` -> `{"acc": 0.3, "acc_stderr": 0.01}`; other filters are kept."""
    scores = {}
    for name, value in values.items():
        metric, comma, chosen = name.partition(",")
        if comma and isinstance(value, int | float):
            scores[metric if chosen == "none" else f"{metric}/{chosen}"] = float(value)
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval: its log below errors, its bars and prints."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap then runs in this process, without a fork
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
