"""The whole job: what is done with a quantized network until its folder is complete.

Measured, diagnosed, written with its ONNX file, shown on a page: what costs time only where it is asked for.
:func:`do` is the job from an empty folder on, :func:`save` that of a network which is there already.
"""

from __future__ import annotations

import copy
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitwright import report as pages
from bitwright import together, words
from bitwright.errors import BitwrightError, UsageError, one_line, quiet_libraries, step
from bitwright.export.formats import named, write_format
from bitwright.export.parity import CHECKED_IMAGES, LEAST_IMAGES, export_checked, images_of
from bitwright.export.verdict import Parity
from bitwright.given.arguments import a_path, of_kind, one_of
from bitwright.given.images import Images
from bitwright.given.inputs import find_device
from bitwright.given.scripts import reference_to
from bitwright.graph.devices import device_of, undisturbed
from bitwright.graph.student import Student, moved_to
from bitwright.graph.work import how_many, said
from bitwright.measure.class_maps import GivenClassMap
from bitwright.measure.evaluation import (
    NOTHING_SAID,
    LayerNoise,
    evaluation_of,
    images_to_measure,
    read_outputs_of,
)
from bitwright.measure.metrics import Evaluation
from bitwright.measure.task import Decode
from bitwright.measure.tasks import Scoring, task_of
from bitwright.memory import keep_pages, return_pages
from bitwright.progress import Progress, watched
from bitwright.report import facts
from bitwright.report.answers import Answers
from bitwright.run import folder as run_folder
from bitwright.run.about import peak_memory_bytes
from bitwright.run.files import first_existing, remove_empty, target_file, write_text
from bitwright.run.journal import Journal
from bitwright.run.record import EvaluatedImages, add_evaluation, add_parity, add_plan_outcome
from bitwright.run.state import leave
from bitwright.sensitivity import diagnosis

BATCH = 16
"""Images at a time, of which the activations of most networks stay in the memory that was faulted in."""
SQNR_IMAGES, MEASURED_IMAGES = 32, 32
"""Images on which the noise of layers is measured, and calibration images on which a large network is at least."""

CHECKS = {"full": CHECKED_IMAGES, "fast": 3}
"""Images on which an exported file is compared, by the thoroughness of the check."""


@dataclass(frozen=True)
class Wanted:
    """What is done with a quantized network besides writing it; each part costs time.

    Attributes:
        images: to measure on; those it was calibrated on if not given.
        scoring: how outputs are scored against what is known of the images.
        evaluate: measure accuracy, fidelity and the noise of every layer.
        diagnosis: find out where most was lost, and the rules that mend it.
        onnx: write ``model.onnx`` and check it in ONNX Runtime on real images.
        report: write ``report.html``.
        pictures: show on the page the few images whose answers differ.
        plan: file that the bits came from; the page shows the curve beside it.
        force: keep an ONNX file that fails its check.
        checked: how thoroughly the ONNX file is compared: ``full``, or ``fast``, on a few images.
    """

    images: Images | None = None
    scoring: Scoring = NOTHING_SAID
    evaluate: bool = False
    diagnosis: bool = False
    onnx: bool = False
    report: bool = False
    pictures: bool = True
    plan: Path | None = None
    force: bool = False
    checked: str = "full"

    @property
    def something(self) -> bool:
        """Whether there is anything to do but to write the network."""
        return self.evaluate or self.diagnosis or self.onnx or self.report

    def check(self, model: Student) -> None:
        """Finds what is missing before anything takes long.

        Raises:
            UsageError: the model lacks its float network, or there are no images.
        """
        if model.teacher is None and (self.diagnosis or self.report):
            what = "diagnosis" if self.diagnosis else "report"
            raise UsageError(f"Expected a network that was just quantized for {what}=True, found one without its float "
                             "network. Use what bitwright.quantize returned.")  # fmt: skip
        if self.images is None and model.calibration is None and self.something:
            raise UsageError("Expected images as evaluate=: a network that was loaded has no calibration images.")


class Done(NamedTuple):
    """What one job left."""

    result: dict[str, Any]
    """What ``result.json`` holds."""
    folder: Path
    failure: BitwrightError | None
    """What kept ``model.onnx`` out of the folder, if something did."""


Make = Callable[[Path], tuple[Student, Wanted]]
"""Gives the network that is written and what is wanted with it; takes the folder for what a later call goes on from."""


