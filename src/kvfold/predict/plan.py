"""What a conversion saves and costs, from `config.json` alone: no tensor is read and torch is not loaded.

Cache bytes are exact. Decode speed and the largest batch are bounds by the roofline. docs/plan.md explains each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvfold.contracts.cache import default_context, grouped_cache
from kvfold.contracts.effort import CORRUPTED, EFFORTS, EffortName
from kvfold.contracts.method import Student
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.requests import Question
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.disk.manifest import read_lineage, root_shape, rooted
from kvfold.disk.source import locate, read_config
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import family_of, source_family
from kvfold.formats import count, size
from kvfold.inputs import LARGEST
from kvfold.machine import best_precision
from kvfold.predict.conversion_cost import conversion_cost, directions
from kvfold.predict.engines import Engine, engines
from kvfold.predict.roofline import Hardware, HardwareName, hardware
from kvfold.predict.serving import Served, Serving
from kvfold.predict.student_config import Draft, draft, student_config
from kvfold.predict.training_memory import (
    Checkpointing,
    Offload,
    Rank,
    Training,
    check_offload,
    training,
    training_flops,
)
from kvfold.settings import MOST, check_range, setting

TRAINING_BYTES = 4 + 4 + 4  # on disk per parameter: float32 weights and the two moments of AdamW
STATES = 2  # training states on disk: the last complete one stays while the next is written


@dataclass(frozen=True)
class PlanSettings:
    """Where and how the student would be used, and how long it would be trained."""

    context: int | None = setting(None, "Cached tokens of each sequence. Default: the model's maximum, at most 8192.")
    encoder_context: int | None = setting(
        None, "Input tokens of an encoder-decoder. Default: --context; of Whisper, its 1500."
    )
    batch: int = setting(1, "Sequences decoded together.")
    hardware: HardwareName = setting("h100", "Device to predict for; local is this machine, measured once.")
    tensor_parallel: int = setting(1, "Devices that share the model.")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = setting(
        "source", "Format of weights and cache in serving."
    )
    memory_share: float = setting(0.9, "Share of the device's memory for weights and cache, from 0 to 1.")
    alpha: float | None = setting(
        None, "Uptraining tokens as a share of the pre-training tokens (paper: 0.05). Default: none."
    )
    pretraining_tokens: int | None = setting(
        None, "Tokens that the source was trained on, such as 2T, for --alpha. Default: none."
    )
    effort: EffortName = setting("standard", "Effort of the conversion, as in convert.")
    tokens: int | None = setting(None, "Uptraining tokens, instead of --alpha. Default: none.")
    kl: bool = setting(True, "Uptraining has a KL loss, so the teacher runs too.")
    utilisation: float = setting(0.4, "Share of the peak FLOP/s that training reaches, from 0 to 1.")
    gpus: int | None = setting(None, "Devices to uptrain on: predicts the memory of each. Default: none.")
    micro_batch: int = setting(1, "Sequences in one forward pass of a device, for --gpus.")
    sequence_length: int = setting(2048, "Tokens of a sequence in training, for --gpus.")
    checkpointing: Checkpointing = setting(
        "none", "Activations that are computed again in the backward pass, as in uptrain, for --gpus."
    )
    offload: Offload = setting("none", "What is in the memory of the host, as in uptrain, for --gpus.")
    converted_only: bool = setting(False, "Train only the attention that the conversion changed, for --gpus.")

    def __post_init__(self) -> None:
        """Check the settings. Raises SettingError."""
        counts = ("context", "encoder_context", "batch", "tensor_parallel", "pretraining_tokens", "tokens")
        check_offload(self.offload, self.checkpointing, "plan")
        check_range(self, "plan", 1, MOST, "gpus", "micro_batch", "sequence_length")
        check_range(self, "plan", 1, LARGEST, *counts)
        for name in ("memory_share", "utilisation", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SettingError(f"{name} must lie between 0 and 1", where="plan", got=value)
        if self.alpha is not None and self.tokens is not None:
            raise SettingError("alpha and tokens both set the length of uptraining", where="plan", next="give one")
        if self.alpha is not None and self.pretraining_tokens is None:
            raise SettingError(
                "alpha is a share of the pre-training tokens, whose number is missing",
                where="plan",
                next="add --pretraining-tokens (such as 2T), or give --tokens instead",
            )

    @property
    def uptraining_tokens(self) -> int | None:
        """Tokens to train on; None without `alpha` and `tokens`."""
        if self.alpha is not None and self.pretraining_tokens is not None:
            return round(self.alpha * self.pretraining_tokens)
        return self.tokens


@dataclass(frozen=True)
class Uptraining:
    """The cost of uptraining: 6 N D FLOPs of the student and 2 N D of the teacher (N parameters, D tokens)."""

    tokens: int
    alpha: float | None
    flops: float
    device_hours: float
    utilisation: float
    memory_bytes: int  # float32 weights, gradients and moments, and the teacher; without activations


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the saved student, and the states of its training."""

    student: int
    uptraining: int


