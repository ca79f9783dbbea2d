"""Every operator against ONNX Runtime, on a batch of three images, with the batch free and fixed at one."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_files import node, same_as_runtime, weights, write

from bitwright.errors import ModelError
from bitwright.onnx_in import operators
from bitwright.onnx_in.operators import moves
from bitwright.onnx_in.source import OnnxFile
from bitwright.onnx_in.values import Traced

MAP = (3, 8, 10)
F = np.float32


def ints(*values: int) -> Any:
    return np.asarray(values, np.int64)


def random_places(below: int, *shape: int) -> Any:
    """Places along the last axis but one, each once in its line, some of them from behind."""
    found = np.random.default_rng(0).random((*shape[:2], below, shape[3])).argsort(2)[:, :, : shape[2]]
    return np.where(found > below // 2, found - below, found)


PLACES = np.stack(np.meshgrid([0], range(3), [1, 6], range(10), indexing="ij"), -1).astype(np.int64)
"""Of two rows of an image, as exporters write them for an assignment."""
SIMPLE = [
    "Relu", "Sigmoid", "Tanh", "HardSwish", "Mish", "Softplus", "Softsign", "Erf", "Exp", "Abs", "Neg", "Floor", "Ceil",
    "Round", "Sign", "Reciprocal", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh",
    "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "HardSigmoid",
    "Identity", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "Softmax", "LogSoftmax", "LpNormalization", "Flatten",
]  # fmt: skip
"""Operators that need nothing but the image."""

CASES: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...], int]] = {
    "conv": ([node("Conv", "x w b", pads=[1, 1, 1, 1])], {"w": weights(4, 3, 3, 3), "b": weights(4)}, MAP, 18),
    "conv stride dilation": (
        [node("Conv", "x w", strides=[2, 1], dilations=[1, 2], pads=[1, 0, 1, 0])], {"w": weights(4, 3, 3, 3)}, MAP, 11,
    ),
    "conv depthwise": ([node("Conv", "x w", group=3, pads=[1, 1, 1, 1])], {"w": weights(6, 1, 3, 3)}, MAP, 9),
    "conv uneven": ([node("Conv", "x w", pads=[0, 1, 1, 2])], {"w": weights(4, 3, 3, 3)}, MAP, 18),
    "conv same upper": (
        [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": weights(4, 3, 3, 3)}, MAP, 18,
    ),
    "conv same lower": (
        [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[3, 2])], {"w": weights(4, 3, 4, 3)}, MAP, 18,
    ),
    "conv transposed": (
        [node("ConvTranspose", "x w b", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])],
        {"w": weights(3, 4, 3, 3), "b": weights(4)}, MAP, 11,
    ),
    "conv transposed uneven": (
        [node("ConvTranspose", "x w", strides=[2, 2], pads=[0, 1, 1, 0], group=3)], {"w": weights(3, 2, 3, 3)}, MAP, 11,
    ),
    "conv transposed shape": (
        [node("ConvTranspose", "x w", strides=[2, 2], output_shape=[17, 21])], {"w": weights(3, 2, 3, 3)}, MAP, 11,
    ),
    "conv transposed same": (
        [node("ConvTranspose", "x w", strides=[2, 2], auto_pad="SAME_UPPER")], {"w": weights(3, 2, 3, 3)}, MAP, 11,
    ),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", transB=1, alpha=0.5, beta=2.0)],
        {"w": weights(5, 240), "b": weights(5)}, MAP, 13,
    ),
    "gemm untransposed, bias row": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b")], {"w": weights(240, 5), "b": weights(1, 5)}, MAP, 9,
    ),
    "gemm bias of one number": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b")], {"w": weights(240, 5), "b": weights(1, 1)}, MAP, 13,
    ),
    "matmul": ([node("MatMul", "x w")], {"w": weights(10, 4)}, MAP, 13),
    "matmul of two": ([node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t")], {}, MAP, 13),
    "matmul bias": ([node("MatMul", "x w", "m"), node("Add", "b m")], {"w": weights(10, 4), "b": weights(4)}, MAP, 13),
    "einsum": ([node("Einsum", "x w", equation="nchw,wd->nchd")], {"w": weights(10, 4)}, MAP, 13),
    "batch norm": (
        [node("BatchNormalization", "x s b m v", epsilon=1e-3)],
        {"s": weights(3), "b": weights(3, seed=1), "m": weights(3, seed=2), "v": weights(3, seed=3) ** 2 + 0.5}, MAP, 9,
    ),
    "instance norm": ([node("InstanceNormalization", "x s b")], {"s": weights(3), "b": weights(3, seed=1)}, MAP, 9),
    "layer norm": ([node("LayerNormalization", "x s b")], {"s": weights(10), "b": weights(10, seed=1)}, MAP, 17),
    "layer norm axis": ([node("LayerNormalization", "x s", axis=2)], {"s": weights(8, 10)}, MAP, 17),
    "group norm 21": (
        [node("GroupNormalization", "x s b", num_groups=2)], {"s": weights(4), "b": weights(4, seed=1)}, (4, 6, 6), 21,
    ),
    "rms norm": ([node("RMSNormalization", "x s")], {"s": weights(10)}, MAP, 23),
    "lrn": ([node("LRN", "x", size=3, alpha=0.1, beta=0.5, bias=1.0)], {}, MAP, 13),
    "max pool": ([node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}, MAP, 12),
    "max pool up": ([node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1)], {}, MAP, 12),
    "max pool uneven": ([node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])], {}, MAP, 12),
    "max pool same": ([node("MaxPool", "x", kernel_shape=[2, 2], auto_pad="SAME_UPPER")], {}, MAP, 9),
    "average pool": ([node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}, MAP, 11),
    "average pool counts": (
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], {}, MAP, 11,
    ),
    "average pool uneven": ([node("AveragePool", "x", kernel_shape=[3, 3], pads=[0, 0, 1, 2])], {}, MAP, 11),
    "average pool same": ([node("AveragePool", "x", kernel_shape=[2, 2], auto_pad="SAME_LOWER")], {}, MAP, 11),
    "average pool dilated": (
        [node("AveragePool", "x", kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 1, 2, 0], strides=[1, 2])],
        {}, MAP, 19,
    ),
    "average pool dilated counts": (
        [node("AveragePool", "x", kernel_shape=[2, 3], dilations=[3, 2], pads=[1] * 4, count_include_pad=1)],
        {}, MAP, 19,
    ),
    "average pool dilated up": (
        [node("AveragePool", "x", kernel_shape=[3, 3], dilations=[2, 2], pads=[1, 1, 2, 1], strides=[2, 3], ceil_mode=1,
              count_include_pad=1)], {}, MAP, 19,
    ),
    "average pool dilated row": (
        [node("Reshape", "x s", "r"), node("AveragePool", "r", kernel_shape=[3], dilations=[4], strides=[2])],
        {"s": ints(0, 3, 80)}, MAP, 19,
    ),
    "average pool uneven up": (
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[0, 2, 2, 2], strides=[2, 2], ceil_mode=1)], {}, MAP, 19,
    ),
    "average pool uneven up, no window behind": (
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[0, 1, 2, 2], strides=[4, 3], ceil_mode=1,
              count_include_pad=1)], {}, MAP, 19,
    ),
    "pad": ([node("Pad", "x p v")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 0), "v": F(0.5)}, MAP, 13),
    "pad channels": ([node("Pad", "x", pads=[0, 1, 0, 0, 0, 2, 0, 0])], {}, MAP, 9),
    "pad reflect": ([node("Pad", "x p", mode="reflect")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}, MAP, 13),
    "pad edge": ([node("Pad", "x p", mode="edge")], {"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}, MAP, 13),
    "pad axes": ([node("Pad", "x p - a")], {"p": ints(1, 2), "a": ints(-2)}, MAP, 18),
    "pad negative": ([node("Pad", "x p")], {"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}, MAP, 13),
    "concat": ([node("Relu", "x", "r"), node("Concat", "x r", axis=1)], {}, MAP, 13),
    "concat stored": ([node("Concat", "x c", axis=2)], {"c": weights(1, 3, 2, 10)}, MAP, 13),
    "slice attributes": ([node("Slice", "x", starts=[1, 2], ends=[8, -1], axes=[2, 3])], {}, MAP, 9),
    "slice steps": (
        [node("Slice", "x s e a t")],
        {"s": ints(-1, 0), "e": ints(-(2**62), 2**62), "a": ints(3, 2), "t": ints(-2, 3)}, MAP, 13,
    ),
    "split": ([node("Split", "x", "a b", axis=2, split=[3, 5]), node("Concat", "b a", axis=2)], {}, MAP, 11),
    "split outputs": ([node("Split", "x", "a b", axis=3, num_outputs=2), node("Add", "b a")], {}, MAP, 18),
    "split input": ([node("Split", "x n", "a b", axis=1), node("Concat", "b a", axis=1)], {"n": ints(1, 2)}, MAP, 13),
    "gather one": ([node("Gather", "x i", axis=2)], {"i": np.asarray(-2, np.int64)}, MAP, 13),
    "gather several": ([node("Gather", "x i", axis=3)], {"i": ints(5, 0, 0, 9)}, MAP, 13),
    "gather evenly": ([node("Gather", "x i", axis=3)], {"i": ints(1, 4, 7)}, MAP, 13),
    "gather of two axes": (
        [node("Transpose", "x", "u", perm=[2, 3, 0, 1]), node("GatherND", "u i", "v"),
         node("Transpose", "v", perm=[2, 3, 0, 1])],
        {"i": ints(0, 0, 1, 1, -1, -1, 2, 9, 7, 3, 0, 5).reshape(3, 2, 2)}, MAP, 13,
    ),
    "gather table": ([node("Gather", "x i", axis=2)], {"i": ints(5, 0, 1, 7).reshape(2, 2)}, MAP, 13),
    "reshape": ([node("Reshape", "x s")], {"s": ints(1, 3, -1)}, MAP, 13),
    "reshape zeros": ([node("Reshape", "x s")], {"s": ints(0, 0, 80)}, MAP, 9),
    "reshape to rows": (
        [node("Reshape", "x s", "r"), node("MatMul", "r w", "m"), node("Reshape", "m t")],
        {"s": ints(24, 10), "w": weights(10, 4), "t": ints(1, 3, 8, 4)}, MAP, 13,
    ),
    "tokens before images": (
        [
            node("Reshape", "x a", "t0"), node("Transpose", "t0", "t1", perm=[2, 0, 1]), node("Reshape", "t1 b", "t2"),
            node("Transpose", "t2", "t3", perm=[1, 0, 2]), node("Softmax", "t3", "t4", axis=-1),
            node("Transpose", "t4", "t5", perm=[1, 0, 2]), node("Reshape", "t5 c", "t6"), node("MatMul", "t6 w", "t7"),
            node("Reshape", "t7 d", "t8"), node("Transpose", "t8", "y", perm=[1, 0, 2]),
        ],
        {"a": ints(1, 4, 20), "b": ints(20, 2, 2), "c": ints(20, 4), "w": weights(4, 5), "d": ints(20, 1, 5)},
        (4, 4, 5), 13,
    ),
    "squeeze": ([node("ReduceMean", "x", "m", axes=[2]), node("Squeeze", "m", axes=[2])], {}, MAP, 11),
    "unsqueeze": ([node("Unsqueeze", "x a")], {"a": ints(1, -1)}, MAP, 13),
    "transpose": ([node("Transpose", "x", perm=[0, 2, 3, 1])], {}, MAP, 13),
    "expand": ([node("ReduceMax", "x", "m", axes=[1]), node("Expand", "m s")], {"s": ints(1, 5, 8, 10)}, MAP, 11),
    "tile": ([node("Tile", "x r")], {"r": ints(1, 2, 1, 3)}, MAP, 13),
    "depth to space": ([node("DepthToSpace", "x", blocksize=2)], {}, (8, 4, 5), 13),
    "pixel shuffle": ([node("DepthToSpace", "x", blocksize=2, mode="CRD")], {}, (8, 4, 5), 13),
    "space to depth": ([node("SpaceToDepth", "x", blocksize=2)], {}, (3, 4, 6), 13),
    "lstm": (
        [
            node("Reshape", "x s", "r"), node("Transpose", "r", "t", perm=[1, 0, 2]),
            node("LSTM", "t w r0 b", "q h c", hidden_size=4, input_forget=0), node("Squeeze", "q one", "k"),
            node("Transpose", "k", perm=[1, 0, 2]),
        ],
        {"s": ints(-1, 24, 10), "w": weights(1, 16, 10), "r0": weights(1, 16, 4, seed=1), "b": weights(1, 32, seed=2),
         "one": ints(1)}, MAP, 14,
    ),
    "gru of both directions": (
        [
            node("Reshape", "x s", "r"), node("Transpose", "r", "t", perm=[1, 0, 2]),
            node("GRU", "t w r0 b", "q", hidden_size=4, direction="bidirectional", linear_before_reset=1,
                 activations=["Sigmoid", "Tanh"] * 2),
            node("Transpose", "q", perm=[2, 0, 1, 3]),
        ],
        {"s": ints(-1, 24, 10), "w": weights(2, 12, 10), "r0": weights(2, 12, 4, seed=1), "b": weights(2, 24, seed=2)},
        MAP, 14,
    ),
    "col2im": (
        [node("Reshape", "x s", "c"), node("Col2Im", "c size block", pads=[1, 1, 1, 1], strides=[2, 2])],
        {"s": ints(-1, 12, 20), "size": ints(7, 9), "block": ints(2, 2)}, MAP, 18,
    ),
    "col2im uneven": (
        [
            node("Reshape", "x s", "c"),
            node("Col2Im", "c size block", pads=[0, 1, 1, 2], dilations=[1, 2], strides=[2, 1]),
        ],
        {"s": ints(-1, 12, 20), "size": ints(7, 4), "block": ints(2, 2)}, MAP, 18,
    ),
    "clip attributes": ([node("Clip", "x", min=-0.5, max=0.25)], {}, MAP, 9),
    "clip relu6": ([node("Clip", "x lo hi")], {"lo": F(0), "hi": F(6)}, MAP, 13),
    "clip one side": ([node("Clip", "x - hi")], {"hi": F(0.5)}, MAP, 13),
    "prelu": ([node("PRelu", "x s")], {"s": weights(3, 1, 1)}, MAP, 13),
    "prelu wide": ([node("PRelu", "x s")], {"s": weights(8, 10)}, MAP, 13),
    "gelu": ([node("Gelu", "x")], {}, MAP, 20),
    "gelu tanh": ([node("Gelu", "x", approximate="tanh")], {}, MAP, 20),
    "hard sigmoid": ([node("HardSigmoid", "x", alpha=1 / 6, beta=0.5)], {}, MAP, 13),
    "add number": ([node("Add", "c x")], {"c": F(2)}, MAP, 13),
    "subtract from": ([node("Sub", "c x")], {"c": F(2)}, MAP, 13),
    "divide by channel": ([node("Div", "x c")], {"c": weights(3, 1, 1) + 2}, MAP, 13),
    "power": ([node("Abs", "x", "a"), node("Pow", "a c")], {"c": F(1.5)}, MAP, 13),
    "root of square": (
        [node("Mul", "x x", "s"), node("Sqrt", "s", "r"), node("Log", "r", "l"), node("Exp", "l", "y")], {}, MAP, 13,
    ),
    "min max": ([node("Min", "x c", "m"), node("Max", "m x d")], {"c": F(0.2), "d": weights(3, 1, 1)}, MAP, 13),
    "sum and mean": ([node("Relu", "x", "r"), node("Sum", "x r r", "s"), node("Mean", "s x")], {}, MAP, 13),
    "where": (
        [node("Greater", "x c", "g"), node("Not", "g", "n"), node("Where", "n x d")],
        {"c": F(0.1), "d": F(-1)}, MAP, 13,
    ),
    "comparisons": (
        [
            node("Less", "c x", "l"), node("GreaterOrEqual", "x d", "g"), node("And", "l g", "a"),
            node("Cast", "a", "f", to=TensorProto.FLOAT), node("Mul", "x f"),
        ],
        {"c": F(0), "d": weights(3, 1, 1)}, MAP, 16,
    ),
    "mod": ([node("Mod", "x c", fmod=1)], {"c": F(0.3)}, MAP, 13),
    "softmax 11": ([node("Softmax", "x", axis=1)], {}, MAP, 11),
    "softmax channels": ([node("Softmax", "x", axis=1)], {}, MAP, 13),
    "argmax": ([node("ArgMax", "x", "i", axis=1), node("Cast", "i", to=TensorProto.FLOAT)], {}, MAP, 13),
    "cumsum": ([node("CumSum", "x a")], {"a": np.asarray(2, np.int64)}, MAP, 14),
    "attention": ([node("Attention", "x x x", scale=0.5)], {}, (2, 5, 4), 23),
    "sums from behind": ([node("CumSum", "x a", reverse=1)], {"a": np.asarray(-1, np.int64)}, MAP, 14),
    "sums of those behind": ([node("CumSum", "x a", reverse=1, exclusive=1)], {"a": np.asarray(1, np.int64)}, MAP, 14),
    "sums of those before": ([node("CumSum", "x a", exclusive=1)], {"a": np.asarray(2, np.int64)}, MAP, 14),
    "inverse functions": (
        [node("Sigmoid", "x", "s"), node("Asin", "s", "a"), node("Acos", "s", "b"), node("Sub", "a b", "d"),
         node("Mul", "s half", "h"), node("Atanh", "h", "t"), node("Exp", "x", "e"), node("Add", "e one", "f"),
         node("Acosh", "f", "g"), node("Sum", "d t g")],
        {"half": F(0.5), "one": F(1)}, MAP, 13,
    ),
    "shrink": ([node("Shrink", "x", bias=0.1, lambd=0.3)], {}, MAP, 13),
    "infinite": (
        [node("Round", "x", "r"), node("Div", "x r", "d"), node("IsInf", "d", "i", detect_negative=0),
         node("IsInf", "d", "j", detect_positive=0), node("IsInf", "d", "k"), node("Cast", "i", "a", to=1),
         node("Cast", "j", "b", to=1), node("Cast", "k", "c", to=1), node("Mul", "a two", "e"), node("Sum", "e b c")],
        {"two": F(2)}, MAP, 13,
    ),
    "cast like": ([node("ArgMax", "x", "i", axis=1), node("CastLike", "i c", "f"), node("Mul", "f x")],
                  {"c": F(0)}, MAP, 15),
    "norm of windows": (
        [node("LpPool", "x", kernel_shape=[3, 2], strides=[1, 2], pads=[1, 0, 0, 1], p=3)], {}, MAP, 18,
    ),
    "norm of channels": ([node("GlobalLpPool", "x", p=3)], {}, MAP, 18),
    "mean and variance": ([node("MeanVarianceNormalization", "x", axes=[1, -1])], {}, MAP, 13),
    "largest": ([node("TopK", "x k", "v i", axis=-1), node("Cast", "i", "f", to=1), node("Sub", "v f")],
                {"k": ints(4)}, MAP, 13),
    "smallest channels": ([node("TopK", "x k", "y i", axis=1, largest=0)], {"k": ints(2)}, MAP, 11),
    "tokens of largest scores": (
        [node("Reshape", "x s", "t"), node("ReduceMax", "t", "m", axes=[1], keepdims=0), node("TopK", "m k", "v i"),
         node("Unsqueeze", "i one", "u"), node("Expand", "u e", "j"), node("GatherElements", "t j", axis=2)],
        {"s": ints(0, 3, 80), "k": ints(5), "one": ints(1), "e": ints(1, 3, 5)}, MAP, 13,
    ),
    "triangles": (
        [node("Trilu", "x", "a", upper=0), node("Trilu", "x k", "b", upper=1), node("Sub", "a b")],
        {"k": np.asarray(-2, np.int64)}, MAP, 14,
    ),
    "rows replaced": (
        [node("Neg", "x", "n"), node("Slice", "n from to axis", "u"), node("ScatterND", "x places u")],
        {"from": ints(0), "to": ints(2), "axis": ints(2), "places": PLACES}, MAP, 13,
    ),
    "rows replaced by stored ones": ([node("ScatterND", "x places u")], {"places": PLACES, "u": weights(1, 3, 2, 10)},
                                     MAP, 13),
    "entries replaced, of any number of images": (
        [node("Shape", "x", "s", start=0, end=1), node("Concat", "s rest", "e", axis=0), node("Gather", "s zero", "n"),
         node("Range", "zero n one", "r"), node("Reshape", "r down", "d"), node("Expand", "d e", "images"),
         node("Expand", "inner e", "places"), node("Concat", "images places", "p", axis=-1),
         node("Slice", "x from to axes", "u"), node("ScatterND", "x p u")],
        {"rest": ints(2, 1), "zero": np.asarray(0, np.int64), "one": np.asarray(1, np.int64), "down": ints(-1, 1, 1),
         "inner": ints(2, 0).reshape(1, 2, 1), "from": ints(0), "to": ints(2), "axes": ints(1)},
        (3, 8, 10), 15,
    ),
    "rows replaced behind which the images lie": (
        [node("Neg", "x", "n"), node("Transpose", "n", "m", perm=[2, 3, 1, 0]), node("Slice", "m from to", "u"),
         node("Transpose", "x", "t", perm=[2, 3, 1, 0]), node("ScatterND", "t places u", "r"),
         node("Transpose", "r", perm=[3, 2, 0, 1])],
        {"from": ints(0), "to": ints(3), "places": ints(1, -2, 2).reshape(3, 1)}, MAP, 13,
    ),
    "entries replaced behind which the images lie": (
        [node("Transpose", "x", "t", perm=[2, 3, 0, 1]), node("Gather", "t five", "u"),
         node("Slice", "u zero two", "v"), node("ScatterND", "t places v", "r"),
         node("Transpose", "r", perm=[2, 3, 0, 1])],
        {"five": np.asarray(5, np.int64), "zero": ints(0), "two": ints(2), "places": ints(0, 3, 7, 9).reshape(2, 2)},
        MAP, 13,
    ),
    "parts written into zeros": (
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "z"), node("Transpose", "z", "t", perm=[1, 0, 2, 3]),
         node("Slice", "x zero two one", "a"), node("Exp", "a", "e"), node("Transpose", "e", "u", perm=[1, 0, 2, 3]),
         node("ScatterND", "t places u", "r"), node("Transpose", "r", perm=[1, 0, 2, 3])],
        {"zero": ints(0), "one": ints(1), "two": ints(2), "places": ints(0, 2).reshape(2, 1)}, MAP, 13,
    ),
    "places that the images say": (
        [node("TopK", "x k", "v i", axis=2), node("Shape", "x", "s"), node("ConstantOfShape", "s", "z"),
         node("Softmax", "v", "w", axis=2), node("ScatterElements", "z i w", axis=2)],
        {"k": ints(3)}, MAP, 13,
    ),
    "places of one image": (
        [node("GatherElements", "x i", "g", axis=2), node("ScatterElements", "x j g", axis=2)],
        {"i": random_places(8, 1, 3, 2, 10), "j": random_places(8, 1, 3, 2, 10)[:, :, ::-1].copy()}, MAP, 13,
    ),
    "samples at the places of one image": ([node("GridSample", "x g")], {"g": weights(1, 5, 6, 2)}, MAP, 16),
    "one place of an axis": (
        [node("Gather", "x two", "g", axis=2), node("Unsqueeze", "g two1", "u"), node("Exp", "u", "e"),
         node("Shape", "e", "s"), node("Expand", "k s", "i"), node("ScatterElements", "x i e", axis=2)],
        {"two": np.asarray(2, np.int64), "two1": ints(2), "k": np.asarray(-3, np.int64)}, MAP, 13,
    ),
    "one place of an axis, of old": (
        [node("Slice", "x from to axes", "u"), node("Shape", "u", "s"), node("Expand", "k s", "i"),
         node("Scatter", "x i u", axis=1)],
        {"from": ints(0), "to": ints(1), "axes": ints(1), "k": np.asarray(2, np.int64)}, MAP, 10,
    ),
    "parts of a sequence": (
        [node("SplitToSequence", "x sizes", "q", axis=2), node("SequenceAt", "q zero", "a"),
         node("SequenceAt", "q back", "b"), node("Concat", "b a", axis=2)],
        {"sizes": ints(3, 5), "zero": np.asarray(0, np.int64), "back": np.asarray(-1, np.int64)}, MAP, 13,
    ),
    "parts of one length": (
        [node("SplitToSequence", "x size", "q", axis=-1), node("SequenceAt", "q two", "a"),
         node("SequenceAt", "q zero", "b"), node("SequenceConstruct", "a b", "r"),
         node("ConcatFromSequence", "r", axis=3)],
        {"size": np.asarray(4, np.int64), "zero": np.asarray(0, np.int64), "two": np.asarray(2, np.int64)}, MAP, 13,
    ),
    "entries of a sequence": (
        [node("SplitToSequence", "x", "q", axis=1, keepdims=0), node("SequenceAt", "q two")],
        {"two": np.asarray(2, np.int64)}, MAP, 13,
    ),
    "attention of few keys": (
        [node("Slice", "x zero two one", "k"), node("Attention", "x k k")],
        {"zero": ints(0), "two": ints(2), "one": ints(1)}, (4, 5, 6), 23,
    ),
    "attention of few keys, in rows": (
        [node("Reshape", "x s", "t"), node("Slice", "t zero half two", "k"),
         node("Attention", "t k k", q_num_heads=4, kv_num_heads=2)],
        {"s": ints(0, 6, 16), "zero": ints(0), "half": ints(8), "two": ints(2)}, (6, 4, 4), 23,
    ),
    "attention heads": (
        [node("Reshape", "x s", "t"), node("Attention", "t t t m", q_num_heads=2, kv_num_heads=2)],
        {"s": ints(0, 6, 8), "m": weights(6, 6)}, (3, 4, 4), 23,
    ),
    "shape arithmetic": (
        [
            node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s one", "c"),
            node("Unsqueeze", "n axis", "n1"), node("Unsqueeze", "c axis", "c1"),
            node("Concat", "n1 c1 rest", "t", axis=0),
            node("Reshape", "x t"),
        ],
        {"zero": np.asarray(0), "one": np.asarray(1), "axis": ints(0), "rest": ints(-1)}, MAP, 13,
    ),
    "class token": (
        [
            node("Reshape", "x to", "t"), node("Transpose", "t", "u", perm=[0, 2, 1]), node("Shape", "u", "s"),
            node("Slice", "s zero one", "n"), node("Concat", "n rest", "e", axis=0), node("Expand", "c e", "d"),
            node("Concat", "d u", axis=1),
        ],
        {"to": ints(0, 3, 80), "zero": ints(0), "one": ints(1), "rest": ints(1, 3), "c": weights(1, 1, 3)}, MAP, 13,
    ),
    "zeros of the batch": (
        [
            node("Shape", "x", "s", start=0, end=1), node("Concat", "s rest", "e", axis=0),
            node("ConstantOfShape", "e", "z"), node("Concat", "z x", axis=2),
        ],
        {"rest": ints(3, 2, 10)}, MAP, 15,
    ),
}  # fmt: skip
REDUCTIONS = ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp"]
COORDINATES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
FIRST_STATES = ["zero", "stored", "of the images", "of their number", "of one cell"]


def recurrent(kind: str, direction: str, first: str, **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    """A recurrent operator over the columns of the image, with all that it gives: q, h, and y of an LSTM."""
    count, gates, cells = DIRECTIONS[direction], GATES[kind], ["k"] * (kind == "LSTM")
    states = {"zero": "-", "stored": "h0", "of the images": "hi", "of their number": "hn", "of one cell": "-"}[first]
    cell = {"stored": "c0", "of the images": "hi", "of their number": "hn", "of one cell": "c0"}.get(first, "-")
    nodes = [
        node("Reshape", "x s", "r"), node("Transpose", "r", "t", perm=[1, 0, 2]),
        node("ReduceMean", "x", "m", axes=[2], keepdims=0), node("Reshape", "m ms", "mr"),
        node("MatMul", "mr mw", "mm"), node("Reshape", "mm hs", "hm"), node("Transpose", "hm", "hi", perm=[1, 0, 2]),
        node("Shape", "x", "sx"), node("Gather", "sx zero", "n"), node("Concat", "d n c", "nc", axis=0),
        node("Expand", "h0 nc", "hn"),
        node(kind, f"t w r0 b lengths {states} {cell}".removesuffix(f" {cell}" if kind != "LSTM" else ""),
             " ".join(["q0", "h1", *cells]), hidden_size=4, direction=direction, **settings),
        node("Transpose", "q0", "q", perm=[2, 0, 1, 3]), node("Transpose", "h1", "h", perm=[1, 0, 2]),
    ]  # fmt: skip
    nodes += [node("Transpose", "k", "y", perm=[1, 0, 2])] * (kind == "LSTM")
    stored = {
        "s": ints(-1, 24, 10), "ms": ints(-1, 30), "mw": weights(30, count * 4, seed=7), "hs": ints(-1, count, 4),
        "zero": ints(0), "d": ints(count), "c": ints(4), "lengths": np.asarray([24], np.int32),
        "w": weights(count, gates * 4, 10), "r0": weights(count, gates * 4, 4, seed=1),
        "b": weights(count, gates * 8, seed=2), "h0": weights(count, 1, 4, seed=3), "c0": weights(count, 1, 4, seed=4),
    }  # fmt: skip
    return nodes, stored


def written(folder: Path, name: str, batch: Any) -> Path:
    nodes, stored, shape, opset = CASES[name]
    return write(folder / "tiny.onnx", nodes, (batch, *shape), stored, opset=opset)


FIXED_ONLY = {
    "concat stored", "places of one image", "reshape", "reshape to rows", "rows replaced",
    "rows replaced by stored ones", "samples at the places of one image", "tokens before images",
}  # fmt: skip
"""Files that are wrong for any other batch than their own."""


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize("name", CASES)
def test_operator_computes_what_the_runtime_does(name: str, batch: Any, tmp_path: Path) -> None:
    if batch == "N" and name in FIXED_ONLY:
        pytest.skip("the file says one image")
    same_as_runtime(written(tmp_path, name, batch))


def test_parts_of_the_one_image_of_a_file(tmp_path: Path) -> None:
    nodes = [node("Slice", "x zero two one", "s"), node("Reshape", "s c", "v"), node("Unsqueeze", "v zero", "u"),
             node("Transpose", "u", "w", perm=[1, 0, 2, 3]), node("Transpose", "x", "t", perm=[1, 0, 2, 3]),
             node("ScatterND", "t places w", "r"), node("Transpose", "r", perm=[1, 0, 2, 3])]  # fmt: skip
    stored = {"zero": ints(0), "one": ints(1), "two": ints(2), "c": ints(2, 8, 10), "places": ints(0, 2).reshape(2, 1)}
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored))


@pytest.mark.parametrize("first", FIRST_STATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", GATES)
def test_recurrent_operators(kind: str, direction: str, first: str, tmp_path: Path) -> None:
    settings = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes, stored = recurrent(kind, direction, first, **settings)
    outputs = "q h y" if kind == "LSTM" else "q h"
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored, opset=14, outputs=outputs))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_recurrent_operators_of_a_rectifier(direction: str, tmp_path: Path) -> None:
    nodes, stored = recurrent("RNN", direction, "stored", activations=["Relu"] * DIRECTIONS[direction])
    same_as_runtime(write(tmp_path / "tiny.onnx", nodes, (1, *MAP), stored, opset=14, outputs="q h"))


@pytest.mark.parametrize("name", SIMPLE)
def test_operators_of_the_image_alone(name: str, tmp_path: Path) -> None:
    opset = 22 if name in {"HardSwish", "Mish"} else 11 if name == "Softmax" else 13
    same_as_runtime(write(tmp_path / "tiny.onnx", [node(name, "x")], ("N", *MAP), opset=opset))


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, keep: int, tmp_path: Path) -> None:
    one = write(tmp_path / "a.onnx", [node(f"Reduce{name}", "x", axes=[1, -1], keepdims=keep)], (1, *MAP), opset=11)
    two = write(tmp_path / "b.onnx", [node(f"Reduce{name}", "x a", keepdims=keep)], ("N", *MAP), {"a": ints(2)})
    same_as_runtime(one)
    same_as_runtime(two)


@pytest.mark.parametrize("size", [(16, 20), (5, 13), (12, 7)])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("placed", COORDINATES)
def test_resize_places_pixels_as_the_file_says(placed: str, mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    stored = {"s": ints(1, 3, *size)}
    made = node("Resize", "x - - s", mode=mode, coordinate_transformation_mode=placed)
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, *MAP), stored, opset=19))


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("placed", ["half_pixel", "asymmetric", "align_corners"])
def test_nearest_pixels(placed: str, rounding: str, tmp_path: Path) -> None:
    made = node("Resize", "x - f", mode="nearest", coordinate_transformation_mode=placed, nearest_mode=rounding)
    stored = {"f": np.asarray([1, 1, 2.5, 0.5], F)}
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, *MAP), stored, opset=13))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("factors", [(1.7, 2.3), (0.7, 1.1), (1.13, 0.7)])
def test_lengths_of_factors_are_those_of_float32(mode: str, factors: tuple[float, float], tmp_path: Path) -> None:
    made = node("Resize", "x - f", mode=mode)
    stored = {"f": np.asarray([1, 1, *factors], F)}
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, 3, 10, 10), stored, opset=13))


def test_nearest_pixels_of_factors_are_those_of_float32(tmp_path: Path) -> None:
    for placed, rounding, factor in itertools.product(
        ("half_pixel", "asymmetric", "align_corners"), ("round_prefer_floor", "ceil"), (0.7, 1.1, 1.4, 2.3)
    ):
        made = node("Resize", "x - f", mode="nearest", coordinate_transformation_mode=placed, nearest_mode=rounding)
        stored = {"f": np.asarray([1, 1, 1, factor], F)}
        same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, 3, 1, 16), stored, opset=13))


def test_factors_that_leave_all_lengths_copy(tmp_path: Path) -> None:
    made = node("Resize", "x - f", mode="linear", coordinate_transformation_mode="asymmetric")
    stored = {"f": np.asarray([1, 1, 1.1, 1.05], F)}
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, 3, 7, 8), stored, opset=13))


@pytest.mark.parametrize("size", [(16, 20), (5, 13), (3, 10), (3, 4)])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("placed", ["half_pixel", "pytorch_half_pixel"])
def test_resize_smooths_as_the_file_says(placed: str, mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    steep = {"cubic_coeff_a": -0.5} if mode == "cubic" else {}
    made = node("Resize", "x - - s", mode=mode, coordinate_transformation_mode=placed, antialias=1, exclude_outside=1,
                **steep)  # fmt: skip
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, *MAP), {"s": ints(1, 3, *size)}, opset=19))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_what_grows_needs_no_smoothing(mode: str, tmp_path: Path) -> None:
    linear = {"antialias": 1, "exclude_outside": 0}
    settings = linear if mode == "linear" else {"cubic_coeff_a": -0.5, "exclude_outside": 1}
    made = node("Resize", "x - - s", mode=mode, **settings)
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, *MAP), {"s": ints(1, 3, 9, 25)}, opset=19))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "linear", "antialias": 1}, "exclude_outside=1 and half_pixel are read"),
        ({"mode": "linear", "antialias": 1, "exclude_outside": 1, "coordinate_transformation_mode": "asymmetric"},
         "exclude_outside=1 and half_pixel are read"),
        ({"mode": "cubic", "antialias": 1, "exclude_outside": 1}, "cubic weights"),
        ({"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}, "cubic weights"),
        ({"mode": "linear", "keep_aspect_ratio_policy": "not_larger"}, "keeps the aspect ratio"),
    ],
)  # fmt: skip
def test_resize_unlike_that_of_pytorch(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made = [node("Resize", "x - - s", "r", **settings), node("Conv", "r w")]
    stored = {"s": ints(1, 3, 4, 5), "w": weights(2, 3, 1, 1)}
    with pytest.raises(ModelError, match=reason):
        OnnxFile.read(write(tmp_path / "tiny.onnx", made, (1, *MAP), stored, opset=19))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("factors", [(2, 1), (1, 1.5)])
@pytest.mark.parametrize("placed", ["half_pixel", "align_corners", "asymmetric"])
def test_one_axis_is_resized(placed: str, factors: tuple[float, float], mode: str, tmp_path: Path) -> None:
    made = node("Resize", "x - f", mode=mode, coordinate_transformation_mode=placed)
    stored = {"f": np.asarray([1, 1, *factors], F)}
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, *MAP), stored, opset=13))


def test_two_axes_of_volumes_are_resized(tmp_path: Path) -> None:
    made = node("Resize", "x - - s", mode="linear")
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, 2, 3, 8, 10), {"s": ints(1, 2, 3, 12, 25)}, opset=13))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("factor", [2.0, 7.3])
def test_upsample_of_opset_9_with_channels_last(mode: str, factor: float, tmp_path: Path) -> None:
    stored = {"f": np.asarray([1, factor, factor, 1], F)}
    made = node("Upsample", "x f", mode=mode)
    same_as_runtime(write(tmp_path / "tiny.onnx", [made], (1, 5, 6, 3), stored, opset=9))


def test_upsample_of_one_pixel_repeats_it(tmp_path: Path) -> None:
    made = [node("GlobalAveragePool", "x", "m"), node("Upsample", "m f", mode="linear")]
    same_as_runtime(write(tmp_path / "tiny.onnx", made, (1, *MAP), {"f": np.asarray([1, 1, 8, 10], F)}, opset=9))


def test_every_operator_of_the_table_is_tested() -> None:
    operators.find("")
    tested = (
        {n.op_type for nodes, *_ in CASES.values() for n in nodes} | set(SIMPLE) | {f"Reduce{n}" for n in REDUCTIONS}
    )
    tested |= {"Resize", "Upsample", *GATES}
    untested = {n for n in operators.OPERATORS if not n.startswith("bitwright.")} - tested
    assert untested <= {
        "IsNaN", "Or", "Xor", "Equal", "LessOrEqual", "Swish", "ArgMin", "ReduceLogSum", "GridSample", "Size",
    }  # fmt: skip


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_a_shape_that_is_set_free_keeps_images_apart(shape: list[int], random: Random) -> None:
    factors = [f for size in shape for f in ((2, 2) if size == 4 else (size,))]
    cuts = sorted(random.choices(range(len(factors) + 1), k=random.randint(0, 3)))
    target = [math.prod(factors[a:b]) for a, b in pairwise([0, *cuts, len(factors)])]
    one, two = (torch.empty(n, *shape) for n in (1, 2))
    sizes = moves.freed(Traced("x", one, two), [1, *target])
    x = torch.randn(3, *shape)
    assert x.reshape(sizes).equal(torch.stack([image.reshape(target) for image in x]))
