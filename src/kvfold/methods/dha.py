"""dha: decoupled-head attention, which learns how the heads of a layer become few.

A student starts as its teacher, with all heads. In training, each key head (and each value head) of a layer is a
weighted sum of the heads of its group, one weight for each coordinate (Chen et al. 2024, arXiv 2406.06567):

    W^(h) = sum_{j in group of h} omega_hj * W_j        omega starts at the identity: to the last bit the teacher

The method has three stages of uptraining, whose shares of the tokens are settings:

    search   the weights alone train, over all heads of a layer. Heads whose weights stay alike share a group; groups
             are of one size, with the smallest sum of distances `1/G sum_j (omega_hj - omega_h'j)^2` within them
    fusion   the weights of a group are drawn together: the loss has the term `lambda max(spread - t, 0)` of an
             augmented Lagrangian for each map, lambda rises by gradient ascent, and t falls from 1 to 0; it ends
             when the spread has vanished
    after    the mean of a group stands for its heads, and plain heads train on

`init align` starts from heads that are rotated towards one another (arXiv 2412.20677), which changes nothing that the
model computes and makes them alike before anything is learned. Groups are neighbours then: there is nothing to search.

Cached per token and layer: `2 G E` elements as converted, and `2 G' E` once uptraining has handed the heads over. The
result is grouped-query attention that engines load, unless `servable` is off: keys and values then have groups and
numbers of heads of their own, as in the paper. Lossless at `G' = G`. It loses to `gqa`'s closed form and repair where
tokens are few (docs/methods/dha.md).

`kv_heads auto` spends a `budget` of bytes over layers, by the fusion loss of each layer at each number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.method import Limit, Method, Student, Trained, refuse
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import Answers, AttentionGram, InputGram, QueryGram, Question
from kvfold.contracts.runtimes import DECOUPLED, SEPARATE
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import GUIDED, Learner, Stage
from kvfold.errors import SettingError, choices
from kvfold.settings import check_range, setting
from kvfold.solve import budget as budgets
from kvfold.solve.head_groups import Groups, contiguous, grouped, within

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Literal["auto"] = "auto"
Map = tuple[Site, str]
"""A site, and its roles that share groups: `k`, `v` or `kv`."""

LIMITS: Sequence[Limit] = (
    ("only decoders have these stages", lambda site, attention: site.kind != "self"),
    ("it reads another layer's keys and values", lambda site, attention: attention.source is not None),
    ("a norm over all heads would change with their number", lambda site, attention: attention.norms == "all_heads"),
)
WARM = 0.7  # share of the fusion stage in which the threshold of the spread falls to 0
STEEP = 10.0  # learning rate of the multipliers, as a multiple of that of the weights


@dataclass(frozen=True)
class Config:
    """How many heads stay, from which basis, and how many tokens choose and fuse them."""

    kv_heads: PerSite | Literal["auto"] = field(
        metadata={
            "help": "Key/value heads to keep, a divisor of the source's. By layer: 4/2/2/1. auto: chosen for each "
            "layer by its fusion loss, within --budget."
        }
    )
    init: Literal["plain", "align"] = setting(
        "plain", "Heads as they are, or rotated towards one another, by calibration text."
    )
    budget: float | None = setting(
        None, "Cache bytes as a fraction of the root teacher's, e.g. 0.25; required for --kv-heads auto."
    )
    search: float = setting(0.1, "Share of the uptraining tokens that chooses the groups, of plain heads.")
    fusion: float = setting(0.4, "Share of the uptraining tokens that fuses the heads of a group.")
    constraint: Literal["lagrangian", "schedule"] = setting(
        "lagrangian",
        "What draws a group's weights together: the penalty of the paper, or a factor of their differences that falls "
        "from 1 to 0.",
    )
    fusion_rate: float = setting(100.0, "Learning rate of the fusion weights, as a multiple of the model's.")
    tolerance: float = setting(
        1e-3,
        "Spread of every map, 1 at the start, below which the lagrangian's fusion ends; the tokens that are left train "
        "plain heads. 0: never.",
    )
    servable: bool = setting(
        True,
        "Keys and values share their groups, as engines require. Without: each has its own, in transformers alone.",
    )
    value_heads: PerSite | None = setting(
        None, "Value heads to keep, with --no-servable. Default: as many as --kv-heads."
    )

    def check(self, shape: Shape) -> None:
        """Refuse models whose heads cannot be fused, head counts that do not divide, and shares above the whole."""
        if shape.model_type not in SEPARATE:
            raise SettingError(
                f"{shape.model_type} has no maps of q, k, v and o of their own",
                where="dha",
                allowed=choices(sorted(SEPARATE)),
                next="choose gqa",
            )
        refuse(shape, "dha", LIMITS)
        check_range(self, "dha", 0, 1, "search", "fusion", "tolerance")
        check_range(self, "dha", 1, 1e6, "fusion_rate")
        if self.search + self.fusion > 1:
            raise SettingError(
                "search and fusion are shares of the tokens",
                where="dha",
                got=f"{self.search:g} and {self.fusion:g}",
                allowed="a sum of at most 1",
            )
        if self.init == "align" and any(each.norms != "none" for each in shape.sites.values()):
            raise SettingError("keys are normed, and cannot be rotated", where="dha", next="set --init plain")
        self._check_apart(shape)
        if self.kv_heads != AUTO:
            budgets.refuse(self.budget, where="dha", setting="kv_heads", value=self.kv_heads)
            budgets.check_divides(self.kv_heads, shape, where="dha")
            return
        if self.init == "align":
            raise SettingError(
                "init align needs the groups that kv_heads auto chooses later",
                where="dha",
                next="set --kv-heads, such as the mix that gqa --kv-heads auto chooses",
            )
        least = budgets.elements(shape, dict.fromkeys(shape.cached_sites, 1))
        budgets.check(self.budget, shape, least, where="dha", setting="kv_heads", smallest="one head everywhere")

    def _check_apart(self, shape: Shape) -> None:
        """Refuse settings that do not go with `servable`, or without it."""
        if self.value_heads is not None:
            if self.servable or self.kv_heads == AUTO:
                other = "servable" if self.servable else "kv_heads auto"
                raise SettingError(
                    f"value_heads does not apply with {other}",
                    where="dha",
                    got=self.value_heads,
                    next="add --no-servable, or leave out --value-heads"
                    if self.servable
                    else "leave out --value-heads",
                )
            budgets.check_divides(self.value_heads, shape, where="dha", setting="value_heads")
        if not self.servable and shape.model_type not in DECOUPLED.models:
            raise SettingError(
                f"{shape.model_type} has no classes for {DECOUPLED.name}", where="dha", next="leave out --no-servable"
            )
        if not self.servable and self.init == "align":
            raise SettingError(
                "init align rotates keys and values in the same groups", where="dha", next="leave out --no-servable"
            )


class DHA(Method[Config]):
    """Decoupled-head attention: heads that learn to become one."""

    without_text: ClassVar = {"init": "plain"}
    published: ClassVar = ({"init": "plain", "constraint": "lagrangian"},)

    def student(self, config: Config, shape: Shape) -> Student:
        """The source's own shape: the stages of uptraining change it."""
        return Student(shape)

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Second moments, to align heads."""
        if config.init == "plain":
            return ()
        return [kind(site) for site in shape.cached_sites for kind in (InputGram, QueryGram, AttentionGram)]

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """The heads as they are, or rotated towards the mean of their group."""
        if config.init == "plain":
            return {site: tensors.roles for site, tensors in group.items()}
        from kvfold.solve.shared_heads import align_site, moments_of  # loads torch: a plan works without

        assert config.kv_heads != AUTO
        return {
            site: align_site(tensors.attention, tensors.roles, config.kv_heads.at(site), moments_of(site, answers))
            for site, tensors in group.items()
        }

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """When the cache shrinks."""
        then = "loads as a student of gqa does" if config.servable else "loads in transformers with kvfold alone"
        return [f"the student keeps all heads until uptraining fuses them, and then {then}"]

    def lossless(self, shape: Shape) -> Config:
        """Keep every head."""
        return Config(PerSite.of(_all(shape)))

    def example(self, shape: Shape) -> Config:
        """Half of the heads."""
        return Config(PerSite.of({site: max(1, heads // 2) for site, heads in _all(shape).items()}))

    # --- uptraining

    def final(self, config: Config, shape: Shape) -> Shape:
        """The model with fewer key/value heads. For `auto`: the budget spread evenly over layers."""
        counts = {part: _heads(config, shape, part) for part in _parts(config)}
        return _with_groups(
            shape,
            {
                (site, role): contiguous(heads, counts[part][site])
                for site, heads in _all(shape).items()
                for part in counts
                for role in part
            },
        )

    def stages(self, config: Config) -> Sequence[Stage]:
        """Search, for plain heads; fusion; and training of plain heads."""
        search = config.search if config.init == "plain" else 0.0
        rates = {"fusion": config.fusion_rate, "multiplier": STEEP * config.fusion_rate}
        last = 1 - search - config.fusion
        stages = (
            Stage("search", search, GUIDED, trainable=("fusion",), rates=rates, finish="search"),
            Stage("fusion", config.fusion, GUIDED, rates=rates, scheduled=True, finish="fusion"),
            Stage("after", last, GUIDED, rates=dict.fromkeys(rates, 0.0)),
        )
        return [stage for stage in stages if stage.share > 0 or stage.finish]

    def begin(self, student: Learner, config: Config) -> None:
        """Put fused heads in the place of the maps of keys and values."""
        from kvfold.attention.fused_heads import FusedHeads

        for site, attention in student.shape.sites.items():
            for role in "kv":
                student.put(site, role, FusedHeads(student.map(site, role), attention.head_dim))

    def during(self, stage: str, student: Learner, share: float, config: Config) -> Tensor | None:
        """Lower the threshold of every map's spread, or the factor of its differences, from 1 to 0."""
        import torch

        left, maps = max(0.0, 1 - share / WARM), _maps(student)
        if config.constraint == "lagrangian":
            return torch.stack([each.constraint(left) for each in maps]).sum()
        for each in maps:
            each.apart.fill_(left)
        return None

    def settled(self, stage: str, student: Learner, config: Config) -> bool:
        """Whether the weights of every group have become one. The schedule sets when they do, and is never early."""
        spreads = (each.spread().item() for each in _maps(student))
        return config.constraint == "lagrangian" and all(spread < config.tolerance for spread in spreads)

    def end(self, finish: str, student: Learner, config: Config) -> None:
        """After the search, join the heads of groups; after the fusion, let one head stand for each."""
        if finish == "search":
            for (site, part), groups in _chosen(student, config).items():
                for role in part:
                    student.map(site, role).join(groups)
            return
        for each in _maps(student):
            each.hand_over()

    def trained(self, student: Learner, config: Config) -> Trained:
        """The plain heads, one for each group, and the query heads in the order of the groups of keys."""
        sites = student.shape.sites
        groups: dict[Map, Groups] = {(site, role): student.map(site, role).groups() for site in sites for role in "kv"}
        names = {"k": ("kv_heads", "groups")} | ({} if config.servable else {"v": ("value_heads", "value_groups")})
        found: dict[str, Any] = {}
        for role, (count, listed) in names.items():
            found[count] = PerSite.of({site: len(groups[site, role]) for site in sites}).spelled()
            found[listed] = {str(site): groups[site, role] for site in sites}
        return Trained(
            _with_groups(student.shape, groups),
            {site: _plain(student, site, groups[site, "k"], groups[site, "v"]) for site in sites},
            found,
        )


