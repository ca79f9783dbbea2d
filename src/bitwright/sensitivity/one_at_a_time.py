"""Measures that quantize one tensor, leave everything else in float, and look at what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitwright import together
from bitwright.curvature.label_free import label_free_scores
from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite, segments
from bitwright.graph.axes import read_outputs
from bitwright.graph.points import Point, expose, linear_points
from bitwright.graph.readings import Reading, by_values
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import values_of
from bitwright.measure.classification import class_scores
from bitwright.quant.quantizer import Calibration, Quantizer, as_if
from bitwright.sensitivity.base import Choices, Measure, Table
from bitwright.stages import losses
from bitwright.stages.base import Run, Stage

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured

Values = tuple[list[Tensor], list[Tensor]]
"""A network's outputs, and its values at the points."""
LossJudge = Callable[[Values, Values, Tensor | None], Tensor]
"""``judge(quantized, float, labels)``: the loss of each image, [N], in any place of its own for outputs and points."""


@dataclass(frozen=True)
class MeasuredLoss(Measure):
    """AdaQuant: the loss that quantizing one tensor adds, measured (arXiv:2006.10518, section 3.2).

    Without labels the loss is KL from the float network in nats (for outputs that are no class scores, the squared
    error over their mean square), summed over outputs. With ``labels`` it is cross-entropy less that of the float
    network, which may be negative.
    """

    name: ClassVar[str] = "loss"
    labels: bool = False

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """A forward pass from the quantized tensor on, for each tensor and number of bits.

        Raises:
            UsageError: labels are wanted and there are none.
        """
        if self.labels and images.labels is None:
            raise UsageError("Expected labels to measure cross-entropy with, found none.")
        readings = read_outputs(teacher.graph, images.batch([0], run.device), teacher.outputs)
        judge = _added_cross_entropy if self.labels else _distance_of_outputs(readings)
        return _OneAtATime(teacher, choices, run).table(self.name, images, [], judge)


@dataclass(frozen=True)
class OutputDistance(Measure):
    """EPTQ: how far one quantized tensor moves the network's interest points (methods, section 1.3).

    Interest points are the outputs of convolutions and linear layers. The paper looks at the last one alone.
    """

    name: ClassVar[str] = "distance"
    distance: Literal["operator", "cosine", "kl", "mse"] = "operator"
    """``operator`` is the paper's choice: ``(1 - cos) / 2`` behind a linear layer, mean squared error behind a
    convolution. ``kl`` takes the softmax over the channels. ``mse`` is relative to the float values' mean square where
    several points are averaged, so that they can be."""
    points: Literal["last", "mean", "hessian"] = "last"
    """The last one, the mean over all, or the mean weighted by the label-free Hessian's trace at each."""

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """As :class:`MeasuredLoss`."""
        points = linear_points(teacher.graph, teacher.example.to(run.device))
        points = points[-1:] if self.points == "last" else points
        weights = self._weights(teacher, images, points, run)
        kinds = {n.name: ops.base_name(n) for n in teacher.graph.graph.nodes}
        relative = len(points) > 1

        def judge(ours: Values, theirs: Values, _: Tensor | None) -> Tensor:
            count = len(ours[0][0])
            rows = [
                self._distance(kinds[p.node], a, b, p, count, relative=relative)
                for p, a, b in zip(points, ours[1], theirs[1], strict=True)
            ]
            return torch.stack([r.cpu().expand(count) for r in rows], 1) @ weights

        table = _OneAtATime(teacher, choices, run).table(self.name, images, points, judge)
        table.facts = {"points": {p.layer: w for p, w in zip(points, weights.tolist(), strict=True)}}
        return table

    def _weights(self, teacher: Captured, images: Images, points: list[Point], run: Run) -> Tensor:
        """[L], with sum 1."""
        if self.points != "hessian":
            return torch.full((len(points),), 1 / len(points), dtype=torch.float64)
        batches = run.batches(images, "Scoring points")
        scores = label_free_scores(teacher.graph, batches, points, seed=run.seed, total=len(images))
        trace = scores.layer_trace.double()
        total = float(trace.sum())
        return trace / total if total > 0 else torch.full_like(trace, 1 / len(points))

    def _distance(self, op: str, ours: Tensor, theirs: Tensor, point: Point, count: int, *, relative: bool) -> Tensor:
        """[N]; [1], the mean over all, where images and positions lie along one axis."""
        kind = self.distance
        if kind == "operator":
            kind = "cosine" if op == "linear" else "mse"
        rows = count if point.image_after_image else 1
        a, b = (x.double().reshape(rows, -1, *x.shape[1:]) for x in (ours, theirs))
        channels = point.channels + 1
        if kind == "kl":
            p, q = (x.log_softmax(channels) for x in (b, a))
            return (p.exp() * (p - q)).sum(channels).reshape(len(p), -1).mean(1)
        a, b = a.flatten(1), b.flatten(1)
        if kind == "cosine":
            return ((1 - F.cosine_similarity(a, b, dim=1)) / 2).clamp_min(0)
        error = (a - b).square().mean(1)
        return error / b.square().mean(1).clamp_min(1e-30) if relative else error


