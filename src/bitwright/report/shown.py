"""A run as its page shows it: what its folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from bitwright import words
from bitwright.errors import UsageError
from bitwright.export.verdict import ParityRecord
from bitwright.given.text import read_json
from bitwright.report.kept import PageFacts
from bitwright.run import folder as run_folder
from bitwright.run.result import LayerRow, RunResult, read_as
from bitwright.speed.record import BenchRecord

T = TypeVar("T")


@dataclass(frozen=True)
class Shown:
    """A finished run.

    Attributes:
        result: ``result.json``.
        facts: ``report.json``, if there is one.
        bench: ``bench.json``, if there is one.
        parity: ``parity.json``, if there is one.
        folder: its folder's name.
        path: of the folder, for commands: from where the page is made, if it lies below.
    """

    result: RunResult
    facts: PageFacts | None = None
    bench: BenchRecord | None = None
    parity: ParityRecord | None = None
    folder: str = ""
    path: str = "RUN"

    @property
    def layers(self) -> list[LayerRow]:
        """Rows of the layers."""
        return self.result.layers

    @property
    def bits(self) -> str:
        """Bits of weights and activations as the layers have them, whatever was asked for."""
        rows = [r for r in self.layers if r.op != "parameter"]
        weights = {r.weight_bits for r in rows if r.weight_bits}
        activations = {r.activation_bits for r in rows if r.activation_bits}
        if not weights and not activations:
            return words.bits(self.result.bits)
        return f"{words.span(weights)} weights, {words.span(activations)} activations"


def read_run(folder: Path) -> Shown:
    """A run folder; what lies beside ``result.json`` and cannot be read is left out.

    Raises:
        UsageError: there is no result, or it cannot be read.
    """
    result = run_folder.read_result(folder)
    folder = (folder if folder.is_dir() else folder.parent).expanduser().absolute()
    return Shown(
        result,
        _beside(folder / run_folder.FACTS, PageFacts),
        _beside(folder / run_folder.BENCH, BenchRecord),
        _beside(folder / run_folder.PARITY, ParityRecord),
        folder.name,
        words.short_path(folder),
    )


def _beside(path: Path, kind: type[T]) -> T | None:
    try:
        return read_as(kind, read_json(path))
    except (UsageError, ValidationError):
        return None
