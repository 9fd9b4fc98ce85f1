"""Models of half the depth: layers merged in twos by their mean, and put back.

Zou et al. 2024, arXiv 2404.07999 (a multi-level framework for training). With layers `W_0 .. W_(L-1)`:

    coalesce      S_l = (W_2l + W_(2l+1)) / 2                 all other tensors stay
    de-coalesce   V_2l = V_(2l+1) = S_l
    interpolate   W_l <- (1 - a) W_l + a V_l

A layer is merged with its neighbour tensor by tensor, so head h with head h and each rotated plane with itself: the
residual stream gives all layers one basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold.disk.checkpoint import Checkpoint, save_model
from kvfold.disk.lineage import descend
from kvfold.disk.output import check_apart, disk_errors, dropped_on_error, open_output
from kvfold.disk.sidecar import carry_over
from kvfold.errors import CheckpointError, SettingError
from kvfold.progress import SILENT, Progress

COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # fields of config.json


def half_config(source: Checkpoint) -> dict[str, Any]:
    """The config.json of a decoder of half the layers. Raises SettingError where layers cannot be merged in twos."""
    layers, family = source.shape.num_layers, source.family
    if family.encoder_decoder or family.audio:
        raise SettingError("only the depth of a decoder can be halved", where=source.name, got=family.name)
    if layers % 2:
        raise SettingError("an odd number of layers cannot be halved", where=source.name, got=f"{layers} layers")
    if not family.body.mlp:
        raise SettingError("layers with experts cannot be merged: experts have no pairs", where=source.name)
    config = dict(source.config)
    for name, value in source.config.items():
        if name in COUNTS and value == layers:
            config[name] = layers // 2
        elif isinstance(value, list) and len(value) == layers:
            config[name] = value[::2]
    made = family.shape(config)
    if made.num_layers != layers // 2:
        raise SettingError("no field of config.json is the number of layers", where=source.name)
    for site, attention in source.shape.sites.items():
        if attention.source is not None or made.sites[replace(site, layer=site.layer // 2)] != attention:
            raise SettingError("layers merge in twos, and this one's attention is unlike its neighbour's", where=site)
    return config


def merged_names(names: list[str], layers: str) -> dict[str, list[str]]:
    """The tensors of a model of half the depth -> those of the whole model that each is the mean of.

    `layers` is the path of the layers.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        number, _, rest = name.removeprefix(f"{layers}.").partition(".")
        inside = name.startswith(f"{layers}.") and number.isdecimal()
        found.setdefault(f"{layers}.{int(number) // 2}.{rest}" if inside else name, []).append(name)
    return found


def merged(tensors: list[Tensor]) -> Tensor:
    """The mean of tensors, in their format; one alone is returned as it is."""
    if len(tensors) == 1:
        return tensors[0]
    mean = sum(each.float() for each in tensors) / len(tensors)
    assert isinstance(mean, Tensor)
    return mean.to(tensors[0].dtype)


def coalesced(source: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a model of half the depth. Raises SettingError for one that has no mean."""
    found: dict[str, Tensor] = {}
    for name, parts in merged_names(source.names(), source.family.body.layers).items():
        tensors = [source.read(each) for each in parts]
        if len(parts) > 1 and not tensors[0].is_floating_point():
            raise SettingError("layers with whole numbers among their weights cannot be merged", where=name)
        found[name] = merged(tensors)
    return found


def half_depth(source: Checkpoint, out: str | Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Path:
    """Write the model of half the depth to `out`, and return its path.

    Raises SettingError where layers cannot be merged, and OutputError if `out` holds something else.
    """
    config = half_config(source)
    source.require_finite(progress)
    check_apart(out, {"source": source.path})
    output = open_output(out, {"stage": "coalesce", "source": source.hash()}, overwrite=overwrite)
    if output.complete:
        return output.path
    if not output.written():
        with disk_errors(output.work), dropped_on_error(output, "model.safetensors", futile=(CheckpointError,)):
            carry_over(source.path, output.work)
            lineage = descend(source, inputs=output.inputs, stage="coalesce", settings={})
            state: Mapping[str, Tensor] = coalesced(source)
            save_model(output.work, config=config, state=state, lineage=lineage, dtype=source.shape.dtype)
    output.commit()
    return output.path
