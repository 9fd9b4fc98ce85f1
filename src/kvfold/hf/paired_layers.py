"""The decoder of an encoder-decoder, one layer at a time: `hidden = layers.open(n).run(hidden, row)`.

The model is transformers' own and in memory whole. The encoder reads each row once; its output is kept on disk, where
cross-attentions find it by the number of the row. All layers but the open one return their input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import BaseModelOutput

from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.spool import Spool
from kvfold.hf.encoder_decoder import silenced
from kvfold.hf.fusion import read_alone
from kvfold.hf.hooks import hooked
from kvfold.hf.layers import Layer, entering
from kvfold.hf.loading import filled


class PairedLayers(ExitStack):
    """The layers of a decoder that reads an encoder's output; a context manager.

    `encoded` are the lengths of the encoder's output of all rows, which are not padded. Raises CheckpointError if the
    tensors are not exactly those of the architecture, and OutputError if the disk has no room.
    """

    def __init__(self, source: Checkpoint, encoded: Sequence[int], *, device: str, attention: str) -> None:
        super().__init__()
        self.source, self.device = source, torch.device(device)
        self.model: Any = filled(source, device=device, attention=attention).requires_grad_(False)
        width = source.shape.sites[source.shape.crossed[0]].input_width
        self.encoded = self.enter_context(Spool(encoded, width, device=self.device))
        body = source.family.body
        self._stack: Any = self.model.get_submodule(body.layers.rpartition(".")[0])
        self._shown = cast(nn.ModuleList, self.model.get_submodule(body.layers))
        self._layers, self._beside, self._lengths = list(self._shown), list[Any](), (0, 0)
        for number in range(len(self._layers)):
            self._shown[number] = _Through(self._beside)

    def __len__(self) -> int:
        return len(self._layers)

    def embed(self, row: int, given: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
        """The input of layer 0, `hidden_BTD`, of the rows from `row` on, whose encoder reads what is `given`.

        No row is padded, except passages of one row.
        """
        seen: dict[str, Tensor] = {}
        read = read_alone(self.model, given)
        self.encoded.write(row, read["encoder_outputs"].last_hidden_state)

        def enter(module: nn.Module, args: Any) -> None:
            seen["hidden"] = args[0]
            raise _Done

        with hooked(self._shown[0].register_forward_pre_hook(enter)), suppress(_Done):
            self.model(**read, decoder_input_ids=ids_BT, use_cache=False)
        return seen["hidden"]

    def open(self, number: int) -> PairedLayer:
        """A layer, whose weights can be changed."""
        path = f"{self.source.family.body.inside(number)}."
        return PairedLayer(self._stack, self._shown, number, path, self._layers[number], self)

    def run(self, number: int, hidden_BTD: Tensor, row: int) -> Tensor:
        """The output of a layer on hidden states of the rows from `row` on."""
        encoded_BSD = self.encoded.read(row, len(hidden_BTD))
        hidden_BTD = hidden_BTD.to(encoded_BSD)
        self._hand_on(number, hidden_BTD, encoded_BSD)
        above_BTD: Tensor = self._outputs(number, hidden_BTD, encoded_BSD)[0]
        return above_BTD

    def logits(
        self,
        first: int,
        hidden_BTD: Tensor,
        row: int,
        ids_BT: Tensor,
        tensors: Mapping[str, Tensor] = {},
        removed: Collection[Site] = (),
    ) -> Tensor:
        """The model's logits from hidden states before layer `first`, with these tensors in place of its own.

        They are those without the cross-attentions `removed`, of layers from `first` on.
        `first` may be the number of layers: the hidden states are then those behind the last.
        """
        encoded_BSD = self.encoded.read(row, len(hidden_BTD))
        self._hand_on(first, hidden_BTD, encoded_BSD)
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded_BSD), "decoder_input_ids": ids_BT}
        with (
            self._showing(range(first, len(self))),
            entering(self._shown[min(first, len(self) - 1)], hidden_BTD),
            silenced(self._stack, self.source.family, removed),
        ):
            run: Any = functional_call(self.model, dict(tensors), (), {**given, "use_cache": False})
        logits_BTV: Tensor = run.logits
        return logits_BTV

    @contextmanager
    def _showing(self, numbers: Sequence[int]) -> Iterator[None]:
        """A context in which these layers run, and no others."""
        before = {number: self._shown[number] for number in numbers}
        for number in numbers:
            self._shown[number] = self._layers[number]
        try:
            yield
        finally:
            for number, through in before.items():
                self._shown[number] = through

    def _hand_on(self, number: int, hidden_BTD: Tensor, encoded_BSD: Tensor) -> None:
        """Prepare what a layer reads beside hidden states, which depends on the lengths of rows alone."""
        lengths = (hidden_BTD.shape[1], encoded_BSD.shape[1])
        if number and lengths != self._lengths:
            self._beside[:] = self._outputs(0, hidden_BTD, encoded_BSD)[1:]
            self._lengths = lengths

    def _outputs(self, number: int, hidden_BTD: Tensor, encoded_BSD: Tensor) -> tuple[Any, ...]:
        """All outputs of a layer. The model computes its masks and rotation, and stops behind it."""
        seen: list[Any] = []

        def after(module: nn.Module, args: Any, result: Any) -> None:
            seen.append(result)
            raise _Done

        layer = self._layers[number]
        with (
            hooked(layer.register_forward_hook(after)),
            self._showing([number]),
            entering(layer, hidden_BTD),
            suppress(_Done),
        ):
            self._stack(inputs_embeds=hidden_BTD, encoder_hidden_states=encoded_BSD, use_cache=False)
        return seen[0] if isinstance(seen[0], tuple) else (seen[0],)


class PairedLayer(Layer):
    """One layer of `PairedLayers`."""

    def __init__(
        self, stack: Any, shown: nn.ModuleList, number: int, path: str, module: nn.Module, owner: PairedLayers
    ) -> None:
        super().__init__(stack, shown, number, path, module, None)
        self._owner = owner

    def run(self, hidden_BTD: Tensor, row: int = 0) -> Tensor:
        """The next hidden states `hidden_BTD` of rows without padding, the first of which is number `row`."""
        return self._owner.run(self.number, hidden_BTD, row)


class _Through(nn.Module):
    """A layer that does not run. What the first layer puts out beside hidden states, such as T5's bias, serves all."""

    def __init__(self, beside: list[Any]) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Return `hidden_states` unchanged."""
        return (hidden_states, *self.beside) if self.beside else hidden_states


class _Done(Exception):
    """What is looked for has been seen: the rest of the model need not be computed."""
