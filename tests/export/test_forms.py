"""What ONNX Runtime computes wrongly once its optimisations are on is written in a form that it computes right."""

import cases
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bitwright as bw
from bitwright.export.arbiter import compare_kernels
from bitwright.export.forms import rewrite_forms
from bitwright.export.onnx import to_onnx
from bitwright.runtimes.onnxruntime import session


class Heads(nn.Module):
    """A convolution whose feature map [N, 16, 12, 12] goes through every function: one output each."""

    def __init__(self, functions):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.functions = nn.Conv2d(3, 16, 3, padding=1), functions

    def forward(self, x):
        x = self.conv(x)
        return tuple(function(x) for function in self.functions)


def bins(x):
    """Boxes as a mean over bins, as detectors compute them."""
    return (x.flatten(2).view(-1, 4, 4, 144).softmax(2) * torch.arange(4.0).view(1, 1, 4, 1)).sum(2)


IMAGES = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "softmax over bins": bins,
    "softmax over channels": lambda x: (3 * x).softmax(1).mean((2, 3)),
    "softmax over 144 positions": lambda x: (x.flatten(2).softmax(2) * torch.linspace(-1, 1, 144)).sum(2),
    "softmax over 2304 classes": lambda x: x.flatten(1).softmax(1).view(-1, 16, 144).sum(2),
    "softmax of a transposed map": lambda x: (x.flatten(2).transpose(1, 2).softmax(1)).sum(2),
    "log softmax": lambda x: x.log_softmax(1).mean((2, 3)),
    "max pooling of padded": lambda x: F.max_pool2d(F.pad(x - 1, (0, 1, 0, 1)), 3, 2).mean((2, 3)),
    "max pooling of padded, dilated": lambda x: F.max_pool2d(F.pad(x - 1, (2, 2, 2, 2)), 3, 2, 1, 2).mean((2, 3)),
    "max pooling of padded, size up": lambda x: F.max_pool2d(F.pad(x - 1, (1, 0, 0, 0)), 2, 2, ceil_mode=True).mean(3),
    "max pooling along one axis": lambda x: F.max_pool1d(F.pad(x.flatten(2) - 1, (1, 1)), 3, 2).mean(2),
    "average pooling of padded": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2).mean((2, 3)),
    "average pooling of padded, size up": lambda x: F.avg_pool2d(F.pad(x, (1, 0, 1, 0)), 2, 2, ceil_mode=True).mean(3),
    "average pooling, size up": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True).mean(3),
    "average pooling, size up, pads": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True).mean(3),
    "average pooling, size up, pads do not count": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False).mean(3),
    "convolution of padded": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), torch.ones(2, 16, 3, 3), stride=2).mean(3),
}


def run(program, images=IMAGES, optimize=True):
    with session(program, optimize=optimize) as runtime:
        return [torch.from_numpy(x) for x in runtime.run(None, {"images": images.numpy()})]


def deviations(names):
    """Of the file, optimisations on, from the simulation, in standard deviations of each output."""
    model = bw.quantize(Heads([FUNCTIONS[n] for n in names]).eval(), IMAGES, "rtn", weights=8)
    with torch.no_grad():
        pairs = zip(model.flat(IMAGES), run(to_onnx(model)), strict=True)
        return {n: float((a - b).square().mean().sqrt() / a.std()) for n, (a, b) in zip(names, pairs, strict=True)}


