"""gqa: grouped-query attention, of which multi-query attention is the case of one head.

The `G` key/value heads of a layer are split into `G'` contiguous groups of `g = G / G'`, and each group is made into
one head (Ainslie et al. 2023, arXiv 2305.13245, section 2.1):

    fit         the best shared head for keys and for values, in closed form  (ours: docs/methods/gqa.md, `merge`)
    align       the mean after turning the heads towards one another          (arXiv 2412.20677)
    align-norm  the same, scaled to the heads' own norm
    mean        W_K'^(j) = 1/g * sum_{h in group j} W_K^(h)      (the paper's; W_V and biases alike)
    first       W_K'^(j) = the first head of group j             (its ablation, figure 4)
    random      W_K'^(j) ~ N(0, s^2), s the spread of W_K        (its ablation, figure 4)

`mean`, `first` and `random` read weights alone and leave `q` and `o` as they are; the first three need the teacher to
read a little text, and fold what they change about k and v into q and o. Query head `h` reads head `h // (H / G')`.
Cached per token and layer: `2 G' E` elements. Lossless at `G' = G`; for `mean` and `first` whenever the heads of each
group are equal; for `fit` whenever they are linear images of one another (under RoPE: one complex factor for each
plane of a key head).

Layers differ in what they bear. `kv_heads auto` lets the teacher read with one layer folded at a time, and takes of all
mixes within the `budget` the one of the smallest predicted KL, the sum over layers: a multiple-choice knapsack, which
is solved exactly. What a mix adds to one number of heads for all layers is in `kvfold.json`, beside that number's KL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from kvfold.contracts.method import Method, Student
from kvfold.contracts.per_layer import divisors, per_kind
from kvfold.contracts.requests import Answers, AttentionGram, FoldedKL, InputGram, QueryGram, Question
from kvfold.contracts.runtimes import LAYERS
from kvfold.contracts.site import KINDS, REPAIRABLE, Attention, Kind, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError, choices
from kvfold.solve import budget as budgets

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
POOLED = ("mean", "first", "random")
MERGED = ("fit", "align", "align-norm")
Init = Literal["fit", "align", "align-norm", "mean", "first", "random"]


@dataclass(frozen=True)
class Config:
    """How many heads stay, and what they start from."""

    kv_heads: str | int = field(
        metadata={
            "help": "Key/value heads to keep: a divisor of the source's; 1 is MQA. Or self=8,cross=4, or layer by "
            "layer 4/2/2/1, or auto: each layer its own, by what folding it costs."
        }
    )
    init: Init = field(
        default="fit",
        metadata={"help": "How a group becomes a head; without --calibration: mean, which reads weights alone."},
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of --init random."})
    budget: float | None = field(
        default=None, metadata={"help": "For --kv-heads auto: cache bytes, as a part of the root teacher's (0.25)."}
    )

    def check(self, shape: Shape) -> None:
        """Refuse a budget that no head fits, and a head count that does not divide the source's, naming what does."""
        if shape.owners:
            raise SettingError(
                "layers of the source share keys and values",
                where="gqa",
                next="fold heads first and share layers then: cla takes a student of gqa",
            )
        if self.kv_heads == AUTO:
            if any(site.kind == "cross" for site in shape.sites):
                raise SettingError(
                    "kv_heads auto is measured on decoders alone",
                    where="gqa",
                    next="say how many heads each kind keeps",
                )
            if shape.model_type not in LAYERS.models:
                raise SettingError(
                    f"kv_heads auto gives layers heads of their own, and {shape.model_type} has no classes for those",
                    where="gqa",
                    allowed=choices(sorted(LAYERS.models)),
                    next="give one number for all layers",
                )
            budgets.check(self.budget, shape, "gqa")
            return
        if self.budget is not None:
            raise SettingError(
                f"budget says nothing about kv_heads {self.kv_heads}",
                where="gqa",
                got=f"{self.budget:g}",
                next="say --kv-heads auto, or leave out --budget",
            )
        for site, heads in heads_by_site(self, shape).items():
            attention = shape.sites[site]
            have = attention.num_key_value_heads
            if have % heads:
                grouped = have != attention.num_attention_heads
                what = "key/value heads" if grouped else "query heads"
                raise SettingError(
                    f"kv_heads {heads} does not divide the {have} {what} of {site}",
                    where="gqa",
                    next=f"choose {choices(divisors(have))}",
                )


