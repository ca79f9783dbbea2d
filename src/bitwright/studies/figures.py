"""Plots of studies, and the page around one. plotly is imported when something is drawn."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.studies.base import Result, Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind readers too (Okabe and Ito, 2008)."""
TITLES = {
    "kl": "KL from float, held-out (nats)",
    "agreement": "same class as float, held-out",
    "top1": "top-1 accuracy",
    "objective": "Hessian-weighted error",
    "infonce": "infoNCE over float, held-out",
    "mse": "relative squared error, held-out",
    "cosine": "cosine distance, held-out",
    "closed": "way to the float fitness",
}
LOSSES = {
    "infonce": "infoNCE",
    "mse": "squared error",
    "cosine": "cosine",
    "kl": "KL",
    "cross-entropy": "cross-entropy",
}
LOGARITHMIC = {"kl", "objective"}
PANEL_HEIGHT = 300


def accuracy(result: Result) -> str:
    """The measure of right answers that there is: top-1 with labels, agreement without."""
    return "top1" if any(r.get("top1") is not None for r in result.rows) else "agreement"


def bits_of(row: Row) -> str:
    """``W3A8``; ``W3`` with activations in float.

    Example:
        >>> bits_of({"weights": 3, "activations": 8}), bits_of({"weights": 4, "activations": None})
        ('W3A8', 'W4')
    """
    return f"W{row['weights']}" + (f"A{row['activations']}" if row["activations"] else "")


# ------------------------------------------------------------------------------------------ kinds of figure


def comparison(result: Result, x: str, metrics: list[str], title: str, *, numeric: bool = False) -> Any:
    """A column of panels for each network and number of bits, a row for each metric.

    Means over seeds with their standard deviation, single seeds as dots, and a dashed line at what has no ``x`` or is
    the start.

    Args:
        result: with rows that hold ``network``, ``weights``, ``variant``, the metrics and perhaps ``x``.
        x: key along the axis.
        metrics: keys along the vertical axes.
        title: of the axis.
        numeric: whether x is a number, on a logarithmic axis.
    """
    columns = list(dict.fromkeys((r["network"], bits_of(r)) for r in result.rows))
    headings = [", ".join(c) for c in columns]
    made = grid(len(metrics), headings, names=[TITLES[m] for m in metrics])
    for row, metric in enumerate(metrics, 1):
        for column, where in enumerate(columns, 1):
            panel(made, result, where, metric, x, row, column, numeric=numeric)
            if row == len(metrics):
                made.update_xaxes(title_text=title, row=row, col=column)
        scale(made, metric, row)
    if numeric:
        ticks = sorted({r[x] for r in result.rows if x in r})
        made.update_xaxes(type="log", tickmode="array", tickvals=ticks, ticktext=[str(t) for t in ticks])
    return made


def scale(made: Any, metric: str, row: int) -> None:
    """Logarithms of distances; percent of shares, whose axes end at 0 and 1."""
    if metric in LOGARITHMIC:
        made.update_yaxes(type="log", row=row)
    elif metric in FRACTIONS:
        made.update_yaxes(tickformat=".1%", minallowed=0, maxallowed=1.01, row=row)


def panel(
    made: Any,
    result: Result,
    where: tuple[str, str],
    metric: str,
    x: str,
    row: int,
    column: int,
    *,
    numeric: bool = False,
) -> None:
    """One metric of one network: means, single seeds, and a dashed line at the start."""
    summary = [s for s in result.summary if (s["network"], bits_of(s)) == where and metric in s]
    start = [s for s in summary if s["variant"] == "before" and (x == "variant" or x not in s)]
    shown = [s for s in summary if s not in start]
    for s in start:
        made.add_trace(_start(s[metric]["mean"], [s[x] for s in shown], numeric=numeric), row=row, col=column)
    series = list(dict.fromkeys(s["variant"] for s in shown)) if numeric else [None]
    for position, name in enumerate(series):
        members = [s for s in shown if name in (None, s["variant"])]
        look = style(position, first=row == column == 1 and len(series) > 1)
        made.add_trace(_means(members, metric, x, name, numeric=numeric, **look), row=row, col=column)
        rows = [r for r in result.rows if (r["network"], bits_of(r)) == where and x in r and r.get(metric) is not None]
        rows = [r for r in rows if any(r[x] == s[x] and r["variant"] == s["variant"] for s in members)]
        made.add_trace(_dots(rows, metric, x, look["color"]), row=row, col=column)


def _start(value: float, x: list[Any], *, numeric: bool) -> Any:
    """A dashed line over the axis; a trace and no shape, so that the axis makes room for it."""
    import plotly.graph_objects as go

    ends = [min(x), max(x)] if numeric and x else x
    look = {"dash": "dash", "color": "#888"}
    return go.Scatter(x=ends, y=[value] * len(ends), mode="lines", line=look, name="before", showlegend=False)


def _means(members: list[Row], metric: str, x: str, name: str | None, *, numeric: bool, **look: Any) -> Any:
    import plotly.graph_objects as go

    spread = [s[metric]["sd"] or 0.0 for s in members]
    return go.Scatter(
        x=[s[x] for s in members],
        y=[s[metric]["mean"] for s in members],
        error_y={"type": "data", "array": spread, "visible": any(spread)},
        mode="lines+markers" if numeric else "markers",
        marker={"size": 10, "color": look["color"]},
        line={"color": look["color"]},
        name=name or "mean",
        legendgroup=name or "mean",
        showlegend=look["first"],
    )


