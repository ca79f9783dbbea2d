"""What commands share that plan bits: where losses are kept, and what a result says of its plan."""

from __future__ import annotations

import os
from pathlib import Path

from bitwright import words
from bitwright.report.plans import expected_share, kept_share
from bitwright.run.result import RunPlan


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
    if plan.estimate is not None:
        said.append(expected_share(plan.estimate))
    if plan.measured is not None:
        said[-1] += f" Measured: {kept_share(plan.measured)} images."
    return said
