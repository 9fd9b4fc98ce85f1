"""Configs and tokenizers of older tools: negative ids, empty special tokens, SentencePiece alone, YaRN of old."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.errors import DataError
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.export.exporting import export
from kvfold.hf.loading import without_negative_ids
from kvfold.text.tokens import token_file
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


# --- token ids below 0 ----------------------------------------------------------------------------------------------


def test_ids_below_zero_are_none_in_every_part() -> None:
    config = {"pad_token_id": -1, "eos_token_id": [2, -1], "bos_token_id": 0, "text": {"decoder_start_token_id": -100}}
    assert without_negative_ids(config) == {
        "pad_token_id": None,
        "eos_token_id": [2],
        "bos_token_id": 0,
        "text": {"decoder_start_token_id": None},
    }
    assert without_negative_ids({"eos_token_id": [-1], "layer_ids": [-1], "shift": -1}) == {
        "eos_token_id": None,
        "layer_ids": [-1],
        "shift": -1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("ids", [{"pad_token_id": -1}, {"pad_token_id": -1000, "bos_token_id": -1, "eos_token_id": -1}])
def test_a_model_with_ids_below_zero_goes_all_the_way(
    ids: dict[str, int], tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    plain, teacher = tiny_checkpoint("llama", name="plain"), tiny_checkpoint("llama")
    for name in ("config.json", "generation_config.json"):
        _edit(teacher / name, **ids)
    ids_BT = torch.tensor([[5, 6, 259, 2, 7]])
    with torch.no_grad():
        assert torch.equal(hf.load(teacher)(ids_BT).logits, hf.load(plain)(ids_BT).logits)
    model = hf.load(teacher)
    model(torch.tensor([[259, 5, 259]]), labels=torch.tensor([[259, 5, 259]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[259].abs().sum() > 0, "-1 is not the last token"
    assert int(hf.generate(model, ids_BT, max_new_tokens=4, do_sample=False).min()) >= 0

    student = convert(
        teacher, tmp_path / "student", "elitekv", {"ratio": 0.5, "search": "uniform", "metric": "weights"}
    )
    given = {"sequence_length": 16, "batch_size": 4, "tokens": 64, "data": str(text)}
    trained = uptrain(student, tmp_path / "trained", UptrainSettings(**given), teacher=teacher)
    settings = EvaluateSettings(data=str(text), tokens=64, copy_trials=2, copy_distances=(8,), samples=1)
    assert evaluate(trained, settings, teacher=teacher, records=tmp_path / "records").status == "done"
    grouped = convert(teacher, tmp_path / "grouped", "gqa", {"kv_heads": 2})
    assert list(export(grouped, tmp_path / "gguf", "gguf").glob("*.gguf"))


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("empty", ["", {"content": "", "lstrip": False, "__type": "AddedToken"}], ids=["text", "token"])
def test_empty_special_tokens_are_sentencepieces_own(
    file: str, empty: Any, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    """LLaMA-1 has them: transformers would look for the id of its unknown token forever."""
    teacher = tiny_checkpoint("llama")
    known = token_file(text, teacher, cache_dir=tmp_path / "known").tokens.tolist()
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        config.pop(name)
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    _edit(teacher / file, bos_token=empty, eos_token=empty, unk_token=empty)
    tokenizer = hf.load_tokenizer(teacher)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 3)
    assert token_file(text, teacher, cache_dir=tmp_path / "made").tokens.tolist() == known


def test_an_empty_token_that_no_vocabulary_holds_is_none(tiny_checkpoint: Make) -> None:
    teacher = tiny_checkpoint("llama")
    _edit(teacher / "tokenizer_config.json", mask_token="", pad_token="")
    tokenizer = hf.load_tokenizer(teacher)
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.eos_token) == (None, None, "</s>")


@pytest.fixture
def piece_model() -> bytes:
    """A SentencePiece model of a few hundred pieces."""
    pieces = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    pieces.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{n} quick brown foxes jump over {n * n} lazy dogs" for n in range(300)]),
        model_writer=made,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


def _pieces_alone(folder: Path, name: str, model: bytes) -> Path:
    for each in folder.glob("*token*"):
        each.unlink()
    (folder / name).write_bytes(model)
    return folder


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_alone_names_the_extra(
    name: str, piece_model: bytes, tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _pieces_alone(tiny_checkpoint("llama"), name, piece_model)
    monkeypatch.setitem(__import__("sys").modules, "google.protobuf", None)
    with pytest.raises(DataError, match=rf"{name}, which needs .*protobuf; pip install 'kvfold\[sentencepiece\]'"):
        hf.load_tokenizer(folder)


def test_sentencepiece_alone_is_read_with_the_extra(piece_model: bytes, tiny_checkpoint: Make) -> None:
    pytest.importorskip("google.protobuf")
    import sentencepiece

    folder = _pieces_alone(tiny_checkpoint("llama"), "tokenizer.model", piece_model)
    with pytest.raises(DataError, match="no file names the tokenizer's class; add tokenizer_config.json"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')
    own = sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    line = "3 quick brown dogs jump, \u00e9"
    assert hf.load_tokenizer(folder)(line, add_special_tokens=False)["input_ids"] == own.encode(line)


# --- YaRN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [{"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}]
)
def test_scaled_rotations_of_old_configs_fold_without_loss(
    said: dict[str, Any], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", num_hidden_layers=2)
    config = json.loads((teacher / "config.json").read_text())
    config.pop("rope_parameters")
    (teacher / "config.json").write_text(json.dumps({**config, "rope_scaling": said, "rope_theta": 10000.0}))
    settings = {"rope_chunks": 2, "latent_dim": 32, "search": "uniform", "metric": "weights"}
    half = convert(teacher, tmp_path / "half", "elitekv", settings)
    whole = convert(teacher, tmp_path / "whole", "elitekv", {**settings, "rope_chunks": 4})
    ids_BT = torch.randint(4, 260, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, lossy, exact = (hf.load(each)(ids_BT).logits for each in (teacher, half, whole))
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (lossy - expected).abs().max() > 1e-3
