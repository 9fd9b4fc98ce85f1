"""A decoder that runs one layer at a time, with only the weights of that layer in memory.

The model is transformers' own, which computes masks and rotation. It is built on the meta device with the checkpoint's
`config.json`; all layers but the open one return their input. So a layer keeps its number and every setting that
depends on it: sliding or full attention, and its own settings (`per_layer_config`) if the architecture reads them.
Shared keys and values are stored on disk, row by row, until the layers that read them run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.disk.ahead import Ahead
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.spool import Spool
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.hf.attention import NAME
from kvfold.hf.hooks import hooked
from kvfold.hf.loading import build, check_tensors
from kvfold.hf.shared_layers import STATES, SharedStates


class Layers:
    """The layers of a decoder checkpoint, opened one by one: `hidden = layers.open(n).run(hidden)`, from `embed` on.

    `attention` is as in `hf.load`. `lengths` are the lengths of the rows that will be read; they are needed if layers
    share keys and values. `in_turn` is the number of layers that will be opened one after the other: where a GPU
    computes, the next of them is read ahead into the memory of the host. With either, `Layers` must be used as a
    context manager.

    Raises CheckpointError if the tensors are not exactly those of the architecture, SettingError for an unknown
    `dtype`, and UnsupportedModel if anything between the layers, or behind them but the last norm, changes the hidden
    states.
    """

    def __init__(
        self,
        source: Checkpoint,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = NAME,
        lengths: Sequence[int] = (),
        in_turn: int = 0,
    ) -> None:
        self.source, self.device, self.in_turn = source, torch.device(device), in_turn
        with torch.device("meta"):
            whole = build(source.config, seed=0, attention=attention, dtype=dtype)
        self.dtype = next(whole.parameters()).dtype
        self._body = source.family.body
        if source.family.encoder_decoder:
            what = f"{source.config['model_type']} is not a decoder: it cannot be read layer by layer"
            raise UnsupportedModel(what, where=source.path)
        path = self._body.layers.rpartition(".")[0]
        self._base, self.prefix = cast(Any, whole.get_submodule(path)).eval(), f"{path}."
        self._verify()
        self._embedding = cast(Any, whole.get_submodule(self._body.embedding))
        for path in (self._body.embedding, self._body.norm):
            whole.set_submodule(path, nn.Identity())
        self._layers = cast(nn.ModuleList, whole.get_submodule(self._body.layers))
        self._unread = list(self._layers)  # on the meta device
        for number in range(len(self)):
            self._layers[number] = Through()
        # without its rows, which are read when they are needed
        self._embedding.weight, self._embedding.padding_idx = nn.Parameter(self._embedding.weight[:0]), None
        for module in (self._base, self._embedding):
            self._fill_buffers(module)
        before = {
            name: source.read(self.prefix + name).to(self.device, self.dtype)
            for name, _ in self._base.named_parameters()
        }
        self._base.load_state_dict(before, strict=False, assign=True)  # such as learned positions
        self._probe()
        self._open = ExitStack()
        self._ahead = Ahead(source) if in_turn and _computes_faster_than_it_reads(self.device) else None
        if self._ahead is not None:
            self._open.callback(self._ahead.close)
        self._shared = _Shared(source.shape, lengths, dtype, self._open) if source.shape.owners else None

    def __len__(self) -> int:
        return len(self._unread)

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The input of layer 0, `hidden_BTD`. Only the rows of these ids are read from the embedding."""
        weight_VD = self.source.read(f"{self._body.embedding}.weight")
        rows_ND = weight_VD[ids_BT.flatten().to(weight_VD.device)].to(self.device, self.dtype)
        self._embedding.weight = nn.Parameter(rows_ND, requires_grad=False)
        return _forward(self._base, self._embedding(torch.arange(len(rows_ND), device=self.device).view(ids_BT.shape)))

    def open(self, number: int) -> Layer:
        """Read layer `number` into memory, where it stays as long as the Layer exists.

        Its weights are a copy that can be changed, and they require no gradient.
        """
        unread = self._unread[number]
        module = copy.deepcopy(unread, {id(self._base.config): self._base.config}).to_empty(device=self.device)
        path, read = f"{self._body.inside(number)}.", self._ahead or self.source
        for name, tensor in module.state_dict().items():
            tensor.copy_(read.parameter(path + name, tensor.shape).to(self.device))
        if self._ahead is not None and number + 1 < self.in_turn:
            above = f"{self._body.inside(number + 1)}."
            shapes = {above + name: each.shape for name, each in self._unread[number + 1].state_dict().items()}
            self._ahead.start(shapes)
        self._fill_buffers(module)
        self._split(number, path, module)
        return Layer(self._base, self._layers, number, path, module.requires_grad_(False).eval(), self._shared)

    def _verify(self) -> None:
        """Compare names and shapes of the weights with the architecture's, from headers alone."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._base.state_dict().items():
            wanted |= self.source.forms(self.prefix + name, tuple(tensor.shape))
        there = {
            name: tuple(self.source.spec(name).shape)
            for name in self.source.names()
            if name.startswith(self.prefix) and not name.endswith("rotary_emb.inv_freq")  # kept by old checkpoints
        }
        check_tensors(
            self.source.path,
            missing=wanted.keys() - there.keys(),
            unexpected=there.keys() - wanted.keys(),
            mismatched={name for name in wanted.keys() & there.keys() if wanted[name] != there[name]},
        )

    def _split(self, number: int, path: str, module: nn.Module) -> None:
        """Give each role of a packed map a linear module of its own."""
        family, site = self.source.family, Site(number)
        for role in (*self.source.shape.sites[site].roles(), *family.body.mlp):
            name, packed = family.tensor(site, role).removeprefix(path).rpartition(".")[0], family.packed(role)
            if packed is not None and not isinstance(module.get_submodule(name), Split):
                attention = self.source.shape.sites[site]
                module.set_submodule(name, Split(packed, module.get_submodule(name), attention))

    def _fill_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no checkpoint stores, such as rotary frequencies, as transformers does after loading."""
        for each in module.modules():
            unsaved = {name: each._buffers[name] for name in each._non_persistent_buffers_set}
            if not any(tensor is not None for tensor in unsaved.values()):
                continue
            if any(tensor is not None and tensor.is_meta for tensor in unsaved.values()):
                each.to_empty(device=self.device, recurse=False)
            for tensor in each.buffers(recurse=False):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # a buffer that is not computed is then detected
            self._base._init_weights(each)
            if not all(bool(tensor.isfinite().all()) for tensor in each.buffers(recurse=False)):
                raise UnsupportedModel(
                    f"buffers of {type(each).__name__} cannot be computed from config.json", where=self.source.path
                )

    def _probe(self) -> None:
        """Refuse a model that scales or mixes hidden states between or behind its layers: its output would differ."""
        hidden_BTD = torch.arange(2.0 * self.source.shape.hidden_size, device=self.device).to(self.dtype)
        hidden_BTD = hidden_BTD.view(1, 2, -1)
        with entering(self._layers[0], hidden_BTD):
            left_BTD = _forward(self._base, hidden_BTD)
        if not torch.equal(left_BTD, hidden_BTD):
            raise UnsupportedModel(
                f"{self.source.config['model_type']} changes hidden states between its layers or behind them: "
                "it cannot be read layer by layer",
                where=self.source.path,
            )


