"""Rounds layers one after the other, where bits are few, from what the quantized layers before them give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.patches import layer_inputs
from bitwright.graph.student import Student, has_quantized_weight, weight_of
from bitwright.graph.walk import Walk, peak_bytes
from bitwright.quant import optq
from bitwright.quant.quantizer import Quantizer
from bitwright.stages.base import Run, Stage
from bitwright.stages.calibrate import widen_for_biases
from bitwright.stages.optq import COMPENSATED, DESCENDS

MEMORY = 2 << 30
"""Bytes that the values of both networks may take for all images."""
FEWEST, PARTS = 8, 8
"""Images that are taken at least, and batches into which they are split: every fourth is held out."""
REACH = 2.0
"""By how much a row's step may grow or shrink."""

MOST = 8
"""Bits of weights."""
ROUNDS_BACK = 0.49
"""Of a step: how far a stored weight may lie from what it is rounded to."""


class Cascade(Stage):
    """OPTQ from layer to layer, where weights or activations have few bits; other networks are left as they are.

    Each layer's weight moves towards the one that gives, for the inputs of the quantized network, what the float
    network gives for its own (GPTAQ, Qronos). How far is chosen on images held out, since the whole way learns few
    images by heart. Codes follow in closed form; then each output channel gets the step and the bias of least squares.
    The stored weights are what was rounded to these codes: a stage to come sees which of them were close.
    """

    kind: ClassVar[str] = "cascade"

    bits: int = Field(default=3, ge=2, le=8)
    """Of weights up to which a layer is rounded again."""
    activations: int = Field(default=4, ge=0, le=16)
    """Bits of activations: where one has at most so many, all layers are rounded again, because what was lost before a
    layer reaches it whatever its own bits."""
    images: int = Field(default=256, ge=1)
    """How many images pass at most; fewer where their values would take more than 2 GiB."""
    positions: int = Field(default=64, ge=1)
    """Output positions drawn from each image."""
    damping: float = Field(default=0.1, gt=0)
    """Share of the mean diagonal that is added to the diagonal."""
    shares: tuple[float, ...] = Field(default=(0.0, 0.5, 1.0), min_length=1)
    """Of the way to choose from."""
    sweeps: int = Field(default=3, ge=0)
    """Of coordinate descent over the codes of 2-bit weights."""

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """One pass of both networks, node by node."""
        bits = MOST if self._has_few(student) else self.bits
        layers = [n for n in student.graph.graph.nodes if _takes(student, n, bits)]
        if not layers:
            return student
        each = peak_bytes(student.graph.graph) + peak_bytes(teacher.graph.graph)
        count = min(self.images, len(images), max(FEWEST, MEMORY // each))
        some = images.sample(count, seed=run.seed)
        batches = [b.to(run.device) for b in some.batches(-(-count // PARTS))]
        ours, theirs = Walk(student.graph, batches), Walk(teacher.graph, batches)
        twins = {n.name: n for n in teacher.graph.graph.nodes}
        for position, node in enumerate(layers):
            run.progress("Rounding layer after layer", position, len(layers))
            twin = twins[node.name]
            ours.until(node)
            theirs.until(twin)
            self._round(student, teacher, node, ours.read(node), theirs.read(twin), run)
            for stored in node.args[1:3]:
                ours.refresh(stored)
        run.progress("Rounding layer after layer", len(layers), len(layers))
        widen_for_biases(student)
        return student

    def _has_few(self, student: Student) -> bool:
        """Whether an activation has few bits."""
        found = (m for m in student.graph.children() if isinstance(m, Quantizer) and m.role == "activation")
        return any(m.grid.bits <= self.activations for m in found)

    def _round(
        self, student: Student, teacher: Captured, node: fx.Node, ours: list[Tensor], theirs: list[Tensor], run: Run
    ) -> None:
        stored, quantizer = weight_of(student, node.name)
        weight = rewrite.get_tensor(teacher.graph, stored)
        parts = [
            _Moments.of(*(layer_inputs(node, x, weight, self.positions, _draw(run, i)) for x in pair))
            for i, pair in enumerate(zip(ours, theirs, strict=True))
        ]
        seen = [p for i, p in enumerate(parts) if i % 4 != 3] or parts
        held, all_of_them = _Moments.sum(parts[3::4] or parts), _Moments.sum(parts)
        layer = _Rows.of(weight, quantizer, len(held.own))
        best = min(self.shares, key=lambda s: layer.error(*self._solve(layer, _Moments.sum(seen), s)[::2], held))
        values, between, factors = self._solve(layer, all_of_them, best)
        factors = factors.clamp(1 / REACH, REACH)
        quantizer.set_range(quantizer.scale * _by_block(factors.flatten().float(), quantizer))
        found = (between * factors.unsqueeze(2)).float().reshape(weight.shape)
        if weight.dim() == 4:
            found = found.contiguous(memory_format=torch.channels_last)
        rewrite.set_tensor(student.graph, stored, found)
        shift = all_of_them.mean_error(layer.weight, values * factors.unsqueeze(2))
        bias = _stored(node.args[2])
        rewrite.set_tensor(student.graph, bias, rewrite.get_tensor(teacher.graph, bias) + shift.flatten().float())

    def _solve(self, layer: _Rows, moments: _Moments, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Values on the grid, what was rounded to them, both [G, R, K], and factors on their steps, [G, R]."""
        own, cross = moments.centred()
        target = optq.towards_float(layer.weight, own, cross, share=share, damping=self.damping)
        given = (own.float(), layer.steps, layer.nearest)
        real = optq.compensate(target, *given, damping=self.damping)
        found = layer.nearest(real, layer.steps)
        if layer.bits <= DESCENDS and self.sweeps:
            found = optq.sweep_codes(target, found, *given, damping=self.damping, sweeps=self.sweeps)
        factors = optq.least_squares_steps(layer.weight, found, own, cross)
        return found.double(), layer.near(real, found).double(), factors


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

    def error(self, values: Tensor, factors: Tensor, held: _Moments) -> float:
        """Squared distance of the outputs from the float ones, but for a constant."""
        own, cross = held.centred()
        q = values * factors.clamp(1 / REACH, REACH).unsqueeze(2)
        return float((q @ own * q).sum() - 2 * ((self.weight.double() @ cross) * q).sum())


@dataclass(frozen=True)
class _Moments:
    """Sums over the inputs x' of a layer in the quantized network and x in the float one, in float64.

    ``own`` of x' x'^T and ``cross`` of x x'^T, [G, K, K]; ``means`` of x' and of x, [2, G, K].
    """

    count: int
    own: Tensor
    cross: Tensor
    means: Tensor

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> _Moments:
        """Of inputs [G, N, K] at the same positions."""
        a, b = ours.double(), theirs.double()
        return cls(a.shape[1], a.mT @ a, b.mT @ a, torch.stack([a.sum(1), b.sum(1)]))

    @classmethod
    def sum(cls, parts: list[_Moments]) -> _Moments:
        """Of all of them."""
        columns = zip(*((p.own, p.cross, p.means) for p in parts), strict=True)
        return cls(sum(p.count for p in parts), *(torch.stack(c).sum(0) for c in columns))

    def centred(self) -> tuple[Tensor, Tensor]:
        """Both without the means, which the bias gives back."""
        ours, theirs = self.means / self.count
        own = self.own / self.count - ours.unsqueeze(2) * ours.unsqueeze(1)
        return own, self.cross / self.count - theirs.unsqueeze(2) * ours.unsqueeze(1)

    def mean_error(self, weight: Tensor, values: Tensor) -> Tensor:
        """By how much the mean outputs of rows are too small, [G, R]."""
        ours, theirs = self.means.unsqueeze(3) / self.count
        missing: Tensor = weight.double() @ theirs - values @ ours
        return missing.squeeze(2)


def _draw(run: Run, batch: int) -> Callable[[int], Tensor]:
    """Draws the same positions for both networks."""
    return partial(torch.randperm, generator=torch.Generator().manual_seed(run.seed * 7919 + batch))


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
