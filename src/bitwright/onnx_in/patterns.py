"""Functions that files spell out in several nodes, joined into the one that PyTorch has: SiLU, GELU, norms, biases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from onnx import helper

from bitwright.onnx_in.fold import array_of, constant, widened
from bitwright.onnx_in.values import Unsupported
from bitwright.runtimes.session import Array

OWN_DOMAIN = "bitwright"
CLOSE = 1e-4
"""Relative difference of numbers that exporters round."""


class Nodes:
    """The nodes of a graph, with who makes and how many read each tensor, and the arrays that it stores."""

    def __init__(self, graph: Any, stored: Mapping[str, Array] | None = None) -> None:
        """Of a graph, with the large tensors that are kept apart from it."""
        apart = stored or {}
        self.nodes: list[Any] = list(graph.node)
        self.stored: dict[str, Array] = {
            t.name: widened(apart[t.name]) if t.name in apart else array_of(t) for t in graph.initializer
        }
        self.makers: dict[str, Any] = {}
        for node in self.nodes:
            self.makers |= {name: node for name in node.output if name}
            if node.op_type == "Constant":
                self._keep(node)
        self.ends = {value.name for value in graph.output}
        self.readers = Counter(name for node in self.nodes for name in node.input)

    def _keep(self, node: Any) -> None:
        try:
            self.stored[node.output[0]] = constant(node)
        except Unsupported:
            return

    def maker(self, name: str, kind: str | None = None) -> Any:
        """The node that makes the tensor, if it is of that kind; None else."""
        node = self.makers.get(name)
        return node if node is not None and (kind is None or node.op_type == kind) and not node.domain else None

    def alone(self, name: str) -> bool:
        """Whether one node reads the tensor, and nobody outside."""
        return self.readers[name] == 1 and name not in self.ends

    def number(self, name: str) -> float | None:
        """The one number that the tensor stores; None if it is more, or computed."""
        array = self.stored.get(name)
        return (
            float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind in "fi" else None
        )

    def halves(self, node: Any) -> Iterable[tuple[str, str]]:
        """Both inputs of a node, in both orders."""
        a, b = node.input
        return (a, b), (b, a)

    def scaled(self, name: str) -> tuple[str, float]:
        """What a tensor is a multiple of, and the factor; the tensor itself and 1 if it is no multiple."""
        node = self.makers.get(name)
        if node is None or node.op_type not in {"Mul", "Div"}:
            return name, 1.0
        for a, b in self.halves(node) if node.op_type == "Mul" else [tuple(node.input)]:
            number = self.number(b)
            if number:
                return a, number if node.op_type == "Mul" else 1 / number
        return name, 1.0


def join(graph: Any, stored: Mapping[str, Array] | None = None) -> Nodes:
    """The nodes of a graph with patterns joined, and without those that nothing reads; see :class:`Nodes`."""
    nodes = Nodes(graph, stored)
    for pattern in PATTERNS:
        found = Nodes.__new__(Nodes)
        found.__dict__ |= nodes.__dict__
        nodes = _joined(found, pattern)
    return _needed(nodes)


def _joined(nodes: Nodes, pattern: Callable[[Nodes, Any], list[Any] | None]) -> Nodes:
    made: list[Any] = []
    for node in nodes.nodes:
        new = None if node.domain else pattern(nodes, node)
        made += [node] if new is None else new
        if new is not None:
            nodes.makers |= {name: each for each in new for name in each.output}
    nodes.nodes = made
    _needed(nodes)
    nodes.readers = Counter(name for node in nodes.nodes for name in node.input)
    return nodes


def _needed(nodes: Nodes) -> Nodes:
    """Leaves out what no output hangs on."""
    nodes.nodes = needed(nodes.nodes, nodes.ends)
    return nodes


def needed(nodes: Sequence[Any], ends: Iterable[str]) -> list[Any]:
    """Those of sorted nodes that some tensors hang on."""
    wanted, kept = set(ends), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(reads(node))
            kept.append(node)
    return kept[::-1]


def reads(node: Any) -> Iterable[str]:
    """Tensors that a node reads, those that graphs inside it read of this one too."""
    yield from node.input
    for attribute in node.attribute:
        for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for each in inside.node:
                yield from reads(each)
            yield from (value.name for value in inside.output)


def close(a: float | None, b: float) -> bool:
    """Whether a number is the other, as exporters round it."""
    return a is not None and abs(a - b) <= CLOSE * abs(b)


def _new(kind: str, like: Any, inputs: list[str], **attributes: Any) -> list[Any]:
    return [helper.make_node(kind, inputs, [like.output[0]], name=like.name, domain=OWN_DOMAIN, **attributes)]


def silu(nodes: Nodes, node: Any) -> list[Any] | None:
    """``x * sigmoid(x)``, and with other gates Mish and hard swish."""
    if node.op_type != "Mul":
        return None
    for x, gate in nodes.halves(node):
        maker = nodes.maker(gate)
        if maker is None or not nodes.alone(gate):
            continue
        if maker.op_type == "Sigmoid" and maker.input[0] == x:
            return _new("Silu", node, [x])
        if maker.op_type == "HardSigmoid" and maker.input[0] == x and _is_third(maker):
            return _new("HardSwish", node, [x])
        inner = nodes.maker(maker.input[0], "Softplus") if maker.op_type == "Tanh" else None
        if inner is not None and inner.input[0] == x:
            return _new("Mish", node, [x])
    return None


def _is_third(node: Any) -> bool:
    found = {a.name: a.f for a in node.attribute}
    return close(found.get("alpha", 0.2), 1 / 6) and close(found.get("beta", 0.5), 0.5)


def hard_swish(nodes: Nodes, node: Any) -> list[Any] | None:
    """``x * clip(x + 3, 0, 6) / 6``."""
    if node.op_type not in {"Mul", "Div"}:
        return None
    factors, number = _factors(nodes, node.output[0])
    if len(factors) != 2 or not close(number, 1 / 6):
        return None
    for x, gate in (factors, factors[::-1]):
        clip = nodes.maker(gate, "Clip")
        shifted = nodes.maker(clip.input[0], "Add") if clip is not None and _bounds(nodes, clip) == (0, 6) else None
        if shifted is not None and any(a == x and nodes.number(b) == 3 for a, b in nodes.halves(shifted)):
            return _new("HardSwish", node, [x])
    return None


def _bounds(nodes: Nodes, clip: Any) -> tuple[float | None, float | None]:
    found = {a.name: a.f for a in clip.attribute}
    if found:
        return found.get("min"), found.get("max")
    given = [nodes.number(name) if name else None for name in clip.input[1:]]
    return (*given, None, None)[0], (*given, None, None)[1]


def _factors(nodes: Nodes, name: str, *, top: bool = True) -> tuple[list[str], float]:
    """The tensors whose product, times a number, the tensor is."""
    number = nodes.number(name)
    if number is not None:
        return [], number
    node = nodes.maker(name)
    if node is None or node.op_type not in {"Mul", "Div"} or not (top or nodes.alone(name)):
        return [name], 1.0
    if node.op_type == "Div":
        divisor = nodes.number(node.input[1])
        if not divisor:
            return [name], 1.0
        factors, number = _factors(nodes, node.input[0], top=False)
        return factors, number / divisor
    (a, p), (b, q) = (_factors(nodes, each, top=False) for each in node.input)
    return a + b, p * q


def spelled_gelu(nodes: Nodes, node: Any) -> list[Any] | None:
    """``x / 2 * (1 + erf(x / sqrt(2)))``, or by tanh."""
    if node.op_type not in {"Mul", "Div"}:
        return None
    factors, number = _factors(nodes, node.output[0])
    if len(factors) != 2 or not close(number, 0.5):
        return None
    for x, gate in (factors, factors[::-1]):
        one = nodes.maker(gate, "Add")
        inner = next((a for a, b in nodes.halves(one) if nodes.number(b) == 1), None) if one is not None else None
        if inner is None:
            continue
        error, tanh = nodes.maker(inner, "Erf"), nodes.maker(inner, "Tanh")
        if error is not None:
            source, scale = nodes.scaled(error.input[0])
            if source == x and close(scale, 1 / math.sqrt(2)):
                return _new("Gelu", node, [x])
        if tanh is not None and _is_tanh_of_gelu(nodes, x, tanh.input[0]):
            return _new("Gelu", node, [x], approximate="tanh")
    return None


def _is_tanh_of_gelu(nodes: Nodes, x: str, name: str) -> bool:
    """``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``."""
    total, scale = nodes.scaled(name)
    add = nodes.maker(total, "Add")
    if add is None or not close(scale, math.sqrt(2 / math.pi)):
        return False
    for a, b in nodes.halves(add):
        cube, factor = nodes.scaled(b)
        if a == x and close(factor, 0.044715) and _is_power(nodes, x, cube, 3):
            return True
    return False


def _is_power(nodes: Nodes, x: str, name: str, exponent: int) -> bool:
    node = nodes.maker(name)
    if node is None or name == x:
        return name == x and exponent == 1
    if node.op_type == "Pow":
        return bool(node.input[0] == x) and nodes.number(node.input[1]) == exponent
    if node.op_type == "Mul" and exponent > 1:
        return any(a == x and _is_power(nodes, x, b, exponent - 1) for a, b in nodes.halves(node))
    return False


def plain_norm(nodes: Nodes, node: Any) -> list[Any] | None:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis."""
    norm = _normalised(nodes, node)
    return None if norm is None else _new("LayerNorm", node, [norm[0]], axis=-1, epsilon=norm[1])


