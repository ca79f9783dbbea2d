"""What the rows of a linear operator's weight are multiplied by, position by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite


def layer_inputs(node: fx.Node, value: Tensor, weight: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Inputs that meet the weight at some output positions, [groups, samples, inputs of a group]."""
    if ops.base_name(node) == "linear":
        return _rows(value, positions, draw).unsqueeze(0)
    return _patches(node, value, weight, positions, draw)


def layer_outputs(node: fx.Node, value: Tensor, groups: int, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Outputs where :func:`layer_inputs` takes inputs, if both draw alike, [groups, samples, outputs of a group]."""
    if ops.base_name(node) == "linear":
        return _rows(value, positions, draw).unsqueeze(0)
    flat = value.flatten(2)
    taken = flat[:, :, draw(flat.shape[2])[:positions].to(flat.device)].transpose(1, 2)
    return taken.reshape(taken.shape[0] * taken.shape[1], groups, -1).transpose(0, 1).float()


def _rows(value: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Of a linear layer's input or output, [samples, channels]."""
    rows = value.reshape(-1, value.shape[-1])
    per_image = max(1, rows.shape[0] // max(1, value.shape[0]))
    keep = min(rows.shape[0], positions * max(1, value.shape[0]))
    if per_image > positions:
        rows = rows[draw(rows.shape[0])[:keep].to(rows.device)]
    return rows.float()


def _patches(node: fx.Node, value: Tensor, weight: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    kernel = weight.shape[2:]
    stride, dilation = (_each(node, i, len(kernel)) for i in (3, 5))
    pads = _padding(node, kernel, dilation)
    sizes = [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, (before, after), k, s, d in zip(value.shape[2:], pads, kernel, stride, dilation, strict=True)
    ]
    count = min(positions, math.prod(sizes))
    chosen = draw(math.prod(sizes))[:count]
    starts: list[Tensor] = []
    for size, (before, _), s in reversed(list(zip(sizes, pads, stride, strict=True))):
        starts.insert(0, chosen % size * s - before)
        chosen = chosen // size
    offsets = itertools.product(*(range(0, k * d, d) for k, d in zip(kernel, dilation, strict=True)))
    parts = [_pixels(value, [s + o for s, o in zip(starts, offset, strict=True)]) for offset in offsets]
    taken = torch.stack(parts, dim=3)  # [B, P, C, kh kw]
    groups = rewrite.groups(node)
    taken = taken.reshape(taken.shape[0] * count, groups, -1)
    return taken.transpose(0, 1).float()


def _pixels(value: Tensor, at: list[Tensor]) -> Tensor:
    """The channels of pixels, [B, P, C]; zeros outside the image, so that it need not be copied to be padded.

    Args:
        value: [B, C, ...].
        at: for each axis from the third on, the pixels' places, [P].
    """
    inside, places = torch.ones(len(at[0]), dtype=torch.bool), torch.zeros(len(at[0]), dtype=torch.int64)
    for size, each in zip(value.shape[2:], at, strict=True):
        inside &= (each >= 0) & (each < size)
        places = places * size + each.clamp(0, size - 1)
    taken = value.movedim(1, -1).flatten(1, -2).index_select(1, places.to(value.device))
    return taken if bool(inside.all()) else taken * inside.to(value).unsqueeze(1)


def _each(node: fx.Node, index: int, axes: int, default: int = 1) -> list[int]:
    """An argument of a convolution for each of its axes."""
    value: Any = node.args[index] if len(node.args) > index else default
    each: list[int] = list(value) if isinstance(value, list | tuple) else [value]
    return each * axes if len(each) == 1 else each


def _padding(node: fx.Node, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and behind each axis."""
    padding = node.args[4] if len(node.args) > 4 else 0
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(each, each) for each in _each(node, 4, len(kernel), 0)]