# --- how many heads stay ---------------------------------------------------------------------------------------------


def heads_by_site(config: Config, shape: Shape) -> dict[Site, int]:
    """Heads to keep at each site that has a cache; `auto`, before anything is measured, as alike as the budget allows.

    Raises SettingError when there are more or fewer numbers than layers.
    """
    if config.kv_heads == AUTO:
        return budgets.alike(config.budget or 1, shape)
    sites = budgets.cached(shape)
    layers = 1 + max(site.layer for site in sites)
    said = _said(config.kv_heads, [kind for kind in KINDS if any(site.kind == kind for site in sites)])
    if len(said) not in (1, layers):
        raise SettingError(
            f"kv_heads has {len(said)} numbers for {layers} layers",
            where="gqa",
            got=repr(config.kv_heads),
            next="give one for each layer, or one for all",
        )
    return {site: said[site.layer % len(said)][site.kind] for site in sites}


def _said(setting: str | int, kinds: Sequence[Kind]) -> list[dict[Kind, int]]:
    """Read `8`, `4/2/2/1` or `self=4/2/2/1,cross=8`: heads by kind, once for all layers or for each layer."""
    parts = [part.rpartition("=") for part in str(setting).split(",")]
    lists = [(f"{kind}{equals}", numbers.split("/")) for kind, equals, numbers in parts]
    layers = max(len(numbers) for _, numbers in lists)
    if any(len(numbers) not in (1, layers) for _, numbers in lists):
        raise SettingError("kv_heads has lists of several lengths", where="gqa", got=repr(setting))
    rows = (",".join(kind + numbers[layer % len(numbers)] for kind, numbers in lists) for layer in range(layers))
    return [per_kind(row, kinds, "kv_heads") for row in rows]


def _spelled(heads: Mapping[Site, int]) -> str | int:
    """Heads by site as a setting: `8`, `4/2/2/1`, or `self=4/2/2/1,cross=8`."""
    words: dict[Kind, str | int] = {}
    for kind in KINDS:
        numbers = [heads[site] for site in sorted(heads) if site.kind == kind]
        if numbers:
            words[kind] = numbers[0] if len(set(numbers)) == 1 else "/".join(map(str, numbers))
    return next(iter(words.values())) if len(words) == 1 else ",".join(f"{kind}={word}" for kind, word in words.items())


# --- the contract ----------------------------------------------------------------------------------------------------


def _merge(
    site: Site, tensors: SiteTensors, heads: int, answers: Answers, config: Config
) -> tuple[Roles, dict[str, Any]]:
    """Merge by the moments of what the teacher read."""
    from kvfold.solve.normed_heads import merge
    from kvfold.solve.shared_heads import losses, merge_site, moments_of

    how = cast(Literal["fit", "align", "align-norm"], config.init)
    made = merge if tensors.attention.norms == "all_heads" else merge_site
    roles, lost = made(tensors.attention, tensors.roles, heads, moments_of(site, answers), how)
    return roles, losses(lost, tensors.roles["k"])


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


