from collections import Counter

import cases
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import bitwright as bw
from bitwright.export.arbiter import compare_codes
from bitwright.export.layers import compare_layers
from bitwright.export.onnx import to_onnx
from bitwright.export.parity import check_parity, export_checked
from bitwright.export.verdict import LayerParity
from bitwright.quant.quantizer import Quantizer
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.session import save_onnx
from bitwright.speed.float_twin import float_twin
from bitwright.speed.kernels import kernels, products


def quantized(name, scheme=None, recipe="mse", **settings):
    scheme = scheme or bw.Scheme(**settings)
    return bw.quantize(cases.model(name), cases.dataset(), recipe=recipe, scheme=scheme)


@pytest.mark.filterwarnings("ignore:.* get 8 bits instead of 4")
@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (3, 4)])
def test_every_case_runs_in_the_runtime_and_equals_the_simulation(name, weights, activations, tmp_path):
    model = quantized(name, weights=weights, activations=activations)
    program = to_onnx(model)
    save_onnx(program, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    parity = check_parity(model, program, cases.images(12))
    assert parity.passed, parity
    assert parity.worst_layer.max_steps <= 1
    assert parity.batch_sizes == (1, 8)


@pytest.mark.parametrize("activations", [2, 3, 5, 6, 7, 16])
def test_every_activation_width_runs(activations):
    model = quantized("residual", weights=4, activations=activations)
    assert check_parity(model, to_onnx(model), cases.images()).passed


@pytest.mark.parametrize("name", ["residual", "transposed", "transformer"])
@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "group", "group_size": 3},
        {"granularity": "group", "group_size": 4, "weights": 8},
        {"granularity": "group", "group_size": 3, "weights": 6},
        {"granularity": "tensor"},
        {"activation_grid": "symmetric"},
        {"runtime": "generic"},
        {"outputs": True},
        {"activations": "float"},
        {"weights": "float"},
    ],
)
def test_every_scheme_runs(name, settings):
    model = quantized(name, bw.Scheme(**{"weights": 4, **settings}))
    assert check_parity(model, to_onnx(model), cases.images()).passed


def test_weights_are_stored_as_integers_of_their_width():
    for bits, kind in (
        (2, ir.DataType.INT2),
        (3, ir.DataType.INT4),
        (4, ir.DataType.INT4),
        (5, ir.DataType.INT8),
        (8, ir.DataType.INT8),
    ):
        program = to_onnx(quantized("residual", weights=bits))
        stored = [v for k, v in program.graph.initializers.items() if k.endswith("/integers") and "weight" in k]
        assert stored
        assert {v.dtype for v in stored} == {kind}
        floats = [v for v in program.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        assert max(v.const_value.size for v in floats) <= 16  # scales only


def test_eight_bits_become_integer_kernels(tmp_path):
    import onnxruntime

    save_onnx(to_onnx(quantized("residual", weights=8)), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "fused.onnx").graph.node)
    convolutions = sum(n.op_type == "Conv" for n in to_onnx(quantized("residual")).graph)
    assert operators["QLinearConv"] == convolutions
    assert operators["Conv"] == 0
    assert operators["QLinearAdd"] == 1


@pytest.mark.parametrize("weights", [8, 4])
def test_a_bias_that_two_layers_share(weights):
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))
            return self.head(y) + self.head(torch.relu(y))

    model = bw.quantize(Shared(), cases.dataset(), "mse", weights=weights)
    parity = check_parity(model, to_onnx(model), cases.images(12))
    assert parity.passed
    assert parity.optimized.mean_abs <= 5e-3 * parity.optimized.range


def test_the_batch_size_is_free():
    model = quantized("transformer")
    with session(to_onnx(model), optimize=True) as runtime:
        for count in (1, 3, 7):
            (scores,) = runtime.run(None, {"images": cases.images(count).numpy()})
            assert scores.shape[0] == count


def test_outputs_carry_the_names_of_the_model():
    program = to_onnx(quantized("dict_output"))
    assert [v.name for v in program.graph.outputs] == list(cases.prepared("dict_output").outputs)


