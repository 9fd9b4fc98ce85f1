"""Tensors on disk: read lazily from safetensors and `.bin` files, digested, and written header-first.

A tensor is read by mapping its own stretch of its own file, and the map goes when the tensor goes: nothing but what
is looked at is ever in memory. A writer knows all shapes beforehand, so it puts each shard's header down first and
every tensor at its place, in any order and from any thread.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvfold.disk.finite import check_finite
from kvfold.disk.headers import CODES, ITEMSIZE, TensorSpec, check_name, read_header
from kvfold.disk.output import fingerprint, read_json, write_json
from kvfold.errors import CheckpointError
from kvfold.inputs import load_json, open_regular

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes that are cast, digested and written at a time
HEADER_LIMIT = 100_000_000  # bytes, as safetensors' own reader has it
JOURNAL = ".shards.json"  # in an unfinished folder: the shards that are whole


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file; `read` maps it."""

    spec: TensorSpec
    file: Path
    read: Callable[[], Tensor]


# --- reading --------------------------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Are there weights, or an index of them, under the names that transformers looks for?"""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / (name + end)).exists() for name in names for end in ("", ".index.json"))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint's folder by name, safetensors before `.bin`; only headers are read.

    Raises CheckpointError for weights that are missing, damaged, renamed, or named outside the folder.
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
    """The tensors that an index names, each from the shard that it names."""
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
            raise CheckpointError(
                f"shard {file} is missing",
                where=index.parent,
                next=f"is it {spare[0]}, renamed?" if spare else "download it again",
            )
        there = reader(path)
        for name in (name for name, shard in where.items() if shard == file):
            if name not in there:
                raise CheckpointError(
                    f"tensor {name} is not in it, though {index.name} says so",
                    where=path,
                    next="was a shard renamed, or taken from another checkpoint?",
                )
            found[name] = there[name]
    return found


def lies_inside(folder: Path, file: str | Path) -> bool:
    """Does a file of a checkpoint's folder lie there, behind its links, or in the hub's cache that it links to?"""
    folder, path = folder.resolve(), (folder / file).resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache: snapshots/<revision>/file -> ../../blobs/<hash>
        homes.append(folder.parent.parent / "blobs")
    return any(path.is_relative_to(home) for home in homes)


def _inside(index: Path, file: str) -> Path:
    """The path of a shard, which must lie in the folder of its index."""
    try:
        (index.parent / file).is_file()
        inside = lies_inside(index.parent, file)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, half of a surrogate pair, a loop of links
        raise CheckpointError("the index names a file that cannot be", where=index, got=repr(file)) from error
    if not inside:
        raise CheckpointError(
            "the index names a file outside the checkpoint's directory",
            where=index,
            got=repr(file),
            next="do not trust this checkpoint; if the file is yours, copy it in",
        )
    return index.parent / file


