"""The loss of networks on a fixed part of the samples, which says what of an optimisation is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.graph.capture import Captured
from bitwright.graph.points import Point, expose
from bitwright.graph.student import Snapshot, Student
from bitwright.stages.base import Run, Samples
from bitwright.stages.learner import Learner
from bitwright.stages.losses import weighted_distance
from bitwright.stages.tuning import Objective

MEASURED_IMAGES = 256


class CalibrationLoss:
    """Of networks at the points, without regularizer.

    Args:
        teacher: the float network.
        points: where networks are compared with it.
        objective: how distances are weighted.
        samples: the first :data:`MEASURED_IMAGES` of these are looked at.
        run: its device.
        at_once: images in one pass.
    """

    def __init__(
        self, teacher: Captured, points: list[Point], objective: Objective, samples: Samples, run: Run, at_once: int
    ) -> None:
        self.points, self.objective, self.run, self.at_once = points, objective, run, at_once
        self.teacher = expose(teacher.graph, [p.node for p in points])
        self.count = min(MEASURED_IMAGES, len(samples))
        self.samples = samples

    def losses(
        self, student: Student, states: dict[str, Snapshot], learner: Learner | None
    ) -> tuple[dict[str, float], float | None]:
        """Of the student in each state, and of the learner as it stands; each batch passes the teacher once."""
        totals = dict.fromkeys(states, 0.0)
        soft = 0.0
        exposed = {}
        for name, state in states.items():
            student.restore(state)
            exposed[name] = expose(student.graph, [p.node for p in self.points])
        weights = self.objective.weights[: self.count]
        if self.objective.normalise:
            weights = weights / weights.mean(0).max().clamp_min(1e-30)
        with torch.no_grad():
            for start in range(0, self.count, self.at_once):
                indices = torch.arange(start, min(start + self.at_once, self.count))
                images = self.samples.batch(indices).to(self.run.device)
                chosen = weights[indices].to(self.run.device)
                _, expected = self.teacher(images)
                for name, state in states.items():
                    student.restore(state)  # scales are in the quantizers, which all states share
                    totals[name] += self._total(exposed[name](images)[1], expected, chosen)
                if learner is not None:
                    soft += self._total(learner(images)[1], expected, chosen)
        return {n: t / self.count for n, t in totals.items()}, None if learner is None else soft / self.count

    def _total(self, found: list[Tensor], expected: list[Tensor], weights: Tensor) -> float:
        terms = [
            weighted_distance(a, b, weights[:, i], p, over=self.objective.over)
            for i, (p, a, b) in enumerate(zip(self.points, found, expected, strict=True))
        ]
        return float(torch.stack(terms).sum()) * len(weights)
