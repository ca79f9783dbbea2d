"""The smallest network that still gives the float network's answers, looked for along a curve of plans.

Each trial quantizes a plan with the quick part of the recipe on half of the calibration images and counts equal answers
on the other half. Agreement is taken to grow with size, which makes bisection possible; where it decides it is checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import torch

from bitwright import together
from bitwright.bits.plan import Plan, insert_plan
from bitwright.errors import UsageError
from bitwright.given.images import Images
from bitwright.graph.axes import read_outputs
from bitwright.graph.capture import Captured
from bitwright.graph.student import Student
from bitwright.measure.following import Follower
from bitwright.measure.metrics import Fidelity, wilson_interval
from bitwright.measure.shown import named_figures
from bitwright.measure.tasks import Scoring
from bitwright.pipeline import run_stages, tensor_digest
from bitwright.progress import silent
from bitwright.quant.scheme import Scheme
from bitwright.recipes import Recipe
from bitwright.run.files import DamagedError, read_checked, write_checked
from bitwright.run.state import other_settings
from bitwright.stages.base import Optimising, Run
from bitwright.words import amount

FILE = "trials.json"


@dataclass
class Search:
    """What a search along a curve found."""

    index: int | None
    """Of the first element that holds, as its neighbour does; None if the last does not hold."""
    tried: dict[int, float] = field(default_factory=dict)
    """Values by index."""

    @property
    def monotone(self) -> bool:
        """Whether no value that was looked at is above one further on."""
        values = [self.tried[i] for i in sorted(self.tried)]
        return all(a <= b for a, b in pairwise(values))


def first_that_holds(count: int, value: Callable[[int], float], wanted: float) -> Search:
    """The first of ``count`` elements whose value is at least ``wanted``, for values that mostly grow.

    Bisection. The neighbour of the one that is found must hold too; if it does not, the one found was lucky, and the
    search goes on beyond that neighbour.

    Example:
        >>> first_that_holds(8, lambda i: i / 8, 0.6).index
        5
    """
    tried: dict[int, float] = {}

    def holds(index: int) -> bool:
        if index not in tried:
            tried[index] = value(index)
        return tried[index] >= wanted - 1e-12

    if not holds(count - 1):
        return Search(None, tried)
    low, high = -1, count - 1
    while True:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        if high == count - 1 or holds(high + 1):
            return Search(high, tried)
        low, high = high + 1, count - 1


def halves(images: Images) -> tuple[Images, Images]:
    """Images to calibrate trials on, and others to count answers on.

    Raises:
        UsageError: there are fewer than two.
    """
    if len(images) < 2:
        raise UsageError(f"Expected at least 2 images to estimate a drop with, found {len(images)}.")
    return images.take(range(0, len(images), 2)), images.take(range(1, len(images), 2))


def check_countable(teacher: Captured, images: Images, drop: float) -> None:
    """The network must give answers that can be counted, and there should be enough images to count them on.

    Raises:
        UsageError: none of its outputs holds class scores.
    """
    readings = read_outputs(teacher.graph, images.batch([0]), teacher.outputs)
    if not any(r.tells for r in readings):
        named = f"'{teacher.outputs[0]}': {readings[0].note}"
        raise UsageError(
            f"Expected class scores to count equal answers on, found none. Output {named} Give a size instead "
            "(target_size= or compression=)."
        )
    held_out = len(images) // 2
    if 0 < drop < 1 / max(held_out, 1):
        warnings.warn(
            f"{held_out} images are held out: one changed answer is {100 / max(held_out, 1):.2g} %, more than the drop "
            "that was asked for. More images (samples=) tell more.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Trial:
    """A plan that was tried: its size, its predicted loss, and the agreement on held-out images with its interval."""

    weight_bytes: float
    loss: float
    agreement: float
    interval: list[float]


@dataclass(frozen=True)
class Estimate:
    """What is expected of a plan's answers.

    Attributes:
        agreement: share of held-out images whose answer stays the float network's; or share of a task's figure that
            is kept, where the float network's answers stand for the truth.
        interval: the 95 % interval of it.
        drop: share of answers that may change.
        images: how many were held out.
        calibrated_on: how many were not.
        stages: of the recipe, that made the trials.
        monotone: whether larger plans agreed at least as well.
        trials: every plan that was tried, the smallest first.
        figure: key of the task's figure; None where answers were counted.
    """

    agreement: float
    interval: list[float]
    drop: float
    images: int
    calibrated_on: int
    stages: list[str]
    monotone: bool
    trials: list[Trial]
    figure: str | None = None


def smallest(
    teacher: Captured,
    curve: Sequence[Plan],
    scheme: Scheme,
    method: Recipe,
    images: Images,
    drop: float,
    run: Run,
    state: Path | None = None,
    scored: Scoring | None = None,
) -> tuple[Plan, Estimate]:
    """The smallest plan of a curve whose network agrees with the float one on at least ``1 - drop`` of images.

    Args:
        teacher: the float network, on the run's device.
        curve: plans, the smallest first.
        scheme: for what plans leave open.
        method: its stages that take no steps make the trials.
        images: all that there are for calibration; trials use half of them, and are judged on the others.
        drop: share of answers that may change.
        run: seed, device, progress.
        state: folder where trials are kept, to go on from.
        scored: the task or metric whose figure may drop, instead of answers.

    Raises:
        UsageError: even the largest plan changes more answers.
    """
    trials = _Trials.begun(teacher, curve, scheme, method, images, run, state, scored)
    search = first_that_holds(len(curve), trials.agreement, 1 - drop)
    run.progress("Trying plans on held-out images", len(search.tried), len(search.tried))
    if search.index is None:
        raise trials.out_of_reach(drop)
    return curve[search.index], trials.estimate(search, drop)


@dataclass
class _Trials:
    """Plans of a curve, tried on one half of the images and judged on the other, and what came of them."""

    teacher: Captured
    curve: Sequence[Plan]
    scheme: Scheme
    quick: Recipe
    fit: Images
    held_out: Images
    follower: Follower | None
    run: Run
    kept: _Kept

    @classmethod
    def begun(
        cls,
        teacher: Captured,
        curve: Sequence[Plan],
        scheme: Scheme,
        method: Recipe,
        images: Images,
        run: Run,
        state: Path | None,
        scored: Scoring | None,
    ) -> _Trials:
        """Goes on from what is kept in ``state``."""
        fit, held_out = halves(images)
        quick = method.model_copy(update={"stages": tuple(s for s in method.stages if not isinstance(s, Optimising))})
        identity = f"2 {[p.model_dump_json() for p in curve]} {scheme} {quick} {run.seed} {images.sha256}"
        follower = None if scored is None else Follower.of(teacher, held_out, scored)
        identity += "" if follower is None else f" {follower.key} {follower.best}"
        kept = _Kept(state, sha256(f"{identity} {tensor_digest(teacher.graph)}".encode()).hexdigest())
        return cls(teacher, curve, scheme, quick, fit, held_out, follower, run, kept)

    def agreement(self, index: int) -> float:
        """What a plan of the curve reaches; asked for again, it is not tried again."""
        done, most = len(self.kept.found), len(self.curve).bit_length() + 1
        if index not in self.kept.found:
            self.run.progress("Trying plans on held-out images", done, max(most, done + 1))
            given = (self.teacher, self.curve[index], self.scheme, self.quick, self.fit)
            if self.follower is None:
                found = _agreement(*given, self.held_out, self.run)
                self.kept.add(index, found, _interval(found, self.held_out))
            else:
                self.kept.add(index, *self.follower.share(_tried(*given, self.run)[0]))
        return self.kept.found[index]

    def estimate(self, search: Search, drop: float) -> Estimate:
        """What is known of the plan that was found."""
        assert search.index is not None
        tried = sorted(search.tried.items())
        return Estimate(
            agreement=search.tried[search.index],
            interval=self.kept.intervals[search.index],
            drop=drop,
            images=len(self.held_out),
            calibrated_on=len(self.fit),
            stages=[s.kind for s in self.quick.stages],
            monotone=search.monotone,
            trials=[Trial(**_size(self.curve[i]), agreement=v, interval=self.kept.intervals[i]) for i, v in tried],
            figure=None if self.follower is None else self.follower.key,
        )

    def out_of_reach(self, drop: float) -> UsageError:
        """What is said where even the largest plan, which was tried, changes more."""
        last, named = len(self.curve) - 1, None if self.follower is None else named_figures(self.follower.key)
        found, interval = self.kept.found[last], self.kept.intervals[last]
        return _out_of_reach(drop, self.curve[last], found, interval, self.held_out, named)


def _out_of_reach(
    drop: float, largest: Plan, agreement: float, interval: list[float], held_out: Images, figure: str | None
) -> UsageError:
    (low, high), size = interval, amount(_size(largest)["weight_bytes"], "B")
    lost = f"{100 * (1 - agreement):.2f} %"
    held = f"{len(held_out)} held-out images (95 %: {100 * (1 - high):.2f} to {100 * (1 - low):.2f})"
    remedy = "Allow a larger max_drop=, or more bits (weights=, activations=)."
    if figure is None:
        return UsageError(
            f"Expected at most {100 * drop:g} % of answers to change; the largest plan ({size}) changes {lost} of "
            f"{held}. {remedy}"
        )
    return UsageError(
        f"Expected at most {100 * drop:g} % of {figure} to be lost; the largest plan ({size}) loses {lost} on {held}. "
        f"{remedy}"
    )


def _tried(teacher: Captured, plan: Plan, scheme: Scheme, quick: Recipe, fit: Images, run: Run) -> tuple[Student, Run]:
    """A plan's network after the quick stages, and what they shared."""
    student = insert_plan(teacher, plan, scheme)
    student.to(run.device)
    own = Run(seed=run.seed, batch=run.batch, device=run.device, progress=silent)
    return run_stages(quick, student, teacher, fit, own), own


