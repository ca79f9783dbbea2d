"""Scales of channels moved out of a tensor: the same function, computed over channels that are alike.

Cross-layer equalization (Nagel et al., arXiv:1906.04721, section 4.1) and the migration of SmoothQuant (Xiao et al.,
arXiv:2211.10438): ``y = W2 f(W1 x)`` equals ``(W2 diag(s)) f((diag(1/s) W1) x)`` where ``f(s z) = s f(z)`` in every
channel. A scale goes into the weights and biases beside the tensor as far as operators commute with it. Where one does
not, as SiLU, a multiplication stands between it and the tensor's quantizer. All scales are powers of two, so that
nothing is rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import fold, ops, rewrite
from bitwright.graph.capture import Captured, with_graph
from bitwright.graph.devices import device_of

COMMUTING = frozenset({"relu", "leaky_relu", "prelu"})
"""Activations for which ``f(s z) = s f(z)``; operators that move or pool are asked one by one."""
DIVISIBLE = frozenset({"activation", "add", "mul", "scalar", "norm", "pool", "other"})
"""Kinds of operators whose output may be divided before it is rounded: what computes in float."""


OF_IMAGES = frozenset({"batch_norm", "group_norm", "instance_norm"})
OVER_LAST_AXIS = frozenset({"layer_norm", "native_layer_norm", "rms_norm"})
CHANGES_AXES = frozenset(
    ["permute", "transpose", "t", "movedim", "swapaxes", "view", "reshape", "flatten", "unflatten"]
)
NEAR = 64
"""Operators that are looked at for the axis of channels."""


@dataclass(frozen=True)
class ChannelScales:
    """A tensor of the float network, and what its channels are divided by: ``2**exponents``.

    Example: ``ChannelScales("conv2d", (0, -3))`` makes the second of two channels eight times larger.
    """

    node: str
    exponents: tuple[int, ...]


@dataclass
class _Edits:
    """What has to change around one tensor.

    Channels are told by number, from 1 on and 0 for those of other tensors, in a tensor of the value's rank that is
    broadcast along all axes but that of the channels.
    """

    rows: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    """Operators whose outputs are multiplied."""
    columns: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    """Linear operators whose inputs are multiplied."""
    before: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    """Values that are multiplied ahead of their quantizer."""
    after: list[tuple[fx.Node, Tensor, list[fx.Node]]] = field(default_factory=list)
    """Values that are multiplied behind their quantizer, for some of their readers."""
    scaled: set[str] = field(default_factory=set)
    """Names of the values whose channels change."""


def equalized(captured: Captured, scales: Iterable[ChannelScales]) -> Captured:
    """The network with other scales of channels, and the same outputs.

    Args:
        captured: prepared; not changed.
        scales: applied in order; each must be possible (:func:`reach`).

    Raises:
        ModelError: outputs on the example images changed.
    """
    wanted = list(scales)
    if not wanted:
        return captured
    graph = copy.deepcopy(captured.graph)
    for each in wanted:
        node = next(n for n in graph.graph.nodes if n.name == each.node)
        edits = _plan(graph, node)
        assert edits is not None, f"{each.node} cannot have scales of channels"
        scales = torch.tensor([1.0, *(2.0**e for e in each.exponents)], device=device_of(graph))
        _apply(graph, edits, scales)
    return with_graph(captured, graph, "the balanced graph")


def reach(graph: fx.GraphModule, node: fx.Node) -> frozenset[str] | None:
    """Names of the tensors whose channels change with those of a node's; None if they cannot change exactly.

    Args:
        graph: prepared.
        node: yields a tensor with a quantizer of its own.
    """
    edits = None if channels(node) < 2 else _plan(graph, node)
    return None if edits is None else frozenset(edits.scaled)


def channel_axis(node: fx.Node) -> int:
    """Axis of the channels: 1 where the nearest linear operator or normalisation is one of images, else the last."""
    rank, seen, at = len(ops.shape(node)), {node}, [node]
    for each in at:
        name = ops.base_name(each)
        if name in ops.CONV | ops.CONV_TRANSPOSE | OF_IMAGES:
            return min(1, rank - 1)
        if name == "linear" or name in OVER_LAST_AXIS or len(at) > NEAR:
            break
        beside = [*each.users, *each.all_input_nodes]
        new = [n for n in beside if n not in seen and ops.is_float_tensor(n) and ops.base_name(n) not in CHANGES_AXES]
        seen.update(new)
        at += new
    return rank - 1


def channels(node: fx.Node) -> int:
    """How many there are; 0 for a tensor without an axis for them."""
    if not isinstance(ops.value(node), Tensor) or len(ops.shape(node)) < 2:
        return 0
    return int(ops.shape(node)[channel_axis(node)])


def _numbers(node: fx.Node) -> Tensor:
    """Of the node's channels, in the rank of its tensor."""
    shape = [1] * len(ops.shape(node))
    shape[channel_axis(node)] = -1
    return torch.arange(1, channels(node) + 1).reshape(shape)


