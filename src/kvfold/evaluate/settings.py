"""The settings of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kvfold.errors import SettingError, choices
from kvfold.evaluate.gate import DEFAULT, METRICS, Threshold, parse
from kvfold.settings import MOST, SEEDS, check_range

BEAMS = 1024  # at most: each has a cache of its own
TRIALS = 1_000_000  # at most: all of them are drawn before the first is read


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure, on which text, and what must hold."""

    data: str = field(
        metadata={"help": "Held-out text: a file, a folder, a hub data set, or stdlib:heldout (formats: see uptrain)."}
    )
    tokens: int = field(default=65_536, metadata={"help": "Tokens to evaluate, from the beginning of the text."})
    sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of a window. Default: that of training, at most 1024."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next. Default: --sequence-length."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass."})
    copy_distances: tuple[int, ...] = field(
        default=(16, 64, 128), metadata={"help": "Tokens between a random span and its copy."}
    )
    copy_trials: int = field(default=64, metadata={"help": "Spans for each distance."})
    last_words: int = field(
        default=200, metadata={"help": "Questions for the last word of a passage, at most; 0 for none."}
    )
    passkey_contexts: tuple[int, ...] = field(
        default=(), metadata={"help": "Tokens of the texts that hide a number. Default: none; small models fail."}
    )
    passkey_trials: int = field(default=32, metadata={"help": "Hidden numbers for each context."})
    samples: int = field(default=3, metadata={"help": "Prompts that student and teacher continue greedily."})
    sample_tokens: int = field(default=48, metadata={"help": "Tokens of each continuation."})
    fp8: bool = field(default=True, metadata={"help": "Also measure the loss with an fp8 cache."})
    beams: tuple[int, ...] = field(
        default=(1, 4), metadata={"help": "Numbers of beams with which an encoder-decoder answers pairs; 1 is greedy."}
    )
    answers: int = field(default=256, metadata={"help": "Pairs that an encoder-decoder answers; 0 for none."})
    answer_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    lm_eval: tuple[str, ...] = field(
        default=(), metadata={"help": "Tasks of lm-eval (needs kvfold[eval]). Default: none."}
    )
    lm_eval_tasks_dir: str | None = field(
        default=None, metadata={"help": "Folder of more lm-eval tasks. Default: none."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Documents of each lm-eval task. Default: all."})
    gate: str | None = field(
        default=DEFAULT,
        metadata={
            "help": "Conditions, such as 'loss<=teacher+0.05, last_word>=0.5'; else exit status 3. `default`: on loss "
            "and recall, and only reported; `none`: no gate."
        },
    )
    control: str | None = field(
        default=None, metadata={"help": "Record of the control's evaluation, for gates that name it. Default: none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the probes."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Format in which the models compute."}
    )

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
