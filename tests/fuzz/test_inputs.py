"""A seeded mutator over recipes, `--set`, flags and the files of a run: one clear line or success, and never a fault.

Every case is a function of its seed. Stages are replaced by a stop, so that a case ends where its settings are decoded.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

import kvfold
from kvfold.cli.commands import COMMANDS
from kvfold.cli.main import run_command
from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.errors import KvfoldError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SECONDS = 20  # a case takes milliseconds; one that takes this long hangs
LONGEST = 4100  # characters of a message

NASTY_YAML = [
    *("null", "true", "no", "-1", "0", "3.7", "1e400", "-.inf", ".nan", "1000000000000000000000000000000", '""', '" "'),
    *('"\\0"', '"\\e[31mred"', '"a\\nb"', '"a/b"', '"../up"', '"/etc/passwd"', "[]", "{}", "[[]]", "[null]", "{a: 1}"),
    *("{1: 2}", "{a: {b: {c: []}}}", "20M", "1e400M", "2026-01-01", "12:30:45", "0x1f", "!!python/name:os.system", "~"),
    *("!!set {a, b}", "!!binary aGk=", "!!timestamp 2026-01-01", "!!int x", "!!float x", "!!omap [a: 1]", "&a [*a]"),
    *("&b {x: *b}", "*nowhere", "[", "{", "'", "|", "!!null x", "<<", "{<<: [1]}", "9" * 5000, "x" * 5000, '"\\uD800"'),
    *("[" * 70 + "]" * 70, "[" * 3000 + "]" * 3000, "[1, [2]]", "1,2,,3", ",", '"\U0001f600"', "-0.0", "1e-400", "NaN"),
    *(
        "9223372036854775808",
        "-9223372036854775809",
        "4294967296",
        "{? [a] : b}",
        "{? {a: 1} : b}",
        "!!str 1",
        "[a, a]",
    ),
]
NASTY_FLAGS = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "0.5",
        "-0.5",
        "20M",
        "1e5M",
        "9T",
        "none",
    ),
    *("9" * 30, "9" * 5000, "9223372036854775807", "9223372036854775808", "1,,2", ",", "a,b", "self=8", "self=", "=,="),
    *("x" * 5000, "a\x00b", "\x1b[31m", "\udcff", "é", "😀", "a\nb", "../x", "/dev/zero", "/dev/null", ".", "/", "{}"),
    *("kvfold:demo", "loss<=teacher", "loss<=1e400", "loss<1e400*teacher-9e999", "kl@3<=1", "passkey@99999999999<=1"),
    *(
        "loss>=nan",
        "copy_loss@16<=teacher+0.1",
        "<=",
        "kl+0.5ce",
        "kl+1e400ce",
        "-1kl",
        "attention:0.1,kl:0.9",
        "kl:nan",
    ),
    *(
        "True",
        "TRUE",
        "yes",
        "1.0",
        "1.5",
        "0x10",
        "1_000",
        "٣",
        "float32",
        "bfloat16",
        "mean",
        "cosine",
        "local",
        "gqa",
    ),
]
NASTY_JSON: list[Any] = [
    *(None, True, False, -1, 0, 1, 0.5, 10**30, 10**400, 1e308, float("nan"), float("inf"), float("-inf"), "", " "),
    *(
        "<script>alert(1)</script>",
        "\x00",
        "\x1b[31m",
        "\u202e",
        "a/b",
        "../x",
        "x" * 3000,
        [],
        {},
        [[]],
        [None],
        "nan",
    ),
    *(
        {"a": 1},
        {"": None},
        [{}],
        {"16": "x"},
        [1, [2, [3]]],
        "\u2028",
        "' onload='x",
        "]]>",
        "&amp;",
        "a\nb",
        "$x$",
        "$x",
    ),
]


class Stop(KvfoldError):
    """Where a stage would begin."""


def _stop(*given: Any, **named: Any) -> Any:
    raise Stop("stopped by the test")


@pytest.fixture(scope="module", autouse=True)
def _nothing_long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No stage runs: settings are decoded before. What an odd `--out` makes lies in a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        stop_stages(patch.setattr)
        yield


def stop_stages(replace: Callable[[object, str, Any], None]) -> None:
    """Replace every stage that reads weights by a stop, and the measurement of this machine."""
    for name, where in kvfold._WHERE.items():
        if name in ("inspect", "convert", "uptrain", "evaluate", "bench", "compare", "cloze", "export"):
            replace(importlib.import_module(where), name, _stop)
    for name in ("_plans", "pretrain", "uptrain", "evaluate", "bench", "convert"):
        replace(importlib.import_module("kvfold.run.runner"), name, _stop)
    replace(importlib.import_module("kvfold.train.pretrain"), "text_facts", _stop)
    replace(importlib.import_module("kvfold.predict.roofline"), "measure", _stop)
    for name in ("_download", "_unpack"):  # nothing is downloaded; what is asked for is looked at before
        replace(importlib.import_module("kvfold.hf.fetch"), name, _stop)


class Hangs(BaseException):
    """A case that took too long."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hangs


