"""Results as tables that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from bitwright import words
from bitwright.export.verdict import Parity
from bitwright.graph.layer import Unfolded, Unquantized
from bitwright.measure.metrics import Evaluation, OutputFidelity
from bitwright.measure.shown import metric_rows
from bitwright.run.result import LayerRow, RunResult, SearchOutcome, Tuning


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns that start with ``>`` hold numbers."""
    made = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_header=any(c.lstrip(">") for c in columns),
    )
    for column in columns:
        numbers = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
    return made


def scoring_notes(found: Evaluation) -> list[str]:
    """Which task was measured, and what people should know of its figures."""
    if found.loss is None or found.loss.task in {None, "classification"}:
        return list(found.loss.notes) if found.loss else []
    return [f"Task: {found.loss.task}, by the labels.", *found.loss.notes]


def fidelity_notes(outputs: Mapping[str, OutputFidelity]) -> list[str]:
    """Why figures of outputs are missing, a line for each output.

    Example:
        >>> fidelity_notes({"box": OutputFidelity(sqnr_db=12.0, note="It is empty.")})
        ['No answers are compared in box. It is empty. (bitwright evaluate --classes box=AXIS says otherwise)']
    """
    return [_note(name, found) for name, found in outputs.items() if found.note]


def _note(name: str, found: OutputFidelity) -> str:
    if found.agreement is not None:
        return f"{name}: {found.note}"
    option = words.typed("--classes", f"{name}=AXIS")
    return f"No answers are compared in {name}. {found.note} (bitwright evaluate {option} says otherwise)"


def outcome(result: RunResult) -> Table:
    """Float against quantized: accuracy, fidelity, size, and what ONNX Runtime makes of the file."""
    size, bits = result.size, result.bits or {}
    title = f"{result.model.name}, {result.recipe.name}"
    made = table("", ">float", f">{words.notation(bits.get('weights'), bits.get('activations'))}", title=title)
    for row in metric_rows(result.evaluation):
        made.add_row(*row)
    for name, texts in (
        ("optimisation", [tuning_text(t) for t in result.tunings]),
        ("evolution", [evolution_text(s) for s in result.searches]),
    ):
        for i, text in enumerate(texts, 1):
            made.add_row(name if len(texts) == 1 else f"{name} {i}", "", text)
    packed = f"{words.size(size.get('packed_bytes'))} ({words.smaller(result.times_smaller)})"
    made.add_row("size", words.size(size.get("float_bytes")), packed)
    made.add_row("size of model.onnx", "", words.size(size.get("onnx_bytes")))
    made.add_row("model.onnx in ONNX Runtime", "", parity_text(result.parity))
    made.add_row("time", "", words.duration((result.seconds or {}).get("total")))
    if phases := phases_text(result.seconds or {}):
        made.add_row("", "", phases)
    return made


def phases_text(seconds: Mapping[str, float | None]) -> str:
    """What took the time, the longest first; what took less than one part in fifty is left out.

    Example:
        >>> phases_text({"capture": 2.0, "calibrate": 15.25, "advice": 0.01, "total": 17.26})
        'calibrate 15.2 s, capture 2.0 s'
        >>> phases_text({"a": 4.0, "b": 3.0, "c": 2.0}).splitlines()
        ['a 4.0 s, b 3.0 s,', 'c 2.0 s']
    """
    total = seconds.get("total") or 0.0
    parts = sorted(((v, k) for k, v in seconds.items() if k != "total" and v and v > 0.02 * total), reverse=True)
    said = [f"{name} {words.duration(value)}" for value, name in parts]
    return ",\n".join(", ".join(said[k : k + 2]) for k in range(0, len(said), 2))  # no wider than the other rows


def evolution_text(found: SearchOutcome) -> str:
    """Children, the fitness before and after, and the float network's own.

    Example:
        >>> from bitwright.run.result import SearchFitness
        >>> evolution_text(SearchOutcome(120, 35, SearchFitness("infonce", 24.5, 24.25, 24.0)))
        '120 children, 35 of them better; infonce 24.5 to 24.25 (float 24)'
    """
    fitness = found.fitness
    assert fitness is not None
    before, after, best = (f"{value:.5g}" for value in (fitness.before, fitness.after, fitness.teacher))
    return (
        f"{found.steps} children, {found.better} of them better; {fitness.measure} {before} to {after} (float {best})"
    )


