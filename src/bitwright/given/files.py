"""Sources: single images read from files, arrays and tensors, decoded by threads and kept."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.placement import ImagePlacement, placement
from bitwright.given.preprocessing import Compact, Pixels, PreprocessFunction, Preprocessing, from_pixels, to_channels
from bitwright.given.several import InputPart, side_by_side
from bitwright.given.text import short

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_CUT = "cut to 8 bits"
"""In an image's ``info``: whether Pillow read the upper 8 bits of 16, as it does of colours."""


def exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether it is a file that can be read to its end: no folder, pipe or device."""
    return exists(path) and path.is_file()


class Source(Protocol):
    """Where images come from; an index counts over the whole source, before any slice."""

    names: list[str]

    def read(self, index: int) -> Image.Image | Tensor:
        """Return one upright image, or a tensor that needs no preprocessing."""

    def header(self, index: int) -> None:
        """Raise `DataError` when what is stored cannot be an image, without decoding it."""

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of what is stored."""

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of the upright image."""


class Encoded:
    """Encoded images of which each is a run of bytes of its own; where the bytes lie is told by subclasses."""

    names: list[str]

    def where(self, index: int) -> str:
        """Return where one image lies, for errors."""
        raise NotImplementedError

    def opened(self, index: int) -> BinaryIO:
        """Return the bytes of one image, from their start.

        Raises:
            DataError: they cannot be had.
        """
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Return one decoded image, upright.

        Raises:
            DataError: it cannot be decoded.
        """
        with self._image(index) as image:
            try:
                cut = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and not _is_deep(image)
                image.load()
                upright = _upright(image)
                upright.info[_CUT] = cut
                return upright
            except Exception as error:  # decoders raise a dozen kinds for a broken file
                raise self._broken(index, error) from error

    def header(self, index: int) -> None:
        """Raise `DataError` when the bytes do not begin as an image does."""
        with self._image(index):
            pass

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of the bytes.

        Raises:
            DataError: they cannot be read.
        """
        try:
            with self.opened(index) as file:
                return hashlib.sha256(file.read()).digest()
        except OSError as error:
            raise self._broken(index, error) from error

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of the upright image, from its header."""
        with self._image(index) as image:
            size, turned = image.size, _orientation(image) >= 5
        return (size[1], size[0]) if turned else size

    @contextmanager
    def _image(self, index: int) -> Iterator[Image.Image]:
        with ExitStack() as open_files:
            try:
                image = open_files.enter_context(Image.open(open_files.enter_context(self.opened(index))))
            except DataError:
                raise
            except Exception as error:
                raise self._broken(index, error) from error
            yield image

    def _broken(self, index: int, error: Exception) -> DataError:
        where = self.where(index)
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return _bomb(where)
        what = "" if isinstance(error, UnidentifiedImageError) else f" ({short(error)})"
        return DataError(
            f"Expected an image, cannot read {where}{what}. Repair or remove it, or pass skip_unreadable=True."
        )


class Files(Encoded):
    """Image files under one folder, named by their paths relative to it."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def where(self, index: int) -> str:
        """Return the file's path."""
        return str(self.root / self.names[index])

    def opened(self, index: int) -> BinaryIO:
        """Return the file; a pipe or a device, which may never end, is none.

        Raises:
            DataError: there is no such file.
        """
        path = self.root / self.names[index]
        if not path.is_file():
            raise DataError(f"Expected an image, {path} is no file. Remove it, or pass skip_unreadable=True.")
        return path.open("rb")


class _Alone(Encoded):
    """One image file, of which the bytes are here or lie at a path."""

    def __init__(self, content: bytes | None, path: str | None, where: str) -> None:
        self.content, self.path, self.names = content, path, [where]

    def where(self, index: int) -> str:
        """Return what an error calls it."""
        return self.names[index]

    def opened(self, index: int) -> BinaryIO:
        """Return the bytes."""
        if self.content is not None:
            return io.BytesIO(self.content)
        return Files(Path(), [str(self.path)]).opened(0)


def decoded(content: bytes | None, path: str | None, where: str) -> Image.Image:
    """One image, upright, out of the bytes of its file, or out of the file at a path where there are none.

    Raises:
        DataError: they cannot be decoded; it names ``where``.
    """
    return _Alone(content, path, where).read(0)


