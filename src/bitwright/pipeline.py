"""Runs the stages of a recipe in order."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from bitwright import together
from bitwright.errors import BitwrightError, NotFiniteError, UsageError
from bitwright.given.images import Images
from bitwright.graph.capture import Captured
from bitwright.graph.student import Snapshot, Student
from bitwright.measure.health import check_answers
from bitwright.memory import keep_pages
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.recipes import Recipe
from bitwright.run import checkpoint
from bitwright.run.journal import heard
from bitwright.run.record import StageRecord
from bitwright.run.state import claim, other_settings
from bitwright.stages.base import Optimising, Run, Stage
from bitwright.transfer import fetched


def run_stages(
    recipe: Recipe,
    student: Student,
    teacher: Captured,
    images: Images,
    run: Run,
    *,
    state: Path | None = None,
    identity: str = "",
) -> Student:
    """Applies each stage; after each, the state is kept so that an interrupted run goes on from there.

    Args:
        recipe: its stages.
        student: with quantizers that are not calibrated yet.
        teacher: the float network; never changed.
        images: whose labels reach those stages alone that read them.
        run: seed, device, progress; it gets the record of each stage.
        state: folder for the checkpoint; none is kept without.
        identity: what the run depends on; a checkpoint of another identity is refused.

    Raises:
        UsageError: the checkpoint belongs to another run, or a stage cannot work on this network or these images.
        BitwrightError: the result is not finite.
    """
    for stage in recipe.stages:
        stage.check(student, teacher, images)
    run.state, run.identity = state, identity
    if state is not None:
        claim(state, identity)
    with keep_pages():
        for position, stage in enumerate(recipe.stages):
            if state is not None and _restore(student, state, position, run, identity):
                run.summed = None
                continue
            if stage.needs_ranges:
                _check_ranges(student, recipe, f"before '{stage.kind}'")
            torch.manual_seed(run.seed + position)
            with run.before(recipe.stages, position):
                student = _record(stage, student, teacher, images, run.of(recipe.stages, position))
            _check_finite(student, teacher)
            left = student.snapshot()
            _remember(run, stage.kind, left)
            if together.is_shared():
                together.check_same(tensor_digest(student.graph))
            if state is not None:
                _keep(left, state, position, stage.kind, run, identity)
    _check_ranges(student, recipe, "among its stages")
    return student


def _check_ranges(student: Student, recipe: Recipe, where: str) -> None:
    """Refuses to go on if no stage has given any quantizer its range."""
    calibrated = [m.calibrated for m in student.graph.modules() if isinstance(m, Quantizer)]
    if calibrated and not any(calibrated):
        raise UsageError(f"Expected 'calibrate' {where} in the recipe '{recipe.name}': nothing has a range yet.")


def _remember(run: Run, kind: str, left: Snapshot) -> None:
    """Adds what a stage left to the run's history; nothing where it takes no steps and has changed nothing."""
    if issubclass(Stage.registry[kind], Optimising) or not run.history or not left.same(run.history[-1][1]):
        run.history.append((kind, left))


def _record(stage: Stage, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
    """Runs a stage, after which the run has one record more: the stage's own, or a plain one."""
    count, before = len(run.records), run.seconds.get(stage.kind, 0.0)
    with run.timed(stage.kind), heard(everything=True) as said, _explained(student, images, run):
        student = stage.run(student, teacher, images if stage.reads_labels else images.unlabelled(), run)
    if len(run.records) == count:
        run.records.append(StageRecord(kind=stage.kind))
    run.records[-1].seconds = round(run.seconds[stage.kind] - before, 3)
    run.records[-1].warnings = said
    return student


@contextmanager
def _explained(student: Student, images: Images, run: Run) -> Iterator[None]:
    """Where what a stage was given has answers that are no numbers, the error is the line that names the layer."""
    try:
        yield
    except NotFiniteError:
        if run.history:
            student.restore(run.history[-1][1])
        check_answers(student, images.unlabelled(), run)
        raise


def tensor_digest(graph: nn.Module) -> str:
    """SHA-256 over the names and values of all stored tensors."""
    digest = hashlib.sha256()
    for name, tensor in graph.named_buffers():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_finite(student: Student, teacher: Captured) -> None:
    """What the float network stores may be infinite, such as a bound or a mask; what a stage makes may not."""
    own = dict(teacher.graph.named_buffers())
    floats = {name: t for name, t in student.graph.named_buffers() if t.is_floating_point()}
    whole = fetched([torch.isfinite(t).all() for t in floats.values()])
    for name in (name for name, finite in zip(floats, whole, strict=True) if not finite):
        if name not in own or bool(torch.isfinite(own[name]).all()):
            raise BitwrightError(f"{name} is not finite after the last stage. Please report this with the command.")


def _keep(snapshot: Snapshot, state: Path, position: int, kind: str, run: Run, identity: str) -> None:
    """Writes the checkpoint of a stage."""
    grids = {key: grid.plain() for key, grid in snapshot.grids.items()}
    header = {"kind": kind, "identity": identity, "grids": json.dumps(grids)}
    records = [record.model_dump(mode="json") for record in run.records]
    header |= {"records": json.dumps(records), "seconds": json.dumps(run.seconds)}
    checkpoint.write(_path(state, position), snapshot.tensors, header)


def _restore(student: Student, state: Path, position: int, run: Run, identity: str) -> bool:
    """Takes over what a finished stage left; False if there is no checkpoint of it, or a damaged one."""
    kept = checkpoint.read_good(_path(state, position), "That stage runs again.", run.device)
    if kept is None:
        return False
    header, tensors = kept
    if header.get("identity") != identity or "grids" not in header:
        raise other_settings(state)
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            tensors[name] = tensor.contiguous(memory_format=torch.channels_last)
    snapshot = Snapshot(tensors, {key: Grid.read(plain) for key, plain in json.loads(header["grids"]).items()})
    student.restore(snapshot)
    _remember(run, header["kind"], snapshot)
    records = json.loads(header["records"])
    run.records[:] = [Stage.registry[each["kind"]].record.model_validate(each) for each in records]
    run.seconds = json.loads(header["seconds"])
    for text in run.records[-1].warnings:
        warnings.warn(text, stacklevel=3)
    return True


def _path(state: Path, position: int) -> Path:
    return state / f"checkpoint-{position}.safetensors"
