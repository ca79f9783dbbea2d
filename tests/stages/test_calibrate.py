"""Calibration: corrected means, biases that fit, nothing of the float network changed, integers that equal floats."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import CASES, dataset, images, model, prepared
from torch import Tensor, fx, nn

from bitwright.errors import DataError
from bitwright.given.images import load_images
from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.quant.scheme import Scheme
from bitwright.runtimes.target import Target
from bitwright.stages import calibrate as stage_module
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate


def calibrated(
    teacher: Captured | str, runtime: str = "onnxruntime", *, count: int = 12, batch: int = 5, **settings: object
) -> Student:
    """A calibrated student; what the stage does not know goes to the scheme. Min-max, which is quick."""
    teacher = prepared(teacher) if isinstance(teacher, str) else teacher
    settings = {"activations": 8, **settings}
    stage = {k: settings.pop(k) for k in ("bias_correction", "match_spread") if k in settings}
    student = insert_quantizers(teacher, Scheme(runtime=runtime, **settings))
    return Calibrate(activations="minmax", **stage).run(student, teacher, dataset(count), Run(batch=batch))


def values(graph: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Everything that a graph computes, by node name."""
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Recorder(graph).run(x)
    return seen


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if ops.base_name(n) in ops.LINEAR and n.op == "call_function"]


def channel_means(node: fx.Node, y: Tensor) -> Tensor:
    return y.flatten(0, -2).mean(0) if ops.base_name(node) == "linear" else y.transpose(0, 1).flatten(1).mean(1)


def bias_of(student: Student, node: fx.Node) -> Tensor:
    """The stored float bias of an operator of the student, before its quantizer."""
    stored = node.args[2].args[0] if node.args[2].op == "call_module" else node.args[2]
    return student.graph.get_buffer(str(stored.target))


def mean_errors(student: Student, teacher: Captured, x: Tensor) -> dict[str, float]:
    """Largest error of a channel's mean, relative to the operator's range, each operator fed the float input."""
    floats, errors = values(teacher.graph, x), {}
    twins = {n.name: n for n in linears(student.graph)}
    for node in linears(teacher.graph):
        twin = twins[node.name]
        weight = student.graph.get_buffer(str(twin.args[1].args[0].target))
        weight = student.quantizer(str(twin.args[1].target))(weight)
        y = node.target(floats[node.args[0].name], weight, bias_of(student, twin), *node.args[3:])
        expected = floats[node.name]
        gap = channel_means(node, y) - channel_means(node, expected)
        errors[node.meta["layer"]] = float(gap.abs().max() / expected.abs().max())
    return errors


@pytest.mark.parametrize("match_spread", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_analytic_correction_keeps_channel_means(name: str, match_spread: bool) -> None:
    """On the calibration images, for every operator: padded (borders), depthwise, transposed, linear, shared."""
    student = calibrated(name, weights=3, bias_correction="analytic", match_spread=match_spread)
    plain = calibrated(name, weights=3, match_spread=match_spread)
    x = images(12, seed=1)
    corrected, before = mean_errors(student, prepared(name), x), mean_errors(plain, prepared(name), x)
    assert max(corrected.values()) < 1e-4
    assert max(before.values()) > 1e-3


def quantized_errors(student: Student, teacher: Captured, x: Tensor) -> dict[str, float]:
    """Largest error of a channel's mean of each operator of the quantized network, relative to its range."""
    floats, found, errors = values(teacher.graph, x), values(student.graph, x), {}
    for node in linears(teacher.graph):
        gap = channel_means(node, found[node.name]) - channel_means(node, floats[node.name])
        errors[node.meta["layer"]] = float(gap.abs().max() / floats[node.name].abs().max())
    return errors


@pytest.mark.parametrize("runtime", ["onnxruntime", "generic"])
@pytest.mark.parametrize(
    "name", ["residual", "transposed", "squeeze_excite", "transformer", "multi_head", "token_norm", "called_twice"]
)
def test_sequential_correction_keeps_the_quantized_networks_means(
    name: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(12, seed=1)
    settings = {"weights": 4, "activations": 5}
    monkeypatch.setattr(Target, "integer_bias", lambda *_: False)  # a rounded bias moves the mean
    corrected = quantized_errors(calibrated(name, runtime, bias_correction="sequential", **settings), prepared(name), x)
    before = quantized_errors(calibrated(name, runtime, **settings), prepared(name), x)
    assert max(corrected.values()) < 3e-4
    assert max(before.values()) > 3e-3


def test_sequential_correction_uses_the_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "BIAS_IMAGES", 4)
    x = images(12, seed=1)
    few = calibrated("residual", weights=3, bias_correction="sequential")
    assert max(quantized_errors(few, prepared("residual"), x[:4]).values()) < 3e-4
    assert max(quantized_errors(few, prepared("residual"), x).values()) > 1e-3


class _Dead(nn.Module):
    """A channel without weights and with a large bias, and one whose weights are all but zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.conv.weight.data[1] = 0
        self.conv.bias.data[1] = 30.0
        self.conv.weight.data[2] *= 1e-12
        self.conv.bias.data[2] = -20.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("correction", ["none", "analytic", "sequential"])
def test_large_biases_of_dead_channels_fit_their_accumulator(correction: str, granularity: str) -> None:
    torch.manual_seed(0)
    network = _Dead()
    teacher = prepare(capture(network, images(2)))
    student = calibrated(teacher, bias_correction=correction, granularity=granularity)
    (quantizer,) = [m for m in student.graph.modules() if isinstance(m, BiasQuantizer) and m.name == "conv"]
    bias = student.graph.get_buffer("conv.bias")
    assert bool(torch.isfinite(quantizer.weight.scale).all())
    assert int(quantizer.codes(bias).abs().max()) <= 2**30 + 2**8
    torch.testing.assert_close(quantizer(bias)[1:3], torch.tensor([30.0, -20.0]), rtol=2e-2, atol=0)
    x = images(6, seed=4)
    with torch.no_grad():
        expected = network(x)
    assert float((student(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_values_that_are_not_finite_name_the_layer() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.log(x + 10)).mean((2, 3))

    teacher = prepare(capture(Log(), images(2)))
    x = images(7)
    x[5, 1, 2, 3] = -20.0
    student = insert_quantizers(teacher, Scheme())
    with pytest.raises(DataError, match=r"output of log is not finite .* before it\.$"):
        Calibrate().run(student, teacher, load_images(x, None), Run(batch=2))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("correction", ["none", "analytic", "sequential"])
@pytest.mark.parametrize("name", ["residual", "transformer", "tied_weights", "functional"])
def test_the_float_network_is_not_changed(name: str, correction: str) -> None:
    before, user = state(prepared(name).graph), state(model(name))
    calibrated(name, weights=2, bias_correction=correction).freeze()
    assert_same(state(prepared(name).graph), before)
    assert_same(state(model(name)), user)


@pytest.mark.parametrize("correction", ["analytic", "sequential"])
def test_two_runs_are_identical(correction: str) -> None:
    first, second = (calibrated("squeeze_excite", weights=4, bias_correction=correction) for _ in range(2))
    assert_same(state(first.graph), state(second.graph))
    assert_same(state(first.freeze().graph), state(second.freeze().graph))


def test_ranges_do_not_depend_on_the_batch_size() -> None:
    teacher, made = prepared("residual"), []
    for batch in (1, 5, 12):
        student = insert_quantizers(teacher, Scheme())
        stage = Calibrate(weights="minmax", activations="minmax")
        made.append(stage.run(student, teacher, dataset(12), Run(batch=batch)))
    for other in made[1:]:
        for key in [k for k, m in made[0].graph.named_children() if isinstance(m, Quantizer)]:
            torch.testing.assert_close(other.quantizer(key).scale, made[0].quantizer(key).scale, rtol=1e-5, atol=0)


@cache
def finished(name: str, runtime: str, weights: int) -> tuple[Student, list[Tensor], dict[str, Tensor]]:
    """A frozen model, its simulation's outputs before freezing, and the float parameters it had then."""
    student = calibrated(name, runtime, weights=weights, bias_correction="analytic")
    before, floats = student.flat(images(3, seed=9)), state(student.graph)
    return student.freeze(), before, floats


@pytest.mark.parametrize(("runtime", "weights"), [("onnxruntime", 4), ("generic", 8)])
@pytest.mark.parametrize("name", CASES)
def test_integers_equal_the_simulation_bit_for_bit(name: str, runtime: str, weights: int) -> None:
    student, before, _ = finished(name, runtime, weights)
    assert student.frozen
    for _ in range(2):
        found = student.flat(images(3, seed=9))
        assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))
        assert student.freeze() is student


