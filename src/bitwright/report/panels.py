"""Figures of many panels: what is drawn as plain data, and the axes found from it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from bitwright.report import charts
from bitwright.report.charts import Axis, Tick
from bitwright.report.markup import Child, Markup, tag
from bitwright.words import number, percent

Mark = Literal["line", "dot", "bar"]
COLOURS = 6
"""Looks ``c0`` to ``c5`` of the style sheet, told apart by colour-blind readers too (Okabe and Ito, 2008)."""
ROOM = 1.2
"""Beside the outermost values on a logarithmic axis, as a factor."""
EDGE = 0.1
"""Between what has a logarithm and the place of what has none, of the axis."""
LARGEST = 1e300
"""In size; what is larger, infinite or no number has no place."""
BAR = 0.8
"""Width of bars, of the distance between their places."""


def colour(position: int) -> str:
    """The look of a series by its position; after six they repeat."""
    return f"c{position % COLOURS}"


@dataclass(frozen=True)
class Series:
    """Values that are drawn alike.

    Attributes:
        x: places along the axis: numbers, or names that stand in the order in which they come.
        y: heights; None where there is none. What is no number, of ``x`` or ``y``, is left out.
        look: classes of the style sheet.
        marks: what is drawn at each place.
        name: in the key; series of one name have one entry.
        titles: told where a mark is pointed at; the values if not given.
        ends: of whiskers, the lower and the upper one.
        labels: texts over the marks.
    """

    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    look: str = "c0"
    marks: tuple[Mark, ...] = ("dot",)
    name: str = ""
    titles: Sequence[str] = ()
    ends: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()

    @property
    def swatch(self) -> str:
        """How it looks in the key."""
        return f"{self.look} round" if self.marks == ("dot",) else self.look

    def heights(self) -> Iterator[float]:
        """Everything that the axis has to hold."""
        yield from filter(_has_place, (*self.y, *itertools.chain(*self.ends)))


@dataclass(frozen=True)
class Panel:
    """Series within axes.

    Attributes:
        series: the lowest first.
        x_name: of the horizontal axis.
        y_name: of the vertical one.
        x_log: whether x is logarithmic, where there are positive values; ticks are at few values then. Those that are
            zero or less lie at the low end, which says so.
        y_log: whether y is, in the same way.
        shares: whether y is a fraction, shown in percent.
        level: a line over the whole width.
        level_look: of that line.
        x_holds: places that the horizontal axis has room for, whatever is drawn; whole ones are as wide as bars.
        y_holds: values that the vertical axis has room for.
        least: of the vertical axis, whatever the values are; lower ones are drawn there.
        most: of the vertical axis, whatever the values are; higher ones are drawn there.
        bare: whether the vertical axis has no ticks, where heights only tell apart.
        height: in em.
        summary: what a reader who does not see the chart is told; the ends of every series if not given.
    """

    series: tuple[Series, ...]
    x_name: str = ""
    y_name: str = ""
    x_log: bool = False
    y_log: bool = False
    shares: bool = False
    level: float | None = None
    level_look: str = "float dashed"
    x_holds: tuple[float, ...] = ()
    y_holds: tuple[float, ...] = ()
    least: float | None = None
    most: float | None = None
    bare: bool = False
    height: float = 11.0
    summary: str = ""

    def markup(self) -> Markup:
        """The chart."""
        names = list(dict.fromkeys(v for s in self.series for v in s.x if isinstance(v, str)))
        x, y = self._along(names), self._up()
        marks = [charts.horizontal(y.within(v), y, self.level_look) for v in (self.level,) if _has_place(v)]
        labels: list[Markup] = []
        bars = [s for s in self.series if "bar" in s.marks]
        for series in self.series:
            width = BAR / len(bars) if names and bars else BAR
            shift = width * (bars.index(series) - (len(bars) - 1) / 2) if names and series in bars else 0.0
            places = [names.index(v) + 1.0 + shift if isinstance(v, str) else float(v) for v in series.x]
            marks += _drawn(series, places, x, y, width, self.shares)
            labels += [
                charts.label(said, a, b, x, y, "" if series.ends else "over")
                for said, a, b in zip(series.labels, places, series.y, strict=False)
                if _has_place(a) and _has_place(b)
            ]
        return charts.chart(
            marks,
            x,
            y,
            summary=self.summary or self._said(),
            height=self.height,
            labels=labels,
            slanted=_crowded(names),
        )

    def _along(self, names: list[str]) -> Axis:
        if names:
            return Axis(0.5, len(names) + 0.5, tuple((float(i), n) for i, n in enumerate(names, 1)), self.x_name)
        places = (float(v) for s in self.series for v in s.x)
        values = sorted({*filter(_has_place, places), *self.x_holds})
        if not values:
            return Axis(0.0, 1.0, name=self.x_name)
        low, high = values[0], values[-1]
        if self.x_log and high > 0:
            found = _logarithmic(values, self.x_name)
            few = tuple((v, f"{v:g}") for v in values if v > 0)
            return found if len(few) > 8 else replace(found, ticks=(*_end(values, found.low), *few))
        if self.x_holds or any("bar" in s.marks for s in self.series):
            low, high = low - 0.5, high + 0.5
        found = charts.linear(low, high, self.x_name, count=5, margin=0.02)
        whole = all(v == int(v) for v in values)
        ticks = (t for t in found.ticks if not whole or (values[0] <= t[0] <= values[-1] and t[0] == int(t[0])))
        return replace(found, ticks=tuple(ticks))

    def _up(self) -> Axis:
        values = [v for s in self.series for v in s.heights()] + [
            *self.y_holds,
            *(v for v in (self.level,) if _has_place(v)),
        ]
        if self.y_log and max(values, default=0.0) > 0:
            drawn = [v for s in self.series for v in s.y if _has_place(v) and v <= 0]
            return _logarithmic([*drawn, *(v for v in values if v > 0)], self.y_name, self.least, self.most)
        bars = any("bar" in s.marks for s in self.series)
        values += [0.0] if bars else []
        low, high = min(values, default=0.0), max(values, default=1.0)
        scale, unit = (100.0, " %") if self.shares else (1.0, "")
        found = charts.linear(scale * low, scale * high, self.y_name, label=unit, margin=0.06)
        ticks: list[Tick] = [] if self.bare else [(v / scale, said) for v, said in found.ticks]
        least = 0.0 if self.least is None and bars and low == 0 else self.least
        low = max(found.low / scale, -1e300 if least is None else least)
        high = min(found.high / scale, 1e300 if self.most is None else self.most)
        return Axis(low, high, tuple(t for t in ticks if low <= t[0] <= high), self.y_name)

    def _said(self) -> str:
        """The panel for those who do not see it."""
        said = []
        for series in self.series:
            known = [v for v in series.y if _has_place(v)]
            if known and "faint" not in series.look:
                ends = " to ".join(_value(v, self.shares) for v in dict.fromkeys((min(known), max(known))))
                said.append(f"{series.name}: {ends}" if series.name else ends)
        against = f" against {self.x_name}" if self.x_name else ""
        return f"{self.y_name or 'values'}{against}. {'; '.join(said) or 'no values'}."


@dataclass(frozen=True)
class Figure:
    """Panels in rows and columns.

    Attributes:
        rows: of panels, each as long as the others.
        headings: over the columns.
        widths: of the columns, in parts; equal if not given.
        caption: above all.
    """

    rows: Sequence[Sequence[Panel]]
    headings: Sequence[str] = ()
    widths: Sequence[int] = ()
    caption: Child = None

    scripted = False
    """It has no script of its own."""

    @property
    def series(self) -> list[Series]:
        """Everything that is drawn, row by row."""
        return [s for row in self.rows for panel in row for s in panel.series]

    def markup(self) -> Markup:
        """The figure with its key, where there is more than one series to tell apart."""
        looks = {s.name: s.swatch for s in reversed(self.series) if s.name}
        legend = charts.key(*((look, name) for name, look in reversed(looks.items()))) if len(looks) > 1 else None
        caption = None if self.caption is None else tag("figcaption", self.caption)
        cells = [panel.markup() for row in self.rows for panel in row]
        if len(cells) == 1 and not self.headings:
            return tag("figure", caption, legend, cells)
        widths = self.widths or [1] * max(map(len, self.rows), default=1)
        columns = " ".join(f"minmax(14rem, {w}fr)" for w in widths)
        heads = [tag("div", h, class_="over") for h in self.headings]
        grid = tag("div", heads, cells, class_="panels", style=f"grid-template-columns: {columns}")
        return tag("figure", caption, legend, grid)


def single(panel: Panel, *caption: Child) -> Markup:
    """A figure of one panel."""
    return Figure([[panel]], caption=caption).markup()


def _drawn(series: Series, places: list[float], x: Axis, y: Axis, width: float, shares: bool) -> list[Markup]:
    """The marks of one series."""
    known = [
        (i, a, y.within(b))
        for i, (a, b) in enumerate(zip(places, series.y, strict=True))
        if _has_place(a) and _has_place(b)
    ]
    found: list[Markup] = []
    if "line" in series.marks:
        found += [
            charts.polyline([a for _, a, _ in run], [b for _, _, b in run], x, y, series.look) for run in _runs(known)
        ]
    for i, a, b in known:
        title = series.titles[i] if series.titles else f"{_named(series, i)}{_value(series.y[i] or 0.0, shares)}"
        if "bar" in series.marks:
            base = y.low if y.log else y.within(0.0)
            found.append(charts.bar(a - width / 2, a + width / 2, base, b, x, y, series.look, title))
        if series.ends and series.ends[i][0] < series.ends[i][1]:
            low, high = map(y.within, series.ends[i])
            found.append(
                charts.rule(a, low, a, high, x, y, "whisker ink" if "bar" in series.marks else f"whisker {series.look}")
            )
        if "dot" in series.marks:
            found.append(charts.dot(a, b, x, y, series.look, title))
    return found


def _named(series: Series, i: int) -> str:
    where = series.x[i]
    parts = [series.name, where if isinstance(where, str) else f"{where:g}"]
    return ", ".join(p for p in parts if p) + ": "


def _runs(known: list[tuple[int, float, float]]) -> list[list[tuple[int, float, float]]]:
    """Neighbours without a gap between them."""
    found: list[list[tuple[int, float, float]]] = []
    for each in known:
        if found and found[-1][-1][0] == each[0] - 1:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def _has_place(value: float | None) -> TypeGuard[float]:
    """Whether a value can be drawn; comparisons with what is no number are false."""
    return value is not None and abs(value) <= LARGEST


def _logarithmic(values: Sequence[float], name: str, least: float | None = None, most: float | None = None) -> Axis:
    """No longer than the values need, with powers of ten where two are inside; one value at least is positive."""
    positive = [v for v in values if v > 0]
    low = min(positive) if least is None else least
    high = max(positive) if most is None else most
    below = min(values) <= 0 and least is None
    low, high = max(low / ROOM, sys.float_info.min), high * ROOM
    for ticks in (charts.logarithmic(low, high).ticks, charts.linear(low, high).ticks):
        inside = tuple(t for t in ticks if low <= t[0] <= high)
        if len(inside) > 1:
            break
    start = max(low * (low / high) ** EDGE, sys.float_info.min) if below else low
    return Axis(start, high, (*_end(values, start), *inside) if below else inside, name, log=True)


def _end(values: Sequence[float], low: float) -> tuple[Tick, ...]:
    """The tick at the low end of a logarithmic axis, where values without a logarithm lie."""
    least = min(values)
    return () if least > 0 else ((low, "0" if least == 0 else "≤ 0"),)


def _crowded(names: list[str]) -> bool:
    """Whether names do not fit side by side."""
    return sum(map(len, names)) > 24


def _value(value: float, shares: bool) -> str:
    return percent(value, 1) if shares else number(value)
