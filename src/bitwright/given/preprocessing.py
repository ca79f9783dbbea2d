"""Preprocessing: from a decoded image to the float32 tensor a network was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.transfer import sent

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
_ORDERS = ("rgb", "bgr")
_LAYOUTS = ("channels_first", "channels_last")
DEPTHS = (8, 10, 12, 14, 16)
"""Bits of the values of cameras and scanners."""
_YOUNGER = {"channel_order": "rgb", "layout": "channels_first", "pixel_bits": None}
"""Settings that older runs do not have, with what they stood for: left out where they say just that."""

Pixels: TypeAlias = npt.NDArray[np.uint8]


class Preprocessing(BaseModel):
    """How a decoded image becomes the tensor a network was trained on.

    The shorter side is resized to ``floor(size / crop_pct)`` (antialiased, by Pillow), the centre is cropped
    to ``(H, W)``, values are divided by 255, then ``mean`` is subtracted and ``std`` divided, channel by
    channel: the numbers of timm's evaluation transform, bit for bit.

    ``crop_mode``: ``"center"`` as above; ``"squash"`` resizes both sides without keeping the aspect ratio;
    ``"border"`` resizes the longer side and pads with the mean colour.

    Without ``input_size`` images in memory keep the size that they have.

    ``channel_order`` is that of the network's channels, and of ``mean`` and ``std``. ``layout`` is the order of the
    tensor's axes: ``"channels_last"`` gives (H, W, C).

    ``pixel_bits`` says how many bits the values of grey images have whose files hold 16: 10, 12 or 14 for those of many
    cameras and scanners, 16 without it.

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

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"
    channel_order: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["channels_first", "channels_last"] = "channels_first"
    pixel_bits: int | None = None

    @model_serializer(mode="wrap")
    def _without_younger(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = handler(self)
        return {k: v for k, v in settings.items() if _YOUNGER.get(k) != v}

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input.

        Raises:
            UsageError: nobody said it.
        """
        if self.input_size is None:
            raise UsageError("Expected to know the size of the network's images. Give input_size=.")
        return self.input_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the network takes it."""
        channels, height, width = self.size
        return (height, width, channels) if self.layout == "channels_last" else self.size

    def sized(self, size: tuple[int, int, int]) -> Preprocessing:
        """The same for images (C, H, W) of a size; C is that of ``mean`` and ``std`` where they say it.

        Example:
            >>> Preprocessing(mean="0.4,0.5,0.6").sized((1, 32, 48)).input_size
            (3, 32, 48)
        """
        channels = max(len(self.mean), len(self.std))
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return Preprocessing(**{**said, "input_size": (channels if channels > 1 else size[0], *size[1:])})

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            raise UsageError(f"Expected preprocessing as a dict of settings, found {type(settings).__name__}.")
        unknown = sorted(set(settings) - set(cls.model_fields))
        if unknown:
            raise UsageError(f"There is no preprocessing setting {unknown[0]!r}. Use {', '.join(cls.model_fields)}.")
        parsed = dict(settings)
        given = settings.get("input_size")
        size = None if given is None else parse_input_size(given)
        parsed["input_size"], channels = size, None if size is None else size[0]
        parsed["mean"] = _per_channel("mean", settings.get("mean", 0.0), channels)
        parsed["std"] = _per_channel("std", settings.get("std", 1.0), channels)
        if min(parsed["std"]) <= 0:
            raise UsageError(f"Expected numbers above 0 as std=, found {min(parsed['std']):g}.")
        _one_of("interpolation", parsed.get("interpolation", "bicubic"), tuple(_RESAMPLING))
        _one_of("crop_mode", parsed.get("crop_mode", "center"), _CROP_MODES)
        _one_of("channel_order", parsed.get("channel_order", "rgb"), _ORDERS)
        _one_of("layout", parsed.get("layout", "channels_first"), _LAYOUTS)
        parsed["pixel_bits"] = _pixel_bits(parsed.get("pixel_bits"))
        parsed["crop_pct"] = _number("crop_pct", parsed.get("crop_pct", 1.0))
        if not 0.1 <= parsed["crop_pct"] <= 10:
            raise UsageError(f"Expected crop_pct= between 0.1 and 10 (usually 0.875 to 1), found {parsed['crop_pct']}.")
        return parsed

    def __call__(self, image: Image.Image | Pixels) -> Tensor:
        """Return the network's input for one image.

        Args:
            image: a Pillow image of any mode, or uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

        Returns:
            float32 (C, H, W), or (H, W, C) with the channels last.
        """
        return self.normalize(torch.from_numpy(self.pixels(image)).unsqueeze(0))[0]

    def pixels(self, image: Image.Image | Pixels) -> Pixels:
        """Return the resized and cropped pixels before normalisation: uint8 (H, W, C)."""
        if isinstance(image, np.ndarray):
            image = from_pixels(image)
        image = _crop(_resize(to_channels(image, self.size[0], self.pixel_bits or 16), self), self)
        pixels = np.array(image, dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return float32 (B, C, H, W), or (B, H, W, C) with the channels last, from uint8 pixels (B, H, W, C).

        The same bits on every device.
        """
        # As a plain number, a GPU would multiply by the reciprocal of 255, which gives other last bits.
        numbers = sent(torch.tensor([255, *self.mean, *self.std], dtype=torch.float32), pixels.device).view(-1, 1, 1)
        full, mean, std = torch.split(numbers, [1, len(self.mean), len(self.std)])
        pixels = pixels.flip(-1) if self.channel_order == "bgr" else pixels
        values = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        values = values.div_(full).sub_(mean).div_(std)
        return values if self.layout == "channels_first" else values.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Compact:
    """Some inputs as they are kept: floats that a network reads, or the bytes of pictures, a quarter as large.

    Attributes:
        values: float32 (B, ...), or uint8 pixels (B, H, W, C).
        how: makes floats of the pixels; None where there are floats.

    Example:
        >>> how = Preprocessing(input_size=(1, 2, 2), mean=0.5, std=0.5)
        >>> kept = Compact(torch.full((3, 2, 2, 1), 255, dtype=torch.uint8), how)
        >>> kept.values.nbytes, kept.floats().nbytes, kept.rows(torch.tensor([2])).floats().flatten().tolist()
        (12, 48, [1.0, 1.0, 1.0, 1.0])
    """

    values: Tensor
    how: Preprocessing | None = None

    def floats(self) -> Tensor:
        """Return what the network reads, float32 (B, ...), where the values are."""
        return self.values if self.how is None else self.how.normalize(self.values)

    def on(self, device: torch.device) -> Compact:
        """Return the same on a device; nothing waits until it is there."""
        return replace(self, values=sent(self.values, device))

    def rows(self, chosen: Tensor) -> Compact:
        """Return some of them, by positions (B,) on the same device."""
        return replace(self, values=self.values[chosen])


PreprocessFunction: TypeAlias = Callable[[Image.Image], Tensor]
"""A user's own preprocessing: takes an upright 8-bit RGB image, returns float (C, H, W)."""


def has_channels_last(shape: Sequence[int]) -> bool:
    """Whether one image of this shape has its channels last: (H, W, C).

    Example:
        >>> has_channels_last((257, 257, 3)), has_channels_last((3, 224, 224))
        (True, False)
    """
    return len(shape) == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3)


def parse_input_size(value: Any) -> tuple[int, int, int]:
    """Return (C, H, W) from ``224``, ``"224"``, ``"224x320"``, ``(H, W)``, ``(C, H, W)``; C is 3 by default.

    Raises:
        UsageError: when the value is none of these, or the images cannot have that many channels.

    Example:
        >>> parse_input_size("224x320")
        (3, 224, 320)
    """
    expected = "224, 224x320 (height x width) or channels x height x width as input_size="
    if value is None:
        raise UsageError(f"Expected {expected}, found none.")
    parts = str(value).lower().split("x") if isinstance(value, str | int) else list(value)
    try:
        size = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        size = ()
    if len(size) not in (1, 2, 3) or min(size) < 1:
        raise UsageError(f"Expected {expected}, found {value!r}.")
    size = size * 2 if len(size) == 1 else size
    channels, height, width = size if len(size) == 3 else (3, *size)
    if channels not in (1, 3):
        raise UsageError(
            f"Expected an input of 1 or 3 channels, found {channels} in {value!r}. Images have no more: "
            "give a preprocess function, or tensors."
        )
    return channels, height, width


def _per_channel(name: str, value: Any, channels: int | None) -> tuple[float, ...]:
    if isinstance(value, str):
        value = value.split(",")
    parts = list(value) if isinstance(value, Iterable) else [value]
    numbers = tuple(_number(name, part) for part in parts)
    if channels is None and len(numbers) in (1, 3):
        return numbers
    channels = 3 if channels is None else channels
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise UsageError(f"Expected one {name}= or one for each of {channels} channels, found {len(numbers)}.")
    return numbers


def _pixel_bits(value: Any) -> int | None:
    if value is None:
        return None
    bits = _number("pixel_bits", value)
    if bits not in range(8, 17):
        raise UsageError(f"Expected a whole number from 8 to 16 as pixel_bits=, found {value!r}.")
    return int(bits)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"Expected {name}= as a number, found {value!r}.")
    return number


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"Expected one of {', '.join(known)} as {name}=, found {value!r}.")


