"""Training with labels: three phases, and labels for this stage alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import images, prepared
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.given.images import Images, load_images
from bitwright.graph.student import Student, insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe, recipe
from bitwright.stages import resume
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.finetune import PHASES, Finetune, FinetuneRecord, Lesson
from bitwright.stages.schedules import Learn

CALIBRATE = Calibrate(weights="minmax", activations="minmax")
COUNT = 16


def labelled(count: int = COUNT) -> Images:
    """Images whose labels are not what the float network answers, so that there is something to learn."""
    return load_images(images(count), None, labels=torch.arange(count) % 4)


def train(
    stage: Finetune, *, state: Path | None = None, images: Images | None = None, **settings: Any
) -> tuple[Student, Run]:
    teacher = prepared("residual")
    run = Run(**{"seed": 1, "precision": "float32", **settings})
    student = insert_quantizers(teacher, Scheme(weights=3, activations=8))
    method = Recipe(name="test", stages=(CALIBRATE, stage))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        given = labelled() if images is None else images
        return run_stages(method, student, teacher, given, run, state=state, identity="test"), run


def lesson(stage: Finetune) -> Lesson:
    student, run = train(stage, steps=0)
    made = Lesson(stage, student, prepared("residual"), labelled(), run)
    made.steps = stage.steps
    return made


def told(run: Run) -> FinetuneRecord:
    record = run.records[-1]
    assert isinstance(record, FinetuneRecord)
    return record


def codes(student: Student) -> dict[str, Tensor]:
    """Integers, steps and biases."""
    return dict(student.freeze().graph.named_buffers())


# -------------------------------------------------------------------------------------------------- phases


def test_phases_follow_each_other_and_share_all_steps() -> None:
    made = lesson(Finetune(steps=5, batch=8))
    seen = []
    for _ in range(5):
        seen.append(made.phase)
        made.advance()
    assert seen == [PHASES[0], PHASES[1], PHASES[1], PHASES[2], PHASES[2]]


@pytest.mark.parametrize(("phase", "moves"), [("self-study", False), ("co-study", True), ("tutoring", False)])
def test_the_teacher_learns_in_co_study_alone(phase: str, moves: bool) -> None:
    shares = {"self_study": float(phase == "self-study"), "co_study": float(phase == "co-study")}
    made = lesson(Finetune(steps=3, batch=8, **shares))
    before = {n: t.detach().clone() for n, t in made.taught.items()}
    made.advance()
    assert made.phase == phase
    assert moves == any(not torch.equal(before[n], t) for n, t in made.taught.items())


def test_a_teacher_is_not_asked_in_self_study() -> None:
    """Plain training with labels is what is left without a distance to the teacher."""
    alone = codes(train(Finetune(steps=6, batch=8, self_study=1.0))[0])
    without = codes(train(Finetune(steps=6, batch=8, self_study=0.0, co_study=0.0, distil=0.0))[0])
    taught = codes(train(Finetune(steps=6, batch=8, self_study=0.0, co_study=0.0, codes=Learn(rate=1e-2)))[0])
    assert all(torch.equal(alone[n], without[n]) for n in alone)
    assert any(not torch.equal(alone[n], taught[n]) for n in alone)


def test_the_float_network_stays_what_it_was() -> None:
    teacher = prepared("residual")
    before = {n: t.clone() for n, t in teacher.graph.named_buffers()}
    train(Finetune(steps=3, batch=8, self_study=0.0, co_study=1.0))
    assert all(torch.equal(before[n], t) for n, t in teacher.graph.named_buffers())


def test_training_learns_the_labels() -> None:
    fast = Learn(rate=0.1)
    _, run = train(Finetune(steps=60, batch=16, views=1, codes=fast, bias=fast, self_study=1.0))
    record = told(run)
    assert record.before is not None
    assert record.after is not None
    assert record.after < record.before - 0.1
    assert record.top1[1] > record.top1[0]


# -------------------------------------------------------------------------------------------------- labels


def test_other_stages_see_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for stage in (Calibrate, Finetune):
        own = stage.run

        def watched(self: Any, student: Any, teacher: Any, given: Images, run: Run, own: Any = own) -> Student:
            seen[self.kind] = given.labels is not None
            return own(self, student, teacher, given, run)

        monkeypatch.setattr(stage, "run", watched)
    train(Finetune(steps=1, batch=4))
    assert seen == {"calibrate": False, "finetune": True}


def test_it_says_that_it_reads_labels() -> None:
    assert [name for name in ("eptq", "evolq", "qkd") if recipe(name).reads_labels] == ["qkd"]
    _, run = train(Finetune(steps=1, batch=4))
    assert any("reads those of 16 images" in text for text in run.records[-1].warnings)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(UsageError, match="Expected labelled images"):
        train(Finetune(steps=1), images=load_images(images(4), None))


def test_labels_beyond_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="labels below"):
        train(Finetune(steps=1), images=load_images(images(4), None, labels=torch.tensor([0, 1, 2, 99])))


# -------------------------------------------------------------------------------------------------- resume


def test_an_interrupted_run_gives_the_same_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resume, "CHECKPOINT_SHARE", 1e9)
    stage = Finetune(steps=6, batch=8)
    whole = codes(train(stage)[0])

    def interrupt(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "Training" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stage, state=tmp_path, progress=interrupt)
    steps = []

    def follow(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "Training":
            steps.append(done)

    resumed = codes(train(stage, state=tmp_path, progress=follow)[0])
    assert steps[0] > 1
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
