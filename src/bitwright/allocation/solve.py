"""Choosing one option for each variable so that the sum of losses is least and every cost stays within its limit.

An integer program for HiGHS (methods, sections 1.3, 4 and 7: HAWQ-V3, AdaQuant, EPTQ's mixed precision). With
``x_{v,o}`` in {0, 1} for option ``o`` of variable ``v``:

    min  sum_v L_v[o] x_{v,o}  +  sum_{u,v} L_{uv}[o,p] y_{uv,op}
    s.t. sum_o x_{v,o} = 1,   sum_p y_{uv,op} = x_{u,o},   sum_o y_{uv,op} = x_{v,p},   y >= 0
         every row of every limited cost <= its limit

``y`` is the product of two choices; given whole ``x`` the two sums leave it no freedom, so it need not be whole.

Most of the program is decided before HiGHS searches: options that another one beats in everything, options too
expensive for a limit, and options that the reduced costs of the linear program prove to be worse than a solution at
hand. What is left has tens of columns, scaled so that HiGHS's absolute tolerances mean nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from bitwright.errors import BitwrightError, UsageError

Numbers = npt.NDArray[np.float64]
Bits = dict[str, int]

NODES = 20_000
"""Of the search tree at most; a limit in seconds would make the result depend on the machine."""
ROW_SCALE = 1e6
"""Right-hand side of a scaled row: HiGHS's tolerance of 1e-6 is then one part in 1e12."""
LOSS_SCALE = 1e4
RETRIES = 4
SHOWN = 3
_INFEASIBLE, _STOPPED = 2, 1


@dataclass(frozen=True)
class Term:
    """What choices add to a sum: a number for each option of a variable, or each pair of options of two.

    Example: ``Term(("w",), [10.0, 20.0])`` adds 20 if ``w`` takes its second option; ``Term(("w", "a"), table)`` adds
    ``table[i, j]`` if ``w`` takes option i and ``a`` option j.
    """

    variables: tuple[str, ...]
    values: Any


@dataclass(frozen=True)
class Row:
    """A sum of terms."""

    terms: tuple[Term, ...]
    constant: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Something that can be limited: what is common, and the largest of the rows.

    Example: a file's bytes are common terms and no rows; peak memory has a row for each step; the bytes of both
    together have the first as common terms, the second as rows.
    """

    common: Row
    rows: tuple[Row, ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class Problem:
    """Variables with their options, losses to minimise, costs to limit.

    Invariants: values of a term are finite and have an element for each option, or pair of options, of its variables.

    Example:
        >>> loss = (Term(("a",), [4.0, 1.0]), Term(("b",), [3.0, 0.0]))
        >>> size = Cost(Row((Term(("a",), [40, 80]), Term(("b",), [10, 20]))), unit="B")
        >>> problem = Problem({"a": (4, 8), "b": (4, 8)}, loss, {"size": size})
        >>> solve(problem, {"size": 60}).bits
        {'a': 4, 'b': 8}
    """

    options: Mapping[str, tuple[int, ...]]
    losses: tuple[Term, ...]
    costs: Mapping[str, Cost]
    ties: tuple[tuple[str, ...], ...] = ()
    """Variables that take the same number of bits."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What variables are called in messages."""


@dataclass(frozen=True)
class Solution:
    """The bits of every variable, their loss, and what they cost, limited or not."""

    bits: Bits
    loss: float
    costs: dict[str, float]
    gap: float = 0.0
    """By how much of its loss a better solution could at most be better; 0: proven best."""


@dataclass(frozen=True)
class Reach:
    """What a cost can be."""

    least: float
    most: float
    bits: Bits
    """Of the least."""


def solve(problem: Problem, limits: Mapping[str, float] | None = None) -> Solution:
    """The bits with the least loss whose costs are within the limits. The same call gives the same bits.

    Among equal losses an option is preferred that is cheaper in everything.

    Args:
        problem: losses and costs.
        limits: largest value allowed, by the cost's name; none limits nothing.

    Raises:
        UsageError: no choice meets the limits. The line names what is reachable and the variables that bind.
    """
    return _Prepared(problem).solve(dict(limits or {}))


def evaluate(problem: Problem, bits: Mapping[str, int]) -> Solution:
    """Loss and costs of given bits."""
    return _Prepared(problem).solution({v: bits[v] for v in problem.options})


