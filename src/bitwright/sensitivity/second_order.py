"""Measures from the curvature of the loss: what a quantization error costs to second order, ``1/2 dw^T H dw``.

The matrix H is by default the Fisher matrix of the network's own class probabilities, which needs no label and makes
every prediction one of KL from float, in nats (:mod:`bitwright.curvature.hessian`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bitwright.curvature.hessian import Curvature, Data, Group, Matrix, spectra, traces, weight_groups
from bitwright.sensitivity.base import Choices, Measure, Table
from bitwright.stages.base import Run

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured


@dataclass(frozen=True)
class Trace(Measure):
    """HAWQ-V2: ``1/2 Tr(H_l) / n_l ||Q_b(w) - w||^2`` (arXiv:1911.03852; the paper leaves out the half).

    The mean of ``1/2 dw^T H dw`` over errors of any direction and this length: exact where rounding errors are
    independent and equally large.
    """

    name: ClassVar[str] = "trace"
    matrix: Matrix = "fisher"
    probes: int = 32
    tolerance: float = 0.05

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """One backward pass per probe serves all layers."""
        curvature = _curvature(teacher, images, self.matrix, run)
        layers = _layers(teacher)
        found = traces(
            curvature, layers, probes=self.probes, tolerance=self.tolerance, seed=run.seed, progress=run.progress
        )
        means = {g.name: float(t) / g.parameters for g, t in zip(layers, found.trace, strict=True)}
        errors = {g.name: float(e) / g.parameters for g, e in zip(layers, found.error, strict=True)}
        used, notes = positive(means, "trace")
        table = _table(self.name, used, teacher, images, choices, run)
        table.notes, table.facts = notes, {"mean_trace": means, "error": errors, "probes": found.probes}
        return table


@dataclass(frozen=True)
class TopEigenvalue(Measure):
    """HAWQ: ``1/2 lambda_l / n_l ||Q_b(w) - w||^2`` with the layer's top eigenvalue (arXiv:1905.03696).

    The paper orders layers by ``lambda_l / n_l`` and leaves the bits to the reader; the error's size gives the loss at
    each, as its order of fine-tuning has it.
    """

    name: ClassVar[str] = "eigenvalue"
    matrix: Matrix = "fisher"
    steps: int = 20
    tolerance: float = 0.01

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """As many passes as the slowest layer takes to converge."""
        curvature, layers = _curvature(teacher, images, self.matrix, run), _layers(teacher)
        found = spectra(
            curvature, layers, steps=self.steps, tolerance=self.tolerance, seed=run.seed, progress=run.progress
        )
        top = {g.name: s.eigenvalues[0] for g, s in zip(layers, found, strict=True)}
        used, notes = positive({g.name: top[g.name] / g.parameters for g in layers}, "top eigenvalue")
        table = _table(self.name, used, teacher, images, choices, run)
        errors = {g.name: s.errors[0] for g, s in zip(layers, found, strict=True)}
        table.notes, table.facts = notes, {"eigenvalue": top, "error": errors}
        return table


@dataclass(frozen=True)
class QBert(Measure):
    """Q-BERT: ``1/2 Omega_l ||Q_b(w) - w||^2``, ``Omega_l = |mean(lambda_l)| + std(lambda_l)`` (arXiv:1909.05840).

    Mean and spread of the layer's top eigenvalue over parts of the images: a layer whose curvature depends on which
    images it saw is not to be trusted with few bits.
    """

    name: ClassVar[str] = "q-bert"
    matrix: Matrix = "fisher"
    parts: int = 10
    steps: int = 20
    tolerance: float = 0.01

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """Every part has spectra of its own; a part is every tenth image, so that sorted images do not matter."""
        layers, rows = _layers(teacher), []
        count = min(self.parts, len(images))
        for part in range(count):
            some = images.take(range(part, len(images), count))
            curvature = _curvature(teacher, some, self.matrix, run)
            found = spectra(curvature, layers, steps=self.steps, tolerance=self.tolerance, seed=run.seed)
            rows.append([s.eigenvalues[0] for s in found])
            run.progress("Eigenvalues of parts", part + 1, count)
        top = torch.tensor(rows, dtype=torch.float64)
        spread = top.std(0) if count > 1 else torch.zeros(len(layers), dtype=torch.float64)
        omega = dict(zip((g.name for g in layers), (top.mean(0).abs() + spread).tolist(), strict=True))
        table = _table(self.name, omega, teacher, images, choices, run)
        table.facts = {"omega": omega, "parts": count}
        if count < 2:
            table.notes = ["One image has no spread over parts: only the mean of the top eigenvalue counts."]
        return table


@dataclass(frozen=True)
class Quadratic(Measure):
    """``1/2 dw^T H dw`` with the error that rounding makes, in its own direction.

    Where the others know the error's length, this knows where it points; a product with H for each layer and bits.
    """

    name: ClassVar[str] = "quadratic"
    matrix: Matrix = "fisher"

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """One pass over the images for each number of bits."""
        curvature = _curvature(teacher, images, self.matrix, run)
        found: dict[str, dict[int, float]] = {}
        for bits in choices.weights:
            run.progress("Second-order losses", choices.weights.index(bits), len(choices.weights))
            errors = list(choices_at(choices, bits).weight_errors(teacher, images, run))
            vectors = [error.reshape(-1) for *_, error in errors]
            products = curvature.products([(path,) for _, path, *_ in errors], vectors)
            for (layer, *_), error, product in zip(errors, vectors, products, strict=True):
                found.setdefault(layer, {})[bits] = float(error.double() @ product.double()) / 2
        run.progress("Second-order losses", len(choices.weights), len(choices.weights))
        below = sorted({layer for layer, row in found.items() if min(row.values()) < 0})
        notes = (
            [f"The loss falls, to second order, in the direction of the rounding at {_some(below)}."] if below else []
        )
        return Table(self.name, found, notes=notes)


def choices_at(choices: Choices, bits: int) -> Choices:
    """The same with a single number of bits for weights."""
    return Choices((bits,), choices.activations, choices.scheme, choices.calibrate)


def positive(values: dict[str, float], what: str) -> tuple[dict[str, float], list[str]]:
    """Curvatures that a plan can use: what is not positive takes the least positive value, and is named.

    A negative one would reward fewer bits: the labelled Hessian of a layer may have it, and says there that this layer
    matters least.

    Example:
        >>> positive({"a": 2.0, "b": -1.0, "c": 0.5}, "trace")[0]
        {'a': 2.0, 'b': 0.5, 'c': 0.5}
    """
    least = min((v for v in values.values() if v > 0), default=0.0)
    lifted = [name for name, v in values.items() if v < 0]
    notes = [f"The {what} is negative at {_some(lifted)}: the least positive one stands in."] if lifted else []
    return {name: v if v > 0 else least for name, v in values.items()}, notes


def _some(names: list[str]) -> str:
    shown = 5
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _curvature(teacher: Captured, images: Images, matrix: Matrix, run: Run) -> Curvature:
    return Curvature(teacher.graph, Data(images, run.batch, run.device), matrix)


def _layers(teacher: Captured) -> list[Group]:
    return [g for g in weight_groups(teacher.graph) if g.kind == "layer"]


def _table(
    name: str, curvatures: dict[str, float], teacher: Captured, images: Images, choices: Choices, run: Run
) -> Table:
    """``1/2 c_l ||Q_b(w) - w||^2`` for each layer."""
    found: dict[str, dict[int, float]] = {layer: {} for layer in curvatures}
    for layer, _, bits, error in choices.weight_errors(teacher, images, run):
        found[layer][bits] = curvatures[layer] * squared(error) / 2
    return Table(name, found)


def squared(error: Tensor) -> float:
    """``||error||^2``."""
    return float(error.double().square().sum())
