"""What an optimisation did, as the result of a run tells it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from bitwright.run.record import StageRecord

CURVE_POINTS = 200
"""Of the loss over the steps, as the result keeps it."""


class ScoresRecord(BaseModel):
    """Label-free scores: of each layer (the trace of its Hessian), with the largest relative standard error."""

    layers: dict[str, float]
    relative_error: float
    probes: int
    images: int


class LossRecord(BaseModel):
    """The loss on unseen views of the calibration images: before rounding, of what is kept, of what each stage left."""

    soft: float | None
    hard: float
    by_stage: dict[str, float]


class Stopped(BaseModel):
    """Where the loss was not finite any more."""

    layer: str
    step: int


class NoiseRecord(BaseModel):
    """A layer's signal to noise in dB, before and after."""

    before: float | None
    after: float | None


class UnitRecord(BaseModel):
    """What became of one unit: its loss before and after, and whether what was found is kept."""

    name: str
    layers: list[str]
    before: float
    after: float
    kept: bool
    inputs: Literal["kept", "live"]
    seconds: float


class ReconstructRecord(StageRecord):
    """What an optimisation did, filled in as it goes."""

    kind: str = "reconstruct"
    steps: int
    precision: str
    compiled: bool
    step_seconds: dict[str, float]
    seed: int
    views: int = 1
    """Of each image."""
    batch: int | None = None
    at_once: int | None = None
    teacher: Literal["kept", "live"] | None = None
    stopped: Stopped | None = None
    curve: list[tuple[int, float]] | None = None
    """(step, loss), averaged over stretches."""
    seconds_per_step: float | None = None
    loss: LossRecord | None = None
    kept: str | None = None
    """The stage whose result is kept."""
    left_nearest: float | None = None
    """Share of weights that are not at their nearest integer."""
    sqnr_db: dict[str, NoiseRecord] | None = None
    scores: ScoresRecord | None = None
    units: list[UnitRecord] | None = None
    """In the order in which they were optimised; the losses above are then sums over them."""

    def keys(self) -> dict[str, Any]:
        """Scores have a key of their own."""
        own = self.told()
        scores = {"scores": own.pop("scores")} if "scores" in own else {}
        return {**scores, self.kind: own}


def averaged(losses: list[float], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """The loss over the steps: (last step, mean) of stretches of equal length, as few as fit into ``points``.

    Example:
        >>> averaged([4.0, 2.0, 3.0, 1.0, 1.0], points=3)
        [(2, 3.0), (4, 2.0), (5, 1.0)]
    """
    length = max(1, -(-len(losses) // points))
    stretches = (losses[i : i + length] for i in range(0, len(losses), length))
    return [(min((k + 1) * length, len(losses)), sum(s) / len(s)) for k, s in enumerate(stretches)]
