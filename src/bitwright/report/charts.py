"""Charts as inline SVG with their labels in HTML: shapes stretch with the page, texts and lines keep their size."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.report.markup import Markup, tag, text
from bitwright.words import number

Tick = tuple[float, str]


@dataclass(frozen=True)
class Axis:
    """Where values lie along one side of a chart.

    Example:
        >>> Axis(0.0, 10.0).at(2.5), Axis(1.0, 100.0, log=True).at(10.0)
        (25.0, 50.0)
    """

    low: float
    high: float
    ticks: tuple[Tick, ...] = ()
    name: str = ""
    log: bool = False

    def at(self, value: float) -> float:
        """Position in percent of the length, from the low end; what has no logarithm lies there."""
        if self.log and value <= 0:
            return 0.0
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(100 * (value - low) / (high - low or 1.0), 3)

    def within(self, value: float) -> float:
        """The value, or the end of the axis that it lies beyond."""
        return min(max(value, self.low), self.high)


def linear(low: float, high: float, name: str = "", *, count: int = 4, label: str = "", margin: float = 0.0) -> Axis:
    """An axis over the values with round ticks; ``label`` follows each tick's number.

    Example:
        >>> [t for t, _ in linear(0.0, 47.0).ticks]
        [0.0, 20.0, 40.0]
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-12 * largest, sys.float_info.min):  # no step between them that a tick could show
        half = max(0.5, 1e-6 * largest)
        low, high = low - half, high + half
    room = (high - low) * margin
    low, high = low - room, high + room
    step = _round_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(i * step, _plain(i * step, digits) + label) for i in range(first, last + 1)]
    return Axis(low, high, tuple(ticks), name)


def _plain(value: float, digits: int) -> str:
    return number(value) if abs(value) >= 1e5 or digits > 4 else f"{value:.{digits}f}".replace("-", "−")


def _round_step(wanted: float) -> float:
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= wanted * 0.9999)


