"""Images that a program holds: tensors, arrays, loaders, data sets and generators, with what came with each image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import BitwrightError, DataError, raised_by_user
from bitwright.given.entries import (
    CHANNELS,
    LABELS,
    Came,
    ImagesAndLabel,
    can_be_images,
    entry,
    is_encoded,
    join_labels,
    pictures,
    pixels_last,
    what_it_is,
)
from bitwright.given.files import Arrays, Pictures, Source, Tensors, decoded
from bitwright.given.items import items
from bitwright.given.preprocessing import DEPTHS
from bitwright.given.several import InputPart, side_by_side
from bitwright.given.text import short
from bitwright.given.truth import Truth
from bitwright.words import listed

AXES = (4, 5)
"""How many a batch of preprocessed tensors has: images (N, C, H, W), or videos (N, C, T, H, W)."""
AXES_OF_ALL = (2, 3, *AXES)
"""The same for one tensor of everything, which may hold vectors (N, F) or signals (N, C, T) too. What comes in pieces
may not: a piece (C, H, W) is one image, and nobody could tell it from some signals."""
STREAM_BYTES = 8 << 30
STREAM_IMAGES = 1 << 16
"""Read of what does not tell its length, which may have no end."""


@dataclass(frozen=True)
class Asked:
    """What is wanted of an object that holds images.

    Attributes:
        most: images that are used; it is read no further than the batch that completes them. None for all.
        input_key: name of the images where items are dicts; the one entry that can be images if not given.
        labels: whether what comes with the images is looked at.
        channels_last: whether the network takes images (H, W, C), so that arrays stay as they are.
        inputs: names of the network's inputs.
    """

    most: int | None = None
    input_key: str | None = None
    labels: bool = True
    channels_last: bool = False
    inputs: tuple[str, ...] = ()


def read_object(source: object, asked: Asked) -> tuple[Source, Tensor | Truth | None]:
    """The images of an object, and class indices, masks or whatever else came with them.

    Raises:
        DataError: it holds no images, or more than fit into memory, or reading it fails.
    """
    where = f"the {type(source).__name__} given"
    if isinstance(source, Tensor | np.ndarray):
        return of_array(source, where, asked), None
    pair = _pair(source)
    if pair is not None:
        images, labels = pair
        known = join_labels([Came(labels, len(images), True)]) if asked.labels else None
        return of_array(images, where, asked), known
    if isinstance(source, Mapping):
        _check_no_splits(source)
    if isinstance(source, Mapping | Image.Image):
        source = [source]
    if isinstance(source, str | bytes) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise DataError(
            f"Expected a path, arrays, tensors, a data set or a loader as images, found {where}. "
            "Give for example a DataLoader, or a list of tensors (C, H, W)."
        )
    return _read(source, where, asked)


def _check_no_splits(source: Mapping[Any, Any]) -> None:
    sets = [key for key, value in source.items() if hasattr(value, "__getitem__") and hasattr(value, "__len__")]
    if sets and not any(map(can_be_images, source.values())):
        raise DataError(
            f"Expected one data set as images, found a {type(source).__name__} of {listed(list(map(str, sets)))}. "
            f"Give one of them: data[{sets[0]!r}]."
        )


def _pair(source: object) -> tuple[Any, Any] | None:
    """Images and labels, where it is one (images, labels) of arrays rather than a sequence of images."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return None
    images, labels = source
    if not all(isinstance(x, Tensor | np.ndarray) and x.ndim > 0 for x in source):
        return None
    if not can_be_images(images) and not (_is_input(images) and images.ndim in AXES_OF_ALL):
        return None
    whole = labels.dtype.kind in "biu" if isinstance(labels, np.ndarray) else not labels.is_floating_point()
    return (images, labels) if whole and len(images) == len(labels) and labels.ndim < images.ndim else None


# ----------------------------------------------------------------------------------------------- arrays


def of_array(array: Tensor | npt.NDArray[Any], where: str, asked: Asked = Asked()) -> Source:
    """Images in one array or tensor: 8-bit pixels, or floats that are preprocessed.

    Raises:
        DataError: it holds neither, or nobody can say which axis channels are.
    """
    if isinstance(array, Tensor) and (array.is_meta or array.layout is not torch.strided):
        raise DataError(f"Expected images with values in a dense tensor, found {array.device.type} {array.layout}.")
    if array.dtype in (torch.uint8, np.uint8) and array.ndim in (3, 4) and 0 not in array.shape:
        pixels = array.cpu().numpy() if isinstance(array, Tensor) else array
        if array.ndim == 3 and array.shape[-1] in CHANNELS[1:]:
            raise DataError(f"Expected several images in {where}, found one: uint8 {tuple(array.shape)}. Give [image].")
        return Arrays(pixels_last(pixels, where, first=isinstance(array, Tensor)))
    return Tensors(_checked(_floats(array, where, asked, AXES_OF_ALL), where))


