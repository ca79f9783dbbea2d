"""Sizes of tensors, which are known while the file is read."""

from __future__ import annotations

import numpy as np

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.values import Known, Node


@operator("Shape")
def lengths_of(node: Node) -> Known:
    """The lengths of the axes from ``start`` to ``end``."""
    part = slice(node.whole("start", 0), node.settings.get("end"))
    x = node.input(0)
    return Known(*(np.asarray(tuple(v.shape)[part], np.int64) for v in (x.small, x.large)))


@operator("Size")
def count_of_elements(node: Node) -> Known:
    """The number of elements."""
    x = node.input(0)
    return Known(*(np.asarray(np.prod(tuple(v.shape)), np.int64) for v in (x.small, x.large)))
