"""Which tensors of a captured program share memory, and whether a write into one of them is seen in another."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx


def are_seen_elsewhere(graph: fx.Graph) -> bool:
    """Whether something written in place is read again through another tensor of the same memory.

    So in ``y[:, :4].clamp_(max=8)``, where ``y`` is read afterwards. Capture hands the result of such an operator to
    later readers of the tensor that was named, and not to those of its other views. Values cannot tell whether one of
    them matters: a clamp may touch none of the images at hand.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}
    sharing: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for written in _written(node):
            if any(place[user] > place[node] for other in sharing[memory[written]] for user in other.users):
                return True
        source = _shares_with(node)
        memory[node] = node if source is None else memory[source]
        sharing[memory[node]].append(node)
    return False


def _operands(node: fx.Node) -> list[tuple[torch.Argument, fx.Node]]:
    """The operator's tensors with what its schema says of them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = [
        (a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(schema.arguments)
    ]
    return [(argument, value) for argument, value in given if isinstance(value, fx.Node)]


def _written(node: fx.Node) -> list[fx.Node]:
    return [n for argument, n in _operands(node) if argument.alias_info is not None and argument.alias_info.is_write]


def _shares_with(node: fx.Node) -> fx.Node | None:
    """The tensor whose memory the node's result may lie in."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0]
    return next((n for argument, n in _operands(node) if argument.alias_info is not None), None)
