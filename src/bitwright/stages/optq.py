"""Rounds every weight in closed form so that each layer's output changes least."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from bitwright import together
from bitwright.given.images import Images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured
from bitwright.graph.patches import Drawn, group_grams, layer_inputs
from bitwright.graph.student import Student, has_quantized_weight, weight_of
from bitwright.graph.watch import Callback
from bitwright.quant import obq, optq
from bitwright.stages.augment import ViewCount, Views, view_count
from bitwright.stages.base import Run, Stage, Sums
from bitwright.stages.calibrate import MeanSums, correct_biases, mean_inputs, widen_for_biases
from bitwright.stages.passes import Several, dealt_tensors, sum_up

AFFORDABLE = 5e11
"""Multiplications of a layer up to which its elements are rounded one by one: about two minutes."""
DESCENDS = 2
"""Bits of weights up to which coordinate descent follows; at 3 and more it gains nothing on held-out images."""
COMPENSATED = frozenset({"linear", "conv1d", "conv2d", "conv3d"})


class Optq(Stage):
    """OPTQ (arXiv:2210.17323) with the float network's inputs, all layers from one pass.

    Afterwards the stored weights are what rounding to nearest turns into OPTQ's codes. Not applied to transposed and
    three-dimensional convolutions, and to weights that another operator reads in float: those stay.
    """

    kind: ClassVar[str] = "optq"
    needs_ranges: ClassVar[bool] = True
    layerwise: ClassVar[bool] = True

    images: int = Field(default=512, ge=1)
    """How many images to take the inputs from."""
    views: ViewCount = 1
    """Number of views of each image, as in ``reconstruct``."""
    positions: int = Field(default=64, ge=1)
    """Output positions drawn from each view of an image."""
    damping: float = Field(default=0.1, gt=0)
    """Share of the mean diagonal that is added to the diagonal."""
    ordered: bool = True
    """Columns of large inputs first."""
    exact: bool = False
    """Round the elements of each row in the order of what they cost (OBQ, arXiv:2208.11580), instead of all rows column
    by column, in the layers where that takes less than some minutes."""
    sweeps: int = Field(default=3, ge=0)
    """Of coordinate descent over the codes of 2-bit weights afterwards (COMQ, arXiv:2403.07134)."""
    bias_correction: bool = True
    """Give every output channel its mean back afterwards, as ``calibrate`` does (analytic)."""

    def sums(self, student: Student, teacher: Captured, images: Images, run: Run) -> Sums | None:
        """Where it takes all of the images, and one view of each."""
        alike = len(images) <= self.images and view_count(images, self.views) == 1
        return self._inputs(student, teacher, run) if alike else None

    def _inputs(self, student: Student, teacher: Captured, run: Run) -> _Inputs:
        means = mean_inputs(teacher.graph) if self.bias_correction else {}
        return _Inputs(_Grams(student, teacher.graph, self.positions, run.seed), MeanSums(means))

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """One pass over the images, if the stage before has not made it; memory is inputs x inputs for each layer."""
        inputs, run.summed = run.summed, None
        if not isinstance(inputs, _Inputs):
            some = images.sample(min(self.images, len(images)), seed=run.seed)
            samples = Views(some, view_count(some, self.views), run.seed)
            inputs = self._inputs(student, teacher, run)
            sum_up(teacher, samples, run, "Reading layer inputs", inputs)
        grams, means = inputs.grams, inputs.means
        self._tell(teacher, list(grams.matrices))
        self._round_all(student, teacher, grams.matrices, run)
        if self.bias_correction:
            correct_biases(student, teacher, means.found())
            widen_for_biases(student)
        return student

    def _round_all(self, student: Student, teacher: Captured, grams: dict[fx.Node, Tensor], run: Run) -> None:
        """Each layer by itself, dealt out to the processes there are."""
        nodes, what = list(grams), "Compensating roundings"

        def make(position: int) -> Tensor:
            run.progress(what, position, len(nodes))
            return self._rounded(student, teacher, nodes[position], grams.pop(nodes[position]))

        costs = [float(g.shape[0]) * g.shape[1] ** 3 for g in grams.values()]
        found = dealt_tensors(len(nodes), costs, make, run.device)
        for node, weight in zip(nodes, found, strict=True):
            kept = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
            rewrite.set_tensor(student.graph, weight_of(student, node.name)[0], kept)
        run.progress(what, len(nodes), len(nodes))

    def _rounded(self, student: Student, teacher: Captured, node: fx.Node, gram: Tensor) -> Tensor:
        stored, quantizer = weight_of(student, node.name)
        weight = rewrite.get_tensor(teacher.graph, stored)
        split = (gram.shape[0], weight.shape[0] // gram.shape[0], -1)
        given = (weight.reshape(split), gram, quantizer.expanded()[0].expand_as(weight).reshape(split))
        nearest = quantizer.grid.nearest
        if self.exact and self._affords(weight):
            found = obq.compensate_each(*given, nearest, damping=self.damping)
        else:
            found = optq.compensate(*given, nearest, damping=self.damping, ordered=self.ordered)
        if quantizer.grid.bits <= DESCENDS and self.sweeps and not self.exact:
            rows, _, steps = given
            start = nearest(found, steps)
            found = optq.sweep_codes(rows, start, gram, steps, nearest, damping=self.damping, sweeps=self.sweeps)
        return found.reshape(weight.shape)

    def _tell(self, teacher: Captured, nodes: list[fx.Node]) -> None:
        """Says which layers are too large to be rounded element by element."""
        weights = {str(n.meta["layer"]): rewrite.get_tensor(teacher.graph, str(n.args[1].target)) for n in nodes}  # type: ignore[union-attr]
        large = [name for name, weight in weights.items() if not self._affords(weight)]
        if self.exact and large:
            more = f" and {len(large) - 1} more" if len(large) > 1 else ""
            warnings.warn(
                f"Too large to be rounded element by element, and so rounded column by column: {large[0]}{more}.",
                stacklevel=3,
            )

    @staticmethod
    def _affords(weight: Tensor) -> bool:
        """Whether rounding element by element takes no more than minutes: the products of all steps of all rows."""
        return weight.shape[0] * float(weight[0].numel()) ** 3 <= AFFORDABLE


class _Inputs(Several):
    """What the layers read, summed up."""

    def __init__(self, grams: _Grams, means: MeanSums) -> None:
        super().__init__((grams, means))
        self.grams, self.means = grams, means


class _Grams:
    """``X X^T`` of every layer with a quantized weight, [groups, inputs, inputs], by the first of its nodes."""

    def __init__(self, student: Student, teacher: fx.GraphModule, positions: int, seed: int) -> None:
        self.teacher, self.positions, self.seed = teacher, positions, seed
        self.matrices: dict[fx.Node, Tensor] = {}
        self.owner: dict[str, fx.Node] = {}
        self._fresh: list[tuple[fx.Node, Tensor]] = []
        self._order: list[fx.Node] = []
        self._seen: dict[fx.Node, int] = {}
        self._first: dict[fx.Node, int] = {}
        quantized = {n.name for n in student.graph.graph.nodes if has_quantized_weight(n)}
        self.nodes = [n for n in teacher.graph.nodes if n.name in quantized and ops.base_name(n) in COMPENSATED]
        for node in self.nodes:
            self.owner.setdefault(str(node.args[1].target), node)
        self.callbacks, self.streams = self._callbacks(), [self]

    def _callbacks(self) -> dict[str, Callback]:
        """One for every tensor that such a layer reads, by node name."""
        readers: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            readers[node.args[0].name].append(node)
        return {name: self._collector(reading) for name, reading in readers.items()}

    def _collector(self, readers: list[fx.Node]) -> Callback:
        def collect(_: fx.Node, value: Tensor) -> None:
            for node in readers:
                stored = str(node.args[1].target)  # type: ignore[union-attr]
                weight = rewrite.get_tensor(self.teacher, stored)
                gram, owner = self._gram(node, value, weight), self.owner[stored]
                if together.processes() == 1:
                    self._take(owner, gram)
                else:
                    self._fresh.append((owner, gram))

        return collect

    def _gram(self, node: fx.Node, value: Tensor, weight: Tensor) -> Tensor:
        before = self._seen.setdefault(node, 0)
        self._seen[node] += len(value)
        self._first.setdefault(node, len(value))
        drawn = Drawn(self.positions, self.seed * 7919 + self.nodes.index(node), before)
        if ops.base_name(node) != "linear" and rewrite.groups(node) > 1:
            return group_grams(node, value, weight, drawn)
        return optq.gram(layer_inputs(node, value, weight, drawn))

    def _take(self, owner: fx.Node, gram: Tensor) -> None:
        if owner in self.matrices:
            self.matrices[owner] += gram
        else:
            self.matrices[owner] = gram.clone()

    def taken(self) -> list[Tensor]:
        """What the last batch adds; nothing where a single process has added it already."""
        fresh, self._fresh = self._fresh, []
        self._order = [owner for owner, _ in fresh]
        return [gram for _, gram in fresh]

    def add(self, given: Sequence[Tensor]) -> None:
        """Takes in what :meth:`taken` gave, here or in another process."""
        for owner, gram in zip(self._order, given, strict=True):
            self._take(owner, gram)

    def skip(self, batches: int) -> None:
        """Counts the images of batches as large as the first one, since each image has positions of its own."""
        for node, count in self._first.items():
            self._seen[node] += count * batches

    def forget(self) -> None:
        """Its sums are added in order, whoever saw them."""
