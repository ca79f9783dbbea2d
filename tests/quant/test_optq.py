"""OPTQ against a literal OBQ with its order given, which updates the inverse Hessian itself (methods, section 10)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.quant import optq
from bitwright.quant.grid import Grid
from bitwright.quant.optq import compensate, least_squares_steps, sweep_codes, towards_float

QMIN, QMAX = -4, 3
GRID4 = Grid(4, symmetric=True)


def problem(
    seed: int = 0, groups: int = 2, rows: int = 5, columns: int = 9, samples: int = 60
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs [G, samples, K] and one step a row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=generator)
    mixing = torch.randn(groups, columns, columns, generator=generator) + torch.eye(columns)
    inputs = torch.randn(groups, samples, columns, generator=generator) @ mixing
    inputs *= torch.rand(groups, 1, columns, generator=generator) * 2 + 0.1
    return weight, inputs, 0.3 + 0.3 * torch.rand(groups, rows, 1, generator=generator)


def gram(inputs: Tensor) -> Tensor:
    return inputs.transpose(1, 2).double() @ inputs.double()


def to_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(QMIN, QMAX) * scale


def obq(weight: Tensor, hessian: Tensor, scale: Tensor, order: list[int], damping: float) -> Tensor:
    """One row at a time, one weight at a time: round it, move all others, take it out of the inverse Hessian."""
    columns = hessian.shape[0]
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    out = torch.empty_like(weight, dtype=torch.float64)
    for row, step in enumerate(scale.flatten().tolist()):
        w, inverse = weight[row].double().clone(), torch.linalg.inv(damped)
        for q in order:
            out[row, q] = w[q]
            target = min(max(round(float(w[q]) / step), QMIN), QMAX) * step
            w -= (w[q] - target) / inverse[q, q] * inverse[:, q]
            inverse = inverse - torch.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
            inverse[q, q] = 1.0  # it is zero but for rounding; nothing reads it again
    return out


def descending(hessian: Tensor) -> list[int]:
    return sorted(range(len(hessian)), key=lambda j: -float(hessian[j, j]))


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_obq_with_its_order_forced(seed: int, ordered: bool, damping: float) -> None:
    weight, inputs, scale = problem(seed)
    hessian = gram(inputs)
    found = compensate(weight, hessian, scale, to_nearest, damping=damping, ordered=ordered)
    for g in range(len(weight)):
        order = descending(hessian[g]) if ordered else list(range(9))
        expected = obq(weight[g], hessian[g], scale[g], order, damping)
        torch.testing.assert_close(found[g].double(), expected, rtol=1e-3, atol=1e-4)
        codes = to_nearest(expected.float(), scale[g])
        assert torch.equal(to_nearest(found[g], scale[g]), codes)
        assert not torch.equal(codes, to_nearest(weight[g], scale[g]))


def test_the_first_column_is_left_and_the_last_makes_up_for_all_others() -> None:
    """Without damping, what is left of the last weight is the least-squares answer to the error of the others."""
    weight, inputs, scale = problem(3, groups=1)
    found = compensate(weight, gram(inputs), scale, to_nearest, damping=0.0, ordered=False)
    assert torch.equal(found[..., 0], weight[..., 0])
    x = inputs[0].double()
    error = x[:, :-1] @ (weight - to_nearest(found, scale))[0, :, :-1].double().T
    best = torch.linalg.lstsq(x[:, -1:], error).solution[0] + weight[0, :, -1]
    torch.testing.assert_close(found[0, :, -1].double(), best, rtol=1e-3, atol=1e-4)


def test_two_columns_by_hand() -> None:
    hessian = torch.tensor([[[2.0, 1.0], [1.0, 4.0]]])
    weight = torch.tensor([[[0.4, 0.3]]])
    found = compensate(weight, hessian, torch.ones(1, 1, 1), GRID4.nearest, damping=0.0, ordered=False)
    assert found[0, 0].tolist() == pytest.approx([0.4, 0.3 + 0.4 * 1 / 4])  # e = 0.4, moved by h_12 / h_22
    swapped = compensate(weight, hessian, torch.ones(1, 1, 1), GRID4.nearest, damping=0.0)
    assert swapped[0, 0].tolist() == pytest.approx([0.4 + 0.3 * 1 / 2, 0.3])  # the larger diagonal goes first


@pytest.mark.parametrize("ordered", [True, False])
def test_inputs_without_correlation_give_rounding_to_nearest(ordered: bool) -> None:
    weight, _, scale = problem(4)
    hessian = torch.diag_embed(torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) + 0.1)
    assert torch.equal(compensate(weight, hessian, scale, to_nearest, ordered=ordered), weight)


def test_output_error_is_lower_and_weight_error_higher_than_of_rounding() -> None:
    output, weights = [], []
    for seed in range(40):
        weight, inputs, scale = problem(seed, groups=1)
        found = to_nearest(compensate(weight, gram(inputs), scale, to_nearest), scale)
        nearest = to_nearest(weight, scale)
        output.append(
            float(((weight - found) @ inputs.mT).square().sum() / ((weight - nearest) @ inputs.mT).square().sum())
        )
        weights.append(float((weight - found).square().sum() / (weight - nearest).square().sum()))
    assert sum(output) / 40 < 0.6
    assert sum(r < 1 for r in output) > 35
    assert sum(weights) / 40 > 1.1
    assert min(weights) >= 1


def test_order_of_large_inputs_first_does_better_on_average() -> None:
    ratios = []
    for seed in range(60):
        weight, inputs, scale = problem(seed, groups=1, columns=12)
        ordered, straight = (
            (
                (weight - to_nearest(compensate(weight, gram(inputs), scale, GRID4.nearest, ordered=o), scale))
                @ inputs.mT
            )
            .square()
            .sum()
            for o in (True, False)
        )
        ratios.append(float(ordered / straight))
    assert sum(ratios) / 60 < 1


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("lazy", [1, 2, 5, 9, 128])
def test_collected_updates_change_nothing(lazy: int, ordered: bool) -> None:
    weight, inputs, scale = problem(5)
    settings = {"damping": 0.01, "ordered": ordered}
    found = compensate(weight, gram(inputs), scale, to_nearest, lazy=lazy, **settings)
    expected = compensate(weight, gram(inputs), scale, to_nearest, lazy=4, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_groups_are_problems_of_their_own() -> None:
    weight, inputs, scale = problem(6, groups=3)
    found = compensate(weight, gram(inputs), scale, to_nearest)
    for g in range(3):
        alone = compensate(weight[g : g + 1], gram(inputs[g : g + 1]), scale[g : g + 1], to_nearest)
        torch.testing.assert_close(found[g : g + 1], alone, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    weight, inputs, scale = problem(7, groups=1)
    found = compensate(weight, gram(inputs), scale, to_nearest)
    for r in range(weight.shape[1]):
        alone = compensate(weight[:, r : r + 1], gram(inputs), scale[:, r : r + 1], to_nearest)
        torch.testing.assert_close(found[:, r : r + 1], alone, rtol=1e-4, atol=1e-5)


def test_columns_in_another_order_are_the_same_columns() -> None:
    """Ordered by their inputs, it does not matter how they came."""
    weight, inputs, scale = problem(8, groups=1)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    found = compensate(weight[..., shuffled], gram(inputs[..., shuffled]), scale, to_nearest)
    torch.testing.assert_close(found, compensate(weight, gram(inputs), scale, to_nearest)[..., shuffled])


def test_every_column_may_have_a_step_of_its_own() -> None:
    weight, inputs, _ = problem(9, groups=1)
    steps = 0.2 + 0.3 * torch.rand(1, 5, 3, generator=torch.Generator().manual_seed(9)).repeat_interleave(3, 2)
    found = compensate(weight, gram(inputs), steps, to_nearest, ordered=False, damping=0.01)
    w, damped = weight[0].double().clone(), gram(inputs)[0]
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    for j in range(9):  # an update with the inverse of what is left
        torch.testing.assert_close(found[0, :, j].double(), w[:, j], rtol=1e-3, atol=1e-4)
        inverse = torch.linalg.inv(damped[j:, j:])
        error = w[:, j] - to_nearest(w[:, j], steps[0, :, j].double())
        w[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_fewer_inputs_than_columns(rank: int) -> None:
    for seed, damping in itertools.product(range(5), (0.01, 1e-4)):
        weight, inputs, scale = problem(seed, samples=rank)
        found = compensate(weight, gram(inputs), scale, Grid(8, symmetric=True).nearest, damping=damping)
        assert bool(torch.isfinite(found).all())
        q, nearest = (w.div(scale).round().mul(scale) for w in (found, weight))
        assert float(((weight - q) @ inputs.mT).square().sum()) < float(((weight - nearest) @ inputs.mT).square().sum())


def test_no_inputs_at_all_give_rounding_to_nearest() -> None:
    weight, _, scale = problem(0)
    for damping in (0.0, 0.01):
        assert torch.equal(compensate(weight, torch.zeros(2, 9, 9), scale, to_nearest, damping=damping), weight)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_dead_inputs_change_nothing_for_the_others(size: float, ordered: bool) -> None:
    weight, inputs, scale = problem(1)
    alive = torch.tensor([0, 2, 3, 5, 6, 8])
    dead = inputs.clone()
    dead[..., [1, 4, 7]] = 0
    found = compensate(weight, size * gram(dead), scale, to_nearest, ordered=ordered)
    alone = compensate(weight[..., alive], gram(inputs[..., alive]), scale, to_nearest, ordered=ordered)
    torch.testing.assert_close(found[..., alive], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[..., [1, 4, 7]], weight[..., [1, 4, 7]])


def test_the_size_of_the_inputs_does_not_matter() -> None:
    weight, inputs, scale = problem(2)
    expected = compensate(weight, gram(inputs), scale, to_nearest)
    for size in (1e-8, 1e8):
        torch.testing.assert_close(compensate(weight, size * gram(inputs), scale, to_nearest), expected)


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    weight, inputs, scale = problem(3, groups=1)
    hessian = gram(inputs)
    values, vectors = torch.linalg.eigh(hessian[0])
    values[0] = -1e-3 * values[-1]
    broken = (vectors @ values.diag() @ vectors.T).unsqueeze(0)
    found = compensate(weight, broken, scale, to_nearest, damping=1e-6)
    assert bool(torch.isfinite(found).all())
    assert not torch.equal(to_nearest(found, scale), to_nearest(weight, scale))


def test_what_it_is_given_stays() -> None:
    weight, inputs, scale = problem(0)
    hessian = gram(inputs)
    hessian[:, 0], hessian[:, :, 0] = 0, 0
    before = weight.clone(), hessian.clone(), scale.clone()
    compensate(weight, hessian, scale, to_nearest)
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian, scale), before, strict=True))


def objective(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Of every row, [G, R]."""
    error = (weight - values).double()
    return ((error @ hessian) * error).sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_descent_never_raises_the_objective_and_ends_where_no_single_code_helps(seed: int) -> None:
    weight, inputs, scale = problem(seed)
    hessian = gram(inputs)
    start = to_nearest(compensate(weight, hessian, scale, to_nearest, damping=0.0), scale)
    before, seen = objective(weight, start, hessian), start
    for sweeps in range(1, 9):
        found = sweep_codes(weight, start, hessian, scale, to_nearest, damping=0.0, sweeps=sweeps)
        assert bool((objective(weight, found, hessian) <= objective(weight, seen, hessian) * (1 + 1e-5)).all())
        seen = found
    reached = objective(weight, seen, hessian)
    assert float(reached.sum()) < 0.97 * float(before.sum())
    for column, code in itertools.product(range(weight.shape[2]), range(QMIN, QMAX + 1)):
        other = seen.clone()
        other[:, :, column] = code * scale[:, :, 0]
        assert bool((objective(weight, other, hessian) >= reached * (1 - 1e-4)).all())


