"""Images: a sequence of preprocessed tensors, loaded from where users keep them, and their labels."""

from __future__ import annotations

import copy
import csv
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.given.entries import MOST_CLASSES
from bitwright.given.files import Encoded, Files, Joined, Source, Store, Tensors
from bitwright.given.items import evenly
from bitwright.given.objects import AXES, Asked, of_array, read_object
from bitwright.given.placement import ImagePlacement
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing, parse_input_size
from bitwright.given.references import absolute_source
from bitwright.given.several import InputPart
from bitwright.given.shards import SHARDS, open_shards
from bitwright.given.text import short
from bitwright.given.truth import Truth, masks_of

__all__ = ["Images", "PreprocessFunction", "Preprocessing", "load_images", "parse_input_size"]

# fmt: off
EXTENSIONS = frozenset({
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
# fmt: on
CACHE_BYTES = 1 << 30
GREY = frozenset({"1", "L", "I", "I;16", "F"})
"""Modes of Pillow images of one channel."""


# ---------------------------------------------------------------------------------------------- images


class Images:
    """A fixed sequence of preprocessed images, decoded when first asked for.

    Invariants: ``len(names) == len(self)``; ``labels`` is None or int64 of that length; the same index gives
    the same bits every time, whatever the number of threads. A slice is a view that shares decoded pixels.

    Attributes:
        names: path relative to the folder (with ``/``), or the position in the array.
        labels: int64 (N,) class indices, or None.
        truth: masks, boxes or whatever else is known of the images, or None.
        preprocessing: what is applied to the pixels; None when the images were given as tensors.
        place: the path or name that they were loaded from, which holds from any folder; None where there is none.

    Example:
        >>> images = load_images(torch.zeros(10, 3, 8, 8), None)
        >>> len(images), len(images[::2]), [tuple(b.shape) for b in images.batches(4)][-1]
        (10, 5, (2, 3, 8, 8))
    """

    def __init__(
        self,
        store: Store,
        indices: Sequence[int],
        labels: Tensor | None,
        truth: Truth | None = None,
        place: str | None = None,
    ) -> None:
        self._store, self._indices = store, list(indices)
        self.labels, self.truth, self.place = labels, truth, place
        self.names = [store.source.names[i] for i in self._indices]

    @property
    def parts(self) -> tuple[InputPart, ...]:
        """The inputs of a network of several that each image holds; none where it is one tensor without a name."""
        return self._store.parts

    @property
    def preprocessing(self) -> Preprocessing | PreprocessFunction | None:
        """What is applied to the pixels of each image."""
        return self._store.preprocessing

    @property
    def input_key(self) -> str | None:
        """Which of several entries the images were, where somebody said so."""
        return self._store.input_key

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...

    def __getitem__(self, index: int | slice) -> Tensor | Images:
        if isinstance(index, slice):
            part = self.take(range(len(self))[index])
            part.place = None
            return part
        return self.batch([index])[0]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches(32):
            yield from batch

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 (B, C, H, W) in order; B is ``size``, less in the last one.

        Raises:
            DataError: for an unreadable file, when its batch is reached.
            UsageError: when ``size`` is below 1.
        """
        if size < 1:
            raise UsageError(f"Expected a batch size of at least 1, found {size}.")
        starts = range(0, len(self), size)
        return self._store.stream(self._indices[start : start + size] for start in starts)

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return float32 (B, C, H, W) for positions in this sequence, in the order given.

        Raises:
            IndexError: for a position outside the sequence.
            UsageError: when there is none.
        """
        if len(indices) == 0:
            raise UsageError("Expected at least one image in a batch, found none.")
        wanted = [self._indices[int(i)] for i in indices]
        if len(wanted) == 1 or self._store.at_hand(wanted):
            return self._store.stack(wanted, [self._store.fetch(i) for i in wanted])
        return next(self._store.stream([wanted]))

    def unlabelled(self) -> Images:
        """Return the same images without labels: what calibration gets."""
        return Images(self._store, self._indices, None, place=self.place)

    def labelled(self, labels: str | Path | Sequence[int] | Tensor) -> Images:
        """Return the same images with these labels; see `load_images` for their forms."""
        found = _explicit_labels(labels, self.names)
        return Images(self._store, self._indices, found, place=self.place)

    def known(self, truth: Truth | None) -> Images:
        """Return the same images with this truth, of one item for each, instead of labels."""
        return Images(self._store, self._indices, None, truth, self.place)

    def joined(self, name: str, beside: Callable[[Tensor], Mapping[str, Tensor]]) -> Images:
        """Return the same images with other inputs of a network beside each.

        Args:
            name: of the images as an input.
            beside: gives the other inputs [B, ...] by name, for images [B, C, H, W].
        """
        store = Joined(self._store, name, beside, self._indices[0])
        return Images(store, self._indices, self.labels, self.truth, self.place)

    def seen(self, index: int) -> Tensor:
        """What people see of the inputs at a position: the first that is an image [C, H, W]."""
        inputs = self.batch([index])
        part = next((p for p in self.parts if len(p.shape) == 3), None)
        return (inputs if part is None else part.of(inputs))[0]

    def as_seen(self) -> Images:
        """Return the same images, whose masks and boxes are those of the network's input, wherever images lie in it."""
        store = copy.copy(self._store)
        height, width = self.seen(0).shape[-2:]
        store.placed = ImagePlacement.same((width, height))
        return Images(store, self._indices, self.labels, self.truth, self.place)

    def placement(self, index: int) -> ImagePlacement:
        """Where the image at a position lies in the network's input.

        Raises:
            DataError: its preprocessing is a function that does more than to resize, crop and pad.
        """
        return self._store.placement(self._indices[index])

    def sample(self, n: int, seed: int = 0) -> Images:
        """Return ``n`` images, one out of each of ``n`` equal stretches of the list, in order.

        The seed picks the image within its stretch. With ``n`` above the length all are returned, with a
        warning.

        Raises:
            UsageError: when ``n`` is below 1.
        """
        if n < 1:
            raise UsageError(f"Expected at least 1 sample, found {n}.")
        total = len(self)
        if n > total:
            warnings.warn(f"{n} images were asked for, there are {total}; all are used.", UserWarning, stacklevel=2)
            return self
        return self.take(evenly(total, n, seed))

    def check(self) -> None:
        """Open the header of every file, without decoding any.

        Raises:
            DataError: naming the first file that is no image, and how many there are.
        """
        failures = self._store.failures(self._store.source.header, self._indices)
        if failures:
            raise DataError(_counted(failures, len(self)))

    def readable(self) -> Images:
        """Return those images that decode without an error, with a warning that counts the others.

        Raises:
            DataError: when none is left.
        """
        failures = self._store.failures(self._store.fetch, self._indices)
        if not failures:
            return self
        message = _counted(failures, len(self))
        if len(failures) == len(self):
            raise DataError(message)
        warnings.warn(f"{len(failures)} unreadable images are left out: {message}", UserWarning, stacklevel=2)
        return self.take([k for k, i in enumerate(self._indices) if i not in failures])

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the names, the file or array bytes, and the preprocessing; labels do not enter."""
        digest = hashlib.sha256(_identity(self.preprocessing).encode())
        with ThreadPoolExecutor(self._store.threads) as pool:
            for name, content in zip(self.names, pool.map(self._store.source.digest, self._indices), strict=True):
                digest.update(hashlib.sha256(name.encode()).digest() + content)
        return digest.hexdigest()

    @property
    def labels_sha256(self) -> str:
        """Hex digest of the labels; of nothing where there are none."""
        return hashlib.sha256(b"" if self.labels is None else self.labels.numpy().tobytes()).hexdigest()

    def take(self, positions: Sequence[int]) -> Images:
        """The images at these positions, in the order given; a view that shares decoded pixels."""
        labels = None if self.labels is None else self.labels[list(positions)]
        truth = None if self.truth is None else self.truth.take(positions)
        return Images(self._store, [self._indices[p] for p in positions], labels, truth, self.place)

    def __repr__(self) -> str:
        labelled = self.labels is not None or self.truth is not None
        return f"Images({len(self)}, {'labelled' if labelled else 'unlabelled'})"


def _identity(preprocessing: Preprocessing | PreprocessFunction | None) -> str:
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.model_dump_json()
    if preprocessing is None:
        return "none"
    return str(getattr(preprocessing, "__qualname__", type(preprocessing).__qualname__))


def _counted(failures: dict[int, DataError], total: int) -> str:
    first = str(next(iter(failures.values())))
    return first if total == 1 else f"{len(failures)} of {total} images cannot be read, first: {first}"


# --------------------------------------------------------------------------------------------- loading


def load_images(
    source: object,
    preprocessing: Preprocessing | PreprocessFunction | None,
    *,
    labels: str | Path | Sequence[int] | Tensor | None = None,
    skip_unreadable: bool = False,
    most: int | None = None,
    input_key: str | None = None,
    inputs: Sequence[str] = (),
    read_labels: bool = True,
    channels_last: bool = False,
    threads: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Images:
    """Return the images that ``source`` names.

    Args:
        source: a folder (recursive, sorted by path), one image file, a ``.tar`` archive (WebDataset) or ``.parquet``
            table (Hugging Face) or a folder of them, ``zoo:NAME``, or an ``.npz`` file with
            ``images`` and perhaps ``labels``; each with an optional slice as in ``photos[0::2]``. Or images in memory:
            an array, a tensor, or any iterable of them, such as a ``DataLoader``, a data set or a generator, which is
            read once. Images are 8-bit pixels (N, H, W, C), (N, C, H, W) or (N, H, W), Pillow images, or preprocessed
            floats (N, C, H, W), videos (N, C, T, H, W); one tensor of all may also hold signals (N, C, T) or vectors
            (N, F). Items may be (images, labels) or dicts of both, batches or single. A label is a class index for each
            image, whole numbers (B, H, W), the class of each pixel, or what a metric of one's own reads. `Images` are
            returned as they are.
        preprocessing: applied to everything that is not a float tensor already.
        labels: a CSV ``file,class_index`` (header or not; matched by relative path, then by file name), or
            one class index for each image. Without it a folder in which every image lies directly in one of
            two or more sub-folders is labelled by their sorted names, an ``.npz`` by its own ``labels``.
        skip_unreadable: decode everything now, leave out what fails and warn with the count.
        most: images that will be used of an iterable, which is then read no further than the batch that completes them;
            of a data set, and of a loader that takes one in order, they are spread evenly over it.
        input_key: name of the images where items are dicts, the one entry that can be images if not given; of the
            column in a table, the array in an ``.npz``, or the ending of members in an archive.
        inputs: names of the network's inputs: entries of dicts, and arrays of an ``.npz``, that have one of them are
            inputs, and tuples in the place of the tensor go by their order.
        read_labels: whether what comes with the images in memory is looked at.
        channels_last: whether the network takes floats (N, H, W, C), as a ``preprocessing`` of that layout says too.
        threads: that decode; by default one a core, at most 8. The result does not depend on it.
        cache_bytes: for decoded and resized pixels, so that a second epoch does not decode again.

    Raises:
        DataError: when there is no image, the labels do not match, or preprocessing is needed and not given.
    """
    if isinstance(source, Images):
        return source.labelled(labels) if labels is not None else source
    window, named = None, None
    channels_last = channels_last or _is_channels_last(preprocessing)
    asked = Asked(most, input_key, read_labels, channels_last, tuple(inputs))
    if isinstance(source, str) and not source.strip():
        raise DataError("Expected a folder of images, an .npz file or zoo:NAME, found nothing. Name one.")
    if isinstance(source, str | os.PathLike):
        named = absolute_source(os.fspath(source))
        place, window = _split_slice(os.fspath(source))
        found, known = _from_place(str(place), asked)
    else:
        place = f"the {type(source).__name__} given"
        found, known = read_object(source, asked)
    how = _fitted(preprocessing, found, str(place), in_memory=named is None, channels_last=channels_last)
    store = Store(found, how, threads, cache_bytes, input_key)
    if labels is not None:
        known = _explicit_labels(labels, found.names)
    truth, found_labels = (known, None) if isinstance(known, Truth) else (None, known)
    images = Images(store, range(len(found.names)), found_labels, truth, named)
    if window is not None:
        images = images.take(range(len(images))[window])
        if len(images) == 0:
            raise DataError(
                f"Expected images, the slice leaves none of the {len(found.names)} in {place}. Give one that leaves "
                "some, such as [:256] or [0::2]."
            )
    return images.readable() if skip_unreadable else images


def _split_slice(text: str) -> tuple[str, slice | None]:
    """Split off a trailing Python slice.

    Example:
        >>> _split_slice("photos[0::2]")
        ('photos', slice(0, None, 2))
    """
    match = re.fullmatch(r"(.+)\[([^\[\]]*)\]", text, re.DOTALL)
    if match is None or _exists(Path(text)):
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
    if not _exists(path):
        raise DataError(
            f"Expected a folder of images, an .npz file or zoo:NAME, {text!r} does not exist. Check the path."
        )
    if path.is_dir():
        return _from_folder(path, asked)
    if path.suffix.lower() == ".npz":
        return _from_npz(path, asked)
    if path.suffix.lower() in SHARDS and _is_file(path):
        return open_shards([path], EXTENSIONS, asked.input_key, labels=asked.labels)
    if path.suffix.lower() in EXTENSIONS:
        _check_no_key(asked, text)
        return Files(path.parent, [path.name]), None
    raise DataError(
        f"Expected a folder of images, an .npz file or zoo:NAME, found the file {text}. "
        f"Give a folder; image files end in {', '.join(sorted(EXTENSIONS))}."
    )


def _of_zoo(labels: Any, count: int, text: str) -> Tensor | Truth | None:
    """Classes, masks (N, H, W) or boxes that ship with the images."""
    if isinstance(labels, list):
        return Truth("other", labels, f"boxes of {text}")
    return (
        _as_masks(labels, count, text) if labels is not None and labels.ndim == 3 else _as_labels(labels, count, text)
    )


def _is_file(path: Path) -> bool:
    """Whether it is a file that can be read to its end: no folder, pipe or device."""
    return _exists(path) and path.is_file()


def _exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _from_folder(root: Path, asked: Asked) -> tuple[Source, Tensor | None]:
    names = sorted(_image_names(root))
    shards = (
        [] if names else sorted(path for path in root.rglob("*") if path.suffix.lower() in SHARDS and _is_file(path))
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


NO_INPUTS = frozenset({"images", "labels", "masks"})
"""Arrays of an ``.npz`` that have a meaning of their own."""


def _from_npz(path: Path, asked: Asked) -> tuple[Source, Tensor | Truth | None]:
    if not path.is_file():
        raise DataError(f"Expected a file at {path}, found something else. Give an .npz file.")
    key = asked.input_key or "images"
    try:
        with np.load(path, allow_pickle=False) as file:
            named = {name: file[name] for name in asked.inputs if name in file and asked.input_key is None}
            named = {} if len(asked.inputs) > 1 and named.keys() == {"images"} else named
            others = [n for n in file if n not in {*asked.inputs, *NO_INPUTS} and file[n].dtype.kind == "f"]
            if named and others and len(named) < len(asked.inputs):
                raise DataError(
                    f"Expected inputs {', '.join(asked.inputs)} in {path}, found {', '.join(file)}. "
                    "Name them as the network does, and leave out what is no input."
                )
            if key not in file and not named:
                wanted = f", or inputs {', '.join(asked.inputs)}," if asked.inputs else ""
                raise DataError(
                    f"Expected an array '{key}'{wanted} in {path}, found {', '.join(file) or 'nothing'}. "
                    "Name the one that holds the images as input_key=."
                )
            images = np.zeros(1) if key not in file else file[key]
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
        return source, _as_masks(masks, len(source.names), str(path))
    return source, _as_labels(labels, len(source.names), str(path))


def _is_channels_last(how: Preprocessing | PreprocessFunction | None) -> bool:
    return isinstance(how, Preprocessing) and how.layout == "channels_last"


def _fitted(
    how: Preprocessing | PreprocessFunction | None, source: Source, where: str, *, in_memory: bool, channels_last: bool
) -> Preprocessing | PreprocessFunction | None:
    """What is applied to the source's images: nothing to floats; settings without a size get that of the images.

    Raises:
        DataError: nobody said how 8-bit pixels become the network's input, or floats are of another shape.
    """
    if isinstance(source, Tensors):
        _check_floats(source, how, where, channels_last)
        return None
    if how is None:
        line = "preprocessing= with mean= and std=" if isinstance(source, Encoded) else "mean= and std="
        line = "preprocessing=bitwright.Preprocessing(mean=..., std=...)" if in_memory else line
        raise DataError(
            f"Expected a preprocessing for the images in {where}, the model brings none. Give {line}, the numbers that "
            f"it was trained with, or a function{'' if in_memory else ' preprocess beside the callable'}."
        )
    if not isinstance(how, Preprocessing) or how.input_size is not None:
        return how
    sizes = set() if isinstance(source, Encoded) else {source.size(i) for i in range(len(source.names))}
    if len(sizes) != 1:
        found = f"{len(sizes)} sizes" if sizes else "files"
        raise DataError(
            f"Expected to know the size of the network's input for the images in {where}, found {found}. "
            "Give input_size=, such as 224."
        )
    width, height = sizes.pop()
    read = source.read(0)
    return how.sized((1 if isinstance(read, Image.Image) and read.mode in GREY else 3, height, width))


def _check_floats(source: Tensors, how: Preprocessing | PreprocessFunction | None, where: str, last: bool) -> None:
    if len(source.parts) > 1:
        return
    shape = tuple(source.data.shape[1:])
    if source.data.ndim in AXES and shape[-1] in (1, 3) and shape[0] not in (1, 3) and not last:
        seen, expected = ("videos", "T, H, W") if len(shape) >= min(AXES) else ("images", "H, W")
        axes = (0, len(shape), *range(1, len(shape)))
        raise DataError(
            f"Expected float {seen} (N, C, {expected}) in {where}, found {tuple(source.data.shape)}, which looks like "
            f"(N, {expected}, C). Give images.permute{axes}: channels come second, unless the layout of "
            "preprocessing= is 'channels_last'."
        )
    if isinstance(how, Preprocessing) and how.input_size is not None and shape != how.shape:
        raise DataError(
            f"Expected images of {how.shape} ({'H, W, C' if last else 'C, H, W'}) for this model, {where} "
            f"holds {shape}. "
            "Give preprocessing= if the model takes that."
        )


# ---------------------------------------------------------------------------------------------- labels


def _as_labels(labels: Any, count: int, where: str) -> Tensor | None:
    if labels is None:
        return None
    try:
        array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"Expected one whole class index for each image in {where} ({short(error)}).") from error
    if array.ndim != 1 or len(array) != count or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"Expected one whole class index for each of {count} images in {where}, "
            f"found labels of {array.dtype} {tuple(array.shape)}."
        )
    if array.min() < 0 or array.max() >= MOST_CLASSES:
        wrong = array.min() if array.min() < 0 else array.max()
        raise DataError(f"Expected class indices from 0 to {MOST_CLASSES - 1} in {where}, found {wrong}.")
    return torch.from_numpy(array.astype(np.int64))


def _as_masks(masks: npt.NDArray[Any], count: int, where: str) -> Truth:
    if masks.ndim != 3 or len(masks) != count or masks.dtype.kind not in "biu":
        raise DataError(
            f"Expected masks as whole numbers ({count}, H, W) in {where}, found {masks.dtype} {masks.shape}."
        )
    return masks_of(masks, f"masks of {where}")


def _explicit_labels(labels: str | Path | Sequence[int] | Tensor, names: list[str]) -> Tensor | None:
    if isinstance(labels, str | os.PathLike):
        return _match_labels(_read_labels(Path(labels)), names, Path(labels))
    return _as_labels(labels, len(names), "the labels given")


def _read_labels(path: Path) -> dict[str, int]:
    if not _is_file(path.expanduser()):
        raise DataError(
            f"Expected labels as a CSV file with lines file,class_index, found no file {path}. Check the path."
        )
    try:
        with path.expanduser().open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Expected labels as a CSV file with lines file,class_index, cannot read {path} "
            f"({short(error)}). Give the path of such a file."
        ) from error
    table: dict[str, int] = {}
    for position, (number, row) in enumerate(rows):
        name, index = _label_row(row, f"line {number} of {path}", header=position == 0)
        if index is None:
            continue
        if table.setdefault(name, index) != index:
            raise DataError(
                f"Expected one class for {name} in {path}, found {table[name]} and {index} (line {number}). "
                "Remove one of the lines."
            )
    if not table:
        raise DataError(f"Expected lines file,class_index in {path}, found none.")
    return table


def _label_row(row: list[str], where: str, *, header: bool) -> tuple[str, int | None]:
    if len(row) != 2:
        raise DataError(f"Expected file,class_index in {where}, found {len(row)} columns: {','.join(row)[:80]!r}.")
    name = row[0].strip().replace("\\", "/").removeprefix("./")
    text = row[1].strip()
    if re.search(r"[\x00-\x08\x0b-\x1f]", "".join(row)):
        raise DataError(f"Expected file,class_index in {where}, found {','.join(row)[:80]!r}. Write it as plain text.")
    if re.fullmatch(r"[0-9]+", text):
        if len(text) > 10 or int(text) >= MOST_CLASSES:
            raise DataError(f"Expected a class index below {MOST_CLASSES} in {where}, found {text[:40]}.")
        return name, int(text)
    if header and not re.fullmatch(r"[+-]?[\d.]+", text):
        return name, None
    raise DataError(f"Expected a class index (0, 1, ...) in {where}, found {text!r}.")


def _match_labels(table: dict[str, int], names: list[str], path: Path) -> Tensor:
    """Return the labels in the order of ``names``; lines without an image are counted in a warning."""
    known = set(names)
    by_file: dict[str, list[str]] = {}
    for key in table:
        if key not in known:
            by_file.setdefault(_file_name(key), []).append(key)
    shared = _repeated(_file_name(name) for name in names if name not in table)
    matched = {name: name if name in table else _by_file_name(name, by_file, shared, path) for name in names}
    missing = [name for name, key in matched.items() if key is None]
    if missing:
        raise DataError(
            f"Expected a label for every image in {path}, {len(missing)} of {len(names)} have none "
            f"(first: {', '.join(missing[:3])}; of {len(table)} lines one is {next(iter(table))}). "
            "Add them or slice the images."
        )
    keys = [key for key in matched.values() if key is not None]
    used = set(keys)
    idle = [key for key in table if key not in used]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(table)} labels in {path} have no image (first: {idle[0]}).",
            UserWarning,
            stacklevel=2,
        )
    return torch.tensor([table[key] for key in keys], dtype=torch.int64)


def _by_file_name(name: str, by_file: dict[str, list[str]], shared: set[str], path: Path) -> str | None:
    keys = by_file.get(_file_name(name), [])
    if len(keys) > 1 or (keys and _file_name(name) in shared):
        raise DataError(
            f"Expected one label for {name} in {path}, the file name {_file_name(name)} stands for several "
            "images or lines. Write the path relative to the image folder."
        )
    return keys[0] if keys else None


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
