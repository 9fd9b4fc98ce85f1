"""crosslatent: the cross-attentions of all layers read one latent of the encoder's output, cached once.

Every cross-attention of an encoder-decoder makes its keys and values of the encoder's output x, and rotates nothing by
position. So x, or a latent c of it, is all that needs to be cached, once for all layers. Key/value head g of layer l:

    c = A x,      k_lg = U_lg c,      v_lg = W_lg c + b_lg
    logit_h = (q_h U_lg) . c,         o_h = W_lg (softmax(logit_h) c) + b_lg

`U` is absorbed into the query and `W` into the output, so decoding never writes keys and values out (the absorbed form
of arXiv 2405.04434, section 2.1, over layers and not only over heads). Decoder self-attention stays as it is; `gqa` may
fold it first.

Cached per encoder token: `cross_latent_dim` elements in all, where every layer had `2 G E`. Without a width the latent
is the encoder's output itself: lossless, with the teacher's own tensors. A narrower one is the best latent for keys and
values of all layers jointly, in closed form (`kvfold.solve.encoder_latent`), by

    metric  outputs  errors of keys in logits, of values behind `o`, on what attention reads
            inputs   whitened by the inputs, K and V balanced
            weights  plain SVD of the keys and values of all layers; needs no text

It saves memory more than reads: every layer reads the whole latent, `L R` elements per token where there were
`2 L G E`, and multiplies each with `2 R` numbers per head where there were `2 E`. It loses speed where the latent is
wide and the heads are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass

from kvfold.contracts.method import Folded, Limit, Method, Student, refuse
from kvfold.contracts.requests import Answers, AttentionGram, InputGram, QueryGram, Question, Request
from kvfold.contracts.site import Shape, Site, SiteTensors
from kvfold.contracts.student_site import with_encoder_latent
from kvfold.errors import SettingError
from kvfold.settings import setting
from kvfold.solve import Metric

LIMITS: Sequence[Limit] = (
    (
        "keys are no linear maps of a latent",
        lambda site, attention: site.kind == "cross" and bool(attention.rope or attention.norms != "none"),
    ),
)


@dataclass(frozen=True)
class Config:
    """How wide the latent is, and what an error of it costs."""

    cross_latent_dim: int | None = setting(
        None, "Width of the latent, e.g. 512. Default: that of the encoder's output, which is lossless."
    )
    metric: Metric = setting("outputs", "How errors of the latent are weighed. Without --calibration: weights.")

    def check(self, shape: Shape) -> None:
        """Refuse models without cross-attention, keys that are no linear maps, and latents that save nothing."""
        sites = shape.crossed
        if not sites:
            raise SettingError(
                "there is no cross-attention whose cache layers could share",
                where="crosslatent",
                got=f"family {shape.family}",
                next="choose elitekv",
            )
        refuse(shape, "crosslatent", LIMITS)
        most = min(read_width(shape), sum(shape.sites[site].cached_elements for site in sites) - 1)
        width = width_of(self, shape)
        if not 1 <= width <= most:
            raise SettingError(
                "cross_latent_dim is out of range",
                where="crosslatent",
                got=width,
                allowed=f"1 to {most:,}: at most the width of its source, and less than all layers cache per token",
            )


def read_width(shape: Shape) -> int:
    """The width of the encoder's output."""
    return shape.sites[shape.crossed[0]].input_width


def width_of(config: Config, shape: Shape) -> int:
    """The width of the latent; without a setting, that of the encoder's output."""
    return read_width(shape) if config.cross_latent_dim is None else config.cross_latent_dim


class CrossLatent(Method[Config]):
    """One latent of the encoder's output, cached once for all cross-attentions."""

    without_text: ClassVar = {"metric": "weights"}

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Moments of the encoder's output, and of how each layer reads it, for a latent that is narrower."""
        if width_of(config, shape) == read_width(shape) or config.metric == "weights":
            return ()
        sites = shape.crossed
        reads: list[Request] = [request(site) for site in sites for request in (QueryGram, AttentionGram)]
        return [InputGram(sites[0]), *(reads if config.metric == "outputs" else ())]  # all have the input of the first

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write the width out. At that of the encoder's output nothing is fitted, in no metric."""
        width = width_of(config, shape)
        return Config(width, "weights" if width == read_width(shape) else config.metric)

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """How much is read and computed, for what is held."""
        width, sites = width_of(config, shape), [shape.sites[site] for site in shape.crossed]
        held, read = sum(site.cached_elements for site in sites), len(sites) * width
        more = width / sites[0].head_dim
        return (
            f"every layer reads the whole latent: per encoder token, {width:,} numbers are held instead of "
            f"{held:,} ({held / width:.3g}x fewer), {read:,} are read in a step ({held / read:.2g}x fewer), and "
            f"cross-attention computes {more:.3g}x as much on them; a narrower latent gains in all three",
        )

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """All cross-attentions together."""
        return [tuple(shape.crossed)]

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model whose cross-attentions read one latent, an architecture of kvfold's own."""
        width = width_of(config, shape)
        first = shape.crossed[0]
        changed = {
            site: with_encoder_latent(shape.sites[site], width, None if site == first else first.layer)
            for site in shape.crossed
        }
        return Student(shape.with_sites(changed))

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Folded:
        """Keep every tensor as it is, or make keys and values of all layers from one latent.

        Measurements of each site: the parts of its keys and values, as the metric weighs them, that the latent loses.
        """
        sites = sorted(group)
        read = group[sites[0]].attention.input_width
        width = config.cross_latent_dim or read
        if width == read:
            return {site: tensors.roles for site, tensors in group.items()}, {}
        from kvfold.solve.encoder_latent import CrossAttention, fit_latent  # loads torch: a plan works without
        from kvfold.solve.shared_heads import moments_of

        def layer(site: Site) -> CrossAttention:
            tensors, moments = group[site], None
            if config.metric == "outputs":
                moments = moments_of(site, {InputGram(site): answers[InputGram(sites[0])], **answers})
            return CrossAttention(tensors.attention, tensors.roles, moments)

        seen = None if config.metric == "weights" else answers[InputGram(sites[0])]
        moments = None if seen is None else (seen["gram_DD"], seen["mean_D"])
        made = fit_latent([layer(site) for site in sites], width, moments)
        converted = dict(zip(sites, made.roles, strict=True))
        converted[sites[0]] = {**converted[sites[0]], "kv_down": made.down_RD}
        lost = zip(sites, made.lost, strict=True)
        return converted, {site: {"lost": {"keys": keys, "values": values}} for site, (keys, values) in lost}

    def lossless(self, shape: Shape) -> Config:
        """The encoder's output itself."""
        return Config(metric="weights")

    def example(self, shape: Shape) -> Config:
        """A latent of half the width of the encoder's output."""
        return Config(cross_latent_dim=read_width(shape) // 2)


METHOD = CrossLatent()
