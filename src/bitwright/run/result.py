"""``result.json``: everything that was measured, under stable keys, read back as types.

A key that a run of an older version lacks is None or empty here; keys that are not known here are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, TypeAdapter, ValidationError

from bitwright.errors import UsageError
from bitwright.export.verdict import Parity
from bitwright.graph.layer import Unfolded, Unquantized
from bitwright.measure.metrics import Evaluation, Metrics, OutputFidelity, TaskLoss

SCHEMA = 1
"""Version of ``result.json``: it grows when a key changes its meaning, so that an old reader says so."""
T = TypeVar("T")
RunBits: TypeAlias = dict[str, int | str | None]
"""Bits of ``weights`` and ``activations``; ``mixed`` where there are several, None for float."""
CurvePoint: TypeAlias = dict[str, int | float]
"""``loss`` and what a plan costs by kind of cost; of uniform bits also ``bits``."""


def read_as(kind: type[T], found: object) -> T:
    """Plain data of JSON as a type, however deep.

    Raises:
        ValidationError: a part of it is something else.
    """
    return TypeAdapter(kind).validate_json(json.dumps(found), strict=True)


def _read_by(read: Callable[[Mapping[str, Any]], object]) -> PlainValidator:
    """Reads a part whose keys are not known beforehand; None stays None."""

    def part(found: Any) -> object:
        if found is not None and not isinstance(found, Mapping):
            raise ValueError("it is no object")
        return None if found is None else read(found)

    return PlainValidator(part)


@dataclass(frozen=True)
class LayerRow:
    """One quantized tensor in a result.

    Attributes:
        name: of the layer.
        op: the operator.
        weight_bits: of its weight, or of a stored operand; None where it has none.
        activation_bits: of what it yields; None where that is not quantized.
        granularity: what shares a scale.
        parameters: numbers that it stores.
        macs: multiply-accumulates for one image.
        sqnr_db: signal to quantization noise of what it yields, in decibels; None where it was not measured.
    """

    name: str
    op: str = ""
    weight_bits: int | None = None
    activation_bits: int | None = None
    granularity: str = "tensor"
    parameters: int = 0
    macs: int = 0
    sqnr_db: float | None = None


@dataclass(frozen=True)
class RunNetwork:
    """The network of a run: its name, what names it from any folder, how it was loaded, the output that was kept."""

    name: str
    reference: str | None = None
    settings: dict[str, Any] | None = None
    output: str | None = None
    preprocessing: dict[str, Any] | None = None
    parameters: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class RunRecipe:
    """The recipe of a run, with every setting as plain data."""

    name: str
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class UsedImages:
    """Images that a network was calibrated or measured on."""

    count: int | None = None
    sha256: str | None = None
    source: str | None = None
    input_key: str | None = None
    same_as_calibration: bool | None = None


@dataclass(frozen=True)
class RunImages:
    """Images of a run."""

    calibration: UsedImages | None = None
    evaluation: UsedImages | None = None


@dataclass(frozen=True)
class RunFidelity:
    """How closely the float network is followed: the worst figures, and those of each output."""

    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    outputs: dict[str, OutputFidelity] | None = None


@dataclass(frozen=True)
class RunScores:
    """Label-free scores by layer."""

    layers: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- what stages tell


@dataclass(frozen=True)
class TuningLoss:
    """The loss on unseen views of the calibration images, of what is kept and of what each stage left."""

    hard: float
    by_stage: dict[str, float] | None = None


@dataclass(frozen=True)
class TuningStop:
    """Where the loss was not finite any more."""

    step: int
    layer: str


@dataclass(frozen=True)
class Tuning:
    """What a stage of kind ``reconstruct`` tells.

    Example:
        >>> Tuning(steps=100, before=4.0, loss=TuningLoss(2.0), left_nearest=0.21).kept is None
        True
    """

    steps: int = 0
    before: float | None = None
    loss: TuningLoss | None = None
    batch: int | None = None
    seconds_per_step: float | dict[str, float] | None = None
    """In a result of old, of each number format that was tried."""
    precision: str | None = None
    left_nearest: float | None = None
    stopped: TuningStop | None = None
    kept: str | None = None
    curve: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class SearchFitness:
    """The fitness of a search and its measure; lower is better."""

    measure: str
    before: float | None = None
    after: float | None = None
    teacher: float | None = None
    """Of the float network's own outputs."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a stage of kind ``evolve`` tells."""

    steps: int = 0
    better: int = 0
    fitness: SearchFitness | None = None
    images: int = 0
    moved: float = 0.0
    scales: int = 0
    mean_change: float = 0.0
    curve: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class PlainStage:
    """A stage that tells of nothing that is shown."""


