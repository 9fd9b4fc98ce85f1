"""A decoder's specification for CTranslate2, filled from the loaded model by the roles of its family.

The specification has a place for almost every fact in which the decoders of `kvfold.predict.engines.DECODERS` differ.
What it lacks goes into the weights: factors of what is added to the residual stream, and of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvfold.contracts.family import Family
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention, Rope, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.export.limits import common_attention, frequency_factors, kv_heads
from kvfold.families import all_families
from kvfold.predict.engines import ACTIVATIONS, activation


def decoder(source: Checkpoint, model: Any) -> tuple[Any, Any]:
    """The loader and the filled specification of a decoder. `model` is taken apart."""
    from ctranslate2.converters.transformers import PhiLoader
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    family, config, first = source.family, model.config, common_attention(source)
    layers = model.get_submodule(family.body.layers)
    before_mlp = _before_mlp(layers[0])
    parts = family.body.mlp or all_families()["phi3"].body.mlp  # of GLM, which packs gate and up as Phi-3 does
    spec = TransformerDecoderModelSpec.from_config(
        source.shape.num_layers,
        first.num_attention_heads,
        activation=getattr(common_spec.Activation, ACTIVATIONS[str(activation(source.config, source.shape))]),
        pre_norm=True,
        ffn_glu="gate" in parts,
        rms_norm=_is_rms(model.get_submodule(family.body.norm)),
        parallel_residual=before_mlp is None,
        shared_layer_norm=before_mlp is None,
        pre_post_layer_norm=bool(family.body.after),
        num_heads_kv=min(kv_heads(source)),
        head_dim=first.head_dim,
        qk_norm=first.norms == "pre_rope",
        **_rotation(source),
    )
    residual, offset = getattr(config, family.body.residual or "residual_multiplier", 1.0), first.norm_offset
    for (site, attention), heads, filled, layer in zip(
        source.shape.sites.items(), kv_heads(source), spec.decoder.layer, layers, strict=True
    ):
        filled.self_attention.num_heads_kv = np.int32(heads)
        _norms(filled, layer, family, offset)
        _attend(filled.self_attention, attention, _roles(model, family, site, attention), residual)
        _rotate(filled.self_attention, attention.rope)
        delattr(layer, family.module(site).rpartition(".")[2])  # its copies are in the specification
        _mlp(filled.ffn, layer, parts, residual)
    _ends(spec.decoder, model, family, offset)
    loader = PhiLoader()
    loader.set_config = _special_tokens(_epsilon(model.get_submodule(family.body.norm)))
    return loader, spec


def _ends(spec: Any, model: Any, family: Family, offset: float) -> None:
    """Embeddings, learned positions, the last norm, and the output projection."""
    config, embedding, projection = model.config, model.get_input_embeddings(), model.get_output_embeddings()
    factor = config.hidden_size**0.5 if offset else getattr(config, "embedding_multiplier", 1.0)  # Gemma's, Granite's
    spec.scale_embeddings = factor != 1 and np.float32(factor)
    spec.embeddings.weight = embedding.weight
    if hasattr(spec, "position_encodings"):
        spec.position_encodings.encodings = model.base_model.wpe.weight
    _norm(spec.layer_norm, model.get_submodule(family.body.norm), offset)
    logits = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere's, Granite's
    _linear(spec.projection, projection.weight, getattr(projection, "bias", None), logits)
    if getattr(config, "final_logit_softcapping", None):
        spec.final_logit_softcapping = np.float32(config.final_logit_softcapping)


# --- one layer ------------------------------------------------------------------------------------------------------


def _roles(model: Any, family: Family, site: Site, attention: Attention) -> dict[str, Any]:
    """The tensors of a site of the loaded model, by role."""
    found = {}
    for name, roles in family.stored(site, attention).items():
        tensor = model.get_parameter(name)
        for role in roles:
            packed = family.packed(role)
            found[role] = tensor if packed is None else packed.part(tensor, role, attention)
    return found


def _attend(spec: Any, attention: Attention, roles: dict[str, Any], residual: float) -> None:
    import torch

    joined = None
    if attention.biases & {"q", "k", "v"}:
        biases = (roles.get(f"{role}_bias", roles[role].new_zeros(len(roles[role]))) for role in "qkv")
        joined = torch.cat(list(biases))
    _linear(spec.linear[0], torch.cat([roles[role] for role in "qkv"]), joined)
    _linear(spec.linear[1], roles["o"], roles.get("o_bias"), residual)
    if attention.scale is not None:
        spec.queries_scale = np.float32(attention.scale)
    for role in "qk" if attention.norms == "pre_rope" else "":
        _gamma(getattr(spec, f"{role}_norm"), roles[f"{role}_norm"], attention.norm_offset)


def _mlp(spec: Any, layer: Any, parts: Mapping[str, str | Packed], residual: float) -> None:
    places = {"gate": spec.linear_0, "up": spec.linear_0_noact} if "gate" in parts else {"up": spec.linear_0}
    for part, place in {**places, "down": spec.linear_1}.items():
        path, factor = parts[part], residual if part == "down" else 1.0
        if isinstance(path, Packed):  # it has no biases
            rows = layer.get_parameter(path.name)
            first = len(rows) // len(path.roles) * path.roles.index(part)
            _linear(place, rows[first : first + len(rows) // len(path.roles)], None, factor)
        else:
            module = layer.get_submodule(path)
            _linear(place, module.weight, module.bias, factor)


def _linear(spec: Any, weight: Any, bias: Any = None, factor: float = 1.0) -> None:
    spec.weight = weight if factor == 1 else weight * factor
    if bias is not None:
        spec.bias = bias if factor == 1 else bias * factor


# --- norms ----------------------------------------------------------------------------------------------------------


def _before_mlp(layer: Any) -> Any:
    """The norm before the MLP; None where the MLP reads what the attention reads."""
    names = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    return next((found for name in names if (found := getattr(layer, name, None)) is not None), None)


def _norms(spec: Any, layer: Any, family: Family, offset: float) -> None:
    before, after = getattr(layer, "ln_1", None) or layer.input_layernorm, family.body.after
    before_mlp = _before_mlp(layer)
    if after:
        _norm(spec.input_layer_norm, before, offset)
        _norm(spec.post_attention_layer_norm, layer.get_submodule(after["self"]), offset)
        _norm(spec.pre_feedforward_layer_norm, before_mlp, offset)
        _norm(spec.post_feedforward_layer_norm, layer.get_submodule(after["mlp"]), offset)
    elif before_mlp is None:
        _norm(spec.shared_layer_norm, before, offset)
    else:
        _norm(spec.self_attention.layer_norm, before, offset)
        _norm(spec.ffn.layer_norm, before_mlp, offset)


def _norm(spec: Any, module: Any, offset: float) -> None:
    import torch

    weight = getattr(module, "weight", None)  # an OLMo's has none
    _gamma(spec, torch.ones(module.normalized_shape) if weight is None else weight, offset)
    if not _is_rms(module):
        bias = getattr(module, "bias", None)
        spec.beta = torch.zeros_like(spec.gamma) if bias is None else bias


def _gamma(spec: Any, weight: Any, offset: float) -> None:
    """The weights of a norm; CTranslate2 adds the 1 of a Gemma's, which narrow weights would round off."""
    spec.gamma = weight
    if offset:
        spec.layer_norm_use_residual = True


