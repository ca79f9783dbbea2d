"""Reconstruction of layers and blocks: what each unit is fed, and what must come out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Deaf, dataset, images, prepared
from pydantic import ValidationError
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import capture
from bitwright.graph.points import linear_points
from bitwright.graph.prepare import prepare
from bitwright.graph.segments import truncate
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.units import Unit, find_units, part, quantized
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe, recipe
from bitwright.stages import feeds, resume
from bitwright.stages import reconstruct as module
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.feeds import Fisher, UnitFeed, UnitPlace, find_places
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Anneal, Gradual, Learn
from bitwright.stages.targets import as_channels_last
from bitwright.stages.tuning import Objective

CALIBRATE = Calibrate(weights="minmax", activations="minmax")
NAMES = ["residual", "transformer", "dense", "shifted_window"]
SOFT: dict[str, Any] = {
    "rounding": "soft",
    "codes": Learn(rate=3e-2, schedule="constant"),
    "weight_step": None,
    "bias": None,
    "activation_step": None,
    "decide": Anneal(weight=0.01, quiet=True),
}
QUICK: dict[str, Any] = {"batch": 8, "steps": 20, "weigh": "ones"}


def optimise(stage: Reconstruct, name: str = "residual", *, bits: int = 3, **settings: Any) -> tuple[Student, Run]:
    student = insert_quantizers(prepared(name), Scheme(weights=bits, activations=4))
    run = Run(**{"seed": 1, "precision": "float32"} | {k: v for k, v in settings.items() if k != "state"})
    chosen = Recipe(name="test", stages=(CALIBRATE, stage))
    state = settings.get("state")
    return run_stages(chosen, student, prepared(name), dataset(16), run, state=state, identity="test"), run


def units(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.records[-1].keys()["reconstruct"]["units"]
    return found


def assert_same(a: Student, b: Student) -> None:
    ours, theirs = dict(a.graph.named_buffers()), dict(b.graph.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def differ(a: Student, b: Student) -> bool:
    theirs = dict(b.graph.named_buffers())
    return any(not torch.equal(v, theirs[k]) for k, v in a.graph.named_buffers())


def calibrated(name: str) -> Student:
    student = insert_quantizers(prepared(name), Scheme(weights=3, activations=4))
    return CALIBRATE.run(student, prepared(name), dataset(16), Run())


def places(name: str, student: Student) -> list[UnitPlace]:
    return find_places(student.graph, prepared(name).graph, prepared(name).example, "block")


# ------------------------------------------------------------------------------------------------ what it claims


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_every_unit_ends_no_worse_at_its_exit_and_most_better(name: str, unit: Any) -> None:
    student, run = optimise(Reconstruct(unit=unit, **QUICK), name)
    found = units(run)
    assert [u["layers"] for u in found] == [list(u.layers) for u in find_units(prepared(name).graph, unit)]
    assert all(u["after"] <= u["before"] for u in found)
    assert sum(u["after"] < u["before"] for u in found) > len(found) / 2
    record = run.records[-1]
    assert record.after == pytest.approx(sum(u["after"] for u in found))
    before = student.flat(images(4))
    assert all(torch.equal(a, b) for a, b in zip(before, student.freeze().flat(images(4)), strict=True))


def test_adaround_lowers_the_output_error_of_a_layer_and_raises_that_of_its_weight() -> None:
    """One layer: up or down beats nearest at the output, and cannot at the weight."""
    stage = Reconstruct(unit="layer", activations=False, **SOFT, **{**QUICK, "steps": 150})
    student, run = optimise(stage, bits=2)
    start, teacher = calibrated_with(2), prepared("residual")
    assert all(u["after"] < u["before"] for u in units(run))
    exact = rewrite.get_tensor(teacher.graph, "stem.weight")
    learned, nearest = (s.quantizer("quantizer_weight_stem") for s in (student, start))
    assert torch.equal(learned.scale, nearest.scale)
    codes = learned.codes(rewrite.get_tensor(student.graph, "stem.weight"))
    real = exact / nearest.expanded()[0]
    low, high = nearest.grid.qmin, nearest.grid.qmax
    up, down = ((real.floor() + d).clamp(low, high) for d in (1, 0))
    assert bool(((codes == up) | (codes == down)).all())
    step = nearest.expanded()[0]
    assert float((codes * step - exact).square().sum()) > float((nearest(exact) - exact).square().sum())


def calibrated_with(bits: int) -> Student:
    student = insert_quantizers(prepared("residual"), Scheme(weights=bits, activations=4))
    return CALIBRATE.run(student, prepared("residual"), dataset(16), Run())


def test_a_unit_that_does_not_gain_is_left_as_it_was() -> None:
    stage = Reconstruct(unit="block", **QUICK, codes=Learn(rate=50.0, schedule="constant"))
    student, run = optimise(stage)
    assert not any(u["kept"] for u in units(run))
    assert all(u["after"] == u["before"] for u in units(run))
    assert_same(student, calibrated("residual"))
    _, run = optimise(stage.model_copy(update={"never_worse": False}))
    assert all(u["kept"] for u in units(run))
    assert any(u["after"] > u["before"] for u in units(run))


def test_one_unit_of_everything_is_the_network_compared_at_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**QUICK, "never_worse": False}
    layers = [n for n in prepared("residual").graph.graph.nodes if ops.kind(n) == "linear"]
    names, paths = tuple(n.name for n in layers), tuple(str(n.meta["layer"]) for n in layers)
    monkeypatch.setattr(feeds, "find_units", lambda *_: [Unit("all", paths, names, names[-1:])])
    one, _ = optimise(Reconstruct(unit="block", **settings))
    assert_same(one, optimise(Reconstruct(unit="block", order="reverse", **settings))[0])
    monkeypatch.setattr(module, "linear_points", lambda *args: linear_points(*args)[-1:])
    assert_same(one, optimise(Reconstruct(unit="network", **settings))[0])
    assert differ(one, calibrated("residual"))


# ------------------------------------------------------------------------------------------- sizes and their order


@pytest.mark.parametrize("size", ["layer", "block", "network"])
def test_growing_through_one_size_is_that_size(size: Any) -> None:
    grown, run = optimise(Reconstruct(unit=(size,), **QUICK))
    assert_same(grown, optimise(Reconstruct(unit=size, **QUICK))[0])
    assert len(run.records) == 2


def test_units_that_grow_are_a_stage_for_each_size() -> None:
    growing = Reconstruct(unit=("layer", "block", "network"), weigh="fisher", float_inputs=0.5, steps=3, share=3.0)
    parts = Recipe(name="test", stages=(growing,)).stages
    assert [(p.unit, p.weigh, p.float_inputs) for p in parts] == [
        ("layer", "fisher", 0.5),
        ("block", "fisher", 0.5),
        ("network", "ones", 0.0),
    ]
    assert sum(p.share for p in parts) == pytest.approx(3.0)
    given = {"name": "test", "stages": [{"reconstruct": {"unit": ["layer", "block", "network"], "weigh": "sla"}}]}
    assert [p.weigh for p in Recipe.model_validate(given).stages] == ["ones", "ones", "sla"]
    with pytest.raises(UsageError, match="Run the parts"):
        growing.run(calibrated("residual"), prepared("residual"), dataset(4), Run())


def test_growing_goes_on_from_what_smaller_units_left() -> None:
    """Each size ends with a loss at the network's layers that is no higher than what it was given."""
    stage = Reconstruct(unit=("block", "network"), **{**QUICK, "codes": Learn(rate=1e-3)})
    _, run = optimise(stage, "transformer")
    first, second = run.history[1][1], run.history[2][1]
    assert any(not torch.equal(second.tensors[k], v) for k, v in first.tensors.items())
    losses = run.records[-1].keys()["reconstruct"]["loss"]["by_stage"]
    assert list(losses) == ["calibrate", "reconstruct", "reconstruct 2"]
    assert losses["reconstruct 2"] < losses["reconstruct"] < losses["calibrate"]


