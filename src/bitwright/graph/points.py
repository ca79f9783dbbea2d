"""Interest points: the tensors at which student and teacher are compared, and how their axes are to be read."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite


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
    """Axis along which the images lie; a multiple of them where an image was cut into windows, image after image."""
    channels: int
    """Axis of the operator's output channels."""
    constant: bool = False
    """Whether the tensor is the same for all images, so that no axis holds them (``samples`` means nothing then)."""

    def per_sample(self, squares: Tensor, count: int) -> Tensor:
        """Sum over everything but the images, [N], of a tensor of non-negative values."""
        return self._fold(squares.sum([d for d in range(squares.dim()) if d != self._axis]), count)

    def squared_norm(self, value: Tensor, count: int) -> Tensor:
        """Sum of squares of each image, [N] for ``count`` = N images; in float32."""
        others = [d for d in range(value.dim()) if d != self._axis]
        norm = torch.linalg.vector_norm(value, dim=others, dtype=torch.float32) if others else value.float().abs()
        return self._fold(norm.square(), count)

    def channel_means(self, squares: Tensor, count: int) -> Tensor:
        """Mean over positions for each image and channel, [N, C]."""
        others = [d for d in range(squares.dim()) if d not in {self._axis, self.channels}]
        means = squares.mean(others) if others else squares
        if self.channels < self._axis:
            means = means.transpose(0, 1)
        if self.constant:
            return means.mean(0, keepdim=True).expand(count, -1)
        return means.reshape(count, -1, means.shape[1]).mean(1)

    def positions(self, value: Tensor, count: int) -> int:
        """Elements of one channel of one image."""
        return max(1, value.numel() // (value.shape[self.channels] * (1 if self.constant else count)))

    def spread(self, per_sample: Tensor, value: Tensor) -> Tensor:
        """One number per image, [N], in a shape that broadcasts to the value."""
        if self.constant:
            return per_sample.sum()
        repeats = value.shape[self._axis] // len(per_sample)
        shape = [-1 if d == self._axis else 1 for d in range(value.dim())]
        return per_sample.repeat_interleave(repeats).reshape(shape)

    @property
    def _axis(self) -> int:
        return (0 if self.channels else 1) if self.constant else self.samples

    def _fold(self, sums: Tensor, count: int) -> Tensor:
        if self.constant:
            return sums.sum().expand(count)
        return sums.reshape(count, -1).sum(1)


def linear_points(graph: fx.GraphModule, example: Tensor) -> list[Point]:
    """The outputs of all convolutions and linear layers, in program order.

    Args:
        graph: of the teacher.
        example: images [2, C, H, W].
    """
    nodes = [n for n in graph.graph.nodes if ops.kind(n) == "linear"]
    pairs = _shapes(graph, example, [n.name for n in nodes])
    found = []
    for node in nodes:
        two, three = pairs[node.name]
        axes = [d for d, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
        channels = len(two) - 1 if ops.base_name(node) == "linear" else len(two) - 3 if _unbatched(node, two) else 1
        found.append(
            Point(node.name, str(node.meta["layer"]), axes[0] if axes else 0, channels, constant=len(axes) != 1)
        )
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
