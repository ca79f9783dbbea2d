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

from bitwright.data import Images
from bitwright.preprocessing import Preprocessing

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


@dataclass
class Answers:
    """Counts answers as an evaluation goes, and keeps the images on which they differ most.

    Only class scores are answers: networks without exactly one output [B, K] are passed over.
    """

    shown: int = SHOWN
    count: int = 0
    differing: int = 0
    both: int = 0
    only_float: int = 0
    only_quantized: int = 0
    neither: int = 0
    labelled: bool = False
    worst: list[Disagreement] = field(default_factory=list)

    def update(self, first: int, expected: Sequence[Tensor], found: Sequence[Tensor], labels: Tensor | None) -> None:
        """Adds a batch.

        Args:
            first: position of its first image.
            expected: outputs of the float network.
            found: outputs of the quantized one.
            labels: int64 [B], or None.
        """
        theirs, ours = _scores(expected), _scores(found)
        if theirs is None or ours is None:
            return
        p, q = theirs.float().softmax(1).cpu(), ours.float().softmax(1).cpu()
        a, b = p.argmax(1), q.argmax(1)
        self.count += len(a)
        self.differing += int((a != b).sum())
        if labels is not None:
            self.labelled = True
            right, still = a == labels, b == labels
            self.both += int((right & still).sum())
            self.only_float += int((right & ~still).sum())
            self.only_quantized += int((~right & still).sum())
            self.neither += int((~right & ~still).sum())
        for i in (a != b).nonzero().flatten().tolist():
            one, other = int(a[i]), int(b[i])
            self.worst.append(
                Disagreement(
                    first + i,
                    None if labels is None else int(labels[i]),
                    Answer(one, float(p[i, one])),
                    Answer(other, float(q[i, other])),
                    float(p[i, one] - q[i, one]),
                )
            )
        self.worst = sorted(self.worst, key=lambda d: -d.lost)[: self.shown]

    def facts(self, images: Images, *, pictures: bool) -> dict[str, Any] | None:
        """What the report keeps; None where the networks give no class scores.

        Args:
            images: that were evaluated.
            pictures: whether thumbnails are embedded.
        """
        if not self.count:
            return None
        names = class_names(images)
        kept = ("both", "only_float", "only_quantized", "neither")
        return {
            "count": self.count,
            "differing": self.differing,
            "labelled": {k: getattr(self, k) for k in kept} if self.labelled else None,
            "classes": {str(i): names[i] for d in self.worst for i in _classes(d) if i in names},
            "pictures": pictures,
            "shown": [
                {
                    "name": images.names[d.position],
                    "label": d.label,
                    "float": {"class": d.before.number, "probability": round(d.before.probability, 4)},
                    "quantized": {"class": d.after.number, "probability": round(d.after.probability, 4)},
                    "picture": picture(images[d.position], images.preprocessing) if pictures else None,
                }
                for d in self.worst
            ],
        }


def _classes(found: Disagreement) -> list[int]:
    return [i for i in (found.label, found.before.number, found.after.number) if i is not None]


def _scores(outputs: Sequence[Tensor]) -> Tensor | None:
    scores = [o for o in outputs if o.dim() == 2 and o.shape[1] > 1]
    return scores[0] if len(scores) == 1 else None


def class_names(images: Images) -> dict[int, str]:
    """Names of classes by index, where images lie in one folder a class.

    Example:
        >>> from bitwright.data import load_images
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
    """A preprocessed image [C, H, W] as a small picture: a ``data:`` address, PNG if tiny and JPEG if not.

    Pixels are those that the network saw. Without a known preprocessing they are stretched from black to white.
    """
    values = image.detach().float()
    if isinstance(how, Preprocessing):
        mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (how.mean, how.std))
        values = values * std + mean
    else:
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    values = values[:3] if len(values) >= 3 else values[:1]
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    if max(made.size) > SIDE:
        made.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    lossless = max(made.size) <= SMALL
    made.save(stream, "PNG", optimize=True) if lossless else made.save(stream, "JPEG", quality=82, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
