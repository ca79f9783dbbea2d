"""Edits of an ONNX graph that several rooms need."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Set

import onnx_ir as ir

from bitwright.runtimes.session import Array


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new constant of the graph, of the array's own type."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused(graph: ir.Graph) -> None:
    """Takes out what no output depends on, and puts the constants that are left in the order of their names."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    left = sorted((name, v) for name, v in graph.initializers.items() if v.uses() or v.is_graph_output())
    graph.initializers.clear()
    graph.initializers.update(left)


def keep_constants(graph: ir.Graph) -> None:
    """Stores again what an optimiser gave a name that was taken: of two shapes of one name the first is lost."""
    for value in {v: None for node in graph for v in node.inputs if v is not None and v.const_value is not None}:
        if value.producer() is None and graph.initializers.get(str(value.name)) is not value:
            value.name = free_name(str(value.name), graph.initializers)
            graph.register_initializer(value)


def note_constants(graph: ir.Graph) -> None:
    """Tells values that runtimes compute from stored ones when they load a file what they are."""
    for node in graph:
        stored = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
        if len(stored) < len(node.inputs) or node.op_type not in {"Cast", "Mul"}:
            continue
        kind = ir.DataType(node.attributes.get_int("to")) if node.op_type == "Cast" else None
        array = stored[0] * stored[1] if kind is None else stored[0].astype(kind.numpy())
        node.outputs[0].const_value = ir.Tensor(array)


def shared(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """The constant of this name, made where there is none yet."""
    return graph.initializers.get(name) or initializer(graph, name, array)


def free_name(name: str, taken: Container[str | None], ending: str = "_out") -> str:
    """A name for a value that may not have its own: with an ending, as often as it takes.

    Example:
        >>> free_name("mask", {"mask", "mask_out"}), free_name("mask", ())
        ('mask_out_out', 'mask')
    """
    while name in taken:
        name += ending
    return name


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values that a graph names: inputs, stored ones, what its operators give, and those of graphs inside these."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for attribute in node.attributes.values():
            for inside in _graphs(attribute):
                yield from all_values(inside)


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def names_in(graph: ir.Graph) -> set[str | None]:
    """The names of all values of a graph, and of graphs inside it: a new one must be another."""
    return {value.name for value in all_values(graph)}


def make_way(graph: ir.Graph, wanted: Set[str | None], kept: Collection[ir.Value], ending: str) -> None:
    """Renames values whose names others are to get.

    Args:
        graph: changed.
        wanted: the names.
        kept: values that have their names by right.
        ending: of the new names.
    """
    values, by_right = list(all_values(graph)), {id(value) for value in kept}
    taken = {value.name for value in values} | wanted
    for value in values:
        if value.name in wanted and id(value) not in by_right:
            value.name = free_name(str(value.name), taken, ending)
            taken.add(value.name)


def insert_node(
    graph: ir.Graph,
    before: ir.Node,
    op: str,
    inputs: list[ir.Value],
    output: str,
    *,
    named: bool = True,
    **attributes: int | list[int],
) -> ir.Value:
    """The output, of this name, of a new operator before another; the operator itself has a name only where asked."""
    node = ir.node(op, inputs, attributes=attributes or None, name=f"{output}/{op}" if named else "")
    node.outputs[0].name = output
    graph.insert_before(before, node)
    return node.outputs[0]
