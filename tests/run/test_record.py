"""``result.json`` as the record of a run makes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import dataset, make

import bitwright as bw
from bitwright.graph.equalize import ChannelScales
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe, recipe
from bitwright.run.record import Outliers, Raised, RunRecord, StageRecord, Suggestion
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.evolve import Evolve
from bitwright.stages.reconstruct import Reconstruct

ALWAYS = {
    *("schema", "bitwright", "torch", "python", "platform", "device", "threads", "seed", "command", "model", "data"),
    *("recipe", "bits", "scheme", "size", "seconds", "peak_memory_bytes", "layers", "unquantized", "unfolded"),
    *("warnings", "suggestions", "stages"),
}
RAISE = Suggestion("head=a16", "head", 0.25, 0.1)


def record(**settings: object) -> RunRecord:
    facts = {"parameters": 10, "macs": 20, "images": 3, "sha256": "ab", "seconds": {"capture": 1.5}, "seed": 4}
    facts |= {"model": "net", "recipe": "mine", "settings": {"name": "mine"}, "scheme": Scheme(weights=4)}
    facts |= {"device": "cpu", "layers": [], "unquantized": [], "unfolded": [], "stages": [], "warnings": ["A line."]}
    return RunRecord(**{**facts, "outliers": Outliers(), **settings})  # type: ignore[arg-type]


def test_keys_of_a_run_to_which_nothing_happened() -> None:
    found = record().result()
    assert set(found) == ALWAYS
    assert found["model"] == {"name": "net", "parameters": 10, "macs": 20}
    assert found["data"] == {"calibration": {"count": 3, "sha256": "ab"}, "evaluation": None}
    assert found["bits"] == {"weights": 4, "activations": 8}
    assert (found["size"], found["seconds"]) == ({"float_bytes": 40}, {"capture": 1.5})
    assert (found["warnings"], found["suggestions"], found["stages"]) == (["A line."], [], [])


def test_what_was_done_about_outliers_has_keys_of_its_own() -> None:
    done = Outliers([ChannelScales("conv", (0, -3))], Raised(0.5, 0.125, [RAISE]), [RAISE])
    found = json.loads(json.dumps(record(outliers=done, plan=SimpleNamespace(of_run=lambda: {"limits": {}})).result()))
    row = {"rule": "head=a16", "tensor": "head", "predicted_gain": 0.25, "cost": 0.1}
    assert set(found) == ALWAYS | {"balanced", "raised", "plan"}
    assert found["balanced"] == [{"node": "conv", "exponents": [0, -3]}]
    assert found["raised"] == {"loss": 0.5, "left": 0.125, "rules": [row]}
    assert found["suggestions"] == [row]


class Shifted(StageRecord):
    kind: str = "shift"
    by: float
    note: str | None = None


def test_of_two_stages_of_a_kind_both_are_listed_and_the_last_has_the_key() -> None:
    stages = [StageRecord(kind="calibrate", seconds=2.0), Shifted(by=1.0, before=8.0, after=4.0), Shifted(by=3.0)]
    found = record(stages=stages).result()
    assert found["shift"] == {"by": 3.0}
    assert "calibrate" not in found
    assert found["stages"] == [
        {"kind": "calibrate", "seconds": 2.0},
        {"kind": "shift", "seconds": 0.0, "before": 8.0, "after": 4.0, "by": 1.0},
        {"kind": "shift", "seconds": 0.0, "by": 3.0},
    ]


def test_a_run_of_two_optimisations_and_a_search_tells_each_apart(tmp_path: Path) -> None:
    tune = Reconstruct(weigh="ones", batch=4, never_worse=False)
    last = tune.model_copy(update={"weigh": "lfh", "score_probes": 2})
    search = Evolve(passes=1, blocks="all", batch=6)
    made = Recipe(name="twice", stages=(Calibrate(weights="minmax"), tune, last, search))
    model = bw.quantize(make("residual"), dataset(12), made, weights=3, steps=(2, 3, 4), precision="float32")
    model.save(tmp_path / "run")
    found = bw.load(tmp_path / "run").result
    calibrate, one, two, evolved = found["stages"]
    assert [each["kind"] for each in found["stages"]] == ["calibrate", "reconstruct", "reconstruct", "evolve"]
    assert set(calibrate) == {"kind", "seconds"}
    assert (one["steps"], two["steps"], evolved["steps"]) == (2, 3, 4)
    assert found["reconstruct"]["steps"] == 3
    assert found["evolve"]["steps"] == 4
    assert one["loss"]["by_stage"].keys() == {"calibrate", "reconstruct"}
    assert (one["before"], one["after"]) == tuple(one["loss"]["by_stage"].values())
    assert two["loss"]["by_stage"].keys() == {"calibrate", "reconstruct", "reconstruct 2"}
    assert (two["before"], two["after"]) == tuple(two["loss"]["by_stage"].values())[1:]
    assert "scores" not in one
    assert found["scores"] == two["scores"]
    assert (evolved["before"], evolved["after"]) == tuple(evolved["fitness"][k] for k in ("before", "after"))


@pytest.mark.parametrize("name", ["rtn", "mse", "optq"])
def test_recipes_without_steps_have_no_key_of_a_stage(name: str) -> None:
    found = bw.quantize(make("residual"), dataset(6), name).result
    assert set(found) - {"balanced", "checked"} == ALWAYS
    assert [each["kind"] for each in found["stages"]] == [stage.kind for stage in recipe(name).stages]
