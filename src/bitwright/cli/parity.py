"""`bitwright parity`: does the file of a run compute what was measured, and if not, who errs?"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

from rich.console import RenderableType

from bitwright import words
from bitwright.cli import tables
from bitwright.cli.bench import counts
from bitwright.cli.calls import ParityCall
from bitwright.cli.export import run_images
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import float_network
from bitwright.errors import ParityError, UsageError, one_line, quiet_libraries
from bitwright.export.gap import measure_gap, read_onnx
from bitwright.export.verdict import Difference, OutputGap, ParityRecord
from bitwright.given.images import Images
from bitwright.given.inputs import prepare_teacher
from bitwright.graph.student import Student
from bitwright.measure.shown import fidelity_rows
from bitwright.run import folder as run_folder
from bitwright.run.files import write_json
from bitwright.run.result import RunResult
from bitwright.runtimes import ONNXRUNTIME, chosen
from bitwright.runtimes.openvino import OPENVINO
from bitwright.runtimes.record import Runtime
from bitwright.terminal import Terminal


def parity(call: ParityCall, terminal: Terminal) -> None:
    """Compares, writes ``parity.json``, and fails if the file does not compute what was measured."""
    found = _compared(call.run, call, terminal)
    terminal.result({**asdict(found), "warnings": terminal.warnings})
    terminal.show(*views(found))
    _refuse(found)


@run_folder.exclusive
def _compared(run: str, call: ParityCall, terminal: Terminal) -> ParityRecord:
    """What ``parity.json`` holds.

    Raises:
        UsageError: the run is unfinished, a file of it is missing or damaged, or a runtime is not installed.
    """
    batches, folder = counts(call.batch, "--batch") or (), Path(run).expanduser()
    folder = folder.parent if folder.is_file() else folder
    places = _runtimes(call.runtime, folder / run_folder.ONNX)
    terminal.begin("Loading")
    files, path = run_folder.read_result(folder).files, folder / run_folder.ONNX
    run_folder.check_file(
        folder, run_folder.ONNX, files, f"Write it with: {words.typed('bitwright', 'export', folder)}"
    )
    read_onnx(path)
    run_folder.check_takes_files(folder)
    run_folder.check_file(folder, run_folder.MODEL, files, "Copy the run again, or quantize again.")
    model = run_folder.load(folder)
    recorded = model.result.get("fidelity")
    found = run_images(model, call.images, call.reading, "IMAGES")
    found = found.sample(min(call.samples, len(found)), seed=0)
    why = _attach_float(model, call.float_model, found, call.reading)
    terminal.finish()
    with quiet_libraries():
        gap = measure_gap(model, path, found, places, batches=batches, progress=terminal.progress)
    if gap.rounding is not None:
        warnings.warn(gap.rounding, stacklevel=2)
    record = gap.record(str(folder), found, recorded, why or "measured")
    write_json(folder / run_folder.PARITY, asdict(record))
    return record


def _runtimes(names: list[str] | None, path: Path) -> list[Runtime]:
    found = chosen(names, path)
    ONNXRUNTIME.require()  # the codes of the layers are read there
    return found


def _attach_float(model: Student, reference: str | None, images: Images, reading: ImageOptions) -> str | None:
    """Gives the run its float network back; why that cannot be, if it cannot."""
    try:
        network = float_network(model, reference, reading)
        output = RunResult.read(model.result).model.output
        model.attach_teacher(prepare_teacher(network, images, output, result=model.result))
    except UsageError as error:
        if reference is not None:
            raise
        return one_line(str(error))
    return None


def _refuse(found: ParityRecord) -> None:
    name = found.first_divergence
    if name is None:
        return
    to = ["--to", "openvino"] if found.diverging_in == OPENVINO.title else []
    raise ParityError(
        f"The file in {found.run} does not compute what was measured: {name} is the first to differ. "
        f"{'Write one for it' if to else 'Write it again'} with: {words.typed('bitwright', 'export', found.run, *to)}"
    )


def views(found: ParityRecord) -> list[RenderableType]:
    """The two figures, and who errs by how much in which operator."""
    whole = tables.table(
        "", "batch", "output", ">largest", ">mean, of the range", ">cosine", ">same answer",
        title=f"{found.run} on {found.images.count} images",
    )  # fmt: skip
    for row in found.quantization or ():
        whole.add_row("loss from quantization: float against simulation", "", *_gap(row))
    for row in found.simulating:
        whole.add_row("error of simulating: reference against simulation", "", *_gap(row))
    for each in found.runtimes:
        for batch in each.batches:
            for rows, who in ((batch.outputs, "simulation"), (batch.from_reference, "reference")):
                for row in rows:
                    whole.add_row(f"gap of the runtime: {who} against {each.runtime}", str(batch.batch), *_gap(row))
    codes = tables.table(
        "operators", "kernel", ">layers", ">codes", ">simulation, reference", ">reference, runtime",
        ">simulation, runtime", title="Codes that differ (by how many steps at most), each layer fed the same codes",
    )  # fmt: skip
    for x in found.operators:
        pairs = map(_codes, (x.simulation_reference, x.reference_runtime, x.simulation_runtime))
        codes.add_row(x.operator, x.found, str(x.layers), f"{x.count:,}", *pairs)
    return [whole, codes, *_lines(found)]


def _kernels(found: ParityRecord) -> list[str]:
    """Layers whose kernel leaves the simulation by more than summation explains, and what helps."""
    rows = [x for x in found.layers if x.name in found.kernels]
    lines = [
        f"{x.name}: ONNX Runtime's kernel ({x.found}) differs in {x.simulation_runtime.differing:,} of {x.count:,} "
        f"codes, by at most {x.simulation_runtime.max_steps}."
        for x in rows
    ]
    if any(x.found == "MatMulNBits" for x in rows):
        lines.append(
            "MatMulNBits puts activations on 8 bits by itself; the session option "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them as they are."
        )
    return lines


def _gap(row: OutputGap) -> list[str]:
    figures = f"{row.max_abs:.3g}", f"{100 * row.share:.3g} %", f"{row.cosine:.7f}"
    return [row.name, *figures, words.percent(row.agreement)]


def _codes(pair: Difference) -> str:
    return f"{pair.differing:,} ({pair.max_steps})" if pair.differing else "none"


def _lines(found: ParityRecord) -> list[str]:
    lines = []
    if found.quantization is None:
        recorded = RunResult.read({"fidelity": found.quantization_recorded}).evaluation.outputs
        known = "; ".join(f"{what}: {figure}" for what, figure in fidelity_rows(recorded))
        said = f" Recorded when the run was made: {known}." if known else ""
        lines.append(f"The loss from quantization was not measured: {found.float_network}{said}")
    first = found.first_difference
    lines.append("No code differs." if first is None else f"The first layer with a differing code is {first}.")
    lines += _kernels(found)
    lines += [f"Not installed: {a['runtime']}. Install it with: {a['install']}" for a in found.absent]
    verdict = "computes what was measured" if found.first_divergence is None else "DIFFERS"
    return [*lines, f"The file {verdict}."]
