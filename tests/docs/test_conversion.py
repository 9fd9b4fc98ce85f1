"""The page on conversion, from records that are plainly made up, and the recipes whose records it is made of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvfold.contracts.site import REPAIRABLE
from kvfold.convert.conversion import ConvertSettings
from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.errors import DataError
from kvfold.report.studies import studies
from kvfold.run.recipe import cells, read_recipe
from kvfold.run.runner import _label
from kvfold.settings import decode
from pages.conversion import conversion_pages
from pages.marks import END, START, with_tables
from pages.students import DEFAULT, MEAN, Start, results

ROOT = Path(__file__).parents[2]
TEACHERS_CACHE = {"kv_heads": 8, "bytes_per_token": 512}
TEACHER, MEAN_LOSS = 2.0, {4: 3.0, 2: 6.0, 1: 8.0}
READING = {"data": "folder/made-up", "tokens": 4096, "sequence_length": 256, "seed": 0, "dtype": "float32"}


def evaluated(name: str, loss: float, *, windows: int = 256, teacher: str = "made-up/teacher", **row: Any) -> Record:
    """The record of a student; unless `row` says otherwise, one of GQA that was not trained."""
    said = {"role": "student", "method": "gqa", "kv_heads": 2, "init": "mean", "alpha": 0} | row
    settings = {**READING, "sequence_length": windows, "teacher": teacher, "row": said}
    hashes = {"student": name, "teacher": f"hash of {teacher}", "tokens": "t"}
    heads = said["kv_heads"] if isinstance(said["kv_heads"], int) else None
    cache = {"student": {"kv_heads": heads, "bytes_per_token": 64 * (heads or 3)}, "teacher": TEACHERS_CACHE}
    metrics = {"loss": loss, "teacher_loss": TEACHER, "cache": cache}
    return record.make("evaluate", name, settings, metrics, hashes=hashes, device="made-up device")


def converted(heads: int, init: str, closed: float, *, repair: str = "", seed: int | None = None) -> Record:
    """A student that closes so much of the gap, named as a run names it."""
    label = f"gqa_kv_heads-{heads}_init-{init}" + (f"_repair-{repair}" if repair else "")
    label += "" if seed is None else f"_calibration_seed-{seed}"
    loss = MEAN_LOSS[heads] - closed * (MEAN_LOSS[heads] - TEACHER)
    return evaluated(f"conversion/{label}/converted", loss, kv_heads=heads, init=init)


@pytest.fixture
def conversions() -> list[Record]:
    found = []
    for heads, closed in ((4, 0.98), (2, 0.955), (1, 0.9)):
        found += [
            converted(heads, "mean", 0),
            converted(heads, "align", 0.6),
            converted(heads, "fit", 0.8, repair="none-"),
            converted(heads, "fit", 0.85, repair="o"),
            converted(heads, "mean", 0.5, repair="q-o-gate-up-down"),
            *(
                converted(heads, "fit", closed + drift, repair="q-o-gate-up-down", seed=seed)
                for seed, drift in enumerate((-0.01, 0, 0.01))
            ),
        ]
    return found


def cells_of(page: str, first: str) -> list[str]:
    """The cells of the table row that begins so."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_says_what_its_records_say(conversions: list[Record]) -> None:
    page = conversion_pages([*conversions])["conversion.md"]
    assert "| start | 4 of 8 heads: loss | gap closed | 2 of 8 heads: loss | gap closed | 1 of 8" in page
    assert cells_of(page, "teacher")[1:3] == ["2.0000", "–"]
    assert cells_of(page, "mean")[1:] == ["3.0000", "0.000", "6.0000", "0.000", "8.0000", "0.000"]
    assert cells_of(page, "align")[3:5] == ["3.6000", "0.600"]
    assert cells_of(page, "fit")[3:5] == ["2.8000", "0.800"]
    assert cells_of(page, "fit, o repaired")[3:5] == ["2.6000", "0.850"]
    assert cells_of(page, "mean, q, o, gate, up, down repaired")[4] == "0.500"
    default = cells_of(page, "fit, q, o, gate, up, down repaired (default)")
    assert default[3:5] == ["**2.1800 ± 0.0400**", "**0.955 ± 0.010**"]
    assert page.count("**2.") + page.count("**0.") == 6  # the best of each column, and nothing else
    assert "hash of" not in page
    assert "folder/" not in page


