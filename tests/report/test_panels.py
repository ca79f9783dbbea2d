"""Panels: marks lie where their numbers are, and what has no place is left out."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest

from bitwright.report.frame import Section, document
from bitwright.report.markup import Markup
from bitwright.report.panels import Figure, Panel, Series, single


def places(drawn: str) -> list[tuple[float, float]]:
    """Of dots, in percent of the chart."""
    return [(float(x), float(y)) for x, y in re.findall(r'<path d="M([\d.-]+) ([\d.-]+)h0"', drawn)]


def test_dots_lie_where_their_numbers_are_on_logarithms_too() -> None:
    ys = [0.5, 0.02, 0.003]
    found = places(Panel((Series([1, 2, 4], ys),), y_log=True).markup())
    steps = [
        (b[1] - a[1]) / (math.log10(p) - math.log10(q))
        for a, b, p, q in zip(found, found[1:], ys, ys[1:], strict=False)
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
    assert (found[2][0] - found[1][0]) == pytest.approx(2 * (found[1][0] - found[0][0]), rel=1e-3)


def ticks_of(drawn: str, side: str) -> list[tuple[float, str]]:
    """Where ticks are, in percent of the chart, and what they say."""
    return [(float(at), said) for at, said in re.findall(rf'<span style="{side}:([\d.]+)%"[^>]*>([^<]+)</span>', drawn)]


def test_what_has_no_logarithm_lies_at_the_low_end_which_says_so() -> None:
    line = Series([1, 2, 3, 4], [1.0, 20.0, 0.0, 3.0], marks=("line", "dot"))
    found = Panel((line,), y_log=True).markup()
    assert found.count("<polyline") == 1
    heights = [100 - y for _, y in places(found)]
    assert heights[2] == 0
    assert min(heights[0], heights[3]) > 5
    assert (100.0, "0") in ticks_of(found, "top")
    assert "3: 0</title>" in found
    assert ">≤ 0<" in Panel((Series([1, 2], [-1.0, 3.0]),), y_log=True).markup()
    for count in (3, 12):
        along = [0.0, *(10.0**i for i in range(count))]
        drawn = Panel((Series(along, [0.5] * len(along)),), x_log=True).markup()
        lefts = [x for x, _ in places(drawn)]
        assert lefts[0] == 0
        assert lefts[1] > 5
        assert (0.0, "0") in ticks_of(drawn, "left")
        steps = [b - a for a, b in itertools.pairwise(lefts[1:])]
        assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_whiskers_below_zero_end_at_the_axis_and_make_no_place() -> None:
    drawn = Panel((Series([1, 2], [1.0, 2.0], ends=[(-1.0, 3.0), (1.5, 2.5)]),), y_log=True).markup()
    assert [said for _, said in ticks_of(drawn, "top") if "0" in said.split()] == []
    assert drawn.count("whisker") == 2


def test_a_gap_ends_a_line() -> None:
    line = Series([1, 2, 3, 4, 5, math.nan], [1.0, 2.0, None, math.nan, 3.0, 4.0], marks=("line", "dot"))
    drawn = Panel((line,)).markup()
    assert len(places(drawn)) == 3
    assert drawn.count("<polyline") == 2
    assert 'aria-label="values. 1 to 4."' in drawn


def test_names_are_in_their_order_and_bars_stand_side_by_side() -> None:
    bars = tuple(Series(["b", "a"], [1.0, 2.0], f"c{i}", ("bar",), f"series {i}") for i in range(2))
    drawn = Panel(bars, "kind").markup()
    lefts = [float(x) for x in re.findall(r'<rect[^>]* x="([\d.-]+)"', drawn)]
    assert len(lefts) == 4
    assert len(set(lefts)) == 4
    assert re.findall(r"<title>([^<]+)</title>", drawn)[0] == "series 0, b: 1"
    labels = re.findall(r'<span style="left:[\d.]+%"[^>]*>([^<]+)</span>', drawn)
    assert labels == ["b", "a"]


def test_whiskers_have_their_ends_and_shares_are_in_percent() -> None:
    dots = Series(["x"], [0.5], ends=[(0.25, 0.75)])
    drawn = Panel((dots,), "", "share", shares=True, least=0.0, most=1.0).markup()
    assert drawn.count("whisker") == 1
    assert 'aria-label="share. 50.0 %."' in drawn
    assert ">40\u00a0%</span>" in drawn or ">50\u00a0%</span>" in drawn
    assert not Panel((Series(["x"], [0.5], ends=[(0.5, 0.5)]),)).markup().count("whisker")


def test_series_of_one_name_have_one_entry_in_the_key() -> None:
    seeds = [Series([1, 2], [i, i + 1.0], "c1", ("line",), "adam") for i in range(3)]
    drawn = Figure([[Panel((*seeds, Series([1], [1.0], "c2", name="sgd")))]]).markup()
    assert re.findall(r"</i>([^<]+)</span>", drawn) == ["adam", "sgd"]
    assert 'class="key"' not in single(Panel(tuple(seeds)))


ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 5e-324, 1e-300, 0.3, 1e20, 1.7e308, -1.7e308)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [None], [0.3, 0.3], [1e20, 1e20], [0.0, 5e-324], [1e300, -1e300], *([v] for v in ODD), [*ODD], [None, *ODD]],
    ids=str,
)
def test_any_values_make_a_panel(values: list[float | None], log: bool) -> None:
    along = [0.5 if v is None else v for v in values]
    for marks in (("line", "dot"), ("bar",)):
        across = Series(along, [1.0] * len(values), marks=marks)  # type: ignore[arg-type]
        up = Series(list(range(1, len(values) + 1)), values, marks=marks)  # type: ignore[arg-type]
        for series in (across, up, replace(across, y=values), replace(up, ends=[(v, v) for v in along])):
            level = along[0] if along else None
            for more in ({}, {"level": level}, {"least": 0.0, "most": 1.0}, {"y_holds": (0.0, 1.0)}):
                drawn = Panel((series,), x_log=log, y_log=log, **more).markup()  # type: ignore[arg-type]
                assert "chart" in drawn
                assert not re.search(r'[":(,%](nan|-?inf)\b', drawn)


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    bad = "<script>alert(1)</script>"
    figure = Figure(
        [[Panel((Series([bad], [1.0], name=bad, titles=[bad], labels=[bad]),), bad, bad)]], [bad], caption=bad
    )
    page = document(bad, bad, bad, [bad, bad], [Section("a", bad, figure.markup()), None], foot=bad)
    assert "<script>alert" not in page
    assert "default-src &#x27;none&#x27;" in page
    assert isinstance(figure.markup(), Markup)
