"""The closed-form bound and the exchange of options, against the linear program and against trying everything."""

import itertools

import numpy as np
import pytest

from bitwright.bits.one_limit import OneLimit
from bitwright.bits.program import Limit, Program
from bitwright.bits.tables import Cost, Problem, Sum, Tables, Term, TermSum

BITS = (2, 3, 4, 8)


def tables_of(losses, sizes):
    """One variable a row of numbers."""
    names = [f"v{i}" for i in range(len(losses))]
    terms = tuple(Term((v,), row) for v, row in zip(names, losses, strict=True))
    size = TermSum(tuple(Term((v,), row) for v, row in zip(names, sizes, strict=True)), constant=7.0)
    options = {v: BITS[: len(row)] for v, row in zip(names, losses, strict=True)}
    return Tables.of(Problem(options, terms, {"size": Cost(size)}))


def random_tables(seed, count):
    r = np.random.default_rng(seed)
    sizes = np.exp(r.uniform(0, 5, count))[:, None] * np.array(BITS)
    return tables_of(np.exp(r.normal(0, 2, (count, 1))) * r.uniform(0.5, 2, (count, 4)) * 4.0 ** -np.array(BITS), sizes)


def limited(tables, share):
    cost = tables.costs["size"]
    least, most = -cost.common.negative().most(), cost.common.most()
    return Limit(cost, least + share * (most - least))


def within(tables, limit):
    """Loss and choice of all that is within the limit."""
    choices = [
        dict(zip(tables.options, each, strict=True))
        for each in itertools.product(*(range(len(o)) for o in tables.options.values()))
    ]
    return [(tables.loss.at(c), c) for c in choices if limit.met(c)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])  # below .3 the linear program forbids what exceeds it alone
def test_the_bound_is_that_of_the_linear_program(share):
    for seed in range(20):
        tables = random_tables(seed, count=12)
        limit = limited(tables, share)
        found, relaxed = OneLimit(tables, limit).bounded(), Program(tables.options, Sum(tables.loss), [limit]).relax()
        assert found.bound == pytest.approx(relaxed.bound, rel=1e-7)
        assert limit.met(OneLimit(tables, limit).choice(found.taken))


def test_no_choice_within_the_limit_is_below_the_bound_with_the_rises_of_its_options():
    for seed in range(30):
        tables = random_tables(seed, count=5)
        limit = limited(tables, 0.1 + 0.02 * seed)
        one = OneLimit(tables, limit)
        found = one.bounded()
        for loss, choice in within(tables, limit):
            assert loss >= found.bound + found.rises[one.places(choice)].max() - 1e-9 * loss


def test_two_options_are_exchanged_where_neither_alone_helps():
    tables = tables_of([[6.0, 0.0], [5.0, 0.0]], [[0.0, 5.0], [0.0, 7.0]])
    one = OneLimit(tables, Limit(tables.costs["size"], 7.0 + 8.0))
    worse = one.places({"v0": 0, "v1": 1})  # there is room for 1 more
    assert one.choice(one.exchanged(worse)) == {"v0": 1, "v1": 0}


def test_one_option_is_taken_where_there_is_room():
    tables = tables_of([[6.0, 0.0], [5.0, 0.0]], [[0.0, 5.0], [0.0, 7.0]])
    one = OneLimit(tables, Limit(tables.costs["size"], 7.0 + 8.0))
    assert one.choice(one.exchanged(one.places({"v0": 0, "v1": 0}))) == {"v0": 1, "v1": 0}


def test_an_exchange_stays_within_the_limit_and_comes_near_the_best():
    short = []
    for seed in range(40):
        tables = random_tables(seed, count=6)
        limit = limited(tables, 0.05 + 0.02 * seed)
        one = OneLimit(tables, limit)
        start = one.bounded().taken
        choice = one.choice(one.exchanged(start))
        assert limit.met(choice)
        assert tables.loss.at(choice) <= tables.loss.at(one.choice(start))
        short.append(tables.loss.at(choice) / min(within(tables, limit), key=lambda each: each[0])[0])
    assert np.median(short) == pytest.approx(1)


def test_a_limit_that_nothing_exceeds_costs_nothing():
    tables = random_tables(0, count=4)
    one = OneLimit(tables, limited(tables, 2.0))
    found = one.bounded()
    assert found.bound == pytest.approx(sum(t.min() for t in tables.loss.single.values()))
    assert found.rises[found.taken].max() == 0


def test_only_one_limit_of_one_sum_has_a_closed_form():
    tables = random_tables(0, count=3)
    limit = limited(tables, 0.5)
    assert OneLimit.of(tables, [limit]) is not None
    assert OneLimit.of(tables, []) is None
    assert OneLimit.of(tables, [limit, limit]) is None
    rows = Limit(Sum(limit.cost.common, (limit.cost.common,)), 1.0)
    assert OneLimit.of(tables, [rows]) is None
