"""Puts quantizers into a copy of the prepared graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx, nn

from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite
from bitwright.graph.heads import Heads, find_heads
from bitwright.graph.layer import Layer, Unquantized
from bitwright.graph.place import (
    FLOAT_ACTIVATIONS,
    FLOAT_BY_RULE,
    Placement,
    QuantizerSite,
    consumers,
    place,
)
from bitwright.graph.supported import check_supported
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.scheme import GROUP_SIZE, Scheme
from bitwright.runtimes.target import Target


@dataclass
class Inserted:
    """A student graph and its description."""

    graph: fx.GraphModule
    layers: list[Layer]
    unquantized: list[Unquantized]


def insert(teacher: fx.GraphModule, scheme: Scheme) -> Inserted:
    """A copy of the teacher with quantizers in it. Tensors are shared with the teacher and replaced, never changed.

    Raises:
        UsageError: a rule of the scheme matches no layer, or it asks for a scale per head where there are no heads.
    """
    heads = _heads(teacher, scheme)
    placement = place(teacher.graph, scheme)
    scheme.check_rules(_layer_names(teacher.graph, placement))
    tensors = {id(t): t for t in [*teacher.buffers(), *teacher.parameters()]}
    student = copy.deepcopy(teacher, memo=dict(tensors))
    twin = dict(zip(teacher.graph.nodes, student.graph.nodes, strict=True))
    keys = _insert_activations(student, placement, twin, scheme)
    layers = _describe(teacher.graph, placement, keys)
    unquantized = list(placement.unquantized)
    by_node, weights = {layer.node: layer for layer in layers}, _weight_bits(placement, scheme)
    for node in placement.linears:
        source = keys.get(placement.source[_first(node)])
        layer, bits = by_node[node.name], weights[_weight_key(node)]
        _insert_weight(student, twin[node], layer, bits, source, scheme, heads.get(node.name), unquantized)
    check_supported(student, layers, scheme)
    _at_first_use(student.graph)
    student.graph.lint()
    student.recompile()
    return Inserted(student, layers, _with_settings(teacher.graph, unquantized))


def _at_first_use(graph: fx.Graph) -> None:
    """Puts quantizers of stored tensors before their first reader, so that no pass holds what all of them give."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.users and all(n.op == "get_attr" for n in node.all_input_nodes):
            min(node.users, key=order.__getitem__).prepend(node)


def bits_by_key(teacher: fx.GraphModule, scheme: Scheme) -> dict[str, int | None]:
    """Bits of weights and activations as :func:`insert` would give them, by the keys of their quantizers."""
    placement = place(teacher.graph, scheme)
    found: dict[str, int | None] = {}
    for point in placement.points.values():
        leader = placement.leader(point)
        found[module_key(leader.role, leader.name)] = leader.bits
    return found | _weight_bits(placement, scheme)


def _weight_key(node: fx.Node) -> str:
    stored = node.args[1]
    assert isinstance(stored, fx.Node)
    return module_key("weight", str(stored.target).removesuffix(".weight"))


def _weight_bits(placement: Placement, scheme: Scheme) -> dict[str, int | None]:
    """Of the weights of linear operators, by the keys of their quantizers; None for float."""
    readers: dict[str, list[fx.Node]] = {}
    for node in placement.linears:
        readers.setdefault(_weight_key(node), []).append(node)
    return {
        key: scheme.weight_bits([str(n.meta["layer"]) for n in nodes], head=_is_head(nodes[0], placement))
        for key, nodes in readers.items()
    }


def _is_head(node: fx.Node, placement: Placement) -> bool:
    return all(reader.op == "output" for reader in consumers(placement.ends.get(node, node)))


