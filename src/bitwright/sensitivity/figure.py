"""The plot of ``bitwright sensitivity``, and the page around it. plotly is imported when something is drawn."""

from __future__ import annotations

import html
from typing import Any

from bitwright.studies.figures import COLOURS

NEGATIVE = "#888"
PANEL = 320


def figure(found: dict[str, Any]) -> Any:
    """Panels of predicted loss, mean trace and top eigenvalue along the layers, and of the network's density."""
    from plotly.subplots import make_subplots

    layers, density = found["layers"], found["network"]["density"]
    titles = [
        f"Predicted loss at {found['settings']['bits']} bits, each layer alone",
        "Mean of the trace over the layer's weights, with its standard error",
    ]
    if density is not None:
        titles += ["Largest eigenvalue of the layer", "Spectral density of the network"]
    made = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.42 / len(titles))
    columns = [[r["predicted_loss"] for r in layers], [r["mean_trace"] for r in layers]]
    if density is not None:
        columns.append([r["eigenvalues"][0] for r in layers])
        _draw_density(made, density, len(titles))
    for row, values in enumerate(columns, 1):
        errors = [r["trace_error"] / r["parameters"] for r in layers] if row == 2 else None
        made.add_trace(_bars(layers, values, COLOURS[row - 1], errors), row=row, col=1)
        made.update_yaxes(type="log", exponentformat="e", row=row, col=1)
        made.update_xaxes(title_text="layer, in order", row=row, col=1)
    made.update_layout(
        template="plotly_white",
        height=len(titles) * PANEL + 100,
        showlegend=False,
        margin={"t": 50, "r": 20},
        font={"family": "system-ui, sans-serif"},
    )
    return made


def _bars(layers: list[dict[str, Any]], values: list[float], colour: str, errors: list[float] | None) -> Any:
    """A bar a layer as high as the value's size, grey where it is negative."""
    import plotly.graph_objects as go

    return go.Bar(
        x=list(range(1, len(layers) + 1)),
        y=[abs(v) or None for v in values],
        customdata=[[r["name"], v] for r, v in zip(layers, values, strict=True)],
        hovertemplate="%{customdata[0]}: %{customdata[1]:.3g}<extra></extra>",
        marker_color=[colour if v >= 0 else NEGATIVE for v in values],
        error_y=None if errors is None else {"type": "data", "array": errors},
    )


def _draw_density(made: Any, density: dict[str, list[float]], row: int) -> None:
    import plotly.graph_objects as go

    line = go.Scatter(x=density["eigenvalue"], y=density["density"], mode="lines", line={"color": COLOURS[3]})
    made.add_trace(line, row=row, col=1)
    made.update_yaxes(type="log", exponentformat="e", range=_decades(max(density["density"])), row=row, col=1)
    made.update_xaxes(title_text="eigenvalue", row=row, col=1)


def _decades(peak: float, shown: int = 8) -> list[float]:
    import math

    top = math.log10(max(peak, 1e-300))
    return [top - shown, top + 0.5]


def verdict(found: dict[str, Any]) -> list[str]:
    """The layers that matter, in sentences, and what to do about them."""
    shares = {r["name"]: r["share"] for r in found["layers"]}
    matter, bits = found["matter"], found["settings"]["bits"]
    if not matter:
        return ["No layer's weights matter to the outputs, as far as second derivatives can tell."]
    listed = ", ".join(f"{name} ({100 * shares[name]:.0f} %)" for name in matter[:10])
    more = f" and {len(matter) - 10} more" if len(matter) > 10 else ""
    together = 100 * sum(shares[name] for name in matter)
    said = [
        f"At {bits} bits, {len(matter)} of {len(shares)} layers make up {together:.0f} % of the predicted loss: "
        f"{listed}{more}.",
    ]
    if bits < 8:
        rules = " ".join(f"--rule '{name}=w8'" for name in matter[:3])
        said.append(f"To give the worst of them more bits: bitwright quantize … --weights {bits} {rules}")
    return [*said, *_pruned(found), *found["notes"]]


