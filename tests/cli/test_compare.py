"""`bitwright compare`: the same for all, a failure that stops nobody, and going on after an interruption."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import interrupt

import bitwright as bw
from bitwright.cli import compare as command
from bitwright.cli import main, quantize
from bitwright.cli.calls import QuantizeCall
from bitwright.recipes import builtin_recipes

NET = """
import torch
from command_line import interrupt
from torch import nn

PREPROCESSING = {"input_size": (1, 28, 28), "mean": 0.5, "std": 0.25}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))
"""
BROKEN = """
from typing import ClassVar

from bitwright.errors import BitwrightError
from bitwright.recipes import Recipe
from bitwright.stages.base import Stage


class Broken(Stage):
    kind: ClassVar[str] = "broken"

    def run(self, student, teacher, images, run):
        raise BitwrightError("The stage <b>broke</b>.")


RECIPE = Recipe(name="broken", summary="Fails.", paper="", stages=(Broken(),))
"""
GIVEN = ["--weights", "4", "--evaluate", "zoo:fashion-test[:40]", "--seed", "3", "--out", "out"]


def call(root: Path, *more: str) -> list[str]:
    """The comparison with the network of the template, wherever it is called from."""
    return ["compare", f"{root}/net.py:net", "zoo:fashion[:12]", *GIVEN, *more]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three recipes, one of which fails."""
    root = tmp_path_factory.mktemp("compare")
    (root / "net.py").write_text(NET)
    (root / "broken.py").write_text(BROKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(call(root, "--recipes", "rtn,broken.py,mse")) == 1
        yield root


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    return str(line)


def test_every_recipe_has_a_run_of_its_own_on_the_same_terms(here: Path) -> None:
    results = [json.loads((here / "out" / name / "result.json").read_text()) for name in ("rtn", "mse")]
    assert [r["recipe"]["name"] for r in results] == ["rtn", "mse"]
    for key in ("seed", "scheme", "bits", "data"):
        assert results[0][key] == results[1][key], key
    assert results[0]["seed"] == 3
    assert results[0]["data"]["calibration"]["count"] == 12
    assert all((here / "out" / name / "report.html").is_file() for name in ("rtn", "mse"))
    again = bw.quantize("net.py:net", "zoo:fashion[:12]", "mse", weights=4, seed=3)
    images = torch.randn(4, 1, 28, 28)
    assert torch.equal(again(images), bw.load(here / "out" / "mse")(images))


def test_a_budget_is_for_the_recipes_that_optimise(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call(here, "--recipes", "rtn,eptq", "--steps", "2", "--out", "short")) == 0
    assert "change nothing" not in capsys.readouterr().err
    told = {name: json.loads((here / "short" / name / "result.json").read_text()) for name in ("rtn", "eptq")}
    assert told["eptq"]["reconstruct"]["steps"] == 2
    assert "reconstruct" not in told["rtn"]


def test_a_failure_is_shown_and_stops_nobody(here: Path) -> None:
    assert not (here / "out" / "broken").exists()
    record = json.loads((here / "out" / "compare.json").read_text())
    assert [(r["run"], r["error"] is None) for r in record["runs"]] == [("rtn", True), ("broken", False), ("mse", True)]
    text = (here / "out" / "compare.html").read_text()
    assert "The stage &lt;b&gt;broke&lt;/b&gt;." in text
    assert "1 run failed" in text
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    assert [re.sub("<[^>]*>", "", r) for r in re.findall(r"<tr><th[^>]*>\d</th><td>([^<]*)</td>", body)] == [
        "rtn", "broken", "mse"
    ]  # fmt: skip


def test_going_on_keeps_what_is_finished_and_makes_the_rest(
    here: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (here / "out" / "rtn" / "model.safetensors").stat().st_mtime_ns
    mse = (here / "out" / "mse" / "model.safetensors").read_bytes()
    shutil.rmtree(here / "out" / "mse")
    assert main(call(template, "--recipes", "rtn,mse", "--resume", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["error"] for r in found["runs"]] == [None, None]
    assert (here / "out" / "rtn" / "model.safetensors").stat().st_mtime_ns == before
    assert (here / "out" / "mse" / "model.safetensors").read_bytes() == mse
    assert Path(found["page"]).is_file()


def test_an_interruption_keeps_the_runs_before_it(here: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = quantize.make_run, []

    def interrupted(given: QuantizeCall, terminal: Any) -> Any:
        asked.append(given.recipe)
        if given.recipe == "mse" and len(asked) < 3:
            raise KeyboardInterrupt
        return original(given, terminal)

    monkeypatch.setattr(quantize, "make_run", interrupted)
    given = call(template, "--out", "again", "--recipes", "rtn,mse")
    assert main(given) == 130
    assert asked == ["rtn", "mse"]
    assert main([*given, "--resume"]) == 0
    assert asked == ["rtn", "mse", "mse"]


def test_a_comparison_that_is_killed_in_its_first_run_goes_on(
    here: Path, template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = call(template, "--out", "again", "--recipes", "rtn,mse")
    with monkeypatch.context() as patch:
        patch.setattr("bitwright.run.job._show", interrupt)
        assert main(given) == 130
    assert "--resume goes on where it was" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 0
    assert "rtn: finished before" in capsys.readouterr().err


def test_a_comparison_that_left_nothing_leaves_no_file(
    here: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.stages.calibrate.Calibrate.run", interrupt)
    assert main(call(template, "--out", "deep/new", "--recipes", "rtn,mse")) == 130
    assert not (here / "deep").exists()


def test_runs_of_before_are_not_taken_for_those_that_replace_them(
    here: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bits take the place of four; the command ends after the first of two, and after that in the second."""
    given = call(template, "--recipes", "rtn,mse", "--weights", "3")

    def killed_in(recipe: str) -> Any:
        return lambda call, terminal: interrupt() if call.recipe == recipe else original(call, terminal)

    original = quantize.make_run
    for recipe, more in (("rtn", "--force"), ("mse", "--resume")):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "make_run", killed_in(recipe))
            assert main([*given, more]) == 130
    assert main([*given, "--resume"]) == 0
    for name in ("rtn", "mse"):
        assert json.loads((here / "out" / name / "result.json").read_text())["bits"]["weights"] == 3
    assert json.loads((here / "out" / "compare.json").read_text()).keys() == {"settings", "runs"}


WRONG = {
    "one recipe": (("--recipes", "rtn"), "at least two recipes"),
    "twice": (("--recipes", "rtn,mse,rtn"), "found rtn twice"),
    "unknown": (("--recipes", "rtn,mze"), "Did you mean 'mse'"),
    "all without a budget": (("--recipes", "all"), "--minutes or --steps with --recipes all"),
    "there already": (("--recipes", "rtn,mse"), "There are runs in"),
    "other seed": (("--recipes", "rtn,mse", "--resume", "--seed", "4"), "(seed: 3, now 4)"),
    "other bits": (("--recipes", "rtn,mse", "--resume", "--weights", "5"), "other settings (scheme"),
    "a file": (("--out", "net.py", "--recipes", "rtn,mse"), "found a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_line_and_changes_nothing(
    name: str, here: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = WRONG[name]
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if "__pycache__" not in p.parts}
    assert main(call(template, *arguments)) == 2
    assert expected in error(capsys)
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*") if "__pycache__" not in p.parts} == before


def test_a_run_is_no_folder_for_several(here: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in (here / "out" / "rtn").iterdir())
    assert main(call(template, "--out", "out/rtn", "--recipes", "rtn,mse", "--force")) == 2
    assert "is a run itself" in error(capsys)
    assert sorted(p.name for p in (here / "out" / "rtn").iterdir()) == before


def test_foreign_files_are_not_replaced(here: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out" / "rtn" / "mine.txt").write_text("keep")
    assert main(call(template, "--recipes", "mse,rtn", "--force")) == 2
    assert "mine.txt" in error(capsys)
    assert (here / "out" / "mse" / "result.json").is_file()


def test_all_are_those_that_need_no_labels() -> None:
    found = command.parse_recipes("all")
    assert len(set(found)) == len(found)
    assert builtin_recipes().keys() - set(found) == {"qkd"}


def test_recipes_as_files_have_folders() -> None:
    assert [command.folder_of_recipe(r) for r in ("eptq+evolq", "a/b c.yaml", "x.py")] == ["eptq+evolq", "b_c", "x"]


def test_no_run_folders_are_named_where_all_fail(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("broken.py", "other.py")
    assert main(call(here, "--recipes", "broken.py,other.py", "--out", "none")) == 1
    shown = capsys.readouterr().out
    assert "Written: " in shown
    assert "run folder" not in shown
