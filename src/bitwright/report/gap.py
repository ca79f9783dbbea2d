"""What quantization costs and what the runtime adds: `bitwright parity` on the page of its run."""

from __future__ import annotations

from bitwright import words
from bitwright.export.verdict import OutputGap, ParityRecord
from bitwright.report.charts import lengths
from bitwright.report.frame import paragraph, shell
from bitwright.report.markup import Child, tag
from bitwright.report.shown import Shown
from bitwright.report.tables import page_table
from bitwright.report.verdict import runtime_name

TITLE = "Loss from quantization, gap of the runtime"
_LEAST = 1e-5
"""Share below which no more is said."""
NAMED = 3
"""Layers that a sentence names."""


def gap(run: Shown) -> list[Child]:
    """Both figures, or the command that measures them."""
    if run.parity is not None:
        return [tag("h3", TITLE), *_measured(run.parity)]
    again = f"{words.typed('bitwright', 'parity', run.path)}; {words.typed('bitwright', 'report', run.path)}"
    said = "What bits cost and what the runtime adds, side by side and code by code: "
    return [paragraph(said, shell(again), quiet=True)]


def _measured(found: ParityRecord) -> list[Child]:
    count = words.plural(found.images.count, "image")
    lead = (
        f"On {count}: what the float network and the simulation differ by, and what the simulation and the file differ "
        "by in each runtime, as the mean difference of the outputs in percent of their range."
    )
    bars = _bars(found)
    summary = "Mean difference of the outputs. " + "; ".join(f"{name}: {said}" for name, _, said, _ in bars) + "."
    several = len(found.simulating) > 1
    heads = ["", ">batch", *(["output"] if several else []), ">mean difference", ">largest", ">same answer"]
    return [
        paragraph(lead),
        tag("figure", lengths(bars, summary)),
        page_table("Differences of the outputs", heads, _rows(found, several=several), wide=several),
        None if found.quantization else paragraph(_unmeasured(found), quiet=True),
        paragraph(_layers(found)),
    ]


def _bars(found: ParityRecord) -> list[tuple[str, float, str, str]]:
    """One for the bits and one for each runtime, of the output and batch size that is furthest off."""
    bars = []
    if found.quantization:
        share = max(o.share for o in found.quantization)
        bars.append(("quantization", share, _percent(share), "quantized"))
    for each in found.runtimes:
        share = max(o.share for b in each.batches for o in b.outputs)
        bars.append((runtime_name(each.runtime), share, _percent(share), "other"))
    return bars


def _rows(found: ParityRecord, *, several: bool) -> list[list[str]]:
    measured = [("loss from quantization", "", o) for o in found.quantization or ()]
    for each in found.runtimes:
        name = f"gap of {runtime_name(each.runtime)}"
        measured += [(name, str(b.batch), o) for b in each.batches for o in b.outputs]
    return [[name, batch, *([o.name] if several else []), *_cells(o)] for name, batch, o in measured]


def _cells(row: OutputGap) -> list[str]:
    same = words.NONE if row.agreement is None else words.percent(row.agreement)
    return [_percent(row.share), words.number(row.max_abs), same]


def _percent(share: float) -> str:
    if 0 < share < _LEAST:
        return f"under {100 * _LEAST:g} %"
    return "none" if share == 0 else f"{words.number(100 * share)} %"


def _unmeasured(found: ParityRecord) -> str:
    return f"The loss from quantization was not measured: {found.float_network}"


def _layers(found: ParityRecord) -> str:
    """The first layer that differs, by any code, by more than sums explain, and by so much that the file is wrong."""
    if found.first_divergence is not None:
        return f"The file computes something else than what was measured, first at {found.first_divergence}."
    rows = {x.name: x for x in found.layers}
    first = found.first_difference
    if first is None:
        return f"Layer by layer, fed the same input, no code of any of {words.plural(len(rows), 'layer')} differs."
    pair = rows[first].simulation_runtime
    said = (
        f"Layer by layer, fed the same input, {first} is the first in which any code differs: {pair.differing:,} of "
        f"{rows[first].count:,}, by at most {words.plural(pair.max_steps, 'step')}."
    )
    kernels = [f"{name} ({rows[name].found})" for name in found.kernels]
    if not kernels:
        return f"{said} No layer differs by more than sums of floats in another order explain."
    more = f" and {len(kernels) - NAMED} more" if len(kernels) > NAMED else ""
    named = f"{words.listed(kernels[:NAMED])}{more}"
    return f"{said} These differ by more than sums of floats in another order explain: {named}."
