"""Along which axis of each output the classes lie: told by following the channels of the last linear operators.

The network runs once on two images. Beside every value that a convolution or linear layer made without another one
after it, two tensors of the same shape travel: the number of each element's channel, and that of its position. Moves,
pools and concatenations are applied to them as to the value. The axis of an output along which channels vary and
positions do not is the axis of its classes. Where there is no such axis, or more than one, none is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.errors import UsageError
from bitwright.given.preprocessing import has_channels_last
from bitwright.graph import ops
from bitwright.graph.readings import Reading, with_values

GATES = frozenset({"sigmoid", "hardsigmoid"})
ELEMENTWISE = (ops.ACTIVATION - {"glu"}) | ops.ADD | ops.MUL | ops.SOFTMAX | {
    "abs", "batch_norm", "ceil", "call_module", "dropout", "erf", "exp", "expm1", "floor", "log", "log1p", "logit",
    "masked_fill", "maximum", "minimum", "nan_to_num", "neg", "pow", "reciprocal", "round", "rsqrt", "rsub", "sqrt",
    "square", "to", "_to_copy", "true_divide", "type_as", "where",
}  # fmt: skip
"""Operators that leave each element in its place; ``call_module`` is a quantizer."""
NORMS = frozenset({"layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm", "rms_norm"})
CLASSES = frozenset({"class", "classes", "cls", "label", "labels", "logits", "probabilities", "probs", "scores"})
"""Words in an output's name which say that it holds class scores, whatever else the name says."""
NO_CLASSES = frozenset({
    "angle", "angles", "bbox", "bboxes", "box", "boxes", "coordinates", "coords", "delta", "deltas", "descriptor",
    "descriptors", "disparity", "embedding", "embeddings", "keypoint", "keypoints", "landmark", "landmarks", "offset",
    "offsets", "reg", "regression",
})  # fmt: skip
"""Words in an output's name, or in the path of the layer that makes it, which say that it holds no class scores."""
NO_CLASSES_BY_NAME = NO_CLASSES | {
    "depth", "distance", "embed", "embeds", "feat", "feats", "feature", "features", "flow", "hidden", "latent", "pose",
    "pooled", "pooler", "proposals",
}  # fmt: skip
"""Words that say so in an output's name alone: many classifiers have a layer ``features``."""


@dataclass(frozen=True)
class _Mark:
    """Where the elements of a value come from; NaN where that is not known.

    Attributes:
        channels: number of the channel, in the value's shape, float64.
        positions: number of everything but the channel, in the value's shape, float64.
        layers: paths of the linear operators.
        history: names of the operators that changed values since.
        note: why they are no class scores, if that is known.
    """

    channels: Tensor
    positions: Tensor
    layers: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()
    note: str = ""


def read_outputs(
    graph: fx.GraphModule, images: Tensor, names: Sequence[str], classes: Mapping[str, int | None] | None = None
) -> list[Reading]:
    """How each output of a network is to be read.

    Args:
        graph: that returns a list of tensors; of a float network or of its quantized copy.
        images: a few real ones, [N, C, H, W], of which two are used.
        names: of the outputs.
        classes: axis of the classes of outputs by name, where it is known better; None for one that holds none.

    Raises:
        UsageError: ``classes`` names an output or an axis that does not exist.

    Example:
        >>> class Last(torch.nn.Module):
        ...     def forward(self, x):
        ...         return [torch.nn.functional.linear(x.movedim(1, -1), torch.ones(5, 3))]
        >>> read_outputs(fx.symbolic_trace(Last()), torch.rand(2, 3, 4, 4), ["scores"])
        [Reading(kind='scores', axis=3, note='')]
    """
    some = torch.cat([images[:1], images[:2]])[-2:]
    tracer = _Tracer(graph)
    with torch.no_grad():
        values = list(tracer.run(some))
    (end,) = (n for n in graph.graph.nodes if n.op == "output")
    nodes = end.args[0]
    readings = [
        _read(name, value, tracer.marks.get(node), moving=node in tracer.moving)
        for name, value, node in zip(names, values, nodes, strict=True)
    ]
    told = _beside_each_other(readings, values, some)
    for name, axis in (classes or {}).items():
        if name not in names:
            raise UsageError(f"Expected classes of an output out of {', '.join(names)}, found '{name}'.")
        position = list(names).index(name)
        told[position] = _as_said(name, axis, values[position])
    return told


def _as_said(name: str, axis: int | None, value: Tensor) -> Reading:
    if axis is None:
        return Reading("values", note="It was said to hold no classes.")
    if not 0 < axis < value.dim():
        shape = "x".join(map(str, value.shape[1:]))
        raise UsageError(
            f"Expected an axis from 1 to {value.dim() - 1} for the classes of '{name}' (images x {shape}), "
            f"found {axis}."
        )
    return with_values(Reading("scores", axis), value)


