"""A graph that is translated in one pass is the one that PyTorch's exporter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from bitwright.api import quantize
from bitwright.export import direct, onnx
from bitwright.export.direct import translated
from bitwright.graph.student import Student
from tests import cases, onnx_files


def structure(program: ir.Model) -> list[Any]:
    """Operators with attributes, constants and the places of their inputs; names are left out."""
    places: dict[int, int] = {}

    def place(value: ir.Value | None) -> Any:
        if value is not None and value.const_value is not None and value.producer() is None:
            return value.const_value.dtype, value.const_value.numpy().tobytes()
        return None if value is None else places.setdefault(id(value), len(places))

    rows: list[Any] = [[place(v) for v in program.graph.inputs]]
    for node in program.graph:
        attributes = {k: str(a.value) for k, a in node.attributes.items()}
        rows.append((node.op_type, [place(v) for v in node.inputs], attributes, [place(v) for v in node.outputs]))
    return [*rows, [place(v) for v in program.graph.outputs], program.opset_imports]


def quantized(model: nn.Module) -> Student:
    """At W4A8, by rounding to nearest."""
    return quantize(model, cases.images(), "rtn", weights=4, progress=False)


@pytest.mark.parametrize("name", ["functional", "transposed"])
def test_both_ways_give_one_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(cases.model(name))
    taken: list[ir.Model | None] = []
    monkeypatch.setattr(onnx, "translated", lambda *a: taken.append(translated(*a)) or taken[-1])
    found = onnx.to_onnx(model)
    assert taken[0] is not None
    monkeypatch.setattr(onnx, "translated", lambda *a: None)
    assert structure(found) == structure(onnx.to_onnx(model))


def test_stored_tensors_may_have_any_names(tmp_path: Path) -> None:
    names = "scale:0", "9/scale", "a.scale", "a_scale"
    nodes = [onnx_files.node("Conv", "x w", "made"), onnx_files.node("Sum", "by_0 by_1 by_2 by_3")]
    nodes[1:1] = [onnx_files.node("Add", f"made {n}", f"by_{k}") for k, n in enumerate(names)]
    images = cases.images()
    height, width = images.shape[2:]
    stored = {n: onnx_files.weights(4, height - 2, width - 2, seed=k) for k, n in enumerate(names)}
    stored["w"] = onnx_files.weights(4, 3, 3, 3)
    file = onnx_files.write(tmp_path / "given.onnx", nodes, ["N", *images.shape[1:]], stored)
    model = quantize(str(file), images, "rtn", weights=4, progress=False)
    ir.save(onnx.to_onnx(model), tmp_path / "m.onnx")  # a fault on the way would be a warning
    (theirs,) = onnx_files.in_runtime(tmp_path / "m.onnx", images[:2], one_by_one=False)
    torch.testing.assert_close(theirs, model(images[:2]).detach(), atol=1e-4, rtol=1e-4)


class Counting(nn.Module):
    """Computes with integers, which become floats on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0).sum(1, keepdim=True)


def test_what_changes_its_type_is_left_to_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), Counting()))
    taken: list[ir.Model | None] = []
    monkeypatch.setattr(onnx, "translated", lambda *a: taken.append(translated(*a)) or taken[-1])
    assert onnx.to_onnx(model).graph.outputs[0].dtype == ir.DataType.FLOAT
    assert taken == [None]


class OfTwo(nn.Module):
    """Two inputs of different sizes, which lie flat in one tensor: each is cut out of it and reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(left).flatten(1), self.second(right.reshape(-1, 2, 5, 5)).reshape(-1, 3, 36)


@pytest.mark.parametrize("way", ["one pass", "exporter"])
def test_shapes_of_one_name_are_all_stored(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "exporter":
        monkeypatch.setattr(onnx, "translated", lambda *a: None)
    images = {"left": torch.rand(4, 3, 8, 6), "right": torch.rand(4, 3, 2, 5, 5)}
    graph = onnx.to_onnx(quantize(OfTwo(), images, "rtn", progress=False)).graph
    read = [v for n in graph for v in n.inputs if v is not None and v.producer() is None and v.const_value is not None]
    assert all(graph.initializers.get(str(v.name)) is v for v in read)


def test_a_fault_on_the_way_is_said_and_the_exporter_writes_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(cases.model("functional"))
    expected = structure(onnx.to_onnx(model))

    def moved(*_: Any) -> None:
        raise AttributeError("no such part in this PyTorch")

    monkeypatch.setattr(direct, "_optimised", moved)
    with pytest.warns(UserWarning, match=r"not written as ONNX in one pass \(AttributeError: no such part"):
        assert structure(onnx.to_onnx(model)) == expected
