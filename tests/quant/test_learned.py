"""Learned quantizers against element-by-element closed forms (methods, sections 0.2 and 0.3)."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from bitwright.quant.affine import nearest_multiple
from bitwright.quant.grid import Grid
from bitwright.quant.learned import (
    LearnedActivation,
    LearnedBias,
    LearnedWeight,
    RoundedBias,
    _FakeQuantize,
    _gradients_without_waiting,
    _nearest_on_gpu,
    dampen,
    held_values,
    inverse_rectified_sigmoid,
    learned_values,
    one_pass,
    rectified_sigmoids,
    rounding_regularizers,
)
from bitwright.quant.quantizer import Quantizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ soft rounding


def test_rectified_sigmoid_and_its_inverse_equal_the_formula() -> None:
    for a in torch.linspace(-6, 6, 101).tolist():
        expected = min(max(1 / (1 + math.exp(-a)) * 1.2 - 0.1, 0), 1)
        assert float(rectified_sigmoids([torch.tensor(a, dtype=torch.float64)])[0]) == pytest.approx(
            expected, abs=1e-12
        )
    h = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoids([inverse_rectified_sigmoid(h)])[0], h, rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_regularizer_is_the_written_sum_and_zero_only_where_all_is_decided(beta: float) -> None:
    h = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sum(1 - abs(2 * v - 1) ** beta for v in h.tolist())
    assert float(rounding_regularizers([h], beta)) == pytest.approx(expected, rel=1e-12)
    decided = (h > 0.5).double()
    assert float(rounding_regularizers([decided], beta)) == 0
    decided[3] = 0.999
    assert float(rounding_regularizers([decided], beta)) > 0


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_regularizer_leaves_decided_roundings_alone_and_moves_all_others(beta: float) -> None:
    bound = math.log(11)  # beyond it the rectified sigmoid is flat at 0 or 1
    a = torch.tensor([-50.0, -bound - 0.01, -bound + 0.01, -0.5, 0.5, bound - 0.01, bound + 0.01, 50.0])
    a.requires_grad_(True)
    (slope,) = torch.autograd.grad(rounding_regularizers(rectified_sigmoids([a]), beta), a)
    assert slope[[0, 1, 6, 7]].tolist() == [0, 0, 0, 0]
    assert bool((slope[[2, 3]] > 0).all())  # down a slope, towards 0
    assert bool((slope[[4, 5]] < 0).all())


# ------------------------------------------------------------------------------------------------ weights

Index = tuple[int, ...]
KINDS: dict[str, tuple[Index, Index | None]] = {
    "linear": ((3, 8), (1, 8)),
    "conv": ((3, 2, 2, 2), (1, 2, 2, 2)),
    "tensor": ((3, 8), (3, 8)),
    "one_scale": ((3, 8), None),
    "groups": ((3, 8), (1, 3)),  # the last group of a row is shorter
    "conv_groups": ((2, 4, 2, 2), (1, 2, 2, 2)),
    "transposed": ((4, 3, 2, 2), (4, 1, 2, 2)),
    "transposed_grouped": ((4, 3, 1, 2), (2, 1, 1, 2)),
}
"""Shape and extent of one scale."""


def elements(shape: Index, block: Index | None) -> dict[Index, int]:
    """The scale of every element: blocks in row-major order."""
    block = block or shape
    counts = [-(-d // b) for d, b in zip(shape, block, strict=True)]
    owner = {}
    for index in itertools.product(*map(range, shape)):
        number = 0
        for i, b, n in zip(index, block, counts, strict=True):
            number = number * n + i // b
        owner[index] = number
    return owner


def weight_of(kind: str, bits: int = 3, seed: int = 0) -> tuple[Tensor, Quantizer, dict[Index, int]]:
    """A weight, a quantizer under which some of it saturates, and the scale of every element."""
    shape, block = KINDS[kind]
    owner = elements(shape, block)
    weight, quantizer = noise(*shape, seed=seed), Quantizer("layer", Grid(bits, True), "weight", shape, block)
    count = max(owner.values()) + 1
    quantizer.set_range(0.3 + 0.4 * torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)))
    return weight, quantizer, owner


def randomise(learned: LearnedWeight, seed: int = 5) -> None:
    """Moves all variables from where they start."""
    with torch.no_grad():
        learned.codes += 0.7 * noise(*learned.codes.shape, seed=seed)
        learned.step *= 1 + 0.2 * noise(*learned.step.shape, seed=seed + 1).tanh()


def soft(a: float) -> float:
    return min(max(1 / (1 + math.exp(-a)) * 1.2 - 0.1, 0), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_weights_equal_the_formula_element_by_element(kind: str) -> None:
    """``s clamp(floor(w / s) + h(a))``, with a factor on the step of each block."""
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "soft")
    randomise(learned)
    found = learned()
    assert found.shape == weight.shape
    for index, block in owner.items():
        step = float(quantizer.scale[block])
        code = math.floor(float(weight[index]) / step) + soft(learned.codes[index].item())
        expected = min(max(code, -4), 3) * step * learned.step[block].item()
        assert found[index].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_rounding_starts_at_the_weight_and_hardens_to_the_nearest(kind: str) -> None:
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "soft")
    for index, block in owner.items():
        real = float(weight[index]) / float(quantizer.scale[block])
        assert learned.softness()[index].item() == pytest.approx(real - math.floor(real), abs=1e-5)
        inside = min(max(real, -4), 3)
        assert learned()[index].item() == pytest.approx(inside * float(quantizer.scale[block]), abs=1e-5)
    assert torch.equal(learned.hard_codes(), quantizer.codes(weight).float())
    assert torch.equal(learned.hard(), quantizer(weight))


def test_ties_go_up_at_the_start() -> None:
    quantizer = Quantizer("a", Grid(4, True), "weight", (1, 6), (1, 6))
    quantizer.set_range(torch.tensor([0.25]))
    weight = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]) * 0.25
    assert LearnedWeight(weight, quantizer, "soft").hard_codes().tolist() == [[-2, -1, 0, 1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_hard_code_of_soft_rounding_is_floor_or_ceil_of_its_start(kind: str) -> None:
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "soft")
    for seed in range(5):
        with torch.no_grad():
            learned.codes.copy_(6 * noise(*weight.shape, seed=seed))
        codes = learned.hard_codes()
        for index, block in owner.items():
            low = math.floor(float(weight[index]) / float(quantizer.scale[block]))
            up = soft(learned.codes[index].item()) >= 0.5
            assert int(codes[index]) == min(max(low + up, -4), 3)


@pytest.mark.parametrize("kind", ["linear", "conv_groups"])
def test_soft_equals_hard_once_all_is_decided(kind: str) -> None:
    weight, quantizer, _ = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "soft")
    assert learned.decided() < weight.numel()
    with torch.no_grad():
        learned.codes.copy_(torch.where(noise(*weight.shape, seed=3) > 0, 50.0, -50.0))
        learned.step.mul_(1.1)
    assert learned.decided() == weight.numel()
    assert torch.equal(learned(), learned.hard())


def test_how_many_are_decided() -> None:
    weight, quantizer, _ = weight_of("linear")
    learned = LearnedWeight(weight, quantizer, "soft")
    with torch.no_grad():
        h = torch.full((24,), 0.4)
        h[:7] = torch.tensor([0.0, 1.0, 0.0009, 0.9991, 0.0011, 0.9989, 0.5])
        learned.codes.copy_(inverse_rectified_sigmoid(h).reshape(3, 8))
    assert learned.decided() == 4
    assert LearnedWeight(weight, quantizer, "straight-through").decided() == 24


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_soft_rounding(kind: str) -> None:
    """``dW/da = s h'(a)`` where neither sigmoid nor grid clamps; ``dW/dfactor`` is the code times the first step."""
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "soft")
    randomise(learned)
    g = noise(*weight.shape, seed=8)
    codes, steps = torch.autograd.grad(learned(), [learned.codes, learned.step], g)
    expected: dict[int, float] = defaultdict(float)
    for index, block in owner.items():
        step, a = float(quantizer.scale[block]), learned.codes[index].item()
        low = math.floor(float(weight[index]) / step)
        code = low + soft(a)
        sigmoid = 1 / (1 + math.exp(-a))
        slope = 1.2 * sigmoid * (1 - sigmoid) if 0 < soft(a) < 1 and -4 < code < 3 else 0.0
        factor = step * learned.step[block].item()
        assert float(codes[index]) == pytest.approx(float(g[index]) * factor * slope, abs=1e-5)
        expected[block] += float(g[index]) * min(max(code, -4), 3) * step
    assert steps.tolist() == pytest.approx([expected[b] for b in range(len(expected))], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_starts_as_the_quantizer(kind: str) -> None:
    weight, quantizer, _ = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "straight-through")
    assert torch.equal(learned(), quantizer(weight))
    assert torch.equal(learned.hard(), quantizer(weight))
    assert torch.equal(learned.hard_codes(), quantizer.codes(weight).float())
    assert torch.equal(learned.scale(), quantizer.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_with_a_factor_on_the_step(kind: str) -> None:
    """Codes round and clamp by themselves; gradients pass the rounding and end at the grid."""
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "straight-through")
    randomise(learned)
    g = noise(*weight.shape, seed=8)
    found = learned()
    codes, steps = torch.autograd.grad(found, [learned.codes, learned.step], g)
    expected: dict[int, float] = defaultdict(float)
    for index, block in owner.items():
        first, real = float(quantizer.scale[block]), learned.codes[index].item()
        code = round(min(max(real, -4), 3))
        factor = learned.step[block].item()
        assert found[index].item() == pytest.approx(code * first * factor, abs=1e-6)
        assert float(codes[index]) == pytest.approx(float(g[index]) * first * factor * (-4 < real < 3), abs=1e-6)
        expected[block] += float(g[index]) * code * first
    assert steps.tolist() == pytest.approx([expected[b] for b in range(len(expected))], rel=1e-4, abs=1e-4)
    assert torch.equal(learned.hard(), found)


