"""Folds per-channel affine operators (batch norm, layer scale) into the linear operators beside them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.graph.layer import Unfolded
from bitwright.graph.rewrite import get_tensor

KEEPS_LAST_AXIS = frozenset({"flatten", "view", "reshape"})


def fold(module: fx.GraphModule) -> list[Unfolded]:
    """Folds every batch norm and layer scale that a linear operator can absorb (methods, section 0.4).

    ``W' = W * gamma / sqrt(var + eps)``, ``b' = beta + (b - mean) * gamma / sqrt(var + eps)`` for a linear operator
    before the norm; on its input axis for one after. Computed in float64.

    Returns:
        The batch norms that could not be folded, with the reason.
    """
    unfolded = []
    for node in list(module.graph.nodes):
        name = ops.base_name(node)
        if name == "batch_norm":
            reason = _fold_norm(module, node)
            if reason:
                unfolded.append(Unfolded(node.meta["layer"], "batch_norm", reason))
        elif name == "mul":
            _fold_layer_scale(module, node)
    rewrite.prune(module.graph)
    rewrite.drop_unused_tensors(module)
    module.recompile()
    return unfolded


def _fold_norm(module: fx.GraphModule, norm: fx.Node) -> str | None:
    """Folds one batch norm; the reason if it cannot be."""
    if norm.args[3] is None or norm.args[4] is None:
        return "it has no stored statistics"
    scale, shift = norm_as_affine(module, norm)
    before = _fold_backwards(module, norm, scale, shift)
    if before is None:
        return None
    after = _fold_forwards(module, norm, scale, shift)
    return None if after is None else f"{before}; {after}"


def norm_as_affine(module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Factor and shift of every channel, float64 [C]."""
    gamma, beta, mean, var = (
        get_tensor(module, str(a.target)).double() if isinstance(a, fx.Node) else None for a in norm.args[1:5]
    )
    eps = norm.args[7]
    assert mean is not None
    assert var is not None
    assert isinstance(eps, float)
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def _fold_backwards(module: fx.GraphModule, norm: fx.Node, scale: Tensor, shift: Tensor) -> str | None:
    """Into the linear operator that produces the norm's input."""
    producer = norm.args[0]
    assert isinstance(producer, fx.Node)
    moved = False
    while ops.base_name(producer) in KEEPS_LAST_AXIS and len(producer.users) == 1:
        source = producer.args[0]
        assert isinstance(source, fx.Node)
        if ops.shape(source)[-1] != ops.shape(producer)[-1]:
            break
        producer, moved = source, True
    if ops.kind(producer) != "linear":
        return f"its input comes from {ops.base_name(producer)}"
    if len(producer.users) > 1:
        return f"{producer.meta['layer']} is also used elsewhere"
    if not own_weight(producer):
        return f"the weight of {producer.meta['layer']} is shared"
    last = ops.base_name(producer) == "linear"
    if (last and len(ops.shape(norm)) != 2) or (moved and not last):
        return f"its channels are not those of {producer.meta['layer']}"
    scale_outputs(module, producer, scale, shift)
    bypass(norm)
    return None


