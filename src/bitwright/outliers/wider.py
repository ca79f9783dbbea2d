"""Few activations that need 16 bits: found by their effect on the outputs, suggested as rules, or raised.

What the rounding of each tensor adds to the loss comes from a few backward passes (:mod:`bitwright.outliers.effects`);
tensors are then raised together, the worst first, and the loss of the whole network is measured, since a convolution's
output and the function behind it only help as a pair. Labels are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bitwright.errors import UsageError
from bitwright.given.arguments import as_rules
from bitwright.graph import ops
from bitwright.graph.axes import read_outputs
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.walk import images_with_gradients
from bitwright.graph.watch import Callback, watch
from bitwright.graph.work import how_many, said
from bitwright.outliers.balance import NEGLIGIBLE_LOSS, own_quantizers, plain_ranges
from bitwright.outliers.effects import see_gradients
from bitwright.quant.quantizer import Calibration, as_if
from bitwright.quant.scheme import Rule, Scheme, escaped
from bitwright.run.record import Raised, Suggestion
from bitwright.sensitivity.one_at_a_time import distance_of_outputs, spread_of_outputs
from bitwright.transfer import fetched

if TYPE_CHECKING:
    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured
    from bitwright.recipes import Recipe
    from bitwright.stages.base import Run

WIDE, LEAST = 16, 8
"""Bits that tensors get; of schemes with fewer than the second, which have chosen to lose more, nothing is said."""
IMAGES, LEAST_IMAGES, BATCH, PROBES = 8, 4, 4, 2
EVERYTHING = f"*=a{WIDE}"
"""The rule that raises all activations."""
MOST = 8
"""Tensors that are raised."""
OPERATIONS = 0.25
"""Share of multiply-accumulates that may read or make 16-bit tensors, which ONNX Runtime computes in float."""
LOUD = 0.03
"""Loss (KL in nats, or squared error over the outputs' mean square) from which on a run says what would help."""
OF_SPREAD = 0.01
"""Of the distance between the float network's answers to two images: a loss that large is loud whatever it is in nats,
as in a network that is not sure of itself, or whose answers share a large constant part."""
HELPS = 0.7
"""Largest share of the loss that may be left where rules are worth naming."""
CLOSE = 0.05
"""Share of the loss; a tensor that saves less is left as it is."""


@dataclass(frozen=True)
class Widening:
    """Rules that help together.

    Attributes:
        loss: of the network as it is.
        left: of the network with all of the rules.
        cost: share of multiply-accumulates that read or make these tensors.
        suggestions: the most useful first; none where nothing that was tried helps.
        spread: of the float network's answers, from image to image, in the loss's unit.
        images: on how many they are measured.
    """

    loss: float
    left: float
    cost: float
    suggestions: list[Suggestion]
    spread: float
    images: int

    def __str__(self) -> str:
        """The warning, in one line."""
        share = (
            ""
            if math.isinf(self.spread)
            else f", {_percent(self.loss / self.spread)} of the difference between the answers to two images"
        )
        lost = f"The loss from the float network is {self.loss:.2g} on {self.images} calibration images{share}"
        if not self.suggestions:
            return (
                f"{lost}, and activations of 16 bits would leave {self.left:.2g}: the weights lose it, or the network "
                "answers otherwise when anything is rounded. Take another recipe=, or keep the worst layers in float "
                "(bitwright sensitivity ranks them)."
            )
        rules = as_rules(s.rule for s in self.suggestions)
        if self.suggestions[0].rule == EVERYTHING:
            return f"{lost}, from many activations together. With {rules} it would be {self.left:.2g}."
        names = ", ".join(s.tensor for s in self.suggestions)
        part = "most of it" if self.left < self.loss / 2 else f"{_percent(1 - self.left / self.loss)} of it"
        return (
            f"{lost}, {part} from activations that 8 bits do not hold: {names}. With {rules} it would be "
            f"{self.left:.2g}, and {100 * self.cost:.0f} % of the operations would read or make 16 bits"
            f"{self._shorter()}."
        )

    def _shorter(self) -> str:
        return "; or give activations='auto'" if self.cost <= OPERATIONS else ""


def raise_few(teacher: Captured, scheme: Scheme, images: Images, method: Recipe, run: Run) -> Scheme:
    """The scheme with rules of 16 bits for the few activations that need them: ``--activations auto``.

    Rules of the scheme come after them. The run's record of outliers says which.

    Raises:
        UsageError: the runtime has no 16-bit activations.
    """
    check_wide(scheme)
    some = images.sample(min(IMAGES, len(images)), seed=run.seed).unlabelled()
    student = insert_quantizers(teacher, scheme)
    student.to(run.device)
    student = plain_ranges(method).run(student, teacher, some, run)
    found = find_wider(student, teacher, some, run, loud=NEGLIGIBLE_LOSS, share=OPERATIONS)
    if found is None:
        return scheme
    run.outliers.raised = Raised(found.loss, found.left, found.suggestions)
    rules = tuple(Rule.parse(s.rule) for s in found.suggestions)
    return scheme.model_copy(update={"rules": (*rules, *scheme.rules)})


def check_wide(scheme: Scheme) -> None:
    """Whether the runtime has activations of 16 bits.

    Raises:
        UsageError: it has none.
    """
    if WIDE not in scheme.target.activation_bits:
        raise UsageError(
            f"Expected a runtime with {WIDE}-bit activations for activations='auto', found '{scheme.runtime}'. "
            "Give activations=8."
        )


def advise(student: Student, images: Images, run: Run) -> list[str]:
    """A line about a loss that a few 16-bit activations would mend, if there is one.

    Args:
        student: as the recipe left it, not frozen.
        images: without labels.
        run: seed, device; the rules go into its record of outliers.
    """
    scheme, teacher = student.scheme, student.teacher
    assert teacher is not None
    few = scheme.activations is not None and scheme.activations < LEAST
    if few or WIDE not in scheme.target.activation_bits:
        return []
    wanted = min(IMAGES, len(images))
    some = images.sample(how_many(student, wanted, LEAST_IMAGES), seed=run.seed).unlabelled()
    weights = scheme.weights is None or scheme.weights >= LEAST
    found = find_wider(student, teacher, some, run, loud=LOUD, share=1.0, say_all=weights, usual=wanted)
    if found is None:
        return []
    run.outliers.suggestions = found.suggestions
    return [str(found)]


def find_wider(
    student: Student,
    teacher: Captured,
    images: Images,
    run: Run,
    *,
    loud: float,
    share: float,
    say_all: bool = False,
    usual: int = 0,
) -> Widening | None:
    """The few activations that need 16 bits; None where the loss is below ``loud``, or no few tensors mend it.

    Args:
        student: calibrated, not frozen.
        teacher: its float network.
        images: a few, without labels.
        run: seed, device.
        loud: the loss from which on they are looked for, less where the answers hardly differ from image to image.
        share: of the multiply-accumulates, that may read or make these tensors.
        say_all: whether what no few tensors mend is said as well.
        usual: how many images a small network would have been looked at on.
    """
    trial = _Trial(student, teacher, images, run)
    trial.what = said(trial.what, len(images), usual)
    loss = trial.loss(())
    spread = trial.spread()
    if not loss >= loud * min(1.0, OF_SPREAD * spread / LOUD):
        return None
    worst = trial.worst(share)
    trial.read_ranges(worst)
    left, chosen = trial.together(worst, loss) if worst else (loss, [])
    if not left <= HELPS * loss:
        return trial.of_all(loss, spread) if say_all else None
    chosen, left, without = trial.pruned(chosen, left, CLOSE * loss)
    quantizers = trial.quantizers
    suggestions = [
        Suggestion(f"{escaped(quantizers[n].name)}=a{WIDE}", quantizers[n].name, without[n] - left, trial.cost([n]))
        for n in chosen
    ]
    return Widening(
        loss, left, trial.cost(chosen), sorted(suggestions, key=lambda s: -s.predicted_gain), spread, len(images)
    )


class _Trial:
    """A calibrated student, some of whose activations are raised for a look at the loss."""

    def __init__(self, student: Student, teacher: Captured, images: Images, run: Run) -> None:
        self.student, self.teacher, self.images, self.run = student, teacher, images, run
        self.quantizers = {n: q for n, q in own_quantizers(student).items() if q.grid.bits < WIDE}
        self.readings = read_outputs(teacher.graph, images.batch([0], run.device), teacher.outputs)
        self.wide: dict[str, Calibration] = {}
        self.expected: list[list[Tensor]] = []
        self.what = "Looking for activations that need bits"

    def loss(self, raised: Collection[str]) -> float:
        """Mean over the images, with those tensors at 16 bits."""
        total = 0.0
        with torch.no_grad(), as_if({self.quantizers[n]: self.wide[n] for n in raised}):
            for position, batch in enumerate(self.run.batches(self.images, self.what)):
                if position == len(self.expected):
                    self.expected.append(self.teacher.flat(batch))
                ours = self.student.flat(batch)
                total += float(distance_of_outputs(ours, self.expected[position], self.readings).sum())
        return total / len(self.images)

    def spread(self) -> float:
        """Of the float network's answers, from image to image."""
        every = zip(*self.expected, strict=True)
        return spread_of_outputs([torch.cat(each) if each[0].dim() else each[0] for each in every], self.readings)

    def worst(self, share: float) -> list[str]:
        """The tensors whose rounding adds most, within that share of operations, the worst first."""
        sums = dict.fromkeys(self.quantizers, torch.zeros((), dtype=torch.float64))

        def see(name: str, value: Tensor, gradient: Tensor) -> None:
            error = (self.quantizers[name](value) - value).mul_(gradient)
            sums[name] = sums[name] + error.flatten(1).sum(1).double().square().sum()

        at_once = images_with_gradients(self.teacher.graph.graph, self.run.device, BATCH)
        batches = self.images.batches(at_once, self.run.device)
        how: dict[str, Any] = {"readings": self.readings, "probes": PROBES, "seed": self.run.seed}
        see_gradients(self.teacher.graph, batches, self.quantizers, see, **how)
        effects = {name: float(total) for name, total in zip(sums, fetched(list(sums.values())), strict=True)}
        found: list[str] = []
        for name in sorted(effects, key=lambda n: -effects[n]):
            if len(found) < MOST and effects[name] > 0 and self.cost([*found, name]) <= share:
                found.append(name)
        return found

    def of_all(self, loss: float, spread: float) -> Widening:
        """What all activations at 16 bits would give."""
        every = list(self.quantizers)
        self.read_ranges(every)
        left = self.loss(every)
        helps = bool(every) and left <= HELPS * loss
        rules = [Suggestion(EVERYTHING, "all activations", loss - left, 1.0)] if helps else []
        return Widening(loss, left, 1.0, rules, spread, len(self.images))

    def read_ranges(self, names: Sequence[str]) -> None:
        """Grids of 16 bits that span what the tensors hold."""
        ends: dict[str, Tensor] = {}

        def see(node: fx.Node, value: Tensor) -> None:
            found = torch.stack(torch.aminmax(value))
            ends[node.name] = torch.stack(torch.aminmax(torch.cat([found, ends.get(node.name, found)])))

        callbacks: dict[str, Callback] = dict.fromkeys(names, see)
        for batch in self.run.batches(self.images, "Reading ranges"):
            watch(self.teacher.graph, batch, callbacks)
        for name, found in zip(ends, fetched(list(ends.values())), strict=True):
            low, high = found.tolist()
            self.wide[name] = self.quantizers[name].spanning(min(low, 0.0), max(high, 0.0), WIDE)

    def together(self, worst: Sequence[str], loss: float) -> tuple[float, list[str]]:
        """The fewest of the worst that together come close to the least loss, and that loss."""
        counts = [n for n in (1, 2, 4) if n < len(worst)] + [len(worst)]
        after = {n: self.loss(worst[:n]) for n in counts}
        close = min(after.values()) + CLOSE * loss
        count = next(n for n in counts if after[n] <= close)
        return after[count], list(worst[:count])

    def pruned(self, chosen: Sequence[str], left: float, close: float) -> tuple[list[str], float, dict[str, float]]:
        """Without those that are not missed, the loss then, and by name the loss without each of the rest."""
        kept, without = list(chosen), {}
        for name in reversed(chosen):
            rest = [n for n in kept if n != name]
            without[name] = self.loss(rest)
            if without[name] <= left + close and rest:
                kept = rest
                left = without[name]
        return kept, left, without

    def cost(self, names: Collection[str]) -> float:
        """Share of multiply-accumulates that read or make the tensors, which a linear layer ahead of a sum does not."""
        modules = {id(self.quantizers[n]) for n in names}
        keys = {k for k, m in self.student.graph.named_children() if id(m) in modules}
        rows = self.student.layers
        ends = {x.node for x in rows if x.activation in keys and (x.end == x.node or x.op in ops.CONV)}
        touched = sum(x.macs for x in rows if x.source in keys or x.node in ends)
        return touched / max(1, sum(x.macs for x in rows))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
