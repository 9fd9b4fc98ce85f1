"""The cost of a conversion: floating-point operations by stage, and memory, from shapes alone.

Three kinds of operations run at different speeds: `passes` of text through layers, `products` of tall matrices, and
`solves` in float64. `kvfold.convert.estimate` measures these speeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvfold.contracts.effort import INNER_STEPS, Q_STEPS, SPOOLED, RepairSettings
from kvfold.contracts.family import MLP, Family, Json
from kvfold.contracts.requests import COPIED, Alone, InputGram, Question, Request, SampledPairs
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.settings import MOST

DOUBLE = 2  # a product in float64 takes as long as two in float32
TOUCHES = 60  # operations in whose time one logit of q is made, weighed and moved in memory, beside its products
STOPPED = 4  # steps of q after which its tolerance stops it
FOLD = 70  # operations of a fit, over the cube of the width
BASE_BYTES = 450 * 10**6  # of a process that has loaded PyTorch and transformers
BATCH = 4096  # tokens that pass through a layer together
STREAMS = 3  # hidden states before a layer, of both models, and after it; and one after each of its attentions


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
    encoded: int = field(default=0, kw_only=True)  # tokens that an encoder reads for those of the decoder
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
    encoded: int = 0,
    length: int = 512,
    moment_tokens: int = MOST,
    sensitivity_tokens: int = 8192,
) -> ConversionCost:
    """Count a conversion that reads `tokens` tokens, in calibration rows of `length`, and repairs these roles.

    Of an encoder-decoder, `tokens` are those of the decoder, `encoded` those of the encoder, and `length` is of inputs;
    its moments are of all tokens.
    """
    asked, hidden = list(questions), source.hidden_size
    mlp, text = _mlp(family, config, source), _Text(tokens, encoded, source.encoder_positions or length)
    repaired = replace(text, length=source.encoder_positions or repair.length)
    layers = [
        [(site, source.sites[site], student.sites.get(site)) for site in source.cached_sites if site.layer == number]
        for number in range(source.num_layers)
    ]
    rest = source.encoder_parameters - sum(
        attention.parameters for site, attention in source.sites.items() if site.kind == "encoder"
    )
    whole = sum(text.run(site, attention) for site, attention in source.sites.items())
    read = Work(passes=whole + tokens * len(layers) * mlp.run + 2 * encoded * rest)
    changed = sum(before != after for layer in layers for _, before, after in layer)
    stages = {
        "calibration": (
            read * (1 if any(isinstance(each, Request) for each in asked) else 0)
            + sum((_answer(each, source, text) for each in asked), Work())
        )
        * (1.0 if encoded else min(1.0, moment_tokens / tokens)),
        "measured sites": sum((_measured(each, source, mlp, text, sensitivity_tokens) for each in asked), Work()),
        "fold": Work(solves=FOLD * hidden**3 * changed),
    }
    if roles:
        parts = [_repair(layer, mlp, roles, repair, repaired) for layer in layers]
        stages |= {name: sum((each[name] for each in parts), Work()) for name in parts[0]}
    attention = max(before.parameters for layer in layers for _, before, _ in layer)
    held = source.parameters if encoded else round(attention + mlp.parameters)  # of each model
    memory = BASE_BYTES + 2 * 4 * held + sum(each.bytes(source) for each in asked)
    memory += 4 * BATCH * (8 * hidden + 6 * mlp.wide) + 8 * 6 * max(mlp.wide, hidden) ** 2
    memory += min(SPOOLED, max(_spooled(layer, mlp, roles, repair, repaired) for layer in layers))
    counted = {name: work for name, work in stages.items() if work != Work()}
    return ConversionCost(tokens, read.passes, counted, memory, encoded=encoded)


@dataclass(frozen=True)
class _Text:
    """Tokens of a decoder, and those that an encoder reads for them, 0 without one; `length` is of an input's row."""

    tokens: int
    encoded: int
    length: int

    def keys(self, site: Site) -> int:
        """Tokens of the row that an attention looks at."""
        paired = site.kind == "self" and self.encoded
        return self.length * self.tokens // self.encoded if paired else self.length

    def run(self, site: Site, attention: Attention) -> float:
        """Operations of an attention on the text."""
        keys = self.keys(site)
        if site.kind == "self":
            return self.tokens * _pass(attention, keys)
        looked = 2 * attention.num_attention_heads * attention.multiplied(keys)
        if site.kind == "encoder":
            return self.encoded * (2 * attention.parameters + looked)
        made = sum(math.prod(shape) for role, shape in attention.roles().items() if role[0] in "kv")
        return self.tokens * (2 * (attention.parameters - made) + looked) + 2 * self.encoded * made


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
    attentions = sum(shape.sites[site].parameters for site in shape.cached_sites)
    rest = shape.parameters - shape.encoder_parameters - attentions - heads
    matrices = max(1, len(family.body.mlp.keys() & (set(MLP) - {"act"})))
    return _Mlp(shape.hidden_size, rest / shape.num_layers, matrices)