def _safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header. Raises CheckpointError when the file is not what it says."""
    with os.fdopen(open_regular(file), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise CheckpointError("is a git-lfs pointer, not weights", where=file, next="run `git lfs pull`")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(
                "is truncated or no safetensors file: its header does not fit",
                where=file,
                got=f"{size:,} bytes",
                next="download it again",
            )
        content = opened.read(length)
    data, entries = 8 + length, read_header(file, content)
    expected = data + max((end for _, _, end in entries.values()), default=0)
    if size != expected:
        raise CheckpointError(
            "is truncated" if size < expected else "is longer than its header says",
            where=file,
            got=f"{size:,} bytes",
            allowed=f"{expected:,} bytes, by its header",
            next="download it again",
        )
    return {
        name: Stored(spec, file, lambda spec=spec, begin=begin: _mapped(file, data + begin, spec))  # type: ignore[misc]
        for name, (spec, begin, _) in entries.items()
    }


def _mapped(file: Path, begin: int, spec: TensorSpec) -> Tensor:
    """The tensor at this byte of a file, mapped privately: pages are read when they are looked at."""
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
    if begin % ITEMSIZE[spec.dtype]:  # a file whose header is not padded: torch wants whole elements
        return torch.frombuffer(bytearray(view[slack:]), dtype=dtype).view(spec.shape)
    return torch.frombuffer(view, dtype=dtype, count=spec.numel, offset=slack).view(spec.shape)


def _pickled(file: Path) -> dict[str, Stored]:
    """The tensors of a `.bin` file, mapped. Nothing but tensors is ever unpickled: no code of the file runs.

    A file from before the zip format (torch 1.6) cannot be mapped: it is in memory whole.
    """
    import torch

    with os.fdopen(open_regular(file), "rb") as opened:
        start = opened.read(8)
    if start == b"version ":
        raise CheckpointError("is a git-lfs pointer, not weights", where=file, next="run `git lfs pull`")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except Exception as error:  # torch raises half a dozen kinds for a damaged, hostile or old file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot be read as tensors alone: {lines[0]}",
            where=file,
            next="download it again, or convert it to safetensors where you trust it",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        inside = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            "is not a mapping of names to tensors",
            where=file,
            got=inside,
            next="save the state_dict of its model alone, as safetensors",
        )
    for name, tensor in content.items():
        _check_pickled(file, name, tensor)
    return {
        name: Stored(TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")), file, tensor.contiguous)
        for name, tensor in content.items()
    }


def _check_pickled(file: Path, name: Any, tensor: Tensor) -> None:
    """Refuse a tensor of a `.bin` file that is not plain numbers, or larger than the file that it should lie in."""
    import torch

    check_name(file, name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"tensor {name} is not of plain numbers", where=file, got=f"{dtype}, {tensor.layout}, {tensor.device}"
        )
    if tensor.numel() * ITEMSIZE[dtype] > file.stat().st_size:
        raise CheckpointError(f"tensor {name} is larger than its file", where=file, got=tuple(tensor.shape))


# --- digests --------------------------------------------------------------------------------------------------------


def chunks(tensor: Tensor, dtype: str, name: str | None, where: object = None) -> Iterator[memoryview]:
    """The bytes of a tensor as `dtype`, little-endian and in order, a few MB at a time.

    Where the tensor has a `name`, raises CheckpointError for NaN and infinity, SettingError for a number that `dtype`
    cannot hold.
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def digest(tensor: Tensor, name: str | None = None, where: object = None) -> str:
    """SHA-256 of the bytes of a tensor. Raises CheckpointError for NaN and infinity where a `name` is given for it."""
    state = hashlib.sha256()
    for part in chunks(tensor, _dtype(tensor), name, where):
        state.update(part)
    return state.hexdigest()


