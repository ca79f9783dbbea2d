"""Segmentation: which class each pixel shows.

A mask is brought to the network's input as its image is, each pixel by its nearest; what lies outside of the image
does not count. The network's scores are then resized to the mask (bilinear), and maps of classes by nearest, as
torchvision's reference training does. Images that are tensors keep their masks as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bitwright import words
from bitwright.errors import DataError
from bitwright.given.images import Images
from bitwright.given.truth import IGNORED, Mask, Truth
from bitwright.graph.readings import Reading, by_values
from bitwright.measure.metrics import Part
from bitwright.measure.named import TASK_FIGURES
from bitwright.measure.task import Decode, Draw, Outputs, Pictured, Tally, Task, called, check_kind, shapes_of


class MaskPixels(NamedTuple):
    """Pixels of one image by class: right ones, those of the mask, those of the network; and how many do not count."""

    right: Tensor
    there: Tensor
    given: Tensor
    ignored: int


class Overlap(Tally):
    """Pixel accuracy and mean intersection over union, the mean over classes that the masks have.

    Example:
        >>> one = _counted(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, -1]]))
        >>> {k: round(v, 3) for k, v in Overlap([one], {}).figures().items()}
        {'miou': 0.5, 'pixel_accuracy': 0.667}
    """

    def __init__(self, each: list[MaskPixels], names: dict[int, str]) -> None:
        self.count, self.names = len(each), names
        classes = max((len(p.right) for p in each), default=0)
        kinds = [[F.pad(part, (0, classes - len(part))) for part in p[:3]] for p in each]
        self._pixels = torch.stack([torch.stack(k) for k in kinds]).double().numpy()  # [N, 3, K]
        self._ignored = sum(p.ignored for p in each)

    def _summed(self, draw: Draw | None) -> Any:
        """Pixels by class over images, [3, K]."""
        if draw is None:
            return self._pixels.sum(0)
        return np.tensordot(np.bincount(draw, minlength=self.count).astype(float), self._pixels, 1)

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """Over all pixels of all images."""
        right, there, given = self._summed(draw)
        if not there.sum():
            return {}
        union = there + given - right
        overlap = float((right[there > 0] / union[there > 0]).mean())
        return {"miou": overlap, "pixel_accuracy": float(right.sum() / there.sum())}

    def parts(self) -> list[Part]:
        """Intersection over union of each class, with the pixels that masks give it."""
        right, there, given = self._summed(None)
        union = there + given - right
        return [
            Part(k, self.names.get(k), int(there[k]), float(right[k] / union[k])) for k in range(len(union)) if there[k]
        ]

    def notes(self) -> list[str]:
        """Which pixels did not count."""
        there = self._summed(None)[1]
        if not there.sum():
            return [f"No pixel of the masks counts: all are {IGNORED}, negative, or outside of the images."]
        if not self._ignored:
            return []
        share = self._ignored / (self._ignored + there.sum())
        said = [
            f"{100 * share:.3g} % of the pixels do not count: {IGNORED} or a negative number in the masks, null in the "
            "class map, or outside of the image."
        ]
        if not there[1:].any():
            said.append(f"Class 0 alone is in the masks. If {IGNORED} is a class too, say so with class_map=.")
        return said


def _counted(answers: Tensor, mask: Tensor, classes: int = 0) -> MaskPixels:
    """Counts the pixels of one image.

    Args:
        answers: classes [H, W].
        mask: classes [H, W]; negative where a pixel does not count.
        classes: how many there are at least.
    """
    counts = mask >= 0
    found, wanted = answers[counts].long().cpu(), mask[counts].long().cpu()
    size = max([classes, *(int(x.max()) + 1 for x in (found, wanted) if x.numel())])
    right, there, given = (torch.bincount(x, minlength=size) for x in (found[found == wanted], wanted, found))
    return MaskPixels(right, there, given, int((~counts).sum()))


class _Judge:
    def __init__(self, images: Images, outputs: Outputs, decode: Decode | None) -> None:
        assert images.truth is not None
        self.images, self.outputs, self.decode = images, outputs, decode
        self.truth: Truth = images.truth
        self.classes: int | None = None
        """Of the network; 0 where it gives classes, not scores; None before its first outputs."""

    def target(self, positions: range) -> list[Tensor]:
        """Masks [H, W] as the network's input shows them, with 255 and -1 for what does not count."""
        masks = (torch.from_numpy(placed_masks(self.images, i, self.truth.items[i])) for i in positions)
        return [self._known(mask) for mask in masks]

    def add(self, scores: list[Any], outputs: list[Tensor], target: list[Tensor]) -> Sequence[Any]:
        maps = _maps(outputs, self.outputs, self.decode, tuple(target[0].shape))
        self.classes = maps.shape[1] if maps.dim() == 4 else 0
        answers = [_resized(one, mask.shape) for one, mask in zip(maps, target, strict=True)]
        scores += [_counted(one, self._known(mask), self.classes) for one, mask in zip(answers, target, strict=True)]
        return answers

    def differ(self, position: int, expected: Tensor, found: Tensor, truth: Tensor) -> Pictured:
        """By the share of pixels that have another class."""
        share = float((expected != found).double().mean())
        marks = {"float": expected, "quantized": found, "labels": self._known(truth)}
        said = f"{words.percent(share)} of the pixels differ"
        return Pictured(position, share, said, {k: v.cpu().numpy() for k, v in marks.items()})

    def _known(self, mask: Tensor) -> Tensor:
        """The mask with -1 for all that does not count, once it is known how many classes the network has.

        Raises:
            DataError: it holds a class that the network does not have.
        """
        if self.classes is None:
            return mask
        classes = self.classes
        mask = mask if classes > IGNORED else mask.masked_fill(mask == IGNORED, -1)
        most = int(mask.max()) if mask.numel() else -1
        if classes and most >= classes:
            raise DataError(
                f"Expected masks of classes below {classes}, or {IGNORED} for pixels that do not count, found {most} "
                f"in the {self.truth.said}. Say what it stands for with class_map=."
            )
        return mask

    def tally(self, scores: list[Any]) -> Tally:
        return Overlap(scores, dict(self.truth.names))


