"""elitekv: RoPE kept where each head needs it, and one low-rank latent for all other keys and all values.

Zhou et al. 2025, arXiv 2503.01586. RoPE rotates each plane (pair of coordinates) of a key head by position, and most
planes do not need it. Of each head `rope_chunks` planes stay rotated and are cached as they are. The others are left
unrotated, and together with the values of all heads become linear maps of one latent of `latent_dim` numbers:

    k_g = [rotate(R_g x) | U_g c],   v_g = W_g c + b_g,   c = A x

    search   elite         the planes whose rotation the logits miss most (RoPElite, section 3.2)
             contribution  the planes that add most to a logit           (arXiv 2410.08703)
             uniform       spread evenly over the frequencies
    metric   outputs       errors of k in logits, of v behind o, on what attention reads      (ours)
             inputs        whitened by the inputs, K and V balanced   (arXiv 2407.21118, 2502.07864)
             weights       plain SVD of the weights                                         (the paper's)
    factor   joint         one latent for keys and values (J-LRD, section 3.3)
             separate      one for each, side by side (S-LRD)

`uniform` and `weights` read weights alone; the others read calibration text. Cached per token and layer:
`2 rope_chunks G + latent_dim` elements, which decoding reads as they are (`attention.latent`). A constant part of
unrotated keys shifts all logits of a query alike, so their biases are dropped; the mean and bias of the values become
`b`. Lossless when all planes are kept and the latent is as wide as the values it stands for, `min(D, G E)`. It loses
most where a layer's logits depend on position in every plane, and it needs keys without norms.

`ratio` sets the cache as a part of the root teacher's, the same for each layer. Each layer splits its part between
planes and latent by the least expected error behind `o`; among splits within a few percent of it, the narrowest latent
wins, because it decodes fastest. Without calibration text, and in other metrics, planes get a quarter in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from kvfold.contracts.cache import layer_elements
from kvfold.contracts.method import Folded, Limit, Method, Student, check_ratio, refuse, refuse_mixed_heads
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import Answers, AttentionGram, Computed, InputGram, QueryGram, Question, SampledPairs
from kvfold.contracts.site import REPAIRABLE, Attention, Roles, Shape, Site, SiteTensors
from kvfold.contracts.student_site import with_latent
from kvfold.errors import SettingError
from kvfold.settings import setting
from kvfold.solve import Factor, Metric, Search

if TYPE_CHECKING:
    from torch import Tensor

LIMITS: Sequence[Limit] = (
    ("only decoder-only models can have latents of heads", lambda site, _: site.kind != "self"),
    ("keys are not rotated, so there are no planes to choose", lambda _, attention: attention.rope is None),
    ("it reads the keys and values of another layer", lambda _, attention: attention.source is not None),
    (
        "keys are normed, and no normed key is a linear map of a latent",
        lambda _, attention: attention.norms != "none",
    ),
    ("logits have a soft cap, and attention over latents has none", lambda _, attention: attention.softcap is not None),
    (
        "planes are of neighbouring coordinates",
        lambda _, attention: attention.rope is not None and not attention.rope.half_split,
    ),
)


@dataclass(frozen=True)
class Config:
    """How many planes stay rotated, how wide the latent is, and how both are chosen."""

    ratio: float | None = setting(
        None, "Cache bytes as a fraction of the root teacher's, e.g. 0.25, instead of --rope-chunks and --latent-dim."
    )
    rope_chunks: PerSite | None = setting(
        None, "Rotated planes (pairs of coordinates) per key head, e.g. 4. By layer: 4/4/2/3. Default: from --ratio."
    )
    latent_dim: PerSite | None = setting(
        None, "Width of the latent of unrotated keys and values, e.g. 256. By layer: 256/128. Default: from --ratio."
    )
    search: Search = setting("elite", "How rotated planes are chosen. Without --calibration: uniform.")
    metric: Metric = setting("outputs", "How errors of the latent are weighed. Without --calibration: weights.")
    factor: Factor = setting("joint", "One latent for keys and values (joint), or one for each (separate).")
    samples: int = setting(2048, "Sampled tokens whose queries and keys --search compares.")

    def check(self, shape: Shape) -> None:
        """Refuse sources without planes or with normed keys, and splits that are out of range, with the range."""
        refuse(shape, "elitekv", LIMITS)
        refuse_mixed_heads(shape, "elitekv")
        if self.samples < 2:
            raise SettingError("samples must be at least 2", where="elitekv", got=self.samples)
        if self.ratio is not None:
            _check_ratio(self.ratio, self, shape)
            return
        for name, value in (("rope_chunks", self.rope_chunks), ("latent_dim", self.latent_dim)):
            if value is None:
                raise SettingError(f"{name} is missing", where="elitekv", next="add it, or set --ratio 0.25 instead")
        for site, (planes, width) in splits(self, shape).items():
            attention = shape.sites[site]
            for name, number, most in (
                ("rope_chunks", planes, planes_of(attention)),
                ("latent_dim", width, widest(attention, min(planes, planes_of(attention)))),
            ):
                if number > most:
                    raise SettingError(
                        f"{name} {number} is out of range at {site}", where="elitekv", allowed=f"1 to {most}"
                    )


def _check_ratio(ratio: float, config: Config, shape: Shape) -> None:
    """Refuse a ratio beside the settings that it chooses, one below a plane of each head, and one above the whole."""
    chosen = {"rope_chunks": config.rope_chunks, "latent_dim": config.latent_dim}
    needed = max(2 * attention.num_key_value_heads + 1 for attention in shape.sites.values()) * len(shape.sites)
    check_ratio(shape, "elitekv", ratio, chosen, needed, "one plane of each head and a latent of 1")


# --- planes and widths ------------------------------------------------------------------------------------------------


def planes_of(attention: Attention) -> int:
    """The rotary planes of a key head; 0 where keys are not rotated."""
    return attention.rope.dims // 2 if attention.rope else 0


def widest(attention: Attention, planes: int) -> int:
    """The latent width that holds everything beside `planes` rotated planes of each head."""
    free = attention.num_key_value_heads * (2 * attention.head_dim - 2 * planes)
    return min(attention.hidden_size, free)


def splits(config: Config, shape: Shape) -> dict[Site, tuple[int, int]]:
    """Rotated planes and latent width of each site. Of a ratio, unmeasured: the same in all layers."""
    if config.ratio is not None:
        room = layer_elements(config.ratio, shape)
        return {site: _quartered(shape.sites[site], room) for site in sorted(shape.sites)}
    assert config.rope_chunks is not None
    assert config.latent_dim is not None
    chunks = config.rope_chunks.by_site(shape.sites, "rope_chunks", "elitekv")
    widths = config.latent_dim.by_site(shape.sites, "latent_dim", "elitekv")
    return {site: (chunks[site], widths[site]) for site in sorted(shape.sites)}


def _quartered(attention: Attention, elements: int) -> tuple[int, int]:
    """A split of these elements with a quarter of them rotated."""
    groups = attention.num_key_value_heads
    planes = min(max(1, round(elements / (8 * groups))), planes_of(attention))
    return planes, max(1, min(elements - 2 * planes * groups, widest(attention, planes)))


def _candidates(attention: Attention) -> list[int]:
    """Numbers of rotated planes to try: each up to 4, then in steps of a third or a half, and all."""
    steps = [1, *(2**power * part for power in range(8) for part in (2, 3))]
    most = planes_of(attention)
    return sorted({number for number in steps if number < most} | {most})


def _optimises(config: Config) -> bool:
    """Whether each layer's split is chosen by its expected error."""
    return config.ratio is not None and config.metric == "outputs"


