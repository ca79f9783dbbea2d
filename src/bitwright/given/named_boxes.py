"""Boxes among the outputs of a network that makes them itself, known by their shape or by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDS: dict[str, tuple[str, ...]] = {"boxes": ("boxes",), "scores": ("scores",), "labels": ("labels", "classes")}
"""What names of outputs end in."""


def named_boxes(outputs: Mapping[str, Any], count: int, *, alone: bool = False) -> list[Any] | None:
    """Boxes of each of ``count`` images; None if no outputs are known to be boxes.

    Args:
        outputs: tensors or arrays by name: one (N, M, 6), or boxes (N, M, 4), scores and labels (N, M). Those that
            have names may be without N for one image.
        count: N.
        alone: whether one (M, 6) is also that of an image.

    Example:
        >>> import numpy as np
        >>> [found] = named_boxes({"boxes": np.zeros((3, 4)), "scores": np.ones(3), "classes": np.ones(3)}, 1)
        >>> found["labels"], named_boxes({"scores": np.ones((1, 3))}, 1)
        (array([1., 1., 1.]), None)
    """
    if len(outputs) == 1:
        (rows,) = outputs.values()
        rows = rows[None] if alone and count == 1 and rows.ndim == 2 else rows
        return list(rows) if rows.ndim == 3 and rows.shape[2] == 6 and len(rows) == count else None
    named = {key: o for key, ends in ENDS.items() for name, o in outputs.items() if name.lower().endswith(ends)}
    if len(named) < len(ENDS) or named["boxes"].shape[-1] != 4:
        return None
    if count == 1 and named["boxes"].ndim == 2:
        return [named]
    if named["boxes"].ndim != 3 or any(o.ndim < 2 or len(o) != count for o in named.values()):
        return None
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]
