"""Weights stretched to the spread of the float ones: same codes, same file, the scale alone differs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, dataset, images, prepared
from torch import Tensor, nn

from bitwright.graph import rewrite
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant import affine
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters


def calibrated(teacher: Captured, *, match_spread: bool, bias_correction: str = "none", **scheme: object) -> Student:
    student = insert_quantizers(teacher, Scheme(**{"weights": 3, **scheme}))
    stage = Calibrate(activations="minmax", match_spread=match_spread, bias_correction=bias_correction)
    return stage.run(student, teacher, dataset(6), Run())


def weights(student: Student) -> dict[str, tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Codes, dequantized values and blocks, by the path of the stored tensor."""
    found = {}
    for stored, quantizer in parameters(student.graph, "weight"):
        tensor = rewrite.get_tensor(student.graph, stored)
        assert quantizer.block is not None
        found[stored] = (quantizer.codes(tensor), quantizer(tensor), quantizer.block)
    return found


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
@pytest.mark.parametrize("name", CASES)
def test_codes_stay_and_the_spread_is_the_float_weights(name: str, granularity: str) -> None:
    """For biases that may be any float, so that no step has to be widened for one of them."""
    teacher, scheme = prepared(name), {"granularity": granularity, "group_size": 4, "activations": "float"}
    plain = weights(calibrated(teacher, match_spread=False, **scheme))
    matched = weights(calibrated(teacher, match_spread=True, **scheme))
    compared = 0
    for stored, (codes, values, block) in matched.items():
        assert torch.equal(codes, plain[stored][0])
        float_weight = rewrite.get_tensor(teacher.graph, stored)
        ones = affine.to_blocks(torch.ones_like(values), block).bool()
        rows = zip(affine.to_blocks(values, block), affine.to_blocks(float_weight, block), ones, strict=True)
        for found, wanted, filled in rows:
            a, b = found[filled].double(), wanted[filled].double()
            if float(a.std(correction=0)) > 0:
                torch.testing.assert_close(a.std(correction=0), b.std(correction=0), rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared or granularity == "group"


def test_there_is_something_to_match() -> None:
    """Or the test above would say nothing."""
    plain = weights(calibrated(prepared("transformer"), match_spread=False))
    for stored, (_, values, _) in plain.items():
        wanted = rewrite.get_tensor(prepared("transformer").graph, stored).flatten(1).std(1)
        assert float((values.flatten(1).std(1) / wanted - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["residual", "transposed", "transformer"])
@pytest.mark.parametrize("correction", ["analytic", "sequential"])
def test_frozen_equals_fake_quantized(name: str, correction: str) -> None:
    student = calibrated(prepared(name), match_spread=True, bias_correction=correction, weights=8, activations=8)
    before = student.flat(images(4))
    for a, b in zip(before, student.freeze().flat(images(4)), strict=True):
        assert torch.equal(a, b)


def test_a_second_calibration_does_not_stretch_again() -> None:
    teacher = prepared("residual")
    student = calibrated(teacher, match_spread=True, activations="float")
    stage = Calibrate(weights="minmax", activations="minmax", match_spread=True)
    stage.run(student, teacher, dataset(6), Run())
    for stored, (_, values, _) in weights(student).items():
        wanted = rewrite.get_tensor(teacher.graph, stored).flatten(1).std(1)
        torch.testing.assert_close(values.flatten(1).std(1), wanted, rtol=1e-5, atol=1e-6)


class _Tied(nn.Module):
    """Channels with one input each, one of them zero; a weight that a product reads in float, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.tied, self.head = nn.Conv2d(3, 3, 1, groups=3), nn.Linear(3, 3), nn.Linear(3, 4)
        nn.init.zeros_(self.depthwise.weight[1:2].data)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.tied(self.depthwise(x).mean((2, 3))))
        return self.head(x.unsqueeze(1) * self.tied.weight)


def test_channels_of_one_element_and_weights_read_in_float_stay() -> None:
    torch.manual_seed(0)
    teacher = prepare(capture(_Tied().eval(), images(2)))
    plain, matched = (calibrated(teacher, match_spread=m, activations="float") for m in (False, True))
    for stored in ("depthwise.weight", "tied.weight"):
        assert torch.equal(rewrite.get_tensor(matched.graph, stored), rewrite.get_tensor(teacher.graph, stored))
        assert torch.equal(weights(matched)[stored][1], weights(plain)[stored][1])
    assert not torch.equal(weights(matched)["head.weight"][1], weights(plain)["head.weight"][1])
