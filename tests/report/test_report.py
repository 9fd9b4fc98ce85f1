"""Reports from records that are plainly made up: what is on the page, what is not, and that nothing leaves it."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, DataError, OutputError
from kvfold.families import all_families
from kvfold.predict.plan import PlanSettings, plan
from kvfold.report import card, figures, render, report, summary, tables
from kvfold.report.benches import speedups
from kvfold.report.card import MARK, card_path
from kvfold.report.folder import Folded, collect, commands
from kvfold.report.rows import spread
from kvfold.report.studies import cache_bytes, plan_of, studies
from pages.marks import END, START, with_tables
from pages.miniature import compare, miniature_page, quality_figure

ROOT = Path(__file__).parents[2]
TEACHER_LOSS = 1.0
MADE_UP = {"device": "made-up device", "wall_seconds": 1.5}
EVIL = "<script>alert('teacher')</script>"
READING = {"data": "made-up text", "tokens": 4096, "sequence_length": 256, "stride": 256, "seed": 0, "dtype": "float32"}


def config(kv_heads: int = 8) -> dict[str, Any]:
    changes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "hidden_size": 64}
    return {**all_families()["llama"].tiny(), **changes}


def evaluated(
    name: str, row: Mapping[str, Any], loss: float, *, teacher: bool = True, hashed: str | None = None, **metrics: Any
) -> Record:
    """The record of an evaluation whose every number follows from a made-up loss."""
    distance = loss - TEACHER_LOSS
    measured: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_fp8_cache": loss + 0.01,
        "copy_loss": {"16": loss + 1, "64": loss + 2, "128": loss + 3},
    }
    if teacher:
        own = {"loss": TEACHER_LOSS, "perplexity": math.e, "copy_loss": {"16": 2.0, "64": 3.0, "128": 4.0}}
        measured |= {"teacher_loss": TEACHER_LOSS, "kl": distance, "agreement": 1 - distance, "teacher": own}
    settings = {**READING, "row": dict(row)}
    hashes = {"student": hashed or f"hash of {name}", "teacher": "hash of teacher" if teacher else None, "tokens": "t"}
    if row.get("role") == "teacher":
        hashes["student"] = "hash of teacher"
    return record.make("evaluate", name, settings, measured | metrics, hashes=hashes, seed=0, **MADE_UP)


def student_row(kv_heads: int, *, seed: int = 0, alpha: float = 0, init: str = "mean", **more: Any) -> dict[str, Any]:
    row = {"role": "student", "method": "gqa", "kv_heads": kv_heads, "init": init, "alpha": alpha, "seed": seed}
    return row | ({"loss_name": "kl"} if alpha else {}) | more


def planned(folder: Path, kv_heads: int, init: str = "mean", run: str = "") -> Record:
    source = folder / "source" / "config.json"
    source.parent.mkdir(exist_ok=True)
    source.write_text(json.dumps(config()))
    settings = {"kv_heads": kv_heads, "init": init}
    made = plan(source, "gqa", settings, options=PlanSettings(context=128, batch=8))
    return record.make("plan", f"{run}gqa", {"method": "gqa", **settings}, made.as_dict(), **MADE_UP)


def benched(models: Mapping[str, int], name: str = "made-up") -> Record:
    """A benchmark in which a token takes as many microseconds as the cache has kilobytes, and one millisecond."""
    rows = []
    for batch in (1, 8):
        for context in (64, 128, 256):
            for model, kv_heads in models.items():
                for cache in ("native", "fp8") if kv_heads == 8 else ("native",):
                    size = kv_heads * 64 * context * batch * (4 if cache == "native" else 1)
                    time = 1e-3 + 1e-9 * size
                    rows.append(
                        {
                            "model": model,
                            "cache": cache,
                            "context": context,
                            "batch": batch,
                            "cache_bytes": size,
                            "predicted_cache_bytes": size,
                            "prefill_s": 10 * time,
                            "decode_s_per_token": time,
                            "kernel": "made-up",
                        }
                    )
    return record.make("bench", name, {"models": list(models)}, {"rows": rows}, **MADE_UP)


def lineage_of(kv_heads: int, hashed: str) -> dict[str, Any]:
    steps = [
        {
            "stage": "convert",
            "settings": {"method": "gqa", "kv_heads": kv_heads, "init": "mean", "dtype": "source"},
            "source": "hash of teacher",
            "tokens": None,
            "seed": None,
        },
        {
            "stage": "uptrain",
            "settings": {"data": "made-up text", "tokens": 2000, "loss": "kl", "compile": False, "stages": None},
            "source": f"hash of converted {kv_heads}",
            "tokens": 2000,
            "seed": 0,
        },
    ]
    root = {"hash": "hash of teacher", "name": "made-up/teacher", "config": config(), "parameters": 12345}
    return {"format": 1, "inputs": "x", "hash": hashed, "root": root, "steps": steps, "tokenizer": "hash of words"}


def checkpoint(folder: Path, kv_heads: int, hashed: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(kv_heads)))
    (folder / "kvfold.json").write_text(json.dumps(lineage_of(kv_heads, hashed)))
    lines = [
        {
            "step": n,
            "tokens": 20 * n,
            "stage": "all",
            "loss": 3 / n,
            "kl": 3 / n,
            "ce": 1 + 3 / n,
            "lr": 0.1,
            "seconds": n,
        }
        | {"grad_norm": 1.0, "tokens_per_second": 100.0}
        for n in range(1, 101)
    ]
    done = {"done": True, "step": 100, "tokens": 2000, "seconds": 100.0}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, done])
    (folder / "train.jsonl").write_text(text)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run, to read or to change."""
    return whole_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run with its recipe, and its page."""
    folder = whole_run(tmp_path_factory.mktemp("page"))
    (folder / "recipe.yaml").write_text("name: demo\n")
    return folder, render(collect(folder))


def whole_run(tmp_path: Path) -> Path:
    """A teacher, GQA-2 over three seeds, MQA once, a control, a benchmark, plans, logs, a missed gate."""
    folder = tmp_path / "demo"
    samples = [
        {"prompt": f"def first({EVIL}", "teacher": "a, b & c", "student": f"{EVIL} after"},
        {"prompt": "class Second:\n    ", "teacher": "x = 1\n    y = 2", "student": "x = <b>2</b>"},
    ]
    held = {"passed": True, "rows": [{"expr": "loss<=teacher+0.5", "left": 1.1, "right": 1.5, "passed": True}]}
    missed = {"passed": False, "rows": [{"expr": "kl<=0.1", "left": 0.3, "right": 0.1, "passed": False}]}
    records = [
        evaluated("teacher", {"role": "teacher", "method": "identity"}, TEACHER_LOSS, teacher=False),
        evaluated(
            "control", {"role": "control", "method": "identity", "alpha": 0.05, "seed": 0, "loss_name": "ce"}, 0.98
        ),
        evaluated("gqa_kv_heads-2/converted", student_row(2), 3.0, hashed="hash of converted 2"),
        evaluated("gqa_kv_heads-1/converted", student_row(1), 5.0, hashed="hash of converted 1"),
        *(
            evaluated(
                f"kv_heads-2_seed-{seed}/uptrained",
                student_row(2, seed=seed, alpha=0.05),
                loss,
                samples=samples,
                gate=held,
            )
            for seed, loss in enumerate((1.1, 1.2, 1.3))
        ),
        dataclasses.replace(
            evaluated("kv_heads-1_seed-0/uptrained", student_row(1, alpha=0.05), 1.3, samples=samples, gate=missed),
            status="gate_missed",
        ),
        benched({"teacher": 8, "kv_heads-2_seed-0": 2, "kv_heads-1_seed-0": 1}),
        planned(tmp_path, 2),
        planned(tmp_path, 1),
        dataclasses.replace(evaluated("broken", student_row(4), 1.0), status="failed", error="the loss is nan"),
    ]
    for each in records:
        record.write(each, folder / "records")
    checkpoint(folder / "uptrained" / "kv_heads-2_seed-0", 2, "hash of kv_heads-2_seed-0/uptrained")
    checkpoint(folder / "uptrained" / "kv_heads-1_seed-0", 1, "hash of kv_heads-1_seed-0/uptrained")
    checkpoint(folder / "uptrained" / "kv_heads-4.partial", 4, "hash of half")
    return folder


class Page(HTMLParser):
    """What a browser would see of a page: tags, addresses, headings, cells by section, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._open = (
            self._open[: len(self._open) - 1 - self._open[::-1].index(tag)] if tag in self._open else self._open
        )

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def rows_of(columns: list[str], lines: list[list[str]]) -> dict[str, dict[str, str]]:
    return {line[0]: dict(zip(columns, line, strict=True)) for line in lines}


