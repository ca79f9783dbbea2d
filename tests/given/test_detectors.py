"""Detectors of torchvision's parts: the body is quantized, and their own decoding makes the boxes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import DataError, UsageError
from bitwright.given.compat import import_torchvision
from bitwright.given.detectors import DetectorBody, TorchvisionDecode, classes_of, is_detector
from bitwright.given.models import decoder_beside, load_model
from bitwright.given.preprocessing import Preprocessing
from bitwright.given.two_stages import TwoStages, two_networks

try:
    torchvision: Any = import_torchvision()
except UsageError:
    pytest.skip("torchvision is not installed", allow_module_level=True)


class Backbone(nn.Module):
    """Two levels of features, 4 and 8 pixels apart."""

    def __init__(self, channels: int, out_channels: Any = None) -> None:
        super().__init__()
        self.out_channels = out_channels or channels
        self.near = nn.Sequential(nn.Conv2d(3, channels, 3, stride=4, padding=1), nn.ReLU())
        self.far = nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        near = self.near(x)
        return OrderedDict([("0", near), ("1", self.far(near))])


def detector(name: str, classes: int = 3, **_: Any) -> Any:
    """A tiny one, for images of 32x64 pixels, as they are."""
    parts = torchvision.models.detection
    torch.manual_seed(0)
    squares = parts.anchor_utils.AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    free = {"min_size": 32, "max_size": 64, "score_thresh": 0.0, "detections_per_img": 20, "anchor_generator": squares}
    if name == "retinanet":
        made = parts.RetinaNet(Backbone(8), classes, **free)
    elif name == "fcos":
        made = parts.FCOS(Backbone(32), classes, **free)
    else:
        boxes = parts.anchor_utils.DefaultBoxGenerator([[2], [2]])
        more = {"score_thresh": 0.0, "detections_per_img": 20}
        made = parts.ssd.SSD(Backbone(8, [8, 8]), boxes, (64, 32), classes, **more)
    for layer in made.head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.1)
    return made.eval()


def prepared(made: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (made.transform.image_mean, made.transform.image_std))
    return (images - mean) / std


def photos(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd"])
def test_the_body_and_its_decoding_find_what_the_detector_finds(name: str) -> None:
    made, images = detector(name), photos(3)
    before = dict(made.named_children())
    with torch.no_grad():
        theirs = made(list(images))
        ours = TorchvisionDecode(made, (32, 64))(DetectorBody(made)(prepared(made, images)))
    assert dict(made.named_children()) == before
    for a, b in zip(theirs, ours, strict=True):
        assert len(a["boxes"]) > 5
        torch.testing.assert_close(dict(a), dict(b), atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, bw.QuantizedModel, Tensor]:
    """A detector, its body in integers, and the images."""
    made, images = detector("retinanet"), photos(8)
    return made, bw.quantize(made, prepared(made, images), "mse"), images


def test_a_weight_of_several_levels_has_one_grid_and_each_call_its_own_for_activations(
    quantized: tuple[Any, bw.QuantizedModel, Tensor],
) -> None:
    _, model, _ = quantized
    shared = [row for row in model.layers if row.name.startswith("head.regression_head.conv.0.0")]
    assert len(shared) == 2
    assert shared[0].weight == shared[1].weight
    assert shared[0].activation != shared[1].activation
    apart = {row.name: row.activation for row in model.layers if "bbox_reg" in row.name or "cls_logits" in row.name}
    assert len(set(apart.values())) == len(apart) == 4  # boxes and scores of two levels


def test_it_evaluates(quantized: tuple[Any, bw.QuantizedModel, Tensor]) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    made, model, images = quantized
    with torch.no_grad():
        truth = [{k: found[k] for k in ("boxes", "labels")} for found in made(list(images))]
    found = model.evaluate(prepared(made, images), truth, decode=TorchvisionDecode(made, (32, 64)))
    assert found["float"]["map50"] > 0.95  # the truth is what it finds
    assert 0.1 < found["quantized"]["map50"] < found["float"]["map50"]


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny detectors under torchvision's names, with its default number of classes."""

    def get_model(name: str, num_classes: int = 91, **_: Any) -> nn.Module:
        return detector(name.split("_", maxsplit=1)[0].removesuffix("300").removesuffix("lite320"), num_classes)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16"])
def test_by_name_with_weights_of_other_classes(name: str, by_name: None, tmp_path: Path) -> None:
    torch.save(detector(name.split("_", maxsplit=1)[0].removesuffix("300"), 5).state_dict(), tmp_path / "w.pth")
    model = load_model(f"torchvision:{name}@{tmp_path / 'w.pth'}", input_size="48x64")
    how = model.preprocessing
    assert isinstance(how, Preprocessing)
    assert (how.input_size, how.mean) == ((3, 48, 64), (0.485, 0.456, 0.406))
    with torch.no_grad():
        raw = model.module(torch.rand(2, 3, 48, 64))
    assert raw["cls_logits"].shape[2] == 5
    assert model.decode is not None
    assert len(model.decode(raw)) == 2
    beside = decoder_beside(model.reference, {"input_size": "48x64"})
    assert beside is not None
    for a, b in zip(beside(raw), model.decode(raw), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(DataError, match="Expected raw outputs for images of 48x64"):
        model.decode({k: v[:, :-7] for k, v in raw.items()})


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_sizes_and_shapes_of_a_detectors_own_transform(by_name: None) -> None:
    fixed, free = (load_model(f"torchvision:{n}").preprocessing for n in ("ssd300_vgg16", "fcos_resnet50_fpn"))
    assert isinstance(fixed, Preprocessing)
    assert isinstance(free, Preprocessing)
    assert (fixed.input_size, fixed.crop_mode, fixed.interpolation) == ((3, 32, 64), "squash", "bilinear")
    assert (free.input_size, free.crop_mode) == ((3, 32, 32), "border")


BY_NAME = (
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_those_of_torchvision_themselves_with_random_weights(name: str) -> None:
    height, width = (300, 300) if name == "ssd300_vgg16" else (64, 96)  # its last levels need that many pixels
    network = load_model(f"torchvision:{name}", input_size=f"{height}x{width}")
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    model = bw.quantize(network, images, "rtn")
    assert sum(row.weight is not None for row in model.layers) > 20
    if isinstance(network.decode, TwoStages):
        found = two_networks(model.graph, model.outputs, model.parts)
        assert found is not None
        with torch.no_grad():
            boxes = network.decode.boxes(found[0](images), found[1], (height, width))
    else:
        assert network.decode is not None
        boxes = network.decode(model(images))
    assert len(boxes) == 2
    assert all(set(each) == {"boxes", "scores", "labels"} for each in boxes)


def test_what_is_no_detector() -> None:
    assert not is_detector(nn.Conv2d(3, 3, 1))
    assert not is_detector(SimpleNamespace(transform=1))
    assert decoder_beside(None) is None
    assert decoder_beside("timm:resnet18") is None
    assert decoder_beside("torchvision:resnet18@w.pth") is None


def test_the_number_of_classes_of_weights() -> None:
    wanted = {"head.a": torch.zeros(9 * 91, 4), "head.b": torch.zeros(4 * 91), "body": torch.zeros(7, 2)}
    other = {"head.a": torch.zeros(9 * 5, 4), "head.b": torch.zeros(4 * 5), "body": torch.zeros(7, 2)}
    assert classes_of(other, wanted, 91) == 5
    assert classes_of({**other, "head.b": torch.zeros(4 * 6)}, wanted, 91) is None
    assert classes_of(wanted, wanted, 91) is None
