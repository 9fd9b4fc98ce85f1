"""Closed-form repair of a student, layer by layer, on its own inputs. Nothing is trained, for any method.

A conversion changes the inputs of every layer above it, and leaves q, o and the MLP as they suit the teacher. Teacher
and student read the same text. In each layer, in this order, weights of the student are refitted to the teacher's, and
the layers above read the repaired layer:

    q     its logits: min E_t Var_{s ~ p_t}[ q'_t . k'_s - l_ts ]      p and l: the teacher's attention and logits
    o     min E |z W_o^T - (a - h')|^2       z: the student's heads; a: the teacher's residual stream after attention
    gate  min E |m W_down^T - (r - a')|^2    m: the student's input of down; r: the teacher's stream after the layer
    up    the same, in W_up                  (in W_gate to first order)
    down  the same, in W_down

`h'` and `a'` are the student's own residual stream, so that a repair also corrects the errors of the layers below.
o and down are ridge regressions; `queries` has the least squares of q, and `mlp` that of gate and up. In the decoder of
an encoder-decoder, q and o of self-attention come before those of cross-attention, which reads the output of the
student's own encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold import ranks
from kvfold.contracts.effort import INNER_STEPS, Q_STEPS, RepairSettings
from kvfold.contracts.family import MLP
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.disk.checkpoint import Checkpoint, Writer
from kvfold.disk.output import REPAIRED, Output, damaged
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.errors import CheckpointError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.repair import check_roles
from kvfold.repair.mlp import InnerFit
from kvfold.repair.parts import AttentionPart, LayerParts
from kvfold.repair.queries import SAMPLED_ROWS, LogitFit
from kvfold.repair.rows import BATCH, Rows
from kvfold.solve.linalg import ridge

if TYPE_CHECKING:
    from kvfold.text.pairs import Corpus
    from kvfold.text.tokens import TokenFile

INNER_BATCH = 1024  # tokens on which a thread applies the least squares of gate and up
LOGIT_BATCH = 1 << 19  # logits of one batch, in elements: a few MB stay in the processor's cache
DAMPING = 3e-2  # pulls o and down towards what they were
MLP_ROLES = frozenset(MLP).intersection(REPAIRABLE)
Q_DAMPING, INNER_DAMPING = 1e-1, 1e-2


def repair(
    teacher: Checkpoint,
    student: Checkpoint,
    roles: Sequence[str],
    tokens: TokenFile | Corpus,
    settings: RepairSettings = RepairSettings(),
    *,
    queries: Mapping[Site, Sequence[int]] = {},
    done: Sequence[Mapping[str, Tensor]] = (),
    progress: Progress = SILENT,
) -> Iterator[dict[str, Tensor]]:
    """Yield the repaired tensors of each layer by name. The checkpoints are not written.

    On several ranks, each reads its share of the rows, and all of them have the tensors.

    `queries` are the teacher's query heads in the student's order, at sites where it differs. The tensors of the first
    layers may be `done`: a repair continues after them.

    Memory: one layer of each model (of encoder-decoders: both models), the Gram matrix of its widest input, one batch.
    Disk: six hidden states per token, and the inner width of the MLP, or the teacher's attention on `q_tokens`. Raises
    SettingError for roles that cannot be repaired, OutputError if the disk has no room, CheckpointError if a repaired
    tensor is not finite.
    """
    check_roles(teacher.family, roles)
    layers = teacher.shape.num_layers
    with ExitStack() as stack, task(progress, "repairing", layers, "layers", len(done)):
        work = _Pass(teacher, student, roles, tokens, settings, queries, stack)
        for number in range(layers):
            yield work.layer(number, done[number] if number < len(done) else None)
            if number >= len(done):
                progress.advance(1)


def repair_in_place(
    teacher: Checkpoint,
    output: Output,
    roles: Sequence[str],
    tokens: TokenFile | Corpus,
    settings: RepairSettings,
    writer: Writer,
    queries: Mapping[Site, Sequence[int]],
    progress: Progress,
) -> None:
    """Repair the student in an unfinished output, whose tensors `writer` has written.

    The tensors of each layer lie in a file of their own until all layers are done, so that stopped work continues from
    a student of which nothing is repaired.
    """
    folder = output.work / REPAIRED
    folder.mkdir(exist_ok=True)
    writer.index()
    student = Checkpoint(output.work, output.path.name)
    ranks.everywhere(_repair_into, folder, teacher, student, roles, tokens, settings, queries, progress=progress)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            writer.replace(name, tensor)


def _repair_into(
    folder: Path,
    teacher: Checkpoint,
    student: Checkpoint,
    roles: Sequence[str],
    tokens: TokenFile | Corpus,
    settings: RepairSettings,
    queries: Mapping[Site, Sequence[int]],
    *,
    progress: Progress,
) -> None:
    """Repair the layers that have no file in the folder yet, on all ranks; rank 0 writes the files."""
    done: list[dict[str, Tensor]] = []
    while (path := folder / f"{len(done):05d}.safetensors").exists():
        try:
            done.append(load_file(path))
        except SafetensorError as error:
            raise damaged(path) from error
    ranks.barrier()  # before rank 0 writes the next one
    layers = repair(teacher, student, roles, tokens, settings, queries=queries, done=done, progress=progress)
    for number, tensors in enumerate(layers):
        if number >= len(done) and ranks.current().main:
            path = folder / f"{number:05d}.safetensors"
            save_file(tensors, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)


class _Pass:
    """Teacher and student, and on disk their residual streams over all rows: before the current layer, and in it."""

    def __init__(
        self,
        teacher: Checkpoint,
        student: Checkpoint,
        roles: Sequence[str],
        tokens: TokenFile | Corpus,
        settings: RepairSettings,
        queries: Mapping[Site, Sequence[int]],
        stack: ExitStack,
    ) -> None:
        self.roles, self.settings, self.queries, self.target = roles, settings, queries, student
        self.rows = Rows.of(tokens, teacher, settings)
        self.models = [stack.enter_context(self.rows.open(each)) for each in (teacher, student)]
        width, lengths = teacher.shape.hidden_size, self.rows.lengths
        attentions = len({site.kind for site in teacher.shape.cached_sites})
        check_room((3 + attentions) * spool_bytes(sum(lengths), width))
        # before the layer, of teacher and student; the teacher's after the layer, and after each of its attentions
        self.teacher, self.student, self.above, *self.middles = (
            stack.enter_context(Spool(lengths, width, device=best_device())) for _ in range(3 + attentions)
        )
        for row, count in self._batches():
            for model, stream in zip(self.models, (self.teacher, self.student), strict=True):
                stream.write(row, self.rows.embed(model, row, count))

    def _batches(self) -> list[tuple[int, int]]:
        return self.rows.batches(BATCH)

    @torch.inference_mode()
    def layer(self, number: int, done: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Repair one layer, or take it as it is `done`, and pass the rows of both models through it."""
        teacher, student = (LayerParts(model.open(number), model.source) for model in self.models)
        for row, count in self._batches():
            *middles, above_BTD = teacher.streams(self.teacher.read(row, count), row)
            self.above.write(row, above_BTD)
            for spool, middle_BTD in zip(self.middles, middles, strict=False):  # a layer may have fewer attentions
                spool.write(row, middle_BTD)
        found = dict(done or {})
        for name, tensor in found.items():
            student.layer.write(name, tensor)
        wanted = [role for role in REPAIRABLE if role in self.roles] if done is None else []
        # the last attention that the student has stands in for those of the teacher behind it
        behind = self.middles[: len(teacher.attentions)]
        behind = [*behind[: len(student.attentions) - 1], behind[-1]]
        for own, part, middle in zip(teacher.attentions, student.attentions, behind, strict=False):
            if "q" in wanted and part.q is not None:
                self._repair_q((teacher, own), (student, part))
                found |= self._saved("q", student, part.site)
            if "o" in wanted:
                _regress(part.o, self._heads(student, part, middle))
                found |= self._saved("o", student, part.site)
        if MLP_ROLES.intersection(self.roles):
            with _Halfway(self.rows.lengths, student) as half:
                found |= self._pass_mlp(half, wanted)
        else:
            for row, count in self._batches():
                self.student.write(row, student.layer.run(self.student.read(row, count), row))
        self.teacher, self.above = self.above, self.teacher
        return found

    def _saved(self, role: str, student: LayerParts, site: Site) -> dict[str, Tensor]:
        """A repaired tensor by name, as it is saved; the layers above read it so. Raises CheckpointError for NaN."""
        name = self.target.family.tensor(site, role)
        saved = student.layer.weight(name).to(getattr(torch, self.target.spec(name).dtype))
        student.layer.write(name, saved)
        if not bool(saved.isfinite().all()):
            raise CheckpointError("the repaired tensor is not finite", where=name, next="repair fewer roles")
        return {name: saved.cpu()}

    def _heads(self, student: LayerParts, part: AttentionPart, middle: Spool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the input of o, and of what its output lacks; both weighted."""
        for row, count in self._batches():
            before_BTD, seen = student.attend(part, self.student.read(row, count), row)
            output_BTD = part.o(seen.heads_BTN)
            lacks_BTD, share = part.residual.missing(before_BTD, output_BTD, middle.read(row, count))
            yield seen.heads_BTN * share, lacks_BTD * share

    def _pass_mlp(self, half: _Halfway, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Repair the MLP, and pass the student's rows through the layer. Its attention runs once, for all of it."""
        student, found = half.student, dict[str, Tensor]()
        site = student.attentions[0].site
        for row, count in self._batches():
            half.write(row, self.student.read(row, count))
        if inner := [role for role in ("gate", "up") if role in wanted]:
            self._repair_inner(inner, half)
            for role in inner:
                found |= self._saved(role, student, site)
        if "down" in wanted:
            _regress(student.mlp["down"], self._inner(half))
            found |= self._saved("down", student, site)
        for row, count in self._batches():
            inner_BTF = half.inner.read(row, count) if "down" in wanted else student.inner(half.x.read(row, count))
            output_BTD = student.mlp["down"](inner_BTF)
            self.student.write(row, student.residual.joined(half.middle.read(row, count), output_BTD))
        return found

    def _inner(self, half: _Halfway) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the input of down, which are kept, and of what its output lacks; both weighted."""
        for row, count in self._batches():
            inner_BTF = half.student.inner(half.x.read(row, count))
            half.inner.write(row, inner_BTF)
            lacks_BTD, share = self._lacks(half, row, inner_BTF)
            yield inner_BTF * share, lacks_BTD * share

    def _lacks(self, half: _Halfway, row: int, inner_BTF: Tensor) -> tuple[Tensor, Tensor | float]:
        """What the output of down lacks, and the weight of each token."""
        count, student = len(inner_BTF), half.student
        output_BTD = student.mlp["down"](inner_BTF)
        return student.residual.missing(half.middle.read(row, count), output_BTD, self.above.read(row, count))

    def _repair_inner(self, roles: Sequence[str], half: _Halfway) -> None:
        student, rows = half.student, self.rows.first(self.settings.inner_tokens)
        read = self.rows.batches(INNER_BATCH, rows=rows)
        with InnerFit([student.mlp[role] for role in roles], student.mlp["down"], self.rows.lengths[:rows]) as fit:
            for row, count in self.rows.batches(BATCH, rows=rows):
                x_BTD = half.x.read(row, count)
                inner_BTF, slopes_BTF = student.inner_and_slopes(x_BTD, roles)
                lacks_BTD, share = self._lacks(half, row, inner_BTF)
                fit.add(row, x_BTD, [slope_BTF * share for slope_BTF in slopes_BTF], lacks_BTD * share)
            fit.solve(steps=INNER_STEPS, tolerance=self.settings.tolerance, damping=INNER_DAMPING, batches=read)

    def _repair_q(self, teacher: tuple[LayerParts, AttentionPart], student: tuple[LayerParts, AttentionPart]) -> None:
        (above, own), (layer, part) = teacher, student
        rows, crosses = self.rows.first(self.settings.q_tokens), part.site.kind == "cross"
        lengths, heads = self.rows.lengths[:rows], own.shape.num_attention_heads
        keys = self.rows.encoded[:rows] if crosses else lengths

        def logits(tokens: int, encoded: int) -> int:
            return heads * tokens * (encoded if crosses else tokens)

        read, sampled = self.rows.batches(LOGIT_BATCH, logits, rows), self.rows.sampled(rows, SAMPLED_ROWS)
        with LogitFit(own.shape, part.shape, part.q, part.q_norm, lengths, keys, causal=not crosses) as fit:
            for row, count in self.rows.batches(BATCH, rows=rows):
                _, theirs = above.attend(own, self.teacher.read(row, count), row)
                _, ours = layer.attend(part, self.student.read(row, count), row)
                batch = max(1, LOGIT_BATCH // logits(lengths[row], keys[row]))
                fit.add(row, theirs, ours, self.queries.get(part.site), batch=batch)
            fit.solve(
                steps=Q_STEPS, tolerance=self.settings.tolerance, damping=Q_DAMPING, batches=read, sampled=sampled
            )


class _Halfway(ExitStack):
    """The student's rows between attention and MLP, on disk: the residual stream, the inputs of MLP and down."""

    def __init__(self, lengths: Sequence[int], student: LayerParts) -> None:
        super().__init__()
        wide, hidden = student.mlp["up"].weight.shape
        check_room(spool_bytes(sum(lengths), 2 * hidden + wide))
        self.student = student
        self.middle, self.x, self.inner = (
            self.enter_context(Spool(lengths, each, device=best_device())) for each in (hidden, hidden, wide)
        )

    def write(self, row: int, hidden_BTD: Tensor) -> None:
        """Write the rows from `row` on, whose hidden states before the layer are given."""
        middle_BTD, x_BTD = self.student.before_mlp(hidden_BTD, row)
        self.middle.write(row, middle_BTD)
        self.x.write(row, x_BTD)


def _regress(linear: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add to a linear module the ridge regression of what its outputs lack on its inputs."""
    out, wide = linear.weight.shape
    gram_NN, cross_NM = (torch.zeros(wide, n, dtype=torch.float64, device=linear.weight.device) for n in (wide, out))
    tokens = 0
    for z, lacks in batches:
        z_TN = z.flatten(0, -2)
        gram_NN += z_TN.T @ z_TN  # products of one batch in the models' format, summed in float64
        cross_NM += z_TN.T @ lacks.flatten(0, -2)
        tokens += len(z_TN)
    tokens = sum(ranks.gather_in_order(tokens))
    for total in (gram_NN, cross_NM):
        ranks.sum_to_main(total)
    if ranks.current().main:
        cross_NM = ridge(gram_NN / tokens, cross_NM / tokens, DAMPING).contiguous()
    linear.weight += ranks.spread(cross_NM).T