# --- rows -----------------------------------------------------------------------------------------------------------


def test_the_headline_says_what_the_records_say(run_dir: Path) -> None:
    found = rows_of(*tables.headline(studies(collect(run_dir).records)[0]))
    grouped = found["gqa, kv heads 2, init mean"]
    assert grouped["cache bytes/token"] == "512"
    assert grouped["of teacher"] == "25%"
    assert grouped["loss before training"] == "3.0000"
    assert grouped["loss"] == "1.2000 ± 0.1000"
    assert grouped["training"] == "alpha 0.05, kl (3 seeds)"
    assert grouped["recovered"] == "90%"  # of 2.0 nats of damage, 0.2 are left
    assert found["teacher"]["loss"] == "1.0000"
    assert found["teacher"]["cache bytes/token"] == "2,048"
    size = 256 * 8 * 64 * 4  # bytes of one head of the benchmark's largest place
    assert grouped["decode at 256 × 8"] == f"{(1e-3 + 8e-9 * size) / (1e-3 + 2e-9 * size):.2f}×"
    assert "gap closed" not in grouped  # every student is mean-pooled: there is nothing to close
    assert not any("kv heads 4" in name for name in found)  # its record is a failure


def test_a_student_that_training_changed_caches_what_its_own_record_says() -> None:
    sides = {side: {"cache_bytes": 1000} for side in ("before", "after")}
    metrics = {"method": "dha", "settings": {"kv_heads": 2}, "batch": 1, "context": 10, **sides}
    row = {"role": "student", "method": "dha", "kv_heads": 2, "alpha": 0}
    cache = {"student": {"bytes_per_token": 25.0}, "teacher": {"bytes_per_token": 100.0}}
    own = [evaluated("run/a/uptrained", {**row, "tokens": 64}, 1.2, cache=cache)]
    for trained, expected in ({"cache_bytes": 250}, (100.0, 25.0)), (None, (100.0, 100.0)):
        plans = [record.make("plan", "run/dha", {}, {**metrics, "trained": trained}, **MADE_UP)]
        assert cache_bytes(plans, {**row, "tokens": 64}, own) == expected
        assert cache_bytes(plans, row, own) == (100.0, 100.0)


