"""mIoU against counting by hand, whatever the form of outputs and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bitwright.errors import DataError
from bitwright.given.images import Images, load_images
from bitwright.given.preprocessing import Preprocessing
from bitwright.measure.evaluation import compare
from bitwright.measure.task import Outputs
from bitwright.measure.tasks import Scoring
from bitwright.measure.truth_files import labelled

HOW = Preprocessing(input_size=(3, 8, 12), crop_mode="squash", interpolation="nearest")
BY_HAND = [[[0, 1], [1, 1]], [[0, 0], [1, 255]]]
"""A mask and what it is compared with: class 0 has IoU 1/2, class 1 has 1/2, two of three pixels are right."""


def run(images: Images, answers: Tensor, scoring: Scoring | None = None, **how: Any) -> dict[str, Any]:
    """Evaluates a network that gives these answers, one image after the other."""
    place = iter(answers.split(3))
    return compare(lambda _: [next(place)], None, images, batch=3, scoring=scoring or Scoring(), **how).to_dict()


def scores(classes: Any, count: int = 3) -> Tensor:
    return F.one_hot(torch.as_tensor(classes), count).movedim(-1, 1).float()


def images_of(masks: Any, size: tuple[int, int] = (2, 2)) -> Images:
    return labelled(load_images(torch.zeros(len(masks), 3, *size), None), torch.as_tensor(masks))


def test_two_by_two_by_hand() -> None:
    answers, mask = BY_HAND
    found = run(images_of([mask]), scores([answers]))
    assert found["quantized"] == {"miou": 0.5, "pixel_accuracy": pytest.approx(2 / 3)}
    assert [(c["class"], c["count"], c["quantized"]) for c in found["evaluation"]["classes"]] == [
        (0, 2, 0.5),
        (1, 1, 0.5),
    ]
    assert found["evaluation"]["task"] == "segmentation"
    assert "25 % of the pixels do not count: 255" in found["evaluation"]["notes"][0]


def test_a_class_that_no_mask_has_does_not_enter_the_mean() -> None:
    found = run(images_of([[[0, 0], [0, 0]]]), scores([[[0, 0], [0, 2]]]))
    assert found["quantized"]["miou"] == 0.75


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    masks = torch.randint(0, 4, (9, 6, 6), generator=random)
    answers = torch.where(
        torch.rand(9, 6, 6, generator=random) < 0.3, torch.randint(0, 4, (9, 6, 6), generator=random), masks
    )
    return masks, answers


def overlap(masks: Tensor, answers: Tensor, classes: int) -> float:
    each = []
    for k in range(classes):
        if (masks == k).any():
            each.append(float(((masks == k) & (answers == k)).sum() / ((masks == k) | (answers == k)).sum()))
    return float(np.mean(each))


def test_every_form_of_outputs_gives_the_same(drawn: tuple[Tensor, Tensor]) -> None:
    masks, answers = drawn
    images, maps = images_of(masks, (6, 6)), scores(answers, 4)
    expected = run(images, maps)["quantized"]
    assert expected["miou"] == pytest.approx(overlap(masks, answers, 4))
    assert expected["miou_ci"][0] < expected["miou"] < expected["miou_ci"][1]
    forms = [maps.movedim(1, -1), answers, answers.unsqueeze(1), answers.float()]
    for form in forms:
        assert run(images, form)["quantized"] == expected
    decoded = run(images, maps.flip(1), Scoring(decode=lambda out: out.flip(1)))
    assert decoded["quantized"] == expected


def test_a_network_of_one_channel_tells_two_classes() -> None:
    masks = torch.tensor([[[0, 1], [1, 0]]])
    assert run(images_of(masks), torch.tensor([[[[0.1, 0.9], [0.6, 0.4]]]]))["quantized"]["miou"] == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize("form", ["classes", "one channel", "one-hot", "one-hot behind", "a list", "what came"])
def test_masks_that_are_floats_or_one_hot(
    kind: torch.dtype, form: str, drawn: tuple[Tensor, Tensor], recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    masks, answers = drawn
    if form in {"classes", "one channel"} and not kind.is_floating_point:
        return
    expected = run(images_of(masks, (6, 6)), scores(answers, 4))["quantized"]
    given = scores(masks, 4).to(kind)
    given = {"classes": masks.to(kind), "one channel": masks[:, None].to(kind)}.get(form, given)
    given = given.movedim(1, -1) if form == "one-hot behind" else given
    photos = torch.zeros(9, 3, 6, 6)
    if form == "what came":
        images = load_images([(photos[i], given[i]) for i in range(9)], None)
    else:
        images = labelled(load_images(photos, None), list(given) if form == "a list" else given)
    assert run(images, scores(answers, 4))["quantized"] == expected
    if form in {"classes", "one-hot"}:
        np.savez(tmp_path / "m.npz", masks=given.numpy())
        assert run(labelled(load_images(photos, None), tmp_path / "m.npz"), scores(answers, 4))["quantized"] == expected
        swapped = labelled(load_images(photos, None), given, {0: 1, 1: 0, 2: 2, 3: 3})
        other = torch.tensor([1, 0, 2, 3])[answers]
        assert run(swapped, scores(other, 4))["quantized"] == expected
    seen: list[torch.dtype] = []
    run(images, scores(answers, 4), Scoring(metric=lambda _, truth: seen.append(truth.dtype) or 1.0))
    assert set(seen) == {kind}  # a metric of one's own reads what was given
    assert not recwarn.list


def test_masks_that_are_no_classes_are_not_guessed(drawn: tuple[Tensor, Tensor]) -> None:
    masks, answers = drawn
    photos = load_images(torch.zeros(9, 3, 6, 6), None)
    soft, both = masks + 0.25, scores(masks, 4)
    both[0, :, 0, 0] = 1
    for wrong in (soft, both):
        with pytest.raises(DataError, match=r"Expected labels= to be .* masks of classes \[N, H, W\] or one-hot"):
            run(labelled(photos, wrong), scores(answers, 4))
    later = scores(masks, 4)
    later[5, :, 2, 2] = 0
    with pytest.raises(DataError, match=r"one-hot classes in mask 5 as in the first, found others"):
        run(labelled(photos, later), scores(answers, 4))


def test_the_order_of_images_does_not_matter_and_the_right_answer_is_one(drawn: tuple[Tensor, Tensor]) -> None:
    masks, answers = drawn
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    one, other = (
        run(images_of(m, (6, 6)), scores(a, 4)) for m, a in ((masks, answers), (masks[order], answers[order]))
    )
    for key in ("miou", "pixel_accuracy"):
        assert one["quantized"][key] == pytest.approx(other["quantized"][key])
    perfect = run(images_of(masks, (6, 6)), scores(masks, 4))["quantized"]
    keys = ("miou", "pixel_accuracy")
    assert perfect == dict.fromkeys(keys, 1.0) | {f"{k}_ci": [1.0, 1.0] for k in keys}


def test_the_interval_of_the_difference_is_paired(drawn: tuple[Tensor, Tensor]) -> None:
    masks, answers = drawn
    worse = answers.clone()
    worse[:, 0, 0] = (masks[:, 0, 0] + 1) % 4
    batches = [iter(scores(a, 4).split(3)) for a in (worse, answers)]
    found = compare(
        lambda _: [next(batches[0])], lambda _: [next(batches[1])], images_of(masks, (6, 6)), batch=3
    ).to_dict()
    change = found["evaluation"]["difference"]
    assert change["miou"] == pytest.approx(found["quantized"]["miou"] - found["float"]["miou"])
    low, high = change["miou_ci"]
    assert low <= change["miou"] <= high
    each = [found[k]["miou_ci"][1] - found[k]["miou_ci"][0] for k in ("float", "quantized")]
    assert high - low < min(each)  # what images share cancels


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of 24x16 pixels, and masks whose left half is class 7."""
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    mask = np.zeros((16, 24), np.uint8)
    mask[:, :12] = 7
    for i in range(3):
        Image.new("RGB", (24, 16), (i, 90, 0)).save(tmp_path / "photos" / f"{i}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    return tmp_path


def halves(count: int = 3, classes: int = 2) -> Tensor:
    answers = torch.zeros(count, 8, 12, dtype=torch.int64)
    answers[:, :, :6] = 1
    return scores(answers, classes)


def given(root: Path, **said: Any) -> Images:
    return labelled(load_images(str(root / "photos"), HOW), str(root / "masks"), **said)


def test_masks_follow_their_images(photos: Path) -> None:
    found = run(given(photos, class_map={7: 1, 0: 0}), halves())
    assert found["quantized"]["miou"] == 1
    smaller = F.interpolate(halves(), size=(4, 6))  # the network's output has another size than its input
    assert run(given(photos, class_map={7: 1, 0: 0}), smaller)["quantized"]["miou"] == 1


@pytest.mark.parametrize("name", ["classes.json", "classes.csv"])
def test_a_class_map_beside_the_masks(photos: Path, name: str) -> None:
    text = {"classes.json": '{"7": 1, "0": null}', "classes.csv": "value,class,name,ignore\n7,1,cat,\n0,,,yes\n"}[name]
    (photos / "masks" / name).write_text(text)
    found = run(given(photos), halves())
    assert found["quantized"]["pixel_accuracy"] == 1
    assert [(c["class"], c["count"]) for c in found["evaluation"]["classes"]] == [(1, 3 * 8 * 6)]
    assert found["evaluation"]["classes"][0]["name"] == ("cat" if name.endswith("csv") else None)


def test_a_table_of_classes_may_have_semicolons(photos: Path) -> None:
    (photos / "masks" / "classes.csv").write_bytes(b"\xef\xbb\xbfvalue;class;name;ignore\r\n7;1;cat;\r\n0;;;yes\r\n")
    assert run(given(photos), halves())["evaluation"]["classes"][0]["name"] == "cat"


def test_grey_masks_may_have_an_opacity(photos: Path) -> None:
    expected = run(given(photos, class_map={7: 1, 0: 0}), halves())["quantized"]
    for i in range(3):
        path = photos / "masks" / f"{i}.png"
        Image.open(path).convert("LA").save(path)
    assert run(given(photos, class_map={7: 1, 0: 0}), halves())["quantized"] == expected


def test_palettes_of_voc_hold_positions(photos: Path) -> None:
    mask = Image.fromarray(np.repeat([[1] * 12 + [0] * 11 + [255]], 16, 0).astype(np.uint8), "L").convert("P")
    mask.putpalette([0, 0, 0, 128, 0, 0] + [9] * 762)
    palette = Image.fromarray(np.repeat([[1] * 12 + [0] * 11 + [255]], 16, 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [9] * 762)
    for i in range(3):
        palette.save(photos / "masks" / f"{i}.png")
    found = run(given(photos), halves())
    assert found["quantized"]["pixel_accuracy"] == 1
    assert "do not count" in found["evaluation"]["notes"][0]


def test_panoptic(photos: Path) -> None:
    import json

    ids = np.full((16, 24), 300, np.int64)
    ids[:, :12] = 70_000
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    (photos / "panoptic").mkdir()
    for i in range(3):
        Image.fromarray(colours).save(photos / "panoptic" / f"{i}.png")
    segments = [{"id": 300, "category_id": 4}, {"id": 70_000, "category_id": 9}]
    told = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in range(3)],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "sky"}],
    }
    (photos / "panoptic.json").write_text(json.dumps(told))
    images = labelled(load_images(str(photos / "photos"), HOW), str(photos / "panoptic.json"))
    found = run(images, halves())
    assert found["quantized"]["miou"] == 1
    assert [c["name"] for c in found["evaluation"]["classes"]] == ["sky", "cat"]