def scale_outputs(module: fx.GraphModule, node: fx.Node, scale: Tensor, shift: Tensor | None = None) -> None:
    """Makes a linear operator yield ``scale * y + shift`` per output channel ([C_out], float64)."""
    weight, bias = node.args[1], node.args[2]
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    w, b = (get_tensor(module, str(n.target)).double() for n in (weight, bias))
    if ops.base_name(node) in ops.CONV_TRANSPOSE:
        per_group = scale.reshape(rewrite.groups(node), -1)
        rows = per_group.repeat_interleave(w.shape[0] // per_group.shape[0], dim=0)
        w = w * rows.reshape(*rows.shape, *[1] * (w.dim() - 2))
    else:
        w = w * scale.reshape(-1, *[1] * (w.dim() - 1))
    b = b * scale if shift is None else b * scale + shift
    replace_stored(module, weight, w)
    replace_stored(module, bias, b)


def _fold_forwards(module: fx.GraphModule, norm: fx.Node, scale: Tensor, shift: Tensor) -> str | None:
    """Into the linear operator that reads the norm's output."""
    if len(norm.users) != 1:
        return f"its output is used {len(norm.users)} times"
    (consumer,) = norm.users
    name = ops.base_name(consumer)
    if ops.kind(consumer) != "linear" or name in ops.CONV_TRANSPOSE:
        return f"its output goes to {name}"
    if not own_weight(consumer):
        return f"the weight of {consumer.meta['layer']} is shared"
    if name == "linear" and len(ops.shape(norm)) != 2:
        return f"its channels are not those of {consumer.meta['layer']}"
    if name != "linear" and not _is_unpadded(consumer):
        return f"{consumer.meta['layer']} pads its input, which the norm would shift"
    scale_inputs(module, consumer, scale, shift)
    bypass(norm)
    return None


def bypass(norm: fx.Node) -> None:
    """Hands the norm's input to its readers."""
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    norm.replace_all_uses_with(source)
    norm.graph.erase_node(norm)


def _is_unpadded(conv: fx.Node) -> bool:
    padding = conv.args[4] if len(conv.args) > 4 else 0
    if isinstance(padding, str):
        return padding == "valid"
    return not any(padding) if isinstance(padding, list | tuple) else bool(padding == 0)


def scale_inputs(module: fx.GraphModule, node: fx.Node, scale: Tensor, shift: Tensor | None = None) -> None:
    """Makes a linear operator yield for ``x`` what it yielded for ``scale * x + shift`` ([C_in], float64).

    A shift is not for transposed convolutions.
    """
    weight, bias = node.args[1], node.args[2]
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    w, b = (get_tensor(module, str(n.target)).double() for n in (weight, bias))
    if ops.base_name(node) in ops.CONV_TRANSPOSE:
        assert shift is None
        replace_stored(module, weight, w * scale.reshape(-1, *[1] * (w.dim() - 1)))
        return
    shift = torch.zeros_like(scale) if shift is None else shift
    count = rewrite.groups(node)
    rows = scale.reshape(count, -1).repeat_interleave(w.shape[0] // count, dim=0)
    shifts = shift.reshape(count, -1).repeat_interleave(w.shape[0] // count, dim=0)
    tail = [1] * (w.dim() - 2)
    b = b + (w * shifts.reshape(*shifts.shape, *tail)).flatten(1).sum(1)
    replace_stored(module, weight, w * rows.reshape(*rows.shape, *tail))
    replace_stored(module, bias, b)


def _fold_layer_scale(module: fx.GraphModule, node: fx.Node) -> None:
    """``linear(x) * gamma`` with one stored ``gamma`` per output channel."""
    for producer, gamma in (node.args[:2], node.args[1::-1]):
        if not (isinstance(producer, fx.Node) and isinstance(gamma, fx.Node)) or gamma.op != "get_attr":
            continue
        if ops.kind(producer) != "linear" or len(producer.users) > 1 or not own_weight(producer):
            continue
        channels = rewrite.out_channels(producer)
        trailing = 0 if ops.base_name(producer) == "linear" else get_rank(producer)
        sizes = [int(s) for s in ops.shape(gamma)]
        padded = [1] * (len(ops.shape(producer)) - len(sizes)) + sizes
        axis = len(padded) - 1 - trailing
        if padded[axis] == channels and all(s == 1 for i, s in enumerate(padded) if i != axis):
            scale_outputs(module, producer, get_tensor(module, str(gamma.target)).double().reshape(-1))
            node.replace_all_uses_with(producer)
            module.graph.erase_node(node)
            return


def get_rank(conv: fx.Node) -> int:
    """Number of spatial axes of a convolution."""
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    return len(ops.shape(weight)) - 2


def own_weight(node: fx.Node) -> bool:
    """Whether a linear operator is the only reader of its weight and bias."""
    return all(isinstance(a, fx.Node) and len(a.users) == 1 for a in node.args[1:3])


def replace_stored(module: fx.GraphModule, stored: fx.Node, tensor: Tensor) -> None:
    """Puts another tensor, as float32, in place of a stored one."""
    tensor = tensor.to(torch.float32)
    rewrite.set_tensor(module, str(stored.target), tensor)
    stored.meta["val"] = tensor
