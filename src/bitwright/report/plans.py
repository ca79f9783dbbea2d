"""Bits that were planned: what was asked for, and the curve that the plan is a point of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitwright import words
from bitwright.measure.shown import named_figures
from bitwright.report.frame import Section, paragraph
from bitwright.report.markup import Child, Markup
from bitwright.report.panels import Panel, Series, single
from bitwright.report.shown import Shown
from bitwright.report.tables import page_table
from bitwright.run.result import Curve, CurvePoint, RunPlan, SameAnswers

if TYPE_CHECKING:
    from bitwright.bits.trials import Estimate


def kept_share(found: SameAnswers | Estimate) -> str:
    """The share of answers, or of a figure, that stays, with its interval; up to the word before "images"."""
    (low, high), share = found.interval, words.percent(found.agreement)
    between = f"{share} (95 %: {100 * low:.1f} to {100 * high:.1f})"
    if found.figure is None:
        return f"same answer as float on {between} of {found.images}"
    return f"{between} of {named_figures(found.figure)} kept, against float's own answers on {found.images}"


def expected_share(found: SameAnswers | Estimate) -> str:
    """What is expected of a plan, as a sentence."""
    how = f"{'+'.join(found.stages)}, {len(found.trials)} plans tried"
    return f"Estimated: {kept_share(found)} held-out images ({how})."


def planned_bits(run: Shown) -> Section | None:
    """The plan of a run that has one; nothing where all layers were given their bits, or a file by itself did."""
    asked, curve = run.result.plan, curve_of(run)
    if asked is None and curve is None:
        return None
    chosen = None if asked is None else asked.predicted
    chosen = chosen or (None if curve is None else curve.chosen)
    body: list[Child] = [paragraph(_lead(asked, chosen)), *([] if asked is None else _estimate(asked))]
    if curve is not None:
        body += [curve_figure(curve, chosen), _table(curve.uniform, chosen, curve.along)]
    note = (
        "Predicted losses add up over layers, each quantized alone: they order plans and are no forecast of accuracy."
    )
    return Section("plan", "Bits for each layer", [*body, paragraph(note, quiet=True)])


def curve_of(run: Shown) -> Curve | None:
    """The curve that the run's own plan came from, or that of the file it was given."""
    found = None if run.result.plan is None else run.result.plan.curve
    found = found or (None if run.facts is None else run.facts.curve)
    return found if found is not None and len(found.points) > 1 else None


def _lead(asked: RunPlan | None, chosen: CurvePoint | None) -> str:
    limits = [
        f"{words.TITLES.get(name, name)} at most {words.cost(name, value)}"
        for name, value in ({} if asked is None else asked.limits or {}).items()
    ]
    if asked is not None and asked.estimate is not None:
        figure = asked.estimate.figure
        lost = "answers changed" if figure is None else f"{named_figures(figure)} lost"
        limits.append(f"at most {words.percent(asked.estimate.drop)} of {lost}")
    said = f"Planned within limits: {words.listed(limits)}. " if limits else ""
    if asked is None:
        said = "The bits are those of a plan file. "
    if chosen is None:
        return f"{said}It was changed by hand, so that its place on the curve is not known."
    measure = asked and asked.measure and asked.measure.measure
    by = f" (measure '{measure}')" if measure else ""
    size = words.size(chosen["weight_bytes"])
    said += f"The plan is predicted to lose {words.number(chosen['loss'])}{by} at {size}"
    packed = asked and asked.packed
    return f"{said}; the file has {words.size(packed.bytes)}." if packed else f"{said}."


def _estimate(asked: RunPlan) -> list[Child]:
    """What was expected of the answers, and what became of them."""
    rows = []
    for said, found in (("estimated on held-out images", asked.estimate), ("measured", asked.measured)):
        if found is not None:
            rows.append([said, words.percent(found.agreement), words.interval(found.interval), f"{found.images:,}"])
    figure = None if asked.estimate is None else asked.estimate.figure
    kept, title = "same answer", "Answers that stay the same"
    if figure is not None:
        kept, title = "kept", f"{named_figures(figure)} kept, where the float network's answers are the truth"
    return [page_table(title, ["", f">{kept}", ">95 % interval", ">images"], rows)] if rows else []


def curve_figure(curve: Curve, chosen: CurvePoint | None, which: str = "this run") -> Markup:
    """Predicted loss over what was limited, with uniform bits beside it.

    Args:
        curve: with at least one point.
        chosen: the point that is marked.
        which: what that is called.
    """
    along, points, uniform = curve.along, curve.points, curve.uniform
    every = [*points, *uniform, *([chosen] if chosen else [])]
    unit, per = words.unit(along, max(p[along] for p in every))

    def series(these: list[CurvePoint], names: list[str], look: str, name: str, **more: Any) -> Series:
        titles = [
            f"{n}: {words.cost(along, p[along])}, predicted loss {words.number(p['loss'])}"
            for n, p in zip(names, these, strict=True)
        ]
        return Series(
            [p[along] / per for p in these], [p["loss"] for p in these], look, name=name, titles=titles, **more
        )

    bits, plans = [f"{p['bits']} bits" for p in uniform], [f"plan {i}" for i in range(1, len(points) + 1)]
    drawn = [
        series(points, plans, "quantized", "best plan at each limit", marks=("line", "dot")),
        series(uniform, [f"{b} everywhere" for b in bits], "large float", "the same bits in all layers", labels=bits),
        *([series([chosen], [which], "large other", which)] if chosen else []),
    ]
    low, high = points[0], points[-1]
    said = (
        f"Best plans from {words.cost(along, low[along])} with a predicted loss of {words.number(low['loss'])} to "
        f"{words.cost(along, high[along])} with {words.number(high['loss'])}."
    )
    if chosen:
        said += f" {which[:1].upper()}{which[1:]}: {words.cost(along, chosen[along])}, {words.number(chosen['loss'])}."
    x_name = f"{words.TITLES.get(along, along)}, {unit}".rstrip(", ")
    return single(
        Panel(tuple(drawn), x_name, "predicted loss", y_log=True, height=15.0, summary=said),
        "What other limits would have given: for each, the plan that is predicted to lose least.",
    )


def _table(uniform: list[CurvePoint], chosen: CurvePoint | None, along: str) -> Markup | None:
    """This plan between networks of equal bits, in the order of what they cost."""
    named = [(p[along], f"{p['bits']} bits in all layers", p) for p in uniform]
    named += [(chosen[along], "this run", chosen)] if chosen else []
    rows = [
        [name, *([] if along == "weight_bytes" else [words.cost(along, p[along])]), words.size(p["weight_bytes"]),
         words.scaled(p["bit_operations"]), words.number(p["loss"])]
        for _, name, p in sorted(named, key=lambda n: n[0])
    ]  # fmt: skip
    heads = [
        "",
        *([] if along == "weight_bytes" else [f">{words.TITLES.get(along, along)}"]),
        ">size",
        ">bit operations",
    ]
    return page_table("Beside the same bits in all layers", [*heads, ">predicted loss"], rows) if rows else None
