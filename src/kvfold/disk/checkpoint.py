"""Checkpoints: opened lazily by tensor name, hashed by content, and saved.

A checkpoint is a directory that a source names (`kvfold.disk.source`). Its content hash covers `config.json` and every
tensor, independent of shards and file format. `kvfold.json` holds its lineage: the root teacher, and each step since.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.contracts.config import check_generation
from kvfold.contracts.family import Family, without_code
from kvfold.contracts.site import WHOLE, Shape, Site, SiteTensors
from kvfold.disk import sidecar
from kvfold.disk.foreign import check_folder, check_names
from kvfold.disk.headers import FLOATS, TensorSpec
from kvfold.disk.manifest import FORMAT, read_lineage, rooted
from kvfold.disk.output import MANIFEST, disk_errors, fingerprint, write_json
from kvfold.disk.shards import Stored, Writer, digest, has_weights, stored_tensors
from kvfold.disk.source import locate, read_config, remembered
from kvfold.errors import CheckpointError
from kvfold.families import source_family
from kvfold.progress import SILENT, Progress, task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "Checkpoint", "TensorSpec", "Writer", "content_hash", "natural", "save_model", "save_tensors"]

TIED = "lm_head.weight"  # left out of names and hash if the config ties it and it equals the embedding
ROWS = 4096  # rows of an embedding that are compared at a time

_BOOKKEEPING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")  # fields that do not affect the output


class Checkpoint:
    """A checkpoint: config, family, shape, lineage and headers are read and checked; tensors are read on demand."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.config = path, name, read_config(path)
        self.family: Family = source_family(self.config, where=path / "config.json")
        self.shape: Shape = self.family.shape(self.config)
        if not has_weights(path):
            check_folder(path)
        found, self.spelled = self._named(self._prefixed(stored_tensors(path)))
        dropped = self.family.dropped(self.config)
        self.buffers = [name for name in found if self.family.buffers and re.search(self.family.buffers, name)]
        self._stored = {
            name: each for name, each in found.items() if not name.startswith(dropped) and name not in self.buffers
        }
        check_names(path, list(self._stored), self.family, self.shape)
        self.digests: dict[str, str] = {}  # SHA-256 of the bytes of each tensor hashed so far
        self._flaws: dict[str, CheckpointError] = {}  # hashed tensors that hold NaN or infinity
        self._check_tie()
        if self._tied_twice():
            del self._stored[TIED]
        self.lineage: dict[str, Any] | None = read_lineage(path)
        self.shape = rooted(self.shape, self.lineage)
        check_generation(path, self.shape.vocab_size)
        self._verify()

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a source: a local directory, a hub id, `kvfold:demo` or `kvfold:smollm2`.

        Raises CheckpointError if files are missing, damaged or contradict config.json, and UnsupportedModel if the
        architecture is unknown or the weights are quantised.
        """
        path = locate(source)
        return cls(path, path.resolve().name if Path(source).is_dir() else str(source))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it by its path: the process that unpickles it opens the same files."""
        return Checkpoint, (self.path, self.name)

    def _named(self, stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, str]]:
        """The tensors under the model's names, and the names in the files of those that have another there."""
        found: dict[str, Stored] = {}
        spelled: dict[str, str] = {}
        for there, each in stored.items():
            name = self.family.canonical(there)
            if name in found:
                raise CheckpointError(f"tensor {name} is stored under two names", where=self.path, got=there)
            found[name] = each
            if name != there:
                spelled[name] = there
        return found, spelled

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._stored

    def names(self) -> list[str]:
        """Names of the tensors; layer 2 comes before layer 10."""
        return sorted(self._stored, key=natural)

    def gone(self, student: Shape) -> set[str]:
        """Names of the tensors of attentions that a student of this shape lacks, and of the norms of their branches."""
        removed = [site for site in self.shape.sites if site not in student.sites]
        branches = tuple(f"{path}." for site in removed for path in self.family.branch(site))
        return {name for name in self.names() if name.startswith(branches)}

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint that is stored: this one, unless it is a view of another."""
        return self

    def _prefixed(self, found: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """The tensors under the names of the whole model, also those of a file that was saved without its head."""
        prefix, heads = self.family.prefix, ("lm_head.",)
        if not prefix or any(name.startswith(prefix) for name in found):
            return found
        return {name if name.startswith(heads) else prefix + name: each for name, each in found.items()}

    def stored_name(self, name: str) -> str:
        """The name of a tensor in the files: its own, or that of the model's parameter."""
        alike = (each for each in self._stored if self.family.on_disk(each) == self.family.on_disk(name))
        return name if name in self._stored else next(alike, name)

    def parameter(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter of the model, joined where the files hold it in parts. Raises CheckpointError as `read` does."""
        stacked = self.family.stacked(name)
        if stacked is None or name in self._stored:
            return self.read(self.stored_name(name))
        return stacked.whole(self.read, shape[0])

    def as_stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that hold these parameters of the model, under the names of the files."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            stacked = None if name in self._stored else self.family.stacked(name)
            found |= {self.stored_name(name): tensor} if stacked is None else stacked.apart(tensor)
        return found

    def forms(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that hold a parameter of the model of this shape."""
        stacked = None if name in self._stored else self.family.stacked(name)
        return {self.stored_name(name): shape} if stacked is None else stacked.forms(shape)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor. Raises CheckpointError if there is no tensor of that name."""
        return self._entry(name).spec

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped from its file: pages are read when they are accessed, and freed with the tensor."""
        return self._entry(name).read()

    def roles(self, site: Site) -> SiteTensors:
        """The shape and the tensors of a site by role; roles that share a tensor are views of it."""
        attention, found = self.shape.sites[site], {}
        for name, roles in self.family.stored(site, attention).items():
            tensor = self.read(name)
            for role in roles:
                packed = self.family.packed(role)
                found[role] = tensor if packed is None else packed.part(tensor, role, attention)
        return SiteTensors(attention, found)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({stored.file for stored in self._stored.values()})

    @property
    def stamp(self) -> str:
        """Identifies the checkpoint by its config and the place, size and date of its files: no tensor is read."""
        files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return fingerprint([self.config, files])

    def hash(self, progress: Progress = SILENT) -> str:
        """Content hash of config and tensors, independent of shards and file format. Each tensor is read at most once.

        Raises CheckpointError if the lineage names another hash.
        """
        missing = [name for name in self.names() if name not in self.digests]
        progress = progress if missing else SILENT
        size = sum(self.spec(name).nbytes for name in missing)
        with task(progress, "hashing", size, "bytes"), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for name, found in zip(missing, pool.map(self._digest, missing), strict=True):
                self.digests[name] = found
                progress.advance(self.spec(name).nbytes)
        specs = {name: self.spec(name) for name in self.names()}
        hashed = content_hash(self.config, specs, self.digests)
        if self.lineage and self.lineage.get("hash") != hashed:
            raise CheckpointError(
                f"the weights or config.json have changed since {MANIFEST} was written",
                where=self.path,
                next=f"restore them, or delete {MANIFEST} to make this a root teacher",
            )
        return hashed

    def require_finite(self, progress: Progress = SILENT) -> None:
        """Raise CheckpointError for weights that are NaN or infinite; they are checked while they are hashed."""
        self.hash(progress)
        if self._flaws:
            raise self._flaws[min(self._flaws, key=natural)]

    def _digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes; NaN and infinity are recorded in `_flaws`."""
        try:
            return digest(self.read(name), name, self._entry(name).file)
        except CheckpointError as flaw:
            self._flaws[name] = flaw
            return digest(self.read(name))

    def root_hash(self) -> str:
        """Content hash of the root teacher; a checkpoint without lineage is its own."""
        return str(self.lineage["root"]["hash"]) if self.lineage else self.hash()

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """Everything that affects the ids of a text, special tokens included; empty without a tokenizer."""
        return sidecar.tokenizer_identity(self.path)

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of `tokenizer`; None without one."""
        return fingerprint(self.tokenizer) if self.tokenizer else None

    @property
    def known_length(self) -> int:
        """The longest text in tokens that it reads well: the length it was trained on, else its maximum positions.

        The config may allow more positions than kvfold's pretraining used; beyond those the loss rises.
        """
        steps = self.lineage["steps"] if self.lineage else []
        seen = [step["settings"]["sequence_length"] for step in steps if step["settings"].get("sequence_length")]
        first = bool(steps) and steps[0]["stage"] == "pretrain"  # else the teacher was trained elsewhere
        return min(self.shape.max_positions, max(seen)) if first and seen else self.shape.max_positions

    @property
    def root_path(self) -> Path | None:
        """The path at which the root teacher was last read; None without lineage, or if the cache does not have it."""
        return remembered(self.lineage["root"]["hash"]) if self.lineage else None

    def _entry(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"has no tensor {name}", where=self.path)
        return self._stored[name]

    def _check_tie(self) -> None:
        """Refuse an output projection that differs from the embedding it is tied to: some engines drop it.

        Raises CheckpointError.
        """
        embedding = f"{self.family.body.embedding}.weight"
        if TIED not in self._stored or not self.family.body.embedding or not self.family.tied(self.config):
            return
        embeddings = [name for name in self._stored if name == embedding or "embed" in name]
        if not any(self._equal(TIED, name) for name in embeddings):
            raise CheckpointError(
                f"config.json ties {TIED} to {embedding}, but no embedding has its values",
                where=self.path,
                got=", ".join(embeddings) or "no embedding",
                next=f"set tie_word_embeddings to false in config.json to keep both, or delete {TIED}",
            )

    def _equal(self, first: str, second: str) -> bool:
        """True if two tensors hold the same numbers; different dtypes are compared in the wider one."""
        import torch

        one, other = self._stored.get(first), self._stored.get(second)
        if one is None or other is None or one.spec.shape != other.spec.shape:
            return False
        if one.spec == other.spec:
            self.digests |= {name: self._digest(name) for name in (first, second) if name not in self.digests}
            return self.digests[first] == self.digests[second]
        if not one.spec.floating or not other.spec.floating:
            return False
        wide = torch.promote_types(one.read().dtype, other.read().dtype)
        pairs = zip(torch.split(one.read(), ROWS), torch.split(other.read(), ROWS), strict=True)
        return all(torch.equal(a.to(wide), b.to(wide)) for a, b in pairs)

    def _tied_twice(self) -> bool:
        """True if the output projection is tied to an embedding, and both are stored and equal."""
        if TIED not in self._stored or not self.family.tied(self.config):
            return False
        spec = self._stored[TIED].spec
        same = [name for name, other in self._stored.items() if "embed" in name and other.spec == spec]
        return any(self._equal(TIED, name) for name in same)

    def _verify(self) -> None:
        """Check names, shapes and dtypes against the family, from headers alone."""
        for site, attention in self.shape.sites.items():
            for name, roles in self.family.stored(site, attention).items():
                if name not in self._stored:
                    raise CheckpointError(
                        f"tensor {name} is missing ({', '.join(roles)} of {site})",
                        where=self.path,
                        next=self._hint(name),
                    )
                shape = self.family.form(attention, roles)
                spec = self._stored[name].spec
                if spec.shape != shape:
                    raise CheckpointError(
                        f"tensor {name} does not have the shape that config.json implies",
                        where=self._stored[name].file,
                        got=spec.shape,
                        allowed=shape,
                    )
                if not spec.floating and roles[0] not in WHOLE:
                    raise CheckpointError(
                        f"tensor {name} does not hold floating-point numbers",
                        where=self._stored[name].file,
                        got=spec.dtype,
                        allowed=", ".join(FLOATS),
                        next="use the unquantised checkpoint",
                    )
        there = sum(stored.spec.numel for stored in self._stored.values())
        if there < self.shape.parameters:
            raise CheckpointError(
                "tensors are missing",
                where=self.path,
                got=f"{there:,} parameters",
                allowed=f"{self.shape.parameters:,}, by config.json",
                next=self._gap(),
            )

    def _hint(self, name: str) -> str:
        """The likely reason why a tensor of an attention is missing."""
        last = name.rsplit(".", 2)[-2:]
        alike = next((other for other in self.names() if other.rsplit(".", 2)[-2:] == last), name)
        elsewhere = re.sub(r"\d+", "", alike) != re.sub(r"\d+", "", name)  # not only in another layer
        return f"is it named otherwise, as {alike}?" if elsewhere else "download it again"

    def _gap(self) -> str | None:
        """The first tensor that some layers have and another lacks."""
        layers: dict[str, set[str]] = {}
        for name in self._stored:
            if found := re.search(r"\.(\d+)\.", name):
                layers.setdefault(name[: found.start()] + ".{}." + name[found.end() :], set()).add(found[1])
        everywhere = set().union(*layers.values())
        for pattern, some in sorted(layers.items()):
            if some != everywhere:
                return f"is {pattern.format(min(everywhere - some, key=int))} lost?"
        return None


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


# --- identity -------------------------------------------------------------------------------------------------------


def content_hash(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> str:
    """One hash of everything that affects a checkpoint's output: its config without book-keeping, and its tensors.

    An output projection that is tied and equal to the embedding does not count.
    """
    tied = config.get("tie_word_embeddings") and TIED in specs
    if tied and any("embed" in name and digests[name] == digests[TIED] for name in specs):
        specs = {name: spec for name, spec in specs.items() if name != TIED}
    known = {key: value for key, value in config.items() if key not in _BOOKKEEPING}
    tensors = [[name, specs[name].dtype, specs[name].shape, digests[name]] for name in sorted(specs)]
    return fingerprint({"config": known, "tensors": fingerprint(tensors)})


# --- saving ---------------------------------------------------------------------------------------------------------


def save_tensors(
    folder: Path, like: Checkpoint, tensors: Iterable[tuple[str, Tensor]], lineage: Mapping[str, Any]
) -> str:
    """Save the trained tensors of a checkpoint into a folder, one after the other, and return the content hash.

    Each has the dtype of its namesake in `like`; other tensors are ignored. Config, tokenizer and other files are those
    of `like`. Raises as `save_model`.
    """
    specs = {name: like.spec(name) for name in like.names()}
    config = without_code(like.config)
    with disk_errors(folder):
        sidecar.carry_over(like.path, folder)
        write_json(folder / "config.json", config)
        with Writer(folder, specs, spelled=like.spelled) as writer:
            for name, tensor in tensors:
                if name in specs:
                    writer.write(name, tensor)
            missing = sorted(specs.keys() - writer.digests.keys(), key=natural)
            if missing:
                what = f"the trained model lost {len(missing)} tensors, the first is {missing[0]}"
                raise CheckpointError(what, where=folder)
            writer.close()
        hashed = content_hash(config, specs, writer.digests)
        write_json(folder / MANIFEST, {**lineage, "hash": hashed})
    return hashed


def save_model(
    folder: Path,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    lineage: Mapping[str, Any],
    like: Checkpoint | None = None,
    gone: Collection[str] = (),
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> str:
    """Save a trained model into a folder (an output's `work`). Returns its content hash, which is added to the lineage.

    With `like`, each tensor has the dtype of its namesake there, and tokenizer and other files are copied from there;
    otherwise the dtype is `dtype`, or the config's. An output projection that is tied to the embedding is not saved.
    Raises CheckpointError if `state` lacks a tensor of `like` that is not `gone`, or a weight is NaN or infinite,
    SettingError for a weight that its dtype cannot hold, and OutputError if the disk refuses.
    """
    config = without_code(config)
    names = [name for name in like.names() if name not in gone] if like else sorted(state, key=natural)
    if config.get("tie_word_embeddings") and not like:
        names = [name for name in names if name != TIED]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"the trained model lost {len(missing)} tensors, the first is {missing[0]}", where=folder)
    specs = {name: TensorSpec.of(state[name]) for name in names}
    for name, spec in specs.items():
        if like and not dtype:
            specs[name] = replace(spec, dtype=like.spec(name).dtype)
        elif state[name].is_floating_point():
            specs[name] = replace(spec, dtype=dtype or str(config.get("dtype") or "float32"))
    with disk_errors(folder):
        if like:
            sidecar.carry_over(like.path, folder)
        write_json(folder / "config.json", config)
        with Writer(folder, specs, shard_bytes=shard_bytes, spelled=like.spelled if like else {}) as writer:
            for name in names:
                writer.write(name, state[name])
            writer.close()
        hashed = content_hash(config, specs, writer.digests)
        write_json(folder / MANIFEST, {**lineage, "hash": hashed})
    return hashed