def _all(shape: Shape) -> dict[Site, int]:
    return {site: shape.sites[site].num_key_value_heads for site in shape.cached_sites}


def _maps(student: Learner) -> list[Any]:
    """The fused maps of keys and values."""
    return [student.map(site, role) for site in student.shape.sites for role in "kv"]


def _parts(config: Config) -> tuple[str, ...]:
    """The maps of a site that share their groups."""
    return ("kv",) if config.servable else ("k", "v")


def _heads(config: Config, shape: Shape, part: str) -> dict[Site, int]:
    """Heads to keep at each site. Of `auto`, before the search: as even as the budget allows."""
    asked = config.value_heads if part == "v" and config.value_heads is not None else config.kv_heads
    return budgets.asked(asked, config.budget, shape, where="dha")


def _chosen(student: Learner, config: Config) -> dict[Map, Groups]:
    """The groups of the maps of every site, by the distances of their heads; neighbours for `align`."""
    shape, parts = student.shape, _parts(config)
    heads = {(site, part): count for part in parts for site, count in _heads(config, shape, part).items()}
    if config.init == "align":
        return {(site, part): contiguous(_all(shape)[site], count) for (site, part), count in heads.items()}
    apart = {(site, part): sum(student.map(site, role).distances() for role in part).tolist() for site, part in heads}
    if config.kv_heads == AUTO:
        sizes = {
            ((site, part), count): len(part) * count * shape.sites[site].head_dim
            for site, part in heads
            for count in budgets.choices_of(shape, site)
        }
        heads = budgets.cheapest_of(
            sizes,
            lambda each, count: within(apart[each], grouped(apart[each], count)),
            budgets.room(config.budget or 1, shape),
        )
    return {each: grouped(apart[each], count) for each, count in heads.items()}


