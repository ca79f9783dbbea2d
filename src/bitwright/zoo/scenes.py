"""Scenes of a few garments of Fashion-MNIST on a noisy ground, with the class of every pixel and a box per garment.

They are composed from the images that ship, the same for the same seed, so that no further file is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SCENE_SIDE = 64
"""Pixels of a scene's sides."""
MOST = 4
"""Garments in a scene."""
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_SMALL, _LARGE = 20, 40
_SEEN = 0.7
"""Share of a garment that those in front of it leave in sight."""


@dataclass(frozen=True)
class Scenes:
    """N scenes.

    Attributes:
        images: uint8 (N, 64, 64, 1).
        masks: uint8 (N, 64, 64): 0 for the ground, and a garment's class plus 1.
        boxes: for each scene a dict of ``boxes`` (G, 4), corners of what is seen, and ``labels`` (G,), classes from 0.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    boxes: list[dict[str, Any]]


def compose(garments: NDArray[np.uint8], labels: NDArray[Any], count: int, seed: int) -> Scenes:
    """Composes scenes.

    Args:
        garments: uint8 (M, 28, 28, 1).
        labels: their classes (M,).
        count: of scenes.
        seed: of all that is drawn.
    """
    random = np.random.default_rng(seed)
    images = np.empty((count, SCENE_SIDE, SCENE_SIDE, 1), np.uint8)
    masks = np.empty((count, SCENE_SIDE, SCENE_SIDE), np.uint8)
    boxes = []
    for i in range(count):
        image, owner, classes = _scene(garments, labels, random)
        images[i, :, :, 0] = image
        masks[i] = np.concatenate([[0], np.asarray(classes, np.int64) + 1])[owner]
        boxes.append(_boxes(owner, classes))
    return Scenes(images, masks, boxes)


def _scene(garments: NDArray[np.uint8], labels: NDArray[Any], random: np.random.Generator) -> Any:
    """The image, which garment each pixel shows (0: none), and the garments' classes."""
    level = random.uniform(0, 70) + random.uniform(-0.4, 0.4) * np.arange(SCENE_SIDE)[:, None]
    image = (level + random.normal(0, random.uniform(2, 10), (SCENE_SIDE, SCENE_SIDE))).clip(0, 255)
    owner, whole = np.zeros((SCENE_SIDE, SCENE_SIDE), np.int64), [1]
    classes: list[int] = []
    for _ in range(int(random.integers(1, MOST + 1))):
        chosen, side = int(random.integers(len(garments))), int(random.integers(_SMALL, _LARGE + 1))
        top, left = random.integers(0, SCENE_SIDE - side + 1, 2)
        small = Image.fromarray(garments[chosen, :, :, 0]).resize((side, side), Image.Resampling.BILINEAR)
        values = np.asarray(small, np.float64)
        placed = owner.copy()
        inner = placed[top : top + side, left : left + side]
        inner[values > 16] = len(classes) + 1
        seen = np.bincount(placed.ravel(), minlength=len(whole))[1 : len(whole)]
        if (seen < _SEEN * np.array(whole[1:])).any():
            continue
        owner = placed
        image[top : top + side, left : left + side][values > 16] = values[values > 16]
        classes.append(int(labels[chosen]))
        whole.append(int((values > 16).sum()))
    return image.round().astype(np.uint8), owner, classes


def _boxes(owner: NDArray[np.int64], classes: list[int]) -> dict[str, Any]:
    corners = []
    for k in range(len(classes)):
        rows, columns = (np.flatnonzero((owner == k + 1).any(axis)) for axis in (1, 0))
        corners.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": np.asarray(corners, np.float64).reshape(-1, 4),
        "labels": np.asarray(classes, np.int64),
    }
