"""Decides which tensors of a prepared graph get a quantizer, and says why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from bitwright.graph import ops
from bitwright.graph.layer import INSIDE, Unquantized
from bitwright.quant.quantizer import Role
from bitwright.quant.scheme import Scheme
from bitwright.runtimes.target import CLAMPING, Target

FLOAT_ACTIVATIONS, FLOAT_BY_RULE = "activations are float", "float by rule"
"""Reasons of tensors that stay float because the scheme says so."""
SIDE_BY_SIDE = "inputs side by side, of which each is quantized by itself"
REFILLS = frozenset({"masked_fill", "where", "nan_to_num"})
"""Behind a softmax they give the rows in which nothing is allowed a value; before them such rows are not numbers."""


@dataclass
class QuantizerSite:
    """An activation, or a stored operand of one, with a quantizer.

    Example: in ``conv -> relu`` the ReLU is the node, and both layers are members.
    """

    name: str
    node: fx.Node
    role: Role
    members: list[str] = field(default_factory=list)
    shares: fx.Node | None = None
    """The node whose quantizer it uses, if not one of its own."""
    bits: int | None = None


DECODED = "behind the last layers, where boxes and scores are joined: they share no grid, and stay in float"


@dataclass
class Placement:
    """Where quantizers go.

    Invariant: every floating tensor is a point, moves data of one (``source``), is a weight or a bias of a linear
    operator, or stands in ``unquantized``.
    """

    points: dict[fx.Node, QuantizerSite]
    linears: list[fx.Node]
    unquantized: list[Unquantized]
    source: dict[fx.Node, fx.Node]
    """For every tensor the node whose values it carries (itself unless it only moves data)."""
    ends: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """For every operator inside a group the one that ends it."""

    def __post_init__(self) -> None:
        self.inside: dict[fx.Node, list[fx.Node]] = {}
        for node, end in self.ends.items():
            self.inside.setdefault(end, []).append(node)

    def leader(self, point: QuantizerSite) -> QuantizerSite:
        """The site whose quantizer a point uses; itself, if it has one of its own."""
        while point.shares is not None:
            point = self.points[point.shares]
        return point


class _Consumer(NamedTuple):
    node: fx.Node
    moved: bool


def place(graph: fx.Graph, scheme: Scheme) -> Placement:
    """Chooses the tensors to quantize (methods, sections 0.6 and 1.1).

    One quantizer ends each group of operators that the target computes without rounding in between; an operator
    that only moves data shares its source's.
    """
    source = _sources(graph)
    fused = {n: c for n in graph.nodes if (c := _fuses_into(n, scheme.target)) is not None}
    fused = {n: c for n, c in fused.items() if not stays_float(_end(n, fused))}
    placement = Placement({}, [], [], source, {n: _end(n, fused) for n in fused})
    decoded = set() if scheme.outputs else _only_decoded(graph)
    for node in graph.nodes:
        kind = ops.kind(node)
        if kind == "linear":
            placement.linears.append(node)
        if kind in {"shape", "output", "move"} or not ops.is_float_tensor(node):
            continue
        if kind == "constant":
            _place_constant(placement, node, fused, scheme)
        elif node in decoded and not scheme.names_activation(name := str(node.meta["layer"])):
            placement.unquantized.append(Unquantized(name, ops.base_name(node), DECODED))
        else:
            _place_activation(placement, node, fused, scheme)
    if scheme.target.concat_shares_scale:
        _share_concats(placement, graph)
    return placement


def stays_float(node: fx.Node) -> bool:
    """Whether the network itself says that rounding the tensor would change its meaning; ``meta["float"]`` says why."""
    return "float" in node.meta


def _only_decoded(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that join others and from which no layer is computed, and what is: detectors join their outputs so.

    A grid for them would be one for boxes and scores, whose ranges have nothing in common.
    """
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in read or ops.kind(user) in {"linear", "matmul"} for user in node.users):
            read.add(node)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        joins = node not in read and "joins" in node.meta
        if joins or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return {n for n in found if not all(r.op == "output" for r in consumers(n))}


