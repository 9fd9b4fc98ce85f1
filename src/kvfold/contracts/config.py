"""Rules for the fields of `config.json`, checked once, when a checkpoint's family is looked up.

Every field that kvfold or transformers' config class reads has a type and a range, here or in its family. Other fields
may have any value. transformers is not loaded, so that `plan` stays light; a test compares the rules with its classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from kvfold.contracts.site import DTYPE_BYTES
from kvfold.errors import CheckpointError, UnsupportedModel, choices
from kvfold.inputs import load_json

Json = Mapping[str, Any]

_STRICT = pydantic.ConfigDict(strict=True)


@dataclass(frozen=True)
class Rule:
    """The type of one field, as pydantic takes it, and its description in errors."""

    kind: Any
    words: str
    allowed: str | None = None
    required: bool = False

    @cached_property
    def _adapter(self) -> pydantic.TypeAdapter[Any]:
        return pydantic.TypeAdapter(self.kind, config=_STRICT)

    def takes(self, value: Any) -> bool:
        """Whether a value has this type. Booleans, NaN and infinity are not numbers."""
        try:
            self._adapter.validate_python(value)
        except pydantic.ValidationError:
            return False
        return True

    @property
    def needed(self) -> Rule:
        """The same rule for a required field."""
        return replace(self, required=True)

    @property
    def or_null(self) -> Rule:
        """The same rule for a field that may also be null, which stands for the default of transformers."""
        return replace(self, kind=self.kind | None, words=f"{self.words} or null")


Rules = Mapping[str, Rule]


def whole(least: int, most: int) -> Rule:
    """A whole number in a range."""
    words = "a positive whole number" if least == 1 else "a whole number"
    return Rule(
        Annotated[int, pydantic.Field(ge=least, le=most)], words, allowed=f"{least:,} to {most:,}".replace(",", " ")
    )


def number(least: float, most: float) -> Rule:
    """A finite number in a range, whole or not."""
    kind = Annotated[float, pydantic.Field(ge=least, le=most, allow_inf_nan=False)]
    return Rule(kind, "a number", allowed=f"{least:g} to {most:g}")


def _has_point(value: Any) -> Any:
    if not isinstance(value, float):
        raise ValueError("no decimal point")
    return value


def decimal(least: float, most: float) -> Rule:
    """A finite number with a decimal point in a range: transformers refuses `1` where it declares a float."""
    kind = Annotated[float, pydantic.BeforeValidator(_has_point), pydantic.Field(ge=least, le=most)]
    return Rule(kind, "a number with a decimal point", allowed=f"{least:g} to {most:g}")


def only(value: bool, words: str) -> Rule:
    """Exactly this boolean: `1` and `0`, which Python considers equal to `True` and `False`, are refused."""

    def check(found: bool) -> bool:
        if found is not value:
            raise ValueError("the other one")
        return found

    return Rule(Annotated[bool, pydantic.AfterValidator(check)], words)


def one_of(*words: Any) -> Rule:
    """One of these words."""
    return Rule(Literal[words], f"one of {choices(words)}")


WIDTH = whole(1, 1 << 20)
HEADS = whole(1, 1 << 14)
LAYERS = whole(1, 2048)
VOCABULARY = whole(1, 1 << 24)
POSITIONS = whole(1, (1 << 31) - 1)
SHARE = number(0, 1)
YES_NO = Rule(bool, "true or false")
EPSILON = decimal(0, 1)
ACTIVATION = one_of(
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)
TEXTS = Rule(list[str], "a list of words")
WHOLES = Rule(list[int], "a list of whole numbers")

_Index = Annotated[str, pydantic.Field(pattern=r"^-?[0-9]{1,9}$")]
COMMON: Rules = {
    "architectures": Rule(list[str] | str, "a list of words").or_null,
    "dtype": one_of(*DTYPE_BYTES).or_null,
    "torch_dtype": one_of(*DTYPE_BYTES).or_null,
    "transformers_version": Rule(str, "text").or_null,
    "quantization_config": Rule(None, "null: transformers reads an empty one as a quantised model"),
    "auto_map": Rule(dict[str, str | list[str | None]], "a mapping of classes to code"),
    "use_cache": YES_NO,
    "tie_word_embeddings": YES_NO,
    "output_hidden_states": YES_NO.or_null,
    "return_dict": only(True, "true: outputs are read by name"),
    "output_attentions": only(False, "false").or_null,
    "chunk_size_feed_forward": whole(0, 1 << 20),
    **dict.fromkeys(("initializer_range", "initializer_factor", "init_std"), number(0, 1e6)),
    "id2label": Rule(dict[_Index | int, str], "a mapping of whole numbers to text").or_null,
    "label2id": Rule(dict[str, int] | dict[str, str], "a mapping of text to whole numbers").or_null,
    "num_labels": whole(1, 1 << 20),
    "attention_chunk_size": Rule(None, "null: no architecture here attends by chunks"),
    "num_kv_shared_layers": Rule(None, "null: no architecture here says so what layers share"),
    "problem_type": one_of("regression", "single_label_classification", "multi_label_classification").or_null,
    "tokenizer_class": Rule(str, "text").or_null,
    "attn_implementation": Rule(str, "text").or_null,
    "_attn_implementation": Rule(str, "text").or_null,
}
"""Fields that transformers reads from the config of every architecture."""

_PARTS = ("encoder", "decoder", "generator", "text_config", "text_encoder")
"""Fields in which transformers looks for a nested config."""

_LISTS = ("eos_token_id", "forced_eos_token_id")

RESERVED = frozenset(
    {
        *("allow_global_per_layer_attribute_access", "attribute_map", "base_config_key"),
        *("base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan"),
        *("convert_rope_params_to_dict", "default_config_fields", "default_rope_type"),
        *("default_theta", "dict_dtype_to_str", "extra_config_files", "extra_files", "from_dict"),
        *("from_json_file", "from_pretrained", "get_config_dict", "get_mtp_config", "get_text_config"),
        *("ignore_keys_at_rope_validation", "is_custom_code", "is_heterogeneous", "is_remote_code"),
        *("keys_to_ignore_at_inference", "kv_sharing_modes", "make_models", "nested_rope_parameter_keys"),
        *("per_layer_attributes", "push_to_hub", "register_for_auto_class", "rotary", "save_pretrained"),
        *("serialize_explicit_per_layer_config", "standardize_rope_params", "sub_configs"),
        *("sub_configs_defaults", "to_dict", "to_diff_dict", "to_json_file", "to_json_string", "update"),
        *("update_from_string", "use_return_dict", "validate", "validate_architecture"),
        *("validate_layer_type", "validate_output_attentions", "validate_rope", "validate_token_ids"),
    }
)
"""Attributes of transformers' config classes that a field of `config.json` would overwrite."""