def test_a_student_that_starts_as_its_teacher_has_nothing_to_recover() -> None:
    row = {"role": "student", "method": "dha", "kv_heads": 2, "alpha": 0}
    trained = {**row, "alpha": 0.05, "loss_name": "kl", "seed": 0}
    found = [evaluated("run/a/converted", row, TEACHER_LOSS + 1e-5), evaluated("run/a/uptrained", trained, 1.2)]
    line = rows_of(*tables.headline(studies(found)[0]))["dha, kv heads 2"]
    assert (line["loss before training"], line["loss"]) == ("1.0000", "1.2000")
    assert line.get("recovered", tables.NONE) == tables.NONE


def test_the_summary_is_the_headline_made_narrow(run_dir: Path) -> None:
    columns, lines = summary(collect(run_dir).records)
    full = tables.headline(studies(collect(run_dir).records)[0])
    assert [line[0] for line in lines] == [line[0] for line in full[1]]
    assert {"model", "cache bytes / token", "loss", "KL"} <= set(columns)
    assert len(columns) < len(full[0])
    assert summary([]) == (["model"], [])


def test_gap_closed_is_held_against_mean_pooling_of_the_same_bytes_and_tokens(tmp_path: Path) -> None:
    records = [
        planned(tmp_path, 2),
        planned(tmp_path, 2, "first"),
        planned(tmp_path, 1),
        evaluated("mean", student_row(2, alpha=0.05), 2.0),
        evaluated("mean of fewer tokens", student_row(2, alpha=0.01), 3.0),
        evaluated("mean of fewer bytes", student_row(1, alpha=0.05), 4.0),
        evaluated("first", student_row(2, alpha=0.05, init="first"), 1.25),
        evaluated("first of other tokens", student_row(2, alpha=0.1, init="first"), 1.2),
    ]
    (study,) = studies(records)
    closed = {(row.settings["init"], row.training["alpha"]): row.gap_closed for row in study.rows}
    assert closed[("first", 0.05)] == pytest.approx(0.75)
    assert closed[("first", 0.1)] is None
    assert closed[("mean", 0.05)] is None


