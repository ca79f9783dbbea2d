"""What an evaluation tells of each output, and of masks, against the outputs themselves."""

from __future__ import annotations

import warnings
from typing import Any

import cases
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitwright as bw
from bitwright.cli import tables
from bitwright.cli.evaluate import parse_classes
from bitwright.errors import DataError, UsageError
from bitwright.given.images import load_images
from bitwright.measure.evaluation import compare
from bitwright.measure.truth_files import labelled
from bitwright.run.result import RunResult

pytestmark = pytest.mark.filterwarnings("ignore:Output '.*' of the quantized network")


class Head(nn.Module):
    """Class scores of an image, [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 10, bias=False)
        self.linear.weight.data.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.conv(x).relu().mean((2, 3)) - 1)
        return scores


class Three(nn.Module):
    """Two heads of classes, nested, and boxes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad, self.place = Head(), Head(), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"kind": {"main": self.good(x)}, "boxes": self.place(x).mean((2, 3)), "colour": self.bad(x)}


@pytest.fixture(scope="module")
def three() -> tuple[bw.QuantizedModel, nn.Module, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(96, 3, 16, 16) + 2 * torch.randn(96, 3, 1, 1)
    net = Three().eval()
    return bw.quantize(net, images, "rtn", weights=8, rules=["bad.*=w2a2"]), net, images


def test_a_ruined_output_is_not_covered_by_a_good_one(three: tuple[bw.QuantizedModel, nn.Module, Tensor]) -> None:
    model, net, images = three
    with torch.no_grad():
        a, b = net(images), model(images)
    pairs = {"kind_main": (a["kind"]["main"], b["kind"]["main"]), "colour": (a["colour"], b["colour"])}
    same = {k: float((x.argmax(1) == y.argmax(1)).double().mean()) for k, (x, y) in pairs.items()}
    assert same["kind_main"] - same["colour"] > 0.15
    fidelity = model.evaluate(images)["fidelity"]
    outputs = fidelity["outputs"]
    for name, counted in same.items():
        assert outputs[name]["agreement"] == counted
    noise = (a["boxes"].double().square().sum() / (a["boxes"].double() - b["boxes"]).square().sum()).log10() * 10
    assert outputs["boxes"]["sqnr_db"] == pytest.approx(float(noise))
    assert (outputs["boxes"]["agreement"], outputs["boxes"]["kl"]) == (None, None)
    assert fidelity["agreement"] == same["colour"]
    assert fidelity["kl"] == outputs["colour"]["kl"]
    assert fidelity["sqnr_db"] == outputs["colour"]["sqnr_db"] < outputs["boxes"]["sqnr_db"]


def test_each_output_has_a_row_and_a_missing_figure_its_reason(
    three: tuple[bw.QuantizedModel, nn.Module, Tensor],
) -> None:
    model, _, images = three
    found = model.evaluate(images)
    rows = {what: ours for what, _, ours in tables.metric_rows(RunResult.read(found).evaluation)}
    assert set(rows) == {f"output {n} against float" for n in ("kind_main", "boxes", "colour")}
    assert "same answer" not in rows["output boxes against float"]
    assert tables.fidelity_notes(RunResult.read(found).evaluation.outputs) == [
        "No answers are compared in boxes. By its name, boxes, it holds no class scores. "
        "(bitwright evaluate --classes boxes=AXIS says otherwise)"
    ]


def test_the_axis_can_be_said(three: tuple[bw.QuantizedModel, nn.Module, Tensor]) -> None:
    model, net, images = three
    outputs = model.evaluate(images, classes={"boxes": 1, "colour": None})["fidelity"]["outputs"]
    with torch.no_grad():
        same = net(images)["boxes"].argmax(1) == model(images)["boxes"].argmax(1)
    assert outputs["boxes"]["agreement"] == float(same.double().mean())
    assert outputs["colour"]["agreement"] is None
    with pytest.raises(UsageError, match="out of kind_main, boxes, colour, found 'box'"):
        model.evaluate(images, classes={"box": 1})
    with pytest.raises(UsageError, match=r"from 1 to 1 for the classes of 'boxes' \(images x 4\), found 2"):
        model.evaluate(images, classes={"boxes": 2})
    for wrong in ("map", "=1", "map=-1", "map=x"):
        with pytest.raises(UsageError, match="Expected --classes NAME=AXIS"):
            parse_classes([wrong])


def test_channels_last_maps_are_compared_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    last = _Wrapped(net, lambda y: y.permute(0, 2, 3, 1))
    images = cases.images(40)
    found = [bw.quantize(m, images, "rtn", weights=3).evaluate(images)["fidelity"] for m in (net, last)]
    for figure in ("agreement", "kl", "sqnr_db"):
        assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-6)
    assert 0.3 < found[0]["agreement"] < 1


