"""elitekv: RoPE kept where each head needs it, and one low-rank latent for all other keys and all values.

Zhou et al. 2025, arXiv 2503.01586. A key head rotates its planes by position; most of them do not need it. Of each head
`rope_chunks` planes stay rotated and are cached as they are; the others are left unrotated, and together with the
values of all heads become linear images of one latent of `latent_dim` numbers:

    k_g = [rotate(R_g x) | U_g c],   v_g = W_g c + b_g,   c = A x

    search   elite         the planes whose rotation the logits miss most (RoPElite, 3.2; `planes`)
             contribution  the planes that add most to a logit           (arXiv 2410.08703)
             uniform       spread evenly over the frequencies
    metric   outputs       errors of k in logits, of v behind o, on what attention reads      (ours)
             inputs        whitened by the inputs, K and V balanced   (arXiv 2407.21118, 2502.07864)
             weights       plain SVD of the weights                                         (the paper's)
    factor   joint         one latent for keys and values (J-LRD, 3.3)
             separate      one for each, side by side (S-LRD)

`uniform` and `weights` read weights alone; the others need the teacher to read a little text. Cached per token and
layer: `2 rope_chunks G + latent_dim` elements, and decoding reads them as they lie (`attention.latent`). A constant
part of unrotated keys moves all logits of a query alike, so biases of such keys are dropped; the values' mean and bias
become `b`. Lossless when all planes are kept and the latent is as wide as what it stands for, `min(D, G E)`.

`ratio` says what may be cached as a part of the root teacher's cache, in each layer as much. How a layer splits its
part between planes and latent is chosen by what either is reckoned to lose behind `o`; of splits that lose about as
little, the one with the narrower latent, which decodes faster. Without a text, and in other metrics, it is a quarter
for planes in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers, AttentionGram, InputGram, QueryGram, Question, Reckoned, SampledPairs
from kvfold.contracts.runtimes import with_latent
from kvfold.contracts.site import REPAIRABLE, Attention, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

Search = Literal["elite", "contribution", "uniform"]
Metric = Literal["outputs", "inputs", "weights"]
Factor = Literal["joint", "separate"]


@dataclass(frozen=True)
class Config:
    """What stays rotated, how wide the latent is, and what decides both."""

    ratio: float | None = field(
        default=None,
        metadata={"help": "Cache bytes, as a part of the root teacher's (0.25); chooses rope_chunks and latent_dim."},
    )
    rope_chunks: str | int | None = field(
        default=None,
        metadata={"help": "Planes (pairs of coordinates) of each key head that stay rotated: 4, or 4/4/2/3."},
    )
    latent_dim: str | int | None = field(
        default=None, metadata={"help": "Width of the latent of unrotated keys and values: 256, or layer by layer."}
    )
    search: Search = field(default="elite", metadata={"help": "Which planes; without --calibration: uniform."})
    metric: Metric = field(
        default="outputs", metadata={"help": "What an error of the latent costs; without --calibration: weights."}
    )
    factor: Factor = field(default="joint", metadata={"help": "One latent for keys and values, or one for each."})
    samples: int = field(default=2048, metadata={"help": "Tokens whose queries and keys are paired for --search."})

    def check(self, shape: Shape) -> None:
        """Refuse sources without planes or with normed keys, and splits that cannot be, naming what can."""
        for site, attention in shape.sites.items():
            _check_site(site, attention)
        heads = {attention.num_key_value_heads for attention in shape.sites.values()}
        if len(heads) > 1:
            raise SettingError(
                "layers differ in their key/value heads",
                where="elitekv",
                got=f"{min(heads)} to {max(heads)}",
                next="convert a checkpoint with one number for all layers",
            )
        if self.samples < 2:
            raise SettingError("samples must be at least 2", where="elitekv", got=self.samples)
        if self.ratio is not None:
            _check_ratio(self, shape)
            return
        if self.rope_chunks is None or self.latent_dim is None:
            missing = "rope_chunks" if self.rope_chunks is None else "latent_dim"
            raise SettingError(f"{missing} is not said", where="elitekv", next="add it, or say --ratio 0.25 instead")
        for site, (planes, width) in splits(self, shape).items():
            attention = shape.sites[site]
            for name, value, most in (
                ("rope_chunks", planes, planes_of(attention)),
                ("latent_dim", width, widest(attention, min(planes, planes_of(attention)))),
            ):
                if not 1 <= value <= most:
                    raise SettingError(f"{name} {value} cannot be at {site}", where="elitekv", allowed=f"1 to {most}")


def _check_site(site: Site, attention: Attention) -> None:
    problem = None
    if site.kind != "self":
        problem = "latents of heads are for decoders alone"
    elif attention.rope is None:
        problem = "keys are not rotated, so there are no planes to choose"
    elif attention.source is not None:
        problem = f"keys and values are those of layer {attention.source}"
    elif attention.norms != "none":
        problem = "keys are normed head by head, and no normed key is a linear image of a latent"
    elif attention.softcap is not None:
        problem = "logits are capped softly, and its attention has no cap"
    elif not attention.rope.half_split:
        problem = "planes are of neighbouring coordinates"
    if problem:
        raise SettingError(f"{site}: {problem}", where="elitekv", next="choose gqa")


# --- how much stays --------------------------------------------------------------------------------------------------


def planes_of(attention: Attention) -> int:
    """The rotary planes of a key head; none where keys are not rotated."""
    return attention.rope.dims // 2 if attention.rope else 0


def widest(attention: Attention, planes: int) -> int:
    """The latent that holds everything beside so many rotated planes."""
    free = attention.num_key_value_heads * (2 * attention.head_dim - 2 * planes)
    return min(attention.hidden_size, free)


def splits(config: Config, shape: Shape) -> dict[Site, tuple[int, int]]:
    """Rotated planes and latent width of each site; of a ratio, before anything is reckoned, alike in all layers.

    Raises SettingError when there are more or fewer numbers than layers.
    """
    sites = sorted(shape.sites)
    if config.ratio is not None:
        return {site: _alike(shape.sites[site], _part(config.ratio, shape)) for site in sites}
    chunks, widths = (
        _said(value, len(sites), name)
        for value, name in ((config.rope_chunks, "rope_chunks"), (config.latent_dim, "latent_dim"))
    )
    return dict(zip(sites, zip(chunks, widths, strict=True), strict=True))


def _said(value: str | int | None, layers: int, name: str) -> list[int]:
    """Read `4` or `4/4/2/3` as a number for each layer."""
    words = str(value).strip().split("/")
    if not all(word.isdecimal() for word in words):
        raise SettingError(f"cannot read {name}", where="elitekv", got=repr(value), allowed="a number, or 4/4/2/3")
    if len(words) not in (1, layers):
        raise SettingError(
            f"{name} has {len(words)} numbers for {layers} layers",
            where="elitekv",
            got=repr(value),
            next="give one for each layer, or one for all",
        )
    return [int(words[layer % len(words)]) for layer in range(layers)]


def _of(value: str | int | None, site: Site) -> int:
    """The number of one layer in what was resolved."""
    words = str(value).split("/")
    return int(words[site.layer % len(words)])


def _spelled(numbers: Sequence[int]) -> str | int:
    return numbers[0] if len(set(numbers)) == 1 else "/".join(map(str, numbers))


def _part(ratio: float, shape: Shape) -> int:
    """Elements of a token that a ratio leaves to each layer."""
    whole = shape.root_elements or grouped_cache(shape).elements(1, 1)
    return int(ratio * whole * (1 + 1e-12)) // len(shape.sites)


def _alike(attention: Attention, elements: int) -> tuple[int, int]:
    """A split of so many elements with a quarter of them rotated."""
    groups = attention.num_key_value_heads
    planes = min(max(1, round(elements / (8 * groups))), planes_of(attention))
    return planes, max(1, min(elements - 2 * planes * groups, widest(attention, planes)))


def _check_ratio(config: Config, shape: Shape) -> None:
    """Refuse a ratio beside what it chooses, one below a plane of each head, and one above the whole."""
    assert config.ratio is not None
    for name in ("rope_chunks", "latent_dim"):
        if getattr(config, name) is not None:
            raise SettingError(f"ratio {config.ratio:g} chooses {name}", where="elitekv", next="leave out one of them")
    whole = shape.root_elements or grouped_cache(shape).elements(1, 1)
    needed = max(2 * attention.num_key_value_heads + 1 for attention in shape.sites.values()) * len(shape.sites)
    if not needed / whole <= config.ratio <= 1:
        raise SettingError(
            "ratio cannot be met",
            where="elitekv",
            got=f"ratio {config.ratio:g}",
            allowed=f"{-(-needed * 10_000 // whole) / 10_000:g} (one plane of each head and a latent of 1) to 1",
        )


# --- the contract ----------------------------------------------------------------------------------------------------


def _numbers(attention: Attention) -> list[int]:
    """Numbers of rotated planes that are tried: each up to 4, then in steps of a third or a half, and all."""
    steps = [1, *(2**power * part for power in range(8) for part in (2, 3))]
    most = planes_of(attention)
    return sorted({number for number in steps if number < most} | {most})


def _reckons(config: Config) -> bool:
    """Is there anything to choose, and on what?"""
    return config.ratio is not None and config.metric == "outputs"


def _reckoned(config: Config, shape: Shape, answers: Answers) -> dict[Site, tuple[int, int]]:
    """The splits that lose least, each layer within its part of the ratio."""
    import torch

    from kvfold.solve.latent import best_split

    assert config.ratio is not None
    found, room = {}, _part(config.ratio, shape)
    for site in sorted(shape.sites):
        attention = shape.sites[site]
        numbers_C1 = torch.tensor(_numbers(attention))[:, None]
        most_C1 = torch.tensor([widest(attention, int(number)) for number in numbers_C1])[:, None]
        width_R = torch.arange(attention.hidden_size + 1)
        error_CR = answers[Reckoned(site)]["error_CR"]
        row, width = best_split(
            error_CR.masked_fill((width_R < 1) | (width_R > most_C1), torch.inf),
            2 * attention.num_key_value_heads * numbers_C1 + width_R,
            room,
        )
        found[site] = _numbers(attention)[row], width
    return found


class EliteKV(Method[Config]):
    """EliteKV: a few rotated planes of each key head, and one latent for the rest of keys and for values."""

    without_text: ClassVar = {"search": "uniform", "metric": "weights"}
    published: ClassVar = ({"search": "uniform", "metric": "weights"},)  # what others start from

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Ask for pairs of queries and keys to search by, and for the moments that the metric is made of."""
        asked: list[Question] = []
        for site in shape.sites:
            if config.search != "uniform" or _reckons(config):
                asked.append(SampledPairs(site, config.samples))
            if config.metric != "weights":
                asked.append(InputGram(site))
            if config.metric == "outputs":
                asked += [QueryGram(site), AttentionGram(site)]
            if _reckons(config):
                asked.append(Reckoned(site))
        return asked

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """The split of every layer; under a ratio, those with the least expected loss."""
        found = _reckoned(config, shape, answers) if _reckons(config) else splits(config, shape)
        chunks, widths = ([split[part] for split in found.values()] for part in (0, 1))
        return replace(config, ratio=None, rope_chunks=_spelled(chunks), latent_dim=_spelled(widths))

    def reckon(self, site: Site, tensors: SiteTensors, answers: Answers, config: Config) -> Mapping[str, Tensor]:
        """The expected loss of each split of a site: `error_CR` for C `_numbers` of planes and latents of 0 to D."""
        from kvfold.solve.latent import reckoned
        from kvfold.solve.shared_heads import moments_of

        sample, moments = answers[SampledPairs(site, config.samples)], moments_of(site, answers)
        attention, search = tensors.attention, config.search
        return {"error_CR": reckoned(attention, tensors.roles, search, _numbers(attention), sample, moments)}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """What a plan must say of splits that are not chosen yet."""
        if config.ratio is None:
            return ()
        return (
            f"ratio {config.ratio:g}: shown is a quarter of it for rotated planes, the same in all layers; how each "
            "layer splits its part is reckoned when it is converted, within the same bytes",
        )

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model with latent attention in every layer, an architecture of our own."""
        return Student(
            shape.with_sites(
                {site: with_latent(shape.sites[site], *split) for site, split in splits(config, shape).items()}
            )
        )

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Choose planes and factorise what is left of each site."""
        return self.fold(group, answers, config)[0]

    def fold(
        self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config
    ) -> tuple[Mapping[Site, Roles], Mapping[Site, Any]]:
        """Convert, and report for each site which planes its key heads keep and what logits and latent lose."""
        from kvfold.solve.latent import cut_site, survey  # loads torch: a plan is made without
        from kvfold.solve.shared_heads import moments_of

        converted: dict[Site, Roles] = {}
        told: dict[Site, dict[str, Any]] = {}
        for site, tensors in group.items():
            attention = tensors.attention
            kept, width = _of(config.rope_chunks, site), _of(config.latent_dim, site)
            sample = None if config.search == "uniform" else answers[SampledPairs(site, config.samples)]
            found = survey(attention, config.search, [kept], sample)
            roles, lost = cut_site(
                attention,
                tensors.roles,
                found.planes[kept],
                width,
                metric=config.metric,
                factor=config.factor,
                moments=moments_of(site, answers) if config.metric == "outputs" else None,
                gram_DD=answers[InputGram(site)]["gram_DD"] if config.metric == "inputs" else None,
            )
            converted[site] = roles
            told[site] = {"planes": found.planes[kept].tolist(), "logits": list(found.left.get(kept, ())), "lost": lost}
        return converted, told

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything where errors are weighted by outputs; published starts are left as published."""
        return REPAIRABLE if config.metric == "outputs" else ()

    def lossless(self, shape: Shape) -> Config:
        """Keep every plane, and a latent as wide as the values."""
        attention = next(iter(shape.sites.values()))
        planes = planes_of(attention)
        return Config(rope_chunks=planes, latent_dim=widest(attention, planes), search="uniform", metric="weights")

    def example(self, shape: Shape) -> Config:
        """One plane of each key head, and a latent of one head and a half."""
        return Config(rope_chunks=1, latent_dim=next(iter(shape.sites.values())).head_dim * 3 // 2)


METHOD = EliteKV()
