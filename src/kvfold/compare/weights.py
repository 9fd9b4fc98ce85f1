"""Weights made cheaper without training: int8 and int4 by torchao, int8 by torch itself, and magnitude pruning.

The output projection keeps its format: it is often the embedding, which is looked up.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from kvfold.errors import SettingError
from kvfold.hf.quantised import INSTALL

PRUNED = 0.5  # share of the weights that become zero


def about_int8() -> str:
    """How `int8` rounds."""
    return "torchao: weights alone" if find_spec("torchao") else "torch's dynamic quantisation: activations too"


def int8(model: Any) -> nn.Module:
    """Weights in int8 with a scale for each row, by torchao; without torchao, activations are rounded too, by torch."""
    if find_spec("torchao") is None:
        return _dynamic(model)
    with _torchao() as torchao:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=_inner(model))
    return _checked(model)


def int4(model: Any) -> nn.Module:
    """Weights in int4 with a scale for each 32 numbers of a row, by torchao. Raises SettingError without it."""
    with _torchao() as torchao:
        config = torchao.IntxWeightOnlyConfig(torch.int4, torchao.granularity.PerGroup(32))  # type: ignore[attr-defined]
        torchao.quantize_(model, config, filter_fn=_inner(model))
    return _checked(model)


def pruned(model: Any) -> nn.Module:
    """Half of all weights of linear maps, the smallest, are zero (Han et al. 2015, arXiv 1506.02626)."""
    chosen = [(module, "weight") for module in _maps(model).values()]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=PRUNED)
    for module, name in chosen:
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    return _checked(model)


def _dynamic(model: Any) -> nn.Module:
    quantization = torch.ao.quantization
    config = dict.fromkeys(_maps(model), quantization.default_dynamic_qconfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao replaces it
        made = quantization.quantize_dynamic(model, config, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        return _checked(made)


def _maps(model: Any) -> dict[str, nn.Linear]:
    """The linear maps by name, but the output projection."""
    head = model.get_output_embeddings()
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}


def _inner(model: Any) -> Any:
    chosen = set(map(id, _maps(model).values()))
    return lambda module, path: id(module) in chosen


def _checked(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def _torchao() -> Iterator[Any]:
    """torchao's quantisation. Raises SettingError if it is not installed, or refuses a model."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels for other devices are missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.quantization as found
        yield found
    except ImportError as error:
        raise SettingError("this row needs torchao", next=INSTALL) from error
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise SettingError(f"torchao: {error}") from error
