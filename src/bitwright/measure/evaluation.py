"""What was lost: accuracy where there are labels, fidelity to the float network always. Labels are read here alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bitwright.errors import BitwrightError, DataError, UsageError, cause
from bitwright.given.arguments import of_kind
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model
from bitwright.graph.axes import read_outputs
from bitwright.graph.explain import cannot_run
from bitwright.graph.readings import Reading, by_values
from bitwright.graph.student import Student
from bitwright.graph.watch import Callback, watch
from bitwright.measure.metrics import Accuracy, Evaluation, Fidelity, Metrics, Segmentation, SignalToNoise
from bitwright.progress import Progress, silent

Network = Callable[[Tensor], list[Tensor]]
Each = Callable[[int, list[Tensor], list[Tensor], Tensor | None], None]
"""Takes the position of a batch's first image, outputs of the reference and of the network, and labels [B] or None."""


def evaluate(
    model: Student,
    source: Any,
    *,
    labels: Any = None,
    batch: int = 50,
    progress: Progress = silent,
    classes: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Accuracy and fidelity of a quantized model.

    Args:
        model: with its float teacher, or loaded without.
        source: images as everywhere (a path, a tensor, a loader, :class:`bitwright.given.images.Images`).
        labels: a CSV of ``file,class_index``, if the images do not carry their own.
        batch: images at a time.
        progress: called as it goes.
        classes: axis of the classes of outputs by name, where it is known better; None for one that holds none.

    Returns:
        ``quantized`` and, with a teacher, ``float`` and ``fidelity``, as in ``result.json``.
    """
    of_kind("model", model, Student, "a quantized model")
    images = source if isinstance(source, Images) else load_images(source, model.preprocessing, labels=labels)
    readings = read_outputs_of(model, images, classes)
    return evaluation_of(model, images, readings, batch=batch, progress=progress).to_dict()


def evaluation_of(
    model: Student,
    images: Images,
    readings: Sequence[Reading],
    *,
    batch: int = 50,
    progress: Progress = silent,
    each: Each | None = None,
) -> Evaluation:
    """What :func:`evaluate` tells, as a record.

    Args:
        model: with its float teacher, or loaded without.
        images: with or without labels.
        readings: how each output is read, from :func:`read_outputs_of`.
        batch: images at a time.
        progress: called as it goes.
        each: shown the outputs of every batch, if there is a teacher.
    """
    teacher = model.teacher
    reference = None if teacher is None else (lambda x: list(teacher.graph(x)))
    return compare(
        model.flat,
        reference,
        images,
        names=model.outputs,
        readings=readings,
        batch=batch,
        progress=progress,
        each=each,
    )


def read_outputs_of(model: Student, images: Images, classes: Mapping[str, int | None] | None = None) -> list[Reading]:
    """How each output of a model is read, told by its float network where it has one; see :func:`read_outputs`.

    Raises:
        ModelError: the model cannot run on the images.
    """
    graph, few = model.graph if model.teacher is None else model.teacher.graph, images.batch(range(min(2, len(images))))
    try:
        return read_outputs(graph, few, model.outputs, classes)
    except BitwrightError:
        raise
    except Exception as error:
        raise cannot_run(error, few) from cause(error)


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
) -> Evaluation:
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
    """
    fidelity, done = Fidelity(names, readings), 0
    ours, theirs = Scores(), None if reference is None else Scores()
    pixels: tuple[int, Reading] | None = None
    _say_what_is_left_out(images)
    for inputs in images.batches(batch):
        with torch.no_grad():
            found = network(inputs)
            expected = None if reference is None else reference(inputs)
        part = slice(done, done + len(inputs))
        truth, masks = (None if x is None else x[part] for x in (images.labels, images.masks))
        if masks is not None and not done:
            pixels = output_of_masks(found, readings, masks)
        ours.update(found, truth, masks, pixels)
        if theirs is not None and expected is not None:
            theirs.update(expected, truth, masks, pixels)
            _check_shapes(expected, found)
            fidelity.update(expected, found)
            if each is not None:
                each(done, expected, found, truth)
        done += len(inputs)
        progress("Evaluating", done, len(images))
    if theirs is None:
        return Evaluation(ours.result())
    return Evaluation(ours.result(), theirs.result(), fidelity.outputs)


def _say_what_is_left_out(images: Images) -> None:
    if images.left_out and images.labels is None:
        warnings.warn(
            f"The {images.left_out} that came with the images are not used. Labels are class indices [N], or masks "
            "[N, H, W] of one class for each pixel.",
            stacklevel=3,
        )


class Scores:
    """A network's outputs against labels and masks, as far as there are some."""

    def __init__(self) -> None:
        self.accuracy, self.segmentation = Accuracy(), Segmentation()

    def update(
        self, outputs: list[Tensor], labels: Tensor | None, masks: Tensor | None, pixels: tuple[int, Reading] | None
    ) -> None:
        """Adds a batch: outputs [B, ...], labels [B], masks [B, H, W].

        Args:
            outputs: of the network.
            labels: if there are some.
            masks: if there are some.
            pixels: position and reading of the output that gives each pixel of the masks its class, if one does.

        Raises:
            DataError: labels or masks do not fit the outputs.
        """
        if labels is not None:
            self.accuracy.update(class_scores(outputs, labels), labels)
        if masks is not None and pixels is not None:
            position, reading = pixels
            answers = _classes_of_pixels(outputs[position], reading)
            assert answers is not None
            known = None if reading.kind != "scores" or reading.axis is None else outputs[position].shape[reading.axis]
            self.segmentation.update(answers, masks, known)

    def result(self) -> Metrics:
        """What was measured."""
        found: dict[str, Any] = {
            **(self.accuracy.result() if self.accuracy.count else {}),
            **self.segmentation.result(),
        }
        return Metrics(**found)


def output_of_masks(outputs: list[Tensor], readings: Sequence[Reading], masks: Tensor) -> tuple[int, Reading] | None:
    """The first output that gives each pixel of masks [B, H, W] a class, and its reading; a warning if none does."""
    readings = readings or [by_values(o) for o in outputs]
    for i, (output, reading) in enumerate(zip(outputs, readings, strict=True)):
        answers = _classes_of_pixels(output, reading)
        if answers is not None and answers.shape == masks.shape:
            return i, reading
    warnings.warn(
        f"The masks of {'x'.join(map(str, masks.shape[1:]))} pixels are not used: no output gives a class to each of "
        f"these pixels, found outputs of {_shapes(outputs)}.",
        stacklevel=3,
    )
    return None


def _classes_of_pixels(output: Tensor, reading: Reading) -> Tensor | None:
    """One class for each position, [B, ...], of an output that tells one; a single channel tells 0 or 1."""
    answers = reading.answers(output)
    if answers is None or answers.shape[-1] > 1:
        return None
    answers = answers.squeeze(-1)
    return answers.squeeze(1) if answers.dim() == 4 and answers.shape[1] == 1 else answers


def _check_shapes(expected: list[Tensor], found: list[Tensor]) -> None:
    """Both networks must return the same outputs.

    Raises:
        UsageError: their number or a shape differs.
    """
    theirs, ours = ([tuple(o.shape) for o in outputs] for outputs in (expected, found))
    if theirs != ours:
        raise UsageError(
            f"Expected the outputs of the float network, {_shapes(expected)}, found {_shapes(found)}. "
            "Give the float network that it was made from, or name the output that both have with output=."
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
            "Name the one to keep with output=, or evaluate without labels."
        )
    if len(labels) and int(labels.max()) >= scores[0].shape[1]:
        raise DataError(
            f"Expected labels below {scores[0].shape[1]}, the number of classes, found {int(labels.max())}."
        )
    return scores[0]


def check_labels(network: Model, images: Images) -> None:
    """Labels must be below the number of classes; tried on one image before the long work.

    Raises:
        DataError: one is not, or no single output holds class scores.
    """
    module: Any = network.module
    if images.labels is None:
        return
    module = module.module() if isinstance(module, torch.export.ExportedProgram) else module
    try:
        with torch.no_grad():
            outputs = module(images.batch([0, 0]))
    except Exception:
        return  # capture finds the same and says where
    if network.output is not None and isinstance(outputs, dict):
        outputs = outputs.get(network.output, outputs)
    class_scores(pytree.tree_leaves(outputs), images.labels)


def layer_sqnr(model: Student, images: Tensor) -> dict[str, float | None]:
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
