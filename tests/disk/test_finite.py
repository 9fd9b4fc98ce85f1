"""NaN, infinity and numbers that a dtype cannot hold are refused by name, wherever weights are read or written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint, save_model
from kvfold.disk.finite import check_finite
from kvfold.disk.output import write_json
from kvfold.errors import CheckpointError, SettingError
from kvfold.export.exporting import ENGINES, ExportSettings, export
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
ATTENTION, MLP, EMBEDDING = (
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.embed_tokens.weight",
)
METHODS = [
    ("gqa", {"kv_heads": "2"}),
    ("gqa", {"kv_heads": "1", "init": "mean"}),
    ("identity", {}),
    ("cla", {}),
    ("elitekv", {"rope_chunks": 2, "latent_dim": 16}),
    ("supra", {}),
]


def spoil(folder: Path, name: str, value: float) -> None:
    """Put a number into the middle of a tensor."""
    state = load_file(folder / "model.safetensors")
    flat = state[name].view(-1)
    flat[flat.numel() // 2] = value
    save_file(state, folder / "model.safetensors")


# --- one tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", sorted(BAD))
@pytest.mark.parametrize("place", [0, 517, 1022])
def test_one_bad_number_is_found_in_any_place_and_dtype(dtype: str, bad: str, place: int) -> None:
    tensor = torch.randn(1023).to(getattr(torch, dtype))
    check_finite(tensor, dtype, "w")
    tensor[place] = BAD[bad]
    with pytest.raises(CheckpointError, match=rf"here: tensor w holds NaN or infinity .got {bad}.; allowed: finite"):
        check_finite(tensor, dtype, "w", "here")


@pytest.mark.parametrize(
    ("dtype", "target", "largest", "above"),
    [
        ("float32", "float16", 65519.0, 65520.0),
        ("float32", "bfloat16", 3.39e38, 3.4e38),
        ("bfloat16", "float16", 65280.0, 65536.0),
        ("float64", "float32", 3.4e38, 3.5e38),
        ("float32", "float32", 3.4e38, None),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_that_a_dtype_rounds_to_a_finite_one_passes(
    dtype: str, target: str, largest: float, above: float | None, sign: int
) -> None:
    tensor = torch.zeros(9, dtype=getattr(torch, dtype))
    tensor[4] = sign * largest
    assert tensor.to(getattr(torch, target)).isfinite().all()
    check_finite(tensor, target, "w")
    if above is not None:
        tensor[4] = sign * above
        assert not tensor.to(getattr(torch, target)).isfinite().all()
        with pytest.raises(SettingError, match=f"tensor w holds a number that {target} cannot represent"):
            check_finite(tensor, target, "w")


def test_whole_numbers_empty_tensors_and_eight_bit_floats_pass() -> None:
    check_finite(torch.arange(5), "int64", "w")
    check_finite(torch.empty(0), "float16", "w")
    check_finite(torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn", "w")


# --- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize(("name", "bad"), [(ATTENTION, "nan"), (ATTENTION, "inf"), (MLP, "-inf"), (EMBEDDING, "nan")])
def test_no_method_takes_weights_that_are_no_numbers(
    tiny_checkpoint: Make, tmp_path: Path, method: str, settings: dict[str, Any], name: str, bad: str
) -> None:
    folder = tiny_checkpoint()
    spoil(folder, name, BAD[bad])
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds NaN or infinity .got {bad}.") as caught:
        convert(folder, tmp_path / "student", method, settings)
    assert str(caught.value).startswith(str(folder))
    assert not list(tmp_path.glob("student*")), "nothing is left behind"


def test_a_teacher_with_nan_reads_no_calibration_text(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    spoil(folder, MLP, float("nan"))
    for source in (str(text), "self"):
        options = ConvertSettings(calibration=source, calibration_tokens=256)
        with pytest.raises(CheckpointError, match=f"tensor {MLP} holds NaN or infinity"):
            convert(folder, tmp_path / "student", "gqa", {"kv_heads": "2", "init": "fit"}, options=options)
    assert not list(tmp_path.glob("student*"))


@pytest.mark.parametrize("name", [ATTENTION, MLP])
def test_a_narrowing_that_overflows_is_refused_and_the_mended_command_runs(
    tiny_checkpoint: Make, tmp_path: Path, name: str
) -> None:
    folder = tiny_checkpoint()
    spoil(folder, name, 2e5)
    with pytest.raises(SettingError, match=f"tensor {name} holds a number that float16 cannot represent.*bfloat16"):
        convert(folder, tmp_path / "student", "identity", {}, options=ConvertSettings(dtype="float16"))
    assert not list(tmp_path.glob("student*"))
    student = convert(folder, tmp_path / "student", "identity", {}, options=ConvertSettings(dtype="bfloat16"))
    assert load_file(student / "model.safetensors")[name].float().max() > 1.9e5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_trained_weights_that_are_no_numbers_are_not_saved(tiny_checkpoint: Make, tmp_path: Path, dtype: str) -> None:
    source = Checkpoint.open(tiny_checkpoint(dtype=dtype))
    state = {name: source.read(name).float() for name in source.names()}
    state[ATTENTION][0, 0] = float("nan") if dtype == "float32" else 7e4
    (tmp_path / "out").mkdir()
    kind = CheckpointError if dtype == "float32" else SettingError
    with pytest.raises(kind, match=f"tensor {ATTENTION} holds"):
        save_model(tmp_path / "out", config=source.config, state=state, lineage={}, like=source)


def test_a_student_or_teacher_with_nan_is_not_trained(
    alone: None, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "2"})
    settings = UptrainSettings(data=str(text), tokens=64, sequence_length=16, batch_size=2, precision="fp32")
    other = tiny_checkpoint(name="other", seed=1)
    spoil(other, MLP, float("inf"))
    told = f"tensor {MLP} holds NaN or infinity"
    with pytest.raises(CheckpointError, match=told):
        uptrain(student, tmp_path / "out", settings, teacher=other)
    with pytest.raises(CheckpointError, match=told):
        uptrain(other, tmp_path / "out", replace(settings, loss="ce"))
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_with_nan_has_a_hash_and_names_its_first_tensor(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    sound = Checkpoint.open(folder).hash()
    for name in (MLP, ATTENTION):
        spoil(folder, name, float("nan"))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.hash() != sound
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {ATTENTION} holds NaN"):
            checkpoint.require_finite()


# --- exports --------------------------------------------------------------------------------------------------------

QUICK = {"prompt_tokens": 6, "new_tokens": 2}


@pytest.mark.parametrize(("to", "package"), [("gguf", "gguf"), ("ctranslate2", "ctranslate2"), ("transformers", None)])
def test_no_export_takes_nan(tiny_checkpoint: Make, tmp_path: Path, to: str, package: str | None) -> None:
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = tiny_checkpoint()
    if to == "transformers":
        folder = convert(folder, tmp_path / "shared", "cla")
        (folder / "kvfold.json").unlink()
    spoil(folder, MLP, float("nan"))
    with pytest.raises(CheckpointError, match=f"tensor {MLP} holds NaN or infinity"):
        export(folder, tmp_path / "out", to, ExportSettings(**QUICK))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [MLP, "model.layers.0.input_layernorm.weight"])
def test_ctranslate2_refuses_what_float16_cannot_hold(tiny_checkpoint: Make, tmp_path: Path, name: str) -> None:
    pytest.importorskip("ctranslate2")
    folder = tiny_checkpoint()
    spoil(folder, name, 1e6)
    with pytest.raises(SettingError, match=f"tensor {name} holds a number that float16 cannot represent"):
        export(folder, tmp_path / "out", "ctranslate2", ExportSettings(dtype="float16", **QUICK))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("dtype", "value", "refused"),
    [("float16", 65519.0, False), ("float16", 65520.0, True), ("bfloat16", 3.4e38, True), ("int8", 9e6, True)],
)
def test_a_gguf_holds_finite_numbers_alone(
    tiny_checkpoint: Make, tmp_path: Path, dtype: Any, value: float, refused: bool
) -> None:
    gguf = pytest.importorskip("gguf")
    folder = tiny_checkpoint(hidden_size=64, head_dim=16, intermediate_size=64)
    name = "model.layers.2.mlp.up_proj.weight"
    spoil(folder, name, value)
    source, engine = Checkpoint.open(folder), ENGINES["gguf"]
    if refused:
        with pytest.raises(SettingError, match=f"{dtype} cannot hold {name}"):
            engine.write(source, None, tmp_path, dtype)
        return
    engine.write(source, None, tmp_path, dtype)
    for each in gguf.GGUFReader(tmp_path / engine.file).tensors:
        assert np.isfinite(gguf.quants.dequantize(each.data, each.tensor_type)).all()


# --- tied heads -----------------------------------------------------------------------------------------------------


def tied(folder: Path, head: torch.Tensor) -> Path:
    """Store an output projection beside the embedding that config.json ties it to."""
    save_file({**load_file(folder / "model.safetensors"), "lm_head.weight": head}, folder / "model.safetensors")
    return folder


def test_a_head_that_is_tied_and_differs_is_refused_at_the_door(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    tied(folder, embedding + 1)
    for use in (
        lambda: Checkpoint.open(folder),
        lambda: convert(folder, tmp_path / "out", "gqa", {"kv_heads": "2"}),
        lambda: export(folder, tmp_path / "out", "transformers"),
    ):
        with pytest.raises(CheckpointError, match=r"ties lm_head\.weight .*set tie_word_embeddings to false"):
            use()
    config = Checkpoint.open(tiny_checkpoint(name="plain", tie_word_embeddings=True)).config
    write_json(folder / "config.json", {**config, "tie_word_embeddings": False})  # the remedy
    student = Checkpoint.open(convert(folder, tmp_path / "out", "gqa", {"kv_heads": "2"}))
    assert torch.equal(student.read("lm_head.weight"), embedding + 1)


def test_a_tied_head_without_its_embedding_is_refused(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop(EMBEDDING)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"got no embedding"):
        Checkpoint.open(folder)


def test_a_tied_head_in_a_wider_dtype_is_compared_by_its_numbers(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True, dtype="bfloat16")
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    Checkpoint.open(tied(folder, embedding.float()))
    with pytest.raises(CheckpointError, match="no embedding has its values"):
        Checkpoint.open(tied(folder, embedding.float() + 1e-4))


def test_a_bart_with_another_head_is_refused_and_a_t5_of_two_matrices_is_not(tiny_checkpoint: Make) -> None:
    bart, t5 = tiny_checkpoint("bart", name="bart"), tiny_checkpoint("t5", name="t5")
    shared = load_file(bart / "model.safetensors")["model.shared.weight"]
    Checkpoint.open(tied(bart, shared.clone()))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.shared\.weight"):
        Checkpoint.open(tied(bart, shared + 1))
    # transformers 5 writes `true` into the config.json of every T5, T5.1.1 with its two matrices too
    two = Checkpoint.open(tied(t5, load_file(t5 / "model.safetensors")["shared.weight"] + 1))
    assert "lm_head.weight" in two.names()
