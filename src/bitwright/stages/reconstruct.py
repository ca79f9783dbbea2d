"""Optimises roundings, steps and biases so that the quantized network's tensors follow the float network's.

EPTQ (arXiv:2309.11531) does this for the whole network at once. The story of a run is :meth:`Reconstruct.run`; what
changes while it runs is in `schedules`, one step of it in `tuning`, its variables in `learner`.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from bitwright.curvature.label_free import Distribution, HessianScores, cached_scores, images_at_once, label_free_scores
from bitwright.given.images import Images
from bitwright.graph import rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.points import Point, expose, linear_points
from bitwright.graph.student import Snapshot, Student
from bitwright.measure.evaluation import layer_sqnr
from bitwright.memory import pass_budget
from bitwright.quant.learned import Rounding
from bitwright.run import checkpoint
from bitwright.run.record import StageRecord
from bitwright.stages.augment import Views
from bitwright.stages.base import Optimising, Run
from bitwright.stages.calibrate import parameters, widen_for_biases
from bitwright.stages.learner import Learner, Variables
from bitwright.stages.losses import weighted_distance
from bitwright.stages.schedules import Anneal, Dampen, Gradual, Learn
from bitwright.stages.tuning import NotFiniteError, Objective, Targets, Tuner, seconds_per_step

CHECKPOINT = "reconstruct.safetensors"
CHECKPOINT_SECONDS = 20.0
CHECKPOINT_SHARE = 0.01
"""Share of the time that checkpoints may take."""
GOOD_EVERY = 25
"""Steps between the states that a run whose loss stops being finite falls back to."""
CURVE_POINTS = 200
"""Of the loss over the steps, as the result keeps it."""
MEASURED_IMAGES = 256
SCORED_AT_ONCE = 16
"""Images in one backward pass for scores, which holds the gradients at all points."""
TEACHER_MEMORY = 1 << 30
"""Bytes that the float network's values may take; they are computed anew for every batch where it is not enough."""
WORTH_IT = 1.3
"""How much faster another precision, or a compiled network, must be to be taken."""
SHORT = 30.0
"""Seconds of all steps in float32 below which nothing else is tried: two runs of one seed then take the same way."""
OVERHEAD = 1.15
"""A whole step over its forward and backward pass."""


class ScoresRecord(BaseModel):
    """Label-free scores: of each layer (the trace of its Hessian), with the largest relative standard error."""

    layers: dict[str, float]
    relative_error: float
    probes: int
    images: int


class LossRecord(BaseModel):
    """The loss on calibration images: before rounding, of what is kept, and of what each stage left."""

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


class ReconstructRecord(StageRecord):
    """What an optimisation did, filled in as it goes."""

    kind: str = "reconstruct"
    steps: int
    precision: str
    compiled: bool
    step_seconds: dict[str, float]
    seed: int
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

    def keys(self) -> dict[str, Any]:
        """Scores have a key of their own."""
        own = self.told()
        scores = {"scores": own.pop("scores")} if "scores" in own else {}
        return {**scores, self.kind: own}


