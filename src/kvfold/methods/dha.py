"""dha: decoupled-head attention, which learns how the heads of a layer become few.

A student starts as its teacher, with all heads. In training, each key head (and each value head) of a layer is a
weighted sum of the heads of its group, one weight for each coordinate (Chen et al. 2024, arXiv 2406.06567):

    W^(h) = sum_{j in group of h} omega_hj * W_j        omega starts at the identity: to the last bit the teacher

The method has three stages of uptraining, whose shares of the tokens are settings:

    search   the weights alone train, over all heads of a layer. Heads whose weights stay alike share a group; groups
             are of one size, with the smallest sum of distances `1/G sum_j (omega_hj - omega_h'j)^2` within them
    fusion   the weights of a group are drawn together: the loss has the term `lambda max(spread - t, 0)` of an
             augmented Lagrangian for each map, lambda rises by gradient ascent, and t falls from 1 to 0
    after    the mean of a group stands for its heads, and plain heads train on

`init align` starts from heads that are rotated towards one another (arXiv 2412.20677), which changes nothing that the
model computes and makes them alike before anything is learned. Groups are neighbours then: there is nothing to search.

Cached per token and layer: `2 G E` elements as converted, and `2 G' E` once uptraining has handed the heads over. The
result is grouped-query attention that engines load. Lossless at `G' = G`. It loses to `gqa`'s closed form and repair
where tokens are few (docs/methods/dha.md).

`kv_heads auto` spends a `budget` of bytes over layers, by the fusion loss of each layer at each number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.method import Limit, Method, Student, Trained, refuse
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import Answers, AttentionGram, InputGram, QueryGram, Question
from kvfold.contracts.runtimes import SEPARATE
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import GUIDED, Learner, Stage
from kvfold.errors import SettingError, choices
from kvfold.settings import check_range, setting
from kvfold.solve import budget as budgets
from kvfold.solve.head_groups import Groups, contiguous, grouped, within

if TYPE_CHECKING:
    from torch import Tensor

AUTO: Literal["auto"] = "auto"
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
        check_range(self, "dha", 0, 1, "search", "fusion")
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
        return ["the student keeps all heads until uptraining fuses them, and then loads as a student of gqa does"]

    def lossless(self, shape: Shape) -> Config:
        """Keep every head."""
        return Config(PerSite.of(_all(shape)))

    def example(self, shape: Shape) -> Config:
        """Half of the heads."""
        return Config(PerSite.of({site: max(1, heads // 2) for site, heads in _all(shape).items()}))

    # --- uptraining

    def final(self, config: Config, shape: Shape) -> Shape:
        """The model with fewer key/value heads. For `auto`: the budget spread evenly over layers."""
        return shape.with_heads(_heads(config, shape))

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

        left = max(0.0, 1 - share / WARM)
        maps = [student.map(site, role) for site in student.shape.sites for role in "kv"]
        if config.constraint == "lagrangian":
            return torch.stack([each.constraint(left) for each in maps]).sum()
        for each in maps:
            each.apart.fill_(left)
        return None

    def end(self, finish: str, student: Learner, config: Config) -> None:
        """After the search, join the heads of groups; after the fusion, let one head stand for each."""
        if finish == "search":
            for site, groups in _chosen(student, config).items():
                for role in "kv":
                    student.map(site, role).join(groups)
            return
        for site in student.shape.sites:
            for role in "kv":
                student.map(site, role).hand_over()

    def trained(self, student: Learner, config: Config) -> Trained:
        """The plain heads, one for each group, and the query heads in the order of the groups."""
        groups = {site: student.map(site, "k").groups() for site in student.shape.sites}
        counts = {site: len(heads) for site, heads in groups.items()}
        return Trained(
            student.shape.with_heads(counts),
            {site: _plain(student, site, heads) for site, heads in groups.items()},
            {
                "kv_heads": PerSite.of(counts).spelled(),
                "groups": {str(site): heads for site, heads in groups.items()},
            },
        )


def _all(shape: Shape) -> dict[Site, int]:
    return {site: shape.sites[site].num_key_value_heads for site in shape.cached_sites}


def _heads(config: Config, shape: Shape) -> dict[Site, int]:
    """Heads to keep at each site. Of `auto`, before the search: as even as the budget allows."""
    return budgets.asked(config.kv_heads, config.budget, shape, where="dha")


def _chosen(student: Learner, config: Config) -> dict[Site, Groups]:
    """The groups of every site: by the distances of its heads, for keys and values alike; neighbours for `align`."""
    shape = student.shape
    if config.init == "align":
        return {site: contiguous(_all(shape)[site], count) for site, count in _heads(config, shape).items()}
    apart = {site: sum(student.map(site, role).distances() for role in "kv").tolist() for site in shape.sites}
    heads = _heads(config, shape)
    if config.kv_heads == AUTO:
        heads = budgets.cheapest_mix(
            config.budget or 1, shape, lambda site, count: within(apart[site], grouped(apart[site], count))
        )
    return {site: grouped(apart[site], count) for site, count in heads.items()}


def _plain(student: Learner, site: Site, groups: Groups) -> Roles:
    """The roles of a site whose groups are handed over: heads of a group follow one another."""
    attention = student.shape.sites[site]
    heads = attention.num_key_value_heads
    firsts, order = [group[0] for group in groups], [head for group in groups for head in group]
    roles = {role: student.whole(site, role) for role in attention.roles()}
    for role, tensor in roles.items():
        if role in attention.head_roles:
            roles[role] = tensor.view(heads, -1, *tensor.shape[1:])[firsts].flatten(0, 1)
        elif role in ("q", "q_bias", "sinks"):
            roles[role] = tensor.view(heads, -1, *tensor.shape[1:])[order].flatten(0, 1)
    roles["o"] = roles["o"].view(len(roles["o"]), heads, -1)[:, order].flatten(1)
    return roles


METHOD = DHA()
