"""How well a task's figure follows the float network, without labels: its own answers stand for the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bitwright.errors import BitwrightError, DataError
from bitwright.given.images import Images
from bitwright.given.truth import Kind, Truth
from bitwright.given.two_stages import unfilled
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import Captured
from bitwright.graph.devices import device_of
from bitwright.graph.student import Student
from bitwright.measure.evaluation import compare, outputs_of, seconds_of
from bitwright.measure.metrics import Metrics
from bitwright.measure.own import FloatAnswers
from bitwright.measure.task import Outputs, called
from bitwright.measure.tasks import TASKS, Scoring

BATCH = 16
KINDS: Mapping[str, Kind] = {"segmentation": "segmentation", "detection": "detection"}


@dataclass(frozen=True)
class Follower:
    """Scores networks against a float network's answers.

    Attributes:
        images: with these answers as their truth.
        outputs: how outputs are read.
        scoring: which task or metric.
        key: of the figure that counts.
        best: the figure of the float network against itself.
    """

    images: Images
    outputs: Outputs
    scoring: Scoring
    key: str
    best: float

    @classmethod
    def of(cls, teacher: Captured, images: Images, scoring: Scoring) -> Follower:
        """Asks the float network.

        Args:
            teacher: the float network.
            images: without labels.
            scoring: which task or metric; the outputs themselves are the truth of a metric without a task.

        Raises:
            DataError: there is no figure, or none above 0, of the float network against itself.
        """
        device = device_of(teacher.graph)
        readings = read_outputs(teacher.graph, images.batch([0], device), teacher.outputs)
        outputs = outputs_of(teacher, readings)
        known = _with_answers(teacher, images, outputs, scoring)
        made = cls(known, outputs, scoring, "", 1.0)
        figures = made._figures(teacher).values
        taken = () if scoring.task is None or scoring.metric is None else tuple(TASKS[scoring.task].figures)
        key = next((k for k in figures if k not in taken), "")
        best = figures.get(key, math.nan)
        if math.isnan(best):
            raise DataError(
                "Expected a figure above 0 of the float network against its own answers, found no number (NaN)"
                f"{f' as {key}' if key else ' for any image'}. A metric must give one where outputs and truth are the "
                "same, and a detector be sure of boxes."
            )
        if not best > 0:
            raise DataError(
                f"Expected a figure above 0 of the float network against its own answers, found {best:g} as {key}. "
                "A metric must grow with likeness, and a detector be sure of boxes."
            )
        return replace(made, key=key, best=best)

    def share(self, student: Student) -> tuple[float, list[float]]:
        """The share of the figure that a quantized network keeps, with its 95 % interval."""
        found = self._figures(student)
        value = found.values.get(self.key, 0.0) / self.best
        if math.isnan(value):
            return 0.0, [0.0, 0.0]
        return value, [end / self.best for end in found.intervals.get(self.key, [0.0, self.best])]

    def _figures(self, network: Student | Captured) -> Metrics:
        device = device_of(network.graph)
        try:
            found = compare(
                lambda x: [o.cpu() for o in network.flat(x.to(device))],
                None,
                self.images,
                outputs=self.outputs,
                scoring=self.scoring,
                batch=BATCH,
                seconds=seconds_of(network, None),
            )
        except BitwrightError as error:
            raw = "the float network's raw outputs. If the metric reads masks, boxes or classes, name task= too"
            told = raw if self.scoring.task is None else f"what the float network answers, as {self.scoring.task}"
            raise DataError(f"{error} (The truth of max_drop= is {told}.)") from error
        return found.quantized or Metrics()


def _with_answers(teacher: Captured, images: Images, outputs: Outputs, scoring: Scoring) -> Images:
    """The images with the float network's answers as their truth."""
    task = None if scoring.task is None else TASKS[scoring.task]
    size, device = (int(images.seen(0).shape[-2]), int(images.seen(0).shape[-1])), device_of(teacher.graph)
    decode, how, boxed = scoring.decoder(task), outputs, None
    if (two := scoring.two_stages(task)) is not None and (seconds := seconds_of(teacher, None)) is not None:
        boxed = partial(two.behind, second=seconds[0], names=outputs.names, size=size)
        decode, how = unfilled, replace(outputs, arranged=lambda flat: flat)
    found: list[Any] = []
    answers: list[tuple[Any, int]] = []
    with torch.no_grad():
        for batch in images.batches(BATCH):
            flat = [o.cpu() for o in teacher.flat(batch.to(device))]
            flat = flat if boxed is None else boxed(flat)
            if task is not None:
                found += task.answers(flat, how, decode, size)
                continue
            arranged = how.arranged(flat)
            made = arranged if decode is None else called(decode, arranged)
            if decode is not None and isinstance(made, list) and len(made) == len(batch) and not answers:
                found += made  # an item of each image
            else:
                answers.append((made, len(batch)))
    seen = images.as_seen()
    if answers and not found:
        return seen.known(Truth("other", FloatAnswers.of(answers), "answers of the float network"))
    if task is None or task.truth != "class indices":
        return seen.known(Truth("other" if task is None else KINDS[task.name], found, "answers of the float network"))
    return seen.labelled(found)
