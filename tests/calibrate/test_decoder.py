from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.calibrate import decoder, statistics
from kvfold.calibrate.decoder import CalibrationSettings, calibrate, calibration_hash, disk_bytes, memory_bytes, read
from kvfold.contracts.requests import AttentionGram, CrossGram, InputGram, QueryGram, Request, SampledPairs
from kvfold.contracts.site import Site
from kvfold.disk import spool
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, DataError, OutputError, SettingError
from kvfold.families import all_families, family_of
from kvfold.progress import Silent
from kvfold.text.tokens import TokenFile

EXACT = CalibrationSettings(length=12, dtype="float64")
ALL: list[Request] = [
    InputGram(Site(0)),
    InputGram(Site(3)),
    QueryGram(Site(1)),
    AttentionGram(Site(2)),
    CrossGram(Site(0), Site(3)),
    CrossGram(Site(2), Site(1)),
    SampledPairs(Site(1), 7),
    SampledPairs(Site(2), 7),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def token_file(count: int, vocabulary: int = 96, name: str = "text") -> TokenFile:
    ids = np.random.default_rng(0).integers(0, vocabulary, count).astype(np.uint32)
    return TokenFile(Path(name), ids, int(ids.max(initial=0)) + 1, name, name)


@pytest.fixture
def teacher(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    """Biases, and grouped heads, so that keys and queries differ in number."""
    return Checkpoint.open(tiny_checkpoint("qwen2", tokenizer=False, num_key_value_heads=2))


class BruteForce:
    """What a site shows of every row, worked out in numpy from transformers' own hidden states and attentions."""

    def __init__(self, source: Checkpoint, rows: list[Any]) -> None:
        self.source = source
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64, attn_implementation="eager")
        self.norms = [layer.input_layernorm for layer in model.model.layers]
        with torch.inference_mode():
            self.runs = [
                model(torch.tensor(row[None]), output_hidden_states=True, output_attentions=True) for row in rows
            ]

    def weight(self, name: str) -> Any:
        return self.source.read(name).double().numpy()

    def x(self, layer: int) -> Any:
        """Inputs of q, k and v of all rows (N, D)."""
        with torch.inference_mode():
            return np.concatenate([self.norms[layer](run.hidden_states[layer])[0].numpy() for run in self.runs])

    def projected(self, layer: int, role: str, heads: int) -> Any:
        site = f"model.layers.{layer}.self_attn.{role}_proj"
        out = self.x(layer) @ self.weight(f"{site}.weight").T
        if f"{site}.bias" in self.source.names():
            out = out + self.weight(f"{site}.bias")
        out = out.reshape(len(out), heads, 8)
        norm = f"model.layers.{layer}.self_attn.{role}_norm.weight"
        if norm in self.source.names():
            out = out / np.sqrt((out**2).mean(-1, keepdims=True) + self.source.config["rms_norm_eps"])
            out = out * self.weight(norm)
        return out

    def averaged(self, layer: int) -> Any:
        """Inputs averaged by attention (N, D): at each token of a row by the next head's."""
        x, done, found = self.x(layer), 0, []
        for run in self.runs:
            p_HTT = run.attentions[layer][0].numpy()
            p = np.stack([p_HTT[token % len(p_HTT), token] for token in range(p_HTT.shape[1])])
            found.append(p @ x[done : done + len(p)])
            done += len(p)
        return np.concatenate(found)


def test_answers_are_what_brute_force_finds(teacher: Checkpoint) -> None:
    tokens = token_file(41)  # three rows of 12, and one of 5
    rows = [tokens.tokens[at : at + 12].astype(np.int64) for at in range(0, 41, 12)]
    brute = BruteForce(teacher, rows)
    answers = calibrate(teacher, ALL, tokens, EXACT)
    x = {layer: brute.x(layer) for layer in range(4)}

    def close(found: torch.Tensor, expected: Any) -> None:
        assert found.dtype == torch.float64
        # transformers' attention with weights has a softmax in float32, whatever the model's format
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)

    for layer in (0, 3):
        close(answers[InputGram(Site(layer))]["gram_DD"], x[layer].T @ x[layer] / 41)
        close(answers[InputGram(Site(layer))]["mean_D"], x[layer].mean(0))
    close(answers[CrossGram(Site(0), Site(3))]["gram_DD"], x[0].T @ x[3] / 41)
    close(answers[CrossGram(Site(2), Site(1))]["gram_DD"], x[2].T @ x[1] / 41)
    q = brute.projected(1, "q", 4)
    close(answers[QueryGram(Site(1))]["gram_HEE"], np.einsum("nhe,nhf->hef", q, q) / 41)
    y = brute.averaged(2)
    close(answers[AttentionGram(Site(2))]["gram_DD"], y.T @ y / len(y))
    close(answers[AttentionGram(Site(2))]["mean_D"], y.mean(0))
    assert set(answers) == set(ALL)


