"""Plans within limits: what is measured, what is chosen, what is said when nothing can be."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.bits import measured, planning
from bitwright.bits.costs import overhead_bytes
from bitwright.bits.goal import Goal
from bitwright.bits.plan import insert_plan
from bitwright.bits.planned import Planning
from bitwright.errors import UsageError
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.measure.metrics import Fidelity
from bitwright.quant.scheme import Scheme
from bitwright.recipes import builtin_recipes
from bitwright.sensitivity import Choices, MeasuredLoss, Table
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq


@cache
def plan(name: str = "residual", count: int = 6, **settings: Any) -> Planning:
    return bw.plan_bits(cases.model(name), cases.images(count), **{"weights": "2,4,8", "points": 5, **settings})


def sizes(found: planning.Planning) -> tuple[float, float]:
    ends = [p.predicted["weight_bytes"] for p in found.uniform.values() if p.predicted]
    return min(ends), max(ends)


def test_the_plan_is_the_best_of_all_that_fit() -> None:
    """Every combination of bits of all layers, added up by hand."""
    found = plan("transformer")
    names = list(found.losses.weights)
    low, high = sizes(found)
    limit = 0.5 * low + 0.5 * high
    planned = plan("transformer", target_size=limit).plan
    shapes = {x.name: found.student.quantizer(x.weight).shape for x in found.student.layers if x.weight}
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    rest = low - sum(-(-n * 2 // 8) for n in elements.values())
    activations = sum(table[8] for table in found.losses.activations.values())
    best = min(
        sum(found.losses.weights[n][b] for n, b in zip(names, bits, strict=True)) + activations
        for bits in torch.cartesian_prod(*[torch.tensor([2, 4, 8])] * len(names)).tolist()
        if rest + sum(-(-elements[n] * b // 8) for n, b in zip(names, bits, strict=True)) <= limit * 0.995 - 256
    )
    assert planned.predicted is not None
    assert planned.predicted["loss"] == pytest.approx(best)
    assert planned.predicted["weight_bytes"] <= limit


def test_losses_are_those_of_the_measure() -> None:
    """KL of one rounded weight, from a network that is calibrated and run here."""
    teacher, data = cases.prepared("residual"), cases.dataset(6)
    goal, no_curve = Goal.parse(weights="4"), planning.PlanningSettings(points=0)
    found = planning.planned(teacher, Scheme(), data, goal, builtin_recipes()["mse"], Run(), no_curve)
    student = bw.quantized.insert_quantizers(teacher, Scheme(weights=4, activations=None))
    student = Calibrate(bias_correction="none").run(student, teacher, data, Run())
    for module in student.graph.modules():
        if isinstance(module, bw.quant.quantizer.Quantizer) and module.name != "conv":
            module.forward = lambda x: x  # type: ignore[method-assign]
    fidelity = Fidelity()
    with torch.no_grad():
        fidelity.update(list(teacher.graph(data.batch(range(6)))), student.flat(data.batch(range(6))))
    assert found.losses.weights["conv"][4] == pytest.approx(fidelity.worst.kl, rel=1e-4)


def test_losses_are_those_of_the_roundings_that_the_recipe_will_make() -> None:
    teacher, data = cases.prepared("residual"), cases.dataset(6)
    goal, no_curve = Goal.parse(weights="3,4"), planning.PlanningSettings(points=0)
    plain, rounded = (
        planning.planned(teacher, Scheme(), data, goal, builtin_recipes()[name], Run(), no_curve)
        for name in ("mse", "eptq")
    )
    choices = Choices((3, 4), (), refine=(Optq(views="auto"),))
    expected = MeasuredLoss().measure(teacher, data, choices, Run()).weights
    assert rounded.losses.weights == {name: pytest.approx(row) for name, row in expected.items()}
    assert plain.losses.weights != rounded.losses.weights


def test_few_images_serve_a_large_network_and_many_a_small_one() -> None:
    found = plan("residual")
    assert measured.affordable(found.student, found.variables) == 256
    macs, options = 1_000_000_000, 6
    layers = {str(i): SimpleNamespace(options=range(options)) for i in range(50)}
    found.student.layers[0].macs = macs
    count = measured.affordable(found.student, layers)  # type: ignore[arg-type]
    assert count * 50 * options / 2 * macs <= measured.WORK
    assert 16 <= count < 256


def test_curves_fall_and_uniform_bits_are_never_better() -> None:
    found = plan("transformer")
    points = [p.predicted for p in found.curve]
    assert all(a["loss"] > b["loss"] and a["weight_bytes"] < b["weight_bytes"] for a, b in zip(points, points[1:]))  # noqa: B905, RUF007
    for bits, uniform in found.uniform.items():
        assert set(found.bits(uniform)["weights"].values()) == {bits}
        within = plan("transformer", target_size=uniform.predicted["weight_bytes"] / 0.995 + 258).plan
        assert within.predicted["loss"] <= uniform.predicted["loss"] + 1e-12


def test_without_a_limit_it_is_as_large_as_four_bits() -> None:
    found = plan("transformer")
    assert found.limits == {"weight_bytes": found.uniform[4].predicted["weight_bytes"]}
    assert found.plan.predicted["weight_bytes"] <= found.limits["weight_bytes"]
    assert plan(weights="3,8").limits["weight_bytes"] == plan(weights="3,8").uniform[3].predicted["weight_bytes"]


def test_several_limits_hold_together() -> None:
    free = plan(activations="4,8,16", target_size="1GB").plan.predicted
    costs = {"target_size": "weight_bytes", "max_bops": "bit_operations", "max_activation_size": "activation_bytes"}
    asked = {"target_size": 0.97 * free["weight_bytes"]}
    asked |= {name: 0.6 * free[cost] for name, cost in costs.items() if name not in asked}
    total = 0.75 * free["total_bytes"]
    found = plan(activations="4,8,16", **asked, max_total_size=total)
    for name, cost in costs.items():
        assert found.plan.predicted[cost] <= asked[name]
    assert found.plan.predicted["total_bytes"] <= total
    assert len(set(found.bits(found.plan)["activations"].values())) > 1


def test_compression_is_of_the_float_parameters() -> None:
    found = plan("transformer", weights="4,8")
    parameters = sum(p.numel() for p in cases.model("transformer").parameters())
    assert found.float_bytes == pytest.approx(4 * parameters, rel=0.1)  # norms may be folded
    ratio = found.float_bytes / (0.5 * sum(sizes(found)))
    within = plan("transformer", weights="4,8", compression=ratio)
    assert within.float_bytes / within.plan.predicted["weight_bytes"] >= ratio


def test_rules_are_fixed_and_float_layers_no_choice() -> None:
    found = plan(rules=("conv=w7", "head=wfloat"))
    assert found.bits(found.plan)["weights"]["conv"] == 7
    assert "head" not in found.bits(found.plan)["weights"]
    assert found.plan.layers["head"].weight.bits == "float"
    assert 7 in found.losses.weights["conv"]


def test_activations_in_float() -> None:
    found = plan("transformer", activations="float")
    assert not found.bits(found.plan)["activations"]
    assert {x.activation.bits for x in found.plan.layers.values() if x.activation} <= {"float"}


def test_the_second_plan_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(cache=tmp_path / "kept")
    assert not first.measured.reused
    with monkeypatch.context() as patch:
        patch.setattr(MeasuredLoss, "measure", lambda *_: pytest.fail("measured again"))
        again = plan.__wrapped__(cache=tmp_path / "kept", target_size=sizes(first)[1])
        assert again.measured.reused
        assert again.losses == first.losses
    other = bw.plan_bits(cases.model("residual"), cases.images(6, seed=9), weights="2,4,8", cache=tmp_path / "kept")
    assert not other.measured.reused
    assert other.losses != first.losses
    assert plan(cache=tmp_path / "kept", activations="16").losses.weights == first.losses.weights


def test_the_bytes_of_a_description_are_kept_for_this_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def student(model: nn.Module, **settings: Any) -> Student:
        return insert_quantizers(prepare(capture(model, cases.images(2))), Scheme(weights=8, activations=8, **settings))

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.the_whole_of_it = cases.model("residual")

        def forward(self, x: torch.Tensor) -> Any:
            return self.the_whole_of_it(x)

    own = student(cases.model("residual"))
    found = measured.kept_overhead(own, tmp_path)
    assert found == overhead_bytes(own)
    with monkeypatch.context() as patch:
        patch.setattr(measured, "overhead_bytes", lambda _: pytest.fail("measured again"))
        assert measured.kept_overhead(student(cases.model("residual")), tmp_path) == found
    changed = copy.deepcopy(cases.model("residual"))
    with torch.no_grad():
        next(changed.parameters()).mul_(1.5)
    others = [student(Renamed()), student(changed), student(cases.model("residual"), granularity="tensor")]
    monkeypatch.setattr(measured, "overhead_bytes", lambda _: -1)
    assert [measured.kept_overhead(other, tmp_path) for other in others] == [-1, -1, -1]


def test_damaged_losses_are_named_and_measured_again(tmp_path: Path) -> None:
    first = plan(cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_text(file.read_text().replace("1", "2"))
    with pytest.warns(UserWarning, match="damaged .* measured again"):
        again = plan.__wrapped__(cache=tmp_path)
    assert again.losses == first.losses


def test_a_folder_that_cannot_be_made_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="are not kept"):
        assert plan(cache=tmp_path / "file" / "below").plan.layers


def test_layers_without_a_loss_keep_the_most_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MeasuredLoss.measure

    def without_conv(self: MeasuredLoss, *given: Any) -> Table:
        table = real(self, *given)
        table.weights.pop("conv", None)
        return table

    monkeypatch.setattr(MeasuredLoss, "measure", without_conv)
    with pytest.warns(UserWarning, match=r"No loss was measured for conv \(weights\)") as said:
        found = plan.__wrapped__()
    assert len(said) == 1
    assert found.bits(found.plan)["weights"]["conv"] == 8
    assert found.bits(found.curve[0])["weights"]["conv"] == 8
    assert found.losses_of(found.plan)["weights"]["conv"] == 0.0


def test_measures_without_activations_leave_them_to_measured_losses() -> None:
    found = plan(measure="trace", activations="4,8")
    assert found.measured.settings["activations"] == "loss"
    assert found.losses.activations == plan(activations="4,8").losses.activations
    assert found.losses.weights != plan(activations="4,8").losses.weights


def test_the_same_seed_gives_the_same_plan() -> None:
    once, again = plan(measure="trace", seed=3), plan.__wrapped__(measure="trace", seed=3)
    assert once.plan == again.plan
    assert once.curve == again.curve


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x.flatten(1))


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).mean((2, 3))


def test_a_network_of_one_layer_and_one_image() -> None:
    torch.manual_seed(0)
    found = bw.plan_bits(One(), cases.images(1), weights="2,4,8")
    assert list(found.bits(found.plan)["weights"].items()) == [("only", 4)]
    assert [found.bits(p)["weights"]["only"] for p in found.curve] == [2, 4, 8]


def test_a_single_choice_leaves_one_point() -> None:
    found = plan(weights="4")
    assert len(found.curve) == 1
    assert set(found.bits(found.plan)["weights"].values()) == {4}


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="Expected weights whose bits can be planned"):
        bw.plan_bits(Nothing(), cases.images(2))


def test_more_than_enough_gives_the_least_loss() -> None:
    found = plan(target_size="1GB")
    assert found.plan.predicted["loss"] == min(p.predicted["loss"] for p in found.curve)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_size": "100B"}, r"at most 100 B of weight bytes, reachable are .* at 2 bits"),
        ({"compression": 1000}, r"A compression of 1000 is a file of .*; reachable are [\d.]+ to [\d.]+\. Expected"),
        ({"max_bops": 5}, r"Expected at most 5 bit operations, reachable"),
        ({"max_activation_size": "1B"}, r"at most 1 B of activation bytes"),
        ({"measure": "guess"}, "one of .*, .* as measure="),
        ({"by": "beauty"}, "Expected a curve by one of size"),
        ({"points": 1}, "at least 2 as points=, found 1"),
        ({"samples": 0}, "at least 1 as samples="),
        ({"weights": "float"}, "bits of weights to choose among"),
        ({"weights": "4,9"}, "found '9'"),
        ({"weights": ""}, "found ''"),
        ({"activations": "4,float"}, "bits of activations to choose among"),
        ({"target_size": "3MB", "compression": 3}, "Expected one of target_size= and compression=, found both"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        plan(**asked)
    assert "\n" not in str(caught.value)


def test_the_reachable_compressions_can_be_asked_for() -> None:
    with pytest.raises(UsageError) as caught:
        plan("transformer", compression=1000)
    least, most = str(caught.value).split("reachable are ")[1].split(". ")[0].split(" to ")
    smallest = sizes(plan("transformer"))[0]
    assert plan("transformer", compression=most).plan.predicted["weight_bytes"] == pytest.approx(smallest, rel=0.01)
    assert plan("transformer", compression=least).plan.layers


def test_latencies_are_limited_by_the_table_that_is_given() -> None:
    def table(student: Any) -> dict[str, dict[tuple[int, int], float]]:
        return {x.name: {(w, 8): 1e-3 * w for w in (2, 4, 8)} for x in student.layers if x.weight}

    found = plan(max_latency=14, latency=table)
    assert found.limits == {"latency": 0.014}
    assert sum(found.bits(found.plan)["weights"].values()) <= 14
    assert found.plan.predicted["latency"] <= 0.014
    assert found.timing is None
    with pytest.raises(UsageError, match="at most 5 ms of latency, reachable are 6 ms to 24 ms"):
        plan(max_latency="5ms", latency=table)


def test_points_can_be_taken() -> None:
    found = plan()
    assert found.at(2).plan == found.curve[1]
    for point in (0, len(found.curve) + 1):
        with pytest.raises(UsageError, match=f"1 to {len(found.curve)}, found {point}"):
            found.at(point)


def test_plans_are_obeyed() -> None:
    found = plan("transformer", activations="4,8,16")
    made = insert_plan(cases.prepared("transformer"), found.plan, planning.open_scheme(Scheme(), found.goal))
    by_key = {v.key: v for v in found.variables.values()}
    chosen = found.bits(found.plan)
    for key, variable in by_key.items():
        half = "weights" if variable.kind == "weight" else "activations"
        assert made.quantizer(key).grid.bits == chosen[half][variable.name]


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
