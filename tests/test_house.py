"""The house keeps its own rules: import layers, light import, commands with help and docs."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kvfold.cli.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "kvfold"

ROWS = [  # docs/architecture.md says what lives in each: a package imports from its own row and from rows above it here
    {"", "errors", "progress", "settings", "formats", "inputs", "faults", "machine", "ranks"},
    {"contracts"},
    {"solve", "attention"},
    {"methods", "families"},
    {"disk"},
    {"hf", "text", "predict"},
    {"calibrate", "repair", "train", "evaluate", "export", "report"},
    {"convert", "compare", "run", "inspection"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}


def _part(path: Path) -> str:
    """The room of a source file: the package that it lies in, or a module of row 0."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


@cache
def _imported(path: Path) -> tuple[str, ...]:
    """The dotted name of every import in a file, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [node.module] if node.module != "kvfold" else [f"kvfold.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return tuple(found)


def _imports(path: Path) -> set[tuple[str, str]]:
    """(module below kvfold, whole dotted name) of every import of kvfold in a file."""
    found = set()
    for name in _imported(path):
        parts = name.split(".")
        if parts[0] == "kvfold":
            below = parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""
            found.add((below, name))
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_a_package_imports_only_its_own_row_or_rows_below() -> None:
    assert {_part(path) for path in SOURCES} <= set(LEVEL), "a package has no row: give it one here, on purpose"
    wrong = [
        f"{path.relative_to(PACKAGE)} (row {LEVEL[_part(path)]}) imports {name} (row {LEVEL[below]})"
        for path in SOURCES
        for below, name in _imports(path)
        if LEVEL[below] > LEVEL[_part(path)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["methods", "families"])
def test_methods_and_families_never_import_each_other(package: str) -> None:
    files = [path for path in (PACKAGE / package).glob("*.py") if not path.stem.startswith("_")]
    assert files
    for path in files:
        for _, name in _imports(path):
            other = "families" if package == "methods" else "methods"
            assert not name.startswith(f"kvfold.{other}"), f"{path.name} imports {name}"
            siblings = {f"kvfold.{package}.{each.stem}" for each in files}
            assert name not in siblings, f"{path.name} imports its sibling {name}"


def test_no_cycles_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        graph.setdefault(_part(path), set()).update(below for below, _ in _imports(path) if below != _part(path))
    done: set[str] = set()

    def visit(part: str, above: tuple[str, ...]) -> None:
        assert part not in above, f"cycle: {' -> '.join((*above, part))}"
        if part not in done:
            for below in graph.get(part, ()):
                visit(below, (*above, part))
            done.add(part)

    for part in graph:
        visit(part, ())


def test_only_hf_imports_transformers() -> None:
    for path in SOURCES:
        if _part(path) == "hf":
            continue
        assert not any(name.split(".")[0] == "transformers" for name in _imported(path)), path


def test_import_kvfold_is_light() -> None:
    code = (
        "import sys, kvfold; dir(kvfold); print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_help_of_every_command_is_light() -> None:
    code = (
        "import sys; from kvfold.cli.commands import COMMANDS; from kvfold.cli.main import run_command\n"
        "for name in COMMANDS:\n"
        "    run_command([name, '--help'])\n"
        "    print('loaded', name, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert loaded == [f"loaded {name} []" for name in COMMANDS]


def test_public_names_are_functions_even_after_their_modules_were_imported() -> None:
    import kvfold
    import kvfold.evaluate.evaluation  # binds the submodule, which must not hide the function

    for name in kvfold.__all__:
        assert callable(getattr(kvfold, name)) or name == "__version__", name
    with pytest.raises(AttributeError, match="no attribute 'folds'"):
        kvfold.folds  # noqa: B018


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_appears_in_the_docs(name: str) -> None:
    each = COMMANDS[name]
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"## kvfold {name}\n\n{each.function.__doc__}\n" in page
    stage, method = set(), set()
    for panel in each.panels():
        for flag in panel.flags:
            (method if panel.title.startswith("Method ") else stage).add(flag.name)
            about = f"kvfold {name} {flag.written}: {flag.help}"
            assert re.match(r"[A-Z]", flag.help), about
            assert re.search(r"\.( \[(default: \S+|required)\])?$", flag.help), about
            if flag.values:  # neither a switch nor an argument
                assert re.search(r"[Dd]efault: |required|Without --|instead of|repeatable", flag.help), about
            assert f"`{flag.written}`" in page
    assert not stage & method, f"a method cannot see its own {stage & method}: the stage has flags of these names"


def test_the_generated_pages_are_in_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="__main__")
    assert not ended.value.code, f"{capsys.readouterr().out}: run python docs/generate.py"


def test_the_readme_names_both_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
