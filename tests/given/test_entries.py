"""What one item holds: the images in it, in any layout, and the labels that came with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitwright.errors import DataError
from bitwright.given.entries import Came, entry, join_labels, one_by_one, pictures, pixels_last

GREY = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)
COLOUR = np.stack([GREY, GREY + 50, GREY + 100], -1)
PICTURE = Image.fromarray(COLOUR)
TENSOR = torch.zeros(2, 3, 6, 8)


@pytest.mark.parametrize(
    ("item", "images", "label"),
    [
        (TENSOR, TENSOR, None),
        ((TENSOR, 3), TENSOR, 3),
        ([TENSOR], TENSOR, None),
        ((TENSOR, 3, "a.png"), TENSOR, 3),
        ({"pixel_values": TENSOR, "labels": [0, 1], "pixel_mask": torch.ones(2, 6, 8).long()}, TENSOR, [0, 1]),
        ({"img": PICTURE, "fine_label": 4}, PICTURE, 4),
        ({"image": PICTURE, "label": 4, "id": "a"}, PICTURE, 4),
        ({"image": PICTURE, "objects": 4, "id": "a"}, PICTURE, {"objects": 4, "id": "a"}),
        ({"image": PICTURE}, PICTURE, None),
        (({"image": PICTURE}, 5), PICTURE, 5),
    ],
)
def test_images_are_told_from_labels(item: Any, images: Any, label: Any) -> None:
    found = entry(item, None, "the list given")
    assert found.images is images
    assert found.label == label


def test_two_entries_of_images_need_a_name() -> None:
    item = {"image": PICTURE, "depth": np.zeros((1, 6, 8), np.float32), "name": "a"}
    with pytest.raises(DataError, match=r"image and depth can be images\. Name it: input_key='image'"):
        entry(item, None, "the list given")
    assert entry(item, "depth", "the list given").label == {"image": PICTURE, "name": "a"}
    with pytest.raises(DataError, match=r"an entry 'img' .* found image, depth and name"):
        entry(item, "img", "the list given")
    with pytest.raises(DataError, match=r"none of them can be images"):
        entry({"text": "a"}, None, "the list given")
    with pytest.raises(DataError, match=r"Give what is in 'inputs' in the place of the dict around it"):
        entry({"inputs": {"image": PICTURE}, "label": 4}, None, "the list given")
    with pytest.raises(DataError, match=r"found float32 \(2, 3, 6, 8\)\. Leave input_key= out"):
        entry(TENSOR, "image", "the list given")


@pytest.mark.parametrize(
    ("pixels", "count", "mode"),
    [
        (COLOUR, 1, "RGB"),
        (COLOUR.transpose(2, 0, 1), 1, "RGB"),
        (COLOUR[None], 1, "RGB"),
        (np.stack([COLOUR] * 2).transpose(0, 3, 1, 2), 2, "RGB"),
        (np.stack([GREY] * 5), 5, "L"),
        (GREY[None], 1, "L"),
        (torch.from_numpy(COLOUR).permute(2, 0, 1), 1, "RGB"),
    ],
)
def test_pixels_in_either_layout(pixels: Any, count: int, mode: str) -> None:
    found = pictures(pixels, "x")
    assert len(found) == count
    assert {image.mode for image in found} == {mode}
    assert np.array_equal(np.asarray(found[0]), COLOUR if mode == "RGB" else GREY)


def test_a_layout_that_nobody_can_tell_is_asked_for() -> None:
    both = np.arange(2 * 3 * 8 * 3, dtype=np.uint8).reshape(2, 3, 8, 3)
    with pytest.raises(DataError, match=r"give torch\.from_numpy\(images\).*PIL\.Image\.fromarray"):
        pixels_last(both, "x")
    assert np.array_equal(pixels_last(both, "x", first=True), both.transpose(0, 2, 3, 1))


def labels_of(*each: Any, count: int = 1, batched: bool = False) -> Any:
    return join_labels([Came(label, count, batched) for label in each])


def test_classes_in_any_form() -> None:
    for each in ((3, 1), (np.int64(3), np.uint8(1)), (torch.tensor(3), torch.tensor([1])), (np.array([3]), [1])):
        assert labels_of(*each).tolist() == [3, 1]
    assert labels_of([3, 1], torch.tensor([[0], [2]]), count=2, batched=True).tolist() == [3, 1, 0, 2]
    assert labels_of(None, None) is None


def test_masks_may_differ_in_size() -> None:
    found = labels_of(np.zeros((4, 5), np.uint8), Image.fromarray(np.full((6, 8), 2, np.uint8)))
    assert found.kind == "segmentation"
    assert [item.read().shape for item in found.items] == [(4, 5), (6, 8)]
    assert int(found.items[1].read().max()) == 2
    assert labels_of(torch.zeros(2, 1, 4, 5, dtype=torch.long), count=2, batched=True).said == "masks of 4x5 pixels"


def test_what_is_neither_goes_on_image_by_image() -> None:
    boxes = {"boxes": torch.zeros(2, 3, 4), "name": ["a", "b"]}
    first, second = labels_of(boxes, count=2, batched=True).items
    assert first["boxes"].shape == (3, 4)
    assert second["name"] == "b"
    assert labels_of([{"bbox": 1}], "cat").items == [[{"bbox": 1}], "cat"]
    assert labels_of((torch.zeros(3), ["a", "b", "c"]), count=3, batched=True).items[2] == (torch.zeros(()), "c")
    assert labels_of(0.5, -1).items == [0.5, -1]
    assert one_by_one(Came("one for all", 3, batched=True)) == [None] * 3
