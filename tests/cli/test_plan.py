"""`bitwright plan`, and `bitwright quantize` within limits, in this process."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright as bw
from bitwright.bits.plan import Plan
from bitwright.cli import main, plans
from bitwright.run.record import add_plan_outcome
from bitwright.stages.calibrate import Calibrate

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 128, 3, 2, 1), nn.Linear(128, 8)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(432, 3)

    def forward(self, x):
        return self.only(x.flatten(1))


class Number(One):
    def forward(self, x):
        return super().forward(x).sum(1)
"""
PROMISE = "The network agrees with the float one on 90.00 % of the images measured on"
PLAN = ["plan", "models.py:Net", "photos.npz"]
QUANTIZE = ["quantize", "models.py:Net", "photos.npz", "--recipe", "mse"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "photos.npz", images=generator.standard_normal((32, 3, 12, 12)).astype(np.float32))
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "scores"))
    monkeypatch.delenv("BITWRIGHT_DEBUG", raising=False)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *call: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*call, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_the_files_agree_and_the_last_line_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = answer(capsys, *PLAN)
    assert [Path(p).name for p in facts["files"]] == ["plan.json", "pareto.json", "plan.html"]
    assert json.loads((here / "plan/pareto.json").read_text()) == {k: v for k, v in facts.items() if k != "files"}
    planned = Plan.read("plan/plan.json")
    assert {n: planned.layers[n].weight.bits for n in ("stem", "body", "head")} == facts["chosen"]["weights"]
    assert planned.predicted == facts["predicted"]
    page = (here / "plan/plan.html").read_text()
    assert "<script src=" not in page
    assert facts["next"] in html.unescape(re.sub(r"<[^>]+>", "", page))
    assert page.count('class="chart"') == 2
    assert facts["next"] == "bitwright quantize models.py:Net photos.npz --plan plan/plan.json"
    call = shlex.split(facts["next"])[1:]
    result = answer(capsys, *call, "--recipe", "mse", "--out", "run")
    assert {r["name"]: r["weight_bits"] for r in result["layers"] if r["name"] in ("stem", "body", "head")} == (
        facts["chosen"]["weights"]
    )
    assert result["size"]["packed_bytes"] == pytest.approx(facts["predicted"]["weight_bytes"], rel=0.02)


def test_what_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    shown = capsys.readouterr().out
    for text in (
        "4 bits everywhere",
        "point 1",
        "measured now and kept in",
        "Without a limit",
        "Written: plan/plan.json",
    ):
        assert text in shown
    assert shown.strip().splitlines()[-1].startswith("Next: bitwright quantize")
    assert main([*PLAN, "--target-size", "60kB", "--force"]) == 0
    shown = capsys.readouterr().out
    assert f"were there already, in {here / 'scores'}" in shown
    assert "size of model.safetensors: " in shown
    assert "at most 60 kB allowed" in shown
    assert "The limit allows more than any plan needs" in shown


def test_a_point_can_be_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = answer(capsys, *PLAN)
    third = answer(capsys, *PLAN, "--point", "3", "--force")
    assert third["chosen"]["weights"] == first["points"][2]["weights"]
    assert third["measures_reused"]
    assert not first["measures_reused"]


