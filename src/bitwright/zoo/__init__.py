"""Networks and images that ship with bitwright, so that every example runs without a download.

Example:
    >>> sorted(NETWORKS)
    ['fashion_cnn', 'fashion_vit']
    >>> images("fashion")[0].shape
    (1024, 28, 28, 1)
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["IMAGES", "NETWORKS", "images", "network", "preprocessing"]

NETWORKS: dict[str, str] = {
    "fashion_cnn": "inverted residuals with squeeze-excite for Fashion-MNIST, 1x28x28",
    "fashion_vit": "vision transformer for Fashion-MNIST, 1x28x28",
}
IMAGES: dict[str, str] = {
    "fashion": "1,024 unlabelled images from the training split of Fashion-MNIST, for calibration",
    "fashion-test": "the 10,000 labelled test images of Fashion-MNIST",
}

_FOLDER = Path(__file__).parent
_IMAGE_FILES = {"fashion": "fashion_calibration.npz", "fashion-test": "fashion_test.npz"}


def _suggestion(name: str, known: dict[str, str]) -> str:
    nearest = difflib.get_close_matches(name, known, cutoff=0.5)
    return f"Did you mean {' or '.join(nearest)}?" if nearest else f"Choose from {', '.join(known)}."


def _check_network(name: str) -> None:
    if name not in NETWORKS:
        raise ModelError(f"Expected a zoo network, found {name!r}. {_suggestion(name, NETWORKS)}")


def network(name: str) -> nn.Module:
    """Build a zoo network with its trained weights, in eval mode and float32.

    Raises:
        ModelError: the name is unknown, or the file of weights is missing.
    """
    _check_network(name)
    from safetensors.torch import load_file

    from bitwright.zoo.networks import BUILDERS

    path = _FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(f"Expected weights in {path}, found none. Run: python -m bitwright.zoo.train --only {name}")
    model = BUILDERS[name]()
    model.load_state_dict(load_file(str(path)))
    return model.eval()


def preprocessing(name: str) -> dict[str, Any]:
    """Return how a zoo network wants its images; `mean` and `std` apply to values in 0..1.

    Raises:
        ModelError: the name is unknown.
    """
    _check_network(name)
    return {
        "input_size": (1, 28, 28),
        "mean": (0.2860,),
        "std": (0.3530,),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


def images(name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Return a shipped set of images, uint8 (N, 28, 28, 1), and its labels, or None where it has none.

    Raises:
        DataError: the name is unknown, or the file is missing.
    """
    if name not in IMAGES:
        raise DataError(f"Expected a set of zoo images, found {name!r}. {_suggestion(name, IMAGES)}")
    path = _FOLDER / _IMAGE_FILES[name]
    if not path.is_file():
        raise DataError(f"Expected images in {path}, found none. Run: python -m bitwright.zoo.fashion")
    with np.load(path) as archive:
        labels = archive["labels"].astype(np.int64) if "labels" in archive else None
        return archive["images"], labels
