"""Measures from the curvature against dense matrices, and against losses that are measured."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import dataset, images, make, prepared
from dense import matrix_of, part, spans
from torch import Tensor, nn

from bitwright.curvature.hessian import Curvature, Data, Group, Matrix, weight_groups
from bitwright.given.images import Images
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Scheme
from bitwright.sensitivity import Choices, MeasuredLoss, QBert, Quadratic, TopEigenvalue, Trace
from bitwright.sensitivity.hap import channel_scores, pruning_mask
from bitwright.sensitivity.second_order import positive
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters

BITS = (2, 4, 8)
LABELS = [0, 3, 1, 1, 2, 0]


def some() -> Images:
    return dataset(6).labelled(LABELS)


def layers(made: Captured) -> list[Group]:
    return [g for g in weight_groups(made.graph) if g.kind == "layer"]


@cache
def truth(name: str, matrix: Matrix) -> Tensor:
    """The dense matrix over all images, float64."""
    return matrix_of(prepared(name), matrix, some().batch(range(6)), LABELS).double()


@cache
def errors(name: str) -> dict[str, dict[int, Tensor]]:
    """``Q_b(w) - w`` of every layer as a calibration of the whole network has it, activations included."""
    made, found = prepared(name), {}
    for bits in BITS:
        student = insert_quantizers(made, Scheme(weights=bits, activations=4))
        student = Calibrate().run(student, made, dataset(6), Run())
        for path, quantizer in parameters(student.graph, "weight"):
            weight = made.graph.get_buffer(path)
            found.setdefault(quantizer.name, {})[bits] = (quantizer(weight) - weight).flatten().double()
    return found


NAMES = ["residual", "transformer", "called_twice", "tied_weights"]


@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
@pytest.mark.parametrize("name", NAMES)
def test_quadratic_is_the_dense_form(name: str, matrix: Matrix) -> None:
    made = prepared(name)
    found = Quadratic(matrix).measure(made, some(), Choices(BITS), Run(batch=4))
    assert list(found.weights) == [g.name for g in layers(made)]
    assert found.activations == {}
    for group in layers(made):
        block = part(truth(name, matrix), made, group)
        for bits, error in errors(name)[group.name].items():
            expected = float(error @ block @ error) / 2
            assert found.weights[group.name][bits] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    below = [g.name for g in layers(made) if min(found.weights[g.name].values()) < 0]
    assert bool(below) == bool(found.notes)
    assert all(n in found.notes[0] for n in below)


@pytest.mark.parametrize("name", NAMES)
def test_trace_is_half_the_mean_of_the_diagonal_times_the_squared_error(name: str) -> None:
    made = prepared(name)
    found = Trace(probes=400, tolerance=0.0).measure(made, some(), Choices(BITS), Run(batch=6))
    for group in layers(made):
        mean = float(part(truth(name, "fisher"), made, group).trace()) / group.parameters
        slack = 4 * found.facts["error"][group.name]
        for bits, error in errors(name)[group.name].items():
            norm = float(error @ error)
            assert abs(found.weights[group.name][bits] - mean * norm / 2) <= slack * norm / 2 + 1e-9
            assert slack < 0.5 * mean


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalue_is_the_largest_of_the_dense_block(name: str) -> None:
    made = prepared(name)
    found = TopEigenvalue(tolerance=1e-4).measure(made, some(), Choices(BITS), Run(batch=4))
    for group in layers(made):
        top = float(torch.linalg.eigvalsh(part(truth(name, "fisher"), made, group))[-1])
        for bits, error in errors(name)[group.name].items():
            expected = top / group.parameters * float(error @ error) / 2
            assert found.weights[group.name][bits] == pytest.approx(expected, rel=1e-3)


def test_q_bert_takes_mean_and_spread_over_parts() -> None:
    made, x = prepared("residual"), some().batch(range(6))
    found = QBert(parts=3, tolerance=1e-4).measure(made, some(), Choices(BITS), Run())
    parts = [matrix_of(made, "fisher", x[i::3]).double() for i in range(3)]
    for group in layers(made):
        top = torch.stack([torch.linalg.eigvalsh(part(p, made, group))[-1] for p in parts])
        omega = float(top.mean()) + float(top.std())
        for bits, error in errors("residual")[group.name].items():
            assert found.weights[group.name][bits] == pytest.approx(omega * float(error @ error) / 2, rel=1e-3)
    single = QBert().measure(made, some()[:1], Choices((4,)), Run())
    assert "no spread" in single.notes[0]


# --------------------------------------------------------------------------------------------- the theory


class Flat(nn.Module):
    """Linear in its weights, so that squared error is a quadratic of them and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_trace_is_the_loss_of_errors_in_random_directions() -> None:
    """``1/2 Tr(H)/n ||dw||^2`` is the mean of the true loss over errors of that length (methods, section 7)."""
    net, x = Flat().eval(), some().batch(range(6))
    made = prepare(capture(net, x[:2]))
    found = Trace("squared", probes=300, tolerance=0.0).measure(made, some(), Choices((3,)), Run(batch=6))
    length = (2 * found.weights["head"][3] / found.facts["mean_trace"]["head"]) ** 0.5
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(500):
        step = torch.randn(5, 192, generator=generator)
        step *= length / step.norm()
        losses.append(float((x.flatten(1) @ step.T).square().mean()))
    measured = torch.tensor(losses)
    assert float(measured.mean()) == pytest.approx(
        found.weights["head"][3], abs=4 * float(measured.std()) / 500**0.5 + 0.02 * float(measured.mean())
    )


