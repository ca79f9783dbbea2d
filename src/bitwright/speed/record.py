"""``bench.json`` as types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bitwright.speed.timing import Spread


@dataclass(frozen=True)
class FloatOperator:
    """Operators of one kind that compute in float for one reason."""

    operator: str
    count: int
    reason: str


@dataclass(frozen=True)
class FileSpeed(Spread):
    """Seconds of a call of one file, the images that it computes in a second, and its memory in bytes."""

    images_per_second: float
    peak_bytes: int = 0
    above_start_bytes: int = 0


class SpeedRow(BaseModel):
    """Both files in one runtime, with so many threads and images in a call; ``ratio`` is quantized over float."""

    model_config = ConfigDict(populate_by_name=True)

    runtime: str
    threads: int
    batch: int
    reference: FileSpeed = Field(validation_alias="float", serialization_alias="float")
    quantized: FileSpeed
    ratio: Spread


@dataclass(frozen=True)
class Machine:
    """The processor, its cores, and how many processes wanted one of them during the last minute."""

    cpu: str
    cores: int
    load: float | None = None

    @property
    def busy(self) -> bool:
        """Whether times are those of a busy machine."""
        return self.load is not None and self.load > self.cores + 0.5


@dataclass(frozen=True)
class TimedRuntime:
    """A runtime, and what it makes of the files where it tells.

    Attributes:
        name: of the runtime.
        version: of the runtime.
        kernels: that it runs each file with, counted.
        products: convolutions and matrix products in ``integer`` and ``float``, by file.
        float_operators: what of the quantized file computes in float, and why.
    """

    name: str
    version: str | None
    kernels: dict[str, dict[str, int]] | None = None
    products: dict[str, dict[str, int]] | None = None
    float_operators: list[FloatOperator] | None = None


class BenchRecord(BaseModel):
    """What ``bench.json`` holds."""

    model_config = ConfigDict(populate_by_name=True)

    bitwright: str = ""
    run: str = ""
    machine: Machine
    what: str = Field(default="", validation_alias="float", serialization_alias="float")
    """What the float file is."""
    bytes: dict[str, int] = Field(default_factory=dict)
    runtimes: list[TimedRuntime] = Field(default_factory=list)
    absent: list[dict[str, str]] = Field(default_factory=list)
    """Runtimes that are not installed, with the line that installs each."""
    rows: list[SpeedRow]

    def plain(self) -> dict[str, Any]:
        """As the file has it."""
        return self.model_dump(by_alias=True, exclude_none=True)