def test_gradients_pass_at_the_ends_of_a_grid_and_not_beyond() -> None:
    """Roundings in closed form leave codes at the ends, where they must be able to move back."""
    weight, quantizer, _ = weight_of("conv")
    learned = LearnedWeight(weight, quantizer, "straight-through")
    ends = torch.tensor([-4.0, 3.0, math.nextafter(-4.0, 0), math.nextafter(3.0, 0)])
    beyond = torch.nextafter(torch.tensor([-4.0, 3.0]), torch.tensor([-math.inf, math.inf]))
    with torch.no_grad():
        learned.codes.view(-1)[:6] = torch.cat([ends, beyond])
    (slope,) = torch.autograd.grad(learned(), learned.codes, torch.ones_like(weight))
    assert (slope.view(-1)[:6] != 0).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("rounding", ["soft", "straight-through"])
def test_one_scale_a_channel_is_a_loop_over_channels(rounding: str) -> None:
    weight, quantizer, _ = weight_of("conv")
    whole = LearnedWeight(weight, quantizer, rounding)
    randomise(whole)
    g = noise(*weight.shape, seed=8)
    value, slopes = whole(), torch.autograd.grad(whole(), [whole.codes, whole.step], g)
    for c in range(len(weight)):
        single = Quantizer("one", quantizer.grid, "weight", (1, *weight.shape[1:]), (1, *weight.shape[1:]))
        single.set_range(quantizer.scale[c])
        part = LearnedWeight(weight[c : c + 1], single, rounding)
        with torch.no_grad():
            part.codes.copy_(whole.codes[c : c + 1])
            part.step.copy_(whole.step[c : c + 1])
        torch.testing.assert_close(part()[0], value[c])
        torch.testing.assert_close(part.hard()[0], whole.hard()[c])
        mine = torch.autograd.grad(part(), [part.codes, part.step], g[c : c + 1])
        for slope, own in zip(slopes, mine, strict=True):
            torch.testing.assert_close(own[0], slope[c])


