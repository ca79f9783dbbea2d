"""A residual network of 24,000 weights that learns in seconds what the zoo's convolutional network answers.

It is small enough to compare all recipes on, with several seeds, in minutes:

    python -m benchmarks.units --model benchmarks/small_network.py:small_residual --samples 256 --steps 100
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.given.images import load_images
from bitwright.given.models import load_model

PREPROCESSING = {"input_size": (1, 28, 28), "mean": 0.286, "std": 0.353}
BATCH, RATE = 64, 5e-3


class _Residual(nn.Module):
    def __init__(self, given: int, made: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(made) for _ in range(2))
        self.short: nn.Module = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.short(x) + self.norms[1](self.second(inside)))


class SmallNetwork(nn.Module):
    """Images [N, 1, 28, 28] to ten scores."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2))
        self.blocks = nn.Sequential(*(_Residual(a * width, b * width, stride) for a, b, stride in widths))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, [N, 10]."""
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


def small_residual(steps: int = 300) -> nn.Module:
    """Trained on the calibration images, which have no labels, towards the zoo network's probabilities."""
    tutor = load_model("zoo:fashion_cnn")
    assert isinstance(tutor.module, nn.Module)
    images = load_images("zoo:fashion", tutor.preprocessing)
    x = images.batch(range(len(images)))
    with torch.no_grad():
        wanted = torch.cat([tutor.module(part) for part in x.split(BATCH)]).log_softmax(1)
    made = SmallNetwork()
    optimizer = torch.optim.AdamW(made.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        found = made(x[chosen]).log_softmax(1)
        optimizer.zero_grad()
        functional.kl_div(found, wanted[chosen], log_target=True, reduction="batchmean").backward()
        optimizer.step()
        schedule.step()
    return made.eval()
