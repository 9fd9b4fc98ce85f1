"""Calibration of encoder-decoders: moments as defined, and a fit by them that loses nothing which it need not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold import hf
from kvfold.calibrate.decoder import CalibrationSettings, calibrate, memory_bytes
from kvfold.contracts.requests import AttentionGram, CrossGram, InputGram, QueryGram, Request, SampledPairs
from kvfold.contracts.site import Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.text.pairs import corpus
from tolerance import assert_same

Make = Callable[..., Path]
EXACT = CalibrationSettings(dtype="float64", length=48)
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 9
SHARED = {
    "model_type": "kvfold_t5",
    "architectures": ["KvfoldT5ForConditionalGeneration"],
    "num_key_value_heads": 2,
    "cross_num_key_value_heads": 1,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text" / "text.txt"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def close(found: Tensor, expected: Tensor) -> None:
    """The norms of a T5 are taken in float32, whatever the model computes in."""
    assert_same(found, expected, dtype=torch.float32)


def textbook(model: Any, given: Tensor, asked: Tensor) -> dict[tuple[Site, str], Tensor]:
    """A T5 read once more, layer by layer and head by head: inputs of k, queries, and inputs averaged by attention."""
    config, seen = model.config, dict[tuple[Site, str], Tensor]()

    def norm(layer: Any, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * layer.weight

    def attend(layer: Any, site: Site, x: Tensor, read: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            each(of).unflatten(-1, (-1, config.d_kv)) for each, of in ((layer.q, x), (layer.k, read), (layer.v, read))
        )
        seen[site, "x"], seen[site, "q"], looked, heads = read, q, [], []
        for head in range(config.num_heads):
            shared = head * k.shape[-2] // config.num_heads
            logits = q[:, head] @ k[:, shared].T
            logits = logits if bias is None else logits + bias[head]
            if site.kind == "self":
                logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
            looked.append(logits.softmax(-1) @ read)
            heads.append(logits.softmax(-1) @ v[:, shared])
        token = torch.arange(len(x))
        seen[site, "y"] = torch.stack(looked)[token % len(looked), token]  # at each token by the next head
        return layer.o(torch.cat(heads, dim=-1))

    def forward(layer: Any, x: Tensor) -> Tensor:
        inner = torch.nn.functional.gelu(layer.DenseReluDense.wi_0(x), approximate="tanh") * layer.DenseReluDense.wi_1(
            x
        )
        return layer.DenseReluDense.wo(inner)

    def stack(part: Any, ids: Tensor, encoded: Tensor | None) -> Tensor:
        x = model.shared.weight[ids]
        bias = part.block[0].layer[0].SelfAttention.compute_bias(len(ids), len(ids))[0]
        for number, block in enumerate(part.block):
            own, *cross, last = block.layer
            site = Site(number, "encoder" if encoded is None else "self")
            read = norm(own.layer_norm, x)
            x = x + attend(own.SelfAttention, site, read, read, bias)
            for layer in cross:
                read = norm(layer.layer_norm, x)
                x = x + attend(layer.EncDecAttention, Site(number, "cross"), read, encoded, None)  # type: ignore[arg-type]
            x = x + forward(last, norm(last.layer_norm, x))
        return norm(part.final_layer_norm, x)

    encoded = stack(model.encoder, given, None)
    stack(model.decoder, torch.cat([torch.tensor([config.decoder_start_token_id]), asked[:-1]]), encoded)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SHARED], ids=["multi-head", "shared"])
def test_moments_are_those_of_the_definition(
    changes: dict[str, Any], tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_checkpoint("t5", **changes))
    sites = [Site(0), Site(2), Site(0, "cross"), Site(3, "cross"), Site(1, "encoder")]
    asked: list[Request] = [kind(site) for site in sites for kind in (InputGram, QueryGram, AttentionGram)]
    asked.append(CrossGram(Site(0), Site(2)))
    spans = corpus(text, source.path)
    answers = calibrate(source, asked, spans, EXACT)
    model: Any = hf.load(source.path, dtype="float64")
    rows = [textbook(model, *map(torch.from_numpy, row)) for row in spans.rows(48, 0)]
    assert len(rows) > 10
    for site in sites:
        x, q, y = (torch.cat([row[site, what].detach() for row in rows]) for what in "xqy")
        found = answers[InputGram(site)]
        close(found["gram_DD"], x.T @ x / len(x))
        close(found["mean_D"], x.mean(0))
        close(answers[QueryGram(site)]["gram_HEE"], torch.einsum("nhe,nhf->hef", q, q) / len(q))
        close(answers[AttentionGram(site)]["gram_DD"], y.T @ y / len(y))
        close(answers[AttentionGram(site)]["mean_D"], y.mean(0))
    first, second = (torch.cat([row[site, "x"].detach() for row in rows]) for site in (Site(0), Site(2)))
    close(answers[asked[-1]]["gram_DD"], first.T @ second / len(first))


def test_requests_that_an_encoder_decoder_does_not_answer(tiny_checkpoint: Make, text: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint("t5"))
    spans = corpus(text, source.path)
    for request in (SampledPairs(Site(0), 3), CrossGram(Site(0), Site(0, "cross"))):
        with pytest.raises(SettingError, match=f"an encoder-decoder cannot answer {type(request).__name__}"):
            calibrate(source, [request], spans, EXACT)
    with pytest.raises(SettingError, match="do not fit into memory"):
        calibrate(source, [InputGram(Site(0))], spans, CalibrationSettings(length=48, max_bytes=10_000))
    assert memory_bytes(source.shape, [], EXACT) > 8 * source.shape.parameters
    options, asked_for = ConvertSettings(calibration=str(text)), {"kv_heads": "auto", "budget": 0.5}
    with pytest.raises(SettingError, match=r"copying is measured on decoders.*\(got --budget-metric both\)"):
        convert(source.path, text.parent / "auto", "gqa", {**asked_for, "budget_metric": "both"}, options=options)


def _images(folder: Path, kind: str) -> None:
    """Make the heads of each pair linear images of one another, keys and values, in a checkpoint of 4 heads of 8."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    part = "SelfAttention" if kind == "self" else "EncDecAttention"
    for name, tensor in tensors.items():
        if name.startswith("decoder") and part in name and name.endswith((".k.weight", ".v.weight")):
            heads = tensor.view(4, 8, -1)
            for head in (1, 3):
                heads[head] = torch.randn(8, 8, generator=generator) @ heads[head - 1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_heads_that_are_linear_images_merge_without_loss(
    kind: str, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    """Any matrix between them, since nothing rotates: under RoPE only one complex number a plane is lossless."""
    teacher = tiny_checkpoint("t5")
    _images(teacher, kind)
    heads = "self=2,cross=4" if kind == "self" else "self=4,cross=2"
    model: Any = hf.load(teacher)
    ids = torch.randint(4, 260, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :9]}
    moved = {}
    for init in ("fit", "align", "mean"):
        student = convert(
            teacher,
            tmp_path / init,
            "gqa",
            {"kv_heads": heads, "init": init},
            options=ConvertSettings(calibration=str(text)),
        )
        with torch.inference_mode():
            folded = hf.load(student)(**inputs).logits
            moved[init] = float((folded - model(**inputs).logits).abs().max())
    assert moved["fit"] < 2e-4 < 1e-2 < min(moved["align"], moved["mean"]), moved
