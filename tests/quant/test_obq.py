"""OBQ against OPTQ in a forced order, against brute force, and on grids that end."""

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.quant.obq import compensate_each
from bitwright.quant.optq import compensate

STEP = torch.full((1, 1, 1), 0.5)


def nearest(values: Tensor, step: Tensor) -> Tensor:
    return (values / step).round().clamp(-20, 20) * step


def layer(rows: int = 5, columns: int = 10, groups: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and X X^T of inputs that differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator)
    x = mix @ torch.randn(groups, columns, 50, generator=generator)
    return torch.randn(groups, rows, columns, generator=generator), x @ x.transpose(1, 2)


def cost(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    error = (weight - nearest(found, STEP)).double()
    return float(torch.einsum("grk,gkl,grl->", error, hessian.double(), error))


def test_in_a_forced_order_it_is_optq() -> None:
    weight, hessian = layer()
    ours = compensate_each(weight, hessian, STEP, nearest, order=torch.arange(10))
    theirs = compensate(weight, hessian, STEP, nearest, ordered=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(nearest(ours, STEP), nearest(theirs, STEP))


def test_with_a_diagonal_hessian_it_rounds_to_nearest() -> None:
    weight, _ = layer()
    hessian = torch.diag_embed(torch.rand(2, 10) + 0.1)
    assert torch.equal(nearest(compensate_each(weight, hessian, STEP, nearest), STEP), nearest(weight, STEP))


@pytest.mark.parametrize("seed", range(3))
def test_it_costs_less_than_rounding_and_no_less_than_the_best_there_is(seed: int) -> None:
    weight, hessian = layer(rows=1, columns=4, groups=1, seed=seed)
    found = cost(weight, compensate_each(weight, hessian, STEP, nearest, damping=0.0), hessian)
    best = min(
        cost(weight, (weight / 0.5).floor() * 0.5 + 0.5 * torch.tensor(moves), hessian)
        for moves in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=4)
    )
    assert best - 1e-9 <= found <= cost(weight, weight, hessian)


def test_each_row_has_its_own_order() -> None:
    weight, hessian = layer()
    together = compensate_each(weight, hessian, STEP, nearest)
    alone = torch.cat([compensate_each(weight[:, [r]], hessian, STEP, nearest) for r in range(5)], dim=1)
    torch.testing.assert_close(together, alone)


def test_what_moves_off_the_grid_is_rounded_at_once() -> None:
    """On a grid of two values an element beyond it would only go further; others still make up for it."""
    weight = torch.tensor([[[0.45, 3.0, 0.4]]])
    hessian = torch.tensor([[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]])

    def two(values: Tensor, step: Tensor) -> Tensor:
        return (values >= 0.5).to(values.dtype)

    found = compensate_each(weight, hessian, torch.ones(1, 1, 1), two, damping=0.0)
    assert float(found[0, 0, 1]) == 3.0
    assert two(found, STEP)[0, 0].tolist() == [1.0, 1.0, 1.0]


def test_inputs_that_are_always_zero_and_rows_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer()
    hessian[:, 3] = hessian[:, :, 3] = 0.0
    whole = compensate_each(weight, hessian, STEP, nearest)
    monkeypatch.setattr("bitwright.quant.obq.MEMORY", 1)
    torch.testing.assert_close(compensate_each(weight, hessian, STEP, nearest), whole)
    assert bool(torch.isfinite(whole).all())
