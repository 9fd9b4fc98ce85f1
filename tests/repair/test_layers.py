"""Closed-form repair against lstsq on what stock transformers shows of both models, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.contracts.family import MLP, Body
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.convert.conversion import convert
from kvfold.disk import spool
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, OutputError, SettingError
from kvfold.progress import Silent
from kvfold.repair import RepairSettings, layers
from kvfold.repair.layers import DAMPING, repair
from kvfold.text.tokens import TokenFile

Make = Callable[..., Path]
LENGTH, ROWS = 16, 24
SETTINGS = RepairSettings(length=LENGTH, q_tokens=ROWS * LENGTH)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "grouped": ("qwen2", {"num_key_value_heads": 2}),
    "windowed": ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}),
    "normed": ("qwen3", {}),
    "normed behind": ("olmo2", {}),
    "side by side": ("phi", {"num_key_value_heads": 2}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(count: int = ROWS * LENGTH, seed: int = 0) -> TokenFile:
    ids = np.random.default_rng(seed).integers(3, 96, count).astype(np.uint32)
    return TokenFile(Path("text"), ids, 96, f"text {seed}", f"text {seed}")


def ids_of(text: TokenFile, length: int = LENGTH) -> Tensor:
    return torch.from_numpy(text.tokens.astype(np.int64)).view(-1, length)


SHARPER = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "o_proj", "dense", "down_proj", "fc2"))
Pair = tuple[Checkpoint, Checkpoint]


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Pair]:
    """A teacher of two layers whose attention looks at some keys more than at others, and its pooled student."""

    def make(kind: str = "llama", method: str = "gqa", **changes: Any) -> Pair:
        family, fields = MODELS[kind]
        teacher = tiny_checkpoint(family, tokenizer=False, num_hidden_layers=2, **{**fields, **changes})
        file = teacher / "model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(SHARPER):
                tensors[name] *= 3
        save_file(tensors, file, metadata={"format": "pt"})
        settings = {} if method == "identity" else {"kv_heads": 1}
        return Checkpoint.open(teacher), Checkpoint.open(convert(teacher, tmp_path / "student", method, settings))

    return make


def repaired(
    pair: Pair, roles: tuple[str, ...] = REPAIRABLE, text: TokenFile | None = None, **changes: Any
) -> list[Any]:
    settings = replace(SETTINGS, **changes)
    roles = tuple(role for role in roles if role in ("q", "o", *pair[0].family.body.mlp))
    return list(repair(*pair, roles, text or tokens(), settings))


def stock(source: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager", dtype=torch.float32)


class Watch:
    """Inputs of the modules of a stock model in one forward, by path."""

    def __init__(self, model: Any, ids_BT: Tensor) -> None:
        self.inputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(self._keep(path))
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) or path.endswith("layernorm")
        ]
        with torch.inference_mode():
            run = model(ids_BT, output_hidden_states=True, output_attentions=True)
        for handle in handles:
            handle.remove()
        # the last hidden state of transformers is behind the final norm: what goes into that is `above`
        self.hidden, self.attentions = run.hidden_states, run.attentions

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.inputs[path] = given[0]

        return hook


def middle_of(model: Any, seen: Watch, number: int) -> Tensor:
    """The residual stream after attention: what the MLP or the norm before it reads, or the sum where neither does."""
    layer, path = model.model.layers[number], f"model.layers.{number}"
    if hasattr(layer.self_attn, "dense"):
        return seen.hidden[number] + layer.self_attn.dense(seen.inputs[f"{path}.self_attn.dense"])
    norms_behind = f"{path}.post_feedforward_layernorm" in seen.inputs
    return seen.inputs[f"{path}.mlp.up_proj" if norms_behind else f"{path}.post_attention_layernorm"]


def outputs(model: Any, ids_BT: Tensor) -> list[Tensor]:
    """The residual stream behind every layer."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, given, out: found.append(out)) for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(ids_BT)
    for handle in handles:
        handle.remove()
    return found


def lstsq(linear: Any, z: Tensor, target: Tensor, damping: float, share: Tensor) -> Tensor:
    """Ridge towards what the module was, as rows of one least squares in float64; `share` weighs tokens already."""
    z_TN, y_TM = z.flatten(0, 1).double(), target.flatten(0, 1).double()
    if linear.bias is not None:
        y_TM = y_TM - (share * linear.bias).expand_as(target).flatten(0, 1).double()
    pull = (damping * len(z_TN) * z_TN.square().mean()) ** 0.5
    left = torch.cat([z_TN, pull * torch.eye(z_TN.shape[1]).double()])
    right = torch.cat([y_TM, pull * linear.weight.double().T])
    return torch.linalg.lstsq(left, right).solution.T.float()


