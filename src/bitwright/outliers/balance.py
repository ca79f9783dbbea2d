"""Channels of activations brought to one size where their spread costs much, exactly and by measured effect.

Which tensors, and by how much, is decided on calibration images without labels: by what the rounding of each tensor
adds to the loss (:mod:`bitwright.outliers.effects`), and in the end by the loss of the whole quantized network, with
and without the change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from bitwright import together
from bitwright.errors import ModelError
from bitwright.graph import equalize
from bitwright.graph.axes import read_outputs
from bitwright.graph.equalize import ChannelScales
from bitwright.graph.readings import Reading
from bitwright.graph.walk import images_with_gradients
from bitwright.graph.watch import Callback, watch
from bitwright.outliers.effects import see_gradients
from bitwright.quant.quantizer import Quantizer, as_if
from bitwright.sensitivity.one_at_a_time import distance_of_outputs, spread_of_outputs
from bitwright.stages.calibrate import Calibrate
from bitwright.transfer import fetched

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured
    from bitwright.graph.student import Student
    from bitwright.recipes import Recipe
    from bitwright.stages.base import Run, Stream

Insert = Callable[["Captured"], "Student"]
"""Puts quantizers into a float network."""

IMAGES, BATCH, PROBES = 16, 4, 1
RANGE_IMAGES = 64
"""Images from which the largest magnitude of every channel is read."""
NEGLIGIBLE_LOSS = 2e-3
"""Loss below which nothing is looked for."""
OF_SPREAD = 0.1
"""Share of the distance between the float network's answers to two images; a loss above it is looked at."""
SHARE = 0.02
"""Least share of the loss that the rounding of a tensor adds, for its channels to be looked at."""
MOST = 16
"""Tensors that are changed in one round."""
ROUNDS = 3
BETTER = 0.5
"""Largest share of a tensor's effect that may be left, as estimated, if its channels are changed."""
KEPT = 0.9
"""Largest share of the loss that may be left, as measured, if a round's changes are kept."""
NOT_WORSE = 1.1
"""Largest share of the loss of weights alone that may be there afterwards, where weights are coarse."""
COARSE = 8
"""Bits of weights below which half of the exponents are tried as well, which change weights less."""
ANSWERS_BYTES = 64 << 20
"""Bytes of the float network's answers that are kept."""
FINEST = -10
"""The least exponent, for channels with next to nothing in them."""


@dataclass
class CostlyTensor:
    """A tensor whose rounding costs much.

    Attributes:
        node: that yields it, by name.
        axis: of its channels.
        effects: what the rounding of each channel adds to the loss, as estimated, [C].
        largest: magnitude in each channel, [C].
    """

    node: str
    axis: int
    effects: Tensor
    largest: Tensor | None = None

    def see(self, value: Tensor) -> None:
        """Takes a batch of its values in, [B, ...]: the largest magnitude of every channel."""
        found = value.abs().movedim(self.axis, 0).flatten(1).amax(1)
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)

    def exponents(self, divisor: int = 1) -> Tensor:
        """With which every channel reaches nearly as far as the largest one, and no farther, [C]."""
        assert self.largest is not None
        top = self.largest.max().clamp_min(1e-30)
        full = (self.largest / top).clamp_min(2.0**FINEST).log2().ceil()
        return torch.div(full, divisor, rounding_mode="trunc")

    def left(self) -> float:
        """Of its effect, with those exponents, over what it is without."""
        total = float(self.effects.sum())
        return float((self.effects * 4.0 ** self.exponents()).sum()) / total if total > 0 else 1.0


