"""What a sensitivity report says of each layer."""

from __future__ import annotations

import pytest
from cases import dataset, prepared

from bitwright.graph import rewrite
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Scheme
from bitwright.sensitivity.report import GroupCurvature, LayerCurvature, predict, that_matter
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate, parameters


def test_a_predicted_loss_is_half_the_mean_trace_times_the_squared_error() -> None:
    teacher = prepared("residual")
    student = insert_quantizers(teacher, Scheme(weights=3, activations=None))
    student = Calibrate().run(student, teacher, dataset(4), Run())
    traces = {"stem": 4.0, "conv": 0.5, "head": -1.0}
    rows = [GroupCurvature(name, 1, trace, 0.0, trace, [], [], None) for name, trace in traces.items()]
    layers, (note,) = predict(rows, teacher, dataset(4), 3, Run())
    assert "negative at head" in note
    expected = {}
    for path, quantizer in parameters(student.graph, "weight"):
        weight = rewrite.get_tensor(teacher.graph, path)
        used = max(traces[quantizer.name], 0.5)  # the least positive one stands in for a negative one
        expected[quantizer.name] = 0.5 * used * float((quantizer(weight) - weight).double().square().sum())
    found = {row.name: row.predicted_loss for row in layers}
    assert found == pytest.approx(expected, rel=1e-5)
    shares = {name: loss / sum(expected.values()) for name, loss in expected.items()}
    assert {row.name: row.share for row in layers} == pytest.approx(shares, rel=1e-5)


def test_the_layers_that_matter_are_the_fewest_that_lose_most() -> None:
    shares = {"a": 0.1, "b": 0.7, "c": 0.2}
    rows = [LayerCurvature(name, 1, 0.0, 0.0, 0.0, [], [], None, share=share) for name, share in shares.items()]
    assert that_matter(rows) == ["b", "c"]