class _Wrapped(nn.Module):
    def __init__(self, net: nn.Module, after: Any) -> None:
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(x))


def test_probabilities_are_compared_as_they_are() -> None:
    torch.manual_seed(0)
    net = _Wrapped(Head(), lambda y: y.softmax(1)).eval()
    images = cases.images(40)
    model = bw.quantize(net, images, "rtn", weights=3)
    with torch.no_grad():
        p, q = net(images).double(), model(images).double().clamp_min(1e-6)
    q = q / q.sum(1, keepdim=True)
    found = model.evaluate(images)["fidelity"]
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)


# ------------------------------------------------------------------------------------------------------- masks


@pytest.fixture(scope="module")
def dense() -> tuple[bw.QuantizedModel, Tensor, Tensor]:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(24, 3, 10, 10)
    with torch.no_grad():
        masks = net(images).argmax(1)
    masks[:, 0] = 255
    return bw.quantize(net, images, "rtn", weights=4), images, masks


def test_masks_are_used(dense: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    model, images, masks = dense
    with torch.no_grad():
        answers = model(images).argmax(1)
    counted = masks != 255
    right = float((answers == masks)[counted].double().mean())
    overlaps = [
        ((answers == k) & (masks == k) & counted).sum() / (((answers == k) | (masks == k)) & counted).sum()
        for k in range(4)
    ]
    sources = [
        DataLoader(TensorDataset(images, masks), 7),
        DataLoader(TensorDataset(images, masks.unsqueeze(1).to(torch.uint8)), 7),
        zip(images.split(5), masks.split(5), strict=True),
        (images, masks),
    ]
    for source in sources:
        found = model.evaluate(source)
        assert found["quantized"]["pixel_accuracy"] == pytest.approx(right)
        assert found["quantized"]["miou"] == pytest.approx(float(torch.stack(overlaps).mean()))
        perfect = {"miou": 1.0, "pixel_accuracy": 1.0}
        assert found["float"] == perfect | {f"{k}_ci": [1.0, 1.0] for k in perfect}
    assert tables.metric_rows(RunResult.read(found).evaluation)[0][:2] == (
        "mean IoU of classes (95 % interval)",
        "100.00 % (100.0 to 100.0)",
    )


def test_masks_of_another_size_or_kind_are_not_left_out_in_silence(
    dense: tuple[bw.QuantizedModel, Tensor, Tensor],
) -> None:
    model, images, masks = dense
    with pytest.raises(
        DataError, match=r"mask of 10x10 pixels \(height x width\) as the image 0, or one in proportion, found 9x5"
    ):
        model.evaluate((images, masks[:, :9, ::2]))
    with pytest.warns(UserWarning, match="float32 labels of 24x10x10 that came with the images are not used"):
        assert model.evaluate(zip([images], [masks + 0.5], strict=True))["quantized"] == {}
    found, expected = (model.evaluate(zip([images], [m], strict=True)) for m in (masks.float(), masks))
    assert found["quantized"] == expected["quantized"]
    with pytest.raises(DataError, match="Expected masks of classes below 4, or 255"):
        model.evaluate((images, masks.clamp_max(9)))


def test_labels_that_are_given_are_read_or_refused(dense: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    model, images, masks = dense
    right = model.evaluate(images, masks)["quantized"]
    for same in (masks[:, None], masks[..., None].numpy(), [Image.fromarray(m.byte().numpy()) for m in masks]):
        assert model.evaluate(images, same)["quantized"] == right
    colours = masks[..., None].expand(-1, -1, -1, 3)
    for given, said in (
        (colours, "int64 of 24x10x10x3"),
        (masks + 0.5, "float32 of 24x10x10"),
        (list("ab" * 12), "type list"),
    ):
        with pytest.raises(DataError, match=f"Expected labels= to be class indices .* found labels .*{said}"):
            model.evaluate(images, given)
        seen: list[Any] = []
        model.evaluate(images, given, metric=lambda o, t, seen=seen: seen.append(t) or 1.0)
        assert len(seen) == 2 * len(images)
    for given in (set(range(24)), dict.fromkeys(range(24), 0)):
        with pytest.raises(DataError, match=f"Expected labels of 24 images, found one {type(given).__name__}"):
            model.evaluate(images, given)
    with pytest.raises(DataError, match="whole class index"):
        model.evaluate(images, [1 << 70] * 24)


def test_a_class_map_beside_nothing_that_it_is_for_is_refused() -> None:
    images = load_images(torch.zeros(4, 3, 2, 2), None)
    for labels, said in ((None, "no labels"), ([0, 1, 2, 0], "class indices")):
        with pytest.raises(DataError, match=f"masks or boxes beside class_map=, found {said}"):
            labelled(images, labels, {"0": 1})


@pytest.mark.parametrize(
    ("labels", "why"), [([0, 1, -1, 2], "1 of 4 is below 0"), ([0, None, None, 2], "2 of 4 are None")]
)
def test_labels_that_are_missing_in_part_are_said_to_be(labels: list[Any], why: str) -> None:
    images = torch.zeros(4, 3, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    model = bw.quantize(net, torch.randn(4, 3, 2, 2), "rtn")
    given = ((image, label) for image, label in zip(images, labels, strict=True))
    with pytest.warns(UserWarning, match=rf"\({why}\) that came with the images are not used"):
        model.evaluate(given)
    with pytest.raises(DataError, match=r"below 3, the number of the network's classes, found 7\. Number them from 0"):
        model.evaluate(images, [0, 1, 7, 2])


def test_what_a_file_of_chosen_boxes_gives_is_no_score_of_classes() -> None:
    images = load_images(torch.zeros(4, 3, 2, 2), None).labelled([0, 1, 2, 0])
    for output in (torch.zeros(9, 7), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(
            DataError, match=r"Expected scores of classes for each image .* what suppresses boxes gives"
        ):
            compare(lambda _, o=output: [o], None, images)


def test_calibration_says_nothing_of_masks(dense: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    _, images, masks = dense
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bw.quantize(nn.Conv2d(3, 4, 1).eval(), zip([images], [masks.float()], strict=True), "rtn")
    assert found.calibration is not None
    assert found.calibration.truth is None


def test_networks_of_other_outputs_are_not_compared() -> None:
    def one(x: Tensor) -> list[Tensor]:
        return [x.mean((2, 3))]

    with pytest.raises(UsageError, match=r"Expected the outputs of the float network, 3, 3x8x8, found 3\."):
        compare(one, lambda x: [x.mean((2, 3)), x], cases.dataset(4))


class _Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y.mean((2, 3)), y[:, :0]


def test_an_output_without_values() -> None:
    torch.manual_seed(0)
    found = bw.quantize(_Empty().eval(), cases.images(8), "rtn").evaluate(cases.images(8))
    empty = found["fidelity"]["outputs"]["output_1"]
    assert (empty["agreement"], empty["sqnr_db"], empty["note"]) == (None, None, "It is empty.")
    assert [what for what, _, _ in tables.metric_rows(RunResult.read(found).evaluation)] == [
        "output_0 against float",
        "output_1 against float",
    ]


def test_labels_that_give_no_figure_are_no_success(dense: tuple[bw.QuantizedModel, Tensor, Tensor]) -> None:
    model, images, masks = dense
    with pytest.raises(DataError, match="No pixel of the masks counts: all are 255, negative, or outside"):
        model.evaluate((images, masks.fill_(255)))
    for empty in ({}, {"psnr": float("nan")}):
        with pytest.raises(DataError, match="Expected figures from the labels, found none"):
            model.evaluate(images, list(range(24)), metric=lambda outputs, truth, found=empty: found)


def test_labels_of_another_kind_than_the_outputs_are_said_to_be(
    dense: tuple[bw.QuantizedModel, Tensor, Tensor],
) -> None:
    model, images, masks = dense
    with pytest.raises(DataError, match=r"Expected masks or boxes as labels= .* found class indices"):
        model.evaluate(images, list(range(24)))
    classifier = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model = bw.quantize(classifier, images[:4], "rtn")
    boxes = [{"boxes": torch.tensor([[0, 0, 4, 4.0]]), "labels": torch.tensor([1])}] * 4
    for labels, kind in ((masks[:4], "masks"), (boxes, "boxes")):
        with pytest.raises(DataError, match=rf"Expected class indices as labels= .* outputs of 4, found {kind}"):
            model.evaluate(images[:4], labels)
