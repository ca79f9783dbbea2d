"""The integer program against trying everything, and against HAWQ-V3's published choices."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from scipy import optimize

from bitwright.bits import Cost, Problem, Term, TermSum, pareto, reachable, solution_of, solve
from bitwright.bits.one_limit import OneLimit
from bitwright.errors import UsageError

WIDTHS = [2, 3, 4, 5, 6, 8]


def random_problem(seed):
    """Up to five variables; losses over many orders of magnitude in some; pairs, rows, ties, fixed variables."""
    r = np.random.default_rng(seed)
    count = int(r.integers(1, 6))
    options = {
        f"v{i}": tuple(sorted(r.choice(WIDTHS, size=r.integers(1, 4), replace=False).tolist())) for i in range(count)
    }
    names = list(options)
    pairs = [tuple(r.choice(names, 2, replace=False)) for _ in range(r.integers(0, 3))] if count > 1 else []
    whole, wide = r.random() < 0.5, r.random() < 0.3

    def table(*over, low=0.0):
        values = r.uniform(low, 1, [len(options[v]) for v in over])
        return np.round(1000 * values) if whole else values

    def sized(v):
        return Term((v,), np.round(1000 * r.uniform(0.5, 2) * np.array(options[v])) / (1 if whole else 777))

    losses = [Term((v,), table(v) * (10.0 ** r.uniform(-9, 3) if wide else 1)) for v in names]
    losses += [Term(p, table(*p)) for p in pairs if r.random() < 0.5]
    costs = {
        "size": Cost(TermSum(tuple(map(sized, names)), float(r.integers(0, 3)))),
        "peak": Cost(TermSum(()), tuple(TermSum(tuple(sized(v) for v in names if r.random() < 0.6)) for _ in range(3))),
        "operations": Cost(
            TermSum(tuple(Term(p, np.multiply.outer(*(options[v] for v in p)) * r.uniform(0.5, 2)) for p in pairs))
        ),
        "seconds": Cost(TermSum((*(Term((v,), table(v)) for v in names), *(Term(p, table(*p)) for p in pairs)))),
        "total": Cost(
            TermSum(tuple(map(sized, names)), 1.0),
            tuple(
                TermSum(
                    (
                        *(Term((v,), table(v, low=-1)) for v in names if r.random() < 0.6),
                        *(Term(p, table(*p)) for p in pairs if r.random() < 0.3),
                    )
                )
                for _ in range(3)
            ),
        ),
    }
    tied = count > 2 and set(options["v0"]) & set(options["v1"]) and r.random() < 0.3
    return Problem(options, tuple(losses), costs, (("v0", "v1"),) if tied else ())


def total(terms, bits, options):
    return sum(np.asarray(t.values)[tuple(options[v].index(bits[v]) for v in t.variables)] for t in terms)


def everything(problem):
    """Loss and costs of every choice, by the definitions."""
    found = []
    for widths in itertools.product(*problem.options.values()):
        bits = dict(zip(problem.options, widths, strict=True))
        if any(len({bits[v] for v in tie}) > 1 for tie in problem.ties):
            continue
        costs = {}
        for name, cost in problem.costs.items():
            rows = [total(row.terms, bits, problem.options) + row.constant for row in cost.rows]
            costs[name] = total(cost.common.terms, bits, problem.options) + cost.common.constant + max(rows, default=0)
        found.append((total(problem.losses, bits, problem.options), costs))
    return found


def random_limits(seed, choices):
    """Of some of the costs; often exactly what some choice costs, sometimes below what is reachable."""
    r = np.random.default_rng(10**6 + seed)
    limits = {}
    for name in choices[0][1]:
        values = [costs[name] for _, costs in choices]
        if r.random() < 0.6:
            exact = r.random() < 0.5
            limits[name] = float(r.choice(values) if exact else r.uniform(0.98 * min(values), max(values)))
    return limits


@pytest.mark.parametrize("part", range(4))
def test_it_equals_trying_everything_on_two_hundred_problems(part):
    refused = 0
    for seed in range(50 * part, 50 * (part + 1)):
        problem = random_problem(seed)
        choices = everything(problem)
        limits = random_limits(seed, choices)
        allowed = [loss for loss, costs in choices if all(costs[k] <= limits[k] * (1 + 1e-12) for k in limits)]
        if not allowed:
            refused += 1
            with pytest.raises(UsageError) as caught:
                solve(problem, limits)
            assert "\n" not in str(caught.value)
            continue
        found = solve(problem, limits)
        assert found.loss == pytest.approx(min(allowed), rel=1e-9, abs=1e-15), seed
        assert all(found.costs[k] <= limits[k] * (1 + 1e-11) for k in limits), seed
        again = solution_of(problem, found.bits)
        assert (again.loss, again.costs) == (found.loss, found.costs)
        assert all(len({found.bits[v] for v in tie}) == 1 for tie in problem.ties)
    assert 0 < refused < 50


def test_what_is_reachable_equals_trying_everything():
    for seed in range(60):
        problem = random_problem(seed)
        choices = everything(problem)
        for name, reach in reachable(problem).items():
            values = [costs[name] for _, costs in choices]
            assert (reach.least, reach.most) == (pytest.approx(min(values)), pytest.approx(max(values)))
            assert solution_of(problem, reach.bits).costs[name] == pytest.approx(min(values))


def test_a_larger_budget_never_loses_more():
    for seed in range(10):
        problem = random_problem(seed)
        values = sorted({costs["size"] for _, costs in everything(problem)})
        curve = pareto(problem, "size", budgets=values)
        assert all(s.costs["size"] <= v * (1 + 1e-12) for s, v in zip(curve, values, strict=True))
        best = [min(loss for loss, c in everything(problem) if c["size"] <= v * (1 + 1e-12)) for v in values]
        assert [s.loss for s in curve] == pytest.approx(best, rel=1e-9)
        assert all(b.loss <= a.loss for a, b in itertools.pairwise(curve))


def test_a_curve_without_budgets_goes_from_the_least_to_what_no_limit_would_cost():
    problem = large_problem(20, seed=0)
    curve = pareto(problem, "size", count=8)
    assert len(curve) == 8
    assert curve[0].costs["size"] == reachable(problem)["size"].least
    assert curve[-1].loss == solve(problem).loss


def test_points_of_a_curve_begin_at_the_one_before_and_end_as_they_would_alone(monkeypatch):
    problem, looked = large_problem(100, seed=2), []
    reach, bounded = reachable(problem)["size"], OneLimit.bounded
    budgets = np.linspace(reach.least, reach.most, 10)[1:-1]
    alone = [solve(problem, {"size": budget}) for budget in budgets]
    monkeypatch.setattr(OneLimit, "bounded", lambda self: [looked.append(1), bounded(self)][1])
    assert pareto(problem, "size", budgets=budgets) == alone
    assert len(looked) == 2 + len(budgets[1:])


def test_the_same_call_gives_the_same_bits():
    problem = large_problem(40, seed=3)
    limits = {"size": 0.5 * reachable(problem)["size"].most}
    assert solve(problem, limits).bits == solve(problem, limits).bits


def large_problem(count, seed):
    """Losses that fall by 4 a bit, sensitivities and sizes over three orders of magnitude."""
    r = np.random.default_rng(seed)
    bits = (2, 3, 4, 6, 8)
    sizes, weights = np.exp(r.uniform(7, 14, count)).astype(int), np.exp(r.normal(0, 2, count))
    losses = [Term((f"v{i}",), weights[i] * 4.0 ** -np.array(bits)) for i in range(count)]
    size = TermSum(tuple(Term((f"v{i}",), sizes[i] * np.array(bits) / 8) for i in range(count)))
    return Problem({f"v{i}": bits for i in range(count)}, tuple(losses), {"size": Cost(size, unit="B")})


def test_three_hundred_layers_are_proven_best():
    problem = large_problem(300, seed=1)
    reach = reachable(problem)["size"]
    for part in (0.05, 0.4):
        limit = reach.least + part * (reach.most - reach.least)
        found = solve(problem, {"size": limit})
        assert found.gap == 0
        assert limit * 0.999 < found.costs["size"] <= limit
        # the dual bound of the one constraint, maximised over its multiplier, is below every solution
        assert dual_bound(problem, limit) <= found.loss * (1 + 1e-9)
        assert found.loss <= dual_bound(problem, limit) * 1.01


def dual_bound(problem, limit):
    """max over m of  sum_v min_o (loss + m * size)  -  m * limit: Lagrange, without a solver."""
    losses = np.array([t.values for t in problem.losses])
    sizes = np.array([t.values for t in problem.costs["size"].common.terms])
    return max((losses + m * sizes).min(1).sum() - m * limit for m in np.geomspace(1e-12, 1e-1, 4000))


# ------------------------------------------------------------------------------------------------- preferences


def one(losses, sizes, bits=(4, 8)):
    return Problem({"a": bits}, (Term(("a",), losses),), {"size": Cost(TermSum((Term(("a",), sizes),)), unit="B")})


def test_one_variable_alone():
    assert solve(one([1.0, 0.0], [10, 20]), {"size": 20}).bits == {"a": 8}
    assert solve(one([1.0, 0.0], [10, 20]), {"size": 19}).bits == {"a": 4}


def test_without_variables_there_is_what_is_constant():
    problem = Problem({}, (), {"size": Cost(TermSum((), 3.0))})
    found = solve(problem, {"size": 4})
    assert (found.bits, found.loss, found.costs) == ({}, 0.0, {"size": 3.0})
    assert [point.costs for point in pareto(problem, "size", budgets=[3.0, 5.0])] == [{"size": 3.0}] * 2
    assert (reachable(problem)["size"].least, reachable(problem)["size"].most) == (3.0, 3.0)
    with pytest.raises(UsageError):
        solve(problem, {"size": 2})


def test_of_equal_losses_the_cheaper_option_is_taken():
    assert solve(one([0.0, 0.0], [10, 20])).bits == {"a": 4}
    assert solve(one([0.5, 0.7], [10, 20])).bits == {"a": 4}


def test_ties_are_equal_in_bits_not_in_position():
    losses = (Term(("a",), [4.0, 1.0, 0.0]), Term(("b",), [2.0, 0.0]))
    problem = Problem({"a": (2, 4, 8), "b": (4, 8)}, losses, {}, (("a", "b"),))
    assert solve(problem).bits == {"a": 8, "b": 8}
    with pytest.raises(UsageError, match="tied"):
        solve(Problem({"a": (2, 4), "b": (8,)}, (), {}, (("a", "b"),)))


def test_tied_variables_of_a_pair_take_its_diagonal():
    table = [[5.0, 0.0], [0.0, 3.0]]
    problem = Problem({"a": (4, 8), "b": (4, 8)}, (Term(("a", "b"), table),), {}, (("a", "b"),))
    assert solve(problem).loss == 3.0


def test_an_impossible_limit_names_what_is_reachable_and_what_binds():
    problem = Problem(
        {"a": (4, 8), "b": (8,)},
        (Term(("a",), [1.0, 0.0]),),
        {"size": Cost(TermSum((Term(("a",), [40_000, 80_000]), Term(("b",), [7_000])), 500.0), unit="B")},
        labels={"a": "stem (weights)"},
    )
    with pytest.raises(UsageError) as caught:
        solve(problem, {"size": 47_000})
    text = str(caught.value)
    assert "\n" not in text
    assert "at most 47 kB of size, reachable are 47.5 kB to 87.5 kB" in text
    assert "stem (weights) at 4 bits 40 kB, b at 8 bits (fixed) 7 kB" in text


def test_limits_that_exclude_each_other_are_named_with_what_each_could_be():
    costs = {
        "first": Cost(TermSum((Term(("a",), [1.0, 9.0]),))),
        "second": Cost(TermSum((Term(("a",), [9.0, 1.0]),))),
    }
    problem = Problem({"a": (4, 8)}, (Term(("a",), [1.0, 0.0]),), costs)
    with pytest.raises(UsageError) as caught:
        solve(problem, {"first": 5, "second": 5})
    text = str(caught.value)
    assert "cannot be met together" in text
    assert "first at most 5 (alone 1 to 9, beside the others at least 9" in text


@pytest.mark.parametrize(
    ("problem", "limits", "expected"),
    [
        (one([1.0, 0.0], [10, 20]), {"weight": 5}, "Expected a limit of size, found 'weight'"),
        (one([1.0, 0.0], [10, 20]), {"size": float("nan")}, "found nan"),
        (one([1.0, float("nan")], [10, 20]), {}, "Expected finite numbers"),
        (one([1.0, 0.0, 0.0], [10, 20]), {}, "Expected finite numbers"),
    ],
)
def test_wrong_calls_are_one_line(problem, limits, expected):
    with pytest.raises(UsageError, match=expected):
        solve(problem, limits)


def test_nothing_is_printed(capfd, monkeypatch):
    search = optimize.milp

    def talkative(*args, **settings):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        return search(*args, **settings)

    monkeypatch.setattr(optimize, "milp", talkative)
    problem = large_problem(60, seed=0)
    solve(problem, {"size": 0.4 * reachable(problem)["size"].most})
    os.write(1, b"after")
    assert capfd.readouterr() == ("after", "")


# ----------------------------------------------------------------------------------------------------- HAWQ-V3


TRACE = """.06857826 .03162379 .03298575 .01205663 .02222431 .00596336 .06931772 .00807129 .00372905 .00530698 .00209011
.00737569 .00210454 .00151197 .00158041 .00078146 .00451841 .00098745 .00072944"""
CHANGE8 = """.0235 .0125 .0102 .0082 .0145 .0344 .0023 .0287 .0148 .0333 .0682 .0027 .0448 .0336 .0576 .1130 .0102 .0947
.0532"""
CHANGE4 = """6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 .6827 9.0942 4.8857 10.7599 21.7546 .8603 14.5324 10.9651
18.7706 36.4044 3.1572 29.6994 17.4016"""
PARAMETERS = [36864] * 4 + [73728, 147456, 8192] + [147456] * 2 + [294912, 589824, 32768] + [589824] * 2
PARAMETERS += [1179648, 2359296, 131072] + [2359296] * 2
MACS = [57802752 if i in {4, 9, 14} else 6422528 if i in {6, 11, 16} else 115605504 for i in range(19)]
TIES = ((4, 6), (9, 11), (14, 16))


def hawq_v3():
    """ResNet18 without its first and last layer: average trace x squared change of the weights, at 4 and 8 bits."""
    trace, change4, change8 = (np.array([float(x) for x in text.split()]) for text in (TRACE, CHANGE4, CHANGE8))
    losses = tuple(Term((str(i),), [trace[i] * change4[i], trace[i] * change8[i]]) for i in range(19))
    size = TermSum(tuple(Term((str(i),), [PARAMETERS[i] * b / 8 for b in (4, 8)]) for i in range(19)))
    operations = TermSum(tuple(Term((str(i),), [MACS[i] * b * b for b in (4, 8)]) for i in range(19)))
    return Problem(
        {str(i): (4, 8) for i in range(19)},
        losses,
        {"size": Cost(size, unit="B"), "operations": Cost(operations)},
        tuple((str(a), str(b)) for a, b in TIES),
    )


@pytest.mark.parametrize(
    ("cost", "four_bits"),
    [("size", {15, 17, 18}), ("operations", {3, 8, *range(12, 19)})],
)
def test_the_authors_choices_for_resnet18_are_found(cost, four_bits):
    problem = hawq_v3()
    low, high = (solution_of(problem, dict.fromkeys(problem.options, b)).costs[cost] for b in (4, 8))
    found = solve(problem, {cost: low + 0.5 * (high - low)})
    assert {int(v) for v, b in found.bits.items() if b == 4} == four_bits
    assert round(found.costs["size"] / 2**20, 3) == {"size": 7.266, "operations": 5.990}[cost]
