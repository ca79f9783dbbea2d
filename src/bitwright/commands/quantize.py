"""`bitwright quantize`: a network and images in, a run folder out."""

from __future__ import annotations

import json
import re
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright import api, recipes
from bitwright.bits import planning
from bitwright.bits.goal import Goal
from bitwright.bits.plan import Plan, insert_plan
from bitwright.commands import inspect, plans, tables
from bitwright.commands.report import write_beside
from bitwright.commands.sources import (
    Settings,
    absolute_reference,
    absolute_source,
    check_labels,
    images_at,
    remove_empty,
)
from bitwright.errors import BitwrightError, UsageError
from bitwright.export.parity import export_checked
from bitwright.given import inputs as given
from bitwright.given.images import Images
from bitwright.given.models import Model, load_model
from bitwright.given.preprocessing import Preprocessing
from bitwright.measure.evaluation import evaluate, layer_sqnr, read_outputs_of
from bitwright.quant.scheme import Scheme
from bitwright.quantized import QuantizedModel
from bitwright.recipes import recipe as find_recipe
from bitwright.report.answers import Answers
from bitwright.run import folder as run_folder
from bitwright.run.files import write_text
from bitwright.run.result import command_line, peak_memory_bytes
from bitwright.run.state import begin, leave
from bitwright.sensitivity import diagnosis
from bitwright.stages.base import Precision, Run
from bitwright.terminal import Terminal, one_line, quiet_libraries

SQNR_IMAGES = 32
PARITY_IMAGES = 128
DECODE_BATCH = 64


@dataclass(frozen=True)
class Job:
    """The arguments of one quantization, as the command line takes them."""

    model: str
    images: str
    scheme: Scheme
    """With the plan in it."""
    recipe: str | None = None
    raise_few: bool = False
    """Whether the few activations that need 16 bits get them (``--activations auto``)."""
    plan: Plan | None = None
    plan_file: Path | None = None
    """Where the plan was read."""
    goal: Goal | None = None
    """Limits within which a plan is made first."""
    cache: Path | None = None
    samples: int | None = None
    steps: tuple[int, ...] | None = None
    minutes: float | None = None
    precision: Precision = "auto"
    evaluate: str | None = None
    labels: str | None = None
    out: Path | None = None
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    settings: Settings = field(default_factory=dict)
    """Of preprocessing."""
    skip_unreadable: bool = False
    resume: bool = False
    force: bool = False
    pictures: bool = True
    """Whether the report shows some of the images."""

    @property
    def method(self) -> str:
        """The recipe's name or file."""
        return self.recipe or recipes.DEFAULT


@dataclass(frozen=True)
class Inputs:
    """What a job names, found and checked."""

    network: Model
    calibration: Images
    evaluation: Images | None


def quantize(job: Job, terminal: Terminal) -> tuple[dict[str, Any], Path, BitwrightError | None]:
    """Does the whole job.

    Returns:
        What ``result.json`` holds, the run folder, and the error that kept ``model.onnx`` out of it, if one did.

    Raises:
        BitwrightError: anything else went wrong; then what an earlier command or this one has done is kept.
    """
    started = time.perf_counter()
    folder = (job.out or Path("runs") / default_name(job)).expanduser().absolute()
    with run_folder.writing(folder) as said:
        if said is not None:
            terminal.say(said)
        return _quantize_into(folder, job, terminal, started)


