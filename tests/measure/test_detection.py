"""Average precision by hand, against pycocotools, and from every format that boxes come in."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.images import Images, load_images
from bitwright.given.preprocessing import Preprocessing
from bitwright.measure.detection import AveragePrecision, Found
from bitwright.measure.evaluation import compare
from bitwright.measure.task import Outputs
from bitwright.measure.tasks import Scoring
from bitwright.measure.truth_files import labelled

pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")


def truth(*rows: tuple[list[list[float]], list[int]]) -> list[dict[str, Any]]:
    return [{"boxes": torch.tensor(b).reshape(-1, 4), "labels": torch.tensor(c)} for b, c in rows]


def run(images: Images, found: list[dict[str, Any]], **how: Any) -> dict[str, Any]:
    """Evaluates a network that finds these boxes, in pixels of its input, image after image."""
    place = iter(range(0, len(found), 4))

    def decode(_: Tensor) -> list[dict[str, Any]]:
        first = next(place)
        return found[first : first + 4]

    scoring = Scoring(decode=decode, **how)
    return compare(lambda x: [x], None, images, batch=4, scoring=scoring).to_dict()


def blank(count: int, side: int = 100) -> Images:
    return load_images(torch.zeros(count, 3, side, side), None)


def test_by_hand() -> None:
    """Two objects; found are the first exactly, then nothing, then the second with IoU 0.6.

    Recalls are 1/2, 1/2, 1 and precisions 1, 1/2, 2/3 up to IoU 0.6, so that 51 of the 101 recalls have precision 1
    and 50 have 2/3; beyond it 51 have 1 and 50 have 0.
    """
    images = labelled(blank(1), truth(([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])))
    boxes = torch.tensor([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56.0]])
    found = run(images, [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.zeros(3)}])
    full, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert found["quantized"]["map50"] == pytest.approx(full)
    assert found["quantized"]["map75"] == pytest.approx(half)
    assert found["quantized"]["map"] == pytest.approx((3 * full + 7 * half) / 10)
    assert found["quantized"]["map_small"] == found["quantized"]["map"]
    assert "map_large" not in found["quantized"]
    assert found["evaluation"]["classes"][0]["count"] == 2


def test_corners_as_shares_of_the_input() -> None:
    boxes = [torch.tensor([[8, 4, 40, 36.0]]), torch.tensor([[0, 0, 60, 20], [20, 4, 80, 40.0]])]
    images = labelled(load_images(torch.zeros(2, 3, 40, 80), None), truth(*((b.tolist(), [0] * len(b)) for b in boxes)))
    sides = torch.tensor([80, 40, 80, 40])
    found = [{"boxes": b / sides, "scores": torch.ones(len(b)), "labels": torch.zeros(len(b))} for b in boxes]
    with pytest.warns(UserWarning, match="lie between 0 and 1: they are taken as shares of the input's width"):
        assert run(images, found)["quantized"]["map"] == pytest.approx(1)


@pytest.fixture(scope="module")
def scenes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Twelve images with up to eight objects of five classes, and boxes near them and elsewhere."""
    random = np.random.default_rng(4)
    wanted, found = [], []
    for _ in range(12):
        count = int(random.integers(2, 9))
        low, side = (
            random.uniform(0, 60, (count, 2)),
            random.uniform(4, 140, (count, 2)) * random.choice([0.2, 1.0], (count, 1)),
        )
        boxes, labels = np.concatenate([low, low + side], 1), random.integers(0, 5, count)
        near = boxes + random.normal(0, 1.5, boxes.shape)
        wild = random.uniform(0, 50, (4, 2))
        corners = np.concatenate([near, np.concatenate([wild, wild + random.uniform(5, 90, (4, 2))], 1)])
        classes = np.concatenate([np.where(random.random(count) < 0.8, labels, 0), random.integers(0, 5, 4)])
        wanted.append({"boxes": boxes, "labels": labels, "iscrowd": random.random(count) < 0.15})
        found.append({"boxes": corners.clip(0), "scores": random.random(count + 4), "labels": classes})
    return wanted, found


