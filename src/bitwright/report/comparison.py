"""Several runs on one page: a table, and which of them no other run beats in both accuracy and size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bitwright import words
from bitwright.report.charts import Interval, intervals
from bitwright.report.frame import Section, bullets, definitions, document, paragraph, shell
from bitwright.report.markup import tag
from bitwright.report.panels import Panel, Series, single
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table
from bitwright.report.verdict import METRICS, figure_of, interval_of, main_metric
from bitwright.run.result import RunFidelity, RunResult

SAME_SIZE = 1.02
"""Largest size over smallest up to which runs are compared by their figures alone."""
FIDELITY = {"agreement": "same answer as float", "sqnr_db": "outputs: signal to error"}


@dataclass(frozen=True)
class Entry:
    """A run, or what went wrong instead of one."""

    name: str
    run: Shown | None = None
    error: str | None = None


@dataclass(frozen=True)
class RunFigures:
    """The figures of a run that are compared; nothing but its name and the error where it failed.

    Attributes:
        run: its name.
        error: what went wrong.
        result: its result.
        said_bits: bits of its layers.
    """

    run: str
    error: str | None = None
    result: RunResult = field(default_factory=RunResult)
    said_bits: str = ""

    @property
    def fidelity(self) -> RunFidelity:
        """The worst figures over its outputs."""
        return self.result.fidelity or RunFidelity()

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return (self.result.seconds or {}).get("total")

    def size(self, what: str) -> int | None:
        """Bytes in one form, such as ``packed_bytes``."""
        return self.result.size.get(what)

    def value(self, what: str) -> float | None:
        """One of :data:`METRICS` or :data:`FIDELITY`."""
        found: float | None = getattr(self.fidelity, what, None)
        return figure_of(self.result.quantized, what) if what in METRICS else found

    def interval(self, what: str) -> list[float] | None:
        """The 95 % interval of a metric that has one."""
        return interval_of(self.result.quantized, what)

    def to_dict(self) -> dict[str, Any]:
        """As ``compare.json`` has it."""
        if self.error is not None:
            return {"run": self.run, "error": self.error}
        result, fidelity = self.result, self.fidelity
        ours, theirs = result.quantized, result.reference
        outputs = None if fidelity.outputs is None else {name: asdict(o) for name, o in fidelity.outputs.items()}
        return {
            "run": self.run,
            "error": None,
            "model": result.model.name,
            "recipe": result.recipe.name,
            "bits": result.bits,
            "said_bits": self.said_bits,
            **{k: v for k in METRICS if (v := figure_of(ours, k)) is not None},
            **{f"{k}_ci": ends for k in METRICS if (ends := interval_of(ours, k))},
            **{f"float_{k}": v for k in METRICS if (v := figure_of(theirs, k)) is not None},
            **{k: getattr(fidelity, k) for k in ("agreement", "kl", "sqnr_db")},
            "outputs": outputs,
            **{k: self.size(k) for k in ("float_bytes", "packed_bytes", "onnx_bytes")},
            "parity": None if result.parity is None else result.parity.passed,
            "seconds": self.seconds,
        }


def figures_of(entry: Entry) -> RunFigures:
    """The figures of a run, or why it has none."""
    if entry.run is None:
        return RunFigures(entry.name, entry.error or "failed")
    return RunFigures(entry.name, None, entry.run.result, entry.run.bits)


def quality(entries: Sequence[Entry]) -> str | None:
    """The key of the first figure that all runs have: a metric, else how alike the answers are to float's."""
    runs = [e.run for e in entries if e.run is not None]
    metrics = {main_metric(r.result) for r in runs}
    if len(metrics) == 1 and (only := metrics.pop()) is not None:
        return only
    rows = [figures_of(e) for e in entries if e.run is not None]
    return next((k for k in FIDELITY if rows and all(r.value(k) is not None for r in rows)), None)


