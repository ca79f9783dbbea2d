"""Codes that lie on the boundary between two are no difference; all others are."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.export import arbiter, layers, parity
from bitwright.export.arbiter import compare_kernels
from bitwright.export.layers import Passing, compare_layer, compare_layers, simulated
from bitwright.export.onnx import to_onnx
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.runtimes.onnxruntime import session

POOLINGS = [
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.Upsample(scale_factor=2, mode="bilinear"),
]


def flat_images():
    """Noise around a square of one value, so that the largest mean is as large as the largest value."""
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    images[:2, :, 6:18, 6:18], images[2:, :, 6:18, 6:18] = 3.0, -3.0
    return images


@pytest.fixture(params=POOLINGS, ids=["two", "border", "bilinear"], scope="module")
def pooled(request):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), request.param, nn.Conv2d(8, 4, 3)).eval()
    return bw.quantize(network, flat_images(), "rtn", weights=8, device="cpu")


def test_means_of_codes_on_one_scale_pass_though_many_are_halves(pooled):
    scales = {x.name: float(pooled.quantizer(x.activation).scale) for x in pooled.layers if x.activation}
    assert scales["1"] == pytest.approx(scales["2"], rel=1e-6), "the case needs equal scales"
    found = compare_layers(pooled, to_onnx(pooled), flat_images())
    assert {layer.name: layer.differing_fraction for layer in found}["2"] == 0


def test_a_step_that_is_wrong_by_half_a_percent_does_not_pass(pooled):
    program = to_onnx(pooled)
    scale = program.graph.initializers["2/scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(1.005))
    assert [x.name for x in compare_layers(pooled, program, flat_images()) if x.diverges] == ["2"]


class Cancelling(nn.Module):
    """A layer whose weights sum to zero over inputs that hardly differ: its sums are far smaller than their terms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(1024, 512), nn.Linear(512, 10)
        with torch.no_grad():
            self.layer.weight.copy_(0.01 * nn.init.normal_(self.layer.weight))
            self.layer.weight -= self.layer.weight.mean(1, keepdim=True)
            self.layer.bias.zero_()

    def forward(self, x):
        return self.last(self.layer((0.01 * self.first(x)).flatten(1) + 3).relu())


@pytest.mark.parametrize("factor", [1, 1.005])
def test_codes_that_cancelling_sums_decide_pass_and_a_wrong_step_does_not(factor):
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = bw.quantize(Cancelling().eval(), images, "rtn", device="cpu")
    program = to_onnx(model)
    scale = program.graph.initializers["relu/scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(factor))
    (found,) = (layer for layer in compare_layers(model, program, images[:4]) if layer.name == "relu")
    assert found.diverges == (factor != 1)


def test_a_boundary_is_as_wide_as_the_rounding_of_float32():
    """There both codes are right, but no third one."""
    quantizer = Quantizer("x", Grid(8, symmetric=False), "activation")
    quantizer.set_range(torch.tensor(0.1))

    def right(step, code):
        x = torch.tensor([step]) * 0.1
        return compare_layer(quantizer, Passing(x, x), torch.tensor([float(code)])).differing_fraction == 0

    for step, found in ((0.5, 1), (1.5, 1), (100.5, 1), (100.501, 0), (100.499, 0), (7.0, 0), (7.499, 0)):
        assert right(step, int(step)) + right(step, int(step) + 1) == 1 + found, step
        assert not right(step, int(step) + 2)


@pytest.mark.parametrize("compare", [compare_layers, lambda *given: list(compare_kernels(*given).values())])
def test_layers_of_images_that_do_not_fit_together_are_those_of_all_at_once(pooled, monkeypatch, compare):
    program = to_onnx(pooled)
    scale = program.graph.initializers["2/scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(1.005))
    whole, images = compare(pooled, program, flat_images()), flat_images()
    each = [compare(pooled, program, image) for image in images.split(1)]
    assert max(x.differing_fraction for x in whole) > 0, "the case needs codes that differ"
    sizes = []
    monkeypatch.setattr(layers, "PASS_BYTES", 1)
    monkeypatch.setattr(layers, "simulated", lambda m, x: [sizes.append(len(x)), simulated(m, x)][1])
    monkeypatch.setattr(arbiter, "simulated", layers.simulated)
    parts = compare(pooled, program, images)
    assert sizes == [1] * len(images)
    for position, (one, many) in enumerate(zip(whole, parts, strict=True)):
        assert (many.values, many.max_steps) == (one.values, one.max_steps)
        assert many.differing_fraction == pytest.approx(np.mean([x[position].differing_fraction for x in each]))


class Skipping(nn.Module):
    """Sums and a layer that is read twice, so that what one output needs is shared with others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.last(self.third(x).relu() + x)


def test_kernels_of_many_layers_are_asked_for_in_several_sessions(monkeypatch):
    model = bw.quantize(Skipping().eval(), flat_images(), "rtn", weights=8, device="cpu").freeze()
    program, images, opened = to_onnx(model), flat_images(), []
    scale = program.graph.initializers["quantizer_weight_third/scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(1.1))
    whole = compare_kernels(model, program, images)
    monkeypatch.setattr(arbiter, "OUTPUTS", 2)
    monkeypatch.setattr(arbiter, "session", lambda part, **how: [opened.append(part), session(part, **how)][1])
    assert compare_kernels(model, program, images) == whole
    assert [len(part.graph.outputs) for part in opened] == [2, 2, 2]
    assert sum(len(part.graph) for part in opened) < 2 * len(program.graph), "each has only what it needs"
    assert any(layer.diverges for layer in whole.values()), "the case needs a layer that differs"
    assert any(layer.kernel == "QLinearConv" for layer in whole.values())


@pytest.mark.parametrize(
    ("shape", "sizes"), [((32, 3, 224, 224), 8), ((32, 3, 640, 640), 3), ((32, 3, 1024, 1024), 2), ((3, 3, 8, 8), 2)]
)
def test_large_images_are_compared_a_few_at_a_time(shape: tuple[int, ...], sizes: int) -> None:
    assert parity.batch_sizes(torch.empty(shape, device="meta")) == (1, sizes)
    assert parity.batch_sizes(torch.empty(1, 3, 1024, 1024, device="meta")) == (1, 1)
