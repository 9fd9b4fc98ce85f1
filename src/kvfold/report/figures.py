"""Figures as inline SVG; the same numbers give the same bytes.

Matplotlib draws with stand-in colours, which become CSS variables: one figure serves a light page, a dark page and
paper. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from kvfold.errors import SettingError
from kvfold.report.labels import leader, place

SERIES = ("#2563c9", "#c2410c", "#0f8a5f", "#9333a8", "#b58900", "#0e7c95", "#be185d", "#5b6472")
DARK_SERIES = ("#7aa8ff", "#ff9a5c", "#4fd1a1", "#d896f0", "#e6c14b", "#5fcbe3", "#ff86b8", "#aab4c0")
_INK, _GRID, _PAPER = "#010203", "#010204", "#010205"
_STAND_INS = tuple(f"#0102{16 + number:02x}" for number in range(len(SERIES)))
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")
_HALO = "label-"  # prefix of the ids of labels, which get an outline in the colour of the paper
_HOVERED = 12  # points of a line in its hover text, at most
_NUMBERED = 12  # columns of a heat map with room for numbers
_FAINT = 0.04  # opacity of the cells of a heat map at least, which can then be pointed at
_TICKS = 32  # of an axis of a heat map, at most
WIDE, NARROW = 12.0, 5.2  # inches of 72 units: for a page and for a phone
_HEIGHT = 3.3
LINEAR = 0.01  # nats of KL


@dataclass(frozen=True)
class Line:
    """One line of a figure, in order of x; `low` and `high` bound each y over seeds."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Point:
    """One point of a scatter. Points of a group share a colour and a mark.

    A point that is not `labelled` has only its hover text; one that is not `in_front` is never on the front.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    group: str = ""
    hollow: bool = False
    labelled: bool = True
    in_front: bool = True
    about: str = ""  # more words for the hover text


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
    hovers = {}
    with _figure(len(drawn) + len(levels or {})) as (figure, axes):
        for number, line in enumerate(drawn):
            style = {"color": _STAND_INS[number % 8], "linestyle": _DASHES[number // 8 % 4], "linewidth": 1.6}
            if marked:
                style |= {"marker": _MARKERS[number % 8], "markersize": 4.5}
            axes.plot(line.x, line.y, label=line.label, gid=f"line-{number}", **style)
            hovers[f"line-{number}"] = _hover(line, x_label, y_label)
            if line.low and any(high > low for low, high in zip(line.low, line.high, strict=True)):
                axes.fill_between(line.x, line.low, line.high, color=_STAND_INS[number % 8], alpha=0.15, linewidth=0)
        for label, level in (levels or {}).items():
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
        if log_x:
            _doubling(axes, sorted({x for line in drawn for x in line.x}))
        if from_zero:
            axes.set_ylim(bottom=0)
        _words(axes, x_label, y_label)
        return _svg(figure, name, title, hovers)


def _hover(line: Line, x_label: str, y_label: str) -> str:
    """The hover text of a line: its label and points; of many points, the first and the last."""
    points = list(zip(line.x, line.y, strict=True))
    shown = points if len(points) <= _HOVERED else [points[0], points[-1]]
    return "\n".join([line.label, f"{x_label}: {y_label}", *(f"{x:,.6g}: {y:.4g}" for x, y in shown)])


@dataclass(frozen=True)
class Panel:
    """One scatter of a figure: its points, what x is, and the same in a word."""

    points: Sequence[Point]
    x_label: str
    x_word: str


def scatter(
    name: str, title: str, points: Sequence[Point], *, x_label: str, y_label: str, width: float = NARROW
) -> str:
    """A scatter over a logarithmic x axis as inline SVG, with its front and a label at each point.

    The front steps through the points that no other beats in both x and y; less is better. A label without room is left
    out.
    """
    front = "Front: no student with an unquantised cache beats one on this line in both bytes and loss"
    with _figure(0) as (figure, axes):
        figure.set_size_inches(width, _HEIGHT + min(3.0, 0.14 * sum(point.labelled for point in points)))
        hovers = _points(axes, Panel(points, x_label, ""), y_label, "", front)
        _labels(figure, [axes], [points], [""])
        return _svg(figure, name, title, hovers)


def panels(name: str, title: str, drawn: Sequence[Panel], *, y_label: str, width: float) -> str:
    """Scatters of the same y side by side as inline SVG, each with its front and a label at each point.

    y is linear up to `LINEAR` and logarithmic above.
    """
    hovers: dict[str, str] = {}
    with _figure(0) as (figure, first):
        figure.set_size_inches(width, _HEIGHT + min(3.0, 0.14 * max(len(panel.points) for panel in drawn)))
        first.remove()
        axes = list(figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0])
        prefixes = [f"{number}-" for number in range(len(drawn))]
        for each, panel, prefix in zip(axes, drawn, prefixes, strict=True):
            each.set_yscale("symlog", linthresh=LINEAR)
            each.yaxis.set_major_formatter("{x:g}")
            front = f"Front: no other row beats one on this line in both {panel.x_word} and {y_label}"
            hovers |= _points(each, panel, y_label if each is axes[0] else "", prefix, front)
        _labels(figure, axes, [panel.points for panel in drawn], prefixes)
        return _svg(figure, name, title, hovers)


def _points(axes: Any, panel: Panel, y_label: str, prefix: str, about_front: str) -> dict[str, str]:
    """Draw the points of a panel with their front, and return the hover texts by id."""
    points, hovers = panel.points, {}
    groups = list(dict.fromkeys(point.group for point in points))
    for number, point in enumerate(points):
        colour, marker = _STAND_INS[groups.index(point.group) % 8], _MARKERS[groups.index(point.group) % 8]
        if point.low is not None and point.high is not None and point.high > point.low:
            axes.vlines(point.x, point.low, point.high, color=colour, linewidth=1.2)
        look = {"color": colour, "markersize": 7.0, "markeredgewidth": 1.2, "zorder": 3 - 0.5 * point.hollow}
        face = _PAPER if point.hollow else colour
        axes.plot([point.x], [point.y], marker, markerfacecolor=face, gid=f"{prefix}point-{number}", **look)
        shown = [
            point.label,
            point.about,
            f"{panel.x_label}: {_number(point.x)}",
            f"{y_label}: {point.y:.4f}",
        ]
        hovers[f"{prefix}point-{number}"] = "\n".join(filter(None, shown))
    axes.axhline(0, color=_GRID, linewidth=1.4, zorder=0)
    front = _front(points)
    if len(front) > 1:
        steps = {"drawstyle": "steps-post", "color": _INK, "linewidth": 1, "alpha": 0.4, "zorder": 1}
        axes.plot([point.x for point in front], [point.y for point in front], gid=f"{prefix}front", **steps)
        hovers[f"{prefix}front"] = about_front
    _doubling(axes, sorted({point.x for point in points}), around=1.6)
    axes.margins(y=0.09)
    _words(axes, panel.x_label, y_label)
    return hovers


def _front(points: Sequence[Point]) -> list[Point]:
    return front_of([point for point in points if point.in_front])


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both x and y, by x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def _labels(figure: Any, axes: Sequence[Any], drawn: Sequence[Sequence[Point]], prefixes: Sequence[str]) -> None:
    """Write labels beside their marks if there is room, with a line to a mark that is far away."""
    figure.draw_without_rendering()  # lays it out: data now have places
    figure.set_layout_engine("none")
    for each, points, prefix in zip(axes, drawn, prefixes, strict=True):
        _label(each, points, prefix)


def _label(axes: Any, points: Sequence[Point], prefix: str) -> None:
    """Write the labels of one scatter."""
    labelled = [point for point in points if point.labelled]
    look = {"fontsize": 8.5, "ha": "left", "va": "bottom", "zorder": 4}
    texts = [axes.text(0, 0, point.label, gid=f"{_HALO}{prefix}{at}", **look) for at, point in enumerate(labelled)]
    sizes = [text.get_window_extent().size for text in texts]
    places = {id(point): tuple(axes.transData.transform((point.x, point.y))) for point in points}
    avoided = [(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in places.values()]
    for point in points:
        low, high = (point.y if end is None else end for end in (point.low, point.high))
        ends = [axes.transData.transform((point.x, end)) for end in (low, high)]
        avoided.append((ends[0][0] - 1, ends[0][1], ends[1][0] + 1, ends[1][1]))
    for (x, y), (to_x, to_y) in pairwise(places[id(point)] for point in _front(points)):
        avoided += [(x, y - 1, to_x, y + 1), (to_x - 1, to_y, to_x + 1, y)]
    (left, bottom), (right, top) = axes.get_window_extent().get_points()
    boxes = place([places[id(point)] for point in labelled], sizes, avoided, (left + 1, bottom + 1, right + 6, top))
    back = axes.transData.inverted()
    for point, text, box in zip(labelled, texts, boxes, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position(back.transform(box[:2]))
        if line := leader(places[id(point)], box):
            xs, ys = zip(*(back.transform(end) for end in line), strict=True)
            axes.plot(xs, ys, color=_INK, linewidth=0.6, alpha=0.5, zorder=2)


def marks(name: str, title: str, rows: Sequence[Line], *, x_label: str, y_ticks: Sequence[str]) -> str:
    """Rows of small marks as inline SVG; `y_ticks` name the rows at y = 0, 1, 2, ..."""
    with _figure(0) as (figure, axes):
        figure.set_figheight(max(_HEIGHT, 0.45 * len(rows) + 0.6))
        for number, row in enumerate(rows):
            axes.plot(row.x, row.y, "s", color=_STAND_INS[number % 2], markersize=2.6)
        axes.set_yticks(range(len(y_ticks)), y_ticks)
        axes.grid(visible=False, axis="y")
        _words(axes, x_label, "")
        return _svg(figure, name, title)


def heat_map(
    name: str,
    title: str,
    rows: Sequence[Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[str] = (),
    y_ticks: Sequence[str] = (),
    digits: int = 2,
    most: float | None = None,
    root: bool = False,
    marked: Collection[tuple[int, int]] = (),
) -> str:
    """A grid of cells as inline SVG, the darker the larger; the first row is the top one.

    The colour grows with a number, or with its `root`, up to `most` (default: the largest); numbers below 0 are 0.
    Cells of `marked` (row, column) have a frame. Numbers that do not round to 0 stand in the cells if there is room;
    hover texts have all of them.
    """
    width = max(map(len, rows))
    top = most or max((value for row in rows for value in row if value is not None), default=0) or 1
    hovers = {}
    with _figure(0) as (figure, axes):
        from matplotlib.patches import Rectangle

        figure.set_figheight(max(1.6, 0.24 * len(rows) + 0.7))
        for at, row in enumerate(rows):
            for column, value in enumerate(row):
                if value is None:
                    continue
                part, place = min(1.0, max(0.0, value / top)), f"cell-{at}-{column}"
                shade = max(_FAINT, part**0.5 if root else part)
                frame = {"edgecolor": _INK, "linewidth": 1.4} if (at, column) in marked else {"linewidth": 0}
                cell = Rectangle((column - 0.48, at - 0.46), 0.96, 0.92, facecolor=(_STAND_INS[0], shade), **frame)
                axes.add_patch(cell).set_gid(place)
                words = [f"{_tick(y_label, y_ticks, at)}, {_tick(x_label, x_ticks, column)}", f"{value:.{digits + 1}f}"]
                hovers[place] = ": ".join(words)
                if width <= _NUMBERED and round(value, digits):
                    look = {"ha": "center", "va": "center", "fontsize": 7.5, "color": _PAPER if shade > 0.6 else _INK}
                    axes.text(column, at, f"{value:.{digits}f}", **look)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(len(rows) - 0.5, -0.5))
        for axis, ticks, count in ((axes.xaxis, x_ticks, width), (axes.yaxis, y_ticks, len(rows))):
            shown = range(0, count, -(-count // _TICKS))
            axis.set_ticks(shown, [ticks[at] if ticks else str(at) for at in shown])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        _words(axes, x_label, y_label)
        return _svg(figure, name, title, hovers)


def _tick(label: str, ticks: Sequence[str], at: int) -> str:
    return f"{label} {ticks[at] if ticks else at}"


@contextmanager
def _figure(legend_lines: int) -> Iterator[tuple[Any, Any]]:
    """A figure with axes, and room for a legend below them."""
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
        figure = Figure(figsize=(NARROW, _HEIGHT + 0.19 * max(0, legend_lines - 1)), layout="constrained")
        yield figure, figure.add_subplot()


def _doubling(axes: Any, values: Sequence[float], around: float = 1.25) -> None:
    """Make x logarithmic, with a tick at each measured value that has room."""
    axes.set_xscale("log", base=2)
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.35 * kept[-1]:
            kept.append(value)
    axes.set_xticks(kept, [_number(value) for value in kept])
    axes.set_xticks([], minor=True)
    axes.set_xlim(values[0] / around, values[-1] * around)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _words(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower left", ncols=1, handlelength=2.4, labelspacing=0.35, borderaxespad=0.2)


def _svg(figure: Any, name: str, title: str, hovers: Mapping[str, str] | None = None) -> str:
    """The figure as an SVG element of an HTML page, with CSS colours and without addresses.

    Ids begin with `name`. `hovers` are hover texts by the id of a part.
    """
    name = re.sub(r"[^\w-]", "-", name)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"\A.*?(?=<svg )", "", drawn.getvalue(), count=1, flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</defs>\s*", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(rf'<g id="{name}-{_HALO}[\d-]+"', r'\g<0> class="halo"', text)
    for part, hover in (hovers or {}).items():
        group = f'<g id="{name}-{part}">'
        text = text.replace(group, f"{group}<title>{escape(hover)}</title>", 1)
    text = text.replace("font-family: 'DejaVu Sans'; ", "")
    colours = {_INK: "currentColor", _GRID: "var(--grid)", _PAPER: "var(--paper)"}
    colours |= {stand_in: f"var(--series-{number})" for number, stand_in in enumerate(_STAND_INS)}
    for stand_in, colour in colours.items():
        text = text.replace(stand_in, colour)
    label = f'<svg role="img" aria-labelledby="{name}-title" '
    head, _, rest = text.partition(">")
    return f'{label}{head.removeprefix("<svg ").strip()}>\n <title id="{name}-title">{escape(title)}</title>{rest}'


def style() -> str:
    """The CSS variables of the figures, for light and dark pages."""
    light = "; ".join(f"--series-{number}: {colour}" for number, colour in enumerate(SERIES))
    dark = "; ".join(f"--series-{number}: {colour}" for number, colour in enumerate(DARK_SERIES))
    return (
        f":root {{ --grid: #d5d9df; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ --grid: #3b4350; {dark} }} }}\n"
        ".halo { paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px; stroke-linejoin: round }"
    )


def standalone(svg: str) -> str:
    """An inline figure as a file, with a background that is light or dark as the reader's screen."""
    look = f"{style()}\nsvg {{ --paper: #ffffff; color: #1b2129; background: var(--paper); "
    look += "font-family: system-ui, sans-serif }\n"
    look += "@media screen and (prefers-color-scheme: dark) { svg { --paper: #14181e; color: #e6e9ee } }"
    opening = '<svg xmlns="http://www.w3.org/2000/svg" '
    head, _, rest = svg.partition(">")
    return f"{opening}{head.removeprefix('<svg ')}>\n <style>{look}</style>{rest}"
