"""`bitwright quantize`: a network and images in, a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bitwright import api, together
from bitwright.bits import planning
from bitwright.cli import inspect, plans, tables
from bitwright.cli.calls import QuantizeCall
from bitwright.cli.sources import decode_images, images_at
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.given.inputs import find_device
from bitwright.given.models import Model, load_model
from bitwright.graph.student import Student
from bitwright.measure.evaluation import check_truth
from bitwright.measure.tasks import Scoring
from bitwright.recipes import DEFAULT
from bitwright.recipes import recipe as find_recipe
from bitwright.run import folder as run_folder
from bitwright.run import job
from bitwright.run.lock import command_line
from bitwright.run.result import RunResult
from bitwright.run.state import begin
from bitwright.sensitivity import diagnosis
from bitwright.terminal import Terminal
from bitwright.words import short_path


class Inputs(NamedTuple):
    """What a call names, found and checked."""

    network: Model
    calibration: Images
    evaluation: Images | None


def quantize(call: QuantizeCall, terminal: Terminal) -> None:
    """Does the whole job and shows its result, or what would be done with ``--dry-run``.

    Raises:
        BitwrightError: the job failed, or no ONNX file could be written beside the rest.
    """
    if call.dry_run:
        _dry_run(call, terminal)
        return
    with together.shared_job():
        made, first = make_run(call, terminal), together.is_first()
    if not first:
        return
    terminal.result({**made.result, "run": str(made.folder)})
    show(RunResult.read(made.result), made.folder, terminal)
    if made.failure is not None:
        raise made.failure


def make_run(call: QuantizeCall, terminal: Terminal) -> job.Done:
    """Does the whole job.

    Raises:
        BitwrightError: anything but the ONNX file went wrong; what was done until then is kept.
    """
    folder = (call.out or Path("runs") / call.folder_name).expanduser().absolute()

    def make(state: Path) -> tuple[Student, job.Wanted]:
        terminal.log("start", command=call.network.model, images=call.network.images, recipe=call.recipe or DEFAULT)
        inputs = find_inputs(call, terminal)
        if together.is_first():
            begin(state, command_line(), _settings(call), resume=call.resume)
        terminal.begin("Capturing the network")
        model = api.quantize(
            inputs.network,
            inputs.calibration,
            call.recipe,
            activations="auto" if call.raise_few else 8,
            goal=call.goal,
            samples=call.data.samples,
            steps=call.budget.numbers,
            minutes=call.budget.minutes,
            precision=call.budget.number_format,
            device=call.device,
            state=state,
            **_shared(call, terminal),
        )
        pictures, plan = not call.no_images, call.bits.plan
        return model, job.Wanted(
            inputs.evaluation,
            _scoring(call, inputs.network, inputs.evaluation),
            evaluate=True,
            diagnosis=not call.no_diagnosis,
            onnx=True,
            report=not call.no_report,
            pictures=pictures,
            plan=plan,
            force=call.force,
            checked=call.file_check,
        )

    return job.do(folder, make, terminal, force=call.force, resume=call.resume)


def _scoring(call: QuantizeCall, network: Model, images: Images | None) -> Scoring:
    """What measures the result; a task or metric that only the drop needs has no truth to be measured against."""
    found = call.data.compared.beside(network)
    known = images is not None and not (images.labels is None and images.truth is None)
    return found if known or call.limits.max_drop is None else Scoring(beside=found.beside)


def _shared(call: QuantizeCall, terminal: Terminal) -> dict[str, Any]:
    """Arguments of the job and of its preview."""
    cache = None if call.goal is None else plans.scores(call.cache)
    named = {"scheme": call.scheme, "plan": call.bits.planned, "seed": call.seed, "output": call.output}
    return {**named, "cache": cache, "progress": terminal.progress}


def _settings(call: QuantizeCall) -> dict[str, Any]:
    """What must be the same for a run to go on; the network and the images are compared by what they hold."""
    method, compared = find_recipe(call.recipe), call.data.compared
    scored = call.goal is not None and call.goal.scored is not None
    return {
        "recipe": method.name,
        "stages": method.settings()["stages"],
        "scheme": call.scheme.model_dump(mode="json"),
        "plan": None if call.bits.planned is None else call.bits.planned.model_dump(mode="json"),
        "goal": None if call.goal is None else str(call.goal),
        **({"task": compared.task, "metric": compared.metric, "decode": compared.decode} if scored else {}),
        "samples": call.data.samples,
        "steps": call.budget.numbers,
        "minutes": call.budget.minutes,
        "precision": call.budget.number_format,
        "seed": call.seed,
        "output": call.output,
    }


def check_shared(call: QuantizeCall) -> None:
    """Finds what is wrong with a call whatever its recipe is.

    Raises:
        UsageError: there is no such device, or there are labels of nothing.
    """
    find_device(call.device)
    given = [k for k, v in (("labels", call.data.labels), *vars(call.data.compared).items()) if isinstance(v, str)]
    if call.limits.max_drop is not None and call.data.compared.named:
        given = [k for k in given if k not in {"task", "metric", "decode"}]
    if given and call.data.evaluate is None:
        raise UsageError(
            f"{given[0]}= is used for evaluation only. Give the images that it belongs to with --evaluate."
            if given[0] != "labels"
            else "Labels are used for evaluation only. Give the images they belong to with --evaluate."
        )


def find_inputs(call: QuantizeCall, terminal: Terminal) -> Inputs:
    """Loads the model, opens the images, and finds what can be wrong with them before the long work starts."""
    api.check_budget(call.budget.numbers, call.budget.minutes, find_recipe(call.recipe))
    check_shared(call)
    if call.goal is not None:
        planning.check_goal(call.goal)
    terminal.begin("Loading the network")
    network = load_model(call.network.model, **call.reading.preprocessing)
    terminal.begin("Opening the images")
    calibration = images_at(call.network.images, network, call.reading)
    evaluation = None
    if call.data.evaluate is not None:
        compared = call.data.compared
        evaluation = images_at(
            call.data.evaluate, network, call.reading, labels=call.data.labels, class_map=compared.class_map
        )
        if call.output is None:
            check_truth(network, network.completed(evaluation), _scoring(call, network, evaluation))
        decode_images(evaluation, terminal)
        evaluation = network.completed(evaluation)
    terminal.finish()
    return Inputs(network, calibration, evaluation)


def show(result: RunResult, folder: Path, terminal: Terminal) -> None:
    """The result as people read it."""
    notes = [*tables.fidelity_notes(result.evaluation.outputs), *tables.scoring_notes(result.evaluation)]
    terminal.show(tables.outcome(result), *notes, *plans.sentences(result.plan))
    if result.evaluated_on.same_as_calibration:
        terminal.show("Measured on the calibration images; name others with --evaluate.")
    terminal.show(*diagnosis.diagnosis_lines(result.diagnosis))
    files = ", ".join(sorted(p.name for p in folder.iterdir()))
    terminal.show(f"Written to {short_path(folder)}: {files}")


def _dry_run(call: QuantizeCall, terminal: Terminal) -> None:
    """Shows what would be quantized to how many bits; calibrates and writes nothing."""
    if call.out is not None:
        run_folder.check_target(call.out.expanduser().absolute(), force=call.force, resume=call.resume)
    inputs = find_inputs(call, terminal)
    terminal.begin("Capturing the network")
    images, skip = inputs.calibration, call.reading.skip_unreadable
    model = api.preview(
        *(inputs.network, images, call.recipe),
        goal=call.goal,
        samples=call.data.samples,
        device=call.device,
        skip_unreadable=skip,
        **_shared(call, terminal),
    )
    terminal.finish()
    name, plan = call.folder_name.rsplit("-", 2)[0], model.result.get("plan")
    planned = {} if plan is None else {"plan": plan}
    found = inspect.network_shape(model, name)
    terminal.result({**inspect.facts(found), **planned, "dry_run": True, "warnings": terminal.warnings})
    said = [*plans.sentences(RunResult.read(planned).plan), "Nothing was calibrated or written (--dry-run)."]
    terminal.show(*inspect.views(found), *said)
