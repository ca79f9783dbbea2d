"""Finds which channels of a projection belong to one head of attention, by following them to products of matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.blocks import PRODUCT, find_blocks

NOTHING = 0.0
"""Where a tensor holds neither a projection's channel (numbered from 1) nor part of a product (from -1 down)."""


@dataclass(frozen=True)
class Heads:
    """How the heads of attention cut a projection's weight [O, I, ...].

    Example: queries, keys and values of four heads from one weight [288, 96] are ``Heads(0, 24)``; the projection
    [96, 96] of what the heads yield is ``Heads(1, 24)``.
    """

    axis: int
    """0: output channels lie in heads, 1: input channels."""
    size: int
    """Neighbouring channels of one head."""

    def block(self, shape: tuple[int, ...], most: int | None = None) -> tuple[int, ...]:
        """Extent of one scale along each axis: a head, or equal parts of it of at most ``most`` channels.

        Example:
            >>> Heads(0, 24).block((288, 96)), Heads(0, 24).block((288, 96), 10), Heads(1, 24).block((96, 96))
            ((24, 96), (8, 96), (96, 24))
        """
        size = next(n for n in range(min(most or self.size, self.size), 0, -1) if self.size % n == 0)
        return tuple(size if axis == self.axis else extent for axis, extent in enumerate(shape))


def find_heads(graph: fx.GraphModule) -> dict[str, Heads]:
    """The linear operators that make or read the heads of attention, by node name.

    A product of matrices is computed head by head: channels that enter the same of its slices are of one head, and so
    are channels that come out of the same one. Projections whose heads are not neighbouring channels are left out, as
    are grouped convolutions, and projections that another layer follows before the product.

    Args:
        graph: a prepared network without quantizers, with its shapes recorded.

    Returns:
        For every such operator, its axis and extent; heads of different widths in one weight are cut to their largest
        common part.
    """
    at = {n.name: i for i, n in enumerate(graph.graph.nodes)}
    nodes = list(graph.graph.nodes)
    found: dict[str, Heads] = {}
    for block in find_blocks(graph):
        if block.kind == "attention":
            first, last = at[block.nodes[0]], at[block.nodes[-1]]
            behind = (i for i in range(last + 1, len(nodes)) if ops.kind(nodes[i]) == "linear")
            members = [nodes[at[name]] for name in block.nodes]
            found |= _Attention(graph, members).heads(nodes[first : next(behind, len(nodes))])
    return found


class _UnknownError(Exception):
    """An operator reads a tensor that is not known before the network runs."""