def consumers(node: fx.Node) -> list[fx.Node]:
    """The operators that read the node's values, behind those that only move them."""
    found: list[fx.Node] = []
    for user in node.users:
        found += consumers(user) if ops.kind(user) == "move" else [user]
    return found


def _sources(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    source: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not ops.is_float_tensor(node):
            continue
        origin = ops.moved(node) if ops.kind(node) == "move" else node
        source[node] = source.get(origin, origin)
    return source


def _only_consumer(node: fx.Node) -> _Consumer | None:
    moved = False
    while len(node.users) == 1:
        (user,) = node.users
        if ops.kind(user) != "move":
            return _Consumer(user, moved)
        node, moved = user, True
    return None


def _fuses_into(node: fx.Node, target: Target) -> fx.Node | None:
    """The operator that continues this one's group, if any."""
    if not ops.is_float_tensor(node) or ops.kind(node) in {"move", "constant"}:
        return None
    consumer = _only_consumer(node)
    if consumer is None or not _can_fuse(node, consumer, target):
        return None
    if ops.kind(node) == "input" and ops.base_name(consumer.node) not in CLAMPING:
        return None
    if ops.kind(consumer.node) == "add":
        rivals = [n for n in _operands(consumer.node) if _only_consumer(n) and _can_fuse(n, consumer, target)]
        if len(rivals) > 1 and rivals[-1] is not node:
            return None
    return consumer.node


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands behind operators that only move data, in program order."""
    found = []
    for operand in ops.tensor_operands(node):
        while ops.kind(operand) == "move":
            operand = ops.moved(operand)
        found.append(operand)
    return sorted(found) if len(found) > 1 else found


def _can_fuse(node: fx.Node, consumer: _Consumer, target: Target) -> bool:
    kind, name = ops.kind(node), ops.base_name(node)
    if ops.kind(consumer.node) == "rescale":
        return not consumer.moved
    conv = kind == "linear" and name != "linear"
    then, activation = ops.kind(consumer.node), ops.base_name(consumer.node)
    free = kind in {"linear", "matmul"} and (not conv or target.conv_into_add)
    if then == "activation":
        if conv and (target.conv_activations is not None):
            return activation in target.conv_activations and not consumer.moved
        if kind == "add" and target.add_activations is not None:
            return activation in target.add_activations and not consumer.moved
        return kind in {"linear", "matmul", "add", "norm", "scalar"} or activation in CLAMPING
    if kind == "softmax" and activation in REFILLS:
        return True
    if then == "softmax":
        return kind in {"matmul", "scalar"} or (kind == "add" and _adds_constant(node))
    if then == "scalar":
        return free or kind == "scalar"
    if then == "add":
        fused_activation = kind == "activation" and target.conv_into_add and _follows_linear(node)
        return free or fused_activation or (kind == "scalar" and _adds_constant(consumer.node))
    return False


def _adds_constant(node: fx.Node) -> bool:
    return any(n.op == "get_attr" for n in _operands(node)) or (
        ops.kind(node) == "add" and any(_is_mask(n) for n in node.all_input_nodes)
    )


def _is_mask(node: fx.Node) -> bool:
    return not ops.is_float_tensor(node)


def _follows_linear(node: fx.Node) -> bool:
    first = node.args[0]
    return isinstance(first, fx.Node) and ops.kind(first) == "linear" and len(first.users) == 1


def _group(node: fx.Node, placement: Placement) -> list[str]:
    """Names of the layers whose group ends at the node, in program order."""
    return list(dict.fromkeys(str(n.meta["layer"]) for n in [*placement.inside.get(node, []), node]))


def _end(node: fx.Node, fused: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in fused:
        node = fused[node]
    return node


def _place_activation(placement: Placement, node: fx.Node, fused: dict[fx.Node, fx.Node], scheme: Scheme) -> None:
    name, op = str(node.meta["layer"]), ops.base_name(node)
    if node in fused:
        end = _end(node, fused).meta["layer"]
        if end == name:  # the node before a multiplication by scales of channels, which bears its name
            return
        placement.unquantized.append(Unquantized(name, op, f"{INSIDE} {end}"))
        return
    if node.op == "placeholder" and any(ops.PART in n.meta for n in node.graph.nodes):
        placement.unquantized.append(Unquantized(name, op, SIDE_BY_SIDE))
        return
    if stays_float(node):
        placement.unquantized.append(Unquantized(name, op, str(node.meta["float"])))
        return
    readers = consumers(node)
    if not scheme.outputs and all(r.op == "output" for r in readers):
        placement.unquantized.append(Unquantized(name, op, "output of the network, left in float"))
        return
    members = _group(node, placement)
    bits = scheme.activation_bits(members)
    if bits is None:
        reason = FLOAT_ACTIVATIONS if scheme.activations is None else FLOAT_BY_RULE
        placement.unquantized.append(Unquantized(name, op, reason))
        return
    placement.points[node] = QuantizerSite(name, node, "activation", members, bits=bits)


def _place_constant(placement: Placement, node: fx.Node, fused: dict[fx.Node, fx.Node], scheme: Scheme) -> None:
    name = str(node.target)
    if any(ops.RESCALES in user.meta for user in node.users):
        placement.unquantized.append(Unquantized(name, "parameter", "scales of channels, all powers of two"))
        return
    role, reader = _constant_role(node)
    if role in {"weight", "bias"}:
        if any(ops.kind(user) != "linear" for user in node.users):
            why = f"the {role} of {reader.meta.get('layer')}, which other operators read in float"
            placement.unquantized.append(Unquantized(name, "parameter", why))
        return
    reason: str | None = None
    if role == "scalar":
        reason = "a single number"
    elif role == "setting":
        reason = f"parameter of {reader.meta.get('layer')}, which computes in float"
    elif stays_float(node):
        reason = str(node.meta["float"])
    elif all(stays_float(r) for r in consumers(node)):
        reason = f"read by {reader.meta.get('layer')}, which stays in float"
    elif all(r in fused for r in consumers(node)):
        reason = f"constant {INSIDE} {_end(reader, fused).meta['layer']}"
    bits = scheme.stored_bits(name)
    if reason is None and bits is None:
        reason = FLOAT_ACTIVATIONS if scheme.activations is None else FLOAT_BY_RULE
    if reason is not None:
        placement.unquantized.append(Unquantized(name, "parameter", reason))
        return
    node.meta["layer"] = name
    placement.points[node] = QuantizerSite(name, node, "parameter", [name], bits=bits)


def _constant_role(node: fx.Node) -> tuple[str, fx.Node]:
    """What a stored tensor is to its first reader: weight, bias, setting, scalar or operand."""
    reader = next(iter(consumers(node)), node)
    for user in node.users:
        if ops.kind(user) == "linear" and node in user.args[1:3]:
            return ("weight" if node is user.args[1] else "bias"), user
        sampled = ops.base_name(reader) in ops.SAMPLERS
        divides = ops.base_name(user) == "div" and node is user.args[1]
        if sampled or divides or (ops.kind(user) in {"norm", "activation"} and node in user.args[1:]):
            return "setting", user
    return ("scalar" if ops.numel(node) == 1 else "operand"), reader


def _share_concats(placement: Placement, graph: fx.Graph) -> None:
    """Puts all inputs of a concatenation, and its output, on one grid."""
    for node in graph.nodes:
        if ops.kind(node) != "concat" or node not in placement.points:
            continue
        joined = [
            placement.points[s]
            for s in (placement.source[n] for n in ops.tensor_operands(node))
            if s in placement.points
        ]
        joined.append(placement.points[node])
        leader = placement.leader(joined[-1])
        bits = max(placement.leader(p).bits or 0 for p in joined)
        for point in joined:
            mine = placement.leader(point)
            if mine is not leader:
                mine.shares = leader.node
        leader.bits = bits
