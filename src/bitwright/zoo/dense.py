"""The zoo's networks for scenes: one gives each pixel a class, one gives boxes; both are greyscale, 1x64x64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.zoo.networks import CLASS_COUNT, ConvNorm, InvertedResidual

STRIDE = 4
"""Pixels between the places where the detector looks for the middle of a garment."""
LEAST_SCORE, MOST_BOXES, SAME = 0.05, 30, 0.5


class Backbone(nn.Module):
    """Inverted residuals down to 8x8, and back up to 16x16 with what was seen there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, kernel=3, stride=2, act=nn.Hardswish)
        self.stage1 = nn.Sequential(
            InvertedResidual(16, 32, nn.ReLU6, stride=2, expansion=3), InvertedResidual(32, 32, nn.ReLU6, expansion=3)
        )
        self.stage2 = nn.Sequential(
            InvertedResidual(32, 64, nn.Hardswish, stride=2, expansion=3),
            InvertedResidual(64, 64, nn.Hardswish, expansion=3),
            InvertedResidual(64, 64, nn.SiLU, expansion=3, squeeze=True),
        )
        self.up = Up(64, 32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 16 channels at 32x32 and 64 at 16x16, of images (N, 1, 64, 64)."""
        half = self.stem(x)
        quarter = self.stage1(half)
        return half, self.up(self.stage2(quarter), quarter)


class Up(nn.Module):
    """Doubles the size, and joins what was seen at that size before."""

    def __init__(self, below: int, beside: int, channels: int) -> None:
        super().__init__()
        self.mix = ConvNorm(below + beside, channels, act=nn.Hardswish)
        self.near = ConvNorm(channels, channels, kernel=3, groups=channels, act=nn.Hardswish)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        """Return the joined maps [B, channels, 2h, 2w], for maps [B, below, h, w] and [B, beside, 2h, 2w]."""
        joined: Tensor = self.near(self.mix(torch.cat([F.interpolate(x, scale_factor=2.0), beside], 1)))
        return joined


class FashionSegmenter(nn.Module):
    """The class of each pixel: 0 for the ground, then the ten garments.

    Example:
        >>> FashionSegmenter().eval()(torch.zeros(2, 1, 64, 64)).shape
        torch.Size([2, 11, 64, 64])
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up = Up(64, 16, 32)
        self.head = nn.Conv2d(32, CLASS_COUNT + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, 11, 64, 64), of images (N, 1, 64, 64)."""
        half, quarter = self.backbone(x)
        scores = self.head(self.up(quarter, half))
        return F.interpolate(scores, scale_factor=2.0, mode="bilinear", align_corners=False)


class FashionDetector(nn.Module):
    """Scores of ten garments and the distances to a box's sides, every four pixels; :func:`decode` makes boxes.

    Example:
        >>> {k: tuple(v.shape) for k, v in FashionDetector().eval()(torch.zeros(2, 1, 64, 64)).items()}
        {'scores': (2, 10, 16, 16), 'sides': (2, 4, 16, 16)}
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.classes = nn.Sequential(InvertedResidual(64, 64, nn.Hardswish, expansion=2), nn.Conv2d(64, CLASS_COUNT, 1))
        self.box = nn.Sequential(InvertedResidual(64, 64, nn.Hardswish, expansion=2), nn.Conv2d(64, 4, 1))
        nn.init.constant_(self.classes[1].bias, -4.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return logits (N, 10, 16, 16) and distances in pixels (N, 4, 16, 16): left, top, right, bottom."""
        _, quarter = self.backbone(x)
        return {"scores": self.classes(quarter), "sides": F.softplus(self.box(quarter)) * STRIDE}


def middles(size: tuple[int, int]) -> Tensor:
    """The x and y of the middle of each place, in pixels of the image: (2, H, W)."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    return (torch.stack([x, y]) + 0.5) * STRIDE


def corners(sides: Tensor) -> Tensor:
    """Corners x1, y1, x2, y2 (N, 4, H, W) of boxes whose sides are that far from the middle of each place."""
    middle = middles((sides.shape[2], sides.shape[3])).to(sides.device)
    return torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], 1)


def decode(outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of each image: the best of those that overlap by more than a half (of one class)."""
    scores, boxes = outputs["scores"].float().sigmoid().flatten(2), corners(outputs["sides"].float()).flatten(2)
    found = []
    for score, box in zip(scores, boxes, strict=True):
        labels, places = (score > LEAST_SCORE).nonzero(as_tuple=True)
        order = score[labels, places].argsort(descending=True)[:300]
        labels, places = labels[order], places[order]
        kept = _best(box.T[places], labels)
        found.append({"boxes": box.T[places][kept], "scores": score[labels, places][kept], "labels": labels[kept]})
    return found


def _best(boxes: Tensor, labels: Tensor) -> Tensor:
    """Positions of boxes that no better one of their class overlaps by more than a half; the best come first."""
    low, high = torch.max(boxes[:, None, :2], boxes[None, :, :2]), torch.min(boxes[:, None, 2:], boxes[None, :, 2:])
    shared, area = (high - low).clamp_min(0).prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    same = (shared > SAME * (area[:, None] + area - shared)) & (labels[:, None] == labels)
    kept: list[int] = []
    for i in range(len(boxes)):
        if not same[i, kept].any() and len(kept) < MOST_BOXES:
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


DENSE_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "fashion_segmenter": FashionSegmenter,
    "fashion_detector": FashionDetector,
}
DECODERS: dict[str, Callable[[Any], Any]] = {"fashion_detector": decode}
"""What turns the outputs of a network into boxes, by its name."""
