"""What quantization costs and what the runtime adds, as two figures, of a run and the file beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from bitwright._version import __version__
from bitwright.errors import BitwrightError, UsageError
from bitwright.export.arbiter import COMPARED_AT_ONCE, compare_codes
from bitwright.export.deviation import output_parities, tipped
from bitwright.export.frame import body_of
from bitwright.export.layers import activation_quantizers, compare_layers
from bitwright.export.parity import LAYER_IMAGES
from bitwright.export.reference import run_reference
from bitwright.export.verdict import (
    BatchGaps,
    CodeComparison,
    ComparedImages,
    OutputGap,
    ParityRecord,
    RuntimeGaps,
    by_operator,
)
from bitwright.given.images import Images
from bitwright.graph.axes import read_outputs
from bitwright.graph.readings import Reading, by_values
from bitwright.graph.student import Student
from bitwright.measure.evaluation import Network
from bitwright.progress import Progress, silent
from bitwright.runtimes import absent
from bitwright.runtimes.onnxruntime import ONNXRUNTIME, patient_options
from bitwright.runtimes.openvino import EXACT, OPENVINO, compile_model, openvino
from bitwright.runtimes.record import Runtime
from bitwright.words import typed

BATCHES = (1, 8)


def outputs(who: str, network: Network, images: Tensor, batch: int, readings: Sequence[Reading]) -> list[Tensor]:
    """All outputs of a network over the images, ``batch`` at a time, in float64; what no image changes is there once.

    Raises:
        BitwrightError: one of them is not finite; ``who`` gave it.
    """
    with torch.no_grad():
        parts = [[out.double() for out in network(part)] for part in torch.split(images, batch)]
    columns = list(zip(*parts, strict=True))
    found = [c[0] if how.kind == "constant" else torch.cat(c) for c, how in zip(columns, readings, strict=True)]
    if not all(bool(torch.isfinite(x).all()) for x in found):
        raise BitwrightError(f"{who} gives values that are not finite, which cannot be compared. Try other images.")
    return found


def output_gaps(
    names: Sequence[str], ours: Sequence[Tensor], theirs: Sequence[Tensor], readings: Sequence[Reading] = ()
) -> list[OutputGap]:
    """Every output of two networks, each [N, ...] in float64, read as told or as their values say."""
    readings = readings or [by_values(a) for a in ours]
    return [_gap(name, a, b, how) for name, a, b, how in zip(names, ours, theirs, readings, strict=True)]


def _gap(name: str, a: Tensor, b: Tensor, how: Reading) -> OutputGap:
    difference = (a - b).abs()
    rows, theirs = (x.reshape(len(x) if x.dim() else 1, -1) for x in (a, b))
    cosines = torch.cosine_similarity(rows, theirs, eps=1e-30)
    answers = how.same(a, b)
    same = None if answers is None else float(answers.double().mean())
    spread = float(a.max() - a.min())
    return OutputGap(name, float(difference.max()), float(difference.mean()), spread, float(cosines.mean()), same)


@dataclass
class Gap:
    """How far all of them lie from each other.

    Attributes:
        quantization: float network against simulation, by output; None without the float network.
        runtimes: simulation against the file, and ``from_reference`` the reference against it, by runtime and batch
            size.
        simulating: integer reference against simulation, by output.
        layers: the three of them code by code, each layer fed the simulation's codes, in ONNX Runtime.
    """

    quantization: list[OutputGap] | None
    runtimes: list[RuntimeGaps]
    simulating: list[OutputGap]
    layers: list[CodeComparison]
    diverging: str | None = None
    """The first layer in which the file is wrong, whatever the kernel: graph optimisations are off."""
    diverging_output: str | None = None
    """The first output that is further from the simulation's, in some runtime, than it may be."""
    diverging_in: str | None = None
    """The runtime in which it is, if that is not ONNX Runtime."""
    rounding: str | None = None
    """What OpenVINO loses by bfloat16, as a line; None where it loses nothing."""

    def judge(self, output: str | None, runtime: Runtime) -> None:
        """Takes an output that is further away than it may be, if there is one, and the runtime in which it is."""
        self.diverging_output = output
        self.diverging_in = None if output is None or runtime is ONNXRUNTIME else runtime.title

    @property
    def first_divergence(self) -> str | None:
        """The first layer, or ``the output``, in which the file computes something else than what was measured."""
        if self.diverging is not None:
            return self.diverging
        if self.diverging_output is not None and self.diverging_in is not None:
            return f"{self.diverging_output} in {self.diverging_in}"
        return self.diverging_output

    def record(self, run: str, images: Images, recorded: dict[str, Any] | None, float_network: str) -> ParityRecord:
        """What ``parity.json`` holds; for the arguments see there."""
        return ParityRecord(
            bitwright=__version__,
            run=run,
            images=ComparedImages(len(images), images.sha256),
            quantization_recorded=None if self.quantization is not None else recorded,
            float_network=float_network,
            quantization=self.quantization,
            runtimes=self.runtimes,
            simulating=self.simulating,
            operators=by_operator(self.layers),
            layers=self.layers,
            kernels=[x.name for x in self.layers if x.simulation_runtime.beyond(x.count)],
            first_difference=next((x.name for x in self.layers if x.simulation_runtime.differing), None),
            first_divergence=self.first_divergence,
            diverging_in=None if self.diverging is not None else self.diverging_in,
            absent=absent(),
        )