@dataclass(frozen=True)
class Calibrated:
    """The cost of a conversion with calibration text."""

    effort: EffortName
    tokens: int
    forward_passes: float  # of the teacher over these tokens, in operations
    flops: float
    seconds: float  # on the device, in float32, at the share of its peak that training reaches
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a conversion saves and costs."""

    source: str
    method: str
    settings: Mapping[str, Any]
    context: int
    batch: int
    dtype: str
    tensor_parallel: int
    hardware: Hardware
    before: Served
    after: Served
    trained: Served | None  # where uptraining changes the student's shape
    root_cache_bytes_per_token: int  # of the first checkpoint of the chain, or of the source
    uptraining: Uptraining | None
    training: Training | None
    disk: Disk
    calibration_bytes: int  # of the answers to the method's requests
    calibrated: Calibrated | None  # None: no text is read
    engines: tuple[Engine, ...]
    warnings: tuple[str, ...]

    @property
    def cache_ratio(self) -> float:
        """The student's cache as a share of the source's, at this context."""
        return self.after.cache_bytes / self.before.cache_bytes

    @property
    def speedup(self) -> float:
        """Decode speed of the student over the source's, by the roofline."""
        return self.before.step_seconds / self.after.step_seconds

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return dataclasses.asdict(self) | {"cache_ratio": self.cache_ratio, "speedup": self.speedup}

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table of label, before and after."""
        before, root, name = self.before, self.root_cache_bytes_per_token, self.hardware.name
        device, one = ("this machine", "this machine") if name == "local" else (name, f"one {name}")

        def both(label: str, show: Any, name: str) -> tuple[str, str, str]:
            return label, show(getattr(before, name)), show(getattr(self.after, name))

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
        if self.trained is not None:
            share = f" ({self.trained.cache_bytes / before.cache_bytes:.1%})"
            rows.append(("  once uptraining has ended", "", size(self.trained.cache_bytes) + share))
        if self.tensor_parallel > 1:
            rows.append(both(f"  on each of {self.tensor_parallel} devices", size, "cache_bytes_per_device"))
        if root != before.cache_bytes_per_token:
            rows.append(both("  as a part of the root teacher's", lambda b: f"{b / root:.1%}", "cache_bytes_per_token"))
        rows += [
            both(f"decode on {device}, at most", speed, "tokens_per_second"),
            both(f"largest batch on {device}", lambda batch: f"{batch:,}", "largest_batch"),
            both("  decode there, at most", speed, "largest_batch_tokens_per_second"),
            ("disk", "", size(self.disk.student)),
        ]
        if self.calibration_bytes:
            rows.append(("calibration answers", "", size(self.calibration_bytes)))
        if (read := self.calibrated) is not None:
            rows += [
                (f"calibration tokens, {read.effort} effort", "", f"{read.tokens:,}"),
                ("  forward passes of the source", "", f"{read.forward_passes:.1f}"),
                (f"  seconds on {one}, about", "", count(read.seconds)),
                ("  memory, about", "", size(read.memory_bytes)),
            ]
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
        if self.training is not None:
            rows += self.training.rows(device)
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
    """Predict what a conversion of `src` saves and costs, after the conversions of `after`.

    `src` is a checkpoint, a directory that holds only a config.json, that file, or a hub id (only its config.json
    is downloaded). Raises SettingError, CheckpointError or UnsupportedModel.
    """
    config, lineage = read_source(src)
    family = source_family(config, where=src)
    source = shape = rooted(family.shape(config), lineage)
    read: Mapping[str, Any] = config
    for name, given in (*after, (method, settings or {})):
        made = draft(read, source_family(read), shape, name, given)
        read = student_config(made.config, made.family, made.shape, made.student, method=name)
        root_elements = source.root_elements or grouped_cache(source).elements(1, 1)
        shape = replace(made.student.shape, root_elements=root_elements)
    crossed = any(site.kind == "cross" for site in source.sites)
    context = options.context or default_context(source)
    serving = Serving(
        context=context,
        encoder_context=(options.encoder_context or source.encoder_positions or context) if crossed else 0,
        batch=options.batch,
        dtype=source.dtype if options.dtype == "source" else options.dtype,
        device=hardware(options.hardware),
        tensor_parallel=options.tensor_parallel,
        memory_share=options.memory_share,
        tied=made.family.tied(made.config),
    )
    student = made.student.shape
    before = serving.of(source, grouped_cache(source), config["model_type"])
    folded = serving.of(student, made.method.cache_spec(made.settings, made.shape), read["model_type"])
    final = made.method.final(made.settings, made.shape)
    trained = None
    if final != student:
        ended = student_config(made.config, made.family, made.shape, Student(final), method=method)
        trained = serving.of(final, grouped_cache(final), ended["model_type"])
    uptraining = _uptraining(options, serving.device, source, student)
    root = root_shape(lineage)
    requests = set(made.method.needs(made.settings, made.shape))
    return Plan(
        source=str(src),
        method=method,
        settings=spelled(made.settings),
        context=context,
        batch=options.batch,
        dtype=serving.dtype,
        tensor_parallel=options.tensor_parallel,
        hardware=serving.device,
        before=before,
        after=folded,
        trained=trained,
        root_cache_bytes_per_token=(
            grouped_cache(root).bytes_per_token(serving.itemsize, context) if root else before.cache_bytes_per_token
        ),
        uptraining=uptraining,
        training=None if options.gpus is None else _trained_on(options, options.gpus, serving.device, made, source),
        disk=Disk(
            student=student.parameters * DTYPE_BYTES[made.shape.dtype],
            uptraining=STATES * TRAINING_BYTES * student.parameters if uptraining else 0,
        ),
        calibration_bytes=sum(request.bytes(made.shape) for request in requests),
        calibrated=_calibrated(options, serving.device, made, requests),
        engines=engines(made.student, made.config),
        warnings=(
            *serving.warnings(source, student, before, folded),
            *made.method.notes(made.settings, made.shape),
        ),
    )


def read_source(src: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config.json and the lineage (kvfold.json) of a source, without its weights. Raises CheckpointError."""
    path = Path(src)
    folder = path.parent if path.name == "config.json" and path.is_file() else locate(src, weights=False)
    config = read_config(folder)
    family_of(config, folder / "config.json")  # checked here, where the path is known
    return config, read_lineage(folder)