def _read(name: str, value: Tensor, mark: _Mark | None, *, moving: bool) -> Reading:
    """One output by itself."""
    if not moving:
        return Reading("constant", note="It does not depend on the image.")
    if not value.is_floating_point():
        return Reading("whole")
    if not value.numel():
        return Reading("values", note="It is empty.")
    if mark is None:
        return Reading("values", note="It is not known which of its axes holds classes.")
    if note := _said_by_names(name, mark.layers) or mark.note:
        return Reading("values", note=note)
    return _by_mark(value, mark)


def _by_mark(value: Tensor, mark: _Mark) -> Reading:
    channels, positions = mark.channels, mark.positions
    within = bool(((value >= 0) & (value <= 1)).all())
    across = [d for d in range(1, value.dim()) if _varies(channels, d)]
    if not across:
        if within and set(mark.history) & (GATES | ops.SOFTMAX):
            return Reading("labels")
        return Reading("values", note="It has a single channel, which is not known to be a probability.")
    free = [d for d in across if not _varies(positions, d)]
    if not free:
        return Reading("values", note="Its channels and positions lie along the same axis.")
    if len(free) > 1:
        return Reading("values", note=f"Its channels lie along the axes {', '.join(map(str, free))}.")
    (axis,) = free
    if not _distinct(channels, axis):
        return Reading("values", note=f"Several layers are joined along its axis {axis}.")
    found = with_values(Reading("scores", axis), value)
    gated = within and found.kind == "scores" and set(mark.history) & GATES
    return Reading("labels", axis) if gated else found


def _said_by_names(name: str, layers: frozenset[str]) -> str:
    if _words(name) & CLASSES:
        return ""
    if _words(name) & NO_CLASSES_BY_NAME:
        return f"By its name, {name}, it holds no class scores."
    layer = next((x for x in sorted(layers) if _words(x) & NO_CLASSES), None)
    return "" if layer is None else f"By the name of {layer}, which makes it, it holds no class scores."


def _words(name: str) -> set[str]:
    """Of a name in any of the usual spellings, in small letters."""
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()))


def _beside_each_other(readings: list[Reading], values: list[Tensor], images: Tensor) -> list[Reading]:
    """What outputs say of each other.

    Four values for each of many scored positions are boxes. Maps of several sizes, none as large as the image, belong
    to a detector or are features.
    """
    scored = {_positions(v, r.axis) for v, r in zip(values, readings, strict=True) if _classes(v, r) > 4}
    maps = [v for v, r in zip(values, readings, strict=True) if v.dim() == 4 and r.axis == 1]
    sizes = {tuple(v.shape[2:]) for v in maps}
    pyramid = len(sizes) > 1 and len({v.shape[1] for v in maps}) == 1 and _extent(images) not in sizes
    found = []
    for value, reading in zip(values, readings, strict=True):
        note = ""
        if value.dim() == 3 and _classes(value, reading) == 4 and _positions(value, reading.axis) in scored:
            note = "It holds four values for each position that another output scores, as boxes do."
        elif pyramid and value.dim() == 4 and reading.axis == 1:
            note = "It is one of several maps of different sizes, as detectors and feature extractors give."
        found.append(Reading("values", note=note) if note else reading)
    return found


def _extent(images: Tensor) -> tuple[int, ...]:
    """Height and width."""
    return tuple(images.shape[1:3] if has_channels_last(images.shape[1:]) else images.shape[2:])


def _classes(value: Tensor, reading: Reading) -> int:
    return 0 if reading.axis is None else value.shape[reading.axis]


def _positions(value: Tensor, axis: int | None) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(value.shape) if d != axis)


def _varies(mark: Tensor, axis: int) -> bool:
    """Whether a mark differs along an axis anywhere."""
    if mark.shape[axis] < 2 or not mark.numel():
        return False
    change = mark.narrow(axis, 1, mark.shape[axis] - 1) - mark.narrow(axis, 0, mark.shape[axis] - 1)
    return bool((change.nan_to_num(0).abs() > _tolerance(mark)).any())


