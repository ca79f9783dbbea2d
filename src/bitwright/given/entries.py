"""What one item of a loader or a data set holds: images, as people hand them over, and what came with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.preprocessing import Pixels, from_pixels
from bitwright.given.truth import Mask, Truth, masks_of
from bitwright.words import listed

LABELS = ("label", "labels", "target", "targets")
"""Entries of a dict that stand for what is known of the image where there are others too."""
CHANNELS = (1, 3, 4)
"""How many an image of 8-bit pixels has: grey, colour, colour with transparency."""
MOST_CLASSES = 1 << 31


@dataclass(frozen=True)
class ImagesAndLabel:
    """The images of one item and what came with them.

    Attributes:
        images: a tensor, an array, a Pillow image, or several of the last two.
        label: a number, a mask, a dict or anything else; None if there is nothing.
    """

    images: Any
    label: Any = None


def entry(item: Any, input_key: str | None, where: str) -> ImagesAndLabel:
    """Tells the images of an item from what came with them.

    Args:
        item: images, (images, label), a dict of both, or (dict, label); a path stands for the image file there.
        input_key: name of the images in the dict; the one entry that can be images if not given.
        where: it comes from, for messages.

    Raises:
        DataError: there are no images in it, or several entries that can be.

    Example:
        >>> entry({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": [0, 1]}, None, "the list given").label
        [0, 1]
    """
    if isinstance(item, tuple | list) and item and not _are_pictures(item):  # several paths are no path and label
        first = entry(item[0], input_key, where)
        return ImagesAndLabel(first.images, item[1] if len(item) > 1 else first.label)
    if isinstance(item, Mapping):
        return _from_dict(item, input_key, where)
    if input_key is not None:
        raise DataError(
            f"Expected dicts from {where} for input_key={input_key!r}, found {what_it_is(item)}. Leave input_key= out."
        )
    return ImagesAndLabel(_opened(item))


def _are_pictures(item: Sequence[Any]) -> bool:
    return any(all(isinstance(x, kind) for x in item) for kind in (Image.Image, str | os.PathLike))


def _opened(given: Any) -> Any:
    """The image files at paths, as `is_encoded` knows them; anything else as it is."""
    if isinstance(given, str | os.PathLike):
        return {"path": os.fspath(given)}
    return [_opened(each) for each in given] if isinstance(given, tuple | list) else given


def _from_dict(item: Mapping[Any, Any], input_key: str | None, where: str) -> ImagesAndLabel:
    found = [key for key, value in item.items() if can_be_images(value)] if input_key is None else [input_key]
    if len(found) != 1:
        said = listed([f"{key} ({what_it_is(value)})" for key, value in item.items()]) or "nothing"
        some = f"{listed([str(key) for key in found])} can be images" if found else "none of them can be images"
        inner = [key for key, value in item.items() if isinstance(value, Mapping)]
        first = (found or ["image"])[0]
        remedy = f"Name it: input_key={first!r}." if isinstance(first, str) else "Give a list of images."
        if inner and not found:
            remedy = f"Give what is in {str(inner[0])!r} in the place of the dict around it."
        raise DataError(f"Expected one entry of images in each dict from {where}, found {said}; {some}. {remedy}")
    if found[0] not in item:
        raise DataError(
            f"Expected an entry {found[0]!r} in each dict from {where}, found {listed([str(k) for k in item])}. "
            "Give one of these as input_key=."
        )
    rest = {key: value for key, value in item.items() if key != found[0]}
    named = [key for key in rest if key in LABELS]
    label = rest[named[0]] if len(named) == 1 else next(iter(rest.values())) if len(rest) == 1 else rest or None
    return ImagesAndLabel(_opened(item[found[0]]), label)


def can_be_images(value: Any) -> bool:
    """Whether it is a Pillow image, a file of one, floats or pixels of at least three axes, or a list of these."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(can_be_images, value))
    if isinstance(value, Image.Image) or is_encoded(value):
        return True
    if isinstance(value, Tensor):
        return value.ndim >= 3 and (value.is_floating_point() or value.dtype == torch.uint8)
    return isinstance(value, np.ndarray) and value.ndim >= 3 and (value.dtype.kind == "f" or value.dtype == np.uint8)


def is_encoded(value: Any) -> bool:
    """Whether it is an image file as Hugging Face's data sets hold it: a dict of its ``bytes``, its ``path``, or both.

    Example:
        >>> is_encoded({"bytes": b"...", "path": None}), is_encoded({"bytes": b"...", "label": 3})
        (True, False)
    """
    if not isinstance(value, Mapping) or not value or not set(value) <= {"bytes", "path"}:
        return False
    return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)


def what_it_is(value: Any) -> str:
    """What a value is, in a few words.

    Example:
        >>> what_it_is(torch.zeros(2, 3, dtype=torch.uint8)), what_it_is(np.zeros(4)), what_it_is("cat")
        ('uint8 (2, 3)', 'float64 (4,)', 'str')
    """
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"an image of {value.width}x{value.height} pixels"
    return type(value).__name__


# ---------------------------------------------------------------------------------------------- pixels


def pictures(pixels: Tensor | Pixels, where: str) -> list[Image.Image]:
    """The images in 8-bit pixels: one (H, W, C), (C, H, W) or (H, W), or several of one of these.

    Channels of a tensor come first where both ends can be channels, as PyTorch has them.

    Raises:
        DataError: there are no channels, or nobody can say which axis they are.
    """
    array = pixels.numpy() if isinstance(pixels, Tensor) else pixels
    if array.ndim == 3 and not {array.shape[0], array.shape[-1]} & set(CHANNELS):
        return [from_pixels(image) for image in array]
    several = array.ndim == 4
    array = pixels_last(array if several else array[None], where, first=isinstance(pixels, Tensor))
    return [from_pixels(np.ascontiguousarray(image)) for image in array]


def pixels_last(array: Pixels, where: str, *, first: bool = False) -> Pixels:
    """8-bit pixels (N, H, W, C) of an array (N, H, W, C), (N, C, H, W) or (N, H, W), which is not copied.

    Args:
        array: of dtype uint8.
        where: it comes from, for messages.
        first: what is taken where both the second and the last axis can be channels.

    Raises:
        DataError: neither can be, or both.

    Example:
        >>> [pixels_last(np.zeros(s, np.uint8), "x").shape for s in ((2, 3, 8, 9), (2, 8, 9, 3), (2, 8, 9))]
        [(2, 8, 9, 3), (2, 8, 9, 3), (2, 8, 9, 1)]
    """
    if array.ndim == 3:
        return array[..., None]
    ends = [array.ndim == 4 and array.shape[axis] in CHANNELS for axis in (1, -1)]
    if not any(ends):
        raise DataError(
            f"Expected uint8 images (N, H, W, C) or (N, C, H, W) of 1 or 3 channels in {where}, found "
            f"{array.dtype} {array.shape}. Give float tensors (N, C, H, W) that are preprocessed already."
        )
    if all(ends) and not first:
        raise DataError(
            f"Expected images whose channels can be told from their sides in {where}, found uint8 {array.shape}: the "
            "second axis can be channels and the last one too. If channels come second, give torch.from_numpy(images); "
            "if they come last, [PIL.Image.fromarray(x) for x in images]."
        )
    return np.moveaxis(array, 1, -1) if ends[0] else array


# ---------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Came:
    """What came with the images of one item.

    Attributes:
        label: as it was.
        count: of images.
        batched: whether the item was a batch, so that the label has an axis of images.
    """

    label: Any
    count: int
    batched: bool


def join_labels(came: Sequence[Came]) -> Tensor | Truth | None:
    """Class indices (N,), masks, or what else came with each image (boxes, names, fractions); None for nothing."""
    if all(each.label is None for each in came):
        return None
    found = [whole_numbers(each) for each in came]
    classes = [x for x in found if x is not None and x.ndim == 1]
    if len(classes) == len(came):
        return torch.cat(classes)
    masks = [mask for x in found if x is not None and x.ndim == 3 for mask in x]
    if len(masks) == sum(each.count for each in came):
        return _masks(masks)
    odd = next(each.label for each in came if each.label is not None)
    items = [x for each in came for x in one_by_one(each)]
    return Truth("other", items, _said(odd) + why_not(items))


def why_not(items: Sequence[Any]) -> str:
    """What keeps labels of images from being classes, where it is one in some of them; a part of a sentence.

    Example:
        >>> why_not([0, 2, -1, None]), why_not([0, torch.tensor(-1)]), why_not(["cat"])
        (' (1 of 4 is None)', ' (1 of 2 is below 0)', '')
    """
    numbers = [x for x in items if isinstance(x, int | np.integer) or (isinstance(x, Tensor) and x.ndim == 0)]
    counts = {"None": sum(x is None for x in items), "below 0": sum(bool(x < 0) for x in numbers)}
    said = next(((kind, count) for kind, count in counts.items() if count), None)
    return "" if said is None else f" ({said[1]} of {len(items)} {'is' if said[1] == 1 else 'are'} {said[0]})"


def _masks(masks: list[Tensor]) -> Truth:
    sizes = {tuple(mask.shape) for mask in masks}
    if len(sizes) == 1:
        return masks_of(torch.stack(masks).numpy(), f"masks of {'x'.join(map(str, *sizes))} pixels")
    items = [Mask(mask.numpy, f"mask {i}") for i, mask in enumerate(masks)]
    return Truth("segmentation", items, f"masks of {len(sizes)} sizes")


def whole_numbers(came: Came) -> Tensor | None:
    """Labels of one item as int64: classes (B,), or masks (B, H, W) of any size; None if they are neither."""
    label = came.label
    if isinstance(label, Image.Image) and label.mode in {"1", "L", "P", "I", "I;16"}:
        label = np.asarray(label)
    if isinstance(label, list | tuple) and label and all(isinstance(x, int | np.integer) for x in label):
        label = np.asarray(label)
    if isinstance(label, int | np.integer | np.ndarray):
        array = np.asarray(label)
        if array.dtype.kind not in "biu":
            return None
        label = torch.from_numpy(array.astype(np.int64))
    if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex():
        return None
    found = label.detach().cpu()
    found = found.to(torch.int64)
    if found.numel() == came.count:
        flat = found.reshape(-1)
        return flat if not len(flat) or 0 <= int(flat.min()) <= int(flat.max()) < MOST_CLASSES else None
    found = found.unsqueeze(0) if found.ndim == 2 and came.count == 1 else found
    found = found.squeeze(1) if found.ndim == 4 and found.shape[1] == 1 else found
    return found if found.ndim == 3 and len(found) == came.count else None


def one_by_one(came: Came) -> list[Any]:
    """What came with each image; None for each where a batch cannot be told apart.

    Example:
        >>> one_by_one(Came({"name": ["a", "b"], "area": torch.tensor([1.0, 2.0])}, 2, batched=True))[1]
        {'name': 'b', 'area': tensor(2.)}
        >>> one_by_one(Came(["cat", "dog"], 2, batched=True)), one_by_one(Came(["cat"], 1, batched=False))
        (['cat', 'dog'], [['cat']])
    """
    label, count = came.label, came.count
    if not came.batched:
        return [label]
    if isinstance(label, Mapping):
        parts = {key: one_by_one(Came(value, count, batched=True)) for key, value in label.items()}
        return [{key: values[i] for key, values in parts.items()} for i in range(count)]
    if _sized(label) and len(label) == count:
        return list(label)
    if isinstance(label, list | tuple) and all(_sized(x) and len(x) == count for x in label):
        return [tuple(part[i] for part in label) for i in range(count)]
    return [label] if count == 1 else [None] * count


def _sized(value: Any) -> bool:
    """Whether it is a sequence with a length: an array of numbers without axes has none."""
    return isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def _said(label: Any) -> str:
    """What a label is, in words."""
    if isinstance(label, Tensor):
        return f"{str(label.dtype).removeprefix('torch.')} labels of {'x'.join(map(str, label.shape))}"
    return f"labels of type {type(label).__name__}"
