"""One way to serve a model: its bytes, predicted speed and largest batch, and warnings about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from kvfold.contracts.cache import CacheSpec
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.errors import choices
from kvfold.predict.roofline import Hardware, Step, cache_share, decode_step


@dataclass(frozen=True)
class Served:
    """A model as it is served: bytes are exact, seconds and batches are the roofline's on each device."""

    model_type: str
    kv_heads: str
    parameters: int
    weight_bytes: int
    cache_bytes_per_token: int  # the mean over a text of `context`
    cache_bytes_per_encoder_token: int  # 0 without an encoder
    cache_bytes: int
    cache_bytes_per_device: int
    step_seconds: float
    tokens_per_second: float
    bound: Literal["memory", "compute"]
    weight_share: float  # of the bytes that a step reads
    largest_batch: int
    largest_batch_tokens_per_second: float


@dataclass(frozen=True)
class Serving:
    """Context, batch, format and devices with which a model is served; `tied`: its embedding is the output matrix."""

    context: int
    encoder_context: int
    batch: int
    dtype: str
    device: Hardware
    tensor_parallel: int
    memory_share: float
    tied: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BYTES[self.dtype]

    def of(self, shape: Shape, cache: CacheSpec, model_type: str) -> Served:
        """Bytes, predicted seconds and largest batch of one model."""
        weights = shape.parameters * self.itemsize
        step = self._step(shape, cache, self.batch)
        seconds = step.seconds(self.device, self.dtype)
        sequence = cache.bytes(self.context, itemsize=self.itemsize, encoder_tokens=self.encoder_context)
        per_device = sequence * cache_share(shape, self.tensor_parallel)
        room = self.device.memory * self.memory_share - weights / self.tensor_parallel
        largest = max(0, int(room // per_device))
        largest_step = self._step(shape, cache, largest)
        return Served(
            model_type=model_type,
            kv_heads=_heads(shape),
            parameters=shape.parameters,
            weight_bytes=weights,
            cache_bytes_per_token=cache.bytes_per_token(self.itemsize, self.context),
            cache_bytes_per_encoder_token=cache.bytes_per_encoder_token(self.itemsize),
            cache_bytes=self.batch * sequence,
            cache_bytes_per_device=round(self.batch * per_device),
            step_seconds=seconds,
            tokens_per_second=self.batch / seconds,
            bound=step.bound(self.device, self.dtype),
            weight_share=step.weight_bytes / (step.weight_bytes + step.cache_bytes),
            largest_batch=largest,
            largest_batch_tokens_per_second=largest / largest_step.seconds(self.device, self.dtype),
        )

    def _step(self, shape: Shape, cache: CacheSpec, batch: int) -> Step:
        return decode_step(
            shape,
            cache,
            context=self.context,
            batch=batch,
            dtype=self.dtype,
            tied=self.tied,
            tensor_parallel=self.tensor_parallel,
            encoder_context=self.encoder_context,
        )

    def warnings(self, source: Shape, student: Shape, before: Served, after: Served) -> Iterator[str]:
        """What limits the gain, or the use of the student: one line each."""
        yield from self._of_heads(student)
        reading = sum(site.source is not None and site.kept is None for site in student.sites.values())
        if reading:
            yield (
                f"{reading} of {student.num_layers} layers read the cache of another: this saves memory but not reads, "
                "so a step is no faster at the same batch; the largest batch grows, and its speed"
            )
        yield from self._of_context(source, before, after)
        yield from self._of_room(before, after)

    def _of_heads(self, student: Shape) -> Iterator[str]:
        parallel = self.tensor_parallel
        cached = [student.sites[site] for site in student.cached_sites]
        for heads in sorted({count for site in cached for count in (site.num_key_value_heads, site.num_value_heads)}):
            named = f"{heads} key/value head{'s' if heads > 1 else ''}"
            if heads < parallel:
                yield (
                    f"{named} on {parallel} devices: vLLM gives each device a whole head, so a cache of {heads} heads "
                    f"is stored {parallel / heads:g} times; below {parallel} heads a device saves nothing more"
                )
            if max(heads, parallel) % min(heads, parallel):
                yield f"{named} cannot be split evenly over {parallel} devices: vLLM refuses such a model"
            if heads & (heads - 1):
                yield f"{named} is not a power of two: tensor parallelism over 2, 4 or 8 devices may not work"
        queries = {site.num_attention_heads for site in student.sites.values()}
        if any(heads % parallel for heads in queries):
            yield f"{choices(sorted(queries))} query heads cannot be split over {parallel} devices"

    def _of_context(self, source: Shape, before: Served, after: Served) -> Iterator[str]:
        if self.context > source.max_positions:
            yield f"a context of {self.context:,} is beyond the {source.max_positions:,} positions of the model"
        written = [attention for site, attention in source.sites.items() if site.kind == "self"]
        windows = [attention.window for attention in written if attention.window is not None]
        if windows and min(windows) < self.context:
            layers = "every layer" if len(windows) == len(written) else f"{len(windows)} of {len(written)} layers"
            yield (
                f"a sliding window of {min(windows):,} tokens bounds the cache of {layers} already: "
                "a longer context adds nothing there"
            )
        ratio = after.cache_bytes / before.cache_bytes
        if 0.5 <= ratio < 1:
            yield (
                f"the cache shrinks by {1 / ratio:.2g}x: an fp8 cache of the unconverted source gives 2x "
                "without any training (from 16 bits); try that first"
            )

    def _of_room(self, before: Served, after: Served) -> Iterator[str]:
        name, gain = self.device.name, before.step_seconds / after.step_seconds
        if after.cache_bytes < before.cache_bytes and gain < 1.25:
            reason = f"weights are {before.weight_share:.0%} of what a decode step reads"
            if before.bound == "compute":
                reason = "a decode step is bound by its operations, not by its reads,"
            yield (
                f"{reason} at {self.context:,} tokens x {self.batch}: it gets at most {gain:.2f}x faster; "
                "a longer context or a larger batch gains more"
            )
        if before.largest_batch == 0 and after.largest_batch == 0:
            yield (
                f"not one sequence of {self.context:,} tokens fits beside the weights on {name}; "
                "split the model over more devices"
            )
        elif self.batch > after.largest_batch:
            yield f"a batch of {self.batch} does not fit on {name}, before or after"
        elif self.batch > before.largest_batch:
            yield f"a batch of {self.batch} fits on {name} only after the conversion"


def _heads(shape: Shape) -> str:
    """Head counts: `8`, or `self 8, cross 4`, or `1 to 8` for layers that differ."""
    kinds: dict[str, set[int]] = {}
    for site, attention in shape.sites.items():
        if site.kind != "encoder":
            kinds.setdefault(site.kind, set()).add(attention.num_key_value_heads)
    counts = {kind: _range(n) for kind, n in kinds.items()}
    heads = next(iter(counts.values())) if len(counts) == 1 else ", ".join(f"{kind} {n}" for kind, n in counts.items())
    if shape.decoupled:
        values = [attention.num_value_heads for attention in shape.sites.values()]
        return f"{heads} of keys, {_range(values)} of values"
    owners = sum(attention.source is None for attention in shape.sites.values())
    return f"{heads}, in {owners} of {len(shape.sites)} layers" if shape.owners else heads


def _range(numbers: Collection[int]) -> str:
    """`8`, or `1 to 8`."""
    return f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else str(min(numbers))
