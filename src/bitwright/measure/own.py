"""A metric of the user's own, called with outputs and truth of whatever kind.

A function is called for each image by itself, with a batch of one: the outputs as the network returns them (or as
``decode`` makes them) and the truth of that image, both with their first axis kept. So one that is written for batches
works as it is. It returns a number, or numbers by name. The figure is the mean over images; its interval and that of
the difference from float come from drawing images with replacement.

An object with ``update(outputs, truth)`` and ``compute()``, as torchmetrics has them, is for what is no mean over
images. Each network gets a copy; it is updated batch by batch, and its figures have no interval.

The truth is: class indices [1]; masks [1, H, W] at the size of the network's input, -1 where there is no image; a list
of a dict of ``boxes`` (corners in pixels of the network's input) and ``labels``; for anything else a slice of what was
given. Where the float network's outputs are the truth, they are arranged as the outputs are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bitwright.errors import BitwrightError, DataError, UsageError, cause
from bitwright.given.images import Images
from bitwright.given.text import short
from bitwright.given.truth import Boxes
from bitwright.measure.segmentation import placed_masks
from bitwright.measure.task import Decode, Draw, Mean, Outputs, Pictured, Tally, called, lent


def check(metric: Any) -> None:
    """A metric must be a function, or gather and compute.

    Raises:
        UsageError: it is neither.
    """
    if not callable(metric) and not _gathers(metric):
        raise UsageError(
            f"Expected a function of outputs and truth as metric=, found {type(metric).__name__}. An object needs "
            "update(outputs, truth) and compute()."
        )
    if isinstance(metric, type):
        raise UsageError(f"Expected a function or an object as metric=, found the class {metric.__name__}. Make one.")


def _gathers(metric: Any) -> bool:
    return callable(getattr(metric, "update", None)) and callable(getattr(metric, "compute", None))


@dataclass(frozen=True)
class FloatAnswers(Sequence[Any]):
    """Outputs of a network as the truth of images: any part of them is arranged as the outputs for these images.

    Attributes:
        each: of every image, its tensors with the axis of images, [1, ...], and what else is returned.
        structure: how they are arranged.
    """

    each: Sequence[Sequence[Any]]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, batches: Sequence[tuple[Any, int]]) -> FloatAnswers:
        """From what a network returned for batches, each with the number of its images."""
        flat = [(pytree.tree_flatten(arranged), count) for arranged, count in batches]
        each = [_of_image(leaves, i, count) for (leaves, _), count in flat for i in range(count)]
        return cls(each, flat[0][0][1])

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, which: Any) -> Any:
        return FloatAnswers(self.each[which] if isinstance(which, slice) else [self.each[which]], self.structure)

    def arranged(self) -> Any:
        """As the network returned them."""
        columns = zip(*self.each, strict=True)
        return pytree.tree_unflatten(
            [torch.cat(c) if isinstance(c[0], Tensor) and c[0].dim() else c[0] for c in columns], self.structure
        )


def _of_image(outputs: Sequence[Any], position: int, count: int) -> list[Any]:
    """The part of one image out of a batch of so many; what has no axis of images is the same for all."""
    alike = [isinstance(o, Tensor) and o.dim() > 0 and len(o) == count for o in outputs]
    return [o[position : position + 1] if own else o for o, own in zip(outputs, alike, strict=True)]


class Gathered(Tally):
    """What an object computed of all images; it cannot be drawn from."""

    count = 1

    def __init__(self, found: dict[str, float]) -> None:
        self.found = found

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """As computed."""
        return self.found


class OwnJudge:
    """Calls the metric."""

    def __init__(
        self, images: Images, outputs: Outputs, metric: Any, decode: Decode | None = None, taken: Sequence[str] = ()
    ) -> None:
        if images.labels is None and images.truth is None:
            raise DataError("Expected labels= beside metric=, found none. They may be anything that it reads.")
        self.images, self.outputs, self.metric, self.decode = images, outputs, metric, decode
        self.taken = set(taken)

    def target(self, positions: range) -> Any:
        """What is known of a batch of images."""
        if self.images.labels is not None:
            return self.images.labels[positions.start : positions.stop]
        truth = self.images.truth
        assert truth is not None
        if truth.kind == "segmentation":
            masks = [placed_masks(self.images, i, truth.items[i]) for i in positions]
            return torch.from_numpy(np.stack(masks))
        if truth.kind == "detection":
            return [self._in_input(truth.items[i], i) for i in positions]
        items = truth.items
        if isinstance(items, list):
            items = [items[i] for i in positions]
            return torch.stack(items) if all(isinstance(x, Tensor) for x in items) and _alike(items) else items
        return items[positions.start : positions.stop]

    def _in_input(self, boxes: Boxes, position: int) -> dict[str, Tensor]:
        corners = self.images.placement(position).to_input(boxes.corners)
        return {"boxes": torch.from_numpy(corners).float(), "labels": torch.from_numpy(boxes.labels)}

    def add(self, scores: list[Any], outputs: list[Tensor], target: Any) -> Sequence[Any]:
        """Adds the numbers of each image by name; an object that gathers is updated."""
        if _gathers(self.metric):
            scores += [] if scores else [self._fresh()]
            self._call(scores[0].update, self._predicted(outputs), _truth(target))
            return ()
        for i in range(len(target)):
            scores.append(self._numbers(self._predicted(_of_image(outputs, i, len(target))), target[i : i + 1]))
        return ()

    def differ(self, position: int, expected: Any, found: Any, truth: Any) -> Pictured:
        """There is no picture of it."""
        raise NotImplementedError

    def _fresh(self) -> Any:
        made = copy.deepcopy(self.metric)
        if callable(getattr(made, "reset", None)):
            made.reset()
        return made

    def _predicted(self, outputs: list[Tensor]) -> Any:
        arranged = self.outputs.arranged(outputs)
        return arranged if self.decode is None else called(self.decode, arranged)

    def _numbers(self, outputs: Any, truth: Any) -> dict[str, float]:
        name = str(getattr(self.metric, "__name__", type(self.metric).__name__))
        return self._named(self._call(self.metric, outputs, _truth(truth)), name)

    def _call(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            with torch.no_grad():
                return function(*map(lent, given))
        except (BitwrightError, Warning):
            raise
        except (Exception, SystemExit) as error:
            kind = f"{type(error).__name__}: {short(error)}"
            raise DataError(f"Expected metric to return a number, it raised {kind}.") from cause(error)

    def _named(self, found: Any, name: str) -> dict[str, float]:
        """Numbers by name; a name that a figure of the task has is told from it."""
        each = found if isinstance(found, Mapping) else {name.strip("<>"): found}
        return {f"own_{k}" if k in self.taken else str(k): _number(v, str(k)) for k, v in each.items()}

    def tally(self, scores: list[Any]) -> Tally:
        """Means over images, or what the object computes."""
        if not _gathers(self.metric):
            return Mean(scores)
        name = str(getattr(self.metric, "__name__", type(self.metric).__name__)).lower()
        return Gathered(self._named(self._call(scores[0].compute), name))


def _truth(target: Any) -> Any:
    return target.arranged() if isinstance(target, FloatAnswers) else target


def _alike(items: list[Tensor]) -> bool:
    return len({x.shape for x in items}) == 1


def _number(value: Any, name: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        said = f"{tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else type(value).__name__
        raise DataError(f"Expected a number from metric as {name}, found {said}. Return its mean.") from error
    return found if math.isfinite(found) else math.nan
