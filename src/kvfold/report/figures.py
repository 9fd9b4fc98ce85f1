"""Figures as inline SVG, the same bytes for the same numbers: no date, fixed ids, colours left to the page.

Matplotlib draws with stand-in colours, which become CSS variables afterwards, so that one figure serves a light page,
a dark one and paper. Text stays text: it takes the page's font, can be searched and is read aloud.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from kvfold.errors import SettingError

SERIES = ("#2563c9", "#c2410c", "#0f8a5f", "#9333a8", "#b58900", "#0e7c95", "#be185d", "#5b6472")
DARK_SERIES = ("#7aa8ff", "#ff9a5c", "#4fd1a1", "#d896f0", "#e6c14b", "#5fcbe3", "#ff86b8", "#aab4c0")
_INK, _GRID, _PAPER = "#010203", "#010204", "#010205"
_STAND_INS = tuple(f"#0102{16 + number:02x}" for number in range(len(SERIES)))
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")
_WIDTH, _HEIGHT = 5.2, 3.3  # inches of 72 units: about as wide as a phone, so that text keeps its size there


@dataclass(frozen=True)
class Line:
    """One line of a figure: points in order of x; `low` and `high` bound each y where there are several seeds."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Point:
    """One point of a scatter; without a y it is a vertical line, for a size whose quality was not measured."""

    label: str
    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