def distance_of_outputs(ours: list[Tensor], theirs: list[Tensor], readings: Sequence[Reading] = ()) -> Tensor:
    """Summed over outputs: KL from theirs in nats, or relative squared error where they are no class scores, [N].

    Outputs are read as ``readings`` say, else as their values tell. Of an output that has several rows for each image
    of another's, their mean counts.
    """
    readings = readings or [by_values(b) for b in theirs]
    found = []
    for a, b, how in zip(ours, theirs, readings, strict=True):
        if not a.is_floating_point() or how.kind == "constant":
            continue
        divergence = how.divergence(b, a)
        each = losses.relative_error(a, b) if divergence is None else divergence.reshape(len(a), -1).mean(1)
        found.append(each.double().cpu())
    images = math.gcd(*map(len, found)) or len(ours[0])
    return sum((each.reshape(images, -1).mean(1) for each in found), torch.zeros(images, dtype=torch.float64))


def spread_of_outputs(outputs: list[Tensor], readings: Sequence[Reading]) -> float:
    """Mean :func:`distance_of_outputs` between each image and the next: what there is to tell images apart by.

    Args:
        outputs: of a batch, images first.
        readings: of the outputs, one each.

    Returns:
        Infinity where all are the same, or there is a single image.
    """
    some = [(o, how) for o, how in zip(outputs, readings, strict=True) if o.dim() and len(o) > 1]
    if not some:
        return math.inf
    theirs = [o for o, _ in some]
    return (
        float(distance_of_outputs([o.roll(1, 0) for o in theirs], theirs, [how for _, how in some]).mean()) or math.inf
    )


def _distance_of_outputs(readings: Sequence[Reading]) -> LossJudge:
    def judge(ours: Values, theirs: Values, _: Tensor | None) -> Tensor:
        return distance_of_outputs(ours[0], theirs[0], readings)

    return judge


def _added_cross_entropy(ours: Values, theirs: Values, labels: Tensor | None) -> Tensor:
    assert labels is not None
    a, b = (F.cross_entropy(class_scores(x[0], labels).double(), labels, reduction="none") for x in (ours, theirs))
    return (a - b).cpu()


# ------------------------------------------------------------------------------------------ one at a time


