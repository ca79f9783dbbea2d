"""Recurrent operators for OpenVINO, which takes their weights as constants alone."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.export.edit import drop_unused, initializer
from bitwright.runtimes.onnxruntime import session

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
WEIGHTS = (1, 2, 3)
"""Inputs of these operators: the weights of the inputs, those of the states, the biases."""


def store_weights(program: ir.Model) -> None:
    """Stores what the weights of recurrent operators come to, in float32, where they are computed from integers.

    OpenVINO 2026.4 refuses weights that are computed, or, its optimisations on, computes something else with them. The
    numbers stay those of the integers; the file has four bytes for each.
    """
    graph = program.graph
    computed = {
        value.name: value
        for node in graph
        if node.op_type in RECURRENT
        for value in (node.inputs[i] for i in WEIGHTS if i < len(node.inputs))
        if value is not None and value.const_value is None and _from_constants(value)
    }
    if not computed:
        return
    part = program.clone()
    found = {v.name: v for node in part.graph for v in node.outputs}
    part.graph.outputs.clear()
    part.graph.outputs.extend(found[name] for name in computed)
    drop_unused(part.graph)
    part.graph.inputs.clear()
    with session(part, optimize=False) as runtime:
        arrays = runtime.run(None, {})
    for value, array in zip(computed.values(), arrays, strict=True):
        stored = initializer(graph, f"{value.name}/stored", array)
        value.replace_all_uses_with(stored)
    drop_unused(graph)


def _from_constants(value: ir.Value) -> bool:
    """Whether nothing that it is computed from depends on the images."""
    waiting, seen = [value], set()
    while waiting:
        at = waiting.pop()
        if at.is_graph_input():
            return False
        node = at.producer()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [v for v in node.inputs if v is not None and v.const_value is None]
    return True
