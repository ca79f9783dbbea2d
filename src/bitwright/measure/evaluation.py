"""What was lost: accuracy where there are labels, fidelity to the float network always. Labels are read here alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bitwright import together
from bitwright.errors import BitwrightError, DataError, UsageError, cause
from bitwright.given.arguments import of_kind, whole_number
from bitwright.given.images import Images, load_images
from bitwright.given.models import Model, decoder_behind
from bitwright.given.several import taking
from bitwright.given.two_stages import Second, TwoStageBody, TwoStages, two_networks, unfilled
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import Captured
from bitwright.graph.devices import device_of, undisturbed
from bitwright.graph.explain import cannot_run
from bitwright.graph.outputs import arrange, names
from bitwright.graph.readings import Reading
from bitwright.graph.student import Student, moved_to
from bitwright.graph.walk import images_in_pass
from bitwright.graph.watch import watch_both
from bitwright.measure.class_maps import GivenClassMap
from bitwright.measure.metrics import Evaluation, Fidelity, SignalToNoise
from bitwright.measure.task import Decode, Judged, Outputs, joined
from bitwright.measure.tasks import Scoring, judges, task_of
from bitwright.measure.truth_files import labelled
from bitwright.progress import Progress, silent, watched

AT_ONCE = 8
"""Images in one pass, where nothing depends on how many they are."""
PLAIN = Outputs()
NOTHING_SAID = Scoring()
Network = Callable[[Tensor], list[Tensor]]
Boxed = Callable[[list[Tensor]], list[Tensor]]
Seconds = tuple[Second, Second | None]
"""The second networks of a detector of two stages: of the one that is measured, and of the reference."""
Each = Callable[[int, list[Tensor], list[Tensor], Tensor | None], None]
"""Takes the position of a batch's first image, outputs of the reference and of the network, and labels [B] or None."""


