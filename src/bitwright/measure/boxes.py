"""Boxes as users keep them: COCO JSON, YOLO text, VOC XML, dicts as torchvision has them."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.given.images import Images
from bitwright.given.text import read_json, short
from bitwright.given.truth import Boxes, Truth, TruthArray
from bitwright.measure.class_maps import ClassMap, GivenClassMap
from bitwright.words import plural

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of Pascal VOC, in their order."""
SLACK = 0.01
"""Share of a side by which a box may reach beyond its image without a word: labels are rounded."""


# ------------------------------------------------------------------------------------------------ COCO


@dataclass(frozen=True)
class Coco:
    """A file in COCO's format.

    Attributes:
        path: of the file.
        images: their ``id``, ``file_name``, ``width`` and ``height``; no two have the same id or name.
        annotations: boxes, or the segments of images in a panoptic file, with the ``image_id`` of theirs.
        categories: their ``id`` and ``name``, by ``id``.
    """

    path: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Coco:
        """A file.

        Raises:
            DataError: it cannot be read, or is something else.
        """
        try:
            found = read_json(path)
            parts = [found[k] for k in ("images", "annotations", "categories")]
            parts[2] = sorted(parts[2], key=lambda c: int(c["id"]))
            parts[0] = [i | {"id": _id(i["id"]), "file_name": _path(i["file_name"])} for i in parts[0]]
            parts[1] = [a | {"image_id": _id(a["image_id"])} for a in parts[1]]
        except UsageError as error:
            raise DataError(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"Expected COCO's lists of images, annotations and categories in {path}, cannot find them "
                f"({type(error).__name__}: {short(error)})."
            ) from error
        for key in ("id", "file_name"):
            twice = next((k for k, count in Counter(i[key] for i in parts[0]).items() if count > 1), None)
            if twice is not None:
                raise DataError(
                    f"Expected one image of each {key} in {path}, found several of {twice!r}. Give each its own."
                )
        if not parts[1]:
            raise DataError(f"Expected annotations in {path}, found an empty list. Name the file that has them.")
        return cls(path, *parts)

    @property
    def panoptic(self) -> bool:
        """Whether annotations tell of the segments of images, not of boxes."""
        return "segments_info" in self.annotations[0]

    def classes(self, given: GivenClassMap) -> ClassMap:
        """Classes by category; categories in the order of their ids are classes 0, 1, ... if nothing else is said."""
        names = {int(c["id"]): str(c.get("name", c["id"])) for c in self.categories}
        if given is None:
            return ClassMap({str(i): k for k, i in enumerate(names)}, dict(enumerate(names.values())), identity=False)
        chosen = ClassMap.read(given)
        table = {i: chosen.table[n] if n in chosen.table else chosen.of(i, str(self.path)) for i, n in names.items()}
        known = {c: names[i] for i, c in table.items() if c is not None}
        return ClassMap({str(i): c for i, c in table.items()}, known, identity=False)

    def boxes(
        self, there: Sequence[dict[str, Any] | None], images: Images, given: GivenClassMap
    ) -> tuple[list[Any], Truth]:
        """The boxes of images; those that the file names without any have none."""
        classes, by_image = self.classes(given), defaultdict(list)
        for annotation in self.annotations:
            by_image[annotation["image_id"]].append(annotation)
        self._tell_of_strangers(by_image)
        if given is None:
            self._check_categories()
        items: list[Boxes | None] = []
        for position, image in enumerate(there):
            if image is None:
                items.append(None)
                continue
            where = f"{images.names[position]} of {self.path}"
            self._check_size(image, images.placement(position).image, where)
            items.append(_of_coco(by_image[image["id"]], classes, where))
        _check(items, images, str(self.path))
        known = len(self.categories) if given is None else None
        return items, Truth("detection", [], f"boxes of {self.path}", classes.names, known)

    def _tell_of_strangers(self, by_image: Mapping[Any, Sequence[Any]]) -> None:
        """Warns of boxes whose image the file does not have."""
        known = {image["id"] for image in self.images}
        strange = [number for number in by_image if number not in known]
        if strange:
            count = sum(len(by_image[number]) for number in strange)
            warnings.warn(
                f"{plural(count, 'annotation')} in {self.path} of images that it does not list are left out "
                f"(first: image_id {strange[0]}).",
                UserWarning,
                stacklevel=5,
            )

    def _check_categories(self) -> None:
        known = {int(c["id"]) for c in self.categories}
        said = ((a["category_id"], a["image_id"]) for a in self.annotations if "category_id" in a)
        strange = next((s for s in said if isinstance(s[0], int | float | str) and _id(s[0]) not in known), None)
        if strange is not None:
            raise DataError(
                f"Expected category_id to be one of the {plural(len(known), 'category', 'categories')} in {self.path}, "
                f"found {strange[0]!r} for image_id {strange[1]}. Add that category, or say its class with class_map=."
            )

    def _check_size(self, image: dict[str, Any], size: tuple[int, int], where: str) -> None:
        drawn = (image.get("width"), image.get("height"))
        if images_differ(drawn, size):
            raise DataError(
                f"Expected {where} to have {drawn[0]}x{drawn[1]} pixels, found {size[0]}x{size[1]}. Give the images on "
                "which the boxes were drawn."
            )