def from_pixels(pixels: Pixels) -> Image.Image:
    """Return uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as an image.

    Raises:
        DataError: they are of another type or shape.
    """
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise DataError(
            f"Expected uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), found {pixels.dtype} {pixels.shape}."
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def to_channels(image: Image.Image, channels: int, bits: int = 16) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB or greyscale; values of more than 8 bits have ``bits``.

    Transparency is dropped and the stored colours are kept, as the loaders of timm and torchvision do.

    Raises:
        DataError: the pixels are floats, or have more bits.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        image = _to_eight_bits(image, bits)
    elif image.mode == "F":
        raise DataError("Expected 8 or 16 bit pixels, found 32-bit float. Save it as 8 bit, or give tensors.")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about the lost alpha
    return image.convert(mode)


def _to_eight_bits(image: Image.Image, bits: int) -> Image.Image:
    # Pillow's own conversion clips at 255 and so turns nearly every 16-bit image white.
    values = np.asarray(image).astype(np.int64)
    most = (1 << bits) - 1
    if values.min() < 0 or values.max() > most:
        raise DataError(
            f"Expected pixels of at most {bits} bits, found values from {values.min()} to {values.max()}. "
            f"{'Save it as 8 bit.' if bits == 16 else 'Give more as pixel_bits=.'}"
        )
    return Image.fromarray(((510 * values + most) // (2 * most)).astype(np.uint8))


def resized_size(how: Preprocessing, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that an image of a size (width, height) has before the centre is cropped."""
    height, width = (math.floor(side / how.crop_pct) for side in how.size[1:])
    if how.crop_mode == "squash":
        return width, height
    if how.crop_mode == "border":
        return _scaled(size, max(size[1] / height, size[0] / width))
    if height == width:
        short, long = sorted(size)
        other = int(height * long / short)
        return (height, other) if size[0] <= size[1] else (other, height)
    return _scaled(size, min(size[1] / height, size[0] / width))


def _resize(image: Image.Image, how: Preprocessing) -> Image.Image:
    size = resized_size(how, image.size)
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(f"The sides of {image.width}x{image.height} pixels differ too much to crop a centre.")
    return image if size == image.size else image.resize(size, _RESAMPLING[how.interpolation])


def _scaled(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _crop(image: Image.Image, how: Preprocessing) -> Image.Image:
    _, height, width = how.size
    image = _pad(image, how)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, how: Preprocessing) -> Image.Image:
    _, height, width = how.size
    if image.width >= width and image.height >= height:
        return image
    colour = tuple(round(255 * value) if how.crop_mode == "border" else 0 for value in how.mean)
    size = (max(width, image.width), max(height, image.height))
    canvas = Image.new(image.mode, size, colour if len(colour) > 1 else colour[0])
    canvas.paste(image, (max(0, width - image.width) // 2, max(0, height - image.height) // 2))
    return canvas
