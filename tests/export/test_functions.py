"""SiLU is one operator of the file, which says what it means to readers that do not know it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.export.onnx import to_onnx
from bitwright.quantized import QuantizedModel
from bitwright.runtimes.session import save_onnx
from bitwright.speed.kernels import kernels


class Gated(nn.Module):
    """Two convolutions with SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.first(x))
        return nn.functional.silu(self.last(x)).mean((2, 3))


def quantized(runtime: str = "onnxruntime") -> QuantizedModel:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    return bw.quantize(Gated(), images, "rtn", runtime=runtime, device="cpu")


def written(model: QuantizedModel, folder: Path) -> Path:
    path = folder / "model.onnx"
    save_onnx(to_onnx(model), path)
    return path


def test_the_file_defines_what_onnx_runtime_has_a_kernel_for(tmp_path: Path) -> None:
    path = written(quantized(), tmp_path)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [n.op_type for n in file.graph.node].count("QuickGelu") == 2
    assert not {"Sigmoid"} & {n.op_type for n in file.graph.node}
    assert [n.op_type for n in file.functions[0].node] == ["Sigmoid", "Mul"]
    assert kernels(path)["QuickGelu"] == 2


def test_a_reader_that_puts_the_function_in_place_computes_the_same(tmp_path: Path) -> None:
    known = onnx.load(written(quantized(), tmp_path))
    unknown = onnx.load(tmp_path / "model.onnx")
    for named in [*unknown.graph.node, *unknown.functions, *unknown.opset_import]:
        named.domain = "elsewhere" if named.domain else ""  # for which no runtime has a kernel
    torch.testing.assert_close(run(unknown), run(known), rtol=1e-5, atol=1e-6)


def run(file: onnx.ModelProto) -> Tensor:
    images = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images})[0])


@pytest.mark.parametrize("runtime", ["openvino", "generic"])
def test_other_runtimes_are_given_standard_operators_alone(runtime: str, tmp_path: Path) -> None:
    file = onnx.load(written(quantized(runtime), tmp_path))
    assert not file.functions
    assert [o.domain for o in file.opset_import] == [""]
