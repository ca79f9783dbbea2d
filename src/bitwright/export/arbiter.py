"""Simulation, integer reference and runtime, code by code: which of them errs, in which operator, by how much.

Every layer gets the simulation's own codes, so that a difference belongs to the layer where it is found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, fx

from bitwright.export.clips import codes_of
from bitwright.export.layers import activation_quantizers, cut_at, in_parts, judged_layers, merged, of_images, simulated
from bitwright.export.reference import FLOAT_KERNEL, run_reference
from bitwright.export.verdict import CodeComparison, LayerParity
from bitwright.graph import ops
from bitwright.graph.student import Student
from bitwright.graph.watch import watch
from bitwright.quant.quantizer import Quantizer
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.session import Session

COMPARED_AT_ONCE = 8
OUTPUTS = 100
"""Of one session: the time in which ONNX Runtime optimizes a graph grows with their number times the graph's size."""
CARRIES = frozenset({"Clip", "Transpose", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators of an optimized file that a kernel's codes may pass through."""
PRODUCTS = frozenset({"MatMulNBits", "MatMulIntegerToFloat"})
"""Kernels of an optimized file that end in float, and compute by a rule that is worth naming."""


def compare_codes(model: Student, program: ir.Model, images: Tensor, runtime: str) -> list[CodeComparison]:
    """Simulation, reference and ONNX Runtime (graph optimisations on), layer by layer in program order.

    Args:
        model: frozen.
        program: the file, with the tensor names that bitwright gives.
        images: [N, C, H, W].
        runtime: whose rules the reference takes.
    """
    rows: dict[str, CodeComparison] = {}
    nodes = {n.name: n for n in model.graph.graph.nodes}
    with CutRuntime(model, program) as cut:
        for batch in torch.split(images, COMPARED_AT_ONCE):
            simulated = simulated_codes(model, batch)
            reference = run_reference(model, batch, runtime, feed=simulated).layers
            for name, found in cut.run(simulated, batch).items():
                if name not in rows:
                    kernel = reference[name].kernel
                    rows[name] = CodeComparison(cut.quantizers[name].name, operators(nodes[name]), kernel)
                row, ours = rows[name], reference[name].codes
                row.count += found.numel()
                row.simulation_reference.update(simulated[name], ours)
                row.reference_runtime.update(ours, found)
                row.simulation_runtime.update(simulated[name], found)
        for name, row in rows.items():
            row.found = cut.kernels.get(name, FLOAT_KERNEL)
    return [rows[name] for name in nodes if name in rows]


def compare_kernels(model: Student, program: ir.Model, images: Tensor) -> dict[str, LayerParity]:
    """Every layer in ONNX Runtime, graph optimisations on, by node name: its codes against the simulation's.

    Args:
        model: frozen.
        program: the file, with the tensor names that bitwright gives.
        images: [N, C, H, W].
    """
    with CutRuntime(model, program) as cut:
        found = merged(_compared(model, cut, part) for part in in_parts(model, images))
        return dict(zip(cut.names, found, strict=True))


def _compared(model: Student, cut: CutRuntime, images: Tensor) -> list[LayerParity]:
    passing = simulated(model, images)
    codes = {name: q.codes(passing[name].before) for name, q in cut.quantizers.items()}
    found = {n: (theirs, cut.kernels.get(n, FLOAT_KERNEL)) for n, theirs in cut.run(codes, images).items()}
    return judged_layers(model, images, passing, found)


def operators(node: fx.Node) -> str:
    """What the network computes between the quantizers before and this one, as in ``conv2d relu``."""
    names: list[str] = []
    at = node.args[0]
    while isinstance(at, fx.Node) and at.op == "call_function":
        if ops.base_name(at) not in ops.MOVE or not names:
            names.append(ops.base_name(at))
        if ops.base_name(at) in ops.LINEAR | ops.MATMUL:
            break
        before = [n for n in at.all_input_nodes if n.op == "call_function" and ops.is_float_tensor(n)]
        at = before[-1] if before else None
    return " ".join(reversed(names)) or "input"


def simulated_codes(model: Student, images: Tensor) -> dict[str, Tensor]:
    """The simulation's codes by quantizer node, int32, each in the tensor's shape, for images [N, C, H, W]."""
    found: dict[str, Tensor] = {}
    quantizers = _calibrated(model)
    after = {n.args[0].name: n.name for n in model.graph.graph.nodes if n.name in quantizers}

    def keep(node: fx.Node, value: Any) -> None:
        found[after[node.name]] = quantizers[after[node.name]].codes(value)

    watch(model.graph, images, dict.fromkeys(after, keep))
    return found


class CutRuntime:
    """ONNX Runtime on a file that is cut at every activation's codes; a context manager.

    Attributes:
        quantizers: of activations by node name.
        kernels: the integer kernel that gives each layer's codes; layers without one are left out.
    """

    def __init__(self, model: Student, program: ir.Model) -> None:
        self.quantizers = _calibrated(model)
        self.cut, self.names = _cut_at_codes(program, set(self.quantizers))
        self.kernels: dict[str, str] = {}
        self.sessions: list[tuple[list[str], Session]] = []
        self._exits = ExitStack()

    def __enter__(self) -> CutRuntime:
        if self.names:
            dump = Path(self._exits.enter_context(tempfile.TemporaryDirectory())) / "optimized.onnx"
            for start in range(0, len(self.names), OUTPUTS):
                names = self.names[start : start + OUTPUTS]
                part = self.cut if len(names) == len(self.names) else _part_of(self.cut, names)
                self.sessions.append((names, self._exits.enter_context(session(part, optimize=True, dump=dump))))
                self.kernels |= _kernels(ir.load(dump), names)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def run(self, codes: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Codes of every layer by quantizer node, int32, each fed the given codes of those before it.

        Args:
            codes: int32, by quantizer node.
            images: [N, C, H, W].
        """
        found: dict[str, Tensor] = {}
        for names, opened in self.sessions:
            outputs = opened.run([f"{n}/codes" for n in names], self._feed(opened, codes, images))
            for name, out in zip(names, outputs, strict=True):
                found[name] = torch.from_numpy(out.astype(np.int32)) - _middle(self.quantizers[name])
        return found

    def _feed(self, opened: Session, codes: Mapping[str, Tensor], images: Tensor) -> dict[str, Any]:
        wanted = {i.name for i in opened.get_inputs()}
        feed: dict[str, Any] = dict.fromkeys(of_images(wanted), images.numpy())
        for name, values in codes.items():
            if f"{name}/fed" in wanted:
                quantizer = self.quantizers[name]
                kind = np.uint8 if quantizer.grid.bits <= 8 else np.uint16
                feed[f"{name}/fed"] = (values + _middle(quantizer)).numpy().astype(kind)
        return feed


def _calibrated(model: Student) -> dict[str, Quantizer]:
    return {n: q for n, q in activation_quantizers(model).items() if q.calibrated}


def _middle(quantizer: Quantizer) -> int:
    """What a file adds to signed codes, which it stores unsigned."""
    if not quantizer.grid.symmetric:
        return 0
    return 128 if quantizer.grid.bits <= 8 else 1 << 15


def _cut_at_codes(program: ir.Model, names: set[str]) -> tuple[ir.Model, list[str]]:
    """The file cut at every activation's codes: they are an output, and what reads them reads an input."""
    cut = program.clone()
    return cut, cut_at(cut, names, "/codes", [codes_of(n) for n in cut.graph if n.op_type == "QuantizeLinear"])


def _part_of(cut: ir.Model, names: Iterable[str]) -> ir.Model:
    """Of a file that is cut, what gives these layers' codes."""
    part, wanted = cut.clone(), {f"{name}/codes" for name in names}
    part.graph.outputs[:] = [value for value in part.graph.outputs if value.name in wanted]
    common.RemoveUnusedNodesPass()(part)
    part.graph.inputs[:] = [value for value in part.graph.inputs if value.uses()]
    return part


def _kernels(program: ir.Model, names: Iterable[str]) -> dict[str, str]:
    producers = {value.name: node for node in program.graph for value in node.outputs}
    found = {}
    for name in names:
        node = _behind(producers, producers.get(f"{name}/codes"), CARRIES)
        if node is not None and node.op_type == "QuantizeLinear":
            node = _product(producers, node)
        if node is not None:
            found[name] = node.op_type
    return found


def _behind(producers: dict[str | None, ir.Node], node: ir.Node | None, through: frozenset[str]) -> ir.Node | None:
    while node is not None and node.op_type in through and node.inputs[0] is not None:
        node = producers.get(node.inputs[0].name)
    return node


def _product(producers: dict[str | None, ir.Node], end: ir.Node) -> ir.Node | None:
    """The kernel of :data:`PRODUCTS` between the codes before and these, if one is there."""
    waiting = [end]
    while waiting:
        for value in waiting.pop().inputs:
            node = None if value is None else producers.get(value.name)
            if node is not None and node.op_type in PRODUCTS:
                return node
            if node is not None and node.op_type not in {"DequantizeLinear", "QuantizeLinear"}:
                waiting.append(node)
    return None
