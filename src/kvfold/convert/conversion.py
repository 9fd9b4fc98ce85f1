"""Convert a checkpoint: for each group of sites, read -> method -> write; every other tensor is copied byte for byte.

Tensors stream from mapped files into files whose headers are already written, so memory holds one group of sites and
never the model. Source and student are hashed in the same pass. A conversion that was stopped keeps its whole shards,
and the same command continues.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvfold import methods
from kvfold.contracts.effort import EFFORTS
from kvfold.contracts.per_layer import spelled
from kvfold.convert.calibration import Calibration
from kvfold.convert.settings import ConvertSettings
from kvfold.convert.tensors import Job
from kvfold.disk.checkpoint import Checkpoint, Writer, content_hash
from kvfold.disk.deepened import Deepened
from kvfold.disk.lineage import descend, needed_root, queries_since_root
from kvfold.disk.output import (
    MANIFEST,
    REPAIRED,
    Output,
    check_apart,
    disk_errors,
    dropped_on_error,
    fingerprint,
    open_output,
    read_object,
    tidy,
    write_json,
)
from kvfold.disk.rehoused import Rehoused
from kvfold.disk.shards import JOURNAL
from kvfold.disk.sidecar import carried, carry_over
from kvfold.disk.source import remember
from kvfold.errors import CheckpointError, DataError, Interrupted, SettingError
from kvfold.predict.student_config import draft, student_config
from kvfold.progress import SILENT, Progress
from kvfold.repair import check_roles

__all__ = ["ConvertSettings", "convert"]

FOUND = ".found.json"  # in unfinished work: the method's measurements of the sites that are converted
FUTILE = (SettingError, DataError, CheckpointError)  # the same command would end in it again


def convert(
    src: str | Path,
    dst: str | Path,
    method: str = "gqa",
    settings: Mapping[str, Any] | None = None,
    *,
    options: ConvertSettings = ConvertSettings(),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Convert `src` with `method` and its `settings`, write the student to `dst`, and return its path.

    Raises SettingError for invalid settings, CheckpointError for a source that cannot be read, OutputError if `dst`
    holds something else or cannot be written, and Interrupted on Ctrl-C: the same call then continues.
    """
    started, dst, chosen = time.monotonic(), Path(dst), methods.get(method)
    source, config, options = settled(src, dst, method, settings or {}, options)
    calibration = Calibration.prepare(source, method, chosen.needs(config, source.shape), options, progress)
    teacher = source
    if options.repair and not chosen.groups(config, source.shape):  # a copy: the teacher of the source is meant
        otherwise = "put it where it was, or beside the student"
        teacher = needed_root(source, progress, next=otherwise) or source
    # without calibration nothing is left to resolve: `8` and `self=8` are the same student
    known = spelled(config if calibration else chosen.resolve(config, source.shape, {}))
    asked = {"method": method, **known, **options.identity()}
    if calibration:
        asked["calibration"] = calibration.hash
    if source.buffers:
        what = f"{source.buffers[0]}, and {len(source.buffers) - 1} more" if source.buffers[1:] else source.buffers[0]
        progress.say(f"masks in the files, which no weights are, are left out: {what}")
    if not overwrite and _complete(source, dst, asked):
        tidy(dst)
        progress.say(f"{dst} is complete: it was made from this source with these settings")
        return dst
    try:
        with disk_errors(dst), ExitStack() as until_done:
            output = open_output(dst, {**asked, "source": source.stamp}, overwrite=overwrite)
            until_done.enter_context(dropped_on_error(output, JOURNAL, futile=FUTILE))
            if calibration:
                calibration.announce(source, chosen.student(config, source.shape).shape, started, progress)
            answers = calibration.answers(source, chosen, config, progress) if calibration else {}
            resolved = chosen.resolve(config, source.shape, answers)
            job = Job.plan(source, chosen, resolved, answers, options.dtype, output.work / FOUND)
            hashed = _write(source, teacher, method, job, output, options, calibration, progress)
            # only now: until then, stopped work would start from repaired tensors and repair them again
            shutil.rmtree(output.work / REPAIRED, ignore_errors=True)
            repaired = {"repaired_by": asdict(options.repairing)} if calibration and options.repair else {}
            lineage = descend(
                source.origin,
                inputs=fingerprint({"stage": "convert", **asked, "source": source.hash()}),
                stage="convert",
                settings={"method": method, **spelled(resolved), **options.identity(), **repaired},
                calibration=calibration.hash if calibration else None,
                wall_seconds=round(time.monotonic() - started, 3),
            )
            found, sites = dict(chosen.found(config, source.shape, answers)), job.found()
            if sites:
                found["sites"] = sites
            if found:
                lineage["steps"][-1]["found"] = found
            (output.work / FOUND).unlink(missing_ok=True)
            write_json(output.work / MANIFEST, {**lineage, "hash": hashed})
            output.commit()
            remember(source.origin.hash(), source.path)
    except KeyboardInterrupt:
        raise Interrupted("stopped", where=dst, next="the same command continues") from None
    return output.path


