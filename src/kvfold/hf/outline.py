"""Models on the meta device, whose parameters are then read from a checkpoint: of a sharded one only a rank's rows."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, UnsupportedModel
from kvfold.hf.attention import NAME
from kvfold.hf.loading import build, check_tensors
from kvfold.hf.lora import unadapted


def outline(source: Checkpoint, *, device: str = "cpu", attention: str = NAME) -> nn.Module:
    """The model of a checkpoint with its parameters on the meta device, in fp32, and its buffers on `device`.

    Raises CheckpointError if the checkpoint's tensors are not exactly those of its architecture, and UnsupportedModel
    for buffers that cannot be computed.
    """
    with torch.device("meta"):
        model: Any = build(source.config, seed=0, attention=attention)
    model.eval()
    there = set(source.names())
    owners: dict[str, Any] = {"": model}
    for path, module in model.named_modules():
        # parts with a vision tower or an encoder of their own know their own buffers
        owner = owners[path] = module if hasattr(module, "_init_weights") else owners[path.rpartition(".")[0]]
        for name, tensor in module.named_buffers(recurse=False):
            if f"{path}.{name}".lstrip(".") in there:
                read = source.read(f"{path}.{name}".lstrip("."))
                module._buffers[name] = read.to(device, tensor.dtype, copy=True)
        if hasattr(module, "create_weight") and f"{path}.weight" not in there:  # constants, such as sinusoids
            module.weight = nn.Parameter(torch.empty_like(module.weight, device=device), requires_grad=False)
            owner._init_weights(module)
        _compute_buffers(owner, module, device, source)
    _verify(model, source)
    assert isinstance(model, nn.Module)
    return model


def _compute_buffers(owner: Any, module: nn.Module, device: str | torch.device, source: Checkpoint) -> None:
    """Compute the buffers of a module that are on the meta device, as transformers does after loading.

    Its parameters must be on the meta device too, or have none. Raises UnsupportedModel if one cannot be computed.
    """
    missing = {name: tensor for name, tensor in module.named_buffers(recurse=False) if tensor.is_meta}
    if not missing:
        return
    for name, tensor in missing.items():
        made = torch.empty_like(tensor, device=device)
        # a buffer that is not computed is then detected
        module._buffers[name] = made.fill_(torch.nan) if made.is_floating_point() else made
    owner._init_weights(module)
    if not all(bool(tensor.isfinite().all()) for tensor in module.buffers(recurse=False)):
        raise UnsupportedModel(
            f"buffers of {type(module).__name__} cannot be computed from config.json", where=source.path
        )


def fill(model: Any, source: Checkpoint, *, device: str = "cpu", held: str | None = None) -> None:
    """Read the parameters that are on the meta device, each in its own dtype; other tensors move to `device`.

    `held` is the device of parameters, if it is another. Of a sharded parameter only the rows of this rank are read.
    Tied parameters stay tied.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(parameter, []).append(name)
    state: dict[str, Tensor] = {}
    for parameter, known in names.items():
        stored = [name for name in map(unadapted, known) if _is_stored(source, name, parameter)]
        if not stored:
            raise CheckpointError(f"has no tensor {known[0]}", where=source.path)
        state |= dict.fromkeys(known, _read(source, stored[0], parameter, held or device))
    model.load_state_dict(state, strict=False, assign=True)
    for tensors, place in ((model.parameters(), held or device), (model.buffers(), device)):
        for tensor in tensors:
            if tensor.device.type != torch.device(place).type:
                tensor.data = tensor.data.to(place)


def _is_stored(source: Checkpoint, name: str, parameter: Tensor) -> bool:
    """Whether a checkpoint holds a parameter under a name, whole or in parts."""
    return source.forms(name, tuple(parameter.shape)).keys() <= set(source.names())


def _read(source: Checkpoint, name: str, parameter: nn.Parameter, device: str) -> nn.Parameter:
    """The parameter of this name, or the rows of this rank."""
    whole = source.parameter(name, parameter.shape)
    if tuple(whole.shape) != tuple(parameter.shape):
        raise CheckpointError(
            "mismatched tensors", where=source.path, got=f"{name} {tuple(whole.shape)}", allowed=tuple(parameter.shape)
        )
    if not isinstance(parameter, DTensor):
        return nn.Parameter(whole.to(device, parameter.dtype, copy=True), requires_grad=parameter.requires_grad)
    mesh, placements = parameter.device_mesh, parameter.placements
    local, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    own = whole[offset[0] : offset[0] + local[0]] if local[0] else whole[:0]
    made = DTensor.from_local(
        own.to(device, parameter.dtype, copy=True),
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _verify(model: Any, source: Checkpoint) -> None:
    """Compare names and shapes of the weights with the architecture's, from headers alone."""
    wanted: dict[str, tuple[int, ...]] = {}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta and name not in tied:
            wanted |= source.forms(name, tuple(tensor.shape))
    there = {name: tuple(source.spec(name).shape) for name in source.names()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    known = {*tied, *model.state_dict(), *source.buffers}
    aliased = {source.stored_name(name) for name in tied}  # a checkpoint may hold the other name of a tied parameter
    check_tensors(
        source.path,
        missing={name for name in wanted.keys() - there.keys() if not aliased & there.keys()},
        unexpected={
            name
            for name in there.keys() - wanted.keys() - known
            if not any(re.search(pattern, name) for pattern in ignored) and not name.endswith("rotary_emb.inv_freq")
        },
        mismatched={name for name in wanted.keys() & there.keys() if wanted[name] != there[name]},
    )
