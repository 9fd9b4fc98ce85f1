from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from kvfold import ranks
from kvfold.contracts.site import Site
from kvfold.disk import spool as spools
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.spool import Spool, spool_bytes
from kvfold.errors import CheckpointError, OutputError, SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.hf import Layers, build
from tolerance import assert_same

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama of one layer, tied": ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "llama, grouped, scaled rotation": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "mistral, window 5": (
        "llama",
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    ),
    "qwen2, windows by layer": (
        "qwen2",
        {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen2, windows by name": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "qwen3, normed q and k": ("qwen3", {"num_key_value_heads": 2}),
    "olmo2, normed behind": ("olmo2", {"num_key_value_heads": 2}),
    "gemma, scaled embedding": ("gemma", {}),
    "granite, embedding times a factor": ("granite", {"num_key_value_heads": 2}),
    "smollm3, not rotated": ("smollm3", {"no_rope_layer_interval": 2}),
    "cohere, neighbours rotate": ("cohere", {}),
    "phi, side by side": ("phi", {"num_key_value_heads": 2}),
    "phi3, packed": ("phi3", {"num_key_value_heads": 2}),
    "gpt_neox, side by side": ("gpt_neox", {}),
    "gpt_neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def source(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    family, changes = request.param
    return Checkpoint.open(tiny_checkpoint(family, tokenizer=False, **changes))


IDS_BT = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(0))


def whole(source: Checkpoint, dtype: str = "float32", attention: str = "sdpa") -> list[torch.Tensor]:
    """The input of every layer and the output of the last, before the final norm, from the model in one piece."""
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    found: list[torch.Tensor] = []
    for path in (*map(source.family.body.inside, range(source.shape.num_layers)), source.family.body.norm):
        model.get_submodule(path).register_forward_pre_hook(lambda module, given: found.append(given[0]))
    with torch.inference_mode():
        model(IDS_BT)
    return found


def check(source: Checkpoint, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two results are equal to the bit, or, where packed maps were split and round otherwise, the same."""
    if source.family.packed("q"):
        assert_same(found, expected)
    else:
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "attention"), [("float32", "sdpa"), ("float64", "eager"), ("bfloat16", "sdpa"), ("float32", "kvfold")]
)
def test_layer_by_layer_is_the_whole_model_bit_for_bit(source: Checkpoint, dtype: str, attention: str) -> None:
    expected = whole(source, dtype, attention)
    layers = Layers(source, dtype=dtype, attention=attention)
    assert len(layers) == source.shape.num_layers == len(expected) - 1
    hidden_BTD = layers.embed(IDS_BT)
    assert torch.equal(hidden_BTD, expected[0])
    for number in range(len(layers)):
        hidden_BTD = layers.open(number).run(hidden_BTD)
        check(source, hidden_BTD, expected[number + 1])


def test_layers_with_heads_of_their_own(tmp_path: Path) -> None:
    family = all_families()["qwen2"]
    shape = family.shape(family.tiny())
    mixed = {
        site: replace(shape.sites[site], num_key_value_heads=count)
        for site, count in zip(shape.sites, (4, 2, 1, 2), strict=True)
    }
    config = {**family.tiny(), **family.fields(shape.with_sites(mixed))}
    model: Any = build(config, seed=0)
    model.save_pretrained(tmp_path / "mixed")
    source = Checkpoint.open(tmp_path / "mixed")
    assert source.spec("model.layers.2.self_attn.k_proj.weight").shape == (8, 32)
    expected, layers = whole(source), Layers(source, attention="sdpa")
    for number in range(4):
        assert torch.equal(layers.open(number).run(expected[number]), expected[number + 1])


def test_the_window_is_felt(tiny_checkpoint: Callable[..., Path]) -> None:
    """That the comparison above sees a window at all: a token out of every window changes only layers without one."""
    source = Checkpoint.open(tiny_checkpoint("qwen2", tokenizer=False, **MODELS["qwen2, windows by name"][1]))
    layers = Layers(source)
    one_BTD = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0))
    two_BTD = one_BTD.clone()
    two_BTD[0, 0] += 1
    same = [
        bool(torch.equal(layers.open(number).run(one_BTD)[0, -1], layers.open(number).run(two_BTD)[0, -1]))
        for number in range(4)
    ]
    assert same == [kind == "sliding_attention" for kind in MIXED]


def test_one_layer_is_in_memory(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))
    asked: list[str] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda name: (asked.append(name), read(name))[1])
    layers = Layers(source)
    held = [tensor for tensor in [*layers._base.parameters(), *layers._base.buffers()] if not tensor.is_meta]
    assert asked == []
    assert sum(tensor.numel() for tensor in held) == 8  # rotary frequencies, twice
    layers.embed(IDS_BT)
    assert asked == ["model.embed_tokens.weight"]
    asked.clear()
    layers.open(2)
    assert asked
    assert all(name.startswith("model.layers.2.") for name in asked)


def test_a_layer_goes_with_its_last_reference(tiny_checkpoint: Callable[..., Path]) -> None:
    layers = Layers(Checkpoint.open(tiny_checkpoint("llama", tokenizer=False)))
    layer = layers.open(0)
    layer.run(layers.embed(IDS_BT))
    weights = [weakref.ref(parameter) for parameter in layer._module.parameters()]
    gc.disable()
    try:
        del layer
        assert [weight() for weight in weights] == [None] * len(weights)
    finally:
        gc.enable()


@pytest.mark.slow
def test_attention_probabilities_are_shown(source: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(IDS_BT, output_attentions=True).attentions
    layers = Layers(source, attention="eager")
    hidden_BTD = layers.embed(IDS_BT)
    for number in range(len(layers)):
        layer = layers.open(number)
        shown: list[torch.Tensor] = []
        layer.owner(source.family.module(Site(number))).register_forward_hook(
            lambda module, given, out, to=shown: to.append(out[1])
        )
        hidden_BTD = layer.run(hidden_BTD)
        check(source, shown[0], expected[number])


def test_weights_may_be_changed_and_the_file_stays(tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("qwen2", tokenizer=False))
    name = source.family.tensor(Site(1), "o")
    before = source.read(name).clone()
    layers = Layers(source)
    layer, other = layers.open(1), layers.open(2)
    hidden_BTD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    plain_BTD, other_BTD = layer.run(hidden_BTD), other.run(hidden_BTD)
    assert layer.owner(name) is layer.module("self_attn.o_proj")
    assert layer.owner(source.family.tensor(Site(1), "q_bias")) is layer.module("self_attn.q_proj")
    assert layer.owner(source.family.module(Site(1))) is layer.module("self_attn")
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        weight: Any = layer.module(path).weight
        weight.zero_()
    assert torch.equal(layer.run(hidden_BTD), hidden_BTD)  # nothing is added to the residual any more
    assert torch.equal(other.run(hidden_BTD), other_BTD)
    assert torch.equal(layers.open(1).run(hidden_BTD), plain_BTD)
    assert torch.equal(source.read(name), before)


def test_paths_and_names_that_are_not_there(tiny_checkpoint: Callable[..., Path]) -> None:
    layer = Layers(Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))).open(1)
    with pytest.raises(SettingError, match=r"model\.layers\.1: layer 1 has no module cross_attn"):
        layer.module("cross_attn")
    with pytest.raises(SettingError, match="is not of layer 1"):
        layer.owner("model.layers.11.self_attn.k_proj.weight")
    with pytest.raises(SettingError, match=r"layer 1 has no module self_attn\.k_proj\.bias"):
        layer.owner("model.layers.1.self_attn.k_proj.bias")


@pytest.mark.parametrize("problem", ["missing", "unexpected", "mismatched"])
def test_weights_of_another_architecture(problem: str, tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))
    [file] = source.files
    tensors = load_file(file)
    name = "model.layers.3.mlp.up_proj.weight"
    if problem == "unexpected":
        name = "model.layers.3.mlp.up_proj.bias"
        tensors[name] = torch.zeros(48)
    elif problem == "mismatched":
        tensors[name] = torch.zeros(32, 48)
    else:
        tensors["spare"] = tensors.pop(name)  # as many parameters as before
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{problem} tensors \(got {name}\); is config.json that of"):
        Layers(Checkpoint.open(source.path))


def test_a_model_that_scales_behind_its_layers_is_refused(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers alone would be another model."""
    source, forward = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False)), LlamaModel.forward

    def doubled(self: Any, **given: Any) -> Any:
        found = forward(self, **given)
        return replace(found, last_hidden_state=2 * found.last_hidden_state)  # type: ignore[type-var]

    monkeypatch.setattr(LlamaModel, "forward", doubled)
    with pytest.raises(UnsupportedModel, match="llama changes hidden states between its layers or behind them"):
        Layers(source)


