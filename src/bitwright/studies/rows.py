"""Rows of a study: measurements as plain data, and how those of several seeds become one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

Row: TypeAlias = dict[str, Any]
"""One measurement as plain data: what was measured (the keys of its cell), then the figures."""


class MeasuredRows(Protocol):
    """What is drawn of a study: its rows, and these with seeds taken together."""

    @property
    def rows(self) -> list[Row]:
        """Everything that was measured."""

    @property
    def summary(self) -> list[Row]:
        """With seeds taken together."""


def text_of(key: Row) -> str:
    """A key as text that is the same for equal keys."""
    return json.dumps(key, sort_keys=True)


def plain(value: Any) -> Any:
    """The same as data that JSON can hold: numbers that are not finite become None.

    Example:
        >>> plain({"kl": float("nan"), "ci": (0.5, 1)})
        {'kl': None, 'ci': [0.5, 1]}
    """
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def group(rows: Iterable[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Rows that are equal in ``by`` as one, with mean and standard deviation of each value.

    A value that no row has is left out; the deviation of a single one is None.

    Example:
        >>> group([{"n": "a", "kl": 1.0}, {"n": "a", "kl": 3.0}], ["n"], ["kl", "top1"])
        [{'n': 'a', 'kl': {'mean': 2.0, 'sd': 1.4142135623730951, 'count': 2}}]
    """
    found: dict[str, tuple[Row, list[Row]]] = {}
    for row in rows:
        key = {k: row[k] for k in by if k in row}
        found.setdefault(text_of(key), (key, []))[1].append(row)
    return [key | {v: s for v in values if (s := _spread(members, v))} for key, members in found.values()]


def _spread(rows: list[Row], value: str) -> Row | None:
    numbers = [r[value] for r in rows if r.get(value) is not None]
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "sd": deviation, "count": len(numbers)}


def apart(a: Row, b: Row) -> bool:
    """Whether two means of :func:`group` differ by more than two standard errors of their difference.

    Example:
        >>> apart({"mean": 1.0, "sd": 0.1, "count": 4}, {"mean": 1.1, "sd": 0.1, "count": 4})
        False
    """
    variance = sum((s["sd"] or 0.0) ** 2 / s["count"] for s in (a, b))
    return bool(abs(a["mean"] - b["mean"]) > 2 * math.sqrt(variance))
