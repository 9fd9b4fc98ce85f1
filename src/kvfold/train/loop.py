"""The training loop's machinery: schedules, the optimiser, state on disk, the log, and the loop itself.

One process now. What sharding (FSDP2) has to change is `place`, which puts a model where it trains, and `State.save`
and `State.load`, which put its tensors on disk and back.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kvfold.disk.output import damaged, disk_errors, replacing, write_json
from kvfold.errors import Interrupted, SettingError, TrainingError
from kvfold.formats import json_text
from kvfold.machine import best_device, best_precision, describe, multiplies_bf16
from kvfold.progress import Progress
from kvfold.settings import MOST, SEEDS, check_range, differing
from kvfold.train.state import SLOTS, STATE, Position, kept_lines, load_slot, read_marker

LOG = "train.jsonl"

_NO_MATTER = ("data", "checkpoint_minutes", "checkpoint_steps", "log_every")
DEFAULTS = 1  # raised when the default of a training setting changes: identities leave out what has its default

Objective = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""A batch, `ids_BT` (length + 1 wide) or pairs -> the loss with a gradient, and its parts by name without one."""


class Batches(Protocol):
    """What is trained on: the batch of a step, a function of (seed, step), that moves and parts as a tensor does."""

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Any:
        """The rows of a step."""


