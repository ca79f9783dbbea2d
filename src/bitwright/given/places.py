"""Images from where users keep them: folders, files, archives, arrays, and those that ship with the package."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.files import Files, Source, exists, is_file
from bitwright.given.labels import class_indices, class_masks
from bitwright.given.objects import Asked, of_array, read_object
from bitwright.given.references import absolute_source
from bitwright.given.shards import SHARDS, open_shards
from bitwright.given.text import short
from bitwright.given.truth import Truth

# fmt: off
EXTENSIONS = frozenset({
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
"""Endings of image files."""
# fmt: on
NO_INPUTS = frozenset({"images", "labels", "masks"})
"""Arrays of an ``.npz`` that have a meaning of their own."""
TENSORS = frozenset({".pt", ".pth", ".safetensors"})
_AS_ARRAY = ", or of tensors numpy.save('images.npy', tensor.numpy())"
_Array = npt.NDArray[Any]


class FoundImages(NamedTuple):
    """Images where they are, before any is decoded."""

    source: Source
    known: Tensor | Truth | None
    """Class indices (N,), masks, boxes, or whatever else came with the images."""
    place: str
    """As messages name it."""
    named: str | None
    """The path or name, which holds from any folder; None for images in memory."""
    window: slice | None
    """The part that was asked for behind the name."""


def find_images(source: object, asked: Asked) -> FoundImages:
    """What a path, a name or an object in memory stands for.

    Raises:
        DataError: there is nothing there, or nothing that can be read as images.
    """
    if isinstance(source, str) and not source.strip():
        raise DataError("Expected a folder of images, an .npz file or zoo:NAME, found nothing. Name one.")
    if not isinstance(source, str | os.PathLike):
        return FoundImages(*read_object(source, asked), f"the {type(source).__name__} given", None, None)
    named = absolute_source(os.fspath(source))
    place, window = _split_slice(os.fspath(source))
    return FoundImages(*_from_place(place, asked), place, named, window)


def _split_slice(text: str) -> tuple[str, slice | None]:
    """Split off a trailing Python slice.

    Example:
        >>> _split_slice("photos[0::2]")
        ('photos', slice(0, None, 2))
    """
    match = re.fullmatch(r"(.+)\[([^\[\]]*)\]", text, re.DOTALL)
    if match is None or exists(Path(text)):
        return text, None
    parts = [part.strip() for part in match[2].split(":")]
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[+-]?[0-9]{1,18}|", part) for part in parts):
        raise DataError(f"Expected a slice such as [0::2] or [:256] at the end of {text!r}, found [{match[2]}].")
    window = slice(*(int(part) if part else None for part in parts))
    if window.step == 0:
        raise DataError(f"Expected a slice step other than 0 in {text!r}.")
    return match[1], window


def _from_place(text: str, asked: Asked) -> tuple[Source, Tensor | Truth | None]:
    if text.startswith("zoo:"):
        from bitwright import zoo

        _check_no_key(asked, text)
        pixels, labels = zoo.images(text.removeprefix("zoo:"))
        return of_array(np.asarray(pixels), text), _of_zoo(labels, len(pixels), text)
    path = Path(text).expanduser()
    if not exists(path):
        raise DataError(
            f"Expected a folder of images, an .npz file or zoo:NAME, {text!r} does not exist. Check the path."
        )
    if path.is_dir():
        return _from_folder(path, asked)
    if path.suffix.lower() == ".npz":
        return _from_npz(path, asked)
    if path.suffix.lower() == ".npy" and is_file(path):
        _check_no_key(asked, text)
        return _from_npy(path, asked), None
    if path.suffix.lower() in SHARDS and is_file(path):
        return open_shards([path], EXTENSIONS, asked.input_key, labels=asked.labels)
    if path.suffix.lower() in EXTENSIONS:
        _check_no_key(asked, text)
        return Files(path.parent, [path.name]), None
    raise DataError(
        f"Expected a folder of images, an .npz file or zoo:NAME, found the file {text}. "
        f"Give a folder{_AS_ARRAY if path.suffix in TENSORS else ''}; "
        f"image files end in {', '.join(sorted(EXTENSIONS))}."
    )


def _of_zoo(labels: Any, count: int, text: str) -> Tensor | Truth | None:
    """Classes, masks (N, H, W) or boxes that ship with the images."""
    if isinstance(labels, list):
        return Truth("other", labels, f"boxes of {text}")
    return (
        class_masks(labels, count, text)
        if labels is not None and labels.ndim == 3
        else class_indices(labels, count, text)
    )


def _from_folder(root: Path, asked: Asked) -> tuple[Source, Tensor | None]:
    names = sorted(_image_names(root))
    shards = (
        [] if names else sorted(path for path in root.rglob("*") if path.suffix.lower() in SHARDS and is_file(path))
    )
    if shards:
        return open_shards(shards, EXTENSIONS, asked.input_key, labels=asked.labels)
    if not names:
        raise DataError(
            f"Expected images in {root}, found none. Give files that end in {', '.join(sorted(EXTENSIONS))}."
        )
    _check_no_key(asked, str(root))
    return Files(root, names), _folder_labels(root, names)


def _check_no_key(asked: Asked, where: str) -> None:
    """A name of one entry is of no use where each file is one image."""
    if asked.input_key is not None:
        warnings.warn(
            f"input_key='{asked.input_key}' is not used for {where}, where each image stands alone.",
            UserWarning,
            stacklevel=2,
        )


def _image_names(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
        for name in files:
            if Path(name).suffix.lower() in EXTENSIONS and not _hidden(name):
                yield Path(folder, name).relative_to(root).as_posix()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folder_labels(root: Path, names: list[str]) -> Tensor | None:
    if any(name.count("/") != 1 for name in names):
        return None
    used = {name.split("/")[0] for name in names}
    if len(used) < 2:
        return None
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name))
    empty = [name for name in classes if name not in used]
    if empty:
        warnings.warn(
            f"{len(empty)} class folders of {root} hold no image (first: {empty[0]}), but count as classes.",
            UserWarning,
            stacklevel=2,
        )
    index = {name: k for k, name in enumerate(classes)}
    return torch.tensor([index[name.split("/")[0]] for name in names], dtype=torch.int64)


def _from_npz(path: Path, asked: Asked) -> tuple[Source, Tensor | Truth | None]:
    if not path.is_file():
        raise DataError(f"Expected a file at {path}, found something else. Give an .npz file.")
    try:
        with np.load(path, allow_pickle=False) as file:
            named = _inputs_in(file, path, asked)
            images = _images_in(file, path, asked, needed=not named)
            labels, masks = file.get("labels"), file.get("masks")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"Expected arrays of numbers in {path}, cannot read it ({short(error)}): "
            "write it with numpy.savez(path, images=..., labels=...)."
        ) from error
    if images.ndim == 0:
        return of_array(images, str(path), asked), None  # which says what is wrong
    source = read_object(named, asked)[0] if named else of_array(images, str(path), asked)
    masks = labels if masks is None and labels is not None and labels.ndim == 3 else masks
    if masks is not None:
        return source, class_masks(masks, len(source.names), str(path))
    return source, class_indices(labels, len(source.names), str(path))


def _from_npy(path: Path, asked: Asked) -> Source:
    try:
        images = np.load(path, allow_pickle=False)
    except Exception as error:
        raise DataError(
            f"Expected an array of numbers in {path}, cannot read it ({short(error)}): write it with numpy.save."
        ) from error
    return of_array(images, str(path), asked)


def _inputs_in(file: Mapping[str, _Array], path: Path, asked: Asked) -> dict[str, _Array]:
    """The arrays that are named as the network's inputs are."""
    named = {name: file[name] for name in asked.inputs if name in file and asked.input_key is None}
    named = {} if len(asked.inputs) > 1 and named.keys() == {"images"} else named
    others = [n for n in file if n not in {*asked.inputs, *NO_INPUTS} and file[n].dtype.kind == "f"]
    if named and others and len(named) < len(asked.inputs):
        raise DataError(
            f"Expected inputs {', '.join(asked.inputs)} in {path}, found {', '.join(file)}. "
            "Name them as the network does, and leave out what is no input."
        )
    return named


def _images_in(file: Mapping[str, _Array], path: Path, asked: Asked, *, needed: bool) -> _Array:
    """The one array of images; something else stands in its place where it is not there and not needed."""
    key = asked.input_key or "images"
    if key not in file and needed:
        wanted = f", or inputs {', '.join(asked.inputs)}," if asked.inputs else ""
        raise DataError(
            f"Expected an array '{key}'{wanted} in {path}, found {', '.join(file) or 'nothing'}. "
            "Name the one that holds the images as input_key=."
        )
    return np.zeros(1) if key not in file else file[key]