def test_descent_keeps_the_best_of_all_codes() -> None:
    weight, inputs, scale = problem(0, groups=1, rows=1, columns=3)
    hessian = gram(inputs)
    every = [torch.tensor([[codes]]) * scale for codes in itertools.product(range(QMIN, QMAX + 1), repeat=3)]
    best = min(every, key=lambda values: float(objective(weight, values, hessian)))
    assert torch.equal(sweep_codes(weight, best, hessian, scale, to_nearest, damping=0.0), best)


def test_descent_rounds_dead_inputs_to_nearest() -> None:
    weight, inputs, scale = problem()
    inputs[:, :, 2] = 0.0
    found = sweep_codes(weight, torch.zeros_like(weight), gram(inputs), scale, to_nearest)
    assert torch.equal(found[:, :, 2], to_nearest(weight, scale)[:, :, 2])


def two_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [1, 5, 9], what it reads in float and what quantized layers give instead, [1, 200, 9] in float64."""
    weight, inputs, _ = problem(seed, groups=1, samples=200)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return weight, inputs.double(), inputs.double() + 0.5 * noise


def test_outputs_for_float_inputs_are_a_target_of_their_own() -> None:
    """``||Q X' - W X||^2`` less ``tr((Q - T) H (Q - T)^T)`` does not depend on Q."""
    weight, x, seen = two_inputs()
    own, cross = seen.mT @ seen, weight.double() @ (x.mT @ seen)
    target = towards_float(weight, own, cross, shares=[1.0], damping=0.0)[0].double()
    left = []
    for seed in range(4):
        q = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        left.append(float((seen @ q.mT - x @ weight.double().mT).square().sum() - objective(q, target, own).sum()))
    assert left == pytest.approx([left[0]] * 4, rel=1e-4)


