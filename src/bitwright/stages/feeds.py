"""What a unit is fed: what the layers before it give, in float or quantized, and what its exit should be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from bitwright.graph import ops
from bitwright.graph.points import Point, points_at
from bitwright.graph.segments import truncate
from bitwright.graph.units import Cut, Unit, UnitKind, cuts, find_units, float_node, part, quantized
from bitwright.measure.metrics import as_log_probabilities
from bitwright.stages.base import Samples
from bitwright.stages.losses import kl_divergence
from bitwright.stages.targets import Batch, as_channels_last, kept_rows, rows
from bitwright.transfer import sent

SCALED_ON = 64
"""Images whose mean squared gradient becomes 1."""


@dataclass(frozen=True)
class UnitPlace:
    """Where a unit lies in both networks.

    Attributes:
        unit: as the float network's structure has it.
        cut: what it reads and gives in the student's graph.
        floats: what it reads in the float network.
        exits: its exits, as they are compared.
        layers: outputs of its convolutions and linear layers.
        fixed: keys of quantizers of units that are optimised before.
        by_image: whether each image's part of all that it reads and gives is one block of the first axis.
        behind: the rest of the float network.
    """

    unit: Unit
    cut: Cut
    floats: tuple[str, ...]
    exits: list[Point]
    layers: list[Point]
    fixed: frozenset[str]
    by_image: bool
    behind: Cut


def find_places(
    student: fx.GraphModule, teacher: fx.GraphModule, example: Tensor, kind: UnitKind, *, reverse: bool = False
) -> list[UnitPlace]:
    """All units, in the order in which they are optimised.

    Args:
        student: with quantizers; those of activations are left out where activations stay in float.
        teacher: the float network.
        example: images [2, C, H, W].
        kind: how large a unit is.
        reverse: whether the last one comes first.
    """
    units = find_units(teacher, kind)
    inside = {n.name: n for n in student.graph.nodes}
    nodes = {n.name: n for n in teacher.graph.nodes}
    found = cuts(student, [u.exits for u in units])
    floats = [tuple(float_node(inside[name]).name for name in cut.entries) for cut in found]
    names = dict.fromkeys(
        n for unit, each in zip(units, floats, strict=True) for n in (*unit.nodes, *unit.exits, *each)
    )
    point = {p.node: p for p in points_at(teacher, example, [nodes[name] for name in names])}
    outputs = _outputs(teacher)
    places = []
    for position, (unit, cut, each) in enumerate(zip(units, found, floats, strict=True)):
        before = [u.exits for u in units[: position + 1]]
        by_image = all(point[name].image_after_image for name in (*each, *unit.exits))
        exits, layers = [point[n] for n in unit.exits], [point[n] for n in unit.nodes]
        behind = cuts(teacher, [*before, outputs])[-1]
        places.append(UnitPlace(unit, cut, each, exits, layers, frozenset(), by_image, behind))
    return _in_order(places[::-1] if reverse else places, student)


def _in_order(places: list[UnitPlace], student: fx.GraphModule) -> list[UnitPlace]:
    """The same places, each of which leaves the quantizers of those before it as they are."""
    found, fixed = [], frozenset[str]()
    for place in places:
        found.append(replace(place, fixed=fixed))
        fixed |= {str(n.target) for n in part(student, place.cut).graph.nodes if n.op == "call_module"}
    return found


def _outputs(graph: fx.GraphModule) -> tuple[str, ...]:
    """The floating tensors among the network's outputs."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    return tuple(dict.fromkeys(n.name for n in output.all_input_nodes if ops.is_float_tensor(n)))