@pytest.mark.parametrize("name", NAMES)
def test_in_reverse_the_last_unit_comes_first(name: str) -> None:
    student = calibrated(name)
    graphs = student.graph, prepared(name).graph, prepared(name).example
    forward, back = (find_places(*graphs, "block", reverse=r) for r in (False, True))
    assert [p.unit for p in back] == [p.unit for p in forward][::-1]
    assert not forward[0].fixed
    assert not back[0].fixed
    assert all(a.fixed <= b.fixed for places in (forward, back) for a, b in itertools.pairwise(places))
    _, run = optimise(Reconstruct(unit="block", order="reverse", **QUICK), name)
    assert [u["name"] for u in units(run)] == [p.unit.name for p in back]
    assert all(u["after"] <= u["before"] for u in units(run))
    assert sum(u["after"] < u["before"] for u in units(run)) > len(back) / 2


# ----------------------------------------------------------------------------------------------------- its inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_inputs_is_the_float_networks(name: str) -> None:
    student, teacher, samples = calibrated(name), prepared(name), dataset(16)
    nodes = {n.name: n for n in student.graph.graph.nodes}
    place = places(name, student)[-1]
    x = as_channels_last(samples.batch(range(16)))
    with torch.no_grad():
        ours, theirs = truncate(student.graph, place.cut.entries)(x), truncate(teacher.graph, place.floats)(x)
        exits = truncate(teacher.graph, place.unit.exits)(x)
    for share in (0.0, 0.5, 1.0):
        feed = UnitFeed(samples, place, student.graph, teacher.graph, share, torch.device("cpu"))
        for kept in (False, True):
            if kept:
                assert feed.keep(1 << 30, 1000, 16) == place.by_image
            inputs, targets, roots = feed(torch.arange(16))
            assert roots is None
            assert all(torch.equal(a, b) for a, b in zip(targets, exits, strict=True))
            for found, a, b in zip(inputs, ours, theirs, strict=False):
                from_float = float(((found == b) & (a != b)).sum() / (a != b).sum().clamp_min(1))
                assert bool(((found == a) | (found == b)).all())
                assert from_float == pytest.approx(share, abs=0.15)
    assert place.cut.exits == tuple(quantized(nodes[n]).name for n in place.unit.exits)
    fixed = UnitFeed(samples, place, student.graph, teacher.graph, 0.5, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(fixed(torch.arange(16), mixed=False).inputs, ours, strict=False))


