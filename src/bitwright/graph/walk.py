"""Runs a graph node by node, each for all images before the next, so that stored tensors may change on the way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.compact import HeldCodes, Room, grid_of
from bitwright.quant.quantizer import Quantizer

COMPACT = 1 << 25
"""Bytes of a node's values for all images, from which on they are held in one piece, as codes if each fits a byte."""

PASS = 5 << 26
"""Bytes of a network's values in a pass on a CPU, from which on more images in it do not make it faster."""

WITH_GRADIENTS = 1 << 28
"""The same where all of its values are kept."""

Showing = Callable[[int, Tensor], None]


class Walk:
    """One pass through a graph that stops wherever it is told to.

    From one stop to the next, batch follows batch, so that what is read in between is there for one batch alone.

    Memory: what later nodes still read at a stop, for all images, and what lies in between, for one batch
    (:func:`peak_bytes` for each image). On a CPU, large values that a quantizer of 8 bits or less gave are held as its
    codes, a quarter of that.

    Args:
        graph: with quantizers or without.
        batches: of images, [B, C, H, W] each; each is asked for once.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self._graph = graph
        self._runner, self._nodes = fx.Interpreter(graph), list(graph.graph.nodes)
        self._last = _last_readers(graph.graph)
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._at = 0
        self._values: dict[fx.Node, list[Any]] = {}
        """One for each batch, or its codes, or a single one for what does not depend on the images."""
        self._alike: set[fx.Node] = set()
        """Nodes that do not depend on the images."""

    def until(self, node: fx.Node) -> None:
        """Computes everything before a node."""
        self._advance(self._places[node], {})

    def through(self, node: fx.Node, seeing: Mapping[fx.Node, Showing]) -> None:
        """Computes everything up to a node, and shows the values of some nodes on the way.

        Args:
            node: the last one.
            seeing: is given the position of each batch, and the node's value for it.
        """
        self._advance(self._places[node] + 1, seeing)

    def tensor(self, node: Any) -> Tensor:
        """A stored tensor, by the node that reads it."""
        assert isinstance(node, fx.Node)
        return rewrite.get_tensor(self._graph, str(node.target))

    def knows(self, node: fx.Node) -> bool:
        """Whether a node's values are held: computed, and still to be read."""
        return node in self._values

    def place(self, node: fx.Node) -> int:
        """Of a node in the program."""
        return self._places[node]

    def read(self, node: fx.Node) -> Iterator[Tensor]:
        """What a node reads first, for one batch after the other."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return self.values(source)

    def values(self, node: fx.Node) -> Iterator[Tensor]:
        """The values of a node that :meth:`knows`, for one batch after the other."""
        return (self._value(node, i) for i in range(len(self.batches)))

    def bytes_behind(self, nodes: Sequence[fx.Node]) -> list[int]:
        """What it holds of one image when it stops behind each of these nodes, in float32."""
        found = {node: behind for node, _, behind in _held_bytes(self._nodes, self._last)}
        return [found[node] for node in nodes]

    def refresh(self, node: Any) -> None:
        """Computes a stored tensor, or what a quantizer makes of it, once more."""
        if isinstance(node, fx.Node):
            for before in node.all_input_nodes:
                self.refresh(before)
            with torch.no_grad():
                self._values[node] = [self._run(node, 0)]

    def _advance(self, end: int, seeing: Mapping[fx.Node, Showing]) -> None:
        nodes = [n for n in self._nodes[self._at : end] if n.op != "output"]
        for node in nodes:
            alike = _is_alike(node, self._alike)
            self._values[node] = [None] * (1 if alike else len(self.batches))
            if alike:
                self._alike.add(node)
        left = [n for n in nodes if n in self._last and self._places[self._last[n]] >= end and n not in self._alike]
        grids = {n: grid for n in left if (grid := grid_of(self._graph, n)) is not None}
        rooms = {n: Room(len(self.batches)) for n in left}
        with torch.no_grad():
            for batch in range(len(self.batches)):
                for node in nodes:
                    if batch == 0 or node not in self._alike:
                        self._compute(node, batch)
                        if node in seeing:
                            seeing[node](batch, self._value(node, batch))
                for node, room in rooms.items():
                    self._keep(node, batch, grids.get(node), room)
        for before in [b for b in self._values if b in self._last and self._places[self._last[b]] < end]:
            del self._values[before]
        self._at = max(self._at, end)

    def _compute(self, node: fx.Node, batch: int) -> None:
        found = self.batches[batch] if node.op == "placeholder" else self._run(node, batch)
        self._values[node][batch] = found
        for before in node.all_input_nodes:
            if self._last[before] is node and before not in self._alike:
                self._values[before][batch] = None

    def _keep(self, node: fx.Node, batch: int, grid: Quantizer | None, room: Room) -> None:
        """Holds a value where large ones lie beside each other, and as its codes where it has some."""
        value = self._values[node][batch]
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.nbytes * len(self.batches) < COMPACT:
            return
        codes = None if grid is None else HeldCodes.of(value, grid)
        self._values[node][batch] = room.take(value) if codes is None else replace(codes, codes=room.take(codes.codes))

    def _run(self, node: fx.Node, batch: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, batch))
        return getattr(self._runner, node.op)(node.target, args, kwargs)

    def _value(self, node: fx.Node, batch: int) -> Any:
        found = self._values[node][0 if node in self._alike else batch]
        return found.values() if isinstance(found, HeldCodes) else found


def _last_readers(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    return {before: node for node in graph.nodes for before in node.all_input_nodes}


def _is_alike(node: fx.Node, alike: Container[fx.Node]) -> bool:
    """Whether a node does not depend on the images, given those before it that do not."""
    return node.op != "placeholder" and all(b in alike for b in node.all_input_nodes)


def _held_bytes(nodes: Iterable[fx.Node], last: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[fx.Node, int, int]]:
    """Every node that depends on the images, with what is held of one while it is computed, and behind it."""
    alike, held = set[fx.Node](), 0
    for node in nodes:
        if _is_alike(node, alike):
            alike.add(node)
            continue
        new, read = image_bytes(node), [b for b in node.all_input_nodes if b not in alike and last[b] is node]
        yield node, held + new, held + new - sum(map(image_bytes, read))
        held += new - sum(map(image_bytes, read))


def pass_bytes(graph: fx.Graph) -> int:
    """The most that a forward pass holds of one image, in float32; the recorded shapes are those of two images."""
    return max((within for _, within, _ in _held_bytes(graph.nodes, _last_readers(graph))), default=0)


def images_in_pass(graph: fx.Graph, device: torch.device, most: int = 32, within: int = PASS) -> int:
    """How many images may pass at once: fewer than ``most`` where they are large and pass on a CPU, at least two.

    Args:
        graph: shapes recorded for two images.
        device: on which it runs; a CPU takes less memory for fewer images, and is as fast.
        most: at once.
        within: bytes of their values.
    """
    return most if device.type != "cpu" else max(2, min(most, within // max(1, pass_bytes(graph))))


def images_with_gradients(graph: fx.Graph, device: torch.device, most: int) -> int:
    """How many images may pass at once where all values are kept for gradients: fewer of large ones, two at least."""
    every = sum(image_bytes(node) for node, _, _ in _held_bytes(graph.nodes, _last_readers(graph)))
    return most if device.type != "cpu" else max(2, min(most, WITH_GRADIENTS // max(1, every)))


def peak_bytes(graph: fx.Graph, stops: Container[fx.Node], parts: int, *, behind: bool = False) -> int:
    """The most that a :class:`Walk` holds of one image, in float32; the recorded shapes are those of two images.

    Args:
        graph: the one that it goes through.
        stops: nodes where it stops.
        parts: batches into which the images are split.
        behind: it stops behind these nodes instead of before them.
    """
    held, before, inside, most = 0, 0, 0, 0
    for node, within, after in _held_bytes(graph.nodes, _last_readers(graph)):
        if node in stops and not behind:
            most, before, inside = max(most, max(before, held) + inside // parts), held, 0
        inside, held = max(inside, within), after
        if node in stops and behind:
            most, before, inside = max(most, max(before, held) + inside // parts), held, 0
    return most


def image_bytes(node: fx.Node) -> int:
    """What its value takes for one image, in float32; nothing of what is stored."""
    value = ops.value(node)
    tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else []
    return 0 if node.op == "get_attr" else sum(2 * int(t.numel()) for t in tensors if isinstance(t, Tensor))