class Reconstruct(Optimising):
    """Optimisation of a unit by gradients.

    The distance between student and teacher at the outputs of all convolutions and linear layers, before any
    activation, is weighted by ``ones``, by ``lfh`` (EPTQ v1: the log of each layer's label-free Hessian trace), by
    ``sla`` (EPTQ v2: a score for each sample and layer) or by ``sla-log`` (the log weights of the layers, spread over
    the samples in proportion to their scores) and summed.
    """

    kind: ClassVar[str] = "reconstruct"
    record: ClassVar[type[StageRecord]] = ReconstructRecord

    unit: Literal["network"] = "network"
    """What is optimised at once."""
    steps: int = Field(default=500, ge=0)
    batch: int = Field(default=32, ge=1)

    weigh: Literal["ones", "lfh", "sla", "sla-log"] = "sla"
    over: Literal["sum", "mean"] = "sum"
    """What is done over channels; the mean is taken over samples and positions."""
    score_images: int | None = Field(default=None, ge=1)
    """Images whose scores ``lfh`` averages; all if not given. ``sla`` needs all."""
    score_probes: int = Field(default=16, ge=1)
    """The most backward passes per batch for its scores."""
    score_error: float = Field(default=0.05, gt=0)
    """Relative standard error of the layers' scores that is good enough."""
    score_distribution: Distribution = "rademacher"

    rounding: Rounding = "straight-through"
    codes: Learn | None = Learn(rate=3e-3)
    weight_step: Learn | None = Learn(rate=1e-3)
    bias: Learn | None = Learn(rate=1e-3)
    activation_step: Learn | None = Learn(rate=1e-3, relative=True)
    decide: Anneal | Dampen | None = None
    """How soft roundings become up or down, and straight-through ones stay where they are."""
    gradual: Gradual | None = None
    """Activations are on their grids from the first step if not given."""
    activations: bool = True
    """Whether activations are quantized at all while the weights are optimised."""

    views: int = Field(default=1, ge=1)
    """Number of views of each image: 1 takes the images as they are, more add random crops and mirror images."""
    never_worse: bool = True
    """Keep what an earlier stage left where that has the lower calibration loss."""

    @model_validator(mode="after")
    def _soft_needs_a_decision(self) -> Reconstruct:
        if self.rounding == "soft" and self.codes is not None and not isinstance(self.decide, Anneal):
            raise ValueError("soft rounding needs 'decide' to be Anneal, or it ends between two integers")
        return self

    @property
    def drops(self) -> bool:
        """Whether a step draws random numbers."""
        return self.gradual is not None and self.gradual.how == "drop"

    def mix(self, progress: float) -> tuple[float, float]:
        """(mix, drop) of activations; see :class:`Gradual`."""
        if not self.activations:
            return 1.0, 0.0
        return (0.0, 0.0) if self.gradual is None else self.gradual.at(progress)

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """Optimises, rounds, measures, and keeps the best that the run has seen."""
        points = linear_points(teacher.graph, teacher.example.to(run.device))
        learner = Learner(student, points, self._variables(student))
        if not points or not any(p.requires_grad for p in learner.parameters()):
            _warn("There is nothing to optimise: no convolution or linear layer has weights or inputs to quantize.")
            return student
        samples = Views(images, self.views, run.seed)
        objective, scores = self._objective(teacher, samples, points, run)
        targets = Targets(expose(teacher.graph, [p.node for p in points]), points, torch.float32)
        first = samples.batch(range(min(8, len(images)))).to(run.device)
        learner.measure_outputs(targets(torch.arange(len(first)), first))
        plan = self._plan(learner, targets, objective, samples, run)
        tuner = self._tuner(learner, targets, objective, samples, run, plan)
        record = ReconstructRecord(**vars(plan), seed=run.seed, scores=scores)
        before = _sqnr(student, images, run)
        if plan.steps:
            self._optimise(tuner, plan, run, record)
            learner.absorb(student)
            widen_for_biases(student)
        measure = _Measure(teacher, points, objective, images, run)
        self._choose(student, learner if plan.steps else None, measure, run, record)
        after = _sqnr(student, images, run)
        record.sqnr_db = {name: NoiseRecord(before=before.get(name), after=value) for name, value in after.items()}
        record.left_nearest = _left_nearest(student, teacher, run)
        run.records.append(record)
        return student

    def _variables(self, student: Student) -> Variables:
        free = not student.scheme.target.power_of_two_scales
        return Variables(
            rounding=self.rounding,
            codes=self.codes is not None,
            weight_steps=self.weight_step is not None and free,
            biases=self.bias is not None,
            activation_steps=self.activation_step is not None and self.activations and free,
        )

    # ----------------------------------------------------------------------------------------- weights

    def _objective(
        self, teacher: Captured, samples: Views, points: list[Point], run: Run
    ) -> tuple[Objective, ScoresRecord | None]:
        """Weights of all samples and points, and the scores they come from."""
        count = len(samples)
        alike = Objective(torch.full((count, len(points)), 1 / len(points)), self.over, normalise=False)
        if self.weigh == "ones":
            return alike, None
        scores = self.scores(teacher, samples, points, run)
        told = ScoresRecord(
            layers=dict(zip(scores.layers, scores.layer_trace.tolist(), strict=True)),
            relative_error=float(scores.error.max()),
            probes=scores.probes,
            images=len(scores.trace),
        )
        if not bool((scores.attention > 0).any()):
            _warn(
                "No label-free score is above zero: the output does not seem to depend on any layer. All count equally."
            )
            return alike, told
        if self.weigh == "sla":
            return Objective(scores.attention, self.over, normalise=True), told
        weights = scores.log_weights().expand(count, -1) if self.weigh == "lfh" else scores.log_attention()
        return Objective(weights, self.over, normalise=False), told

    def scores(self, teacher: Captured, samples: Views, points: list[Point], run: Run) -> HessianScores:
        """Label-free scores of the samples, kept beside the run."""
        count = len(samples)
        if self.weigh == "lfh" and self.score_images is not None:
            count = min(self.score_images, count)
        size = min(SCORED_AT_ONCE, count)
        if size > 1:
            pair = samples.batch([0, 1]).to(run.device)
            size = min(size, images_at_once(teacher.graph, pair, points, pass_budget(run.device)))

        def compute() -> HessianScores:
            def batches() -> Any:
                for start in range(0, count, size):
                    run.progress("Scoring layers", start, count)
                    yield samples.batch(range(start, min(start + size, count))).to(run.device)
                run.progress("Scoring layers", count, count)

            return label_free_scores(
                teacher.graph,
                batches(),
                points,
                probes=self.score_probes,
                least=min(4, self.score_probes),
                tolerance=self.score_error,
                distribution=self.score_distribution,
                seed=run.seed,
                total=count,
            )

        chosen = (count, size, self.views, self.score_probes, self.score_error, self.score_distribution)
        with run.timed("scores"):
            return cached_scores(run.state, f"{run.identity} {chosen}", compute)

    # -------------------------------------------------------------------------------------------- plan

    def _plan(self, learner: Learner, targets: Targets, objective: Objective, samples: Views, run: Run) -> _Plan:
        """Number of steps and precision: what the unfinished run had, else what was asked for, else measured."""
        kept = _Checkpoint.read(run)
        if kept is not None:
            return kept.plan
        steps = self.steps if run.steps is None else run.steps
        ways = self._ways(run)
        if (len(ways) == 1 and run.minutes is None) or steps == 0:
            return _Plan(steps, *ways[0], {})
        run.progress("Measuring the speed of a step", 0, 0)
        seconds: dict[str, float] = {}
        for way in ways:
            tuner = self._tuner(learner, targets, objective, samples, run, _Plan(1, *way, {}))
            seconds[_name(way)] = round(_seconds(tuner, compiled=way[1]), 4)
            if run.minutes is None and seconds[_name(ways[0])] * steps < SHORT:
                return _Plan(steps, *ways[0], seconds)
        fastest = min(ways, key=lambda w: seconds[_name(w)] * (1 if w == ways[0] else WORTH_IT))
        if run.minutes is not None:
            left = run.minutes * 60 - (time.perf_counter() - run.started)
            steps = max(1, int(left / (seconds[_name(fastest)] * OVERHEAD)))
        return _Plan(steps, *fastest, seconds)

    def _ways(self, run: Run) -> list[tuple[str, bool]]:
        """(precision, compiled) to choose from. Compiling takes minutes on a CPU, and anew for every blend."""
        precisions = ["float32", "bfloat16"] if run.precision == "auto" else [run.precision]
        compiles = [False, True] if run.device.type == "cuda" and self.gradual is None else [False]
        return [(p, c) for p in precisions for c in compiles]

    def _tuner(
        self, learner: Learner, targets: Targets, objective: Objective, samples: Views, run: Run, plan: _Plan
    ) -> Tuner:
        targets.precision = getattr(torch, plan.precision)
        tuner = Tuner(learner, targets, objective, samples, self, max(plan.steps, 1), run.device, run.seed)
        tuner.fit_memory(pass_budget(run.device))
        if plan.compiled:
            tuner.compile()
        return tuner

    # ------------------------------------------------------------------------------------- optimisation

    def _optimise(self, tuner: Tuner, plan: _Plan, run: Run, record: ReconstructRecord) -> None:
        """Takes the steps."""
        kept_on_disk = _Checkpoint(run, plan)
        kept_on_disk.load(tuner)
        kept = self._keep_targets(tuner) if tuner.step < plan.steps else False
        record.batch, record.at_once, record.teacher = tuner.batch, tuner.at_once, "kept" if kept else "live"
        good, recent, decided = tuner.state_copy(), 0.0, ""
        started, first = time.perf_counter(), tuner.step
        try:
            while tuner.step < plan.steps:
                if tuner.step % GOOD_EVERY == 0:
                    tuner.check_finite()
                    good = tuner.state_copy()
                    if self.rounding != "straight-through":
                        decided = f", {tuner.learner.share_decided():.0%} decided"
                loss = tuner.advance()
                kept_on_disk.losses.append(loss)
                recent = loss if not recent else 0.95 * recent + 0.05 * loss
                run.progress("Optimising", tuner.step, plan.steps, f"loss {recent:.4g}{decided}")
                kept_on_disk.write_if_due(tuner)
            tuner.check_finite()
        except NotFiniteError as error:
            tuner.load({n: t.clone() for n, t in good.items()}, tuner.step)
            record.stopped = Stopped(layer=error.layer, step=error.step)
            _warn(f"{error} The optimisation ends there, with its last good state.")
        record.curve = averaged(kept_on_disk.losses)
        if tuner.step > first:
            record.seconds_per_step = round((time.perf_counter() - started) / (tuner.step - first), 4)
        tuner.finish()

    def _keep_targets(self, tuner: Tuner) -> bool:
        """Keeps the float network's values where they fit the memory given: taking rows is faster than computing."""
        sample = tuner.samples.batch([0]).to(tuner.device)
        size = tuner.targets.bytes_of(sample) * len(tuner.samples)
        epochs = tuner.steps * tuner.batch / len(tuner.samples)
        if not 0 < size <= TEACHER_MEMORY or epochs < 2:
            return False
        tuner.targets.keep(tuner.samples, tuner.batch, tuner.device)
        return True

    def _choose(
        self,
        student: Student,
        learner: Learner | None,
        measure: _Measure,
        run: Run,
        record: ReconstructRecord,
    ) -> None:
        """Measures the rounded network against what earlier stages left, and keeps the best."""
        states = _named(run.history)
        given = next(reversed(states), None)
        own = _free(self.kind, states)
        states[own] = student.snapshot()
        losses, soft = measure.losses(student, states, learner)
        best = min(losses, key=lambda k: (losses[k], k != own)) if self.never_worse else own
        student.restore(states[best])
        record.loss, record.kept = LossRecord(soft=soft, hard=losses[best], by_stage=losses), best
        record.before, record.after = None if given is None else losses[given], losses[best]
        if best != own:
            _warn(
                f"The optimisation did not lower the calibration loss ({losses[own]:.4g}, {best}: "
                f"{losses[best]:.4g}): what '{best}' left is kept. More steps would help."
            )