def lines(
    name: str,
    title: str,
    drawn: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
    marked: bool = True,
    levels: Mapping[str, float] | None = None,
) -> str:
    """A line chart as inline SVG; `levels` are named horizontal lines, `log_x` doubles from tick to tick."""
    with _figure(len(drawn) + len(levels or {})) as (figure, axes):
        for number, line in enumerate(drawn):
            style = {"color": _STAND_INS[number % 8], "linestyle": _DASHES[number // 8 % 4], "linewidth": 1.6}
            if marked:
                style |= {"marker": _MARKERS[number % 8], "markersize": 4.5}
            axes.plot(line.x, line.y, label=line.label, **style)
            if line.low and any(high > low for low, high in zip(line.low, line.high, strict=True)):
                axes.fill_between(line.x, line.low, line.high, color=_STAND_INS[number % 8], alpha=0.15, linewidth=0)
        for label, level in (levels or {}).items():
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
        if log_x:
            _doubling(axes, sorted({x for line in drawn for x in line.x}))
        if from_zero:
            axes.set_ylim(bottom=0)
        _words(axes, x_label, y_label)
        return _svg(figure, name, title)


def scatter(name: str, title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> str:
    """A scatter over a doubling x axis as inline SVG, each point with its own sign, colour and line of the legend."""
    with _figure(len(points)) as (figure, axes):
        for number, point in enumerate(points):
            colour, marker = _STAND_INS[number % 8], _MARKERS[(number + number // 8) % 8]  # no pair twice
            if point.y is None:
                axes.axvline(point.x, color=colour, linewidth=1.3, linestyle=(0, (4, 3)), label=point.label)
                continue
            if point.low is not None and point.high is not None and point.high > point.low:
                axes.vlines(point.x, point.low, point.high, color=colour, linewidth=1.2)
            axes.plot([point.x], [point.y], marker, color=colour, markersize=7.5, label=point.label)
        axes.axhline(0, color=_GRID, linewidth=1.4, zorder=0)
        _doubling(axes, sorted({point.x for point in points}))
        _words(axes, x_label, y_label)
        return _svg(figure, name, title)


def marks(name: str, title: str, rows: Sequence[Line], *, x_label: str, y_ticks: Sequence[str]) -> str:
    """Small marks row above row as inline SVG; rows are named at the y axis, at 0, 1, 2 and so on."""
    with _figure(0) as (figure, axes):
        figure.set_figheight(max(_HEIGHT, 0.45 * len(rows) + 0.6))
        for number, row in enumerate(rows):
            axes.plot(row.x, row.y, "s", color=_STAND_INS[number % 2], markersize=2.6)
        axes.set_yticks(range(len(y_ticks)), y_ticks)
        axes.grid(visible=False, axis="y")
        _words(axes, x_label, "")
        return _svg(figure, name, title)


def front(name: str, title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> str:
    """A scatter with a label beside each point and a line through those that no other is below and left of."""
    drawn = sorted(((each.x, each.y, each) for each in points if each.y is not None), key=lambda each: each[:2])
    best = [(x, y) for at, (x, y, _) in enumerate(drawn) if all(y < other for _, other, _ in drawn[:at])]
    with _figure(0) as (figure, axes):
        axes.plot([x for x, _ in best], [y for _, y in best], color=_INK, alpha=0.4, linewidth=1.3)
        for number, (x, y, point) in enumerate(drawn):
            colour, last = _STAND_INS[number % 8], number == len(drawn) - 1
            if point.low is not None and point.high is not None and point.high > point.low:
                axes.vlines(x, point.low, point.high, color=colour, linewidth=1.2)
            axes.plot([x], [y], "o", color=colour, markersize=8)
            offset, side, edge = ((-2, -9), "right", "top") if last else ((7, 5), "left", "bottom")
            axes.annotate(
                point.label,
                (x, y),
                offset,
                textcoords="offset points",
                color=colour,
                ha=side,
                va=edge,
                linespacing=1.25,
            )
        axes.margins(y=0.16)  # room for the labels of the highest and the lowest point
        _doubling(axes, sorted({x for x, _, _ in drawn}))
        _words(axes, x_label, y_label)
        return _svg(figure, name, title)


@contextmanager
def _figure(legend_lines: int) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes and room for its legend below."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingError("figures need matplotlib", next="pip install matplotlib") from error
    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kvfold",
        "font.family": ["DejaVu Sans"],  # it measures the text; the page sets it in its own font, which is narrower
        "font.size": 9.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,  # a name may hold a dollar
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(_WIDTH, _HEIGHT + 0.19 * max(0, legend_lines - 1)), layout="constrained")
        yield figure, figure.add_subplot()


def _doubling(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic, with a tick at each measured value that has room for one."""
    axes.set_xscale("log", base=2)
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.35 * kept[-1]:
            kept.append(value)
    axes.set_xticks(kept, [f"{value:,.0f}" for value in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlim(values[0] / 1.25, values[-1] * 1.25)


def _words(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower left", ncols=1, handlelength=2.4, labelspacing=0.35, borderaxespad=0.2)


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element for an HTML page: named ids, CSS colours, no address of anything."""
    name = re.sub(r"[^\w-]", "-", name)  # it becomes part of ids
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"\A.*?(?=<svg )", "", drawn.getvalue(), count=1, flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</defs>\s*", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = text.replace("font-family: 'DejaVu Sans'; ", "")
    colours = {_INK: "currentColor", _GRID: "var(--grid)", _PAPER: "var(--paper)"}
    colours |= {stand_in: f"var(--series-{number})" for number, stand_in in enumerate(_STAND_INS)}
    for stand_in, colour in colours.items():
        text = text.replace(stand_in, colour)
    label = f'<svg role="img" aria-labelledby="{name}-title" '
    head, _, rest = text.partition(">")
    return f'{label}{head.removeprefix("<svg ").strip()}>\n <title id="{name}-title">{escape(title)}</title>{rest}'


def style() -> str:
    """The CSS variables that the figures draw with, for light and for dark."""
    light = "; ".join(f"--series-{number}: {colour}" for number, colour in enumerate(SERIES))
    dark = "; ".join(f"--series-{number}: {colour}" for number, colour in enumerate(DARK_SERIES))
    return (
        f":root {{ --grid: #d5d9df; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ --grid: #3b4350; {dark} }} }}"
    )


def standalone(svg: str) -> str:
    """An inline figure as a file of its own, on a ground of its own, light or dark as the reader's screen is."""
    look = f"{style()}\nsvg {{ color: #1b2129; background: #ffffff; font-family: system-ui, sans-serif }}\n"
    look += "@media screen and (prefers-color-scheme: dark) { svg { color: #e6e9ee; background: #14181e } }"
    opening = '<svg xmlns="http://www.w3.org/2000/svg" '
    head, _, rest = svg.partition(">")
    return f"{opening}{head.removeprefix('<svg ')}>\n <style>{look}</style>{rest}"