def test_stored_tensors_may_have_the_names_of_the_exporters_own_values():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            for k in range(3, 43):
                self.register_buffer(f"val_{k}", torch.arange(4).reshape(4, 1, 1) == k)

        def forward(self, x):
            y = self.conv(x)
            for k in range(3, 43):
                y = y.masked_fill(getattr(self, f"val_{k}"), 1.0)
            y = y + (y > 0).to(torch.int64).float()  # which the one pass leaves to the whole exporter
            z = y.flatten(2)
            return z + z.mean(1, keepdim=True).expand(-1, 4, -1)  # whose sizes are folded into a value of that name

    model = bw.quantize(Named(), cases.dataset(), "mse")
    assert check_parity(model, to_onnx(model), cases.images(12)).passed


def first_weight(model):
    return next(m for m in model.graph.modules() if isinstance(m, Quantizer) and m.role == "weight")


def test_a_wrong_scale_in_the_file_is_found_and_named(tmp_path):
    model = quantized("residual", weights=8)
    program = to_onnx(model)
    name = next(k for k in program.graph.initializers if k.endswith("/scale") and "weight" in k)
    wrong = program.graph.initializers[name]
    wrong.const_value = ir.Tensor(wrong.const_value.numpy() * np.float32(1.05))
    parity = check_parity(model, program, cases.images())
    assert not parity.passed
    layers = {layer.name: layer for layer in compare_layers(model, program, cases.images())}
    assert layers[parity.first_divergence].differing_fraction > 1e-3
    assert sum(layer.differing_fraction > 1e-3 for layer in layers.values()) == 1  # each layer has the right input


def test_a_file_that_fails_is_not_written_unless_forced(tmp_path, monkeypatch):
    from bitwright.export import parity

    model = quantized("conv_bn_relu6")
    honest = parity.to_onnx

    def broken(m):
        program = honest(m)
        key = next(k for k in program.graph.initializers if k.endswith("/integers") and "weight" in k)
        value = program.graph.initializers[key]
        value.const_value = ir.Tensor(np.zeros_like(value.const_value.numpy()))
        return program

    monkeypatch.setattr(parity, "to_onnx", broken)
    with pytest.raises(bw.ParityError, match="first to differ"):
        export_checked(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert not export_checked(model, tmp_path / "m.onnx", force=True).passed
    assert (tmp_path / "m.onnx").exists()


def test_the_check_needs_images(tmp_path):
    model = quantized("conv1d")
    model.save(tmp_path / "run")
    with pytest.raises(bw.UsageError, match="images="):
        bw.load(tmp_path / "run").export(tmp_path / "m.onnx")


def test_a_loaded_model_exports_the_same_file(tmp_path):
    model = quantized("squeeze_excite", weights=4)
    model.save(tmp_path / "run")
    loaded = bw.load(tmp_path / "run")
    for name, made in (("a", model), ("b", loaded)):
        made.result = {}
        save_onnx(to_onnx(made), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_exporting_leaves_the_model_alone():
    model = quantized("residual")
    before = model.flat(cases.images())[0]
    to_onnx(model)
    assert torch.equal(before, model.flat(cases.images())[0])


@pytest.mark.parametrize(
    ("differing", "steps", "values", "diverges"),
    [(0, 0, 9, False), (1, 1, 9, False), (2, 1, 9, True), (1, 2, 9, True), (9, 1, 9000, False), (10, 1, 9000, True)],
)
def test_a_layer_diverges_with_more_than_one_code_in_a_thousand_or_step(
    differing: int, steps: int, values: int, diverges: bool
) -> None:
    assert LayerParity("layer", differing / values, steps, values).diverges is diverges


@pytest.mark.parametrize("rules", [[], [bw.Rule(pattern="*", weights="float")]])
@pytest.mark.parametrize("name", ["residual", "conv1d", "transposed", "called_twice"])
def test_a_float_weight_between_codes_stays_float_in_the_runtime(name, rules, tmp_path):
    """ONNX Runtime would round it to 8 bits, which shows in the products that it runs and in the codes behind them."""
    scheme = bw.Scheme(weights=8 if rules else None, activations=8, rules=tuple(rules))
    model = quantized(name, scheme)
    program = to_onnx(model)
    save_onnx(program, tmp_path / "a.onnx")
    assert products(kernels(tmp_path / "a.onnx"))["integer"] == 0
    for layer in compare_codes(model, program, cases.images(16), "onnxruntime"):
        assert not layer.simulation_runtime.beyond(layer.count), layer.name
    assert not [n for n in float_twin(program).graph if n.op_type == "Clip"]
