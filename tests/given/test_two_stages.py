"""Detectors of two stages: both networks are quantized side by side, and torchvision's own code runs between them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.cli import main
from bitwright.errors import DataError, UsageError
from bitwright.given import models
from bitwright.given.compat import import_torchvision
from bitwright.given.images import load_images
from bitwright.given.inputs import as_model
from bitwright.given.models import Model, load_model
from bitwright.given.two_stages import TwoStageBody, TwoStages, two_networks

try:
    torchvision: Any = import_torchvision()
except UsageError:
    pytest.skip("torchvision is not installed", allow_module_level=True)

SIZE = (32, 64)


class Backbone(nn.Module):
    """Two levels of features, 4 and 8 pixels apart."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.far = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        near = self.near(x)
        return OrderedDict([("0", near), ("1", self.far(near))])


def faster_rcnn(classes: int = 4, **_: Any) -> Any:
    """A tiny one, for images of 32x64 pixels."""
    parts = torchvision.models.detection
    torch.manual_seed(0)
    made = parts.FasterRCNN(
        Backbone(),
        rpn_anchor_generator=parts.anchor_utils.AnchorGenerator(((8,), (16,)), ((0.5, 1.0),) * 2),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(
            ["0", "1", "more"], 3, 2, canonical_scale=16, canonical_level=2
        ),
        box_head=parts.faster_rcnn.TwoMLPHead(8 * 9, 16),
        box_predictor=parts.faster_rcnn.FastRCNNPredictor(16, classes),
        min_size=SIZE[0],
        max_size=SIZE[1],
        box_score_thresh=0.0,
        box_detections_per_img=10,
        rpn_post_nms_top_n_test=40,
    )
    for layer in (*made.rpn.head.modules(), *made.roi_heads.box_predictor.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
    return made.eval()


def photos(count: int) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def prepared(made: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (made.transform.image_mean, made.transform.image_std))
    return (images - mean) / std


def test_both_halves_and_what_runs_between_find_what_the_detector_finds() -> None:
    made, images = faster_rcnn(), photos(3)
    before = [name for name, _ in made.named_modules()]
    body, two = TwoStageBody(made).eval(), TwoStages(made)
    with torch.no_grad():
        theirs = made(list(images))
        ours = two.boxes(body.first(prepared(made, images)), body.second, SIZE)
    assert [name for name, _ in made.named_modules()] == before
    for a, b in zip(theirs, ours, strict=True):
        assert len(a["boxes"]) > 5
        torch.testing.assert_close(dict(a), dict(b), atol=1e-3, rtol=1e-3)
    with pytest.raises(DataError, match="found outputs of one run"):
        two({})


def test_regions_lie_beside_images_and_are_computed_once() -> None:
    made = faster_rcnn()
    images = load_images(prepared(made, photos(3)), None)
    calls: list[int] = []
    body = TwoStageBody(made).eval()

    def first(batch: Tensor) -> dict[str, Tensor]:
        calls.append(len(batch))
        return body.first(batch)

    found = TwoStages(made).completed(images, first)
    assert [(p.name, p.shape) for p in found.parts] == [("images", (3, *SIZE)), ("regions", (32, 8, 3, 3))]
    packed = found.batch([0, 1, 2])
    torch.testing.assert_close(found.parts[0].of(packed), images.batch([0, 1, 2]))
    torch.testing.assert_close(found.batch([2])[0], packed[2])
    assert sum(calls) == 3
    assert found.sha256 == images.sha256
    assert torch.equal(found.seen(1), images[1])
    assert TwoStages(made).completed(found) is found


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, bw.QuantizedModel, Tensor]:
    """A detector, both of its networks in integers, and images."""
    made, images = faster_rcnn(), photos(6)
    return made, bw.quantize(made, prepared(made, images), "mse"), images


def test_both_networks_are_quantized(quantized: tuple[Any, bw.QuantizedModel, Tensor]) -> None:
    _, model, _ = quantized
    names = {row.name for row in model.layers if row.op in {"conv2d", "linear"}}
    assert {
        "backbone.near.0",
        "rpn.head.cls_logits",
        "roi_heads.box_head.fc6",
        "roi_heads.box_predictor.bbox_pred",
    } <= {name.removesuffix("_1") for name in names}
    ends = {row.name: row.activation for row in model.layers if "cls" in row.name or "bbox" in row.name}
    assert len(ends) == 6
    assert set(ends.values()) == {None}  # scores and boxes leave in float, and share no grid


