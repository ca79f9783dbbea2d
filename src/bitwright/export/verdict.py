"""What the check of a file found, as plain data: of layers, of outputs, and of the file as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_DIFFERING = 1e-3
"""Share of a layer's values that float summation may tip over a rounding boundary."""
MOST_STEPS = 1


@dataclass
class OutputParity:
    """One output of the whole network. Differences are in units of the output.

    Attributes:
        name: of the output.
        max_abs: largest difference.
        mean_abs: mean difference.
        range: largest minus smallest value of the simulation.
        agreement: share of same answers, or of equal values of an output of whole numbers; None without answers.
        self_agreement: the same of the simulation with itself, a few codes tipped.
        deviation: of the worst group of channels, as a multiple of what it may be; above 1 the output is another.
    """

    name: str = "output"
    max_abs: float = 0.0
    mean_abs: float = 0.0
    range: float = 0.0
    agreement: float | None = None
    self_agreement: float | None = None
    deviation: float = 0.0

    @property
    def diverges(self) -> bool:
        """Whether the file computes something else."""
        return not self.deviation <= 1


def worst_output(outputs: Sequence[OutputParity]) -> OutputParity:
    """The output that is furthest from what it may be."""
    return max(outputs, key=lambda x: math.inf if math.isnan(x.deviation) else x.deviation, default=OutputParity())


@dataclass
class LayerParity:
    """One layer, fed the simulation's own input."""

    name: str
    differing_fraction: float
    """Share of the codes; those that lie on a rounding boundary, where both are right, do not count."""
    max_steps: int
    values: int = 0
    """How many codes were compared."""
    kernel: str = ""
    """What the runtime, its optimisations on, put in the operator's place; empty with optimisations off."""

    @property
    def diverges(self) -> bool:
        """See :func:`beyond`."""
        return beyond(round(self.differing_fraction * self.values), self.max_steps, self.values)

    def __add__(self, other: LayerParity) -> LayerParity:
        """The same layer on the images of both."""
        values = self.values + other.values
        differing = self.differing_fraction * self.values + other.differing_fraction * other.values
        most = max(self.max_steps, other.max_steps)
        return replace(self, differing_fraction=differing / max(values, 1), max_steps=most, values=values)


def beyond(differing: int, max_steps: int, count: int) -> bool:
    """Whether more codes differ, or by more steps, than summation in float32 explains; a single one always may.

    Example:
        >>> beyond(1, 1, 50), beyond(2, 1, 50), beyond(1, 2, 5000)
        (False, True, True)
    """
    return max_steps > MOST_STEPS or differing > max(1, MOST_DIFFERING * count)


def worst_layer(layers: Mapping[str, LayerParity] | list[LayerParity]) -> LayerParity | None:
    """The one that differs most; None if no activation is quantized."""
    each = layers.values() if isinstance(layers, Mapping) else layers
    return max(each, key=lambda x: (x.max_steps > MOST_STEPS, x.differing_fraction), default=None)


@dataclass
class Parity:
    """What the check found; ``passed`` unless a layer, or an output, differs from the simulation.

    The first figures are those of the output that is furthest from what it may be, without graph optimisations;
    ``optimized`` holds the same with them.
    """

    runtime: str
    images: int
    max_abs: float
    mean_abs: float
    range: float
    agreement: float | None
    worst_layer: LayerParity | None
    """None if no activation is quantized."""
    first_divergence: str | None
    optimized: OutputParity | None = None
    """None in a result of old."""
    batch_sizes: tuple[int, ...] = ()
    outputs: list[OutputParity] = field(default_factory=list)
    """Each one, without graph optimisations."""
    optimized_outputs: list[OutputParity] = field(default_factory=list)
    """Each one, with them."""

    @property
    def passed(self) -> bool:
        """Whether the file may be shipped."""
        return self.first_divergence is None


