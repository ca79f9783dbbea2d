"""Several runs on one page: a table, and which of them no other run beats in both accuracy and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright import words
from bitwright.measure.metrics import read_fidelity
from bitwright.report.charts import Interval, intervals
from bitwright.report.frame import Section, bullets, definitions, document, paragraph, shell
from bitwright.report.markup import tag
from bitwright.report.panels import Panel, Series, single
from bitwright.report.shown import Shown
from bitwright.report.tables import TableCell, page_table
from bitwright.report.verdict import METRICS, main_metric

SAME_SIZE = 1.02
"""Largest size over smallest up to which runs are compared by their figures alone."""
FIDELITY = {"agreement": "same answer as float", "sqnr_db": "outputs: signal to error"}


@dataclass(frozen=True)
class Entry:
    """A run, or what went wrong instead of one."""

    name: str
    run: Shown | None = None
    error: str | None = None


def row(entry: Entry) -> dict[str, Any]:
    """The figures of a run that are compared; ``error`` alone where it failed."""
    if entry.run is None:
        return {"run": entry.name, "error": entry.error}
    result = entry.run.result
    theirs, ours = result.get("float") or {}, result.get("quantized") or {}
    fidelity, size = result.get("fidelity") or {}, result["size"]
    parity = result.get("parity") or {}
    return {
        "run": entry.name,
        "error": None,
        "model": result["model"]["name"],
        "recipe": result["recipe"]["name"],
        "bits": result.get("bits"),
        "said_bits": entry.run.bits,
        **{k: ours[k] for k in METRICS if ours.get(k) is not None},
        **{f"{k}_ci": ours[f"{k}_ci"] for k in METRICS if ours.get(f"{k}_ci")},
        **{f"float_{k}": theirs[k] for k in METRICS if theirs.get(k) is not None},
        **{k: fidelity.get(k) for k in ("agreement", "kl", "sqnr_db", "outputs")},
        **{k: size.get(k) for k in ("float_bytes", "packed_bytes", "onnx_bytes")},
        "parity": None if not parity else parity.get("first_divergence") is None,
        "seconds": (result.get("seconds") or {}).get("total"),
    }


def quality(entries: Sequence[Entry]) -> str | None:
    """The key of the first figure that all runs have: a metric, else how alike the answers are to float's."""
    runs = [e.run for e in entries if e.run is not None]
    metrics = {main_metric(r.result) for r in runs}
    if len(metrics) == 1 and (only := metrics.pop()) is not None:
        return only
    rows = [row(e) for e in entries if e.run is not None]
    return next((k for k in FIDELITY if rows and all(r[k] is not None for r in rows)), None)


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


def comparison(entries: Sequence[Entry], title: str = "") -> str:
    """The page.

    Args:
        entries: in the order of the table.
        title: what they have in common; found out if not given.
    """
    runs = [e.run for e in entries if e.run is not None]
    models = sorted({r.result["model"]["name"] for r in runs})
    name = title or words.listed(models) or "Comparison"
    sections = [part(entries) for part in (_alike, _table, _outputs, _front, _failures, _repeat)]
    bits = {r.bits for r in runs}
    under = f"comparison of {words.plural(len(entries), 'run')}{f' · {bits.pop()}' if len(bits) == 1 else ''}"
    return document(f"{name} · comparison · bitwright", name, under, [comparison_verdict(entries)], sections)


def comparison_verdict(entries: Sequence[Entry]) -> str:
    """Which run is best, and which others cannot be told from it."""
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
    rows = [row(e) for e in done]
    best = max(rows, key=lambda r: r[what])
    said = (
        f"{best['run']} has the best {_named(what)}, {_shown(what, best[what])}, at {words.size(best['packed_bytes'])}"
    )
    ends = best.get(f"{what}_ci")
    near = [r["run"] for r in rows if r is not best and ends and r.get(f"{what}_ci") and r[f"{what}_ci"][1] >= ends[0]]
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

COLUMNS: tuple[tuple[str, str], ...] = (
    ("agreement", ">same answer"),
    ("packed_bytes", ">size"),
    ("onnx_bytes", ">model.onnx"),
    ("kl", ">KL, nats"),
    ("sqnr_db", ">signal to error"),
    ("seconds", ">time"),
)
SAID = {
    "agreement": words.percent,
    "kl": words.number,
    "sqnr_db": words.decibel,
    "packed_bytes": words.size,
    "onnx_bytes": words.size,
    "seconds": words.duration,
}


