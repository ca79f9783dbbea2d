import dataclasses

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

import bitwright as bw
from bitwright.export.arbiter import CutRuntime, compare_codes, simulated_codes
from bitwright.export.layers import activation_quantizers
from bitwright.export.onnx import to_onnx
from bitwright.export.reference import run_reference
from bitwright.graph.student import insert_quantizers
from bitwright.quant.quantizer import BiasQuantizer, Frozen
from bitwright.runtimes import rules
from bitwright.runtimes.rules import Codes, KernelGrid


class Branches(nn.Module):
    """Two convolutions and what joins them."""

    def __init__(self, join, after=None):
        super().__init__()
        self.a, self.b, self.join, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), join, after
        self.last = nn.LazyConv2d(2, 1)

    def forward(self, x):
        y = self.join(self.a(x), self.b(x))
        return self.last(y if self.after is None else self.after(y)).mean((2, 3))


class Tokens(nn.Module):
    """Products of activations, an operator, a linear operator over tokens."""

    def __init__(self, operator):
        super().__init__()
        self.conv, self.fc, self.operator = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 12), operator
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.operator(self.fc(self.conv(x).flatten(2).transpose(1, 2)))
        return self.head((x @ x.transpose(1, 2) @ x).mean(1))


def one(operator):
    return Branches(lambda a, b: operator(a) + b)


NETWORKS = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 4, 3, dilation=2, padding=2)),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, groups=3), nn.Conv2d(6, 6, 5, 1, 2, groups=6)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 5), nn.Sigmoid()),
    "add": lambda: Branches(torch.add),
    "add_relu": lambda: Branches(torch.add, nn.ReLU()),
    "mul": lambda: Branches(torch.mul),
    "gate": lambda: Branches(lambda a, b: a * torch.sigmoid(b.mean((2, 3), keepdim=True))),
    "concat": lambda: Branches(lambda a, b: torch.cat([a, b], 1)),
    "average_pool": lambda: one(lambda a: F.interpolate(F.avg_pool2d(a, 2), scale_factor=2)),
    "max_pool": lambda: one(lambda a: F.max_pool2d(a, 3, 1, 1)),
    "nearest": lambda: one(lambda a: F.interpolate(a[:, :, ::2, ::2], scale_factor=2, mode="nearest")),
    "bilinear": lambda: one(lambda a: F.interpolate(a[:, :, ::2, ::2], size=(8, 8), mode="bilinear")),
    "pad": lambda: one(lambda a: F.pad(a[:, :, 1:, 1:], (1, 0, 1, 0))),
    "silu": lambda: one(F.silu),
    "hardswish": lambda: one(F.hardswish),
    "leaky_relu": lambda: one(lambda a: F.leaky_relu(a, 0.1)),
    "softmax": lambda: Tokens(lambda x: x.softmax(-1)),
    "gelu": lambda: Tokens(F.gelu),
    "layer_norm": lambda: Tokens(nn.LayerNorm(12)),
}
EXACT = {"conv", "pointwise", "depthwise", "grouped", "linear", "add", "add_relu", "mul", "concat", "max_pool", "pad"}
"""Those whose codes come from integer kernels alone."""


QUICK = {"conv", "depthwise", "transposed", "linear", "add_relu", "mul", "average_pool", "layer_norm"}
QUICK_CASES = {"residual", "transformer"}


