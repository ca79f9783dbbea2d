"""Cuts a network into units that are optimised one after the other: layers, or blocks found by structure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.blocks import Block, common_path, find_blocks
from bitwright.quant.quantizer import Quantizer

UnitKind = Literal["layer", "block"]


@dataclass(frozen=True)
class Unit:
    """What some values of the network need and no earlier unit has.

    So every operator on the way to the exits of units lies in exactly one of them, whatever the network is. What a unit
    reads may be several tensors: those of earlier units, and the images.
    """

    name: str
    """As of a block: the longest module path that its layers have in common."""
    layers: tuple[str, ...]
    """Its convolutions and linear layers as the user knows them, in program order."""
    nodes: tuple[str, ...]
    """The same as nodes."""
    exits: tuple[str, ...]
    """Nodes of the float network where it is compared; none is computed from another."""


def find_units(graph: fx.GraphModule, kind: UnitKind) -> list[Unit]:
    """Units in the order in which they end; every convolution and linear layer lies in exactly one.

    A layer ends behind the activation that follows it alone, a block behind the addition that ends its residual branch
    (and the activation that follows). What is in no residual branch and no attention falls apart into its layers,
    except that a depthwise convolution goes with those before and behind it. Of blocks within each other the inner one
    ends first, with all that leads to it. Layers that share a weight lie in one unit, with all that is between.

    Args:
        graph: the float network, prepared, with its shapes recorded.
        kind: how large a unit is.
    """
    nodes = {n.name: n for n in graph.graph.nodes}
    order = {n: i for i, n in enumerate(nodes.values())}
    above = _ancestors(graph.graph)
    ends = sorted(_ends(graph, kind, nodes, above), key=lambda e: max(order[n] for n in e))
    groups = _merged([(end,) for end in dict.fromkeys(ends)], above)
    found, seen = [], set[fx.Node]()
    for group in groups:
        exits = _last({n for end in group for n in end} - seen, above)
        inside = set().union(*(above[n] for n in exits)) - seen
        linears = [n for n in nodes.values() if n in inside and ops.kind(n) == "linear"]
        if linears:
            seen |= inside
            layers = tuple(str(n.meta["layer"]) for n in linears)
            names = tuple(n.name for n in sorted(exits, key=order.__getitem__))
            found.append(Unit(common_path(layers), layers, tuple(n.name for n in linears), names))
    return found


def _ends(
    graph: fx.GraphModule, kind: UnitKind, nodes: dict[str, fx.Node], above: dict[fx.Node, set[fx.Node]]
) -> list[tuple[fx.Node, ...]]:
    """Where each unit ends: a block at several nodes where not all of its layers lead to one."""
    parts = [p for b in find_blocks(graph) for p in _parts(b, nodes, whole=kind == "block")]
    found = []
    for members, closing in parts:
        ends = {closing} if closing else set()
        ends |= {m for m in members if closing is None or m not in above[closing]}
        found.append(tuple(sorted({_behind(n) for n in _last(ends, above)}, key=lambda n: n.name)))
    return found


def _parts(block: Block, nodes: dict[str, fx.Node], *, whole: bool) -> list[tuple[list[fx.Node], fx.Node | None]]:
    """The layers that belong together, with the addition that ends them."""
    members = [nodes[name] for name in block.nodes]
    if whole and block.kind != "chain":
        return [(members, nodes[block.closing] if block.closing else None)]
    found = [members[:1]]
    for previous, node in itertools.pairwise(members):
        if whole and (_is_depthwise(previous) or _is_depthwise(node)):
            found[-1].append(node)
        else:
            found.append([node])
    return [(part, None) for part in found]


def _is_depthwise(node: fx.Node) -> bool:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return ops.base_name(node) != "linear" and 1 < rewrite.groups(node) == int(ops.shape(weight)[0])


def _behind(node: fx.Node) -> fx.Node:
    """The activation function behind a node that nothing else reads, or the node."""
    users = list(node.users)
    if len(users) == 1 and ops.kind(users[0]) == "activation" and len(ops.tensor_operands(users[0])) == 1:
        return users[0]
    return node


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Every node with all that it is computed from, itself included."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = {node}.union(*(found[n] for n in node.all_input_nodes))
    return found


def _last(nodes: Collection[fx.Node], above: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """Those that no other is computed from."""
    return {n for n in nodes if not any(n in above[other] for other in nodes if other is not n)}


Ends = tuple[tuple[fx.Node, ...], ...]


def _merged(groups: list[Ends], above: dict[fx.Node, set[fx.Node]]) -> list[Ends]:
    """Puts together what shares a stored weight, and what lies between."""
    first: dict[str, int] = {}
    joined, seen = list(range(len(groups))), set[fx.Node]()
    for position, group in enumerate(groups):
        inside = set().union(*(above[n] for end in group for n in end)) - seen
        seen |= inside
        for node in (n for n in inside if ops.kind(n) == "linear"):
            start = joined[first.setdefault(_stored(node), position)]
            joined[start : position + 1] = [start] * (position + 1 - start)
    return [
        tuple(itertools.chain.from_iterable(groups[i] for i in members))
        for _, members in itertools.groupby(range(len(groups)), joined.__getitem__)
    ]


def _stored(node: fx.Node) -> str:
    """The path of a linear operator's weight."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


