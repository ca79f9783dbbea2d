"""A run as its page shows it: what its folder holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright import words
from bitwright.errors import UsageError
from bitwright.given.text import read_json
from bitwright.run import folder as run_folder


@dataclass(frozen=True)
class Shown:
    """A finished run.

    Attributes:
        result: ``result.json``.
        facts: ``report.json``; empty where there is none.
        bench: ``bench.json``, if there is one.
        parity: ``parity.json``, if there is one.
        folder: its folder's name.
    """

    result: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    folder: str = ""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Rows of the layers."""
        rows: list[dict[str, Any]] = self.result["layers"]
        return rows

    @property
    def bits(self) -> str:
        """Bits of weights and activations as the layers have them, whatever was asked for."""
        rows = [r for r in self.layers if r.get("op") != "parameter"]
        found = {k: {int(r[f"{k}_bits"]) for r in rows if r.get(f"{k}_bits")} for k in ("weight", "activation")}
        if not any(found.values()):
            return words.bits(self.result.get("bits"))
        return ", ".join(f"{words.span(found[k])} {k}s" for k in ("weight", "activation"))


def read_run(folder: Path) -> Shown:
    """A run folder; what lies beside ``result.json`` and cannot be read is left out.

    Raises:
        UsageError: there is no result, or it cannot be read.
    """
    result = run_folder.read_result(folder)
    folder = folder if folder.is_dir() else folder.parent
    return Shown(
        result,
        _beside(folder / run_folder.FACTS) or {},
        _beside(folder / run_folder.BENCH),
        _beside(folder / run_folder.PARITY),
        folder.expanduser().absolute().name,
    )


def _beside(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except UsageError:
        return None
    return found if isinstance(found, dict) else None