def test_only_what_was_evaluated_alike_stands_in_one_table() -> None:
    here = evaluated("here", student_row(2), 2.0)
    elsewhere = dataclasses.replace(here, name="elsewhere", hashes={**here.hashes, "tokens": "other text"})
    assert len(studies([here, elsewhere])) == 2
    assert len(studies([here, dataclasses.replace(here, name="again")])) == 1


def test_a_record_made_by_hand_takes_its_row_from_the_lineage() -> None:
    by_hand = dataclasses.replace(evaluated("out", {}, 1.5, hashed="known"), settings=READING)
    (study,) = studies([by_hand], {"known": lineage_of(2, "known")})
    (row,) = study.rows
    assert row.name == "gqa, kv heads 2, init mean"
    assert row.schooling == "2k tokens, kl"
    assert study.teacher is not None  # measured beside the student, without a record of its own
    assert study.teacher.metric("loss") == spread([TEACHER_LOSS])


@pytest.mark.parametrize("other_first", [True, False])
def test_what_a_row_does_not_say_is_the_default(other_first: bool) -> None:
    plain, other = (
        record.make("plan", "supra", {}, {"method": "supra", "settings": {"preset": "hybrid", "features": features}})
        for features in ("preset", "none")
    )
    plans = [other, plain] if other_first else [plain, other]
    assert plan_of(plans, {"method": "supra", "preset": "hybrid"}) is plain
    assert plan_of(plans, {"method": "supra", "preset": "hybrid", "features": "none"}) is other


def test_speed_is_looked_up_by_content_before_it_is_by_name() -> None:
    bench = dataclasses.replace(benched({"teacher": 8, "out": 2}), hashes={"out": "content"})
    same = evaluated("anything", student_row(2), 2.0, hashed="content")
    other = evaluated("out", student_row(2), 2.0, hashed="other content")
    assert speedups([bench], [same])
    assert not speedups([bench], [other])


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_has_every_section_that_has_data(page: tuple[Path, str]) -> None:
    _, text = page
    headings = Page(text).headings
    for title in (
        "Result",
        "Quality",
        "Plan against measured",
        "Loss over tokens",
        "Decode speed over context",
        "Gate",
    ):
        assert title in headings
    for title in ("Samples side by side", "Failures", "Reproduce this run", "Hashes, lineage, versions"):
        assert title in headings
    assert "All caches have exactly the predicted size." in text
    assert "missed by kv_heads-1_seed-0/uptrained" in text
    assert "the loss is nan" in text
    assert "teacher, fp8 cache" in text
    assert "kvfold run recipe.yaml" in text
    assert "kvfold convert made-up/teacher step-1 --method gqa --kv-heads 2" in text
    assert "made-up device" in text
    assert "kv_heads-4" not in text  # unfinished work is nobody's checkpoint


def test_a_section_without_data_is_left_out(tmp_path: Path) -> None:
    record.write(evaluated("alone", student_row(2), 2.0), tmp_path)
    headings = Page(report(tmp_path).read_text(encoding="utf-8")).headings
    assert "Result" in headings
    for title in ("Plan against measured", "Loss over tokens", "Decode speed over context", "Gate", "Failures"):
        assert title not in headings
    assert "Samples side by side" not in headings
    assert "Reproduce this run" not in headings


@pytest.mark.slow
def test_the_page_is_one_inert_file(page: tuple[Path, str]) -> None:
    _, text = page
    seen = Page(text)
    assert "script" not in seen.tags
    assert EVIL.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in text
    assert seen.addresses
    assert all(address.startswith("#") for address in seen.addresses)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    assert len(seen.ids) == len(set(seen.ids))
    targets = {address[1:] for address in seen.addresses}
    assert targets <= set(seen.ids)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(page: tuple[Path, str]) -> None:
    folder, text = page
    assert render(collect(folder)) == text


@pytest.mark.slow
def test_bytes_that_differ_from_the_plan_are_said(tmp_path: Path) -> None:
    bench = benched({"teacher": 8, "out": 2})
    bench.metrics["rows"][0]["cache_bytes"] += 1
    record.write(bench, tmp_path)
    text = report(tmp_path).read_text(encoding="utf-8")
    assert f"1 of {len(bench.metrics['rows'])} caches differ from the prediction." in text
    assert "exactly the predicted size" not in text


