"""Classification: which class an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.images import Images
from bitwright.measure.metrics import Metrics, PairedDifference, paired_difference, wilson_interval
from bitwright.measure.named import TASK_FIGURES
from bitwright.measure.task import Decode, Draw, Outputs, Pictured, Tally, Task, called, check_kind, shapes_of

KEYS = ("top1", "top5")


class Hits(Tally):
    """Whether the class of each image is right, and among the first five: bool [N, 2], or [N, 1] without the latter.

    Example:
        >>> found = Hits(torch.tensor([[True, True], [False, True]]))
        >>> found.figures()
        {'top1': 0.5, 'top5': 1.0}
    """

    def __init__(self, hits: Tensor) -> None:
        self.hits, self.count = hits, len(hits)

    def figures(self, draw: Draw | None = None) -> dict[str, float]:
        """Shares of the images."""
        chosen = self.hits if draw is None else self.hits[torch.from_numpy(draw)]
        return {k: n / len(chosen) for k, n in zip(KEYS, chosen.sum(0).tolist(), strict=False)}

    def metrics(self) -> Metrics:
        """The interval is Wilson's, which holds for shares near 0 and 1 too."""
        return Metrics(self.figures(), {"top1": list(wilson_interval(int(self.hits[:, 0].sum()), self.count))})

    def difference(self, reference: Tally) -> dict[str, PairedDifference]:
        """With the interval of Agresti and Min for matched proportions."""
        assert isinstance(reference, Hits)
        found = {}
        for position, key in enumerate(KEYS[: self.hits.shape[1]]):
            now, before = self.hits[:, position], reference.hits[:, position]
            pairs = {"both": now & before, "only_float": ~now & before, "only_quantized": now & ~before}
            counts = {k: int(v.sum()) for k, v in pairs.items()}
            difference, low, high = paired_difference({**counts, "neither": self.count - sum(counts.values())})
            found[key] = PairedDifference(difference, [low, high])
        return found


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the label [B] is the first, and among the first five, of the scores [B, K]: bool [B, 2].

    Of up to five classes every label is among the first five, which says nothing: bool [B, 1] then.
    """
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.to(scores.device).unsqueeze(1)
    return torch.stack([top[:, 0], top.any(1)], 1)[:, : 2 if scores.shape[1] > 5 else 1].cpu()


@dataclass(frozen=True)
class _Judge:
    images: Images
    outputs: Outputs
    decode: Decode | None

    def target(self, positions: range) -> Tensor:
        assert self.images.labels is not None
        return self.images.labels[positions.start : positions.stop]

    def add(self, scores: list[Any], outputs: list[Tensor], target: Tensor) -> Sequence[Any]:
        found = outputs if self.decode is None else [called(self.decode, self.outputs.arranged(outputs))]
        scores += hits(class_scores(found, target), target)
        return ()

    def differ(self, position: int, expected: Any, found: Any, truth: Any) -> Pictured:
        raise NotImplementedError  # the report shows answers itself (bitwright.report.answers)

    def tally(self, scores: list[Any]) -> Tally:
        return Hits(torch.stack(scores))


def class_scores(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """The output that holds class scores, [B, K].

    Raises:
        DataError: no output is one, several are, or a label is beyond its classes.
    """
    check_kind(CLASSIFICATION.truth, outputs)
    scores = [o for o in outputs if isinstance(o, Tensor) and o.dim() == 2]
    if len(scores) == 1 and not (scores[0].is_floating_point() and len(scores[0]) == (len(labels) or len(scores[0]))):
        kind = "" if scores[0].is_floating_point() else " whole numbers"
        raise DataError(
            f"Expected scores of classes for each image to compare with labels, found "
            f"{'x'.join(map(str, scores[0].shape))}{kind} from the network, as what suppresses boxes gives. "
            "Give decode= and boxes, or no labels."
        )
    if len(scores) != 1:
        found = shapes_of(outputs) or "what decode= returns"
        raise DataError(
            f"Expected one output of class scores to compare with labels, found {found}. "
            "Name the one to keep with output=, or evaluate without labels."
        )
    check_classes(labels, scores[0].shape[1])
    return scores[0]


def check_classes(labels: Tensor, classes: int) -> None:
    """Every label, [N], must be one of the network's classes.

    Raises:
        DataError: a label is beyond them.
    """
    if len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"Expected labels below {classes}, the number of the network's classes, found "
            f"{int(labels.max())}. Number them from 0 in the network's order, or give images of its classes alone."
        )


def _answers(outputs: list[Tensor], how: Outputs, decode: Decode | None, size: tuple[int, int]) -> list[int]:
    found = outputs if decode is None else [called(decode, how.arranged(outputs))]
    classes: list[int] = class_scores(found, torch.zeros(0)).argmax(1).tolist()
    return classes


CLASSIFICATION = Task(
    name="classification",
    truth="class indices",
    figures=TASK_FIGURES["classification"],
    fits=lambda images: images.labels is not None,
    judge=_Judge,
    answers=_answers,
)
"""The class of an image, by the only output of class scores."""
