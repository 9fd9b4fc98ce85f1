"""Whisper: sound in, fewer key/value heads in the decoder, and fields that transformers does not take for others."""

from __future__ import annotations

import json
import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, WhisperConfig, WhisperFeatureExtractor

from examples import clips
from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError, UnsupportedModel
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.families import all_families, family_of
from kvfold.text.pairs import corpus
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]

CLIPS, BINS, FRAMES = 6, 8, 24


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A file of pairs, and the features that it names."""
    return clips(tmp_path)


def features(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, BINS, FRAMES, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["kvfold", "sdpa", "eager"])
def test_a_student_writes_and_caches_as_promised(attention: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Greedily, by beams, and into a static cache; the encoder's positions are the cache of cross-attention."""
    teacher = tiny_checkpoint("whisper", tokenizer=False, eos_token_id=None)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})
    model: Any = hf.load(student, attention=attention)
    ids_BT = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(input_features=features(), decoder_input_ids=ids_BT, use_cache=True)
    spec = grouped_cache(Checkpoint.open(student).shape)
    assert hf.live_cache_bytes(whole.past_key_values) == spec.bytes(7, batch=2, itemsize=4, encoder_tokens=12)
    written = [
        GenerationMixin.generate(model, features(), max_new_tokens=6, do_sample=False, **options)
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    ]
    assert all(torch.equal(written[0], each) for each in written[1:])
    assert GenerationMixin.generate(model, features(), max_new_tokens=6, num_beams=3).shape == (2, 7)


def test_the_fields_of_a_student_are_not_the_encoders(tiny_checkpoint: Make, tmp_path: Path) -> None:
    assert WhisperConfig(num_key_value_heads=2).encoder_attention_heads == 2  # why they have names of their own
    student = convert(
        tiny_checkpoint("whisper", tokenizer=False), tmp_path / "out", "gqa", {"kv_heads": "self=2,cross=1"}
    )
    config = json.loads((student / "config.json").read_text())
    assert (config["self_num_key_value_heads"], config["cross_num_key_value_heads"]) == (2, 1)
    assert "num_key_value_heads" not in config
    model: Any = hf.load(student)
    assert model.config.encoder_attention_heads == model.config.decoder_attention_heads == 4
    assert model.get_encoder().layers[0].self_attn.k_proj.out_features == 32


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads must be absent: transformers reads it as encoder_attention"),
        ({"self_num_key_value_heads": 2}, "self_num_key_value_heads, and transformers ignores it in whisper; is"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, and a Whisper has one embedding"),
        ({"num_mel_bins": 0}, "num_mel_bins must be a positive whole number"),
    ],
)
def test_whispers_that_cannot_be_taken(changes: dict[str, Any], line: str) -> None:
    config = all_families()["whisper"].tiny() | changes
    with pytest.raises(UnsupportedModel, match=line):
        family_of(config).shape(config)


@pytest.mark.slow
def test_fit_and_training_come_closer_than_the_mean(
    tiny_checkpoint: Make, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated, trained and evaluated on sound: the whole way."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    teacher = tiny_checkpoint("whisper")
    calibration = ConvertSettings(calibration=str(sounds))
    students = {
        init: convert(teacher, tmp_path / init, "gqa", {"kv_heads": 1, "init": init}, options=calibration)
        for init in ("mean", "fit")
    }
    steps = {"tokens": 40 * 64, "batch_size": 2, "sequence_length": 32, "learning_rate": 1e-3, "loss": "kl"}
    students["trained"] = uptrain(students["mean"], tmp_path / "trained", UptrainSettings(data=str(sounds), **steps))
    found = {}
    for name, student in students.items():
        how = EvaluateSettings(data=str(sounds), sequence_length=32, batch_size=4)
        found[name] = evaluate(student, how, teacher=teacher, records=tmp_path / "records").metrics["kl"]
    assert 0 < found["fit"] < found["mean"]
    assert 0 < found["trained"] < found["mean"]


def test_moments_of_cross_attention_are_of_the_encoders_output(tiny_checkpoint: Make, sounds: Path) -> None:
    from kvfold.calibrate.encoder_decoder import read
    from kvfold.contracts.requests import InputGram

    source = Checkpoint.open(tiny_checkpoint("whisper"))
    rows = list(corpus(sounds, source.path).rows(32))
    request = InputGram(Site(1, "cross"))
    answer = read(source, [request], rows, dtype="float64", device="cpu")[request]
    model: Any = hf.load(source.path, dtype="float64")
    given = np.stack([np.load(sounds.parent / f"{number}.npy") for number in range(CLIPS)])
    with torch.inference_mode():
        x_ND = model.get_encoder()(torch.from_numpy(given).double()).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(answer["gram_DD"], x_ND.T @ x_ND / len(x_ND))


# --- sound files ----------------------------------------------------------------------------------------------------


def _wav(path: Path, rate: int = 16_000, seconds: float = 0.02, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        count = int(rate * seconds) * channels
        sound.writeframes(struct.pack(f"<{count}h", *(int(9000 * np.sin(n / 3)) for n in range(count))))
    return path


def test_speech_becomes_the_features_of_transformers(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("whisper", num_mel_bins=80, max_source_positions=50)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    extractor.save_pretrained(teacher)
    _wav(tmp_path / "a.wav", seconds=0.5)
    (tmp_path / "clips.jsonl").write_text(json.dumps({"input": "a.wav", "target": "a"}) + "\n")
    batch = corpus(tmp_path / "clips.jsonl", teacher).batch(0, seed=0, batch_size=1, length=8)
    with wave.open(str(tmp_path / "a.wav")) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32) / 32768
    expected = extractor(samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(batch.input_BS, expected)
    assert batch.seen_BS.shape == (1, 50)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.mp3", b"x", r"is no sound file \(got .mp3\); allowed: .npy or .wav"),
        ("a.npy", b"x", "is no array of numpy"),
        (
            "a.npy",
            np.zeros((8, 23), np.float32),
            r"does not hold features of this model \(got float32 \(8, 23\)\); allowed",
        ),
        ("a.npy", np.full((8, 24), np.nan, np.float32), r"does not hold features of this model"),
        ("a.npy", np.array(["x"]), "does not hold features of this model"),
        ("a.wav", b"RIFF", "preprocessor_config.json"),
    ],
    ids=str,
)
def test_files_that_are_no_sound(name: str, content: Any, line: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    (tmp_path / "clips.tsv").write_text(f"{name}\twords\n")
    pairs = corpus(tmp_path / "clips.tsv", tiny_checkpoint("whisper"))
    with pytest.raises(DataError, match=line):
        pairs.batch(0, seed=0, batch_size=1, length=8)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"rate": 8000}, "has another format .got 1 channels, 16 bits, 8000 Hz"),
        ({"channels": 2}, "2 channels, 16 bits, 16000 Hz.*ffmpeg -i a.wav"),
        ({"seconds": 1.5}, "is too long .got 1.5 s.; allowed: 1 s; cut it"),
    ],
)
def test_speech_of_another_format(how: dict[str, Any], line: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("whisper", num_mel_bins=80, max_source_positions=50)
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(teacher)
    _wav(tmp_path / "a.wav", **how)
    (tmp_path / "clips.tsv").write_text("a.wav\twords\n")
    with pytest.raises(DataError, match=line):
        corpus(tmp_path / "clips.tsv", teacher).batch(0, seed=0, batch_size=1, length=8)


def test_text_is_no_sound(tiny_checkpoint: Make, text: Path) -> None:
    with pytest.raises(DataError, match="the model reads sound, and this is no file of pairs"):
        corpus(text, tiny_checkpoint("whisper"))