class UnitFeed:
    """Inputs of a unit and the float network's values at its exits, computed anew for each batch or kept.

    Args:
        samples: images.
        place: the unit.
        student: its graph, with the units before as they are now.
        teacher: the float network's graph.
        float_inputs: share of elements of the inputs that are the float network's, drawn anew in every batch.
        device: where to compute.
        weights: of the elements of the exits; ones if not given.
    """

    def __init__(
        self,
        samples: Samples,
        place: UnitPlace,
        student: fx.GraphModule,
        teacher: fx.GraphModule,
        float_inputs: float,
        device: torch.device,
        weights: Fisher | None = None,
    ) -> None:
        self.samples, self.place, self.share, self.device, self.weights = samples, place, float_inputs, device, weights
        self.before = truncate(student, place.cut.entries)
        self.teacher = truncate(teacher, [*(place.floats if float_inputs else ()), *place.unit.exits])
        self.kept: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, indices: Tensor, *, mixed: bool = True) -> Batch:
        """Inputs and targets; without ``mixed`` from the quantized layers alone, where not all are in float."""
        if self.kept is None:
            columns = self._compute(self._images(indices))
        else:
            chosen = sent(indices, self.device)
            columns = [rows(k, chosen).float() for k in self.kept]
        count, exits = len(self.place.floats), len(self.place.exits)
        inputs = columns[:count]
        if 0 < self.share < 1:
            floats, columns = columns[count : 2 * count], columns[count:]
            if mixed:
                pairs = zip(inputs, floats, strict=True)
                inputs = [torch.where(torch.rand_like(q) < self.share, f, q) for q, f in pairs]
        targets, roots = columns[count : count + exits], columns[count + exits :]
        sizes = [self._empty(indices) for _ in self.place.cut.sizes]
        return Batch([*inputs, *sizes], targets, roots or None)

    def keep(self, budget: int, uses: int, at_once: int) -> bool:
        """Computes everything for all samples, if it fits and is worth it, and says whether that is so.

        Args:
            budget: bytes; in bfloat16 where float32 does not fit.
            uses: how many samples are taken in all.
            at_once: samples in one pass.
        """
        if self.kept is not None or not self.place.by_image or uses < len(self):
            return self.kept is not None
        size = sum(c.nbytes for c in self._compute(self._images(torch.arange(1)))) * len(self)
        if size > 2 * budget:
            return False
        dtype = torch.float32 if size <= budget else torch.bfloat16
        self.kept = kept_rows(len(self), at_once, lambda part: self._compute(self._images(torch.tensor(part))), dtype)
        return True

    def _compute(self, images: Tensor) -> list[Tensor]:
        """Inputs, those in float too where they are mixed, targets, and roots of the weights."""
        with torch.no_grad():
            inputs = [] if self.share >= 1 else list(self.before(images))
            values = list(self.teacher(images))
        if self.weights is None:
            return [*inputs, *values]
        roots = self.weights.roots(images)
        at = len(values) - len(roots)
        return [*inputs, *values[:at], *(v * r for v, r in zip(values[at:], roots, strict=True)), *roots]

    def _images(self, indices: Tensor) -> Tensor:
        return as_channels_last(self.samples.batch(indices, self.device))

    def _empty(self, indices: Tensor) -> Tensor:
        """In the place of images of which only the size is read."""
        shape = self.samples.batch([0]).shape[1:]
        return torch.zeros((), device=self.device).expand(len(indices), *shape)


class Fisher:
    """The squared gradient of the network's loss at a unit's exits, element by element (arXiv:2102.05426, equation 10).

    The loss is ``KL(float network || student)`` (squared error, where the outputs are no class scores), with the
    student quantized up to the exits and in float behind them: no label is read. It is zero where nothing is quantized.

    Args:
        place: the unit.
        student: its graph as it is now.
        teacher: the float network's.
        images: whose mean becomes 1, [N, C, H, W].
        signed: whether :meth:`roots` have the signs of the gradient, which squares lose and sums do not.
    """

    def __init__(
        self,
        place: UnitPlace,
        student: fx.GraphModule,
        teacher: fx.GraphModule,
        images: Tensor,
        *,
        signed: bool = False,
    ) -> None:
        nodes = {n.name: n for n in student.graph.nodes}
        self.place, self.teacher, self.signed = place, teacher, signed
        self.names = tuple(dict.fromkeys([*place.behind.entries, *place.unit.exits]))
        self.before = truncate(student, [quantized(nodes[name]).name for name in self.names])
        self.behind = part(teacher, place.behind)
        self.outputs = _outputs(teacher)
        self.expected = truncate(teacher, self.outputs)
        found = self.squares(images)
        self.scale = sum(float(f.double().sum()) for f in found) / max(sum(f.numel() for f in found), 1)

    def squares(self, images: Tensor) -> list[Tensor]:
        """At each exit, in its shape."""
        return [slope.square() for slope in self.slopes(images)]

    def slopes(self, images: Tensor) -> list[Tensor]:
        """The gradient itself, at each exit, for images [B, C, H, W]."""
        with torch.no_grad():
            values = dict(zip(self.names, self.before(images), strict=True))
            expected = self.expected(images)
        exits = [values[name].requires_grad_() for name in self.place.unit.exits]
        with torch.enable_grad():
            inputs = [*(values[name] for name in self.place.behind.entries), *[images] * len(self.place.behind.sizes)]
            outputs = self.behind(*inputs)[1]
            if all(map(torch.equal, outputs, expected)):
                return [torch.zeros_like(e) for e in exits]  # instead of what is left by rounding
            loss = torch.stack([_loss(a, b) for a, b in zip(outputs, expected, strict=True)]).sum()
            return list(torch.autograd.grad(loss, exits, allow_unused=True, materialize_grads=True))

    def roots(self, images: Tensor) -> list[Tensor]:
        """What differences at the exits are multiplied by."""
        slopes = self.slopes(images)
        roots = [(s.square() / self.scale).sqrt() for s in slopes]
        return [r.copysign(s) for r, s in zip(roots, slopes, strict=True)] if self.signed else roots


def _loss(output: Tensor, expected: Tensor) -> Tensor:
    """Summed over images, a scalar."""
    if as_log_probabilities(expected) is None or as_log_probabilities(output) is None:
        return (output - expected).square().sum()
    return kl_divergence(output, expected).sum()
