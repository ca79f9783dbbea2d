"""Two networks that run beside each other give what each gives alone, and hold no more than they need."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cases import CASES, dataset, images, prepared
from torch import Tensor

from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import values_of, watch_both
from bitwright.quant.scheme import Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate


def calibrated(name: str) -> Student:
    student = insert_quantizers(prepared(name), Scheme(weights=4, activations=4))
    return Calibrate(weights="minmax", activations="minmax").run(student, prepared(name), dataset(6), Run())


@pytest.mark.parametrize("name", ["residual", "transformer", "called_twice"])
def test_values_side_by_side_are_those_of_each_network_alone(name: str) -> None:
    student, batch = calibrated(name), images(3, seed=5)
    teacher = prepared(name).graph
    names = [n.name for n in teacher.graph.nodes if n.op == "call_function"]
    pairs = {student_name: student_name for student_name in names}
    theirs, expected = values_of(teacher, batch, names)
    ours, found = values_of(student.graph, batch, names)
    seen: list[str] = []

    def see(node: str, a: Any, b: Any) -> None:
        seen.append(node)
        for one, other in ((a, theirs[node]), (b, ours[node])):
            assert not isinstance(one, Tensor) or torch.equal(one, other)

    both = watch_both(teacher, student.graph, batch, pairs, see)
    assert seen == names
    assert all(map(torch.equal, both[0], expected))
    assert all(map(torch.equal, both[1], found))


def test_values_are_let_go_of() -> None:
    assert "residual" in CASES
    student, batch = calibrated("residual"), images(64, seed=5)
    names = [n.name for n in student.teacher.graph.graph.nodes if n.op == "call_function"]
    most = 0

    def alive() -> list[Tensor]:
        return [x for x in gc.get_objects() if type(x) is Tensor and x.dim() == 4 and len(x) == 64]

    before = alive()
    theirs = {id(x) for x in before}

    def see(_: str, __: Tensor, ___: Tensor) -> None:
        nonlocal most
        most = max(most, len({x.untyped_storage().data_ptr() for x in alive() if id(x) not in theirs}))

    watch_both(student.teacher.graph, student.graph, batch, dict(zip(names, names, strict=True)), see)
    assert 1 < most <= 8 < 2 * len(names)
