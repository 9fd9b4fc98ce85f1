"""Keys and values of one layer for several layers, in closed form, from second moments alone.

Layer j makes its heads of its own input, `y_j = A_j x_j`. With shared keys and values they are reconstructed from heads
`u = S x_i` of the owner's input, in three steps, each optimal given those before it:

    match     the head of the owner that each head of layer j reads: an assignment, by explained variance
    regress   y_j ~ B_j x_i,  B_j = A_j E[x_j x_i^T] E[x_i x_i^T]^-1: the part of y_j that the owner's input explains
    merge     B_j x_i ~ L_j S x_i for all matched heads, as heads of one layer are merged (`solve.shared_heads`)

Regression and merge together solve reduced-rank regression (Izenman 1975): the residual of the first does not depend on
the second. `L_j` is folded into q and o of layer j, the owner's own queries included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve.linalg import LEAST, ridge
from kvfold.solve.rope import pairs
from kvfold.solve.shared_heads import KeyLifts, Maps, as_first, plane_power, shared_key, shared_value

DAMPING = 1e-7  # of the mean moment of the owner's input: far below any useful direction, above float32's noise
ROUNDS = 4  # of matching and merging, at most


@dataclass(frozen=True)
class Reader:
    """One layer of a group: its shape and roles, `E[x x^T]` and `E[x]` of its input x, `E[x_owner x^T]`, its queries.

    `cross_DD` has the owner's input on its first axis; for the owner itself it equals `gram_DD`.
    """

    attention: Attention
    roles: Roles
    gram_DD: Tensor
    mean_D: Tensor
    cross_DD: Tensor
    query_HEE: Tensor


@dataclass(frozen=True)
class Shared:
    """The new roles of every layer of a group, float64, and the lost part of their weighted second moments.

    `queries` are the query heads of each layer in their new order, as numbers of the source's heads. `lost` is the sum
    of the parts of keys and of values; `heads` is the larger of both, by head of the owner.
    """

    roles: list[Roles]
    queries: list[list[int]]
    lost: float
    heads: list[float]


def share(readers: Sequence[Reader], damping: float = DAMPING) -> Shared:
    """Make the first of these layers the owner of the keys and values of all: pure, float64.

    Layers may differ in their key/value heads; the owner's number is kept. A norm between projection and rotation
    removes the scale of keys: they are matched by phases, and the ratio of the norms' weights goes into the consumers'
    query norms.
    """
    heads = readers[0].attention.num_key_value_heads
    sides = [_Side(reader, readers[0], damping) for reader in readers]
    own = sides[0].key.rows_HED, sides[0].value.rows_HED
    slots: list[list[int]] = []
    merged: list[_Head] = []
    for _ in range(ROUNDS):
        before, slots = slots, [list(range(heads)), *(side.match(*own) for side in sides[1:])]
        if slots == before:
            break
        merged = [_merge(sides, slots, head) for head in range(heads)]
        own = torch.stack([each.key_ED for each in merged]), torch.stack([each.value_ED for each in merged])
    new = [side.fold(number, units, merged) for number, (side, units) in enumerate(zip(sides, slots, strict=True))]
    for role, rows_GED, biased in zip("kv", own, (sides[0].key.biased, sides[0].value.biased), strict=True):
        Maps(rows_GED, biased).put(new[0], role)
    queries = [
        [unit * side.readers + head for unit in units for head in range(side.readers)]
        for side, units in zip(sides, slots, strict=True)
    ]
    whole_G2 = torch.tensor([each.whole for each in merged], dtype=torch.float64)
    lost_G2 = torch.tensor([each.lost for each in merged], dtype=torch.float64)
    by_head_G2 = (lost_G2 / whole_G2.clamp_min(LEAST)).clamp(0, 1)
    lost_2 = (lost_G2.sum(0) / whole_G2.sum(0).clamp_min(LEAST)).clamp(0, 1)
    return Shared(new, queries, float(lost_2.sum()), by_head_G2.amax(1).tolist())


@dataclass(frozen=True)
class _Head:
    """One head of the owner: its maps, the lifts of its readers `(layer of the group, slot)`, and their losses."""

    key_ED: Tensor
    value_ED: Tensor
    readers: Mapping[tuple[int, int], int]
    lifts: KeyLifts
    lift_JEE: Tensor
    whole: tuple[float, float]  # of keys and values
    lost: tuple[float, float]


def _merge(sides: Sequence[_Side], slots: Sequence[Sequence[int]], head: int) -> _Head:
    """Merge all heads that read one head of the owner."""
    found = []
    for number, (side, units) in enumerate(zip(sides, slots, strict=True)):
        found += [(number, slot, side, unit) for slot, unit in enumerate(units) if side.read_by(slot) == head]
    grams = sides[0].grams
    keys_JED, values_JED = (
        torch.stack([side.regressed[role][side.head(unit)] for *_, side, unit in found]) for role in "kv"
    )
    looks_JEE, seen_JEE = (torch.stack([side.metric(role, unit) for *_, side, unit in found]) for role in "kv")
    key_ED, lifts, lost_key = shared_key(keys_JED, looks_JEE, grams["k"], sides[0].reader.attention, "fit")
    if sides[0].reader.attention.norms != "none":
        key_ED, lifts = as_first(key_ED, lifts)
    merged = shared_value(values_JED, seen_JEE, grams["v"], "fit")
    wholes = [sum(side.weighed(role, unit, side.moments[role]) for *_, side, unit in found) for role in "kv"]
    parts = [sum(side.weighed(role, unit, side.explained[role]) for *_, side, unit in found) for role in "kv"]
    return _Head(
        key_ED,
        merged.shared_RD,
        {(number, slot): place for place, (number, slot, *_) in enumerate(found)},
        lifts,
        merged.lift_JER,
        (wholes[0], wholes[1]),
        (wholes[0] - parts[0] * (1 - lost_key), wholes[1] - parts[1] * (1 - merged.lost)),
    )


class _Side:
    """One layer beside its owner. A unit is a key/value head, or a part of its queries, that moves as a whole.

    If layers differ in their heads, both divide into whole units.
    """

    def __init__(self, reader: Reader, owner: Reader, damping: float) -> None:
        self.reader, self.owner, attention = reader, owner, reader.attention
        self.roles = {role: tensor.double() for role, tensor in reader.roles.items()}
        self.key, self.value, self.query = (Maps.of(self.roles, role, attention) for role in "kvq")
        self.output_DHE = self.roles["o"].view(attention.hidden_size, attention.num_attention_heads, -1)
        self.units = math.lcm(attention.num_key_value_heads, owner.attention.num_key_value_heads)
        self.readers = attention.num_attention_heads // self.units
        self.grams: dict[str, Tensor] = {}  # of the owner's input, followed by a 1 if the maps have biases
        self.regressed: dict[str, Tensor] = {}  # the layer's heads as maps of the owner's input, (H, E, D)
        self.crossed: dict[str, Tensor] = {}  # their moments with the owner's input, (H, E, D)
        self.moments: dict[str, Tensor] = {}  # their own moments, (H, E, E)
        self.explained: dict[str, Tensor] = {}  # those of the part that the owner's input explains
        for role, each in (("k", self.key), ("v", self.value)):
            rows_HED, mine_D, theirs_D = each.rows_HED, reader.mean_D, owner.mean_D
            gram_DD = each.with_one(owner.gram_DD, theirs_D, theirs_D)
            own_DD = each.with_one(reader.gram_DD, mine_D, mine_D)
            cross_DD = each.with_one(reader.cross_DD, theirs_D, mine_D)
            if reader is owner:
                regressed_HED = rows_HED
            else:
                # damped towards the identity: directions that never occur in the owner's input count as equal in both
                regressed_HED = rows_HED + rows_HED @ ridge(gram_DD, cross_DD - gram_DD, damping).T
            self.grams[role], self.regressed[role], self.crossed[role] = gram_DD, regressed_HED, rows_HED @ cross_DD.T
            self.moments[role] = rows_HED @ own_DD @ rows_HED.mT
            self.explained[role] = regressed_HED @ gram_DD @ regressed_HED.mT

    def head(self, unit: int) -> int:
        """The key/value head that a unit reads in the source."""
        return unit * self.reader.attention.num_key_value_heads // self.units

    def queries(self, unit: int) -> slice:
        """The query heads of a unit in the source."""
        return slice(unit * self.readers, (unit + 1) * self.readers)

    def metric(self, role: str, unit: int) -> Tensor:
        """The weights of the directions of a head: moments of its queries, or `o^T o` of its readers, `(E, E)`."""
        if role == "k":
            return self.reader.query_HEE[self.queries(unit)].sum(0)
        output_DRE = self.output_DHE[:, self.queries(unit)]
        return torch.einsum("dre,drf->ef", output_DRE, output_DRE)

    def weighed(self, role: str, unit: int, moments_HEE: Tensor) -> float:
        """The second moment of a unit's head under its metric; for keys under RoPE, plane by plane."""
        metric_EE, moment_EE = self.metric(role, unit), moments_HEE[self.head(unit)]
        rope = self.reader.attention.rope
        if role == "v" or rope is None:
            return float((metric_EE * moment_EE).sum())
        turned = plane_power(moment_EE.diagonal()[None], rope) * plane_power(metric_EE.diagonal()[None], rope)
        free = slice(rope.dims, None)
        return float(turned.sum()) + float((metric_EE[free, free] * moment_EE[free, free]).sum())

    def match(self, keys_GED: Tensor, values_GED: Tensor) -> list[int]:
        """The unit in each slot, slots of one head of the owner side by side: the assignment of the most variance."""
        from scipy.optimize import linear_sum_assignment

        rope, gain_UG = self.reader.attention.rope, torch.zeros(self.units, len(keys_GED), dtype=torch.float64)
        rotated = rope.dims if rope else 0
        own = {role: maps @ self.grams[role] @ maps.mT for role, maps in (("k", keys_GED), ("v", values_GED))}
        for unit in range(self.units):
            head = self.head(unit)
            key_GEE, value_GEE = keys_GED @ self.crossed["k"][head].mT, values_GED @ self.crossed["v"][head].mT
            keys_G = _read_off(key_GEE, own["k"], self.metric("k", unit), slice(rotated, None))
            if rope:
                looks_P = plane_power(self.metric("k", unit).diagonal()[None], rope)[0]
                keys_G = keys_G + _read_off_planes(key_GEE, own["k"], looks_P, rope)
            values_G = _read_off(value_GEE, own["v"], self.metric("v", unit), slice(0, None))
            wholes = [max(self.weighed(role, unit, self.moments[role]), LEAST) for role in "kv"]
            gain_UG[unit] = keys_G / wholes[0] + values_G / wholes[1]
        places = self.units // len(keys_GED)
        chosen_U = linear_sum_assignment(gain_UG.repeat_interleave(places, 1).numpy(), maximize=True)[1]
        return [int(unit) for unit in torch.as_tensor(chosen_U).argsort()]

    def read_by(self, slot: int) -> int:
        """The owner's head that a slot reads: slots of one head lie side by side."""
        return slot * self.owner.attention.num_key_value_heads // self.units

    def fold(self, number: int, units: Sequence[int], merged: Sequence[_Head]) -> Roles:
        """The layer's roles: its units in their slots, with the lifts folded into q and o."""
        queries, outputs = [], []
        for slot, unit in enumerate(units):
            head = merged[self.read_by(slot)]
            place = head.readers[number, slot]
            rows_RED = self.query.rows_HED[self.queries(unit)].clone()
            head.lifts.fold(place, rows_RED)
            queries.append(rows_RED)
            outputs.append(self.output_DHE[:, self.queries(unit)] @ head.lift_JEE[place])
        new = dict(self.roles)
        Maps(torch.cat(queries), self.query.biased).put(new, "q")
        new["o"] = torch.cat(outputs, dim=1).flatten(1)
        if "sinks" in new:
            new["sinks"] = torch.cat([self.roles["sinks"][self.queries(unit)] for unit in units])
        if number:
            if "k_norm" in new:
                offset = self.reader.attention.norm_offset
                new["q_norm"] = (new["q_norm"] + offset) * self._norm_ratio() - offset
            new = {role: tensor for role, tensor in new.items() if role[0] not in "kv"}
        return new

    def _norm_ratio(self) -> Tensor:
        """The weights of the layer's key norm over the owner's, `(E,)`: one number for each plane."""
        offset, rope = self.reader.attention.norm_offset, self.reader.attention.rope
        mine_E, theirs_E = (roles["k_norm"].double() + offset for roles in (self.roles, self.owner.roles))
        ratio_E = mine_E / theirs_E
        if rope:
            both_E, own_E = mine_E * theirs_E, theirs_E.square()
            real, imaginary = pairs(rope)
            turned = (both_E[real] + both_E[imaginary]) / (own_E[real] + own_E[imaginary])
            ratio_E[real] = ratio_E[imaginary] = turned
        return ratio_E


