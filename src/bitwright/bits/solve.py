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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitwright.bits.one_limit import OneLimit
from bitwright.bits.program import Limit, Program, forms_of
from bitwright.bits.tables import Assignment, Form, Numbers, Problem, Stack, Sum, Tables, Term, cheapest, is_least
from bitwright.errors import UsageError
from bitwright.words import amount

SHOWN = 3


@dataclass(frozen=True)
class Solution:
    """The bits of every variable, their loss, and what they cost, limited or not."""

    bits: Assignment
    loss: float
    costs: dict[str, float]
    gap: float = 0.0
    """Largest share of the loss by which another solution could be better; 0 if this one is proven best."""


@dataclass(frozen=True)
class CostRange:
    """What a cost can be."""

    least: float
    most: float
    bits: Assignment
    """The bits that make the cost least."""


def solve(problem: Problem, limits: Mapping[str, float] | None = None) -> Solution:
    """The bits with the least loss whose costs are within the limits. The same call gives the same bits.

    Among equal losses an option is preferred that is cheaper in everything.

    Args:
        problem: losses and costs.
        limits: largest value allowed, by the cost's name; none limits nothing.

    Raises:
        UsageError: no choice meets the limits. The line names what is reachable and the variables that bind.
    """
    return Solver(problem).solve(dict(limits or {}))


def solution_of(problem: Problem, bits: Mapping[str, int]) -> Solution:
    """Loss and costs of given bits."""
    return Solver(problem).solution_of(bits)


def pareto(
    problem: Problem,
    cost: str,
    *,
    budgets: Sequence[float] | None = None,
    count: int = 21,
    limits: Mapping[str, float] | None = None,
) -> list[Solution]:
    """The least loss for each budget of one cost; see :meth:`Solver.pareto`."""
    return Solver(problem).pareto(cost, budgets=budgets, count=count, limits=limits)


def reachable(problem: Problem) -> dict[str, CostRange]:
    """The least and the most that each cost can be, each for itself."""
    return Solver(problem).reachable()


