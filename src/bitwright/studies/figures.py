"""What figures of studies share: panels of a metric over what was varied, and the names of metrics."""

from __future__ import annotations

from typing import Any

from bitwright.report.panels import Figure, Panel, Series, colour
from bitwright.studies.rows import MeasuredRows, Row

METRIC_AXES = {
    "kl": "KL from float, held-out (nats)",
    "agreement": "same class as float, held-out",
    "top1": "top-1 accuracy",
    "objective": "Hessian-weighted error",
    "infonce": "infoNCE over float, held-out",
    "mse": "relative squared error, held-out",
    "cosine": "cosine distance, held-out",
    "closed": "way to the float fitness",
    "gain": "gain over the start, test images",
}
"""Names of axes."""
HEADS = {
    "kl": "KL (nats)",
    "calibration_kl": "KL on calibration",
    "agreement": "same class",
    "top1": "top-1",
    "infonce": "infoNCE over float",
    "mse": "squared error",
    "closed": "way to float",
    "spearman": "rank correlation",
    "closed_held_out": "way, held-out",
    "gain_half": "± over images",
}
"""Headings of tables."""
LOSS_NAMES = {
    "infonce": "infoNCE",
    "mse": "squared error",
    "cosine": "cosine",
    "kl": "KL",
    "cross-entropy": "cross-entropy",
}
LOGARITHMIC = {"kl", "objective"}
FRACTIONS = {"agreement", "top1", "below_bound", "closed", "closed_held_out", "spread"}
START = "before"
"""The variant that the others are compared with: a dashed line."""

Place = tuple[str, str]
"""A network and its bits."""


def answers_of(result: MeasuredRows) -> str:
    """The measure of right answers that there is: top-1 with labels, agreement without."""
    return "top1" if any(r.get("top1") is not None for r in result.rows) else "agreement"


def bits_of(row: Row) -> str:
    """``W3A8``; ``W3`` with activations in float.

    Example:
        >>> bits_of({"weights": 3, "activations": 8}), bits_of({"weights": 4, "activations": None})
        ('W3A8', 'W4')
    """
    return f"W{row['weights']}" + (f"A{row['activations']}" if row["activations"] else "")


def place_of(row: Row) -> Place:
    """Whose column it is in."""
    return row["network"], bits_of(row)


def over(result: MeasuredRows, x: str, metrics: list[str], x_name: str, *, numeric: bool = False) -> Figure:
    """A column of panels for each network and number of bits, a row for each metric.

    Args:
        result: with rows that hold ``network``, ``weights``, ``variant``, the metrics and perhaps ``x``.
        x: key along the axis.
        metrics: keys along the vertical axes.
        x_name: of the axis.
        numeric: whether x is a number, on a logarithmic axis.
    """
    columns = list(dict.fromkeys(map(place_of, result.rows)))
    rows = [[panel(result, c, m, x, x_name, numeric=numeric) for c in columns] for m in metrics]
    return Figure(rows, [", ".join(c) for c in columns])


def of_answers(result: MeasuredRows, x: str, x_name: str, *, numeric: bool = False) -> Figure:
    """KL and agreement (or accuracy); see :func:`over`."""
    return over(result, x, ["kl", answers_of(result)], x_name, numeric=numeric)


def scale_of(metric: str) -> dict[str, Any]:
    """How a panel shows a metric: logarithms of distances; shares in percent, on axes that end at 0 and 1."""
    if metric == "gain":
        return {"shares": True}
    if metric in FRACTIONS:
        return {"shares": True, "least": 0.0, "most": 1.01}
    return {"y_log": metric in LOGARITHMIC}


def panel(result: MeasuredRows, where: Place, metric: str, x: str, x_name: str, *, numeric: bool = False) -> Panel:
    """One metric of one network: means with their standard deviation, single seeds, a dashed line at the start."""
    summary = [s for s in result.summary if place_of(s) == where and metric in s]
    start = [s for s in summary if s["variant"] == START and (x == "variant" or x not in s)]
    shown = [s for s in summary if s not in start]
    rows = [r for r in result.rows if place_of(r) == where and x in r and r.get(metric) is not None]
    drawn: list[Series] = []
    names = list(dict.fromkeys(s["variant"] for s in shown)) if numeric else [""]
    for position, name in enumerate(names):
        members = [s for s in shown if name in ("", s["variant"])]
        kept = {(s[x], s["variant"]) for s in members}
        seeds = [r for r in rows if (r[x], r["variant"]) in kept]
        drawn += [_means(members, metric, x, name, colour(position), numeric), _seeds(seeds, metric, x, position)]
    level = start[0][metric]["mean"] if start else None
    return Panel(tuple(drawn), x_name, METRIC_AXES[metric], x_log=numeric, level=level, **scale_of(metric))


def _means(members: list[Row], metric: str, x: str, name: str, look: str, numeric: bool) -> Series:
    return Series(
        [s[x] for s in members],
        [s[metric]["mean"] for s in members],
        f"{look} large",
        ("line", "dot") if numeric else ("dot",),
        name,
        ends=deviations([s[metric] for s in members]),
    )


def deviations(found: list[Row]) -> list[tuple[float, float]]:
    """A standard deviation on each side of means."""
    return [(s["mean"] - (s["sd"] or 0.0), s["mean"] + (s["sd"] or 0.0)) for s in found]


def _seeds(rows: list[Row], metric: str, x: str, position: int) -> Series:
    titles = [f"seed {r['seed']}: {r[metric]:.4g}" for r in rows]
    return Series([r[x] for r in rows], [r[metric] for r in rows], f"{colour(position)} faint", titles=titles)


def summary_table(summary: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of a summary; columns without a value anywhere are left out.

    Example:
        >>> summary_table([{"variant": "sla", "kl": {"mean": 0.01234, "sd": 0.001, "count": 3}}])
        (['variant', 'KL (nats)'], [['sla', '0.0123 ± 0.001']])
    """
    keys = list(dict.fromkeys(k for s in summary for k in s if s[k] is not None))
    keys.sort(key=lambda k: any(isinstance(s.get(k), dict) for s in summary))
    return [HEADS.get(k, k.replace("_", " ")) for k in keys], [[_text(k, s.get(k)) for k in keys] for s in summary]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    mean, deviation = value["mean"], value["sd"]
    if key in FRACTIONS or key.startswith("gain") or key.endswith("minima"):
        return f"{100 * mean:.1f} %" + (f" ± {100 * deviation:.1f}" if deviation else "")
    return f"{mean:.3g}" + (f" ± {deviation:.2g}" if deviation else "")
