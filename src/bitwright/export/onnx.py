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

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.export import clips
from bitwright.export.clips import READS_INTEGER_BIAS, Span
from bitwright.export.direct import translated
from bitwright.export.edit import (
    all_values,
    drop_unused,
    free_name,
    initializer,
    insert_node,
    keep_constants,
    make_way,
    shared,
)
from bitwright.export.forms import rewrite_forms
from bitwright.export.functions import join_functions
from bitwright.given.several import InputPart
from bitwright.graph import ops, rewrite
from bitwright.graph.explain import recorded_line
from bitwright.graph.outputs import Interface
from bitwright.graph.student import Student
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.run.files import cannot_write, move, scratch
from bitwright.runtimes.session import save_onnx
from bitwright.runtimes.target import Target

OPSET, OPSET_OF_GELU, OPSET_OF_INT4, OPSET_OF_INT2 = 18, 20, 21, 25
"""The first that PyTorch's exporter writes; the first with Gelu, whose parts ONNX Runtime 1.31 does not join into one
kernel; the first with 4-bit integers, grouped scales and 16-bit codes; the first with 2-bit integers. Older runtimes
read the lower ones."""
IR_VERSIONS = {OPSET: 8, OPSET_OF_GELU: 9, OPSET_OF_INT4: 10, OPSET_OF_INT2: 13}
"""Of the file format: the one that came with each."""
NEEDS_ZERO_POINT = frozenset({"Gemm"})
"""Operators whose integer kernels ONNX Runtime 1.31 does not take without a stored zero point of the weight."""
MARK, OFFSET, PART = "Mark", "Offset", "Part"
BATCH_AXIS = "batch"
"""Name of the axis of images where the network was read from no file that has one."""
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
        _replace_activation, partial(replace_integers, target=target), rewrite_forms, lambda m: opset(m, target)
    )
    program = _translate(marked, torch.zeros(2, *model.input_shape), written.opset(model))
    _forget_provenance(program)
    _replace_marks(program, modules, written)
    if form is None:
        join_functions(program, target)
    _share_bias_steps(program.graph)
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
    marked.recompile()
    return marked, modules


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


def stored_as(quantizer: Quantizer, target: Target) -> ir.DataType:
    """The ONNX type of a weight's codes in a file.

    Two bits are stored as such where the codes are shifted, which leaves 8 bits; as they are, ONNX Runtime (1.31) puts
    them into kernels that do not read them.
    """
    return storage(quantizer.grid, min(target.stores) if quantizer.shift else 4)


def storage(grid: Grid, smallest: int) -> ir.DataType:
    """The smallest ONNX type of at least that many bits that holds the grid's codes."""
    if max(grid.bits, smallest) <= 2:
        return ir.DataType.INT2 if grid.symmetric else ir.DataType.UINT2
    if max(grid.bits, smallest) <= 4:
        return ir.DataType.INT4 if grid.symmetric else ir.DataType.UINT4
    if grid.bits <= 8:
        return ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8
    return ir.DataType.INT16 if grid.symmetric else ir.DataType.UINT16


NARROW = frozenset({ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.INT4, ir.DataType.UINT4})
"""Integers of fewer than 8 bits, several of which share a byte."""
_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.INT2: ml_dtypes.int2,
    ir.DataType.UINT2: ml_dtypes.uint2,
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT16: np.int16,
    ir.DataType.UINT16: np.uint16,
}


