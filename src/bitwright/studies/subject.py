"""A network under study, and what the studies do with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.given.inputs import prepare_teacher
from bitwright.given.models import Model
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on
from bitwright.graph.student import Snapshot, Student, insert_quantizers
from bitwright.graph.walk import images_in_pass
from bitwright.measure.evaluation import compare
from bitwright.measure.metrics import Evaluation, worst_figures
from bitwright.measure.task import Outputs
from bitwright.pipeline import tensor_digest
from bitwright.progress import Progress, silent
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.run.record import StageRecord
from bitwright.stages.base import Run, Stage
from bitwright.stages.reconstruct import Reconstruct
from bitwright.studies.rows import Row

BATCH = 50
COMPARED = 256
"""Calibration images on which the two networks are compared."""


def split(images: Images) -> tuple[Images, Images]:
    """Three of four images to calibrate on, every fourth to measure on, so that sorted images do not matter.

    Raises:
        UsageError: there are fewer than two.

    Example:
        >>> from bitwright.given.images import load_images
        >>> [s.names for s in split(load_images(torch.zeros(6, 3, 4, 4), None))]
        [['0', '1', '2', '4', '5'], ['3']]
    """
    if len(images) < 2:
        raise UsageError(
            f"Expected at least 2 images to split between calibration and measurement, found {len(images)}. "
            "Give more, or others to measure on with evaluate=."
        )
    last = min(3, len(images) - 1)
    held_out = [i for i in range(len(images)) if i % 4 == last]
    rest = [i for i in range(len(images)) if i % 4 != last]
    return images.take(rest), images.take(held_out)


class Subject:
    """A network under study, captured once.

    Attributes:
        name: of the network.
        teacher: the float network; never changed.
        pool: images to calibrate on, without labels; a study takes as many as it needs.
        held_out: images to measure on, with labels if there are any.
    """

    def __init__(
        self, network: Model, pool: Images, held_out: Images, device: torch.device, output: str | None = None
    ) -> None:
        self.name, self.device = network.name, device
        self.pool, self.held_out = pool.unlabelled(), held_out
        self.teacher: Captured = prepare_teacher(network, pool, output)
        place_on(self.teacher.graph, device)
        self._begun: tuple[Any, Student, Snapshot] | None = None

    def facts(self) -> Row:
        """What NAME.json says of it."""
        return {
            "name": self.name,
            "sha256": tensor_digest(self.teacher.graph),
            "calibration": {"available": len(self.pool), "sha256": self.pool.sha256},
            "held_out": {
                "count": len(self.held_out),
                "sha256": self.held_out.sha256,
                "labelled": self.held_out.labels is not None,
            },
        }

    def calibration(self, samples: int, seed: int = 0) -> Images:
        """That many images out of the pool, evenly spread; all where there are not more."""
        return self.pool.sample(min(samples, len(self.pool)), seed=seed)

    def begin(
        self, scheme: Scheme, stages: tuple[Stage, ...], images: Images, seed: int, progress: Progress = silent
    ) -> Student:
        """The student after the stages, which run once for as long as the same is asked for."""
        key = (scheme, stages, images.sha256, seed)
        if self._begun is None or self._begun[0] != key:
            student = insert_quantizers(self.teacher, scheme)
            student.to(self.device)
            at_once = images_in_pass(self.teacher.graph.graph, self.device)
            run = Run(seed=seed, batch=at_once, device=self.device, progress=progress)
            for stage in stages:
                torch.manual_seed(seed)
                student = stage.run(student, self.teacher, images, run)
            self._begun = (key, student, student.snapshot())
        _, student, snapshot = self._begun
        student.restore(snapshot)
        return student

    def optimise(
        self, student: Student, stage: Reconstruct, images: Images, seed: int, progress: Progress = silent
    ) -> tuple[Student, Row]:
        """Runs the stage to its end in float32, whether or not the result is better than the start.

        Returns:
            The student, its loss on unseen views with the stage's own weights, and that of the start.
        """
        run = Run(seed=seed, device=self.device, progress=progress, precision="float32")
        run.history.append(("start", student.snapshot()))
        torch.manual_seed(seed)
        student = stage.model_copy(update={"never_worse": False}).run(student, self.teacher, images, run)
        found = run.records[-1] if run.records else StageRecord(kind=stage.kind)
        return student, {"loss": found.after, "loss_before": found.before}

    def measure(self, student: Student, calibration: Images, progress: Progress = silent) -> Row:
        """Fidelity, and accuracy where there are labels, on held-out images; KL on calibration images beside it."""
        found = self._compare(student, self.held_out, progress)
        own = self._compare(student, calibration[:COMPARED], progress)
        worst, scores = worst_figures(found.outputs), {} if found.quantized is None else found.quantized.to_dict()
        accuracy: Row = {k: scores[k] for k in ("top1", "top1_ci") if k in scores}
        fidelity = {"agreement": worst.agreement, "kl": worst.kl, "sqnr_db": worst.sqnr_db}
        return {**fidelity, **accuracy, "calibration_kl": worst_figures(own.outputs).kl}

    def float_accuracy(self, progress: Progress = silent) -> Row:
        """Of the float network on the held-out images, all of which are decoded for it; empty without labels."""
        found = compare(self._teacher, None, self.held_out, batch=BATCH, progress=progress).quantized
        return {} if found is None else found.to_dict()

    def _compare(self, student: Student, images: Images, progress: Progress) -> Evaluation:
        def network(x: Tensor) -> list[Tensor]:
            return [o.cpu() for o in student.flat(x.to(self.device))]

        names = self.teacher.outputs
        readings = read_outputs(self.teacher.graph, images.batch([0], self.device), names)
        outputs = Outputs(names, readings)
        return compare(network, self._teacher, images, outputs=outputs, batch=BATCH, progress=progress)

    def _teacher(self, x: Tensor) -> list[Tensor]:
        return [o.cpu() for o in self.teacher.graph(x.to(self.device))]


def eptq() -> tuple[tuple[Stage, ...], Reconstruct]:
    """The stages of recipe ``eptq``: those before the optimisation, and the optimisation."""
    *start, stage = recipe("eptq").stages
    assert isinstance(stage, Reconstruct)
    return tuple(start), stage