def balance(
    teacher: Captured, insert: Insert, images: Images, method: Recipe, run: Run
) -> tuple[Captured, list[ChannelScales]]:
    """The float network with its channels balanced where that lowers the loss of the quantized one; itself elsewhere.

    Args:
        teacher: prepared, on the run's device; not changed.
        insert: puts the quantizers of the job into it.
        images: without labels.
        method: the recipe, whose ranges are taken.
        run: seed, progress.

    Returns:
        The network, and what was changed in it, in order (:func:`bitwright.graph.equalize.equalized`).
    """
    some = images.sample(min(IMAGES, len(images)), seed=run.seed).unlabelled()
    more = images.sample(min(RANGE_IMAGES, len(images)), seed=run.seed).unlabelled()
    readings = read_outputs(teacher.graph, some.batch([0], run.device), teacher.outputs)
    trial = _Trial(insert, some, more, plain_ranges(method), run, readings)
    found: list[ChannelScales] = []
    now = trial.of(teacher, [])
    negligible = min(NEGLIGIBLE_LOSS, OF_SPREAD * trial.spread(teacher))
    for _ in range(ROUNDS):
        if not now.loss >= negligible:
            break
        suspects = [s for s in trial.suspects(now.student, now.teacher, SHARE * now.loss) if s.left() <= BETTER]
        options = []
        for divisor in (1, 2) if has_coarse_weights(now.student) else (1,):
            scales = [ChannelScales(s.node, tuple(map(int, s.exponents(divisor)))) for s in suspects]
            with suppress(ModelError):  # the outputs changed: numbers that are far too large, or far too small
                options += [trial.of(equalize.equalized(now.teacher, scales), scales)] if scales else []
        good = [o for o in options if o.betters(now)]
        if not good:
            break
        now = min(good, key=lambda o: o.loss)
        found += now.scales
    return now.teacher, found


@dataclass
class _Outcome:
    """What changed scales gave.

    With coarse weights, which the recipe may round far better than this trial does, the loss is that of activations
    alone; else it is that of both.
    """

    loss: float
    trial: _Trial
    teacher: Captured
    student: Student
    scales: list[ChannelScales]

    @cached_property
    def others(self) -> tuple[float, float]:
        """The loss of weights alone, and that of both; with weights that are not coarse 0 and the loss itself."""
        if not has_coarse_weights(self.student):
            return 0.0, self.loss
        weights, whole = self.trial.losses(self.student, self.teacher, [{"activation", "parameter"}, set()])
        return weights, whole

    def betters(self, other: _Outcome) -> bool:
        """Whether it loses clearly less, and nowhere more."""
        if not self.loss <= KEPT * other.loss:
            return False
        (weights, whole), (weights_before, whole_before) = self.others, other.others
        return weights <= NOT_WORSE * weights_before and whole <= whole_before


class _Answers:
    """What the float network answers in a pass, as far as it is small; processes that share it keep the first batch.

    Attributes:
        outputs: of each batch.
        callbacks: for the pass.
        streams: none.
    """

    streams: Sequence[Stream] = ()

    def __init__(self, teacher: Captured) -> None:
        self.outputs: list[list[Tensor]] = []
        self._bytes = 0
        self.callbacks: dict[str, Callback] = {n.name: self._see for n in teacher.graph.graph.nodes if n.op == "output"}

    def _see(self, _: fx.Node, value: Sequence[Tensor]) -> None:
        self._bytes += sum(o.nbytes for o in value)
        if self._bytes <= ANSWERS_BYTES and not (self.outputs and together.is_shared()):
            self.outputs.append(list(value))

    def taken(self) -> list[Tensor]:
        """Nothing: each process sees the first batch."""
        return []

    def add(self, given: Sequence[Tensor]) -> None:
        """Nothing."""


def let_pass(student: Student, roles: Collection[str]) -> AbstractContextManager[None]:
    """Quantizers of these roles let everything pass, while inside."""
    return as_if({m: None for m in student.graph.modules() if isinstance(m, Quantizer) and m.role in roles})


def has_coarse_weights(student: Student) -> bool:
    """Whether weights have so few bits that columns of different size cost accuracy."""
    return any(x.weight is not None and student.quantizer(x.weight).grid.bits < COARSE for x in student.layers)


def plain_ranges(method: Recipe) -> Calibrate:
    """The recipe's own choice of ranges, without what follows it."""
    stage = next((s for s in method.stages if isinstance(s, Calibrate)), Calibrate())
    plain = {"bias_correction": "none", "norm_inputs": "tensor", "match_spread": False}
    return stage.model_copy(update={**plain, "weights": "mse" if stage.weights == "hmse" else stage.weights})


