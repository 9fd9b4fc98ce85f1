"""fido: cross-attention in every k-th decoder layer alone.

An encoder-decoder that reads a long input, such as a reader of many passages (Fusion-in-Decoder, Izacard & Grave 2020,
arXiv 2007.01282), spends most of a decoding step on the keys and values of its cross-attentions. FiDO (de Jong et al.
2022, arXiv 2212.08153, section 4.1, "layer-sparse cross-attention") keeps cross-attention in every k-th layer:

    h_l = h + self_l(h),    h_l + cross_l(h_l, x)  only where (l + 1) % k == 0,    then + mlp_l

as in the authors' code (google/flaxformer, architectures/fido): of 24 layers, k = 6 keeps 5, 11, 17 and 23. The others
keep self-attention, its relative bias and the MLP, and lose the branch with its norms. `cross_layers auto` keeps as
many layers, those whose removal costs most: the KL to the teacher without one branch alone, on calibration text.

`decoder_layers` adds layers to the source first ("asymmetric scaling", here deeper and not wider): each computes
nothing until uptraining trains it (`kvfold.disk.deepened`).

Cached per encoder token: `2 G E` elements in each layer that keeps cross-attention, nothing in the others. Chain `gqa`
or `crosslatent` behind it for fewer per layer. It is lossless at `cross_every 1`. Repair refits o of self-attention
and the MLP of a layer to the teacher's residual stream behind the branch that is gone. What a branch added from the
input is lost to its layer: quality comes back in uptraining. With `fade`, the student begins as the teacher itself, and
a gate takes the branches from 1 to 0 in the first part of uptraining, which then removes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from kvfold.contracts.method import Method, Student, Trained
from kvfold.contracts.requests import Answers, ConvertedKL, Question
from kvfold.contracts.site import REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import GUIDED, Learner, Stage
from kvfold.errors import SettingError
from kvfold.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
REMOVE = "remove the faded branches"


@dataclass(frozen=True)
class Config:
    """Which layers keep their cross-attention, and whether the others fade."""

    cross_every: int = setting(6, "Layers per layer with cross-attention: of every K, the last one keeps it.")
    cross_layers: str | None = setting(
        None,
        "Layers that keep it, such as 5,11, instead of every K-th; `auto`: as many, those whose removal costs most on "
        "calibration text.",
    )
    decoder_layers: int | None = setting(
        None, "Decoder layers of the student: those that are added compute nothing until uptraining. Default: as many."
    )
    fade: float = setting(
        0.0, "Share of uptraining in which a gate fades the other branches, which are then removed; 0: removed at once."
    )

    def check(self, shape: Shape) -> None:
        """Refuse models without cross-attention or with one latent for all, and layers that do not exist."""
        if not shape.crossed:
            raise SettingError(
                "there is no cross-attention", where="fido", got=f"family {shape.family}", next="choose cla"
            )
        if any(shape.sites[site].kept is not None for site in shape.crossed):
            raise SettingError(
                "the cross-attentions share a latent", where="fido", next="convert with fido first, then crosslatent"
            )
        if any(shape.sites[site].fades for site in shape.crossed):
            raise SettingError("branches of the source fade already", where="fido", next="uptrain the source first")
        if self.cross_layers in (None, AUTO) and not 1 <= self.cross_every <= shape.num_layers:
            raise SettingError(
                "cross_every is out of range", where="fido", got=self.cross_every, allowed=f"1 to {shape.num_layers}"
            )
        if not 0 <= self.fade < 1:
            raise SettingError("fade is out of range", where="fido", got=self.fade, allowed="0 to below 1")
        there = [site.layer for site in shape.crossed]
        kept = kept_layers(self, shape)
        if not set(kept) <= set(there):
            named = self.cross_layers not in (None, AUTO)
            raise SettingError(
                f"{'cross_layers' if named else 'cross_every'} keeps a layer without cross-attention",
                where="fido",
                got=self.cross_layers if named else self.cross_every,
                allowed=f"layers {', '.join(map(str, there))}",
            )


def kept_layers(config: Config, shape: Shape) -> list[int]:
    """The layers that keep cross-attention; of `auto`, unmeasured: every k-th. Raises SettingError for no list."""
    if config.cross_layers in (None, AUTO):
        return [layer for layer in range(shape.num_layers) if (layer + 1) % config.cross_every == 0]
    parts = [part.strip() for part in str(config.cross_layers).split(",")]
    if not all(part.isdecimal() for part in parts) or sorted(set(map(int, parts))) != [int(part) for part in parts]:
        raise SettingError(
            "cross_layers is no list of layers",
            where="fido",
            got=config.cross_layers,
            allowed=f"{AUTO}, or layers in ascending order: 5,11",
        )
    return [int(part) for part in parts]


def _spelled(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))


class FiDO(Method[Config]):
    """Cross-attention in every k-th decoder layer alone."""

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """No site: those that stay are copied."""
        return ()

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model without the other cross-attentions; with `fade`, they are still there."""
        kept = kept_layers(config, shape)
        removed = [site for site in shape.crossed if site.layer not in kept]
        if config.fade:
            return Student(shape.with_sites({site: replace(shape.sites[site], fades=True) for site in removed}))
        return Student(shape.without(removed))

    def decoder_layers(self, config: Config) -> int | None:
        """As the settings say."""
        return config.decoder_layers

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """Say what is not chosen yet, and what only uptraining removes."""
        notes = []
        if config.cross_layers == AUTO:
            notes.append(
                f"cross_layers auto: the plan keeps every {config.cross_every}th; the conversion measures which"
            )
        if config.decoder_layers is not None:
            notes.append("decoder_layers: an added layer computes nothing until it is trained")
        if config.fade:
            notes.append("fade: this student caches as much as its source until uptraining has removed the branches")
        return notes

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """The cost of each removal, under `auto`."""
        if config.cross_layers != AUTO or len(kept_layers(config, shape)) == len(shape.crossed):
            return ()
        return [ConvertedKL((site,)) for site in shape.crossed]

    def alone(self, config: Config, shape: Shape, sites: Sequence[Site]) -> Config:
        """The same settings, removing these cross-attentions and no others, at once."""
        return Config(cross_layers=_spelled([site.layer for site in shape.crossed if site not in sites]))

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the layers that keep cross-attention."""
        kept = kept_layers(config, shape)
        if config.cross_layers == AUTO and answers:
            costs = _costs(answers)
            kept = sorted(sorted(costs, key=lambda layer: (-costs[layer], -layer))[: len(kept)])
        return Config(cross_layers=_spelled(kept), decoder_layers=config.decoder_layers, fade=config.fade)

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """The cost of removing each cross-attention alone, where `auto` chose by it."""
        return {"kl": {str(layer): kl for layer, kl in _costs(answers).items()}} if config.cross_layers == AUTO else {}

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """The roles of sites that stay."""
        return {site: tensors.roles for site, tensors in group.items()}

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything, unless the student begins as the teacher."""
        return () if config.fade else REPAIRABLE

    def stages(self, config: Config) -> Sequence[Stage]:
        """With `fade`, a part in which the gate falls, and the rest without the branches."""
        if not config.fade:
            return ()
        return (
            Stage("fade", config.fade, GUIDED, scheduled=True, finish=REMOVE),
            Stage("sparse", 1 - config.fade, GUIDED),
        )

    def during(self, stage: str, student: Learner, share: float, config: Config) -> Tensor | None:
        """Lower the gate in a straight line."""
        model: Any = student.model
        model.get_decoder().gate = 1 - share
        return None

    def end(self, finish: str, student: Learner, config: Config) -> None:
        """Remove the branches whose gate is closed."""
        model: Any = student.model
        model.remove_faded()

    def trained(self, student: Learner, config: Config) -> Trained:
        """The student without these branches."""
        shape = student.shape
        return Trained(shape.without([site for site in shape.crossed if shape.sites[site].fades]), {})

    def lossless(self, shape: Shape) -> Config:
        """Every layer keeps its cross-attention."""
        return Config(cross_every=1)

    def example(self, shape: Shape) -> Config:
        """Every second layer."""
        return Config(cross_every=2)


def _costs(answers: Answers) -> dict[int, float]:
    """The KL of each layer's removal in nats per token."""
    return {
        each.sites[0].layer: float(answer["kl"]) for each, answer in answers.items() if isinstance(each, ConvertedKL)
    }


METHOD = FiDO()