def test_a_factor_has_a_floor() -> None:
    weight, quantizer, _ = weight_of("linear")
    learned = LearnedWeight(weight, quantizer, "straight-through")
    with torch.no_grad():
        learned.step.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    expected = quantizer.scale * torch.tensor([2.0**-16, 2.0**-16, 1.0])
    assert torch.equal(learned.scale(), expected)
    torch.testing.assert_close(learned(), quantizer.codes(weight) * expected.unsqueeze(1), rtol=1e-6, atol=0)
    quantizer.set_range(learned.scale())  # which the quantizer takes


@pytest.mark.parametrize("rounding", ["soft", "straight-through"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", ["linear", "groups", "transposed"])
def test_what_is_hard_lies_on_the_grid_that_the_quantizer_gets(kind: str, bits: int, rounding: str) -> None:
    weight, quantizer, _ = weight_of(kind, bits)
    learned = LearnedWeight(weight, quantizer, rounding)
    randomise(learned)
    hard, codes = learned.hard(), learned.hard_codes()
    quantizer.set_range(learned.scale())
    assert torch.equal(quantizer(hard), hard)
    assert torch.equal(quantizer.codes(hard).float(), codes)
    assert quantizer.grid.qmin <= float(codes.min()) <= float(codes.max()) <= quantizer.grid.qmax


@pytest.mark.parametrize("kind", KINDS)
def test_dampening_takes_a_share_of_the_way_to_the_integer_and_changes_none(kind: str) -> None:
    weight, quantizer, owner = weight_of(kind)
    learned = LearnedWeight(weight, quantizer, "straight-through")
    randomise(learned)
    before, hard = learned.codes.detach().clone(), learned.hard_codes()
    dampen([learned], 0.25)
    for index in owner:
        code = float(before[index])
        expected = 0.75 * code + 0.25 * min(max(round(code), -4), 3)
        assert float(learned.codes.detach()[index]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(learned.hard_codes(), hard)
    dampen([learned], 1.0)
    assert torch.equal(learned.hard_codes(), hard)
    torch.testing.assert_close(learned().detach(), learned.hard())


# -------------------------------------------------------------------------------------------- activations


def activation(bits: int = 3, scale: float = 0.25, zero: float = 2.0, *, symmetric: bool = False) -> Quantizer:
    quantizer = Quantizer("a", Grid(bits, symmetric), "activation")
    quantizer.set_range(torch.tensor(scale), torch.tensor(zero))
    return quantizer


QUANTIZERS = {
    "affine": activation,
    "from_zero": lambda: activation(zero=0.0),
    "symmetric": lambda: activation(zero=0.0, symmetric=True),
    "eight_bits": lambda: activation(8, 2.0**-6, 100.0),
    "all_negative": lambda: activation(zero=7.0),
}
SHAPES = {"rows": (6, 50), "maps": (2, 5, 6, 5), "maps_channels_last": (2, 5, 6, 5), "tokens": (2, 30, 5)}


def signal(shape: str, seed: int = 0) -> Tensor:
    x = noise(*SHAPES[shape], seed=seed)
    return x.contiguous(memory_format=torch.channels_last) if shape == "maps_channels_last" else x


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_float_share_it_is_the_quantizer(shape: str, name: str) -> None:
    quantizer, x = QUANTIZERS[name](), signal(shape)
    learned = LearnedActivation(quantizer)
    assert torch.equal(learned(x), quantizer(x))
    assert float(learned.scale()) == float(quantizer.scale)


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_lsq_inside_below_and_above(shape: str, name: str, mix: float) -> None:
    """For a blend ``p x + (1 - p) Q(x)``; with ``p = 0`` LSQ itself."""
    quantizer, x = QUANTIZERS[name](), signal(shape).requires_grad_(True)
    learned = LearnedActivation(quantizer)
    learned.mix = mix
    g = torch.empty_like(x).copy_(noise(*x.shape, seed=3))  # in the memory order of the activation
    y = learned(x)
    mine, slope = torch.autograd.grad(y, [x, learned.step], g)
    step = float(quantizer.scale)
    low, high = (e - float(quantizer.zero_point) for e in (quantizer.grid.qmin, quantizer.grid.qmax))
    total, kinds = 0.0, set()
    for value, out, gradient, own in zip(*(t.flatten().tolist() for t in (x, y, g, mine)), strict=True):
        r = value / step
        inside = low < r < high
        kinds.add((r <= low) - (r >= high))
        total += gradient * (round(r) - r if inside else (low if r <= low else high))
        quantized = min(max(round(r), low), high) * step
        assert out == pytest.approx(mix * value + (1 - mix) * quantized, abs=1e-6)
        assert own == pytest.approx(gradient * (mix + (1 - mix) * inside), abs=1e-6)
    expected = (1 - mix) * total / math.sqrt(x.numel() * max(high, 1))
    assert float(slope) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len(kinds) == 3


def test_gradient_of_the_step_equals_autograd_through_a_scaled_gradient() -> None:
    """Convention (a) of the methods: ``s_eff = stopgrad(s - s g) + s g``, rounding straight through, plain clamp."""
    quantizer, x = activation(4, 0.23, 5.0), noise(400)
    learned = LearnedActivation(quantizer)
    (found,) = torch.autograd.grad(learned(x).square().sum(), learned.step)
    s = quantizer.scale.clone().requires_grad_(True)
    g = (x.numel() * 10) ** -0.5
    effective = (s - s * g).detach() + s * g
    r = (x / effective).clamp(-5, 10)
    (expected,) = torch.autograd.grad((((r.round() - r).detach() + r) * effective).square().sum(), s)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["mix", "drop"])
def test_a_float_share_of_one_gives_the_activation_bit_for_bit(kind: str) -> None:
    x = signal("maps").requires_grad_(True)
    learned = LearnedActivation(activation())
    setattr(learned, kind, 1.0)
    assert torch.equal(learned(x), x)
    (slope,) = torch.autograd.grad(learned(x).sum(), x)
    assert bool((slope == 1).all())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropping_keeps_a_share_of_elements_float_anew_in_every_pass(p: float) -> None:
    quantizer, x = activation(), noise(100, 200) * 0.4
    x = torch.where(quantizer(x) == x, x + 0.01, x).requires_grad_(True)  # off the grid, so that the two can be told
    learned = LearnedActivation(quantizer)
    learned.drop = p
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = learned(x), learned(x)
        kept, kept_again = first == x, second == x
        assert bool(((first == x) | (first == quantizer(x))).all())
        deviation = math.sqrt(p * (1 - p) / x.numel())
        both = p * p  # of two independent draws
        assert abs(float(kept.float().mean()) - p) < 3 * deviation
        assert abs(float((kept & kept_again).float().mean()) - both) < 3 * math.sqrt(both * (1 - both) / x.numel())
        mine, slope = torch.autograd.grad(first, [x, learned.step], torch.ones_like(first))
    r = x.detach() / 0.25
    inside = (r > -2) & (r < 5)
    assert torch.equal(mine, (kept | inside).float())
    total = torch.where(inside, r.round() - r, r.clamp(-2, 5))[~kept].sum()
    assert float(slope) == pytest.approx(float(total) / math.sqrt(x.numel() * 5), rel=1e-3)


@pytest.mark.parametrize("size", [4, 3, 1])
def test_the_gradient_of_a_step_does_not_depend_on_how_a_batch_is_split(size: int) -> None:
    x, gradient = noise(7, 5), noise(7, 5, seed=1)
    found = []
    for parts in (7, size):
        learned = LearnedActivation(activation())
        for part, upstream in zip(x.split(parts), gradient.split(parts), strict=True):
            learned.share = len(part) / len(x)
            learned(part).backward(upstream)
        found.append(learned.step.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mix", [0.0, 0.25])
def test_a_gpu_finds_the_same_values_and_gradients_by_other_operators(mix: float) -> None:
    low, high, factor = -2.0, 5.0, 0.125
    x, gradient, step = noise(4, 3, 5, 5), noise(4, 3, 5, 5, seed=1), torch.tensor(0.25)
    y = nearest_multiple(x, step, low, high)
    assert torch.equal(_nearest_on_gpu(x, step, low, high), y)
    inputs = x.clone().requires_grad_(True), step.clone().requires_grad_(True)
    expected = torch.autograd.grad(_FakeQuantize.apply(*inputs, low, high, factor, mix), inputs, gradient)
    for given in (mix, torch.tensor(mix)):
        inside, slope = _gradients_without_waiting(gradient, x, y, step, (low, high, factor, given), learned=True)
        assert slope is not None
        torch.testing.assert_close(torch.lerp(inside, gradient, mix), expected[0])
        torch.testing.assert_close(slope, expected[1], rtol=1e-4, atol=1e-6)
    assert _gradients_without_waiting(gradient, x, y, step, (low, high, factor, mix), learned=False)[1] is None


def test_dampening_by_a_share_on_the_device_is_dampening() -> None:
    weight, quantizer, _ = weight_of("conv")
    both = [LearnedWeight(weight, quantizer, "straight-through") for _ in range(2)]
    for learned, share in zip(both, (0.25, torch.tensor(0.25)), strict=True):
        randomise(learned)
        dampen([learned], share)
    torch.testing.assert_close(both[1].codes, both[0].codes)


@pytest.mark.parametrize("rounding", ["soft", "straight-through"])
def test_weights_together_are_what_each_is_alone(rounding: str) -> None:
    """Grids, blocks and shapes differ; of what is not learned there is no gradient."""
    learned = [LearnedWeight(*weight_of(kind)[:2], rounding) for kind in KINDS]
    for weight in learned:
        randomise(weight)
    learned[0].codes.requires_grad_(False)
    learned[1].step.requires_grad_(False)
    variables = [p for w in learned for p in w.parameters() if p.requires_grad]
    found = []
    for values in (learned_values(learned), [w.value() for w in learned]):
        slopes = torch.autograd.grad(sum((v * v.detach().sin()).sum() for v in values), variables)
        found.append([*values, *slopes])
    assert len(variables) == 2 * len(learned) - 2
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_what_a_pass_shares_is_let_go_of() -> None:
    weight, learned = LearnedWeight(*weight_of("conv")[:2]), LearnedActivation(activation())
    x = noise(10)
    expected = weight(), learned(x)
    with one_pass([weight], [learned]):
        assert learned.used is not None
        assert torch.equal(weight(), expected[0])
        assert torch.equal(learned(x), expected[1])
    with pytest.raises(ZeroDivisionError), one_pass([weight], [learned]):
        raise ZeroDivisionError
    assert weight.held is None
    assert learned.used is None


def test_a_step_that_is_not_learned_has_no_gradient() -> None:
    x = noise(10).requires_grad_(True)
    learned = LearnedActivation(activation(), learn=False)
    learned(x).sum().backward()
    assert learned.step.grad is None
    assert x.grad is not None


# ------------------------------------------------------------------------------------------------- biases


def test_a_bias_is_itself_and_has_a_memory_of_its_own() -> None:
    stored = torch.tensor([1.0, -2.0])
    learned = LearnedBias(stored)
    assert torch.equal(learned(stored), stored)
    learned().sum().backward()
    assert learned.bias.grad is not None
    assert learned.bias.grad.tolist() == [1, 1]
    with torch.no_grad():
        learned.bias += 1
    assert stored.tolist() == [1, -2]
    assert learned(stored).tolist() == [2, -1]
    assert not LearnedBias(stored, learn=False).bias.requires_grad


# ------------------------------------------------------------------------------------------- held for passes


@pytest.mark.parametrize("rounding", ["soft", "straight-through"])
def test_weights_that_are_held_are_computed_once_and_get_all_gradients(
    rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, quantizer, _ = weight_of("conv")
    learned = LearnedWeight(weight, quantizer, rounding)
    randomise(learned)
    rounded = RoundedBias(LearnedBias(noise(4)), lambda: torch.tensor(0.125))
    network, counted = nn.ModuleList([learned, rounded]), []
    own = LearnedWeight.expand
    monkeypatch.setattr(LearnedWeight, "expand", lambda self, steps: counted.append(1) or own(self, steps))

    def passes() -> None:
        for factor in (1.0, 3.0):
            ((learned() * factor).sin().sum() + (rounded() * factor).cos().sum()).backward()

    passes()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    counted.clear()
    with held_values(network.modules()):
        passes()
    assert len(counted) == 1
    assert len(expected) == 3
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert learned.held is None
    assert rounded.held is None


def test_what_is_held_is_let_go_of_after_an_error() -> None:
    weight, quantizer, _ = weight_of("conv")
    learned = LearnedWeight(weight, quantizer)
    with pytest.raises(ZeroDivisionError), held_values([learned]):
        raise ZeroDivisionError
    assert learned.held is None
    assert learned.codes.grad is None