@undisturbed()
def do(folder: Path, make: Make, journal: Journal, *, force: bool = False, resume: bool = False) -> Done:
    """The job from an empty folder to a complete one; nothing is lost over a file that cannot be exported.

    Args:
        folder: to write, of which nobody else writes meanwhile.
        make: quantizes, or returns what is quantized.
        journal: of what happens.
        force: replace a run that is there.
        resume: go on with an unfinished one.

    Raises:
        UsageError: the folder cannot be written, or holds something.
        BitwrightError: anything but the ONNX file went wrong; what was done until then is kept.
    """
    started = time.perf_counter()
    if not together.is_first():
        return _help(folder, make, journal)
    with run_folder.writing(folder) as said, keep_pages():
        if said is not None:
            journal.say(said)
        run_folder.check_target(folder, force=force, resume=resume)
        with _kept(folder, journal):
            model, wanted = make(folder / run_folder.STATE)
            wanted.check(model)
            answers = add_measurements(model, wanted, journal) if wanted.evaluate or wanted.report else None
            with together.by_itself():
                if wanted.diagnosis:
                    add_diagnosis(model, journal)
                failure = _write(model, folder, wanted, journal, started)
            if wanted.report:
                journal.farewell = (
                    f"Interrupted. The run is complete but for its page: bitwright report {shlex.quote(str(folder))}"
                )
        if answers is not None and wanted.report:
            _show(model, folder, wanted, answers, journal)
    return Done(model.result, folder, failure)


def _help(folder: Path, make: Make, journal: Journal) -> Done:
    """The part of the job that other processes take: all that is dealt out; the first one writes and shows it."""
    model, wanted = make(folder / run_folder.STATE)
    if wanted.evaluate or wanted.report:
        add_measurements(model, wanted, journal)
    return Done(model.result, folder, None)


@step("Saving")
def save(
    model: Student,
    folder: str | Path,
    *,
    force: bool = False,
    evaluate: Any = None,
    labels: Any = None,
    task: str | None = None,
    metric: Any = None,
    decode: Decode | None = None,
    class_map: GivenClassMap = None,
    input_key: str | None = None,
    diagnosis: bool = False,
    onnx: bool = False,
    report: bool = False,
    pictures: bool = True,
    check: str = "full",
    progress: Progress | bool = True,
) -> Path:
    """Writes a run folder: the model (frozen first), its plan and its result, and what else is asked for.

    With ``evaluate=``, ``diagnosis=True``, ``onnx=True`` and ``report=True`` it holds all that ``bitwright quantize``
    leaves.

    Args:
        model: as :func:`bitwright.quantize` or :func:`bitwright.load` returns it.
        folder: to write.
        force: replace a run that is there, and keep an ONNX file that fails its check.
        evaluate: images to measure accuracy, fidelity and the noise of every layer on; True for those it was
            calibrated on, of which a large network takes fewer.
        labels: of these images, as for :func:`bitwright.evaluate`, like the next four.
        task: that the labels belong to.
        metric: of the user's own, instead of the task's figures.
        decode: turns outputs into boxes or maps.
        class_map: classes by the numbers or names in masks and boxes.
        input_key: which of several entries the images are; see :func:`bitwright.load_images`.
        diagnosis: find out where most was lost, and the rules that mend it.
        onnx: write ``model.onnx`` and check it in ONNX Runtime.
        report: write ``report.html``; measures on the calibration images unless others are given.
        pictures: show on the page the few images whose answers differ.
        check: ``full``, or ``fast``: the ONNX file is compared on three images instead of 32, of a large network 8.
        progress: as for :func:`bitwright.quantize`.

    Raises:
        UsageError: the folder is not empty (unless ``force``) or cannot be written, or something is missing for what
            is asked for.
        ParityError: the ONNX file computes something else; the folder is complete without it.
    """
    place = a_path("folder", folder)
    switches = {"force": force, "diagnosis": diagnosis, "onnx": onnx, "report": report, "pictures": pictures}
    for name, value in switches.items():
        of_kind(name, value, bool, "True or False")
    measured = evaluate is not None and evaluate is not False
    if labels is not None and (evaluate is True or not measured):
        raise UsageError(f"Expected images as evaluate= beside labels=, found {evaluate!r}.")
    images = None
    if measured and evaluate is not True:
        images = images_to_measure(model, evaluate, labels, class_map, input_key=input_key, decode=decode)
    scoring = Scoring(task, metric, decode)
    scoring.check()
    one_of("check", check, tuple(CHECKS))
    wanted = Wanted(images, scoring, measured, diagnosis, onnx, report, pictures, force=force, checked=check)
    with watched(progress) as told:
        journal = Journal(told)
        journal.warnings += model.result.get("warnings", [])
        with journal.listening(), _own_result(model):
            done = do(place, lambda _: (model, wanted), journal, force=force)
    if done.failure is not None:
        raise done.failure
    return place


