"""What divides stays in float: on a grid a short length rounds to code 0, and 0/0 follows.

A divisor is found by structure: the second operand of a division, what a reciprocal, a root's reciprocal, a logarithm
or another function of a bounded domain reads. It stays in float back to the reduction or the layer that gives it. Where
a tensor is divided by what was reduced from itself (a normalisation that is written out), the tensor stays in float as
well, and one quantizer follows the whole, so that short rows are as exact as long ones.

The same holds where stored factors bring channels of very different size to one: rounded before, small ones are lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from bitwright.graph import ops
from bitwright.graph.rewrite import get_tensor

RECIPROCALS = frozenset({"rsqrt", "reciprocal"})
BOUNDED = frozenset({"log", "log2", "log10", "log1p", "logit", "asin", "acos", "acosh", "atanh", "erfinv"})
"""Functions that begin or end at a value, which a grid may step over."""
DIVIDES = {"div": 1, "floor_divide": 1, "remainder": 1, "fmod": 1, "addcdiv": 2}
"""Operators that divide, and the place of their divisor."""
REDUCES = ops.NORM | {
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "cumsum",
    "prod",
}
SINGLE = frozenset({"pow", "sqrt", "abs", "neg", "exp", "square", "rsub", "maximum", "minimum", "to", "_to_copy"})
"""Operators of single elements, beside activations, additions, multiplications and numbers."""
NEGLIGIBLE = 1e-3
"""A number that only keeps a divisor away from zero is no larger."""
REASON = "read by {}, to which a code 0 or a step too far is no number"
SPREAD = 4.0
"""Stored factors that differ by more make up for what differs before them."""
RESCALED = "rescaled in {} by stored factors that differ widely"
NORMALISED = "normalised by {}, which ends in one quantizer"


def note_divisors(graph_module: fx.GraphModule) -> None:
    """Writes ``meta["float"]``, a reason, at every node of a prepared graph that a division must not get rounded.

    ``meta["divisor"]`` where a normalisation ends: the name of the operand that divides, or that multiplies instead.
    ``meta["unbiased"]`` at linear operators without a bias that lead to one: short rows stay short there, and a bias
    that corrects the mean of all rows would be as long as they are.
    """
    for node in graph_module.graph.nodes:
        for divisor in _divisors(node):
            layer = str(node.meta.get("layer", node.name))
            found = _chain(divisor)
            for member in found:
                member.meta.setdefault("float", REASON.format(layer))
            for end in _ends(node, divisor, found):
                end.meta["divisor"] = divisor.name
                for member in _normalised(end, found):
                    member.meta.setdefault("float", NORMALISED.format(layer))
                for linear in _without_bias(graph_module, end):
                    linear.meta["unbiased"] = True
        for member in _rescaled(graph_module, node):
            member.meta.setdefault("float", RESCALED.format(node.meta.get("layer", node.name)))


def _divisors(node: fx.Node) -> Iterator[fx.Node]:
    """Operands that must not become zero, or of which small values count."""
    if node.op != "call_function" or not ops.is_float_tensor(node):
        return
    name = ops.base_name(node)
    divisor = node.args[DIVIDES[name]] if name in DIVIDES else None
    if isinstance(divisor, fx.Node) and ops.is_float_tensor(divisor):
        yield divisor
    elif name in RECIPROCALS | BOUNDED or (name == "pow" and _is_negative(node.args[1])):
        assert isinstance(node.args[0], fx.Node)
        yield node.args[0]
        if name not in BOUNDED:
            yield node


def _is_negative(exponent: object) -> bool:
    return isinstance(exponent, int | float) and exponent < 0


def _chain(divisor: fx.Node) -> set[fx.Node]:
    """The divisor back to what gives it, and what is read there for nothing else."""
    found: set[fx.Node] = set()
    todo = [divisor]
    while todo:
        node = _behind_moves(todo.pop())
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        if _passes_zero_on(node):
            todo += ops.tensor_operands(node)
    grown = True
    while grown:
        more = {n for node in found if _computes(node) for n in map(_behind_moves, ops.tensor_operands(node))}
        more = {n for n in more - found if _computes(n) and _readers(n) <= found}
        found, grown = found | more, bool(more)
    return found


def _passes_zero_on(node: fx.Node) -> bool:
    """Whether a value near zero comes from one near zero in its operand."""
    name, number = ops.base_name(node), node.args[1] if len(node.args) > 1 else None
    if name in ops.ADD | {"clamp", "clamp_min", "maximum"}:
        return not isinstance(number, int | float) or abs(number) <= NEGLIGIBLE
    return ops.kind(node) in {"scalar", "mul"} or name in {"sqrt", "abs", "square", "pow", "relu", "neg"} | RECIPROCALS


def _computes(node: fx.Node) -> bool:
    """Whether it is an operator of single elements or a reduction."""
    if node.op != "call_function" or not ops.is_float_tensor(node):
        return False
    kind, name = ops.kind(node), ops.base_name(node)
    return kind in {"activation", "scalar", "add", "mul"} or name in REDUCES | SINGLE | RECIPROCALS


def _ends(node: fx.Node, divisor: fx.Node, chain: set[fx.Node]) -> list[fx.Node]:
    """Where what was reduced from a tensor divides a tensor, or its reciprocal multiplies one."""
    if not any(ops.base_name(n) in REDUCES for n in chain):
        return []
    return [node] if ops.base_name(node) == "div" else [u for u in _readers(divisor) if ops.base_name(u) == "mul"]


def _normalised(end: fx.Node, chain: set[fx.Node]) -> set[fx.Node]:
    """The tensor that is divided, where the divisor was reduced from it and nothing else reads it."""
    found: set[fx.Node] = set()
    read = {_behind_moves(n) for member in chain for n in ops.tensor_operands(member)}
    for divided in {_behind_moves(n) for n in ops.tensor_operands(end)} - chain:
        group = {divided} | _centred(divided)
        if group & read:
            found |= _alone(group, chain | {end})
    return found


def _without_bias(module: fx.GraphModule, end: fx.Node) -> Iterator[fx.Node]:
    """The linear operators behind one another that lead to a normalisation, as far as none adds a bias."""
    todo = [_behind_moves(n) for n in ops.tensor_operands(end)]
    while todo:
        node = todo.pop()
        scales = ops.kind(node) == "scalar" and ops.base_name(node) in ops.MUL
        if scales or ops.base_name(node) in {"abs", "neg", "relu", "leaky_relu"} or _centred(node):
            todo += [_behind_moves(n) for n in ops.tensor_operands(node)]
        elif ops.kind(node) == "linear":
            bias = node.args[2]
            if isinstance(bias, fx.Node) and not bool(get_tensor(module, str(bias.target)).any()):
                yield node
                todo.append(_behind_moves(ops.tensor_operands(node)[0]))


def _centred(node: fx.Node) -> set[fx.Node]:
    """Of ``x - mean(x)``: the mean, and ``x``."""
    operands = [_behind_moves(n) for n in ops.tensor_operands(node)]
    if ops.kind(node) == "add" and len(operands) == 2:
        for x, mean in (operands, operands[::-1]):
            if ops.base_name(mean) in REDUCES and [_behind_moves(n) for n in ops.tensor_operands(mean)] == [x]:
                return {mean, x}
    return set()


def _alone(group: set[fx.Node], readers: set[fx.Node]) -> set[fx.Node]:
    """Of the group, operators that nothing but the group and the readers reads."""
    left = {n for n in group if n.op == "call_function"}
    while outside := {n for n in left if not _readers(n) <= left | readers}:
        left -= outside
    return left


def _rescaled(module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """What the node multiplies or divides by stored factors of very different size, back over stored offsets."""
    at = node
    factors = _stored_operand(module, node) if ops.base_name(node) in ops.MUL and node.op == "call_function" else None
    if factors is None or not _differ_widely(factors):
        return
    while True:
        others = [_behind_moves(n) for n in ops.tensor_operands(at) if n.op != "get_attr"]
        if len(others) != 1 or not _may_stay_float(others[0]) or _readers(others[0]) != {at}:
            return
        at = others[0]
        yield at
        if ops.kind(at) != "add" or _stored_operand(module, at) is None:
            return


def _stored_operand(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    stored = [n for n in node.all_input_nodes if n.op == "get_attr" and ops.is_float_tensor(n)]
    return get_tensor(module, str(stored[0].target)) if len(stored) == 1 else None


def _differ_widely(factors: Tensor) -> bool:
    sizes = factors.abs()[factors != 0]
    return sizes.numel() > 1 and float(sizes.max()) > SPREAD * float(sizes.min())


def _may_stay_float(node: fx.Node) -> bool:
    """Convolutions keep their integer kernels; factors behind them are folded into their weights where they can be."""
    return node.op == "call_function" and ops.base_name(node) not in ops.CONV | ops.CONV_TRANSPOSE


def _behind_moves(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and ops.kind(node) == "move":
        node = ops.moved(node)
    return node


def _readers(node: fx.Node) -> set[fx.Node]:
    """What reads its values, behind operators that only move them."""
    found: set[fx.Node] = set()
    for user in node.users:
        moves = user.op == "call_function" and ops.kind(user) == "move"
        found |= _readers(user) if moves else {user}
    return found
