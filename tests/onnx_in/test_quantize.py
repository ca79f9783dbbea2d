"""An ONNX file through the whole job: the same file comes out, in integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import images, in_runtime, node, weights, write
from onnxruntime import InferenceSession
from PIL import Image

import bitwright as bw
from bitwright.bits.goal import Goal
from bitwright.cli import main
from bitwright.errors import DataError, ModelError, UsageError
from bitwright.given.images import load_images
from bitwright.given.models import load_model
from bitwright.graph.capture import capture
from bitwright.graph.outputs import Interface
from bitwright.graph.prepare import prepare
from bitwright.graph.student import insert_quantizers
from bitwright.onnx_in.source import OnnxFile
from bitwright.onnx_in.tail import Tail
from bitwright.quant.scheme import Scheme

CLASSIFIER = [
    node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Conv", "t w b", "stem/conv:0", strides=[2, 2]),
    node("Clip", "stem/conv:0 c0 c6", "stem/act:0"), node("Conv", "stem/act:0 v", "body/conv:0", strides=[2, 2]),
    node("Relu", "body/conv:0", "body/act:0"), node("GlobalAveragePool", "body/act:0", "p"), node("Flatten", "p", "f"),
    node("Gemm", "f g", "scores:0", transB=1),
]  # fmt: skip
STORED = {
    "w": weights(6, 1, 3, 3), "b": weights(6), "v": weights(8, 6, 3, 3, seed=1), "g": weights(10, 8, seed=2),
    "c0": np.float32(0), "c6": np.float32(6),
}  # fmt: skip


Said = pytest.CaptureFixture[str]


def bitwright(capsys: Said, *arguments: str) -> str:
    """What a command shows."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A network of [1, 28, 28, 1] with slashes in its names, as converters from TensorFlow write them."""
    path = write(tmp_path / "tiny.onnx", CLASSIFIER, (1, 28, 28, 1), STORED, opset=11, outputs="scores:0")
    program = onnx.load(path)
    helper.set_model_props(program, {"author": "somebody"})
    onnx.save(program, path)
    return path


def test_the_command_line_writes_the_same_file_in_integers(classifier: Path, tmp_path: Path, capsys: Said) -> None:
    run = tmp_path / "run"
    options = ["--mean", "0.3", "--std", "0.3", "--recipe", "rtn", "--rule", "body/*=w8a8", "--weights", "4"]
    bitwright(capsys, "quantize", str(classifier), "zoo:fashion[:8]", *options, "--out", str(run))
    program = onnx.load(run / "model.onnx")
    assert [v.name for v in program.graph.input] == ["x"]
    assert [v.name for v in program.graph.output] == ["scores:0"]
    assert [d.dim_value for d in program.graph.input[0].type.tensor_type.shape.dim][1:] == [28, 28, 1]
    made = {n.name: n.output[0] for n in program.graph.node if n.op_type == "Conv"}
    assert made == {"Conv_stem/conv:0": "stem/conv:0", "Conv_body/conv:0": "body/conv:0"}
    assert {"w/integers", "w/scale", "v/integers", "g/integers"} <= {t.name for t in program.graph.initializer}
    assert "None" not in {name for n in program.graph.node for name in (n.name, *n.output)}
    assert {p.key: p.value for p in program.metadata_props}["author"] == "somebody"
    result = json.loads((run / "result.json").read_text())
    assert result["model"]["sha256"] == OnnxFile.read(classifier).sha256
    bits = {row["name"]: row["weight_bits"] for row in result["layers"] if row["weight_bits"]}
    assert bits == {"stem_conv:0": 4, "body_conv:0": 8, "scores:0": 4}
    found = bw.load(run)
    data = load_images("zoo:fashion[8:12]", found.preprocessing).batch(range(4))
    assert data.shape == (4, 28, 28, 1)
    (theirs,) = in_runtime(run / "model.onnx", data, one_by_one=False)
    torch.testing.assert_close(found(data), theirs, atol=0.05, rtol=0.05)
    for what in (run, run / "model.onnx"):
        said = bitwright(capsys, "evaluate", str(what), "zoo:fashion-test[:4]", "--json")
        assert "top1" in json.loads(said)["quantized"]


def test_every_verb_takes_it(classifier: Path, tmp_path: Path, capsys: Said) -> None:
    reading = ["--mean", "0.3", "--std", "0.3"]
    assert "body_act:0" in bitwright(capsys, "inspect", str(classifier))
    options = ["--eigenvalues", "0", "--out", str(tmp_path)]
    bitwright(capsys, "sensitivity", str(classifier), "zoo:fashion[:4]", *reading, *options)
    assert (tmp_path / "sensitivity.json").is_file()


def test_nobody_guesses_how_values_are_scaled(classifier: Path) -> None:
    with pytest.raises(DataError, match="the model brings none"):
        bw.quantize(str(classifier), "zoo:fashion[:4]", "rtn")


