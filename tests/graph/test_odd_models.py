"""Whatever is in a forward, the way from capture to the file ends in a result or in one line of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import dataset, images
from odd_models import LEGAL, REFUSED, Odd, legal
from torch import Tensor, nn

import bitwright as bw
from bitwright.errors import BitwrightError, ModelError
from bitwright.graph.capture import capture


def flat(found: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(LEGAL, found, strict=True))


def test_legal_constructs_go_all_the_way(tmp_path: Path) -> None:
    network, x = legal(), images(6, seed=5)
    model = bw.quantize(network, dataset(), "rtn", runtime="generic")
    with torch.no_grad():
        expected, found = flat(network(x)), flat(model(x))
        again = flat(bw.load(model.save(tmp_path / "run"))(x))
    for name, value in found.items():
        assert torch.equal(again[name], value), name
        if value.is_floating_point():
            noise = (value - expected[name]).square().mean() / expected[name].square().mean()
            assert float(noise) < 0.003, name
        else:
            assert float((value == expected[name]).float().mean()) > 0.8, name


def test_legal_constructs_are_exported(tmp_path: Path) -> None:
    some = [LEGAL[name] for name in ("numbers of a buffer", "double inside", "its own function", "an assignment")]
    model = bw.quantize(Odd(*some).eval(), dataset(), "rtn", activations="float")
    assert model.export(tmp_path / "model.onnx").passed


class Products(nn.Module):
    """Maps of queries, of which there is one row for all images."""

    def __init__(self, equation: str, queries: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.queries, self.equation = nn.Conv2d(3, 8, 3, 2, 1), nn.Parameter(torch.randn(queries)), equation

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.einsum(self.equation, self.queries, self.conv(x))
        return nn.functional.interpolate(maps, size=x.shape[-2:], mode="bilinear")


EQUATIONS = {"bqc, bchw -> bqhw": (1, 5, 8), "...qc,...chw->...qhw": (1, 5, 8), "bcij,bchw->bchw": (1, 8, 1, 1)}
EQUATIONS |= {"qc,bchw->bqhw": (5, 8), "bq...,bqhw->bqhw": (1, 8, 1), "bqjw,bqhw->bqhw": (1, 1, 1, 4)}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_row_that_einsum_repeats_for_all_images_is_exported(equation: str, tmp_path: Path) -> None:
    network, x = Products(equation, EQUATIONS[equation]).eval(), images(6, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(capture(network, x).graph(x[:5])[0], network(x[:5]))
    model = bw.quantize(network, dataset(), "rtn")
    assert model.export(tmp_path / "model.onnx").passed


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_no_graph_can_hold_is_one_line(name: str) -> None:
    construct, word = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        bw.quantize(Odd(construct).eval(), dataset(), "rtn")
    line = str(caught.value)
    assert word in line
    assert "\n" not in line
    assert len(line) < 400
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("while_captured", [False, True])
def test_what_needs_more_memory_than_there_is_says_so(while_captured: bool) -> None:
    def large(net: Odd, x: Tensor) -> Tensor:
        captured = type(x.shape[0]) is not int
        return net.body(x) + (torch.zeros(1 << 50)[:1] if captured or not while_captured else 0)

    with pytest.raises(BitwrightError, match=r"^There is not enough memory for this\. Take fewer or smaller images\.$"):
        bw.quantize(Odd(large).eval(), dataset(), "rtn")


class Detector(nn.Module):
    """A backbone with maps by name, a head over them, and boxes for each image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)

    def backbone(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        rows = self.head(self.backbone(x)).flatten(2).transpose(1, 2)
        return [{"boxes": row[row[:, 4] > 0, :4], "scores": row[row[:, 4] > 0, 4]} for row in rows]


class DetectorOfMaps(Detector):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.conv, nn.ReLU())  # type: ignore[assignment]


def test_a_detector_is_told_what_to_return_instead() -> None:
    for build, advice in ((Detector, "returns model.head, and"), (DetectorOfMaps, "model.head(list(model.backbone(x)")):
        with pytest.raises(ModelError, match="without its box decoding") as caught:
            bw.quantize(build().eval(), dataset(), "rtn")
        assert advice in str(caught.value)


def test_outputs_that_no_image_changes_are_exported(tmp_path: Path) -> None:
    network = Odd(lambda net, x: net.head.bias.expand(x.shape[0], 5)).eval()
    model = bw.quantize(network, dataset(), "rtn")
    with torch.no_grad():
        torch.testing.assert_close(model(images(4)), network(images(4)), atol=0.01, rtol=0)
    model.export(tmp_path / "model.onnx")