def test_targets_and_orderings_are_judged_on_the_numbers(conversions: list[Record]) -> None:
    page = conversion_pages([*conversions])["conversion.md"]
    assert "2 times fewer heads, at least 0.95 of the gap closed by the default: holds (0.980 ± 0.010)." in page
    assert "4 times fewer heads, at least 0.95 of the gap closed by the default: holds (0.955 ± 0.010)." in page
    assert "8 times fewer heads, at least 0.92 of the gap closed by the default: does **not** hold (0.900" in page
    assert "fit is better than align: holds for 4 heads, 2 heads, 1 head." in page
    worse = [each for each in conversions if "fit_repair-o/" not in each.name] + [
        converted(heads, "fit", 0.7, repair="o") for heads in (4, 2, 1)
    ]
    assert "repairing o helps: does **not** hold for 4 heads" in conversion_pages([*worse])["conversion.md"]


def test_what_a_row_says_goes_before_what_its_name_says() -> None:
    labelled = evaluated("conversion/gqa_init-fit_repair-o-down/converted", 3.0, init="fit")
    told = evaluated("conversion/gqa_init-fit_repair-o-down/converted", 3.0, init="fit", repair=["q"])
    nothing = evaluated("conversion/gqa_init-fit_repair-none-/converted", 3.0, init="fit")
    unsaid = [evaluated(f"recovery/{init}", 3.0, init=init) for init in ("fit", "mean")]
    found = [each.start for each in results([labelled, told, nothing, *unsaid])]
    assert found == [Start("fit", ("o", "down")), Start("fit", ("q",)), Start("fit"), DEFAULT, MEAN]


def test_the_papers_recipe_is_compared_where_the_teacher_is_the_same(conversions: list[Record]) -> None:
    paper = {"loss_name": "ce", "alpha": 0.05, "seed": 0}
    alike = evaluated("conversion-paper/kv_heads-2", 2.4, **paper)
    page = conversion_pages([*conversions, alike])["conversion.md"]
    assert cells_of(page, "2 of 8 heads")[1:] == ["2.1800 ± 0.0400", "0.955 ± 0.010", "2.4000", "0.900"]
    assert "than the paper's recipe with it: holds for 2 of 8 heads." in page
    other = [
        evaluated("miniature/gqa/converted", 5.0, windows=512),
        evaluated("miniature/kv_heads-2/uptrained", 2.03, windows=512, **paper),
    ]
    page = conversion_pages([*conversions, *other])["conversion.md"]
    assert cells_of(page, "2 of 8 heads")[3:] == ["–", "0.990"]  # its loss is no match, its gap is
    assert "windows of 512 tokens" in page
    assert "with it: does **not** hold for 2 of 8 heads." in page
    assert "better than its teacher" not in page
    better = evaluated("conversion-paper/kv_heads-2", TEACHER - 0.1, **paper)
    assert "the student is better than its teacher" in conversion_pages([*conversions, better])["conversion.md"]
    for stranger in (
        evaluated("miniature/x", 2.4, teacher="another", **paper),
        evaluated("miniature/x", 2.4, **paper | {"alpha": 0.01}),
        evaluated("miniature/x", 2.4, **paper | {"loss_name": "kl"}),
    ):
        assert "the paper's recipe with it" not in conversion_pages([*conversions, stranger])["conversion.md"]


def _recovery() -> list[Record]:
    found = [evaluated(f"recovery/gqa_init-{init}/converted", loss, init=init) for init, loss in MERELY.items()]
    for (init, loss_name), (few, many) in TRAINED.items():
        for tokens, loss in ((150_000, few), ("0.6M", many)):
            row = {"init": init, "loss_name": loss_name, "tokens": tokens, "seed": 0}
            found.append(evaluated(f"recovery/init-{init}_loss-{loss_name}_tokens-{tokens}/uptrained", loss, **row))
    return found


MERELY = {"fit": 2.3, "mean": 6.0, "align": 4.0}
TRAINED: Mapping[tuple[str, str], tuple[float, float]] = {
    ("fit", "kl"): (2.2, 2.1),
    ("mean", "kl"): (3.0, 2.25),
    ("mean", "ce"): (3.2, 2.28),
    ("align", "kl"): (2.15, 2.12),
}


@pytest.mark.slow
def test_loss_over_tokens_is_a_table_a_figure_and_sentences() -> None:
    made = conversion_pages([*_recovery()])
    page, figure = made["conversion.md"], made["loss-over-tokens.svg"]
    assert "| start | trained by | 0 tokens | 150k tokens | 600k tokens |" in page
    default = "fit, q, o, gate, up, down repaired (default)"
    assert cells_of(page, default)[1:] == ["kl", "**2.3000**", "2.2000", "**2.1000**"]
    assert cells_of(page, "align")[1:] == ["kl", "4.0000", "**2.1500**", "2.1200"]
    assert "better start than align: holds for 600k tokens by kl; does **not** hold for 150k tokens by kl." in page
    assert "than mean pooling with cross-entropy: holds for 0 tokens, 150k tokens; does **not** hold for 600k" in page
    assert (
        "KL to the teacher is better than cross-entropy alone: holds for mean after 150k tokens, mean after 600k"
        in page
    )
    for word in (f"{default}; kl", "align; kl", "mean; ce", "teacher"):
        assert f">{word}</text>" in figure
    assert made == conversion_pages([*_recovery()])  # the same bytes for the same numbers