@undisturbed()
@step("The export")
def export(
    model: Student,
    path: str | Path,
    images: Any = None,
    *,
    to: str = "onnx",
    force: bool = False,
    check: str = "full",
) -> Parity:
    """Writes a file for a runtime once it passed its check there.

    Args:
        model: frozen on the way.
        path: of the file; a format of several files writes the others beside it.
        images: for the check, as everywhere; the calibration images if not given.
        to: the format: ``onnx``, ``openvino``, ``pt2``, ``tensorrt``, ``executorch``, ``tables`` or ``encodings``.
        force: keep a file that fails the check.
        check: ``full``, or ``fast``, on three images, of an ONNX file.

    Raises:
        UsageError: there are no images, no such format, or something that the format lacks.
        ParityError: the file computes something else; it is not written, unless ``force``.
    """
    place = a_path("path", path)
    of_kind("force", force, bool, "True or False")
    count = how_many(model, CHECKS[one_of("check", check, tuple(CHECKS))], LEAST_IMAGES)
    made = named(to)
    with moved_to(model, "cpu"):
        if to == "onnx":
            parity = export_checked(model, place, images, force=force, count=count)
        else:
            if made.check is not None:
                made.check(model)
            place = target_file(place, made.suffix, force=force)
            parity, _ = write_format(model, to, place, images_of(model, images), force=force)
    run_folder.renew_checksum(place)
    return parity


@contextmanager
def _own_result(model: Student) -> Iterator[None]:
    """Inside, a result of the folder alone: without what is said of files in others, and gone afterwards."""
    kept = model.result
    model.result = copy.deepcopy({key: value for key, value in kept.items() if key not in {"parity", "exports"}})
    size = model.result.get("size", {})
    for key in [key for key in size if key not in {"float_bytes", "packed_bytes"}]:
        del size[key]
    try:
        yield
    finally:
        model.result = kept


@contextmanager
def _kept(folder: Path, journal: Journal) -> Iterator[None]:
    """After a failure of any kind what was done stays, and a line says how to go on."""
    until = first_existing(folder)
    try:
        yield
    except BaseException as error:
        said = run_folder.finish_swap(folder)
        kept = leave(folder / run_folder.STATE)
        remove_empty(folder, until)
        if said is not None:
            journal.say(said)
        elif isinstance(error, KeyboardInterrupt):
            journal.farewell = (
                "Interrupted. The same command with --resume goes on where it was."
                if kept
                else "Interrupted before the first stage was finished: nothing is kept."
            )
        elif kept:
            journal.finish()
            journal.say(
                f"What was done is kept in {words.short_path(folder)}: the run's command with --resume goes on from "
                "there."
            )
        raise


def add_measurements(model: Student, wanted: Wanted, journal: Journal) -> Answers:
    """Accuracy, fidelity and the noise of every layer into the result; which answers differ, for the page.

    Args:
        model: with its float network, or loaded without, and then its fidelity stays unknown.
        wanted: the images to measure on, those it was calibrated on if not given, and how they are scored.
        journal: of what happens.
    """
    started = time.perf_counter()
    given, images = wanted.images, _measured(model, wanted)
    readings = read_outputs_of(model, images)
    answers = Answers(model.outputs, readings)
    noise = None if model.teacher is None else LayerNoise(model, SQNR_IMAGES)
    with moved_to(model, _device(model)):
        found = evaluation_of(
            model,
            images,
            readings,
            scoring=wanted.scoring,
            batch=BATCH,
            progress=_naming(images, model.calibration if given is None else images, journal),
            each=answers.update,
            noise=noise,
        )
    found = _with_decoder(found, wanted.scoring, images)
    answers.pictured = found.pictured
    decibels = {} if noise is None else noise.decibels()
    add_evaluation(model.result, found, EvaluatedImages.of(images), decibels, same_as_calibration=given is None)
    _took(model, "evaluate", started)
    return answers


def _naming(images: Images, all_images: Images | None, journal: Journal) -> Progress:
    """The journal's progress, which names the number of images where it is not all of them."""
    usual = len(images) if all_images is None else len(all_images)
    return lambda what, *rest: journal.progress(said(what, len(images), usual), *rest)


