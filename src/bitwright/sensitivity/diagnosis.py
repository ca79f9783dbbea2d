"""What a finished run lost where, and the ``--rule`` that gives most of it back.

Measured on calibration images, without labels. One backward pass through the student says to first order what each
quantization error costs; for the tensors that this puts first, the loss is measured with that tensor alone in float and
with more bits, everything else as the run left it. Only what lies behind a tensor runs again. How long the float
network takes decides how many images there are, so that a diagnosis takes about as long as it may.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from bitwright.errors import UsageError
from bitwright.graph import ops, rewrite, segments
from bitwright.graph.axes import read_outputs
from bitwright.graph.insert import bits_by_key
from bitwright.graph.products import fast_products
from bitwright.graph.student import Student, moved_to
from bitwright.graph.watch import Callback, updating, values_of, watch
from bitwright.memory import keep_pages
from bitwright.progress import Progress, silent
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import BiasQuantizer, Calibration, Frozen, as_if
from bitwright.quant.ranges import rounded_to
from bitwright.quant.scheme import Rule, escaped
from bitwright.quant.statistics import Statistics
from bitwright.run.result import Diagnosis, Remedies, Remedy, TensorLoss
from bitwright.sensitivity.one_at_a_time import distance_of_outputs
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, channel_mean, mean_inputs

if TYPE_CHECKING:
    from bitwright.given.images import Images

IMAGES, LEAST_IMAGES = 48, 2
FORWARDS = 30
"""What a diagnosis takes for an image, in passes of the float network."""
OPERATOR = 2e-5
"""Seconds that an operator takes however few images there are."""
FIRST_BYTES = 1 << 29
"""Bytes that one backward pass may take, about."""
FACTOR = 4
"""Bytes of a backward pass over those of the float network's values."""
KEPT_BYTES = 256 << 20
"""Bytes of images and outputs, and as many of values inside the network, that are kept."""
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
        count: how many of them at most, evenly spread.
        seconds: to spend, about; decides how many images are taken, from :data:`LEAST_IMAGES` on, and how many tensors
            are measured, between :data:`SUSPECTS`.
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
    run = Run(seed=seed, device=torch.device(device), progress=progress)
    with keep_pages(), moved_to(model, run.device):
        return _Patient(model, some, run).examine(seconds)


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
        self.readings = read_outputs(self.teacher.graph, images.batch([0], run.device), model.outputs)
        self.suspects = self._suspects()
        self.calls: dict[str, list[fx.Node]] = {s.key: [] for s in self.suspects}
        by_target = {s.called: s.key for s in self.suspects}
        for node in self.nodes.values():
            if node.op == "call_module" and str(node.target) in by_target:
                self.calls[by_target[str(node.target)]].append(node)
        self.again = segments.Rerun(self.graph)
        self.stored: dict[str, Tensor] = {name: self.again.constants[name] for name in self._constants()}
        self.means: dict[str, Tensor] = {}
        self.widened: dict[tuple[str, int], Calibration] = {}
        self.parts: list[_Images] = []
        self.clock = time.thread_time if run.device.type == "cpu" else time.perf_counter
        """On a CPU without what other processes take, so that a busy machine decides nothing."""

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

    def _constants(self) -> list[str]:
        """Names of what linear operators read besides the images: weights and biases as they compute with them."""
        found: dict[str, None] = {}
        for node in self.nodes.values():
            if self._linear(node):
                found |= dict.fromkeys(a.name for a in node.args[1:3] if isinstance(a, fx.Node))
        return [name for name in found if name in self.again.constants]

    # -------------------------------------------------------------------------------------------------- the story

    def examine(self, seconds: float | None) -> Diagnosis:
        """All of it; see :func:`diagnose`."""
        started = self.clock()
        self.read(seconds)
        loss, effects = self.first_order()
        healthy = Diagnosis(loss if math.isfinite(loss) else None, self.count)
        if not loss >= NEGLIGIBLE:
            return healthy
        fewest, most = SUSPECTS
        each = self.clock() - started
        number = most if seconds is None else int(SPEED * (seconds / each - 3))
        worst = sorted(self.suspects, key=lambda s: -effects[s.key])[: max(fewest, min(most, number))]
        before = self.clock()
        without = self.losses([self.in_float(s) for s in worst], "Measuring suspects")
        now = self.clock()
        rows = sorted(zip(worst, without, strict=True), key=lambda row: row[1])
        layers = [TensorLoss(s.name, s.tensor, rest, (loss - rest) / loss) for s, rest in rows if rest < loss]
        left = math.inf if seconds is None else (seconds - (now - started)) / max(now - before, 1e-9) * len(worst)
        good = [s for s, rest in rows if rest < (1 - WORTH) * loss]
        rules, together = self.prescribe(loss, good, left)
        return replace(healthy, layers=layers, rules=rules, together=together)

    @property
    def count(self) -> int:
        """How many images it is measured on."""
        return sum(len(part.images) for part in self.parts)

    def prescribe(
        self, loss: float, worst: Sequence[Suspect], left: float = math.inf
    ) -> tuple[list[Remedy], Remedies | None]:
        """For each of the worst tensors that are worth it the rule, and the best few together.

        Args:
            loss: without any rule.
            worst: the worst first.
            left: how many times there is time to measure a loss; for the worst tensor it is taken.
        """
        tried: list[tuple[Suspect, str]] = []
        for suspect in worst[:TREATED]:
            more = [(suspect, rule) for rule in rules_for(suspect)]
            if not tried or len(tried) + len(more) <= left:
                tried += more
        changes = {r: self.under(r) for _, r in tried}
        after = dict(zip(changes, self.losses(list(changes.values()), "Measuring rules"), strict=True))
        close = WORTH * loss
        best = {s.key: _cheapest({r: after[r] for t, r in tried if t is s}, changes, close) for s, _ in tried}
        good = sorted({r for r in best.values() if after[r] < loss - close}, key=after.__getitem__)
        rules = [Remedy(r, after[r], changes[r].bytes) for r in good]
        return rules, self._together(loss, close, {r: changes[r] for r in good}, left - len(tried))

    def _together(self, loss: float, close: float, changes: dict[str, Change], time_left: float) -> Remedies | None:
        """One rule after the other, each the best beside those before; None if that ends with one."""
        chosen: list[str] = []
        reached, change, left = loss, Change(()), dict(changes)
        while left and len(chosen) < TOGETHER and len(left) <= time_left:
            both = {r: change | c for r, c in left.items()}
            after = dict(zip(both, self.losses(list(both.values()), "Measuring rules together"), strict=True))
            time_left -= len(left)
            rule = _cheapest(after, both, close)
            if after[rule] > reached - close:
                break
            reached, change = after[rule], both[rule]
            chosen.append(rule)
            del left[rule]
        return Remedies(chosen, reached, change.bytes) if len(chosen) > 1 else None

    # ------------------------------------------------------------------------------------------------- first order

    def read(self, seconds: float | None = None) -> None:
        """Images, the float network's outputs for them and the mean inputs of its linear operators (:meth:`_shift`)."""
        order = _spread(len(self.images))
        count, at_once = self._affordable(order[:LEAST_IMAGES], seconds)
        means = mean_inputs(self.teacher.graph)
        callbacks = {name: updating(mean) for name, mean in means.items()}
        chosen = order[:count]
        for start in range(0, len(chosen), at_once):
            self.run.progress("Looking for what was lost", start, len(chosen))
            images = self.images.batch(chosen[start : start + at_once], self.run.device)
            self.parts.append(_Images(images, watch(self.teacher.graph, images, callbacks)))
        self.run.progress("Looking for what was lost", len(chosen), len(chosen))
        self.means = {name: mean.mean for name, mean in means.items()}

    def _affordable(self, first: list[int], seconds: float | None) -> tuple[int, int]:
        """How many images can be looked at in that time, and how many of them at once, told by the first few."""
        held = 0

        def see(_: fx.Node, value: Any) -> None:
            nonlocal held
            held += segments.tensor_bytes({"": value})

        images = self.images.batch(first, self.run.device)
        operators = [name for name, node in self.theirs.items() if node.op == "call_function"]
        started = self.clock()
        outputs = watch(self.teacher.graph, images, dict.fromkeys(operators, see))
        took, each = self.clock() - started, OPERATOR * len(operators)
        kept = max(1, (images.nbytes + segments.tensor_bytes({"": outputs})) // len(first))
        count = KEPT_BYTES // kept
        if seconds is not None:
            image = max(took - each, each / 2) / len(first)
            count = min(count, int((seconds / FORWARDS - each) / image))
        at_once = FIRST_BYTES * len(first) // (FACTOR * max(1, held))
        return max(LEAST_IMAGES, count), max(1, at_once)

    def first_order(self) -> tuple[float, dict[str, float]]:
        """The loss, and by key what each error adds to it: the gradient at the error's end times the error."""
        leaves = {name: v.detach().requires_grad_() for name, v in self.stored.items()}
        effects = dict.fromkeys((s.key for s in self.suspects), 0.0)
        activations = {n.name: s.key for s in self.suspects if s.tensor == "activation" for n in self.calls[s.key]}
        fixed = {n: self.again.constants.get(n.name) for n in self.again.still if n.name not in leaves}
        total = 0.0
        for part in self.parts:
            through = _Through(self.graph, leaves, activations, effects)
            with torch.enable_grad(), fast_products(self.graph):
                found = through.run(part.images, initial_env=dict(fixed))
                each = distance_of_outputs(list(found), part.expected, self.readings)
            if each.requires_grad:
                (each.sum() / self.count).backward()  # type: ignore[no-untyped-call]
            through.env.clear()  # its values' history holds the hooks, which hold it
            total += float(each.detach().sum())
        for suspect in self.suspects:
            for name, value in self.in_float(suspect).values.items():
                gradient = leaves[name].grad
                if gradient is not None:
                    effects[suspect.key] += float((gradient * (self.stored[name] - value)).sum())
        return total / self.count, effects

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
        there = bits_by_key(self.teacher.graph, scheme.model_copy(update={"rules": (*scheme.rules, Rule.parse(rule))}))
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
        if (key, bits) not in self.widened:
            quantizer = copy.deepcopy(self.model.quantizer(key))
            quantizer.grid = Grid.named(self.model.scheme.activation_grid, bits)
            sources = [n.args[0] for n in self.calls[key]]
            seen = Statistics(quantizer.name)
            callbacks: dict[str, Callback] = {n.name: updating(seen) for n in sources if isinstance(n, fx.Node)}
            for part in self.parts:
                watch(self.teacher.graph, part.images, callbacks)
            Calibrate().set_activation(quantizer, seen, self.model.scheme)
            self.widened[key, bits] = quantizer.calibration
        return self.widened[key, bits]

    # ----------------------------------------------------------------------------------------------------- measured

    def losses(self, changes: Sequence[Change], what: str) -> list[float]:
        """The mean loss with each of the changes; only what lies behind it runs again."""
        if not changes:
            return []
        parts = [self.again.behind(self._changed(c)) for c in changes]
        needed = frozenset[str]().union(*(part.reads for part in parts))
        sums, done = [0.0] * len(changes), 0
        self.run.progress(what, 0, self.count)
        for images in self.parts:
            known = self._known(images, needed)
            for position, (change, part) in enumerate(zip(changes, parts, strict=True)):
                grids = {self.model.quantizer(k): new for k, new in change.grids.items()}
                with as_if(grids):
                    ours = self.again.outputs(part, known, change.values)
                sums[position] += float(distance_of_outputs(ours, images.expected, self.readings).sum())
            done += len(images.images)
            self.run.progress(what, done, self.count)
        return [s / self.count for s in sums]

    def _changed(self, change: Change) -> set[str]:
        """Names of the nodes whose values it changes by itself."""
        return {*change.values, *(n.name for key in change.grids for n in self.calls[key])}

    def _known(self, images: _Images, needed: frozenset[str]) -> dict[str, Any]:
        """Values of the quantized network by node name, kept where there is room."""
        if not needed <= images.known.keys():
            found, _ = values_of(self.graph, images.images, needed - images.known.keys())
            whole = {**images.known, **found}
            room = KEPT_BYTES * len(images.images) // self.count
            if segments.tensor_bytes(whole) > room:
                return whole
            images.known = whole
        return images.known


@dataclass
class _Images:
    """Some of the images, the float network's outputs for them, and values of the quantized network by node name."""

    images: Tensor
    expected: list[Tensor]
    known: dict[str, Any] = field(default_factory=dict)


def _spread(count: int) -> list[int]:
    """All positions in an order of which every beginning is spread evenly over them.

    Example:
        >>> _spread(8)
        [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return sorted(range(count), key=lambda i: i * (math.sqrt(5) - 1) / 2 % 1)


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
        To mend 45 % of it: --rule 'head=w8' (predicted loss 0.11, 0.96 kB more)
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
    lines.append(f"{_mends(found, best)}: {_advice([best.rule], best)}")
    if together is not None:
        lines.append(f"{_mends(found, together)}: {_advice(together.rules, together)}")
    return lines


def _mends(found: Diagnosis, by: Remedy | Remedies) -> str:
    """How much of the loss goes away.

    Example:
        >>> _mends(Diagnosis(0.2, 48), Remedy("head=w8", 0.15, 960))
        'To mend 25 % of it'
    """
    if not found.loss:
        return "To mend it"
    share = 1 - by.loss_after / found.loss
    return "To mend most of it" if share > 0.5 else f"To mend {100 * share:.0f} % of it"


def _advice(rules: Sequence[str], found: Remedy | Remedies) -> str:
    flags = " ".join(f"--rule '{r}'" for r in rules)
    more = f"{found.bytes / 1000:.3g} kB more" if found.bytes else "no bytes more in the file"
    return f"{flags} (predicted loss {found.loss_after:.2g}, {more})"
