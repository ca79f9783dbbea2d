"""Operators for which a runtime has one kernel, and which the file defines for every other reader.

ONNX lets a file bring the meaning of an operator along, as a function of standard operators. A runtime that knows the
operator takes its own kernel, any other puts the function in its place.
"""

from __future__ import annotations

import onnx_ir as ir

from bitwright.runtimes.target import Target

DOMAIN = "com.microsoft"
SILU = "QuickGelu"
"""``x * sigmoid(alpha * x)``. ONNX Runtime (1.31) finds it by itself in float networks only: behind codes it reads them
twice, once for either operator, which hides the pattern from it and costs time."""


def join_functions(program: ir.Model, target: Target) -> None:
    """Writes every SiLU as one operator, where the target has a kernel for it."""
    if SILU not in target.kernels:
        return
    found = [pair for node in program.graph if (pair := _silu(node)) is not None]
    for gate, product in found:
        source = gate.inputs[0]
        product.domain, product.op_type = DOMAIN, SILU
        product.resize_inputs(1)
        product.replace_input_with(0, source)
        product.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
        program.graph.remove(gate, safe=True)
    if found:
        function = _silu_function(program.opset_imports[""])
        program.functions[function.identifier()] = function
        program.opset_imports[DOMAIN] = 1


def _silu(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Sigmoid and the product with what it reads, if nothing else reads the Sigmoid."""
    if node.op_type != "Mul" or node.domain:
        return None
    for gate, source in (node.inputs, node.inputs[::-1]):
        made = None if gate is None else gate.producer()
        if gate is None or made is None or made.op_type != "Sigmoid" or made.inputs[0] is not source:
            continue
        if len(gate.uses()) == 1 and not gate.is_graph_output():
            return made, node
    return None


def _silu_function(opset: int) -> ir.Function:
    """What the operator computes, with an alpha of one."""
    x = ir.Value(name="x")
    gate = ir.node("Sigmoid", [x])
    gate.outputs[0].name = "gate"
    product = ir.node("Mul", [x, gate.outputs[0]])
    product.outputs[0].name = "y"
    body = ir.Graph([x], [product.outputs[0]], nodes=[gate, product], opset_imports={"": opset})
    return ir.Function(DOMAIN, SILU, "", graph=body, attributes=[ir.Attr("alpha", ir.AttributeType.FLOAT, None)])
