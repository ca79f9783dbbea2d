"""The network along its depth: bits, noise and sensitivity of every layer; the worst of them in detail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitwright import words
from bitwright.report.charts import Axis, bar, chart, dot, key, linear, vertical
from bitwright.report.frame import Section, paragraph, shell
from bitwright.report.kept import Counted, LayerHistograms, ValueHistogram, WeightHistogram
from bitwright.report.markup import Child, Markup, tag
from bitwright.report.panels import Panel, Series, single
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table
from bitwright.run.result import Diagnosis, LayerRow, Remedies, Remedy

LEAST_DEPTH = 2
BITS = {"weight_bits": "weights", "activation_bits": "activations"}
GRID_LINES = 33
"""Levels up to which each is drawn."""


# ----------------------------------------------------------------------------------------------- along the depth


def depth(run: Shown) -> Section | None:
    """Charts over the layers in order, one below the other."""
    rows = run.layers
    if len(rows) < LEAST_DEPTH:
        return None
    figures = [f for f in (_noise(run), _bits(run), _sensitivity(run)) if f is not None]
    lead = paragraph(
        "Layers in the order in which the network computes them; their numbers are those of the table below. "
        "Point at a mark for its name."
    )
    return Section("depth", "Along the network", [lead, figures])


def _along(rows: Sequence[Any]) -> Axis:
    found = linear(1, len(rows), "layer", count=6)
    ticks = tuple(t for t in found.ticks if 1 <= t[0] <= len(rows) and t[0] == int(t[0]))
    return Axis(0.5, len(rows) + 0.5, ticks, found.name)


def _noise(run: Shown) -> Markup | None:
    rows = run.layers
    known = [(i, r.name, r.sqnr_db) for i, r in enumerate(rows, 1) if r.sqnr_db is not None]
    if len(known) < LEAST_DEPTH:
        return None
    values = [v for _, _, v in known]
    titles = [f"{i}. {name}: {words.decibel(v)}" for i, name, v in known]
    line = Series([i for i, _, _ in known], values, "quantized", ("line", "dot"), titles=titles)
    worst = min(known, key=lambda k: k[2])
    summary = (
        f"Signal to quantization error of {len(known)} layers' outputs, from {words.decibel(known[0][2])} at the "
        f"first to {words.decibel(known[-1][2])} at the last; lowest at {worst[1]} with {words.decibel(worst[2])}."
    )
    caption = (
        "How far each layer's output lies above its error; 10 dB more is a tenth of the error's energy. Errors add up "
        f"from layer to layer. Lowest: {worst[1]}, {words.decibel(worst[2])}."
    )
    panel = Panel((line,), "layer", "signal to error, dB", x_holds=(1.0, len(rows)), y_holds=(0.0,), summary=summary)
    return single(panel, tag("b", "Noise. "), caption)


def _bits(run: Shown) -> Markup | None:
    """A chart where bits differ between layers, a sentence where they do not."""
    rows = run.layers
    kinds = {k: said for k, said in BITS.items() if any(getattr(r, k) for r in rows)}
    if not kinds:
        return None
    said = "; ".join(f"{name}: {_tally(rows, k)}" for k, name in kinds.items())
    caption = tag("figcaption", tag("b", "Bits. "), f"{said[:1].upper()}{said[1:]}.")
    if all(len({bits for r in rows if (bits := getattr(r, k))}) == 1 for k in kinds):
        return tag("figure", caption)
    x = _along(rows)
    most = max(getattr(r, k) or 0 for r in rows for k in kinds)
    y = Axis(0.0, most * 1.05, tuple((float(b), str(b)) for b in (2, 4, 8, 16) if b <= most), "bits")
    marks = []
    for i, r in enumerate(rows, 1):
        if bits := r.weight_bits:
            marks.append(bar(i - 0.4, i + 0.4, 0, bits, x, y, "quantized", f"{i}. {r.name}: {bits}-bit weights"))
        if bits := r.activation_bits:
            marks.append(dot(i, bits, x, y, "other", f"{i}. {r.name}: {bits}-bit activations"))
    looks = {"weight_bits": "quantized", "activation_bits": "other round"}
    legend = key(*((looks[k], name) for k, name in kinds.items()))
    return tag("figure", caption, legend, chart(marks, x, y, summary=f"Bits of each layer. {said}.", height=7.0))


def _tally(rows: list[LayerRow], what: str) -> str:
    found = sorted({bits for r in rows if (bits := getattr(r, what))})
    counts = [(b, sum(getattr(r, what) == b for r in rows)) for b in found]
    if len(counts) == 1:
        return f"{found[0]} in all {words.plural(counts[0][1], 'layer')} that have some"
    return ", ".join(f"{b} in {words.plural(n, 'layer')}" for b, n in counts)


def stored_scores(run: Shown) -> dict[str, float]:
    """How strongly the outputs depend on each layer's values, by layer; empty for a run that needed no scores."""
    return {} if run.result.scores is None else run.result.scores.layers


