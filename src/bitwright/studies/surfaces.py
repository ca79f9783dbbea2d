"""Plots of losses over scales: contours, a surface, lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitwright.report.markup import Markup
from bitwright.studies import figures

if TYPE_CHECKING:
    from bitwright.studies.base import Result, Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind readers too (Okabe and Ito, 2008)."""
HEIGHT = 280
LIFT = 1.15
"""Of each line above the one below, in ranges."""


@dataclass(frozen=True)
class Interactive:
    """A figure of plotly, which brings its own script: surfaces can be turned, and a menu chooses the loss."""

    drawn: Any
    scripted = True

    def markup(self) -> Markup:
        """The figure with all of plotly."""
        look = {"displaylogo": False, "responsive": True}
        return Markup(self.drawn.to_html(full_html=False, include_plotlyjs=True, div_id="plot", config=look))


def figure(result: Result) -> Interactive:
    """For each block a row of contours and a surface, of one loss at a time; then a row of lines and of bends."""
    blocks = list(dict.fromkeys((r["network"], r["block"], r["kind"]) for r in result.rows))
    bits = list(dict.fromkeys(figures.bits_of(r) for r in result.rows))
    losses = list(result.rows[0]["roughness"])
    made = _panels(blocks, bits)
    shown = []
    for row, block in enumerate(blocks, 1):
        for column, width in enumerate(bits, 1):
            grids = _rows(result, block, width, "grid")
            for loss in losses if grids else []:
                shown += _landscape(
                    made, grids[0], loss, row, column, last=column == len(bits), first=loss == losses[0]
                )
            _lines(made, result, block, width, losses, len(blocks) + row, column)
        _bars(made, result, block, bits, losses, len(blocks) + row)
    _menu(made, losses, shown)
    return Interactive(made)


def _rows(result: Result, block: tuple[str, str, str], bits: str, scan: str) -> list[Row]:
    where = [r for r in result.rows if (r["network"], r["block"], r["kind"]) == block and r["scan"] == scan]
    return [r for r in where if figures.bits_of(r) == bits]


def _panels(blocks: list[tuple[str, str, str]], bits: list[str]) -> Any:
    from plotly.subplots import make_subplots

    count, columns = len(blocks), len(bits) + 1
    plain: list[dict[str, Any] | None] = [{}] * columns
    titles = [""] * (2 * count * columns)
    titles[:columns] = [*bits, f"{bits[-1]}, as a surface"]
    titles[(count + 1) * columns - 1] = "bends of the grid"
    made = make_subplots(
        rows=2 * count,
        cols=columns,
        specs=[[{}] * len(bits) + [{"type": "scene"}]] * count + [plain] * count,
        subplot_titles=titles,
        horizontal_spacing=0.05,
        vertical_spacing=0.24 / (2 * count),
    )
    for row, (network, block, kind) in enumerate(blocks, 1):
        name = f"{network}, {kind}<br>{block}"
        made.update_yaxes(title_text=f"{name}<br>second direction, %", row=row, col=1)
        made.update_yaxes(title_text=name, row=count + row, col=1)
    for column in range(1, columns):
        made.update_xaxes(title_text="first direction, %", row=count, col=column)
        made.update_xaxes(title_text="change of the scales, %", row=2 * count, col=column)
    plain_axis = {"title": "", "tickfont": {"size": 9}, "exponentformat": "e"}
    made.update_scenes(xaxis=plain_axis, yaxis=plain_axis, zaxis=plain_axis, camera_eye={"x": 1.5, "y": 1.5, "z": 0.9})
    made.update_layout(
        template="plotly_white",
        height=HEIGHT * 2 * count + 160,
        margin={"t": 90, "r": 20},
        legend={"orientation": "h", "y": -0.12 / count, "x": 0},
        font={"family": "system-ui, sans-serif", "size": 11},
    )
    return made