class _Attention:
    """The channels of one block's projections, numbered, on their way to the products and from there."""

    def __init__(self, graph: fx.GraphModule, members: list[fx.Node]) -> None:
        self.graph = graph
        self.first: dict[fx.Node, int] = {}
        """Number of each projection's first channel."""
        count = 1
        for node in filter(_can_be_cut, members):
            self.first[node] = count
            count += rewrite.out_channels(node)
        self.low, self.high = torch.full((count,), math.inf), torch.full((count,), -math.inf)
        """The least number among the channels that enter a product with each one; equal where all slices agree."""
        self.slices = 0
        self.found: dict[str, Heads] = {}
        self.values: dict[fx.Node, Any] = {}
        """In place of a tensor's elements, the numbers of the channels or slices that they come from."""

    def heads(self, nodes: list[fx.Node]) -> dict[str, Heads]:
        """Follows the channels through the nodes, in program order."""
        for node in nodes:
            value = self._follow(node) if ops.is_float_tensor(node) else None
            if value is not None:
                self.values[node] = value
        for node, first in self.first.items():
            last = first + rewrite.out_channels(node)
            low, high = self.low[first:last], self.high[first:last]
            if bool((low == high).all()):
                self._note(node, 0, low.unsqueeze(0))
        return self.found

    def _follow(self, node: fx.Node) -> Any:
        """What a node's value is made of; None where that is lost."""
        if node in self.first:
            return self._project(node)
        if ops.base_name(node) in PRODUCT:
            return self._multiply(node)
        if ops.kind(node) in {"move", "concat"} and "moves" not in node.meta:
            return self._move(node)
        return self._keep(node)

    def _project(self, node: fx.Node) -> Tensor:
        source = self.values.get(_operand(node, 0))
        if source is not None and bool((source < NOTHING).all()):
            channels = source.movedim(_channel_axis(node, source.dim()), -1)
            self._note(node, 1, channels.reshape(-1, channels.shape[-1]))
        shape, count = _shape(node), rewrite.out_channels(node)
        tail = len(shape) - 1 - _channel_axis(node, len(shape))
        numbers = torch.arange(count, dtype=torch.float32) + self.first[node]
        return numbers.reshape(-1, *[1] * tail).expand(shape)

    def _note(self, node: fx.Node, axis: int, rows: Tensor) -> None:
        """Takes runs of equal numbers for heads; every row must have them in the same places."""
        if node.name in self.found and axis:
            return
        width = rows.shape[1]
        starts = (rows[:, 1:] != rows[:, :-1]).any(0).nonzero().flatten() + 1
        size = math.gcd(width, *starts.tolist())
        if size > 1:
            self.found[node.name] = Heads(axis, size)

    def _multiply(self, node: fx.Node) -> Tensor | None:
        """Notes which channels meet in a product, and numbers its slices."""
        axes = _batch_axes(node)
        if axes is None:
            return None
        operands, (*into, out) = _factors(node), axes
        values = [self.values.get(n) for n in operands]
        if any(v is None for v in values):
            return None
        for value, batch in zip(values, into, strict=True):
            assert value is not None
            if float(value.amax()) > NOTHING:  # the rows of a product's own result would take much memory
                self._meet(_rows(value, batch))
        shape = _shape(node)
        count = math.prod(shape[a] for a in out)
        numbers = -1.0 - self.slices - torch.arange(count, dtype=torch.float32)
        self.slices += count
        spread = numbers.reshape([shape[a] for a in out] + [1] * (len(shape) - len(out)))
        return spread.movedim(list(range(len(out))), out).expand(shape)

    def _meet(self, rows: Tensor) -> None:
        """[slices, elements of one]."""
        known = rows > NOTHING
        least = torch.where(known, rows, math.inf).amin(1, keepdim=True).expand_as(rows)[known]
        channels = rows[known].long()
        self.low.scatter_reduce_(0, channels, least, "amin")
        self.high.scatter_reduce_(0, channels, least, "amax")

    def _move(self, node: fx.Node) -> Any:
        """Does to the numbers what the node does to values."""
        if not any(n in self.values for n in node.all_input_nodes):
            return None
        target: Any = node.target
        try:
            return target(*fx.map_arg(node.args, self._argument), **fx.map_arg(node.kwargs, self._argument))
        except _UnknownError:
            return None

    def _argument(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        if ops.is_float_tensor(node):
            return torch.full(_shape(node), NOTHING)
        if node.op == "get_attr":
            return rewrite.get_tensor(self.graph, str(node.target))
        size = ops.value(node)
        if not isinstance(size, int):
            raise _UnknownError
        return size

    def _keep(self, node: fx.Node) -> Tensor | None:
        """Scales, biases, masks, normalisations and softmax leave every element where it is."""
        if ops.kind(node) in {"linear", "output", "pool"} or not isinstance(ops.value(node), Tensor):
            return None
        values = (self.values.get(n) for n in node.all_input_nodes)
        return next((v for v in values if isinstance(v, Tensor) and tuple(v.shape) == _shape(node)), None)


def _can_be_cut(node: fx.Node) -> bool:
    return ops.base_name(node) in ops.CONV | {"linear"} and rewrite.groups(node) == 1


def _operand(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    return operand


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in ops.shape(node))


def _channel_axis(node: fx.Node, rank: int) -> int:
    """Of what a linear operator reads and yields."""
    if ops.base_name(node) == "linear":
        return rank - 1
    return rank - len(_shape(_operand(node, 1))) + 1


def _factors(node: fx.Node) -> list[fx.Node]:
    """The two tensors that are multiplied."""
    name, args = ops.base_name(node), node.args
    factors: Any = args[1] if name == "einsum" else args[1:3] if name == "baddbmm" else args[:2]
    return list(factors)


def _batch_axes(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """The axes along which a product is computed slice by slice: of its factors and of its result."""
    if ops.base_name(node) != "einsum":
        ranks = [len(_shape(n)) for n in (*_factors(node), node)]
        return [*range(ranks[0] - 2)], [*range(ranks[1] - 2)], [*range(ranks[2] - 2)]
    factors, _, result = str(node.args[0]).replace(" ", "").partition("->")
    terms = [*factors.split(","), result]
    if len(terms) != 3 or "." in factors:
        return None
    shared = [letter for letter in result if letter in terms[0] and letter in terms[1]]
    first, second, out = ([term.index(letter) for letter in shared] for term in terms)
    return first, second, out


def _rows(value: Tensor, batch: list[int]) -> Tensor:
    """[slices, elements of one]."""
    count = math.prod(value.shape[a] for a in batch)
    return value.movedim(batch, list(range(len(batch)))).reshape(count, -1)
