"""Resizing: PyTorch's own where it places the pixels as ONNX does, else exact selections and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.values import BatchSize, Known, Node, NodeCall, Traced, Unsupported, call

Places = npt.NDArray[np.float32]


class Resized(NamedTuple):
    """One resized axis: its lengths before and after, and the factor that the file gives."""

    before: int
    after: int
    factor: float


@operator("Resize", "Upsample")
def resize(node: Node) -> NodeCall:
    """``Resize``, and ``Upsample`` as it was until opset 9."""
    x = node.traced()
    axes = _axes(node, x)
    resized = [k for k, a in enumerate(axes) if (a.before, a.factor) != (a.after, 1.0)]
    if all(a.before == a.after for a in axes):  # whatever the factors: ONNX Runtime copies
        return call(torch.clone, x)
    if x.batch_axis in resized or len(resized) > 3:
        raise Unsupported("it resizes the axis of the images, or more than three axes")
    if all(axes[k].before == 1 for k in resized):
        return call(_spread, x, sizes=tuple(axes[k].after if k in resized else -1 for k in range(len(axes))))
    mode, old = node.text("mode", "nearest"), node.kind == "Upsample" or node.opset < 11
    placed = "asymmetric" if old else node.text("coordinate_transformation_mode", "half_pixel")
    if node.whole("antialias", 0) or node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("it smooths before it resizes, or keeps the aspect ratio")
    chosen = [axes[k] for k in resized]
    if mode == "nearest":
        return _nearest(node, x, resized, chosen, placed, "floor" if old else node.text("nearest_mode", ""))
    order = _last(resized, len(x.shape))
    if mode == "cubic" and (node.whole("exclude_outside", 0) or node.number("cubic_coeff_a", -0.75) != -0.75):
        raise Unsupported("its cubic weights are others than PyTorch's")
    if placed == "tf_crop_and_resize":
        raise Unsupported("it crops while it resizes")
    return _smooth(x, order, chosen, mode, placed)


def _spread(x: Tensor, *, sizes: tuple[int, ...]) -> Tensor:
    """One pixel is all that there is to take."""
    return x.expand(sizes)


def _axes(node: Node, x: Traced) -> list[Resized]:
    """Lengths and factors of all axes; before opset 11 the factors are the second input, or an attribute."""
    rank = len(x.shape)
    place = 2 if node.kind == "Resize" and node.opset >= 11 else 1
    factors = node.given("scales", place) if "scales" in node.settings or node.has(place) else None
    asked = node.settings.get("axes")
    axes = list(range(rank)) if asked is None else [int(a) % rank for a in asked]
    lengths = list(x.shape)
    scales = [1.0] * rank
    if factors is not None and factors.size:
        for axis, factor in zip(axes, factors.reshape(-1).tolist(), strict=True):
            scales[axis] = float(np.float32(factor))
            lengths[axis] = math.floor(np.float32(x.shape[axis]) * np.float32(factor))  # in float32, as runtimes do
    else:
        sizes = node.input(3)
        if not isinstance(sizes, Known):
            raise Unsupported("its size is computed from the images")
        for axis, size in zip(axes, sizes.small.reshape(-1).tolist(), strict=True):
            lengths[axis] = int(size)
            scales[axis] = lengths[axis] / x.shape[axis]
    return [Resized(*each) for each in zip(x.shape, lengths, scales, strict=True)]


def places(axis: Resized, mode: str) -> Places:
    """Where each new pixel lies among the old ones (ONNX, ``coordinate_transformation_mode``), in float32 as runtimes.

    What lies halfway between two pixels in float64 need not do so in float32, and the nearest one is then another.
    """
    k: Places = np.arange(axis.after, dtype=np.float32)
    if mode == "asymmetric":
        return k / axis.factor
    if mode == "align_corners":
        return k * np.float32(axis.before - 1) / np.float32(max(axis.after - 1, 1))
    if mode == "pytorch_half_pixel" and axis.after <= 1:
        return k * 0
    if mode == "half_pixel_symmetric":
        adjusted = axis.after / (axis.factor * axis.before)
        centre = axis.before / 2
        return centre * (1 - adjusted) + (k + 0.5) / axis.factor - 0.5
    if mode in {"half_pixel", "pytorch_half_pixel"}:
        return (k + 0.5) / axis.factor - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (k + 0.5) / axis.factor
    raise Unsupported(f"its coordinates are '{mode}'")


def nearest_places(axis: Resized, mode: str, rounding: str) -> npt.NDArray[np.int64]:
    """The old pixel that each new one takes."""
    found = places(axis, mode)
    rounded: Places = {
        "": np.ceil(found - 0.5),
        "round_prefer_floor": np.ceil(found - 0.5),
        "round_prefer_ceil": np.floor(found + 0.5),
        "floor": np.floor(found),
        "ceil": np.ceil(found),
    }[rounding]
    return np.clip(rounded, 0, axis.before - 1).astype(np.int64)


def _last(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """The order of axes with the resized ones at the end."""
    return (*(k for k in range(rank) if k not in axes), *axes)


def _turned(x: Tensor, order: tuple[int, ...], *, back: bool = False) -> Tensor:
    if order == tuple(range(len(order))):
        return x
    return x.permute([order.index(k) for k in range(len(order))] if back else list(order))


def _nearest(node: Node, x: Traced, axes: list[int], chosen: list[Resized], placed: str, rounding: str) -> NodeCall:
    picked = [nearest_places(a, placed, rounding) for a in chosen]
    theirs = [np.minimum(np.arange(a.after) * a.before // a.after, a.before - 1) for a in chosen]
    order = _last(axes, len(x.shape))
    plain = len(x.shape) == len(axes) + 2 and len(axes) <= 3
    if plain and all(np.array_equal(a, b) for a, b in zip(picked, theirs, strict=True)):
        return call(_interpolate, x, order=order, size=tuple(a.after for a in chosen), mode="nearest", corners=None)
    return call(_picked, x, *map(Known.of, picked), axes=tuple(axes))


def _picked(x: Tensor, *places: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis, where in zip(axes, places, strict=True):
        x = x.index_select(axis, where)
    return x


def _interpolate(
    x: Tensor, *, order: tuple[int, ...], size: tuple[int, ...], mode: str, corners: bool | None
) -> Tensor:
    return _turned(F.interpolate(_turned(x, order), size, mode=mode, align_corners=corners), order, back=True)


def _smooth(x: Traced, order: tuple[int, ...], chosen: list[Resized], mode: str, placed: str) -> NodeCall:
    """Linear or cubic: as PyTorch does where that is the same, else by samples at the places themselves."""
    names = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}
    if mode not in names:
        raise Unsupported(f"its mode is '{mode}'")
    name = names[mode].get(len(chosen))
    if len(x.shape) != len(chosen) + 2:
        raise Unsupported(f"it resizes {len(chosen)} axes of {len(x.shape)}")
    size = tuple(a.after for a in chosen)
    exact = all(math.isclose(a.factor, a.after / a.before, rel_tol=1e-7) for a in chosen)  # to the last bit of float32
    centred = placed == "half_pixel" or (placed == "pytorch_half_pixel" and min(size) > 1)
    centred = centred or (placed == "half_pixel_symmetric" and exact)
    if name is not None and (placed == "align_corners" or (centred and exact)):
        return call(_interpolate, x, order=order, size=size, mode=name, corners=placed == "align_corners")
    if len(chosen) != 2:
        raise Unsupported(f"it resizes {len(chosen)} axes with coordinates '{placed}'")
    rows, columns = (Known.of(_between_corners(places(a, placed), a)) for a in chosen)
    sampling = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return call(_sampled, x, rows, columns, BatchSize(), order=order, mode=sampling)


def _between_corners(where: Places, axis: Resized) -> npt.NDArray[np.float32]:
    """Places as ``grid_sample`` takes them: from -1 to 1 between the corners."""
    found: Places = (2 * where / max(axis.before - 1, 1) - 1).astype(np.float32)
    return found


def _sampled(x: Tensor, rows: Tensor, columns: Tensor, images: int, *, order: tuple[int, ...], mode: str) -> Tensor:
    """Samples at all pairs of places; the table of pairs is not stored, since it is larger than most weights."""
    turned, sizes = _turned(x, order), (images, len(rows), len(columns))
    spread = torch.stack([columns.expand(sizes), rows.unsqueeze(1).expand(sizes)], -1)
    found = F.grid_sample(turned, spread, mode, padding_mode="border", align_corners=True)
    return _turned(found, order, back=True)


@operator("GridSample")
def grid_sample(node: Node) -> NodeCall:
    """Samples at given places."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        node.text("mode", "bilinear"), node.text("mode", "bilinear")
    )  # fmt: skip
    return call(
        _grid_sample,
        node.input(0),
        node.input(1),
        mode=mode,
        padding=node.text("padding_mode", "zeros"),
        corners=bool(node.whole("align_corners", 0)),
    )


def _grid_sample(x: Tensor, grid: Tensor, *, mode: str, padding: str, corners: bool) -> Tensor:
    return F.grid_sample(x, grid, mode, padding, corners)
