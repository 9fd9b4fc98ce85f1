"""Files beside the weights: those that are copied to a student, and the identity of a tokenizer.

Only known data files are copied: tokenizer, chat templates, generation and preprocessor settings, licence. Code is not,
and neither is `auto_map`, which names code: the teacher's class does not have the student's tensors. Weights of other
frameworks belong to the teacher.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvfold.contracts.family import without_code
from kvfold.disk.output import fingerprint, read_object, write_json
from kvfold.errors import CheckpointError
from kvfold.inputs import LARGE, check_regular, lies_inside, read_bytes

_CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "tekken.json", "*.tiktoken"),
    *("tokenizer.model", "tokenizer.model.v[0-9]*", "spiece.model", "sentencepiece*.model", "*.spm"),
    *("chat_template.json", "*.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
)
_TEMPLATES = "additional_chat_templates"  # folder of `.jinja` files
_LEGAL = re.compile(r"licen[cs]e|notice|copying|copyright|use[-_ ]?policy", re.I)
_LEGAL_SUFFIX = re.compile(r"(\.(txt|md|rst|html|pdf|\d+))?", re.I)

_WORDS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
_SPECIAL = ("bos_token", "eos_token", "sep_token", "cls_token")  # tokens put around texts; padding is never read
_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


# --- copying --------------------------------------------------------------------------------------------------------


def carried(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that are copied to a student, by their paths in the folder.

    Raises CheckpointError for a link out of the folder: its content may not belong to the checkpoint.
    """
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and _goes_along(path.name)]
    templates = folder / _TEMPLATES
    if templates.is_dir():
        names += [f"{_TEMPLATES}/{path.name}" for path in sorted(templates.glob("*.jinja")) if path.is_file()]
    for name in names:
        if not lies_inside(folder, name):
            what = "is a link to a file outside the checkpoint's directory"
            remedy = "do not trust this checkpoint; if the file is yours, copy it in"
            raise CheckpointError(what, where=folder / name, next=remedy)
        check_regular(folder / name, limit=LARGE)
    return [Path(name) for name in names]


def _goes_along(name: str) -> bool:
    if name.startswith("."):
        return False
    if _LEGAL.search(name):
        return _LEGAL_SUFFIX.fullmatch(Path(name).suffix) is not None
    return any(fnmatch(name, pattern) for pattern in _CARRIED)


def carry_over(source: Path, folder: Path) -> None:
    """Copy the files that belong to a student from one folder to another, settings without their `auto_map`."""
    for name in carried(source):
        (folder / name).parent.mkdir(exist_ok=True)
        settings = read_object(source / name) if name.suffix == ".json" and "config" in name.stem else {}
        kept = without_code(settings)
        if kept == settings:
            shutil.copyfile(source / name, folder / name)
        else:
            write_json(folder / name, kept)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def tokenizer_identity(folder: Path) -> dict[str, Any]:
    """Everything that affects the ids of a text, from the files of a tokenizer; empty if there is none.

    `words` is the hash of vocabulary and rules. The other keys are the special tokens that are put around texts, and
    what the settings add to the definition, if they are set. Truncation and padding do not count.
    """
    fast = read_object(folder / "tokenizer.json")
    definition: dict[str, Any] = {key: value for key, value in fast.items() if key not in ("truncation", "padding")}
    if not fast:
        files = [name for name in _WORDS if (folder / name).is_file()]
        definition = {name: hashlib.sha256(read_bytes(folder / name, limit=LARGE)).hexdigest() for name in files}
        if not definition:
            return {}
    settings = _settings(folder)
    found: dict[str, Any] = {name: _text(settings.get(name)) for name in _SPECIAL}
    found |= {name: settings.get(name) for name in _SETTINGS}
    found["added_tokens"] = _added(settings, fast)
    known = {name: value for name, value in found.items() if value not in (None, "", [])}
    return {"words": fingerprint(definition), **known}


def _settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings, with special_tokens_map.json and added_tokens.json if transformers reads them."""
    config = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    added = read_object(folder / "added_tokens.json")
    more = {"added_tokens_decoder": dict.fromkeys(added)} if added else {}
    return {**config, **read_object(folder / "special_tokens_map.json"), **more}


def _text(token: Any) -> Any:
    """The text of a special token, which settings hold as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _added(settings: Mapping[str, Any], fast: Mapping[str, Any]) -> list[str]:
    """Tokens that the settings add to the definition."""
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
