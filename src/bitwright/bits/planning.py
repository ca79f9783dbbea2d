"""From a network, a few images and limits to bits for every layer: measure, allocate, and show what else there is.

Losses come from a measure of :mod:`bitwright.sensitivity`, costs and the integer program from
:mod:`bitwright.bits`. The search for the smallest network that still agrees is in :mod:`bitwright.bits.trials`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.bits import trials
from bitwright.bits.allocate import Losses, plans_for, problem_of
from bitwright.bits.costs import ACTIVATION_CHOICES, Latency, Variable, variables_of
from bitwright.bits.goal import MEASURE, Goal
from bitwright.bits.measured import LatencyOf, affordable, kept_overhead, losses_of, measure_losses, time_layers, usable
from bitwright.bits.planned import Planning
from bitwright.bits.solve import Solution, Solver
from bitwright.collector import uncollected
from bitwright.errors import UsageError
from bitwright.given import inputs
from bitwright.given.arguments import Given, check_alone, one_of, whole_number
from bitwright.given.images import Images
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on, undisturbed
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.walk import images_in_pass
from bitwright.progress import Progress, watched
from bitwright.quant.scheme import Rule, Scheme
from bitwright.recipes import Recipe
from bitwright.recipes import recipe as find_recipe
from bitwright.run.about import totals
from bitwright.sensitivity import MEASURES
from bitwright.stages.base import Run
from bitwright.words import amount

if TYPE_CHECKING:
    from bitwright.bits.latency import LatencyFacts

POINTS = 33
SHOWN = 17
"""Points of the curve that the result of a run keeps for its page."""
UNIFORM = 4
"""Bits of weights: without a limit, a plan is as large as the network with these everywhere."""
SLACK, SLACK_BYTES = 0.005, 256
"""Files are larger than planned by up to this share and this number of bytes, since how well their description
compresses is not known before."""
BY = {
    "size": "weight_bytes",
    "activations": "activation_bytes",
    "total": "total_bytes",
    "bops": "bit_operations",
    "latency": "latency",
}


@dataclass(frozen=True)
class PlanningSettings:
    """What is measured for a plan, and the curve beside it."""

    along: str | None = None
    """The cost that the curve limits, such as ``weight_bytes``; what is limited if not given."""
    samples: int | None = None
    """Images to measure losses on; what :func:`bitwright.bits.measured.affordable` says if not given."""
    points: int = POINTS
    """Of the curve; 0 leaves it out."""
    latency: Latency | LatencyOf | None = None
    """Seconds of layers by bits of weight and input, or a function of the student that measures them."""
    folder: Path | None = None
    """Where measured losses are kept."""

    def checked(self) -> PlanningSettings:
        """The same, once both numbers are known to be in range.

        Raises:
            UsageError: one is not.
        """
        if self.points != 0:
            whole_number("points", self.points, least=2)
        return self if self.samples is None else replace(self, samples=whole_number("samples", self.samples, least=1))


@undisturbed()
def plan_bits(
    model: Any,
    images: Any,
    recipe: str | Path | Recipe | None = None,
    *,
    goal: Goal | None = None,
    target_size: str | float | None = None,
    compression: float | None = None,
    max_bops: float | str | None = None,
    max_latency: float | str | None = None,
    max_activation_size: str | float | None = None,
    max_total_size: str | float | None = None,
    max_drop: float | str | None = None,
    weights: int | str | Sequence[int] = "auto",
    activations: int | str | Sequence[int] = 8,
    rules: Sequence[str | Rule] = (),
    runtime: str = "onnxruntime",
    scheme: Scheme | None = None,
    measure: str = "loss",
    by: str | None = None,
    points: int = POINTS,
    samples: int | None = None,
    latency: Latency | LatencyOf | None = None,
    seed: int = 0,
    device: str = "auto",
    preprocessing: Any = None,
    output: str | None = None,
    input_key: str | None = None,
    skip_unreadable: bool = False,
    cache: str | Path | None = None,
    progress: Progress | bool = True,
) -> Planning:
    """The bits of every layer that are predicted to lose least within limits, and the curve of all sizes.

    Without a limit the plan is as large as the network with 4 bits in all weights. With ``max_drop`` plans of the curve
    are tried as :func:`bitwright.quantize` tries them, and the smallest that keeps its answers is the plan.

    Args:
        model: as for :func:`bitwright.quantize`.
        images: as for :func:`bitwright.quantize`; labels in it are not looked at.
        recipe: that will follow; losses are those of its closed-form roundings.
        goal: all limits, choices and the measure in one object, instead of the next ten.
        target_size: of ``model.safetensors``: ``"3.5MB"``, ``"3MiB"``, or bytes.
        compression: bytes of the float parameters over those of ``model.safetensors``, instead.
        max_bops: multiply-accumulates of one image times bits of both operands.
        max_latency: milliseconds for one image: the sum over layers with weights, each timed in ONNX Runtime.
        max_activation_size: of the activations that are in memory together.
        max_total_size: of file and activations together.
        max_drop: share of answers that may change, instead of a size; a ``goal`` may name a task whose figure may drop.
        weights: bits to choose among, ``"2,4,8"`` or a sequence; 2, 3, 4, 5, 6 and 8 if not given.
        activations: bits to choose among in the same form, or ``"float"``.
        rules: exceptions such as ``"head=w8a8"``; what they say is fixed.
        runtime: where the result will run.
        scheme: rules, runtime, granularity and more in one object, instead of the two above.
        measure: of ``bitwright.sensitivity.MEASURES``; what predicts losses. Where it says nothing of activations,
            ``loss`` does.
        by: what the curve runs along: ``size``, ``activations``, ``total``, ``bops`` or ``latency``; what is limited
            if not given.
        points: of the curve.
        samples: images to measure on, evenly spread over those that calibration takes; 16 to 256 if not given, the
            fewer the larger the network.
        latency: seconds of layers by bits of weight and input, or a function of the student that measures them;
            timed on this machine, if they are needed and not given.
        seed: of all random choices.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        preprocessing: of image files; a named model brings its own.
        output: name of the one output to keep, for a model that returns several.
        input_key: which of several entries the images are; see :func:`bitwright.load_images`.
        skip_unreadable: go on when a file cannot be decoded.
        cache: folder where measured losses are kept, so that the next plan takes seconds.
        progress: as for :func:`bitwright.quantize`.

    Raises:
        UsageError: an argument cannot be used, or the limits cannot be met; one line says what can be.
    """
    limits = {
        "target_size": target_size,
        "compression": compression,
        "max_bops": max_bops,
        "max_latency": max_latency,
        "max_activation_size": max_activation_size,
        "max_total_size": max_total_size,
        "max_drop": max_drop,
    }
    check_instead(scheme, {}, rules, runtime)
    goal = _wanted(goal, limits, weights, activations, measure)
    along = None if by is None else _cost(by)
    if goal.max_drop is not None and along not in {None, BY["size"]}:
        raise UsageError(f"Expected a curve by size beside max_drop=, found '{by}': plans are tried along their size.")
    network = inputs.as_model(model, preprocessing)
    goal = goal.beside(network.decode)
    scheme = scheme or Scheme(runtime=runtime, rules=tuple(r if isinstance(r, Rule) else Rule.parse(r) for r in rules))
    data = inputs.calibration_images(images, network, None, skip_unreadable, input_key=input_key)
    with watched(progress) as told:
        where, teacher = inputs.find_device(device), inputs.prepare_teacher(network, data, output)
        run = Run(seed=seed, batch=images_in_pass(teacher.graph.graph, where), device=where, progress=told)
        folder = None if cache is None else usable(Path(cache))
        how = PlanningSettings(along, samples, points, latency, folder)
        return decide(teacher, scheme, data, goal, find_recipe(recipe), run, how)


def check_instead(scheme: Scheme | None, bits: Mapping[str, Given], rules: Sequence[Any], runtime: str) -> None:
    """A scheme stands instead of bits, rules and runtime.

    Raises:
        UsageError: one of them is given too, or the rules are no sequence of rules.
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise UsageError(f"Expected a sequence such as ('head=w8a8',) as rules=, found {type(rules).__name__}.")
    check_alone("scheme", scheme, {**bits, "rules": (tuple(rules), ((),)), "runtime": (runtime, ("onnxruntime",))})