# ------------------------------------------------------------------------------------------- parts as networks


@dataclass(frozen=True)
class Cut:
    """Where a part of a network begins and ends, by the names of nodes.

    ``entries`` are tensors that it computes with, ``sizes`` tensors whose sizes are all that it reads.
    """

    entries: tuple[str, ...]
    sizes: tuple[str, ...]
    exits: tuple[str, ...]


def cuts(graph: fx.GraphModule, exits: Iterable[tuple[str, ...]]) -> list[Cut]:
    """For each unit in order, what it reads of those before, in a graph with or without quantizers.

    Args:
        graph: with shapes recorded.
        exits: of each unit, as nodes of the float network; they are moved behind the quantizers there.
    """
    nodes = {n.name: n for n in graph.graph.nodes}
    above, depends = _ancestors(graph.graph), _moving(graph.graph)
    known = {n for n in graph.graph.nodes if n.op == "placeholder"}
    found = []
    for names in exits:
        ends = [quantized(nodes[name]) for name in names]
        inside: set[fx.Node] = set()
        todo, entries = list(ends), set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in known and node in depends and _is_float(node):
                entries.add(node)
            elif node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
        ordered = [n for n in graph.graph.nodes if n in entries]
        sizes = [n for n in ordered if n not in ends and not any(map(ops.is_float_tensor, inside & n.users.keys()))]
        found.append(
            Cut(
                tuple(n.name for n in ordered if n not in sizes),
                tuple(n.name for n in sizes),
                tuple(n.name for n in ends),
            )
        )
        known |= set().union(*(above[n] for n in ends))
    return found


def part(graph: fx.GraphModule, cut: Cut) -> fx.GraphModule:
    """The part as a network of its own: ``part(*entries, *sizes)`` gives ``([], values at the exits)``.

    It shares the graph's modules, and its tensors as they are now.
    """
    nodes = {n.name: n for n in graph.graph.nodes}
    made = fx.Graph()
    copies = {nodes[name]: made.placeholder(name) for name in (*cut.entries, *cut.sizes)}
    needed: set[fx.Node] = set()
    todo = [nodes[name] for name in cut.exits]
    while todo:
        node = todo.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            todo += node.all_input_nodes
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(([], [copies[nodes[name]] for name in cut.exits]))
    return fx.GraphModule(graph, made)


def without_activations(graph: fx.GraphModule) -> fx.GraphModule:
    """The same network, sharing its tensors and modules, with its activations in float."""
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if _quantizes_activation(graph, node):
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph, made)


def quantized(node: fx.Node) -> fx.Node:
    """The quantizer that follows a node, in whose place all others read; the node itself where there is none."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_module" else node


def float_node(node: fx.Node) -> fx.Node:
    """The node behind which a quantizer stands, of the same name in the float network."""
    while node.op == "call_module":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _quantizes_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = graph.get_submodule(str(node.target))
    return isinstance(module, Quantizer) and module.role == "activation"


def _is_float(node: fx.Node) -> bool:
    """Whether it carries one tensor of floating numbers."""
    return isinstance(ops.value(node), Tensor) and ops.is_float_tensor(node)


def _moving(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the images."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
