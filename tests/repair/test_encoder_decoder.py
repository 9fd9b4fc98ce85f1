"""Repair of encoder-decoders against lstsq in float64 on what hooks on whole models see, without layers run alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples import paired
from kvfold import hf
from kvfold.contracts.site import REPAIRABLE, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.families import all_families
from kvfold.repair import RepairSettings, layers
from kvfold.repair.layers import DAMPING, repair
from kvfold.repair.rows import Rows
from kvfold.text.pairs import PairFile, Row, batched, start_id
from kvfold.text.sound import Clip, Reader

Make = Callable[..., Path]
LENGTHS = ((9, 7), (12, 5))  # of inputs and targets
ROWS = 40
SETTINGS = RepairSettings(length=16, q_tokens=10_000, inner_tokens=10_000)
FIRST = {family.name: (family.name, dict[str, Any]()) for family in all_families().values() if family.encoder_decoder}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {**FIRST, **paired()}
KINDS = {**KINDS, "t5, no gate": ("t5", {"feed_forward_proj": "relu"})}
SHARPER = ("q.weight", "k.weight", "o.weight", "q_proj.weight", "k_proj.weight", "out_proj.weight", "fc2.weight")


class Tone(Clip):
    """Sound that is drawn, and in no file."""

    def features(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        seed, shape = int(self.path.name), (self.reader.bins, 2 * self.reader.positions)
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def text(source: Checkpoint, seed: int = 0, rows: int = ROWS) -> PairFile:
    """Pairs of two lengths, in turn."""
    draw, pairs = np.random.default_rng(seed), list[Row]()
    for number in range(rows):
        given, target = (draw.integers(3, 96, length) for length in LENGTHS[number % 2])
        reader = Reader(source.path, source.config.get("num_mel_bins", 0), source.config.get("max_source_positions", 0))
        pairs.append((Tone(Path(str(seed * rows + number)), reader) if source.family.audio else given, target))
    return PairFile(pairs, [], "text", f"text {seed}", 96)


Pair = tuple[Checkpoint, Checkpoint]


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Pair]:
    """A teacher of two layers whose attention looks at some keys more than at others, and its pooled student."""

    def make(kind: str = "t5", method: str = "gqa") -> Pair:
        family, fields = KINDS[kind]
        shorter = {name: 2 for name in all_families()[family].tiny() if name.endswith("layers") and "drop" not in name}
        teacher = tiny_checkpoint(family, tokenizer=False, **{**fields, **shorter})
        file = teacher / "model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            if name.startswith(("decoder.", "model.decoder.")) and name.endswith(SHARPER):
                tensors[name] *= 3
        save_file(tensors, file, metadata={"format": "pt"})
        settings = {} if method == "identity" else {"kv_heads": 1}
        return Checkpoint.open(teacher), Checkpoint.open(convert(teacher, tmp_path / "student", method, settings))

    return make


def repaired(pair: Pair, roles: tuple[str, ...] = REPAIRABLE, pairs: PairFile | None = None) -> list[Any]:
    wanted = tuple(role for role in roles if role in ("q", "o", *pair[0].family.body.mlp))
    return list(repair(*pair, wanted, pairs or text(pair[0]), SETTINGS))


def loaded(source: Checkpoint) -> Any:
    return hf.load(source.path, attention=hf.WATCHED)


def put(model: Any, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


class Seen:
    """Rows of one length after the other through a whole model: inputs and outputs of modules, and probabilities."""

    def __init__(self, source: Checkpoint, model: Any, pairs: PairFile) -> None:
        self.given: dict[str, list[Tensor]] = {}
        self.put_out: dict[str, list[Tensor]] = {}
        self.attention: dict[Site, list[Tensor]] = {site: [] for site in source.shape.cached_sites}
        self.logits: list[Tensor] = []
        handles = [
            module.register_forward_hook(self._keep(path), with_kwargs=True)
            for path, module in model.named_modules()
            if "decoder." in path and not isinstance(module, nn.ModuleList)
        ]
        takers = {model.get_submodule(source.family.module(site)): kept.append for site, kept in self.attention.items()}
        with torch.inference_mode(), hf.probabilities(takers):
            for _, length in LENGTHS:
                batch = batched([row for row in pairs.pairs if len(row[1]) == length])
                given = batch.read(torch.float32)
                begun_BT = batch.shifted(start_id(model.config))
                self.logits.append(model(**given, decoder_input_ids=begun_BT, use_cache=False).logits.flatten(0, 1))
        for handle in handles:
            handle.remove()

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            if isinstance(first, Tensor):
                self.given.setdefault(path, []).append(first.flatten(0, 1))
                self.put_out.setdefault(path, []).append(
                    (result[0] if isinstance(result, tuple) else result).flatten(0, 1)
                )

        return hook

    def inputs(self, path: str) -> Tensor:
        return torch.cat(self.given[path]).double()

    def outputs(self, path: str) -> Tensor:
        return torch.cat(self.put_out[path]).double()


def streams(source: Checkpoint, seen: Seen, number: int) -> list[Tensor]:
    """The residual stream before a layer, and behind each of its parts, as the architectures' papers have it."""
    body, kinds = source.family.body, ("self", "cross")
    found = [seen.inputs(body.inside(number))]
    for kind in kinds:
        if body.after:
            through = seen.outputs(body.inside(number, body.after[kind]))
        else:
            through = seen.outputs(source.family.module(Site(number, kind)))
        found.append(through if body.post_norm else found[-1] + through)
    return [*found, seen.outputs(body.inside(number))]


