"""Comparisons: a teacher, its students and other ways to make it cheaper, as a table and a figure with two fronts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.disk.record import Record
from kvfold.formats import count, size
from kvfold.report import figures
from kvfold.report.blocks import Block, Section
from kvfold.report.figures import WIDE, Panel, Point, front_of
from kvfold.report.reading import settings_fault
from kvfold.report.tables import NONE, Table

ROW, TIMES = "compare-row", "compare"  # kinds of records: the quality of one row, the times of all
TEACHER = "teacher"
MIB = 1 << 20
ABOUT = (
    "Loss in nats per token, KL to the teacher. Copy gain: by how many nats a span is easier the second time, by its "
    "distance. Weights and cache in the format of the checkpoint; peak memory as computed. Speeds: the teacher's time "
    "over the row's, all rows interleaved in one run. Front: no other row is better in both quality (KL) and bytes "
    "(weights and cache at the largest place that was timed), or quality and decode speed."
)


@dataclass(frozen=True)
class Place:
    """Where speed was measured."""

    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.context:,} × {self.batch}"


@dataclass(frozen=True)
class Line:
    """One row of a comparison: its record, its times by place, and its peak memory."""

    record: Record
    times: Mapping[Place, Mapping[str, Any]]
    peak: int | None

    @property
    def name(self) -> str:
        """The name of the row."""
        return str(self.record.settings["row"]["name"])

    @property
    def about(self) -> str:
        """How it is made, or why it could not run."""
        return self.record.error or str(self.record.settings["row"]["about"])

    def bytes_at(self, place: Place) -> float:
        """Bytes of the weights and of the cache at a place."""
        metrics = self.record.metrics
        return float(metrics["weight_bytes"] + place.context * place.batch * metrics["cache_bytes_per_token"])


@dataclass(frozen=True)
class Comparison:
    """The rows of one comparison, the teacher first, and the places of its times."""

    times: Record
    lines: tuple[Line, ...]
    places: tuple[Place, ...]

    @property
    def measured(self) -> list[Line]:
        """The rows that ran."""
        return [line for line in self.lines if line.record.status == "done"]

    @property
    def largest(self) -> Place:
        """The place with the most tokens."""
        return max(self.places, key=lambda place: (place.context * place.batch, place.context))

    def front(self, by: str) -> set[str]:
        """The rows that no other beats in quality and `bytes`, or in quality and `speed`."""
        points = self._points(by)
        return {point.label for point in front_of(points)}

    def _points(self, by: str) -> list[Point]:
        place, points = self.largest, []
        for line in (each for each in self.measured if by == "bytes" or each.times):
            x = line.bytes_at(place) / MIB if by == "bytes" else 1e3 * line.times[place]["decode_s_per_token"]
            group = str(line.record.settings["row"]["group"])
            points.append(Point(line.name, x, line.record.metrics["kl"], group=group, about=line.about))
        return points

    def figure(self, name: str) -> str:
        """KL against bytes, and against the time of a decode step, each with its front: inline SVG."""
        place = self.largest
        panels = [
            Panel(self._points("bytes"), f"weights and cache at {place}, MiB", "bytes"),
            Panel(self._points("speed"), f"decode at {place}, ms per token", "decode time"),
        ]
        return figures.panels(name, "Quality against bytes and speed", panels, y_label="KL to the teacher", width=WIDE)

    def table(self) -> Table:
        """One line for each row, with its quality, bytes and speed, and why it could not run."""
        teacher = self.lines[0].record.metrics
        distances, tasks = list(teacher.get("copy_gain") or {}), list(teacher.get("lm_eval") or {})
        columns = ["model", "loss", "KL", *(f"copy gain over {each}" for each in distances)]
        columns += [*tasks, "weights", "cache bytes/token", "peak memory"]
        columns += [f"{what} at {place}" for place in self.places for what in ("prefill", "decode")]
        columns += ["training tokens", "front", "note"]
        fronts = {by: self.front(by) for by in ("bytes", "speed")}
        return columns, [self._cells(line, columns, distances, tasks, fronts) for line in self.lines]

    def _cells(
        self,
        line: Line,
        columns: Sequence[str],
        distances: Sequence[str],
        tasks: Sequence[str],
        fronts: Mapping[str, set[str]],
    ) -> list[str]:
        metrics = line.record.metrics
        if line.record.status != "done":
            return [line.name, *[NONE] * (len(columns) - 2), line.about]
        cells = [line.name, f"{metrics['loss']:.4f}", f"{metrics['kl']:.4f}"]
        gains, scores = metrics.get("copy_gain") or {}, metrics.get("lm_eval") or {}
        cells += [NONE if gains.get(each) is None else f"{gains[each]:.2f}" for each in distances]
        cells += [_score(scores.get(each) or {}) for each in tasks]
        cells += [size(metrics["weight_bytes"]), f"{metrics['cache_bytes_per_token']:,.0f}"]
        cells.append(NONE if line.peak is None else size(line.peak))
        for place in self.places:
            for key in ("prefill_s", "decode_s_per_token"):
                cells.append(_speed(line, self.lines[0], place, key) if line.times else NONE)
        trained = metrics["training_tokens"]
        cells.append(count(trained) if trained else NONE)
        cells.append(", ".join(by for by, names in fronts.items() if line.name in names) or NONE)
        return [*cells, line.about or NONE]


def _speed(line: Line, teacher: Line, place: Place, key: str) -> str:
    """The teacher's time over a row's; the teacher's own in tokens per second."""
    seconds = line.times[place][key]
    if line is not teacher:
        return f"{teacher.times[place][key] / seconds:.2f}×"
    tokens = place.batch * (place.context if key == "prefill_s" else 1)
    return f"{tokens / seconds:,.0f} tokens/s"


