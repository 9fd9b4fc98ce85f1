"""The table of engines and kinds of students: what was run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record
from kvfold.report.tables import markdown

NOT_RUN = "not run"


def serving_tables(records: Sequence[Record]) -> Iterator[str]:
    """One row for each kind of student, those first that most engines load, and the versions below."""
    cells = {(each.settings["kind"], each.settings["engine"]): each for each in records}
    kinds, engines = (list(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    kinds.sort(
        key=lambda kind: -sum("refused" not in cells[kind, each].metrics for each in engines if (kind, each) in cells)
    )
    lines = [
        [kind, *(_cell(cells[kind, engine].metrics) if (kind, engine) in cells else NOT_RUN for engine in engines)]
        for kind in kinds
    ]
    if not lines:
        return
    yield markdown((["student", *engines], lines), words=1 + len(engines))
    versions = dict.fromkeys(str(each.metrics["version"]) for each in records if "version" in each.metrics)
    yield f"Run with {'; '.join(versions)}, in float32 on {records[0].device}."


def _cell(metrics: Mapping[str, Any]) -> str:
    if "refused" in metrics:
        reason = str(metrics["refused"]).rpartition("Value error, ")[2]  # pydantic's words in front of vLLM's
        return f"no: {re.sub('^cannot be exported to .*?: ', '', reason)}"
    if metrics["problem"] is not None:
        return f"differs: {metrics['problem']}"
    ties = f" ({metrics['near_ties']} near ties)" if metrics["near_ties"] else ""
    tokens = f"{metrics['same_tokens']} of {metrics['tokens']} tokens the same{ties}"
    cell = f"{tokens}, logits within {metrics['max_difference']:.2g}"
    allocated, predicted = metrics["cache_bytes_per_token"], metrics["predicted_cache_bytes_per_token"]
    return cell if allocated is None else f"{cell}, cache {allocated:,.0f} bytes per token (predicted {predicted:,.0f})"
