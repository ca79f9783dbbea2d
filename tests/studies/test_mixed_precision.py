"""Mixed against uniform precision: what is compared, at which sizes, and how measures are judged."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import dataset, make
from scipy import stats

from bitwright.errors import UsageError
from bitwright.report.panels import Figure
from bitwright.studies import StudyResult, find_study, mixed_precision, study
from bitwright.studies.mixed_precision import MIXED, UNIFORM, predicted_sum, rank_correlation


@cache
def result() -> StudyResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_precision, "COUNT", 6)
        return study(
            "mixed-precision", make("residual"), dataset(16), samples=8, steps=2, weights=(2, 3, 4), recipe="optq"
        )


def sizes(variant: str) -> dict[float, dict[str, Any]]:
    return {r["size_of"]: r for r in result().rows if r.get("variant") == variant}


def code_bits(bits: dict[str, float]) -> float:
    network = make("residual")
    return sum(network.get_submodule(name).weight.numel() * b for name, b in bits.items())


def test_mixed_precision_is_never_larger_than_what_it_is_compared_with() -> None:
    assert set(sizes(UNIFORM)) == {2, 3, 4}
    assert set(sizes(MIXED)) == {2.5, 3, 3.5}
    for at, row in sizes(MIXED).items():
        assert code_bits(row["bits"]) <= code_bits(dict.fromkeys(row["bits"], at))
    assert any(len(set(row["bits"].values())) > 1 for row in sizes(MIXED).values())
    for at, row in sizes(UNIFORM).items():
        assert set(row["bits"].values()) == {at}
    found = [sizes(UNIFORM)[at]["bytes"] for at in sorted(sizes(UNIFORM))]
    assert found == sorted(set(found))


def test_the_recipe_and_the_seed_are_the_same_for_both() -> None:
    assert result().facts["recipe"]["name"] == "optq"
    assert {r["seed"] for r in result().rows if r["part"] == "sizes"} == {0}
    with pytest.raises(UsageError, match="no use for recipe="):
        find_study("weighting").settle(recipe="mse")
    with pytest.raises(UsageError, match="no recipe 'nonsense'"):
        study("mixed-precision", make("residual"), dataset(16), recipe="nonsense")


def test_no_other_plan_that_is_as_small_has_a_smaller_predicted_loss() -> None:
    """By brute force over the measure's own table."""
    table = next(r["losses"] for r in result().rows if r.get("measure") == "loss")
    weights = {name: make("residual").get_submodule(name).weight.numel() for name in table}
    for row in sizes(MIXED).values():
        room = sum(-(-weights[n] * b // 8) for n, b in row["bits"].items())
        ours = predicted_sum(table, row["bits"])
        for bits in itertools.product((2, 3, 4, 5, 6, 8), repeat=len(table)):
            other = dict(zip(table, bits, strict=True))
            if sum(-(-weights[n] * b // 8) for n, b in other.items()) <= room:
                assert predicted_sum(table, other) >= ours - 1e-12


def test_random_plans_draw_from_the_bits_of_the_study() -> None:
    table = next(r["losses"] for r in result().rows if r.get("measure") == "loss")
    rows = [r for r in result().rows if r["part"] == "random plans"]
    assert len(rows) == 6
    assert all(set(r["bits"]) == set(table) for r in rows)
    assert len({json.dumps(r["bits"]) for r in rows}) > 1
    assert {b for r in rows for b in r["bits"].values()} <= {2, 3, 4}


def test_rank_correlation_is_spearmans_with_its_bootstrap() -> None:
    generator = np.random.default_rng(1)
    a = generator.standard_normal(24)
    b = a + generator.standard_normal(24)
    rho, low, high = rank_correlation(a, b)
    assert rho == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-6)
    spread = [stats.spearmanr(a[i], b[i]).statistic for i in generator.integers(0, 24, (400, 24))]
    assert (low, high) == pytest.approx(tuple(np.quantile(spread, (0.025, 0.975))), abs=0.08)
    assert low < rho < high


def test_measures_are_judged_by_the_plans_they_predict() -> None:
    """Each measure's figure from its own rows, computed by hand."""
    rows = result().rows
    plans = [r for r in rows if r["part"] == "random plans"]
    ranked = [s for s in result().summary if "spearman" in s]
    assert {s["variant"] for s in ranked} == set(mixed_precision.COMPARED_MEASURES)
    for row in ranked:
        table = next(r["losses"] for r in rows if r.get("measure") == row["variant"])
        predicted = [sum(table[layer][str(b)] for layer, b in p["bits"].items()) for p in plans]
        assert predicted == [predicted_sum(table, p["bits"]) for p in plans]
        expected = stats.spearmanr(predicted, [p["kl"] for p in plans]).statistic
        assert row["spearman"]["mean"] == pytest.approx(expected, abs=1e-6)
    means = [s["spearman"]["mean"] for s in ranked]
    assert means == sorted(means, reverse=True)


def test_the_verdict_and_the_figure_say_what_the_rows_say() -> None:
    said = " ".join(result().verdict)
    row, rival = sizes(MIXED)[3], sizes(UNIFORM)[3]
    assert f"a KL of {row['kl']:.2g} against {rival['kl']:.2g}" in said
    assert "rank correlation of predicted and measured loss of 6 random plans" in said
    figure = result().figure()
    assert isinstance(figure, Figure)
    heights = {s.name: list(s.y) for s in figure.series if s.name in {UNIFORM, MIXED}}
    assert heights[MIXED] == [sizes(MIXED)[at]["agreement"] for at in (2.5, 3, 3.5)]
    bars, plans = figure.series[-2:]
    assert list(bars.x) == [s["variant"] for s in result().summary if "spearman" in s]
    assert list(plans.y) == [r["kl"] for r in result().rows if r["part"] == "random plans"]
