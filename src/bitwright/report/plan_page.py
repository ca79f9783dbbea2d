"""A plan and its curve as tables, sentences, and a page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.bits.plan import Plan
from bitwright.bits.planned import Planning
from bitwright.bits.planning import nearest_uniform
from bitwright.report.frame import Section, document, paragraph, shell
from bitwright.report.markup import Child, tag
from bitwright.report.panels import Panel, Series, single
from bitwright.report.plans import curve_figure, expected_share
from bitwright.report.tables import page_table
from bitwright.words import TITLES, amount, scaled, size

_UNITS = {
    "weight_bytes": "B",
    "activation_bytes": "B",
    "total_bytes": "B",
    "bit_operations": "",
    "latency": "s",
}
LAYER_HEADINGS = ("layer", "operator", "parameters", "weights", "activations", "bytes", "predicted loss")
_CLOSE = 1.01
CURVE_HEADINGS = ("which", "size", "compression", "bit operations", "predicted loss")


@dataclass(frozen=True)
class CurveRow:
    """One line of the curve's table."""

    cost: float
    cells: tuple[str, ...]
    chosen: bool = False


def layer_rows(found: Planning) -> list[tuple[str, ...]]:
    """Every layer that has bits, in program order, under :data:`LAYER_HEADINGS`."""
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


def curve_rows(found: Planning, most: int | None = None) -> tuple[list[CurveRow], list[CurveRow]]:
    """Points of the curve (``most``, evenly spread, and the plan), and uniform ones, under :data:`CURVE_HEADINGS`."""
    count = len(found.curve)
    shown = range(count) if most is None else np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    points = [_row(found, found.curve[i], f"point {i + 1}", chosen=found.curve[i] == found.plan) for i in shown]
    if not any(p.chosen for p in points):
        points.append(_row(found, found.plan, "the plan", chosen=True))
    return points, [_row(found, p, f"{b} bits everywhere") for b, p in found.uniform.items()]


def _row(found: Planning, plan: Plan, which: str, *, chosen: bool = False) -> CurveRow:
    predicted = plan.predicted or {}
    cells = (
        f"{which} (the plan)" if chosen and which != "the plan" else which,
        size(predicted["weight_bytes"]),
        f"{found.float_bytes / predicted['weight_bytes']:.2f} x",
        scaled(predicted["bit_operations"]),
        f"{predicted['loss']:.3g}",
    )
    return CurveRow(predicted[found.along], cells, chosen)


def plan_verdict(found: Planning) -> list[str]:
    """What the plan is, in sentences."""
    predicted = found.plan.predicted or {}
    said = []
    if not found.goal.asked:
        bits = nearest_uniform(found.goal)
        said.append(
            f"Without a limit, the plan is as large as {bits} bits everywhere: "
            f"{size(predicted['weight_bytes'])}. "
            "Give --target-size, --compression, --max-bops, --max-latency or --max-drop for another."
        )
    for name, limit in found.limits.items():
        if found.goal.asked:
            planned, most = amount(predicted[name], _UNITS[name]), amount(limit, _UNITS[name])
            said.append(f"{TITLES[name]}: {planned}, at most {most} allowed.")
    if found.estimate is not None:
        said.append(expected_share(found.estimate))
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
    most = _CLOSE * predicted[name]
    within = {b: p.predicted for b, p in found.uniform.items() if p.predicted and p.predicted[name] <= most}
    if not within or len(found.uniform) < 2:
        return []
    bits, other = max(within.items())
    mine = f"{predicted['loss']:.3g} at {amount(predicted[name], _UNITS[name])}"
    return [
        f"Predicted loss {mine}; {bits} bits everywhere: {other['loss']:.3g} at {amount(other[name], _UNITS[name])}."
    ]


def source(found: Planning, folder: str) -> str:
    """Where losses come from, and whether they were measured now."""
    measured, count = found.measured, len(found.measured.images)
    name, activations = measured.settings["measure"], measured.settings["activations"]
    beside = "" if activations == name else f" ('{activations}' for activations)"
    how = "were there already, in" if measured.reused else "measured now and kept in"
    return f"Losses: '{name}'{beside} on {count} image{'s'[: count > 1]}, {how} {folder}."


def _bits_of_layers(found: Planning) -> list[Child]:
    """Bits of weights layer by layer; those of activations too where they differ."""
    bits, losses = found.bits(found.plan), found.losses_of(found.plan)
    titles = {"weights": "Bits of weights in the plan, layer by layer"}
    if len(set(bits["activations"].values())) > 1:
        titles["activations"] = "Bits of activations in the plan"
    return [single(_bars(bits[half], losses[half]), tag("b", title)) for half, title in titles.items()]


def _bars(bits: dict[str, int], losses: dict[str, float | None]) -> Panel:
    said = ["" if (loss := losses[n]) is None else f", predicted loss {loss:.2g}" for n in bits]
    titles = [f"{n}: {b} bits{more}" for (n, b), more in zip(bits.items(), said, strict=True)]
    bars = Series(range(1, len(bits) + 1), list(bits.values()), marks=("bar",), titles=titles)
    return Panel((bars,), "layer, in order", "bits", height=8.0)


@dataclass(frozen=True)
class PlannedNetwork:
    """What a plan was made for: the network's name, where losses are kept, and the command that comes next."""

    name: str
    scores: str
    next: str


def plan_page(found: Planning, about: PlannedNetwork, small_print: str) -> str:
    """The page: what the plan is, the curve, its layers.

    Args:
        found: the plan and its curve.
        about: what it was made for.
        small_print: the versions that made it.
    """
    name = about.name
    points, uniform = curve_rows(found)
    lines = [r.cells for r in sorted([*points, *uniform], key=lambda r: r.cost)]
    sections = [
        Section("next", "Next", paragraph(shell(about.next))),
        Section(
            "curve",
            "Predicted loss of the best plan at each limit",
            curve_figure(found.outline(), found.plan.predicted, "the plan"),
        ),
        Section(
            "plan",
            "The plan",
            [*_bits_of_layers(found), page_table("Every layer", right(LAYER_HEADINGS), layer_rows(found), wide=True)],
        ),
        Section(
            "limits",
            "What other limits give",
            page_table("Points of the curve", right(CURVE_HEADINGS), lines, wide=True),
        ),
    ]
    foot = (
        "Predicted losses add up over layers, each quantized alone; they order plans well and are no forecast of "
        f"accuracy. {source(found, about.scores)} {small_print}"
    )
    return document(f"plan of {name} - bitwright", f"Bits for {name}", "", plan_verdict(found), sections, foot=foot)


def right(headings: tuple[str, ...]) -> list[str]:
    """Headings of columns, those of numbers marked."""
    return [h if h in {"layer", "operator", "which"} else f">{h}" for h in headings]
