"""Headers of safetensors files: names, dtypes, shapes and places of tensors, checked before a tensor is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from kvfold.errors import CheckpointError
from kvfold.inputs import parse_json

FLOATS = ("bfloat16", "float16", "float32", "float64")  # what can be folded; eight-bit floats come with scales

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
ITEMSIZE = {
    dtype: 1 if code == "BOOL" else int(code.strip("BFIU").split("_")[0]) // 8 for code, dtype in _DTYPES.items()
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, the dtype in torch's words: `bfloat16`, `float32`, ..."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Does it hold floating numbers that are whole in themselves?"""
        return self.dtype in FLOATS

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * ITEMSIZE[self.dtype]


def read_header(file: Path, content: bytes) -> dict[str, tuple[TensorSpec, int, int]]:
    """The tensors that a safetensors header names, each with its first byte and the one after its last."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _header(file, "it is not UTF-8 text", got=f"byte {error.start}") from error
    header = parse_json(text, where=f"{file}: its safetensors header", unique=True)
    if not isinstance(header, dict):
        raise _header(file, "it is no mapping of names to tensors")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _header(file, "__metadata__ is no mapping of text to text", got=repr(metadata))
    entries = {name: _entry(file, name, entry) for name, entry in header.items() if name != "__metadata__"}
    reached = 0
    for name, (spec, begin, end) in sorted(entries.items(), key=lambda each: each[1][1:]):
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise _header(file, f"tensor {name} {problem}", got=f"byte {begin:,}", allowed=f"{reached:,}")
        if end - begin != spec.nbytes:
            raise CheckpointError(
                f"its header gives tensor {name} {end - begin} bytes, its shape needs {spec.nbytes}", where=file
            )
        reached = end
    return entries


def _entry(file: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """One tensor of a safetensors header."""
    check_name(file, name)
    if not isinstance(entry, dict):
        raise _header(file, f"tensor {name} is no mapping", got=repr(entry))
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in _DTYPES:
        raise _header(file, f"tensor {name} has a dtype that is not known", got=repr(code), allowed=", ".join(_DTYPES))
    if not _wholes(shape) or math.prod(shape) >= 1 << 60:
        raise _header(file, f"the shape of tensor {name} is not of whole numbers that can be", got=repr(shape))
    if not _wholes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _header(file, f"data_offsets of tensor {name} are not two whole numbers in order", got=repr(offsets))
    return TensorSpec(tuple(shape), _DTYPES[code]), offsets[0], offsets[1]


def _wholes(value: Any) -> TypeGuard[list[int]]:
    """Is it a list of whole numbers that a file can have?"""
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 60 for each in value)


def _header(file: Path, what: str, **more: Any) -> CheckpointError:
    return CheckpointError(f"its safetensors header cannot be read: {what}", where=file, **more)


def check_name(file: Path, name: Any) -> None:
    """Refuse what cannot be the name of a tensor: no text, half of a surrogate pair, or endless."""
    if not isinstance(name, str) or len(name) > 1000 or any("\ud800" <= each <= "\udfff" for each in name):
        raise CheckpointError("holds a tensor with an impossible name", where=file, got=repr(name))
