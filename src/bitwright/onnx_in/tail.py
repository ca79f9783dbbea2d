"""What follows the captured body of a file, and everything else of it that no quantizer touches."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.named_boxes import named_boxes
from bitwright.given.text import short
from bitwright.onnx_in.kinds import NOT_FLOAT32, widen
from bitwright.onnx_in.patterns import reads
from bitwright.onnx_in.values import Known, Traced, Value
from bitwright.runtimes.onnxruntime import patient_options
from bitwright.runtimes.session import Array

REMEDY = "Give decode= with a function of the network's own outputs."
STORE = "Store its value in the file, as an initializer of that name."
ONLY_SHAPES = frozenset({"Shape", "Size"})
"""Operators that read no values."""
TENSOR_KINDS = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32,
         torch.bool: TensorProto.BOOL, torch.float64: TensorProto.DOUBLE}  # fmt: skip


@dataclass(frozen=True)
class Rest:
    """Where a graph is cut in two.

    Attributes:
        nodes: behind the cut, in order.
        read: tensors that depend on the images, which those read.
        known: arrays that they read.
    """

    nodes: list[Any]
    read: list[str]
    known: dict[str, Array]


def cut_behind(graph: Any, values: dict[str, Value], *, free: bool) -> Rest:
    """What of a graph is needed for its outputs behind the tensors that have values.

    Args:
        graph: of ONNX.
        values: of its tensors, by name.
        free: whether the file takes any number of images: what depends on it is computed behind the cut then.
    """
    makers = {name: node for node in graph.node for name in node.output if name}
    given = {value.name for value in graph.input} - values.keys()
    inner = {name for node in graph.node for name in reads(node)} - makers.keys()
    needed: set[int] = set()
    read: list[str] = []
    known: dict[str, Array] = {}
    waiting = [v.name for v in graph.output if v.name not in values or _varies(values[v.name])]
    seen = set(waiting)
    while waiting:
        node = makers[waiting.pop()]
        needed.add(id(node))
        for name in reads(node):
            if not name or name in seen | given or (name in inner and name not in values):
                continue
            seen.add(name)
            value = values.get(name)
            if isinstance(value, Traced):
                read.append(name)
            elif isinstance(value, Known) and not (free and _varies(value)):
                known[name] = value.small
            else:
                waiting.append(name)
    return Rest([n for n in graph.node if id(n) in needed], sorted(read), known)


def _varies(value: Value) -> bool:
    """Whether it is an array that depends on the number of images."""
    return isinstance(value, Known) and not value.fixed


def frame(
    program: Any, behind: Rest, ends: Sequence[tuple[str, Tensor]], settings: Sequence[Any], kept: Mapping[str, Array]
) -> bytes:
    """The file without its body, serialized: names, metadata, outputs, and the tail with what it reads as inputs.

    What the file says of its inputs, and of nodes of the body by their first output, stands among the values.

    Args:
        program: the whole.
        behind: the tail.
        ends: name and example of every tensor that the body gives, in its order, and of images that are read.
        settings: inputs of the file beside its images, which the tail alone reads.
        kept: outputs that are stored, by name.
    """
    graph = onnx.GraphProto(
        name=program.graph.name, doc_string=program.graph.doc_string, metadata_props=_notes(program.graph)
    )
    left = {id(node) for node in behind.nodes}
    graph.value_info.extend(program.graph.input)
    for node in program.graph.node:
        said = onnx.ValueInfoProto(name=node.output[0], doc_string=node.doc_string, metadata_props=_notes(node))
        if id(node) not in left and (said.doc_string or said.metadata_props):
            graph.value_info.append(said)
    graph.node.extend(behind.nodes)
    graph.input.extend(
        helper.make_tensor_value_info(name, TENSOR_KINDS.get(like.dtype, TensorProto.FLOAT), None)
        for name, like in ends
    )
    graph.input.extend(settings)
    graph.output.extend(program.graph.output)
    used = {name for node in behind.nodes for name in reads(node)}
    known = {n: a for n, a in behind.known.items() if n in used and n not in kept} | dict(kept)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in known.items())
    if behind.nodes:
        widen(graph, kinds=NOT_FLOAT32)  # as the body computes: what it gives the tail is float32
    found = onnx.ModelProto(
        ir_version=program.ir_version, producer_name=program.producer_name, producer_version=program.producer_version,
        domain=program.domain, model_version=program.model_version, doc_string=program.doc_string, graph=graph,
    )  # fmt: skip
    found.opset_import.extend(program.opset_import)
    found.metadata_props.extend(program.metadata_props)
    return bytes(found.SerializeToString())


def kept_outputs(graph: Any, values: Mapping[str, Value]) -> dict[str, Array]:
    """Outputs of a graph that are stored numbers, in the types that it says they have."""
    found = {}
    for said in graph.output:
        value, kind = values.get(said.name), said.type.tensor_type.elem_type
        if isinstance(value, Known) and value.fixed:
            as_said = kind and value.small.dtype.kind == "f"
            found[said.name] = value.small.astype(helper.tensor_dtype_to_np_dtype(kind)) if as_said else value.small
    return found


def _notes(part: Any) -> list[Any]:
    """The properties of a graph or node, without an exporter's own, which trace every node through its source code."""
    return [p for p in part.metadata_props if p.key != "namespace" and not p.key.startswith("pkg.")]


