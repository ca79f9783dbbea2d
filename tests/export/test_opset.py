"""The lowest version of ONNX's operators: as many integer kernels as with a newer one, and the same answers."""

import cases
import numpy as np
import onnx
import pytest
import torch

import bitwright as bw
from bitwright.export import onnx as exporter
from bitwright.export.onnx import opset, to_onnx
from bitwright.runtimes.onnxruntime import session
from bitwright.runtimes.session import save_onnx
from bitwright.speed.kernels import kernels


def quantized(name, **settings):
    return bw.quantize(cases.model(name), cases.dataset(), "rtn", scheme=bw.Scheme(**settings))


@pytest.mark.parametrize(
    ("name", "settings", "version"),
    [
        ("residual", {}, 18),
        ("residual", {"weights": 5, "activations": 6, "granularity": "tensor"}, 18),
        ("residual", {"weights": "float"}, 18),
        ("transformer", {}, 20),  # it has a GELU
        ("residual", {"weights": 4}, 21),
        ("residual", {"activations": 16}, 21),
        ("residual", {"weights": 2}, 25),
        ("residual", {"weights": 2, "runtime": "openvino"}, 21),
        ("residual", {"granularity": "group", "group_size": 2}, 21),
    ],
)
def test_files_ask_for_no_more_than_they_need(name, settings, version, tmp_path):
    model = quantized(name, **settings)
    assert opset(model) == version
    save_onnx(to_onnx(model), tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)  # types that the version lacks fail here
    file = onnx.load(tmp_path / "m.onnx")
    assert {o.domain: o.version for o in file.opset_import} == {"": version}
    released = {release[2]: release[1] for release in onnx.helper.VERSION_TABLE}
    assert file.ir_version <= released[version]


SOME = ("residual", "transformer")
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in cases.CASES if n not in SOME]


@pytest.mark.parametrize("name", [*SOME, *OTHERS])
def test_an_older_version_has_the_same_kernels_and_answers(name, monkeypatch, tmp_path):
    model = quantized(name)
    version, found, answers = opset(model), [], []
    for chosen in (version, 21):
        monkeypatch.setattr(exporter, "opset", lambda *_, v=chosen: v)
        program = to_onnx(model)
        save_onnx(program, tmp_path / f"{chosen}.onnx")
        found.append(kernels(tmp_path / f"{chosen}.onnx"))
        with session(program, optimize=True) as runtime:
            answers.append(runtime.run(None, {"images": cases.images().numpy()}))
    assert found[0] == found[1]
    for a, b in zip(*answers, strict=True):
        assert np.array_equal(a, b)


def test_a_gelu_in_parts_is_not_one_kernel(monkeypatch, tmp_path):
    """Why such files ask for 20. If this fails, the runtime joins them, and 18 will do."""
    model = bw.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU()).eval(), cases.dataset(), "rtn")
    monkeypatch.setattr(exporter, "opset", lambda *_: 18)
    save_onnx(to_onnx(model), tmp_path / "m.onnx")
    assert "Erf" in kernels(tmp_path / "m.onnx")
