"""What cannot be read is said in one line, before anything takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import images, node, same_as_runtime, weights, write
from PIL import Image

import bitwright as bw
from bitwright.errors import ModelError
from bitwright.given.arguments import as_flags
from bitwright.given.models import load_model
from bitwright.onnx_in import check
from bitwright.onnx_in.source import OnnxFile

MAP = (3, 8, 10)
CONV = {"w": weights(4, 3, 3, 3)}


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        load_model(str(path), **settings)
    said = str(error.value)
    assert "\n" not in said
    assert str(path) in said or "at 'y'" in said
    return said


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.onnx")
    whole = write(tmp_path / "whole.onnx", [node("Conv", "x w")], (1, *MAP), CONV).read_bytes()
    for k, content in enumerate((b"", b"hello", whole[: len(whole) // 2], b"\x00" * 100)):
        path = tmp_path / f"{k}.onnx"
        path.write_bytes(content)
        assert "Export it again" in refused(path)


@pytest.mark.parametrize("opset", [8, 26])
def test_versions_that_are_not_read(opset: int, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx", [node("Relu", "x")], (1, *MAP), opset=opset)
    assert f"Expected opset 9 to 25, found {opset}" in refused(path)


@pytest.mark.parametrize("opset", range(9, 26))
def test_versions_that_are_read(opset: int, tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("GlobalAveragePool", "r", "g"),
             node("Flatten", "g")]  # fmt: skip
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), CONV, opset=opset))


def test_a_network_that_is_quantized_already(tmp_path: Path) -> None:
    stored = {"s": np.float32(0.1), "z": np.uint8(128)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")]
    said = refused(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored))
    assert "quantized already (QuantizeLinear at 'QuantizeLinear_q')" in said


def test_tensors_beside_the_file_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), CONV)
    program = onnx.load(path)
    onnx.save(program, path, save_as_external_data=True, location="tensors.bin", size_threshold=0)
    same_as_runtime(path)
    (tmp_path / "tensors.bin").unlink()
    assert "tensors.bin beside it, cannot read 'w'" in refused(path)


def test_tensors_are_read_from_the_files_own_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(CONV["w"].tobytes())
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner" / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), CONV)
    program = onnx.load(path)
    tensor = program.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", str(CONV["w"].nbytes))):
        tensor.external_data.add(key=key, value=value)
    onnx.save(program, path)
    assert "cannot read 'w'" in refused(path)


def test_inputs_that_are_no_single_image(tmp_path: Path) -> None:
    more = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", *MAP])]
    two = write(tmp_path / "two.onnx", [node("Add", "x z")], (1, *MAP), more_inputs=more)
    assert "found x 1, z any number. Export it with one batch" in refused(two)
    cast = [node("Cast", "x", to=TensorProto.FLOAT)]
    assert "'x' is bool" in refused(write(tmp_path / "b.onnx", cast, (1, *MAP), kind=TensorProto.BOOL))
    assert "'x' is int64" in refused(write(tmp_path / "words.onnx", cast, (1, 77), kind=TensorProto.INT64))
    assert "'x' of 10" in refused(write(tmp_path / "c.onnx", [node("Relu", "x")], (10,)))


def test_sizes_that_the_file_leaves_free_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "free.onnx", [node("Conv", "x w")], ("N", 3, "H", "W"), CONV)
    said = refused(path)
    assert f"'x' is [N, 3, ?, ?]. Give bw.load_model('{path}', input_size='224x320'), with your" in said
    assert "'x' is [N, 3, ?, ?]. Give --input-size 224x320, with your" in as_flags(said)
    assert load_model(str(path), input_size="8x10").source is not None
    assert OnnxFile.read(path, (3, 8, 10)).image == MAP
    fixed = write(tmp_path / "fixed.onnx", [node("Conv", "x w")], ("N", *MAP), CONV)
    assert "Expected input_size=8x10" in refused(fixed, input_size="9x9")


def test_free_sizes_of_videos_cannot_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "free.onnx", [node("Relu", "x")], ("N", 3, "T", 8, 10))
    assert "'x' is [N, 3, ?, 8, 10]. Export it with fixed sizes." in refused(path, input_size="8x10")


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_an_input_that_nothing_reads_is_left_out_and_said(kind: int, tmp_path: Path) -> None:
    more = [helper.make_tensor_value_info("mask", kind, ["N", "L"])]
    nodes = [node("Conv", "x w"), node("Neg", "mask", "unused")]
    path = write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), CONV, more_inputs=more)
    with pytest.warns(UserWarning, match=r"Nothing reads mask, which .*tiny.onnx takes as an input. It is left out."):
        quantized = bw.quantize(str(path), images(4, MAP), "rtn")
    assert quantized.input_names == ()


def test_images_along_another_axis_than_the_first(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Transpose", "c", perm=[1, 0, 2, 3])]
    said = refused(write(tmp_path / "turned.onnx", nodes, ("N", *MAP), CONV))
    assert "'y' is [4, N, 6, 8] for N images. Cut the file before it" in said


def test_an_operator_that_is_none_where_images_lie_along_another_axis_is_named(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Transpose", "c", "t", perm=[1, 0, 2, 3]), node("NonZero", "t")]
    said = refused(write(tmp_path / "turned.onnx", nodes, ("N", *MAP), CONV, kinds=[7]))
    assert "found NonZero at 'NonZero_y' (unknown operator" in said
    assert "before which 't' is [4, N, 6, 8]" in said


def test_images_of_a_batch_that_are_joined_behind_the_network_stay_joined(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Reshape", "c s")]
    path = write(tmp_path / "joined.onnx", nodes, (2, *MAP), {**CONV, "s": np.asarray([1, 8, 48])})
    with pytest.warns(UserWarning, match=r"\(Reshape\) stay as they are.*ends before them, in c. .*2 images at once"):
        assert bw.quantize(str(path), images(4, MAP), "rtn")(images(3, MAP)).shape == (3, 4, 6, 8)
    nodes.append(node("Conv", "y v", "z"))
    stored = {**CONV, "s": np.asarray([1, 8, 6, 8]), "v": weights(2, 8, 1, 1)}
    said = refused(write(tmp_path / "within.onnx", nodes, (2, *MAP), stored, outputs="z"))
    assert "Reshape at 'Reshape_y' (it joins the images of a batch)" in said


def test_images_that_a_file_of_a_free_batch_joins(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Reshape", "c s", "r"), node("Softmax", "r", "p", axis=1)]
    nodes += [node("Reshape", "p t", "m"), node("Conv", "m v")]
    stored = {**CONV, "s": np.asarray([1, -1]), "t": np.asarray([-1, 4, 6, 8]), "v": weights(2, 4, 1, 1)}
    path = write(tmp_path / "joined.onnx", nodes, ("N", *MAP), stored)
    with pytest.raises(ModelError, match=r"joined.onnx joins the images of a batch, first at 'r' \(Reshape, node"):
        bw.quantize(str(path), images(4, MAP), "rtn")


@pytest.mark.parametrize(
    ("settings", "inputs", "reason"),
    [
        ({"layout": 1}, "t w r b", "has the images first"), ({"clip": 1.0}, "t w r b", "other functions"),
        ({"activations": ["Sigmoid", "Relu", "Tanh"]}, "t w r b", "other functions"),
        ({}, "t w r b - - - p", "peepholes"), ({"input_forget": 1}, "t w r b", "other functions"),
        ({}, "t w r b l", "of several lengths"), ({}, "t w r b - i", "its first state has no axis of images"),
        ({}, "f w r b", "takes the images of a batch for its steps"),
    ],
)  # fmt: skip
def test_recurrent_operators_unlike_those_of_pytorch(
    settings: dict[str, Any], inputs: str, reason: str, tmp_path: Path
) -> None:
    nodes = [
        node("Reshape", "x s", "f"), node("Transpose", "f", "t", perm=[1, 0, 2]), node("Slice", "f a0 a1 a2", "f0"),
        node("Transpose", "f0", "i", perm=[1, 2, 0]),
        node("LSTM", inputs, "q", hidden_size=4, **settings), node("Squeeze", "q one"),
    ]  # fmt: skip
    stored = {
        "s": np.asarray([-1, 24, 10]), "w": weights(1, 16, 10), "r": weights(1, 16, 4), "b": weights(1, 32),
        "p": weights(1, 12), "one": np.asarray([1]), "l": np.asarray([23], np.int32),
        "a0": np.asarray([0, 0]), "a1": np.asarray([1, 1]), "a2": np.asarray([1, 2]),
    }  # fmt: skip
    assert reason in refused(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored, opset=14))


@pytest.mark.parametrize(
    ("rows", "reason"), [([1, 3, 8, 10], "over the images of a batch"), ([8, 30], "each image of a batch has 8 places")]
)
def test_means_over_images_are_refused(rows: list[int], reason: str, tmp_path: Path) -> None:
    nodes = [
        node("Reshape", "x s", "r"), node("ReduceMean", "r", "m", axes=[0]), node("Sub", "r m", "d"),
        node("Reshape", "d t", "e"), node("Conv", "e w"),
    ]  # fmt: skip
    stored = {**CONV, "s": np.asarray(rows), "t": np.asarray([1, 3, 8, 10])}
    assert reason in refused(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored, opset=13))


def test_means_over_a_first_axis_of_rows_are_read(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[2, 0, 1, 3]), node("ReduceMean", "t", "m", axes=[0]), node("Sub", "t m", "d"),
        node("Transpose", "d", "e", perm=[1, 2, 0, 3]), node("Conv", "e w"),
    ]  # fmt: skip
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), CONV, opset=13))


def test_operators_that_nobody_knows(tmp_path: Path) -> None:
    nodes = [node("Swirl", "x", "s", domain="acme"), node("Conv", "s w")]
    said = refused(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), CONV, domains=["acme"]))
    assert "acme.Swirl at 'Swirl_s' (unknown operator of the domain acme)" in said
    between = [node("Conv", "x w", "c"), node("Swirl", "c", "s", domain="acme"), node("Conv", "s v")]
    path = write(tmp_path / "b.onnx", between, (1, *MAP), {**CONV, "v": weights(2, 4, 1, 1)}, domains=["acme"])
    assert "acme.Swirl at 'Swirl_s'" in refused(path)


def test_control_flow_before_the_last_weight(tmp_path: Path) -> None:
    then, other = (
        helper.make_graph([node(kind, "x", "b")], kind, [], [helper.make_tensor_value_info("b", 1, None)])
        for kind in ("Relu", "Neg")
    )
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0), node("Greater", "m zero", "g"),
        node("If", "g", "c", then_branch=then, else_branch=other), node("Conv", "c w"),
    ]  # fmt: skip
    path = write(tmp_path / "tiny.onnx", nodes, (1, *MAP), {**CONV, "zero": np.float32(0)}, opset=13)
    assert "ReduceMax" in refused(path)
    nodes[0] = node("ReduceMax", "w", "m", keepdims=0)
    nodes[1] = node("Greater", "m m0", "g")
    nodes.insert(1, node("ReduceMax", "x", "m0", axes=[1, 2, 3], keepdims=0))
    assert "If at 'If_c' (control flow)" in refused(write(tmp_path / "if.onnx", nodes, (1, *MAP), CONV, opset=13))


@pytest.mark.parametrize("always", [True, False])
def test_a_branch_that_is_always_taken_is_read(always: bool, tmp_path: Path) -> None:
    end = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    then, other = (helper.make_graph([node(kind, "x", "b")], kind, [], [end]) for kind in ("Relu", "Neg"))
    other.node[0].output[0] = other.output[0].name = "d"
    nodes = [node("If", "g", "c", then_branch=then, else_branch=other), node("Conv", "c w")]
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), {**CONV, "g": np.asarray(always)}, opset=13))


def test_a_file_in_float16_becomes_float32(tmp_path: Path) -> None:
    stored = {"w": CONV["w"].astype(np.float16)}
    path = write(
        tmp_path / "half.onnx", [node("Conv", "x w")], (1, *MAP), stored, kind=TensorProto.FLOAT16,
        kinds=[TensorProto.FLOAT16],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="computes in float16"):
        file = OnnxFile.read(path)
    file.check(images(2, MAP))


def test_what_follows_the_last_weight_stays(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Swirl", "r", "s", domain="acme"), node("Neg", "s"),
    ]  # fmt: skip
    path = write(tmp_path / "tiny.onnx", nodes, (1, *MAP), CONV, domains=["acme"])
    with pytest.warns(
        UserWarning, match=r"\(Neg, Swirl\) stay as they are.* in r\. They were written for 1 image at once"
    ):
        file = OnnxFile.read(path)
    file.check(images(2, MAP))
    assert file.names.outputs == {"output": "r"}


def test_a_network_that_differs_from_the_runtime_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Neg", "r")]
    file = OnnxFile.read(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), CONV))
    monkeypatch.setattr(file.network.get_submodule("r"), "_function", nn.functional.silu)
    with pytest.raises(ModelError, match=r"differs from ONNX Runtime by .* first at 'r' \(Relu, node 'Relu_r'\)"):
        file.check(images(2, MAP))


def test_images_of_another_shape(tmp_path: Path) -> None:
    file = OnnxFile.read(write(tmp_path / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), CONV))
    with pytest.raises(ModelError, match="Expected images of 3x8x10"):
        file.check(images(2, (8, 10, 3)))


def test_a_large_file_is_told_to_put_its_tensors_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.onnx_in.file.LARGEST", 10)
    assert "at most 2 GiB" in refused(write(tmp_path / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), CONV))


def test_dropout_that_drops_is_refused(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Dropout", "c ratio training")]
    for ratio, training in ((0.0, True), (0.5, False)):
        stored = {**CONV, "ratio": np.float32(ratio), "training": np.asarray(training)}
        same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored))
    stored["training"] = np.asarray(True)
    said = refused(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored))
    assert "found a Dropout at 'y' that drops values at random" in said


def test_large_tensors_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    part_of = check.part_of
    monkeypatch.setattr(check, "part_of", lambda *args: given.append(part_of(*args)) or given[-1])
    stored = {"w": weights(64, 3, 3, 3), "v": weights(8, 64, 1, 1, seed=1)}
    nodes = [node("Conv", "x w", "c"), node("Conv", "c v"), node("Conv", "c v", "z")]
    path = write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), stored, outputs="y z")
    program = onnx.load(path)
    program.graph.initializer.append(onnx.numpy_helper.from_array(np.full(9, 0.5, np.float32), "odd"))
    onnx.save(program, path, save_as_external_data=True, location="tensors.bin", size_threshold=0)
    file = OnnxFile.read(path)
    file.check(images(2, MAP))
    assert len(given[-1].SerializeToString()) < stored["w"].nbytes < (tmp_path / "tensors.bin").stat().st_size
    kept = file.network.w  # type: ignore[attr-defined]
    assert kept.data_ptr() == file.program.stored["w"].__array_interface__["data"][0]
    before = (tmp_path / "tensors.bin").read_bytes()
    kept.mul_(2)  # on pages of its own
    assert (tmp_path / "tensors.bin").read_bytes() == before


def test_data_of_tensors_that_lies_anywhere_in_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), {"w": weights(64, 3, 3, 3)})
    expected = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    for before, length in ((0, None), (3, None), (16, expected.nbytes)):
        program = onnx.load(path)
        (tmp_path / "w.bin").write_bytes(bytes(before) + expected.tobytes() + bytes(5))
        outside(program.graph.initializer[0], "w.bin", offset=before, length=length)
        onnx.save(program, tmp_path / "moved.onnx")
        file = OnnxFile.read(tmp_path / "moved.onnx")
        assert torch.equal(file.network.w, torch.from_numpy(expected.copy()))  # type: ignore[arg-type]
        file.check(images(1, MAP))
    for wrong in ({"length": expected.nbytes + 8}, {"length": 8}, {"offset": 10**9}):
        outside(program.graph.initializer[0], "w.bin", **wrong)
        onnx.save(program, tmp_path / "moved.onnx")
        assert "cannot read 'w'" in refused(tmp_path / "moved.onnx")


def outside(tensor: Any, location: str, **where: int | None) -> None:
    """Says that the data of a tensor lies in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, **where}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def test_a_mask_may_hold_infinities_and_nothing_is_no_number(tmp_path: Path) -> None:
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    nodes = [node("Conv", "x w", "c"), node("Add", "c mask", "m"), node("Softmax", "m", axis=-1)]
    path = write(tmp_path / "mask.onnx", nodes, ("N", 3, 8, 10), {"w": weights(4, 3, 1, 3), "mask": mask})
    model = load_model(str(path))
    assert torch.isinf(model.module.mask).sum() == 28  # type: ignore[union-attr, arg-type]
    same_as_runtime(path)
    mask[0, 0] = np.nan
    with pytest.raises(ModelError, match=r"mask has NaN or infinity in 1 of 64"):
        load_model(str(write(tmp_path / "nan.onnx", nodes, ("N", 3, 8, 10), {"w": weights(4, 3, 1, 3), "mask": mask})))


