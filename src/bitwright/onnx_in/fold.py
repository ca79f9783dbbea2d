"""Nodes that no image reaches, computed once while the file is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from bitwright.onnx_in.values import Known, Unsupported
from bitwright.runtimes.session import Array

RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def computed(node: Any, inputs: Sequence[Known | None], opset: int) -> list[Known]:
    """What the node gives for known arrays, for both sizes of the batch, by ONNX's own reference.

    Raises:
        Unsupported: it cannot be computed, or is random.
    """
    if node.op_type in RANDOM:
        raise Unsupported("its values are random")
    if _grows(node.op_type, inputs) > MOST:
        raise Unsupported("it makes an array of more than 400 MB of a few numbers")
    if node.op_type == "Constant":
        return [Known.of(constant(node))]
    small = _evaluate(node, [None if v is None else v.small for v in inputs], opset)
    if all(v is None or v.fixed for v in inputs):
        return [Known.of(v) for v in small]
    large = _evaluate(node, _for_more_images(node.op_type, inputs), opset)
    return [Known(a, b) for a, b in zip(small, large, strict=True)]


def _for_more_images(kind: str, inputs: Sequence[Known | None]) -> list[Array | None]:
    """The operands for twice as many images.

    Where an array of a fixed batch is expanded, such as the zeros that a recurrent network begins with, rows that are
    all the same become one, which can be repeated as often as it takes.
    """
    array, sizes = (*inputs, None, None)[:2]
    if kind != "Expand" or array is None or sizes is None or not array.fixed or array.small.ndim != len(sizes.large):
        return [None if v is None else v.large for v in inputs]
    kept = array.small
    for axis, (before, after) in enumerate(zip(sizes.small, sizes.large, strict=True)):
        first = kept[(slice(None),) * axis + (slice(0, 1),)]
        if 1 < before == kept.shape[axis] < after and np.array_equal(np.broadcast_to(first, kept.shape), kept):
            kept = first
    return [kept, sizes.large]


MOST = 100_000_000
"""Elements of an array that a file may have made of its shape."""


def _grows(kind: str, inputs: Sequence[Known | None]) -> float:
    """How many elements the arrays have that some operators make of a shape."""
    given = [v.large.astype(np.float64) for v in inputs if v is not None and v.large.dtype.kind in "iuf"]
    if kind in {"ConstantOfShape", "Expand"} and given:
        return float(np.prod(np.maximum(given[-1], 1)))
    if kind == "Tile" and len(given) == 2:
        return float(np.prod(np.maximum(given[1], 1))) * given[0].size
    if kind == "Range" and len(given) == 3 and given[2].all():
        return float(abs(given[1] - given[0]).max() / abs(given[2]).min())
    return 0.0


def constant(node: Any) -> Array:
    """The value of a ``Constant`` node, which is one of several attributes."""
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return array_of(value)
    if attribute.name in {"value_float", "value_floats"}:
        return np.asarray(value, np.float32)
    if attribute.name in {"value_int", "value_ints"}:
        return np.asarray(value, np.int64)
    raise Unsupported(f"its constant is a {attribute.name}")


def array_of(tensor: Any) -> Array:
    """A stored tensor; floats of any width as float32."""
    return widened(onnx.numpy_helper.to_array(tensor))


def widened(array: Array) -> Array:
    """Floats of any width as float32; others, and float32 itself, as they are."""
    return array.astype(np.float32) if array.dtype.name in FLOATS else array


FLOATS = frozenset({"float16", "bfloat16", "float64"})


def _evaluate(node: Any, arrays: Sequence[Array | None], opset: int) -> list[Array]:
    feed = {name: a for name, a in zip(node.input, arrays, strict=True) if name and a is not None}
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n] for names in (feed, node.output)
    ]
    graph = helper.make_graph([node], "one", *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        found = ReferenceEvaluator(model).run(None, feed)
    except Exception as error:
        raise Unsupported(f"it cannot be computed beforehand ({type(error).__name__})") from error
    return [np.asarray(v, np.float32) if np.asarray(v).dtype.kind == "f" else np.asarray(v) for v in found]
