"""Masks as users keep them: PNG files of class indices or palettes, arrays, COCO panoptic files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.text import short
from bitwright.given.truth import IGNORED, Mask, Truth, TruthArray
from bitwright.measure.class_maps import NUMBERS, ClassMap, GivenClassMap

if TYPE_CHECKING:
    from bitwright.measure.boxes import Coco


def of_files(there: Sequence[Path | None], where: Path, classes: ClassMap) -> tuple[list[Mask | None], Truth]:
    """Masks in files: whole numbers of one channel, or positions in a palette, as VOC has them."""
    found = Truth(
        "segmentation",
        [Mask(partial(_read, f, classes), str(f)) for f in there if f is not None],
        f"masks of {where}",
        classes.names,
    )
    items = iter((found if classes.table else with_foreground(found)).items)
    return [None if file is None else next(items) for file in there], replace(found, items=[])


def with_foreground(truth: Truth) -> Truth:
    """Masks of 0 and 255 alone, as binary masks are saved, with 1 for 255; a warning says so. Others as they are."""
    seen: set[int] = set()
    for mask in truth.items:
        seen |= set(np.unique(mask.read()).tolist())
        if seen - {0, IGNORED}:
            return truth
    if seen != {0, IGNORED}:
        return truth
    warnings.warn(
        f"The {truth.said} hold 0 and {IGNORED} alone: {IGNORED} is taken for class 1. If it does not count, say so "
        'with class_map=, such as {"0": 0, "255": null}.',
        UserWarning,
        stacklevel=4,
    )
    return replace(truth, items=[Mask(partial(_foreground, m), m.where) for m in truth.items])


def _foreground(mask: Mask) -> TruthArray:
    return np.asarray(mask.read() == IGNORED, np.int64)


def _read(file: Path, classes: ClassMap) -> TruthArray:
    return classes.applied(_pixels(file), str(file))


def _pixels(file: Path, *, channels: int = 1) -> TruthArray:
    """Whole numbers (h, w), or (h, w, 3) of colours.

    Raises:
        DataError: the file is no such image.
    """
    try:
        with Image.open(file) as image:
            lossy, found = image.format == "JPEG", np.asarray(image if channels == 1 else image.convert("RGB"))
    except Exception as error:  # decoders raise a dozen kinds for a broken file
        raise DataError(f"Expected a mask, cannot read {file} ({short(error)}). Repair or remove it.") from error
    if lossy:
        raise DataError(f"Expected a PNG as mask, {file} is a JPEG, which changes the numbers. Save it without loss.")
    if channels == 1 and found.ndim == 3 and found.shape[2] == 2:  # grey and how opaque it is
        found = found[..., 0]
    if channels == 1 and found.ndim == 3 and (found[..., :3] == found[..., :1]).all():
        found = found[..., 0]
    if found.ndim != 1 + min(channels, 2) or found.dtype.kind not in "biu":
        raise DataError(
            f"Expected whole numbers or a palette as mask, {file} holds {found.dtype} {found.shape}. Save the class of "
            "each pixel in one channel."
        )
    return found


def of_arrays(path: Path, count: int, class_map: GivenClassMap) -> Truth:
    """The masks (N, h, w) of an ``.npz`` file, in the order of the images.

    Raises:
        DataError: the file cannot be read, or holds no masks of ``count`` images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file.get("masks")
    except Exception as error:
        raise DataError(f"Expected masks in {path}, cannot read it ({short(error)}).") from error
    if found is not None and found.ndim > 2 and len(found) == count and (found.ndim == 4 or found.dtype.kind == "f"):
        classes = None if class_map is None else ClassMap.read(class_map)
        read = of_numbers(Truth("other", found, f"masks of {path}"), classes)
        if read is not None:
            return read
    if found is None or found.ndim != 3 or found.dtype.kind not in "biu" or len(found) != count:
        said = "none" if found is None else f"{found.dtype} {found.shape}"
        raise DataError(
            f"Expected an array 'masks' of whole numbers ({count}, H, W), or one-hot ({count}, K, H, W), in {path}, "
            f"found {said}."
        )
    return of_masks(found, ClassMap.read(class_map), f"masks of {path}")


