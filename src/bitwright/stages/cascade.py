"""Rounds layers one after the other, where bits are few, from what the quantized layers before them give."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.patches import Drawn, layer_inputs, layer_outputs
from bitwright.graph.student import Student, has_quantized_weight, weight_of
from bitwright.graph.units import quantized
from bitwright.graph.walk import Walk, image_bytes, images_in_pass, peak_bytes
from bitwright.quant import optq
from bitwright.quant.quantizer import Quantizer
from bitwright.stages.augment import ViewCount, Views, view_count
from bitwright.stages.base import Run, Stage
from bitwright.stages.calibrate import widen_for_biases
from bitwright.stages.optq import COMPENSATED, DESCENDS

MEMORY = 3 << 30
"""Bytes that the values of both networks may take for all images."""
BETWEEN = 1 << 26
"""Bytes of the values of one batch between two stops."""
FEWEST, PARTS = 8, 8
"""Images that are taken at least, and parts into which they are split: every fourth is held out."""
REACH = 2.0
"""By how much a row's step may grow or shrink."""
ENOUGH, PER_INPUT = 8192, 32
"""Samples that a layer needs: so many, or so many for each of its inputs."""

TOGETHER = 1 << 26
"""Weights that are rounded at once."""
MOST = 8
"""Bits of weights."""
ROUNDS_BACK = 0.49
"""Of a step: how far a stored weight may lie from what it is rounded to."""