# ------------------------------------------------------------------------------------------------------- what changes


def _plan(graph: fx.GraphModule, node: fx.Node) -> _Edits | None:
    """What divides the node's channels and gives their scales back to all that read them; None if that cannot be."""
    edits, numbers = _Edits(scaled={node.name}), _numbers(node)
    return edits if _divide(graph, node, numbers, edits) and _give_back(graph, node, numbers, edits) else None


def _divide(graph: fx.GraphModule, node: fx.Node, numbers: Tensor, edits: _Edits) -> bool:
    """Against the data's way, to the operator whose parameters take the division in."""
    at, passed = node, {node.name}
    while not _takes_in(at, numbers):
        source = _only_source(at)
        if source is None or _like(source, numbers) != _like(node, numbers):
            break
        arrived = _passed(graph, at, source, numbers)
        if arrived is None or arrived.shape != numbers.shape or not torch.equal(arrived, numbers):
            break
        at = source
        passed.add(at.name)
    if _takes_in(at, numbers):
        edits.rows.append((at, numbers))
        edits.scaled |= passed
        return True
    edits.before.append((node, numbers))
    return ops.kind(node) in DIVISIBLE and ops.RESCALES not in node.meta


def _takes_in(node: fx.Node, numbers: Tensor) -> bool:
    """Whether parameters that no other operator reads can divide the node's channels."""
    if ops.kind(node) == "linear":
        return fold.own_weight(node) and _fits(node, numbers)
    gain = {"layer_norm": numbers.dim() - 1, "group_norm": 1}.get(ops.base_name(node))
    if gain is None or len(node.args) < 4 or numbers.shape[gain] != numbers.numel():
        return False
    stored = [a for a in node.args[2:4] if isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1]
    return len(stored) == 2 and all(ops.numel(a) == numbers.numel() for a in stored)


def _only_source(node: fx.Node) -> fx.Node | None:
    """The operand of an operator that commutes, if nothing else reads it."""
    source = node.args[0] if node.args else None
    if not _commutes(node) or not isinstance(source, fx.Node) or len(source.users) > 1:
        return None
    return source if isinstance(ops.value(source), Tensor) else None


def _give_back(graph: fx.GraphModule, value: fx.Node, numbers: Tensor, edits: _Edits) -> bool:
    """The data's way, to all operators that take the scales in, or cannot be passed."""
    rest = []
    for user in list(value.users):
        if user.op == "output":
            return False
        if not ops.is_float_tensor(user):
            continue
        if ops.kind(user) == "linear" and user.args[0] is value:
            if not _fits(user, numbers) or not fold.own_weight(user):
                return False
            edits.columns.append((user, numbers))
            continue
        arrived = _passed(graph, user, value, numbers)
        if arrived is None:
            rest.append(user)
            continue
        edits.scaled.add(user.name)
        if not _give_back(graph, user, arrived, edits):
            return False
    if any(map(_in_integers, rest)):
        return False
    if rest:
        edits.after.append((value, numbers, rest))
    return True


def _in_integers(node: fx.Node) -> bool:
    """Whether an integer kernel reads the value, also behind operators that move it."""
    if ops.kind(node) == "move":
        return any(map(_in_integers, node.users))
    return ops.kind(node) in {"linear", "matmul", "concat", "output"} or ops.base_name(node) in ops.LINEAR


def _commutes(node: fx.Node) -> bool:
    return ops.base_name(node) in COMMUTING or ops.kind(node) in {"move", "pool", "concat"}


def _passed(graph: fx.GraphModule, node: fx.Node, value: fx.Node, numbers: Tensor) -> Tensor | None:
    """The numbers of a node's channels, given those of an operand; None if it does not commute with their scales.

    Asked of the operator itself: noise times the numbers must give what noise alone gives, times the numbers that
    arrive. Other operands are noise, so that a concatenation along another axis is none that commutes.
    """
    if not _commutes(node) or not isinstance(ops.value(node), Tensor) or ops.RESCALES in node.meta:
        return None
    if any(map(_is_computed_index, node.all_input_nodes)):
        return None
    noise, scales = _noise(value), numbers.float()
    plain, scaled = (_run(graph, node, value, x, _noise) for x in (noise, noise * scales))
    alone = _run(graph, node, value, scales.expand_as(noise), lambda n: torch.zeros_like(_noise(n)))
    for axis in range(plain.dim()):
        others = [d for d in range(plain.dim()) if d != axis]
        found = (alone.amax(others, keepdim=True) if others else alone).round()
        if bool((found == found.amax()).all()):
            found = found.amax(axis, keepdim=True)
        if torch.allclose(scaled, plain * found.clamp_min(1), rtol=1e-5, atol=1e-6 * float(scaled.abs().max())):
            return found.long()
    return None


