"""What `bitwright bench` measured of a run's file, beside the float network."""

from __future__ import annotations

from typing import Any

from bitwright import words
from bitwright.report.charts import key, lengths
from bitwright.report.frame import Section, paragraph, shell
from bitwright.report.markup import tag
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table
from bitwright.report.verdict import runtime_name

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
    """Times of both files, or the command that measures them; a file of another form is passed over."""
    try:
        body = None if run.bench is None else _measured(run.bench)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        body = None
    if body is None:
        said = "Not measured. On the machine where it matters: "
        again = f"bitwright bench {run.folder or 'RUN'}; bitwright report {run.folder or 'RUN'}"
        body = [paragraph(said, shell(again), quiet=True)]
    return Section("latency", "Latency", body)


def _measured(bench: dict[str, Any]) -> list[Any]:
    rows = bench["rows"]
    bars = []
    for r in rows:
        where = f"{runtime_name(r['runtime'])}, {words.plural(r['threads'], 'thread')}, batch {r['batch']}"
        for name in ("float", "quantized"):
            each = r[name]["median"] / r["batch"]
            bars.append((where if name == "float" else "", each, words.duration(each), name))
    machine = bench["machine"]
    lead = f"Time for one image on {machine['cpu']}, {words.plural(machine['cores'], 'core')}; both files in turn."
    busy = machine.get("load") is not None and machine["load"] > machine["cores"] + 0.5
    lead += f" The machine was busy (load {machine['load']:.1f}): on an idle one the times are shorter." if busy else ""
    return [
        paragraph(lead),
        key(("float", "float"), ("quantized", "quantized")),
        tag("figure", lengths(bars, "Time for one image: " + "; ".join(map(_said, rows)) + ".")),
        page_table(
            "Time of one call, median; in brackets the middle half", _HEADS, [_cells(r) for r in rows], wide=True
        ),
        paragraph(f"Float is {bench['float']}." if bench.get("float") else None, quiet=True),
    ]


def _said(r: dict[str, Any]) -> str:
    both = " against ".join(words.duration(r[k]["median"] / r["batch"]) for k in ("quantized", "float"))
    return f"{runtime_name(r['runtime'])}, {words.plural(r['threads'], 'thread')}, batch {r['batch']}: {both} in float"


def _cells(r: dict[str, Any]) -> list[TableCell | str]:
    ratio = r["ratio"]
    return [
        runtime_name(r["runtime"]),
        str(r["threads"]),
        str(r["batch"]),
        *(words.spread(r[k], " ms") for k in ("float", "quantized")),
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"{r['quantized']['images_per_second']:,.0f}",
        words.faster(ratio),
    ]