def least_squares(linear: Any, z_NI: Tensor, wanted_NO: Tensor, share_N1: Tensor) -> Tensor:
    """Ridge towards what the map was, by rows of one least squares in float64; tokens are weighed by `share`."""
    z_NI, wanted_NO = z_NI * share_N1, wanted_NO - (0 if linear.bias is None else linear.bias.double())
    pull = (DAMPING * len(z_NI) * z_NI.square().mean()) ** 0.5
    left = torch.cat([z_NI, pull * torch.eye(z_NI.shape[1]).double()])
    right = torch.cat([wanted_NO * share_N1, pull * linear.weight.double().T])
    return torch.linalg.lstsq(left, right).solution.T.float()


def asked_of(source: Checkpoint, model: Any, part: str, number: int, before: Tensor, u: Tensor, wanted: Tensor) -> Any:
    """The output of a part that makes the stream behind it what is `wanted`, and the weight of each token."""
    body = source.family.body
    if not body.after:
        return wanted - before, torch.ones(len(u), 1).double()
    norm = model.get_submodule(body.inside(number, body.after[part]))
    if body.post_norm:  # a LayerNorm of the sum: the same mean and deviation, in the direction of the teacher's
        mean, length = u.mean(-1, keepdim=True), (u.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        return mean + length * (wanted - norm.bias) / norm.weight - before, 1 / length
    length = (u.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return length * (wanted - before) / (1 + norm.weight), 1 / length


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "t5, no gate", "umt5", "bart", "m2m_100", "t5gemma", "whisper"])
def test_o_and_down_are_the_least_squares_of_their_own_inputs(kind: str, pair: Callable[..., Pair]) -> None:
    """With the text's own lengths, each in float64, and every layer above what was found below it."""
    teacher, student = pair(kind)
    family, pairs = teacher.family, text(teacher)
    found, model = repaired((teacher, student)), loaded(student)
    taught = Seen(teacher, loaded(teacher), pairs)
    inner = [role for role in ("gate", "up") if role in family.body.mlp]
    for number in range(2):
        parts = [("self", "o"), ("cross", "o"), ("mlp", "down")]
        names = {
            part: family.tensor(Site(number, "cross" if part == "cross" else "self"), role) for part, role in parts
        }
        queries = {kind: family.tensor(Site(number, kind), "q") for kind in ("self", "cross")}
        other = {role: family.tensor(Site(number), role) for role in inner}
        assert set(found[number]) == {*names.values(), *queries.values(), *other.values()}
        for place, (part, _) in enumerate(parts):
            ready = [queries[part]] if part in queries else list(other.values())
            put(model, {name: found[number][name] for name in ready})
            path = names[part].removesuffix(".weight")
            linear, seen = model.get_submodule(path), Seen(student, model, pairs)
            before, wanted = streams(student, seen, number)[place], streams(teacher, taught, number)[place + 1]
            u = seen.outputs(path) + (before if family.body.post_norm else 0)
            target, share = asked_of(student, model, part, number, before, u, wanted)
            expected = least_squares(linear, seen.inputs(path), target, share)
            torch.testing.assert_close(found[number][names[part]], expected, rtol=2e-3, atol=5e-4)
            assert not torch.allclose(expected, linear.weight, atol=1e-2)
            put(model, {names[part]: found[number][names[part]]})


