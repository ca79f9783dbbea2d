"""OPTQ on networks: Gram matrices against patches taken by convolving with the identity, codes against literal OBQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, dataset, images, prepared
from torch import Tensor, fx, nn

from bitwright.given.images import Images, load_images
from bitwright.graph import ops, rewrite
from bitwright.graph.capture import Captured, capture
from bitwright.graph.patches import Drawn, group_grams, layer_inputs, layer_outputs
from bitwright.graph.prepare import prepare
from bitwright.graph.student import Student, insert_quantizers
from bitwright.graph.watch import watch
from bitwright.quant.quantizer import Frozen
from bitwright.quant.scheme import Rule, Scheme
from bitwright.stages.base import Run
from bitwright.stages.calibrate import Calibrate
from bitwright.stages.optq import Optq

ALL = 10**6
"""More positions than any image has."""


def calibrated(teacher: Captured, data: Images, **scheme: object) -> Student:
    student = insert_quantizers(teacher, Scheme(**{"weights": 3, **scheme}))
    return Calibrate(weights="mse", activations="minmax").run(student, teacher, data, Run())


def optimised(
    teacher: Captured, data: Images, *, seed: int = 0, batch: int = 5, scheme: dict | None = None, **stage: object
) -> Student:
    """A student after OPTQ over all positions."""
    settings = {"positions": ALL, "damping": 0.01, "bias_correction": False, **stage}
    run = Run(seed=seed, batch=batch)
    return Optq(**settings).run(calibrated(teacher, data, **(scheme or {})), teacher, data, run)


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and ops.base_name(n) in ops.LINEAR]


def read_by(graph: fx.GraphModule, node: fx.Node, x: Tensor) -> Tensor:
    found: dict[str, Tensor] = {}
    watch(graph, x, {node.args[0].name: lambda n, v: found.__setitem__("x", v)})
    return found["x"]


def weight_of(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    return rewrite.get_tensor(graph, str(node.args[1].target))


def patches(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """All that the operator multiplies with its weight, [G, rows, K]: its outputs for weights that pick one input."""
    if ops.base_name(node) == "linear":
        return x.reshape(1, -1, x.shape[-1])
    groups, size = rewrite.groups(node), weight[0].numel()
    eye = torch.eye(size).reshape(size, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    picked = node.target(x, eye, None, *node.args[3:]).flatten(2)  # [B, G K, positions]
    return picked.unflatten(1, (groups, size)).permute(1, 0, 3, 2).flatten(1, 2)


def gram(x: Tensor) -> Tensor:
    return x.mT @ x


# ------------------------------------------------------------------------------------------ Gram matrices

CONVS: dict[str, nn.Module] = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "strided_unevenly": nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 1)),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "dilated_strided": nn.Conv2d(4, 6, (2, 3), dilation=(3, 2), stride=2, padding=(0, 3)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2),
    "depthwise_multiplied": nn.Conv2d(4, 8, (3, 1), groups=4, padding=1),
    "pointwise": nn.Conv2d(4, 6, 1),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "same_even": nn.Conv2d(4, 6, (2, 4), padding="same"),
    "same_dilated": nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2)),
}


class _With2d(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x[..., :7]).tanh())


class _With1d(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(2))


CONVS_1D: dict[str, nn.Module] = {
    "plain": nn.Conv1d(3, 6, 5),
    "strided": nn.Conv1d(3, 6, 5, stride=3, padding=2),
    "dilated": nn.Conv1d(3, 6, 4, dilation=5, padding=3),
    "depthwise": nn.Conv1d(3, 6, 3, groups=3, padding=1),
    "same": nn.Conv1d(3, 6, 4, padding="same", dilation=3),
}
NETWORKS = {f"2d_{n}": _With2d(c) for n, c in CONVS.items()} | {f"1d_{n}": _With1d(c) for n, c in CONVS_1D.items()}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NETWORKS)
def test_gram_of_a_convolution_is_that_of_all_its_patches(name: str) -> None:
    teacher, x = prepare(capture(NETWORKS[name].eval(), images(2))), images(3, seed=2)
    node = linears(teacher.graph)[-1]
    value, weight = read_by(teacher.graph, node, x), weight_of(teacher.graph, node)
    found = layer_inputs(node, value, weight, Drawn(ALL, 0))
    expected = patches(node, value, weight)
    assert found.shape == expected.shape
    torch.testing.assert_close(gram(found), gram(expected), rtol=1e-4, atol=1e-4)
    by_groups = group_grams(node, value, weight, Drawn(ALL, 0))
    torch.testing.assert_close(by_groups, gram(expected), rtol=1e-4, atol=1e-4)
    layer = NETWORKS[name].conv
    if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
        unfolded = F.unfold(value, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        unfolded = unfolded.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        torch.testing.assert_close(gram(found), gram(unfolded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["transformer", "mixer", "shifted_window", "multi_head", "residual"])
def test_gram_of_a_linear_layer_is_that_of_all_its_rows(name: str) -> None:
    x = images(3, seed=2)
    for node in (n for n in linears(prepared(name).graph) if ops.base_name(n) == "linear"):
        value, weight = read_by(prepared(name).graph, node, x), weight_of(prepared(name).graph, node)
        rows = value.reshape(-1, weight.shape[1])
        found = layer_inputs(node, value, weight, Drawn(ALL, 0))
        torch.testing.assert_close(gram(found)[0], sum(torch.outer(r, r) for r in rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["2d_padded", "2d_depthwise", "1d_strided"])
def test_positions_are_drawn_from_the_patches_of_every_image_without_preference(name: str) -> None:
    teacher, x = prepare(capture(NETWORKS[name].eval(), images(2))), images(3, seed=2)
    node = linears(teacher.graph)[-1]
    value, weight = read_by(teacher.graph, node, x), weight_of(teacher.graph, node)
    every = patches(node, value, weight)
    mean, count = 0.0, 600
    for seed in range(count):
        some = layer_inputs(node, value, weight, Drawn(4, seed))
        assert some.shape == (len(every), 3 * 4, every.shape[2])
        mean = mean + gram(some) / count
    distances = torch.cdist(some, every, compute_mode="donot_use_mm_for_euclid_dist").min(2)
    assert float(distances.values.max()) < 1e-5
    owners = distances.indices // (every.shape[1] // 3)
    assert owners[0].bincount(minlength=3).tolist() == [4, 4, 4]
    full = gram(every) * 12 / every.shape[1]
    assert float((mean - full).norm() / full.norm()) < 0.08


def test_rows_of_a_linear_layer_are_drawn_without_preference() -> None:
    graph, x = prepared("transformer").graph, images(3, seed=2)
    node = next(n for n in linears(graph) if n.meta["layer"] == "mlp.0")  # five tokens an image
    value, weight = read_by(graph, node, x), weight_of(graph, node)
    grams = [gram(layer_inputs(node, value, weight, Drawn(2, seed)))[0] for seed in range(400)]
    assert layer_inputs(node, value, weight, Drawn(2, 0)).shape == (1, 2 * 3, 8)
    full = gram(value.reshape(-1, 8)) * 6 / 15
    assert float((sum(grams) / 400 - full).norm() / full.norm()) < 0.05


@pytest.mark.parametrize("name", ["2d_padded", "2d_depthwise", "1d_strided", "linear"])
def test_an_image_gives_the_same_positions_whatever_images_it_is_seen_with(name: str) -> None:
    graph = prepared("transformer").graph if name == "linear" else prepare(capture(NETWORKS[name], images(2))).graph
    node = linears(graph)[-1]
    if name == "linear":
        node = next(n for n in linears(graph) if n.meta["layer"] == "mlp.0")
    value, weight = read_by(graph, node, images(7, seed=2)), weight_of(graph, node)
    together = layer_inputs(node, value, weight, Drawn(2, seed=5))
    for size in (1, 2, 3):
        parts = [layer_inputs(node, v, weight, Drawn(2, 5, size * i)) for i, v in enumerate(value.split(size))]
        assert torch.equal(torch.cat(parts, 1), together)


def test_all_positions_are_taken_alike_often() -> None:
    places = Drawn(most=6, seed=1).of(20, 15)
    assert places.shape == (20, 6)
    assert places.flatten().bincount(minlength=15).tolist() == [8] * 15
    assert all(len(set(row)) == 6 for row in places.tolist())
    assert not torch.equal(places, Drawn(most=6, seed=2).of(20, 15))
    assert torch.equal(places[7:], Drawn(most=6, seed=1, first=7).of(13, 15))


# -------------------------------------------------------------------------------------------- whole stage


def obq(weight: Tensor, hessian: Tensor, scale: Tensor, *, ordered: bool) -> Tensor:
    """OBQ of one group with 1 % damping and without dead inputs; the weights just before each is rounded, [O, K]."""
    out, alive = weight.double(), hessian.diagonal() > 0
    left = hessian[alive][:, alive].double()
    damped = left + 0.01 * left.diagonal().mean() * torch.eye(len(left))
    names = alive.nonzero().flatten().tolist()
    order = left.diagonal().argsort(descending=True).tolist() if ordered else range(len(left))
    for row, step in enumerate(scale.flatten().tolist()):
        w, inverse = weight[row][alive].double(), torch.linalg.inv(damped)
        for q in order:
            out[row, names[q]] = w[q]
            w -= (w[q] - min(max(round(float(w[q]) / step), -4), 3) * step) / inverse[q, q] * inverse[:, q]
            inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
            inverse[q, q] = 1.0
    return out


def grams_of(teacher: Captured, x: Tensor) -> dict[str, Tensor]:
    """Over all images and all readers of a weight, by the path of the weight."""
    found: dict[str, Tensor] = {}
    for node in linears(teacher.graph):
        if ops.base_name(node) in ops.CONV_TRANSPOSE:
            continue
        stored = str(node.args[1].target)
        one = gram(patches(node, read_by(teacher.graph, node, x), weight_of(teacher.graph, node)))
        found[stored] = found[stored] + one if stored in found else one
    return found


@pytest.mark.parametrize(
    ("name", "ordered"),
    [
        ("residual", False),  # some of its inputs are as large as others, so that their order is left to rounding
        ("squeeze_excite", False),
        ("transformer", True),
        ("called_twice", True),
        ("tied_weights", True),
        ("conv1d", True),
        ("shuffle", True),
    ],
)
def test_stored_weights_are_those_of_obq(name: str, ordered: bool) -> None:
    """On the float network's inputs; a weight that is used twice sees both of its inputs."""
    teacher, data = prepared(name), dataset(12)
    student = optimised(teacher, data, ordered=ordered)
    nearest = calibrated(teacher, data)
    moved = 0
    for stored, hessian in grams_of(teacher, data.batch(range(12))).items():
        weight, found = (rewrite.get_tensor(m.graph, stored) for m in (teacher, student))
        key = next(n.target for n in student.graph.graph.nodes if n.op == "call_module" and n.args[0].target == stored)
        quantizer = student.quantizer(str(key))
        assert torch.equal(quantizer.scale, nearest.quantizer(str(key)).scale)
        groups = len(hessian)
        parts = zip(weight.chunk(groups), quantizer.scale.chunk(groups), hessian, strict=True)
        expected = torch.cat([obq(w.flatten(1), h, s, ordered=ordered) for w, s, h in parts]).reshape(weight.shape)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        codes = quantizer.codes(found)
        assert torch.equal(codes, quantizer.codes(expected.float()))
        moved += int((codes != quantizer.codes(weight)).sum())
    assert moved > 0


