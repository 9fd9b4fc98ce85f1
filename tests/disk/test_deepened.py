"""More decoder layers: the deeper model computes the same to the bit, until its new layers are trained."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5ForConditionalGeneration

from examples import paired, read
from kvfold import hf
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.deepened import Deepened
from kvfold.errors import SettingError
from kvfold.predict.plan import plan
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]


def logits(model: Any) -> Tensor:
    ids_BT = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model(**read(model, ids_BT.flip(1)), decoder_input_ids=ids_BT).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    "name", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("umt5", "m2m_100", "whisper"))]
)
def test_a_deeper_student_computes_what_its_source_does(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    family, changes = paired().get(name, (name, {}))
    source = tiny_checkpoint(family, tokenizer=False, **changes)
    deep = convert(source, tmp_path / "deep", "fido", {"cross_every": 1, "decoder_layers": 6})
    sparse = convert(source, tmp_path / "sparse", "fido", {"cross_every": 2, "decoder_layers": 8})
    expected = logits(hf.load(source))
    assert torch.equal(logits(hf.load(deep)), expected)
    assert torch.equal(logits(hf.load(sparse)), expected), "all that lose cross-attention are added layers"
    before, after = Checkpoint.open(source), Checkpoint.open(sparse)
    assert after.shape.num_layers == 8
    assert [site.layer for site in after.shape.crossed] == [1, 3, 5, 7]
    planned = plan(source, "fido", {"cross_every": 2, "decoder_layers": 8}).after
    assert planned.parameters == after.shape.parameters == sum(each.numel() for each in hf.load(sparse).parameters())
    assert planned.cache_bytes_per_encoder_token == plan(source, "identity").after.cache_bytes_per_encoder_token
    assert after.lineage is not None
    assert after.lineage["root"]["hash"] == before.hash()


def test_which_layers_are_added(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5", tokenizer=False)
    deep = convert(source, tmp_path / "deep", "fido", {"cross_every": 1, "decoder_layers": 6})
    old, new = (load_file(each / "model.safetensors") for each in (source, deep))
    for layer, copied in enumerate((0, 0, 1, 2, 2, 3)):
        path = "layer.1.EncDecAttention.{}.weight".format
        block, other = f"decoder.block.{layer}", f"decoder.block.{copied}"
        assert torch.equal(new[f"{block}.{path('q')}"], old[f"{other}.{path('q')}"])
        outputs = [f"layer.{n}.{m}.weight" for n, m in enumerate(("SelfAttention.o", "EncDecAttention.o"))]
        for output in (*outputs, "layer.2.DenseReluDense.wo.weight"):
            added = layer in (0, 3)
            assert torch.equal(new[f"{block}.{output}"], torch.zeros_like(old[f"{other}.{output}"])) is added
            assert torch.equal(new[f"{block}.{output}"], old[f"{other}.{output}"]) is not added
    tables = [name for name in new if "decoder" in name and "relative_attention_bias" in name]
    assert tables == ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    config = json.loads((deep / "config.json").read_text())
    assert {**json.loads((source / "config.json").read_text()), "num_decoder_layers": 6} == config
    stock, told = T5ForConditionalGeneration.from_pretrained(deep, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(logits(stock.eval()), logits(hf.load(source, attention="sdpa")))


def test_the_same_depth_is_the_source(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5", tokenizer=False)
    same = convert(source, tmp_path / "same", "fido", {"cross_every": 1, "decoder_layers": 4})
    for name in ("config.json", "model.safetensors"):
        assert (same / name).read_bytes() == (source / name).read_bytes()


def test_a_view_is_another_model_and_survives_pickling(tiny_checkpoint: Make) -> None:
    source = Checkpoint.open(tiny_checkpoint("t5", tokenizer=False))
    view = Deepened(source, 8)
    assert len({source.hash(), view.hash(), Deepened(source, 6).hash()}) == 3, "answers of calibration are kept by hash"
    again = pickle.loads(pickle.dumps(view))
    assert again.names() == view.names()
    assert all(torch.equal(again.read(name), view.read(name)) for name in view.names())


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_uptraining_trains_the_layers_that_are_added(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("\n".join(f"abcd {number}\tijkl {number}" for number in range(10, 40)))
    options = ConvertSettings(calibration=str(pairs), repair=())
    given = {"cross_every": 4, "cross_layers": "auto", "decoder_layers": 8}
    deep = convert(source, tmp_path / "deep", "fido", given, options=options)
    step = json.loads((deep / "kvfold.json").read_text())["steps"][-1]
    assert step["settings"]["decoder_layers"] == 8
    assert [step["found"]["kl"][str(layer)] for layer in (0, 2, 4, 6)] == [0.0] * 4, "added layers add nothing"
    settings = UptrainSettings(data=str(text), tokens=3 * 32, sequence_length=16, batch_size=2, log_every=1, loss="kl")
    trained = Checkpoint.open(uptrain(deep, tmp_path / "trained", settings))
    assert trained.shape == Checkpoint.open(deep).shape
    for layer in (0, 2, 4, 6):
        assert trained.read(f"decoder.block.{layer}.layer.0.SelfAttention.o.weight").abs().max() > 0


@pytest.mark.slow
def test_repair_uses_the_layers_that_are_added(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    (tmp_path / "text.txt").write_text(
        "Whan that Aprille with his shoures soote, the droghte of March hath perced. " * 60
    )
    how = {"calibration": str(tmp_path / "text.txt"), "effort": "quick", "calibration_tokens": 4000}
    given, lost = {"cross_every": 4, "decoder_layers": 8}, []
    for number, repair in enumerate(((), ("o",))):
        made = convert(source, tmp_path / str(number), "fido", given, options=ConvertSettings(**how, repair=repair))
        lost.append(float((logits(hf.load(made)) - logits(hf.load(source))).square().mean()))
    assert lost[1] < lost[0]
    added = Checkpoint.open(tmp_path / "1").read("decoder.block.4.layer.0.SelfAttention.o.weight")
    assert added.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "layers", "match"),
    [
        ("t5", 3, r"out of range.*allowed: 4 \(those of the source\)"),
        ("bart", 8, "norms stand behind the branches"),
        ("t5gemma", 8, "no decoder layers can be added to family t5gemma"),
        ("llama", 8, "no decoder layers can be added to family llama"),
    ],
)
def test_what_is_refused(name: str, layers: int, match: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint(name, tokenizer=False)
    with pytest.raises(SettingError, match=match):
        convert(source, tmp_path / "out", "fido", {"cross_every": 2, "decoder_layers": layers})


def test_a_student_gets_no_layers(tiny_checkpoint: Make, tmp_path: Path) -> None:
    sparse = convert(tiny_checkpoint("t5", tokenizer=False), tmp_path / "sparse", "fido", {"cross_every": 2})
    with pytest.raises(SettingError, match=r"the source is a student.*in its first conversion"):
        convert(sparse, tmp_path / "out", "fido", {"cross_every": 1, "decoder_layers": 8})