@pytest.mark.parametrize("places", [[1, 50, 400], [[0, 1], [10, 0], [80, 0]]])
def test_a_sparse_tensor_is_a_tensor(places: list[Any], tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "f"), node("MatMul", "f s")]
    path = write(tmp_path / "sparse.onnx", nodes, ("N", *MAP), CONV)
    program = onnx.load(path)
    where = onnx.numpy_helper.from_array(np.asarray(places), "places")
    values = helper.make_tensor("s", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    program.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [4 * 6 * 8, 5]))
    onnx.save(program, path)
    file = same_as_runtime(path)
    assert int((file.network.s != 0).sum()) == 3  # type: ignore[operator, attr-defined]


def test_operators_in_any_order(tmp_path: Path) -> None:
    nodes = [node("Add", "r a"), node("Relu", "c", "r"), node("Conv", "x w", "c"), node("Abs", "c", "a")]
    same_as_runtime(write(tmp_path / "any.onnx", nodes, ("N", *MAP), CONV))
    loop = [node("Conv", "x w", "c"), node("Add", "c a", "r"), node("Abs", "r", "a"), node("Relu", "c")]
    said = refused(write(tmp_path / "loop.onnx", loop, ("N", *MAP), CONV))
    assert "Expected a graph without loops" in said
    assert "'Add_r' reads what is computed from it" in said


