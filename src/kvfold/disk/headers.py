"""Headers of safetensors files: the names, dtypes, shapes and offsets of tensors, checked before a tensor is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from kvfold.errors import CheckpointError
from kvfold.inputs import parse_json

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("bfloat16", "float16", "float32", "float64")  # dtypes that can be folded; eight-bit floats have scales

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
    """Shape and dtype of a tensor; the dtype has torch's name, such as `bfloat16`."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The shape and dtype of a tensor in memory."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """True for floating-point numbers that need no separate scale."""
        return self.dtype in FLOATS

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * ITEMSIZE[self.dtype]


_Whole = Annotated[int, pydantic.Field(ge=0, lt=1 << 60)]


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    dtype: Annotated[str, pydantic.Field(pattern=f"^({'|'.join(_DTYPES)})$")]
    shape: list[_Whole]
    data_offsets: Annotated[list[_Whole], pydantic.Field(min_length=2, max_length=2)]


_METADATA = pydantic.TypeAdapter(dict[str, str], config=pydantic.ConfigDict(strict=True))
_TENSORS = pydantic.TypeAdapter(dict[str, _Entry], config=pydantic.ConfigDict(strict=True))


def read_header(file: Path, content: bytes) -> dict[str, tuple[TensorSpec, int, int]]:
    """The tensors of a safetensors header by name, each with its first byte and the byte after its last.

    Raises CheckpointError for a header that is damaged, and for tensors that overlap or leave holes.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _damaged(file, "it is not UTF-8 text", got=f"byte {error.start}") from error
    header = parse_json(text, where=f"{file}: its safetensors header", unique=True)
    try:
        if isinstance(header, dict):
            _METADATA.validate_python(header.pop("__metadata__", {}))
        found = _TENSORS.validate_python(header)
    except pydantic.ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(file, f"{place}: {first['msg']}", got=repr(first["input"])) from failure
    reached, entries = 0, {}
    for name, entry in sorted(found.items(), key=lambda each: each[1].data_offsets):
        check_name(file, name)
        spec, (begin, end) = TensorSpec(tuple(entry.shape), _DTYPES[entry.dtype]), entry.data_offsets
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise _damaged(file, f"tensor {name} {problem}", got=f"byte {begin:,}", allowed=f"{reached:,}")
        if end - begin != spec.nbytes:
            what = f"its header gives tensor {name} {end - begin} bytes, its shape needs {spec.nbytes}"
            raise CheckpointError(what, where=file)
        entries[name], reached = (spec, begin, end), end
    return entries


def _damaged(file: Path, what: str, **more: Any) -> CheckpointError:
    return CheckpointError(f"its safetensors header cannot be read: {what}", where=file, **more)


def check_name(file: Path, name: Any) -> None:
    """Refuse a tensor name that is not text, holds half of a surrogate pair, or is longer than 1,000 characters.

    Raises CheckpointError.
    """
    if not isinstance(name, str) or len(name) > 1000 or any("\ud800" <= each <= "\udfff" for each in name):
        raise CheckpointError("holds a tensor with an impossible name", where=file, got=repr(name))