def _dots(rows: list[Row], metric: str, x: str, colour: str) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[r[x] for r in rows],
        y=[r[metric] for r in rows],
        text=[f"seed {r['seed']}" for r in rows],
        mode="markers",
        marker={"size": 5, "color": colour, "opacity": 0.4},
        showlegend=False,
    )


# ------------------------------------------------------------------------------------------------- pieces


def grid(
    rows: int, headings: list[str], *, names: list[str], shared: bool = True, widths: list[float] | None = None
) -> Any:
    """Empty panels with a heading over each column and a name beside each row; ``shared``: one x axis a column."""
    from plotly.subplots import make_subplots

    made = make_subplots(
        rows=rows,
        cols=len(headings),
        column_titles=headings,
        column_widths=widths,
        shared_xaxes="columns" if shared else False,
        vertical_spacing=0.12 / max(rows - 1, 1),
        horizontal_spacing=0.09,
    )
    for row, name in enumerate(names, 1):
        made.update_yaxes(title_text=name, row=row, col=1)
    made.update_yaxes(exponentformat="e")
    made.update_layout(
        template="plotly_white",
        height=PANEL_HEIGHT * rows + 120,
        margin={"t": 60, "r": 20},
        legend={"orientation": "h", "y": -0.3 / rows, "x": 0},
        font={"family": "system-ui, sans-serif"},
    )
    return made


def style(position: int, *, first: bool, dashed: bool = False) -> Row:
    """Colour of a series, whether it enters the legend, whether it is the one that others are compared with."""
    return {"color": COLOURS[position % len(COLOURS)], "first": first, "dashed": dashed}


def line(texts: list[str], y: list[Any], name: str, *, color: str, first: bool, dashed: bool) -> Any:
    """A line with a named marker at each position; black and dashed where the others are compared with it."""
    import plotly.graph_objects as go

    look = {"color": "#222", "dash": "dash", "width": 3} if dashed else {"color": color}
    x = list(range(1, len(y) + 1))
    marked = {"mode": "lines+markers", "text": texts, "line": look}
    return go.Scatter(x=x, y=y, name=name, legendgroup=name, showlegend=first, **marked)


def bar(x: list[str], y: list[Any], name: str, *, color: str, first: bool, dashed: bool = False) -> Any:
    """Bars of one series."""
    import plotly.graph_objects as go

    return go.Bar(x=x, y=y, name=name, marker_color=color, legendgroup=name, showlegend=first)


# --------------------------------------------------------------------------------------------------- page


def page(result: Result) -> str:
    """One HTML page that needs nothing else: plot, how to read it, the summary as a table, the settings."""
    study = result.study
    plot = result.figure().to_html(
        full_html=False, include_plotlyjs=True, div_id="plot", config={"displaylogo": False, "responsive": True}
    )
    said = html.escape
    settings = ", ".join(f"{k} {v}" for k, v in result.facts["settings"].items() if k != "study")
    versions = f"bitwright {result.facts['bitwright']}, torch {result.facts['torch']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{said(study.name)} - bitwright</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }}
.wide {{ overflow-x: auto; font-size: .9em }} table {{ border-collapse: collapse }} td, th {{ padding: .25em .7em }}
td, th {{ border-bottom: 1px solid #ddd; text-align: left }}
.wide td {{ white-space: nowrap }}
.small {{ color: #666; font-size: .85em }}
</style></head><body>
<h1>{said(study.name)}</h1>
<p>{said(study.summary)}</p>
<p><b>How to read it.</b> {said(study.reading)}</p>
{_verdict(result)}
{plot}
{_table(result)}
<p class="small">{said(study.reproduces)} {said(study.paper)}. Settings: {said(settings)}. {said(versions)}.</p>
</body></html>
"""


def _verdict(result: Result) -> str:
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in result.verdict)
    return f"<p><b>What it says here.</b></p><ul>{said}</ul>" if said else ""


def _table(result: Result) -> str:
    heads, lines = table(result.summary)
    rows = ["".join(f"<th>{html.escape(h)}</th>" for h in heads)]
    rows += ["".join(f"<td>{html.escape(c)}</td>" for c in cells) for cells in lines]
    return '<div class="wide"><table>' + "".join(f"<tr>{r}</tr>" for r in rows) + "</table></div>"


HEADINGS = {
    "kl": "KL (nats)",
    "calibration_kl": "KL on calibration",
    "agreement": "same class",
    "top1": "top-1",
    "infonce": "infoNCE over float",
    "mse": "squared error",
    "closed": "way to float",
    "spearman": "rank correlation",
    "closed_held_out": "way, held-out",
}
FRACTIONS = {"agreement", "top1", "below_bound", "closed", "closed_held_out", "spread"}


def table(summary: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of a summary; columns without a value anywhere are left out.

    Example:
        >>> table([{"variant": "sla", "kl": {"mean": 0.01234, "sd": 0.001, "count": 3}}])
        (['variant', 'KL (nats)'], [['sla', '0.0123 ± 0.001']])
    """
    keys = list(dict.fromkeys(k for s in summary for k in s if s[k] is not None))
    keys.sort(key=lambda k: any(isinstance(s.get(k), dict) for s in summary))
    return [HEADINGS.get(k, k.replace("_", " ")) for k in keys], [[_text(k, s.get(k)) for k in keys] for s in summary]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    mean, deviation = value["mean"], value["sd"]
    if key in FRACTIONS or key.endswith("minima"):
        return f"{100 * mean:.1f} %" + (f" ± {100 * deviation:.1f}" if deviation else "")
    return f"{mean:.3g}" + (f" ± {deviation:.2g}" if deviation else "")