def _wanted(
    goal: Goal | None, limits: Mapping[str, str | float | None], weights: Any, activations: Any, measure: str
) -> Goal:
    """The goal that was given, or that of the arguments that were given instead."""
    bits = {"weights": (weights, (None, "auto")), "activations": (activations, (8, "auto"))}
    check_alone("goal", goal, {**{name: (value, (None,)) for name, value in limits.items()}, **bits})
    check_alone("goal", goal, {"measure": (measure, (MEASURE,))})
    goal = goal or Goal.parse(**limits, weights=weights, activations=activations, measure=measure)
    check_goal(goal)
    return goal


def check_goal(goal: Goal) -> None:
    """Finds what can be wrong with a goal before anything is measured.

    Raises:
        UsageError: there is no such measure.
    """
    one_of("measure", goal.measure, tuple(MEASURES))


def _cost(by: str) -> str:
    if by not in BY:
        raise UsageError(f"Expected a curve by one of {', '.join(BY)}, found '{by}'.")
    return BY[by]


def planned(
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    goal: Goal,
    method: Recipe,
    run: Run,
    how: PlanningSettings,
) -> Planning:
    """The plan and the curve of a prepared network.

    Args:
        teacher: the float network.
        scheme: its rules fix bits; its granularity and runtime hold.
        images: to take some of.
        goal: limits and choices; ``max_drop`` is not looked at.
        method: the recipe that will follow: losses are those of its roundings, as far as they are layer by layer.
        run: seed, device, progress.
        how: what is measured, and how long the curve is.

    Raises:
        UsageError: the limits cannot be met; one line says what is reachable, and why no more is.
    """
    how = how.checked()
    student, variables = _open(teacher, scheme, goal)
    some = images.sample(min(how.samples or affordable(student, variables), len(images)), seed=0).unlabelled()
    measured = measure_losses(teacher, scheme, some, goal, variables, method, run, how.folder)
    seconds, timing = _seconds(student, some, goal, run, how)
    run.progress("Planning", 0, 0)
    losses = losses_of(measured, variables)
    overhead = kept_overhead(student, how.folder)
    solver = _solver(student, losses, goal, seconds, overhead, explained=bool(measured.notes))
    float_bytes, uniform = 4 * totals(student)["parameters"], _uniform(solver, variables, goal)
    limits = goal.limits(float_bytes)
    if not goal.asked:
        limits["weight_bytes"] = uniform[nearest_uniform(goal)].costs["weight_bytes"]
    along = how.along or ("weight_bytes" if goal.max_drop is not None else next(iter(limits)))
    chosen = _within(solver, limits, goal, float_bytes)
    curve = _curve(solver, along, limits, how.points) if how.points else []
    plan, *others = plans_for(student, [chosen, *curve, *uniform.values()])
    return Planning(
        plan=plan,
        curve=others[: len(curve)],
        uniform=dict(zip(uniform, others[len(curve) :], strict=True)),
        along=along,
        timing=timing,
        goal=goal,
        limits=limits,
        float_bytes=float_bytes,
        student=student,
        variables=variables,
        losses=losses,
        measured=measured,
    )


