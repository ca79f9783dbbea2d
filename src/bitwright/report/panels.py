"""Figures of many panels: what is drawn as plain data, and the axes found from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bitwright.report import charts
from bitwright.report.charts import Axis, Tick
from bitwright.report.markup import Markup, tag
from bitwright.words import number, percent

Mark = Literal["line", "dot", "bar"]
COLOURS = 6
"""Looks ``c0`` to ``c5`` of the style sheet, told apart by colour-blind readers too (Okabe and Ito, 2008)."""
DECADE = 10.0
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
        y: heights; None where there is none.
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

    def heights(self) -> Iterator[float]:
        """Everything that the axis has to hold."""
        yield from (v for v in (*self.y, *itertools.chain(*self.ends)) if v is not None)


@dataclass(frozen=True)
class Panel:
    """Series within axes.

    Attributes:
        series: the lowest first.
        x_name: of the horizontal axis.
        y_name: of the vertical one.
        x_log: whether x is logarithmic; ticks are at the values then.
        y_log: whether y is, where there are positive values.
        shares: whether y is a fraction, shown in percent.
        level: a dashed line over the whole width.
        least: of the vertical axis, whatever the values are; lower ones are drawn there.
        most: likewise.
        height: in em.
    """

    series: tuple[Series, ...]
    x_name: str = ""
    y_name: str = ""
    x_log: bool = False
    y_log: bool = False
    shares: bool = False
    level: float | None = None
    least: float | None = None
    most: float | None = None
    height: float = 11.0

    def markup(self) -> Markup:
        """The chart."""
        names = list(dict.fromkeys(v for s in self.series for v in s.x if isinstance(v, str)))
        x, y = self._along(names), self._up()
        marks = [] if self.level is None else [charts.horizontal(y.within(self.level), y, "float dashed")]
        labels: list[Markup] = []
        bars = [s for s in self.series if "bar" in s.marks]
        for series in self.series:
            width = BAR / len(bars) if names and bars else BAR
            shift = width * (bars.index(series) - (len(bars) - 1) / 2) if names and series in bars else 0.0
            places = [names.index(v) + 1.0 + shift if isinstance(v, str) else float(v) for v in series.x]
            marks += _drawn(series, places, x, y, width, self.shares)
            labels += [
                charts.label(said, a, b, x, y, "over")
                for said, a, b in zip(series.labels, places, series.y, strict=False)
                if b is not None and (not y.log or b > 0)
            ]
        return charts.chart(
            marks, x, y, summary=self._said(), height=self.height, labels=labels, slanted=_crowded(names)
        )

    def _along(self, names: list[str]) -> Axis:
        if names:
            return Axis(0.5, len(names) + 0.5, tuple((float(i), n) for i, n in enumerate(names, 1)), self.x_name)
        values = sorted({float(v) for s in self.series for v in s.x})
        if not values:
            return Axis(0.0, 1.0, name=self.x_name)
        low, high = values[0], values[-1]
        if self.x_log and len(values) <= 8:
            return Axis(low / 1.3, high * 1.3, tuple((v, f"{v:g}") for v in values), self.x_name, log=True)
        if self.x_log:
            return _logarithmic(low, high, self.x_name)
        if any("bar" in s.marks for s in self.series):
            low, high = low - 0.5, high + 0.5
        return charts.linear(low, high, self.x_name, margin=0.02)

    def _up(self) -> Axis:
        values = [v for s in self.series for v in s.heights()] + [v for v in (self.level,) if v is not None]
        positive = [v for v in values if v > 0]
        if self.y_log and positive:
            low = min(positive) if self.least is None else self.least
            return _logarithmic(low, max(positive) if self.most is None else self.most, self.y_name)
        if any("bar" in s.marks for s in self.series):
            values.append(0.0)
        low, high = min(values, default=0.0), max(values, default=1.0)
        scale, unit = (100.0, " %") if self.shares else (1.0, "")
        found = charts.linear(scale * low, scale * high, self.y_name, label=unit, margin=0.06)
        ticks: list[Tick] = [(v / scale, said) for v, said in found.ticks]
        low = max(found.low / scale, -1e300 if self.least is None else self.least)
        high = min(found.high / scale, 1e300 if self.most is None else self.most)
        return Axis(low, high, tuple(t for t in ticks if low <= t[0] <= high), self.y_name)

    def _said(self) -> str:
        """The panel for those who do not see it."""
        said = []
        for series in self.series:
            known = [v for v in series.y if v is not None]
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
    """

    rows: Sequence[Sequence[Panel]]
    headings: Sequence[str] = ()
    widths: Sequence[int] = ()

    scripted = False
    """It has no script of its own."""

    @property
    def series(self) -> list[Series]:
        """Everything that is drawn, row by row."""
        return [s for row in self.rows for panel in row for s in panel.series]

    def markup(self) -> Markup:
        """The figure with its key, where there is more than one series to tell apart."""
        looks = {s.name: s.look for s in reversed(self.series) if s.name}
        legend = charts.key(*((look, name) for name, look in reversed(looks.items()))) if len(looks) > 1 else None
        widths = self.widths or [1] * max(map(len, self.rows), default=1)
        columns = " ".join(f"minmax(14rem, {w}fr)" for w in widths)
        heads = [tag("div", h, class_="over") for h in self.headings]
        cells = [panel.markup() for row in self.rows for panel in row]
        return tag(
            "figure", legend, tag("div", heads, cells, class_="panels", style=f"grid-template-columns: {columns}")
        )


def _drawn(series: Series, places: list[float], x: Axis, y: Axis, width: float, shares: bool) -> list[Markup]:
    """The marks of one series; what has no logarithm has none."""
    known = [
        (i, a, y.within(b))
        for i, (a, b) in enumerate(zip(places, series.y, strict=True))
        if b is not None and (not y.log or b > 0)
    ]
    found: list[Markup] = []
    if "line" in series.marks:
        found += [
            charts.polyline([a for _, a, _ in run], [b for _, _, b in run], x, y, series.look) for run in _runs(known)
        ]
    for i, a, b in known:
        title = series.titles[i] if series.titles else f"{_named(series, i)}{_value(b, shares)}"
        if "bar" in series.marks:
            base = y.low if y.log else y.within(0.0)
            found.append(charts.bar(a - width / 2, a + width / 2, base, b, x, y, series.look, title))
        if series.ends and series.ends[i][0] < series.ends[i][1]:
            low, high = map(y.within, series.ends[i])
            found.append(charts.rule(a, low, a, high, x, y, f"whisker {series.look}"))
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


def _logarithmic(low: float, high: float, name: str) -> Axis:
    """Whole decades where the values span more than one; as little as they need where they do not."""
    if high / low > DECADE:
        return charts.logarithmic(low, high, name)
    low, high = low / 1.1, high * 1.1
    return Axis(low, high, tuple(t for t in charts.linear(low, high).ticks if t[0] > 0), name, log=True)


def _crowded(names: list[str]) -> bool:
    """Whether names do not fit side by side."""
    return sum(map(len, names)) > 24


def _value(value: float, shares: bool) -> str:
    return percent(value, 1) if shares else number(value)
