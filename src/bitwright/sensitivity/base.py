"""What a sensitivity measure takes and gives, and the cache that lets a second plan start at once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bitwright import together
from bitwright.errors import UsageError
from bitwright.graph import rewrite
from bitwright.graph.student import Student, insert_quantizers
from bitwright.pipeline import tensor_digest
from bitwright.quant.scheme import ACTIVATION_BITS, WEIGHT_BITS, Scheme
from bitwright.run.files import DamagedError, read_checked, write_checked
from bitwright.stages.base import Run, Stage
from bitwright.stages.calibrate import Calibrate, parameters

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured

OPEN = {"weights", "activations", "rules", "plan"}
"""What a scheme says of bits, which is what is to be found out here."""
VERSION = 1
"""Version of what measures compute; tables kept under a lower one are not used."""


@dataclass(frozen=True)
class Choices:
    """The bits among which a plan chooses, and how tensors get their grids at each.

    Example: ``Choices(weights=(4, 8), activations=(8,), scheme=Scheme(runtime="generic"))``
    """

    weights: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    activations: tuple[int, ...] = (4, 8, 16)
    scheme: Scheme = field(default_factory=Scheme)
    """Granularity and runtime; its bits, rules and plan are not looked at, so that every layer is a variable."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """Ranges; its bias correction is left out."""
    refine: tuple[Stage, ...] = ()
    """What rounds weights after that, each layer by itself: closed-form stages, such as OPTQ with the float network's
    inputs."""

    def __post_init__(self) -> None:
        for what, given, known in (
            ("weights", self.weights, tuple(WEIGHT_BITS)),
            ("activations", self.activations, ACTIVATION_BITS),
        ):
            if unknown := [b for b in given if b not in known]:
                raise UsageError(f"Expected bits for {what} out of {known}, found {unknown[0]}.")

    def scheme_at(self, weights: int | None, activations: int | None) -> Scheme:
        """The scheme with these bits everywhere."""
        kept = self.scheme.model_dump(exclude=OPEN)
        return Scheme.model_validate({**kept, "weights": weights, "activations": activations})

    def student(
        self, teacher: Captured, images: Images, run: Run, *, weights: int | None = None, activations: int | None = None
    ) -> Student:
        """The network calibrated with these bits everywhere, and refined; of biases, only refining corrects some."""
        student = insert_quantizers(teacher, self.scheme_at(weights, activations))
        student.to(run.device)
        few = activations is None and self.calibrate.weights != "hmse"  # ranges of weights do not look at images
        ranges = self.calibrate.model_copy(update={"bias_correction": "none"})
        student = ranges.run(student, teacher, images[:1] if few else images, run)
        for stage in self.refine if weights is not None else ():
            student = stage.run(student, teacher, images, run)
        return student

    def weight_errors(self, teacher: Captured, images: Images, run: Run) -> Iterator[tuple[str, str, int, Tensor]]:
        """(layer, path of its weight, bits, ``Q_b(w) - w`` to nearest) for every weight at every number of bits."""
        nearest = replace(self, refine=())
        for bits in self.weights:
            student = nearest.student(teacher, images, run, weights=bits)
            for path, quantizer in parameters(student.graph, "weight"):
                with torch.no_grad():
                    quantized = quantizer(rewrite.get_tensor(student.graph, path))
                yield quantizer.name, path, bits, quantized - rewrite.get_tensor(teacher.graph, path)


@dataclass
class Table:
    """What a measure predicts: the loss that each choice adds, all else in float.

    Example: ``Table("trace", {"stem": {4: 0.013, 8: 0.00005}}, {})``
    """

    measure: str
    weights: dict[str, dict[int, float]]
    """Layer by name, then bits. Of a weight that several layers share, the first of them."""
    activations: dict[str, dict[int, float]] = field(default_factory=dict)
    """Quantized activation by the name of the layer that ends its group, then bits; empty where a measure says nothing
    of activations."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know: traces that were negative, for example."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it was computed from, as JSON can hold it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Table:
        """Back from JSON, whose keys are strings."""
        halves = {
            half: {name: {int(b): v for b, v in row.items()} for name, row in data[half].items()}
            for half in ("weights", "activations")
        }
        return cls(**{**data, **halves})


class Measure:
    """One way of predicting. Subclasses are frozen dataclasses of their settings."""

    name: ClassVar[str]

    def measure(self, teacher: Captured, images: Images, choices: Choices, run: Run) -> Table:
        """The loss that each choice adds.

        Args:
            teacher: the float network, on the run's device.
            images: N of them; labels are looked at only where a setting says so.
            choices: the bits, and how grids are found.
            run: seed, device, batch size, progress.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Name and settings, as plain data."""
        return {"measure": self.name, **asdict(self)}  # type: ignore[call-overload]


def predicted_losses(
    measure: Measure, teacher: Captured, images: Images, choices: Choices, run: Run, folder: Path | None = None
) -> Table:
    """The measure's table, kept in a folder under a key of everything it depends on.

    Args:
        measure: which.
        teacher: the float network.
        images: to measure on.
        choices: the bits.
        run: seed, device, batch size, progress.
        folder: where tables are kept; None keeps nothing.
    """
    if folder is None:
        return measure.measure(teacher, images, choices, run)
    path = folder / f"sensitivity-{_key(measure, teacher, images, choices, run)}.json"
    kept = together.from_first(lambda: _kept(path))
    if kept is not None:
        return kept
    found = measure.measure(teacher, images, choices, run)
    if together.is_first():
        write_checked(path, found.to_dict())
    return found


def _kept(path: Path) -> Table | None:
    if path.is_file():
        try:
            return Table.from_dict(read_checked(path))
        except DamagedError as error:
            warnings.warn(f"{error} The losses are measured again.", UserWarning, stacklevel=4)
    return None


def _key(measure: Measure, teacher: Captured, images: Images, choices: Choices, run: Run) -> str:
    labels = None if images.labels is None else images.labels.tolist()
    parts = {
        "version": VERSION,
        **measure.settings(),
        "network": tensor_digest(teacher.graph),
        "code": teacher.graph.code,
        "images": images.sha256,
        "labels": labels,
        "weights": choices.weights,
        "activations": choices.activations,
        "scheme": choices.scheme.model_dump(mode="json", exclude=OPEN),
        "calibrate": choices.calibrate.model_dump(mode="json"),
        "refine": [[stage.kind, stage.model_dump(mode="json")] for stage in choices.refine],
        "batch": run.batch,
        "seed": run.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
