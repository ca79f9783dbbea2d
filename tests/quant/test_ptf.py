"""Power-of-two factors per channel, against a search written out and against the quantizer of the whole tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.errors import UsageError
from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.learned import LearnedActivation
from bitwright.quant.ptf import FactorErrors
from bitwright.quant.quantizer import Quantizer

SPREADS = torch.tensor([0.0, 0.02, 0.1, 0.3, 1.0, 4.0])


def stream(count: int = 3, seed: int = 0) -> list[Tensor]:
    """Batches [4, 5, 6] whose channels differ in range, the first of them dead."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 5, 6, generator=generator) + 0.3) * SPREADS for _ in range(count)]


def of_tensor(*, bits: int = 4, symmetric: bool = False) -> Quantizer:
    quantizer = Quantizer("sum", Grid(bits, symmetric), "activation")
    x = torch.cat(stream())
    span = float(x.max() - x.min())
    scale = torch.tensor(span / (quantizer.grid.qmax - quantizer.grid.qmin))
    quantizer.set_range(scale, None if symmetric else torch.round(-x.min() / scale))
    return quantizer


def with_factors(quantizer: Quantizer) -> tuple[Quantizer, FactorErrors]:
    """A quantizer with a scale per channel beside the one it was given."""
    errors = FactorErrors(quantizer)
    for batch in stream():
        errors.update(batch)
    made = Quantizer(quantizer.name, quantizer.grid, quantizer.role)
    made.set_range(errors.scale, quantizer.zero_point)
    return made, errors


def squared_error(quantizer: Quantizer) -> Tensor:
    x = torch.cat(stream())
    return (quantizer(x) - x).double().square().sum((0, 1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_factors_are_those_of_a_search_written_out(bits: int, symmetric: bool) -> None:
    quantizer = of_tensor(bits=bits, symmetric=symmetric)
    made, errors = with_factors(quantizer)
    x, scale, zero = torch.cat(stream()), quantizer.scale, quantizer.zero_point
    low, high = quantizer.grid.qmin, quantizer.grid.qmax
    for channel in range(1, 6):
        totals = []
        for alpha in range(4):
            step = scale / 8 * 2**alpha
            y = (torch.clamp(torch.round(x[..., channel] / step) + zero, low, high) - zero) * step
            totals.append(float((y - x[..., channel]).double().square().sum()))
        best = max(alpha for alpha, total in enumerate(totals) if total == min(totals))
        assert int(errors.exponents[channel]) == best
        assert made.scale[channel] == scale / 8 * 2**best
    assert len(set(errors.exponents.tolist())) > 1


def test_no_channel_is_worse_than_with_the_scale_of_the_tensor() -> None:
    quantizer = of_tensor()
    made, _ = with_factors(quantizer)
    before, after = squared_error(quantizer), squared_error(made)
    assert bool((after <= before).all())
    assert bool((after[2:4] < before[2:4] / 2).all())


def test_a_channel_whose_errors_are_equal_keeps_the_widest_scale() -> None:
    quantizer = of_tensor()
    made, errors = with_factors(quantizer)
    assert errors.exponents[0] == 3
    assert made.scale[0] == quantizer.scale


def test_alpha_three_everywhere_is_the_quantizer_of_the_tensor() -> None:
    quantizer, x = of_tensor(), torch.cat(stream())
    same = Quantizer("sum", quantizer.grid, "activation")
    same.set_range(FactorErrors(quantizer).scales[3].expand(6), quantizer.zero_point)
    assert torch.equal(same(x), quantizer(x))
    assert torch.equal(same.codes(x), quantizer.codes(x))


def test_the_errors_do_not_depend_on_the_batches() -> None:
    one, many = FactorErrors(of_tensor()), FactorErrors(of_tensor())
    one.update(torch.cat(stream()))
    for batch in stream():
        many.update(batch)
    torch.testing.assert_close(one.errors, many.errors, rtol=1e-6, atol=0)


def test_a_quantizer_with_scales_of_channels_quantizes_each_by_its_own() -> None:
    made, _ = with_factors(of_tensor())
    assert made.granularity == "channel"
    assert of_tensor().granularity == "tensor"
    for x in (torch.cat(stream()), stream()[0][0], stream()[0][0][0]):
        expected = [
            affine.fake_quantize(x[..., c], made.scale[c], made.zero_point[0], made.grid.qmin, made.grid.qmax)
            for c in range(6)
        ]
        assert torch.equal(made(x), torch.stack(expected, -1))


def test_scales_that_are_no_powers_of_two_apart_and_several_zero_points_are_refused() -> None:
    quantizer = Quantizer("sum", Grid(8), "activation")
    with pytest.raises(UsageError, match="powers of two"):
        quantizer.set_range(torch.tensor([0.1, 0.3]), torch.tensor(3.0))
    with pytest.raises(UsageError, match="one zero point for sum, found 2"):
        quantizer.set_range(torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_scales_start_as_they_are_and_keep_their_ratios(symmetric: bool) -> None:
    made, _ = with_factors(of_tensor(symmetric=symmetric))
    learned, x = LearnedActivation(made), torch.cat(stream())
    assert torch.equal(learned(x), made(x))
    with torch.no_grad():
        learned.step.mul_(1.37)
    made.set_range(learned.scale().reshape(made.scale.shape), made.zero_point)
    torch.testing.assert_close(made.scale, with_factors(of_tensor(symmetric=symmetric))[0].scale * 1.37)
    assert torch.equal(learned(x), made(x))


def test_the_learned_scale_has_the_gradient_of_all_channels_together() -> None:
    """By the chain rule: the scale of channel c is its ratio times the variable."""
    made, _ = with_factors(of_tensor())
    x, weights = torch.cat(stream()), torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(5))
    x.requires_grad_()
    learned = LearnedActivation(made)
    (learned(x) * weights).sum().backward()
    together, passed = learned.step.grad, x.grad
    expected, count = torch.zeros(()), x.numel()
    for c in range(6):
        alone = Quantizer("sum", made.grid, "activation")
        alone.set_range(made.scale[c], made.zero_point)
        single, part = LearnedActivation(alone), x.detach()[..., c].clone().requires_grad_()
        (single(part) * weights[..., c]).sum().backward()
        # LSQ divides by the root of the number of elements, here of one channel, there of all
        assert single.step.grad is not None
        expected += single.step.grad * (part.numel() / count) ** 0.5 * made.scale[c] / made.scale.min()
        assert passed is not None
        assert torch.equal(passed[..., c], part.grad)
    assert together is not None
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
