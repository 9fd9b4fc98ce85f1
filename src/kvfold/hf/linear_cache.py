"""The cache of linear attention: the last tokens, the sinks, and sums over all older tokens.

transformers' caches find it through the `layer_types` of the config. The size of the sums does not depend on the length
of the text. A token cannot be removed from the sums, so while a cache records its past (assisted generation), tokens
wait beside the sums until they are accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from kvfold.attention.linear import Sums
from kvfold.contracts.runtimes import LINEAR_LAYER
from kvfold.errors import SettingError


class LinearLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer of linear attention, in tensors that are replaced and never written into.

    `keys` and `values` are those of the last tokens, `sink_keys` and `sink_values` those of the first. Without a
    window, `keys` are features.
    """

    _layer_type = LINEAR_LAYER
    is_sliding = True  # masks then take their size from layers that keep all tokens, if there are any
    is_croppable = True
    supports_early_init = False

    is_initialized: bool
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.window, self.length = 0, 0  # tokens in the softmax window, and tokens read
        self.sums: Sums | None = None
        self.record_past, self.settled = False, 0  # settled: number of kept tokens that are accepted

    def begin(self, kept: Tensor, key: Tensor, value: Tensor, window: int, sums: Sums | None) -> None:
        """Start a text, with no kept tokens and with these sums. Does nothing if a text has started."""
        if not self.is_initialized:
            batch, groups, _, width = value.shape
            self.keys = kept.new_empty(batch, groups, 0, kept.shape[3])
            self.values = self.sink_values = value.new_empty(batch, groups, 0, width)
            self.sink_keys = key.new_empty(batch, groups, 0, width)
            self.window, self.sums, self.is_initialized = window, sums, True

    def drop(self, count: int) -> None:
        """Forget the oldest kept tokens."""
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing: `begin` does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise SettingError: only `LinearAttention` fills this cache."""
        raise SettingError("a cache of linear attention cannot be filled from outside")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first key of a mask: all keys while the text fits the window, else no more than the queries.

        Such a mask is not read, and it does not grow with the text.
        """
        whole = self.length + query_length
        return (whole, 0) if whole <= self.window else (query_length, self.length)

    def get_seq_length(self) -> int:
        """Number of tokens read."""
        return self.length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """Make tokens wait for `crop` before they enter the sums."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens and accept those that remain. Raises SettingError for tokens in the sums."""
        if not self.is_initialized:
            return
        count, kept = abs(tokens_to_remove), self.keys.shape[2]
        if count > kept - min(self.window, self.length - count) and count and kept < self.length:
            raise SettingError(f"cannot remove {count} tokens", next="call activate_past_recording first")
        self.keys, self.values = self.keys[:, :, : kept - count], self.values[:, :, : kept - count]
        self.length -= count
        self.sink_keys, self.sink_values = (each[:, :, : self.length] for each in (self.sink_keys, self.sink_values))
        self.settled = max(0, kept - count - self.window)

    def reset(self) -> None:
        """Forget the text."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row the content of another."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda tensor: tensor[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values", "sink_keys", "sink_values"):
            setattr(self, name, change(getattr(self, name)))
        if self.sums is not None:
            mass_BGF = self.sums.mass_BGF
            self.sums = Sums(change(self.sums.state_BGFE), None if mass_BGF is None else change(mass_BGF))

    def with_kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the kept tokens, followed by new ones."""
        if not self.keys.shape[2]:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def keep(self, keys: Tensor, values: Tensor, left: int, count: int) -> None:
        """Keep all tokens but the first `left`, in new storage, after `count` more tokens were read."""
        self.keys, self.values = (each[:, :, left:].clone() if left else each for each in (keys, values))
        self.length += count


STATIC_LAYER_TYPE_MAPPING[LINEAR_LAYER] = LinearLayer  # its size is fixed: a static cache is the same
