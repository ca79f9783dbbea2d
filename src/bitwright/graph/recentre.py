"""Channels of activations brought to one size around zero, where weights on both sides take that in exactly.

What a layer norm yields is ``(x - shift) / scale`` for other gains and biases of its own, and the linear layers behind
it give both back (RepQ-ViT, Li et al., arXiv:2212.08254, section 4.2). In attention there is more to choose: a query's
channel may be divided by what the key's is multiplied by; a softmax does not see what all keys have in common; and its
rows sum to one, so that what is taken off every value comes back as a bias of the projection. Queries, keys and values
of one layer then fit one grid, each channel as if it had its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import fold, ops, rewrite
from bitwright.graph.capture import Captured, with_graph
from bitwright.graph.devices import device_of
from bitwright.graph.place import consumers

PER_OCTAVE = 4
"""Exponents are whole numbers of quarters."""
PER_REACH = 64
"""Shifts are whole parts of how far a tensor reaches."""
LEAST = 2.0**-10
"""Of the farthest channel's reach: others count as reaching that far at least."""
KEEPS_ROWS = frozenset({"view", "reshape", "unsqueeze", "squeeze", "masked_fill", "clone", "contiguous"})
"""Operators behind which a row of scores is a row of scores still, if it is as long."""


@dataclass(frozen=True)
class Recentring:
    """What is taken off the channels of some tensors, and by what they are divided then.

    Example: ``Recentring(("layer_norm",), (4, 0), (0, 3), 0.5)`` halves the first of two channels, and takes 1.5 off
    the second.
    """

    nodes: tuple[str, ...]
    """Layer norms or linear operators, whose channels follow one another."""
    exponents: tuple[int, ...]
    """Channels are divided by ``2**(exponent / 4)``,"""
    shifts: tuple[int, ...]
    """after ``shift * unit * 2**(exponent / 4)`` was taken off them."""
    unit: float

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Recentring:
        """As a ``result.json`` holds it."""
        return cls(tuple(row["nodes"]), tuple(row["exponents"]), tuple(row["shifts"]), row["unit"])

    def scales(self) -> Tensor:
        """[C], float64."""
        return torch.exp2(torch.tensor(self.exponents, dtype=torch.float64) / PER_OCTAVE)

    def offsets(self) -> Tensor:
        """[C], float64."""
        return torch.tensor(self.shifts, dtype=torch.float64) * self.unit * self.scales()


@dataclass
class Site:
    """Channels that can be shifted and scaled; they are numbered from 1, through all sources.

    Attributes:
        sources: what yields them, in program order.
        sinks: linear operators that give scales and shifts back, each with the number that every input has, [C_in].
        shifts: whether a channel can be shifted, [C].
        scales: whether it can be scaled, [C].
        pairs: numbers of the queries' and keys' channels that meet, [2, P]; what divides one multiplies the other.
        touched: names of all nodes whose channels change.
    """

    sources: list[fx.Node]
    sinks: list[tuple[fx.Node, Tensor]]
    shifts: Tensor
    scales: Tensor
    pairs: Tensor
    touched: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(n.name for n in self.sources)

    def chosen(self, low: Tensor, high: Tensor) -> Recentring:
        """Channels around zero that reach equally far, as nearly as can be.

        Args:
            low: least value of each channel, [C].
            high: largest value.
        """
        middle = torch.where(self.shifts, (low + high) / 2, torch.zeros_like(low)).double()
        reach = torch.maximum(high - middle, middle - low).double()
        reach = reach.clamp_min(LEAST * float(reach.max())).clamp_min(1e-30)
        octaves = reach.log2()
        wanted = torch.zeros_like(octaves)
        free = self.scales.clone()
        if self.pairs.numel():
            query, key = self.pairs - 1
            free[query] = free[key] = False
            wanted[query] = (octaves[query] - octaves[key]) / 2
            wanted[key] = -wanted[query]
            common = (octaves[query] + octaves[key]).max() / 2
        else:
            common = octaves[free].mean()
        wanted[free] = octaves[free] - common
        exponents = (wanted * PER_OCTAVE).round()
        scales = torch.exp2(exponents / PER_OCTAVE)
        unit = float((reach / scales).max()) / PER_REACH
        shifts = (middle / (scales * unit)).round()
        return Recentring(self.nodes, tuple(map(int, exponents)), tuple(map(int, shifts)), unit)


def sites(graph: fx.GraphModule, kind: str) -> list[Site]:
    """All that can be shifted and scaled in a prepared network.

    Args:
        graph: without quantizers, with its shapes recorded.
        kind: ``norm`` or ``attention``.
    """
    found = []
    for node in graph.graph.nodes:
        if kind == "norm" and ops.base_name(node) == "layer_norm":
            found.append(_norm(node))
        if kind == "attention" and ops.kind(node) == "softmax":
            found.append(_attention(node))
    return [site for site in found if site is not None]


