"""A model with a planted induction circuit: which heads copy is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 2000  # so that few tokens occur twice in a row by chance
CODE, WIDTH, HEADS, HIDDEN, SLOW = 24, 64, 4, 128, 20
TOKEN, BEFORE, NEXT = (slice(CODE * part, CODE * (part + 1)) for part in range(3))  # of the residual stream
ALWAYS, NOISE = 3 * CODE, slice(3 * CODE + 1, HIDDEN)


def planted(tiny_checkpoint: Callable[..., Path]) -> Path:
    """Head 1 of layer 0 attends to the token before, head 2 of layer 1 to what followed the same token before.

    A token is a code of signs in its part of the residual stream. The other heads are noise, larger than the circuit,
    and neither its heads nor the output read what they write.
    """
    folder = tiny_checkpoint(
        "llama",
        tokenizer=False,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        hidden_size=HIDDEN,
        head_dim=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
    )
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    codes_VC = torch.randn(VOCABULARY, CODE, generator=generator).sign()
    embedding_VD = tensors["model.embed_tokens.weight"]
    embedding_VD[:, TOKEN], embedding_VD[:, ALWAYS] = codes_VC, 4.0
    embedding_VD[:, NOISE] = torch.randn(VOCABULARY, HIDDEN - ALWAYS - 1, generator=generator).sign()  # of one norm
    tensors["lm_head.weight"][:, NEXT] = codes_VC
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1.0)
    planes = torch.arange(WIDTH // 2)
    slow = torch.cat([planes[SLOW:], planes[SLOW:] + WIDTH // 2])  # these hardly turn over a row
    for layer, planted_head in ((0, 1), (1, 2)):
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (tensors[f"{prefix}{role}_proj.weight"].view(HEADS, WIDTH, HIDDEN) for role in "qkv")
        o = tensors[f"{prefix}o_proj.weight"].view(HIDDEN, HEADS, WIDTH)
        for head in set(range(HEADS)) - {planted_head}:
            for weight in (q, k, v):
                weight[head, :, NOISE] = torch.randn(WIDTH, HIDDEN - ALWAYS - 1, generator=generator)
            o[NOISE, head] = torch.randn(HIDDEN - ALWAYS - 1, WIDTH, generator=generator) / (32 if layer else 256)
        v[planted_head, :CODE, TOKEN] = torch.eye(CODE)
        if layer == 0:
            turn_P = 10_000.0 ** (-planes / len(planes))
            q[planted_head, :, ALWAYS] = 5 * torch.cat([turn_P.cos(), -turn_P.sin()])
            k[planted_head, : len(planes), ALWAYS] = 5
            o[BEFORE, planted_head, :CODE] = torch.eye(CODE)
        else:
            q[planted_head, slow, TOKEN] = 5 * torch.eye(CODE)
            k[planted_head, slow, BEFORE] = 5 * torch.eye(CODE)
            o[NEXT, planted_head, :CODE] = 2 * torch.eye(CODE)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