def test_python_takes_tensors_in_the_files_own_order(classifier: Path, tmp_path: Path) -> None:
    x = images(4, (28, 28, 1))
    how = bw.Preprocessing(input_size=(1, 28, 28), layout="channels_last")
    quantized = bw.quantize(classifier, x, "rtn", preprocessing=how)
    assert quantized(x).shape == (4, 10)
    for same in (x, x.numpy(), list(x), list(x.split(2))):
        other = bw.quantize(str(classifier), same, "rtn")
        assert torch.equal(other(x), quantized(x))
        assert other.evaluate(same)["fidelity"]["sqnr_db"] > 20
    assert other.export(tmp_path / "model.onnx", x.numpy()).images == 4
    with pytest.raises(ModelError, match=r"of 28x28x1 for .*, found 1x28x28. Give images.permute\(0, 2, 3, 1\)."):
        bw.quantize(classifier, x.permute(0, 3, 1, 2), "rtn")
    assert [layer.name for layer in quantized.layers if layer.weight] == ["stem_conv:0", "body_conv:0", "scores:0"]


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        ((10,), (12,), r"vectors of 10 for .*, found 12. Give an array of floats \(N, 10\)."),
        ((3, 24), (3, 20), r"signals of 3x24 for .*, found 3x20. Give an array of floats \(N, 3, 24\)."),
        ((1, 24, 3), (3, 1, 24), r"images of 1x24x3 for .*Give images.permute\(0, 2, 3, 1\)."),
        ((3, 1, 24), (1, 24, 3), r"images of 3x1x24 for .*Give images.permute\(0, 3, 1, 2\)."),
        ((3, 8, 8), (3, 8, 9), r"images of 3x8x8 for .*Give preprocessing= with the size"),
    ],
)
def test_shapes_that_a_file_does_not_take(
    shape: tuple[int, ...], given: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w")]
    path = write(tmp_path / "tiny.onnx", nodes, ("N", *shape), {"w": weights(int(np.prod(shape)), 4)})
    with pytest.raises(ModelError, match=said):
        bw.quantize(str(path), images(4, given), "rtn")


def test_a_preprocessing_that_says_no_size_takes_that_of_the_file(classifier: Path) -> None:
    how = bw.Preprocessing(mean=0.3, std=0.3)
    quantized = bw.quantize(classifier, "zoo:fashion[:8]", "rtn", preprocessing=how)
    assert quantized.preprocessing == bw.Preprocessing(
        mean=0.3, std=0.3, input_size=(1, 28, 28), layout="channels_last"
    )


def exported(name: str, folder: Path) -> Path:
    module = load_model(f"zoo:{name}").module
    assert isinstance(module, torch.nn.Module)
    path = folder / f"{name}.onnx"
    batch = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.zeros(2, 1, 28, 28),)
    torch.onnx.export(
        module, example, path, dynamo=True, opset_version=18, dynamic_shapes=batch, verbose=False, external_data=False
    )
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["multi_head", "squeeze_excite"])
def test_a_tiny_network_that_pytorch_exported_gives_the_same_integers(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "tiny.onnx", cases.images(4)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        cases.model(name), (x,), path, dynamo=True, opset_version=18, dynamic_shapes=batch, verbose=False
    )  # fmt: skip
    there, back = bw.quantize(cases.model(name), x, "rtn"), bw.quantize(str(path), x, "rtn")
    torch.testing.assert_close(there(x), back(x), atol=0.02, rtol=0.02)
    rows = [[(r["weight_bits"], r["activation_bits"], r["macs"]) for r in q.result["layers"]] for q in (there, back)]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_vit"])
def test_a_network_that_pytorch_exported_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    path = exported(name, tmp_path)
    x = load_images("zoo:fashion[:16]", load_model(f"zoo:{name}").preprocessing).batch(range(16))
    there, back = (bw.quantize(model, x, "mse") for model in (f"zoo:{name}", str(path)))
    keys = ("weight_bits", "activation_bits", "macs")
    bits, same = ([[row[k] for k in keys] for row in q.result["layers"]] for q in (there, back))
    assert bits == same
    a, b = there(x), back(x)
    # the exporter folds batch norms in float32, where bitwright rounds once
    assert float((a - b).abs().max()) <= (0.0 if "vit" in name else 0.02 * float(a.abs().max()))


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """Scores and boxes, then the best three by ``TopK``, as opset 11 has it, of one image at a time."""
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("Conv", "r v", "m"),
        node("Reshape", "m s", "h"), node("ReduceMax", "h", "best", axes=[1], keepdims=0),
        node("TopK", "best k", "scores places", axis=1), node("Unsqueeze", "places", "p1", axes=[1]),
        node("Concat", "p1 p1", "p2", axis=1), node("Slice", "h", "boxes", starts=[0], ends=[2], axes=[1]),
        node("GatherElements", "boxes p2", "chosen", axis=2),
    ]  # fmt: skip
    nodes[8] = node("Slice", "h from to along", "boxes")
    stored = {
        "w": weights(6, 3, 3, 3), "v": weights(4, 6, 1, 1, seed=1), "s": np.asarray([1, 4, 80]), "k": np.asarray([3]),
        "from": np.asarray([0]), "to": np.asarray([2]), "along": np.asarray([1]),
    }  # fmt: skip
    return write(tmp_path / "det.onnx", nodes, (1, 3, 8, 10), stored, opset=11, outputs="scores chosen")


@pytest.mark.filterwarnings("ignore:The last")
def test_what_follows_the_body_is_in_the_file_that_comes_out(detector: Path, tmp_path: Path, capsys: Said) -> None:
    file, x = OnnxFile.read(detector), images(8, (3, 8, 10))
    assert [n.op_type for n in file.body.behind.nodes] == ["TopK", "Unsqueeze", "Concat", "GatherElements"]
    quantized = bw.quantize(str(detector), x, "rtn")
    assert quantized.outputs == ("best", "boxes")
    folder = quantized.save(tmp_path / "run", onnx=True)
    expected = Tail(file.body.frame, batch=1)(list(bw.load(folder).flat(x)))
    scores, chosen = in_runtime(folder / "model.onnx", x, one_by_one=True)
    for k, one in enumerate(expected):
        np.testing.assert_allclose(scores[k : k + 1], one["scores"], atol=0.05)
    assert chosen.shape == (8, 2, 3)
    program = onnx.load(folder / "model.onnx")
    assert [v.name for v in program.graph.output] == ["scores", "chosen"]
    assert {n.op_type for n in program.graph.node} >= {"TopK", "QuantizeLinear", "GatherElements"}
    assert program.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    torch.save(x, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", images=x.numpy())
    bitwright(capsys, "parity", str(folder), str(tmp_path / "x.npz"), "--runtime", "onnxruntime")


@pytest.mark.filterwarnings("ignore:The last")
def test_what_is_chosen_is_part_of_the_network_where_layers_take_it(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "p"), node("Flatten", "p", "f"),
        node("TopK", "f k", "best places", axis=1), node("Gemm", "best v", "z"), node("TopK", "z k", "last which"),
    ]  # fmt: skip
    stored = {"w": weights(6, 3, 3, 3), "v": weights(3, 5, seed=1), "k": np.asarray([3])}
    path = write(tmp_path / "two.onnx", nodes, (1, 3, 8, 10), stored, opset=11, outputs="last which")
    body = OnnxFile.read(path).body
    assert [n.output[0] for n in body.behind.nodes] == ["last"]
    assert body.network.outputs == ("z",)


def test_layers_within_a_branch_take_what_was_chosen_too(tmp_path: Path) -> None:
    def branch(kind: str) -> onnx.GraphProto:
        inner, out = node(kind, "best v" if kind == "Gemm" else "best", "z"), helper.make_empty_tensor_value_info("z")
        return helper.make_graph([inner], kind, [], [out])

    nodes = [
        node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "p"), node("Flatten", "p", "f"),
        node("TopK", "f k", "best places", axis=1),
        node("If", "always", "y", then_branch=branch("Gemm"), else_branch=branch("Relu")),
    ]  # fmt: skip
    stored = {"w": weights(6, 3, 3, 3), "v": weights(3, 5, seed=1), "k": np.asarray([3]), "always": np.asarray(True)}
    body = OnnxFile.read(write(tmp_path / "if.onnx", nodes, (1, 3, 8, 10), stored, opset=11, outputs="y")).body
    assert not body.behind.nodes
    assert body.network.outputs == ("y",)


