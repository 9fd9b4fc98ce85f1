"""What all exports share: the comparison, lineage, refusals, and what a stop leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import LLAMA3, MISTRAL, QUICK, Heard, Make, found, needs_ct2
from kvfold.contracts.site import Rope
from kvfold.errors import DataError, Interrupted, OutputError, SettingError, UnsupportedModel
from kvfold.export import agreement, ct2_decoder, limits
from kvfold.export.exporting import ENGINES, ExportSettings, export


@pytest.mark.slow
@needs_ct2
def test_the_export_says_its_lineage_and_the_window_and_repeating_does_nothing(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher, heard = tiny_checkpoint("llama", **MISTRAL, sliding_window=16), Heard()
    out = export(teacher, tmp_path / "out", "ctranslate2", progress=heard)
    assert any("exact for contexts of 16 tokens" in line for line in heard.lines)
    assert found(out)["exact_up_to"] == 16
    assert found(out)["positions"] == 3 * 15  # the comparison stays inside the window
    assert (out / "tokenizer.json").is_file()
    lineage = json.loads((out / "kvfold.json").read_text())
    assert lineage["root"]["name"] == "teacher"

    before = (out / "model.bin").stat().st_mtime_ns
    export(teacher, out, "ctranslate2", progress=heard)
    assert "is complete" in heard.lines[-1]
    assert (out / "model.bin").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="--overwrite"):
        export(teacher, out, "ctranslate2", QUICK)
    export(teacher, out, "ctranslate2", QUICK, overwrite=True)
    assert (out / "model.bin").stat().st_mtime_ns > before


@pytest.mark.slow
@needs_ct2
def test_an_engine_that_computes_something_else_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint("llama", rope_parameters=LLAMA3)
    monkeypatch.setattr(ct2_decoder, "frequency_factors", lambda rope: None)
    with pytest.raises(UnsupportedModel, match="disagrees with transformers: logits differ"):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.slow
@needs_ct2
def test_after_ctrl_c_the_same_export_starts_again(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = tiny_checkpoint("llama"), tmp_path / "out"

    def stop(*_: Any) -> None:
        (tmp_path / "out.partial" / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ENGINES["ctranslate2"], "write", stop)
        with pytest.raises(Interrupted, match="the same command starts it again"):
            export(teacher, out, "ctranslate2", QUICK)
    assert not out.exists()
    assert found(export(teacher, out, "ctranslate2", QUICK))["loaded"]
    assert not (tmp_path / "out.partial").exists()


@needs_ct2
def test_a_checkpoint_without_tokenizer_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        export(tiny_checkpoint("llama", tokenizer=False), tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_frequency_factors_are_those_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = limits.frequency_factors(Rope(64, 10000.0, scaling=LLAMA3))
    assert factors is not None
    assert factors.min() == 1
    assert factors.max() == 8
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert limits.frequency_factors(Rope(64, 10000.0)) is None
    linear = limits.frequency_factors(Rope(8, 10000.0, scaling={"rope_type": "linear", "factor": 4.0}))
    assert linear is not None
    assert linear.tolist() == [4, 4, 4, 4]


def _reference() -> agreement.Reference:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 9)).astype(np.float32)
    return agreement.Reference([[1, 2, 3]], [rows[2:].argmax(-1).tolist()], [rows])


def test_agreement_counts_tokens_and_excuses_only_near_ties() -> None:
    known = _reference()
    same = agreement.compare(known, known.logits, known.answers)
    agreement.require(same, "engine", "float32")
    assert (same["positions"], same["tokens"], same["same_tokens"], same["max_difference"]) == (5, 3, 3, 0)

    other = [known.answers[0][0], (known.answers[0][1] + 1) % 9, 0]
    parted = agreement.compare(known, known.logits, [other])
    assert (parted["same_tokens"], parted["differing_answers"], parted["near_ties"]) == (1, 1, 0)
    with pytest.raises(UnsupportedModel, match="no near tie"):
        agreement.require(parted, "engine", "float32")

    tie = known.logits[0].copy()
    tie[3, other[1]] = tie[3].max() - 1e-6
    known = agreement.Reference(known.prompts, known.answers, [tie])
    noisy = agreement.compare(known, [tie + np.float32(1e-5)], [other])
    assert (noisy["differing_answers"], noisy["near_ties"]) == (1, 1)
    agreement.require(noisy, "engine", "float32")


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_logits_that_are_off_are_refused(wrong: float) -> None:
    known = _reference()
    found = agreement.compare(known, [known.logits[0] + np.float32(wrong)], known.answers)
    with pytest.raises(UnsupportedModel, match="logits differ"):
        agreement.require(found, "engine", "bfloat16")


def test_an_unknown_engine_is_named_with_the_nearest(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no engine is called 'ctranslate'.*did you mean 'ctranslate2'\?"):
        export(tiny_checkpoint("llama"), tmp_path / "out", "ctranslate")


@pytest.mark.parametrize(
    ("engine", "package", "extra"), [("ctranslate2", "ctranslate2", "ct2"), ("gguf", "gguf", "gguf")]
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=rf"not installed; pip install 'kvfold\[{extra}\]'"):
        export(tmp_path / "missing", tmp_path / "out", engine)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "relu2"}, "lacks the activation"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' cannot be exported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotates whole heads",
        ),
    ],
)
@needs_ct2
def test_what_the_engine_has_no_place_for_is_refused(
    tiny_checkpoint: Make, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    teacher = tiny_checkpoint("llama")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModel, match=said):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_lengths_below_one_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} must be at least 1"):
        ExportSettings(**{name: 0})