@dataclass(frozen=True)
class TrainSettings:
    """What every training run can be told; `uptrain` and `pretrain` add what to train on."""

    data: str = field(
        metadata={
            "help": "Training text: a .txt, .md, .jsonl, .json or .parquet file (also .gz, .bz2, .xz), a "
            "folder of .txt, .jsonl and .parquet files, a hub data set (owner/name), stdlib (the "
            "source of Python's library), or self (sampled from the teacher). An encoder-decoder "
            "also reads pairs from a .tsv or .jsonl file."
        }
    )
    tokens: int | None = field(
        default=None, metadata={"help": "Tokens to train on, such as 20M; required without --alpha."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    batch_size: int = field(default=16, metadata={"help": "Sequences in one optimiser step."})
    micro_batch: int | None = field(
        default=None, metadata={"help": "Sequences in one forward pass. Default: --batch-size."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    schedule: Literal["cosine", "wsd", "constant"] = field(
        default="cosine", metadata={"help": "Learning-rate schedule; wsd is warmup-stable-decay."}
    )
    warmup: float = field(default=0.02, metadata={"help": "Share of the steps that warm up, from 0 to 1."})
    decay: float = field(default=0.2, metadata={"help": "Share of the steps that decay in wsd, from 0 to 1."})
    final_rate: float = field(default=0.0, metadata={"help": "Final learning rate, as a share of the peak."})
    optimizer: Literal["adamw", "adafactor"] = field(
        default="adamw", metadata={"help": "Optimiser; adafactor's rates are relative to a matrix's size."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout probability. Default: the config's."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of matrices."})
    beta1: float = field(default=0.9, metadata={"help": "Decay rate of AdamW's first moment."})
    beta2: float = field(default=0.95, metadata={"help": "Decay rate of AdamW's second moment."})
    clip: float = field(default=1.0, metadata={"help": "Largest gradient norm."})
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto",
        metadata={"help": "Format of matrix products; auto is bf16 where the hardware multiplies it natively."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile."})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "Minutes between two saved states."})
    checkpoint_steps: int | None = field(
        default=None, metadata={"help": "Steps between two saved states, besides the minutes. Default: none."}
    )
    log_every: int = field(default=10, metadata={"help": "Steps between two lines of the log."})
    seed: int = field(default=0, metadata={"help": "Random seed, also of the data order."})

    def __post_init__(self) -> None:
        """Refuse what cannot be, with SettingError."""
        for name in ("tokens", "sequence_length", "batch_size", "micro_batch", "log_every", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1", got=value)
        for name in ("warmup", "decay", "final_rate", "beta1", "beta2", "dropout"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise SettingError(f"{name} is a share", got=getattr(self, name), allowed="0 to 1")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise SettingError(f"{name} must be less than 1", got=getattr(self, name))
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name} must be positive", got=getattr(self, name))
        check_range(self, None, 0, sys.float_info.max, "weight_decay", "checkpoint_minutes")
        check_range(
            self, None, 1, MOST, "sequence_length", "batch_size", "micro_batch", "log_every", "checkpoint_steps"
        )
        check_range(self, None, 0, SEEDS - 1, "seed")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise SettingError(
                "micro_batch must divide batch_size", got=f"{self.micro_batch}, and a batch of {self.batch_size}"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.sequence_length

    def identity(self) -> dict[str, Any]:
        """The settings that differ from their default and decide the weights.

        The name of the text and how often to save and to log do not decide them.
        """
        found = {name: value for name, value in differing(self).items() if name not in _NO_MATTER}
        return {"defaults": DEFAULTS, **found}


def rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step of `steps`.

    Both schedules rise linearly over the warmup. `cosine` then falls as half a cosine; `wsd` stays, and falls as
    `1 - sqrt` over the last steps (Hägele et al. 2024, arXiv 2405.18392); both end near `final_rate`. `constant` stays:
    T5's own schedule, `1 / sqrt(n)`, is 1e-3 for all of an uptraining that begins behind a million steps.
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


@dataclass
class Work:
    """One stretch of training: an objective on some parameters for some steps."""

    name: str
    steps: int
    objective: Objective
    groups: Callable[[], list[dict[str, Any]]]  # parameters, their `share` of the learning rate, `weight_decay`
    finish: Callable[[], None] | None = None  # changes the model when the stretch is over


def parameter_groups(
    named: Mapping[str, nn.Parameter], weight_decay: float, shares: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameters by share of the learning rate and weight decay; vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        key = ((shares or {}).get(name, 1.0), weight_decay if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "share": share, "weight_decay": decay} for (share, decay), params in groups.items()]


def place(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Put a model where it trains, ready to train. Sharding wraps it here."""
    model.to(best_device()).train()
    if settings.dropout is not None:
        for module in model.modules():
            # the latter two of attention probabilities
            for name in ("p",) if isinstance(module, nn.Dropout) else ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, settings.dropout)
    if settings.compile:
        whole: Any = model
        paired = whole.config.is_encoder_decoder
        for part in (whole.get_encoder(), whole.get_decoder()) if paired else (whole.base_model,):
            part.compile()
    return model


def make_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser of a stretch.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) is torch's: steps are scaled by a matrix's own root mean square
    and clipped at 1, second moments are kept by row and column, first moments not at all.
    """
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


# --- state on disk -------------------------------------------------------------------------------------------------


class State:
    """What a run needs to go on: two slots, and a marker that names the good one.

    A slot is written whole before the marker turns to it, so a process killed at any moment leaves a good state.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def position(self) -> Position | None:
        """How far the saved state has come; None when there is none. Raises OutputError when it is damaged."""
        marker = read_marker(self.folder)
        return None if marker is None else marker.position

    def save(self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state into the slot that is not in use, then turn the marker."""
        marker = read_marker(self.folder)
        slot = SLOTS[marker is not None and marker.slot == SLOTS[0]]
        with disk_errors(self.folder), (self.folder / slot).open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
            write_json(self.folder / STATE, {"slot": slot, "position": vars(position)})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the good slot into a model and an optimiser of the same make."""
        marker = read_marker(self.folder)
        assert marker is not None  # its position was asked for before
        load_slot(self.folder / marker.slot, model, optimizer, best_device())

    def remove(self) -> None:
        """Delete the state of a run that is complete."""
        for name in (STATE, *SLOTS):
            (self.folder / name).unlink(missing_ok=True)


# --- the loop ------------------------------------------------------------------------------------------------------


class Log:
    """`train.jsonl`, one object a line, and TensorBoard beside it when that is installed."""

    def __init__(self, folder: Path, step: int):
        path = folder / LOG
        kept = kept_lines(path, step) if step and path.exists() else b""
        with replacing(path) as sibling:
            sibling.write_bytes(kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line."""
        self._file.write(json_text(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's, or None when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that is looked at between steps; the second one is itself again."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set  # Python delivers signals to the main thread alone
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def note(kind: int, frame: FrameType | None) -> None:
        stop.set()
        for known, handler in before.items():
            signal.signal(known, handler)

    for kind in before:
        signal.signal(kind, note)
    try:
        yield stop.is_set
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def train(
    model: nn.Module,
    works: Sequence[Work],
    tokens: Batches,
    settings: TrainSettings,
    folder: Path,
    progress: Progress,
) -> Position:
    """Run every stretch, from the state in `folder` when there is one, and return how far it came.

    Raises TrainingError when the loss is not a number or diverges, Interrupted on a signal; the state is saved first.
    """
    if settings.precision == "auto":
        settings = replace(settings, precision=best_precision())
    slow = settings.precision == "bf16" and not multiplies_bf16()
    progress.say(f"training in {settings.precision} on {describe()}{', which emulates it: slow' if slow else ''}")
    state = State(folder)
    position = state.position() or Position()
    if position.stage > len(works):
        raise damaged(folder / STATE)
    resumed = position.step > 0
    for work in works[: position.stage]:
        if work.finish:
            work.finish()  # shapes follow the stages that are done; the weights come from the state
    if resumed:
        progress.say(f"going on from step {position.step:,}")
    log = Log(folder, position.step)
    progress.start("train", sum(work.steps for work in works) * settings.step_tokens, "tokens")
    progress.advance(position.tokens)
    try:
        with _signals() as stopped, torch.random.fork_rng():
            for work in works[position.stage :]:
                run = _Run(model, work, tokens, settings, state, position, log, progress, stopped)
                if resumed:
                    state.load(model, run.optimizer)
                    resumed = False
                run.all()
        log.write({"done": True, **{name: getattr(position, name) for name in ("step", "tokens", "seconds")}})
    finally:
        log.close()
        progress.stop()
    return position


@dataclass
class _Run:
    """One stretch under way."""

    model: nn.Module
    work: Work
    tokens: Batches
    settings: TrainSettings
    state: State
    position: Position
    log: Log
    progress: Progress
    stopped: Callable[[], bool]

    def __post_init__(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.parameters = [parameter for group in self.work.groups() for parameter in group["params"]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(self.work.groups(), self.settings)
        self.saved = self.started = self.noted = time.monotonic()
        self.first = self.noted_step = self.position.step

    def all(self) -> None:
        """Every step that is left, then the end of the stretch."""
        settings, position = self.settings, self.position
        before = position.seconds
        while position.stage_step < self.work.steps:
            loss, parts, norm, lr = self.step()
            position.step, position.stage_step = position.step + 1, position.stage_step + 1
            position.tokens += settings.step_tokens
            position.seconds = round(before + time.monotonic() - self.started, 3)
            self.note(loss, parts, norm, lr)
            if self.stopped():
                self.save()
                raise Interrupted(
                    f"stopped at step {position.step}, and its state is saved",
                    where=self.state.folder,
                    next="the same command continues",
                )
            steps, minutes = settings.checkpoint_steps, (time.monotonic() - self.saved) / 60
            if minutes >= settings.checkpoint_minutes or (steps and position.step % steps == 0):
                self.save()
        if self.work.finish:
            self.work.finish()
        position.stage, position.stage_step, position.smooth, position.lowest = position.stage + 1, 0, None, None

    def step(self) -> tuple[float, dict[str, float], float, float]:
        """One optimiser step: loss, its parts, the gradient's norm before clipping, the learning rate."""
        settings, position = self.settings, self.position
        torch.manual_seed(settings.seed * 1_000_003 + position.step)  # dropout, where a model has it
        batch = self.tokens.batch(
            position.step, seed=settings.seed, batch_size=settings.batch_size, length=settings.sequence_length
        )
        lr = settings.learning_rate * rate(settings, position.stage_step, self.work.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        micro = settings.micro_batch or settings.batch_size
        count = settings.batch_size // micro
        loss = 0.0
        parts: dict[str, float] = {}
        device = best_device()
        self.optimizer.zero_grad(set_to_none=True)
        for rows in batch.to(device, non_blocking=True).split(micro):
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
                value, named = self.work.objective(rows)
            (value / count).backward()  # type: ignore[no-untyped-call]
            loss += float(value.detach()) / count
            for name, part in named.items():
                parts[name] = parts.get(name, 0.0) + float(part) / count
        norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip))
        self.guard(loss, norm)
        self.optimizer.step()
        return loss, parts, norm, lr

    def guard(self, loss: float, norm: float) -> None:
        """Stop, before the weights are touched, when the loss is not a number or far above what it was."""
        position, what = self.position, None
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not math.isfinite(norm):
            what = f"the gradient's norm is {norm}"
        else:
            smooth = loss if position.smooth is None else 0.95 * position.smooth + 0.05 * loss
            lowest = smooth if position.lowest is None else min(position.lowest, smooth)
            if smooth > 3 * lowest + 1:
                what = f"the loss diverged, from {lowest:.3f} to {smooth:.3f}"
            else:
                position.smooth, position.lowest = smooth, lowest
        if what:
            self.save()
            raise TrainingError(
                f"{what} at step {position.step + 1}",
                where=self.state.folder,
                next="the state before that step is kept there; train again with a lower learning rate or a longer "
                "warmup, and --overwrite",
            )

    def note(self, loss: float, parts: Mapping[str, float], norm: float, lr: float) -> None:
        """Tell the log and the listener."""
        position, now = self.position, time.monotonic()
        if position.step % self.settings.log_every == 0 or position.stage_step == self.work.steps:
            speed = (position.step - self.noted_step) * self.settings.step_tokens / (now - self.noted)
            self.noted, self.noted_step = now, position.step
            self.log.write(
                {
                    "step": position.step,
                    "tokens": position.tokens,
                    "stage": self.work.name,
                    "loss": loss,
                    **parts,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_second": round(speed, 1),
                    "seconds": position.seconds,
                }
            )
        pace = (position.step - self.first) * self.settings.step_tokens / (now - self.started)
        self.progress.advance(self.settings.step_tokens, f"loss {loss:.3f}, {pace:,.0f} tokens/s")

    def save(self) -> None:
        """Save the state as of the last whole step."""
        self.state.save(self.position, self.model, self.optimizer)
        self.saved = time.monotonic()
