"""Uptraining: a converted student trained back to quality on a small part of its teacher's tokens.

The amount is `alpha` times the pre-training tokens (Ainslie et al. 2023, arXiv 2305.13245, section 2.1: 5%), or a
number of tokens. What is minimised is a formula of losses, `kl`, `ce`, `kl+0.5ce`, `attention`, alone or in stages,
`attention:0.1,kl:0.9`. Stopped at any moment, the same command continues, to the same weights bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.contracts.stages import Stage
from kvfold.disk.checkpoint import Checkpoint, carry_over, save_model
from kvfold.disk.lineage import descend, known_root, root_teacher, vocabulary_difference
from kvfold.disk.output import check_apart, disk_errors, dropped_on_error, open_output
from kvfold.errors import CheckpointError, SettingError
from kvfold.inputs import LARGEST
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.settings import check_range, differing
from kvfold.text.pairs import Pairs, corpus
from kvfold.text.tokens import token_file
from kvfold.train import losses as objectives
from kvfold.train.loop import Objective, State, TrainSettings, Work, parameter_groups, place, train
from kvfold.train.precision import decide
from kvfold.train.stages import (
    OF_A_TEACHER,
    check_shares,
    converted_sites,
    finish_of,
    method_stages,
    needs_teacher,
    parameters_of,
    parse_loss,
    parse_stages,
    rates_of,
    said,
)
from kvfold.train.state import STATE

RANK = 65_536  # of factors, at most: wider than any model
GUIDED = "kl+0.3ce"  # by default, with a teacher: better than either loss alone (docs/log.md)


@dataclass(frozen=True)
class UptrainSettings(TrainSettings):
    """How a student is trained back."""

    alpha: float | None = field(
        default=None,
        metadata={"help": "Tokens as a share of the pre-training tokens (paper: 0.05). Default: from --tokens."},
    )
    pretraining_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that the teacher was trained on, such as 2T. Default: what its record says."},
    )
    loss: str | None = field(
        default=None,
        metadata={"help": "Sum of ce, kl and attention. Default: the method's stages, or kl+0.3ce with a teacher."},
    )
    stages: str | None = field(
        default=None,
        metadata={"help": "Losses with their shares of the tokens: attention:0.1,kl:0.9. Default: the method's."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL to the teacher."})
    attention_inputs: Literal["own", "teacher"] = field(
        default="own", metadata={"help": "Inputs of attention in a stage that matches attention outputs alone."}
    )
    trainable: tuple[str, ...] = field(
        default=(), metadata={"help": "Roles to train, such as q,k,v,o. Default: every parameter."}
    )
    lora: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA factors, merged when saved (needs kvfold[lora]). Default: full weights."},
    )
    converted_only: bool = field(
        default=False, metadata={"help": "Train only the attention that the conversion changed."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be, with SettingError."""
        super().__post_init__()
        if (self.tokens is None) == (self.alpha is None):
            raise SettingError(
                "say how long to train, in one way",
                where="uptrain",
                got="neither" if self.tokens is None else "tokens and alpha",
                next="give --tokens, or --alpha",
            )
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise SettingError("alpha must be positive", where="uptrain", got=self.alpha)
        check_range(self, "uptrain", 1, LARGEST, "pretraining_tokens")
        check_range(self, "uptrain", 1, RANK, "lora")
        if not 0 < self.temperature < math.inf:
            raise SettingError("temperature must be positive", where="uptrain", got=self.temperature)
        if self.loss is not None and self.stages is not None:
            raise SettingError("loss and stages say the same thing", where="uptrain", next="give one of them")
        if self.lora is not None and (self.lora < 1 or self.trainable):
            raise SettingError(
                "lora trains factors beside q, k, v and o, of rank 1 or more",
                where="uptrain",
                got=f"rank {self.lora}" + (f", and trainable {','.join(self.trainable)}" if self.trainable else ""),
                next="leave out one of them",
            )
        asked = self.asked()
        if self.attention_inputs == "teacher" and not any(set(stage.losses) == {"attention"} for stage in asked):
            raise SettingError(
                "attention_inputs teacher is for a stage that matches attention outputs and nothing else",
                where="uptrain",
                next="give --stages attention:0.1,kl:0.9",
            )

    def asked(self) -> list[Stage]:
        """The stages that were asked for by `loss` or `stages`; none when that is left to the method."""
        if self.stages is not None:
            return [
                replace(stage, converted=self.converted_only) for stage in parse_stages(self.stages, self.trainable)
            ]
        if self.loss is None:
            return []
        return [Stage(self.loss, 1.0, parse_loss(self.loss), self.trainable, self.converted_only)]


# --- the run -------------------------------------------------------------------------------------------------------


