"""Images in, preprocessed float32 tensors out: folders, ``.npz`` files, zoo sets, tensors and loaders."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import random
import re
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from bitwright.errors import DataError, UsageError

# fmt: off
EXTENSIONS = frozenset({
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
# fmt: on
CACHE_BYTES = 1 << 30
STREAM_BYTES = 8 << 30

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
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

Pixels: TypeAlias = npt.NDArray[np.uint8]


# --------------------------------------------------------------------------------------- preprocessing


class Preprocessing(BaseModel):
    """How a decoded image becomes the tensor a network was trained on.

    The shorter side is resized to ``floor(size / crop_pct)`` (antialiased, by Pillow), the centre is cropped
    to ``(H, W)``, values are divided by 255, then ``mean`` is subtracted and ``std`` divided, channel by
    channel: the numbers of timm's evaluation transform, bit for bit.

    ``crop_mode``: ``"center"`` as above; ``"squash"`` resizes both sides without keeping the aspect ratio;
    ``"border"`` resizes the longer side and pads with the mean colour.

    Settings may be given as on the command line: ``"224"``, ``"224x320"`` (height x width) or ``"1x28x28"``
    for ``input_size``, ``"0.485,0.456,0.406"`` or one number for ``mean`` and ``std``.

    Raises:
        UsageError: for a setting that has no meaning, in one line.

    Example:
        >>> p = Preprocessing(input_size=(3, 32, 32), mean=0.5, std=0.25)
        >>> p.mean
        (0.5, 0.5, 0.5)
        >>> p(np.full((40, 60, 3), 255, np.uint8))[0, 0, 0].item()
        2.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            raise UsageError(f"expected preprocessing as a dict of settings, got {type(settings).__name__}")
        unknown = sorted(set(settings) - set(cls.model_fields))
        if unknown:
            raise UsageError(f"unknown preprocessing setting {unknown[0]!r}: use {', '.join(cls.model_fields)}")
        parsed = dict(settings)
        parsed["input_size"] = size = parse_input_size(settings.get("input_size"))
        parsed["mean"] = _per_channel("mean", settings.get("mean", 0.0), size[0])
        parsed["std"] = _per_channel("std", settings.get("std", 1.0), size[0])
        if min(parsed["std"]) <= 0:
            raise UsageError(f"expected std above 0, got {parsed['std']}")
        _one_of("interpolation", parsed.get("interpolation", "bicubic"), tuple(_RESAMPLING))
        _one_of("crop_mode", parsed.get("crop_mode", "center"), _CROP_MODES)
        parsed["crop_pct"] = _number("crop_pct", parsed.get("crop_pct", 1.0))
        if not 0.1 <= parsed["crop_pct"] <= 10:
            raise UsageError(f"expected crop_pct between 0.1 and 10 (usually 0.875 to 1), got {parsed['crop_pct']}")
        return parsed

    def __call__(self, image: Image.Image | Pixels) -> Tensor:
        """Return the network's input for one image.

        Args:
            image: a Pillow image of any mode, or uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

        Returns:
            float32 (C, H, W).
        """
        return self.normalize(torch.from_numpy(self.pixels(image)).unsqueeze(0))[0]

    def pixels(self, image: Image.Image | Pixels) -> Pixels:
        """Return the resized and cropped pixels before normalisation: uint8 (H, W, C)."""
        if isinstance(image, np.ndarray):
            image = _from_pixels(image)
        image = _crop(_resize(_to_channels(image, self.input_size[0]), self), self)
        pixels = np.array(image, dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return float32 (B, C, H, W) from uint8 pixels (B, H, W, C)."""
        mean = torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1)
        values = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        return values.div_(255).sub_(mean).div_(std)


PreprocessFunction: TypeAlias = Callable[[Image.Image], Tensor]
"""A user's own preprocessing: takes an upright 8-bit RGB image, returns float (C, H, W)."""


def parse_input_size(value: Any) -> tuple[int, int, int]:
    """Return (C, H, W) from ``224``, ``"224"``, ``"224x320"``, ``(H, W)``, ``(C, H, W)``; C is 3 by default.

    Raises:
        UsageError: when the value is none of these, or the images cannot have that many channels.

    Example:
        >>> parse_input_size("224x320")
        (3, 224, 320)
    """
    expected = "input_size as 224, 224x320 (height x width) or channels x height x width"
    if value is None:
        raise UsageError(f"expected {expected}, got none: give --input-size")
    parts = str(value).lower().split("x") if isinstance(value, str | int) else list(value)
    try:
        size = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        size = ()
    if len(size) not in (1, 2, 3) or min(size) < 1:
        raise UsageError(f"expected {expected}, got {value!r}")
    size = size * 2 if len(size) == 1 else size
    channels, height, width = size if len(size) == 3 else (3, *size)
    if channels not in (1, 3):
        raise UsageError(
            f"expected an input of 1 or 3 channels, got {channels} in {value!r}: images have no more, "
            "give a preprocess function or tensors"
        )
    return channels, height, width


def _per_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    if isinstance(value, str):
        value = value.split(",")
    parts = list(value) if isinstance(value, Iterable) else [value]
    numbers = tuple(_number(name, part) for part in parts)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise UsageError(f"expected one {name} or one for each of {channels} channels, got {len(numbers)}")
    return numbers


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"expected {name} as a number, got {value!r}")
    return number


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}: use {', '.join(known)}")


