"""What produced a record: the versions of the packages that compute, and the commit of kvfold's source."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

from kvfold import __version__
from kvfold.errors import KvfoldError
from kvfold.inputs import read_text


def versions() -> dict[str, str]:
    """Versions of kvfold, Python and the packages that compute."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {"kvfold": __version__, "python": platform.python_version()} | {name: _installed(name) for name in names}


_installed = cache(importlib.metadata.version)  # which searches the path and parses a file each time


def commit() -> str | None:
    """The commit of the source that runs, with `+` if files differ from it; None outside a checkout of kvfold.

    A kvfold that is installed inside another repository has none.
    """
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if package.parent.name != "src" or not (root / ".git").exists() or not _is_kvfolds(root / "pyproject.toml"):
        return None
    if _git(root, "ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())) is None:
        return None
    return _git(root, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*") or None


def _is_kvfolds(project: Path) -> bool:
    try:
        return bool(re.search(r'^name = "kvfold"$', read_text(project), re.M))
    except KvfoldError:
        return False


def _git(folder: Path, *words: str) -> str | None:
    """The answer of git about a folder, whatever repository the environment names; None without an answer."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