BOXES = """
import torch

def before(outputs):  # of the network that is quantized
    best, sides = outputs["best"], outputs["boxes"]
    scores, places = best.topk(3, dim=1)
    return _boxes(scores, sides.gather(2, places[:, None].expand(-1, 2, -1)))

def behind(outputs):  # of the file
    return _boxes(*outputs)

def _boxes(scores, sides):
    low = sides.movedim(1, 2).sigmoid() * 4
    corners = [torch.cat([a, a + 4], 1) for a in low]
    return [{"boxes": c, "scores": s.sigmoid(), "labels": torch.zeros(3)} for c, s in zip(corners, scores)]
"""


@pytest.mark.filterwarnings("ignore:The last")
def test_a_detector_is_evaluated_with_what_follows_its_body_and_without(
    detector: Path, tmp_path: Path, capsys: Said
) -> None:
    pytest.importorskip("faster_coco_eval", reason="average precision is computed by faster-coco-eval")
    (tmp_path / "boxes.py").write_text(BOXES)
    space: dict[str, Any] = {}
    exec(BOXES, space)
    x = images(6, (3, 8, 10))
    truth = space["behind"](in_runtime(detector, x, one_by_one=True))
    found = bw.quantize(str(detector), x, "rtn")
    before = found.evaluate(x, [{k: t[k] for k in ("boxes", "labels")} for t in truth], decode=space["before"])
    assert before["float"]["map50"] > 0.95
    folder = found.save(tmp_path / "run", onnx=True)
    (tmp_path / "labels").mkdir()
    rows = [
        "\n".join(f"0 {(a + c) / 20} {(b + d) / 16} {(c - a) / 10} {(d - b) / 8}" for a, b, c, d in t["boxes"].tolist())
        for t in truth
    ]
    for k, row in enumerate(rows):
        (tmp_path / "labels" / f"{k}.txt").write_text(row)
    np.savez(tmp_path / "x.npz", images=x.numpy())
    given = [str(tmp_path / "x.npz"), "--labels", str(tmp_path / "labels"), "--json"]
    for file, least in ((detector, 0.95), (folder / "model.onnx", 0.3)):
        said = bitwright(capsys, "evaluate", str(file), *given, "--decode", f"{tmp_path}/boxes.py:behind")
        assert json.loads(said)["quantized"]["map50"] >= least
    assert json.loads(said)["quantized"]["map50"] == pytest.approx(before["quantized"]["map50"], abs=0.05)


def test_a_function_named_in_the_call_preprocesses(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "pre.py").write_text(
        "import numpy as np, torch\n"
        "def shrink(image): return torch.from_numpy(np.asarray(image.convert('L'), np.float32) / 255)[:, :, None]\n"
    )
    model = load_model(str(classifier), preprocess=f"{tmp_path}/pre.py:shrink")
    data = load_images("zoo:fashion[:2]", model.preprocessing)
    assert data.batch([0, 1]).shape == (2, 28, 28, 1)
    with pytest.raises(UsageError, match="Expected preprocess= or mean=, found both"):
        load_model(str(classifier), preprocess=f"{tmp_path}/pre.py:shrink", mean=0.5)
    with pytest.raises(UsageError, match="'none' in"):
        load_model(str(classifier), preprocess=f"{tmp_path}/pre.py:none")


def test_an_unused_kind_of_number_is_no_surprise(tmp_path: Path) -> None:
    nodes: list[Any] = [node("Conv", "x w", "c"), node("Cast", "c", "h", to=TensorProto.DOUBLE),
                        node("Cast", "h", to=TensorProto.FLOAT)]  # fmt: skip
    path = write(tmp_path / "double.onnx", nodes, ("N", 3, 8, 10), {"w": weights(4, 3, 3, 3)})
    quantized = bw.quantize(str(path), images(4, (3, 8, 10)), "rtn")
    assert quantized(images(4, (3, 8, 10))).dtype == torch.float32


def test_tensors_may_have_any_name(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "outputs"), node("Relu", "outputs", "tensors"), node("Conv", "tensors v", "forward")]
    stored = {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 1, 1)}
    path = write(tmp_path / "names.onnx", nodes, ("N", 3, 8, 10), stored, outputs="forward")
    folder = bw.quantize(str(path), images(4, (3, 8, 10)), "rtn").save(tmp_path / "run", onnx=True)
    found = [n.output[0] for n in onnx.load(folder / "model.onnx").graph.node if n.op_type == "Conv"]
    assert found == ["outputs", "forward"]


NAMED_AS_OURS = {
    "stored beside stored": ("c1", "f", {"v": "w/scale"}),
    "computed beside stored": ("w/integers", "w/zero_point", {}),
    "what files of integers have": ("a0", "x16", {"v": "b0", "g": "code/0"}),
    "an output": ("c1", "f", {"y": "w/scale"}),
    "an input": ("c1", "f", {"x": "w/scale"}),
    "the node of another": ("relu", "conv", {"w": "conv.weight", "v": "relu/weight"}),
}


@pytest.mark.parametrize("case", NAMED_AS_OURS)
def test_names_of_the_file_that_integers_would_have(case: str, tmp_path: Path) -> None:
    first, second, others = NAMED_AS_OURS[case]
    nodes = [node("Conv", "x w", first), node("Relu", first, second), node("Conv", f"{second} v", "d"),
             node("Flatten", "d", "e"), node("Gemm", "e g", "y", transB=1)]  # fmt: skip
    stored = {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 1, 1), "g": weights(5, 4 * 6 * 8)}
    path = renamed(write(tmp_path / "names.onnx", nodes, ("N", 3, 8, 10), stored), others)
    x = images(4, (3, 8, 10))
    quantized = bw.quantize(str(path), x, "rtn", weights=4)
    folder = quantized.save(tmp_path / "run", onnx=True)
    found = onnx.load(folder / "model.onnx").graph
    made = [n.name for n in (*found.input, *found.initializer)] + [n for each in found.node for n in each.output]
    assert sorted(made) == sorted(set(made))
    assert {n.output[0] for n in found.node} >= {first, second} - {"w/zero_point", "x16", "f", "conv"}
    (theirs,) = in_runtime(folder / "model.onnx", x, one_by_one=False)
    torch.testing.assert_close(quantized(x), theirs, atol=0.05, rtol=0.05)


