"""DeepLabV3+ on MobileNetV2, with the names of parameters that DeepLabV3Plus-Pytorch has.

    bitwright quantize examples/deeplabv3plus.py:voc@weights.pth photos/ --evaluate images/ --labels masks/

Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", output stride 16;
Sandler et al. 2018, "MobileNetV2".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

PREPROCESSING = {"input_size": 513, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0}
# Expansion, channels, blocks and stride of each stage; the stride of the last but one becomes a dilation.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def layer(before: int, after: int, kernel: int = 1, **how: int) -> nn.Sequential:
    """Convolution, norm and clamping."""
    return nn.Sequential(nn.Conv2d(before, after, kernel, bias=False, **how), nn.BatchNorm2d(after), nn.ReLU6())


class Inverted(nn.Module):
    """A block that is padded before its first convolution."""

    def __init__(self, before: int, after: int, stride: int, dilation: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        depthwise = layer(inner, inner, 3, stride=stride, dilation=dilation, groups=inner)
        first = [] if expansion == 1 else [layer(before, inner)]
        self.conv = nn.Sequential(*first, depthwise, nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after))
        self.adds, self.padding = stride == 1 and before == after, dilation

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W]."""
        y = self.conv(F.pad(x, [self.padding] * 4))
        return x + y if self.adds else y


def blocks() -> nn.Sequential:
    """All of MobileNetV2 but its last layer."""
    found: list[nn.Module] = [layer(3, 32, 3, stride=2, padding=1)]
    before, reached, dilation = 32, 2, 1
    for expansion, after, count, stride in STAGES:
        first = dilation
        if reached == 16:
            dilation, stride = dilation * stride, 1
        reached *= stride
        for i in range(count):
            found.append(Inverted(before, after, stride if i == 0 else 1, first if i == 0 else dilation, expansion))
            before = after
    return nn.Sequential(*found)


class DeepLabV3Plus(nn.Module):
    """Scores of classes [B, K, H, W] for images [B, 3, H, W]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        features = blocks()
        self.backbone = nn.ModuleDict({"low_level_features": features[:4], "high_level_features": features[4:]})
        near = nn.Sequential(nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        last = [
            nn.Conv2d(304, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, classes, 1),
        ]
        parts = {"project": near, "aspp": ASPP(320, [6, 12, 18]), "classifier": nn.Sequential(*last)}
        self.classifier = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Scores in the size of the images."""
        low = self.backbone["low_level_features"](x)
        far = self.classifier["aspp"](self.backbone["high_level_features"](low))
        near = self.classifier["project"](low)
        far = F.interpolate(far, near.shape[2:], mode="bilinear", align_corners=False)
        scores = self.classifier["classifier"](torch.cat([near, far], 1))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


def voc() -> nn.Module:
    """The 21 classes of Pascal VOC."""
    return DeepLabV3Plus(21)
