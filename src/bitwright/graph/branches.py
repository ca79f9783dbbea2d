"""Parallel linear branches that only add up become one convolution, as re-parameterisable networks are deployed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitwright.graph import fold, ops, rewrite
from bitwright.graph.rewrite import aten, get_tensor

CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class Branch:
    """A term of a sum that is linear in its source, in float64: ``weight`` convolved with the source, plus ``bias``.

    Output ``o`` reads the source from ``o * stride - padding`` on, every ``dilation``. Of a factor for each channel,
    the weight is that factor, and there are no settings.
    """

    node: fx.Node
    """The convolution, or the norm."""
    source: fx.Node
    weight: Tensor
    """[C_out, C_in / groups, *kernel], or [C]."""
    bias: Tensor
    """[C_out]."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Extent of the weight along each spatial axis."""
        return tuple(self.weight.shape[2:])

    def scaled(self, factor: Tensor) -> Branch:
        """Times a number, or one for each output channel ([C_out])."""
        factor = factor.expand(len(self.bias))
        rows = factor.reshape(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=self.weight * rows, bias=self.bias * factor)


def merge(module: fx.GraphModule) -> bool:
    """Merges what can be merged in every sum of the graph; whether there was something.

    Two convolutions of one source (other kernels, the same groups and strides), or a convolution and a batch norm
    beside it, become one whose weight is the sum, each kernel padded to the largest. A source that is added as it is
    stays: in a weight it would lose its precision.
    """
    found = False
    for root in list(module.graph.nodes):
        if _is_sum(root) and not any(_is_sum(u) and _continues(root, u) for u in root.users):
            found = _merge_sum(module, root) or _take_norm_in(module, root) or found
    rewrite.prune(module.graph)
    return found


def _take_norm_in(module: fx.GraphModule, root: fx.Node) -> bool:
    """Folds a batch norm of a sum into the terms, if all of them are convolutions; whether it was there."""
    norm = next(iter(root.users))
    if len(root.users) > 1 or ops.base_name(norm) != "batch_norm" or None in norm.args[3:5]:
        return False
    terms = _terms(root, 1)
    if len({id(n) for n, _ in terms}) < len(terms) or not all(_is_own(node) for node, _ in terms):
        return False
    scale, shift = fold.norm_as_affine(module, norm)
    for i, (node, _) in enumerate(terms):
        fold.scale_outputs(module, node, scale, shift if i == 0 else None)
    fold.bypass(norm)
    return True


def _is_own(node: fx.Node) -> bool:
    """Whether it is a convolution that nothing else reads, with a weight that nothing else reads."""
    name = ops.base_name(node)
    convolves = name in ops.CONV | ops.CONV_TRANSPOSE and ops.kind(node) == "linear"
    return convolves and len(node.users) == 1 and fold.own_weight(node)


def _is_sum(node: fx.Node) -> bool:
    return (
        ops.base_name(node) in ops.ADD
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) and ops.is_float_tensor(a) and a.op != "get_attr" for a in node.args)
        and all(ops.shape(a) == ops.shape(node) for a in node.args if isinstance(a, fx.Node))
        and len(ops.shape(node)) - 2 in CONVOLUTIONS
    )


def _continues(inner: fx.Node, outer: fx.Node) -> bool:
    """Whether a sum is a part of another one and of nothing else."""
    return len(inner.users) == 1 and ops.shape(inner) == ops.shape(outer)


def _terms(node: fx.Node, sign: int) -> list[tuple[fx.Node, int]]:
    """What a sum adds, with signs."""
    terms: list[tuple[fx.Node, int]] = []
    for argument, own in zip(node.args, (sign, -sign if ops.base_name(node) == "sub" else sign), strict=True):
        assert isinstance(argument, fx.Node)
        inner = _is_sum(argument) and _continues(argument, node)
        terms += _terms(argument, own) if inner else [(argument, own)]
    return terms


def _merge_sum(module: fx.GraphModule, root: fx.Node) -> bool:
    terms = _terms(root, 1)
    if len({node for node, _ in terms}) < len(terms):  # one added to itself
        return False
    rest: list[tuple[fx.Node, int]] = []
    merged: list[tuple[Branch, list[tuple[fx.Node, int]]]] = []
    for term in terms:
        branch = _branch(module, term[0])
        if branch is None:
            rest.append(term)
        else:
            _add_to(root, merged, branch.scaled(torch.full((), float(term[1]), dtype=torch.float64)), term)
    if all(len(members) == 1 for _, members in merged):
        return False
    alone = [term for _, members in merged if len(members) == 1 for term in members]
    made = [(_written(module, root, branch), 1) for branch, members in merged if len(members) > 1]
    _write_sum(module, root, [*made, *alone, *rest])
    return True


