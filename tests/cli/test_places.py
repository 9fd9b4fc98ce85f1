"""Where commands write: never over what they read, never over somebody else's files, never outside a run's folder."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvfold.cli.main import run_command
from kvfold.convert.conversion import convert
from kvfold.disk.lock import FILE
from kvfold.disk.output import MANIFEST, write_json
from kvfold.disk.record import Record, write
from kvfold.errors import SettingError
from kvfold.report import report
from kvfold.report.card import MARK, card_path
from kvfold.run.recipe import Recipe, read_recipe

Make = Callable[..., Path]
SMALL = ["--tokens", "64", "--sequence-length", "16", "--batch-size", "2", "--overwrite"]
UPTRAIN = ["uptrain", "teacher", "mine", *SMALL, "--loss", "ce"]
PRETRAIN = ["pretrain", "config.json", "mine", *SMALL]
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "source": "teacher",
    "data": "text.txt",
    "heldout": "text.txt",
    "convert": {"method": "gqa", "kv_heads": 2},
}


@pytest.fixture
def here(tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a teacher, a text, an output `mine` of kvfold's with a text in it, and a run."""
    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "here"
    folder.mkdir()
    tiny_checkpoint().rename(folder / "teacher")
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    convert(folder / "teacher", folder / "mine", "identity")
    lineage = json.loads((folder / "mine" / MANIFEST).read_text())  # as if it was trained here
    lineage["root"]["hash"] = lineage["hash"]
    write_json(folder / "mine" / MANIFEST, lineage)
    for text in ("text.txt", "mine/text.txt", "texts/text.txt"):
        (folder / text).parent.mkdir(exist_ok=True)
        (folder / text).write_text("".join(f"{n}: {n * n} brown foxes\n" for n in range(60)))
    shutil.copyfile(folder / "teacher" / "config.json", folder / "config.json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    write(Record("experiment", "a", {}, {}), folder / "run" / "records")
    (folder / "link").symlink_to("mine")
    monkeypatch.chdir(folder)
    yield folder
    signal.signal(signal.SIGTERM, before)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _recipe(**changes: Any) -> Callable[[], object]:
    return lambda: Path("recipe.yaml").write_text(json.dumps({**RECIPE, **changes}))


def _theirs(path: str, content: str = "dear") -> Callable[[], object]:
    def prepare() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content)

    return prepare


def _nothing() -> None:
    """Leave everything as it is."""


CONVERT = ["convert", "teacher", "--kv-heads", "2", "--overwrite"]
CALIBRATED = ["--calibration", "mine/text.txt", "--calibration-tokens", "64"]
RUN = ["run", "recipe.yaml"]
REFUSED: dict[str, tuple[list[str], Callable[[], object], str]] = {
    "student in its source": ([*CONVERT, "teacher/out"], _nothing, "teacher/out: lies in the source"),
    "source in its student": (["convert", "teacher", ".", "--kv-heads", "2"], _nothing, "would overwrite the source"),
    "source by a link": (["convert", "link", "mine", "--kv-heads", "2"], _nothing, "would overwrite the source"),
    "calibration": ([*CONVERT, "mine", *CALIBRATED], _nothing, "would overwrite the calibration text"),
    "a folder of calibration": (
        [*CONVERT, "texts/out", "--calibration", "texts"],
        _nothing,
        "lies in the calibration text",
    ),
    "given teacher": ([*UPTRAIN, "--data", "text.txt", "--teacher", "mine"], _nothing, "would overwrite the teacher"),
    "teacher by a link": (
        [*UPTRAIN, "--data", "text.txt", "--teacher", "link"],
        _nothing,
        "would overwrite the teacher",
    ),
    "data": ([*UPTRAIN, "--data", "mine/text.txt"], _nothing, "would overwrite the data"),
    "data folder": ([*UPTRAIN, "--data", "mine"], _nothing, "would overwrite the data"),
    "data above": (["uptrain", "teacher", "texts/a", *SMALL, "--data", "texts"], _nothing, "lies in the data"),
    "student itself": (
        ["uptrain", "mine", "mine", *SMALL, "--data", "text.txt"],
        _nothing,
        "would overwrite the student",
    ),
    "in the student": (["uptrain", "mine", "mine/a", *SMALL, "--data", "text.txt"], _nothing, "lies in the student"),
    "root teacher": (
        ["uptrain", "student", "mine", *SMALL, "--data", "text.txt", "--loss", "ce"],
        lambda: convert("mine", "student", "gqa", {"kv_heads": 2}),
        "would overwrite the root teacher",
    ),
    "text of pretraining": ([*PRETRAIN, "--data", "mine/text.txt"], _nothing, "would overwrite the data"),
    "text of its tokenizer": (
        [*PRETRAIN, "--data", "text.txt", "--tokenizer-data", "text.txt,mine/text.txt"],
        _nothing,
        "would overwrite the data",
    ),
    "config": (["pretrain", "mine/config.json", "mine", *SMALL], _nothing, "would overwrite the config"),
    "export in its source": (
        ["export", "teacher", "teacher/out", "--to", "transformers"],
        _nothing,
        "lies in the source",
    ),
    "export over its source": (
        ["export", "mine", "mine", "--to", "transformers"],
        _nothing,
        "would overwrite the source",
    ),
    "files of others": ([*CONVERT, "mine"], _nothing, "holds files that kvfold did not write"),
    "a page over a text": (["report", "run", "--out", "text.txt"], _nothing, "was not written by kvfold"),
    "a page over a config": (["report", "run", "--out", "config.json"], _nothing, "was not written by kvfold"),
    "a page of others": (["report", "run"], _theirs("run/report.html", "<html>"), "was not written by kvfold"),
    "a page over a record": (["report", "run", "--out", "run/records"], _nothing, "is a directory"),
    "a recipe of others": (RUN, _theirs("runs/tiny/recipe.yaml", "name: other # mine"), "was not written by kvfold"),
    "a recipe that is a link": (
        RUN,
        lambda: (Path("runs/tiny").mkdir(parents=True), Path("runs/tiny/recipe.yaml").symlink_to("../../text.txt")),
        "was not written by kvfold",
    ),
    "a run in its source": ([*RUN, "--out", "teacher/run"], _nothing, "lies in the source"),
    "a run around its text": (
        RUN,
        lambda: (_recipe(heldout="runs/tiny/converted/a.txt")(), _theirs("runs/tiny/converted/a.txt")()),
        "would overwrite the heldout text",
    ),
    "a run in its text": (RUN, lambda: (_recipe(data="texts")(), Path("runs").symlink_to("texts")), "lies in the data"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_read_and_what_others_wrote_stays(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, prepare, says = REFUSED[name]
    prepare()
    before = everything(here)
    capsys.readouterr()
    code = run_command(arguments)
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, ""), shown
    assert shown.err.count("\n") == 1
    assert says in shown.err
    assert everything(here) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a\\b",
        "a\nb",
        "a\x1b[31mb",
        "\u202etxt",
        " a",
        "a ",
        "a/",
        "x" * 101,
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, here: Path) -> None:
    _recipe(name=name)()
    with pytest.raises(SettingError, match="name is the run's folder below runs/") as caught:
        read_recipe("recipe.yaml")
    assert str(caught.value).isprintable()
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["a", "a b", "großes.Ding-1_x", "...", "x" * 100])
def test_other_names_are_folders(name: str) -> None:
    assert Recipe(name, "a", "b", "c").name == name


