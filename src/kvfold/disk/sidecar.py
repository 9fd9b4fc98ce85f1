"""Files beside the weights: which of them go with a student, and what tells one tokenizer from another.

Only kinds of file that are known to be data go along: tokenizer, chat templates, generation and preprocessor settings,
licence. Code never does, and neither does `auto_map`, which names it: a class of the teacher would load the tensors of
a student into a model that does not have them. Weights of other frameworks are the teacher's too.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvfold.disk.output import fingerprint, read_json, write_json
from kvfold.disk.shards import lies_inside
from kvfold.errors import CheckpointError
from kvfold.inputs import LARGE, check_regular, read_bytes

AUTO_MAP = "auto_map"
"""The key of config.json, tokenizer_config.json and others that names code beside them."""

_CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "tekken.json", "*.tiktoken"),
    *("tokenizer.model", "tokenizer.model.v[0-9]*", "spiece.model", "sentencepiece*.model", "*.spm"),
    *("chat_template.json", "*.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
)
_TEMPLATES = "additional_chat_templates"  # a folder of `.jinja` files
_LEGAL = re.compile(r"licen[cs]e|notice|copying|copyright|use[-_ ]?policy", re.I)
_LEGAL_SUFFIX = re.compile(r"(\.(txt|md|rst|html|pdf|\d+))?", re.I)

_WORDS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
_SPECIAL = ("bos_token", "eos_token", "sep_token", "cls_token")  # what is put around texts; padding is never read
_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


# --- copying --------------------------------------------------------------------------------------------------------


def carried(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that go with a student, by their paths in the folder.

    Raises CheckpointError for one that is a link to elsewhere: what it holds may not be the checkpoint's to give.
    """
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and _goes_along(path.name)]
    templates = folder / _TEMPLATES
    if templates.is_dir():
        names += [f"{_TEMPLATES}/{path.name}" for path in sorted(templates.glob("*.jinja")) if path.is_file()]
    for name in names:
        if not lies_inside(folder, name):
            raise CheckpointError(
                "is a link to a file outside the checkpoint's directory",
                where=folder / name,
                next="do not trust this checkpoint; if the file is yours, copy it in",
            )
        check_regular(folder / name, limit=LARGE)
    return [Path(name) for name in names]


def _goes_along(name: str) -> bool:
    """Is a file of this name one of the known kinds?"""
    if name.startswith("."):
        return False
    if _LEGAL.search(name):
        return _LEGAL_SUFFIX.fullmatch(Path(name).suffix) is not None
    return any(fnmatch(name, pattern) for pattern in _CARRIED)


def carry_over(source: Path, folder: Path) -> None:
    """Copy what goes with a student from one folder to another; settings go without `auto_map`."""
    for name in carried(source):
        (folder / name).parent.mkdir(exist_ok=True)
        settings = read_json(source / name) if name.suffix == ".json" and "config" in name.stem else None
        if isinstance(settings, dict) and without_code(settings) != settings:
            write_json(folder / name, without_code(settings))
        else:
            shutil.copyfile(source / name, folder / name)


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without `auto_map`, also in its parts."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != AUTO_MAP
    }


# --- the tokenizer --------------------------------------------------------------------------------------------------


def tokenizer_identity(folder: Path) -> dict[str, Any]:
    """What decides the ids of a text, from the files of a tokenizer; empty where there is none.

    `words` is the hash of vocabulary and rules. Beside it stand the special tokens that are put around texts, and what
    the tokenizer's settings add to its definition. What truncation and padding are set to does not count, and nothing
    that is unset is named.
    """
    fast = read_json(folder / "tokenizer.json")
    fast = fast if isinstance(fast, dict) else None
    if fast is not None:
        words = fingerprint({key: value for key, value in fast.items() if key not in ("truncation", "padding")})
    else:
        there = {name: hashlib.sha256(read_bytes(folder / name, limit=LARGE)).hexdigest() for name in _words(folder)}
        if not there:
            return {}
        words = fingerprint(there)
    settings = _settings(folder)
    found: dict[str, Any] = {name: _text(settings.get(name)) for name in _SPECIAL}
    found |= {name: settings.get(name) for name in _SETTINGS}
    found["added_tokens"] = _added(settings, fast or {})
    return {"words": words, **{name: value for name, value in found.items() if value not in (None, "", [])}}


def tokenizer_hash(folder: Path) -> str | None:
    """Hash of what decides the ids of a text; None where there is no tokenizer."""
    identity = tokenizer_identity(folder)
    return fingerprint(identity) if identity else None


def _words(folder: Path) -> list[str]:
    return [name for name in _WORDS if (folder / name).is_file()]


def _settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings, with special_tokens_map.json and added_tokens.json where transformers reads them."""
    config, older = (read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    config = config if isinstance(config, dict) else {}
    if "added_tokens_decoder" in config:
        return config
    added = read_json(folder / "added_tokens.json")
    return {
        **config,
        **(older if isinstance(older, dict) else {}),
        **({"added_tokens_decoder": dict.fromkeys(added)} if isinstance(added, dict) else {}),
    }


def _text(token: Any) -> Any:
    """A special token as its text; settings have it as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _added(settings: Mapping[str, Any], fast: Mapping[str, Any]) -> list[str]:
    """Tokens that the settings add and that the definition does not know."""
    known: set[Any] = set()
    model, added = fast.get("model"), fast.get("added_tokens")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        known |= set(model["vocab"])
    if isinstance(added, list):
        known |= {str(_text(each)) for each in added}
    decoder = settings.get("added_tokens_decoder")
    found = [each or key for key, each in decoder.items()] if isinstance(decoder, dict) else []
    for name in _EXTRA:
        extra = settings.get(name)
        found += list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return sorted({str(_text(each)) for each in found} - known)
