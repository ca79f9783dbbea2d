"""The float network of an exported file: the same operators on the same shapes, without what quantizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.errors import UsageError
from bitwright.export.clips import IN_FLOAT, Clamp, codes_of, noted
from bitwright.export.edit import drop_unused, initializer, note_constants
from bitwright.runtimes.session import Array

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def float_twin(program: ir.Model) -> ir.Model:
    """Takes the quantizers out of a file that bitwright exported.

    Stored integers become the float values that they stand for; activations pass unchanged, clamped where a clamping
    operator was left to their codes. What remains is the float network as it was prepared for quantization, batch norms
    folded into weights, but with the rounded weights: how fast it runs does not depend on their values, what it
    computes does.

    Args:
        program: as :func:`bitwright.export.onnx.to_onnx` makes it; not changed.

    Raises:
        UsageError: something in it quantizes in another way.
    """
    twin = program.clone()
    graph = twin.graph
    note_constants(graph)
    for node in list(graph):
        if node.op_type == DEQUANTIZE and all(v is not None and v.const_value is not None for v in node.inputs):
            node.outputs[0].replace_all_uses_with(_floats(graph, node), replace_graph_outputs=True)
    for node in list(graph):
        if node.op_type == QUANTIZE:
            _pass_through(graph, node)
        elif node.op_type == "Clip" and (node.outputs[0].name or "").endswith(IN_FLOAT) and node.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    drop_unused(graph)
    left = [n.op_type for n in graph if n.op_type in {QUANTIZE, DEQUANTIZE}]
    if left:
        raise UsageError(f"Expected a file that bitwright exported, found a {left[0]} in it that is not of its kind.")
    return twin


def _floats(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """What stored integers stand for, as an initializer of its own."""
    codes, scale, *zero = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
    settings = {a.name: a.as_int() for a in node.attributes.values()}
    array = dequantize_linear(
        codes, scale, zero[0] if zero else None, settings.get("axis", 1), settings.get("block_size", 0)
    )
    return initializer(graph, f"{node.outputs[0].name}/float", array)


def dequantize_linear(codes: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """``(codes - zero) * scale`` as ONNX defines it.

    Args:
        codes: integers, any shape.
        scale: one number, one per index of ``axis``, or, with ``block``, one per ``block`` indices of it.
        zero: in the shape of the scale.
        axis: along which scales differ.
        block: how many indices of the axis share a scale.

    Example:
        >>> dequantize_linear(np.array([[1, 2], [3, 4]]), np.array([1.0, 10.0]), None, axis=0).tolist()
        [[1.0, 2.0], [30.0, 40.0]]
    """

    def spread(values: Array) -> Array:
        if values.ndim == 0:
            return values
        if block:
            return np.repeat(values, block, axis).take(range(codes.shape[axis]), axis)
        return values.reshape([-1 if d == axis % codes.ndim else 1 for d in range(codes.ndim)])

    centred = codes.astype(np.int64) - (0 if zero is None else spread(zero.astype(np.int64)))
    return (centred * spread(scale).astype(np.float32)).astype(np.float32)


def _pass_through(graph: ir.Graph, quantize: ir.Node) -> None:
    """Joins what an activation's quantizer reads to what reads its value, by the clamp that its codes stand for.

    The exporter writes ``[Mul] [Clip] QuantizeLinear [Clip] DequantizeLinear [Mul]`` and names each step after the
    quantizer.
    """
    codes = codes_of(quantize)
    name = (codes.name or "").removesuffix("/codes")
    source = quantize.inputs[0]
    while source is not None and source.name in {f"{name}/clipped", f"{name}/reduced"}:
        producer = source.producer()
        assert producer is not None
        source = producer.inputs[0]
    clamp = noted(quantize)
    if source is not None and clamp is not None:
        source = _clamped(graph, quantize, source, clamp, f"{name}/clamped")
    for use in codes.uses():
        value = use.node.outputs[0]
        if value.name == f"{name}/one":
            value = next(iter(value.uses())).node.outputs[0]
        if source is not None and use.node.op_type == DEQUANTIZE:
            value.replace_all_uses_with(source, replace_graph_outputs=True)


def _clamped(graph: ir.Graph, before: ir.Node, source: ir.Value, clamp: Clamp, name: str) -> ir.Value:
    """The activation that the exporter left to the codes."""
    relu = clamp == Clamp(low=0.0)
    ends = [] if relu else [_number(graph, f"{name}/{end}", bound) for end, bound in clamp.ends()]
    node = ir.node("Relu" if relu else "Clip", [source, *ends], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, source.type, source.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _number(graph: ir.Graph, name: str, number: float) -> ir.Value | None:
    if not np.isfinite(number):
        return None
    return initializer(graph, name, np.asarray(number, np.float32))