def test_sampled_pairs_are_pairs_of_distinct_tokens(teacher: Checkpoint) -> None:
    tokens = token_file(41)
    rows = [tokens.tokens[at : at + 12].astype(np.int64) for at in range(0, 41, 12)]
    brute = BruteForce(teacher, rows)
    position = np.concatenate([np.arange(len(row)) for row in rows])
    answers = calibrate(teacher, ALL, tokens, EXACT)
    seen = []
    for layer in (1, 2):
        found = answers[SampledPairs(Site(layer), 7)]
        q, k = brute.projected(layer, "q", 4), brute.projected(layer, "k", 2)
        assert found["q_NHE"].dtype == found["k_NGE"].dtype == torch.float32
        index = [int(np.abs(q - one.numpy()).sum((1, 2)).argmin()) for one in found["q_NHE"]]
        np.testing.assert_allclose(found["q_NHE"].numpy(), q[index], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found["k_NGE"].numpy(), k[index], rtol=1e-6, atol=1e-6)
        assert found["position_N"].tolist() == position[index].tolist()
        assert index == sorted(set(index))
        seen.append(index)
    assert seen[0] == seen[1]  # every site is asked about the same tokens
    whole = calibrate(teacher, [SampledPairs(Site(0), 41)], tokens, EXACT)[SampledPairs(Site(0), 41)]
    assert whole["position_N"].tolist() == position.tolist()