def test_arrays(tmp_path: Path) -> None:
    pixels, masks = np.zeros((3, 8, 12, 3), np.uint8), halves().argmax(1).numpy().astype(np.uint8)
    np.savez(tmp_path / "both.npz", images=pixels, masks=masks)
    np.savez(tmp_path / "masks.npz", masks=masks)
    both = load_images(str(tmp_path / "both.npz"), HOW)
    apart = labelled(load_images(pixels, HOW), str(tmp_path / "masks.npz"))
    for images in (both, both[::-1], apart):
        assert run(images, halves())["quantized"]["miou"] == 1


def save(array: Any, file: Path) -> None:
    Image.fromarray(np.asarray(array, np.uint8)).save(file)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda m: None, "Expected masks of classes below 2, or 255 for pixels that do not count, found 7"),
        (lambda m: save(np.zeros((16, 20)), m / "1.png"), r"Expected a mask of 16x24 pixels .*1.jpg.*found 16x20"),
        (lambda m: save(np.arange(1152).reshape(16, 24, 3), m / "1.png"), "Expected whole numbers or a palette"),
        (lambda m: (m / "1.png").write_text("x"), "Expected a mask, cannot read"),
        (lambda m: (m / "1.txt").write_text("0 0 0 1 1"), r"Expected one kind .*3 of masks and 1 of YOLO text"),
        (lambda m: [f.rename(f.with_name("x" + f.name)) for f in m.iterdir()], r"Expected names of the images \(such"),
        (lambda m: [f.unlink() for f in m.iterdir()], r"Expected masks .*found none"),
        (lambda m: (m / "classes.json").write_text('{"0": 0}'), "Expected values of the class map, found '7'"),
        (lambda m: (m / "classes.json").write_text('{"0": "a"}'), r"Expected class indices .* or null"),
        (lambda m: (m / "classes.json").write_text("{"), "cannot be read as JSON"),
        (lambda m: Image.new("L", (24, 16)).save(m / "1.png", "JPEG"), "is a JPEG, which changes the numbers"),
    ],
)  # fmt: skip
def test_bad_masks_are_said_in_one_line(photos: Path, spoil: Any, line: str) -> None:
    spoil(photos / "masks")
    with pytest.raises(DataError, match=line):
        run(given(photos), halves())


