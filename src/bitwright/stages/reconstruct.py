"""Optimises roundings, steps and biases so that the quantized network's tensors follow the float network's.

EPTQ (arXiv:2309.11531) does this for the whole network at once. The story of a run is :meth:`Reconstruct.run`; what
changes while it runs is in `schedules`, one step of it in `tuning`, its variables in `learner`.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import fx

from bitwright import together
from bitwright.curvature.label_free import Distribution, HessianScores, cached_scores, images_at_once, label_free_scores
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph import rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.points import Point, expose, linear_points
from bitwright.graph.segments import truncate
from bitwright.graph.student import Snapshot, Student
from bitwright.graph.units import UnitKind, part, without_activations
from bitwright.measure.evaluation import layer_sqnr
from bitwright.memory import pass_budget
from bitwright.quant.learned import Rounding
from bitwright.run.record import StageRecord
from bitwright.stages.augment import ViewCount, Views, view_count
from bitwright.stages.base import Optimising, Run, Samples
from bitwright.stages.calibrate import parameters, widen_for_biases
from bitwright.stages.choice import MEASURED_IMAGES, UnseenLoss, left_by_stages, more_steps, numbered, surely_lower
from bitwright.stages.feeds import SCALED_ON, Fisher, UnitFeed, UnitPlace, find_places
from bitwright.stages.learner import Learner, Variables
from bitwright.stages.outcome import (
    LossRecord,
    NoiseRecord,
    ReconstructRecord,
    ScoresRecord,
    Stopped,
    UnitRecord,
    averaged,
)
from bitwright.stages.pace import Pace, choose_pace
from bitwright.stages.resume import KeptState
from bitwright.stages.schedules import Anneal, Dampen, Gradual, Learn
from bitwright.stages.targets import Feed, ImageFeed, Targets, held_on
from bitwright.stages.tuning import NotFiniteLossError, Objective, Tuner, seconds_per_step

GOOD_EVERY = 25
"""Steps between the states that a run whose loss stops being finite falls back to."""
SCORED_AT_ONCE = 16
"""Images in one backward pass for scores, which holds the gradients at all points."""
TEACHER_MEMORY, UNIT_MEMORY = 1 << 28, 1 << 30
"""Bytes that the float network's values may take on a CPU, or what a unit reads and gives; they are computed anew for
every batch where it is not enough, which costs a unit all that lies ahead of it."""
NOTHING = "There is nothing to optimise: no convolution or linear layer has weights or inputs to quantize."


UnitSize = Literal["network", "block", "layer"]
Weigh = Literal["ones", "fisher", "low-rank", "lfh", "sla", "sla-log"]
WEIGHTS: dict[UnitSize, frozenset[Weigh]] = {
    "network": frozenset({"ones", "lfh", "sla", "sla-log"}),
    "block": frozenset({"ones", "fisher", "low-rank"}),
    "layer": frozenset({"ones", "fisher", "low-rank"}),
}
"""What weighs the distances in units of each size."""


class Reconstruct(Optimising):
    """Optimisation of a unit by gradients.

    The distance between student and teacher at the outputs of all convolutions and linear layers, before any
    activation, is weighted by ``ones``, by ``lfh`` (EPTQ v1: the log of each layer's label-free Hessian trace), by
    ``sla`` (EPTQ v2: a score for each sample and layer) or by ``sla-log`` (the log weights of the layers, spread over
    the samples in proportion to their scores) and summed.

    Units smaller than the network are optimised one after the other, each for so many steps, and compared at their
    exits alone: by ``ones``, by ``fisher`` (BRECQ: the squared gradient of the network's loss, element by element), or
    by ``low-rank`` (FIMA-Q: to that comes, in equal parts, the squared product of each image's error and gradient).
    """

    kind: ClassVar[str] = "reconstruct"
    record: ClassVar[type[StageRecord]] = ReconstructRecord

    unit: UnitSize | tuple[UnitSize, ...] = "network"
    """What is optimised at once. A block is a residual branch or attention with its addition, as
    ``bitwright inspect --blocks`` shows them; what is in none is optimised layer by layer. Several sizes, such as
    ``[layer, block, network]``, follow one another, each with all steps, as stages of their own: a unit that grows.
    What a size does not have is left out there: its weights are then ``ones``, its inputs not mixed."""
    order: Literal["forward", "reverse"] = "forward"
    """Whether the first unit of the network is optimised first, or the last one. Units behind one that is optimised are
    then as the stage found them, or as it left them."""
    float_inputs: float = Field(default=0.0, ge=0, le=1)
    """Of a unit: share of the elements of its inputs, drawn anew in every step, that are the float network's instead of
    what the quantized units before it give (AdaRound, BRECQ: 0; QDrop: 0.5)."""
    steps: int = Field(default=500, ge=0)
    """Of each unit."""
    batch: int = Field(default=32, ge=1)

    weigh: Weigh = "sla"
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

    views: ViewCount = 1
    """Number of views of each image: 1 takes the images as they are, more add random crops and mirror images. ``auto``:
    so many that few pictures become 256, four at most."""
    never_worse: bool = True
    """Keep what an earlier stage left where that has the lower loss: of the whole network on views of the calibration
    images that no stage has seen, by more than one standard error; of a smaller unit on what it is optimised on."""

    @model_validator(mode="before")
    @classmethod
    def _smaller_units_count_alike(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The default's scores weigh the whole network alone."""
        sizes = settings.get("unit", "network")
        smaller = isinstance(sizes, str | list | tuple) and sizes and "network" not in sizes
        return {"weigh": "ones", **settings} if smaller else settings

    @model_validator(mode="after")
    def _soft_needs_a_decision(self) -> Reconstruct:
        if self.rounding == "soft" and self.codes is not None and not isinstance(self.decide, Anneal):
            raise ValueError("soft rounding needs 'decide' to be Anneal, or it ends between two integers")
        return self

    @model_validator(mode="after")
    def _weights_that_a_unit_has(self) -> Reconstruct:
        if not self.sizes:
            raise ValueError("expected at least one size as 'unit', found none")
        fitting = sorted(set().union(*(WEIGHTS[size] for size in self.sizes)))
        if self.weigh not in fitting:
            unit = ", ".join(self.sizes)
            raise ValueError(f"expected 'weigh' of unit '{unit}' among {fitting}, found '{self.weigh}'")
        if self.float_inputs and set(self.sizes) == {"network"}:
            raise ValueError("the network's only input is the image; 'float_inputs' is for smaller units")
        return self

    @property
    def sizes(self) -> tuple[UnitSize, ...]:
        """Of the units, in the order in which they are optimised."""
        return self.unit if isinstance(self.unit, tuple) else (self.unit,)

    def parts(self) -> tuple[Reconstruct, ...]:
        """One stage for each size."""
        if not isinstance(self.unit, tuple):
            return (self,)
        shared = {"share": self.share / len(self.unit)}
        return tuple(self.model_copy(update=shared | self._of(size)) for size in self.unit)

    def _of(self, size: UnitSize) -> dict[str, Any]:
        """The settings that are another size's own."""
        weigh = self.weigh if self.weigh in WEIGHTS[size] else "ones"
        return {"unit": size, "weigh": weigh, "float_inputs": 0.0 if size == "network" else self.float_inputs}

    @property
    def drops(self) -> bool:
        """Whether a step draws random numbers."""
        return (self.gradual is not None and self.gradual.how == "drop") or 0 < self.float_inputs < 1

    def mix(self, progress: float) -> tuple[float, float]:
        """(mix, drop) of activations; see :class:`Gradual`."""
        if not self.activations:
            return 1.0, 0.0
        return (0.0, 0.0) if self.gradual is None else self.gradual.at(progress)

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """Optimises, rounds, measures, and keeps the best that the run has seen.

        Raises:
            UsageError: there are several sizes of units, which a recipe takes apart.
        """
        if isinstance(self.unit, tuple):
            raise UsageError(
                f"Expected a single size as unit=, got {', '.join(self.unit)}. Run the parts() of the stage."
            )
        way = self._run_network if self.unit == "network" else self._run_units
        return way(student, teacher, images, run)

    def _run_network(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """All variables at once, compared at all layers; kept is the best that any stage has left."""
        points = linear_points(teacher.graph, teacher.example.to(run.device))
        learner = Learner(student, points, self._variables(student))
        if not points or not _learns(learner):
            _warn(NOTHING)
            return student
        samples = Views(images, view_count(images, self.views), run.seed)
        objective, scores = self._objective(teacher, samples, points, run)
        targets = Targets(expose(teacher.graph, [p.node for p in points]), points, torch.float32)
        first = samples.batch(range(min(8, len(images))), run.device)
        learner.measure_outputs(targets(torch.arange(len(first)), first))
        feed = ImageFeed(held_on(samples, run.device, pass_budget(run.device) // 8), targets, run.device)

        def tuner_of(plan: Pace) -> Tuner:
            targets.precision = getattr(torch, plan.precision)
            return self._tuner(learner, feed, objective, run, plan)

        def seconds_of(plan: Pace) -> float:
            return _seconds(tuner_of(plan), plan)

        # On a CPU the compiler takes minutes.
        compiles = run.device.type == "cuda"
        saved = KeptState.read(run) or KeptState(run, choose_pace(self.steps, run, seconds_of, compiles=compiles))
        plan = saved.plan
        record = ReconstructRecord(**vars(plan), seed=run.seed, views=samples.draws, scores=scores)
        before = _sqnr(student, images, run)
        tuner = tuner_of(plan)
        if plan.steps:
            self._optimise(tuner, saved, run, record, _Shown("", 0, plan.steps))
            learner.absorb(student)
            widen_for_biases(student)
        measure = UnseenLoss(teacher, points, objective, samples, run, tuner.at_once)
        self._choose(student, learner if plan.steps else None, measure, run, record)
        self._finish(record, student, teacher, images, run, before)
        return student

    def _finish(
        self,
        record: ReconstructRecord,
        student: Student,
        teacher: Captured,
        images: Images,
        run: Run,
        before: dict[str, float | None],
    ) -> None:
        """Says what became of the layers."""
        after = _sqnr(student, images, run)
        record.sqnr_db = {name: NoiseRecord(before=before.get(name), after=value) for name, value in after.items()}
        record.left_nearest = _left_nearest(student, teacher, run)
        run.records.append(record)

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
        alike = Objective(points, torch.full((count, len(points)), 1 / len(points)), self.over, normalise=False)
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
            return Objective(points, scores.attention, self.over, normalise=True), told
        weights = scores.log_weights().expand(count, -1) if self.weigh == "lfh" else scores.log_attention()
        return Objective(points, weights, self.over, normalise=False), told

    def scores(self, teacher: Captured, samples: Views, points: list[Point], run: Run) -> HessianScores:
        """Label-free scores of the samples, kept beside the run."""
        count = len(samples)
        if self.weigh == "lfh" and self.score_images is not None:
            count = min(self.score_images, count)
        size = min(SCORED_AT_ONCE, count)
        if size > 1:
            pair = samples.batch([0, 1], run.device)
            size = min(size, images_at_once(teacher.graph, pair, points, 2 * pass_budget(run.device) // 3))

        def compute() -> HessianScores:
            def batches() -> Any:
                for position, start in enumerate(range(0, count, size)):
                    run.progress("Scoring layers", start, count)
                    mine = together.is_mine(position)
                    yield samples.batch(range(start, min(start + size, count)), run.device) if mine else None
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

        chosen = (count, size, samples.draws, self.score_probes, self.score_error, self.score_distribution)
        with run.timed("scores"):
            return cached_scores(run.state, f"{run.identity} {chosen}", compute)

    def _tuner(self, learner: Learner, feed: Feed, objective: Objective, run: Run, plan: Pace) -> Tuner:
        precision = getattr(torch, plan.precision)
        tuner = Tuner(learner, feed, objective, self, max(plan.steps, 1), precision, run.device, run.seed)
        tuner.fit_memory(pass_budget(run.device))
        if plan.compiled:
            tuner.compile()
        return tuner

    # ------------------------------------------------------------------------------------------- units

    def _run_units(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """One unit after the other; each keeps what has the lower loss at its exits."""
        samples = Views(images, view_count(images, self.views), run.seed)
        graph = self._graph(student)
        kind: UnitKind = "block" if self.unit == "block" else "layer"
        reverse = self.order == "reverse"
        places = find_places(graph, teacher.graph, teacher.example.to(run.device), kind, reverse=reverse)
        saved = KeptState.read(run) or KeptState(run, self._plan_units(student, teacher, places, samples, run))
        plan, start = saved.plan, dict(student.graph.named_buffers())
        record = ReconstructRecord(**vars(plan), seed=run.seed, views=samples.draws, units=[])
        before = _sqnr(student, images, run)
        student.restore(Snapshot(saved.done, {}))
        for position, place in enumerate(places[len(saved.units) :], len(saved.units)):
            work = self._work(student, teacher, place, samples, run)
            found = None
            if plan.steps and _learns(work.learner):
                shown = _Shown(place.unit.name, position * plan.steps, len(places) * plan.steps)
                found = self._tune_unit(student, work, saved, run, record, shown)
            saved.units.append(None if found is None else found.model_dump())
            now = student.graph.named_buffers()
            saved.done = {name: tensor for name, tensor in now if tensor is not start[name]}
        record.units = [UnitRecord(**u) for u in saved.units if u is not None]
        if not record.units:
            _warn(NOTHING)
        losses = [sum(u.before for u in record.units), sum(u.after for u in record.units)]
        states = left_by_stages(run.history)
        given, own = next(reversed(states), None), numbered(self.kind, states)
        record.before, record.after, record.kept = losses[0], losses[1], own
        by_stage = ({} if given is None else {given: losses[0]}) | {own: losses[1]}
        record.loss = LossRecord(soft=None, hard=losses[1], by_stage=by_stage)
        self._finish(record, student, teacher, images, run, before)
        return student

    def _room(self, device: torch.device) -> int:
        """Bytes that the float network's values may take."""
        if device.type != "cpu":
            return pass_budget(device) // 2
        return TEACHER_MEMORY if self.unit == "network" else UNIT_MEMORY

    def _graph(self, student: Student) -> fx.GraphModule:
        """The student as it is optimised: with activations in float if they are not quantized meanwhile."""
        return student.graph if self.activations else without_activations(student.graph)

    def _work(self, student: Student, teacher: Captured, place: UnitPlace, samples: Samples, run: Run) -> _Work:
        """A unit's variables, inputs and targets, from the student as it is now."""
        graph = self._graph(student)
        learner = Learner(
            student, place.exits, self._variables(student), part(graph, place.cut), place.layers, place.fixed
        )
        first = samples.batch(range(min(SCALED_ON, len(samples))), run.device)
        learner.measure_outputs(truncate(teacher.graph, place.unit.nodes)(first[:8]))
        weights = None
        if self.weigh in {"fisher", "low-rank"} and _learns(learner):
            weights = Fisher(place, graph, teacher.graph, first, signed=self.weigh == "low-rank")
        if weights is not None and not weights.scale:
            _warn(f"The network's loss does not depend on {place.unit.name}: all its elements count equally.")
            weights = None
        feed = UnitFeed(samples, place, graph, teacher.graph, self.float_inputs, run.device, weights)
        count = len(place.exits)
        alike = torch.full((len(samples), count), 1 / count)
        objective = Objective(place.exits, alike, self.over, normalise=False)
        if weights is not None and weights.signed:
            batch = feed(torch.arange(len(first)), mixed=False)
            with torch.no_grad():
                objective = objective.with_rank_one(part(graph, place.cut)(*batch.inputs)[1], batch, len(first))
        return _Work(learner, feed, objective)

    def _tune_unit(
        self,
        student: Student,
        work: _Work,
        saved: KeptState,
        run: Run,
        record: ReconstructRecord,
        shown: _Shown,
    ) -> UnitRecord:
        """Optimises a unit and puts the result into the student, unless what was there had the lower loss."""
        started, place = time.perf_counter(), work.feed.place
        tuner = self._tuner(work.learner, work.feed, work.objective, run, saved.plan)
        work.feed.keep(self._room(run.device), saved.plan.steps * tuner.batch, tuner.batch)
        given = student.snapshot()
        before = work.loss(part(self._graph(student), place.cut), run)
        self._optimise(tuner, saved, run, record, shown)
        work.learner.absorb(student)
        widen_for_biases(student)
        after = work.loss(part(self._graph(student), place.cut), run)
        kept = after < before or not self.never_worse
        if not kept:
            student.restore(given)
        return UnitRecord(
            name=place.unit.name,
            layers=list(place.unit.layers),
            before=before,
            after=after if kept else before,
            kept=kept,
            inputs="live" if work.feed.kept is None else "kept",
            seconds=round(time.perf_counter() - started, 3),
        )

    def _plan_units(
        self, student: Student, teacher: Captured, places: list[UnitPlace], samples: Views, run: Run
    ) -> Pace:
        """The same plan for all units, so that minutes go to each by what its steps cost."""
        few = Views(samples.images.sample(min(self.batch, len(samples.images)), seed=run.seed))
        filling: dict[int, float] = {}

        def seconds_of(plan: Pace) -> float:
            total = 0.0
            for position, place in enumerate(places):
                work = self._work(student, teacher, place, few, run)
                if _learns(work.learner):
                    started = time.perf_counter()
                    work.feed.keep(self._room(run.device), len(few), self.batch)
                    filling[position] = time.perf_counter() - started
                    total += _seconds(self._tuner(work.learner, work.feed, work.objective, run, plan), plan)
            return total

        return choose_pace(self.steps, run, seconds_of, beside=lambda: sum(filling.values()) * len(samples) / len(few))

    # ------------------------------------------------------------------------------------- optimisation

    def _optimise(self, tuner: Tuner, saved: KeptState, run: Run, record: ReconstructRecord, shown: _Shown) -> None:
        """Takes the steps, and says how they went."""
        steps, room = saved.plan.steps, self._room(run.device)
        saved.load(tuner)
        kept = tuner.step < steps and tuner.feed.keep(room, steps * tuner.batch, tuner.at_once)
        record.batch, record.at_once, record.teacher = tuner.batch, tuner.at_once, "kept" if kept else "live"
        started, first = time.perf_counter(), tuner.step
        failed = self._take_steps(tuner, saved, run, shown)
        if failed is not None:
            record.stopped = Stopped(layer=failed.layer, step=failed.step)
            _warn(f"{failed} The optimisation ends there, with its last good state.")
        record.at_once = tuner.at_once
        record.curve = averaged(saved.losses)
        if tuner.step > first:
            record.seconds_per_step = round((time.perf_counter() - started) / (tuner.step - first), 4)
        tuner.finish()

    def _take_steps(self, tuner: Tuner, saved: KeptState, run: Run, shown: _Shown) -> NotFiniteLossError | None:
        """Takes the steps; where the loss is not finite any more, the last good state is back, and why is returned."""
        steps, unit = saved.plan.steps, f"{shown.unit}, " * bool(shown.unit)
        good, recent, decided = tuner.state_copy(), 0.0, ""
        try:
            while tuner.step < steps:
                if tuner.step % GOOD_EVERY == 0:
                    recent = _noted(saved, tuner.look(), recent)
                    tuner.check_finite()
                    good = tuner.state_copy()
                    if self.rounding != "straight-through":
                        decided = f", {tuner.learner.share_decided():.0%} decided"
                loss = tuner.advance()
                recent = _noted(saved, [] if loss is None else [loss], recent)
                run.progress("Optimising", shown.done + tuner.step, shown.total, f"{unit}loss {recent:.4g}{decided}")
                if not tuner.pending and saved.is_due():
                    tuner.check_finite()  # what a resumed run begins with is what it may have to fall back to
                    good = tuner.state_copy()
                    saved.write_if_due(tuner)
            recent = _noted(saved, tuner.look(), recent)
            tuner.check_finite()
        except NotFiniteLossError as error:
            tuner.load({n: t.clone() for n, t in good.items()}, tuner.step)
            tuner.pending.clear()
            return error
        return None

    def _choose(
        self,
        student: Student,
        learner: Learner | None,
        measure: UnseenLoss,
        run: Run,
        record: ReconstructRecord,
    ) -> None:
        """Measures the rounded network against what earlier stages left, and keeps the best."""
        states = left_by_stages(run.history)
        given = next(reversed(states), None)
        own = numbered(self.kind, states)
        states[own] = student.snapshot()
        measured, soft = measure.losses(student, states, learner)
        losses = {name: float(each.mean()) for name, each in measured.items()}
        best = surely_lower(measured, own) if self.never_worse else own
        student.restore(states[best])
        record.loss, record.kept = LossRecord(soft=soft, hard=losses[best], by_stage=losses), best
        record.before, record.after = None if given is None else losses[given], losses[best]
        if best != own:
            more = more_steps(record.before, losses[own], record.curve or [])
            _warn(
                f"The optimisation did not lower the loss on unseen views of the calibration images "
                f"({losses[own]:.4g}, {best}: {losses[best]:.4g}): what '{best}' left is kept. {more}"
            )


def _noted(saved: KeptState, losses: list[float], recent: float) -> float:
    """Keeps the losses of steps; their running mean."""
    saved.losses += losses
    for loss in losses:
        recent = loss if not recent else 0.95 * recent + 0.05 * loss
    return recent


def _seconds(tuner: Tuner, plan: Pace) -> float:
    """Of a step; infinite where the compiler gives up."""
    try:
        return seconds_per_step(tuner)
    except Exception:
        if not plan.compiled:
            raise
        return float("inf")


def _learns(learner: Learner) -> bool:
    return any(p.requires_grad for p in learner.parameters())


class _Shown(NamedTuple):
    """What progress tells beside the steps of a unit."""

    unit: str
    """Its name; empty where it is the whole network."""
    done: int
    """Steps of the units before."""
    total: int
    """Steps of all units."""


@dataclass(frozen=True)
class _Work:
    """A unit that is about to be optimised."""

    learner: Learner
    feed: UnitFeed
    objective: Objective

    def loss(self, network: fx.GraphModule, run: Run) -> float:
        """Of the unit as it stands, on a fixed part of the calibration images, without regularizer."""
        count, total = min(MEASURED_IMAGES, len(self.feed)), 0.0
        with torch.no_grad():
            for start in range(0, count, run.batch):
                indices = torch.arange(start, min(start + run.batch, count))
                batch = self.feed(indices, mixed=False)
                weights = self.objective.weights[indices].to(run.device)
                terms = self.objective.distances(network(*batch.inputs)[1], batch, weights)
                total += float(terms.sum()) * len(indices)
        return total / count


def _sqnr(student: Student, images: Images, run: Run) -> dict[str, float | None]:
    """Of every layer in dB, on a few images."""
    return layer_sqnr(student, images.batch(range(min(16, len(images))), run.device))


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
