"""From measured losses and limits to a plan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitwright.bits.costs import (
    ACTIVATION_CHOICES,
    WEIGHT_CHOICES,
    Latency,
    Variable,
    costs_of,
    keys_of,
    variables_of,
)
from bitwright.bits.plan import Plan, plans_of
from bitwright.bits.solve import Solution, pareto, solve
from bitwright.bits.tables import Problem, Term
from bitwright.errors import UsageError
from bitwright.graph.student import Student

ByBits = Mapping[int, float]


@dataclass(frozen=True)
class Losses:
    """What each choice of bits costs in accuracy, by layer name: any measure that adds up over layers.

    Numbers below 0 count as 0, with a warning; an option whose loss is not finite is not offered, with a warning.

    Example: ``Losses(weights={"stem": {4: 0.2, 8: 0.01}}, activations={"relu": {8: 0.03, 16: 0.0}})``. An activation
    may be named by any layer of its group.
    """

    weights: Mapping[str, ByBits] = field(default_factory=dict)
    activations: Mapping[str, ByBits] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[tuple[int, int], float]] = field(default_factory=dict)
    """Loss of a linear layer by the bits of its weight and of its input, added to the other two."""


def allocate(
    student: Student,
    losses: Losses,
    limits: Mapping[str, float],
    *,
    weights: Sequence[int] = WEIGHT_CHOICES,
    activations: Sequence[int] = ACTIVATION_CHOICES,
    ties: Sequence[Sequence[str]] = (),
    latency: Latency | None = None,
) -> Plan:
    """The plan that loses least within the limits.

    Args:
        student: the network with quantizers in it; rules of its scheme fix bits.
        losses: of every option that is left open.
        limits: largest values, out of ``weight_bytes``, ``activation_bytes``, ``total_bytes``, ``bit_operations``,
            ``latency`` (seconds).
        weights: bits offered to weights.
        activations: bits offered to activations.
        ties: keys of variables that take the same bits (:func:`bitwright.bits.costs.residual_ties`).
        latency: measured seconds of layers.

    Raises:
        UsageError: the limits cannot be met, or a loss is missing.
    """
    problem = problem_of(student, losses, weights=weights, activations=activations, ties=ties, latency=latency)
    return plan_for(student, solve(problem, limits))


def allocations(
    student: Student,
    losses: Losses,
    cost: str = "weight_bytes",
    *,
    budgets: Sequence[float] | None = None,
    count: int = 21,
    limits: Mapping[str, float] | None = None,
    **settings: Any,
) -> list[Plan]:
    """The plans over a range of budgets of one cost; ``settings`` are those of :func:`allocate`."""
    problem = problem_of(student, losses, **settings)
    curve = pareto(problem, cost, budgets=budgets, count=count, limits=limits)
    return plans_for(student, curve)


def problem_of(
    student: Student,
    losses: Losses,
    *,
    weights: Sequence[int] = WEIGHT_CHOICES,
    activations: Sequence[int] = ACTIVATION_CHOICES,
    ties: Sequence[Sequence[str]] = (),
    latency: Latency | None = None,
    overhead: int | None = None,
) -> Problem:
    """The integer program of a network; arguments as for :func:`allocate` and :func:`bitwright.bits.costs.costs_of`.

    Raises:
        UsageError: a loss is missing, or names a layer that has no such bits to choose.
    """
    variables = _with_finite_losses(variables_of(student, weights, activations), losses)
    terms, known = _loss_terms(student, variables, losses)
    missing = [v for v in variables.values() if len(v.options) > 1 and v.key not in known]
    if missing:
        raise UsageError(
            f"Expected losses of all {len(variables)} tensors, those of {missing[0].label} are missing"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}."
        )
    return Problem(
        {key: v.options for key, v in variables.items()},
        tuple(terms),
        costs_of(student, variables, latency, overhead),
        tuple(tuple(tie) for tie in ties),
        {key: v.label for key, v in variables.items()},
    )


def plan_for(student: Student, solution: Solution) -> Plan:
    """The plan of a solution, with what it is predicted to lose and to cost."""
    return plans_for(student, [solution])[0]


def plans_for(student: Student, solutions: Sequence[Solution]) -> list[Plan]:
    """The same of each of several; the network is read once."""
    plans = plans_of(student, [solution.bits for solution in solutions])
    return [plan.model_copy(update={"predicted": _predicted(s)}) for plan, s in zip(plans, solutions, strict=True)]


def _predicted(solution: Solution) -> dict[str, float]:
    gap = {"gap": solution.gap} if solution.gap else {}
    return {"loss": solution.loss, **solution.costs, **gap}


def _tables(variables: Mapping[str, Variable], losses: Losses) -> dict[str, dict[int, float]]:
    """Losses by key of the variable."""
    tables: dict[str, dict[int, float]] = {}
    for kind, given in (("weight", losses.weights), ("activation", losses.activations)):
        for key, table in zip(keys_of(variables, kind, given), given.values(), strict=True):
            if key in tables:
                raise UsageError(f"The losses of {variables[key].label} are given twice.")
            tables[key] = dict(table)
    return tables


def _with_finite_losses(variables: Mapping[str, Variable], losses: Losses) -> dict[str, Variable]:
    """The variables without options whose loss is not finite."""
    tables, found, dropped = _tables(variables, losses), {}, []
    for key, variable in variables.items():
        table = tables.get(key, {})
        finite = tuple(b for b in variable.options if math.isfinite(table.get(b, 0.0)))
        if not finite:
            raise UsageError(
                f"None of the losses of {variable.label} is finite, at {', '.join(map(str, variable.options))} bits. "
                "Offer it more bits, or leave it in float with a rule."
            )
        if len(finite) < len(variable.options):
            dropped.append(variable.label)
        found[key] = Variable(key, variable.kind, variable.layers, finite)
    if dropped:
        warnings.warn(f"Losses that are not finite: those bits are not offered to {_some(dropped)}.", stacklevel=4)
    return found


def _loss_terms(student: Student, variables: Mapping[str, Variable], losses: Losses) -> tuple[list[Term], set[str]]:
    """The objective, and the variables it speaks of."""
    terms, known, negative = [], set(), []
    for key, table in _tables(variables, losses).items():
        variable = variables[key]
        values = _looked_up(table, variable.options, variable.label)
        if (values < 0).any():
            negative.append(variable.label)
        terms.append(Term((key,), np.maximum(values, 0.0)))
        known.add(key)
    sources = {layer.name: (layer.weight, layer.source) for layer in student.layers}
    for name, pairs in losses.pairs.items():
        keys = [k for k in sources.get(name, ()) if k is not None and k in variables]
        if len(keys) != 2:
            raise UsageError(f"The layer '{name}' has no weights and input whose bits can both be chosen.")
        wanted = [(w, a) for w in variables[keys[0]].options for a in variables[keys[1]].options]
        values = _looked_up(pairs, wanted, name)
        if not np.isfinite(values).all():
            raise UsageError(f"A loss of {name} is not finite. Leave that pair's bits out, or measure it again.")
        if (values < 0).any():
            negative.append(name)
        shape = [len(variables[k].options) for k in keys]
        terms.append(Term(tuple(keys), np.maximum(values, 0.0).reshape(shape)))
        known |= set(keys)
    if negative:
        warnings.warn(f"Losses below 0 count as 0: those of {_some(negative)}.", stacklevel=4)
    return terms, known


def _looked_up(table: Mapping[Any, float], wanted: Sequence[Any], label: str) -> np.ndarray[Any, Any]:
    missing = [b for b in wanted if b not in table]
    if missing:
        raise UsageError(f"Expected a loss of {label} at {missing[0]} bits, found those at {sorted(table)}.")
    return np.array([table[b] for b in wanted], dtype=np.float64)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
