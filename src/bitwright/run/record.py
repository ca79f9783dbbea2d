"""A run as a typed record: what each stage tells, what was done about outliers, and ``result.json`` made from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bitwright.graph.equalize import ChannelScales
from bitwright.graph.fold import Unfolded
from bitwright.graph.place import Unquantized
from bitwright.quant.scheme import Scheme
from bitwright.run.result import SCHEMA, environment, peak_memory_bytes


class StageRecord(BaseModel):
    """What a stage tells of itself.

    A stage that has more to tell than its time and its loss has a class of its own, with plain data as fields, and
    names it in ``record``.

    Example:
        >>> class Shift(StageRecord):
        ...     kind: str = "shift"
        ...     by: float
        >>> Shift(by=0.5, before=2.0, after=1.0).row()
        {'kind': 'shift', 'seconds': 0.0, 'before': 2.0, 'after': 1.0, 'by': 0.5}
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    kind: str
    seconds: float = 0.0
    before: float | None = None
    """The loss of the network that the stage was given, as the stage measures it; None where it measures none."""
    after: float | None = None
    """The loss of the network that the stage left, measured in the same way."""
    warnings: list[str] = Field(default_factory=list)
    """What it said, so that a run that goes on after it says the same."""

    def told(self) -> dict[str, Any]:
        """What this class of record adds, as plain data; what is None is left out."""
        own = self.model_dump(mode="json", exclude=set(StageRecord.model_fields))
        return {key: value for key, value in own.items() if value is not None}

    def row(self) -> dict[str, Any]:
        """The stage's entry in ``stages``."""
        common = self.model_dump(mode="json", include=set(StageRecord.model_fields) - {"warnings"}, exclude_none=True)
        return common | self.told()

    def keys(self) -> dict[str, Any]:
        """What the result says of the last stage of this kind, by key."""
        own = self.told()
        return {self.kind: own} if own else {}


@dataclass(frozen=True)
class Suggestion:
    """A rule that raises one tensor to more bits.

    Attributes:
        rule: for ``rules=``, or ``--rule`` on the command line.
        tensor: the layer that yields it.
        predicted_gain: by how much the loss would rise without this rule, all the others kept.
        cost: share of multiply-accumulates that read or make it.
    """

    rule: str
    tensor: str
    predicted_gain: float
    cost: float


@dataclass(frozen=True)
class Raised:
    """Tensors that were raised to more bits: the loss before, what is left of it, and the rules."""

    loss: float
    left: float
    rules: list[Suggestion]


@dataclass
class Outliers:
    """What was done, or is suggested, about tensors whose grid a few rows or channels would take for themselves."""

    balanced: list[ChannelScales] = field(default_factory=list)
    raised: Raised | None = None
    suggestions: list[Suggestion] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """Everything that is known of a run when its network is frozen.

    Attributes:
        model: name of the network.
        parameters: of the float network.
        macs: multiply-accumulates for one image.
        images: how many there were to calibrate on.
        sha256: of those images.
        recipe: its name.
        settings: every setting of the recipe, as plain data.
        scheme: bits, granularity, runtime.
        device: that it ran on.
        seed: of all random numbers.
        seconds: by step.
        layers: one row per quantized tensor.
        unquantized: tensors that stay float.
        unfolded: batch norms that could not be folded.
        stages: in their order.
        outliers: balanced, raised, suggested.
        warnings: one line each.
        plan: what was planned, where bits were.
    """

    model: str
    parameters: int
    macs: int
    images: int
    sha256: str
    recipe: str
    settings: dict[str, Any]
    scheme: Scheme
    device: str
    seed: int
    seconds: dict[str, float]
    layers: list[dict[str, Any]]
    unquantized: list[Unquantized]
    unfolded: list[Unfolded]
    stages: list[StageRecord]
    outliers: Outliers
    warnings: list[str]
    plan: dict[str, Any] | None = None

    def result(self) -> dict[str, Any]:
        """As ``result.json`` has it: ``stages`` has every stage in order, the key of a kind its last stage."""
        latest = {key: value for stage in self.stages for key, value in stage.keys().items()}
        return {
            "schema": SCHEMA,
            **environment(self.device, self.seed),
            "model": {"name": self.model, "parameters": self.parameters, "macs": self.macs},
            "data": {"calibration": {"count": self.images, "sha256": self.sha256}, "evaluation": None},
            "recipe": {"name": self.recipe, "settings": self.settings},
            "bits": self.scheme.described_bits(),
            "scheme": self.scheme.model_dump(mode="json"),
            "size": {"float_bytes": 4 * self.parameters},
            "seconds": dict(self.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "layers": self.layers,
            "unquantized": [asdict(u) for u in self.unquantized],
            "unfolded": [asdict(u) for u in self.unfolded],
            "warnings": self.warnings,
            "suggestions": [asdict(s) for s in self.outliers.suggestions],
            **({"balanced": [asdict(b) for b in self.outliers.balanced]} if self.outliers.balanced else {}),
            **({"raised": asdict(self.outliers.raised)} if self.outliers.raised else {}),
            **latest,
            "stages": [stage.row() for stage in self.stages],
            **({} if self.plan is None else {"plan": self.plan}),
        }
