"""The teacher on a few rows, resumed at a layer: hidden states before it do not change, so they are kept.

`Resumed` reads rows of a decoder, `ResumedPairs` inputs and targets of an encoder-decoder. Both have batches of ids
`ids_BT`, each with the hidden states before a layer and after the last, which are not normed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.text.pairs import Pairs, start_id


@dataclass(frozen=True)
class Changed:
    """A change of the teacher, by the names of tensors and modules."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # in place of its own
    reads: Mapping[str, str] = field(default_factory=dict)  # modules that put out what another module did
    averaged: Mapping[str, slice] = field(default_factory=dict)  # columns of a module's input -> their means
    removed: Collection[Site] = ()  # cross-attentions, with their branches


class Resumed(ExitStack):
    """A decoder in float32; a context manager."""

    def __init__(self, source: Checkpoint, batches: Sequence[Tensor], device: str) -> None:
        from kvfold import hf  # loads transformers, which answers from the cache do not need

        super().__init__()
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

    def own(self, batch: int, last: int) -> Tensor:
        """The teacher's logits of the last tokens (0: of all) of each row of a batch."""
        return self._logits(len(self.layers), self.final[batch], Changed(), last)

    def changed(self, batch: int, change: Changed, last: int) -> Tensor:
        """The same with a change in the layer where it stands, or above."""
        return self._logits(self.at, self.hidden[batch], change, last)

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


class ResumedPairs(ExitStack):
    """An encoder-decoder in float32, resumed at a layer of its decoder; a context manager."""

    def __init__(self, source: Checkpoint, batches: Sequence[Pairs], device: str) -> None:
        from kvfold import hf  # loads transformers, which answers from the cache do not need

        super().__init__()
        encoded = [int(row.sum()) for batch in batches for row in batch.seen_BS]
        self.layers = self.enter_context(hf.PairedLayers(source, encoded, device=device, attention=hf.ATTENTION))
        self.rows = [0, *accumulate(len(batch.target_BT) for batch in batches)]
        start = start_id(self.layers.model.config)
        self.ids, self.hidden = [batch.shifted(start).to(device) for batch in batches], list[Tensor]()
        for row, ids_BT, batch in zip(self.rows, self.ids, batches, strict=False):
            self.hidden.append(self.layers.embed(row, batch.to(device).read(torch.float32), ids_BT))
        self.final, self.at = self._through(0, len(self.layers)), 0

    def advance(self, layer: int) -> None:
        """Go to a layer of the decoder, which `hidden` enters then. Layers come in ascending order."""
        self.hidden, self.at = self._through(self.at, layer), layer

    def own(self, batch: int, last: int) -> Tensor:
        """The teacher's logits of the rows of a batch; `last` is 0, all of them."""
        return self.layers.logits(len(self.layers), self.final[batch], self.rows[batch], self.ids[batch])

    def changed(self, batch: int, change: Changed, last: int) -> Tensor:
        """The same with other tensors in the layer where it stands, or above."""
        at = (self.at, self.hidden[batch], self.rows[batch], self.ids[batch])
        tensors = {name: tensor.to(self.hidden[batch]) for name, tensor in change.tensors.items()}
        return self.layers.logits(*at, tensors, removed=change.removed)

    def _through(self, first: int, end: int) -> list[Tensor]:
        """Hidden states behind the layers from `first` to before `end`."""
        states = self.hidden
        for number in range(first, end):
            layer = self.layers.open(number)
            states = [layer.run(hidden_BTD, row) for row, hidden_BTD in zip(self.rows, states, strict=False)]
        return states


def _average(_: nn.Module, given: tuple[Tensor], columns: slice) -> tuple[Tensor]:
    """The input of a module with the means over each row in some columns."""
    input_BTD = given[0].clone()
    input_BTD[..., columns] = input_BTD[..., columns].mean(1, keepdim=True)
    return (input_BTD,)
