"""One value that no other image has stretches no range, and is named."""

from __future__ import annotations

import warnings

import cases
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.given.images import load_images
from bitwright.given.spoilt import find_spoilt, measure, without_spoilt


def clean(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def spoilt(value: float, *places: int) -> Tensor:
    images = clean()
    for place in places:
        images[place, 0, 3, 3] = value
    return images


def net() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    ).eval()


@pytest.mark.parametrize("value", [100.0, -1e4, 1e30])
@pytest.mark.parametrize("recipe", ["rtn", "mse"])
def test_one_extreme_pixel_costs_nothing(recipe: str, value: float) -> None:
    model, test = net(), clean(8)
    images = spoilt(value, 5)
    with pytest.warns(UserWarning, match="calibration image 5 holds a value of"):
        found = bw.quantize(model, images, recipe, weights=8)
    expected = bw.quantize(model, torch.cat([images[:5], images[6:]]), recipe, weights=8)
    with torch.no_grad():
        assert torch.equal(found(test), expected(test))


def test_images_that_differ_in_size_alone_stay() -> None:
    images = clean()
    images[3] *= 5  # bright, but all of it
    images[4] *= 1e-3
    assert find_spoilt(measure(load_images(images, None))) == []


def test_bright_points_in_every_image_stay() -> None:
    images = clean() * 0.01
    images[:, :, 4, 4] = 10.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(without_spoilt(load_images(images, None))) == len(images)


def test_where_many_look_spoilt_all_stay_and_it_is_said() -> None:
    with pytest.warns(UserWarning, match=r"and so do 4 more. Ranges follow it"):
        assert len(without_spoilt(load_images(spoilt(1e4, 1, 2, 3, 4, 5), None))) == 32


def test_two_are_named_by_their_names() -> None:
    with pytest.warns(UserWarning, match=r"image [27] holds a value of .* and so do 1 more. It is left out"):
        assert without_spoilt(load_images(spoilt(1e4, 2, 7), None)).names == [
            str(i) for i in range(32) if i not in {2, 7}
        ]


def test_images_that_are_all_the_same_are_said() -> None:
    with pytest.warns(UserWarning, match="All 8 calibration images are the same"):
        bw.quantize(cases.model("residual"), cases.images(1).repeat(8, 1, 1, 1), "rtn")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="All .* are the same")
        bw.quantize(cases.model("residual"), cases.images(8), "rtn")
        bw.quantize(cases.model("residual"), cases.images(1), "rtn")