def _seconds(
    student: Student, images: Images, goal: Goal, run: Run, how: PlanningSettings
) -> tuple[Latency | None, LatencyFacts | None]:
    """Seconds of layers as they are given, or timed where they are needed, with how that was done."""
    if how.latency is None and (goal.max_latency is not None or how.along == "latency"):
        return time_layers(student, images, goal, run, how.folder)
    return how.latency(student) if callable(how.latency) else how.latency, None


def decide(
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    goal: Goal,
    method: Recipe,
    run: Run,
    how: PlanningSettings,
    *,
    state: Path | None = None,
) -> Planning:
    """The plan within limits; where a drop is one of them, plans of the curve are tried and the smallest is taken.

    Args:
        teacher: the float network.
        scheme: as for :func:`planned`.
        images: all that there are for calibration.
        goal: limits and choices.
        method: the recipe that will follow; its quick part estimates a drop.
        run: seed, device, progress.
        how: as for :func:`planned`.
        state: where trials are kept while the job is unfinished, and losses without a folder.

    Raises:
        UsageError: the goal cannot be met; one line says what can be.
    """
    how = replace(how, folder=how.folder or state)
    if goal.max_drop is None:
        return planned(teacher, scheme, images, goal, method, run, how)
    if goal.scored is None:
        trials.check_countable(teacher, images, goal.max_drop)
    fit, _ = trials.halves(images)
    found = planned(teacher, scheme, fit, goal, method, run, how)
    place_on(teacher.graph, run.device)
    base = open_scheme(scheme, goal)
    limit, scored = goal.max_drop, goal.scored
    plan, estimate = trials.smallest(teacher, found.curve, base, method, images, limit, run, state, scored)
    return replace(found, plan=plan, estimate=estimate)


