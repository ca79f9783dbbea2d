"""Numbers as people read and write them: few digits, a space before the unit, a true minus.

Terminal, pages and messages all speak with these. Pages keep a number and its unit on one line by themselves
(:mod:`bitwright.report.markup`).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import UsageError

NONE = "–"
"""Where there is no value."""
FACTORS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
"""Factors of large numbers and their letters, the largest first."""
TITLES = {
    "weight_bytes": "size of model.safetensors",
    "activation_bytes": "activations in memory",
    "total_bytes": "file and activations in memory",
    "bit_operations": "bit operations",
    "latency": "latency",
}
"""Costs of a plan by their names, for people."""
TIMES = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def signed(text: str) -> str:
    """With a true minus sign.

    Example:
        >>> signed("-0.5")
        '−0.5'
    """
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in percent.

    Example:
        >>> percent(0.9231), percent(1e-6), percent(0.99999, 1), percent(1.0)
        ('92.31 %', 'under 0.01 %', 'over 99.9 %', '100.00 %')
    """
    if value is None:
        return NONE
    least = 10**-digits
    if 0 < 100 * value < least:
        return f"under {least:g} %"
    if 100 - least < 100 * value < 100 and f"{100 * value:.{digits}f}" == f"{100:.{digits}f}":
        return f"over {100 - least:g} %"
    return signed(f"{100 * value:.{digits}f} %")


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign.

    Example:
        >>> points(-0.0031), points(0.0), points(0.12)
        ('−0.31 points', '0.00 points', '+12.00 points')
    """
    shown = f"{100 * value:+.2f}"
    return signed(shown.lstrip("+-") if float(shown) == 0 else shown) + " points"


def interval(ends: Sequence[float] | None) -> str:
    """Two ends of an interval of fractions, in percent.

    Example:
        >>> interval([0.918, 0.928])
        '91.8 to 92.8 %'
    """
    return NONE if ends is None else f"{_ends(ends)} %"


def estimate(value: float | None, ends: Sequence[float] | None) -> str:
    """A fraction in percent with its interval.

    Example:
        >>> estimate(0.923, [0.918, 0.928]), estimate(None, None)
        ('92.30 % (91.8 to 92.8)', '–')
    """
    return percent(value) + ("" if ends is None else f" ({_ends(ends)})")


def _ends(ends: Sequence[float]) -> str:
    return signed(" to ".join(f"{100 * end:.1f}" for end in ends))


def size(count: float | None) -> str:
    """Bytes, in powers of 1000.

    Example:
        >>> size(3_480_000), size(121_750), size(640)
        ('3.48 MB', '121.8 kB', '640 B')
    """
    return NONE if count is None else _scaled(count, "B")


def scaled(value: float | None) -> str:
    """A large number with a factor.

    Example:
        >>> scaled(10_449_632), scaled(160)
        ('10.45 M', '160')
    """
    return NONE if value is None else _scaled(value, "")


def _scaled(value: float, of: str) -> str:
    factor, by = next((f for f in FACTORS if abs(value) >= f[1]), FACTORS[-1])
    shown = three(value / by) if factor else f"{value:.0f}"
    return signed(f"{shown} {factor}{of}".rstrip())


def unit(cost: str, most: float) -> tuple[str, float]:
    """The unit of an axis that ends there, and what one of it is; costs as plans name them, bytes if not others.

    Example:
        >>> unit("weight_bytes", 99_239), unit("latency", 0.00213), unit("bit_operations", 900)
        (('kB', 1000.0), ('ms', 0.001), ('', 1.0))
    """
    of = "" if cost == "bit_operations" else "B"
    units = TIMES if cost == "latency" else tuple((factor + of, by) for factor, by in FACTORS)
    return next((u for u in units if most >= u[1]), units[-1])


def cost(name: str, value: float) -> str:
    """A cost as plans name them.

    Example:
        >>> cost("weight_bytes", 99_239), cost("bit_operations", 2.99574e8), cost("latency", 0.00213)
        ('99.24 kB', '299.6 M', '2.13 ms')
    """
    if name == "latency":
        return duration(value)
    return scaled(value) if name == "bit_operations" else size(value)


def three(value: float) -> str:
    """About four digits, none of them after three before the point.

    Example:
        >>> three(3.4812), three(121.75), three(18.52), three(713.7)
        ('3.48', '121.8', '18.52', '713.7')
    """
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def decibel(value: float | None) -> str:
    """A ratio in decibels.

    Example:
        >>> decibel(26.81), decibel(-3.0)
        ('26.8 dB', '−3.0 dB')
    """
    return NONE if value is None else signed(f"{value:.1f} dB")


def signal_to_error(value: float | None, *, exact: bool) -> str:
    """A ratio in decibels that the absence of errors has not.

    Example:
        >>> signal_to_error(None, exact=True)
        'no error'
    """
    return "no error" if exact else decibel(value)


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
    """A time.

    Example:
        >>> duration(0.0034), duration(65.2), duration(629.0), duration(7300.0)
        ('3.4 ms', '65.2 s', '10 min 29 s', '2 h 2 min')
    """
    if seconds is None:
        return NONE
    if seconds < 0.1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def smaller(times: float | None) -> str:
    """How many times smaller something became.

    Example:
        >>> smaller(7.44), smaller(0.625), smaller(1.0), smaller(None)
        ('7.4 x smaller', '1.6 x larger', 'the same size', '–')
    """
    if not times:
        return NONE
    if f"{times:.1f}" == "1.0" or f"{1 / times:.1f}" == "1.0":
        return "the same size"
    return f"{times:.1f} x smaller" if times > 1 else f"{1 / times:.1f} x larger"


def bits(settings: Mapping[str, int | str | None] | None) -> str:
    """Bits of weights and activations.

    Example:
        >>> bits({"weights": 4, "activations": 8}), bits({"weights": 4, "activations": None})
        ('4-bit weights, 8-bit activations', '4-bit weights, float activations')
    """
    settings = settings or {}
    weights, activations = settings.get("weights"), settings.get("activations")
    return f"{_kind(weights)} weights, {_kind(activations)} activations"


def notation(weights: Any, activations: Any) -> str:
    """Bits in the notation of the papers.

    Example:
        >>> notation(4, 8), notation(4, None), notation(None, 8), notation(None, None), notation("mixed", 8)
        ('W4A8', 'W4, activations in float', 'weights in float, A8', 'all in float', 'mixed precision')
    """
    if "mixed" in (weights, activations):
        return "mixed precision"
    if weights is None:
        return f"weights in float, A{activations}" if activations else "all in float"
    return f"W{weights}A{activations}" if activations else f"W{weights}, activations in float"


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


def amount(value: float, unit: str) -> str:
    """A number as people read it, rounded up to four digits, so that it can be given as a limit.

    Example:
        >>> amount(1203410, "B"), amount(900, "B"), amount(0.00125, "s")
        ('1.204 MB', '900 B', '1.25 ms')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".rstrip()
    exponent = math.floor(math.log10(abs(value)) / 3)
    exponent = min(max(exponent, -3 if unit == "s" else 0), 5)
    digits = max(0, 3 - math.floor(math.log10(abs(value) / 1000.0**exponent)))
    rounded = math.ceil(round(value / 1000.0**exponent * 10**digits, 6)) / 10**digits
    prefix = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[exponent]
    return f"{rounded:g} {(prefix + unit).strip()}".rstrip()


