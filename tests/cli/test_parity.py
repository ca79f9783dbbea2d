"""`bitwright parity`: the figures against ones computed here, and everything that can be wrong with a run."""

import hashlib
import json
import shutil

import cases
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import bitwright as bw
from bitwright.cli import main
from bitwright.export.gap import output_gaps
from bitwright.runtimes.record import Runtime

MODEL = """
import torch
from torch import nn

PREPROCESSING = {"input_size": (3, 8, 8), "mean": 0.5, "std": 0.25}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x + torch.relu(self.conv(x))).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net().eval()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network, images and a run of it."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "net.py").write_text(MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    arguments = ["quantize", f"{folder}/net.py:build", f"{folder}/images.npz", "--recipe", "mse"]
    assert main([*arguments, "--out", str(folder / "run")]) == 0
    return folder


def test_outputs_that_no_image_changes(tmp_path, capsys):
    x = cases.images(10)
    folder = bw.quantize(cases.model("anchors"), x, "rtn").save(tmp_path / "run", onnx=True)
    np.savez(tmp_path / "x.npz", images=x.numpy())
    assert main(["parity", str(folder), str(tmp_path / "x.npz"), "--runtime", "onnxruntime", "--json"]) == 0
    for at in json.loads(capsys.readouterr().out)["runtimes"][0]["batches"]:
        found = {output["name"]: output["max_abs"] for output in at["outputs"]}
        assert found.keys() == {"boxes", "scores", "stride"}
        assert found["boxes"] == found["stride"] == 0


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that may be spoiled."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def call(capsys, *arguments):
    """Exit code, JSON on stdout if any, the last line on stderr."""
    capsys.readouterr()
    code = main(["parity", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err.strip().splitlines()[-1] if err.strip() else ""


def error(capsys, *arguments, code=2):
    found, out, line = call(capsys, *arguments)
    assert found == code
    assert code == 1 or out is None
    assert line.startswith("error: ")
    return line


def forget_checksums(run):
    """As a run of an earlier version: no sha256 in it."""
    result = json.loads((run / "result.json").read_text())
    del result["files"]
    (run / "result.json").write_text(json.dumps(result))


def test_the_two_figures_are_those_computed_here(made, run, capsys):
    code, found, _ = call(capsys, run, "--float", made / "net.py:build")
    assert code == 0
    pixels = np.load(made / "images.npz")["images"]
    images = ((pixels / 255.0 - 0.5) / 0.25).transpose(0, 3, 1, 2).astype(np.float32)
    namespace = {}
    exec(MODEL, namespace)
    with torch.no_grad():
        theirs = namespace["build"]()(torch.from_numpy(images)).double().numpy()
        ours = bw.load(run)(torch.from_numpy(images)).double().numpy()
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    shipped = session.run(None, {"images": images})[0].astype(np.float64)
    assert found["images"]["count"] == 20
    assert [b["batch"] for b in found["runtimes"][0]["batches"]] == [1, 8]
    rows = [(found["quantization"][0], theirs, ours)]
    rows += [(b["outputs"][0], ours, shipped) for b in found["runtimes"][0]["batches"]]
    for row, a, b in rows:
        cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        expected = {
            "max_abs": np.abs(a - b).max(),
            "mean_abs": np.abs(a - b).mean(),
            "range": np.ptp(a),
            "cosine": cosine.mean(),
            "agreement": (a.argmax(1) == b.argmax(1)).mean(),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert found["quantization"][0]["mean_abs"] > 100 * found["runtimes"][0]["batches"][0]["outputs"][0]["mean_abs"]


def test_what_is_written_is_what_is_said(run, capsys):
    code, found, _ = call(capsys, run, "--batch", "3")
    assert code == 0
    assert found.pop("warnings") == []
    assert json.loads((run / "parity.json").read_text()) == found
    names = [layer["name"] for layer in found["layers"]]
    assert names == ["input", "relu", "relu_1", "add", "mean"]
    assert {x["kernel"] for x in found["layers"]} == {"float", "QLinearConv", "QLinearAdd"}
    for row in found["operators"]:
        layers = [x for x in found["layers"] if (x["operator"], x["found"]) == (row["operator"], row["found"])]
        assert row["layers"] == len(layers)
        assert row["count"] == sum(x["count"] for x in layers)
    assert all(x["reference_runtime"]["differing"] == 0 for x in found["layers"] if x["found"] != "float")


def test_people_read_a_table(run, capsys):
    assert main(["parity", str(run)]) == 0
    out = capsys.readouterr().out
    for said in ("loss from quantization", "gap of the runtime", "conv2d relu", "QLinearConv", "computes what was"):
        assert said in out


def test_a_file_with_another_scale_is_refused_and_its_layer_named(run, capsys):
    forget_checksums(run)
    model = onnx.load(run / "model.onnx")
    scale = next(i for i in model.graph.initializer if i.name.endswith("weight_conv/scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.05), scale.name))
    onnx.save(model, run / "model.onnx")
    line = error(capsys, run, code=1)
    assert "relu_1 is the first to differ" in line
    assert json.loads((run / "parity.json").read_text())["first_divergence"] == "relu_1"


def test_a_missing_file_is_named(run, capsys):
    (run / "model.onnx").unlink()
    assert "found none. Write it with: bitwright export" in error(capsys, run)
    shutil.rmtree(run)
    assert "does not exist" in error(capsys, run)


def test_a_missing_model_is_named(run, capsys):
    (run / "model.safetensors").unlink()
    assert "Expected model.safetensors" in error(capsys, run)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
@pytest.mark.parametrize("known", [True, False])
def test_a_file_cut_short_is_named(run, capsys, name, known):
    if not known:
        forget_checksums(run)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2])
    line = error(capsys, run)
    assert f"{name} is damaged" in line
    assert ("sha256" in line) == known


def test_one_changed_byte_is_found_when_loading(run):
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(bw.UsageError, match="sha256"):
        bw.load(run)


def test_the_result_holds_the_checksums(made, run, capsys):
    def expected():
        names = ("model.safetensors", "model.onnx")
        return {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names}

    assert json.loads((run / "result.json").read_text())["files"] == expected()
    (run / "model.onnx").write_bytes(b"")
    assert main(["export", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["files"] == expected()
    assert call(capsys, run)[0] == 0
    model = bw.load(run)
    model.result = {}  # goes into the file
    model.export(run / "model.onnx", np.load(made / "images.npz")["images"].transpose(0, 3, 1, 2) / np.float32(255))
    assert json.loads((run / "result.json").read_text())["files"] == expected()


def test_a_file_of_another_tool_is_refused(run, capsys):
    forget_checksums(run)
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", 3, 8, 8]) for n in ("images", "out")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["out"])], "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph, producer_name="elsewhere"), run / "model.onnx")
    line = error(capsys, run)
    assert "to be written by bitwright" in line
    assert "elsewhere" in line


def test_an_unfinished_run_and_other_folders(run, capsys, tmp_path):
    (run / "state").mkdir()
    (run / "result.json").unlink()
    assert "--resume" in error(capsys, run)
    (tmp_path / "empty").mkdir()
    assert "result.json" in error(capsys, tmp_path / "empty")
    (run / "result.json").write_text('{"model": ')
    assert "damaged" in error(capsys, run)


def test_a_runtime_that_is_not_there(run, capsys, monkeypatch):
    monkeypatch.setattr(Runtime, "installed", property(lambda self: self.name == "onnxruntime"))
    assert error(capsys, run, "--runtime", "openvino").endswith("pip install openvino")
    assert "onnxruntime, openvino" in error(capsys, run, "--runtime", "tensorrt")
    _, found, _ = call(capsys, run)
    assert found["absent"] == [{"runtime": "openvino", "install": "pip install openvino"}]


def test_wrong_numbers_are_refused(run, capsys):
    assert "--batch" in error(capsys, run, "--batch", "0")
    assert "--samples" in error(capsys, run, "--samples", "0")
    assert error(capsys, run, "no/such/folder")


def test_without_the_float_network_what_was_recorded_is_told(run, capsys):
    result = json.loads((run / "result.json").read_text())
    result["model"]["reference"] = "/nowhere/net.py:build"
    (run / "result.json").write_text(json.dumps(result))
    code, found, _ = call(capsys, run)
    assert code == 0
    assert found["quantization"] is None
    assert found["quantization_recorded"] == result["fidelity"]
    assert "/nowhere/net.py" in found["float_network"]
    assert "/nowhere" in error(capsys, run, "--float", "/nowhere/net.py:build")


def test_images_of_the_run_that_are_gone(run, capsys):
    result = json.loads((run / "result.json").read_text())
    for what in ("calibration", "evaluation"):
        result["data"][what]["source"] = "/nowhere/images.npz"
    (run / "result.json").write_text(json.dumps(result))
    assert "Give others with IMAGES" in error(capsys, run)


def test_dense_outputs_agree_by_pixel():
    a = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]]])  # one image, two classes, two pixels: classes 0 and 1
    b = torch.tensor([[[[1.0, 4.0]], [[0.0, 3.0]]]])  # 0 and 0
    (row,) = output_gaps(["map"], [a.double()], [b.double()])
    assert (row.agreement, row.max_abs, row.mean_abs, row.range) == (0.5, 2.0, 0.5, 3.0)


def test_openvino_is_compared_in_float32(run, capsys, monkeypatch):
    """Its default on processors with bfloat16 is said in a warning, and fails no file."""
    openvino = pytest.importorskip("openvino")
    asked = []
    compile_model = openvino.Core.compile_model

    def compiled(self, model, device="CPU", config=None):
        asked.append(config or {})
        return compile_model(self, model, device, config or {})

    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    code, found, _ = call(capsys, run, "--runtime", "openvino")
    assert code == 0
    assert asked[0]["INFERENCE_PRECISION_HINT"] == "f32"
    for batch in found["runtimes"][0]["batches"]:
        assert batch["outputs"][0]["mean_abs"] < 1e-3 * batch["outputs"][0]["range"]
    assert all("INFERENCE_PRECISION_HINT" in line for line in found["warnings"])
