"""What capture leaves, in one form: nothing in place, nothing that only training does, and float32 throughout."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.graph import ops
from bitwright.graph.rewrite import aten, get_tensor, set_tensor

DROPOUT = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
CASTS = frozenset({"to", "_to_copy", "type_as", "float"})
BATCH_STATISTICS = frozenset(
    ["_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update_functional"]
)
OTHER_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float64})


def functionalize(graph: fx.Graph) -> None:
    """Replaces in-place operators by the ones that return their result (``relu_`` by ``relu``).

    Capture hands later uses of the changed tensor to the operator's result, so that only views taken before the
    change could still see the old values; the comparison with the model after capture finds those.
    """
    for node in graph.nodes:
        name = ops.base_name(node)
        if node.op != "call_function" or not name.endswith("_") or name.startswith("__"):
            continue
        packet = getattr(aten, name[:-1], None)
        overload = getattr(packet, node.target._overloadname, None) if packet else None
        if overload is not None:
            node.target = overload


def fill_empties(graph: fx.Graph) -> None:
    """Memory that the model takes before it writes into it holds zeros, not what happens to lie there."""
    for node in graph.nodes:
        name = ops.base_name(node)
        kept = {k: v for k, v in node.kwargs.items() if k in {"dtype", "layout", "device", "pin_memory"}}
        if name in {"empty", "empty_strided", "empty_permuted"}:
            node.target, node.args, node.kwargs = aten.zeros.default, node.args[:1], kept
        elif name == "empty_like":
            node.target, node.kwargs = aten.zeros_like.default, dict(node.kwargs)
        elif name in {"new_empty", "new_empty_strided"}:
            node.target, node.args, node.kwargs = aten.new_zeros.default, node.args[:2], kept


def spell_shapes(graph: fx.Graph) -> None:
    """``reshape_as(x, y)`` becomes a reshape to the shape of ``y``, so that ``y`` is not kept for its shape alone."""
    for node in list(graph.nodes):
        if ops.base_name(node) not in {"reshape_as", "view_as"}:
            continue
        source, like = node.args
        assert isinstance(like, fx.Node)
        sizes = [-1 if isinstance(s, torch.SymInt) else int(s) for s in ops.shape(like)]
        if sizes.count(-1) > 1:
            continue
        node.target, node.args = aten.reshape.default, (source, sizes)


def spell_einsums(graph: fx.Graph) -> None:
    """Takes axes of length 1 out of einsum's operands where another operand has images, or more, along that axis.

    PyTorch repeats them. ONNX lets a letter stand for one length, and runtimes may take the 1 for it.
    """
    for node in list(graph.nodes):
        if ops.base_name(node) != "einsum" or "->" not in node.args[0]:
            continue
        equation, operands = node.args[:2]
        shapes = [ops.shape(operand) for operand in operands]
        terms, result = _letters(equation, [len(shape) for shape in shapes])
        longer = {
            a for t, shape in zip(terms, shapes, strict=True) for a, n in zip(t, shape, strict=True) if not _is_one(n)
        }
        kept, found = [], []
        for term, operand, shape in zip(terms, operands, shapes, strict=True):
            ones = [k for k, n in enumerate(shape) if _is_one(n) and term[k] in longer]
            kept.append("".join(a for k, a in enumerate(term) if k not in ones))
            found.append(_squeezed(graph, node, operand, ones) if ones else operand)
        if found != list(operands):
            node.args = (f"{','.join(kept)}->{result}", found, *node.args[2:])


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """A letter for each axis of the operands, and of the result: for those as well that dots stand for."""
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
    free = "".join(a for a in string.ascii_uppercase if a not in equation)[: max(hidden)]
    spelled = [t.replace("...", free[len(free) - n :]) for t, n in zip(terms, hidden, strict=True)]
    return spelled, result.replace("...", free)


def _squeezed(graph: fx.Graph, before: fx.Node, operand: fx.Node, axes: list[int]) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(aten.squeeze.dims, (operand, axes))
    value = ops.value(operand)
    assert isinstance(value, Tensor)
    node.meta = {**before.meta, "val": value.squeeze(axes)}
    return node


def restore_batch_norms(graph: fx.Graph) -> None:
    """Gives batch norms that PyTorch has decomposed into (output, mean, deviation) their one-output form back."""
    for node in list(graph.nodes):
        if ops.base_name(node) != "_native_batch_norm_legit_no_training":
            continue
        momentum, eps = node.args[5:7]
        with graph.inserting_before(node):
            norm = graph.call_function(aten.batch_norm.default, (*node.args[:5], False, momentum, eps, False))
        for taken in list(node.users):
            norm.meta = dict(taken.meta)
            taken.replace_all_uses_with(norm)
            graph.erase_node(taken)
        graph.erase_node(node)


def remove_dropout(graph: fx.Graph) -> None:
    """Takes out dropout, as evaluation mode does."""
    for node in list(graph.nodes):
        if ops.base_name(node).removesuffix("_") in DROPOUT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def norms_of_a_batch(graph: fx.Graph) -> list[fx.Node]:
    """The batch norms that take their statistics from the images.

    Where the images lie along the channels, a whole batch being one example, each image is normalised by itself: such
    a norm becomes the instance norm that it is, and is not among them.
    """
    found = []
    for node in graph.nodes:
        if ops.base_name(node) in BATCH_STATISTICS:
            found.append(node)
        if ops.base_name(node) != "batch_norm" or not node.args[5]:
            continue
        x, weight, bias, _, _, _, momentum, eps, _ = node.args
        assert isinstance(x, fx.Node)
        if ops.shape(x)[0] == 1:
            node.target, node.args = (
                aten.instance_norm.default,
                (x, weight, bias, None, None, True, momentum, eps, False),
            )
        else:
            found.append(node)
    return found


def compute_in_float32(module: nn.Module, graph: fx.Graph) -> set[torch.dtype]:
    """Computes in float32 what the model computes in another floating type; only what it returns may have one.

    Returns:
        The types that float32 took the place of, and that have fewer digits.
    """
    for node in graph.nodes:
        if node.op == "get_attr" and get_tensor(module, str(node.target)).dtype in OTHER_FLOATS:
            set_tensor(module, str(node.target), get_tensor(module, str(node.target)).float())
    coarse: set[torch.dtype] = set()
    for node in list(graph.nodes):
        val = ops.value(node)
        if node.op != "call_function" or _is_returned_cast(node):
            continue
        if isinstance(val, Tensor):
            coarse |= {val.dtype} & {torch.float16, torch.bfloat16}
        node.args, node.kwargs = (fx.node.map_aggregate(a, _as_float32) for a in (node.args, node.kwargs))
        source = node.args[0] if node.args else None
        if ops.base_name(node) in CASTS and isinstance(source, fx.Node) and _changes_nothing(source, val):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return coarse


def _is_returned_cast(node: fx.Node) -> bool:
    return ops.base_name(node) in CASTS and all(u.op == "output" for u in node.users)


def _as_float32(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in OTHER_FLOATS else argument


def _changes_nothing(source: fx.Node, after: object) -> bool:
    before = ops.value(source)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype or (before.is_floating_point() and after.is_floating_point())
