"""Image by image: where the float and the quantized network give different answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitwright.given.images import Images
from bitwright.given.preprocessing import Preprocessing, has_channels_last
from bitwright.graph.readings import Reading, by_values
from bitwright.measure.metrics import default_names
from bitwright.report.kept import DifferingAnswers, DifferingImage, GivenAnswer

SHOWN = 12
SIDE = 112
"""Pixels of the longer side of a picture."""
SMALL = 64
"""Pictures up to this side are kept without loss."""


class Answer(NamedTuple):
    """A class and the probability that a network gave it."""

    number: int
    probability: float


class Disagreement(NamedTuple):
    """An image that the two networks answer differently."""

    position: int
    label: int | None
    before: Answer
    after: Answer
    lost: float
    """Probability that the float network's class lost."""
    output: str | None = None
    """Which output it is, where several give classes."""


@dataclass
class Answers:
    """Counts answers as an evaluation goes, and keeps the images on which they differ most.

    Only class scores of whole images are answers: outputs [B, K] that are read so. An image differs if one of them
    does.

    Attributes:
        names: of the outputs.
        readings: how each is read; told by the first values if not given.
        shown: images to keep.
    """

    names: Sequence[str] = ()
    readings: Sequence[Reading] = ()

    shown: int = SHOWN
    count: int = 0
    differing: int = 0
    both: int = 0
    only_float: int = 0
    only_quantized: int = 0
    neither: int = 0
    labelled: bool = False
    pictured: Sequence[Any] = ()
    """Images on which masks or boxes differ most (:class:`bitwright.measure.task.Pictured`)."""
    worst: list[Disagreement] = field(default_factory=list)

    def update(self, first: int, expected: Sequence[Tensor], found: Sequence[Tensor], labels: Tensor | None) -> None:
        """Adds a batch.

        Args:
            first: position of its first image.
            expected: outputs of the float network.
            found: outputs of the quantized one.
            labels: int64 [B], or None.
        """
        names = self.names or default_names(len(expected))
        readings = self.readings or [by_values(x) for x in expected]
        told = [
            _Told(name, _probabilities(how, a), _probabilities(how, b))
            for name, how, a, b in zip(names, readings, expected, found, strict=True)
            if how.kind in {"scores", "probabilities"} and a.dim() == 2
        ]
        if not told:
            return
        changed = torch.stack([t.before.argmax(1) != t.after.argmax(1) for t in told])
        self.count += changed.shape[1]
        self.differing += int(changed.any(0).sum())
        if labels is not None and len(told) == 1:
            self._count_right(told[0].before.argmax(1) == labels, told[0].after.argmax(1) == labels)
        for (name, p, q), images in zip(told, changed, strict=True):
            output = name if len(told) > 1 else None
            for i in images.nonzero().flatten().tolist():
                label = None if labels is None else int(labels[i])
                self.worst.append(_disagreement(first + i, label, p[i], q[i], output))
        self.worst = sorted(self.worst, key=lambda d: -d.lost)[: self.shown]

    def _count_right(self, right: Tensor, still: Tensor) -> None:
        self.labelled = True
        self.both += int((right & still).sum())
        self.only_float += int((right & ~still).sum())
        self.only_quantized += int((~right & still).sum())
        self.neither += int((~right & ~still).sum())

    def facts(self, images: Images, *, pictures: bool) -> DifferingAnswers | None:
        """What the report keeps; None where the networks give no class scores.

        Args:
            images: that were evaluated.
            pictures: whether thumbnails are embedded.
        """
        if not self.count:
            return None
        names = class_names(images)
        pictures = pictures and images.seen(0).dim() == 3  # videos, signals and vectors have none
        kept = ("both", "only_float", "only_quantized", "neither")
        return DifferingAnswers(
            count=self.count,
            differing=self.differing,
            labelled={k: getattr(self, k) for k in kept} if self.labelled else None,
            classes={str(i): names[i] for d in self.worst for i in _classes(d) if i in names},
            pictures=pictures,
            shown=[
                DifferingImage(
                    name=images.names[d.position],
                    label=d.label,
                    reference=GivenAnswer(number=d.before.number, probability=round(d.before.probability, 4)),
                    quantized=GivenAnswer(number=d.after.number, probability=round(d.after.probability, 4)),
                    output=d.output,
                    picture=picture(images.seen(d.position), images.preprocessing) if pictures else None,
                )
                for d in self.worst
            ],
        )


def _classes(found: Disagreement) -> list[int]:
    return [i for i in (found.label, found.before.number, found.after.number) if i is not None]


class _Told(NamedTuple):
    """Probabilities of the classes of each image, [B, K], by one output of both networks."""

    name: str
    before: Tensor
    after: Tensor


def _probabilities(how: Reading, output: Tensor) -> Tensor:
    """[B, K], of an output that is read as scores or probabilities."""
    found = how.log_probabilities(output)
    assert found is not None
    return found.exp().squeeze(-2).cpu()


def _disagreement(position: int, label: int | None, p: Tensor, q: Tensor, output: str | None) -> Disagreement:
    one, other = int(p.argmax()), int(q.argmax())
    before, after = Answer(one, float(p[one])), Answer(other, float(q[other]))
    return Disagreement(position, label, before, after, float(p[one] - q[one]), output)


def class_names(images: Images) -> dict[int, str]:
    """Names of classes by index, where images lie in one folder a class.

    Example:
        >>> from bitwright.given.images import load_images
        >>> images = load_images(torch.zeros(2, 3, 8, 8), None).labelled([0, 1])
        >>> images.names = ["cat/1.png", "dog/1.png"]
        >>> class_names(images)
        {0: 'cat', 1: 'dog'}
    """
    if images.labels is None or any("/" not in name for name in images.names):
        return {}
    found: dict[int, str] = {}
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        folder = name.rpartition("/")[0]
        if found.setdefault(label, folder) != folder:
            return {}
    return found if len(set(found.values())) == len(found) else {}


def picture(image: Tensor, how: Any) -> str:
    """A preprocessed image [C, H, W] or [H, W, C] as a small picture: a ``data:`` address."""
    return encoded(seen(image, how))


def seen(image: Tensor, how: Any) -> Image.Image:
    """A preprocessed image [C, H, W] or [H, W, C] for people.

    Pixels are those that the network saw. Without a known preprocessing they are stretched from black to white.
    """
    values = image.detach().float()
    values = values.movedim(-1, 0) if has_channels_last(values.shape) else values
    if isinstance(how, Preprocessing):
        mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (how.mean, how.std))
        values = values * std + mean
        values = values.flip(0) if how.channel_order == "bgr" else values
    else:
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    values = values[:3] if len(values) >= 3 else values[:1]
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def encoded(made: Image.Image, *, lossless: bool = False) -> str:
    """A picture as a ``data:`` address, made small: PNG if tiny or lossless, otherwise JPEG."""
    if max(made.size) > SIDE:
        made.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    lossless = lossless or max(made.size) <= SMALL
    made.save(stream, "PNG", optimize=True) if lossless else made.save(stream, "JPEG", quality=82, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