@pytest.mark.parametrize(("runtime", "weights"), [("onnxruntime", 4), ("generic", 8)])
@pytest.mark.parametrize("name", CASES)
def test_codes_are_integers_of_their_grids(name: str, runtime: str, weights: int) -> None:
    student, _, floats = finished(name, runtime, weights)
    kinds = {"weight": 0, "bias": 0}
    for module in student.graph.modules():
        if not isinstance(module, Frozen):
            continue
        quantizer, codes = module.quantizer, module.codes
        assert not codes.is_floating_point()
        if isinstance(quantizer, BiasQuantizer):
            kinds["bias"] += 1
            continue
        assert quantizer.grid.qmin <= int(codes.min()) <= int(codes.max()) <= quantizer.grid.qmax
        if quantizer.role == "weight":
            kinds["weight"] += 1
            assert quantizer.grid.bits == weights
            assert len(torch.unique(codes)) <= 2**weights
    operators = linears(student.graph)
    float_biases = [u for u in student.unquantized if u.op == "bias"]
    assert kinds["bias"] + len(float_biases) == len(operators)
    assert kinds["bias"] or weights == 4
    assert kinds["weight"] == len({n.args[1].target for n in operators})
    left = dict(student.graph.named_buffers())
    stored = {str(n.target) for n in student.graph.graph.nodes if n.op == "get_attr"}
    floating = {k for k, v in left.items() if v.is_floating_point() and "." in k and "quantizer_" not in k}
    assert floating <= stored  # no float copy of what is integers now
    assert floats.keys() >= floating


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_stay_close(name: str) -> None:
    """On the calibration images: others of so few reach out of the ranges."""
    student, _, _ = finished(name, "generic", 8)
    x = images(12, seed=1)
    with torch.no_grad():
        expected = prepared(name).graph(x)
    for a, b in zip(expected, student.flat(x), strict=True):
        noise, signal = (a - b).square().mean(), a.square().mean()
        assert float(noise / signal) < 0.01


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_activations_lie_on_their_grids(grid: str) -> None:
    student = calibrated("squeeze_excite", activations=4, activation_grid=grid)
    seen = values(student.graph, images(4, seed=3))
    for node in student.graph.graph.nodes:
        if node.op != "call_module" or node.args[0].op == "get_attr":
            continue
        quantizer = student.quantizer(str(node.target))
        codes = seen[node.name] / quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert len(torch.unique(seen[node.name])) <= 16
        if grid == "symmetric":
            assert float(quantizer.zero_point) == 0
            positive = float(seen[node.args[0].name].min()) >= 0
            assert quantizer.grid.symmetric or positive