def _add_to(root: fx.Node, merged: list[tuple[Branch, list[Any]]], branch: Branch, term: tuple[fx.Node, int]) -> None:
    """Adds a branch to the first one that can take it in."""
    for i, (other, members) in enumerate(merged):
        together = _together(root, other, branch)
        if together is not None:
            merged[i] = (together, [*members, term])
            return
    merged.append((branch, [term]))


def _write_sum(module: fx.GraphModule, root: fx.Node, parts: list[tuple[fx.Node, int]]) -> None:
    """The sum of the parts in place of the root; the first of them has a positive sign."""
    total, layer = parts[0][0], str(root.meta["layer"])
    for i, (part, sign) in enumerate(parts[1:], 2):
        name = layer if i == len(parts) else f"{layer}.{i}"
        total = rewrite.add_operator(module.graph, root, name, (aten.add if sign > 0 else aten.sub).Tensor, total, part)
    root.replace_all_uses_with(total)
    module.graph.erase_node(root)


def _branch(module: fx.GraphModule, node: fx.Node) -> Branch | None:
    """A term as a linear function of a source; None if it is something else, or others read it too."""
    if len(node.users) != 1:
        return None
    name = ops.base_name(node)
    if name in {"neg", "rsub", "mul"}:
        inner, factor = _factor(module, node)
        scaled = None if inner is None else _branch(module, inner)
        return None if scaled is None or factor is None else scaled.scaled(factor.to(scaled.bias.device))
    if name == "batch_norm" and None not in node.args[3:5]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return Branch(node, source, *fold.norm_as_affine(module, node))
    return _convolution(module, node) if name in ops.CONV and ops.kind(node) == "linear" else None


def _factor(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, Tensor | None]:
    """What is scaled, and the number or the one for each channel ([C]) by which it is."""
    name = ops.base_name(node)
    if name == "neg" or (name == "rsub" and node.args[1] == 0 and not node.kwargs):
        return node.all_input_nodes[0], torch.tensor(-1.0, dtype=torch.float64)
    if name != "mul":
        return None, None
    for inner, by in (tuple(node.args[:2]), tuple(node.args[1::-1])):
        if not isinstance(inner, fx.Node) or ops.shape(inner) != ops.shape(node):
            continue
        if isinstance(by, int | float):
            return inner, torch.tensor(float(by), dtype=torch.float64)
        if isinstance(by, fx.Node) and by.op == "get_attr":
            tensor = get_tensor(module, str(by.target)).double()
            sizes = (1,) * (len(ops.shape(node)) - tensor.dim()) + tuple(tensor.shape)
            if len(sizes) > 1 and all(n == 1 for i, n in enumerate(sizes) if i != 1):
                return inner, tensor.reshape(-1)
    return None, None


def _convolution(module: fx.GraphModule, node: fx.Node) -> Branch | None:
    source, weight, bias = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    w, b = (get_tensor(module, str(n.target)).double() for n in (weight, bias))
    given = [node.args[i] if len(node.args) > i else default for i, default in ((3, 1), (4, 0), (5, 1))]
    stride, padding, dilation = (_each(value, w.dim() - 2) for value in given)
    if stride is None or padding is None or dilation is None or node.kwargs:
        return None
    return Branch(node, source, w, b, stride, padding, dilation, rewrite.groups(node))


def _each(value: object, rank: int) -> tuple[int, ...] | None:
    """A setting for each axis; None for padding in words, which is no number."""
    if isinstance(value, str):
        return (0,) * rank if value == "valid" else None
    if isinstance(value, int):
        return (value,) * rank
    assert isinstance(value, list | tuple)
    return tuple(value) * (rank if len(value) == 1 else 1)


