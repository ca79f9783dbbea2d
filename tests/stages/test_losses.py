"""The weighted distance: its value by loops over the written formula, its gradient by plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.graph.points import Point
from bitwright.stages import losses
from bitwright.stages.losses import WeightedDistances

COUNT = 3
LAYOUTS = {
    "maps": (Point("", "", samples=0, channels=1), (3, 4, 2, 5)),
    "rows": (Point("", "", samples=0, channels=1), (3, 4)),
    "tokens": (Point("", "", samples=0, channels=2), (3, 5, 4)),
    "tokens_first": (Point("", "", samples=1, channels=2), (5, 3, 4)),
    "channels_first": (Point("", "", samples=1, channels=0), (4, 3)),
    "windows": (Point("", "", samples=0, channels=2), (6, 5, 4)),
    "positions_before_images": (Point("", "", samples=0, channels=1, rounds=5), (15, 4)),
    "images_between_positions": (Point("", "", samples=0, channels=1, rounds=2), (12, 4)),
    "constant": (Point("", "", samples=0, channels=1, constant=True), (5, 4)),
}


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and weights of three images, one of them zero."""
    generator = torch.Generator().manual_seed(len(shape))
    a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return a, b, torch.tensor([0.3, 0.0, 2.5])


def owners(point: Point, shape: tuple[int, ...]) -> Tensor:
    """The image of every element, in the shape of the tensor; of a constant one all images are."""
    each = shape[point.samples] // (COUNT * point.rounds)
    along = [i // each % COUNT for i in range(shape[point.samples])]
    return torch.tensor(along).reshape([-1 if d == point.samples else 1 for d in range(len(shape))]).expand(shape)


def weighted_distance(a: Tensor, b: Tensor, weights: Tensor, point: Point, over: str = "sum") -> Tensor:
    """At one point, a scalar."""
    return WeightedDistances([point], over)([a], [b], weights.unsqueeze(1))[0]


def formula(a: Tensor, b: Tensor, weights: Tensor, point: Point, over: str) -> Tensor:
    """``mean_n w_n mean_positions sum_channels (a - b)^2``, a loop over images and channels (methods, section 1.4)."""
    owner, per_image = owners(point, tuple(a.shape)), []
    for n in range(COUNT):
        by_channel = []
        for c in range(a.shape[point.channels]):
            mine = torch.ones_like(owner, dtype=torch.bool) if point.constant else owner == n
            x, y, mine = (t.select(point.channels, c) for t in (a, b, mine))
            by_channel.append(((x - y)[mine] ** 2).mean())
        total = sum(by_channel) if over == "sum" else sum(by_channel) / len(by_channel)
        per_image.append(weights[n] * total)
    return sum(per_image) / COUNT


@pytest.mark.parametrize("over", ["sum", "mean"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_value_and_gradient_equal_the_formula(name: str, over: str) -> None:
    point, shape = LAYOUTS[name]
    a, b, weights = pair(shape)
    a.requires_grad_(True)
    expected = formula(a.double(), b.double(), weights.double(), point, over)
    (slope,) = torch.autograd.grad(3 * expected, a)
    found = weighted_distance(a, b, weights, point, over=over)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (mine,) = torch.autograd.grad(3 * found, a)
    torch.testing.assert_close(mine, slope, rtol=1e-5, atol=1e-7)


def test_gradient_equals_finite_differences() -> None:
    point, shape = LAYOUTS["windows"]
    a, b, weights = pair(shape)
    (slope,) = torch.autograd.grad(weighted_distance(a.requires_grad_(True), b, weights, point), a)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        ahead, behind = (
            float(weighted_distance(a + h * direction, b, weights, point).double()) for h in (0.1, -0.1)
        )  # a quadratic: the difference is exact whatever its width
    assert (ahead - behind) / 0.2 == pytest.approx(float((slope * direction).sum()), rel=1e-4)


def test_the_gradient_flows_to_the_student_alone() -> None:
    point, shape = LAYOUTS["maps"]
    a, b, weights = pair(shape)
    for tensor in (a, b, weights):
        tensor.requires_grad_(True)
    weighted_distance(a, b, weights, point).backward()
    assert a.grad is not None
    assert b.grad is None
    assert weights.grad is None


def test_an_image_of_weight_zero_does_not_count() -> None:
    point, shape = LAYOUTS["maps"]
    a, b, weights = pair(shape)
    other = a.clone()
    other[1] += 100
    assert torch.equal(weighted_distance(a, b, weights, point), weighted_distance(other, b, weights, point))


def test_no_distance_and_no_slope_at_the_teacher() -> None:
    for point, shape in LAYOUTS.values():
        a = pair(shape)[0].requires_grad_(True)
        found = weighted_distance(a, a.detach().clone(), torch.ones(COUNT), point)
        (slope,) = torch.autograd.grad(found, a)
        assert float(found.detach()) == 0
        assert not bool(slope.any())


def test_a_student_in_half_precision_is_summed_in_single() -> None:
    """Squares of 300 are beyond float16; the student's gradient comes back in its own precision."""
    a = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16, requires_grad=True)
    found = weighted_distance(a, torch.zeros_like(a), torch.tensor([1.0, 3.0]), Point("", "", 0, 1), over="mean")
    assert float(found.detach()) == pytest.approx(2 * 300.0**2)
    found.backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float16
    assert float(a.grad[1, 0, 0, 0]) == pytest.approx(2 * 300 * 3 / (2 * 64 * 4), rel=1e-2)


def test_a_single_number_for_each_image_is_an_output_too() -> None:
    a, b = (torch.randn(6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for loss in (losses.relative_error, losses.cosine_distance, losses.info_nce):
        torch.testing.assert_close(loss(a, b), loss(a[:, None], b[:, None]))
