"""The settings of training runs, their learning rate over the steps, and the precision that `auto` stands for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvfold.contracts.site import Shape
from kvfold.contracts.stages import Stage
from kvfold.disk.output import fingerprint, standing
from kvfold.errors import SettingError
from kvfold.inputs import LARGEST
from kvfold.machine import Precision, best_precision
from kvfold.predict.training_memory import Checkpointing, Offload, check_offload
from kvfold.settings import MOST, SEEDS, check_range, differing, setting
from kvfold.train.stages import parse_loss, parse_stages

DEFAULTS = 1  # raised when the default of a training setting changes: identities leave out what has its default
RATE = 1e-3  # the peak learning rate of narrow models, and of Adafactor, which scales it by the weights
WIDE_RATE = 2e-4  # of others: SmolLM2 loses less at 2e-4 than at 5e-4 (docs/smollm2.md)
NARROW = 256
RANK = 65_536  # the largest of LoRA factors: wider than any model
_NOT_WEIGHTS = (  # settings that no weight depends on
    "data",
    "checkpoint_minutes",
    "checkpoint_steps",
    "log_every",
    "checkpointing",
    "offload",
    "replicas",
)


@dataclass(frozen=True)
class TrainSettings:
    """The settings that `uptrain` and `pretrain` share."""

    data: str = field(
        metadata={
            "help": "Training text: a .txt, .md, .jsonl, .json or .parquet file (also .gz, .bz2, .xz), a "
            "folder of .txt, .jsonl and .parquet files, a hub data set (owner/name), stdlib (the "
            "source of Python's library), or self (sampled from the teacher). An encoder-decoder "
            "also reads pairs from a .tsv or .jsonl file."
        }
    )
    tokens: int | None = setting(None, "Tokens to train on, such as 20M; required without --alpha.")
    sequence_length: int = setting(256, "Tokens of a sequence.")
    batch_size: int = setting(16, "Sequences in one optimiser step.")
    micro_batch: int | None = setting(
        None, "Sequences in one forward pass of a rank. Default: its share of --batch-size."
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate. Default: 0.001; for AdamW and models wider than 256, 0.0002."
    )
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "Learning-rate schedule; wsd is warmup-stable-decay."
    )
    warmup: float = setting(0.02, "Share of the steps in which the learning rate rises, from 0 to 1.")
    decay: float = setting(0.2, "Share of the steps in which wsd lowers the learning rate, from 0 to 1.")
    final_rate: float = setting(0.0, "Final learning rate, as a share of the peak.")
    optimizer: Literal["adamw", "adafactor"] = setting(
        "adamw", "Optimiser; adafactor multiplies its learning rate by the root mean square of each matrix."
    )
    dropout: float | None = setting(None, "Dropout probability. Default: the config's.")
    weight_decay: float = setting(0.1, "Weight decay of matrices.")
    beta1: float = setting(0.9, "Decay rate of AdamW's first moment.")
    beta2: float = setting(0.95, "Decay rate of AdamW's second moment.")
    clip: float = setting(1.0, "Largest gradient norm.")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "Format of matrix products; auto is bf16 where the hardware multiplies it natively."
    )
    compile: bool = setting(False, "Compile each block with torch.compile.")
    checkpointing: Checkpointing = setting(
        "none",
        "Activations that are computed again in the backward pass: those of a block, with or without the outputs of "
        "its matrix products.",
    )
    offload: Offload = setting(
        "none",
        "What is in the memory of the host: activations (the inputs of checkpointed blocks), parameters (also "
        "gradients and the optimiser's states, whose step the processor computes), or both.",
    )
    replicas: int = setting(1, "Copies of the model; each is sharded over ranks / replicas ranks.")
    checkpoint_minutes: float = setting(5.0, "Minutes between two saved states.")
    checkpoint_steps: int | None = setting(None, "Steps between two saved states, besides the minutes. Default: none.")
    log_every: int = setting(10, "Steps between two lines of the log.")
    seed: int = setting(0, "Random seed, also of the data order.")

    def __post_init__(self) -> None:
        """Raise SettingError for values out of range."""
        counts = ("sequence_length", "batch_size", "micro_batch", "log_every", "checkpoint_steps", "replicas")
        check_range(self, None, 1, MOST, *counts)
        check_range(self, None, 1, math.inf, "tokens")
        check_range(self, None, 0, 1, "warmup", "decay", "final_rate", "dropout", "beta1", "beta2")
        check_range(self, None, 0, sys.float_info.max, "weight_decay", "checkpoint_minutes")
        check_range(self, None, 0, SEEDS - 1, "seed")
        check_positive(self, None, "learning_rate", "clip")
        if 1 in (self.beta1, self.beta2):
            raise SettingError("beta1 and beta2 must be less than 1", got=f"{self.beta1:g} and {self.beta2:g}")
        check_offload(self.offload, self.checkpointing)
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise SettingError(
                "micro_batch must divide batch_size", got=f"{self.micro_batch}, and a batch of {self.batch_size}"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.sequence_length

    def pass_rows(self, world: int) -> int:
        """Sequences in one forward pass of a rank. Raises SettingError if the ranks cannot share batch and model."""
        if world % self.replicas:
            raise SettingError("replicas must divide the ranks", got=f"{self.replicas} replicas of {world} ranks")
        rows = min(self.micro_batch or self.batch_size, max(1, self.batch_size // world))
        if self.batch_size % (rows * world):
            raise SettingError(
                "the ranks must share a batch in equal parts",
                got=f"{self.batch_size} sequences in passes of {rows}, on {world} ranks",
                next="change batch_size or micro_batch",
            )
        return rows

    def check_length(self, shape: Shape, where: str) -> None:
        """Raise SettingError if sequences are longer than the positions of a model."""
        if self.sequence_length > shape.max_positions:
            raise SettingError(
                "sequence_length is longer than the model's positions",
                where=where,
                got=self.sequence_length,
                allowed=f"1 to {shape.max_positions}",
            )

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return RATE if self.learning_rate is None else self.learning_rate

    def identity(self) -> dict[str, Any]:
        """The settings that differ from their default and that the weights depend on."""
        found = {name: value for name, value in differing(self).items() if name not in _NOT_WEIGHTS}
        return {"defaults": DEFAULTS, **found}


@dataclass(frozen=True)
class UptrainSettings(TrainSettings):
    """How a student is trained, and for how long."""

    alpha: float | None = setting(
        None, "Tokens to train on, as a share of the pre-training tokens (paper: 0.05), instead of --tokens."
    )
    pretraining_tokens: int | None = setting(
        None, "Tokens that the teacher was trained on, such as 2T. Default: the number in its kvfold.json."
    )
    loss: str | None = setting(
        None, "Sum of ce, kl and attention. Default: the method's stages, or kl+0.3ce with a teacher."
    )
    stages: str | None = setting(
        None, "Losses with their shares of the tokens: attention:0.1,kl:0.9. Default: the method's."
    )
    temperature: float = setting(1.0, "Temperature of the KL to the teacher.")
    attention_inputs: Literal["own", "teacher"] = setting(
        "own", "Inputs of the student's attentions in a stage that only matches attention outputs."
    )
    trainable: tuple[str, ...] = setting((), "Roles to train, such as q,k,v,o. Default: every parameter.")
    lora: int | None = setting(
        None, "Rank of LoRA factors, merged when saved (needs kvfold[lora]). Default: full weights."
    )
    converted_only: bool = setting(False, "Train only the attention that the conversion changed.")
    levels: int = setting(
        1, "Levels of depth; with 2, a student of half the layers trains first and is put back into the whole one."
    )
    level_share: float = setting(0.5, "Share of the tokens on which the student of half the layers trains.")
    interpolation: float = setting(0.25, "Share of its weights in the whole student that trains on.")

    def __post_init__(self) -> None:
        """Raise SettingError for values out of range, and for settings that contradict each other."""
        super().__post_init__()
        if (self.tokens is None) == (self.alpha is None):
            raise SettingError(
                "the length of training needs one of tokens and alpha",
                where="uptrain",
                got="neither" if self.tokens is None else "both",
                next="give --tokens, or --alpha",
            )
        check_range(self, "uptrain", 1, LARGEST, "pretraining_tokens")
        check_range(self, "uptrain", 1, RANK, "lora")
        check_positive(self, "uptrain", "alpha", "temperature", "level_share", "interpolation")
        check_range(self, "uptrain", 0, 1, "level_share", "interpolation")
        check_range(self, "uptrain", 1, 2, "levels")
        if self.loss is not None and self.stages is not None:
            raise SettingError("loss and stages exclude each other", where="uptrain", next="leave out one of them")
        if self.lora is not None and self.trainable:
            raise SettingError(
                "lora trains factors of q, k, v and o, and trainable names other parameters",
                where="uptrain",
                got=f"rank {self.lora}, and trainable {','.join(self.trainable)}",
                next="leave out one of them",
            )
        stages = self.asked()  # raises for a loss that cannot be parsed
        if self.attention_inputs == "teacher" and not any(set(each.losses) == {"attention"} for each in stages):
            raise SettingError(
                "attention_inputs teacher needs a stage with the loss attention alone",
                where="uptrain",
                next="give --stages attention:0.1,kl:0.9",
            )

    def rated(self, width: int) -> UptrainSettings:
        """The settings with a learning rate, for a model of this width."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=RATE if width <= NARROW or self.optimizer == "adafactor" else WIDE_RATE)

    def identity(self) -> dict[str, Any]:
        """The settings that differ from their default and that the weights depend on."""
        found = super().identity()
        if found.get("learning_rate") == RATE:  # was the default of all models
            del found["learning_rate"]
        return found

    def asked(self) -> list[Stage]:
        """The stages of `stages` or `loss`; empty if the method chooses."""
        if self.stages is not None:
            return [
                replace(stage, converted=self.converted_only) for stage in parse_stages(self.stages, self.trainable)
            ]
        return [] if self.loss is None else [self.single(self.loss)]

    def single(self, loss: str) -> Stage:
        """One stage with this loss."""
        return Stage(loss, 1.0, parse_loss(loss), self.trainable, self.converted_only)


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """How a model is trained from random weights."""

    data: str = setting(
        "stdlib",
        "Training text: a .txt, .md, .jsonl, .json or .parquet file (also .gz, .bz2, .xz), a folder of .txt, .jsonl "
        "and .parquet files, a hub data set (owner/name), or stdlib (the source of Python's library). An "
        "encoder-decoder also reads pairs from a .tsv or .jsonl file.",
    )
    learning_rate: float = setting(3e-3, "Peak learning rate.")
    schedule: Literal["cosine", "wsd"] = setting("wsd", "Learning-rate schedule; wsd is warmup-stable-decay.")

    tokenizer_data: tuple[str, ...] = setting(
        (), "Texts that the tokenizer also trains on, besides --data. Default: none."
    )

    def __post_init__(self) -> None:
        """Raise SettingError for values out of range, and for text that a teacher would have to write."""
        super().__post_init__()
        if self.data == "self":
            raise SettingError("there is no teacher to sample text from", where="pretrain", next="give --data TEXT")


