"""The check of a file judges every output by itself, and no output may lie further away than codes that tip explain."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.export import parity
from bitwright.export.deviation import output_parities
from bitwright.export.onnx import to_onnx
from bitwright.graph.readings import Reading, by_values

IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Outputs(nn.Module):
    """Scores, a mask of booleans, classes, a constant, the input itself, and the scores once more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)
        self.register_buffer("anchors", torch.arange(6.0).view(1, 6))

    def forward(self, images):
        scores = self.head(F.relu(self.conv(images)).mean((2, 3)))
        return scores, scores > 0, scores.argmax(1), self.anchors, images, scores


@pytest.fixture(scope="module")
def model():
    return bw.quantize(Outputs().eval(), IMAGES, "rtn", weights=8)


def test_every_kind_of_output_is_exported_and_checked(model, tmp_path):
    found = model.export(tmp_path / "m.onnx")
    assert [o.agreement for o in found.optimized_outputs][:3] == [1.0, 1.0, 1.0]
    assert [o.deviation for o in found.optimized_outputs][3:5] == [0.0, 0.0]
    assert len({o.name for o in found.outputs}) == 6


def stretched(model, factor):
    """The file with the weight of its last layer on another scale: no quantizer behind it notices."""
    program = to_onnx(model)
    scale = next(v for k, v in program.graph.initializers.items() if "weight_3" in k and k.endswith("/scale"))
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(factor))
    return program


def test_an_error_of_one_percent_is_found_and_would_not_be_at_ten_times_the_tolerance():
    torch.manual_seed(6)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    model = bw.quantize(network.eval(), IMAGES, "rtn", weights=8)
    program = stretched(model, 1.01)
    found = parity.check_parity(model, program, IMAGES)
    assert found.first_divergence == "the output"
    assert 1 < found.optimized.deviation < 10
    assert parity.check_parity(model, to_onnx(model), IMAGES).optimized.deviation < 0.5


def judged(expected, found, shaken=None):
    runs = {"file": lambda _: [found]}
    shaken = expected if shaken is None else shaken
    (output,) = output_parities(
        ["y"], [by_values(expected)], iter([IMAGES]), lambda _: [expected], lambda _: [shaken], runs
    )["file"]
    return output


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_of_another_size_hide_nothing(axis):
    """Boxes in pixels beside scores: an error of one percent of the scores is a millionth of the whole."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([100.0] * 4 + [0.01] * 80).view(-1, 1)
    expected = torch.randn(8, 84, 40, generator=generator) * sizes
    wrong = expected.clone()
    wrong[:, 4:] *= 1.01
    if axis == 2:
        expected, wrong = expected.transpose(1, 2), wrong.transpose(1, 2)
    assert judged(expected, wrong).diverges
    assert not judged(expected, expected * 1.0001).diverges
    assert not judged(expected, wrong, shaken=wrong).diverges  # the simulation itself goes as far


def test_a_few_values_that_are_far_off_are_found():
    expected = torch.randn(8, 16, 40, generator=torch.Generator().manual_seed(0))
    wrong = expected.clone()
    wrong[3, 7, 5] += 1
    assert judged(expected, wrong).diverges


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_whole_numbers_are_compared_by_how_many_are_equal(kind):
    expected = torch.randint(0, 2, (8, 500), generator=torch.Generator().manual_seed(0)).to(kind)
    few, many = expected.clone(), expected.clone()
    few[:, :4] = 1 - few[:, :4].to(torch.int64)
    many[:, :100] = 1 - many[:, :100].to(torch.int64)
    assert not judged(expected, few.to(kind)).diverges
    assert judged(expected, many.to(kind)).diverges


def test_values_that_are_not_finite_are_found():
    expected = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    wrong = expected.clone()
    wrong[0, 0] = float("nan")
    assert judged(expected, wrong).diverges
    assert judged(torch.zeros(8, 4), torch.full((8, 4), 1e-3)).diverges  # a constant


@pytest.mark.parametrize(
    ("images", "others", "own", "differs"),
    [(8, 3, 0, False), (8, 4, 0, True), (400, 6, 0, False), (400, 7, 0, True), (400, 20, 8, False), (400, 30, 8, True)],
)
def test_a_few_answers_may_change_by_chance(images, others, own, differs):
    """Where two classes are as good as equal: as many as in the simulation itself, and what chance adds to so few."""
    ours = torch.tensor([[3.0, 3.0 - 1e-7 * 4, 0.0], [0.0, 1.0, 2.0]]).repeat(images // 2, 1)
    ours = torch.cat([ours[::2], ours[::2]]) + torch.linspace(0, 5, images)[:, None]

    def flipped(count):
        found = ours.clone()
        found[:count, 1] = found[:count, 0] + 1e-5
        return [found]

    run = {"file": lambda _: flipped(others)}
    readings = [Reading("scores", 1)]
    batches = iter([torch.empty(0)])
    (judged,) = output_parities(["scores"], readings, batches, lambda _: [ours], lambda _: flipped(own), run)["file"]
    assert judged.agreement == 1 - others / images
    assert judged.diverges == differs
