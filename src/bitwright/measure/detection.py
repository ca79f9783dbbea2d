"""Detection: where objects are, and of which class; COCO's average precision, computed by faster-coco-eval.

Boxes that a network finds are corners in pixels of its input. They are taken back to the image through the
preprocessing, cut at its borders, and compared with the truth in the image's own pixels, as COCO does.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from bitwright.errors import DataError, UsageError
from bitwright.given.images import Images
from bitwright.given.named_boxes import named_boxes
from bitwright.given.text import short
from bitwright.given.truth import Boxes, Truth, TruthArray
from bitwright.measure.boxes import are_rows_of_four
from bitwright.measure.metrics import Part
from bitwright.measure.named import TASK_FIGURES
from bitwright.measure.task import Decode, Draw, Outputs, Pictured, Tally, Task, called, check_kind, shapes_of
from bitwright.words import plural

BOX_FORMS = "a list of {'boxes', 'scores', 'labels'} per image, or (N, M, 6) of x1, y1, x2, y2, score, class"
MOST = 100
"""Boxes per image and class that count, those of the highest scores, as in COCO."""
SIZES = ("small", "medium", "large")
MANY = 20_000
"""Images times classes, above which fewer samples are drawn: a sample takes a second there."""
BROKEN = 0.1
"""Share of boxes without an area, from which on they are told of: decoders that cut boxes leave a few."""
SHARES = (-0.5, 1.5)
"""Between which all corners lie that are shares of the input's sides, some of them beyond its borders."""
SURE = 0.3
"""The score above which boxes are drawn."""


@dataclass(frozen=True)
class Found:
    """Boxes that a network found in an image: corners (M, 4) in pixels of the image, scores (M,), classes (M,).

    Beside them, ``broken`` more had a class, but corners that make no box or a score that is no number, and ``beyond``
    more are not among those of the highest scores that count.
    """

    corners: TruthArray
    scores: TruthArray
    labels: TruthArray
    broken: int = 0
    beyond: int = 0

    def above(self, score: float) -> Found:
        """Those of a higher score."""
        kept = self.scores > score
        return Found(self.corners[kept], self.scores[kept], self.labels[kept])

    def of(self, label: int) -> Found:
        """Those of one class."""
        kept = self.labels == label
        return Found(self.corners[kept], self.scores[kept], self.labels[kept])

    def counted(self) -> Found:
        """Those that count, :data:`MOST` of each class: a decoder that suppresses none may return thousands."""
        order = np.argsort(-self.scores, kind="stable")
        kept = np.zeros(len(order), bool)
        for label in np.unique(self.labels):
            kept[order[self.labels[order] == label][:MOST]] = True
        beyond = self.beyond + int((~kept).sum())
        return Found(self.corners[kept], self.scores[kept], self.labels[kept], self.broken, beyond)

    def of_shares(self, size: tuple[int, int]) -> Found:
        """Those whose corners are shares of an input of this width and height, in its pixels."""
        return replace(self, corners=self.corners * np.tile(size, 2))


def _are_shares(found: Sequence[Found]) -> bool:
    """Whether corners of boxes are shares of the input's sides, not pixels: none lies beyond."""
    corners = np.concatenate([f.corners for f in found])
    return len(corners) > 0 and bool(((corners >= SHARES[0]) & (corners <= SHARES[1])).all())


def _alone(some: Found, others: Found) -> int:
    """How many boxes have none of their class among others that overlaps by a half."""
    return sum(_alone_in_class(some.of(label), others.of(label)) for label in np.unique(some.labels))


