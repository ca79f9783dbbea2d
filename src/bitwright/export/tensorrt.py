"""A frozen model as ONNX for TensorRT: pairs of INT8 Q/DQ without zero points, INT8 weights, biases in float.

TensorRT is not run here. The file is checked in ONNX Runtime, whose optimisations are off: those would put kernels of
its own in the place of what TensorRT fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.export.edit import insert_node, shared
from bitwright.export.frame import with_inputs_apart
from bitwright.export.layers import activation_quantizers
from bitwright.export.onnx import QdqForm, opset, to_onnx
from bitwright.export.parity import check_once
from bitwright.export.qdq import replace_integers
from bitwright.export.verdict import Parity
from bitwright.graph.student import Student
from bitwright.quant.quantizer import Frozen, Quantizer
from bitwright.runtimes.session import save_onnx
from bitwright.runtimes.tensorrt import TENSORRT


def check_tensorrt(model: Student) -> None:
    """Makes sure that every quantizer is one that TensorRT has, before the long work.

    Raises:
        UsageError: one is not; with the settings that give others.
    """
    found = sorted(set(_lacking(model)))
    if found:
        raise UsageError(
            f"Expected weights and activations as {TENSORRT.target.name} has them (8 bits, signed, around zero), found "
            f"{' and '.join(found)}. Quantize again with weights=8 activations=8 runtime='{TENSORRT.target.name}'."
        )


def _lacking(model: Student) -> Iterator[str]:
    """What the model has and TensorRT has not, in words."""
    stored = [m.quantizer for m in model.freeze().graph.modules() if isinstance(m, Frozen)]
    for quantizer in (*stored, *activation_quantizers(model).values()):
        if not isinstance(quantizer, Quantizer):
            continue
        what = "weights" if quantizer.role == "weight" else "activations"
        if quantizer.grid.bits not in TENSORRT.target.activation_bits:
            yield f"{what} of {quantizer.grid.bits} bits"
        elif not quantizer.grid.even:
            yield f"{what} of {quantizer.grid.description}"
        elif not quantizer.grid.symmetric:
            yield "activations with codes from 0 to 255"
        if what == "weights" and quantizer.granularity not in TENSORRT.target.convolutions.granularities:
            yield f"one weight scale per {quantizer.granularity}"


def write_tensorrt(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes the file and checks it in ONNX Runtime, layer by layer and as a whole.

    Args:
        model: frozen on the way.
        path: of the ``.onnx`` file.
        images: [N, C, H, W].

    Raises:
        UsageError: :func:`check_tensorrt` says why, or an operator has no translation.
    """
    check_tensorrt(model)
    program = to_onnx(model, TENSORRT.target, FORM)
    save_onnx(with_inputs_apart(program, model), path)
    return check_once(model, program, images)


def _replace_activation(graph: ir.Graph, mark: ir.Node, name: str, quantizer: Quantizer) -> None:
    """A pair on INT8 codes around zero.

    Scales of channels, all powers of two apart, are one scale between two multiplications, which is the same bit for
    bit: TensorRT has one scale per activation.
    """
    source, old = mark.inputs[0], mark.outputs[0]
    assert source is not None
    scale = quantizer.scale.min()
    factors = (quantizer.scale / scale).numpy()
    grid = [
        shared(graph, f"{quantizer.name}/scale", scale.numpy()),
        shared(graph, "zero", np.asarray(0, np.int8)),
    ]
    if factors.size > 1:
        divisors = shared(graph, f"{quantizer.name}/reciprocals", 1 / factors)
        source = insert_node(graph, mark, "Mul", [source, divisors], f"{name}/reduced")
    codes = insert_node(graph, mark, "QuantizeLinear", [source, *grid], f"{name}/codes")
    codes.type, codes.shape = ir.TensorType(ir.DataType.INT8), old.shape
    last = f"{name}/value"
    value = insert_node(graph, mark, "DequantizeLinear", [codes, *grid], last if factors.size == 1 else f"{name}/one")
    if factors.size > 1:
        value = insert_node(graph, mark, "Mul", [value, shared(graph, f"{quantizer.name}/factors", factors)], last)
    value.type, value.shape = old.type, old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(mark, safe=True)


FORM = QdqForm(
    _replace_activation,
    partial(replace_integers, target=TENSORRT.target),
    lambda _: None,
    partial(opset, target=TENSORRT.target),
)
"""Of the file."""
