"""Operators that put values into other places: shapes, orders, parts, joints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.values import (
    BatchSize,
    Known,
    Node,
    NodeCall,
    Size,
    Traced,
    Unsupported,
    Value,
    call,
    from_front,
    scalar,
    shape_of,
    sizes_of,
    spelled,
)
from bitwright.runtimes.session import Array


def freed(x: Traced, target: Sequence[int]) -> tuple[int, ...]:
    """A shape for one batch of the file, with -1 along the axis that holds the images.

    The images lie behind a certain number of elements; the axis of the new shape in which this place falls takes them.
    Where it falls before the last axis, the axis before that one takes them: the last is that of the channels, whose
    number a product with a stored matrix fixes.
    """
    sizes = [int(t) for t in target]
    axis = x.batch_axis
    if axis is None:
        return tuple(sizes)
    before, left, place = math.prod(x.shape[:axis]) * x.inner, 1, 0
    for place, size in enumerate(sizes):  # noqa: B007 - read behind the loop
        if left == before or left * size > before:
            break
        left *= size
    if left == before and 0 < place == len(sizes) - 1 and sizes[place] > 1:
        place -= 1
    sizes[place] = -1
    return tuple(sizes)


def elements_before(x: Traced, sizes: Sequence[int], target: Sequence[int]) -> int:
    """How many elements lie before the images along the axis that holds them in the new shape."""
    axis = x.batch_axis
    if axis is None or -1 not in sizes:
        return 1
    before = math.prod(x.shape[:axis]) * x.inner
    return max(1, before // max(1, math.prod(target[: list(sizes).index(-1)])))


def target_shape(x: Traced, asked: Sequence[int], *, zeros: bool) -> list[int]:
    """The shape that a reshape asks for, with 0 and -1 worked out for the file's batch."""
    shape = x.shape
    sizes = [shape[k] if s == 0 and not zeros else int(s) for k, s in enumerate(asked)]
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = math.prod(shape) // max(1, rest)
    if math.prod(sizes) != math.prod(shape):
        raise Unsupported(f"it reshapes {list(shape)} to {sizes}")
    return sizes


@operator("Reshape")
def reshape(node: Node) -> NodeCall:
    """Another shape; the axis of the images is free, whatever the file says."""
    x = node.traced()
    asked = node.settings.get("shape")
    if asked is None:
        value = node.input(1)
        if not isinstance(value, Known):
            raise Unsupported("its shape is computed from the images")
        asked = value.small.tolist()
    return _reshape(x, target_shape(x, asked, zeros=bool(node.whole("allowzero", 0))), node.batch)


def _reshape(x: Traced, target: list[int], batch: int) -> NodeCall:
    sizes = freed(x, target)
    if -1 in sizes and target[sizes.index(-1)] % batch:
        raise Unsupported("it joins the images of a batch")
    return replace(call(torch.reshape, x, shape=sizes), inner=elements_before(x, sizes, target))


@operator("Flatten")
def flatten(node: Node) -> NodeCall:
    """Two axes."""
    x = node.traced()
    axis = from_front(node.whole("axis", 1), len(x.shape))
    return _reshape(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])], node.batch)


@operator("Squeeze")
def squeeze(node: Node) -> NodeCall:
    """Without axes of length 1, that of the images excepted."""
    x = node.traced()
    asked = node.ints("axes", 1)
    axes = range(len(x.shape)) if asked is None else [from_front(a, len(x.shape)) for a in asked]
    gone = [a for a in axes if x.shape[a] == 1 and a != x.batch_axis]
    if asked is not None and len(gone) < len(asked):
        raise Unsupported("it drops the axis of the images")
    return call(torch.squeeze, x, dim=tuple(gone))


@operator("Unsqueeze")
def unsqueeze(node: Node) -> NodeCall:
    """More axes of length 1."""
    x = node.traced()
    axes = node.ints("axes", 1) or ()
    rank = len(x.shape) + len(axes)
    return call(_unsqueeze, x, axes=tuple(sorted(from_front(a, rank) for a in axes)))