class Tail:
    """What follows the body, in ONNX Runtime: from what the body gives to the outputs of the file.

    Attributes:
        batch: images that the file takes at once; None for any number.
        beside: what the file takes beside images, as it says of it.
        images: shapes [N, ...] of its images, 0 where they are free.
        shapes: of one image, by input, where nothing but its shape is read behind the body.
    """

    def __init__(self, content: bytes, *, batch: int | None) -> None:
        """Opens it.

        Args:
            content: of :func:`frame`.
            batch: images that the file takes at once; None for any number.
        """
        import onnxruntime

        options = patient_options()
        options.log_severity_level = 4
        program = onnx.ModelProto.FromString(content)
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in program.graph.value_info}
        self.images = [shape for shape in shapes.values() if len(shape) == 4]
        del program.graph.value_info[:]
        whole = program.SerializeToString()
        self._session = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
        inputs = [i.name for i in self._session.get_inputs()]
        self.batch = batch
        self.beside = {v.name: v for v in program.graph.input if v.name in shapes and 0 < len(shapes[v.name]) <= 2}
        self.inputs = tuple(name for name in inputs if name not in self.beside)
        for_values = {name for node in program.graph.node if node.op_type not in ONLY_SHAPES for name in reads(node)}
        self.shapes = {n: s[1:] for n, s in shapes.items() if n in self.inputs and n not in for_values and all(s[1:])}
        self.names = tuple(o.name for o in self._session.get_outputs())

    def __call__(self, outputs: Sequence[Tensor], beside: Mapping[str, Array] | None = None) -> list[dict[str, Array]]:
        """Outputs of the file by name: one dict for each call of it, of ``batch`` images or of all.

        Args:
            outputs: of the body, each [B, ...], in their order.
            beside: what the file takes beside images, for one call.
        """
        size = self.batch or len(outputs[0])
        found = []
        for parts in zip(*(torch.split(o, size) for o in outputs), strict=True):
            feed = {name: part.numpy() for name, part in zip(self.inputs, parts, strict=True)}
            found.append(dict(zip(self.names, self._session.run(None, {**feed, **(beside or {})}), strict=True)))
        return found


