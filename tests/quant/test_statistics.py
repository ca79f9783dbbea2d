"""Streaming statistics: exact where they say so, bounded in memory, blind to how the stream is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.quant.statistics import BINS, SAMPLE, MeanInput, Statistics, add_noted, to_cpu


def values(count: int = 4000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3 + 0.3


def streamed(parts: list[Tensor]) -> Statistics:
    statistics = Statistics("layer")
    for part in parts:
        statistics.update(part)
    return statistics


def held(statistics: object) -> int:
    """Numbers that an object holds on to."""
    return sum(v.numel() if isinstance(v, Tensor) else 1 for v in vars(statistics).values())


@pytest.mark.parametrize("parts", [1, 2, 7, 400])
def test_extremes_and_count_are_exact_however_the_stream_is_cut(parts: int) -> None:
    x = values()
    statistics = streamed(list(x.chunk(parts)))
    assert (statistics.minimum, statistics.maximum) == (float(x.min()), float(x.max()))
    assert statistics.count == x.numel()


def test_extremes_of_one_sided_tensors_do_not_reach_to_zero() -> None:
    statistics = streamed([torch.tensor([2.0, 3.0]), torch.tensor([5.0])])
    assert (statistics.minimum, statistics.maximum) == (2.0, 5.0)
    statistics = streamed([torch.tensor([-2.0]), torch.tensor([-5.0])])
    assert (statistics.minimum, statistics.maximum) == (-5.0, -2.0)


def test_memory_does_not_grow_with_the_stream() -> None:
    statistics, sizes = Statistics("layer"), set()
    for i in range(40):
        statistics.update(values(100 + 50 * i, i) * 1.3**i)
        sizes.add(held(statistics))
    assert len(sizes) == 1
    assert sizes.pop() < BINS + 20
    mean, sizes = MeanInput(), set()
    for i in range(10):
        mean.update(torch.randn(2 + i, 3, 4, 4))
        sizes.add(held(mean))
    assert sizes == {3 * 4 * 4 + 2}


def test_growth_keeps_every_count() -> None:
    statistics, total = Statistics("layer"), 0
    for i, scale in enumerate([1e-3, 1.0, 0.5, 700.0, 3.0, 1e6]):
        x = values(500, i) * scale
        statistics.update(x.abs() if i < 2 else x)  # one-sided first
        total += x.numel()
        assert float(statistics.histogram()[1].sum()) == total


def test_bins_stay_near_the_values() -> None:
    """Sorted values and the histogram's quantiles agree to the width that the class promises."""
    x = values(20_000)
    middles, counts = streamed(list(x.chunk(9))).histogram()
    ends = counts.cumsum(0)
    ordered = x.sort().values.double()
    width = float(x.abs().max()) / 2048
    for position in (10, 500, 4_000, 10_000, 15_000, 19_990):
        found = middles[int((ends > position).int().argmax())]
        assert abs(float(found - ordered[position])) <= width


def test_zero_has_a_value_of_its_own() -> None:
    x = values().relu()
    middles, counts = streamed(list(x.chunk(3))).histogram()
    assert float(counts[middles == 0].sum()) >= int((x == 0).sum())
    assert float(middles.min()) >= 0


def test_zeros_then_values() -> None:
    for later in (torch.tensor([0.5, 2.0]), torch.tensor([-0.5, 2.0]), torch.tensor([-0.5, -2.0])):
        statistics = streamed([torch.zeros(10), later])
        middles, counts = statistics.histogram()
        assert float(counts.sum()) == 12
        assert float(counts[middles == 0].sum()) == 10


def test_large_batches_are_sampled_evenly() -> None:
    x = torch.arange(64 * SAMPLE, dtype=torch.float32).view(16, -1) + 1
    statistics = streamed([x])
    middles, counts = statistics.histogram()
    assert 0.7 * 16 * SAMPLE <= float(counts.sum()) <= 16 * SAMPLE
    assert float((middles * counts).sum() / counts.sum()) == pytest.approx(float(x.mean()), rel=1e-3)
    assert (statistics.minimum, statistics.maximum) == (1.0, 64.0 * SAMPLE)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [8, 4]])
