"""What the rows of a linear operator's weight are multiplied by, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.transfer import sent

GATHERED = 1 << 21
"""Elements of patches that are multiplied together: those of many groups do not fit a cache."""


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
    taken = flat[:, :, sent(draw(flat.shape[2])[:positions], flat.device)].transpose(1, 2)
    return taken.reshape(taken.shape[0] * taken.shape[1], groups, -1).transpose(0, 1).float()


def _rows(value: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Of a linear layer's input or output, [samples, channels]."""
    rows = value.reshape(-1, value.shape[-1])
    per_image = max(1, rows.shape[0] // max(1, value.shape[0]))
    keep = min(rows.shape[0], positions * max(1, value.shape[0]))
    if per_image > positions:
        rows = rows[sent(draw(rows.shape[0])[:keep], rows.device)]
    return rows.float()


def _patches(node: fx.Node, value: Tensor, weight: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    places, inside = _places(node, value, weight, positions, draw)
    taken = value.movedim(1, -1).flatten(1, -2).index_select(1, sent(places.reshape(-1), value.device))
    taken = taken.reshape(len(value), *places.shape, -1)  # [B, kh kw, P, C]
    if not bool(inside.all()):
        taken = taken * sent(inside, value.device).to(taken).unsqueeze(-1)
    taken = taken.permute(0, 2, 3, 1).reshape(len(value) * places.shape[1], rewrite.groups(node), -1)
    return taken.transpose(0, 1).float()


def group_grams(node: fx.Node, value: Tensor, weight: Tensor, positions: int, draw: Callable[[int], Tensor]) -> Tensor:
    """``X^T X`` of :func:`layer_inputs` for a convolution of many groups, [groups, inputs, inputs] of a group.

    The patches of some groups at a time lie in the order in which they are multiplied, and stay in the cache.
    """
    places, inside = _places(node, value, weight, positions, draw)
    used, where = torch.unique(places, return_inverse=True)
    pixels = value.movedim(1, -1).flatten(1, -2).index_select(1, sent(used, value.device)).float()
    pixels = pixels.movedim(-1, 0).flatten(1)  # [C, B pixels]
    images = torch.arange(len(value)) * len(used)
    where = (where.unsqueeze(1) + images.unsqueeze(1)).int()  # [kh kw, B, P]
    if not bool(inside.all()):
        where.masked_fill_(~inside.unsqueeze(1), pixels.shape[1])
        pixels = torch.nn.functional.pad(pixels, (0, 1))  # places outside read a zero behind the last pixel
    channels = len(pixels) // rewrite.groups(node)
    some = max(1, GATHERED // (channels * where.numel()))
    where = sent(where, value.device)
    parts = torch.split(pixels, some * channels)
    return torch.cat([_grams_of(part, where, channels) for part in parts])


def _grams_of(pixels: Tensor, where: Tensor, channels: int) -> Tensor:
    """Of some groups.

    Args:
        pixels: [C, B pixels], of which a group has so many ``channels``.
        where: the patches' pixels, [kh kw, B, P].
        channels: of one group.
    """
    taken = pixels.index_select(1, where.reshape(-1))  # of two axes: of three it takes ten times as long
    rows = taken.reshape(len(pixels) // channels, channels * len(where), -1)
    return rows @ rows.transpose(1, 2)


def _places(
    node: fx.Node, value: Tensor, weight: Tensor, positions: int, draw: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """The pixels that each element of a kernel meets at some output positions, and which lie inside the image.

    Returns:
        Both [kh kw, P], on the CPU; a place outside is that of the nearest pixel inside.
    """
    kernel = weight.shape[2:]
    stride, dilation = (_each(node, i, len(kernel)) for i in (3, 5))
    pads = _padding(node, kernel, dilation)
    sizes = [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, (before, after), k, s, d in zip(value.shape[2:], pads, kernel, stride, dilation, strict=True)
    ]
    chosen = draw(math.prod(sizes))[: min(positions, math.prod(sizes))]
    starts: list[Tensor] = []
    for size, (before, _), s in reversed(list(zip(sizes, pads, stride, strict=True))):
        starts.insert(0, chosen % size * s - before)
        chosen = chosen // size
    offsets = torch.cartesian_prod(*(torch.arange(0, k * d, d) for k, d in zip(kernel, dilation, strict=True)))
    places, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
    for size, start, offset in zip(value.shape[2:], starts, offsets.reshape(-1, len(kernel)).T, strict=True):
        at = offset.unsqueeze(1) + start
        inside = inside & (at >= 0) & (at < size)
        places = places * size + at.clamp(0, size - 1)
    return places, inside


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