def _measured(model: Student, wanted: Wanted) -> Images:
    """The images to measure on: those that are given, else those it was calibrated on, fewer of a large network."""
    if wanted.images is not None:
        return wanted.images
    images = model.calibration
    assert images is not None
    count = how_many(model, len(images), MEASURED_IMAGES)
    return images if count == len(images) else images.sample(count)


def _with_decoder(found: Evaluation, scoring: Scoring, images: Images) -> Evaluation:
    """The same with the name of the user's function that decoded outputs."""
    if found.loss is None:
        return found
    return replace(found, loss=replace(found.loss, decode=reference_to(scoring.decoder(task_of(images, scoring.task)))))


def _device(model: Student) -> torch.device:
    """Where it was made, if that is here; else where it is."""
    try:
        return find_device(model.result["device"])
    except (KeyError, UsageError):
        return device_of(model.graph)


def add_diagnosis(model: Student, journal: Journal) -> None:
    """Where most was lost, and the rules that mend it; a run is not lost over what goes wrong here."""
    started, result = time.perf_counter(), model.result
    limit = diagnosis.budget(sum(result["seconds"].values()))
    where, seed = _device(model), result["seed"]
    try:
        found = diagnosis.diagnose(model, seconds=limit, device=where, seed=seed, progress=journal.progress)
        result["diagnosis"] = asdict(found)
    except Exception as error:
        result["diagnosis"] = None
        what = f"{type(error).__name__}: {one_line(str(error))}"
        warnings.warn(f"What was lost where could not be found out: {what}", stacklevel=2)
    journal.finish()
    _took(model, "diagnosis", started)


def _took(model: Student, what: str, started: float) -> None:
    return_pages()
    model.result.setdefault("seconds", {})[what] = round(time.perf_counter() - started, 3)


def _write(model: Student, folder: Path, wanted: Wanted, journal: Journal, started: float) -> BitwrightError | None:
    """The run folder, complete or not at all; without ``model.onnx`` where that cannot be, and then why."""
    failure = None
    model.freeze()
    with moved_to(model, "cpu"), run_folder.staged(folder) as partial:
        run_folder.write_files(model, partial)
        if wanted.onnx:
            failure = _export(model, wanted, partial / run_folder.ONNX, journal)
        if wanted.something:
            _conclude(model, failure, journal, started)
            journal.log("written", folder=str(folder))
            write_text(partial / run_folder.LOG, journal.lines())
        run_folder.write_result(model, partial)
    return failure


def _conclude(model: Student, failure: BitwrightError | None, journal: Journal, started: float) -> None:
    """What the result says of the job as a whole: warnings, time, memory, and what became of the plan."""
    result = model.result
    if failure is not None:
        journal.warnings.append(one_line(str(failure)))
    for text in add_plan_outcome(result):
        warnings.warn(text, stacklevel=2)
    result["warnings"] = list(journal.warnings)
    seconds = {name: value for name, value in result["seconds"].items() if name != "total"}
    seconds["total"] = max(time.perf_counter() - started, sum(seconds.values()))
    result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    result["peak_memory_bytes"] = peak_memory_bytes()


def _export(model: Student, wanted: Wanted, path: Path, journal: Journal) -> BitwrightError | None:
    """Writes and checks the ONNX file; what went wrong is returned, so that hours of work are not thrown away."""
    started = time.perf_counter()
    usual = CHECKS[wanted.checked]
    count = how_many(model, usual, LEAST_IMAGES)
    journal.begin(said("Writing ONNX and checking it in ONNX Runtime", count, usual))
    failure: BitwrightError | None = None
    parity, size = None, None
    try:
        with quiet_libraries():
            parity = export_checked(model, path, wanted.images, force=wanted.force, count=count)
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
    journal.finish()
    add_parity(model.result, parity, size)
    _took(model, "export", started)
    return failure


def _show(model: Student, folder: Path, wanted: Wanted, answers: Answers, journal: Journal) -> None:
    """``report.html`` of a run that was just written, and what it is made from; no failure here undoes the run."""
    journal.begin("Writing the report")
    images = _measured(model, wanted)
    try:
        with moved_to(model, "cpu"):
            found = facts.gather(model, images, answers, folder, pictures=wanted.pictures)
        found = replace(found, curve=facts.curve_beside(wanted.plan))
        write_text(folder / run_folder.FACTS, json.dumps(found.plain(), allow_nan=False) + "\n")
        pages.write(folder)
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(str(error))}"
        warnings.warn(f"The run is complete, but its page could not be written ({what}).", stacklevel=2)
    journal.finish()
