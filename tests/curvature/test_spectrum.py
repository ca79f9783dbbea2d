"""Lanczos against matrices whose eigenvalues are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.curvature.spectrum import Lanczos, Spectrum


def matrix(values: list[float], seed: int = 0) -> Tensor:
    """Symmetric with these eigenvalues, float64."""
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def signs(n: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def run(a: Tensor, start: Tensor, steps: int) -> Lanczos:
    made = Lanczos(start, steps)
    while not made.exhausted:
        made.take(a @ made.vector)
    return made


def test_top_eigenvalues_are_those_largest_in_size_with_their_signs() -> None:
    values = [-9.0, 7.0, 3.0, 1.0, *[0.1 * i for i in range(1, 27)]]
    found, errors = run(matrix(values), signs(30, 1), 14).eigenvalues(3)
    assert found == pytest.approx([-9.0, 7.0, 3.0], rel=1e-4)
    assert all(e < 1e-2 for e in errors)


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_an_eigenvalue_lies_within_the_error_of_every_ritz_value(steps: int) -> None:
    """And the bound is not idle: before convergence it is of the size of the true distance."""
    torch.manual_seed(3)
    a = torch.randn(25, 25, dtype=torch.float64)
    a = a + a.T
    true = torch.linalg.eigvalsh(a)
    ritz, errors = run(a, signs(25, 5), steps).eigenvalues(steps)
    for value, error in zip(ritz, errors, strict=True):
        assert float((true - value).abs().min()) <= error + 1e-9
    assert max(errors) > 0.1


def test_quadrature_is_exact_for_polynomials_of_degree_below_twice_the_steps() -> None:
    """Golub and Welsch: m nodes integrate ``v^T f(H) v / v^T v`` exactly up to degree 2m - 1, and not beyond."""
    torch.manual_seed(4)
    a = torch.randn(12, 12, dtype=torch.float64)
    a, v = a + a.T, signs(12, 2)
    nodes, weights = run(a, v, 3).quadrature()
    for power in range(6):
        expected = float(v @ torch.linalg.matrix_power(a, power) @ v) / 12
        assert float(weights @ nodes**power) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    beyond = float(v @ torch.linalg.matrix_power(a, 6) @ v) / 12
    assert float(weights @ nodes**6) != pytest.approx(beyond, rel=1e-6)


def test_moments_over_many_starts_are_the_normalised_traces() -> None:
    values = [5.0, 2.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    a = matrix(values, seed=1)
    runs = [run(a, signs(8, s), 4) for s in range(400)]
    made = Spectrum.of(runs, 1)
    for power in (1, 2, 3):
        true = sum(v**power for v in values) / 8
        each = torch.tensor([float(w @ n**power) for n, w in made.quadratures])
        assert abs(made.moment(power) - true) < 4 * float(each.std()) / len(runs) ** 0.5
    assert made.moment(0) == pytest.approx(1.0)


def test_density_has_the_mass_and_mean_of_its_quadrature() -> None:
    made = Spectrum.of([run(matrix([4.0, 1.0, -2.0, 0.0, 0.0]), signs(5, 1), 5)], 1)
    grid, density = made.density(4000)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)
    assert float(torch.trapezoid(density * grid, grid)) == pytest.approx(made.moment(1), abs=1e-3)
    peak = float(density[(grid - 4).abs().argmin()])
    between = float(density[(grid - 2.5).abs().argmin()])
    assert peak > 100 * between


def test_a_space_that_is_invariant_ends_the_run() -> None:
    a = matrix([3.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    made = run(a, signs(6, 1), 6)
    assert made.steps == 2
    assert made.eigenvalues(2)[0] == pytest.approx([3.0, 0.0], abs=1e-9)
    assert made.converged(2, 1e-6)


@pytest.mark.parametrize("n", [1, 4])
def test_a_matrix_of_zeros_has_eigenvalue_zero(n: int) -> None:
    made = run(torch.zeros(n, n, dtype=torch.float64), signs(n, 0), 5)
    assert made.steps == 1
    assert made.eigenvalues(1) == ([0.0], [0.0])
    assert made.converged(1, 0.01)
    grid, density = Spectrum.of([made], 1).density()
    assert bool(torch.isfinite(density).all())
    assert len(grid) == 512
