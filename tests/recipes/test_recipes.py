"""Recipes are files: one is enough to add one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from cases import dataset, make

from benchmarks.units import compared, given, quantized
from bitwright.api import quantize
from bitwright.errors import UsageError
from bitwright.recipes import Recipe, builtin_recipes, recipe
from bitwright.stages.calibrate import Calibrate

PYTHON = '''
from typing import ClassVar, Literal

from bitwright.graph import rewrite
from bitwright.recipes import Recipe
from bitwright.run.record import StageRecord
from bitwright.stages.base import Stage
from bitwright.stages.calibrate import Calibrate


class ScaledBiases(StageRecord):
    kind: str = "scale-biases"
    by: float


class ScaleBiases(Stage):
    """Multiplies every bias of the head."""

    kind: ClassVar[str] = "scale-biases"
    record: ClassVar[type[StageRecord]] = ScaledBiases

    by: float = 1.0
    which: Literal["head", "stem"] = "head"

    def run(self, student, teacher, images, run):
        bias = rewrite.get_tensor(student.graph, f"{self.which}.bias")
        rewrite.set_tensor(student.graph, f"{self.which}.bias", bias * self.by)
        run.records.append(ScaledBiases(by=self.by))
        return student


RECIPE = Recipe(name="scaled", stages=(Calibrate(weights="minmax", activations="minmax"), ScaleBiases(by=3.0)))
'''

YAML = """
name: scaled
stages:
- calibrate: {weights: minmax, activations: minmax}
- scale-biases: {by: 3.0}
"""


def test_a_recipe_is_one_file(tmp_path: Path) -> None:
    python, text = tmp_path / "scaled.py", tmp_path / "scaled.yaml"
    python.write_text(PYTHON)
    text.write_text(YAML)
    network, data = make("residual"), dataset(6)
    x = data.batch([0, 1, 2])
    plain = quantize(network, data, "rtn")(x)
    one, two = quantize(network, data, python), quantize(network, data, str(text))
    assert one.result["scale-biases"] == two.result["scale-biases"] == {"by": 3.0}
    assert [stage["kind"] for stage in one.result["stages"]] == ["calibrate", "scale-biases"]
    assert one.result["recipe"] == two.result["recipe"]
    assert torch.equal(one(x), two(x))
    shift = 2 * network.head.bias.detach()
    torch.testing.assert_close(one(x) - plain, shift.expand(3, -1), rtol=0, atol=1e-2)


def test_every_builtin_recipe_survives_a_round_trip(tmp_path: Path) -> None:
    assert {"rtn", "mse"} <= set(builtin_recipes())
    for name, made in builtin_recipes().items():
        assert made.name == name
        path = tmp_path / f"{name}.yaml"
        path.write_text(made.to_yaml())
        assert recipe(path) == made
        assert recipe(path).to_yaml() == made.to_yaml()
        assert recipe(name) is recipe(made) is made


def test_yaml_holds_every_setting(tmp_path: Path) -> None:
    stage = Calibrate(weights="percentile", percentile=0.9, bias_correction="sequential", weight_power=2.4)
    made = Recipe(name="mine", summary="A try.", paper="none", stages=(stage, Calibrate()))
    data = yaml.safe_load(made.to_yaml())
    assert data["stages"][0]["calibrate"] == stage.model_dump()
    path = tmp_path / "mine.yml"
    path.write_text(made.to_yaml())
    assert recipe(path) == made


def test_a_stage_without_settings_may_be_a_word(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("name: short\nstages: [calibrate, calibrate: ]\n")
    path.write_text("name: short\nstages:\n- calibrate\n- calibrate:\n")
    assert recipe(path).stages == (Calibrate(), Calibrate())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nstages:\n- calibrate: {weights: best}\n", ["weights", "minmax"]),
        ("name: a\nstages:\n- calibrate: {percentile: 0.2}\n", ["percentile", "0.5"]),
        ("name: a\nstages:\n- calibrate: {wieghts: mse}\n", ["wieghts"]),
        ("name: a\nstages:\n- reconstruct: {full_steps: 3}\n", ["full_steps"]),
        ("name: a\nstages:\n- reconstruct: {rounding: free}\n", ["rounding", "straight-through"]),
        ("name: a\nstages:\n- reconstruct: {decide: {begin: 0.3, end: 0.9}}\n", ["decide", "begin"]),
        (
            "name: a\nstages:\n- optq: {views: 0}\n",
            ["optq.views: expected a number greater than or equal to 1 or 'auto', found 0."],
        ),
        (
            "name: a\nstages:\n- optq\n- cascade: {views: many}\n",
            ["cascade.views: expected a whole number or 'auto', found 'many'."],
        ),
        (
            "name: a\nstages:\n- optq: {views: true}\n",
            ["optq.views: expected a whole number or 'auto', found 'true'."],
        ),
        (
            "name: a\nstages:\n- optq: {views: 1000}\n",
            ["optq.views: expected a number less than or equal to 64 or 'auto', found 1000."],
        ),
        ("name: a\nstages:\n- reconstruct: {steps: true}\n", ["steps: expected a whole number, found 'true'."]),
        ("name: a\nstages:\n- reconstruct: {codes: {rate: true}}\n", ["rate: expected a number, found 'true'."]),
        (
            "name: a\nstages:\n- reconstruct: {codes: {rate: 1.0e+30}}\n",
            ["codes.rate: expected a number less than or equal to 1000000"],
        ),
        (
            "name: a\nstages:\n- reconstruct: {decide: {pull: -1}}\n",
            ["decide.pull: expected a number greater than 0, found -1"],
        ),
        ("name: a\nstages:\n- cascade: {shares: [2.0]}\n", ["shares", "less than or equal to 1"]),
        ("name: a\nstages:\n- calibrate: {weights: mse, weights: minmax}\n", ["'weights' stands twice", "line 3"]),
        ("name: a\nname: b\nstages: []\n", ["'name' stands twice", "line 1"]),
        ("name: a\nstages:\n- calibrate: [3]\n", ["stages"]),
        ("name: a\nstages:\n- celebrate\n", ["celebrate", "calibrate"]),
        ("name: a\nstages:\n- {calibrate: {}, other: {}}\n", ["stages"]),
        ("name: a\nstages: 3\n", ["stages"]),
        ("stages:\n- calibrate\n", ["name"]),
        ("name: a\nstages: []\nspeed: 3\n", ["speed"]),
        ("- calibrate\n", ["the file"]),
        ("", ["the file"]),
        ("name: [\n", ["not YAML"]),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["RECIPE = 3\n", "x = 1\n"])
def test_a_python_file_without_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.py"
    path.write_text(text)
    with pytest.raises(UsageError, match="to define RECIPE"):
        recipe(path)


def test_a_missing_file() -> None:
    with pytest.raises(UsageError, match=r"recipe file at nowhere/mine\.yaml"):
        recipe("nowhere/mine.yaml")


@pytest.mark.parametrize(("asked", "near"), [("rnt", "rtn"), ("mes", "mse"), ("MSE", "mse")])
def test_an_unknown_recipe_suggests_the_nearest(asked: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"no recipe '{asked}'. Did you mean '{near}'"):
        recipe(asked)


def test_an_unknown_recipe_like_no_other_lists_them_all() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'zzzz'\. All: .*eptq"):
        recipe("zzzz")


@pytest.mark.parametrize(
    "settings", [{"weights": "best"}, {"percentile": 1.5}, {"power": 0}, {"score_probes": 0}, {"x": 1}]
)
def test_settings_are_validated(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Calibrate(**settings)


def test_a_budget_means_nothing_to_a_recipe_without_steps() -> None:
    assert recipe("eptq").optimises
    with pytest.warns(UserWarning, match="'rtn' does not optimise"):
        quantize(make("residual"), dataset(4), "rtn", steps=5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_learned_roundings_beat_nearest_and_dropped_activations_beat_both() -> None:
    """The order of QDrop's paper at W3A4, but for BRECQ, which is not ahead of AdaRound in short runs (its page)."""
    teacher, images, others = given("zoo:fashion_cnn", "zoo:fashion", "zoo:fashion-test")
    test = others.sample(1000, seed=0)
    for seed in range(3):
        some = images.sample(256, seed=seed).unlabelled()
        nearest, adaround, brecq, qdrop = (
            compared(quantized(teacher, some, name, (3, 4), 100, seed)[0], teacher, test)["kl"]
            for name in ("mse", "adaround", "brecq", "qdrop")
        )
        assert qdrop < min(adaround, brecq)
        assert max(adaround, brecq) < nearest