def _replace_activation(graph: ir.Graph, mark: ir.Node, name: str, quantizer: Quantizer) -> None:
    """QuantizeLinear and DequantizeLinear; Clip between or before them where codes are fewer than the type has.

    Signed grids are stored as unsigned ones with a zero point in the middle, the same values: ONNX Runtime turns
    signed activations into those on x86 anyway, and fails when a reshape stands between (1.31).

    Scales of channels are written as one scale between a division and a multiplication by powers of two, which is the
    same bit for bit. ONNX has per-axis scales, but ONNX Runtime puts them into kernels that take a single one (1.31:
    QLinearAdd, QLinearMul, QLinearMatMul, QLinearSoftmax and its tables), and does not load the file.
    """
    source, old = mark.inputs[0], mark.outputs[0]
    assert source is not None
    grid, kind = quantizer.grid, storage(Grid(quantizer.grid.bits), smallest=8)
    scale, zero = quantizer.scale.min().numpy(), quantizer.zero_point.reshape(()).numpy()
    middle = (128 if kind == ir.DataType.UINT8 else 32768) if grid.symmetric else 0
    step = shared(graph, f"{quantizer.name}/scale", scale)
    point = shared(graph, f"{quantizer.name}/zero_point", (zero + middle).astype(_NUMPY[kind]))
    factors = (quantizer.scale / quantizer.scale.min()).numpy()
    span = Span(scale, int(zero) + middle, grid.qmin + middle, grid.qmax + middle)
    on_codes = kind == ir.DataType.UINT8  # no Clip on UINT16 in ONNX Runtime 1.31
    clamp = None
    if factors.size > 1:
        divisors = shared(graph, f"{quantizer.name}/reciprocals", 1 / factors)
        source = insert_node(graph, mark, "Mul", [source, divisors], f"{name}/reduced")
    elif on_codes:
        source, clamp = clips.clamp_before(source)
    if not on_codes and grid.bits not in {8, 16}:
        ends = [
            shared(graph, f"{quantizer.name}/{e}", span.value(c)) for e, c in (("low", span.low), ("high", span.high))
        ]
        source = insert_node(graph, mark, "Clip", [source, *ends], f"{name}/clipped")
    codes = _codes(graph, mark, name, [source, step, point], old.shape, span if on_codes else None, clamp)
    output = f"{name}/value"
    value = insert_node(
        graph, mark, "DequantizeLinear", [codes, step, point], output if factors.size == 1 else f"{name}/one"
    )
    if factors.size > 1:
        value = insert_node(graph, mark, "Mul", [value, shared(graph, f"{quantizer.name}/factors", factors)], output)
    value.type, value.shape = old.type, old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(mark, safe=True)


def _codes(
    graph: ir.Graph,
    mark: ir.Node,
    name: str,
    inputs: list[ir.Value],
    shape: ir.Shape | None,
    span: Span | None,
    clamp: clips.Clamp | None,
) -> ir.Value:
    """QuantizeLinear, and a Clip of its 8-bit codes where span and clamp leave fewer of them."""
    left = span.within(clamp) if span is not None and clamp is not None else span
    narrow = left is not None and (left.low, left.high) != (0, 255)
    codes = insert_node(graph, mark, "QuantizeLinear", inputs, f"{name}/{'rounded' if narrow else 'codes'}")
    assert inputs[2].dtype is not None
    codes.type, codes.shape = ir.TensorType(inputs[2].dtype), shape
    if clamp is not None:
        clips.note(codes, clamp)
    if left is None or not narrow:
        return codes
    ends = [shared(graph, f"code/{c}", np.asarray(c, np.uint8)) for c in (left.low, left.high)]
    clipped = insert_node(graph, mark, "Clip", [codes, *ends], f"{name}/codes")
    clipped.type, clipped.shape = codes.type, shape
    return clipped


def replace_integers(graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen, target: Target) -> None:
    """Integers and DequantizeLinear; a transposition of the weight is done in the file already."""
    old = mark.outputs[0]
    if isinstance(frozen.quantizer, BiasQuantizer):
        readers = {use.node.op_type for use in old.uses()}
        value = _integer_bias(graph, mark, name, frozen) if readers <= READS_INTEGER_BIAS else None
        value = value or initializer(graph, name, frozen().numpy())
    else:
        transposed = [use.node for use in old.uses() if use.node.op_type == "Transpose"]
        for node in transposed:
            order = list(node.attributes["perm"].as_ints())
            turned = _integers(graph, mark, f"{name}/transposed", frozen, order, target)
            node.outputs[0].replace_all_uses_with(turned)
            graph.remove(node, safe=True)
        value = _integers(graph, mark, name, frozen, None, target) if old.uses() or old.is_graph_output() else None
    if value is not None:
        value.shape, value.type = old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(mark, safe=True)