def test_the_histogram_does_not_depend_on_the_batches(sizes: list[int]) -> None:
    """Images of very different ranges, the first without negative values, each larger than what is sampled of it."""
    x = torch.randn(12, 3 * SAMPLE, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 12)[:, None]
    x[0] = x[0].abs()
    whole, cut = streamed([x]), streamed(list(x.split(sizes)))
    for a, b in zip(whole.histogram(), cut.histogram(), strict=True):
        assert torch.equal(a, b)


def test_samples_of_many_images_cover_every_place() -> None:
    places = torch.arange(5 * SAMPLE, dtype=torch.float32).expand(40, -1)
    statistics = Statistics("layer")
    assert len(statistics._sampled(places).unique()) == 5 * SAMPLE


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_layer(poison: float) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = poison
    with pytest.raises(DataError, match=r"output of blocks\.3 is not finite"):
        Statistics("blocks.3").update(x)


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_mean_input(sizes: list[int]) -> None:
    x = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = MeanInput()
    for part in x.split(sizes):
        mean.update(part)
    torch.testing.assert_close(mean.mean, x.mean(0, keepdim=True))


def test_mean_of_channels_wherever_the_images_are() -> None:
    x = torch.randn(7, 12, 5, generator=torch.Generator().manual_seed(0))  # tokens first
    mean = MeanInput(channels_only=True)
    for part in x.split([5, 5, 2], dim=1):
        mean.update(part)
    torch.testing.assert_close(mean.mean, x.mean((0, 1)).unsqueeze(0))


def test_numbers_below_the_smallest_step_are_counted() -> None:
    found = streamed([1e-42 * values(), 1e-42 * values(seed=1)])
    assert float(found.histogram()[1].sum()) == 8000
    assert found.minimum < 0 < found.maximum


def test_what_two_saw_in_turn_is_what_one_saw() -> None:
    """Each skips what the other sees, and what both counted is added up exactly."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 50, 50, generator=generator) * scale - shift for scale, shift in BATCHES]
    whole, first, second = (Statistics("layer") for _ in range(3))
    for batch in batches:
        whole.update(batch)
    second.update(batches[0])
    second.forget()
    for turn, mine, other in zip(range(0, 4, 2), (first, first), (second, second), strict=True):
        mine.update(batches[turn])
        mine.skip(1)
        other.skip(turn and 1)
        other.update(batches[turn + 1])
    first.absorb(second)
    assert (first.minimum, first.maximum, first.count) == (whole.minimum, whole.maximum, whole.count)
    for ours, theirs in zip(first.histogram(), whole.histogram(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_noted_and_added_later_is_what_is_added_at_once() -> None:
    """Of several tensors, in batches of which each reaches farther; one tensor is noted twice in a batch."""
    parts = [values(600, seed) * scale for seed, scale in enumerate((1e-3, 1.0, 700.0))]
    at_once = [streamed([p * factor for p in parts for _ in range(times)]) for factor, times in ((1.0, 1), (-3.0, 2))]
    later = [Statistics("first"), Statistics("second")]
    for part in parts:
        later[0].note(part)
        later[1].note(-3.0 * part)
        later[1].note(-3.0 * part)
        add_noted(later)
    to_cpu(later)
    for ours, theirs in zip(later, at_once, strict=True):
        assert (ours.minimum, ours.maximum, ours.count) == (theirs.minimum, theirs.maximum, theirs.count)
        assert all(map(torch.equal, ours.histogram(), theirs.histogram()))


def test_the_first_of_several_tensors_that_is_not_finite_is_named() -> None:
    layers = [Statistics(name) for name in ("good", "first", "second")]
    for each, value in zip(layers, (1.0, float("nan"), float("inf")), strict=True):
        each.note(torch.tensor([0.0, value]))
    with pytest.raises(DataError, match="output of first is not finite"):
        add_noted(layers)


BATCHES = [(1.0, -20.0), (3.0, 0.0), (0.1, -30.0), (9.0, 2.0)]
"""Scale and shift: the second widens the range, to both sides of zero."""
