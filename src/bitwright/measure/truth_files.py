"""Labels, masks and boxes, from where users keep them: which format it is, and what belongs to which image."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.entries import why_not
from bitwright.given.images import Images
from bitwright.given.places import EXTENSIONS
from bitwright.given.truth import Truth
from bitwright.measure import boxes, masks
from bitwright.measure.class_maps import CLASS_MAP_FILES, ClassMap, GivenClassMap
from bitwright.words import plural

Item = TypeVar("Item")
KINDS = {**dict.fromkeys(EXTENSIONS, "masks"), ".txt": "YOLO text", ".xml": "VOC XML", ".json": "JSON"}
NAMES = "classes.txt"
"""A file beside YOLO text that names classes, a line each."""


def labelled(images: Images, labels: Any, class_map: GivenClassMap = None) -> Images:
    """The images that something is known of, with what is known.

    Args:
        images: of which those without a mask, or not named by a file of boxes, are left out with a warning.
        labels: a CSV of ``file,class_index``, or one class index for each image; a folder of mask PNGs, an ``.npz``
            with ``masks``, a COCO panoptic file, or whole numbers (N, H, W); a COCO file of boxes, a folder of YOLO
            text or of VOC XML, or a dict of ``boxes`` and ``labels`` for each image. Anything else of one item for each
            image is for a metric of one's own. What came with the images if not given.
        class_map: classes by the numbers or names that masks or boxes hold, or a file with them; ``"ids"`` leaves the
            numbers of COCO files as they are.

    Raises:
        DataError: the labels cannot be read, belong to no image, or are none that a class map is for.
    """
    found = _labelled(images, labels, class_map)
    if class_map is not None and found.truth is None:
        said = "no labels" if found.labels is None else "class indices"
        raise DataError(
            f"Expected masks or boxes beside class_map=, found {said}. Leave it out, and number classes as the network "
            "does."
        )
    return found


def _labelled(images: Images, labels: Any, class_map: GivenClassMap) -> Images:
    if labels is None:
        if images.truth is not None and images.truth.kind == "segmentation":
            return images.known(masks.with_foreground(images.truth)) if class_map is None else images
        found = boxes.boxes_of_items(images.truth, images, class_map) if images.truth is not None else None
        return images if found is None else images.known(found)
    if not isinstance(labels, str | os.PathLike):
        return _given(images, labels, class_map)
    path = Path(labels).expanduser()
    kind = _kind(path)
    if kind == "labels":
        return images.labelled(os.fspath(labels))
    return _only_known(images, _read(kind, path, images, class_map))


def _kind(path: Path) -> str:
    """What a file or a folder holds.

    Raises:
        DataError: nothing, or several kinds.
    """
    if path.is_file():
        return {".npz": "arrays", ".json": "JSON", ".xml": "VOC XML"}.get(path.suffix.lower(), "labels")
    if not path.is_dir():
        return "labels"  # which says that there is no such file
    found = Counter(KINDS[f.suffix.lower()] for f in files(path) if f.suffix.lower() in KINDS)
    if len(found) > 1:
        said = " and ".join(f"{count} of {kind}" for kind, count in found.items())
        raise DataError(f"Expected one kind of labels in {path}, found {said}. Name a folder of one kind.")
    if not found:
        raise DataError(f"Expected masks (.png), YOLO text (.txt), VOC XML or JSON in {path}, found none.")
    return next(iter(found))


def files(folder: Path) -> list[Path]:
    """Files below a folder in order, without hidden ones and those that name classes."""
    found = (Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(f for f in found if not f.name.startswith(".") and f.name not in {*CLASS_MAP_FILES, NAMES})


def _read(kind: str, path: Path, images: Images, class_map: GivenClassMap) -> tuple[list[Any], Truth]:
    """One item per image, None where there is none, and what they are."""
    if kind == "arrays":
        found = masks.of_arrays(path, len(images), class_map)
        found = found if class_map is not None else masks.with_foreground(found)
        return list(found.items), found
    if kind == "JSON":
        return _from_json(path, images, class_map)
    folder = path if path.is_dir() else path.parent
    each = files(path) if path.is_dir() else [path]
    there = matched(images.names, {f.relative_to(folder).as_posix(): f for f in each}, str(path))
    classes = ClassMap.read(class_map, folder)
    if kind == "masks":
        return masks.of_files(there, path, classes)
    if kind == "YOLO text":
        return boxes.of_yolo(there, images, path, classes, folder / NAMES)
    return boxes.of_voc(there, each, images, path, classes, said=class_map is None)


def _from_json(path: Path, images: Images, class_map: GivenClassMap) -> tuple[list[Any], Truth]:
    if path.is_dir():
        several = files(path)
        if len(several) > 1:
            raise DataError(f"Expected one JSON file in {path}, found {len(several)}. Name the file.")
        (path,) = several
    coco = boxes.Coco.read(path)
    there = matched(images.names, {str(i["file_name"]): i for i in coco.images}, str(path), stems=False)
    if coco.panoptic:
        return masks.of_panoptic(coco, there, class_map)
    return coco.boxes(there, images, class_map)


def matched(names: Sequence[str], there: Mapping[str, Item], where: str, *, stems: bool = True) -> list[Item | None]:
    """For each image what belongs to it: by its path, else by its file name, without endings if ``stems``.

    Args:
        names: paths of images, relative to their folder.
        there: by paths relative to theirs.
        where: they are from, for messages.
        stems: whether the endings differ (a mask of a photo) or not (a file that names photos).

    Raises:
        DataError: nothing belongs to any image, or one thing to several.

    Example:
        >>> matched(["a/1.jpg", "a/2.jpg"], {"1.png": 5}, "masks")
        [5, None]
    """

    def bare(name: str) -> str:
        return os.path.splitext(name)[0] if stems else name

    by_path = {bare(key): item for key, item in there.items()}
    by_name = {os.path.basename(key): item for key, item in by_path.items()}
    shared = _repeated(map(os.path.basename, by_path)) | _repeated(os.path.basename(bare(n)) for n in names)
    found: list[Item | None] = []
    for name in map(bare, names):
        short = os.path.basename(name)
        item = by_path.get(name)
        if item is None and short in by_name:
            if short in shared:
                raise DataError(
                    f"Expected one of {where} for {name}, the name {short} stands for several. Use the same folders."
                )
            item = by_name[short]
        found.append(item)
    used = {id(item) for item in found if item is not None}
    idle = [key for key, item in there.items() if id(item) not in used]
    if not used:
        first = f", one is {next(iter(there))}" if there else ""
        raise DataError(f"Expected names of the images (such as {names[0]}) in {where}, found none of them{first}.")
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(there)} in {where} belong to no image (first: {idle[0]}).", UserWarning, stacklevel=3
        )
    return found


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def _only_known(images: Images, found: tuple[list[Any], Truth]) -> Images:
    """The images that there is an item of; a warning counts the others."""
    items, truth = found
    there = [i for i, item in enumerate(items) if item is not None]
    truth = Truth(truth.kind, [items[i] for i in there], truth.said, truth.names, truth.known)
    if len(there) == len(items):
        return images.known(truth)
    first = next(images.names[i] for i, item in enumerate(items) if item is None)
    warnings.warn(
        f"{plural(len(items) - len(there), 'image')} of {len(items)} left out: the {truth.said} tell nothing of them "
        f"(first: {first}).",
        UserWarning,
        stacklevel=3,
    )
    return images.take(there).known(truth)


def _given(images: Images, labels: Any, class_map: GivenClassMap) -> Images:
    """Images with labels that were given as objects."""
    count = len(images)
    try:
        several = -1 if isinstance(labels, Set | Mapping) else len(labels)
    except TypeError:
        several = -1
    if several != count:
        many = f"{several} of them" if several >= 0 else f"one {type(labels).__name__}"
        raise DataError(f"Expected labels of {plural(count, 'image')}, found {many}. Give one for each image.")
    if isinstance(labels, Tensor | np.ndarray) and labels.ndim != 1:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
        if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "iu":
            return images.labelled(torch.as_tensor(array[:, 0].astype(np.int64)))
        if array.ndim in {3, 4} and array.dtype.kind in "biu" and array.size:
            one = next((axis for axis in (1, 3) if array.ndim == 4 and array.shape[axis] == 1), None)
            array = array if one is None else array.squeeze(one)
            if array.ndim != 3:
                return _known(images, labels, class_map)
            found = masks.of_masks(array, ClassMap.read(class_map))
            return images.known(found if class_map is not None else masks.with_foreground(found))
        return _known(images, labels, class_map)
    if isinstance(labels, Tensor):
        return images.known(_other(labels)) if labels.is_floating_point() else images.labelled(labels)
    if all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in labels):
        return images.labelled(labels)
    other = _other(labels)
    pixels = replace(other, items=[np.asarray(x) if isinstance(x, Image.Image) else x for x in labels])
    return images.known(
        boxes.boxes_of_items(other, images, class_map) or masks.masks_of_items(pixels, class_map) or other
    )


def _known(images: Images, labels: Any, class_map: GivenClassMap) -> Images:
    """Images with labels of another kind, which are masks at once where a class map says so."""
    other = _other(labels)
    return images.known((None if class_map is None else masks.of_numbers(other, ClassMap.read(class_map))) or other)


def _other(labels: Any) -> Truth:
    said = f"labels of type {type(labels).__name__}"
    if isinstance(labels, Tensor | np.ndarray):
        said = f"labels {str(labels.dtype).removeprefix('torch.')} of {'x'.join(map(str, labels.shape))}"
    odd = why_not(labels) if isinstance(labels, list | tuple) else ""
    return Truth("other", labels, f"{said}{odd}", asked=True)