def _named(history: list[tuple[str, Snapshot]]) -> dict[str, Snapshot]:
    """What stages left, by their kind."""
    found: dict[str, Snapshot] = {}
    for kind, snapshot in history:
        found[_free(kind, found)] = snapshot
    return found


def _free(kind: str, taken: Container[str]) -> str:
    """The kind of a stage, numbered from its second stage on.

    Example:
        >>> _free("optq", {}), _free("reconstruct", {"reconstruct"})
        ('optq', 'reconstruct 2')
    """
    names = (kind if i == 1 else f"{kind} {i}" for i in itertools.count(1))
    return next(n for n in names if n not in taken)


@dataclass(frozen=True)
class _Plan:
    steps: int
    precision: str
    compiled: bool
    step_seconds: dict[str, float]
    """Measured, for one step each way."""


def _name(way: tuple[str, bool]) -> str:
    return f"{way[0]}, compiled" if way[1] else way[0]


def _seconds(tuner: Tuner, *, compiled: bool) -> float:
    """Of a step; infinite where the compiler gives up."""
    try:
        return seconds_per_step(tuner)
    except RuntimeError:
        if not compiled:
            raise
        return float("inf")


class _Measure:
    """The loss of networks on a fixed part of the calibration images, without regularizer."""

    def __init__(self, teacher: Captured, points: list[Point], objective: Objective, images: Images, run: Run) -> None:
        self.points, self.objective, self.run = points, objective, run
        self.teacher = expose(teacher.graph, [p.node for p in points])
        self.count = min(MEASURED_IMAGES, len(images))
        self.images = images

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
        size = min(self.run.batch, self.count)
        with torch.no_grad():
            for start in range(0, self.count, size):
                indices = torch.arange(start, min(start + size, self.count))
                images = self.images.batch(indices).to(self.run.device)
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


