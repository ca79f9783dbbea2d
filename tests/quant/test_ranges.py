"""Ranges against brute force on the raw values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.ranges import activation_range, spread_ratio, weight_scale
from bitwright.quant.statistics import Statistics


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_error(row: Tensor, step: Tensor, grid: Grid, importance: Tensor | None = None, power: float = 2.0) -> float:
    error = (affine.fake_quantize(row, step, torch.zeros(()), grid.qmin, grid.qmax) - row).double().abs() ** power
    return float((error if importance is None else error * importance).sum())


def brute_weight_error(row: Tensor, grid: Grid, importance: Tensor | None = None, power: float = 2.0) -> float:
    """Least error of 1000 steps up to one that leaves half the grid unused."""
    largest = float(row.abs().max()) / (2 ** (grid.bits - 1) - 1)
    steps = largest * torch.arange(1, 1001).unsqueeze(1) / 800
    error = ((row / steps).round().clamp(grid.qmin, grid.qmax) * steps - row).abs() ** power
    return float((error if importance is None else error * importance).sum(1).min())


ROWS = {
    "gaussian": torch.randn(1, 2304, generator=generator(0)),
    "heavy": torch.randn(1, 2304, generator=generator(1)) ** 3,
    "uniform": torch.rand(1, 2304, generator=generator(2)) - 0.5,
    "shifted": torch.rand(1, 2304, generator=generator(3)) + 0.2,
    "one_sign": 1 - torch.rand(1, 2304, generator=generator(3)) / 8,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ROWS)
def test_mse_steps_are_as_good_as_a_dense_search(name: str, bits: int) -> None:
    rows, grid = ROWS[name], Grid(bits, symmetric=True)
    steps = weight_scale(rows, grid, (1, rows.shape[1]))
    simple = weight_scale(rows, grid, (1, rows.shape[1]), "minmax")
    for row, step, plain in zip(rows, steps, simple, strict=True):
        found = weight_error(row, step, grid)
        assert found <= weight_error(row, plain, grid) * (1 + 1e-6)
        slack = 1.02 if bits < 8 else 1.05  # the finer the grid, the bumpier the error
        assert found <= brute_weight_error(row, grid) * slack


def test_mse_of_nine_weights_is_no_worse_than_minmax() -> None:
    """Depthwise kernels: a bumpy error, where no search from coarse to fine is sure of the best."""
    rows = torch.randn(100, 9, generator=generator(4))
    for bits in range(2, 9):
        grid = Grid(bits, symmetric=True)
        steps, plain = weight_scale(rows, grid, (1, 9)), weight_scale(rows, grid, (1, rows.shape[1]), "minmax")
        found = [weight_error(r, s, grid) for r, s in zip(rows, steps, strict=True)]
        simple = [weight_error(r, s, grid) for r, s in zip(rows, plain, strict=True)]
        assert all(a <= b * (1 + 1e-6) for a, b in zip(found, simple, strict=True))


def test_rows_do_not_depend_on_each_other() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator(5)) * torch.logspace(-3, 3, 6).view(6, 1, 1, 1)
    together = weight_scale(weight, Grid(4, True), (1, 4, 3, 3))
    alone = [weight_scale(weight[i : i + 1], Grid(4, True), (1, 4, 3, 3)) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)


def test_importance_moves_the_step_to_what_matters() -> None:
    row, grid = torch.randn(1, 200, generator=generator(6)), Grid(3, symmetric=True)
    importance = torch.where(row.abs() < 1.0, 50.0, 0.01)
    step = weight_scale(row, grid, (1, 200), importance=importance)
    found = weight_error(row[0], step[0], grid, importance[0])
    assert found <= brute_weight_error(row[0], grid, importance[0]) * 1.02
    unweighted = weight_scale(row, grid, (1, 200))
    assert found < 0.8 * weight_error(row[0], unweighted[0], grid, importance[0])


def test_the_power_of_the_error() -> None:
    row, grid = ROWS["heavy"][:1], Grid(4, symmetric=True)
    for power in (1.0, 2.4, 4.0):
        step = weight_scale(row, grid, (1, 2304), power=power)[0]
        assert weight_error(row[0], step, grid, power=power) <= brute_weight_error(row[0], grid, power=power) * 1.02


def test_minmax_spans_the_largest_magnitude() -> None:
    weight = torch.randn(3, 10, generator=generator(7))
    steps = weight_scale(weight, Grid(8, True), (1, 10), "minmax")
    assert steps.tolist() == pytest.approx([max(abs(v) for v in row) / 127.5 for row in weight.tolist()])


def test_percentile_of_magnitudes() -> None:
    weight = torch.arange(1.0, 102.0).repeat(2, 1) * torch.tensor([[1.0], [-2.0]])
    steps = weight_scale(weight, Grid(4, True), (1, 101), "percentile", percentile=0.9)
    assert steps.tolist() == pytest.approx([91 / 7.5, 182 / 7.5])


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_degenerate_weights_have_finite_positive_steps(method: str) -> None:
    weight = torch.randn(6, 16, generator=generator(8))
    weight[0] = 0
    weight[1] = 0.7
    weight[2] = 0
    weight[2, 3] = -1e6
    weight[3, 0] = 1e4
    weight[4] *= 1e-30
    steps = weight_scale(weight, Grid(4, True), (1, 16), method)
    assert bool((torch.isfinite(steps) & (steps > 0)).all())
    constant = affine.fake_quantize(weight[1], steps[1], torch.zeros(()), -8, 7)
    assert float((constant - 0.7).abs().max()) < 0.7 / 8
    if method == "mse":
        largest = affine.fake_quantize(weight[2], steps[2], torch.zeros(()), -8, 7)[3]
        assert abs(float(largest) + 1e6) < 1e6 / 50


def interval_errors(x: Tensor, lows: Tensor, highs: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Mean squared error of each interval, [K], straight from the definition."""
    if symmetric:
        step, zero, qmin = torch.maximum(-lows, highs) / (2**bits - 1) * 2, torch.zeros_like(lows), -(2 ** (bits - 1))
    else:
        step, qmin = (highs - lows) / (2**bits - 1), 0
        zero = torch.round(-lows / step)
    step, zero = step.unsqueeze(1), zero.unsqueeze(1)
    codes = (torch.round(x / step) + zero).clamp(qmin, qmin + 2**bits - 1)
    return ((codes - zero) * step - x).square().mean(1)


