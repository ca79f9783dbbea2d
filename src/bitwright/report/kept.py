"""``report.json`` as types: what a page needs beyond ``result.json``, gathered while model and images are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bitwright.run.result import Curve

FACTS_SCHEMA = 1


@dataclass(frozen=True)
class Counted:
    """A histogram over what is seen and over the grid's range, and the share of values below and above the grid."""

    range: list[float]
    counts: list[int]
    seen: list[float]
    below: float
    above: float


@dataclass(frozen=True)
class WeightHistogram(Counted):
    """Weights in steps of their own scales.

    Attributes:
        bits: of the grid.
        levels: the first and the last.
        scales: how many there are.
        used: levels that some weight has; None where the weight is no integers.
    """

    bits: int
    levels: list[int]
    scales: int | None = None
    used: int | None = None


@dataclass(frozen=True)
class ValueHistogram(Counted):
    """Activations in their own unit; ``grid`` is the least and the largest value, ``step`` what lies between two."""

    bits: int
    grid: list[float]
    step: float
    scales: int | None = None


@dataclass(frozen=True)
class LayerHistograms:
    """The float network's weights and values of one layer, against the grids that they are rounded to."""

    layer: str
    op: str
    weight: WeightHistogram | None
    activation: ValueHistogram | None


@dataclass(frozen=True)
class Histograms:
    """Of the worst layers, on a few images."""

    images: int = 0
    layers: list[LayerHistograms] | None = None


class GivenAnswer(BaseModel):
    """A class and the probability that a network gave it."""

    model_config = ConfigDict(populate_by_name=True)

    number: int = Field(validation_alias="class", serialization_alias="class")
    probability: float


class DifferingImage(BaseModel):
    """An image that the two networks answer differently."""

    model_config = ConfigDict(populate_by_name=True)

    name: str
    label: int | None = None
    reference: GivenAnswer = Field(validation_alias="float", serialization_alias="float")
    quantized: GivenAnswer
    output: str | None = None
    """Which output it is, where several give classes."""
    picture: str | None = None
    """A ``data:`` address."""


@dataclass(frozen=True)
class DifferingAnswers:
    """How many images are answered differently, and some of them.

    Attributes:
        count: images that were answered.
        differing: those that are answered differently.
        labelled: where there are labels, images that are right in ``both``, ``only_float``, ``only_quantized`` and
            ``neither``.
        classes: names by number.
        pictures: whether pictures were kept.
        shown: those on which the float network's class lost most.
    """

    count: int = 0
    differing: int = 0
    labelled: dict[str, int] | None = None
    classes: dict[str, str] | None = None
    pictures: bool = False
    shown: list[DifferingImage] | None = None


@dataclass(frozen=True)
class Overlay:
    """An image on which masks or boxes differ: what differs, and a ``data:`` address of it for each network."""

    name: str
    said: str = ""
    pictures: dict[str, str] | None = None


@dataclass(frozen=True)
class FileParts:
    """Bytes of the files by what they hold; None for one that is not there."""

    packed: dict[str, int] | None = None
    onnx: dict[str, int] | None = None


@dataclass(frozen=True)
class PageFacts:
    """What ``report.json`` holds; a curve, where the bits came from a plan file that has one beside it."""

    schema: int = FACTS_SCHEMA
    histograms: Histograms | None = None
    answers: DifferingAnswers | None = None
    overlays: list[Overlay] | None = None
    files: FileParts | None = None
    curve: Curve | None = None

    def plain(self) -> dict[str, Any]:
        """As the file has it."""
        found: dict[str, Any] = TypeAdapter(PageFacts).dump_python(self, mode="json", by_alias=True)
        return found
