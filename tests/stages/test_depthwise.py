"""Depthwise convolutions in bfloat16: the same values, and a gradient no further from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.stages.depthwise import depthwise

SETTINGS = ([2, 1], [2, 2], [1, 1], 6)


def gradients(function: object, *, low: bool) -> tuple[Tensor, list[Tensor]]:
    """What it gives, and the gradients of input, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(*s, generator=generator).requires_grad_() for s in ((3, 6, 9, 8), (6, 1, 5, 5), (6,))]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = function(*given, *SETTINGS)  # type: ignore[operator]
    (found.float() * torch.arange(found.numel()).reshape(found.shape).cos()).sum().backward()
    return found.detach(), [x.grad for x in given]  # type: ignore[misc]


def test_the_gradient_of_the_weight_is_nearer_to_the_exact_one() -> None:
    plain = torch.ops.aten.conv2d.default
    _, exact = gradients(plain, low=False)
    theirs, usual = gradients(plain, low=True)
    ours, found = gradients(depthwise, low=True)
    assert torch.equal(ours, theirs)
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(x, exact, strict=True)] for x in (found, usual)]
    assert errors[0][1] < errors[1][1] < 0.01
    assert errors[0][0] == errors[1][0]
    assert errors[0][2] < 0.01


def test_in_float32_nothing_changes() -> None:
    (a, theirs), (b, ours) = (gradients(f, low=False) for f in (torch.ops.aten.conv2d.default, depthwise))
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(theirs, ours, strict=True))