def _with_groups(shape: Shape, groups: Mapping[Map, Groups]) -> Shape:
    """The model with one key head and one value head for each group of heads."""
    sites = {}
    for site, attention in shape.sites.items():
        keys, values = groups[site, "k"], groups[site, "v"]
        value_heads = None
        if values != keys:
            read = {head: number for number, heads in enumerate(values) for head in heads}
            value_heads = tuple(read[head] for heads in keys for head in heads for _ in range(attention.query_group))
        sites[site] = replace(attention, num_key_value_heads=len(keys), value_heads=value_heads)
    return shape.with_sites(sites)


def _plain(student: Learner, site: Site, keys: Groups, values: Groups) -> Roles:
    """The roles of a site whose groups are handed over: heads of a group of keys follow one another."""
    attention = student.shape.sites[site]
    heads = attention.num_key_value_heads
    firsts = {role: [group[0] for group in groups] for role, groups in (("k", keys), ("v", values))}
    order = [head for group in keys for head in group]
    roles = {role: student.whole(site, role) for role in attention.roles()}
    for role, tensor in roles.items():
        if role in attention.head_roles:
            roles[role] = tensor.view(heads, -1, *tensor.shape[1:])[firsts[role[0]]].flatten(0, 1)
        elif role in ("q", "q_bias", "sinks"):
            roles[role] = tensor.view(heads, -1, *tensor.shape[1:])[order].flatten(0, 1)
    roles["o"] = roles["o"].view(len(roles["o"]), heads, -1)[:, order].flatten(1)
    return roles


METHOD = DHA()
