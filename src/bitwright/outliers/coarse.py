"""What transformers need where activations have few bits: 8 bits for some tensors, channels brought to one size.

Each step is judged by the loss that the tensors which it changes cause alone, all others in float, on calibration
images that gave neither ranges nor steps: beside the other errors of a few bits its gain would be lost in their noise.
What weights of few bits lose by themselves is added, since they change as well. No label is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from bitwright.given.arguments import as_rules
from bitwright.graph import ops, recentre
from bitwright.graph.axes import read_outputs
from bitwright.graph.place import consumers
from bitwright.graph.readings import Reading
from bitwright.graph.recentre import Recentring, Site, recentred
from bitwright.graph.watch import Callback, watch
from bitwright.outliers.balance import has_coarse_weights, let_pass, plain_ranges
from bitwright.quant.quantizer import Quantizer, as_if
from bitwright.quant.scheme import Rule, Scheme, escaped
from bitwright.runtimes.target import CLAMPING
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.calibrate import Calibrate

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured
    from bitwright.graph.student import Student
    from bitwright.recipes import Recipe
    from bitwright.stages.base import Run

InsertScheme = Callable[["Captured", Scheme], "Student"]
"""Puts the quantizers of a scheme into a float network."""

ENOUGH = 8
"""Bits of activations from which on nothing is looked for, and those that some tensors get."""
IMAGES = 32
"""From which ranges are taken, and as many others on which the loss is measured."""
RANGE_IMAGES = 64
"""From which the reach of every channel is read."""
KEPT = 0.9
"""Largest share of that loss that may be left where a step is taken."""
SHARE = 0.1
"""Of what all activations lose: tensors of one kind that lose less by themselves keep their bits."""
SOFTMAX, SUMS = "Softmax outputs", "Sums that only norms and other sums read"
HIDDEN = "Activation functions inside MLPs"
STREAM = frozenset({"norm", "add", "output"})
"""What reads a residual stream."""
WHAT = "Looking at attention"


def ease(
    teacher: Captured, scheme: Scheme, insert: InsertScheme, images: Images, method: Recipe, run: Run
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
        The network with its channels shifted and scaled, the scheme with rules of 8 bits for softmax outputs, for
        sums on a residual stream and for activation functions inside MLPs, and what was changed in the network.
        Warnings say which tensors have 8 bits.
    """
    kinds = _kinds(teacher.graph.graph)
    few = scheme.activations is not None and scheme.activations < ENOUGH
    if not few or not (any(kinds.values()) or recentre.sites(teacher.graph, "norm")):
        return teacher, scheme, []
    trial = _Trial(insert, *_apart(images, run), plain_ranges(method), run)
    trial.look(teacher)
    for title, nodes in kinds.items():
        scheme = _widened(trial, teacher, scheme, title, nodes)
    more = images.sample(min(RANGE_IMAGES, len(images)), seed=run.seed).unlabelled()
    changes: list[Recentring] = []
    for kind in ("attention", "norm"):
        found = recentre.sites(teacher.graph, kind)
        touched = {name for site in found for name in site.touched}
        step = _changes(teacher, found, more, run)
        after = recentred(teacher, step)
        if step and trial.of(after, scheme, touched).betters(trial.of(teacher, scheme, touched)):
            teacher = after
            changes += step
    trial.whole = None  # of what is left
    return teacher, _widened(trial, teacher, scheme, HIDDEN, _hidden(teacher.graph.graph)), changes


def _widened(trial: _Trial, teacher: Captured, scheme: Scheme, title: str, nodes: list[fx.Node]) -> Scheme:
    """With 8 bits for tensors of one kind that lose much of what is lost; a warning says so."""
    wide = _with_wide(scheme, [str(n.meta["layer"]) for n in nodes])
    if wide is None:
        return scheme
    names = {n.name for n in nodes}
    alone = trial.of(teacher, scheme, names).loss
    left = trial.of(teacher, wide, names).loss
    if left >= KEPT * alone or alone < SHARE * trial.everything(teacher, scheme):
        return scheme
    new = [r.pattern for r in wide.rules[: len(wide.rules) - len(scheme.rules)]]
    back = as_rules(f"{p}=a{scheme.activations}" for p in _in_few(new))
    warnings.warn(
        f"{title} get {ENOUGH} bits instead of {scheme.activations} ({len(new)} of them): alone they lose {left:.2g} "
        f"instead of {alone:.2g} on calibration images. To take that back: {back}",
        stacklevel=4,
    )
    return wide