def _integer_bias(graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen) -> ir.Value:
    quantizer = frozen.quantizer
    scale = quantizer.scale.numpy()
    codes = initializer(graph, f"{name}/integers", frozen.codes.numpy().astype(np.int32))
    if scale.size == 1:
        return insert_node(
            graph,
            mark,
            "DequantizeLinear",
            [codes, initializer(graph, f"{name}/scale", scale.reshape(()))],
            name,
        )
    step = initializer(graph, f"{name}/scale", scale)
    return insert_node(graph, mark, "DequantizeLinear", [codes, step], name, axis=0)


def _share_bias_steps(graph: ir.Graph) -> None:
    """Leaves to the runtime, which does it once, the product of two stored steps that the step of a bias is."""
    for node in list(graph):
        if node.op_type not in {"Conv", "Gemm"} or len(node.inputs) < 3:
            continue
        given, weight, bias = (clips.dequantized(v) for v in node.inputs[:3])
        if given is None or weight is None or bias is None or bias.inputs[0].dtype != ir.DataType.INT32:
            continue
        parts, step = [given.inputs[1], weight.inputs[1]], bias.inputs[1]
        if step is None or step.const_value is None or step.const_value.size < 2 or len(step.uses()) > 1:
            continue
        arrays = [p.const_value.numpy() for p in parts if p is not None and p.const_value is not None]
        if len(arrays) == 2 and np.array_equal(arrays[0] * arrays[1], step.const_value.numpy()):
            product = insert_node(graph, bias, "Mul", parts, f"d{len(graph)}", named=False)
            product.const_value = step.const_value
            bias.replace_input_with(1, product)
    drop_unused(graph)


def _integers(
    graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen, order: list[int] | None, target: Target
) -> ir.Value:
    quantizer = frozen.quantizer
    assert isinstance(quantizer, Quantizer)
    if quantizer.head_axis == 1 and quantizer.scale.numel() > 1:
        return _columns(graph, mark, name, frozen, order, stored_as(quantizer, target))
    kind, shift = stored_as(quantizer, target), quantizer.shift
    if quantizer.granularity == "group" and kind == ir.DataType.INT8 and frozen.codes.dim() == 2:
        return _groups(graph, mark, name, frozen, order)
    codes, scale, zero = frozen.codes, quantizer.scale, quantizer.zero_point
    attributes: dict[str, Any] = {}
    if scale.numel() == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    else:
        scale, zero, attributes = _scales_for_onnx(quantizer, codes)
    if order is not None:
        codes = codes.permute(order)
        if scale.dim() > 1:
            scale, zero = scale.permute(order), zero.permute(order)
        if "axis" in attributes:
            attributes["axis"] = order.index(attributes["axis"])
    narrow = kind in NARROW
    read = _NUMPY[ir.DataType.INT8 if shift else kind]
    array = codes.contiguous().numpy()
    integers = initializer(graph, f"{name}/integers", (array if narrow else array << shift).astype(_NUMPY[kind]))
    inputs = [
        _shifted(graph, mark, integers, shift) if narrow and shift else integers,
        initializer(graph, f"{name}/scale", (scale * 2.0**-shift).contiguous().numpy()),
    ]
    if zero.any() or NEEDS_ZERO_POINT & {n.op_type for n in mark.outputs[0].consumers()}:
        inputs.append(initializer(graph, f"{name}/zero_point", zero.contiguous().numpy().astype(read)))
    return insert_node(graph, mark, "DequantizeLinear", inputs, name, **attributes)


def _shifted(graph: ir.Graph, mark: ir.Node, integers: ir.Value, shift: int) -> ir.Value:
    """Narrow codes times a power of two in 8 bits: runtimes compute that once, when they load the file.

    Integer kernels read 8 bits (ONNX Runtime 1.31, OpenVINO 2026.4); what has fewer they compute in float.
    """
    assert integers.const_value is not None
    array = integers.const_value.numpy()
    place = len(graph.initializers)  # in names, which are short: there are three for each weight
    wide = insert_node(graph, mark, "Cast", [integers], f"a{place}", named=False, to=ir.DataType.INT32.value)
    factor = shared(graph, f"x{1 << shift}", np.asarray(1 << shift, np.int32))
    product = insert_node(graph, mark, "Mul", [wide, factor], f"b{place}", named=False)
    read = insert_node(graph, mark, "Cast", [product], f"c{place}", named=False, to=ir.DataType.INT8.value)
    read.const_value = ir.Tensor(array.astype(np.int8) << shift)
    return read