def test_average_precision_is_that_of_the_whole_detector(quantized: tuple[Any, bw.QuantizedModel, Tensor]) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    made, model, images = quantized
    with torch.no_grad():
        found = made(list(images))
    truth = [{k: f[k] for k in ("boxes", "labels")} for f in found]
    scored = model.evaluate(prepared(made, images), truth, decode=TwoStages(made))
    assert scored["float"]["map50"] > 0.95  # the truth is what it finds
    assert 0.1 < scored["quantized"]["map50"] < scored["float"]["map50"]
    assert "class_logits" in scored["fidelity"]["outputs"]


def test_the_quantized_halves_are_those_of_the_whole(quantized: tuple[Any, bw.QuantizedModel, Tensor]) -> None:
    made, model, images = quantized
    packed = TwoStages(made).completed(load_images(prepared(made, images), None)).batch([0, 1])
    parts = list(model.parts.values())
    found = two_networks(model.graph, model.outputs, model.parts)
    assert found is not None
    with torch.no_grad():
        whole = dict(zip(model.outputs, model.flat(packed), strict=True))
        first, second = found[0](parts[0].of(packed)), found[1](parts[1].of(packed))
    for name, value in {**first, "class_logits": second[0], "box_regression": second[1]}.items():
        assert torch.equal(whole[name], value), name


def test_the_file_holds_both_networks(quantized: tuple[Any, bw.QuantizedModel, Tensor], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="files are checked in ONNX Runtime")
    _, model, _ = quantized
    parity = model.export(tmp_path / "model.onnx", check="fast")
    assert parity.passed
    assert {"class_logits", "proposals_objectness_0"} <= {o.name for o in parity.outputs}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", [3, *SIZE]), ("regions", [32, 8, 3, 3])]


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny one under torchvision's name; the current folder has photos, boxes and its weights."""
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, num_classes=91, **_: faster_rcnn(num_classes))
    monkeypatch.chdir(tmp_path)
    made = faster_rcnn(5)
    torch.save(made.state_dict(), "w.pth")
    Path("photos").mkdir()
    pixels = (photos(4) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    Path("boxes").mkdir()
    for i, image in enumerate(pixels):
        _save(image, Path("photos") / f"{i}.png")
        with torch.no_grad():
            (found,) = made([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255])
        rows = [_line(b, k) for b, k in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)]
        (Path("boxes") / f"{i}.txt").write_text("\n".join(rows))
    return tmp_path


def _save(image: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image).save(path)


def _line(box: list[float], label: int) -> str:
    (x1, y1, x2, y2), (height, width) = box, SIZE
    return f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}"


def test_by_name_from_quantize_to_its_file(by_name: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    name = "torchvision:fasterrcnn_resnet50_fpn@w.pth"
    given = ["photos", "--labels", "boxes", "--json"]
    size = ["--input-size", "32x64"]
    less = ["--check", "fast", "--no-diagnosis", "--no-report"]
    quantize = [name, "photos", *size, "--recipe", "rtn", "--evaluate", *given, "--out", "run"]
    assert main(["quantize", *quantize, *less]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["float"]["map50"] > 0.9
    assert made["parity"]["first_divergence"] is None
    for subject in ("run", "run/model.onnx"):
        assert main(["evaluate", subject, *given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["quantized"]["map50"] == pytest.approx(made["quantized"]["map50"], abs=0.05), subject


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_module_and_a_name_are_treated_alike(by_name: Path) -> None:
    model = load_model("torchvision:maskrcnn_resnet50_fpn")
    assert isinstance(model.module, TwoStageBody)
    assert isinstance(model.decode, TwoStages)
    given = as_model(faster_rcnn())
    assert isinstance(given.module, TwoStageBody)
    assert isinstance(given.decode, TwoStages)


def test_a_function_that_would_not_be_used_is_said() -> None:
    beside = Model(faster_rcnn(), "mine", None, decode=lambda outputs: outputs)
    with pytest.warns(UserWarning, match=r"The function decode beside mine is not used: boxes of a detector of two"):
        assert isinstance(models._without_decoding(beside).decode, TwoStages)