def test_the_next_line_repeats_what_matters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = answer(
        capsys, *PLAN, "--activations", "float", "--input-size", "12", "--out", "with space", "--weights", "2,8"
    )
    assert facts["next"].endswith("--plan 'with space/plan.json' --input-size 12 --activations float")
    result = answer(capsys, *shlex.split(facts["next"])[1:], "--recipe", "mse", "--dry-run")
    assert result["bits"]["activations"] is None
    assert {r["activation_bits"] for r in result["layers"]} == {None}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ([*PLAN, "--target-size", "1kB"], "Expected at most 1 kB of weight bytes, reachable are"),
        ([*PLAN, "--target-size", "-3kB"], "Expected a size such as"),
        ([*PLAN, "--target-size", "0MB"], "above 0, as --target-size, found '0MB'"),
        ([*PLAN, "--target-size", "35000"], "Expected a size with its unit"),
        ([*PLAN, "--target-size", "small"], "Expected a size such as"),
        ([*PLAN, "--target-size", "nanMB"], "Expected a size such as"),
        ([*PLAN, "--compression", "0"], "Expected a compression such as 6, above 0, as --compression, found '0'"),
        ([*PLAN, "--compression", "900"], "A compression of 900 is a file of"),
        ([*PLAN, "--max-bops", "many"], "Expected a number such as 2e9 or 2G"),
        ([*PLAN, "--max-latency", "5m"], "Expected milliseconds such as 5"),
        ([*PLAN, "--point", "99"], "Expected a point of the curve, 1 to"),
        ([*PLAN, "--point", "2", "--compression", "4"], "Expected --point or limits, found both"),
        ([*PLAN, "--target-size", "9kB", "--compression", "4"], "Expected one of --target-size and --compression"),
        ([*PLAN, "--max-drop", "0.1", "--by", "bops"], "Expected a curve by size beside --max-drop, found 'bops'"),
        ([*PLAN, "--compression", "4", "--max-drop", "0.1"], "Expected one of --compression and --max-drop"),
        ([*PLAN, "--task", "segmentation"], "Expected --max-drop beside --task or --metric"),
        ([*PLAN, "--max-drop", "0.1", "--decode", "models.py:Net"], "beside --decode of a goal, found neither"),
        ([*PLAN, "--weights", "2,float"], "Expected bits of weights to choose among"),
        ([*PLAN, "--rule", "nowhere=w8"], "matches no layer"),
        ([*PLAN, "--measure", "luck"], "as --measure, found 'luck'"),
        ([*QUANTIZE, "--target-size", "9kB", "--compression", "4"], "Expected one of --target-size and --compression"),
        ([*QUANTIZE, "--target-size", "9kB", "--max-drop", "0"], "Expected one of --target-size and --max-drop"),
        ([*QUANTIZE, "--plan", "x.json", "--max-drop", "0.1"], "Expected --plan or --max-drop, found both"),
        ([*QUANTIZE, "--max-drop", "2"], "such as 0.01 or 1%, as --max-drop, found '2'"),
        ([*QUANTIZE, "--max-drop", "-0.1"], "Expected a share between 0 and 1"),
        ([*QUANTIZE, "--weights", "2,4"], "Several bits (--weights) are for a plan"),
        ([*QUANTIZE, "--target-size", "1kB"], "Expected at most 1 kB of weight bytes, reachable are"),
        (["quantize", "models.py:Number", "photos.npz", "--max-drop", "0.1"], "Expected class scores to count"),
        (["quantize", "models.py:Net", "photos.npz[:1]", "--max-drop", "0.1"], "Expected at least 2 images"),
    ],
)  # fmt: skip
def test_wrong_calls_are_answered_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], call: list[str], said: str
) -> None:
    assert main([*call, "--out", "out"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (here / "out").exists()


def test_files_of_an_earlier_call_stay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "plan").mkdir()
    (here / "plan/plan.html").write_text("mine")
    assert main(PLAN) == 2
    assert "plan.html is there already" in capsys.readouterr().err
    assert (here / "plan/plan.html").read_text() == "mine"


def test_a_file_of_the_size_that_was_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = answer(capsys, *PLAN)["points"]
    wanted = int(0.5 * (curve[0]["weight_bytes"] + curve[-1]["weight_bytes"]))
    result = answer(capsys, *QUANTIZE, "--target-size", f"{wanted}B", "--out", "run")
    size, plan = result["size"]["packed_bytes"], result["plan"]
    assert size == (here / "run/model.safetensors").stat().st_size <= wanted
    assert size == pytest.approx(plan["predicted"]["weight_bytes"], rel=0.02)
    assert plan["packed"]["bytes"] == size
    assert plan["goal"]["target_size"] == wanted
    assert plan["measures_reused"]
    assert result["bits"]["weights"] == "mixed"
    bits = {r["name"]: r["weight_bits"] for r in result["layers"] if r["weight_bits"]}
    dry = answer(capsys, *QUANTIZE, "--target-size", f"{wanted}B", "--dry-run")
    assert {r["name"]: r["weight_bits"] for r in dry["layers"] if r["weight_bits"]} == bits
    assert dry["plan"]["predicted"] == plan["predicted"]
    assert not (here / "runs").exists()
    by_hand = bw.quantize(bw.load_model("models.py:Net"), "photos.npz", "mse", target_size=wanted)
    assert {r["name"]: r["weight_bits"] for r in by_hand.result["layers"] if r["weight_bits"]} == bits


def test_the_smallest_network_that_keeps_its_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [*QUANTIZE, "--max-drop", "0.25", "--weights", "2,3,8"]
    result = answer(capsys, *call, "--out", "run")
    plan = result["plan"]
    assert plan["estimate"]["agreement"] >= 0.75
    assert plan["estimate"]["images"] == 16
    assert plan["measured"]["agreement"] == result["fidelity"]["agreement"]
    assert plan["measured"]["same_as_calibration"]
    dry = answer(capsys, *call, "--dry-run")
    assert dry["plan"]["estimate"] == plan["estimate"]
    all_of_it = answer(capsys, *QUANTIZE, "--max-drop", "100%", "--weights", "2,3,8", "--dry-run")
    assert {r["weight_bits"] for r in all_of_it["layers"] if r["weight_bits"]} == {2}


def test_a_plan_by_its_answers_is_that_of_quantize(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--max-drop", "0.25", "--weights", "2,3,8"]
    run = answer(capsys, *QUANTIZE, *wanted, "--dry-run")
    facts = answer(capsys, *PLAN, *wanted, "--recipe", "mse")
    assert facts["estimate"] == run["plan"]["estimate"]
    assert facts["chosen"]["weights"] == {r["name"]: r["weight_bits"] for r in run["layers"] if r["weight_bits"]}
    assert "Estimated: same answer as float on " in (here / "plan/plan.html").read_text()
    done = answer(capsys, *shlex.split(facts["next"])[1:], "--dry-run")
    assert done["layers"] == run["layers"]


def test_a_plan_by_a_figure_tries_what_the_metric_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "def likeness(outputs, truth):\n    return 1 - (outputs - truth).abs().mean() / truth.abs().mean()\n"
    (here / "own.py").write_text(own)
    call = [*PLAN, "--weights", "2,8", "--recipe", "mse", "--metric", "own.py:likeness"]
    few, many = (answer(capsys, *call, "--max-drop", drop, "--force") for drop in ("0.9", "0.05"))
    assert few["estimate"]["figure"] == "likeness"
    assert few["predicted"]["weight_bytes"] < many["predicted"]["weight_bytes"]
    assert many["estimate"]["agreement"] >= 0.95


def test_interrupted_and_resumed_it_is_the_same(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*QUANTIZE, "--max-drop", "0.2", "--weights", "2,3,8", "--recipe", "optq"]
    whole = answer(capsys, *call, "--out", "whole")
    from bitwright.bits import trials

    real = trials.smallest

    def then_stop(*given: Any) -> Any:
        found = real(*given)
        monkeypatch.setattr(Calibrate, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(trials, "smallest", then_stop)
        patch.setattr(Calibrate, "run", Calibrate.run)
        assert main([*call, "--out", "run"]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(trials, "_agreement", lambda *_: pytest.fail("tried again"))
    resumed = answer(capsys, *call, "--out", "run", "--resume")
    assert resumed["plan"]["estimate"] == whole["plan"]["estimate"]
    files = [(here / run / "model.safetensors").read_bytes() for run in ("whole", "run")]
    assert files[0] == files[1]


def test_a_file_that_is_not_as_planned_is_said() -> None:
    result: dict[str, Any] = {
        "plan": {"predicted": {"weight_bytes": 1000}, "limits": {"weight_bytes": 1010}, "estimate": {"drop": 0.01}},
        "size": {"packed_bytes": 1030},
        "fidelity": {"agreement": 0.9},
        "data": {"evaluation": {"count": 1000, "same_as_calibration": False}},
    }
    said = add_plan_outcome(result)
    assert result["plan"]["packed"]["difference"] == pytest.approx(0.03)
    assert [line.split(",")[0] for line in said] == [
        "model.safetensors has 1", "model.safetensors has 1", PROMISE,
    ]  # fmt: skip
    assert "20 more than wanted" in said[1]


def test_a_network_of_one_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = answer(capsys, "plan", "models.py:One", "photos.npz[:1]", "--weights", "4")
    assert facts["chosen"]["weights"] == {"only": 4}
    assert len(facts["points"]) == 1
    assert main(["plan", "models.py:One", "photos.npz", "--force"]) == 0


def test_where_losses_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", "/a")
    assert plans.scores(None) == Path("/a")
    assert plans.scores(tmp_path) == tmp_path
    monkeypatch.delenv("BITWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert plans.scores(None) == Path("/b/bitwright")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plans.scores(None) == Path("~/.cache/bitwright")