IMAGES = "quantizer_activation_input"


def test_operators_may_have_names_that_those_of_integers_would_have(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "a"), node("Relu", "a", "b"), node("Conv", "b v", "c"), node("Relu", "c", "d"),
             node("TopK", "d k", "y i", axis=-1)]  # fmt: skip
    names = [
        "node_conv2d_1",
        "one",
        "quantizer_weight_v/DequantizeLinear",
        "node_relu",
        f"{IMAGES}/codes/QuantizeLinear",
    ]
    for each, name in zip(nodes, names, strict=True):
        each.name = name
    stored = {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 1, 1), "k": np.asarray([2])}
    path = write(tmp_path / "names.onnx", nodes, ("N", 3, 8, 10), stored, outputs="y")
    x = images(4, (3, 8, 10))
    with pytest.warns(UserWarning, match="TopK"):
        quantized = bw.quantize(str(path), x, "rtn")
    folder = quantized.save(tmp_path / "run", onnx=True)
    (theirs,) = in_runtime(folder / "model.onnx", x, one_by_one=False)
    assert theirs.shape == (4, 4, 6, 2)
    found = {n.name: n.op_type for n in onnx.load(folder / "model.onnx").graph.node}
    assert [found[name] for name in names if name != "one"] == ["Conv", "Conv", "Relu", "TopK"]


def renamed(path: Path, names: dict[str, str]) -> Path:
    """The file with other names of its tensors."""
    program = onnx.load(path)
    graph = program.graph
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for each in graph.node:
        each.input[:] = [names.get(name, name) for name in each.input]
        each.output[:] = [names.get(name, name) for name in each.output]
    onnx.save(program, path)
    return path


def test_outputs_that_are_an_input_or_stored_come_out_as_they_are(tmp_path: Path, capsys: Said) -> None:
    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "y"), node("Mul", "a a", "squares")]
    stored = {"w": weights(4, 3, 3, 3), "a": weights(6)}
    ends = "y x w a squares"
    path, x = write(tmp_path / "ends.onnx", nodes, ("N", 3, 8, 10), stored, outputs=ends), images(4, (3, 8, 10))
    with pytest.warns(UserWarning, match=r"stay as they are: x, w, a, squares\. The network .* ends in y\."):
        quantized = bw.quantize(str(path), x, "rtn")
    folder = quantized.save(tmp_path / "run", onnx=True)
    assert [v.name for v in onnx.load(folder / "model.onnx").graph.output] == ends.split()
    found, expected = (in_runtime(p, x, one_by_one=False) for p in (folder / "model.onnx", path))
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[0], quantized(x), atol=0.05, rtol=0.05)
    np.savez(tmp_path / "x.npz", images=x.numpy())
    bitwright(capsys, "parity", str(folder), str(tmp_path / "x.npz"), "--runtime", "onnxruntime")
    bitwright(capsys, "evaluate", str(folder), str(tmp_path / "x.npz"))
    said = bitwright(
        capsys, "evaluate", str(folder / "model.onnx"), str(tmp_path / "x.npz"), "--float", str(path), "--json"
    )
    assert json.loads(said)["fidelity"]["outputs"].keys() == {"output"}


@pytest.mark.filterwarnings("ignore:The last")
def test_shapes_behind_the_network_follow_the_number_of_images(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"), node("TopK", "c k", "best places"), node("Shape", "x", "s"),
        node("Gather", "s zero", "n"), node("Concat", "n rest", "t", axis=0), node("Reshape", "best t", "y"),
    ]  # fmt: skip
    stored = {"w": weights(4, 3, 3, 3), "k": np.asarray([2]), "zero": np.asarray([0]), "rest": np.asarray([-1])}
    kinds = (TensorProto.FLOAT, TensorProto.INT64)
    path = write(tmp_path / "rows.onnx", nodes, ("N", 3, 8, 10), stored, outputs="y s", kinds=kinds)
    x = images(4, (3, 8, 10))
    folder = bw.quantize(str(path), x, "rtn").save(tmp_path / "run", onnx=True)
    (rows, shape), (expected, _) = (in_runtime(p, x, one_by_one=False) for p in (folder / "model.onnx", path))
    assert rows.shape == expected.shape == (4, 4 * 6 * 2)
    assert shape.tolist() == [4, 3, 8, 10]


def test_weights_are_those_of_the_file_until_they_are_integers(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w", "c", transB=1), node("Relu", "c", "r"),
             node("Gemm", "r v", "d", transB=1), node("Relu", "d")]  # fmt: skip
    stored = {"w": weights(64, 240), "v": weights(64, 64)}
    file = OnnxFile.read(write(tmp_path / "tiny.onnx", nodes, ("N", 3, 8, 10), stored))
    teacher = prepare(capture(file.network, images(2, (3, 8, 10))))
    student = insert_quantizers(teacher, Scheme())
    kept = {array.__array_interface__["data"][0] for array in file.program.stored.values()}
    for graph in (teacher.graph, student.graph):
        assert {t.data_ptr() for t in graph.buffers() if t.numel() > 1000} == kept
    order = [n for n in student.graph.graph.nodes if n.op == "call_module" or "linear" in str(n.target)]
    weighted = [n for n in order if str(n.target).startswith("quantizer_weight")]
    assert len(weighted) == 2
    for n in weighted:  # what it gives is there no longer than it is needed
        between = order[order.index(n) : order.index(next(iter(n.users)))]
        assert all(str(other.target).startswith(("quantizer_weight", "quantizer_bias")) for other in between)


def test_a_network_without_weights_and_its_own_name_for_the_batch(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "r"), node("GlobalAveragePool", "r", "g"), node("Flatten", "g")]
    path = write(tmp_path / "bare.onnx", nodes, ("how_many", 3, 8, 10))
    folder = bw.quantize(str(path), images(8, (3, 8, 10)), "rtn").save(tmp_path / "run", onnx=True)
    found = onnx.load(folder / "model.onnx").graph
    sides = [value.type.tensor_type.shape.dim[0].dim_param for value in (*found.input, *found.output)]
    assert sides == ["how_many", "how_many"]
    assert Interface.read({**bw.load(folder).interface.stored(), "axis": "n"}).axis == "n"