def settled(
    src: str | Path, dst: Path, method: str, settings: Mapping[str, Any], options: ConvertSettings
) -> tuple[Checkpoint, Any, ConvertSettings]:
    """The opened source, the decoded settings, and the roles that a repair refits. Nothing is written.

    Raises SettingError, CheckpointError and UnsupportedModel for what cannot be converted, before a tensor is read.
    """
    source, chosen = Checkpoint.open(src), methods.get(method)
    reads = {"source": source.path, "root teacher": source.root_path, "calibration text": options.calibration}
    check_apart(dst, reads)
    if options.calibration is None:
        settings = {**chosen.without_text, **settings}
    made = draft(source.config, source.family, source.shape, method, settings)
    student_config(made.config, made.family, made.shape, made.student, method=method, dtype=options.dtype)
    if made.family.name != source.family.name:
        source = Rehoused(source)
    if made.shape.num_layers != source.shape.num_layers:
        source = Deepened(source, made.shape.num_layers)
    carried(source.path)  # raises for a link out of its folder
    repair = options.repair
    if repair is None:
        changed = options.calibration is not None and made.student.shape != made.shape
        roles = chosen.repairs(made.settings) if changed else ()
        repair = EFFORTS[options.effort].repaired(roles, source.family.body.mlp, source.shape.hidden_size)
    check_roles(source.family, repair)
    if repair and source.family.encoder_decoder and any(each.kept for each in made.student.shape.sites.values()):
        raise SettingError(
            "layers of the student share a latent of the encoder's output, and a repair runs layers alone",
            where="convert",
            got=f"--repair {','.join(repair)}",
            next="omit --repair",
        )
    return source, made.settings, replace(options, repair=repair)


def _complete(source: Checkpoint, dst: Path, asked: Mapping[str, Any]) -> bool:
    """Is this student there already? The source is read only if the settings agree."""
    manifest = read_object(dst / MANIFEST)
    if not manifest.get("steps"):
        return False
    if "calibration" not in asked and fingerprint(manifest["steps"][-1]["settings"]) != fingerprint(asked):
        return False
    return bool(manifest.get("inputs") == fingerprint({"stage": "convert", **asked, "source": source.hash()}))


def _write(
    source: Checkpoint,
    teacher: Checkpoint,
    method: str,
    job: Job,
    output: Output,
    options: ConvertSettings,
    calibration: Calibration | None,
    progress: Progress,
) -> str:
    """Write the student, repair it towards its teacher, without its manifest, and return its content hash."""
    config = student_config(source.config, source.family, source.shape, job.student, method=method, dtype=options.dtype)
    size, resumed = options.shard_size, output.resumed
    carry_over(source.path, output.work)
    if config == source.origin.config:  # byte for byte
        shutil.copyfile(source.path / "config.json", output.work / "config.json")
    else:
        write_json(output.work / "config.json", config)
    with Writer(
        output.work, job.specs, shard_bytes=size, resume=resumed, origin=source.path, spelled=source.spelled
    ) as writer:
        writer.check_space(output.path)
        if calibration is None and job.method.without_text:
            progress.say("without --calibration TEXT, only weights are read; with it, more quality is kept")
        job.run(writer, progress)
        if calibration and options.repair:
            from kvfold.repair.layers import repair_in_place  # loads transformers

            text, queries = calibration.tokens, job.queries() if teacher is source else queries_since_root(source)
            repair_in_place(teacher, output, options.repair, text, options.repairing, writer, queries, progress)
        writer.close()
    return content_hash(config, job.specs, writer.digests)
