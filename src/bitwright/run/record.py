"""A run as a typed record: what each stage tells, what was done about outliers, and ``result.json`` made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from bitwright import words
from bitwright.export.verdict import Parity
from bitwright.graph.equalize import ChannelScales
from bitwright.graph.layer import Unfolded, Unquantized
from bitwright.graph.recentre import Recentring
from bitwright.measure.metrics import Evaluation, OutputFidelity, wilson_interval
from bitwright.quant.scheme import Scheme
from bitwright.run.about import environment, peak_memory_bytes
from bitwright.run.result import SCHEMA, LayerRow

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.given.preprocessing import Preprocessing


SIZE_TOLERANCE = 0.02
"""Share by which the size of a file may differ from the planned one without a warning."""


class PlanRecord(Protocol):
    """How the bits of a run were chosen: a :class:`bitwright.bits.planned.Planning`."""

    def of_run(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""


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

    model_config = ConfigDict(extra="forbid")

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
    recentred: list[Recentring] = field(default_factory=list)


@dataclass(frozen=True)
class CheckedAnswers:
    """How closely outputs follow the float network's on a few calibration images, looked at after the last stage."""

    images: int
    outputs: Mapping[str, OutputFidelity]


@dataclass(frozen=True)
class Origin:
    """Where the network and the calibration images of a run came from.

    Attributes:
        reference: what names the network from any folder; None where it was not loaded by name.
        settings: of preprocessing that were given with the name.
        output: the one output that was kept; None for all.
        preprocessing: of the images; None where nobody said, or where it is a function.
        source: the images' path or name from any folder; None where there is none.
        input_key: which of several entries the images were, where somebody said so.
        sha256: of the file that the network was read from, where that is an ONNX file.
    """

    reference: str | None
    settings: Mapping[str, Any]
    output: str | None
    preprocessing: Preprocessing | None
    source: str | None
    input_key: str | None = None
    sha256: str | None = None

    def images(self) -> dict[str, Any]:
        """What the result says of where the images are."""
        return {"source": self.source, **({} if self.input_key is None else {"input_key": self.input_key})}

    def model(self) -> dict[str, Any]:
        """What the result says of the network."""
        how = self.preprocessing
        return {
            "reference": self.reference,
            "settings": json.loads(json.dumps(self.settings, default=lambda value: value.tolist())),
            "output": self.output,
            "preprocessing": None if how is None else how.model_dump(mode="json"),
            **({} if self.sha256 is None else {"sha256": self.sha256}),
        }


@dataclass(frozen=True)
class EvaluatedImages:
    """The images that a network was measured on: how many, which, and whether labels, masks or boxes came with them."""

    count: int
    sha256: str
    labelled: bool
    source: str | None
    input_key: str | None = None

    @classmethod
    def of(cls, images: Images) -> EvaluatedImages:
        """What a result says of these images."""
        labelled = images.labels is not None or images.truth is not None
        return cls(len(images), images.sha256, labelled, images.place, images.input_key)


def add_evaluation(
    result: dict[str, Any],
    evaluation: Evaluation,
    images: EvaluatedImages,
    noise: Mapping[str, float | None],
    *,
    same_as_calibration: bool,
) -> None:
    """Writes into a result what was measured.

    Args:
        result: changed.
        evaluation: scores and fidelity.
        images: that it was measured on.
        noise: signal to noise in decibels, by layer.
        same_as_calibration: whether those are the calibration images.
    """
    result |= evaluation.to_dict()
    for row in result["layers"]:
        row["sqnr_db"] = noise.get(row["name"])
    result.setdefault("data", {})["evaluation"] = {**asdict(images), "same_as_calibration": same_as_calibration}


def add_parity(result: dict[str, Any], parity: Parity | None, size: int | None) -> None:
    """Writes into a result what the check of the ONNX file found, and its bytes; None where it was not written."""
    result["parity"] = None if parity is None else asdict(parity)
    result["size"]["onnx_bytes"] = size


