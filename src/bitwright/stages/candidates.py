"""Scales of a network as one vector, and the fitness of the network with other scales."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright import together
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph import rewrite, segments
from bitwright.graph.capture import Captured
from bitwright.graph.segments import Region
from bitwright.graph.student import Student
from bitwright.quant.quantizer import TINY, BiasQuantizer, Quantizer
from bitwright.stages import losses
from bitwright.stages.base import Run
from bitwright.stages.calibrate import BIAS_REACH
from bitwright.stages.population import losing

Meaning = Literal["round", "keep"]
FitnessMeasure = Literal["infonce", "mse", "cosine", "kl"]

FEWEST_BATCHES = 5
"""With fewer, one batch is too large a part for a first look."""


class Scales:
    """The scales of some weights as one vector, [D].

    Args:
        student: whose scales they are.
        keys: paths of the weights' quantizers.
        meaning: what a new scale of a weight does: ``round`` rounds the stored weight to the new grid, ``keep`` keeps
            the integers, so that the weight's values move with the scale.
    """

    def __init__(self, student: Student, keys: Sequence[str], meaning: Meaning) -> None:
        self.student, self.keys = student, tuple(keys)
        self.quantizers = [student.quantizer(key) for key in keys]
        self.sizes = [q.scale.numel() for q in self.quantizers]
        self._kept = _integers(student, keys) if meaning == "keep" else []
        self._first = self.get()
        self._stored = [rewrite.get_tensor(student.graph, stored) for stored, *_ in self._kept]

    def __len__(self) -> int:
        return sum(self.sizes)

    def get(self) -> Tensor:
        """As they are now, [D]."""
        return torch.cat([q.scale for q in self.quantizers])

    def set(self, scales: Tensor) -> None:
        """Puts new ones in their place, [D], positive."""
        for quantizer, part in zip(self.quantizers, torch.split(scales, self.sizes), strict=True):
            quantizer.scale = part.clone()
        for stored, codes, quantizer in self._kept:
            value = quantizer.values(codes)
            old = rewrite.get_tensor(self.student.graph, stored)
            rewrite.set_tensor(self.student.graph, stored, value.contiguous(memory_format=_format(old)))

    def restore(self) -> None:
        """Puts everything back as it was at first, bit for bit."""
        self.set(self._first)
        for (stored, *_), tensor in zip(self._kept, self._stored, strict=True):
            rewrite.set_tensor(self.student.graph, stored, tensor)

    def least(self) -> Tensor:
        """The smallest each may be, [D]: with less the layer's bias would leave its accumulator."""
        floors = [torch.full_like(q.scale, TINY) for q in self.quantizers]
        for node in self.student.graph.graph.nodes:
            module = self.student.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, BiasQuantizer) or not module.calibrated:
                continue
            bias = rewrite.get_tensor(self.student.graph, str(node.args[0].target)).abs()
            needed = bias * 2.0**module.weight.shift / (BIAS_REACH * module.source.scale)
            for i, quantizer in enumerate(self.quantizers):
                if quantizer is module.weight:
                    floors[i] = torch.maximum(floors[i], needed if quantizer.scale.numel() > 1 else needed.max())
        return torch.minimum(torch.cat(floors), self.get())


def _integers(student: Student, keys: Sequence[str]) -> list[tuple[str, Tensor, Quantizer]]:
    """(path of the stored tensor, its codes, its quantizer) of every weight among the keys."""
    found = []
    for node in student.graph.graph.nodes:
        if node.op == "call_module" and node.target in keys and node.args[0].op == "get_attr":
            quantizer, stored = student.quantizer(str(node.target)), str(node.args[0].target)
            found.append((stored, quantizer.codes(rewrite.get_tensor(student.graph, stored)), quantizer))
    return found


