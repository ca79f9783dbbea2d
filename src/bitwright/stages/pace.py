"""How many steps an optimisation takes, and how each is computed: as was asked for, else as is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitwright import together
from bitwright.stages.base import Run

WORTH_IT = 1.3
"""How much faster another precision, or a compiled network, must be to be taken."""
SHORT, SHORT_ON_GPU = 30.0, 5.0
"""Seconds of all steps in float32 below which nothing else is tried: two runs of one seed then take the same way."""
LONG = 600.0
"""Seconds of all steps from which PyTorch's compiler is tried on a GPU: for ResNet-18 it had not ended after 100 s."""
OVERHEAD = 1.15
"""A whole step over its forward and backward pass."""


@dataclass(frozen=True)
class Pace:
    """How many steps are taken, of each unit, and how they are computed."""

    steps: int
    precision: str
    compiled: bool
    step_seconds: dict[str, float]
    """Measured, for one step each way; of all units together."""


def choose_pace(
    steps: int,
    run: Run,
    seconds_of: Callable[[Pace], float],
    *,
    compiles: bool = False,
    beside: Callable[[], float] = lambda: 0.0,
) -> Pace:
    """Number of steps and precision: what was asked for, else the faster way, as it is measured.

    Args:
        steps: if the run asks for no others.
        run: steps, minutes and precision that were asked for.
        seconds_of: measures a step, of all units.
        compiles: whether PyTorch's compiler may be tried.
        beside: seconds that are not for steps.
    """
    steps = steps if run.steps is None else run.steps
    ways = [(p, False) for p in (["float32", "bfloat16"] if run.precision == "auto" else [run.precision])]
    if (len(ways) == 1 and run.minutes is None and not compiles) or steps == 0:
        return Pace(steps, *ways[0], {})
    run.progress("Measuring the speed of a step", 0, 0)
    seconds: dict[tuple[str, bool], float] = {}

    def measure(way: tuple[str, bool]) -> None:
        measured = seconds_of(Pace(1, *way, {}))
        seconds[way] = together.from_first(lambda: round(measured, 5))

    def fastest() -> tuple[str, bool]:
        return min(seconds, key=lambda w: seconds[w] * (1 if w == ways[0] else WORTH_IT))

    def left() -> float:
        if run.minutes is None:
            return seconds[fastest()] * steps
        return run.minutes * 60 - (time.perf_counter() - run.started) - beside()

    for way in ways:
        if not seconds or run.minutes is not None or left() >= _short(run.device):
            measure(way)
    if compiles and together.from_first(left) >= LONG:
        measure((fastest()[0], True))
    if run.minutes is not None:
        steps = together.from_first(lambda: max(1, int(left() / (seconds[fastest()] * OVERHEAD))))
    return Pace(steps, *fastest(), {_name(way): found for way, found in seconds.items()})


def _short(device: torch.device) -> float:
    return SHORT if device.type == "cpu" else SHORT_ON_GPU


def _name(way: tuple[str, bool]) -> str:
    return f"{way[0]}, compiled" if way[1] else way[0]