def output_errors(student: Student, teacher: Captured, x: Tensor) -> dict[str, float]:
    """Squared error of every layer's output when it is fed the float input."""
    errors = {}
    twins = {n.name: n for n in linears(student.graph)}
    for node in linears(teacher.graph):
        call = twins[node.name].args[1]
        weight = weight_of(teacher.graph, node)
        change = student.quantizer(str(call.target))(rewrite.get_tensor(student.graph, str(call.args[0].target)))
        value = read_by(teacher.graph, node, x)
        errors[node.name] = float(node.target(value, change - weight, None, *node.args[3:]).square().sum())
    return errors


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_output_errors_are_lower_than_of_rounding(granularity: str) -> None:
    scheme = {"granularity": granularity, "group_size": 2}
    ratios = []
    for name in ("residual", "transformer", "conv_bn_relu6"):
        teacher, data = prepared(name), dataset(12)
        x = data.batch(range(12))
        before = output_errors(calibrated(teacher, data, **scheme), teacher, x)
        after = output_errors(optimised(teacher, data, scheme=scheme), teacher, x)
        ratios += [after[n] / before[n] for n in before if before[n]]
    assert sum(ratios) / len(ratios) < 0.8
    assert sum(r > 1 for r in ratios) <= 0.25 * len(ratios)


