"""Images: a sequence of preprocessed tensors, with what is known of them."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.given.files import Encoded, Joined, Source, Store, Tensors
from bitwright.given.items import evenly
from bitwright.given.labels import given_labels
from bitwright.given.objects import AXES, Asked
from bitwright.given.placement import ImagePlacement
from bitwright.given.places import find_images
from bitwright.given.preprocessing import Compact, PreprocessFunction, Preprocessing, parse_input_size
from bitwright.given.several import InputPart
from bitwright.given.truth import Truth
from bitwright.transfer import CPU

__all__ = ["Images", "PreprocessFunction", "Preprocessing", "load_images", "parse_input_size"]

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
        >>> import torch
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

    @property
    def deep(self) -> Mapping[str, int]:
        """The largest value so far in files of 16 bits: ``grey``, and ``colour``, of which 8 bits are read."""
        return self._store.deep

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

    def batches(self, size: int, device: torch.device = CPU) -> Iterator[Tensor]:
        """Yield float32 (B, C, H, W) on a device in order; B is ``size``, less in the last one.

        Raises:
            DataError: for an unreadable file, when its batch is reached.
            UsageError: when ``size`` is below 1.
        """
        if size < 1:
            raise UsageError(f"Expected a batch size of at least 1, found {size}.")
        starts = range(0, len(self), size)
        groups = (self._indices[start : start + size] for start in starts)
        return (found.on(device).floats() for found in self._store.stream(groups))

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device = CPU) -> Tensor:
        """Return float32 (B, C, H, W) on a device for positions in this sequence, in the order given.

        Pictures come to a GPU as bytes, and become floats there.

        Raises:
            IndexError: for a position outside the sequence.
            UsageError: when there is none.
        """
        return self.compact(indices).on(device).floats()

    def compact(self, indices: Sequence[int] | Tensor) -> Compact:
        """Return what :meth:`batch` gives, pictures as bytes.

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
        found = given_labels(labels, self.names)
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
                digest.update(hashlib.sha256(name.encode(errors="surrogatepass")).digest() + content)
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
            table (Hugging Face) or a folder of them, ``zoo:NAME``, a ``.npy`` file of images, or an ``.npz`` file with
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
    channels_last = channels_last or _is_channels_last(preprocessing)
    found = find_images(source, Asked(most, input_key, read_labels, channels_last, tuple(inputs)))
    in_memory = found.named is None
    how = _fitted(preprocessing, found.source, found.place, in_memory=in_memory, channels_last=channels_last)
    store, names = Store(found.source, how, threads, cache_bytes, input_key), found.source.names
    known = found.known if labels is None else given_labels(labels, names)
    truth, classes = (known, None) if isinstance(known, Truth) else (None, known)
    images = Images(store, range(len(names)), classes, truth, found.named)
    if found.window is not None:
        images = _in_window(images, found.window, found.place)
    return images.readable() if skip_unreadable else images


def _in_window(images: Images, window: slice, place: str) -> Images:
    part = images.take(range(len(images))[window])
    if len(part) == 0:
        raise DataError(
            f"Expected images, the slice leaves none of the {len(images)} in {place}. Give one that leaves "
            "some, such as [:256] or [0::2]."
        )
    return part


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
