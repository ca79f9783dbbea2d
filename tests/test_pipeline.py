"""An interrupted run goes on where it was, and gives what the whole run gives."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import dataset, images, prepared
from torch import Tensor

from bitwright.errors import BitwrightError, UsageError
from bitwright.graph import rewrite
from bitwright.graph.student import Student, insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.run.record import StageRecord
from bitwright.stages.base import Run, Stage
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq
from bitwright.stages.reconstruct import Reconstruct

SCHEME = Scheme(weights=4, activation_grid="symmetric")


class Shake(Stage):
    """Random numbers on the biases: the result depends on the generator's state."""

    kind: ClassVar[str] = "test-shake"
    calls: ClassVar[int] = 0
    broken: ClassVar[bool] = False

    def run(self, student, teacher, images, run):
        Shake.calls += 1
        if Shake.broken:
            raise KeyboardInterrupt
        bias = rewrite.get_tensor(student.graph, "head.bias")
        rewrite.set_tensor(student.graph, "head.bias", bias + torch.randn(bias.shape))
        assert images.labels is None
        return student


RECIPE = Recipe(name="two", stages=(Calibrate(weights="minmax", bias_correction="analytic"), Shake()))


def run(state: Path | None = None, identity: str = "mine", recipe: Recipe = RECIPE, seed: int = 3) -> Student:
    student = insert_quantizers(prepared("residual"), SCHEME)
    return run_stages(recipe, student, prepared("residual"), dataset(6), Run(seed=seed), state=state, identity=identity)


def buffers(student: Student) -> dict[str, Tensor]:
    return dict(student.graph.named_buffers())