class Arrays:
    """Pixels in one uint8 array (N, H, W, C), named by position."""

    def __init__(self, pixels: Pixels) -> None:
        self.data, self.names = pixels, [str(i) for i in range(len(pixels))]

    def read(self, index: int) -> Image.Image:
        """Return one array as an image."""
        return from_pixels(self.data[index])

    def header(self, index: int) -> None:
        """Accept any array: there is no header."""

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of the array's bytes."""
        return hashlib.sha256(np.ascontiguousarray(self.data[index]).tobytes()).digest()

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height."""
        return self.data.shape[2], self.data.shape[1]


class Pictures:
    """Decoded images of any size, named by position."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.data, self.names = images, [str(i) for i in range(len(images))]

    def read(self, index: int) -> Image.Image:
        """Return one image."""
        return self.data[index]

    def header(self, index: int) -> None:
        """Accept any image: there is no header."""

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of the image's kind, size and bytes."""
        image = self.data[index]
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height."""
        return self.data[index].size


class Tensors:
    """Preprocessed images in one float32 tensor (N, C, H, W), named by position."""

    def __init__(self, data: Tensor, parts: tuple[InputPart, ...] = ()) -> None:
        self.data, self.parts, self.names = data, parts, [str(i) for i in range(len(data))]

    def read(self, index: int) -> Tensor:
        """Return one tensor."""
        return self.data[index]

    def header(self, index: int) -> None:
        """Accept any tensor: there is no header."""

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of the tensor's bytes."""
        return hashlib.sha256(self.data[index].contiguous().numpy().tobytes()).digest()

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height."""
        return self.data.shape[-1], self.data.shape[-2]


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF data beside good pixels
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def _bomb(where: str) -> DataError:
    return DataError(
        f"Expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, {where} claims more. "
        "Shrink or remove it, or pass skip_unreadable=True."
    )


class Store:
    """One source with its preprocessing and the pixels decoded so far; shared by all views of it."""

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing | PreprocessFunction | None,
        threads: int | None,
        cache_bytes: int,
        input_key: str | None = None,
    ) -> None:
        self.source, self.preprocessing, self.input_key = source, preprocessing, input_key
        self.threads = threads or min(8, os.cpu_count() or 1)
        self.parts: tuple[InputPart, ...] = source.parts if isinstance(source, Tensors) else ()
        self.room = cache_bytes
        self.cache: dict[int, Pixels | Tensor] = {}
        self.placements: dict[tuple[int, int], ImagePlacement] = {}
        self.placed: ImagePlacement | None = None
        """Where all images lie, whatever their sizes."""
        self.lock = threading.Lock()
        self.probed = False
        self.deep: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        """Copies share what is read and decoded."""
        return self

    def __copy__(self) -> Store:
        """Copies share what is read and decoded."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to read the same."""
        room = self.room + sum(value.nbytes for value in self.cache.values())
        return {k: v for k, v in self.__dict__.items() if k != "lock"} | {"cache": {}, "room": room}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begins with nothing decoded."""
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def fetch(self, index: int) -> Pixels | Tensor | Image.Image:
        """Return what a worker thread may prepare; a user's function is left to the caller's thread.

        Raises:
            DataError: the image cannot be decoded, or its pixels have no place in the network's channels.
        """
        kept = self.cache.get(index)
        if kept is not None:
            return kept
        image = self.source.read(index)
        if isinstance(image, Tensor):
            return image
        self._measure_depth(image)
        try:
            if not isinstance(self.preprocessing, Preprocessing):
                return to_channels(image, 3)
            pixels = self.preprocessing.pixels(image)
        except DataError as error:
            raise DataError(f"{self.source.names[index]}: {error}") from error
        self.keep(index, pixels)
        return pixels

    def _measure_depth(self, image: Image.Image) -> None:
        cut = bool(image.info.get(_CUT))
        if not cut and not _is_deep(image):
            return
        largest = int(np.asarray(image).max()) * (257 if cut else 1)
        with self.lock:
            kind = "colour" if cut else "grey"
            self.deep[kind] = max(self.deep.get(kind, 0), largest)

    def placement(self, index: int) -> ImagePlacement:
        """Return where one image lies in the network's input; images of one size lie alike."""
        if self.placed is not None:
            return self.placed
        size = self.source.size(index)
        if size not in self.placements:
            how = self.preprocessing
            self.placements[size] = ImagePlacement.same(size) if how is None else placement(how, size)
        return self.placements[size]

    def at_hand(self, indices: Sequence[int]) -> bool:
        """Say whether none of these has to be decoded, so that threads would cost more than they bring."""
        return isinstance(self.source, Tensors) or all(index in self.cache for index in indices)

    def keep(self, index: int, value: Pixels | Tensor) -> None:
        """Remember one image while there is room."""
        with self.lock:
            if value.nbytes <= self.room and index not in self.cache:
                self.cache[index] = value
                self.room -= value.nbytes

    def stack(self, indices: Sequence[int], fetched: list[Pixels | Tensor | Image.Image]) -> Compact:
        """Return float32 (B, C, H, W), or the pixels that become that.

        Raises:
            DataError: the user's function gives several shapes.
        """
        pixels = [item for item in fetched if isinstance(item, np.ndarray)]
        if isinstance(self.preprocessing, Preprocessing) and len(pixels) == len(fetched):
            return Compact(torch.from_numpy(np.stack(pixels)), self.preprocessing)
        tensors = [self.apply(i, item) for i, item in zip(indices, fetched, strict=True)]
        for i, tensor in zip(indices, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                first, name = self.source.names[indices[0]], self.source.names[i]
                raise DataError(
                    f"Expected preprocess to give one shape, found {tuple(tensors[0].shape)} for {first} "
                    f"and {tuple(tensor.shape)} for {name}. Resize or crop in it."
                )
        return Compact(torch.stack(tensors))

    def apply(self, index: int, item: Pixels | Tensor | Image.Image) -> Tensor:
        """Return the tensor (C, H, W) of one image, by the user's function unless it is one already.

        Raises:
            DataError: the function gives no such tensor of floats, or another one the second time.
        """
        if isinstance(item, Tensor):
            return item
        assert isinstance(item, Image.Image)
        function = self.preprocessing
        assert function is not None
        tensor = _checked_output(function(item.copy()), self.source.names[index])
        if not self.probed:
            self.probed = True
            if not torch.equal(tensor, _checked_output(function(item.copy()), self.source.names[index])):
                raise DataError(
                    f"Expected preprocess to give the same tensor twice, found two different ones for "
                    f"{self.source.names[index]}. Take random augmentation out of it."
                )
        self.keep(index, tensor)
        return tensor

    def stream(self, groups: Iterable[Sequence[int]]) -> Iterator[Compact]:
        """Yield what :meth:`stack` gives for each group, while threads decode the group after it."""
        pool = ThreadPoolExecutor(self.threads)
        waiting: deque[tuple[Sequence[int], list[Future[Pixels | Tensor | Image.Image]]]] = deque()
        try:
            for group in groups:
                waiting.append((group, [pool.submit(self.fetch, i) for i in group]))
                if len(waiting) > 1:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, waiting: deque[tuple[Sequence[int], list[Future[Pixels | Tensor | Image.Image]]]]) -> Compact:
        group, futures = waiting.popleft()
        return self.stack(group, [future.result() for future in futures])

    def failures(self, task: Callable[[int], object], indices: Sequence[int]) -> dict[int, DataError]:
        """Return the error of each index on which ``task`` fails."""

        def attempt(index: int) -> DataError | None:
            try:
                task(index)
            except DataError as error:
                return error
            return None

        with ThreadPoolExecutor(self.threads) as pool:
            found = zip(indices, pool.map(attempt, indices), strict=True)
            return {index: error for index, error in found if error is not None}


