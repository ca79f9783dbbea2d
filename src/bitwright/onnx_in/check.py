"""Whether a network that was read computes what ONNX Runtime computes on the same file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.given.text import short
from bitwright.graph.capture import COARSE_TOLERANCE, relative_difference
from bitwright.onnx_in.build import Body, Image, settings_beside, unread_inputs
from bitwright.onnx_in.file import OnnxProgram, label_of
from bitwright.onnx_in.network import OnnxNetwork, returned
from bitwright.onnx_in.patterns import reads
from bitwright.onnx_in.stored import elsewhere
from bitwright.onnx_in.values import as_tensor
from bitwright.runtimes.onnxruntime import patient_options
from bitwright.runtimes.session import Array, dtype_of

WHOLE_TOLERANCE = 1e-2
"""How far pixels that were divided and multiplied by 255 may be from whole numbers."""
RUNTIME_TOLERANCE = 1e-4
"""Largest difference, in units of an output's range, that kernels may make by summing in other orders."""


def part_of(program: OnnxProgram, body: Body, outputs: Sequence[str]) -> Any:
    """The program from its input to these tensors; its large tensors are said to be given."""
    part, whole = onnx.ModelProto(), program.proto.graph
    part.ir_version = program.proto.ir_version
    part.opset_import.extend(program.proto.opset_import)
    ends = [onnx.ValueInfoProto(name=name) for name in outputs]  # their types are what ONNX Runtime finds
    used = set[str]().union(*(reads(node) for node in body.nodes))
    stored = [t for t in whole.initializer if t.name in used]  # what follows the body may have tensors of its own
    tensors = [elsewhere(t, program.stored[t.name]) if t.name in program.stored else t for t in stored]
    graph = part.graph
    graph.name = whole.name or "part"
    left = {*unread_inputs(whole), *(value.name for value in settings_beside(whole))}
    inputs = [value for value in whole.input if value.name not in left]
    for made, given in zip(
        (graph.node, graph.input, graph.output, graph.initializer, graph.sparse_initializer, graph.value_info),
        (body.nodes, inputs, ends, tensors, whole.sparse_initializer, whole.value_info),
        strict=True,
    ):
        made.extend(given)
    return part


def check_import(program: OnnxProgram, body: Body, images: Sequence[Tensor], path: Any) -> float:
    """Compares the network with ONNX Runtime.

    Args:
        program: that it was read from.
        body: the network.
        images: [B, ...] as each input of the file takes them.
        path: of the file, for errors.

    Returns:
        The largest difference of an output, in units of its range.

    Raises:
        ModelError: they differ; the first tensor that does is named.
    """
    network = body.network
    for image, given in zip(body.images, images, strict=True):
        if tuple(given.shape[1:]) != image.shape:
            alone = len(images) == 1
            what = _named(image.shape) if alone else f"the input '{image.name}'"
            raise ModelError(
                f"Expected {what} of {_by(image.shape)} for {path}, found {_by(given.shape[1:])}. "
                f"Give {_remedy(image, tuple(given.shape[1:])) if alone else 'it in that shape'}."
            )
        _check_whole(image, given, path)
    images = [x.round() if image.whole else x for image, x in zip(body.images, images, strict=True)]
    with torch.no_grad():
        found = returned(network(*images))
    names = network.outputs
    theirs = run(program, body, names, images, path)
    worst = _worst(theirs, found)
    tolerance = COARSE_TOLERANCE if "float16" in program.short else RUNTIME_TOLERANCE
    if worst > tolerance and worst > 10 * _own_error(network, images, found):
        first = _first(program, body, images, path)
        if body.image.free and _worst(run(program, body, names, images, path, at_once=1), found) <= tolerance:
            raise ModelError(
                f"Expected a file that answers for each image alone, {path} joins the images of a batch{first}. "
                "Export it with a batch that is free in its reshapes too."
            )
        raise ModelError(
            f"The network as read from {path} differs from ONNX Runtime by {worst:.2g} of an output's range{first}. "
            "Please report it; until then export the network in other operators."
        )
    return worst


def _check_whole(image: Image, given: Tensor, path: Any) -> None:
    """Whether images are what a file of whole numbers takes.

    Raises:
        ModelError: they are not.
    """
    if not image.whole:
        return
    span = np.iinfo(image.whole)
    outside = (given - given.round()).abs().gt(WHOLE_TOLERANCE) | (given < span.min - 0.5) | (given > span.max + 0.5)
    if outside.any():
        raise ModelError(
            f"Expected whole numbers from {span.min} to {span.max}, which {path} takes as '{image.name}' "
            f"({image.whole}), found {float(given[outside][0]):.4g}. Give pixels from 0 to 255: images as bytes, or "
            "mean=0 and std=0.00392156863 for files."
        )


