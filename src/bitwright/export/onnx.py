"""A frozen model as an ONNX file: integer initialisers, QuantizeLinear and DequantizeLinear, a free batch size."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.export.direct import translated
from bitwright.export.edit import (
    all_values,
    drop_unused,
    free_name,
    insert_node,
    keep_constants,
    make_way,
    shared,
)
from bitwright.export.forms import rewrite_forms
from bitwright.export.functions import join_functions
from bitwright.export.qdq import NARROW, replace_activation, replace_integers, share_bias_steps, stored_as
from bitwright.given.several import InputPart
from bitwright.graph import ops, rewrite
from bitwright.graph.explain import recorded_line
from bitwright.graph.outputs import Interface
from bitwright.graph.student import Student
from bitwright.quant.quantizer import Frozen, Quantizer
from bitwright.run.files import cannot_write, move, scratch
from bitwright.runtimes.session import save_onnx
from bitwright.runtimes.target import Target

OPSET, OPSET_OF_GELU, OPSET_OF_INT4, OPSET_OF_INT2 = 18, 20, 21, 25
"""The first that PyTorch's exporter writes; the first with Gelu, whose parts ONNX Runtime 1.31 does not join into one
kernel; the first with 4-bit integers, grouped scales and 16-bit codes; the first with 2-bit integers. Older runtimes
read the lower ones."""
IR_VERSIONS = {OPSET: 8, OPSET_OF_GELU: 9, OPSET_OF_INT4: 10, OPSET_OF_INT2: 13}
"""Of the file format: the one that came with each."""
MARK, OFFSET, PART = "Mark", "Offset", "Part"
BATCH_AXIS = "batch"
"""Name of the axis of images where the network was read from no file that has one."""
NAME_OF_VALUES = re.compile(r"val_\d+(_\d+)?")
"""What PyTorch's exporter calls values of its own, and so what files that it wrote call theirs."""
TAKEN_FOR_ZERO = 1e-6
"""Magnitude of numbers whose addition goes past the exporter (onnxscript 0.7 takes up to 1e-8 for zero)."""


@dataclass(frozen=True)
class QdqForm:
    """How a file writes what the quantizers of a model do.

    Args:
        activation: puts something in the place of an activation's mark, which has this name, and removes the mark.
        stored: the same for a stored tensor.
        rewrite: the graph, once no mark is left.
        opset: the version of ONNX's operators that the file of a model needs.
    """

    activation: Callable[[ir.Graph, ir.Node, str, Quantizer], None]
    stored: Callable[[ir.Graph, ir.Node, str, Frozen], None]
    rewrite: Callable[[ir.Graph], None]
    opset: Callable[[Student], int]


def to_onnx(model: Student, target: Target | None = None, form: QdqForm | None = None) -> ir.Model:
    """The model in ONNX, in memory, for the runtime that it was quantized for, or for another that reads ONNX.

    PyTorch's exporter translates the operators; quantizers pass through it as marks, which are then replaced by
    integers and Q/DQ pairs. Weights of up to 4 bits are stored as INT4 (those of 2 bits as INT2 where the runtime
    reads that), wider ones as INT8; activations as
    UINT8 or UINT16, with a Clip where their bits are fewer, on the codes wherever that is exact
    (:mod:`bitwright.export.clips`). Clamping activations become such a Clip, or nothing if it would cover the type.

    Raises:
        UsageError: an operator has no translation; it is named.
    """
    marked, modules = _mark(model)
    target = target or model.scheme.target
    written = form or QdqForm(
        replace_activation, partial(replace_integers, target=target), rewrite_forms, lambda m: opset(m, target)
    )
    program = _translate(marked, torch.zeros(2, *model.input_shape), written.opset(model))
    _forget_provenance(program)
    _replace_marks(program, modules, written)
    if form is None:
        join_functions(program, target)
    share_bias_steps(program.graph)
    _rename_outputs(program, model)
    program.producer_name, program.producer_version = "bitwright", __version__
    program.metadata_props.update(_metadata(model))
    return program