def _id(value: Any) -> Any:
    """An id as a number where it is one: programs write 7 as 7.0 or "7" too.

    Raises:
        TypeError: it is neither number nor text.
    """
    if not isinstance(value, int | float | str):
        raise TypeError(f"{type(value).__name__} as id")
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() else value
    return int(value) if value == value // 1 else value


def _path(name: Any) -> Any:
    """A path of any system."""
    return name.replace("\\", "/").removeprefix("./") if isinstance(name, str) else name


def images_differ(drawn: tuple[Any, Any], size: tuple[int, int]) -> bool:
    """Whether a file tells of an image of another size; 0 says nothing."""
    return all(isinstance(side, int) and side > 0 for side in drawn) and drawn != size


def _of_coco(found: list[dict[str, Any]], classes: ClassMap, where: str) -> Boxes:
    try:
        kept = [(a, classes.of(_id(a["category_id"]), where)) for a in found]
        rows = [(a, c) for a, c in kept if c is not None]
        sides = np.array([a["bbox"] for a, _ in rows], np.float64).reshape(len(rows), 4)
        said = [a.get("area") for a, _ in rows]
        areas = np.array([w * h if s is None else float(s) for s, (w, h) in zip(said, sides[:, 2:], strict=True)])
        crowd = np.array([bool(int(a.get("iscrowd") or 0)) for a, _ in rows], bool)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"Expected bbox [x, y, width, height] and category_id for {where}, found something else ({short(error)})."
        ) from error
    corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1)
    return Boxes(corners, np.array([c for _, c in rows], np.int64), crowd, areas, where)


# ------------------------------------------------------------------------------------------------ YOLO text


def of_yolo(
    there: Sequence[Path | None], images: Images, where: Path, classes: ClassMap, named: Path
) -> tuple[list[Any], Truth]:
    """Lines of class and centre x, centre y, width, height as shares of the image; an image without a file has none."""
    items = [
        Boxes.of(np.zeros((0, 4)), np.zeros(0), where=images.names[i])
        if file is None
        else _of_text(file, images.placement(i).image, classes)
        for i, file in enumerate(there)
    ]
    missing = [images.names[i] for i, file in enumerate(there) if file is None]
    if missing:
        warnings.warn(
            f"{plural(len(missing), 'image')} without a file in {where} count as images without objects "
            f"(first: {missing[0]}).",
            UserWarning,
            stacklevel=4,
        )
    _check(items, images, str(where))
    names = dict(enumerate(_lines(named, "names of classes"))) if named.is_file() else {}
    return items, Truth("detection", [], f"boxes of {where}", names or classes.names, len(names) or None)


