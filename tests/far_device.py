"""A device without hardware: its tensors are in memory, but refuse to meet those of the CPU, as an accelerator's do.

It is a backend of PyTorch in Python, for a process of its own: importing this file registers the device `far`. Inside
of `Far()`, an operation on tensors of both devices raises RuntimeError. Numbers are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.to.other, aten.to.device, aten.to.dtype_layout}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class _Module(backend_registration._DummyBackendModule):
    """What PyTorch asks `torch.far` for."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        """The CPU's state is restored by itself."""


class FarTensor(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> FarTensor:
        made: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="far:0"
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Far(TorchDispatchMode):
    """Operations that make tensors on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _raw(each: Any) -> Any:
    return each.raw if isinstance(each, FarTensor) else CPU if isinstance(each, torch.device) else each


def _check(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    far = [isinstance(each, FarTensor) for each in tensors if isinstance(each, FarTensor) or each.dim() > 0]
    if all(far) or not any(far) or func in COPIES:
        return
    given = [args[0], *args[2:3]]  # the indices may be the CPU's, as on CUDA
    if func in INDEXED and all(isinstance(each, FarTensor) or each.dim() == 0 for each in given):
        return
    raise RuntimeError(f"Expected all tensors to be on the same device: {func}")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func is aten._has_compatible_shallow_copy_type.default:
        return isinstance(args[0], FarTensor) == isinstance(args[1], FarTensor)
    flat, form = tree.tree_flatten((args, dict(kwargs)))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    _check(func, args, tensors)
    asked = next((each.type for each in flat if isinstance(each, torch.device)), None)
    raw_args, raw_kwargs = tree.tree_unflatten([_raw(each) for each in flat], form)
    raw_kwargs.pop("pin_memory", None)
    known = {id(each.raw): each for each in tensors if isinstance(each, FarTensor)}
    plain = {id(each) for each in tensors if not isinstance(each, FarTensor)}

    def placed(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        if asked == "cpu" or (asked is None and (not known or (func is aten.copy_.default and id(each) in plain))):
            return each.clone() if id(each) in known else each
        if id(each) in known and asked is None:
            return known[id(each)]
        return FarTensor(each.clone() if id(each) in plain else each)

    # tensors of this device are never inference tensors, of which no view can be taken outside of inference mode
    with torch.inference_mode(False), torch._C._AutoDispatchBelowAutograd():
        result = func(*raw_args, **raw_kwargs)
        return result if func is aten._local_scalar_dense.default else tree.tree_map(placed, result)


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **kwargs: Any) -> FarTensor:
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    _raw(target).copy_(_raw(source))
    return target


backend_registration._setup_privateuseone_for_python_backend("far", backend_module=_Module())
_library = torch.library.Library("aten", "IMPL")  # what PyTorch calls below Python's dispatch
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
