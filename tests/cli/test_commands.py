"""The command line from end to end: exit codes, one line for a mistake, Ctrl-C at every stage, a whole run."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from kvfold.cli.commands import COMMANDS
from kvfold.cli.main import run_command
from kvfold.disk import record
from kvfold.disk.checkpoint import Writer
from kvfold.methods import all_methods, gqa

Run = Callable[..., tuple[int, str, str]]
CONVERT = ["convert", "teacher", "student", "--kv-heads", "2"]
SMALL = ["--data", "text.txt", "--tokens", "96"]
UPTRAIN = ["uptrain", "teacher", "out", *SMALL, "--sequence-length", "16", "--batch-size", "2", "--loss", "ce"]
EVALUATE = ["evaluate", "teacher", *SMALL, "--sequence-length", "32", "--copy-distances", "4"]
EVALUATE += ["--copy-trials", "2", "--samples", "1", "--sample-tokens", "2"]
BENCH = ["bench", "teacher", "--context", "8", "--batch", "1", "--new-tokens", "2", "--repeats", "1", "--no-fp8"]
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "source": "teacher",
    "data": "text.txt",
    "heldout": "heldout.txt",
    "convert": {"method": "gqa"},
    "uptrain": {"tokens": 96, "loss": "kl", "sequence_length": 16, "batch_size": 2},
    "evaluate": {
        "tokens": 96,
        "sequence_length": 32,
        "copy_distances": [4],
        "copy_trials": 2,
        "samples": 1,
        "sample_tokens": 2,
        "gate": "loss<=teacher+50",
    },
    "bench": {"context": [8], "batch": [1], "new_tokens": 2, "repeats": 1, "fp8": False},
    "matrix": {"convert.kv_heads": [2, 1]},
}


@pytest.fixture(autouse=True)
def here(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with a teacher, texts, a cache and signal handlers of its own."""
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path / "here"
    folder.mkdir()
    tiny_checkpoint().rename(folder / "teacher")
    for name in ("text", "heldout"):
        lines = (f"{name} {n}: {n * n} brown foxes jump over {n % 7} dogs\n" for n in range(60))
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    yield folder
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def _tree(folder: Path) -> dict[str, int]:
    """Every file below a folder, with when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _told(said: tuple[int, str, str], what: str, code: int = 2) -> None:
    """A mistake is told in one line, and nothing else is said."""
    assert said[0] == code, said
    assert said[1] == ""
    assert said[2].startswith("kvfold: ")
    assert said[2].count("\n") == 1, said[2]
    assert what in said[2]


# --- mistakes ------------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "teacher" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _recipe(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "recipe.yaml").write_text(text) and None


def _recipe_with(**changes: Any) -> Callable[[Path], None]:
    return _recipe(json.dumps({**RECIPE, **changes}))


def _truncated(folder: Path) -> None:
    path = folder / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _index(file: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "teacher" / "model.safetensors").rename(folder / "stolen.safetensors")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
        (folder / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _other_words(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "other")
    path = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = list(tokenizer["model"]["vocab"])
    words[10], words[11] = words[11], words[10]
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    path.write_text(json.dumps(tokenizer))


def _kept(folder: Path) -> None:
    (folder / "student").mkdir()
    (folder / "student" / "notes.txt").write_text("mine")


def _nothing(folder: Path) -> None:
    """The command alone is the mistake."""


TWO = {"convert.kv_heads": [2]}
BELOW_A_FILE = ["convert", "teacher", "text.txt/student", "--kv-heads", "2"]
EMPTY = lambda folder: (folder / "text.txt").write_text("") and None  # noqa: E731
QUANTISED = _config(quantization_config={"quant_method": "gptq", "bits": 4})
MISTAKES: dict[str, tuple[list[str], Callable[[Path], None], str]] = {
    "unknown command": (["fold"], _nothing, "no command is named 'fold'; allowed: plan, inspect, convert"),
    "near command": (["covert"], _nothing, "did you mean 'convert'?"),
    "unknown option of all": (["--verson"], _nothing, "--version"),
    "unknown flag": (["convert", "teacher", "student", "--kv-head", "2"], _nothing, "--kv-heads"),
    "unexpected argument": (
        [*CONVERT, "more"],
        _nothing,
        "convert: unexpected argument more; see kvfold convert --help",
    ),
    "flag without its value": (["plan", "teacher", "--kv-heads"], _nothing, "plan: argument --kv-heads: expected one"),
    "no such config": (["pretrain", "nowhere.json", "out"], _nothing, "nowhere.json: no such file"),
    "report of a file": (["report", "text.txt"], _nothing, "text.txt: is not a directory"),
    "missing argument": (["convert", "teacher"], _nothing, "required: DST; see kvfold convert --help"),
    "missing setting": (["convert", "teacher", "student"], _nothing, "kv_heads is needed"),
    "heads that do not divide": ([*CONVERT[:-1], "3"], _nothing, "choose 1, 2 or 4"),
    "no number": ([*CONVERT, "--shard-size", "big"], _nothing, "shard_size cannot be 'big'"),
    "unknown method": ([*CONVERT, "--method", "gga"], _nothing, "did you mean 'gqa'?"),
    "another method's setting": ([*CONVERT, "--method", "identity"], _nothing, "unknown setting 'kv_heads'"),
    "unknown architecture": (CONVERT, _config(model_type="lama"), "did you mean 'llama'?"),
    "quantised": (CONVERT, QUANTISED, "quantised (gptq)"),
    "no such place": (["plan", "nowhere", "--kv-heads", "2"], _nothing, "nowhere"),
    "truncated shard": (CONVERT, _truncated, "model.safetensors"),
    "missing shard": (CONVERT, _index("model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"),
    "index outside": (CONVERT, _index("../stolen.safetensors"), "../stolen.safetensors"),
    "empty text to train on": (UPTRAIN, EMPTY, "the text is empty"),
    "empty text to evaluate": (EVALUATE, EMPTY, "the text is empty"),
    "no such text": ([*EVALUATE, "--data", "words.txt"], _nothing, "words.txt"),
    "another tokenizer": ([*EVALUATE, "--teacher", "other"], _other_words, "tokenizer"),
    "no length": (UPTRAIN[:5], _nothing, "--tokens"),
    "unknown loss": ([*UPTRAIN, "--loss", "kll"], _nothing, "did you mean 'kl'?"),
    "bad gate": ([*EVALUATE, "--gate", "lost<=1"], _nothing, "did you mean 'loss'?"),
    "somebody's output": (CONVERT, _kept, "is not a kvfold output"),
    "the teacher as output": (["convert", "teacher", "teacher", "--kv-heads", "2"], _nothing, "never changed"),
    "no place to write": (BELOW_A_FILE, _nothing, "a part of the path is a file"),
    "no place for records": ([*EVALUATE, "--records", "text.txt/records"], _nothing, "a part of the path is a file"),
    "bench of nothing": (["bench", "nowhere"], _nothing, "nowhere"),
    "nothing to report": (["report", "."], lambda folder: (folder / "teacher/kvfold.json").unlink(True), "nothing to"),
    "unknown engine": (["export", "teacher", "out", "--to", "ggml"], _nothing, "gguf"),
    "no recipe": (["run", "nothing.yaml"], _nothing, "nothing.yaml"),
    "no YAML": (["run", "recipe.yaml"], _recipe("name: [a"), "is not YAML"),
    "unknown recipe key": (["run", "recipe.yaml"], _recipe_with(sedes=[1]), "did you mean 'seeds'?"),
    "unknown stage key": (["run", "recipe.yaml"], _recipe_with(bench={"contexts": 8}), "did you mean 'context'?"),
    "unknown grid": (["run", "recipe.yaml"], _recipe_with(matrix={"convert.kv_head": [1]}), "'kv_heads'"),
    "wrong grid": (["run", "recipe.yaml"], _recipe_with(matrix={"convert.kv_heads": [2, 3]}), "does not divide"),
    "wrong grid of a stage": (["run", "recipe.yaml"], _recipe_with(matrix={**TWO, "uptrain.loss": ["x"]}), "'x'"),
    "wrong change": (["run", "recipe.yaml", "--set", "uptrain.tokens=many"], _nothing, "tokens cannot be 'many'"),
    "recipes in one folder": (
        ["run", "recipe.yaml", "recipe.yaml", "--out", "runs"],
        _nothing,
        "cannot share a folder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line_and_writes_nothing(name: str, here: Path, kvfold: Run) -> None:
    arguments, prepare, says = MISTAKES[name]
    prepare(here)
    before = _tree(here)
    _told(kvfold(*arguments), says)
    assert _tree(here) == before
    assert sorted(path.name for path in here.iterdir() if path.name.endswith((".partial", ".tmp"))) == []


def test_an_output_of_other_settings_is_kept(here: Path, kvfold: Run) -> None:
    assert kvfold(*CONVERT)[0] == 0
    before = _tree(here)
    _told(kvfold(*CONVERT[:-1], "1"), "add --overwrite")
    assert _tree(here) == before
    assert kvfold(*CONVERT[:-1], "1", "--overwrite")[0] == 0
    assert json.loads((here / "student" / "config.json").read_text())["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission to write")]
)
def test_a_disk_that_refuses_and_then_does_not(
    here: Path, kvfold: Run, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(number, os.strerror(number), "student")

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", refuse)
        code, out, err = kvfold(*CONVERT)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("kvfold: ")
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (here / "student").exists()
    assert kvfold(*CONVERT)[0] == 0


def test_too_little_room_is_said_first(here: Path, kvfold: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    _told(kvfold(*CONVERT), "not enough space on the disk")
    assert not (here / "student").exists()
    assert not list(here.glob("student.partial/*.safetensors"))


# --- Ctrl-C --------------------------------------------------------------------------------------------------------


def _after(calls: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which presses Ctrl-C in the midst of its n-th call."""
    left = [calls]

    def pressed(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return work(*given, **named)

    return pressed


REPORT = ["report", "teacher", "--out", "page.html"]
STOPS: dict[str, tuple[list[str], Any, str, int, str]] = {
    "plan": (["plan", "teacher", "--kv-heads", "2"], gqa.METHOD, "notes", 1, ""),
    "convert": (CONVERT, Writer, "write", 9, "student"),
    "uptrain": (UPTRAIN, LlamaModel, "forward", 2, "out"),
    "evaluate": ([*EVALUATE, "--records", "records"], LlamaModel, "forward", 2, "records/evaluate-teacher-*.json"),
    "bench": ([*BENCH, "--records", "records"], LlamaModel, "forward", 3, "records/bench-teacher-*.json"),
    "report": (REPORT, "kvfold.report.page", "render", 1, "page.html"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STOPS)
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    stage: str, here: Path, kvfold: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, place, name, calls, made = STOPS[stage]
    if stage == "report":
        assert kvfold(*EVALUATE, "--records", "teacher")[0] == 0
    owner = importlib.import_module(place) if isinstance(place, str) else place
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _after(calls, getattr(owner, name)))
        code, out, err = kvfold(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (130, "")
    assert last.startswith("kvfold: ")
    assert sum(line.startswith("kvfold: ") for line in err.splitlines()) == 1
    assert "the same command" in last
    assert "Traceback" not in err
    assert not made or not list(here.glob(made))
    code, out, err = kvfold(*arguments)
    assert code == 0, err
    assert not made or len(list(here.glob(made))) == 1
    assert not list(here.rglob("*.partial"))


# --- output --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["plan", "teacher", "--kv-heads", "2"], {"before", "after"}),
        (CONVERT, {"path"}),
        (["methods"], {"gqa", "identity"}),
        (["families"], {"llama", "qwen2"}),
        (EVALUATE, {"kind", "metrics", "hashes"}),
        (BENCH, {"kind", "metrics", "hashes"}),
        (UPTRAIN, {"path"}),
        (["pretrain", "teacher/config.json", "out", *SMALL, "--sequence-length", "16", "--batch-size", "2"], {"path"}),
    ],
    ids=lambda each: "-".join(each[:2]) if isinstance(each, list) else "",
)
def test_json_is_one_object_on_standard_output(arguments: list[str], keys: set[str], kvfold: Run) -> None:
    code, out, err = kvfold(*arguments, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert keys <= set(made)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], "kvfold "),
        (["--help"], "convert"),
        ([], "convert"),
        (["convert", "--help"], "--kv-heads"),
        (["methods"], "gqa: grouped-query attention"),
        (["families"], "mistral"),
        (["plan", "teacher", "--kv-heads", "2"], "before"),
        (CONVERT, "student: student"),
        (EVALUATE, "perplexity"),
    ],
    ids=lambda each: "-".join(each[:2]) if isinstance(each, list) else "",
)
def test_people_read_it_on_standard_output(arguments: list[str], says: str, kvfold: Run) -> None:
    code, out, _ = kvfold(*arguments)
    assert code == 0
    assert says in out
    assert len(out.splitlines()) > 1 or out.startswith(("kvfold ", "student: "))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_plain_text_of_80_columns(command: str, kvfold: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = kvfold(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: kvfold {command}")
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii()
    for repeated in ("[ARGS]...", "[STUDENT...]", "RECIPE...", "OUT..."):
        out = out.replace(repeated, "")
    assert "..." not in out


def test_help_shows_each_method_in_a_panel_of_its_own_after_the_common_flags(kvfold: Run) -> None:
    _, out, _ = kvfold("convert", "--help")
    panels = dict(part.split(":\n", 1) for part in out.split("\n\n")[2:])
    named = [f"Method {name}" for name, each in all_methods().items() if dataclasses.fields(each.Config)]
    assert list(panels) == ["Arguments", "Flags", "Settings", "Advanced", *named]
    assert "--overwrite" in panels["Flags"]
    assert "--calibration-tokens" in panels["Settings"]
    assert "--repair-length" in panels["Advanced"]
    assert "--init fit|align|align-norm|mean|first|random" in panels["Method gqa"]
    assert "--init fit|copy|mean" in panels["Method cla"]


def test_fields_of_a_group_have_a_panel_of_their_own(kvfold: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.make_dataclass(
        "Grouped",
        [
            ("rare", int, dataclasses.field(default=3, metadata={"help": "A rare one.", "group": "Advanced"})),
            ("usual", int, dataclasses.field(default=2, metadata={"help": "A usual one."})),
        ],
    )
    monkeypatch.setattr(importlib.import_module("kvfold.train.settings"), "UptrainSettings", made)
    _, out, _ = kvfold("uptrain", "--help")
    assert out.split("\n\n")[-2:] == [
        "Advanced:\n  --rare N  A rare one. [default: 3]",
        "Settings:\n  --usual N  A usual one. [default: 2]\n",
    ]


def test_the_list_of_commands_and_the_help_of_a_plan_are_light() -> None:
    code = (
        "import sys; from kvfold.cli.main import run_command; run_command(['--help']); "
        "early = {'kvfold.methods.gqa', 'kvfold.predict.plan'} & set(sys.modules); run_command(['plan', '--help']); "
        "sys.exit(str(sorted(early | {'torch', 'transformers', 'numpy'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_flags_and_arguments_come_in_any_order_and_the_last_value_counts(kvfold: Run) -> None:
    code, out, err = kvfold("plan", "--kv-heads=4", "--no-kl", "teacher", "--json", "--kv-heads", "2")
    assert (code, err) == (0, "")
    assert json.loads(out)["settings"]["kv_heads"] == "2"


def test_a_gate_that_is_missed_is_exit_3_with_its_record(here: Path, kvfold: Run) -> None:
    code, out, err = kvfold(*EVALUATE, "--gate", "loss<=0.001")
    assert (code, out) == (3, "")
    assert "loss<=0.001" in err.splitlines()[-1]
    assert [each.status for each in record.read_all(here / "records")] == ["gate_missed"]


# --- a process of its own ------------------------------------------------------------------------------------------


def _process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfold", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_exit_codes_of_a_process(here: Path) -> None:
    done, wrong = _process("methods", "--json"), _process(*CONVERT[:-1], "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gqa" in json.loads(done.stdout)
    _told((wrong.returncode, wrong.stdout, wrong.stderr), "choose 1, 2 or 4")
    assert not (here / "student").exists()


@pytest.mark.slow
def test_a_termination_signal_is_as_good_as_ctrl_c(here: Path) -> None:
    command = [sys.executable, "-m", "kvfold", *UPTRAIN, "--tokens", "100M"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("train") for line in process.stderr)  # it has begun
        process.terminate()
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 130
    assert last.startswith("kvfold: ")
    assert "the same command" in last
    assert not (here / "out").exists()
    assert (here / "out.partial").is_dir()


# --- a whole run ---------------------------------------------------------------------------------------------------


def _stopped(here: Path, kvfold: Run, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(LlamaModel, "forward", _after(calls, LlamaModel.forward))
        code, out, err = kvfold("run", "recipe.yaml")
    assert (code, out) == (130, "")
    assert "the same command" in err.splitlines()[-1]
    assert not (here / "runs" / "tiny" / "report.html").exists()


@pytest.mark.slow
def test_a_run_from_end_to_end_and_again(here: Path, kvfold: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "runs" / "tiny"
    for calls in (2, 30):
        _stopped(here, kvfold, monkeypatch, calls)
    code, out, err = kvfold("run", "recipe.yaml")
    assert code == 0, err
    assert (folder / "report.html").is_file()
    assert "runs/tiny/report.html" in out
    kinds = [each.kind for each in record.read_all(folder)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"plan": 2, "evaluate": 5, "bench": 1}
    made = _tree(folder)
    results = {name for name in made if name.endswith((".safetensors", ".jsonl")) or "records/e" in name}
    assert len(results) == 4 + 2 + 5  # weights, logs, evaluations

    (here / "again.yaml").write_text("extends: recipe.yaml\nname: tiny")
    code, out, err = kvfold("run", "recipe.yaml", "again.yaml")
    assert code == 0, err
    assert out.count("runs/tiny/report.html") == 2
    assert err.count("is complete") == 2 * 4  # two conversions, two trainings
    assert err.count("measured already") == 2 * 6
    again = _tree(folder)
    assert set(again) == set(made)
    assert {name for name in results if again[name] != made[name]} == set()

    code, out, err = kvfold("run", "recipe.yaml", "--set", "evaluate.gate=loss<=teacher-5")
    assert (code, out) == (3, "")
    assert "loss<=teacher-5" in err.splitlines()[-1]
    last = _tree(folder)
    assert last["report.html"] > again["report.html"]
    assert {name for name in results if "records" not in name and last[name] != made[name]} == set()
