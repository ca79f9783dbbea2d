"""The affine quantizer against loops and closed forms (methods, section 0)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitwright.quant import affine
from bitwright.quant.grid import Grid


def one(x: float, scale: float, zero: int, qmin: int, qmax: int) -> float:
    """The definition, in Python's own numbers; ``round`` is half to even."""
    return (min(max(round(x / scale) + zero, qmin), qmax) - zero) * scale


GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_equals_the_definition_element_by_element(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    zero = 0 if symmetric else (grid.qmax + 1) // 2 - 1
    x = torch.randn(400, generator=torch.Generator().manual_seed(bits)) * 2
    scale = 0.25  # a power of two, so that double and single precision agree
    found = affine.fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero)), grid.qmin, grid.qmax)
    assert found.tolist() == [one(v, scale, zero, grid.qmin, grid.qmax) for v in x.tolist()]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_idempotent_few_values_and_zero_is_kept(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, symmetric)
    zero = torch.tensor(0.0 if symmetric else float(grid.qmax // 3))
    x = torch.linspace(-40, 40, 20_001)
    once = affine.fake_quantize(x, torch.tensor(0.137), zero, grid.qmin, grid.qmax)
    assert torch.equal(affine.fake_quantize(once, torch.tensor(0.137), zero, grid.qmin, grid.qmax), once)
    assert len(torch.unique(once)) == 2**bits
    assert affine.fake_quantize(torch.zeros(1), torch.tensor(0.137), zero, grid.qmin, grid.qmax).item() == 0


def test_largest_symmetric_value_is_one_step_below_the_threshold() -> None:
    for bits in range(2, 9):
        threshold, grid = 3.0, Grid(bits, symmetric=True)
        step = threshold / 2 ** (bits - 1)
        both = affine.fake_quantize(
            torch.tensor([9.0, -9.0]), torch.tensor(step), torch.tensor(0.0), grid.qmin, grid.qmax
        )
        assert both.tolist() == pytest.approx([threshold - step, -threshold])


def test_ties_go_to_even_before_an_odd_zero_point_is_added() -> None:
    x, step = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0)
    codes = affine.quantize(x, step, torch.tensor(3.0), 0, 15)
    assert codes.tolist() == [1, 3, 3, 5, 5]  # rounding x / s + z instead would give 2, 2, 4, 4, 6
    assert affine.fake_quantize(x, step, torch.tensor(3.0), 0, 15).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("zero", [0.0, 3.0, 255.0])
def test_fake_quantization_is_dequantized_codes_bit_for_bit(zero: float) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 7
    settings = (torch.tensor(0.0713), torch.tensor(zero))
    codes = affine.quantize(x, *settings, 0, 255)
    found = affine.dequantize(codes.to(torch.int16), *settings)
    assert torch.equal(found, affine.fake_quantize(x, *settings, 0, 255))
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 255


def test_the_input_is_not_changed() -> None:
    x = torch.randn(10)
    before = x.clone()
    affine.fake_quantize(x, torch.tensor(0.1), torch.tensor(1.0), 0, 15)
    assert torch.equal(x, before)


BLOCKS = [
    ((4, 6), (1, 6)),
    ((4, 6), (1, 4)),  # a tail of two
    ((4, 6), (4, 6)),
    ((3, 5, 2, 2), (1, 2, 2, 2)),  # a tail of one
    ((6, 3, 2, 2), (3, 1, 2, 2)),  # transposed, two groups of three inputs, three outputs each
    ((4, 1, 3, 3), (1, 1, 3, 3)),  # depthwise
    ((5, 7), (2, 3)),
]


def block_of(index: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, ...]) -> int:
    """Number of the block that an element belongs to, in row-major order."""
    number = 0
    for i, d, b in zip(index, shape, block, strict=True):
        number = number * math.ceil(d / b) + i // b
    return number


def indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.cartesian_prod(*map(torch.arange, shape)).tolist()]


@pytest.mark.parametrize(("shape", "block"), BLOCKS)
def test_blocks_gather_what_shares_a_scale(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    rows = affine.to_blocks(x, block)
    expected: dict[int, list[float]] = {}
    for index in indices(shape):
        expected.setdefault(block_of(index, shape, block), []).append(x[index].item())
    assert len(rows) == len(expected)
    for number, row in enumerate(rows.tolist()):
        assert sorted(v for v in row if v) == sorted(expected[number])
        assert len(row) == math.prod(block)


@pytest.mark.parametrize(("shape", "block"), BLOCKS)
def test_expanding_blocks_is_the_inverse(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    count = math.prod(math.ceil(d / b) for d, b in zip(shape, block, strict=True))
    spread = affine.expand_blocks(torch.arange(float(count)), shape, block).expand(shape)
    for index in indices(shape):
        assert spread[index].item() == block_of(index, shape, block)


def test_per_channel_equals_a_loop_over_channels() -> None:
    weight: Tensor = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    steps = torch.rand(5, generator=torch.Generator().manual_seed(3)) / 4 + 0.05
    block = (1, 3, 2, 2)
    zero = torch.zeros(())
    found = affine.fake_quantize(weight, affine.expand_blocks(steps, tuple(weight.shape), block), zero, -8, 7)
    for channel, step in zip(range(5), steps, strict=True):
        assert torch.equal(found[channel], affine.fake_quantize(weight[channel], step, zero, -8, 7))


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "strided", "flat"])
def test_large_tensors_are_rounded_in_pieces_to_the_same_bits(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = 3 * torch.randn(3, 5, 40, 30, generator=torch.Generator().manual_seed(0))
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x[:, :, ::2],
        "flat": x.reshape(-1),
    }[order]
    scale, zero = torch.tensor(0.37), torch.tensor(3.0)
    whole = affine.fake_quantize(x, scale, zero, 0, 15), affine.nearest_multiple(x, scale, -7, 8)
    monkeypatch.setattr(affine, "LARGE", 1)
    monkeypatch.setattr(affine, "PIECE", 1000)
    assert affine._is_large(x, scale) is (order != "strided")
    parts = affine.fake_quantize(x, scale, zero, 0, 15), affine.nearest_multiple(x, scale, -7, 8)
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert not affine._is_large(x.clone().requires_grad_(), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero_point", [0.0, 3.0, 255.0])
def test_extreme_values_are_rounded_in_pieces_to_the_same_bits(
    dtype: torch.dtype, zero_point: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, float("inf"), float("-inf"), 0.5, -0.5, 1.5, 2.0**24])
    x = torch.cat([edges, edges * 0.37, 0.37 * (torch.arange(-300, 300) + 0.5)]).to(dtype)
    scale, zero = torch.tensor(0.37), torch.tensor(zero_point)
    whole = affine.fake_quantize(x, scale, zero, 0, 255)
    monkeypatch.setattr(affine, "LARGE", 1)
    monkeypatch.setattr(affine, "PIECE", 100)
    parts = affine.fake_quantize(x, scale, zero, 0, 255)
    assert torch.equal(parts, whole)
    assert torch.equal(parts.signbit(), whole.signbit())
