"""Short names of rows, plans and the models of a benchmark: the fewest settings that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

from kvfold.disk.record import Record
from kvfold.methods import all_methods
from kvfold.report.benches import bench_rows, benched
from kvfold.report.rows import Row, Study, setting_words, training_words

_Items = tuple[tuple[str, str], ...]  # settings by name, and in words
_MOST = 4  # settings in a short name; if these are too few, the name is the whole label


def short_names(rows: Sequence[Row]) -> list[str]:
    """A name for each row, in their order: `gqa, kv heads 2`; no two rows have the same one."""
    items = [
        () if row.role == "teacher" else (*_items(row.settings), *training_words(row.training).items()) for row in rows
    ]
    return _names([row.group for row in rows], items, [row.label for row in rows])


def plan_names(plans: Sequence[Record]) -> list[str]:
    """A name for each plan, by the settings that differ from the defaults of its method."""
    methods = [str(plan.metrics["method"]) for plan in plans]
    items = []
    for name, plan in zip(methods, plans, strict=True):
        known = all_methods().get(name)
        usual = {each.name: each.default for each in fields(known.Config)} if known else {}
        settings = plan.metrics["settings"].items()
        items.append(_items({key: value for key, value in settings if value is not None and usual.get(key) != value}))
    whole = [", ".join([name, *(words for _, words in own)]) for name, own in zip(methods, items, strict=True)]
    return _names(methods, items, whole)


def bench_names(bench: Record, found: Sequence[Study]) -> dict[str, str]:
    """The models of a benchmark -> the short names of their rows; a model without a row is left out."""
    models = list(dict.fromkeys(row["model"] for row in bench_rows(bench)))
    names = {models[0]: "teacher"} if models else {}
    for study in found:
        for row, name in zip(study.everyone, short_names(study.everyone), strict=True):
            names |= {model: name for model in models[1:] if benched(bench, model, row.records)}
    return {model: name for model, name in names.items() if list(names.values()).count(name) == 1}


def _items(settings: Mapping[str, Any]) -> _Items:
    return tuple((key, setting_words(key, value).replace("_", " ")) for key, value in settings.items())


def _names(starts: Sequence[str], items: Sequence[_Items], whole: Sequence[str]) -> list[str]:
    """A start and a few items for each; the whole name where these cannot tell it from others."""
    names = []
    for at, start in enumerate(starts):
        others = [set(items[k]) for k in range(len(starts)) if k != at and starts[k] == start]
        chosen = _distinct(items[at], others, at_least=0 if start in ("control", "teacher") else 1)
        names.append(whole[at] if chosen is None else ", ".join([start, *chosen]))
    return [full if names.count(name) > 1 else name for name, full in zip(names, whole, strict=True)]


def _distinct(own: _Items, others: Sequence[set[tuple[str, str]]], at_least: int) -> tuple[str, ...] | None:
    """The fewest items that no other has together; the first item is among them, unless all have it.

    Another that has all of them and more does not count: its name has some of the others.
    """
    first = own[:1] if own and at_least and not (others and all(own[0] in other for other in others)) else ()
    for count in range(max(at_least - len(first), 0), _MOST):
        for chosen in combinations(own[len(first) :], count):
            if not any(set(first + chosen) <= other and not set(own) < other for other in others):
                return tuple(words for _, words in first + chosen)
    return None if own or others else ()
