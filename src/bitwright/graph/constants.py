"""What does not depend on the image is computed once, and stored."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.graph import ops
from bitwright.graph.rewrite import free, get_tensor, set_tensor

ENLARGING = frozenset({"index", "gather", "index_select", "embedding", "repeat", "repeat_interleave", "expand"})
FACTORIES = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})


def fold_constants(module: nn.Module, graph: fx.Graph) -> None:
    """Computes once what does not depend on the image (positions, masks, standardised weights).

    What would grow a parameter (a table that is indexed) stays an operator, so that the stored file does not. What is
    written to in place is stored as each of its readers finds it, and what several blocks compute alike is stored once.
    """
    values, versions = _known(module, graph)
    _spell_numbers(values)
    _store_once(module, graph, values, versions)
    for node in reversed(list(values)):
        if not node.users:
            graph.erase_node(node)


Versions = dict[fx.Node, list[tuple[Tensor, list[fx.Node]]]]
"""What a node holds whenever its readers come, and which of them find it so."""


def _known(module: nn.Module, graph: fx.Graph) -> tuple[dict[fx.Node, Any], Versions]:
    """The values that no image reaches, and the computed ones among them that something else reads."""
    values: dict[fx.Node, Any] = {}
    versions: Versions = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = get_tensor(module, str(node.target))
            continue
        result = _evaluate(node, values) if node.op == "call_function" and _is_constant(node, values) else None
        if result is not None:
            values[node] = result
            continue
        for source in node.all_input_nodes:
            if source.op != "get_attr" and isinstance(values.get(source), Tensor):
                _remember(versions.setdefault(source, []), values[source], node)
    return values, versions


def _store_once(module: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any], versions: Versions) -> None:
    """Stores what was computed; a weight, and what is only added or multiplied, once for all that is alike."""
    taken = {str(n.target) for n in values if n.op == "get_attr" and any(u not in values for u in n.users)}
    shared: dict[tuple[Any, ...], fx.Node] = {}
    for node, found in versions.items():
        for tensor, readers in found:
            weight = all(ops.base_name(reader) in ops.LINEAR and reader.args[0] is not node for reader in readers)
            plain = weight or all(ops.base_name(reader) in {"add", "mul"} for reader in readers)
            owner = _source(node).target if weight else ""  # a module that is called twice computes its weight twice
            key = (owner, tensor.shape, tensor.dtype, hashlib.sha256(_bytes(tensor)).digest())
            if plain and key in shared:
                for reader in readers:
                    reader.replace_input_with(node, shared[key])
                continue
            stored = _store(module, graph, node, tensor, readers, taken)
            if plain:
                shared[key] = stored


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _spell_numbers(values: dict[fx.Node, Any]) -> None:
    """Puts numbers that were read from stored tensors into the operators that use them."""
    for node, value in values.items():
        if isinstance(value, bool | int | float):
            for reader in [u for u in node.users if u not in values]:
                reader.args = fx.node.map_arg(reader.args, partial(_swapped, node, value))


def _swapped(before: fx.Node, after: Any, found: fx.Node) -> Any:
    return after if found is before else found


def _remember(versions: list[tuple[Tensor, list[fx.Node]]], tensor: Tensor, reader: fx.Node) -> None:
    if not versions or not torch.equal(versions[-1][0], tensor):
        versions.append((tensor.detach().clone(memory_format=torch.contiguous_format), []))
    versions[-1][1].append(reader)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if ops.base_name(node) in FACTORIES:
        return all(n in values for n in node.all_input_nodes if n is not node.args[0])
    return all(n in values for n in node.all_input_nodes)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    assert callable(node.target)
    like = torch.zeros((), dtype=getattr(ops.value(node), "dtype", torch.float32))

    def resolve(n: fx.Node) -> Any:
        return values.get(n, like)

    args, kwargs = fx.node.map_arg(node.args, resolve), fx.node.map_arg(node.kwargs, resolve)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    before = sum(v.numel() for v in map(resolve, node.all_input_nodes) if isinstance(v, Tensor))
    if isinstance(result, Tensor) and ops.base_name(node) in ENLARGING and result.numel() > before:
        return None
    return result


def _store(
    module: nn.Module, graph: fx.Graph, node: fx.Node, tensor: Tensor, readers: list[fx.Node], taken: set[str]
) -> fx.Node:
    """Replaces a computed node by a stored tensor, named after the parameter that it was computed from."""
    source = _source(node)
    base = known_as(str(source.target)) if source.op == "get_attr" else f"constants.{node.name}"
    if hasattr(nn.Module, base.rpartition(".")[2]):  # such as "to"
        base += "_value"
    target, count = base, 0
    while target in taken:
        count += 1
        target = f"{base}_{count}"
    taken.add(target)
    with graph.inserting_before(node):
        stored = graph.get_attr(target)
    set_tensor(module, target, tensor)
    stored.meta.update(val=tensor, nn_module_stack=node.meta.get("nn_module_stack"))
    for reader in readers:
        reader.replace_input_with(node, stored)
    return stored


def _source(node: fx.Node) -> fx.Node:
    """The first of the stored tensors that a node is computed from; a node that is computed from none."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def known_as(target: str) -> str:
    """The path under which the user knows a tensor that ``torch.nn.utils.parametrize`` computes.

    Example:
        >>> known_as("body.0.parametrizations.weight.original1"), known_as("body.0.weight")
        ('body.0.weight', 'body.0.weight')
    """
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\..*", r"\1\2", target)


def spell_picks(module: nn.Module, graph: fx.Graph) -> None:
    """A stored mask that picks values becomes the positions that it picks, so that the result has a known size."""
    for node in [n for n in graph.nodes if ops.base_name(n) == "index"]:
        picks: list[fx.Node | None] = []
        assert isinstance(node.args[1], list | tuple)
        for pick in node.args[1]:
            stored = pick.op == "get_attr" if isinstance(pick, fx.Node) else False
            mask = get_tensor(module, str(pick.target)) if stored else None
            if mask is None or mask.dtype not in {torch.bool, torch.uint8}:
                picks.append(pick)
                continue
            for axis, places in enumerate(mask.nonzero(as_tuple=True)):
                target = free(f"{pick.target}_places_{axis}", {n for n, _ in module.named_buffers()})
                set_tensor(module, target, places)
                with graph.inserting_before(node):
                    chosen = graph.get_attr(target)
                chosen.meta["val"] = places
                picks.append(chosen)
        node.args = (node.args[0], picks)
