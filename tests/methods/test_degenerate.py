"""Weights and texts with little in them: fits are lossless where the mathematics says so, and refused where not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold import hf
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.errors import SettingError
from kvfold.solve.shared_heads import low_rank

Make = Callable[..., Path]


def _changed(folder: Path, roles: str, change: Callable[[torch.Tensor], None], attention: str = "attn") -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    projections = [f"{role}_proj" for role in (*roles, *(["out"] if "o" in roles else []))]
    for name, tensor in tensors.items():
        if attention in name and name.endswith("weight") and name.split(".")[-2] in projections:
            change(tensor)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _difference(teacher: Path, student: Path, **more: Any) -> float:
    ids_BT = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    given = {"decoder_input_ids": ids_BT} if more.pop("paired", False) else {}
    with torch.no_grad():
        one, other = (hf.load(each)(ids_BT, **given).logits for each in (teacher, student))
    return float((one - other).abs().max())


# --- what was read is less than what is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 17])
def test_images_of_one_head_are_read_off_it_however_little_was_read(tokens: int) -> None:
    """Eckart and Young: of heads that span `rank` directions, no rank-`rank` map loses any, whatever the input."""
    generator = torch.Generator().manual_seed(tokens)
    first_ED, x_ND = torch.randn(8, 32, generator=generator), torch.randn(tokens, 32, generator=generator)
    image_EE = torch.randn(8, 8, generator=generator).double()
    maps_JED = torch.stack([first_ED.double(), image_EE @ first_ED.double(), first_ED.double()])
    looks_JEE = torch.stack([torch.eye(8, dtype=torch.float64)] * 3)
    looks_JEE[1] = torch.outer(image_EE[0], image_EE[0])  # one query alone was seen
    gram_DD = (x_ND.mT @ x_ND).double() / tokens
    merged = low_rank(maps_JED, looks_JEE, gram_DD, 8)
    torch.testing.assert_close(merged.lift_JER @ merged.shared_RD, maps_JED, rtol=1e-4, atol=1e-4)
    assert merged.lost < 1e-9


def test_heads_that_differ_are_not_said_to_lose_nothing_on_what_was_not_read() -> None:
    generator = torch.Generator().manual_seed(0)
    maps_JED = torch.randn(2, 8, 32, generator=generator, dtype=torch.float64)
    x_D = torch.randn(32, generator=generator, dtype=torch.float64)
    one_JEE = torch.stack([torch.eye(8, dtype=torch.float64)] * 2)
    merged = low_rank(maps_JED, one_JEE, torch.outer(x_D, x_D), 8)
    torch.testing.assert_close(merged.lift_JER @ (merged.shared_RD @ x_D), maps_JED @ x_D)  # what was read is kept
    assert 0.1 < merged.lost < 0.6


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_duplicate_heads_fold_without_loss_on_the_fewest_tokens(
    family: str, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    def twice(tensor: torch.Tensor) -> None:
        heads_GED = tensor.view(4, 8, -1)
        heads_GED[1], heads_GED[3] = heads_GED[0], heads_GED[2]

    teacher = _changed(tiny_checkpoint(family, attention_bias=False), "kv", twice)
    if family == "qwen2":  # it has biases
        tensors = load_file(teacher / "model.safetensors")
        for name in tensors:
            if name.endswith(("k_proj.bias", "v_proj.bias")):
                twice(tensors[name])
        save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    options = ConvertSettings(calibration=str(text), calibration_tokens=33, repair=("none",))
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options)
    assert _difference(teacher, student) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "repair", "least"),
    [
        ("gqa", {"kv_heads": 2}, "none", 33),  # a second moment about its mean: the width of the inputs, and one
        ("gqa", {"kv_heads": 2, "init": "align"}, "none", 33),
        ("gqa", {"kv_heads": 2}, "down", 48),  # a regression on what the MLP hands to it
        ("gqa", {"kv_heads": 2, "init": "mean"}, "o", 32),
        ("cla", {"share": 2}, "none", 33),
        ("elitekv", {"ratio": 0.5, "samples": 8}, "none", 33),
    ],
)
def test_too_few_tokens_are_refused_with_the_number(
    method: str, settings: dict[str, Any], repair: str, least: int, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher, out = tiny_checkpoint("llama"), tmp_path / "out"
    for tokens in (2, 17, least - 1):
        options = ConvertSettings(calibration=str(text), calibration_tokens=tokens, repair=(repair,))
        with pytest.raises(SettingError, match=rf"too few calibration tokens .*got {tokens} .*at least {least}"):
            convert(teacher, out, method, settings, options=options)
    assert not out.with_name("out.partial").exists()
    assert convert(
        teacher, out, method, settings, options=ConvertSettings(str(text), calibration_tokens=least, repair=(repair,))
    )


# --- projections of zeros -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["qkvo", "v", "o"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gqa", {"kv_heads": 2}),
        ("cla", {"share": 2}),
        ("elitekv", {"ratio": 0.5, "samples": 64}),
        ("elitekv", {"ratio": 0.5, "samples": 64, "metric": "inputs"}),
        ("elitekv", {"rope_chunks": 2, "latent_dim": 16, "samples": 64, "factor": "separate"}),
    ],
    ids=str,
)
def test_attention_that_writes_nothing_folds_without_loss(
    method: str, settings: dict[str, Any], roles: str, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher = _changed(tiny_checkpoint("llama", num_hidden_layers=2), roles, torch.Tensor.zero_)
    options = ConvertSettings(calibration=str(text), calibration_tokens=200, repair=("none",))
    student = convert(teacher, tmp_path / "student", method, settings, options=options)
    assert _difference(teacher, student) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["qkvo", "v", "o", "k"])
@pytest.mark.parametrize("metric", ["outputs", "inputs"])
def test_cross_attention_of_zeros_shares_a_latent(
    metric: str, roles: str, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher = _changed(tiny_checkpoint("bart"), roles, torch.Tensor.zero_, "encoder_attn")
    options = ConvertSettings(calibration=str(text), calibration_tokens=600)
    settings = {"metric": metric, "cross_latent_dim": 16}
    student = convert(teacher, tmp_path / "student", "crosslatent", settings, options=options)
    assert _difference(teacher, student, paired=True) < (0.5 if roles == "k" else 1e-5)  # values are there, and cut


@pytest.mark.slow
def test_heads_of_zeros_go_into_their_neighbours_without_loss(
    tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    def clear(tensor: torch.Tensor) -> None:
        tensor.view(4, 8, -1)[[0, 3]] = 0

    teacher = _changed(tiny_checkpoint("llama"), "kv", clear)
    options = ConvertSettings(calibration=str(text), calibration_tokens=200, repair=("none",))
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options)
    assert _difference(teacher, student) < 1e-4
