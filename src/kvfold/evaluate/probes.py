"""What perplexity does not see: recall over a distance, lm-eval tasks, and samples to read.

Copy loss is the loss on the second occurrence of a random span of tokens (the repeated random tokens of Olsson et al.
2022, arXiv 2209.11895): nothing but recall can lower it, and it moves at any size of model. Passkey retrieval
(Mohtashami and Jaggi 2023, arXiv 2305.16300) asks for a number that was hidden in a long text; small models fail it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.errors import DataError, SettingError, did_you_mean
from kvfold.progress import SILENT, Progress

SPAN = 16  # tokens of a copied span: long enough to be unlike anything else, short enough for a window of 256
PROMPT = 32  # tokens of held-out text that a sample goes on from

HIDDEN = "There is a pass key hidden in this text. Find it and remember it.\n"
NEEDLE = ("\nThe pass key is", ". Remember it.\n")
QUESTION = "\nWhat is the pass key? The pass key is"


# --- recall ----------------------------------------------------------------------------------------------------------


def losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, in float32: `loss_BT`."""
    flat = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return flat.view_as(targets_BT)


def copy_rows(ids_N: Tensor, distance: int, *, trials: int, seed: int, special: Sequence[int] = ()) -> Tensor:
    """Rows `[span, distance tokens of held-out text, span]`: `ids_BT`, one row a trial.

    The span's tokens are distinct and drawn by their frequency in the text, so that each is one the model knows; the
    spans of a seed are the same at every distance. Raises DataError when the text is too short.
    """
    counts_V = torch.bincount(ids_N).double()
    counts_V[[token for token in special if token < len(counts_V)]] = 0
    if int((counts_V > 0).sum()) < SPAN or len(ids_N) < distance:
        raise DataError(
            "the held-out text is too short to probe copying",
            got=f"{len(ids_N):,} tokens, {int((counts_V > 0).sum()):,} of them distinct",
            allowed=f"at least {distance:,} tokens, and {SPAN} distinct ones",
        )
    generator = torch.Generator().manual_seed(seed)
    spans_BS = torch.multinomial(counts_V.expand(trials, -1), SPAN, generator=generator)
    starts_B = torch.randint(len(ids_N) - distance + 1, (trials,), generator=generator)
    between_BT = ids_N[starts_B[:, None] + torch.arange(distance)]
    return torch.cat([spans_BS, between_BT, spans_BS], dim=1)


def copy_loss(
    model: nn.Module, rows_BT: Tensor, *, batch_size: int, progress: Progress = SILENT
) -> tuple[float, float]:
    """Mean loss in nats on the first and on the second span of rows made by `copy_rows`.

    The first token of a span is left out: nothing says that the span begins there.
    """
    first, second = 0.0, 0.0
    for ids_BT in torch.split(rows_BT, batch_size):
        ids_BT = ids_BT.to(next(model.parameters()).device)
        logits_BTV = model(ids_BT).logits
        first += float(losses(logits_BTV[:, : SPAN - 1], ids_BT[:, 1:SPAN]).double().sum())
        second += float(losses(logits_BTV[:, -SPAN:-1], ids_BT[:, 1 - SPAN :]).double().sum())
        progress.advance(ids_BT.numel())
    scored = len(rows_BT) * (SPAN - 1)
    return first / scored, second / scored


