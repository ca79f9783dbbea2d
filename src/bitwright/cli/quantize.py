"""`bitwright quantize`: a network and images in, a run folder out."""

from __future__ import annotations

import json
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bitwright import api, recipes
from bitwright.bits import planning
from bitwright.bits.goal import Goal
from bitwright.bits.plan import insert_plan
from bitwright.cli import inspect, plans, tables
from bitwright.cli.calls import QuantizeCall
from bitwright.cli.report import write_beside
from bitwright.cli.sources import (
    absolute_reference,
    absolute_source,
    check_labels,
    evaluated,
    first_existing,
    images_at,
    remove_empty,
)
from bitwright.errors import BitwrightError, UsageError
from bitwright.export.parity import export_checked
from bitwright.given import inputs as given
from bitwright.given.images import Images
from bitwright.given.models import Model, load_model
from bitwright.given.preprocessing import Preprocessing
from bitwright.graph.student import Student
from bitwright.measure.evaluation import evaluate, layer_sqnr, read_outputs_of
from bitwright.recipes import recipe as find_recipe
from bitwright.report.answers import Answers
from bitwright.run import folder as run_folder
from bitwright.run.files import write_text
from bitwright.run.result import command_line, peak_memory_bytes
from bitwright.run.state import begin, leave
from bitwright.sensitivity import diagnosis
from bitwright.stages.base import Run
from bitwright.terminal import Terminal, one_line, quiet_libraries, short_path

SQNR_IMAGES = 32
PARITY_IMAGES = 128
DECODE_BATCH = 64


@dataclass(frozen=True)
class Inputs:
    """What a call names, found and checked."""

    network: Model
    calibration: Images
    evaluation: Images | None


class Outcome(NamedTuple):
    """What one quantization left."""

    result: dict[str, Any]
    """What ``result.json`` holds."""
    folder: Path
    failure: BitwrightError | None
    """What kept ``model.onnx`` out of the folder, if something did."""


def quantize(call: QuantizeCall, terminal: Terminal) -> None:
    """Does the whole job and shows its result, or what would be done with ``--dry-run``."""
    if call.dry_run:
        _dry_run(call, terminal)
        return
    made = make_run(call, terminal)
    terminal.result({**made.result, "run": str(made.folder)})
    show(made.result, made.folder, terminal)
    if made.failure is not None:
        raise made.failure


def make_run(call: QuantizeCall, terminal: Terminal) -> Outcome:
    """Does the whole job.

    Raises:
        BitwrightError: anything but the ONNX file went wrong; what was done until then is kept.
    """
    started = time.perf_counter()
    folder = (call.out or Path("runs") / default_name(call)).expanduser().absolute()
    with run_folder.writing(folder) as said:
        if said is not None:
            terminal.say(said)
        return _quantize_into(folder, call, terminal, started)


