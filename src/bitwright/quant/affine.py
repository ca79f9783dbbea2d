"""The affine quantizer as pure functions of tensors. Imports torch and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LARGE, PIECE = 1 << 20, 1 << 16
"""Elements from which on a tensor is rounded in pieces, and those of a piece for each thread: it stays in the cache."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """Integer codes of ``x`` on the grid, kept in the dtype of ``x``.

    ``clamp(round(x / scale) + zero_point, qmin, qmax)``, rounding half to even and before the zero point is
    added, as ONNX ``QuantizeLinear`` does.

    Args:
        x: any shape.
        scale: step, broadcastable to ``x``, positive.
        zero_point: integer-valued, broadcastable to ``x``.
        qmin: lowest code.
        qmax: highest code.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.5, 1.5, 9.0]), torch.tensor(1.0), torch.tensor(0.0), 0, 3)
        tensor([0., 0., 2., 3.])
    """
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """Values of integer codes: ``(codes - zero_point) * scale``, in the dtype of ``scale``.

    Args:
        codes: of any shape.
        scale: broadcastable to the codes, as is ``zero_point``.
        zero_point: the code of 0.
    """
    return (codes.to(scale.dtype) - zero_point).mul_(scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """``x`` moved to the nearest value of the grid: ``dequantize(quantize(x))`` (methods, section 0.1).

    Example:
        >>> fake_quantize(torch.tensor([0.3, 2.2]), torch.tensor(0.5), torch.tensor(0.0), 0, 3)
        tensor([0.5000, 1.5000])
    """
    found = torch.empty_like(x) if _is_large(x, scale) else None
    if found is None:
        codes = (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)  # bounds that are tensors are slow
        return codes.sub_(zero_point).mul_(scale)
    if x.dtype == torch.float32:
        _fake_quantize_into(found, x, scale, float(zero_point), qmin, qmax)
        return found
    for part, out in pieces(x, found):
        torch.div(part, scale, out=out).round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)
    return found


def _fake_quantize_into(found: Tensor, x: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int) -> None:
    """The same bits in four steps instead of six: float32 holds a code and a zero point without rounding."""
    low, high, step, zero = qmin - zero_point, qmax - zero_point, float(scale), torch.zeros((), dtype=x.dtype)
    for part, out in pieces(x, found):
        torch.div(part, scale, out=out).round_().clamp_(low, high)
        torch.add(zero, out, alpha=step, out=out)  # 0 is never negative, as where a zero point is added


def nearest_multiple(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """``clamp(round(x / step), low, high) * step`` without a gradient, for one step.

    Example:
        >>> nearest_multiple(torch.tensor([0.3, 9.0]), torch.tensor(0.5), -4, 3)
        tensor([0.5000, 1.5000])
    """
    found = torch.empty_like(x) if _is_large(x, step) else None
    if found is None:
        return torch.round(x / step).clamp_(low, high).mul_(step)
    for part, out in pieces(x, found):
        torch.div(part, step, out=out).round_().clamp_(low, high).mul_(step)
    return found


def _is_large(x: Tensor, scale: Tensor) -> bool:
    """Whether to compute in pieces: on a processor, without gradients, of dense tensors beyond its caches."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() >= LARGE
        and scale.dim() == 0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad))
        and _order(x) is not None
    )


def pieces(x: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of two tensors of one memory order, piece by piece, which stay in the cache; both whole if not dense."""
    order = _order(x)
    if order is None:
        return iter([(x, found)])
    flat = [t.permute(order).view(-1) for t in (x, found)]
    size = PIECE * torch.get_num_threads()
    return zip(*(torch.split(t, size) for t in flat), strict=True)


def _order(x: Tensor) -> tuple[int, ...] | None:
    """Of a dense tensor's axes in memory; None where there are gaps, or another order than those of networks."""
    if x.is_contiguous():
        return tuple(range(x.dim()))
    return (0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def next_power_of_two(scale: Tensor) -> Tensor:
    """The least power of two that is no smaller, exactly.

    Example:
        >>> next_power_of_two(torch.tensor([0.3, 0.5, 5.0]))
        tensor([0.5000, 0.5000, 8.0000])
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def to_blocks(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """Gathers the elements that share one scale into rows.

    Args:
        x: a weight, for example [O, I, kh, kw].
        block: extent of one scale along each axis; ``(1, I, kh, kw)`` is one scale per output channel. A block
            that does not divide its axis leaves a shorter tail, filled with zeros here.

    Returns:
        [number of blocks, elements per block], the blocks in row-major order.

    Example:
        >>> to_blocks(torch.arange(6.0).view(2, 3), (1, 2))
        tensor([[0., 1.],
                [2., 0.],
                [3., 4.],
                [5., 0.]])
    """
    counts = [-(-d // b) for d, b in zip(x.shape, block, strict=True)]
    padding: list[int] = []
    for d, b, n in reversed(list(zip(x.shape, block, counts, strict=True))):
        padding += [0, n * b - d]
    if any(padding):
        x = torch.nn.functional.pad(x, padding)
    split = [s for n, b in zip(counts, block, strict=True) for s in (n, b)]
    rank = len(block)
    order = [2 * i for i in range(rank)] + [2 * i + 1 for i in range(rank)]
    return x.reshape(split).permute(order).reshape(_product(counts), _product(block))


def expand_blocks(per_block: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Broadcasts one value per block back over a tensor.

    Args:
        per_block: as many elements as blocks, in row-major order.
        shape: of the tensor that is quantized.
        block: as in :func:`to_blocks`.

    Returns:
        A tensor broadcastable to ``shape``.

    Example:
        >>> expand_blocks(torch.tensor([1.0, 2.0, 3.0, 4.0]), (2, 3), (1, 2))
        tensor([[1., 1., 2.],
                [3., 3., 4.]])
    """
    counts = [-(-d // b) for d, b in zip(shape, block, strict=True)]
    out = per_block.reshape(counts)
    for axis, (d, b) in enumerate(zip(shape, block, strict=True)):
        if 1 < b < d:
            out = out.repeat_interleave(b, dim=axis).narrow(axis, 0, d)
    return out


def _product(values: list[int] | tuple[int, ...]) -> int:
    result = 1
    for v in values:
        result *= v
    return result
