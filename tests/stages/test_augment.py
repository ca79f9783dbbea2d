"""Views: always the same, crops of what they are a view of, half of them mirrored."""

from __future__ import annotations

import math

import pytest
import torch
from cases import dataset
from torch import Tensor

from bitwright.given.images import load_images
from bitwright.stages.augment import FEW, MOST, Views, view_count

SIZE = 16


def ramps() -> Tensor:
    """One image whose channels are a constant, the column and the row of every pixel, [1, 3, 16, 16]."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.stack([torch.full((SIZE, SIZE), 7), columns, rows]).unsqueeze(0).float()


def views_of_ramps(count: int, **settings: object) -> Tensor:
    """Views 1 to ``count`` of that image."""
    views = Views(load_images(ramps(), None), draws=count + 1, **settings)
    return views.batch(range(1, count + 1))


def test_the_first_view_is_the_image_itself() -> None:
    data = dataset(5)
    views = Views(data, draws=3)
    assert len(views) == 15
    assert torch.equal(views.batch(range(5)), data.batch(range(5)))
    mixed = views.batch([7, 2, 14])
    assert torch.equal(mixed[1], data[2])
    assert not torch.equal(mixed[0], data[2])


def test_one_view_is_the_images() -> None:
    data = dataset(5)
    views = Views(data)
    assert len(views) == 5
    assert torch.equal(views.batch(torch.tensor([4, 0])), data.batch([4, 0]))


def test_a_view_is_the_same_whenever_and_with_whatever_it_is_asked_for() -> None:
    data = load_images(torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)), None)
    views = Views(data, draws=4, seed=3)
    every = torch.cat(list(views.batches(16)))
    assert torch.equal(torch.cat(list(views.batches(3))), every)
    assert torch.equal(torch.cat([views.batch([i]) for i in range(16)]), every)
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(99)
    assert torch.equal(Views(data, draws=4, seed=3).batch(shuffled), every[shuffled])
    other = Views(data, draws=4, seed=4).batch(range(16))
    assert torch.equal(other[:4], every[:4])
    assert sum(torch.equal(a, b) for a, b in zip(other[4:], every[4:], strict=True)) < 2
    assert len({tuple(v.flatten().tolist()) for v in every}) > 12  # a crop may be the whole image


def test_every_view_is_a_crop_of_its_image() -> None:
    """On ramps, a crop shows where it was cut: constant, level along the other axis, within it, rising or falling."""
    for view in views_of_ramps(60):
        constant, columns, rows = view
        torch.testing.assert_close(constant, torch.full((SIZE, SIZE), 7.0))
        torch.testing.assert_close(columns, columns[:1].expand_as(columns))
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
        assert float(view[1:].min()) >= -1e-4
        assert float(view[1:].max()) <= SIZE - 1 + 1e-4
        across, down = columns[0].diff(), rows[:, 0].diff()
        assert bool((across >= -1e-4).all()) or bool((across <= 1e-4).all())
        assert bool((down >= -1e-4).all())  # never upside down


def test_half_of_the_views_are_mirrored() -> None:
    """Whatever part of the image they show."""
    count = 400
    views = views_of_ramps(count)
    mirrored = (views[:, 1, 0, 0] > views[:, 1, 0, -1]).float()
    assert abs(float(mirrored.sum()) - count / 2) < 3 * math.sqrt(count / 4)
    for channel in (1, 2):
        centres = views[:, channel].mean((1, 2))
        assert abs(float(torch.corrcoef(torch.stack([mirrored, centres]))[0, 1])) < 4 / math.sqrt(count)


@pytest.mark.parametrize("smallest", [0.25, 0.5, 0.9])
def test_areas_are_spread_evenly_from_the_smallest_to_all(smallest: float) -> None:
    """The slope of a ramp in the middle of a view is the share of the image's side that it shows."""
    views = views_of_ramps(400, smallest=smallest)
    middle = slice(SIZE // 4, -SIZE // 4)
    sides = views[:, 2, middle, 0].diff(dim=1).mean(1)
    across = views[:, 1, 0, middle].diff(dim=1).mean(1).abs()
    torch.testing.assert_close(sides, across, rtol=0.02, atol=0)
    areas = sides.square()
    slack = 1.1 / SIZE  # sides are whole pixels
    assert float(areas.min()) >= smallest - slack
    assert float(areas.max()) <= 1 + slack
    assert float(areas.mean()) == pytest.approx((1 + smallest) / 2, abs=4 * (1 - smallest) / math.sqrt(12 * 400) + 0.01)


def test_crops_come_from_everywhere() -> None:
    views = views_of_ramps(400, smallest=0.25)
    centres = views[:, 1:, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1].mean((2, 3))
    assert centres.mean(0).tolist() == pytest.approx([(SIZE - 1) / 2] * 2, abs=0.3)
    assert float(centres.min()) < 5
    assert float(centres.max()) > SIZE - 1 - 5
    assert abs(float(torch.corrcoef(centres.T)[0, 1])) < 4 / math.sqrt(400)


def test_images_that_are_not_square_keep_their_shape() -> None:
    data = load_images(torch.rand(2, 3, 6, 10), None)
    assert Views(data, draws=3).batch(range(6)).shape == (6, 3, 6, 10)


def test_images_of_one_pixel_have_views() -> None:
    data = load_images(torch.rand(2, 3, 1, 1), None)
    every = Views(data, draws=2, smallest=0.01).batch(range(4))
    torch.testing.assert_close(every[:2], every[2:])


@pytest.mark.parametrize(
    ("count", "views"), [(5, MOST), (48, MOST), (64, MOST), (100, 3), (FEW - 1, 2), (FEW, 1), (500, 1)]
)
def test_few_pictures_become_enough_views_and_many_stay(count: int, views: int) -> None:
    for shape, last in [((3, 8, 8), False), ((1, 8, 8), False), ((8, 9, 3), True)]:
        pictures = load_images(torch.zeros(count, *shape), None, channels_last=last)
        assert view_count(pictures, "auto") == views
        assert view_count(pictures, 2) == 2


@pytest.mark.parametrize(
    "shape", [(6, 8, 8), (12, 8, 8), (3, 4, 8, 8), (3, 20), (7,), (1, 1, 20), (3, 20, 1), (1, 9, 3), (3, 4, 20)]
)
def test_what_is_no_picture_is_taken_once(shape: tuple[int, ...]) -> None:
    assert view_count(load_images(torch.zeros(6, *shape), None), "auto") == 1


def test_views_of_an_image_lie_together() -> None:
    views = Views(dataset(5), draws=3)
    order = views.by_image()
    assert sorted(order) == list(range(15))
    assert [i % 5 for i in order] == [i for i in range(5) for _ in range(3)]


@pytest.mark.parametrize("draws", [1, 3, 6])
def test_unseen_views_are_none_of_those_drawn(draws: int) -> None:
    data = load_images(torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)), None)
    views = Views(data, draws, seed=3)
    unseen = views.unseen()
    assert len(unseen) == 16
    found = unseen.batch(range(16))
    assert torch.equal(torch.cat([unseen.batch([i]) for i in range(16)]), found)
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    seen = torch.cat(list(Views(data, max(draws, MOST), seed=3).batches(8)))
    assert not any(torch.equal(a, b) for a in found for b in seen)
    assert torch.equal(Views(data, draws, seed=4).unseen().batch(range(16)), found)


@pytest.mark.parametrize(("count", "each"), [(FEW, 1), (FEW - 1, 2), (100, 3), (5, MOST)])
def test_unseen_views_show_their_own_image_and_are_more_of_few(count: int, each: int) -> None:
    flat = torch.arange(float(count)).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    unseen = Views(load_images(flat, None), 2, seed=1).unseen()
    assert len(unseen) == each * count
    found = unseen.batch([3, 0, len(unseen) - 1])
    assert torch.allclose(found[:, 0, 0, 0], torch.tensor([3.0, 0.0, count - 1.0]))


@pytest.mark.parametrize("shape", [(3, 40), (3, 4, 8, 8), (3, 3, 1, 8)])
def test_inputs_that_are_no_pictures_are_their_own_unseen_views(shape: tuple[int, ...]) -> None:
    data = load_images(torch.rand(shape), None)
    unseen = Views(data, seed=1).unseen()
    assert len(unseen) == 3
    assert torch.equal(unseen.batch(range(3)), data.batch(range(3)))
