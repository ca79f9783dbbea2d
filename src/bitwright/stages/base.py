"""What a stage is, and what it is given besides the model and the images."""

from __future__ import annotations

import time
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from bitwright.given.arguments import SEEDS, whole_number
from bitwright.memory import return_pages
from bitwright.progress import Progress, silent
from bitwright.run.record import CheckedAnswers, Outliers, StageRecord
from bitwright.stages.schedules import FrozenSettings
from bitwright.transfer import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from bitwright.given.images import Images
    from bitwright.graph.capture import Captured
    from bitwright.graph.student import Snapshot, Student
    from bitwright.graph.watch import Callback


Precision = Literal["auto", "float32", "bfloat16"]


class Sums(Protocol):
    """What a stage adds up over the float network's values on the images."""

    @property
    def callbacks(self) -> Mapping[str, Callback]:
        """For a pass of the float network, by node name."""

    @property
    def streams(self) -> Sequence[Stream]:
        """What of it depends on how many batches came before."""

    def taken(self) -> list[Tensor]:
        """What the last batch adds, always in the same shapes."""

    def add(self, given: Sequence[Tensor]) -> None:
        """Takes in what :meth:`taken` gave, here or in another process."""


class Stream(Protocol):
    """What depends on how many batches came before."""

    def skip(self, batches: int) -> None:
        """Goes past batches that another process sees, as large as the first one."""

    def forget(self) -> None:
        """The first batch counts in another process."""


class KeptSteps:
    """Steps that were found for stored weights, as long as these are there: tensors are replaced and never changed."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, Hashable], tuple[weakref.ref[Tensor], Tensor]] = {}

    def of(self, weight: Tensor, settings: Hashable) -> Tensor | None:
        """What was found for this very weight with these settings, [number of blocks]; None if nothing was."""
        known = self._found.get((id(weight), settings))
        return known[1] if known is not None and known[0]() is weight else None

    def keep(self, weight: Tensor, settings: Hashable, steps: Tensor) -> None:
        """Remembers steps, [number of blocks], of this very weight with these settings."""
        self._found[id(weight), settings] = weakref.ref(weight), steps


@dataclass
class Run:
    """What every stage shares: seed, device, batch size, budget, progress, and where it records what it did.

    Attributes:
        steps: of an optimisation, instead of the recipe's.
        steps_each: of the recipe's optimising stages in order; stages beyond its length take their own.
        minutes: to spend from ``started`` on, instead of a number of steps.
        precision: in which networks are optimised; ``auto`` measures what is faster.
        state: folder for checkpoints inside a stage; None keeps none.
        identity: what the run depends on; the key of what is kept in ``state``.
        history: the student as each stage left it, by the stage's kind.
        seconds: spent so far, by what they were spent on.
        records: what each stage tells, in the order of stages.
        outliers: what was done about outliers before the first stage, and what is suggested after the last.
        checked: how closely the outputs follow the float network's, looked at after the last stage.
        following: the stage that comes next, whose pass over the images may be made together with this one's.
        summed: what such a pass has added up for it.
        beside: what else the next calibration sums up in its pass.
        steps_of_weights: that were found so far: outliers are looked for with the ranges of the stages to come.
    """

    seed: int = 0
    batch: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    steps: int | None = None
    steps_each: tuple[int, ...] = ()
    minutes: float | None = None
    precision: Precision = "auto"
    state: Path | None = None
    identity: str = ""
    started: float = field(default_factory=time.perf_counter)
    history: list[tuple[str, Snapshot]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    records: list[StageRecord] = field(default_factory=list)
    outliers: Outliers = field(default_factory=Outliers)
    checked: CheckedAnswers | None = None
    following: Stage | None = None
    summed: Sums | None = None
    beside: tuple[Sums, ...] = ()
    steps_of_weights: KeptSteps = field(default_factory=KeptSteps)

    def __post_init__(self) -> None:
        self.seed = whole_number("seed", self.seed, least=0, below=SEEDS)

    def of(self, stages: Sequence[Stage], position: int) -> Run:
        """The part of the budget that is one stage's; everything else is shared with this run.

        Minutes that are left are divided among the optimising stages to come by their ``share``.
        """
        stage = stages[position]
        if not isinstance(stage, Optimising):
            return self
        before = sum(isinstance(s, Optimising) for s in stages[:position])
        steps = self.steps_each[before] if before < len(self.steps_each) else self.steps
        minutes = self.minutes
        if minutes is not None:
            spent = (time.perf_counter() - self.started) / 60
            part = stage.share / sum(s.share for s in stages[position:] if isinstance(s, Optimising))
            minutes = spent + max(0.0, minutes - spent) * part
        return replace(self, steps=steps, minutes=minutes)

    @contextmanager
    def before(self, stages: Sequence[Stage], position: int) -> Iterator[None]:
        """While inside, the stage at that position knows which one follows it."""
        self.following = next(iter(stages[position + 1 :]), None)
        try:
            yield
        finally:
            self.following = None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``seconds[what]``, and gives back the memory that was free at the end."""
        start = time.perf_counter()
        try:
            yield
        finally:
            return_pages()
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Whatever is done inside is told by one name."""
        told = self.progress
        self.progress = lambda what, done, total, detail="": told(name, done, total, detail)
        try:
            yield
        finally:
            self.progress = told

    def batches(self, images: Streamed, what: str, at_once: int | None = None) -> Iterator[Tensor]:
        """The images in batches on the device, [B, C, H, W], with progress; ``at_once`` of them, or :attr:`batch`."""
        done = 0
        self.progress(what, 0, len(images))
        for batch in images.batches(at_once or self.batch, self.device):
            yield batch
            done += len(batch)
            self.progress(what, done, len(images))


class Samples(Protocol):
    """Images, or views of them."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device = CPU) -> Tensor:
        """[B, C, H, W] on a device."""


