"""Operators that put values of different kinds into one tensor, as detectors do with boxes, scores and classes.

There are more spellings than concatenations: a part of a tensor is written over, a stored mask says which of two
tensors an element is of, tensors that zeros fill up are added, channels are brought to different sizes by stored
factors, or cells are moved to their places by a stored grid. What comes of it has no range that is worth a grid.
"""

from __future__ import annotations

from torch import Tensor, fx

from bitwright.graph import ops
from bitwright.graph.divisors import SPREAD
from bitwright.graph.rewrite import get_tensor

OVERWRITES = frozenset(
    [
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "as_strided_scatter",
        "scatter",
        "index_put",
        "index_copy",
        "masked_scatter",
    ]
)
"""Operators that write values of one tensor into a part of another."""
PADDINGS = frozenset({"pad", "constant_pad_nd"})


def note_joins(module: fx.GraphModule) -> None:
    """Writes ``meta["joins"]`` at every operator of a prepared graph that puts values side by side in one tensor."""
    for node in module.graph.nodes:
        if node.op == "call_function" and ops.is_float_tensor(node) and _joins(module, node):
            node.meta["joins"] = True


def _joins(module: fx.GraphModule, node: fx.Node) -> bool:
    name, operands = ops.base_name(node), ops.tensor_operands(node)
    if ops.kind(node) == "move":
        return False
    if name in OVERWRITES:
        return len(operands) > 1
    if name == "where":
        return len(operands) > 1 and _is_stored(node.args[0])
    if name in ops.MUL:
        return any(_differ_widely(tensor) for tensor in _stored(module, node))
    if name in ops.ADD:
        padded = len(operands) > 1 and all(ops.base_name(n) in PADDINGS for n in operands)
        return padded or any(_is_grid(tensor) for tensor in _stored(module, node))
    return ops.kind(node) == "concat"


def _is_stored(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _stored(module: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    """Stored operands, behind operators that only move them."""
    found = []
    for operand in ops.tensor_operands(node):
        while operand.op == "call_function" and ops.kind(operand) == "move":
            operand = ops.moved(operand)
        if _is_stored(operand):
            found.append(get_tensor(module, str(operand.target)))
    return found


def _differ_widely(factors: Tensor) -> bool:
    sizes = factors.abs()
    return sizes.numel() > 1 and float(sizes.max()) > SPREAD * float(sizes.min())


def _is_grid(offsets: Tensor) -> bool:
    """Whether each place has an offset of its own; one for each channel is a bias."""
    return sum(size > 1 for size in offsets.shape) > 1 and bool((offsets != offsets.flatten()[0]).any())
