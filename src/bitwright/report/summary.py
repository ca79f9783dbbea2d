"""Float against quantized: accuracy and size."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright import words
from bitwright.measure.metrics import OutputFidelity, paired_difference, worst_figures
from bitwright.report.charts import Interval, intervals, lengths
from bitwright.report.frame import Section, bullets, paragraph
from bitwright.report.kept import FileParts
from bitwright.report.markup import Child, Markup, tag
from bitwright.report.shown import Shown
from bitwright.report.tables import page_table
from bitwright.report.verdict import METRICS, figure_of, interval_of, main_metric
from bitwright.run.result import RunResult

# ---------------------------------------------------------------------------------------------------- accuracy


def float_against_quantized(run: Shown) -> Section:
    """Metrics of both networks with their intervals, and how alike their answers are."""
    result = run.result
    rows = _metric_rows(result) + _fidelity_rows(result)
    metric = main_metric(result)
    body = [
        _intervals(result, metric) if metric else None,
        page_table(_on(result), ["", ">float", ">quantized", ">difference"], rows) if rows else None,
        _paired(run),
        _by_output(result.evaluation.outputs),
        paragraph(_measured_on(result), quiet=True),
    ]
    return Section("accuracy", "Float against quantized", body)


def _on(result: RunResult) -> str:
    count = result.evaluated_on.count
    return "As measured" if count is None else f"On {words.plural(count, 'image')}"


def _metric_rows(result: RunResult) -> list[list[str]]:
    rows = []
    for name, said in METRICS.items():
        a, b = figure_of(result.reference, name), figure_of(result.quantized, name)
        if a is None or b is None:
            continue
        rows.append([said, words.percent(a), words.percent(b), words.points(b - a)])
        ends = [interval_of(m, name) for m in (result.reference, result.quantized)]
        if all(ends):
            rows.append(["its 95 % interval", *map(words.interval, ends), ""])
    return rows


def _fidelity_rows(result: RunResult) -> list[list[str]]:
    outputs = result.evaluation.outputs
    found, of = worst_figures(outputs), ", worst output" if len(outputs) > 1 else ""
    rows = []
    if found.agreement is not None:
        rows.append([f"same answer as float{of}", "", words.percent(found.agreement), ""])
    if found.kl is not None:
        rows.append([f"KL divergence from float{of}", "", f"{words.number(found.kl)} nats", ""])
    if outputs and (found.exact or found.sqnr_db is not None):
        rows.append([f"outputs: signal to error{of}", "", words.signal_to_error(found.sqnr_db, exact=found.exact), ""])
    return rows


def _by_output(outputs: Mapping[str, OutputFidelity]) -> Child:
    """How closely each of several outputs is followed, and why figures are missing."""
    notes = bullets([f"{name}: {found.note}" for name, found in outputs.items() if found.note])
    body = [notes if any(o.note for o in outputs.values()) else None]
    if len(outputs) > 1:
        rows = [
            [
                name,
                words.percent(o.agreement),
                words.number(o.kl),
                words.signal_to_error(o.sqnr_db, exact=o.exact),
                words.decibel(o.spread_db),
            ]
            for name, o in outputs.items()
        ]
        heads = ["output", ">same answer", ">KL, nats", ">signal to error", ">change between images to error"]
        body.insert(0, page_table("Output by output, against float", heads, rows))
    return body


def _intervals(result: RunResult, metric: str) -> Markup | None:
    """Both networks with their intervals, one below the other."""
    rows, said = [], []
    for name, metrics in (("float", result.reference), ("quantized", result.quantized)):
        ends, value = interval_of(metrics, metric), figure_of(metrics, metric)
        if not ends or value is None:
            return None
        said.append(f"{name}: {words.percent(value)}, 95 % interval {words.interval(ends)}")
        rows.append(Interval(name, 100 * value, 100 * ends[0], 100 * ends[1], name, said[-1]))
    return tag("figure", intervals(rows, f"{METRICS[metric]}, %", f"{METRICS[metric]}. {'; '.join(said)}."))


def _paired(run: Shown) -> Markup | None:
    """What the same images say of both networks, which two separate intervals cannot."""
    counts = None if run.facts is None or run.facts.answers is None else run.facts.answers.labelled
    if not counts:
        return None
    difference, low, high = paired_difference(counts)
    judged = (
        "zero is inside, so that no difference is measurable on this many images"
        if low <= 0 <= high
        else "zero is outside, so that the difference is measurable"
    )
    return paragraph(
        f"Image by image, {counts['both']:,} are right in both networks, {counts['only_float']:,} only in float, "
        f"{counts['only_quantized']:,} only when quantized, {counts['neither']:,} in neither. The difference is "
        f"{words.points(difference)}, with a 95 % interval of {words.points(low)} to {words.points(high)}: {judged}."
    )


def _measured_on(result: RunResult) -> str:
    seen, used = result.evaluated_on, result.calibrated_on
    said = f"Measured on {words.plural(seen.count, 'image')}" if seen.count else "Measured on nothing yet"
    said += f" from {seen.source}" if seen.source else ""
    if seen.same_as_calibration:
        said += ", the ones it was calibrated on; other images would be a fairer test (--evaluate)"
    elif used.count:
        said += f"; calibrated on {used.count:,} others, without labels"
    return f"{said}."


# -------------------------------------------------------------------------------------------------------- size

FILES = {
    "float_bytes": ("float", "every number takes 4 bytes", "float"),
    "ideal_bytes": ("ideal", "the bits asked for, scales and biases, and nothing else", "quiet"),
    "packed_bytes": ("model.safetensors", "integers at their true width, end to end", "quantized"),
    "onnx_bytes": ("model.onnx", "for runtimes, whose smallest integers have 4 or 8 bits", "quantized"),
}


def sizes_of_files(run: Shown) -> Section:
    """Bytes in every form, and why the files are larger than the ideal."""
    known = [(size, *about) for k, about in FILES.items() if (size := run.result.size.get(k))]
    whole = run.result.size.get("float_bytes")
    bars = [(name, size, words.size(size), look) for size, name, _, look in known]
    rows = [
        [name, words.size(size), f"{whole / size:.2f} ×" if whole else words.NONE, meaning]
        for size, name, meaning, _ in known
    ]
    summary = "Sizes: " + ", ".join(f"{name} {said}" for name, _, said, _ in bars) + "."
    reasons = _reasons(run)
    body = [
        tag("figure", lengths(bars, summary)),
        page_table("Size in each form", ["", ">size", ">smaller", "what it is"], rows),
        bullets(reasons) if reasons else None,
    ]
    return Section("size", "Size", body)


def _reasons(run: Shown) -> list[str]:
    """Why each file is larger than the ideal."""
    files, sizes = FileParts() if run.facts is None else run.facts.files or FileParts(), run.result.size
    ideal, packed, onnx = (sizes.get(k) for k in ("ideal_bytes", "packed_bytes", "onnx_bytes"))
    found = []
    if ideal and packed and (parts := files.packed):
        described = words.size(parts.get("structure"))
        found.append(
            f"model.safetensors takes {words.size(packed - ideal)} more than the ideal: the description of the graph, "
            f"compressed, has {described}."
        )
    if ideal and onnx and (parts := files.onnx):
        graph, numbers = parts.get("graph", 0), sum(v for k, v in parts.items() if k != "graph")
        more = f", and its numbers {words.size(numbers - ideal)} more: {_wider(run)}" if numbers > ideal else ""
        found.append(
            f"model.onnx takes {words.size(onnx - ideal)} more than the ideal: its operators, names and shapes, not "
            f"compressed, have {words.size(graph)}{more}."
        )
    if onnx is None and "onnx_bytes" in sizes:
        found.append("model.onnx was not written; the warnings say why.")
    return found


def _wider(run: Shown) -> str:
    """What ONNX stores beyond the ideal."""
    bits = sorted({r.weight_bits for r in run.layers if r.weight_bits} - {4, 8, 16})
    narrow = [str(b) for b in bits if b < 4]
    wide = [str(b) for b in bits if b > 4]
    said = [f"weights of {words.listed(narrow)} bits are integers of 4"] if narrow else []
    said += [f"weights of {words.listed(wide)} bits are integers of 8"] if wide else []
    return words.listed([*said, "every scale of weights has a zero point, though it is zero"])
