"""Which activations of a network live at the same time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from bitwright.graph import ops

VIEWS = frozenset(
    [
        "view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T",
        "movedim", "swapaxes", "slice", "select", "narrow", "squeeze", "unsqueeze", "expand", "expand_as",
        "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "chunk", "split", "split_with_sizes", "unbind",
        "tensor_split", "getitem",
    ]
)  # fmt: skip
"""Operators whose output is the input's memory. Other operators that move data (pooling, padding, rolling) copy it."""


def live_sets(graph: fx.Graph, ends: Mapping[fx.Node, fx.Node]) -> list[dict[fx.Node, int]]:
    """The tensors in memory at each step, with their number of values for one image; sets inside others left out.

    A step runs a group of fused operators as one: its inputs and its output are in memory together, nothing in
    between is. Weights and other stored tensors are not counted.

    Args:
        graph: prepared, shapes recorded for two images.
        ends: for every operator inside a group the one that ends it.

    Example: in ``y = relu(conv(x)); z = y + x`` the sets are {x, y} and {x, y, z}; the first is inside the second.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}

    def time(node: fx.Node) -> int:
        return order[ends.get(node, node)]

    held = {n: _values(n) for n in graph.nodes if _owns_memory(n) and n not in ends}
    last = {n: max([time(n), *(time(u) for u in _users(n))]) for n in held}
    sets: list[dict[fx.Node, int]] = []
    for step in held:
        now = time(step)
        sets.append({n: size for n, size in held.items() if time(n) <= now <= last[n]})
    kept: list[dict[fx.Node, int]] = []
    for live in sorted(sets, key=len, reverse=True):
        if not any(live.keys() <= other.keys() for other in kept):
            kept.append(live)
    return sorted(kept, key=lambda live: max(map(time, live)))


def _owns_memory(node: fx.Node) -> bool:
    if node.op in {"get_attr", "output"} or not ops.is_float_tensor(node):
        return False
    return node.op == "placeholder" or not _is_view(node)


def _is_view(node: fx.Node) -> bool:
    return ops.kind(node) == "move" and ops.base_name(node) in VIEWS


def _users(node: fx.Node) -> list[fx.Node]:
    """Operators that read the node's memory, directly or through views."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [user, *_users(user)] if _is_view(user) else [user]
    return found


def _values(node: fx.Node) -> int:
    """Elements for one image; an operator with several outputs is counted by its first."""
    value = ops.value(node)
    first = value[0] if isinstance(value, list | tuple) else value
    assert isinstance(first, torch.Tensor)
    return int(first.numel()) // 2
