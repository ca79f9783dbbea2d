"""Networks of several inputs, and of inputs and outputs by name: captured, quantized, kept and written as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import images, node, weights, write
from torch import Tensor, nn

import bitwright as bw
from bitwright.cli import main
from bitwright.errors import DataError, ModelError, UsageError
from bitwright.given.images import load_images
from bitwright.given.several import side_by_side
from bitwright.runtimes.openvino import OpenvinoSession, openvino
from bitwright.stages.augment import Views

MAP = (3, 8, 8)


class Siamese(nn.Module):
    """Two images through one trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(12, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.trunk(left), self.trunk(right)], 1))


class WithNumbers(nn.Module):
    """An image and five numbers beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.head = nn.Conv2d(3, 6, 3), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head((self.conv(image).relu().mean((2, 3)) + self.linear(numbers)).relu())}


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class Transformerlike(nn.Module):
    """As the models of transformers: everything is optional, the answer is a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, input_ids: Any = None, pixel_values: Any = None, labels: Any = None) -> Answer:
        return Answer(self.head(self.conv(pixel_values).relu().mean((2, 3))))


def pair(count: int = 8) -> dict[str, Tensor]:
    """Images of which one is five times as large as the other."""
    return {"left": images(count, MAP), "right": 5 * images(count, MAP, seed=2)}