def _together(root: fx.Node, a: Branch, b: Branch) -> Branch | None:
    """The sum of two branches; None if no convolution computes it."""
    if a.source is not b.source or len(a.bias) != len(b.bias):
        return None
    if not a.stride:
        a, b = b, a
    if not a.stride:
        return replace(a, weight=a.weight + b.weight, bias=a.bias + b.bias)
    if not b.stride:
        if len(b.weight) != a.weight.shape[1] * a.groups:
            return None
        b = _as_convolution(a, b)
    if a.stride != b.stride or a.groups != b.groups:
        return None
    steps = [_common(*axis) for axis in zip(a.dilation, a.kernel, b.dilation, b.kernel, strict=True)]
    spans = [_span(*axis) for axis in zip(a.padding, a.kernel, b.padding, b.kernel, steps, strict=True)]
    found = [s for s in spans if s is not None]
    if len(found) < len(spans):
        return None
    node = max((a, b), key=lambda branch: math.prod(branch.kernel)).node
    padding, kernel, dilation = (tuple(s[i] for s in found) for i in range(3))
    weight = _padded(a, padding, kernel, dilation) + _padded(b, padding, kernel, dilation)
    made = Branch(node, a.source, weight, a.bias + b.bias, a.stride, padding, dilation, a.groups)
    return made if _sizes(made) == tuple(ops.shape(root)[2:]) else None


def _as_convolution(like: Branch, factor: Branch) -> Branch:
    """A factor for each channel as a convolution of one value."""
    channels, rank, wide = len(factor.weight), len(like.kernel), like.weight.shape[1]
    one = torch.zeros(channels, wide, dtype=factor.weight.dtype, device=factor.weight.device)
    rows = torch.arange(channels, device=one.device)
    one[rows, rows % wide] = factor.weight
    weight = one.reshape(channels, wide, *[1] * rank)
    return replace(
        factor, weight=weight, stride=(1,) * rank, padding=(0,) * rank, dilation=(1,) * rank, groups=like.groups
    )


def _common(step: int, width: int, other: int, other_width: int) -> int | None:
    """The dilation of both; that of a kernel of one value does not matter."""
    if width == 1:
        return other
    return step if other_width == 1 or step == other else None


def _span(padding: int, width: int, other: int, other_width: int, step: int | None) -> tuple[int, int, int] | None:
    """Padding, kernel and dilation along an axis that reach all values which either reads."""
    if step is None:
        return None
    before = max(padding, other)
    after = max((width - 1) * step - padding, (other_width - 1) * step - other)
    if (before - padding) % step or (before - other) % step or (before + after) % step:
        return None
    return before, (before + after) // step + 1, step


def _sizes(branch: Branch) -> tuple[int, ...]:
    sizes = [int(s) for s in ops.shape(branch.source)[2:]]
    rows = zip(sizes, branch.padding, branch.kernel, branch.dilation, branch.stride, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, d, s in rows)


def _padded(branch: Branch, padding: Sequence[int], kernel: Sequence[int], step: Sequence[int]) -> Tensor:
    """The branch's weight in the larger kernel."""
    sides: list[int] = []
    for p, own, k, width, d in zip(padding, branch.padding, kernel, branch.kernel, step, strict=True):
        first = (p - own) // d
        sides = [first, k - width - first, *sides]
    return F.pad(branch.weight, sides)


def _written(module: fx.GraphModule, root: fx.Node, branch: Branch) -> fx.Node:
    """A convolution that computes the branch."""
    rank = len(ops.shape(root)) - 2
    if not branch.stride:
        alone = replace(branch, weight=torch.empty(0, 1, *[1] * rank), groups=len(branch.weight), stride=(1,) * rank)
        branch = _as_convolution(alone, branch)
    layer = str(branch.node.meta["layer"])
    taken = {name for name, _ in module.named_buffers()}
    stored = [
        rewrite.store(module, root, _target(branch.node, position, kind, taken), tensor.float())
        for position, kind, tensor in ((1, "weight", branch.weight), (2, "bias", branch.bias))
    ]
    settings = (list(branch.stride), list(branch.padding), list(branch.dilation), branch.groups)
    made = rewrite.add_operator(module.graph, root, layer, CONVOLUTIONS[rank], branch.source, *stored, *settings)
    made.meta["nn_module_stack"] = branch.node.meta.get("nn_module_stack")
    return made


def _target(node: fx.Node, position: int, kind: str, taken: set[str]) -> str:
    """The path of the convolution's own tensor if nobody else reads it, or a free one beside it."""
    stored = node.args[position]
    own = isinstance(stored, fx.Node) and len(stored.users) == 1 and ops.kind(node) == "linear"
    if own:
        assert isinstance(stored, fx.Node)
        return str(stored.target)
    return rewrite.free(f"{node.meta['layer']}.{kind}", taken)