def test_a_page_and_a_card_of_kvfolds_are_written_anew_and_others_are_not(here: Path) -> None:
    page = report("run")
    assert report("run") == page
    page.write_text("an older page <footer>Written by kvfold from the records beside this page.")
    report("run")
    assert "an older page" not in page.read_text()
    assert report("run", out=here / "new" / "page.html").exists()
    for name in ("README.md", "MODEL_CARD.md"):
        assert card_path(Path("run")) == Path("run") / name
        (Path("run") / name).write_text("dear")
    assert card_path(Path("run")) is None
    (Path("run") / "README.md").write_text(f"---\n---\n{MARK}")
    assert card_path(Path("run")) == Path("run/README.md")


@pytest.mark.slow
def test_a_run_keeps_the_recipe_that_it_was_given_and_replaces_its_own(here: Path) -> None:
    from kvfold.run.runner import _written_by_run, run

    kept = here / "run" / "recipe.yaml"
    kept.write_text("# as I like it\n" + yaml.safe_dump({**RECIPE, "evaluate": {"tokens": 64, "samples": 0}}))
    mine = kept.read_text()
    shutil.rmtree(here / "run" / "records")
    run(kept, out="run", changes=["evaluate.copy_distances=[]", "evaluate.sequence_length=32"])
    assert kept.read_text() == mine
    kept.rename("other.yaml")
    run("other.yaml", out="run", changes=["evaluate.copy_distances=[]", "evaluate.sequence_length=32"])
    assert _written_by_run(kept)
    run("other.yaml", out="run", changes=["evaluate.copy_distances=[]", "evaluate.sequence_length=32"])
    kept.write_text(kept.read_text() + "# mine now\n")
    assert not _written_by_run(kept)


def test_what_a_kill_left_is_swept_by_the_next_command_that_looks(here: Path) -> None:
    (here / "mine" / "text.txt").unlink()
    before = everything(here / "mine")
    for look in (
        ["convert", "mine", "other", "--kv-heads", "2"],
        ["convert", "teacher", "mine", "--method", "identity"],
        ["plan", "mine", "--kv-heads", "2"],
        ["report", "."],
    ):
        (here / "mine" / FILE).write_text("process 1 on here")
        (here / "mine" / "config.json.01234567.tmp").write_text("x")
        (here / "mine" / ".replaced").mkdir()
        write_json(here / "mine" / ".replaced" / MANIFEST, {"steps": []})
        assert run_command(look) == 0
        assert everything(here / "mine") == before
        assert not (here / "mine" / ".replaced").exists()
