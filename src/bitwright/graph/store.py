"""A graph as plain data and back, without pickle: operators by name, arguments by value."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from bitwright.errors import UsageError
from bitwright.given.names import is_path, is_pure

_OPERATORS = {
    name: getattr(operator, name)
    for name in [
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "getitem",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "pow",
        "and_",
        "or_",
        "not_",
    ]
}
_SYMBOLIC = {name: getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def dump_graph(graph: fx.Graph) -> list[list[Any]]:
    """Nodes in order as ``[op, name, target, args, kwargs, layer]``.

    Raises:
        UsageError: an operator or an argument has no place in the format.
    """
    index = {node: i for i, node in enumerate(graph.nodes)}
    return [
        [n.op, n.name, _target_name(n), _encode(n.args, index), _encode(n.kwargs, index), n.meta.get("layer")]
        for n in graph.nodes
    ]


def load_graph(data: list[list[Any]], root: nn.Module) -> fx.GraphModule:
    """The graph module of :func:`dump_graph`'s data; ``root`` holds its tensors and modules.

    Raises:
        UsageError: the data names an operator that does not exist in this PyTorch.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs, layer in data:
        found = _find_target(target) if op == "call_function" else _named(op, target)
        made = graph.create_node(op, found, _decode(args, nodes), _decode(kwargs, nodes), name)
        if layer is not None:
            made.meta["layer"] = layer
        nodes.append(made)
    graph.lint()
    return fx.GraphModule(root, graph).eval()


def arguments_of(target: str) -> list[str]:
    """Names of an operator's arguments in their order; numbers where it has no names.

    Raises:
        UsageError: there is no such operator.

    Example:
        >>> arguments_of("aten.linear.default"), arguments_of("operator.getitem")[:2]
        (['input', 'weight', 'bias'], ['0', '1'])
    """
    schema = getattr(_find_target(target), "_schema", None)
    return [str(i) for i in range(8)] if schema is None else [a.name for a in schema.arguments]


def named_call(target: str, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name as :func:`dump_graph` keeps them: those with a place, and those that only have a name.

    Raises:
        UsageError: the operator does not exist, or has no such argument.
    """
    names, schema = arguments_of(target), getattr(_find_target(target), "_schema", None)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UsageError(f"The file names an argument '{unknown[0][:80]}', which {target} does not have.")
    placed: list[Any] = []
    for name in names:
        if name not in given or (schema is not None and schema.arguments[names.index(name)].kwarg_only):
            break
        placed.append(given[name])
    return placed, {name: given[name] for name in names[len(placed) :] if name in given}


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    if _OPERATORS.get(name) is target:
        return f"operator.{name}"
    if _SYMBOLIC.get(name) is target:
        return f"torch.{name}"
    raise UsageError(f"The operator {target} of {node.name} cannot be stored in a file.")


def _named(op: str, target: Any) -> str:
    """The name of an input, a tensor or a module: it becomes part of the graph's code, so that it must be a name."""
    dotted = op in {"get_attr", "call_module"} and is_path(target)
    if dotted or (op in {"placeholder", "output"} and str(target).isidentifier()):
        return str(target)
    raise UsageError(f"The file holds a node '{op}' of '{str(target)[:80]}', which no network has.")


def _find_target(name: str) -> Any:
    space, *parts = name.split(".")
    if space == "operator" and len(parts) == 1 and parts[0] in _OPERATORS:
        return _OPERATORS[parts[0]]
    if space == "torch" and len(parts) == 1 and parts[0] in _SYMBOLIC:
        return _SYMBOLIC[parts[0]]
    if space == "aten" and len(parts) == 2:
        packet = getattr(torch.ops.aten, parts[0], None)
        found = getattr(packet, parts[1]) if packet is not None and parts[1] in packet.overloads() else None
        if is_pure(found):
            return found
    raise UsageError(f"The file needs the operator '{name}', which PyTorch {torch.__version__} does not have.")


def _encode(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"n": index[value]}
    if isinstance(value, list | tuple):
        return [_encode(v, index) for v in value]
    if isinstance(value, dict):
        return {"d": {k: _encode(v, index) for k, v in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": str(value)}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"t": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"c": str(value)}
    if isinstance(value, slice):
        return {"s": [_encode(v, index) for v in (value.start, value.stop, value.step)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"An argument of type {type(value).__name__} cannot be stored in a file.")


def _decode(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, nodes) for v in value)
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "n":
        return nodes[content]
    if tag == "d":
        return {_keyword(k): _decode(v, nodes) for k, v in content.items()}
    if tag == "f":
        return _FLOATS[content]
    if tag == "t":
        return _constant(content)
    if tag == "c":
        return torch.device(content)
    return slice(*_decode(content, nodes))


def _keyword(name: str) -> str:
    if not name.isidentifier():
        raise UsageError(f"The file names an argument '{name[:80]}', which no operator has.")
    return name


def _constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise UsageError(f"The file needs torch.{name[:80]}, which is no type or layout of tensors.")
    return found
