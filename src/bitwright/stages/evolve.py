"""Searches scales by evolution, block by block, where the loss is too jagged for gradients.

Evol-Q (arXiv:2308.10814). A visit of a block mutates the scales of its layers a few times; what lies before the block
is computed once, and a child that is seen to lose on part of the images leaves the race. The story of a run is
:meth:`Evolve.run`; the search itself is in `population`, scales and their fitness in `candidates`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from bitwright import together
from bitwright.errors import NotFiniteError, UsageError
from bitwright.given.images import Images
from bitwright.graph.axes import read_outputs
from bitwright.graph.blocks import Block, BlockKind, find_blocks
from bitwright.graph.capture import Captured
from bitwright.graph.segments import region
from bitwright.graph.student import Student
from bitwright.run import checkpoint
from bitwright.run.record import StageRecord
from bitwright.stages.base import Optimising, Run
from bitwright.stages.candidates import Batches, Evaluator, Fitness, FitnessMeasure, Meaning, Scales
from bitwright.stages.population import CYCLES, POPULATION, TOURNAMENT, Member, Mutation, Population

MEMORY = 2 << 30
"""Bytes for what lies before a block."""
CHECKPOINT = "evolve.safetensors"
CHECKPOINT_SECONDS = 2.0
CHECKPOINT_SHARE = 0.01
"""Largest share of the time that checkpoints may take."""
WORTH_IT = 1.3
"""How much faster bfloat16 must be to be taken."""
SHORT = 1.0
"""Seconds of that measurement in float32 below which nothing else is tried: two runs of one seed then do the same."""
NOTHING = "There is nothing to evolve: no block has a quantized scale of the kind asked for."
RANKED, RANKED_BATCHES = 6, 2
"""Children, and batches of images, by which bfloat16 must rank as float32 does."""


class FitnessRecord(BaseModel):
    """The mean fitness over images, lower is better."""

    measure: FitnessMeasure
    before: float
    after: float
    teacher: float
    """Fitness of the float network's own outputs."""
    held_out: list[float]
    """Fitness on images that are kept out of the search, at the start and after every pass."""


class EvolveRecord(StageRecord):
    """What a search did."""

    kind: str = "evolve"
    steps: int
    """Children."""
    passes: float
    fitness: FitnessRecord
    images: int
    precision: str
    left_early: int
    """Children that were seen to lose on a part of the images."""
    better: int
    scales: int
    moved: float
    """Share of scales."""
    mean_change: float
    blocks: list[str]
    """The blocks in the order of visits."""
    seconds_per_child: float
    curve: list[tuple[int, float]]
    """(children, fitness)."""


