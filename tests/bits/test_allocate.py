"""From losses and limits to plans of networks."""

from __future__ import annotations

import warnings

import cases
import pytest

from bitwright.api import preview
from bitwright.bits import Losses, allocate, allocations, problem_of, reachable, variables_of
from bitwright.bits.plan import insert_plan, plan_of
from bitwright.errors import UsageError
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Rule, Scheme


def student(name="residual", *rules):
    return insert_quantizers(cases.prepared(name), Scheme(rules=tuple(map(Rule.parse, rules))))


def falling(model, **weights):
    """Losses that fall by 4 a bit, times a weight by layer."""
    tables = {"weight": {}, "activation": {}}
    for v in variables_of(model).values():
        tables[v.kind][v.name] = {b: weights.get(v.name, 1.0) * 4.0**-b for b in v.options}
    return Losses(tables["weight"], tables["activation"])


def bits_of(plan, part="weight"):
    return {n: getattr(x, part).bits for n, x in plan.layers.items() if getattr(x, part) is not None}


def test_a_plan_keeps_every_limit_and_spends_where_it_matters():
    model = student("transformer")
    losses = falling(model, **{"mlp.0": 1000.0})
    reach = reachable(problem_of(model, losses))
    limits = {name: 0.6 * r.least + 0.4 * r.most for name, r in reach.items()}
    plan = allocate(model, losses, limits)
    assert all(plan.predicted[name] <= limit for name, limit in limits.items())
    bits = bits_of(plan)
    assert bits["mlp.0"] == max(bits.values()) > min(bits.values())
    assert plan_of(insert_plan(cases.prepared("transformer"), plan)).layers == plan.layers


def test_without_a_limit_everything_gets_what_loses_least():
    plan = allocate(student(), falling(student()), {})
    assert set(bits_of(plan).values()) == {8}
    assert set(bits_of(plan, "activation").values()) == {16}


def test_rules_stay_and_an_impossible_size_names_them():
    model = student("residual", "conv=w8")
    reach = reachable(problem_of(model, falling(model)))["weight_bytes"]
    assert bits_of(allocate(model, falling(model), {"weight_bytes": reach.least}))["conv"] == 8
    with pytest.raises(UsageError, match=r"conv \(weights\) at 8 bits \(fixed\) 144 B") as caught:
        allocate(model, falling(model), {"weight_bytes": reach.least - 1})
    assert "\n" not in str(caught.value)


def test_pairs_of_a_layer_decide_together():
    model = student("conv_bn_relu6")
    variables = variables_of(model, (4, 8), (4, 8))
    zero = {
        kind: {v.name: {4: 0.0, 8: 0.0} for v in variables.values() if v.kind == kind}
        for kind in ("weight", "activation")
    }
    name = next(x.name for x in model.layers if x.op == "linear")
    pairs = {name: {(4, 4): 9.0, (4, 8): 0.0, (8, 4): 1.0, (8, 8): 2.0}}
    plan = allocate(model, Losses(zero["weight"], zero["activation"], pairs), {}, weights=(4, 8), activations=(4, 8))
    assert plan.layers[name].weight.bits == 4
    assert plan.predicted["loss"] == 0.0


def test_ties_hold():
    model = student()
    variables = variables_of(model)
    keys = [k for k, v in variables.items() if v.kind == "weight"]
    losses = falling(model, stem=1e3, conv=1e-3)
    reach = reachable(problem_of(model, losses))["weight_bytes"]
    limits = {"weight_bytes": (reach.least + reach.most) / 2}
    assert bits_of(allocate(model, losses, limits))["stem"] > bits_of(allocate(model, losses, limits))["conv"]
    assert len(set(bits_of(allocate(model, losses, limits, ties=[keys])).values())) == 1


def test_curves_fall():
    plans = allocations(student(), falling(student()), "bit_operations", count=5)
    losses = [p.predicted["loss"] for p in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_losses_below_zero_count_as_zero_and_are_said():
    model, losses = student(), falling(student())
    losses.weights["conv"] |= {2: -5.0, 3: -1.0}
    with pytest.warns(UserWarning, match=r"below 0 count as 0: those of conv \(weights\)"):
        plan = allocate(model, losses, {})
    assert bits_of(plan)["conv"] == 2
    assert plan.predicted["loss"] >= 0


def test_losses_that_are_not_finite_are_not_offered_and_are_said():
    model, losses = student(), falling(student())
    losses.weights["conv"] |= {2: float("nan"), 3: float("inf")}
    reach = reachable(problem_of(model, falling(student())))["weight_bytes"]
    with pytest.warns(UserWarning, match=r"not finite.*conv \(weights\)"):
        tight = allocate(model, losses, {"weight_bytes": reach.least + 144 * 2 / 8})
    assert bits_of(tight)["conv"] == 4
    losses.weights["conv"] = dict.fromkeys(losses.weights["conv"], float("nan"))
    with pytest.raises(UsageError, match="None of the losses of conv"):
        allocate(model, losses, {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.weights.pop("conv"), r"those of conv \(weights\) are missing"),
        (lambda x: x.weights["conv"].pop(5), "at 5 bits"),
        (lambda x: x.weights.update(covn={2: 0.0}), "'covn' has no weights"),
        (lambda x: x.pairs.update(relu={(4, 4): 0.0}), "'relu' has no weights and input"),
        (lambda x: x.activations.update(stem={}), "given twice"),
    ],
)
def test_wrong_tables_are_one_line(change, expected):
    losses = falling(student())
    losses = Losses(dict(losses.weights), dict(losses.activations), {})
    change(losses)
    with warnings.catch_warnings(), pytest.raises(UsageError, match=expected) as caught:
        allocate(student(), losses, {})
    assert "\n" not in str(caught.value)


def test_a_network_of_one_layer():
    import torch

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()
    model = preview(network, cases.dataset())
    losses = falling(model)
    reach = reachable(problem_of(model, losses))["weight_bytes"]
    assert reach.most - reach.least == 768 * 6 / 8
    (found,) = bits_of(allocate(model, losses, {"weight_bytes": reach.least + 768 * 3 / 8})).values()
    assert found == 5
