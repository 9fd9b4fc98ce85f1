"""Generate pages from code and records, so that no number or flag is typed twice.

python docs/generate.py          writes docs/commands.md, docs/api.md and docs/families.md; from records: the tables
                                 between marks in README and docs, the figures, docs/miniature.md, docs/conversion.md
python docs/generate.py --check  changes nothing; exit 1 if one of them is out of date
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import kvfold
from kvfold import errors
from kvfold.cli.commands import COMMANDS
from kvfold.cli.flags import Flag
from kvfold.disk import record
from kvfold.report import first_planes
from pages.cluster import with_cluster
from pages.compared import compared_figure
from pages.conversion import conversion_pages
from pages.families import families_page
from pages.inspection import inspection_figures
from pages.kept import task_figure
from pages.marks import with_tables
from pages.miniature import miniature_page, of_runs, quality_figure

ROOT = Path(__file__).parent.parent


def commands() -> str:
    """Every command with its arguments and flags, from the settings that they are generated from."""
    parts = [
        "# Commands",
        "",
        "Generated from the settings of each stage by `python docs/generate.py`.",
        "Write counts as `20M` and lists as `1,2,4`. Every command has `--help`.",
        "Exit status: 0 success, 2 invalid input, 3 a missed gate, 130 interrupted.",
        "",
    ]
    for name, command in COMMANDS.items():
        panels = {panel.title: panel.flags for panel in command.panels()}
        arguments = panels.pop("Arguments", ())
        usage = " ".join(["kvfold", name, *(each.written for each in arguments), "[flags]"])
        parts += [f"## kvfold {name}", "", command.function.__doc__ or "", "", "```", usage, "```", ""]
        if arguments:
            parts += [*(f"- `{each.written}`: {each.help}" for each in arguments), ""]
        own = [flag for title, flags in panels.items() if not title.startswith("Method ") for flag in flags]
        parts += _flags(own)
        if command.methods:
            parts += ["and the flags of the [method](#methods).", ""]
    parts += ["## Methods", "", "`kvfold plan` and `kvfold convert` take the flags of their `--method`.", ""]
    for panel in COMMANDS["convert"].panels():
        if panel.title.startswith("Method "):
            parts += [f"### {panel.title.removeprefix('Method ')}", "", *_flags(panel.flags)]
    return "\n".join(parts)


def _flags(flags: Sequence[Flag]) -> list[str]:
    """A table of flags, their values and their help."""
    rows = [(f"`{each.written}`", f"`{each.values}`" if each.values else "", each.help) for each in flags]
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return ["| flag | values | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def api() -> str:
    """Every public name of `kvfold`: mkdocstrings adds signatures and docstrings, the fields of settings are here."""
    places = {name: f"{getattr(kvfold, name).__module__}.{name}" for name in kvfold.__all__ if name != "__version__"}
    settings = [name for name in places if dataclasses.is_dataclass(getattr(kvfold, name))]
    raised = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, kvfold.KvfoldError)]
    parts = [
        "# Python API",
        "",
        "The public names of `kvfold`. Each function is the command of the same name, and takes the same settings.",
        "`import kvfold` loads neither torch nor transformers: a name is imported when it is first used.",
        "",
        "## Functions",
        "",
        *(f"::: {path}\n" for name, path in places.items() if name not in (*settings, "KvfoldError")),
        "## Settings",
        "",
    ]
    for name in settings:
        parts += [
            f"::: {places[name]}",
            "    options: {show_signature: false}",
            "",
            "| field | default | |",
            "|---|---|---|",
        ]
        for each in dataclasses.fields(getattr(kvfold, name)):
            default = "required" if each.default is dataclasses.MISSING else f"`{each.default!r}`"
            words = str(each.metadata.get("help", "")).replace("|", chr(92) + "|")
            parts.append(f"| `{each.name}` | {default} | {words} |")
        parts.append("")
    return "\n".join([*parts, "## Errors", "", *(f"::: kvfold.errors.{each.__name__}\n" for each in raised)])


def pages() -> dict[Path, str]:
    """The text of every generated page, by its path."""
    records = record.read_all(ROOT / "results")
    made = {ROOT / "docs" / f"{name}.md": page() for name, page in (("commands", commands), ("api", api))}
    made[ROOT / "docs" / "families.md"] = families_page()
    headline = of_runs(records, lambda name: name.startswith("headline/"))
    if headline:
        linear = of_runs(records, lambda name: name.startswith("supra-headline/"))
        real = task_figure(of_runs(records, lambda name: name.startswith("smollm2-tasks/")))
        made[ROOT / "docs" / "quality-against-bytes.svg"] = real or quality_figure([*headline, *linear])
    if planes := first_planes(headline):
        made[ROOT / "docs" / "elitekv-planes.svg"] = planes
    made |= {ROOT / "docs" / name: text for name, text in inspection_figures(records).items()}
    if compared := compared_figure(of_runs(records, lambda name: name.partition("/")[0] == "compare")):
        made[ROOT / "docs" / "compare.svg"] = compared
    miniature = [each for each in records if each.name.startswith("miniature")]
    if miniature:
        made[ROOT / "docs" / "miniature.md"] = miniature_page(miniature)
    made |= {ROOT / "docs" / name: text for name, text in conversion_pages(records).items()}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if path not in made:
            made[path] = with_cluster(with_tables(path.read_text(encoding="utf-8"), records), records)
    return made


def main() -> int:
    """Write or check."""
    stale = [
        path
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8").rstrip() != text.rstrip()
    ]
    for path in stale:
        print(f"out of date: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(pages()[path].rstrip() + "\n", encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
