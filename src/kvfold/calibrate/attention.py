"""Where the heads of a decoder attend: the entropy of their attention, its distance, and what it falls on.

Every layer runs over a few rows of text, and over rows whose last tokens repeat the first ones
(`kvfold.calibrate.recall`). Of the attention `p_TS` of a query head at token t of the text:

    entropy   - sum_S p log p, nats
    distance  sum_S p (t - s), tokens
    sink      sum of p over the first `SINKS` tokens of the row
    local     over the last `LOCAL` tokens, t included
    far       over the tokens between

and at a token of the repetition, `induction` is p at the token behind the first occurrence of this one (Olsson et al.
2022, arXiv 2209.11895). Each is a mean over tokens that have all three parts before them, and over the query heads that
read one key/value head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.text.copies import SPAN

SINKS = 4  # tokens: the first of a text take the attention that no other token gets (arXiv 2309.17453)
LOCAL = 16

Measures = dict[str, Tensor]
"""`(G,)` in float64 by name: entropy, distance, sink, local, far, induction."""


def measure_attention(
    source: Checkpoint, text_BT: Tensor, copied_BT: Tensor, *, progress: Progress = SILENT
) -> Mapping[Site, Measures]:
    """The measures of every head, on rows of text and on rows that end in a copy, with one layer in memory.

    Rows of text have more than `SINKS + LOCAL` tokens. The hidden states of all rows are in memory.
    """
    from kvfold import hf  # loads transformers

    device, shape, family = best_device(), source.shape, source.family
    parts = {"text": text_BT.to(device), "copied": copied_BT.to(device)}
    total = sum(map(Tensor.numel, parts.values())) * shape.num_layers
    found: dict[Site, Measures] = {}
    with (
        hf.Layers(source, device=device, attention=hf.WATCHED, in_turn=shape.num_layers) as layers,
        task(progress, "reading attention", total, "tokens"),
        torch.inference_mode(),
    ):
        hidden = {name: [layers.embed(ids_1T[None]) for ids_1T in ids_BT] for name, ids_BT in parts.items()}
        for number in range(shape.num_layers):
            layer, site = layers.open(number), Site(number)
            attention = layer.owner(family.module(site)) if site in shape.sites else None
            for name, rows in hidden.items():
                for row, hidden_1TD in enumerate(rows):
                    if attention is not None:
                        output = layer.owner(family.tensor(site, "o"))
                        seen = hf.attend(layer, attention, output, hidden_1TD, rotated=0)
                        measured = of_text if name == "text" else of_copy
                        for key, value_H in measured(seen.probabilities()[0].double()).items():
                            of_heads = found.setdefault(site, {})
                            of_heads[key] = of_heads.get(key, 0) + value_H.cpu() / len(rows)
                    rows[row] = layer.run(hidden_1TD)
                    progress.advance(hidden_1TD.shape[1], f"layer {number + 1} of {shape.num_layers}")
    return {
        site: {name: value_H.view(shape.sites[site].num_key_value_heads, -1).mean(1) for name, value_H in each.items()}
        for site, each in found.items()
    }


def of_text(p_HTS: Tensor) -> Measures:
    """The measures of one row of text, `(H,)` each: means over its tokens from `SINKS + LOCAL` on."""
    tokens = p_HTS.shape[1]
    at_T = torch.arange(tokens, device=p_HTS.device)
    step_TS = at_T[:, None] - at_T
    first_S, near_TS = at_T < SINKS, (step_TS >= 0) & (step_TS < LOCAL)
    found_HT = {
        "entropy": torch.special.entr(p_HTS).sum(-1),
        "distance": (p_HTS * step_TS).sum(-1),
        "sink": (p_HTS * first_S).sum(-1),
        "local": (p_HTS * near_TS).sum(-1),
    }
    found_HT["far"] = p_HTS.sum(-1) - found_HT["sink"] - found_HT["local"]
    return {name: value_HT[:, SINKS + LOCAL :].mean(-1) for name, value_HT in found_HT.items()}


def of_copy(p_HTS: Tensor) -> Measures:
    """The attention of a row that ends in a copy to the tokens that followed the same ones before, `(H,)`."""
    again_N = torch.arange(p_HTS.shape[1] - SPAN, p_HTS.shape[1] - 1, device=p_HTS.device)
    return {"induction": p_HTS[:, again_N, again_N - again_N[0] + 1].mean(-1)}