def trouble(arguments: list[str]) -> str | None:
    """What is wrong with how a command ends, or None: its status, its lines, and how long it takes."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    raw = [io.BytesIO(), io.BytesIO()]
    out, err = (io.TextIOWrapper(each, encoding="utf-8", write_through=True) for each in raw)
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(arguments)
    except Hangs:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        for kind, handler in before.items():
            signal.signal(kind, handler)
    said, lines = (each.getvalue().decode() for each in raw)
    told = lines.splitlines()[-1:] or [""]
    if code not in (0, 2, 3):
        return f"ends with {code}: {lines[-300:]!r}"
    if "Traceback" in lines:
        return "prints a traceback"
    if code and not told[0].startswith("kvfold: "):
        return f"says nothing: {lines[-300:]!r}"
    if any(not line.isprintable() for line in (lines + said).split("\n")):
        return f"prints control characters: {lines[:300]!r}"
    if max(map(len, lines.split("\n"))) > LONGEST:
        return f"prints {len(lines)} characters"
    return None


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def mutate(value: Any, draw: random.Random, nasty: Callable[[], Any]) -> None:
    """Change one to three places of a tree: drop, rename, replace or repeat what is there, or add."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_paths(value))
        if not places:
            return
        *above, key = draw.choice(places)
        parent = _at(value, tuple(above))
        what = draw.random()
        if what < 0.1:
            del parent[key]
        elif what < 0.2 and isinstance(parent, dict):
            parent[str(key) + draw.choice(("", "x", "_", ".y", " "))] = parent.pop(key)
        elif what < 0.27 and isinstance(parent, dict):
            parent[draw.choice(("data", "seed", "tokens", "method", "x", "name", "", "loss"))] = nasty()
        else:
            parent[key] = nasty()


# --- recipes and --set -----------------------------------------------------------------------------------------------


def recipe_case(seed: int, folder: Path) -> list[str]:
    """A recipe of this repository with something wrong, and how it is run."""
    draw = random.Random(seed)
    path = draw.choice(RECIPES)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if draw.random() < 0.8:
        content["source"] = "kvfold:demo"
        if draw.random() < 0.7:
            content.pop("pretrain", None)
    words: list[str] = []

    def nasty() -> str:
        words.append(draw.choice(NASTY_YAML))
        return f"@@{len(words) - 1}@@"

    mutate(content, draw, nasty)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    for number, word in enumerate(words):
        text = text.replace(f"'@@{number}@@'", word)
    octets = bytearray(text.encode())
    if draw.random() < 0.2:
        for _ in range(draw.choice((1, 1, 2, 5))):
            octets[draw.randrange(len(octets))] = draw.choice((0, 9, 10, 32, 34, 38, 42, 58, 91, 123, 128, 255))
    if draw.random() < 0.05:
        octets = octets[: draw.randrange(len(octets))]
    if draw.random() < 0.05:
        lines = octets.split(b"\n")
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
        octets = bytearray(b"\n".join(lines))
    shutil.rmtree(folder / "recipes", ignore_errors=True)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "recipes" / path.name).write_bytes(octets)
    return ["run", str(folder / "recipes" / path.name), "--out", str(folder / "out")]


