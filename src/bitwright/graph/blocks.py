"""Finds the blocks of a network (attention, MLPs, residual branches, chains) in its graph, by structure alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal

from torch import fx

from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite

BlockKind = Literal["attention", "mlp", "token mixer", "channel mixer", "residual", "chain"]

RESHAPE = frozenset({"view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"})
PRODUCT = ops.MATMUL | {"baddbmm", "einsum"}
ENDS = frozenset({"pool", "softmax", "product", "output"})
"""Kinds of operators that the way from attention's last product to its projection does not cross."""
WINDOWS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})
"""Unless they only make the map smaller, as these do."""


@dataclass(frozen=True)
class Block:
    """Linear operators that form one unit of the network.

    Example: ``Block("b.3.attn", "attention", ("linear_12", "linear_13"), ("b.3.attn.qkv", "b.3.attn.proj"))``
    """

    name: str
    """Longest module path that its layers have in common, ``first..last`` where they have none; unique."""
    kind: BlockKind
    nodes: tuple[str, ...]
    """Names of its convolutions' and linear layers' nodes, in program order."""
    layers: tuple[str, ...]
    """The same as the user knows them."""
    closing: str | None = None
    """Name of the addition that ends its residual branch, where it has one."""


def find_blocks(graph: fx.GraphModule) -> list[Block]:
    """Puts every convolution and linear layer with a stored weight into exactly one block.

    1. Attention: product, softmax, product, with the layers that make their operands and the one that projects.
    2. Residual branches: what lies between an addition of two activations and the point where their ways part,
       inner ones first.
    3. Chains: what is left, one after the other.

    Args:
        graph: a prepared network, with or without quantizers, with its shapes recorded.

    Returns:
        The blocks in the order in which they begin.

    Raises:
        UsageError: the graph has no shapes recorded, as after loading from a file.
    """
    flow = _Flow(graph.graph)
    found = [*_attentions(flow)]
    owner = {n: a for a in found for n in a.members}
    closed = {a.closing: a for a in found}
    for add in flow.additions:
        region = flow.region(add)
        if add in closed:
            _take(closed[add], owner, filter(flow.is_linear, flow.upstream(closed[add].members, flow.dominator[add])))
        rest = _Group([], "residual", add)
        _take(rest, owner, region)
        if rest.members:
            found.append(rest)
    _tell_apart(flow, found)
    found += _chains(flow, owner)
    for group in found:
        group.members.sort(key=flow.index.__getitem__)
    found.sort(key=lambda g: flow.index[g.members[0]])
    layers = [tuple(str(n.meta["layer"]) for n in g.members) for g in found]
    return [
        Block(
            name, group.kind, tuple(n.name for n in group.members), paths, group.closing.name if group.closing else None
        )
        for name, group, paths in zip(_unique([common_path(p) for p in layers]), found, layers, strict=True)
    ]


