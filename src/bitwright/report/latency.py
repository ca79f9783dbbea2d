"""What `bitwright bench` measured of a run's file, beside the float network."""

from __future__ import annotations

from bitwright import words
from bitwright.report.charts import key, lengths
from bitwright.report.frame import Section, paragraph, shell
from bitwright.report.markup import Child, tag
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table
from bitwright.report.verdict import runtime_name
from bitwright.speed.record import BenchRecord, SpeedRow

_HEADS = [
    "runtime",
    ">threads",
    ">batch",
    ">float",
    ">quantized",
    ">quantized / float",
    ">images per second",
    "that is",
]


def latency(run: Shown) -> Section:
    """Times of both files, or the command that measures them."""
    if run.bench is not None:
        return Section("latency", "Latency", _measured(run.bench))
    said = "Not measured. On the machine where it matters: "
    again = f"{words.typed('bitwright', 'bench', run.path)}; {words.typed('bitwright', 'report', run.path)}"
    return Section("latency", "Latency", [paragraph(said, shell(again), quiet=True)])


def _measured(bench: BenchRecord) -> list[Child]:
    rows, bars = bench.rows, []
    for r in rows:
        for where, name, file in ((_where(r), "float", r.reference), ("", "quantized", r.quantized)):
            each = file.median / r.batch
            bars.append((where, each, words.duration(each), name))
    machine = bench.machine
    lead = f"Time for one image on {machine.cpu}, {words.plural(machine.cores, 'core')}; both files in turn."
    if machine.busy:
        lead += f" The machine was busy (load {machine.load:.1f}): on an idle one the times are shorter."
    return [
        paragraph(lead),
        key(("float", "float"), ("quantized", "quantized")),
        tag("figure", lengths(bars, "Time for one image: " + "; ".join(map(_said, rows)) + ".")),
        page_table(
            "Time of one call, median; in brackets the middle half", _HEADS, [_cells(r) for r in rows], wide=True
        ),
        paragraph(f"Float is {bench.what}." if bench.what else None, quiet=True),
    ]


def _where(r: SpeedRow) -> str:
    return f"{runtime_name(r.runtime)}, {words.plural(r.threads, 'thread')}, batch {r.batch}"


def _said(r: SpeedRow) -> str:
    ours, theirs = (words.duration(file.median / r.batch) for file in (r.quantized, r.reference))
    return f"{_where(r)}: {ours} against {theirs} in float"


def _cells(r: SpeedRow) -> list[TableCell | str]:
    return [
        runtime_name(r.runtime),
        str(r.threads),
        str(r.batch),
        r.reference.milliseconds(" ms"),
        r.quantized.milliseconds(" ms"),
        r.ratio.factor,
        f"{r.quantized.images_per_second:,.0f}",
        r.ratio.verdict,
    ]