def _is_computed_index(node: fx.Node) -> bool:
    """Whether the images say what an operator moves, so that it cannot be asked."""
    return node.op != "get_attr" and isinstance(ops.value(node), Tensor) and not ops.is_float_tensor(node)


def _run(graph: fx.GraphModule, node: fx.Node, value: fx.Node, x: Tensor, other: Callable[[fx.Node], Tensor]) -> Tensor:
    """The operator's output where one of its operands is ``x`` and other activations are what is asked for."""

    def operand(n: fx.Node) -> Any:
        if n is value:
            return x.contiguous()
        if n.op == "get_attr":
            return rewrite.get_tensor(graph, str(n.target)).cpu()
        return other(n) if ops.is_float_tensor(n) else ops.value(n)

    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def _noise(node: fx.Node) -> Tensor:
    """The same every time, in the shape of the node's tensor."""
    return torch.randn(tuple(map(int, ops.shape(node))), generator=torch.Generator().manual_seed(0))


def _like(node: fx.Node, numbers: Tensor) -> list[int]:
    """Sizes of the tensor along the axes of the numbers; empty for a tensor of another rank."""
    sizes = ops.shape(node)
    return [int(s) for s, n in zip(sizes, numbers.shape, strict=False) if n > 1] if len(sizes) == numbers.dim() else []


def _fits(node: fx.Node, numbers: Tensor) -> bool:
    """Whether the numbers lie along the axis of a linear operator's channels."""
    return numbers.dim() > _channels_of(node) and numbers.shape[_channels_of(node)] == numbers.numel()


def _channels_of(node: fx.Node) -> int:
    """Axis of a linear operator's channels, those that it reads and those that it yields."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return len(ops.shape(first)) - 1 if ops.base_name(node) == "linear" else 1


# ------------------------------------------------------------------------------------------------------------ changes


def _apply(graph: fx.GraphModule, edits: _Edits, scales: Tensor) -> None:
    """``scales[i]`` is that of the channel with the number ``i``, [C + 1]."""
    for node, numbers in edits.rows:
        factors = 1 / scales[numbers].reshape(-1)
        if ops.kind(node) == "linear":
            fold.scale_outputs(graph, node, factors.double())
            continue
        for stored in node.args[2:4]:
            assert isinstance(stored, fx.Node)
            fold.replace_stored(graph, stored, rewrite.get_tensor(graph, str(stored.target)) * factors)
    for node, numbers in edits.columns:
        fold.scale_inputs(graph, node, scales[numbers].double().reshape(-1))
    divided = {}
    for node, numbers in edits.before:
        divided[node] = _multiply(graph, node, 1 / scales[numbers], list(node.users), "before")
    for node, numbers, readers in edits.after:
        _give_back_behind(graph, divided.get(node, node), scales[numbers], readers)


def _give_back_behind(graph: fx.GraphModule, node: fx.Node, factors: Tensor, readers: list[fx.Node]) -> None:
    """A multiplication for these readers of a value; those that are one themselves take the factors in."""
    products = [n for n in readers if ops.RESCALES in n.meta]
    for product in products:
        stored = product.args[1]
        assert isinstance(stored, fx.Node)
        fold.replace_stored(graph, stored, rewrite.get_tensor(graph, str(stored.target)) * factors)
    rest = [n for n in readers if n not in products]
    if rest:
        _multiply(graph, node, factors, rest, "after")


def _multiply(graph: fx.GraphModule, node: fx.Node, factors: Tensor, readers: list[fx.Node], where: str) -> fx.Node:
    """Puts a multiplication between a value and some of its readers; it bears the name of the value's layer."""
    target = rewrite.free(f"channel_scales.{node.name}_{where}", {name for name, _ in graph.named_buffers()})
    rewrite.set_tensor(graph, target, factors)
    with graph.graph.inserting_after(node):
        stored = graph.graph.get_attr(target)
    stored.meta["val"] = factors
    with graph.graph.inserting_after(stored):
        product = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, stored))
    product.meta = {**node.meta, ops.RESCALES: where}
    for reader in readers:
        reader.replace_input_with(node, product)
    return product