@pytest.fixture(scope="module")
def found():
    return deviations(list(FUNCTIONS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_runtime_as_everybody_starts_it_gives_what_was_measured(name, found):
    assert found[name] < 2e-3


def test_without_the_other_forms_it_does_not(monkeypatch):
    monkeypatch.setattr("bitwright.export.onnx.rewrite_forms", lambda graph: None)
    names = ["max pooling of padded", "average pooling, size up, pads"]
    assert min(deviations(names).values()) > 5e-3


@pytest.mark.parametrize("step", [1 / 255, 1 / 300.5])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_softmax_of_codes_stays_in_float(step, axis):
    """The kernel that ONNX Runtime has for it divides by whole numbers alone."""
    codes = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    constants = {"scale": np.float32(0.1), "zero": np.uint8(128), "step": np.float32(step), "none": np.uint8(0)}
    nodes = [
        helper.make_node("DequantizeLinear", ["images", "scale", "zero"], ["floats"]),
        helper.make_node("Softmax", ["floats"], ["shares"], axis=axis),
        helper.make_node("QuantizeLinear", ["shares", "step", "none"], ["codes"]),
    ]
    program = made(nodes, constants, ["n", 40, 50])
    expected = run(program, codes, optimize=False)[0]
    assert not torch.equal(run(program, codes)[0], expected)
    rewrite_forms(program.graph)
    assert torch.equal(run(program, codes)[0], expected)


def made(nodes, constants, shape):
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def pooling(value, pads, kernel=3, stride=2, size=8, zero=100, **attributes):
    """Codes, a Pad of floats with a value, max pooling, codes."""
    constants = {"scale": np.float32(0.05), "zero": np.uint8(zero), "value": np.float32(value)}
    constants["amounts"] = np.asarray([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
    nodes = [
        helper.make_node("DequantizeLinear", ["images", "scale", "zero"], ["floats"]),
        helper.make_node("Pad", ["floats", "amounts", "value"], ["padded"]),
        helper.make_node(
            "MaxPool", ["padded"], ["most"], kernel_shape=[kernel] * 2, strides=[stride] * 2, **attributes
        ),
        helper.make_node("QuantizeLinear", ["most", "scale", "zero"], ["codes"]),
    ]
    return made(nodes, constants, ["n", 2, size, size])


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min, -1e4, -5.0])
@pytest.mark.parametrize(
    ("pads", "settings"),
    [((0, 0, 1, 1), {}), ((1, 1, 1, 1), {}), ((2, 1, 0, 2), {}), ((0, 1, 1, 1), {"ceil_mode": 1})],
)
def test_a_pad_below_everything_becomes_that_of_max_pooling(value, pads, settings):
    codes = torch.randint(0, 256, (3, 2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    program = pooling(value, pads, **settings)
    expected = run(program, codes, optimize=False)[0]
    rewrite_forms(program.graph)
    assert [n.op_type for n in program.graph if n.op_type == "Pad" and n.outputs[0].uses()] == []
    assert torch.equal(run(program, codes)[0], expected)
    assert torch.equal(run(program, codes, optimize=False)[0], expected)


@pytest.mark.parametrize(
    ("value", "pads", "settings"),
    [
        (-4.9, (1, 1, 1, 1), {}),  # above the lowest code
        (-np.inf, (3, 3, 3, 3), {}),  # as wide as the kernel
        (-1e4, (0, 0, 2, 2), {"kernel": 2}),  # the last windows have nothing but it
    ],
)
def test_other_pads_stay(value, pads, settings):
    codes = torch.randint(0, 256, (3, 2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    program = pooling(value, pads, **settings)
    expected = run(program, codes, optimize=False)[0]
    rewrite_forms(program.graph)
    assert [n.op_type for n in program.graph if n.op_type == "Pad" and n.outputs[0].uses()] == ["Pad"]
    assert torch.equal(run(program, codes)[0], expected)


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_networks_that_need_no_other_form_get_none(name):
    model = bw.quantize(cases.model(name), cases.dataset(), "rtn", weights=8)
    assert not [n for n in to_onnx(model).graph if n.op_type == "Clip"]


class Flipped(nn.Module):
    """Test-time flips: the batch is doubled, both halves are averaged."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(13)
        self.how, self.conv, self.head = how, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        both = torch.cat([x, x.flip(3)], 0)
        both = self.head(self.conv(both).relu().mean((2, 3)))
        first, second = both.chunk(2, 0) if self.how == "chunk" else both.split(x.shape[0])
        return (first + second) / 2


@pytest.mark.parametrize("how", ["chunk", "split"])
def test_a_batch_that_is_doubled_inside_runs_at_every_size(how, tmp_path):
    model = bw.quantize(Flipped(how).eval(), IMAGES, "rtn", weights=8)
    model.export(tmp_path / "m.onnx")
    runtime = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        with torch.no_grad():
            expected = model(IMAGES[:count])
        found = torch.from_numpy(runtime.run(None, {"images": IMAGES[:count].numpy()})[0])
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-3 * expected.std()


class Window(nn.Module):
    """Tokens [N, 30, 16] of a padded map of 6 x 5, read by three linear layers, as windows of attention read them."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(1)
        self.mode, self.conv, self.head = mode, nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 5)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = F.pad(self.conv(x), (0, 1, 1, 1), mode=self.mode)
        x = x.flatten(2).transpose(1, 2)
        attention = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((attention @ self.v(x)).mean(1))


@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_linear_layers_that_read_a_padded_map_stay_in_integers(mode):
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = bw.quantize(Window(mode).eval(), images, "rtn", weights=8, device="cpu")
    program = to_onnx(model)
    again = [node for node in program.graph if (node.outputs[0].name or "").endswith("/again/value")]
    assert len(again) == 1, "one pair of operators for the three that read it"
    assert not [layer.name for layer in compare_kernels(model, program, images).values() if layer.diverges]
