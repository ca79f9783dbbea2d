"""The part of a network that a change of some quantizers reaches, so that only that part runs again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.products import fast_products
from bitwright.quant.quantizer import BiasQuantizer


@dataclass(frozen=True)
class Region:
    """What lies behind some quantizers of a network.

    Attributes:
        frontier: names of the values it reads that depend on the images and not on the quantizers.
        fixed: names of the values it reads that depend on neither: weights and biases of other layers.
        moved: names of the values it reads that depend on the quantizers and not on the images.
        reached: names of everything that depends on the quantizers.
        body: ``body(*frontier, *fixed, *moved)`` gives the network's outputs.
    """

    frontier: tuple[str, ...]
    fixed: tuple[str, ...]
    moved: tuple[str, ...]
    reached: frozenset[str]
    body: fx.GraphModule


def region(graph: fx.GraphModule, changed: Collection[str]) -> Region:
    """Cuts the part of a network that a change of quantizers reaches.

    Args:
        graph: with quantizers; not changed.
        changed: paths of quantizers of weights or activations.

    Memory: the body shares the graph's modules and holds no tensors of its own.
    """
    seen = _follows(graph.graph, (n for n in graph.graph.nodes if n.op == "placeholder"))
    reached = _follows(graph.graph, (n for n in graph.graph.nodes if _changes(graph, n, changed)))
    output = next(n for n in graph.graph.nodes if n.op == "output")
    body = [n for n in graph.graph.nodes if n in seen and n in reached and n is not output]
    inside = set(body)
    operands = dict.fromkeys(a for n in [*body, output] for a in n.all_input_nodes if a not in inside)
    frontier = [n for n in operands if n in seen]
    moved = [n for n in operands if n not in seen and n in reached]
    fixed = [n for n in operands if n not in seen and n not in reached]

    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: made.placeholder(n.name) for n in (*frontier, *fixed, *moved)}
    for node in body:
        copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(fx.map_arg(output.args[0], copies.__getitem__))
    names = frozenset(n.name for n in reached)
    return Region(_names(frontier), _names(fixed), _names(moved), names, fx.GraphModule(graph, made))


def values(graph: fx.GraphModule, names: Iterable[str]) -> list[Any]:
    """The values of nodes that do not depend on the images, from the tensors and quantizers as they are now."""
    wanted = list(names)
    by_name = {n.name: n for n in graph.graph.nodes}
    known: dict[fx.Node, Any] = {}
    runner = fx.Interpreter(graph)
    with torch.no_grad():
        for node in _needed(graph.graph, [by_name[name] for name in wanted]):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = getattr(runner, node.op)(node.target, args, kwargs)
    return [known[by_name[name]] for name in wanted]


def truncate(graph: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """The same network up to some of its values: ``truncated(images)`` gives the list of them."""
    made = fx.Graph()
    by_name = {n.name: n for n in graph.graph.nodes}
    wanted = [by_name[name] for name in names]
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys([*inputs, *_needed(graph.graph, wanted)]):
        copies[node] = made.node_copy(node, copies.__getitem__)
    made.output([copies[n] for n in wanted])
    return fx.GraphModule(graph, made)


class Rerun:
    """A network whose parts run again with some stored values changed; everything else is found once.

    Args:
        graph: with quantizers; not changed. Its modules are called as they are at that time.

    Attributes:
        constants: values that do not depend on the images and that something reads which does, by node name.
        still: all nodes that do not depend on the images.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = list(graph.graph.nodes)
        self._moving = _follows(graph.graph, (n for n in nodes if n.op == "placeholder"))
        self.still = [n for n in nodes if n not in self._moving and n.op != "output"]
        (self._end,) = (n for n in nodes if n.op == "output")
        read = [a for n in [*self._moving, self._end] for a in n.all_input_nodes if a not in self._moving]
        names = [n.name for n in dict.fromkeys(read)]
        self.constants: dict[str, Any] = dict(zip(names, values(graph, names), strict=True))
        self._calls: dict[fx.Node, Callable[..., Any]] = {}
        for node in self._moving:
            if node.op == "call_module":
                self._calls[node] = graph.get_submodule(str(node.target))
            elif callable(node.target):
                self._calls[node] = node.target
        self._position = {n: i for i, n in enumerate(nodes)}
        self._last = {a: n for n in nodes for a in n.all_input_nodes}

    def behind(self, changed: Collection[str]) -> Behind:
        """What runs again where these values change, by names of nodes, and the names of what it reads of images."""
        seeds = [n for n in self._position if n.name in changed]
        waiting, found = [u for n in seeds for u in n.users] + [n for n in seeds if n in self._moving], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node in self._moving and node not in found and node is not self._end:
                found.add(node)
                waiting += node.users
        again = sorted(found, key=self._position.__getitem__)
        read = {a for n in [*again, self._end] for a in n.all_input_nodes if a in self._moving and a not in found}
        return Behind(again, frozenset(a.name for a in read))

    def outputs(self, part: Behind, known: Mapping[str, Any], changed: Mapping[str, Any]) -> list[Tensor]:
        """The network's outputs, without gradients.

        Args:
            part: what runs.
            known: what it reads that depends on the images, by node name.
            changed: stored values instead of :attr:`constants`, by node name.
        """
        env: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node in env:
                return env[node]
            name = node.name
            return known[name] if name in known else changed[name] if name in changed else self.constants[name]

        with torch.no_grad(), fast_products(self.graph):
            for node in part.again:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                env[node] = self._calls[node](*args, **kwargs)
                for read in node.all_input_nodes:
                    if self._last[read] is node:
                        env.pop(read, None)
            return list(fx.map_arg(self._end.args[0], value))


@dataclass(frozen=True)
class Behind:
    """Operators that run again, in order, and the names of the values that they read and that depend on the images."""

    again: list[fx.Node]
    reads: frozenset[str]


def tensor_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of the tensors among them; a list of tensors counts its members."""
    total = 0
    for value in values.values():
        for tensor in value if isinstance(value, list | tuple) else [value]:
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
    return total


def _changes(graph: fx.GraphModule, node: fx.Node, changed: Collection[str]) -> bool:
    """Whether the node's own module is one of the quantizers, or the quantizer of a bias that follows them."""
    if node.op != "call_module":
        return False
    if node.target in changed:
        return True
    module = graph.get_submodule(str(node.target))
    if not isinstance(module, BiasQuantizer):
        return False
    followed = {module.source, module.weight}
    return any(graph.get_submodule(key) in followed for key in changed)


def _follows(graph: fx.Graph, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on some nodes, and those themselves."""
    found = set(starts)
    for node in graph.nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _needed(graph: fx.Graph, wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes and everything they are computed from, in program order."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return [n for n in graph.nodes if n in found]


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes)