# --- the spool ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No spool is small enough for memory."""
    monkeypatch.setattr(spools, "SPOOLED", 0)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_spool_gives_back_what_was_written(dtype: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "SPOOLED", memory)
    lengths = [4, 4, 4, 2]
    rows = [torch.randn(length, 3).to(getattr(torch, dtype)) for length in lengths]
    with Spool(lengths, 3, dtype) as spool:
        assert len(spool) == 4
        assert spool.bytes == spool_bytes(14, 3, dtype) == sum(row.nbytes for row in rows)
        for number in (3, 0, 2, 1):
            spool.write(number, rows[number][None])
        assert all(torch.equal(spool.read(number)[0], row) for number, row in enumerate(rows))
        assert torch.equal(spool.read(0, 3), torch.stack(rows[:3]))
        spool.write(1, 2 * torch.stack(rows[1:3]).double())  # in place, and rounded
        assert torch.equal(spool.read(1, 2), 2 * torch.stack(rows[1:3]))
        assert torch.equal(spool.read(3)[0], rows[3])
        assert torch.equal(spool.read(0)[0], rows[0])


def test_rows_of_one_length_make_a_batch() -> None:
    with Spool([4, 4, 4, 2, 2, 4], 3) as spool:
        assert list(spool.batches(8)) == [(0, 2), (2, 1), (3, 2), (5, 1)]
        assert list(spool.batches(100)) == [(0, 3), (3, 2), (5, 1)]
        assert list(spool.batches(1)) == [(row, 1) for row in range(6)]


