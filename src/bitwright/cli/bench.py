"""`bitwright bench`: the speed of a run's file beside the float network."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import RenderableType

from bitwright import words
from bitwright.cli import tables
from bitwright.cli.calls import BenchCall
from bitwright.errors import UsageError
from bitwright.run.folder import BENCH, exclusive
from bitwright.run.result import read_as
from bitwright.runtimes import RUNTIMES
from bitwright.speed.bench import bench as measured
from bitwright.speed.bench import file_to_time
from bitwright.speed.record import BenchRecord, FloatOperator
from bitwright.terminal import Terminal


def counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """Numbers of at least 1 behind an option.

    Raises:
        UsageError: anything else.

    Example:
        >>> counts("1,32", "--batch")
        (1, 32)
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise UsageError(f"Expected numbers of at least 1 as {option}, as in 1,32, found '{text}'.")
    return tuple(map(int, parts))


def bench(call: BenchCall, terminal: Terminal) -> None:
    """Times the runs one after the other; see :func:`bitwright.bench`.

    Raises:
        UsageError: a run is named twice or cannot be timed, which is said before any is.
    """
    batches, threads = counts(call.batch, "--batch"), counts(call.threads, "--threads")
    if len({Path(run).expanduser().resolve() for run in call.runs}) < len(call.runs):
        raise UsageError("Expected different runs, found one of them twice. Name each once.")
    for run in call.runs[1:]:
        file_to_time(Path(run).expanduser())
    records = []
    for run in call.runs:
        terminal.begin("Taking the quantizers out for the float file")
        timed = exclusive(measured)(
            run,
            runtimes=call.runtime,
            batches=batches,
            threads=threads,
            seconds=call.seconds,
            progress=terminal.progress,
        )
        terminal.finish()
        records.append(timed)
    terminal.result(records[0] if len(records) == 1 else {"runs": records})
    terminal.show(*(view for record in records for view in views(read_as(BenchRecord, record))))


def views(found: BenchRecord) -> list[RenderableType]:
    """The measurements for people, and how to read them."""
    made = tables.table(
        "runtime", ">threads", ">batch", ">float", ">quantized", ">quantized / float", ">memory", "what that says",
        title=f"{found.run} on {found.machine.cpu}",
    )  # fmt: skip
    for row in found.rows:
        made.add_row(
            row.runtime,
            str(row.threads),
            str(row.batch),
            row.reference.milliseconds(),
            row.quantized.milliseconds(),
            row.ratio.factor,
            f"{words.size(row.reference.above_start_bytes)}, {words.size(row.quantized.above_start_bytes)}",
            row.ratio.verdict,
        )
    lines: list[RenderableType] = [
        made,
        "Milliseconds of a call: median (first to third quartile). Memory: what the float file and the quantized one "
        "add to the process.",
        f"Float is {found.what}.",
    ]
    for about in found.runtimes:
        if about.products is not None:
            made_of = about.products["quantized"]
            whole = made_of["integer"] + made_of["float"]
            lines.append(
                f"ONNX Runtime {about.version} computes {made_of['integer']} of {whole} convolutions and matrix "
                "products in integers. In float:"
            )
            lines.append(float_table(about.float_operators or []))
    if (machine := found.machine).busy:
        lines.append(
            f"The machine was busy (load {machine.load:.1f} on {machine.cores} cores): the times are those of a busy "
            "machine."
        )
    for missing in found.absent:
        lines.append(f"{RUNTIMES[missing['runtime']].title} is not installed. To measure in it: {missing['install']}")
    return [*lines, f"Written: {BENCH} in {found.run}"]


def float_table(operators: list[FloatOperator]) -> RenderableType:
    """The operators that compute in float, and why."""
    made = tables.table("operator", ">count", "why it computes in float")
    for each in operators:
        made.add_row(each.operator, str(each.count), each.reason)
    return made