def _table(entries: Sequence[Entry]) -> Section:
    """One row per run; what all runs have in common has no column."""
    rows = [row(e) for e in entries]
    done = [r for r in rows if r["error"] is None]
    metric = next((k for k in METRICS if any(r.get(k) is not None for r in done)), None)
    named_by: dict[str, Callable[[dict[str, Any]], str]] = {
        "network": lambda r: r["model"],
        "recipe": lambda r: r["recipe"],
        "bits": lambda r: r["said_bits"],
    }
    differing = {k: f for k, f in named_by.items() if len(set(map(f, done))) > 1}
    if all(r["recipe"] == r["run"] for r in done):
        differing.pop("recipe", None)
    heads = [">#", "run", *differing]
    heads += [f">{METRICS[metric]}", ">95 % interval", ">against float"] if metric else []
    heads += [head for _, head in COLUMNS]
    body: list[list[TableCell | str]] = []
    for i, r in enumerate(rows, 1):
        cells: list[TableCell | str] = [TableCell(str(i), i), r["run"]]
        if r["error"] is None:
            cells += [f(r) for f in differing.values()] + _figures(r, metric)
        else:
            cells += ["failed", *([""] * (len(heads) - 3))]
        body.append(cells)
    made = page_table("The runs", heads, body, sortable=True, name="runs")
    return Section("table", "Figures", [paragraph("Click a heading to sort.", quiet=True), made])


def _outputs(entries: Sequence[Entry]) -> Section | None:
    """Each output of each run, where networks have several."""
    found = [(e.name, read_fidelity(e.run.result.get("fidelity"))) for e in entries if e.run is not None]
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


def _figures(r: dict[str, Any], metric: str | None) -> list[TableCell | str]:
    cells: list[TableCell | str] = []
    if metric is not None:
        value, before = r.get(metric), r.get(f"float_{metric}")
        change = None if value is None or before is None else value - before
        cells += [TableCell(words.percent(value), value), words.interval(r.get(f"{metric}_ci"))]
        cells += [TableCell(words.NONE if change is None else words.points(change), change)]
    return cells + [TableCell(SAID[k](r.get(k)), r.get(k)) for k, _ in COLUMNS]


def _front(entries: Sequence[Entry]) -> Section | None:
    what = quality(entries)
    places = [(i, r) for i, r in enumerate(map(row, entries), 1) if r["error"] is None and r["packed_bytes"]]
    if what is None or len(places) < 2:
        return None
    sizes = [r["packed_bytes"] for _, r in places]
    if max(sizes) <= SAME_SIZE * min(sizes):
        return _rows_of_intervals(what, [r for _, r in places])
    unit, per = words.unit("weight_bytes", max(sizes))
    points, (factor, of) = [(r["packed_bytes"], r[what]) for _, r in places], _unit_of(what)
    chosen = front(points)

    def dots(look: str, name: str, these: Sequence[int]) -> Series:
        titles = [f"{n}. {r['run']}: {_shown(what, r[what])}, {words.size(r['packed_bytes'])}" for n, r in places]
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
    listed = words.listed([f"{places[i][0]} ({places[i][1]['run']})" for i in chosen])
    said = f"No run is both smaller and better than these, in order of size: {listed}."
    level = _float_level(what, [r for _, r in places])
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


def _ends(what: str, r: dict[str, Any]) -> tuple[float, float]:
    """Ends of the interval, in the unit of charts; the figure itself where there is no interval."""
    low, high = (_unit_of(what)[0] * v for v in r.get(f"{what}_ci") or [r[what], r[what]])
    return low, high


def _float_level(what: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """The float network's figure, where all runs have the same."""
    found = {r.get(f"float_{what}") for r in rows}
    only = found.pop()
    return None if found or only is None else _unit_of(what)[0] * float(only)


def _rows_of_intervals(what: str, rows: list[dict[str, Any]]) -> Section:
    """A chart for runs of one size: the figure of each with its interval, one below the other."""
    factor, unit = _unit_of(what)
    level = _float_level(what, rows)
    drawn = [
        Interval(r["run"], factor * r[what], *_ends(what, r), title=f"{r['run']}: {_shown(what, r[what])}")
        for r in rows
    ]
    said = "; ".join(f"{r['run']} {_shown(what, r[what])}" for r in rows)
    caption = (
        f"All runs have the same size to {100 * (SAME_SIZE - 1):.0f} %, {words.size(rows[0]['packed_bytes'])}. Lines "
        f"are 95 % intervals{', the dashed one is the float network' if level is not None else ''}."
    )
    drawing = intervals(drawn, f"{_named(what)}, {unit}", f"{_named(what)}: {said}.", level)
    return Section("front", "Accuracy at this size", tag("figure", tag("figcaption", caption), drawing))


def _measured(entries: Sequence[Entry], on: str = "evaluation") -> list[str | None]:
    """Digests of the images of each run."""
    return [((e.run.result.get("data") or {}).get(on) or {}).get("sha256") for e in entries if e.run is not None]


def _alike(entries: Sequence[Entry]) -> Section | None:
    """What keeps the figures from being compared with each other."""
    runs = [e.run for e in entries if e.run is not None]
    said = []
    if len({r.result["model"]["name"] for r in runs}) > 1:
        said.append("The runs are of different networks.")
    if len(set(_measured(entries))) > 1:
        said.append("They were not measured on the same images: their figures cannot be compared with each other.")
    if len(set(_measured(entries, "calibration"))) > 1:
        said.append("They were calibrated on different images.")
    if len({r.result.get("seed") for r in runs}) > 1:
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
            found.setdefault(e.run.result.get("command", words.NONE), []).append(e.name)
    pairs = [(words.listed(names), shell(c)) for c, names in found.items()]
    return Section("repeat", "To repeat it", definitions(pairs)) if found else None
