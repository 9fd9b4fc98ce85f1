"""The parts of a layer that join the residual stream one after the other: its attentions, and its MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvfold import hf
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.repair.mlp import slope
from kvfold.repair.residual import Norm, Residual


class AttentionPart:
    """One attention of a layer, and the modules in it that a repair reads or changes."""

    def __init__(self, layer: hf.Layer, checkpoint: Checkpoint, site: Site) -> None:
        family, body = checkpoint.family, checkpoint.family.body
        self.layer, self.site, self.shape = layer, site, checkpoint.shape.sites[site]
        self.module = layer.owner(family.module(site))
        roles = self.shape.roles()  # a student of mla may have no single map of queries
        self.q = layer.owner(family.alone(site, "q")) if "q" in roles else None
        self.o = layer.owner(family.alone(site, "o"))
        offset, normed = self.shape.norm_offset, self.shape.norms != "none"
        self.q_norm = Norm(layer.owner(family.tensor(site, "q_norm")), offset) if normed else None
        after = Norm(layer.module(body.after[site.kind]), offset) if site.kind in body.after else None
        factor = float(checkpoint.config.get(body.residual, 1.0))
        self.residual = Residual(self.module, after, factor, body.post_norm)


class LayerParts:
    """One layer of one model."""

    def __init__(self, layer: hf.Layer, checkpoint: Checkpoint) -> None:
        family, body = checkpoint.family, checkpoint.family.body
        sites = [Site(layer.number), Site(layer.number, "cross")]
        self.layer = layer
        self.attentions = [AttentionPart(layer, checkpoint, site) for site in sites if site in checkpoint.shape.sites]
        self.mlp: dict[str, Any] = {
            part: layer.owner(family.alone(sites[0], part)) if part in REPAIRABLE else layer.module(str(path))
            for part, path in body.mlp.items()
        }
        if self.mlp:
            first = self.attentions[0]
            norm = Norm(layer.module(body.after["mlp"]), first.shape.norm_offset) if "mlp" in body.after else None
            self.residual = Residual(self.mlp["down"], norm, first.residual.factor, body.post_norm)

    def attend(self, part: AttentionPart, hidden_BTD: Tensor, row: int) -> tuple[Tensor, hf.Attended]:
        """The residual stream before an attention, and the attention, on hidden states of the rows from `row` on."""
        rotated = part.shape.rope.dims if part.shape.rope else 0
        with self._joining(hidden_BTD) as streams:
            seen = hf.attend(self.layer, part.module, part.o, hidden_BTD, row, rotated)
        return streams[self.attentions.index(part)], seen

    def streams(self, hidden_BTD: Tensor, row: int) -> list[Tensor]:
        """The residual stream after each attention, and after the layer."""
        with self._joining(hidden_BTD) as streams:
            above_BTD = self.layer.run(hidden_BTD, row)
        return [*streams[1:], above_BTD]

    def before_mlp(self, hidden_BTD: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the input of the MLP, which does not run."""
        seen: dict[str, Tensor] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]
            raise _Done

        first = self.mlp.get("gate", self.mlp["up"])
        with (
            self._joining(hidden_BTD) as streams,
            hf.hooked(first.register_forward_pre_hook(stop)),
            suppress(_Done),
        ):
            self.layer.run(hidden_BTD, row)
        return streams[-1], seen["x"]

    @contextmanager
    def _joining(self, hidden_BTD: Tensor) -> Iterator[list[Tensor]]:
        """The residual stream before the layer, and as it runs, after each attention that has run."""
        streams = [hidden_BTD]

        def watched(residual: Residual) -> RemovableHandle:
            def see(module: nn.Module, args: Any, result: Any) -> None:
                streams.append(residual.behind(streams[-1], result[0] if isinstance(result, tuple) else result))

            return residual.last.register_forward_hook(see)

        with hf.hooked(*(watched(part.residual) for part in self.attentions)):
            yield streams

    def inner(self, x_BTD: Tensor) -> Tensor:
        """The input of `down`."""
        return self.inner_and_slopes(x_BTD, ())[0]

    def inner_and_slopes(self, x_BTD: Tensor, roles: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """The input of `down`, and for each role the factor of its outputs on their way to `down`."""
        x_BTD, act = x_BTD.to(self.mlp["up"].weight), self.mlp["act"]
        up_BTF: Tensor = self.mlp["up"](x_BTD)
        if "gate" not in self.mlp:
            return act(up_BTF), [slope(act, up_BTF, torch.ones_like(up_BTF), "gate") for _ in roles]
        gate_BTF = self.mlp["gate"](x_BTD)
        return act(gate_BTF) * up_BTF, [slope(act, gate_BTF, up_BTF, role) for role in roles]


class _Done(Exception):
    """What is looked for has been seen: the rest of the layer need not be computed."""
