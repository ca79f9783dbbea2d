"""Where an image lies in the network's input, from settings and from a function that nobody looks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.placement import ImagePlacement, placement
from bitwright.given.preprocessing import Preprocessing

SIZES = [(64, 48), (41, 97), (30, 30)]


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)


def letterbox(image: Image.Image) -> Tensor:
    scale = min(40 / image.width, 40 / image.height)
    small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    full = Image.new("RGB", (40, 40), (114, 114, 114))
    full.paste(small, (0, 0))
    return tensor(full).flip(0)  # BGR


def centred(image: Image.Image) -> Tensor:
    return (tensor(image.resize((50, 50)).crop((5, 5, 45, 45))) / 255 - 0.5) / 0.2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("pct", [0.875, 1.0])
def test_settings_and_the_same_as_a_function_agree(size: tuple[int, int], crop_mode: Any, pct: float) -> None:
    how = Preprocessing(input_size=(3, 32, 24), mean=0.4, std=0.2, crop_pct=pct, crop_mode=crop_mode)
    said, seen = placement(how, size), placement(how.__call__, size)
    assert said.input == seen.input == (24, 32)
    ends = np.array([[0.0, 0.0, *size]])
    assert seen.to_input(ends) == pytest.approx(said.to_input(ends), abs=0.3)


@pytest.mark.parametrize("size", SIZES)
def test_a_letterbox_is_seen_exactly(size: tuple[int, int]) -> None:
    scale = min(40 / size[0], 40 / size[1])
    found = placement(letterbox, size)
    assert found.to_input(np.array([[0.0, 0.0, *size]]))[0].tolist() == [0, 0, *(int(s * scale) for s in size)]


def test_a_crop_is_seen() -> None:
    found = placement(centred, (100, 25))
    assert found.scale == pytest.approx((0.5, 2.0), abs=0.02)
    assert found.shift == pytest.approx((-5.0, -5.0), abs=0.5)


def test_boxes_come_back_and_are_cut() -> None:
    place = ImagePlacement((2.0, 0.5), (3.0, -1.0), (10, 20), (32, 32))
    boxes = np.array([[1.0, 2.0, 9.0, 18.0], [-5.0, 2.0, 30.0, 18.0]])
    back = place.to_image(place.to_input(boxes))
    assert back[0] == pytest.approx(boxes[0])
    assert back[1].tolist() == [0.0, 2.0, 10.0, 18.0]


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_follows_its_image(size: tuple[int, int]) -> None:
    how = Preprocessing(input_size=(3, 20, 16), interpolation="nearest", crop_mode="border", mean=0.0)
    values = np.random.default_rng(0).integers(1, 200, (size[1], size[0]), dtype=np.uint8)
    pixels = how.pixels(np.stack([values] * 3, -1))[:, :, 0].astype(int)
    assert (placement(how, size).mask(values, 0) == pixels).all()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda image: tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), "mirrors"),
        (lambda image: tensor(image.rotate(30)), "bends"),
        (lambda image: torch.zeros(3, 8, 8), "the same for a black and for a white"),
    ],
)
def test_what_boxes_cannot_follow_is_refused(function: Callable[[Image.Image], Tensor], why: str) -> None:
    with pytest.raises(DataError, match=f"Expected preprocess to resize, crop and pad images.*{why}"):
        placement(function, (40, 30))


def test_a_function_may_put_the_channels_last() -> None:
    last = placement(lambda image: letterbox(image).permute(1, 2, 0), (64, 48))
    assert last == placement(letterbox, (64, 48))