def assert_same(a: Student, b: Student) -> None:
    assert buffers(a).keys() == buffers(b).keys()
    assert all(torch.equal(v, buffers(b)[k]) for k, v in buffers(a).items())
    assert torch.equal(a.flat(images(3))[0], b.flat(images(3))[0])
    assert torch.equal(a.freeze().flat(images(3))[0], b.freeze().flat(images(3))[0])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state of a run that was interrupted in its second stage."""
    monkeypatch.setattr(Shake, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(Shake, "broken", False)
    return tmp_path


def test_resumed_run_equals_the_whole_run(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the first stage ran again")

    monkeypatch.setattr(Calibrate, "run", never)
    torch.manual_seed(99)
    resumed = run(broken)
    monkeypatch.undo()
    assert_same(resumed, run())


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first, calls = run(tmp_path), Shake.calls
    second = run(tmp_path)
    assert Shake.calls == calls
    assert_same(first, second)


def test_every_stage_leaves_one_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == ["checkpoint-0.safetensors", "checkpoint-1.safetensors"]


def test_a_resumed_run_knows_what_the_finished_stages_left(broken: Path) -> None:
    student, record = insert_quantizers(prepared("residual"), SCHEME), Run(seed=3)
    run_stages(RECIPE, student, prepared("residual"), dataset(6), record, state=broken, identity="mine")
    whole = Run(seed=3)
    run_stages(RECIPE, insert_quantizers(prepared("residual"), SCHEME), prepared("residual"), dataset(6), whole)
    assert [kind for kind, _ in record.history] == [kind for kind, _ in whole.history] == ["calibrate", "test-shake"]
    for (_, resumed), (_, run_through) in zip(record.history, whole.history, strict=True):
        assert resumed.grids == run_through.grids
        assert all(torch.equal(resumed.tensors[k], v) for k, v in run_through.tensors.items())


def test_a_checkpoint_of_another_run_is_refused(broken: Path) -> None:
    before = (broken / "checkpoint-0.safetensors").read_bytes()
    with pytest.raises(UsageError, match="had other settings"):
        run(broken, identity="yours")
    assert (broken / "checkpoint-0.safetensors").read_bytes() == before


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def relabelled(content: bytes) -> bytes:
    assert b"calibrate" in content or b"test-shake" in content
    return content.replace(b'"kind":"calibrate"', b'"kind":"calibratf"').replace(b'"test-shake"', b'"test-shakf"')


DAMAGES = [
    lambda _: b"",
    lambda _: b"no checkpoint at all",
    lambda _: b"\x08\0\0\0\0\0\0\0{}      ",
    half,
    flipped,
    relabelled,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("position", [0, 1])
def test_a_damaged_checkpoint_is_named_and_its_stage_runs_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], position: int
) -> None:
    whole = run(tmp_path)
    path, calls = tmp_path / f"checkpoint-{position}.safetensors", Shake.calls
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.warns(UserWarning, match=f"checkpoint-{position}.* is damaged .* runs again"):
        again = run(tmp_path)
    assert_same(again, whole)
    assert Shake.calls == calls + position, "the other stage ran again too"
    assert kinds(header(path)) == kinds(header(path, good)) == ["calibrate", "test-shake"][: position + 1]


def kinds(header: dict[str, str]) -> list[str]:
    return [record["kind"] for record in json.loads(header["records"])]


def header(path: Path, content: bytes | None = None) -> dict[str, str]:
    content = path.read_bytes() if content is None else content
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def test_two_runs_are_identical_and_the_seed_matters() -> None:
    assert_same(run(), run())
    assert not torch.equal(buffers(run())["head.bias"], buffers(run(seed=4))["head.bias"])


def test_the_teacher_and_the_generator_do_not_matter_to_each_other(tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in prepared("residual").graph.state_dict().items()}
    run(tmp_path)
    run(tmp_path).freeze()
    after = prepared("residual").graph.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


class Poison(Stage):
    """Leaves a bias that is no number."""

    kind: ClassVar[str] = "test-poison"

    def run(self, student, teacher, images, run):
        rewrite.set_tensor(student.graph, "head.bias", torch.full((4,), float("nan")))
        return student


def test_a_result_that_is_not_finite_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match=r"head\.bias is not finite"):
        run(tmp_path, recipe=Recipe(name="bad", stages=(Calibrate(), Poison())))


class Noted(StageRecord):
    kind: str = "noting"
    steps: int


class Noting(Stage):
    """Leaves a record of its own setting."""

    kind: ClassVar[str] = "noting"
    record: ClassVar[type[StageRecord]] = Noted
    broken: ClassVar[bool] = False
    steps: int

    def run(self, student, teacher, images, run):
        if Noting.broken and self.steps == 13:
            raise KeyboardInterrupt
        time.sleep(self.steps / 500)
        run.records.append(Noted(steps=self.steps))
        return student


def test_each_stage_leaves_one_record_in_order_and_a_resumed_run_has_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (Calibrate(weights="minmax"), Noting(steps=7), Noting(steps=11), Noting(steps=13))
    noting = Recipe(name="x", stages=stages)

    def whole() -> list[StageRecord]:
        student, kept = insert_quantizers(prepared("residual"), SCHEME), Run(seed=3)
        run_stages(noting, student, prepared("residual"), dataset(6), kept, state=tmp_path, identity="mine")
        assert sum(r.seconds for r in kept.records[1:]) == pytest.approx(kept.seconds["noting"], abs=2e-3)
        return kept.records

    monkeypatch.setattr(Noting, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        whole()
    monkeypatch.setattr(Noting, "broken", False)
    plain, *noted = whole()
    assert type(plain) is StageRecord
    assert plain.kind == "calibrate"
    assert [(type(r), r.kind, r.told()) for r in noted] == [(Noted, "noting", {"steps": n}) for n in (7, 11, 13)]
    assert all(0.001 * n <= r.seconds < 1 for n, r in zip((7, 11, 13), noted, strict=True))


class Talk(Stage):
    """Says something."""

    kind: ClassVar[str] = "test-talk"

    def run(self, student, teacher, images, run):
        warnings.warn("What is left is little.", stacklevel=2)
        return student


def test_a_resumed_run_says_again_what_finished_stages_said(tmp_path: Path) -> None:
    recipe = Recipe(name="talking", stages=(Calibrate(weights="minmax"), Talk(), Calibrate(weights="minmax")))
    for _ in range(2):
        with pytest.warns(UserWarning, match="What is left") as said:
            run(tmp_path / "state", recipe=recipe)
        assert len(said) == 1


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((Optq(),), "before 'optq' in the recipe 'early'"),
        ((Optq(), Calibrate()), "before 'optq'"),
        ((Shake(), Reconstruct(steps=1)), "before 'reconstruct'"),
        ((), "among its stages"),
        ((Shake(),), "among its stages"),
    ],
)
def test_a_recipe_without_ranges_is_refused(stages: tuple[Stage, ...], expected: str) -> None:
    with pytest.raises(UsageError, match=f"Expected 'calibrate' {expected}"):
        run(recipe=Recipe(name="early", stages=stages))


def test_a_stage_without_need_of_ranges_may_come_first() -> None:
    shaken = run(recipe=Recipe(name="late", stages=(Shake(), Calibrate(weights="minmax"), Optq(positions=16))))
    assert all(m.calibrated for m in shaken.graph.modules() if isinstance(m, Quantizer))


def test_calibration_makes_the_pass_of_the_stage_behind_it() -> None:
    teacher, data = prepared("residual"), dataset(6)
    recipe, seen = Recipe(name="both", stages=(Calibrate(bias_correction="analytic"), Optq(positions=16))), []
    together = insert_quantizers(teacher, SCHEME)
    how = Run(seed=3, progress=lambda what, *_: seen.append(what))
    run_stages(recipe, together, teacher, data, how)
    assert "Calibrating" in seen
    assert "Reading layer inputs" not in seen
    assert how.summed is None, "matrices of inputs are kept for nothing"
    alone = insert_quantizers(teacher, SCHEME)
    for stage in recipe.stages:
        stage.run(alone, teacher, data, Run(seed=3))
    assert_same(together, alone)


def test_a_stage_of_fewer_images_makes_its_own_pass() -> None:
    recipe, seen = Recipe(name="fewer", stages=(Calibrate(), Optq(images=4))), []
    student = insert_quantizers(prepared("residual"), SCHEME)
    run_stages(recipe, student, prepared("residual"), dataset(6), Run(progress=lambda what, *_: seen.append(what)))
    assert "Reading layer inputs" in seen
