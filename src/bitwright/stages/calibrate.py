"""Chooses every scale from one pass of the float network over the images, then corrects the biases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from bitwright import together
from bitwright.curvature.label_free import label_free_scores
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.points import linear_points
from bitwright.graph.student import Student
from bitwright.graph.watch import Callback, watch
from bitwright.quant import shifts
from bitwright.quant.quantizer import BiasQuantizer, Quantizer
from bitwright.quant.ranges import RangeMethod, activation_range, spread_ratio, weight_scale
from bitwright.quant.scheme import Scheme
from bitwright.quant.statistics import MeanInput, Statistics, add_noted, to_cpu
from bitwright.stages.base import KeptSteps, Run, Stage, Stream
from bitwright.stages.passes import sum_up
from bitwright.stages.ptf import set_factors
from bitwright.transfer import fetched

BIAS_IMAGES = 128
"""Images that ``sequential`` corrects biases on, in one batch."""
SCORE_IMAGES = 64
"""Images from which ``hmse`` scores the elements of weights."""
BIAS_REACH = 2.0**30
"""Largest bias in steps of its accumulator; a channel that would exceed it gets wider weight steps."""


class Calibrate(Stage):
    """Ranges of weights and activations, and bias correction.

    Bias correction gives every output channel the mean it has in the float network. ``analytic``: the mean error of a
    linear operator is the operator applied to the mean input with the weight error in place of the weight, which is
    exact at the borders too. ``sequential``: measured layer after layer on the quantized network, activations included.
    """

    kind: ClassVar[str] = "calibrate"

    weights: RangeMethod | Literal["hmse"] = "mse"
    activations: RangeMethod = "mse"
    percentile: float = Field(default=0.9999, gt=0.5, le=1.0)
    weight_power: float = Field(default=4.0, gt=0)
    """Of the absolute error that ``mse`` sums up for weights. Large weights count for more than their square: 4 gave
    a lower KL than 2 on held-out images, for both zoo networks at 3 and 4 bits and EfficientNet-Lite0 at 4."""
    activation_power: float = Field(default=2.0, gt=0)
    """The same for activations."""
    bias_correction: Literal["analytic", "sequential", "none"] = "none"
    score_probes: int = Field(default=8, ge=1)
    """Backward passes for each batch of the images from which ``hmse`` scores the elements of weights."""
    norm_inputs: Literal["tensor", "ptf"] = "tensor"
    """Scales of what layer norms read: one per tensor, or ``ptf``, for each channel one of four that are powers of two
    apart (FQ-ViT, arXiv:2111.13824), chosen by squared error in a second pass over the images."""
    match_spread: bool = False
    """Stretch every weight and its step by ``std(w) / std(Q(w))``, the codes unchanged, so that quantization keeps the
    spread of each output channel (the bias correction of FQ-ViT and Evol-Q, in a form that a file can hold)."""

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """One pass over the images, two with ``ptf``; memory does not depend on their number."""
        means = MeanSums(mean_inputs(teacher.graph) if self.bias_correction == "analytic" else {})
        seen, following = _Seen(student), run.following
        run.summed = None if following is None else following.sums(student, teacher, images, run)
        more = run.beside if run.summed is None else (*run.beside, run.summed)
        sum_up(teacher, images, run, "Calibrating", seen, means, *more)
        statistics = seen.joined()
        self._set_weights(student, self._element_scores(teacher, images, run), run.steps_of_weights)
        if self.match_spread:
            match_spreads(student, teacher)
        self._set_activations(student, statistics)
        if self.norm_inputs == "ptf":
            set_factors(student, teacher, images, run)
        widen_for_biases(student)
        if self.bias_correction == "analytic":
            correct_biases(student, teacher, means.found())
        elif self.bias_correction == "sequential":
            correct_biases_in_sequence(student, teacher, images.batch(range(min(BIAS_IMAGES, len(images)))), run)
        widen_for_biases(student)
        return student

    def check(self, student: Student, teacher: Captured, images: Images) -> None:
        """Stretched steps are no powers of two.

        Raises:
            UsageError: steps would be stretched for a runtime that has powers of two.
        """
        if self.match_spread and student.scheme.target.power_of_two_scales:
            raise UsageError(
                f"match_spread stretches scales, which the runtime {student.scheme.runtime} has as powers of two only. "
                "Set it to false, or take another recipe=."
            )

    def _set_weights(self, student: Student, importance: dict[str, Tensor], steps: KeptSteps) -> None:
        weighted = self.weights == "hmse"
        for stored, quantizer in parameters(student.graph, "weight"):
            weight = rewrite.get_tensor(student.graph, stored)
            assert quantizer.block is not None
            power = 2.0 if weighted else self.weight_power
            scores = importance.get(stored) if weighted else None
            how = "mse" if self.weights == "hmse" else self.weights
            settings = (quantizer.grid, quantizer.block, how, self.percentile, power)
            scale = None if scores is not None else steps.of(weight, settings)
            if scale is None:
                scale = weight_scale(
                    weight,
                    quantizer.grid,
                    quantizer.block,
                    how,
                    percentile=self.percentile,
                    power=power,
                    importance=scores,
                )
            if scores is None:
                steps.keep(weight, settings, scale)
            if quantizer.power_of_two and self.weights in {"mse", "hmse"}:
                scale = shifts.nearest_power_scale(
                    weight, scale, quantizer.grid, quantizer.block, power=power, importance=scores
                )
            quantizer.set_range(scale)

    def _element_scores(self, teacher: Captured, images: Images, run: Run) -> dict[str, Tensor]:
        """``diag(J^T J)`` of the elements of every weight, for ``hmse``."""
        if self.weights != "hmse":
            return {}
        points = linear_points(teacher.graph, teacher.example.to(run.device))
        some = images.sample(min(SCORE_IMAGES, len(images)), seed=run.seed)
        return label_free_scores(
            teacher.graph,
            run.batches(some, "Scoring weights"),
            points,
            probes=self.score_probes,
            least=self.score_probes,
            elements=True,
            seed=run.seed,
        ).elements

    def _set_activations(self, student: Student, statistics: dict[str, Statistics]) -> None:
        for key, seen in statistics.items():
            self.set_activation(student.quantizer(key), seen, student.scheme)

    def set_activation(self, quantizer: Quantizer, seen: Statistics, scheme: Scheme) -> None:
        """Gives a quantizer the range of what was seen of its tensor."""
        negative = seen.minimum < 0 or not scheme.target.unsigned
        quantizer.grid = quantizer.grid.fitted(scheme.activation_grid, negative=negative)
        low, high = activation_range(
            seen, quantizer.grid, self.activations, percentile=self.percentile, power=self.activation_power
        )
        if quantizer.power_of_two:
            cover = self.activations != "mse"
            found = shifts.activation_parameters(
                low, high, seen, quantizer.grid, power=self.activation_power, cover=cover
            )
        else:
            found = quantizer.grid.spanning(torch.tensor(low), torch.tensor(high))
        quantizer.set_range(*found)


def parameters(graph: fx.GraphModule, role: str) -> list[tuple[str, Quantizer]]:
    """Stored tensors with a quantizer of the role: (path of the tensor, quantizer)."""
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        quantizer = graph.get_submodule(node.target)
        if isinstance(quantizer, Quantizer) and quantizer.role == role:
            found.append((str(node.args[0].target), quantizer))
    return found


def match_spreads(student: Student, teacher: Captured) -> None:
    """Stretches stored weights and their steps so that what is dequantized has the float weight's standard deviation.

    One factor a scale. Codes stay: where a stretched weight would round to another one it is put on its own. A weight
    that another operator reads in float stays as it is.
    """
    for stored, quantizer in parameters(student.graph, "weight"):
        if _read_in_float(student.graph, stored):
            continue
        weight = rewrite.get_tensor(student.graph, stored)
        codes, dequantized = quantizer.codes(weight), quantizer(weight)
        assert quantizer.block is not None
        ratio = spread_ratio(rewrite.get_tensor(teacher.graph, stored), dequantized, quantizer.block)
        quantizer.set_range(quantizer.scale * ratio)
        stretched = weight * quantizer.spread(ratio)
        on_code = codes * quantizer.expanded()[0]
        kept = torch.where(quantizer.codes(stretched) == codes, stretched, on_code)
        if kept.dim() == 4:
            kept = kept.contiguous(memory_format=torch.channels_last)
        rewrite.set_tensor(student.graph, stored, kept)


def _read_in_float(graph: fx.GraphModule, stored: str) -> bool:
    """Whether an operator reads the stored tensor past its quantizer."""
    readings = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == stored]
    return any(reader.op != "call_module" for node in readings for reader in node.users)


class _Seen:
    """Statistics of every tensor with an activation quantizer.

    Attributes:
        statistics: by the quantizer's key.
        callbacks: for a pass of the float network.
        streams: those statistics that grow in it.
    """

    def __init__(self, student: Student) -> None:
        self.statistics: dict[str, Statistics] = {}
        self._watched: dict[str, list[Statistics]] = defaultdict(list)
        for node in student.graph.graph.nodes:
            if node.op != "call_module" or not _is_activation(student.graph, node):
                continue
            name = student.quantizer(str(node.target)).name
            seen = self.statistics.setdefault(str(node.target), Statistics(name))
            source = node.args[0]
            if source.op == "get_attr":
                seen.note(rewrite.get_tensor(student.graph, str(source.target)))
            else:
                self._watched[source.name].append(seen)
        self.callbacks: dict[str, Callback] = dict.fromkeys(self._watched, self._see)
        add_noted(self.statistics.values())
        self.streams = [seen for observers in self._watched.values() for seen in observers]

    def _see(self, node: fx.Node, value: Tensor) -> None:
        observers = self._watched[node.name]
        for seen in observers:
            seen.note(value)
        if value.device.type == "cpu":  # it waits for nothing, and what was noted holds memory
            add_noted(observers)

    def taken(self) -> list[Tensor]:
        """Nothing: each process keeps what it has seen, until all have seen everything."""
        add_noted(self.streams)
        return []

    def add(self, given: Sequence[Tensor]) -> None:
        """Nothing."""

    def joined(self) -> dict[str, Statistics]:
        """What all processes have seen together; stored operands were seen whole by each."""
        to_cpu(list(self.statistics.values()))
        still = {key for key, seen in self.statistics.items() if seen not in self.streams}
        found, *others = together.collected({together.rank(): self.statistics}, together.processes())
        for key in found.keys() - still:
            for other in others:
                found[key].absorb(other[key])
        return found


class MeanSums:
    """Mean inputs, added batch after batch.

    Args:
        means: by node name.

    Attributes:
        callbacks: of the pass that sees the inputs.
        streams: none.
    """

    streams: Sequence[Stream] = ()

    def __init__(self, means: dict[str, MeanInput]) -> None:
        self.means, self._fresh = means, dict[str, tuple[Tensor, int]]()
        self.callbacks: dict[str, Callback] = dict.fromkeys(means, self._see)

    def _see(self, node: fx.Node, value: Tensor) -> None:
        self._fresh[node.name] = self.means[node.name].summed(value)

    def taken(self) -> list[Tensor]:
        """The sums of the last batch in the shapes of one sample, and how many samples each is of."""
        fresh, self._fresh = [self._fresh[name] for name in self.means], {}
        counts = torch.tensor([count for _, count in fresh])
        if fresh and together.processes() > 1:  # tensors that processes exchange lie together; else nothing waits
            counts = counts.to(fresh[0][0].device)
        return [*(total for total, _ in fresh), counts] if fresh else []

    def add(self, given: Sequence[Tensor]) -> None:
        """Takes in what :meth:`taken` gave, here or in another process."""
        for mean, total, count in zip(self.means.values(), given, given[-1].tolist() if given else (), strict=False):
            mean.add(total, count)

    def found(self) -> dict[str, Tensor]:
        """The means in the shapes of one sample, by node name."""
        return {name: mean.mean for name, mean in self.means.items()}


def _is_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    quantizer = graph.get_submodule(str(node.target))
    return isinstance(quantizer, Quantizer) and quantizer.role != "weight"


def mean_inputs(graph: fx.GraphModule) -> dict[str, MeanInput]:
    """One accumulator for the input of every linear operator, by the name of the node that yields it."""
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.graph.nodes:
        if ops.kind(node) == "linear":
            readers[node.args[0].name].append(ops.base_name(node))
    return {name: MeanInput(channels_only=set(kinds) == {"linear"}) for name, kinds in readers.items()}


def channel_mean(node: fx.Node, value: Tensor) -> Tensor:
    """Mean of a linear operator's output per output channel, [C_out]."""
    axis = value.dim() - 1 if ops.base_name(node) == "linear" else 1
    return value.mean([d for d in range(value.dim()) if d != axis])