class Streamed(Samples, Protocol):
    """The same, that can be had in order."""

    def batches(self, size: int, device: torch.device = CPU) -> Iterator[Tensor]:
        """[B, C, H, W] each on a device, of this many; the last may have fewer."""


class Stage(FrozenSettings):
    """One step of a recipe. Subclasses set ``kind``, the name that recipe files use, and their settings as fields."""

    kind: ClassVar[str]
    layerwise: ClassVar[bool] = False
    """Whether it rounds each layer by itself, from the float network's values: other layers' bits do not matter."""
    needs_ranges: ClassVar[bool] = False
    """Whether a stage before it must have given the quantizers their ranges."""
    reads_labels: ClassVar[bool] = False
    """Whether it is given the images' labels. Every other stage is given images without."""
    record: ClassVar[type[StageRecord]] = StageRecord
    """The class of what it tells, for a stage that appends a record of its own to ``run.records``."""
    registry: ClassVar[dict[str, type[Stage]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Stage.registry[cls.kind] = cls

    def check(self, student: Student, teacher: Captured, images: Images) -> None:
        """Looks at what can be wrong before the first stage begins; quantizers are in place, none is calibrated.

        Raises:
            UsageError: this network, or these images, are not what the stage needs.
        """

    def parts(self) -> tuple[Stage, ...]:
        """The stages that stand for it in a recipe; itself for all but those that do one thing several times."""
        return (self,)

    def sums(self, student: Student, teacher: Captured, images: Images, run: Run) -> Sums | None:
        """What it adds up in a pass of the float network over all of the images; None if it makes no such pass.

        The stage before it may make that pass together with its own: the student's stored weights and ranges are not
        read.
        """
        return None

    def run(self, student: Student, teacher: Captured, images: Images, run: Run) -> Student:
        """Improves the student; the teacher is never changed, and the images carry no labels."""
        raise NotImplementedError


class Optimising(Stage):
    """A stage that takes steps, so that a budget of steps or minutes means something to it."""

    needs_ranges: ClassVar[bool] = True

    share: float = Field(default=1.0, gt=0)
    """Of a budget of minutes, relative to the recipe's other stages that take steps."""
