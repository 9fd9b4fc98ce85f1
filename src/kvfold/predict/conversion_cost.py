"""The cost of a conversion of a decoder: floating-point operations by stage, and memory, from shapes alone.

Three kinds of operations run at different speeds: `passes` of text through layers, `products` of tall matrices, and
`solves` in float64. `kvfold.convert.estimate` measures these speeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.contracts.effort import INNER_STEPS, Q_STEPS, RepairSettings
from kvfold.contracts.family import MLP, Family, Json
from kvfold.contracts.requests import COPIED, Alone, Question, Request, SampledPairs
from kvfold.contracts.site import Attention, Shape

DOUBLE = 2  # a product in float64 takes as long as two in float32
TOUCHES = 60  # operations in whose time one logit of q is made, weighed and moved in memory, beside its products
FOLD = 70  # operations of a fit, over the cube of the width
BASE_BYTES = 450 * 10**6  # of a process that has loaded PyTorch and transformers
BATCH = 4096  # tokens that pass through a layer together


@dataclass(frozen=True)
class Work:
    """Floating-point operations by the speed at which they run."""

    passes: float = 0.0
    products: float = 0.0
    solves: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.passes + other.passes, self.products + other.products, self.solves + other.solves)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.passes, times * self.products, times * self.solves)


@dataclass(frozen=True)
class Speeds:
    """Operations per second of each kind of work."""

    passes: float
    products: float
    solves: float


@dataclass(frozen=True)
class ConversionCost:
    """What a conversion reads and computes."""

    tokens: int
    forward: float  # operations of one forward pass of the teacher's layers over the tokens
    stages: Mapping[str, Work]  # by name: what is asked of the teacher, and each part of a repair
    memory: int  # bytes, about

    @property
    def work(self) -> Work:
        """All stages."""
        return sum(self.stages.values(), Work())

    @property
    def forward_passes(self) -> float:
        """Its operations over those of one forward pass of the teacher over the same tokens."""
        return (self.work.passes + self.work.products + self.work.solves) / self.forward

    def seconds(self, speeds: Speeds) -> float:
        """The time at these speeds."""
        work = self.work
        return work.passes / speeds.passes + work.products / speeds.products + work.solves / speeds.solves


def conversion_cost(
    family: Family,
    config: Json,
    source: Shape,
    student: Shape,
    questions: Iterable[Question],
    roles: Sequence[str],
    repair: RepairSettings,
    *,
    tokens: int,
    length: int = 512,
    sensitivity_tokens: int = 8192,
) -> ConversionCost:
    """Count a conversion that reads `tokens` tokens, in calibration rows of `length`, and repairs these roles."""
    asked, hidden = list(questions), source.hidden_size
    mlp = _mlp(family, config, source)
    pairs = [(source.sites[site], student.sites[site]) for site in source.sites if site.kind == "self"]
    read = Work(passes=tokens * sum(_pass(before, length) + mlp.run for before, _ in pairs))
    stages = {
        "calibration": read * (1 if any(isinstance(each, Request) for each in asked) else 0)
        + sum((_answer(each, source, tokens) for each in asked), Work()),
        "measured sites": sum((_measured(each, source, mlp, sensitivity_tokens) for each in asked), Work()),
        "fold": Work(solves=FOLD * hidden**3 * sum(before != after for before, after in pairs)),
    }
    if roles:
        parts = [_repair(before, after, mlp, roles, repair, tokens) for before, after in pairs]
        stages |= {name: sum((each[name] for each in parts), Work()) for name in parts[0]}
    attention = max(before.parameters for before, _ in pairs)
    memory = BASE_BYTES + 2 * 4 * round(attention + mlp.parameters) + sum(each.bytes(source) for each in asked)
    memory += 4 * BATCH * (8 * hidden + 6 * mlp.wide) + 8 * 6 * max(mlp.wide, hidden) ** 2
    return ConversionCost(tokens, read.passes, {name: work for name, work in stages.items() if work != Work()}, memory)


@dataclass(frozen=True)
class _Mlp:
    """What of a layer is not attention: an MLP of `matrices` matrices."""

    hidden: int
    parameters: float
    matrices: int

    @property
    def wide(self) -> int:
        return int(self.parameters / (self.matrices * self.hidden))  # norms are a part of a row

    @property
    def run(self) -> float:
        """Operations of a token."""
        return 2 * self.parameters


def _pass(attention: Attention, length: int) -> float:
    """Operations of a token in an attention, in rows of this length."""
    return 2 * attention.parameters + 2 * attention.num_attention_heads * attention.multiplied(length // 2)


def directions(family: Family, config: Json, shape: Shape, roles: Iterable[str]) -> int:
    """The width of the widest input that is regressed on, about: a checkpoint knows it exactly."""
    heads = max(site.num_attention_heads * site.head_dim for site in shape.sites.values())
    inner = _mlp(family, config, shape).wide if "down" in roles else 0
    return max(shape.hidden_size + 1, heads, inner)


def _mlp(family: Family, config: Json, shape: Shape) -> _Mlp:
    heads = shape.vocab_size * shape.hidden_size * (1 if family.tied(config) else 2)  # embedding and output matrix
    rest = shape.parameters - sum(site.parameters for site in shape.sites.values()) - heads
    matrices = max(1, len(family.body.mlp.keys() & (set(MLP) - {"act"})))
    return _Mlp(shape.hidden_size, rest / shape.num_layers, matrices)


def _answer(question: Question, shape: Shape, tokens: int) -> Work:
    """The sums of a request: a multiply-add for each number of its answer and each token."""
    if not isinstance(question, Request) or isinstance(question, SampledPairs):
        return Work()
    return Work(products=2 * DOUBLE * tokens * question.bytes(shape) / 8)


def _measured(question: Question, shape: Shape, mlp: _Mlp, tokens: int) -> Work:
    """The layers from a site on, and the logits, for the cost of converting it alone."""
    if not isinstance(question, Alone):
        return Work()
    first = min(site.layer for site in question.sites)
    above = sum(_pass(attention, 0) + mlp.run for site, attention in shape.sites.items() if site.layer >= first)
    return Work(passes=COPIED.get(type(question), tokens) * (above + 2 * shape.vocab_size * shape.hidden_size))


def _repair(
    before: Attention, after: Attention, mlp: _Mlp, roles: Sequence[str], settings: RepairSettings, tokens: int
) -> dict[str, Work]:
    """The parts of a layer's repair, in their order (`kvfold.repair.layers`)."""
    hidden, wide, length = mlp.hidden, mlp.wide, settings.length
    heads, width = after.num_attention_heads, after.num_attention_heads * after.head_dim
    attend = _pass(after, length)
    parts = {"both models": Work(passes=tokens * (_pass(before, length) + attend + mlp.run))}
    if "q" in roles:
        read, logits = min(tokens, settings.q_tokens), heads * length
        once = 8 * logits * after.head_dim + 2 * hidden**2 + 2 * width * hidden + 2 * TOUCHES * logits
        step = 3 * logits * after.head_dim + 4 * width * hidden + TOUCHES * logits
        parts["q"] = Work(read * (_pass(before, length) + attend), read * (once + Q_STEPS * step), hidden**3)
    if "o" in roles:
        parts["o"] = Work(tokens * attend, 2 * tokens * width * (width + hidden), width**3)
    for role in ("gate", "up"):
        if role in roles:
            read, matrix = min(tokens, settings.inner_tokens), wide * hidden
            run = mlp.run + 2 * (mlp.matrices - 1) * matrix  # and the slope
            products = 2 * (wide**2 + hidden**2) + (4 + 8 * INNER_STEPS) * matrix
            parts[role] = Work(read * run, read * products, wide**3 + 2 * INNER_STEPS * wide**2 * hidden / DOUBLE)
    if "down" in roles:
        parts["down"] = Work(tokens * 2 * wide * hidden, 2 * tokens * wide * (wide + hidden), wide**3)
    return parts
