"""The settings of an evaluation and of a benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kvfold.errors import SettingError, choices
from kvfold.evaluate.gate import DEFAULT, METRICS, Threshold, parse
from kvfold.settings import MOST, SEEDS, check_range, setting

BEAMS = 1024  # at most: each has a cache of its own
THREADS = 4096  # at most: each is started, and none of them is refused by PyTorch
TRIALS = 1_000_000  # at most: all of them are drawn before the first is read


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure, on which text, and what must hold."""

    data: str = field(
        metadata={"help": "Held-out text: a file, a folder, a hub data set, or stdlib:heldout (formats: see uptrain)."}
    )
    tokens: int = setting(65_536, "Tokens to evaluate, from the beginning of the text.")
    sequence_length: int | None = setting(
        None, "Tokens of a window. Default: the sequence length of training, at most 1024."
    )
    stride: int | None = setting(None, "Tokens from one window to the next. Default: --sequence-length.")
    batch_size: int = setting(16, "Windows in one forward pass.")
    copy_distances: tuple[int, ...] = setting((16, 64, 128), "Tokens between a random span and its copy.")
    copy_trials: int = setting(64, "Spans for each distance.")
    last_words: int = setting(200, "Largest number of questions for the last word of a passage; 0 for none.")
    passkey_contexts: tuple[int, ...] = setting(
        (), "Lengths, in tokens, of texts that hide a number. Default: none; small models fail."
    )
    passkey_trials: int = setting(32, "Texts with a hidden number, for each length.")
    samples: int = setting(3, "Prompts that student and teacher continue greedily.")
    sample_tokens: int = setting(48, "Tokens of each continuation.")
    fp8: bool = setting(
        True,
        "Also measure with quantised caches: the loss in fp8; of a teacher, recall and tasks too, in fp8 and q4_0.",
    )
    beams: tuple[int, ...] = setting(
        (1, 4), "Numbers of beams with which an encoder-decoder answers pairs; 1 is greedy."
    )
    answers: int = setting(256, "Pairs that an encoder-decoder answers; 0 for none.")
    answer_tokens: int = setting(64, "Longest answer, in tokens.")
    lm_eval: tuple[str, ...] = setting((), "Tasks of lm-eval (needs kvfold[eval]). Default: none.")
    lm_eval_tasks_dir: str | None = setting(None, "Folder of more lm-eval tasks. Default: none.")
    lm_eval_limit: int | None = setting(None, "Documents of each lm-eval task. Default: all.")
    gate: str | None = setting(
        DEFAULT,
        "Conditions that must hold, such as 'loss<=teacher+0.05, last_word>=0.5'; else the exit status is 3. "
        "`default`: conditions on loss and recall, which are only reported; `none`: no gate.",
    )
    control: str | None = setting(None, "Record of the control's evaluation, for gates that name it. Default: none.")
    seed: int = setting(0, "Seed of the probes.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Format in which the models compute.")

    def __post_init__(self) -> None:
        """Refuse what no model can do, with SettingError, before anything is loaded."""
        for least, most, *names in (
            (1, math.inf, "tokens", "lm_eval_limit"),
            (0, math.inf, "answers"),
            (1, BEAMS, "beams"),
            (1, MOST, "sequence_length", "stride", "batch_size", "passkey_contexts", "sample_tokens", "answer_tokens"),
            (0, MOST, "copy_distances"),
            (1, TRIALS, "copy_trials", "passkey_trials"),
            (0, TRIALS, "samples", "last_words"),
            (0, SEEDS - 1, "seed"),
        ):
            check_range(self, "evaluate", least, most, *names)
        if self.lm_eval_tasks_dir is not None and not self.lm_eval:
            raise SettingError("lm_eval_tasks_dir needs tasks", where="evaluate", next="name them with lm_eval")
        for row in parse(self.gate):
            self._check_measured(row)

    def _check_measured(self, row: Threshold) -> None:
        """Refuse a row of the gate whose number these settings do not measure."""
        _, setting = METRICS[row.metric]
        if setting is not None:
            asked = () if setting == "beams" and not self.answers else getattr(self, setting)
            known = [str(value) for value in asked] if isinstance(asked, tuple) else []
            if not asked if setting in ("lm_eval", "last_words") else row.key not in known:
                raise SettingError(
                    f"{row.metric} is not measured{f' at {row.key}' if row.key else ''}",
                    where="gate",
                    got=row.expr,
                    allowed=choices(known) or None,
                    next=f"add it to {setting}" if row.key else f"set {setting}",
                )
        if row.reference == "control" and self.control is None:
            raise SettingError(
                "the gate names the control, and none is given",
                where="gate",
                got=row.expr,
                next="pass the record of its evaluation as control",
            )


@dataclass(frozen=True)
class BenchSettings:
    """What to time, how often, and in which number format."""

    context: tuple[int, ...] = setting((1024, 4096), "Tokens of the prompts.")
    batch: tuple[int, ...] = setting((1, 8), "Sequences decoded together.")
    new_tokens: int = setting(16, "Tokens decoded after each prompt.")
    repeats: int = setting(5, "Rounds; each round times every model once.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Format of computation and cache.")
    threads: int | None = setting(None, "Threads of PyTorch. Default: PyTorch's own number.")
    fp8: bool = setting(True, "Also time the teacher with an fp8 cache.")
    memory: int | None = setting(
        None, "Bytes (2G) of memory for which to time each model's largest batch. Default: not timed."
    )
    seed: int = setting(0, "Seed of the prompts.")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, with SettingError."""
        for name in ("context", "batch"):
            if not getattr(self, name):
                raise SettingError(f"{name} must be at least 1", where="bench", got=())
        check_range(self, "bench", 1, float("inf"), "memory")
        check_range(self, "bench", 1, MOST, "context", "batch", "new_tokens", "repeats")
        check_range(self, "bench", 1, THREADS, "threads")
        check_range(self, "bench", 0, SEEDS - 1, "seed")
