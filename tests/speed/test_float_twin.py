"""The float twin of a file against the simulation with its activation quantizers taken out."""

from __future__ import annotations

import cases
import numpy as np
import onnxruntime
import pytest
import torch

import bitwright as bw
from bitwright.errors import UsageError
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import session
from bitwright.graph.student import insert_quantizers
from bitwright.quant.quantizer import Frozen, Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.runtimes.session import save_onnx
from bitwright.speed.float_twin import dequantize_linear, float_twin
from bitwright.speed.kernels import kernels, products
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate


def quantized(name, **bits):
    return bw.quantize(cases.model(name), cases.dataset(), recipe="mse", **bits)


def without_activation_quantizers(model, x):
    for module in model.freeze().graph.modules():
        if isinstance(module, Quantizer) and module.role == "activation":
            module.forward = lambda value: value
    with torch.no_grad():
        return model.flat(x)


def in_runtime(program, x):
    with session(program, optimize=False) as runtime:
        return runtime.run(None, {"images": x.numpy()})


def spread_channels(model):
    """Scales of channels, as FQ-ViT has them, on the first sum, which no linear layer reads."""
    read = {x.source for x in model.layers}
    layer = next(x for x in model.layers if x.op == "add" and x.activation not in read)
    quantizer = model.quantizer(layer.activation)
    quantizer.set_range(quantizer.scale * 2.0 ** (torch.arange(8) % 3), quantizer.zero_point)
    return model


@pytest.mark.parametrize(
    ("name", "bits"),
    [("residual", {"weights": 4, "activations": 6}), pytest.param("transformer", {}, marks=pytest.mark.slow)],
)
def test_twin_computes_the_network_without_activation_quantizers(name, bits):
    model = quantized(name, **bits)
    if name == "transformer":
        spread_channels(model)
    program = to_onnx(model)
    before = [n.op_type for n in program.graph]
    twin = float_twin(program)
    x = cases.images(3, seed=5)
    found = in_runtime(twin, x)
    expected = without_activation_quantizers(model, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)
    assert not {"QuantizeLinear", "DequantizeLinear", "Clip"} & {n.op_type for n in twin.graph}
    assert [n.op_type for n in program.graph] == before


def test_twin_and_file_are_computed_in_float_and_in_integers(tmp_path):
    program = to_onnx(quantized("conv_bn_relu6"))
    for name, file in (("q", program), ("f", float_twin(program))):
        save_onnx(file, tmp_path / name)
    assert products(kernels(tmp_path / "q")) == {"integer": 2, "float": 0}
    assert products(kernels(tmp_path / "f")) == {"integer": 0, "float": 2}


def test_a_quantized_output_is_float_in_the_twin():
    model = insert_quantizers(cases.prepared("conv_bn_relu6"), Scheme(outputs=True))
    model = Calibrate().run(model, model.teacher, cases.dataset(), Run())
    program = to_onnx(model)
    assert program.graph.outputs[0].producer().op_type == "DequantizeLinear"
    twin = float_twin(program)
    x = cases.images(3, seed=5)
    expected = without_activation_quantizers(model, x)[0].numpy()
    np.testing.assert_allclose(in_runtime(twin, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_another_kind_is_refused():
    program = to_onnx(quantized("conv_bn_relu6"))
    program.graph.outputs.append(next(n for n in program.graph if n.op_type == "QuantizeLinear").outputs[0])
    with pytest.raises(UsageError, match="found a QuantizeLinear in it"):
        float_twin(program)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 2), (1, 3)])
def test_dequantization_agrees_with_onnx(axis, block):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    codes = generator.integers(-128, 127, (4, 6), dtype=np.int8)
    shape = [-(-d // block) if block and i == axis else d for i, d in enumerate(codes.shape)]
    shape = shape if block else [codes.shape[axis]]
    scale = generator.random(shape, dtype=np.float32) + 0.1
    zero = generator.integers(-5, 5, shape, dtype=np.int8)
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    node = helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], **attributes)
    stored = [numpy_helper.from_array(a, n) for a, n in ((codes, "c"), (scale, "s"), (zero, "z"))]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)
    graph = helper.make_graph([node], "g", [], [output], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert onnx.checker.check_model(model) is None
    np.testing.assert_array_equal(dequantize_linear(codes, scale, zero, axis, block), runtime.run(None, {})[0])


def test_frozen_weights_are_what_the_twin_holds():
    model = quantized("residual", weights=3)
    twin = float_twin(to_onnx(model))
    stored = {v.name: v.const_value.numpy() for v in twin.graph.initializers.values()}
    frozen = [m for m in model.graph.modules() if isinstance(m, Frozen) and m.codes.dim() == 4]
    for module in frozen:
        assert any(a.shape == module.codes.shape and np.array_equal(a, module().numpy()) for a in stored.values())