def _in_few(patterns: list[str]) -> list[str]:
    """The same in as few as may be, without their numbers.

    Example:
        >>> _in_few(["softmax", "softmax_1"]), _in_few(["blocks.0.act", "blocks.12.act"])
        (['*softmax*'], ['blocks.*.act'])
    """
    shared = next((word for word in ("softmax", "add") if all(word in p for p in patterns)), None)
    return sorted({re.sub(r"\d+", "*", p) for p in patterns}) if shared is None else [f"*{shared}*"]


def _kinds(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Tensors that may get 8 bits, by what they are: few operations read them, or none that multiplies matrices."""
    softmaxes = [n for n in graph.nodes if ops.kind(n) == "softmax" and "matmul" in map(ops.kind, consumers(n))]
    sums = [n for n in graph.nodes if ops.kind(n) == "add" and {*map(ops.kind, consumers(n))} <= STREAM]
    return {SOFTMAX: softmaxes, SUMS: [n for n in sums if "norm" in map(ops.kind, consumers(n))]}


def _hidden(graph: fx.Graph) -> list[fx.Node]:
    """Activation functions that only linear layers read: the largest values lie far from most others."""
    active = [n for n in graph.nodes if ops.kind(n) == "activation" and ops.base_name(n) not in CLAMPING]
    return [n for n in active if {*map(ops.base_name, consumers(n))} == {"linear"}]


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


def _changes(teacher: Captured, found: list[Site], images: Images, run: Run) -> list[Recentring]:
    """What would bring the channels of the sites to one size, from their least and largest values."""
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
    """Losses of quantized activations with float weights, and the other way round (0 where weights are fine)."""

    loss: float
    weights: float

    def betters(self, other: _Outcome) -> bool:
        """Whether both together are clearly less."""
        return self.loss + self.weights < KEPT * (other.loss + other.weights)


@dataclass
class _Trial:
    """Quantizes float networks for a look at their loss."""

    insert: InsertScheme
    fit: Images
    held: Images
    ranges: Calibrate
    run: Run
    expected: list[list[Tensor]] = field(default_factory=list)
    """The float network's outputs for each batch of the images on which the loss is measured."""
    readings: list[Reading] = field(default_factory=list)
    whole: float | None = None
    made: list[tuple[Captured, Scheme, Student]] = field(default_factory=list)
    """The last two networks that were quantized: each is asked several times."""

    def everything(self, teacher: Captured, scheme: Scheme) -> float:
        """What all activations lose, as it was when it was asked first."""
        if self.whole is None:
            self.whole = self.of(teacher, scheme).loss
        return self.whole

    def look(self, teacher: Captured) -> None:
        """Remembers what the float network answers."""
        self.readings = read_outputs(teacher.graph, self.fit.batch([0], self.run.device), teacher.outputs)
        with torch.no_grad():
            self.expected = [teacher.flat(batch) for batch in self.run.batches(self.held, WHAT)]

    def of(self, teacher: Captured, scheme: Scheme, names: Collection[str] | None = None) -> _Outcome:
        """What a network loses under a scheme, with the activations of the named nodes in few bits, or with all."""
        student = self._student(teacher, scheme)
        with let_pass(student, {"weight"}), as_if(dict.fromkeys(_others(student, names))):
            loss = self._loss(student)
        if names is None or not has_coarse_weights(student):
            return _Outcome(loss, 0.0)
        with let_pass(student, {"activation", "parameter"}):
            return _Outcome(loss, self._loss(student))

    def _student(self, teacher: Captured, scheme: Scheme) -> Student:
        for network, how, student in self.made:
            if network is teacher and how == scheme:
                return student
        student = self.insert(teacher, scheme)
        student.to(self.run.device)
        student = self.ranges.run(student, teacher, self.fit, self.run)
        self.made = [*self.made[-1:], (teacher, scheme, student)]
        return student

    def _loss(self, student: Student) -> float:
        total = 0.0
        with torch.no_grad():
            for batch, expected in zip(self.run.batches(self.held, WHAT), self.expected, strict=True):
                total += float(distance_of_outputs(student.flat(batch), expected, self.readings).sum())
        return total / len(self.held)


def _others(student: Student, names: Collection[str] | None) -> list[Quantizer]:
    """Quantizers of activations and stored operands that do not follow one of these nodes."""
    graph, found = student.graph, []
    for node in graph.graph.nodes:
        quantizer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, Quantizer) and quantizer.role != "weight":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if names is not None and source.name not in names:
                found.append(quantizer)
    return found
