"""A float ONNX file and, beside it, the grids of its tensors as AIMET writes them and Qualcomm's converters read them.

The format is version 0.6.1 of AIMET's encodings: of every tensor the bits, the scale, and the offset that is added to
codes from 0 on. Tensors have the names that they have in ``model.onnx``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.export.edit import initializer, insert_node
from bitwright.export.layers import activation_quantizers
from bitwright.export.onnx import OPSET, OPSET_OF_GELU, QdqForm, to_onnx
from bitwright.export.parity import check_once
from bitwright.export.verdict import Parity
from bitwright.graph import ops
from bitwright.graph.student import Student
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.run.files import write_json
from bitwright.runtimes.session import Array, save_onnx

Encoding = dict[str, Any]

VERSION, SUFFIX = "0.6.1", ".encodings"
LEAST_BITS, BIAS_BITS = 4, 32


def check_encodings(model: Student) -> None:
    """Makes sure that the format has every grid of the model, before the long work.

    Raises:
        UsageError: it lacks one; with the setting that gives another.
    """
    stored = [m.quantizer for m in model.freeze().graph.modules() if isinstance(m, Frozen)]
    for quantizer in (*stored, *activation_quantizers(model).values()):
        if not isinstance(quantizer, Quantizer):
            continue
        what = "weights" if quantizer.role == "weight" else "activations"
        if quantizer.grid.bits < LEAST_BITS:
            raise UsageError(
                f"Expected {what} of {LEAST_BITS} bits or more, which encodings {VERSION} have, found "
                f"{quantizer.grid.bits} in '{quantizer.name}'. Quantize again with {what}={LEAST_BITS}."
            )
        if not quantizer.grid.even:
            raise UsageError(
                f"Expected even steps, which encodings {VERSION} have, found {quantizer.grid.description} in "
                f"'{quantizer.name}'. Quantize again with activation_grid='affine'."
            )
        if what == "weights" and quantizer.granularity not in {"channel", "tensor"}:
            raise UsageError(
                f"Expected one weight scale per channel or tensor, which encodings {VERSION} have, found one per "
                f"{quantizer.granularity} in '{quantizer.name}'. Quantize again with granularity='channel'."
            )
        if sum(b < d for b, d in zip(quantizer.block or (), quantizer.shape, strict=False)) > 1:
            raise UsageError(
                f"Expected weight scales along one axis, which encodings {VERSION} have, found two in the groups of "
                f"'{quantizer.name}'. Quantize again with granularity='tensor'."
            )
        if what == "activations" and quantizer.scale.numel() > 1:
            raise UsageError(
                f"Expected one scale per activation, which encodings {VERSION} have, found {quantizer.scale.numel()} "
                f"in '{quantizer.name}'. Quantize again with a recipe without norm_inputs: ptf."
            )


def write_encodings(model: Student, path: Path, images: Tensor) -> Parity:
    """Writes both files, and runs the float file in ONNX Runtime with the grids that the other one names put into it.

    Args:
        model: frozen on the way.
        path: of the ``.onnx`` file; the other one has its name and ends in ``.encodings``.
        images: [N, C, H, W].

    Raises:
        UsageError: :func:`check_encodings` says why, or an operator has no translation.
    """
    check_encodings(model)
    noted = _Noted()
    program = to_onnx(model, form=QdqForm(noted.activation, noted.stored, lambda _: None, _opset))
    save_onnx(program, path)
    write_json(path.with_suffix(SUFFIX), _document(noted))
    return check_once(model, simulated_program(path), images)


def _opset(model: Student) -> int:
    """As low as the float operators allow."""
    return OPSET_OF_GELU if any(ops.base_name(n) == "gelu" for n in model.graph.graph.nodes) else OPSET


class _Noted:
    """Takes marks out of a graph, and keeps which tensor was on which grid."""

    def __init__(self) -> None:
        self.activations: list[tuple[ir.Value, Quantizer]] = []
        self.parameters: list[tuple[ir.Value, Frozen]] = []

    def activation(self, graph: ir.Graph, mark: ir.Node, name: str, quantizer: Quantizer) -> None:
        """The tensor before the mark gets the name that it has in a file with quantizers."""
        source = mark.inputs[0]
        assert source is not None
        if not source.is_graph_input():
            source.name = f"{name}/value"
        mark.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(mark, safe=True)
        self.activations.append((source, quantizer))

    def stored(self, graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen) -> None:
        """The values that the integers stand for; a transposition of them is done in the file already."""
        old, values = mark.outputs[0], frozen().contiguous().numpy()
        for node in [use.node for use in old.uses() if use.node.op_type == "Transpose"]:
            order = list(node.attributes["perm"].as_ints())
            turned = initializer(graph, f"{name}/transposed", np.ascontiguousarray(values.transpose(order)))
            node.outputs[0].replace_all_uses_with(turned)
            graph.remove(node, safe=True)
            self.parameters.append((turned, frozen))
        if old.uses() or old.is_graph_output():
            value = initializer(graph, name, values)
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            self.parameters.append((value, frozen))
        graph.remove(mark, safe=True)


# ------------------------------------------------------------------------------------------- the encodings


def _document(noted: _Noted) -> dict[str, Any]:
    """The content of the file."""
    weights = [f.quantizer for _, f in noted.parameters if isinstance(f.quantizer, Quantizer)]
    return {
        "version": VERSION,
        "activation_encodings": {str(v.name): list(encodings(q)) for v, q in noted.activations},
        "param_encodings": {str(v.name): list(encodings(f.quantizer)) for v, f in noted.parameters},
        "quantizer_args": {
            "activation_bitwidth": max((q.grid.bits for _, q in noted.activations), default=32),
            "dtype": "int",
            "is_symmetric": "True",
            "param_bitwidth": max((q.grid.bits for q in weights), default=32),
            "per_channel_quantization": str(any(q.granularity == "channel" for q in weights)),
            "quant_scheme": "post_training_tf",
        },
        "producer": f"bitwright {__version__}",
    }


def encodings(quantizer: Quantizer | BiasQuantizer) -> Iterator[Encoding]:
    """One encoding per scale.

    Example:
        >>> import torch
        >>> from bitwright.quant.grid import Grid
        >>> q = Quantizer("x", Grid(8), "activation")
        >>> q.set_range(torch.tensor(0.5), torch.tensor(10.0))
        >>> [(e["offset"], e["min"], e["max"]) for e in encodings(q)]
        [(-10, -5.0, 122.5)]
    """
    bits, low, symmetric = BIAS_BITS, -(1 << (BIAS_BITS - 1)), True
    zeros = [0] * quantizer.scale.numel()
    if isinstance(quantizer, Quantizer):
        bits, low, symmetric = quantizer.grid.bits, quantizer.grid.qmin, quantizer.grid.symmetric
        zeros = [int(z) for z in quantizer.zero_point]
    for scale, zero in zip(quantizer.scale.tolist(), zeros, strict=True):
        offset = low - zero
        yield {
            "dtype": "int",
            "bitwidth": bits,
            "is_symmetric": str(symmetric),
            "min": offset * scale,
            "max": (offset + (1 << bits) - 1) * scale,
            "offset": offset,
            "scale": scale,
        }


# ----------------------------------------------------------------------------------------------- the check


def simulated_program(path: Path) -> ir.Model:
    """The float file there, with a fake quantizer at each tensor that the encodings beside it name.

    Args:
        path: of the ``.onnx`` file.
    """
    program = ir.load(path)
    found = json.loads(path.with_suffix(SUFFIX).read_text(encoding="utf-8"))
    graph = program.graph
    values = {v.name: v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}
    for name, (encoding,) in found["activation_encodings"].items():
        _quantize(graph, values[name], encoding)
    for name, each in found["param_encodings"].items():
        value = graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(_on_grid(value.const_value.numpy(), each, _channels(value)), name=name)
    graph.sort()
    return program


def _quantize(graph: ir.Graph, value: ir.Value, encoding: Encoding) -> None:
    """Puts every reader of a value behind operators that round it, whose result takes over its name."""
    name, readers, is_output = str(value.name), [(u.node, u.idx) for u in value.uses()], value.is_graph_output()
    codes = float((1 << encoding["bitwidth"]) - 1)
    numbers = {"scale": encoding["scale"], "zero": -encoding["offset"], "lowest": 0.0, "highest": codes}
    at = {k: initializer(graph, f"{name}/{k}", np.asarray(v, np.float32)) for k, v in numbers.items()}
    value.name = name if value.is_graph_input() else f"{name}/before"
    steps: list[tuple[str, list[str]]] = [
        ("Div", ["scale"]),
        ("Round", []),
        ("Add", ["zero"]),
        ("Clip", ["lowest", "highest"]),
        ("Sub", ["zero"]),
        ("Mul", ["scale"]),
    ]
    result = value
    for op, given in steps:
        result = insert_node(graph, graph[-1], op, [result, *(at[k] for k in given)], f"{name}/{op}")
        result.type, result.shape = value.type, value.shape
    if not value.is_graph_input():
        result.name = name
    for node, position in readers:
        node.replace_input_with(position, result)
    if is_output:
        graph.outputs[:] = [result if v is value else v for v in graph.outputs]


def _on_grid(values: Array, each: list[Encoding], axis: int) -> Array:
    """A stored tensor on its grids: one, or one for each index of the axis."""
    shape = [-1 if d == axis % max(values.ndim, 1) else 1 for d in range(values.ndim)] if len(each) > 1 else []
    scale = np.asarray([e["scale"] for e in each], np.float64).reshape(shape)
    offset = np.asarray([e["offset"] for e in each], np.float64).reshape(shape)
    codes = np.clip(np.rint(values / scale) - offset, 0, 2.0 ** each[0]["bitwidth"] - 1)
    return ((codes + offset).astype(np.float32) * scale.astype(np.float32)).astype(np.float32)


def _channels(value: ir.Value) -> int:
    """The axis of a stored tensor along which output channels lie, as its reader has them."""
    reader = value.consumers()[0]
    if reader.op_type == "ConvTranspose":
        return 1
    turned = "transB" in reader.attributes and bool(reader.attributes["transB"].as_int())
    return -1 if reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not turned) else 0
