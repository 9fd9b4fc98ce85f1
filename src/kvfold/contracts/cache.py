"""What a model caches: bytes = constant + per decoder token + per encoder token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfold.contracts.site import DTYPE_BYTES, Attention, Linear, Shape

CONTEXT = 8192  # tokens: the longest text that is planned for by default


@dataclass(frozen=True)
class Slot:
    """One tensor that a site caches, in elements. Slots with the same `storage` are counted once."""

    storage: str
    per_token: int = 0
    constant: int = 0
    per_encoder_token: int = 0
    window: int | None = None  # the cache never holds more tokens than this
    wide: bool = False  # at least 4 bytes an element, whatever the format of the cache

    def elements(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Elements for one sequence of `tokens`."""
        held = tokens if self.window is None else min(tokens, self.window)
        return self.constant + self.per_token * held + self.per_encoder_token * encoder_tokens


@dataclass(frozen=True)
class CacheSpec:
    """The cache of a model, to the byte."""

    slots: tuple[Slot, ...]

    def _unique(self) -> list[Slot]:
        return list({slot.storage: slot for slot in self.slots}.values())

    def elements(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Elements for one sequence of `tokens`."""
        return sum(slot.elements(tokens, encoder_tokens) for slot in self._unique())

    def bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2, encoder_tokens: int = 0) -> int:
        """Bytes for `batch` sequences of `tokens`, at `itemsize` bytes an element."""
        return batch * sum(
            slot.elements(tokens, encoder_tokens) * (max(itemsize, 4) if slot.wide else itemsize)
            for slot in self._unique()
        )

    def bytes_per_token(self, itemsize: int = 2, tokens: int = 1) -> int:
        """Bytes per decoder token of a sequence of `tokens`: windows and constants are spread over all of them."""
        return round(self.bytes(tokens, itemsize=itemsize) / tokens)

    def bytes_per_encoder_token(self, itemsize: int = 2) -> int:
        """Bytes that one more encoder token adds."""
        return itemsize * sum(slot.per_encoder_token for slot in self._unique())


def _linear_slots(name: str, attention: Attention, linear: Linear) -> list[Slot]:
    """The last tokens, the first tokens, and the sums over the others."""
    both = 2 * attention.num_key_value_heads * attention.head_dim
    slots = [
        Slot(f"{name}.{part}", per_token=both, window=count)
        for part, count in (("window", linear.window), ("sinks", linear.sinks))
        if count
    ]
    columns = attention.head_dim + (linear.norm == "denominator")
    sums = attention.num_key_value_heads * linear.feature_dim * columns
    return [*slots, Slot(f"{name}.sums", constant=sums, wide=True)] if sums else slots


def grouped_cache(shape: Shape) -> CacheSpec:
    """The cache that a shape describes. Sites that read another layer's keys and values share its storage."""
    slots: list[Slot] = []
    for site in shape.cached_sites:
        attention = shape.sites[site]
        if attention.linear is not None:
            slots += _linear_slots(f"{site.kind}.{site.layer}", attention, attention.linear)
            continue
        for part, width in attention.cached.items():
            name = f"{site.kind}.{site.layer if attention.source is None else attention.source}.{part}"
            if site.kind == "cross":
                slots.append(Slot(name, per_encoder_token=width))
            else:
                # transformers shows `window - 1` tokens of a sliding layer, as a view of a storage that holds `window`
                slots.append(Slot(name, per_token=width, window=attention.window))
    return CacheSpec(tuple(slots))


def root_elements(shape: Shape) -> int:
    """Elements per token that the root teacher caches: the whole of a budget."""
    return shape.root_elements or grouped_cache(shape).elements(1, 1)


def layer_elements(ratio: float, shape: Shape) -> int:
    """Elements per token that a part of the root teacher's cache leaves to each layer."""
    return int(ratio * root_elements(shape) * (1 + 1e-12)) // len(shape.sites)


def default_context(shape: Shape) -> int:
    """The context for bytes per token where none is given: the model's maximum, at most `CONTEXT`."""
    return min(shape.max_positions, CONTEXT)


def cached_by(shape: Shape) -> dict[str, Any]:
    """The cache of a model, as records keep it: dtype, bytes per token at the default context, key/value heads.

    For an encoder-decoder, the bytes of a decoder token and an encoder token. `kv_heads` is None if sites differ, or
    keys and values do.
    """
    context = default_context(shape)
    encoded = (shape.encoder_positions or context) if any(site.kind == "cross" for site in shape.sites) else 0
    whole = grouped_cache(shape).bytes(context, itemsize=DTYPE_BYTES[shape.dtype], encoder_tokens=encoded)
    heads = {count for each in shape.sites.values() for count in (each.num_key_value_heads, each.num_value_heads)}
    return {
        "dtype": shape.dtype,
        "bytes_per_token": whole / context,
        "kv_heads": heads.pop() if len(heads) == 1 else None,
    }
