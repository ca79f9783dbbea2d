"""Quantization-aware training with labels and a teacher that learns along: the one stage that reads labels.

QKD (arXiv:1911.12491) has three phases. The student studies labels alone; then student and float network learn from
labels and from each other; then the float network, which has learned how the quantized one errs, stands still and
tutors. With labels y and probabilities p at temperature T,

    self-study    CE(y, p_S)
    co-study      CE(y, p_S) + T^2 KL(p_T || p_S)     and    CE(y, p_T) + T^2 KL(p_S || p_T)     for the teacher
    tutoring      CE(y, p_S) + T^2 KL(p_T || p_S)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bitwright import together
from bitwright.errors import NotFiniteError, UsageError
from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.points import linear_points
from bitwright.graph.student import Student
from bitwright.measure.classification import check_classes, class_scores
from bitwright.run.record import StageRecord
from bitwright.stages.augment import VIEWS_ALLOWED, Views
from bitwright.stages.base import Optimising, Run
from bitwright.stages.calibrate import widen_for_biases
from bitwright.stages.learner import Learner, Variables
from bitwright.stages.optimizers import OptimizedPart, move_parts, optimizers_of
from bitwright.stages.pace import Pace
from bitwright.stages.resume import KeptState
from bitwright.stages.schedules import Learn
from bitwright.stages.tuning import SHARED_PART

Phase = Literal["self-study", "co-study", "tutoring"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TRIED = 4
"""Steps that are measured to make a number of steps of minutes."""


class FinetuneRecord(StageRecord):
    """What training did; losses before and after are cross-entropy on the training images, everything rounded."""

    kind: str = "finetune"
    steps: dict[Phase, int]
    images: int
    """Whose labels were read."""
    batch: int
    top1: tuple[float, float]
    """On the training images, before and after."""
    seconds_per_step: float | None = None


class Finetune(Optimising):
    """Training of all weights, steps and biases on labelled images."""

    kind: ClassVar[str] = "finetune"
    record: ClassVar[type[StageRecord]] = FinetuneRecord
    reads_labels: ClassVar[bool] = True

    steps: int = Field(default=2000, ge=0)
    batch: int = Field(default=32, ge=1)
    self_study: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps in which the student learns from labels alone."""
    co_study: float = Field(default=0.4, ge=0, le=1)
    """Share in which the teacher learns along; in what is left it only tutors."""
    temperature: float = Field(default=2.0, gt=0)
    distil: float = Field(default=1.0, ge=0)
    """Weight of the distance between student and teacher beside that from the labels."""
    codes: Learn = Learn(rate=1e-3)
    weight_step: Learn | None = Learn(rate=1e-3)
    bias: Learn | None = Learn(rate=1e-3)
    activation_step: Learn | None = Learn(rate=1e-3, relative=True)
    teacher: Learn = Learn(rate=1e-5)
    views: int = Field(default=1, ge=1, le=VIEWS_ALLOWED)
    """Views of each image: 1 takes the images as they are, more add random crops and mirror images."""

    def phases(self, steps: int) -> dict[Phase, int]:
        """How many steps each phase takes.

        Example:
            >>> Finetune().phases(10)
            {'self-study': 2, 'co-study': 4, 'tutoring': 4}
        """
        first = min(round(self.self_study * steps), steps)
        second = min(round(self.co_study * steps), steps - first)
        return dict(zip(PHASES, (first, second, steps - first - second), strict=True))

    def check(self, student: Student, teacher: Captured, images: Images) -> None:
        """Labels must be there, and the network must give class scores for them.

        Raises:
            UsageError: the images have no labels.
            DataError: no single output holds class scores, or a label is beyond its classes.
        """
        if images.labels is None:
            raise UsageError(
                "Expected labelled images for a recipe that trains with labels, found none. Give class folders, an "
                ".npz file with labels, or images.labelled(...); or take a recipe that needs no labels, such as eptq."
            )
        with torch.no_grad():
            outputs = teacher.graph(images.batch([0, 0]).to(next(_tensors(teacher)).device))
        check_classes(images.labels, class_scores(list(outputs), images.labels[[0, 0]]).shape[1])

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """Trains, rounds, and keeps the last step's result, as the paper does."""
        assert images.labels is not None
        warnings.warn(
            f"This recipe trains with labels: it reads those of {len(images):,} images. Its accuracy does not compare "
            "with that of recipes without labels.",
            stacklevel=2,
        )
        lesson = Lesson(self, student, teacher, images, run)
        saved = KeptState.read(run) or KeptState(run, Pace(self._count(lesson, run), "float32", False, {}))
        lesson.steps = saved.plan.steps
        before = _answers(student, images, run)
        started, first = time.perf_counter(), 0
        if lesson.steps:
            saved.load(lesson)
            first = lesson.step
            self._train(lesson, saved, run)
            lesson.learner.absorb(student)
            widen_for_biases(student)
        after = _answers(student, images, run)
        run.records.append(
            FinetuneRecord(
                before=before[0],
                after=after[0],
                steps=self.phases(lesson.steps),
                images=len(images),
                batch=lesson.batch,
                top1=(before[1], after[1]),
                seconds_per_step=round((time.perf_counter() - started) / max(lesson.steps - first, 1), 4),
            )
        )
        return student

    def _train(self, lesson: Lesson, saved: KeptState, run: Run) -> None:
        recent = 0.0
        while lesson.step < lesson.steps:
            loss = lesson.advance()
            saved.losses.append(loss)
            recent = loss if not recent else 0.95 * recent + 0.05 * loss
            run.progress("Training", lesson.step, lesson.steps, f"{lesson.phase}, loss {recent:.4g}")
            saved.write_if_due(lesson)

    def _count(self, lesson: Lesson, run: Run) -> int:
        """Steps that were asked for, or that fit into the minutes."""
        if run.minutes is None:
            return self.steps if run.steps is None else run.steps
        run.progress("Measuring the speed of a step", 0, 0)
        started = time.perf_counter()
        for _ in range(TRIED):
            lesson.backward(lesson.indices(0), "co-study")
        seconds = (time.perf_counter() - started) / TRIED
        left = run.minutes * 60 - (time.perf_counter() - run.started)
        return together.from_first(lambda: max(1, int(left / seconds)))


