"""What was lost: accuracy where there are labels, fidelity to the float network always. Labels are read here alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.graph.axes import read_outputs
from bitwright.graph.readings import Reading
from bitwright.graph.watch import Callback, watch
from bitwright.metrics import Accuracy, Fidelity, SignalToNoise
from bitwright.progress import Progress, silent

if TYPE_CHECKING:
    from bitwright.data import Images
    from bitwright.quantized import QuantizedModel

Network = Callable[[Tensor], list[Tensor]]
Each = Callable[[int, list[Tensor], list[Tensor], Tensor | None], None]
"""Takes the position of a batch's first image, outputs of the reference and of the network, and labels [B] or None."""


def evaluate(
    model: QuantizedModel,
    source: Any,
    *,
    labels: Any = None,
    batch: int = 50,
    progress: Progress = silent,
    each: Each | None = None,
    readings: Sequence[Reading] = (),
) -> dict[str, Any]:
    """Accuracy and fidelity of a quantized model.

    Args:
        model: with its float teacher, or loaded without.
        source: images as everywhere (a path, a tensor, a loader, :class:`bitwright.data.Images`).
        labels: a CSV of ``file,class_index``, if the images do not carry their own.
        batch: images at a time.
        progress: called as it goes.
        each: shown the outputs of every batch, if there is a teacher.
        readings: how each output is read; told by the teacher's graph if not given.

    Returns:
        ``quantized`` and, with a teacher, ``float`` and ``fidelity``, as in ``result.json``.
    """
    from bitwright.data import Images, load_images

    images = source if isinstance(source, Images) else load_images(source, model.preprocessing, labels=labels)
    teacher, names = model.teacher, model.outputs
    reference = None if teacher is None else (lambda x: list(teacher.graph(x)))
    readings = readings or read_outputs_of(model, images)
    return compare(
        model.flat,
        reference,
        images,
        names=names,
        readings=readings,
        batch=batch,
        progress=progress,
        each=each,
    )


def read_outputs_of(model: QuantizedModel, images: Images) -> list[Reading]:
    """How each output of a model is read, told by its float network where it has one."""
    graph = model.graph if model.teacher is None else model.teacher.graph
    return read_outputs(graph, images.batch(range(min(2, len(images)))), model.outputs)


def compare(
    network: Network,
    reference: Network | None,
    images: Images,
    *,
    names: Sequence[str] = (),
    readings: Sequence[Reading] = (),
    batch: int = 50,
    progress: Progress = silent,
    each: Each | None = None,
) -> dict[str, Any]:
    """Runs one or two networks over the images.

    Args:
        network: that is measured.
        reference: the float network, if there is one.
        images: with or without labels.
        names: of the outputs.
        readings: what each of them holds; told by their first values if not given.
        batch: images at a time.
        progress: called as it goes.
        each: shown the outputs of every batch, if there is a reference.

    Returns:
        ``quantized`` (metrics of ``network``; empty without labels) and, with a reference, ``float`` and ``fidelity``.
    """
    ours, theirs, fidelity = Accuracy(), Accuracy(), Fidelity(names, readings)
    done = 0
    for inputs in images.batches(batch):
        with torch.no_grad():
            found = network(inputs)
            expected = None if reference is None else reference(inputs)
        truth = None if images.labels is None else images.labels[done : done + len(inputs)]
        if truth is not None:
            ours.update(class_scores(found, truth), truth)
            if expected is not None:
                theirs.update(class_scores(expected, truth), truth)
        if expected is not None:
            _check_shapes(expected, found)
            fidelity.update(expected, found)
            if each is not None:
                each(done, expected, found, truth)
        done += len(inputs)
        progress("Evaluating", done, len(images))
    result: dict[str, Any] = {"quantized": ours.result() if ours.count else {}}
    if reference is not None:
        result |= {"float": theirs.result() if theirs.count else {}, "fidelity": fidelity.result()}
    return result


def _check_shapes(expected: list[Tensor], found: list[Tensor]) -> None:
    """Both networks must return the same outputs.

    Raises:
        UsageError: their number or a shape differs.
    """
    theirs, ours = ([tuple(o.shape) for o in outputs] for outputs in (expected, found))
    if theirs != ours:
        raise UsageError(
            f"Expected the outputs of the float network, {_shapes(expected)}, found {_shapes(found)}. "
            "Give the float network that it was made from, or name the output that both have with --output."
        )


def _shapes(outputs: list[Tensor]) -> str:
    return ", ".join("x".join(map(str, o.shape[1:])) or "one number" for o in outputs)


def class_scores(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """The output that holds class scores, [B, K].

    Raises:
        DataError: no output is one, several are, or a label is beyond its classes.
    """
    scores = [o for o in outputs if o.dim() == 2]
    if len(scores) != 1:
        raise DataError(
            f"Expected one output of class scores to compare with labels, found outputs of {_shapes(outputs)}. "
            "Name the one to keep with --output, or evaluate without labels."
        )
    if len(labels) and int(labels.max()) >= scores[0].shape[1]:
        raise DataError(
            f"Expected labels below {scores[0].shape[1]}, the number of classes, found {int(labels.max())}."
        )
    return scores[0]


def layer_sqnr(model: QuantizedModel, images: Tensor) -> dict[str, float | None]:
    """Signal to quantization noise of every layer's output, in dB, on a few images [B, C, H, W].

    Errors accumulate from layer to layer, as they do when the network runs.
    """
    assert model.teacher is not None, "needs the float network"
    ends = {layer.end or layer.node for layer in model.layers}
    kept: dict[str, Tensor] = {}
    ratios: dict[str, SignalToNoise] = {}

    def keep(node: Any, value: Tensor) -> None:
        kept[node.name] = value

    def measure(name: str) -> Callback:
        def callback(_: Any, value: Tensor) -> None:
            ratios[name] = SignalToNoise()
            ratios[name].update(kept[name], value)

        return callback

    watch(model.teacher.graph, images, dict.fromkeys(ends, keep))
    quantized = {n.args[0].name: n.name for n in model.graph.graph.nodes if n.op == "call_module" and n.args}
    watch(model.graph, images, {quantized.get(e, e): measure(e) for e in ends})
    return {
        layer.name: ratios[layer.end or layer.node].result()
        for layer in model.layers
        if (layer.end or layer.node) in ratios
    }