def _distinct(channels: Tensor, axis: int) -> bool:
    """Whether all channels along an axis are known and different from each other, where they are known at all."""
    rows = channels.movedim(axis, -1).flatten(0, -2)
    rows = rows[~rows.isnan().all(-1)]
    rows = rows[:: max(1, len(rows) // 1024)]
    if rows.isnan().any() or not len(rows):
        return False
    return bool((rows.sort(-1).values.diff(dim=-1) > _tolerance(channels)).all())


def _tolerance(mark: Tensor) -> float:
    return 1e-9 * max(1.0, float(mark.nan_to_num(0).abs().max()))


class _Tracer(fx.Interpreter):
    """Runs a graph and marks every value that some output takes from a linear operator."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.marks: dict[fx.Node, _Mark] = {}
        self.moving: set[fx.Node] = set()
        """Nodes whose value depends on the images."""
        self._wanted = _since_linear(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        """One operator, and where its values come from."""
        result = super().run_node(n)
        if n.op == "placeholder" or any(m in self.moving for m in n.all_input_nodes):
            self.moving.add(n)
            if n in self._wanted and n.op != "output":
                mark = self._mark(n, result)
                if mark is not None:
                    self.marks[n] = mark
        return result

    def _mark(self, node: fx.Node, result: Any) -> _Mark | None:
        axis = self._channel_axis(node, result)
        if axis is not None:
            layers = frozenset({str(node.meta.get("layer", ""))}) if node.op != "placeholder" else frozenset()
            note = "It is made from the image's own pixels." if node.op == "placeholder" else ""
            return _Mark(*_numbered(result, axis), layers, note=note)
        name = ops.base_name(node)
        marked = [self.marks[m] for m in node.all_input_nodes if m in self.marks]
        if not marked:
            return None
        if name in ELEMENTWISE:
            return _in_place(name, marked, result)
        if name in NORMS and isinstance(result, Tensor) and marked[0].channels.shape == result.shape:
            return replace(marked[0], note="It comes out of a normalization, as features do.")
        if name in ops.MOVE | ops.POOL | ops.CONCAT:
            return self._moved(node, name, marked)
        return None

    def _channel_axis(self, node: fx.Node, result: Any) -> int | None:
        """Of the channels, where the operator makes some; of an image's, where it is the input."""
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return None
        name = ops.base_name(node)
        if node.op == "placeholder":
            return 1
        if name == "linear" or (name in ops.MATMUL | {"addmm"} and node.args[-1] not in self.moving):
            return result.dim() - 1
        if name in ops.LINEAR:
            spatial = int(re.findall(r"\d", name)[0])
            return result.dim() - 1 - spatial
        return None

    def _moved(self, node: fx.Node, name: str, marked: list[_Mark]) -> _Mark | None:
        """The operator applied to the marks themselves."""
        if isinstance(node.args[0], fx.Node) and node.args[0] not in self.marks:
            return None
        try:
            channels, positions = (self._applied(node, which) for which in ("channels", "positions"))
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        note = next((m.note for m in marked if m.note), "")
        if name in ops.CONCAT and len({m.history for m in marked}) > 1 and not note:
            note = "Its parts are made in different ways."
        layers = frozenset().union(*(m.layers for m in marked))
        return _Mark(channels, positions, layers, marked[0].history, note)

    def _applied(self, node: fx.Node, which: str) -> Any:
        def taken(m: fx.Node) -> Any:
            if m in self.marks:
                return getattr(self.marks[m], which)
            value = self.env[m]
            known = isinstance(value, Tensor) and value.is_floating_point()
            return torch.full_like(value, math.nan, dtype=torch.float64) if known else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), taken)
        if ops.base_name(node) == "constant_pad_nd":
            args = (*args[:2], math.nan)
        elif ops.base_name(node) == "pad" and args[2:3] in {(), ("constant",)}:
            args = (*args[:2], "constant", math.nan)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _numbered(value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Channel and position of every element."""
    shape = [1] * value.dim()
    shape[axis] = -1
    channels = torch.arange(value.shape[axis], dtype=torch.float64, device=value.device).reshape(shape)
    others = [n for d, n in enumerate(value.shape) if d != axis]
    positions = torch.arange(math.prod(others), dtype=torch.float64, device=value.device).reshape(others)
    return channels.expand(value.shape), positions.unsqueeze(axis).expand(value.shape)


def _in_place(name: str, marked: list[_Mark], result: Any) -> _Mark | None:
    """After an operator that leaves each element in its place: the marks of the operands that have the result's shape.

    An operand of a smaller shape, such as a factor for each position, changes nothing about where values come from.
    """
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    whole = [m for m in marked if m.channels.shape == result.shape]
    if not whole:
        return None
    first = whole[0]
    if any(not _equal(a.channels, b.channels) for a, b in pairwise(whole)):
        return None
    note = next((m.note for m in whole if m.note), "")
    if name == "tanh":
        note = note or "It comes out of a tanh, as class scores never do."
    if name in ops.ACTIVATION - GATES and "sum" in first.history:
        note = note or "It comes out of an activation after a sum, as features do."
    history = first.history if name == "call_module" else (*first.history, "sum" if len(whole) > 1 else name)
    layers = frozenset().union(*(m.layers for m in whole))
    return replace(first, history=history, layers=layers, note=note)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | a.isnan() | b.isnan()).all())


def _since_linear(graph: fx.Graph) -> set[fx.Node]:
    """Nodes from which an output is reached without passing another linear operator."""
    return set(_backwards(next(n for n in graph.nodes if n.op == "output")))


def _backwards(end: fx.Node) -> Iterator[fx.Node]:
    seen, waiting = {end}, [end]
    while waiting:
        node = waiting.pop()
        yield node
        if node is not end and ops.base_name(node) in ops.LINEAR:
            continue
        fresh = [m for m in node.all_input_nodes if m not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
