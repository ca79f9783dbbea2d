"""Figures of merit against scipy, PyTorch and loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from bitwright.graph.readings import Reading
from bitwright.measure.classification import Hits, hits
from bitwright.measure.metrics import Fidelity, SignalToNoise, fidelity_keys, wilson_interval


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 50), (870, 1000), (9999, 10_000)])
def test_wilson_interval_equals_scipy(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("classes", [3, 5, 6, 10])
def test_accuracy_by_loops(classes: int) -> None:
    scores, labels = noise(60, classes), torch.arange(60) % classes
    parts = zip(scores.split([25, 25, 10]), labels.split([25, 25, 10]), strict=True)
    counted = Hits(torch.cat([hits(part, wanted) for part, wanted in parts]))
    ranks = [sorted(range(classes), key=lambda k, r=row: -r[k]) for row in scores.tolist()]
    result = counted.metrics().to_dict()
    assert result["top1"] == sum(r[0] == k for r, k in zip(ranks, labels.tolist(), strict=True)) / 60
    among = sum(k in r[:5] for r, k in zip(ranks, labels.tolist(), strict=True)) / 60
    assert result.get("top5") == (among if classes > 5 else None)  # of five classes all are among the first five
    assert result["top1_ci"] == list(wilson_interval(round(result["top1"] * 60), 60))


def fidelity(a: Tensor, b: Tensor, parts: int = 3) -> dict[str, Any]:
    made = Fidelity()
    for x, y in zip(a.chunk(parts), b.chunk(parts), strict=True):
        made.update([x], [y])
    return fidelity_keys(made.outputs)


def test_class_scores() -> None:
    a = noise(40, 6) * 3
    b = a + noise(40, 6, seed=1)
    result = fidelity(a, b)
    expected = F.kl_div(b.double().log_softmax(1), a.double().softmax(1), reduction="batchmean")
    assert result["kl"] == pytest.approx(float(expected), rel=1e-6)
    same = sum(x.index(max(x)) == y.index(max(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert result["agreement"] == same / 40
    assert 0 < same < 40


def test_dense_scores_count_every_pixel() -> None:
    a = noise(4, 3, 5, 5)
    b = a + 0.5 * noise(4, 3, 5, 5, seed=1)
    pixels = [t.permute(0, 2, 3, 1).reshape(-1, 3) for t in (a, b)]
    result, flat = fidelity(a, b), fidelity(*pixels)
    assert result["kl"] == pytest.approx(flat["kl"])
    assert result["agreement"] == pytest.approx(flat["agreement"])
    assert result["sqnr_db"] == pytest.approx(flat["sqnr_db"])


def test_single_channel_maps_are_probabilities() -> None:
    a, b = noise(4, 1, 6, 6).sigmoid(), noise(4, 1, 6, 6, seed=1).sigmoid()
    result = fidelity(a, b)
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    kl = sum(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in pairs) / len(pairs)
    assert result["kl"] == pytest.approx(kl, rel=1e-6)
    assert result["agreement"] == sum((p > 0.5) == (q > 0.5) for p, q in pairs) / len(pairs)
    certain = fidelity(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert certain["agreement"] == 0
    assert math.isfinite(certain["kl"])


@pytest.mark.parametrize("shape", [(4, 1, 6, 6), (4, 7, 3), (4,)])
def test_other_outputs_have_no_classes(shape: tuple[int, ...]) -> None:
    a = noise(*shape) * 5
    result = fidelity(a, a + noise(*shape, seed=1), parts=2)
    assert result["agreement"] is None
    assert result["kl"] is None
    assert math.isfinite(result["sqnr_db"])


def test_signal_to_noise() -> None:
    a, b = noise(50, 4), noise(50, 4, seed=1)
    ratio = SignalToNoise()
    for x, y in zip(a.chunk(3), b.chunk(3), strict=True):
        ratio.update(x, y)
    signal = sum(v * v for v in a.double().flatten().tolist())
    error = sum(v * v for v in (a.double() - b.double()).flatten().tolist())
    assert ratio.result() == pytest.approx(10 * math.log10(signal / error))
    half = SignalToNoise()
    half.update(a, a * 1.1)
    assert half.result() == pytest.approx(20, abs=1e-3)


def test_signal_to_noise_does_not_depend_on_memory_order_or_pieces() -> None:
    a, b = noise(3, 7, 120, 60), noise(3, 7, 120, 60, seed=1)
    expected = 10 * math.log10(float(a.double().square().sum()) / float((a - b).double().square().sum()))
    orders = (torch.contiguous_format, torch.channels_last)
    for one in orders:
        for other in orders:
            ratio = SignalToNoise()
            ratio.update(a.contiguous(memory_format=one), b.contiguous(memory_format=other))
            assert ratio.result() == pytest.approx(expected, rel=1e-6)


def test_infinities_that_both_hold_cost_nothing() -> None:
    a = noise(70_000)
    b = a.clone()
    a[[5, 60_000]] = b[[5, 60_000]] = math.inf
    b[7] += 1
    ratio = SignalToNoise()
    ratio.update(a, b)
    assert ratio.noise == pytest.approx(1, rel=1e-6)
    assert math.isfinite(ratio.signal)
    b[60_000] = 0
    ratio.update(a, b)
    assert ratio.result() is None


def test_equal_outputs() -> None:
    a = noise(9, 4)
    found = fidelity(a, a)
    assert (found["agreement"], found["kl"], found["sqnr_db"]) == (1.0, 0.0, None)
    assert found["outputs"]["output"]["exact"]
    empty = fidelity_keys(Fidelity().outputs)
    assert (empty["agreement"], empty["kl"], empty["sqnr_db"], empty["outputs"]) == (None, None, None, {})


def test_each_output_has_its_figures_and_the_worst_stands_first() -> None:
    a, small = noise(9, 4), 1e-3 * noise(9, 6, seed=2)
    ruined = 1e-3 * noise(9, 6, seed=3)
    made = Fidelity(("good", "bad"))
    for rows in (slice(0, 5), slice(5, 9)):
        made.update([a[rows], small[rows]], [1.001 * a[rows], ruined[rows]])
    result = fidelity_keys(made.outputs)
    alone = {"good": fidelity(a, 1.001 * a), "bad": fidelity(small, ruined)}
    for name, expected in alone.items():
        for figure in ("agreement", "kl", "sqnr_db"):
            assert result["outputs"][name][figure] == pytest.approx(expected[figure])
    assert result["agreement"] == alone["bad"]["agreement"] < alone["good"]["agreement"]
    assert result["kl"] == pytest.approx(alone["bad"]["kl"])
    assert result["sqnr_db"] == pytest.approx(alone["bad"]["sqnr_db"])


def test_a_constant_answer_shows_in_the_energy_around_the_mean() -> None:
    a = 100 + noise(400, 5)
    made = Fidelity()
    for rows in a.chunk(4):
        made.update([rows], [a.mean(0).expand_as(rows)])
    (found,) = made.outputs.values()
    assert found.sqnr_db == pytest.approx(40, abs=0.5)
    assert found.spread_db == pytest.approx(0, abs=0.01)


def test_whole_numbers_are_compared_as_they_are() -> None:
    a = torch.arange(24).reshape(2, 3, 4)
    b = a.clone()
    b[0, :, 1] += 100
    for x, y in ((a, b), (a % 2 == 0, (a % 2 == 0) ^ (a != b))):
        (found,) = _fidelity(x, y).outputs.values()
        assert (found.agreement, found.kl, found.sqnr_db, found.exact) == (21 / 24, None, None, False)


def test_labels_that_do_not_exclude_each_other() -> None:
    a = noise(30, 4).sigmoid()
    b = (noise(30, 4) + 0.4 * noise(30, 4, seed=1)).sigmoid()
    made = Fidelity(("tags",), (Reading("labels", 1),))
    made.update([a], [b])
    (found,) = made.outputs.values()
    rows = list(zip(a.double().tolist(), b.double().tolist(), strict=True))
    same = [[v > 0.5 for v in p] == [v > 0.5 for v in q] and p.index(max(p)) == q.index(max(q)) for p, q in rows]
    assert found.agreement == sum(same) / 30
    assert 0 < sum(same) < 30
    kl = [sum(_binary(p, q) for p, q in zip(*row, strict=True)) for row in rows]
    assert found.kl == pytest.approx(sum(kl) / 30, rel=1e-5)
    low = 0.4 * noise(30, 4).softmax(1)
    (ruined,) = _fidelity(low, low.roll(1, 1), Reading("labels", 1)).outputs.values()
    assert ruined.agreement == 0


def _binary(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_values_that_are_not_finite() -> None:
    a = noise(4, 3)
    b = a.clone()
    b[1, 2] = math.nan
    (found,) = _fidelity(a, b).outputs.values()
    assert (found.agreement, found.sqnr_db, found.exact) == (0.75, None, False)
    assert "not finite" in found.note
    a[:, 0] = -math.inf
    (found,) = _fidelity(a, a * 1.5).outputs.values()
    assert found.agreement == 1
    assert found.sqnr_db == pytest.approx(20 * math.log10(2))


def _fidelity(a: Tensor, b: Tensor, *readings: Reading) -> Fidelity:
    made = Fidelity(readings=readings)
    made.update([a], [b])
    return made