def pareto(
    problem: Problem,
    cost: str,
    *,
    budgets: Sequence[float] | None = None,
    count: int = 21,
    limits: Mapping[str, float] | None = None,
) -> list[Solution]:
    """The least loss for each budget of one cost, cheapest first; a larger budget never loses more.

    Args:
        problem: losses and costs.
        cost: what the budgets limit.
        budgets: to solve for; ``count`` evenly spaced ones, from the least that is reachable to what the solution
            without this limit costs, if not given.
        count: of budgets.
        limits: of the other costs.

    Raises:
        UsageError: a budget is below what is reachable, or the other limits cannot be met.
    """
    others = {name: limit for name, limit in (limits or {}).items() if name != cost}
    prepared = _Prepared(problem)
    prepared.check({**others, cost: 0.0})
    if budgets is None:
        most = prepared.solve(others).costs[cost]
        budgets = [*np.linspace(prepared.least_beside(cost, others), most, max(count, 2))[:-1], most]
    curve: list[Solution] = []
    for budget in sorted(budgets):
        found = prepared.solve({**others, cost: float(budget)})
        curve.append(curve[-1] if curve and curve[-1].loss <= found.loss else found)
    return curve


def reachable(problem: Problem) -> dict[str, Reach]:
    """The least and the most that each cost can be, each for itself."""
    prepared = _Prepared(problem)
    return {name: prepared.reach(name) for name in problem.costs}


