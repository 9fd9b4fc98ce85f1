"""gqa: grouped-query attention, of which multi-query attention is the case of one head.

The `G` key/value heads of a layer are split into `G'` contiguous groups of `g = G / G'`, and each group becomes one
head (Ainslie et al. 2023, arXiv 2305.13245, section 2.1). Query head `h` reads head `h // (H / G')`. `init` says how:

    fit         the best shared head for keys and for values, in closed form  (ours: docs/methods/gqa.md)
    align       the mean after rotating the heads towards one another         (arXiv 2412.20677)
    align-norm  the same, scaled to the heads' own norm
    mean        W_K'^(j) = 1/g * sum_{h in group j} W_K^(h)      (the paper's; W_V and biases alike)
    first       W_K'^(j) = the first head of group j             (its ablation, figure 4)
    random      W_K'^(j) ~ N(0, s^2), s the spread of W_K        (its ablation, figure 4)

`mean`, `first` and `random` read weights alone and leave `q` and `o` as they are. The others read calibration text, and
fold what they change about k and v into q and o.

Cached per token and layer: `2 G' E` elements. Decoding reads the cache once for each group, so it speeds up as the
cache shrinks. Lossless at `G' = G`; for `mean` and `first` whenever the heads of each group are equal; for `fit`
whenever they are linear images of one another (under RoPE: one complex factor for each plane of a key head). It loses
most where a layer's heads differ in content, and at one head for all.

Heads differ in how much a model needs them, and the few that copy are a small part of the sum that `fit` minimises.
`weigh ablation` measures the KL to the teacher without the readers of each head, and an error of the head counts by it.

Layers differ in how many heads they need. `kv_heads auto` folds one layer at a time, measures the KL to the teacher
and the rise of the loss of copying (`budget_metric`), and takes the mix within the `budget` of the smallest predicted
cost, the sum over layers: a multiple-choice knapsack, solved exactly (`kvfold.solve.budget`). kvfold.json keeps the mix
and the best uniform number, each with its cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.method import Folded, Method, Student, note_normed_keys
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import (
    Answers,
    AttentionGram,
    FoldedKL,
    FoldedRecall,
    HeadKL,
    InputGram,
    QueryGram,
    Question,
)
from kvfold.contracts.runtimes import LAYERS, PAIRS
from kvfold.contracts.site import REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError, choices
from kvfold.settings import setting
from kvfold.solve import Merge
from kvfold.solve import budget as budgets

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Literal["auto"] = "auto"
Init = Literal["fit", "align", "align-norm", "mean", "first", "random"]
MERGES: tuple[Merge, ...] = ("fit", "align", "align-norm")
COSTS: Mapping[str, Sequence[budgets.Cost]] = {
    "kl": (FoldedKL,),
    "recall": (FoldedRecall,),
    "both": (FoldedKL, FoldedRecall),
}


@dataclass(frozen=True)
class Config:
    """How many heads stay, and what they start from."""

    kv_heads: PerSite | Literal["auto"] = field(
        metadata={
            "help": "Key/value heads to keep, a divisor of the source's; 1 is MQA. By layer: 4/2/2/1. By kind: "
            "self=8,cross=4. auto: measured for each layer, within --budget."
        }
    )
    init: Init = setting("fit", "How a group becomes one head. Without --calibration: mean, which reads weights alone.")
    init_seed: int = setting(0, "Seed of --init random.")
    budget: float | None = setting(
        None, "Cache bytes as a fraction of the root teacher's, e.g. 0.25; required for --kv-heads auto."
    )
    weigh: Literal["uniform", "ablation"] = setting(
        "uniform", "What an error of a head counts in fit: all alike, or by the KL to the teacher without it, squared."
    )
    budget_metric: Literal["kl", "recall", "both"] = setting(
        "kl", "Cost of folding a layer under --kv-heads auto: KL on text, rise of the loss of copying, or their sum."
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
            if any(site.kind == "cross" for site in shape.sites) and self.budget_metric != "kl":
                raise SettingError(
                    "copying is measured on decoders, and this is an encoder-decoder",
                    where="gqa",
                    got=f"--budget-metric {self.budget_metric}",
                    next="set --budget-metric kl",
                )
            if shape.model_type not in LAYERS.models | PAIRS.models:
                raise SettingError(
                    f"kv_heads auto gives each layer its own heads, and {shape.model_type} has no classes for that",
                    where="gqa",
                    allowed=choices(sorted(LAYERS.models | PAIRS.models)),
                    next="give one number for all layers",
                )
            least = budgets.elements(shape, dict.fromkeys(shape.cached_sites, 1))
            budgets.check(self.budget, shape, least, where="gqa", setting="kv_heads", smallest="one head everywhere")
            return
        budgets.refuse(self.budget, where="gqa", setting="kv_heads", value=self.kv_heads)
        budgets.check_divides(self.kv_heads, shape, where="gqa")


def heads_by_site(config: Config, shape: Shape) -> dict[Site, int]:
    """Heads to keep at each site that has a cache. Of `auto`, unmeasured: as even as the budget allows."""
    return budgets.asked(config.kv_heads, config.budget, shape, where="gqa")


class GQA(Method[Config]):
    """Grouped-query attention: fewer key/value heads, each for a group of query heads."""

    without_text: ClassVar = {"init": "mean"}
    published: ClassVar = ({"init": "mean"},)

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Second moments of a folded site's inputs, for merged heads; under `auto`, the cost of each fold too."""
        if config.kv_heads == AUTO:
            fewer = {site: budgets.choices_of(shape, site)[:-1] for site in shape.cached_sites}
            costs = COSTS[config.budget_metric]
            folds: list[Question] = [
                cost(site, heads) for cost in costs for site, numbers in fewer.items() for heads in numbers
            ]
            sites = [site for site, numbers in fewer.items() if numbers]
        else:
            folds, wanted = [], heads_by_site(config, shape)
            sites = [site for site, heads in wanted.items() if heads < shape.sites[site].num_key_value_heads]
        read = (InputGram, QueryGram, AttentionGram) if config.init in MERGES else ()
        decoder = all(site.kind == "self" for site in shape.cached_sites)
        weighed = sites if config.init == "fit" and config.weigh == "ablation" and decoder else ()
        recalls = [HeadKL(site, head) for site in weighed for head in range(shape.sites[site].num_key_value_heads)]
        return [*(request(site) for site in sites for request in read), *recalls, *folds]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write the head counts out for each kind, layer by layer where they differ."""
        if config.kv_heads == AUTO:
            heads = budgets.cheapest(config.budget or 1, shape, answers, COSTS[config.budget_metric])
        else:
            heads = heads_by_site(config, shape)
        return replace(config, kv_heads=PerSite.of(heads), budget=None)

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """The mix that `auto` chose, beside the best number for all layers within the same budget."""
        if config.kv_heads != AUTO:
            return {}
        budget, costs = config.budget or 1, COSTS[config.budget_metric]
        both = {
            "mix": budgets.cheapest(budget, shape, answers, costs),
            "uniform": budgets.uniform(budget, shape, answers, costs),
        }
        chosen = {
            name: {
                "kv_heads": PerSite.of(heads).spelled(),
                "cache": budgets.part(shape, heads),
                **{budgets.NAMES[cost]: budgets.price(shape, answers, heads, [cost]) for cost in costs},
            }
            for name, heads in both.items()
        }
        each = {budgets.NAMES[cost]: budgets.prices(shape, answers, [cost]) for cost in costs}
        return {"budget": config.budget, **chosen, **each}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """Warn of head counts that are not chosen yet, and of keys that cannot be merged freely."""
        notes = []
        if config.kv_heads == AUTO:
            notes.append(
                f"kv_heads auto: the plan spreads a budget of {config.budget:g} evenly over layers; the conversion "
                "measures how many heads each keeps, and engines that need one number for all will not load a mix"
            )
        return [*notes, *(note_normed_keys(shape, config.init) if config.init in MERGES else ())]

    def student(self, config: Config, shape: Shape) -> Student:
        """The model with fewer key/value heads. For `auto`: the budget spread evenly over layers."""
        heads = heads_by_site(config, shape)
        return Student(shape.with_heads(heads))

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Folded:
        """Make each group one head, by weights or by moments; what each merged group lost, and which lost nothing.

        Lost is a share of the weighted second moment. Nothing is what rounding to the weights' format can lose.
        """
        assert config.kv_heads != AUTO
        converted: dict[Site, Roles] = {}
        lost: dict[Site, Any] = {}
        for site, tensors in group.items():
            heads, attention = config.kv_heads.at(site), tensors.attention
            if config.init in MERGES and heads < attention.num_key_value_heads:
                converted[site], lost[site] = _merge(site, tensors, heads, answers, config.init)
            else:
                converted[site] = _pool(tensors, heads, config, salt=str(site))
        return converted, lost

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything after a fit; published starts are left as published."""
        return REPAIRABLE if config.init == "fit" else ()

    def with_heads(self, config: Config, heads: int) -> Config:
        """The same settings with `heads` key/value heads at every site."""
        return replace(config, kv_heads=PerSite.parse(heads), budget=None)

    def lossless(self, shape: Shape) -> Config:
        """Keep every head."""
        return Config(PerSite.of({site: shape.sites[site].num_key_value_heads for site in shape.cached_sites}))

    def example(self, shape: Shape) -> Config:
        """Half of the heads."""
        fewest = min(shape.sites[site].num_key_value_heads for site in shape.cached_sites)
        return Config(PerSite.parse(max(1, fewest // 2)))


def _merge(site: Site, tensors: SiteTensors, heads: int, answers: Answers, how: Merge) -> tuple[Roles, dict[str, Any]]:
    """Merge heads by the moments of calibration, weighed by their ablation if that was measured."""
    from kvfold.solve.normed_heads import merge_normed  # loads torch: a plan works without
    from kvfold.solve.shared_heads import ablation_weights, merge_site, moments_of, reported

    merge = merge_normed if tensors.attention.norms == "all_heads" else merge_site
    weight_G = ablation_weights(site, tensors.attention, answers) if HeadKL(site, 0) in answers else None
    roles, lost = merge(tensors.attention, tensors.roles, heads, moments_of(site, answers), how, weight_G)
    return roles, reported(lost, tensors.roles["k"])


def _pool(tensors: SiteTensors, heads: int, config: Config, salt: str) -> Roles:
    """Pool heads by weights alone. A norm over all heads has weights for each of them, and is pooled too."""
    attention, new = tensors.attention, dict(tensors.roles)
    if heads == attention.num_key_value_heads:
        return new
    for role in attention.head_roles:
        init = "mean" if role == "k_norm" and config.init == "random" else config.init
        new[role] = _pooled(new[role], heads, attention.head_dim, init, f"{config.init_seed} {salt} {role}")
    return new


def _pooled(tensor: Tensor, heads: int, width: int, init: Init, seed_text: str) -> Tensor:
    """Pool rows `(G E, ...)` to `(G' E, ...)`, one block of `E` rows a head."""
    import torch  # a plan works without

    if init == "random":
        seed = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(heads * width, *tensor.shape[1:], generator=generator, dtype=torch.float64)
        return drawn * tensor.double().std()
    blocks = tensor.reshape(heads, -1, width, *tensor.shape[1:])
    if init == "first":
        return blocks[:, 0].double().reshape(heads * width, *tensor.shape[1:])
    # head by head: one float64 copy of all heads would spill out of the cache, and take five times as long
    return torch.cat([block.double().mean(0) for block in blocks])


METHOD = GQA()