def passkey_rows(tokenizer: Any, ids_N: Tensor, context: int, *, trials: int, seed: int) -> tuple[Tensor, list[int]]:
    """Texts of `context` tokens with a five-digit number hidden in each, at depths spread evenly, and asked for last.

    Returns `ids_BT` and the tokens of each row's number, which end the row. The filler is held-out text. Raises
    SettingError when the context is too short for the question, DataError when the text is too short for the context.
    """
    opening, before, after, question = (_encode(tokenizer, text) for text in (HIDDEN, *NEEDLE, QUESTION))
    generator = torch.Generator().manual_seed(seed)
    depths = ((torch.randperm(trials, generator=generator) + 0.5) / trials).tolist()
    rows, answers = [], []
    for depth in depths:
        key = _encode(tokenizer, f" {int(torch.randint(10_000, 100_000, (1,), generator=generator))}")
        room = context - len(opening) - len(before) - 2 * len(key) - len(after) - len(question)
        if room < 1:
            raise SettingError(
                "the context is too short for the question",
                where="passkey_contexts",
                got=context,
                allowed=f"at least {context - room + 1} tokens",
            )
        if room > len(ids_N):
            raise DataError(
                "the held-out text is too short to fill a passkey context",
                got=f"{len(ids_N):,} tokens",
                allowed=f"at least {room:,}",
            )
        start, split = int(torch.randint(len(ids_N) - room + 1, (1,), generator=generator)), round(depth * room)
        filler = ids_N[start : start + room].tolist()
        rows.append([*opening, *filler[:split], *before, *key, *after, *filler[split:], *question, *key])
        answers.append(len(key))
    return torch.tensor(rows), answers


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def passkey(
    model: nn.Module, rows_BT: Tensor, answers: Sequence[int], *, batch_size: int, progress: Progress = SILENT
) -> tuple[float, float]:
    """Share of numbers that greedy decoding gives back whole, and the mean loss in nats on their tokens.

    Greedy decoding repeats the number exactly when each of its tokens is the likeliest after those before it, so one
    pass over the row, number included, answers both.
    """
    exact, lost = 0, 0.0
    for ids_BT, lengths in zip(torch.split(rows_BT, batch_size), _split(answers, batch_size), strict=True):
        ids_BT = ids_BT.to(next(model.parameters()).device)
        longest = max(lengths)
        logits_BTV, targets_BT = model(ids_BT).logits[:, -longest - 1 : -1], ids_BT[:, -longest:]
        loss_BT, right_BT = losses(logits_BTV, targets_BT), logits_BTV.argmax(-1) == targets_BT
        for row, length in enumerate(lengths):
            exact += bool(right_BT[row, -length:].all())
            lost += float(loss_BT[row, -length:].double().sum())
        progress.advance(ids_BT.numel())
    return exact / len(answers), lost / sum(answers)


def _split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# --- samples ---------------------------------------------------------------------------------------------------------


def prompts(ids_N: Tensor, count: int) -> Tensor:
    """`count` prompts of equal length, spread evenly over the held-out text: `ids_BT`. Raises DataError."""
    if len(ids_N) < PROMPT:
        raise DataError("the held-out text is too short for a prompt", got=f"{len(ids_N)} tokens", allowed=PROMPT)
    starts_B = torch.linspace(0, len(ids_N) - PROMPT, count + 1)[:count].long()
    return ids_N[starts_B[:, None] + torch.arange(PROMPT)]