def add_plan_outcome(result: dict[str, Any]) -> list[str]:
    """Writes what became of a plan into the result: the file's bytes and the agreement, beside those expected.

    Returns:
        A line for each that is worse than was planned; none for a result without a plan.
    """
    if "plan" not in result:
        return []
    plan, packed = result["plan"], result["size"]["packed_bytes"]
    expected, limit = plan["predicted"]["weight_bytes"], plan["limits"].get("weight_bytes")
    plan["packed"] = {"bytes": packed, "difference": packed / expected - 1}
    lines = []
    if abs(packed / expected - 1) > SIZE_TOLERANCE:
        lines.append(f"model.safetensors has {packed:,} bytes, planned were {expected:,.0f}.")
    if limit is not None and packed > limit:
        lines.append(f"model.safetensors has {packed:,} bytes, {packed - limit:,.0f} more than wanted.")
    agreement = result.get("fidelity", {}).get("agreement")
    if "estimate" not in plan or agreement is None or plan["estimate"].get("figure") is not None:
        return lines
    evaluated = result["data"]["evaluation"]
    low, high = wilson_interval(round(agreement * evaluated["count"]), evaluated["count"])
    plan["measured"] = {
        "agreement": agreement,
        "interval": [low, high],
        "images": evaluated["count"],
        "same_as_calibration": evaluated["same_as_calibration"],
    }
    wanted = 1 - plan["estimate"]["drop"]
    if high < wanted:
        lines.append(
            f"The network agrees with the float one on {words.percent(agreement)} of the images measured on, less than "
            f"the {words.percent(wanted)} that were wanted. Ask for a smaller max_drop=."
        )
    return lines


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
        origin: where network and images came from, where somebody says so.
        plan: what was planned, where bits were.
        checked: how closely the outputs follow the float network's, as far as that was looked at.
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
    layers: list[LayerRow]
    unquantized: list[Unquantized]
    unfolded: list[Unfolded]
    stages: list[StageRecord]
    outliers: Outliers
    warnings: list[str]
    origin: Origin | None = None
    plan: PlanRecord | None = None
    checked: CheckedAnswers | None = None

    def result(self) -> dict[str, Any]:
        """As ``result.json`` has it: ``stages`` has every stage in order, the key of a kind its last stage."""
        origin = self.origin
        latest = {key: value for stage in self.stages for key, value in stage.keys().items()}
        return {
            "schema": SCHEMA,
            **environment(self.device, self.seed),
            "model": {
                **{"name": self.model, "parameters": self.parameters, "macs": self.macs},
                **({} if origin is None else origin.model()),
            },
            "data": {
                "calibration": {
                    **{"count": self.images, "sha256": self.sha256},
                    **({} if origin is None else origin.images()),
                },
                "evaluation": None,
            },
            "recipe": {"name": self.recipe, "settings": self.settings},
            "bits": self.scheme.described_bits(),
            "scheme": self.scheme.model_dump(mode="json"),
            "size": {"float_bytes": 4 * self.parameters},
            "seconds": dict(self.seconds),
            "peak_memory_bytes": peak_memory_bytes(),
            "layers": [asdict(row) for row in self.layers],
            "unquantized": [asdict(u) for u in self.unquantized],
            "unfolded": [asdict(u) for u in self.unfolded],
            "warnings": self.warnings,
            "suggestions": [asdict(s) for s in self.outliers.suggestions],
            **({"recentred": [asdict(r) for r in self.outliers.recentred]} if self.outliers.recentred else {}),
            **({"balanced": [asdict(b) for b in self.outliers.balanced]} if self.outliers.balanced else {}),
            **({"raised": asdict(self.outliers.raised)} if self.outliers.raised else {}),
            **latest,
            "stages": [stage.row() for stage in self.stages],
            **({} if self.plan is None else {"plan": self.plan.of_run()}),
            **({} if self.checked is None else {"checked": asdict(self.checked)}),
        }