def behind(norm: nn.Module, output: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """What is to be put out for `wanted` to come out of an RMS norm at the length of `output`, and 1 / that length."""
    length = (output.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # rms_norm_eps
    return length * wanted / norm.get_parameter("weight"), 1 / length


def put(model: Any, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_o_and_down_are_the_least_squares_of_their_own_inputs(kind: str, pair: Callable[..., Pair]) -> None:
    teacher, student = pair(kind)
    ids_BT, family = ids_of(tokens()), teacher.family
    found = repaired((teacher, student))
    model, above = stock(student), outputs(stock(teacher), ids_BT)
    taught = Watch(stock(teacher), ids_BT)
    for number, layer in enumerate(model.model.layers):
        names = {
            role: family.tensor(Site(number), role) for role in ("q", "o", *(set(MLP) & set(family.body.mlp) - {"act"}))
        }
        assert set(found[number]) == set(names.values())
        o, down = (model.get_submodule(names[role].removesuffix(".weight")) for role in ("o", "down"))
        put(model, {names["q"]: found[number][names["q"]]})
        seen = Watch(model, ids_BT)
        target = middle_of(stock(teacher), taught, number) - seen.hidden[number]
        z_BTN, share = seen.inputs[names["o"].removesuffix(".weight")], torch.ones(1)
        if kind == "normed behind":
            target, share = behind(layer.post_attention_layernorm, o(z_BTN), target)
        expected = lstsq(o, z_BTN * share, target * share, DAMPING, share)
        torch.testing.assert_close(found[number][names["o"]], expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(expected, o.weight, atol=1e-2)
        put(model, {names[role]: found[number][names[role]] for role in names if role != "down"})
        seen = Watch(model, ids_BT)
        target = above[number] - middle_of(model, seen, number)
        z_BTN, share = seen.inputs[names["down"].removesuffix(".weight")], torch.ones(1)
        if kind == "normed behind":
            target, share = behind(layer.post_feedforward_layernorm, down(z_BTN), target)
        expected = lstsq(down, z_BTN * share, target * share, DAMPING, share)
        torch.testing.assert_close(found[number][names["down"]], expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(expected, down.weight, atol=1e-2)
        put(model, {names["down"]: found[number][names["down"]]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_q_brings_attention_nearer_in_every_layer(kind: str, pair: Callable[..., Pair]) -> None:
    """In KL to the teacher's attention, on the student's own inputs."""
    teacher, student = pair(kind)
    ids_BT = ids_of(tokens())
    found, model, taught = repaired((teacher, student), ("q",)), stock(student), Watch(stock(teacher), ids_BT)

    def divergence(number: int) -> float:
        p, q = taught.attentions[number].double(), Watch(model, ids_BT).attentions[number].double()
        return float((p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(-1).mean())

    for number, tensors in enumerate(found):
        assert set(tensors) == {f"model.layers.{number}.self_attn.q_proj.weight"}
        before = divergence(number)
        put(model, tensors)
        assert divergence(number) < 0.9 * before


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_repaired_student_is_nearer_on_other_text(kind: str, pair: Callable[..., Pair]) -> None:
    teacher, student = pair(kind)
    ids_BT = ids_of(tokens(seed=1))
    with torch.inference_mode():
        wanted = stock(teacher)(ids_BT).logits.double().log_softmax(-1)

    def divergence(roles: tuple[str, ...]) -> float:
        model = stock(student)
        for tensors in repaired((teacher, student), roles, tokens(8 * ROWS * LENGTH)):
            put(model, tensors)
        with torch.inference_mode():
            found = model(ids_BT).logits.double().log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    plain, part, whole = divergence(()), divergence(("o",)), divergence(REPAIRABLE)
    assert part < 0.9 * plain
    assert whole < 0.95 * part


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_student_that_is_its_teacher_is_left_as_it_is(kind: str, pair: Callable[..., Pair]) -> None:
    teacher, student = pair(kind, "identity")
    for tensors in repaired((teacher, student)):
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, teacher.read(name), rtol=0, atol=1e-4)


def test_layers_with_heads_of_their_own(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Whose architecture is ours: the first layer shares one head, the other keeps its four."""
    teacher = Checkpoint.open(tiny_checkpoint("qwen2", tokenizer=False, num_hidden_layers=2))
    family, sites = teacher.family, teacher.shape.sites
    mixed = teacher.shape.with_sites({Site(0): replace(sites[Site(0)], num_key_value_heads=1)})
    model: Any = hf.build({**teacher.config, **family.fields(mixed)}, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = teacher.read(name)
            parameter.copy_(tensor if tensor.shape == parameter.shape else tensor[:8])
    model.save_pretrained(tmp_path / "mixed")
    student, ids_BT = Checkpoint.open(tmp_path / "mixed"), ids_of(tokens())
    assert student.config["model_type"] == "kvfold_qwen2"
    with torch.inference_mode():
        wanted, before = (each(ids_BT).logits for each in (stock(teacher), model))
        put(model, {name: tensor for tensors in repaired((teacher, student)) for name, tensor in tensors.items()})
        after = model(ids_BT).logits
    assert float((after - wanted).square().mean()) < 0.7 * float((before - wanted).square().mean())


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repair_goes_on_where_it_was_stopped(dtype: str, pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Bit for bit, and so each layer was read as it is saved."""
    both = pair("grouped", dtype=dtype)
    whole = repaired(both)
    for number, tensors in enumerate(whole):
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    for stop in (1, 2):
        done = [load_file(tmp_path / f"{number}.safetensors") for number in range(stop)]
        again = list(repair(*both, REPAIRABLE, tokens(), SETTINGS, done=done))
        assert len(again) == 2
        for one, other in zip(whole, again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_above_see_what_was_repaired_below(pair: Callable[..., Pair]) -> None:
    both = pair()
    whole = repaired(both)
    untouched = list(repair(*both, REPAIRABLE, tokens(), SETTINGS, done=[{}]))
    assert untouched[0] == {}
    assert not any(torch.allclose(untouched[1][name], tensor, atol=1e-3) for name, tensor in whole[1].items())


@pytest.mark.slow
def test_batches_do_not_matter_and_what_is_left_of_a_row_is_not_read(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("windowed")
    whole = repaired(both, text=tokens())
    for batch, text in ((5 * LENGTH, tokens(ROWS * LENGTH + 5)), (1, tokens()), (10**6, tokens())):
        monkeypatch.setattr(layers, "BATCH", batch)
        for one, another in zip(whole, repaired(both, text=text), strict=True):
            for name, tensor in one.items():
                torch.testing.assert_close(another[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_q_reads_as_many_tokens_as_set(pair: Callable[..., Pair]) -> None:
    both, name = pair(), "model.layers.0.self_attn.q_proj.weight"
    part = repaired(both, ("q",), q_tokens=6 * LENGTH + 3)[0][name]
    alone = repaired(both, ("q",), _first(tokens(), 6 * LENGTH))[0][name]
    assert torch.equal(part, alone)
    assert not torch.allclose(part, repaired(both, ("q",))[0][name], atol=1e-4)


def test_gate_and_up_read_as_many_tokens_as_set(pair: Callable[..., Pair]) -> None:
    both = pair()
    names = [f"model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up")]
    part = repaired(both, ("gate", "up"), inner_tokens=6 * LENGTH + 3)[0]
    alone = repaired(both, ("gate", "up"), _first(tokens(), 6 * LENGTH))[0]
    whole = repaired(both, ("gate", "up"))[0]
    for name in names:
        assert torch.equal(part[name], alone[name])
        assert not torch.allclose(part[name], whole[name], atol=1e-4)


def _first(text: TokenFile, count: int) -> TokenFile:
    return replace(text, tokens=text.tokens[:count])


def test_rows_are_no_longer_than_the_model_or_the_text(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    init = spool.Spool.__init__
    monkeypatch.setattr(
        spool.Spool,
        "__init__",
        lambda self, lengths, *given, **how: (made.append(tuple(lengths)), init(self, lengths, *given, **how))[1],
    )
    both = pair(max_position_embeddings=12)
    repaired(both, ("o",), tokens(40))
    assert set(made) == {(12, 12, 12)}
    made.clear()
    repaired(both, ("o",), tokens(7))
    assert set(made) == {(7,)}


def test_nothing_is_left_on_the_disk_and_layers_are_counted(
    pair: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    events: list[Any] = []

    class Listener(Silent):
        def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
            events.append((what, total, unit))

        def advance(self, amount: float, note: str = "") -> None:
            events.append(amount)

        def stop(self) -> None:
            events.append("stop")

    teacher, student = pair()
    before = {path: path.read_bytes() for path in (*teacher.files, *student.files)}
    working = repair(teacher, student, REPAIRABLE, tokens(), SETTINGS, progress=Listener())
    next(working)
    working.close()  # type: ignore[attr-defined]
    assert events == [("repairing", 2, "layers"), "stop"]
    events.clear()
    list(repair(teacher, student, REPAIRABLE, tokens(), SETTINGS, progress=Listener()))
    assert events == [("repairing", 2, "layers"), 1, 1, "stop"]
    assert list((tmp_path / "cache" / "spool").iterdir()) == []
    assert {path: path.read_bytes() for path in before} == before


# --- what is refused ------------------------------------------------------------------------------------------------


def test_roles_that_cannot_be_repaired(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair()
    with pytest.raises(SettingError, match=r"repair: 'v' cannot be repaired; allowed: q, o, gate, up or down"):
        next(repair(teacher, student, ("q", "v"), tokens()))
    monkeypatch.setattr(teacher, "family", replace(teacher.family, body=Body()))
    monkeypatch.setattr(student, "family", teacher.family)
    with pytest.raises(
        SettingError, match="repair: the MLP of family llama has no gate, up or down; leave out gate, up or down"
    ):
        next(repair(teacher, student, REPAIRABLE, tokens()))
    assert len(next(repair(teacher, student, ("q", "o"), tokens(), SETTINGS))) == 2
    monkeypatch.setattr(spool, "free_bytes", lambda path: 4 * ROWS * LENGTH * 32 * 4 - 1)
    with pytest.raises(OutputError, match="hidden states of the text do not fit on the disk"):
        next(repair(teacher, student, ("o",), tokens(), SETTINGS))


def test_a_repaired_tensor_that_is_not_finite_is_an_error(pair: Callable[..., Pair]) -> None:
    teacher, student = pair()
    file = student.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="o_proj.weight: the repaired tensor is not finite"):
        repaired((teacher, Checkpoint.open(student.path)), ("o",))