class _Prepared:
    """A problem, checked and read once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.check({})
        _check_terms(problem)
        merged, self.group = _merge_ties(problem)
        self.tables = _Tables.of(merged)
        self.reduced = self.tables.without_dominated()

    def check(self, limits: Mapping[str, float]) -> None:
        for name, limit in limits.items():
            if name not in self.problem.costs:
                raise UsageError(f"Expected a limit of {', '.join(self.problem.costs)}, found '{name}'.")
            if math.isnan(limit):
                raise UsageError(f"Expected a number as the limit of {name}, found nan.")

    def solve(self, limits: Mapping[str, float]) -> Solution:
        self.check(limits)
        found = _minimise(self.reduced.limited(limits).without_dominated(), limits)
        if found is None:
            raise UsageError(_explain(self, limits))
        return self.solution(found[0], found[1])

    def solution(self, bits: Bits, gap: float = 0.0) -> Solution:
        """Loss and costs of the bits of all variables, or one of each group of tied ones."""
        choice = {v: self.tables.options[v].index(bits[v]) for v in self.tables.options}
        costs = {name: cost.at(choice) for name, cost in self.tables.costs.items()}
        return Solution({v: bits[g] for v, g in self.group.items()}, self.tables.loss.at(choice), costs, gap)

    def reach(self, cost: str) -> Reach:
        bits = self.tables.least(cost)
        return Reach(self.solution(bits).costs[cost], self.tables.most(cost), self.solution(bits).bits)

    def least_beside(self, name: str, others: Mapping[str, float]) -> float:
        """The least of a cost while the limits of others are met; NaN if they cannot be."""
        cost, wanted = self.tables.costs[name], _wanted(self.tables, others)
        choice = {v: self.tables.options[v].index(b) for v, b in self.tables.least(name).items()}
        if not all(w.met(choice) for w in wanted):
            found = _Program(self.tables.options, cost, wanted).solve()
            if found is None:
                return math.nan
            choice = found.choice
        return cost.at(choice)


# ------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class _Form:
    """A sum of terms, one table a variable and one a pair of variables (in the order of the problem's variables)."""

    constant: float
    single: dict[str, Numbers]
    pairs: dict[tuple[str, str], Numbers]

    def at(self, choice: Mapping[str, int]) -> float:
        """Its value where variable v takes option ``choice[v]``."""
        values = [self.constant, *(t[choice[v]] for v, t in self.single.items())]
        return math.fsum([*values, *(t[choice[u], choice[v]] for (u, v), t in self.pairs.items())])

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> _Form:
        """The same with some options only; pairs with a variable that has one option left become single terms."""
        single = {v: t[keep[v]] for v, t in self.single.items()}
        pairs = {}
        for (u, v), table in self.pairs.items():
            cut = table[np.ix_(keep[u], keep[v])]
            if cut.shape[0] == 1:
                single[v] = single.get(v, 0.0) + cut[0]
            elif cut.shape[1] == 1:
                single[u] = single.get(u, 0.0) + cut[:, 0]
            else:
                pairs[u, v] = cut
        return _Form(self.constant, single, pairs)

    def shifted(self) -> _Form:
        """The same without constants: the least of every table is 0."""
        constant = self.constant + sum(float(t.min()) for t in [*self.single.values(), *self.pairs.values()])
        single = {v: t - t.min() for v, t in self.single.items()}
        return _Form(constant, single, {p: t - t.min() for p, t in self.pairs.items()})

    def most(self) -> float:
        """No smaller than any of its values; exact without pairs."""
        tables = [*self.single.values(), *self.pairs.values()]
        return math.fsum([self.constant, *(float(t.max()) for t in tables)])

    def negative(self) -> _Form:
        return _Form(-self.constant, {v: -t for v, t in self.single.items()}, {p: -t for p, t in self.pairs.items()})


@dataclass(frozen=True)
class _Sum:
    """What is common, and the largest of the rows: a cost or an objective."""

    common: _Form
    rows: tuple[_Form, ...] = ()

    @property
    def forms(self) -> tuple[_Form, ...]:
        return (self.common, *self.rows)

    def at(self, choice: Mapping[str, int]) -> float:
        return self.common.at(choice) + max((row.at(choice) for row in self.rows), default=0.0)

    def most(self) -> float:
        """No smaller than any of its values."""
        return self.common.most() + max((row.most() for row in self.rows), default=0.0)

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> _Sum:
        return _Sum(self.common.restricted(keep), tuple(row.restricted(keep) for row in self.rows))


@dataclass(frozen=True)
class _Tables:
    """A problem without ties, as arrays."""

    options: dict[str, tuple[int, ...]]
    loss: _Form
    costs: dict[str, _Sum]

    @staticmethod
    def of(problem: Problem) -> _Tables:
        order = {v: i for i, v in enumerate(problem.options)}
        costs = {
            name: _Sum(_form(cost.common, order), tuple(_form(row, order) for row in cost.rows))
            for name, cost in problem.costs.items()
        }
        return _Tables(dict(problem.options), _form(Row(problem.losses), order), costs)

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> _Tables:
        options = {v: tuple(o[i] for i in keep[v]) for v, o in self.options.items()}
        costs = {name: cost.restricted(keep) for name, cost in self.costs.items()}
        return _Tables(options, self.loss.restricted(keep), costs)

    def limited(self, names: Iterable[str]) -> _Tables:
        """With these costs only."""
        return replace(self, costs={name: self.costs[name] for name in names})

    def without_dominated(self) -> _Tables:
        """Without options to which another is better or equal in loss and every cost; of equal ones the first stays."""
        features: dict[str, list[Numbers]] = {v: [] for v in self.options}
        for form in [self.loss, *(form for cost in self.costs.values() for form in cost.forms)]:
            for v, table in form.single.items():
                features[v].append(table[None])
            for (u, v), table in form.pairs.items():
                features[u].append(table.T)
                features[v].append(table)
        return self.restricted({v: _undominated(f, len(self.options[v])) for v, f in features.items()})

    def bits(self, choice: Mapping[str, int]) -> Bits:
        return {v: o[choice[v]] for v, o in self.options.items()}

    def least(self, cost: str) -> Bits:
        """The bits with which a cost is least."""
        total = self.costs[cost]
        choice = _cheapest(self.options, total.forms)
        if not all(_is_least(form, choice) for form in total.forms):
            found = _Program(self.options, total, []).solve()
            assert found is not None
            choice = found.choice
        return self.bits(choice)

    def most(self, cost: str) -> float:
        """The most that a cost can be."""
        total = self.costs[cost]
        return max(self._most([total.common, row]) for row in total.rows or [_Form(0.0, {}, {})])

    def _most(self, forms: Sequence[_Form]) -> float:
        turned = [form.negative() for form in forms]
        choice = _cheapest(self.options, turned)
        if not all(_is_least(form, choice) for form in turned):
            found = _Program(self.options, _Sum(turned[0], tuple(turned[1:])), []).solve()
            assert found is not None
            choice = found.choice
        return sum(form.at(choice) for form in forms)


def _form(row: Row, order: Mapping[str, int]) -> _Form:
    single: dict[str, Numbers] = {}
    pairs: dict[tuple[str, str], Numbers] = {}
    for term in row.terms:
        values = np.asarray(term.values, dtype=np.float64)
        if len(term.variables) == 1:
            (v,) = term.variables
            single[v] = single[v] + values if v in single else values
            continue
        u, v = term.variables
        if order[u] > order[v]:
            u, v, values = v, u, values.T
        pairs[u, v] = pairs[u, v] + values if (u, v) in pairs else values
    everything = {v: np.arange(t.size) for v, t in single.items()}
    for (u, v), table in pairs.items():
        everything |= {u: np.arange(table.shape[0]), v: np.arange(table.shape[1])}
    return _Form(row.constant, single, pairs).restricted(everything)


def _undominated(features: list[Numbers], count: int) -> npt.NDArray[np.intp]:
    if not features:
        return np.arange(1)
    table = np.concatenate(features)
    beats = (table[:, :, None] <= table[:, None, :]).all(axis=0)  # [by, of]
    same = beats & beats.T
    lower = np.tri(count, k=-1, dtype=bool).T  # by < of
    return np.flatnonzero(~(beats & (~same | lower)).any(axis=0))


def _cheapest(options: Mapping[str, tuple[int, ...]], rows: Sequence[_Form]) -> dict[str, int]:
    """Options with the least sum over rows, each row measured by its own spread, tables of pairs by their means."""
    weights = {v: np.zeros(len(o)) for v, o in options.items()}
    for row in rows:
        spread = row.most() + row.negative().most() or 1.0
        for v, table in row.single.items():
            weights[v] += table / spread
        for (u, v), table in row.pairs.items():
            weights[u] += table.mean(axis=1) / spread
            weights[v] += table.mean(axis=0) / spread
    return {v: int(w.argmin()) for v, w in weights.items()}


def _is_least(row: _Form, choice: Mapping[str, int]) -> bool:
    """Whether each table is at its own least, so that the sum is."""
    return all(t[choice[v]] == t.min() for v, t in row.single.items()) and all(
        t[choice[u], choice[v]] == t.min() for (u, v), t in row.pairs.items()
    )


# ---------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class _Limit:
    cost: _Sum
    limit: float

    def met(self, choice: Mapping[str, int]) -> bool:
        return self.cost.at(choice) <= self.limit + 1e-12 * abs(self.limit)


@dataclass(frozen=True)
class _Found:
    choice: dict[str, int]
    bound: float
    """No solution has a smaller objective."""


def _minimise(tables: _Tables, limits: Mapping[str, float]) -> tuple[Bits, float] | None:
    """Bits of the least loss and the gap of their proof; None if none are within the limits."""
    affordable = _drop_unaffordable(tables, limits)
    if affordable is None:
        return None
    tables = affordable
    wanted = _wanted(tables, limits)
    choice = _cheapest(tables.options, _forms(wanted) or [tables.loss])
    best = tables.bits(choice) if all(w.met(choice) for w in wanted) else None
    for _ in range(2):  # the second time from a better solution, and so with a better scale
        if best is not None:
            tables, best = _drop_worse(tables, limits, best)
    known = _loss_at(tables, best)
    found = _Program(tables.options, _Sum(tables.loss), _wanted(tables, limits), known).solve()
    if found is None:
        return None if best is None or known is None else (best, _gap(known, tables.loss.shifted().constant))
    loss = tables.loss.at(found.choice)
    if best is None or known is None or loss <= known:
        return tables.bits(found.choice), _gap(loss, found.bound)
    return best, _gap(known, found.bound)


def _wanted(tables: _Tables, limits: Mapping[str, float]) -> list[_Limit]:
    return [_Limit(tables.costs[name], limit) for name, limit in limits.items()]


def _forms(wanted: Sequence[_Limit]) -> list[_Form]:
    return [form for w in wanted for form in w.cost.forms]


def _gap(loss: float, bound: float) -> float:
    gap = max(0.0, loss - bound) / max(abs(loss), 1e-300)
    return gap if gap > 1e-9 else 0.0


def _loss_at(tables: _Tables, bits: Bits | None) -> float | None:
    if bits is None:
        return None
    return tables.loss.at({v: tables.options[v].index(b) for v, b in bits.items()})


def _drop_unaffordable(tables: _Tables, limits: Mapping[str, float]) -> _Tables | None:
    """Without options that alone exceed what a limit leaves above the least; None if even the least exceeds it."""
    keep = {v: np.ones(len(o), dtype=bool) for v, o in tables.options.items()}
    for name, limit in limits.items():
        common, rows = tables.costs[name].common.shifted(), [row.shifted() for row in tables.costs[name].rows]
        room = limit - common.constant + 1e-12 * abs(limit)
        least = max((row.constant for row in rows), default=0.0)
        for rest, left in [(common, room - least), *((row, room - row.constant) for row in rows)]:
            if left < 0:
                return None
            for v, table in rest.single.items():
                keep[v] &= table <= left
            for (u, v), table in rest.pairs.items():
                keep[u] &= table.min(axis=1) <= left
                keep[v] &= table.min(axis=0) <= left
    if not all(k.any() for k in keep.values()):
        return None
    return tables.restricted({v: np.flatnonzero(k) for v, k in keep.items()})


def _drop_worse(tables: _Tables, limits: Mapping[str, float], best: Bits) -> tuple[_Tables, Bits]:
    """Without options that no solution better than ``best`` can take, and a better one if rounding finds it."""
    known = _loss_at(tables, best)
    assert known is not None
    rest = tables.loss.shifted()
    room = max(0.0, known - rest.constant) * (1 + 1e-9)
    tables = _keep(tables, {v: table <= room for v, table in rest.single.items()}, best)
    wanted = _wanted(tables, limits)
    relaxed = _Program(tables.options, _Sum(tables.loss), wanted, known).relax()
    if relaxed is None:
        return tables, best
    rounded = _rounded(tables, wanted, relaxed.shares)
    if rounded is not None and tables.loss.at(rounded) < known:
        best, known = tables.bits(rounded), tables.loss.at(rounded)
    room = (known - relaxed.bound) * (1 + 1e-6) + 1e-6 * relaxed.unit
    return _keep(tables, {v: reduced <= room for v, reduced in relaxed.reduced.items()}, best), best


def _keep(tables: _Tables, wanted: Mapping[str, npt.NDArray[np.bool_]], best: Bits) -> _Tables:
    """The tables with the options that are wanted, and those of the best solution."""
    keep = {}
    for v, options in tables.options.items():
        mask = wanted.get(v, np.ones(len(options), dtype=bool)).copy()
        mask[options.index(best[v])] = True
        keep[v] = np.flatnonzero(mask)
    return tables.restricted(keep)


def _rounded(tables: _Tables, wanted: Sequence[_Limit], shares: Mapping[str, Numbers]) -> dict[str, int] | None:
    """Whole choices near those of the linear program: the larger shares, else the cheapest where shares are divided."""
    choice = {v: int(s.argmax()) for v, s in shares.items()}
    divided = [v for v, s in shares.items() if s.max() < 1 - 1e-6]
    if all(w.met(choice) for w in wanted):
        return choice
    cheap = _cheapest(tables.options, _forms(wanted))
    choice |= {v: cheap[v] for v in divided}
    if not all(w.met(choice) for w in wanted):
        return None
    for v in divided:  # the best that fits, one after the other
        for option in np.argsort(tables.loss.single.get(v, np.zeros(len(shares[v]))), kind="stable"):
            trial = choice | {v: int(option)}
            if all(w.met(trial) for w in wanted):
                if tables.loss.at(trial) < tables.loss.at(choice):
                    choice = trial
                break
    return choice


@dataclass(frozen=True)
class _Relaxed:
    bound: float
    shares: dict[str, Numbers]
    reduced: dict[str, Numbers]
    """By how much the bound rises at least if the option is taken."""
    unit: float
    """What 1 of the scaled objective is."""


class _Program:
    """The integer program as a matrix.

    Columns are the options of the variables, the products of pairs, and for each sum with rows a column that is at
    least as large as every row.

    Args:
        options: of the variables that it decides.
        objective: what is minimised.
        wanted: limits.
        known: an objective that is reached; sets the scale.
    """

    def __init__(
        self,
        options: Mapping[str, tuple[int, ...]],
        objective: _Sum,
        wanted: Sequence[_Limit],
        known: float | None = None,
    ) -> None:
        self.options, self.objective = options, objective
        self.wanted = [w for w in wanted if w.cost.most() > w.limit]
        self.start: dict[Any, int] = {}
        count = 0
        for v, o in options.items():
            self.start[v] = count
            count += len(o)
        self.whole = count
        for u, v in dict.fromkeys(p for f in [*objective.forms, *_forms(self.wanted)] for p in f.pairs):
            self.start[u, v] = count
            count += len(options[u]) * len(options[v])
        self.largest = [count + i for i in range(1 + len(self.wanted))]  # of the objective's rows, of each limit's
        self.count = count + len(self.largest)
        self.upper = np.ones(self.count)
        self.upper[self.largest] = np.inf
        self.unit = self._scale(known)
        self.constant = objective.common.shifted().constant
        self.lines: list[tuple[npt.NDArray[np.intp], Numbers]] = []
        self.right: list[float] = []
        self.goal = self._goal()
        for w, column in zip(self.wanted, self.largest[1:], strict=True):
            self._limit(w, column)
        self.equal = self._equalities()

    def _scale(self, known: float | None) -> float:
        shifted = [form.shifted() for form in self.objective.forms]
        tables = [t for form in shifted for t in [*form.single.values(), *form.pairs.values()]]
        largest = max((float(t.max()) for t in tables), default=0.0)
        scale = largest if known is None else known - shifted[0].constant
        return (scale if scale > 0 else largest or 1.0) / LOSS_SCALE

    def _goal(self) -> Numbers:
        goal = self._vector(self.objective.common.shifted()) / self.unit
        if self.objective.rows:
            goal[self.largest[0]] = 1.0
            least = max(row.shifted().constant for row in self.objective.rows)
            self._rows(self.objective.rows, self.largest[0], 1 / self.unit, least)
        return goal

    def _limit(self, wanted: _Limit, column: int) -> None:
        """Adds the limit as rows, measured by what the limit leaves above the least."""
        common = wanted.cost.common.shifted()
        rows = [row for row in wanted.cost.rows if wanted.cost.common.most() + row.most() > wanted.limit]
        least = max((row.shifted().constant for row in wanted.cost.rows), default=0.0)
        left = max(0.0, wanted.limit - common.constant - least)
        scale = ROW_SCALE / (left or 1.0)
        vector = self._affordable(common, left) * scale
        for row in rows:
            self._affordable(row.shifted(), max(0.0, wanted.limit - common.constant - row.shifted().constant))
        if rows:
            vector[column] = 1.0
            self._rows(rows, column, scale, least)
        self._add(vector, ROW_SCALE if left else 0.0)

    def _affordable(self, form: _Form, left: float) -> Numbers:
        """The form as a row; what exceeds the limit alone is forbidden and stands as 0."""
        vector = self._vector(form)
        excess = vector > left * (1 + 1e-12)
        self.upper[excess] = 0.0
        vector[excess] = 0.0
        return vector

    def _rows(self, rows: Sequence[_Form], column: int, scale: float, least: float) -> None:
        """``column`` is at least each of the rows, less ``least``, in units of 1 / scale."""
        for row in rows:
            shifted = row.shifted()
            vector = self._vector(shifted) * scale
            vector[self.upper == 0] = 0.0
            vector[column] = -1.0
            self._add(vector, (least - shifted.constant) * scale)

    def _add(self, vector: Numbers, right: float) -> None:
        columns = np.flatnonzero(vector)
        if len(columns):
            self.lines.append((columns, vector[columns]))
            self.right.append(right)

    def _vector(self, form: _Form) -> Numbers:
        vector = np.zeros(self.count)
        for where, table in [*form.single.items(), *form.pairs.items()]:
            vector[self.start[where] : self.start[where] + table.size] = table.ravel()
        return vector

    def _equalities(self) -> tuple[sparse.csr_array, Numbers]:
        rows: list[tuple[npt.NDArray[np.intp], Numbers]] = []
        right = []
        for v, o in self.options.items():
            rows.append((self.start[v] + np.arange(len(o)), np.ones(len(o))))
            right.append(1.0)
        for key, start in self.start.items():
            if not isinstance(key, tuple):
                continue
            u, v = key
            cells = start + np.arange(len(self.options[u]) * len(self.options[v])).reshape(len(self.options[u]), -1)
            for variable, lines in ((u, cells), (v, cells.T)):
                for option, line in enumerate(lines):
                    columns = np.append(line, self.start[variable] + option)
                    rows.append((columns, np.append(np.ones(line.size), -1.0)))
                    right.append(0.0)
        return self._sparse(rows), np.array(right)

    def _sparse(self, rows: Sequence[tuple[npt.NDArray[np.intp], Numbers]]) -> sparse.csr_array:
        if not rows:
            return sparse.csr_array((0, self.count))
        ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        data, columns = np.concatenate([r[1] for r in rows]), np.concatenate([r[0] for r in rows])
        return sparse.csr_array((data, columns, ends), shape=(len(rows), self.count))

    def _shares(self, x: Numbers) -> dict[str, Numbers]:
        return {v: x[self.start[v] : self.start[v] + len(o)] for v, o in self.options.items()}

    def relax(self) -> _Relaxed | None:
        """The linear program: a bound, how far options are taken, and what taking them must cost."""
        limits = {"A_ub": self._sparse(self.lines), "b_ub": np.array(self.right)} if self.lines else {}
        bounds = np.column_stack([np.zeros(self.count), np.where(self.upper == 0, 0.0, np.inf)])
        found = linprog(self.goal, A_eq=self.equal[0], b_eq=self.equal[1], bounds=bounds, method="highs", **limits)
        if found.status != 0:
            return None
        reduced = np.where(self.upper == 0, np.inf, found.lower.marginals * self.unit)
        bound = found.fun * self.unit + self.constant
        return _Relaxed(bound, self._shares(found.x), self._shares(reduced), self.unit)

    def solve(self) -> _Found | None:
        """The best choice; None if there is none, or none was found.

        Raises:
            BitwrightError: HiGHS failed.
        """
        whole = np.zeros(self.count)
        whole[: self.whole] = 1
        right = np.array(self.right)
        for _ in range(RETRIES):
            found = self._search(whole, right)
            if found.x is None:
                if found.status in {_INFEASIBLE, _STOPPED}:
                    return None
                raise BitwrightError(f"HiGHS could not solve the integer program ({found.message}).")
            choice = {v: int(s.argmax()) for v, s in self._shares(found.x).items()}
            if all(w.met(choice) for w in self.wanted):
                bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
                return _Found(choice, bound * self.unit + self.constant)
            right = right - np.where(right == ROW_SCALE, 1e-5, 0.0)  # within HiGHS's tolerance, yet over the limit
        return None

    def _search(self, whole: Numbers, right: Numbers) -> Any:
        constraints = [LinearConstraint(self.equal[0], self.equal[1], self.equal[1])]
        if self.lines:
            constraints.append(LinearConstraint(self._sparse(self.lines), -np.inf, right))
        with _quiet_stdout(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return milp(
                self.goal,
                constraints=constraints,
                integrality=whole,
                bounds=Bounds(0, self.upper),
                options={"mip_rel_gap": 0, "node_limit": NODES},
            )


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS leaves lines of its own on the process's standard output, where ``--json`` promises one object."""
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


# -------------------------------------------------------------------------------------------- ties and messages


def _merge_ties(problem: Problem) -> tuple[Problem, dict[str, str]]:
    """The problem with one variable for each group of tied ones, and the group's variable for each of them."""
    leader = {v: v for v in problem.options}
    for tie in problem.ties:
        members = {leader[v] for v in tie}
        first = min(members, key=list(problem.options).index)
        leader = {v: first if g in members else g for v, g in leader.items()}
    options: dict[str, tuple[int, ...]] = {}
    for v, g in leader.items():
        known = options.get(g)
        options[g] = problem.options[v] if known is None else tuple(b for b in known if b in problem.options[v])
        if not options[g]:
            raise UsageError(
                f"{_label(problem, g)} and {_label(problem, v)} are tied, and no number of bits suits both."
            )
    if len(options) == len(leader):
        return problem, leader
    pick = {v: [problem.options[v].index(b) for b in options[g]] for v, g in leader.items()}

    def moved(term: Term) -> Term:
        values = np.asarray(term.values, dtype=np.float64)[np.ix_(*(pick[v] for v in term.variables))]
        groups = tuple(leader[v] for v in term.variables)
        if len(groups) == 2 and groups[0] == groups[1]:
            return Term(groups[:1], np.diagonal(values))
        return Term(groups, values)

    costs = {
        name: replace(
            cost,
            common=replace(cost.common, terms=tuple(map(moved, cost.common.terms))),
            rows=tuple(replace(row, terms=tuple(map(moved, row.terms))) for row in cost.rows),
        )
        for name, cost in problem.costs.items()
    }
    return replace(problem, options=options, losses=tuple(map(moved, problem.losses)), costs=costs, ties=()), leader


def _check_terms(problem: Problem) -> None:
    rows = [row for cost in problem.costs.values() for row in (cost.common, *cost.rows)]
    for term in [*problem.losses, *(term for row in rows for term in row.terms)]:
        shape = tuple(len(problem.options[v]) for v in term.variables)
        values = np.asarray(term.values, dtype=np.float64)
        if values.shape != shape or not np.isfinite(values).all():
            names = ", ".join(_label(problem, v) for v in term.variables)
            raise UsageError(f"Expected finite numbers {shape} for {names}, found {values.tolist()}.")


def _label(problem: Problem, variable: str) -> str:
    return problem.labels.get(variable, variable)


def _explain(prepared: _Prepared, limits: Mapping[str, float]) -> str:
    """One line: what is reachable, and where most of the least is."""
    costs = prepared.problem.costs
    reach = {name: prepared.reach(name) for name in limits}
    spans = {n: f"{amount(r.least, costs[n].unit)} to {amount(r.most, costs[n].unit)}" for n, r in reach.items()}
    alone = [name for name, limit in limits.items() if reach[name].least > limit * (1 + 1e-12)]
    if alone:
        parts = [
            f"at most {amount(limits[n], costs[n].unit)} of {_words(n)}, reachable are {spans[n]} "
            f"(the least is mostly {_binding(prepared, n, reach[n].bits)})"
            for n in alone
        ]
        return f"Expected {'; and '.join(parts)}. Raise the limit, or allow fewer bits."
    parts = []
    for name, limit in limits.items():
        if reach[name].most <= limit:
            continue
        beside = prepared.least_beside(name, {k: v for k, v in limits.items() if k != name})
        more = "" if math.isnan(beside) else f", beside the others at least {amount(beside, costs[name].unit)}"
        parts.append(
            f"{_words(name)} at most {amount(limit, costs[name].unit)} (alone {spans[name]}{more}; mostly "
            f"{_binding(prepared, name, reach[name].bits)})"
        )
    return f"These limits cannot be met together: {'; '.join(parts)}. Raise one of them."


def _binding(prepared: _Prepared, cost: str, bits: Bits) -> str:
    """The variables that most of a cost comes from."""
    problem, total = prepared.problem, prepared.tables.costs[cost]
    choice = {v: o.index(bits[v]) for v, o in prepared.tables.options.items()}
    shares: dict[str, float] = {}
    for form in (total.common, *sorted(total.rows, key=lambda row: -row.at(choice))[:1]):
        for v, table in form.single.items():
            shares[v] = shares.get(v, 0.0) + float(table[choice[v]])
        for (u, v), table in form.pairs.items():
            shares[u] = shares.get(u, 0.0) + float(table[choice[u], choice[v]])
    named = sorted(shares, key=lambda v: -shares[v])[:SHOWN]
    if not named:
        return "what nothing can change"
    return ", ".join(
        f"{_label(problem, v)} at {bits[v]} bits{' (fixed)' if len(problem.options[v]) == 1 else ''} "
        f"{amount(shares[v], problem.costs[cost].unit)}"
        for v in named
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def amount(value: float, unit: str) -> str:
    """A number as people read it, rounded up to four digits, so that it can be given as a limit.

    Example:
        >>> amount(1203410, "B"), amount(900, "B"), amount(0.00125, "s")
        ('1.204 MB', '900 B', '1.25 ms')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".rstrip()
    exponent = math.floor(math.log10(abs(value)) / 3)
    exponent = min(max(exponent, -3 if unit == "s" else 0), 5)
    digits = max(0, 3 - math.floor(math.log10(abs(value) / 1000.0**exponent)))
    scaled = value / 1000.0**exponent
    rounded = math.ceil(round(scaled * 10**digits, 6)) / 10**digits
    prefix = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[exponent]
    return f"{rounded:g} {prefix}{unit}".rstrip()
