"""What changes while an optimisation runs, as functions of its progress from 0 to 1."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Schedule = Literal["constant", "linear", "cosine"]


class Settings(BaseModel):
    """A record of settings that cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def decay(schedule: Schedule, progress: float) -> float:
    """Factor on a learning rate: from 1 to 0, or 1 throughout.

    Example:
        >>> [round(decay("cosine", p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return 1.0
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class Learn(Settings):
    """How one kind of variable is optimised.

    ``rate`` is meant for ``full_steps`` of the stage; a run of fewer steps multiplies it by
    ``(full_steps / steps) ** stretch``, so that a variable can travel as far.
    """

    optimizer: Literal["adam", "radam", "sgd"] = "adam"
    rate: float = Field(gt=0)
    schedule: Schedule = "cosine"
    stretch: float = 0.0
    relative: bool = False
    """The rate is a share: of each step that is learned, and for a bias of the spread of its layer's output."""

    def rate_at(self, progress: float, steps: int, full_steps: int) -> float:
        """The learning rate at a point of a run."""
        return self.rate * float((full_steps / max(steps, 1)) ** self.stretch) * decay(self.schedule, progress)


class Anneal(Settings):
    """Makes soft roundings decide by the regularizer ``weight * sum(1 - |2h - 1|^beta)`` (AdaRound).

    ``beta`` stays at ``start`` during the warm-up and falls linearly to ``end``.
    """

    weight: float = Field(default=0.01, ge=0)
    start: float = 20.0
    end: float = 2.0
    warmup: float = Field(default=0.2, ge=0, lt=1)
    quiet: bool = False
    """No regularizer at all during the warm-up (AdaRound, BRECQ, QDrop); EPTQ has it on from the first step."""
    stretch: float = 0.0
    """A run of fewer than ``full_steps`` multiplies the weight by ``(full_steps / steps) ** stretch``."""

    def beta(self, progress: float) -> float:
        """The exponent.

        Example:
            >>> [round(Anneal().beta(p), 6) for p in (0.0, 0.2, 0.6, 1.0)]
            [20.0, 20.0, 11.0, 2.0]
        """
        if progress <= self.warmup:
            return self.start
        return self.start + (self.end - self.start) * (progress - self.warmup) / (1 - self.warmup)

    def strength(self, progress: float, steps: int, full_steps: int) -> float:
        """The regularizer's weight."""
        if self.quiet and progress < self.warmup:
            return 0.0
        return self.weight * float((full_steps / max(steps, 1)) ** self.stretch)


class Harden(Settings):
    """Makes soft roundings decide by fixing the most decided ones, more and more of them.

    What is still soft makes up for what was fixed, and at ``end`` nothing is soft, whatever the number of steps.
    """

    begin: float = Field(default=0.3, ge=0, lt=1)
    end: float = Field(default=0.95, gt=0, le=1)
    rounds: int = Field(default=40, ge=1)
    """In how many portions."""

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Harden:
        if self.begin >= self.end:
            raise ValueError(f"expected begin below end, found {self.begin} and {self.end}")
        return self

    def share(self, progress: float) -> float:
        """How much is fixed.

        Example:
            >>> [round(Harden(begin=0.2, end=0.9, rounds=10).share(p), 3) for p in (0.1, 0.2, 0.5, 0.9, 1.0)]
            [0.0, 0.0, 0.64, 1.0, 1.0]
        """
        passed = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        passed = math.floor(passed * self.rounds + 1e-9) / self.rounds
        return 1 - (1 - passed) ** 2


class Dampen(Settings):
    """Draws straight-through codes to their integers, so that few sit between two of them and flip at every step.

    After every step, each code goes ``pull * progress`` times the learning rate of the way to the integer it rounds to:
    the dampening of Nagel et al. (arXiv:2203.11086, section 4.1), apart from the gradients as weight decay is in AdamW,
    since Adam would divide it by their size. Codes need some hundred steps to gather between integers: a run of fewer
    than ``full_from`` steps has a pull that is smaller in proportion.
    """

    pull: float = Field(default=1.0, gt=0)
    full_from: int = Field(default=300, ge=0)

    def share(self, progress: float, steps: int, rate: float) -> float:
        """How much of the way, at a point of a run of so many steps and at this learning rate.

        Example:
            >>> [Dampen(pull=2.0, full_from=100).share(0.5, steps, rate=0.01) for steps in (50, 100, 1000)]
            [0.005, 0.01, 0.01]
        """
        full = min(steps / self.full_from, 1.0) if self.full_from else 1.0
        return min(self.pull * full * progress * rate, 1.0)


class Gradual(Settings):
    """Gradual activation quantization: activations start in float and end on their grids.

    ``linear`` and ``cosine`` blend ``p x + (1 - p) Q(x)``; ``drop`` keeps each element float with probability ``p``
    (EPTQ v2, methods section 1.4). ``p`` falls from ``start`` to 0 at ``until``. With ``hold``, it stays at ``start``
    (QDrop: ``drop`` at 0.5).
    """

    how: Literal["linear", "cosine", "drop"] = "linear"
    start: float = Field(default=1.0, ge=0, le=1)
    until: float = Field(default=1.0, gt=0, le=1)
    hold: bool = False

    def at(self, progress: float) -> tuple[float, float]:
        """(mix, drop): the float share of every activation, and the share of elements that stay float.

        Example:
            >>> Gradual().at(0.25), Gradual(how="drop", start=0.5, hold=True).at(0.9)
            ((0.75, 0.0), (0.0, 0.5))
        """
        passed = min(progress / self.until, 1.0)
        p = self.start * (1.0 if self.hold else decay("cosine" if self.how == "cosine" else "linear", passed))
        return (0.0, p) if self.how == "drop" else (p, 0.0)
