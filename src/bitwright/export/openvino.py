"""A frozen model as OpenVINO's two files, ``.xml`` and ``.bin``, checked in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bitwright.export.edit import drop_unused, initializer
from bitwright.export.frame import side_by_side_in, with_inputs_apart
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import check_parity
from bitwright.export.recurrent import store_weights
from bitwright.export.verdict import Parity
from bitwright.graph.student import Student
from bitwright.graph.supported import check_supported
from bitwright.runtimes.openvino import OPENVINO, openvino, openvino_file, openvino_session, save_openvino


def check_openvino(model: Student) -> None:
    """Makes sure that OpenVINO is there and has what the model needs, before the long work.

    Raises:
        UsageError: it is not installed, or lacks bits or a granularity; with the nearest that it has.
    """
    openvino()
    check_supported(model.graph, model.layers, model.scheme.model_copy(update={"runtime": OPENVINO.name}))


def write_openvino(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes both files and checks them: layer by layer as converted, and as a whole as they lie there.

    Args:
        model: frozen on the way.
        path: of the ``.xml`` file.
        images: [N, C, H, W].

    Raises:
        UsageError: :func:`check_openvino` says why.
        BitwrightError: an operator has no translation.
    """
    check_openvino(model)
    program = to_onnx(model, OPENVINO.target)
    store_weights(program)
    store_biases(program.graph)
    save_openvino(with_inputs_apart(program, model), path)
    return check_parity(
        model,
        program,
        images,
        name=f"{OPENVINO.name} {OPENVINO.version}",
        opener=openvino_session,
        file=side_by_side_in(openvino_file(path), model),
    )


def store_biases(graph: ir.Graph) -> None:
    """Writes biases as the floats that their integers stand for, in half of the bytes.

    OpenVINO adds every bias in float, also to integer products, and would store a step per channel beside the integers.
    """
    for node in list(graph):
        codes, step = (None if v is None else v.const_value for v in (*node.inputs, None, None)[:2])
        if node.op_type != "DequantizeLinear" or codes is None or step is None or codes.dtype != ir.DataType.INT32:
            continue
        (value,) = node.outputs
        floats = codes.numpy().astype(np.float32) * step.numpy()
        value.replace_all_uses_with(initializer(graph, f"{value.name}/float", floats))
        graph.remove(node, safe=True)
    drop_unused(graph)