def write_onnx(program: ir.Model, path: Path) -> None:
    """As :func:`save_onnx`, whole or not at all: the tensors beside the file come first, the file that names them last.

    Raises:
        BitwrightError: it cannot be written.
    """
    try:
        with scratch(path.parent) as folder:
            save_onnx(program, folder / path.name)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                move(file, path.parent / file.name)
    except OSError as error:
        raise cannot_write(path, error) from error


def _forget_provenance(program: ir.Model) -> None:
    """Takes out the exporter's notes, which hold source lines and paths of this machine."""
    program.metadata_props.clear()
    program.graph.metadata_props.clear()
    for node in program.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*program.graph.inputs, *program.graph.initializers.values()):
        value.metadata_props.clear()


def described(model: Student) -> dict[str, Any]:
    """How the model was made, as files keep it: no command and no paths, so that a repeated run gives the same file."""
    keep: dict[str, Any] = {k: model.result[k] for k in ("recipe", "bits", "seed") if k in model.result}
    about = model.result.get("model", {})
    keep["model"] = {k: about[k] for k in ("name", "parameters", "macs") if k in about}
    return keep | {"runtime": model.scheme.runtime}


def _metadata(model: Student) -> dict[str, str]:
    return {"bitwright": json.dumps(described(model))}


def _mark_tensor(x: Tensor, name: str) -> Tensor:
    """Stands for a quantizer while the graph is translated."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"bitwright::{MARK}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return result


def _offset(x: Tensor, number: float) -> Tensor:
    """Stands for the addition of a number that PyTorch's exporter takes for zero and leaves out."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"bitwright::{OFFSET}", (x,), {"number": number}, dtype=x.dtype, shape=x.shape, version=1
    )
    return result


def _part(x: Tensor, name: str) -> Tensor:
    """Stands for an input out of the tensor that holds several, which the exporter's optimizer would hide."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"bitwright::{PART}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return result


SYMBOLS = {_mark_tensor: (MARK, "name"), _offset: (OFFSET, "number"), _part: (PART, "name")}
"""What stands for operators of bitwright's while a graph is translated, and the attribute that each has."""


def _keep_parts(graph: fx.Graph, parts: Mapping[str, InputPart]) -> None:
    for node in [n for n in graph.nodes if n.name in parts]:
        with graph.inserting_after(node):
            kept = graph.call_function(_part, (node, parts[node.name].name))
        kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)


def _keep_offsets(graph: fx.Graph) -> None:
    """Takes the additions of tiny numbers, which keep divisors away from zero, past the exporter's optimizer."""
    for node in list(graph.nodes):
        if node.op != "call_function" or ops.base_name(node) not in ops.ADD or node.kwargs or len(node.args) != 2:
            continue
        x, number = node.args
        if not isinstance(x, fx.Node) or not isinstance(number, float) or not 0 < abs(number) <= TAKEN_FOR_ZERO:
            continue
        with graph.inserting_before(node):
            kept = graph.call_function(_offset, (x, number if ops.base_name(node) == "add" else -number))
        kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept)
        graph.erase_node(node)


def _mark(model: Student) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    """A copy of the graph with marks for quantizers; the module behind each mark.

    No mark stands for a quantizer whose grid is not even: its float operators are translated as they are, and what it
    stores is written as floats.
    """
    graph = model.freeze().graph
    marked = copy.deepcopy(graph, memo={id(t): t for t in [*graph.buffers(), *graph.parameters()]})
    modules: dict[str, nn.Module] = {}
    for node in list(marked.graph.nodes):
        if node.op != "call_module":
            continue
        module = marked.get_submodule(str(node.target))
        if not _is_even(module):
            if not node.args:
                with marked.graph.inserting_before(node):
                    node.replace_all_uses_with(_float_value(marked, node, module))
                marked.graph.erase_node(node)
            continue
        modules[node.name] = module
        with marked.graph.inserting_before(node):
            source = node.args[0] if node.args else _stand_in(marked, node, module)
            mark = marked.graph.call_function(_mark_tensor, (source, node.name))
        mark.meta = dict(node.meta)
        node.replace_all_uses_with(mark)
        marked.graph.erase_node(node)
    _keep_parts(marked.graph, model.parts)
    _split_batches(marked.graph)
    _keep_offsets(marked.graph)
    _make_names_free(marked)
    marked.recompile()
    return marked, modules