class Cascade(Stage):
    """OPTQ from layer to layer, where weights or activations have few bits; other networks are left as they are.

    Each layer's weight moves towards the one that gives, for the inputs of the quantized network, what the float
    network gives for its own (GPTAQ, Qronos); a layer whose output is added to another tensor makes up for the error
    of that one too. How far is chosen on images held out, since the whole way learns few images by heart. Codes follow
    in closed form; then each output channel gets the step and the bias of least squares. The stored weights are what
    was rounded to these codes: a stage to come sees which of them were close.
    """

    kind: ClassVar[str] = "cascade"
    needs_ranges: ClassVar[bool] = True

    bits: int = Field(default=3, ge=2, le=8)
    """Of weights up to which a layer is rounded again."""
    activations: int = Field(default=4, ge=0, le=16)
    """Bits of activations: where one has at most so many, all layers are rounded again, because what was lost before a
    layer reaches it whatever its own bits."""
    images: int = Field(default=512, ge=1)
    """How many images pass at most; fewer where their values would take more than 3 GiB."""
    views: ViewCount = 1
    """Number of views of each image, as in ``reconstruct``; fewer where their values would take more than 3 GiB."""
    positions: int = Field(default=512, ge=1)
    """Output positions drawn from each view of an image at most; fewer are enough for layers of few inputs."""
    damping: float = Field(default=0.1, gt=0)
    """Share of the mean diagonal that is added to the diagonal."""
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, max_length=100
    )
    """Of the way to choose from."""
    sweeps: int = Field(default=3, ge=0)
    """Of coordinate descent over the codes of 2-bit weights."""

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """One pass of both networks, node by node."""
        bits = MOST if self._has_few(student) else self.bits
        layers = [n for n in student.graph.graph.nodes if _takes(student, n, bits)]
        if not layers:
            return student
        twins = {n.name: n for n in teacher.graph.graph.nodes}
        most = max(FEWEST, MEMORY // _bytes_of_image(student, teacher, layers))
        some = images.sample(min(self.images, len(images), most), seed=run.seed)
        samples = Views(some, min(view_count(some, self.views), max(1, most // len(some))), run.seed)
        count = len(samples)
        batches = _Batches(samples, run.device, images_in_pass(student.graph.graph, run.device, count, BETWEEN))
        ours, theirs = Walk(student.graph, batches), Walk(teacher.graph, batches)
        drawn = [
            self._looked_at(node, twins[node.name], ours, theirs, batches, run.seed * 7919 + position)
            for position, node in enumerate(layers)
        ]
        ahead = _Ahead(theirs, drawn, count)
        for position, layer in enumerate(drawn):
            run.progress("Rounding layer after layer", position, len(layers))
            ours.until(layer.node)
            self._round(student, teacher, layer.node, _moments(layer, ours, ahead.wanted(layer), batches.parts))
            for stored in layer.node.args[1:3]:
                ours.refresh(stored)
        run.progress("Rounding layer after layer", len(layers), len(layers))
        widen_for_biases(student)
        return student

    def _has_few(self, student: Student) -> bool:
        """Whether an activation has few bits."""
        found = (m for m in student.graph.children() if isinstance(m, Quantizer) and m.role == "activation")
        return any(m.grid.bits <= self.activations for m in found)

    def _looked_at(self, node: fx.Node, twin: fx.Node, ours: Walk, theirs: Walk, batches: _Batches, seed: int) -> _Seen:
        """A layer, and where it is looked at."""
        weight, beside = theirs.tensor(twin.args[1]), _beside(node, twin)
        if beside is not None and ours.place(beside[0]) > ours.place(node):
            beside = None
        positions = min(self.positions, -(-max(ENOUGH, PER_INPUT * weight[0].numel()) // batches.images))
        return _Seen(node, twin, beside, weight, positions, seed, batches.before)

    def _round(self, student: Student, teacher: Captured, node: fx.Node, parts: Iterator[_Moments]) -> None:
        """Rounds a layer once more, from the moments of each batch."""
        stored, quantizer = weight_of(student, node.name)
        weight = rewrite.get_tensor(teacher.graph, stored)
        seen, held, everything = _split(parts)
        if not everything.is_finite():
            return  # the line that names the layer is for who checks the answers of the whole network
        layer = _Rows.of(weight, quantizer, len(everything.own))
        losses = torch.stack([held.error(values) for values, _, _ in self._solve(layer, seen, self.shares)]).tolist()
        best = self.shares[losses.index(min(losses))]
        values, between, factors = next(self._solve(layer, everything, [best]))
        quantizer.set_range(quantizer.scale * _by_block(factors.flatten().float(), quantizer))
        found = between.float().reshape(weight.shape)
        if weight.dim() == 4:
            found = found.contiguous(memory_format=torch.channels_last)
        rewrite.set_tensor(student.graph, stored, found)
        rewrite.set_tensor(student.graph, _stored(node.args[2]), everything.biases(values).flatten().float())

    def _solve(
        self, layer: _Rows, moments: _Moments, shares: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each share: values on the grid and what was rounded to them, [G, R, K], and factors on the steps, [G, R].

        Both have the steps of least squares already, which are so many times those given.
        """
        own, cross = moments.centred()
        at_once = max(1, TOGETHER // layer.weight.numel())
        for start in range(0, len(shares), at_once):
            some = shares[start : start + at_once]
            targets = optq.towards_float(layer.weight, own, cross, shares=some, damping=self.damping)
            yield from (self._scaled(layer, *each, own, cross) for each in self._rounded(layer, targets, own.float()))

    def _rounded(self, layer: _Rows, targets: list[Tensor], own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is rounded to codes, and the values of these, [G, R, K] each, for each target: rows do not mix."""
        rows = torch.cat(targets, dim=1)
        given = (own, layer.steps.repeat(1, len(targets), 1), layer.nearest)
        real = optq.compensate(rows, *given, damping=self.damping)
        found = layer.nearest(real, given[1])
        if layer.bits <= DESCENDS and self.sweeps:
            found = optq.sweep_codes(rows, found, *given, damping=self.damping, sweeps=self.sweeps)
        return zip(real.chunk(len(targets), 1), found.chunk(len(targets), 1), strict=True)

    @staticmethod
    def _scaled(layer: _Rows, real: Tensor, found: Tensor, own: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors = optq.least_squares_steps(found, own, cross).clamp(1 / REACH, REACH)
        more = factors.unsqueeze(2)
        return found * more, layer.near(real, found) * more, factors


def _bytes_of_image(student: Student, teacher: Captured, layers: list[fx.Node]) -> int:
    """What both networks hold of one image where the stage stops, before a layer of the one and behind its twin."""
    names = {n.name for n in layers}
    twins = {n for n in teacher.graph.graph.nodes if n.name in names}
    own = peak_bytes(student.graph.graph, set(layers), PARTS)
    return max(1, own + peak_bytes(teacher.graph.graph, twins, PARTS, behind=True))


def _takes(student: Student, node: fx.Node, bits: int) -> bool:
    """Whether a layer has at most so many bits, a weight and a bias of its own, and steps for each output channel."""
    if not has_quantized_weight(node) or ops.base_name(node) not in COMPENSATED or "unbiased" in node.meta:
        return False
    _, quantizer = weight_of(student, node.name)
    own = all(isinstance(a, fx.Node) and _readers(a) == 1 for a in node.args[1:3])
    by_row = quantizer.block is not None and quantizer.block[0] == 1 and quantizer.head_axis is None
    return own and by_row and not quantizer.power_of_two and quantizer.grid.bits <= bits


@dataclass(frozen=True)
class _Rows:
    """A weight as rows of groups, [G, R, K], with the step of each element."""

    weight: Tensor
    steps: Tensor
    quantizer: Quantizer

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer, groups: int) -> _Rows:
        split = (groups, weight.shape[0] // groups, -1)
        return cls(
            weight.reshape(split), quantizer.expanded()[0].expand_as(weight).reshape(split).contiguous(), quantizer
        )

    @property
    def bits(self) -> int:
        return self.quantizer.grid.bits

    def nearest(self, column: Tensor, step: Tensor) -> Tensor:
        return self.quantizer.grid.nearest(column, step)

    def near(self, real: Tensor, found: Tensor) -> Tensor:
        """The values nearest to real ones that are still rounded to ``found``, and within the grid."""
        within = real.clamp(self.quantizer.grid.qmin * self.steps, self.quantizer.grid.qmax * self.steps)
        return torch.maximum(torch.minimum(within, found + ROUNDS_BACK * self.steps), found - ROUNDS_BACK * self.steps)


@dataclass
class _Moments:
    """Sums over what a layer reads in the quantized network, x, and what it should give, y, in float64.

    ``own`` of x x^T [G, K, K] and ``cross`` of y x^T [G, R, K]; ``inputs`` of x [G, K] and ``outputs`` of y [G, R].
    """

    count: int
    own: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> _Moments:
        """Of [G, N, K] and [G, N, R] at the same positions."""
        x, y = inputs, outputs
        sums = x.sum(1, dtype=torch.float64), y.sum(1, dtype=torch.float64)
        return cls(x.shape[1], (x.mT @ x).double(), (y.mT @ x).double(), *sums)

    def copy(self) -> _Moments:
        """The same in tensors of its own."""
        return _Moments(self.count, *(each.clone() for each in self._sums()))

    def add(self, more: _Moments) -> None:
        """Takes in those of other samples."""
        self.count += more.count
        for found, each in zip(self._sums(), more._sums(), strict=True):
            found += each

    def is_finite(self) -> bool:
        """Whether every value that was summed is."""
        return bool(torch.stack([torch.isfinite(each).all() for each in self._sums()]).all())

    def _sums(self) -> tuple[Tensor, ...]:
        return self.own, self.cross, self.inputs, self.outputs

    def centred(self) -> tuple[Tensor, Tensor]:
        """Both without the means, which the bias gives back."""
        x, y = self.inputs / self.count, self.outputs / self.count
        own = self.own / self.count - x.unsqueeze(2) * x.unsqueeze(1)
        return own, self.cross / self.count - y.unsqueeze(2) * x.unsqueeze(1)

    def error(self, values: Tensor) -> Tensor:
        """Squared distance of the outputs from the wanted ones, but for a constant: a scalar."""
        own, cross = self.centred()
        found: Tensor = ((values @ own - 2 * cross) * values).sum()
        return found

    def biases(self, values: Tensor) -> Tensor:
        """With which rows have the wanted means, [G, R]."""
        found: Tensor = self.outputs - (values @ self.inputs.unsqueeze(2)).squeeze(2)
        return found / self.count


@dataclass(frozen=True)
class _Seen:
    """A layer, its twin in the float network, what is added to both outputs, and the positions where it is looked at.

    ``before`` says how many images there are before each batch, and before the end.
    """

    node: fx.Node
    twin: fx.Node
    beside: tuple[fx.Node, fx.Node] | None
    weight: Tensor
    positions: int
    seed: int
    before: tuple[int, ...]

    def inputs(self, value: Tensor, batch: int) -> Tensor:
        """[G, N, K] of what it reads."""
        return layer_inputs(self.node, value, self.weight, self._drawn(value, batch))

    def outputs(self, value: Tensor, batch: int) -> Tensor:
        """[G, N, R] of what it gives, or of what is added to that."""
        groups = 1 if ops.base_name(self.node) == "linear" else rewrite.groups(self.node)
        return layer_outputs(self.node, value, groups, self._drawn(value, batch))

    def _drawn(self, value: Tensor, batch: int) -> Drawn:
        """The same positions whenever it is asked for a batch; an image may lie in several rows, such as windows."""
        before, after = self.before[batch : batch + 2]
        return Drawn(self.positions, self.seed, before * len(value) // (after - before))

    @property
    def bytes_of_image(self) -> int:
        """What :meth:`outputs` takes, about."""
        rows = image_bytes(self.twin) // (4 * self.weight.shape[0])
        return 4 * self.weight.shape[0] * min(self.positions, rows)


class _Ahead:
    """What layers should give, drawn while the float network runs ahead of the quantized one.

    It runs through as many layers at a time as make what was drawn, and what it holds for those to come, take the
    least memory.
    """

    def __init__(self, walk: Walk, layers: list[_Seen], count: int) -> None:
        self._walk, self._count, self._waiting = walk, count, layers
        self._found: dict[fx.Node, list[Tensor]] = {}

    def wanted(self, layer: _Seen) -> list[Tensor]:
        """[G, N, R] of each batch: the float network's output, with what is added to it."""
        if layer.node not in self._found:
            self._run(self._next())
        return self._found.pop(layer.node)

    def _next(self) -> list[_Seen]:
        behind = self._walk.bytes_behind([layer.twin for layer in self._waiting])
        drawn = itertools.accumulate(layer.bytes_of_image for layer in self._waiting)
        totals = [a + b for a, b in zip(behind, drawn, strict=True)]
        last = totals.index(min(totals)) + 1
        found, self._waiting = self._waiting[:last], self._waiting[last:]
        return found

    def _run(self, layers: list[_Seen]) -> None:
        seeing: dict[fx.Node, list[_Seen]] = {}
        for layer in layers:
            self._found[layer.node] = []
            for node in (layer.twin, *(layer.beside or ())[1:]):
                if self._walk.knows(node):
                    for batch, value in enumerate(self._walk.values(node)):
                        self._add(layer, batch, value)
                else:
                    seeing.setdefault(node, []).append(layer)

        def see(node: fx.Node, batch: int, value: Tensor) -> None:
            for layer in seeing[node]:
                self._add(layer, batch, value)

        last = max(seeing, key=self._walk.place)
        self._walk.through(last, {node: partial(see, node) for node in seeing})

    def _add(self, layer: _Seen, batch: int, value: Tensor) -> None:
        found, more = self._found[layer.node], layer.outputs(value, batch)
        if batch < len(found):
            found[batch] = found[batch] + more
        else:
            found.append(more)


class _Batches(Sequence[Tensor]):
    """Images [B, C, H, W], each batch made when it is asked for.

    Views of an image lie together, so that parts that are held out show other images than the rest.

    Attributes:
        parts: how many batches each of at most :data:`PARTS` parts has.
        images: how many there are.
        before: how many of them are before each batch, and all of them at the end.
    """

    def __init__(self, samples: Views, device: torch.device, at_once: int) -> None:
        self._samples, self._device = samples, device
        parts = torch.split(torch.tensor(samples.by_image()), -(-len(samples) // PARTS))
        split = [part.tensor_split(-(-len(part) // at_once)) for part in parts]
        self.parts = list(map(len, split))
        self._each = list(itertools.chain.from_iterable(split))
        self.before = tuple(itertools.accumulate(map(len, self._each), initial=0))
        self.images = self.before[-1]

    def __len__(self) -> int:
        return len(self._each)

    def __getitem__(self, position: Any) -> Any:
        return self._samples.batch(self._each[position], self._device)


def _moments(layer: _Seen, ours: Walk, wanted: list[Tensor], parts: Iterable[int]) -> Iterator[_Moments]:
    """What the layer reads in the quantized network, and what it should give, of each part: so many batches."""
    pairs = _pairs(layer, ours, wanted)
    for count in parts:
        inputs, outputs = zip(*itertools.islice(pairs, count), strict=True)
        yield _Moments.of(torch.cat(inputs, 1), torch.cat(outputs, 1))


def _pairs(layer: _Seen, ours: Walk, wanted: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """[G, N, K] of what the layer reads in each batch, and [G, N, R] of what it should give."""
    beside = [None] * len(wanted) if layer.beside is None else ours.values(layer.beside[0])
    for i, (read, given, added) in enumerate(zip(ours.read(layer.node), wanted, beside, strict=True)):
        yield layer.inputs(read, i), given if added is None else given - layer.outputs(added, i)


def _split(parts: Iterator[_Moments]) -> tuple[_Moments, _Moments, _Moments]:
    """Sums over the batches to learn from, over every fourth, which is held out, and over all, as long as there are."""
    first = next(parts)
    seen, everything, held = first.copy(), first, None
    for position, part in enumerate(parts, 1):
        everything.add(part)
        if position % 4 != 3:
            seen.add(part)
        elif held is None:
            held = part
        else:
            held.add(part)
    return seen, everything if held is None else held, everything


def _beside(node: fx.Node, twin: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is added to a layer's output, in the quantized and in the float network, where that is all that reads it."""
    found = []
    for end in (quantized(node), twin):
        users = list(end.users)
        if len(users) != 1 or ops.base_name(users[0]) != "add" or ops.kind(users[0]) != "add" or users[0].kwargs:
            return None
        others = [n for n in users[0].args[:2] if n is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        found.append(others[0])
    same = tuple(ops.shape(found[1])) == tuple(ops.shape(twin))
    return (found[0], found[1]) if same else None


def _readers(node: fx.Node) -> int:
    """How often a stored tensor is read, behind its quantizers or not."""
    if node.op == "call_module":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return sum(len(u.users) if u.op == "call_module" else 1 for u in source.users)
    return len(node.users)


def _stored(node: object) -> str:
    """The path of a bias, behind its quantizer or not."""
    assert isinstance(node, fx.Node)
    source = node.args[0] if node.op == "call_module" else node
    assert isinstance(source, fx.Node)
    return str(source.target)


def _by_block(rows: Tensor, quantizer: Quantizer) -> Tensor:
    """One factor for each scale: those of one row lie together."""
    return rows.repeat_interleave(quantizer.scale.numel() // len(rows))
