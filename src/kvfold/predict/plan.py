"""What a conversion will save and cost, from `config.json` alone: no tensor is read, torch is not loaded.

Cache bytes are exact. Decode speed is the roofline's, and so is the largest batch: what the device allows, before
any kernel's or engine's own losses. docs/plan.md explains every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kvfold import methods
from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.family import Family
from kvfold.contracts.method import Method, Student
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.disk.checkpoint import locate, read_config
from kvfold.disk.manifest import read_lineage
from kvfold.errors import SettingError, choices
from kvfold.families import family_of, source_family
from kvfold.formats import count, size
from kvfold.predict.engines import Engine, engines
from kvfold.predict.roofline import Hardware, HardwareName, Step, cache_share, decode_step, hardware
from kvfold.predict.student_config import rehoused, student_config
from kvfold.settings import decode

TRAINING_BYTES = 4 + 4 + 4  # on disk per parameter: float32 masters and the two moments of AdamW


SLOTS = 2  # training states kept at a time: the last good one stays while the next is written


@dataclass(frozen=True)
class PlanSettings:
    """Where and how the student would be used, and how long it would be trained."""

    context: int | None = field(
        default=None, metadata={"help": "Tokens in each sequence's cache; the model's own maximum, at most 8192."}
    )
    encoder_context: int | None = field(
        default=None, metadata={"help": "Tokens that an encoder has read; as many as --context."}
    )
    batch: int = field(default=1, metadata={"help": "Sequences decoded together."})
    hardware: HardwareName = field(
        default="h100", metadata={"help": "Device to predict for; local is this machine, measured once."}
    )
    tensor_parallel: int = field(default=1, metadata={"help": "Devices that the model is split over."})
    dtype: Literal["source", "float32", "bfloat16", "float16"] = field(
        default="source", metadata={"help": "Format of weights and cache when it is served."}
    )
    memory_share: float = field(default=0.9, metadata={"help": "Part of the device's memory for weights and cache."})
    alpha: float | None = field(
        default=None, metadata={"help": "Uptraining tokens as a part of the pre-training tokens; the paper's is 0.05."}
    )
    pretraining_tokens: int | None = field(default=None, metadata={"help": "Tokens the source was trained on (2T)."})
    tokens: int | None = field(default=None, metadata={"help": "Uptraining tokens, instead of --alpha."})
    kl: bool = field(default=True, metadata={"help": "Uptraining asks the teacher for its logits too."})
    utilisation: float = field(default=0.4, metadata={"help": "Part of the peak FLOP/s that training reaches."})

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, with SettingError."""
        for name in ("context", "encoder_context", "batch", "tensor_parallel", "pretraining_tokens", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1", where="plan", got=value)
        for name in ("memory_share", "utilisation", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SettingError(f"{name} must lie between 0 and 1", where="plan", got=value)
        if self.alpha is not None and self.tokens is not None:
            raise SettingError("alpha and tokens both say how long to train", where="plan", next="give one of them")
        if self.alpha is not None and self.pretraining_tokens is None:
            raise SettingError(
                "alpha is a part of the pre-training tokens, and their number is missing",
                where="plan",
                next="add --pretraining-tokens (for example 2T), or say --tokens",
            )

    @property
    def uptraining_tokens(self) -> int | None:
        """Tokens to train on, when anything was said about it."""
        if self.alpha is not None and self.pretraining_tokens is not None:
            return round(self.alpha * self.pretraining_tokens)
        return self.tokens


@dataclass(frozen=True)
class Side:
    """One model, before or after: bytes are exact, seconds and batches are the roofline's on each device."""

    model_type: str
    kv_heads: str
    parameters: int
    weight_bytes: int
    cache_bytes_per_token: int  # the mean over a text of `context`
    cache_bytes_per_encoder_token: int  # 0 where nothing is read by an encoder
    cache_bytes: int
    cache_bytes_per_device: int
    step_seconds: float
    tokens_per_second: float
    bound: Literal["memory", "compute"]
    weight_share: float  # of the bytes that a step reads
    largest_batch: int
    largest_batch_tokens_per_second: float


@dataclass(frozen=True)
class Uptraining:
    """What training back would cost: 6 N D FLOPs of the student and 2 N D of the teacher (N parameters, D tokens)."""

    tokens: int
    alpha: float | None
    flops: float
    device_hours: float
    utilisation: float
    memory_bytes: int  # float32 masters, gradients and moments, and the teacher; without activations


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the student as it is saved, and the states kept while it is trained."""

    student: int
    uptraining: int


@dataclass(frozen=True)
class Plan:
    """What a conversion will save and cost."""

    source: str
    method: str
    settings: Mapping[str, Any]
    context: int
    batch: int
    dtype: str
    tensor_parallel: int
    hardware: Hardware
    before: Side
    after: Side
    root_cache_bytes_per_token: int  # of the first checkpoint of the chain; the source's own where there is no chain
    uptraining: Uptraining | None
    disk: Disk
    calibration_bytes: int  # of the answers that the method asks of the teacher; 0 when it asks none
    engines: tuple[Engine, ...]
    warnings: tuple[str, ...]

    @property
    def cache_ratio(self) -> float:
        """The student's cache as a part of the source's, at this context."""
        return self.after.cache_bytes / self.before.cache_bytes

    @property
    def speedup(self) -> float:
        """Decode speed of the student over the source's, by the roofline."""
        return self.before.step_seconds / self.after.step_seconds

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"cache_ratio": self.cache_ratio, "speedup": self.speedup}

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table of label, before and after."""
        before, after = self.before, self.after
        device = one = "this machine"
        if self.hardware.name != "local":
            device, one = self.hardware.name, f"one {self.hardware.name}"

        def both(label: str, show: Any, name: str) -> tuple[str, str, str]:
            return label, show(getattr(before, name)), show(getattr(after, name))

        def speed(tokens: float) -> str:
            return f"{count(tokens)} tokens/s"

        rows = [
            both("architecture", str, "model_type"),
            both("key/value heads", str, "kv_heads"),
            both("parameters", count, "parameters"),
            both(f"weights, {self.dtype}", size, "weight_bytes"),
            both("cache per token", size, "cache_bytes_per_token"),
        ]
        if before.cache_bytes_per_encoder_token:
            rows.append(both("cache per token of the encoder's", size, "cache_bytes_per_encoder_token"))
        rows.append(both(f"cache at {self.context:,} tokens x {self.batch}", size, "cache_bytes"))
        if self.tensor_parallel > 1:
            rows.append(both(f"  on each of {self.tensor_parallel} devices", size, "cache_bytes_per_device"))
        if self.root_cache_bytes_per_token != before.cache_bytes_per_token:
            root = self.root_cache_bytes_per_token
            rows.append(both("  as a part of the root teacher's", lambda b: f"{b / root:.1%}", "cache_bytes_per_token"))
        rows += [
            both(f"decode on {device}, at most", speed, "tokens_per_second"),
            both(f"largest batch on {device}", lambda batch: f"{batch:,}", "largest_batch"),
            both("  decode there, at most", speed, "largest_batch_tokens_per_second"),
            ("disk", "", size(self.disk.student)),
        ]
        if self.calibration_bytes:
            rows.append(("calibration answers", "", size(self.calibration_bytes)))
        if self.uptraining is not None:
            cost = self.uptraining
            share = "" if cost.alpha is None else f" (alpha {cost.alpha:g})"
            rows += [
                ("uptraining tokens", "", count(cost.tokens) + share),
                ("  FLOPs", "", f"{cost.flops:.2g}"),
                (f"  hours on {one}", "", f"{count(cost.device_hours)} at {cost.utilisation:.0%} of its peak"),
                ("  memory, no activations", "", size(cost.memory_bytes)),
                ("  disk for its states", "", size(self.disk.uptraining)),
            ]
        loads = [engine.name for engine in self.engines if engine.loads]
        return [*rows, ("loads in", "", ", ".join(loads))]


def plan(
    src: str | Path,
    method: str = "gqa",
    settings: Mapping[str, Any] | None = None,
    *,
    options: PlanSettings = PlanSettings(),
    after: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Plan:
    """Say what converting `src` with this method would save and cost, once those of `after` have come first.

    `src` is a checkpoint, a directory that holds only a config.json, that file, or a hub id (whose config.json
    alone is fetched). Raises SettingError, CheckpointError or UnsupportedModel.
    """
    config, lineage = read_source(src)
    family = source_family(config, where=src)
    shape = rooted(family.shape(config), lineage)
    before_all, read = shape, config
    for name, first in after:
        read, family, shape, (_, _, student) = _housed(read, family, shape, name, first)
        read = student_config(read, family, shape, student, method=name)
        shape = student.shape
        root_elements = before_all.root_elements or grouped_cache(before_all).elements(1, 1)
        shape = replace(shape, root_elements=root_elements)
    read, family, shape, (chosen, made, student) = _housed(read, family, shape, method, settings or {})
    made_config = student_config(read, family, shape, student, method=method)
    device = hardware(options.hardware)
    use = _Use(options, before_all, device, tied=family.tied(read))
    before = use.side(before_all, grouped_cache(before_all), config["model_type"])
    folded = use.side(student.shape, chosen.cache_spec(made, shape), made_config["model_type"])
    uptraining = _uptraining(options, device, before_all, student.shape)
    disk = Disk(
        student=student.shape.parameters * _itemsize(shape.dtype),
        uptraining=SLOTS * TRAINING_BYTES * student.shape.parameters if uptraining else 0,
    )
    root = _root_bytes_per_token(lineage, use.context, use.itemsize) or before.cache_bytes_per_token
    return Plan(
        source=str(src),
        method=method,
        settings=spelled(made),
        context=use.context,
        batch=options.batch,
        dtype=use.dtype,
        tensor_parallel=options.tensor_parallel,
        hardware=device,
        before=before,
        after=folded,
        root_cache_bytes_per_token=root,
        uptraining=uptraining,
        disk=disk,
        calibration_bytes=sum(request.bytes(shape) for request in set(chosen.needs(made, shape))),
        engines=engines(student, read),
        warnings=(
            *use.warnings(before_all, student.shape, before, folded),
            *chosen.notes(made, shape),
        ),
    )


def _housed(
    config: dict[str, Any], family: Family, shape: Shape, name: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Family, Shape, tuple[Method[Any], Any, Student]]:
    """A source as it is converted, in another architecture where its student needs that, and what comes out."""
    made = _student(shape, name, settings)
    if other := rehoused(config, family, shape, made[2]):
        config, family = dict(other), source_family(other)
        shape = replace(family.shape(config), root_elements=shape.root_elements)
        made = _student(shape, name, settings)
    return config, family, shape, made


def _student(shape: Shape, name: str, settings: Mapping[str, Any]) -> tuple[Method[Any], Any, Student]:
    """A method, its settings for this shape, and what comes out. Raises SettingError."""
    chosen = methods.get(name)
    made = decode(chosen.Config, settings, name)
    methods.check(name, made, shape)
    return chosen, made, chosen.student(made, shape)


def read_source(src: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config.json and the lineage (kvfold.json) of a source, fetching no weights. Raises CheckpointError."""
    path = Path(src)
    folder = path.parent if path.name == "config.json" and path.is_file() else locate(src, weights=False)
    config = read_config(folder)
    family_of(config, folder / "config.json")  # checked here, where its place is known
    return config, read_lineage(folder)


def rooted(shape: Shape, lineage: Mapping[str, Any] | None) -> Shape:
    """The shape of a source, with what the root teacher that its lineage names caches of a token."""
    root = _root(lineage)
    return shape if root is None else replace(shape, root_elements=grouped_cache(root).elements(1, 1))


def _root_bytes_per_token(lineage: Mapping[str, Any] | None, context: int, itemsize: int) -> int | None:
    """Cache bytes per token of the root teacher that a lineage names."""
    root = _root(lineage)
    return None if root is None else grouped_cache(root).bytes_per_token(itemsize, context)


def _root(lineage: Mapping[str, Any] | None) -> Shape | None:
    config = ((lineage or {}).get("root") or {}).get("config")
    return family_of(config).shape(config) if config else None


def _itemsize(dtype: str) -> int:
    return DTYPE_BYTES[dtype]


class _Use:
    """One way to serve a model: context, batch, format and devices."""

    def __init__(self, options: PlanSettings, shape: Shape, device: Hardware, tied: bool) -> None:
        self.options, self.device, self.tied = options, device, tied
        self.context = options.context or min(shape.max_positions, 8192)
        crossed = any(site.kind == "cross" for site in shape.sites)
        self.encoder_context = (options.encoder_context or self.context) if crossed else 0
        self.dtype = shape.dtype if options.dtype == "source" else options.dtype
        self.itemsize = _itemsize(self.dtype)

    def side(self, shape: Shape, cache: CacheSpec, model_type: str) -> Side:
        """Bytes, predicted seconds and largest batch of one model."""
        parallel, batch = self.options.tensor_parallel, self.options.batch
        share = cache_share(shape, parallel)
        weights = shape.parameters * self.itemsize
        step, seconds = self._step(shape, cache, batch)
        whole = cache.bytes(self.context, itemsize=self.itemsize, encoder_tokens=self.encoder_context)
        per_sequence = whole * share
        room = self.device.memory * self.options.memory_share - weights / parallel
        largest = max(0, int(room // per_sequence))
        return Side(
            model_type=model_type,
            kv_heads=_heads(shape),
            parameters=shape.parameters,
            weight_bytes=weights,
            cache_bytes_per_token=cache.bytes_per_token(self.itemsize, self.context),
            cache_bytes_per_encoder_token=cache.bytes_per_encoder_token(self.itemsize),
            cache_bytes=batch * whole,
            cache_bytes_per_device=round(batch * per_sequence),
            step_seconds=seconds,
            tokens_per_second=batch / seconds,
            bound=step.bound(self.device, self.dtype),
            weight_share=step.weight_bytes / (step.weight_bytes + step.cache_bytes),
            largest_batch=largest,
            largest_batch_tokens_per_second=largest / self._step(shape, cache, largest)[1] if largest else 0.0,
        )

    def _step(self, shape: Shape, cache: CacheSpec, batch: int) -> tuple[Step, float]:
        step = decode_step(
            shape,
            cache,
            context=self.context,
            batch=batch,
            dtype=self.dtype,
            tied=self.tied,
            tensor_parallel=self.options.tensor_parallel,
            encoder_context=self.encoder_context,
        )
        return step, step.seconds(self.device, self.dtype)

    def warnings(self, source: Shape, student: Shape, before: Side, after: Side) -> list[str]:
        """What a reader of the numbers should know, one line each."""
        return [
            *self._about_heads(student),
            *self._about_sharing(student),
            *self._about_context(source, before, after),
            *self._about_room(before, after),
        ]

    def _about_heads(self, student: Shape) -> list[str]:
        found, parallel = [], self.options.tensor_parallel
        for heads in sorted({site.num_key_value_heads for key, site in student.sites.items() if key.kind != "encoder"}):
            named = f"{heads} key/value head{'s' if heads > 1 else ''}"
            if heads < parallel:
                found.append(
                    f"{named} on {parallel} devices: vLLM gives each device a whole head, so a cache of {heads} heads "
                    f"is kept {parallel / heads:g} times; below {parallel} heads a device saves nothing more"
                )
            if max(heads, parallel) % min(heads, parallel):
                found.append(f"{named} cannot be split evenly over {parallel} devices: vLLM refuses such a model")
            if heads & (heads - 1):
                found.append(f"{named} is not a power of two: tensor parallelism over 2, 4 or 8 devices may not work")
        queries = {site.num_attention_heads for site in student.sites.values()}
        if any(count % parallel for count in queries):
            found.append(f"{choices(sorted(queries))} query heads cannot be split over {parallel} devices")
        return found

    def _about_sharing(self, student: Shape) -> list[str]:
        reading = sum(site.source is not None and site.kept is None for site in student.sites.values())
        if not reading:
            return []
        return [
            f"{reading} of {student.num_layers} layers read the cache of another: that saves room and not reads, so a "
            "step gets no faster at the same batch; what gains is the largest batch, and the speed there"
        ]

    def _about_context(self, source: Shape, before: Side, after: Side) -> list[str]:
        found = []
        if self.context > source.max_positions:
            found.append(f"a context of {self.context:,} is beyond the {source.max_positions:,} positions of the model")
        written = [attention for site, attention in source.sites.items() if site.kind == "self"]
        windows = [attention.window for attention in written if attention.window is not None]
        if windows and min(windows) < self.context:
            layers = "every layer" if len(windows) == len(written) else f"{len(windows)} of {len(written)} layers"
            found.append(
                f"a sliding window of {min(windows):,} tokens bounds the cache of {layers} already: "
                "a longer context adds nothing there"
            )
        ratio = after.cache_bytes / before.cache_bytes
        if 0.5 <= ratio < 1:
            found.append(
                f"the cache shrinks by {1 / ratio:.2g}x: an fp8 cache of the unconverted source gives 2x "
                "without any training (from 16 bits); try that first"
            )
        return found

    def _about_room(self, before: Side, after: Side) -> list[str]:
        found, name, batch = [], self.device.name, self.options.batch
        gain = before.step_seconds / after.step_seconds
        if after.cache_bytes < before.cache_bytes and gain < 1.25:
            if before.bound == "compute":
                reason = "a decode step is bound by its operations, not by what it reads"
            else:
                reason = f"weights are {before.weight_share:.0%} of what a decode step reads"
            found.append(
                f"{reason} at {self.context:,} tokens x {batch}: it gets {gain:.2f}x faster at most; "
                "a longer context or a larger batch gains more"
            )
        if before.largest_batch == 0 and after.largest_batch == 0:
            found.append(
                f"not one sequence of {self.context:,} tokens fits beside the weights on {name}; "
                "split the model over more devices"
            )
        elif batch > after.largest_batch:
            found.append(f"a batch of {batch} does not fit on {name}, before or after")
        elif batch > before.largest_batch:
            found.append(f"a batch of {batch} fits on {name} only after the conversion")
        return found


def _heads(shape: Shape) -> str:
    """Head counts for people: `8`, or `self 8, cross 4`, or `1 to 8` where layers differ."""
    kinds: dict[str, set[int]] = {}
    for site, attention in shape.sites.items():
        if site.kind != "encoder":
            kinds.setdefault(site.kind, set()).add(attention.num_key_value_heads)
    words = {kind: f"{min(n)} to {max(n)}" if len(n) > 1 else str(min(n)) for kind, n in kinds.items()}
    said = next(iter(words.values())) if len(words) == 1 else ", ".join(f"{kind} {n}" for kind, n in words.items())
    owners = sum(attention.source is None for attention in shape.sites.values())
    return f"{said}, in {owners} of {len(shape.sites)} layers" if shape.owners else said


def _uptraining(options: PlanSettings, device: Hardware, teacher: Shape, student: Shape) -> Uptraining | None:
    tokens = options.uptraining_tokens
    if tokens is None:
        return None
    flops = float(tokens) * (6 * student.parameters + (2 * teacher.parameters if options.kl else 0))
    alpha = None if options.pretraining_tokens is None else tokens / options.pretraining_tokens
    return Uptraining(
        tokens=tokens,
        alpha=alpha,
        flops=flops,
        device_hours=flops / (device.peak("bfloat16") * options.utilisation) / 3600,
        utilisation=options.utilisation,
        memory_bytes=student.parameters * (TRAINING_BYTES + 4)
        + (teacher.parameters * _itemsize(teacher.dtype) if options.kl else 0),
    )
