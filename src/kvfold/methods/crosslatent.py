"""crosslatent: the cross-attentions of all layers read one latent of the encoder's output, cached once.

Every cross-attention of an encoder-decoder makes its keys and values of the same thing, what the encoder put out, and
nothing turns them by position. So that output x, or a latent c of it, is all that needs to be cached, once for all
layers; key/value head g of layer l reads

    c = A x,      k_lg = U_lg c,      v_lg = W_lg c + b_lg
    logit_h = (q_h U_lg) . c,         o_h = W_lg (softmax(logit_h) c) + b_lg

Cached per token of the encoder's: `cross_latent_dim` elements in all, where every layer had `2 G E`. What `U` and `W`
say is absorbed into the query and into the answer, so keys and values are never written out while a token is decoded
(the absorbed form of arXiv 2405.04434, section 2.1, over layers and not only over heads). Decoder self-attention stays
as it is; `gqa` may fold it first.

Where no width is said it is the model's, and c the encoder's output itself: lossless, with the teacher's own tensors.
Less is the best latent for keys and values of all layers jointly, in closed form (`crossed`), by

    metric  outputs  errors of keys in logits, of values behind `o`, on what attention reads
            inputs   whitened by the inputs, K and V balanced
            weights  plain SVD of the keys and values of all layers; needs no text

It saves room, and reads less than room: every layer reads the whole latent, `L R` elements of a token where there were
`2 L G E`, and multiplies each with `2 R` numbers a head where there were `2 E`. A narrow latent makes up for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers, AttentionGram, InputGram, QueryGram, Question, Request
from kvfold.contracts.runtimes import with_encoder_latent
from kvfold.contracts.site import Attention, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError

if TYPE_CHECKING:
    pass

Metric = Literal["outputs", "inputs", "weights"]


@dataclass(frozen=True)
class Config:
    """How wide the latent is, and what an error of it costs."""

    cross_latent_dim: int | None = field(
        default=None,
        metadata={"help": "Width of the latent of what an encoder put out (512); the model's own, which is exact."},
    )
    metric: Metric = field(
        default="outputs", metadata={"help": "What an error of the latent costs; without --calibration: weights."}
    )

    def check(self, shape: Shape) -> None:
        """Refuse models without cross-attention, keys that are no linear images, and latents that save nothing."""
        sites = crossed(shape)
        if not sites:
            raise SettingError(
                "there is no cross-attention whose cache layers could share",
                where="crosslatent",
                got=f"family {shape.family}",
                next="choose elitekv",
            )
        for site in sites:
            attention = shape.sites[site]
            if attention.rope or attention.norms != "none":
                raise SettingError(f"keys of {site} are no linear images of a latent", where="crosslatent")
        most = min(read_width(shape), sum(map(kept, map(shape.sites.__getitem__, sites))) - 1)
        if not 1 <= width_of(self, shape) <= most:
            raise SettingError(
                "cross_latent_dim cannot be",
                where="crosslatent",
                got=width_of(self, shape),
                allowed=f"1 to {most:,}: not wider than its source, nor than what all layers cache of a token now",
            )


def crossed(shape: Shape) -> list[Site]:
    """The cross-attentions, from the first layer on."""
    return sorted(site for site in shape.sites if site.kind == "cross")


def kept(attention: Attention) -> int:
    """Elements of a token that a site caches."""
    return sum(attention.cached.values())


def read_width(shape: Shape) -> int:
    """The width of the encoder's output."""
    return shape.sites[crossed(shape)[0]].input_width


def width_of(config: Config, shape: Shape) -> int:
    """The width of the latent: what was said, or that of the encoder's output."""
    return read_width(shape) if config.cross_latent_dim is None else config.cross_latent_dim


# --- the contract ----------------------------------------------------------------------------------------------------


class CrossLatent(Method[Config]):
    """One latent of the encoder's output, cached once for all cross-attentions."""

    without_text: ClassVar = {"metric": "weights"}

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Ask for moments of the encoder's output, and of how each layer reads it, where something is to be lost."""
        if width_of(config, shape) == read_width(shape) or config.metric == "weights":
            return ()
        sites = crossed(shape)
        if config.metric == "inputs":
            return [InputGram(sites[0])]
        reads: list[Request] = [request(site) for site in sites for request in (QueryGram, AttentionGram)]
        return [InputGram(sites[0]), *reads]  # the input of one is that of all

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write the width out; at that of the encoder's output nothing is fitted, in no metric."""
        width = width_of(config, shape)
        return Config(width, "weights" if width == read_width(shape) else config.metric)

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """What a plan must say: how much is read, and how much is computed, for what is held."""
        width, sites = width_of(config, shape), [shape.sites[site] for site in crossed(shape)]
        held, read = sum(map(kept, sites)), len(sites) * width
        more = width / sites[0].head_dim
        return (
            f"every layer reads the whole latent: of a token of the encoder's {width:,} numbers are held instead of "
            f"{held:,} ({held / width:.3g}x fewer), {read:,} are read in a step ({held / read:.2g}x fewer), and "
            f"cross-attention computes {more:.3g}x as much on them; a narrower latent gains in all three",
        )

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Take all cross-attentions together."""
        return [tuple(crossed(shape))]

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model whose cross-attentions read one latent, an architecture of our own."""
        width = width_of(config, shape)
        changed = {site: with_encoder_latent(shape.sites[site], width, site.layer) for site in crossed(shape)}
        return Student(shape.with_sites(changed))

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Leave every tensor as it is, or read keys and values of all layers off one latent."""
        return self.fold(group, answers, config)[0]

    def fold(
        self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config
    ) -> tuple[Mapping[Site, Roles], Mapping[Site, Any]]:
        """Convert, and say of each layer what parts of its keys and values, as they are weighed, the latent loses."""
        sites = sorted(group)
        read = group[sites[0]].attention.input_width
        width = config.cross_latent_dim or read
        if width == read:
            return {site: tensors.roles for site, tensors in group.items()}, {}
        from kvfold.solve.encoder_latent import Reader, share  # loads torch: a plan is made without
        from kvfold.solve.shared_heads import moments_of

        def reader(site: Site) -> Reader:
            tensors, moments = group[site], None
            if config.metric == "outputs":
                moments = moments_of(site, {InputGram(site): answers[InputGram(sites[0])], **answers})
            return Reader(tensors.attention, tensors.roles, moments)

        seen = None if config.metric == "weights" else answers[InputGram(sites[0])]
        made = share(
            [reader(site) for site in sites], width, None if seen is None else (seen["gram_DD"], seen["mean_D"])
        )
        converted = dict(zip(sites, made.roles, strict=True))
        converted[sites[0]] = {**converted[sites[0]], "kv_down": made.down_RD}
        told = {site: {"keys": keys, "values": values} for site, (keys, values) in zip(sites, made.lost, strict=True)}
        return converted, {site: {"lost": lost} for site, lost in told.items()}

    def lossless(self, shape: Shape) -> Config:
        """Cache the encoder's output itself."""
        return Config(metric="weights")

    def example(self, shape: Shape) -> Config:
        """A latent of half the width of the encoder's output."""
        return Config(cross_latent_dim=read_width(shape) // 2)


METHOD = CrossLatent()