class Evolve(Optimising):
    """Evolution of quantization scales.

    ``blocks`` are kinds that ``bitwright inspect --blocks`` shows; ``auto`` takes attention where there is any and all
    blocks elsewhere. A budget of steps counts children, and passes go on until it is used up.
    """

    kind: ClassVar[str] = "evolve"
    record: ClassVar[type[StageRecord]] = EvolveRecord

    blocks: tuple[BlockKind, ...] | Literal["auto", "all"] = "auto"
    meaning: Meaning = "round"
    """What a new scale of a weight does: ``round`` its stored weights anew, or ``keep`` their integers."""
    passes: int = Field(default=10, ge=0)
    mutation: Mutation = Mutation()
    search: Literal["evolution", "random"] = "evolution"
    """``random`` draws every child around the scales that the stage began with."""

    fitness: FitnessMeasure = "infonce"
    images: int = Field(default=1000, ge=1)
    """The most that a fitness is measured on."""
    batch: int = Field(default=100, ge=1)
    """Images of which one is told from the others."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that are kept out of the search; the pass that is best on them is the result."""
    race: float = Field(default=1e-3, ge=0, lt=1)
    """Probability that a child which would have been taken leaves early; 0 measures every child on all images."""
    look: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images, others for each child, after which one leaves that is not better than the member it has to
    beat; 0 leaves the look out, as do ``race`` 0 and a search with fewer than five batches. 0.1 saves a third of the
    time, and finds less in as many children (docs/methods/evolq.md has the figures)."""
    share: float = Field(default=0.3, gt=0)

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """Passes over the blocks until the budget is used up; the result is never worse on what it is selected by."""
        for _ in self.visits(student, teacher, images, run):
            pass
        return student

    def visits(self, student: Student, teacher: Captured, images: Images, run: Run) -> Iterator[int]:
        """:meth:`run` block by block: the children so far after each visit, with the student as it is then.

        Raises:
            UsageError: there is no block whose scales can be searched.
        """
        some = images.sample(min(self.images, len(images)), seed=run.seed)
        hidden, seen = _split(some, self.held_out)
        searched = self.searched(student, teacher)
        if not searched:
            raise UsageError(NOTHING)
        batches = Batches(teacher, seen, self.batch, run, "Teacher's outputs")
        judge = Batches(teacher, hidden, self.batch, run, "Teacher's outputs") if len(hidden) else None
        regions = [region(student.graph, s.scales.keys) for s in searched]
        evaluator = Evaluator(student, regions, batches, _fitness(self.fitness, teacher, batches), MEMORY)
        search = _Search(self, student, searched, evaluator, judge, run)
        search.start()
        yield from search.go()
        run.records.append(search.finish())

    def check(self, student: Student, teacher: Captured, images: Images) -> None:
        """Scales are free to move, blocks exist, and infoNCE has images to tell from each other.

        Raises:
            UsageError: one of these does not hold.
        """
        if student.scheme.target.power_of_two_scales:
            raise UsageError(
                f"Evolution moves scales a little, which the runtime {student.scheme.runtime} has as powers of two "
                "only. Take a recipe without it, such as recipe='eptq'."
            )
        chosen = self._chosen(find_blocks(teacher.graph))
        if not any(_paths(student, block) for block in chosen):
            raise UsageError(NOTHING)
        hidden, seen = _split(images.sample(min(self.images, len(images)), seed=0), self.held_out)
        for part in (p for p in (seen, hidden) if self.fitness == "infonce" and len(p)):
            if len(part) // max(1, -(-len(part) // self.batch)) < 2:
                raise UsageError(
                    f"Expected at least two images in a batch of infoNCE, found {len(part)} image(s) in batches of "
                    f"{self.batch}: infoNCE tells an image from the others. Give more images, or take fitness mse."
                )

    def searched(self, student: Student, teacher: Captured) -> list[Searched]:
        """The blocks in the order of visits, from the network's end to its start, with the scales that each changes."""
        found, taken = [], set()
        for block in self._chosen(find_blocks(teacher.graph)):
            keys = [k for k in scale_keys(student, block) if k not in taken]
            taken.update(keys)
            if keys:
                found.append(Searched(block, Scales(student, keys, self.meaning)))
        return found[::-1]

    def _chosen(self, blocks: list[Block]) -> list[Block]:
        if self.blocks == "all":
            return blocks
        kinds = ("attention",) if self.blocks == "auto" else self.blocks
        chosen = [b for b in blocks if b.kind in kinds]
        if chosen or self.blocks == "auto":
            return chosen or blocks
        there = ", ".join(sorted({f"{b.kind} ({b.name})" for b in blocks})[:6]) or "none"
        raise UsageError(f"The network has no block of kind {' or '.join(kinds)}. Its blocks: {there}.")


@dataclass
class Searched:
    """A block and the scales that a visit changes."""

    block: Block
    scales: Scales


