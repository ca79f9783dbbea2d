"""OpenVINO computes what was measured, with integer kernels and integers in the file; what it lacks is refused."""

import importlib.util
import subprocess
import sys
import warnings
from collections import Counter

import cases
import numpy as np
import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.export.onnx import to_onnx
from bitwright.export.openvino import check_openvino, write_openvino
from bitwright.export.parity import check_parity
from bitwright.runtimes.openvino import EXACT, OPENVINO, OpenvinoSession, compile_model, converted, openvino_session

INSTALLED = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(
    not INSTALLED, reason="OpenVINO is not installed: pip install 'bitwright[openvino]'"
)


def quantized(name, **settings):
    scheme = bw.Scheme(**{"runtime": "openvino", **settings})
    return bw.quantize(cases.model(name), cases.dataset(), recipe="rtn", scheme=scheme)


@needs_openvino
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [pytest.param("transformer", 4, 8, marks=pytest.mark.slow), ("transposed", 8, 5)],
)
def test_files_equal_the_simulation(name, weights, activations, runtime, tmp_path):
    model = quantized(name, weights=weights, activations=activations, runtime=runtime)
    parity = write_openvino(model, tmp_path / "m.xml", cases.images(6))
    assert parity.passed, parity
    assert parity.runtime == f"openvino {OPENVINO.version}"
    assert parity.worst_layer.max_steps <= 1
    assert parity.batch_sizes == (1, 5)


@needs_openvino
def test_the_file_is_what_is_run_and_its_weights_are_integers(tmp_path):
    import openvino

    model = quantized("residual", weights=4)
    write_openvino(model, tmp_path / "m.xml", cases.images(4))
    program = openvino.Core().read_model(tmp_path / "m.xml")
    types = Counter()
    for node in program.get_ordered_ops():
        if node.get_type_name() == "Constant":
            types[node.get_element_type().get_type_name()] += int(np.prod(node.get_output_shape(0)))
    weights = sum(x.parameters for x in model.layers)
    biases = sum(m.codes.numel() for m in model.graph.modules() if type(m).__name__ == "Frozen" and m.codes.dim() == 1)
    assert types["i4"] == weights - biases
    assert biases <= types["f32"] < weights / 4  # biases, scales and ranges
    assert types["i32"] < biases  # which are no integers with steps beside them
    assert "rtn" in program.get_rt_info("bitwright").value
    compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model(cases.images(5)).numpy()
    assert np.abs(compiled(cases.images(5).numpy())[0] - expected).max() < 1e-5


@needs_openvino
@pytest.mark.parametrize("activations", [8, 6])
def test_eight_bits_become_integer_kernels(activations):
    """Also with a Clip on the codes of 6 bits, and of the ReLU."""
    program = converted(to_onnx(quantized("residual", weights=8, activations=activations, runtime="onnxruntime")))
    assert set(OpenvinoSession(program).precisions()["Convolution"]) == {"u8"}
    assert set(OpenvinoSession(program, optimize=False).precisions()["Convolution"]) == {"f32"}


@needs_openvino
def test_a_wrong_scale_is_found_and_named():
    model = quantized("residual")
    program = to_onnx(model)
    weight = next(v for k, v in program.graph.initializers.items() if k.endswith("weight_conv/scale"))
    weight.const_value.numpy()[:] *= 1.5
    parity = check_parity(model, program, cases.images(4), name="openvino", opener=openvino_session)
    assert not parity.passed
    assert parity.first_divergence == "relu_1"  # the end of the group that conv is in


@needs_openvino
@pytest.mark.parametrize(
    ("settings", "nearest"),
    [({"activations": 16}, "activations=8"), ({"granularity": "group", "group_size": 3}, "granularity='channel'")],
)
def test_what_openvino_lacks_is_refused(settings, nearest, tmp_path):
    model = quantized("transformer", runtime="onnxruntime", **settings)
    with pytest.raises(bw.UsageError, match=rf"runtime openvino.*{nearest}$"):
        write_openvino(model, tmp_path / "m.xml", cases.images(3))
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_openvino_takes_quantizers_of_16_bits_out_with_the_relu_in_them():
    """Why targets give OpenVINO no activations of 16 bits. If this fails, it has learned to run them."""
    model = quantized("residual", runtime="onnxruntime", activations=16)
    session = OpenvinoSession(converted(to_onnx(model)))
    with torch.no_grad():
        expected = model(cases.images(5)).numpy()
    (found,) = session.run(None, {"images": cases.images(5).numpy()})
    assert np.abs(found - expected).max() > 0.1 * np.ptp(expected)


