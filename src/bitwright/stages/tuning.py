"""The loop of a reconstruction: one step, its state, and what is measured before it starts."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bitwright import together
from bitwright.errors import NotFiniteError
from bitwright.graph.points import Point
from bitwright.memory import saved_bytes
from bitwright.quant.learned import Rounding, dampen, held_values, rectified_sigmoids, rounding_regularizers
from bitwright.recording import WARM, Recording, can_record, tidy
from bitwright.stages.learner import Learner
from bitwright.stages.losses import WeightedDistances
from bitwright.stages.optimizers import Rates, move_parts, optimizers_of
from bitwright.stages.schedules import Anneal, Dampen
from bitwright.stages.targets import Batch, Feed, autocast
from bitwright.transfer import sent

SHARED_PART = 8
"""Samples whose gradients one process computes together, where several share a batch; twice as many of small ones."""
SMALL_PASS = 256 << 20
"""Bytes of activations up to which a pass over half of the samples takes well more than half of the time."""
REPEATS = 3
"""Steps whose median is taken for the time of one."""
FEW = 2
"""Samples in a pass from which on more make it little faster, an eighth where a step has many small operators."""


class TuningSettings(Rates, Protocol):
    """What the loop reads of a :class:`bitwright.stages.reconstruct.Reconstruct`."""

    batch: int
    rounding: Rounding
    decide: Anneal | Dampen | None

    @property
    def drops(self) -> bool:
        """Whether a step draws random numbers."""

    def mix(self, progress: float) -> tuple[float, float]:
        """(mix, drop) of activations."""


class Knobs(NamedTuple):
    """What changes from step to step beside the batch: numbers, or scalar tensors where steps are recorded.

    Attributes:
        mix: share of float in activations.
        drop: share of their elements that stay float.
        strength: of the regularizer.
        beta: its exponent.
        share: of the way that codes go to their integers.
        rates: of each kind of variable.
    """

    mix: float | Tensor
    drop: float | Tensor
    strength: float | Tensor
    beta: float | Tensor
    share: float | Tensor
    rates: tuple[float | Tensor, ...]

    def changing(self) -> list[str]:
        """Those that are neither nothing nor everything; a recording of a step reads them, and is made for the rest."""
        found = [name for name in ("mix", "drop") if 0 < getattr(self, name) < 1]
        found += ["strength", "beta"] if self.strength else []
        return found + (["share"] if self.share else [])

    def way(self) -> tuple[object, ...]:
        """What the others are: a recording is good for this alone."""
        return tuple(value for name, value in self._asdict().items() if name not in {*self.changing(), "rates"})

    def replaced(self, numbers: Tensor) -> Knobs:
        """The same, with those that change, and the rates, from a vector [changing + rates]."""
        each, names = list(numbers.unbind()), self.changing()
        return self._replace(**dict(zip(names, each, strict=False)), rates=tuple(each[len(names) :]))


class NotFiniteLossError(NotFiniteError):
    """The loss became NaN or infinite."""

    def __init__(self, layer: str, step: int) -> None:
        super().__init__(f"The loss at {layer} was not finite in step {step}.")
        self.layer, self.step = layer, step


# --------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Objective:
    """Weights of the distances: for each sample and point, and the number that the whole is divided by.

    ``points``: L of them. ``weights`` [N, L]; ``normalise``: divide by the largest mean over the batch of any point
    (EPTQ v2). ``along``: the weight of a second term, the square of each image's sum over the differences that roots
    have weighted, which is a matrix of rank one for each image beside the diagonal one (FIMA-Q, arXiv:2506.11543).
    """

    points: list[Point]
    weights: Tensor
    over: Literal["sum", "mean"]
    normalise: bool
    along: float = 0.0

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """For the samples at these positions: weights [B, L] and the mean weight of each point [L], normalised."""
        weights = self.weights[sent(indices, self.weights.device)]
        mean = weights.mean(0)
        if self.normalise:
            largest = mean.max().clamp_min(1e-30)
            return weights / largest, mean / largest
        return weights, mean

    @functools.cached_property
    def _distances(self) -> WeightedDistances:
        return WeightedDistances(self.points, self.over)

    def distances(self, values: list[Tensor], batch: Batch, weights: Tensor) -> Tensor:
        """Between values at the points and a batch's targets, [L].

        Args:
            values: [B, ...] each.
            batch: what they should be.
            weights: [B, L].
        """
        if batch.roots is not None:
            values = [v * r for v, r in zip(values, batch.roots, strict=True)]
        found = self._distances(values, batch.targets, weights)
        if self.along and batch.roots is not None:
            triples = zip(self.points, values, batch.targets, strict=True)
            sums = torch.stack([point.per_sample((a - b).float(), len(weights)) for point, a, b in triples])
            found = found + self.along * (weights.T * sums.square()).mean(1)
        return found

    def with_rank_one(self, values: list[Tensor], batch: Batch, count: int) -> Objective:
        """The same, whose second term counts for these samples as much as the first; itself where it is nothing."""
        weights = self.weights[:count].to(values[0].device)
        first, both = (float(made.distances(values, batch, weights).sum()) for made in (self, replace(self, along=1.0)))
        return replace(self, along=first / (both - first)) if both > first else self


class Tuner:
    """Learner, optimizers and schedules."""

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        objective: Objective,
        settings: TuningSettings,
        steps: int,
        precision: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self.learner, self.feed = learner, feed
        self.objective = replace(objective, weights=objective.weights.to(device))
        self.settings, self.steps, self.precision, self.device, self.seed = settings, steps, precision, device, seed
        self.step = 0
        self.at_once = self.batch
        """Samples in one forward pass; the rest of a batch follows, and gradients add up."""
        self.network: Callable[..., tuple[list[Tensor], list[Tensor]]] = learner
        self.patient = device.type != "cpu"
        """Whether losses stay on the device until :meth:`look`, so that no step waits for it."""
        self.pending: list[Tensor] = []
        self.of_point = learner.of_point()
        self.rounded = sent(torch.tensor([i for i, w in enumerate(self.of_point) if w is not None]).long(), device)
        self.parts = optimizers_of(learner, settings)
        self.recording = Recording(device) if can_record(device) and not together.is_shared() else None

    @property
    def batch(self) -> int:
        """Samples a step; all of them where there are fewer than asked for."""
        return min(self.settings.batch, len(self.feed))

    def indices(self, step: int) -> Tensor:
        """Which samples a step takes, [B]: each once an epoch, in an order that depends on seed and epoch alone."""
        epoch, position = divmod(step, max(1, len(self.feed) // self.batch))
        order = torch.randperm(len(self.feed), generator=torch.Generator().manual_seed(self.seed * 7919 + epoch))
        return order[position * self.batch : (position + 1) * self.batch]

    def advance(self) -> float | None:
        """One step; the loss without regularizer, None where it was not looked at yet.

        Raises:
            NotFiniteLossError: the loss is not; nothing was changed.
        """
        loss = self.take(self.step / self.steps)
        self.step += 1
        return loss

    def take(self, progress: float) -> float | None:
        """The same at a point of the run, from 0 to 1, without counting it."""
        if self.settings.drops:
            torch.manual_seed(self.seed * 1_000_003 + self.step)
        indices, knobs = self.indices(self.step), self.knobs(progress)
        if self.recording is None or self.at_once < len(indices):
            return self._take(indices, knobs)
        numbers = [*(getattr(knobs, name) for name in knobs.changing()), *knobs.rates]
        vector = sent(torch.tensor(numbers, dtype=torch.float32), self.device)
        if not self.recording.is_warm((*knobs.changing(), *knobs.way())):
            with self.recording.warming():
                return self._take(indices, knobs.replaced(vector))
        if self.recording.graph is None:
            tidy()
        batch, (weights, mean) = self.feed(indices), self.objective.batch(indices)
        roots, ends = batch.roots or [], (len(batch.inputs), len(batch.inputs) + len(batch.targets))

        def step(given: list[Tensor]) -> Tensor:
            *tensors, w, m, n = given
            same = Batch(tensors[: ends[0]], tensors[ends[0] : ends[1]], tensors[ends[1] :] or None)
            return self._record(same, w, m, knobs.replaced(n))

        terms = self.recording.play([*batch.inputs, *batch.targets, *roots, weights, mean, vector], step)
        if terms is None:
            self.recording = None
            return self._take(indices, knobs)
        self.pending.append(terms)
        return None

    def knobs(self, progress: float) -> Knobs:
        """At a point of the run, from 0 to 1."""
        decide, codes = self.settings.decide, self.settings.codes
        for part in self.parts:
            part.set_rate(progress)
        strength = beta = share = 0.0
        if isinstance(decide, Anneal) and self.settings.rounding == "soft":
            strength, beta = decide.strength(progress), decide.beta(progress)
        elif isinstance(decide, Dampen) and codes is not None:
            share = decide.share(progress, self.steps, codes.rate_at(progress))
        return Knobs(*self.settings.mix(progress), strength, beta, share, tuple(part.rate for part in self.parts))

    def _take(self, indices: Tensor, knobs: Knobs) -> float | None:
        """One step, operator by operator."""
        self._forget_gradients()
        loss = self._backward(indices, knobs)
        self._move(knobs)
        return loss

    def _record(self, batch: Batch, weights: Tensor, mean: Tensor, knobs: Knobs) -> Tensor:
        """The whole of a step whose batch passes at once; its terms, [L]."""
        self._forget_gradients()
        self.learner.set_mix(knobs.mix, knobs.drop)
        terms = self._terms(batch, weights)
        torch.autograd.backward(terms.sum() + self._regularizer(mean, knobs))
        self._move(knobs)
        return terms.detach()

    def _forget_gradients(self) -> None:
        for part in self.parts:
            part.optimizer.zero_grad(set_to_none=True)

    def _move(self, knobs: Knobs) -> None:
        """Moves all variables, from the gradients there are."""
        move_parts(self.parts, knobs.rates)
        if isinstance(knobs.share, Tensor) or knobs.share:
            dampen(list(self.learner.weights.values()), knobs.share)

    def backward(self, indices: Tensor, progress: float) -> float | None:
        """Gradients of the loss on a batch; the loss without regularizer, None where it was not looked at yet."""
        return self._backward(indices, self.knobs(progress))

    def _backward(self, indices: Tensor, knobs: Knobs) -> float | None:
        """The same. Where memory does not suffice, parts of half the size are tried from then on."""
        weights, mean = self.objective.batch(indices)
        self.learner.set_mix(knobs.mix, knobs.drop)
        if together.is_shared():
            return self._backward_together(indices, weights, mean, knobs)
        while True:
            try:
                return self._backward_alone(indices, weights, mean, knobs)
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
            self.at_once = math.ceil(self.at_once / 2)  # behind the clause, which holds the tensors of what failed
            self._forget_gradients()
            torch.cuda.empty_cache()
            if self.settings.drops:
                torch.manual_seed(self.seed * 1_000_003 + self.step)

    def _backward_alone(self, indices: Tensor, weights: Tensor, mean: Tensor, knobs: Knobs) -> float | None:
        """The same, in as few parts as memory allows."""
        regularizer, loss, terms = self._regularizer(mean, knobs), 0.0, list[Tensor]()
        with self._held_weights(len(indices)):
            for start in range(0, len(indices), self.at_once):
                part = slice(start, start + self.at_once)
                share = len(indices[part]) / len(indices)
                each = self._terms(self.feed(indices[part]), weights[part], share)
                distance = each.sum()
                if self.patient:
                    terms.append(each.detach() * share)
                else:
                    self._check(each.detach(), self.step)
                    loss += float(distance.detach() * share)
                torch.autograd.backward(distance * share + (regularizer if start == 0 else 0.0))
        if not self.patient:
            return loss
        self.pending.append(torch.stack(terms).sum(0))
        return None

    def _held_weights(self, samples: int) -> contextlib.AbstractContextManager[None]:
        """Weights are the same for all parts of a batch."""
        compiled = self.network is not self.learner
        return contextlib.nullcontext() if compiled or samples <= self.at_once else held_values(self.learner.modules())

    def look(self) -> list[float]:
        """The losses of the steps since it was called last: one wait for the device.

        Raises:
            NotFiniteLossError: of the first step whose loss is not.
        """
        pending, self.pending = self.pending, []
        rows = torch.stack(pending).cpu() if pending else torch.empty(0, 0)
        for position, terms in enumerate(rows):
            self._check(terms, self.step - len(pending) + position)
        return [float(terms.sum()) for terms in rows]

    def _backward_together(self, indices: Tensor, weights: Tensor, mean: Tensor, knobs: Knobs) -> float | None:
        """The same in parts of a fixed size, whose gradients are added along one tree, whoever computes them."""
        learned = [p for part in self.parts for p in part.parameters]
        starts = range(0, len(indices), self.at_once)

        def terms_of(position: int) -> Tensor:
            if self.settings.drops:
                torch.manual_seed((self.seed * 1_000_003 + self.step) * len(starts) + position)
            part = slice(starts[position], starts[position] + self.at_once)
            share = len(indices[part]) / len(indices)
            terms = self._terms(self.feed(indices[part]), weights[part], share) * share
            torch.autograd.backward(terms.sum() + (0.0 if position else self._regularizer(mean, knobs)))
            return terms

        terms = together.tree_gradients(learned, len(starts), terms_of, len(self.learner.points))
        if not self.patient:
            self._check(terms, self.step)
            return float(terms.sum())
        self.pending.append(terms)
        return None

    def _terms(self, batch: Batch, weights: Tensor, share: float = 1.0) -> Tensor:
        """Weighted distances at the points, [L], of this share of a step's samples."""
        self.learner.set_share(share)
        with autocast(self.device, self.precision):
            _, student = self.network(*batch.inputs)
        return self.objective.distances(student, batch, weights)

    def _check(self, terms: Tensor, step: int) -> None:
        """Raises where the terms of a step's loss, [L], do not have a finite sum.

        Raises:
            NotFiniteLossError: names its layer.
        """
        if not math.isfinite(float(terms.sum())):
            worst = int(torch.where(torch.isfinite(terms), terms / terms.numel(), torch.inf).argmax())
            raise NotFiniteLossError(self.learner.points[worst].layer, step)

    def fit_memory(self, budget: int) -> None:
        """Splits batches that would take more than ``budget`` bytes at the start of the backward pass into even parts.

        Parts of less than :data:`FEW` samples are slow: for those there may be three times as many bytes.
        The size of the parts follows from the network and the precision alone: two runs take the same.
        """
        with contextlib.nullcontext() if self.recording is None else self.recording.beside():
            few, more = (self._held(n) for n in (1, 2)) if self.batch > 1 else (0, 1)
        each = max(1, more - few)
        fitting = max(1, min(self.batch, max(budget // each, min(FEW, 3 * budget // each))))
        self.at_once = math.ceil(self.batch / math.ceil(self.batch / fitting))
        if together.is_shared():
            part = 2 * SHARED_PART if 2 * SHARED_PART * each <= SMALL_PASS else SHARED_PART
            self.at_once = min(self.at_once, part)

    def _held(self, count: int) -> int:
        """Bytes of activations, and at each point of a target and of a difference, or a gradient, from it."""
        batch = self.feed(torch.arange(count))
        with autocast(self.device, self.precision):
            return saved_bytes(lambda: self.learner(*batch.inputs)) + 2 * sum(t.nbytes for t in batch.targets)

    def _regularizer(self, mean: Tensor, knobs: Knobs) -> Tensor | float:
        if not isinstance(knobs.strength, Tensor) and not knobs.strength:
            return 0.0
        weights = [w for w in self.of_point if w is not None]
        if not weights:
            return 0.0
        found = rounding_regularizers(rectified_sigmoids([w.codes for w in weights]), knobs.beta)
        return knobs.strength * (found * mean[self.rounded] if self.objective.normalise else found).sum()

    def check_finite(self) -> None:
        """Looks at all variables.

        Raises:
            NotFiniteLossError: one is not finite; its layer is named.
        """
        broken = self.learner.not_finite()
        if broken is not None:
            raise NotFiniteLossError(broken, self.step)

    def finish(self) -> None:
        """Puts every activation on its grid."""
        self.learner.set_mix(0.0)

    def compile(self) -> None:
        """Runs the student through ``torch.compile``."""
        self.network = torch.compile(self.learner, dynamic=False)

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        found = {f"variables/{n}": p.detach() for n, p in self.learner.named_parameters()}
        for i, part in enumerate(self.parts):
            found |= {f"optimizer/{i}/{name}": tensor for name, tensor in part.state().items()}
        return found

    def state_copy(self) -> dict[str, Tensor]:
        """The same in tensors of its own."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Goes on from a state."""
        with torch.no_grad():
            for name, p in self.learner.named_parameters():
                p.copy_(state[f"variables/{name}"])
        for i, part in enumerate(self.parts):
            prefix = f"optimizer/{i}/"
            part.load({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        if self.recording is not None:
            self.recording.forget()
        self.step = step


# ----------------------------------------------------------------------------------------- measurements


def seconds_per_step(tuner: Tuner) -> float:
    """Of a step, the median of a few after what warms it up; nothing is changed.

    On a CPU it is that of the forward and the backward pass, beside which the rest is little.
    """
    if tuner.recording is not None:
        return _recorded_seconds(tuner)
    times, patient = [], tuner.patient
    tuner.patient = True  # a loss that is no number takes as long as another, and is told where steps are taken
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        tuner.backward(tuner.indices(0), 0.5)
        if tuner.device.type == "cuda":
            torch.cuda.synchronize(tuner.device)
        times.append(time.perf_counter() - start)
    tuner.pending.clear()
    tuner.patient = patient
    tuner._forget_gradients()
    return statistics.median(times[1:])


def _recorded_seconds(tuner: Tuner) -> float:
    before, times = tuner.state_copy(), []
    for _ in range(WARM + 1 + REPEATS):
        start = time.perf_counter()
        tuner.take(0.5)
        torch.cuda.synchronize(tuner.device)
        times.append(time.perf_counter() - start)
    tuner.pending.clear()
    tuner.load(before, tuner.step)
    return statistics.median(times[-REPEATS:])