def tensors_hash(specs: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> str:
    """One hash of all tensors by name, dtype, shape and bytes, however they are spread over files."""
    return fingerprint([[name, specs[name].dtype, specs[name].shape, digests[name]] for name in sorted(specs)])


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """One file to be: where each tensor goes, and which are still to come."""

    file: str
    header: bytes
    begins: dict[str, int]
    size: int
    left: set[str]
    descriptor: int | None = None


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[_Shard]:
    """Split the tensors, in their order, into files of at most `shard_bytes`; a tensor is never split."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if parts[-1] and filled + spec.nbytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += spec.nbytes
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    shards = []
    for file, part in zip(names, parts, strict=True):
        # wide elements first: every tensor then begins at a multiple of its own element
        ordered = sorted(part, key=lambda name: -ITEMSIZE[specs[name].dtype])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in ordered:
            spec = specs[name]
            header[name] = {
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        begins = {name: data + header[name]["data_offsets"][0] for name in ordered}
        shards.append(_Shard(file, len(text).to_bytes(8, "little") + text, begins, data + offset, set(part)))
    return shards


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

    A single shard is `model.safetensors`; several get an index. With `resume`, shards that an earlier writer of the
    same specs finished in this folder are kept: their tensors are in `digests` from the start.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        *,
        shard_bytes: int = 5 * 10**9,
        resume: bool = False,
        origin: object = None,  # the checkpoint that the tensors come from, for errors
    ) -> None:
        self.origin = origin
        self.folder, self.specs = Path(folder), dict(specs)
        self.digests: dict[str, str] = {}
        self._shards = _plan(self.specs, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.begins}
        self._lock = threading.Lock()
        self._whole: list[str] = []
        if resume:
            self._recall()
        for shard in self._shards:
            if not shard.left and shard.file not in self._whole:  # a checkpoint of no tensors at all
                self._open(shard)
                self._finish(shard)

    def _recall(self) -> None:
        found = read_json(self.folder / JOURNAL)
        journal = found if isinstance(found, dict) else {}  # without it, shards are written again
        for shard in self._shards:
            path = self.folder / shard.file
            known = journal.get(shard.file)
            if (
                isinstance(known, dict)
                and all(isinstance(each, str) for each in known.values())
                and set(known) == shard.left
                and path.is_file()
                and path.stat().st_size == shard.size
            ):
                self.digests |= known
                self._whole.append(shard.file)
                shard.left.clear()

    def write(self, name: str, tensor: Tensor) -> str:
        """Cast a tensor to its declared dtype, put it in its place, and return the SHA-256 of its bytes.

        Raises CheckpointError for NaN and infinity, SettingError for a number that the dtype cannot hold, and
        ValueError when the tensor is not as declared, or is written twice: a mistake of the caller.
        """
        if name not in self.specs:
            raise ValueError(f"tensor {name} is not declared")
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, declared {spec.shape}")
        shard = self._shard_of[name]
        with self._lock:
            if name not in shard.left:
                raise ValueError(f"tensor {name} is written twice")
            descriptor = self._open(shard)
        written = _put(descriptor, shard.begins[name], tensor, spec.dtype, name, self.origin)
        with self._lock:
            self.digests[name] = written
            shard.left.discard(name)
            finished = not shard.left
        if finished:
            self._finish(shard)
        return self.digests[name]

    def _open(self, shard: _Shard) -> int:
        if shard.descriptor is None:
            shard.descriptor = os.open(self.folder / shard.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.pwrite(shard.descriptor, shard.header, 0)
            os.ftruncate(shard.descriptor, shard.size)
        return shard.descriptor

    def _finish(self, shard: _Shard) -> None:
        """Flush a whole shard to the disk, and only then say in the journal that it is whole."""
        assert shard.descriptor is not None
        os.fsync(shard.descriptor)
        with self._lock:
            os.close(shard.descriptor)
            shard.descriptor = None
            self._whole.append(shard.file)
            shards = {
                each.file: {name: self.digests[name] for name in each.begins}
                for each in self._shards
                if each.file in self._whole
            }
            write_json(self.folder / JOURNAL, shards)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put another tensor of the same shape in the place of one that was written."""
        spec, shard = self.specs[name], self._shard_of[name]
        if name in shard.left or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is not one that was written")
        descriptor = os.open(self.folder / shard.file, os.O_WRONLY)
        try:
            self.digests[name] = _put(descriptor, shard.begins[name], tensor, spec.dtype, name, self.origin)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def index(self) -> None:
        """Write the index, after which the folder can be read. Raises ValueError when a tensor was never written."""
        missing = sorted(self.specs.keys() - self.digests.keys())
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, the first is {missing[0]}")
        if len(self._shards) > 1:
            weight_map = {name: self._shard_of[name].file for name in sorted(self.specs)}
            total = sum(spec.nbytes for spec in self.specs.values())
            write_json(
                self.folder / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )

    def close(self) -> str:
        """Write the index and return the hash of the tensors. Raises ValueError when a tensor was never written."""
        self.index()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return tensors_hash(self.specs, self.digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the files; what was not finished is written again by the next writer."""
        for shard in self._shards:
            if shard.descriptor is not None:
                os.close(shard.descriptor)
                shard.descriptor = None
