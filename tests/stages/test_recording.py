"""Steps that are recorded and played, with a recording that computes instead of a GPU that plays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import dataset, prepared
from torch import Tensor

from bitwright import recording
from bitwright.graph.student import insert_quantizers
from bitwright.pipeline import run_stages
from bitwright.quant import optq
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.recording import Recording, Repeated
from bitwright.stages import tuning
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.reconstruct import Reconstruct
from bitwright.stages.schedules import Anneal, Dampen, Gradual, Learn

SOFT: dict[str, Any] = {"rounding": "soft", "codes": Learn(rate=3e-2, schedule="constant")}


def losses(steps: int, **settings: Any) -> list[float]:
    """Of each step."""
    teacher, run = prepared("residual"), Run(seed=1, precision="float32")
    stage = Reconstruct(batch=8, score_probes=4, steps=steps, never_worse=False, **settings)
    method = Recipe(name="own", summary="", paper="", stages=(Calibrate(), stage))
    run_stages(method, insert_quantizers(teacher, Scheme(weights=3, activations=8)), teacher, dataset(16), run)
    (record,) = (r for r in run.records if r.kind == "reconstruct")
    return [loss for _, loss in record.curve]  # type: ignore[attr-defined]


class Played(Recording):
    """Plays as a GPU does: with the tensors of the recording, by the step that was given when it was made."""

    ways: list[Any]
    plays = 0

    def __init__(self, device: torch.device, warm: int = recording.WARM) -> None:
        self.device, self.warm = device, warm
        self.ways = []
        self.forget()

    def beside(self) -> Any:
        return nullcontext()

    def play(self, given: Sequence[Tensor], step: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
        if self.graph is None:
            self.given = [t.detach().clone() for t in given]
            self.graph = step  # type: ignore[assignment]
        for kept, new in zip(self.given, given, strict=True):
            kept.copy_(new)
        type(self).plays += 1
        return self.graph(self.given).clone()  # type: ignore[operator, misc]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr(tuning, "can_record", lambda _: True)
    monkeypatch.setattr(tuning, "Recording", Played)
    monkeypatch.setattr(Played, "plays", 0)
    monkeypatch.setattr(
        tuning.Tuner, "patient", property(lambda _: True, lambda *_: None), raising=False
    )  # as on a GPU
    return Played


@pytest.mark.parametrize(
    "settings",
    [
        {"weigh": "ones"},
        {"weigh": "sla-log", "decide": Dampen(pull=5.0)},
        {"weigh": "sla", **SOFT, "decide": Anneal(quiet=True), "gradual": Gradual()},
        {"weigh": "lfh", **SOFT, "decide": Anneal(weight=1.0), "gradual": Gradual(how="drop", start=0.5, hold=True)},
        {"weigh": "ones", "codes": Learn(optimizer="sgd", rate=1e-2)},
    ],
)
def test_steps_that_are_played_are_the_steps(settings: dict[str, Any], played: type[Played]) -> None:
    ours = losses(24, **settings)
    assert played.plays >= 12
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "can_record", lambda _: False)
        theirs = losses(24, **settings)
    assert len(ours) == 24
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_step_that_cannot_be_recorded_is_taken_as_ever(played: type[Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(played, "play", lambda *_: None)
    ours = losses(12, weigh="ones")
    monkeypatch.setattr(tuning, "can_record", lambda _: False)
    assert ours == pytest.approx(losses(12, weigh="ones"), rel=1e-3)


def test_blocks_of_columns_that_are_played_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(2, 5, 30), torch.randn(2, 99, 30)
    given = (weight, optq.gram(inputs), torch.full((1, 1, 1), 0.3), lambda column, step: (column / step).round() * step)
    expected = optq.compensate(*given, lazy=4)
    monkeypatch.setattr(recording, "can_record", lambda _: True)
    monkeypatch.setattr(recording, "Recording", Played)
    monkeypatch.setattr(Played, "plays", 0)
    assert torch.equal(optq.compensate(*given, lazy=4), expected)
    assert Played.plays == 6, "seven blocks of four, the first of which warms up; the last of two is another way"
    assert Repeated(lambda given: given[0], torch.device("cpu"), calls=2).recording is None
