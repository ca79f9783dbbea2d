"""Networks and images that ship with bitwright, so that every example runs without a download.

Example:
    >>> sorted(NETWORKS)
    ['fashion_cnn', 'fashion_vit']
    >>> images("fashion")[0].shape
    (1024, 28, 28, 1)
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from bitwright.zoo.scenes import Scenes

__all__ = ["DENSE", "IMAGES", "NETWORKS", "images", "network", "preprocessing"]

NETWORKS: dict[str, str] = {
    "fashion_cnn": "inverted residuals with squeeze-excite for Fashion-MNIST, 1x28x28",
    "fashion_vit": "vision transformer for Fashion-MNIST, 1x28x28",
}
DENSE: dict[str, str] = {
    "fashion_segmenter": "gives each pixel of a scene of garments a class, 1x64x64",
    "fashion_detector": "gives boxes of the garments in a scene, 1x64x64",
}
"""Networks whose answers are not classes of whole images."""
IMAGES: dict[str, str] = {
    "fashion": "1,024 unlabelled images from the training split of Fashion-MNIST, for calibration",
    "fashion-test": "the 10,000 labelled test images of Fashion-MNIST",
    "scenes": "512 scenes composed of garments from the training split, unlabelled, for calibration",
    "scenes-masks": "500 scenes composed of test images, with the class of each pixel",
    "scenes-boxes": "the same 500 scenes, with a box and a class for each garment",
}

_FOLDER = Path(__file__).parent
_IMAGE_FILES = {"fashion": "fashion_calibration.npz", "fashion-test": "fashion_test.npz"}


def _suggestion(name: str, known: dict[str, str]) -> str:
    nearest = difflib.get_close_matches(name, known, cutoff=0.5)
    return f"Did you mean {' or '.join(nearest)}?" if nearest else f"Choose from {', '.join(known)}."


def _check_network(name: str) -> None:
    known = {**NETWORKS, **DENSE}
    if name not in known:
        raise ModelError(f"Expected a zoo network, found {name!r}. {_suggestion(name, known)}")


def network(name: str) -> nn.Module:
    """Build a zoo network with its trained weights, in eval mode and float32.

    Raises:
        ModelError: the name is unknown, or the file of weights is missing.
    """
    _check_network(name)
    from safetensors.torch import load_file

    from bitwright.zoo import dense, networks

    path, script = _FOLDER / f"{name}.safetensors", "train_dense" if name in DENSE else "train"
    if not path.is_file():
        raise ModelError(f"Expected weights in {path}, found none. Run: python -m bitwright.zoo.{script} --only {name}")
    model = {**networks.BUILDERS, **dense.DENSE_BUILDERS}[name]()
    model.load_state_dict(load_file(str(path)))
    return model.eval()


def decoder(name: str) -> Any:
    """What turns the outputs of a zoo network into boxes; None where they are none."""
    from bitwright.zoo.dense import DECODERS

    return DECODERS.get(name)


def preprocessing(name: str) -> dict[str, Any]:
    """Return how a zoo network wants its images; `mean` and `std` apply to values in 0..1.

    Raises:
        ModelError: the name is unknown.
    """
    _check_network(name)
    return {
        "input_size": (1, 64, 64) if name in DENSE else (1, 28, 28),
        "mean": (0.2860,),
        "std": (0.3530,),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


def images(name: str) -> tuple[NDArray[np.uint8], Any]:
    """Return a shipped set of images, uint8 (N, H, W, 1), and its labels, or None where it has none.

    Labels are classes (N,), masks (N, H, W), or for each image a dict of ``boxes`` and ``labels``.

    Raises:
        DataError: the name is unknown, or the file is missing.
    """
    if name not in IMAGES:
        raise DataError(f"Expected a set of zoo images, found {name!r}. {_suggestion(name, IMAGES)}")
    if name.startswith("scenes"):
        return _scenes(name)
    path = _FOLDER / _IMAGE_FILES[name]
    if not path.is_file():
        raise DataError(f"Expected images in {path}, found none. Run: python -m bitwright.zoo.fashion")
    with np.load(path) as archive:
        labels = archive["labels"].astype(np.int64) if "labels" in archive else None
        return archive["images"], labels


def _scenes(name: str) -> tuple[NDArray[np.uint8], Any]:
    made = _composed(learned=name == "scenes")
    return made.images, {"scenes": None, "scenes-masks": made.masks, "scenes-boxes": made.boxes}[name]


@cache
def _composed(*, learned: bool) -> Scenes:
    """Scenes of garments of the training split, whose classes nobody is told, or of the test split."""
    from bitwright.zoo.scenes import compose

    garments, labels = images("fashion" if learned else "fashion-test")
    if learned:
        return compose(garments, np.zeros(len(garments), np.int64), 512, seed=0)
    return compose(garments, labels, 500, seed=1)
