"""An ONNX file, read as data: whole, of a known version, in float, with all of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper, inliner

from bitwright.errors import ModelError
from bitwright.given.text import short

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


def read_program(path: Path) -> Any:
    """The program in a file, with its functions written out and its tensors in memory.

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
    _load_tensors(program, path)
    if program.functions:
        program = inliner.inline_local_functions(program)
    _check_float(program, path)
    return program


def digest(path: Path) -> str:
    """The sha256 of the file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


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


def _load_tensors(program: Any, path: Path) -> None:
    """Puts tensors that lie in other files into the program; ONNX itself refuses places outside the file's folder."""
    outside = [t for t in external_data_helper._get_all_tensors(program) if external_data_helper.uses_external_data(t)]
    for tensor in outside:
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.resolve().parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
        except Exception as error:
            place = next((e.value for e in tensor.external_data if e.key == "location"), "?")
            raise ModelError(
                f"Expected the tensors of {path} in {place} beside it, cannot read '{tensor.name}' ({short(error)}). "
                "Copy that file too."
            ) from error


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