@pytest.mark.parametrize("name", ["transposed", "upsample"])
def test_transposed_convolutions_keep_their_weights(name: str) -> None:
    teacher, data = prepared(name), dataset(6)
    student = optimised(teacher, data)
    for node in linears(teacher.graph):
        same = torch.equal(rewrite.get_tensor(student.graph, str(node.args[1].target)), weight_of(teacher.graph, node))
        assert same == (ops.base_name(node) in ops.CONV_TRANSPOSE)


def test_weights_that_stay_float_keep_their_values() -> None:
    teacher, data = prepared("residual"), dataset(6)
    student = optimised(teacher, data, scheme={"rules": (Rule.parse("conv=wfloat"),)})
    same = {
        n.meta["layer"]: torch.equal(
            rewrite.get_tensor(student.graph, str(n.args[1].target)), weight_of(teacher.graph, n)
        )
        for n in linears(teacher.graph)
    }
    assert same == {"stem": False, "conv": True, "head": False}


class _UsedBothWays(nn.Module):
    """A matrix that is a layer's weight and a float operand of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + x * self.fc.weight).mean((1, 2))


def test_a_weight_that_is_a_float_operand_too_keeps_its_values() -> None:
    network = _UsedBothWays().eval()
    student = optimised(prepare(capture(network, images(2))), dataset(6))
    assert torch.equal(rewrite.get_tensor(student.graph, "fc.weight"), network.fc.weight)


def channel_means(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    y = node.target(read_by(graph, node, x), weight, bias, *node.args[3:])
    return y.flatten(0, -2).mean(0) if ops.base_name(node) == "linear" else y.transpose(0, 1).flatten(1).mean(1)


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "transformer", "called_twice"])
def test_corrected_biases_keep_the_means_of_all_channels(name: str) -> None:
    """Also where fewer positions are taken: means are those of all."""
    teacher, data = prepared(name), dataset(12)
    x = data.batch(range(12))
    gaps = {}
    for corrected in (True, False):
        student = optimised(teacher, data, positions=2, bias_correction=corrected)
        twins, largest = {n.name: n for n in linears(student.graph)}, 0.0
        for node in linears(teacher.graph):
            call, bias = twins[node.name].args[1:3]
            bias = bias.args[0] if bias.op == "call_module" else bias
            weight = student.quantizer(str(call.target))(rewrite.get_tensor(student.graph, str(call.args[0].target)))
            mine = channel_means(teacher.graph, node, weight, rewrite.get_tensor(student.graph, str(bias.target)), x)
            own_bias = rewrite.get_tensor(teacher.graph, str(node.args[2].target))
            own = channel_means(teacher.graph, node, weight_of(teacher.graph, node), own_bias, x)
            if name != "called_twice" or node.meta["layer"] not in {"conv", "conv_2"}:  # one bias for two places
                largest = max(largest, float((mine - own).abs().max() / own.abs().max()))
        gaps[corrected] = largest
    assert gaps[True] < 1e-3
    assert gaps[False] > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_everything_and_leaves_the_teacher_alone(name: str) -> None:
    teacher, data = prepared(name), dataset(4)
    before, code = {k: v.clone() for k, v in teacher.graph.named_buffers()}, str(teacher.graph.graph)
    student = optimised(teacher, data, positions=3, bias_correction=True)
    after = dict(teacher.graph.named_buffers())
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert str(teacher.graph.graph) == code
    x = data.batch(range(4))
    found = student.flat(x)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, student.freeze().flat(x), strict=True))


def test_seeds_draw_the_positions_and_the_same_one_the_same() -> None:
    teacher, data = prepared("residual"), dataset(6)
    a, b, c = (
        dict(optimised(teacher, data, positions=3, seed=s).graph.named_buffers())["conv.weight"] for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["residual", "transformer", "shifted_window", "shuffle"])
def test_integers_do_not_depend_on_how_many_images_pass_at_once(name: str) -> None:
    teacher, data = prepared(name), dataset(32)
    first, *others = (optimised(teacher, data, positions=2, batch=size).freeze() for size in (4, 8, 32, 5))
    codes = [
        {k: m.codes for k, m in found.graph.named_modules() if isinstance(m, Frozen)} for found in (first, *others)
    ]
    assert len(codes[0]) > 1
    for found in codes[1:]:
        assert all(torch.equal(codes[0][key], found[key]) for key in codes[0])


def test_it_takes_as_many_images_as_asked() -> None:
    """Eight images, of which only those that were drawn are not black."""
    teacher = prepared("residual")
    drawn = load_images(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8), None).sample(2, seed=0)
    chosen = [int(i[0, 0, 0]) for i in drawn]
    x = torch.zeros(8, 3, 8, 8)
    x[chosen] = images(2, seed=5)
    some = optimised(teacher, load_images(x, None), images=2)
    alone = optimised(teacher, load_images(x[chosen], None), scheme={"rules": ()})
    key = "quantizer_weight_conv"
    assert torch.equal(some.quantizer(key).scale, alone.quantizer(key).scale)
    first, second = (dict(m.graph.named_buffers())["conv.weight"] for m in (some, alone))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("padding", "groups", "stride"), [("same", 1, 1), ("valid", 2, 2), (1, 2, 2), (0, 1, 1)])
def test_patches_times_the_weight_are_the_convolution(axes: int, padding: Any, groups: int, stride: int) -> None:
    """Of any number of axes; positions in the order of the output's."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 4, *range(6, 6 + axes), generator=generator)
    weight = torch.randn(6, 4 // groups, *[3, 2, 3][:axes], generator=generator)
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    packet = getattr(torch.ops.aten, f"conv{axes}d")
    settings = [[stride] * axes, padding if isinstance(padding, str) else [padding] * axes, [1] * axes, groups]
    node = graph.call_function(packet.padding if isinstance(padding, str) else packet.default, (x, w, None, *settings))
    found = layer_inputs(node, value, weight, Drawn(10_000, 0))
    ours = torch.einsum("gsi,goi->gso", found, weight.reshape(groups, 6 // groups, -1).float())
    expected = packet(value, weight, None, *settings)
    given = layer_outputs(node, expected, groups, Drawn(10_000, 0))
    torch.testing.assert_close(ours, given, rtol=1e-4, atol=1e-5)
    some = Drawn(5, seed=3, first=7)
    drawn = torch.einsum(
        "gsi,goi->gso", layer_inputs(node, value, weight, some), weight.reshape(groups, 6 // groups, -1).float()
    )
    torch.testing.assert_close(drawn, layer_outputs(node, expected, groups, some), rtol=1e-4, atol=1e-5)