class Layer:
    """One layer in memory; several layers of the same `Layers` may be open."""

    def __init__(
        self, base: Any, layers: nn.ModuleList, number: int, path: str, module: nn.Module, shared: _Shared | None
    ) -> None:
        self._base, self._layers, self.number, self.path = base, layers, number, path
        self._module, self._shared = module, shared

    def run(self, hidden_BTD: Tensor, row: int = 0) -> Tensor:
        """The next hidden states `hidden_BTD` of rows without padding, causal, with the layer's own window.

        `row` is the number of the first row: shared keys and values are stored under it.
        """
        first = next(self._module.parameters())
        hidden_BTD = hidden_BTD.to(first.device, first.dtype)
        through = self._layers[self.number]
        self._layers[self.number] = self._module
        try:
            with entering(self._module, hidden_BTD):
                if self._shared is None:
                    return _forward(self._base, hidden_BTD)
                states = self._shared.read(self.number, row, hidden_BTD)
                try:
                    return _forward(self._base, hidden_BTD, **{STATES: states})
                finally:  # also of a run that ends with its attention
                    self._shared.write(self.number, row, states)
        finally:
            self._layers[self.number] = through

    def module(self, path: str) -> nn.Module:
        """The module at a path below the layer, such as `mlp.down_proj`. Raises SettingError if there is none."""
        try:
            return self._module.get_submodule(path)
        except AttributeError as error:
            raise SettingError(f"layer {self.number} has no module {path}", where=self.path.rstrip(".")) from error

    def weight(self, name: str) -> Tensor:
        """The weight of a linear map by its name in the checkpoint, as it is stored there."""
        owner = self.owner(name.rpartition(".")[0])
        return owner.stored() if isinstance(owner, Split) else owner.get_parameter("weight")

    def write(self, name: str, weight: Tensor) -> None:
        """Replace the weight of a linear map."""
        owner = self.owner(name.rpartition(".")[0])
        if isinstance(owner, Split):
            owner.store(weight)
        else:
            owner.get_parameter("weight").copy_(weight)

    def owner(self, name: str) -> nn.Module:
        """The module that holds a tensor of the checkpoint (`model.layers.3.self_attn.k_proj.weight`) or has this name.

        Names are those of the whole model, as in a family's `tensor` and `module`. Raises SettingError for a name of
        another layer.
        """
        if not name.startswith(self.path):
            raise SettingError(f"{name} is not of layer {self.number}", where=self.path.rstrip("."))
        below = name.removeprefix(self.path)
        holder, _, last = below.rpartition(".")
        if self.module(holder)._parameters.get(last) is not None:
            return self.module(holder)
        return self.module(below)