def pycocotools(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[float]:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools, which arbitrates, is not installed")
    from pycocotools.cocoeval import COCOeval

    notes, answers = [], []
    for image, (w, f) in enumerate(zip(wanted, found, strict=True)):
        for box, label, crowd in zip(w["boxes"].tolist(), w["labels"].tolist(), w["iscrowd"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            row = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(crowd)}
            notes.append(row | {"id": len(notes) + 1, "image_id": image, "category_id": label})
        for (x1, y1, x2, y2), score, label in zip(f["boxes"].tolist(), f["scores"], f["labels"].tolist(), strict=True):
            row = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
            answers.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        made = coco.COCO()
        made.dataset = {"images": [{"id": i} for i in range(len(wanted))], "annotations": notes}
        made.dataset["categories"] = [{"id": c} for c in range(5)]
        made.createIndex()
        judged = COCOeval(made, made.loadRes(answers), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [float(v) for v in judged.stats[:6]]


def test_pycocotools_agrees(scenes: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    wanted, found = scenes
    ours = run(labelled(blank(12, 200), wanted), found)["quantized"]
    keys = ("map", "map50", "map75", "map_small", "map_medium", "map_large")
    assert [ours[k] for k in keys] == pytest.approx(pycocotools(wanted, found))
    for key in ("map", "map_small", "map_medium"):
        low, high = ours[f"{key}_ci"]
        assert 0.05 < low < ours[key] < high


def test_the_order_of_images_does_not_matter(scenes: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    wanted, found = scenes
    order = np.random.default_rng(0).permutation(12)
    one, other = (
        run(labelled(blank(12, 200), [wanted[i] for i in o]), [found[i] for i in o]) for o in (range(12), order)
    )
    for key in ("map", "map50", "map_small"):
        assert one["quantized"][key] == pytest.approx(other["quantized"][key])


def test_the_right_answer_is_one_and_a_draw_of_all_images_is_all_images(
    scenes: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    wanted = [{k: v[~w["iscrowd"]] for k, v in w.items()} for w in scenes[0]]
    perfect = [{"boxes": w["boxes"], "scores": np.full(len(w["labels"]), 0.5), "labels": w["labels"]} for w in wanted]
    images = labelled(blank(12, 200), wanted)
    figures = run(images, perfect)["quantized"]
    assert {figures[k] for k in ("map", "map50", "map75")} == {1.0}
    assert figures["map_ci"] == [1.0, 1.0]
    assert images.truth is not None
    each = [Found(f["boxes"], f["scores"], f["labels"]) for f in scenes[1]]
    tally = AveragePrecision(images.truth.items, each, {})
    assert tally.figures(np.arange(12)) == tally.figures()


# ----------------------------------------------------------------------------------------------- files


HOW = Preprocessing(input_size=(3, 40, 40), mean=0.5, crop_mode="border")
BOXES = [(0, [20.0, 10.0, 60.0, 30.0]), (1, [0.0, 0.0, 80.0, 40.0])]
"""Class and corners, in an image of 80x40 pixels; the network's input shows it at half its size, 10 pixels lower."""


def network_boxes(count: int = 2) -> list[dict[str, Any]]:
    corners = torch.tensor([[x / 2 + (10 if i % 2 else 0) for i, x in enumerate(b)] for _, b in BOXES])
    one = {"boxes": corners, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 1])}
    return [one] * count


SMALL = {"id": 10, "file_name": "0.png", "width": 8, "height": 4}


def write_coco(root: Path, **change: Any) -> Path:
    sides = [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2) in BOXES]
    told = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 80, "height": 40} for i in range(2)],
        "annotations": [
            {"id": 2 * i + k, "image_id": 10 + i, "category_id": (3, 7)[c], "bbox": sides[k], "area": 800, "iscrowd": 0}
            for i in range(2)
            for k, (c, _) in enumerate(BOXES)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (root / "boxes.json").write_text(json.dumps(told | change))
    return root / "boxes.json"


def write_yolo(root: Path, line: str = "") -> Path:
    (root / "labels").mkdir(exist_ok=True)
    rows = [(c, (x1 + x2) / 160, (y1 + y2) / 80, (x2 - x1) / 80, (y2 - y1) / 40) for c, (x1, y1, x2, y2) in BOXES]
    for i in range(2):
        text = "\n".join(" ".join(map(str, row)) for row in rows)
        (root / "labels" / f"{i}.txt").write_text(f"{text}\n{line}\n")
    (root / "labels" / "classes.txt").write_text("cat\ndog\n")
    return root / "labels"


def write_voc(root: Path, names: tuple[str, str] = ("cat", "dog")) -> Path:
    (root / "xml").mkdir(exist_ok=True)
    objects = "".join(
        f"<object><name>{names[c]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for c, (x1, y1, x2, y2) in BOXES
    )
    size = "<size><width>80</width><height>40</height><depth>3</depth></size>"
    for i in range(2):
        (root / "xml" / f"{i}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return root / "xml"


@pytest.fixture
def photos(tmp_path: Path) -> Images:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (80, 40), (90, i, 0)).save(tmp_path / "photos" / f"{i}.png")
    return load_images(str(tmp_path / "photos"), HOW)


@pytest.mark.parametrize("write", [write_coco, write_yolo, write_voc])
@pytest.mark.filterwarnings("ignore:Classes of .* are numbered")
def test_every_format_holds_the_same_boxes(photos: Images, tmp_path: Path, write: Any) -> None:
    class_map = {"cat": 0, "dog": 1} if write is write_voc else None
    images = labelled(photos, str(write(tmp_path)), class_map)
    assert images.truth is not None
    for boxes in images.truth.items:
        assert boxes.corners == pytest.approx(np.array([b for _, b in BOXES]))
        assert boxes.labels.tolist() == [0, 1]
    found = run(images, network_boxes())
    assert found["quantized"]["map"] == 1
    assert [c["name"] for c in found["evaluation"]["classes"]] == ["cat", "dog"]
    assert found["evaluation"]["task"] == "detection"


def test_what_other_programs_write_into_coco_files_is_understood(photos: Images, tmp_path: Path) -> None:
    """Ids as text or with a decimal point, paths of another system, areas left open, flags as text."""
    plain = json.loads(write_coco(tmp_path).read_text())
    images = [i | {"id": str(i["id"]), "file_name": f"C:\\data\\{i['file_name']}"} for i in plain["images"]]
    notes = [
        a | {"image_id": float(a["image_id"]), "category_id": float(a["category_id"]), "area": None, "iscrowd": "0"}
        for a in plain["annotations"]
    ]
    truth = labelled(photos, str(write_coco(tmp_path, images=images, annotations=notes))).truth
    assert truth is not None
    for boxes in truth.items:
        assert boxes.labels.tolist() == [0, 1]
        assert boxes.areas.tolist() == [800, 3200]
        assert not boxes.crowd.any()


def test_boxes_in_bfloat16_are_boxes(photos: Images) -> None:
    given = [{"boxes": torch.tensor([[2, 2, 9, 9]], dtype=torch.bfloat16), "labels": torch.tensor([1])}] * 2
    truth = labelled(photos, given).truth
    assert truth is not None
    assert truth.items[0].corners.tolist() == [[2, 2, 9, 9]]


def test_the_numbers_of_coco_can_be_kept(photos: Images, tmp_path: Path) -> None:
    images = labelled(photos, str(write_coco(tmp_path)), "ids")
    boxes = [b | {"labels": torch.tensor([3, 7])} for b in network_boxes()]
    assert run(images, boxes)["quantized"]["map"] == 1
    with pytest.raises(DataError, match=r"Expected classes below 2, as the boxes of .* have, found 7 from the network"):
        run(labelled(photos, str(tmp_path / "boxes.json")), boxes)


def test_classes_from_one_are_told_from_numbers_of_coco(photos: Images, tmp_path: Path) -> None:
    """Categories 3 and 7 are classes 1 and 2 of a network whose background is 0: either advice leads to all of AP."""
    path = str(write_coco(tmp_path))
    boxes = [b | {"labels": torch.tensor([1, 2])} for b in network_boxes()]
    with pytest.raises(DataError, match=r'class_map= with \{"cat": 1, "dog": 2\} if it counts from 1'):
        run(labelled(photos, path), boxes)
    (note,) = run(labelled(photos, path, "ids"), boxes)["evaluation"]["notes"]
    assert "classes of the labels are 3, 7, those that the network finds 1, 2" in note
    assert note.endswith('such as {"cat": 1, "dog": 2}.')
    assert run(labelled(photos, path, {"cat": 1, "dog": 2}), boxes)["quantized"]["map"] == 1


@pytest.mark.parametrize(
    ("corners", "classes", "line"),
    [
        ([90, 5, 99, 9], 0, r"Expected boxes in an image of 80x40 pixels, found corners 90, 5, 99, 9 in the labels of"),
        ([9, 5, 2, 9], 0, "Expected corners x1, y1, x2, y2 .* found 9, 5, 2, 9"),
        (
            [2, math.nan, 9, 9],
            0,
            "Expected corners that are finite numbers in the labels .* found 2, nan, 9, 9",
        ),
        ([2, 2, 9, 9j], 0, "Expected real numbers"),
        ([0.1, 0.2, 0.5, 1.0], 0, "Expected corners in pixels in the labels given, found none above 1"),
        ([2, 2, 9, 9], 1 << 31, "Expected a class below 2147483648"),
        ([[2, 2], [9]], 0, "rows of several lengths"),
        ([[2, 2, 4], [2, 2, 4], [9, 9, 8], [9, 9, 8]], [0, 0, 0], r"Expected boxes \(G, 4\) .* found \(1, 4, 3\)"),
        ([2, 2, 9, 9], "cat", "Expected whole numbers from 0 as classes in the labels of image 0, found 'cat'"),
        ([2, 2, 9, 9], 1.5, "found 1.5"),
        ([2, 2, 9, 9], -1, "found -1"),
        ([], [], "Expected boxes of the images in the labels given, found none"),
    ],
)
def test_boxes_given_as_objects_are_checked(photos: Images, corners: Any, classes: Any, line: str) -> None:
    given = [{"boxes": [corners], "labels": np.array([classes]).reshape(-1)}] * 2
    with pytest.raises(DataError, match=line):
        labelled(photos, given)


def test_classes_below_zero_can_be_left_out(photos: Images) -> None:
    given = [{"boxes": [[2, 2, 9, 9], [3, 3, 8, 8]], "labels": [-1, 1]}] * 2
    truth = labelled(photos, given, {"-1": None, "1": 0}).truth
    assert truth is not None
    assert [b.labels.tolist() for b in truth.items] == [[0], [0]]


def test_crowds_alone_give_no_figure(photos: Images, tmp_path: Path) -> None:
    rows = [{"image_id": 10, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1}]
    images = labelled(photos, str(write_coco(tmp_path, annotations=rows)))
    assert run(images, network_boxes())["evaluation"]["notes"] == [
        "No box of the labels counts: all are crowds or too difficult."
    ]


def test_names_of_voc_are_numbered_as_voc_does_or_by_the_alphabet(photos: Images, tmp_path: Path) -> None:
    images = labelled(photos, str(write_voc(tmp_path)))  # cat and dog are classes of VOC
    assert images.truth is not None
    assert images.truth.items[0].labels.tolist() == [7, 11]
    with pytest.warns(UserWarning, match="numbered in the order of their names: 0 ant, 1 bee"):
        images = labelled(photos, str(write_voc(tmp_path, ("bee", "ant"))))
    assert images.truth is not None
    assert images.truth.items[0].labels.tolist() == [1, 0]


def test_outputs_that_are_boxes_need_no_function(photos: Images, tmp_path: Path) -> None:
    images = labelled(photos, str(write_yolo(tmp_path)))
    one = network_boxes(1)[0]
    rows = torch.cat([one["boxes"], one["scores"][:, None], one["labels"][:, None]], 1)
    padded = torch.cat([rows, torch.tensor([[0, 0, 0, 0, 0, -1.0]])])[None].repeat(2, 1, 1)
    assert compare(lambda _: [padded], None, images).to_dict()["quantized"]["map"] == 1
    three = [padded[:, :, :4], padded[:, :, 4], padded[:, :, 5].long()]
    how = Outputs(("out_boxes", "out_scores", "out_labels"))
    assert compare(lambda _: three, None, images, outputs=how).to_dict()["quantized"]["map"] == 1
    with pytest.raises(DataError, match=r"Expected boxes from the network .* found outputs of 9x85\. Give decode="):
        compare(lambda _: [torch.zeros(2, 9, 85)], None, images)


def test_of_thousands_of_boxes_those_of_the_highest_scores_count(photos: Images, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(0, 30, (5000, 2))
    boxes, labels = np.concatenate([corners, corners + random.uniform(1, 10, (5000, 2))], 1), np.arange(5000) % 2
    boxes[:600, 2:] = boxes[:600, :2]
    many = {"boxes": boxes, "scores": random.permutation(np.linspace(0.1, 0.9, 5000)), "labels": labels}
    best = [i for k in (0, 1) for i in np.argsort(-many["scores"]) if labels[i] == k and i >= 600]
    for corners, label in zip(*(network_boxes(1)[0][k].numpy() for k in ("boxes", "labels")), strict=True):
        boxes[[i for i in best if labels[i] == label][80]] = corners
    few = {k: v[[*best[:100], *[i for i in best if labels[i]][:100]]] for k, v in many.items()}
    images = labelled(photos, str(write_yolo(tmp_path)))
    found = [compare(lambda x: [x], None, images, scoring=Scoring(decode=lambda _, m=m: [m] * 2)) for m in (many, few)]
    assert found[0].to_dict()["quantized"] == found[1].to_dict()["quantized"]
    assert found[0].to_dict()["quantized"]["map"] > 0.01
    assert "1200 of 10,000 boxes from the network are left out" in found[0].loss.notes[0]


@pytest.mark.parametrize(
    ("decoded", "line"),
    [
        ([], "found list of 0 for 2 images from decode"),
        (torch.zeros(2, 4, 5), r"found an array \(2, 4, 5\) from decode"),
        (
            [{"boxes": torch.zeros(3, 4), "scores": torch.zeros(2), "labels": torch.zeros(2)}] * 2,
            r"found boxes \(3, 4\)",
        ),
        (
            [{"boxes": torch.zeros(4, 3), "scores": torch.zeros(3), "labels": torch.zeros(3)}] * 2,
            r"found boxes \(4, 3\)",
        ),
        ([torch.zeros(3)] * 2, "found an array"),
        ([{"box": torch.zeros(3, 4)}] * 2, "found dict of box for an image from decode"),
        ([{"boxes": [[1, 1, 2, 2]], "scores": [0.5], "labels": [1.5]}] * 2, "whole numbers as classes, found 1.5"),
        ([{"boxes": [[1, 1, 2, 2]], "scores": [0.5], "labels": [math.nan]}] * 2, "whole numbers as classes, found nan"),
        ([{"boxes": [[1, 1, 2, 2]], "scores": [0.5], "labels": ["cat"]}] * 2, "Expected numbers as boxes, scores and"),
    ],
)
def test_what_a_function_returns_is_checked(photos: Images, tmp_path: Path, decoded: Any, line: str) -> None:
    images = labelled(photos, str(write_yolo(tmp_path)))
    with pytest.raises(DataError, match=line):
        compare(lambda x: [x], None, images, scoring=Scoring(decode=lambda _: decoded))
    for decode, raised in ((lambda _: 1 / 0, "ZeroDivisionError"), (lambda _: exit(3), "SystemExit: 3")):
        with pytest.raises(DataError, match=f"Expected decode to return predictions, it raised {raised}"):
            compare(lambda x: [x], None, images, scoring=Scoring(decode=decode))


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda r: write_yolo(r, "0 0.5 0.5 0.1"), "Expected 'class cx cy width height' in line 3 of .*0.txt"),
        (lambda r: write_yolo(r, "0 40 20 9 9"), "Expected a box relative to the image .* found 40. Divide"),
        (lambda r: write_yolo(r, "0 1.5 0.5 0.1 0.1"), "Expected boxes in an image of 80x40 pixels, found corners 116"),
        (lambda r: write_coco(r, annotations=[]), "Expected annotations in .* found an empty list"),
        (lambda r: write_coco(r, images=3), "Expected COCO's lists of images, annotations and categories"),
        (lambda r: write_coco(r, images=[SMALL], annotations=[{"image_id": 10, "category_id": 3}]), "found 80x40"),
        (lambda r: write_coco(r, images=[{"id": 10, "file_name": "z.png"}]), "Expected names of the images"),
        (lambda r: write_coco(r, annotations=[{"image_id": 10, "category_id": 3, "bbox": [1]}]), "Expected bbox"),
        (lambda r: write_coco(r, annotations=[{"image_id": 10, "category_id": 5, "bbox": [1, 1, 2, 2]}]), "found 5"),
        (lambda r: write_coco(r, images=[SMALL, SMALL | {"file_name": "1.png"}]), "each id .* several of 10"),
        (lambda r: write_coco(r, images=[SMALL, SMALL | {"id": 9}]), "each file_name .* several of '0.png'"),
        (lambda r: write_coco(r, images=[SMALL | {"id": [10]}]), "list as id"),
        (lambda r: write_yolo(r, "9999999999 0.5 0.5 0.1 0.1"), "Expected a class below 2147483648"),
        (lambda r: write_yolo(r, "inf 0.5 0.5 0.1 0.1"), "Expected 'class cx cy width height'"),
    ],
)  # fmt: skip
def test_bad_boxes_are_said_in_one_line(photos: Images, tmp_path: Path, write: Any, line: str) -> None:
    with pytest.raises(DataError, match=line):
        labelled(photos, str(write(tmp_path)))


