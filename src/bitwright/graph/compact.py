"""Tensors that lie on an activation's grid, held as codes of one byte each: a quarter of their memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bitwright.graph import ops
from bitwright.quant import affine
from bitwright.quant.quantizer import Quantizer


@dataclass(frozen=True)
class HeldCodes:
    """What a tensor of a grid's values is held as; :meth:`values` gives the same tensor again, bit for bit."""

    codes: Tensor
    quantizer: Quantizer

    @classmethod
    def of(cls, value: Tensor, quantizer: Quantizer) -> HeldCodes | None:
        """The codes of ``value`` [...]; None where one of its elements is no value of the grid."""
        grid, (scale, zero_point) = quantizer.grid, quantizer.expanded()
        found = torch.empty_like(value, dtype=torch.int8 if grid.qmin < 0 else torch.uint8)
        for part, out in affine.pieces(value, found):
            codes = grid.codes(part, scale, zero_point)
            if not torch.equal(grid.values(codes, scale, zero_point), part):
                return None
            out.copy_(codes)
        return cls(found, quantizer)

    def values(self) -> Tensor:
        """The tensor, float32, in the shape of the codes."""
        scale, zero_point = self.quantizer.expanded()
        found = torch.empty_like(self.codes, dtype=scale.dtype)
        for part, out in affine.pieces(self.codes, found):
            out.copy_(self.quantizer.grid.values(part, scale, zero_point))
        return found


class Room:
    """Memory for a tensor of every batch, in one piece.

    Tensors that stay would else lie in the holes that those of the next batch fit into, and the heap would grow to
    twice of what is in use.

    Args:
        batches: how many there will be; the first has as many elements as any.
    """

    def __init__(self, batches: int) -> None:
        self._batches, self._taken = batches, 0
        self._all: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor [...] in its place, itself where it is a part of another or there is no place."""
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            return tensor
        if self._all is None:
            self._all = tensor.new_empty(tensor.numel() * self._batches)
        if tensor.dtype != self._all.dtype or self._taken + tensor.numel() > len(self._all):
            return tensor
        found = self._all.as_strided(tensor.shape, tensor.stride(), self._taken).copy_(tensor)
        self._taken += tensor.numel()
        return found


def grid_of(graph: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer on whose grid a node's values lie, if their codes fit a byte: its own, or that of what it moves."""
    while node.op == "call_function" and ops.kind(node) == "move":
        node = ops.moved(node)
    if node.op != "call_module":
        return None
    found = graph.get_submodule(str(node.target))
    if not isinstance(found, Quantizer) or found.role != "activation" or found.scale.numel() != 1:
        return None
    return found if found.grid.bits <= 8 else None