@dataclass
class _Trial:
    """Quantizes float networks for a look at their loss."""

    insert: Insert
    images: Images
    more: Images
    """From which ranges of channels are read."""
    ranges: Calibrate
    run: Run
    readings: list[Reading]

    def of(self, teacher: Captured, scales: list[ChannelScales]) -> _Outcome:
        """All that belongs to a changed network."""
        answers = _Answers(teacher)
        student = self.student(teacher, answers)
        (loss,) = self.losses(student, teacher, [{"weight"} if has_coarse_weights(student) else set()], answers)
        return _Outcome(loss, self, teacher, student, scales)

    def student(self, teacher: Captured, answers: _Answers) -> Student:
        """Calibrated on the images, in a pass that asks the float network too."""
        made = self.insert(teacher)
        made.to(self.run.device)
        self.run.beside = (answers,)
        try:
            return self.ranges.run(made, teacher, self.images, self.run)
        finally:
            self.run.beside = ()

    def losses(
        self, student: Student, teacher: Captured, passing: Sequence[set[str]], answers: _Answers | None = None
    ) -> list[float]:
        """Means over the images, with quantizers of these roles letting everything pass; in float they run once.

        Not even once for batches whose answers are there already.
        """
        totals, known = [0.0] * len(passing), [] if answers is None else answers.outputs
        with torch.no_grad():
            for place, batch in enumerate(self.run.batches(self.images, "Looking for outliers")):
                expected = known[place] if place < len(known) else teacher.flat(batch)
                for position, roles in enumerate(passing):
                    with let_pass(student, roles):
                        found = student.flat(batch)
                    totals[position] += float(distance_of_outputs(found, expected, self.readings).sum())
        return [total / len(self.images) for total in totals]

    def spread(self, teacher: Captured) -> float:
        """Of the float network's answers, from image to image."""
        batch = self.images.batch(range(min(BATCH, len(self.images))), self.run.device)
        with torch.no_grad():
            return spread_of_outputs(teacher.flat(batch), self.readings)

    def suspects(self, student: Student, teacher: Captured, least: float) -> list[CostlyTensor]:
        """Tensors whose rounding adds that much and whose channels can be scaled, the worst first."""
        effects = self._effects(student, teacher)
        total = {name: float(each.sum()) for name, each in effects.items()}
        nodes = {n.name: n for n in teacher.graph.graph.nodes}
        found: list[CostlyTensor] = []
        taken: set[str] = set()
        for name in sorted(effects, key=lambda n: -total[n]):
            if total[name] < least or len(found) == MOST:
                break
            scaled = equalize.reach(teacher.graph, nodes[name])
            if scaled is None or scaled & taken:
                continue
            taken |= scaled
            found.append(CostlyTensor(name, equalize.channel_axis(nodes[name]), effects[name]))
        self._read_ranges(teacher, found)
        return found

    def _effects(self, student: Student, teacher: Captured) -> dict[str, Tensor]:
        """What the rounding of each channel of each tensor adds to the loss, [C], by the tensor's node."""
        quantizers = own_quantizers(student)
        nodes = {n.name: n for n in teacher.graph.graph.nodes}
        axes = {name: equalize.channel_axis(nodes[name]) for name in quantizers}
        found: dict[str, Tensor] = {}

        def see(name: str, value: Tensor, gradient: Tensor) -> None:
            error = (quantizers[name](value) - value).mul_(gradient)
            each = error.movedim(axes[name], -1).reshape(len(error), -1, error.shape[axes[name]]).sum(1)
            found[name] = found.get(name, torch.zeros(())) + each.double().square().sum(0)

        at_once = images_with_gradients(teacher.graph.graph, self.run.device, BATCH)
        batches = self.images.batches(at_once, self.run.device)
        see_gradients(
            teacher.graph, batches, quantizers, see, readings=self.readings, probes=PROBES, seed=self.run.seed
        )
        totals = zip(found, fetched(list(found.values())), strict=True)
        return {name: total / (len(self.images) * PROBES) for name, total in totals}

    def _read_ranges(self, teacher: Captured, suspects: Sequence[CostlyTensor]) -> None:
        by_node = {s.node: s for s in suspects}

        def see(node: fx.Node, value: Tensor) -> None:
            by_node[node.name].see(value)

        if suspects:
            callbacks: dict[str, Callback] = dict.fromkeys(by_node, see)
            for batch in self.run.batches(self.more, "Looking for outliers"):
                watch(teacher.graph, batch, callbacks)
        for each in suspects:
            each.largest = None if each.largest is None else each.largest.cpu()


def own_quantizers(student: Student) -> dict[str, Quantizer]:
    """Of every activation that shares its quantizer with no other, by the name of the node that yields it."""
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.graph.nodes:
        if node.op == "call_module" and node.args:
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for key, [call, *others] in calls.items():
        quantizer, source = student.graph.get_submodule(key), call.args[0]
        if others or not isinstance(quantizer, Quantizer) or not isinstance(source, fx.Node):
            continue
        if quantizer.role == "activation" and quantizer.calibrated and quantizer.scale.numel() == 1:
            found[source.name] = quantizer
    return found
