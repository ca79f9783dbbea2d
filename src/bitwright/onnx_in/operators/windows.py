"""Padding of sliding windows, as convolutions and pools share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.values import Node, Unsupported, shape_of


class Window(NamedTuple):
    """A sliding window: its extents, and how many elements are added before and after each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether as much is added before as after every axis."""
        return self.before == self.after

    @property
    def pads(self) -> list[int]:
        """As ``torch.nn.functional.pad`` takes them: from the last axis on."""
        return [p for pair in zip(reversed(self.before), reversed(self.after), strict=True) for p in pair]


def window_of(node: Node, kernel: Sequence[int]) -> Window:
    """The window of a node, with ``auto_pad`` worked out for the size of its input."""
    rank = len(kernel)
    stride = node.ints("strides") or (1,) * rank
    dilation = node.ints("dilations") or (1,) * rank
    pads = node.ints("pads") or (0,) * 2 * rank
    before, after = pads[:rank], pads[rank:]
    mode = node.text("auto_pad", "NOTSET")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        sizes = shape_of(node.input(0))[2:]
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        missing = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, stride, reach, strict=True)]
        less, more = tuple(m // 2 for m in missing), tuple(m - m // 2 for m in missing)
        before, after = (less, more) if mode == "SAME_UPPER" else (more, less)
    elif mode == "VALID":
        before = after = (0,) * rank
    elif mode not in {"NOTSET", ""}:
        raise Unsupported(f"its auto_pad is '{mode}'")
    return Window(tuple(kernel), stride, dilation, before, after)


def padded(x: Tensor, window: Window, value: float) -> Tensor:
    """The tensor with what is added around it."""
    return F.pad(x, window.pads, value=value)
