"""Which outputs of a network are known to be boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bitwright.given.named_boxes import named_boxes

CORNERS = np.float32([[1, 2, 5, 6], [3, 3, 9, 9], [0, 0, 4, 4]])
SCORES, LABELS = np.float32([0.9, 0.5, 0.25]), np.asarray([2, 0, 1])
ROWS = np.concatenate([CORNERS, SCORES[:, None], LABELS[:, None]], 1)


def found(outputs: dict[str, Any], count: int = 1, *, alone: bool = True) -> list[Any]:
    boxes = named_boxes(outputs, count, alone=alone)
    assert boxes is not None
    return boxes


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("names", ["abc", "cab"])
def test_outputs_of_any_names_are_known_by_their_types(names: str, *, batch: bool) -> None:
    parts = [torch.from_numpy(a)[None] if batch else a for a in (CORNERS, SCORES, LABELS)]
    outputs = dict(sorted(zip(names, parts, strict=True)))
    [boxes] = found(outputs)
    for key, expected in zip(("boxes", "scores", "labels"), (CORNERS, SCORES, LABELS), strict=True):
        np.testing.assert_array_equal(boxes[key], expected)


@pytest.mark.parametrize("labels", [LABELS.astype(np.float32), LABELS[:2], LABELS[:, None]])
def test_outputs_that_types_do_not_tell_apart(labels: Any) -> None:
    assert named_boxes({"a": CORNERS, "b": SCORES, "c": labels}, 1, alone=True) is None


@pytest.mark.parametrize("order", [[4, 5], [5, 4]])
def test_rows_that_begin_with_the_number_of_their_image(order: list[int]) -> None:
    places = np.float32([[1], [0], [1]])
    outputs = {"rows": np.concatenate([places, ROWS[:, :4], ROWS[:, order]], 1)}
    first, second = found(outputs, 2)
    np.testing.assert_array_equal(first, ROWS[[1]])
    np.testing.assert_array_equal(second, ROWS[[0, 2]])
    assert named_boxes(outputs, 1, alone=True) is None
    assert named_boxes(outputs, 2) is None


@pytest.mark.parametrize("count", [np.asarray([[2]]), np.asarray([2], np.int32), np.float32([2])])
def test_an_output_that_says_how_many_boxes_there_are(count: Any) -> None:
    [rows] = found({"rows": ROWS[None], "many": count})
    np.testing.assert_array_equal(rows, ROWS[:2])
    parts = {"boxes": CORNERS[None], "scores": SCORES[None], "classes": LABELS[None]}
    [boxes] = found({"num_detections": count, **parts}, alone=False)
    assert boxes["boxes"].shape == (2, 4)
    assert boxes["labels"].tolist() == [2, 0]