def test_an_output_with_several_rows_for_each_image(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "p"), node("Flatten", "p", "scores"),
        node("Reshape", "c s", "halves"),
    ]  # fmt: skip
    stored = {"w": weights(6, 3, 3, 3), "s": np.asarray([-1, 3, 6, 8])}
    path, x = (
        write(tmp_path / "rows.onnx", nodes, ("N", 3, 8, 10), stored, outputs="scores halves"),
        images(8, (3, 8, 10)),
    )
    found = bw.quantize(str(path), x, "rtn")
    folder = found.save(tmp_path / "run", onnx=True)
    assert [len(output) for output in found.flat(x)] == [8, 16]
    assert found.evaluate(x)["fidelity"]["outputs"]["halves"]["sqnr_db"] > 30
    assert [len(o) for o in in_runtime(folder / "model.onnx", x, one_by_one=False)] == [8, 16]


def annotate(part: Any, text: str) -> None:
    """A description and a note."""
    part.doc_string = f"about {text}"
    added = part.metadata_props.add()
    added.key, added.value = "note", text


def said(part: Any) -> tuple[str, str]:
    """What :func:`annotate` wrote."""
    return part.doc_string, "".join(p.value for p in part.metadata_props if p.key == "note")


@pytest.mark.filterwarnings("ignore:The last")
def test_what_a_file_says_of_itself_stays(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"), node("Relu", "c", "map"), node("GlobalAveragePool", "map", "p"),
        node("Flatten", "p", "f"), node("TopK", "f k", "best places", axis=1),
    ]  # fmt: skip
    stored = {"w": weights(6, 3, 3, 3), "k": np.asarray([3])}
    path = write(tmp_path / "told.onnx", nodes, ("how_many", 3, 8, 10), stored, outputs="best map", opset=17)
    program = onnx.load(path)
    program.producer_name, program.producer_version, program.domain = "somebody", "7", "org.example"
    program.model_version, program.ir_version = 12, 9
    program.opset_import.append(helper.make_opsetid("org.example", 2))
    parts = {"the graph": program.graph, "x": program.graph.input[0], "out": program.graph.output[1]}
    parts |= {n.name: n for n in program.graph.node}
    for name, part in parts.items():
        annotate(part, name)
    program.doc_string = "about all"
    program.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["rows", 3]))
    onnx.save(program, path)
    bw.quantize(str(path), images(8, (3, 8, 10)), "rtn").export(tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    for key in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(found, key) == getattr(program, key)
    assert {(each.domain, each.version) for each in found.opset_import} >= {("org.example", 2), ("", 18)}
    graph = found.graph
    assert [said(part) for part in (graph, graph.input[0], graph.output[1])] == [
        (f"about {name}", name) for name in ("the graph", "x", "out")
    ]
    assert [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == ["rows", 3]
    # an operator that its codes stand for is gone; nobody else gets its name
    assert {n.name: (n.op_type, *said(n)) for n in graph.node if n.doc_string or n.name in parts} == {
        name: (kind, f"about {name}", name)
        for name, kind in {
            "Conv_c": "Conv", "GlobalAveragePool_p": "ReduceMean", "Flatten_f": "Reshape", "TopK_best": "TopK",
        }.items()
    }  # fmt: skip


def test_a_run_through_a_function_names_it_and_does_not_run_it(
    classifier: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pre.py").write_text(
        "import numpy as np, torch\n"
        "def shrink(image): return torch.from_numpy(np.asarray(image.convert('L'), np.float32) / 255)[:, :, None]\n"
    )
    function = str(tmp_path / "pre.py:shrink")
    model = load_model(str(classifier), preprocess=function)
    folder = bw.quantize(model, "zoo:fashion[:4]", "rtn").save(tmp_path / "run", onnx=True)
    for call in (["evaluate", str(folder / "model.onnx")], ["evaluate", str(folder)]):
        assert main([*call, "zoo:fashion-test[:4]"]) == 2
        assert f"Give --preprocess {function} if you trust it" in " ".join(capsys.readouterr().err.split())
    assert "top-1" in bitwright(
        capsys, "evaluate", str(folder / "model.onnx"), "zoo:fashion-test[:4]", "--preprocess", function
    )


NO_MEMORY = {"peak_bytes": 1, "above_start_bytes": 1}


@pytest.fixture(params=[("NonMaxSuppression", 1), ("NonMaxSuppression", "N"), ("TopK", 2)])
def detecting(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Boxes of three pixels at cells, of which the file itself leaves the best: any number of an image, or nine."""
    kind, count = request.param
    cells = np.stack(np.meshgrid(np.arange(10), np.arange(8)), -1).reshape(1, 80, 2).astype(np.float32)
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("Conv", "r v", "m"),
        node("Reshape", "m s", "h"), node("Split", "h parts", "place raw", axis=1),
        node("Transpose", "place", "t", perm=[0, 2, 1]), node("Sigmoid", "t", "within"),
        node("Add", "within cells", "low"), node("Add", "low size", "high"),
        node("Concat", "low high", "boxes", axis=2), node("Sigmoid", "raw", "sure"),
    ]  # fmt: skip
    stored = {
        "w": weights(6, 3, 3, 3), "v": 3 * weights(5, 6, 1, 1, seed=1), "s": np.asarray([0, 5, 80]), "cells": cells / 2,
        "parts": np.asarray([2, 3]), "size": np.float32(3), "nine": np.asarray([9]), "0": np.asarray([0]),
        "1": np.asarray([1]), "2": np.asarray([2]), "3": np.asarray([3]), "one": np.asarray(1), "two": np.asarray(2),
        "overlap": np.float32([0.3]), "least": np.float32([0.5]),
    }  # fmt: skip
    if kind == "TopK":
        nodes += [
            node("ReduceMax", "sure", "best", axes=[1], keepdims=0), node("TopK", "best nine", "det_scores where"),
            node("ArgMax", "sure", "which", axis=1, keepdims=0),
            node("GatherElements", "which where", "det_labels", axis=1), node("Unsqueeze", "where 2", "u"),
            node("Concat", "u u u u", "u4", axis=2), node("GatherElements", "boxes u4", "det_boxes", axis=1),
        ]  # fmt: skip
    else:
        nodes += [
            node("NonMaxSuppression", "boxes sure nine overlap least", "kept"),
            node("Gather", "kept one", "det_labels", axis=1), node("Gather", "kept two", "where", axis=1),
            node("Squeeze", "boxes 0", "b"), node("Gather", "b where", "det_boxes"),
            node("Slice", "kept 1 3 1", "pairs"), node("Squeeze", "sure 0", "z"),
            node("GatherND", "z pairs", "det_scores"),
        ]  # fmt: skip
    names = "det_scores det_boxes det_labels"
    return write(tmp_path / "own.onnx", nodes, (count, 3, 8, 10), stored, opset=17, outputs=names, kinds=[1, 1, 7])


@pytest.mark.filterwarnings("ignore:The last", "ignore:The calibration", "ignore:.*loss from the float")
def test_boxes_that_the_file_makes_itself_are_scored(detecting: Path, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "pictures").mkdir()
    for k in range(5):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 10, 3), np.uint8)).save(
            tmp_path / f"pictures/{k}.png"
        )
    how = bw.Preprocessing(input_size=(3, 8, 10))
    x, given = load_images(tmp_path / "pictures", how).batch(range(5)), OnnxFile.read(detecting).body.image.batch
    runtime = InferenceSession(str(detecting), providers=["CPUExecutionProvider"])
    truth, rows = [], []
    for k in range(5):
        _, boxes, labels = (a[0] if given > 1 else a for a in runtime.run(None, {"x": x[[k] * given].numpy()}))
        truth.append({"boxes": boxes, "labels": labels})
        rows += [
            {
                "id": len(rows) + i,
                "image_id": k,
                "category_id": int(c),
                "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "area": 1.0,
            }
            for i, (b, c) in enumerate(zip(boxes, labels, strict=True), 1)
        ]
    assert all(len(each["boxes"]) > 2 for each in truth)
    quantized = bw.quantize(str(detecting), x, "rtn")
    found = quantized.evaluate(x, labels=truth)
    assert found["float"]["map"] == pytest.approx(1, abs=1e-6)
    assert 0.5 < found["quantized"]["map"] <= 1
    folder = quantized.save(tmp_path / "run", onnx=True)
    assert bw.load(folder).evaluate(x, labels=truth)["quantized"]["map"] == found["quantized"]["map"]
    with pytest.warns(UserWarning, match=r"What follows the network .* is in model.onnx alone: to='pt2' ends in"):
        quantized.export(tmp_path / "own.pt2", x, to="pt2")
    timed = bw.bench(folder, runtimes=["onnxruntime"], threads=[1], seconds=0.01, memory=lambda *_: NO_MEMORY)
    assert [row["batch"] for row in timed["rows"]] == [given]  # the tail takes no other number of images
    goal = Goal.parse(max_drop=0.9, weights="8", task="detection")
    assert bw.quantize(str(detecting), x, "rtn", goal=goal).result["plan"]

    names = [{"id": c, "name": f"class {c}"} for c in range(3)]
    pictures = [{"id": k, "file_name": f"{k}.png", "width": 10, "height": 8} for k in range(5)]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": pictures, "annotations": rows, "categories": names}))
    for network, expected in ((detecting, 1.0), (folder / "model.onnx", found["quantized"]["map"])):
        arguments = (str(network), str(tmp_path / "pictures"), "--labels", str(tmp_path / "boxes.json"))
        said = bitwright(capsys, "evaluate", *arguments, "--mean", "0", "--std", "1", "--json")
        assert json.loads(said)["quantized"]["map"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16])
@pytest.mark.filterwarnings("ignore:The last", "ignore:.*computes in float16", "ignore:.*loss from the float")
def test_what_follows_in_other_floats_runs_in_float32(kind: int, tmp_path: Path) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        node("Conv", "x w", "c"), node("Cast", "c", "wide", to=kind), node("Reshape", "wide s", "flat"),
        node("Add", "flat shift", "moved"), node("TopK", "moved k", "best where"), node("Mul", "best step", "scaled"),
        node("Cast", "scaled", "again", to=kind),
    ]  # fmt: skip
    stored = {"w": weights(4, 3, 3, 3), "s": np.asarray([0, 192]), "shift": np.linspace(0, 3, 192, dtype=dtype),
              "k": np.asarray([5]), "step": np.asarray(2, dtype)}  # fmt: skip
    kinds = [kind, TensorProto.INT64]
    path = write(tmp_path / "other.onnx", nodes, ("N", 3, 8, 10), stored, outputs="again where", kinds=kinds)
    x = images(4, (3, 8, 10))
    folder = bw.quantize(str(path), x, "rtn").save(tmp_path / "run", onnx=True)
    (expected, places), (found, ours) = (
        InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
        for p in (path, folder / "model.onnx")
    )
    assert expected.dtype == dtype
    assert found.dtype == np.float32
    assert np.abs(expected - found).max() < 0.2
    assert (places == ours).mean() > 0.5


def test_boxes_that_depend_on_more_than_the_networks_outputs(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "m"),
        node("Transpose", "m", "s", perm=[0, 2, 1]),
        node("NonMaxSuppression", "x s k"),
    ]
    stored = {"w": weights(4, 5), "k": np.asarray([3])}
    path = write(tmp_path / "both.onnx", nodes, (1, 12, 4), stored, kinds=[TensorProto.INT64])
    with pytest.warns(UserWarning, match="stay as they are"):
        network = load_model(str(path))
    assert network.decode is not None
    with pytest.raises(DataError, match="depend on the network's outputs alone, the operators behind it read x too"):
        network.decode(torch.zeros(2, 5, 12))


def pictures(folder: Path, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Files of noise, and their pixels (H, W, 3)."""
    folder.mkdir()
    found = [np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8) for k in range(count)]
    for k, pixels in enumerate(found):
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return found


def write_coco(path: Path, truth: list[tuple[np.ndarray, np.ndarray]], size: tuple[int, int]) -> Path:
    """Boxes and classes of each image, as COCO has them."""
    rows = [
        (k, b.clip(0, [*size[::-1], *size[::-1]]), int(c))
        for k, each in enumerate(truth)
        for b, c in zip(*each, strict=True)
    ]
    said = [
        {"id": i, "image_id": k, "category_id": c, "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()], "area": 1.0}
        for i, (k, b, c) in enumerate(rows, 1)
    ]
    every = [{"id": k, "file_name": f"{k}.png", "width": size[1], "height": size[0]} for k in range(len(truth))]
    names = [{"id": c, "name": f"class {c}"} for c in range(3)]
    path.write_text(json.dumps({"images": every, "annotations": said, "categories": names}))
    return path


MANY = {"scale_factor": TensorProto.FLOAT, "sizes": TensorProto.INT64, "im_shape": TensorProto.FLOAT}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT16])
@pytest.mark.parametrize("beside", ["", *MANY])
@pytest.mark.filterwarnings(
    "ignore:The last", "ignore:The calibration", "ignore:.*loss from the float", "ignore:.*beside images",
    "ignore:.*computes in float16", "ignore:.*takes whole numbers", "ignore:.*is taken for", "ignore:All boxes lie",
)  # fmt: skip
def test_a_whole_file_is_evaluated(kind: int, beside: str, tmp_path: Path, capsys: Said) -> None:
    """Rows (M, 6) of the best, scaled by what the file takes before its images; whatever type these have."""
    size, dtype = (24, 32), helper.tensor_dtype_to_np_dtype(kind)
    cells = np.stack(np.meshgrid(np.arange(32), np.arange(24)), -1).reshape(1, 768, 2).astype(np.float32)
    nodes = [
        node("Cast", "x", "f", to=TensorProto.FLOAT), node("Conv", "f w", "c", pads=[1] * 4), node("Relu", "c", "r"),
        node("Conv", "r v", "m"), node("Reshape", "m s", "raw"), node("Sigmoid", "raw", "sure"),
        node("ReduceMax", "sure", "best", axes=[1], keepdims=0), node("ArgMax", "sure", "which", axis=1, keepdims=0),
        node("TopK", "best nine", "score where"), node("GatherElements", "which where", "label", axis=1),
        node("Unsqueeze", "where last", "u"), node("Concat", "u u u u", "u4", axis=2),
        node("GatherElements", "boxes u4", "b", axis=1), node("Squeeze", "b first", "pixels"),
        node("Div", "pixels sides", "shares"), node("Cast", "label", "g", to=TensorProto.FLOAT),
        node("Unsqueeze", "score last", "s1"), node("Squeeze", "s1 first", "s2"),
        node("Unsqueeze", "label last", "g1"), node("Squeeze", "g1 first", "g2"),
        node("Cast", "g2", "g3", to=TensorProto.FLOAT), node("Concat", "ends s2 g3", "rows", axis=1),
    ]  # fmt: skip
    value = {"scale_factor": [[1, 1]], "sizes": [[32, 24]], "im_shape": [[32, 24]]}.get(beside, [[]])
    scaling = [node("Cast", beside, "n", to=TensorProto.FLOAT), node("Concat", "n n", "n4", axis=1)]
    if beside == "":
        nodes.insert(-1, node("Identity", "pixels", "ends"))
    else:
        origin, operator = ("pixels", "Div") if beside == "scale_factor" else ("shares", "Mul")
        nodes[-1:-1] = [*scaling, node(operator, f"{origin} n4", "ends")]
    stored = {
        "w": weights(6, 3, 3, 3) / (255 if kind == TensorProto.UINT8 else 1), "v": 3 * weights(3, 6, 1, 1, seed=1),
        "s": np.asarray([0, 3, 768]), "nine": np.asarray([9]), "first": np.asarray([0]), "last": np.asarray([2]),
        "boxes": np.concatenate([cells - 3, cells + 4], 2), "sides": np.float32([32, 24, 32, 24]),
    }  # fmt: skip
    path = write(tmp_path / "own.onnx", nodes, (1, 3, *size), stored, opset=17, outputs="rows", kind=kind)
    if beside:
        program = onnx.load(path)
        program.graph.input.insert(0, helper.make_tensor_value_info(beside, MANY[beside], [1, 2]))
        onnx.save(program, path)
    runtime, truth = InferenceSession(str(path), providers=["CPUExecutionProvider"]), []
    for pixels in pictures(tmp_path / "pictures", 5, size):
        x = pixels.transpose(2, 0, 1)[None] if kind == TensorProto.UINT8 else pixels.transpose(2, 0, 1)[None] / 255
        feed = {beside: np.asarray(value, helper.tensor_dtype_to_np_dtype(MANY[beside]))} if beside else {}
        (rows,) = runtime.run(None, {"x": x.astype(dtype), **feed})
        truth.append((rows[:, :4], rows[:, 5]))
    labels = write_coco(tmp_path / "boxes.json", truth, size)
    how = () if kind == TensorProto.UINT8 else ("--mean", "0", "--std", "1")
    arguments = (str(tmp_path / "pictures"), "--labels", str(labels), *how, "--json")
    found = json.loads(bitwright(capsys, "evaluate", str(path), *arguments))
    assert found["quantized"]["map"] == pytest.approx(1)
    run = tmp_path / "run"
    options = ("--recipe", "rtn", "--evaluate", str(tmp_path / "pictures"), "--no-report", "--out", str(run))
    found = json.loads(bitwright(capsys, "quantize", str(path), *arguments, *options))
    assert found["float"]["map"] == pytest.approx(1, abs=0.01)
    assert [i.name for i in onnx.load(run / "model.onnx").graph.input] == ([beside] if beside else []) + ["x"]
    beside_float = ("--float", str(path))
    for more in ((), beside_float):
        after = json.loads(bitwright(capsys, "evaluate", str(run / "model.onnx"), *arguments, *more))
        assert after["quantized"]["map"] == pytest.approx(found["quantized"]["map"], abs=0.02)
    assert after["float"]["map"] == found["float"]["map"]
    same = json.loads(bitwright(capsys, "evaluate", str(path), *arguments, *beside_float))
    assert same["fidelity"]["agreement"] == 1


@pytest.mark.parametrize(("batch", "count"), [(2, 5), (4, 1), ("N", 5)])
@pytest.mark.filterwarnings("ignore:The last", "ignore:The calibration", "ignore:.*loss from the float")
def test_rows_that_number_their_image_are_evaluated(batch: Any, count: int, tmp_path: Path, capsys: Said) -> None:
    size, cells = (8, 10), np.stack(np.meshgrid(np.arange(10), np.arange(8)), -1).reshape(80, 2).astype(np.float32)
    nodes = [
        node("Conv", "x w", "c", pads=[1] * 4), node("Relu", "c", "r"), node("Conv", "r v", "m"),
        node("Reshape", "m s", "raw"), node("Sigmoid", "raw", "sure"), node("Shape", "x", "sides"),
        node("Gather", "sides zero", "n", axis=0), node("Concat", "n rest", "to", axis=0),
        node("Expand", "boxes to", "many"), node("NonMaxSuppression", "many sure nine overlap least", "kept"),
        node("Gather", "kept zero", "image", axis=1), node("Gather", "kept one", "label", axis=1),
        node("Gather", "kept two", "where", axis=1), node("Squeeze", "where one", "place"),
        node("Gather", "stored place", "corners"), node("GatherND", "sure kept", "score"),
        node("Unsqueeze", "score one", "s1"), node("Cast", "image", "i1", to=TensorProto.FLOAT),
        node("Cast", "label", "l1", to=TensorProto.FLOAT), node("Concat", "i1 corners l1 s1", "rows", axis=1),
    ]  # fmt: skip
    stored = {
        "w": weights(6, 3, 3, 3), "v": 3 * weights(3, 6, 1, 1, seed=1), "s": np.asarray([0, 3, 80]),
        "zero": np.asarray([0]), "one": np.asarray([1]), "two": np.asarray([2]), "rest": np.asarray([80, 4]),
        "boxes": np.concatenate([cells, cells + 3], 1)[None], "stored": np.concatenate([cells, cells + 3], 1),
        "nine": np.asarray([9]), "overlap": np.float32([0.3]), "least": np.float32([0.5]),
    }  # fmt: skip
    path = write(tmp_path / "rows.onnx", nodes, (batch, 3, *size), stored, opset=17, outputs="rows")
    runtime, truth = InferenceSession(str(path), providers=["CPUExecutionProvider"]), []
    for pixels in pictures(tmp_path / "pictures", count, size):
        x = np.repeat(pixels.transpose(2, 0, 1)[None] / np.float32(255), 1 if batch == "N" else batch, 0)
        (rows,) = runtime.run(None, {"x": x})
        own = rows[rows[:, 0] == 0]
        truth.append((own[:, 1:5], own[:, 5]))
    labels = write_coco(tmp_path / "boxes.json", truth, size)
    arguments = (str(tmp_path / "pictures"), "--labels", str(labels), "--mean", "0", "--std", "1", "--json")
    found = json.loads(bitwright(capsys, "evaluate", str(path), *arguments))
    assert found["quantized"]["map"] == pytest.approx(1)
    options = ("--recipe", "rtn", "--evaluate", arguments[0], "--no-report", "--out", str(tmp_path / "run"))
    found = json.loads(bitwright(capsys, "quantize", str(path), *arguments, *options))
    assert found["float"]["map"] == pytest.approx(1)


@pytest.fixture(params=[1, "N"])
def scaling(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Boxes in shares of an image, which the file scales to sizes that it takes beside the images."""
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("Conv", "r v", "m"),
        node("Reshape", "m s", "h"), node("Transpose", "h", "t", perm=[0, 2, 1]),
        node("Split", "t parts", "place scores", axis=2), node("Sigmoid", "place", "p"),
        node("Mul", "p near", "low"), node("Add", "low far", "high"),
        node("Concat", "low high", "shares", axis=2), node("Cast", "sizes", "f", to=TensorProto.FLOAT),
        node("Concat", "f f", "f2", axis=1), node("Unsqueeze", "f2 one", "f3"), node("Mul", "shares f3", "boxes"),
        node("ArgMax", "scores", "labels", axis=2, keepdims=0),
        node("ReduceMax", "scores", "most", axes=[2], keepdims=0), node("Sigmoid", "most", "top_scores"),
    ]  # fmt: skip
    stored = {
        "w": weights(6, 3, 3, 3), "v": 3 * weights(5, 6, 1, 1, seed=1), "s": np.asarray([0, 5, 64]),
        "parts": np.asarray([2, 3]), "near": np.float32(0.6), "far": np.float32(0.3), "one": np.asarray([1]),
    }  # fmt: skip
    beside = [helper.make_tensor_value_info("sizes", TensorProto.INT64, [request.param, 2])]
    path, shape = tmp_path / "sized.onnx", (request.param, 3, 8, 8)
    return write(
        path, nodes, shape, stored, opset=17, outputs="boxes labels top_scores", kinds=[1, 7], more_inputs=beside
    )


@pytest.mark.filterwarnings("ignore:The last", "ignore:The calibration", "ignore:.*loss from the float")
def test_what_a_file_takes_beside_images_stays_an_input(scaling: Path, tmp_path: Path) -> None:
    x = images(4, (3, 8, 8))
    with pytest.warns(UserWarning, match="takes sizes beside images"):
        quantized = bw.quantize(str(scaling), x, "rtn")
    folder = quantized.save(tmp_path / "run", onnx=True)
    before, after = (
        InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (scaling, folder / "model.onnx")
    )
    assert [(i.name, i.type, i.shape) for i in after.get_inputs()] == [
        (i.name, i.type, i.shape) for i in before.get_inputs()
    ]
    assert [o.name for o in after.get_outputs()] == ["boxes", "labels", "top_scores"]
    truth = []
    for image in x:
        feed = {"x": image[None].numpy(), "sizes": np.asarray([[8, 8]])}
        (boxes, labels, _), found = before.run(None, feed), after.run(None, feed)
        assert np.abs(boxes - found[0]).max() < 0.4
        truth.append({"boxes": boxes[0], "labels": labels[0]})
    for model in (quantized, bw.load(folder)):
        with pytest.warns(UserWarning, match="sizes is taken for the size that boxes are scaled to: 8 by 8"):
            evaluated = model.evaluate(x, labels=truth)
        assert evaluated["quantized"]["map"] > 0.3
        if model is quantized:
            assert evaluated["float"]["map50"] > 0.9


def test_layers_on_what_a_file_takes_beside_images(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Cast", "words", "f", to=TensorProto.FLOAT), node("MatMul", "f v", "z")]
    beside = [helper.make_tensor_value_info("words", TensorProto.INT64, [1, 7])]
    stored = {"w": weights(6, 3, 3, 3), "v": weights(7, 4)}
    path = write(tmp_path / "words.onnx", nodes, (1, 3, 8, 8), stored, outputs="c z", more_inputs=beside)
    with pytest.raises(ModelError, match=r"layers that depend on images alone in .*, some depend on 'words' \(int64\)"):
        load_model(str(path))


def test_outputs_of_a_file_that_are_no_boxes(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Swirl", "c", domain="acme")]
    path = write(tmp_path / "tail.onnx", nodes, (1, 3, 8, 10), {"w": weights(6, 3, 3, 3)}, domains=["acme"])
    truth = [{"boxes": np.float32([[1, 1, 3, 3]]), "labels": np.asarray([0])}] * 3
    with pytest.warns(UserWarning, match="stay as they are"):
        quantized = bw.quantize(str(path), images(3, (3, 8, 10)), "rtn")
    with pytest.raises(DataError, match=r"operators behind the network that ONNX Runtime runs, .* Give decode= with"):
        quantized.evaluate(images(3, (3, 8, 10)), labels=truth)