def test_pages_without_records_are_left_out(conversions: list[Record]) -> None:
    assert conversion_pages([]) == {}
    elsewhere = [evaluated("demo/x", 3.0), evaluated("miniature/x", 3.0, alpha=0.05, loss_name="ce")]
    assert conversion_pages([*elsewhere]) == {}
    assert set(conversion_pages([*conversions])) == {"conversion.md"}
    failed = [dataclasses.replace(each, status="failed", error="made up") for each in conversions]
    assert conversion_pages([*failed]) == {}


def test_what_cannot_be_one_table_is_refused(conversions: list[Record]) -> None:
    unknown = [dataclasses.replace(each, metrics={**each.metrics, "cache": {}}) for each in conversions]
    with pytest.raises(DataError, match="conversion: no record says what 4 heads are of"):
        conversion_pages(unknown)
    twice = evaluated("conversion/other", 3.0, windows=512, init="align")
    with pytest.raises(DataError, match="conversion: its students were evaluated in several ways"):
        conversion_pages([*conversions, twice])


def test_the_headline_stands_on_the_page_and_the_sweeps_are_not_in_the_readme(
    conversions: list[Record], tmp_path: Path
) -> None:
    headline = [
        evaluated(
            f"headline/{init}-{seed}", loss + seed / 100, init=init, loss_name=loss_name, tokens=600_000, seed=seed
        )
        for init, loss_name, loss in (("fit", "kl", 2.1), ("mean", "ce", 2.4))
        for seed in (0, 1, 2)
    ]
    page = conversion_pages([*headline])["conversion.md"]
    assert re.search(
        r"\| gqa, kv heads 2, init fit \| 600k tokens, kl \(3 seeds\) \|.* 2\.1100 ± 0\.0100 \|.* 73% \|", page
    )
    marked = f"{START.format('students headline')}\n{END}"
    table = with_tables(marked, [*headline, *conversions, *_recovery()])
    assert table.count("| gqa, ") == 2
    assert "2.1100 ± 0.0100" in table
    assert "| 128 | 25% |" in table


def made_by(stage: str, seconds: float, **settings: Any) -> dict[str, Any]:
    return {"stage": stage, "seconds": seconds, "tokens": None} | ({"settings": settings} if settings else {})


def told(made: Record, *steps: dict[str, Any]) -> Record:
    return dataclasses.replace(made, metrics={**made.metrics, "made_by": list(steps)})


def test_a_budget_stands_beside_the_same_bytes_spent_evenly() -> None:
    rows = [
        told(evaluated("budget/a", 2.6, kv_heads=2, init="fit"), made_by("convert", 20, kv_heads=2)),
        told(
            evaluated("budget/b", 2.5, kv_heads="auto", budget=0.25, init="fit"),
            made_by("convert", 40, kv_heads="4/2/1/1"),
        ),
        told(evaluated("budget/c", 2.2, kv_heads=4, init="fit"), made_by("convert", 20, kv_heads=4)),
        told(
            evaluated("budget/d", 2.3, kv_heads="auto", budget=0.5, init="fit"),
            made_by("convert", 41, kv_heads="8/4/2/2"),
        ),
    ]
    page = conversion_pages([*rows])["conversion.md"]
    assert cells_of(page, "4/2/1/1 (auto)")[1:] == ["25.0%", "2.5000", "0.5000", "40"]
    assert cells_of(page, "2")[1:] == ["25.0%", "2.6000", "0.6000", "20"]
    assert "than the same bytes spent evenly: holds for 2 heads; does **not** hold for 4 heads." in page


