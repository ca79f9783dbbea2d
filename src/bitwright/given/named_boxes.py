"""Boxes among the outputs of a network that makes them itself, known by their shapes, types and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

OutputArray: TypeAlias = npt.NDArray[Any]

ENDS: dict[str, tuple[str, ...]] = {"boxes": ("boxes",), "scores": ("scores",), "labels": ("labels", "classes")}
"""What names of outputs end in."""


def named_boxes(outputs: Mapping[str, Any], count: int, *, alone: bool = False) -> list[Any] | None:
    """Boxes of each of ``count`` images; None if no outputs are known to be boxes.

    An output of whole numbers that says how many there are of each image cuts off what only fills up.

    Args:
        outputs: tensors or arrays by name: rows (N, M, 6), or boxes (N, M, 4), scores and labels (N, M), each known
            by its name or, where labels alone are whole numbers, by its type. The three may be without N for one
            image.
        count: N.
        alone: whether rows may be without N too: (M, 6) of one image, or (M, 7) that begin with the number of theirs.

    Example:
        >>> import numpy as np
        >>> [found] = named_boxes({"boxes": np.zeros((3, 4)), "scores": np.ones(3), "classes": np.ones(3)}, 1)
        >>> found["labels"], named_boxes({"scores": np.ones((1, 3))}, 1)
        (array([1., 1., 1.]), None)
    """
    given = {name: _array(value) for name, value in outputs.items()}
    told = next((name for name, o in given.items() if _says_how_many(name, o, count, len(given))), None)
    ends = [None] * count if told is None else given.pop(told).reshape(-1).astype(int).tolist()
    if len(given) == 1:
        rows = _of_rows(next(iter(given.values())), count, alone=alone)
        return rows and [each[:end] for each, end in zip(rows, ends, strict=True)]
    named = _by_name(given) or _by_type(given)
    if named is None or named["boxes"].shape[-1:] != (4,):
        return None
    if count == 1 and named["boxes"].ndim == 2:
        return [{key: o[: ends[0]] for key, o in named.items()}]
    if named["boxes"].ndim != 3 or any(o.ndim < 2 or len(o) != count for o in named.values()):
        return None
    return [{key: o[k][:end] for key, o in named.items()} for k, end in enumerate(ends)]


def _array(values: Any) -> OutputArray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return np.asarray((values.float() if values.is_floating_point() else values).numpy())


def _says_how_many(name: str, output: OutputArray, count: int, outputs: int) -> bool:
    """Whether one of several outputs is the number of boxes of each image, such as ``num_detections`` (N, 1)."""
    known = outputs == 2 or (outputs == 4 and "num" in name.lower())
    return known and output.size == count and output.ndim <= 2 and _are_whole(output)


def _are_whole(values: OutputArray) -> bool:
    """Whether all are whole numbers from 0."""
    return bool(((values % 1 == 0) & (values >= 0)).all())


def _by_name(outputs: Mapping[str, OutputArray]) -> dict[str, OutputArray] | None:
    named = {key: o for key, ends in ENDS.items() for name, o in outputs.items() if name.lower().endswith(ends)}
    return named if len(named) == len(ENDS) else None


def _by_type(outputs: Mapping[str, OutputArray]) -> dict[str, OutputArray] | None:
    """Of three outputs: boxes have an axis more, and labels alone are whole numbers."""
    if len(outputs) != len(ENDS):
        return None
    floats = sorted((o for o in outputs.values() if o.dtype.kind == "f"), key=lambda o: o.ndim)
    whole = [o for o in outputs.values() if o.dtype.kind in "iu"]
    if (
        len(floats) != 2
        or len(whole) != 1
        or floats[0].shape != whole[0].shape
        or floats[1].shape != (*whole[0].shape, 4)
    ):
        return None
    return {"boxes": floats[1], "scores": floats[0], "labels": whole[0]}


def _of_rows(rows: OutputArray, count: int, *, alone: bool) -> list[OutputArray] | None:
    """Rows of x1, y1, x2, y2, score, class for each image; None if they are none."""
    if alone and rows.ndim == 2 and rows.shape[1] == 7 and _are_whole(rows[:, 0]) and (rows[:, 0] < count).all():
        score, label = (5, 6) if _are_whole(rows[:, 6]) and not _are_whole(rows[:, 5]) else (6, 5)
        ordered = rows[:, [1, 2, 3, 4, score, label]]
        return [ordered[rows[:, 0] == k] for k in range(count)]
    rows = rows[None] if alone and count == 1 and rows.ndim == 2 else rows
    return list(rows) if rows.ndim == 3 and rows.shape[2] == 6 and len(rows) == count else None
