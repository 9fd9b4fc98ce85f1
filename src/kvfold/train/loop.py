"""The training loop: stretches of steps, each with its objective and optimiser, from the state in a folder.

On several ranks, every rank runs the loop. Each computes its rows of a batch that does not depend on their number; the
loss, its parts and the gradient's norm are those of the whole batch, and all ranks decide alike.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvfold import ranks
from kvfold.disk.output import Output, damaged, disk_errors, dropped_on_error, open_output
from kvfold.errors import Interrupted, TrainingError
from kvfold.machine import best_device, best_precision, describe, multiplies_bf16
from kvfold.predict.training_memory import PARAMETERS
from kvfold.progress import Progress, task
from kvfold.train.levels import LEVELS
from kvfold.train.placing import Root, compile_errors, local
from kvfold.train.settings import Settings, TrainSettings, decide, rate
from kvfold.train.state import STATE, Log, NoLog, Position, State

RANKS_APART = 1_000_000_007  # between the seeds of two ranks

Objective = Callable[[Any, float], tuple[Tensor, dict[str, Tensor]]]
"""A batch, `ids_BT` (length + 1 wide) or pairs, and the share of the stretch that is done -> the loss with a gradient,
and its parts by name without one."""


class Batches(Protocol):
    """Training data: the batch of a step is a function of (seed, step)."""

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Any:
        """The rows of a step, with `to` and `split` as those of a tensor."""


@dataclass
class Work:
    """One stretch of training: an objective, some parameters, some steps."""

    name: str
    steps: int
    objective: Objective
    groups: Callable[[], list[dict[str, Any]]]  # parameters, their `share` of the learning rate, `weight_decay`
    finish: Callable[[], None] | None = None  # changes the model at the end of the stretch
    settled: Callable[[], bool] | None = None  # ends the stretch before its steps, which the next one gets
    rises: bool = False  # what is scheduled may raise the loss, which then stops the run only if it is not finite


def parameter_groups(
    named: Mapping[str, nn.Parameter], weight_decay: float, shares: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameters by share of the learning rate and by weight decay. Vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        key = ((shares or {}).get(name, 1.0), weight_decay if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "share": share, "weight_decay": decay} for (share, decay), params in groups.items()]


def make_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser of a stretch.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) is torch's: it scales steps by a matrix's root mean square and
    clips them at 1, keeps second moments by row and column, and has no first moment.
    """
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.peak)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.peak, betas=betas, fused=True)


def train_into(
    out: str | Path,
    settings: Settings,
    identity: Callable[[Settings], Mapping[str, Any]],
    make: Callable[[Settings, Output], None],
    *,
    source: str,
    overwrite: bool,
    progress: Progress,
) -> Path:
    """Claim `out` for these settings, let `make` train and write the checkpoint there, and return its path.

    A complete output of the same identity is left as it is. Raises OutputError if something else is there.
    """
    settings = decide(settings, out, identity, overwrite=overwrite)
    output = open_output(out, identity(settings), overwrite=overwrite)
    if output.complete:
        progress.say(f"{out} is complete: it was trained from this {source} with these settings")
        return output.path
    if not output.written():
        group = ranks.single() if settings.offload in PARAMETERS else nullcontext()
        with disk_errors(output.work), dropped_on_error(output, STATE), group:
            make(settings, output)
    State(output.work).remove()
    shutil.rmtree(output.work / LEVELS, ignore_errors=True)
    output.commit()
    return output.path


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that is read between steps. A second signal acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set  # Python delivers signals to the main thread only
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
    """Run every stretch, from the state in `folder` if there is one, and return the last position.

    `model` is the student, or a Root with it. Raises TrainingError if the loss diverges or is not finite, and
    Interrupted on a signal; the state is saved first.
    """
    root = model if isinstance(model, Root) else Root(model)
    if settings.precision == "auto":
        settings = replace(settings, precision=best_precision())
    slow = settings.precision == "bf16" and not multiplies_bf16()
    world = ranks.current().world
    several = f", {world} ranks" if world > 1 else ""
    emulated = ", which emulates it: slow" if slow else ""
    progress.say(f"training in {settings.precision} on {describe()}{several}{emulated}")
    state = State(folder, _changing(root.student, works))
    position = state.position() or Position()
    if position.stage > len(works):
        raise damaged(folder / STATE)
    resumed = position.step > 0
    for work in works[: position.stage]:
        if work.finish:
            work.finish()  # changes the shapes; the weights come from the state
    if resumed:
        progress.say(f"continuing from step {position.step:,}")
    total = sum(work.steps for work in works) * settings.step_tokens
    with (
        closing(Log(folder, position.step) if ranks.current().main else NoLog()) as log,
        closing(state),
        task(progress, "train", total, "tokens", position.tokens),
    ):
        with _signals() as stopped, torch.random.fork_rng():
            for work in works[position.stage :]:
                run = _Run(root, work, tokens, settings, state, position, log, progress, stopped)
                if resumed:
                    state.load(root.student, run.optimizer)
                    resumed = False
                run.all()
            state.finish()
        log.write({"done": True, **{name: getattr(position, name) for name in ("step", "tokens", "seconds")}})
    return position