def test_the_heads_that_training_chose_are_drawn_by_layer() -> None:
    def chosen(name: str, budget: float, *counts: int) -> Record:
        groups = {f"layer {n}": [[head] for head in range(count)] for n, count in enumerate(counts)}
        groups["layer 0"][0] += [9] * (4 - counts[0])
        step = {**made_by("uptrain", 300), "found": {"groups": groups}}
        row = {"method": "dha", "kv_heads": "auto", "budget": budget}
        return told(evaluated(name, 2.6, **row), made_by("convert", 1), step)

    marked = f"{START.format('heads dha')}\n{END}"
    records = [chosen("dha/b", 0.5, 2, 4), chosen("dha/a", 0.25, 1, 2), chosen("dha/c", 0.25, 4, 4)]
    table = with_tables(marked, [*records, evaluated("dha/d", 2.0)])
    assert [line.strip("| ").split(" | ") for line in table.splitlines() if "█" in line] == [
        ["0", "█░░░", "██░░"],
        ["1", "██", "████"],
    ]
    assert "| layer | 25% of the bytes | 50% of the bytes |" in table
    groups = {"groups": {"layer 0": [[0], [1]]}, "value_groups": {"layer 0": [[0, 1]]}}
    apart = told(evaluated("dha/e", 2.6, method="dha", budget=0.5), {**made_by("uptrain", 300), "found": groups})
    table = with_tables(marked, [apart])
    assert "| layer | 50% of the bytes, keys | 50% of the bytes, values |" in table
    assert "| 0 | ██ | █░ |" in table
    assert with_tables(marked, [evaluated("dha/d", 2.0)]) == marked


def test_attentions_trained_each_on_its_own_are_held_against_what_they_were() -> None:
    trained = {"loss_name": "attention:1.0", "tokens": 600_000, "init": "fit", "seed": 0}
    rows = [
        evaluated("conversion/mean/converted", 6.0),
        evaluated("local/fit/converted", 3.0, init="fit"),
        told(
            evaluated("local/fit/uptrained", 2.5, **trained),
            made_by("convert", 20, kv_heads=2),
            made_by("uptrain", 300),
        ),
    ]
    page = conversion_pages([*rows])["conversion.md"]
    row = cells_of(page, "2: fit, q, o, gate, up, down repaired (default)")
    assert row[1:] == ["3.0000", "0.750", "2.5000", "0.875", "600k", "5.0"]
    assert "block-local training improves on it: holds for 2 heads, fit" in page


def test_an_init_that_was_left_to_the_method_is_read_from_the_lineage() -> None:
    unsaid = evaluated("local/x", 3.0)
    del unsaid.settings["row"]["init"]
    assert results([unsaid]) == []
    (found,) = results([told(unsaid, made_by("convert", 20, kv_heads=2, init="fit"), made_by("uptrain", 300))])
    assert found.start == DEFAULT


def test_a_repaired_mean_is_no_mean_pooling_and_a_calibration_seed_no_other_row() -> None:
    made = [
        evaluated("a", 4.0),
        evaluated("b", 3.0, repair="q,o,down"),
        *(evaluated(f"c{seed}", 2.5 + seed / 10, init="fit", calibration_seed=seed) for seed in (0, 1)),
    ]
    rows = {row.name: row for row in studies(made)[0].rows}
    assert rows["gqa, kv heads 2, init mean"].gap_closed is None
    assert rows["gqa, kv heads 2, init mean, repair q,o,down"].gap_closed == pytest.approx(0.5)
    assert rows["gqa, kv heads 2, init fit"].gap_closed == pytest.approx((4.0 - 2.55) / 2)


# --- the recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_conversion_recipe_says_every_start_once() -> None:
    rows = cells(read_recipe(ROOT / "recipes" / "conversion.yaml", ["name=conversion-other", "source=elsewhere"]))
    options = [
        decode(
            ConvertSettings, {k: v for k, v in row.convert.items() if k in ConvertSettings.__dataclass_fields__}, "x"
        )
        for row in rows
    ]
    asked = [
        (row.convert["kv_heads"], row.convert["init"], each.repair, each.calibration_seed)
        for row, each in zip(rows, options, strict=True)
    ]
    labels = [_label(row.convert) for row in rows]
    assert len(set(asked)) == len(set(labels)) == len(rows) == 36
    found = results(
        [
            evaluated(f"conversion-other/{label}/converted", 3.0, **row.convert)
            for label, row in zip(labels, rows, strict=True)
        ]
    )
    fit = [each for each in found if each.start.init == "fit"]
    assert {each.start.repair for each in fit} == {(), ("o",), ("o", "down"), ("q", "o", "down"), REPAIRABLE}
    wanted = {(heads, "fit", REPAIRABLE, seed) for heads in (4, 2, 1) for seed in (0, 1, 2)}
    assert wanted <= set(asked)


@pytest.mark.parametrize(("name", "count"), [("recovery", 12), ("headline", 24), ("local", 3)])
def test_the_training_recipes_spend_what_they_say(name: str, count: int) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    rows = cells(recipe)
    assert recipe.name == name
    assert len({row.label for row in rows}) == len(rows) == count
    assert {(row.uptrain or {})["tokens"] for row in rows} <= {150_000, 600_000}
    assert recipe.control == (name == "headline")
