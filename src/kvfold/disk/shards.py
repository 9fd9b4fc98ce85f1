"""Tensors on disk: read lazily from safetensors and `.bin` files, hashed, and written header first.

Reading a tensor maps its bytes of the file, and the map is closed with the tensor, so only the pages in use are in
memory. A writer knows all shapes in advance: it writes each shard's header first, then every tensor at its offset, in
any order and from any thread.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from kvfold.disk.finite import check_finite
from kvfold.disk.headers import CODES, ITEMSIZE, TensorSpec, check_name, read_header
from kvfold.disk.output import free_bytes, read_object, write_json
from kvfold.errors import CheckpointError, OutputError
from kvfold.inputs import lies_inside, load_json, open_regular

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes that are cast, hashed and written at a time
HEADER_LIMIT = 100_000_000  # bytes: the limit of safetensors' own reader
SLACK = 1 << 20  # bytes for config.json, kvfold.json and the index
JOURNAL = ".shards.json"  # in an unfinished folder: the shards that are complete


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `read` maps it."""

    spec: TensorSpec
    file: Path
    read: Callable[[], Tensor]


# --- reading --------------------------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """True if a folder holds weights, or their index, under the names that transformers looks for."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / (name + end)).exists() for name in names for end in ("", ".index.json"))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint's folder by name, from safetensors if there are any, else `.bin`.

    Only headers are read. Raises CheckpointError for weights that are missing, damaged, renamed or outside the folder.
    """
    for stem, suffix, reader in (("model", ".safetensors", _safetensors), ("pytorch_model", ".bin", _pickled)):
        single, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
        if single.exists():
            return reader(single)
        if index.exists():
            return _sharded(index, suffix, reader)
    loose = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    raise CheckpointError(
        "no weights",
        where=folder,
        got=", ".join(loose[:3]) or None,
        allowed="model.safetensors or pytorch_model.bin, or their shards with model.safetensors.index.json",
        next="the download may be incomplete" if loose else None,
    )


def _sharded(index: Path, suffix: str, reader: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    content = load_json(index, unique=True)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError("is not an index: no weight_map of tensor names to files", where=index)
    for name in where:
        check_name(index, name)
    found: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        path = _inside(index, file)
        if not path.is_file():
            spare = sorted(other.name for other in index.parent.glob(f"*{suffix}") if other.name not in where.values())
            remedy = f"is it {spare[0]}, renamed?" if spare else "download it again"
            raise CheckpointError(f"shard {file} is missing", where=index.parent, next=remedy)
        there = reader(path)
        for name in (name for name, shard in where.items() if shard == file):
            if name not in there:
                remedy = "was a shard renamed, or taken from another checkpoint?"
                raise CheckpointError(f"tensor {name} of {index.name} is not in it", where=path, next=remedy)
            found[name] = there[name]
    return found


def _inside(index: Path, file: str) -> Path:
    """The path of a shard. Raises CheckpointError if it is not in the folder of its index."""
    try:
        (index.parent / file).is_file()
        inside = lies_inside(index.parent, file)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, half of a surrogate pair, a loop of links
        raise CheckpointError("the index names an impossible file", where=index, got=repr(file)) from error
    if not inside:
        raise CheckpointError(
            "the index names a file outside the checkpoint's directory",
            where=index,
            got=repr(file),
            next="do not trust this checkpoint; if the file is yours, copy it in",
        )
    return index.parent / file


def _start(file: Path, opened: IO[bytes]) -> bytes:
    """The first 8 bytes of a file of weights."""
    start = opened.read(8)
    if start == b"version ":
        raise CheckpointError("is a git-lfs pointer, not weights", where=file, next="run `git lfs pull`")
    return start


def _safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header."""
    with os.fdopen(open_regular(file), "rb") as opened:
        size, start = os.fstat(opened.fileno()).st_size, _start(file, opened)
        got, remedy = f"{size:,} bytes", "download it again"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            what = "is truncated or not a safetensors file: its header does not fit"
            raise CheckpointError(what, where=file, got=got, next=remedy)
        content = opened.read(length)
    data, entries = 8 + length, read_header(file, content)
    expected = data + max((end for _, _, end in entries.values()), default=0)
    if size != expected:
        what = "is truncated" if size < expected else "is longer than its header says"
        raise CheckpointError(what, where=file, got=got, allowed=f"{expected:,} bytes, by its header", next=remedy)
    return {
        name: Stored(spec, file, lambda spec=spec, begin=begin: _mapped(file, data + begin, spec))  # type: ignore[misc]
        for name, (spec, begin, _) in entries.items()
    }


