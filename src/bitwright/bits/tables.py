"""A problem of choices as data, and as arrays: sums of numbers by option, and by pairs of options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Assignment = dict[str, int]


@dataclass(frozen=True)
class Term:
    """What choices add to a sum: a number for each option of a variable, or each pair of options of two.

    Example: ``Term(("w",), [10.0, 20.0])`` adds 20 if ``w`` takes its second option; ``Term(("w", "a"), table)`` adds
    ``table[i, j]`` if ``w`` takes option i and ``a`` option j.
    """

    variables: tuple[str, ...]
    values: Any


@dataclass(frozen=True)
class TermSum:
    """A sum of terms."""

    terms: tuple[Term, ...]
    constant: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Something that can be limited: what is common, and the largest of the rows.

    Example: a file's bytes are common terms and no rows; peak memory has a row for each step; the bytes of both
    together have the first as common terms, the second as rows.
    """

    common: TermSum
    rows: tuple[TermSum, ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class Problem:
    """Variables with their options, losses to minimise, costs to limit.

    Invariants: values of a term are finite and have an element for each option, or pair of options, of its variables.

    Example:
        >>> from bitwright.bits import solve
        >>> loss = (Term(("a",), [4.0, 1.0]), Term(("b",), [3.0, 0.0]))
        >>> size = Cost(TermSum((Term(("a",), [40, 80]), Term(("b",), [10, 20]))), unit="B")
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


class Stack:
    """Tables one after another in one array, so that a step over all of them is one step of NumPy.

    Example: of ``{"a": [4.0, 1.0], "b": [3.0]}`` the values are [4.0, 1.0, 3.0], the starts [0, 2], the sizes [2, 1].
    """

    def __init__(self, tables: Mapping[Any, Numbers]) -> None:
        self.shapes = {where: table.shape for where, table in tables.items()}
        self.sizes = np.array([table.size for table in tables.values()], dtype=np.intp)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.values = np.concatenate([t.ravel() for t in tables.values()]) if tables else np.zeros(0)

    def least(self) -> Numbers:
        """The least of each table."""
        return np.minimum.reduceat(self.values, self.starts) if self.shapes else self.values

    def most(self) -> Numbers:
        """The largest of each table."""
        return np.maximum.reduceat(self.values, self.starts) if self.shapes else self.values

    def split(self, values: npt.NDArray[Any]) -> dict[Any, npt.NDArray[Any]]:
        """Tables of these values instead, which are as many."""
        places = zip(self.shapes.items(), self.starts.tolist(), self.sizes.tolist(), strict=True)
        return {
            where: values[start : start + size] if len(shape) == 1 else values[start : start + size].reshape(shape)
            for (where, shape), start, size in places
        }

    def columns(self, start: Mapping[Any, int]) -> npt.NDArray[np.intp]:
        """Where the values go if each table begins where ``start`` says."""
        begin = np.fromiter((start[where] for where in self.shapes), np.intp, len(self.shapes))
        return np.repeat(begin - self.starts, self.sizes) + np.arange(self.values.size)


@dataclass(frozen=True)
class Form:
    """A sum of terms, one table a variable and one a pair of variables (in the order of the problem's variables).

    Tables are never changed.
    """

    constant: float
    single: dict[str, Numbers]
    pairs: dict[tuple[str, str], Numbers]

    def at(self, choice: Mapping[str, int]) -> float:
        """Its value where variable v takes option ``choice[v]``."""
        values = [self.constant, *(t[choice[v]] for v, t in self.single.items())]
        return math.fsum([*values, *(t[choice[u], choice[v]] for (u, v), t in self.pairs.items())])

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> Form:
        """The same with some options only; pairs with a variable that has one option left become single terms.

        The numbers of a variable stay as they are where all of its options are kept, each once and in their order.
        """
        single = {v: t if len(keep[v]) == t.size else t[keep[v]] for v, t in self.single.items()}
        pairs = {}
        for (u, v), table in self.pairs.items():
            whole = table.shape == (len(keep[u]), len(keep[v]))
            cut = table if whole else table[np.ix_(keep[u], keep[v])]
            if cut.shape[0] == 1:
                single[v] = single.get(v, 0.0) + cut[0]
            elif cut.shape[1] == 1:
                single[u] = single.get(u, 0.0) + cut[:, 0]
            else:
                pairs[u, v] = cut
        return Form(self.constant, single, pairs)

    def folded(self) -> Form:
        """The same with what has one option as part of the constant."""
        fixed = [float(t[0]) for t in self.single.values() if t.size == 1]
        return Form(
            math.fsum([self.constant, *fixed]), {v: t for v, t in self.single.items() if t.size > 1}, self.pairs
        )

    @cached_property
    def stack(self) -> Stack:
        """The tables of single variables."""
        return Stack(self.single)

    @cached_property
    def pair_stack(self) -> Stack:
        """Those of pairs."""
        return Stack(self.pairs)

    def shifted(self) -> Form:
        """The same without constants: the least of every table is 0."""
        stacks = self.stack, self.pair_stack
        least = [stack.least() for stack in stacks]
        moved = [
            stack.split(stack.values - np.repeat(each, stack.sizes)) for stack, each in zip(stacks, least, strict=True)
        ]
        return Form(self.constant + sum([*least[0].tolist(), *least[1].tolist()]), moved[0], moved[1])

    def most(self) -> float:
        """No smaller than any of its values; exact without pairs."""
        return math.fsum([self.constant, *self.stack.most().tolist(), *self.pair_stack.most().tolist()])

    def negative(self) -> Form:
        """The same with the opposite sign."""
        return Form(-self.constant, {v: -t for v, t in self.single.items()}, {p: -t for p, t in self.pairs.items()})


@dataclass(frozen=True)
class Sum:
    """What is common, and the largest of the rows: a cost or an objective."""

    common: Form
    rows: tuple[Form, ...] = ()

    @property
    def forms(self) -> tuple[Form, ...]:
        """All of its parts."""
        return (self.common, *self.rows)

    @cached_property
    def _open(self) -> tuple[tuple[Form, ...], list[float]]:
        """The rows that choices change, and the values of the others."""
        free = tuple(row for row in self.rows if row.pairs or any(t.size > 1 for t in row.single.values()))
        fixed = [row for row in self.rows if not row.pairs and all(t.size == 1 for t in row.single.values())]
        return free, [row.at(dict.fromkeys(row.single, 0)) for row in fixed]

    def at(self, choice: Mapping[str, int]) -> float:
        """Its value where variable v takes option ``choice[v]``."""
        free, fixed = self._open
        return self.common.at(choice) + max([*fixed, *(row.at(choice) for row in free)], default=0.0)

    def most(self) -> float:
        """No smaller than any of its values."""
        return self.common.most() + max((row.most() for row in self.rows), default=0.0)

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> Sum:
        """The same with some options only."""
        return Sum(self.common.restricted(keep), tuple(row.restricted(keep) for row in self.rows)).folded()

    def folded(self) -> Sum:
        """The same with what has one option as part of the constants."""
        return Sum(self.common.folded(), tuple(row.folded() for row in self.rows))


@dataclass(frozen=True)
class Tables:
    """A problem without ties, as arrays."""

    options: dict[str, tuple[int, ...]]
    loss: Form
    costs: dict[str, Sum]

    @staticmethod
    def of(problem: Problem) -> Tables:
        """The problem's numbers; ties are for the caller to merge first."""
        order = {v: i for i, v in enumerate(problem.options)}
        costs = {
            name: Sum(form_of(cost.common, order), tuple(form_of(row, order) for row in cost.rows))
            for name, cost in problem.costs.items()
        }
        return Tables(dict(problem.options), form_of(TermSum(problem.losses), order), costs)

    @cached_property
    def start(self) -> dict[str, int]:
        """Where the options of each variable begin in an array over the options of all."""
        starts = itertools.accumulate((len(o) for o in self.options.values()), initial=0)
        return dict(zip(self.options, starts, strict=False))  # the last one is where all end

    def kept(self, mask: npt.NDArray[np.bool_]) -> Tables:
        """The same with the options that a mask over all of them keeps, at least one of each variable."""
        if mask.all():
            return self
        starts = np.fromiter(self.start.values(), np.intp, len(self.start))
        sizes = np.diff(starts, append=mask.size)
        places = (np.arange(mask.size) - np.repeat(starts, sizes))[mask]
        ends = np.cumsum(np.add.reduceat(mask, starts, dtype=np.intp)).tolist()
        return self.restricted(
            {v: places[begin:end] for v, begin, end in zip(self.options, [0, *ends[:-1]], ends, strict=True)}
        )

    def restricted(self, keep: Mapping[str, npt.NDArray[np.intp]]) -> Tables:
        """The same with some options only."""
        options = {v: o if len(keep[v]) == len(o) else tuple(o[i] for i in keep[v]) for v, o in self.options.items()}
        costs = {name: cost.restricted(keep) for name, cost in self.costs.items()}
        return Tables(options, self.loss.restricted(keep).folded(), costs)

    def limited(self, names: Iterable[str]) -> Tables:
        """With these costs only."""
        return replace(self, costs={name: self.costs[name] for name in names})

    def without_dominated(self) -> Tables:
        """Without options to which another is better or equal in loss and every cost; of equal ones the first stays."""
        features: dict[str, list[Numbers]] = {v: [] for v in self.options}
        for form in [self.loss, *(form for cost in self.costs.values() for form in cost.forms)]:
            for v, table in form.single.items():
                features[v].append(table[None])
            for (u, v), table in form.pairs.items():
                features[u].append(table.T)
                features[v].append(table)
        return self.restricted({v: _undominated(f, len(self.options[v])) for v, f in features.items()})

    def bits(self, choice: Mapping[str, int]) -> Assignment:
        """The bits of chosen options."""
        return {v: o[choice[v]] for v, o in self.options.items()}


def form_of(row: TermSum, order: Mapping[str, int]) -> Form:
    """A row's terms, those over the same variables added up."""
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
    return Form(row.constant, single, pairs).restricted(everything)


def _undominated(features: list[Numbers], count: int) -> npt.NDArray[np.intp]:
    if not features:
        return np.arange(1)
    table = np.concatenate(features)
    beats = (table[:, :, None] <= table[:, None, :]).all(axis=0)  # [by, of]
    same = beats & beats.T
    lower = np.tri(count, k=-1, dtype=bool).T  # by < of
    return np.flatnonzero(~(beats & (~same | lower)).any(axis=0))


def cheapest(tables: Tables, rows: Sequence[Form]) -> dict[str, int]:
    """Options with the least sum over rows, each row measured by its own spread, tables of pairs by their means."""
    weights = np.zeros(sum(map(len, tables.options.values())))
    for row in rows:
        spread = row.most() + row.negative().most() or 1.0
        weights[row.stack.columns(tables.start)] += row.stack.values / spread
        for (u, v), table in row.pairs.items():
            weights[tables.start[u] :][: table.shape[0]] += table.mean(axis=1) / spread
            weights[tables.start[v] :][: table.shape[1]] += table.mean(axis=0) / spread
    return {v: int(weights[start : start + len(tables.options[v])].argmin()) for v, start in tables.start.items()}


def is_least(row: Form, choice: Mapping[str, int]) -> bool:
    """Whether each table is at its own least, so that the sum is."""
    return all(t[choice[v]] == t.min() for v, t in row.single.items()) and all(
        t[choice[u], choice[v]] == t.min() for (u, v), t in row.pairs.items()
    )