def _landscape(
    made: Any, row: Row, loss: str, at: int, column: int, *, last: bool, first: bool
) -> list[tuple[int, str]]:
    """Contours, and in the last column a surface too; the positions of what was drawn, with their loss."""
    import plotly.graph_objects as go

    x = [100 * a for a in row["at"]]
    values = row["values"][loss]
    made.add_trace(
        go.Contour(
            x=x,
            y=x,
            z=[list(z) for z in zip(*values, strict=True)],
            colorscale="Viridis",
            showscale=False,
            ncontours=12,
            line={"width": 0.5},
            visible=first,
            name=figures.LOSSES[loss],
        ),
        row=at,
        col=column,
    )
    drawn = [(len(made.data) - 1, loss)]
    if last:
        surface = go.Surface(
            x=x, y=x, z=values, colorscale="Viridis", showscale=False, visible=first, name=figures.LOSSES[loss]
        )
        made.add_trace(surface, row=at, col=column + 1)
        drawn.append((len(made.data) - 1, loss))
    return drawn


def _lines(
    made: Any, result: Result, block: tuple[str, str, str], bits: str, losses: list[str], at: int, column: int
) -> None:
    """Every loss over its own range, one above the other; under them infoNCE with the integers kept."""
    import plotly.graph_objects as go

    drawn = [("line, integers kept", losses[0]), *(("line", loss) for loss in reversed(losses))]
    for height, (scan, loss) in enumerate(drawn):
        rows = _rows(result, block, bits, scan)
        if not rows:
            continue
        values, kept = rows[0]["values"][loss], scan != "line"
        spread = (max(values) - min(values)) or 1.0
        colour = "#222" if kept else COLOURS[losses.index(loss)]
        name = f"{figures.LOSSES[loss]}, integers kept" if kept else figures.LOSSES[loss]
        line = go.Scatter(
            x=[100 * a for a in rows[0]["at"]],
            y=[LIFT * height + (v - min(values)) / spread for v in values],
            mode="lines",
            line={"color": colour, "width": 1.5},
            name=name,
            legendgroup=name,
            legendrank=1000 - height,
            showlegend=kept and not any(t.name == name for t in made.data),
        )
        made.add_trace(line, row=at, col=column)
    made.update_yaxes(showticklabels=False, showgrid=False, zeroline=False, row=at, col=column)


def _bars(made: Any, result: Result, block: tuple[str, str, str], bits: list[str], losses: list[str], at: int) -> None:
    import plotly.graph_objects as go

    column = len(bits) + 1
    for loss in losses:
        found = {
            figures.bits_of(s): s["grid: bends"]
            for s in result.summary
            if (s["network"], s["block"], s["kind"]) == block and s["loss"] == loss and "grid: bends" in s
        }
        spread = [found[b]["sd"] or 0.0 for b in bits if b in found]
        bar = go.Bar(
            x=[b for b in bits if b in found],
            y=[found[b]["mean"] for b in bits if b in found],
            error_y={"type": "data", "array": spread, "visible": any(spread), "thickness": 1},
            marker_color=COLOURS[losses.index(loss)],
            name=figures.LOSSES[loss],
            legendgroup=figures.LOSSES[loss],
            showlegend=not any(t.type == "bar" and t.name == figures.LOSSES[loss] for t in made.data),
        )
        made.add_trace(bar, row=at, col=column)


def _menu(made: Any, losses: list[str], shown: list[tuple[int, str]]) -> None:
    """A button for each loss, that shows its landscapes and hides the others."""
    positions = [i for i, _ in shown]
    buttons = [
        {
            "label": figures.LOSSES[loss],
            "method": "restyle",
            "args": [{"visible": [own == loss for _, own in shown]}, positions],
        }
        for loss in losses
    ]
    made.update_layout(
        updatemenus=[
            {
                "buttons": buttons,
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "y": 1,
                "xanchor": "left",
                "yanchor": "bottom",
                "pad": {"b": 35},
                "showactive": True,
            }
        ]
    )
