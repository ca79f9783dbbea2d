"""Times in turn on a clock that the test moves."""

from __future__ import annotations

import math
import statistics

import pytest

from bitwright.speed.timing import Spread, in_turn, ratios


class World:
    """A clock and calls that take what the test says."""

    def __init__(self):
        self.now, self.order, self.slowness = 0.0, [], 1.0

    def call(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * self.slowness

        return run

    def clock(self):
        return self.now


def test_calls_take_turns_and_each_sample_is_one_call():
    world = World()
    rows = in_turn([world.call("a", 0.02), world.call("b", 0.03)], 1.0, clock=world.clock)
    assert [{round(x, 9) for x in row} for row in rows] == [{0.02}, {0.03}]
    warm = world.order.index("b", 2)
    measured = world.order[-(2 * 2 * len(rows[0])) :]
    assert measured == ["a", "a", "b", "b"] * len(rows[0])  # once untimed, once timed
    assert warm < len(world.order) - len(measured)


def test_the_time_is_used_up_and_not_more():
    world = World()
    rows = in_turn([world.call("a", 0.02)], 1.0, clock=world.clock)
    assert len(rows[0]) == math.ceil(1.0 / 0.04)


def test_a_long_call_runs_a_few_rounds_all_the_same_and_is_not_warmed_up_each_time():
    world = World()
    rows = in_turn([world.call("a", 3.0)], 1.0, clock=world.clock, least=5)
    assert len(rows[0]) == 5
    assert len(world.order) == 2 + 5


def test_a_short_call_is_repeated_in_one_sample():
    world = World()
    (row,) = in_turn([world.call("a", 1e-6)], 1.0, clock=world.clock, least=2, most=2)
    assert row == pytest.approx([1e-6, 1e-6])
    assert len(world.order) > 2 * 100


def test_what_slows_a_round_down_cancels_in_ratios():
    world = World()
    calls = [world.call("a", 0.02), world.call("b", 0.05)]
    fast = in_turn(calls, 0.5, clock=world.clock)
    world.slowness = 7.0
    slow = in_turn(calls, 0.5, clock=world.clock)
    mixed = [f + s for f, s in zip(fast, slow, strict=True)]
    assert ratios(mixed[1], mixed[0]) == pytest.approx([2.5] * len(mixed[0]))


def test_spread_is_median_and_quartiles():
    values = [3.0, 9.0, 1.0, 4.0, 100.0, 2.0, 5.0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    assert Spread.of(values) == Spread(middle, low, high, 7)