def test_openvino_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    model = quantized("residual")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bw.UsageError, match=r"OpenVINO is not installed.*pip install"):
        check_openvino(model)


class Recurrent(nn.Module):
    """A recurrent head over the columns of a feature map."""

    def __init__(self, kind, **settings):
        super().__init__()
        torch.manual_seed(10)
        self.conv, self.settings = nn.Conv2d(3, 8, 3, 2, 1), settings
        self.recurrent = getattr(nn, kind)(8, 6, **settings)
        self.head = nn.Linear(6 * (1 + settings.get("bidirectional", False)), 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean(2)
        x = x.transpose(1, 2) if self.settings.get("batch_first") else x.permute(2, 0, 1)
        x = self.head(self.recurrent(x)[0])
        return x if self.settings.get("batch_first") else x.transpose(0, 1)


@needs_openvino
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LSTM", {"batch_first": True, "bidirectional": True}),
        pytest.param("GRU", {}, marks=pytest.mark.slow),
        pytest.param("RNN", {"batch_first": True}, marks=pytest.mark.slow),
    ],
)
def test_recurrent_networks_compute_there_what_was_measured(kind, settings, tmp_path):
    """Of weights that are computed from integers OpenVINO makes something else, or refuses them."""
    images = cases.images(8)
    model = bw.quantize(Recurrent(kind, **settings).eval(), images, "rtn", weights=8, runtime="openvino")
    assert write_openvino(model, tmp_path / "m.xml", images).passed
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert model.export(tmp_path / "m.onnx").passed  # in ONNX Runtime
    with torch.no_grad():
        expected = model(images)
    warned = any("OpenVINO" in str(w.message) for w in said)
    for file in ["m.xml", *["m.onnx"] * (not warned)]:
        compiled = compile_model(tmp_path / file, EXACT)
        found = torch.from_numpy(np.array(compiled([images.numpy()])[0]))
        assert (found - expected).square().mean().sqrt() < 2e-3 * expected.std(), file


class Tokens(nn.Module):
    def __init__(self, over, keep, last):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.over, self.keep, self.last = over, keep, last

    def forward(self, x):
        tokens = self.head(torch.relu(self.embed(x).flatten(2).transpose(1, 2)))
        tokens = tokens if self.last == "mean" else tokens.transpose(1, 2)
        return getattr(tokens, "sum" if self.last == "sum" else "mean")(self.over, keepdim=self.keep)


@needs_openvino
@pytest.mark.parametrize(
    ("over", "keep", "last"), [(1, False, "mean"), (1, True, "mean"), ((1, 2), False, "mean"), (2, False, "sum")]
)
def test_means_over_tokens_are_right_in_openvino_too(over, keep, last, tmp_path):
    """Reading the file itself, its integer kernels give zeros for them where tensors have three axes."""
    images = cases.images(8)
    model = bw.quantize(Tokens(over, keep, last).eval(), images, "rtn", weights=8)
    assert model.export(tmp_path / "m.onnx", images).passed
    with torch.no_grad():
        expected = model(images)
    found = torch.from_numpy(np.array(compile_model(tmp_path / "m.onnx", EXACT)([images.numpy()])[0]))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@needs_openvino
def test_a_signal_finds_its_stack_after_several_models_are_gone(tmp_path):
    """OpenVINO leaves the process a stack for signals whose memory is gone. Run in a process that may die of it."""
    quantized("residual").export(tmp_path / "m.onnx", cases.images(4))
    code = (
        "import gc, signal, sys; from pathlib import Path; from bitwright.runtimes.openvino import compile_model\n"
        "first, second = (compile_model(Path(sys.argv[1])) for _ in range(2))\n"
        "del first; gc.collect(); del second; gc.collect()\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard')); signal.raise_signal(signal.SIGINT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.onnx"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
