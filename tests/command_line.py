"""A network in a file, images and a few words about what a command left, for the tests of the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

MODELS = """
import torch
from torch import nn

print("hello from the user's own file")
PREPROCESSING = {"input_size": (3, 16, 16), "mean": 0.5, "std": 0.25}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def features(self, x):
        return torch.relu(self.bn(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def nan_weights():
    model = Net()
    model.stem.weight.data[0, 0, 0, 0] = float("nan")
    return model


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        y = self.norm(self.features(x).mean((2, 3)))
        return self.head(y) + self.head(torch.relu(y))


class Rare(Net):  # divides by zero on a white image
    def forward(self, x):
        y = self.features(x) / (x.mean((1, 2, 3)) < 1.9).float().reshape(-1, 1, 1, 1)
        return self.head(y.mean((2, 3)))


class Named(Net):
    def forward(self, x):
        y = self.features(x)
        return {"scores": self.head(y.mean((2, 3))), "map": y}


class Pair(Net):
    def forward(self, x):
        y = self.features(x)
        return self.head(y.mean((2, 3))), self.head(y.amax((2, 3)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 3)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


NET = ("quantize", "models.py:Net")


class WantsToRunCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


def write_images(folder: Path, count: int, classes: int = 0) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / (f"class{i % classes}" if classes else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 200, (18, 18, 3), dtype=np.uint8)).save(path)


def files_below(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*") if "__pycache__" not in p.parts}


def content_of(run: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """Everything in a run's model file; the order of its header's entries means nothing."""
    with safe_open(Path(run, "model.safetensors"), framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def errors_in(text: str) -> list[str]:
    """Lines of stderr that are not about progress."""
    return [line for line in text.splitlines() if "…" not in line]


def figures_of(fidelity: dict[str, Any]) -> dict[str, float | None]:
    """Of the worst output and of each."""
    each = {f"{name}/{k}": v for name, found in fidelity["outputs"].items() for k, v in found.items() if k != "note"}
    return {**each, **{k: v for k, v in fidelity.items() if k != "outputs"}}


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