def _named(shape: Sequence[int]) -> str:
    """What tensors of this shape are called: vectors, signals, images or videos."""
    return {1: "vectors", 2: "signals", 4: "videos"}.get(len(shape), "images")


def _remedy(image: Image, found: tuple[int, ...]) -> str:
    """What to give in place of images of a shape that the file does not take."""
    if len(image.shape) < 3:
        return f"an array of floats (N, {', '.join(map(str, image.shape))})"
    if len(image.shape) == len(found) == 3:
        turned = {(0, 2, 3, 1): (*found[1:], found[0]), (0, 3, 1, 2): (found[2], *found[:2])}
        order = next((order for order, shape in turned.items() if shape == image.shape), None)
        if order is not None:
            return f"images.permute{order}"
    return "preprocessing= with the size and order of axes that the file has"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def run(
    program: OnnxProgram,
    body: Body,
    names: Sequence[str],
    images: Sequence[Tensor],
    path: Any,
    *,
    at_once: int | None = None,
) -> list[Tensor]:
    """What ONNX Runtime gives for the tensors of these names, in batches of the number that the file fixes.

    Where it is free, ``at_once`` of them make a batch; all if not given.
    """
    part = part_of(program, body, names)
    session = _session(part, program.stored, path)
    count = len(images[0])
    batch = (at_once or count) if body.image.free else body.image.batch
    kinds = {i.name: dtype_of(i.type) for i in session.get_inputs()}
    rows: list[list[Tensor]] = []
    for start in range(0, count, batch):
        missing = max(0, start + batch - count)
        feed = {}
        for image, x in zip(body.images, images, strict=True):
            given = x[start : start + batch]
            given = torch.cat([given, given[:1].expand(missing, *given.shape[1:])]) if missing else given
            if image.name in kinds:
                feed[image.name] = given.numpy().astype(kinds[image.name])
        try:
            answers = session.run(None, feed)
        except Exception as error:
            raise _not_run(path, error) from error
        rows.append([_without(as_tensor(np.asarray(a)), missing, batch) for a in answers])
    return [torch.cat(column) if column[0].dim() else column[0] for column in zip(*rows, strict=True)]


def _without(answer: Tensor, images: int, batch: int) -> Tensor:
    """What a runtime gave for a batch, without its last images; several rows may belong to one image."""
    return answer[: len(answer) - len(answer) * images // batch] if images and answer.dim() else answer


def _session(part: Any, stored: Mapping[str, Array], path: Any) -> Any:
    """The program in ONNX Runtime, which reads the stored tensors where they are."""
    import onnxruntime

    options = patient_options()
    options.log_severity_level = 4
    # as the file says: its optimisations take a fourth power for a layer norm's square (1.31)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies weights
    names = [t.name for t in part.graph.initializer if t.name in stored]
    options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(stored[n]) for n in names])
    try:
        return onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _not_run(path, error) from error


def _not_run(path: Any, error: Exception) -> ModelError:
    return ModelError(
        f"Expected a file that ONNX Runtime runs, it cannot run {path} ({short(error)}). Export it again."
    )


def _worst(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    return max(_difference(a, b) for a, b in zip(theirs, ours, strict=True))


def _difference(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        return float("inf")
    if not ours.is_floating_point():
        return float((theirs != ours).float().mean()) / 100 if ours.numel() else 0.0
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    difference = relative_difference(*(torch.where(same, 0, v.double()) for v in (theirs, ours)))
    return difference if np.isfinite(difference) else float("inf")


def _own_error(network: OnnxNetwork, images: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How far float32 itself is from float64, which deep networks make more of; 0 where float32 is asked for."""
    import copy

    try:
        with torch.no_grad():
            exact = returned(copy.deepcopy(network).double()(*(x.double() for x in images)))
    except RuntimeError:
        return 0.0
    pairs = [(a, b) for a, b in zip(exact, found, strict=True) if b.is_floating_point()]
    return max((relative_difference(a, b) for a, b in pairs), default=0.0)


def _first(program: OnnxProgram, body: Body, images: Sequence[Tensor], path: Any) -> str:
    """The first tensor that differs, as `` first at 'name' (Operator)``."""
    ours = body.network.watched(images)
    makers = {name: node for node in body.nodes for name in node.output}
    shared = [n for n in ours if n in makers and isinstance(ours[n], Tensor)]
    try:
        theirs = run(program, body, shared, images, path)
    except Exception:
        return ""
    for name, value in zip(shared, theirs, strict=True):
        if _difference(value, ours[name]) > RUNTIME_TOLERANCE:
            return f", first at '{name}' ({makers[name].op_type}, node '{label_of(makers[name])}')"
    return ""
