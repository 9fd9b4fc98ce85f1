"""Fusion-in-Decoder (Izacard & Grave 2020, arXiv 2007.01282): an encoder-decoder that reads many passages.

The encoder reads each passage by itself. The decoder attends to the outputs of all passages of a question, one after
another: padding is left out, so that a cache holds the tokens of passages alone. Cross-attention must not know
positions, as in a T5 or a BART, whose cross-attention rotates nothing and has no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from kvfold.hf.caches import generate


def encoded(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The output of a model's encoder for an input, `encoded_BSD`, and the mask of its positions (None: all count).

    `given` are the encoder's arguments. Of passages, `input_ids` and `attention_mask` are `(B, N, S)`.
    """
    ids, seen = given.get("input_ids"), given.get("attention_mask")
    if ids is None or ids.dim() == 2:
        whole_BSD: Tensor = model.get_encoder()(**given).last_hidden_state
        return whole_BSD, seen
    seen_BNS = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen.bool()
    there_BN = seen_BNS.any(-1)  # a question may have fewer passages than another of its batch
    seen_PS = seen_BNS[there_BN]
    read_PSD = model.get_encoder()(input_ids=ids[there_BN], attention_mask=seen_PS).last_hidden_state
    lengths_B = seen_BNS.sum((1, 2))
    mask_BS = torch.arange(int(lengths_B.max()), device=ids.device) < lengths_B[:, None]
    encoded_BSD = read_PSD.new_zeros(*mask_BS.shape, read_PSD.shape[-1])
    return encoded_BSD.masked_scatter(mask_BS[..., None], read_PSD[seen_PS]), mask_BS


def read_alone(model: Any, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's arguments for rows whose encoder outputs have one length: the outputs, without a mask."""
    passages = "input_ids" in given and given["input_ids"].dim() == 3
    whole_BSD, _ = encoded(model, {name: each for name, each in given.items() if passages or name != "attention_mask"})
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=whole_BSD)}


class FusionInDecoder:
    """An encoder-decoder that answers questions from passages: `reader.generate(ids_BNS, attention_mask=seen_BNS)`."""

    def __init__(self, model: Any) -> None:
        """Read with this model, which stays as it is."""
        self.model = model

    def encode(self, ids_BNS: Tensor, seen_BNS: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The decoder's view of N passages of S tokens: their outputs `encoded_BSD`, and the mask of padding."""
        given = {"input_ids": ids_BNS, **({} if seen_BNS is None else {"attention_mask": seen_BNS})}
        return encoded(self.model, given)

    def generate(
        self, ids_BNS: Tensor, *, attention_mask: Tensor | None = None, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Answer each question: the ids that the decoder writes. The options are those of transformers' `generate`."""
        with torch.inference_mode():
            read_BSD, mask_BS = self.encode(ids_BNS, attention_mask)
        if mask_BS is None:
            mask_BS = torch.ones(read_BSD.shape[:2], dtype=torch.bool, device=read_BSD.device)
        return generate(
            self.model,
            None,
            encoder_outputs=BaseModelOutput(last_hidden_state=read_BSD),
            attention_mask=mask_BS.long(),
            max_new_tokens=max_new_tokens,
            **options,
        )