def _kind(stage: Any) -> str:
    kind = stage.get("kind") if isinstance(stage, dict) else None
    return kind if isinstance(kind, str) and kind in {"reconstruct", "evolve"} else "other"


AnyStage = Annotated[
    Annotated[Tuning, Tag("reconstruct")]
    | Annotated[SearchOutcome, Tag("evolve")]
    | Annotated[PlainStage, Tag("other")],
    Discriminator(_kind),
]

# ------------------------------------------------------------------------------------- where the loss comes from


@dataclass(frozen=True)
class TensorLoss:
    """The loss with one tensor alone in float: of a layer's ``weight`` or ``activation``, and the share that goes."""

    name: str
    tensor: str
    loss_without: float
    share: float


@dataclass(frozen=True)
class Remedy:
    """A rule, the loss that is left with it, and the bytes that it adds to ``model.safetensors``."""

    rule: str
    loss_after: float
    bytes: int


@dataclass(frozen=True)
class Remedies:
    """Several rules at once."""

    rules: list[str]
    loss_after: float
    bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """Where a quantized network loses most.

    Attributes:
        loss: KL from float in nats, summed over outputs; for outputs that are no class scores the squared error over
            their mean square. None where it is not finite.
        images: that it was measured on.
        layers: tensors whose error costs something, the largest share first; shares need not add up to 1.
        rules: that give most back, the best first.
        together: up to three of them at once; None where one is enough.
    """

    loss: float | None = None
    images: int = 0
    layers: list[TensorLoss] = field(default_factory=list)
    rules: list[Remedy] = field(default_factory=list)
    together: Remedies | None = None


@dataclass(frozen=True)
class CheckedFidelity:
    """How closely outputs follow the float network's on a few calibration images."""

    images: int
    outputs: dict[str, OutputFidelity]


# ------------------------------------------------------------------------------------------------ planned bits


@dataclass(frozen=True)
class SameAnswers:
    """The share of answers that stay the float network's, with its 95 % interval: estimated, or measured.

    With ``figure``, the key of a task's figure, the share of that which is kept.
    """

    agreement: float | None = None
    interval: list[float] = field(default_factory=list)
    images: int = 0
    drop: float | None = None
    stages: list[str] = field(default_factory=list)
    trials: list[Any] = field(default_factory=list)
    figure: str | None = None


@dataclass(frozen=True)
class PackedSize:
    """Bytes of the file, and by which share they differ from those planned."""

    bytes: int
    difference: float | None = None


@dataclass(frozen=True)
class LossMeasure:
    """The measure that predicted losses."""

    measure: str | None = None


@dataclass(frozen=True)
class Curve:
    """The best plans at every limit.

    Attributes:
        along: the cost that is limited.
        points: the cheapest first.
        uniform: the same bits in all layers.
        chosen: the plan's own; None where it is not among them.
    """

    along: str
    points: list[CurvePoint]
    uniform: list[CurvePoint] = field(default_factory=list)
    chosen: CurvePoint | None = None


@dataclass(frozen=True)
class RunPlan:
    """How bits were chosen, and what became of it."""

    predicted: CurvePoint | None = None
    limits: dict[str, float] | None = None
    measure: LossMeasure | None = None
    estimate: SameAnswers | None = None
    measured: SameAnswers | None = None
    packed: PackedSize | None = None
    curve: Curve | None = None


# ---------------------------------------------------------------------------------------------------- the whole


