"""What an inspection measures of the heads of each layer: the questions, and their answers as rows of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from kvfold.calibrate.attention import Measures
from kvfold.contracts.requests import (
    AblatedKL,
    AblatedRecall,
    Answers,
    AttentionGram,
    FoldedKL,
    FoldedRecall,
    InputGram,
    QueryGram,
    Question,
    SampledPairs,
    UniformKL,
)
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.solve import budget
from kvfold.solve.head_likeness import Likeness, likeness
from kvfold.solve.rope import SCALINGS
from kvfold.solve.rope_planes import importance, pairs_of
from kvfold.solve.shared_heads import moments_of, rounding

SAMPLED = 1024  # tokens whose queries and keys show which planes matter
DIGITS = 5  # of a number in a record
FOLDS: Mapping[budget.Cost, str] = {FoldedKL: "fold_kl", FoldedRecall: "fold_rise"}  # by cost: its key in a row
LOST: Mapping[type[AblatedKL] | type[AblatedRecall], str] = {AblatedKL: "kl", AblatedRecall: "rise"}  # also in answers


def questions(shape: Shape, ablations: Sequence[str]) -> list[Question]:
    """What is asked about the heads of a model: moments of each site, and the costs of what is ablated."""
    asked: list[Question] = []
    for site in shape.cached_sites:
        asked += [InputGram(site), QueryGram(site), AttentionGram(site)]
        if planes_known(shape, site):
            asked.append(SampledPairs(site, SAMPLED))
    kinds = [kind for name, kind in zip(("heads", "recall"), LOST, strict=True) if name in ablations]
    for kind in kinds:
        asked += [kind(site, head) for site in shape.cached_sites for head in range(_heads(shape, site))]
    if "folds" in ablations:
        fewer = [(site, count) for site in shape.cached_sites for count in budget.choices_of(shape, site)[:-1]]
        asked += [cost(site, count) for cost in FOLDS for site, count in fewer]
        asked += [UniformKL(tuple(shape.cached_sites), count) for count, _ in budget.uniform_folds(shape)]
    return asked


def planes_known(shape: Shape, site: Site) -> bool:
    """Whether keys are rotated, by frequencies that the config tells."""
    rope = shape.sites[site].rope
    scaling = (rope.scaling or {}) if rope else {}
    return rope is not None and (scaling.get("rope_type") or scaling.get("type") or "default") in SCALINGS


def _heads(shape: Shape, site: Site) -> int:
    return shape.sites[site].num_key_value_heads


def measured(source: Checkpoint, answers: Answers, attention: Mapping[Site, Measures]) -> dict[str, Any]:
    """A row for each layer with the numbers of its heads in order, and the pairs of heads that are one."""
    layers, duplicates = [], []
    for site in source.shape.cached_sites:
        tensors = source.roles(site)
        alike = likeness(tensors.attention, tensors.roles, moments_of(site, answers))
        row: dict[str, Any] = {"layer": site.layer, "heads": _heads(source.shape, site)}
        row["readers"] = tensors.attention.query_group
        row |= _ablated(site, row["heads"], answers) | _folded(source.shape, site, answers)
        row |= {name: short(value_G) for name, value_G in attention[site].items()}
        row |= {name.rpartition("_")[0]: short(value) for name, value in asdict(alike).items() if name != "lost_GG"}
        if planes_known(source.shape, site) and tensors.attention.rope:
            pairs = pairs_of(tensors.attention, tensors.attention.rope, answers[SampledPairs(site, SAMPLED)])
            row["planes"] = [short(importance(each)) for each in pairs]
        layers.append(row)
        duplicates += [[site.layer, *pair] for pair in same_heads(alike, tensors.roles["k"])]
    return {"layers": layers, "duplicates": duplicates}


def _ablated(site: Site, heads: int, answers: Answers) -> dict[str, Any]:
    found = {}
    for kind, name in LOST.items():
        asked = [kind(site, head) for head in range(heads)]
        if asked[0] in answers:
            found[name] = [round(float(answers[each][name]), DIGITS) for each in asked]
    return found


def _folded(shape: Shape, site: Site, answers: Answers) -> dict[str, Any]:
    """The cost of each smaller number of heads at a site alone."""
    found = {}
    for cost, name in FOLDS.items():
        asked = {str(count): cost(site, count) for count in budget.choices_of(shape, site)[:-1]}
        if asked and all(each in answers for each in asked.values()):
            found[name] = {
                count: round(float(answers[each][budget.NAMES[cost]]), DIGITS) for count, each in asked.items()
            }
    return found


def same_heads(alike: Likeness, weight: Tensor) -> list[list[int]]:
    """Pairs of heads that become one without loss, but for the rounding of the weights: linear images of another."""
    same_GG = (alike.lost_GG <= rounding(weight)).triu(1)
    return list(same_GG.nonzero().tolist())


def short(value: Tensor) -> Any:
    """Numbers of a record, nested as the tensor."""
    rounded = value.double() * 10**DIGITS
    return (rounded.round() / 10**DIGITS).tolist()