def some(names, quick):
    """The quick ones in every run of the tests, the others where slow tests run."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def quantized(name, **settings):
    torch.manual_seed(0)
    network = NETWORKS[name]() if name in NETWORKS else cases.model(name)
    network(cases.images(2))
    return bw.quantize(network.eval(), cases.dataset(), "mse", **settings)


def random_codes(model, count, seed=0):
    """Codes that no network gave, in the shapes that it gives: every layer meets its whole grid."""
    generator = torch.Generator().manual_seed(seed)
    quantizers = activation_quantizers(model)
    return {
        name: torch.randint(
            quantizers[name].grid.qmin, quantizers[name].grid.qmax + 1, x.shape, generator=generator, dtype=torch.int32
        )
        for name, x in simulated_codes(model, cases.images(count)).items()
    }


def against_runtime(model, count=24):
    """Codes of reference and runtime on random codes, and the kernels of both."""
    codes, images = random_codes(model, count), cases.images(count)
    reference = run_reference(model, images, feed=codes).layers
    with CutRuntime(model, to_onnx(model)) as cut:
        return reference, cut.run(codes, images), cut.kernels


@pytest.mark.parametrize("name", some(NETWORKS, QUICK))
def test_random_codes_give_the_codes_of_the_runtime(name):
    reference, found, kernels = against_runtime(quantized(name))
    assert found
    total = differing = 0
    for layer, codes in found.items():
        steps = (reference[layer].codes - codes).abs()
        assert int(steps.max()) <= 1, layer
        total, differing = total + steps.numel(), differing + int(torch.count_nonzero(steps))
        kernel = kernels.get(layer, "")
        if kernel.startswith("QLinear") and kernel != "QLinearSoftmax":  # that one has exponentials of its own
            assert torch.equal(reference[layer].codes, codes), (layer, kernel)
    allowed = 0 if name in EXACT else 0.01 if name == "softmax" else 1e-3
    assert differing <= allowed * total, f"{differing} of {total}"


@pytest.mark.parametrize("settings", [{"weights": 4}, {"activations": 6}])
def test_other_widths_too(settings):
    reference, found, _ = against_runtime(quantized("add_relu", **settings))
    for layer, codes in found.items():
        steps = (reference[layer].codes - codes).abs()
        assert int(steps.max()) <= 1
        assert float((steps > 0).double().mean()) <= 1e-3, layer


@pytest.mark.parametrize("name", some(["add", "mul", "depthwise", "conv"], {"add"}))
def test_signed_activations_are_shifted_as_in_the_file(name):
    scheme = bw.Scheme(activation_grid="symmetric")
    torch.manual_seed(0)
    network = NETWORKS[name]()
    network(cases.images(2))
    model = bw.quantize(network.eval(), cases.dataset(), "mse", scheme=scheme)
    reference, found, _ = against_runtime(model)
    for layer, codes in found.items():
        assert torch.equal(reference[layer].codes, codes), layer


def test_a_clamp_inside_the_grid_is_one_of_codes():
    model = quantized("pointwise")
    name, quantizer = next((n, q) for n, q in activation_quantizers(model).items() if q.name == "1")
    quantizer.set_range(2 * quantizer.scale, torch.tensor(40))
    reference, found, kernels = against_runtime(model)
    assert kernels[name] == reference[name].kernel == "QLinearConv"
    assert int(reference[name].codes.min()) == 40
    assert torch.equal(reference[name].codes, found[name])


def run_onnx(operator, inputs, domain="com.microsoft"):
    """One operator of ONNX Runtime, called directly."""
    import onnxruntime

    names = [f"input{i}" for i in range(len(inputs))]
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(operator, names, ["out"], domain=domain)
    graph = helper.make_graph([node], "one", given, [helper.make_tensor_value_info("out", TensorProto.UINT8, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def every_pair():
    a, b = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


@pytest.mark.parametrize(("operator", "rule"), [("QLinearAdd", rules.add), ("QLinearMul", rules.multiply)])
def test_every_pair_of_codes(operator, rule):
    generator = np.random.default_rng(0)
    a, b = every_pair()
    for _ in range(100):
        step_a, step_b = (np.float32(generator.uniform(0.002, 0.05)) for _ in range(2))
        step = np.float32((step_a + step_b) * 0.7 if operator == "QLinearAdd" else step_a * step_b * 60)
        zeros = [np.uint8(z) for z in generator.integers(0, 256, 3)]
        found = run_onnx(
            operator,
            [
                a,
                np.array(step_a),
                np.array(zeros[0]),
                b,
                np.array(step_b),
                np.array(zeros[1]),
                np.array(step),
                np.array(zeros[2]),
            ],
        )
        left, right = (
            Codes(torch.from_numpy(x).double(), torch.tensor(s), torch.tensor(float(z)))
            for x, s, z in ((a, step_a, zeros[0]), (b, step_b, zeros[1]))
        )
        ours = rule(left, right, KernelGrid(torch.tensor(step), torch.tensor(float(zeros[2])), 0, 255))
        assert np.array_equal(ours.numpy(), found)


def test_every_product_of_codes_near_ties():
    """Ratios of about one tenth, so that a last bit decides every tenth sum."""
    generator = np.random.default_rng(0)
    a, b = np.arange(256, dtype=np.uint8).reshape(-1, 1), np.arange(-128, 128, dtype=np.int8).reshape(1, -1)
    for _ in range(20):
        step_a, step_b = (np.float32(generator.uniform(0.002, 0.05)) for _ in range(2))
        step, zero_a, zero = np.float32(step_a * step_b * 10), *(np.uint8(z) for z in generator.integers(0, 256, 2))
        scales = [np.array(x) for x in (step_a, step_b, step)]
        zeros = [np.array(zero_a), np.array(np.int8(0)), np.array(zero)]
        inputs = [a, scales[0], zeros[0], b, scales[1], zeros[1], scales[2], zeros[2]]
        found = run_onnx("QLinearMatMul", inputs, domain="")
        sums = torch.from_numpy((a.astype(np.float64) - zero_a) * b)
        grid = KernelGrid(torch.tensor(step), torch.tensor(float(zero)), 0, 255)
        assert np.array_equal(rules.requantize(sums, torch.tensor(step_a * step_b), grid).numpy(), found)


# ------------------------------------------------------------------------------------ loops over single numbers


def parts(model, layer):
    """Integers of one layer: input quantizer, weight codes and step, bias codes, output quantizer."""
    graph = model.graph.graph
    node = next(n for n in graph.nodes if n.meta.get("layer") == layer and n.op == "call_function")
    at = {n.name: n for n in graph.nodes}
    source = at[node.args[0].name]
    while source.op != "call_module":
        source = source.args[0]
    weight, bias = (model.graph.get_submodule(str(a.target)) for a in node.args[1:3])
    end = next(iter(node.users))
    while end.op != "call_module":
        end = next(iter(end.users))
    get = lambda n: model.graph.get_submodule(str(n.target))  # noqa: E731
    return source, get(source), weight, bias, end, get(end)


def requantized(total, step, quantizer):
    """One accumulator to its code, in Python integers and single float32 numbers."""
    scaled = np.float32(total) * np.float32(step / np.float32(quantizer.scale.item()))
    rounded = round(float(scaled))  # Python rounds half to even
    return min(max(rounded + int(quantizer.zero_point), quantizer.grid.qmin), quantizer.grid.qmax)


@pytest.mark.parametrize(
    ("make", "stride", "padding", "groups"),
    [
        (lambda: nn.Conv2d(3, 4, 3, 2, 1), 2, 1, 1),
        (lambda: nn.Conv2d(3, 6, 3, 1, 2, groups=3), 1, 2, 3),
    ],
)
def test_a_convolution_equals_loops_over_integers(make, stride, padding, groups):
    torch.manual_seed(1)
    model = bw.quantize(
        nn.Sequential(make(), nn.ReLU(), nn.Flatten(1, 2)).eval(),
        cases.dataset(),
        "mse",
        scheme=bw.Scheme(outputs=True),
    )
    images = cases.images(1)
    source, grid, weight, bias, end, output = parts(model, "0")
    found = run_reference(model, images)
    x = found.layers[source.name].codes[0].numpy() - int(grid.zero_point)
    w, b = weight.codes.numpy(), bias.codes.numpy()
    steps = (grid.scale * weight.quantizer.scale).numpy()
    count, size = w.shape[0], (8 + 2 * padding - 3) // stride + 1
    codes = found.layers[end.name].codes.reshape(count, size, size)
    for o in range(count):
        first = o // (count // groups) * w.shape[1]
        for i in range(size):
            for j in range(size):
                total = int(b[o])
                for c in range(w.shape[1]):
                    for u in range(3):
                        for v in range(3):
                            row, column = i * stride + u - padding, j * stride + v - padding
                            if 0 <= row < 8 and 0 <= column < 8:
                                total += int(x[first + c, row, column]) * int(w[o, c, u, v])
                assert requantized(total, steps[o], output) == int(codes[o, i, j])


def test_a_transposed_convolution_equals_loops_over_integers():
    torch.manual_seed(1)
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1)).eval()
    model = bw.quantize(network, cases.dataset(), "mse", scheme=bw.Scheme(outputs=True))
    source, grid, weight, bias, end, output = parts(model, "0")
    found = run_reference(model, cases.images(1))
    x = found.layers[source.name].codes[0].numpy() - int(grid.zero_point)
    steps = (grid.scale * weight.quantizer.scale).double().numpy()
    sums = np.zeros((4, 19, 19), dtype=np.int64)
    for c, i, j in np.ndindex(3, 8, 8):
        for o, u, v in np.ndindex(4, 3, 3):
            sums[o, 2 * i + u, 2 * j + v] += int(x[c, i, j]) * int(weight.codes[c, o, u, v])
    sums = sums[:, 1:16, 1:16] + bias.codes.numpy()[:, None, None]
    values = (sums * steps.reshape(-1, 1, 1)).astype(np.float32)  # no integer kernel: a float in between
    codes = np.clip(np.rint(values / np.float32(output.scale.item())) + int(output.zero_point), 0, 255)
    assert np.array_equal(codes, found.layers[end.name].codes[0].numpy())


def test_a_linear_operator_equals_loops_over_integers():
    model = quantized("linear")
    source, grid, weight, bias, end, output = parts(model, "1")
    found = run_reference(model, cases.images(3))
    x = found.layers[source.name].codes.flatten(1).tolist()
    zero, steps = int(grid.zero_point), (grid.scale * weight.quantizer.scale).numpy()
    for row, codes in zip(x, found.layers[end.name].codes.tolist(), strict=True):
        for o, code in enumerate(codes):
            total = sum((a - zero) * int(b) for a, b in zip(row, weight.codes[o], strict=True)) + int(bias.codes[o])
            assert requantized(total, steps[o], output) == code


# --------------------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", some(cases.CASES, QUICK_CASES))
def test_every_case_stays_next_to_simulation_and_runtime(name):
    model = quantized(name)
    images = cases.images(6)
    for row in compare_codes(model, to_onnx(model), images, "onnxruntime"):
        pairs = [row.simulation_reference, row.reference_runtime]
        for difference in pairs:
            assert difference.max_steps <= 1, row
            assert difference.differing <= max(1, 1e-3 * row.count), row


@pytest.mark.parametrize("runtime", ["onnxruntime", "generic"])
@pytest.mark.parametrize("name", some(["residual", "transformer", "squeeze_excite"], {"transformer"}))
def test_outputs_are_those_of_the_simulation(name, runtime):
    model = quantized(name, runtime=runtime)
    codes = simulated_codes(model, cases.images())
    found = run_reference(model, cases.images(), runtime, feed=codes)
    for ours, theirs in zip(found.outputs, model.flat(cases.images()), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"weights": 4, "granularity": "group", "group_size": 3}, {"activations": "float"}]
)
def test_weights_with_several_scales_and_float_activations(settings):
    model = quantized("transposed", scheme=bw.Scheme(**settings))
    codes = simulated_codes(model, cases.images())
    found = run_reference(model, cases.images(), feed=codes)
    for name, layer in found.layers.items():
        assert float((layer.codes != codes[name]).double().mean()) <= 1e-3, name
    torch.testing.assert_close(found.outputs[0], model.flat(cases.images())[0], rtol=1e-5, atol=1e-5)


def check_zoo(name, count):
    """Every integer kernel's codes equal the reference's; float operators tip a few values."""
    model = bw.quantize(f"zoo:{name}", "zoo:fashion[:8]", "rtn")
    images = bw.data.load_images(f"zoo:fashion-test[:{count}]", model.preprocessing).batch(range(count))
    rows = compare_codes(model, to_onnx(model), images, "onnxruntime")
    integer = [r for r in rows if r.found.startswith("QLinear")]
    assert len(integer) > 4
    for row in integer:
        assert row.reference_runtime.differing == 0, row
    for row in rows:
        if row.kernel != row.found:  # tables and products that end in float
            assert row.kernel == "float", row
            assert row.found in {"QLinearSigmoid", "MatMulIntegerToFloat"}, row
        assert row.reference_runtime.max_steps <= 1
        assert row.reference_runtime.differing <= 1e-4 * row.count
        assert row.simulation_reference.differing <= 1e-3 * row.count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_vit"])
def test_the_zoo_in_every_code_of_every_integer_kernel(name):
    check_zoo(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_vit"])
def test_the_zoo_on_more_images(name):
    check_zoo(name, 64)


# ---------------------------------------------------------------------------------------------- what is noticed


def differing(model, program, images):
    return sum(r.reference_runtime.differing for r in compare_codes(model, program, images, "onnxruntime"))


def test_a_bias_off_by_one_is_seen():
    model = quantized("residual")
    program, images = to_onnx(model), cases.images(8)
    assert differing(model, program, images) == 0
    frozen = next(m for m in model.graph.modules() if isinstance(m, Frozen) and isinstance(m.quantizer, BiasQuantizer))
    frozen.codes += 1
    assert differing(model, program, images) > 0


def test_rounding_half_up_is_seen(monkeypatch):
    def half_up(sums, step, grid):
        scaled = sums.float() * (step / grid.scale)
        return (torch.floor(scaled + 0.5).double() + grid.zero_point.double()).clamp(grid.low, grid.high)

    model = quantized("conv")
    for module in model.graph.modules():  # powers of two, so that there are ties
        if hasattr(module, "scale") and hasattr(module, "grid"):
            module.scale = torch.exp2(torch.log2(module.scale).round())
    program, images = to_onnx(model), cases.images(8)
    assert differing(model, program, images) == 0
    monkeypatch.setattr(rules, "requantize", half_up)
    assert differing(model, program, images) > 0


def test_sums_beyond_float32_stay_exact():
    grid = KernelGrid(torch.tensor(1.0), torch.tensor(0.0), -(2**31), 2**31)
    sums = torch.tensor([2.0**24 + 1], dtype=torch.float64)
    assert float(rules.quantize_linear(sums, dataclasses.replace(grid))) == 2.0**24 + 1
    assert float(rules.requantize(sums, torch.tensor(1.0), grid)) == 2.0**24  # the kernel's float32 does not hold it


@pytest.mark.slow
def test_a_kernel_that_quantizes_activations_by_itself_is_named_and_avoided(monkeypatch):
    """A linear operator behind a roll: ONNX Runtime joins weight and product into MatMulNBits."""
    model, images = quantized("shifted_window"), cases.images(8)

    def row():
        return next(r for r in compare_codes(model, to_onnx(model), images, "onnxruntime") if r.name == "qkv")

    assert row().found == "MatMulIntegerToFloat"
    assert not row().simulation_runtime.beyond(row().count)
    monkeypatch.setattr("bitwright.export.forms.code_product", lambda graph, node, shielded: None)
    assert row().found == "MatMulNBits"
    assert row().reference_runtime.beyond(row().count)
    assert not row().simulation_reference.beyond(row().count)


def test_what_cannot_be_referred_to():
    with pytest.raises(bw.UsageError, match="onnxruntime, generic"):
        run_reference(quantized("residual"), cases.images(1), "tensorrt")
    model = insert_quantizers(cases.prepared("residual"), bw.Scheme())
    for quantizer in activation_quantizers(model).values():
        quantizer.set_range(torch.tensor(0.1))
    with pytest.raises(bw.UsageError, match="freeze"):
        run_reference(model, cases.images(1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_any_bits_are_exact_in_the_kernels_of_eight(bits):
    """Narrow codes are shifted when the file is loaded; biases lie on the finer grid that the kernel then sees."""
    model = quantized("residual", weights=bits, activations=8)
    reference, found, kernels = against_runtime(model)
    exact = [layer for layer, codes in found.items() if torch.equal(reference[layer].codes, codes)]
    integer = {layer for layer in found if kernels.get(layer) == "QLinearConv"}
    assert integer
    assert integer <= set(exact)
    steps = [
        m.quantizer for m in model.graph.modules() if isinstance(m, Frozen) and isinstance(m.quantizer, BiasQuantizer)
    ]
    assert all(torch.equal(q.scale, q.source.scale * q.weight.scale / 2 ** max(7 - bits, 0)) for q in steps)
    assert steps