def open_scheme(scheme: Scheme, goal: Goal) -> Scheme:
    """The scheme for what a plan of this goal leaves open: stored operands of activations, above all."""
    activations = goal.activations[-1] if goal.activations else None
    return scheme.model_copy(update={"weights": goal.weights[-1], "activations": activations, "plan": {}})


def nearest_uniform(goal: Goal) -> int:
    """The bits out of those offered that are nearest to :data:`UNIFORM`."""
    return min(goal.weights, key=lambda b: (abs(b - UNIFORM), b))


# --------------------------------------------------------------------------------------------------- measuring


@uncollected()
def _open(teacher: Captured, scheme: Scheme, goal: Goal) -> tuple[Student, dict[str, Variable]]:
    """The student with every choice open but what rules fix."""
    student = insert_quantizers(teacher, open_scheme(scheme, goal))
    variables = variables_of(student, goal.weights, goal.activations or ACTIVATION_CHOICES)
    if not any(v.kind == "weight" for v in variables.values()):
        raise UsageError("Expected weights whose bits can be planned, found none. `bitwright inspect` says why.")
    return student, variables


# -------------------------------------------------------------------------------------------------- allocating


@uncollected()
def _solver(
    student: Student, losses: Losses, goal: Goal, latency: Latency | None, overhead: int, *, explained: bool
) -> Solver:
    """The integer program of a goal; losses that are not finite are warned of unless a note explains them."""
    with warnings.catch_warnings():
        if explained:
            warnings.filterwarnings("ignore", message="Losses that are not finite")
        activations = goal.activations or ACTIVATION_CHOICES
        return Solver(
            problem_of(
                student, losses, weights=goal.weights, activations=activations, latency=latency, overhead=overhead
            )
        )


@uncollected()
def _within(solver: Solver, limits: Mapping[str, float], goal: Goal, float_bytes: int) -> Solution:
    """The solution within the limits; a little below a size that was asked for, where that can be."""
    size = goal.target_size is not None or goal.compression is not None
    if size:
        try:
            return solver.solve({**limits, "weight_bytes": limits["weight_bytes"] * (1 - SLACK) - SLACK_BYTES})
        except UsageError:
            pass
    try:
        return solver.solve(limits)
    except UsageError as error:
        if goal.compression is None:
            raise
        reach = solver.reach("weight_bytes")
        raise UsageError(
            f"A compression of {goal.compression:g} is a file of {amount(limits['weight_bytes'], 'B')}; reachable are "
            f"{_down(float_bytes / reach.most)} to {_down(float_bytes / reach.least)}. {error}"
        ) from error


def _down(value: float) -> str:
    """Three digits, rounded down, so that the number can be given as a compression."""
    digits = 2 - math.floor(math.log10(value))
    return f"{math.floor(value * 10**digits) / 10**digits:g}"


@uncollected()
def _curve(solver: Solver, along: str, limits: Mapping[str, float], points: int) -> list[Solution]:
    """The curve without repeated solutions."""
    others = {name: limit for name, limit in limits.items() if name != along}
    found: list[Solution] = []
    for solution in solver.pareto(along, count=points, limits=others):
        if not found or solution.bits != found[-1].bits:
            found.append(solution)
    return found


def _uniform(solver: Solver, variables: Mapping[str, Variable], goal: Goal) -> dict[int, Solution]:
    """The same bits in every weight that is free; activations at 8 bits, or what is nearest."""
    wanted = min(goal.activations, key=lambda b: (abs(b - 8), b), default=8)
    chosen = [
        {
            key: min(solver.problem.options[key], key=lambda b: (abs(b - (bits if v.kind == "weight" else wanted)), b))
            for key, v in variables.items()
        }
        for bits in goal.weights
    ]
    return dict(zip(goal.weights, map(solver.solution_of, chosen), strict=True))
