"""bart: encoder-decoders with learned positions and biases: BART and mBART.

A decoder layer attends twice, with the caches of a T5; q, k, v and o have biases. Positions are added to the
embeddings, so heads may change places in both attentions. mBART norms before attention and MLP, and at the end of each
stack. Encoder and decoder may have different numbers of heads. A student with fewer key/value heads is a `kvfold_bart`.
"""

from __future__ import annotations

from kvfold.contracts.config import (
    ACTIVATION,
    HEADS,
    LAYERS,
    POSITIONS,
    SHARE,
    VOCABULARY,
    WIDTH,
    YES_NO,
    Fields,
    Rules,
    check_parts,
    check_tokens,
    decimal,
)
from kvfold.contracts.family import Body, Family, Json
from kvfold.contracts.runtimes import stock_type
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.errors import UnsupportedModel
from kvfold.families._decoder import TENSORS
from kvfold.families._encoder_decoder import PAIRED, architectures, decoder_sites, fields, paired_shape

PARTS = ("encoder", "decoder")
OFFSET = 2  # unused rows of the tables of positions

_RULES: Rules = {
    **PAIRED,
    "d_model": WIDTH.needed,
    "vocab_size": VOCABULARY.needed,
    "max_position_embeddings": POSITIONS.needed,
    **{f"{part}_layers": LAYERS.needed for part in PARTS},
    **{f"{part}_attention_heads": HEADS.needed for part in PARTS},
    **{f"{part}_ffn_dim": WIDTH.needed for part in PARTS},
    "activation_function": ACTIVATION,
    "init_std": decimal(0, 1e3),
    **{f"{part}_layerdrop": decimal(0, 1) for part in PARTS},
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), SHARE),
    **dict.fromkeys(("scale_embedding", "is_decoder"), YES_NO),
}
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}


def _check(fields: Fields) -> None:
    fields.check(_RULES)
    for alias, name in _ALIASES.items():
        fields.check_alias(alias, name)
    for part in PARTS:
        fields.check_divides(f"{part}_attention_heads", "d_model")
    check_parts(fields)
    check_tokens(fields, fields.config["vocab_size"])


def _shape(config: Json) -> Shape:
    if config.get("tie_word_embeddings") is False:
        raise UnsupportedModel("config.json: tie_word_embeddings is false, and a BART has one embedding")
    hidden, vocab, positions = (config[name] for name in ("d_model", "vocab_size", "max_position_embeddings"))
    layers, heads, inner = (
        {part: config[f"{part}_{name}"] for part in PARTS} for name in ("layers", "attention_heads", "ffn_dim")
    )
    biases = frozenset("qkvo")
    alone = {part: Attention(hidden, n, n, hidden // n, biases=biases) for part, n in heads.items()}
    sites = {Site(layer, "encoder"): alone["encoder"] for layer in range(layers["encoder"])}
    sites |= decoder_sites(config, alone["decoder"], alone["decoder"], layers["decoder"])
    final = 2 * hidden if stock_type(config) == "mbart" else 0
    outside = (positions + OFFSET) * hidden + 2 * hidden + final  # positions, their norm, and mBART's last
    forward = {part: 2 * hidden * width + width + hidden for part, width in inner.items()}
    return paired_shape(
        config,
        "bart",
        sites,
        width=hidden,
        vocab=vocab,
        positions=positions,
        embeddings=vocab * hidden,
        encoder=layers["encoder"] * (forward["encoder"] + 4 * hidden) + outside,
        decoder=layers["decoder"] * (forward["decoder"] + 6 * hidden) + outside,
    )


FAMILY = Family(
    name="bart",
    architectures=architectures("bart", "mbart"),
    about="BART, mBART: decoder self- and cross-attention, the encoder as it is",
    examples=("facebook/bart-large-cnn", "facebook/mbart-large-50"),
    attention={
        "encoder": "model.encoder.layers.{layer}.self_attn",
        "self": "model.decoder.layers.{layer}.self_attn",
        "cross": "model.decoder.layers.{layer}.encoder_attn",
    },
    tensors={**TENSORS, "o": "out_proj.weight", "o_bias": "out_proj.bias"},
    check=_check,
    shape=_shape,
    fields=fields,
    tiny=lambda: {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "vocab_size": 96,
        "d_model": 32,
        **{f"{part}_layers": 4 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "dtype": "float32",
    },
    body=Body(embedding="model.shared"),
    encoder_decoder=True,
)
