"""Correlations of the label-free study, and its third network."""

from __future__ import annotations

import pytest
import torch

from bitwright import zoo
from bitwright.given.images import load_images
from bitwright.progress import silent
from bitwright.studies import lfh


def row(trace: list[float], bound: float = 1.0) -> dict[str, object]:
    return {"trace": trace, "error": [0.0] * len(trace), "bound": bound}


def test_a_power_law_is_perfect_only_in_logarithms() -> None:
    free = [1.0, 2.0, 4.0, 8.0, 100.0]
    found = lfh.correlations(row([x**3 for x in free]), free)
    assert found["pearson_log"] == pytest.approx(1)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] < 0.9999
    assert lfh.correlations(row([1 / x for x in free]), free)["spearman"] == pytest.approx(-1)


def test_layers_without_a_logarithm_are_left_out_and_counted() -> None:
    found = lfh.correlations(row([1.0, 2.0, -1.0, 0.0]), [1.0, 2.0, 3.0, 4.0])
    assert found["layers"] == 2
    assert found["pearson_log"] is None
    assert found["pearson"] < 0
    most = lfh.correlations(row([1.0, 2.0, 4.0, -1.0]), [1.0, 2.0, 4.0, 9.0])
    assert most["layers"] == 3
    assert most["pearson_log"] == pytest.approx(1)
    fewest = lfh.correlations(row([1.0, 2.0, 4.0, *[-1.0] * 4]), [1.0, 2.0, 4.0, *[9.0] * 4])
    assert fewest["pearson_log"] is None


def test_the_share_below_the_bound() -> None:
    assert lfh.correlations(row([1.0, 3.0, 2.0, 2.0], bound=1.0), [1.0, 1.0, 2.0, 4.0])["below_bound"] == 0.75


def test_the_mixer_learns_to_follow() -> None:
    teacher = zoo.network("fashion_cnn")
    images = load_images("zoo:fashion[:128]", lfh.load_model("zoo:fashion_cnn").preprocessing)
    x = images.batch(range(64))
    mixers = [lfh.trained_mixer(teacher, images, silent, steps) for steps in (0, 20)]
    with torch.no_grad():
        before, after = (lfh._softened(mixer(x), teacher(x)) for mixer in mixers)
    assert after < 0.7 * before
