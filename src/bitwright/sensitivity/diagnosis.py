"""What a finished run lost where, and the ``--rule`` that gives most of it back.

Measured on calibration images, without labels. One backward pass through the student says to first order what each
quantization error costs; for the tensors that this puts first, the loss is measured with that tensor alone in float and
with more bits, everything else as the run left it. Only what lies behind a tensor runs again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite, segments
from bitwright.graph.axes import read_outputs
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import updating, values_of, watch
from bitwright.memory import keep_pages
from bitwright.progress import Progress, silent
from bitwright.quant.quantizer import BiasQuantizer, Calibration, Frozen, as_if
from bitwright.quant.ranges import rounded_to
from bitwright.quant.scheme import Rule, escaped
from bitwright.run.result import Diagnosis, Remedies, Remedy, TensorLoss
from bitwright.sensitivity.base import Choices
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.base import Run
from bitwright.stages.calibrate import channel_mean, mean_inputs

if TYPE_CHECKING:
    from bitwright.given.images import Images

IMAGES = 48
BATCH = 16
NEGLIGIBLE = 2e-3
"""Loss (KL in nats, or squared error over the outputs' mean square) below which there is nothing to mend."""
SHARE, LEAST = 0.05, 3.0
SPEED = 7
"""Tensors measured in the time of the first pass; the rules take about twice that time."""
SUSPECTS = (4, 16)
"""The fewest and the most tensors that are measured."""
TREATED = 4
"""Tensors for which rules are tried."""
TOGETHER = 3
WORTH = 0.05
"""Share of the loss: a rule that saves less is not named; of rules this close the one with fewer bytes is better."""
WEIGHTS = (4, 6, 8)
ACTIVATIONS = (8, 16)
"""Bits that rules give; a weight that has the last becomes float."""


def budget(seconds: float) -> float:
    """Seconds for the diagnosis of a run: :data:`SHARE` of the run's own, and at least :data:`LEAST`."""
    return max(LEAST, SHARE * seconds)


def diagnose(
    model: Student,
    images: Images | None = None,
    *,
    count: int = IMAGES,
    seconds: float | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> Diagnosis:
    """Where a quantized network loses most, and the rules that give most of it back.

    Args:
        model: as :func:`bitwright.quantize` returns it, or before it is frozen; with its float network.
        images: to measure on; those it was calibrated on if not given. Labels are not looked at.
        count: how many of them, evenly spread.
        seconds: to spend, about; decides how many tensors are measured, between :data:`SUSPECTS`.
        device: where.
        seed: of the calibration of wider activations.
        progress: called as it goes.

    Returns:
        The loss, the tensors that it comes from, and what mends it; both are empty where the loss is negligible.

    Raises:
        UsageError: the model has no float network, or there are no images.
    """
    images = images if images is not None else model.calibration
    if model.teacher is None or images is None:
        raise UsageError("Expected a network with its float network and images to diagnose it with, found none.")
    some = images.sample(min(count, len(images)), seed=0).unlabelled()
    run = Run(seed=seed, batch=BATCH, device=torch.device(device), progress=progress)
    with keep_pages(), _moved_to(model, run.device):
        return _Patient(model, some, run).examine(seconds)


@contextmanager
def _moved_to(model: Student, device: torch.device) -> Iterator[None]:
    assert model.teacher is not None
    before = model.teacher.example.device
    graphs = (model.graph, model.teacher.graph)
    for graph in graphs:
        graph.to(device)
    try:
        yield
    finally:
        for graph in graphs:
            graph.to(before)


@dataclass(frozen=True)
class Suspect:
    """A quantized tensor.

    Attributes:
        key: of its quantizer.
        tensor: what it is.
        bits: it has.
        called: what the graph calls for it: the quantizer, or the integers that took a weight's place.
        name: the layer that a rule names it by.
    """

    key: str
    tensor: Literal["weight", "activation"]
    bits: int
    called: str
    name: str


@dataclass(frozen=True)
class Change:
    """Some tensors as they would be otherwise.

    Attributes:
        suspects: those.
        values: of stored tensors and their layers' biases, by node name.
        grids: of activations, by key; None for float.
        bytes: that the file grows by.
    """

    suspects: tuple[Suspect, ...]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    grids: Mapping[str, Calibration | None] = field(default_factory=dict)
    bytes: int = 0

    def __or__(self, other: Change) -> Change:
        """Both."""
        suspects = tuple(dict.fromkeys((*self.suspects, *other.suspects)))
        values, grids = {**self.values, **other.values}, {**self.grids, **other.grids}
        return Change(suspects, values, grids, self.bytes + other.bytes)


class _Patient:
    """A finished student, its float network, and a few images."""

    def __init__(self, model: Student, images: Images, run: Run) -> None:
        assert model.teacher is not None
        self.model, self.images, self.run = model, images, run
        self.graph, self.teacher = model.graph, model.teacher
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.graph.graph.nodes}
        self.theirs: dict[str, fx.Node] = {n.name: n for n in self.teacher.graph.graph.nodes}
        self.readings = read_outputs(self.teacher.graph, images.batch([0]).to(run.device), model.outputs)
        self.suspects = self._suspects()
        self.calls: dict[str, list[fx.Node]] = {s.key: [] for s in self.suspects}
        by_target = {s.called: s.key for s in self.suspects}
        for node in self.nodes.values():
            if node.op == "call_module" and str(node.target) in by_target:
                self.calls[by_target[str(node.target)]].append(node)
        stored = [n for n in self.nodes.values() if n.name in self._constants()]
        values = segments.values(self.graph, [n.name for n in stored])
        self.stored: dict[str, Tensor] = {n.name: v for n, v in zip(stored, values, strict=True)}
        self.means: dict[str, Tensor] = {}
        self.widened: dict[int, Student] = {}

    def _suspects(self) -> list[Suspect]:
        """In program order; stored operands of activations, which have bits of their own, are none."""
        found: dict[str, Suspect] = {}
        called = {str(n.target) for n in self.nodes.values() if n.op == "call_module"}
        for layer in self.model.layers:
            if layer.weight is not None and layer.weight not in found:
                quantizer = self.model.quantizer(layer.weight)
                frozen = layer.weight.replace("quantizer_", "frozen_", 1)
                target = frozen if frozen in called else layer.weight
                found[layer.weight] = Suspect(layer.weight, "weight", quantizer.grid.bits, target, quantizer.name)
            key = layer.activation
            if key is not None and key not in found and self.model.quantizer(key).role == "activation":
                quantizer = self.model.quantizer(key)
                found[key] = Suspect(key, "activation", quantizer.grid.bits, key, quantizer.name)
        return list(found.values())

    def _linear(self, node: fx.Node) -> bool:
        twin = self.theirs.get(node.name)
        return twin is not None and ops.kind(twin) == "linear"

    def _constants(self) -> set[str]:
        """Names of what linear operators read besides the images: weights and biases as they compute with them."""
        found = set()
        for node in self.nodes.values():
            if self._linear(node):
                found |= {a.name for a in node.args[1:3] if isinstance(a, fx.Node)}
        return found

    # -------------------------------------------------------------------------------------------------- the story

    def examine(self, seconds: float | None) -> Diagnosis:
        """All of it; see :func:`diagnose`."""
        started = time.perf_counter()
        loss, effects = self.first_order()
        healthy = Diagnosis(loss if math.isfinite(loss) else None, len(self.images))
        if not loss >= NEGLIGIBLE:
            return healthy
        fewest, most = SUSPECTS
        each = time.perf_counter() - started
        number = most if seconds is None else int(SPEED * (seconds / each - 3))
        worst = sorted(self.suspects, key=lambda s: -effects[s.key])[: max(fewest, min(most, number))]
        without = self.losses([self.in_float(s) for s in worst], "Measuring suspects")
        rows = sorted(zip(worst, without, strict=True), key=lambda row: row[1])
        layers = [TensorLoss(s.name, s.tensor, rest, (loss - rest) / loss) for s, rest in rows if rest < loss]
        rules, together = self.prescribe(loss, [s for s, rest in rows if rest < (1 - WORTH) * loss])
        return replace(healthy, layers=layers, rules=rules, together=together)

    def prescribe(self, loss: float, worst: Sequence[Suspect]) -> tuple[list[Remedy], Remedies | None]:
        """For each of the worst tensors that are worth it the rule, and the best few together."""
        tried = [(s, r) for s in worst[:TREATED] for r in rules_for(s)]
        changes = {r: self.under(r) for _, r in tried}
        after = dict(zip(changes, self.losses(list(changes.values()), "Measuring rules"), strict=True))
        close = WORTH * loss
        best = {s.key: _cheapest({r: after[r] for t, r in tried if t is s}, changes, close) for s, _ in tried}
        good = sorted({r for r in best.values() if after[r] < loss - close}, key=after.__getitem__)
        rules = [Remedy(r, after[r], changes[r].bytes) for r in good]
        return rules, self._together(loss, close, {r: changes[r] for r in good})

    def _together(self, loss: float, close: float, changes: dict[str, Change]) -> Remedies | None:
        """One rule after the other, each the best beside those before; None if that ends with one."""
        chosen: list[str] = []
        reached, change, left = loss, Change(()), dict(changes)
        while left and len(chosen) < TOGETHER:
            both = {r: change | c for r, c in left.items()}
            after = dict(zip(both, self.losses(list(both.values()), "Measuring rules together"), strict=True))
            rule = _cheapest(after, both, close)
            if after[rule] > reached - close:
                break
            reached, change = after[rule], both[rule]
            chosen.append(rule)
            del left[rule]
        return Remedies(chosen, reached, change.bytes) if len(chosen) > 1 else None

    # ------------------------------------------------------------------------------------------------- first order

    def first_order(self) -> tuple[float, dict[str, float]]:
        """The loss, and by key what each error adds to it: the gradient at the error's end times the error."""
        self._read_means()
        leaves = {name: v.clone().requires_grad_() for name, v in self.stored.items()}
        effects = dict.fromkeys((s.key for s in self.suspects), 0.0)
        activations = {n.name: s.key for s in self.suspects if s.tensor == "activation" for n in self.calls[s.key]}
        total = 0.0
        for batch in self.run.batches(self.images, "Looking for what was lost"):
            with torch.no_grad():
                theirs = list(self.teacher.graph(batch))
            through = _Through(self.graph, leaves, activations, effects)
            with torch.enable_grad():
                each = distance_of_outputs(list(through.run(batch)), theirs, self.readings)
            if each.requires_grad:
                (each.sum() / len(self.images)).backward()  # type: ignore[no-untyped-call]
            through.env.clear()  # its values' history holds the hooks, which hold it
            total += float(each.detach().sum())
        for suspect in self.suspects:
            for name, value in self.in_float(suspect).values.items():
                gradient = leaves[name].grad
                if gradient is not None:
                    effects[suspect.key] += float((gradient * (self.stored[name] - value)).sum())
        return total / len(self.images), effects

    def _read_means(self) -> None:
        """Mean inputs of the float network's linear operators, for :meth:`_shift`."""
        means = mean_inputs(self.teacher.graph)
        callbacks = {name: updating(mean) for name, mean in means.items()}
        for batch in self.run.batches(self.images, "Reading mean inputs"):
            watch(self.teacher.graph, batch, callbacks)
        self.means = {name: mean.mean for name, mean in means.items()}

    # ---------------------------------------------------------------------------------------------------- changes

    def in_float(self, suspect: Suspect) -> Change:
        """It alone as the float network has it."""
        if suspect.tensor == "activation":
            return Change((suspect,), grids={suspect.key: None})
        return Change((suspect,), values=self._weight(suspect, None))

    def _weight(self, suspect: Suspect, bits: int | None) -> dict[str, Tensor]:
        """The float network's weight, rounded to ``bits``, and the biases that go with it, by node name."""
        float_weight, found = self._float_weight(suspect), {}
        value = float_weight
        if bits is not None:
            value = rounded_to(bits, float_weight, self.model.quantizer(suspect.key))
        for call in self.calls[suspect.key]:
            found[call.name] = value
            for node in filter(self._linear, call.users):
                bias = node.args[2]
                assert isinstance(bias, fx.Node)
                found[bias.name] = found.get(bias.name, self.stored[bias.name]) + self._shift(node, call, value)
        return found

    def _shift(self, node: fx.Node, call: fx.Node, value: Tensor) -> Tensor:
        """What keeps a layer's mean output where it is when its weight changes; 0 where biases were not corrected."""
        bias, source = node.args[2], self.theirs[node.name].args[0]
        assert isinstance(bias, fx.Node)
        assert isinstance(source, fx.Node)
        ours, theirs = self.stored[bias.name], self._float_bias(node)
        if bool(((ours - theirs).abs() <= self._bias_step(bias)).all()):
            return torch.zeros_like(ours)
        with torch.no_grad():
            error = self.stored[call.name] - value
            moved = node.target(self.means[source.name], error, None, *node.args[3:])  # type: ignore[operator]
        return channel_mean(node, moved) / len([n for n in bias.users if self._linear(n)])

    def _bias_step(self, bias: fx.Node) -> Tensor | float:
        module = self.graph.get_submodule(str(bias.target)) if bias.op == "call_module" else None
        quantizer = module.quantizer if isinstance(module, Frozen) else module
        return quantizer.scale if isinstance(quantizer, BiasQuantizer) and quantizer.calibrated else 0.0

    def _float_weight(self, suspect: Suspect) -> Tensor:
        reader = next(n for call in self.calls[suspect.key] for n in call.users if self._linear(n))
        stored = self.theirs[reader.name].args[1]
        assert isinstance(stored, fx.Node)
        return rewrite.get_tensor(self.teacher.graph, str(stored.target))

    def _float_bias(self, node: fx.Node) -> Tensor:
        stored = self.theirs[node.name].args[2]
        assert isinstance(stored, fx.Node)
        return rewrite.get_tensor(self.teacher.graph, str(stored.target))

    def under(self, rule: str) -> Change:
        """All tensors that the rule changes, as the rule has them: one name may stand for several."""
        scheme = self.model.scheme
        asked = scheme.model_copy(update={"rules": (*scheme.rules, Rule.parse(rule))})
        made = insert_quantizers(self.teacher, asked)
        there = {q: made.quantizer(q).grid.bits for x in made.layers for q in (x.weight, x.activation) if q is not None}
        total = Change(())
        for suspect in self.suspects:
            bits = there.get(suspect.key)
            if bits != suspect.bits:
                total |= self._at(suspect, bits)
        return total

    def _at(self, suspect: Suspect, bits: int | None) -> Change:
        """The tensor with ``bits``; None for float."""
        if suspect.tensor == "activation":
            grid = None if bits is None else self._grid(suspect.key, bits)
            return Change((suspect,), grids={suspect.key: grid})
        quantizer = self.model.quantizer(suspect.key)
        count = self._float_weight(suspect).numel()
        new = -(-count * bits // 8) if bits is not None else 4 * count - 4 * quantizer.scale.numel()
        more = new - -(-count * suspect.bits // 8)
        return Change((suspect,), values=self._weight(suspect, bits), bytes=more)

    def _grid(self, key: str, bits: int) -> Calibration:
        """Of an activation, calibrated on the same images."""
        if bits not in self.widened:
            choices = Choices(scheme=self.model.scheme)
            self.widened[bits] = choices.student(self.teacher, self.images, self.run, activations=bits)
        return self.widened[bits].quantizer(key).calibration

    # ----------------------------------------------------------------------------------------------------- measured

    def losses(self, changes: Sequence[Change], what: str) -> list[float]:
        """The mean loss with each of the changes; only what lies behind it runs again."""
        if not changes:
            return []
        parts = [segments.region(self.graph, [s.called for s in c.suspects]) for c in changes]
        kept = {name for part in parts for name in part.frontier}
        still = list(dict.fromkeys(name for part in parts for name in (*part.fixed, *part.moved)))
        constants = dict(zip(still, segments.values(self.graph, still), strict=True))
        sums = [0.0] * len(changes)
        for batch in self.run.batches(self.images, what):
            known, _ = values_of(self.graph, batch, kept)
            theirs = list(self.teacher.graph(batch))
            for position, (change, part) in enumerate(zip(changes, parts, strict=True)):
                operands = [*(known[n] for n in part.frontier)]
                operands += [change.values.get(n, constants[n]) for n in (*part.fixed, *part.moved)]
                grids = {self.model.quantizer(k): new for k, new in change.grids.items()}
                with as_if(grids), torch.no_grad():
                    ours = list(part.body(*operands))
                sums[position] += float(distance_of_outputs(ours, theirs, self.readings).sum())
        return [s / len(self.images) for s in sums]


class _Through(fx.Interpreter):
    """Runs the student so that gradients pass its roundings, and adds up gradient times error of its activations."""

    def __init__(
        self,
        graph: fx.GraphModule,
        leaves: Mapping[str, Tensor],
        activations: Mapping[str, str],
        effects: dict[str, float],
    ) -> None:
        super().__init__(graph)
        self.leaves, self.activations, self.effects = leaves, activations, effects

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.leaves:
            return self.leaves[n.name]
        if n.name not in self.activations:
            return super().run_node(n)
        source = n.args[0]
        assert isinstance(source, fx.Node)
        x = self.env[source]
        with torch.no_grad():
            error = super().run_node(n) - x
        y = x + error
        if y.requires_grad:
            y.register_hook(lambda g: self._add(self.activations[n.name], g, error))
        return y

    def _add(self, key: str, gradient: Tensor, error: Tensor) -> None:
        self.effects[key] += float((gradient * error).sum())


def rules_for(suspect: Suspect) -> list[str]:
    """The rules that give it more bits, the fewest first.

    Example:
        >>> rules_for(Suspect("", "weight", 4, "", "head")), rules_for(Suspect("", "activation", 8, "", "head"))
        (['head=w6', 'head=w8'], ['head=a16'])
    """
    letter, offered = ("w", WEIGHTS) if suspect.tensor == "weight" else ("a", ACTIVATIONS)
    wider: list[int | str] = [b for b in offered if b > suspect.bits]
    if suspect.tensor == "activation":
        wider = wider[:1]
    return [f"{escaped(suspect.name)}={letter}{b}" for b in wider or ["float"]]


def _cheapest(after: Mapping[str, float], changes: Mapping[str, Change], close: float) -> str:
    """Of the rules that come that close to the least loss, the one with the fewest bytes."""
    least = min(after.values())
    return min((r for r in after if after[r] <= least + close), key=lambda r: (changes[r].bytes, after[r]))


def diagnosis_lines(found: Diagnosis | None) -> list[str]:
    """The diagnosis in two or three lines; none where the loss is negligible, or there is no diagnosis.

    Example:
        >>> layers, rules = [TensorLoss("head", "weight", 0.1, 0.5)], [Remedy("head=w8", 0.11, 960)]
        >>> for line in diagnosis_lines(Diagnosis(0.2, 48, layers, rules)):
        ...     print(line)
        Loss from float on 48 calibration images: 0.2. One tensor alone in float removes: 50 % head (weights).
        To mend most of it: --rule 'head=w8' (predicted loss 0.11, 0.96 kB more)
    """
    if found is None or not found.layers:
        return []
    worst = ", ".join(f"{100 * r.share:.0f} % {r.name} ({r.tensor}s)" for r in found.layers[:3] if r.share >= WORTH)
    start = f"Loss from float on {found.images} calibration images: {found.loss:.2g}."
    if not found.rules:
        return [
            f"{start} No single tensor causes much of it. Give more bits everywhere, or take a recipe that optimises."
        ]
    lines = [f"{start} One tensor alone in float removes: {worst}."]
    best, together = found.rules[0], found.together
    lines.append(f"To mend most of it: {_advice([best.rule], best)}")
    if together is not None:
        lines.append(f"                 or: {_advice(together.rules, together)}")
    return lines


def _advice(rules: Sequence[str], found: Remedy | Remedies) -> str:
    flags = " ".join(f"--rule '{r}'" for r in rules)
    more = f"{found.bytes / 1000:.3g} kB more" if found.bytes else "no bytes more in the file"
    return f"{flags} (predicted loss {found.loss_after:.2g}, {more})"