def _make_names_free(marked: fx.GraphModule) -> None:
    """Stores under other names the tensors whose names the exporter gives to its own values."""
    for node in marked.graph.nodes:
        if node.op == "get_attr" and NAME_OF_VALUES.fullmatch(str(node.target)):
            kept = f"stored_{node.target}"
            rewrite.set_tensor(marked, kept, rewrite.get_tensor(marked, str(node.target)))
            node.target = kept


def _is_even(module: nn.Module) -> bool:
    quantizer = module.quantizer if isinstance(module, Frozen) else module
    return not isinstance(quantizer, Quantizer) or quantizer.grid.even


def _split_batches(graph: fx.Graph) -> None:
    """Writes the cutting of a batch into equal parts, which ``forward`` made of one, in the operator that says so.

    PyTorch's exporter fails on parts whose size it does not know (2.13); the number of parts it does know.
    """
    for node in graph.nodes:
        if node.op != "call_function" or ops.base_name(node) not in {"chunk", "split", "split_with_sizes"}:
            continue
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        parts = cast("list[Tensor]", ops.value(node))
        sizes = {int(part.shape[0]) for part in parts}
        if axis in {0, -parts[0].dim()} and len(sizes) == 1:
            node.target = torch.ops.aten.tensor_split.sections
            node.args, node.kwargs = (node.args[0], len(parts), 0), {}


