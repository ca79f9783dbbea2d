"""Cutting a network at what a change of quantizers reaches: the part behind must compute what the whole computes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import CASES, dataset, images, prepared
from torch import Tensor

from bitwright.graph import segments
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import values_of, watch
from bitwright.quant.quantizer import Calibration, as_if
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate


@cache
def calibrated(name: str) -> Student:
    teacher = prepared(name)
    student = insert_quantizers(teacher, Scheme(weights=8, activations=8))  # so that biases are integers
    return Calibrate(weights="minmax", activations="minmax").run(student, teacher, dataset(6), Run())


def by_region(student: Student, changed: list[str], batch: Tensor) -> list[Tensor]:
    """The outputs by way of the cut."""
    cut = segments.region(student.graph, changed)
    with torch.no_grad():
        before = segments.truncate(student.graph, cut.frontier)(batch)
        fixed, moved = (segments.values(student.graph, names) for names in (cut.fixed, cut.moved))
        return list(cut.body(*before, *fixed, *moved))


def keys(student: Student, role: str) -> list[str]:
    return [k for k in dict.fromkeys(getattr(layer, role) for layer in student.layers) if k is not None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_the_part_behind_any_quantizer_gives_the_outputs_of_the_whole(name: str, role: str) -> None:
    student = calibrated(name)
    batch = images(3, seed=5) if tuple(student.input_shape) == tuple(images(1).shape[1:]) else None
    if batch is None:
        batch = torch.randn(3, *student.input_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = student.flat(batch)
    for key in keys(student, role)[::2]:
        for a, b in zip(by_region(student, [key], batch), whole, strict=True):
            assert torch.equal(a, b), key


def test_a_change_of_the_quantizers_is_seen_through_an_old_cut() -> None:
    student, batch = calibrated("residual"), images(3)
    key = keys(student, "weight")[1]
    cut = segments.region(student.graph, [key])
    with torch.no_grad():
        before = segments.truncate(student.graph, cut.frontier)(batch)
    fixed = segments.values(student.graph, cut.fixed)
    snapshot = student.snapshot()
    try:
        quantizer = student.quantizer(key)
        quantizer.set_range(quantizer.scale * 1.7)
        with torch.no_grad():
            after = cut.body(*before, *fixed, *segments.values(student.graph, cut.moved))
            assert torch.equal(after[0], student.flat(batch)[0])
    finally:
        student.restore(snapshot)
        with torch.no_grad():
            assert not torch.equal(after[0], student.flat(batch)[0])


def test_a_bias_follows_the_quantizers_of_its_accumulator() -> None:
    student = calibrated("residual")
    layer = next(x for x in student.layers if x.bias is not None)
    assert layer.weight is not None
    assert layer.source is not None
    for key in (layer.weight, layer.source):
        cut = segments.region(student.graph, [key])
        found = {n.name for n in student.graph.graph.nodes if n.op == "call_module" and n.target == layer.bias}
        assert found <= set(cut.moved)


def test_what_lies_before_does_not_run_again() -> None:
    student = calibrated("residual")
    weights = keys(student, "weight")
    first, last = (len(segments.region(student.graph, [k]).body.graph.nodes) for k in (weights[0], weights[-1]))
    assert last < first < len(student.graph.graph.nodes) + 10
    assert not any(n.op == "get_attr" for n in segments.region(student.graph, [weights[0]]).body.graph.nodes)


def test_nothing_changed_reaches_nothing() -> None:
    student = calibrated("residual")
    cut = segments.region(student.graph, [])
    assert not cut.moved
    assert [n.op for n in cut.body.graph.nodes] == ["placeholder", "output"]


def test_size_counts_tensors_and_lists_of_them() -> None:
    assert segments.tensor_bytes({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64)], "c": 7}) == 12 + 16


@pytest.mark.parametrize("name", ["residual", "transformer", "called_twice", "dense"])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_running_again_gives_what_the_whole_network_gives_with_the_change(name: str, role: str) -> None:
    student, batch = calibrated(name), images(3, seed=5)
    again = segments.Rerun(student.graph)
    for key in keys(student, role)[::2]:
        nodes = [n.name for n in student.graph.graph.nodes if n.target == key]
        part = again.behind(nodes)
        known, _ = values_of(student.graph, batch, part.reads)
        quantizer = student.quantizer(key)
        wider = Calibration(quantizer.grid, quantizer.scale * 2, quantizer.zero_point)
        with as_if({quantizer: wider} if role == "activation" else {}):
            halved = {n: again.constants[n] / 2 for n in nodes if role == "weight"}
            found = again.outputs(part, known, halved)
            callbacks = dict.fromkeys(halved, lambda _, value: value / 2)
            biases = {n: lambda n, _: again.constants[n.name] for n in again.constants if n not in halved}
            whole = watch(student.graph, batch, biases | callbacks)
        assert all(map(torch.equal, found, whole)), key
        assert len(part.again) < len(student.graph.graph.nodes)


def test_what_lies_ahead_of_a_change_does_not_run_again() -> None:
    student = calibrated("residual")
    last = [n.name for n in student.graph.graph.nodes if n.target == keys(student, "activation")[-1]]
    first = [n.name for n in student.graph.graph.nodes if n.target == keys(student, "activation")[0]]
    again = segments.Rerun(student.graph)
    late, early = again.behind(last), again.behind(first)
    assert len(late.again) < len(early.again) / 2
    assert again.behind([]).again == []
    assert set(late.again) < set(early.again)