def tuning_text(tuned: Tuning) -> str:
    """Steps, the loss before and after, and how many roundings differ from rounding to nearest.

    Example:
        >>> from bitwright.run.result import TuningLoss
        >>> tuning_text(Tuning(steps=100, before=4.0, loss=TuningLoss(2.0), left_nearest=0.21))
        '100 steps, loss 4 to 2, 21 % of weights not at their nearest'
    """
    if tuned.loss is None:
        return "none"
    before = "" if tuned.before is None else f"{tuned.before:.3g} to "
    moved = f"{words.percent(tuned.left_nearest, 0)} of weights not at their nearest"
    return f"{tuned.steps} steps, loss {before}{tuned.loss.hard:.3g}, {moved}"


def parity_text(parity: Parity | None) -> str:
    """What the parity check found, in a few words."""
    if parity is None:
        return "not written"
    if not parity.passed:
        return f"DIFFERS, first at {parity.first_divergence}"
    agreement = (parity.optimized and parity.optimized.agreement) or parity.agreement
    if agreement is None:
        return f"agrees on {parity.images} images"
    return f"same answer on {words.percent(agreement)} of {parity.images} images"


@dataclass(frozen=True)
class NetworkShape:
    """A network layer by layer, as ``inspect`` shows it.

    Attributes:
        name: of the network or its run.
        parameters: of the float network.
        macs: multiply-accumulates for one image.
        bits: of weights and activations, None for float.
        size: bytes by what has them: those of a run's files, or those that are expected.
        layers: one row per quantized tensor.
        unquantized: tensors that stay float.
        unfolded: batch norms that remain.
    """

    name: str
    parameters: int
    macs: int
    bits: Mapping[str, int | str | None]
    size: Mapping[str, int | None]
    layers: Sequence[LayerRow]
    unquantized: Sequence[Unquantized]
    unfolded: Sequence[Unfolded]


def structure(found: NetworkShape) -> list[Table]:
    """Every tensor that is quantized, and every one that is not, with the reason."""
    with_noise = any(r.sqnr_db is not None for r in found.layers)
    columns = ["layer", "operator", ">weights", ">activations", "scale per", ">parameters", ">MACs"]
    layers = table(*columns, *([">SQNR"] if with_noise else []), title="Quantized")
    for row in found.layers:
        cells = [
            row.name,
            row.op,
            _bits(row.weight_bits),
            _bits(row.activation_bits),
            row.granularity if row.weight_bits else "",
            words.scaled(row.parameters) if row.parameters else "",
            words.scaled(row.macs) if row.macs else "",
        ]
        noise_text = "" if row.sqnr_db is None else words.decibel(row.sqnr_db)
        layers.add_row(*cells, *([noise_text] if with_noise else []))
    floats = table("tensor", "operator", "why it is not quantized", title="Left in float")
    inside = table("value", "operator", "which one", title="Inside fused layers, whose last value alone is rounded")
    for item in found.unquantized:
        (inside if item.inside else floats).add_row(item.name, item.op, item.reason)
    return [layers, *(made for made in (floats, inside) if made.row_count)]


def _bits(bits: int | None) -> str:
    return "" if bits is None else f"{bits} bits"


WRITTEN = {
    "ideal_bytes": "bits, scales and biases alone",
    "packed_bytes": "size of model.safetensors: with a compressed description",
    "onnx_bytes": "size of model.onnx: codes in 4 or 8 bits, names, the graph",
    "openvino_bytes": "size of model.xml and model.bin: codes in 4 or 8 bits, the graph as text",
    "pt2_bytes": "size of model.pt2: codes in 2, 4 or 8 bits, the program",
}
"""Sizes in a result, and what each holds besides the one before."""


def summary(found: NetworkShape) -> Table:
    """Parameters, MACs and sizes of a network."""
    made = table("", ">", title=found.name)
    made.add_row("parameters", words.scaled(found.parameters))
    made.add_row("multiply-accumulates for one image", words.scaled(found.macs))
    made.add_row("size in float", words.size(4 * found.parameters))
    if "packed_bytes" in found.size:
        for key, what in WRITTEN.items():
            if key in found.size:
                made.add_row(what, words.size(found.size[key]))
    else:
        expected = found.size.get("expected_bytes")
        made.add_row(f"size at {words.notation(**found.bits)}, without names", words.size(expected))
    made.add_row("quantized tensors", str(len(found.layers)))
    inside = sum(item.inside for item in found.unquantized)
    made.add_row("left in float", str(len(found.unquantized) - inside))
    made.add_row("inside fused layers", str(inside))
    return made
