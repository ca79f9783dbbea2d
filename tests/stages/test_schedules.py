"""Schedules: ends, corners and slopes of every curve, and PyTorch's own cosine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from bitwright.stages.schedules import Anneal, Dampen, Gradual, Learn, decay

STEPS = [i / 200 for i in range(201)]


def test_decay_equals_the_schedulers_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, make in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=200),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-12, total_iters=200),
        "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    }.items():
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler = make(optimizer)
        for progress in STEPS:
            assert decay(name, progress) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
            optimizer.step()
            scheduler.step()


def test_rates_decay_from_the_rate_that_is_set() -> None:
    for schedule in ("constant", "linear", "cosine"):
        learn = Learn(rate=3e-3, schedule=schedule)
        assert learn.rate_at(0.0) == pytest.approx(3e-3)
        for progress in STEPS:
            assert learn.rate_at(progress) == pytest.approx(3e-3 * decay(schedule, progress))


def test_the_exponent_stays_and_then_falls_in_a_straight_line() -> None:
    anneal, warmup = Anneal(), 0.2
    found = [anneal.beta(p) for p in STEPS]
    assert found[0] == 20
    assert found[-1] == pytest.approx(2)
    assert all(b == 20 for p, b in zip(STEPS, found, strict=True) if p <= warmup)
    falling = [(p, b) for p, b in zip(STEPS, found, strict=True) if p > warmup]
    slopes = [(b - a) / (q - p) for (p, a), (q, b) in itertools.pairwise(falling)]
    assert slopes == pytest.approx([-18 / (1 - warmup)] * len(slopes))


def test_the_regularizer_is_on_from_the_start_unless_it_is_quiet() -> None:
    loud, quiet = Anneal(weight=0.5), Anneal(weight=0.5, quiet=True)
    assert [loud.strength(p) for p in (0.0, 0.1, 0.2, 1.0)] == [0.5] * 4
    assert [quiet.strength(p) for p in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("steps", "full"), [(60, 0.2), (300, 1.0), (5000, 1.0)])
def test_the_pull_of_dampening_grows_over_the_run_and_follows_the_rate(steps: int, full: float) -> None:
    dampen = Dampen(pull=3.0)
    for progress in STEPS:
        assert dampen.share(progress, steps, 0.01) == pytest.approx(0.03 * full * progress)
        assert dampen.share(progress, steps, 0.02) == pytest.approx(2 * dampen.share(progress, steps, 0.01))
    assert Dampen(pull=100.0).share(1.0, 300, 0.5) == 1.0  # never beyond the integer


@pytest.mark.parametrize("how", ["linear", "cosine", "drop"])
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_float_shares_fall_from_start_to_zero(how: str, start: float) -> None:
    gradual = Gradual(how=how, start=start)
    pairs = [gradual.at(p) for p in STEPS]
    assert all(unused == 0 for unused in (p[0 if how == "drop" else 1] for p in pairs))
    found = [p[1 if how == "drop" else 0] for p in pairs]
    assert found[0] == start
    for progress, share in zip(STEPS, found, strict=True):
        expected = (1 + math.cos(math.pi * progress)) / 2 if how == "cosine" else 1 - progress
        assert share == pytest.approx(start * expected, abs=1e-12)
    assert found[-1] == 0


def test_a_share_that_is_held_never_falls() -> None:
    assert {Gradual(how="drop", start=0.5, hold=True).at(p) for p in STEPS} == {(0.0, 0.5)}
    assert {Gradual(how="cosine", start=0.25, hold=True).at(p) for p in STEPS} == {(0.25, 0.0)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Learn, {"rate": 0.0}),
        (Learn, {"rate": 1.0, "optimizer": "lion"}),
        (Learn, {"rate": 1.0, "speed": 2}),
        (Anneal, {"weight": -1.0}),
        (Dampen, {"pull": 0.0}),
        (Gradual, {"start": 1.1}),
        (Gradual, {"how": "log"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: type, settings: dict) -> None:
    with pytest.raises(ValidationError):
        kind(**settings)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Learn(rate=1.0).rate = 2.0