def _format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Fitness:
    """The distance of a network's outputs to the float network's, image by image; lower is better.

    Attributes:
        measure: of the distance.
        temperature: of ``infonce``.
        places: of the outputs that count; all if None.
    """

    measure: FitnessMeasure = "infonce"
    temperature: float = 3.0
    places: tuple[int, ...] | None = None

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[N], the mean over outputs [N, ...].

        Raises:
            UsageError: an output does not hold one row per image, or the measure does not suit it.
        """
        if self.places is not None:
            student, teacher = ([outputs[k] for k in self.places] for outputs in (student, teacher))
        for output in student:
            if output.dim() == 0 or len(output) != len(student[0]):
                raise UsageError(
                    f"Expected outputs of one row per image, found {list(output.shape)}. Name the one with output=."
                )
        return torch.stack([self._single(s, t) for s, t in zip(student, teacher, strict=True)]).mean(0)

    def _single(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.measure == "infonce":
            return losses.info_nce(student, teacher, self.temperature)
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "mse": losses.relative_error,
            "cosine": losses.cosine_distance,
            "kl": losses.kl_divergence,
        }
        return functions[self.measure](student, teacher)


class Batches:
    """Images in batches of nearly equal size, with the float network's outputs: computed once."""

    def __init__(self, teacher: Captured, images: Images, size: int, run: Run, what: str) -> None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))
        self.images, self.device = images, run.device
        self.parts = list(order.tensor_split(max(1, -(-len(images) // size))))
        self.count = len(images)
        self.targets: list[list[Tensor]] = []
        """Of the batches of this process; nothing for others."""
        with torch.no_grad():
            for i, part in enumerate(self.parts):
                run.progress(what, i, len(self.parts))
                self.targets.append(list(teacher.graph(self.load(part))) if together.is_mine(i) else [])
        run.progress(what, len(self.parts), len(self.parts))

    def load(self, part: Tensor) -> Tensor:
        """[B, C, H, W] on the device."""
        return self.images.batch(part, self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for part, targets in zip(self.parts, self.targets, strict=True):
            yield self.load(part), targets

    def losses(self, network: Callable[[Tensor], Sequence[Tensor]], fitness: Fitness) -> Tensor:
        """The fitness of every image, [N] in the order of the batches."""
        with torch.no_grad():
            return torch.cat(self.each(lambda i: fitness(network(self.load(self.parts[i])), self.targets[i])))

    def each(self, of: Callable[[int], Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        """``of(place)`` for some of the batches, or all, each computed by the process that it belongs to."""
        places = range(len(self.parts)) if places is None else places
        if not together.is_shared():
            return [of(i) for i in places]
        mine = {n: of(i).cpu() for n, i in enumerate(places) if together.is_mine(i)}
        return [found.to(self.device) for found in together.collected(mine, len(places))]


class Evaluator:
    """The fitness of a network whose scales change in one region after another.

    What lies before a region is computed once and kept while ``memory`` bytes allow; batches beyond that compute it
    anew. Regions that are visited from the network's end to its start are filled from one pass together.

    Args:
        student: the network.
        regions: in the order of visits.
        batches: images and targets.
        fitness: of outputs.
        memory: in bytes.

    Attributes:
        precision: of what lies behind the region's first layer; float32 at first.
    """

    def __init__(
        self,
        student: Student,
        regions: Sequence[Region],
        batches: Batches,
        fitness: Fitness,
        memory: int,
    ) -> None:
        self.student, self.regions, self.batches, self.fitness = student, regions, batches, fitness
        self.memory, self.precision = memory, torch.float32
        self.kept: dict[int, dict[str, Any]] = {}
        self.group = range(0)
        self.at = -1
        self.before = student.graph
        self.fixed: list[Any] = []

    def visit(self, position: int) -> None:
        """Goes to a region; the network before it is as it was when the visit's group was filled."""
        if position not in self.group:
            self._fill(position)
        self.at = position
        region = self.regions[position]
        self.fixed = segments.values(self.student.graph, region.fixed)

    def forget(self) -> None:
        """Drops what is kept, since the network has changed elsewhere."""
        self.group, self.kept, self.fixed = range(0), {}, []

    def losses(self, batches: int | None = None) -> Tensor:
        """Loss of the network as it is now for every image, [N]; only for the first ``batches`` if that is given."""
        found = self.race(None, 0.0, batches)
        assert found is not None
        return found

    def race(
        self, rival: Tensor | None, error: float, batches: int | None = None, look: float = 0.0, first: int = 0
    ) -> Tensor | None:
        """The losses [N] of the network as it is now; None once it is seen to lose against the rival's [N].

        Args:
            rival: None does not race.
            error: probability of leaving a race that would have been won.
            batches: how many are run; all if not given.
            look: share of the images after which it must be better than the rival; not asked if 0, or in a race of
                fewer than :data:`FEWEST_BATCHES`.
            first: batch of that look, counted around. Who always won on the same images would come to know them.
        """
        region, parts = self.regions[self.at], self.batches.parts
        moved = segments.values(self.student.graph, region.moved)
        found: dict[int, Tensor] = {}
        asked = math.ceil(look * len(parts)) if len(parts) >= FEWEST_BATCHES and rival is not None else 0
        count = len(range(len(parts))[:batches])
        order = [((first if asked else 0) + n) % count for n in range(count)]

        def loss(i: int) -> Tensor:
            before = self._values(i)
            with self._autocast():
                outputs = region.body(*(before[n] for n in region.frontier), *self.fixed, *moved)
            return self.fitness(outputs, self.batches.targets[i])

        with torch.no_grad():
            for start in range(0, count, together.processes()):  # a batch in every process
                places = order[start : start + together.processes()]
                for place, each in zip(places, self.batches.each(loss, places), strict=True):
                    found[place] = each
                    if rival is not None and error and self._loses(found, rival, error, asked):
                        return None
        return torch.cat([found[i] for i in range(count)])

    def _loses(self, found: dict[int, Tensor], rival: Tensor, error: float, asked: int) -> bool:
        """Whether the batches so far are enough to leave: at a first look of ``asked``, or beyond doubt."""
        parts = self.batches.parts
        theirs = torch.split(rival, [len(part) for part in parts])
        differences = torch.cat([each - theirs[i] for i, each in found.items()])
        if len(found) == asked and float(differences.mean()) >= 0:
            return True
        return losing(differences, len(rival), error / max(1, len(parts) - 1))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.batches.device.type, self.precision)

    def _values(self, batch: int) -> dict[str, Any]:
        """What the region reads of a batch."""
        if batch in self.kept:
            return self.kept[batch]
        frontier = self.regions[self.at].frontier
        assert len(self.group) == 1, "only a group of one region is kept in part"
        return dict(zip(frontier, self.before(self.batches.load(self.batches.parts[batch])), strict=True))

    def _fill(self, position: int) -> None:
        """Keeps what the region at the position reads, and those after it as far as they fit and stay valid."""
        self.forget()
        end = self._valid_until(position)
        names = self._names(range(position, end))
        first = self._first(names)
        while end > position + 1 and self._bytes(first, range(position, end)) > self.memory:
            end -= 1
        self.group = range(position, end)
        names = self._names(self.group)
        self.before = segments.truncate(self.student.graph, names)
        each = max(1, self._bytes(first, self.group))
        fits = min(len(self.batches.parts), self.memory // max(1, each // len(self.batches.parts)))
        with torch.no_grad():
            for i in [i for i in range(len(self.batches.parts)) if together.is_mine(i)][:fits]:
                values = self.before(self.batches.load(self.batches.parts[i]))
                self.kept[i] = dict(zip(names, values, strict=True))

    def _valid_until(self, position: int) -> int:
        """The first region whose frontier a visit from the position on changes."""
        changed: set[str] = set()
        for end in range(position, len(self.regions)):
            if changed & set(self.regions[end].frontier):
                return end
            changed |= self.regions[end].reached
        return len(self.regions)

    def _names(self, group: range) -> list[str]:
        return list(dict.fromkeys(n for i in group for n in self.regions[i].frontier))

    def _first(self, names: Sequence[str]) -> dict[str, Any]:
        """The values of a single image."""
        image = self.batches.load(self.batches.parts[0][:1])
        with torch.no_grad():
            return dict(zip(names, segments.truncate(self.student.graph, names)(image), strict=True))

    def _bytes(self, first: dict[str, Any], group: range) -> int:
        """Of all images, from the values of one."""
        names = self._names(group)
        return segments.tensor_bytes({n: first[n] for n in names}) * self.batches.count
