"""An ONNX file, read as data: whole, of a known version, in float, with all of its tensors."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import inliner

from bitwright.errors import ModelError
from bitwright.given.text import short
from bitwright.onnx_in.kinds import short_kinds, widen
from bitwright.onnx_in.patterns import reads
from bitwright.onnx_in.stored import take_tensors
from bitwright.runtimes.session import Array

OPSETS = range(9, 26)
"""Versions of ONNX's operators that are read."""
LARGEST = (1 << 31) - 1
"""Bytes of a file: protocol buffers hold no more. Tensors beside the file may be larger."""
QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger", "QLinearAdd", "QLinearMul", "QGemm", "QAttention", "MatMulNBits",
})  # fmt: skip
"""Operators on integers: who has them has quantized already."""
CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})
STANDARD = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class OnnxProgram:
    """What a file holds.

    Attributes:
        proto: what ONNX has of it, without the data of its large tensors.
        stored: these by name.
        short: the types of few digits in which it computes.
    """

    proto: Any
    stored: dict[str, Array]
    short: tuple[str, ...] = ()


def read_program(path: Path) -> OnnxProgram:
    """The program in a file, its functions written out, its operators in order, bfloat16 as float32.

    Raises:
        ModelError: it is missing, too large, broken, of another version, or quantized already.
    """
    if not path.is_file():
        raise ModelError(f"Expected an ONNX file, {path} does not exist. Check the path.")
    if path.stat().st_size > LARGEST:
        raise ModelError(f"Expected an ONNX file of at most 2 GiB, found {path.stat().st_size} bytes in {path}. "
                         "Save it with its tensors beside it (save_as_external_data=True).")  # fmt: skip
    try:
        program = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ModelError(f"Expected an ONNX file, cannot read {path} ({short(error)}). Export it again.") from error
    if not program.graph.node or not program.opset_import:
        raise ModelError(f"Expected an ONNX file, found no operators in {path}. Export it again.")
    _check_version(program, path)
    program, stored = take_tensors(program, path)
    if program.functions:
        program = inliner.inline_local_functions(program)
    _check_float(program, path)
    kinds = short_kinds(program)
    if "bfloat16" in kinds:
        widen(program.graph, stored, kinds={onnx.TensorProto.BFLOAT16})
    _sort(program.graph, path)
    return OnnxProgram(program, stored, kinds)


def opset_of(program: Any) -> int:
    """Version of ONNX's own operators; 0 if the file uses none."""
    return max((int(each.version) for each in program.opset_import if each.domain in STANDARD), default=0)


def _check_version(program: Any, path: Path) -> None:
    version = opset_of(program)
    if version not in OPSETS:
        raise ModelError(
            f"Expected opset {OPSETS[0]} to {OPSETS[-1]}, found {version} in {path}. "
            "Convert it with onnx.version_converter, or export it again."
        )


def _sort(graph: Any, path: Path) -> None:
    """Puts every node behind those whose tensors it reads, where some writer did not; others stay in their order.

    Raises:
        ModelError: nodes wait for each other.
    """
    for node in graph.node:
        for attribute in node.attribute:
            for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _sort(inside, path)
    makers = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    needs = [{makers[name] for name in reads(node) if name in makers} for node in graph.node]
    if all(max(need, default=-1) < k for k, need in enumerate(needs)):
        return
    order = _in_order(needs)
    if len(order) < len(needs):
        waiting = label_of(graph.node[next(k for k in range(len(needs)) if k not in set(order))])
        raise ModelError(
            f"Expected a graph without loops in {path}, '{waiting}' reads what is computed from it. Export it again, "
            "with another version or exporter."
        )
    nodes = [type(graph.node[k]).FromString(graph.node[k].SerializeToString()) for k in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _in_order(needs: list[set[int]]) -> list[int]:
    """Positions behind those that each needs, the smallest first where several may come; without those in loops."""
    left = [len(need) for need in needs]
    readers: dict[int, list[int]] = {}
    for k, need in enumerate(needs):
        for maker in need:
            readers.setdefault(maker, []).append(k)
    ready = [k for k, count in enumerate(left) if not count]
    order = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for reader in readers.get(k, ()):
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, reader)
    return order


def _check_float(program: Any, path: Path) -> None:
    for node in nodes_of(program.graph):
        if node.op_type in QUANTIZED:
            raise ModelError(
                f"Expected a float network, {path} is quantized already ({node.op_type} at '{label_of(node)}'). "
                "Give the float file that it was made from."
            )


def nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes, those of graphs inside others too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from nodes_of(inside)


def label_of(node: Any) -> str:
    """What the user knows a node by."""
    return str(node.name or next((o for o in node.output if o), node.op_type))
