"""Where one sum over variables is limited: the relaxed problem in closed form, and better choices by exchange.

The bound is Lagrange's: for every price ``p >= 0`` of what is limited, no choice within the limit loses less than

    sum_v min_o (L_v[o] + p C_v[o]) - p limit

and the best price is where two choices meet that lie on both sides of the limit. It equals the bound of the linear
program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitwright.bits.program import Limit, forms_of
from bitwright.bits.tables import Form, Numbers, Tables

Taken = npt.NDArray[np.intp]
"""Of the options that are taken, one of each variable, in an array over the options of all."""
PRICES, EXCHANGES = 100, 200
"""Most prices that are looked at, and most pairs of options that are exchanged; a few are usual."""


@dataclass(frozen=True)
class Bounded:
    """What the best price says."""

    bound: float
    """No choice within the limit loses less."""
    rises: Numbers
    """By how much the bound rises if an option is taken, for all options."""
    taken: Taken
    """A choice within the limit, rounding of sums aside."""


class OneLimit:
    """Losses and costs of all options as two arrays.

    Args:
        tables: at least one choice of theirs is within the limit.
        limit: of a sum without rows.
    """

    def __init__(self, tables: Tables, limit: Limit) -> None:
        self.tables, self.limit = tables, limit
        self.starts = np.fromiter(tables.start.values(), np.intp, len(tables.start))
        self.owner = np.repeat(np.arange(self.starts.size), [len(o) for o in tables.options.values()])
        self.losses, self.costs = self._spread(tables.loss), self._spread(limit.cost.common)
        self.room = limit.limit + 1e-12 * abs(limit.limit) - limit.cost.common.constant

    @staticmethod
    def of(tables: Tables, wanted: Sequence[Limit]) -> OneLimit | None:
        """None if there is not one limit of one sum, or something depends on two variables at once."""
        forms = [tables.loss, *forms_of(wanted)]
        plain = len(forms) == 2 and not any(form.pairs for form in forms)
        return OneLimit(tables, wanted[0]) if plain and tables.options else None

    def _spread(self, form: Form) -> Numbers:
        values = np.zeros(self.owner.size)
        values[form.stack.columns(self.tables.start)] = form.stack.values
        return values

    def choice(self, taken: Taken) -> dict[str, int]:
        """The options by variable."""
        return dict(zip(self.tables.options, (taken - self.starts).tolist(), strict=True))

    def places(self, choice: Mapping[str, int]) -> Taken:
        """Where options by variable stand."""
        return self.starts + np.fromiter((choice[v] for v in self.tables.options), np.intp, self.starts.size)

    def bounded(self) -> Bounded:
        """The best price, found by going to where the choices on both sides of the limit are equally good."""
        dear, cheap, price = self._best(self.losses), self._best(self.costs), 0.0
        if self.costs[dear].sum() <= max(self.room, self.costs[cheap].sum()):
            return self._at(0.0, dear)
        for _ in range(PRICES):
            price = (self.losses[cheap].sum() - self.losses[dear].sum()) / (self.costs[dear] - self.costs[cheap]).sum()
            values = self.losses + price * self.costs
            between = self._best(values)
            if values[between].sum() >= min(values[dear].sum(), values[cheap].sum()):
                break
            dear, cheap = (dear, between) if self.costs[between].sum() <= self.room else (between, cheap)
        return self._at(price, cheap)

    def _at(self, price: float, taken: Taken) -> Bounded:
        values = self.losses + price * self.costs
        least = np.minimum.reduceat(values, self.starts)
        bound = float(least.sum() - price * self.room) + self.tables.loss.constant
        return Bounded(bound, values - least[self.owner], taken)

    def _best(self, values: Numbers) -> Taken:
        """The first least of each variable."""
        least = np.flatnonzero(values == np.minimum.reduceat(values, self.starts)[self.owner])
        return least[np.searchsorted(self.owner[least], np.arange(self.starts.size))]

    def exchanged(self, taken: Taken) -> Taken:
        """The choice with other options of one or two variables at a time, as long as that lowers the loss.

        Args:
            taken: within the limit, as what is returned is, rounding of sums aside.
        """
        found, left = taken.copy(), max(0.0, self.room - self.costs[taken].sum())
        for _ in range(EXCHANGES):
            moves = self._moves(found, left)
            if moves is None:
                break
            left -= (self.costs[moves] - self.costs[found[self.owner[moves]]]).sum()
            found[self.owner[moves]] = moves
        return found

    def _moves(self, taken: Taken, left: float) -> Taken | None:
        """The two options, of two variables, that lower the loss most together; one of them may be taken already."""
        gain, price = self.losses - self.losses[taken][self.owner], self.costs - self.costs[taken][self.owner]
        order = np.argsort(price, kind="stable")
        least = np.minimum.accumulate(gain[order])
        first = np.maximum.accumulate(np.where(gain[order] == least, np.arange(order.size), 0))
        reach = np.searchsorted(price[order], left - price, side="right") - 1  # the last one that there is room for
        partner = order[first[np.maximum(reach, 0)]]
        apart = (reach >= 0) & (self.owner != self.owner[partner])
        both = np.where(apart, gain + gain[partner], np.inf)
        best = int(both.argmin())
        return np.array([best, partner[best]]) if both[best] < 0 else None
