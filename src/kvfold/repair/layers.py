"""Closed-form repair of a student, layer after layer, on its own inputs; any method may ask for it.

A conversion changes what each layer hears from those below it, and leaves q, o and the MLP tuned to the teacher. Both
read the same text side by side; in each layer, in this order, a weight of the student is refitted to what the teacher
did there, and everything above sees the layer as repaired:

    q     its logits: min E_t Var_{s ~ p_t}[ q'_t . k'_s - l_ts ]      p and l are the teacher's attention and logits
    o     min E |z W_o^T - (a - h')|^2       z: the student's heads; a: the teacher's residual stream after attention
    gate  min E |m W_down^T - (r - a')|^2    m: what the student's MLP hands to down; r: the teacher's stream above
    up    the same, in W_up                  (in W_gate it is the minimum to first order)
    down  the same, in W_down

`h'` and `a'` are the student's own residual stream, so what drifted below is made up for. o and down are ridge
regressions, q is the least squares of `logits`, gate and up those of `gated`. No gradient runs through a layer, and
nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold import hf
from kvfold.contracts.family import MLP
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.disk.checkpoint import Checkpoint, Writer, read_config
from kvfold.disk.lineage import known_length
from kvfold.disk.output import REPAIRED, Output, damaged
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.errors import CheckpointError, SettingError, choices
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.repair.mlp import InnerFit, slope
from kvfold.repair.queries import LogitFit
from kvfold.repair.residual import Residual
from kvfold.solve.linalg import ridge

if TYPE_CHECKING:
    from kvfold.text.tokens import TokenFile

LOGIT_BATCH = 1 << 19  # logits of one batch, in elements: a few MB stay in the processor's cache


@dataclass(frozen=True)
class RepairSettings:
    """How much text, how stiff, how exact."""

    length: int = field(default=256, metadata={"help": "Tokens of a row; each row is read from its own beginning."})
    batch_tokens: int = field(default=4096, metadata={"help": "Tokens that go through a layer together."})
    logit_tokens: int = field(default=49_152, metadata={"help": "Tokens on which q is repaired; others have them all."})
    steps: int = field(default=6, metadata={"help": "Steps of conjugate gradients for q: each rereads those tokens."})
    inner_steps: int = field(default=3, metadata={"help": "The same for gate and up, over all tokens."})
    damping: float = field(default=3e-2, metadata={"help": "Pull of o and down to where they are."})
    logit_damping: float = field(default=1e-1, metadata={"help": "The same for q."})
    inner_damping: float = field(default=1e-2, metadata={"help": "The same for gate and up."})


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
    """Yield, layer by layer, the student's repaired tensors by name; the checkpoints are not written.

    `queries` are the teacher's query heads in the student's order, at sites where that is another. The first layers may
    be `done`: they are taken as they are, so that a repair goes on where it was stopped.
    Memory: one layer of each model, the Gram matrix of its widest input, one batch. Disk: six hidden states a token,
    and the inner width of the MLP, or over `logit_tokens` the teacher's attention. Raises SettingError for unknown
    roles and for families whose MLP is not known, OutputError when the disk has no room, CheckpointError when a
    repaired tensor is not finite.
    """
    if unknown := [role for role in roles if role not in REPAIRABLE]:
        raise SettingError(f"{unknown[0]!r} cannot be repaired", where="repair", allowed=choices(REPAIRABLE))
    if packed := [role for role in roles if teacher.family.packed(role)]:
        raise SettingError(
            f"family {teacher.family.name} keeps {choices(packed)} in one tensor with other roles",
            where="repair",
            next=f"leave out {choices(packed)}",
        )
    if absent := [role for role in roles if role in MLP and role not in teacher.family.body.mlp]:
        raise SettingError(
            f"the MLP of family {teacher.family.name} has no {choices(absent)}",
            where="repair",
            next=f"leave out {choices(absent)}",
        )
    with ExitStack() as stack:
        work = _Pass(teacher, student, roles, tokens, settings, queries, stack)
        progress.start("repairing", len(work.teachers), "layers")
        try:
            for number in range(len(work.teachers)):
                yield work.layer(number, done[number] if number < len(done) else None)
                progress.advance(1)
        finally:
            progress.stop()


def repair_in_place(
    source: Checkpoint,
    output: Output,
    roles: Sequence[str],
    tokens: TokenFile,
    writer: Writer,
    queries: Mapping[Site, Sequence[int]],
    progress: Progress,
) -> None:
    """Repair the student that lies in an unfinished output, whose tensors `writer` has written.

    Each layer is kept in a file of its own until all are done, so that stopped work goes on and none is mixed up.
    """
    folder = output.work / REPAIRED
    folder.mkdir(exist_ok=True)
    writer.index()
    done: list[dict[str, Tensor]] = []
    while (path := folder / f"{len(done):05d}.safetensors").exists():
        try:
            done.append(load_file(path))
        except SafetensorError as error:
            raise damaged(path) from error
    student = Checkpoint(output.work, output.path.name, read_config(output.work))
    for number, tensors in enumerate(
        repair(source, student, roles, tokens, queries=queries, done=done, progress=progress)
    ):
        if number >= len(done):
            path = folder / f"{number:05d}.safetensors"
            save_file(tensors, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            writer.replace(name, tensor)


class _Pass:
    """Teacher and student side by side: their residual streams over all rows, before the layer at hand."""

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
        self.roles, self.settings, self.queries = roles, settings, queries
        self.source, self.target = teacher, student
        device = best_device()
        length = min(settings.length, known_length(teacher), len(tokens))
        rows = len(tokens) // length
        self.teachers, self.students = (
            stack.enter_context(hf.Layers(each, device=device, attention=hf.WATCHED, lengths=[length] * rows))
            for each in (teacher, student)
        )
        width = teacher.shape.hidden_size
        check_room(4 * spool_bytes(rows * length, width))
        # before the layer: the teacher's stream and the student's; within it: the teacher's after attention, after all
        self.taught, self.learnt, self.middle, self.above = (
            stack.enter_context(Spool([length] * rows, width)) for _ in range(4)
        )
        for row, count in self.taught.batches(settings.batch_tokens):
            ids_BT = torch.from_numpy(tokens.tokens[row * length : (row + count) * length].astype("int64"))
            hidden_BTD = self.teachers.embed(ids_BT.view(count, length))
            self.taught.write(row, hidden_BTD)
            self.learnt.write(row, self.students.embed(ids_BT.view(count, length)))
        self.length, self.rows = length, rows

    def layer(self, number: int, done: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Repair one layer, or take it as it was repaired, and let both models read it."""
        teacher, student = self.teachers.open(number), self.students.open(number)
        site = Site(number)
        taught, learnt = (_Parts(*each, site) for each in ((teacher, self.source), (student, self.target)))
        self._read_teacher(taught)
        found: dict[str, Tensor] = {}
        if done is not None:
            for name, tensor in done.items():
                learnt.put(name, tensor)
                found[name] = tensor
        else:
            for role in (role for role in REPAIRABLE if role in self.roles):
                if role in ("up", "gate"):
                    self._repair_inner(learnt, role)
                else:
                    {"q": self._repair_q, "o": self._repair_o, "down": self._repair_down}[role](taught, learnt)
                name = self.target.family.tensor(site, role)
                # what lies above must see the layer as it will be saved
                found[name] = learnt.rounded(name, getattr(torch, self.target.spec(name).dtype))
                if not bool(found[name].isfinite().all()):
                    raise CheckpointError("the repaired tensor is not finite", where=name, next="repair less")
        for row, count in self._batches():
            self.learnt.write(row, student.run(self.learnt.read(row, count), row))
        self.taught, self.above = self.above, self.taught
        return found

    def _batches(self) -> Iterator[tuple[int, int]]:
        return self.taught.batches(self.settings.batch_tokens)

    @torch.inference_mode()
    def _read_teacher(self, taught: _Parts) -> None:
        for row, count in self._batches():
            for spool, stream_BTD in zip(
                (self.middle, self.above), taught.streams(self.taught.read(row, count), row), strict=True
            ):
                spool.write(row, stream_BTD)

    @torch.inference_mode()
    def _repair_o(self, taught: _Parts, learnt: _Parts) -> None:
        """o: the student's heads to what is missing of the teacher's stream after attention."""
        fit = _Ridge(learnt.o)
        for row, count in self._batches():
            hidden_BTD = self.learnt.read(row, count)
            heads_BTN = learnt.attend(hidden_BTD, row).heads_BTN
            missing_BTD, share = learnt.added["attention"].missing(
                learnt.o(heads_BTN), self.middle.read(row, count) - hidden_BTD
            )
            fit.add(heads_BTN * share, missing_BTD * share)
        fit.solve(self.settings.damping)

    @torch.inference_mode()
    def _repair_inner(self, learnt: _Parts, role: str) -> None:
        """up or gate: the student's gated MLP to what is missing of the teacher's stream after the layer."""
        batch = max(1, self.settings.batch_tokens // self.length)
        with InnerFit(learnt.mlp[role], learnt.mlp["down"], [self.length] * self.rows) as fit:
            for row, count in self._batches():
                middle_BTD, x_BTD, inner_BTF = learnt.through(self.learnt.read(row, count), row)
                wanted_BTD = self.above.read(row, count).to(middle_BTD) - middle_BTD
                missing_BTD, share = learnt.added["mlp"].missing(learnt.mlp["down"](inner_BTF), wanted_BTD)
                fit.add(row, x_BTD, learnt.slope(x_BTD, role) * share, missing_BTD * share)
            fit.solve(steps=self.settings.inner_steps, damping=self.settings.inner_damping, batch=batch)

    @torch.inference_mode()
    def _repair_down(self, taught: _Parts, learnt: _Parts) -> None:
        """down: the same, as a regression on what the MLP hands to it."""
        fit = _Ridge(learnt.mlp["down"])
        for row, count in self._batches():
            middle_BTD, _, inner_BTF = learnt.through(self.learnt.read(row, count), row)
            wanted_BTD = self.above.read(row, count).to(middle_BTD) - middle_BTD
            missing_BTD, share = learnt.added["mlp"].missing(learnt.mlp["down"](inner_BTF), wanted_BTD)
            fit.add(inner_BTF * share, missing_BTD * share)
        fit.solve(self.settings.damping)

    @torch.inference_mode()
    def _repair_q(self, taught: _Parts, learnt: _Parts) -> None:
        """q: the student's logits to the teacher's."""
        heads = taught.attention.num_attention_heads
        batch = max(1, LOGIT_BATCH // (heads * self.length**2))
        rows = max(1, min(self.rows, self.settings.logit_tokens // self.length))
        lengths = [self.length] * rows
        with LogitFit(taught.attention, learnt.attention, learnt.q, learnt.q_norm, lengths) as fit:
            for row in range(0, rows, batch):
                count = min(batch, rows - row)
                both = (
                    taught.attend(self.taught.read(row, count), row),
                    learnt.attend(self.learnt.read(row, count), row),
                )
                fit.add(row, *both, self.queries.get(learnt.site))
            fit.solve(steps=self.settings.steps, damping=self.settings.logit_damping, batch=batch)


class _Parts:
    """One layer of one model, and the modules in it that a repair looks at."""

    def __init__(self, layer: hf.Layer, checkpoint: Checkpoint, site: Site) -> None:
        family, self.site = checkpoint.family, site
        self.layer, self.attention = layer, checkpoint.shape.sites[site]
        self._module = layer.owner(family.module(site))
        self.q, self.o = (layer.owner(family.tensor(site, role)) for role in "qo")
        self.q_norm = layer.owner(family.tensor(site, "q_norm")) if self.attention.norms != "none" else None
        self.mlp: dict[str, Any] = {part: layer.module(path) for part, path in family.body.mlp.items()}
        after = {part: layer.module(path) for part, path in family.body.after.items()}
        self.added = {"attention": Residual(self._module, after.get("attention"))}
        if self.mlp:
            self.added["mlp"] = Residual(self.mlp["down"], after.get("mlp"))

    def attend(self, hidden_BTD: Tensor, row: int) -> hf.Attended:
        """What the attention does with these hidden states, of the rows from `row` on."""
        return hf.attend(self.layer, self._module, self.o, hidden_BTD, row)

    def streams(self, hidden_BTD: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and after the layer."""
        added: list[Tensor] = []
        handle = self.added["attention"].last.register_forward_hook(
            lambda module, args, result: added.append(result[0] if isinstance(result, tuple) else result)
        )
        try:
            above_BTD = self.layer.run(hidden_BTD, row)
        finally:
            handle.remove()
        return hidden_BTD.to(added[0]) + added[0], above_BTD

    def put(self, name: str, tensor: Tensor) -> None:
        """Set a weight of the layer."""
        weight: Any = self.layer.owner(name).weight
        weight.copy_(tensor)

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of the layer, rounded to the format in which it will be saved, here and in the layer."""
        weight: Any = self.layer.owner(name).weight
        saved: Tensor = weight.to(dtype)
        weight.copy_(saved)
        return saved.cpu()

    def through(self, hidden_BTD: Tensor, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after attention, the input of the MLP, and the input of `down`."""
        seen: dict[str, Tensor] = {}

        def look(part: str) -> Callable[..., None]:
            return lambda module, args: seen.update({part: args[0]})

        handles = [self.mlp[part].register_forward_pre_hook(look(part)) for part in ("up", "down")]
        try:
            above_BTD = self.layer.run(hidden_BTD, row)
        finally:
            for handle in handles:
                handle.remove()
        return above_BTD - self.added["mlp"].added(self.mlp["down"](seen["down"])), seen["up"], seen["down"]

    def slope(self, x_BTD: Tensor, role: str) -> Tensor:
        """What a row of up or gate is multiplied by on its way to `down`."""
        up_BTF = self.mlp["up"](x_BTD)
        if "gate" not in self.mlp:
            return slope(self.mlp["act"], up_BTF, torch.ones_like(up_BTF), "gate")
        return slope(self.mlp["act"], self.mlp["gate"](x_BTD), up_BTF, role)


class _Ridge:
    """The sums of one regression, and what it finds added to a linear module: a correction, and not the map anew."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        out, wide = self.linear.weight.shape
        self.gram_NN = torch.zeros(wide, wide, dtype=torch.float64, device=self.linear.weight.device)
        self.cross_NM = torch.zeros(wide, out, dtype=torch.float64, device=self.linear.weight.device)
        self.tokens = 0

    def add(self, z: Tensor, missing: Tensor) -> None:
        """Take inputs of the module and what its outputs lack."""
        z_TN, missing_TM = z.flatten(0, -2), missing.flatten(0, -2)
        self.gram_NN += z_TN.T @ z_TN  # products of one batch in the models' format, summed in float64
        self.cross_NM += z_TN.T @ missing_TM
        self.tokens += len(z_TN)

    def solve(self, damping: float) -> None:
        self.linear.weight += ridge(self.gram_NN / self.tokens, self.cross_NM / self.tokens, damping).T
