"""bart: encoder-decoders with absolute positions and biases: BART and the architectures that were made from it.

A decoder layer attends twice, with the caches of a T5; q, k, v and o have biases. Positions are added to the
embeddings, so heads may change places in both attentions. The architectures differ in their tables of positions and in
the norms of each stack (`TABLES`). Encoder and decoder may have different numbers of heads. A student with fewer
key/value heads is a `kvfold_bart`, `kvfold_marian` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvfold.contracts.config import POSITIONS, SHARE, VOCABULARY, Fields, Rule, Rules, decimal, only, whole
from kvfold.contracts.family import Body, Family, Json
from kvfold.contracts.runtimes import stock_type
from kvfold.contracts.site import Shape
from kvfold.errors import UnsupportedModel
from kvfold.families._encoder_decoder import (
    ATTENTIONS,
    BODY,
    NAMES,
    PARTS,
    STACKS,
    architectures,
    check_stacks,
    fields,
    stacked_shape,
)


@dataclass(frozen=True)
class Table:
    """What a checkpoint holds of a stack besides its layers: a table of positions, and norms."""

    unused: int | None  # rows of the table before the first position; None: the table is a constant, often not stored
    embedding_norm: bool  # after the embeddings
    last_norm: bool  # after the last layer

    def parameters(self, positions: int, width: int) -> int:
        """Parameters of a stack without its layers and token embeddings."""
        rows = 0 if self.unused is None else positions + self.unused
        return rows * width + 2 * width * (self.embedding_norm + self.last_norm)


TABLES: Mapping[str, Table] = {
    "bart": Table(2, embedding_norm=True, last_norm=False),
    "mbart": Table(2, embedding_norm=True, last_norm=True),
    "plbart": Table(2, embedding_norm=True, last_norm=False),
    "m2m_100": Table(None, embedding_norm=False, last_norm=True),
    "marian": Table(None, embedding_norm=False, last_norm=False),
    "pegasus": Table(None, embedding_norm=False, last_norm=True),
    "blenderbot": Table(0, embedding_norm=False, last_norm=True),
    "blenderbot-small": Table(0, embedding_norm=True, last_norm=False),
}

_RULES: Rules = {**STACKS, "max_position_embeddings": POSITIONS.needed, "classifier_dropout": SHARE}
_TOKEN = Rule(int, "a token id")
_OWN: Mapping[str, Rules] = {
    "bart": {f"{part}_layerdrop": decimal(0, 1) for part in PARTS},
    "marian": {
        "share_encoder_decoder_embeddings": only(True, "true: source and target have one vocabulary here"),
        "decoder_vocab_size": VOCABULARY.or_null,
        "decoder_start_token_id": _TOKEN,
    },
    "blenderbot": {"encoder_no_repeat_ngram_size": whole(0, 1 << 31), "decoder_start_token_id": _TOKEN},
}
"""The fields of one architecture alone, and those for which it has a narrower rule."""


def _check(fields: Fields) -> None:
    stock = stock_type(fields.config)
    fields.check({**_RULES, **_OWN.get(stock, {})})
    if stock == "marian" and fields.get("decoder_vocab_size") is not None:
        fields.check_alias("decoder_vocab_size", "vocab_size")
    check_stacks(fields)


def _shape(config: Json) -> Shape:
    if config.get("tie_word_embeddings") is False:
        raise UnsupportedModel("config.json: tie_word_embeddings is false, and its embeddings are one here")
    positions = config["max_position_embeddings"]
    outside = TABLES[stock_type(config)].parameters(positions, config["d_model"])
    return stacked_shape(config, "bart", "qkvo", encoder=outside, decoder=outside, positions=positions)


def _body(config: Json) -> Body:
    """Those without a last norm have norms behind attention and MLP, over the residual stream too."""
    body = replace(BODY, embedding="model.shared")
    if TABLES[stock_type(config)].last_norm:
        return body
    behind = {"self": "self_attn_layer_norm", "cross": "encoder_attn_layer_norm", "mlp": "final_layer_norm"}
    return replace(body, after=behind, post_norm=True)


FAMILY = Family(
    name="bart",
    architectures=architectures(*TABLES),
    about="BART, mBART, PLBART, M2M-100 and NLLB-200, Marian, Pegasus, Blenderbot: decoder self- and cross-attention",
    examples=("facebook/bart-large-cnn", "facebook/nllb-200-distilled-600M", "Helsinki-NLP/opus-mt-en-de"),
    attention=ATTENTIONS,
    tensors=NAMES,
    check=_check,
    shape=_shape,
    fields=fields,
    tiny=lambda: {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "vocab_size": 96,
        "d_model": 32,
        **{f"{part}_layers": 4 for part in PARTS},
        **{f"{part}_attention_heads": 4 for part in PARTS},
        **{f"{part}_ffn_dim": 48 for part in PARTS},
        "max_position_embeddings": 256,
        **dict.fromkeys(("dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "dtype": "float32",
    },
    body=_body({"model_type": "bart"}),
    body_of=_body,
    encoder_decoder=True,
    depth="decoder_layers",
)