def test_queries_and_keys_are_those_that_are_rotated(tiny_checkpoint: Callable[..., Path]) -> None:
    """Qwen3 norms both by head, before the rotation."""
    source = Checkpoint.open(tiny_checkpoint("qwen3", tokenizer=False, num_key_value_heads=2))
    tokens = token_file(20)
    brute = BruteForce(source, [tokens.tokens[at : at + 12].astype(np.int64) for at in range(0, 20, 12)])
    pairs, gram = SampledPairs(Site(2), 20), QueryGram(Site(2))
    found = calibrate(source, [pairs, gram], tokens, EXACT)
    q, k = brute.projected(2, "q", 4), brute.projected(2, "k", 2)
    np.testing.assert_allclose(found[pairs]["q_NHE"].numpy(), q, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[pairs]["k_NGE"].numpy(), k, rtol=1e-6, atol=1e-6)
    expected = np.einsum("nhe,nhf->hef", q, q) / 20  # transformers norms in float32, whatever the model's format
    np.testing.assert_allclose(found[gram]["gram_HEE"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_sample_is_uniform_over_the_text(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False, num_hidden_layers=1))
    request = SampledPairs(Site(0), 128)
    rows = list(torch.from_numpy(token_file(1024).tokens.astype(np.int64)).view(4, 256))
    counts = np.zeros(8)
    for seed in range(5):
        monkeypatch.setattr(statistics, "SEED", seed)
        found = read(source, [request], rows, CalibrationSettings(length=256))
        counts += np.histogram(found[request]["position_N"].numpy(), bins=8, range=(0, 256))[0]
    # each eighth of a row is drawn 80 times on average, with a standard deviation of about 8
    assert counts.sum() == 640
    assert 45 < counts.min() <= counts.max() < 115


def test_answers_do_not_depend_on_batches(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = list(torch.from_numpy(token_file(48).tokens.astype(np.int64)).view(4, 12)), []
    for batch in (12, 24, 48):
        monkeypatch.setattr(decoder, "BATCH", batch)
        found.append(read(teacher, ALL, rows, EXACT))
    for request in ALL:
        for name, tensor in found[0][request].items():
            torch.testing.assert_close(found[1][request][name], tensor, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found[2][request][name], tensor, rtol=1e-12, atol=1e-14)


def test_answers_are_kept(teacher: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate(teacher, ALL, token_file(30), EXACT)
    files = list((cache / "calibration").iterdir())
    assert [file.suffix for file in files] == [".safetensors"]
    loads: list[object] = []
    layers = hf.Layers
    monkeypatch.setattr(hf, "Layers", lambda *given, **named: (loads.append(given), layers(*given, **named))[1])
    again = calibrate(teacher, [*reversed(ALL), ALL[0]], token_file(30), replace(EXACT, max_bytes=10**9))
    assert not loads
    for request in ALL:
        assert first[request].keys() == again[request].keys()
        assert all(torch.equal(first[request][name], again[request][name]) for name in first[request])
    files[0].write_bytes(files[0].read_bytes()[:100])  # damaged: answered anew
    calibrate(teacher, ALL, token_file(30), EXACT)
    assert len(loads) == 1
    for other in (
        lambda: calibrate(teacher, ALL[:1], token_file(30), EXACT),
        lambda: calibrate(teacher, ALL, token_file(31), EXACT),
        lambda: calibrate(teacher, ALL, token_file(30, name="another"), EXACT),
        lambda: calibrate(teacher, ALL, token_file(30), replace(EXACT, length=10)),
    ):
        before = len(loads)
        other()
        assert len(loads) == before + 1


def test_the_hash_depends_on_the_text_and_on_how_it_is_read() -> None:
    same = calibration_hash(token_file(30), EXACT)
    assert calibration_hash(token_file(30), replace(EXACT, max_bytes=5, sensitivity_tokens=9)) == same
    others = [
        calibration_hash(token_file(31), EXACT),
        calibration_hash(token_file(30, name="another"), EXACT),
        calibration_hash(token_file(30), replace(EXACT, length=10)),
        calibration_hash(token_file(30), replace(EXACT, dtype="float32")),
    ]
    assert len({same, *others}) == 5
    # students name this hash: it must stay what it was when length, dtype and seed were the only settings
    assert calibration_hash(token_file(30)) == "9bc72d4334dafd15ad9378b70b5f4ad29dd8852081db7f8f9e222cec99b48c31"


def test_rows_are_no_longer_than_the_model_reads(tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False, max_position_embeddings=8))
    request = SampledPairs(Site(0), 20)
    found = calibrate(source, [request], token_file(20), replace(EXACT, length=512))
    assert found[request]["position_N"].tolist() == [*range(8), *range(8), *range(4)]


def test_memory_is_bounded_and_checked_before_anything_is_loaded(
    teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = teacher.shape
    alone = memory_bytes(shape, [], EXACT)
    assert memory_bytes(shape, [InputGram(Site(0))] * 2, EXACT) == alone + 8 * 33 * 32
    probabilities = memory_bytes(shape, [AttentionGram(Site(0))], EXACT) - alone - 8 * 33 * 32
    assert probabilities >= 2 * 12 * 12 * 8  # logits and probabilities of one row, of one head at each token
    assert memory_bytes(shape, [AttentionGram(Site(0)), AttentionGram(Site(1))], EXACT) == (
        alone + probabilities + 2 * 8 * 33 * 32  # layers are read one after another
    )
    needed = memory_bytes(shape, ALL, EXACT)
    monkeypatch.setattr(hf, "Layers", lambda *given, **named: pytest.fail("the model was opened"))
    with pytest.raises(SettingError) as caught:
        calibrate(teacher, ALL, token_file(30), replace(EXACT, max_bytes=needed - 1))
    assert str(caught.value) == (
        "calibrate: a layer of the teacher and the answers do not fit into memory "
        f"(got {needed:,} bytes); allowed: {needed - 1:,}; calibrate on a larger machine, or raise --calibration-memory"
    )


def test_a_teacher_needs_the_memory_of_one_layer(tiny_checkpoint: Callable[..., Path]) -> None:
    def needed(layers: int, **changes: Any) -> int:
        config = {**all_families()["llama"].tiny(), "num_hidden_layers": layers, "tie_word_embeddings": True}
        return memory_bytes(family_of(config).shape({**config, **changes}), [], EXACT)

    layer, embedding = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32, 96 * 32
    assert 8 * (layer + embedding) < needed(1)
    assert needed(4) <= needed(1)
    assert needed(4, dtype="bfloat16") == needed(4)
    assert needed(4, vocab_size=97) - needed(4) == 8 * 32


def test_text_waits_on_disk_and_leaves_nothing(
    teacher: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    made = spool.Spool.__init__
    monkeypatch.setattr(spool.Spool, "__init__", lambda self, *given: (made(self, *given), kept.append(self.bytes))[0])
    calibrate(teacher, ALL, token_file(30), EXACT)
    # hidden states, and the inputs of layers 0 and 1, which later ones are paired with
    assert kept == [30 * 32 * 8] * 3
    assert sum(kept) == disk_bytes(teacher.shape, ALL, EXACT, 30)
    assert list((cache / "spool").iterdir()) == []
    free = disk_bytes(teacher.shape, ALL, EXACT, 31) - 1
    monkeypatch.setattr(spool, "free_bytes", lambda path: free)
    with pytest.raises(OutputError, match=f"text do not fit on the disk .got {free + 1:,} bytes.; allowed: {free:,}"):
        calibrate(teacher, ALL, token_file(31), EXACT)


def test_layers_above_every_request_are_not_read(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    opens = hf.Layers.open
    monkeypatch.setattr(hf.Layers, "open", lambda self, number: (opened.append(number), opens(self, number))[1])
    calibrate(teacher, [InputGram(Site(1)), CrossGram(Site(2), Site(2))], token_file(30), EXACT)
    assert opened == [0, 1, 2]


def test_the_inputs_of_one_site_with_itself(teacher: Checkpoint) -> None:
    requests = [InputGram(Site(2)), CrossGram(Site(2), Site(2))]
    found = calibrate(teacher, requests, token_file(30), EXACT)
    assert torch.equal(found[requests[0]]["gram_DD"], found[requests[1]]["gram_DD"])


def test_attention_is_averaged_over_rows_of_any_length(tiny_checkpoint: Callable[..., Path]) -> None:
    """Rows of unlike length, and a teacher in float32: within what its own attention is exact to."""
    source = Checkpoint.open(
        tiny_checkpoint("llama", tokenizer=False, num_hidden_layers=2, max_position_embeddings=512)
    )
    tokens, request = token_file(700), AttentionGram(Site(1))
    brute = BruteForce(source, [tokens.tokens[at : at + 300].astype(np.int64) for at in range(0, 700, 300)])
    y = brute.averaged(1)
    expected, mean = y.T @ y / len(y), y.mean(0)
    exact, rounded = (
        calibrate(source, [request], tokens, replace(EXACT, length=300, dtype=dtype))[request]
        for dtype in ("float64", "float32")
    )
    np.testing.assert_allclose(exact["gram_DD"].numpy(), expected, rtol=1e-5, atol=1e-6)  # a softmax in float32
    np.testing.assert_allclose(exact["mean_D"].numpy(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rounded["gram_DD"].numpy(), expected, rtol=1e-4, atol=1e-6 * expected.max())
    np.testing.assert_allclose(rounded["mean_D"].numpy(), mean, rtol=1e-4, atol=1e-6 * np.abs(mean).max())
    assert bool((torch.linalg.eigvalsh(rounded["gram_DD"]) > -1e-12 * rounded["gram_DD"].trace()).all())


def test_progress_counts_tokens_of_every_layer(teacher: Checkpoint) -> None:
    events: list[Any] = []

    class Listener(Silent):
        def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
            events.append(total)

        def advance(self, amount: float, note: str = "") -> None:
            events.append((amount, note))

    rows = list(torch.from_numpy(token_file(24).tokens.astype(np.int64)).view(2, 12))
    read(teacher, [InputGram(Site(1))], rows, EXACT, progress=Listener())
    assert events == [48, (24, "layer 1 of 2"), (24, "layer 2 of 2")]


def test_requests_that_cannot_be_answered(teacher: Checkpoint, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SettingError, match=r"50 tokens cannot be sampled \(got 30 tokens of text\)"):
        calibrate(teacher, [SampledPairs(Site(0), 50)], token_file(30), EXACT)
    with pytest.raises(DataError, match="more tokens than the model has embeddings"):
        calibrate(teacher, ALL, token_file(30, vocabulary=5000), EXACT)
    broken = tiny_checkpoint("llama", name="broken", tokenizer=False)
    weights = Checkpoint.open(broken)
    name = "model.layers.0.input_layernorm.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(weights.files[0]).items()}
    tensors[name][0] = float("nan")
    save_file(tensors, weights.files[0], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="activations are not finite"):
        calibrate(Checkpoint.open(broken), [InputGram(Site(0))], token_file(30), EXACT)
