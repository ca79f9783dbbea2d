"""A task: how truth is read, how outputs become predictions, which figures they give, and with which intervals.

A new task is one record: a file with a :class:`Task`, and its name in ``measure/tasks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bitwright.errors import BitwrightError, DataError, cause
from bitwright.given.images import Images
from bitwright.given.text import short
from bitwright.graph.readings import Reading
from bitwright.measure.metrics import ClassLoss, Evaluation, Metrics, OutputFidelity, PairedDifference, Part, TaskLoss

Draw: TypeAlias = npt.NDArray[np.int64]
"""Positions of images, [N], some of them several times: a sample with replacement."""
Decode: TypeAlias = Callable[[Any], Any]
"""A user's function: outputs of a batch, as the network arranges them, to predictions."""


PICTURED = 6
"""Images that are kept to be drawn."""


class Tally:
    """What one network scored on each of ``count`` images, from which the figures of any selection of them follow."""

    count: int
    resamples: int = 1000
    """Samples of the bootstrap; fewer where figures take long."""

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """The figures by key, over all images or over a sample of them; what nothing is known of is left out."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """The main figure by class, where it is a mean over classes."""
        return []

    def notes(self) -> list[str]:
        """What people should know of these figures, a line each."""
        return []

    @cached_property
    def drawn(self) -> list[dict[str, float]]:
        """The figures of samples with replacement, which depend on the number of images alone: networks match."""
        random = np.random.default_rng(0)
        times = self.resamples if self.count > 1 else 0
        return [self.figures(random.integers(0, self.count, self.count)) for _ in range(times)]

    def metrics(self) -> Metrics:
        """The figures with their intervals."""
        found, ends = self.figures(), percentile_interval(self.drawn)
        return Metrics(found, {k: ends[k] for k in found if k in ends})

    def difference(self, reference: Tally) -> dict[str, PairedDifference]:
        """How much higher each figure is than another network's on the same images, with a paired interval."""
        ours, theirs = self.figures(), reference.figures()
        draws = zip(self.drawn, reference.drawn, strict=False)
        ends = percentile_interval([{k: a[k] - b[k] for k in a if k in b} for a, b in draws])
        return {k: PairedDifference(ours[k] - theirs[k], ends.get(k)) for k in ours if k in theirs}