@pytest.mark.parametrize("name", ["residual", "transformer", "squeeze_excite"])
def test_at_many_bits_the_measured_loss_is_the_quadratic_one(name: str) -> None:
    """KL from float is ``1/2 dw^T F dw`` to second order, in nats."""
    made = prepared(name)
    second = Quadratic().measure(made, some(), Choices((8,)), Run())
    measured = MeasuredLoss().measure(made, some(), Choices((8,), ()), Run())
    for layer, row in second.weights.items():
        assert measured.weights[layer][8] == pytest.approx(row[8], rel=0.1, abs=1e-9)


def test_more_bits_lose_less() -> None:
    for measure in (Trace(probes=4), TopEigenvalue(steps=4), Quadratic()):
        found = measure.measure(prepared("mixer"), some(), Choices(BITS), Run())
        for row in found.weights.values():
            assert row[2] > row[4] > row[8] > 0


# -------------------------------------------------------------------------------------- negative curvature


def test_a_negative_trace_is_replaced_and_named() -> None:
    made = prepared("layer_scale")
    found = Trace("hessian", probes=300, tolerance=0.0).measure(made, some(), Choices(BITS), Run(batch=6))
    negative = [g.name for g in layers(made) if float(part(truth("layer_scale", "hessian"), made, g).trace()) < -0.05]
    assert negative
    means = found.facts["mean_trace"]
    least = min(v for v in means.values() if v > 0)
    (note,) = found.notes
    for name in negative:
        assert means[name] < 0
        assert name in note
        norm = float(errors("layer_scale")[name][4].square().sum())
        assert found.weights[name][4] == pytest.approx(least * norm / 2, rel=1e-5)
    assert all(v > 0 for row in found.weights.values() for v in row.values())


def test_curvature_that_is_never_positive_predicts_no_loss() -> None:
    values, notes = positive({"a": -1.0, "b": 0.0}, "trace")
    assert values == {"a": 0.0, "b": 0.0}
    assert "at a:" in notes[0]


# ---------------------------------------------------------------------------------------------------- HAP


def test_channel_scores_are_the_dense_traces_of_channels() -> None:
    made = prepared("residual")
    look = Curvature(made.graph, Data(some(), 6))
    found = channel_scores(look, probes=500, tolerance=0.0)
    diagonal = truth("residual", "fisher").diagonal()
    for group in layers(made):
        (path,) = group.weights
        weight = made.graph.get_buffer(path).double()
        channels = diagonal[list(spans(made)[path])].view(len(weight), -1)
        expected = channels.sum(1) / (2 * channels.shape[1]) * weight.flatten(1).square().sum(1)
        torch.testing.assert_close(found[group.name], expected, rtol=0.4, atol=1e-6)


def test_the_mask_prunes_the_least_scores_of_all_layers_within_each_layers_cap() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(40), "b": torch.rand(20) / 1000, "head": torch.zeros(4)}
    masks = pruning_mask(scores, 0.5)
    assert masks["head"].all()
    assert int((~masks["b"]).sum()) == 19  # 95 % of 20, though all are the least
    pruned = ~masks["a"]
    assert int(pruned.sum()) == 30 - 19
    assert float(scores["a"][pruned].max()) < float(scores["a"][masks["a"]].min())
    assert all(m.all() for m in pruning_mask(scores, 0.0).values())
    with pytest.raises(Exception, match="between 0 and 1"):
        pruning_mask(scores, 1.5)


def test_hmse_ranges_look_at_the_images() -> None:
    """The shortcut of one image is for ranges that look at none."""
    made = prepare(capture(make("residual"), images(2)))
    choices = Choices((3,), (), calibrate=Calibrate(weights="hmse"))
    found = {layer: e for layer, _, _, e in choices.weight_errors(made, dataset(6), Run())}
    student = insert_quantizers(made, Scheme(weights=3, activations=None))
    student = Calibrate(weights="hmse").run(student, made, dataset(6), Run())
    for path, quantizer in parameters(student.graph, "weight"):
        weight = made.graph.get_buffer(path)
        torch.testing.assert_close(found[quantizer.name], quantizer(weight) - weight)