def _pruned(found: dict[str, Any]) -> list[str]:
    """What HAP would prune, and the layers that would give most of it."""
    rows = found.get("channels")
    if not rows:
        return []
    count, total = sum(len(r["pruned"]) for r in rows), sum(len(r["scores"]) for r in rows)
    most = sorted((r for r in rows if r["pruned"]), key=lambda r: -len(r["pruned"]) / len(r["scores"]))[:5]
    listed = ", ".join(f"{r['name']} ({len(r['pruned'])} of {len(r['scores'])})" for r in most)
    cost = sum(r["predicted_loss"] for r in rows)
    return [
        f"HAP would prune {count} of {total} channels at a predicted loss of {cost:.2g}"
        f"{', most of all in ' + listed if listed else ''}; nothing was pruned."
    ]


def page(found: dict[str, Any]) -> str:
    """One HTML page that needs nothing else: what it says, the plot, a table of the layers."""
    plot = figure(found).to_html(
        full_html=False, include_plotlyjs=True, div_id="plot", config={"displaylogo": False, "responsive": True}
    )
    said = html.escape
    name, settings = found["model"]["name"], found["settings"]
    sentences = "".join(f"<li>{said(s)}</li>" for s in verdict(found))
    head = "".join(f"<th>{h}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{said(c)}</td>" for c in cells(r)) + "</tr>" for r in ranked(found))
    versions = f"bitwright {found['bitwright']}, torch {found['torch']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sensitivity of {said(name)} - bitwright</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-size: .9em }} td, th {{ padding: .25em .7em; text-align: left }}
td, th {{ border-bottom: 1px solid #ddd }} .small {{ color: #666; font-size: .85em }}
</style></head><body>
<h1>Sensitivity of {said(name)}</h1>
<ul>{sentences}</ul>
<p>{said(settings["meaning"])}; {found["data"]["count"]} images. A bar in grey is negative, its size shown. Hover for
names.</p>
{plot}
<table><tr>{head}</tr>{body}</table>
{_channels(found)}
<p class="small">predicted loss: half the mean of the trace times the squared rounding error (HAWQ-V2,
arXiv:1911.03852). Eigenvalues and density: Lanczos with {settings["steps"]} steps at most (arXiv:1912.07145).
{said(versions)}.</p>
</body></html>
"""


def _channels(found: dict[str, Any]) -> str:
    """A table of the channels that HAP's score puts last, where it was asked for."""
    said = html.escape
    rows = "".join(
        f"<tr><td>{said(r['name'])}</td><td>{', '.join(map(str, r['least']))}</td>"
        f"<td>{len(r['pruned'])} of {len(r['scores'])}</td><td>{r['predicted_loss']:.3g}</td></tr>"
        for r in found.get("channels", [])
    )
    heads = "<tr><th>layer</th><th>least important channels</th><th>would be pruned</th><th>predicted loss</th></tr>"
    return f"<h2>Channels (HAP, arXiv:2101.08940)</h2><table>{heads}{rows}</table>" if rows else ""


HEADINGS = ("layer", "parameters", "trace", "mean trace", "top eigenvalue", "predicted loss", "share")


def ranked(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the layers, the worst first."""
    return sorted(found["layers"], key=lambda r: -r["predicted_loss"])


def cells(row: dict[str, Any]) -> list[str]:
    """A layer's row under :data:`HEADINGS`.

    Example:
        >>> cells({"name": "a", "parameters": 9, "trace": 1.5, "trace_error": 0.1, "mean_trace": 1 / 6,
        ...     "eigenvalues": [0.5], "predicted_loss": 0.02, "share": 0.25})
        ['a', '9', '1.5 ± 0.1', '0.167', '0.5', '0.02', '25.0 %']
    """
    return [
        row["name"],
        str(row["parameters"]),
        f"{row['trace']:.3g} ± {row['trace_error']:.1g}",
        f"{row['mean_trace']:.3g}",
        f"{row['eigenvalues'][0]:.3g}" if row["eigenvalues"] else "-",
        f"{row['predicted_loss']:.3g}",
        f"{100 * row['share']:.1f} %",
    ]