_KEYS = ("source", "seeds", "matrix", "name", "uptrain.tokens", "bench.context", "convert.after", "convert", "evaluate")
_KEYS += (
    "a..b",
    ".a",
    "a.",
    "",
    ".",
    "a" * 5000,
    ".".join("a" * 200),
    "source.x",
    "matrix.convert.kv_heads",
    "pretrain",
)
_KEYS += (
    "convert.kv_heads",
    "uptrain",
    "control",
    "finetune",
    "plan.batch",
    "extends",
    "\x00",
    "é",
    "seeds.0",
    "data.x.y",
)


def set_case(seed: int, folder: Path) -> list[str]:
    """A recipe of this repository, and odd changes."""
    draw = random.Random(seed)
    words = ["run", str(draw.choice(RECIPES)), "--out", str(folder / "out")]
    for _ in range(draw.choice((1, 1, 2))):
        value = draw.choice(NASTY_YAML) if draw.random() < 0.7 else draw.choice(NASTY_FLAGS)
        words += ["--set", draw.choice(_KEYS) + draw.choice(("=", "=", "=", "", "==", " = ")) + value]
    return words


# --- flags ----------------------------------------------------------------------------------------------------------

_USUAL = {
    "convert": ["SRC", "DST"],
    "plan": ["SRC"],
    "uptrain": ["SRC", "DST", "--data", "stdlib", "--tokens", "1M"],
    "evaluate": ["SRC", "--data", "stdlib"],
    "bench": ["SRC", "SRC"],
    "inspect": ["SRC", "--data", "stdlib"],
    "compare": ["SRC", "SRC", "--data", "stdlib"],
    "cloze": ["stdlib", "DST"],
    "report": ["DST"],
    "fetch": ["smollm2"],
    "serve-check": ["SRC", "--engine", "ctranslate2"],
    "run": ["DST"],
    "demo": ["--out", "DST"],
    "pretrain": ["SRC", "DST", "--tokens", "1M"],
    "export": ["SRC", "DST", "--to", "gguf"],
    "methods": [],
    "families": [],
}


def flag_case(seed: int, folder: Path) -> list[str]:
    """A command with values that its flags were not made for."""
    draw = random.Random(seed)
    name = draw.choice(list(COMMANDS))
    known = COMMANDS[name]
    flags = [flag for panel in known.panels() for flag in panel.flags if flag.values]
    places = {"SRC": "kvfold:demo", "DST": str(folder / "out")}
    words = [places.get(word, word) for word in _USUAL[name]]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if flags and draw.random() < 0.8:
            flag = "--" + draw.choice(flags).name.replace("_", "-")
        else:
            flag = draw.choice(
                ("--overwrite", "--json", "--records", "--name", "--teacher", "--out", "--nothing", "--")
            )
        words += [flag] if draw.random() < 0.05 else [flag, draw.choice(NASTY_FLAGS)]
    if draw.random() < 0.15 and words:
        words[draw.randrange(len(words))] = draw.choice(NASTY_FLAGS)
    if draw.random() < 0.05 and words:
        del words[draw.randrange(len(words))]
    return [draw.choice(NASTY_FLAGS) if draw.random() < 0.02 else name, *words]


# --- records and run folders ------------------------------------------------------------------------------------------


