"""What each ATen operator means to a quantizer: one table, keyed by the operator's base name.

An operator that is not in the table is of kind ``other``: it is computed in float and its output is quantized,
so an unknown operator costs accuracy or speed, never correctness.
"""

from __future__ import annotations

import operator
from typing import Literal

import torch
from torch import fx

RESCALES = "rescales"
"""Mark in a node's ``meta`` of a multiplication by scales of channels (:mod:`bitwright.graph.equalize`): ``before`` or
``after`` the quantizer of the tensor that it scales."""
OperatorKind = Literal[
    "input", "constant", "linear", "matmul", "activation", "softmax", "add", "mul", "scalar", "norm", "pool",
    "move", "concat", "rescale", "other", "output", "shape",
]  # fmt: skip

CONV = frozenset({"conv1d", "conv2d", "conv3d"})
CONV_TRANSPOSE = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
LINEAR = CONV | CONV_TRANSPOSE | {"linear"}
MATMUL = frozenset({"matmul", "bmm", "mm"})
ACTIVATION = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "silu",
        "gelu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "elu",
        "celu",
        "selu",
        "leaky_relu",
        "prelu",
        "softplus",
        "mish",
        "log_sigmoid",
        "softsign",
        "threshold",
        "rrelu",
        "glu",
    ]
)
SOFTMAX = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax"})
NORM = frozenset(
    [
        "batch_norm",
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "native_group_norm",
        "instance_norm",
        "rms_norm",
        "linalg_vector_norm",
        "norm",
    ]
)
SAMPLERS = frozenset({"grid_sampler", "grid_sampler_2d"})
"""They take means of neighbouring values at places that their second operand gives."""
POOL = SAMPLERS | frozenset(
    [
        "mean",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "sum",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "upsample_linear1d",
        "upsample_trilinear3d",
    ]
)
MOVE = frozenset(
    [
        "view",
        "reshape",
        "reshape_as",
        "view_as",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "movedim",
        "swapaxes",
        "slice",
        "select",
        "narrow",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool2d",
        "amax",
        "amin",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "roll",
        "flip",
        "rot90",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact2d",
        "index",
        "index_select",
        "gather",
        "im2col",
        "unfold",
        "lift_fresh_copy",
        "constant_pad_nd",
        "pad",
        "reflection_pad2d",
        "replication_pad2d",
        "tensor_split",
        "getitem",
    ]
)
PICK = frozenset({"max", "min", "sort", "topk", "kthvalue", "median", "nanmedian", "mode", "cummax", "cummin"})
"""Along an axis they give some of their operand's values, and where those lie."""
CONCAT = frozenset({"cat", "concat", "stack", "concatenate"})
ADD = frozenset({"add", "sub"})
MUL = frozenset({"mul", "div"})


def base_name(node: fx.Node) -> str:
    """Name of the operator without its namespace and overload: ``aten.conv2d.padding`` gives ``conv2d``."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def value(node: fx.Node) -> object:
    """The fake value recorded for the node: a tensor, a list of tensors, a symbolic integer or None."""
    return node.meta.get("val")


def is_float_tensor(node: object) -> bool:
    """Whether the node carries a floating tensor, or parts of one; several results of another kind are none."""
    if not isinstance(node, fx.Node):
        return False
    val = value(node)
    if isinstance(val, list | tuple):
        val = val[0] if val and base_name(node) in MOVE | PICK else None
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of the tensor at the node; the batch axis is symbolic."""
    val = value(node)
    assert isinstance(val, torch.Tensor), f"{node.name} carries no tensor"
    return tuple(val.shape)


def numel(node: fx.Node) -> int:
    """Number of elements of the tensor at a node without symbolic axes."""
    val = value(node)
    assert isinstance(val, torch.Tensor), f"{node.name} carries no tensor"
    return int(val.numel())


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Arguments that are floating tensors, in order."""
    return [n for n in node.all_input_nodes if is_float_tensor(n)]


def is_scalar_operand(arg: object) -> bool:
    """Whether the argument is a number or a constant with a single element."""
    if not isinstance(arg, fx.Node):
        return True
    if arg.op == "get_attr" and isinstance(value(arg), torch.Tensor):
        return numel(arg) == 1
    return not isinstance(value(arg), torch.Tensor)


PART = "part"
"""Key in ``meta`` of a node that gives one input out of a tensor that holds several, with the input's name."""
PART_MODULE = "bitwright.given.several.TakeInput"
"""Modules that take one input out of a tensor that holds several."""


def kind(node: fx.Node) -> OperatorKind:  # noqa: PLR0912 - a table in code
    """What the node is to a quantizer (see the module's sets)."""
    if node.op == "placeholder" or PART in node.meta:
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "get_attr":
        return "constant"
    if not is_float_tensor(node):
        return "shape"
    if "moves" in node.meta:
        return "move"
    name = base_name(node)
    if RESCALES in node.meta:
        return "rescale" if node.meta[RESCALES] == "before" else "move"
    if node.target is operator.getitem:
        return "move" if is_float_tensor(node.args[0]) else "other"
    if name in PICK:
        return "move" if isinstance(value(node), list | tuple) else "other"
    if name in LINEAR:
        return "linear" if is_weight(node.args[1]) else "other"
    if name in MATMUL:
        return "matmul"
    if name in ACTIVATION:
        return "activation"
    if name in SOFTMAX:
        return "softmax"
    if name in NORM:
        return "norm"
    if name in POOL:
        return "pool"
    if name in MOVE:
        return "other" if pads_with_nonzero(node) else "move"
    if name in CONCAT:
        return "concat"
    if name in ADD | MUL:
        if any(is_scalar_operand(a) for a in node.args[:2]):
            return "scalar"
        return "add" if name in ADD else "mul"
    return "other"


def moved(node: fx.Node) -> fx.Node:
    """The operand whose values an operator of kind ``move`` holds."""
    name = node.meta.get("moves")
    operand = next((n for n in node.all_input_nodes if n.name == name), node.args[0])
    assert isinstance(operand, fx.Node)
    return operand


def is_weight(arg: object) -> bool:
    """Whether the argument is a stored tensor, possibly behind its weight quantizer."""
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def pads_with_nonzero(node: fx.Node) -> bool:
    """Whether the node pads with a constant other than zero, which the source's grid need not contain."""
    name = base_name(node)
    if name == "constant_pad_nd":
        fill = node.args[2] if len(node.args) > 2 else 0
    elif name == "pad":
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        fill = (node.args[3] if len(node.args) > 3 else node.kwargs.get("value")) or 0
        if mode != "constant":
            return False
    else:
        return False
    return bool(fill != 0)
