"""From a network, a few images and limits to bits for every layer: measure, allocate, and show what else there is.

Losses come from a measure of :mod:`bitwright.sensitivity`, costs and the integer program from
:mod:`bitwright.bits`. The search for the smallest network that still agrees is in :mod:`bitwright.bits.trials`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright import together
from bitwright.bits import trials
from bitwright.bits.allocate import Losses, plans_for, problem_of
from bitwright.bits.costs import ACTIVATION_CHOICES, Latency, Variable, variables_of
from bitwright.bits.goal import MEASURE, Goal
from bitwright.bits.plan import Plan
from bitwright.bits.solve import Solution, pareto, reachable, solutions_of, solve
from bitwright.bits.tables import Problem
from bitwright.collector import uncollected
from bitwright.errors import UsageError
from bitwright.given import inputs
from bitwright.given.arguments import Given, check_alone, one_of, whole_number
from bitwright.given.images import Images
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on, undisturbed
from bitwright.graph.student import Student, insert_quantizers
from bitwright.progress import Progress, watched
from bitwright.quant.scheme import Rule, Scheme
from bitwright.recipes import Recipe
from bitwright.recipes import recipe as find_recipe
from bitwright.run.about import totals
from bitwright.run.result import Curve
from bitwright.sensitivity import MEASURES, Choices, Measure, MeasuredLoss, Table, predicted_losses
from bitwright.stages.base import Run
from bitwright.words import amount

if TYPE_CHECKING:
    from bitwright.bits.latency import LatencyFacts

SAMPLES = (16, 256)
"""Images to measure on: a plan that chooses among hundreds of losses learns few images by heart, so as many of these
as :data:`WORK` allows."""
WORK = 4e12
"""Multiply-accumulates for measuring, about: minutes on two cores."""
POINTS = 33
SHOWN = 17
"""Points of the curve that the result of a run keeps for its page."""
UNIFORM = 4
"""Bits of weights: without a limit, a plan is as large as the network with these everywhere."""
SLACK, SLACK_BYTES = 0.005, 256
"""Files are larger than planned by up to this share and this number of bytes, since how well their description
compresses is not known before."""
WITH_ACTIVATIONS = frozenset({"loss", "distance"})
"""Measures that predict what bits of activations cost; for the others, ``loss`` does."""
OTHER_SCALE = frozenset({"eigenvalue", "q-bert"})
"""Measures whose numbers are no nats."""
BY = {
    "size": "weight_bytes",
    "activations": "activation_bytes",
    "total": "total_bytes",
    "bops": "bit_operations",
    "latency": "latency",
}
LatencyOf = Callable[[Student], Latency]


@dataclass(frozen=True)
class Planning:
    """A plan, and what else there is to choose from."""

    plan: Plan
    """The one that loses least within the limits."""
    curve: list[Plan]
    """Those that lose least for less and more of ``along``, cheapest first, beside the other limits."""
    uniform: dict[int, Plan]
    """The same bits in all weights that are free, by the bits."""
    along: str
    """What the curve limits, such as ``weight_bytes``."""
    timing: LatencyFacts | None
    """How latencies were measured, if they were."""
    goal: Goal
    limits: dict[str, float]
    """What was limited, in the units of ``predicted``."""
    float_bytes: int
    """Bytes of the parameters in float."""
    student: Student
    """Quantizers in place, none calibrated."""
    variables: dict[str, Variable]
    losses: Losses
    measured: Measured
    estimate: trials.Estimate | None = None
    """What is expected of the plan's answers, where a drop was limited."""

    def facts(self) -> dict[str, Any]:
        """What every result says of a plan."""
        return {
            "goal": self.goal.to_dict(),
            "limits": self.limits,
            "predicted": self.plan.predicted,
            **self.measured.to_dict(),
            **({} if self.timing is None else {"latency": asdict(self.timing)}),
            **({} if self.estimate is None else {"estimate": asdict(self.estimate)}),
        }

    def of_run(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        curve = {key: value for key, value in asdict(self.outline()).items() if key != "chosen"}
        return {**self.facts(), "curve": curve}

    def bits(self, plan: Plan) -> dict[str, dict[str, int]]:
        """Bits of weights and activations by layer; those that a plan chooses, or a rule fixed."""
        return {
            half: {v.name: _bits_of(plan, v) for v in self.variables.values() if v.kind == kind}
            for half, kind in (("weights", "weight"), ("activations", "activation"))
        }

    def losses_of(self, plan: Plan) -> dict[str, dict[str, float | None]]:
        """What the bits of each layer are predicted to lose."""
        tables = {"weights": self.losses.weights, "activations": self.losses.activations}
        return {
            half: {name: tables[half].get(name, {}).get(bits) for name, bits in row.items()}
            for half, row in self.bits(plan).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """What ``pareto.json`` holds."""
        return {
            **self.facts(),
            "chosen": {**self._point(self.plan), **self.bits(self.plan)},
            "along": self.along,
            "points": [{"point": i, **self._point(p), **self.bits(p)} for i, p in enumerate(self.curve, 1)],
            "uniform": [{"bits": b, **self._point(p)} for b, p in self.uniform.items()],
            "float_bytes": self.float_bytes,
        }

    def _point(self, plan: Plan) -> dict[str, float]:
        predicted = plan.predicted or {}
        return {**predicted, "compression": self.float_bytes / predicted["weight_bytes"]}

    def outline(self) -> Curve:
        """The curve and uniform bits without the bits of layers, as a result keeps them."""
        uniform = [{"bits": b, **(p.predicted or {})} for b, p in self.uniform.items()]
        return Curve(self.along, [p.predicted or {} for p in self.curve], uniform)

    def at(self, point: int) -> Planning:
        """The same with a point of the curve as the plan; the first is 1.

        Raises:
            UsageError: there is no such point.
        """
        if not 1 <= point <= len(self.curve):
            raise UsageError(f"Expected a point of the curve, 1 to {len(self.curve)}, found {point}.")
        return replace(self, plan=self.curve[point - 1])


@dataclass(frozen=True)
class Measured:
    """Where losses come from."""

    weights: Table
    activations: Table
    images: Images
    settings: dict[str, Any]
    reused: bool
    """Whether nothing was measured, because all of it had been kept."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "measure": self.settings,
            "measured_on": {"count": len(self.images), "sha256": self.images.sha256},
            "measures_reused": self.reused,
            "notes": self.notes,
        }


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
        run = Run(seed=seed, device=inputs.find_device(device), progress=told)
        teacher = inputs.prepare_teacher(network, data, output)
        folder = None if cache is None else usable(Path(cache))
        method, how = find_recipe(recipe), {"samples": samples, "points": points, "latency": latency, "folder": folder}
        return decide(teacher, scheme, data, goal, method, run, along=along, **how)  # type: ignore[arg-type]


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
    *,
    along: str | None = None,
    samples: int | None = None,
    points: int = POINTS,
    latency: Latency | LatencyOf | None = None,
    folder: Path | None = None,
) -> Planning:
    """The plan and the curve of a prepared network.

    Args:
        teacher: the float network.
        scheme: its rules fix bits; its granularity and runtime hold.
        images: to take some of.
        goal: limits and choices; ``max_drop`` is not looked at.
        method: the recipe that will follow: losses are those of its roundings, as far as they are layer by layer.
        run: seed, device, progress.
        along: the cost that the curve limits; what is limited if not given.
        samples: how many to measure on; what :func:`affordable` says if not given.
        points: of the curve; 0 leaves it out.
        latency: as for :func:`plan_bits`.
        folder: where losses are kept.

    Raises:
        UsageError: the limits cannot be met; one line says what is reachable, and why no more is.
    """
    samples = _checked(samples, points)
    student, variables = _open(teacher, scheme, goal)
    some = images.sample(min(samples or affordable(student, variables), len(images)), seed=0).unlabelled()
    measured = _measure(teacher, scheme, some, goal, variables, method, run, folder)
    timing = None
    if latency is None and (goal.max_latency is not None or along == "latency"):
        latency, timing = _timed(student, some, goal, run, folder)
    run.progress("Planning", 0, 0)
    losses = _losses(measured, variables)
    table = latency(student) if callable(latency) else latency
    problem = _problem(student, losses, goal, table, explained=bool(measured.notes))
    float_bytes, uniform = 4 * totals(student)["parameters"], _uniform(problem, variables, goal)
    limits = goal.limits(float_bytes)
    if not goal.asked:
        limits["weight_bytes"] = uniform[nearest_uniform(goal)].costs["weight_bytes"]
    along = along or ("weight_bytes" if goal.max_drop is not None else next(iter(limits)))
    chosen = _within(problem, limits, goal, float_bytes)
    curve = _curve(problem, along, limits, points) if points else []
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


def _checked(samples: int | None, points: int) -> int | None:
    """The number of images, once both numbers are known to be in range."""
    samples = None if samples is None else whole_number("samples", samples, least=1)
    if points != 0:
        whole_number("points", points, least=2)
    return samples


def decide(
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    goal: Goal,
    method: Recipe,
    run: Run,
    *,
    along: str | None = None,
    samples: int | None = None,
    points: int = POINTS,
    latency: Latency | LatencyOf | None = None,
    folder: Path | None = None,
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
        along: as for :func:`planned`, like the next two.
        samples: how many images to measure losses on.
        points: of the curve.
        latency: as for :func:`plan_bits`.
        folder: where losses are kept.
        state: where trials are kept while the job is unfinished, and losses without a folder.

    Raises:
        UsageError: the goal cannot be met; one line says what can be.
    """
    how: dict[str, Any] = {"along": along, "samples": samples, "points": points, "latency": latency}
    how["folder"] = folder or state
    if goal.max_drop is None:
        return planned(teacher, scheme, images, goal, method, run, **how)
    if goal.scored is None:
        trials.check_countable(teacher, images, goal.max_drop)
    fit, _ = trials.halves(images)
    found = planned(teacher, scheme, fit, goal, method, run, **how)
    place_on(teacher.graph, run.device)
    base = open_scheme(scheme, goal)
    limit, scored = goal.max_drop, goal.scored
    plan, estimate = trials.smallest(teacher, found.curve, base, method, images, limit, run, state, scored)
    return replace(found, plan=plan, estimate=estimate)


def open_scheme(scheme: Scheme, goal: Goal) -> Scheme:
    """The scheme for what a plan of this goal leaves open: stored operands of activations, above all."""
    activations = goal.activations[-1] if goal.activations else None
    return scheme.model_copy(update={"weights": goal.weights[-1], "activations": activations, "plan": {}})


def affordable(student: Student, variables: Mapping[str, Variable]) -> int:
    """How many images losses are measured on: each option of each tensor runs half of the network, on average."""
    passes = sum(len(v.options) for v in variables.values() if len(v.options) > 1) / 2
    least, most = SAMPLES
    return int(min(most, max(least, WORK / max(1.0, passes * totals(student)["macs"]))))


def nearest_uniform(goal: Goal) -> int:
    """The bits out of those offered that are nearest to :data:`UNIFORM`."""
    return min(goal.weights, key=lambda b: (abs(b - UNIFORM), b))


def usable(folder: Path) -> Path | None:
    """The folder if losses can be kept there; made if there is none, and a warning if it cannot be."""
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"Measured losses are not kept: {folder} cannot be made ({error.strerror}).", stacklevel=2)
        return None
    if os.access(folder, os.W_OK):
        return folder
    warnings.warn(f"Measured losses are not kept: {folder} cannot be written.", stacklevel=2)
    return None


# --------------------------------------------------------------------------------------------------- measuring


def _timed(student: Student, images: Images, goal: Goal, run: Run, folder: Path | None) -> tuple[Latency, LatencyFacts]:
    from bitwright.bits.latency import measure_latencies

    if together.processes() > 1:
        raise UsageError(
            "Expected one process for a limit of milliseconds, which each would measure otherwise, found "
            f"{together.processes()}. Plan first, in one (bitwright plan), and give plan=."
        )
    activations = goal.activations or ACTIVATION_CHOICES
    found = measure_latencies(
        student, images, weights=goal.weights, activations=activations, folder=folder, progress=run.progress
    )
    return found.table, found.facts


class _Watched(Measure):
    """A measure that notes whether it was asked, and not only its kept table."""

    def __init__(self, inner: Measure) -> None:
        self.inner, self.asked = inner, False

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        self.asked = True
        return self.inner.measure(teacher, images, choices, run)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()


@uncollected()
def _open(teacher: Captured, scheme: Scheme, goal: Goal) -> tuple[Student, dict[str, Variable]]:
    """The student with every choice open but what rules fix."""
    student = insert_quantizers(teacher, open_scheme(scheme, goal))
    variables = variables_of(student, goal.weights, goal.activations or ACTIVATION_CHOICES)
    if not any(v.kind == "weight" for v in variables.values()):
        raise UsageError("Expected weights whose bits can be planned, found none. `bitwright inspect` says why.")
    return student, variables


def _measure(
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    goal: Goal,
    variables: Mapping[str, Variable],
    method: Recipe,
    run: Run,
    folder: Path | None,
) -> Measured:
    """Tables of weights and of activations, so that other bits of one let the other be used again."""
    place_on(teacher.graph, run.device)
    first: Measure = MEASURES[goal.measure]()
    measures = (first, first if goal.measure in WITH_ACTIVATIONS else MeasuredLoss())
    found, fresh = [], False
    for half, measure in zip(("weight", "activation"), measures, strict=True):
        bits = tuple(sorted({b for v in variables.values() if v.kind == half for b in v.options}))
        watched = _Watched(measure)
        choices = Choices((), bits, scheme)
        if half == "weight":
            choices = Choices(bits, (), scheme, refine=tuple(s for s in method.stages if s.layerwise))
        found.append(
            predicted_losses(watched, teacher, images, choices, run, folder) if bits else Table(goal.measure, {})
        )
        fresh |= watched.asked
    place_on(teacher.graph, "cpu")
    notes = [note for table in found for note in table.notes]
    several = any(v.kind == "activation" and len(v.options) > 1 for v in variables.values())
    if goal.measure in OTHER_SCALE and several:
        notes.append(f"Losses of activations are nats, those of weights ('{goal.measure}') on a scale of their own.")
    settings = {**first.settings(), "activations": measures[1].name}
    return Measured(found[0], found[1], images, settings, not fresh, notes + _unknown(found, variables))


def _unknown(tables: Sequence[Table], variables: Mapping[str, Variable]) -> list[str]:
    """A note of the variables that no table speaks of, with a choice to make."""
    free = [v for v in variables.values() if len(v.options) > 1]
    missing = [v.label for v in free if _row(tables[v.kind == "activation"], v) is None]
    if not missing:
        return []
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    note = f"No loss was measured for {', '.join(missing[:3])}{more}: the most bits are kept there."
    warnings.warn(note, stacklevel=4)
    return [note]


def _row(table: Table, variable: Variable) -> Mapping[int, float] | None:
    rows: Mapping[str, Mapping[int, float]] = table.weights if variable.kind == "weight" else table.activations
    return next((rows[name] for name in variable.layers if name in rows), None)


def _losses(measured: Measured, variables: Mapping[str, Variable]) -> Losses:
    """Of the variables there are; what has no loss can only take its most bits."""
    halves: dict[str, dict[str, Mapping[int, float]]] = {"weight": {}, "activation": {}}
    for variable in variables.values():
        row = _row(measured.weights if variable.kind == "weight" else measured.activations, variable)
        if row is None and len(variable.options) > 1:
            row = dict.fromkeys(variable.options[:-1], math.inf) | {variable.options[-1]: 0.0}
        if row is not None:
            halves[variable.kind][variable.name] = row
    return Losses(halves["weight"], halves["activation"])


# -------------------------------------------------------------------------------------------------- allocating


@uncollected()
def _problem(student: Student, losses: Losses, goal: Goal, latency: Latency | None, *, explained: bool) -> Problem:
    """The integer program of a goal; losses that are not finite are warned of unless a note explains them."""
    with warnings.catch_warnings():
        if explained:
            warnings.filterwarnings("ignore", message="Losses that are not finite")
        return problem_of(
            student, losses, weights=goal.weights, activations=goal.activations or ACTIVATION_CHOICES, latency=latency
        )


def _within(problem: Problem, limits: Mapping[str, float], goal: Goal, float_bytes: int) -> Solution:
    """The solution within the limits; a little below a size that was asked for, where that can be."""
    size = goal.target_size is not None or goal.compression is not None
    if size:
        try:
            return solve(problem, {**limits, "weight_bytes": limits["weight_bytes"] * (1 - SLACK) - SLACK_BYTES})
        except UsageError:
            pass
    try:
        return solve(problem, limits)
    except UsageError as error:
        if goal.compression is None:
            raise
        reach = reachable(problem)["weight_bytes"]
        raise UsageError(
            f"A compression of {goal.compression:g} is a file of {amount(limits['weight_bytes'], 'B')}; reachable are "
            f"{_down(float_bytes / reach.most)} to {_down(float_bytes / reach.least)}. {error}"
        ) from error


def _down(value: float) -> str:
    """Three digits, rounded down, so that the number can be given as a compression."""
    digits = 2 - math.floor(math.log10(value))
    return f"{math.floor(value * 10**digits) / 10**digits:g}"


@uncollected()
def _curve(problem: Problem, along: str, limits: Mapping[str, float], points: int) -> list[Solution]:
    """The curve without repeated solutions."""
    others = {name: limit for name, limit in limits.items() if name != along}
    found: list[Solution] = []
    for solution in pareto(problem, along, count=points, limits=others):
        if not found or solution.bits != found[-1].bits:
            found.append(solution)
    return found


def _uniform(problem: Problem, variables: Mapping[str, Variable], goal: Goal) -> dict[int, Solution]:
    """The same bits in every weight that is free; activations at 8 bits, or what is nearest."""
    wanted = min(goal.activations, key=lambda b: (abs(b - 8), b), default=8)
    chosen = [
        {
            key: min(problem.options[key], key=lambda b: (abs(b - (bits if v.kind == "weight" else wanted)), b))
            for key, v in variables.items()
        }
        for bits in goal.weights
    ]
    return dict(zip(goal.weights, solutions_of(problem, chosen), strict=True))


def _bits_of(plan: Plan, variable: Variable) -> int:
    layer = plan.layers[variable.name]
    part = layer.weight if variable.kind == "weight" else layer.activation
    assert part is not None
    assert part.bits != "float"
    return part.bits