class Joined(Store):
    """Images with other inputs of a network beside each, which are computed when they are first asked for."""

    def __init__(self, images: Store, name: str, beside: Callable[[Tensor], Mapping[str, Tensor]], like: int) -> None:
        """Computes the inputs of one image, for their shapes.

        Args:
            images: the images alone.
            name: that they have as an input.
            beside: gives the other inputs [B, ...] by name, for images [B, C, H, W].
            like: index of an image.
        """
        super().__init__(images.source, images.preprocessing, images.threads, images.room)
        self.cache, self.lock = images.cache, images.lock
        self.name, self.beside = name, beside
        self.made: dict[int, dict[str, Tensor]] = {}
        self.parts = side_by_side(self._inputs([like], [self.fetch(like)]))[1]

    def stack(self, indices: Sequence[int], fetched: list[Pixels | Tensor | Image.Image]) -> Compact:
        """Return all inputs side by side, float32 (B, ...)."""
        return Compact(side_by_side(self._inputs(indices, fetched))[0])

    def _inputs(self, indices: Sequence[int], fetched: list[Pixels | Tensor | Image.Image]) -> dict[str, Tensor]:
        images = super().stack(indices, fetched).floats()
        rows = [self.made.get(i) or self._kept(i, self.beside(images[k : k + 1])) for k, i in enumerate(indices)]
        return {self.name: images, **{key: torch.cat([row[key] for row in rows]) for key in rows[0]}}

    def _kept(self, index: int, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remembers the inputs of one image while there is room."""
        size = sum(value.nbytes for value in made.values())
        with self.lock:
            if size <= self.room:
                self.made[index] = dict(made)
                self.room -= size
        return dict(made)


def _checked_output(output: Any, name: str) -> Tensor:
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
    if not isinstance(output, Tensor) or output.ndim != 3 or not output.is_floating_point():
        got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"Expected preprocess to return a float tensor (C, H, W), found {got} for {name}.")
    if not torch.isfinite(output).all():
        raise DataError(f"Expected finite values from preprocess, found NaN or infinity for {name}.")
    return output.detach().to("cpu", torch.float32).contiguous()