class Solver:
    """A problem, checked and read once, for all that is asked about it.

    Args:
        problem: losses and costs.

    Raises:
        UsageError: tied variables have no number of bits in common, or a term has not as many numbers as options.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.check({})
        _check_terms(problem)
        merged, self.group = _merge_ties(problem)
        self.tables = Tables.of(merged)
        self.reduced = self.tables.without_dominated()
        self.limited: dict[tuple[str, ...], Tables] = {}

    def check(self, limits: Mapping[str, float]) -> None:
        """Refuses a limit of what is no cost, and one that is no number."""
        for name, limit in limits.items():
            if name not in self.problem.costs:
                raise UsageError(f"Expected a limit of {', '.join(self.problem.costs)}, found '{name}'.")
            if math.isnan(limit):
                raise UsageError(f"Expected a number as the limit of {name}, found nan.")

    def solve(self, limits: Mapping[str, float], start: Assignment | None = None) -> Solution:
        """The bits with the least loss within the limits; :func:`solve` says more.

        Args:
            limits: largest values.
            start: bits that are within them, if some are known.
        """
        self.check(limits)
        names = tuple(limits)
        if names not in self.limited:
            self.limited[names] = self.reduced.limited(names).without_dominated()
        found = _minimise(self.limited[names], limits, start)
        if found is None:
            raise UsageError(_explain(self, limits))
        return self.solution(found[0], found[1])

    def pareto(
        self,
        cost: str,
        *,
        budgets: Sequence[float] | None = None,
        count: int = 21,
        limits: Mapping[str, float] | None = None,
    ) -> list[Solution]:
        """The least loss for each budget of one cost, cheapest first; a larger budget never loses more.

        Args:
            cost: what the budgets limit.
            budgets: to solve for; ``count`` evenly spaced ones, from the least that is reachable to what the solution
                without this limit costs, if not given.
            count: of budgets.
            limits: of the other costs.

        Raises:
            UsageError: a budget is below what is reachable, or the other limits cannot be met.
        """
        others = {name: limit for name, limit in (limits or {}).items() if name != cost}
        self.check({**others, cost: 0.0})
        if budgets is None:
            most = self.solve(others).costs[cost]
            budgets = [*np.linspace(self.least_beside(cost, others), most, max(count, 2))[:-1], most]
        curve: list[Solution] = []
        for budget in sorted(budgets):
            found = self.solve({**others, cost: float(budget)}, curve[-1].bits if curve else None)
            curve.append(curve[-1] if curve and curve[-1].loss <= found.loss else found)
        return curve

    def reachable(self) -> dict[str, CostRange]:
        """The least and the most that each cost can be, each for itself."""
        return {name: self.reach(name) for name in self.problem.costs}

    def solution_of(self, bits: Mapping[str, int]) -> Solution:
        """Loss and costs of given bits."""
        return self.solution({v: bits[v] for v in self.problem.options})

    def solution(self, bits: Assignment, gap: float = 0.0) -> Solution:
        """Loss and costs of the bits of all variables, or one of each group of tied ones."""
        choice = {v: self.tables.options[v].index(bits[v]) for v in self.tables.options}
        costs = {name: cost.at(choice) for name, cost in self.tables.costs.items()}
        return Solution({v: bits[g] for v, g in self.group.items()}, self.tables.loss.at(choice), costs, gap)

    def reach(self, cost: str) -> CostRange:
        """What a cost can be."""
        bits = least_bits(self.tables, cost)
        return CostRange(self.solution(bits).costs[cost], most_of(self.tables, cost), self.solution(bits).bits)

    def least_beside(self, name: str, others: Mapping[str, float]) -> float:
        """The least of a cost while the limits of others are met; NaN if they cannot be."""
        cost, wanted = self.tables.costs[name], _wanted(self.tables, others)
        choice = {v: self.tables.options[v].index(b) for v, b in least_bits(self.tables, name).items()}
        if not all(w.met(choice) for w in wanted):
            found = Program(self.tables.options, cost, wanted).solve()
            if found is None:
                return math.nan
            choice = found.choice
        return cost.at(choice)


def least_bits(tables: Tables, cost: str) -> Assignment:
    """The bits with which a cost is least."""
    total = tables.costs[cost]
    choice = cheapest(tables, total.forms)
    if not all(is_least(form, choice) for form in total.forms):
        found = Program(tables.options, total, []).solve()
        assert found is not None
        choice = found.choice
    return tables.bits(choice)


def most_of(tables: Tables, cost: str) -> float:
    """The most that a cost can be."""
    total = tables.costs[cost]
    return max(_most(tables, [total.common, row]) for row in total.rows or [Form(0.0, {}, {})])


def _most(tables: Tables, forms: Sequence[Form]) -> float:
    turned = [form.negative() for form in forms]
    choice = cheapest(tables, turned)
    if not all(is_least(form, choice) for form in turned):
        found = Program(tables.options, Sum(turned[0], tuple(turned[1:])), []).solve()
        assert found is not None
        choice = found.choice
    return sum(form.at(choice) for form in forms)


def _minimise(
    tables: Tables, limits: Mapping[str, float], start: Assignment | None = None
) -> tuple[Assignment, float] | None:
    """Bits of the least loss and the gap of their proof; None if none are within the limits.

    Args:
        tables: losses and costs.
        limits: largest values.
        start: bits that are within them; a good solution saves a round of the linear program.
    """
    affordable = _drop_unaffordable(tables, limits)
    if affordable is None:
        return None
    tables = affordable
    wanted = _wanted(tables, limits)
    choice = cheapest(tables, forms_of(wanted) or [tables.loss])
    best = tables.bits(choice) if all(w.met(choice) for w in wanted) else None
    good = None if start is None else _affordable(tables, wanted, start)
    best = good or best
    for _ in range(1 if good else 2):  # the second time from a better solution, and so with a better scale
        if best is not None:
            tables, best = _drop_worse(tables, limits, best)
    known = _loss_at(tables, best)
    found = Program(tables.options, Sum(tables.loss), _wanted(tables, limits), known).solve()
    if found is None:
        return None if best is None or known is None else (best, _gap(known, tables.loss.shifted().constant))
    loss = tables.loss.at(found.choice)
    if best is None or known is None or loss <= known:
        return tables.bits(found.choice), _gap(loss, found.bound)
    return best, _gap(known, found.bound)


def _affordable(tables: Tables, wanted: Sequence[Limit], bits: Assignment) -> Assignment | None:
    """These bits of the variables there are, if the tables have them and they are within the limits."""
    if not all(bits[v] in options for v, options in tables.options.items()):
        return None
    choice = {v: options.index(bits[v]) for v, options in tables.options.items()}
    return {v: bits[v] for v in tables.options} if all(w.met(choice) for w in wanted) else None


def _wanted(tables: Tables, limits: Mapping[str, float]) -> list[Limit]:
    return [Limit(tables.costs[name], limit) for name, limit in limits.items()]


def _gap(loss: float, bound: float) -> float:
    gap = max(0.0, loss - bound) / max(abs(loss), 1e-300)
    return gap if gap > 1e-9 else 0.0


def _loss_at(tables: Tables, bits: Assignment | None) -> float | None:
    if bits is None:
        return None
    return tables.loss.at({v: tables.options[v].index(b) for v, b in bits.items()})


def _drop_unaffordable(tables: Tables, limits: Mapping[str, float]) -> Tables | None:
    """Without options that alone exceed what a limit leaves above the least; None if even the least exceeds it."""
    keep = _everything(tables)
    for name, limit in limits.items():
        common, rows = tables.costs[name].common.shifted(), [row.shifted() for row in tables.costs[name].rows]
        room = limit - common.constant + 1e-12 * abs(limit)
        least = max((row.constant for row in rows), default=0.0)
        for rest, left in [(common, room - least), *((row, room - row.constant) for row in rows)]:
            if left < 0:
                return None
            keep[rest.stack.columns(tables.start)] &= rest.stack.values <= left
            for (u, v), table in rest.pairs.items():
                keep[tables.start[u] :][: table.shape[0]] &= table.min(axis=1) <= left
                keep[tables.start[v] :][: table.shape[1]] &= table.min(axis=0) <= left
    starts = np.fromiter(tables.start.values(), np.intp, len(tables.start))
    return tables.kept(keep) if np.logical_or.reduceat(keep, starts).all() else None


def _drop_worse(tables: Tables, limits: Mapping[str, float], best: Assignment) -> tuple[Tables, Assignment]:
    """Without options that no solution better than ``best`` can take, and a better one if rounding finds it."""
    known = _loss_at(tables, best)
    assert known is not None
    rest = tables.loss.shifted()
    room = max(0.0, known - rest.constant) * (1 + 1e-9)
    keep = _everything(tables)
    keep[rest.stack.columns(tables.start)] = rest.stack.values <= room
    tables = _keep(tables, keep, best)
    looked = _looked_at(tables, _wanted(tables, limits), known)
    if looked is None:
        return tables, best
    if looked.choice is not None and tables.loss.at(looked.choice) < known:
        best, known = tables.bits(looked.choice), tables.loss.at(looked.choice)
    room = (known - looked.bound) * (1 + 1e-6) + looked.tolerance
    return _keep(tables, looked.rises <= room, best), best


@dataclass(frozen=True)
class _Looked:
    """What the problem without whole choices says."""

    bound: float
    rises: Numbers
    """Least rise of the bound if an option is taken, for the options of all variables."""
    choice: dict[str, int] | None
    """A good choice within the limits, if one was found."""
    tolerance: float
    """How exact bound and rises are."""


def _looked_at(tables: Tables, wanted: Sequence[Limit], known: float) -> _Looked | None:
    one = OneLimit.of(tables, wanted)
    if one is not None:
        found = one.bounded()
        choice = one.choice(one.exchanged(found.taken))
        tolerance = 1e-9 * (known - tables.loss.shifted().constant)
        return _Looked(found.bound, found.rises, choice if wanted[0].met(choice) else None, tolerance)
    relaxed = Program(tables.options, Sum(tables.loss), wanted, known).relax()
    if relaxed is None:
        return None
    rises, reduced = np.zeros(sum(map(len, tables.options.values()))), Stack(relaxed.reduced)
    rises[reduced.columns(tables.start)] = reduced.values
    return _Looked(relaxed.bound, rises, _rounded(tables, wanted, relaxed.shares), 1e-6 * relaxed.unit)


def _everything(tables: Tables) -> npt.NDArray[np.bool_]:
    """A mask over the options of all variables that keeps each."""
    return np.ones(sum(map(len, tables.options.values())), dtype=np.bool_)


def _keep(tables: Tables, mask: npt.NDArray[np.bool_], best: Assignment) -> Tables:
    """The tables with the options that are wanted, and those of the best solution."""
    mask[[start + tables.options[v].index(best[v]) for v, start in tables.start.items()]] = True
    return tables.kept(mask)


def _rounded(tables: Tables, wanted: Sequence[Limit], shares: Mapping[str, Numbers]) -> dict[str, int] | None:
    """Whole choices near those of the linear program: the larger shares, else the cheapest where shares are divided."""
    choice = dict.fromkeys(tables.options, 0) | {v: int(s.argmax()) for v, s in shares.items()}
    divided = [v for v, most in zip(shares, Stack(shares).most().tolist(), strict=True) if most < 1 - 1e-6]
    if all(w.met(choice) for w in wanted):
        return choice
    cheap = cheapest(tables, forms_of(wanted))
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


def _explain(prepared: Solver, limits: Mapping[str, float]) -> str:
    """One line: what is reachable, and where most of the least is."""
    costs = prepared.problem.costs
    reach = {name: prepared.reach(name) for name in limits}
    spans = {n: f"{amount(r.least, costs[n].unit)} to {amount(r.most, costs[n].unit)}" for n, r in reach.items()}
    alone = [name for name, limit in limits.items() if reach[name].least > limit * (1 + 1e-12)]
    if alone:
        parts = [
            f"at most {amount(limits[n], costs[n].unit)}{_of(n, costs[n].unit)}, reachable are {spans[n]} "
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


def _binding(prepared: Solver, cost: str, bits: Assignment) -> str:
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


def _of(name: str, unit: str) -> str:
    """What there is an amount of, unless its unit says so."""
    return "" if unit.strip() == _words(name) else f" of {_words(name)}"


def _words(name: str) -> str:
    return name.replace("_", " ")
