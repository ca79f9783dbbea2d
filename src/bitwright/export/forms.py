"""Operators in the form that runtimes compute right, where another form of the same operator is computed wrong.

ONNX Runtime (1.31) joins operators into kernels of its own once its optimisations are on. What is found here it joins
into kernels that give something else than the operators do, so that the file holds them in a form that it leaves alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.export.clips import IN_FLOAT, MOVES, READS_INTEGER_BIAS, codes_of, dequantized
from bitwright.export.edit import initializer, insert_node, shared

WEIGHTED = frozenset({*READS_INTEGER_BIAS, "ConvTranspose"})
PICKS = frozenset({"Concat", "Gather", "Slice", "Split"})
"""Operators that pick values or put them together, over which ONNX Runtime moves no codes."""
POOLS = frozenset({"MaxPool", "AveragePool"})
SUMS = frozenset({"ReduceMean", "ReduceSum"})
NEXT_TO_ZERO = np.finfo(np.float32).tiny
"""What a Pad of zeros before max pooling pads with: on every grid it is zero, for ONNX Runtime it is another number."""


def rewrite_forms(graph: ir.Graph) -> None:
    """Rewrites every operator of the graph that needs it."""
    shielded: dict[str | None, ir.Value] = {}
    for node in list(graph):
        if node.op_type in WEIGHTED:
            shield(graph, node, shielded)
        elif node.op_type == "MatMul":
            code_product(graph, node, shielded)
        elif node.op_type == "Softmax":
            shield_softmax(graph, node, shielded)
        elif node.op_type in SUMS:
            add_axis(graph, node)
        elif node.op_type in POOLS:
            merge_mark(graph, node)
            explicit_ends(graph, node)
            keep_pad(graph, node)


def shield(graph: ir.Graph, node: ir.Node, shielded: dict[str | None, ir.Value]) -> None:
    """Puts a Clip without effect before a layer whose weight or bias stays float.

    Between codes that come and codes that go, ONNX Runtime would round such a weight to 8 bits by itself, and such a
    bias to the product of the steps of input and weight.
    """
    source, weight = node.inputs[:2]
    if source is None or weight is None or not _comes_from_codes(source, None):
        return
    if weight.const_value is not None or _bias_is_float(node):
        node.replace_input_with(0, in_float(graph, node, source, shielded))


def _bias_is_float(node: ir.Node) -> bool:
    """Whether a layer has a bias that rounding to the product of the steps of input and weight would change."""
    source, weight, bias = (*node.inputs, None)[:3]
    if bias is None or bias.const_value is None:
        return False
    given, stored = dequantized(source), dequantized(weight)
    steps = [n.inputs[1].const_value for n in (given, stored) if n is not None and n.inputs[1] is not None]
    values = bias.const_value.numpy()
    parts = [np.asarray(s.numpy()) for s in steps if s is not None]
    if len(parts) < 2 or parts[0].size > 1 or parts[1].size not in {1, values.size}:
        return True
    step = (parts[0] * parts[1]).reshape(-1)
    return not np.array_equal(np.rint(values / step.astype(np.float64)).astype(np.float32) * step, values)


def code_product(graph: ir.Graph, node: ir.Node, shielded: dict[str | None, ir.Value]) -> None:
    """Quantizes what a product of integer weights reads once more, on the grid that it lies on already.

    Its codes come through operators that ONNX Runtime moves no codes over, as those of a shifted or padded window do.
    Reading floats, it would put them on 8 bits by itself, in blocks (MatMulNBits). Twice on one grid is exact. Where
    it reads floats that lie on no grid, a Clip without effect behind the weight makes it a product of floats.
    """
    source, weight = node.inputs[:2]
    producer = None if weight is None else weight.producer()
    if source is None or weight is None or producer is None or producer.op_type != "DequantizeLinear":
        return
    if producer.inputs[0] is None or producer.inputs[0].const_value is None or _comes_from_codes(source, MOVES):
        return
    grid = None if source.is_graph_input() else _grid(source)
    if grid is None:
        node.replace_input_with(1, in_float(graph, node, weight, shielded))
        return
    name = f"{source.name}/again"
    for value in (v for reader in source.consumers() for v in reader.outputs if v.name == f"{name}/codes"):
        node.replace_input_with(0, value.consumers()[0].outputs[0])  # another product reads it as well
        return
    codes = insert_node(graph, node, "QuantizeLinear", [source, *grid], f"{name}/codes")
    codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), source.shape
    value = insert_node(graph, node, "DequantizeLinear", [codes, *grid], f"{name}/value")
    value.type, value.shape = source.type, source.shape
    node.replace_input_with(0, value)


def _grid(source: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Scale and zero point that all codes have from which values are only moved or picked; None if there are none."""
    waiting, grids = [source], set()
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            grids.add(tuple(node.inputs[1:3]))
        elif node.op_type in MOVES | PICKS or _pads_with_codes(node):
            moved = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            waiting += [v for v in moved if v is not None]
        else:
            return None
    scale, zero = grids.pop() if len(grids) == 1 else (None, None)
    if scale is None or zero is None or zero.dtype != ir.DataType.UINT8 or scale.shape is None or len(scale.shape):
        return None
    return scale, zero