class _OneAtATime:
    """The float network with one quantizer switched on."""

    def __init__(self, teacher: Captured, choices: Choices, run: Run) -> None:
        self.teacher, self.choices, self.run = teacher, choices, run
        first = [some[0] if some else None for some in (choices.weights, choices.activations)]
        self.student = insert_quantizers(teacher, choices.scheme_at(*first))
        self.student.to(run.device)

    @cached_property
    def quantizers(self) -> dict[str, Quantizer]:
        """Those of weights and activations by key, in program order; stored operands have no choice of bits."""
        called = [str(n.target) for n in self.student.graph.graph.nodes if n.op == "call_module"]
        found = {key: self.student.graph.get_submodule(key) for key in called}
        return {k: q for k, q in found.items() if isinstance(q, Quantizer) and q.role != "parameter"}

    def table(self, name: str, images: Images, points: list[Point], judge: LossJudge) -> Table:
        """The mean of what the judge says, for every quantizer and number of bits, and its standard error.

        Processes take them in turn; each sees all images, so that sums are those of one process.
        """
        grids = self._grids(images.unlabelled())
        graph = expose(self.student.graph, [p.node for p in points])
        every = [(key, bits) for key, row in grids.items() for bits in row]
        mine = {item: i for i, item in enumerate(every) if together.is_mine(i)}
        regions = {key: segments.region(graph, [key]) for key, _ in mine}
        kept = {name for r in regions.values() for name in r.frontier}
        sums = {item: torch.zeros(2, dtype=torch.float64) for item in mine}
        done = 0
        for batch in self.run.batches(images, "Quantizing one tensor at a time"):
            labels = None if images.labels is None else images.labels[done : done + len(batch)].to(batch.device)
            known = _values(graph, batch, kept)
            theirs = known.pop(_OUTPUT)
            for (key, bits), total in sums.items():
                ours = self._run(graph, regions[key], known, key, grids[key][bits])
                each = judge(ours, theirs, labels)
                total += torch.stack([each.sum(), each.square().sum()])
            done += len(batch)
        found = together.collected({mine[item]: total for item, total in sums.items()}, len(every))
        return self._as_table(name, dict(zip(every, found, strict=True)), len(images))

    def _as_table(self, name: str, sums: dict[tuple[str, int], Tensor], count: int) -> Table:
        found = Table(name, {}, {}, facts={"error": {"weights": {}, "activations": {}}})
        for (key, bits), total in sums.items():
            quantizer = self.quantizers[key]
            half = "weights" if quantizer.role == "weight" else "activations"
            mean, square = (total / count).tolist()
            error = (max(square - mean**2, 0.0) / max(count - 1, 1)) ** 0.5
            getattr(found, half).setdefault(quantizer.name, {})[bits] = mean
            found.facts["error"][half].setdefault(quantizer.name, {})[str(bits)] = error
        return found

    def _grids(self, images: Images) -> dict[str, dict[int, _State]]:
        """Every quantizer's grid and scales at each of its numbers of bits, as calibrated."""
        found: dict[str, dict[int, _State]] = {key: {} for key in self.quantizers}
        for role, choices in (("weights", self.choices.weights), ("activations", self.choices.activations)):
            for bits in choices:
                made = self.choices.student(self.teacher, images, self.run, **{role: bits})
                for key, quantizer in self.quantizers.items():
                    if (quantizer.role == "weight") == (role == "weights"):
                        found[key][bits] = _State.of(made, key, self.choices.refine)
        return found

    def _run(
        self, graph: fx.GraphModule, region: segments.Region, known: dict[str, Any], key: str, state: _State
    ) -> Values:
        with self._on(graph, key, state), torch.no_grad():
            fixed, moved = segments.values(graph, region.fixed), segments.values(graph, region.moved)
            outputs, points = region.body(*[known[n] for n in region.frontier], *fixed, *moved)
        return list(outputs), list(points)

    @contextmanager
    def _on(self, graph: fx.GraphModule, key: str, state: _State) -> Iterator[None]:
        stored = {path: rewrite.get_tensor(graph, path) for path in state.stored}
        try:
            for path, tensor in state.stored.items():
                rewrite.set_tensor(graph, path, tensor)
            with as_if({self.quantizers[key]: state.calibration}):
                yield
        finally:
            for path, tensor in stored.items():
                rewrite.set_tensor(graph, path, tensor)


@dataclass(frozen=True)
class _State:
    calibration: Calibration
    stored: dict[str, Tensor] = field(default_factory=dict)
    """The weight that is quantized and the biases beside it, where a stage has moved them."""

    @classmethod
    def of(cls, model: Student, key: str, refined: Sequence[Stage]) -> _State:
        quantizer = model.quantizer(key)
        paths = _stored_beside(model.graph, key) if refined and quantizer.role == "weight" else []
        stored = {path: rewrite.get_tensor(model.graph, path) for path in paths}
        return cls(quantizer.calibration, stored)


def _stored_beside(graph: fx.GraphModule, key: str) -> list[str]:
    """Paths of a quantized weight and of the biases of the layers that read it."""
    found: dict[str, None] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target == key:
            for stored in (node.args[0], *(bias for reader in node.users for bias in reader.args[2:3])):
                source = stored.args[0] if isinstance(stored, fx.Node) and stored.op == "call_module" else stored
                if isinstance(source, fx.Node) and source.op == "get_attr":
                    found[str(source.target)] = None
    return list(found)


_OUTPUT = "output"


def _values(graph: fx.GraphModule, images: Tensor, names: set[str]) -> dict[str, Any]:
    """The float network's values at some nodes, and what it returns as ``output``."""
    found, (outputs, points) = values_of(graph, images, names)
    return found | {_OUTPUT: (list(outputs), list(points))}