def of_masks(array: Any, classes: ClassMap, said: str = "masks given") -> Truth:
    """Masks (N, h, w) or a sequence of them."""

    def one(position: int) -> TruthArray:
        mask = array[position]
        values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        return classes.applied(values.astype(np.int64), f"mask {position}")

    return Truth("segmentation", [Mask(partial(one, i), f"mask {i}") for i in range(len(array))], said, classes.names)


def masks_of_items(truth: Truth, class_map: GivenClassMap) -> Truth | None:
    """Masks (h, w) of different sizes, one for each image; None where the items are something else."""

    def is_mask(item: Any) -> bool:
        whole = isinstance(item, Tensor | np.ndarray) and item.ndim == 2
        if not whole or 0 in item.shape:
            return False
        return not item.is_floating_point() if isinstance(item, Tensor) else item.dtype.kind in "biu"

    if not all(map(is_mask, truth.items)):
        return None
    found = of_masks(truth.items, ClassMap.read(class_map))
    return found if class_map is not None else with_foreground(found)


def of_numbers(truth: Truth | None, classes: ClassMap | None = None) -> Truth | None:
    """Masks that are whole numbers in a float type, or one-hot: [h, w], [K, h, w] or [h, w, K] for each image.

    Args:
        truth: of anything else.
        classes: by the numbers of the masks; as they are, but for 255 beside 0 alone, if not given.

    Returns:
        Masks of classes; None if the first item is something else.
    """
    if truth is None or truth.kind != "other" or not len(truth.items) or _classes(truth.items[0]) is None:
        return None

    def one(position: int) -> TruthArray:
        found = _classes(truth.items[position])
        if found is None:
            raise DataError(
                f"Expected whole numbers or one-hot classes in mask {position} as in the first, found others. Give the "
                "class of each pixel."
            )
        return found if classes is None else classes.applied(found, f"mask {position}")

    names = {} if classes is None else classes.names
    items = [Mask(partial(one, i), f"mask {i}") for i in range(len(truth.items))]
    found = Truth("segmentation", items, "masks given", names)
    return with_foreground(found) if classes is None else found


def _classes(item: Any) -> TruthArray | None:
    """The class of each pixel, (h, w); None if the item says none."""
    found = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf" or not found.size:
        return None
    found = found[0] if found.ndim == 3 and len(found) == 1 else found
    if found.ndim == 2:
        whole = found.dtype.kind != "f" or bool((np.isfinite(found) & (found == np.rint(found))).all())
        return found.astype(np.int64) if whole else None
    one_hot = found.ndim == 3 and bool(((found == 0) | (found == 1)).all())
    axis = next((a for a in (0, 2) if one_hot and found.shape[a] > 1 and bool((found.sum(a) == 1).all())), None)
    return None if axis is None else found.argmax(axis)


def of_panoptic(coco: Coco, there: Sequence[Any], class_map: GivenClassMap) -> tuple[list[Mask | None], Truth]:
    """Masks of a COCO panoptic file, whose PNGs lie in a folder of its name; what has no segment does not count."""
    folder = coco.path.with_suffix("") if coco.path.with_suffix("").is_dir() else coco.path.parent
    classes, by_image = coco.classes(class_map), {a["image_id"]: a for a in coco.annotations}

    def read(annotation: dict[str, Any]) -> TruthArray:
        file = folder / str(annotation["file_name"])
        colours = _pixels(file, channels=3).astype(np.int64) @ np.array([1, 256, 65536])
        found = np.full(colours.shape, -1, np.int64)
        for segment in annotation["segments_info"]:
            chosen = classes.of(segment["category_id"], str(coco.path))
            found[colours == segment["id"]] = -1 if chosen is None else chosen
        return found

    items = [
        None
        if image is None or image["id"] not in by_image
        else Mask(partial(read, by_image[image["id"]]), image["file_name"])
        for image in there
    ]
    known = None if class_map == NUMBERS else len(coco.categories)
    return items, Truth("segmentation", [], f"masks of {coco.path}", classes.names, known)