def _mapped(file: Path, begin: int, spec: TensorSpec) -> Tensor:
    """The tensor at a byte of a file, mapped privately: a page is read when it is accessed."""
    import torch

    dtype = getattr(torch, spec.dtype)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    slack = begin % mmap.ALLOCATIONGRANULARITY
    descriptor = os.open(file, os.O_RDONLY)  # not `open`: Ctrl-C inside it leaves a file object that complains
    try:
        view = mmap.mmap(descriptor, slack + spec.nbytes, access=mmap.ACCESS_COPY, offset=begin - slack)
    finally:
        os.close(descriptor)
    if begin % ITEMSIZE[spec.dtype]:  # the header is not padded, and torch needs aligned elements
        return torch.frombuffer(bytearray(view[slack:]), dtype=dtype).view(spec.shape)
    return torch.frombuffer(view, dtype=dtype, count=spec.numel, offset=slack).view(spec.shape)


def _pickled(file: Path) -> dict[str, Stored]:
    """The tensors of a `.bin` file, mapped. Only tensors are unpickled: no code of the file runs.

    A file older than the zip format of torch 1.6 cannot be mapped and is read into memory as a whole.
    """
    import torch

    with os.fdopen(open_regular(file), "rb") as opened:
        start = _start(file, opened)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except Exception as error:  # torch raises many types for a damaged, hostile or old file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "download it again, or convert it to safetensors where you trust it"
        raise CheckpointError(f"cannot be loaded as tensors alone: {lines[0]}", where=file, next=remedy) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        inside = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        remedy = "save the state_dict of its model alone, as safetensors"
        raise CheckpointError("is not a mapping of names to tensors", where=file, got=inside, next=remedy)
    stored = {}
    for name, tensor in content.items():
        check_name(file, name)
        spec = TensorSpec.of(tensor)
        if spec.dtype not in ITEMSIZE or tensor.layout != torch.strided or tensor.device.type != "cpu":
            got = f"{spec.dtype}, {tensor.layout}, {tensor.device}"
            raise CheckpointError(f"tensor {name} does not hold plain numbers", where=file, got=got)
        if spec.nbytes > file.stat().st_size:
            raise CheckpointError(f"tensor {name} is larger than its file", where=file, got=spec.shape)
        stored[name] = Stored(spec, file, tensor.contiguous)
    return stored


# --- digests --------------------------------------------------------------------------------------------------------


