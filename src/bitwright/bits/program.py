"""The integer program as a matrix, for HiGHS.

SciPy is imported when there is a program to solve: most runs have none, and it takes a quarter of a second.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitwright.bits.tables import Form, Numbers, Sum
from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from scipy import sparse

NODES = 20_000
"""Most nodes of the search tree; a limit in seconds would make the result depend on the machine."""
ROW_SCALE = 1e6
"""Right-hand side of a scaled row: HiGHS's tolerance of 1e-6 is then one part in 1e12."""
LOSS_SCALE = 1e4
RETRIES = 4
_INFEASIBLE, _STOPPED = 2, 1


@dataclass(frozen=True)
class Limit:
    """The most that a cost may be."""

    cost: Sum
    limit: float

    def met(self, choice: Mapping[str, int]) -> bool:
        """Whether a choice keeps it, rounding of sums aside."""
        return self.cost.at(choice) <= self.limit + 1e-12 * abs(self.limit)


@dataclass(frozen=True)
class Incumbent:
    """A solution, and how good one can be."""

    choice: dict[str, int]
    bound: float
    """No solution has a smaller objective."""


def forms_of(wanted: Sequence[Limit]) -> list[Form]:
    """Everything that is limited."""
    return [form for w in wanted for form in w.cost.forms]


@dataclass(frozen=True)
class Relaxed:
    """What the linear program says."""

    bound: float
    shares: dict[str, Numbers]
    reduced: dict[str, Numbers]
    """Least rise of the bound if the option is taken."""
    unit: float
    """What 1 of the scaled objective is."""


class Program:
    """The integer program as a matrix.

    Columns are the options of the variables that have several, the products of pairs, and for each sum with rows a
    column that is at least as large as every row.

    Args:
        options: of the variables that it decides.
        objective: what is minimised.
        wanted: limits.
        known: an objective that is reached; sets the scale.
    """

    def __init__(
        self,
        options: Mapping[str, tuple[int, ...]],
        objective: Sum,
        wanted: Sequence[Limit],
        known: float | None = None,
    ) -> None:
        self.options = {v: o for v, o in options.items() if len(o) > 1}
        self.decided = [v for v in options if v not in self.options]
        self.objective = objective.folded()
        self.wanted = [Limit(w.cost.folded(), w.limit) for w in wanted if w.cost.most() > w.limit]
        self.start: dict[Any, int] = {}
        count = 0
        for v, o in self.options.items():
            self.start[v] = count
            count += len(o)
        self.whole = count
        for u, v in dict.fromkeys(p for f in [*self.objective.forms, *forms_of(self.wanted)] for p in f.pairs):
            self.start[u, v] = count
            count += len(options[u]) * len(options[v])
        self.largest = [count + i for i in range(1 + len(self.wanted))]  # of the objective's rows, of each limit's
        self.count = count + len(self.largest)
        self.upper = np.ones(self.count)
        self.upper[self.largest] = np.inf
        self.shifted = self.objective.common.shifted()
        self.constant = self.shifted.constant
        self.unit = self._scale(known)
        self.lines: list[tuple[npt.NDArray[np.intp], Numbers]] = []
        self.right: list[float] = []
        self.goal = self._goal()
        for w, column in zip(self.wanted, self.largest[1:], strict=True):
            self._limit(w, column)

    def _scale(self, known: float | None) -> float:
        forms = [self.shifted, *(row.shifted() for row in self.objective.rows)]
        largest = max((float(s.values.max()) for f in forms for s in (f.stack, f.pair_stack) if s.shapes), default=0.0)
        scale = largest if known is None else known - self.constant
        return (scale if scale > 0 else largest or 1.0) / LOSS_SCALE

    def _goal(self) -> Numbers:
        goal = self._vector(self.shifted) / self.unit
        if self.objective.rows:
            goal[self.largest[0]] = 1.0
            least = max(row.shifted().constant for row in self.objective.rows)
            self._rows(self.objective.rows, self.largest[0], 1 / self.unit, least)
        return goal

    def _limit(self, wanted: Limit, column: int) -> None:
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

    def _affordable(self, form: Form, left: float) -> Numbers:
        """The form as a row; what exceeds the limit alone is forbidden and stands as 0."""
        vector = self._vector(form)
        excess = vector > left * (1 + 1e-12)
        self.upper[excess] = 0.0
        vector[excess] = 0.0
        return vector

    def _rows(self, rows: Sequence[Form], column: int, scale: float, least: float) -> None:
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

    def _vector(self, form: Form) -> Numbers:
        vector = np.zeros(self.count)
        for stack in (form.stack, form.pair_stack):
            vector[stack.columns(self.start)] = stack.values
        return vector

    @cached_property
    def equal(self) -> tuple[sparse.csr_array, Numbers]:
        """What makes shares sum to 1, and products agree with the choices they are of."""
        columns, ones = np.arange(self.whole), np.ones(self.whole)
        rows = [(columns[self.start[v] :][: len(o)], ones[: len(o)]) for v, o in self.options.items()]
        right = [1.0] * len(rows)
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
        from scipy import sparse

        if not rows:
            return sparse.csr_array((0, self.count))
        ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        data, columns = np.concatenate([r[1] for r in rows]), np.concatenate([r[0] for r in rows])
        return sparse.csr_array((data, columns, ends), shape=(len(rows), self.count))

    def _shares(self, x: Numbers) -> dict[str, Numbers]:
        return {v: x[self.start[v] : self.start[v] + len(o)] for v, o in self.options.items()}

    def relax(self) -> Relaxed | None:
        """The linear program: a bound, how far options are taken, and what taking them must cost."""
        if not self.options:
            return None
        from scipy.optimize import linprog

        limits = {"A_ub": self._sparse(self.lines), "b_ub": np.array(self.right)} if self.lines else {}
        bounds = np.column_stack([np.zeros(self.count), np.where(self.upper == 0, 0.0, np.inf)])
        found = linprog(self.goal, A_eq=self.equal[0], b_eq=self.equal[1], bounds=bounds, method="highs", **limits)
        if found.status != 0:
            return None
        reduced = np.where(self.upper == 0, np.inf, found.lower.marginals * self.unit)
        bound = found.fun * self.unit + self.constant
        return Relaxed(bound, self._shares(found.x), self._shares(reduced), self.unit)

    def solve(self) -> Incumbent | None:
        """The best choice; None if there is none, or none was found.

        Raises:
            BitwrightError: HiGHS failed.
        """
        if not self.options:
            choice = dict.fromkeys(self.decided, 0)
            return Incumbent(choice, self.objective.at(choice)) if all(w.met(choice) for w in self.wanted) else None
        whole = np.zeros(self.count)
        whole[: self.whole] = 1
        right = np.array(self.right)
        for _ in range(RETRIES):
            found = self._search(whole, right)
            if found.x is None:
                if found.status in {_INFEASIBLE, _STOPPED}:
                    return None
                raise BitwrightError(f"HiGHS could not solve the integer program ({found.message}).")
            choice = dict.fromkeys(self.decided, 0) | {v: int(s.argmax()) for v, s in self._shares(found.x).items()}
            if all(w.met(choice) for w in self.wanted):
                bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
                return Incumbent(choice, bound * self.unit + self.constant)
            right = right - np.where(right == ROW_SCALE, 1e-5, 0.0)  # within HiGHS's tolerance, yet over the limit
        return None

    def _search(self, whole: Numbers, right: Numbers) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp

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
