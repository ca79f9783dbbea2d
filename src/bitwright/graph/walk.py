"""Runs a graph node by node, each for all images before the next, so that stored tensors may change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite


class Walk:
    """One pass through a graph that stops wherever it is told to.

    Memory: what later nodes still read, for all images (:func:`peak_bytes` for each).

    Args:
        graph: with quantizers or without.
        batches: of images, [B, C, H, W] each.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self._graph = graph
        self._runner, self._nodes = fx.Interpreter(graph), list(graph.graph.nodes)
        self._last = _last_readers(graph.graph)
        self._at = 0
        self._values: dict[fx.Node, list[Any]] = {}
        """One for each batch, or a single one for what does not depend on the images."""

    def until(self, node: fx.Node) -> None:
        """Computes everything before a node."""
        with torch.no_grad():
            while self._nodes[self._at] is not node:
                self._compute(self._nodes[self._at])
                self._at += 1

    def through(self, node: fx.Node) -> list[Any]:
        """Computes everything up to a node, and returns its values, one for each batch."""
        with torch.no_grad():
            while node not in self._values:
                self._compute(self._nodes[self._at])
                self._at += 1
        return [self._value(node, i) for i in range(len(self.batches))]

    def tensor(self, node: Any) -> Tensor:
        """A stored tensor, by the node that reads it."""
        assert isinstance(node, fx.Node)
        return rewrite.get_tensor(self._graph, str(node.target))

    def knows(self, node: fx.Node) -> bool:
        """Whether a node's values are held: computed, and still to be read."""
        return node in self._values

    def read(self, node: fx.Node) -> list[Tensor]:
        """What a node reads first, for each batch."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [self._value(source, i) for i in range(len(self.batches))]

    def refresh(self, node: Any) -> None:
        """Computes a stored tensor, or what a quantizer makes of it, once more."""
        if isinstance(node, fx.Node):
            for before in node.all_input_nodes:
                self.refresh(before)
            with torch.no_grad():
                self._values[node] = [self._run(node, 0)]

    def _compute(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = list(self.batches)
        elif node.op != "output":
            alike = all(len(self._values[a]) == 1 for a in node.all_input_nodes)
            self._values[node] = [self._run(node, i) for i in range(1 if alike else len(self.batches))]
        for before in node.all_input_nodes:
            if self._last[before] is node:
                del self._values[before]

    def _run(self, node: fx.Node, batch: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, batch))
        return getattr(self._runner, node.op)(node.target, args, kwargs)

    def _value(self, node: fx.Node, batch: int) -> Any:
        values = self._values[node]
        return values[batch if len(values) > 1 else 0]


def _last_readers(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    return {before: node for node in graph.nodes for before in node.all_input_nodes}


def peak_bytes(graph: fx.Graph) -> int:
    """The most that a :class:`Walk` holds of one image, in float32; the recorded shapes are those of two images."""
    last, held, most = _last_readers(graph), 0, 0
    for node in graph.nodes:
        held += image_bytes(node)
        most = max(most, held)
        held -= sum(image_bytes(before) for before in node.all_input_nodes if last[before] is node)
    return most


def image_bytes(node: fx.Node) -> int:
    """What its value takes for one image, in float32; nothing of what is stored."""
    value = ops.value(node)
    tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else []
    return 0 if node.op == "get_attr" else sum(2 * int(t.numel()) for t in tensors if isinstance(t, Tensor))
