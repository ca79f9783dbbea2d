"""By how much a quantized weight is too narrow."""

from __future__ import annotations

import pytest
import torch

from bitwright.quant.ranges import spread_ratio


@pytest.mark.parametrize("block", [(1, 7), (1, 3), (3, 7)])
def test_it_is_the_ratio_of_standard_deviations_in_every_block(block: tuple[int, int]) -> None:
    """Also in a tail that is shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 7, generator=generator) + 0.5
    q = torch.round(w * 2) / 3
    expected = [
        float(a.std(correction=0) / b.std(correction=0))
        for rows, other in zip(w.split(block[0], 0), q.split(block[0], 0), strict=True)
        for a, b in zip(rows.split(block[1], 1), other.split(block[1], 1), strict=True)
        if a.numel() > 1
    ]
    found = spread_ratio(w, q, block)
    if block == (1, 3):  # whose tails are of one element
        assert found[2::3].tolist() == [1.0, 1.0, 1.0]
        found = found.reshape(3, 3)[:, :2].reshape(-1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_blocks_without_a_spread_are_left_alone() -> None:
    w = torch.tensor([[0.01, -0.01], [2.0, 2.0], [0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0], [1.9, 1.9], [0.0, 0.0]])
    assert spread_ratio(w, q, (1, 2)).tolist() == [1.0, 1.0, 1.0]
    assert spread_ratio(
        torch.tensor([[[[0.3]]], [[[0.0]]]]), torch.tensor([[[[0.2]]], [[[0.0]]]]), (1, 1, 1, 1)
    ).tolist() == [1.0, 1.0]