class BoxesBehind:
    """Boxes that the file makes behind the body, which ONNX Runtime runs for as many images at once as the file takes.

    Args:
        content: of :func:`frame`.
        batch: images that the file takes at once; None for any number, of which one is taken.
    """

    def __init__(self, content: bytes, *, batch: int | None) -> None:
        self.content, self.batch = content, batch or 1

    @cached_property
    def _tail(self) -> Tail:
        try:
            return Tail(self.content, batch=self.batch)
        except Exception as error:
            raise DataError(f"Expected operators behind the network that ONNX Runtime runs, it cannot "
                            f"({short(error)}). {REMEDY}") from error  # fmt: skip

    def __call__(self, outputs: Any) -> list[Any]:
        """Boxes of each image, as ``decode=`` returns them.

        Args:
            outputs: of the body: a tensor [N, ...], or several by name.

        Raises:
            DataError: the file gives no boxes.
        """
        given = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
        count = len(given[0])
        for name in self._tail.inputs[len(given) :]:
            if name not in self._tail.shapes:
                raise self._read_more(name)
            given.append(torch.zeros(count, *self._tail.shapes[name]))
        missing = -count % self.batch
        padded = [torch.cat([o, o[:1].expand(missing, *o.shape[1:])]) if missing else o for o in given]
        found: list[Any] = []
        for answer in self._answers(padded):
            boxes = named_boxes(answer, self.batch, alone=True)
            if boxes is None:
                said = ", ".join(f"{name} {tuple(value.shape)}" for name, value in answer.items())
                raise DataError(f"Expected boxes from the operators behind the network, found {said}. {REMEDY}")
            found += boxes
        return found[:count]

    @cached_property
    def _sizes(self) -> dict[str, Array]:
        """What the file takes beside images, where that can be the sizes [N, 2] that boxes are scaled to.

        Raises:
            DataError: it is something else.
        """
        sides = {side for shape in self._tail.images for side in (shape[2], max(shape[1], shape[3]))}
        found = {}
        for name, said in self._tail.beside.items():
            kind = said.type.tensor_type
            value = setting(name, [d.dim_value for d in kind.shape.dim], sides)
            if value is None:
                raise self._read_more(name, STORE)
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            found[name] = np.full([d.dim_value or self.batch for d in kind.shape.dim], value, dtype)
        return found

    def _read_more(self, name: str, remedy: str = REMEDY) -> DataError:
        return DataError(
            f"Expected boxes that depend on the network's outputs alone, the operators behind it read {name} too. "
            f"{remedy}"
        )

    def _answers(self, outputs: Sequence[Tensor]) -> list[dict[str, Array]]:
        try:
            return self._tail(outputs, self._sizes)
        except (DataError, Warning):
            raise
        except Exception as error:
            raise DataError(f"Expected the operators behind the network to run on its outputs, they do not "
                            f"({short(error)}). {REMEDY}") from error  # fmt: skip


def setting(name: str, shape: Sequence[int], sides: Collection[int]) -> int | None:
    """What a file takes beside images so that its boxes lie in the images that it sees; None where nobody knows.

    A scale is 1. Two numbers are a size, that of images with equal sides. For others, nothing says which of the two is
    the height: of a size of 1 by 1, boxes are shares.

    Args:
        name: of the input.
        shape: of it; 0 for any number of images.
        sides: of the images; 0 for one that is free.
    """
    if "scale" in name.lower():
        value, what = 1, "the scale of boxes: 1"
    elif shape[-1:] == [2] and len(sides) == 1 and 0 not in sides:
        (value,) = sides
        what = f"the size that boxes are scaled to: {value} by {value}"
    elif shape[-1:] == [2]:
        value, what = 1, "the size that boxes are scaled to: 1 by 1, so that they are shares of the images"
    else:
        return None
    warnings.warn(f"{name} is taken for {what}.", stacklevel=2)
    return value


def boxes_behind(content: bytes, batch: int | None) -> BoxesBehind | None:
    """What makes boxes of the outputs of a network from an ONNX file; None where nothing follows it there.

    Args:
        content: of :func:`frame`.
        batch: images that the file takes at once; None for any number.
    """
    return BoxesBehind(content, batch=batch) if onnx.ModelProto.FromString(content).graph.node else None