def _changing(student: nn.Module, works: Sequence[Work]) -> set[str] | None:
    """The names of the parameters that some stretch trains; None if the end of one may change any."""
    if any(work.finish for work in works):
        return None
    trained = {id(each) for work in works for group in work.groups() for each in group["params"]}
    return {name for name, each in student.named_parameters() if id(each) in trained}


@dataclass
class _Run:
    """One stretch in progress."""

    root: Root
    work: Work
    tokens: Batches
    settings: TrainSettings
    state: State
    position: Position
    log: Log | NoLog
    progress: Progress
    stopped: Callable[[], bool]

    def __post_init__(self) -> None:
        for parameter in self.root.parameters():
            parameter.requires_grad_(False)
        self.parameters = [parameter for group in self.work.groups() for parameter in group["params"]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = make_optimizer(self.work.groups(), self.settings)
        self.saved = self.started = self.noted = time.monotonic()
        self.first = self.noted_step = self.position.step
        self.asked = {"stop": False, "save": False, "writing": False}  # of all ranks, by any

    def all(self) -> None:
        """Run the remaining steps, then end the stretch."""
        settings, position = self.settings, self.position
        before = position.seconds
        while position.stage_step < self.steps and not (self.work.settled and self.work.settled()):
            with compile_errors(settings.compile):
                measured = self.step()
            position.step, position.stage_step = position.step + 1, position.stage_step + 1
            position.tokens += settings.step_tokens
            position.seconds = round(before + time.monotonic() - self.started, 3)
            self.note(measured)
            if self.asked["stop"] or (ranks.current().world == 1 and self.stopped()):
                self.save(wait=True)
                raise Interrupted(
                    f"stopped at step {position.step}; the state is saved",
                    where=self.state.folder,
                    next="the same command continues",
                )
            if not self.asked["writing"]:
                self.state.finish()
            steps = settings.checkpoint_steps
            if self.asked["save"] or (steps and position.step % steps == 0):
                self.save()
        if self.work.finish:
            self.work.finish()
        position.spared = self.steps - position.stage_step
        if position.spared:
            done = f"{self.work.name} has settled after {position.stage_step:,} of {self.steps:,} steps"
            self.progress.say(f"{done}; the next stage gets the others")
        position.stage, position.stage_step, position.smooth, position.lowest = position.stage + 1, 0, None, None

    @property
    def steps(self) -> int:
        """Steps of this stretch: its own, and those that the stretch before did not need."""
        return self.work.steps + self.position.spared

    def step(self) -> dict[str, float]:
        """One optimiser step, and what the log says of it; the gradient norm is that before clipping."""
        settings, position = self.settings, self.position
        # for dropout
        torch.manual_seed(settings.seed * 1_000_003 + position.step + RANKS_APART * ranks.current().rank)
        batch = self.tokens.batch(
            position.step, seed=settings.seed, batch_size=settings.batch_size, length=settings.sequence_length
        )
        lr = settings.peak * rate(settings, position.stage_step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        device, here = best_device(), ranks.current()
        passes = batch.split(settings.pass_rows(here.world))
        own = [passes[number] for number in here.share(len(passes))]
        done = position.stage_step / self.steps
        loss = 0.0
        parts: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, rows in enumerate(own, 1):
            self.root.accumulate(number == len(own))
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
                value, named = self.root(partial(self.work.objective, rows.to(device, non_blocking=True), done))
            (value / len(own)).backward()
            loss += float(value.detach()) / len(own)
            for name, part in named.items():
                parts[name] = parts.get(name, 0.0) + float(part) / len(own)
        gradients = [local(each.grad) for each in self.parameters if each.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.ask()
        if here.world > 1:
            means = torch.tensor([loss, *parts.values()], dtype=torch.float64) / here.world
            squared = torch.tensor([float(norm) ** 2 / settings.replicas], dtype=torch.float64)
            flags = torch.tensor([float(each) for each in self.asked.values()], dtype=torch.float64)
            loss, *found = ranks.sum_in_order(torch.cat([means, squared, flags])).tolist()
            parts = dict(zip(parts, found, strict=False))
            norm = norm.new_tensor(math.sqrt(found[len(parts)]))
            self.asked = {name: flag > 0 for name, flag in zip(self.asked, found[len(parts) + 1 :], strict=True)}
        self.guard(loss, float(norm))
        factor = torch.clamp(settings.clip / (norm + 1e-6), max=1.0)  # as in nn.utils.clip_grad_norm_
        for each in gradients:
            each.mul_(factor)
        self.optimizer.step()
        return {"loss": loss, **parts, "lr": lr, "grad_norm": float(norm)}

    def ask(self) -> None:
        """Read what this rank asks of all after this step, and whether it is still writing a state."""
        minutes = (time.monotonic() - self.saved) / 60
        due = minutes >= self.settings.checkpoint_minutes
        self.asked = {"stop": self.stopped(), "save": due, "writing": self.state.writing}

    def guard(self, loss: float, norm: float) -> None:
        """Raise TrainingError before the weights change if the loss is not finite or has risen far."""
        position, what = self.position, None
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not math.isfinite(norm):
            what = f"the gradient's norm is {norm}"
        else:
            smooth = loss if position.smooth is None else 0.95 * position.smooth + 0.05 * loss
            lowest = smooth if position.lowest is None else min(position.lowest, smooth)
            if smooth > 3 * lowest + 1 and not self.work.rises:
                what = f"the loss diverged, from {lowest:.3f} to {smooth:.3f}"
            else:
                position.smooth, position.lowest = smooth, lowest
        if what:
            self.save(wait=True)
            raise TrainingError(
                f"{what} at step {position.step + 1}",
                where=self.state.folder,
                next="the state before that step is kept there; train with a lower learning rate or a longer warmup, "
                "and --overwrite",
            )

    def note(self, measured: Mapping[str, float]) -> None:
        """Report the step to the log and to the progress bar."""
        position, now = self.position, time.monotonic()
        if position.step % self.settings.log_every == 0 or position.stage_step == self.steps:
            speed = (position.step - self.noted_step) * self.settings.step_tokens / (now - self.noted)
            self.noted, self.noted_step = now, position.step
            self.log.write(
                {
                    "step": position.step,
                    "tokens": position.tokens,
                    "stage": self.work.name,
                    **measured,
                    "tokens_per_second": round(speed, 1),
                    "seconds": position.seconds,
                }
            )
        pace = (position.step - self.first) * self.settings.step_tokens / (now - self.started)
        self.progress.advance(self.settings.step_tokens, f"loss {measured['loss']:.3f}, {pace:,.0f} tokens/s")

    def save(self, *, wait: bool = False) -> None:
        """Save the state after the last whole step; with `wait`, the marker names it before this returns."""
        self.state.save(self.position, self.root.student, self.optimizer, wait=wait)
        self.saved = time.monotonic()