def _sqnr(student: Student, images: Images, run: Run) -> dict[str, float | None]:
    """Of every layer in dB, on a few images."""
    return layer_sqnr(student, images.batch(range(min(16, len(images)))).to(run.device))


class _Checkpoint:
    """The state of an optimisation on disk, written so seldom that it costs no time worth speaking of."""

    def __init__(self, run: Run, plan: _Plan) -> None:
        self.path = None if run.state is None else run.state / CHECKPOINT
        self.run, self.plan = run, plan
        self.last, self.cost = time.perf_counter(), 0.0
        self.losses: list[float] = []
        """Of every step so far."""
        self.kept: checkpoint.Checkpoint | None = None
        """What was read, if it was."""

    @staticmethod
    def read(run: Run) -> _Checkpoint | None:
        """The checkpoint of an unfinished run, None if there is none."""
        kept = None if run.state is None else checkpoint.read_last(run.state / CHECKPOINT)
        if kept is None or kept.header["identity"] != _identity(run):
            return None
        found = _Checkpoint(run, _Plan(**json.loads(kept.header["plan"])))
        found.kept = kept
        return found

    def load(self, tuner: Tuner) -> None:
        """Puts the tuner where the unfinished run was; keeps the plan, if this is the first run."""
        if self.path is None:
            return
        found = _Checkpoint.read(self.run)
        if found is None or found.kept is None:
            self.write(tuner, self.path)
            return
        header, tensors = found.kept
        self.losses = json.loads(header["losses"])
        tuner.load(tensors, int(header["step"]))

    def write_if_due(self, tuner: Tuner) -> None:
        """Once the time since the last one makes its cost small."""
        passed = time.perf_counter() - self.last
        if self.path is None or passed < max(CHECKPOINT_SECONDS, self.cost / CHECKPOINT_SHARE):
            return
        start = time.perf_counter()
        self.write(tuner, self.path)
        self.last = time.perf_counter()
        self.cost = self.last - start

    def write(self, tuner: Tuner, path: Path) -> None:
        """Beside the one before, which is used if this one is damaged."""
        header = {
            "identity": _identity(self.run),
            "step": str(tuner.step),
            "plan": json.dumps(vars(self.plan)),
            "losses": json.dumps(self.losses),
        }
        checkpoint.write(path, tuner.state(), header, previous=True)


