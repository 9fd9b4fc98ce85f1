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
from kvfold.contracts.family import MLP
from kvfold.contracts.method import Method, Student
from kvfold.contracts.per_layer import spelled
from kvfold.convert.calibration import Calibration
from kvfold.convert.settings import ConvertSettings
from kvfold.convert.tensors import Job
from kvfold.disk.checkpoint import Checkpoint, TensorSpec, Writer, carry_over, content_hash
from kvfold.disk.lineage import descend, known_root, remember
from kvfold.disk.output import (
    MANIFEST,
    REPAIRED,
    Output,
    check_apart,
    disk_errors,
    dropped_on_error,
    fingerprint,
    free_bytes,
    open_output,
    read_json,
    tidy,
    write_json,
)
from kvfold.disk.rehoused import Rehoused
from kvfold.disk.shards import JOURNAL
from kvfold.disk.sidecar import carried
from kvfold.errors import CheckpointError, DataError, Interrupted, OutputError, SettingError
from kvfold.predict.plan import rooted
from kvfold.predict.student_config import rehoused, student_config
from kvfold.progress import SILENT, Progress
from kvfold.settings import decode

__all__ = ["ConvertSettings", "convert"]

FOUND = ".found.json"  # in unfinished work: the method's measurements of the sites that are converted
FUTILE = (SettingError, DataError, CheckpointError)  # the same command would end in it again
SLACK = 1 << 20  # bytes for config.json, kvfold.json and the index


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
    source, config, options = _plan(src, dst, method, settings or {}, options)
    calibration = Calibration.prepare(source, method, chosen.needs(config, source.shape), options, progress)
    if calibration:
        asked = {**_settings(method, config, options), "calibration": calibration.hash}
    else:  # nothing is left to resolve: `8` and `self=8` are the same student
        asked = _settings(method, chosen.resolve(config, source.shape, {}), options)
    if not overwrite and _complete(source, dst, asked, calibration is not None):
        tidy(dst)
        progress.say(f"{dst} is complete: it was made from this source with these settings")
        return dst
    try:
        with disk_errors(dst), ExitStack() as until_done:
            output = open_output(dst, {**asked, "source": _stamp(source)}, overwrite=overwrite)
            until_done.enter_context(dropped_on_error(output, JOURNAL, futile=FUTILE))
            answers = calibration.answers(source, chosen, config, progress) if calibration else {}
            resolved = chosen.resolve(config, source.shape, answers)
            job = Job.plan(source, chosen, resolved, answers, options.dtype, output.work / FOUND)
            made = _config(source, job.student, method, options.dtype)
            digests = _write(source, made, job, output, options, calibration, progress)
            # only now: until then, stopped work would start from repaired tensors and repair them again
            shutil.rmtree(output.work / REPAIRED, ignore_errors=True)
            repaired = {"repaired_by": asdict(options.repairing)} if calibration and options.repair else {}
            lineage = descend(
                source.origin,
                inputs=_inputs(source, asked),
                stage="convert",
                settings={**_settings(method, resolved, options), **repaired},
                calibration=calibration.hash if calibration else None,
                wall_seconds=round(time.monotonic() - started, 3),
            )
            found, sites = dict(chosen.found(config, source.shape, answers)), job.found()
            if sites:
                found["sites"] = sites
            if found:
                lineage["steps"][-1]["found"] = found
            (output.work / FOUND).unlink(missing_ok=True)
            write_json(output.work / MANIFEST, {**lineage, "hash": content_hash(made, job.specs, digests)})
            output.commit()
            remember(source.origin)
    except KeyboardInterrupt:
        raise Interrupted("stopped", where=dst, next="the same command continues") from None
    return output.path


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    src: str | Path, dst: Path, method: str, settings: Mapping[str, Any], options: ConvertSettings
) -> tuple[Checkpoint, Any, ConvertSettings]:
    """Open the source and decode all settings; refuse what cannot be converted before anything is read or written."""
    source, chosen = Checkpoint.open(src), methods.get(method)
    source.shape = rooted(source.shape, source.lineage)
    reads = {"source": source.path, "root teacher": known_root(source), "calibration text": options.calibration}
    check_apart(dst, reads)
    if options.calibration is None:
        settings = {**chosen.without_text, **settings}
    config = decode(chosen.Config, settings, method)
    if rehoused(source.config, source.family, source.shape, method, config):
        source = Rehoused(source)
        source.shape = rooted(source.shape, source.lineage)
    _config(source, chosen.student(config, source.shape), method, options.dtype)
    carried(source.path)
    return source, config, replace(options, repair=_repairs(chosen, config, source, options))


