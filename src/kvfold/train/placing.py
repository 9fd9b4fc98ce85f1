"""Student and teacher in memory: frozen weights once, in bf16 where products are bf16, and sharded over the ranks.

Models are built on the meta device, sharded with FSDP2 (`fully_shard`), and then read from their checkpoints, so that
no rank ever holds more than its rows. Of a block, parameters are gathered while it computes. Masters, gradients and
moments are fp32 and stay sharded; with bf16 products, parameters are gathered in bf16 and gradients summed in fp32.
The residual stream is fp32, as under autocast in one process.

Offloading is that of PyTorch and transformers: `CPUOffloadPolicy`, under which a process without other ranks shards
over itself, and `save_on_cpu` around checkpointed blocks. On a CPU both leave everything where it is. Neither was run
on a GPU here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from kvfold import hf, ranks
from kvfold.contracts.family import Family
from kvfold.contracts.site import Shape
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.machine import best_device, device_memory
from kvfold.predict.training_memory import ACCUMULATED, ACTIVATIONS, PARAMETERS
from kvfold.train.settings import TrainSettings

T = TypeVar("T")

KEPT = (  # products, whose outputs selective checkpointing keeps; everything else is computed again
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class Root(nn.Module):
    """Student and teacher under one root, whose forward runs a function that may call both: what FSDP2 shards."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, function: Callable[[], T]) -> T:
        """The result of the function."""
        return function()

    def accumulate(self, last: bool) -> None:
        """Before each pass of a step: gradients are summed over the ranks in the last, or in all if they are large."""
        if isinstance(self, FSDPModule):
            trained = sum(each.numel() for each in self.parameters() if each.requires_grad)
            small = 4 * trained < device_memory(best_device()) / ACCUMULATED
            self.set_requires_gradient_sync(last or not small)


def prepare(model: nn.Module, settings: TrainSettings, blocks: Sequence[nn.Module] = ()) -> None:
    """Set a model to training, with the dropout, the checkpointing and the compilation that the settings ask for."""
    model.train()
    if settings.dropout is not None:
        for module in model.modules():
            # attention probabilities have no module of their own
            for name in ("p",) if isinstance(module, nn.Dropout) else ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, settings.dropout)
    if settings.checkpointing != "none":
        options: dict[str, Any] = {"use_reentrant": False}
        if settings.checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT))
        whole: Any = model
        # pinned memory needs an accelerator
        offload = settings.offload in ACTIVATIONS and best_device() != "cpu"
        whole.activation_checkpointing_enable(options, offload=offload)
    if settings.compile:
        for block in blocks:
            block.compile()