def _alone_in_class(some: Found, others: Found) -> int:
    low = np.maximum(some.corners[:, None, :2], others.corners[None, :, :2])
    high = np.minimum(some.corners[:, None, 2:], others.corners[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    sizes = [(f.corners[:, 2:] - f.corners[:, :2]).prod(1) for f in (some, others)]
    near = shared >= 0.5 * (sizes[0][:, None] + sizes[1] - shared)
    return int((~near.any(1)).sum())


class AveragePrecision(Tally):
    """Average precision over IoU 0.50 to 0.95 in steps of 0.05, at 0.50, at 0.75, and by size of the object.

    Sizes are those of COCO: below 32x32 pixels of the image, up to 96x96, and above. The mean runs over the classes
    that the truth has.
    """

    def __init__(self, truth: Sequence[Boxes], found: Sequence[Found], names: dict[int, str]) -> None:
        self.count, self.truth, self.found, self.names = len(truth), truth, found, names
        self.resamples = 200 if self.count * len(self.classes) <= MANY else 100

    @cached_property
    def classes(self) -> list[int]:
        """Those of the truth, in order."""
        return sorted({int(c) for boxes in self.truth for c in boxes.labels[~boxes.crowd]})

    @cached_property
    def _evaluated(self) -> Any:
        """COCO's evaluation, image by image."""
        from faster_coco_eval import COCO, COCOeval_faster

        wanted, given = COCO(self._coco_truth()), self._coco_found()
        answers = wanted.loadRes(given) if given else COCO({**self._coco_truth(), "annotations": []})
        made = COCOeval_faster(wanted, answers, "bbox", separate_eval=True)
        made.params.maxDets, made.params.catIds = [MOST], self.classes
        made.evaluate()
        return made

    def _coco_truth(self) -> dict[str, Any]:
        annotations: list[dict[str, Any]] = []
        for image, boxes in enumerate(self.truth):
            for row in range(len(boxes)):
                x1, y1, x2, y2 = boxes.corners[row].tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": int(boxes.labels[row]),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": float(boxes.areas[row]),
                        "iscrowd": int(boxes.crowd[row]),
                    }
                )
        images = [{"id": i} for i in range(self.count)]
        return {"images": images, "annotations": annotations, "categories": [{"id": c} for c in self.classes]}

    def _coco_found(self) -> list[dict[str, Any]]:
        known = set(self.classes)
        return [
            {
                "image_id": image,
                "category_id": int(label),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": float(score),
            }
            for image, found in enumerate(self.found)
            for box, score, label in zip(found.corners.tolist(), found.scores, found.labels, strict=True)
            if int(label) in known
        ]

    def _precision(self, draw: Draw | None = None) -> Any:
        """Precision [10 thresholds, 101 recalls, K classes, 4 areas], -1 where there is nothing to find."""
        from faster_coco_eval import faster_eval_api_cpp as core

        images = np.arange(self.count) if draw is None else draw
        found = core.COCOevalAccumulate(self._evaluated.params, self._by_image[:, :, images].ravel().tolist())
        return np.asarray(found["precision"]).reshape(found["counts"])[..., 0]

    @cached_property
    def _by_image(self) -> Any:
        """Evaluations as COCO's library holds them: [K classes, areas, N images]."""
        made = self._evaluated
        each = np.empty(len(made._evalImgs_cpp), object)
        each[:] = made._evalImgs_cpp
        return each.reshape(len(self.classes), len(made.params.areaRng), self.count)

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """Those of all objects, and by their size."""
        if not self.classes:
            return {}
        found = self._precision(draw)
        wanted = {"map": found[..., 0], "map50": found[0, ..., 0], "map75": found[5, ..., 0]}
        wanted |= {f"map_{name}": found[..., 1 + i] for i, name in enumerate(SIZES)}
        return {k: float(v[v > -1].mean()) for k, v in wanted.items() if (v > -1).any()}

    def parts(self) -> list[Part]:
        """Average precision of each class, with its number of objects."""
        if not self.classes:
            return []
        found = self._precision()
        counts = np.concatenate([b.labels[~b.crowd] for b in self.truth])
        return [
            Part(c, self.names.get(c), int((counts == c).sum()), float(found[:, :, k, 0].mean()))
            for k, c in enumerate(self.classes)
        ]

    def notes(self) -> list[str]:
        """A hint where hardly a box is right: most often classes or coordinates are numbered in another way."""
        if not self.classes:
            return ["No box of the labels counts: all are crowds or too difficult."]
        broken = self._broken()
        if not any(len(f.labels) for f in self.found):
            return broken or ["The network found no box in any image."]
        return broken + self._doubts()

    def _doubts(self) -> list[str]:
        if self.figures().get("map50", 1.0) >= 0.01:
            return []
        given = {int(c) for f in self.found for c in f.labels}
        if not given & set(self.classes):
            wanted, found = (", ".join(map(str, sorted(c)[:5])) for c in (self.classes, given))
            return [
                f"No box is right: classes of the labels are {wanted}, those that the network finds {found}. Say with "
                f"class_map= which of its classes each is, such as {_by_class(self.names, sorted(given))}."
            ]
        first = self.names.get(0, "the first class")
        return [
            f"Hardly a box is right. Check that class 0 is {first} for the network too (class_map= says otherwise), "
            "and that boxes are corners x1, y1, x2, y2, x before y, in pixels of the network's input (decode=)."
        ]

    def _broken(self) -> list[str]:
        broken = sum(f.broken for f in self.found)
        given = broken + sum(len(f.labels) + f.beyond for f in self.found)
        if broken <= BROKEN * given:
            return []
        return [
            f"{broken} of {plural(given, 'box', 'boxes')} from the network are left out: corners are x1, y1, x2, y2 "
            "with x1 < x2 and y1 < y2, and all numbers finite."
        ]


