"""Stages of uptraining: parsed from settings or taken from the method, with their parameters and learning rates."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvfold import methods
from kvfold.contracts.method import Method
from kvfold.contracts.site import Site
from kvfold.contracts.stages import Learner, Stage
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, did_you_mean
from kvfold.settings import decode

if TYPE_CHECKING:
    from torch import Tensor, nn

LOSSES = ("ce", "kl", "attention")
GUIDED_LOSSES = {"kl", "attention"}
Schedule = Callable[[float], "Tensor | None"]
_TERM = re.compile(r"\s*(\d*\.?\d*)\s*\*?\s*([a-z_]+)\s*")


def parse_loss(text: str) -> dict[str, float]:
    """The weight of each loss in a sum such as `kl+0.5ce`. Raises SettingError."""
    weights: dict[str, float] = {}
    for part in text.split("+"):
        match = _TERM.fullmatch(part)
        name = match[2] if match else part.strip()
        if match is None or name not in LOSSES or match[1] == ".":
            raise SettingError(
                f"loss {part.strip()!r} is not known",
                where="uptrain",
                allowed=f"{', '.join(LOSSES)}, with weights and sums: kl+0.5ce",
                next=did_you_mean(name, LOSSES),
            )
        weights[name] = weights.get(name, 0.0) + float(match[1] or 1)
    if not all(0 < weight < math.inf for weight in weights.values()):
        raise SettingError("weights of losses must be positive and finite", where="uptrain", got=repr(text))
    return weights


def parse_stages(text: str, trainable: tuple[str, ...] = ()) -> list[Stage]:
    """The stages of a text such as `attention:0.1,kl:0.9`. Raises SettingError unless the shares add up to 1."""
    stages = []
    for part in text.split(","):
        loss, colon, share = part.strip().rpartition(":")
        if not colon or not re.fullmatch(r"\d*\.?\d+", share) or not float(share) > 0:
            raise SettingError(
                f"stage {part.strip()!r} is not LOSS:SHARE", where="uptrain", next="for example attention:0.1,kl:0.9"
            )
        stages.append(Stage(loss, float(share), parse_loss(loss), trainable))
    check_shares(stages)
    return stages


def check_shares(stages: Sequence[Stage]) -> None:
    """Raise SettingError unless the shares add up to 1."""
    total = sum(stage.share for stage in stages)
    if abs(total - 1) > 1e-6:
        raise SettingError("the shares of the stages do not add up to 1", where="uptrain", got=f"{total:g}")


def spelled_losses(losses: Mapping[str, float]) -> str:
    """A sum of losses as the setting `loss` spells it."""
    return "+".join(f"{'' if weight == 1 else f'{weight:g}'}{name}" for name, weight in losses.items())


def formula(stages: Sequence[Stage]) -> str:
    """The losses of stages as the setting `loss` or `stages` spells them."""
    formulas = [spelled_losses(stage.losses) for stage in stages]
    if len(stages) == 1:
        return formulas[0]
    return ",".join(f"{formula}:{stage.share:g}" for formula, stage in zip(formulas, stages, strict=True))


def needs_teacher(stages: Sequence[Stage]) -> str | None:
    """The name of the first stage with a loss that needs a teacher."""
    return next((stage.name for stage in stages if GUIDED_LOSSES & set(stage.losses)), None)


# --- the lineage of the student ------------------------------------------------------------------------------------


def method_of(source: Checkpoint) -> tuple[Method[Any], Any] | None:
    """The method of the student's last conversion, and its settings; None if it was not converted."""
    steps = (source.lineage or {}).get("steps", [])
    settings = next((step["settings"] for step in reversed(steps) if step["stage"] == "convert"), None)
    if settings is None:
        return None
    method = methods.get(settings["method"])
    known = {each.name for each in dataclasses.fields(method.Config)}
    given = {key: value for key, value in settings.items() if key in known}
    return method, decode(method.Config, given, settings["method"])


def method_stages(source: Checkpoint) -> list[Stage]:
    """The stages of the method, if the student was converted last; none once it was trained."""
    made = method_of(source)
    steps = (source.lineage or {}).get("steps", [])
    if made is None or steps[-1]["stage"] != "convert":
        return []
    return list(made[0].stages(made[1]))


def converted_sites(source: Checkpoint) -> set[Site]:
    """The sites of the student's last conversion. Raises SettingError if there was none."""
    made = method_of(source)
    found = {site for group in made[0].groups(made[1], source.shape) for site in group} if made else set[Site]()
    if not found:
        raise SettingError(
            "the model has no converted attention", where="uptrain", got=source.name, next="leave out converted_only"
        )
    return found


# --- parameters and ends -------------------------------------------------------------------------------------------


def learner(source: Checkpoint, model: nn.Module) -> Learner:
    """The student in training, as the hooks of its method see it."""
    return Learner(model, source.shape, source.family.tensor)


def _own(source: Checkpoint) -> tuple[Method[Any], Any]:
    """The method whose stages these are: only those of a method are scheduled or have a finish."""
    made = method_of(source)
    assert made is not None
    return made


def finish_of(source: Checkpoint, model: nn.Module, name: str) -> Callable[[], None]:
    """The end of a stage: `Method.end` with this name."""
    method, config = _own(source)
    return lambda: method.end(name, learner(source, model), config)


def schedule_of(source: Checkpoint, model: nn.Module, name: str) -> Schedule:
    """`Method.during` of the stage of this name, as a function of the share that is done."""
    method, config = _own(source)
    return lambda share: method.during(name, learner(source, model), share, config)


def settled_of(source: Checkpoint, model: nn.Module, name: str) -> Callable[[], bool]:
    """`Method.settled` of the stage of this name."""
    method, config = _own(source)
    return lambda: method.settled(name, learner(source, model), config)


def _names(source: Checkpoint, role: str, parameters: Iterable[str]) -> set[str]:
    """The parameters of a role, over all sites, or those of this name that a method added."""
    of_sites = {source.family.tensor(site, role) for site in source.shape.sites}
    return {name for name in parameters if name in of_sites or name.endswith(f".{role}")}


def parameters_of(source: Checkpoint, model: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains, by name. Raises SettingError for a role that the model does not have."""
    parameters = dict(model.named_parameters())
    for role in (*stage.trainable, *stage.rates):
        if not _names(source, role, parameters):
            known = sorted({role for attention in source.shape.sites.values() for role in attention.roles()})
            raise SettingError(
                f"the model has no role {role!r}",
                where="uptrain",
                allowed=", ".join(known),
                next=did_you_mean(role, known),
            )
    rates = rates_of(source, model, stage)
    parameters = {name: parameter for name, parameter in parameters.items() if rates.get(name) != 0}
    if not stage.trainable and not stage.converted:
        return parameters
    if not stage.converted:
        wanted = {name for role in stage.trainable for name in _names(source, role, parameters)}
    else:
        wanted = {
            source.family.tensor(site, role)
            for site in converted_sites(source)
            for role in stage.trainable or source.shape.sites[site].roles()
        }
    return {name: parameter for name, parameter in parameters.items() if name in wanted}


def rates_of(source: Checkpoint, model: nn.Module, stage: Stage) -> dict[str, float]:
    """The factor of the learning rate by parameter name."""
    names = [name for name, _ in model.named_parameters()]
    return {name: rate for role, rate in stage.rates.items() for name in _names(source, role, names)}
