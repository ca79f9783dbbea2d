"""Copies to a GPU and back that wait no more than they have to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; nothing waits until it is there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one type on the CPU, with one wait for a GPU, however many there are.

    Example:
        >>> fetched([torch.tensor([1, 2]), torch.tensor(3)])
        [tensor([1, 2]), tensor(3)]
    """
    there = [t for t in tensors if t.device.type != "cpu"]
    if not there:
        return list(tensors)
    parts = iter(torch.split(torch.cat([t.reshape(-1) for t in there]).cpu(), [t.numel() for t in there]))
    return [t if t.device.type == "cpu" else next(parts).reshape(t.shape).clone() for t in tensors]
