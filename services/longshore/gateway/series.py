"""Metrics by train step, from the job's metrics.jsonl. Reads files; knows nothing of HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longshore.api_types import Series
from longshore.errors import NotFound


def read_series(path: Path, names: Sequence[str], after: int, points: int) -> Series:
    """At most `points` steps after the step `after`, evenly spread, the newest among them.

    Args:
        names: of metrics; empty: all that the newest step has.

    Raises:
        NotFound: no step has such a metric.
    """
    count = sum(1 for _ in _lines(path, after))
    stride = max(1, math.ceil(count / points))
    # Counted from the end, so that the newest is there.
    chosen = [
        line for index, line in enumerate(_lines(path, after)) if index < count and (count - 1 - index) % stride == 0
    ]
    known = sorted({name for line in chosen for name in line})
    wanted = list(dict.fromkeys(names)) or (sorted(chosen[-1]) if chosen else [])
    for name in wanted if chosen else []:
        if name not in known:
            raise NotFound(f"no step has a metric {name!r}; there are: {', '.join(known)}")
    return {
        "names": wanted,
        "steps": [int(line["step"]) for line in chosen],
        "series": {name: [_number(line.get(name)) for line in chosen] for name in wanted},
    }


def _lines(path: Path, after: int) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                # A last line without its end is still being written.
                if text.endswith("\n"):
                    line = json.loads(text)
                    if line["step"] > after:
                        yield line
    except FileNotFoundError:
        return


def _number(value: object) -> float | None:
    """JSON has neither infinities nor not-a-number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