def interval_error(x: Tensor, low: float, high: float, grid: Grid) -> float:
    return float(interval_errors(x, torch.tensor([low]), torch.tensor([high]), grid.bits, grid.symmetric))


def brute_interval_error(x: Tensor, grid: Grid) -> float:
    """Least error over all intervals of a grid of ends, then of a finer one around the best."""
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    count = 400 if grid.symmetric or 0.0 in {bottom, top} else 40
    lows = highs = torch.arange(1, count + 1) / count
    error = math.inf
    for _ in range(2):
        paired = (lows, highs) if count == 400 else torch.meshgrid(lows, highs, indexing="ij")
        low, high = (bottom * paired[0].reshape(-1), top * paired[1].reshape(-1))
        errors = torch.cat(
            [
                interval_errors(x, a, b, grid.bits, grid.symmetric)
                for a, b in zip(low.split(200), high.split(200), strict=True)
            ]
        )
        best = int(errors.argmin())
        error = min(error, float(errors[best]))
        around = 1 + torch.linspace(-1, 1, count) / 40
        lows, highs = paired[0].reshape(-1)[best] * around, paired[1].reshape(-1)[best] * around
    return error


def seen(x: Tensor, batches: int = 1) -> Statistics:
    statistics = Statistics("layer")
    for part in x.chunk(batches):
        statistics.update(part)
    return statistics