def scaled_norm(nodes: Nodes, node: Any) -> list[Any] | None:
    """The same, times a stored scale."""
    product = _with_stored(nodes, node, "Mul")
    norm = None if product is None else _normalised(nodes, nodes.maker(product[0], "Div"))
    if product is None or norm is None:
        return None
    return _new("LayerNorm", node, [norm[0], product[1]], axis=-1, epsilon=norm[1])


def affine_norm(nodes: Nodes, node: Any) -> list[Any] | None:
    """The same, times a stored scale, plus a stored bias."""
    total = _with_stored(nodes, node, "Add")
    product = None if total is None else _with_stored(nodes, nodes.maker(total[0], "Mul"), "Mul")
    norm = None if product is None else _normalised(nodes, nodes.maker(product[0], "Div"))
    if total is None or product is None or norm is None:
        return None
    return _new("LayerNorm", node, [norm[0], product[1], total[1]], axis=-1, epsilon=norm[1])


def _with_stored(nodes: Nodes, node: Any, kind: str) -> tuple[str, str] | None:
    """The operands of such a node: one that this node alone reads, and one that is stored along the last axis."""
    if node is None or node.op_type != kind:
        return None
    for a, b in nodes.halves(node):
        if b in nodes.stored and nodes.alone(a) and nodes.stored[b].ndim <= 1 + _extra(nodes.stored[b]):
            return a, b
    return None