@dataclass
class Difference:
    """How many codes differ, and by how many steps at most."""

    differing: int = 0
    max_steps: int = 0

    def update(self, a: Tensor, b: Tensor) -> None:
        """Adds a pair of int32 tensors of one shape."""
        steps = (a - b).abs()
        self.differing += int(steps.count_nonzero())
        self.max_steps = max(self.max_steps, int(steps.max()) if steps.numel() else 0)

    def beyond(self, count: int) -> bool:
        """Whether more of the ``count`` codes differ than summation in float32 explains."""
        return beyond(self.differing, self.max_steps, count)

    def __add__(self, other: Difference) -> Difference:
        """Both together."""
        return Difference(self.differing + other.differing, max(self.max_steps, other.max_steps))


@dataclass
class CodeComparison:
    """The codes of one activation quantizer, or of all that one operator feeds.

    Attributes:
        name: of the layer.
        operator: what is computed between the quantizers before and this one.
        kernel: that the reference takes the rule of.
        found: that the runtime used, as its optimized graph says.
        count: codes compared.
        layers: how many layers these are.
    """

    name: str
    operator: str
    kernel: str
    found: str = ""
    count: int = 0
    layers: int = 1
    simulation_reference: Difference = field(default_factory=Difference)
    reference_runtime: Difference = field(default_factory=Difference)
    simulation_runtime: Difference = field(default_factory=Difference)


def by_operator(layers: Iterable[CodeComparison]) -> list[CodeComparison]:
    """The rows of layers with the same operators and kernel as one, in the order in which they appear."""
    rows: dict[tuple[str, str], CodeComparison] = {}
    for layer in layers:
        key = (layer.operator, layer.found)
        row = rows.setdefault(key, CodeComparison(layer.name, layer.operator, layer.kernel, layer.found, layers=0))
        row.count, row.layers = row.count + layer.count, row.layers + 1
        row.simulation_reference += layer.simulation_reference
        row.reference_runtime += layer.reference_runtime
        row.simulation_runtime += layer.simulation_runtime
    return list(rows.values())


@dataclass
class OutputGap:
    """How far one output of two networks lies apart, in its own units.

    Attributes:
        range: largest minus smallest value of the first network.
        cosine: of the two outputs of one image, the mean over images.
        agreement: share of answers (of images, pixels, tokens) that are the same; None where there are no answers.
    """

    name: str
    max_abs: float
    mean_abs: float
    range: float
    cosine: float
    agreement: float | None

    @property
    def share(self) -> float:
        """The mean difference as a share of the range."""
        return self.mean_abs / self.range if self.range else 0.0


@dataclass(frozen=True)
class BatchGaps:
    """Every output of a file in a runtime at one batch size, beside the simulation's and the integer reference's."""

    batch: int
    outputs: list[OutputGap]
    from_reference: list[OutputGap]


@dataclass(frozen=True)
class RuntimeGaps:
    """A file in one runtime, whose name comes with its version, at every batch size."""

    runtime: str
    batches: list[BatchGaps]


@dataclass(frozen=True)
class ComparedImages:
    """The images of a comparison."""

    count: int
    sha256: str = ""


@dataclass(frozen=True)
class ParityRecord:
    """What ``parity.json`` holds, key by key.

    Attributes:
        bitwright: the version that compared.
        run: its folder.
        images: that the networks were run on.
        quantization_recorded: what the run's result says of its fidelity, where that is not measured here.
        float_network: ``measured``, or why it was not.
        quantization: float network against simulation, by output; None without the float network.
        runtimes: simulation, and integer reference, against the file.
        simulating: integer reference against simulation, by output.
        operators: the layers, those with the same operators and kernel as one.
        layers: all three code by code, each layer fed the simulation's codes, in ONNX Runtime.
        kernels: layers whose kernel is further from the simulation than summation in float32 explains.
        first_difference: the first layer in which any code of simulation and runtime differs.
        first_divergence: the first layer, or ``the output``, in which the file computes something else.
        diverging_in: the runtime in which an output does, if that is not ONNX Runtime.
        absent: runtimes that are not installed, with the line that installs each.
    """

    bitwright: str
    run: str
    images: ComparedImages
    quantization_recorded: dict[str, Any] | None
    float_network: str
    quantization: list[OutputGap] | None
    runtimes: list[RuntimeGaps]
    simulating: list[OutputGap]
    operators: list[CodeComparison]
    layers: list[CodeComparison]
    kernels: list[str]
    first_difference: str | None
    first_divergence: str | None
    diverging_in: str | None
    absent: list[dict[str, str]]