def _answer(question: Question, shape: Shape, text: _Text) -> Work:
    """The sums of a request: a multiply-add for each number of its answer and each token."""
    if not isinstance(question, Request) or isinstance(question, SampledPairs):
        return Work()
    crosses = isinstance(question, InputGram) and question.site.kind == "cross"
    tokens = text.encoded if crosses else text.tokens
    return Work(products=2 * DOUBLE * tokens * question.bytes(shape) / 8)


def _measured(question: Question, shape: Shape, mlp: _Mlp, text: _Text, tokens: int) -> Work:
    """The layers from a site on, and the logits, for the cost of converting it alone."""
    if not isinstance(question, Alone):
        return Work()
    first = min(site.layer for site in question.sites)
    tokens = COPIED.get(type(question), tokens)
    read = _Text(tokens, tokens * text.encoded // text.tokens, 0)
    above = sum(read.run(site, shape.sites[site]) for site in shape.cached_sites if site.layer >= first)
    rest = (shape.num_layers - first) * mlp.run + 2 * shape.vocab_size * shape.hidden_size
    return Work(passes=above + tokens * rest)


def _spooled(
    layer: Sequence[tuple[Site, Attention, Attention | None]],
    mlp: _Mlp,
    roles: Sequence[str],
    settings: RepairSettings,
    text: _Text,
) -> int:
    """Bytes of the hidden states that are kept at once while a layer is repaired, or else asked."""
    hidden, tokens, most = mlp.hidden, text.tokens, 0
    for site, _, after in layer:
        if after is not None and "q" in roles and "q" in after.roles():
            heads, keys = after.num_attention_heads, after.num_key_value_heads
            numbers = hidden + (keys + heads) * after.head_dim + heads * text.keys(site)
            most = max(most, min(tokens, settings.q_tokens) * numbers)
    # of the MLP: the stream before it and the inputs of both its parts, and for gate and up their inputs and slopes
    if {"gate", "up", "down"} & set(roles):
        inner = len({"gate", "up"} & set(roles))
        kept = min(tokens, settings.inner_tokens) * (hidden + inner * mlp.wide) if inner else 0
        most = max(most, tokens * (2 * hidden + mlp.wide) + kept)
    streams = STREAMS + len({site.kind for site, *_ in layer}) if roles else 1
    return 4 * (streams * tokens * hidden + most)


def _repair(
    layer: Sequence[tuple[Site, Attention, Attention | None]],
    mlp: _Mlp,
    roles: Sequence[str],
    settings: RepairSettings,
    text: _Text,
) -> dict[str, Work]:
    """The parts of a layer's repair, in their order (`kvfold.repair.layers`)."""
    hidden, wide, tokens = mlp.hidden, mlp.wide, text.tokens
    parts, both, attend = {"both models": Work(passes=tokens * mlp.run)}, 0.0, 0.0

    def count(name: str, work: Work) -> None:
        parts[name] = parts.get(name, Work()) + work

    for site, before, after in layer:
        if after is None:
            count("both models", Work(passes=text.run(site, before)))
            continue
        heads, width = after.num_attention_heads, after.num_attention_heads * after.head_dim
        own = text.run(site, after)
        both, attend = both + text.run(site, before) + own, attend + own  # this attention, and those before it
        count("both models", Work(passes=text.run(site, before) + own))
        if "q" in roles and "q" in after.roles():
            read, logits = min(tokens, settings.q_tokens), heads * text.keys(site)
            once = 8 * logits * after.head_dim + 2 * hidden**2 + 2 * width * hidden + 2 * TOUCHES * logits
            step = 3 * logits * after.head_dim + 4 * width * hidden + TOUCHES * logits
            steps = STOPPED if settings.tolerance else Q_STEPS
            count("q", Work(both * read / tokens, read * (once + steps * step), hidden**3))
        if "o" in roles:
            count("o", Work(attend, 2 * tokens * width * (width + hidden), width**3))
    for role in ("gate", "up"):
        if role in roles:
            read, matrix = min(tokens, settings.inner_tokens), wide * hidden
            products = 2 * (wide**2 + hidden**2) + 4 * matrix + INNER_STEPS * (4 * matrix + wide**2)
            fold = wide**3 + 2 * INNER_STEPS * wide**2 * hidden / DOUBLE
            parts[role] = Work(read * mlp.run / 2, read * products, fold)  # half of what reads both
    if "down" in roles:
        parts["down"] = Work(tokens * 2 * wide * hidden, 2 * tokens * wide * (wide + hidden), wide**3)
    return parts
