"""Sizes, counts, times and shares as people write them. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from bitwright.errors import UsageError

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SECONDS = {"": 1e-3, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_size(text: str | float) -> float:
    """Bytes: a number with its unit, or the number of bytes.

    Raises:
        UsageError: it is neither, or not above 0.

    Example:
        >>> parse_size("3.5MB"), parse_size("3 MiB"), parse_size(100_000)
        (3500000.0, 3145728.0, 100000.0)
    """
    if isinstance(text, str) and _number(text) is not None:
        raise UsageError(f"Expected a size with its unit, such as 3500000B, 100kB, 3.5MB or 3MiB, found '{text}'.")
    return _positive(text, BYTES | {"": 1}, "a size such as 3500000B, 100kB, 3.5MB or 3MiB")


def parse_count(text: str | float) -> float:
    """A number of operations.

    Raises:
        UsageError: it is no number above 0.

    Example:
        >>> parse_count("2e9"), parse_count("1.5G")
        (2000000000.0, 1500000000.0)
    """
    return _positive(text, COUNTS, "a number such as 2e9 or 2G")


def parse_latency(text: str | float) -> float:
    """Seconds, from milliseconds or a number with its unit.

    Raises:
        UsageError: it is no time above 0.

    Example:
        >>> parse_latency("5"), parse_latency("2.5 s")
        (0.005, 2.5)
    """
    return _positive(text, SECONDS, "milliseconds such as 5 or 5ms")


def parse_ratio(text: str | float) -> float:
    """A compression: a number above 0.

    Raises:
        UsageError: it is none.

    Example:
        >>> parse_ratio("6x"), parse_ratio(6)
        (6.0, 6.0)
    """
    return _positive(text, {"": 1, "x": 1}, "a compression such as 6")


def parse_share(text: str | float) -> float:
    """A fraction between 0 and 1, or percent.

    Raises:
        UsageError: it is neither.

    Example:
        >>> parse_share("0.01"), parse_share("1%")
        (0.01, 0.01)
    """
    found = _value(text, {"": 1, "%": 0.01})
    if found is None or not 0 <= found <= 1:
        raise UsageError(f"Expected a share between 0 and 1, such as 0.01 or 1%, found '{text}'.")
    return found


def _positive(text: str | float, units: Mapping[str, float], expected: str) -> float:
    found = _value(text, units)
    if found is None or not 0 < found < math.inf:
        raise UsageError(f"Expected {expected}, above 0, found '{text}'.")
    return found


def _value(text: str | float, units: Mapping[str, float]) -> float | None:
    """The number times its unit; None if it is none."""
    if not isinstance(text, str):
        return None if isinstance(text, bool) else float(text) * units.get("", 1)
    match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([^\d\s]*)\s*", text, flags=re.IGNORECASE)
    known = {unit.lower(): factor for unit, factor in units.items()} | dict(units)
    if match is None or (match[2] not in known and match[2].lower() not in known):
        return None
    factor = known.get(match[2], known.get(match[2].lower(), 1.0))
    return float(match[1]) * factor


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