def _columns(
    graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen, order: list[int] | None, kind: ir.DataType
) -> ir.Value:
    """A weight whose inputs have scales: integers, and a multiplication, which is the same bit for bit.

    ONNX has scales for blocks, but ONNX Runtime puts those of 8-bit integers into a kernel that takes none and fails
    when it runs (1.31, MatMulIntegerToFloat); and blocks repeat a scale for every output.
    """
    quantizer = frozen.quantizer
    assert isinstance(quantizer, Quantizer)
    codes, scale = frozen.codes, quantizer.expanded()[0]
    if order is not None:
        codes, scale = codes.permute(order), scale.permute(order)
    integers = initializer(graph, f"{name}/integers", codes.contiguous().numpy().astype(_NUMPY[kind]))
    one = initializer(graph, f"{name}/one", np.asarray(1, np.float32))
    whole = insert_node(graph, mark, "DequantizeLinear", [integers, one], f"{name}/whole")
    whole.type, whole.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
    steps = initializer(graph, f"{name}/scale", scale.contiguous().numpy())
    return insert_node(graph, mark, "Mul", [whole, steps], name)


def _groups(graph: ir.Graph, mark: ir.Node, name: str, frozen: Frozen, order: list[int] | None) -> ir.Value:
    """A matrix with scales for groups of its inputs, as :func:`_columns` for the same reason.

    Integers and scales are brought to [outputs, groups, inputs of a group] and back, so that each scale is stored once;
    where the last group is shorter, every element's is stored.
    """
    quantizer = frozen.quantizer
    assert isinstance(quantizer, Quantizer)
    assert quantizer.block is not None
    rows, columns = frozen.codes.shape
    size = quantizer.block[1]
    if columns % size:
        return _columns(graph, mark, name, frozen, order, ir.DataType.INT8)
    codes = frozen.codes.reshape(rows, columns // size, size).contiguous().numpy()
    scale = quantizer.scale.reshape(rows, columns // size, 1).contiguous().numpy()
    integers = initializer(graph, f"{name}/integers", codes.astype(np.int8))
    one = initializer(graph, f"{name}/one", np.asarray(1, np.float32))
    whole = insert_node(graph, mark, "DequantizeLinear", [integers, one], f"{name}/whole")
    whole.type, whole.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
    value = insert_node(graph, mark, "Mul", [whole, initializer(graph, f"{name}/scale", scale)], f"{name}/groups")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), integers.shape
    flat = initializer(graph, f"{name}/shape", np.asarray([rows, columns], np.int64))
    if order == [1, 0]:
        value = insert_node(graph, mark, "Reshape", [value, flat], f"{name}/matrix")
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, columns])
        return insert_node(graph, mark, "Transpose", [value], name, perm=[1, 0])
    return insert_node(graph, mark, "Reshape", [value, flat], name)


def _scales_for_onnx(quantizer: Quantizer, codes: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Scale, zero point and attributes: one axis per channel, or blocks along one axis."""
    block = quantizer.block
    assert block is not None
    shape = tuple(codes.shape)
    cut = [axis for axis, (d, b) in enumerate(zip(shape, block, strict=True)) if b < d]
    if cut == [0] and quantizer.head_axis == 0:  # as channels, in far fewer numbers than as blocks
        rows = (v.repeat_interleave(block[0]) for v in (quantizer.scale, quantizer.zero_point))
        return next(rows), next(rows), {"axis": 0}
    partial = [axis for axis in cut if block[axis] > 1]
    if len(cut) == 1 and not partial:
        return quantizer.scale, quantizer.zero_point, {"axis": cut[0]}
    if len(partial) > 1:
        raise UsageError(f"{quantizer.name}: ONNX has scales for blocks along one axis only.")
    axis = partial[0] if partial else next(a for a in range(len(shape)) if a not in cut or shape[a] > 1)
    size = block[axis]
    counts = [-(-d // b) for d, b in zip(shape, block, strict=True)]
    wanted = [counts[a] if a == axis else d for a, d in enumerate(shape)]

    def spread(values: Tensor) -> Tensor:
        return values.reshape(counts).expand(wanted).contiguous()

    return spread(quantizer.scale), spread(quantizer.zero_point), {"axis": axis, "block_size": size}