def _maps(outputs: list[Tensor], how: Outputs, decode: Decode | None, size: tuple[int, ...]) -> Tensor:
    """Scores [B, K, h, w], or classes [B, h, w]."""
    if decode is None:
        return pixel_scores(outputs, how.readings, size)
    return pixel_scores([torch.as_tensor(called(decode, how.arranged(outputs)))], (), size)


def _answers(outputs: list[Tensor], how: Outputs, decode: Decode | None, size: tuple[int, int]) -> list[Mask]:
    found = [_resized(one, size).cpu().numpy().astype(np.int32) for one in _maps(outputs, how, decode, size)]
    return [Mask(partial(np.asarray, each), "the float network's answer") for each in found]


def placed_masks(images: Images, position: int, mask: Mask) -> Any:
    """A mask as the network's input shows it: int64 (H, W).

    Raises:
        DataError: its sides are in another proportion than the image's.
    """
    found, place = mask.read(), images.placement(position)
    if images.preprocessing is None and _alike(found.shape, place.image[::-1]):
        return found.astype(np.int64)
    if _alike(found.shape, place.image[::-1]):
        return place.mask(found, -1).astype(np.int64)
    if found.shape == place.input[::-1]:
        return found.astype(np.int64)
    (h, w), (width, height) = found.shape, place.image
    raise DataError(
        f"Expected a mask of {height}x{width} pixels (height x width) as the image {images.names[position]}, or one in "
        f"proportion, found {h}x{w} in {mask.where}. Give the mask of this image."
    )


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two (height, width) are in proportion, up to one pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def pixel_scores(outputs: list[Tensor], readings: Any, size: tuple[int, ...]) -> Tensor:
    """The first output that gives each pixel a class: scores [B, K, h, w] or classes [B, h, w].

    Args:
        outputs: of a batch.
        readings: of the outputs; told by their values if empty.
        size: height and width of masks, to which those of the output are in proportion.

    Raises:
        DataError: no output does.
    """
    for output, reading in zip(outputs, readings or [by_values(o[:1]) for o in outputs], strict=True):
        found = _scores(output, reading, size)
        if found is not None:
            return found
    check_kind(SEGMENTATION.truth, outputs)
    raise DataError(
        f"Expected an output that gives each pixel of {size[0]}x{size[1]} (height x width) a class, found outputs of "
        f"{shapes_of(outputs)}. Give decode= with a function that returns scores (N, classes, H, W) or classes "
        "(N, H, W)."
    )


def _scores(output: Tensor, reading: Reading, size: tuple[int, ...]) -> Tensor | None:
    if not output.is_floating_point() or (output.dim() == 3 and bool((output == output.round()).all())):
        found = output.squeeze(1) if output.dim() == 4 and output.shape[1] == 1 else output
        return found if found.dim() == 3 and _alike(tuple(found.shape[1:]), size) else None
    if output.dim() != 4:
        return None
    told = [reading.axis] if reading.tells and reading.axis is not None else []
    for axis in dict.fromkeys([*told, 1, 3]):
        last = output.movedim(axis, 1)
        if _alike(tuple(last.shape[2:]), size):
            if last.shape[1] == 1:
                return torch.cat([1 - last, last], 1) if reading.kind == "labels" else None
            return last
    return None


def _resized(one: Tensor, size: Any) -> Tensor:
    """Classes [H, W] of one image, from scores [K, h, w] or classes [h, w]."""
    if one.dim() == 2:
        return one if one.shape == size else F.interpolate(one[None, None].float(), size=size, mode="nearest")[0, 0]
    if one.shape[1:] != size:
        one = F.interpolate(one[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return one.argmax(0)


SEGMENTATION = Task(
    name="segmentation",
    truth="masks",
    figures=TASK_FIGURES["segmentation"],
    fits=lambda images: images.truth is not None and images.truth.kind == "segmentation",
    judge=_Judge,
    answers=_answers,
)
"""The class of each pixel, by the first output that gives one."""
