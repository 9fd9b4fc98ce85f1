"""Flags from the fields of settings: how a command reads them, and the help that shows them in panels."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NoReturn

from typing_extensions import override

from kvfold.cli.launch import check_alone, on_ranks
from kvfold.errors import SettingError, did_you_mean
from kvfold.methods import all_methods
from kvfold.settings import decode, metavar

WIDTH, COLUMN = 80, 30  # characters of a line of help, and before its second column
HELP = ("-h", "--help")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, or an argument: how it is written, its help, its values (none for a switch) and its default."""

    name: str  # of the parameter that receives it
    written: str  # `--kv-heads`, `--kl/--no-kl`, `SRC`, `RECIPE...`
    help: str
    values: str = ""
    default: Any = None
    required: bool = False
    repeatable: bool = False
    group: str = "Settings"  # of a stage's settings: the title of their panel

    @property
    def is_argument(self) -> bool:
        """Whether it has no dashes."""
        return not self.written.startswith("-")

    @property
    def usage(self) -> str:
        """`--kv-heads TEXT`, `--kl/--no-kl`, `SRC`."""
        return f"{self.written} {self.values}".rstrip()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser read it, as text or as a switch."""
        if self.is_argument:
            several = {"...": "+", "..]": "*"}.get(self.written[-3:])  # `RECIPE...`, `[STUDENT...]`
            parser.add_argument(self.name, metavar=self.written, nargs=several)
            return
        written, slash, _ = self.written.partition("/")
        action: Any = "append" if self.repeatable else "store" if self.values else "store_true"
        if slash:
            action = argparse.BooleanOptionalAction
        parser.add_argument(written, dest=self.name, action=action, default=self.default, required=self.required)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Flags that the help shows together."""

    title: str
    flags: Sequence[Flag]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its function, its own flags, and the settings whose fields become flags too."""

    function: Callable[..., None]
    own: Sequence[Flag]
    settings: str | None = None  # "module:Class", imported only for the command that runs
    methods: bool = False

    def panels(self) -> list[Panel]:
        """Every flag: arguments and common flags first, then those of the stage, then those of each method.

        A flag that several methods take stands in the panel of each.
        """
        stage = list(_flags(self._stage())) if self.settings else []
        found = [
            Panel("Arguments", [flag for flag in self.own if flag.is_argument]),
            Panel("Flags", [*(_listed(flag) for flag in self.own if not flag.is_argument), SHOW_HELP]),
        ]
        for group in dict.fromkeys(flag.group for flag in stage):
            found.append(Panel(group, [flag for flag in stage if flag.group == group]))
        if self.methods:
            found += [Panel(f"Method {name}", list(_flags(each.Config))) for name, each in all_methods().items()]
        return [panel for panel in found if panel.flags]

    def help(self, name: str) -> str:
        """The text of `kvfold NAME --help`."""
        arguments = [flag.written for flag in self.own if flag.is_argument]
        return help_text(" ".join([name, *arguments, "[flags]"]), self.function.__doc__ or "", self.panels())

    def run(self, name: str, words: Sequence[str]) -> None:
        """Call the function with the values of the words. Raises SettingError for words that it cannot read."""
        stage = list(_flags(self._stage())) if self.settings else []
        methods = [flag for each in all_methods().values() for flag in _flags(each.Config)] if self.methods else []
        flags = {flag.name: flag for flag in (*methods, *stage, *self.own)}
        values = _read(name, list(flags.values()), words)
        named = [key for key in flags if key not in {flag.name for flag in self.own}]
        given = {key: value for key in named if (value := values.pop(key)) is not None}
        if self.settings:
            options = {flag.name: given.pop(flag.name) for flag in stage if flag.name in given}
            values["options"] = decode(self._stage(), options, name)
        if self.methods:
            values["chosen"] = given
        if "gpus" in values:
            on_ranks(name, values.pop("gpus"), words, partial(self.function, **values))
        else:
            check_alone(name)
            self.function(**values)

    def _stage(self) -> type[Any]:
        module, _, name = str(self.settings).partition(":")
        return typing.cast(type[Any], getattr(importlib.import_module(f"kvfold.{module}"), name))


SHOW_HELP = Flag("help", ", ".join(HELP), "Show this help and exit.")


def _listed(flag: Flag) -> Flag:
    """A flag as the help shows it: `--method` with the names of the methods."""
    return dataclasses.replace(flag, values="|".join(all_methods())) if flag.name == "method" else flag


def _flags(settings: type[Any]) -> Iterator[Flag]:
    hints = typing.get_type_hints(settings)
    for each in dataclasses.fields(settings):
        written, switch = f"--{each.name.replace('_', '-')}", hints[each.name] is bool
        yield Flag(
            each.name,
            f"{written}/--no-{written[2:]}" if switch else written,
            each.metadata.get("help", "") + _default(each.default),
            "" if switch else metavar(hints[each.name]),
            group=each.metadata.get("group", "Settings"),
        )


def _default(value: Any) -> str:
    """The end of a flag's help: ` [default: 1024,4096]`, ` [required]`, or nothing where the help itself says it."""
    if value is dataclasses.MISSING:
        return " [required]"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f" [default: {'on' if value else 'off'}]"
    return f" [default: {','.join(map(str, value)) if isinstance(value, tuple) else value}]"


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise SettingError(message, where=self.prog, next=f"see kvfold {self.prog} --help")


def _read(name: str, flags: Sequence[Flag], words: Sequence[str]) -> dict[str, Any]:
    """The values of the words by the flags' names. Raises SettingError for a word that is none of them."""
    parser = _Parser(prog=name, add_help=False, allow_abbrev=False)
    for flag in flags:
        flag.add_to(parser)
    found, others = parser.parse_known_intermixed_args(words)
    if others:
        known = [part for flag in flags for part in flag.written.split("/")]
        what, near = "unexpected argument", None
        if others[0].partition("=")[0] == "--gpus":
            raise SettingError("this command runs on one device", where=name, next="leave out --gpus")
        if others[0].startswith("-"):
            what, near = "unknown flag", did_you_mean(others[0].partition("=")[0], known)
        raise SettingError(f"{what} {others[0]}", where=name, next=near or f"see kvfold {name} --help")
    return vars(found)


def help_text(usage: str, about: str, panels: Sequence[Panel], end: str = "") -> str:
    """Help as plain text of at most `WIDTH` columns."""
    parts = [f"Usage: kvfold {usage}", textwrap.indent(about, "  ")]
    for panel in panels:
        column = min(COLUMN, max(len(flag.usage) for flag in panel.flags) + 4)
        lines = [f"{panel.title}:"]
        for flag in panel.flags:
            text = textwrap.wrap(flag.help, WIDTH - column, break_on_hyphens=False)
            if len(flag.usage) + 4 > column:
                text = ["", *text]
            lines += [
                f"  {head:{column - 2}}{line}".rstrip() for head, line in zip_longest([flag.usage], text, fillvalue="")
            ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, end] if end else parts)