def _sensitivity(run: Shown) -> Markup | None:
    values, rows = stored_scores(run), run.layers
    places: dict[str, int] = {}
    for i, r in enumerate(rows, 1):
        places.setdefault(r.name, i)
    known = [(places[n], n, v) for n, v in values.items() if n in places and v > 0]
    if len(known) < LEAST_DEPTH:
        return None
    titles = [f"{i}. {n}: {words.number(v)}" for i, n, v in known]
    bars = Series([i for i, *_ in known], [v for *_, v in known], "float", ("bar",), titles=titles)
    title = "Label-free score"
    meaning = "how strongly the outputs depend on each layer's values (the trace of its Hessian)"
    top = sorted(known, key=lambda k: -k[2])[:3]
    most = words.listed([f"{n} ({words.number(v)})" for _, n, v in top])
    summary = f"{title} of {len(known)} layers. Highest: {most}."
    panel = Panel((bars,), "layer", "score", y_log=True, x_holds=(1.0, len(rows)), summary=summary)
    return single(panel, tag("b", f"{title}: "), f"{meaning}. Highest: {most}.")


# -------------------------------------------------------------------------------------------------- every layer


def every_layer(run: Shown) -> Section:
    """The table of layers; it can be sorted and searched."""
    rows = run.layers
    if not rows:
        return Section("layers", "Every layer", paragraph("Nothing is quantized.", quiet=True))
    scores, shares = stored_scores(run), _shares(run)
    heads = [
        ">#",
        "layer",
        "operator",
        ">weight bits",
        ">activation bits",
        "scale per",
        ">parameters",
        ">MACs",
        ">SQNR",
    ]
    heads += [">score"] if scores else []
    heads += [">share of loss"] if shares else []
    made = page_table(
        "Every quantized tensor",
        heads,
        [_layer_cells(i, r, scores, shares) for i, r in enumerate(rows, 1)],
        sortable=True,
        name="layer-table",
    )
    lead = "Click a heading to sort. Parameters and MACs (multiply-accumulates for one image) are zero where a layer "
    return Section("layers", "Every layer", [paragraph(lead + "only moves or joins values.", quiet=True), made])


def _layer_cells(i: int, row: LayerRow, scores: dict[str, float], shares: dict[str, float]) -> list[TableCell | str]:
    name = row.name
    cells: list[TableCell | str] = [TableCell(str(i), i), name, row.op]
    cells += [TableCell(str(bits) if bits else words.NONE, bits) for bits in (row.weight_bits, row.activation_bits)]
    cells.append(row.granularity)
    cells += [TableCell(words.scaled(n) if n else words.NONE, n) for n in (row.parameters, row.macs)]
    cells.append(TableCell(words.decibel(row.sqnr_db), row.sqnr_db))
    if scores:
        cells.append(TableCell(words.number(scores.get(name)), scores.get(name)))
    if shares:
        share = shares.get(name)
        cells.append(TableCell(words.percent(share, 1) if share is not None else words.NONE, share))
    return cells


def _shares(run: Shown) -> dict[str, float]:
    """Share of the loss that goes when a tensor of the layer is float; the larger share of the layer's two tensors."""
    found: dict[str, float] = {}
    for row in () if run.result.diagnosis is None else run.result.diagnosis.layers:
        found[row.name] = max(found.get(row.name, 0.0), row.share)
    return found


# ---------------------------------------------------------------------------------------------------- diagnosis


def diagnosis(run: Shown) -> Section | None:
    """Which tensors the loss comes from, and the rules that would give it back."""
    found = run.result.diagnosis
    if found is None:
        return None
    if not found.layers:
        said = "Nothing stands out: no single tensor costs enough to be worth more bits."
        return Section("diagnosis", "Where the loss comes from", paragraph(said))
    rows = [[r.name, r.tensor, words.number(r.loss_without), words.percent(r.share, 1)] for r in found.layers]
    scored = run.result.fidelity is not None and run.result.fidelity.kl is not None
    unit = "nats of KL divergence from float" if scored else "of the outputs' mean square in squared error"
    lost = f"{words.number(found.loss)} {unit}"
    lead = (
        f"On {words.plural(found.images, 'calibration image')} the quantized network loses {lost}. "
        "Each row is measured with that one tensor in float and everything else as it is; shares need not add up to "
        "100 %."
    )
    body: list[Child] = [
        paragraph(lead),
        page_table("Loss without each tensor's error", ["layer", "tensor", ">loss without it", ">share"], rows),
    ]
    body += _rules(found)
    return Section("diagnosis", "Where the loss comes from", body)