def _a_run(folder: Path) -> Path:
    """A run of this repository: records of every kind, a checkpoint with its lineage and log, the recipe."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "records").mkdir(parents=True)
    for each in _records():
        record.write(each, run / "records")
    made = run / "uptrained" / "x"
    made.mkdir(parents=True)
    demo = ROOT / "src" / "kvfold" / "assets" / "demo"
    lineage = json.loads((demo / "kvfold.json").read_text())
    step = {"stage": "convert", "source": lineage["hash"], "settings": {"method": "gqa", "kv_heads": 2}, "tokens": None}
    found = {"sites": {"0": {"lossless": [1], "lost": [0.1, 0.2]}, "1": {"planes": [[0, 1], [2, 3]], "lost": 0.5}}}
    found |= {"budget": 0.5, "mix": {"kv_heads": [1, 2], "kl": 0.1}, "uniform": {"kv_heads": 2, "kl": 0.2}}
    found |= {"chosen": {"layout": "0 0", "kl": 0.1}, "alike": {"layout": "0 1", "kl": 0.1}}
    trained = {**step, "stage": "uptrain", "settings": {"data": "x", "tokens": 9, "loss": "kl"}, "tokens": 2000}
    lineage["steps"] += [{**step, "found": found}, trained]
    (made / "kvfold.json").write_text(json.dumps(lineage))
    shutil.copy(demo / "config.json", made / "config.json")
    lines = [
        {"step": n, "tokens": 20 * n, "loss": 3 / n, "ce": 3 / n, "lr": 0.1, "seconds": n, "tokens_per_second": 10.0}
        for n in range(1, 6)
    ]
    (made / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(ROOT / "recipes" / "demo-pretrain.yaml", run / "recipe.yaml")
    return run


@cache
def _records() -> list[Record]:
    """Two small records of each kind that a report reads, from this repository's results."""
    found = record.read_all(ROOT / "results")
    chosen = []
    for kind in ("evaluate", "bench", "pretrain"):
        ranked = sorted((each for each in found if each.kind == kind), key=lambda each: (len(str(each)), each.name))
        chosen += ranked[:: max(1, len(ranked) // 2)][:2]
    assert {each.kind for each in chosen} >= {"evaluate", "bench"}
    return chosen


def report_case(seed: int, folder: Path) -> list[str]:
    """A run's folder in which one or two files are not what they should be."""
    draw = random.Random(seed)
    run = _a_run(folder)
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice(sorted(each for each in run.rglob("*") if each.is_file()))
        text = path.read_text(errors="replace")
        if path.suffix == ".json" and draw.random() < 0.8:
            with contextlib.suppress(ValueError):
                content = json.loads(text)
                mutate(content, draw, lambda: draw.choice(NASTY_JSON))
                text = json.dumps(content)
        elif path.suffix == ".jsonl" and draw.random() < 0.8:
            lines = text.splitlines()
            at = draw.randrange(len(lines)) if lines else 0
            for number, line in enumerate(lines):
                if number == at:
                    content = json.loads(line)
                    mutate(content, draw, lambda: draw.choice(NASTY_JSON))
                    lines[number] = json.dumps(content)
            text = "\n".join(lines)
        octets = bytearray(text.encode())
        if draw.random() < 0.15 and octets:
            octets[draw.randrange(len(octets))] = draw.choice((0, 34, 91, 123, 125, 128, 255))
        if draw.random() < 0.08:
            octets = octets[: draw.randrange(len(octets) + 1)]
        if draw.random() < 0.03:
            octets = bytearray(b"[" * 100_000)
        path.write_bytes(octets)
    return ["report", str(run)]


CASES = {"recipe": recipe_case, "set": set_case, "flag": flag_case, "report": report_case}


def troubles(kind: str, seeds: range, folder: Path) -> dict[str, list[str]]:
    """What goes wrong in the cases of these seeds, with the seeds and the first command of each fault."""
    found: dict[str, list[str]] = {}
    for seed in seeds:
        arguments = CASES[kind](seed, folder)
        said = trouble(arguments)
        if said is not None:
            found.setdefault(said, []).append(f"{kind} {seed}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("recipe", 12), ("set", 10), ("flag", 30), ("report", 1)])
def test_a_few_mutations_cost_one_line_each(kind: str, count: int, tmp_path: Path) -> None:
    assert troubles(kind, range(count), tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("recipe", 80), ("set", 60), ("flag", 250), ("report", 10)])
def test_many_mutations_cost_one_line_each(kind: str, count: int, tmp_path: Path) -> None:
    assert troubles(kind, range(1000, 1000 + count), tmp_path) == {}
