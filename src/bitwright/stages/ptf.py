"""Finds the tensors that may have power-of-two factors, and gives them to their quantizers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.given.images import Images
from bitwright.graph import ops
from bitwright.graph.capture import Captured
from bitwright.graph.place import consumers
from bitwright.graph.student import Student
from bitwright.graph.watch import Callback, updating, watch
from bitwright.quant.ptf import FactorErrors
from bitwright.quant.quantizer import TINY, Quantizer
from bitwright.stages.base import Run

OVER_LAST_AXIS = frozenset({"layer_norm", "native_layer_norm", "rms_norm"})
ONE_SCALE = ops.LINEAR | ops.MATMUL
"""Operators whose integer kernels take one scale for their input."""


def set_factors(student: Student, teacher: Captured, images: Images, run: Run) -> None:
    """Chooses the scales of normalisation inputs per channel: a second pass of the float network over the images.

    Args:
        student: with a scale in each of its quantizers.
        teacher: the float network.
        images: without labels.
        run: batch size, device, progress.
    """
    found = norm_inputs(student, teacher, run.device)
    if not found:
        warnings.warn(
            "No normalisation over channels reads a tensor that can have a scale per channel: norm_inputs='ptf' "
            "changes nothing.",
            UserWarning,
            stacklevel=3,
        )
        return
    errors = {name: FactorErrors(student.quantizer(key)) for name, key in found.items()}
    callbacks = {name: updating(seen) for name, seen in errors.items()}
    for batch in run.batches(images, "Choosing channel scales"):
        watch(teacher.graph, batch, callbacks)
    for name, key in found.items():
        quantizer = student.quantizer(key)
        if errors[name].scales.min() >= TINY:
            quantizer.set_range(errors[name].scale, quantizer.zero_point)


def norm_inputs(student: Student, teacher: Captured, device: torch.device | str = "cpu") -> dict[str, str]:
    """Tensors that may have a scale for each channel: the key of the quantizer, by the name of the node that yields it.

    A tensor may if a normalisation over its last axis reads it, also behind operators that only move data and leave
    that axis where it is; if no linear operator or product of matrices reads it; if its quantizer is its own; and if it
    does not come out of a convolution, whose integer kernel ends in one scale.
    """
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in student.graph.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    by_name = {n.name: n for n in teacher.graph.graph.nodes}
    found, norms = {}, {}
    for key, [call, *others] in calls.items():
        quantizer, source = student.graph.get_submodule(key), call.args[0] if call.args else None
        if others or not isinstance(source, fx.Node) or not isinstance(quantizer, Quantizer):
            continue
        if quantizer.role != "activation" or not quantizer.calibrated:
            continue
        node = by_name[source.name]
        readers = consumers(node)
        if any(ops.base_name(n) in ONE_SCALE for n in readers) or ops.base_name(node) in ops.LINEAR - {"linear"}:
            continue
        norms[node.name] = [str(_input(n).name) for n in readers if _is_over_channels(n)]
        found[node.name] = key
    keeping = _with_last_axis_kept(teacher, {name: inputs for name, inputs in norms.items() if inputs}, device)
    return {name: key for name, key in found.items() if name in keeping}


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _is_over_channels(node: fx.Node) -> bool:
    """Whether it normalises over the last axis and no other."""
    axes: Any = node.args[1] if len(node.args) > 1 else None
    return ops.base_name(node) in OVER_LAST_AXIS and isinstance(axes, list | tuple) and len(axes) == 1


def _with_last_axis_kept(teacher: Captured, inputs: dict[str, list[str]], device: torch.device | str) -> set[str]:
    """The tensors whose last axis is that of a normalisation's input behind operators that move data.

    Args:
        teacher: the float network.
        inputs: for each tensor the inputs of the normalisations that read it, all by node name.
        device: where the network is.

    Asked of the operators themselves: every tensor is replaced by the numbers of its channels, and they must arrive.
    """
    direct = {name for name, reached in inputs.items() if name in reached}
    moved = {name: reached for name, reached in inputs.items() if name not in direct}
    if not moved:
        return direct
    arrived: set[str] = set()

    def number(_: fx.Node, value: Tensor) -> Tensor:
        return _channels(value).contiguous()

    def check(node: fx.Node, value: Tensor) -> None:
        if torch.equal(value, _channels(value)):
            arrived.add(node.name)

    callbacks: dict[str, Callback] = dict.fromkeys(moved, number)
    callbacks |= {name: check for reached in moved.values() for name in reached}
    watch(teacher.graph, teacher.example.to(device), callbacks)
    sizes = {n.name: int(ops.shape(n)[-1]) for n in teacher.graph.graph.nodes if n.name in _names(moved)}
    kept = {n for n, reached in moved.items() if any(r in arrived and sizes[r] == sizes[n] for r in reached)}
    return direct | kept


def _names(inputs: dict[str, list[str]]) -> set[str]:
    return set(inputs) | {name for reached in inputs.values() for name in reached}


def _channels(value: Tensor) -> Tensor:
    """The number of its channel in every element, in the shape and dtype of the tensor."""
    return torch.arange(value.shape[-1], dtype=value.dtype, device=value.device).expand_as(value)