def _rules(found: Diagnosis) -> list[Child]:
    if not found.rules:
        return []
    each: list[tuple[list[str], Remedy | Remedies]] = [([r.rule], r) for r in found.rules]
    each += [] if found.together is None else [(found.together.rules, found.together)]
    rows: list[list[TableCell | str]] = [
        [
            TableCell(shell(" ".join(f"--rule '{rule}'" for rule in rules))),
            words.number(r.loss_after),
            f"+{words.size(r.bytes)}",
        ]
        for rules, r in each
    ]
    most = min(r.loss_after for _, r in each) < (found.loss or 0.0) / 2
    title = f"What would give {'most' if most else 'some'} of it back"
    return [page_table(title, ["added to the command", ">loss", ">file"], rows)]


# ------------------------------------------------------------------------------------------------- worst layers


def noisiest(run: Shown) -> Section | None:
    """Histograms of the noisiest layers with their grids."""
    found = None if run.facts is None else run.facts.histograms
    if found is None or not found.layers:
        return None
    lead = paragraph(
        "The layers with the lowest signal to error, the worst first. Bars are the float network's numbers on "
        f"{words.plural(found.images, 'calibration image')}, their height the logarithm of the count so that "
        "rare ones stay visible. Lines are the values that the grid has, or the ends of its range where there are too "
        "many; beyond the ends, numbers are clipped."
    )
    legend = key(("float", "numbers"), ("other", "clipped"), ("mark", "grid"))
    noise = {r.name: r.sqnr_db for r in reversed(run.layers)}
    shown = tag("div", (_layer(x, noise) for x in found.layers), class_="worsts")
    return Section("worst", "The noisiest layers", [lead, legend, shown])


def _layer(found: LayerHistograms, noise: dict[str, float | None]) -> Markup:
    charts = [_weights(found.weight)] if found.weight is not None else []
    charts += [_activations(found.activation)] if found.activation is not None else []
    said = words.decibel(noise.get(found.layer))
    title = tag("h3", tag("span", found.layer, class_="layer"), " ", tag("small", said))
    return tag("div", title, tag("div", charts, class_="pair"), class_="worst two" if len(charts) > 1 else "worst")


def _weights(data: WeightHistogram) -> Markup:
    low, high = data.levels
    levels = high - low + 1
    used = f", {data.used} of {levels} levels used" if data.used else ""
    each = f", {words.plural(data.scales, 'scale')}" if data.scales else ""
    said = f"{data.bits}-bit weights{each}{used}; {_clipped(data)}"
    lines = [float(q) for q in range(low, high + 1)] if levels <= GRID_LINES else [float(low), float(high)]
    return _histogram(data, lines, (low - 0.5, high + 0.5), "weight, in steps of its own scale", said)


def _activations(data: ValueHistogram) -> Markup:
    low, high = data.grid
    half = data.step / 2
    levels = round((high - low) / data.step) + 1
    lines = [low + i * data.step for i in range(levels)] if levels <= GRID_LINES else [low, high]
    said = f"{data.bits}-bit activations, step {words.number(data.step)}; {_clipped(data)}"
    return _histogram(data, lines, (low - half, high + half), "value of the output", said)


def _clipped(data: Counted) -> str:
    share = data.below + data.above
    return "none clipped" if share == 0 else f"{words.percent(share)} clipped"


def _histogram(data: Counted, lines: list[float], grid: tuple[float, float], name: str, said: str) -> Markup:
    start, end = data.range
    counts = data.counts
    width = (end - start) / len(counts)
    x = linear(start, end, name, count=4)
    y = Axis(0.0, math.log10(1 + max(counts, default=0)) * 1.05 or 1.0)
    drawn = [vertical(v, x, "mark") for v in lines]
    for i, n in enumerate(counts):
        if not n:
            continue
        left = start + i * width
        inside = grid[0] <= left + width / 2 <= grid[1]
        drawn.append(bar(left, left + width, 0, math.log10(1 + n), x, y, "float" if inside else "other"))
    low, high = (0.0 if abs(v) < 1e-4 * (end - start) else v for v in data.seen)
    seen = f"{words.number(low)} to {words.number(high)}"
    made = chart(drawn, x, y, summary=f"Histogram: {said}. Numbers from {seen}.", height=7.0)
    return tag("figure", tag("figcaption", f"{said}. Seen: {seen}."), made)