def _calibrated(
    options: PlanSettings, device: Hardware, made: Draft, questions: Iterable[Question]
) -> Calibrated | None:
    asked, effort, family = list(questions), EFFORTS[options.effort], made.family
    changed = made.student.shape != made.shape
    roles = (
        effort.repaired(made.method.repairs(made.settings), family.body.mlp, made.shape.hidden_size) if changed else ()
    )
    if family.audio or not (asked or roles):  # how much is said in a clip is not known
        return None
    text = tokens = effort.tokens(directions(family, made.config, made.shape, roles))
    if family.encoder_decoder:
        text = round(tokens / CORRUPTED) if roles else tokens
        tokens = round(text * CORRUPTED)
    cost = conversion_cost(
        family,
        made.config,
        made.shape,
        made.student.shape,
        asked,
        roles,
        effort.repair,
        tokens=tokens,
        encoded=text - tokens,
        moment_tokens=effort.moment_tokens,
    )
    flops = cost.forward * cost.forward_passes
    return Calibrated(
        effort=options.effort,
        tokens=text,
        forward_passes=cost.forward_passes,
        flops=flops,
        seconds=flops / (device.peak("float32") * options.utilisation),
        memory_bytes=cost.memory,
    )


def _uptraining(options: PlanSettings, device: Hardware, teacher: Shape, student: Shape) -> Uptraining | None:
    tokens = options.uptraining_tokens
    if tokens is None:
        return None
    flops = training_flops(tokens, student, teacher if options.kl else None)
    return Uptraining(
        tokens=tokens,
        alpha=None if options.pretraining_tokens is None else tokens / options.pretraining_tokens,
        flops=flops,
        device_hours=flops / (device.peak("bfloat16") * options.utilisation) / 3600,
        utilisation=options.utilisation,
        memory_bytes=student.parameters * (TRAINING_BYTES + 4)
        + (teacher.parameters * DTYPE_BYTES[teacher.dtype] if options.kl else 0),
    )


def _trained_on(options: PlanSettings, gpus: int, device: Hardware, made: Draft, teacher: Shape) -> Training:
    """The memory of training on `gpus` devices. Raises UnsupportedModel for encoder-decoders."""
    if made.family.encoder_decoder:
        what = "the memory of training is predicted for decoders"
        raise UnsupportedModel(what, where="plan", next="leave out --gpus")
    rank = Rank(
        gpus=gpus,
        rows=options.micro_batch,
        length=options.sequence_length,
        checkpointing=options.checkpointing,
        offload=options.offload,
        converted_only=options.converted_only,
        bf16=device.name != "local" or best_precision() == "bf16",
        kl=options.kl,
        device_bytes=device.memory,
    )
    available = int(device.memory * options.memory_share)
    return training(made.family, made.config, made.student.shape, teacher, rank, available)
