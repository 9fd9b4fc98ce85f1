"""A site as a student's attention has it: with a latent in place of keys and values, or linear behind a window."""

from __future__ import annotations

from dataclasses import replace

from kvfold.contracts.site import Attention, Linear

KERNELS = ((512, 64), (256, 64))
"""Widths of the latent and of the rotated key of `with_mla` for which engines have kernels."""
WITH_KERNELS = " and ".join(f"{latent} + {key}" for latent, key in KERNELS)


def with_latent(attention: Attention, planes: int, width: int) -> Attention:
    """The same site with latent keys and values: of each key head `planes` rotated planes, and one latent for the rest.

    Roles: `k_rope` (2 planes G, D) makes the rotated coordinates; `kv_down` (R, D) the latent; `k_up` and `v_up` what
    it says of unrotated keys and of values; `planes` (G, planes) names the frequencies that each key head keeps. Heads
    of `q` begin with their rotated coordinates. There is no bias of unrotated keys, which would move all logits alike.
    """
    hidden, groups, rotated = attention.hidden_size, attention.num_key_value_heads, 2 * planes
    free = attention.head_dim - rotated
    extra: dict[str, tuple[int, ...]] = {"k_rope": (groups * rotated, hidden), "kv_down": (width, hidden)}
    if "k" in attention.biases:
        extra["k_rope_bias"] = (groups * rotated,)
    if free:
        extra["k_up"] = (groups * free, width)
    extra |= {"v_up": (groups * attention.head_dim, width), "v_up_bias": (groups * attention.head_dim,)}
    return replace(
        attention,
        extra={**extra, "planes": (groups, planes)},
        without=frozenset({"k", "v", "k_bias", "v_bias"}),
        kept={"rotated": groups * rotated, "latent": width},
        read=rotated + 2 * width,
        rope=attention.rope and replace(attention.rope, dims=rotated),
    )


def with_mla(
    attention: Attention, *, rotated: int, free: int, value: int, width: int, biased: bool, queries: int | None = None
) -> Attention:
    """The same site with multi-head latent attention (arXiv 2405.04434), as DeepSeek-V3's classes have it.

    Heads of queries and keys have `free` coordinates without rotation, then `rotated` ones whose neighbours rotate
    together; heads of values have `value`. Roles: `kv_down` (R + rotated, D) makes the latent and the one rotated key
    that all heads share, `kv_norm` (R) is the weight of the latent's RMS norm, and `kv_up` (H (free + value), R) makes
    unrotated keys and values, head by head. If `biased`, `kv_down` and `o` have biases. With `queries`, these come from
    a normed latent of that width too: `q_down` (with a bias, if `biased`), `q_down_norm` and `q_up`, in place of `q`.
    """
    heads, hidden, head = attention.num_attention_heads, attention.hidden_size, free + rotated
    extra: dict[str, tuple[int, ...]] = {"q": (heads * head, hidden), "o": (hidden, heads * value)}
    extra |= {"kv_down": (width + rotated, hidden), "kv_norm": (width,), "kv_up": (heads * (free + value), width)}
    if biased:
        extra |= {"kv_down_bias": (width + rotated,), "o_bias": (hidden,)}
    if queries is not None:
        del extra["q"]
        extra |= {"q_down": (queries, hidden), "q_down_norm": (queries,), "q_up": (heads * head, queries)}
        if biased:
            extra["q_down_bias"] = (queries,)
    return replace(
        attention,
        num_key_value_heads=heads,
        head_dim=head,
        biases=frozenset(),
        extra=extra,
        without=frozenset({"q", "k", "v"}),
        kept={"latent": width, "rotated": rotated},
        read=rotated + 2 * width,
        rope=attention.rope and replace(attention.rope, dims=head, half_split=False),  # the first ones by no angle
    )


def with_encoder_latent(attention: Attention, width: int, source: int | None) -> Attention:
    """The same cross-attention over one latent of the encoder's output, which the first one caches for all.

    Roles: `k` and `v` (G E, R) read keys and values off it, and `v_bias` (G E) is added to these, `k_bias` to those
    whose logits are capped, which would else not feel it; `kv_down` (R, D), in the first alone, makes it; the others
    have the layer of the first as `source`. The encoder's output itself, `R = D`, needs no `kv_down`, and no bias
    beyond those that there were.
    """
    rows, narrow = attention.num_key_value_heads * attention.head_dim, width < attention.input_width
    extra: dict[str, tuple[int, ...]] = {"k": (rows, width), "v": (rows, width)}
    biased = attention.biases & {"k", "v"} | ({"v"} if narrow else set())
    biased |= {"k"} if narrow and attention.softcap is not None else set()
    extra |= {f"{role}_bias": (rows,) for role in sorted(biased)}
    if narrow and source is None:
        extra["kv_down"] = (width, attention.input_width)
    kept = {"latent": width}
    return replace(attention, extra=extra, kept=kept, read=2 * width, source=source)


def with_linear(attention: Attention, linear: Linear) -> Attention:
    """The same site with linear attention behind a window.

    Roles: of `relu` one map for each key head, `phi` (G F, E) with `phi_bias`, which keys and their queries share; of
    `hedgehog` one for each query head and one for each key head, `phi_q` (H F / 2, E) and `phi_k` (G F / 2, E); and
    `window_gate` (H,), the logarithm of what the window counts, where both parts stand under one denominator.
    """
    width, heads, groups = attention.head_dim, attention.num_attention_heads, attention.num_key_value_heads
    extra: dict[str, tuple[int, ...]] = {}
    if linear.features == "relu":
        extra = {"phi": (groups * linear.feature_dim, width), "phi_bias": (groups * linear.feature_dim,)}
    if linear.features == "hedgehog":
        half = linear.feature_dim // 2
        extra = {"phi_q": (heads * half, width), "phi_k": (groups * half, width)}
    if extra and linear.window:
        extra["window_gate"] = (heads,)
    kept = {"sums": 0, "window": 2 * groups * width * bool(linear.window + linear.sinks)}
    return replace(attention, extra=extra, kept=kept, linear=linear)
