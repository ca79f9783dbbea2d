"""A frozen model as OpenVINO's two files, ``.xml`` and ``.bin``, checked in OpenVINO."""

from __future__ import annotations

import errno
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from bitwright.export.onnx import to_onnx
from bitwright.export.parity import Parity, check_parity
from bitwright.export.recurrent import store_weights
from bitwright.export.runtimes import converted, openvino, openvino_file, openvino_session
from bitwright.graph.supported import check_supported
from bitwright.quantized import QuantizedModel
from bitwright.speed.runtimes import OPENVINO

INTEGERS = frozenset({"i4", "u4", "i8", "u8", "i16", "u16", "i32"})


def check_openvino(model: QuantizedModel) -> None:
    """Makes sure that OpenVINO is there and has what the model needs, before the long work.

    Raises:
        UsageError: it is not installed, or lacks bits or a granularity; with the nearest that it has.
    """
    openvino()
    check_supported(model.graph, model.layers, model.scheme.model_copy(update={"runtime": OPENVINO.name}))


def save_openvino(program: ir.Model, path: Path) -> None:
    """Writes ``path`` (``.xml``) and the ``.bin`` beside it; integers stay integers, scales stay float32.

    Raises:
        BitwrightError: OpenVINO has no translation for an operator.
    """
    model = converted(program)
    model.set_rt_info(program.metadata_props.get("bitwright", ""), "bitwright")
    try:
        openvino().save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        if "iostream" not in str(error):
            raise
        raise OSError(errno.EIO, "OpenVINO could not write all of it") from error


def write_openvino(model: QuantizedModel, path: Path, images: Tensor) -> Parity:
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
    program = to_onnx(model)
    store_weights(program)
    save_openvino(program, path)
    return check_parity(
        model,
        program,
        images,
        name=f"{OPENVINO.name} {OPENVINO.version}",
        opener=openvino_session,
        file=openvino_file(path),
    )
