"""Rows for tables and figures, out of records: which numbers belong to one student, and what they are held against.

A study is one teacher with its students and controls, all evaluated alike; only rows of one study are compared. A
row is one way to make a student, over its seeds. Reports, model cards, the README and the docs pages all read these.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvfold.disk.output import fingerprint
from kvfold.disk.record import Record
from kvfold.methods import all_methods

TRAINING = ("alpha", "tokens", "loss_name", "varied")  # what a row says of its uptraining; the rest is the method's
READING = ("sequence_length", "stride", "copy_trials", "passkey_trials", "lm_eval_limit", "seed", "dtype")
SEEDS = ("seed", "calibration_seed")  # what a row is repeated over
GAP_CLOSED = (
    "(loss of the published start - loss) / (loss of the published start - loss of the teacher), for the same method, "
    "bytes and tokens"
)
NONE = "–"  # a cell without a number

Table = tuple[list[str], list[list[str]]]  # columns and rows; the first column is words


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, its sample standard deviation (0 for one seed), its range, their count."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 4) -> str:
        """The mean, and the deviation where there are several seeds."""
        shown = f"{self.mean:.{digits}f}"
        return shown if self.count == 1 else f"{shown} ± {self.deviation:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None when none is."""
    found = [float(value) for value in values if value is not None]
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return Spread(statistics.fmean(found), deviation, min(found), max(found), len(found))


@dataclass(frozen=True)
class Row:
    """One way to make a student (or the teacher, or a control), over its seeds."""

    role: str  # teacher, student, control
    method: str
    settings: Mapping[str, Any]  # of the method
    training: Mapping[str, Any]  # alpha, tokens, loss_name; empty: merely converted
    records: tuple[Record, ...]
    converted: tuple[Record, ...] = ()  # of the same student before it was trained
    cache_bytes: float | None = None  # per token
    teacher_cache_bytes: float | None = None
    teacher_loss: float | None = None
    speedups: Mapping[tuple[int, int], float] = field(default_factory=dict)  # (context, batch) -> decode, of teacher's
    gap_closed: float | None = None
    left_out: str = ""  # a part of its attention that it was measured without

    @property
    def trained(self) -> bool:
        """Was it trained after the conversion?"""
        return bool(self.training)

    @property
    def name(self) -> str:
        """The row in words: `gqa, kv heads 2, init mean`."""
        if self.role == "teacher":
            return "teacher"
        if self.role == "control":
            return "control: the teacher, trained further"
        return ", ".join([self.method, *(f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items())])

    @property
    def schooling(self) -> str:
        """How it was trained, in words: `alpha 0.05, kl`."""
        if self.role == "teacher":
            return ""
        if not self.trained:
            return "none"
        known = self.training
        words = [f"alpha {known['alpha']:g}"] if known.get("alpha") is not None else []
        if known.get("tokens") is not None:
            count = known["tokens"]
            words.append(f"{count if isinstance(count, str) else compact(count)} tokens")
        return ", ".join([*words, *(str(known[key]) for key in ("loss_name", "varied") if known.get(key))])

    @property
    def label(self) -> str:
        """Name and training in one line, for legends."""
        words = f"{self.name}; {self.schooling}" if self.trained else self.name
        return f"{words}; without its {self.left_out}" if self.left_out else words

    def metric(self, name: str) -> Spread | None:
        """A plain metric over seeds."""
        return spread(record.metrics.get(name) for record in self.records)

    def keyed(self, name: str) -> dict[str, Spread]:
        """A metric that has several values (`copy_loss`, `passkey`), each over seeds, in the order of its keys."""
        keys = {str(key) for record in self.records for key in (record.metrics.get(name) or {})}
        found = {}
        for key in sorted(keys, key=lambda key: (len(key), key)):
            value = spread((record.metrics.get(name) or {}).get(key) for record in self.records)
            if value is not None:
                found[key] = value
        return found

    @property
    def parted(self) -> list[Row]:
        """The same students as they were measured without each part of their attention that they can do without."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            for part, metrics in (record.metrics.get("without") or {}).items():
                found.setdefault(part, []).append(replace(record, metrics=metrics))
        return [replace(self, left_out=part, records=tuple(left)) for part, left in found.items()]

    @property
    def loss_before(self) -> Spread | None:
        """Loss merely converted."""
        before = spread(record.metrics.get("loss") for record in self.converted)
        return before if self.trained or self.role != "student" else self.metric("loss")

    @property
    def loss_lost(self) -> float | None:
        """Loss above the teacher's, in nats per token."""
        loss = self.metric("loss")
        return None if loss is None or self.teacher_loss is None else loss.mean - self.teacher_loss

    @property
    def recovered(self) -> float | None:
        """Part of the conversion's damage that training undid."""
        before, after = self.loss_before, self.metric("loss")
        if not self.trained or before is None or after is None or self.teacher_loss is None:
            return None
        damage = before.mean - self.teacher_loss
        return (before.mean - after.mean) / damage if damage > 0 else None