def _agreement(
    teacher: Captured, plan: Plan, scheme: Scheme, quick: Recipe, fit: Images, held_out: Images, run: Run
) -> float:
    """Share of held-out images with the float network's answer, of the worst output, after the quick stages."""
    student, own = _tried(teacher, plan, scheme, quick, fit, run)
    readings = read_outputs(teacher.graph, held_out.batch([0], run.device), teacher.outputs)
    fidelity = Fidelity(teacher.outputs, readings)
    for batch in own.batches(held_out, ""):
        with torch.no_grad():
            fidelity.update(teacher.flat(batch), student.flat(batch))
    agreement = fidelity.worst.agreement
    assert agreement is not None, "check_answers has looked"
    return agreement


def _interval(agreement: float, images: Images) -> list[float]:
    """95 %, over images."""
    return list(wilson_interval(round(agreement * len(images)), len(images)))


def _size(plan: Plan) -> dict[str, float]:
    predicted = plan.predicted or {}
    return {name: predicted[name] for name in ("weight_bytes", "loss")}


class _Kept:
    """Trials that are done, in a file."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.path = None if folder is None else folder / FILE
        self.identity = identity
        self.found: dict[int, float] = {}
        self.intervals: dict[int, list[float]] = {}
        if self.path is not None and self.path.is_file():
            self.found, self.intervals = _read(self.path, identity)

    def add(self, index: int, value: float, interval: list[float]) -> None:
        self.found[index], self.intervals[index] = value, interval
        if self.path is None or not together.is_first():
            return
        write_checked(self.path, {"identity": self.identity, "found": self.found, "intervals": self.intervals})


def _read(path: Path, identity: str) -> tuple[dict[int, float], dict[int, list[float]]]:
    try:
        data = read_checked(path)
    except DamagedError as error:
        warnings.warn(f"{error} The trials are made again.", UserWarning, stacklevel=4)
        return {}, {}
    if data["identity"] != identity:
        raise other_settings(path.parent)
    return {int(i): v for i, v in data["found"].items()}, {int(i): v for i, v in data["intervals"].items()}