def _optimal(config: Config, shape: Shape, answers: Answers) -> dict[Site, tuple[int, int]]:
    """The splits of the least expected error, each layer within its part of the ratio."""
    import torch  # a plan works without

    from kvfold.solve.latent import best_split

    assert config.ratio is not None
    found, room = {}, layer_elements(config.ratio, shape)
    for site in sorted(shape.sites):
        attention = shape.sites[site]
        candidates = _candidates(attention)
        numbers_C1 = torch.tensor(candidates)[:, None]
        most_C1 = torch.tensor([widest(attention, number) for number in candidates])[:, None]
        width_R = torch.arange(attention.hidden_size + 1)
        row, width = best_split(
            answers[Computed(site)]["error_CR"].masked_fill((width_R < 1) | (width_R > most_C1), torch.inf),
            2 * attention.num_key_value_heads * numbers_C1 + width_R,
            room,
        )
        found[site] = candidates[row], width
    return found


class EliteKV(Method[Config]):
    """EliteKV: a few rotated planes of each key head, and one latent for the rest of keys and for values."""

    without_text: ClassVar = {"search": "uniform", "metric": "weights"}
    published: ClassVar = ({"search": "uniform", "metric": "weights"},)

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Pairs of queries and keys for the search, and the moments of the metric."""
        questions: list[Question] = []
        for site in shape.sites:
            if config.search != "uniform" or _optimises(config):
                questions.append(SampledPairs(site, config.samples))
            if config.metric != "weights":
                questions.append(InputGram(site))
            if config.metric == "outputs":
                questions += [QueryGram(site), AttentionGram(site)]
            if _optimises(config):
                questions.append(Computed(site))
        return questions

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the split of every layer; under a ratio, those of the least expected error."""
        found = _optimal(config, shape, answers) if _optimises(config) else splits(config, shape)
        chunks, widths = (PerSite.of({site: split[part] for site, split in found.items()}) for part in (0, 1))
        return replace(config, ratio=None, rope_chunks=chunks, latent_dim=widths)

    def compute(self, site: Site, tensors: SiteTensors, answers: Answers, config: Config) -> Mapping[str, Tensor]:
        """The expected error of each split of a site: `error_CR`, C candidates for planes, R from 0 to D."""
        from kvfold.solve.latent import split_errors
        from kvfold.solve.shared_heads import moments_of

        sample, moments = answers[SampledPairs(site, config.samples)], moments_of(site, answers)
        attention = tensors.attention
        errors_CR = split_errors(attention, tensors.roles, config.search, _candidates(attention), sample, moments)
        return {"error_CR": errors_CR}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """Warn of splits that are not chosen yet."""
        if config.ratio is None:
            return ()
        return (
            f"ratio {config.ratio:g}: the plan gives rotated planes a quarter of it in all layers; the conversion "
            "chooses how each layer splits its part, within the same bytes",
        )

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model with latent attention in every layer, an architecture of kvfold's own."""
        latents = {site: with_latent(shape.sites[site], *split) for site, split in splits(config, shape).items()}
        return Student(shape.with_sites(latents))

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Folded:
        """Choose planes and factorise the rest of each site.

        Measurements of each site: the planes of its key heads, and what the logits and the latent lose.
        """
        from kvfold.solve.latent import cut_site, survey  # loads torch: a plan works without
        from kvfold.solve.shared_heads import moments_of

        assert config.rope_chunks is not None
        assert config.latent_dim is not None
        converted: dict[Site, Roles] = {}
        measured: dict[Site, dict[str, Any]] = {}
        for site, tensors in group.items():
            kept = config.rope_chunks.at(site)
            sample = None if config.search == "uniform" else answers[SampledPairs(site, config.samples)]
            found = survey(tensors.attention, config.search, [kept], sample)
            planes_GK = found.planes[kept]
            converted[site], lost = cut_site(
                tensors.attention,
                tensors.roles,
                planes_GK,
                config.latent_dim.at(site),
                metric=config.metric,
                factor=config.factor,
                moments=moments_of(site, answers) if config.metric == "outputs" else None,
                gram_DD=answers[InputGram(site)]["gram_DD"] if config.metric == "inputs" else None,
            )
            measured[site] = {"planes": planes_GK.tolist(), "logits": list(found.left.get(kept, ())), "lost": lost}
        return converted, measured

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything where errors are weighed by outputs; published starts are left as published."""
        return REPAIRABLE if config.metric == "outputs" else ()

    def lossless(self, shape: Shape) -> Config:
        """Every plane, and a latent as wide as the values."""
        attention = next(iter(shape.sites.values()))
        planes = planes_of(attention)
        chunks, width = (PerSite.of(dict.fromkeys(shape.sites, each)) for each in (planes, widest(attention, planes)))
        return Config(None, chunks, width, search="uniform", metric="weights")

    def example(self, shape: Shape) -> Config:
        """One plane of each key head, and a latent of one head and a half."""
        width = next(iter(shape.sites.values())).head_dim * 3 // 2
        return Config(None, PerSite.parse(1), PerSite.parse(width))


METHOD = EliteKV()
