"""Does a quantized network still answer? Looked at on calibration images, whatever recipe made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bitwright.errors import BitwrightError
from bitwright.given.images import Images
from bitwright.graph.student import Student
from bitwright.graph.walk import images_in_pass
from bitwright.graph.watch import Callback, watch
from bitwright.graph.work import how_many, said
from bitwright.measure.evaluation import AT_ONCE
from bitwright.measure.metrics import Fidelity, OutputFidelity
from bitwright.measure.task import over_batches
from bitwright.quant.quantizer import Quantizer
from bitwright.run.record import CheckedAnswers
from bitwright.stages.base import Run

IMAGES, LEAST = 32, 8
"""Images that are looked at, and of how many at least where the network is large."""
SAYS = 40.0
"""Decibels between the energy of a float output and that of its change from image to image, from which on the output
says next to nothing about the image in float either."""
CONSTANT_BELOW = 1e-6
"""An output whose values differ by less, relative to their size, from image to image is taken for constant."""


def check_answers(student: Student, images: Images, run: Run) -> list[str]:
    """Compares the outputs with the float network's on a few calibration images.

    Returns:
        A line for every output that no longer depends on the image, or that has more noise than signal.

    Raises:
        BitwrightError: an output is not finite where the float network's is; names the layer where it begins.
    """
    teacher = student.teacher
    assert teacher is not None
    wanted = min(IMAGES, len(images))
    some = images.sample(how_many(student, wanted, LEAST), seed=run.seed)
    fidelity = Fidelity(student.outputs)
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    at_once = images_in_pass(student.graph.graph, run.device, AT_ONCE)
    for batch in run.batches(some, said("Checking the answers", len(some), wanted), at_once):
        with torch.no_grad():
            expected, found = teacher.flat(batch), student.flat(batch)
        _check_finite(student, batch, expected, found)
        fidelity.update(expected, found)
        theirs.append(expected)
        ours.append(found)
    run.checked = CheckedAnswers(len(some), fidelity.outputs)
    lines = []
    for position, (name, measured) in enumerate(fidelity.outputs.items()):
        moving = [_moves(over_batches([x[position] for x in side])) for side in (theirs, ours)]
        line = _line(name, measured, moving[0], moving[1], len(some))
        lines += [line] if line else []
    return lines


def _line(name: str, found: OutputFidelity, theirs_moves: bool, ours_moves: bool, count: int) -> str | None:
    where = f"on {count} calibration images"
    remedy = "Give the layers with wide ranges more bits (bitwright inspect shows them), or take another recipe=."
    if theirs_moves and not ours_moves:
        return f"Output '{name}' of the quantized network no longer depends on the image ({where}). {remedy}"
    says = found.spread_db is not None and (found.sqnr_db is None or found.sqnr_db - found.spread_db < SAYS)
    if says and found.spread_db is not None and found.spread_db < 0:
        whole = "" if found.sqnr_db is None else f", {found.sqnr_db:.1f} dB of its whole energy"
        return (
            f"Output '{name}' of the quantized network differs more from the float one than from image to image "
            f"({found.spread_db:.1f} dB {where}{whole}). {remedy}"
        )
    return None


def _moves(output: Tensor) -> bool:
    """Whether it differs from image to image, [N, ...]."""
    if output.dim() == 0 or len(output) < 2 or not output.numel():
        return False
    if not output.is_floating_point():
        return bool((output != output[:1]).any())
    return float((output - output[:1]).abs().max()) > CONSTANT_BELOW * float(output.abs().max())


def _check_finite(student: Student, batch: Tensor, expected: list[Tensor], found: list[Tensor]) -> None:
    broken = [name for name, a, b in zip(student.outputs, expected, found, strict=True) if _breaks(a, b)]
    if not broken:
        return
    layer, rule = _first_broken(student, batch)
    raise BitwrightError(
        f"The quantized network gives values that are not finite in '{broken[0]}' where the float one does not; "
        f"'{layer}' is the first. Leave what it reads in float: rules=['{rule}=afloat']"
    )


def _breaks(expected: Any, found: Any) -> bool:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return False
    return bool((torch.isfinite(expected) & ~torch.isfinite(found)).any())


def _first_broken(student: Student, batch: Tensor) -> tuple[str, str]:
    """The first layer whose values are not finite where the float network's are, and what quantizes its input."""
    assert student.teacher is not None
    finite: dict[str, bool] = {}
    broken: list[fx.Node] = []

    def remember(node: fx.Node, value: Any) -> None:
        finite[node.name] = not isinstance(value, Tensor) or bool(torch.isfinite(value).all())

    def compare(node: fx.Node, value: Any) -> None:
        if finite.get(node.name, False) and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            broken.append(node)

    for graph, look in ((student.teacher.graph, remember), (student.graph, compare)):
        callbacks: dict[str, Callback] = {n.name: look for n in graph.graph.nodes if n.op == "call_function"}
        watch(graph, batch, callbacks)
    if not broken:
        return "the output", "*"
    return str(broken[0].meta.get("layer", broken[0].name)), _quantizer_before(student, broken[0])


def _quantizer_before(student: Student, node: fx.Node) -> str:
    """The name by which a rule reaches the nearest quantized tensor that the node depends on."""
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        at = waiting.pop(0)
        module = student.graph.get_submodule(str(at.target)) if at.op == "call_module" else None
        if isinstance(module, Quantizer) and module.role == "activation":
            return module.name
        waiting += [n for n in at.all_input_nodes if n not in seen]
        seen |= set(at.all_input_nodes)
    return "*"