def test_small_spools_are_in_memory_and_give_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "SPOOLED", 2 * spool_bytes(4, 3))
    monkeypatch.setattr(Spool, "_held", 0)
    with Spool([4], 3), Spool([4], 3), Spool([4], 3) as third:
        assert Spool._held == 2 * third.bytes
        third.write(0, torch.ones(1, 4, 3))  # on disk
        assert torch.equal(third.read(0), torch.ones(1, 4, 3))
    third.close()  # twice
    assert Spool._held == 0


def test_beside_a_gpu_spools_take_a_share_of_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "device_memory", lambda device: 64 << 30)
    assert spools.budget() == spools.SPOOLED
    monkeypatch.setattr(spools, "best_device", lambda: "cuda")
    assert spools.budget() == 16 << 30
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(3, 16, 3, 8))
    assert spools.budget() == 2 << 30
    monkeypatch.setattr(spools, "device_memory", lambda device: 1 << 30)
    assert spools.budget() == spools.SPOOLED


def test_a_spool_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    made: list[Spool] = []

    def stopped() -> None:
        with Spool([2], 3) as spool:
            made.append(spool)
            spool.write(0, torch.ones(1, 2, 3))
            assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []  # not even meanwhile
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(ValueError, match="closed"):
        made[0].read(0)


def test_what_a_spool_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Spool([4, 4, 2], 3) as spool:
        with pytest.raises(EOFError, match="rows 0 to 1 of a spool were never written"):
            spool.read(0, 2)
        for row, count in ((0, 3), (2, 2)):
            with pytest.raises(ValueError, match="not there, or not of one length"):
                spool.read(row, count)
        with pytest.raises(ValueError, match=r"rows of \(4, 2\) in a spool of \(4, 3\)"):
            spool.write(0, torch.ones(1, 4, 2))
    with pytest.raises(OutputError, match=r"do not fit on the disk \(got 4,000,000,000,000,000,000 bytes\)"):
        Spool([10**9], 10**9)
    (tmp_path / "file").write_text(json.dumps("in the way"))
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="a part of the path is a file"):
        Spool([2], 3)


def test_a_disk_that_fills_up_is_an_error(on_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def put(descriptor: int, octets: memoryview, place: int) -> int:
        """Take three bytes at a time, and then no more."""
        if len(taken) == 2:
            raise OSError(28, "No space left on device")
        taken.append(place)
        return 3

    monkeypatch.setattr(os, "pwrite", put)
    with Spool([4], 3) as spool, pytest.raises(OutputError, match="the disk is full"):
        spool.write(0, torch.ones(1, 4, 3))
    assert taken == [0, 3]
