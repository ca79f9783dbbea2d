"""How far a file's outputs may lie from the simulation's: as far as the simulation lies from itself when codes tip.

Summation in another order tips a few codes over a rounding boundary, and they spread through the layers behind. How far
is a property of the network, so that it is measured: the simulation runs a second time, and a share of every layer's
codes is tipped in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.export.verdict import MOST_DIFFERING, OutputParity
from bitwright.graph.readings import Reading
from bitwright.quant.quantizer import Quantizer

AT_LEAST = 4
"""Codes of a layer that are tipped in the yardstick however few it has."""
TIMES = 2.0
"""How many times as far as its yardstick an output may lie."""
FLOOR = 1e-3
"""Deviation that always passes, in standard deviations of the output."""
SUMMATION = 1e-6
"""Deviation that always passes, in units of the output's size: a float32 sum has no more digits."""
OCTAVES = 3
"""Channels whose spreads lie within this many powers of two are judged together."""
MOST_ANSWERS = 0.01
"""Share of answers that may differ beyond the yardstick's; one always may."""
CHANCE = 2.0
"""Standard deviations by which the yardstick's few may be fewer than they would be in other images."""

Forward = Callable[[Tensor], Sequence[Tensor]]


def output_parities(
    names: Sequence[str],
    readings: Sequence[Reading],
    batches: Iterator[Tensor],
    simulation: Forward,
    shaken: Forward,
    runs: Mapping[str, Forward],
) -> dict[str, list[OutputParity]]:
    """Every output of every run against the simulation.

    Args:
        names: of the outputs.
        readings: what each of them holds.
        batches: of images, [B, C, H, W].
        simulation: gives the outputs that are expected.
        shaken: the same with codes that are tipped, the yardstick.
        runs: what else gives these outputs, by name.
    """
    yardstick = [_Comparison(reading) for reading in readings]
    compared = {name: [_Comparison(reading) for reading in readings] for name in runs}
    for batch in batches:
        expected = list(simulation(batch))
        for found, sums in [(shaken(batch), yardstick), *((run(batch), compared[name]) for name, run in runs.items())]:
            for a, b, each in zip(expected, found, sums, strict=True):
                each.update(a, b)
    return {
        name: [c.judged(n, y) for n, c, y in zip(names, sums, yardstick, strict=True)]
        for name, sums in compared.items()
    }


@contextmanager
def tipped(quantizers: Mapping[str, Quantizer]) -> Iterator[None]:
    """Inside ``with``, :data:`MOST_DIFFERING` of each quantizer's codes come out one step off, near a boundary.

    Of small tensors it is more, so that a few are tipped.

    Args:
        quantizers: of activations by node name.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        assert isinstance(module, Quantizer)
        x: Tensor = inputs[0]
        if not module.calibrated or not x.numel():
            return (x,)
        reach = 2 * min(0.25, max(MOST_DIFFERING, AT_LEAST / x.numel()))
        noise = torch.rand(x.shape[1:], generator=generator).mul_(2 * reach).sub_(reach)  # of one image, for all
        return (torch.addcmul(x, noise.to(x.device), module.expanded()[0]),)

    with ExitStack() as exits:
        for module in {id(q): q for q in quantizers.values()}.values():
            exits.callback(module.register_forward_pre_hook(shake).remove)
        yield


@dataclass
class _Sums:
    """Of the channels along one axis, float64 [C]: values and differences, so that memory does not grow."""

    values: Tensor
    squares: Tensor
    errors: Tensor
    count: int = 0

    def spread(self) -> Tensor:
        """Standard deviations of the expected values; of channels that hardly vary, a hundredth of their size."""
        mean = self.values / self.count
        size = self.squares / self.count
        return (size - mean.square()).clamp_min(0).sqrt().maximum(0.01 * size.sqrt())


@dataclass
class _Comparison:
    """An output against another, batch by batch."""

    reading: Reading
    axes: dict[int, _Sums] = field(default_factory=dict)
    most: float = 0.0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    same: int = 0
    answers: int = 0
    count: int = 0
    alike: bool = True

    def update(self, a: Tensor, b: Tensor) -> None:
        self.alike = self.alike and a.shape == b.shape and a.dtype == b.dtype
        if not self.alike or not a.numel():
            return
        same = self.reading.same(a, b)
        if same is not None:
            self.same, self.answers = self.same + int(same.sum()), self.answers + same.numel()
        a, b = a.double(), b.double()
        error = torch.where(a == b, 0.0, a - b)  # infinities that are equal differ by nothing
        self.most, self.total = max(self.most, float(error.abs().max())), self.total + float(error.abs().sum())
        self.low, self.high = min(self.low, float(a.min())), max(self.high, float(a.max()))
        self.count += a.numel()
        a = torch.where(a.isfinite(), a, 0.0)
        for axis in {2: (1,), 1: (0,), 0: (0,)}.get(a.dim(), (1, a.dim() - 1)):
            rows = a.reshape(1, -1) if a.dim() < 2 else a.movedim(axis, 0).flatten(1)
            errors = error.reshape(1, -1) if a.dim() < 2 else error.movedim(axis, 0).flatten(1)
            found = self.axes.setdefault(axis, _Sums(*torch.zeros(3, len(rows), dtype=torch.float64)))
            found.values += rows.sum(1)
            found.squares += rows.square().sum(1)
            found.errors += errors.square().sum(1)
            found.count += rows.shape[1]

    def judged(self, name: str, yardstick: _Comparison) -> OutputParity:
        agreement, own = (c.same / c.answers if c.answers else None for c in (self, yardstick))
        found = OutputParity(name, self.most, self.total / max(self.count, 1), 0.0, agreement, own)
        if self.count:
            found.range = self.high - self.low
        if not self.alike:
            found.deviation = math.inf
            return found
        ratios = [self._answers(yardstick)]
        if self.reading.kind != "whole":
            ratios += [_ratio(sums, yardstick.axes[axis]) for axis, sums in self.axes.items()]
        found.deviation = max(ratios, key=lambda x: math.inf if math.isnan(x) else x)
        return found

    def _answers(self, yardstick: _Comparison) -> float:
        """Answers that differ, over those that may."""
        if not self.answers:
            return 0.0
        own = yardstick.answers - yardstick.same
        allowed = TIMES * own + CHANCE * math.sqrt(own + 1) + max(1.0, MOST_ANSWERS * self.answers)
        return (self.answers - self.same) / allowed


def _ratio(found: _Sums, yardstick: _Sums) -> float:
    """Deviation over what it may be, of the worst group of channels with like spreads."""
    spread = found.spread()
    size = float((found.squares.sum() / (found.count * len(spread))).sqrt())
    groups = torch.floor(torch.log2(spread.clamp_min(1e-30)) / OCTAVES)
    worst = 0.0
    for group in torch.unique(groups):
        members = groups == group
        deviation, own = ((s.errors[members].mean() / s.count).sqrt() for s in (found, yardstick))
        allowed = FLOOR * spread[members].square().mean().sqrt() + TIMES * own + SUMMATION * size
        ratio = float(deviation / allowed) if float(deviation) else 0.0
        worst = ratio if math.isnan(ratio) else max(worst, ratio)
        if math.isnan(worst):
            break
    return worst