def test_what_is_made_twice_or_by_nobody(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Relu", "c")]
    said = refused(write(tmp_path / "nobody.onnx", nodes, ("N", *MAP), CONV, outputs="y boxes"))
    assert "nothing makes 'boxes'" in said
    said = refused(write(tmp_path / "twice.onnx", [*nodes, node("Abs", "x", "c")], ("N", *MAP), CONV))
    assert "Abs at 'Abs_c' makes 'c' a second time" in said


@pytest.mark.parametrize("large", [True, False])
def test_a_file_in_bfloat16_becomes_float32(large: bool, tmp_path: Path) -> None:
    w = weights(64 if large else 4, 3, 3, 3)
    nodes = [node("Conv", "x w", "c"), node("Constant", "", "two", value=helper.make_tensor("t", 16, [], [2.0])),
             node("Mul", "c two", "m"), node("Cast", "m", to=TensorProto.FLOAT)]  # fmt: skip
    path = write(tmp_path / "b.onnx", nodes, ("N", *MAP), opset=22, kind=TensorProto.BFLOAT16)
    program = onnx.load(path)
    program.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, w.shape, w.reshape(-1).tolist()))
    onnx.save(program, path)
    with pytest.warns(UserWarning, match=r"computes in bfloat16\. In float32"):
        file = OnnxFile.read(path)
    x = images(2, MAP)
    file.check(x)
    short = torch.from_numpy(w).bfloat16().float()
    torch.testing.assert_close(file.network(x), 2 * torch.nn.functional.conv2d(x, short), atol=1e-5, rtol=1e-5)