_SETTINGS = ("_remove_final_layer_norm",)  # of OPT
_PRIVATE = (
    *("_check_", "_decode_", "_dict_", "_encode_", "_get_", "_getattr_", "_has", "_iter_", "_remove_"),
    *("_update_", "_upload_", "_validate_", "__"),
)


@dataclass(frozen=True)
class Fields:
    """The fields of a `config.json`, or of a nested config."""

    config: Json
    where: object = "config.json"
    part: str = ""  # prefix of the names in errors: `decoder.`

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or the default if it is absent or null."""
        value = self.config.get(name)
        return default if value is None else value

    def inside(self, name: str) -> Fields:
        """The fields of a nested config. Raises UnsupportedModel if it is absent."""
        value = self.config.get(name)
        if not isinstance(value, dict):
            raise self.refusal(f"{name} must be a part with settings of its own", got=repr(value))
        return Fields(value, self.where, f"{self.part}{name}.")

    def refusal(self, what: str, **more: Any) -> UnsupportedModel:
        """The error for an invalid field; `what` begins with the name of the field."""
        return UnsupportedModel(self.part + what, where=self.where, **more)

    def check(self, rules: Rules) -> None:
        """Raise UnsupportedModel for the first field that breaks its rule."""
        for name, rule in rules.items():
            if name not in self.config and not rule.required:
                continue
            value = self.config.get(name)
            if not rule.takes(value):
                raise self.refusal(f"{name} must be {rule.words}", got=repr(value), allowed=rule.allowed)

    def check_divides(self, parts: str, whole: str) -> None:
        """Raise UnsupportedModel unless one number divides the other."""
        if self.config[whole] % self.config[parts]:
            raise self.refusal(f"{parts} {self.config[parts]} does not divide {whole} {self.config[whole]}")

    def check_alias(self, alias: str, name: str) -> None:
        """Raise UnsupportedModel if two names of one field have different values: transformers takes the last."""
        stated, own = self.config.get(alias), self.config.get(name)
        if alias in self.config and (type(stated) is not type(own) or stated != own):
            raise self.refusal(
                f"{alias} is another name of {name} and has another value",
                got=repr(self.config[alias]),
                allowed=self.config.get(name),
                next="remove one of the two",
            )


def check_common(fields: Fields) -> None:
    """Check the fields that every architecture has. Raises UnsupportedModel."""
    fields.check(COMMON)
    check_names(fields)
    if fields.get("problem_type") == "single_label_classification" and _labels(fields) == 1:
        raise fields.refusal("problem_type single_label_classification needs two labels or more")
    try:
        json.dumps(fields.config, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise fields.refusal("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None


def check_names(fields: Fields) -> None:
    """Refuse a field that would overwrite an attribute of transformers' config class, with UnsupportedModel."""
    for name in fields.config:
        if name in RESERVED or (name.startswith(_PRIVATE) and name not in _SETTINGS):
            raise fields.refusal(f"{name!r} is a part of transformers' config class, not a setting", next="remove it")