def _extra(array: Array) -> int:
    """Leading axes of length 1."""
    return next((k for k, d in enumerate(array.shape) if d != 1), max(array.ndim - 1, 0))


def _normalised(nodes: Nodes, node: Any) -> tuple[str, float] | None:
    """The operand and epsilon of ``(x - mean) / sqrt(variance + eps)``."""
    if node is None or node.op_type != "Div":
        return None
    centred, root = (nodes.maker(name) for name in node.input)
    if centred is None or centred.op_type != "Sub" or root is None or root.op_type != "Sqrt":
        return None
    inside = nodes.maker(root.input[0], "Add")
    if inside is None:
        return None
    x, mean = centred.input[0], nodes.maker(centred.input[1], "ReduceMean")
    for name, number in nodes.halves(inside):
        variance, eps = nodes.maker(name, "ReduceMean"), nodes.number(number)
        if variance is None or eps is None or mean is None or mean.input[0] != x:
            continue
        axes = [_axes(nodes, each) for each in (mean, variance)]
        if axes != [[-1], [-1]] or not _is_square(nodes, variance.input[0], centred):
            continue
        return str(x), eps
    return None


def _is_square(nodes: Nodes, name: str, centred: Any) -> bool:
    """Whether a tensor is the square of the centred one, which some exporters compute a second time."""
    node = nodes.maker(name)
    if node is None or not node.input:
        return False
    base = nodes.maker(node.input[0], "Sub")
    same = base is not None and list(base.input) == list(centred.input)
    return same and _is_power(nodes, node.input[0], name, 2)


