"""What somebody sees who looks at a network or its result in a session: a few lines, or a small table in a notebook."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bitwright import words
from bitwright.errors import BitwrightError, UsageError
from bitwright.graph.student import Student
from bitwright.measure.shown import in_short, metric_rows
from bitwright.run import folder as run_folder
from bitwright.run.about import sizes, stored_values
from bitwright.run.result import RunResult

Cells: TypeAlias = tuple[str, str, str]
MOST_PACKED = 1 << 22
"""Numbers of a network that is packed, in a fraction of a second, to say how large its file will be."""


class Figures(dict[str, Any]):
    """A result as it is everywhere, a dict, that is printed as a small table.

    Example:
        >>> Figures({"float": {"top1": 0.93}, "quantized": {"top1": 0.92}})
                          float  quantized
        top-1 accuracy  93.00 %    92.00 %
        >>> Figures()
        {}
    """

    def __repr__(self) -> str:
        rows = self._rows()
        if not rows:
            return super().__repr__()
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _html(self._rows()) or html.escape(super().__repr__())

    def _rows(self) -> list[Cells]:
        """A heading and the figures; nothing where there are none."""
        try:
            read = RunResult.read(self)
        except UsageError:
            return []
        rows = [*metric_rows(read.evaluation), *_facts(read)]
        bits = read.bits or {}
        quantized = words.notation(bits.get("weights"), bits.get("activations")) if bits else "quantized"
        return [("", "float", quantized), *rows] if rows else []


def _facts(read: RunResult) -> list[Cells]:
    """What a run knows besides its figures."""
    said: list[Cells] = []
    if read.model.name:
        said.append(("network", read.model.name, f"by {read.recipe.name}"))
    if read.size.get("packed_bytes"):
        said.append(("size", words.size(read.size.get("float_bytes")), words.size(read.size.get("packed_bytes"))))
    if read.seconds:
        total = read.seconds.get("total") or sum(x for x in read.seconds.values() if x)
        said.append(("time", "", words.duration(total)))
    if read.warnings:
        said.append(("warnings", "", str(len(read.warnings))))
    return said


def lines(model: Student, kind: str) -> list[str]:
    """Three lines of a quantized network: what it is, its bits and size, and what it lost.

    Args:
        model: with its result.
        kind: the name of its class.
    """
    read = RunResult.read(model.result)
    return [
        f"{kind} {read.model.name} by {read.recipe.name}, for {model.scheme.runtime}",
        f"{words.bits(model.scheme.described_bits())}: {_size(model, read)}",
        f"loss from float{_lost(read)}",
    ]


def _size(model: Student, read: RunResult) -> str:
    expected = sizes(model)
    known = read.size.get("packed_bytes") or _packed_bytes(model)
    about, quantized = ("", known) if known else ("about ", expected["expected_bytes"])
    times = words.smaller(expected["float_bytes"] / quantized if quantized else None)
    return f"{about}{words.size(quantized)} instead of {words.size(expected['float_bytes'])} ({times})"


def _packed_bytes(model: Student) -> int | None:
    """What the file of a small network will have, whose description weighs as much as its numbers."""
    if not model.frozen or stored_values(model) > MOST_PACKED:
        return None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return run_folder.write_model(model, Path(scratch))
    except (BitwrightError, OSError):  # a network is shown on a full disk too
        return None


def _lost(read: RunResult) -> str:
    """The figures of fidelity, on the images that they were measured on."""
    outputs, count, kind = read.evaluation.outputs, read.evaluated_on.count, "image"
    if not outputs and read.checked is not None:
        outputs, count, kind = read.checked.outputs, read.checked.images, "calibration image"
    if not outputs:
        return " was not measured"
    said = "; ".join(
        f"{name + ': ' if len(outputs) > 1 else ''}{', '.join(in_short(o))}" for name, o in outputs.items()
    )
    return f"{'' if count is None else f' on {words.plural(count, kind)}'}: {said}"


def table_of(model: Student, kind: str) -> str:
    """The same as a small table for a notebook, with the figures that were measured."""
    first, second, third = lines(model, kind)
    rows = [*metric_rows(RunResult.read(model.result).evaluation)]
    figures = _html([("", "float", "quantized"), *rows]) if rows else ""
    return "".join(f"<div>{html.escape(line)}</div>" for line in (first, second, third)) + figures


def _html(rows: Sequence[Cells]) -> str:
    return f"<table>{''.join(map(_html_row, rows))}</table>" if rows else ""


def _html_row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