def _pads_with_codes(node: ir.Node) -> bool:
    """Whether it is a Pad of zeros, which lie on every grid, or of values that are there."""
    if node.op_type != "Pad":
        return False
    mode = node.attributes.get("mode")
    return (mode is not None and mode.as_string() != "constant") or _number(node, 2, 0.0) == 0.0


def shield_softmax(graph: ir.Graph, node: ir.Node, shielded: dict[str | None, ir.Value]) -> None:
    """Puts a Clip without effect between codes and a softmax.

    ONNX Runtime's softmax of codes multiplies integers of 23 bits by the whole part of one over the step. Codes are
    off by one where that has a fraction, and by anything where the product exceeds 32 bits, from steps of 1/512 on. In
    float it is faster, too.
    """
    source = node.inputs[0]
    if source is not None and _comes_from_codes(source, MOVES | {"Slice"}):
        node.replace_input_with(0, in_float(graph, node, source, shielded))


def add_axis(graph: ir.Graph, node: ir.Node) -> None:
    """Gives a tensor of three axes a fourth, where the mean or the sum over its second is taken.

    OpenVINO (2026.4), reading such a file, gives zeros for the mean over tokens [B, T, C] of codes, also where they
    were transposed since; of four axes it is right.
    """
    source, axes = (*node.inputs, None)[:2]
    if source is None or source.shape is None or len(source.shape) != 3 or not _comes_from_codes(source, MOVES):
        return
    if axes is None or axes.const_value is None:
        return
    over = sorted(int(a) % 3 for a in axes.const_value.numpy().reshape(-1))
    if 1 not in over and not _is_transposed(source):
        return
    last = shared(graph, "fourth_axis", np.asarray([3], np.int64))
    wide = insert_node(graph, node, "Unsqueeze", [source, last], f"{node.outputs[0].name}/four_axes")
    wide.type, wide.shape = source.type, ir.Shape([*source.shape, 1])
    keep = _ints(node, "keepdims", [1])[0]
    over += [] if keep else [3]
    four = shared(graph, "axes_" + "_".join(map(str, over)), np.asarray(over, np.int64))
    if not keep:
        node.replace_input_with(0, wide)
        node.replace_input_with(1, four)
        return
    summed = insert_node(graph, node, node.op_type, [wide, four], f"{node.outputs[0].name}/kept", keepdims=1)
    node.op_type = "Squeeze"  # with the name and the readers of what it was
    node.attributes.clear()
    node.replace_input_with(0, summed)
    node.replace_input_with(1, last)


def _is_transposed(value: ir.Value) -> bool:
    """Whether axes changed places between the codes and the value."""
    node = value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        if node.op_type == "Transpose":
            return True
        node = node.inputs[0].producer()
    return False


def keep_in_float(graph: ir.Graph, names: Sequence[str]) -> None:
    """Puts Clips without effect before the operators that give these activations, so that they compute in float.

    Args:
        graph: of a file.
        names: of the quantizers' nodes whose codes a kernel of ONNX Runtime computes wrongly.
    """
    shielded: dict[str | None, ir.Value] = {}
    ends = {codes_of(node).name: node for node in graph if node.op_type == "QuantizeLinear"}
    for name in names:
        waiting = [ends[f"{name}/codes"]] if f"{name}/codes" in ends else []
        while waiting:
            node = waiting.pop()
            for index, value in enumerate(node.inputs):
                producer = None if value is None else value.producer()
                if value is None or producer is None or (value.name or "").endswith(IN_FLOAT):
                    continue
                if producer.op_type != "DequantizeLinear":
                    waiting.append(producer)
                elif producer.inputs[0] is not None and producer.inputs[0].const_value is None:
                    node.replace_input_with(index, in_float(graph, node, value, shielded))


