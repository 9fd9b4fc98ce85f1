"""Models with latent keys and values: against a textbook attention in the teacher's own coordinates, and their
cache."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.predict.plan import plan
from tolerance import assert_same

TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7
SPLIT = {"rope_chunks": 2, "latent_dim": 10, "samples": 200}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, grouped": ("qwen2", {"num_key_value_heads": 2}),
    "wide heads, biases": ("llama", {"head_dim": 16, "attention_bias": True}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
}
SEARCHES = ("elite", "uniform", "contribution")


@pytest.fixture
def make(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A tiny teacher, and the student that these settings make of it."""

    def made(source: str = "llama", **settings: Any) -> tuple[Path, Path]:
        family, changes = SOURCES[source]
        teacher = tiny_checkpoint(family, eos_token_id=None, **changes)
        (tmp_path / "text.txt").write_text(TEXT)
        options = ConvertSettings(calibration=str(tmp_path / "text.txt"), repair=("none",))
        return teacher, convert(teacher, tmp_path / "student", "elitekv", {**SPLIT, **settings}, options=options)

    return made


def _ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _close(found: Tensor, expected: Tensor) -> None:
    assert_same(found, expected)


class _Partly(torch.nn.Module):
    """The teacher's attention with some planes of each key head rotated, in the teacher's own coordinates, in
    float64."""

    def __init__(self, stock: Any, planes_GK: Tensor, window: int | None) -> None:
        super().__init__()
        self.stock, self.planes_GK, self.window = stock, planes_GK, window

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> tuple[Tensor, None]:
        stock, (batch, tokens) = self.stock, hidden_states.shape[:2]
        width, x = stock.head_dim, hidden_states.double()
        q, k, v = (
            torch.nn.functional.linear(x, p.weight.double(), None if p.bias is None else p.bias.double())
            for p in (stock.q_proj, stock.k_proj, stock.v_proj)
        )
        cos, sin = (each.double()[0, :, : width // 2] for each in position_embeddings)
        factor = float((cos**2 + sin**2).sqrt().mean())
        heads = []
        for head in range(stock.config.num_attention_heads):
            group = head // stock.num_key_value_groups
            logits = torch.zeros(batch, tokens, tokens, dtype=torch.float64)
            for plane in range(width // 2):
                a, b = (
                    torch.complex(each[..., at * width + plane], each[..., at * width + plane + width // 2])
                    for each, at in ((q, head), (k, group))
                )
                turn = torch.complex(cos, sin)[:, plane] if plane in self.planes_GK[group].tolist() else factor
                logits += ((a * turn)[:, :, None] * (b * turn)[:, None].conj()).real / math.sqrt(width)
            seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            if self.window:
                seen &= ~torch.ones(tokens, tokens, dtype=torch.bool).tril(-self.window)
            weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
            heads.append(weights @ v[..., group * width : (group + 1) * width])
        out = stock.o_proj(torch.cat(heads, -1).to(hidden_states.dtype))
        return out, None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "search"),
    [(source, search) for n, search in enumerate(SEARCHES) for source in [*SOURCES][n % 2 :: 2]],
)
@torch.inference_mode()
def test_a_whole_latent_leaves_nothing_but_the_rotation(
    source: str, search: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    """Biases of unrotated keys are gone, coordinates have moved: it is the teacher with fewer planes turned."""
    teacher, student = make(source, latent_dim=24 if "grouped" in source else 32, search=search)
    model: Any = hf.load(student)
    expected: Any = hf.load(teacher)
    shape = Checkpoint.open(teacher).shape
    for site, attention in shape.sites.items():
        kept = model.model.layers[site.layer].self_attn.planes
        layer = expected.model.layers[site.layer]
        layer.self_attn = _Partly(layer.self_attn, kept, attention.window)
    ids = _ids(2, 14)
    _close(model(ids).logits, expected(ids).logits)
    with hf.with_attention(model, "eager"):
        _close(model(ids).logits, expected(ids).logits)
    assert float((hf.load(teacher)(ids).logits - expected(ids).logits).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("source", SOURCES)
@torch.inference_mode()
def test_absorbed_steps_are_the_prompt_written_out(
    kind: str, source: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    model: Any = hf.load(make(source)[1])
    ids = _ids(2, 20)
    cache: Any = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=24)
    )
    steps = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 3, 1, 1, 5, 1], dim=1)]
    with hf.with_attention(model, "eager"):
        _close(torch.cat(steps, dim=1), model(ids, use_cache=False).logits)


@torch.inference_mode()
def test_a_step_writes_no_keys_of_the_past_out(
    make: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = hf.load(make("llama", latent_dim=4)[1])
    cache = DynamicCache(config=model.config)
    model(_ids(2, 12), past_key_values=cache)
    monkeypatch.setattr("kvfold.hf.latent.written_out", lambda *args: pytest.fail("written out"))
    model(_ids(2, 1), past_key_values=cache)
    model(_ids(2, 3), past_key_values=cache)


@torch.inference_mode()
def test_the_cache_holds_a_latent_and_the_rotated_planes(make: Callable[..., tuple[Path, Path]]) -> None:
    student = make("qwen2, grouped", rope_chunks="1/2/3/2", latent_dim="9/5/7/3")[1]
    model: Any = hf.load(student)
    cache: Any = model(_ids(3, 11)).past_key_values
    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [
        ((3, 1, 11, 2 * planes * 2), (3, 1, 11, width)) for planes, width in ((1, 9), (2, 5), (3, 7), (2, 3))
    ]
    elements = sum(2 * planes * 2 + width for planes, width in ((1, 9), (2, 5), (3, 7), (2, 3)))
    assert hf.live_cache_bytes(cache) == elements * 3 * 11 * 4
    shape = Checkpoint.open(student).shape
    assert hf.live_cache_bytes(cache) == grouped_cache(shape).bytes(11, batch=3, itemsize=4)
    config = json.loads((student / "config.json").read_text())
    assert (config["rope_chunks"], config["latent_dims"]) == ([1, 2, 3, 2], [9, 5, 7, 3])
    fp8 = hf.new_cache(model, "fp8", 0)
    hf.read(model, _ids(3, 11), fp8)
    assert hf.live_cache_bytes(fp8) == elements * 3 * 11 + 4 * 2 * 4


@pytest.mark.slow
@torch.inference_mode()
def test_planes_are_saved_and_read_again(make: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    student = make()[1]
    found = json.loads((student / "kvfold.json").read_text())["steps"][-1]["found"]["sites"]
    model: Any = hf.load(student)
    for layer in range(4):
        assert model.model.layers[layer].self_attn.planes.tolist() == found[f"layer {layer}"]["planes"]
    assert len({str(site["planes"]) for site in found.values()}) > 1
    model.save_pretrained(tmp_path / "again")
    again: Any = hf.load(tmp_path / "again")
    ids = _ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert Checkpoint.open(tmp_path / "again").hash() == Checkpoint.open(student).hash()
    saved = load_file(student / "model.safetensors")["model.layers.0.self_attn.planes"]
    assert saved.dtype == torch.int64
    narrow: Any = hf.load(student, dtype="bfloat16")
    assert torch.equal(narrow.model.layers[0].self_attn.planes, saved)
    body = AutoModel.from_pretrained(student)
    _close(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids).logits, model(ids).logits)


@torch.inference_mode()
def test_weights_of_attention_are_shown_by_eager_alone(make: Callable[..., tuple[Path, Path]]) -> None:
    model: Any = hf.load(make()[1], attention="eager")
    shown = model(_ids(1, 5), output_attentions=True).attentions
    assert [tuple(each.shape) for each in shown] == [(1, 4, 5, 5)] * 4
    _close(shown[0].sum(-1), torch.ones(1, 4, 5))


def test_a_fresh_model_has_planes_and_weights(make: Callable[..., tuple[Path, Path]]) -> None:
    student = make()[1]
    config = json.loads((student / "config.json").read_text())
    model: Any = hf.build({**config, "initializer_range": 0.5}, seed=3)
    assert model.model.layers[0].self_attn.planes.tolist() == [[0, 1]] * 4
    assert float(model.model.layers[0].self_attn.kv_down.weight.detach().std()) == pytest.approx(0.5, rel=0.2)
    assert type(AutoModelForCausalLM.from_pretrained(student)) is type(model)


def test_a_latent_student_is_a_source_of_its_own_kind(make: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    student = make()[1]
    kept = convert(student, tmp_path / "kept", "identity")
    assert Checkpoint.open(kept).hash() == Checkpoint.open(student).hash()
    for method, settings in (("gqa", {"kv_heads": 2}), ("elitekv", SPLIT)):
        for work in (lambda *given: convert(student, tmp_path / "no", *given), lambda *given: plan(student, *given)):
            with pytest.raises(SettingError, match="layer 0 caches rotated and latent already"):
                work(method, settings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_chunks": [1, 1]}, "rope_chunks must be a list of 4 numbers"),
        ({"latent_dims": 8}, "latent_dims must be a list of positive whole numbers or null"),
        ({"latent_dims": [8, 8, 0, 8]}, "latent_dims must be a list of positive whole numbers or null"),
    ],
)
def test_a_config_that_says_too_little_is_refused(
    changes: dict[str, Any], told: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    student = make()[1]
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedModel, match=told):
        Checkpoint.open(student)
