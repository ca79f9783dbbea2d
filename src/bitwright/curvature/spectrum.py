"""Eigenvalues and the spectral density of a symmetric matrix that is known by its products with vectors alone.

Lanczos with full re-orthogonalisation (Golub and Van Loan, 10.3): after m products the tridiagonal ``T = Q^T H Q`` has
the Ritz values as eigenvalues, and some eigenvalue of H lies within ``beta_m |s_m|`` of each, ``s_m`` being the last
component of its eigenvector. The same T is a Gauss quadrature for the starting vector v (arXiv:1912.07145)::

    v^T f(H) v = sum_i w_i f(theta_i)          w_i = (first component of eigenvector i)^2

With random signs for v, ``n sum_i w_i f(theta_i)`` estimates ``Tr f(H)``. Imports torch and nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXHAUSTED = 1e-6
"""Times the largest Ritz value: a next vector that is shorter is rounding noise, and the space is invariant."""
WIDTH = 0.01
"""Standard deviation of a density's Gaussians, as a share of the range of eigenvalues."""


class Lanczos:
    """One run, a product at a time, so that the runs of many matrices can share each pass over the data.

    Args:
        start: [n], not zero.
        steps: the most products to come.

    Memory: ``steps + 1`` vectors of length n.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> run = Lanczos(torch.ones(4), 4)
        >>> while not run.exhausted:
        ...     run.take(matrix @ run.vector)
        >>> [round(abs(x), 4) for x in run.eigenvalues(3)[0]]
        [3.0, 2.0, 1.0]
    """

    def __init__(self, start: Tensor, steps: int) -> None:
        self.size = start.numel()
        self.basis = torch.empty(min(steps, self.size) + 1, self.size, dtype=start.dtype, device=start.device)
        self.basis[0] = start / torch.linalg.vector_norm(start)
        self.alphas: list[float] = []
        self.betas: list[float] = []

    @property
    def steps(self) -> int:
        """Products taken so far."""
        return len(self.alphas)

    @property
    def vector(self) -> Tensor:
        """The next vector to multiply, [n]."""
        return self.basis[self.steps]

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant, so that the Ritz values are eigenvalues, or all steps are taken."""
        if self.steps == 0:
            return False
        scale = max(abs(float(x)) for x in self._decomposed()[0])
        return self.steps + 1 >= len(self.basis) or self.betas[-1] <= EXHAUSTED * scale

    def take(self, product: Tensor) -> None:
        """Takes the product of the matrix with :attr:`vector`, [n]."""
        known = self.basis[: self.steps + 1]
        self.alphas.append(float(torch.dot(known[-1].double(), product.double())))
        rest = product
        for _ in range(2):  # once leaves what rounding put back
            rest = rest - known.T @ (known @ rest)
        beta = float(torch.linalg.vector_norm(rest.double()))
        self.betas.append(beta)
        if beta > 0:
            self.basis[self.steps] = rest / beta

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights, each [steps], float64; the weights sum to 1."""
        values, vectors = self._decomposed()
        return values, vectors[0].square()

    def eigenvalues(self, count: int) -> tuple[list[float], list[float]]:
        """The Ritz values largest in size, in that order, and for each the distance within which an eigenvalue lies.

        An eigenvalue that the matrix has several times is found once.
        """
        values, vectors = self._decomposed()
        order = values.abs().argsort(descending=True)[:count]
        errors = self.betas[-1] * vectors[-1, order].abs()
        return values[order].tolist(), errors.tolist()

    def converged(self, count: int, tolerance: float) -> bool:
        """Whether that many eigenvalues are known to a share of the largest one."""
        if self.steps < count:
            return False
        values, errors = self.eigenvalues(count)
        return max(errors) <= tolerance * abs(values[0])

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        tridiagonal = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values, vectors


@dataclass(frozen=True)
class Spectrum:
    """What some runs say of one matrix.

    Attributes:
        size: n, of the matrix [n, n].
        eigenvalues: those largest in size, in that order, with their signs.
        errors: for each, the distance within which an eigenvalue lies for certain.
        quadratures: nodes and weights of every run.
    """

    size: int
    eigenvalues: list[float]
    errors: list[float]
    quadratures: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, runs: list[Lanczos], count: int) -> Spectrum:
        """From runs with different starts; eigenvalues from the run that knows the largest best."""
        found = [run.eigenvalues(count) for run in runs]
        values, errors = max(found, key=lambda f: abs(f[0][0]) - f[1][0])
        return cls(runs[0].size, values, errors, [run.quadrature() for run in runs])

    def moment(self, power: int) -> float:
        """Estimate of ``Tr H^power / n``, the moment of the spectral density."""
        return sum(float(w @ nodes**power) for nodes, w in self.quadratures) / len(self.quadratures)

    def density(self, points: int = 512) -> tuple[Tensor, Tensor]:
        """The density on a grid of eigenvalues, each node a Gaussian of :data:`WIDTH`, [points] each.

        Example:
            >>> one = torch.tensor([1.0], dtype=torch.float64)
            >>> x, y = Spectrum(1, [2.0], [0.0], [(2 * one, one)]).density()
            >>> round(float(torch.trapezoid(y, x)), 3), round(float(x[y.argmax()]), 2)
            (1.0, 2.0)
        """
        nodes = torch.cat([n for n, _ in self.quadratures])
        weights = torch.cat([w for _, w in self.quadratures]) / len(self.quadratures)
        low, high = min(0.0, float(nodes.min())), max(0.0, float(nodes.max()))
        sigma = WIDTH * max(high - low, 1e-30)
        grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
        bumps = torch.exp(-(((grid[:, None] - nodes) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        return grid, bumps @ weights
