"""Interest points: the tensors at which student and teacher are compared, and how their axes are to be read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.watch import Callback, watch


@dataclass(frozen=True)
class Point:
    """The output of one operator.

    Example:
        >>> point = Point("conv2d", "stem.conv", samples=0, channels=1)
        >>> point.per_sample(torch.ones(2, 3, 4, 4), 2), point.positions(torch.ones(2, 3, 4, 4), 2)
        (tensor([48., 48.]), 16)
        >>> point.channel_means(torch.ones(2, 3, 4, 4), 2).shape
        torch.Size([2, 3])
    """

    node: str
    """Name of its node, the same in the teacher and the student."""
    layer: str
    """Path of the layer, as the user knows it."""
    samples: int
    """Axis along which the images lie; a multiple of them where an image was cut into windows, or its positions lie
    along the same axis."""
    channels: int
    """Axis of the operator's output channels."""
    constant: bool = False
    """Whether the tensor is the same for all images, so that no axis holds them (``samples`` means nothing then)."""
    rounds: int = 1
    """How often the row of images recurs along their axis: 1 where they lie image after image, T in [T * N, C]."""

    @property
    def image_after_image(self) -> bool:
        """Whether each image's part is one block of the first axis."""
        return not self.constant and self.samples == 0 and self.rounds == 1

    def per_sample(self, squares: Tensor, count: int) -> Tensor:
        """Sum over everything but the images, [N], of a tensor of non-negative values."""
        return self._fold(squares.sum([d for d in range(squares.dim()) if d != self._axis]), count)

    def squared_norm(self, value: Tensor, count: int) -> Tensor:
        """Sum of squares of each image, [N] for ``count`` = N images; in float32."""
        return self._fold(self._norm(value).square(), count)

    def _norm(self, value: Tensor) -> Tensor:
        """Along the axis of images, in float32."""
        others = [d for d in range(value.dim()) if d != self._axis]
        return torch.linalg.vector_norm(value, dim=others, dtype=torch.float32) if others else value.float().abs()

    def channel_means(self, squares: Tensor, count: int) -> Tensor:
        """Mean over positions for each image and channel, [N, C]."""
        others = [d for d in range(squares.dim()) if d not in {self._axis, self.channels}]
        means = squares.mean(others) if others else squares
        if self.channels < self._axis:
            means = means.transpose(0, 1)
        if self.constant:
            return means.mean(0, keepdim=True).expand(count, -1)
        return means.reshape(self.rounds, count, -1, means.shape[1]).mean((0, 2))

    def positions(self, value: Tensor, count: int) -> int:
        """Elements of one channel of one image, for the point's value of ``count`` images."""
        return max(1, value.numel() // (value.shape[self.channels] * (1 if self.constant else count)))

    def spread(self, per_sample: Tensor, value: Tensor) -> Tensor:
        """One number per image, [N], in a shape that broadcasts to the value."""
        if self.constant:
            return per_sample.sum()
        repeats = value.shape[self._axis] // (len(per_sample) * self.rounds)
        shape = [-1 if d == self._axis else 1 for d in range(value.dim())]
        if repeats > 1:
            per_sample = per_sample.repeat_interleave(repeats)
        if self.rounds > 1:
            per_sample = per_sample.repeat(self.rounds)
        return per_sample.reshape(shape)

    @property
    def _axis(self) -> int:
        return (0 if self.channels else 1) if self.constant else self.samples

    def _fold(self, sums: Tensor, count: int) -> Tensor:
        if self.constant:
            return sums.sum().expand(count)
        if len(sums) == count:
            return sums
        return sums.reshape(self.rounds, count, -1).sum((0, 2))


def squared_norms(points: Sequence[Point], values: Sequence[Tensor], count: int) -> Tensor:
    """:meth:`Point.squared_norm` of a value at each point, [L, N] for ``count`` = N images."""
    norms = [p._norm(v) for p, v in zip(points, values, strict=True)]
    if all(len(norm) == count and not p.constant for p, norm in zip(points, norms, strict=True)):
        return torch.stack(norms).square()
    return torch.stack([p._fold(norm.square(), count) for p, norm in zip(points, norms, strict=True)])


def linear_points(graph: fx.GraphModule, example: Tensor) -> list[Point]:
    """The outputs of all convolutions and linear layers, in program order.

    Args:
        graph: of the teacher.
        example: images [2, C, H, W].
    """
    return points_at(graph, example, [n for n in graph.graph.nodes if ops.kind(n) == "linear"])


def points_at(graph: fx.GraphModule, example: Tensor, nodes: Sequence[fx.Node]) -> list[Point]:
    """The values of nodes of the teacher's graph as points; each carries one tensor.

    Args:
        graph: of the teacher.
        example: images [B, C, H, W]; two and three copies of the first tell the axis of samples.
        nodes: whose values are compared.
    """
    pairs = _shapes(graph, example, [n.name for n in nodes])
    found: list[Point] = []
    for node in nodes:
        two, three = pairs[node.name]
        axes = [d for d, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
        layer, constant = str(node.meta.get("layer", node.name)), len(axes) != 1
        found.append(Point(node.name, layer, axes[0] if axes else 0, _channels(node, two), constant=constant))
    mixed = [p for p in found if not p.constant and pairs[p.node][0][p.samples] > 2]
    rounds = _rounds(graph, example, mixed) if mixed else {}
    return [replace(p, rounds=rounds.get(p.node, 1)) for p in found]


def _channels(node: fx.Node, shape: tuple[int, ...]) -> int:
    """The axis of the channels, which activations and additions leave where a linear operator wrote them."""
    while ops.kind(node) in {"activation", "add"}:
        node = ops.tensor_operands(node)[0]
    if ops.kind(node) != "linear":
        return 1 if len(shape) in {4, 5} else max(len(shape) - 1, 0)
    return len(shape) - 1 if ops.base_name(node) == "linear" else 0 if _unbatched(node, shape) else 1


def _rounds(graph: fx.GraphModule, example: Tensor, points: list[Point]) -> dict[str, int]:
    """``Point.rounds`` by node name, from where values change with the second of two images."""
    changed = example[:1].repeat(2, *[1] * (example.dim() - 1))
    noise = torch.randn(changed[1].shape, generator=torch.Generator().manual_seed(0))
    changed[1] += noise.to(changed) * changed[1].std().clamp_min(0.1)
    values: dict[str, list[Tensor]] = {p.node: [] for p in points}
    callbacks: dict[str, Callback] = {name: lambda n, v: values[n.name].append(v) for name in values}
    for images in (example[:1].expand_as(changed).clone(), changed):
        watch(graph, images, callbacks)
    found = {}
    for point in points:
        before, after = values[point.node]
        others = [d for d in range(before.dim()) if d != point.samples]
        change = (after - before).float().abs().sum(others).cpu()
        each = len(change) // 2
        best = 0.0
        for rounds in (r for r in range(1, each + 1) if each % r == 0):
            first, second = change.reshape(rounds, 2, -1).sum((0, 2)).tolist()
            if second - first > best * (1 + 1e-6):
                best, found[point.node] = second - first, rounds
    return found


def _unbatched(node: fx.Node, shape: tuple[int, ...]) -> bool:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return len(shape) < len(ops.shape(weight))


def _shapes(
    graph: fx.GraphModule, example: Tensor, names: list[str]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shape of each named node for two and for three images."""
    found = []
    for count in (2, 3):
        twin = fx.GraphModule(graph, copy.deepcopy(graph.graph))
        rewrite.propagate(twin, example[:1].expand(count, *example.shape[1:]).clone())
        found.append({n.name: n for n in twin.graph.nodes})
    first, second = found
    return {
        name: tuple(tuple(map(int, ops.shape(nodes[name]))) for nodes in (first, second))  # type: ignore[misc]
        for name in names
    }


def expose(graph: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """The same network, sharing its tensors and modules, that returns ``(outputs, values of the named nodes)``."""
    fresh = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    by_name = {n.name: n for n in fresh.graph.nodes}
    output = next(n for n in fresh.graph.nodes if n.op == "output")
    output.args = ((output.args[0], [by_name[name] for name in names]),)
    fresh.recompile()
    return fresh