def continuations(model: nn.Module, tokenizer: Any, ids_BT: Tensor, new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily."""
    ids_BT = ids_BT.to(next(model.parameters()).device)
    made_BT = hf.generate(model, ids_BT, max_new_tokens=new_tokens, do_sample=False)
    return [decode(tokenizer, row_T) for row_T in made_BT[:, ids_BT.shape[1] :]]


def decode(tokenizer: Any, ids_T: Tensor) -> str:
    """The text of some tokens, without the special ones and with its blanks as they are."""
    return str(tokenizer.decode(ids_T.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def side_by_side(
    models: Mapping[str, nn.Module], tokenizer: Any, prompts_BT: Tensor, new_tokens: int
) -> list[dict[str, str]]:
    """Each prompt, and what each model makes of it, by its name."""
    found = [{"prompt": decode(tokenizer, ids_T)} for ids_T in prompts_BT]
    for who, model in models.items():
        for sample, text in zip(found, continuations(model, tokenizer, prompts_BT, new_tokens), strict=True):
            sample[who] = text
    return found


# --- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What every model is asked, made before any of them is loaded: a text that is too short is told at once."""

    copies: Mapping[int, Tensor]  # ids_BT by distance
    keys: Mapping[int, tuple[Tensor, list[int]]]  # ids_BT and answers by context
    prompts: Tensor  # ids_BT

    def recall(self, model: nn.Module, *, batch_size: int, what: str, progress: Progress = SILENT) -> dict[str, Any]:
        """Of one model, `copy_loss` and `copy_gain` by distance, `passkey` and `passkey_loss` by context."""
        rows = [*self.copies.values(), *(rows_BT for rows_BT, _ in self.keys.values())]
        found: dict[str, Any] = {}
        progress.start(what, sum(rows_BT.numel() for rows_BT in rows), "tokens")
        try:
            for distance, rows_BT in self.copies.items():
                first, second = copy_loss(model, rows_BT, batch_size=batch_size, progress=progress)
                found["copy_loss_first"] = first  # one for all distances: the spans are, and nothing is before them
                found.setdefault("copy_loss", {})[str(distance)] = second
                found.setdefault("copy_gain", {})[str(distance)] = first - second
            for context, (rows_BT, answers) in self.keys.items():
                exact, lost = passkey(model, rows_BT, answers, batch_size=batch_size, progress=progress)
                found.setdefault("passkey", {})[str(context)] = exact
                found.setdefault("passkey_loss", {})[str(context)] = lost
        finally:
            progress.stop()
        return found


def ask(
    tokenizer: Any,
    ids_N: Tensor,
    *,
    copy_distances: Sequence[int],
    copy_trials: int,
    passkey_contexts: Sequence[int],
    passkey_trials: int,
    samples: int,
    seed: int,
) -> Asked:
    """Make the rows of every probe. Raises what `copy_rows`, `passkey_rows` and `prompts` raise."""
    special = tokenizer.all_special_ids
    return Asked(
        {each: copy_rows(ids_N, each, trials=copy_trials, seed=seed, special=special) for each in copy_distances},
        {each: passkey_rows(tokenizer, ids_N, each, trials=passkey_trials, seed=seed) for each in passkey_contexts},
        prompts(ids_N, samples) if samples else ids_N[:0],
    )


# --- lm-eval ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval, found before any model is loaded, with the names of their metrics."""

    tasks: tuple[str, ...]
    metrics: Mapping[str, tuple[str, ...]]  # by task; a group has those of its tasks
    manager: Any
    limit: int | None

    def run(
        self, model: nn.Module, tokenizer: Any, *, batch_size: int, max_length: int, progress: Progress = SILENT
    ) -> dict[str, dict[str, float]]:
        """Scores by task (and by group) and metric, each with its standard error where lm-eval has one."""
        from lm_eval import simple_evaluate

        wrapper = _wrapper(progress, sys.stderr)
        with _quiet():
            found = simple_evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
                tasks=list(self.tasks),
                task_manager=self.manager,
                limit=self.limit,
                bootstrap_iters=100,
                log_samples=False,
            )
        return {task: _scores(values) for task, values in found["results"].items()}


def _wrapper(progress: Progress, stderr: TextIO) -> Any:
    """lm-eval's own wrapper of transformers' models, with our progress in the place of its bars."""
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
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            with shown(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, **options: Any) -> Any:
            progress.advance(len(inps))
            return super()._model_call(inps, **options)

        def _model_generate(self, context: Any, **options: Any) -> Any:
            progress.advance(len(context))
            return super()._model_generate(context, **options)

    return Wrapper


def find_tasks(tasks: Sequence[str], folder: str | None, limit: int | None) -> Harness:
    """Find tasks in a folder of task files first, then among lm-eval's own.

    Raises SettingError when lm-eval is not installed, the folder is not there, or no task has that name, and DataError
    when a task's data cannot be loaded.
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
            next="is the data where the task's file says, or the network there?",
        ) from error
    metrics = {name: tuple(task.aggregation()) for name, task in found["tasks"].items()}
    for group in found["groups"]:
        metrics[group] = tuple(dict.fromkeys(each for name in list(metrics) for each in metrics[name]))
    return Harness(tuple(tasks), metrics, manager, limit)


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.3, "acc_stderr,none": 0.01}` -> `{"acc": 0.3, "acc_stderr": 0.01}`; filters are kept by name."""
    scores = {}
    for name, value in values.items():
        metric, comma, chosen = name.partition(",")
        if comma and isinstance(value, int | float):
            scores[metric if chosen == "none" else f"{metric}/{chosen}"] = float(value)
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log at errors only, its bars and prints nowhere, its bootstrap in this process: no fork of threads."""
    logger, variable = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    os.environ[variable] = "1"
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
