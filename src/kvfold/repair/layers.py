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
o and down are ridge regressions; `queries` has the least squares of q, and `mlp` that of gate and up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvfold import hf, ranks
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
from kvfold.repair.mlp import InnerFit, slope
from kvfold.repair.queries import LogitFit
from kvfold.repair.residual import Norm, Residual
from kvfold.solve.linalg import ridge

if TYPE_CHECKING:
    from kvfold.text.tokens import TokenFile

BATCH = 4096  # tokens that pass through a layer together
LOGIT_BATCH = 1 << 19  # logits of one batch, in elements: a few MB stay in the processor's cache
DAMPING = 3e-2  # pulls o and down towards what they were
MLP_ROLES = frozenset(MLP).intersection(REPAIRABLE)
Q_DAMPING, INNER_DAMPING = 1e-1, 1e-2


def repair(
    teacher: Checkpoint,
    student: Checkpoint,
    roles: Sequence[str],
    tokens: TokenFile,
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

    Memory: one layer of each model, the Gram matrix of its widest input, one batch. Disk: six hidden states per token,
    and the inner width of the MLP, or the teacher's attention on `q_tokens`. Raises SettingError for roles that cannot
    be repaired, OutputError if the disk has no room, CheckpointError if a repaired tensor is not finite.
    """
    check_roles(teacher.family, roles)
    layers = teacher.shape.num_layers
    with ExitStack() as stack, task(progress, "repairing", layers, "layers"):
        work = _Pass(teacher, student, roles, tokens, settings, queries, stack)
        for number in range(layers):
            yield work.layer(number, done[number] if number < len(done) else None)
            progress.advance(1)


def repair_in_place(
    source: Checkpoint,
    output: Output,
    roles: Sequence[str],
    tokens: TokenFile,
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
    ranks.everywhere(_repair_into, folder, source, student, roles, tokens, settings, queries, progress=progress)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            writer.replace(name, tensor)


def _repair_into(
    folder: Path,
    source: Checkpoint,
    student: Checkpoint,
    roles: Sequence[str],
    tokens: TokenFile,
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
    layers = repair(source, student, roles, tokens, settings, queries=queries, done=done, progress=progress)
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
        tokens: TokenFile,
        settings: RepairSettings,
        queries: Mapping[Site, Sequence[int]],
        stack: ExitStack,
    ) -> None:
        self.roles, self.settings, self.queries, self.target = roles, settings, queries, student
        length = min(settings.length, teacher.known_length, len(tokens))
        self.length, self.own = length, _dealt(len(tokens) // length, max(1, BATCH // length))
        width, self.lengths = teacher.shape.hidden_size, [length] * len(self.own)
        self.models = [
            stack.enter_context(hf.Layers(each, device=best_device(), attention=hf.WATCHED, lengths=self.lengths))
            for each in (teacher, student)
        ]
        check_room(4 * spool_bytes(sum(self.lengths), width))
        # before the layer, of teacher and student; the teacher's after attention, and after the layer
        self.teacher, self.student, self.middle, self.above = (
            stack.enter_context(Spool(self.lengths, width, device=best_device())) for _ in range(4)
        )
        for row, count in self._batches():
            texts = [tokens.tokens[each * length : (each + 1) * length] for each in self.own[row : row + count]]
            ids_BT = torch.from_numpy(np.stack(texts).astype("int64"))
            for model, stream in zip(self.models, (self.teacher, self.student), strict=True):
                stream.write(row, model.embed(ids_BT))

    def _batches(self) -> Iterator[tuple[int, int]]:
        return self.teacher.batches(BATCH)

    @torch.inference_mode()
    def layer(self, number: int, done: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Repair one layer, or take it as it is `done`, and pass the rows of both models through it."""
        site = Site(number)
        teacher, student = (_Layer(model.open(number), model.source, site) for model in self.models)
        for row, count in self._batches():
            middle_BTD, above_BTD = teacher.streams(self.teacher.read(row, count), row)
            self.middle.write(row, middle_BTD)
            self.above.write(row, above_BTD)
        found = dict(done or {})
        for name, tensor in found.items():
            student.layer.write(name, tensor)
        wanted = [role for role in REPAIRABLE if role in self.roles] if done is None else []
        if "q" in wanted:
            self._repair_q(teacher, student)
            found |= self._saved("q", student)
        if "o" in wanted:
            _regress(student.o, self._heads(student))
            found |= self._saved("o", student)
        if MLP_ROLES.intersection(self.roles):
            with _Halfway(self.lengths, student) as half:
                found |= self._pass_mlp(half, wanted)
        else:
            for row, count in self._batches():
                self.student.write(row, student.layer.run(self.student.read(row, count), row))
        self.teacher, self.above = self.above, self.teacher
        return found

    def _saved(self, role: str, student: _Layer) -> dict[str, Tensor]:
        """A repaired tensor by name, as it is saved; the layers above read it so. Raises CheckpointError for NaN."""
        name = self.target.family.tensor(student.site, role)
        saved = student.layer.weight(name).to(getattr(torch, self.target.spec(name).dtype))
        student.layer.write(name, saved)
        if not bool(saved.isfinite().all()):
            raise CheckpointError("the repaired tensor is not finite", where=name, next="repair fewer roles")
        return {name: saved.cpu()}

    def _heads(self, student: _Layer) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the input of o, and of what its output lacks; both weighted."""
        for row, count in self._batches():
            hidden_BTD = self.student.read(row, count)
            heads_BTN = student.attend(hidden_BTD, row).heads_BTN
            wanted_BTD = self.middle.read(row, count) - hidden_BTD
            lacks_BTD, share = student.added["attention"].missing(student.o(heads_BTN), wanted_BTD)
            yield heads_BTN * share, lacks_BTD * share

    def _pass_mlp(self, half: _Halfway, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Repair the MLP, and pass the student's rows through the layer. Its attention runs once, for all of it."""
        student, found = half.student, dict[str, Tensor]()
        for row, count in self._batches():
            half.write(row, self.student.read(row, count))
        for role in ("gate", "up"):
            if role in wanted:
                self._repair_inner(role, half)
                found |= self._saved(role, student)
        if "down" in wanted:
            _regress(student.mlp["down"], self._inner(half))
            found |= self._saved("down", student)
        for row, count in self._batches():
            inner_BTF = half.inner.read(row, count) if "down" in wanted else student.inner(half.x.read(row, count))
            added_BTD = student.added["mlp"].added(student.mlp["down"](inner_BTF))
            self.student.write(row, half.middle.read(row, count).to(added_BTD) + added_BTD)
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
        count, down = len(inner_BTF), half.student.mlp["down"]
        wanted_BTD = self.above.read(row, count) - half.middle.read(row, count)
        return half.student.added["mlp"].missing(down(inner_BTF), wanted_BTD.to(inner_BTF))

    def _first(self, tokens: int) -> Sequence[int]:
        """The lengths of this rank's rows among the first `tokens` tokens of the text, which has a row at least."""
        rows = max(1, tokens // self.length)
        return self.lengths[: sum(row < rows for row in self.own)]

    def _repair_inner(self, role: str, half: _Halfway) -> None:
        student, lengths = half.student, self._first(self.settings.inner_tokens)
        batch = max(1, BATCH // self.length)
        with InnerFit(student.mlp[role], student.mlp["down"], lengths) as fit:
            for row in range(0, len(lengths), batch):
                x_BTD = half.x.read(row, min(batch, len(lengths) - row))
                lacks_BTD, share = self._lacks(half, row, student.inner(x_BTD))
                fit.add(row, x_BTD, student.slope(x_BTD, role) * share, lacks_BTD * share)
            fit.solve(steps=INNER_STEPS, tolerance=self.settings.tolerance, damping=INNER_DAMPING, batch=batch)

    def _repair_q(self, teacher: _Layer, student: _Layer) -> None:
        lengths = self._first(self.settings.q_tokens)
        batch = max(1, LOGIT_BATCH // (teacher.attention.num_attention_heads * self.length**2))
        with LogitFit(teacher.attention, student.attention, student.q, student.q_norm, lengths) as fit:
            for row in range(0, len(lengths), batch):
                count = min(batch, len(lengths) - row)
                theirs = teacher.attend(self.teacher.read(row, count), row)
                fit.add(row, theirs, student.attend(self.student.read(row, count), row), self.queries.get(student.site))
            fit.solve(steps=Q_STEPS, tolerance=self.settings.tolerance, damping=Q_DAMPING, batch=batch)


def _dealt(rows: int, batch: int) -> list[int]:
    """The rows of this rank: the batches of one rank are dealt in turn, because q is fitted on the first rows alone."""
    this = ranks.current()
    return [row for row in range(rows) if row // batch % this.world == this.rank]


class _Layer:
    """One layer of one model, and the modules in it that a repair reads or changes."""

    def __init__(self, layer: hf.Layer, checkpoint: Checkpoint, site: Site) -> None:
        family = checkpoint.family
        self.layer, self.site, self.attention = layer, site, checkpoint.shape.sites[site]
        self._module = layer.owner(family.module(site))
        self.q, self.o = (layer.owner(family.alone(site, role)) for role in "qo")
        offset, normed = self.attention.norm_offset, self.attention.norms != "none"
        self.q_norm = Norm(layer.owner(family.tensor(site, "q_norm")), offset) if normed else None
        self.mlp: dict[str, Any] = {
            part: layer.owner(family.alone(site, part)) if part in REPAIRABLE else layer.module(str(path))
            for part, path in family.body.mlp.items()
        }
        after = {part: Norm(layer.module(path), offset) for part, path in family.body.after.items()}
        factor = float(checkpoint.config.get(family.body.residual, 1.0))
        self.added = {"attention": Residual(self._module, after.get("attention"), factor)}
        if self.mlp:
            self.added["mlp"] = Residual(self.mlp["down"], after.get("mlp"), factor)

    def attend(self, hidden_BTD: Tensor, row: int) -> hf.Attended:
        """The attention on hidden states of the rows from `row` on."""
        rotated = self.attention.rope.dims if self.attention.rope else 0
        return hf.attend(self.layer, self._module, self.o, hidden_BTD, row, rotated)

    def streams(self, hidden_BTD: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and after the layer."""
        seen: dict[str, Tensor] = {}
        with _hooked(self._joined(seen)):
            above_BTD = self.layer.run(hidden_BTD, row)
        return hidden_BTD.to(above_BTD) + seen["added"], above_BTD

    def before_mlp(self, hidden_BTD: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the input of the MLP, which does not run."""
        seen: dict[str, Tensor] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]
            raise _Done

        first = self.mlp.get("gate", self.mlp["up"])
        with _hooked(self._joined(seen), first.register_forward_pre_hook(stop)), suppress(_Done):
            self.layer.run(hidden_BTD, row)
        return hidden_BTD.to(seen["x"]) + seen["added"], seen["x"]

    def _joined(self, seen: dict[str, Tensor]) -> RemovableHandle:
        """A hook that puts what attention adds to the residual stream into `seen`."""

        def see(module: nn.Module, args: Any, result: Any) -> None:
            added_BTD: Tensor = result[0] if isinstance(result, tuple) else result
            seen["added"] = self.added["attention"].factor * added_BTD

        return self.added["attention"].last.register_forward_hook(see)

    def inner(self, x_BTD: Tensor) -> Tensor:
        """The input of `down`."""
        x_BTD, mlp = x_BTD.to(self.mlp["up"].weight), self.mlp
        up_BTF: Tensor = mlp["up"](x_BTD)
        inner_BTF: Tensor = mlp["act"](mlp["gate"](x_BTD)) * up_BTF if "gate" in mlp else mlp["act"](up_BTF)
        return inner_BTF

    def slope(self, x_BTD: Tensor, role: str) -> Tensor:
        """The factor of each output of up or gate on its way to `down`."""
        up_BTF = self.mlp["up"](x_BTD)
        if "gate" not in self.mlp:
            return slope(self.mlp["act"], up_BTF, torch.ones_like(up_BTF), "gate")
        return slope(self.mlp["act"], self.mlp["gate"](x_BTD), up_BTF, role)


class _Halfway(ExitStack):
    """The student's rows between attention and MLP, on disk: the residual stream, the inputs of MLP and down."""

    def __init__(self, lengths: Sequence[int], student: _Layer) -> None:
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


class _Done(Exception):
    """What is looked for has been seen: the rest of the layer need not be computed."""


@contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove these hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