SAMPLES = {
    "gaussian": torch.randn(4000, generator=generator(10)),
    "rectified": torch.randn(4000, generator=generator(11)).relu(),
    "heavy": torch.randn(4000, generator=generator(12)) ** 3,
    "uniform": torch.rand(4000, generator=generator(13)) * 3 - 1,
    "skewed": torch.nn.functional.silu(torch.randn(4000, generator=generator(14)) * 2),
    "negative": -torch.rand(4000, generator=generator(15)) - 0.5,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_intervals_are_as_good_as_brute_force(name: str, bits: int) -> None:
    x, grid = SAMPLES[name], Grid(bits)
    found = interval_error(x, *activation_range(seen(x), grid), grid)
    assert found <= brute_interval_error(x, grid) * 1.05
    assert found <= interval_error(x, min(float(x.min()), 0.0), max(float(x.max()), 0.0), grid) * 1.01


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", ["gaussian", "heavy", "skewed"])
def test_mse_of_symmetric_grids(name: str, bits: int) -> None:
    x, grid = SAMPLES[name], Grid(bits, symmetric=True)
    found = interval_error(x, *activation_range(seen(x), grid), grid)
    assert found <= brute_interval_error(x, grid) * 1.05


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_intervals_contain_zero_and_zero_is_exact(shift: float, bits: int, method: str) -> None:
    x, grid = torch.randn(1000, generator=generator(16)) + shift, Grid(bits)
    low, high = activation_range(seen(x), grid, method)
    assert low <= 0 <= high
    step, zero = grid.spanning(torch.tensor(low), torch.tensor(high))
    assert float(affine.fake_quantize(torch.zeros(1), step, zero, grid.qmin, grid.qmax)) == 0
    assert grid.qmin <= float(zero) <= grid.qmax
    assert float(zero) == round(float(zero))


def test_sixteen_bits_use_the_whole_range() -> None:
    x = SAMPLES["heavy"]
    assert activation_range(seen(x), Grid(16), "mse") == (float(x.min()), float(x.max()))
    assert activation_range(seen(x), Grid(8), "minmax") == (float(x.min()), float(x.max()))
    low, high = activation_range(seen(x), Grid(4), "mse")
    assert low > float(x.min())
    assert high < float(x.max())


def test_percentile_of_activations() -> None:
    x = torch.linspace(-1, 3, 40_001)
    for fraction in (0.9, 0.99, 0.999):
        low, high = activation_range(seen(x, 3), Grid(8), "percentile", percentile=fraction)
        assert high == pytest.approx(-1 + 4 * fraction, abs=4e-3)
        assert low == pytest.approx(-1 + 4 * (1 - fraction), abs=4e-3)
    assert activation_range(seen(x), Grid(8), "percentile", percentile=1.0) == pytest.approx((-1, 3), abs=3 / 2048)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.2, 1e-20, 1e20])
def test_constant_tensors(value: float, method: str) -> None:
    x, grid = torch.full((4, 50), value), Grid(8)
    low, high = activation_range(seen(x), grid, method)
    step, zero = grid.spanning(torch.tensor(low), torch.tensor(high))
    assert bool(torch.isfinite(step)) and float(step) > 0  # noqa: PT018
    found = affine.fake_quantize(x, step, zero, 0, 255)
    assert float((found - x).abs().max()) <= abs(value) / 200


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_one_outlier_does_not_take_the_grid(method: str) -> None:
    x = torch.randn(20_000, generator=generator(17))
    x[77] = 40.0
    low, high = activation_range(seen(x), Grid(4), method, percentile=0.999)
    assert -4.5 < low < -1
    assert 1 < high < 12


def test_spanning_closed_form() -> None:
    step, zero = Grid(4).spanning(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([3.0, 2.0, 0.0]))
    assert step.tolist() == pytest.approx([4 / 15, 2 / 15, 1.0])
    assert zero.tolist() == [round(15 / 4), 0, 0]
    step, zero = Grid(4, symmetric=True).spanning(torch.tensor([-1.0]), torch.tensor([3.0]))
    assert (step.tolist(), zero.tolist()) == (pytest.approx([3 / 7.5]), [0])


@pytest.mark.parametrize("block", [(1, 7), (1, 3), (3, 7)])
def test_it_is_the_ratio_of_standard_deviations_in_every_block(block: tuple[int, int]) -> None:
    """Also in a tail that is shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 7, generator=generator) + 0.5
    q = torch.round(w * 2) / 3
    expected = [
        float(a.std(correction=0) / b.std(correction=0))
        for rows, other in zip(w.split(block[0], 0), q.split(block[0], 0), strict=True)
        for a, b in zip(rows.split(block[1], 1), other.split(block[1], 1), strict=True)
        if a.numel() > 1
    ]
    found = spread_ratio(w, q, block)
    if block == (1, 3):  # whose tails are of one element
        assert found[2::3].tolist() == [1.0, 1.0, 1.0]
        found = found.reshape(3, 3)[:, :2].reshape(-1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_blocks_without_a_spread_are_left_alone() -> None:
    w = torch.tensor([[0.01, -0.01], [2.0, 2.0], [0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0], [1.9, 1.9], [0.0, 0.0]])
    assert spread_ratio(w, q, (1, 2)).tolist() == [1.0, 1.0, 1.0]
    assert spread_ratio(
        torch.tensor([[[[0.3]]], [[[0.0]]]]), torch.tensor([[[[0.2]]], [[[0.0]]]]), (1, 1, 1, 1)
    ).tolist() == [1.0, 1.0]