def test_files_that_cannot_be_read(photos: Images, tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    nameless = "<annotation><object><name> </name><bndbox/></object></annotation>"
    endless = "<annotation><size><width>1e999</width></size></annotation>"
    unknown = "<?xml version='1.0' encoding='nonsense'?><annotation/>"
    for text in (
        nameless,
        endless,
        unknown,
        "<annotation",
        '<!DOCTYPE x [<!ENTITY a "b">]><annotation/>',
        "<annotation><object/></annotation>",
    ):
        (folder / "0.xml").write_text(text)
        with pytest.raises(DataError, match="Expected VOC XML with objects of a name and a bndbox, cannot read"):
            labelled(photos, str(folder))
    texts = write_yolo(tmp_path)
    (texts / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"Expected names of classes, cannot read .*classes\.txt"):
        labelled(photos, str(texts))
    (tmp_path / "boxes.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        labelled(photos, str(tmp_path / "boxes.json"))


def test_an_image_without_objects_counts(photos: Images, tmp_path: Path) -> None:
    folder = write_yolo(tmp_path)
    (folder / "1.txt").unlink()
    with pytest.warns(UserWarning, match="1 image without a file in .* count as images without objects"):
        images = labelled(photos, str(folder))
    assert len(images) == 2
    (folder / "0.txt").write_text("")
    with (
        pytest.raises(DataError, match=r"Expected boxes of the images in .* found none"),
        pytest.warns(UserWarning, match="1 image"),
    ):
        labelled(photos, str(folder))


def test_classes_that_are_numbered_otherwise_are_doubted(photos: Images, tmp_path: Path) -> None:
    images = labelled(photos, str(write_yolo(tmp_path)))
    turned = [b | {"labels": 1 - b["labels"]} for b in network_boxes()]
    assert "Hardly a box is right. Check that class 0 is cat" in run(images, turned)["evaluation"]["notes"][0]


@pytest.mark.parametrize("breaks", ["turned round", "no numbers"])
def test_boxes_that_are_none_are_told(photos: Images, tmp_path: Path, breaks: str) -> None:
    images = labelled(photos, str(write_yolo(tmp_path)))
    whole = network_boxes()
    broken = [
        b | {"boxes": b["boxes"].float()[:, [2, 3, 0, 1]] * (1 if breaks == "turned round" else math.nan)}
        for b in whole
    ]
    count = sum(len(b["boxes"]) for b in whole)
    notes = run(images, broken)["evaluation"]["notes"]
    assert notes[0].startswith(f"{count} of {count} boxes from the network are left out: corners are x1, y1, x2, y2")
    unsure = [b | {"scores": b["scores"] * math.nan} for b in whole]
    assert run(images, unsure)["evaluation"]["notes"][0].startswith(f"{count} of {count} boxes from the network")
    empty = [{k: torch.cat([v, v[:1] * (0 if k == "boxes" else 1)]) for k, v in b.items()} for b in whole]
    assert f"2 of {count + 2} boxes" in run(images, empty)["evaluation"]["notes"][0]


def test_annotations_of_no_image_are_told(photos: Images, tmp_path: Path) -> None:
    box = {"category_id": 3, "bbox": [1, 1, 5, 5]}
    path = write_coco(tmp_path, annotations=[box | {"image_id": i} for i in (10, 98, 99, 99)])
    with pytest.warns(UserWarning, match="3 annotations in .* that it does not list are left out .first: image_id 98"):
        images = labelled(photos, str(path))
    assert images.truth is not None
    assert [len(b) for b in images.truth.items] == [1, 0]