def test_no_drop_and_all_drop_are_their_limits() -> None:
    """Elements that are never float are quantized activations; those that always are leave them out."""
    stage = Reconstruct(unit="block", **SOFT, **QUICK)
    drop = {p: Gradual(how="drop", start=p, hold=True) for p in (0.0, 1.0)}
    never = optimise(stage.model_copy(update={"gradual": drop[0.0]}))[0]
    assert_same(never, optimise(stage)[0])
    same = {"never_worse": False, "float_inputs": 1.0}
    always = optimise(stage.model_copy(update={"gradual": drop[1.0], **same}))[0]
    assert_same(always, optimise(stage.model_copy(update={"activations": False, **same}))[0])
    assert differ(never, always)


def test_what_does_not_fit_is_kept_in_half_the_bytes_or_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**QUICK, "steps": 20}
    whole, run = optimise(Reconstruct(unit="block", **settings))
    assert {u["inputs"] for u in units(run)} == {"kept"}
    monkeypatch.setattr(module, "UNIT_MEMORY", 0)
    live, run = optimise(Reconstruct(unit="block", **settings))
    assert {u["inputs"] for u in units(run)} == {"live"}
    for a, b in zip(live.flat(images(4)), whole.flat(images(4)), strict=True):
        assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())
    student = calibrated("residual")
    place = places("residual", student)[1]
    feed = UnitFeed(dataset(16), place, student.graph, prepared("residual").graph, 0.0, torch.device("cpu"))
    size = 16 * 2 * 4 * 64 * 4
    for budget, dtype in ((size, torch.float32), (size // 2, torch.bfloat16), (size // 2 - 1, None)):
        feed.kept = None
        assert feed.keep(budget, 1000, 8) == (dtype is not None)
        assert (feed.kept[0].dtype if feed.kept else None) == dtype


# ------------------------------------------------------------------------------------------------ Fisher weights


def test_fisher_weights_are_the_squared_gradient_of_the_networks_loss() -> None:
    student, teacher, x = calibrated("residual"), prepared("residual"), dataset(16).batch(range(8))
    place = places("residual", student)[-1]  # ends at the outputs: the gradient of KL is p - q
    fisher = Fisher(place, student.graph, teacher.graph, x)
    with torch.no_grad():
        q, p = (net(x)[0].double().softmax(1) for net in (student.graph, teacher.graph))
    torch.testing.assert_close(fisher.squares(x)[0].double(), (q - p).square(), rtol=1e-3, atol=1e-9)
    assert float(fisher.roots(x)[0].square().mean()) == pytest.approx(1.0, rel=1e-4)
    first = places("residual", student)[0]
    squares = Fisher(first, student.graph, teacher.graph, x).squares(x)
    assert squares[0].shape == (8, 4, 8, 8)
    assert bool((squares[0] > 0).any())


def test_where_nothing_is_quantized_fisher_weights_are_zero() -> None:
    student = insert_quantizers(prepared("residual"), Scheme(weights=3, activations=4))
    for place in places("residual", student):
        assert Fisher(place, student.graph, prepared("residual").graph, dataset(16).batch(range(8))).scale == 0


def test_weights_that_are_zero_are_not_taken() -> None:
    teacher, run = prepare(capture(Deaf(), images(2))), Run(seed=1, precision="float32")
    student = insert_quantizers(teacher, Scheme(weights=3, activations=4))
    stages = (CALIBRATE, Reconstruct(unit="block", **{**QUICK, "weigh": "fisher"}))
    with pytest.warns(UserWarning, match="count equally"):
        run_stages(Recipe(name="test", stages=stages), student, teacher, dataset(16), run)
    assert units(run)[0]["after"] < units(run)[0]["before"]


def test_the_low_rank_part_is_the_squared_product_of_error_and_gradient() -> None:
    """Of each image, in the middle of the network, and both parts count alike at the start."""
    student, teacher, x = calibrated("residual"), prepared("residual"), as_channels_last(dataset(16).batch(range(8)))
    place = places("residual", student)[0]
    fisher = Fisher(place, student.graph, teacher.graph, x, signed=True)
    feed = UnitFeed(dataset(16), place, student.graph, teacher.graph, 0.0, torch.device("cpu"), fisher)
    batch = feed(torch.arange(8))
    with torch.no_grad():
        values = part(student.graph, place.cut)(*batch.inputs)[1]
        (target,) = truncate(teacher.graph, place.unit.exits)(x)
    (slope,), error = fisher.slopes(x), (values[0] - target).double()
    along = (error * slope.double()).flatten(1).sum(1).square() / fisher.scale
    plain = Objective(place.exits, torch.ones(16, 1), "sum", normalise=False)
    diagonal, both = (
        float(o.distances(values, batch, torch.ones(8, 1))[0]) for o in (plain, replace(plain, along=0.5))
    )
    assert diagonal == pytest.approx(
        float((error * slope).square().flatten(1).sum(1).mean()) / fisher.scale / 64, rel=1e-4
    )
    assert both - diagonal == pytest.approx(0.5 * float(along.mean()), rel=1e-3)
    even = plain.with_rank_one(values, batch, 8)
    assert float(even.distances(values, batch, torch.ones(8, 1))[0]) == pytest.approx(2 * diagonal)


@pytest.mark.parametrize("weigh", ["fisher", "low-rank"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_from_gradients_on_any_network(name: str, weigh: str) -> None:
    student, run = optimise(Reconstruct(unit="block", **{**QUICK, "weigh": weigh}), name)
    assert all(u["after"] <= u["before"] for u in units(run))
    assert all(bool(torch.isfinite(b).all()) for n, b in student.graph.named_buffers() if "scale" in n)


# --------------------------------------------------------------------------------------------- repeat and resume


@pytest.mark.parametrize("at", [7, 31, 41])
def test_an_interrupted_run_gives_the_same_integers(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first of three units, in the second, and in the first step of the third."""
    stage = Reconstruct(unit="block", **SOFT, **QUICK, float_inputs=0.5)
    whole, first = optimise(stage)
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resume, "CHECKPOINT_SHARE", 1e9)
    seen: list[int] = []

    def interrupt(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "Optimising" and done == at:
            assert total == 60
            raise KeyboardInterrupt

    def follow(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "Optimising":
            seen.append(done)

    with pytest.raises(KeyboardInterrupt):
        optimise(stage, state=tmp_path, progress=interrupt)
    resumed, second = optimise(stage, state=tmp_path, progress=follow)
    assert at - 1 <= seen[0] <= at, "it began anew"
    assert_same(whole, resumed)
    ours, theirs = (_without_seconds(units(r)) for r in (first, second))
    assert ours == theirs


def _without_seconds(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_earlier_units_are_not_changed_by_later_ones() -> None:
    seen: list[dict[str, Tensor]] = []
    tune = Reconstruct._tune_unit

    def follow(self: Reconstruct, student: Student, *rest: Any) -> Any:
        found = tune(self, student, *rest)
        seen.append(dict(student.graph.named_buffers()))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Reconstruct, "_tune_unit", follow)
        student, _ = optimise(Reconstruct(unit="block", **QUICK))
    end = dict(student.graph.named_buffers())
    for name in ("stem.weight", "stem.bias", "quantizer_weight_stem.scale", "quantizer_activation_input.scale"):
        assert torch.equal(seen[0][name], end[name])
    assert any(not torch.equal(seen[0][k], v) for k, v in end.items())


def test_minutes_become_steps_of_every_unit_that_repeat_the_run() -> None:
    timed, run = optimise(Reconstruct(unit="block", **QUICK), minutes=0.05)
    steps = run.records[-1].keys()["reconstruct"]["steps"]
    assert steps >= 1
    assert_same(timed, optimise(Reconstruct(unit="block", **QUICK), steps=steps)[0])


def test_no_steps_leave_the_start() -> None:
    with pytest.warns(UserWarning, match="nothing to optimise"):
        student, _ = optimise(Reconstruct(unit="block", **QUICK), steps=0)
    assert_same(student, calibrated("residual"))


@pytest.mark.parametrize(
    "settings",
    [
        {"unit": "block", "weigh": "sla"},
        {"unit": ("layer", "block"), "weigh": "lfh"},
        {"unit": (), "weigh": "ones"},
        {"weigh": "fisher"},
        {"weigh": "ones", "float_inputs": 0.5},
    ],
)
def test_settings_that_a_unit_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"weigh|float_inputs|at least one size"):
        Reconstruct(**settings)


@pytest.mark.parametrize("unit", ["layer", ("layer", "block")])
def test_small_units_are_not_weighted_where_nothing_is_said(unit: Any) -> None:
    assert {part.weigh for part in Reconstruct(unit=unit).parts()} == {"ones"}
    assert Reconstruct(unit=("layer", "network")).weigh == Reconstruct().weigh == "sla"


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("case", ["residual", "transformer", "tuple_output", "shifted_window", "called_twice"])
@pytest.mark.parametrize("name", ["adaround", "adaquant", "autoround", "brecq", "fima", "qdrop"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_recipes_run_and_no_unit_is_worse(name: str, case: str) -> None:
    run = Run(steps=4, precision="float32")
    student = insert_quantizers(prepared(case), Scheme(weights=3, activations=4))
    student = run_stages(recipe(name), student, prepared(case), dataset(6), run)
    assert all(u["after"] <= u["before"] for u in units(run))
    assert all(bool(torch.isfinite(o).all()) for o in student.flat(images(2)))
