"""Caches of 4 and 2 bits by hqq (half-quadratic quantisation), which transformers decodes with.

Numbers are rounded in groups of `GROUP`, each with a scale and an offset. hqq is the extra `kvfold[compare]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer, QuantizedCache

from kvfold.errors import SettingError

GROUP = 64
INSTALL = "pip install 'kvfold[compare]'"


def hqq_cache(config: object, bits: int) -> QuantizedCache:
    """An empty cache of `bits` bits, whose latest tokens, up to 128, wait unquantised.

    Raises SettingError without hqq, and ValueError for layers that it cannot hold.
    """
    try:
        return QuantizedCache("hqq", config, nbits=bits, q_group_size=GROUP)
    except ImportError as error:
        raise SettingError(f"the int{bits} cache needs hqq", next=INSTALL) from error


def through_hqq(bits: int, heads_BGSE: Tensor) -> Tensor:
    """Round every token to `bits` bits, as that cache does; zeros fill the last group.

    Raises SettingError without hqq.
    """
    flat_1N = heads_BGSE.reshape(1, -1)
    padded_1N = torch.nn.functional.pad(flat_1N, (0, -flat_1N.shape[1] % GROUP))
    try:
        layer = HQQQuantizedLayer(nbits=bits, q_group_size=GROUP)
    except ImportError as error:
        raise SettingError(f"the int{bits} cache needs hqq", next=INSTALL) from error
    layer.lazy_initialization(padded_1N, padded_1N)
    rounded_1N = layer._dequantize(layer._quantize(padded_1N, axis=layer.axis_key))
    made_BGSE: Tensor = rounded_1N[:, : flat_1N.shape[1]].reshape(heads_BGSE.shape).to(heads_BGSE.dtype)
    return made_BGSE