def divergence(wanted: Seen, found: Seen) -> float:
    """KL of the teacher's next tokens to the student's, in nats per token."""
    p, q = (torch.cat(each.logits).double().log_softmax(-1) for each in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_repaired_student_is_nearer_on_other_text(kind: str, pair: Callable[..., Pair]) -> None:
    """And every role adds to it: o alone, then all."""
    both = pair(kind)
    other, model = text(both[0], seed=1), loaded(both[1])
    wanted = Seen(both[0], loaded(both[0]), other)
    plain = divergence(wanted, Seen(both[1], model, other))
    for roles, most in ((("o",), 0.95), (REPAIRABLE, 0.9)):
        model = loaded(both[1])
        for tensors in repaired(both, roles, text(both[0], rows=4 * ROWS)):
            put(model, tensors)
        assert divergence(wanted, Seen(both[1], model, other)) < most * plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma", "whisper"])
def test_q_brings_both_attentions_nearer_in_every_layer(kind: str, pair: Callable[..., Pair]) -> None:
    """In KL to the teacher's attention, biases of the distance included, on the student's own inputs."""
    both = pair(kind)
    pairs, model = text(both[0]), loaded(both[1])
    taught = Seen(both[0], loaded(both[0]), pairs).attention

    def away(site: Site) -> float:
        seen = Seen(both[1], model, pairs).attention[site]
        each = [
            (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(-1).flatten()
            for p, q in zip(taught[site], seen, strict=True)
        ]
        return float(torch.cat(each).double().mean())

    for number, tensors in enumerate(repaired(both, ("q",))):
        for site in (Site(number), Site(number, "cross")):
            name = both[0].family.tensor(site, "q")
            before = away(site)
            put(model, {name: tensors[name]})
            assert away(site) < 0.97 * before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_a_student_that_is_its_teacher_is_left_as_it_is(kind: str, pair: Callable[..., Pair]) -> None:
    teacher, student = pair(kind, "identity")
    for tensors in repaired((teacher, student)):
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, teacher.read(name), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_batches_do_not_matter(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("bart")
    whole = repaired(both)
    monkeypatch.setattr(layers, "BATCH", 1)
    monkeypatch.setattr(layers, "LOGIT_BATCH", 1)
    for one, another in zip(whole, repaired(both), strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(another[name], tensor, rtol=1e-3, atol=1e-3)


def test_rows_lie_with_others_of_their_lengths(tiny_checkpoint: Make) -> None:
    """Within parts as large as what q reads, so that q does not read the shortest rows of all."""
    source = Checkpoint.open(tiny_checkpoint("t5", tokenizer=False))
    rows = Rows.of(text(source), source, replace(SETTINGS, q_tokens=60))
    assert sum(rows.lengths) == ROWS // 2 * (7 + 5)
    assert rows.lengths[:10] == [7] * 5 + [5] * 5  # 60 tokens: by the length of the input, then of the target
    assert rows.first(60) == 10
    assert rows.batches(20, rows=10) == [(0, 2), (2, 2), (4, 1), (5, 4), (9, 1)]


def test_layers_over_one_latent_are_not_repaired(tiny_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Whan that Aprille with his shoures soote " * 9)
    options = ConvertSettings(calibration=str(tmp_path / "text.txt"), repair=("o",))
    with pytest.raises(
        SettingError, match=r"share a latent of the encoder's output.* \(got --repair o\); omit --repair"
    ):
        convert(tiny_checkpoint("t5"), tmp_path / "out", "crosslatent", {"cross_latent_dim": 8}, options=options)