class Lesson:
    """The student's variables, the teacher's, and one step of both."""

    def __init__(self, settings: Finetune, student: Student, teacher: Captured, images: Images, run: Run) -> None:
        assert images.labels is not None
        self.settings, self.run, self.steps, self.step = settings, run, settings.steps, 0
        self.views, self.labels = Views(images, settings.views, run.seed), images.labels
        self.batch = min(settings.batch, len(images))
        free = not student.scheme.target.power_of_two_scales
        points = linear_points(teacher.graph, teacher.example.to(run.device))
        self.learner = Learner(
            student,
            points,
            Variables(
                rounding="straight-through",
                weight_steps=settings.weight_step is not None and free,
                biases=settings.bias is not None,
                activation_steps=settings.activation_step is not None and free,
            ),
        )
        self.graph = teacher.graph
        self.taught: dict[str, Tensor] = {
            name: nn.Parameter(rewrite.get_tensor(teacher.graph, name).detach().clone()) for name in _learned(teacher)
        }
        self.parts = optimizers_of(self.learner, settings)
        self.teaching = OptimizedPart.of(
            [(p, 1.0) for p in self.taught.values() if isinstance(p, nn.Parameter)], settings.teacher
        )

    @property
    def phase(self) -> Phase:
        """Where the lesson is."""
        done = self.step
        for name, count in self.settings.phases(self.steps).items():
            if done < count:
                return name
            done -= count
        return "tutoring"

    def indices(self, step: int) -> Tensor:
        """Views that a step takes, [B]: each image once an epoch, in an order that depends on seed and epoch alone."""
        count = len(self.labels)
        epoch, position = divmod(step, max(1, count // self.batch))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.run.seed * 7919 + epoch))
        return order[position * self.batch : (position + 1) * self.batch] + count * (epoch % self.settings.views)

    def advance(self) -> float:
        """One step; the student's loss.

        Raises:
            NotFiniteError: it is NaN or infinite.
        """
        phase, progress = self.phase, self.step / self.steps
        used = [*self.parts, *([self.teaching] if self.teaching and phase == "co-study" else [])]
        for part in used:
            part.set_rate(progress)
            part.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(self.indices(self.step), phase)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"The loss of training is not finite at step {self.step}. Try a lower rate or more bits."
            )
        move_parts(used, [part.rate for part in used])
        self.step += 1
        return loss

    def backward(self, indices: Tensor, phase: Phase) -> float:
        """Gradients of both losses on a batch; the student's loss.

        Where processes share the work it is in parts of a fixed size, whose gradients are added along one tree.
        """
        if not together.is_shared():
            return self._part(indices, phase, 1.0)
        used = [*self.parts, *([self.teaching] if self.teaching and phase == "co-study" else [])]
        parts = torch.split(indices, SHARED_PART)

        def loss(position: int) -> Tensor:
            part = parts[position]
            return torch.tensor([self._part(part, phase, len(part) / len(indices))], device=self.run.device)

        return float(together.tree_gradients([p for u in used for p in u.parameters], len(parts), loss, 1))

    def _part(self, indices: Tensor, phase: Phase, share: float) -> float:
        """Both losses of some images, times their share of the batch."""
        images = self.views.batch(indices, self.run.device)
        labels = self.labels[indices % len(self.labels)].to(self.run.device)
        student = class_scores(self.learner(images)[0], labels)
        loss = functional.cross_entropy(student, labels)
        if phase == "self-study":
            torch.autograd.backward(loss * share)
            return float(loss.detach() * share)
        with torch.set_grad_enabled(phase == "co-study"):
            teacher = class_scores(list(functional_call(self.graph, self.taught, (images,))), labels)
        loss = loss + self.settings.distil * self._distance(student, teacher.detach())
        torch.autograd.backward(loss * share)
        if phase == "co-study":
            own = functional.cross_entropy(teacher, labels)
            torch.autograd.backward((own + self.settings.distil * self._distance(teacher, student.detach())) * share)
        return float(loss.detach() * share)

    def _distance(self, learns: Tensor, given: Tensor) -> Tensor:
        """``T^2 KL(given || learns)`` at the temperature, a scalar."""
        t = self.settings.temperature
        ours, theirs = (functional.log_softmax(x / t, dim=1) for x in (learns, given))
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * t * t

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        found = {f"variables/{n}": p.detach() for n, p in self.learner.named_parameters()}
        found |= {f"teacher/{n}": p.detach() for n, p in self.taught.items()}
        for i, part in enumerate(self._all_parts()):
            found |= {f"optimizer/{i}/{n}": t for n, t in part.state().items()}
        return found

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Goes on from a state."""
        with torch.no_grad():
            for kind, variables in (("variables", dict(self.learner.named_parameters())), ("teacher", self.taught)):
                for name, variable in variables.items():
                    variable.copy_(state[f"{kind}/{name}"])
        for i, part in enumerate(self._all_parts()):
            prefix = f"optimizer/{i}/"
            part.load({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        self.step = step

    def _all_parts(self) -> list[OptimizedPart]:
        return [*self.parts, *([self.teaching] if self.teaching else [])]


def _learned(teacher: Captured) -> list[str]:
    """Paths of the float network's weights and biases."""
    found: dict[str, None] = {}
    for node in teacher.graph.graph.nodes:
        if ops.kind(node) in {"linear", "norm"}:
            found |= {str(a.target): None for a in node.args[1:] if getattr(a, "op", "") == "get_attr"}
    return list(found)


def _tensors(teacher: Captured) -> Iterator[Tensor]:
    return iter([*teacher.graph.buffers(), *teacher.graph.parameters(), teacher.example])


def _answers(student: Student, images: Images, run: Run) -> tuple[float, float]:
    """Mean cross-entropy and top-1 of the rounded student on the images as they are."""
    known, parts = images.labels, torch.split(torch.arange(len(images)), run.batch)
    assert known is not None

    def answers(position: int) -> tuple[float, int]:
        run.progress("Training images", position, len(parts))
        part = parts[position]
        labels = known[part].to(run.device)
        scores = class_scores(student.flat(images.batch(part, run.device)), labels)
        total = functional.cross_entropy(scores, labels, reduction="sum")
        return float(total), int((scores.argmax(1) == labels).sum())

    with torch.no_grad():
        losses, hits = zip(*together.dealt(len(parts), answers), strict=True)
    return sum(losses) / len(images), sum(hits) / len(images)
