"""What the studies of Evol-Q share: blocks with their scales, and every distance of the outputs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph.blocks import Block, BlockKind, find_blocks
from bitwright.graph.readings import Reading
from bitwright.graph.student import Student
from bitwright.measure.classification import class_scores
from bitwright.measure.metrics import as_log_probabilities
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.base import Run
from bitwright.stages.candidates import Batches, Fitness, FitnessMeasure
from bitwright.stages.evolve import Evolve
from bitwright.studies.rows import Row
from bitwright.studies.subject import Subject

FITNESS_MEASURES: tuple[FitnessMeasure, ...] = get_args(FitnessMeasure)
ANSWERS = ("agreement", "top1")
"""Shares of right answers: no losses."""
REPORTED = ("cross-entropy", *ANSWERS)
"""What is shown beside the losses, and never what anything is chosen by."""

# ------------------------------------------------------------------------------------------------- blocks


def middle_blocks(subject: Subject) -> list[Block]:
    """The middle block of every kind; chains only where there is nothing else."""
    blocks = find_blocks(subject.teacher.graph)
    kinds = [k for k in get_args(BlockKind) if any(b.kind == k for b in blocks)]
    found = []
    for kind in [k for k in kinds if k != "chain"] or kinds:
        same = [b for b in blocks if b.kind == kind]
        found.append(same[len(same) // 2])
    return found


def evolved_keys(subject: Subject, student: Student) -> list[str]:
    """Keys of the weights whose scales :class:`Evolve` changes."""
    return [k for one in Evolve().searched(student, subject.teacher) for k in one.scales.keys]


# ------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Distances(Fitness):
    """All losses of an output at once, so that one pass of the network gives them all.

    Attributes:
        names: of the columns: losses, then what :data:`REPORTED` names.
    """

    names: tuple[str, ...] = FITNESS_MEASURES

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[N, number of names]; where labels are needed they follow the teacher's outputs."""
        outputs = teacher[: len(student)]
        return torch.stack([self._column(n, student, outputs, teacher[-1]) for n in self.names], 1)

    def _column(self, name: str, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
        if name == "agreement":
            p, q = as_log_probabilities(teacher[0]), as_log_probabilities(student[0])
            assert p is not None
            assert q is not None
            return (p.argmax(1) == q.argmax(1)).double().reshape(len(p), -1).mean(1)
        if name in REPORTED:
            scores = class_scores(list(student), labels).double()
            if name == "top1":
                return (scores.argmax(1) == labels).double()
            return functional.cross_entropy(scores, labels, reduction="none")
        measure = next(m for m in FITNESS_MEASURES if m == name)
        return Fitness(measure, self.temperature)(student, teacher).double()


@dataclass(frozen=True)
class RightAndFar(Fitness):
    """Right answers and KL from the float network of every image, [N, 2], whatever the outputs are.

    Right is what the labels say where they follow the teacher's outputs, else what the float network says, as a share
    of an image's answers.
    """

    readings: tuple[Reading, ...] = ()

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[N, 2], float64 on the CPU."""
        outputs = list(teacher[: len(student)])
        divergence = distance_of_outputs(list(student), outputs, self.readings)
        if len(teacher) > len(student):
            right = class_scores(list(student), teacher[-1]).argmax(1) == teacher[-1]
        else:
            right = self._same(student, outputs)
        return torch.stack([right.double().cpu(), divergence], 1)

    def _same(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        found = [how.same(a, b) for how, a, b in zip(self.readings, teacher, student, strict=True)]
        told = [s.double().reshape(len(s), -1).mean(1) for s in found if s is not None]
        if not told:
            raise UsageError("Expected outputs that say something, such as class scores, found none to compare.")
        return torch.stack(told).mean(0)


def measured_batches(subject: Subject, images: Images, size: int, run: Run) -> tuple[Batches, Distances]:
    """Images with the float network's outputs, and all distances that suit those.

    Labels, where the images have them, follow the outputs and serve :data:`REPORTED` alone.
    """
    batches = Batches(subject.teacher, images.unlabelled(), size, run, "Teacher's outputs")
    first = batches.targets[0]
    names: list[str] = [m for m in FITNESS_MEASURES if suits(m, first)]
    if images.labels is not None:
        for part, targets in zip(batches.parts, batches.targets, strict=True):
            targets.append(images.labels[part].to(batches.device))
        names.append("cross-entropy")
    if as_log_probabilities(first[0]) is not None:
        names.append("agreement")
    return batches, Distances(names=tuple(names + (["top1"] if images.labels is not None else [])))


def suits(measure: FitnessMeasure, outputs: Sequence[Tensor]) -> bool:
    """Whether a loss means something for outputs [N, ...], N at least 2."""
    try:
        Fitness(measure)(outputs, outputs)
    except UsageError:
        return False
    return True


def means(values: Tensor, names: Sequence[str]) -> Row:
    """Columns [N, L] as their means by name."""
    return dict(zip(names, values.double().mean(0).tolist(), strict=True))