def check_positive(settings: Any, where: str | None, *names: str) -> None:
    """Raise SettingError unless these fields, where they are set, are positive and finite."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingError(f"{name} must be positive", where=where, got=value)


def rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate at a step of `steps`, as a share of its peak.

    All schedules rise linearly over the warmup. `cosine` then falls as half a cosine to `final_rate`. `wsd` stays, and
    falls to it as `1 - sqrt` over the last steps (Hägele et al. 2024, arXiv 2405.18392). `constant` stays: T5's own
    schedule, `1 / sqrt(n)`, hardly changes in an uptraining that starts after a million steps.
    """
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        fall = 0.5 * (1 - math.cos(math.pi * done))
    else:
        decay = min(round(settings.decay * steps), steps - warmup)
        done = (step - (steps - decay)) / max(1, decay)
        fall = math.sqrt(done) if done > 0 else 0.0
    return 1 - (1 - settings.final_rate) * fall


Settings = TypeVar("Settings", bound=TrainSettings)


def decide(
    settings: Settings, out: str | Path, identity: Callable[[Settings], Mapping[str, Any]], *, overwrite: bool = False
) -> Settings:
    """Settings with a precision in place of `auto`, so that no identity depends on the machine.

    If an output or unfinished work of one precision stands at `out`, its precision is kept, so that a run continues on
    another machine as it began. Otherwise it is the best precision of this machine.
    """
    if settings.precision != "auto":
        return settings
    choices: tuple[Precision, ...] = ("bf16", "fp32") if best_precision() == "bf16" else ("fp32", "bf16")
    known = {fingerprint(identity(each)): each for each in (replace(settings, precision=each) for each in choices)}
    there = standing(out, overwrite=overwrite)
    return next((known[inputs] for inputs in there if inputs in known), next(iter(known.values())))
