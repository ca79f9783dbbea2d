"""The operators of a file that ONNX Runtime computes in float, and why: read from the graph that it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from bitwright.export.clips import IN_FLOAT
from bitwright.export.qdq import NARROW
from bitwright.speed.kernels import FLOAT_PRODUCTS, INTEGER_PRODUCTS
from bitwright.speed.record import FloatOperator

ONLY_MOVE = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice",
        "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""What computes nothing."""
BETWEEN_CODES = frozenset({"Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax"})
"""Operators, besides products, with an integer kernel that reads and gives codes."""
SIXTEEN_BITS = frozenset({ir.DataType.INT16, ir.DataType.UINT16})

REASONS = {
    "images": "the images become codes",
    "codes": "results in float become codes",
    "widened": "stored integers become floats at every call",
    "floats": "codes become floats for the operators of this list",
    "output": "codes become floats: output of the network",
    "nbits": "multiplies floats by the stored integers, since its input is float",
    "transposed": "no integer kernel for transposed convolutions",
    "four": "weights of up to 4 bits: widened to floats",
    "scales": "weights with several scales in one sum, of groups or heads",
    "float weights": "its weights are float",
    "sixteen": "activations of 16 bits",
    "bias": "its bias is float, which an integer kernel would round",
    "last": "no quantizer on its result: output of the network",
    "input": "{} gives it floats",
    "reader": "no quantizer between it and {}",
    "none": "no integer kernel for it",
    "unknown": "the runtime chose so",
}
"""Why an operator computes in float; ``{}`` is the operator on its other side."""


def float_operators(graph: ir.Graph) -> list[FloatOperator]:
    """What ONNX Runtime computes in float of a file; products first, then the frequent.

    Args:
        graph: that it made of the file, see :func:`bitwright.speed.kernels.optimized`.
    """
    found = Counter(_in_float(graph))
    rows = [FloatOperator(operator, count, reason) for (operator, reason), count in found.items()]
    return sorted(rows, key=lambda r: (r.operator not in FLOAT_PRODUCTS, -r.count, r.operator, r.reason))


def _in_float(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    types: dict[str | None, ir.DataType | None] = {v.name: v.dtype for v in graph.inputs}
    for node in graph:
        kind = _type(node, types)
        types.update((v.name, kind) for v in node.outputs)
        if node.op_type == "QuantizeLinear" or (kind == ir.DataType.FLOAT and not _integer(node)):
            yield node.op_type, _reason(node)


def _type(node: ir.Node, types: dict[str | None, ir.DataType | None]) -> ir.DataType | None:
    """Type of what the node gives. ONNX Runtime writes no types to its graph: only floats and codes are told apart."""
    if node.op_type == "DequantizeLinear" or node.op_type in {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}:
        return ir.DataType.FLOAT
    if node.op_type == "QuantizeLinear":
        return _codes_type(node)
    if node.op_type == "QGemm":  # to floats where no scale of the result is given
        return ir.DataType.UINT8 if len(node.inputs) > 7 and node.inputs[7] is not None else ir.DataType.FLOAT
    if node.op_type.startswith("QLinear"):
        return ir.DataType.UINT8
    if node.op_type == "Shape":
        return ir.DataType.INT64
    first = next((v for v in node.inputs if v is not None), None)
    if first is None or node.op_type in {"Cast", "Equal", "Greater", "Less", "Not"}:
        return node.outputs[0].dtype
    return first.const_value.dtype if first.const_value is not None else types.get(first.name)


def _codes_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes at a QuantizeLinear or DequantizeLinear: that of its zero point."""
    for index in (2, 0):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None and value.const_value is not None:
            return value.const_value.dtype
    return ir.DataType.UINT8


def _integer(node: ir.Node) -> bool:
    return node.op_type in ONLY_MOVE or node.op_type in INTEGER_PRODUCTS or node.op_type.startswith("QLinear")


def _reason(node: ir.Node) -> str:
    if node.op_type == "QuantizeLinear":
        first = _source(node.inputs[0])
        return REASONS["images" if first is None else "codes"]
    if node.op_type == "DequantizeLinear":
        if node.inputs[0] is not None and node.inputs[0].const_value is not None:
            return REASONS["widened"]
        return REASONS["output" if node.outputs[0].is_graph_output() else "floats"]
    if node.op_type in FLOAT_PRODUCTS:
        return _of_product(node)
    if node.op_type in BETWEEN_CODES:
        return _between(node)
    return REASONS["none"]


def _of_product(node: ir.Node) -> str:
    if node.op_type == "MatMulNBits":
        return REASONS["nbits"]
    if node.op_type == "ConvTranspose":
        return REASONS["transposed"]
    weight = _of_weight(node.inputs[1])
    if weight is not None:
        return weight
    given = _source(node.inputs[0])
    shielded = given is not None and (given.outputs[0].name or "").endswith(IN_FLOAT)
    return REASONS["bias"] if shielded else _between(node)


def _of_weight(weight: ir.Value | None) -> str | None:
    """What is in a weight that integer kernels do not take; None if nothing is."""
    if weight is not None and weight.const_value is not None:
        return REASONS["float weights"]
    node = _source(weight)
    if node is not None and node.op_type == "Mul" and _is_widened(_source(node.inputs[0])):
        return REASONS["scales"]
    if node is None or not _is_widened(node):
        return None
    if _codes_type(node) in NARROW:
        return REASONS["four"]
    return REASONS["scales"] if node.attributes.get_int("block_size", 0) else None


def _is_widened(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return node.inputs[0] is not None and node.inputs[0].const_value is not None


def _between(node: ir.Node) -> str:
    """Which side of it, that codes would come from or go to, is float."""
    for value in node.inputs[:2]:
        before = _source(value)
        if before is not None and before.op_type != "DequantizeLinear":
            return REASONS["input"].format(before.op_type)
        if before is not None and _codes_type(before) in SIXTEEN_BITS:
            return REASONS["sixteen"]
    for value, reader in _readers(node.outputs[0]):
        if reader is None:
            return REASONS["last"]
        if reader.op_type != "QuantizeLinear":
            return REASONS["reader"].format(reader.op_type)
        if _codes_type(reader) in SIXTEEN_BITS and value is not None:
            return REASONS["sixteen"]
    return REASONS["unknown"]


def _source(value: ir.Value | None) -> ir.Node | None:
    """The operator whose values it holds, behind those that move them."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ONLY_MOVE and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _readers(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """The operators that read it, behind those that move it; None for an output of the network."""
    if value.is_graph_output():
        yield value, None
    for use in value.uses():
        if use.node.op_type in ONLY_MOVE:
            yield from _readers(use.node.outputs[0])
        else:
            yield value, use.node