def _axes(nodes: Nodes, node: Any) -> list[int] | None:
    found = [list(a.ints) for a in node.attribute if a.name == "axes"]
    if found:
        return found[0]
    stored = nodes.stored.get(node.input[1]) if len(node.input) > 1 else None
    return None if stored is None else [int(v) for v in stored.reshape(-1)]


def spelled_group_norm(nodes: Nodes, node: Any) -> list[Any] | None:
    """An instance norm of channels that are joined by groups, in the shape of before, times a scale, plus a bias."""
    total = _of_channels(nodes, node, "Add")
    product = None if total is None else _of_channels(nodes, nodes.maker(total[0]), "Mul")
    back = None if product is None else nodes.maker(product[0], "Reshape")
    norm = (
        None if back is None or not nodes.alone(back.input[0]) else nodes.maker(back.input[0], "InstanceNormalization")
    )
    joined = None if norm is None or not nodes.alone(norm.input[0]) else nodes.maker(norm.input[0], "Reshape")
    if total is None or product is None or back is None or norm is None or joined is None:
        return None
    x, sizes, shape = joined.input[0], nodes.stored.get(joined.input[1]), nodes.maker(back.input[1], "Shape")
    as_it_was = shape is not None and shape.input[0] == x and {a.i for a in shape.attribute} <= {0}
    groups = _groups(nodes, norm)
    if sizes is None or sizes.tolist() != [0, groups, -1] or not as_it_was:
        return None
    vectors = []
    for name in (product[1], total[1]):
        vectors.append(f"{name}.vector")
        nodes.stored[vectors[-1]] = nodes.stored[name].reshape(-1)
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    return _new("GroupNorm", node, [x, *vectors], num_groups=groups, epsilon=epsilon)


def _groups(nodes: Nodes, norm: Any) -> int:
    """How many channels an instance norm has that scales by 1 and adds 0; 0 where it does something else."""
    scale, bias = (nodes.stored.get(name) for name in norm.input[1:3])
    plain = scale is not None and bias is not None and bool((scale == 1).all()) and not bias.any()
    return int(scale.size) if plain and scale is not None else 0


def _of_channels(nodes: Nodes, node: Any, kind: str) -> tuple[str, str] | None:
    """The operands of such a node: one that this node alone reads, and one that is stored for each channel of maps."""
    if node is None or node.op_type != kind or node.domain:
        return None
    for a, b in nodes.halves(node):
        shape = nodes.stored[b].shape if b in nodes.stored else ()
        if len(shape) > 2 and nodes.alone(a) and math.prod(shape) == shape[-3]:
            return a, b
    return None


def spelled_affine(nodes: Nodes, node: Any) -> list[Any] | None:
    """A product with stored numbers, plus stored numbers, of what no layer with weights made, which would take both."""
    for a, b in nodes.halves(node) if node.op_type == "Add" else ():
        product = nodes.maker(a, "Mul") if nodes.alone(a) and _several(nodes, b) else None
        for x, scale in nodes.halves(product) if product is not None else ():
            maker = nodes.maker(x)
            if _several(nodes, scale) and x not in nodes.stored and (maker is None or maker.op_type not in LAYERS):
                return _new("Affine", node, [x, scale, b])
    return None


def _several(nodes: Nodes, name: str) -> bool:
    return name in nodes.stored and nodes.stored[name].size > 1


LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def softmax_of_closed_rows(nodes: Nodes, node: Any) -> list[Any] | None:
    """A softmax with 0 where it gives no number: of rows whose scores are all minus infinity."""
    if node.op_type != "Where" or nodes.number(node.input[1]) != 0:
        return None
    weights = node.input[2]
    test = nodes.maker(node.input[0], "IsNaN")
    guarded = test is not None and test.input[0] == weights and nodes.alone(node.input[0])
    if not guarded or nodes.maker(weights, "Softmax") is None or nodes.readers[weights] != 2 or weights in nodes.ends:
        return None
    return _new("ZeroForNaN", node, [weights])


def spelled_roll(nodes: Nodes, node: Any) -> list[Any] | None:
    """Two parts of a tensor side by side along an axis, as exporters write a tensor whose end goes to the front."""
    if node.op_type != "Concat" or len(node.input) != 2:
        return None
    axis = next(a.i for a in node.attribute if a.name == "axis")
    first, second = (_part(nodes, name) for name in node.input)
    if first is None or second is None or first[0] != second[0] or {first[1], second[1]} != {axis}:
        return None
    return _new("TwoParts", node, [first[0]], axis=axis, places=[*first[2:], *second[2:]])


def _part(nodes: Nodes, name: str) -> tuple[str, int, int, int] | None:
    """The tensor that a slice is of, with its axis, start and end, where it has one axis, no step and one reader."""
    node = nodes.maker(name, "Slice") if nodes.alone(name) else None
    if node is None or len(node.input) < 4:
        return None
    numbers = [[int(v) for v in nodes.stored[each].reshape(-1)] for each in node.input[1:] if each in nodes.stored]
    if len(numbers) < len(node.input) - 1 or any(len(n) != 1 for n in numbers) or numbers[3:] not in ([], [[1]]):
        return None
    (start,), (end,), (axis,) = numbers[:3]
    return node.input[0], axis, start, end


def part_of_sequence(nodes: Nodes, node: Any) -> list[Any] | None:
    """One of the parts that a tensor was split into as a sequence, as PyTorch's older exporter writes them."""
    split = nodes.maker(node.input[0], "SplitToSequence") if node.op_type == "SequenceAt" else None
    position = nodes.number(node.input[1]) if split is not None else None
    if split is None or position is None:
        return None
    return _new("Part", node, list(split.input), position=int(position), **{a.name: a.i for a in split.attribute})


def joined_sequence(nodes: Nodes, node: Any) -> list[Any] | None:
    """Tensors that were put into a sequence and are joined along an axis."""
    listed = nodes.maker(node.input[0], "SequenceConstruct") if node.op_type == "ConcatFromSequence" else None
    settings = {a.name: a.i for a in node.attribute}
    if listed is None or settings.get("new_axis", 0):
        return None
    return [helper.make_node("Concat", list(listed.input), [node.output[0]], name=node.name, axis=settings["axis"])]


def linear_bias(nodes: Nodes, node: Any) -> list[Any] | None:
    """A vector that is added to a product with a stored matrix."""
    if node.op_type != "Add":
        return None
    for a, b in nodes.halves(node):
        product, bias = nodes.maker(a, "MatMul"), nodes.stored.get(b)
        if product is None or bias is None or not nodes.alone(a) or bias.ndim != 1:
            continue
        matrix = nodes.stored.get(product.input[1])
        if matrix is not None and matrix.ndim == 2 and bias.shape == matrix.shape[1:]:
            return _new("Linear", node, [*product.input, b])
    return None


PATTERNS: tuple[Callable[[Nodes, Any], list[Any] | None], ...] = (
    silu, hard_swish, spelled_gelu, spelled_group_norm, affine_norm, scaled_norm, plain_norm, linear_bias,
    spelled_affine, softmax_of_closed_rows, spelled_roll, part_of_sequence,
    joined_sequence,
)  # fmt: skip
"""In this order: each gives the nodes that stand in the place of one, or None."""