def _identity(run: Run) -> str:
    return f"{run.identity} {len(run.history)}"


def averaged(losses: list[float], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """The loss over the steps: (last step, mean) of stretches of equal length, as few as fit into ``points``.

    Example:
        >>> averaged([4.0, 2.0, 3.0, 1.0, 1.0], points=3)
        [(2, 3.0), (4, 2.0), (5, 1.0)]
    """
    length = max(1, -(-len(losses) // points))
    stretches = (losses[i : i + length] for i in range(0, len(losses), length))
    return [(min((k + 1) * length, len(losses)), sum(s) / len(s)) for k, s in enumerate(stretches)]


def _left_nearest(student: Student, teacher: Captured, run: Run) -> float:
    """Share of weights whose integer is not the nearest on the grid of the first stage."""
    start = run.history[0][1] if run.history else student.snapshot()
    moved, total = 0, 0
    for stored, quantizer in parameters(student.graph, "weight"):
        key = next(k for k, m in student.graph.named_children() if m is quantizer)
        codes = quantizer.codes(rewrite.get_tensor(student.graph, stored))
        scale = quantizer.spread(start.tensors[f"{key}.scale"])
        nearest = quantizer.grid.codes(rewrite.get_tensor(teacher.graph, stored), scale)
        moved += int((codes != nearest).sum())
        total += codes.numel()
    return moved / max(total, 1)


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=3)
