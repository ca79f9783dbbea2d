"""The encodings beside a float file: grids that are computed from them alone give the simulation."""

import json

import cases
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import bitwright as bw
from bitwright.export.encodings import write_encodings
from bitwright.export.onnx import to_onnx


def grid(each):
    """Values of every code from minimum, maximum and bits alone: lowest value, step, number of steps."""
    low, high = (np.array([e[k] for e in each], np.float64) for k in ("min", "max"))
    steps = 2 ** each[0]["bitwidth"] - 1
    return low, (high - low) / steps, steps


def simulated(folder, images):
    """The float file, run one operator at a time; what it gives is put on the grid that the encodings name."""
    file = onnx.load(folder / "m.onnx")
    found = json.loads((folder / "m.encodings").read_text())
    graph = file.graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    readers = {name: n for n in reversed(graph.node) for name in n.input}
    for name, each in found["param_encodings"].items():
        if each[0]["bitwidth"] == 32:
            continue  # of biases, whose values are on their grid
        low, step, steps = grid(each)
        last = readers[name].op_type == "MatMul" or (
            readers[name].op_type == "Gemm" and not any(a.name == "transB" and a.i for a in readers[name].attribute)
        )
        axis = -1 if last else 1 if readers[name].op_type == "ConvTranspose" else 0
        shape = [-1 if d == axis % values[name].ndim else 1 for d in range(values[name].ndim)] if len(each) > 1 else []
        low, step = low.reshape(shape), step.reshape(shape)
        codes = np.clip(np.rint((values[name] - low) / step), 0, steps)
        values[name] = (codes * step + low).astype(np.float32)

    def rounded(name, x):
        if name not in found["activation_encodings"]:
            return x
        (low,), (step,), steps = grid(found["activation_encodings"][name])
        codes = np.clip(np.rint(x / np.float32(step)) - np.rint(low / step), 0, steps)
        return ((codes + np.rint(low / step)) * step).astype(np.float32)

    values["images"] = rounded("images", images)
    for node in graph.node:
        inputs = [
            helper.make_value_info(n, onnx.helper.make_tensor_type_proto(t, None)) for n, t in kinds(node, values)
        ]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output]
        alone = helper.make_model(
            helper.make_graph([node], "one", inputs, outputs), opset_imports=file.opset_import, ir_version=8
        )
        session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        results = session.run(None, {n: values[n] for n, _ in kinds(node, values)})
        values.update({o: rounded(o, r) for o, r in zip(node.output, results, strict=True)})
    return values[graph.output[0].name]


def kinds(node, values):
    return [(n, helper.np_dtype_to_tensor_dtype(values[n].dtype)) for n in dict.fromkeys(node.input) if n]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("residual", {"weights": 4}),
        ("transformer", {"weights": 8}),
        ("transformer", {"activations": 16, "granularity": "tensor"}),
        ("squeeze_excite", {"runtime": "generic", "activation_grid": "symmetric"}),
        ("transposed", {"weights": 5, "activations": 6, "granularity": "tensor"}),
    ],
)
def test_grids_from_the_encodings_give_the_simulation(name, settings, tmp_path):
    model = bw.quantize(cases.model(name), cases.dataset(), "rtn", scheme=bw.Scheme(**settings))
    images = cases.images(6)
    assert write_encodings(model, tmp_path / "m.onnx", images).passed
    with torch.no_grad():
        expected = model.flat(images)[0].numpy()
    found = simulated(tmp_path, images.numpy())
    assert np.abs(found - expected).mean() < 1e-3 * np.ptp(expected)
    assert np.median(np.abs(found - expected)) < 1e-5 * np.ptp(expected)


def test_tensors_have_the_names_of_the_quantized_file(tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn")
    write_encodings(model, tmp_path / "m.onnx", cases.images(3))
    document = json.loads((tmp_path / "m.encodings").read_text())
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    program = to_onnx(model)
    there = {v.name for node in program.graph for v in node.outputs} | {"images"}
    assert set(document["activation_encodings"]) <= there
    assert document["version"] == "0.6.1"
    for each in (*document["activation_encodings"].values(), *document["param_encodings"].values()):
        for e in each:
            assert set(e) == {"dtype", "bitwidth", "is_symmetric", "min", "max", "offset", "scale"}
            assert e["min"] == e["offset"] * e["scale"]
            assert e["min"] <= 0 <= e["max"]
    types = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not types & {"QuantizeLinear", "DequantizeLinear"}


def test_groups_of_a_transposed_convolution_are_refused(tmp_path):
    model = bw.quantize(cases.model("transposed"), cases.dataset(), "rtn")
    with pytest.raises(bw.UsageError, match=r"along one axis.*'grouped'\. Quantize again with granularity='tensor'"):
        write_encodings(model, tmp_path / "m.onnx", cases.images(3))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": 3}, r"found 3 in .* Quantize again with weights=4\."),
        ({"activations": 2}, r"found 2 in .* Quantize again with activations=4\."),
        ({"granularity": "group", "group_size": 2}, r"one per group in .* granularity='channel'\."),
    ],
)
def test_what_the_format_lacks_is_refused(settings, said, tmp_path):
    model = bw.quantize(cases.model("residual"), cases.dataset(), "rtn", scheme=bw.Scheme(**settings))
    with pytest.raises(bw.UsageError, match=said):
        write_encodings(model, tmp_path / "m.onnx", cases.images(3))
    assert not list(tmp_path.iterdir())
