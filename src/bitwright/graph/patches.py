"""What the rows of a linear operator's weight are multiplied by, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite
from bitwright.transfer import sent

GATHERED = 1 << 21
"""Elements of patches that are multiplied together: those of many groups do not fit a cache."""


@dataclass(frozen=True)
class Drawn:
    """Output positions of images, drawn at random, the same ones whatever images pass together.

    All positions of an image in a random order are dealt out: each image takes the next ones behind those of the image
    before, and begins again where there are no more. So every position is taken as often as any other.

    Example:
        >>> Drawn(most=2, seed=0).of(3, 4).flatten()[:4].sort().values.tolist()
        [0, 1, 2, 3]
        >>> Drawn(most=9, seed=0).of(3, 4).tolist()
        [[0, 1, 2, 3]]
    """

    most: int
    """Positions of an image."""
    seed: int
    first: int = 0
    """How many images there were before these."""

    def of(self, images: int, count: int) -> Tensor:
        """Places among ``count``: [images, most], or [1, count] for images of which each gives all, in their order."""
        if count <= self.most:
            return torch.arange(count).unsqueeze(0)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        turns = torch.arange(self.first, self.first + images) * self.most
        return order[(turns.unsqueeze(1) + torch.arange(self.most)) % count]


def layer_inputs(node: fx.Node, value: Tensor, weight: Tensor, drawn: Drawn) -> Tensor:
    """Inputs that meet the weight at some output positions, [groups, samples, inputs of a group]."""
    if ops.base_name(node) == "linear":
        return _rows(value, drawn).unsqueeze(0)
    return _patches(node, value, weight, drawn)


def layer_outputs(node: fx.Node, value: Tensor, groups: int, drawn: Drawn) -> Tensor:
    """Outputs where :func:`layer_inputs` takes inputs, [groups, samples, outputs of a group]."""
    if ops.base_name(node) == "linear":
        return _rows(value, drawn).unsqueeze(0)
    taken = _at(value.flatten(2).transpose(1, 2), drawn)
    return taken.reshape(taken.shape[0] * taken.shape[1], groups, -1).transpose(0, 1).float()


def _rows(value: Tensor, drawn: Drawn) -> Tensor:
    """Of a linear layer's input or output, [samples, channels]."""
    if value.dim() > 2 and value.numel() and value[0, ..., 0].numel() > drawn.most:
        value = _at(value.flatten(1, -2), drawn)
    return value.reshape(-1, value.shape[-1]).float()


def _at(value: Tensor, drawn: Drawn) -> Tensor:
    """[B, P, C] of [B, positions, C]."""
    count = value.shape[1]
    places = drawn.of(len(value), count)
    if len(places) == 1:
        return value.index_select(1, sent(places[0], value.device))
    rows = (torch.arange(len(value)) * count).unsqueeze(1) + places
    return _rows_at(value.flatten(0, 1), rows)


def _rows_at(values: Tensor, places: Tensor) -> Tensor:
    """[..., C] of [rows, C], where ``places`` [...] says."""
    return values.index_select(0, sent(places.flatten(), values.device)).reshape(*places.shape, -1)


def _patches(node: fx.Node, value: Tensor, weight: Tensor, drawn: Drawn) -> Tensor:
    pixels, places, inside = _places(node, value, weight, drawn)
    taken = _rows_at(pixels, places)  # [kh kw, B, P, C]
    if not bool(inside.all()):
        taken = taken * sent(inside, value.device).to(taken).unsqueeze(-1)
    taken = taken.permute(1, 2, 3, 0).reshape(places[0].numel(), rewrite.groups(node), -1)
    return taken.transpose(0, 1).float()


def group_grams(node: fx.Node, value: Tensor, weight: Tensor, drawn: Drawn) -> Tensor:
    """``X^T X`` of :func:`layer_inputs` for a convolution of many groups, [groups, inputs, inputs] of a group.

    The patches of some groups at a time lie in the order in which they are multiplied, and stay in the cache.
    """
    rows, places, inside = _places(node, value, weight, drawn)
    used, where = _used(places, len(rows))
    pixels = rows.index_select(0, sent(used, value.device)).float().T.contiguous()  # [C, pixels]
    if not bool(inside.all()):
        where.masked_fill_(~inside, pixels.shape[1])
        pixels = torch.nn.functional.pad(pixels, (0, 1))  # places outside read a zero behind the last pixel
    channels = len(pixels) // rewrite.groups(node)
    some = max(1, GATHERED // (channels * where.numel()))
    where = sent(where, value.device)
    parts = torch.split(pixels, some * channels)
    return torch.cat([_grams_of(part, where, channels) for part in parts])


def _used(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` rows there are among places, and where each place is among these, as int32."""
    marks = torch.zeros(count, dtype=torch.bool)
    marks[places.flatten()] = True
    return marks.nonzero().flatten(), (marks.cumsum(0, dtype=torch.int32) - 1)[places]


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


def _places(node: fx.Node, value: Tensor, weight: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels that each element of a kernel meets at some output positions, and which lie inside the image.

    Returns:
        All pixels of all images, [B pixels, C]; rows of it, [kh kw, B, P], and whether each is inside the image,
        [kh kw, B or 1, P], both on the CPU. A place outside is that of the nearest pixel inside.
    """
    kernel = weight.shape[2:]
    stride, dilation = (_each(node, i, len(kernel)) for i in (3, 5))
    pads = _padding(node, kernel, dilation)
    sizes = [
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, (before, after), k, s, d in zip(value.shape[2:], pads, kernel, stride, dilation, strict=True)
    ]
    chosen = drawn.of(len(value), math.prod(sizes))
    starts: list[Tensor] = []
    for size, (before, _), s in reversed(list(zip(sizes, pads, stride, strict=True))):
        starts.insert(0, chosen % size * s - before)
        chosen = chosen // size
    offsets = torch.cartesian_prod(*(torch.arange(0, k * d, d) for k, d in zip(kernel, dilation, strict=True)))
    places, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
    for size, start, offset in zip(value.shape[2:], starts, offsets.reshape(-1, len(kernel)).T, strict=True):
        at = offset[:, None, None] + start
        inside = inside & (at >= 0) & (at < size)
        places = places * size + at.clamp(0, size - 1)
    images = torch.arange(len(value)).unsqueeze(1) * math.prod(value.shape[2:])
    return value.movedim(1, -1).flatten(0, -2), images + places, inside


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
