"""What changes while an optimisation runs, as functions of its progress from 0 to 1."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Schedule = Literal["constant", "linear", "cosine"]

START, END, WARMUP = 20.0, 2.0, 0.2
"""The regularizer's exponent at first and at last, and the share of a run before it falls: as in AdaRound and its
successors."""
LARGEST_RATE = 1e6
"""Of learning: no network learns with it, and float32 still holds what comes of it."""
FULL_FROM = 300
"""Steps that codes need to gather between integers."""


class FrozenSettings(BaseModel):
    """A record of settings that cannot be changed; true and false are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truths_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """A truth as a word, which no number is, where the setting is a number and no truth."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        return str(value).lower() if isinstance(value, bool) and kinds & {int, float} and bool not in kinds else value


def _kinds(annotation: Any) -> set[Any]:
    """What a setting may be, of all that stands in its annotation."""
    inside = get_args(annotation)
    return {annotation}.union(*map(_kinds, inside))


def decay(schedule: Schedule, progress: float) -> float:
    """Factor on a learning rate: from 1 to 0, or 1 throughout.

    Example:
        >>> [round(decay("cosine", p), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return 1.0
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class Learn(FrozenSettings):
    """How one kind of variable is optimised."""

    optimizer: Literal["adam", "radam", "sgd", "sign"] = "adam"
    """``sign`` goes by the rate along the sign of each gradient, whatever its size."""
    rate: float = Field(gt=0, le=LARGEST_RATE)
    schedule: Schedule = "cosine"
    relative: bool = False
    """The rate is a share: of each step that is learned, and for a bias of the spread of its layer's output."""

    def rate_at(self, progress: float) -> float:
        """The learning rate at a point of a run."""
        return self.rate * decay(self.schedule, progress)


class Anneal(FrozenSettings):
    """Makes soft roundings decide by the regularizer ``weight * sum(1 - |2h - 1|^beta)`` (AdaRound).

    ``beta`` stays at 20 during the first fifth of a run and falls linearly to 2.
    """

    weight: float = Field(default=0.01, ge=0)
    quiet: bool = False
    """No regularizer at all before the exponent falls (AdaRound, BRECQ, QDrop); EPTQ has it on from the first step."""

    def beta(self, progress: float) -> float:
        """The exponent.

        Example:
            >>> [round(Anneal().beta(p), 6) for p in (0.0, 0.2, 0.6, 1.0)]
            [20.0, 20.0, 11.0, 2.0]
        """
        if progress <= WARMUP:
            return START
        return START + (END - START) * (progress - WARMUP) / (1 - WARMUP)

    def strength(self, progress: float) -> float:
        """The regularizer's weight."""
        return 0.0 if self.quiet and progress < WARMUP else self.weight


class Dampen(FrozenSettings):
    """Draws straight-through codes to their integers, so that few sit between two of them and flip at every step.

    After every step, each code goes ``pull * progress`` times the learning rate of the way to the integer it rounds to:
    the dampening of Nagel et al. (arXiv:2203.11086, section 4.1), apart from the gradients as weight decay is in AdamW,
    since Adam would divide it by their size. Codes need some hundred steps to gather between integers: a run of fewer
    than 300 steps has a pull that is smaller in proportion.
    """

    pull: float = Field(default=1.0, gt=0)

    def share(self, progress: float, steps: int, rate: float) -> float:
        """How much of the way a code goes at a point of a run, given the run's steps and the learning rate.

        Example:
            >>> [Dampen(pull=2.0).share(0.5, steps, rate=0.01) for steps in (150, 300, 1000)]
            [0.005, 0.01, 0.01]
        """
        return min(self.pull * min(steps / FULL_FROM, 1.0) * progress * rate, 1.0)


class Gradual(FrozenSettings):
    """Gradual activation quantization: activations start in float and end on their grids.

    ``linear`` and ``cosine`` blend ``p x + (1 - p) Q(x)``; ``drop`` keeps each element float with probability ``p``
    (EPTQ v2, methods section 1.4). ``p`` falls from ``start`` to 0 at the end. With ``hold``, it stays at ``start``
    (QDrop: ``drop`` at 0.5).
    """

    how: Literal["linear", "cosine", "drop"] = "linear"
    start: float = Field(default=1.0, ge=0, le=1)
    hold: bool = False

    def at(self, progress: float) -> tuple[float, float]:
        """(mix, drop): the float share of every activation, and the share of elements that stay float.

        Example:
            >>> Gradual().at(0.25), Gradual(how="drop", start=0.5, hold=True).at(0.9)
            ((0.75, 0.0), (0.0, 0.5))
        """
        p = self.start * (1.0 if self.hold else decay("cosine" if self.how == "cosine" else "linear", progress))
        return (0.0, p) if self.how == "drop" else (p, 0.0)
