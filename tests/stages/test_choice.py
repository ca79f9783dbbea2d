"""What is kept of an optimisation: the end, unless an earlier stage is better by more than chance would have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitwright.stages.choice import more_steps, surely_lower

COUNT = 100


def spread(mean: float, error: float) -> Tensor:
    """Losses whose difference from ``level`` has that mean, and a mean's standard error of so much."""
    noise = torch.tensor([1.0, -1.0]).repeat(COUNT // 2)
    return level() + mean + noise * error * math.sqrt(COUNT - 1)


def level() -> Tensor:
    """Losses that differ much from image to image, as all networks' do alike."""
    return torch.linspace(1, 1000, COUNT, dtype=torch.float64)


@pytest.mark.parametrize(("mean", "kept"), [(-1.0, "end"), (0.0, "end"), (0.9, "end"), (1.1, "start"), (5.0, "start")])
def test_the_end_is_given_up_where_it_is_worse_by_more_than_its_error(mean: float, kept: str) -> None:
    assert surely_lower({"start": level(), "end": spread(mean, error=1.0)}, "end") == kept


def test_of_several_earlier_ones_the_lowest_is_kept() -> None:
    losses = {"a": level() + 1, "b": level() - 1, "c": level() + 2, "end": level() + 3}
    assert surely_lower(losses, "end") == "b"


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_kept(odd: float) -> None:
    broken = level().clone()
    broken[3] = odd
    assert surely_lower({"start": level(), "end": broken}, "end") == "start"
    assert surely_lower({"start": broken, "end": level()}, "end") == "end"
    assert surely_lower({"start": broken, "end": broken}, "end") == "end"


def test_one_sample_has_no_error() -> None:
    assert surely_lower({"start": torch.tensor([1.0]), "end": torch.tensor([1.01])}, "end") == "start"


@pytest.mark.parametrize(
    ("began", "ended", "losses", "help_"),
    [
        (1.0, 1.2, [9.0, 2.0, 2.0, 1.0], True), (1.0, 1.2, [1.0, 2.0, 9.0, 2.0], False), (1.0, 1.2, [1.0], False),
        (1.0, 0.9, [1.0, 2.0], True), (None, 0.9, [1.0, 1.0], False),
    ],
)  # fmt: skip
def test_more_steps_are_advised_where_they_made_the_loss_smaller(
    began: float | None, ended: float, losses: list[float], help_: bool
) -> None:
    said = more_steps(began, ended, list(enumerate(losses, 1)))
    assert said.startswith("More steps may help" if help_ else "The loss did not fall on the way either")
