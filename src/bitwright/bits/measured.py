"""What a plan is made from: the losses of every choice of bits, and the seconds of layers, measured or kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright import together
from bitwright._version import __version__
from bitwright.bits.allocate import Losses
from bitwright.bits.costs import ACTIVATION_CHOICES, Latency, Variable, overhead_bytes
from bitwright.bits.goal import Goal
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph.capture import Captured
from bitwright.graph.devices import place_on
from bitwright.graph.student import Student
from bitwright.pipeline import tensor_digest
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.run.about import totals
from bitwright.run.files import DamagedError, read_checked, write_checked
from bitwright.sensitivity import MEASURES, Choices, Measure, MeasuredLoss, Table, predicted_losses
from bitwright.stages.base import Run

if TYPE_CHECKING:
    from bitwright.bits.latency import LatencyFacts

SAMPLES = (16, 256)
"""Images to measure on: a plan that chooses among hundreds of losses learns few images by heart, so as many of these
as :data:`WORK` allows."""
WORK = 4e12
"""Multiply-accumulates for measuring, about: minutes on two cores."""
WITH_ACTIVATIONS = frozenset({"loss", "distance"})
"""Measures that predict what bits of activations cost; for the others, ``loss`` does."""
OTHER_SCALE = frozenset({"eigenvalue", "q-bert"})
"""Measures whose numbers are no nats."""
DESCRIPTION = 1
"""Version of what a file's description holds; what was kept under another one is not used."""
LatencyOf = Callable[[Student], Latency]


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


def affordable(student: Student, variables: Mapping[str, Variable]) -> int:
    """How many images losses are measured on: each option of each tensor runs half of the network, on average."""
    passes = sum(len(v.options) for v in variables.values() if len(v.options) > 1) / 2
    least, most = SAMPLES
    return int(min(most, max(least, WORK / max(1.0, passes * totals(student)["macs"]))))


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


class _Watched(Measure):
    """A measure that notes whether it was asked, and not only its kept table."""

    def __init__(self, inner: Measure) -> None:
        self.inner, self.asked = inner, False

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        self.asked = True
        return self.inner.measure(teacher, images, choices, run)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()


def measure_losses(
    teacher: Captured,
    scheme: Scheme,
    images: Images,
    goal: Goal,
    variables: Mapping[str, Variable],
    method: Recipe,
    run: Run,
    folder: Path | None,
) -> Measured:
    """Tables of weights and of activations, so that other bits of one let the other be used again.

    Args:
        teacher: the float network.
        scheme: its rules, granularity and runtime.
        images: all of these are run.
        goal: names the measure.
        variables: whose options are measured.
        method: the recipe whose roundings losses are of, as far as they are layer by layer.
        run: seed, device, progress.
        folder: where tables are kept.
    """
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


def losses_of(measured: Measured, variables: Mapping[str, Variable]) -> Losses:
    """Losses of the variables there are; what has none can only take its most bits."""
    halves: dict[str, dict[str, Mapping[int, float]]] = {"weight": {}, "activation": {}}
    for variable in variables.values():
        row = _row(measured.weights if variable.kind == "weight" else measured.activations, variable)
        if row is None and len(variable.options) > 1:
            row = dict.fromkeys(variable.options[:-1], math.inf) | {variable.options[-1]: 0.0}
        if row is not None:
            halves[variable.kind][variable.name] = row
    return Losses(halves["weight"], halves["activation"])


def _row(table: Table, variable: Variable) -> Mapping[int, float] | None:
    rows: Mapping[str, Mapping[int, float]] = table.weights if variable.kind == "weight" else table.activations
    return next((rows[name] for name in variable.layers if name in rows), None)


def kept_overhead(student: Student, folder: Path | None) -> int:
    """What :func:`bitwright.bits.costs.overhead_bytes` finds, kept under a key of all that it depends on.

    Args:
        student: whose file it is of.
        folder: where it is kept; None keeps nothing.
    """
    if folder is None:
        return overhead_bytes(student)
    path = folder / f"description-{_description_key(student)}.json"
    kept = together.from_first(lambda: _read_overhead(path))
    if kept is not None:
        return kept
    found = overhead_bytes(student)
    if together.is_first():
        write_checked(path, {"overhead_bytes": found})
    return found


def _read_overhead(path: Path) -> int | None:
    if path.is_file():
        try:
            return int(read_checked(path)["overhead_bytes"])
        except DamagedError as error:
            warnings.warn(f"{error} The description of the file is measured again.", UserWarning, stacklevel=4)
    return None


def _description_key(student: Student) -> str:
    assert student.teacher is not None
    graph = student.teacher.graph
    parts = {
        "version": DESCRIPTION,
        "bitwright": __version__,
        "network": tensor_digest(graph),
        "code": graph.code,
        "layers": repr([student.layers, student.unquantized]),
        "given": repr([student.outputs, student.structure, student.input_shape]),
        "scheme": student.scheme.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def time_layers(
    student: Student, images: Images, goal: Goal, run: Run, folder: Path | None
) -> tuple[Latency, LatencyFacts]:
    """Seconds of every layer at the bits that a goal offers, measured on this machine or kept, and how.

    Raises:
        UsageError: several processes share the job.
    """
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
