"""Uptraining on two levels of depth: a student of half the layers trains first, and is put back into the whole one.

Zou et al. 2024, arXiv 2404.07999, figure 1, without the warm-up of the whole model, which a conversion has behind it.
Each step writes a checkpoint into the unfinished output, so that a run that was stopped continues at any of them.
`kvfold.train.depth` has the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from kvfold.contracts.stages import Stage
from kvfold.disk.checkpoint import Checkpoint, save_tensors
from kvfold.disk.lineage import descend
from kvfold.disk.output import open_output
from kvfold.errors import SettingError
from kvfold.predict.training_memory import training_flops
from kvfold.progress import Progress
from kvfold.train.depth import half_config, half_depth, merged_names
from kvfold.train.settings import UptrainSettings
from kvfold.train.stages import formula

LEVELS = "levels"  # in the unfinished output: the checkpoints of the lower level


@dataclass(frozen=True)
class Start:
    """The whole student from which training starts, and what the lower level cost before."""

    checkpoint: Checkpoint
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0


def check_levels(source: Checkpoint, stages: Sequence[Stage], settings: UptrainSettings) -> None:
    """Raise SettingError where two levels are asked for and a student of half the layers cannot train so."""
    if settings.levels == 1:
        return
    own = any(
        {"attention"} & set(stage.losses) or stage.trainable or stage.converted or stage.scheduled or stage.finish
        for stage in stages
    )
    if own or settings.lora:
        raise SettingError(
            "levels trains every parameter with kl and ce",
            where="uptrain",
            got=f"lora {settings.lora}" if settings.lora else formula(stages),
            next="add --loss kl+0.3ce, without --trainable, --lora and --converted-only",
        )
    half_config(source)


def lower_level(
    source: Checkpoint,
    teacher: Checkpoint | None,
    stages: Sequence[Stage],
    amount: int,
    settings: UptrainSettings,
    work: Path,
    train: Callable[..., Path],
    progress: Progress,
) -> Start:
    """Train the student of half the layers on its share of `amount` tokens with `train`, and put it back.

    On one level, training starts from the source.
    """
    if settings.levels == 1:
        return Start(source)
    folder, tokens = work / LEVELS, max(1, round(settings.level_share * amount))
    half = half_depth(source, folder / "half", progress=progress)
    losses = {"loss": formula(stages)} if len(stages) == 1 else {"loss": None, "stages": formula(stages)}
    below = replace(settings, levels=1, alpha=None, tokens=tokens, **losses)
    trained = Checkpoint.open(
        train(half, folder / "trained", below, teacher=teacher and teacher.path, progress=progress)
    )
    whole = open_output(folder / "whole", {"half": trained.hash(), "share": settings.interpolation})
    if not whole.complete:
        if not whole.written():
            lineage = descend(source, inputs=whole.inputs, stage="levels", settings={})
            save_tensors(whole.work, source, put_back(source, trained, settings.interpolation), lineage)
        whole.commit()
    assert trained.lineage is not None
    step = trained.lineage["steps"][-1]
    flops = training_flops(step["tokens"], trained.shape, None if teacher is None else teacher.shape)
    return Start(Checkpoint.open(whole.path), step["tokens"], step["wall_seconds"], flops)


def put_back(source: Checkpoint, half: Checkpoint, share: float) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the whole student, moved by `share` towards those of the student of half the layers."""
    for small, names in merged_names(source.names(), source.family.body.layers).items():
        below = half.read(small).float()
        for name in names:
            yield name, source.read(name).float().lerp(below, share)
