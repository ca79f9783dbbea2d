"""Numbers as people read them: a no-break space before the unit, a true minus, few digits."""

from __future__ import annotations

import math
from typing import Any

GAP = "\u00a0"
NONE = "–"
"""Where there is no value."""
BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
UNITS = {
    "bit_operations": (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)),
    "latency": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
}
"""Units of axes, the largest first, for costs that are not bytes."""


def signed(text: str) -> str:
    """With a true minus sign.

    Example:
        >>> signed("-0.5")
        '−0.5'
    """
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 2) -> str:
    r"""A fraction in percent.

    Example:
        >>> percent(0.9231), percent(1e-6), percent(0.99999, 1), percent(1.0)
        ('92.31\xa0%', 'under 0.01\xa0%', 'over 99.9\xa0%', '100.00\xa0%')
    """
    if value is None:
        return NONE
    least = 10**-digits
    if 0 < 100 * value < least:
        return f"under {least:g}{GAP}%"
    if 100 - least < 100 * value < 100 and f"{100 * value:.{digits}f}" == f"{100:.{digits}f}":
        return f"over {100 - least:g}{GAP}%"
    return signed(f"{100 * value:.{digits}f}{GAP}%")


def points(value: float, digits: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign.

    Example:
        >>> points(-0.0031), points(0.0), points(0.12)
        ('−0.31 points', '0.00 points', '+12.00 points')
    """
    shown = f"{100 * value:+.{digits}f}"
    return signed(shown.lstrip("+-") if float(shown) == 0 else shown) + " points"


def interval(ends: list[float] | None, digits: int = 1) -> str:
    r"""Two ends of an interval of fractions, in percent.

    Example:
        >>> interval([0.918, 0.928])
        '91.8 to 92.8\xa0%'
    """
    return NONE if ends is None else signed(f"{100 * ends[0]:.{digits}f} to {100 * ends[1]:.{digits}f}{GAP}%")


def size(count: float | None) -> str:
    r"""Bytes, in powers of 1000.

    Example:
        >>> size(3_480_000), size(121_750), size(640)
        ('3.48\xa0MB', '121.8\xa0kB', '640\xa0B')
    """
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return signed(f"{three(count / factor)}{GAP}{unit}")
    return signed(f"{count:.0f}{GAP}B")


def unit(cost: str, most: float) -> tuple[str, float]:
    """The unit of an axis that ends there, and what one of it is; costs as plans name them, bytes if not others.

    Example:
        >>> unit("weight_bytes", 99_239), unit("latency", 0.00213), unit("bit_operations", 900)
        (('kB', 1000.0), ('ms', 0.001), ('', 1.0))
    """
    units = UNITS.get(cost, BYTES)
    return next((u for u in units if most >= u[1]), units[-1])


def three(value: float) -> str:
    """About four digits, none of them after three before the point.

    Example:
        >>> three(3.4812), three(121.75), three(18.52), three(713.7)
        ('3.48', '121.8', '18.52', '713.7')
    """
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def count(value: int | None) -> str:
    """A whole number.

    Example:
        >>> count(10000), count(None)
        ('10,000', '–')
    """
    return NONE if value is None else f"{value:,}"


def short(value: float | None) -> str:
    r"""A large number with a factor.

    Example:
        >>> short(10_449_632), short(160)
        ('10.45\xa0M', '160')
    """
    if value is None:
        return NONE
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{three(value / factor)}{GAP}{unit}"
    return f"{value:.0f}"


def decibel(value: float | None) -> str:
    r"""A ratio in decibels; the absence of noise has none.

    Example:
        >>> decibel(26.81), decibel(-3.0)
        ('26.8\xa0dB', '−3.0\xa0dB')
    """
    return NONE if value is None else signed(f"{value:.1f}{GAP}dB")


def number(value: float | None, digits: int = 3) -> str:
    """Any other number, in significant digits.

    Example:
        >>> number(35.529), number(0.00012345), number(123456.0), number(0.0)
        ('35.5', '1.23 × 10⁻⁴', '1.23 × 10⁵', '0')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        shown = f"{value:.{digits}g}"
        return signed(shown if "e" not in shown else f"{value:,.0f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return signed(f"{mantissa} × 10{raised}")


def duration(seconds: float | None) -> str:
    r"""A time.

    Example:
        >>> duration(0.0034), duration(65.2), duration(629.0), duration(7300.0)
        ('3.4\xa0ms', '65.2\xa0s', '10\xa0min 29\xa0s', '2\xa0h 2\xa0min')
    """
    if seconds is None:
        return NONE
    if seconds < 0.1:
        return f"{1e3 * seconds:.3g}{GAP}ms"
    if seconds < 120:
        return f"{seconds:.1f}{GAP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{GAP}min {rest}{GAP}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{GAP}h {minutes % 60}{GAP}min"


def bits(settings: dict[str, Any] | None) -> str:
    """Bits of weights and activations.

    Example:
        >>> bits({"weights": 4, "activations": 8}), bits({"weights": 4, "activations": None})
        ('4-bit weights, 8-bit activations', '4-bit weights, float activations')
    """
    settings = settings or {}
    weights, activations = settings.get("weights"), settings.get("activations")
    return f"{_kind(weights)} weights, {_kind(activations)} activations"


def span(found: set[int]) -> str:
    """Bits of several tensors; none means float.

    Example:
        >>> span({4}), span({3, 8, 4}), span(set())
        ('4-bit', '3- to 8-bit', 'float')
    """
    if not found:
        return "float"
    low, high = min(found), max(found)
    return f"{low}-bit" if low == high else f"{low}- to {high}-bit"


def _kind(value: Any) -> str:
    return "float" if value is None else "mixed-precision" if value == "mixed" else f"{value}-bit"


def listed(items: list[str]) -> str:
    """In a sentence.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
        ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def plural(value: int, noun: str, several: str | None = None) -> str:
    """A count with its noun.

    Example:
        >>> plural(1, "image"), plural(12000, "image")
        ('1 image', '12,000 images')
    """
    return f"{value:,} {noun if value == 1 else several or noun + 's'}"
