"""Flags from the fields of settings: a command's function, and the signature by which typer reads its flags."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from kvfold.methods import all_methods
from kvfold.settings import metavar


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and the settings whose fields become its flags, imported only when it is the one that was asked."""

    function: Callable[..., None]
    settings: tuple[str, ...]  # "module:Class"
    methods: bool

    def flags(self, fixed: Sequence[inspect.Parameter]) -> list[list[inspect.Parameter]]:
        """The flags of each settings class in order; those of every method come last."""
        taken = {each.name for each in fixed}
        groups = []
        for place in self.settings:
            module, _, name = place.partition(":")
            groups.append(list(_flags(getattr(importlib.import_module(f"kvfold.{module}"), name), taken)))
        if self.methods:
            groups.append([flag for each in all_methods().values() for flag in _flags(each.Config, taken)])
        return groups

    def with_flags(self) -> Callable[..., None]:
        """The function with a signature that typer can read; `given` receives one mapping for each flag group."""
        signature = inspect.signature(self.function, eval_str=True)
        fixed = [each for name, each in signature.parameters.items() if name != "given"]
        groups = self.flags(fixed)
        if "given" not in signature.parameters:
            return self.function

        @functools.wraps(self.function)
        def call(**values: Any) -> None:
            given = [{flag.name: values.pop(flag.name) for flag in group} for group in groups]
            self.function(given=[{k: v for k, v in group.items() if v is not None} for group in given], **values)

        parameters = sorted([*fixed, *(flag for group in groups for flag in group)], key=lambda each: each.kind)
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call


def _flags(settings: type, taken: set[str]) -> Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(settings)
    for each in dataclasses.fields(settings):
        if each.name in taken:
            continue
        taken.add(each.name)
        flag = f"--{each.name.replace('_', '-')}"
        words = each.metadata.get("help", "")
        if each.default not in (dataclasses.MISSING, None, ()):
            words += f" [default: {each.default}]"
        if hints[each.name] is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=words, show_default=False)
            yield _parameter(each.name, bool | None, option)
        else:
            option = typer.Option(flag, help=words, show_default=False, metavar=metavar(hints[each.name]))
            yield _parameter(each.name, str | None, option)


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
