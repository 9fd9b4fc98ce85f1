"""mla: one latent and one rotated key for all heads, as DeepSeek-V3 has them: a student that engines load as it is.

Multi-head latent attention (arXiv 2405.04434) caches `latent_dim` numbers c, and one key of `rope_dim` numbers that all
heads share and that alone is rotated. The student is a stock `deepseek_v3` without experts:

    k_h = [U_h c | rotate(S x)],   v_h = W_h c,   c = norm(A x + a)

    planes  chosen   components of any planes, as many of each as pay: rope_type longrope names their frequencies (ours)
            even     one of every n-th plane, and of its neighbours where that keeps more; an ordinary rotation
            folded   the same, always of its neighbours too                           (TransMLA, arXiv 2502.07864)
    metric  outputs  errors of k in logits, of v behind o, on what attention reads                            (ours)
            inputs   principal components of keys alone, then of K and V balanced                       (TransMLA's)
            weights  the same of the weights, without text
    norm    exact    a large constant in c holds the norm still: it divides by one number
            trained  no constant and no biases: the norm is left to repair and training

Components are complex principal components across all key heads, plane by plane (`solve.mla`). Cached per token and
layer: `rope_dim + latent_dim` elements. Lossless, with `exact`, when every component of every plane is rotated
(`rope_dim` is the width of all key heads) and the latent is one number wider than the values, `min(D, G E) + 1`; the
norm is computed in float32. It loses most where heads need different positions in the same plane. It needs the layers
of a Llama. A bias of queries, which the stock class lacks, becomes a column behind a latent of them: the input itself
and a constant (`q_lora_rank` is the model's width and 1).

`ratio` sets the cache as a part of the root teacher's. Without any size, the widths are 512 + 64 or 256 + 64, for which
engines have kernels: the wider of them that is at most half of that cache. Where neither is, the ratio is a quarter.
Both sizes are the same in all layers, because config.json has one number for each: under a ratio, those of the least
expected error, in sum over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.cache import layer_elements
from kvfold.contracts.method import Folded, Limit, Method, Student, check_ratio, refuse, refuse_mixed_heads
from kvfold.contracts.requests import Answers, AttentionGram, Computed, InputGram, QueryGram, Question
from kvfold.contracts.site import REPAIRABLE, Attention, Roles, Rope, Shape, Site, SiteTensors
from kvfold.contracts.student_site import KERNELS, WITH_KERNELS, with_mla
from kvfold.errors import SettingError
from kvfold.settings import setting
from kvfold.solve import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.solve.mla import Pool, Source

STOCK = "deepseek_v3"
SOURCES = ("llama", "mistral", "qwen2", "internlm3", "helium", "ernie4_5")
_SCALINGS = ("default", "linear", "llama3", "yarn")
_WAYS = ("chosen", "even", "folded")
_RATIO = 0.25
_DEFAULT = f"the wider of {WITH_KERNELS} that is at most half of the cache, or else {_RATIO:g}"

LIMITS: Sequence[Limit] = (
    ("keys are not rotated, and one key of the student is", lambda _, attention: attention.rope is None),
    ("it reads the keys and values of another layer", lambda _, attention: attention.source is not None),
    (f"it has a sliding window, and stock {STOCK} has none", lambda _, attention: attention.window is not None),
    ("its RoPE scaling changes with the length of the text", lambda _, attention: _kind(attention) not in _SCALINGS),
)


@dataclass(frozen=True)
class Config:
    """How wide the latent and the rotated key are, and how both are chosen."""

    ratio: float | None = setting(
        None,
        "Cache bytes as a fraction of the root teacher's, e.g. 0.25, instead of --rope-dim and --latent-dim. "
        f"Without all three: {_DEFAULT}.",
    )
    rope_dim: int | None = setting(None, "Width of the rotated key of all heads, even, e.g. 64. Default: from --ratio.")
    latent_dim: int | None = setting(None, "Width of the latent of all else, e.g. 512. Default: from --ratio.")
    planes: str = setting(
        "chosen",
        "Planes in the rotated key: chosen, even, folded, or components of each plane, e.g. 4/2/1/1. "
        "Without --calibration: even.",
    )
    metric: Metric = setting("outputs", "How errors are weighed. Without --calibration: weights.")
    norm: Literal["exact", "trained"] = setting(
        "exact", "The norm on the latent: held still by a constant (exact), or left to training (trained)."
    )

    def check(self, shape: Shape) -> None:
        """Refuse sources that no deepseek_v3 equals, and sizes that are out of range, with the range."""
        if shape.model_type not in SOURCES:
            raise SettingError(
                f"model_type is not one whose layers are those of stock {STOCK}",
                where="mla",
                got=shape.model_type,
                allowed=", ".join(SOURCES),
                next="choose elitekv",
            )
        refuse(shape, "mla", LIMITS, next="choose elitekv")
        refuse_mixed_heads(shape, "mla")
        attention = _first(shape)
        if self.norm == "trained" and attention.biases:
            raise SettingError(
                "norm trained writes no biases, and this model has some", where="mla", next="set --norm exact"
            )
        counts = _counts(self, attention)
        if self.ratio is not None:
            _check_ratio(self, shape)
            return
        for name, value in (("rope_dim", self.rope_dim), ("latent_dim", self.latent_dim)):
            if value is None:
                raise SettingError(f"{name} is missing", where="mla", next="add it, or set --ratio 0.25 instead")
        assert self.rope_dim is not None
        assert self.latent_dim is not None
        most = widest(self, attention)
        if self.rope_dim % 2 or not 2 <= self.rope_dim <= most:
            allowed = f"an even number from 2 to {most}"
            raise SettingError("rope_dim is out of range", where="mla", got=self.rope_dim, allowed=allowed)
        if not 2 <= self.latent_dim <= attention.hidden_size + 1:
            allowed = f"2 to {attention.hidden_size + 1}"
            raise SettingError("latent_dim is out of range", where="mla", got=self.latent_dim, allowed=allowed)
        if counts is not None and 2 * sum(counts) != self.rope_dim:
            allowed = f"numbers that add up to {self.rope_dim // 2}"
            raise SettingError("planes do not fill rope_dim", where="mla", got=sum(counts), allowed=allowed)


def _check_ratio(config: Config, shape: Shape) -> None:
    assert config.ratio is not None
    chosen = {"rope_dim": config.rope_dim, "latent_dim": config.latent_dim}
    check_ratio(shape, "mla", config.ratio, chosen, 4 * len(shape.sites), "one plane and a latent of 2")
    if _counts(config, _first(shape)) is not None:
        what = "planes by number need rope_dim and latent_dim"
        raise SettingError(what, where="mla", got=config.planes, next="leave out --ratio")


# --- sizes ------------------------------------------------------------------------------------------------------------


def _first(shape: Shape) -> Attention:
    return next(iter(shape.sites.values()))


def _rope(attention: Attention) -> Rope:
    assert attention.rope is not None
    return attention.rope


def _kind(attention: Attention) -> str:
    scaling = _rope(attention).scaling or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _counts(config: Config, attention: Attention) -> list[int] | None:
    """The components of each plane that `planes` names by number; None if it names a way. Raises SettingError."""
    if config.planes in _WAYS:
        return None
    parts, planes = config.planes.split("/"), _rope(attention).dims // 2
    most = attention.num_key_value_heads
    if len(parts) != planes or not all(part.isdecimal() and int(part) <= most for part in parts):
        allowed = f"chosen, even, folded, or {planes} numbers from 0 to {most}, such as 4/2/1/1"
        raise SettingError("planes is not known", where="mla", got=config.planes, allowed=allowed)
    return list(map(int, parts))


def widest(config: Config, attention: Attention) -> int:
    """The widest rotated key: every component of every plane, or one of each."""
    evenly = config.planes in ("even", "folded")
    return _rope(attention).dims * (1 if evenly else attention.num_key_value_heads)


def sizes(config: Config, shape: Shape) -> tuple[int, int]:
    """The widths of the rotated key and of the latent. Of a ratio, unmeasured: a quarter is rotated."""
    if config.ratio is None:
        assert config.rope_dim is not None
        assert config.latent_dim is not None
        return config.rope_dim, config.latent_dim
    room, attention = layer_elements(config.ratio, shape), _first(shape)
    rotated = min(max(1, room // 8), widest(config, attention) // 2)
    return 2 * rotated, max(2, min(room - 2 * rotated, attention.hidden_size + 1))


def _candidates(config: Config, attention: Attention) -> list[int]:
    """Widths of the rotated key to try, in steps of a third or a half, as far as an answer has room for them."""
    most = widest(config, attention)
    steps = sorted({2, 4, *(2**power * part for power in range(1, 12) for part in (2, 3))})
    return [*[each for each in steps if each < most][: attention.head_dim - 1], most]


def _optimises(config: Config) -> bool:
    return config.ratio is not None and config.metric == "outputs"


def rotation(config: Config, shape: Shape, rotated: int) -> Rope:
    """The rotation of the student: an ordinary one of another base, or the frequencies of the chosen planes by name."""
    attention = _first(shape)
    rope = _rope(attention)
    if config.planes in ("even", "folded"):
        base = rope.theta ** (rotated * max(1, rope.dims // rotated) / rope.dims)
        scaling = {**(rope.scaling or {}), "rope_type": _kind(attention), "rope_theta": base}
        scaling.pop("type", None)
        return Rope(rotated, base, half_split=False, scaling=scaling)
    slower, counts = [1.0] * (rotated // 2), _counts(config, attention)
    if counts is not None:
        from kvfold.solve.rope import frequencies

        theta_P = frequencies(rope)[0].tolist()
        angles = [theta_P[plane] for plane, kept in enumerate(counts) for _ in range(kept)]
        slower = [rope.theta ** (-2 * n / rotated) / angle for n, angle in enumerate(angles)]
    scaling = {
        **{"rope_type": "longrope", "rope_theta": rope.theta, "short_factor": slower, "long_factor": slower},
        **{"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": shape.max_positions},
    }
    return Rope(rotated, rope.theta, half_split=False, scaling=scaling)


# --- the method -------------------------------------------------------------------------------------------------------


class MLA(Method[Config]):
    """Multi-head latent attention, written as stock deepseek_v3."""

    without_text: ClassVar = {"planes": "even", "metric": "weights"}
    published: ClassVar = ({"planes": "folded", "metric": "inputs"},)

    def filled(self, config: Config, shape: Shape) -> Config:
        """Both sizes where engines have kernels for such, or else a ratio. Planes by number need sizes of their own."""
        attention = _first(shape)
        sized = any(each is not None for each in (config.ratio, config.rope_dim, config.latent_dim))
        if sized or config.planes not in _WAYS or attention.rope is None:
            return config
        half = layer_elements(0.5, shape)
        for width, rotated in KERNELS:
            if width + rotated <= half and width <= attention.hidden_size + 1 and rotated <= widest(config, attention):
                return replace(config, rope_dim=rotated, latent_dim=width)
        return replace(config, ratio=_RATIO)

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """The moments of the metric, and what each component saves."""
        questions: list[Question] = []
        for site in shape.sites:
            if config.metric != "weights":
                questions.append(InputGram(site))
            if config.metric == "outputs":
                questions += [QueryGram(site), AttentionGram(site)]
            if config.planes == "chosen" or _optimises(config):
                questions.append(Computed(site))
        return questions

    def compute(self, site: Site, tensors: SiteTensors, answers: Answers, config: Config) -> Mapping[str, Tensor]:
        """What each component of each plane saves, `gain_PG`; for a ratio, the expected error of sizes, `error_CR`."""
        from kvfold.solve.mla import chosen, counted, gains, spaced, split_errors

        source, found = _source(site, tensors, answers, config), {}
        found["gain_PG"] = gains(source)
        if _optimises(config):
            pairs = [width // 2 for width in _candidates(config, tensors.attention)]
            if config.planes == "chosen":
                candidates = [counted(chosen([found["gain_PG"]], each)) for each in pairs]
            else:
                candidates = [spaced(source, each, always=config.planes == "folded") for each in pairs]
            found["error_CR"] = split_errors(source, candidates, exact=config.norm == "exact")
        return found

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the sizes, and how many components each plane has in the rotated key."""
        rotated, width = _optimal(config, shape, answers) if _optimises(config) else sizes(config, shape)
        config = replace(config, ratio=None, rope_dim=rotated, latent_dim=width)
        if config.planes != "chosen":
            return config
        from kvfold.solve.mla import chosen

        counts = chosen([answers[Computed(site)]["gain_PG"] for site in sorted(shape.sites)], rotated // 2)
        return replace(config, planes="/".join(map(str, counts)))

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """Warn of sizes without kernels, and of those that are not chosen yet."""
        rotated, width = sizes(config, shape)
        found = []
        if config.ratio is not None:
            found.append(f"ratio {config.ratio:g}: the plan rotates a quarter of it; the conversion chooses both sizes")
        elif (width, rotated) not in KERNELS:
            found.append(f"engines have kernels for {WITH_KERNELS}, not for {width} + {rotated}; transformers runs any")
        if config.planes not in ("even", "folded"):
            found.append(
                "the frequencies are named by rope_type longrope, which engines' own deepseek classes may lack"
            )
        if config.norm == "exact":
            found.append("the norm stays still by a bias of kv_a_proj_with_mqa, which transformers' class has")
        return found

    def student(self, config: Config, shape: Shape) -> Student:
        """A deepseek_v3 without experts."""
        (rotated, width), exact = sizes(config, shape), config.norm == "exact"
        rope = rotation(config, shape, rotated)
        made = {}
        for site, attention in shape.sites.items():
            one = replace(attention, rope=rope, scale=None)
            head = attention.head_dim
            queries = attention.hidden_size + 1 if "q" in attention.biases else None
            made[site] = with_mla(
                one, rotated=rotated, free=head, value=head, width=width, biased=exact, queries=queries
            )
        return Student(replace(shape.with_sites(made), family=STOCK, model_type=STOCK))

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Folded:
        """Take out the rotated key, and factorise the rest. Measurements: what the latent loses in its metric."""
        from kvfold.solve.mla import convert_site

        assert config.latent_dim is not None
        converted: dict[Site, Roles] = {}
        measured: dict[Site, dict[str, Any]] = {}
        for site, tensors in group.items():
            source = _source(site, tensors, answers, config)
            dtype = tensors.dtype or str(tensors.roles["q"].dtype).removeprefix("torch.")
            pools, exact = _pools(source, config), config.norm == "exact"
            converted[site], lost = convert_site(source, pools, config.latent_dim, exact=exact, dtype=dtype)
            measured[site] = {"lost": lost, "folded": [pool.angle for pool in pools if len(pool.planes) > 1]}
        return converted, measured

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything where errors are weighed by outputs; published starts are left as published."""
        return REPAIRABLE if config.metric == "outputs" else ()

    def lossless(self, shape: Shape) -> Config:
        """Every component of every plane, and a latent as wide as the values and the constant."""
        attention = _first(shape)
        groups, planes = attention.num_key_value_heads, (attention.rope.dims if attention.rope else 0) // 2
        width = min(attention.hidden_size, groups * attention.head_dim) + 1
        counts = "/".join([str(groups)] * planes)
        return Config(None, 2 * planes * groups, width, counts, "weights")

    def example(self, shape: Shape) -> Config:
        """One plane, and a latent of one head and a half."""
        return Config(None, 2, _first(shape).head_dim * 3 // 2)


def _source(site: Site, tensors: SiteTensors, answers: Answers, config: Config) -> Source:
    """A site, with the answers that its metric needs."""
    from kvfold.solve.mla import Source
    from kvfold.solve.shared_heads import moments_of

    moments = moments_of(site, answers) if config.metric == "outputs" else None
    gram_DD = answers[InputGram(site)]["gram_DD"] if config.metric == "inputs" else None
    return Source.of(tensors.attention, tensors.roles, config.metric, moments, gram_DD)


def _pools(source: Source, config: Config) -> list[Pool]:
    """The planes in the rotated key of a site, under explicit settings."""
    from kvfold.solve.mla import counted, spaced

    counts = _counts(config, source.attention)
    if counts is not None:
        return counted(counts)
    assert config.rope_dim is not None
    return spaced(source, config.rope_dim // 2, always=config.planes == "folded")


def _optimal(config: Config, shape: Shape, answers: Answers) -> tuple[int, int]:
    """The sizes of the least expected error within the ratio."""
    import torch  # a plan works without

    from kvfold.solve.latent import best_split

    assert config.ratio is not None
    attention = _first(shape)
    widths = _candidates(config, attention)
    error_CR = torch.stack([answers[Computed(site)]["error_CR"] for site in sorted(shape.sites)]).mean(0)
    width_R = torch.arange(attention.hidden_size + 2)
    row, width = best_split(
        error_CR.masked_fill(width_R < 2, torch.inf),
        torch.tensor(widths)[:, None] + width_R,
        layer_elements(config.ratio, shape),
    )
    return widths[row], width


METHOD = MLA()
