"""Figures of losses over scales: contours and a surface that can be turned, lines and bends below them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from bitwright.errors import UsageError
from bitwright.report.markup import Markup
from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.studies import figures
from bitwright.studies.rows import MeasuredRows, Row

HEIGHT = 280
LIFT = 1.15
"""Height of each line above the one below, in ranges."""
KEPT = "line, integers kept"

BlockKey = tuple[str, str, str]
"""A network, one of its blocks, and the block's kind."""


@dataclass(frozen=True)
class Interactive:
    """A figure of plotly, which brings its own script, over one of panels.

    Attributes:
        moving: the ``plotly.graph_objects.Figure``: surfaces can be turned, and a menu chooses the loss.
        still: what is below it.
    """

    moving: Any
    still: Figure

    scripted = True

    @property
    def series(self) -> list[Series]:
        """What is drawn in panels."""
        return self.still.series

    def markup(self) -> Markup:
        """Both, with all of plotly."""
        look = {"displaylogo": False, "responsive": True}
        drawn = self.moving.to_html(full_html=False, include_plotlyjs=True, div_id="plot", config=look)
        return Markup(drawn + self.still.markup())


def need_plotly() -> None:
    """Looks for what draws surfaces.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UsageError("Surfaces are drawn by plotly, which is not installed: pip install 'bitwright[studies]'")


def figure(result: MeasuredRows) -> Interactive:
    """Draws a row of contours and a surface per block, of one loss at a time, then a row of lines and of bends."""
    parts = list(dict.fromkeys(map(_part, result.rows)))
    bits = list(dict.fromkeys(figures.bits_of(r) for r in result.rows))
    losses = list(result.rows[0]["roughness"])
    made = _panels(parts, bits)
    shown = []
    for row, part in enumerate(parts, 1):
        for column, width in enumerate(bits, 1):
            grids = _rows(result, part, width, "grid")
            for loss in losses if grids else []:
                shown += _landscape(
                    made, grids[0], loss, row, column, last=column == len(bits), first=loss == losses[0]
                )
    _menu(made, losses, shown)
    return Interactive(made, _below(result, parts, bits, losses))


def _part(row: Row) -> BlockKey:
    return row["network"], row["block"], row["kind"]


def _named(part: BlockKey) -> str:
    network, block, kind = part
    return f"{network}, {kind} {block}"


def _rows(result: MeasuredRows, part: BlockKey, bits: str, scan: str) -> list[Row]:
    return [r for r in result.rows if _part(r) == part and r["scan"] == scan and figures.bits_of(r) == bits]


def _panels(parts: list[BlockKey], bits: list[str]) -> Any:
    from plotly.subplots import make_subplots

    count, columns = len(parts), len(bits) + 1
    titles = [*bits, f"{bits[-1]}, as a surface"] + [""] * ((count - 1) * columns)
    made = make_subplots(
        rows=count,
        cols=columns,
        specs=[[{}] * len(bits) + [{"type": "scene"}]] * count,
        subplot_titles=titles,
        horizontal_spacing=0.05,
        vertical_spacing=0.24 / (2 * count),
    )
    for row, (network, block, kind) in enumerate(parts, 1):
        made.update_yaxes(title_text=f"{network}, {kind}<br>{block}<br>second direction, %", row=row, col=1)
    for column in range(1, columns):
        made.update_xaxes(title_text="first direction, %", row=count, col=column)
    plain_axis = {"title": "", "tickfont": {"size": 9}, "exponentformat": "e"}
    made.update_scenes(xaxis=plain_axis, yaxis=plain_axis, zaxis=plain_axis, camera_eye={"x": 1.5, "y": 1.5, "z": 0.9})
    made.update_layout(
        template="plotly_white",
        height=HEIGHT * count + 160,
        margin={"t": 90, "r": 20},
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
            name=figures.LOSS_NAMES[loss],
        ),
        row=at,
        col=column,
    )
    drawn = [(len(made.data) - 1, loss)]
    if last:
        surface = go.Surface(
            x=x, y=x, z=values, colorscale="Viridis", showscale=False, visible=first, name=figures.LOSS_NAMES[loss]
        )
        made.add_trace(surface, row=at, col=column + 1)
        drawn.append((len(made.data) - 1, loss))
    return drawn


def _below(result: MeasuredRows, parts: list[BlockKey], bits: list[str], losses: list[str]) -> Figure:
    """Lines through the landscapes and how rough these are, a row for each block."""
    rows = [[*(_lines(result, p, width, losses) for width in bits), _bends(result, p, bits, losses)] for p in parts]
    return Figure(rows, [*bits, "bends of the grid"])


def _lines(result: MeasuredRows, part: BlockKey, bits: str, losses: list[str]) -> Panel:
    """Every loss over its own range, one above the other; under them infoNCE with the integers kept."""
    drawn = []
    for height, (scan, loss) in enumerate([(KEPT, losses[0]), *(("line", loss) for loss in reversed(losses))]):
        for row in _rows(result, part, bits, scan)[:1]:
            values = row["values"][loss]
            spread = (max(values) - min(values)) or 1.0
            look = "reference" if scan == KEPT else colour(losses.index(loss))
            name = f"{figures.LOSS_NAMES[loss]}, integers kept" if scan == KEPT else figures.LOSS_NAMES[loss]
            heights = [LIFT * height + (v - min(values)) / spread for v in values]
            drawn.append(Series([100 * a for a in row["at"]], heights, look, ("line",), name))
    return Panel(tuple(drawn), "change of the scales, %", _named(part), bare=True)


def _bends(result: MeasuredRows, part: BlockKey, bits: list[str], losses: list[str]) -> Panel:
    drawn = []
    for loss in losses:
        own = [s for s in result.summary if _part(s) == part and s["loss"] == loss and "grid: bends" in s]
        found = {figures.bits_of(s): s["grid: bends"] for s in own}
        known = [b for b in bits if b in found]
        means, ends = [found[b]["mean"] for b in known], figures.deviations([found[b] for b in known])
        drawn.append(Series(known, means, colour(losses.index(loss)), ("bar",), figures.LOSS_NAMES[loss], ends=ends))
    return Panel(tuple(drawn), y_name="bends, share of the range")


def _menu(made: Any, losses: list[str], shown: list[tuple[int, str]]) -> None:
    """A button for each loss, that shows its landscapes and hides the others."""
    positions = [i for i, _ in shown]
    buttons = [
        {
            "label": figures.LOSS_NAMES[loss],
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
