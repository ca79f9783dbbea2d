"""Times calls in turn and says how much their times spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Clock = Callable[[], float]
Timed = Callable[[], object]
Timer = Callable[[Sequence[Timed]], list[list[float]]]
"""Seconds of each call, one per round: row i belongs to call i, column j to round j."""

WARM_CALLS = 3
LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
SAMPLE_SECONDS = 3e-4
"""A shorter call is repeated until one sample takes about as long: the clock weighs less. No longer than that, so
that most samples fall between the moments that other processes take the core."""
LONG_SECONDS = 0.1
"""A call of this length needs no warming up before each sample: it fills the caches many times over."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Example:
        >>> Spread.of([4.0, 1.0, 3.0, 2.0, 100.0])
        Spread(median=3.0, low=2.0, high=4.0, count=5)
    """

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, median, high = (float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75]))
        return cls(median, low, high, len(values))

    def milliseconds(self, unit: str = "") -> str:
        """Milliseconds of measured seconds: the median, and the middle half.

        Example:
            >>> Spread(0.0125, 0.012, 0.013, 5).milliseconds(" ms")
            '12.5 ms (12 to 13)'
        """
        middle, low, high = (f"{1000 * value:.3g}" for value in (self.median, self.low, self.high))
        return f"{middle}{unit} ({low} to {high})"

    @property
    def factor(self) -> str:
        """A ratio: the median, and the middle half.

        Example:
            >>> Spread(0.5, 0.4, 0.625, 5).factor
            '0.50 (0.40 to 0.62)'
        """
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def verdict(self) -> str:
        """What the middle half of ratios of times says; nothing where it holds 1.

        Example:
            >>> Spread(0.5, 0.4, 0.6, 5).verdict, Spread(1.2, 0.9, 1.3, 5).verdict
            ('2.00 times as fast', 'no clear difference')
        """
        if self.low <= 1 <= self.high:
            return "no clear difference"
        fast = self.median < 1
        return f"{1 / self.median if fast else self.median:.2f} times as {'fast' if fast else 'slow'}"


def in_turn(
    calls: Sequence[Timed],
    seconds: float,
    *,
    clock: Clock = time.perf_counter,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> list[list[float]]:
    """Times each call once a round (first, second, ..., first, second, ...), warm, until the time is used up.

    Before each sample a short call runs once untimed, so that it finds its own data in the caches and not those of
    the call before. A round is always finished.

    Args:
        calls: what to time.
        seconds: for all calls and rounds together, warming up left out.
        clock: seconds since some moment.
        least: rounds even where the time does not suffice.
        most: rounds even where the time would suffice for more.

    Returns:
        Seconds of one call, [calls][rounds].
    """
    estimates = [_warm(call, clock) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    started = clock()
    for done in range(most):
        if done >= least and clock() - started >= seconds:
            break
        for call, once, kept in zip(calls, estimates, samples, strict=True):
            if once < LONG_SECONDS:
                call()
            kept.append(_sample(call, _repeats(once), clock))
    return samples


def _warm(call: Timed, clock: Clock) -> float:
    """Runs the call until it is warm; roughly its seconds."""
    once = _sample(call, 1, clock)
    for _ in range(WARM_CALLS if once < LONG_SECONDS else 1):
        once = min(once, _sample(call, 1, clock))
    return once


def _repeats(once: float) -> int:
    """How often a call goes into one sample."""
    return max(1, min(1000, round(SAMPLE_SECONDS / max(once, 1e-9))))


def _sample(call: Timed, count: int, clock: Clock) -> float:
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, so that what slowed both of a round down cancels.

    Example:
        >>> ratios([1.0, 3.0], [2.0, 6.0])
        [0.5, 0.5]
    """
    return [a / b if b > 0 else float("inf") for a, b in zip(numerator, denominator, strict=True)]