def _float_value(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node:
    assert isinstance(module, Frozen)
    target = f"value_{node.name}"
    rewrite.set_tensor(graph, target, module())
    return graph.graph.get_attr(target)


def _stand_in(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node:
    """A tensor of the shape of what is stored, which takes no memory: the mark behind it tells what it holds."""
    assert isinstance(module, Frozen)
    target = f"value_{node.name}"
    rewrite.set_tensor(graph, target, torch.zeros(()).expand(module.codes.shape))
    return graph.graph.get_attr(target)


def opset(model: Student, target: Target | None = None) -> int:
    """The lowest version of ONNX's operators that has all the model needs, and that costs nothing in speed."""
    needed = [OPSET_OF_GELU if any(ops.base_name(n) == "gelu" for n in model.graph.graph.nodes) else OPSET]
    for module in model.freeze().graph.modules():
        if isinstance(module, Frozen) and isinstance(module.quantizer, Quantizer):
            kind = stored_as(module.quantizer, target or model.scheme.target)
            if kind in {ir.DataType.INT2, ir.DataType.UINT2}:
                needed.append(OPSET_OF_INT2)
            elif kind in NARROW or _in_blocks(module):
                needed.append(OPSET_OF_INT4)
        elif isinstance(module, Quantizer) and module.calibrated and module.grid.bits > 8:
            needed.append(OPSET_OF_INT4)
    return max(needed)


def _in_blocks(frozen: Frozen) -> bool:
    """Whether its scales are others than one, or one for each index of an axis."""
    quantizer = frozen.quantizer
    assert isinstance(quantizer, Quantizer)
    if quantizer.scale.numel() == 1 or quantizer.block is None:
        return False
    return [b for b, d in zip(quantizer.block, frozen.codes.shape, strict=True) if b < d] != [1]


def _translate(marked: fx.GraphModule, example: Tensor, version: int) -> ir.Model:
    for library in ("torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.ERROR)
    program = translated(marked, example, SYMBOLS, version) or _exported(marked, example, version)
    keep_constants(program.graph)
    program.graph.inputs[0].name = "images"
    program.ir_version = IR_VERSIONS[version]
    return program


def _exported(marked: fx.GraphModule, example: Tensor, version: int) -> ir.Model:
    """By PyTorch's exporter, whatever is in the graph."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                marked,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                opset_version=version,
                verbose=False,
            )
    except Exception as error:
        raise UsageError(f"This network cannot be written as ONNX: {_reason(error, marked)}.") from error
    assert program is not None
    return program.model


def _reason(error: BaseException, graph: fx.GraphModule) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    unknown = re.search(r"OpOverload\(op='(?:\w+\.)?_?(\w+)", text)
    if unknown is not None:
        return f"PyTorch has no ONNX form for {_operator(unknown[1], graph)}. Write it in other operators"
    if "SymbolicTensor" in text:
        return (
            "a setting of an operator, such as the groups of a convolution, depends on the number of images or on "
            "their values. Write it as a product of matrices"
        )
    return text


def _operator(name: str, graph: fx.GraphModule) -> str:
    """The operator as the user wrote it, with the line."""
    short = name.removesuffix("_forward")
    found = [n for n in graph.graph.nodes if n.op == "call_function" and short in ops.base_name(n)]
    return f"'{ops.base_name(found[0])}'{recorded_line(found[0])}" if found else f"'{name}'"


def _rename_outputs(program: ir.Model, model: Student) -> None:
    if model.interface is not None:
        _rename_as_given(program, model.outputs, model.interface)
        return
    ends = program.graph.outputs
    taken = {v.name for v in all_values(program.graph) if not (v in ends and v.is_initializer())}
    for value, name in zip(program.graph.outputs, model.outputs, strict=True):
        value.name = free_name(name, taken)
        taken.add(value.name)
    _rename_axis(program.graph, BATCH_AXIS)


def _rename_as_given(program: ir.Model, outputs: tuple[str, ...], names: Interface) -> None:
    """Gives input and outputs the names of the user's own file; inner tensors make way."""
    graph = program.graph
    ends = [*zip(graph.inputs, [names.input], strict=True)]
    ends += zip(graph.outputs, [names.outputs.get(name, name) for name in outputs], strict=True)
    make_way(graph, {name for _, name in ends}, [value for value, _ in ends], "/inner")
    for value, name in ends:
        value.name = name
    _rename_axis(graph, names.axis)


def _rename_axis(graph: ir.Graph, name: str) -> None:
    """Gives the number of images the name that it has in the user's file, in every shape that tells of it."""
    images = graph.inputs[0].shape
    if images is None or not isinstance(images[0], ir.SymbolicDim) or images[0].value is None:
        return
    symbol = re.compile(rf"\b{re.escape(images[0].value)}\b")
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed_side(side, symbol, name) for side in value.shape])


def _renamed_side(side: int | ir.SymbolicDim, symbol: re.Pattern[str], name: str) -> int | ir.SymbolicDim:
    if isinstance(side, int) or side.value is None:
        return side
    return ir.SymbolicDim(symbol.sub(lambda _: name, side.value))


def _replace_marks(program: ir.Model, modules: dict[str, nn.Module], form: QdqForm) -> None:
    graph = program.graph
    for node in list(graph):
        if node.op_type == PART and node.domain == "bitwright":
            _replace_part(graph, node)
        if node.op_type == OFFSET and node.domain == "bitwright":
            _replace_offset(graph, node)
        if node.op_type != MARK or node.domain != "bitwright":
            continue
        name = node.attributes["name"].as_string()
        module = modules[name]
        if isinstance(module, Frozen):
            form.stored(graph, node, name, module)
        else:
            assert isinstance(module, Quantizer)
            form.activation(graph, node, name, module)
    form.rewrite(graph)
    program.opset_imports.pop("bitwright", None)
    drop_unused(graph)


def _replace_part(graph: ir.Graph, node: ir.Node) -> None:
    """A value that is named as the part, until the file has it as an input (:mod:`bitwright.export.frame`)."""
    name = node.attributes["name"].as_string()
    value = insert_node(graph, node, "Identity", [node.inputs[0]], f"{name}/part")
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(value)
    graph.remove(node, safe=True)


def _replace_offset(graph: ir.Graph, mark: ir.Node) -> None:
    source, old = mark.inputs[0], mark.outputs[0]
    assert source is not None
    number = np.asarray(mark.attributes["number"].as_float(), np.float32)
    name = old.name or "offset"
    value = insert_node(graph, mark, "Add", [source, shared(graph, f"offset/{number:g}", number)], f"{name}/added")
    value.type, value.shape = old.type, old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(mark, safe=True)
