"""Classes of images: whole numbers in the images' order, or a table of files."""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.entries import MOST_CLASSES
from bitwright.given.files import is_file
from bitwright.given.text import short
from bitwright.given.truth import Truth, masks_of


def given_labels(labels: str | Path | Sequence[int] | Tensor, names: list[str]) -> Tensor | None:
    """Class indices (N,) of the images with these N names.

    Args:
        labels: the path of a CSV ``file,class_index``, matched by relative path and then by file name; or one class
            index for each image, in order.
        names: of the images, relative to their folder.

    Raises:
        DataError: the table cannot be read, an image has no label or two of them, or an index is none.
    """
    if isinstance(labels, str | os.PathLike):
        return _match_labels(_read_labels(Path(labels)), names, Path(labels))
    return class_indices(labels, len(names), "the labels given")


def class_indices(labels: Any, count: int, where: str) -> Tensor | None:
    """Class indices as int64 (N,); None where there are none.

    Raises:
        DataError: they are not ``count`` whole numbers from 0 on.
    """
    if labels is None:
        return None
    try:
        array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"Expected one whole class index for each image in {where} ({short(error)}).") from error
    if array.ndim == 2 and array.shape[1] == 1:  # a column
        array = array[:, 0]
    if array.ndim != 1 or len(array) != count or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"Expected one whole class index for each of {count} images in {where}, "
            f"found labels of {array.dtype} {tuple(array.shape)}."
        )
    if array.min() < 0 or array.max() >= MOST_CLASSES:
        wrong = array.min() if array.min() < 0 else array.max()
        raise DataError(f"Expected class indices from 0 to {MOST_CLASSES - 1} in {where}, found {wrong}.")
    return torch.from_numpy(array.astype(np.int64))


def class_masks(masks: npt.NDArray[Any], count: int, where: str) -> Truth:
    """The masks (N, H, W), whole numbers, of images in their order.

    Raises:
        DataError: they are something else, or not ``count`` of them.
    """
    if masks.ndim != 3 or len(masks) != count or masks.dtype.kind not in "biu":
        raise DataError(
            f"Expected masks as whole numbers ({count}, H, W) in {where}, found {masks.dtype} {masks.shape}."
        )
    return masks_of(masks, f"masks of {where}")


def _read_labels(path: Path) -> dict[str, int]:
    if not is_file(path.expanduser()):
        raise DataError(
            f"Expected labels as a CSV file with lines file,class_index, found no file {path}. Check the path."
        )
    try:
        content = path.expanduser().read_bytes()
        # Names of files may be bytes that are no letters; zeros are in no text.
        text = content.decode("utf-8-sig", "strict" if b"\0" in content else "surrogateescape")
        rows = [(n, row) for n, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"Expected labels as a CSV file with lines file,class_index, cannot read {path} "
            f"({short(error)}). Give the path of such a file."
        ) from error
    table: dict[str, int] = {}
    for position, (number, row) in enumerate(rows):
        name, index = _label_row(row, f"line {number} of {path}", header=position == 0)
        if index is None:
            continue
        if table.setdefault(name, index) != index:
            raise DataError(
                f"Expected one class for {name} in {path}, found {table[name]} and {index} (line {number}). "
                "Remove one of the lines."
            )
    if not table:
        raise DataError(f"Expected lines file,class_index in {path}, found none.")
    return table


def _label_row(row: list[str], where: str, *, header: bool) -> tuple[str, int | None]:
    if len(row) == 1:  # a blank, a tab or a semicolon stands for the comma
        row = [part.strip().strip('"') for part in re.split(r"[;\s]\s*(?=[^;\s]+$)", row[0].strip(" \t;"))]
    row = row[:2] if not any(row[2:]) else row  # what a table's empty columns leave
    if len(row) != 2:
        raise DataError(f"Expected file,class_index in {where}, found {len(row)} columns: {','.join(row)[:80]!r}.")
    name = row[0].strip().replace("\\", "/").removeprefix("./")
    text = row[1].strip()
    if re.search(r"[\x00-\x08\x0b-\x1f]", "".join(row)):
        raise DataError(f"Expected file,class_index in {where}, found {','.join(row)[:80]!r}. Write it as plain text.")
    text = re.sub(r"\.0*$", "", text) if re.fullmatch(r"[0-9]+\.0*", text) else text
    if re.fullmatch(r"[0-9]+", text):
        if len(text) > 10 or int(text) >= MOST_CLASSES:
            raise DataError(f"Expected a class index below {MOST_CLASSES} in {where}, found {text[:40]}.")
        return name, int(text)
    if header and not re.fullmatch(r"[+-]?[\d.]+", text):
        return name, None
    raise DataError(f"Expected a class index (0, 1, ...) in {where}, found {text!r}.")


def _match_labels(table: dict[str, int], names: list[str], path: Path) -> Tensor:
    """Return the labels in the order of ``names``; lines without an image are counted in a warning."""
    known = set(names)
    by_file: dict[str, list[str]] = {}
    for key in table:
        if key not in known:
            by_file.setdefault(_file_name(key), []).append(key)
    shared = _repeated(_file_name(name) for name in names if name not in table)
    matched = {name: name if name in table else _by_file_name(name, by_file, shared, path) for name in names}
    missing = [name for name, key in matched.items() if key is None]
    if missing:
        raise DataError(
            f"Expected a label for every image in {path}, {len(missing)} of {len(names)} have none "
            f"(first: {', '.join(missing[:3])}; of {len(table)} lines one is {next(iter(table))}). "
            "Add them or slice the images."
        )
    keys = [key for key in matched.values() if key is not None]
    used = set(keys)
    idle = [key for key in table if key not in used]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(table)} labels in {path} have no image (first: {idle[0]}).",
            UserWarning,
            stacklevel=2,
        )
    return torch.tensor([table[key] for key in keys], dtype=torch.int64)


def _by_file_name(name: str, by_file: dict[str, list[str]], shared: set[str], path: Path) -> str | None:
    keys = by_file.get(_file_name(name), [])
    if len(keys) > 1 or (keys and _file_name(name) in shared):
        raise DataError(
            f"Expected one label for {name} in {path}, the file name {_file_name(name)} stands for several "
            "images or lines. Write the path relative to the image folder."
        )
    return keys[0] if keys else None


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