# ------------------------------------------------------------------------------------------- as people write them

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"": 1e-3, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_size(text: str | float, name: str = "") -> float:
    """Bytes: a number with its unit, or the number of bytes.

    Raises:
        UsageError: it is neither, or not above 0.

    Example:
        >>> parse_size("3.5MB"), parse_size("3 MiB"), parse_size(100_000)
        (3500000.0, 3145728.0, 100000.0)
    """
    if isinstance(text, str) and _plain_number(text) is not None:
        raise UsageError(
            f"Expected a size with its unit, such as 3500000B, 100kB, 3.5MB or 3MiB{_as(name)}, found '{text}'."
        )
    return _positive(text, _BYTES | {"": 1}, "a size such as 3500000B, 100kB, 3.5MB or 3MiB", name)


def parse_count(text: str | float, name: str = "") -> float:
    """A number of operations.

    Raises:
        UsageError: it is no number above 0.

    Example:
        >>> parse_count("2e9"), parse_count("1.5G")
        (2000000000.0, 1500000000.0)
    """
    return _positive(text, _COUNTS, "a number such as 2e9 or 2G", name)


def parse_latency(text: str | float, name: str = "") -> float:
    """Seconds, from milliseconds or a number with its unit.

    Raises:
        UsageError: it is no time above 0.

    Example:
        >>> parse_latency("5"), parse_latency("2.5 s")
        (0.005, 2.5)
    """
    return _positive(text, _SECONDS, "milliseconds such as 5 or 5ms", name)


def parse_ratio(text: str | float, name: str = "") -> float:
    """A compression: a number above 0.

    Raises:
        UsageError: it is none.

    Example:
        >>> parse_ratio("6x"), parse_ratio(6)
        (6.0, 6.0)
    """
    return _positive(text, {"": 1, "x": 1}, "a compression such as 6", name)


def parse_share(text: str | float, name: str = "") -> float:
    """A fraction between 0 and 1, or percent.

    Raises:
        UsageError: it is neither.

    Example:
        >>> parse_share("0.01"), parse_share("1%")
        (0.01, 0.01)
    """
    found = _value(text, {"": 1, "%": 0.01})
    if found is None or not 0 <= found <= 1:
        raise UsageError(f"Expected a share between 0 and 1, such as 0.01 or 1%{_as(name)}, found '{text}'.")
    return found


def _as(name: str) -> str:
    """The argument that a value was given as, in a message; nothing if it has no name."""
    return f", as {name}=" if name else ""


def _positive(text: str | float, units: Mapping[str, float], expected: str, name: str) -> float:
    found = _value(text, units)
    if found is None or not 0 < found < math.inf:
        raise UsageError(f"Expected {expected}, above 0{_as(name)}, found '{text}'.")
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


def _plain_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def typed(*parts: object) -> str:
    """A command as a shell takes it, whatever its words hold.

    Example:
        >>> typed("bitwright", "export", Path("my runs/first"), "--to", "openvino")
        "bitwright export 'my runs/first' --to openvino"
    """
    return shlex.join(map(str, parts))


def as_options(given: Mapping[str, object]) -> list[str]:
    """Settings as options of a command; what is None is left out.

    Example:
        >>> as_options({"input_size": "28x28", "mean": 0.5, "std": None})
        ['--input-size', '28x28', '--mean', '0.5']
    """
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None)
    return [word for pair in pairs for word in pair]


def short_path(path: Path) -> str:
    """The path, from the current folder if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