def percentile_interval(draws: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """95 % intervals of figures by key: the percentiles of Efron (1979) over draws; of those that most draws have.

    Example:
        >>> percentile_interval([{"hit": float(i)} for i in range(101)])
        {'hit': [2.5, 97.5]}
    """
    keys = dict.fromkeys(k for draw in draws for k in draw)
    values = {k: [draw[k] for draw in draws if k in draw] for k in keys}
    return {
        k: [float(end) for end in np.percentile(v, [2.5, 97.5])] for k, v in values.items() if 2 * len(v) > len(draws)
    }


@dataclass
class Mean(Tally):
    """Figures that are means over images of numbers that each image has; NaN where it has none.

    Example:
        >>> found = Mean([{"hit": 1.0}, {"hit": 0.0}, {"hit": 1.0}, {"hit": 0.0}])
        >>> found.figures(), found.figures(np.array([0, 0, 0, 1]))
        ({'hit': 0.5}, {'hit': 0.75})
    """

    each: Sequence[Mapping[str, float]]

    def __post_init__(self) -> None:
        self.count = len(self.each)
        keys = list(dict.fromkeys(k for row in self.each for k in row))
        self._values = {k: np.array([row.get(k, math.nan) for row in self.each], np.float64) for k in keys}

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """The means."""
        chosen = {k: v if draw is None else v[draw] for k, v in self._values.items()}
        return {k: float(np.nanmean(v)) for k, v in chosen.items() if not np.isnan(v).all()}

    def notes(self) -> list[str]:
        """How many images have no number."""
        missing = {k: int(np.isnan(v).sum()) for k, v in self._values.items()}
        return [
            f"{k} is no number for {n} of {self.count} images, which do not count." for k, n in missing.items() if n
        ]


@dataclass(frozen=True)
class Outputs:
    """How a network's outputs are read.

    Attributes:
        names: of the outputs, where they are known.
        readings: what each of them holds; empty where nobody knows.
        arranged: from a flat list of outputs to what the network returns, for a user's own functions.
    """

    names: Sequence[str] = ()
    readings: Sequence[Reading] = ()
    arranged: Callable[[list[Tensor]], Any] = field(default=lambda flat: flat[0] if len(flat) == 1 else flat)


def lent(given: Any) -> Any:
    """What a user's function may change: tensors and arrays are copies, and so are the lists and dicts around them."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else _copied(x), given)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def called(decode: Decode, arranged: Any) -> Any:
    """What a user's function makes of outputs.

    Raises:
        DataError: it raised an error.
    """
    try:
        with torch.no_grad():
            return decode(lent(arranged))
    except (BitwrightError, Warning):
        raise
    except (Exception, SystemExit) as error:
        kind = f"{type(error).__name__}: {short(error)}"
        raise DataError(f"Expected decode to return predictions, it raised {kind}.") from cause(error)


def over_batches(parts: Sequence[Tensor]) -> Tensor:
    """An output of several batches, [N, ...]; one number for each batch where it has no axis of images.

    Example:
        >>> over_batches([torch.ones(2, 3), torch.ones(1, 3)]).shape, over_batches([torch.tensor(1.0)]).shape
        (torch.Size([3, 3]), torch.Size([1]))
    """
    return torch.cat([part if part.dim() else part[None] for part in parts])


def shapes_of(outputs: Sequence[Any]) -> str:
    """Shapes of one image's outputs, for messages.

    Example:
        >>> shapes_of([torch.zeros(2, 3, 8, 8), torch.zeros(2)])
        '3x8x8, one number'
    """
    return ", ".join("x".join(map(str, o.shape[1:])) or "one number" for o in outputs if isinstance(o, Tensor))


def check_kind(found: str, outputs: Sequence[Any]) -> None:
    """Labels must be of the kind that such outputs are compared with.

    Args:
        found: what the labels are: class indices, masks or boxes.
        outputs: of a batch, as the network gives them.

    Raises:
        DataError: maps are to be compared with class indices, or class scores with masks or boxes.
    """
    axes = {o.dim() for o in outputs if isinstance(o, Tensor)}
    classes = found == "class indices"
    if not axes or (max(axes) <= 2) == classes or (classes and 2 in axes):
        return
    wanted = "masks or boxes" if classes else "class indices"
    folders = " (folders that images lie in are taken for classes)" if classes else ""
    raise DataError(
        f"Expected {wanted} as labels= of a network with outputs of {shapes_of(outputs)}, found {found}{folders}. "
        f"Give {wanted}, or images without labels."
    )


@dataclass(frozen=True)
class Pictured:
    """An image on which two networks differ, for people to look at.

    Attributes:
        position: of the image.
        difference: by which images are ordered; 0 where both say the same.
        said: what differs, in words.
        marks: what is drawn on the image by whose it is (``float``, ``quantized``, ``labels``): classes (H, W),
            negative where there is none, or :class:`bitwright.given.truth.Boxes` in pixels of the network's input.
    """

    position: int
    difference: float
    said: str
    marks: Mapping[str, Any]


class Judge(Protocol):
    """Scores networks image by image against what is known of the images."""

    def target(self, positions: range) -> Any:
        """What is known of a batch of images, in the form that :meth:`add` compares with."""

    def add(self, scores: list[Any], outputs: list[Tensor], target: Any) -> Sequence[Any]:
        """Adds what the outputs of a batch are worth to a network's scores, which begin as an empty list.

        Returns:
            What can be drawn of each image, for :meth:`differ`; nothing if there is no picture of it.
        """

    def differ(self, position: int, expected: Any, found: Any, truth: Any) -> Pictured:
        """How two networks differ on an image, from what :meth:`add` returned of it and its part of the target."""

    def tally(self, scores: list[Any]) -> Tally:
        """What all images together are worth."""


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Attributes:
        name: as ``task=`` has it.
        truth: what is known of the images, in words.
        figures: what they are called for people, by their keys in ``result.json``; the first is the one to judge by.
        fits: whether these images bring what the task compares with.
        judge: compares. Takes the images, how outputs are read, and the user's decoding function if there is one.
        answers: what a network's outputs for a batch would be as truth, an item for each image. Takes outputs, how they
            are read, the decoding function, and height and width of the images.
    """

    name: str
    truth: str
    figures: Mapping[str, str]
    fits: Callable[[Images], bool]
    judge: Callable[[Images, Outputs, Decode | None], Judge]
    answers: Callable[[list[Tensor], Outputs, Decode | None, tuple[int, int]], Sequence[Any]]

    def keys(self, *, first: bool) -> list[str]:
        """The key of the figure to judge by, or those of the others."""
        every = list(self.figures)
        return every[:1] if first else every[1:]


class Judged:
    """Both networks' scores by one judge, as an evaluation goes."""

    def __init__(self, judge: Judge, task: Task | None) -> None:
        self.judge, self.task = judge, task
        self._ours: list[Any] = []
        self._theirs: list[Any] | None = None
        self.pictured: list[Pictured] = []
        """Images on which the networks differ most."""

    def add(self, positions: range, found: list[Tensor], expected: list[Tensor] | None = None) -> None:
        """Adds a batch.

        Args:
            positions: of its B images.
            found: outputs of the network, [B, ...] each.
            expected: those of the float network, if there is one.
        """
        target = self.judge.target(positions)
        ours = self.judge.add(self._ours, found, target)
        if expected is None:
            return
        self._theirs = self._theirs or []
        theirs = self.judge.add(self._theirs, expected, target)
        if len(ours) == len(theirs) == len(positions):
            each = map(self.judge.differ, positions, theirs, ours, target)
            worst = sorted([*self.pictured, *each], key=lambda p: -p.difference)[:PICTURED]
            self.pictured = [p for p in worst if p.difference > 0]

    def result(self) -> Evaluation:
        """What both score, and what the difference is."""
        name = None if self.task is None else self.task.name
        now = self.judge.tally(self._ours)
        if self._theirs is None:
            classes = ClassLoss.beside(now.parts(), ())
            return Evaluation(now.metrics(), None, None, TaskLoss(name, {}, classes, now.notes()))
        before = self.judge.tally(self._theirs)
        notes = list(dict.fromkeys([*before.notes(), *now.notes()]))
        classes = ClassLoss.beside(now.parts(), before.parts())
        return Evaluation(now.metrics(), before.metrics(), None, TaskLoss(name, now.difference(before), classes, notes))


def joined(judged: Sequence[Judged], fidelity: Mapping[str, OutputFidelity] | None) -> Evaluation:
    """What all judges found, in one record.

    Args:
        judged: none where nothing is known of the images.
        fidelity: of each output; None where there was no float network.
    """
    found = [each.result() for each in judged]
    ours = Metrics.joined([e.quantized for e in found])
    theirs = None if fidelity is None else Metrics.joined([e.reference for e in found])
    pictured = [p for each in judged for p in each.pictured]
    return Evaluation(ours, theirs, fidelity, TaskLoss.joined([e.loss for e in found]), pictured)