class Split(nn.Module):
    """A packed map as one linear module for each of its roles, whose outputs it joins."""

    def __init__(self, packed: Packed, stock: Any, attention: Attention) -> None:
        super().__init__()
        self.packed, self.attention, self.linear = packed, attention, {}
        for role in packed.roles:
            weight = packed.part(stock.weight, role, attention).contiguous()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=stock.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight)
            if stock.bias is not None:
                linear.bias = nn.Parameter(packed.part(stock.bias, role, attention))
            self.linear[role] = linear
            self.add_module(role, linear)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The output of the packed map, (B, T, N)."""
        rows = {role: linear(x_BTD).movedim(-1, 0) for role, linear in self.linear.items()}
        return self.packed.joined(rows, self.attention).movedim(0, -1)

    def stored(self) -> Tensor:
        """The weight of the packed map."""
        weights: dict[str, Tensor] = {role: linear.weight for role, linear in self.linear.items()}
        return self.packed.whole(weights, self.attention)

    def store(self, weight: Tensor) -> None:
        """Take over the weight of a packed map."""
        for role, linear in self.linear.items():
            linear.weight.copy_(self.packed.part(weight, role, self.attention))


class _Shared:
    """Keys and values of the owners, on disk by row: `k` and `v` of all heads, concatenated."""

    def __init__(self, shape: Shape, lengths: Sequence[int], dtype: str, stack: ExitStack) -> None:
        self.sources = {site.layer: attention.source for site, attention in shape.sites.items()}
        self.head_dim = next(iter(shape.sites.values())).head_dim
        self.spools = {
            owner: stack.enter_context(Spool(lengths, width, dtype)) for owner, width in shape.owners.items()
        }

    def read(self, layer: int, row: int, hidden_BTD: Tensor) -> SharedStates:
        """The keys and values that a layer receives for these rows: its owner's, or none."""
        states = SharedStates()
        source = self.sources[layer]
        if source is not None:
            both_BSN = self.spools[source].read(row, hidden_BTD.shape[0]).to(hidden_BTD)
            heads_BGSE = both_BSN.view(*both_BSN.shape[:2], -1, self.head_dim).transpose(1, 2)
            key_BGSE, value_BGSE = heads_BGSE.chunk(2, dim=1)
            states[source] = key_BGSE, value_BGSE
        return states

    def write(self, layer: int, row: int, states: Any) -> None:
        """Store an owner's keys and values of these rows."""
        if layer in self.spools and layer in states:
            both_BGSE = torch.cat(states[layer], dim=1)
            self.spools[layer].write(row, both_BGSE.transpose(1, 2).flatten(2))


@contextmanager
def entering(layer: nn.Module, hidden_BTD: Tensor) -> Iterator[None]:
    """A context in which a layer reads these hidden states instead of those that the model passes to it."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return (hidden_BTD, *args[1:]), kwargs

    with hooked(layer.register_forward_pre_hook(replace, with_kwargs=True)):
        yield


def _computes_faster_than_it_reads(device: torch.device) -> bool:
    """Whether the time that a layer is read is worth saving.

    A layer reads 2 bytes and computes 2 operations a token for each of its weights. For 65,536 tokens, a processor at
    0.5 TFLOP/s and a disk at 1 GB/s need 130 times as long for the computing as for the reading; a GPU at 50 TFLOP/s
    needs about as long for the one as for the other. The second is arithmetic, not measured.
    """
    return device.type != "cpu"


class Through(nn.Module):
    """A layer that returns its input, in place of the layers that do not run."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return `hidden_states` unchanged."""
        return hidden_states


def _forward(base: Any, hidden_BTD: Tensor, **more: Any) -> Tensor:
    return cast(Tensor, base(inputs_embeds=hidden_BTD, use_cache=False, **more).last_hidden_state)