class GQA(Method[Config]):
    """Grouped-query attention: fewer key/value heads, each for a group of query heads."""

    without_text: ClassVar = {"init": "mean"}
    published: ClassVar = ({"init": "mean"},)  # what others start from

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Second moments of a folded site's inputs, for merged heads; under `auto`, the cost of each fold too."""
        if config.kv_heads == AUTO:
            fewer = {site: budgets.choices_of(shape, site)[:-1] for site in budgets.cached(shape)}
            folds = [FoldedKL(site, heads) for site, numbers in fewer.items() for heads in numbers]
            sites = [site for site, numbers in fewer.items() if numbers]
        else:
            folds, wanted = [], heads_by_site(config, shape)
            sites = [site for site, heads in wanted.items() if heads < shape.sites[site].num_key_value_heads]
        read = () if config.init in POOLED else (InputGram, QueryGram, AttentionGram)
        return [*(request(site) for site in sites for request in read), *folds]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write the head counts out for each kind, layer by layer where they differ."""
        if config.kv_heads == AUTO:
            heads = budgets.cheapest(config.budget or 1, shape, answers)
        else:
            heads = heads_by_site(config, shape)
        return replace(config, kv_heads=_spelled(heads), budget=None)

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """What `auto` chose and on what grounds, beside the best number for all layers within the same budget."""
        if config.kv_heads != AUTO:
            return {}
        both = {
            "mix": budgets.cheapest(config.budget or 1, shape, answers),
            "uniform": budgets.uniform(config.budget or 1, shape, answers),
        }
        told = {
            name: {
                "kv_heads": _spelled(heads),
                "cache": budgets.part(shape, heads),
                "kl": budgets.price(shape, answers, heads),
            }
            for name, heads in both.items()
        }
        return {"budget": config.budget, **told, "kl": budgets.prices(shape, answers)}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """What a plan must say of head counts that are not chosen yet, and of keys that cannot be merged freely."""
        said = []
        if config.kv_heads == AUTO:
            said.append(
                f"kv_heads auto: shown is a budget of {config.budget:g} spent alike on all layers; how many heads each "
                "keeps is measured when it is converted, and engines that want one number for all will not load a mix"
            )
        if config.init in MERGED and any(attention.norms == "pre_rope" for attention in shape.sites.values()):
            said.append(
                f"init {config.init}: keys are normed before they are rotated, so heads are turned plane by plane and "
                "then averaged; values, o and what is repaired are as in other models"
            )
        return said

    def student(self, config: Config, shape: Shape) -> Student:
        """The model with fewer key/value heads. For `auto`: the budget spread evenly over layers."""
        heads = heads_by_site(config, shape)
        return Student(
            shape.with_sites(
                {site: replace(shape.sites[site], num_key_value_heads=count) for site, count in heads.items()}
            )
        )

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Make each group of heads one, by weights or by moments; every role that does not change is passed on."""
        return self.fold(group, answers, config)[0]

    def fold(
        self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config
    ) -> tuple[Mapping[Site, Roles], Mapping[Site, Any]]:
        """Convert, and say of each site merged by moments what its groups lost and which of them lost nothing.

        Lost is a share of the weighted second moment; nothing means within rounding to the weights' format.
        """
        converted, told = {}, {}
        for site, tensors in group.items():
            kinds = [kind for kind in KINDS if kind in str(config.kv_heads)] or [site.kind]
            said = _said(config.kv_heads, kinds)
            heads = said[site.layer % len(said)][site.kind]
            if heads < tensors.attention.num_key_value_heads and config.init not in POOLED:
                converted[site], told[site] = _merge(site, tensors, heads, answers, config)
                continue
            new = dict(tensors.roles)
            for role in ("k", "v", "k_bias", "v_bias", "k_norm"):
                if role in new and len(new[role]) > tensors.attention.head_dim:
                    drawn = replace(config, init="mean") if role == "k_norm" and config.init == "random" else config
                    new[role] = _pool(new[role], tensors.attention, heads, drawn, salt=f"{site} {role}")
            converted[site] = new
        return converted, told

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything after a fit; published starts are left as published."""
        return REPAIRABLE if config.init == "fit" else ()

    def with_heads(self, config: Config, heads: int) -> Config:
        """The same settings with so many heads everywhere: under these FoldedKL is measured, site by site."""
        return replace(config, kv_heads=heads, budget=None)

    def lossless(self, shape: Shape) -> Config:
        """Keep every head."""
        return Config(_spelled({site: shape.sites[site].num_key_value_heads for site in budgets.cached(shape)}))

    def example(self, shape: Shape) -> Config:
        """Half of the heads."""
        return Config(max(1, min(shape.sites[site].num_key_value_heads for site in budgets.cached(shape)) // 2))


METHOD = GQA()
