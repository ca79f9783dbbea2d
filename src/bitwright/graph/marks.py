"""Values that only mark something: masks before a softmax, fills around a maximum. They must not enter a range.

A mark is far below (or above) every real value, so that what reads it gives it no weight: the exponential is 0, the
maximum is another value. On a grid it would take the whole range from the values that count. Two things are done:

* an operator that writes a constant beside the values of one tensor (``masked_fill``, ``where``, an assignment, a pad)
  moves these values; it gets no quantizer of its own where its marks do no harm;
* what is computed from marks (a mask that is added, scaled, clamped) stays in float up to the operator that absorbs it.

So every spelling of a mask costs what an added, stored one costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops
from bitwright.graph.rewrite import get_tensor

WRITES = frozenset(
    [
        "masked_fill",
        "where",
        "index_put",
        "index_fill",
        "index_copy",
        "masked_scatter",
        "scatter",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "as_strided_scatter",
        "copy",
        "constant_pad_nd",
        "pad",
        "tril",
        "triu",
    ]
)
"""Operators whose result holds elements of their operands and constants."""
ABSORBS = frozenset(
    [
        "softmax",
        "_softmax",
        "exp",
        "exp2",
        "logsumexp",
        "sigmoid",
        "tanh",
        "relu",
        "relu6",
        "hardtanh",
        "hardsigmoid",
        "hardswish",
        "gelu",
        "silu",
        "elu",
        "softplus",
        "output",
    ]
)
"""Operators that read a mark in float and give what no mark can stretch."""
SELECTS = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "amax",
        "amin",
        "max",
        "min",
        "topk",
        "sort",
    ]
)
"""Operators that pick some of their values, and a mark only where there is nothing else."""
CARRIES = frozenset(
    [
        "neg",
        "rsub",
        "maximum",
        "minimum",
        "clamp",
        "clamp_min",
        "clamp_max",
        "nan_to_num",
        "log_softmax",
        "_log_softmax",
        "to",
        "_to_copy",
        "type_as",
    ]
)
"""Operators of single elements, beside additions, multiplications and moves, that hand marks on."""
FILLS = frozenset(
    ["full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"]
)
FILLED = FILLS | {"scalar_tensor", "fill"}
"""Operators whose result is one number, whatever they read."""
FAR = 1e3
"""A constant of this magnitude beside computed values is taken for a mark even where something reads it as a number."""
REASON = "holds marks, which {} reads in float"


def note_marks(module: fx.GraphModule) -> None:
    """Writes into a prepared graph which operators only move values beside marks, and what marks keep in float.

    ``meta["moves"]`` of a writing operator: the name of the operand whose values it holds (:func:`ops.moved`).
    ``meta["float"]`` of any node: why it stays in float.
    """
    marks = _Marks(module)
    for node in marks.fills:
        node.meta["moves"] = marks.data[node].name
    for node in module.graph.nodes:
        if node.op == "get_attr" and not bool(torch.isfinite(get_tensor(module, str(node.target))).all()):
            node.meta["float"] = "holds infinities, which no grid has"
    for node in marks.in_float():
        node.meta.setdefault("float", REASON.format(_reader(node)))


def _reader(node: fx.Node) -> str:
    """The layer that absorbs the marks, as an error or a table names it."""
    seen = set()
    todo = [node]
    while todo:
        user = next(iter(todo.pop(0).users), None)
        if user is None or user in seen:
            break
        seen.add(user)
        if ops.base_name(user) in ABSORBS | SELECTS:
            return str(user.meta.get("layer", ops.base_name(user)))
        todo.append(user)
    return "another operator"


class _Marks:
    """What a graph's nodes hold: constants, flags, values beside constants."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.data: dict[fx.Node, fx.Node] = {}
        """Of a writing operator, the operand whose values it holds."""
        self._roots: dict[fx.Node, fx.Node] = {}
        self._depends: set[fx.Node] = set()
        for node in self.nodes:
            self._depends |= {node} if node.op == "placeholder" or self._depends & set(node.all_input_nodes) else set()
            self._find_data(node)
            self._roots[node] = self._root(node)

    # --------------------------------------------------------------------------------------------- what nodes hold

    @cached_property
    def literals(self) -> dict[fx.Node, float]:
        """Nodes that hold one number everywhere, and that number; not a number where it is computed."""
        found: dict[fx.Node, float] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                value = get_tensor(self.module, str(node.target))
                if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
                    found[node] = float(value.flatten()[0])
            elif node.op == "call_function" and ops.is_float_tensor(node):
                operands = ops.tensor_operands(node)
                moved = bool(operands) and all(n in found for n in operands)
                if ops.base_name(node) in FILLED:
                    found[node] = _filled_with(node, found)
                elif moved and ops.kind(node) in {"move", "scalar"}:
                    found[node] = found[operands[0]] if ops.kind(node) == "move" else math.nan
        return found

    @cached_property
    def flags(self) -> set[fx.Node]:
        """Float tensors that are computed from booleans and integers of this image, and constants, alone."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op != "call_function" or not ops.is_float_tensor(node) or node not in self._depends:
                continue
            if ops.kind(node) in {"linear", "matmul"} or node in self.literals:
                continue
            tensors = [n for n in node.all_input_nodes if n in self._depends and isinstance(ops.value(n), Tensor)]
            if tensors and all(n in found or n in self.literals or not ops.is_float_tensor(n) for n in tensors):
                found.add(node)
        return found

    def _find_data(self, node: fx.Node) -> None:
        """Notes the operand whose values a writing operator holds: those of one tensor, and constants."""
        name = ops.base_name(node)
        if node.op != "call_function" or name not in WRITES | ops.CONCAT or not ops.is_float_tensor(node):
            return
        operands = [n for n in ops.tensor_operands(node) if name != "copy" or n is node.args[1]]
        values = [n for n in operands if n not in self.literals]
        writes = len(values) < len(operands) or _number_written(node) is not None or any(n in self.data for n in values)
        if writes and values and len({self._roots[n] for n in values}) == 1:
            self.data[node] = values[0]

    def _root(self, node: fx.Node) -> fx.Node:
        """The node whose values it holds, behind moves and writes."""
        source = self.data.get(node)
        if source is None and node.op == "call_function" and ops.kind(node) == "move":
            first = node.args[0]
            source = first if isinstance(first, fx.Node) else None
        return node if source is None else self._roots.get(source, source)

    # -------------------------------------------------------------------------------------------- where marks end

    @cached_property
    def absorbed(self) -> set[fx.Node]:
        """Nodes that marks may be in: every way from them ends in an operator that absorbs marks."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.users and all(
                self._absorbs(user) or (user in found and self._hands_on(user)) for user in node.users
            ):
                found.add(node)
        return found

    @cached_property
    def fills(self) -> set[fx.Node]:
        """Writing operators whose constants do no harm; a maximum may also pass their values on."""
        found: set[fx.Node] = set()
        passed: set[fx.Node] = set()
        for node in reversed(self.nodes):
            moves = node in self.data or (node.op == "call_function" and ops.kind(node) == "move")
            if not moves or not node.users or not all(map(self._ends(passed), node.users)):
                continue
            passed.add(node)
            if node in self.data:
                found.add(node)
        return found

    def _ends(self, passed: set[fx.Node]) -> Callable[[fx.Node], bool]:
        def ends(user: fx.Node) -> bool:
            if self._absorbs(user) or user in passed or (user in self.absorbed and self._hands_on(user)):
                return True
            return ops.base_name(user) in SELECTS

        return ends

    def _absorbs(self, user: fx.Node) -> bool:
        reads_no_values = ops.base_name(user) in FILLED or not (ops.is_float_tensor(user) or _is_list(user))
        return ops.base_name(user) in ABSORBS or reads_no_values

    def _hands_on(self, user: fx.Node) -> bool:
        return user in self.data or ops.kind(user) in {"move", "scalar", "add", "mul"} or ops.base_name(user) in CARRIES

    # ------------------------------------------------------------------------------------------ what stays in float

    def in_float(self) -> Iterator[fx.Node]:
        """Nodes that hold marks and do not only move values, the constants they are made of, and what feeds them."""
        marked = self._marked()
        yield from (n for n in marked if n not in self.fills)
        for node in self.nodes:
            if node in self.literals and node.users and all(u in self.fills or u in marked for u in node.users):
                yield node
        yield from self._feeding(marked | self.fills)
        yield from (n for n in self.nodes if n not in self.fills and self._writes_far_off(n))

    def _writes_far_off(self, node: fx.Node) -> bool:
        """Whether it holds a number that no tensor's range should reach, be it read by whatever."""
        if node in self.literals:
            return not abs(self.literals[node]) < FAR
        if node not in self.data:
            return False
        written = [self.literals[n] for n in node.all_input_nodes if n in self.literals]
        number = _number_written(node)
        return any(abs(v) >= FAR for v in (*written, *(() if number is None else (number,))))

    def _marked(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.fills and node in self.absorbed:
                found.add(node)
            elif node in self.absorbed and node.op == "call_function" and ops.is_float_tensor(node):
                operands = node.all_input_nodes
                made = node in self.flags or (ops.kind(node) == "add" and any(n.op == "get_attr" for n in operands))
                if made or any(n in found for n in operands):
                    found.add(node)
        return found

    def _feeding(self, marked: set[fx.Node]) -> set[fx.Node]:
        """Products and sums that only marked operators read: their accumulators go there unrounded."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            free = ops.kind(node) in {"matmul", "scalar"} or ops.base_name(node) == "linear" or _scales(node)
            moves = node.op == "call_function" and ops.kind(node) == "move"
            if not (free or moves) or node not in self.absorbed or not node.users:
                continue
            if any(u in marked or u in found for u in node.users):
                found.add(node)
        return {n for n in found if ops.kind(n) != "move"}


def _scales(node: fx.Node) -> bool:
    """Whether it multiplies by a stored tensor."""
    return ops.kind(node) == "mul" and any(n.op == "get_attr" for n in node.all_input_nodes)


def _filled_with(node: fx.Node, known: dict[fx.Node, float]) -> float:
    """The number that an operator of :data:`FILLED` puts everywhere."""
    name, last = ops.base_name(node), node.args[-1]
    if "zeros" in name or "ones" in name:
        return float("ones" in name)
    if isinstance(last, fx.Node):
        return known.get(last, math.nan)
    return float(last) if isinstance(last, int | float) else math.nan


def _is_list(node: fx.Node) -> bool:
    """Whether it gives several results, such as a maximum and where it lies."""
    return isinstance(ops.value(node), list | tuple)


def _number_written(node: fx.Node) -> float | None:
    """The number that a writing operator writes; None if it writes a tensor's elements."""
    name, args = ops.base_name(node), list(node.args)
    if name in {"tril", "triu"}:
        return 0.0
    if name in {"constant_pad_nd", "pad"}:
        if name == "pad" and (args[2] if len(args) > 2 else node.kwargs.get("mode", "constant")) != "constant":
            return None
        value = args[-1] if len(args) > (2 if name == "constant_pad_nd" else 3) else node.kwargs.get("value")
        return float(value or 0)  # type: ignore[arg-type]
    place = {"masked_fill": 2, "index_fill": 3, "scatter": 3}.get(name)
    values: list[Any] = args[1:3] if name == "where" else [] if place is None else args[place : place + 1]
    return next((float(v) for v in values if isinstance(v, int | float)), None)
