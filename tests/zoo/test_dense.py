"""Scenes of garments, and the two networks that find them as masks and as boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bitwright import zoo
from bitwright.cli import main
from bitwright.given.images import load_images
from bitwright.given.models import load_model
from bitwright.measure.evaluation import check_truth
from bitwright.measure.tasks import Scoring
from bitwright.measure.truth_files import labelled
from bitwright.zoo import dense
from bitwright.zoo.fashion import ZOO_DIR
from bitwright.zoo.scenes import SCENE_SIDE, compose
from bitwright.zoo.train_dense import _measured, _places, giou


def test_scenes_are_the_same_again_and_boxes_are_tight() -> None:
    garments, labels = zoo.images("fashion-test")
    one, other = (compose(garments, labels, 20, seed=7) for _ in range(2))
    assert (one.images == other.images).all()
    assert (one.images != compose(garments, labels, 20, seed=8).images).any()
    count = 0
    for mask, truth in zip(one.masks, one.boxes, strict=True):
        for (x1, y1, x2, y2), label in zip(truth["boxes"].astype(int), truth["labels"], strict=True):
            inside = mask[y1:y2, x1:x2] == label + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018
            count += 1
        assert set(np.unique(mask)) == {0, *(truth["labels"] + 1)}
        rows, columns = mask.nonzero()
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [*truth["boxes"][:, :2].min(0), *truth["boxes"][:, 2:].max(0)] == around
    assert count > 20
    assert one.images.shape == (20, SCENE_SIDE, SCENE_SIDE, 1)


def test_calibration_scenes_bring_no_truth_and_test_scenes_agree() -> None:
    calibration = load_images("zoo:scenes[:4]", load_model("zoo:fashion_segmenter").preprocessing)
    assert calibration.labels is calibration.truth is None
    masks, boxes = zoo.images("scenes-masks"), zoo.images("scenes-boxes")
    assert masks[0] is not None
    assert (masks[0][:9] == boxes[0][:9]).all()


def test_decoding_keeps_the_best_of_those_that_overlap() -> None:
    scores, sides = torch.full((1, 10, 16, 16), -9.0), torch.full((1, 4, 16, 16), 8.0)
    scores[0, 2, 4, 4], scores[0, 2, 4, 5], scores[0, 7, 4, 5], scores[0, 2, 12, 12] = 2.0, 1.0, 0.5, -1.0
    (found,) = dense.decode({"scores": scores, "sides": sides})
    assert found["labels"].tolist() == [2, 7, 2]
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert found["boxes"][0].tolist() == [18 - 8, 18 - 8, 18 + 8, 18 + 8]  # the middle of place 4 is at 18


def test_a_place_learns_the_smallest_box_that_it_is_in() -> None:
    truth = {"boxes": np.array([[0.0, 0, 60, 60], [24, 24, 40, 40]]), "labels": np.array([1, 5])}
    scores, boxes = _places(truth)
    assert scores[:, 7, 7].nonzero().tolist() == [[5]]
    assert boxes[:, 7, 7].tolist() == [24, 24, 40, 40]
    assert scores[:, 7, 6].nonzero().tolist() in ([[1]], [[5]])
    assert giou(boxes[:, 7, 7][None], boxes[:, 7, 7][None]).item() == 1


@pytest.mark.parametrize(("name", "key"), [("fashion_segmenter", "miou"), ("fashion_detector", "map")])
def test_the_weights_score_what_they_say(name: str, key: str) -> None:
    path = ZOO_DIR / f"{name}.safetensors"
    assert path.stat().st_size < 1_000_000
    with safe_open(str(path), "pt") as file:
        said = float(file.metadata()[f"test_{key}"])
    garments, labels = zoo.images("fashion-test")
    found = _measured(name, zoo.network(name), compose(garments, labels, 100, seed=1))
    assert found[key] == pytest.approx(said, abs=0.06)
    assert said > 0.4


def test_the_detector_brings_what_decodes_it(capsys: pytest.CaptureFixture[str]) -> None:
    network = load_model("zoo:fashion_detector")
    images = labelled(load_images("zoo:scenes-boxes[:4]", network.preprocessing), None)
    check_truth(network, images, Scoring(beside=network.decode))
    assert main(["evaluate", "zoo:fashion_detector", "zoo:scenes-boxes[:6]"]) == 0
    assert "AP, IoU 0.50 to 0.95" in capsys.readouterr().out
