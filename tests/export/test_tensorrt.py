"""TensorRT's file: only what its reader of ONNX takes, equal to the simulation; other runs are refused with advice."""

import cases
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import bitwright as bw
from bitwright.export.tensorrt import check_tensorrt, write_tensorrt
from bitwright.graph.student import insert_quantizers
from bitwright.quant.scheme import Rule, Scheme


def quantized(name="residual", **settings):
    return bw.quantize(cases.model(name), cases.dataset(), recipe="rtn", scheme=Scheme(**settings))


@pytest.mark.parametrize("name", ["residual", "transformer", "squeeze_excite", "transposed"])
def test_the_file_has_int8_without_zero_points_and_float_biases(name, tmp_path):
    model = quantized(name, runtime="tensorrt")
    parity = write_tensorrt(model, tmp_path / "m.onnx", cases.images(6))
    assert parity.passed
    assert parity.worst_layer is not None
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    stored = {i.name: i for i in file.graph.initializer}
    integers = [n.input[0] for n in file.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert integers
    assert {stored[i].data_type for i in integers} == {TensorProto.INT8}
    assert {i.data_type for i in stored.values()} <= {TensorProto.INT8, TensorProto.FLOAT, TensorProto.INT64}
    pairs = [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
    assert pairs
    for node in pairs:
        zero = numpy_helper.to_array(stored[node.input[2]])
        assert zero.dtype == np.int8
        assert not zero.any()


def test_layers_that_give_an_output_stay_float_unless_a_rule_says_otherwise():
    def weights(**settings):
        student = insert_quantizers(cases.prepared("transformer"), Scheme(runtime="tensorrt", **settings))
        return {x.name: x.weight is not None for x in student.layers if x.op == "linear"}

    assert {name for name, quantized in weights().items() if not quantized} == {"head"}
    assert all(weights(rules=(Rule.parse("head=w8"),)).values())


def test_one_side_of_an_addition_is_rounded_and_the_other_comes_from_the_accumulator(tmp_path):
    write_tensorrt(quantized(runtime="tensorrt"), tmp_path / "m.onnx", cases.images(4))
    graph = onnx.load(tmp_path / "m.onnx").graph
    makers = {o: n.op_type for n in graph.node for o in n.output}
    additions = [sorted(makers[i] for i in n.input) for n in graph.node if n.op_type == "Add"]
    assert additions == [["Conv", "DequantizeLinear"]]


def test_other_runs_are_refused_with_the_settings_that_fit():
    with pytest.raises(bw.UsageError, match=r"codes from 0 to 255 and weights of 4 bits.*runtime='tensorrt'\.$"):
        check_tensorrt(quantized(weights=4))
    with pytest.raises(bw.UsageError, match=r"found one weight scale per group\. Quantize again"):
        check_tensorrt(quantized(granularity="group", group_size=2, activations="float"))
    with pytest.raises(bw.UsageError, match=r"tensorrt has weights of 8 bits, found 4.*weights=8"):
        quantized(runtime="tensorrt", weights=4)


def test_codes_of_a_tensor_that_is_never_negative_have_a_sign():
    model = quantized(runtime="tensorrt")
    grids = [m.grid for m in model.graph.modules() if getattr(m, "role", None) == "activation"]
    assert grids
    assert all(g.symmetric for g in grids)
    with torch.no_grad():
        assert torch.isfinite(model(cases.images(2))).all()