class _Judge:
    def __init__(self, images: Images, outputs: Outputs, decode: Decode | None) -> None:
        assert images.truth is not None
        _check_library()
        self.images, self.outputs, self.decode = images, outputs, decode
        self.truth: Truth = images.truth
        self._shares: bool | None = None

    def target(self, positions: range) -> range:
        return positions

    def add(self, scores: list[Any], outputs: list[Tensor], target: range) -> Sequence[Any]:
        found = predictions(outputs, self.outputs, self.decode, len(target))
        if self._in_shares(found):
            found = [f.of_shares(self.images.placement(i).input) for f, i in zip(found, target, strict=True)]
        scores += (in_image := [self._in_image(f, i) for f, i in zip(found, target, strict=True)])
        return in_image

    def _in_shares(self, found: Sequence[Found]) -> bool:
        """Whether boxes are shares of the input, as the first ones tell."""
        if self._shares is None and any(len(f.labels) for f in found):
            self._shares = _are_shares(found)
            if self._shares:
                warnings.warn(
                    "All boxes lie between 0 and 1: they are taken as shares of the input's width and height.",
                    stacklevel=2,
                )
        return bool(self._shares)

    def differ(self, position: int, expected: Found, found: Found, truth: int) -> Pictured:
        """By the share of sure boxes that only one of the networks has."""
        sure = [f.above(SURE) for f in (expected, found)]
        alone = sum(_alone(a, b) for a, b in (sure, sure[::-1]))
        count, place = sum(len(f.labels) for f in sure), self.images.placement(position)
        drawn = {"float": sure[0], "quantized": sure[1], "labels": self.truth.items[position]}
        marks = {k: Boxes.of(place.to_input(b.corners), b.labels) for k, b in drawn.items()}
        return Pictured(
            position, alone / max(count, 1), f"{alone} of {plural(count, 'box', 'boxes')} without a counterpart", marks
        )

    def _in_image(self, found: Found, position: int) -> Found:
        known = self.truth.known
        if known is not None and len(found.labels) and int(found.labels.max()) >= known:
            raise DataError(
                f"Expected classes below {known}, as the {self.truth.said} have, found {int(found.labels.max())} from "
                f"the network. Say which of its classes each is: {_numbered_from_one(self.truth)} if it counts from 1, "
                "class_map='ids' if it has the numbers of a COCO file."
            )
        found = found.counted()
        return replace(found, corners=self.images.placement(position).to_image(found.corners))

    def tally(self, scores: list[Any]) -> Tally:
        return AveragePrecision(self.truth.items, scores, dict(self.truth.names))


def _by_class(names: Mapping[int, str], numbers: Sequence[int]) -> str:
    """A class map as JSON that gives the first classes these numbers, for messages.

    Example:
        >>> _by_class({3: "car", 7: "truck"}, [1, 2])
        '{"car": 1, "truck": 2}'
    """
    pairs = list(zip((names[k] for k in sorted(names)), numbers, strict=False))
    more = ", ..." if len(pairs) > 3 else ""
    return f"{{{', '.join(f'{json.dumps(name)}: {n}' for name, n in pairs[:3])}{more}}}" if pairs else '{"7": 0, ...}'


def _numbered_from_one(truth: Truth) -> str:
    return f"class_map= with {_by_class(truth.names, range(1, 1 + len(truth.names)))}"


def _check_library() -> None:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Expected faster-coco-eval, which computes average precision, found none. Run: pip install faster-coco-eval"
        ) from error


