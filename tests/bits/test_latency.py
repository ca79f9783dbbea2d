"""Tables of latencies: what is timed, how often, and that pieces are what the exporter writes. No time is asserted."""

from __future__ import annotations

from dataclasses import replace

import cases
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.bits import costs_of, latency, variables_of
from bitwright.bits.latency import compare_with_network, measure_latencies
from bitwright.bits.pieces import FLOAT, Kernel, parts_of, to_files
from bitwright.errors import UsageError
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Rule, Scheme
from bitwright.run.files import read_checked
from bitwright.runtimes.onnxruntime import ONNXRUNTIME
from bitwright.speed.float_twin import dequantize_linear
from bitwright.speed.kernels import kernels


def student(name, *rules, **settings):
    scheme = Scheme(rules=tuple(map(Rule.parse, rules)), **settings)
    return insert_quantizers(cases.prepared(name), scheme)


class Twins(nn.Module):
    """Two equal layers, one of another stride, one of another shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1, stride=s) for s in (1, 1, 2))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


@pytest.fixture
def twins():
    return bw.api.preview(Twins().eval(), cases.dataset())


class Stopwatch:
    """Takes the place of real timing: the empty call 1 s, the files 10, 20, 30 ... s, all slowed down alike."""

    def __init__(self):
        self.calls, self.slowness = [], 1.0

    def __call__(self, calls):
        self.calls.append(len(calls))
        return [[self.slowness * (1.0 if i == 0 else 10.0 * i)] * 3 for i in range(len(calls))]


@pytest.fixture
def stopwatch(monkeypatch):
    """No file is made either; ``files`` says which would have been."""
    watch = Stopwatch()
    watch.files = []

    def note(part, kernels, _):
        watch.files += [(part.layer.name, kernel) for kernel in kernels]
        return kernels

    monkeypatch.setattr(latency, "to_files", note)
    monkeypatch.setattr(latency, "_load", lambda *_: lambda: None)
    return watch


def measured(model, watch, **options):
    options = {"weights": (2, 3, 4, 5, 8), "activations": (4, 8, 16), **options}
    return measure_latencies(model, cases.images(2), measure=watch, **options)


def test_equal_layers_and_bits_of_one_file_are_timed_once(twins, stopwatch):
    found = measured(twins, stopwatch)
    assert [name for name, kernel in stopwatch.files if kernel == FLOAT] == ["a", "c", "head"]
    table = found.table
    assert table["a"] == table["b"]
    assert table["a"][2, 8] == table["a"][3, 8] == table["a"][4, 8] != table["a"][8, 8]
    assert table["a"][5, 16] == table["a"][8, 16] != table["a"][8, 8]
    assert found.facts.layers, found.facts.different_layers == (4, 3)
    assert found.facts.files_timed == len(stopwatch.files) == len(set(stopwatch.files))


def test_every_pair_that_a_plan_may_choose_is_there(stopwatch):
    for rules in ((), ("stem=w8", "conv=wfloat", "stem=afloat")):
        model = student("residual", *rules)
        found = measured(model, stopwatch)
        variables = variables_of(model, (2, 3, 4, 5, 8), (4, 8, 16))
        costs_of(model, variables, found.table)  # raises where one is missing
    assert set(found.table["conv"]) == {(32, 32)}
    assert {w for w, _ in found.table["stem"]} == {8}


def test_the_cost_of_calling_is_taken_off(twins, stopwatch):
    found = measured(twins, stopwatch, weights=(8,), activations=(8,))
    assert found.table["head"] == {(8, 8): 20.0 - 1.0}
    assert found.facts.float_seconds == 4 * (10.0 - 1.0)


def test_what_is_kept_is_not_timed_again(twins, stopwatch, tmp_path):
    first = measured(twins, stopwatch, folder=tmp_path / "kept")
    rounds = len(stopwatch.calls)
    assert measured(twins, stopwatch, folder=tmp_path / "kept").table == first.table
    assert len(stopwatch.calls) == rounds
    (path,) = (tmp_path / "kept").iterdir()
    about = read_checked(path)
    assert about["onnxruntime"] == onnxruntime.__version__
    assert about["threads"] == 1
    measured(twins, stopwatch, folder=tmp_path / "kept", threads=2)
    assert len(stopwatch.calls) == 2 * rounds
    assert len(list((tmp_path / "kept").iterdir())) == 2
    measured(twins, stopwatch, folder=tmp_path / "kept", batch=2)
    assert len(stopwatch.calls) == 3 * rounds


def test_another_machine_measures_for_itself(twins, stopwatch, tmp_path, monkeypatch):
    measured(twins, stopwatch, folder=tmp_path)
    rounds = len(stopwatch.calls)
    monkeypatch.setattr(latency, "cpu_name", lambda: "another processor")
    measured(twins, stopwatch, folder=tmp_path)
    assert len(stopwatch.calls) == 2 * rounds


def test_bits_added_later_are_timed_beside_float_and_put_in_relation_to_it(twins, stopwatch, tmp_path):
    options = {"activations": (8,), "folder": tmp_path}
    measured(twins, stopwatch, weights=(8,), **options)
    stopwatch.slowness = 3.0
    found = measured(twins, stopwatch, weights=(4, 8), **options)
    assert stopwatch.calls == [3] * 6  # nothing, float, and one more
    assert found.table["a"] == {(4, 8): 20.0 - 1.0, (8, 8): 20.0 - 1.0}


def test_a_damaged_cache_is_measured_again(twins, stopwatch, tmp_path):
    first = measured(twins, stopwatch, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.warns(UserWarning, match="measured again"):
        assert measured(twins, stopwatch, folder=tmp_path).table == first.table


def test_layers_are_compared_with_the_whole_network(twins, stopwatch):
    found = measured(twins, stopwatch)
    facts = compare_with_network(twins, cases.images(2), found, measure=lambda calls: [[5.0] * 3, [3.0] * 3])
    assert facts["float"] == {"layers": 4 * (10.0 - 1.0), "network": 5.0}
    assert facts["w8a8"] == {"layers": sum(row[8, 8] for row in found.table.values()), "network": 3.0}
    with pytest.raises(UsageError, match="at 8 bits"):
        compare_with_network(twins, cases.images(2), measured(twins, stopwatch, weights=(4,)))


def test_wrong_calls(twins, stopwatch, monkeypatch):
    with pytest.raises(UsageError, match="at least 1 thread"):
        measured(twins, stopwatch, threads=0)
    with pytest.raises(UsageError, match="at least one image"):
        measure_latencies(twins, cases.images(2)[:0], measure=stopwatch)
    with pytest.raises(UsageError, match="not frozen"):
        measured(bw.quantize(Twins().eval(), cases.dataset(), recipe="mse").freeze(), stopwatch)
    absent = replace(latency.ONNXRUNTIME, package="no_such_package_anywhere")
    monkeypatch.setattr(latency, "ONNXRUNTIME", absent)
    with pytest.raises(UsageError, match=r"ONNX Runtime is not installed\. Install it with: pip install no_such"):
        measured(twins, stopwatch)


# ---------------------------------------------------------------------------------------------------------- pieces


def piece(model, layer, weight, given):
    part = next(p for p in parts_of(model, cases.images(1)) if p.layer.name == layer)
    return part, to_files(part, [Kernel.of(weight, given, ONNXRUNTIME.target)], model.scheme)[0]


def run(program, codes, path):
    ir.save(program, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"images": codes})[0]


def stored(program, op):
    """What the file's operator reads as weight and bias, by ONNX's definition, in numpy."""
    node = next(n for n in program.graph if n.op_type == op)
    return [_constant(v) for v in node.inputs[1:]]


def _constant(value):
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    arrays = [v.const_value.numpy() for v in node.inputs]
    settings = [a.as_int() for a in node.attributes.values()]
    return dequantize_linear(*arrays[:2], arrays[2] if len(arrays) > 2 else None, *settings)


@pytest.mark.parametrize(("weight", "given", "kernel"), [(8, 8, "QLinearConv"), (3, 8, "QLinearConv"), (8, 16, "Conv")])
def test_a_convolution_takes_codes_and_gives_codes(tmp_path, weight, given, kernel):
    model = student("residual")
    part, program = piece(model, "stem", weight, given)
    kind = np.uint8 if given == 8 else np.uint16
    codes = np.random.default_rng(1).integers(0, 2**given, part.piece.input_shape).astype(kind)
    found = run(program, codes, tmp_path / "piece.onnx")
    w, b = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in stored(program, "Conv"))
    scale = 2.0**-given
    x = (torch.from_numpy(codes.astype(np.float64)) - 2 ** (given - 1)) * scale
    y = F.relu(F.conv2d(x, w, b, padding=1))
    expected = (y / scale).round().clamp(0, 2**given - 1).numpy()
    assert found.dtype == kind
    assert np.abs(found.astype(np.int64) - expected).max() <= 1
    assert 0 < expected.mean() < 2**given - 1
    assert kernel in kernels(tmp_path / "piece.onnx")
    assert "Relu" not in kernels(tmp_path / "piece.onnx")


def test_a_layer_in_float_has_no_quantizers(tmp_path):
    _, program = piece(student("residual"), "conv", 32, 32)
    assert [n.op_type for n in program.graph] in (["Conv", "Relu"], ["Conv"])
    x = cases.images(1, seed=3).numpy()[:, :1].repeat(4, 1)
    assert run(program, x, tmp_path / "piece.onnx").dtype == np.float32


def test_the_float_file_beside_a_quantized_one_has_the_operators_of_the_float_layer():
    model = student("residual")
    part = next(p for p in parts_of(model, cases.images(1)) if p.layer.name == "conv")
    (alone,) = to_files(part, [FLOAT], model.scheme)
    beside, _ = to_files(part, [FLOAT, Kernel.of(8, 8, ONNXRUNTIME.target)], model.scheme)
    assert [n.op_type for n in beside.graph] == [n.op_type for n in alone.graph]
    assert beside.graph.inputs[0].dtype == alone.graph.inputs[0].dtype == ir.DataType.FLOAT


def test_few_bits_of_activations_have_a_clip(tmp_path):
    _, program = piece(student("residual"), "stem", 8, 4)
    assert [n.op_type for n in program.graph].count("Clip") == 1


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("transformer", "transposed")]


@pytest.mark.parametrize("name", ["conv_bn_relu6", *SLOW])
def test_all_layers_of_a_network_run(name):
    model = student(name)
    found = measure_latencies(model, cases.dataset(), weights=(8,), activations=(8,), batch=1).table
    assert list(found) == [p.layer.name for p in parts_of(model, cases.images(1))]
    assert all(set(row) == {(8, 8)} and row[8, 8] >= 0 for row in found.values())


def test_shapes_are_those_of_the_batch():
    model = student("shifted_window")
    one, three = ({p.layer.name: p.piece.input_shape for p in parts_of(model, cases.images(n))} for n in (1, 3))
    assert one["patches"] == (1, 3, 8, 8)
    assert one["qkv"] == (4, 4, 4)
    assert three["qkv"] == (12, 4, 4)