def _from_pixels(pixels: Pixels) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise DataError(
            f"expected uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {pixels.dtype} {pixels.shape}"
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB or greyscale.

    Transparency is dropped and the stored colours are kept, as the loaders of timm and torchvision do.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        image = _sixteen_to_eight(image)
    elif image.mode == "F":
        raise DataError("expected 8 or 16 bit pixels, got 32-bit float: save it as 8 bit, or give tensors")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about the lost alpha
    return image.convert(mode)


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255 and so turns nearly every 16-bit image white.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"expected pixels of at most 16 bits, got values from {values.min()} to {values.max()}: save it as 8 bit"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _resize(image: Image.Image, how: Preprocessing) -> Image.Image:
    height, width = (math.floor(side / how.crop_pct) for side in how.input_size[1:])
    if how.crop_mode == "squash":
        size = (width, height)
    elif how.crop_mode == "border":
        size = _scaled(image, max(image.height / height, image.width / width))
    elif height == width:
        short, long = sorted(image.size)
        other = int(height * long / short)
        size = (height, other) if image.width <= image.height else (other, height)
    else:
        size = _scaled(image, min(image.height / height, image.width / width))
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(f"the aspect ratio of {image.width}x{image.height} pixels is too extreme to crop a centre")
    return image if size == image.size else image.resize(size, _RESAMPLING[how.interpolation])


def _scaled(image: Image.Image, ratio: float) -> tuple[int, int]:
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _crop(image: Image.Image, how: Preprocessing) -> Image.Image:
    _, height, width = how.input_size
    image = _pad(image, how)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, how: Preprocessing) -> Image.Image:
    _, height, width = how.input_size
    if image.width >= width and image.height >= height:
        return image
    colour = tuple(round(255 * value) if how.crop_mode == "border" else 0 for value in how.mean)
    size = (max(width, image.width), max(height, image.height))
    canvas = Image.new(image.mode, size, colour if len(colour) > 1 else colour[0])
    canvas.paste(image, (max(0, width - image.width) // 2, max(0, height - image.height) // 2))
    return canvas


# --------------------------------------------------------------------------------------------- sources


class _Source(Protocol):
    """Where images come from; an index counts over the whole source, before any slice."""

    names: list[str]

    def read(self, index: int) -> Image.Image | Tensor: ...

    def header(self, index: int) -> None: ...

    def digest(self, index: int) -> bytes: ...


class _Files:
    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def read(self, index: int) -> Image.Image:
        path = self.path(index)
        try:
            with Image.open(path) as image:
                image.load()
                return _upright(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _bomb(path) from error
        except Exception as error:  # decoders raise a dozen kinds for a broken file
            raise _unreadable(path, error) from error

    def header(self, index: int) -> None:
        path = self.path(index)
        try:
            with Image.open(path):
                pass
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _bomb(path) from error
        except Exception as error:
            raise _unreadable(path, error) from error

    def digest(self, index: int) -> bytes:
        try:
            return hashlib.sha256(self.path(index).read_bytes()).digest()
        except OSError as error:
            raise _unreadable(self.path(index), error) from error


class _Pixels:
    def __init__(self, pixels: Pixels) -> None:
        self.data, self.names = pixels, [str(i) for i in range(len(pixels))]

    def read(self, index: int) -> Image.Image:
        return _from_pixels(self.data[index])

    def header(self, index: int) -> None:
        pass

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.data[index]).tobytes()).digest()


class _Tensors:
    def __init__(self, data: Tensor) -> None:
        self.data, self.names = data, [str(i) for i in range(len(data))]

    def read(self, index: int) -> Tensor:
        return self.data[index]

    def header(self, index: int) -> None:
        pass

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(self.data[index].contiguous().numpy().tobytes()).digest()


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF data beside good pixels
        turn = None
    return image.copy() if turn is None else image.transpose(turn)


def _unreadable(path: Path, error: Exception) -> DataError:
    what = "" if isinstance(error, UnidentifiedImageError) else f" ({_one_line(error)})"
    return DataError(f"expected an image, cannot read {path}{what}: repair or remove it, or pass --skip-unreadable")


def _bomb(path: Path) -> DataError:
    return DataError(
        f"expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, {path} claims more: "
        "shrink or remove it, or pass --skip-unreadable"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Store:
    """One source with its preprocessing and the pixels decoded so far; shared by all views of it."""

    def __init__(
        self,
        source: _Source,
        preprocessing: Preprocessing | PreprocessFunction | None,
        threads: int | None,
        cache_bytes: int,
    ) -> None:
        self.source, self.preprocessing = source, preprocessing
        self.threads = threads or min(8, os.cpu_count() or 1)
        self.room = cache_bytes
        self.cache: dict[int, Pixels | Tensor] = {}
        self.lock = threading.Lock()
        self.probed = False

    def fetch(self, index: int) -> Pixels | Tensor | Image.Image:
        """Return what a worker thread may prepare; a user's function is left to the caller's thread."""
        kept = self.cache.get(index)
        if kept is not None:
            return kept
        image = self.source.read(index)
        if isinstance(image, Tensor):
            return image
        try:
            if not isinstance(self.preprocessing, Preprocessing):
                return _to_channels(image, 3)
            pixels = self.preprocessing.pixels(image)
        except DataError as error:
            raise DataError(f"{self.source.names[index]}: {error}") from error
        self.keep(index, pixels)
        return pixels

    def at_hand(self, indices: Sequence[int]) -> bool:
        """Say whether none of these has to be decoded, so that threads would cost more than they bring."""
        return isinstance(self.source, _Tensors) or all(index in self.cache for index in indices)

    def keep(self, index: int, value: Pixels | Tensor) -> None:
        with self.lock:
            if value.nbytes <= self.room and index not in self.cache:
                self.cache[index] = value
                self.room -= value.nbytes

    def stack(self, indices: Sequence[int], fetched: list[Pixels | Tensor | Image.Image]) -> Tensor:
        """Return float32 (B, C, H, W)."""
        pixels = [item for item in fetched if isinstance(item, np.ndarray)]
        if isinstance(self.preprocessing, Preprocessing) and len(pixels) == len(fetched):
            return self.preprocessing.normalize(torch.from_numpy(np.stack(pixels)))
        tensors = [self.apply(i, item) for i, item in zip(indices, fetched, strict=True)]
        for i, tensor in zip(indices, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                first, name = self.source.names[indices[0]], self.source.names[i]
                raise DataError(
                    f"expected preprocess to give one shape, got {tuple(tensors[0].shape)} for {first} "
                    f"and {tuple(tensor.shape)} for {name}: resize or crop in it"
                )
        return torch.stack(tensors)

    def apply(self, index: int, item: Pixels | Tensor | Image.Image) -> Tensor:
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
                    f"expected preprocess to give the same tensor twice, got two different ones for "
                    f"{self.source.names[index]}: take random augmentation out of it"
                )
        self.keep(index, tensor)
        return tensor

    def stream(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yield one (B, C, H, W) for each group, while threads decode the group after it."""
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

    def _next(self, waiting: deque[tuple[Sequence[int], list[Future[Pixels | Tensor | Image.Image]]]]) -> Tensor:
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


def _checked_output(output: Any, name: str) -> Tensor:
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
    if not isinstance(output, Tensor) or output.ndim != 3 or not output.is_floating_point():
        got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"expected preprocess to return a float tensor (C, H, W), got {got} for {name}")
    if not torch.isfinite(output).all():
        raise DataError(f"expected finite values from preprocess, got NaN or infinity for {name}")
    return output.detach().to("cpu", torch.float32).contiguous()


# ---------------------------------------------------------------------------------------------- images


class Images:
    """A fixed sequence of preprocessed images, decoded when first asked for.

    Invariants: ``len(names) == len(self)``; ``labels`` is None or int64 of that length; the same index gives
    the same bits every time, whatever the number of threads. A slice is a view that shares decoded pixels.

    Attributes:
        names: path relative to the folder (with ``/``), or the position in the array.
        labels: int64 (N,) class indices, or None.
        preprocessing: what is applied to the pixels; None when the images were given as tensors.

    Example:
        >>> images = load_images(torch.zeros(10, 3, 8, 8), None)
        >>> len(images), len(images[::2]), [tuple(b.shape) for b in images.batches(4)][-1]
        (10, 5, (2, 3, 8, 8))
    """

    def __init__(self, store: _Store, indices: Sequence[int], labels: Tensor | None) -> None:
        self._store, self._indices = store, list(indices)
        self.labels = labels
        self.names = [store.source.names[i] for i in self._indices]

    @property
    def preprocessing(self) -> Preprocessing | PreprocessFunction | None:
        """What is applied to the pixels of each image."""
        return self._store.preprocessing

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...

    def __getitem__(self, index: int | slice) -> Tensor | Images:
        if isinstance(index, slice):
            return self._take(range(len(self))[index])
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
            raise UsageError(f"expected a batch size of at least 1, got {size}")
        starts = range(0, len(self), size)
        return self._store.stream(self._indices[start : start + size] for start in starts)

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return float32 (B, C, H, W) for positions in this sequence, in the order given.

        Raises:
            IndexError: for a position outside the sequence.
            UsageError: when there is none.
        """
        if len(indices) == 0:
            raise UsageError("expected at least one image in a batch, got none")
        wanted = [self._indices[int(i)] for i in indices]
        if len(wanted) == 1 or self._store.at_hand(wanted):
            return self._store.stack(wanted, [self._store.fetch(i) for i in wanted])
        return next(self._store.stream([wanted]))

    def unlabelled(self) -> Images:
        """Return the same images without labels: what calibration gets."""
        return Images(self._store, self._indices, None)

    def labelled(self, labels: str | Path | Sequence[int] | Tensor) -> Images:
        """Return the same images with these labels; see `load_images` for their forms."""
        return Images(self._store, self._indices, _explicit_labels(labels, self.names))

    def sample(self, n: int, seed: int = 0) -> Images:
        """Return ``n`` images, one out of each of ``n`` equal stretches of the list, in order.

        The seed picks the image within its stretch. With ``n`` above the length all are returned, with a
        warning.

        Raises:
            UsageError: when ``n`` is below 1.
        """
        if n < 1:
            raise UsageError(f"expected at least 1 sample, got {n}")
        total = len(self)
        if n > total:
            warnings.warn(f"{n} images were asked for, all {total} are used", UserWarning, stacklevel=2)
            return self
        pick = random.Random(seed)
        return self._take([pick.randrange(i * total // n, (i + 1) * total // n) for i in range(n)])

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
        warnings.warn(f"skipped {len(failures)} unreadable images: {message}", UserWarning, stacklevel=2)
        return self._take([k for k, i in enumerate(self._indices) if i not in failures])

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the names, the file or array bytes, and the preprocessing; labels do not enter."""
        digest = hashlib.sha256(_identity(self.preprocessing).encode())
        with ThreadPoolExecutor(self._store.threads) as pool:
            for name, content in zip(self.names, pool.map(self._store.source.digest, self._indices), strict=True):
                digest.update(hashlib.sha256(name.encode()).digest() + content)
        return digest.hexdigest()

    def _take(self, positions: Sequence[int]) -> Images:
        labels = None if self.labels is None else self.labels[list(positions)]
        return Images(self._store, [self._indices[p] for p in positions], labels)

    def __repr__(self) -> str:
        return f"Images({len(self)}, {'unlabelled' if self.labels is None else 'labelled'})"


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
    threads: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Images:
    """Return the images that ``source`` names.

    Args:
        source: a folder (recursive, sorted by path), one image file, ``zoo:NAME``, or an ``.npz`` file with
            ``images`` (uint8 (N, H, W, 1 or 3), or float (N, C, H, W) taken as preprocessed) and perhaps
            ``labels``; each with an optional slice as in ``photos[0::2]``. Or such an array, a float tensor
            (N, C, H, W), or any iterable of tensors or (tensor, label) pairs such as a ``DataLoader``, which
            is read once. `Images` are returned as they are.
        preprocessing: applied to everything that is not a float tensor already.
        labels: a CSV ``file,class_index`` (header or not; matched by relative path, then by file name), or
            one class index for each image. Without it a folder in which every image lies directly in one of
            two or more sub-folders is labelled by their sorted names, an ``.npz`` by its own ``labels``.
        skip_unreadable: decode everything now, leave out what fails and warn with the count.
        threads: that decode; by default one a core, at most 8. The result does not depend on it.
        cache_bytes: for decoded and resized pixels, so that a second epoch does not decode again.

    Raises:
        DataError: when there is no image, the labels do not match, or preprocessing is needed and not given.
    """
    if isinstance(source, Images):
        return source.labelled(labels) if labels is not None else source
    window = None
    if isinstance(source, str | os.PathLike):
        place, window = _split_slice(os.fspath(source))
        found, found_labels = _from_place(str(place))
    else:
        place = f"the {type(source).__name__} given"
        found, found_labels = _from_object(source)
    _check_preprocessing(found, preprocessing, str(place))
    store = _Store(found, None if isinstance(found, _Tensors) else preprocessing, threads, cache_bytes)
    if labels is not None:
        found_labels = _explicit_labels(labels, found.names)
    images = Images(store, range(len(found.names)), found_labels)
    if window is not None:
        images = images[window]
        if len(images) == 0:
            raise DataError(f"expected images, the slice leaves none of the {len(found.names)} in {place}")
    return images.readable() if skip_unreadable else images


def _split_slice(text: str) -> tuple[str, slice | None]:
    """Split off a trailing Python slice.

    Example:
        >>> _split_slice("photos[0::2]")
        ('photos', slice(0, None, 2))
    """
    match = re.fullmatch(r"(.+)\[([^\[\]]*)\]", text)
    if match is None or Path(text).exists():
        return text, None
    parts = [part.strip() for part in match[2].split(":")]
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[+-]?\d+|", part) for part in parts):
        raise DataError(f"expected a slice such as [0::2] or [:256] at the end of {text!r}, got [{match[2]}]")
    window = slice(*(int(part) if part else None for part in parts))
    if window.step == 0:
        raise DataError(f"expected a slice step other than 0 in {text!r}")
    return match[1], window


def _from_place(text: str) -> tuple[_Source, Tensor | None]:
    if text.startswith("zoo:"):
        from bitwright import zoo

        pixels, labels = zoo.images(text.removeprefix("zoo:"))
        return _from_array(np.asarray(pixels), text), _as_labels(labels, len(pixels), text)
    path = Path(text).expanduser()
    if not path.exists():
        raise DataError(
            f"expected a folder of images, an .npz file or zoo:NAME, {text!r} does not exist: check the path"
        )
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    if path.suffix.lower() in EXTENSIONS:
        return _Files(path.parent, [path.name]), None
    raise DataError(
        f"expected a folder of images, an .npz file or zoo:NAME, got the file {text}: "
        f"give the folder, image files end in {', '.join(sorted(EXTENSIONS))}"
    )


def _from_folder(root: Path) -> tuple[_Source, Tensor | None]:
    names = sorted(_image_names(root))
    if not names:
        raise DataError(f"expected images in {root}, found none: looked for {', '.join(sorted(EXTENSIONS))}")
    return _Files(root, names), _folder_labels(root, names)


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
            f"{len(empty)} class folders of {root} hold no image (first: {empty[0]}) but count as classes",
            UserWarning,
            stacklevel=2,
        )
    index = {name: k for k, name in enumerate(classes)}
    return torch.tensor([index[name.split("/")[0]] for name in names], dtype=torch.int64)


def _from_npz(path: Path) -> tuple[_Source, Tensor | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise DataError(f"expected an array 'images' in {path}, found {', '.join(file) or 'nothing'}")
            images = file["images"]
            labels = file.get("labels")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"expected arrays of numbers in {path}, cannot read it ({_one_line(error)}): "
            "write it with numpy.savez(path, images=..., labels=...)"
        ) from error
    return _from_array(images, str(path)), _as_labels(labels, len(images), str(path))


def _from_array(array: npt.NDArray[Any], where: str) -> _Source:
    shape = tuple(array.shape)
    if array.dtype == np.uint8 and array.ndim == 4 and shape[3] in (1, 3):
        source: _Source = _Pixels(array)
    elif np.issubdtype(array.dtype, np.floating) and array.ndim == 4:
        source = _from_tensor(torch.from_numpy(np.asarray(array, dtype=np.float32)), where)
    else:
        raise DataError(
            f"expected uint8 (N, H, W, 3 or 1) or float (N, C, H, W) images in {where}, got {array.dtype} {shape}"
        )
    if not source.names:
        raise DataError(f"expected images in {where}, got {shape}")
    return source


def _from_tensor(tensor: Tensor, where: str) -> _Source:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point() or tensor.ndim != 4:
        raise DataError(f"expected preprocessed float images (N, C, H, W) in {where}, got {tensor.dtype} {shape}")
    if 0 in shape:
        raise DataError(f"expected images in {where}, got the empty shape {shape}")
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise DataError(
            f"expected float images (N, C, H, W) in {where}, got {shape}, which looks like (N, H, W, C): "
            "permute it, channels come second"
        )
    tensor = tensor.detach().to("cpu", torch.float32)
    finite = torch.isfinite(tensor).flatten(1).all(1)
    if not finite.all():
        raise DataError(
            f"expected finite values in {where}, image {int((~finite).nonzero()[0])} has NaN or infinity: "
            "preprocess it again"
        )
    return _Tensors(tensor)


def _from_object(source: object) -> tuple[_Source, Tensor | None]:
    where = f"the {type(source).__name__} given"
    if isinstance(source, Tensor):
        return _from_tensor(source, where), None
    if isinstance(source, np.ndarray):
        return _from_array(source, where), None
    if isinstance(source, Mapping) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise DataError(f"expected a path, a tensor or an iterable of tensors as images, got {where}")
    return _from_batches(source, where)


def _from_batches(batches: Any, where: str) -> tuple[_Source, Tensor | None]:
    tensors: list[Tensor] = []
    labels: list[Any] = []
    held = 0
    for item in batches:
        tensor, label = (item[0], item[1]) if isinstance(item, tuple | list) and len(item) > 1 else (item, None)
        tensor = tensor[0] if isinstance(tensor, tuple | list) and len(tensor) == 1 else tensor
        tensors.append(_one_batch(tensor, where, tensors))
        labels.append(label)
        held += tensors[-1].nbytes
        if held > STREAM_BYTES:
            raise DataError(
                f"expected at most {STREAM_BYTES >> 30} GiB of images from {where}, got more: take fewer "
                "(itertools.islice), or give a folder, which is read as needed"
            )
    if not tensors:
        raise DataError(f"expected tensors from {where}, it gave none: an iterator can be read only once")
    return _from_tensor(torch.cat(tensors), where), _batch_labels(labels, tensors)


def _one_batch(tensor: Any, where: str, before: list[Tensor]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise DataError(
            f"expected tensors (B, C, H, W) or (tensor, label) pairs from {where}, got {type(tensor).__name__}"
        )
    batch = tensor.detach().cpu()
    batch = batch.unsqueeze(0) if batch.ndim == 3 else batch
    if batch.ndim != 4 or not batch.is_floating_point():
        raise DataError(f"expected float tensors (B, C, H, W) from {where}, got {tensor.dtype} {tuple(tensor.shape)}")
    if before and batch.shape[1:] != before[0].shape[1:]:
        raise DataError(
            f"expected images of one shape from {where}, got {tuple(before[0].shape[1:])}, "
            f"then {tuple(batch.shape[1:])}: resize or crop them"
        )
    return batch.to(torch.float32)


def _batch_labels(labels: list[Any], tensors: list[Tensor]) -> Tensor | None:
    """Join labels that are class indices, one an image; anything else (masks, boxes) is left out."""
    joined: list[Tensor] = []
    for label, batch in zip(labels, tensors, strict=True):
        whole = isinstance(label, int) or (isinstance(label, Tensor) and not label.is_floating_point())
        flat = torch.as_tensor(label).cpu().reshape(-1) if whole else torch.empty(0)
        if not whole or len(flat) != len(batch):
            return None
        joined.append(flat.to(torch.int64))
    return torch.cat(joined)


def _check_preprocessing(source: _Source, preprocessing: Preprocessing | PreprocessFunction | None, where: str) -> None:
    if not isinstance(source, _Tensors):
        if preprocessing is None:
            raise DataError(
                f"expected a preprocessing for the images in {where}, the model brings none: "
                "give --input-size, --mean and --std, or a preprocess function beside the callable"
            )
        return
    shape = tuple(source.data.shape[1:])
    if isinstance(preprocessing, Preprocessing) and shape != preprocessing.input_size:
        raise DataError(
            f"expected images of {preprocessing.input_size} (C, H, W) for this model, {where} holds {shape}: "
            "give --input-size if the model takes that"
        )


# ---------------------------------------------------------------------------------------------- labels


def _as_labels(labels: Any, count: int, where: str) -> Tensor | None:
    if labels is None:
        return None
    array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or len(array) != count or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"expected one whole class index for each of {count} images in {where}, "
            f"got labels of {array.dtype} {tuple(array.shape)}"
        )
    if array.min() < 0:
        raise DataError(f"expected class indices from 0 in {where}, got {array.min()}")
    return torch.from_numpy(array.astype(np.int64))


def _explicit_labels(labels: str | Path | Sequence[int] | Tensor, names: list[str]) -> Tensor | None:
    if isinstance(labels, str | os.PathLike):
        return _match_labels(_read_labels(Path(labels)), names, Path(labels))
    return _as_labels(labels, len(names), "the labels given")


def _read_labels(path: Path) -> dict[str, int]:
    try:
        with path.expanduser().open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"expected labels as a CSV file with lines file,class_index, cannot read {path} "
            f"({_one_line(error)}): give the path of such a file"
        ) from error
    table: dict[str, int] = {}
    for position, (number, row) in enumerate(rows):
        name, index = _label_row(row, f"line {number} of {path}", header=position == 0)
        if index is None:
            continue
        if table.setdefault(name, index) != index:
            raise DataError(
                f"expected one class for {name} in {path}, got {table[name]} and {index} (line {number}): "
                "remove one of the lines"
            )
    if not table:
        raise DataError(f"expected lines file,class_index in {path}, found none")
    return table


def _label_row(row: list[str], where: str, *, header: bool) -> tuple[str, int | None]:
    if len(row) != 2:
        raise DataError(f"expected file,class_index in {where}, got {len(row)} columns: {','.join(row)[:80]!r}")
    name = row[0].strip().replace("\\", "/").removeprefix("./")
    text = row[1].strip()
    if re.fullmatch(r"\d+", text):
        return name, int(text)
    if header and not re.fullmatch(r"[+-]?[\d.]+", text):
        return name, None
    raise DataError(f"expected a class index (0, 1, ...) in {where}, got {text!r}")


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
            f"expected a label for every image in {path}, {len(missing)} of {len(names)} have none "
            f"(first: {', '.join(missing[:3])}; of {len(table)} lines one is {next(iter(table))}): "
            "add them or slice the images"
        )
    keys = [key for key in matched.values() if key is not None]
    used = set(keys)
    idle = [key for key in table if key not in used]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(table)} labels in {path} have no image (first: {idle[0]})",
            UserWarning,
            stacklevel=2,
        )
    return torch.tensor([table[key] for key in keys], dtype=torch.int64)


def _by_file_name(name: str, by_file: dict[str, list[str]], shared: set[str], path: Path) -> str | None:
    keys = by_file.get(_file_name(name), [])
    if len(keys) > 1 or (keys and _file_name(name) in shared):
        raise DataError(
            f"expected one label for {name} in {path}, the file name {_file_name(name)} stands for several "
            "images or lines: write the path relative to the image folder"
        )
    return keys[0] if keys else None


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
