"""Types of numbers other than float32: which of few digits a file computes in, and what computes in float32 instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from bitwright.onnx_in.stored import KEPT_APART, blank
from bitwright.runtimes.session import Array

SHORT = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
"""Numbers of few digits by their names."""
NOT_FLOAT32 = frozenset({*SHORT, TensorProto.DOUBLE})
"""Numbers that are float32 in the network that is read."""
KINDS = frozenset({"to", "dtype", "output_dtype", "stash_type"})
"""Attributes that name a type of numbers."""


def short_kinds(program: Any) -> tuple[str, ...]:
    """The types of few digits in which a program computes, on the way at least."""
    graph = program.graph
    kinds = {t.data_type for t in graph.initializer} | {v.type.tensor_type.elem_type for v in graph.input}
    for attribute in _attributes(graph):
        kinds |= {attribute.i} if attribute.name in KINDS else set()
        kinds |= {attribute.t.data_type} if attribute.HasField("t") else set()
    return tuple(name for kind, name in SHORT.items() if kind in kinds)


def _attributes(graph: Any) -> Iterator[Any]:
    """Of all nodes, those of graphs inside others too."""
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute
            for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _attributes(inside)


def widen(graph: Any, stored: dict[str, Array] | None = None, *, kinds: Collection[int]) -> None:
    """Writes numbers of some types as float32, which holds those of few digits exactly.

    Args:
        graph: changed, with graphs inside it.
        stored: its large tensors by name; changed. None for a graph that holds all of its own.
        kinds: the types, as ONNX numbers them.
    """
    for tensor in graph.initializer:
        if tensor.data_type in kinds:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.data_type = TensorProto.FLOAT
            if stored is None or array.nbytes < KEPT_APART:
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            else:
                stored[tensor.name] = array
                tensor.CopyFrom(blank(tensor))
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type in kinds:
            kind.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in KINDS and attribute.i in kinds:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in kinds:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
            for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                widen(inside, kinds=kinds)
