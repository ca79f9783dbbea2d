"""Convolutions and products with stored matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.operators.windows import Window, padded, window_of
from bitwright.onnx_in.values import Known, Node, NodeCall, Operand, Unsupported, call, scalar, shape_of

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv", "bitwright.Conv")
def convolution(node: Node) -> NodeCall:
    """``Conv``, with padding on its own where that is uneven."""
    operands = _with_bias(node)
    shape = shape_of(node.input(1))
    window = window_of(node, node.ints("kernel_shape") or shape[2:])
    groups = node.whole("group", 1)
    function = CONVOLUTIONS.get(len(window.kernel))
    if function is None:
        raise Unsupported(f"its windows have {len(window.kernel)} axes")
    if window.even:
        return call(
            function, *operands, stride=window.stride, padding=window.before, dilation=window.dilation, groups=groups
        )
    return call(_padded_convolution, *operands, window=window, groups=groups)


def _padded_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, window: Window, groups: int
) -> Tensor:
    function = CONVOLUTIONS[len(window.kernel)]
    return function(padded(x, window, 0.0), weight, bias, stride=window.stride, dilation=window.dilation, groups=groups)


def _with_bias(node: Node) -> tuple[Operand, ...]:
    return tuple(node.input(k) for k in range(3 if node.has(2) else 2))


@operator("ConvTranspose")
def transposed_convolution(node: Node) -> NodeCall:
    """``ConvTranspose``; what uneven padding takes away is cut off afterwards."""
    operands = _with_bias(node)
    shape, sizes = shape_of(node.input(1)), shape_of(node.input(0))[2:]
    rank = len(shape) - 2
    function = TRANSPOSED.get(rank)
    if function is None:
        raise Unsupported(f"its windows have {rank} axes")
    kernel = node.ints("kernel_shape") or shape[2:]
    stride, dilation = node.ints("strides") or (1,) * rank, node.ints("dilations") or (1,) * rank
    more = node.ints("output_padding") or (0,) * rank
    whole = [
        (n - 1) * s + d * (k - 1) + 1 + m
        for n, s, d, k, m in zip(sizes, stride, dilation, kernel, more, strict=True)
    ]  # fmt: skip
    before, after = _cut(node, rank, whole, [n * s for n, s in zip(sizes, stride, strict=True)])
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": node.whole("group", 1)}
    if before == after and all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        return call(function, *operands, padding=before, output_padding=more, **settings)
    ends = [w - a for w, a in zip(whole, after, strict=True)]
    return call(_cut_convolution, *operands, starts=before, ends=tuple(ends), **settings)


def _cut(node: Node, rank: int, whole: list[int], same: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is cut off before and after each axis of the whole result."""
    mode, shape = node.text("auto_pad", "NOTSET"), node.ints("output_shape")
    if shape is not None or mode.startswith("SAME"):
        wanted = shape[-rank:] if shape is not None else same
        total = [max(w - n, 0) for w, n in zip(whole, wanted, strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (more, less) if mode == "SAME_LOWER" or (mode == "NOTSET" and shape is not None) else (less, more)
    pads = (0,) * 2 * rank if mode == "VALID" else node.ints("pads") or (0,) * 2 * rank
    return pads[:rank], pads[rank:]


def _cut_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    **settings: Any,
) -> Tensor:
    whole = TRANSPOSED[len(ends)](x, weight, bias, **settings)
    missing = [max(e - n, 0) for e, n in zip(ends, whole.shape[2:], strict=True)]
    if any(missing):
        whole = F.pad(whole, [p for m in reversed(missing) for p in (0, m)])
    for axis, (start, end) in enumerate(zip(starts, ends, strict=True), 2):
        whole = whole.narrow(axis, start, end - start)
    return whole


@operator("Gemm")
def gemm(node: Node) -> NodeCall:
    """``alpha * A' B' + beta * C``; a linear layer where B is stored and the rest allows it."""
    x, weight = node.input(0), node.input(1)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    turned = node.whole("transA", 0)
    bias = node.input(2) if node.has(2) else None
    if not isinstance(weight, Known) or (bias is not None and not isinstance(bias, Known)):
        return _general_gemm(node, alpha, beta)
    matrix = weight.small if node.whole("transB", 0) else weight.small.T
    operands: list[Operand] = [x, Known.of(np.ascontiguousarray(alpha * matrix) if alpha != 1 else matrix)]
    if bias is not None:
        values = np.broadcast_to(bias.small.reshape(-1), (matrix.shape[0],))
        operands.append(Known.of(np.ascontiguousarray(beta * values if beta != 1 else values)))
    return call(_turned_linear if turned else F.linear, *operands)


def _turned_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.t(), weight, bias)


def _general_gemm(node: Node, alpha: float, beta: float) -> NodeCall:
    return call(
        _gemm, *_with_bias(node), alpha=alpha, beta=beta, turns=(node.whole("transA", 0), node.whole("transB", 0))
    )


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float, beta: float, turns: tuple[int, int]
) -> Tensor:
    product = torch.matmul(a.t() if turns[0] else a, b.t() if turns[1] else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


@operator("MatMul")
def product(node: Node) -> NodeCall:
    """A linear layer where the second factor is a stored matrix."""
    a, b = node.input(0), node.input(1)
    if isinstance(b, Known) and b.fixed and b.small.ndim == 2 and not isinstance(a, Known):
        return call(F.linear, a, Known.of(np.ascontiguousarray(b.small.T)))
    return call(torch.matmul, a, b)


@operator("bitwright.Linear")
def biased_product(node: Node) -> NodeCall:
    """A product with a stored matrix, and a stored vector that is added to it."""
    matrix, bias = node.input(1), node.input(2)
    assert isinstance(matrix, Known)
    assert isinstance(bias, Known)
    return call(F.linear, node.input(0), Known.of(np.ascontiguousarray(matrix.small.T)), bias)


@operator("Einsum")
def einsum(node: Node) -> NodeCall:
    """Sums of products, by the same formula."""
    operands = [node.input(k) for k in range(len(node.inputs))]
    return call(_einsum, *operands, equation=node.text("equation", ""))


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *tensors)


@operator("Attention", "bitwright.Attention")
def attention(node: Node) -> NodeCall:
    """``softmax(q k^T * scale + mask) v``, of heads [N, H, L, E] or of [N, L, H * E] (opset 23)."""
    q, k, v = (node.input(i) for i in range(3))
    if any(node.has(i) for i in (4, 5)) or node.outputs > 1 or node.number("softcap", 0.0):
        raise Unsupported("it keeps earlier keys, or caps its scores")
    if node.has(3) and scalar(node.inputs[3]) is not None:
        raise Unsupported("its mask is a number")
    scale = node.number("scale", 0.0) or None
    heads = (node.whole("q_num_heads", 0), node.whole("kv_num_heads", 0))
    mask = [node.input(3)] if node.has(3) else []
    return call(_attention, q, k, v, *mask, scale=scale, heads=heads, causal=bool(node.whole("is_causal", 0)))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None,
    heads: tuple[int, int],
    causal: bool,
) -> Tensor:
    if any(heads):
        q, k, v = (
            x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)
            for x, count in zip((q, k, v), (heads[0], heads[1], heads[1]), strict=True)
        )
    queries = q.shape[1] // k.shape[1] if q.dim() == 4 else 1
    k, v = (x.repeat_interleave(queries, 1) for x in (k, v)) if queries > 1 else (k, v)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return found.transpose(1, 2).flatten(2) if any(heads) else found
