"""Masks and boxes drawn on small pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitwright.given.images import load_images
from bitwright.given.truth import Boxes
from bitwright.measure.task import Pictured
from bitwright.report.kept import Overlay, PageFacts
from bitwright.report.overlays import _colour, overlays
from bitwright.report.pictures import differing_overlays
from bitwright.report.shown import Shown
from bitwright.run.result import RunResult


def pixels(uri: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def near(one: Any, other: Any) -> bool:
    return bool(np.abs(np.asarray(one) - np.asarray(other)).max() < 40)


def test_classes_and_boxes_are_drawn_where_they_are() -> None:
    images = load_images(torch.rand(2, 3, 16, 32), None)
    mask = np.zeros((16, 32), np.int64)
    mask[:, 16:], mask[0] = 3, -1
    boxes = Boxes.of(np.array([[4.0, 2.0, 12.0, 14.0]]), np.array([1]))
    found = overlays([Pictured(1, 0.5, "half differs", {"float": mask, "labels": boxes})], images)
    assert found[0].name == images.names[1]
    drawn = pixels((found[0].pictures or {})["float"])
    assert drawn.shape == (16, 32, 3)
    grey = drawn[1:, :16]
    assert (grey == grey[..., :1]).all()  # class 0 keeps the image
    assert (np.abs(drawn[1:, 16:] - 0.6 * np.array(_colour(3))).max(-1) <= 0.4 * 255 + 1).all()
    edge = pixels((found[0].pictures or {})["labels"])  # three times as large
    scale = edge.shape[0] // 16
    assert near(edge[8 * scale, 4 * scale], _colour(2))
    assert near(edge[8 * scale, 12 * scale - 1], _colour(2))
    assert not near(edge[8 * scale, 8 * scale], _colour(2))


def test_the_section_shows_them_side_by_side() -> None:
    data = "data:image/png;base64,xx"
    each = Overlay("a<b>.png", "half differs", {"float": data, "quantized": data, "labels": "x"})
    found = differing_overlays(Shown(RunResult(), PageFacts(overlays=[each])))
    assert found is not None
    text = str(found.body)
    assert text.count("<img") == 2  # what is no picture is left out
    assert "a&lt;b&gt;.png: half differs." in text
    assert differing_overlays(Shown(RunResult())) is None
