"""The tasks that there are, which of them images belong to, and what scores a network's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitwright.errors import DataError, UsageError
from bitwright.given.arguments import one_of
from bitwright.given.images import Images
from bitwright.given.two_stages import TwoStages
from bitwright.measure import masks, own
from bitwright.measure.classification import CLASSIFICATION
from bitwright.measure.detection import DETECTION
from bitwright.measure.segmentation import SEGMENTATION
from bitwright.measure.task import Decode, Judged, Outputs, Task

TASKS = {t.name: t for t in (CLASSIFICATION, SEGMENTATION, DETECTION)}
"""All tasks by name, in the order in which they are tried."""


@dataclass(frozen=True)
class Scoring:
    """What a user says of how outputs are scored.

    Attributes:
        task: name of a task; None for the one that the labels belong to.
        metric: a function of outputs and truth, instead of the task's figures; see :mod:`bitwright.measure.own`.
        decode: turns outputs into what the task compares: boxes with scores and labels, or maps of classes.
        beside: a function of this kind that the network brought with it; for boxes alone, if there is no other.
    """

    task: str | None = None
    metric: Any = None
    decode: Decode | None = None
    beside: Decode | None = None

    def decoder(self, task: Task | None) -> Decode | None:
        """The function for a task."""
        return self.decode or (self.beside if task is not None and task.truth == "boxes" else None)

    def two_stages(self, task: Task | None) -> TwoStages | None:
        """What runs between the networks of a detector of two stages, where that is what is scored."""
        found = self.decoder(task)
        return found if isinstance(found, TwoStages) else None

    def check(self) -> None:
        """Refuses what is no task or no function.

        Raises:
            UsageError: it is none.
        """
        if self.task is not None:
            one_of("task", self.task, tuple(TASKS))
        if self.decode is not None and not callable(self.decode):
            raise UsageError(f"Expected a function as decode=, found {type(self.decode).__name__}.")
        if self.metric is not None:
            own.check(self.metric)


def task_of(images: Images, said: str | None = None) -> Task | None:
    """The task that images and what is known of them belong to; None where nothing is known that a task compares with.

    Raises:
        DataError: a task was said, and its truth is missing.
    """
    if said is None:
        return next((t for t in TASKS.values() if t.fits(images)), None)
    task = TASKS[one_of("task", said, tuple(TASKS))]
    if not task.fits(images):
        found = next((t.truth for t in TASKS.values() if t.fits(images)), "none")
        raise DataError(f"Expected {task.truth} as labels= for task='{said}', found {found}.")
    return task


def judges(images: Images, outputs: Outputs, scoring: Scoring) -> list[Judged]:
    """What compares networks on images: the task's figures, the user's own, or both if a task is said beside a metric.

    Raises:
        DataError: there is nothing to compare with, where something was asked for or labels were given.
    """
    scoring.check()
    if scoring.metric is None and (read := masks.of_numbers(images.truth)) is not None:
        images = images.known(read)
    task = task_of(images, scoring.task)
    found: list[Judged] = []
    if task is not None and (scoring.metric is None or scoring.task is not None):
        found.append(Judged(task.judge(images, outputs, scoring.decoder(task)), task))
    if scoring.metric is not None:
        taken = () if task is None else tuple(task.figures)
        found.append(Judged(own.OwnJudge(images, outputs, scoring.metric, scoring.decoder(task), taken), None))
    if scoring.decode is not None and not found:
        raise DataError("Expected labels= beside decode=, found none. There is nothing to compare boxes or maps with.")
    if images.truth is not None and images.truth.asked and not found:
        raise DataError(
            "Expected labels= to be class indices [N], masks of classes [N, H, W] or one-hot [N, K, H, W], or boxes "
            f"and labels of each image, found {images.truth.said}. Give one of these, or metric= for others."
        )
    return found
