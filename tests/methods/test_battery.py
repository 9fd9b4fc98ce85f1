"""The battery: what every method owes on every family, in bits, bytes, tokens and gradients.

Methods and families are discovered, so a new one is under test by being there. A method that is not named in
`FOLDED` runs with its lossless settings; methods that can run without text run twice, by weights alone and by what the
teacher reads.

Not every check runs on every pair of a method and a source: each runs on every source of `CORE`, with one method or
two, and on every method, the next check on other pairs. Other families, and architectures that share one, meet a few
checks each. `make test` meets every pair of a method and a source of `CORE` in some check; `make check` runs the quick
checks on one pair of each method and a few more.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from examples import APART, CORE, clips, example, generate, paired, read
from kvfold import hf, methods
from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.site import Shape, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families, family_of
from tolerance import assert_same

METHODS = methods.all_methods()
ENDLESS = {"eos_token_id": None}  # every generation is as long as it was asked to be
FREE = {"encoder_no_repeat_ngram_size": 0}  # a rule of Blenderbot's that transformers applies to no assistant
WIDTH = 32  # of the tiny models
WINDOWED = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
DECOUPLED = {
    **WINDOWED,
    "model_type": "kvfold_mistral",
    "architectures": ["KvfoldMistralForCausalLM"],
    "num_key_value_heads": 2,
    "value_heads": [[0, 1, 0, 1], None, [0, 1, 2, 3], [0, 0, 0, 0]],
}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
GROUPED_T5 = {
    "model_type": "kvfold_t5",
    "architectures": ["KvfoldT5ForConditionalGeneration"],
    "num_key_value_heads": 2,
    "cross_num_key_value_heads": [2, 4, 4, 2],
}
WIDE_GEMMA = {  # an encoder of another width and depth, and a decoder that shares heads
    part: {**all_families()["t5gemma"].tiny()[part], **changes}
    for part, changes in (
        ("encoder", {"hidden_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 1}),
        ("decoder", {"num_key_value_heads": 2, "attention_bias": True, "layer_types": LAYERS}),
    )
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in all_families()},
    **{family: (family, {"eos_token_id": 95}) for family in ("glm", "glm4")},  # null is a list of three; 95 never comes
    "windowed": ("llama", WINDOWED),
    "biased": ("llama", {"attention_bias": True}),
    "grouped": ("llama", {"num_key_value_heads": 2}),
    "decoupled": ("llama", DECOUPLED),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "t5-grouped": ("t5", GROUPED_T5),
    "t5-wide": ("t5", {"feed_forward_proj": "relu", "d_kv": 16, "num_layers": 5, "num_decoder_layers": 3}),
    "bart-uneven": ("bart", {"encoder_layers": 5, "decoder_layers": 3, "encoder_attention_heads": 2}),
    "t5gemma-wide": ("t5gemma", WIDE_GEMMA),
    **{name: (family, {**changes, **FREE}) for name, (family, changes) in paired().items()},
}


def _fewer_heads(shape: Shape) -> dict[str, Any]:
    """Half of the heads: grouped-query attention of a multi-head source, multi-query of a grouped one.

    Where there is cross-attention, that has one head in all layers.
    """
    heads = next(each.num_key_value_heads for site, each in shape.sites.items() if site.kind == "self") // 2
    return {"kv_heads": f"self={heads},cross=1" if any(site.kind == "cross" for site in shape.sites) else heads}


def _one_plane(shape: Shape) -> dict[str, Any]:
    """One rotated plane of each key head, and a latent of 12."""
    return {"rope_chunks": 1, "latent_dim": 12, "samples": 200}


FOLDED: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "gqa": _fewer_heads,
    "gqa fit": _fewer_heads,
    "cla": lambda shape: {"init": "mean"},
    "cla fit": lambda shape: {"share": 3},
    "elitekv": _one_plane,
    "elitekv fit": _one_plane,
    "mla": lambda shape: {"rope_dim": 4, "latent_dim": 12, "planes": "even"},
    "mla fit": lambda shape: {"rope_dim": 8, "latent_dim": 12, "planes": "2/1/1/0"},
    "crosslatent": lambda shape: {},
    "fido fit": lambda shape: {"cross_every": 2, "cross_layers": "auto"},
    "crosslatent fit": lambda shape: {"cross_latent_dim": 12},
    "supra": lambda shape: {},
    "supra hybrid": lambda shape: {"preset": "hybrid", "window": 4, "sinks": 2, "keep_layers": 1},
}
LOSSLESS = {"identity", "crosslatent", "dha"}  # cases whose student is the teacher, of dha until it is trained
CASES = [*METHODS, "gqa fit", "cla fit", "elitekv fit", "mla fit", "crosslatent fit", "fido fit", "supra hybrid"]


def _takes(case: str, source: str) -> bool:
    """Does the method take this source? What it refuses is told in its own tests."""
    family, changes = SOURCES[source]
    found = all_families()[family]
    method, shape = METHODS[case.split()[0]], found.shape({**found.tiny(), **changes})
    try:
        lossless = method.lossless(shape)
        methods.check(case.split()[0], lossless, shape)
        folded = method.Config(**FOLDED[case](shape)) if case in FOLDED else lossless
        methods.check(case.split()[0], folded, shape)
    except (SettingError, UnsupportedModel):
        return False
    return True


TAKERS = {source: [case for case in CASES if _takes(case, source)] for source in SOURCES}


EVERY = 5  # a family that is not of the core meets each fifth check


def _core(source: str) -> bool:
    """Whether a source meets every check: those with settings of their own, and the families of `CORE`."""
    return source in CORE or (source not in all_families() and source not in paired())


def drawn(check: int) -> list[tuple[str, str]]:
    """The pairs that the n-th check runs on: a source meets one method after the other from check to check."""
    pairs = [
        (takers[(check + n) % len(takers)], source)
        for n, (source, takers) in enumerate(TAKERS.items())
        if _core(source) or (check + n) % EVERY == 0
    ]
    for n, case in enumerate(CASES):
        if case not in (met for met, _ in pairs):
            taken = [source for source, takers in TAKERS.items() if case in takers and _core(source)]
            pairs.append((case, taken[(check + n) % len(taken)]))
    return pairs


def quick() -> list[tuple[str, str]]:
    """The pairs of `make check`: one of each method, and every third of the first mix."""
    mix = drawn(0)
    one = {case: (case, source) for case, source in mix}
    return list(dict.fromkeys([*one.values(), *mix[::3]]))


def _checks() -> list[str]:
    return [n for n, each in globals().items() if n.startswith("test_") and "pair" in each.__annotations__]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every check its pairs: the quick ones, and as slow tests a mix of its own."""
    if "pair" in metafunc.fixturenames:
        check = _checks().index(metafunc.function.__name__)
        marks = dict.fromkeys(drawn(check), (pytest.mark.slow,)) | dict.fromkeys(quick(), ())
        pairs = [pytest.param(pair, id="-".join(pair), marks=mark) for pair, mark in marks.items()]
        metafunc.parametrize("pair", pairs, indirect=True)


TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7
MISTAKES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gqa": [
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 64}, "kv_heads"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"kv_heads": "self=2,self=1"}, "kv_heads"),
        ({"kv_heads": "cross=2"}, "kv_heads"),
        ({"kv_heads": 2, "init": "median"}, "init"),
    ],
    "cla": [
        ({"share": 5}, "share"),
        ({"share": 0}, "share"),
        ({"layout": "lasagne"}, "layout"),
        ({"layout": "0,0,3,2"}, "layout"),
        ({"layout": "0,0,1,1"}, "layout"),
        ({"layout": "0,0"}, "layout"),
        ({"budget": 0.5}, "budget"),
        ({"layout": "auto", "budget": 0.01}, "budget"),
        ({"init": "align"}, "init"),
    ],
    "crosslatent": [
        ({"cross_latent_dim": 33}, "cross_latent_dim"),
        ({"cross_latent_dim": 0}, "cross_latent_dim"),
        ({"cross_latent_dim": "wide"}, "cross_latent_dim"),
        ({"cross_latent_dim": 8, "metric": "cosine"}, "metric"),
    ],
    "fido": [
        ({"cross_every": 0}, "cross_every"),
        ({"cross_every": 5}, "cross_every"),
        ({"cross_layers": "3,1"}, "cross_layers"),
        ({"cross_layers": "1,4"}, "cross_layers"),
        ({"cross_layers": "few"}, "cross_layers"),
        ({"cross_every": 2, "fade": 1}, "fade"),
    ],
    "identity": [({"kv_heads": 2}, "kv_heads")],
    "supra": [
        ({"window": 8}, "window"),
        ({"preset": "hybrid", "window": -1}, "window"),
        ({"preset": "hybrid", "window": 0}, "sinks"),
        ({"preset": "hybrid", "rope": "after"}, "rope"),
        ({"preset": "hybrid", "feature_dim": 5}, "feature_dim"),
        ({"feature_dim": 12}, "feature_dim"),
        ({"features": "none"}, "features"),
        ({"features": "none", "window": 8, "feature_dim": 8}, "feature_dim"),
        ({"features": "elu"}, "features"),
        ({"keep_layers": "0,7"}, "keep_layers"),
        ({"keep_layers": "0,1,2,3"}, "keep_layers"),
        ({"keep_layers": "auto:4"}, "keep_layers"),
        ({"preset": "hybrid", "decay": "fast"}, "decay"),
        ({"preset": "hybrid", "gate": -1.5}, "gate"),
        ({"recall_tokens": 0}, "recall_tokens"),
    ],
    "elitekv": [
        ({"rope_chunks": 2}, "latent_dim"),
        ({"latent_dim": 8}, "rope_chunks"),
        ({"rope_chunks": 5, "latent_dim": 8}, "rope_chunks"),
        ({"rope_chunks": 0, "latent_dim": 8}, "rope_chunks"),
        ({"rope_chunks": "2/2", "latent_dim": 8}, "rope_chunks"),
        ({"rope_chunks": 2, "latent_dim": 33}, "latent_dim"),
        ({"rope_chunks": 2, "latent_dim": "wide"}, "latent_dim"),
        ({"ratio": 0.1}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.5, "rope_chunks": 2}, "ratio"),
        ({"rope_chunks": 2, "latent_dim": 8, "samples": 1}, "samples"),
        ({"rope_chunks": 2, "latent_dim": 8, "search": "greedy"}, "search"),
    ],
    "mla": [
        ({"rope_dim": 4}, "latent_dim"),
        ({"latent_dim": 8}, "rope_dim"),
        ({"rope_dim": 3, "latent_dim": 8}, "rope_dim"),
        ({"rope_dim": 10, "latent_dim": 8}, "rope_dim"),
        ({"rope_dim": 34, "latent_dim": 8, "planes": "4/4/4/4"}, "rope_dim"),
        ({"rope_dim": 4, "latent_dim": 34}, "latent_dim"),
        ({"rope_dim": 4, "latent_dim": 1}, "latent_dim"),
        ({"rope_dim": 4, "latent_dim": 8, "planes": "slow"}, "planes"),
        ({"rope_dim": 4, "latent_dim": 8, "planes": "1/1"}, "planes"),
        ({"rope_dim": 4, "latent_dim": 8, "planes": "5/0/0/0"}, "planes"),
        ({"rope_dim": 4, "latent_dim": 8, "norm": "none"}, "norm"),
        ({"ratio": 0.01}, "ratio"),
        ({"ratio": 0.5, "rope_dim": 4}, "ratio"),
        ({"ratio": 0.5, "planes": "1/1/1/1"}, "planes"),
    ],
}


