"""Which of the networks that stages have left is kept: by their loss on views that none of them saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container

import torch
from torch import Tensor

from bitwright.graph.capture import Captured
from bitwright.graph.points import Point, expose
from bitwright.graph.student import Snapshot, Student
from bitwright.stages.augment import Views
from bitwright.stages.base import Run
from bitwright.stages.learner import Learner
from bitwright.stages.losses import distances_by_image
from bitwright.stages.tuning import Objective

MEASURED_IMAGES = 256
ERRORS = 1.0
"""Standard errors of the mean difference by which a result must be worse to be given up: a few images make most of the
loss, so that it differs by several percent from one crop of them to the next."""


class UnseenLoss:
    """Of networks at the points, without regularizer.

    Args:
        teacher: the float network.
        points: where networks are compared with it.
        objective: how distances are weighted.
        seen: what stages have seen; the first :data:`MEASURED_IMAGES` of the :meth:`~Views.unseen` are looked at.
        run: its device.
        at_once: images in one pass.
    """

    def __init__(
        self, teacher: Captured, points: list[Point], objective: Objective, seen: Views, run: Run, at_once: int
    ) -> None:
        self.points, self.objective, self.run, self.at_once = points, objective, run, at_once
        self.teacher = expose(teacher.graph, [p.node for p in points])
        self.samples = seen.unseen()
        self.count = min(MEASURED_IMAGES, len(self.samples))
        self.images = len(seen.images)

    def losses(
        self, student: Student, states: dict[str, Snapshot], learner: Learner | None
    ) -> tuple[dict[str, Tensor], float | None]:
        """Of every sample and the student in each state, [N], and of the learner as it stands, their mean.

        Each batch passes the teacher once.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in states}
        soft: list[Tensor] = []
        exposed = {}
        for name, state in states.items():
            student.restore(state)
            exposed[name] = expose(student.graph, [p.node for p in self.points])
        weights = self.objective.weights[torch.arange(self.count) % self.images]
        if self.objective.normalise:
            weights = weights / weights.mean(0).max().clamp_min(1e-30)
        with torch.no_grad():
            for start in range(0, self.count, self.at_once):
                indices = torch.arange(start, min(start + self.at_once, self.count))
                samples = self.samples.batch(indices, self.run.device)
                chosen = weights[indices].to(self.run.device)
                _, expected = self.teacher(samples)
                for name, state in states.items():
                    student.restore(state)  # scales are in the quantizers, which all states share
                    found[name].append(self._each(exposed[name](samples)[1], expected, chosen))
                if learner is not None:
                    soft.append(self._each(learner(samples)[1], expected, chosen))
        return {n: torch.cat(parts) for n, parts in found.items()}, float(torch.cat(soft).mean()) if soft else None

    def _each(self, found: list[Tensor], expected: list[Tensor], weights: Tensor) -> Tensor:
        terms = [
            distances_by_image(a, b, weights[:, i], p, over=self.objective.over).double()
            for i, (p, a, b) in enumerate(zip(self.points, found, expected, strict=True))
        ]
        return torch.stack(terms).sum(0).cpu()


def surely_lower(losses: dict[str, Tensor], own: str) -> str:
    """Which has the lowest mean, or ``own`` unless that is lower by more than chance would have it.

    Args:
        losses: of the same samples, [N] each.
        own: what is kept where the difference lies within :data:`ERRORS` standard errors. A loss that is not finite is
            never kept while another is.

    Example:
        >>> both = {"start": torch.tensor([1.0, 2.0, 3.0]), "end": torch.tensor([1.1, 2.1, 3.1])}
        >>> surely_lower(both, "end"), surely_lower({**both, "end": torch.tensor([4.0, 1.0, 2.0])}, "end")
        ('start', 'end')
    """
    finite = {name: float(loss.mean()) for name, loss in losses.items() if bool(loss.isfinite().all())}
    best = min(finite, key=lambda name: (finite[name], name != own), default=own)
    if best == own or own not in finite:
        return best
    gain = losses[own] - losses[best]
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return best if finite[own] - finite[best] > ERRORS * error else own


def left_by_stages(history: list[tuple[str, Snapshot]]) -> dict[str, Snapshot]:
    """What stages left, by their kind."""
    found: dict[str, Snapshot] = {}
    for kind, snapshot in history:
        found[numbered(kind, found)] = snapshot
    return found


def numbered(kind: str, taken: Container[str]) -> str:
    """The kind of a stage, numbered from its second stage on.

    Example:
        >>> numbered("optq", {}), numbered("reconstruct", {"reconstruct"})
        ('optq', 'reconstruct 2')
    """
    names = (kind if i == 1 else f"{kind} {i}" for i in itertools.count(1))
    return next(n for n in names if n not in taken)


def more_steps(began: float | None, ended: float, curve: list[tuple[int, float]]) -> str:
    """Whether more steps promise anything: where those that were taken made the loss smaller, or were about to.

    Args:
        began: the loss before the first step; None where nothing was rounded then.
        ended: the loss after the last one.
        curve: of the steps, as :func:`~bitwright.stages.outcome.averaged` has it.

    Example:
        >>> more_steps(1.0, 1.2, [(10, 3.0), (20, 2.0)]), more_steps(1.0, 0.9, [])
        ('More steps may help.', 'More steps may help.')
        >>> more_steps(1.0, 1.2, [(10, 2.0), (20, 3.0)])[:30]
        'The loss did not fall on the w'
    """
    part = -(-len(curve) // 3)
    first, last = (sum(loss for _, loss in stretch) for stretch in (curve[:part], curve[len(curve) - part :]))
    if (began is not None and ended < began) or last < first:
        return "More steps may help."
    return "The loss did not fall on the way either: more images or more bits will help rather than more steps."
