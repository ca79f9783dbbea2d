"""A plan and its curve as tables, sentences, and a page with a plot. plotly is imported when something is drawn."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.bits.goal import TITLES
from bitwright.bits.plan import Plan
from bitwright.bits.planning import Planning, nearest_uniform
from bitwright.studies.figures import COLOURS
from bitwright.words import amount, scaled, size

UNITS = {
    "weight_bytes": "B",
    "activation_bytes": "B",
    "total_bytes": "B",
    "bit_operations": "",
    "latency": "s",
}
LAYERS = ("layer", "operator", "parameters", "weights", "activations", "bytes", "predicted loss")
CLOSE = 1.01
CURVE = ("which", "size", "compression", "bit operations", "predicted loss")


@dataclass(frozen=True)
class Row:
    """One line of the curve's table."""

    cost: float
    cells: tuple[str, ...]
    chosen: bool = False


def layer_rows(found: Planning) -> list[tuple[str, ...]]:
    """Every layer that has bits, in program order, under :data:`LAYERS`."""
    bits, losses = found.bits(found.plan), found.losses_of(found.plan)
    rows: list[tuple[str, ...]] = []
    for layer in found.student.layers:
        weights, activations = bits["weights"].get(layer.name), bits["activations"].get(layer.name)
        if weights is None and activations is None:
            continue
        lost = [v for half in losses.values() if (v := half.get(layer.name)) is not None]
        stored = "" if weights is None else size(-(-_elements(found, layer.weight) * weights // 8))
        rows.append(
            (
                layer.name,
                layer.op,
                scaled(layer.parameters) if layer.parameters else "",
                "" if weights is None else str(weights),
                "" if activations is None else str(activations),
                stored,
                f"{sum(lost):.2g}" if lost else "",
            )
        )
    return rows


def _elements(found: Planning, key: str | None) -> int:
    assert key is not None
    return int(np.prod(found.student.quantizer(key).shape))


def curve_rows(found: Planning, most: int | None = None) -> tuple[list[Row], list[Row]]:
    """Points of the curve (``most`` of them, evenly spread, and the plan), and uniform ones, under :data:`CURVE`."""
    count = len(found.curve)
    shown = range(count) if most is None else np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    points = [_row(found, found.curve[i], f"point {i + 1}", chosen=found.curve[i] == found.plan) for i in shown]
    if not any(p.chosen for p in points):
        points.append(_row(found, found.plan, "the plan", chosen=True))
    return points, [_row(found, p, f"{b} bits everywhere") for b, p in found.uniform.items()]


def _row(found: Planning, plan: Plan, which: str, *, chosen: bool = False) -> Row:
    predicted = plan.predicted or {}
    cells = (
        f"{which} (the plan)" if chosen and which != "the plan" else which,
        size(predicted["weight_bytes"]),
        f"{found.float_bytes / predicted['weight_bytes']:.2f} x",
        scaled(predicted["bit_operations"]),
        f"{predicted['loss']:.3g}",
    )
    return Row(predicted[found.along], cells, chosen)


def verdict(found: Planning) -> list[str]:
    """What the plan is, in sentences."""
    predicted = found.plan.predicted or {}
    said = []
    if not found.goal.asked:
        bits = nearest_uniform(found.goal)
        said.append(
            f"Without a limit, the plan is as large as {bits} bits everywhere: "
            f"{size(predicted['weight_bytes'])}. "
            "Say --target-size, --compression, --max-bops or --max-latency for another."
        )
    for name, limit in found.limits.items():
        if found.goal.asked:
            said.append(
                f"{TITLES[name]}: {amount(predicted[name], UNITS[name])}, allowed were {amount(limit, UNITS[name])}."
            )
    said += _against_uniform(found)
    widest = found.curve[-1].predicted or {}
    limit = found.limits.get(found.along, 0.0)
    if found.goal.asked and limit > max(p.predicted[found.along] for p in found.curve if p.predicted) and widest:
        said.append("The limit allows more than any plan needs: more bits are predicted to win nothing.")
    if predicted.get("gap"):
        said.append(f"The search was cut short: a better plan could lose at most {100 * predicted['gap']:.2g} % less.")
    return [*said, *found.measured.notes]


def _against_uniform(found: Planning) -> list[str]:
    """The largest network of equal bits that is no more expensive than the plan (by 1 %), beside it."""
    predicted, name = found.plan.predicted or {}, found.along
    most = CLOSE * predicted[name]
    within = {b: p.predicted for b, p in found.uniform.items() if p.predicted and p.predicted[name] <= most}
    if not within or len(found.uniform) < 2:
        return []
    bits, other = max(within.items())
    mine = f"{predicted['loss']:.3g} at {amount(predicted[name], UNITS[name])}"
    return [
        f"Predicted loss {mine}; {bits} bits everywhere: {other['loss']:.3g} at {amount(other[name], UNITS[name])}."
    ]


def source(found: Planning, folder: str) -> str:
    """Where losses come from, and whether they were measured now."""
    measured, count = found.measured, len(found.measured.images)
    name, activations = measured.settings["measure"], measured.settings["activations"]
    beside = "" if activations == name else f" ('{activations}' for activations)"
    how = "were there already, in" if measured.reused else "measured now and kept in"
    return f"Losses: '{name}'{beside} on {count} image{'s'[: count > 1]}, {how} {folder}."


def figure(found: Planning) -> Any:
    """Predicted loss along the curve with uniform bits beside it, and bits by layer."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    bits, losses = found.bits(found.plan), found.losses_of(found.plan)
    titles = ["Predicted loss of the best plan at each limit", "Bits of weights in the plan, layer by layer"]
    some = len(set(bits["activations"].values())) > 1
    titles += ["Bits of activations in the plan"] if some else []
    made = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.36 / len(titles))
    made.add_trace(_line(found), row=1, col=1)
    uniform = [(b, p.predicted) for b, p in found.uniform.items() if p.predicted]
    made.add_trace(
        go.Scatter(
            x=[p[found.along] for _, p in uniform],
            y=[p["loss"] or None for _, p in uniform],
            text=[f"{b} bits" for b, _ in uniform],
            mode="markers+text",
            textposition="top center",
            name="the same bits everywhere",
            marker={"size": 9, "color": COLOURS[1]},
        ),
        row=1,
        col=1,
    )
    chosen = found.plan.predicted or {}
    star = {"size": 16, "symbol": "star", "color": COLOURS[2]}
    made.add_trace(
        go.Scatter(x=[chosen[found.along]], y=[chosen["loss"] or None], mode="markers", name="the plan", marker=star),
        row=1,
        col=1,
    )
    made.update_yaxes(type="log", exponentformat="e", title_text="predicted loss", row=1, col=1)
    unit = UNITS[found.along]
    made.update_xaxes(title_text=TITLES[found.along] + (f" ({unit})" if unit else ""), row=1, col=1)
    for row, half in enumerate(["weights", *(["activations"] if some else [])], 2):
        made.add_trace(_bars(bits[half], losses[half], COLOURS[0]), row=row, col=1)
        made.update_xaxes(title_text="layer, in order", row=row, col=1)
        made.update_yaxes(title_text="bits", rangemode="tozero", row=row, col=1)
    made.update_layout(
        template="plotly_white",
        height=len(titles) * 340 + 80,
        margin={"t": 50, "r": 20},
        legend={"yanchor": "top", "y": 0.99, "xanchor": "right", "x": 0.99},
        font={"family": "system-ui, sans-serif"},
    )
    return made


def _line(found: Planning) -> Any:
    import plotly.graph_objects as go

    points = [p.predicted for p in found.curve if p.predicted]
    return go.Scatter(
        x=[p[found.along] for p in points],
        y=[p["loss"] or None for p in points],
        text=[f"point {i}" for i in range(1, len(points) + 1)],
        mode="lines+markers",
        name="planned",
        line={"color": COLOURS[0]},
    )


def _bars(bits: dict[str, int], losses: dict[str, float | None], colour: str) -> Any:
    import plotly.graph_objects as go

    said = ["" if losses[n] is None else f", predicted loss {losses[n]:.2g}" for n in bits]
    return go.Bar(
        x=list(range(1, len(bits) + 1)),
        y=list(bits.values()),
        customdata=list(zip(bits, said, strict=True)),
        hovertemplate="%{customdata[0]}: %{y} bits%{customdata[1]}<extra></extra>",
        marker_color=colour,
        showlegend=False,
    )


def page(found: Planning, facts: dict[str, Any]) -> str:
    """One HTML page that needs nothing else: what the plan is, the plot, its layers, the curve."""
    plot = figure(found).to_html(
        full_html=False, include_plotlyjs=True, div_id="plot", config={"displaylogo": False, "responsive": True}
    )
    said = html.escape
    name = said(facts["model"]["name"])
    sentences = "".join(f"<li>{said(s)}</li>" for s in verdict(found))
    points, uniform = curve_rows(found)
    lines = [r.cells for r in sorted([*points, *uniform], key=lambda r: r.cost)]
    versions = f"bitwright {facts['bitwright']}, torch {facts['torch']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>plan of {name} - bitwright</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-size: .9em }} td, th {{ padding: .25em .7em; text-align: left }}
td, th {{ border-bottom: 1px solid #ddd }} .small {{ color: #666; font-size: .85em }} code {{ background: #f3f3f3 }}
</style></head><body>
<h1>Bits for {name}</h1>
<ul>{sentences}</ul>
<p>Next: <code>{said(facts["next"])}</code></p>
{plot}
<h2>The plan</h2>
{_table(LAYERS, layer_rows(found))}
<h2>What other limits give</h2>
{_table(CURVE, lines)}
<p class="small">Predicted losses add up over layers, each quantized alone; they order plans well and are no forecast of
accuracy. {said(source(found, facts["sources"]["scores"]))} {said(versions)}.</p>
</body></html>
"""


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
