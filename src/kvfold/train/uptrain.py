"""Uptraining: a converted student trained on a small share of its teacher's tokens.

The number of tokens is given, or is `alpha` times the pre-training tokens (Ainslie et al. 2023, arXiv 2305.13245,
section 2.1: 5%). The loss is a sum of `kl`, `ce` and `attention`, such as `kl+0.5ce`, in one stage or several, such as
`attention:0.1,kl:0.9`. A run that was stopped at any moment continues to the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf, ranks
from kvfold.contracts.method import Student, Trained
from kvfold.contracts.stages import GUIDED, Stage
from kvfold.disk.checkpoint import Checkpoint, save_model, save_tensors
from kvfold.disk.lineage import descend, needed_root, vocabulary_difference
from kvfold.disk.output import Output, check_apart
from kvfold.errors import SettingError
from kvfold.inputs import LARGEST
from kvfold.predict.student_config import student_config
from kvfold.predict.training_memory import PARAMETERS, training_flops
from kvfold.progress import SILENT, Progress
from kvfold.settings import differing
from kvfold.text.pairs import Corpus, Pairs, check_text, read_tokens
from kvfold.text.tokens import TokenFile
from kvfold.train import losses as objectives
from kvfold.train.levels import Start, check_levels, lower_level
from kvfold.train.loop import Objective, Work, parameter_groups, train, train_into
from kvfold.train.placing import place
from kvfold.train.settings import UptrainSettings
from kvfold.train.stages import (
    GUIDED_LOSSES,
    Schedule,
    check_shares,
    converted_sites,
    finish_of,
    formula,
    learner,
    method_of,
    method_stages,
    needs_teacher,
    parameters_of,
    rates_of,
    schedule_of,
    settled_of,
    spelled_losses,
)

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

    `teacher` is by default the root of the student's lineage. It is loaded only for losses that need it.

    Raises SettingError, DataError or CheckpointError before anything is written, OutputError if `out` holds something
    else, TrainingError if the run diverges, and Interrupted on a signal: the same call then continues.
    """
    source, out = Checkpoint.open(student), Path(out)
    reads = {"student": source.path, "teacher": teacher, "root teacher": source.root_path, "data": settings.data}
    check_apart(out, reads)
    settings.check_length(source.shape, "uptrain")
    settings = settings.rated(source.shape.hidden_size)
    settings.pass_rows(ranks.current().world)
    check_text(settings.data, paired=source.family.encoder_decoder)
    amount = training_tokens(settings, source)
    own = _stages(source, settings)
    guide = _teacher(source, settings, own, teacher)
    check_apart(out, {"teacher": guide and guide.path})
    stages = own or [settings.single("ce" if guide is None else spelled_losses(GUIDED))]
    check_shares(stages)
    if settings.data == "self":  # the teacher writes the text
        (guide or source).require_finite(progress)
    tokens = read_tokens(
        settings.data,
        source.path,
        paired=source.family.encoder_decoder,
        enough=amount + 1,
        teacher=(guide or source).path,
        seed=settings.seed,
        progress=progress,
    )
    tokens.check(batch_size=settings.batch_size, length=settings.sequence_length, vocab_size=source.shape.vocab_size)
    for each in (source, guide):
        if each is not None:
            each.require_finite(progress)
    check_levels(source, stages, settings)
    run = _Run(source, guide if needs_teacher(stages) else None, stages, amount, tokens, Start(source))

    def make(settings: UptrainSettings, output: Output) -> None:
        start = lower_level(source, run.teacher, stages, amount, settings, output.work, uptrain, progress)
        chosen = dataclasses.replace(run, start=start, amount=max(1, amount - start.tokens))
        ranks.everywhere(_train, chosen, settings, output.work, output.inputs, chosen.equal(), progress=progress)

    return train_into(out, settings, run.identity, make, source="student", overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class _Run:
    """What is trained, and on what: all that is read before the output is claimed."""

    source: Checkpoint
    teacher: Checkpoint | None
    stages: Sequence[Stage]
    amount: int  # tokens
    tokens: TokenFile | Corpus
    start: Start  # the source, or on two levels what the lower one makes of it

    def identity(self, settings: UptrainSettings) -> dict[str, Any]:
        """The settings and inputs that decide the weights."""
        own = settings.identity()
        own.pop("converted_only", None)  # it is part of the stages
        return own | {
            "stage": "uptrain",
            "stages": [differing(stage) for stage in self.stages],
            "amount": self.amount,
            "text": self.tokens.hash,
            "student": self.source.hash(),
            "teacher": self.teacher.hash() if self.teacher else None,
        }

    def equal(self) -> set[str]:
        """The names of the tensors that student and teacher both hold, by their hashes."""
        if self.teacher is None:
            return set()
        theirs = self.teacher.digests
        ours = self.start.checkpoint
        ours.hash()
        same = {name for name, found in ours.digests.items() if theirs.get(name) == found}
        return {name for name in same if ours.spec(name) == self.teacher.spec(name)}


def _train(
    run: _Run, settings: UptrainSettings, work: Path, inputs: str, equal: Collection[str], *, progress: Progress
) -> None:
    """Train on every rank, and save the student."""
    source, made = run.start.checkpoint, method_of(run.source)
    fixed = not any(stage.finish for stage in run.stages)

    def adapt(model: nn.Module) -> None:
        if made is not None and not fixed:
            made[0].begin(learner(source, model), made[1])
        if settings.lora:
            hf.add_lora(model, _adapted(source, settings), settings.lora, seed=settings.seed)

    def trained(model: nn.Module) -> Iterator[nn.Parameter]:
        for stage in run.stages:
            yield from _trained(source, model, stage, settings).values()

    matching = any("attention" in stage.losses for stage in run.stages)
    root = place(
        source,
        run.teacher,
        settings,
        adapt=adapt,
        trained=trained,
        equal=equal,
        fixed=fixed,
        matched=_attentions(source) if matching else (),
    )
    model = root.student
    works = _works(source, model, root.teacher, run.stages, settings, run.amount)
    kept = {id(each) for each in model.parameters() if fixed and not each.requires_grad}
    position = train(root, works, run.tokens, settings, work, progress)
    tensors = _stored(source, model, kept)
    result = made[0].trained(learner(source, model), made[1]) if made is not None and not fixed else None
    if not ranks.current().main:
        for _ in tensors:  # every rank takes part in making them whole
            pass
        return
    flops = training_flops(position.tokens, source.shape, None if run.teacher is None else run.teacher.shape)
    lineage = descend(
        run.source,
        inputs=inputs,
        stage="uptrain",
        settings={
            **dataclasses.asdict(settings),
            "stages" if len(run.stages) > 1 else "loss": formula(run.stages),
            "text": run.tokens.hash,
            "teacher": run.teacher.hash() if run.teacher else None,
        },
        tokens=position.tokens + run.start.tokens,
        seed=settings.seed,
        wall_seconds=position.seconds + run.start.seconds,
        flops=flops + run.start.flops,
    )
    if result is None or made is None:
        save_tensors(work, source, tensors, lineage)
    else:
        _save(work, source, tensors, result, lineage)


def training_tokens(settings: UptrainSettings, source: Checkpoint) -> int:
    """`tokens`, or `alpha` times the pre-training tokens. Raises SettingError if those are unknown."""
    if settings.alpha is None:
        assert settings.tokens is not None
        return settings.tokens
    steps = (source.lineage or {}).get("steps", [])
    known = sum(step.get("tokens") or 0 for step in steps if step["stage"] == "pretrain")
    pretraining = settings.pretraining_tokens or known
    if not pretraining:
        raise SettingError(
            "alpha is a share of the pre-training tokens, and their number is not known",
            where="uptrain",
            next="add --pretraining-tokens (such as 2T), or give --tokens instead",
        )
    amount = settings.alpha * pretraining
    if amount > LARGEST:
        raise SettingError("alpha is too large", where="uptrain", got=settings.alpha, allowed=f"{LARGEST:,} tokens")
    return max(1, round(amount))


def _stored(source: Checkpoint, model: nn.Module, kept: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the trained student under the names of its source, made whole one after the other.

    `kept` are parameters that stay as the source has them.
    """
    products = hf.lora_products(model)
    written: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = hf.unadapted(name)
        if hf.lora_factor(name) or not isinstance(tensor, Tensor):
            continue
        if id(tensor) in kept:
            found = {each: source.read(each) for each in source.forms(stored, tuple(tensor.shape)) if each in source}
            if stored in products:
                found = {each: value.float() + products[stored](ranks.whole) for each, value in found.items()}
        else:
            found = source.as_stored({stored: ranks.whole(tensor.detach())})
        for each, value in found.items():
            if each not in written:  # a tied parameter has two names
                written.add(each)
                yield each, value


def _save(
    work: Path, source: Checkpoint, tensors: Iterator[tuple[str, Tensor]], made: Trained, lineage: Mapping[str, Any]
) -> None:
    """Write a student whose stages gave some of its sites another shape."""
    state = {name: tensor for name, tensor in tensors if name in source}
    for site, roles in made.roles.items():
        attention = made.shape.sites[site]
        for name, held in source.family.stored(site, attention).items():
            state[name] = source.family.joined(attention, {role: roles[role] for role in held})
    lineage["steps"][-1]["found"] = dict(made.found)
    method = next(step["settings"]["method"] for step in reversed(lineage["steps"]) if step["stage"] == "convert")
    config = student_config(source.config, source.family, source.shape, Student(made.shape), method=method)
    save_model(work, config=config, state=state, lineage=lineage, like=source, gone=source.gone(made.shape))


# --- teacher and stages --------------------------------------------------------------------------------------------


def _stages(source: Checkpoint, settings: UptrainSettings) -> list[Stage]:
    """The user's stages, or the method's; empty if neither has any.

    Where the end of a stage changes the model, a `loss` is that of each. Raises SettingError for settings that such
    stages leave no choice of.
    """
    own, asked = method_stages(source), settings.asked()
    if not any(stage.finish for stage in own):
        return asked or own
    fixed = {
        "stages": settings.stages,
        "lora": settings.lora,
        "trainable": settings.trainable,
        "converted_only": settings.converted_only,
        "levels": settings.levels if settings.levels > 1 else None,
        "offload": settings.offload if settings.offload in PARAMETERS else None,
    }
    for name, value in fixed.items():
        if value:
            raise SettingError(
                f"the stages of the method decide what trains, and {name} does not apply",
                where="uptrain",
                got=value,
                next=f"leave out --{name.replace('_', '-')}",
            )
    return [dataclasses.replace(stage, losses=asked[0].losses) if asked else stage for stage in own]


def _teacher(
    source: Checkpoint, settings: UptrainSettings, asked: Sequence[Stage], given: str | Path | None
) -> Checkpoint | None:
    """The teacher: the one that is given, or the root of the lineage; None if nothing needs one.

    Raises SettingError if it is needed and there is none, or if its vocabulary differs; CheckpointError if the root
    of the lineage is not found.
    """
    needed = needs_teacher(asked)
    if asked and not needed and settings.data != "self":
        return None
    otherwise = "add --teacher PATH, or train without one (--loss ce)"
    found = Checkpoint.open(given) if given is not None else needed_root(source, next=otherwise)
    if found is None and any(stage.finish for stage in asked):
        found = source  # what the stages will change is still the teacher
    if found is None and needed:
        raise SettingError(
            f"loss {needed} needs a teacher, but {source.name} is not a student",
            where="uptrain",
            next="add --teacher, or train with --loss ce",
        )
    if found is not None and (difference := vocabulary_difference(source, found)):
        raise SettingError(
            "student and teacher have different vocabularies",
            where=found.path,
            got=difference,
            next="give the teacher that the student was converted from",
        )
    return found


def _attentions(source: Checkpoint) -> list[str]:
    """The paths of all attentions."""
    return [source.family.module(site) for site in source.shape.sites]


def _adapted(source: Checkpoint, settings: UptrainSettings) -> list[str]:
    """The modules that get LoRA factors: q, k, v and o, with `converted_only` those of converted sites."""
    sites = converted_sites(source) if settings.converted_only else source.shape.sites
    roles = ((site, role) for site in sites for role in "qkvo" if role in source.shape.sites[site].roles())
    return [source.family.tensor(*each).removesuffix(".weight") for each in roles]


def _trained(source: Checkpoint, model: nn.Module, stage: Stage, settings: UptrainSettings) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains; with LoRA its factors, unless the stage names roles."""
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
    """Stages as stretches of the loop."""
    steps = math.ceil(amount / settings.step_tokens)
    paths = _attentions(source)
    works, done, share = [], 0, 0.0
    for stage in stages:
        share += stage.share
        end = round(share * steps)
        _trained(source, model, stage, settings)  # raises for an unknown role before the first step
        works.append(
            Work(
                stage.name,
                end - done,
                objective(
                    model,
                    teacher,
                    stage.losses,
                    paths,
                    settings,
                    taught=stage.taught,
                    schedule=schedule_of(source, model, stage.name) if stage.scheduled else None,
                ),
                groups=lambda stage=stage: parameter_groups(  # type: ignore[misc]
                    _trained(source, model, stage, settings), settings.weight_decay, rates_of(source, model, stage)
                ),
                finish=None if stage.finish is None else finish_of(source, model, stage.finish),
                rises=stage.scheduled,
                settled=settled_of(source, model, stage.name) if stage.scheduled and stage is not stages[-1] else None,
            )
        )
        done = end
    return works


# --- the objective ---------------------------------------------------------------------------------------------


def objective(
    model: nn.Module,
    teacher: nn.Module | None,
    losses: Mapping[str, float],
    paths: Sequence[str],
    settings: UptrainSettings,
    *,
    taught: bool = False,
    schedule: Schedule | None = None,
) -> Objective:
    """The weighted sum of `losses` as a function of a batch: `ids_BT`, one wider than the sequences, or pairs.

    `taught` is that of a method's Stage; `schedule` is called before the forward pass, and its term is a `penalty`.
    The setting `attention_inputs` applies to the user's stages.
    """
    guided, matching = bool(GUIDED_LOSSES & set(losses)), "attention" in losses
    forced = set(losses) == {"attention"} and (taught or settings.attention_inputs == "teacher")

    def evaluate(batch: Tensor | Pairs, done: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        read, target_BT, counts_BT = objectives.parted(batch)
        counted = slice(None) if counts_BT is None else counts_BT
        term = None if schedule is None else schedule(done)
        with ExitStack() as stack:
            guide = None
            if guided:
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
                    targets=batch.targets if isinstance(batch, Pairs) else None,
                )
            if matching:
                distance = objectives.attention_matching(ours, theirs)
                total, parts = total + losses["attention"] * distance, {**parts, "attention": distance.detach()}
        if term is not None:
            total, parts = total + term, {**parts, "penalty": term.detach()}
        return total, parts

    return evaluate
