"""Reads the Fashion-MNIST files and packs the images that ship with bitwright.

`python -m bitwright.zoo.fashion` writes `fashion_calibration.npz` (images of the training split, without
labels) and `fashion_test.npz` (the whole test split, with labels) again.
"""

import argparse
import gzip
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import DataError

PACKAGE = "dataset-fashion-mnist"
DEFAULT_DIR = Path("/usr/share/datasets/fashion-mnist")
ZOO_DIR = Path(__file__).parent
CALIBRATION_IMAGES = 1024
SEED = 0

_PREFIX = {"train": "train", "test": "t10k"}
_IMAGES_MAGIC, _IMAGES_HEADER = 2051, 16
_LABELS_MAGIC, _LABELS_HEADER = 2049, 8

Split = Literal["train", "test"]


def _idx(path: Path, magic: int, header: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise DataError(
            f"Expected the Fashion-MNIST file {path}, found none. "
            f"Install Debian's package {PACKAGE} or name the folder with --data."
        )
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"Expected a gzip file, found {path} ({error}). Fetch it again.") from error
    found = int.from_bytes(raw[:4], "big")
    if found != magic:
        raise DataError(f"Expected IDX magic number {magic}, found {found} in {path}. Fetch the file again.")
    return np.frombuffer(raw, np.uint8, offset=header)


def read_split(folder: Path, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a split of Fashion-MNIST: images (N, 28, 28, 1) and labels (N,), both uint8.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """
    prefix = _PREFIX[split]
    images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", _IMAGES_MAGIC, _IMAGES_HEADER)
    labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", _LABELS_MAGIC, _LABELS_HEADER)
    if images.size != labels.size * 28 * 28:
        raise DataError(
            f"Expected {labels.size} images of 28x28, found {images.size} pixels in {folder}. Fetch the files again."
        )
    return images.reshape(-1, 28, 28, 1), labels


def _distinct(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Indices of the images that do not occur, pixel for pixel, among `others`."""
    seen = {image.tobytes() for image in others}
    return np.array([i for i, image in enumerate(images) if image.tobytes() not in seen], np.int64)


def pack_images(source: Path, target: Path) -> list[Path]:
    """Write the calibration and the test images as compressed NumPy archives; returns their paths."""
    train, _ = read_split(source, "train")
    test, labels = read_split(source, "test")
    usable = _distinct(train, test)
    chosen = np.sort(np.random.default_rng(SEED).choice(usable, CALIBRATION_IMAGES, replace=False))
    contents: dict[str, dict[str, Any]] = {
        "fashion_calibration.npz": {"images": train[chosen]},
        "fashion_test.npz": {"images": test, "labels": labels},
    }
    for name, arrays in contents.items():
        np.savez_compressed(target / name, **arrays)
    return [target / name for name in contents]


def main(argv: list[str] | None = None) -> None:
    """Pack the images from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bitwright.zoo.fashion", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DIR, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=ZOO_DIR, help="folder to write to")
    args = parser.parse_args(argv)
    try:
        written = pack_images(args.data, args.out)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    for path in written:
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