def _is_rms(module: Any) -> bool:
    return "RMS" in type(module).__name__


def _epsilon(module: Any) -> float:
    """What a norm adds to the variance; an OLMo's names it nowhere."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5)))


def _special_tokens(epsilon: float) -> Callable[[Any, Any, Any], None]:
    """Write the tokenizer's special tokens and the epsilon of all norms to a config."""

    def write(config: Any, model: Any, tokenizer: Any) -> None:
        config.bos_token, config.eos_token = tokenizer.bos_token, tokenizer.eos_token
        config.unk_token, config.layer_norm_epsilon = tokenizer.unk_token, epsilon

    return write


# --- rotation -------------------------------------------------------------------------------------------------------


def _rotation(source: Checkpoint) -> dict[str, Any]:
    """What the rotations of all layers have in common; nothing where no layer is rotated."""
    from ctranslate2.specs.attention_spec import RotaryScalingType

    ropes = [attention.rope for attention in source.shape.sites.values() if attention.rope is not None]
    if not ropes:
        return {}
    found: dict[str, Any] = {
        "rotary_dim": 0 if ropes[0].dims == common_attention(source).head_dim else ropes[0].dims,
        "rotary_interleave": not ropes[0].half_split,
        "rotary_base": ropes[0].theta,
    }
    if any(frequency_factors(rope) is not None for rope in ropes):
        # "Su" holds one factor for each frequency; with equal lengths it scales nothing else
        names = ("original_max_position_embeddings", "max_position_embeddings")
        found |= {"rotary_scaling_type": RotaryScalingType.Su, **dict.fromkeys(names, source.shape.max_positions)}
    return found


def _rotate(spec: Any, rope: Rope | None) -> None:
    """The rotation of one layer; one that is not rotated has none of its fields."""
    if rope is None:
        for name in [name for name in vars(spec) if name.startswith("rotary_")]:
            delattr(spec, name)
        return
    spec.rotary_base = np.float32(rope.theta)
    if hasattr(spec, "rotary_scaling_type"):
        factors = frequency_factors(rope)
        factors = np.ones(rope.dims // 2, dtype=np.float32) if factors is None else factors
        spec.rotary_scaling_long_factor = spec.rotary_scaling_short_factor = factors
