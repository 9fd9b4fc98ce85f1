"""A checkpoint read with more decoder layers that compute the same: block expansion.

An added layer is a copy of the layer behind it whose output projections (o of both attentions, and the last map of the
MLP) are zero, so it adds nothing to the residual stream until it is trained (LLaMA Pro, Wu et al. 2024, arXiv
2401.02415, where the copy stands behind the layer). Of L layers deepened to N, layer l is layer `floor(l L / N)` of the
source, and of the layers with the same number, the last is that layer itself:

    L = 2, N = 6:    0+ 0+ 0 1+ 1+ 1        L = 4, N = 6:    0+ 0 1 2+ 2 3        (+: added)

Where k L / N is a whole number, the last of every k layers is thus a layer of the source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from kvfold.contracts.family import Expressed, Family, Json, with_fields
from kvfold.contracts.family import Rehoused as Made
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import fingerprint
from kvfold.disk.rehoused import View
from kvfold.errors import SettingError
from kvfold.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

DEEPEST = 1024  # decoder layers


class Deepened(View):
    """A view of an encoder-decoder with this number of decoder layers, at least as many as it has."""

    def __init__(self, origin: Checkpoint, layers: int) -> None:
        self._layers = layers
        super().__init__(origin, _made(origin, layers))

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return Deepened, (self._origin, self._layers)

    def hash(self, progress: Progress = SILENT) -> str:
        """The content hash of the source, and the depth: the layers that calibration measures are other ones."""
        return fingerprint([self.origin.hash(progress), self._layers])


def deeper(config: Json, family: Family, shape: Shape, layers: int, where: str) -> dict[str, Any]:
    """The config.json of a source with this number of decoder layers.

    Raises SettingError for fewer layers than it has, and for a source whose layers cannot be copied.
    """
    if not family.depth:
        raise SettingError(f"no decoder layers can be added to family {family.name}", where=where, got=layers)
    if family.body.post_norm:
        raise SettingError(
            "norms stand behind the branches of this decoder, so an added layer would change its output",
            where=where,
            got=f"model_type {config['model_type']}",
        )
    if config["model_type"] != shape.model_type:
        raise SettingError(
            "layers are added to a stock model, and the source is a student",
            where=where,
            got=f"model_type {config['model_type']}",
            next="add them in its first conversion",
        )
    if not shape.num_layers <= layers <= DEEPEST:
        allowed = f"{shape.num_layers} (those of the source) to {DEEPEST}"
        raise SettingError("decoder_layers is out of range", where=where, got=layers, allowed=allowed)
    return with_fields(config, {family.depth: layers})


def _made(origin: Checkpoint, layers: int) -> Made:
    """The deeper config.json, and where its tensors come from."""
    family, body, before = origin.family, origin.family.body, origin.shape
    config = deeper(origin.config, family, before, layers, origin.name)
    after, count = family.shape(config), before.num_layers
    inside = {name: name.removeprefix(f"{body.layers}.").partition(".") for name in origin.names()}
    of_layer: dict[str, list[str]] = {}  # the paths below each layer
    tensors: dict[str, Expressed] = {}
    for name, (number, _, path) in inside.items():
        if name.startswith(f"{body.layers}."):
            of_layer.setdefault(number, []).append(path)
        else:
            tensors[name] = Expressed((name,), origin.spec(name).shape)
    for layer in range(layers):
        copied = layer * count // layers
        added = layer + 1 < layers and (layer + 1) * count // layers == copied
        sites = [(Site(copied, kind), Site(layer, kind)) for kind in ("self", "cross")]
        outputs = [family.tensor(site, "o").rpartition(".")[0] for site, _ in sites]
        outputs.append(body.inside(copied, str(body.mlp["down"])))
        lacking = {  # T5's table of distances, which is in the first layer alone
            name
            for old, new in sites
            for name, roles in family.stored(old, before.sites[old]).items()
            if not set(roles) <= after.sites[new].roles().keys()
        }
        for path in of_layer[str(copied)]:
            name = body.inside(copied, path)
            if name not in lacking:
                silent = added and name.rpartition(".")[0] in outputs
                shape = origin.spec(name).shape
                tensors[body.inside(layer, path)] = Expressed((name,), shape, _zeros if silent else None)
    return Made(config, tensors)


def _zeros(weights: Tensor) -> Tensor:
    return weights.new_zeros(weights.shape)