def predictions(outputs: list[Tensor], how: Outputs, decode: Decode | None, count: int) -> list[Found]:
    """The boxes of ``count`` images, in pixels of the network's input.

    Raises:
        DataError: the outputs are no boxes, or what ``decode`` returns is not.
    """
    decoded = _boxes_among(outputs, how, count) if decode is None else called(decode, how.arranged(outputs))
    if isinstance(decoded, Tensor | np.ndarray):
        rows = _array(decoded)
        if rows.ndim != 3 or rows.shape[2] != 6 or len(rows) != count:
            raise _no_boxes(f"an array {rows.shape}", decode)
        return [_rows(r) for r in rows]
    if not isinstance(decoded, list | tuple) or len(decoded) != count:
        many = f" of {len(decoded)}" if isinstance(decoded, list | tuple) else ""
        raise _no_boxes(f"{type(decoded).__name__}{many} for {count} images", decode)
    return [_one(item, decode) for item in decoded]


def _boxes_among(outputs: list[Tensor], how: Outputs, count: int) -> list[Any]:
    """Boxes of a network that decodes them itself."""
    names = how.names or map(str, range(len(outputs)))
    found = named_boxes(dict(zip(names, outputs, strict=False)), count)
    if found is not None:
        return found
    check_kind(DETECTION.truth, outputs)
    raise DataError(
        f"Expected boxes from the network to compare with labels, found outputs of {shapes_of(outputs)}. Give decode= "
        f"with a function that returns {BOX_FORMS}."
    )


def _one(item: Any, decode: Decode | None) -> Found:
    if isinstance(item, Tensor | np.ndarray):
        rows = _array(item)
        if rows.ndim != 2 or rows.shape[1] != 6:
            raise _no_boxes(f"an array {rows.shape} for an image", decode)
        return _rows(rows)
    if not isinstance(item, dict) or not {"boxes", "scores", "labels"} <= item.keys():
        keys = f" of {', '.join(map(str, item)) or 'nothing'}" if isinstance(item, dict) else ""
        raise _no_boxes(f"{type(item).__name__}{keys} for an image", decode)
    corners, scores, labels = (_array(item[k]) for k in ("boxes", "scores", "labels"))
    if not are_rows_of_four(corners, scores.size) or labels.size != scores.size:
        raise _no_boxes(f"boxes {corners.shape}, scores {scores.shape} and labels {labels.shape}", decode)
    return _kept(corners.reshape(-1, 4), scores.reshape(-1), labels.reshape(-1))


def _rows(rows: TruthArray) -> Found:
    return _kept(rows[:, :4], rows[:, 4], rows[:, 5])


def _kept(corners: TruthArray, scores: TruthArray, labels: TruthArray) -> Found:
    """Without rows that only fill up an array: a score of 0 or less, or a negative class; and without broken ones."""
    meant = ~((scores <= 0) | (labels < 0))
    parts = labels[meant & (labels % 1 != 0)]
    if len(parts):
        raise DataError(f"Expected whole numbers as classes, found {parts[0]:g} among those of the boxes. Rows are x1, "
                        "y1, x2, y2, score, class.")  # fmt: skip
    there = meant & np.isfinite(scores) & np.isfinite(corners).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
    kept = Found(corners[there].astype(np.float64), scores[there].astype(np.float64), labels[there].astype(np.int64))
    return replace(kept, broken=int(meant.sum() - there.sum()))


def _array(values: Any) -> TruthArray:
    try:
        return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"Expected numbers as boxes, scores and labels, found others ({short(error)}).") from error


def _no_boxes(found: str, decode: Decode | None) -> DataError:
    who = "the network" if decode is None else "decode"
    return DataError(f"Expected {BOX_FORMS}, found {found} from {who}.")


def _answers(outputs: list[Tensor], how: Outputs, decode: Decode | None, size: tuple[int, int]) -> list[Boxes]:
    """Boxes that the network is sure of, cut at the borders of its input."""
    found = predictions(outputs, how, decode, len(outputs[0]))
    found = [each.of_shares(size[::-1]) for each in found] if _are_shares(found) else found
    sure = [each.above(SURE) for each in found]
    inside = [each.corners.clip(0, (*size[::-1], *size[::-1])) for each in sure]
    return [Boxes.of(corners, each.labels) for corners, each in zip(inside, sure, strict=True)]


DETECTION = Task(
    name="detection",
    truth="boxes",
    figures=TASK_FIGURES["detection"],
    fits=lambda images: images.truth is not None and images.truth.kind == "detection",
    judge=_Judge,
    answers=_answers,
)
"""Boxes with classes and scores, from the network or from a function that decodes its outputs."""
