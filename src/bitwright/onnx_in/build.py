"""From the nodes of a file to a module: what each node computes, with the number of images set free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitwright.errors import ModelError
from bitwright.given.preprocessing import has_channels_last
from bitwright.given.text import short
from bitwright.onnx_in import operators
from bitwright.onnx_in.file import CONTROL, STANDARD, OnnxProgram, label_of, opset_of
from bitwright.onnx_in.fold import array_of, computed
from bitwright.onnx_in.network import OnnxNetwork, OperandSource, RepeatedTensor, Stored
from bitwright.onnx_in.patterns import OWN_DOMAIN, Nodes, join, needed, reads
from bitwright.onnx_in.tail import Rest, cut_behind, frame, kept_outputs
from bitwright.onnx_in.values import (
    BatchSize,
    Known,
    Node,
    NodeCall,
    Operand,
    Traced,
    Unsupported,
    Value,
    as_tensor,
    as_view,
    call,
)
from bitwright.runtimes.session import Array

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Linear", "LSTM", "GRU", "RNN"})
"""Operators with weights that a quantizer would want; none may lie behind the body."""
LAST_DIGITS = 1e-5
"""Share of a stored number, and of the largest beside it, by which the kernel for one image and for two differ."""
WHOLE = {
    TensorProto.UINT8: "uint8", TensorProto.INT8: "int8", TensorProto.UINT16: "uint16", TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
}  # fmt: skip
"""Whole numbers that files take as pixels, by their names; they are floats here."""
SETTINGS = frozenset({*WHOLE, TensorProto.INT64, TensorProto.BOOL})
"""Whole numbers and truths that files take beside images."""
CHOOSING_BOXES = frozenset({"NonMaxSuppression", "TopK", "NonZero"})
"""Operators that detectors end in."""
CHOOSING = frozenset({"TopK"})
"""Operators whose results change at once where scores cross: they are read only if layers take what they chose, since
two networks' choices cannot be compared output by output."""


@dataclass(frozen=True)
class Image:
    """The image input of a file.

    Attributes:
        name: in the file.
        batch: images that the file takes at once; 1 where it takes any number.
        shape: of one image, as the file has it.
        free: whether the file takes any number of images.
        axis: name of the axis of images; empty where it has none.
        whole: name of the type of whole numbers that the file takes; empty where it takes floats.
    """

    name: str
    batch: int
    shape: tuple[int, ...]
    free: bool
    axis: str = ""
    whole: str = ""

    @property
    def channels_last(self) -> bool:
        """Whether the file takes [N, H, W, C]."""
        return has_channels_last(self.shape)


@dataclass(frozen=True)
class Missing:
    """A node that has no counterpart here."""

    node: Any
    reason: str

    def __str__(self) -> str:
        domain = f"{self.node.domain}." if self.node.domain not in STANDARD else ""
        return f"{domain}{self.node.op_type} at '{label_of(self.node)}' ({self.reason})"


def onnx_images(program: Any, size: tuple[int, int, int] | None, path: Path) -> tuple[Image, ...]:
    """The image inputs that something reads, with their free sizes as given.

    Args:
        program: of ONNX.
        size: channels, height and width that the user gave.
        path: of the file, for errors.

    Raises:
        ModelError: there is none, one holds no floats or is of no known size, or they are of different batches.
    """
    unread = set(unread_inputs(program.graph))
    stored = {t.name for t in program.graph.initializer}
    aside = {v.name for v in settings_beside(program.graph)}
    inputs = [v for v in program.graph.input if v.name not in stored | unread | aside]
    if not inputs:
        raise ModelError(f"Expected an image input in {path}, found none. Export a network that takes images.")
    found = tuple(_image(value, size, path) for value in inputs)
    if len({(image.batch, image.free) for image in found}) > 1:
        said = ", ".join(f"{i.name} {'any number' if i.free else i.batch}" for i in found)
        raise ModelError(f"Expected inputs of as many images each in {path}, found {said}. Export it with one batch.")
    return found