def front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (size, quality) no other beats in both, the smallest first; of equal ones the first.

    Example:
        >>> front([(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (4.0, 0.9)])
        [1, 0]
    """
    found: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not found or places[i][1] > places[found[-1]][1]:
            found.append(i)
    return found


def comparison(entries: Sequence[Entry]) -> str:
    """The page.

    Args:
        entries: in the order of the table.
    """
    runs = [e.run for e in entries if e.run is not None]
    models = sorted({r.result.model.name for r in runs})
    name = words.listed(models) or "Comparison"
    sections = [part(entries) for part in (_alike, _table, _outputs, _front, _failures, _repeat)]
    bits = {r.bits for r in runs}
    under = f"comparison of {words.plural(len(entries), 'run')}{f' · {bits.pop()}' if len(bits) == 1 else ''}"
    return document(f"{name} · comparison · bitwright", name, under, [comparison_verdict(entries)], sections)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def comparison_verdict(entries: Sequence[Entry]) -> str:
    """Which run is best (of equal ones that of the lowest KL, then the smallest), and which cannot be told from it."""
    done = [e for e in entries if e.run is not None]
    failed = len(entries) - len(done)
    tail = f" {words.plural(failed, 'run')} failed." if failed else ""
    if not done:
        return f"Nothing to compare.{tail}"
    what = quality(entries)
    if what is None:
        return f"The runs have no figure in common to compare.{tail}"
    if len(set(_measured(done))) > 1:
        return f"The runs were not measured on the same images: their figures cannot tell which is better.{tail}"
    rows = [figures_of(e) for e in done]
    best = max(rows, key=lambda r: (r.value(what) or 0.0, -_or_infinite(r.fidelity.kl), -(r.size("packed_bytes") or 0)))
    size = words.size(best.size("packed_bytes"))
    said = f"{best.run} has the best {_named(what)}, {_shown(what, best.value(what))}, at {size}"
    ends = best.interval(what)
    near = [r.run for r in rows if r is not best and ends and (own := r.interval(what)) and own[1] >= ends[0]]
    if near:
        verb = "overlaps" if len(near) == 1 else "overlap"
        kind = "interval" if len(near) == 1 else "intervals"
        said += f"; the 95 % {kind} of {words.listed(near)} {verb} with its own"
    return f"{said}.{tail}"


def _named(what: str) -> str:
    """A figure's name."""
    return METRICS.get(what) or FIDELITY[what]


def _shown(what: str, value: float | None) -> str:
    """A figure's value."""
    return words.decibel(value) if what == "sqnr_db" else words.percent(value)


# ------------------------------------------------------------------------------------------------------ sections

COLUMNS: dict[str, tuple[Callable[[RunFigures], float | None], Callable[[float | None], str]]] = {
    ">same answer": (lambda r: r.fidelity.agreement, words.percent),
    ">size": (lambda r: r.size("packed_bytes"), words.size),
    ">model.onnx": (lambda r: r.size("onnx_bytes"), words.size),
    ">KL, nats": (lambda r: r.fidelity.kl, words.number),
    ">signal to error": (lambda r: r.fidelity.sqnr_db, words.decibel),
    ">time": (lambda r: r.seconds, words.duration),
}
"""Columns of the table: what is read of a run, and how it is said."""


def _table(entries: Sequence[Entry]) -> Section:
    """One row per run; what all runs have in common has no column."""
    rows = [figures_of(e) for e in entries]
    done = [r for r in rows if r.error is None]
    metric = next((k for k in METRICS if any(r.value(k) is not None for r in done)), None)
    named_by: dict[str, Callable[[RunFigures], str]] = {
        "network": lambda r: r.result.model.name,
        "recipe": lambda r: r.result.recipe.name,
        "bits": lambda r: r.said_bits,
    }
    differing = {k: f for k, f in named_by.items() if len(set(map(f, done))) > 1}
    if all(r.result.recipe.name == r.run for r in done):
        differing.pop("recipe", None)
    heads = [">#", "run", *differing]
    heads += [f">{METRICS[metric]}", ">95 % interval", ">against float"] if metric else []
    heads += list(COLUMNS)
    body: list[list[TableCell | str]] = []
    for i, r in enumerate(rows, 1):
        cells: list[TableCell | str] = [TableCell(str(i), i), r.run]
        if r.error is None:
            cells += [f(r) for f in differing.values()] + _figures(r, metric)
        else:
            cells += ["failed", *([""] * (len(heads) - 3))]
        body.append(cells)
    made = page_table("The runs", heads, body, sortable=True, name="runs")
    return Section("table", "Figures", [paragraph("Click a heading to sort.", quiet=True), made])


def _outputs(entries: Sequence[Entry]) -> Section | None:
    """Each output of each run, where networks have several."""
    found = [(e.name, e.run.result.evaluation.outputs) for e in entries if e.run is not None]
    if all(len(outputs) < 2 for _, outputs in found):
        return None
    rows: list[list[TableCell | str]] = [
        [
            name,
            output,
            TableCell(words.percent(o.agreement), o.agreement),
            TableCell(words.number(o.kl), o.kl),
            TableCell(words.signal_to_error(o.sqnr_db, exact=o.exact), o.sqnr_db),
        ]
        for name, outputs in found
        for output, o in outputs.items()
    ]
    heads = ["run", "output", ">same answer", ">KL, nats", ">signal to error"]
    made = page_table("Each output against float", heads, rows, sortable=True, name="outputs")
    lead = paragraph("The networks have several outputs. The figures above are those of the worst one of each run.")
    return Section("outputs", "Output by output", [lead, made])


def _figures(r: RunFigures, metric: str | None) -> list[TableCell | str]:
    cells: list[TableCell | str] = []
    if metric is not None:
        value, before = r.value(metric), figure_of(r.result.reference, metric)
        change = None if value is None or before is None else value - before
        cells += [TableCell(words.percent(value), value), words.interval(r.interval(metric))]
        cells += [TableCell(words.NONE if change is None else words.points(change), change)]
    return cells + [TableCell(said(read(r)), read(r)) for read, said in COLUMNS.values()]


def _front(entries: Sequence[Entry]) -> Section | None:
    what = quality(entries)
    places = [(i, r, size) for i, r in enumerate(map(figures_of, entries), 1) if (size := r.size("packed_bytes"))]
    if what is None or len(places) < 2:
        return None
    sizes = [size for *_, size in places]
    if max(sizes) <= SAME_SIZE * min(sizes):
        return _rows_of_intervals(what, [r for _, r, _ in places])
    unit, per = words.unit("weight_bytes", max(sizes))
    points, (factor, of) = [(size, r.value(what) or 0.0) for _, r, size in places], _unit_of(what)
    chosen = front(points)

    def dots(look: str, name: str, these: Sequence[int]) -> Series:
        titles = [f"{n}. {r.run}: {_shown(what, r.value(what))}, {words.size(size)}" for n, r, size in places]
        return Series(
            [points[i][0] / per for i in these],
            [factor * points[i][1] for i in these],
            f"large {look}",
            name=name,
            titles=[titles[i] for i in these],
            ends=[_ends(what, places[i][1]) for i in these],
            labels=[str(places[i][0]) for i in these],
        )

    best, rest = dots("quantized", "not beaten", chosen), [i for i in range(len(points)) if i not in chosen]
    line = Series(best.x, best.y, "quantized thin", ("line",))
    listed = words.listed([f"{places[i][0]} ({places[i][1].run})" for i in chosen])
    said = f"No run is both smaller and better than these, in order of size: {listed}."
    level = _float_level(what, [r for _, r, _ in places])
    note = " The dashed line is the float network." if level is not None else ""
    panel = Panel(
        (line, best, dots("float", "beaten in both", rest)),
        f"size of model.safetensors, {unit}",
        f"{_named(what)}, {of}",
        level=level,
        height=17,
        summary=f"{_named(what)} against size. {said}",
    )
    return Section("front", "Accuracy against size", single(panel, f"{said} Whiskers are 95 % intervals.{note}"))


def _unit_of(what: str) -> tuple[float, str]:
    """What figures are multiplied by in charts, and the unit that they have then."""
    return (1.0, "dB") if what == "sqnr_db" else (100.0, "%")


def _ends(what: str, r: RunFigures) -> tuple[float, float]:
    """Ends of the interval, in the unit of charts; the figure itself where there is no interval."""
    low, high = (_unit_of(what)[0] * v for v in r.interval(what) or [r.value(what) or 0.0] * 2)
    return low, high


def _float_level(what: str, rows: Sequence[RunFigures]) -> float | None:
    """The float network's figure, where all runs have the same."""
    found = {figure_of(r.result.reference, what) for r in rows}
    only = found.pop()
    return None if found or only is None else _unit_of(what)[0] * only


def _rows_of_intervals(what: str, rows: list[RunFigures]) -> Section:
    """A chart for runs of one size: the figure of each with its interval, one below the other."""
    factor, unit = _unit_of(what)
    level = _float_level(what, rows)
    drawn = [
        Interval(r.run, factor * value, *_ends(what, r), title=f"{r.run}: {_shown(what, value)}")
        for r in rows
        if (value := r.value(what)) is not None
    ]
    said = "; ".join(f"{r.run} {_shown(what, r.value(what))}" for r in rows)
    size = words.size(rows[0].size("packed_bytes"))
    caption = (
        f"All runs have the same size to {100 * (SAME_SIZE - 1):.0f} %, {size}. Lines "
        f"are 95 % intervals{', the dashed one is the float network' if level is not None else ''}."
    )
    drawing = intervals(drawn, f"{_named(what)}, {unit}", f"{_named(what)}: {said}.", level)
    return Section("front", "Accuracy at this size", tag("figure", tag("figcaption", caption), drawing))


def _measured(entries: Sequence[Entry]) -> list[str | None]:
    """Digests of the images that each run was measured on."""
    return [e.run.result.evaluated_on.sha256 for e in entries if e.run is not None]


def _alike(entries: Sequence[Entry]) -> Section | None:
    """What keeps the figures from being compared with each other."""
    runs = [e.run for e in entries if e.run is not None]
    said = []
    if len({r.result.model.name for r in runs}) > 1:
        said.append("The runs are of different networks.")
    if len(set(_measured(entries))) > 1:
        said.append("They were not measured on the same images: their figures cannot be compared with each other.")
    if len({r.result.calibrated_on.sha256 for r in runs}) > 1:
        said.append("They were calibrated on different images.")
    if len({r.result.seed for r in runs}) > 1:
        said.append("Their seeds differ.")
    return Section("alike", "What else differs", bullets(said)) if said else None


def _failures(entries: Sequence[Entry]) -> Section | None:
    failed = [e for e in entries if e.run is None]
    if not failed:
        return None
    return Section("failed", "What failed", definitions([(e.name, e.error) for e in failed]))


def _repeat(entries: Sequence[Entry]) -> Section | None:
    found: dict[str, list[str]] = {}
    for e in entries:
        if e.run is not None:
            found.setdefault(e.run.result.command or words.NONE, []).append(e.name)
    pairs = [(words.listed(names), shell(c)) for c, names in found.items()]
    return Section("repeat", "To repeat it", definitions(pairs)) if found else None
