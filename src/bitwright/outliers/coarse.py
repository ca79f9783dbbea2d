"""What attention needs where activations have few bits: 8 bits for softmax outputs, channels brought to one size.

Each step is taken where the loss of the network with quantized activations falls on calibration images that gave
neither ranges nor steps. Weights are left in float meanwhile, since the recipe may round them far better than a trial
could; that they lose no more is looked at by itself. No label is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from bitwright.given.arguments import as_rules
from bitwright.graph import ops, recentre
from bitwright.graph.axes import read_outputs
from bitwright.graph.place import consumers
from bitwright.graph.readings import Reading
from bitwright.graph.recentre import Recentring, recentred
from bitwright.graph.watch import Callback, watch
from bitwright.outliers.balance import COARSE, NOT_WORSE, in_float, plain_ranges
from bitwright.quant.scheme import Rule, Scheme, escaped
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.calibrate import Calibrate

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured
    from bitwright.graph.student import Student
    from bitwright.recipes import Recipe
    from bitwright.stages.base import Run

Insert = Callable[["Captured", Scheme], "Student"]
"""Puts the quantizers of a scheme into a float network."""

ENOUGH = 8
"""Bits of activations from which on nothing is looked for, and those that softmax outputs get."""
IMAGES = 16
"""From which ranges are taken, and as many others on which the loss is measured."""
RANGE_IMAGES = 64
"""From which the reach of every channel is read."""
KEPT = 0.95
"""Largest share of the loss that may be left where a step is taken."""
WHAT = "Looking at attention"


def ease(
    teacher: Captured, scheme: Scheme, insert: Insert, images: Images, method: Recipe, run: Run
) -> tuple[Captured, Scheme, list[Recentring]]:
    """The network and the scheme with which activations of few bits lose less; both themselves where none do.

    Args:
        teacher: prepared, on the run's device; not changed.
        scheme: whose rules come after new ones.
        insert: puts a scheme's quantizers into a network.
        images: without labels.
        method: the recipe, whose ranges are taken.
        run: seed, progress.

    Returns:
        The network with its channels shifted and scaled, the scheme with rules of 8 bits for softmax outputs, and what
        was changed in the network. A warning says which outputs have 8 bits.
    """
    softmaxes = [n for n in teacher.graph.graph.nodes if _is_attention(n)]
    few = scheme.activations is not None and scheme.activations < ENOUGH
    if not few or not (softmaxes or recentre.sites(teacher.graph, "norm")):
        return teacher, scheme, []
    trial = _Trial(insert, *_apart(images, run), plain_ranges(method), run)
    trial.look(teacher)
    now = trial.of(teacher, scheme)
    wide = _with_wide(scheme, [str(n.meta["layer"]) for n in softmaxes])
    if wide is not None and (found := trial.of(teacher, wide)).betters(now):
        _say(scheme, wide, now.loss, found.loss)
        scheme, now = wide, found
    more = images.sample(min(RANGE_IMAGES, len(images)), seed=run.seed).unlabelled()
    changes: list[Recentring] = []
    for kind in ("attention", "norm"):
        step = _changes(now.teacher, kind, more, run)
        if step and (found := trial.of(recentred(now.teacher, step), scheme)).betters(now):
            now = found
            changes += step
    return now.teacher, scheme, changes


def _say(before: Scheme, after: Scheme, loss: float, left: float) -> None:
    names = [r.pattern for r in after.rules[: len(after.rules) - len(before.rules)]]
    patterns = ["*softmax*"] if all("softmax" in n for n in names) else names
    warnings.warn(
        f"Softmax outputs get {ENOUGH} bits instead of {before.activations} ({len(names)} of them): the loss of "
        f"quantized activations falls from {loss:.2g} to {left:.2g} on calibration images. To take that back: "
        f"{as_rules(f'{p}=a{before.activations}' for p in patterns)}",
        stacklevel=4,
    )


def _is_attention(node: fx.Node) -> bool:
    return ops.kind(node) == "softmax" and any(ops.kind(reader) == "matmul" for reader in consumers(node))


def _with_wide(scheme: Scheme, names: list[str]) -> Scheme | None:
    """With 8 bits for layers that no rule names; None where that is not to be tried."""
    left = [n for n in names if not scheme.rules_activations([n])]
    if not left or scheme.plan or ENOUGH not in scheme.target.activation_bits:
        return None
    new = tuple(Rule(pattern=escaped(n), activations=ENOUGH) for n in left)
    return scheme.model_copy(update={"rules": (*new, *scheme.rules)})


def _apart(images: Images, run: Run) -> tuple[Images, Images]:
    """Images for ranges and others for the loss; the same ones where there are few."""
    some = images.sample(min(2 * IMAGES, len(images)), seed=run.seed).unlabelled()
    return (some[0::2], some[1::2]) if len(some) > 1 else (some, some)


def _changes(teacher: Captured, kind: str, images: Images, run: Run) -> list[Recentring]:
    """What would bring the channels of all sites to one size, from their least and largest values."""
    found = recentre.sites(teacher.graph, kind)
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        low, high = (x.cpu() for x in value.flatten(0, -2).aminmax(dim=0))
        before = extremes.get(node.name, (low, high))
        extremes[node.name] = torch.minimum(before[0], low), torch.maximum(before[1], high)

    callbacks: dict[str, Callback] = {name: see for site in found for name in site.nodes}
    for batch in run.batches(images, WHAT) if found else ():
        watch(teacher.graph, batch, callbacks)
    return [site.chosen(*(torch.cat([extremes[n][end] for n in site.nodes]) for end in (0, 1))) for site in found]


@dataclass(frozen=True)
class _Outcome:
    """Losses with quantized activations and float weights, and the other way round (0 where weights are fine)."""

    teacher: Captured
    loss: float
    weights: float

    def betters(self, other: _Outcome) -> bool:
        """Whether activations lose clearly less, and weights hardly more."""
        return self.loss <= KEPT * other.loss and self.weights <= NOT_WORSE * other.weights


@dataclass
class _Trial:
    """Quantizes float networks for a look at their loss."""

    insert: Insert
    fit: Images
    held: Images
    ranges: Calibrate
    run: Run
    expected: list[list[Tensor]] = field(default_factory=list)
    """The float network's outputs for each batch of the images on which the loss is measured."""
    readings: list[Reading] = field(default_factory=list)

    def look(self, teacher: Captured) -> None:
        """Remembers what the float network answers."""
        self.readings = read_outputs(teacher.graph, self.fit.batch([0]).to(self.run.device), teacher.outputs)
        with torch.no_grad():
            self.expected = [list(teacher.graph(batch)) for batch in self.run.batches(self.held, WHAT)]

    def of(self, teacher: Captured, scheme: Scheme) -> _Outcome:
        """All that belongs to a network and a scheme."""
        student = self.insert(teacher, scheme)
        student.to(self.run.device)
        student = self.ranges.run(student, teacher, self.fit, self.run)
        with in_float(student, {"weight"}):
            loss = self._loss(student)
        if not any(x.weight is not None and student.quantizer(x.weight).grid.bits < COARSE for x in student.layers):
            return _Outcome(teacher, loss, 0.0)
        with in_float(student, {"activation", "parameter"}):
            return _Outcome(teacher, loss, self._loss(student))

    def _loss(self, student: Student) -> float:
        total = 0.0
        with torch.no_grad():
            for batch, expected in zip(self.run.batches(self.held, WHAT), self.expected, strict=True):
                total += float(distance_of_outputs(student.flat(batch), expected, self.readings).sum())
        return total / len(self.held)