def in_float(graph: ir.Graph, before: ir.Node, source: ir.Value, shielded: dict[str | None, ir.Value]) -> ir.Value:
    """The value behind a Clip without effect, over which no runtime moves codes; one for all its readers.

    It stands before the first of them, since one that comes later in the file may be looked at first.
    """
    if source.name not in shielded:
        least = shared(graph, "least", np.asarray(np.finfo(np.float32).min))
        readers = {*source.consumers(), before}
        first = next(node for node in graph if node in readers)
        clipped = insert_node(graph, first, "Clip", [source, least], f"{source.name}{IN_FLOAT}")
        clipped.type, clipped.shape = source.type, source.shape
        shielded[source.name] = clipped
    return shielded[source.name]


def _comes_from_codes(value: ir.Value, through: frozenset[str] | None) -> bool:
    """Whether codes become the value, maybe through operators of one tensor: a runtime moves codes over those.

    Args:
        value: that an operator reads.
        through: the operators; any if not given.
    """
    node = value.producer()
    while node is not None and node.op_type != "DequantizeLinear":
        tensors = [v for v in node.inputs if v is not None and v.const_value is None]
        known = through is None or node.op_type in through
        node = tensors[0].producer() if len(tensors) == 1 and known else None
    return node is not None


@dataclass(frozen=True)
class Windows:
    """Where the windows of a pooling lie along one axis.

    Example: a kernel of 3 in steps of 2 over 7 elements with 1 before them has windows that begin at -1, 1, 3, 5 when
    it gives 4 elements.

    Args:
        size: elements of the input.
        count: elements of the output.
        kernel: elements of a window.
        stride: between windows.
        dilation: between the elements of a window.
        begin: elements that are padded before the input.
    """

    size: int
    count: int
    kernel: int
    stride: int
    dilation: int
    begin: int

    @property
    def end(self) -> int:
        """Elements behind the input that the last window reaches.

        Example:
            >>> Windows(size=7, count=4, kernel=3, stride=2, dilation=1, begin=1).end
            1
        """
        reach = (self.count - 1) * self.stride - self.begin + (self.kernel - 1) * self.dilation + 1
        return max(0, reach - self.size)

    @property
    def keep_an_element(self) -> bool:
        """Whether every window has an element of the input, and the pads are ones that ONNX allows.

        Example:
            >>> Windows(7, 4, 3, 2, 1, begin=1).keep_an_element, Windows(7, 5, 3, 2, 1, begin=3).keep_an_element
            (True, False)
        """
        if self.begin >= self.kernel or self.end >= self.kernel:
            return False
        for window in range(self.count):
            start = window * self.stride - self.begin
            if not any(0 <= start + k * self.dilation < self.size for k in range(self.kernel)):
                return False
        return True


def merge_mark(graph: ir.Graph, node: ir.Node) -> None:
    """Makes a Pad before max pooling the pooling's own, where what it pads with is below everything it pads.

    The pooling's pads never win, so that this is exact where every window keeps an element; and then it stays in
    integers.
    """
    pad = _pad_before(node)
    if node.op_type != "MaxPool" or pad is None or pad.inputs[0] is None:
        return
    source, before = pad.inputs[0], _padding(pad)
    windows = None if before is None else _windows(node, source, [b for b, _ in before])
    if before is None or windows is None or not all(w.keep_an_element for w in windows):
        return
    if not _number(pad, 2, 0.0) <= _least(source):
        return
    node.replace_input_with(0, source)
    _set_windows(node, windows)


def explicit_ends(graph: ir.Graph, node: ir.Node) -> None:
    """Writes average pooling that rounds its size up as one that does not, with pads in its place.

    ONNX Runtime's average of codes divides by other counts there when pads are counted. Pads that count become a Pad.
    """
    if node.op_type != "AveragePool" or not _ints(node, "ceil_mode", [0])[0] or node.inputs[0] is None:
        return
    source, rank = node.inputs[0], len(_ints(node, "kernel_shape", []))
    windows = _windows(node, source, [0] * rank)
    if windows is None or any(w.begin >= w.kernel or w.end >= w.kernel for w in windows):
        return
    pads = _ints(node, "pads", [0] * 2 * rank)
    if all(w.end <= given for w, given in zip(windows, pads[rank:], strict=True)):
        node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
        return
    if _ints(node, "count_include_pad", [0])[0] and any(pads):
        source = _padded(graph, node, source, pads)
        windows = _windows(node, source, [-b for b in pads[:rank]])
        assert windows is not None
    node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    _set_windows(node, windows)