def test_a_tensor_that_nobody_makes(tmp_path: Path) -> None:
    path = write(tmp_path / "torn.onnx", [node("Conv", "x w", "c"), node("Clip", "c least")], ("N", *MAP), CONV)
    with pytest.raises(ModelError, match=r"Clip at 'Clip_y' reads 'least', which nothing before it makes"):
        OnnxFile.read(path)


def test_a_graph_of_whole_numbers(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "i", to=TensorProto.INT32),
        node("Add", "i i", "j"),
        node("Cast", "j", to=TensorProto.FLOAT),
    ]
    with pytest.raises(ModelError, match="found whole numbers alone"):
        OnnxFile.read(write(tmp_path / "whole.onnx", nodes, ("N", *MAP)))


def test_digits_that_a_cast_takes_away_are_no_difference(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "x", "h", to=TensorProto.BFLOAT16),
        node("Cast", "h", "f", to=TensorProto.FLOAT),
        node("Conv", "f w"),
    ]
    with pytest.warns(UserWarning, match="computes in bfloat16"):
        file = OnnxFile.read(write(tmp_path / "short.onnx", nodes, ("N", *MAP), CONV))
    file.check(images(2, MAP))


def test_a_file_that_runs_on_no_images_at_all(tmp_path: Path) -> None:
    file = OnnxFile.read(write(tmp_path / "none.onnx", [node("Conv", "x w")], (0, *MAP), CONV))
    with pytest.raises(ModelError, match="Expected a file that ONNX Runtime runs"):
        file.check(images(2, MAP))