def _quantize_into(folder: Path, call: QuantizeCall, terminal: Terminal, started: float) -> Outcome:
    """The whole job, with the folder to itself; nothing in it is touched before the arguments are known to be right."""
    run_folder.check_target(folder, force=call.force, resume=call.resume)
    until = first_existing(folder)
    terminal.log("start", command=call.network.model, images=call.network.images, recipe=method_of(call))
    state = folder / run_folder.STATE
    try:
        inputs = find_inputs(call, terminal)
        begin(state, command_line(), _settings(call), resume=call.resume)
        model = _quantize(call, inputs, state, terminal)
        answers = _measure(model, call, inputs, terminal)
        _diagnose(model, call, terminal)
        failure = _write(model, call, inputs, folder, terminal, started)
    except BaseException as error:
        _leave(folder, until, terminal, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    curve = plans.curve_beside(call.bits.plan)
    write_beside(model, inputs.evaluation, answers, folder, terminal, pictures=not call.no_images, curve=curve)
    return Outcome(model.result, folder, failure)


def _leave(folder: Path, until: Path, terminal: Terminal, *, interrupted: bool) -> None:
    """After a failure of any kind: what was done stays, and a line says how to go on."""
    said = run_folder.finish_swap(folder)
    kept = leave(folder / run_folder.STATE)
    remove_empty(folder, until)
    if said is not None:
        terminal.say(said)
    elif interrupted:
        terminal.farewell = (
            "Interrupted. The same command with --resume goes on where it was."
            if kept
            else "Interrupted before the first stage was finished: nothing is kept."
        )
    elif kept:
        terminal.finish()
        terminal.say(
            f"What was done is kept in {short_path(folder)}: the run's command with --resume goes on from there."
        )


def _settings(call: QuantizeCall) -> dict[str, Any]:
    """What must be the same for a run to go on; the network and the images are compared by what they hold."""
    method = find_recipe(method_of(call))
    return {
        "recipe": method.name,
        "stages": method.settings()["stages"],
        "scheme": call.scheme.model_dump(mode="json"),
        "plan": None if call.bits.planned is None else call.bits.planned.model_dump(mode="json"),
        "goal": None if call.goal is None else str(call.goal),
        "samples": call.data.samples,
        "steps": call.budget.numbers,
        "minutes": call.budget.minutes,
        "precision": call.budget.number_format,
        "seed": call.seed,
        "output": call.output,
    }


def method_of(call: QuantizeCall) -> str:
    """The recipe's name or file."""
    return call.recipe or recipes.DEFAULT


def default_name(call: QuantizeCall) -> str:
    """Model, recipe and bits: the folder of a run that was not given one.

    Example:
        >>> from bitwright.cli.options import NetworkOptions
        >>> default_name(QuantizeCall(NetworkOptions("timm:resnet18@w.pt", "photos"), "mse", weights="4"))
        'resnet18-mse-w4a8'
    """
    model = call.network.model
    name = re.sub(r"@.*", "", model).rpartition(":")[2] if ":" in model else Path(model).stem
    weights, activations = (b or "float" for b in _described_bits(call).values())
    return re.sub(r"[^\w.-]+", "_", f"{name}-{Path(method_of(call)).stem}-w{weights}a{activations}")


def _described_bits(call: QuantizeCall) -> dict[str, int | str | None]:
    if call.goal is None:
        return call.scheme.described_bits()
    choices = {"weights": call.goal.weights, "activations": call.goal.activations}
    return {what: "mixed" if len(bits) > 1 else next(iter(bits), None) for what, bits in choices.items()}


def find_inputs(call: QuantizeCall, terminal: Terminal) -> Inputs:
    """Loads the model, opens the images, and finds what can be wrong with them before the long work starts."""
    api.check_budget(call.budget.numbers, call.budget.minutes, find_recipe(method_of(call)))
    given.find_device(call.device)
    if call.goal is not None:
        planning.check_goal(call.goal)
    if call.data.labels is not None and call.data.evaluate is None:
        raise UsageError("Labels are used for evaluation only. Give the images they belong to with --evaluate.")
    terminal.begin("Loading the network")
    network = load_model(call.network.model, **call.reading.preprocessing)
    terminal.begin("Opening the images")
    calibration = images_at(call.network.images, network, call.reading)
    evaluation = None
    if call.data.evaluate is not None:
        evaluation = images_at(call.data.evaluate, network, call.reading, labels=call.data.labels)
        if call.output is None:
            check_labels(network, evaluation)
        decode(evaluation, terminal)
    terminal.finish()
    return Inputs(network, calibration, evaluation)


def decode(images: Images, terminal: Terminal) -> None:
    """Decodes every image, so that a corrupt one is found before the long work; what fits in memory is kept."""
    done = 0
    for batch in images.batches(DECODE_BATCH):
        done += len(batch)
        terminal.progress("Decoding the images to evaluate", done, len(images))


def preview(call: QuantizeCall, terminal: Terminal) -> Student:
    """The network with quantizers that are not calibrated: what ``--dry-run`` shows."""
    inputs = find_inputs(call, terminal)
    terminal.begin("Capturing the network")
    if call.goal is not None:
        return _preview_planned(call, call.goal, inputs, terminal)
    plan = call.bits.planned
    model = api.preview(inputs.network, inputs.calibration, scheme=call.scheme, plan=plan, output=call.output)
    terminal.finish()
    return model


def _preview_planned(call: QuantizeCall, goal: Goal, inputs: Inputs, terminal: Terminal) -> Student:
    """The same network with the bits of the plan that the run would make."""
    skip = call.reading.skip_unreadable
    data = given.calibration_images(inputs.calibration, inputs.network, call.data.samples, skip)
    teacher = given.prepare_teacher(inputs.network, data, call.output)
    run = Run(seed=call.seed, device=given.find_device(call.device), progress=terminal.progress)
    method, cache = find_recipe(method_of(call)), plans.scores(call.cache)
    plan, scheme, facts = api.plan_within(goal, teacher, call.scheme, data, method, run, cache=cache)
    teacher.graph.to("cpu")
    terminal.finish()
    model = insert_plan(teacher, plan, scheme)
    model.result["plan"] = facts
    return model


def _quantize(call: QuantizeCall, inputs: Inputs, state: Path, terminal: Terminal) -> Student:
    terminal.begin("Capturing the network")
    return api.quantize(
        inputs.network,
        inputs.calibration,
        method_of(call),
        activations="auto" if call.raise_few else 8,
        scheme=call.scheme,
        plan=call.bits.planned,
        goal=call.goal,
        cache=None if call.goal is None else plans.scores(call.cache),
        samples=call.data.samples,
        steps=call.budget.numbers,
        minutes=call.budget.minutes,
        precision=call.budget.number_format,
        seed=call.seed,
        device=call.device,
        output=call.output,
        progress=terminal.progress,
        state=state,
    )


def _measure(model: Student, call: QuantizeCall, inputs: Inputs, terminal: Terminal) -> Answers:
    """Accuracy, fidelity and the noise of every layer into the result; which answers differ, for the report."""
    started = time.perf_counter()
    images = inputs.evaluation or model.calibration
    assert images is not None
    readings = read_outputs_of(model, images)
    answers = Answers(model.outputs, readings)
    model.result |= evaluate(model, images, progress=terminal.progress, each=answers.update, readings=readings)
    terminal.begin("Measuring every layer")
    noise = layer_sqnr(model, images.batch(range(min(SQNR_IMAGES, len(images)))))
    terminal.finish()
    for row in model.result["layers"]:
        row["sqnr_db"] = noise.get(row["name"])
    data = model.result["data"]
    data["calibration"]["source"] = absolute_source(call.network.images)
    data["evaluation"] = {
        **evaluated(images, call.data.evaluate or call.network.images),
        "same_as_calibration": inputs.evaluation is None,
    }
    model.result["seconds"]["evaluate"] = round(time.perf_counter() - started, 3)
    return answers


def _diagnose(model: Student, call: QuantizeCall, terminal: Terminal) -> None:
    """Where most was lost, and the rules that mend it; a run is not lost over what goes wrong here."""
    started, seconds = time.perf_counter(), model.result["seconds"]
    limit = diagnosis.budget(sum(seconds.values()))
    try:
        model.result["diagnosis"] = diagnosis.diagnose(
            model, seconds=limit, device=given.find_device(call.device), seed=call.seed, progress=terminal.progress
        )
    except Exception as error:
        model.result["diagnosis"] = None
        what = f"{type(error).__name__}: {one_line(str(error))}"
        warnings.warn(f"The layers that lose most could not be found: {what}", stacklevel=2)
    terminal.finish()
    seconds["diagnosis"] = round(time.perf_counter() - started, 3)


def _write(
    model: Student, call: QuantizeCall, inputs: Inputs, folder: Path, terminal: Terminal, started: float
) -> BitwrightError | None:
    """The run folder, complete or not at all; without ``model.onnx`` where that cannot be, and then why."""
    with run_folder.staged(folder) as partial:
        run_folder.write_files(model, partial)
        failure = _export(model, inputs.evaluation, partial / run_folder.ONNX, terminal, force=call.force)
        result = model.result
        how = inputs.network.preprocessing
        result["model"] |= {
            "reference": absolute_reference(call.network.model),
            "settings": call.reading.preprocessing,
            "output": call.output or inputs.network.output,
            "preprocessing": how.model_dump(mode="json") if isinstance(how, Preprocessing) else None,
        }
        if failure is not None:
            terminal.warnings.append(one_line(str(failure)))
        if "plan" in result:
            plans.record_outcome(result, terminal)
        result["warnings"] = list(terminal.warnings)
        result["seconds"]["total"] = time.perf_counter() - started
        result["seconds"] = {name: round(seconds, 3) for name, seconds in result["seconds"].items()}
        result["peak_memory_bytes"] = peak_memory_bytes()
        run_folder.write_result(model, partial)
        terminal.log("written", folder=str(folder))
        write_text(partial / run_folder.LOG, "".join(json.dumps(event) + "\n" for event in terminal.events))
    return failure


def _export(
    model: Student, images: Images | None, path: Path, terminal: Terminal, *, force: bool
) -> BitwrightError | None:
    """Writes and checks the ONNX file; what went wrong is returned, so that hours of work are not thrown away."""
    started = time.perf_counter()
    terminal.begin("Writing ONNX and checking it in ONNX Runtime")
    failure: BitwrightError | None = None
    parity, size = None, None
    try:
        with quiet_libraries():
            parity = export_checked(model, path, images, force=force, count=PARITY_IMAGES).to_dict()
        size = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
    except BitwrightError as error:
        failure = error
    except Exception as error:
        failure = BitwrightError(
            f"The network could not be written as ONNX: {type(error).__name__}: {one_line(str(error))}"
        )
        failure.__cause__ = error
    if failure is not None:
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink()
    terminal.finish()
    model.result["parity"] = parity
    model.result["size"]["onnx_bytes"] = size
    model.result["seconds"]["export"] = time.perf_counter() - started
    return failure


def show(result: dict[str, Any], folder: Path, terminal: Terminal) -> None:
    """The result as people read it."""
    terminal.show(tables.outcome(result), *tables.fidelity_notes(result), *plans.sentences(result))
    if result["data"]["evaluation"]["same_as_calibration"]:
        terminal.show("Measured on the calibration images; name others with --evaluate.")
    terminal.show(*diagnosis.diagnosis_lines(result.get("diagnosis")))
    files = ", ".join(sorted(p.name for p in folder.iterdir()))
    terminal.show(f"Written to {short_path(folder)}: {files}")


def _dry_run(call: QuantizeCall, terminal: Terminal) -> None:
    """Shows what would be quantized to how many bits; calibrates and writes nothing."""
    if call.out is not None:
        run_folder.check_target(call.out.expanduser().absolute(), force=call.force, resume=call.resume)
    model = preview(call, terminal)
    name = default_name(call).rsplit("-", 2)[0]
    planned = {"plan": model.result["plan"]} if "plan" in model.result else {}
    terminal.result({**inspect.facts(model, name), **planned, "dry_run": True, "warnings": terminal.warnings})
    said = [*plans.sentences(planned), "Nothing was calibrated or written (--dry-run)."]
    terminal.show(*inspect.views(model, name), *said)