def _unsqueeze(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(node: Node) -> NodeCall:
    """Axes in another order."""
    rank = len(shape_of(node.input(0)))
    return call(torch.permute, node.input(0), dims=node.ints("perm") or tuple(reversed(range(rank))))


@operator("Concat")
def concat(node: Node) -> NodeCall:
    """Joined along an axis; what is stored for one image is repeated for each."""
    values = [node.input(k) for k in range(len(node.inputs))]
    rank = len(shape_of(values[0]))
    axis = from_front(node.whole("axis", 1), rank)
    first = next(v for v in values if isinstance(v, Traced))
    batch = first.batch_axis
    if batch == axis:
        raise Unsupported("it joins images to one batch")
    parts = [v if batch is None or isinstance(v, Traced) else for_each_image(v, batch, first) for v in values]
    return call(_cat, *[v for v in parts if 0 not in shape_of(v)], axis=axis)


def for_each_image(value: Known, axis: int, like: Traced) -> Known:
    """What is stored for the file's batch, for as many images as there are."""
    if not value.fixed or value.small.shape[axis] != like.small.shape[axis]:
        return value
    return Known(value.small, np.concatenate([value.small, value.small], axis))


def row_by_row(*values: Value) -> tuple[Value, ...]:
    """Operands of which an operator reads an image's own rows: what a fixed batch stores is there for every image."""
    axis = next((a for a in map(images_axis, values) if a is not None), None)
    return values if axis is None else tuple(of_each(value, axis) for value in values)


def images_axis(value: Value) -> int | None:
    """The axis that grows with the number of images."""
    return Traced("", value.small, value.large).batch_axis  # type: ignore[arg-type]  # of arrays as of tensors


def of_each(value: Value, axis: int) -> Value:
    """What a file of a fixed batch stores for its images, for as many as there are."""
    if isinstance(value, Known) and value.fixed:
        return Known(value.small, np.concatenate([value.small, value.small], axis))
    return value


@operator("bitwright.TwoParts")
def two_parts(node: Node) -> NodeCall:
    """Two parts along an axis; a tensor that is rolled, where they are its end and all that is before."""
    x = node.traced()
    axis = from_front(node.whole("axis", 0), len(x.shape))
    length = x.shape[axis]
    if axis == x.batch_axis:
        raise Unsupported("it joins images to one batch")
    places = node.ints("places") or ()
    parts = [range(length)[start:end] for start, end in (places[:2], places[2:])]
    if [*parts[1], *parts[0]] == list(range(length)):
        return call(torch.roll, x, shifts=len(parts[0]), dims=axis)
    return call(_of_parts, x, parts=tuple((p.start, max(p.stop, p.start)) for p in parts), axis=axis)


def _of_parts(x: Tensor, *, parts: tuple[tuple[int, int], ...], axis: int) -> Tensor:
    return torch.cat([_slice(x, parts=((axis, start, end, 1),)) for start, end in parts], axis)


def _cat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


@operator("Slice")
def slice_of(node: Node) -> NodeCall:
    """Parts along axes, which are attributes before opset 10."""
    x = node.traced()
    starts, ends = (_bounds(node, name, k) for name, k in (("starts", 1), ("ends", 2)))
    axes = node.ints("axes", 3) or tuple(range(len(starts)))
    steps = node.ints("steps", 4) or (1,) * len(starts)
    parts: list[tuple[int, int, int, int]] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = from_front(axis, len(x.shape))
        if axis == x.batch_axis:
            if len(range(*slice(start, end, step).indices(x.shape[axis]))) != x.shape[axis]:
                raise Unsupported("it takes some images of a batch")
            continue
        parts.append((axis, *_ends(start, end, step, x.shape[axis])))
    return call(_slice, x, parts=tuple(parts))


def _bounds(node: Node, name: str, position: int) -> list[int]:
    if name in node.settings:
        return list(node.settings[name])
    value = node.input(position)
    if not isinstance(value, Known):
        raise Unsupported(f"its {name} are computed from the images")
    return [int(v) for v in value.small.reshape(-1)]


def _ends(start: int, end: int, step: int, length: int) -> tuple[int, int, int]:
    """Start, end and step from the front; with a negative step those of the part that is then turned round."""
    picked = range(*slice(start, end if end >= -length or step > 0 else None, step).indices(length))
    if step > 0:
        return picked.start, max(picked.stop, picked.start), step
    if not picked:
        return 0, 0, -1
    return picked[-1], picked[0] + 1, step


def _slice(x: Tensor, *, parts: tuple[tuple[int, int, int, int], ...]) -> Tensor:
    for axis, start, end, step in parts:
        x = torch.ops.aten.slice.Tensor(x, axis, start, end, abs(step))
        x = x.flip(axis) if step < 0 else x
    return x.clone() if not parts else x


@operator("Split")
def parts_along(node: Node) -> NodeCall:
    """Parts along an axis: of given lengths, or equal ones."""
    x = node.traced()
    axis = from_front(node.whole("axis", 0), len(x.shape))
    sizes = node.ints("split", 1)
    if axis == x.batch_axis:
        raise Unsupported("it takes the images of a batch apart")
    if sizes is None:
        count = node.whole("num_outputs", node.outputs)
        each = -(-x.shape[axis] // count)
        sizes = tuple(min(each, x.shape[axis] - each * k) for k in range(count))
    return call(_split, x, sizes=list(sizes), axis=axis)


def _split(x: Tensor, *, sizes: list[int], axis: int) -> tuple[Tensor, ...]:
    return torch.split(x, sizes, axis)


@operator("Gather")
def entries(node: Node) -> NodeCall:
    """Entries along an axis."""
    x, picks = node.input(0), node.input(1)
    rank = len(shape_of(x))
    axis = from_front(node.whole("axis", 0), rank)
    if isinstance(x, Traced) and axis == x.batch_axis:
        return _gather_of_each(node, x, picks)
    if not isinstance(picks, Known):
        return call(_pick, x, picks, axis=axis)
    places = picks.small % shape_of(x)[axis]
    if places.ndim == 0:
        return call(_select, x, axis=axis, index=int(places))
    if places.ndim == 1:
        first, step = int(places[0]), int(places[1] - places[0]) if places.size > 1 else 1
        if step > 0 and np.array_equal(places, np.arange(first, first + step * places.size, step)):
            return call(_slice, x, parts=((axis, first, first + step * (places.size - 1) + 1, step),))
        return call(_index_select, x, Known.of(places.astype(np.int64)), axis=axis)
    return call(_pick, x, Known.of(places.astype(np.int64)), axis=axis)


def _gather_of_each(node: Node, x: Traced, picks: Value) -> NodeCall:
    """Entries of a flat tensor at the same places of every image, as PyTorch's exporter writes strided views."""
    width = x.shape[0] // node.batch
    if len(x.shape) > 1 or x.inner > 1 or node.batch > 1 or not isinstance(picks, Known) or not picks.small.ndim:
        raise Unsupported("it takes some images of a batch")
    places, following = picks.small, picks.large[len(picks.small) :]
    if len(places) != 1 or places.shape != following.shape or not np.array_equal(places + width, following):
        raise Unsupported("it takes some images of a batch")
    shape = (-1, *places.shape[1:])
    if np.array_equal(places.reshape(-1), np.arange(width)):
        return call(torch.reshape, x, shape=shape)
    return call(_pick_of_each, x, Known.of(places.reshape(-1).astype(np.int64)), width=width, shape=shape)


def _pick_of_each(x: Tensor, places: Tensor, *, width: int, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(-1, width).index_select(1, places).reshape(shape)


def _select(x: Tensor, *, axis: int, index: int) -> Tensor:
    return x.select(axis, index)


def _index_select(x: Tensor, places: Tensor, *, axis: int) -> Tensor:
    return x.index_select(axis, places)


def _pick(x: Tensor, places: Tensor, *, axis: int) -> Tensor:
    flat = x.index_select(axis, places.long().reshape(-1))
    return flat.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


@operator("GatherND")
def entries_of_several_axes(node: Node) -> NodeCall:
    """Entries at places along the first axes together, as exporters write pooling into a given number of windows."""
    x, picks = node.traced(), node.input(1)
    if node.whole("batch_dims", 0) or not isinstance(picks, Known) or not picks.fixed:
        raise Unsupported("its places depend on the images")
    sizes = x.shape[: picks.small.shape[-1]]
    if x.batch_axis is not None and x.batch_axis < len(sizes):
        raise Unsupported("it takes some images of a batch")
    columns = np.moveaxis(picks.small, -1, 0)
    places = np.ravel_multi_index([c % s for c, s in zip(columns, sizes, strict=True)], sizes)
    return call(_pick_of_first, x, Known.of(np.asarray(places, np.int64)), axes=len(sizes))


def _pick_of_first(x: Tensor, places: Tensor, *, axes: int) -> Tensor:
    return _pick(x.flatten(0, axes - 1), places, axis=0)


@operator("GatherElements")
def gather_elements(node: Node) -> NodeCall:
    """An entry along an axis for each place."""
    x, places = row_by_row(node.input(0), node.input(1))
    return call(_gather, x, _counted_from_front(places, x, axis := node.whole("axis", 0)), axis=axis)


def _counted_from_front(places: Value, x: Value, axis: int) -> Value:
    """Stored places along an axis without negative ones."""
    if isinstance(places, Traced):
        return places
    length = x.small.shape[axis]
    small = np.where(places.small < 0, places.small + length, places.small)
    large = np.where(places.large < 0, places.large + length, places.large)
    return Known(small, small if places.fixed else large)


def _gather(x: Tensor, places: Tensor, *, axis: int) -> Tensor:
    return torch.gather(x, axis, places.long())


@operator("Expand")
def expand(node: Node) -> NodeCall:
    """Axes of length 1 made longer."""
    x, shape = node.input(0), node.input(1)
    if not isinstance(shape, Known):
        raise Unsupported("its shape is computed from the images")
    sizes = _broadcast(x, shape, node.batch)
    return call(_expand, x, BatchSize(), sizes=sizes)


def _broadcast(x: Value, shape: Known, batch: int) -> tuple[Size, ...]:
    """The shape of the result; -1 where the operand has it already."""
    small, large = (
        np.broadcast_shapes(tuple(v.shape), tuple(int(s) for s in asked))
        for v, asked in ((x.small, shape.small), (x.large, _scaled(x, shape)))
    )
    return sizes_of(small, large, batch)


def _scaled(x: Value, shape: Known) -> list[int]:
    """What is asked of twice the batch, where the file asks for its own batch along the axis of the images."""
    asked = [int(s) for s in shape.large]
    axis = x.batch_axis if isinstance(x, Traced) else None
    if axis is not None:
        k = len(asked) - (len(x.small.shape) - axis)
        if k >= 0 and asked[k] == x.small.shape[axis]:
            asked[k] = x.large.shape[axis]
    return asked


def _expand(x: Tensor, images: int, *, sizes: tuple[Size, ...]) -> Tensor:
    return x.expand(spelled(sizes, images))


@operator("Tile")
def tile(node: Node) -> NodeCall:
    """Repeated along axes."""
    repeats = node.input(1)
    if not isinstance(repeats, Known):
        raise Unsupported("how often it repeats is computed from the images")
    counts = sizes_of(repeats.small.tolist(), repeats.large.tolist(), node.batch)
    return call(_tile, node.input(0), BatchSize(), counts=counts)


def _tile(x: Tensor, images: int, *, counts: tuple[Size, ...]) -> Tensor:
    return x.repeat(spelled(counts, images))


@operator("Pad")
def pad(node: Node) -> NodeCall:
    """Values around: zeros, another constant, or those at the edge."""
    x = node.traced()
    rank, given = len(x.shape), node.ints("pads", 1)
    if given is None:
        raise Unsupported("it has no widths")
    axes = node.ints("axes", 3) or tuple(range(rank))
    before, after = [0] * rank, [0] * rank
    for axis, low, high in zip(axes, given[: len(axes)], given[len(axes) :], strict=True):
        before[from_front(axis, rank)], after[from_front(axis, rank)] = low, high
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        node.text("mode", "constant")
    ]
    around = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    while len(around) > 2 and around[-2:] == [0, 0]:
        around = around[:-2]
    if mode != "constant":
        around = around + [0] * (2 * (rank - 2) - len(around))
        return call(F.pad, x, pad=around, mode=mode)
    value = node.settings.get("value", scalar(node.inputs[2]) if node.has(2) else 0.0)
    return call(F.pad, x, pad=around, value=float(value or 0.0))


@operator("Trilu")
def triangle(node: Node) -> NodeCall:
    """Zeros below or above a diagonal of the last two axes."""
    function = torch.triu if node.whole("upper", 1) else torch.tril
    return call(function, node.traced(), diagonal=node.whole("k", 0, 1))


@operator("ScatterND")
def entries_replaced(node: Node) -> NodeCall:
    """Other values at the same places of every image, as exporters write assignments to parts of a tensor."""
    x, places, values = (node.input(k) for k in range(3))
    if node.text("reduction", "none") != "none" or not isinstance(places, Known):
        raise Unsupported("it adds to what is there, or its places depend on the images")
    sizes, indexed, listed = x.small.shape, places.small.shape[-1], places.small.ndim - 1
    axis = images_axis(x)
    if axis is None and isinstance(values, Traced) and values.batch_axis is not None:
        axis = values.batch_axis + indexed - listed if values.batch_axis >= listed else 0
    if axis is not None and axis >= indexed:  # the images lie behind what is replaced
        flat = _distinct([places.small[..., k] for k in range(indexed)], sizes[:indexed])
        at, shape = _turned(values, axis - indexed + listed)
        x, values = of_each(x, axis), of_each(values, at)
        return call(_rows_replaced, x, values, places=flat, axes=indexed, images=at, shape=shape)
    if axis:
        raise Unsupported("it takes some images of a batch")
    _turned(values, 0)
    columns = _of_one_image(places, len(sizes), node.batch)
    flat = _distinct(columns, sizes[1 : len(columns) + 1])
    x, values = of_each(x, 0), of_each(values, 0)
    return call(_replaced, x, Known.of(np.asarray(flat, np.int64)), values, axes=len(columns))


@operator("ScatterElements")
@operator("Scatter")
def elements_replaced(node: Node) -> NodeCall:
    """Other values along one axis, at places that are stored or computed."""
    x, places, values = row_by_row(*(node.input(k) for k in range(3)))
    if node.text("reduction", "none") != "none":
        raise Unsupported("it adds to what is there")
    axis = from_front(node.whole("axis", 0), places.small.ndim)
    images = {images_axis(value) for value in (x, places, values)}
    if len(images) > 1 or axis in images:
        raise Unsupported("it takes some images of a batch, or joins them to what they lie in")
    if isinstance(places, Known):
        line = places.small[tuple(slice(None if k == axis else 1) for k in range(places.small.ndim))]
        whole = all(a == b or k == axis for k, (a, b) in enumerate(zip(places.small.shape, x.small.shape, strict=True)))
        if whole and (places.small == line).all():
            flat = _distinct([line], x.small.shape[axis : axis + 1])
            return call(_parts_replaced, x, values, places=flat, axis=axis)
    return call(_scattered, x, _counted_from_front(places, x, axis), values, axis=axis)


def _scattered(x: Tensor, places: Tensor, values: Tensor, *, axis: int) -> Tensor:
    return torch.scatter(x, axis, places.long(), values)


def _turned(values: Value, axis: int) -> tuple[int, tuple[int, ...]]:
    """The axis at which images must lie, and, if they do not, the shape for each image.

    A file of one image may have taken the axis of images out and put another one in.

    Raises:
        Unsupported: they lie within other axes.
    """
    found = images_axis(values)
    if found is None or found == axis:
        return axis, ()
    if not isinstance(values, Traced) or values.inner * math.prod(values.shape[:found]) > 1:
        raise Unsupported("it joins the images of a batch to what they lie in")
    return axis, tuple(size for k, size in enumerate(values.shape) if k != axis)


def _distinct(columns: Sequence[Array], sizes: Sequence[int]) -> tuple[int, ...]:
    """The places as numbers of flat axes.

    Raises:
        Unsupported: one is named twice.
    """
    flat = np.ravel_multi_index([c % s for c, s in zip(columns, sizes, strict=True)], tuple(sizes)).reshape(-1)
    if len(np.unique(flat)) < flat.size:
        raise Unsupported("it replaces the same entry twice")
    return tuple(map(int, flat))


def _rows_replaced(
    x: Tensor, values: Tensor, *, places: tuple[int, ...], axes: int, images: int, shape: tuple[int, ...]
) -> Tensor:
    if shape:
        values = values.reshape(-1, *shape).movedim(0, images)
    rows = x.flatten(0, axes - 1)
    return _parts_replaced(rows, values.reshape(-1, *rows.shape[1:]), places=places, axis=0).reshape(x.shape)


def _parts_replaced(x: Tensor, values: Tensor, *, places: tuple[int, ...], axis: int) -> Tensor:
    """Parts of both, one behind the other."""
    new = {place: k for k, place in enumerate(places)}
    runs: list[list[int]] = []
    for row in range(x.shape[axis]):
        source, at = int(row in new), new.get(row, row)
        if runs and runs[-1][0] == source and runs[-1][2] == at:
            runs[-1][2] += 1
        else:
            runs.append([source, at, at + 1])
    return torch.cat([(x, values)[source].narrow(axis, a, b - a) for source, a, b in runs], axis)


def _of_one_image(places: Known, rank: int, batch: int) -> list[Array]:
    """The places within an image, one array for each axis behind that of the images.

    Raises:
        Unsupported: they are not the same in every image, or not in every image.
    """
    kept = [(places.small, batch)] if places.fixed else [(places.small, batch), (places.large, 2 * batch)]
    for array, images in kept:
        if array.ndim < 2 or not 1 < array.shape[-1] <= rank or len(array) != images:
            raise Unsupported("it takes some images of a batch")
        if (array[..., 0] != np.arange(images).reshape(-1, *[1] * (array.ndim - 2))).any():
            raise Unsupported("it takes some images of a batch")
        if (array[..., 1:] != places.small[:1, ..., 1:]).any():
            raise Unsupported("its places are not the same in every image")
    return [places.small[0, ..., k] for k in range(1, places.small.shape[-1])]


def _replaced(x: Tensor, places: Tensor, values: Tensor, *, axes: int) -> Tensor:
    flat = x.flatten(1, axes)
    new = values.reshape(-1, len(places), *flat.shape[2:])
    index = places.reshape(-1, *[1] * (flat.dim() - 2)).expand_as(new)
    return flat.scatter(1, index, new).reshape(x.shape)


@operator("bitwright.Part")
def one_of_sequence(node: Node) -> NodeCall:
    """One of the parts along an axis that exporters write as a sequence."""
    x = node.traced()
    axis = from_front(node.whole("axis", 0), len(x.shape))
    if axis == x.batch_axis:
        raise Unsupported("it takes the images of a batch apart")
    length, position = x.shape[axis], node.whole("position", 0)
    given = node.given("split", 1)
    if given is None:
        part = (axis, from_front(position, length), from_front(position, length) + 1, 1)
        return call(_slice_of_one, x, part=part, keep=bool(node.whole("keepdims", 1)))
    each = int(given.reshape(-1)[0])
    sizes = [int(s) for s in given] if given.ndim else [min(each, length - k) for k in range(0, length, each)]
    start = sum(sizes[: from_front(position, len(sizes))])
    return call(_slice, x, parts=((axis, start, start + sizes[position], 1),))


def _slice_of_one(x: Tensor, *, part: tuple[int, int, int, int], keep: bool) -> Tensor:
    found = _slice(x, parts=(part,))
    return found if keep else found.squeeze(part[0])


@operator("DepthToSpace")
def depth_to_space(node: Node) -> NodeCall:
    """Channels into places: ``CRD`` is PyTorch's pixel shuffle, ``DCR`` has the places first among the channels."""
    size = node.whole("blocksize", 1)
    if node.text("mode", "DCR") == "CRD":
        return call(F.pixel_shuffle, node.traced(), upscale_factor=size)
    return call(_depth_to_space, node.traced(), size=size)


def _depth_to_space(x: Tensor, *, size: int) -> Tensor:
    _, channels, height, width = x.shape
    parts = x.reshape(-1, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(-1, channels // size**2, height * size, width * size)


@operator("SpaceToDepth")
def space_to_depth(node: Node) -> NodeCall:
    """Places into channels, the places first."""
    return call(_space_to_depth, node.traced(), size=node.whole("blocksize", 1))


def _space_to_depth(x: Tensor, *, size: int) -> Tensor:
    _, channels, height, width = x.shape
    parts = x.reshape(-1, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(-1, channels * size**2, height // size, width // size)


@operator("Col2Im")
def col2im(node: Node) -> NodeCall:
    """Sums of overlapping windows, as ``torch.nn.functional.fold`` gives them."""
    size, kernel = node.ints("image_shape", 1) or (), node.ints("block_shape", 2) or ()
    if len(size) != 2:
        raise Unsupported(f"its windows have {len(size)} axes")
    pads = node.ints("pads") or (0, 0, 0, 0)
    (top, left), (bottom, right) = pads[:2], pads[2:]
    whole = (size[0] + top + bottom, size[1] + left + right)
    windows = {
        "kernel_size": kernel, "dilation": node.ints("dilations") or (1, 1), "stride": node.ints("strides") or (1, 1)
    }  # fmt: skip
    if (top, left) == (bottom, right):
        return call(F.fold, node.traced(), output_size=size, padding=(top, left), **windows)
    parts = ((2, top, top + size[0], 1), (3, left, left + size[1], 1))
    return call(_folded_part, node.traced(), parts=parts, output_size=whole, **windows)


def _folded_part(x: Tensor, *, parts: tuple[tuple[int, int, int, int], ...], **windows: tuple[int, ...]) -> Tensor:
    return _slice(F.fold(x, **windows), parts=parts)
