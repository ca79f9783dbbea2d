"""A network of your own: name it as ``file.py:callable``.

    bitwright quantize examples/own_model.py:small_net zoo:fashion --weights 4

The callable takes no arguments and returns an ``nn.Module`` with its weights loaded. ``PREPROCESSING`` says how an
image file becomes the network's input; a function ``preprocess(image)`` that returns a tensor would do as well.
"""

from __future__ import annotations

from torch import Tensor, nn

PREPROCESSING = {"input_size": (1, 28, 28), "mean": 0.286, "std": 0.353}


class SmallNet(nn.Module):
    """Three convolutions and a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.Conv2d(16, 32, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, 10] of images [B, 1, 28, 28]."""
        return self.head(self.features(images).mean((2, 3)))


def small_net() -> nn.Module:
    """The network. Yours loads its weights here, or takes them as in ``...:small_net@weights.pt``."""
    return SmallNet()