def test_the_way_to_the_target() -> None:
    weight, x, seen = two_inputs()
    own, cross = seen.mT @ seen, weight.double() @ (x.mT @ seen)
    assert torch.equal(towards_float(weight, own, cross, shares=[0.0], damping=0.1)[0], weight)
    alike = weight.double() @ own
    torch.testing.assert_close(towards_float(weight, own, alike, shares=[1.0], damping=0.1)[0], weight)
    half, whole = towards_float(weight, own, cross, shares=[0.5, 1.0], damping=0.1)
    torch.testing.assert_close(half, (weight + whole) / 2)
    assert float((whole - weight).abs().max()) > 0.05


def test_steps_of_least_squares() -> None:
    weight, x, seen = two_inputs()
    values = to_nearest(weight, torch.full((1, 5, 1), 0.7)).double()
    found = least_squares_steps(values, seen.mT @ seen, weight.double() @ (x.mT @ seen))
    for row in range(5):
        ours, theirs = seen[0] @ values[0, row], x[0] @ weight[0, row].double()
        best = torch.linalg.lstsq(ours.unsqueeze(1), theirs.unsqueeze(1)).solution
        assert float(found[0, row]) == pytest.approx(float(best), rel=1e-6)


def test_a_row_that_gives_nothing_keeps_its_step() -> None:
    weight, x, _ = two_inputs()
    hessian = x.mT @ x
    cross = weight.double() @ hessian
    assert least_squares_steps(torch.zeros_like(weight), hessian, cross).tolist() == [[1.0] * 5]


def test_a_large_gram_matrix_is_computed_in_stripes() -> None:
    x = torch.randn(2, 7, optq.SPLIT + 41, generator=torch.Generator().manual_seed(0))
    found = optq.gram(x)
    torch.testing.assert_close(found.double(), x.double().mT @ x.double(), rtol=1e-5, atol=1e-5)
