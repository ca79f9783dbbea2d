"""Clamping on codes: equal to clamping floats, integer kernels before it, and the float twin clamps again."""

import itertools
import math
from collections import Counter

import cases
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.export.arbiter import CutRuntime, simulated_codes
from bitwright.export.clips import NOTE, Clamp, Span, bounds, clamp_before
from bitwright.export.layers import activation_quantizers, compare_layers
from bitwright.export.onnx import to_onnx
from bitwright.export.reference import run_reference
from bitwright.quant.scheme import Scheme
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.session import save_onnx
from bitwright.speed.float_twin import float_twin
from bitwright.speed.kernels import kernels, products

INF = math.inf


class Clamped(nn.Module):
    """Three convolutions and a linear operator, each with a clamping activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.linear, self.head = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = nn.functional.hardtanh(self.stem(x), -0.4, 0.3)
        x = nn.functional.relu6(8 * self.middle(x) + 2)
        x = self.last(x).clamp_min(-0.1)
        return self.head(self.linear(x.flatten(1)).clamp(max=0.2))


def clamped(wide=None, **settings):
    """Quantized; ``wide`` stretches the range of every clamped layer, so that clamps lie inside of it."""
    torch.manual_seed(3)
    model = bw.quantize(Clamped().eval(), cases.dataset(), "mse", scheme=bw.Scheme(**settings))
    if wide:
        for quantizer in activation_quantizers(model).values():
            middle = 0 if quantizer.grid.symmetric else (quantizer.grid.qmax + 1) // 3
            quantizer.set_range(wide * quantizer.scale, torch.tensor(float(middle)))
    return model


def by_hand(x, quantizer, clamp):
    """Codes of floats in numpy: clamp, divide, round half to even, shift, saturate."""
    steps = np.rint(np.clip(x, *clamp).astype(np.float32) / np.float32(quantizer.scale.item()))
    return np.clip(steps + int(quantizer.zero_point), quantizer.grid.qmin, quantizer.grid.qmax)


def test_clipping_codes_is_clipping_floats():
    generator = np.random.default_rng(0)
    for _ in range(300):
        scale = np.float32(generator.uniform(0.01, 1))
        low, high = sorted(generator.integers(0, 256, 2))
        span = Span(scale, int(generator.integers(0, 256)), int(low), int(high))
        a, b = sorted(generator.choice([-INF, INF, *(generator.normal(size=4) * 60)], 2, replace=False))
        x = np.concatenate([generator.normal(size=200) * 80, (np.arange(-300, 300) + 0.5) * scale]).astype(np.float32)
        codes = lambda v: np.clip(np.rint(v.astype(np.float32) / scale) + span.zero, low, high)  # noqa: E731, B023
        left = span.within(Clamp(a, b))
        clipped = np.clip(np.clip(np.rint(x / scale) + span.zero, 0, 255), left.low, left.high)
        assert np.array_equal(codes(np.clip(x, np.float32(a), np.float32(b))), clipped)


def test_two_clamps_are_one():
    x = np.linspace(-9, 9, 181)
    ends = (-INF, -6.0, 0.0, 1.0, 6.0, INF)
    for (a, b), (c, d) in itertools.product(itertools.combinations(ends, 2), repeat=2):
        both = Clamp(c, d).after(Clamp(a, b))
        assert np.array_equal(np.clip(np.clip(x, a, b), c, d), np.clip(x, both.low, both.high))


@pytest.mark.parametrize(
    ("settings", "wide"),
    [({"activations": 8}, 2.5), ({"activations": 5}, None), ({"activations": 6, "activation_grid": "symmetric"}, 1.5)],
)
def test_clamped_layers_are_integer_kernels_and_give_the_codes_of_floats(settings, wide, tmp_path):
    model = clamped(wide, **settings)
    program, images = to_onnx(model), cases.images(6)
    save_onnx(program, tmp_path / "m.onnx")
    assert products(kernels(tmp_path / "m.onnx")) == {"integer": 5, "float": 0}
    simulated = simulated_codes(model, images)
    reference = run_reference(model, images, feed=simulated).layers
    with CutRuntime(model, program) as cut:
        found = cut.run(simulated, images)
    assert set(found) == set(simulated) == set(reference)
    for name, codes in found.items():
        assert int((codes - simulated[name]).abs().max()) <= 1, name  # summation in float32
        if reference[name].kernel != "float":
            assert torch.equal(codes, reference[name].codes), name
    assert {reference[n].kernel for n in found} >= {"QLinearConv", "QGemm"}
    plain = compare_layers(model, program, images)
    assert all(layer.max_steps <= 1 and layer.differing_fraction <= 1e-3 for layer in plain)


def test_codes_of_a_clamp_inside_the_range_by_hand():
    model = clamped(2.5)
    quantizers, images = activation_quantizers(model), cases.images(6)
    codes = simulated_codes(model, images)
    names = list(codes)
    first, second = names[:2]
    x = quantizers[first].scale * (codes[first] - quantizers[first].zero_point)
    weight, bias = (model.graph.get_submodule(f"{n}")() for n in frozen_names(model, "stem"))
    sums = torch.conv2d(x.double(), weight.double(), bias.double(), 2, 1).numpy()
    expected = by_hand(sums, quantizers[second], (-0.4, 0.3))
    with CutRuntime(model, to_onnx(model)) as cut:
        found = cut.run(codes, images)[second].numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 2e-3
    assert (found.min(), found.max()) == (expected.min(), expected.max())
    assert found.max() < quantizers[second].grid.qmax  # the clamp's bounds, not the grid's
    assert found.min() > quantizers[second].grid.qmin


def frozen_names(model, layer):
    node = next(n for n in model.graph.graph.nodes if n.op == "call_function" and n.meta.get("layer") == layer)
    return [str(a.target) for a in node.args[1:3]]


def test_the_twin_has_the_clamps_of_the_network():
    model = clamped(2.5)
    twin = float_twin(to_onnx(model))
    found = Counter((c.low, c.high) for n in twin.graph if (c := bounds(n)) is not None)
    expected = Counter([(-0.4, 0.3), (0.0, 6.0), (-0.1, INF), (-INF, 0.2)])
    near = lambda c: Counter({tuple(round(b, 5) for b in k): v for k, v in c.items()})  # noqa: E731
    assert near(found) == near(expected)
    for quantizer in activation_quantizers(model).values():
        quantizer.forward = lambda x: x
    with torch.no_grad():
        expected = model.flat(cases.images())[0].numpy()
    with session(twin, optimize=False) as runtime:
        (outputs,) = runtime.run(None, {"images": cases.images().numpy()})
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_a_clamp_that_covers_the_type_leaves_nothing_behind():
    program = to_onnx(bw.quantize(cases.model("residual"), cases.dataset(), "mse"))
    assert not {"Relu", "Clip"} & {n.op_type for n in program.graph}
    assert [n.op_type for n in float_twin(program).graph].count("Relu") == 2
    assert sum(NOTE in n.metadata_props for n in program.graph) == 2


def relu(*, readers, is_output=False):
    """``Relu -> QuantizeLinear``, and what else reads the clamp."""
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    clamp = ir.node("Relu", [given])
    ends = [ir.node("Identity", [clamp.outputs[0]]) for _ in range(readers)]
    results = [e.outputs[0] for e in ends] + ([clamp.outputs[0]] if is_output else [])
    return given, clamp.outputs[0], ir.Graph([given], results, nodes=[clamp, *ends], opset_imports={"": 18})


def test_a_clamp_that_something_else_reads_stays():
    given, value, graph = relu(readers=1)
    assert clamp_before(value) == (given, Clamp(low=0.0))
    for options in ({"readers": 2}, {"readers": 1, "is_output": True}):
        _, value, graph = relu(**options)
        assert clamp_before(value) == (value, None)
    assert len(list(graph)) == 2


def test_no_clip_of_codes_that_has_no_kernel():
    """ONNX Runtime has none of 16-bit codes."""
    program = to_onnx(clamped(activations=16))
    clips = [n for n in program.graph if n.op_type == "Clip"]
    assert clips
    assert {n.inputs[0].dtype for n in clips} == {ir.DataType.FLOAT}


def _cumulated(y: torch.Tensor) -> torch.Tensor:
    return y.cumsum(3)


PRODUCERS = {
    "average": lambda y: nn.functional.avg_pool2d(y, 2),
    "resized": lambda y: nn.functional.interpolate(y, scale_factor=2, mode="bilinear"),
    "joined": lambda y: torch.cat([y, 2 * y.flip(3)], 2),
    "product": lambda y: y * y.flip(3),
    "smooth": nn.functional.silu,
    "maximum": lambda y: torch.maximum(y, y.flip(3)),
    "chosen": lambda y: torch.where(y > 0.1, y, y.flip(3)),
    "other": _cumulated,
    "moved": lambda y: nn.functional.silu(y).transpose(2, 3),
    "divided": lambda y: y / y.std(1, keepdim=True),
}


class AnyBefore(nn.Module):
    """Some operator, a clamping activation, and a convolution."""

    def __init__(self, before, clamp) -> None:
        super().__init__()
        self.stem, self.then, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.before, self.clamp = before, clamp

    def forward(self, x):
        return self.head(self.then(self.clamp(self.before(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    "clamp", [torch.relu, nn.functional.relu6, lambda y: y.clamp(-0.2, 0.3)], ids=["0", "6", "own"]
)
@pytest.mark.parametrize("before", PRODUCERS)
def test_a_clamp_behind_any_operator_is_rounded_once(before, clamp):
    """ONNX Runtime drops such a clamp, and joined the two quantizers around it to a third one."""
    torch.manual_seed(0)
    model = bw.quantize(AnyBefore(PRODUCERS[before], clamp).eval(), cases.dataset(), "mse")
    x = cases.images()
    with session(to_onnx(model), optimize=True) as run, torch.no_grad():
        np.testing.assert_allclose(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0], model(x), atol=1e-4)


class SharedBias(nn.Module):
    """A layer that is called twice, with inputs of different sizes, so that its bias has two steps."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.twice = kind(4, 4, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.stem(x)))) * 3
        return self.head(torch.relu(self.twice(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("bits", [(8, 8), (5, 5), (4, 8), (4, 4)])
def test_a_bias_of_two_layers_is_in_the_file_what_it_is_in_the_simulation(kind, bits):
    torch.manual_seed(0)
    model = bw.quantize(SharedBias(kind).eval(), cases.dataset(), "rtn", weights=bits[0], activations=bits[1])
    x = cases.images()
    with session(to_onnx(model), optimize=True) as run, torch.no_grad():
        np.testing.assert_allclose(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0], model(x), atol=1e-5)


def test_layers_that_share_a_bias_have_integers_of_it_each():
    model = bw.quantize(SharedBias(nn.Conv2d).eval(), cases.dataset(), "rtn")
    first, second = (layer.bias for layer in model.layers if layer.name.startswith("twice"))
    assert first != second
    steps = [model.graph.get_submodule(key).scale for key in (first, second)]
    codes = [model.graph.get_submodule(key.replace("quantizer", "frozen")).codes for key in (first, second)]
    torch.testing.assert_close(
        codes[0] * steps[0], codes[1] * steps[1], atol=float(max(s.max() for s in steps)), rtol=0
    )
    assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weights=8, activations=8, granularity="group", group_size=2),
        Scheme(weights=4, activations=4, runtime="generic"),
    ],
    ids=["groups", "few bits"],
)
def test_a_bias_that_stays_float_is_not_rounded_by_the_runtime(scheme):
    torch.manual_seed(0)
    model = bw.quantize(SharedBias(nn.Conv2d).eval(), cases.dataset(), "rtn", scheme=scheme)
    assert any(u.op == "bias" for u in model.unquantized)
    x = cases.images()
    with session(to_onnx(model), optimize=True) as run, torch.no_grad():
        np.testing.assert_allclose(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0], model(x), atol=1e-5)
