"""Quantizers in ONNX: integer initialisers, QuantizeLinear and DequantizeLinear, and a Clip where codes are fewer."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.export import clips
from bitwright.export.clips import READS_INTEGER_BIAS, Span
from bitwright.export.edit import drop_unused, initializer, insert_node, shared
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.runtimes.target import Target

NEEDS_ZERO_POINT = frozenset({"Gemm"})
"""Operators whose integer kernels ONNX Runtime 1.31 does not take without a stored zero point of the weight."""
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


def replace_activation(graph: ir.Graph, mark: ir.Node, name: str, quantizer: Quantizer) -> None:
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


def share_bias_steps(graph: ir.Graph) -> None:
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