def _labels(fields: Fields) -> int:
    stated = fields.get("id2label")
    return len(stated) if stated is not None else int(fields.get("num_labels", 2))


def check_parts(fields: Fields, expected: Iterable[str] = ()) -> None:
    """Refuse a nested config where the architecture has none: transformers would read that one instead."""
    for name in _PARTS:
        if name not in expected and fields.config.get(name) is not None:
            raise fields.refusal(
                f"{name} holds a config inside another, and this architecture has none",
                got=repr(fields.config[name]),
                next="is its model_type right?",
            )


def check_tokens(fields: Fields, vocabulary: int) -> None:
    """Check the ids of special tokens. A negative id (`pad_token_id: -1`) stands for no token."""
    one, several = _token_rules(vocabulary)
    names = [name for name in fields.config if name.endswith("_token_id")]
    fields.check({name: several if name in _LISTS else one for name in names})


@cache
def _token_rules(vocabulary: int) -> tuple[Rule, Rule]:
    """The rules for one id, and for one id or a list of them."""
    one = whole(-(1 << 31), vocabulary - 1)
    several = replace(one, kind=one.kind | list[one.kind], words="a token id, a list of them")  # type: ignore[name-defined]
    return replace(one, words="a token id").or_null, several.or_null


# --- rotation -------------------------------------------------------------------------------------------------------

_FACTOR = number(1, 1e6)
_TURNS = number(1e-6, 1e6).or_null
_LENGTH = whole(1, (1 << 31) - 1)
_WHOLE_HEADS = Rule(Annotated[float, pydantic.Field(ge=1, le=1)], "1: this architecture rotates whole heads")
_PART = number(1e-3, 1)
_ROPE: Rules = {
    "rope_theta": Rule(Annotated[float, pydantic.Field(gt=1, le=1e15)], "a number", allowed="above 1, at most 1e15"),
    "attention_factor": number(1e-6, 1e6).or_null,
    "beta_fast": _TURNS,
    "beta_slow": _TURNS,
    "mscale": number(0, 1e3).or_null,
    "mscale_all_dim": number(0, 1e3).or_null,
    "truncate": YES_NO,
    "original_max_position_embeddings": _LENGTH,
}
_FACTORS = Rule(list[Annotated[float, pydantic.Field(gt=0, le=1e9)]], "a list of positive numbers").needed
_KINDS: Mapping[str, Rules] = {
    "default": {},
    "linear": {"factor": _FACTOR.needed},
    "dynamic": {"factor": _FACTOR.needed},
    "yarn": {"factor": _FACTOR.needed},
    "llama3": {
        "factor": _FACTOR.needed,
        "low_freq_factor": number(1e-6, 1e6).needed,
        "high_freq_factor": number(1e-6, 1e6).needed,
    },
    "longrope": {"factor": _FACTOR.or_null, "short_factor": _FACTORS, "long_factor": _FACTORS},
}