def in_runtime(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {i.name: i.shape for i in session.get_inputs()} == {k: ["batch", *v.shape[1:]] for k, v in inputs.items()}
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


@pytest.fixture(scope="module")
def siamese() -> tuple[nn.Module, bw.QuantizedModel]:
    net = Siamese().eval()
    return net, bw.quantize(net, pair(), "rtn")


def test_every_input_has_its_own_grid_and_its_name(siamese: tuple[nn.Module, bw.QuantizedModel]) -> None:
    net, model = siamese
    scales = {r.name: float(model.quantizer(str(r.activation)).scale) for r in model.layers if r.op == "input"}
    assert scales.keys() == {"left", "right"}
    assert 3 < scales["right"] / scales["left"] < 8
    assert {r.name for r in model.layers if r.weight} == {"trunk.0", "trunk.0_1", "head"}
    assert set(dict(net.named_modules())) == set(dict(Siamese().named_modules()))  # nothing is left in the user's own
    x = pair(3)
    torch.testing.assert_close(model(x), net(**x), atol=0.03, rtol=0.03)
    found = model.evaluate({**pair(), "labels": torch.arange(8) % 4})
    assert 0 <= found["quantized"]["top1"] <= 1
    with pytest.raises(DataError, match=r"Expected inputs left \(3, 8, 8\), right .*found left"):
        model({"left": x["left"]})


def test_a_run_and_its_file_have_the_inputs(siamese: tuple[nn.Module, bw.QuantizedModel], tmp_path: Path) -> None:
    _, model = siamese
    x = pair(5)
    folder = model.save(tmp_path / "run", onnx=True)
    assert torch.equal(bw.load(folder)(x), model(x))
    torch.testing.assert_close(in_runtime(folder / "model.onnx", x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="Expected a network of one input for to='tables', found left, right"):
        model.export(tmp_path / "model.json", to="tables")
    found = bw.bench(folder, runtimes=["onnxruntime"], batches=(2,), threads=(1,), seconds=0.01)
    assert found["rows"][0]["quantized"]["count"] >= 5


def test_other_formats_take_several_inputs_too(siamese: tuple[nn.Module, bw.QuantizedModel], tmp_path: Path) -> None:
    _, model = siamese
    x, mixed = pair(5), {"image": images(5, MAP), "numbers": images(5, (5,), seed=3)}
    model.export(tmp_path / "model.pt2", to="pt2")
    written = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(written(**x), model(x))
    flat = bw.quantize(WithNumbers().eval(), mixed, "rtn")
    flat.export(tmp_path / "flat.pt2", to="pt2")
    written = torch.export.load(tmp_path / "flat.pt2").module()
    assert torch.equal(written(**mixed)["scores"], flat(mixed)["scores"])
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model.export(tmp_path / "model.xml", to="openvino")
    session = OpenvinoSession(openvino().Core().read_model(str(tmp_path / "model.xml")))
    (found,) = session.run(None, {name: value.numpy() for name, value in x.items()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("network", [Siamese(), WithNumbers()])
def test_a_saved_program_takes_several_inputs(network: nn.Module, tmp_path: Path) -> None:
    x = pair() if isinstance(network, Siamese) else {"image": images(8, MAP), "numbers": images(8, (5,), seed=3)}
    batch = torch.export.Dim("batch")
    program = torch.export.export(network.eval(), (), x, dynamic_shapes={name: {0: batch} for name in x})
    torch.export.save(program, tmp_path / "net.pt2")
    np.savez(tmp_path / "x.npz", **{name: value.numpy() for name, value in x.items()})
    there = bw.quantize(network, x, "rtn")
    here = bw.quantize(str(tmp_path / "net.pt2"), str(tmp_path / "x.npz"), "rtn")
    assert [(r.name, r.op) for r in here.layers] == [(r.name, r.op) for r in there.layers]
    for found, expected in zip(here.flat(side_by_side(x)[0]), there.flat(side_by_side(x)[0]), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ModelError, match=r"Expected inputs .*, which the network takes, found a, b"):
        bw.quantize(str(tmp_path / "net.pt2"), load_images({"a": x[min(x)], "b": x[max(x)]}, None, inputs=["a", "b"]))


def test_inputs_of_other_shapes_come_in_a_loader_of_dicts(tmp_path: Path) -> None:
    x = {"image": images(8, MAP), "numbers": images(8, (5,), seed=3)}
    batches = [{**{k: v[i : i + 4] for k, v in x.items()}, "labels": torch.arange(4)} for i in (0, 4)]
    model = bw.quantize(WithNumbers().eval(), batches, "rtn")
    assert [r.name for r in model.layers if r.op == "input"] == ["image", "numbers"]
    assert "top1" in model.evaluate(batches)["quantized"]
    model.export(tmp_path / "model.onnx")
    torch.testing.assert_close(in_runtime(tmp_path / "model.onnx", x), model(x)["scores"], atol=1e-5, rtol=1e-5)
    views = Views(load_images(x, None, inputs=list(x)), draws=2)
    assert torch.equal(views.batch([9]), views.batch([1]))  # cut as an image, both inputs would be lost


def test_a_transformer_takes_its_pixels_by_name() -> None:
    x = images(8, MAP)
    batches = [{"pixel_values": x[i : i + 4], "labels": torch.arange(4)} for i in (0, 4)]
    net = Transformerlike().eval()
    model = bw.quantize(net, batches, "rtn")
    assert model.outputs == ("logits",)
    torch.testing.assert_close(model(x)["logits"], net(pixel_values=x).logits, atol=0.03, rtol=0.03)
    assert model.evaluate(batches)["quantized"].keys() == {"top1", "top1_ci"}


def test_inputs_without_names_go_by_their_order() -> None:
    x = pair(4)
    net = Siamese().eval()
    model = bw.quantize(net, [((x["left"], x["right"]), torch.arange(4))], "rtn")
    torch.testing.assert_close(model(x), net(**x), atol=0.03, rtol=0.03)


def test_wrong_inputs_are_said_in_one_line(tmp_path: Path) -> None:
    x = pair()
    with pytest.raises(DataError, match=r"Expected one entry of images in each dict .* left .* other"):
        bw.quantize(nn.Conv2d(3, 4, 1).eval(), {"left": x["left"], "other": x["right"]}, "rtn")
    np.savez(tmp_path / "x.npz", a=x["left"].numpy())
    with pytest.raises(DataError, match=r"Expected an array 'images', or inputs left, right, in .* found a"):
        bw.quantize(Siamese().eval(), str(tmp_path / "x.npz"), "rtn")
    np.savez(tmp_path / "x.npz", left=x["left"].numpy(), rihgt=x["right"].numpy())
    with pytest.raises(DataError, match=r"Expected inputs left, right in .* found left, rihgt\. Name them"):
        bw.quantize(Siamese().eval(), str(tmp_path / "x.npz"), "rtn")
    others = load_images(x, None, inputs=list(x))
    with pytest.raises(ModelError, match="Expected inputs image, numbers, which the network takes, found left, right"):
        bw.quantize(WithNumbers().eval(), others, "rtn")
    with pytest.raises(DataError, match="as many images each"):
        side_by_side({"left": torch.zeros(2, 3), "right": torch.zeros(3, 3)})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A file of two images, and an ``.npz`` of them."""
    depth = helper.make_tensor_value_info("depth", TensorProto.FLOAT, ["some", 1, 8, 8])
    nodes = [
        node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Conv", "depth v", "d"), node("Relu", "d", "e"),
        node("Add", "r e", "a"), node("GlobalAveragePool", "a", "g"), node("Flatten", "g", "f"), node("Gemm", "f h"),
    ]  # fmt: skip
    stored = {"w": weights(4, 3, 3, 3), "v": weights(4, 1, 3, 3, seed=1), "h": weights(4, 6, seed=2)}
    x = {"depth": images(12, (1, 8, 8), seed=3), "x": images(12, MAP)}
    np.savez(tmp_path / "two.npz", labels=np.arange(12) % 6, **{k: v.numpy() for k, v in x.items()})
    return write(tmp_path / "two.onnx", nodes, ("some", *MAP), stored, more_inputs=[depth])


def test_an_onnx_file_of_two_inputs_on_the_command_line(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(two.with_name("run")), str(two.with_suffix(".npz"))
    assert main(["quantize", str(two), data, "--recipe", "rtn", "--evaluate", data, "--out", run, "--no-images"]) == 0
    written = onnx.load(f"{run}/model.onnx").graph.input
    assert {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in written} == {"x": "some", "depth": "some"}
    assert main(["evaluate", f"{run}/model.onnx", data, "--float", str(two)]) == 0
    assert "same answer as float" in capsys.readouterr().out
    assert main(["parity", run, data, "--runtime", "onnxruntime"]) == 0
    assert "No code differs" in capsys.readouterr().out
    np.savez(two.with_name("odd.npz"), x=np.zeros((2, 3, 6, 8), np.float32), depth=np.zeros((2, 1, 8, 8), np.float32))
    np.savez(two.with_name("pixels.npz"), x=np.zeros((2, 3, 8, 8), np.uint8), depth=np.zeros((2, 1, 8, 8), np.float32))
    for name, said in (("odd", "found x [3x6x8], depth [1x8x8] in"), ("pixels", "found depth [1x8x8] in")):
        assert main(["evaluate", f"{run}/model.onnx", str(two.with_name(f"{name}.npz")), "--input-size", "8"]) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert said in shown
        assert "an array of floats for each" in shown
    with pytest.raises(ModelError, match=r"Expected inputs x, depth, which .* takes, found images alone"):
        bw.quantize(str(two), images(4, MAP), "rtn")


class Echo(nn.Module):
    """Outputs with the names of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, image: Tensor, meta: Tensor) -> dict[str, Tensor]:
        seen = self.conv(image).mean((2, 3))
        return {"sum": seen + self.linear(meta), "meta": meta * 2, "image": seen, "image_out": seen + 1}


def test_outputs_named_as_inputs_get_names_of_their_own_in_the_file(tmp_path: Path) -> None:
    given = {"image": torch.randn(6, 3, 8, 8), "meta": torch.randn(6, 5)}
    made = bw.quantize(Echo().eval(), given, "rtn")
    made.export(tmp_path / "model.onnx", made.calibration)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [value.name for value in session.get_outputs()] == ["sum", "meta_out", "image_out_out", "image_out"]
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    for value, expected in zip(found, made(given).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_network_is_refused_with_the_remedy_at_the_door() -> None:
    """Python does not know the names of its inputs."""
    network = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ModelError, match="Give the module that was passed to"):
        bw.quantize(network, torch.zeros(4, 3, 8, 8), "rtn")