def _read_off(cross_GEE: Tensor, own_GEE: Tensor, metric_EE: Tensor, rows: slice) -> Tensor:
    """The weighted moment of a head that the best matrix reconstructs from each of the owner's, `(G,)`, on `rows`.

    `cross_GEE` has the owner's heads on its first axis of width E.
    """
    cross_GEE, own_GEE = cross_GEE[:, rows, rows], own_GEE[:, rows, rows]
    if not cross_GEE.shape[-1]:
        return cross_GEE.new_zeros(len(cross_GEE))
    kept_GEE = cross_GEE.mT @ ridge(own_GEE, cross_GEE, DAMPING)
    return (metric_EE[rows, rows] * kept_GEE).sum((-2, -1))


def _read_off_planes(cross_GEE: Tensor, own_GEE: Tensor, looks_P: Tensor, rope: Rope) -> Tensor:
    """The same for the best complex number of each plane."""
    real, imaginary = pairs(rope)

    def parts(first: slice, second: slice) -> Tensor:
        return cross_GEE[:, first, second].diagonal(dim1=1, dim2=2)

    along_GP = parts(real, real) + parts(imaginary, imaginary)
    across_GP = parts(real, imaginary) - parts(imaginary, real)
    power_GP = plane_power(own_GEE.diagonal(dim1=1, dim2=2), rope)
    return (looks_P * (along_GP.square() + across_GP.square()) / power_GP.clamp_min(LEAST)).sum(-1)