def check_rope(fields: Fields, head_dim: int, rotated: float = 1.0, *, partial: bool = False) -> None:
    """Check the rotation: `rope_parameters`, or `rope_scaling` and `rope_theta` of older configs.

    `rotated` is the architecture's default for the part of a head that is rotated. Where that is 1, config.json may
    name another if the architecture is `partial`.
    """
    part = _PART if partial or rotated != 1 else _WHOLE_HEADS
    a_mapping = Rule(dict[str, Any], "a mapping").or_null
    fields.check({"rope_parameters": a_mapping, "rope_scaling": a_mapping})
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new and old and new != old:
        raise fields.refusal(
            "rope_parameters and rope_scaling differ", got=repr(old), allowed=repr(new), next="remove one of the two"
        )
    name = "rope_parameters" if new else "rope_scaling"
    rope = Fields(new or old or {}, fields.where, f"{fields.part}{name}.")
    fields.check({key: _ROPE[key] for key in ("rope_theta", "original_max_position_embeddings")})
    fields.check({"partial_rotary_factor": part.or_null})
    rope.check({"partial_rotary_factor": part})
    stated = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", rotated))
    head_dim = int(head_dim * stated)
    for key, value in rope.config.items():
        if isinstance(value, dict):
            raise rope.refusal(f"{key} holds a rotation for one type of layer, and this architecture has one for all")
    if head_dim % 2 or not head_dim:
        raise fields.refusal(f"heads of {head_dim} coordinates cannot be rotated in pairs", next="is head_dim right?")
    _check_scaling(rope, fields, head_dim)


def _check_scaling(rope: Fields, fields: Fields, head_dim: int) -> None:
    """Check the numbers of one kind of scaling."""
    kind = rope.config.get("rope_type", rope.config.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        longrope = '"su" is the older name of longrope: write "rope_type": "longrope"'
        raise rope.refusal(
            "rope_type is not known here",
            got=repr(kind),
            allowed=choices(_KINDS),
            next=longrope if kind == "su" else None,
        )
    rope.check({**_ROPE, **_KINDS[kind]})
    original = fields.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", fields.get("max_position_embeddings", 2)
    )
    problem = None
    if kind == "llama3" and rope.config["high_freq_factor"] <= rope.config["low_freq_factor"]:
        problem = "high_freq_factor must be above low_freq_factor"
    elif kind == "yarn" and (rope.get("beta_fast") or 32) < (rope.get("beta_slow") or 1):
        problem = "beta_fast must be at least beta_slow"
    elif kind == "dynamic" and head_dim <= 2:
        problem = "rope_type dynamic needs heads of more than 2 coordinates"
    elif kind == "longrope":
        lengths = {len(rope.config[name]) for name in ("short_factor", "long_factor")}
        if lengths != {head_dim // 2}:
            problem = f"short_factor and long_factor must have {head_dim // 2} numbers each"
        elif original < 2:
            problem = "rope_type longrope needs original_max_position_embeddings of 2 or more"
    if problem:
        raise rope.refusal(problem)


# --- generation_config.json -----------------------------------------------------------------------------------------

_CACHES = (
    *("static", "offloaded_static", "dynamic", "offloaded", "quantized", "paged"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)
_GENERATION: Rules = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), whole(1, 1 << 31).or_null),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), whole(0, 1 << 31).or_null),
    "top_k": whole(-1, 1 << 31).or_null,
    "early_stopping": Rule(bool | Literal["never"] | None, "true, false, never or null"),
    "cache_implementation": one_of(*_CACHES).or_null,
    **dict.fromkeys(("compile_config", "watermarking_config"), Rule(None, "null: it is set when text is generated")),
    **dict.fromkeys(("temperature", "repetition_penalty", "length_penalty"), number(-1e6, 1e6).or_null),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), SHARE.or_null),
    **dict.fromkeys(("do_sample", "use_cache", "output_scores", "output_attentions"), YES_NO.or_null),
    **dict.fromkeys(("return_dict_in_generate", "output_hidden_states", "output_logits"), YES_NO.or_null),
    "transformers_version": Rule(str, "text").or_null,
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), WHOLES.or_null),
}


def check_generation(folder: Path, vocabulary: int) -> None:
    """Check the `generation_config.json` of a checkpoint, if it has one: students inherit it.

    Raises CheckpointError when it is no JSON, UnsupportedModel for a field that cannot be.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return
    content = load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", where=path, next="download it again, or delete it")
    fields = Fields(content, path)
    check_names(fields)
    fields.check(_GENERATION)
    check_tokens(fields, vocabulary)
