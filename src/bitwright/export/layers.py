"""Every layer of a file in its runtime, fed the simulation's own input: how many codes differ."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from bitwright.export.verdict import MOST_DIFFERING, MOST_STEPS, LayerParity
from bitwright.graph.student import Student
from bitwright.graph.walk import image_bytes
from bitwright.graph.watch import values_of, watch
from bitwright.memory import PASS_BYTES
from bitwright.quant.quantizer import Quantizer
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.session import Array, Opener, Session

BOUNDARY = 16 * float(np.finfo(np.float32).eps)
"""Relative distance of a value from half a step, within which float summation decides how it is rounded. Pooling of
codes on one scale meets such values often: the mean of four integers lies there for one value in four."""


def activation_quantizers(model: Student) -> dict[str, Quantizer]:
    """Quantizers of activations by node name, in program order."""
    found = {}
    for node in model.graph.graph.nodes:
        if node.op == "call_module" and node.args:
            module = model.graph.get_submodule(str(node.target))
            if isinstance(module, Quantizer):
                found[node.name] = module
    return found


@dataclass
class Passing:
    """What goes through a quantizer of the simulation: before it and behind it, float32 of one shape."""

    before: Tensor
    behind: Tensor


def simulated(model: Student, images: Tensor) -> dict[str, Passing]:
    """What passes every quantizer of an activation in the simulation, by node name.

    Args:
        model: frozen.
        images: [N, C, H, W].
    """
    quantizers = activation_quantizers(model)
    sources = {str(n.args[0]) for n in model.graph.graph.nodes if n.name in quantizers}
    values, _ = values_of(model.graph, images, [*quantizers, *sources])
    before = {n.name: values[str(n.args[0])] for n in model.graph.graph.nodes if n.name in quantizers}
    return {name: Passing(before[name], values[name]) for name in quantizers}


def compare_layers(
    model: Student, program: ir.Model, images: Tensor, opener: Opener | None = None
) -> list[LayerParity]:
    """Every layer in the runtime, optimisations off, fed the simulation's own inputs.

    Args:
        model: frozen.
        program: its file.
        images: [N, C, H, W].
        opener: opens the program; ONNX Runtime if not given.

    Returns:
        One record a layer; none for a file that has no layer of the simulation's.
    """
    quantizers = activation_quantizers(model)
    cut, names = _cut(program, set(quantizers))
    if not names:  # a file without the layers that the simulation has, since no output reads them
        return []
    with (opener or session)(cut, optimize=False) as runtime:
        return merged(_compared(model, runtime, names, part) for part in in_parts(model, images))


def in_parts(model: Student, images: Tensor) -> tuple[Tensor, ...]:
    """Images [N, C, H, W] in parts, so large that what goes through the quantizers can be held; of at least one."""
    quantizers = activation_quantizers(model)
    each = sum(image_bytes(n) for n in model.graph.graph.nodes if n.name in quantizers)
    return torch.split(images, max(1, PASS_BYTES // max(1, 2 * each)))


def merged(parts: Iterable[Sequence[LayerParity]]) -> list[LayerParity]:
    """Every layer on all of the parts."""
    return [reduce(add, layers) for layers in zip(*parts, strict=True)]


def _compared(model: Student, runtime: Session, names: Sequence[str], images: Tensor) -> list[LayerParity]:
    passing, quantizers = simulated(model, images), activation_quantizers(model)
    wanted = {i.name for i in runtime.get_inputs()}
    feed = {f"{n}/fed": v.behind.numpy() for n, v in passing.items() if f"{n}/fed" in wanted}
    feed |= dict.fromkeys(of_images(wanted), images.numpy())
    outputs = runtime.run([f"{n}/value" for n in names], feed)
    found = {n: (_codes(quantizers[n], out), "") for n, out in zip(names, outputs, strict=True)}
    return judged_layers(model, images, passing, found)


def judged_layers(
    model: Student, images: Tensor, passing: Mapping[str, Passing], found: Mapping[str, tuple[Tensor, str]]
) -> list[LayerParity]:
    """Every layer's codes against the simulation's; where too many differ, as far as its sums in float32 are known.

    Terms that cancel leave a sum whose rounding error is that of the terms, many times what the size of the sum says.

    Args:
        model: the simulation.
        images: [N, C, H, W].
        passing: what goes through its quantizers for them, by node name.
        found: the runtime's codes, and the kernel that gave them, by node name.
    """
    quantizers = activation_quantizers(model)
    judged = {n: compare_layer(quantizers[n], passing[n], *codes) for n, codes in found.items()}
    if any(_is_open(layer) for layer in judged.values()):
        errors = rounding_errors(model, images, passing)
        for name in [n for n in errors if n in judged and _is_open(judged[n])]:
            judged[name] = compare_layer(quantizers[name], passing[name], *found[name], error=errors[name])
    return list(judged.values())


def _is_open(layer: LayerParity) -> bool:
    return layer.differing_fraction > MOST_DIFFERING and layer.max_steps <= MOST_STEPS


def rounding_errors(model: Student, images: Tensor, passing: Mapping[str, Passing]) -> dict[str, float]:
    """Largest difference of what each layer gives in float32 from float64, its inputs the same, by node name.

    Args:
        model: the simulation.
        images: [N, C, H, W].
        passing: what goes through its quantizers for them.

    Returns:
        In units of the layer; nothing for a network that computes in float32 alone.
    """
    sources = {str(n.args[0]): n.name for n in model.graph.graph.nodes if n.name in passing}
    found: dict[str, float] = {}

    def see(node: fx.Node, value: Any) -> Tensor | None:
        given = passing[node.name].behind.double() if node.name in passing else None
        name = sources.get(node.name)
        if name is not None:
            exact: Tensor = value if given is None else given
            difference = (exact - passing[name].before.double()).abs()
            found[name] = float(difference.max()) if difference.numel() else 0.0
        return given

    try:
        watch(copy.deepcopy(model.graph).double(), images.double(), dict.fromkeys([*sources, *passing], see))
    except RuntimeError:  # an operator that is fixed to float32
        return {}
    return found


def of_images(inputs: Iterable[str]) -> list[str]:
    """Those inputs of a cut network that are not fed from the simulation: the images, if a layer still reads them."""
    return [name for name in inputs if not name.endswith("/fed")]


def _codes(quantizer: Quantizer, values: Array) -> Tensor:
    """The codes that values of the grid stand for."""
    scale, zero = quantizer.expanded()
    return (torch.from_numpy(values) / scale).round_() + zero


def compare_layer(
    quantizer: Quantizer, passing: Passing, found: Tensor, kernel: str = "", *, error: float = 0.0
) -> LayerParity:
    """Codes of a runtime, in the shape of the tensor, against those of the simulation.

    Args:
        quantizer: of the layer.
        passing: what goes through it in the simulation.
        found: the runtime's codes.
        kernel: that gave them.
        error: of the values before the quantizer, in their units, as far as it is known
            (:func:`rounding_errors`); the runtime's may be as large.
    """
    apart, most, count = found != quantizer.codes(passing.before), 0, 0
    if bool(apart.any()):
        steps = _steps(quantizer, passing.before, found, apart, error)
        most, count = int(steps.max()), int((steps > 0).sum())
    total = apart.numel()
    return LayerParity(quantizer.name, count / total if total else math.nan, most, total, kernel)


def _steps(quantizer: Quantizer, before: Tensor, found: Tensor, apart: Tensor, error: float) -> Tensor:
    """How many steps the codes are apart that are, [K]; 0 where the value lies on the boundary of both."""
    scale, zero = (x.expand_as(before)[apart].double() for x in quantizer.expanded())
    theirs, exact = found[apart].double(), before[apart].double() / scale
    ours = quantizer.codes(before)[apart]
    nearest = 0.5 + BOUNDARY * exact.abs().clamp(min=1) + 2 * error / scale
    excess = (theirs - (exact + zero).clamp(quantizer.grid.qmin, quantizer.grid.qmax)).abs()
    return torch.where(excess <= nearest, 0.0, (theirs - ours).abs())


def _cut(program: ir.Model, names: set[str]) -> tuple[ir.Model, list[str]]:
    """The network cut at every activation quantizer: its value is an output, and what reads it reads an input."""
    cut = copy.deepcopy(program) if not hasattr(program, "clone") else program.clone()
    return cut, cut_at(cut, names, "/value", [value for node in cut.graph for value in node.outputs])


def cut_at(program: ir.Model, names: set[str], what: str, values: Iterable[ir.Value]) -> list[str]:
    """Makes outputs of some values, NAME followed by ``what``; what reads them reads an input ``NAME/fed`` then.

    Args:
        program: whose outputs are no more.
        names: of quantizers.
        what: the end of the names of their values.
        values: among which theirs are.

    Returns:
        The names that were found, in the order of the values.
    """
    found = []
    program.graph.outputs.clear()
    for value in values:
        name = (value.name or "").removesuffix(what)
        if name not in names or name == value.name:
            continue
        fed = ir.Value(name=f"{name}/fed", shape=value.shape, type=value.type)
        if value.uses():
            value.replace_all_uses_with(fed)
            program.graph.inputs.append(fed)
        program.graph.outputs.append(value)
        found.append(name)
    return found
