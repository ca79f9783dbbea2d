"""The whole job: a network and a few images in, a low-bit network out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.bits import planning
from bitwright.bits.goal import MEASURE, Goal
from bitwright.bits.measured import usable
from bitwright.bits.plan import Plan, insert_plan
from bitwright.bits.planned import Planning
from bitwright.errors import UsageError, step
from bitwright.given.arguments import SEEDS, a_path, a_time, check_alone, choices, of_kind, one_of, whole_number
from bitwright.given.images import Images, load_images
from bitwright.given.inputs import as_model, calibration_images, find_device, prepare_teacher, sized_by
from bitwright.given.models import Model
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing
from bitwright.given.several import input_names
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on, undisturbed
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.walk import images_in_pass
from bitwright.measure.health import check_answers
from bitwright.memory import keep_pages
from bitwright.outliers.balance import balance
from bitwright.outliers.coarse import ease
from bitwright.outliers.wider import advise, check_wide, raise_few
from bitwright.pipeline import run_stages, tensor_digest
from bitwright.progress import Progress, check_progress, silent, watched
from bitwright.quant.scheme import Rule, Scheme, parse_activation_bits, parse_weight_bits
from bitwright.quantized import QuantizedModel
from bitwright.recipes import Recipe
from bitwright.recipes import recipe as find_recipe
from bitwright.run.about import describe_layers, totals
from bitwright.run.journal import heard
from bitwright.run.record import Origin, RunRecord
from bitwright.sensitivity import MEASURES
from bitwright.stages.base import Precision, Run
from bitwright.stages.short_rows import keep_short_rows
from bitwright.words import plural


@undisturbed()
@step("Quantizing")
def quantize(
    model: nn.Module | torch.export.ExportedProgram | Model | str | Path,
    images: Any,
    recipe: str | Path | Recipe | None = None,
    *,
    weights: int | str | Sequence[int] | None = "auto",
    activations: int | str | Sequence[int] | None = 8,
    rules: Sequence[str | Rule] = (),
    runtime: str = "onnxruntime",
    scheme: Scheme | None = None,
    plan: Plan | str | Path | None = None,
    goal: Goal | None = None,
    target_size: str | float | None = None,
    compression: float | None = None,
    max_bops: float | str | None = None,
    max_latency: float | str | None = None,
    max_drop: float | str | None = None,
    measure: str = MEASURE,
    cache: str | Path | None = None,
    samples: int | None = None,
    steps: int | Sequence[int] | None = None,
    minutes: float | None = None,
    precision: Precision = "auto",
    seed: int = 0,
    device: str = "auto",
    preprocessing: Preprocessing | PreprocessFunction | None = None,
    output: str | None = None,
    input_key: str | None = None,
    skip_unreadable: bool = False,
    progress: Progress | bool = True,
    state: Path | None = None,
) -> QuantizedModel:
    """Quantizes a trained network with unlabelled images.

    Args:
        model: any module of one image tensor, or of several inputs by name; a saved export program; or a name
            or path (``timm:resnet18@weights.pt``, ``network.onnx``).
        images: a path, arrays, tensors, a data set, a loader or a generator, which is read until ``samples`` are there;
            labels in it are not looked at, but by ``qkd``. See :func:`bitwright.load_images`.
        recipe: how; see ``bitwright recipes``. :data:`bitwright.recipes.DEFAULT` if not given.
        weights: bits of weights, 2 to 8, or ``"float"``; 8 if not given. With a limit, those to choose among, as in
            ``"2,4,8"`` or ``(2, 4, 8)``; 2, 3, 4, 5, 6 and 8 if not given.
        activations: bits of activations, 2 to 8 or 16, or ``"float"``; with a limit, also several. ``"auto"``: 8, and
            16 for the few tensors that need them, within a quarter of the operations.
        rules: exceptions such as ``"head=w8a8"``; the last that matches a layer decides.
        runtime: where the result will run, which decides what is computed without rounding in between.
        scheme: all of the five above and more, in one object, instead of them.
        plan: bits layer by layer, or the ``plan.json`` that says them; what it leaves open, the arguments above decide,
            and rules come after it.
        goal: limits and choices in one object, instead of the next six and of several bits above.
        target_size: of ``model.safetensors``, ``"3.5MB"``, ``"3MiB"`` or bytes: the bits are planned layer by layer
            (:func:`bitwright.plan_bits`), and rules are fixed.
        compression: bytes of the float parameters over those of ``model.safetensors``, instead.
        max_bops: limit of multiply-accumulates of one image times bits of both operands; beside others or alone.
        max_latency: limit of milliseconds per image, which also plans the bits.
        max_drop: share of answers that may differ from the float network's, instead of a size: the smallest network
            that keeps it, as estimated on half of the images. A goal of :meth:`Goal.parse` with ``task=`` or
            ``metric=`` limits how much a figure drops.
        measure: of ``bitwright.sensitivity.MEASURES``: what predicts the losses that a plan minimises.
        cache: folder where those are kept, so that the next plan takes seconds.
        samples: how many images to use, evenly spread; if not given, 512 at most, and for ``qkd`` all.
        steps: of the optimisation, instead of the recipe's; schedules stretch with them. Several numbers are for a
            recipe with several stages that take steps; one number is for the first of them.
        minutes: what the whole of it may take, instead of ``steps``; the steps that this made are in the result.
        precision: in which networks are optimised: ``float32``, ``bfloat16``, or ``auto``, the faster one.
        seed: of all random choices.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        preprocessing: of image files and 8-bit pixels; a named model brings its own.
        output: name of the one output to keep, for a model that returns several.
        input_key: name of the images in the dicts of a data set or loader; the one entry that can be images if not
            given.
        skip_unreadable: go on when a file cannot be decoded.
        progress: True for a bar where someone looks, in a terminal or a notebook, and silence elsewhere; False for
            silence; or a function, called as ``progress(what, done, total, detail)``.
        state: folder for checkpoints, to resume from.

    Returns:
        The frozen low-bit network; ``.result`` tells how it was made.

    Raises:
        UsageError: an argument, a file, or the model cannot be used; one line says why.
    """
    limits = {
        "target_size": target_size,
        "compression": compression,
        "max_bops": max_bops,
        "max_latency": max_latency,
        "max_drop": max_drop,
    }
    _check_instead(scheme, goal, weights, activations, rules, runtime, measure, limits)
    _check_kinds(progress, preprocessing, output, input_key, skip_unreadable, cache)
    raise_some = _is_auto(activations, plan, goal, limits)
    state = None if state is None else a_path("state", state)
    samples = None if samples is None else whole_number("samples", samples, least=1)
    goal = goal or as_goal(weights, activations, measure, plan, **limits)
    scheme = scheme or _as_scheme(weights, activations, rules, runtime, planned=goal is not None)
    if raise_some:
        check_wide(scheme)
    plan = _as_plan(plan, scheme)
    method = find_recipe(recipe)
    with heard() as said, keep_pages(), watched(progress) as told:
        run = _as_run(method, seed, device, told, steps, minutes, precision)
        network = as_model(model, preprocessing)
        given = calibration_images(
            images, network, samples, skip_unreadable, labelled=method.reads_labels, input_key=input_key
        )
        network, data = sized_by(network, given), given.unlabelled()
        goal = goal and goal.beside(network.decode)
        with run.timed("capture"):
            teacher = prepare_teacher(network, data, output)
            run.batch = images_in_pass(teacher.graph.graph, run.device)
            _check_stages(method, insert_as(teacher, scheme, plan), teacher, given)
        teacher, scheme = mend_outliers(teacher, scheme, plan, data, method, run, raise_some=raise_some)
        decided = None
        if goal is not None:
            decided, scheme = plan_within(goal, teacher, scheme, data, method, run, cache=cache, state=state)
            plan = decided.plan
        student = _on_device(insert_as(teacher, scheme, plan), teacher, run)
        identity = _identity(student, teacher, method, run, data, given)
        student = run_stages(method, student, teacher, given, run, state=state, identity=identity)
        with run.timed("advice"):
            lines = [*check_answers(student, data, run), *advise(student, data, run)]
        for line in lines:
            warnings.warn(line, stacklevel=2)

    student = _finished(student, teacher, network, data)
    student.result = _record(student, network, method, data, run, said, decided, output).result()
    return QuantizedModel.of(student)


def _is_auto(activations: Any, plan: Any, goal: Goal | None, limits: Mapping[str, Any]) -> bool:
    """Whether the few activations that need it get 16 bits.

    Raises:
        UsageError: a plan, or limits of one, would decide their bits too.
    """
    auto = isinstance(activations, str) and activations == "auto"
    if auto and (plan is not None or goal is not None or any(v is not None for v in limits.values())):
        raise UsageError("Expected activations='auto', or a plan or a limit that decides their bits, found both.")
    return auto


def _on_device(student: Student, teacher: Captured, run: Run) -> Student:
    """Both networks, where the run computes."""
    place_on(teacher.graph, run.device)
    student.to(run.device)
    return student


def _identity(student: Student, teacher: Captured, method: Recipe, run: Run, images: Images, given: Images) -> str:
    """What the stages depend on; ``given`` are the images with their labels, which few recipes read."""
    budget = (run.steps_each, run.minutes, run.precision)
    labels = f" {given.labels_sha256}" if method.reads_labels else ""
    return f"{student.scheme} {method} {run.seed} {budget} {images.sha256} {tensor_digest(teacher.graph)}{labels}"


def _finished(student: Student, teacher: Captured, network: Model, images: Images) -> Student:
    """The student as integers, on the CPU, with what it takes to use it."""
    student.freeze()
    student.to("cpu")
    place_on(teacher.graph, "cpu")
    student.preprocessing, student.calibration = network.preprocessing, images
    student.has_parts(images.parts)
    student.interface = None if network.source is None else network.source.names
    return student


def insert_as(teacher: Captured, scheme: Scheme, plan: Plan | None) -> Student:
    """The student of a plan, or of a scheme where there is none."""
    return insert_quantizers(teacher, scheme) if plan is None else insert_plan(teacher, plan, scheme)


def _check_stages(method: Recipe, student: Student, teacher: Captured, images: Images) -> None:
    """What is wrong is said before anything takes long."""
    for stage in method.stages:
        stage.check(student, teacher, images)


def mend_outliers(
    teacher: Captured,
    scheme: Scheme,
    plan: Plan | None,
    images: Images,
    method: Recipe,
    run: Run,
    *,
    raise_some: bool = False,
) -> tuple[Captured, Scheme]:
    """What is done about tensors whose grid a few rows or channels would take for themselves.

    Returns:
        The float network with its channels shifted, scaled and balanced where that lowers the loss, which the result
        then says; and the scheme with more bits for short rows, for softmax outputs where others have few, and with
        ``raise_some`` for the few activations that need them.
    """
    with run.timed("outliers"), run.under("Looking for outliers"):
        place_on(teacher.graph, run.device)
        scheme = keep_short_rows(teacher, scheme, images, run)
        teacher, scheme, run.outliers.recentred = ease(
            teacher, scheme, lambda network, how: insert_as(network, how, plan), images, method, run
        )
        teacher, scales = balance(teacher, lambda network: insert_as(network, scheme, plan), images, method, run)
        run.outliers.balanced = scales
        if raise_some:
            scheme = raise_few(teacher, scheme, images, method, run)
    return teacher, scheme


@undisturbed()
def preview(
    model: nn.Module | torch.export.ExportedProgram | Model | str | Path,
    images: Any,
    recipe: str | Path | Recipe | None = None,
    *,
    scheme: Scheme | None = None,
    plan: Plan | str | Path | None = None,
    goal: Goal | None = None,
    cache: str | Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    preprocessing: Preprocessing | PreprocessFunction | None = None,
    output: str | None = None,
    skip_unreadable: bool = False,
    progress: Progress = silent,
) -> Student:
    """What :func:`quantize` would quantize to how many bits: quantizers in place, none calibrated, still in float.

    Args:
        model: as for :func:`quantize`, like all that follows.
        images: two of them are looked at; with a goal as many as the plan needs.
        recipe: that a goal's plan is made for.
        scheme: bits, rules, runtime; 8 bits everywhere if not given.
        plan: bits layer by layer, which come before the scheme's.
        goal: limits within which a plan is made first.
        cache: folder where measured losses are kept.
        samples: how many images to use.
        seed: of all random choices.
        device: where losses are measured.
        preprocessing: of image files; a named model brings its own.
        output: name of the one output to keep.
        skip_unreadable: go on when a file cannot be decoded.
        progress: called as it goes.

    Returns:
        The student; with a goal, ``result["plan"]`` tells of its plan.

    Raises:
        UsageError: an argument, a file, or the model cannot be used; one line says why.
    """
    network, scheme = as_model(model, preprocessing), scheme or Scheme()
    if goal is None:
        data = load_images(
            images,
            network.preprocessing,
            inputs=input_names(network.module),
            channels_last=network.channels_last,
            most=2,
        )
        data = network.completed(data)
        return insert_as(prepare_teacher(network, data, output), scheme, _as_plan(plan, scheme))
    data = calibration_images(images, network, samples, skip_unreadable)
    goal = goal.beside(network.decode)
    teacher = prepare_teacher(network, data, output)
    where = find_device(device)
    run = Run(seed=seed, batch=images_in_pass(teacher.graph.graph, where), device=where, progress=progress)
    decided, scheme = plan_within(goal, teacher, scheme, data, find_recipe(recipe), run, cache=cache)
    place_on(teacher.graph, "cpu")
    student = insert_plan(teacher, decided.plan, scheme)
    student.result["plan"] = decided.of_run()
    return student


def check_budget(steps: int | Sequence[int] | None, minutes: float | None, method: Recipe) -> tuple[int, ...]:
    """The steps of the recipe's stages that take some, as far as they are given.

    Raises:
        UsageError: steps and minutes are given, one is out of range, or there are more numbers than such stages.
    """
    if steps is not None and minutes is not None:
        raise UsageError("Expected steps= or minutes=, found both.")
    several = isinstance(steps, Sequence) and not isinstance(steps, str)
    if several and not steps:
        raise UsageError("Expected numbers of steps as steps=, found none.")
    given: Sequence[Any] = () if steps is None else steps if several else (steps,)  # type: ignore[assignment]
    each = tuple(whole_number("steps", n, least=0) for n in given)
    if len(each) > max(1, method.counts):
        raise UsageError(
            f"Recipe '{method.name}' has {plural(method.counts, 'stage that takes', 'stages that take')} steps, "
            f"found {len(each)} numbers as steps=. Give {'one number' if method.counts < 2 else 'at most as many'}."
        )
    if minutes is not None:
        a_time("minutes", minutes)
    return each


def as_goal(weights: Any, activations: Any, measure: str, plan: Any, **limits: Any) -> Goal | None:
    """What is wanted of a plan that is still to be made; None if nothing is limited.

    Raises:
        UsageError: a limit or a choice cannot be read, contradicts another, or there is a plan already.
    """
    given = [name for name, value in limits.items() if value is not None]
    if not given:
        return None
    if plan is not None:
        raise UsageError(f"Expected plan= or {given[0]}=, found both.")
    goal = Goal.parse(weights=weights, activations=activations, measure=measure, **limits)
    planning.check_goal(goal)
    return goal


def plan_within(
    goal: Goal,
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    method: Recipe,
    run: Run,
    *,
    cache: str | Path | None = None,
    state: Path | None = None,
) -> tuple[Planning, Scheme]:
    """The plan of a goal, and the scheme for what it leaves open."""
    points = planning.SHOWN if goal.max_drop is None else planning.POINTS
    how = planning.PlanningSettings(points=points, folder=None if cache is None else usable(Path(cache)))
    with run.timed("plan"):
        decided = planning.decide(teacher, scheme, images, goal, method, run, how, state=state)
    return decided, planning.open_scheme(scheme, goal)


def _check_instead(
    scheme: Scheme | None,
    goal: Goal | None,
    weights: Any,
    activations: Any,
    rules: Any,
    runtime: Any,
    measure: Any,
    limits: Mapping[str, str | float | None],
) -> None:
    """A scheme stands instead of bits, rules and runtime, a goal instead of limits and of several bits."""
    if not isinstance(runtime, str):
        raise UsageError(f"Expected the name of a runtime as runtime=, found {runtime!r}.")
    of_kind("scheme", scheme, Scheme, "a Scheme")
    of_kind("goal", goal, Goal, "a Goal")
    one_of("measure", measure, tuple(MEASURES))
    bits = {"weights": (weights, (None, "auto")), "activations": (activations, (8, "auto"))}
    planning.check_instead(scheme, bits, rules, runtime)
    wanted = {name: (value, (None,)) for name, value in limits.items()}
    check_alone("goal", goal, {**wanted, **bits, "measure": (measure, (MEASURE,))})


def _check_kinds(
    progress: Any, preprocessing: Any, output: Any, input_key: Any, skip_unreadable: Any, cache: Any
) -> None:
    check_progress(progress)
    if preprocessing is not None and not callable(preprocessing):
        raise UsageError(f"Expected a Preprocessing or a function as preprocessing=, found {preprocessing!r}.")
    of_kind("output", output, str, "the name of an output")
    of_kind("input_key", input_key, str, "the name of an entry")
    of_kind("skip_unreadable", skip_unreadable, bool, "True or False")
    if cache is not None:
        a_path("cache", cache)


def _as_run(
    method: Recipe, seed: int, device: str, progress: Progress, steps: Any, minutes: float | None, precision: Precision
) -> Run:
    """What the stages share, with the budget checked.

    Raises:
        UsageError: a number is out of range, or there is no such device or precision.
    """
    one_of("precision", precision, choices(Precision))
    seed = whole_number("seed", seed, least=0, below=SEEDS)
    each = check_budget(steps, minutes, method)
    if (steps is not None or minutes is not None) and not method.optimises:
        warnings.warn(f"Recipe '{method.name}' does not optimise: steps and minutes change nothing.", stacklevel=3)
    return Run(
        seed=seed,
        device=find_device(device),
        progress=progress,
        steps_each=each,
        minutes=minutes,
        precision=precision,
    )


def _as_scheme(weights: Any, activations: Any, rules: Sequence[str | Rule], runtime: str, *, planned: bool) -> Scheme:
    """The bits of all layers, 8 where a plan, or the tensors that need 16, will decide."""
    return Scheme(
        weights=8 if planned or weights == "auto" else parse_weight_bits(weights),
        activations=8 if planned or activations == "auto" else parse_activation_bits(activations),
        runtime=runtime,
        rules=tuple(map(_as_rule, rules)),
    )


def _as_rule(rule: str | Rule) -> Rule:
    if not isinstance(rule, str | Rule):
        raise UsageError(f"Expected rules such as 'head=w8a8', found {type(rule).__name__}.")
    return rule if isinstance(rule, Rule) else Rule.parse(rule)


def _as_plan(plan: Plan | str | Path | None, scheme: Scheme) -> Plan | None:
    """The plan, read and checked before the long work starts."""
    if plan is None:
        return None
    if not isinstance(plan, Plan | str | Path):
        raise UsageError(f"Expected a path of a plan.json, or a plan, as plan=, found {type(plan).__name__}.")
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    plan.scheme(scheme)
    return plan


def _record(
    model: Student,
    network: Model,
    method: Recipe,
    images: Images,
    run: Run,
    warned: list[str],
    plan: Planning | None,
    output: str | None,
) -> RunRecord:
    """Everything that is known of the run, once its network is frozen."""
    how = network.preprocessing
    return RunRecord(
        model=network.name,
        **totals(model),
        images=len(images),
        sha256=images.sha256,
        recipe=method.name,
        settings=method.settings(),
        scheme=model.scheme,
        device=str(run.device),
        seed=run.seed,
        seconds=run.seconds,
        layers=describe_layers(model),
        unquantized=model.unquantized,
        unfolded=model.teacher.unfolded if model.teacher else [],
        stages=run.records,
        outliers=run.outliers,
        warnings=warned,
        origin=Origin(
            reference=network.reference,
            settings=network.settings,
            output=output or network.output,
            preprocessing=how if isinstance(how, Preprocessing) else None,
            source=images.place,
            input_key=images.input_key,
            sha256=None if network.source is None else network.source.sha256,
        ),
        plan=plan,
        checked=run.checked,
    )