def _of_text(file: Path, size: tuple[int, int], classes: ClassMap) -> Boxes:
    rows, labels = [], []
    for number, line in enumerate(_lines(file, "YOLO text"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        label, row = _yolo_row(line, where)
        chosen = classes.of(label, where)
        if chosen is not None:
            rows.append(row)
            labels.append(chosen)
    shares = np.array(rows, np.float64).reshape(len(rows), 4)
    corners = np.concatenate([shares[:, :2] - shares[:, 2:] / 2, shares[:, :2] + shares[:, 2:] / 2], 1)
    return Boxes.of(corners * np.tile(size, 2), np.array(labels, np.int64), where=str(file))


def _lines(file: Path, what: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Expected {what}, cannot read {file} ({short(error)}). Save it as UTF-8.") from error


def _yolo_row(line: str, where: str) -> tuple[int, list[float]]:
    parts = line.split()
    try:
        number, row = float(parts[0]), [float(p) for p in parts[1:]]
        label = int(number) if number == int(number) else -1
    except (ValueError, OverflowError):
        label, row = -1, []
    if len(row) != 4 or label < 0 or not np.isfinite(row).all():
        raise DataError(
            f"Expected 'class cx cy width height' in {where}, with numbers relative to the image, found {line[:60]!r}."
        )
    if max(row) > 2 or min(row) < -1:
        raise DataError(
            f"Expected a box relative to the image (0 to 1) in {where}, found {max(row, key=abs):g}. Divide by the "
            "image's width and height."
        )
    return label, row


# ------------------------------------------------------------------------------------------------ VOC XML


def of_voc(
    there: Sequence[Path | None], every: Iterable[Path], images: Images, where: Path, classes: ClassMap, *, said: bool
) -> tuple[list[Any], Truth]:
    """Objects with a name and a ``bndbox`` of pixels that count from 1; difficult ones do not count.

    Names are numbered as VOC's classes are where all are among them, otherwise in the order of the alphabet, which a
    warning says.
    """
    read = {file: _objects(file) for file in every}
    if not classes.table:
        names = sorted({name for _, rows in read.values() for name, _, _ in rows})
        voc = set(names) <= set(VOC)
        order = VOC if voc else tuple(names)
        if said and not voc:
            listed = ", ".join(f"{k} {n}" for k, n in enumerate(order))
            warnings.warn(
                f"Classes of {where} are numbered in the order of their names: {listed[:200]}. "
                "class_map= says otherwise.",
                UserWarning,
                stacklevel=4,
            )
        classes = ClassMap({n: k for k, n in enumerate(order)}, dict(enumerate(order)), identity=False)
    items: list[Boxes | None] = []
    for position, file in enumerate(there):
        items.append(None if file is None else _of_xml(file, read[file], images.placement(position).image, classes))
    _check(items, images, str(where))
    return items, Truth("detection", [], f"boxes of {where}", classes.names)


BoxRow = tuple[str, list[float], bool]


def _objects(file: Path) -> tuple[tuple[int, int], list[BoxRow]]:
    """Width and height (0 if not said), and the name, corners and difficulty of each object."""
    try:
        content = file.read_bytes()
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(content)
        size = tuple(int(float(root.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
        rows = [
            (
                _named(each.findtext("name")),
                [float(each.findtext(f"bndbox/{k}") or "none") for k in ("xmin", "ymin", "xmax", "ymax")],
                (each.findtext("difficult") or "0").strip() == "1",
            )
            for each in root.iter("object")
        ]
    except (OSError, ValueError, OverflowError, LookupError, ElementTree.ParseError) as error:
        raise DataError(
            f"Expected VOC XML with objects of a name and a bndbox, cannot read {file} ({short(error)})."
        ) from error
    return (size[0], size[1]), rows


def _named(text: str | None) -> str:
    """The name of an object.

    Raises:
        ValueError: it has none.
    """
    if text is None or not text.strip():
        raise ValueError("an object without a name")
    return text.strip()


def _of_xml(file: Path, found: tuple[tuple[int, int], list[BoxRow]], size: tuple[int, int], classes: ClassMap) -> Boxes:
    drawn, rows = found
    if images_differ(drawn, size):
        raise DataError(
            f"Expected an image of {drawn[0]}x{drawn[1]} pixels for {file}, found {size[0]}x{size[1]}. Give the images "
            "on which the boxes were drawn."
        )
    kept = [(c, row, hard) for name, row, hard in rows if (c := classes.of(name, str(file))) is not None]
    corners = np.array([row for _, row, _ in kept], np.float64).reshape(len(kept), 4)
    corners[:, :2] -= 1  # the first pixel is 1, and reaches from 0
    hard = np.array([hard for _, _, hard in kept], bool)
    return Boxes.of(corners, np.array([c for c, _, _ in kept], np.int64), hard, str(file))


# ------------------------------------------------------------------------------------------------ objects, checks


def boxes_of_items(truth: Truth, images: Images, class_map: GivenClassMap = None) -> Truth | None:
    """Dicts of ``boxes`` (G, 4) of corners and ``labels`` (G,), as torchvision has them; None where items are others.

    Corners are pixels of the images, which are those of the network's input where images are tensors.

    Raises:
        DataError: an item holds something else, or a box lies outside of its image.
    """
    if truth.kind != "other" or not all(isinstance(x, dict) and {"boxes", "labels"} <= x.keys() for x in truth.items):
        return None
    classes = ClassMap.read(class_map)

    def one(position: int, item: dict[str, Any]) -> Boxes:
        where = f"the labels of image {position}"
        corners, labels = (_array(item[k], where) for k in ("boxes", "labels"))
        _check_whole(labels, where)
        crowd = _array(item.get("iscrowd", np.zeros(labels.size)), where).astype(bool).reshape(-1)
        if not are_rows_of_four(corners, labels.size) or len(crowd) != labels.size:
            raise DataError(
                f"Expected boxes (G, 4) and labels (G,) in {where}, found {corners.shape} and {labels.shape}."
            )
        chosen = [classes.of(int(c), where) for c in labels.reshape(-1)]
        _check_whole(np.array([c for c in chosen if c is not None]), where, least=0)
        kept = np.array([c is not None for c in chosen], bool)
        found = np.array([c for c in chosen if c is not None], np.int64)
        return Boxes.of(corners.reshape(-1, 4)[kept], found, crowd[kept], where)

    found = [one(i, x) for i, x in enumerate(truth.items)]
    _check(found, images, "the labels given")
    return Truth("detection", found, "boxes given", classes.names)


def are_rows_of_four(corners: TruthArray, count: int) -> bool:
    """Whether these are so many boxes, each four numbers one after the other, or two points."""
    whole = corners.shape[-1:] == (4,) or corners.shape[-2:] == (2, 2)
    return corners.size == 4 * count and (whole or not count)


def _check_whole(labels: TruthArray, where: str, *, least: float = -np.inf) -> None:
    """Classes must be whole numbers.

    Raises:
        DataError: one is not, or is below the least.
    """
    numbers = labels.dtype.kind in "biuf"
    wrong = [c for c in labels.reshape(-1).tolist() if not numbers or c != c // 1 or c < least]
    if wrong:
        raise DataError(
            f"Expected whole numbers from 0 as classes in {where}, found {wrong[0]!r}. Number them, or say with "
            "class_map= what does not count."
        )


def _array(values: Any, where: str) -> TruthArray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().float() if values.dtype == torch.bfloat16 else values.detach().cpu()
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise DataError(f"Expected boxes (G, 4) and labels (G,) in {where}, found rows of several lengths.") from error
    if found.dtype.kind == "c":
        raise DataError(f"Expected real numbers in {where}, found {found.dtype}.")
    return found


def _check(items: Sequence[Boxes | None], images: Images, where: str) -> None:
    """There must be boxes, of finite corners in order, and each must show at least a part of its image.

    Raises:
        DataError: there is none, or one lies outside.
    """
    beyond: list[str] = []
    for position, found in enumerate(items):
        if found is None or not len(found):
            continue
        size = np.tile(images.placement(position).image, 2).astype(float)
        low, high = found.corners[:, :2], found.corners[:, 2:]
        unknown = ~np.isfinite(found.corners).all(1)
        if unknown.any():
            said = ", ".join(f"{v:g}" for v in found.corners[unknown][0])
            raise DataError(f"Expected corners that are finite numbers in {found.where}, found {said}. Remove the box.")
        turned = (high < low).any(1)
        if turned.any():
            said = ", ".join(f"{v:g}" for v in found.corners[turned][0])
            raise DataError(
                f"Expected corners x1, y1, x2, y2 with x1 < x2 and y1 < y2 in {found.where}, found {said}. Give two "
                "corners, or a width and a height above 0, as the format has them."
            )
        wrong = (low >= size[:2]).any(1) | (high <= 0).any(1)
        if wrong.any():
            said = ", ".join(f"{v:g}" for v in found.corners[wrong][0])
            raise DataError(
                f"Expected boxes in an image of {size[0]:g}x{size[1]:g} pixels, found corners {said} in {found.where}. "
                "Remove the box or give the image that it was drawn on."
            )
        outside = (low < -SLACK * size[:2] - 1).any(1) | (high > (1 + SLACK) * size[:2] + 1).any(1)
        beyond += [found.where] * int(outside.sum())
    if not any(found is not None and len(found) for found in items):
        raise DataError(f"Expected boxes of the images in {where}, found none. There is nothing to compare with.")
    every = [found.corners for found in items if found is not None and len(found)]
    if max(float(corners.max()) for corners in every) <= 1:
        raise DataError(f"Expected corners in pixels in {where}, found none above 1. Multiply by the image's sides.")
    if beyond:
        warnings.warn(
            f"{plural(len(beyond), 'box', 'boxes')} in {where} reach beyond the image (first: {beyond[0]}).",
            UserWarning,
            stacklevel=5,
        )