def _quantize_into(
    folder: Path, job: Job, terminal: Terminal, started: float
) -> tuple[dict[str, Any], Path, BitwrightError | None]:
    """The whole job, with the folder to itself; nothing in it is touched before the arguments are known to be right."""
    run_folder.check_target(folder, force=job.force, resume=job.resume)
    until = next(p for p in (folder, *folder.parents) if p.exists())
    terminal.log("start", command=job.model, images=job.images, recipe=job.method)
    state = folder / run_folder.STATE
    try:
        inputs = find_inputs(job, terminal)
        begin(state, command_line(), _settings(job), resume=job.resume)
        model = _quantize(job, inputs, state, terminal)
        answers = _measure(model, job, inputs, terminal)
        _diagnose(model, job, terminal)
        failure = _write(model, job, inputs, folder, terminal, started)
    except BaseException as error:
        _leave(folder, until, terminal, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    curve = plans.curve_beside(job.plan_file)
    write_beside(model, inputs.evaluation, answers, folder, terminal, pictures=job.pictures, curve=curve)
    return model.result, folder, failure


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
        terminal.say(f"What was done is kept in {_short(folder)}: the run's command with --resume goes on from there.")


def _settings(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on; the network and the images are compared by what they hold."""
    method = find_recipe(job.method)
    return {
        "recipe": method.name,
        "stages": method.settings()["stages"],
        "scheme": job.scheme.model_dump(mode="json"),
        "plan": None if job.plan is None else job.plan.model_dump(mode="json"),
        "goal": None if job.goal is None else str(job.goal),
        "samples": job.samples,
        "steps": job.steps,
        "minutes": job.minutes,
        "precision": job.precision,
        "seed": job.seed,
        "output": job.output,
    }


def default_name(job: Job) -> str:
    """Model, recipe and bits: the folder of a run that was not given one.

    Example:
        >>> default_name(Job("timm:resnet18@w.pt", "photos", Scheme(weights=4), "mse"))
        'resnet18-mse-w4a8'
    """
    name = re.sub(r"@.*", "", job.model).rpartition(":")[2] if ":" in job.model else Path(job.model).stem
    weights, activations = (b or "float" for b in _described_bits(job).values())
    return re.sub(r"[^\w.-]+", "_", f"{name}-{Path(job.method).stem}-w{weights}a{activations}")


def _described_bits(job: Job) -> dict[str, int | str | None]:
    if job.goal is None:
        return job.scheme.described_bits()
    choices = {"weights": job.goal.weights, "activations": job.goal.activations}
    return {what: "mixed" if len(bits) > 1 else next(iter(bits), None) for what, bits in choices.items()}


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """Numbers of steps, one for each stage that takes some.

    Raises:
        UsageError: the text is no list of whole numbers.

    Example:
        >>> parse_steps("300"), parse_steps("300,500")
        ((300,), (300, 500))
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"Expected a number of steps such as 300, or 300,500, found '{text}'.") from None


def find_inputs(job: Job, terminal: Terminal) -> Inputs:
    """Loads the model, opens the images, and finds what can be wrong with them before the long work starts."""
    api.check_budget(job.steps, job.minutes, find_recipe(job.method))
    given.find_device(job.device)
    if job.goal is not None:
        planning.check(job.goal)
    if job.labels is not None and job.evaluate is None:
        raise UsageError("Labels are used for evaluation only. Give the images they belong to with --evaluate.")
    terminal.begin("Loading the network")
    network = load_model(job.model, **job.settings)
    terminal.begin("Opening the images")
    calibration = images_at(job.images, network, skip_unreadable=job.skip_unreadable, settings=job.settings)
    evaluation = None
    if job.evaluate is not None:
        evaluation = images_at(
            job.evaluate,
            network,
            labels=job.labels,
            skip_unreadable=job.skip_unreadable,
            settings=job.settings,
        )
        if job.output is None:
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


def preview(job: Job, terminal: Terminal) -> QuantizedModel:
    """The network with quantizers that are not calibrated: what ``--dry-run`` shows."""
    inputs = find_inputs(job, terminal)
    terminal.begin("Capturing the network")
    if job.goal is not None:
        return _preview_planned(job, job.goal, inputs, terminal)
    model = api.preview(inputs.network, inputs.calibration, scheme=job.scheme, plan=job.plan, output=job.output)
    terminal.finish()
    return model


def _preview_planned(job: Job, goal: Goal, inputs: Inputs, terminal: Terminal) -> QuantizedModel:
    """Likewise, with the plan that the run would have."""
    data = given.calibration_images(inputs.calibration, inputs.network, job.samples, job.skip_unreadable)
    teacher = given.prepare_teacher(inputs.network, data, job.output)
    run = Run(seed=job.seed, device=given.find_device(job.device), progress=terminal.progress)
    method, cache = find_recipe(job.method), plans.scores(job.cache)
    plan, scheme, facts = api.plan_within(goal, teacher, job.scheme, data, method, run, cache=cache)
    teacher.graph.to("cpu")
    terminal.finish()
    model = insert_plan(teacher, plan, scheme)
    model.result["plan"] = facts
    return model


def _quantize(job: Job, inputs: Inputs, state: Path, terminal: Terminal) -> QuantizedModel:
    terminal.begin("Capturing the network")
    return api.quantize(
        inputs.network,
        inputs.calibration,
        job.method,
        activations="auto" if job.raise_few else 8,
        scheme=job.scheme,
        plan=job.plan,
        goal=job.goal,
        cache=None if job.goal is None else plans.scores(job.cache),
        samples=job.samples,
        steps=job.steps,
        minutes=job.minutes,
        precision=job.precision,
        seed=job.seed,
        device=job.device,
        output=job.output,
        progress=terminal.progress,
        state=state,
    )


def _measure(model: QuantizedModel, job: Job, inputs: Inputs, terminal: Terminal) -> Answers:
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
    data["calibration"]["source"] = absolute_source(job.images)
    data["evaluation"] = {
        "count": len(images),
        "sha256": images.sha256,
        "labelled": images.labels is not None or images.masks is not None,
        "source": absolute_source(job.evaluate or job.images),
        "same_as_calibration": inputs.evaluation is None,
    }
    model.result["seconds"]["evaluate"] = round(time.perf_counter() - started, 3)
    return answers


def _diagnose(model: QuantizedModel, job: Job, terminal: Terminal) -> None:
    """Where most was lost, and the rules that mend it; a run is not lost over what goes wrong here."""
    started, seconds = time.perf_counter(), model.result["seconds"]
    limit = diagnosis.budget(sum(seconds.values()))
    try:
        model.result["diagnosis"] = diagnosis.diagnose(
            model, seconds=limit, device=given.find_device(job.device), seed=job.seed, progress=terminal.progress
        )
    except Exception as error:
        model.result["diagnosis"] = None
        what = f"{type(error).__name__}: {one_line(str(error))}"
        warnings.warn(f"What was lost where could not be found out: {what}", stacklevel=2)
    terminal.finish()
    seconds["diagnosis"] = round(time.perf_counter() - started, 3)


def _write(
    model: QuantizedModel, job: Job, inputs: Inputs, folder: Path, terminal: Terminal, started: float
) -> BitwrightError | None:
    """The run folder, complete or not at all; without ``model.onnx`` where that cannot be, and then why."""
    with run_folder.staged(folder) as partial:
        run_folder.write_files(model, partial)
        failure = _export(model, inputs.evaluation, partial / run_folder.ONNX, terminal, force=job.force)
        result = model.result
        how = inputs.network.preprocessing
        result["model"] |= {
            "reference": absolute_reference(job.model),
            "settings": job.settings,
            "output": job.output or inputs.network.output,
            "preprocessing": how.model_dump(mode="json") if isinstance(how, Preprocessing) else None,
        }
        if failure is not None:
            terminal.warnings.append(one_line(str(failure)))
        if "plan" in result:
            plans.compare(result, terminal)
        result["warnings"] = list(terminal.warnings)
        result["seconds"]["total"] = time.perf_counter() - started
        result["seconds"] = {name: round(seconds, 3) for name, seconds in result["seconds"].items()}
        result["peak_memory_bytes"] = peak_memory_bytes()
        run_folder.write_result(model, partial)
        terminal.log("written", folder=str(folder))
        write_text(partial / run_folder.LOG, "".join(json.dumps(event) + "\n" for event in terminal.events))
    return failure


def _export(
    model: QuantizedModel, images: Images | None, path: Path, terminal: Terminal, *, force: bool
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
    terminal.show(*diagnosis.told(result.get("diagnosis")))
    files = ", ".join(sorted(p.name for p in folder.iterdir()))
    terminal.show(f"Written to {_short(folder)}: {files}")


def _short(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def dry_run(job: Job, terminal: Terminal) -> None:
    """Shows what would be quantized to how many bits; calibrates and writes nothing."""
    if job.out is not None:
        run_folder.check_target(job.out.expanduser().absolute(), force=job.force, resume=job.resume)
    model = preview(job, terminal)
    name = find_name(job)
    planned = {"plan": model.result["plan"]} if "plan" in model.result else {}
    terminal.result({**inspect.facts(model, name), **planned, "dry_run": True, "warnings": terminal.warnings})
    said = [*plans.sentences(planned), "Nothing was calibrated or written (--dry-run)."]
    terminal.show(*inspect.views(model, name), *said)


def find_name(job: Job) -> str:
    """The model's short name."""
    return default_name(job).rsplit("-", 2)[0]
