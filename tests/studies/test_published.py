"""Evol-Q as published: its grids, and who may choose a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import dataset, make

from bitwright.errors import UsageError
from bitwright.given.models import Model
from bitwright.graph.student import Student
from bitwright.progress import silent
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.stages.calibrate import parameters
from bitwright.studies import StudyResult, find_study, published, study
from bitwright.studies.base import StudySettings
from bitwright.studies.fqvit import LOG_BITS, Octaves, SoftmaxGrid, fq_vit, integer_softmax, softmax_of_codes
from bitwright.studies.published import LABEL_FREE, LOUD, ON_OTHERS, ON_TEST, picks
from bitwright.studies.subject import Subject

LABELS = [0, 1, 2, 3] * 2


def run(**settings: Any) -> StudyResult:
    given: dict[str, Any] = {"steps": 6, "seeds": (0, 1), "samples": 12, "weights": (3,)}
    held_out = dataset(8, seed=5)
    given["evaluate"] = held_out
    return study("search", make("transformer"), dataset(16), as_published=True, **given | settings)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return run()


def start(softmax: SoftmaxGrid) -> tuple[Student, Subject]:
    subject = Subject(Model(make("transformer"), "transformer", None), dataset(12), dataset(8), torch.device("cpu"))
    return fq_vit(subject, Scheme(weights=3, activations=8), softmax, subject.pool, 0, silent), subject


# -------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("step", [0.002, 0.02, 0.1])
def test_the_softmax_on_integers_is_a_softmax(step: float) -> None:
    scores = torch.randn(40, 17, generator=torch.Generator().manual_seed(0)) * 50 * step
    found = integer_softmax(scores, -1, step, 128.0, 8)
    torch.testing.assert_close(found.sum(-1), torch.ones(40))
    assert float((found - softmax_of_codes(scores, -1, step, 128.0, 8)).abs().max()) < 0.01 + step / 3


def test_octaves_are_powers_of_two_and_the_smallest_values_are_nothing() -> None:
    x = torch.cat([torch.rand(500, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 1.0, 2.0**-17])])
    found = Octaves(LOG_BITS).nearest(x, torch.ones(()))
    kept = found[found > 0].log2()
    assert torch.equal(kept, kept.round())
    assert float(kept.min()) >= 1 - 2**LOG_BITS
    assert found[-3:].tolist() == [0, 1, 0]
    ratio = found[:500][x[:500] > 0.01] / x[:500][x[:500] > 0.01]
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.6


def test_a_rounded_weight_keeps_mean_and_deviation_of_each_channel() -> None:
    student, _ = start("even")
    for stored, quantizer in parameters(student.graph, "weight"):
        weight = student.graph.get_buffer(stored)
        found = quantizer(weight).flatten(1)
        torch.testing.assert_close(found.mean(1), weight.flatten(1).mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.std(1), weight.flatten(1).std(1), atol=1e-5, rtol=1e-3)
        assert quantizer.grid.levels == (0, 7)
        assert quantizer.codes(weight).flatten(1).amin(1).max() == 0  # every channel uses its whole range
        assert quantizer.codes(weight).flatten(1).amax(1).min() == 7


def test_the_softmax_may_be_on_integers() -> None:
    outputs = []
    for softmax in ("even", "log-int"):
        student, subject = start(softmax)
        grids = {type(m.grid) for m in student.graph.modules() if isinstance(m, Quantizer)}
        assert (Octaves in grids) == (softmax == "log-int")
        outputs.append(student.flat(subject.held_out.batch(range(8)))[0])
    assert not torch.equal(*outputs)


def test_a_network_without_a_softmax_has_one_start() -> None:
    subject = Subject(Model(make("residual"), "residual", None), dataset(12), dataset(8), torch.device("cpu"))
    keys = [cell.key for cell in published.cells(subject, StudySettings(steps=3, weights=(3,), seeds=(0,)))]
    assert {key["softmax"] for key in keys} == {"no"}
    assert [key["variant"] for key in keys].count("before") == 1


# ---------------------------------------------------------------------------------------------- who chooses


def test_a_checkpoint_that_others_choose_is_never_measured_on_them() -> None:
    right = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])  # each is right on one half alone
    assert picks(right, ON_TEST).tolist() == [1] * 4
    assert picks(right, ON_OTHERS).tolist() == [2, 1, 2, 1]
    assert picks(right, LABEL_FREE).tolist() == [2] * 4
    gained = right[picks(right, ON_OTHERS), torch.arange(4)]
    assert float(gained.mean()) == 0


def test_every_way_is_told_of_one_search(result: StudyResult) -> None:
    rows = [r for r in result.rows if r["softmax"] == "even" and r["variant"] != "before"]
    assert {r["variant"] for r in rows} == {f"{kind}, {way}" for kind, way in published.WAYS}
    assert {r["checkpoints"] for r in rows} == {2}  # six children in visits of three
    for seed in (0, 1):
        of = {r["variant"]: r for r in rows if r["seed"] == seed}
        honest, chosen = of[f"evolution, {LABEL_FREE}"], of[f"evolution, {ON_TEST}"]
        assert chosen["gain"] >= honest["gain"]
        assert honest["chosen"] == [2]
        assert chosen["gain_half"] >= 0


def test_what_is_label_free_does_not_depend_on_labels(result: StudyResult) -> None:
    labelled = run(evaluate=dataset(8, seed=5).labelled(LABELS))
    kept = [[r["kl"] for r in x.rows if LABEL_FREE in r["variant"]] for x in (labelled, result)]
    assert kept[0] == kept[1]
    assert all("top1" in r for r in labelled.rows)


def test_the_verdict_says_loudly_that_test_images_choose(result: StudyResult) -> None:
    said = result.verdict
    assert said[0] == LOUD
    assert "chosen on test images" in said[1]
    assert "the choice on test images adds" in said[2]
    assert LOUD in result.page()


def test_other_studies_have_no_published_form() -> None:
    assert find_study("search", as_published=True).name == "search-as-published"
    with pytest.raises(UsageError, match="no use for as_published=; search has"):
        find_study("hmse", as_published=True)


def gained(published: float, honest: float, half: float) -> StudyResult:
    rows: list[dict[str, Any]] = [{"variant": "before", "seed": 0, "top1": 0.5}]
    for name, gain in ((f"evolution, {ON_TEST}", published), (f"evolution, {LABEL_FREE}", honest)):
        rows += [{"variant": name, "seed": s, "top1": 0.5, "gain": gain + s / 1e4, "gain_half": half} for s in range(3)]
    place = {"network": "n", "weights": 3, "activations": 8, "softmax": "even"}
    return StudyResult(find_study("search", as_published=True), {}, [place | row for row in rows])


def test_a_gain_is_one_if_neither_seeds_nor_images_explain_it() -> None:
    assert "adds 2.00 points; the search itself gains" in published.verdict(gained(0.03, 0.01, 0.002))[2]
    assert "no gain of the search itself" in published.verdict(gained(0.03, 0.01, 0.02))[2]
    assert "no gain of the search itself" in published.verdict(gained(0.03, 0.0, 0.0))[2]