def test_what_has_no_partner_is_said(photos: Path) -> None:
    (photos / "masks" / "1.png").rename(photos / "masks" / "other.png")
    with (
        pytest.warns(UserWarning, match="1 of 3 in .*masks belong to no image"),
        pytest.warns(UserWarning, match="1 image of 3 left out.*first: 1.jpg"),
    ):
        images = given(photos, class_map={7: 1, 0: 0})
    assert images.names == ["0.jpg", "2.jpg"]
    assert run(images, halves(2))["quantized"]["miou"] == 1


def test_outputs_without_pixels_are_said(photos: Path) -> None:
    with pytest.raises(DataError, match="Expected class indices as labels= of a network with outputs of 5"):
        run(given(photos), torch.zeros(3, 5))
    with pytest.raises(DataError, match="Expected class indices as labels= for task='classification', found masks"):
        run(given(photos), halves(), Scoring("classification"))


def test_in_masks_of_0_and_255_alone_255_is_the_foreground(photos: Path) -> None:
    masks, answers = [[[0, 255], [0, 255]]], scores([[[0, 1], [0, 0]]], 2)
    with pytest.warns(UserWarning, match="masks given hold 0 and 255 alone: 255 is taken for class 1"):
        found = run(images_of(masks), answers)
    assert found["quantized"]["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    plain = load_images(torch.zeros(1, 3, 2, 2), None)
    said = run(labelled(plain, torch.as_tensor(masks), {0: 0, 255: None}), answers)
    assert said["quantized"]["miou"] == 1
    with pytest.warns(UserWarning, match="masks given hold 0 and 255 alone"):
        listed = run(labelled(plain, [np.asarray(m, np.uint8) for m in masks]), answers)
    assert listed["quantized"] == found["quantized"]
    for i in range(3):
        save((np.arange(24) < 12) * np.full((16, 1), 255), photos / "masks" / f"{i}.png")
    with pytest.warns(UserWarning, match="/masks hold 0 and 255 alone"):
        assert run(given(photos, class_map=None), halves())["quantized"]["miou"] == 1


def test_255_beside_other_classes_or_alone_does_not_count() -> None:
    assert run(images_of([[[1, 255], [0, 255]]]), scores([[[1, 1], [0, 0]]], 2))["quantized"]["miou"] == 1
    assert (
        "No pixel"
        in run(images_of([[[255, 255], [255, 255]]]), scores([[[1, 1], [0, 0]]], 2))["evaluation"]["notes"][0]
    )


def test_the_reading_of_the_graph_decides() -> None:
    from bitwright.graph.readings import Reading

    masks = torch.randint(0, 2, (3, 6, 6), generator=torch.Generator().manual_seed(0))
    last = scores(masks, 6).movedim(1, -1)  # [3, 6, 6, 6]: nobody can tell the axis by its size
    found = run(images_of(masks, (6, 6)), last, outputs=Outputs(("y",), (Reading("scores", 3),)))
    assert found["quantized"]["miou"] == 1