def test_rows_of_a_fixed_batch_begin_with_as_many_equal_ones(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x s", "r"), node("Shape", "r", "n"), node("Gather", "n zero", "m"),
             node("Concat", "m five", "e", axis=0), node("Expand", "h e", "g"), node("Concat", "r g", "c", axis=1),
             node("Reshape", "c t")]  # fmt: skip
    stored = {"s": np.asarray([24, 10]), "zero": np.asarray([0]), "five": np.asarray([5]), "t": np.asarray([1, 24, 15])}
    same_as_runtime(write(tmp_path / "rows.onnx", nodes, (1, *MAP), {**stored, "h": np.full((24, 5), 2, np.float32)}))
    said = refused(write(tmp_path / "unlike.onnx", nodes, (1, *MAP), {**stored, "h": weights(24, 5)}))
    assert "Expand" in said


def test_what_a_file_of_one_image_computes_of_stored_numbers_comes_out_as_it_is(tmp_path: Path) -> None:
    nodes = [node("Sigmoid", "k", "s"), node("Mul", "k s", "z"), node("Conv", "x w")]
    path = write(tmp_path / "aside.onnx", nodes, (1, *MAP), {**CONV, "k": weights(1, 5)}, outputs="y z")
    with pytest.warns(UserWarning, match="an input or stored stay as they are: z"):
        quantized = bw.quantize(str(path), images(4, MAP), "rtn")
    assert quantized(images(3, MAP)).shape == (3, 4, 6, 8)


