"""Inspect a checkpoint: what each head is for, which heads are alike, and how many each layer needs.

One calibration pass reads the text as a conversion of the same effort does, and the costs of folds are those of
`convert --kv-heads auto`, which finds them in kvfold's cache folder. A sample of the text is read again for what heads
attend to. Everything else is an ablation: the teacher with one part changed, run from that part on.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvfold.convert.calibration import Calibration
from kvfold.convert.conversion import settled
from kvfold.convert.settings import ConvertSettings
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.record import Record
from kvfold.errors import OutputError, SettingError
from kvfold.inspection.heads import measured, questions
from kvfold.inspection.settings import InspectSettings
from kvfold.inspection.suggestion import fewest, recall_heads, suggested
from kvfold.methods import gqa
from kvfold.progress import SILENT, Progress
from kvfold.report.inspection import KIND
from kvfold.report.page import check_page, render_inspection, write_page
from kvfold.report.reading import record_fault
from kvfold.settings import differing

AUTO = gqa.Config("auto", budget=1.0, budget_metric="both")  # under which folds are measured


def inspect(
    src: str | Path,
    settings: InspectSettings,
    *,
    out: str | Path = "inspection",
    records: str | Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Record:
    """Measure the heads of a decoder, and write the record and its page.

    The record is written into `records`, the page, of the same name, into `out`; by default both into `out`. A record
    of the same inputs is returned as it is unless `overwrite`.

    Raises SettingError for a model that `gqa` cannot fold, CheckpointError, DataError or OutputError before anything
    is measured.
    """
    began, folder = time.monotonic(), Path(records or out)
    for each in (folder, Path(out)):
        record.check_folder(each)
    options = ConvertSettings(
        calibration=settings.data, effort=settings.effort, sensitivity_tokens=settings.sensitivity_tokens
    )
    source, _, options = settled(src, Path(out), "gqa", {"kv_heads": "1"}, options)
    if source.family.encoder_decoder:
        raise SettingError(
            "heads of decoders are inspected, and this is an encoder-decoder",
            where="inspect",
            got=source.config["model_type"],
            next="kvfold convert --kv-heads auto measures the folds of its layers",
        )
    calibration = Calibration.prepare(source, "inspect", questions(source.shape, settings.ablations), options, progress)
    assert calibration is not None  # moments are always asked for
    hashes = {"source": source.hash(progress), "data": calibration.text().hash, "tokens": calibration.hash}
    name = name or source.path.resolve().name
    compared = {"source": str(src)}
    identity = record.identity(KIND, name, {**differing(settings), **compared})
    asked = {**asdict(settings), **compared}
    path = record.path_of(folder, KIND, name, identity)
    record.check_replaceable(path)
    page = Path(out) / path.with_suffix(".html").name
    check_page(page)
    made = None if overwrite else record.existing(path, hashes, asked)
    if made is None:
        metrics = _measured(source, calibration, settings, progress)
        made = record.make(KIND, name, asked, metrics, hashes=hashes)
        made = replace(made, identity=identity, wall_seconds=round(time.monotonic() - began, 2))
        record.write(made, folder)
    else:
        if fault := record_fault(made):
            raise OutputError(f"the record there is damaged: {fault}", where=path, next="add --overwrite")
        progress.say(f"{path}: inspected already")
    write_page(lambda: render_inspection(made), page)
    progress.say(f"page: {page}")
    return made


def _measured(
    source: Checkpoint, calibration: Calibration, settings: InspectSettings, progress: Progress
) -> dict[str, Any]:
    # these load transformers: only if something is measured
    from kvfold.calibrate.attention import measure_attention
    from kvfold.calibrate.recall import copies
    from kvfold.calibrate.sensitivity import COPY_LENGTH, HEAD_TOKENS, spread
    from kvfold.contracts.requests import COPIED, AblatedRecall

    tokens, longest = calibration.text(), source.known_length
    text_BT = spread(tokens, longest, calibration.options.reading, HEAD_TOKENS)
    copied_BT = copies(tokens, min(COPY_LENGTH, longest), COPIED[AblatedRecall])
    answers = calibration.answers(source, gqa.METHOD, AUTO, progress)
    attention = measure_attention(source, text_BT, copied_BT, progress=progress)
    found = measured(source, answers, attention)
    if "recall" in settings.ablations:
        found["recall_heads"] = recall_heads(found["layers"])
    if "folds" in settings.ablations:
        for row, count in zip(found["layers"], fewest(found["layers"], settings.loss), strict=True):
            row["fewest"] = count
        found |= suggested(source.shape, answers, settings.loss)
    return {"tokens": len(tokens), **found}