def _score(found: Mapping[str, Any]) -> str:
    """The accuracy of a task, or its first metric."""
    scores = {key.partition(",")[0]: value for key, value in found.items() if isinstance(value, float)}
    return f"{scores.get('acc', next(iter(scores.values()))):.1%}" if scores else NONE


def comparisons(records: Sequence[Record]) -> Iterator[Comparison]:
    """The comparisons of which all rows are among the records, the latest of each name."""
    rows = {each.identity: each for each in records if each.kind == ROW and settings_fault(each) is None}
    done = [each for each in records if each.kind == TIMES and each.status == "done"]
    latest = {each.name: each for each in sorted(done, key=lambda each: each.date)}
    for times in latest.values():
        if not all(identity in rows for identity in times.settings["rows"]):
            continue
        made = [rows[identity] for identity in times.settings["rows"]]
        timed: dict[str, dict[Place, Mapping[str, Any]]] = {}
        for row in times.metrics["rows"]:
            timed.setdefault(row["model"], {})[Place(row["context"], row["batch"])] = row
        places, lines = tuple(timed.get(TEACHER, ())), []
        for each in made:
            name = each.settings["row"]["name"]
            own = timed.get(name, {})
            lines.append(Line(each, own if own.keys() >= set(places) else {}, times.metrics["peaks"].get(name)))
        if places and lines[0].name == TEACHER and lines[0].record.status == "done":
            yield Comparison(times, tuple(lines), places)


def comparison_section(records: Sequence[Record]) -> Section:
    """The comparisons of a run."""
    blocks = []
    for number, each in enumerate(comparisons(records)):
        columns, rows = each.table()
        about = f"Rows on a line: no other is better in both. {each.times.name}."
        drawn = each.figure(f"comparison-{number}")
        blocks.append(Block("figure", "Quality against bytes and speed", about, (columns, rows), drawn, wide=True))
        blocks.append(Block("table", f"Every row of {each.times.name}", "", (columns, rows), words=1))
    return Section("comparison", "What else would do", ABOUT, tuple(blocks))
