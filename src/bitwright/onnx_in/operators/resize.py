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
from bitwright.onnx_in.operators.moves import row_by_row
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
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("it keeps the aspect ratio")
    chosen = [axes[k] for k in resized]
    if mode == "nearest":
        return _nearest(node, x, resized, chosen, placed, "floor" if old else node.text("nearest_mode", ""))
    if placed == "tf_crop_and_resize":
        raise Unsupported("it crops while it resizes")
    resized = _with_others(resized, x)
    smooth = Smooth(mode, placed, _last(resized, len(x.shape)), tuple(axes[k] for k in resized))
    return _as_pillow(x, smooth) if _is_as_pillow(node, smooth) else _smooth(x, smooth)


def _with_others(resized: list[int], x: Traced) -> list[int]:
    """The resized axes and, where PyTorch takes more of them at once, others that keep their length."""
    others = [k for k in range(len(x.shape)) if k not in resized and k != x.batch_axis]
    missing = len(x.shape) - 2 - len(resized)
    return sorted([*resized, *others[len(others) - missing :]]) if 0 < missing <= len(others) else resized


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
    x: Tensor,
    *,
    order: tuple[int, ...],
    size: tuple[int, ...],
    mode: str,
    corners: bool | None,
    antialias: bool = False,
) -> Tensor:
    found = F.interpolate(_turned(x, order), size, mode=mode, align_corners=corners, antialias=antialias)
    return _turned(found, order, back=True)


class Smooth(NamedTuple):
    """A linear or cubic resizing: how it weighs and places pixels, the resized axes put last, and these."""

    mode: str
    placed: str
    order: tuple[int, ...]
    axes: tuple[Resized, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The new lengths."""
        return tuple(a.after for a in self.axes)

    @property
    def centred(self) -> bool:
        """Whether it places pixels as PyTorch does without aligned corners."""
        exact = all(math.isclose(a.factor, a.after / a.before, rel_tol=1e-7) for a in self.axes)  # float32's last bit
        half = self.placed in {"half_pixel", "half_pixel_symmetric"}
        return exact and (half or (self.placed == "pytorch_half_pixel" and min(self.size) > 1))


def _is_as_pillow(node: Node, smooth: Smooth) -> bool:
    """Whether it weighs pixels as Pillow does, and PyTorch with ``antialias``: those within the image, smoothed.

    Raises:
        Unsupported: it weighs them in a way that PyTorch has not.
    """
    smoothed, inside = bool(node.whole("antialias", 0)), bool(node.whole("exclude_outside", 0))
    steep = node.number("cubic_coeff_a", -0.75) == -0.5
    grows = all(a.after >= a.before for a in smooth.axes)
    as_pillow = smooth.centred and len(smooth.axes) == 2 and (smoothed or grows)
    if smooth.mode == "linear" and smoothed and not grows:
        if as_pillow and inside:
            return True
        raise Unsupported("it smooths before it resizes and counts pixels outside of the image, or places them "
                          "otherwise than PyTorch; exclude_outside=1 and half_pixel are read")  # fmt: skip
    if smooth.mode == "cubic" and (smoothed or inside or node.number("cubic_coeff_a", -0.75) != -0.75):
        if as_pillow and inside and steep:
            return True
        raise Unsupported("its cubic weights are others than PyTorch's, which are those of cubic_coeff_a=-0.75, or of "
                          "-0.5 with exclude_outside=1 and half_pixel")  # fmt: skip
    return False


def _as_pillow(x: Traced, smooth: Smooth) -> NodeCall:
    mode = {"linear": "bilinear", "cubic": "bicubic"}[smooth.mode]
    return call(_interpolate, x, order=smooth.order, size=smooth.size, mode=mode, corners=False, antialias=True)


def _smooth(x: Traced, smooth: Smooth) -> NodeCall:
    """Linear or cubic: as PyTorch does where that is the same, else by samples at the places themselves."""
    names = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}
    mode, placed, order, axes = smooth
    if mode not in names:
        raise Unsupported(f"its mode is '{mode}'")
    name = names[mode].get(len(axes))
    if len(x.shape) != len(axes) + 2:
        raise Unsupported(f"it resizes {len(axes)} axes of {len(x.shape)}")
    if name is not None and (placed == "align_corners" or smooth.centred):
        return call(_interpolate, x, order=order, size=smooth.size, mode=name, corners=placed == "align_corners")
    if len(axes) != 2:
        raise Unsupported(f"it resizes {len(axes)} axes with coordinates '{placed}'")
    rows, columns = (Known.of(_between_corners(places(a, placed), a)) for a in axes)
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
        *row_by_row(node.input(0), node.input(1)),
        mode=mode,
        padding=node.text("padding_mode", "zeros"),
        corners=bool(node.whole("align_corners", 0)),
    )


def _grid_sample(x: Tensor, grid: Tensor, *, mode: str, padding: str, corners: bool) -> Tensor:
    return F.grid_sample(x, grid, mode, padding, corners)