@pytest.mark.parametrize("by", [1e-7, 1e-3])
def test_a_constant_that_is_expanded_to_the_images_may_differ_in_its_last_digits(by: float, tmp_path: Path) -> None:
    """As the product of learned queries with a matrix does, whose kernel depends on the number of its rows."""
    nodes = [node("Shape", "x", "n", start=0, end=1), node("Concat", "n rest", "s", axis=0)]
    nodes += [node("Expand", "q s", "e"), node("Cast", "n", "f", to=TensorProto.FLOAT), node("Mul", "f by", "g")]
    nodes += [node("Add", "one g", "h"), node("Mul", "e h", "k"), node("Add", "x k", "z"), node("Conv", "z w")]
    stored = {**CONV, "q": weights(1, *MAP), "rest": np.asarray([1, 1, 1]), "by": np.float32([by])}
    path = write(tmp_path / "rounded.onnx", nodes, ("N", *MAP), {**stored, "one": np.float32([1])})
    if by < 1e-5:
        same_as_runtime(path)
    else:
        assert "one of its constants depends on the number of images" in refused(path)


@pytest.mark.parametrize(("kind", "name"), [(TensorProto.UINT8, "uint8"), (TensorProto.INT32, "int32")])
@pytest.mark.parametrize("shape", [("N", *MAP), (1, 8, 10, 3)])
def test_pixels_that_a_file_takes_as_whole_numbers(
    shape: tuple[Any, ...], kind: int, name: str, tmp_path: Path
) -> None:
    order = [0, 3, 1, 2] if shape[-1] == 3 else [0, 1, 2, 3]
    nodes = [
        node("Cast", "x", "f", to=TensorProto.FLOAT),
        node("Div", "f d", "n"),
        node("Transpose", "n", "t", perm=order),
    ]
    stored = {**CONV, "d": np.float32(127.5)}
    path = write(tmp_path / "pixels.onnx", [*nodes, node("Conv", "t w")], shape, stored, kind=kind)
    with pytest.warns(UserWarning, match=rf"takes whole numbers as 'x' \({name}\)"):
        network = load_model(str(path))
    black, white = (Image.new("RGB", (10, 8), (v, v, v)) for v in (0, 255))
    how = network.preprocessing
    assert isinstance(how, bw.Preprocessing)
    pixels = torch.stack([how(black), how(white)])
    assert pixels.shape[1:] == shape[1:]
    assert pixels.round().unique().tolist() == [0, 255]
    source = network.source
    assert source is not None
    with pytest.raises(ModelError, match=rf"Expected whole numbers from .*'x' \({name}\), found 0.5. Give pixels"):
        source.check(torch.full((2, *shape[1:]), 0.5))
    source.check(pixels)


def test_a_file_in_float64(tmp_path: Path) -> None:
    stored = {"w": weights(240, 4).astype(np.float64)}
    nodes, kind = [node("Flatten", "x", "f"), node("MatMul", "f w")], TensorProto.DOUBLE
    path = write(tmp_path / "double.onnx", nodes, (1, *MAP), stored, kind=kind, kinds=[kind])
    OnnxFile.read(path).check(images(2, MAP))