def _floats(array: Tensor | npt.NDArray[Any], where: str, asked: Asked, axes: tuple[int, ...] = AXES) -> Tensor:
    """Preprocessed images as float32 (N, C, H, W) or (N, C, T, H, W); arrays of them may have their channels last."""
    shape = tuple(array.shape)
    real = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if not real or len(shape) not in axes:
        in_one = " Give signals (N, C, T) or vectors (N, F) in one tensor of all." if real and axes is AXES else ""
        raise DataError(
            f"Expected uint8 images (N, H, W, C) or (N, C, H, W), preprocessed float images (N, C, H, W), or float "
            f"videos (N, C, T, H, W), in {where}, found {what_it_is(array)}.{in_one}"
            f"{_as_pixels(array, whole=axes is AXES_OF_ALL)}"
        )
    if isinstance(array, Tensor):
        return array.detach().to("cpu", torch.float32)
    found = torch.from_numpy(np.asarray(array, dtype=np.float32))
    last = len(shape) in AXES and shape[-1] in (1, 3) and shape[1] not in (1, 3) and not asked.channels_last
    return found.movedim(-1, 1) if last else found


def _as_pixels(array: Tensor | npt.NDArray[Any], *, whole: bool) -> str:
    """What mends whole numbers and truth values: bytes where they can be pixels, else floats.

    Args:
        array: that is no image yet.
        whole: whether it holds all images, and so the largest value of all.
    """
    kind = str(array.dtype).removeprefix("torch.")
    if not re.fullmatch("u?int(8|16|32|64)|bool", kind) or array.ndim not in AXES_OF_ALL or 0 in array.shape:
        return ""
    values = array.long() if isinstance(array, Tensor) else array  # PyTorch computes little with uint16
    least, most = int(values.min()), int(values.max())
    floats, to_bytes = ".float()", ".to(torch.uint8)"
    if not isinstance(array, Tensor):
        floats, to_bytes = ".astype(numpy.float32)", ".astype(numpy.uint8)"
    what = {2: "vectors (N, F)", 3: "signals (N, C, T)"}.get(array.ndim, "preprocessed values")
    as_floats = f" Give {what} as floats: images{floats}."
    if array.ndim not in (3, 4) or least < 0 or most >= 1 << max(DEPTHS):
        return as_floats
    if kind == "bool":
        return f" Give (images * 255){to_bytes}."
    bits = next(b for b in DEPTHS if most < 1 << b)
    scaled = f"images{to_bytes}" if bits == 8 else f"(images{floats} * (255 / {(1 << bits) - 1})).round(){to_bytes}"
    if whole and bits == 8:
        return f" Give {scaled}."
    others = "" if whole else ", if no other image has more"
    return f" Values up to {most} are pixels of {bits} bits{others}: give {scaled}.{as_floats}"


def _checked(tensor: Tensor, where: str) -> Tensor:
    shape = tuple(tensor.shape)
    if 0 in shape:
        raise DataError(f"Expected images in {where}, found the empty shape {shape}.")
    finite = torch.isfinite(tensor).flatten(1).all(1)
    if not finite.all():
        raise DataError(
            f"Expected finite values in {where}, image {int((~finite).nonzero()[0])} has NaN or infinity. "
            "Preprocess it again."
        )
    return tensor


# ---------------------------------------------------------------------------------------------- streams


def _read(source: Any, where: str, asked: Asked) -> tuple[Source, Tensor | Truth | None]:
    held, came = _Held(where, asked), []
    for item in _each(source, where, asked.most):
        before = held.count
        several = _several(item, asked)
        if several is None:
            found = entry(item, asked.input_key, where)
            batched = held.add(found.images)
        else:
            found = several
            batched = held.add_inputs(several.images)
        came.append(Came(found.label if asked.labels else None, held.count - before, batched))
        if held.bytes > STREAM_BYTES:
            raise DataError(
                f"Expected at most {STREAM_BYTES >> 30} GiB of images from {where}, found more. Say how many with "
                "samples=, or give a folder, which is read as needed."
            )
        if asked.most is not None and held.count >= asked.most:
            break
        if held.count > STREAM_IMAGES and not _has_length(source):
            raise DataError(
                f"Expected images that end, read {held.count} from {where} and found more. Say how many with samples=, "
                "or give a list or a data set."
            )
    return held.source(), join_labels(came)


def _has_length(source: Any) -> bool:
    try:
        return len(source) >= 0
    except TypeError:  # a generator, or a loader over one
        return False


