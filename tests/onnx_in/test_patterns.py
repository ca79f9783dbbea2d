"""Functions that files spell out come out as the one operator that PyTorch has for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_files import images, node, same_as_runtime, weights, write

from bitwright.graph import ops
from bitwright.graph.capture import Captured, capture

F = np.float32
MAP = (3, 8, 10)
PATTERNS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "silu": ([node("Sigmoid", "x", "s"), node("Mul", "x s")], {}, "silu"),
    "silu, gate first": ([node("Sigmoid", "x", "s"), node("Mul", "s x")], {}, "silu"),
    "mish": ([node("Softplus", "x", "p"), node("Tanh", "p", "t"), node("Mul", "x t")], {}, "mish"),
    "hard swish": ([node("HardSigmoid", "x", "s", alpha=1 / 6, beta=0.5), node("Mul", "x s")], {}, "hardswish"),
    "hard swish of a clip": (
        [node("Add", "x c3", "a"), node("Clip", "a c0 c6", "k"), node("Mul", "x k", "m"), node("Div", "m c6")],
        {"c3": F(3), "c0": F(0), "c6": F(6)}, "hardswish",
    ),
    "hard swish divided first": (
        [node("Add", "c3 x", "a"), node("Clip", "a c0 c6", "k"), node("Div", "k c6", "d"), node("Mul", "d x")],
        {"c3": F(3), "c0": F(0), "c6": F(6)}, "hardswish",
    ),
    "gelu of torch": (
        [
            node("Div", "x r", "d"), node("Erf", "d", "e"), node("Add", "e one", "a"), node("Mul", "x a", "m"),
            node("Mul", "m half"),
        ],
        {"r": F(math.sqrt(2)), "one": F(1), "half": F(0.5)}, "gelu",
    ),
    "gelu of dynamo": (
        [
            node("Mul", "x r", "d"), node("Erf", "d", "e"), node("Add", "one e", "a"), node("Mul", "half a", "m"),
            node("Mul", "x m"),
        ],
        {"r": F(math.sqrt(0.5)), "one": F(1), "half": F(0.5)}, "gelu",
    ),
    "gelu by tanh": (
        [
            node("Pow", "x three", "p"), node("Mul", "p k", "q"), node("Add", "x q", "s"), node("Mul", "s r", "t"),
            node("Tanh", "t", "u"), node("Add", "u one", "v"), node("Mul", "x half", "h"), node("Mul", "h v"),
        ],
        {"three": F(3), "k": F(0.044715), "r": F(math.sqrt(2 / math.pi)), "one": F(1), "half": F(0.5)}, "gelu",
    ),
    "layer norm": (
        [
            node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"), node("Pow", "d two", "p"),
            node("ReduceMean", "p", "v", axes=[-1]), node("Add", "v eps", "w"), node("Sqrt", "w", "r"),
            node("Div", "d r", "q"), node("Mul", "q g", "t"), node("Add", "t b"),
        ],
        {"two": F(2), "eps": F(1e-3), "g": weights(10), "b": weights(10, seed=1)}, "layer_norm",
    ),
    "layer norm without bias": (
        [
            node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"), node("Sub", "x m", "e"),
            node("Pow", "e two", "p"), node("ReduceMean", "p", "v", axes=[-1]), node("Add", "eps v", "w"),
            node("Sqrt", "w", "r"), node("Div", "d r", "q"), node("Mul", "g q"),
        ],
        {"two": F(2), "eps": F(1e-3), "g": weights(10)}, "layer_norm",
    ),
    "layer norm without scale": (
        [
            node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"), node("Mul", "d d", "p"),
            node("ReduceMean", "p", "v", axes=[-1]), node("Add", "v eps", "w"), node("Sqrt", "w", "r"),
            node("Div", "d r"),
        ],
        {"eps": F(1e-3)}, "layer_norm",
    ),
    "group norm": (
        [
            node("Reshape", "x one", "r"), node("InstanceNormalization", "r s z", "n", epsilon=1e-3),
            node("Shape", "x", "h"), node("Reshape", "n h", "m"), node("Mul", "m g", "t"), node("Add", "b t"),
        ],
        {"one": np.asarray([0, 1, -1]), "s": np.ones(1, F), "z": np.zeros(1, F), "g": weights(3, 1, 1),
         "b": weights(1, 3, 1, 1, seed=1)}, "group_norm",
    ),
    "group norm of three groups": (
        [
            node("Reshape", "x three", "r"), node("InstanceNormalization", "r s z", "n"),
            node("Shape", "x", "h"), node("Reshape", "n h", "m"), node("Mul", "m g", "t"), node("Add", "t b"),
        ],
        {"three": np.asarray([0, 3, -1]), "s": np.ones(3, F), "z": np.zeros(3, F), "g": weights(3, 1, 1),
         "b": weights(3, 1, 1, seed=1)}, "group_norm",
    ),
    "bias": ([node("MatMul", "x w", "m"), node("Add", "m b")], {"w": weights(10, 4), "b": weights(4)}, "linear"),
    "affine": ([node("Mul", "g x", "m"), node("Add", "b m")], {"g": weights(10), "b": weights(1, 1, 10)}, "addcmul"),
    "rolled": (
        [node("Slice", "x p e a", "s"), node("Slice", "x z p a one", "t"), node("Concat", "s t", axis=3)],
        {"p": np.asarray([7]), "e": np.asarray([10]), "a": np.asarray([3]), "z": np.asarray([0]),
         "one": np.asarray([1])}, "roll",
    ),
    "rolled, from behind": (
        [node("Slice", "x p e a", "s"), node("Slice", "x z p a", "t"), node("Concat", "s t", axis=3)],
        {"p": np.asarray([-3]), "e": np.asarray([2**63 - 1]), "a": np.asarray([3]), "z": np.asarray([-99])}, "roll",
    ),
    "relu6": ([node("Clip", "x c0 c6")], {"c0": F(0), "c6": F(6)}, "hardtanh"),
}  # fmt: skip


def captured(path: Path) -> Captured:
    file = same_as_runtime(path)
    return capture(file.network, images(2, file.image))


def operators(made: Captured) -> list[str]:
    return [ops.base_name(n) for n in made.graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_becomes_one_operator(name: str, tmp_path: Path) -> None:
    nodes, stored, expected = PATTERNS[name]
    made = captured(write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), stored, opset=13))
    assert operators(made) == [expected]
    (found,) = (n for n in made.graph.graph.nodes if n.op == "call_function")
    assert found.meta["layer"] == "y"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_of_stored_numbers_is_computed_once(name: str, tmp_path: Path) -> None:
    nodes, stored, _ = PATTERNS[name]
    nodes = [
        *[_renamed(n, {"x": "kept", "y": "made"}) for n in nodes],
        node("ReduceMax", "made", "m9"),
        node("Mul", "x m9"),
    ]
    made = captured(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), {**stored, "kept": weights(1, *MAP)}, opset=13))
    assert operators(made) == ["mul"]


@pytest.mark.parametrize(
    "changed",
    [
        ("gelu of torch", "half", 0.6),
        ("layer norm", "two", 4.0),
        ("relu6", "c6", 5.0),
        ("group norm", "s", 2.0),
        ("rolled", "e", 9),
        ("rolled", "z", 1),
    ],
)
def test_what_only_looks_like_a_pattern_stays_as_it_is(changed: tuple[str, str, float], tmp_path: Path) -> None:
    name, key, value = changed
    nodes, stored, expected = PATTERNS[name]
    nodes = [
        node("Abs", "x", "x1"),
        *[_renamed(n, {"x": "x1"}) for n in nodes],
    ]  # a cube of negative numbers has no root
    made = captured(
        write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), {**stored, key: np.full_like(stored[key], value)}, opset=13)
    )
    assert expected not in operators(made)


def _renamed(made: Any, names: dict[str, str]) -> Any:
    made = type(made).FromString(made.SerializeToString())
    made.input[:] = [names.get(name, name) for name in made.input]
    made.output[:] = [names.get(name, name) for name in made.output]
    made.name = f"{made.op_type}_{made.output[0]}"
    return made


def test_a_gate_that_others_read_too_stays(tmp_path: Path) -> None:
    nodes = [node("Sigmoid", "x", "s"), node("Mul", "x s", "m"), node("Add", "m s")]
    assert operators(captured(write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), opset=13))) == ["sigmoid", "mul", "add"]


def test_weights_of_rows_without_scores_are_zero(tmp_path: Path) -> None:
    mask = np.zeros((8, 10), F)
    mask[3], mask[4, :5] = -np.inf, -np.inf
    nodes = [
        node("Add", "x m", "s"), node("Softmax", "s", "p", axis=-1), node("IsNaN", "p", "n"), node("Where", "n zero p"),
    ]  # fmt: skip
    path = write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), {"m": mask, "zero": F(0)}, opset=13)
    assert operators(captured(path)) == ["add", "softmax", "nan_to_num"]
    nodes[3] = node("Where", "n one p")
    path = write(tmp_path / "other.onnx", nodes, ("N", *MAP), {"m": mask, "one": F(1)}, opset=13)
    assert "nan_to_num" not in operators(captured(path))


def test_a_layer_takes_the_numbers_behind_it(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c g", "m"), node("Add", "m b")]
    stored = {"w": weights(4, 3, 3, 3), "g": weights(4, 1, 1), "b": weights(4, 1, 1)}
    path = write(tmp_path / "tiny.onnx", nodes, ("N", *MAP), stored)
    assert "addcmul" not in operators(captured(path))