def _repairs(method: Method[Any], config: Any, source: Checkpoint, options: ConvertSettings) -> tuple[str, ...]:
    """The roles to repair: the user's, else the method's if the student differs from its source."""
    if source.family.encoder_decoder:
        if options.repair:
            raise SettingError(
                "repair does not support encoder-decoders", where="convert", got=options.repair, next="omit --repair"
            )
        return ()
    if options.repair is not None:
        return options.repair
    if options.calibration is None or method.student(config, source.shape).shape == source.shape:
        return ()
    return tuple(role for role in method.repairs(config) if role not in MLP or role in source.family.body.mlp)


def _config(source: Checkpoint, student: Student, method: str, dtype: str) -> dict[str, Any]:
    """The student's config.json."""
    return student_config(source.config, source.family, source.shape, student, method=method, dtype=dtype)


def _settings(method: str, config: Any, options: ConvertSettings) -> dict[str, Any]:
    """The settings that decide a student, in one flat mapping."""
    return {"method": method, **spelled(config), **options.identity()}


def _complete(source: Checkpoint, dst: Path, asked: Mapping[str, Any], calibrated: bool) -> bool:
    """Is this student there already? The source is read only if the settings agree."""
    manifest = read_json(dst / MANIFEST)
    if not isinstance(manifest, dict) or not manifest.get("steps"):
        return False
    if not calibrated and fingerprint(manifest["steps"][-1]["settings"]) != fingerprint(asked):
        return False
    return bool(manifest.get("inputs") == _inputs(source, asked))


def _inputs(source: Checkpoint, asked: Mapping[str, Any]) -> str:
    """The hash of settings and source, stored in a finished student."""
    return fingerprint({"stage": "convert", **asked, "source": source.hash()})


def _stamp(source: Checkpoint) -> str:
    """Identifies a source without reading its tensors: unfinished work is recognised by it."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]
    return fingerprint([source.config, files])


# --- the student's files --------------------------------------------------------------------------------------------


def _check_space(source: Checkpoint, output: Output, specs: Mapping[str, TensorSpec], writer: Writer) -> None:
    """Raise OutputError if the disk cannot hold what is left to write."""
    needed = sum(spec.nbytes for name, spec in specs.items() if name not in writer.digests)
    needed += sum((source.path / name).stat().st_size for name in carried(source.path)) + SLACK
    free = free_bytes(output.work)
    if free < needed:
        raise OutputError(
            "not enough space on the disk",
            where=output.path,
            got=f"{free / 1e9:.2f} GB free",
            allowed=f"{needed / 1e9:.2f} GB or more",
            next="free some space, or choose another path",
        )


def _write(
    source: Checkpoint,
    config: Mapping[str, Any],
    job: Job,
    output: Output,
    options: ConvertSettings,
    calibration: Calibration | None,
    progress: Progress,
) -> Mapping[str, str]:
    """Write and repair the student, without its manifest, and return the hash of each tensor."""
    size, resumed = options.shard_size, output.resumed
    with Writer(output.work, job.specs, shard_bytes=size, resume=resumed, origin=source.path) as writer:
        _check_space(source, output, job.specs, writer)
        if calibration is None and job.method.without_text:
            progress.say("without --calibration TEXT, only weights are read; with it, more quality is kept")
        job.run(writer, progress)
        carry_over(source, output.work)
        if config == source.config:  # byte for byte
            shutil.copyfile(source.path / "config.json", output.work / "config.json")
        else:
            write_json(output.work / "config.json", config)
        if calibration and options.repair:
            from kvfold.repair.layers import repair_in_place  # loads transformers

            text, queries = calibration.text(), job.queries()
            repair_in_place(source, output, options.repair, text, options.repairing, writer, queries, progress)
        writer.close()
    return writer.digests
