"""Searches of scales compared at equal cost, and the losses that evolution may minimise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import dataset, make

from bitwright.errors import UsageError
from bitwright.given.models import Model
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.recipes import recipe
from bitwright.stages.base import Run
from bitwright.stages.candidates import Batches, Fitness, Scales
from bitwright.studies import StudyResult, fitness, search, straight_through, study
from bitwright.studies.scales import evolved_keys
from bitwright.studies.straight_through import OPTIMIZERS, Straight, descend, placed, price, stand_ins
from bitwright.studies.subject import Subject

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 3] * 2


def run(name: str, **settings: Any) -> StudyResult:
    given: dict[str, Any] = {"steps": 9, "seeds": (0, 1), "samples": 12, "evaluate": dataset(8, seed=5)}
    return study(name, make("transformer"), dataset(16), **given | settings)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BATCH", 3)


def begun() -> tuple[Any, Scales, Batches]:
    subject = Subject(Model(make("transformer"), "transformer", None), dataset(12), dataset(8, seed=5), CPU)
    student = subject.begin(Scheme(weights=3, activations=8), recipe("mse").stages, subject.pool, 0)
    return (
        student,
        Scales(student, evolved_keys(subject, student), "round"),
        Batches(subject.teacher, subject.pool, 4, Run(), "Outputs"),
    )


# --------------------------------------------------------------------------------------- straight through


def weight_quantizer() -> tuple[Quantizer, torch.Tensor]:
    weight = torch.tensor([[0.26, -0.9, 0.6], [1.4, 0.31, -0.07]])
    quantizer = Quantizer("layer", Grid(3, symmetric=True), "weight", (2, 3), (1, 3))
    quantizer.set_range(torch.tensor([0.25, 0.3]))
    return quantizer, weight


def test_a_straight_quantizer_is_the_quantizer_to_the_bit() -> None:
    quantizer, weight = weight_quantizer()
    assert torch.equal(Straight(quantizer, learn=True)(weight), quantizer(weight))
    activation = Quantizer("layer", Grid(8), "activation")
    activation.set_range(torch.tensor(0.013), torch.tensor(97.0))
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Straight(activation, learn=False)(x), activation(x))


def test_gradients_of_scales_are_lsqs_and_those_of_inputs_pass_inside_the_range() -> None:
    quantizer, weight = weight_quantizer()
    module = Straight(quantizer, learn=True)
    weight.requires_grad_(True)
    module(weight).sum().backward()
    ratio = weight.detach() / torch.tensor([[0.25], [0.3]])
    inside = (ratio.round() >= -4) & (ratio.round() <= 3)
    slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(-4, 3))
    expected = (slope * torch.tensor([[0.25], [0.3]])).sum(1)  # by the logarithm: s dQ/ds
    torch.testing.assert_close(module.shift.grad, expected)
    assert torch.equal(weight.grad, inside.float())


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_an_optimiser_leaves_the_student_alone_and_its_best_is_no_worse(method: str) -> None:
    student, scales, batches = begun()
    before = {k: v.clone() for k, v in student.graph.named_buffers()}
    modules = dict(student.graph.named_children())
    found = descend(student, scales, batches, Fitness("mse"), method, 1e-2, 40, 0)
    after = dict(student.graph.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert dict(student.graph.named_children()) == modules
    assert found.fitness == min(f for _, f in found.curve) <= found.curve[0][1]
    assert not torch.equal(found.best, scales.get())
    scales.set(found.best)
    assert float(batches.losses(student.flat, Fitness("mse")).double().mean()) == pytest.approx(found.fitness)


def test_places_are_given_back_after_an_error() -> None:
    student, scales, _ = begun()
    modules = dict(student.graph.named_children())

    def fail() -> None:
        with placed(student, stand_ins(student, scales.keys)):
            assert isinstance(student.graph.get_submodule(scales.keys[0]), Straight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(student.graph.named_children()) == modules


def test_a_budget_is_kept_and_used_up() -> None:
    student, scales, batches = begun()
    assert price(batches) == 1  # a batch is a third of the images, forwards and backwards three times its pass
    for budget in (1, 2, 5, 17, 40):
        found = descend(student, scales, batches, Fitness("mse"), "Adam", 1e-3, budget, 0)
        looks = len(found.curve) - 1
        assert looks == max(1, min(straight_through.LOOKS, budget // 4))
        assert found.evaluations == found.steps + looks == budget


# ------------------------------------------------------------------------------------------------- search


def test_all_methods_spend_the_same_on_the_same_scales() -> None:
    found = run("search")
    methods = ["evolution", "random search", "SGD", "Adam", "AdamW"]
    assert [(r["variant"], r["seed"]) for r in found.rows] == [
        ("before", 0), *((m, s) for m in methods for s in (0, 1)),
    ]  # fmt: skip
    rows = [r for r in found.rows if r["variant"] != "before"]
    assert {r["evaluations"] for r in rows} == {9}
    assert len({r["scales"] for r in rows}) == 1
    assert {r["curve"][-1][0] for r in rows} == {9}
    assert all(r["fitness"]["after"] <= r["fitness"]["before"] + 1e-6 for r in rows)
    for seed in (0, 1):  # the same images in the same batches
        starts = [r["fitness"]["before"] for r in rows if r["seed"] == seed]
        assert starts == pytest.approx([starts[0]] * 5, rel=1e-6)


def test_rates_are_chosen_on_calibration_images_kept_apart() -> None:
    found = run("search")
    for method in OPTIMIZERS:
        rows = [r for r in found.rows if r["variant"] == method]
        assert len({r["rate"] for r in rows}) == 1
        tried = {t["rate"]: t["held_out"] for t in rows[0]["rates"]}
        assert set(tried) == set(search.RATES)
        assert tried[rows[0]["rate"]] == min(tried.values())
        assert rows[0]["held_out_fitness"]["after"] == pytest.approx(min(tried.values()), rel=1e-6)


@pytest.mark.parametrize("name", ["search", "fitness"])
def test_labels_change_nothing_but_what_they_measure(name: str) -> None:
    held_out = dataset(8, seed=5)
    settings: dict[str, Any] = {"steps": 4, "seeds": (0,)}
    labelled, plain = run(name, evaluate=held_out.labelled(LABELS), **settings), run(name, **settings)
    told = {"top1", "top1_ci", "seconds"}
    kept = [[{k: v for k, v in r.items() if k not in told} for r in x.rows] for x in (labelled, plain)]
    assert kept[0] == kept[1]
    assert all("top1" in r for r in labelled.rows)


def searched(**kl: float) -> StudyResult:
    figures = {"agreement": 0.9, "closed_held_out": 0.0}
    rows = [
        {"network": "n", "weights": 3, "activations": 8, "variant": v.replace("_", " "), "seed": s, "kl": k + 0.01 * s,
         **({} if v == "before" else {"closed": 1 - k}), **figures}
        for v, k in kl.items() for s in (0, 1)
    ]  # fmt: skip
    return StudyResult(search.STUDY, {}, rows)


def test_the_verdict_says_when_the_paper_is_contradicted() -> None:
    text = "\n".join(search.verdict(searched(before=0.9, evolution=0.2, random_search=0.4, SGD=0.5, Adam=0.3)))
    assert "evolution 80 %, Adam 70 %, random search 60 %, SGD 50 %" in text
    assert "ahead of all gradient methods, as the paper says (KL 0.205 against 0.305 of Adam, 0.905 before)" in text
    text = "\n".join(search.verdict(searched(before=0.9, evolution=0.4, random_search=0.4, SGD=0.3, Adam=0.5)))
    assert "behind SGD, against the paper" in text
    text = "\n".join(search.verdict(searched(before=0.9, evolution=0.4, random_search=0.4, SGD=0.4001)))
    assert "evolution and SGD differ by less than two standard errors" in text
    text = "\n".join(search.verdict(searched(before=0.4, evolution=0.396, random_search=0.4, SGD=0.39)))
    assert "no method moves the KL by more than 2 %" in text


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 8 images"):
        run("search", samples=7)


# ------------------------------------------------------------------------------------------------ fitness


def test_every_loss_evolves_the_same_start_for_as_long() -> None:
    found = run("fitness", steps=6)
    assert [(r["variant"], r["seed"]) for r in found.rows] == [
        ("before", 0), *((m, s) for m in ("infonce", "mse", "cosine", "kl") for s in (0, 1)),
    ]  # fmt: skip
    assert {r["evaluations"] for r in found.rows if r["variant"] != "before"} == {6}
    for r in found.rows:
        assert {"infonce", "mse", "cosine", "kl", "agreement"} <= set(r)
        if r["variant"] != "before":
            assert r["fitness"]["measure"] == r["variant"]
            assert r["fitness"]["after"] <= r["fitness"]["before"]
    assert len({r["kl"] for r in found.rows}) > 4


def test_losses_that_do_not_suit_the_outputs_are_left_out() -> None:
    found = study("fitness", make("transposed"), dataset(8), steps=2, seeds=(0,), samples=6)
    assert [r["variant"] for r in found.rows] == ["before", "infonce", "mse", "cosine", "kl"]
    assert found.verdict


def test_the_verdict_tells_noise_from_a_difference() -> None:
    def told(infonce: float, kl: float) -> str:
        values = {"before": 0.9, "infonce": infonce, "kl": kl}
        rows = [
            {"network": "n", "weights": 3, "activations": 8, "variant": v, "seed": s, "kl": k + 0.01 * s}
            for v, k in values.items()
            for s in (0, 1)
        ]
        (text,) = fitness.verdict(StudyResult(fitness.STUDY, {}, rows))
        return text

    assert "infoNCE is ahead, as the paper says" in told(0.2, 0.3)
    assert "infoNCE is behind KL, against the paper" in told(0.3, 0.2)
    assert "do not tell" in told(0.2, 0.201)
