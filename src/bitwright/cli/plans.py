"""What commands share that plan bits: where losses are kept, and what a result says of its plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitwright import words
from bitwright.bits.plan import Plan
from bitwright.errors import BitwrightError
from bitwright.given.text import read_json
from bitwright.measure.metrics import wilson_interval
from bitwright.terminal import Terminal

SIZE_TOLERANCE = 0.02
"""Largest relative difference of the file's size from the plan's that is not worth a warning."""
CURVE = "pareto.json"
KEPT = frozenset({"bits", "loss", "weight_bytes", "activation_bytes", "total_bytes", "bit_operations", "latency"})
"""Entries of a point of the curve that a run keeps."""


def scores(cache: Path | None) -> Path:
    """Where measured losses are kept: ``BITWRIGHT_CACHE`` if nothing is said, or where the system keeps such things."""
    named = os.environ.get("BITWRIGHT_CACHE")
    default = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bitwright"
    return cache or default


def curve_beside(file: Path | None) -> dict[str, Any] | None:
    """The curve in ``pareto.json`` beside a plan, without the bits of layers; None where there is none of this plan.

    Args:
        file: the plan, or its folder. ``chosen`` is None if its bits are no longer those that were planned.
    """
    if file is None:
        return None
    folder = file if file.is_dir() else file.parent
    try:
        found, plan = read_json(folder / CURVE), Plan.read(file)
        chosen = found["chosen"]
        if plan.predicted is None or plan.predicted["loss"] != chosen["loss"]:
            return None
        bare = {k: [{n: v for n, v in p.items() if n in KEPT} for p in found[k]] for k in ("points", "uniform")}
        return {"along": found["along"], **bare, "chosen": plan.predicted if _unchanged(plan, chosen) else None}
    except (OSError, BitwrightError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _unchanged(plan: Plan, chosen: dict[str, Any]) -> bool:
    layers = plan.layers
    weights = all((w := layers[n].weight) and w.bits == b for n, b in chosen["weights"].items())
    return weights and all((a := layers[n].activation) and a.bits == b for n, b in chosen["activations"].items())


def record_outcome(result: dict[str, Any], terminal: Terminal) -> None:
    """Writes what became of the plan into the result: the file's bytes and the agreement, beside those expected."""
    plan, packed = result["plan"], result["size"]["packed_bytes"]
    expected, limit = plan["predicted"]["weight_bytes"], plan["limits"].get("weight_bytes")
    plan["packed"] = {"bytes": packed, "difference": packed / expected - 1}
    if abs(packed / expected - 1) > SIZE_TOLERANCE:
        _warn(terminal, f"model.safetensors has {packed:,} bytes, {expected:,.0f} were planned.")
    if limit is not None and packed > limit:
        _warn(terminal, f"model.safetensors has {packed:,} bytes, {packed - limit:,.0f} more than wanted.")
    agreement = result["fidelity"]["agreement"]
    if "estimate" not in plan or agreement is None:
        return
    evaluated = result["data"]["evaluation"]
    low, high = wilson_interval(round(agreement * evaluated["count"]), evaluated["count"])
    plan["measured"] = {
        "agreement": agreement,
        "interval": [low, high],
        "images": evaluated["count"],
        "same_as_calibration": evaluated["same_as_calibration"],
    }
    if high < 1 - plan["estimate"]["drop"]:
        _warn(
            terminal,
            f"The network agrees with the float one on {words.percent(agreement)} of the images measured on, less than "
            f"the {words.percent(1 - plan['estimate']['drop'])} that were wanted. Ask for a smaller --max-drop.",
        )


def _warn(terminal: Terminal, text: str) -> None:
    terminal.warnings.append(text)
    terminal.log("warning", text=text)
    terminal.say(f"warning: {text}")


def sentences(result: dict[str, Any]) -> list[str]:
    """What was planned, and what became of it; nothing of a result without a plan."""
    plan = result.get("plan")
    if plan is None:
        return []
    predicted, packed = plan["predicted"], plan.get("packed")
    became = (
        ""
        if packed is None
        else f"; the file has {words.size(packed['bytes'])} ({words.percent(packed['difference'])})"
    )
    said = [
        f"Planned: {words.size(predicted['weight_bytes'])}, "
        f"{words.amount(predicted['bit_operations'], 'bit operations')}, "
        f"predicted loss {predicted['loss']:.3g} ('{plan['measure']['measure']}'){became}."
    ]
    if (estimate := plan.get("estimate")) is not None:
        said.append(
            f"Estimated: {_share(estimate)} held-out images ({'+'.join(estimate['stages'])}, "
            f"{len(estimate['trials'])} plans tried)."
        )
    if (measured := plan.get("measured")) is not None:
        said[-1] += f" Measured: {_share(measured)} images."
    return said


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return (
        f"same answer as float on {words.percent(found['agreement'])} (95 %: {100 * low:.1f} to {100 * high:.1f}) of "
        f"{found['images']}"
    )