def common_path(layers: Iterable[str]) -> str:
    """The longest module path that all layers lie in.

    Example:
        >>> common_path(["blocks.3.attn.qkv", "blocks.3.attn.proj"]), common_path(["stem", "stages.0.conv"])
        ('blocks.3.attn', 'stem..stages.0.conv')
    """
    names = list(layers)
    common = []
    for parts in zip(*(n.split(".") for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or f"{names[0]}..{names[-1]}"


def _unique(names: list[str]) -> list[str]:
    """Numbers repeated names, past the names that others have."""
    taken: set[str] = set()
    found = []
    for base in names:
        name, count = base, 0
        while name in taken or (count and name in names):
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        found.append(name)
    return found


@dataclass
class _Group:
    """A block while it is put together."""

    members: list[fx.Node]
    kind: BlockKind
    closing: fx.Node | None = None
    """The addition that ends its residual branch."""


def _take(group: _Group, owner: dict[fx.Node, _Group], nodes: Iterable[fx.Node]) -> None:
    """Gives the group those of the linear operators that nobody has."""
    for node in nodes:
        if node not in owner:
            owner[node] = group
            group.members.append(node)


# ----------------------------------------------------------------------------------------------- data flow


class _Flow:
    """How values flow from the image through a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.index = {n: i for i, n in enumerate(graph.nodes)}
        self.moving: dict[fx.Node, list[fx.Node]] = {}
        """For every node whose values depend on the image, its inputs whose values do."""
        self.dominator: dict[fx.Node, fx.Node] = {}
        """The last node that all ways from the image lead through before this one."""
        self._closed: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                if ops.value(node) is None:
                    raise UsageError("Expected a graph with shapes, found none. Call rewrite.propagate on it first.")
                self.moving[node], self.dominator[node] = [], node
                continue
            inputs = [n for n in node.all_input_nodes if n in self.moving]
            if inputs and ops.is_float_tensor(node):
                self.moving[node] = inputs
                self.dominator[node] = reduce(self._meet, inputs)

    def _meet(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The closest common dominator; one pass is enough, since a graph without loops is in program order."""
        while a is not b:
            if self.index[a] > self.index[b]:
                a = self.dominator[a]
            else:
                b = self.dominator[b]
        return a

    @cached_property
    def linears(self) -> list[fx.Node]:
        """All linear operators, in program order."""
        return [n for n in self.graph.nodes if self.kind(n) == "linear"]

    @cached_property
    def additions(self) -> list[fx.Node]:
        """Additions of two activations, in program order, so that inner branches come before outer ones."""
        return [n for n in self.moving if self.merges(n) and ops.kind(n) == "add"]

    def kind(self, node: fx.Node) -> str:
        """As :func:`ops.kind`, but quantizers move data, and weights may stand behind one."""
        if node.op == "call_module":
            return "move"
        name = ops.base_name(node)
        if name in ops.LINEAR and ops.is_float_tensor(node):
            weight = node.args[1]
            stored = isinstance(weight, fx.Node) and weight.op in {"get_attr", "call_module"}
            return "linear" if stored and weight not in self.moving else "other"
        if name in PRODUCT and node in self.moving and all(n in self.moving for n in self._inputs(node)):
            return "product"
        return ops.kind(node)

    def merges(self, node: fx.Node) -> bool:
        """Whether the node joins activations that are computed separately."""
        return len(self.moving.get(node, [])) > 1

    def concatenates(self, node: fx.Node) -> bool:
        """Whether the node puts separate activations side by side."""
        return self.merges(node) and self.kind(node) == "concat"

    def back(
        self, starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda n: False, least: int = 0
    ) -> list[fx.Node]:
        """Linear operators met on the ways backwards, which end at the first and where ``stop`` holds."""
        return [
            n for n in self._walk(starts, lambda n: self.kind(n) == "linear" or stop(n), least) if self.is_linear(n)
        ]

    def reads(self, node: fx.Node, previous: fx.Node) -> bool:
        """Whether a linear operator reads another's result, with none between and not by way of a concatenation."""
        return previous in self.back(self._inputs(node), self.concatenates, self.index[previous])

    def region(self, add: fx.Node) -> list[fx.Node]:
        """Linear operators between an addition and its dominator; inner additions done before are jumped over."""
        fork = self.dominator[add]
        found, seen, todo = [], {fork}, [add]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.is_linear(node):
                found.append(node)
            todo += [self.dominator[node]] if node in self._closed else self._inputs(node)
        self._closed.add(add)
        return sorted(found, key=self.index.__getitem__)

    def upstream(self, nodes: Iterable[fx.Node], fork: fx.Node) -> list[fx.Node]:
        """What the nodes are computed from, behind the fork in program order."""
        return self._walk([i for n in nodes for i in self._inputs(n)], lambda n: False, self.index[fork] + 1)

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node is computed from another."""
        return source in self._walk(self._inputs(node), lambda n: n is source, self.index[source])

    def mixes(self, node: fx.Node) -> bool:
        """Whether the node joins ways that part before a linear operator, as the end of a residual branch does."""
        if not self.merges(node):
            return False
        fork = self.dominator[node]
        return bool(self.back(self.moving[node], least=self.index[fork] + 1))

    def within(self, node: fx.Node, members: list[fx.Node]) -> list[fx.Node] | None:
        """Linear operators on the ways from the members to the node; None if a way leads past the members."""
        inside, first = set(members), min((self.index[m] for m in members), default=len(self.index))
        met = self._walk([node], lambda n: n in inside or self.index[n] < first)
        if any(self.index[n] < first and n in self.moving for n in met):
            return None
        return [n for n in met if self.is_linear(n)]

    def _walk(self, starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool], least: int = 0) -> list[fx.Node]:
        """Nodes met on the ways backwards, those where it stops included, in program order.

        Constants made by linear operators belong to what reads them: the walk goes on behind such an operator.
        """
        seen: set[fx.Node] = set()
        todo = list(starts)
        while todo:
            node = todo.pop()
            if node in seen or (self.index[node] < least and node in self.moving):
                continue
            seen.add(node)
            if node not in self.moving or not stop(node):
                todo += self._inputs(node)
        return sorted(seen, key=self.index.__getitem__)

    def is_linear(self, node: fx.Node) -> bool:
        """Whether the node is a convolution or a linear layer with a stored weight."""
        return self.kind(node) == "linear"

    @staticmethod
    def _inputs(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if ops.is_float_tensor(n)]


# ----------------------------------------------------------------------------------------------- attention


def _attentions(flow: _Flow) -> list[_Group]:
    """Attention blocks; those that share a layer are one."""
    found: list[_Group] = []
    for node in flow.moving:
        if flow.kind(node) != "softmax":
            continue
        first, second = _scores(flow, node), _readers(flow, node)
        if not first or not second:
            continue
        group = _attention(flow, [*first, *second], node, second)
        for other in [g for g in found if set(g.members) & set(group.members)]:
            found.remove(other)
            group.members = list(dict.fromkeys(other.members + group.members))
        if group.members:
            found.append(group)
    return found


def _scores(flow: _Flow, softmax: fx.Node) -> list[fx.Node]:
    """The products whose results, scaled, biased, masked or mixed among heads, are the softmax's operand."""
    return _products(flow, flow.moving[softmax], lambda n: flow.moving[n], softmax)


def _readers(flow: _Flow, softmax: fx.Node) -> list[fx.Node]:
    """The products that read the softmax's result, dropped out or mixed among heads."""
    return _products(flow, _users(flow, softmax), lambda n: _users(flow, n), softmax)


def _products(
    flow: _Flow, starts: list[fx.Node], follow: Callable[[fx.Node], list[fx.Node]], softmax: fx.Node
) -> list[fx.Node]:
    """The first products on the ways; a way may cross one linear operator that mixes heads."""
    found: list[fx.Node] = []
    todo, seen = [(n, False) for n in starts], set()
    while todo:
        node, mixed = todo.pop()
        kind = flow.kind(node)
        if (node, mixed) in seen:
            continue
        seen.add((node, mixed))
        if kind == "product":
            found.append(node)
        elif kind == "linear":
            if not mixed and ops.numel(node) == ops.numel(softmax):
                todo += [(n, True) for n in follow(node)]
        elif kind not in ENDS | {"norm", "input"}:
            todo += [(n, mixed) for n in follow(node)]
    return sorted(dict.fromkeys(found), key=flow.index.__getitem__)


def _attention(flow: _Flow, products: list[fx.Node], softmax: fx.Node, last: list[fx.Node]) -> _Group:
    """The layers before the products' operands and the softmax, on the way to the last product's, and behind it."""
    operands = [i for p in [*products, softmax] for i in flow.moving[p]]
    members = flow.back(operands, flow.mixes)
    beside = [n for product in last for n in flow.within(product, members) or []]
    outputs, between, closing = _forwards(flow, last, members)
    members = list(dict.fromkeys([*members, *beside, *between, *outputs]))
    if outputs:
        _, _, closing = _forwards(flow, outputs, members)
    return _Group(members, "attention", closing)


def _forwards(
    flow: _Flow, starts: list[fx.Node], members: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node], fx.Node | None]:
    """The first linear operators behind the nodes, those beside the way, and the addition of a residual if it comes.

    An addition is crossed if all it adds is computed from the members, as a position encoding of the values is.
    """
    outputs: list[fx.Node] = []
    between: list[fx.Node] = []
    closing: fx.Node | None = None
    todo, seen = [u for s in starts for u in _users(flow, s)], set()
    while todo:
        node = min(todo, key=flow.index.__getitem__)
        todo.remove(node)
        kind = flow.kind(node)
        if node in seen or (kind in ENDS and ops.base_name(node) not in WINDOWS):
            continue
        seen.add(node)
        if kind == "linear":
            outputs.append(node)
            continue
        if flow.merges(node) and kind in {"add", "concat"}:
            beside = flow.within(node, members)
            if beside is None:
                closing = closing or (node if kind == "add" else None)
                continue
            between += [n for n in beside if n not in members]
        todo += _users(flow, node)
    return outputs, between, closing


def _users(flow: _Flow, node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u in flow.moving]


# ----------------------------------------------------------------------------------------------- the others


def _tell_apart(flow: _Flow, found: list[_Group]) -> None:
    """Calls residual branches mixers or MLPs where they are."""
    attention = any(g.kind == "attention" for g in found)
    crossing = _crossing(flow)
    branches = [g for g in found if g.kind == "residual"]
    mixers = [] if attention else [g for g in branches if any(n in crossing for n in g.members)]
    for group in branches:
        pointwise = all(_is_pointwise(n) and n not in crossing for n in group.members)
        if group in mixers:
            group.kind = "token mixer"
        elif pointwise and mixers:
            group.kind = "channel mixer"
        elif pointwise and attention and _is_mlp(flow, group):
            group.kind = "mlp"


def _is_mlp(flow: _Flow, group: _Group) -> bool:
    """Whether the last member reads the others, and no product of activations."""
    first, last = min(group.members, key=flow.index.__getitem__), max(group.members, key=flow.index.__getitem__)
    between = flow.upstream([last], first)
    return first is not last and flow.depends(last, first) and not any(flow.kind(n) == "product" for n in between)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether each position is computed by itself, from all of its channels."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return math.prod(ops.shape(weight)[2:]) == 1 and rewrite.groups(node) == 1


def _chains(flow: _Flow, owner: dict[fx.Node, _Group]) -> list[_Group]:
    """What no block has: runs in which each operator reads the one before, not by way of a concatenation."""
    found: list[_Group] = []
    previous: fx.Node | None = None
    for node in flow.linears:
        if node in owner:
            previous = None
            continue
        if previous is None or not flow.reads(node, previous):
            found.append(_Group([], "chain"))
        found[-1].members.append(node)
        previous = node
    return found


# ----------------------------------------------------------------------------------------------- axes


def _crossing(flow: _Flow) -> set[fx.Node]:
    """Linear operators that combine another axis than the channels: positions, in a transposed tensor.

    Channels lie along the axis that the operator before wrote, followed through transpositions and reshapes.
    """
    channels: dict[fx.Node, int] = {}
    found = set()
    for node, inputs in flow.moving.items():
        known = next((n for n in inputs if n in channels), None)
        if not inputs:
            channels[node] = 1
        elif flow.kind(node) == "linear":
            read = _axis_read(node)
            if known is not None and channels[known] != read:
                found.add(node)
                channels[node] = channels[known]
            else:
                channels[node] = read
        elif known is not None:
            axis = _moved(node, known, channels[known])
            if axis is not None:
                channels[node] = axis
    return found


def _axis_read(node: fx.Node) -> int:
    """The axis of its input that a linear operator sums over."""
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    rank = len(ops.shape(source))
    return rank - 1 if ops.base_name(node) == "linear" else int(rank == len(ops.shape(weight)))


def _moved(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where an axis of an operator's input lies in its output, if that is known."""
    before, after, name = _shape(source), _shape(node), ops.base_name(node)
    rank = len(before)
    given: Any = node.args[1:3]
    if name == "permute":
        return [int(d) % rank for d in given[0]].index(axis)
    if name in {"transpose", "swapaxes"}:
        a, b = (int(d) % rank for d in given)
        return {a: b, b: a}.get(axis, axis)
    if name in {"t", "numpy_T"}:
        return rank - 1 - axis
    if name in {"unbind", "select"}:
        dropped = int(given[0] if given else 0) % rank
        return None if axis == dropped else axis - (axis > dropped)
    if name in RESHAPE:
        outside = math.prod(before[:axis])
        same = [d for d, n in enumerate(after) if n == before[axis] and math.prod(after[:d]) == outside]
        return same[-1] if same else None
    return axis if rank == len(after) and name not in PRODUCT else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor at the node, or of the first of its list."""
    val: Any = ops.value(node)
    return tuple((val[0] if isinstance(val, list | tuple) else val).shape)
