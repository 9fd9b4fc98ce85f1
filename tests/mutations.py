"""Nonsense in checkpoints: a seeded source of damaged configs, headers, tokenizers and lineages, for the fuzz tests."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from examples import paired
from kvfold.families import all_families

Json = dict[str, Any]
Path_ = tuple[str, ...]

NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 100, 10**5, 10**7, 10**12, 10**400),
    *(0.0, 0.5, 1.5, -0.5, 4.0, 1e308, float("nan"), float("inf")),
    *("", "4", "abc", "\ud800", "\x1b[2J\n", "gptq", "relu", "full_attention", "float16", "x" * 5000),
    *([], [1], [2, 2, 2, 2], [None], ["full_attention"], ["full_attention"] * 4, ["sliding_attention"] * 4, [[]]),
    *({}, {"a": 1}, {"1": {"num_key_value_heads": 2}}, {"full_attention": {"rope_type": "default"}}, {"0": None}),
)
"""What any field may be instead."""

_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial", "su", "mrope")
ROPES: tuple[Json, ...] = tuple(
    {"rope_type": kind, "rope_theta": 1e4, **more}
    for kind in _TYPES
    for more in (
        {},
        {"factor": 2.0},
        {"factor": 2.0, "original_max_position_embeddings": 64},
        {"factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64},
    )
)
_ROPE_FIELDS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor")
_ROPE_FIELDS += ("high_freq_factor", "short_factor", "long_factor", "attention_factor", "beta_fast", "beta_slow")
_ROPE_FIELDS += ("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor")

MORE = (
    *("rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps", "initializer_range", "attention_dropout"),
    *("quantization_config", "torch_dtype", "per_layer_config", "kv_source_layers", "linear_attention"),
    *("rope_chunks", "latent_dims", "cross_latent_dim", "cross_num_key_value_heads", "num_key_value_heads"),
    *("text_config", "encoder", "decoder", "generator", "decoder_start_token_id", "forced_bos_token_id"),
    *("partial_rotary_factor", "original_max_position_embeddings", "head_dim", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "is_encoder_decoder", "is_decoder", "use_cache", "id2label", "label2id", "num_labels"),
    *("problem_type", "output_attentions", "output_hidden_states", "return_dict", "auto_map", "attn_implementation"),
    *("tokenizer_class", "dense_act_fn", "is_gated_act", "num_decoder_layers", "layer_norm_epsilon", "pruned_heads"),
    *("initializer_factor", "activation_function", "init_std", "scale_embedding", "attention_dropout", "dropout"),
    *("encoder_layerdrop", "decoder_layerdrop", "classifier_dropout", "activation_dropout", "dropout_rate"),
    *("hidden_activation", "query_pre_attn_scalar", "transformers_version", "chunk_size_feed_forward", "rope_type"),
    *("mlp_layer_types", "pretraining_tp", "tie_encoder_decoder", "task_specific_params", "max_length", "to_dict"),
    *("use_return_dict", "attribute_map", "name_or_path", "is_heterogeneous", "__class__", "validate", "_attn"),
)
"""Fields that transformers or kvfold reads in some architecture, whatever the base has."""


def bases() -> dict[str, Json]:
    """A config.json of every architecture, and of every kind of ours."""
    tiny = {name: family.tiny() for name, family in all_families().items()}
    llama = tiny["llama"]
    linear = {"features": "relu", "feature_dim": 8, "rope": "after", "norm": "groupnorm", "decay": "slopes"}
    linear |= {"window": 0, "sinks": 0}
    return tiny | {
        "mistral": {**llama, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16},
        **{name: {**tiny[family], **changes} for name, (family, changes) in paired().items()},
        "shared": {
            **llama,
            "model_type": "kvfold_llama",
            "num_key_value_heads": 2,
            "per_layer_config": {"1": {"num_key_value_heads": 4}},
            "kv_source_layers": [0, 1, 0, 3],
        },
        "latent": {
            **llama,
            "model_type": "kvfold_latent_llama",
            "rope_chunks": [1, 2, 3, 4],
            "latent_dims": [9, 5, 7, 16],
        },
        "linear": {
            **tiny["qwen2"],
            "model_type": "kvfold_linear_qwen2",
            "layer_types": ["full_attention", *["kvfold_linear"] * 3],
            "linear_attention": linear,
        },
        "cross-latent": {
            **tiny["t5"],
            "model_type": "kvfold_t5",
            "num_key_value_heads": [1, 2, 4, 2],
            "cross_latent_dim": 12,
        },
        "own t5gemma": {**tiny["t5gemma"], "model_type": "kvfold_t5gemma", "cross_num_key_value_heads": 2},
    }


def paths(config: Json) -> Iterator[Path_]:
    """Every field of a config, those of its parts, and those that it does not have."""
    for key in dict.fromkeys([*config, *MORE]):
        yield (key,)
        inner = config.get(key)
        if isinstance(inner, dict):
            fields = [*inner, *(_ROPE_FIELDS if key == "rope_parameters" else MORE[:8])]
            for name in dict.fromkeys(fields):
                yield key, name
                if isinstance(inner.get(name), dict):
                    yield from ((key, name, last) for last in dict.fromkeys([*inner[name], *_ROPE_FIELDS]))


def put(config: Json, path: Path_, value: Any) -> Json:
    """The config with another value there."""
    made = copy.deepcopy(config)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


def configs(seed: int, count: int | None = None) -> Iterator[tuple[str, Json]]:
    """Damaged configs with a name each: all there are in an order drawn by `seed`, or the first `count` of them."""
    made: list[tuple[str, Json, Path_, Any]] = []
    for name, config in bases().items():
        for path in paths(config):
            made += [(name, config, path, value) for value in NASTY]
            made.append((name, config, path, ...))
        for key in ("rope_parameters", "rope_scaling"):
            made += [(name, config, (key,), {**rope}) for rope in ROPES]
        for rope in ROPES[::3]:
            broken = {**config, "rope_parameters": rope}
            made += [(name, broken, ("rope_parameters", field), value) for field in rope for value in NASTY]
    random.Random(seed).shuffle(made)
    for name, config, path, value in made[:count]:
        where = f"{name}: {'.'.join(path)} = {value!r:.80}"
        if value is ...:
            if len(path) == 1 and path[0] in config:
                yield where, {key: each for key, each in config.items() if key != path[0]}
            continue
        yield where, put(config, path, value)


# --- other files ----------------------------------------------------------------------------------------------------


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from fields(inner, (*path, key))


def damaged(content: Any, seed: int, count: int | None = None, more: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """A JSON value with one field that is something else, or gone; the first `count` in an order drawn by `seed`."""
    made = [(path, value) for path in fields(content) for value in (*NASTY, *more, ...)]
    random.Random(seed).shuffle(made)
    for path, value in made[:count]:
        changed = copy.deepcopy(content)
        place = changed
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {value!r:.80}", changed


TEXTS: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"null", b"7", b'"x"', b"\x00", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 5000),
    *("\ud800".encode("utf-8", "surrogatepass"), b'{"a": 1, "a": 2}', b"NaN", b"1" * 5000, b"\xef\xbb\xbf{}"),
)
"""What any small file may hold instead."""


def safetensors(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (JSON, or bytes as they are) and the data behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def headers(header: Json, seed: int, count: int | None = None) -> Iterator[tuple[str, Any]]:
    """Damaged headers of a safetensors file, the first `count` of them."""
    names = [name for name in header if name != "__metadata__"]
    first, second = names[0], names[1]
    more: tuple[Any, ...] = (*("F7", "F64", "BOOL", "I8"), [2**62, 2**62], [1] * 70, [-1, -1], [0, 0], [10**30, 1])
    made = list(damaged({name: header[name] for name in (first, second)}, seed, count, more))
    for where, changed in made:
        yield where, {**{name: header[name] for name in names[2:]}, **changed}
    entry = json.dumps(header[first])
    yield "the same name twice", f'{{"{first}": {entry}, "{first}": {entry}}}'.encode()
    yield "one tensor lies on another", {**header, second: {**header[first]}}
    yield "a name without an end", {**header, "x" * 10**5: header[first]}
    yield "a name that is no text", json.dumps({**header, "a\ud800": header[first]}).encode()
    yield "metadata that is no mapping", {**header, "__metadata__": 7}
    yield from ((f"{text[:20]!r}", text) for text in TEXTS)


def lineage() -> Json:
    """A lineage that has everything that is read anywhere."""
    step = {"source": "b", "tokens": 5, "seed": 0, "calibration": None, "wall_seconds": 1.5, "versions": {"a": "1"}}
    sites = {"layer 0": {"planes": [[0, 1]], "lost": 0.5}, "layer 1": {"lossless": [0], "lost": [0.0]}}
    found = {"budget": 0.5, "mix": {"kv_heads": "2,4", "kl": 0.1}, "uniform": {"kv_heads": 2, "kl": 0.2}}
    found |= {"chosen": {"layout": "0,0", "kl": 0.1}, "alike": {"layout": "0,1", "kl": 0.2}, "sites": sites}
    return {
        "format": 1,
        "inputs": "a",
        "hash": "c",
        "root": {"hash": "b", "name": "teacher", "config": all_families()["llama"].tiny(), "parameters": 9},
        "steps": [
            {**step, "stage": "pretrain", "settings": {"sequence_length": 16}},
            {**step, "stage": "convert", "settings": {"method": "gqa", "kv_heads": "2"}, "found": found},
        ],
        "tokenizer": "d",
    }
