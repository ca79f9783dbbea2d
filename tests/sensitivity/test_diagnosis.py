"""What a finished run lost where: against networks changed by hand, and against runs with the rules that it names."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import dataset, prepared
from torch import Tensor

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.export.packed import save_packed
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant.scheme import Rule, Scheme
from bitwright.runtimes.target import Target
from bitwright.sensitivity import diagnosis
from bitwright.sensitivity.diagnosis import Suspect, diagnose, diagnosis_lines, rules_for
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate

pytestmark = pytest.mark.filterwarnings("ignore:Output '.*' of the quantized network")

NAMES = ["residual", "transformer", "called_twice"]


@cache
def student(name: str, weights: int = 3, activations: int = 4, correction: str = "analytic") -> Student:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "integer_bias", lambda *_: False)  # so that a loss is that of one tensor alone
        made = insert_quantizers(prepared(name), Scheme(weights=weights, activations=activations))
    return Calibrate(bias_correction=correction).run(made, prepared(name), dataset(6), Run())


def numpy_kl(ours: Tensor, theirs: Tensor) -> float:
    a, b = ours.double().numpy(), theirs.double().numpy()
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (b, a))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def loss_by_hand(model: Student, key: str | None, images: Tensor) -> float:
    """With the whole network run, and the tensor of that quantizer (and its layers' biases) as the teacher has it."""
    graph, teacher = copy.deepcopy(model.graph), model.teacher.graph
    if key is not None:
        for node in graph.graph.nodes:
            if node.target == key and node.args[0].op == "get_attr":
                owner, _, leaf = node.args[0].target.rpartition(".")
                graph.get_submodule(owner)._buffers[leaf] = teacher.get_buffer(node.args[0].target)
                for reader in node.users:
                    bias = reader.args[2].target
                    owner, _, leaf = bias.rpartition(".")
                    graph.get_submodule(owner)._buffers[leaf] = teacher.get_buffer(bias)
        graph.get_submodule(key).scale = torch.empty(0)
    with torch.no_grad():
        ours, theirs = graph(images), teacher(images)
    return sum(numpy_kl(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("correction", ["analytic", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_without_a_tensor_is_that_of_the_network_changed_by_hand(
    name: str, correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "NEGLIGIBLE", 0.0)
    monkeypatch.setattr(diagnosis, "SUSPECTS", (100, 100))
    model, images = student(name, correction=correction), dataset(6)
    found = diagnose(model, images)
    assert found.images == 6
    assert found.loss == pytest.approx(loss_by_hand(model, None, images.batch(range(6))), rel=1e-5)
    batch = images.batch(range(6))
    quantizers = {k: q for k, q in model.graph.named_children() if getattr(q, "role", None) in {"weight", "activation"}}
    by_hand = {(q.name, q.role): loss_by_hand(model, key, batch) for key, q in quantizers.items()}
    rows = {(r.name, r.tensor): r for r in found.layers}
    assert set(rows) >= {key for key, loss in by_hand.items() if loss < 0.999 * found.loss}
    for key, row in rows.items():
        assert row.loss_without == pytest.approx(by_hand[key], rel=2e-3), row
        assert row.share == pytest.approx((found.loss - by_hand[key]) / found.loss, abs=2e-3)
    shares = [r.share for r in found.layers]
    assert shares == sorted(shares, reverse=True)


def test_frozen_and_not_yet_frozen_are_diagnosed_alike_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "NEGLIGIBLE", 0.0)
    model, images = student("residual"), dataset(6)
    frozen = student.__wrapped__("residual").freeze()
    x = images.batch(range(6))
    before = frozen.flat(x)[0]
    first, second = diagnose(model, images), diagnose(frozen, images)
    assert first == second
    assert torch.equal(frozen.flat(x)[0], before)


def test_gradient_times_error_adds_up_to_twice_a_small_loss() -> None:
    """A loss that is least at zero error is 1/2 e^T H e to second order, and its gradient there is H e."""
    model = bw.quantize("zoo:fashion_cnn", "zoo:fashion", "mse", weights=7, activations=16, samples=64)
    patient = diagnosis._Patient(model, model.calibration.sample(32, seed=0), Run(batch=16))
    patient.read()
    loss, effects = patient.first_order()
    assert sum(effects.values()) == pytest.approx(2 * loss, rel=0.15)


@pytest.fixture(scope="module")
def run() -> Student:
    return zoo()


def zoo(rules: tuple[str, ...] = ()) -> Student:
    return bw.quantize("zoo:fashion_cnn", "zoo:fashion", "mse", weights=2, samples=96, rules=rules)


@pytest.mark.slow
def test_runs_with_the_rules_lose_and_weigh_what_was_predicted(run: Student, tmp_path: Path) -> None:
    found = diagnose(run)
    assert found.rules
    assert found.together is not None
    assert 2 <= len(found.together.rules) <= diagnosis.TOGETHER
    save_packed(run, tmp_path / "without")
    best, together = found.rules[0], found.together
    for row, rules in ((best, [best.rule]), (together, together.rules)):
        mended = zoo(tuple(rules))
        gain = found.loss - row.loss_after
        assert found.loss - diagnose(mended).loss == pytest.approx(gain, rel=0.2)
        assert gain > diagnosis.WORTH * found.loss
        save_packed(mended, tmp_path / "with")
        more = (tmp_path / "with").stat().st_size - (tmp_path / "without").stat().st_size
        assert abs(more - row.bytes) < 250  # the description of the network grows too
    assert together.loss_after < best.loss_after


@pytest.mark.slow
def test_the_ranking_puts_what_matters_among_the_first(run: Student) -> None:
    everything = diagnose(run).layers
    few = diagnose(run, seconds=0.0).layers
    assert len(few) <= diagnosis.SUSPECTS[0]
    assert {r.name for r in everything[:2]} <= {r.name for r in few}


def test_nothing_is_said_where_the_loss_is_negligible() -> None:
    model = bw.quantize("zoo:fashion_cnn", "zoo:fashion", "mse", samples=64)
    found = diagnose(model)
    assert 0 < found.loss < diagnosis.NEGLIGIBLE
    assert (found.layers, found.rules, found.together) == ([], [], None)
    assert diagnosis_lines(found) == []
    assert diagnosis_lines(None) == []


def test_one_name_may_stand_for_several_tensors() -> None:
    """A layer called twice: its rule widens both outputs, and the figure is that of the scheme with the rule."""
    model, images = student("called_twice", weights=8, activations=3), dataset(6)
    patient = diagnosis._Patient(model, images, Run())
    patient.read()
    for suspect in patient.suspects:
        if suspect.tensor != "activation":
            continue
        change = patient.under(rules_for(suspect)[0])
        rule = Rule.parse(rules_for(suspect)[0])
        made = insert_quantizers(prepared("called_twice"), model.scheme.model_copy(update={"rules": (rule,)}))
        wider = {k for k, q in made.graph.named_children() if getattr(getattr(q, "grid", None), "bits", 0) == 8}
        wider = {k for k in wider if made.quantizer(k).role == "activation"}
        assert {s.key for s in change.suspects} == wider
        assert suspect.key in wider


def test_rules_are_read_back_literally() -> None:
    for name in ("blocks.0.mlp", "odd[0]*?"):
        for suspect in (Suspect("", "weight", 3, "", name), Suspect("", "activation", 8, "", name)):
            for text in rules_for(suspect):
                scheme = Scheme(rules=(Rule.parse(text),))
                for layer, expected in ((name, True), ("odd0x", False)):
                    ruled = scheme.rules_weights([layer]), scheme.rules_activations([layer])
                    assert any(ruled) is expected
    assert rules_for(Suspect("", "weight", 8, "", "head")) == ["head=wfloat"]
    assert rules_for(Suspect("", "activation", 16, "", "head")) == ["head=afloat"]


def test_without_a_float_network_there_is_one_line() -> None:
    model = student.__wrapped__("residual")
    model.attach_teacher(None)
    with pytest.raises(UsageError, match="float network"):
        diagnose(model, dataset(6))