def measure_gap(
    model: Student,
    path: Path,
    images: Images,
    runtimes: Sequence[Runtime],
    *,
    batches: Sequence[int] = BATCHES,
    progress: Progress = silent,
) -> Gap:
    """Float network, simulation, integer reference and the file in its runtimes, on the same images.

    Args:
        model: frozen; with its float network where the loss from quantization is to be measured.
        path: of an ONNX file that bitwright wrote from it.
        images: all of them are used.
        runtimes: in which the file is run.
        batches: sizes of batches, each of which the file is run at.
        progress: told of every part.

    Raises:
        UsageError: the file is damaged or not bitwright's.
        BitwrightError: a runtime does not run it.
    """
    program = read_onnx(path)
    with body_of(path, program, model) as body:
        return _measured(model, program, body, images, runtimes, batches, progress)


@dataclass(frozen=True)
class _Simulation:
    """The outputs that all others are compared with, on the same N images."""

    names: Sequence[str]
    images: Tensor
    readings: Sequence[Reading]
    found: list[Tensor]
    """[N, ...] each, in float64."""
    shaken: list[Tensor]
    """The same where a few codes come out one step off."""

    @classmethod
    def of(cls, model: Student, images: Tensor) -> _Simulation:
        readings = read_outputs(model.graph, images, model.outputs)
        found = outputs("The simulation", model.flat, images, COMPARED_AT_ONCE, readings)
        with tipped(activation_quantizers(model)):
            shaken = outputs("The simulation", model.flat, images, COMPARED_AT_ONCE, readings)
        return cls(model.outputs, images, readings, found, shaken)

    def outputs(self, who: str, network: Network, batch: int = COMPARED_AT_ONCE) -> list[Tensor]:
        """Of another network on these images."""
        return outputs(who, network, self.images, batch, self.readings)

    def gaps(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[OutputGap]:
        """Between the outputs of two networks on these images."""
        return output_gaps(self.names, ours, theirs, self.readings)

    def diverging(self, found: list[Tensor]) -> str | None:
        """The first of a file's outputs that lies further away than it may."""
        return _diverging(self.names, self.found, self.shaken, found)


def _measured(
    model: Student,
    program: ir.Model,
    path: Path,
    images: Images,
    runtimes: Sequence[Runtime],
    batches: Sequence[int],
    progress: Progress,
) -> Gap:
    whole = images.batch(range(len(images)))
    total = 2 + len(runtimes) * len(batches)
    progress("Comparing", 0, total, "integer reference")
    simulation = _Simulation.of(model, whole)
    rules, teacher = model.scheme.runtime, model.teacher
    reference = simulation.outputs("The reference", lambda x: run_reference(model, x, rules, keep=False).outputs)
    quantization = None
    if teacher is not None:
        quantization = simulation.gaps(simulation.outputs("The float network", teacher.flat), simulation.found)
    gap = Gap(quantization, [], simulation.gaps(reference, simulation.found), [])
    for runtime in runtimes:
        done = 1 + len(gap.runtimes) * len(batches)
        told = partial(_tell, progress, runtime, done, total)
        gap.runtimes.append(_in_runtime(runtime, path, simulation, reference, batches, gap, told))
    progress("Comparing", total - 1, total, "layer by layer")
    gap.layers = compare_codes(model, program, whole, "onnxruntime")
    plain = compare_layers(model, program, whole[:LAYER_IMAGES])
    gap.diverging = next((x.name for x in plain if x.diverges), None)
    progress("Comparing", total, total)
    return gap


def _tell(progress: Progress, runtime: Runtime, before: int, total: int, done: int, batch: int) -> None:
    progress("Comparing", before + done, total, f"{runtime.title}, batch {batch}")


def _in_runtime(
    runtime: Runtime,
    path: Path,
    simulation: _Simulation,
    reference: list[Tensor],
    batches: Sequence[int],
    gap: Gap,
    told: Callable[[int, int], None],
) -> RuntimeGaps:
    """The file in one runtime at every batch size; what diverges in it is noted in ``gap``."""
    network = open_file(runtime, path)
    rows: list[BatchGaps] = []
    for done, batch in enumerate(batches):
        told(done, batch)
        found = simulation.outputs(runtime.title, network, batch)
        if gap.diverging_output is None:
            gap.judge(simulation.diverging(found), runtime)
        rows.append(BatchGaps(batch, simulation.gaps(simulation.found, found), simulation.gaps(reference, found)))
    if runtime is OPENVINO and gap.diverging_in is None:
        gap.rounding = _rounding(path, simulation)
    return RuntimeGaps(f"{runtime.name} {runtime.version}", rows)


def _rounding(path: Path, simulation: _Simulation) -> str | None:
    """What OpenVINO loses where the processor has bfloat16, which it takes unless it is told otherwise."""
    kind = openvino().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    if kind == "f32":
        return None
    found = simulation.outputs("OpenVINO", _calls(compile_model(path)))
    where = simulation.diverging(found)
    if where is None:
        return None
    share = max(g.max_abs / max(g.range, 1e-30) for g in output_gaps(simulation.names, simulation.found, found))
    return (
        f"OpenVINO rounds what is not integer to {kind} on this processor unless it is told otherwise: {where} then "
        f"leaves what was measured, by {100 * share:.1f} % of an output's range at most. Compile the model with "
        '{"INFERENCE_PRECISION_HINT": "f32"}, as it was done for this comparison.'
    )


def _diverging(names: Sequence[str], ours: list[Tensor], shaken: list[Tensor], theirs: list[Tensor]) -> str | None:
    """The first output that lies further away than the simulation from itself."""
    runs = {"file": lambda _: theirs}
    readings = [by_values(x) for x in ours]
    judged = output_parities(names, readings, iter([torch.empty(0)]), lambda _: ours, lambda _: shaken, runs)["file"]
    return next(("the output" if len(names) == 1 else f"the output {o.name}" for o in judged if o.diverges), None)


def read_onnx(path: Path) -> ir.Model:
    """An ONNX file that bitwright wrote.

    Raises:
        UsageError: it is damaged, or another tool wrote it, so that its tensors cannot be told apart.
    """
    advice = f"Export it again: {typed('bitwright', 'export', path.parent)}"
    try:
        program = ir.load(path)
        for value in program.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(f"{path} is damaged ({reason}). {advice}") from error
    if "bitwright" not in program.metadata_props:
        by = program.producer_name or "another tool"
        raise UsageError(
            f"Expected {path} to be written by bitwright, found a file by {by} without its notes. {advice}"
        )
    return program


def open_file(runtime: Runtime, path: Path) -> Network:
    """The file in a runtime, as a function of images [B, C, H, W] that gives its outputs.

    Raises:
        BitwrightError: the runtime does not run it.
    """
    opened = {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime.name]
    try:
        return opened(path)
    except Exception as error:
        raise runtime.refusal(path, error) from error


def _onnxruntime(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    opened = onnxruntime.InferenceSession(str(path), patient_options(), providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in opened.run(None, {name: x.numpy()})]


def _openvino(path: Path) -> Callable[[Tensor], list[Tensor]]:
    return _calls(compile_model(path, EXACT))


def _calls(compiled: Any) -> Callable[[Tensor], list[Tensor]]:
    return lambda x: [torch.from_numpy(out.copy()) for out in compiled([x.numpy()]).values()]
