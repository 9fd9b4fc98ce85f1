"""gqa: grouped-query attention, of which multi-query attention is the case of one head.

The `G` key/value heads of a layer are split into `G'` contiguous groups of `g = G / G'`, and each group is pooled
into one head (Ainslie et al. 2023, arXiv 2305.13245, section 2.1):

    mean    W_K'^(j) = 1/g * sum_{h in group j} W_K^(h)        (the paper's; W_V and biases alike)
    first   W_K'^(j) = the first head of group j               (its ablation, figure 4)
    random  W_K'^(j) ~ N(0, s^2), s the spread of W_K          (its ablation, figure 4)

`q` and `o` stay as they are: query head `h` reads pooled head `h // (H / G')`. Pooling commutes with RoPE, which
rotates all heads alike. Cached per token and layer: `2 G' E` elements. Lossless at `G' = G`, and for `mean` and
`first` whenever the heads of each group are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kvfold.errors import SettingError, choices
from kvfold.methods import Student
from kvfold.shape import (
    KINDS,
    Answers,
    Attention,
    CacheSpec,
    Kind,
    Request,
    Roles,
    Shape,
    Site,
    SiteTensors,
    Stage,
    divisors,
    grouped_cache,
    per_kind,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

Init = Literal["mean", "first", "random"]


@dataclass(frozen=True)
class Config:
    """How many heads stay, and what they start from."""

    kv_heads: str | int = field(
        metadata={"help": "Key/value heads to keep: a divisor of the source's; 1 is MQA. Or self=8,cross=4."}
    )
    init: Init = field(
        default="mean", metadata={"help": "What a pooled head starts from: the mean of its group, its first, noise."}
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of --init random."})

    def check(self, shape: Shape) -> None:
        """Refuse a head count that does not divide the source's, naming those that do."""
        wanted = heads_by_kind(self, shape)
        for site, attention in shape.sites.items():
            if site.kind not in wanted:
                continue
            heads, have = wanted[site.kind], attention.num_key_value_heads
            if have % heads:
                grouped = have != attention.num_attention_heads
                what = "key/value heads" if grouped else "query heads"
                raise SettingError(
                    f"kv_heads {heads} does not divide the {have} {what} of {site}",
                    where="gqa",
                    next=f"choose {choices(divisors(have))}",
                )


def heads_by_kind(config: Config, shape: Shape) -> dict[Kind, int]:
    """Heads to keep for each kind of site that has a cache."""
    kinds = [kind for kind in KINDS if kind != "encoder" and any(site.kind == kind for site in shape.sites)]
    return per_kind(config.kv_heads, kinds, "kv_heads")


def needs(config: Config, shape: Shape) -> Sequence[Request]:
    """Ask nothing: pooling reads weights alone."""
    return ()


def resolve(config: Config, shape: Shape, answers: Answers) -> Config:
    """Write the head count out for each kind."""
    heads = heads_by_kind(config, shape)
    text: str | int = ",".join(f"{kind}={count}" for kind, count in heads.items())
    return replace(config, kv_heads=next(iter(heads.values())) if len(heads) == 1 else text)


def groups(config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
    """Take every cached site alone."""
    return [(site,) for site in shape.sites if site.kind != "encoder"]


def student(config: Config, shape: Shape) -> Student:
    """The same model with fewer key/value heads."""
    heads = heads_by_kind(config, shape)
    return Student(
        shape.with_sites(
            {
                site: replace(attention, num_key_value_heads=heads[site.kind])
                for site, attention in shape.sites.items()
                if site.kind in heads
            }
        )
    )


def cache_spec(config: Config, shape: Shape) -> CacheSpec:
    """Keys and values of the heads that stay."""
    return grouped_cache(student(config, shape).shape)


def convert(group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
    """Pool `k`, `v` and their biases; every other role is passed on."""
    converted = {}
    for site, tensors in group.items():
        heads = per_kind(config.kv_heads, [site.kind], "kv_heads")[site.kind]
        new = dict(tensors.roles)
        for role in ("k", "v", "k_bias", "v_bias"):
            if role in new:
                new[role] = _pool(new[role], tensors.attention, heads, config, salt=f"{site} {role}")
        converted[site] = new
    return converted


def _pool(tensor: Tensor, attention: Attention, heads: int, config: Config, salt: str) -> Tensor:
    """Pool rows `(G E, ...)` to `(G' E, ...)`, one block of `E` rows a head."""
    have, width = attention.num_key_value_heads, attention.head_dim
    if heads == have:
        return tensor
    import torch  # the settings above are read by `plan`, which answers before torch would be loaded

    if config.init == "random":
        seed = int.from_bytes(hashlib.sha256(f"{config.init_seed} {salt}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(heads * width, *tensor.shape[1:], generator=generator, dtype=torch.float64)
        return drawn * tensor.double().std()
    blocks = tensor.reshape(heads, have // heads, width, *tensor.shape[1:])
    if config.init == "first":
        return blocks[:, 0].double().reshape(heads * width, *tensor.shape[1:])
    # head by head: one float64 copy of all heads would spill out of the cache, and take five times as long
    return torch.cat([block.double().mean(0) for block in blocks])


def stages(config: Config) -> Sequence[Stage]:
    """Leave uptraining to the user: one objective on every parameter, as the paper does."""
    return ()


def end(finish: str, student: nn.Module, config: Config) -> None:
    """Do nothing: no stage of this method ends in a change."""


def lossless(shape: Shape) -> Config:
    """Keep every head."""
    kept = {
        site.kind: attention.num_key_value_heads for site, attention in shape.sites.items() if site.kind != "encoder"
    }
    return Config(
        ",".join(f"{kind}={heads}" for kind, heads in kept.items()) if len(kept) > 1 else next(iter(kept.values()))
    )
