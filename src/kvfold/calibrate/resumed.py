"""The teacher on a few rows, resumed at a layer: hidden states before it do not change, so they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
    """The teacher in float32 on batches `ids_BT`: their hidden states before a layer, and after the last norm."""

    def __init__(self, source: Checkpoint, batches: Sequence[Tensor], device: str) -> None:
        from kvfold import hf  # loads transformers, which answers from the cache do not need

        self.through = hf.Through
        model: Any = hf.load(source.path, device=device)
        self.model, self.head, self.body = model, model.get_output_embeddings(), source.family.body
        self.shown = model.get_submodule(self.body.layers)
        self.layers, self.norm = list(self.shown), model.get_submodule(self.body.norm)
        embed = model.get_input_embeddings()
        self.ids = [ids_BT.to(device) for ids_BT in batches]
        self.hidden = [embed(ids_BT) for ids_BT in self.ids]
        self.final = [self.run(hidden_BTD) for hidden_BTD in self.hidden]
        self.at = 0

    def advance(self, layer: int) -> None:
        """Go to a layer, from which `run` computes. Layers come in ascending order."""
        if self.at < layer:
            self._show(self.at, layer, nn.Identity())
            self.hidden = [self.run(hidden_BTD) for hidden_BTD in self.hidden]
            self.at = layer
        self._show(layer, len(self.layers), self.norm)

    def run(self, hidden_BTD: Tensor, changed: Changed = Changed()) -> Tensor:
        """The output of the last norm, for hidden states before the layer at which it stands."""
        prefix = f"{self.model.base_model_prefix}."
        tensors = {name.removeprefix(prefix): tensor.to(hidden_BTD) for name, tensor in changed.tensors.items()}
        given = {"inputs_embeds": hidden_BTD, "use_cache": False}
        with self._hooked(changed):
            out_BTD: Tensor = functional_call(self.model.base_model, tensors, (), given).last_hidden_state
        return out_BTD

    def _show(self, first: int, end: int, norm: nn.Module) -> None:
        """Run the layers from `first` to before `end`, and pass hidden states through the others."""
        for number, layer in enumerate(self.layers):
            self.shown[number] = layer if first <= number < end else self.through()
        self.model.set_submodule(self.body.norm, norm)

    @contextmanager
    def _hooked(self, changed: Changed) -> Iterator[None]:
        """A context in which modules share outputs and read means; keys are shared before rotation, too."""
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, owner in changed.reads.items():
            module, other = self.model.get_submodule(name), self.model.get_submodule(owner)
            handles += [
                other.register_forward_hook(lambda *seen, owner=owner: outputs.update({owner: seen[2]})),
                module.register_forward_hook(lambda *seen, owner=owner: outputs[owner]),
            ]
        for name, columns in changed.averaged.items():
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