@undisturbed()
def evaluate(
    model: Student,
    source: Any,
    *,
    labels: Any = None,
    task: str | None = None,
    metric: Any = None,
    decode: Decode | None = None,
    class_map: GivenClassMap = None,
    samples: int | None = None,
    input_key: str | None = None,
    batch: int = 50,
    progress: Progress | bool = True,
    classes: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Accuracy and fidelity of a quantized model.

    Args:
        model: with its float teacher, or loaded without.
        source: images as everywhere (a path, a tensor, a loader, :class:`bitwright.given.images.Images`).
        labels: class indices, masks or boxes, if the images do not carry their own; see
            :func:`bitwright.measure.truth_files.labelled`.
        task: ``classification``, ``segmentation`` or ``detection``; that of the labels if not given.
        metric: a function of outputs and truth, instead of the task's figures; see :mod:`bitwright.measure.own`.
        decode: a function that turns outputs into boxes with scores and labels, or into maps of classes.
        class_map: classes by the numbers or names in masks and boxes.
        samples: how many images to use, evenly spread where their number is known; all if not given.
        input_key: name of the images where items are dicts; the one entry that can be images if not given.
        batch: images at a time.
        progress: a function that is called as it goes, True for a bar where someone looks, or False.
        classes: axis of the classes of outputs by name, where it is known better; None for one that holds none.

    Returns:
        ``quantized``, ``evaluation`` where something is known of the images, and, with a teacher, ``float`` and
        ``fidelity``, as in ``result.json``.

    Raises:
        DataError: the labels do not fit the outputs, or give no figure.
    """
    of_kind("model", model, Student, "a quantized model")
    scoring = Scoring(task, metric, decode, decoder_behind(model.interface))
    scoring.check()
    images = images_to_measure(model, source, labels, class_map, input_key=input_key, decode=decode, samples=samples)
    readings = read_outputs_of(model, images, classes)
    with watched(progress) as told:
        found = evaluation_of(model, images, readings, scoring=scoring, batch=batch, progress=told)
    check_figures(found)
    return found.to_dict()


def images_to_measure(
    model: Student,
    source: Any,
    labels: Any = None,
    class_map: GivenClassMap = None,
    *,
    input_key: str | None = None,
    decode: Decode | None = None,
    samples: int | None = None,
) -> Images:
    """Images with what is known of them, and with all that a network takes beside them.

    Args:
        model: that is measured.
        source: images as everywhere.
        labels: as for :func:`bitwright.measure.truth_files.labelled`.
        class_map: as for the same function.
        input_key: name of the images where items are dicts.
        decode: of a detector of two stages, which chooses the regions that its second network takes.
        samples: how many images to use, evenly spread; all if not given.

    Raises:
        DataError: images or labels cannot be read, or do not belong together.
    """
    most = None if samples is None else whole_number("samples", samples, least=1)
    images = load_images(
        source,
        model.preprocessing,
        most=most,
        input_key=input_key,
        inputs=model.input_names,
        channels_last=model.channels_last,
    )
    images = labelled(images, labels, class_map)
    images = images if most is None else images.sample(most)
    return decode.completed(images) if isinstance(decode, TwoStages) else images


def evaluation_of(
    model: Student,
    images: Images,
    readings: Sequence[Reading],
    *,
    scoring: Scoring = NOTHING_SAID,
    batch: int = 50,
    progress: Progress = silent,
    each: Each | None = None,
    noise: LayerNoise | None = None,
) -> Evaluation:
    """What :func:`evaluate` tells, as a record.

    Args:
        model: with its float teacher, or loaded without.
        images: with or without labels.
        readings: how each output is read, from :func:`read_outputs_of`.
        scoring: how outputs are scored.
        batch: images at a time, fewer where they are large.
        progress: called as it goes.
        each: shown the outputs of every batch, if there is a teacher.
        noise: of every layer, measured on the way.
    """
    teacher, device = model.teacher, device_of(model.graph)
    reference: Network | None = None
    if teacher is not None:
        reference = lambda x: [o.cpu() for o in teacher.flat(x.to(device))]  # noqa: E731
    with moved_to(model, device):  # both networks
        return compare(
            lambda x: [o.cpu() for o in model.flat(x.to(device))],
            reference,
            images,
            outputs=outputs_of(model, readings),
            scoring=scoring,
            batch=images_in_pass(model.graph.graph, device, batch),
            progress=progress,
            each=each,
            noise=noise,
            seconds=seconds_of(model, teacher),
        )


def seconds_of(network: Student | Captured, reference: Captured | None) -> Seconds | None:
    """The second networks of detectors of two stages; None where these are something else."""
    ours = two_networks(network.graph, network.outputs, network.parts if isinstance(network, Student) else None)
    theirs = None if reference is None else two_networks(reference.graph, reference.outputs)
    return None if ours is None else (ours[1], None if theirs is None else theirs[1])


def outputs_of(model: Student | Captured, readings: Sequence[Reading] = ()) -> Outputs:
    """How a model's outputs are read; a user's own functions get them as the user's model arranges them."""
    return Outputs(model.outputs, readings, lambda flat: pytree.tree_unflatten(flat, model.structure))


def read_outputs_of(model: Student, images: Images, classes: Mapping[str, int | None] | None = None) -> list[Reading]:
    """How each output of a model is read, told by its float network where it has one; see :func:`read_outputs`.

    Raises:
        ModelError: the model cannot run on the images.
    """
    graph, few = model.graph if model.teacher is None else model.teacher.graph, images.batch(range(min(2, len(images))))
    try:
        return read_outputs(graph, few.to(device_of(graph)), model.outputs, classes)
    except BitwrightError:
        raise
    except Exception as error:
        raise cannot_run(error, few) from cause(error)


def compare(
    network: Network,
    reference: Network | None,
    images: Images,
    *,
    outputs: Outputs = PLAIN,
    scoring: Scoring = NOTHING_SAID,
    batch: int = 50,
    progress: Progress = silent,
    each: Each | None = None,
    noise: LayerNoise | None = None,
    seconds: Seconds | None = None,
) -> Evaluation:
    """Runs one or two networks over the images.

    Args:
        network: that is measured.
        reference: the float network, if there is one.
        images: with or without labels.
        outputs: how they are read; told by their first values if nothing is said.
        scoring: how they are scored.
        batch: images at a time.
        progress: called as it goes.
        each: shown the outputs of every batch, if there is a reference.
        noise: of every layer, measured on the way; of both networks.
        seconds: of a detector of two stages, whose boxes are scored.
    """
    fidelity, done = Fidelity(outputs.names, outputs.readings), 0
    behind: Sequence[Boxed] = (_as_it_is, _as_it_is)
    if seconds is not None and scoring.two_stages(task_of(images, scoring.task)) is not None:
        behind, outputs, scoring = _boxed(images, seconds, outputs, scoring)
    judged = judges(images, outputs, scoring)
    _say_what_is_left_out(images, judged)
    for count, found, expected in _answers(network, reference, images, batch, noise):
        part = range(done, done + count)
        for each_judge in judged:
            each_judge.add(part, behind[0](found), None if expected is None else behind[1](expected))
        if expected is not None:
            _check_shapes(expected, found)
            fidelity.update(expected, found)
            if each is not None:
                each(done, expected, found, None if images.labels is None else images.labels[part.start : part.stop])
        done += count
        progress("Evaluating", done, len(images))
    return joined(judged, None if reference is None else fidelity.outputs)


def _as_it_is(flat: list[Tensor]) -> list[Tensor]:
    return flat


def _boxed(
    images: Images, seconds: Seconds, outputs: Outputs, scoring: Scoring
) -> tuple[Sequence[Boxed], Outputs, Scoring]:
    """What puts each network's boxes behind its outputs, and how these are scored then."""
    two = scoring.two_stages(task_of(images, scoring.task))
    assert two is not None
    height, width = images.seen(0).shape[-2:]
    behind: list[Boxed] = [
        partial(two.behind, second=each, names=outputs.names, size=(height, width))
        for each in seconds
        if each is not None
    ]
    return [*behind, _as_it_is][:2], replace(outputs, arranged=_as_it_is), replace(scoring, decode=unfilled)


def check_figures(found: Evaluation) -> None:
    """Where there is something to compare with, there must be a figure.

    Raises:
        DataError: no mask counts a pixel, or a metric returned nothing.
    """
    if found.loss is None or found.quantized is None or not all(map(math.isnan, found.quantized.values.values())):
        return
    why = " ".join(found.loss.notes) or "The metric returned no number for any image."
    raise DataError(f"Expected figures from the labels, found none. {why} Check labels= and what reads them.")


def _answers(
    network: Network, reference: Network | None, images: Images, batch: int, noise: LayerNoise | None
) -> Iterator[tuple[int, list[Tensor], list[Tensor] | None]]:
    """How many images, and the outputs of both networks, batch after batch; processes take batches in turn."""
    starts = range(0, len(images), batch)
    noisy = [] if noise is None else [s for s in starts if s < noise.images]

    def answers(start: int, inputs: Tensor) -> tuple[int, list[Tensor], list[Tensor] | None]:
        with torch.no_grad():
            if noise is not None and start in noisy:
                expected, found = noise.run(inputs)
                return len(inputs), found, expected
            return len(inputs), network(inputs), None if reference is None else reference(inputs)

    def part(start: int) -> Tensor:
        return images.batch(range(start, min(start + batch, len(images))))

    if together.processes() == 1:
        yield from map(answers, starts, images.batches(batch))
        return
    for start in noisy:  # in every process, for the noise in its layers
        yield answers(start, part(start))
    left = starts[len(noisy) :]
    for first in range(0, len(left), together.processes()):
        turn = left[first : first + together.processes()]
        mine = {i: answers(s, part(s)) for i, s in enumerate(turn) if together.is_mine(i)}
        yield from together.collected(mine, len(turn))


def _say_what_is_left_out(images: Images, judged: Sequence[Judged]) -> None:
    if images.truth is not None and not judged:
        warnings.warn(
            f"The {images.truth.said} that came with the images are not used. Labels are class indices [N], masks "
            "of classes [N, H, W] or one-hot [N, K, H, W], or boxes and labels of each image; for others give metric=.",
            stacklevel=3,
        )


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


def check_truth(network: Model, images: Images, scoring: Scoring = NOTHING_SAID) -> None:
    """What is known of the images must fit the outputs; tried on two images before the long work.

    Raises:
        DataError: a label or a mask holds a class that the network does not have, or no output can be compared.
    """
    module: Any = network.module
    if not judges(images, PLAIN, scoring):
        return
    module = module.module() if isinstance(module, torch.export.ExportedProgram) else taking(module, images.parts)
    try:
        with torch.no_grad():
            found = module(images.batch([0, min(1, len(images) - 1)]))
    except (Exception, SystemExit):
        return  # capture finds the same and says where
    if network.output is not None and isinstance(found, dict):
        found = found.get(network.output, found)
    arranged = arrange(found)
    flat, structure = pytree.tree_flatten(arranged)
    outputs = Outputs(names(arranged), (), lambda x: pytree.tree_unflatten(x, structure))
    if isinstance(network.module, TwoStageBody) and scoring.two_stages(task_of(images, scoring.task)) is not None:
        (behind, _), outputs, scoring = _boxed(images, (network.module.second, None), outputs, scoring)
        flat = behind(flat)
    for each in judges(images, outputs, scoring):
        each.add(range(min(2, len(images))), [o[: len(images)] for o in flat])
        for position in range(2, len(images)):
            each.judge.target(range(position, position + 1))


class LayerNoise:
    """Signal to quantization noise of every layer's output, while a network and its float twin run beside each other.

    Errors accumulate from layer to layer, as they do when the network runs. Both are on one device.

    Args:
        model: with its float network.
        images: on how many it is measured, about: a batch that begins before that many is measured as a whole.
    """

    def __init__(self, model: Student, images: int) -> None:
        assert model.teacher is not None, "needs the float network"
        self.model, self.teacher, self.images = model, model.teacher, images
        ends = dict.fromkeys(layer.end or layer.node for layer in model.layers)
        quantized = {n.args[0].name: n.name for n in model.graph.graph.nodes if n.op == "call_module" and n.args}
        self.pairs = {quantized.get(end, end): end for end in ends}
        self.ratios: dict[str, SignalToNoise] = {}

    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the float network and of the quantized one, on the CPU, for a batch [B, C, H, W]."""

        def see(name: str, expected: Tensor, found: Tensor) -> None:
            self.ratios.setdefault(self.pairs[name], SignalToNoise()).update(expected, found)

        images = (images.float() if images.is_floating_point() else images).to(device_of(self.model.graph))
        theirs, ours = watch_both(self.teacher.graph, self.model.graph, images, self.pairs, see)
        return [o.cpu() for o in theirs], [o.cpu() for o in ours]

    def decibels(self) -> dict[str, float | None]:
        """Of every layer, by name; None where nothing differs."""
        ends = {layer.name: layer.end or layer.node for layer in self.model.layers}
        return {name: self.ratios[end].result() for name, end in ends.items() if end in self.ratios}


def layer_sqnr(model: Student, images: Tensor) -> dict[str, float | None]:
    """:class:`LayerNoise` of a few images [B, C, H, W] in dB."""
    noise = LayerNoise(model, len(images))
    for part in torch.split(images, images_in_pass(model.graph.graph, images.device, AT_ONCE)):
        noise.run(part)
    return noise.decibels()