def recentred(captured: Captured, changes: Iterable[Recentring]) -> Captured:
    """The network with its channels shifted and scaled, and the same outputs.

    Args:
        captured: prepared; not changed.
        changes: each of a site of it.

    Raises:
        ModelError: outputs on the example images changed.
    """
    wanted = {change.nodes: change for change in changes}
    if not wanted:
        return captured
    graph = copy.deepcopy(captured.graph)
    for site in (*sites(graph, "norm"), *sites(graph, "attention")):
        change = wanted.pop(site.nodes, None)
        if change is not None:
            _apply(graph, site, change)
    assert not wanted, f"{next(iter(wanted))} cannot be shifted"
    return with_graph(captured, graph, "the recentred graph")


def _apply(graph: fx.GraphModule, site: Site, change: Recentring) -> None:
    scales, offsets = (x.to(device_of(graph)) for x in (change.scales(), change.offsets()))
    start = 0
    for node in site.sources:
        part = slice(start, start := start + int(ops.shape(node)[-1]))
        factors, taken = 1 / scales[part], -offsets[part] / scales[part]
        if ops.kind(node) == "linear":
            fold.scale_outputs(graph, node, factors, taken)
            continue
        gain, bias = node.args[2:4]
        assert isinstance(gain, fx.Node)
        assert isinstance(bias, fx.Node)
        fold.replace_stored(graph, gain, rewrite.get_tensor(graph, str(gain.target)).double() * factors)
        fold.replace_stored(graph, bias, rewrite.get_tensor(graph, str(bias.target)).double() * factors + taken)
    for sink, numbers in site.sinks:
        fold.scale_inputs(graph, sink, scales[numbers - 1], offsets[numbers - 1])


# ---------------------------------------------------------------------------------------------------------- structure


def _norm(node: fx.Node) -> Site | None:
    """What a layer norm yields, if linear operators alone read it, also behind operators that move it."""
    stored = [a for a in node.args[2:4] if isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1]
    count = int(ops.shape(node)[-1])
    if len(stored) < 2 or any(ops.numel(a) != count for a in stored):
        return None
    sinks = _sinks(node, _numbered(node, 1))
    if not sinks:
        return None
    yes = torch.ones(count, dtype=torch.bool)
    return Site([node], sinks, yes, yes, torch.zeros(2, 0, dtype=torch.long), (node.name,))


def _attention(softmax: fx.Node) -> Site | None:
    """The projections before and behind a softmax over keys; None where they cannot be changed exactly."""
    scores, mixed = _scores(softmax), _product_of(softmax)
    if scores is None or mixed is None:
        return None
    operands = [scores.args[0], scores.args[1], mixed.args[1]]
    on_the_way: list[fx.Node] = []
    sources = [_projection(n, on_the_way) for n in operands[:2]] + [_projection(operands[2])]
    unique = list(dict.fromkeys(n for n in sources if n is not None))
    readers = {scores, *on_the_way}
    if None in sources or not (_read_by(unique, {*readers, mixed}) and _read_by(on_the_way, readers)):
        return None
    unique.sort(key={n: i for i, n in enumerate(softmax.graph.nodes)}.__getitem__)
    first, numbers = 1, {}
    for node in unique:
        numbers[node] = _numbered(node, first)
        first += int(ops.shape(node)[-1])
    query, key, value = (_arrived(n, numbers) for n in operands)  # type: ignore[arg-type]
    pairs = _pairs(query[..., :1, :], key[..., :1].transpose(-1, -2))
    if pairs is None or not (_constant(query, -2) and _constant(key, -1) and _constant(value, -2)):
        return None
    sinks = _sinks(mixed, value[..., :1, :].expand(tuple(map(int, ops.shape(mixed)))))
    shifted, scaled = torch.zeros(2, first, dtype=torch.bool)
    shifted[pairs[1]] = scaled[pairs[0]] = scaled[pairs[1]] = True
    if sinks:
        shifted[value.reshape(-1)] = scaled[value.reshape(-1)] = True
    touched = (*(n.name for n in (*unique, *on_the_way)), mixed.name)
    return Site(unique, sinks or [], shifted[1:], scaled[1:], pairs, touched)


def _scores(softmax: fx.Node) -> fx.Node | None:
    """The product of queries and keys that a softmax over its last axis reads, behind scales, masks and biases."""
    rank, node = len(ops.shape(softmax)), softmax.args[0]
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    if axis not in {-1, rank - 1}:
        return None
    while isinstance(node, fx.Node) and len(node.users) == 1 and ops.is_float_tensor(node):
        if ops.base_name(node) in {"matmul", "bmm"}:
            return node
        step = ops.kind(node) in {"scalar", "add"} or ops.base_name(node) in KEEPS_ROWS
        before = next((n for n in ops.tensor_operands(node) if n.op == "call_function" and _leads_on(n, node)), None)
        if not step or before is None:
            return None
        node = before
    return None