def logarithmic(low: float, high: float) -> Axis:
    """An axis of powers of ten around positive values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9)
    last = min(max(last, first + 1), sys.float_info.max_10_exp)
    step = max(1, -(-(last - first) // 4))
    ticks = [(10.0**e, number(10.0**e, 1) if -3 <= e <= 3 else _power(e)) for e in range(first, last + 1, step)]
    return Axis(10.0**first, 10.0**last, tuple(ticks), log=True)


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# ------------------------------------------------------------------------------------------------------ marks


def polyline(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, look: str = "") -> Markup:
    """A line through values."""
    places = " ".join(f"{x.at(a):g},{100 - y.at(b):g}" for a, b in zip(xs, ys, strict=True))
    return tag("polyline", points=places, class_=f"line {look}".strip())


def dot(a: float, b: float, x: Axis, y: Axis, look: str = "", title: str = "") -> Markup:
    """A round mark, as a line without length: those keep their shape when a chart is stretched."""
    place = f"M{x.at(a):g} {100 - y.at(b):g}h0"
    return tag("path", tag("title", title) if title else None, d=place, class_=f"dot {look}".strip())


def bar(start: float, end: float, base: float, top: float, x: Axis, y: Axis, look: str = "", title: str = "") -> Markup:
    """A bar from ``start`` to ``end`` along x, from ``base`` to ``top`` along y."""
    low, high = sorted((y.at(base), y.at(top)))
    left, right = x.at(start), x.at(end)
    return tag(
        "rect",
        tag("title", title) if title else None,
        x=f"{left:g}",
        y=f"{100 - high:g}",
        width=f"{right - left:g}",
        height=f"{max(high - low, 0.0):g}",
        class_=f"bar {look}".strip(),
    )


def rule(x1: float, y1: float, x2: float, y2: float, x: Axis, y: Axis, look: str = "") -> Markup:
    """A straight line between two places."""
    ends = {"x1": x.at(x1), "y1": 100 - y.at(y1), "x2": x.at(x2), "y2": 100 - y.at(y2)}
    return tag("line", class_=f"rule {look}".strip(), **{k: f"{v:g}" for k, v in ends.items()})


def vertical(value: float, x: Axis, look: str = "") -> Markup:
    """A line over the whole height."""
    place = f"{x.at(value):g}"
    return tag("line", x1=place, x2=place, y1=0, y2=100, class_=f"rule {look}".strip())


def horizontal(value: float, y: Axis, look: str = "") -> Markup:
    """A line over the whole width."""
    place = f"{100 - y.at(value):g}"
    return tag("line", y1=place, y2=place, x1=0, x2=100, class_=f"rule {look}".strip())


# ------------------------------------------------------------------------------------------------------ frame


def chart(
    marks: Sequence[Markup],
    x: Axis,
    y: Axis,
    *,
    summary: str,
    height: float = 11.0,
    labels: Sequence[Markup] = (),
    slanted: bool = False,
) -> Markup:
    """Marks within axes.

    Args:
        marks: inside the drawing, the lowest first.
        x: ticks below; its name stands under them.
        y: ticks to the left; its name stands over them.
        summary: what a reader who does not see the chart is told.
        height: of the drawing, in em.
        labels: texts over the drawing (:func:`label`).
        slanted: writes the ticks below aslant, for long ones.
    """
    lines = [horizontal(t, y, "grid") for t, _ in y.ticks]
    drawing = tag(
        "svg",
        *lines,
        *marks,
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )
    down = [tag("span", t, style=f"top:{100 - y.at(v):g}%") for v, t in y.ticks]
    along = [tag("span", t, style=f"left:{x.at(v):g}%", class_=_side(x.at(v))) for v, t in x.ticks]
    return tag(
        "div",
        tag("div", y.name, class_="yname") if y.name else None,
        tag(
            "div",
            tag("div", down, class_="ylabels"),
            tag("div", drawing, text(labels), class_="drawing", style=f"height:{height:g}em"),
            tag("div", along, class_="xlabels slanted" if slanted else "xlabels", style=_room(x) if slanted else None),
            class_="axes",
        ),
        tag("div", x.name, class_="xname") if x.name else None,
        class_="chart",
        role="img",
        aria_label=summary,
    )


def _room(x: Axis) -> str:
    return f"height:{1.5 + 0.34 * max(len(said) for _, said in x.ticks):g}em"


def _side(place: float) -> str | None:
    """A label at the end of an axis stays inside it."""
    return "last" if place > 97 else "first" if place < 3 else None


def label(value: str, a: float, b: float, x: Axis, y: Axis, look: str = "") -> Markup:
    """A text beside a place in the drawing."""
    place = f"left:{x.at(a):g}%;top:{100 - y.at(b):g}%"
    side = "left" if x.at(a) > 80 else "right"
    return tag("span", value, class_=f"label {side} {look}".strip(), style=place)


@dataclass(frozen=True)
class Interval:
    """A value between the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    look: str = "quantized"
    title: str = ""


def intervals(rows: Sequence[Interval], x_name: str, summary: str, level: float | None = None) -> Markup:
    """Values with their intervals, one below the other, and a dashed line at what they are compared with."""
    x = linear(min(r.low for r in rows), max(r.high if level is None else max(r.high, level) for r in rows), x_name,
               count=5, margin=0.25)  # fmt: skip
    y = Axis(0.5, len(rows) + 0.7)
    marks = [] if level is None else [vertical(level, x, "float dashed")]
    labels = []
    for height, r in zip(range(len(rows), 0, -1), rows, strict=True):
        marks += [rule(r.low, height, r.high, height, x, y, f"thick {r.look}")]
        marks += [dot(r.value, height, x, y, f"large {r.look}", r.title)]
        labels.append(label(r.name, r.low, height + 0.36, x, y, "above"))
    return chart(marks, x, y, summary=summary, height=3.0 * len(rows) + 0.8, labels=labels)


def lengths(rows: Sequence[tuple[str, float, str, str]], summary: str) -> Markup:
    """Horizontal bars: (name, value, the value as text, look)."""
    most = max((value for _, value, _, _ in rows), default=0.0) or 1.0
    shown = [
        tag(
            "div",
            tag("span", name, class_="name"),
            tag("span", tag("span", class_=f"fill {look}".strip(), style=f"width:{100 * value / most:.2f}%")),
            tag("span", said, class_="n"),
            class_="length",
        )
        for name, value, said, look in rows
    ]
    return tag("div", shown, class_="lengths", role="img", aria_label=summary)


def key(*marks: tuple[str, str]) -> Markup:
    """What the looks in a chart stand for: (look, meaning)."""
    return tag("p", [tag("span", tag("i", class_=f"swatch {look}"), meaning) for look, meaning in marks], class_="key")