def test_a_line_that_was_cut_off_does_not_spoil_the_log(run_dir: Path) -> None:
    log = run_dir / "uptrained" / "kv_heads-2_seed-0" / "train.jsonl"
    log.write_text(log.read_text() + '{"step": 101, "tok')
    assert len(collect(run_dir).logs["uptrained/kv_heads-2_seed-0"]) == 100


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_nothing_to_report_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=place):
        report(tmp_path / place)
    assert not (tmp_path / place / "report.html").exists()


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_one_clear_error(run_dir: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        report(run_dir, out=run_dir)
    (run_dir / "file").write_text("")
    with pytest.raises(OutputError, match="part of the path is a file"):
        report(run_dir, out=run_dir / "file" / "below" / "report.html")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, profile: Path, *flags: str) -> str:
    """What a browser makes of a page."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    fixed += ["--virtual-time-budget=2000", f"--user-data-dir={profile}"]
    command = [str(BROWSER), *fixed, *flags, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(page: tuple[Path, str], tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(page[1], encoding="utf-8")
    shot = tmp_path / "page.png"
    seen = browse(tmp_path / "page.html", tmp_path / "profile", f"--window-size={width},2000", f"--screenshot={shot}")
    assert Page(seen).headings.count("Result") == 1
    assert "script" not in Page(seen).tags
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", seen)
    assert shot.stat().st_size > 20_000  # a blank page of this size is a few kilobytes


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
def test_tables_fit_the_width_of_the_page(page: tuple[Path, str], tmp_path: Path) -> None:
    text = re.sub("<meta http-equiv[^>]*>", "", page[1])  # which forbids scripts
    script = """for (const width of [400, 800, 1000, 1200]) {
        const frame = document.createElement("iframe");
        Object.assign(frame, {width, height: 900, srcdoc: page.textContent});
        frame.onload = () => {
            const inside = frame.contentDocument;
            inside.querySelectorAll("details").forEach(each => each.open = true);
            const wide = [inside.documentElement, ...inside.querySelectorAll(".scroll, pre")]
                .filter(each => each.scrollWidth > each.clientWidth + 1);
            const names = wide.map(each => each.ariaLabel || each.tagName);
            document.body.append(`<${width}:${names.join()}>`);
        };
        document.body.append(frame);
    }"""
    outer = f'<body><textarea id="page">{html.escape(text)}</textarea><script>{script}</script>'
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    seen = browse(tmp_path / "outer.html", tmp_path / "profile", "--window-size=1300,1000")
    found = dict(re.findall("&lt;([0-9]+):(.*?)&gt;", seen.partition("</script>")[2]))
    assert found == dict.fromkeys(("400", "800", "1000", "1200"), "")


# --- figures --------------------------------------------------------------------------------------------------------


def test_a_figure_is_the_same_each_time_and_names_no_address() -> None:
    def draw() -> str:
        drawn = [
            figures.Line("one & two", [1, 2, 4], [3, 2, 1], [2, 1, 0], [4, 3, 2]),
            figures.Line("b", [1, 4], [1, 2]),
        ]
        return figures.lines("name", "A < B", drawn, x_label="x", y_label="y", log_x=True, levels={"level": 1.5})

    text = draw()
    assert text == draw()
    assert "http" not in text
    assert "A &lt; B" in text
    assert "#0102" not in text  # every stand-in became a colour of the page
    assert all(f'id="name-{found}"' in text for found in re.findall(r'(?:url\(|href=")#name-([^")]+)', text))


def test_a_standalone_figure_is_xml_with_its_own_colours() -> None:
    from xml.etree import ElementTree

    points = [figures.Point("teacher", 2048, 0.0), figures.Point("student", 512, 0.1, 0.05, 0.2)]
    text = figures.standalone(figures.scatter("q", "title", points, x_label="x", y_label="y"))
    ElementTree.fromstring(text)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used
    assert all(f"{name}:" in text for name in used)


# --- cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_card_has_front_matter_provenance_and_numbers(run_dir: Path) -> None:
    report(run_dir)
    text = (run_dir / "uptrained" / "kv_heads-2_seed-0" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "made-up/teacher"
    assert front["library_name"] == "transformers"
    assert "| loss, nats per token | 1.1000 | 1.0000 |" in text  # this seed's, not the mean of three
    assert "| cache bytes per token | 512 | 2,048 |" in text
    assert "hash of teacher" in text
    assert "--kv-heads 2" in text
    assert "import kvfold" not in text  # its teacher's own architecture
    assert not (run_dir / "uptrained" / "kv_heads-4.partial" / "README.md").exists()


def test_a_card_says_what_the_average_hides(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", 2, "hash of student")
    made = evaluated("made", student_row(2, alpha=0.05), 1.05, hashed="hash of student", last_word=0.01)
    teacher = {**made.metrics["teacher"], "last_word": 0.4, "lm_eval": {"piqa": {"acc": 0.6}}}
    made = dataclasses.replace(made, metrics={**made.metrics, "teacher": teacher, "lm_eval": {"piqa": {"acc": 0.55}}})
    text = card(folder, [made])
    assert "| accuracy on last words | 1.0% | 40.0% |" in text
    assert "| accuracy on PIQA | 55.0% | 60.0% |" in text
    assert "It misses the default gate" in text
    assert "last\\_word" not in text
    assert "last_word>=0.8*teacher (0.01 against 0.32)" in text
    own = dataclasses.replace(made, settings={**made.settings, "gate": "loss<=2"})
    assert "default gate" not in card(folder, [own])


@pytest.mark.parametrize("root", ["llama", "kvfold_llama"])
@pytest.mark.parametrize("student", ["llama", "kvfold_llama"])
def test_a_card_says_how_this_model_is_loaded_whatever_its_teacher_was(tmp_path: Path, root: str, student: str) -> None:
    folder, lineage = checkpoint(tmp_path / "out", 2, "end"), lineage_of(2, "end")
    lineage["root"]["config"]["model_type"] = root
    (folder / "kvfold.json").write_text(json.dumps(lineage))
    (folder / "config.json").write_text(json.dumps(config(2) | {"model_type": student}))
    text = card(folder, [])
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    stock = student == "llama"
    assert ("import kvfold.hf" in code) is not stock
    assert ("AutoTokenizer" in code) is stock
    assert ("has the stock architecture `llama`" in text) is stock
    assert ("vllm serve" in text) is stock


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    lineage = lineage_of(2, "end")
    lineage["steps"][1]["settings"]["data"] = "/home/somebody/texts/novels.txt"
    folder = checkpoint(tmp_path / "out", 2, "end")
    (folder / "kvfold.json").write_text(json.dumps(lineage))
    text = card(folder, [])
    assert "--data novels.txt" in text
    assert "somebody" not in text
    assert "made-up/teacher" in text


@pytest.mark.slow
def test_a_readme_of_somebody_else_is_left_alone(run_dir: Path) -> None:
    folder = run_dir / "uptrained" / "kv_heads-2_seed-0"
    (folder / "README.md").write_text("theirs")
    report(run_dir)
    report(run_dir)
    assert (folder / "README.md").read_text() == "theirs"
    assert MARK in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(f"{MARK}\nan older card of ours")
    assert card_path(folder) == folder / "README.md"


def test_a_checkpoint_that_kvfold_did_not_make_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no lineage"):
        card(tmp_path, [])


def test_commands_name_the_checkpoints_of_the_run() -> None:
    lineage = lineage_of(2, "end")
    lines = commands(Folded(Path("x"), "x", lineage), {"hash of converted 2": "converted/two", "end": "trained/two"})
    convert, uptrain = lines.splitlines()
    assert (
        convert == "kvfold convert made-up/teacher converted/two --method gqa --kv-heads 2 --init mean --dtype source"
    )
    assert uptrain.startswith("kvfold uptrain converted/two trained/two --data 'made-up text' --tokens 2000")
    assert uptrain.endswith("--no-compile")


# --- README and the paper in miniature ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_tables_in_pages_are_in_step_with_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text, record.read_all(ROOT / "results")), "run python docs/generate.py"


def test_a_page_gets_the_table_that_it_asks_for(run_dir: Path) -> None:
    start = START.format("students toy")
    page = f"before\n{start}\nan older table\n{END}\nafter, `{END}`\n"
    records = [dataclasses.replace(each, name=f"toy/{each.name}") for each in record.read_all(run_dir)]
    first = with_tables(page, records)
    assert first.startswith(f"before\n{start}\n| model |")
    assert first.endswith(f"{END}\nafter, `{END}`\n")
    assert "an older table" not in first
    assert "| gqa, kv heads 2, init mean |" in first
    assert with_tables(first, records) == first
    assert with_tables(page, []) == page.replace("an older table\n", "")
    other = dataclasses.replace(evaluated("other/first", student_row(2, init="first"), 9.0))
    assert with_tables(page, [*records, other]) == first
    assert with_tables("no marks", records) == "no marks"
    for asked in ("students", "guesses toy"):
        with pytest.raises(DataError, match=f"asks for '{asked}'"):
            with_tables(page.replace(start, START.format(asked)), records)


def test_equal_bytes_are_held_against_one_another_with_what_the_seeds_can_tell(tmp_path: Path) -> None:
    records = [planned(tmp_path, heads, init, "toy/") for heads, init in ((2, "mean"), (2, "first"), (1, "mean"))]
    for init, losses in (("mean", (2.0, 2.2)), ("first", (2.05, 2.25)), ("random", (3.0, 3.1))):
        for seed, loss in enumerate(losses):
            row = student_row(2, init=init, alpha=0.05, seed=seed)
            records.append(evaluated(f"toy/{init}-{seed}", row, loss))
    records += [
        evaluated("toy/fewer tokens", student_row(2, alpha=0.01), 1.0),
        evaluated("toy/fewer bytes", student_row(1, alpha=0.05), 1.0),
    ]
    text = with_tables(f"{START.format('equal-bytes toy')}\n{END}", records)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 0")]
    assert [(line[1], line[-1]) for line in lines] == [
        ("**gqa, kv heads 2, init mean**", tables.NONE),
        ("gqa, kv heads 2, init first", "0.0500 (within the seeds' spread)"),
    ]
    copied = [dataclasses.replace(each, metrics={**each.metrics, "copy_gain": {"64": 0.5}}) for each in records]
    text = with_tables(f"{START.format('equal-bytes toy')}\n{END}", copied)
    assert "| KL | copy gain over 64 | gap closed |" in text
    assert "| 0.50 ± 0.00 |" in text


def test_a_benchmark_of_models_is_held_against_its_first_one() -> None:
    first = {
        **{"model": "whole", "context": 4096, "batch": 8, "cache_bytes": 4000, "predicted_cache_bytes": 4000},
        **{"decode_s_per_token": 0.5, "prefill_s": 9.0},
    }
    other = first | {"model": "few", "cache_bytes": 500, "predicted_cache_bytes": 500, "decode_s_per_token": 0.2}
    made = record.make("benchmark", "speed", {"note": "busy"}, {"rows": [first, other]})
    page = with_tables(f"{START.format('bench speed')}\n{END}", [made])
    assert "| whole | 4,096 × 8 | 4,000 | 4,000 | 100% | 1.00× | 1.00× |" in page
    assert "| few | 4,096 × 8 | 500 | 500 | 12.5% | 2.50× | 1.00× |" in page
    assert "(busy)." in page


def test_ratios_of_a_benchmark_stand_by_shape_and_dtype() -> None:
    metrics = {
        "float32, 64": {"over_multi_head": {"absorbed": 0.5, "grouped": 0.25}},
        "bfloat16, 64": {"over_multi_head": {"absorbed": 0.625}},
        "target": {"over_multi_head": 1.0},
        "load_average": 0.1,
    }
    made = record.make("benchmark", "toy", {"note": "a quiet machine"}, metrics)
    text = with_tables(f"{START.format('ratios toy')}\n{END}", [made])
    assert "| heads of 64 | float32 | bfloat16 |" in text
    assert "| absorbed | 0.50 | 0.62 |" in text
    assert f"| grouped | 0.25 | {tables.NONE} |" in text
    assert "a quiet machine" in text


def test_rows_of_a_benchmark_are_turned_as_a_page_asks() -> None:
    rows = [
        {"variant": name, "context": context, "batch": 8, "ms": ms}
        for name, context, ms in (("softmax", 256, 1.25), ("softmax", 4096, 20.0), ("sums", 4096, 1234.5))
    ]
    made = record.make("benchmark", "toy", {}, {"steps": rows})
    text = with_tables(f"{START.format('pivot toy: steps variant context,batch ms')}\n{END}", [made])
    assert "| variant | 256, 8 | 4,096, 8 |" in text
    assert "| softmax | 1.25 | 20 |" in text
    assert f"| sums | {tables.NONE} | 1,234 |" in text
    for asked in ("pivot toy", "pivot toy: steps variant", "ratios toy: steps"):
        with pytest.raises(DataError, match="a page asks for"):
            with_tables(f"{START.format(asked)}\n{END}", [made])


def test_the_figure_of_the_readme_labels_each_point(run_dir: Path) -> None:
    text = quality_figure(record.read_all(run_dir))
    for label in ("teacher", "gqa, kv heads 2, init mean", "gqa, kv heads 1, init mean"):
        assert f">{label}<" in text
    assert "legend" not in text
    with pytest.raises(DataError, match="both bytes and loss"):
        quality_figure([])


@pytest.mark.slow
def test_the_picture_and_its_table_show_who_is_not_beaten_and_one_of_every_method(tmp_path: Path) -> None:
    records = [planned(tmp_path, heads, init, "toy/") for heads in (4, 2, 1) for init in ("mean", "first")]
    losses = {(4, "mean"): 2.5, (4, "first"): 2.75, (2, "mean"): 2.625, (2, "first"): 2.6875, (1, "mean"): 2.6}
    records += [
        evaluated(f"toy/{heads}-{init}", student_row(heads, init=init, alpha=0.05), loss)
        for (heads, init), loss in losses.items()
    ]
    text = with_tables(f"{START.format('front toy')}\n{END}", records)
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| gqa")]
    assert names == ["gqa, kv heads 4, init mean", "gqa, kv heads 1, init mean"]  # 2 heads: more bytes, more loss
    assert "init first" not in quality_figure(records)
    other = {**student_row(2, init="first", alpha=0.05), "method": "cla"}
    plan = planned(tmp_path, 2, "first")
    alike = dataclasses.replace(plan, name="toy/b", metrics={**plan.metrics, "method": "cla"})
    more = [*records, alike, evaluated("toy/other", other, 3.0)]
    assert "| cla, " in with_tables(f"{START.format('front toy')}\n{END}", more)  # beaten, and the only one of cla


def miniature(losses: Mapping[tuple[int, str, float], float | tuple[float, ...]]) -> list[Record]:
    records = []
    for (heads, init, alpha), given in losses.items():
        for seed, loss in enumerate(given if isinstance(given, tuple) else (given,)):
            name = f"miniature/{heads}/{init}/{alpha}/{seed}"
            records.append(evaluated(name, student_row(heads, init=init, alpha=alpha, seed=seed), loss))
    return records


def test_the_miniature_says_which_orderings_hold() -> None:
    page = miniature_page(
        miniature(
            {
                (1, "mean", 0): 5.0,
                (1, "first", 0): 4.0,
                (1, "random", 0): 7.0,
                (1, "mean", 0.05): 2.0,
                (1, "first", 0.05): 2.5,
                (1, "random", 0.05): (2.4, 2.9),
                (1, "mean", 0.1): 1.9,
                (2, "mean", 0): 3.0,
                (2, "mean", 0.05): 1.5,
                (2, "mean", 0.1): 1.6,
            }
        )
    )
    assert "- mean is better than first: holds for MQA at alpha 0.05; does **not** hold for MQA at alpha 0." in page
    assert "- first is better than random: holds for MQA at alpha 0; cannot be decided from these seeds for" in page
    assert "does **not** hold for GQA-2 from 0.05 to 0.1" in page
    assert "| MQA at alpha 0.05 | 2.0000 | 2.5000 | 2.6500 ± 0.3536 |" in page
    assert "- GQA is better than MQA: holds for GQA-2 at alpha 0, GQA-2 at alpha 0.05, GQA-2 at alpha 0.1." in page
    assert "## (c)" not in page


def test_the_miniature_counts_groups_and_times() -> None:
    records = [
        *(evaluated(f"miniature/gqa-{heads}", student_row(heads), 2.0) for heads in (1, 2, 4)),
        benched({"teacher": 8, "gqa-1": 1, "gqa-2": 2, "gqa-4": 4}, "miniature"),
    ]
    page = miniature_page(records)
    assert "|  | 1 group | 2 groups | 4 groups | 8 groups |" in page
    assert "| 256 × 8 | 1.524 | 2.049 | 3.097 | 5.194 |" in page
    assert "- fewer groups decode faster, at every step: holds for 64 × 1," in page


def test_the_miniature_needs_records() -> None:
    with pytest.raises(DataError, match="no evaluation of a student"):
        miniature_page([])


@pytest.mark.parametrize(
    ("lower", "higher", "said"),
    [((1.0,), (2.0,), "yes"), ((2.0,), (1.0,), "no"), ((1.0, 1.4), (1.2, 1.3), "unclear"), ((1.0,), (1.0,), "no")],
)
def test_compare(lower: tuple[float, ...], higher: tuple[float, ...], said: str) -> None:
    first, second = spread(lower), spread(higher)
    assert first
    assert second
    assert compare(first, second) == said
