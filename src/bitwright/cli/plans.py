"""What commands share that plan bits: where losses are kept, and what a result says of its plan."""

from __future__ import annotations

import os
from pathlib import Path

from bitwright import words
from bitwright.measure.shown import named_figures
from bitwright.run.result import RunPlan, SameAnswers


def scores(cache: Path | None) -> Path:
    """Where measured losses are kept: ``BITWRIGHT_CACHE`` if nothing is said, or where the system keeps such things."""
    named = os.environ.get("BITWRIGHT_CACHE")
    default = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bitwright"
    return cache or default


def sentences(plan: RunPlan | None) -> list[str]:
    """What was planned, and what became of it; nothing without a plan."""
    if plan is None or plan.predicted is None:
        return []
    predicted, packed, measure = plan.predicted, plan.packed, plan.measure and plan.measure.measure
    became = "" if packed is None else f"; the file has {words.size(packed.bytes)} ({words.percent(packed.difference)})"
    said = [
        f"Planned: {words.size(predicted['weight_bytes'])}, "
        f"{words.amount(predicted['bit_operations'], 'bit operations')}, "
        f"predicted loss {predicted['loss']:.3g} ('{measure}'){became}."
    ]
    if (estimate := plan.estimate) is not None:
        said.append(
            f"Estimated: {_share(estimate)} held-out images ({'+'.join(estimate.stages)}, "
            f"{len(estimate.trials)} plans tried)."
        )
    if plan.measured is not None:
        said[-1] += f" Measured: {_share(plan.measured)} images."
    return said


def _share(found: SameAnswers) -> str:
    (low, high), share = found.interval, words.percent(found.agreement)
    between = f"{share} (95 %: {100 * low:.1f} to {100 * high:.1f})"
    if found.figure is None:
        return f"same answer as float on {between} of {found.images}"
    return f"{between} of {named_figures(found.figure)} kept, against float's own answers on {found.images}"