class RunResult(BaseModel):
    """A result, its parts by the names that the file has.

    Example:
        >>> rows = [{"kind": "evolve", "steps": 3}, {"kind": "calibrate"}, {"kind": "evolve", "steps": 5}]
        >>> found = RunResult.read({"stages": rows, "evolve": rows[2], "float": {"top1": 0.5}})
        >>> [search.steps for search in found.searches], found.evaluation.reference.get("top1"), found.tunings
        ([3, 5], 0.5, [])
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=(), defer_build=True)

    model: RunNetwork = RunNetwork("")
    recipe: RunRecipe = RunRecipe("")
    layers: list[LayerRow] = Field(default_factory=list)
    size: dict[str, int | None] = Field(default_factory=dict)
    """Bytes by what has them."""
    data: RunImages = RunImages()
    bits: RunBits | None = None
    reference: Annotated[Metrics | None, _read_by(Metrics.read)] = Field(default=None, validation_alias="float")
    quantized: Annotated[Metrics | None, _read_by(Metrics.read)] = None
    loss: Annotated[TaskLoss | None, _read_by(TaskLoss.read)] = Field(default=None, validation_alias="evaluation")
    """What the quantized network lost of its task."""
    fidelity: RunFidelity | None = None
    seconds: dict[str, float | None] | None = None
    parity: Parity | None = None
    diagnosis: Diagnosis | None = None
    plan: RunPlan | None = None
    scores: RunScores | None = None
    checked: CheckedFidelity | None = None
    """How closely it follows the float network on a few calibration images, where it was just quantized."""
    stages: list[AnyStage] | None = None
    reconstruct: Tuning | None = None
    evolve: SearchOutcome | None = None
    unquantized: list[Unquantized] | None = None
    unfolded: list[Unfolded] | None = None
    warnings: list[str] | None = None
    files: dict[str, str] | None = None
    """The sha256 of files by name."""
    seed: int | None = None
    command: str | None = None
    device: str | None = None
    peak_memory_bytes: int | None = None
    bitwright: str | None = None
    torch: str | None = None
    python: str | None = None
    platform: str | None = None

    @classmethod
    def read(cls, found: Mapping[str, Any], where: str | Path = "The result") -> RunResult:
        """A result as types.

        Args:
            found: what ``result.json`` holds.
            where: it came from, for the message.

        Raises:
            UsageError: a part is missing, or is something else than a run writes.
        """
        try:
            return read_as(cls, found)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise UsageError(f"{where} is damaged: {_fault(first['type'], first['loc'])}. Quantize again.") from error

    @property
    def evaluation(self) -> Evaluation:
        """What was measured; of results that tell of no outputs, one."""
        found, outputs = self.fidelity, None
        if found is not None:
            exact = found.sqnr_db is None
            one = {"output": OutputFidelity(found.agreement, found.kl, found.sqnr_db, exact=exact)}
            outputs = one if found.outputs is None else found.outputs
        return Evaluation(self.quantized, self.reference, outputs or None, self.loss)

    @property
    def tunings(self) -> list[Tuning]:
        """Its optimisations in their order; of an older result, which lists no stages, the one that it tells of."""
        found = [stage for stage in self.stages or [] if isinstance(stage, Tuning)]
        return found or ([] if self.reconstruct is None else [self.reconstruct])

    @property
    def searches(self) -> list[SearchOutcome]:
        """The same of its searches."""
        found = [stage for stage in self.stages or [] if isinstance(stage, SearchOutcome)]
        return found or ([] if self.evolve is None else [self.evolve])

    @property
    def times_smaller(self) -> float | None:
        """Bytes of the float network over those of ``model.safetensors``; None where one of them is not known."""
        before, after = self.size.get("float_bytes"), self.size.get("packed_bytes")
        return before / after if before and after else None

    @property
    def evaluated_on(self) -> UsedImages:
        """The images that it was measured on."""
        return self.data.evaluation or UsedImages()

    @property
    def calibrated_on(self) -> UsedImages:
        """The images that it was calibrated on."""
        return self.data.calibration or UsedImages()


def _fault(kind: str, place: tuple[int | str, ...]) -> str:
    """What is wrong where.

    Example:
        >>> _fault("missing", ("layers", 3, "name")), _fault("float_type", ("seconds", "total"))
        ("it has no 'name' in 'layers'", "'seconds' is something else than a run writes")
    """
    if not place:
        return "it is something else than a run writes"
    if kind == "missing" and len(place) > 1:
        return f"it has no '{place[-1]}' in '{place[0]}'"
    return f"'{place[0]}' is something else than a run writes"
