"""A run in one sentence, and what the figures can and cannot tell apart."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright import words
from bitwright.measure.metrics import Metrics, OutputFidelity, paired_difference, worst_figures
from bitwright.measure.named import TASK_FIGURES
from bitwright.report.kept import PageFacts
from bitwright.run.result import RunResult

METRICS = {
    k: names[k] for part in (slice(1), slice(1, None)) for names in TASK_FIGURES.values() for k in list(names)[part]
}
"""Metrics of the tasks; the first that a run has is the one it is judged by."""


def figure_of(metrics: Metrics | None, name: str) -> float | None:
    """One of :data:`METRICS`; None where it was not measured."""
    return None if metrics is None else metrics.get(name)


def interval_of(metrics: Metrics | None, name: str) -> list[float] | None:
    """The 95 % interval of a metric, where it has one."""
    ends = None if metrics is None else metrics.intervals.get(name)
    return None if ends is None else list(ends)


def main_metric(result: RunResult) -> str | None:
    """The name of the first metric that both networks have."""
    pair = (result.reference, result.quantized)
    return next((k for k in METRICS if all(figure_of(m, k) is not None for m in pair)), None)


def both_figures(result: RunResult, metric: str) -> tuple[float, float]:
    """A metric that both networks have, of the float and of the quantized one."""
    theirs, ours = figure_of(result.reference, metric), figure_of(result.quantized, metric)
    assert theirs is not None
    assert ours is not None
    return theirs, ours


def run_verdict(result: RunResult, facts: PageFacts | None) -> str:
    """What became of the network, in a sentence or two."""
    said = f"{_smaller(result)}, {_answers(result, facts)}."
    file = _file(result)
    return f"{said} {file}" if file else said


def _smaller(result: RunResult) -> str:
    ratio = result.times_smaller
    if ratio is None:
        return words.bits(result.bits).capitalize()
    return f"{ratio:.1f} times smaller" if ratio >= 1.05 else "Not smaller than float"


def _answers(result: RunResult, facts: PageFacts | None) -> str:
    metric, count = main_metric(result), result.evaluated_on.count
    on = "" if count is None else f" on {words.plural(count, 'image')}"
    if metric is not None:
        theirs, ours = both_figures(result, metric)
        figures = f"{words.percent(ours)} {METRICS[metric]} against {words.percent(theirs)} in float{on}"
        return f"{_judged(result, facts, metric)}: {figures}{_other_outputs(result)}"
    those = " that it was calibrated on" if result.evaluated_on.same_as_calibration else ""
    return _followed(result.evaluation.outputs, facts, count, those)


def _followed(outputs: Mapping[str, OutputFidelity], facts: PageFacts | None, count: int | None, those: str) -> str:
    """How closely the float network is followed, by the worst output."""
    found = worst_figures(outputs)
    if not outputs:
        return "not measured yet"
    if found.exact:
        return "and exactly what the float network computes"
    said = []
    if found.agreement is not None:
        name, output = next((n, o) for n, o in outputs.items() if o.agreement == found.agreement)
        share = f"{words.percent(found.agreement)}{_each(output, count, facts)}{of(count)}{those}"
        said.append(f"with the same answer as the float network for {share}{_in(name, outputs)}")
    values = {n: o for n, o in outputs.items() if o.agreement is None and o.sqnr_db is not None}
    if values:
        name = min(values, key=lambda n: values[n].sqnr_db or 0.0)
        noise = words.decibel(values[name].sqnr_db)
        if said:
            said.append(f"with output {name} {noise} above its error")
        else:
            on = "" if count is None else f" on {words.plural(count, 'image')}"
            said.append(f"with outputs {noise} above the error{on}{those}{_in(name, outputs)}")
    return ", and ".join(said) or "with outputs that have no figure in common with the float network's"


def _each(output: OutputFidelity, count: int | None, facts: PageFacts | None) -> str:
    """What the answers are of, where they are not of images; results of old tell by what their reports show."""
    unanswered = facts is not None and facts.answers is None
    several = output.answers > count if output.answers and count else unanswered
    return " of the answers" if several else ""


def _in(name: str, outputs: Mapping[str, OutputFidelity]) -> str:
    return f" in output {name}, the worst of {len(outputs)}" if len(outputs) > 1 else ""


def _other_outputs(result: RunResult) -> str:
    """What the accuracy of one output does not tell of the others."""
    outputs = result.evaluation.outputs
    return f"; {_followed(outputs, None, None, '')}" if len(outputs) > 1 else ""


def of(count: int | None) -> str:
    """The number of images as the end of a phrase; empty if it is not known."""
    return "" if count is None else f" of {words.plural(count, 'image')}"


def _judged(result: RunResult, facts: PageFacts | None, metric: str) -> str:
    theirs, ours = both_figures(result, metric)
    labelled = None if facts is None or facts.answers is None else facts.answers.labelled
    change = None if result.loss is None else result.loss.difference.get(metric)
    paired = None if change is None else change.interval
    if metric == "top1" and labelled:
        paired = paired_difference(labelled)[1:]
    if paired:
        low, high = paired
        if low <= 0 <= high:
            return "with no measurable difference"
        return f"and {words.points(abs(ours - theirs)).lstrip('+')} {'better' if ours > theirs else 'worse'}"
    a, b = interval_of(result.reference, metric), interval_of(result.quantized, metric)
    if a and b and a[0] <= b[1] and b[0] <= a[1]:
        return "and within each other's 95 % intervals"
    if ours == theirs:
        return "and equally good"
    return f"and {words.points(abs(ours - theirs)).lstrip('+')} {'better' if ours > theirs else 'worse'}"


def _file(result: RunResult) -> str:
    parity = result.parity
    if parity is None:
        return "model.onnx was not written." if "onnx_bytes" in result.size else ""
    if parity.first_divergence is not None:
        return f"model.onnx computes something else, first at {parity.first_divergence}."
    return f"model.onnx was checked in {runtime_name(parity.runtime)}."


def runtime_name(name: str) -> str:
    """A runtime with its version.

    Example:
        >>> runtime_name("onnxruntime 1.31.0")
        'ONNX Runtime 1.31.0'
    """
    return name.replace("onnxruntime", "ONNX Runtime").replace("openvino", "OpenVINO")
