"""What cannot be read is said in one line, before anything takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import images, node, same_as_runtime, weights, write

from bitwright.errors import ModelError
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
    whole = [node("Cast", "x", to=TensorProto.FLOAT)]
    assert "'x' is uint8" in refused(write(tmp_path / "b.onnx", whole, (1, *MAP), kind=TensorProto.UINT8))
    assert "'x' of 1x10" in refused(write(tmp_path / "c.onnx", [node("Relu", "x")], (1, 10)))


def test_sizes_that_the_file_leaves_free_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "free.onnx", [node("Conv", "x w")], ("N", 3, "H", "W"), CONV)
    assert "'x' is [N, 3, ?, ?]. Fix it with input_size=" in refused(path)
    assert load_model(str(path), input_size="8x10").source is not None
    assert OnnxFile.read(path, (3, 8, 10)).image == MAP
    fixed = write(tmp_path / "fixed.onnx", [node("Conv", "x w")], ("N", *MAP), CONV)
    assert "Expected input_size=8x10" in refused(fixed, input_size="9x9")


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


def test_a_program_too_large_for_bytes_is_compared_from_a_file_with_its_tensors_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    loadable = check._loadable
    monkeypatch.setattr(check, "LARGEST_FILE", 0)
    monkeypatch.setattr(check, "_loadable", lambda *args: [given.append(str(loadable(*args))), given[-1]][1])
    path = write(tmp_path / "tiny.onnx", [node("Conv", "x w")], (1, *MAP), CONV)
    OnnxFile.read(path).check(images(2, MAP))
    assert [Path(place).name for place in given] == ["part.onnx"]


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
    with pytest.warns(UserWarning, match="computes in float16"):
        file = OnnxFile.read(write(tmp_path / "short.onnx", nodes, ("N", *MAP), CONV))
    file.check(images(2, MAP))


def test_a_file_that_runs_on_no_images_at_all(tmp_path: Path) -> None:
    file = OnnxFile.read(write(tmp_path / "none.onnx", [node("Conv", "x w")], (0, *MAP), CONV))
    with pytest.raises(ModelError, match="Expected a file that ONNX Runtime runs"):
        file.check(images(2, MAP))