def _heads(teacher: fx.GraphModule, scheme: Scheme) -> dict[str, Heads]:
    """Where weights have heads, if the scheme asks."""
    found = find_heads(teacher) if scheme.by_heads() else {}
    if scheme.granularity == "head" and not found:
        raise UsageError(
            "Expected attention with heads in the network for the granularity 'head', found none. Take 'channel', "
            "'tensor' or 'group'."
        )
    return found


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _layer_names(graph: fx.Graph, placement: Placement) -> list[str]:
    names = [str(n.meta["layer"]) for n in graph.nodes if ops.is_float_tensor(n) and n.op == "call_function"]
    asked = [u.name for u in placement.unquantized if u.reason in {FLOAT_ACTIVATIONS, FLOAT_BY_RULE}]
    return ["input", *names, *(p.name for p in placement.points.values()), *asked]


def module_key(role: str, name: str) -> str:
    """Path of a quantizer in the graph; module paths cannot contain dots, so that ``/`` stands for them."""
    return f"quantizer_{role}_{name.replace('.', '/')}"


def _insert_activations(
    student: fx.GraphModule, placement: Placement, twin: dict[fx.Node, fx.Node], scheme: Scheme
) -> dict[fx.Node, str]:
    keys: dict[fx.Node, str] = {}
    for node, point in placement.points.items():
        leader = placement.leader(point)
        keys[node] = key = module_key(leader.role, leader.name)
        if not hasattr(student, key):
            student.add_module(key, _activation_quantizer(leader, scheme))
        _call_after(student, twin[node], key)
    return keys


def _activation_quantizer(point: QuantizerSite, scheme: Scheme) -> Quantizer:
    assert point.bits is not None
    grid = Grid.named(scheme.activation_grid, point.bits)
    return Quantizer(point.name, grid, point.role, power_of_two=scheme.target.power_of_two_scales)


def _call_after(student: fx.GraphModule, node: fx.Node, key: str, users: list[fx.Node] | None = None) -> None:
    readers = list(node.users) if users is None else users
    with student.graph.inserting_after(node):
        call = student.graph.call_module(key, (node,))
    call.meta = {"val": ops.value(node), "layer": node.meta.get("layer")}
    for reader in readers:
        reader.replace_input_with(node, call)


def _insert_weight(
    student: fx.GraphModule,
    node: fx.Node,
    layer: Layer,
    bits: int | None,
    source: str | None,
    scheme: Scheme,
    heads: Heads | None,
    unquantized: list[Unquantized],
) -> None:
    stored, bias = node.args[1], node.args[2]
    assert isinstance(stored, fx.Node)
    assert isinstance(bias, fx.Node)
    if stored.op == "call_module":  # shared with a layer before, which decided
        layer.weight = str(stored.target)
    elif bits is None:
        reason = "weights are float" if scheme.weights is None else FLOAT_BY_RULE
        unquantized.append(Unquantized(str(stored.target), "weight", reason))
    else:
        layer.weight = _weight_key(node)
        shape = tuple(int(s) for s in ops.shape(stored))
        kind, size = scheme.weight_granularity(layer.name)
        cut = heads if kind == "head" else None
        block = weight_block(node, shape, kind, size) if cut is None else cut.block(shape, size)
        axis = None if cut is None else cut.axis
        target = scheme.target
        one_a_sum = axis is None and block[1:] == shape[1:]
        shift = target.shift(ops.base_name(node), bits) if one_a_sum else 0
        quantizer = Quantizer(
            layer.name, Grid.of_weight(bits), "weight", shape, block, axis, target.power_of_two_scales, shift
        )
        student.add_module(layer.weight, quantizer)
        _call_after(student, stored, layer.weight, [u for u in stored.users if ops.base_name(u) in ops.LINEAR])
    why = _insert_bias(student, node, bias, layer, source, scheme.target)
    if why:
        unquantized.append(Unquantized(str(bias.target), "bias", why))