@contextmanager
def compile_errors(compiled: bool) -> Iterator[None]:
    """Raise SettingError where torch.compile cannot compile a block, which its first pass shows."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise SettingError(
            f"torch.compile failed: {reason}", where="compile", next="train without --compile"
        ) from error


def place(
    source: Checkpoint,
    guide: Checkpoint | None,
    settings: TrainSettings,
    *,
    adapt: Callable[[nn.Module], None],
    trained: Callable[[nn.Module], Iterable[nn.Parameter]],
    equal: Collection[str],
    fixed: bool,
    matched: Collection[str] = (),
) -> Root:
    """Student and teacher on this rank, read from their checkpoints.

    `adapt` adds factors to the student, and `trained` are the parameters that some stage trains. `equal` names tensors
    that both checkpoints hold; modules of them that stay frozen are in memory once. With `fixed`, no stage changes
    what it does not train: frozen weights may then be rounded to the format of the products. `matched` are the paths of
    attentions whose outputs enter a loss: they are sharded by themselves, as FSDP2 gathers for the gradient of a
    sharded module's output.
    """
    device = best_device()
    student = hf.outline(source, device=device)
    adapt(student)
    blocks = blocks_of(student, source.family, source.shape)
    prepare(student, settings, blocks)
    student.requires_grad_(False)
    for parameter in trained(student):
        parameter.requires_grad_(True)
    teacher = None if guide is None else hf.outline(guide, device=device).requires_grad_(False)
    root, both = Root(student, teacher), list[nn.Module]()
    for model in (student, teacher):
        if model is not None and fixed and settings.precision == "bf16":
            _narrow(model)
    if teacher is not None and guide is not None:
        if fixed:
            both = _share(student, teacher, lambda name, form: source.forms(name, form).keys() <= set(equal))
        blocks += blocks_of(teacher, guide.family, guide.shape)
    shard(root, blocks, settings, both, [student.get_submodule(path) for path in matched])
    held = "cpu" if settings.offload in PARAMETERS else device
    hf.fill(student, source, device=device, held=held)
    if teacher is not None and guide is not None:
        hf.fill(teacher, guide, device=device, held=held)
    return root


def place_fresh(model: nn.Module, blocks: Sequence[nn.Module], settings: TrainSettings) -> Root:
    """A model with random weights on this rank. Every rank holds the whole for a moment: one seed decides all."""
    prepare(model, settings, blocks)
    root = Root(model if settings.offload in PARAMETERS else model.to(best_device()))
    shard(root, blocks, settings)
    return root


def blocks_of(model: nn.Module, family: Family, shape: Shape) -> list[nn.Module]:
    """The blocks of a model: what repeats, with its attention."""
    paths = [re.match(r".*?\.\d+(?=\.)", family.module(site)) for site in shape.sites]
    return [model.get_submodule(path) for path in dict.fromkeys(path[0] for path in paths if path)]


def _narrow(model: nn.Module) -> None:
    """Hold the frozen weights of linear maps in bf16: autocast rounds them in every product."""
    uses = Counter(map(id, (each for _, each in model.named_parameters(remove_duplicate=False))))
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and uses[id(module.weight)] == 1:
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


def _share(student: nn.Module, teacher: nn.Module, equal: Callable[[str, tuple[int, ...]], bool]) -> list[nn.Module]:
    """Put the student's frozen modules with equal weights into the teacher, and return them.

    Only modules that hold a matrix and have no parts; vectors are small.
    """
    ours, theirs = _names(student), _names(teacher)
    bases = {hf.unadapted(f"{path}.").rstrip("."): module for path, module in student.named_modules()}
    found = []
    for path, module in list(teacher.named_modules()):
        twin = bases.get(path)
        held = dict(module.named_parameters(recurse=False))
        if twin is None or type(twin) is not type(module) or _plain(twin) != _plain(module):
            continue
        own = dict(twin.named_parameters(recurse=False))
        matrices = any(each.ndim > 1 for each in held.values()) and not list(module.children())
        if not matrices or any(each.requires_grad for each in own.values()):
            continue
        if all(
            ours[own[name]] == theirs[each] and any(equal(alias, tuple(each.shape)) for alias in theirs[each])
            for name, each in held.items()
        ):
            teacher.set_submodule(path, twin)
            found.append(twin)
    return found


def _names(model: nn.Module) -> dict[nn.Parameter, set[str]]:
    """The names of each parameter, several of a tied one."""
    found: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, set()).add(hf.unadapted(name))
    return found


def _plain(module: nn.Module) -> dict[str, Any]:
    """The settings of a module, such as the epsilon of a norm."""
    kinds = (int, float, str, tuple, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name != "training"}


# --- sharding ---------------------------------------------------------------------------------------------------------


def mesh_of(settings: TrainSettings) -> DeviceMesh:
    """The ranks as a mesh: one row of them, or `replicas` rows that each hold a whole model."""
    world, replicas = ranks.current().world, settings.replicas
    if replicas == 1:
        return init_device_mesh(best_device(), (world,))
    return init_device_mesh(best_device(), (replicas, world // replicas), mesh_dim_names=("replicas", "shard"))


def shard(
    root: Root,
    blocks: Sequence[nn.Module],
    settings: TrainSettings,
    both: Sequence[nn.Module] = (),
    alone: Sequence[nn.Module] = (),
) -> None:
    """Shard a root over the ranks: of each of `blocks` what is in `both` models, what stands `alone`, and the rest."""
    if ranks.current().world == 1 and settings.offload not in PARAMETERS:
        return
    mesh, narrow = mesh_of(settings), settings.precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if narrow else None,
        reduce_dtype=torch.float32 if narrow else None,
        cast_forward_inputs=False,  # autocast does it
    )
    offload = CPUOffloadPolicy(pin_memory=best_device() != "cpu") if settings.offload in PARAMETERS else OffloadPolicy()
    shared, single, done = set(map(id, both)), set(map(id, alone)), set[int]()
    for block in blocks:
        common = [module for module in block.modules() if id(module) in shared - done]
        done |= set(map(id, common))
        if common:
            fully_shard(common if len(common) > 1 else common[0], mesh=mesh, mp_policy=policy, offload_policy=offload)
        for module in (*(each for each in block.modules() if id(each) in single), block):
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(root, mesh=mesh, offload_policy=offload)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
