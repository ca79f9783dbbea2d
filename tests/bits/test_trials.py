"""The search for the smallest network that agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.bits import trials
from bitwright.bits.plan import Plan
from bitwright.errors import UsageError
from bitwright.graph.capture import capture
from bitwright.graph.prepare import prepare
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.run.files import read_checked
from bitwright.stages.base import Run

DATA = cases.dataset(40)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 33])
def test_of_values_that_grow_it_finds_the_first(count: int) -> None:
    values = [i / count for i in range(1, count + 1)]
    for wanted in [0.0, *values, 1.0]:
        found = trials.first_that_holds(count, values.__getitem__, wanted)
        assert found.index == next(i for i, v in enumerate(values) if v >= wanted - 1e-12)
        assert found.monotone
        assert len(found.tried) <= count.bit_length() + 3


def test_nothing_holds_if_the_last_does_not() -> None:
    assert trials.first_that_holds(5, lambda i: 0.1 * i, 0.5).index is None


def test_a_lucky_element_is_passed_over() -> None:
    """3 of 8 holds although 4 does not; from 5 on all do."""
    values = [0, 0, 0, 1, 0, 1, 1, 1]
    found = trials.first_that_holds(8, values.__getitem__, 1)
    assert found.index == 5
    assert not found.monotone


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_holds_and_so_does_its_neighbour(seed: int) -> None:
    values = (torch.arange(17) / 17 + 0.2 * torch.randn(17, generator=torch.Generator().manual_seed(seed))).tolist()
    found = trials.first_that_holds(17, values.__getitem__, 0.5)
    if found.index is None:
        assert values[-1] < 0.5
        return
    assert values[found.index] >= 0.5
    assert values[min(found.index + 1, 16)] >= 0.5
    assert found.tried == {i: values[i] for i in found.tried}


def curve() -> list[Plan]:
    found = bw.plan_bits(cases.model("transformer"), DATA, weights="2,3,4,8", points=9)
    return found.curve


def find(drop: float, state: Path | None = None, method: str = "mse") -> tuple[Plan, dict[str, Any]]:
    return trials.smallest(cases.prepared("transformer"), PLANS, Scheme(), recipe(method), DATA, drop, Run(), state)


PLANS = curve()


def agreement_of(plan: Plan) -> float:
    """From the public API alone."""
    made = bw.quantize(cases.model("transformer"), DATA.take(range(0, 40, 2)), "mse", plan=plan)
    return made.evaluate(DATA.take(range(1, 40, 2)))["fidelity"]["agreement"]


def test_the_estimate_is_what_the_network_then_does_on_images_it_has_not_seen() -> None:
    plan, estimate = find(0.1)
    assert estimate.agreement == pytest.approx(agreement_of(plan))
    assert estimate.agreement >= 0.9
    assert estimate.interval[0] < estimate.agreement <= estimate.interval[1]
    assert (estimate.images, estimate.calibrated_on) == (20, 20)
    assert len(estimate.trials) <= len(PLANS)


def test_any_drop_gives_the_smallest_and_no_drop_one_that_changes_nothing() -> None:
    assert find(1.0)[0] == PLANS[0]
    try:
        plan, estimate = find(0.0)
    except UsageError as error:
        assert agreement_of(PLANS[-1]) < 1
        assert "the largest plan" in str(error)  # noqa: PT017
    else:
        assert agreement_of(plan) == estimate.agreement == 1


def test_what_even_the_largest_does_not_keep_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_agreement", lambda *_: 0.85)
    with pytest.raises(UsageError, match=r"at most 5 % of answers .* changes 15.00 % of 20 held-out images \(95 %: "):
        find(0.05)


def test_trials_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = trials._agreement, []

    def once(*given: Any) -> float:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given[1])
        return real(*given)

    monkeypatch.setattr(trials, "_agreement", once)
    with pytest.raises(KeyboardInterrupt):
        find(0.1, tmp_path)
    assert len(read_checked(tmp_path / trials.FILE)["found"]) == 2
    calls.append(None)
    after: list[Plan] = []
    monkeypatch.setattr(trials, "_agreement", _noting(real, after))
    resumed = find(0.1, tmp_path)
    assert not {p.model_dump_json() for p in after} & {p.model_dump_json() for p in calls if p}
    monkeypatch.setattr(trials, "_agreement", real)
    assert resumed == find(0.1)


def _noting(real: Callable[..., float], seen: list[Plan]) -> Callable[..., float]:
    def noted(*given: Any) -> float:
        seen.append(given[1])
        return real(*given)

    return noted


def test_trials_take_no_steps() -> None:
    _, estimate = find(1.0, method="eptq")
    assert estimate.stages == ["calibrate", "optq", "cascade"]


def test_other_outputs_and_too_few_images_are_refused() -> None:
    measuring = prepare(capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), cases.images(2)))
    with pytest.raises(
        UsageError,
        match=r"found none\. Output 'output': It has a single channel",
    ):
        trials.check_countable(measuring, cases.dataset(4), 0.01)
    with pytest.raises(UsageError, match="at least 2 images"):
        trials.halves(cases.dataset(1))
    with pytest.warns(UserWarning, match="one changed answer is 50 %"):
        trials.check_countable(cases.prepared("transformer"), cases.dataset(4), 0.01)


def test_no_image_is_both_calibrated_on_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(trials, "_agreement", lambda *some: given.append(some) or 1.0)
    find(1.0)
    fit, held_out = (images.batch(range(len(images))).flatten(1) for images in given[0][4:6])
    assert len(fit) + len(held_out) == len(DATA)
    assert torch.cdist(fit, held_out).min() > 1