@dataclass(frozen=True)
class Pair:
    """A teacher, the method that folds it, and the student that came out."""

    case: str
    method: Method
    name: str
    shape: Shape
    settings: dict[str, Any]
    options: ConvertSettings
    teacher: Path
    student: Path
    model: Any  # the student, with kvfold's attention
    taught: Any  # the teacher
    stock: Any  # the student in transformers' own classes, heads repeated where those share none


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _folded(
    _built: Callable[..., Path],
    byte_tokenizer: Path,
    span_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Pair]:
    """Teacher and student of a pair, converted and loaded once for all checks."""

    @cache
    def fold(case: str, source: str) -> Pair:
        family, changes = SOURCES[source]
        name, folder = case.split()[0], tmp_path_factory.mktemp(case.replace(" ", "-"))
        reads = name != case  # what reads has a tokenizer, whose vocabulary is larger
        pairs, audio = all_families()[family].encoder_decoder, all_families()[family].audio
        vocabulary = {"vocab_size": 300 if pairs else 260} if reads else {}
        teacher = _built(family, 0, None, "safetensors", {**ENDLESS, **changes, **vocabulary})
        options = ConvertSettings()
        if reads:
            teacher = Path(shutil.copytree(teacher, folder / "teacher"))
            shutil.copytree(span_tokenizer if pairs else byte_tokenizer, teacher, dirs_exist_ok=True)
            (folder / "text.txt").write_text(TEXT)
            # tests of calibration and repair look at all that is refitted; here the student's runtime is under test
            text, effort = clips(folder) if audio else folder / "text.txt", "standard" if source in APART else "quick"
            options = ConvertSettings(calibration=str(text), effort=effort)
        method, shape = METHODS[name], Checkpoint.open(teacher).shape
        settings = FOLDED[case](shape) if case in FOLDED else example(method, shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVFOLD_CACHE", str(folder / "cache"))
            student = convert(teacher, folder / "student", name, settings, options=options)
        model = hf.load(student)
        stock, taught = _stock(student).eval(), hf.load(teacher)
        return Pair(case, method, name, shape, settings, options, teacher, student, model, taught, stock)

    return fold


@pytest.fixture
def pair(request: pytest.FixtureRequest, _folded: Callable[[str, str], Pair]) -> Pair:
    """What a check runs on; see `drawn`."""
    return _folded(*request.param)


def _stock(student: Path) -> Any:
    """The student as transformers loads it without kvfold; a T5 or BART of ours as one whose heads are repeated."""
    config = json.loads((student / "config.json").read_text())
    if config.get("cross_num_key_value_heads") and config.get("cross_latent_dim", WIDTH) == WIDTH:
        return _repeated(load_file(student / "model.safetensors"), config)
    sound = "num_mel_bins" in config
    paired = AutoModelForSpeechSeq2Seq if sound else AutoModelForSeq2SeqLM
    auto = paired if config.get("is_encoder_decoder") else AutoModelForCausalLM
    stock, found = auto.from_pretrained(student, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return stock


def _repeated(tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """The same function with as many key/value heads as query heads, in a class that knows of no others."""
    ours = (
        "num_key_value_heads",
        "self_num_key_value_heads",
        "cross_num_key_value_heads",
        "cross_latent_dim",
        "cross_attention_layers",
        "model_type",
    )
    known = {key: value for key, value in config.items() if key not in ours}
    made = transformers.AutoConfig.for_model(config["model_type"].removeprefix("kvfold_"), **known)
    model = getattr(transformers, config["architectures"][0].removeprefix("Kvfold"))(made)
    family = family_of(config)
    shape, stack = family.shape(config), model.get_submodule(family.body.layers)
    for layer in set(range(shape.num_layers)) - {site.layer for site in shape.crossed}:
        for path in family.branch(Site(layer, "cross")):
            model.set_submodule(path, _Nothing())
        stack[layer].register_forward_pre_hook(_unread, with_kwargs=True)
    there, width = model.state_dict(), shape.sites[Site(0)].head_dim
    for name, tensor in tensors.items():
        if len(tensor) < len(there[name]):
            heads = tensor.unflatten(0, (-1, width))
            tensor = heads.repeat_interleave(len(there[name]) // len(tensor), dim=0).flatten(0, 1)
        there[name].copy_(tensor)
    model.load_state_dict(there)
    return model


def _unread(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As FiDO's authors remove a cross-attention: the layer is given no encoder output."""
    bound = signature(layer.forward).bind(*args, **kwargs)
    bound.arguments["encoder_hidden_states"] = None
    return bound.args, bound.kwargs


class _Nothing(nn.Module):
    """In place of a removed module: a T5Gemma calls its cross-attention whether there is an encoder output or not."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return (torch.zeros_like(hidden_states), None) if kwargs else hidden_states


def _summed(gradient: Tensor, like: Tensor, width: int) -> Tensor:
    """What repeated heads learn is what the one head learns that they are, `width` rows each."""
    if gradient.shape == like.shape:
        return gradient
    return gradient.view(len(like) // width, -1, width, *gradient.shape[1:]).sum(1).reshape(like.shape)


def _inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Ids as a model takes them: an encoder-decoder reads them backwards, and is asked for them in order."""
    return {**read(model, ids.flip(1)), "decoder_input_ids": ids} if _pairs(model) else {"input_ids": ids}


def _pairs(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def _ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _close(found: Tensor, expected: Tensor, scale: float | None = None) -> None:
    assert_same(found, expected, scale=scale)


# --- which pairs a check meets -------------------------------------------------------------------------------------


def test_every_check_meets_every_method_and_every_source_and_some_check_every_pair() -> None:
    met = [drawn(check) for check, _ in enumerate(_checks())]
    for pairs in met:
        assert {case for case, _ in pairs} == set(CASES)
        assert {source for _, source in pairs} >= set(filter(_core, SOURCES))
    every = set().union(*met)
    assert every >= {(case, source) for source, takers in TAKERS.items() for case in takers if _core(source)}
    assert {source for _, source in every} == set(SOURCES)


# --- logits --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_lossless_corner_is_the_teacher_to_the_bit(pair: Pair, tmp_path: Path) -> None:
    lossless = pair.method.lossless(pair.shape)
    made = convert(pair.teacher, tmp_path / "lossless", pair.name, spelled(lossless), options=pair.options)
    student: Any = hf.load(made)
    inputs = _inputs(student, _ids(2, 20))
    found, expected = (model(**inputs).logits for model in (student, pair.taught))
    if pair.method.student(lossless, pair.shape).shape.family == pair.shape.family:
        assert torch.equal(found, expected)
    else:  # another architecture multiplies in another order
        _close(found, expected)


@torch.inference_mode()
def test_folding_moves_the_logits(pair: Pair) -> None:
    """Or the tests of this file would hold for a method that did nothing."""
    inputs = _inputs(pair.model, _ids(2, 20))
    moved = (pair.model(**inputs).logits - pair.taught(**inputs).logits).abs().max()
    assert (moved > 1e-3) == (pair.case not in LOSSLESS)


@torch.inference_mode()
def test_token_by_token_is_the_whole_prompt(pair: Pair) -> None:
    inputs, cache = _inputs(pair.model, _ids(2, 20)), hf.new_cache(pair.model, "growing", 20)
    expected = pair.model(**inputs).logits
    written = "decoder_input_ids" if _pairs(pair.model) else "input_ids"
    if _pairs(pair.model):
        inputs = {
            "encoder_outputs": pair.model.get_encoder()(**read(pair.model, _ids(2, 20).flip(1))),
            written: inputs[written],
        }
    tokens = inputs[written].split(1, dim=1)
    steps = [pair.model(**{**inputs, written: token}, past_key_values=cache).logits for token in tokens]
    _close(torch.cat(steps, dim=1), expected)


@torch.inference_mode()
def test_stock_transformers_computes_the_same_and_saves_it_whole(pair: Pair, tmp_path: Path) -> None:
    inputs = _inputs(pair.model, _ids(2, 20))
    _close(pair.model(**inputs).logits, pair.stock(**inputs).logits)
    pair.model.save_pretrained(tmp_path / "again")
    again = hf.load(tmp_path / "again")
    assert torch.equal(again(**inputs).logits, pair.model(**inputs).logits)
    shapes = {name: each.shape for name, each in again.named_parameters()}
    assert shapes == {name: each.shape for name, each in pair.model.named_parameters()}
    assert set(shapes) == {name for name, _ in pair.stock.named_parameters()}


# --- generation ----------------------------------------------------------------------------------------------------


def _written(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy answers: `ids_BT`, the logits behind each new token `(B, T', V)`, and the cache."""
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        made = generate(model, ids, do_sample=False, **options)
    before = 1 if _pairs(model) else ids.shape[1]
    return made.sequences[:, before:], torch.stack(made.logits, dim=1), made.past_key_values


def test_a_cache_holds_the_bytes_that_were_promised(pair: Pair) -> None:
    config = pair.method.resolve(pair.method.Config(**pair.settings), pair.shape, {})
    promised = pair.method.cache_spec(config, pair.shape)
    for batch, prompt in ((1, 9), (3, 12)):
        cache = _written(pair.model, _ids(batch, prompt))[2]
        cached = (1 if _pairs(pair.model) else prompt) + 8 - 1  # the last token was never read
        encoded = pair.shape.encoder_positions or prompt
        expected = promised.bytes(cached, batch=batch, itemsize=4, encoder_tokens=encoded)
        assert hf.live_cache_bytes(cache) == expected


@pytest.mark.slow
def test_padding_and_neighbours_do_not_change_a_row(pair: Pair) -> None:
    """What is continued is padded on the left; what an encoder reads on the right, or on either side."""
    ids = _ids(3, 12)
    if pair.shape.encoder_positions is not None:
        return  # sound is never padded
    counts = hasattr(pair.model.config, "max_position_embeddings")  # an encoder with learned positions counts padding
    for left in [True] if not _pairs(pair.model) else [False] if counts else [False, True]:
        mask = torch.ones_like(ids)
        for row, padding in enumerate((5, 0, 9)):
            mask[row, slice(padding) if left else slice(12 - padding, 12)] = 0
        answers, logits, _ = _written(pair.model, ids * mask, attention_mask=mask)
        for row in range(3):
            alone, expected, _ = _written(pair.model, ids[row : row + 1, mask[row].bool()])
            _close(logits[row], expected[0])
            assert torch.equal(answers[row], alone[0])


@pytest.mark.slow
def test_a_static_cache_writes_the_same(pair: Pair) -> None:
    dynamic, expected, _ = _written(pair.model, _ids(2, 10))
    static, logits, _ = _written(pair.model, _ids(2, 10), cache_implementation="static")
    _close(logits, expected)
    assert torch.equal(static, dynamic)


@pytest.mark.slow
def test_beams_are_those_of_stock_transformers(pair: Pair) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    with torch.no_grad():
        ours, theirs = (
            generate(
                model,
                _ids(2, 10),
                attention_mask=torch.ones(2, 10),
                max_new_tokens=8,
                do_sample=False,
                return_dict_in_generate=True,
                **options,
            )
            for model in (pair.model, pair.stock)
        )
    _close(ours.sequences_scores, theirs.sequences_scores)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.slow
def test_samples_are_those_of_stock_transformers(pair: Pair) -> None:
    written = []
    for model in (pair.model, pair.stock):
        torch.manual_seed(0)
        options = {"attention_mask": torch.ones(3, 10), "do_sample": True, "top_k": 0, "max_new_tokens": 8}
        written.append(generate(model, _ids(3, 10), **options))
    assert torch.equal(*written)


@pytest.mark.slow
@pytest.mark.parametrize("helper", ["prompt-lookup", "teacher"])
def test_assisted_generation_writes_what_greedy_does(pair: Pair, helper: str) -> None:
    ids = _ids(1, 4).repeat(1, 3)  # a prompt in which something can be looked up
    length = {"max_new_tokens": 12, "do_sample": False}
    greedy = generate(pair.model, ids, **length)
    options = {"assistant_model": pair.taught} if helper == "teacher" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(pair.model, ids, **length, **options), greedy)


# --- gradients -----------------------------------------------------------------------------------------------------


def _gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**_inputs(model, _ids(2, 16)), labels=_ids(2, 16), use_cache=False).loss.backward()
    tables = [name for name, each in model.named_modules() if "Sinusoidal" in type(each).__name__]  # are constants
    images = ("model.vision_tower.", "model.multi_modal_projector.")  # there are none
    silent = (*tables, *images, "model.encoder.embed_positions.")  # Whisper's: constant, unless transformers loads them
    learns = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return {name: each.grad.clone() for name, each in learns.items() if not name.startswith(silent)}  # None: no clone


def test_every_parameter_learns_also_with_checkpointing(pair: Pair) -> None:
    model: Any = hf.load(pair.student)
    plain = _gradients(model.train())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in plain.values())
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_activation_checkpointing
    again = _gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def scale(name: str) -> float | None:
        # softmax does not feel a bias of keys: its gradient is the sum of numbers that cancel, and all of it rounding
        if name.endswith("k_proj.bias"):
            return largest
        # a norm's weight sums products of the next projection's weights and gradients: those of a bias's column cancel
        if name.endswith("_a_layernorm.weight"):
            after = name.replace("_a_layernorm", "_b_proj")
            summed = weights[after] * plain[after] / weights[name]
            return max(float(summed.abs().max()), float(plain[name].abs().max()))
        # nor does cross-attention feel much of queries where the encoder's tokens are much alike
        return max(float(plain[name].abs().max()), largest / 1000) if _pairs(model) else None

    for name, gradient in plain.items():
        if _pairs(
            model
        ):  # what every layer reads, biases and the encoder's output, sums its gradients in another order
            _close(again[name], gradient, scale(name))
        else:
            assert torch.equal(again[name], gradient)
    stock = _gradients(pair.stock)
    for name, gradient in plain.items():
        _close(gradient, _summed(stock[name], gradient, pair.shape.sites[Site(0)].head_dim), scale(name))


# --- determinism ---------------------------------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to reads as not-a-number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_conversion_is_a_function_of_its_inputs(
    pair: Pair, tmp_path: Path, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = _bytes(pair.teacher), Checkpoint.open(pair.student).hash()
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))  # what the teacher read is read again
    again = convert(pair.teacher, tmp_path / "again", pair.name, pair.settings, options=pair.options)
    assert Checkpoint.open(again).hash() == expected
    assert _bytes(again)["model.safetensors"] == _bytes(pair.student)["model.safetensors"]
    assert _bytes(pair.teacher) == before


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "field"), [(name, *mistake) for name, told in MISTAKES.items() for mistake in told]
)
def test_a_setting_that_cannot_be_is_one_line(
    name: str, settings: dict[str, Any], field: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    family = next(SOURCES[source][0] for source in SOURCES if _takes(name, source))
    teacher = tiny_checkpoint(family, tokenizer=False)
    with pytest.raises(SettingError) as told:
        convert(teacher, tmp_path / "out", name, settings)
    line, value = str(told.value), str(settings.get(field, ""))
    assert "\n" not in line
    assert field in line
    assert value in line or name == "identity"  # which has no settings to give a value to
    assert told.value.allowed or told.value.next or told.value.got is not None
    assert list(tmp_path.iterdir()) == [teacher]
