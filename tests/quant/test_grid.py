"""What every grid answers, and quantizers that are calibrated otherwise for a while."""

from __future__ import annotations

import pytest
import torch

from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Calibration, Quantizer, as_if
from bitwright.quant.ranges import rounded_to, weight_scale

GRIDS = [Grid(bits, symmetric) for bits in (2, 5, 8, 16) for symmetric in (False, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.description)
def test_every_code_stands_for_a_value_of_its_own_and_every_value_for_its_code(grid: Grid) -> None:
    low, high = grid.levels
    every, step = torch.arange(low, high + 1).float(), torch.tensor(0.37)
    zero = 0.0 if grid.middle is None else grid.middle
    values = grid.values(every, step, zero)
    assert len(torch.unique(values)) == 2**grid.bits
    assert torch.equal(grid.codes(values, step, zero), every)
    x = torch.randn(500, generator=torch.Generator().manual_seed(grid.bits)) * 20
    found = grid.nearest(x, step, zero)
    assert torch.equal(found, grid.values(grid.codes(x, step, zero), step, zero))
    assert torch.equal((found - x).abs(), (values - x.unsqueeze(1)).abs().amin(1))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.description)
def test_a_span_reaches_from_end_to_end(grid: Grid) -> None:
    low, high = torch.tensor([-1.5, 0.0]), torch.tensor([3.0, 2.0])
    scale, zero = grid.spanning(low, high)
    ends = [grid.values(torch.tensor(float(code)), scale, zero) for code in grid.levels]
    assert bool((ends[0] <= low + scale * 0.5001).all())
    assert bool((ends[1] >= high - scale * 0.5001).all())


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.description)
def test_a_grid_comes_back_from_a_file_and_keeps_its_kind_with_other_bits(grid: Grid) -> None:
    assert Grid.read({**grid.plain(), "name": "stem"}) == grid
    assert grid.with_bits(3).with_bits(grid.bits) == grid
    assert grid.with_bits(3).has_zero_point == grid.has_zero_point
    assert grid.with_bits(3).bits == 3


def quantizer(name: str, step: float = 0.25) -> Quantizer:
    made = Quantizer(name, Grid(4), "activation")
    made.set_range(torch.tensor(step), torch.tensor(7.0))
    return made


def test_other_calibrations_hold_only_while_inside() -> None:
    coarse, off = quantizer("a"), quantizer("b")
    x = torch.linspace(-2, 2, 101)
    before = coarse(x), off(x)
    fine = coarse.spanning(-2.0, 2.0, 16)
    assert fine.grid == Grid(16)

    def look() -> None:
        with as_if({coarse: fine, off: None}):
            assert torch.equal(off(x), x)
            assert float((coarse(x) - x).abs().max()) <= 4 / (2**16 - 1) / 2 * 1.01
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        look()
    assert torch.equal(coarse(x), before[0])
    assert torch.equal(off(x), before[1])


def test_a_calibration_that_was_kept_is_not_changed_by_the_next() -> None:
    made = quantizer("a")
    kept = made.calibration
    made.set_range(torch.tensor(9.0))
    made.calibration = kept
    assert (float(made.scale), float(made.zero_point)) == (0.25, 7.0)
    assert isinstance(kept, Calibration)


@pytest.mark.parametrize("block", [(4, 6), (1, 6), (1, 4)])
def test_a_weight_has_as_many_scales_as_blocks_and_rounds_to_other_bits(block: tuple[int, int]) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]
    made = Quantizer("stem", Grid.of_weight(8), "weight", (4, 6), block)
    assert made.blocks == weight_scale(weight, made.grid, block).numel()
    three = Quantizer("stem", Grid.of_weight(3), "weight", (4, 6), block)
    three.set_range(weight_scale(weight, three.grid, block))
    assert torch.equal(rounded_to(3, weight, made), three(weight))
    assert not made.calibrated
