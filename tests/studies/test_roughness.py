"""Roughness of functions whose figures are known by hand."""

from __future__ import annotations

import pytest
import torch

from bitwright.studies.roughness import bends, directions, jumps, noise_bends, offsets, strict_minima


def bowl(side: int) -> torch.Tensor:
    x = torch.linspace(-1, 1, side, dtype=torch.float64) ** 2
    return x.unsqueeze(0) + x.unsqueeze(1)


def test_a_bowl_has_one_minimum_and_bends_of_known_size() -> None:
    assert strict_minima(bowl(7)) == pytest.approx(1 / 25)
    assert bends(bowl(7)) == pytest.approx(4 / 6**2)  # second difference 2 h^2 with h = 2 / 6, over a range of 2
    assert jumps(bowl(7)) == pytest.approx(2 * (2 / 6) ** 2)
    line = bowl(7)[3]
    assert strict_minima(line) == pytest.approx(1 / 5)
    assert bends(line) == pytest.approx(8 / 6**2)


def test_a_plane_is_smooth_and_a_constant_too() -> None:
    plane = torch.arange(5.0).unsqueeze(0) + 2 * torch.arange(5.0).unsqueeze(1)
    for flat in (plane, torch.full((5, 5), 3.0), torch.full((5,), 3.0)):
        assert strict_minima(flat) == 0
        assert bends(flat) == 0


def test_no_grid_has_more_minima_than_every_second_point_of_every_second_row() -> None:
    i = torch.arange(7)
    pits = 1.0 - ((i % 2 == 1).unsqueeze(0) & (i % 2 == 1).unsqueeze(1)).double()
    assert strict_minima(pits) == 9 / 25
    checkerboard = ((i.unsqueeze(0) + i.unsqueeze(1)) % 2).double()
    assert strict_minima(checkerboard) == 0  # the diagonal neighbours are as low
    assert bends(checkerboard) == 2
    assert strict_minima((i % 2 == 0).double()) == 3 / 5
    assert bends((i % 2 == 0).double()) == 2


def test_noise_lies_between() -> None:
    drawn = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    assert strict_minima(drawn) == pytest.approx(1 / 9, abs=0.005)
    assert strict_minima(drawn[0]) == pytest.approx(1 / 3, abs=0.06)
    assert bends(bowl(11)) < noise_bends(11, 2) < 2
    assert noise_bends(11, 2) == noise_bends(11, 2)


def test_directions_are_orthonormal_and_follow_the_seed() -> None:
    found = directions(40, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    assert torch.equal(found, directions(40, 3))
    assert not torch.allclose(found, directions(40, 4))
    with pytest.raises(ValueError, match="found 1"):
        directions(1, 0)


def test_ends_of_a_line_change_scales_by_one_in_root_mean_square() -> None:
    along = directions(30, 0)
    line, grid = offsets(along, 4, 1), offsets(along, 2, 2)
    assert line.shape == (9, 30)
    assert grid.shape == (25, 30)
    assert float(line[0].square().mean().sqrt()) == pytest.approx(1)
    assert float(line[6].square().mean().sqrt()) == pytest.approx(0.5)
    for points in (line, grid):
        assert torch.equal(points[len(points) // 2], torch.zeros(30, dtype=torch.float64))
    torch.testing.assert_close(grid[3] - grid[2], along[1] * 0.5 * 30**0.5)  # y runs fastest
