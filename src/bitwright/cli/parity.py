"""`bitwright parity`: does the file of a run compute what was measured, and if not, who errs?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from bitwright import words
from bitwright._version import __version__
from bitwright.cli import tables
from bitwright.cli.bench import counts
from bitwright.cli.calls import ParityCall
from bitwright.cli.export import run_images
from bitwright.cli.options import ImageOptions
from bitwright.cli.sources import float_network
from bitwright.errors import ParityError, UsageError, one_line, quiet_libraries
from bitwright.export.gap import measure_gap, read_onnx
from bitwright.given.images import Images
from bitwright.given.inputs import prepare_teacher
from bitwright.graph.student import Student
from bitwright.measure.metrics import read_fidelity
from bitwright.run import folder as run_folder
from bitwright.run.files import write_json
from bitwright.runtimes import ONNXRUNTIME, absent, chosen
from bitwright.runtimes.openvino import OPENVINO
from bitwright.runtimes.record import Runtime
from bitwright.terminal import Terminal


def parity(call: ParityCall, terminal: Terminal) -> None:
    """Compares, writes ``parity.json``, and fails if the file does not compute what was measured."""
    found = _compared(call.run, call, terminal)
    terminal.result({**found, "warnings": terminal.warnings})
    terminal.show(*views(found))
    _refuse(found)


@run_folder.exclusive
def _compared(run: str, call: ParityCall, terminal: Terminal) -> dict[str, Any]:
    """What ``parity.json`` holds.

    Raises:
        UsageError: the run is unfinished, a file of it is missing or damaged, or a runtime is not installed.
    """
    batches, chosen = counts(call.batch, "--batch") or (), _runtimes(call.runtime)
    folder = Path(run).expanduser()
    folder = folder.parent if folder.is_file() else folder
    terminal.begin("Loading")
    result = run_folder.read_result(folder)
    path = folder / run_folder.ONNX
    run_folder.check_file(folder, run_folder.ONNX, result, f"Write it with: bitwright export {folder}")
    read_onnx(path)
    run_folder.check_file(folder, run_folder.MODEL, result, "Copy the run again, or quantize again.")
    model = run_folder.load(folder)
    found = run_images(model, call.images, call.reading, "IMAGES")
    found = found.sample(min(call.samples, len(found)), seed=0)
    why = _attach_float(model, call.float_model, found, call.reading)
    terminal.finish()
    with quiet_libraries():
        gap = measure_gap(model, path, found, chosen, batches=batches, progress=terminal.progress)
    if gap.rounding is not None:
        warnings.warn(gap.rounding, stacklevel=2)
    data = {
        "bitwright": __version__,
        "run": str(folder),
        "images": {"count": len(found), "sha256": found.sha256},
        "quantization_recorded": None if gap.quantization is not None else result.get("fidelity"),
        "float_network": why or "measured",
        **gap.to_dict(),
        "absent": absent(),
    }
    write_json(folder / run_folder.PARITY, data)
    return data


def _runtimes(names: list[str] | None) -> list[Runtime]:
    found = chosen(names)
    ONNXRUNTIME.require()  # the codes of the layers are read there
    return found


def _attach_float(model: Student, reference: str | None, images: Images, reading: ImageOptions) -> str | None:
    """Gives the run its float network back; why that cannot be, if it cannot."""
    try:
        network = float_network(model, reference, reading)
        model.attach_teacher(
            prepare_teacher(network, images, model.result.get("model", {}).get("output"), result=model.result)
        )
    except UsageError as error:
        if reference is not None:
            raise
        return one_line(str(error))
    return None


def _refuse(data: dict[str, Any]) -> None:
    name = data["first_divergence"]
    if name is None:
        return
    to = " --to openvino" if data["diverging_in"] == OPENVINO.title else ""
    raise ParityError(
        f"The file in {data['run']} does not compute what was measured: {name} is the first to differ. "
        f"{'Write one for it' if to else 'Write it again'} with: bitwright export {data['run']}{to}"
    )


def views(data: dict[str, Any]) -> list[RenderableType]:
    """The two figures, and who errs by how much in which operator."""
    whole = tables.table(
        "", "batch", "output", ">largest", ">mean, of the range", ">cosine", ">same answer",
        title=f"{data['run']} on {data['images']['count']} images",
    )  # fmt: skip
    for row in data["quantization"] or ():
        whole.add_row("loss from quantization: float against simulation", "", *_gap(row))
    for row in data["simulating"]:
        whole.add_row("error of simulating: reference against simulation", "", *_gap(row))
    for each in data["runtimes"]:
        for batch in each["batches"]:
            for key, who in (("outputs", "simulation"), ("from_reference", "reference")):
                title = f"gap of the runtime: {who} against {each['runtime']}"
                for row in batch[key]:
                    whole.add_row(title, str(batch["batch"]), *_gap(row))
    codes = tables.table(
        "operators", "kernel", ">layers", ">codes", ">simulation, reference", ">reference, runtime",
        ">simulation, runtime", title="Codes that differ (by how many steps at most), each layer fed the same codes",
    )  # fmt: skip
    for row in data["operators"]:
        pairs = (_codes(row[k]) for k in ("simulation_reference", "reference_runtime", "simulation_runtime"))
        codes.add_row(row["operator"], row["found"], str(row["layers"]), f"{row['count']:,}", *pairs)
    return [whole, codes, *_lines(data)]


def _kernels(data: dict[str, Any]) -> list[str]:
    """Layers whose kernel leaves the simulation by more than summation explains, and what helps."""
    rows = [x for x in data["layers"] if x["name"] in data["kernels"]]
    lines = [
        f"{x['name']}: ONNX Runtime's kernel ({x['found']}) differs in {x['simulation_runtime']['differing']:,} of "
        f"{x['count']:,} codes, by at most {x['simulation_runtime']['max_steps']}."
        for x in rows
    ]
    if any(x["found"] == "MatMulNBits" for x in rows):
        lines.append(
            "MatMulNBits puts activations on 8 bits by itself; the session option "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them as they are."
        )
    return lines


def _gap(row: dict[str, Any]) -> list[str]:
    mean = 100 * row["mean_abs"] / row["range"] if row["range"] else 0.0
    same = words.percent(row["agreement"])
    return [row["name"], f"{row['max_abs']:.3g}", f"{mean:.3g} %", f"{row['cosine']:.7f}", same]


def _codes(pair: dict[str, int]) -> str:
    return f"{pair['differing']:,} ({pair['max_steps']})" if pair["differing"] else "none"


def _lines(data: dict[str, Any]) -> list[str]:
    lines = []
    if data["quantization"] is None:
        recorded = tables.fidelity_rows(read_fidelity(data["quantization_recorded"]))
        known = "; ".join(f"{what}: {figure}" for what, figure in recorded)
        said = f" Recorded when the run was made: {known}." if known else ""
        lines.append(f"The loss from quantization was not measured: {data['float_network']}{said}")
    first = data["first_difference"]
    lines.append("No code differs." if first is None else f"The first layer with a differing code is {first}.")
    lines += _kernels(data)
    lines += [f"Not installed: {a['runtime']}. Install it with: {a['install']}" for a in data["absent"]]
    verdict = "computes what was measured" if data["first_divergence"] is None else "DIFFERS"
    return [*lines, f"The file {verdict}."]