def _insert_bias(
    student: fx.GraphModule, node: fx.Node, bias: fx.Node, layer: Layer, source: str | None, target: Target
) -> str | None:
    """Makes the bias an integer of the layer's accumulator; the reason if it stays float.

    Layers that share a bias have one set of integers each, since the steps of their inputs differ.
    """
    layer.source = source
    if layer.weight is None or source is None:
        return "its layer's weight or input is float"
    weight, quantizer = student.get_submodule(layer.weight), student.get_submodule(source)
    assert isinstance(weight, Quantizer)
    assert isinstance(quantizer, Quantizer)
    channels = int(ops.shape(bias)[0])
    if any(u.op != "call_module" and ops.base_name(u) not in ops.LINEAR for u in bias.users):
        return "another operator reads it as well"
    if weight.granularity == "head" and weight.blocks > 1:
        return "its layer's weight has scales of heads"
    if weight.blocks not in {1, channels}:
        return "its layer's weight has several scales per output channel"
    if target.integer_bias_bits is None:
        return "the runtime adds biases in float"
    if not target.integer_bias(weight.grid.bits + weight.shift, quantizer.grid.bits):
        return "with so few bits the accumulator's step would be too coarse for it"
    layer.bias = module_key("bias", layer.name)
    student.add_module(layer.bias, BiasQuantizer(layer.name, quantizer, weight))
    _call_after(student, bias, layer.bias, [node])
    return None


def weight_block(node: fx.Node, shape: tuple[int, ...], granularity: str, group_size: int | None) -> tuple[int, ...]:
    """Extent of one scale along each axis of a linear operator's weight.

    Example: a convolution [O, I, kh, kw] per channel gives (1, I, kh, kw), per group of 64 gives (1, 64, kh, kw); a
    transposed one [I, O / groups, kh, kw] per channel gives (I / groups, 1, kh, kw). Per head it is per channel, for an
    operator without heads.
    """
    if granularity == "tensor":
        return shape
    if ops.base_name(node) in ops.CONV_TRANSPOSE:
        return (shape[0] // rewrite.groups(node), 1, *shape[2:])
    if granularity == "group":
        return (1, min(group_size or GROUP_SIZE, shape[1]), *shape[2:])
    return (1, *shape[1:])


def _describe(graph: fx.Graph, placement: Placement, keys: dict[fx.Node, str]) -> list[Layer]:
    """A row for every point and every linear operator, in program order."""
    ends = {m: node for node, p in placement.points.items() for m in p.members}
    layers = []
    for node in graph.nodes:
        point = placement.points.get(node)
        if node not in placement.linears and point is None:
            continue
        end = ends.get(str(node.meta["layer"])) if point is None else node
        layers.append(
            Layer(
                name=str(node.meta["layer"]),
                op="parameter"
                if node.op == "get_attr"
                else "input"
                if ops.kind(node) == "input"
                else ops.base_name(_first(node) if ops.kind(node) == "rescale" else node),
                node=node.name,
                parameters=_parameters(node),
                macs=macs(node),
                activation=keys[end] if end is not None else None,
                end=end.name if end is not None else None,
            )
        )
    return layers


def _parameters(node: fx.Node) -> int:
    if node.op == "get_attr":
        return ops.numel(node)
    if ops.kind(node) != "linear":
        return 0
    return sum(ops.numel(a) for a in node.args[1:3] if isinstance(a, fx.Node))


def macs(node: fx.Node) -> int:
    """Multiply-accumulates for one image; the graph's recorded shapes are those of two."""
    kind = ops.kind(node)
    if kind not in {"linear", "matmul"}:
        return 0
    if kind == "matmul":
        return ops.numel(node) * int(ops.shape(_first(node))[-1]) // 2
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    positions = _first(node) if ops.base_name(node) in ops.CONV_TRANSPOSE else node
    return ops.numel(positions) * (ops.numel(weight) // int(ops.shape(weight)[0])) // 2


def _with_settings(graph: fx.Graph, unquantized: list[Unquantized]) -> list[Unquantized]:
    """Program order for what the graph names; the same tensor once."""
    order = {str(n.meta.get("layer", n.target)): i for i, n in enumerate(graph.nodes)}
    return sorted(dict.fromkeys(unquantized), key=lambda u: order.get(u.name, -1))


def quantizers(graph: nn.Module) -> list[Quantizer]:
    """All quantizers of weights, activations and parameters, in program order."""
    return [m for m in graph.modules() if isinstance(m, Quantizer)]
