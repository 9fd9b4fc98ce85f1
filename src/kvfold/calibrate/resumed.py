"""The teacher on a few rows, resumed at a layer: hidden states before it do not change, so they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

from kvfold.disk.checkpoint import Checkpoint


@dataclass(frozen=True)
class Changed:
    """A change of the teacher, by the names of tensors and modules."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # in place of its own
    reads: Mapping[str, str] = field(default_factory=dict)  # modules that put out what another module did
    averaged: Mapping[str, slice] = field(default_factory=dict)  # columns of a module's input -> their means


class Resumed:
    """The teacher in float32 on batches `ids_BT`: hidden states before a layer, and after the last, not normed."""

    def __init__(self, source: Checkpoint, batches: Sequence[Tensor], device: str) -> None:
        from kvfold import hf  # loads transformers, which answers from the cache do not need

        self.through, self.entering = hf.Through, hf.entering
        model: Any = hf.load_source(source, device=device)
        self.model, self.body = model, source.family.body
        self.shown = model.get_submodule(self.body.layers)
        self.layers, self.norm = list(self.shown), model.get_submodule(self.body.norm)
        self.ids, embed = [ids_BT.to(device) for ids_BT in batches], model.get_input_embeddings()
        self._show(0, 0, nn.Identity())
        self.hidden = [self._states(embed(ids_BT)) for ids_BT in self.ids]
        self._show(0, len(self.layers), nn.Identity())
        self.final = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
        self.at = 0

    def advance(self, layer: int) -> None:
        """Go to a layer, which `hidden` enters then. Layers come in ascending order."""
        if self.at < layer:
            self._show(self.at, layer, nn.Identity())
            self.hidden = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
            self.at = layer

    def own(self, final_BTD: Tensor, last: int) -> Tensor:
        """The teacher's logits of the last tokens of each row (0: of all), from hidden states after the last layer."""
        return self._logits(len(self.layers), final_BTD, Changed(), last)

    def changed(self, hidden_BTD: Tensor, change: Changed, last: int) -> Tensor:
        """Logits of the last tokens of each row (0: of all), from hidden states before the layer where it stands."""
        return self._logits(self.at, hidden_BTD, change, last)

    def _logits(self, layer: int, hidden_BTD: Tensor, change: Changed, last: int) -> Tensor:
        self._show(layer, len(self.layers), self.norm)
        tensors = {name: tensor.to(hidden_BTD) for name, tensor in change.tensors.items()}
        given = {"inputs_embeds": hidden_BTD, "use_cache": False, "logits_to_keep": last}
        with self._hooked(change), self.entering(self.entered, hidden_BTD):
            logits_BTV: Tensor = functional_call(self.model, tensors, (), given).logits
        return logits_BTV

    def _show(self, first: int, end: int, norm: nn.Module) -> None:
        """Run the layers from `first` to before `end`, and pass hidden states through the others."""
        for number, layer in enumerate(self.layers):
            self.shown[number] = layer if first <= number < end else self.through()
        self.entered = self.shown[min(first, len(self.layers) - 1)]
        self.model.set_submodule(self.body.norm, norm)

    def _states(self, embedded_BTD: Tensor) -> Tensor:
        """The output of what is shown, without the head."""
        return cast(Tensor, self.model.base_model(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state)

    def _run(self, hidden_BTD: Tensor) -> Tensor:
        """The output of the shown layers, which hidden states enter."""
        with self.entering(self.entered, hidden_BTD):
            return self._states(hidden_BTD)

    @contextmanager
    def _hooked(self, change: Changed) -> Iterator[None]:
        """A context in which modules share outputs and read means; keys are shared before rotation, too."""
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, owner in change.reads.items():
            module, other = self.model.get_submodule(name), self.model.get_submodule(owner)
            handles += [
                other.register_forward_hook(lambda *seen, owner=owner: outputs.update({owner: seen[2]})),
                module.register_forward_hook(lambda *seen, owner=owner: outputs[owner]),
            ]
        for name, columns in change.averaged.items():
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(_average, columns=columns)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _average(_: nn.Module, given: tuple[Tensor], columns: slice) -> tuple[Tensor]:
    """The input of a module with the means over each row in some columns."""
    input_BTD = given[0].clone()
    input_BTD[..., columns] = input_BTD[..., columns].mean(1, keepdim=True)
    return (input_BTD,)