def unread_inputs(graph: Any) -> list[str]:
    """Inputs of a graph that no output hangs on, by name; none where no input is read."""
    stored, ends = {t.name for t in graph.initializer}, {value.name for value in graph.output}
    wanted = ends.union(*(reads(node) for node in needed(graph.node, ends)))
    given = [value.name for value in graph.input if value.name not in stored]
    unread = [name for name in given if name not in wanted]
    return unread if len(unread) < len(given) else []


def settings_beside(graph: Any) -> list[Any]:
    """Inputs of few axes beside images, such as the sizes of the photos that boxes are scaled to.

    Whole numbers are settings. So are floats that no layer reads, in files that choose boxes.
    """
    stored, unread = {t.name for t in graph.initializer}, set(unread_inputs(graph))
    inputs = [v for v in graph.input if v.name not in stored | unread]
    if not any(len(v.type.tensor_type.shape.dim) == 4 for v in inputs):
        return []
    few = [v for v in inputs if len(v.type.tensor_type.shape.dim) <= 2]
    whole = [v.name for v in few if v.type.tensor_type.elem_type in SETTINGS]
    chooses = any(node.op_type in CHOOSING_BOXES for node in graph.node)
    floats = [v.name for v in few if v.name not in whole and chooses and not _reaches_layers(graph, v.name)]
    return [v for v in few if v.name in {*whole, *floats}]


def _reaches_layers(graph: Any, name: str) -> bool:
    """Whether an operator with weights depends on an input."""
    reached = {name}
    for node in graph.node:
        if reached.intersection(reads(node)):
            if node.op_type in WEIGHTED:
                return True
            reached.update(node.output)
    return False


def _image(value: Any, size: tuple[int, int, int] | None, path: Path) -> Image:
    kind = value.type.tensor_type
    sides = [int(d.dim_value) for d in kind.shape.dim]
    whole = WHOLE.get(kind.elem_type, "") if len(sides) == 4 else ""
    if not whole and kind.elem_type not in {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}:
        found = TensorProto.DataType.Name(kind.elem_type).lower() if kind.elem_type else "no tensor"
        raise ModelError(f"Expected an image input of floats or pixels in {path}, '{value.name}' is {found}. "
                         "Keep what of the file follows the conversion (onnx.utils.extract_model).")  # fmt: skip
    if len(sides) < 2:
        raise ModelError(f"Expected an image input [N, C, H, W] or [N, H, W, C] in {path}, found '{value.name}' of "
                         f"{'x'.join(str(s or '?') for s in sides) or 'no known shape'}.")  # fmt: skip
    shape = _sized(tuple(sides[1:]), size, value.name, path)
    return Image(value.name, max(sides[0], 1), shape, sides[0] <= 0, str(kind.shape.dim[0].dim_param), whole)


def _sized(shape: tuple[int, ...], size: tuple[int, int, int] | None, name: str, path: Path) -> tuple[int, ...]:
    """The shape of one image, its free lengths filled in."""
    last = has_channels_last(shape)
    found = shape
    if size is not None and len(shape) == 3:
        given = (*size[1:], shape[2]) if last else (shape[0] or size[0], *size[1:])
        found = tuple(s or g for s, g in zip(shape, given, strict=True))
        if found != given:
            raise ModelError(
                f"Expected input_size={'x'.join(map(str, found[:2] if last else found[1:]))}, which {path} fixes, "
                f"found {size[1]}x{size[2]}. Leave it out, or export the network for that size."
            )
    if not all(found):
        remedy = (
            f"Give bw.load_model('{path}', input_size='224x320'), with your height and width."
            if len(shape) == 3
            else "Export it with fixed sizes."
        )
        raise ModelError(
            f"Expected a fixed size of images in {path}, '{name}' is [N, {', '.join(str(s or '?') for s in shape)}]. "
            f"{remedy}"
        )
    return found