def _leads_on(operand: fx.Node, node: fx.Node) -> bool:
    """Whether the operand has rows of the node's length and nothing else reads it."""
    return len(operand.users) == 1 and ops.shape(operand)[-1:] == ops.shape(node)[-1:]


def _product_of(softmax: fx.Node) -> fx.Node | None:
    """The product of a softmax and the values."""
    found = consumers(softmax)
    if len(found) != 1 or ops.base_name(found[0]) not in {"matmul", "bmm"}:
        return None
    first, node = found[0].args[0], softmax
    while node is not first:
        if len(node.users) != 1 or (node is not softmax and ops.base_name(node) not in KEEPS_ROWS):
            return None
        node = next(iter(node.users))
    return found[0] if ops.shape(softmax)[-1] == ops.shape(first)[-1] else None


def _projection(node: Any, multiplied: list[fx.Node] | None = None) -> fx.Node | None:
    """The linear operator whose values an operand of a product holds.

    Where ``multiplied`` is given, they may be those values times a number: what multiplies them is added to it.
    """
    while isinstance(node, fx.Node) and not _changeable(node):
        if ops.kind(node) == "move":
            node = ops.moved(node)
        elif multiplied is not None and _times_number(node) is not None:
            multiplied.append(node)
            node = _times_number(node)
        else:
            return None
    return node if isinstance(node, fx.Node) else None


def _times_number(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator multiplies by a number or divides by one, if that is what it does."""
    if ops.kind(node) != "scalar" or ops.base_name(node) not in ops.MUL:
        return None
    factors = [a for a in node.args[:2] if not ops.is_scalar_operand(a)]
    divides = ops.base_name(node) == "div"
    return factors[0] if factors and not (divides and factors[0] is node.args[1]) else None  # type: ignore[return-value]


def _read_by(nodes: list[fx.Node], readers: set[fx.Node]) -> bool:
    """Whether nothing else reads them, also behind operators that move them."""
    return all(set(consumers(n)) <= readers for n in nodes)


def _changeable(node: fx.Node) -> bool:
    return ops.base_name(node) == "linear" and ops.kind(node) == "linear" and fold.own_weight(node)


def _numbered(node: fx.Node, first: int) -> Tensor:
    """Numbers of the channels along the last axis, in the shape of the node's value."""
    shape = tuple(map(int, ops.shape(node)))
    return torch.arange(first, first + shape[-1]).expand(shape)


def _arrived(node: fx.Node, numbers: dict[fx.Node, Tensor]) -> Tensor:
    """The numbers behind operators that move them."""
    if node not in numbers:
        factor = _times_number(node)
        if factor is None:
            numbers[node] = _moved(node, ops.moved(node), _arrived(ops.moved(node), numbers))
        else:
            numbers[node] = _arrived(factor, numbers)
    return numbers[node]


def _moved(node: fx.Node, operand: fx.Node, numbers: Any) -> Any:
    """What an operator that moves values makes of numbers; it pads with 0."""
    assert callable(node.target)

    def argument(n: fx.Node) -> Any:
        if n is operand:
            return numbers
        owner = node.graph.owning_module
        return rewrite.get_tensor(owner, str(n.target)).cpu() if n.op == "get_attr" and owner else ops.value(n)

    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    return node.target(*args, **kwargs)


def _sinks(node: fx.Node, numbers: Any) -> list[tuple[fx.Node, Tensor]] | None:
    """The linear operators that read all there is of a value, with the numbers of their inputs; None if others do."""
    found: list[tuple[fx.Node, Tensor]] = []
    for user in node.users:
        if _changeable(user) and user.args[0] is node:
            if not all(_constant(numbers, axis) for axis in range(numbers.dim() - 1)) or not bool((numbers > 0).all()):
                return None
            found.append((user, numbers.reshape(-1, numbers.shape[-1])[0]))
            continue
        behind = _sinks(user, _moved(user, node, numbers)) if ops.kind(user) == "move" else None
        if behind is None:
            return None
        found += behind
    return found


def _constant(numbers: Tensor, axis: int) -> bool:
    """Whether numbers are the same all along an axis."""
    return bool((numbers == numbers.narrow(axis, 0, 1)).all())


def _pairs(query: Tensor, key: Tensor) -> Tensor | None:
    """Numbers of queries' channels over those of keys, [2, P]; None unless each meets one other, and always it."""
    if query.shape != key.shape or not math.prod(query.shape):
        return None
    pairs = torch.unique(torch.stack([query.reshape(-1), key.reshape(-1)]), dim=1)
    distinct = len(set(pairs.flatten().tolist())) == pairs.numel()
    return pairs if distinct and int(pairs.min()) > 0 else None