def _several(item: Any, asked: Asked) -> ImagesAndLabel | None:
    """The inputs of an item by name, and what came with them; None where it holds none of the network's."""
    given, label = item, None
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Mapping | tuple | list):
        given, label = item
    if isinstance(given, tuple | list) and given is not item and len(given) <= len(asked.inputs):
        given = dict(zip(asked.inputs, given, strict=False)) if all(map(_is_input, given)) else given
    if not isinstance(given, Mapping) or asked.input_key is not None:
        return None
    found = {name: _as_input(given[name]) for name in asked.inputs if name in given and _is_input(given[name])}
    found = {name: value for name, value in found.items() if name not in LABELS}
    if not found or (len(found) == 1 and next(iter(found.values())).ndim not in AXES):
        return None
    if label is None:
        label = next((given[key] for key in LABELS if key in given), None)
    return ImagesAndLabel(found, label)


def _is_input(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.ndim > 0
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 0


def _as_input(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().to("cpu", torch.float32)


def _each(source: Any, where: str, most: int | None) -> Iterator[Any]:
    """What the source gives; an error that a library raises for it becomes one line.

    Raises:
        DataError: reading it failed.
    """
    try:
        yield from items(source, most)
    except (BitwrightError, Warning, GeneratorExit):
        raise
    except Exception as error:
        if raised_by_user(error):
            raise
        raise DataError(
            f"Expected images from {where}, reading it raised {type(error).__name__}: {short(error)}. "
            "Try next(iter(images))."
        ) from error


class _Held:
    """Images of a stream as they come: preprocessed ones as tensors, 8-bit pixels as Pillow images."""

    def __init__(self, where: str, asked: Asked) -> None:
        self.where, self.asked = where, asked
        self.tensors: list[Tensor] = []
        self.images: list[Image.Image] = []
        self.count, self.bytes = 0, 0
        self.parts: tuple[InputPart, ...] = ()

    def add(self, found: Any) -> bool:
        """Takes one image or a batch.

        Returns:
            Whether it was a batch.

        Raises:
            DataError: it is no image, or unlike those before it.
        """
        if isinstance(found, list | tuple) and found:
            for each in found:
                self.add(each)
            return True
        if is_encoded(found):
            found = decoded(found.get("bytes"), found.get("path"), f"image {self.count} of {self.where}")
        if isinstance(found, Image.Image):
            self._add_images([found])
            return False
        if not isinstance(found, Tensor | np.ndarray):
            raise DataError(
                f"Expected images from {self.where} (tensors, arrays or Pillow images, or one of these with a label), "
                f"found {what_it_is(found)}."
            )
        found = found.detach().cpu() if isinstance(found, Tensor) else found
        if found.dtype in (torch.uint8, np.uint8) and found.ndim in (2, 3, 4):
            images = [Image.fromarray(np.asarray(found))] if found.ndim == 2 else pictures(found, self.where)
            self._add_images(images)
            return len(images) > 1 or found.ndim == 4
        self._add_floats(_floats(found if found.ndim != 3 else found[None], self.where, self.asked))
        return bool(found.ndim != 3)

    def add_inputs(self, inputs: Mapping[str, Tensor]) -> bool:
        """Takes the inputs of one image or of a batch, by name; says whether it was a batch.

        Raises:
            DataError: they are not of as many images, or others than before.
        """
        batched = max(x.ndim for x in inputs.values()) != min(AXES) - 1
        packed, parts = side_by_side(inputs if batched else {name: x[None] for name, x in inputs.items()})
        if self.parts not in ((), parts):
            raise DataError(f"Expected the same inputs each time from {self.where}, found others.")
        self.parts = parts
        self._add_floats(packed)
        return batched

    def _add_images(self, images: list[Image.Image]) -> None:
        self._check_alike(bool(self.tensors))
        self.images += images
        self.count += len(images)
        self.bytes += sum(x.width * x.height * len(x.getbands()) for x in images)

    def _add_floats(self, batch: Tensor) -> None:
        self._check_alike(bool(self.images))
        if self.tensors and batch.shape[1:] != self.tensors[0].shape[1:]:
            raise DataError(
                f"Expected images of one shape from {self.where}, found {tuple(self.tensors[0].shape[1:])}, "
                f"then {tuple(batch.shape[1:])}. Resize or crop them."
            )
        self.tensors.append(batch)
        self.count += len(batch)
        self.bytes += batch.nbytes

    def _check_alike(self, other: bool) -> None:
        if other:
            raise DataError(
                f"Expected images of one kind from {self.where}, found 8-bit pixels and floats. Preprocess all or none."
            )

    def source(self) -> Source:
        """All of them.

        Raises:
            DataError: there are none, or some are not finite.
        """
        if not self.count:
            raise DataError(
                f"Expected images from {self.where}, found none. Give a list, since an iterator can be read only once."
            )
        if self.images:
            return Pictures(self.images)
        return Tensors(_checked(torch.cat(self.tensors), self.where), self.parts)