def correct_biases(student: Student, teacher: Captured, means: dict[str, Tensor]) -> None:
    """Takes the mean output error of quantized weights off the biases.

    Args:
        student: whose biases change.
        teacher: the float network.
        means: mean inputs in the shape of one sample, by node name.
    """
    twin = {n.name: n for n in student.graph.graph.nodes}
    corrections: dict[str, list[Tensor]] = defaultdict(list)
    for node in teacher.graph.graph.nodes:
        if ops.kind(node) != "linear" or "unbiased" in node.meta:
            continue
        called = twin[node.name].args[1]
        if called.op != "call_module":
            continue
        weight = rewrite.get_tensor(teacher.graph, str(node.args[1].target))
        with torch.no_grad():
            stored = rewrite.get_tensor(student.graph, str(called.args[0].target))
            error = student.quantizer(str(called.target))(stored) - weight
            shift = node.target(means[node.args[0].name], error, None, *node.args[3:])
        corrections[str(node.args[2].target)].append(channel_mean(node, shift))
    for target, errors in corrections.items():
        bias = rewrite.get_tensor(teacher.graph, target)
        rewrite.set_tensor(student.graph, target, bias - torch.stack(errors).mean(0))


def correct_biases_in_sequence(student: Student, teacher: Captured, batch: Tensor, run: Run) -> None:
    """Gives each linear operator of the quantized network the float network's channel means, first to last.

    Args:
        student: whose biases change.
        teacher: the float network.
        batch: images [B, C, H, W].
        run: its device.
    """
    batch = batch.to(run.device)
    expected: dict[str, Tensor] = {}
    linears = [n.name for n in teacher.graph.graph.nodes if ops.kind(n) == "linear" and "unbiased" not in n.meta]

    def remember(node: fx.Node, value: Tensor) -> None:
        expected[node.name] = channel_mean(node, value)

    def correct(node: fx.Node, value: Tensor) -> Tensor:
        shift = expected[node.name] - channel_mean(node, value)
        stored = node.args[2]
        assert isinstance(stored, fx.Node)
        stored = stored.args[0] if stored.op == "call_module" else stored
        assert isinstance(stored, fx.Node)
        target = str(stored.target)
        rewrite.set_tensor(student.graph, target, rewrite.get_tensor(student.graph, target) + shift)
        tail = 0 if ops.base_name(node) == "linear" else value.dim() - 2
        return value + shift.reshape(-1, *[1] * tail)

    watch(teacher.graph, batch, dict.fromkeys(linears, remember))
    watch(student.graph, batch, dict.fromkeys(linears, correct))


def widen_for_biases(student: Student) -> None:
    """Widens the weight steps of channels whose bias would not fit the accumulator.

    Such channels have next to no weights (dead ones have none), so that a wider step costs nothing.
    """
    found: list[tuple[Quantizer, Tensor]] = []
    for node in student.graph.graph.nodes:
        if node.op != "call_module":
            continue
        quantizer = student.graph.get_submodule(node.target)
        if not isinstance(quantizer, BiasQuantizer) or not quantizer.calibrated:
            continue
        bias = rewrite.get_tensor(student.graph, str(node.args[0].target)).abs()
        weight = quantizer.weight
        needed = bias * 2.0**weight.shift / (BIAS_REACH * quantizer.source.scale)
        found.append((weight, needed if weight.scale.numel() > 1 else needed.max()))
    enough = fetched([(needed <= weight.scale).all() for weight, needed in found])
    for (weight, needed), fits in zip(found, enough, strict=True):
        if not fits:
            weight.set_range(torch.maximum(weight.scale, needed))