@dataclass(frozen=True)
class Study:
    """One teacher with what was made of it, evaluated alike."""

    teacher: Row | None
    rows: tuple[Row, ...]  # controls, then students by bytes and loss

    @property
    def everyone(self) -> tuple[Row, ...]:
        """The teacher, the controls, the students."""
        return (self.teacher, *self.rows) if self.teacher else self.rows


# --- from records to rows ------------------------------------------------------------------------------------------


def row_of(record: Record, lineages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a record says of the row it belongs to; else what the lineage of the checkpoint it names says."""
    said = record.settings.get("row")
    if said:
        return dict(said)
    lineage = lineages.get(record.hashes.get("student") or "")
    if lineage is None:
        role = "teacher" if record.metrics.get("teacher_loss") is None else "student"
        return {"role": role, "method": record.name if role == "student" else "identity", "seed": record.seed}
    row: dict[str, Any] = {"role": "student", "method": "identity", "seed": record.seed}
    tokens, losses = 0, []
    for step in lineage.get("steps", []):
        settings = step.get("settings", {})
        if step.get("stage") == "convert":
            said = {key: value for key, value in settings.items() if value is not None}
            row |= {key: value for key, value in said.items() if key not in ("dtype", "shard_size", "repaired_by")}
        elif step.get("stage") == "uptrain":
            tokens += step.get("tokens") or 0
            losses.append(str(settings.get("stages") or settings.get("loss")))
            row["seed"] = step.get("seed")
        elif step.get("stage") == "pretrain":
            row["role"] = "teacher"
    if tokens:
        row |= {"tokens": tokens, "loss_name": " then ".join(losses)}
        row["role"] = "control" if row["method"] == "identity" else "student"
    return row


def studies(records: Sequence[Record], lineages: Mapping[str, Mapping[str, Any]] | None = None) -> list[Study]:
    """Every study among the records, in their order. `lineages` are kvfold.json files by content hash."""
    found: dict[str, list[tuple[dict[str, Any], Record]]] = {}
    for record in records:
        if record.kind == "evaluate" and record.status != "failed" and "loss" in record.metrics:
            found.setdefault(question(record), []).append((row_of(record, lineages or {}), record))
    return [_study(rows, records) for rows in found.values()]


def question(record: Record) -> str:
    """What makes two evaluations comparable: the tokens, how they were read, and the teacher."""
    asked = {key: record.settings.get(key) for key in READING}
    teacher = record.hashes.get("teacher") or record.hashes.get("student")
    return fingerprint([asked, record.hashes.get("tokens"), teacher])


def _study(found: Sequence[tuple[dict[str, Any], Record]], records: Sequence[Record]) -> Study:
    groups: dict[str, list[tuple[dict[str, Any], Record]]] = {}
    for row, record in found:
        group = groups.setdefault(fingerprint([row.get("role"), row.get("method"), _method(row), _training(row)]), [])
        hashed = record.hashes.get("student")
        if hashed is None or all(other.hashes.get("student") != hashed for _, other in group):  # runs share a teacher
            group.append((row, record))
    made = [_row([record for _, record in group], group[0][0], found, records) for group in groups.values()]
    has_trained = {fingerprint(_method_key(row)) for row in made if row.trained and row.role == "student"}
    rows = [
        row
        for row in made
        if row.role != "teacher" and (row.trained or fingerprint(_method_key(row)) not in has_trained)
    ]
    teacher = next((row for row in made if row.role == "teacher"), None) or _measured_beside(found, records)
    rows = [_with_gap(row, made) for row in rows]
    rows.sort(key=lambda row: (row.role != "control", -(row.cache_bytes or 0), row.name, _spent(row.training)))
    return Study(teacher, tuple(rows))


def _measured_beside(found: Sequence[tuple[dict[str, Any], Record]], records: Sequence[Record]) -> Row | None:
    """The teacher as it was measured beside its first student, where it has no record of its own."""
    for _, record in found:
        if record.metrics.get("teacher"):
            cache = {"student": (record.metrics.get("cache") or {}).get("teacher")}
            own = replace(record, name="teacher", metrics={**record.metrics["teacher"], "cache": cache})
            return _row([own], {"role": "teacher", "method": "identity"}, found, records)
    return None


def _method(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in (*TRAINING, *SEEDS, "role", "method")}


def _method_key(row: Row) -> list[Any]:
    return [row.method, dict(row.settings)]


def _training(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its uptraining; nothing when it was not trained."""
    said = {key: row[key] for key in TRAINING if row.get(key)}
    return said if said.get("alpha") or said.get("tokens") else {}


def _spent(training: Mapping[str, Any]) -> float:
    tokens = training.get("tokens", 0)
    return float(training.get("alpha") or (tokens if not isinstance(tokens, str) else 0))


def _row(
    own: Sequence[Record],
    row: Mapping[str, Any],
    found: Sequence[tuple[dict[str, Any], Record]],
    records: Sequence[Record],
) -> Row:
    role, method, training = str(row.get("role", "student")), str(row.get("method", "?")), _training(row)
    before, after = cache_bytes(records, row, own)
    alike = [
        (other, record)
        for other, record in found
        if other.get("method") == method and other.get("role") == role and _method(other) == _method(row)
    ]
    converted = [record for other, record in alike if training and not _training(other)]
    same = [record for _, record in alike]  # training changes neither bytes nor seconds
    losses = [record.metrics.get("teacher_loss") for record in own]
    losses += [record.metrics.get("loss") for other, record in found if other.get("role") == "teacher"]
    return Row(
        role=role,
        method=method,
        settings=_method(row),
        training=training,
        records=tuple(own),
        converted=tuple(converted) if role == "student" else (),
        cache_bytes=before if role != "student" else after,
        teacher_cache_bytes=before,
        teacher_loss=next((float(loss) for loss in losses if loss is not None), None),
        speedups=speedups(records, same) if role == "student" else {},
    )


def _with_gap(row: Row, everyone: Sequence[Row]) -> Row:
    """The row with the gap it closes: of what the published start of the same bytes and tokens loses, what it avoids.

    Where several starts are published, the best counts.
    """
    if row.role != "student" or _is_published(row) or row.teacher_loss is None:
        return row
    baselines = [
        other
        for other in everyone
        if _is_published(other)
        and other.method == row.method
        and other.cache_bytes == row.cache_bytes
        and (other.cache_bytes is not None or other.settings.get("kv_heads") == row.settings.get("kv_heads"))
        and all(other.training.get(key) == row.training.get(key) for key in ("alpha", "tokens"))
    ]
    alike = [other for other in baselines if other.training.get("loss_name") == row.training.get("loss_name")]
    losses = [loss.mean for other in alike or baselines if (loss := other.metric("loss")) is not None]
    loss = row.metric("loss")
    if not losses or loss is None or min(losses) <= row.teacher_loss:
        return row
    closed = (min(losses) - loss.mean) / (min(losses) - row.teacher_loss)
    return replace(row, gap_closed=closed)


def _is_published(row: Row) -> bool:
    """Is it as a paper starts from it, and not repaired? By what the conversion resolved to, where that is known."""
    steps = [step for record in row.records for step in record.metrics.get("made_by") or ()]
    said = {**row.settings, **next((step["settings"] for step in reversed(steps) if step["stage"] == "convert"), {})}
    method = all_methods().get(row.method)
    starts = method.published if method else ()
    alike = any(all(said.get(key) == value for key, value in start.items()) for start in starts)
    return row.role == "student" and alike and said.get("repair") in (None, "none", [], ())


def plan_of(records: Sequence[Record], row: Mapping[str, Any]) -> Record | None:
    """The plan whose method and settings are those of a row: of those that do not contradict it, the one most alike.

    What a row does not say is rather the method's default than anything else.
    """
    best: tuple[tuple[int, int], Record] | None = None
    method = all_methods().get(str(row.get("method")))
    usual = {each.name: each.default for each in fields(method.Config)} if method else {}
    for record in records:
        if record.kind != "plan" or record.status != "done":
            continue
        known = {"method": record.metrics.get("method"), **(record.metrics.get("settings") or {})}
        shared = [key for key in known if key in row]
        same = all(known.get(key) == row.get(key) for key in ("method", "after"))
        if not same or any(str(known[key]) != str(row[key]) for key in shared):
            continue
        alike = (len(shared), sum(known[key] == value for key, value in usual.items() if key in known))
        if best is None or alike > best[0]:
            best = (alike, record)
    return best[1] if best else None


def cache_bytes(
    records: Sequence[Record], row: Mapping[str, Any], own: Sequence[Record]
) -> tuple[float | None, float | None]:
    """Cache bytes per token of the teacher and of the row itself: by its plan, else as its evaluation has them.

    For a teacher or a control, any plan will do. Of an encoder-decoder, bytes are those of a token written and a token
    read together.
    """
    plan = plan_of(records, row)
    if plan is None and row.get("role") != "student":
        plan = next((record for record in records if record.kind == "plan" and record.status == "done"), None)
    if plan is None:
        found: Mapping[str, Any] = next((record.metrics["cache"] for record in own if record.metrics.get("cache")), {})
        teacher, itself = ((found.get(who) or {}).get("bytes_per_token") for who in ("teacher", "student"))
        return (itself if teacher is None and row.get("role") == "teacher" else teacher), itself
    tokens = plan.metrics["batch"] * plan.metrics["context"]
    return plan.metrics["before"]["cache_bytes"] / tokens, plan.metrics["after"]["cache_bytes"] / tokens


# --- the bench -------------------------------------------------------------------------------------------------------


def benches(records: Sequence[Record]) -> list[Record]:
    """The benchmarks that ended well."""
    return [record for record in records if record.kind == "bench" and record.status == "done"]


def bench_rows(record: Record, **same: Any) -> list[Mapping[str, Any]]:
    """The rows of a benchmark in which these fields have these values."""
    rows = record.metrics.get("rows") or []
    return [row for row in rows if all(row.get(key) == value for key, value in same.items())]


def teacher_model(record: Record) -> str:
    """The name of the first model of a benchmark: the teacher."""
    return str(record.metrics["rows"][0]["model"])


def speedups(records: Sequence[Record], own: Sequence[Record]) -> dict[tuple[int, int], float]:
    """Decode speed over the teacher's, measured in one run, by (context, batch)."""
    found = {}
    for bench in benches(records):
        teacher = {
            (row["context"], row["batch"]): row["decode_s_per_token"]
            for row in bench_rows(bench, model=teacher_model(bench), cache="native")
        }
        for row in bench_rows(bench, cache="native"):
            place = (row["context"], row["batch"])
            if row["model"] != teacher_model(bench) and place in teacher and benched(bench, row["model"], own):
                found[place] = teacher[place] / row["decode_s_per_token"]
    return found


def benched(bench: Record, model: str, own: Sequence[Record]) -> bool:
    """Is this model of a benchmark the one that these records evaluated? By content hash, else by name."""
    hashed = bench.hashes.get(model)
    if hashed is not None and any(record.hashes.get("student") for record in own):
        return any(record.hashes.get("student") == hashed for record in own)
    return any(model in (record.name, *record.name.split("/")) for record in own)


# --- the headline ----------------------------------------------------------------------------------------------------


def headline(study: Study) -> Table:
    """One row per student: bytes, losses, distance to the teacher, speed. A column without a number is left out."""
    place = headline_place(study)
    columns = ["model", "training", "cache bytes/token", "of teacher", "loss before training", "loss", "KL"]
    columns += ["agreement", "recovered", "gap closed", "exact match", "CER"]
    columns += [f"decode at {place[0]:,} × {place[1]}"] if place else []
    rows = []
    for row in study.everyone:
        part = row.cache_bytes / row.teacher_cache_bytes if row.cache_bytes and row.teacher_cache_bytes else None
        final = row.metric("loss") if row.trained or row.role != "student" else None
        seeds = f" ({len(row.records)} seeds)" if len(row.records) > 1 else ""
        cells = [
            row.name,
            row.schooling + seeds,
            NONE if row.cache_bytes is None else f"{row.cache_bytes:,.0f}",
            NONE if part is None else part_of(part),
            cell(row.loss_before),
            cell(final),
            cell(row.metric("kl")) if row.role != "teacher" else NONE,
            percent(row.metric("agreement")) if row.role != "teacher" else NONE,
            NONE if row.recovered is None else f"{row.recovered:.0%}",
            NONE if row.gap_closed is None else f"{row.gap_closed:.0%}",
            *(percent(next(iter(row.keyed(name).values()), None)) for name in ("exact_match", "cer")),  # fewest beams
        ]
        if place:
            cells.append(f"{row.speedups[place]:.2f}×" if place in row.speedups else NONE)
        rows.append(cells)
    kept = [at for at in range(len(columns)) if at == 0 or any(row[at] not in (NONE, "") for row in rows)]
    return [columns[at] for at in kept], [[row[at] or NONE for at in kept] for row in rows]


def headline_place(study: Study) -> tuple[int, int] | None:
    """The largest context, and there the largest batch, at which students were timed."""
    return max((place for row in study.rows for place in row.speedups), default=None)


def cell(value: Spread | None, digits: int = 4) -> str:
    """A number over seeds as the cell of a table."""
    return NONE if value is None else value.text(digits)


def percent(value: Spread | None) -> str:
    """A part as a percentage, with its deviation over seeds."""
    if value is None:
        return NONE
    return f"{value.mean:.1%}" if value.count == 1 else f"{value.mean:.1%} ± {value.deviation:.1%}"


def part_of(value: float) -> str:
    """A part as a percentage, without a decimal that says nothing: `12.5%`, `25%`."""
    return f"{value:.1%}".replace(".0%", "%")


def compact(number: float) -> str:
    """A count for people: `192k`, `20M`."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:g}"


def summary(records: Sequence[Record]) -> Table:
    """The headline of the first study, narrow enough for a terminal; empty when nothing was evaluated."""
    found = studies(records)
    if not found:
        return ["model"], []
    columns, rows = headline(found[0])
    left_out = {"of teacher", "agreement"}
    if len({row[0] for row in rows}) == len(rows):  # the model alone tells the rows apart
        left_out.add("training")
    kept = [at for at, column in enumerate(columns) if column not in left_out]
    return [columns[at].replace("/", " / ") for at in kept], [[row[at] for at in kept] for row in rows]


def markdown(table: Table, *, words: int = 1, bold: Collection[tuple[int, int]] = ()) -> str:
    """A table as Markdown: the first `words` columns are words, the others numbers; `bold` are (row, column)."""
    columns, rows = table
    shown = [
        [f"**{plain(text)}**" if (number, at) in bold else plain(text) for at, text in enumerate(row)]
        for number, row in enumerate(rows)
    ]
    lines = [[*map(plain, columns)], ["---" if at < words else "---:" for at in range(len(columns))], *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(text.split()))