@dataclass
class _Search:
    """The state of a run."""

    stage: Evolve
    student: Student
    searched: list[Searched]
    evaluator: Evaluator
    judge: Batches | None
    """Images that are kept out of the search."""
    run: Run
    visits: int = 0
    children: int = 0
    dropped: int = 0
    better: int = 0
    seconds: float = 0.0
    """Spent by the run that this one goes on from."""
    began: float = field(default_factory=time.perf_counter)
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    starts: list[Tensor] = field(default_factory=list)
    teacher_fitness: float = 0.0
    """Fitness of the float network's own outputs."""
    best: list[Tensor] = field(default_factory=list)
    """Scales after the pass that is best on held-out images."""
    hidden: list[float] = field(default_factory=list)
    """Fitness on held-out images at the start and after every pass."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    precision: str = "float32"
    saved: float = field(default_factory=time.perf_counter)
    cost: float = 0.0
    """Seconds of the last checkpoint."""

    def start(self) -> None:
        """Measures the network as it comes, or goes on where an unfinished run was."""
        self.starts = [s.scales.get() for s in self.searched]
        self.best = list(self.starts)
        evaluator = self.evaluator
        batches = evaluator.batches
        own = batches.each(lambda i: evaluator.fitness(batches.targets[i], batches.targets[i]))
        self.teacher_fitness = _mean(torch.cat(own))
        if not self._load():
            self.first = self.losses = self._measure(evaluator.batches)
            if not bool(torch.isfinite(self.losses).all()):
                raise NotFiniteError(
                    "The network's fitness is not finite before the search has begun. Give it more bits, or take "
                    "another recipe=."
                )
            self.curve = [(0, _mean(self.losses))]
            self._judge()
            self.precision = self._choose_precision()
            self._save()
        self.evaluator.precision = getattr(torch, self.precision)

    def _choose_precision(self) -> str:
        """What was asked for; else bfloat16 where it is faster and ranks some children as float32 does."""
        if self.run.precision != "auto" or self._over():
            return "float32" if self.run.precision == "auto" else self.run.precision
        middle = len(self.searched) // 2
        scales, start = self.searched[middle].scales, self.starts[middle]
        generator, evaluator = torch.Generator().manual_seed(self.run.seed), self.evaluator
        children = [self.stage.mutation.child(start, scales.least(), generator) for _ in range(RANKED)]
        self.run.progress("Measuring precisions", 0, 0)
        evaluator.visit(middle)
        ranks, seconds = {}, {}
        for precision in ("float32", "bfloat16"):
            evaluator.precision = getattr(torch, precision)
            evaluator.losses(1)
            began, found = time.perf_counter(), []
            for child in children:
                scales.set(child)
                found.append(_mean(evaluator.losses(RANKED_BATCHES)))
            took = time.perf_counter() - began
            seconds[precision] = together.from_first(lambda: took)  # noqa: B023 - at once
            ranks[precision] = sorted(range(RANKED), key=found.__getitem__)
            if seconds["float32"] < SHORT:
                break
        scales.restore()
        evaluator.forget()
        faster = seconds.get("bfloat16", math.inf) * WORTH_IT < seconds["float32"]
        return "bfloat16" if faster and ranks["bfloat16"] == ranks["float32"] else "float32"

    def go(self) -> Iterator[int]:
        """Visits blocks until the budget is used up; gives the children so far."""
        while not self._over():
            position = self.visits % len(self.searched)
            if position == 0:
                self.evaluator.forget()
            self._visit(position)
            self.visits += 1
            self.curve.append((self.children, _mean(self.losses)))
            if position + 1 == len(self.searched) or self._over():
                self._judge()
            self._save_if_due()
            yield self.children

    def finish(self) -> EvolveRecord:
        """Takes the best pass; what was found."""
        self._save()
        self.evaluator.forget()
        end, before = _mean(self.losses), _mean(self.first)
        if self.judge is not None and self.visits:
            self._take(self.best)
        if self.judge is not None or self.precision != "float32":
            end = _mean(self._measure(self.evaluator.batches))
        if self.judge is None and end > before:  # by less than bfloat16 can tell
            for searched in self.searched:
                searched.scales.restore()
            end = before
        seconds = self.seconds + time.perf_counter() - self.began
        moved = torch.cat([s.scales.get() for s in self.searched]) / torch.cat(self.starts)
        fitness = FitnessRecord(
            measure=self.stage.fitness,
            before=before,
            after=end,
            teacher=self.teacher_fitness,
            held_out=self.hidden,
        )
        return EvolveRecord(
            before=before,
            after=end,
            steps=self.children,
            passes=self.visits / len(self.searched),
            fitness=fitness,
            images=len(self.losses),
            precision=self.precision,
            left_early=self.dropped,
            better=self.better,
            scales=len(moved),
            moved=float((moved != 1).double().mean()),
            mean_change=float((moved - 1).abs().mean()),
            blocks=[s.block.name for s in self.searched],
            seconds_per_child=round(seconds / max(1, self.children), 5),
            curve=self.curve,
        )

    def _take(self, scales: list[Tensor]) -> None:
        for searched, found in zip(self.searched, scales, strict=True):
            searched.scales.set(found)

    def _visit(self, position: int) -> None:
        stage, searched, evaluator = self.stage, self.searched[position], self.evaluator
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + self.visits)
        evaluator.visit(position)
        if evaluator.precision != torch.float32:
            self.losses = evaluator.losses()
        scales, least = searched.scales.get(), searched.scales.least()
        population = Population(Member(_mean(self.losses), 0, scales, self.losses), POPULATION)
        for cycle in range(CYCLES):
            if self._over():
                break
            parent = population.parent(TOURNAMENT, generator)
            origin = parent.scales if stage.search == "evolution" else self.starts[position]
            child = stage.mutation.child(origin, least, generator)
            searched.scales.set(child)
            found = evaluator.race(population.worst.losses, stage.race, None, stage.look, self.children)
            self.children += 1
            if found is None:
                self.dropped += 1
            elif bool(torch.isfinite(found).all()):
                self.better += population.insert(Member(_mean(found), cycle + 1, child, found))
            self._progress(population.best.fitness)
        searched.scales.set(population.best.scales)
        self.losses = population.best.losses

    def _judge(self) -> None:
        """Measures held-out images after a pass, and keeps its scales if it is the best so far."""
        if self.judge is None:
            return
        self.hidden.append(_mean(self._measure(self.judge)))
        if self.hidden[-1] <= min(self.hidden):
            self.best = [s.scales.get() for s in self.searched]

    def _measure(self, batches: Batches) -> Tensor:
        """The fitness of every image, by the whole network."""
        return batches.losses(self.student.flat, self.evaluator.fitness)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def _over(self) -> bool:
        if self.run.steps is not None:
            return self.children >= self.run.steps
        if self.run.minutes is not None:
            spent, limit = self.seconds + time.perf_counter() - self.run.started, self.run.minutes * 60
            return together.from_first(lambda: spent >= limit)
        return self.visits >= self.stage.passes * len(self.searched)

    def _progress(self, fitness: float) -> None:
        total = self.run.steps or self.stage.passes * len(self.searched) * CYCLES
        if self.run.minutes is not None:
            spent = time.perf_counter() - self.run.started
            total = max(self.children, round(self.children * self.run.minutes * 60 / max(spent, 1e-9)))
        start = self.curve[0][1]
        detail = f"fitness {fitness:.5g} (at first {start:.5g}, float {self.teacher_fitness:.5g})"
        self.run.progress("Evolving", self.children, total, detail)

    # ------------------------------------------------------------------------------------- checkpoints

    @property
    def _path(self) -> Path | None:
        return None if self.run.state is None else self.run.state / CHECKPOINT

    @property
    def _identity(self) -> str:
        return f"{self.run.identity} {len(self.run.history)}"

    def _load(self) -> bool:
        found = None if self._path is None else checkpoint.read_last(self._path, self.run.device)
        if found is None or found.header["identity"] != self._identity:
            return False
        kept, state = found.tensors, json.loads(found.header["state"])
        for i, searched in enumerate(self.searched):
            if state["visits"]:
                searched.scales.set(kept[f"scales.{i}"])
            self.best[i] = kept[f"best.{i}"]
        self.losses, self.first = kept["losses"], kept["first"]
        for name in ("visits", "children", "dropped", "better", "seconds", "hidden", "precision"):
            setattr(self, name, state[name])
        self.curve = [(int(n), float(f)) for n, f in state["curve"]]
        return True

    def _save_if_due(self) -> None:
        """After a visit, which a resumed run repeats or goes on from with the same random numbers."""
        if time.perf_counter() - self.saved > max(CHECKPOINT_SECONDS, self.cost / CHECKPOINT_SHARE):
            self._save()

    def _save(self) -> None:
        path = self._path
        if path is None:
            return
        start = time.perf_counter()
        tensors = {"losses": self.losses, "first": self.first}
        for i, searched in enumerate(self.searched):
            tensors |= {f"scales.{i}": searched.scales.get(), f"best.{i}": self.best[i]}
        names = ("visits", "children", "dropped", "better", "hidden", "curve", "precision")
        state = {n: getattr(self, n) for n in names}
        state["seconds"] = self._elapsed()
        header = {"identity": self._identity, "state": json.dumps(state)}
        checkpoint.write(path, tensors, header, previous=True)
        self.saved = time.perf_counter()
        self.cost = self.saved - start


def scale_keys(student: Student, block: Block) -> list[str]:
    """Paths of the calibrated quantizers of a block's weights."""
    return [k for k in _paths(student, block) if student.quantizer(k).calibrated]


def _paths(student: Student, block: Block) -> list[str]:
    """Of all quantizers of a block's weights, calibrated or not."""
    layers = {layer.node: layer for layer in student.layers}
    return [k for k in dict.fromkeys(layers[n].weight for n in block.nodes) if k is not None]


def _fitness(measure: FitnessMeasure, teacher: Captured, batches: Batches) -> Fitness:
    """Of the outputs that depend on the images."""
    readings = read_outputs(teacher.graph, batches.load(batches.parts[0][:2]), teacher.outputs)
    places = tuple(k for k, reading in enumerate(readings) if reading.kind != "constant")
    return Fitness(measure, places=places or None)


def _split(images: Images, share: float) -> tuple[Images, Images]:
    """(held out, the rest): evenly spread, in order."""
    count = round(share * len(images))
    hidden = {round((i + 0.5) * len(images) / count - 0.5) for i in range(count)} if count else set()
    return images.take(sorted(hidden)), images.take([i for i in range(len(images)) if i not in hidden])


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())