def chunks(tensor: Tensor, dtype: str, name: str | None, where: object = None) -> Iterator[memoryview]:
    """The bytes of a tensor as `dtype`, little-endian and in order, a few MB at a time.

    If a `name` is given, raises CheckpointError for NaN and infinity, and SettingError for a number that `dtype` cannot
    hold.
    """
    import torch

    target = getattr(torch, dtype)
    flat = tensor.detach().reshape(-1)
    step = CHUNK // ITEMSIZE[dtype]
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        if name is not None:
            check_finite(part, dtype, name, where)
        part = part.to("cpu", target).contiguous()
        yield memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest(tensor: Tensor, name: str | None = None, where: object = None) -> str:
    """SHA-256 of the bytes of a tensor. Raises CheckpointError for NaN and infinity if its `name` is given."""
    state = hashlib.sha256()
    for part in chunks(tensor, TensorSpec.of(tensor).dtype, name, where):
        state.update(part)
    return state.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """One file to write: the offset of each tensor, and the tensors that are not written yet."""

    file: str
    header: bytes
    begins: dict[str, int]
    size: int
    left: set[str] = field(default_factory=set)
    descriptor: int | None = None

    @classmethod
    def of(cls, file: str, specs: Mapping[str, TensorSpec], spelled: Mapping[str, str]) -> _Shard:
        """Lay the tensors out, wide elements first: every tensor then begins at a multiple of its element size."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, begins = 0, {}
        for name, spec in sorted(specs.items(), key=lambda item: -ITEMSIZE[item[1].dtype]):
            begins[name], end = offset, offset + spec.nbytes
            placed = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            header[spelled.get(name, name)] = placed
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        begins = {name: data + begin for name, begin in begins.items()}
        return cls(file, len(text).to_bytes(8, "little") + text, begins, data + offset, set(specs))

    def open(self, folder: Path) -> int:
        """The descriptor of the file, which is created with its header and its full size."""
        if self.descriptor is None:
            self.descriptor = os.open(folder / self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.pwrite(self.descriptor, self.header, 0)
            os.ftruncate(self.descriptor, self.size)
        return self.descriptor

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int, spelled: Mapping[str, str]) -> list[_Shard]:
    """Split the tensors, in their order, into files of at most `shard_bytes`; a tensor is never split."""
    parts: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if parts[-1] and filled + spec.nbytes > shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.nbytes
    if len(parts) == 1:
        return [_Shard.of("model.safetensors", parts[0], spelled)]
    name = f"model-{{:05d}}-of-{len(parts):05d}.safetensors"
    return [_Shard.of(name.format(number), part, spelled) for number, part in enumerate(parts, 1)]


def _put(descriptor: int, offset: int, tensor: Tensor, dtype: str, name: str, origin: object = None) -> str:
    """Write a tensor at a byte of an open file, and return the SHA-256 of its bytes."""
    state = hashlib.sha256()
    for part in chunks(tensor, dtype, name, origin):
        state.update(part)
        while part:
            done = os.pwrite(descriptor, part, offset)
            offset, part = offset + done, part[done:]
    return state.hexdigest()


class Writer:
    """Writes the tensors of a checkpoint into a folder, in any order and from any thread.

    A single shard is `model.safetensors`; several shards have an index. With `resume`, shards of the same specs that an
    earlier writer completed in this folder are kept, and `digests` starts with their tensors. `origin` is the
    checkpoint that the tensors come from, for error messages. `spelled` are names that the files have for tensors.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        *,
        shard_bytes: int = 5 * 10**9,
        resume: bool = False,
        origin: object = None,
        spelled: Mapping[str, str] = {},
    ) -> None:
        self.folder, self.specs, self.origin, self._spelled = Path(folder), dict(specs), origin, spelled
        self.digests: dict[str, str] = {}
        self._shards = _plan(self.specs, shard_bytes, spelled)
        self._shard_of = {name: shard for shard in self._shards for name in shard.begins}
        self._lock = threading.Lock()
        self._whole: list[str] = []
        if resume:
            self._recall()
        for shard in self._shards:
            if not shard.left and shard.file not in self._whole:  # a checkpoint without tensors
                shard.open(self.folder)
                self._finish(shard)

    def _recall(self) -> None:
        """Keep the complete shards of an earlier writer; a shard that the journal does not list is written again."""
        journal = read_object(self.folder / JOURNAL)
        for shard in self._shards:
            path, known = self.folder / shard.file, journal.get(shard.file)
            if not isinstance(known, dict) or known.keys() != shard.left:
                continue
            written = path.is_file() and path.stat().st_size == shard.size
            if written and all(isinstance(each, str) for each in known.values()):
                self.digests |= known
                self._whole.append(shard.file)
                shard.left.clear()

    def check_space(self, where: Path) -> None:
        """Raise OutputError if the disk cannot hold what is left to write; `where` is the output's path."""
        needed = SLACK + sum(spec.nbytes for name, spec in self.specs.items() if name not in self.digests)
        free = free_bytes(self.folder)
        if free < needed:
            raise OutputError(
                "not enough space on the disk",
                where=where,
                got=f"{free / 1e9:.2f} GB free",
                allowed=f"{needed / 1e9:.2f} GB or more",
                next="free some space, or choose another path",
            )

    def write(self, name: str, tensor: Tensor) -> str:
        """Cast a tensor to its declared dtype, write it, and return the SHA-256 of its bytes.

        Raises CheckpointError for NaN and infinity, SettingError for a number that the dtype cannot hold, and
        ValueError if the tensor differs from its declaration or is written twice.
        """
        if name not in self.specs:
            raise ValueError(f"tensor {name} is not declared")
        spec, shard = self.specs[name], self._shard_of[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, declared {spec.shape}")
        with self._lock:
            if name not in shard.left:
                raise ValueError(f"tensor {name} is written twice")
            descriptor = shard.open(self.folder)
        written = _put(descriptor, shard.begins[name], tensor, spec.dtype, name, self.origin)
        with self._lock:
            self.digests[name] = written
            shard.left.discard(name)
            finished = not shard.left
        if finished:
            self._finish(shard)
        return written

    def _finish(self, shard: _Shard) -> None:
        """Flush a complete shard to the disk before the journal lists it."""
        assert shard.descriptor is not None
        os.fsync(shard.descriptor)
        with self._lock:
            shard.close()
            self._whole.append(shard.file)
            whole = [each for each in self._shards if each.file in self._whole]
            journal = {each.file: {name: self.digests[name] for name in each.begins} for each in whole}
            write_json(self.folder / JOURNAL, journal)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Overwrite a tensor that was written with another of the same shape."""
        spec, shard = self.specs[name], self._shard_of[name]
        if name in shard.left or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is not one that was written")
        with open(self.folder / shard.file, "r+b", buffering=0) as file:
            self.digests[name] = _put(file.fileno(), shard.begins[name], tensor, spec.dtype, name, self.origin)
            os.fsync(file.fileno())

    def index(self) -> None:
        """Write the index, after which the folder can be read. Raises ValueError if a tensor was never written."""
        missing = sorted(self.specs.keys() - self.digests.keys())
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, the first is {missing[0]}")
        if len(self._shards) > 1:
            spelled = self._spelled
            weight_map = {spelled.get(name, name): self._shard_of[name].file for name in sorted(self.specs)}
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)

    def close(self) -> None:
        """Write the index. Raises ValueError if a tensor was never written."""
        self.index()
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files; the next writer writes incomplete shards again."""
        for shard in self._shards:
            shard.close()