def uptrain(
    student: str | Path,
    out: str | Path,
    settings: UptrainSettings,
    *,
    teacher: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Train `student` into `out`, a complete checkpoint with its log `train.jsonl`, and return its path.

    `teacher` is the root of the student's lineage unless it is given; losses that need none load none. Raises
    SettingError, DataError or CheckpointError before anything is written, OutputError when `out` holds something
    else, TrainingError when the run diverges, and Interrupted on a signal: the same call then continues.
    """
    source, out = Checkpoint.open(student), Path(out)
    reads = {"student": source.path, "teacher": teacher, "root teacher": known_root(source), "data": settings.data}
    check_apart(out, reads)
    if settings.sequence_length > source.shape.max_positions:
        raise SettingError(
            "sequence_length is longer than the model's positions",
            where="uptrain",
            got=settings.sequence_length,
            allowed=f"1 to {source.shape.max_positions}",
        )
    amount = training_tokens(settings, source)
    guide = _teacher(source, settings, teacher)
    check_apart(out, {"teacher": guide and guide.path})
    stages = _stages(settings, source, guide)
    if settings.data == "self":  # the teacher writes the text
        (guide or source).require_finite(progress)
    tokens = (corpus if source.family.encoder_decoder else token_file)(
        settings.data,
        source.path,
        enough=amount + 1,
        teacher=(guide or source).path,
        seed=settings.seed,
        progress=progress,
    )
    tokens.check(batch_size=settings.batch_size, length=settings.sequence_length, vocab_size=source.shape.vocab_size)
    for each in (source, guide):
        if each is not None:
            each.require_finite(progress)
    if not needs_teacher(stages):
        guide = None
    known = {
        "stage": "uptrain",
        "stages": [differing(stage) for stage in stages],
        "amount": amount,
        "text": tokens.hash,
        "student": source.hash(),
        "teacher": guide.hash() if guide else None,
    }

    def identity(asked: UptrainSettings) -> dict[str, Any]:
        own = asked.identity()
        own.pop("converted_only", None)  # `stages` has it
        return own | known

    settings = decide(settings, out, identity, overwrite=overwrite)
    output = open_output(out, identity(settings), overwrite=overwrite)
    if output.complete:
        progress.say(f"{out} is complete: it was trained from this student with these settings")
        return output.path
    if not output.written():
        with disk_errors(output.work), dropped_on_error(output, STATE):
            device = best_device()
            model = place(hf.load(source.path, device=device), settings)
            other = None if guide is None else hf.load(guide.path, device=device).requires_grad_(False)
            if settings.lora:
                hf.add_lora(model, _adapted(source, settings), settings.lora, seed=settings.seed)
            works = _works(source, model, other, stages, settings, amount)
            position = train(model, works, tokens, settings, output.work, progress)
            lineage = descend(
                source,
                inputs=output.inputs,
                stage="uptrain",
                settings={
                    **dataclasses.asdict(settings),
                    "stages" if len(stages) > 1 else "loss": said(stages),
                    "text": tokens.hash,
                    "teacher": known["teacher"],
                },
                tokens=position.tokens,
                seed=settings.seed,
                wall_seconds=position.seconds,
            )
            if settings.lora:
                hf.merge_lora(model)
            _save(output.work, source, model, lineage)
    State(output.work).remove()
    output.commit()
    return output.path


def training_tokens(settings: UptrainSettings, source: Checkpoint) -> int:
    """Tokens to train on: `tokens`, or `alpha` of the pre-training tokens; SettingError when those are unknown."""
    if settings.tokens is not None:
        return settings.tokens
    steps = (source.lineage or {}).get("steps", [])
    known = sum(step.get("tokens") or 0 for step in steps if step["stage"] == "pretrain")
    pretraining = settings.pretraining_tokens or known
    if not pretraining:
        raise SettingError(
            "alpha is a part of the pre-training tokens, and their number is not known",
            where="uptrain",
            next="add --pretraining-tokens (for example 2T), or say --tokens",
        )
    assert settings.alpha is not None
    amount = settings.alpha * pretraining
    if amount > LARGEST:
        raise SettingError("alpha is too large", where="uptrain", got=settings.alpha, allowed=f"{LARGEST:,} tokens")
    return max(1, round(amount))


def _save(work: Path, source: Checkpoint, model: nn.Module, lineage: Mapping[str, Any]) -> None:
    """Write the trained student in its source's dtype, frozen parameters too."""
    state = {source.stored_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if set(source.names()) <= set(state):
        save_model(work, config=source.config, state=state, lineage=lineage, like=source)
        return
    carry_over(source, work)  # the end of a stage changed the architecture: its tensors are other ones
    config = model.config.to_dict()  # type: ignore[operator,union-attr]
    save_model(work, config=config, state=state, lineage=lineage, dtype=source.shape.dtype)


# --- teacher and stages --------------------------------------------------------------------------------------------


def _teacher(source: Checkpoint, settings: UptrainSettings, given: str | Path | None) -> Checkpoint | None:
    """The teacher of this run, or None when nothing asks for one: it is told from the lineage unless it is given.

    Raises SettingError when one is needed and there is none, or when it speaks another vocabulary.
    """
    asked = settings.asked() or method_stages(source)
    needed = needs_teacher(asked)
    if asked and not needed and settings.data != "self":
        return None
    found = Checkpoint.open(given) if given is not None else root_teacher(source)
    if found is None and source.root_hash() != source.hash():
        raise CheckpointError(
            f"its teacher {(source.lineage or {})['root']['name']!r} is not found",
            where=source.path,
            next="add --teacher PATH, or train without one (--loss ce)",
        )
    if found is None and needed:
        raise SettingError(
            f"loss {needed} needs a teacher, and {source.name} is nobody's student",
            where="uptrain",
            next="add --teacher, or train with --loss ce",
        )
    if found is None:
        return None
    difference = vocabulary_difference(source, found)
    if difference:
        raise SettingError(
            "teacher and student speak different vocabularies",
            where=found.path,
            got=difference,
            next="give the teacher that the student was made from",
        )
    return found


def _stages(settings: UptrainSettings, source: Checkpoint, guide: Checkpoint | None) -> list[Stage]:
    """What was asked for, else what the method wants, else one loss."""
    stages = settings.asked() or method_stages(source)
    if not stages:
        loss = "ce" if guide is None else GUIDED
        stages = [Stage(loss, 1.0, parse_loss(loss), settings.trainable, settings.converted_only)]
    check_shares(stages)
    return stages


def _adapted(source: Checkpoint, settings: UptrainSettings) -> list[str]:
    """The maps that factors stand beside: q, k, v and o, of converted sites alone where that was asked."""
    sites = converted_sites(source) if settings.converted_only else source.shape.sites
    roles = ((site, role) for site in sites for role in "qkvo" if role in source.shape.sites[site].roles())
    return [source.family.tensor(*each).removesuffix(".weight") for each in roles]


def _trained(source: Checkpoint, model: nn.Module, stage: Stage, settings: UptrainSettings) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains; factors in place of everything."""
    if settings.lora and not stage.trainable:
        return hf.lora_parameters(model)
    return parameters_of(source, model, stage)


def _works(
    source: Checkpoint,
    model: nn.Module,
    teacher: nn.Module | None,
    stages: Sequence[Stage],
    settings: UptrainSettings,
    amount: int,
) -> list[Work]:
    """Stages as work: their steps, objectives, parameters, and what ends them."""
    steps = math.ceil(amount / settings.step_tokens)
    paths = [source.family.module(site) for site in source.shape.sites]
    works, done, share = [], 0, 0.0
    for stage in stages:
        share += stage.share
        end = round(share * steps)
        _trained(source, model, stage, settings)  # refuses an unknown role before the first step
        works.append(
            Work(
                stage.name,
                end - done,
                objective(model, teacher, stage.losses, paths, settings, taught=stage.taught),
                groups=lambda stage=stage: parameter_groups(  # type: ignore[misc]
                    _trained(source, model, stage, settings), settings.weight_decay, rates_of(source, stage)
                ),
                finish=None if stage.finish is None else finish_of(source, model, stage.finish),
            )
        )
        done = end
    return works


# --- what is minimised ---------------------------------------------------------------------------------------------


def objective(
    model: nn.Module,
    teacher: nn.Module | None,
    losses: Mapping[str, float],
    paths: Sequence[str],
    settings: UptrainSettings,
    *,
    taught: bool = False,
) -> Objective:
    """The weighted sum of losses of a batch: `ids_BT`, one wider than the sequences, or pairs, to loss and parts.

    `taught` as in a Stage: the settings say it for stages that were asked for.
    """
    asks, matching = bool(OF_A_TEACHER & set(losses)), "attention" in losses
    forced = matching and len(losses) == 1 and (taught or settings.attention_inputs == "teacher")

    def evaluate(batch: Tensor | Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        read, target_BT, counts_BT = objectives.parted(batch)
        counted = slice(None) if counts_BT is None else counts_BT
        with ExitStack() as stack:
            guide = None
            if asks:
                assert teacher is not None
                if matching:
                    ours = stack.enter_context(hf.attention_outputs(model, paths))
                    theirs = stack.enter_context(hf.attention_outputs(teacher, paths))
                if forced:
                    stack.enter_context(objectives.same_inputs(model, teacher, paths))
                with torch.no_grad():
                    guide = (objectives.hidden_states(teacher, read)[counted], objectives.Head.of(teacher))
            h_BTD = objectives.hidden_states(model, read)
            total = h_BTD.new_zeros(())
            parts: dict[str, Tensor] = {}
            if len(losses) > matching:
                total, parts = objectives.token_losses(
                    h_BTD[counted],
                    objectives.Head.of(model),
                    target_BT[counted],
                    losses,
                    teacher=guide,
                    temperature=settings.temperature,
                )
            if matching:
                distance = objectives.attention_matching(ours, theirs)
                total, parts = total + losses["attention"] * distance, {**parts, "attention": distance.detach()}
        return total, parts

    return evaluate