def keep_pad(graph: ir.Graph, node: ir.Node) -> None:
    """Keeps ONNX Runtime from making a Pad of zeros the pads of max pooling, which are below every number."""
    pad = _pad_before(node)
    if node.op_type != "MaxPool" or pad is None or _number(pad, 2, 0.0) != 0.0:
        return
    value = shared(graph, "next_to_zero", np.asarray(NEXT_TO_ZERO))
    pad.resize_inputs(max(3, len(pad.inputs)))
    pad.replace_input_with(2, value)


def _pad_before(node: ir.Node) -> ir.Node | None:
    """The Pad with a constant whose only reader is this operator."""
    source = node.inputs[0]
    pad = None if source is None else source.producer()
    if source is None or pad is None or pad.op_type != "Pad" or source.is_graph_output() or len(source.uses()) > 1:
        return None
    mode = pad.attributes.get("mode")
    return pad if mode is None or mode.as_string() == "constant" else None


def _padding(pad: ir.Node) -> list[tuple[int, int]] | None:
    """Elements before and behind each axis from the third on; None if it pads others, computes them, or crops."""
    amounts = pad.inputs[1]
    if amounts is None or amounts.const_value is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    found = [int(x) for x in amounts.const_value.numpy()]
    pairs = list(zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True))
    if any(x for pair in pairs[:2] for x in pair) or any(x < 0 for x in found):
        return None
    return pairs[2:]


def _padded(graph: ir.Graph, node: ir.Node, source: ir.Value, pads: Sequence[int]) -> ir.Value:
    """The value with zeros around it, as the pads of the pooling say."""
    rank = len(pads) // 2
    amounts = np.asarray([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64)
    name = f"{node.outputs[0].name}/padded"
    value = insert_node(graph, node, "Pad", [source, initializer(graph, f"{name}/pads", amounts)], name)
    assert source.shape is not None
    sizes = [int(d) + a + b for d, a, b in zip(source.shape[2:], pads[:rank], pads[rank:], strict=True)]
    value.type, value.shape = source.type, ir.Shape([*source.shape[:2], *sizes])
    node.replace_input_with(0, value)
    return value


def _windows(node: ir.Node, source: ir.Value, before: Sequence[int]) -> list[Windows] | None:
    """Of a pooling that would read the source, with more pads of its own; None where a size is not known."""
    result = node.outputs[0].shape
    kernel = _ints(node, "kernel_shape", [])
    if source.shape is None or result is None or len(source.shape) != len(kernel) + 2 or len(node.outputs) > 1:
        return None
    sizes = [*source.shape[2:], *result[2:]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    rank = len(kernel)
    pads = _ints(node, "pads", [0] * 2 * rank)
    steps, gaps = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    begins = [a + b for a, b in zip(pads, before, strict=False)]
    each = zip(sizes[:rank], sizes[rank:], kernel, steps, gaps, begins, strict=True)
    return [Windows(*(int(x) for x in facts)) for facts in each]


def _set_windows(node: ir.Node, windows: Sequence[Windows]) -> None:
    """Pads that give these windows without rounding a size up."""
    pads = [*(w.begin for w in windows), *(w.end for w in windows)]
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    found = node.attributes.get(name)
    if found is None:
        return list(default)
    return [found.as_int()] if found.type == ir.AttributeType.INT else list(found.as_ints())


def _number(node: ir.Node, index: int, default: float) -> float:
    """A constant that an operator reads; NaN if it is computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return default
    return math.nan if value.const_value is None else float(value.const_value.numpy().reshape(()))


def _least(value: ir.Value) -> float:
    """Below which no element of a value lies: the lowest code's where it comes from codes."""
    node = value.producer()
    for _ in itertools.count():
        if node is None or node.op_type not in MOVES | {"Slice"} or node.inputs[0] is None:
            break
        node = node.inputs[0].producer()
    lowest = float(np.finfo(np.float32).min)
    if node is None or node.op_type != "DequantizeLinear":
        return lowest
    scale, zero = (v.const_value for v in node.inputs[1:3] if v is not None)
    if scale is None or zero is None or scale.size > 1:
        return lowest
    return float(-np.float32(zero.numpy()) * np.float32(scale.numpy()))
