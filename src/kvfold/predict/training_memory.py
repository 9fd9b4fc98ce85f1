"""Memory of uptraining on each of N ranks, from the shapes of a decoder and its teacher.

`train/placing` shards parameters, gradients and moments over the ranks, gathers one block after the other, and holds
frozen weights once. Of a token, a block keeps for its gradient (D hidden, H and G heads of width E, I inside the MLP):

    fp32    4 (6 D + 3 H E + 2 G E + m I)            norms: input, normed, output; q, k, v and output of attention twice
    bf16    26 D + 6 H E + 4 G E + 2 m I             the residual stream stays fp32; each product has a copy in bf16

with m = 4 of a gated MLP and 2 of another. Checkpointing keeps of each block its input alone (4 D), or with it the
outputs of products, and computes one block again. Offloaded inputs, parameters, gradients and moments are in the
memory of the host; of parameters, what is gathered is copied to the device first, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kvfold.contracts.family import MLP, Family, Json
from kvfold.contracts.site import Attention, Shape
from kvfold.errors import SettingError
from kvfold.formats import size

CHUNK_BYTES = 32 << 20  # of one chunk's logits in fp32, small beside a model
CHUNK_TOKENS = 512  # of a chunk at least: each reads and writes the whole gradient of the output matrix
CHUNKS = 7  # of them at a time: logits of both models, their logarithms, probabilities, the gradient
ACCUMULATED = 8  # whole gradients stay on a rank between passes where they take less than 1/8 of its memory

Checkpointing = Literal["none", "selective", "block"]
Offload = Literal["none", "activations", "parameters", "both"]
ACTIVATIONS: tuple[Offload, ...] = ("activations", "both")  # the choices that offload them
PARAMETERS: tuple[Offload, ...] = ("parameters", "both")


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits training computes at a time."""
    return max(CHUNK_TOKENS, CHUNK_BYTES // (4 * vocabulary))


def check_offload(offload: Offload, checkpointing: Checkpointing, where: str | None = None) -> None:
    """Raise SettingError where activations are offloaded and no block is checkpointed."""
    if offload in ACTIVATIONS and checkpointing == "none":
        raise SettingError(
            "the activations that are offloaded are the inputs of checkpointed blocks",
            where=where,
            got=f"offload {offload}, and checkpointing none",
            next="add --checkpointing block, or give --offload parameters",
        )


def training_flops(tokens: int, student: Shape, teacher: Shape | None) -> float:
    """FLOPs of training on `tokens`: 6 N a token of the student, and 2 N of a teacher that runs too."""
    return float(tokens) * (6 * student.parameters + (2 * teacher.parameters if teacher else 0))


@dataclass(frozen=True)
class Rank:
    """What a rank computes, and with how many others."""

    gpus: int = 1
    rows: int = 1  # sequences in a pass
    passes: int = 1  # in a step
    length: int = 2048
    checkpointing: Checkpointing = "none"
    offload: Offload = "none"
    converted_only: bool = False
    bf16: bool = True
    kl: bool = True
    device_bytes: int = 80 * 10**9


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank."""

    parameters: int
    teacher: int
    moments: int
    gathered: int  # embedding and output matrix, and two blocks, as products read them
    gradients: int  # of the rank, and of one block before they are summed over the ranks
    activations: int
    logits: int
    host: int  # what is offloaded: in the memory of the host, for each rank

    @property
    def total(self) -> int:
        """The peak on the device. Activations go while gradients come."""
        work = max(self.gradients, self.activations + self.logits)
        return self.parameters + self.teacher + self.moments + self.gathered + work


@dataclass(frozen=True)
class Training:
    """Memory of uptraining on each of several devices, and what makes it fit."""

    gpus: int
    memory: RankMemory
    memory_bytes: int
    available_bytes: int
    fits_with: str | None  # flags; empty: it fits. None: nothing that is known makes it fit

    def rows(self, device: str) -> list[tuple[str, str, str]]:
        """Rows of the plan's table."""
        fits = "no, whatever the flags" if self.fits_with is None else f"with {self.fits_with}"
        parts = {name: value for name, value in vars(self.memory).items() if name != "host"}
        host = [("  memory of the host, for each", "", size(self.memory.host))] if self.memory.host else []
        return [
            (f"uptraining on {self.gpus} x {device}, memory of each", "", size(self.memory_bytes)),
            *((f"  {name}", "", size(value)) for name, value in parts.items()),
            *host,
            ("  fits", "", "yes" if self.fits_with == "" else fits),
        ]


@dataclass(frozen=True)
class _Model:
    """Numbers of parameters of a decoder."""

    shape: Shape
    tied: bool
    inner: int  # width inside the MLP
    matrices: int  # of the MLP

    @property
    def table(self) -> int:
        """The embedding."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def root(self) -> int:
        """Embedding and output matrix."""
        return self.table * (1 if self.tied else 2)

    @property
    def block(self) -> int:
        """A block, on average."""
        return (self.shape.parameters - self.root) // self.shape.num_layers

    def frozen_bytes(self, parameters: int, tables: int, bf16: bool) -> int:
        """Bytes of frozen parameters, of which so many embeddings stay fp32."""
        return 4 * tables * self.table + (2 if bf16 else 4) * (parameters - tables * self.table)

    def token_bytes(self, bf16: bool) -> int:
        """What a block keeps of a token."""
        site = next(iter(self.shape.sites.values()))
        width, wide = self.shape.hidden_size, site.num_attention_heads * site.head_dim
        narrow, inner = _narrow(site), (4 if self.matrices == 3 else 2) * self.inner
        if bf16:
            return 26 * width + 6 * wide + 2 * narrow + 2 * inner
        return 4 * (6 * width + 3 * wide + narrow + inner)

    def product_bytes(self, bf16: bool) -> int:
        """The outputs of a block's products of a token."""
        site = next(iter(self.shape.sites.values()))
        wide = site.num_attention_heads * site.head_dim
        return (2 if bf16 else 4) * (
            2 * wide + _narrow(site) + 2 * self.shape.hidden_size + (self.matrices - 1) * self.inner
        )


def _narrow(site: Attention) -> int:
    """Outputs of the maps of keys and values."""
    return (site.num_key_value_heads + site.num_value_heads) * site.head_dim


def _model(family: Family, config: Json, shape: Shape) -> _Model:
    """A decoder whose MLPs have the parameters that its attention, embedding and output matrix leave."""
    tied = family.tied(config)
    matrices = max(1, len(family.body.mlp.keys() & (set(MLP) - {"act"})))
    heads = shape.vocab_size * shape.hidden_size * (1 if tied else 2)
    rest = shape.parameters - heads - sum(site.parameters for site in shape.sites.values())
    return _Model(shape, tied, rest // (shape.num_layers * matrices * shape.hidden_size), matrices)


def rank_memory(family: Family, config: Json, student: Shape, teacher: Shape, rank: Rank) -> RankMemory:
    """Bytes on a rank that trains the student of a decoder with this config.json."""
    return _memory(_model(family, config, student), _model(family, config, teacher), rank)


def training(family: Family, config: Json, student: Shape, teacher: Shape, rank: Rank, available: int) -> Training:
    """The memory of training on each device, of which so many bytes are available."""

    def of(rank: Rank) -> RankMemory:
        return rank_memory(family, config, student, teacher, rank)

    found = of(rank)
    fits = (flags for flags, other in remedies(rank) if of(other).total <= available)
    return Training(rank.gpus, found, found.total, available, "" if found.total <= available else next(fits, None))


def remedies(rank: Rank) -> Iterator[tuple[str, Rank]]:
    """Ways to need less memory, each beside the ones before it and costlier: flags, and the rank with them."""
    flags: list[str] = []
    for flag, changes in (
        ("--micro-batch 1", {"rows": 1}),
        ("--checkpointing selective", {"checkpointing": "selective"}),
        ("--checkpointing block", {"checkpointing": "block"}),
        ("--converted-only", {"converted_only": True}),
        ("--offload activations", {"offload": "activations"}),
        ("--offload both", {"offload": "both"}),
        *((f"--gpus {count}", {"gpus": count}) for count in (2**n for n in range(1, 11))),
    ):
        made = replace(rank, **changes)  # type: ignore[arg-type]
        less = (  # than there is already
            made.gpus < rank.gpus,
            rank.checkpointing == "block" and made.checkpointing == "selective",
            rank.offload in PARAMETERS and made.offload == "activations",
        )
        if made == rank or any(less):
            continue
        rank, name = made, flag.split()[0]
        flags = [each for each in flags if each.split()[0] != name] + [flag]
        yield " ".join(flags), rank


def _memory(student: _Model, teacher: _Model, rank: Rank) -> RankMemory:
    changed = _changed(student.shape, teacher.shape)
    shape, product = student.shape, 2 if rank.bf16 else 4
    trained = changed if rank.converted_only else shape.parameters
    parameters = 4 * trained
    if rank.converted_only:
        parameters += student.frozen_bytes(shape.parameters - trained, 1, rank.bf16)
    own = teacher.shape.parameters  # of the teacher, beside what it shares with the student
    if rank.converted_only:
        own -= shape.parameters - trained
    tables = 0 if rank.converted_only else 1
    theirs = teacher.frozen_bytes(own, tables, rank.bf16) if rank.kl else 0
    tokens = rank.rows * rank.length
    offloaded = rank.offload in PARAMETERS
    sharded = rank.gpus > 1 or offloaded
    root = (4 * student.root if not rank.converted_only else student.frozen_bytes(student.root, 1, rank.bf16)) + (
        teacher.frozen_bytes(teacher.root, 1, rank.bf16) if rank.kl and tables else 0
    )
    block = max(student.block, teacher.block if rank.kl else 0)
    copies = 2 * trained if rank.bf16 else 0  # of trained matrices, which autocast keeps in one process
    gathered = root + 2 * product * block if sharded else copies
    gathered += (root + 4 * block) // rank.gpus if offloaded else 0  # the rank's rows, before they are gathered
    # gradients of a block as products make them, and in fp32 where ranks sum them
    part = trained // shape.num_layers if rank.converted_only else student.block
    summed = max((product + 4) * part, 0 if rank.converted_only else 8 * student.root) if sharded else 0
    if sharded and rank.passes > 1 and 4 * trained < rank.device_bytes / ACCUMULATED:
        summed += 4 * trained
    whole = student.token_bytes(rank.bf16)
    moved = rank.offload in ACTIVATIONS
    inputs = 4 * shape.hidden_size * shape.num_layers  # of blocks
    held = 2 * 4 * shape.hidden_size if moved else inputs  # that of a block, and the copy of the next
    kept = {
        "none": whole * shape.num_layers,
        "selective": held + student.product_bytes(rank.bf16) * shape.num_layers + whole,
        "block": held + whole,
    }[rank.checkpointing]
    ends = 5 * 4 * shape.hidden_size  # hidden states of both models behind their last norm, and a gradient
    chunk = min(tokens, chunk_tokens(shape.vocab_size))
    table = 0 if rank.converted_only else 8 * student.table  # the gradient of the output matrix, and its scaled copy
    shares = [each // rank.gpus for each in (parameters, theirs, 8 * trained, 4 * trained)]
    there = [0] * len(shares) if offloaded else shares
    return RankMemory(
        parameters=there[0],
        teacher=there[1],
        moments=there[2],
        gathered=gathered,
        gradients=there[3] + summed,
        activations=(kept + ends) * tokens,
        logits=4 * CHUNKS * chunk * shape.vocab_size + table,
        host=sum(shares) - sum(there) + (inputs * tokens if moved else 0),
    )


def _changed(student: Shape, teacher: Shape) -> int:
    """Parameters of the attentions that a conversion changed."""
    return sum(each.parameters for site, each in student.sites.items() if each != teacher.sites.get(site))
