"""The settings of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kvfold.errors import SettingError, choices
from kvfold.evaluate.settings import BenchSettings, EvaluateSettings
from kvfold.settings import MOST, SEEDS, check_range, setting

GROUPS = ("cache", "weights", "pruning", "depth", "window", "stack")
SINKS = 4  # first tokens that a window keeps
PIECE = 64  # hqq packs numbers in groups of as many


@dataclass(frozen=True)
class CompareSettings:
    """Which alternatives are compared, on which text, and how they are timed."""

    data: str = field(metadata={"help": "Held-out text: a file, a folder, a hub data set, or stdlib:heldout."})
    rows: tuple[str, ...] = setting(
        GROUPS,
        "Alternatives: cache (fp8, int4, int2), weights (int8, int4), pruning (half of the weights are zero), depth "
        "(half of the layers, distilled), window (only the last and the first tokens), stack (each student with an fp8 "
        "and with an int4 cache).",
    )
    eval_tokens: int = setting(16_384, "Tokens of the held-out text to evaluate.")
    sequence_length: int | None = setting(
        None, "Tokens of a window. Default: the sequence length of training, at most 1024."
    )
    batch_size: int = setting(16, "Windows in one forward pass.")
    copy_distances: tuple[int, ...] = setting((16, 128), "Tokens between a random span and its copy.")
    copy_trials: int = setting(32, "Spans for each distance.")
    lm_eval: tuple[str, ...] = setting((), "Tasks of lm-eval (needs kvfold[eval]). Default: none.")
    lm_eval_tasks_dir: str | None = setting(None, "Folder of more lm-eval tasks. Default: none.")
    lm_eval_limit: int | None = setting(None, "Documents of each lm-eval task. Default: all.")
    train_data: str | None = setting(None, "Text on which the model of half the depth is distilled. Default: none.")
    tokens: int | None = setting(None, "Tokens on which it is distilled. Default: not trained.")
    window: int | None = setting(
        None, "Last tokens that the row window keeps, with the first 4. Default: a quarter of the longest --context."
    )
    context: tuple[int, ...] = setting((1024,), "Tokens of the prompts that are timed: multiples of 64.")
    batch: tuple[int, ...] = setting((1,), "Sequences decoded together.")
    new_tokens: int = setting(16, "Tokens decoded after each prompt.")
    repeats: int = setting(5, "Rounds; each round times every row once.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Format in which the models compute.")
    seed: int = setting(0, "Seed of probes, prompts and training.")

    def __post_init__(self) -> None:
        """Refuse what cannot be compared, with SettingError, before anything is loaded."""
        unknown = [each for each in self.rows if each not in GROUPS]
        if unknown:
            raise SettingError(f"no row is named {unknown[0]!r}", where="compare", allowed=choices(GROUPS))
        if (self.tokens is None) != (self.train_data is None):
            raise SettingError("distillation needs both tokens and train_data", where="compare", next="give both")
        check_range(self, "compare", 1, float("inf"), "tokens")
        check_range(self, "compare", 1, MOST, "window")
        check_range(self, "compare", 0, SEEDS - 1, "seed")
        if odd := [each for each in self.context if each % PIECE]:
            raise SettingError(
                "context must be a multiple of 64",
                where="compare",
                got=odd[0],
                next="hqq packs numbers in groups of 64",
            )
        _ = self.evaluation, self.timing  # which check the rest

    @property
    def evaluation(self) -> EvaluateSettings:
        """The same numbers as of `kvfold evaluate`."""
        names = ("data", "sequence_length", "batch_size", "copy_distances", "copy_trials", "seed", "dtype")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*names, *_TASKS)}
        return EvaluateSettings(**given, tokens=self.eval_tokens, last_words=0, samples=0, gate=None, fp8=False)

    @property
    def timing(self) -> BenchSettings:
        """The same numbers as of `kvfold bench`."""
        names = ("context", "batch", "new_tokens", "repeats", "dtype", "seed")
        return BenchSettings(**{name: getattr(self, name) for name in names}, fp8=False)

    @property
    def kept(self) -> int:
        """Last tokens that the row `window` keeps."""
        return self.window or max(1, max(self.context) // 4)


_TASKS = ("lm_eval", "lm_eval_tasks_dir", "lm_eval_limit")