@dataclass
class NodeReader:
    """A file while it is read: the values of its tensors so far, and what has become of its nodes."""

    images: tuple[Image, ...]
    opset: int
    mode: FakeTensorMode
    values: dict[str, Value] = field(default_factory=dict)
    functions: list[tuple[Callable[..., Any], tuple[OperandSource, ...], tuple[str, ...]]] = field(default_factory=list)
    stored: dict[str, Tensor] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    tail: list[Any] = field(default_factory=list)
    last: frozenset[str] = frozenset()
    """First outputs of nodes behind which no weights lie."""
    _kept: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _shared: set[int] = field(default_factory=set)

    @property
    def image(self) -> Image:
        """One of the inputs, which are all of one batch."""
        return self.images[0]

    def add(self, node: Any) -> None:
        """Reads one node; what has no counterpart, and what hangs on that, becomes the tail."""
        behind = [name for name in node.input if name and name not in self.values]
        if behind:
            self.tail.append(node)
            return
        try:
            self._read(node)
        except Unsupported as error:
            self.missing.append(Missing(node, str(error)))
            self.tail.append(node)

    def _read(self, node: Any) -> None:
        inputs = tuple(self.values[name] if name else None for name in node.input)
        if node.op_type == "If" and isinstance(inputs[0], Known) and inputs[0].fixed:
            self._branch(node, taken=bool(inputs[0].small.reshape(-1)[0]))
            return
        if node.op_type in CONTROL:
            raise Unsupported("control flow")
        if node.op_type in CHOOSING and node.output[0] in self.last:
            raise Unsupported("no weights lie behind what it chooses")
        if node.domain in {*STANDARD, OWN_DOMAIN} and not any(isinstance(v, Traced) for v in inputs):
            stored = [v if isinstance(v, Known) else None for v in inputs]
            found = self._joined(node, stored) if node.domain == OWN_DOMAIN else computed(node, stored, self.opset)
            self.values |= {name: v for name, v in zip(node.output, found, strict=False) if name}
            return
        made = self._built(node, inputs)
        if isinstance(made, Known):
            self.values[node.output[0]] = made
        else:
            self._trace(node, made)

    def _built(self, node: Any, inputs: tuple[Value | None, ...]) -> NodeCall | Known:
        view = self._view(node, inputs)
        builder = operators.find(view.kind)
        if builder is None:
            raise Unsupported(f"unknown operator of the domain {node.domain or 'ai.onnx'}")
        try:
            return builder(view)
        except (LookupError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
            raise Unsupported(f"its settings cannot be read: {short(error)}") from error

    def _joined(self, node: Any, stored: Sequence[Known | None]) -> list[Known]:
        """What an operator that was joined of several gives for known arrays, for both sizes of the batch."""
        first = stored[0]
        assert first is not None
        with self.mode:
            small, large = (torch.empty_like(as_view(array)) for array in (first.small, first.large))
        images = Traced(node.input[0], small, large)
        made = self._built(node, (images, *stored[1:]))
        if isinstance(made, Known):
            return [made]
        known = replace(made, operands=tuple(first if v is images else v for v in made.operands))
        found = [self._run(known, large=large, mode=nullcontext()) for large in (False, True)]
        return [Known(a.numpy(), b.numpy()) for a, b in zip(*found, strict=True)]

    def _branch(self, node: Any, *, taken: bool) -> None:
        """The branch of an ``If`` that is always taken, in its place."""
        graph = next(a.g for a in node.attribute if a.name == ("then_branch" if taken else "else_branch"))
        self.values |= {t.name: Known.of(array_of(t)) for t in graph.initializer}
        for inner in graph.node:
            self.add(inner)
        for given, inside in zip(node.output, graph.output, strict=True):
            value = self.values.get(inside.name)
            if isinstance(value, Traced):
                same = helper.make_node("Identity", [inside.name], [given])
                self._trace(same, call(torch.clone, value))
            elif value is not None:
                self.values[given] = value

    def _view(self, node: Any, inputs: tuple[Value | None, ...]) -> Node:
        kind = f"{OWN_DOMAIN}.{node.op_type}" if node.domain == OWN_DOMAIN else node.op_type
        if node.domain not in {*STANDARD, OWN_DOMAIN}:
            kind = f"{node.domain}.{node.op_type}"
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = max((k + 1 for k, name in enumerate(node.output) if name), default=0)
        return Node(kind, node.output[0], inputs, settings, self.opset, outputs, self.image.batch)

    def _trace(self, node: Any, made: NodeCall) -> None:
        """Records the call, and what it gives for both sizes of the batch."""
        small, large = (self._run(made, large=which) for which in (False, True))
        places = made.sources or range(len(made.operands))
        sources = tuple(self._source(operand, k, node) for k, operand in zip(places, made.operands, strict=True))
        names = tuple(name or f"{node.output[0]}.{k}" for k, name in enumerate(node.output))[: len(small)]
        for name, a, b in zip(names, small, large, strict=False):
            self.values[name] = Traced(name, a, b, _inner(made, a, b))
        self.functions.append((made.function, sources, names))

    def _run(
        self, made: NodeCall, *, large: bool, mode: AbstractContextManager[Any] | None = None
    ) -> tuple[Tensor, ...]:
        images = self.image.batch * (2 if large else 1)
        operands = [self._fake(operand, images, large=large) for operand in made.operands]
        try:
            with mode or self.mode, torch.no_grad():
                found = made.function(*operands)
        except Unsupported:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise Unsupported(first.rstrip(".")) from error
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    @staticmethod
    def _fake(operand: Operand, images: int, *, large: bool) -> Any:
        if isinstance(operand, BatchSize):
            return images
        if isinstance(operand, Known):
            return as_view(operand.large if large else operand.small)
        if isinstance(operand, Traced):
            return operand.large if large else operand.small
        return operand

    def _source(self, operand: Operand, place: int, node: Any) -> OperandSource:
        """Where the operand comes from when the module runs."""
        if isinstance(operand, Traced):
            return operand.name
        if not isinstance(operand, Known):
            return operand
        like = [name for name in node.input if name and isinstance(self.values[name], Known)]
        given = next((name for name in like if self.values[name] is operand), None)
        if given is None and place < len(node.input) and node.input[place] in like:
            given = node.input[place]
        name = given or f"{node.output[0]}.constant"
        if operand.fixed:
            return Stored(self._keep(name, operand.small))
        return self._repeated(name, operand)

    def _repeated(self, name: str, operand: Known) -> RepeatedTensor:
        """What is the same for each image of a batch, stored once."""
        small, large = operand.small, operand.large
        if small.ndim == large.ndim:
            grown = [k for k, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
            if len(grown) == 1 and _alike(np.concatenate([small, small], grown[0]), large):
                batch = self.image.batch
                part = np.split(small, batch, grown[0]) if small.shape[grown[0]] % batch == 0 else [small]
                same = all(_alike(part[0], p) for p in part)
                kept = part[0] if same else small
                return RepeatedTensor(self._keep(name, kept), grown[0], 1 if same else batch)
        raise Unsupported("one of its constants depends on the number of images")

    def _keep(self, name: str, array: Any) -> str:
        """Stores a tensor under a name of its own, once."""
        content = np.asarray(array, order="C")
        key = (name, content.shape, content.dtype.str, hashlib.sha1(content.reshape(-1).view(np.uint8).data).digest())
        if key not in self._kept:
            free, count = name, 0
            while free in self.stored:
                count += 1
                free = f"{name}_{count}"
            self.stored[free] = self._tensor(content)
            self._kept[key] = free
        return self._kept[key]

    def _tensor(self, array: Array) -> Tensor:
        """The array itself as a tensor, the first time that it is asked for; then, or if it cannot be, a copy."""
        start = array.__array_interface__["data"][0]
        if array.dtype != np.float32 or not array.flags.writeable or start in self._shared or not array.size:
            return as_tensor(array)
        self._shared.add(start)
        return torch.from_numpy(array)


def _inner(made: NodeCall, small: Tensor, large: Tensor) -> int:
    """How many elements lie before the images along their axis."""
    if made.inner is not None:
        return made.inner
    axis = Traced("", small, large).batch_axis
    for operand in made.operands:
        if isinstance(operand, Traced) and axis is not None and operand.batch_axis is not None:
            same = operand.shape[operand.batch_axis] == small.shape[axis]
            return operand.inner if same else 1
    return 1


@dataclass(frozen=True)
class Body:
    """What of a file is captured, and what is not.

    Attributes:
        network: from the images to the tensors that the tail reads, and to outputs before it.
        images: the inputs.
        nodes: of the file that the network stands for, patterns not joined.
        behind: what follows.
        missing: what of that has no counterpart here, and why.
        frame: the file without its body (:func:`bitwright.onnx_in.tail.frame`).
        aside: outputs of the file that are an input or stored, which the network does not give.
    """

    network: OnnxNetwork
    images: tuple[Image, ...]
    nodes: list[Any]
    behind: Rest
    missing: list[Missing]
    frame: bytes
    aside: tuple[str, ...] = ()

    @property
    def image(self) -> Image:
        """The first input; others are of the same batch."""
        return self.images[0]


def build(whole: OnnxProgram, images: tuple[Image, ...], path: Path) -> Body:
    """The network of a program.

    Raises:
        ModelError: a node has no counterpart here and weights lie behind it, or no output depends on the images.
    """
    program = whole.proto
    _check_order(program.graph, path)
    joined = join(program.graph, whole.stored)
    reading, given = _read_all(program, joined, images), [image.name for image in images]
    settings = settings_beside(program.graph)
    if reading.missing or settings:
        _check_tail(reading, settings, path)
    behind = cut_behind(program.graph, reading.values, free=images[0].free)
    outputs = [v.name for v in program.graph.output]
    traced = {name: value for name in [*outputs, *behind.read] if (value := reading.values.get(name)) is not None
              and isinstance(value, Traced)}  # fmt: skip
    for name, value in traced.items():
        _check_first_axis(name, value, path, None if name in outputs else next(iter(reading.missing), None))
    ends = {name: value.small for name, value in traced.items()}
    made = {name: value for name, value in ends.items() if name not in given}
    if not made or not reading.functions:
        raise ModelError(f"Expected outputs that depend on the images in {path}, found none. Export it again.")
    if not any(_computes_floats(node, reading.values) for node in joined.nodes):
        raise ModelError(f"Expected a network that computes with floats in {path}, found whole numbers alone. "
                         "Give the float network.")  # fmt: skip
    network = OnnxNetwork(given, tuple(made), reading.functions, reading.stored)
    kept = kept_outputs(program.graph, reading.values)
    found = frame(program, behind, [*made.items(), *((n, v) for n, v in ends.items() if n not in made)], settings, kept)
    aside = tuple(name for name in outputs if name in kept or name in given)
    return Body(network.eval(), images, needed(program.graph.node, made), behind, reading.missing, found, aside)


def _alike(a: Array, b: Array) -> bool:
    """Whether arrays are the same; floats that were computed for another number of images differ in their last bits."""
    if a.shape != b.shape or a.dtype.kind != "f":
        return np.array_equal(a, b)
    bound = LAST_DIGITS * float(np.abs(b).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=LAST_DIGITS, atol=bound, equal_nan=True))


def _check_first_axis(name: str, value: Traced, path: Path, cut_at: Missing | None) -> None:
    """Images lie along the first axis of what the network gives, also where it ends before an operator that is none."""
    grown = [a != b for a, b in zip(value.small.shape, value.large.shape, strict=True)]
    if grown[:1] != [True] or any(grown[1:]):
        sides = ", ".join("N" if free else str(side) for side, free in zip(value.small.shape, grown, strict=True))
        if cut_at is not None:
            raise ModelError(
                f"Expected operators that can be captured in {path}, found {cut_at}, before which '{name}' is "
                f"[{sides}] for N images. Export it in other operators (such as torch.where for an assignment by a "
                "mask), or cut the file where images lie along the first axis (onnx.utils.extract_model)."
            )
        raise ModelError(
            f"Expected images along the first axis of what {path} gives, '{name}' is [{sides}] for N images. "
            "Cut the file before it (onnx.utils.extract_model), or export it without mixing images."
        )


def _check_order(graph: Any, path: Path) -> None:
    """Every tensor is stored, given, or made by an earlier node, as ONNX asks for; some exporters forget one."""
    made = {t.name for t in (*graph.initializer, *graph.input)} | {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        unknown = next((name for name in node.input if name and name not in made), None)
        if unknown is not None:
            raise ModelError(
                f"Expected a whole graph in {path}, {node.op_type} at '{label_of(node)}' reads '{unknown}', which "
                "nothing before it makes. Export it again, with another version or exporter."
            )
        twice = next((name for name in node.output if name in made), None)
        if twice:
            raise ModelError(
                f"Expected every tensor of {path} to be made once, {node.op_type} at '{label_of(node)}' makes "
                f"'{twice}' a second time. Export it again, with another version or exporter."
            )
        made.update(node.output)
    missing = next((value.name for value in graph.output if value.name not in made), None)
    if missing is not None:
        raise ModelError(
            f"Expected every output of {path} to be made, nothing makes '{missing}'. Export it again, or take it out "
            "of the outputs."
        )


def _computes_floats(node: Any, values: dict[str, Value]) -> bool:
    found = [values.get(name) for name in (*node.input, *node.output)]
    return node.op_type != "Cast" and any(isinstance(v, Traced) and v.small.is_floating_point() for v in found)


def _read_all(program: Any, joined: Nodes, images: tuple[Image, ...]) -> NodeReader:
    reading = NodeReader(images, opset_of(program), FakeTensorMode(allow_non_fake_inputs=True))
    reading.values |= {name: Known.of(array) for name, array in joined.stored.items()}
    for image in images:
        with reading.mode:
            small, large = (torch.empty(image.batch * k, *image.shape) for k in (1, 2))
        reading.values[image.name] = Traced(image.name, small, large)
    reading.last = _behind_weights(joined.nodes)
    for node in joined.nodes:
        if not (node.op_type == "Constant" and node.output[0] in reading.values):
            reading.add(node)
    return reading


def _behind_weights(nodes: Sequence[Any]) -> frozenset[str]:
    """First outputs of the nodes that lead to no weights; none where there are no weights at all."""
    if not any(node.op_type in WEIGHTED for node in nodes):
        return frozenset()
    read: set[str] = set()
    last = set()
    for node in reversed(nodes):
        if node.op_type in WEIGHTED | CONTROL or read.intersection(node.output):  # weights may lie in graphs inside
            read.update(reads(node))
        else:
            last.add(node.output[0])
    return frozenset(last)


def _check_tail(reading: NodeReader, settings: Sequence[Any], path: Path) -> None:
    """Only what follows the last weight may be left as it is, and read inputs beside images."""
    stored = {n for n, v in reading.values.items() if isinstance(v, Known)}
    weighted = [n for n in reading.tail if n.op_type in WEIGHTED and stored.intersection(n.input)]
    if not weighted and any(_has_weight(made) for made in reading.functions):
        return
    if not reading.missing:
        said = TensorProto.DataType.Name(settings[0].type.tensor_type.elem_type).lower()
        raise ModelError(f"Expected layers that depend on images alone in {path}, some depend on '{settings[0].name}' "
                         f"({said}). Export the part that takes images.")  # fmt: skip
    first = reading.missing[0]
    raise ModelError(f"Expected operators that can be captured in {path}, found {first}. {_remedy(first.node)}.")


def _remedy(node: Any) -> str:
    """What to do about a node that has no counterpart here."""
    if node.op_type in CONTROL:
        return "Export it with fixed sizes, or simplify it first (onnxsim)"
    if node.domain.startswith("com.microsoft"):
        return "Give the file from before it was optimised for ONNX Runtime"
    return "Export it in other operators, or cut the file before it (onnx.utils.extract_model)"


def _has_weight(made: tuple[Callable[..., Any], Sequence[OperandSource], Sequence[str]]) -> bool:
    return any(isinstance(source, Stored) for source in made[1])
