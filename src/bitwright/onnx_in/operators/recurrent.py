"""Recurrent operators, whose gates ONNX has in another order than PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.values import Known, Node, NodeCall, Operand, Unsupported, call

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Places in ONNX of PyTorch's gates: input, forget, cell, output of an LSTM; reset, update, new of a GRU."""
FUNCTIONS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}
DIRECTIONS = {"forward": 1, "bidirectional": 2}


@operator("LSTM", "GRU")
def recurrent(node: Node) -> NodeCall:
    """Steps along the first axis [T, N, C], from a state of zeros, by PyTorch's own gates."""
    _check_settings(node)
    directions = DIRECTIONS[node.text("direction", "forward")]
    gates = GATES[node.kind]
    hidden = node.whole("hidden_size", 0)
    operands: list[Operand] = [node.input(0)]
    weights, states, biases = (_stored(node, k) for k in (1, 2, 3))
    for k in range(directions):
        both = np.split(biases[k], 2) if biases is not None else [np.zeros(len(gates) * hidden, np.float32)] * 2
        assert weights is not None
        assert states is not None
        operands += [Known.of(_ordered(each, gates)) for each in (weights[k], states[k], *both)]
    function: Callable[..., Any] = _lstm if node.kind == "LSTM" else _gru
    return call(function, *operands, hidden=hidden, directions=directions)


def _check_settings(node: Node) -> None:
    if node.text("direction", "forward") not in DIRECTIONS or node.whole("layout", 0):
        raise Unsupported("it runs from the end alone, or has the images first")
    functions = [bytes(name).decode().lower() for name in node.settings.get("activations", [])]
    usual = [] if not functions else FUNCTIONS[node.kind] * (len(functions) // len(FUNCTIONS[node.kind]))
    if functions != usual or node.whole("input_forget", 0) or "clip" in node.settings:
        raise Unsupported("it has other functions than PyTorch's")
    if node.has(4) or node.has(7):
        raise Unsupported("it takes sequences of several lengths, or has peepholes")
    if node.kind == "GRU" and not node.whole("linear_before_reset", 0):
        raise Unsupported("it resets its state before the product, as PyTorch's does not")
    for k in (5, 6):
        first = node.input(k) if node.has(k) else None
        if first is not None and not (isinstance(first, Known) and not first.small.any()):
            raise Unsupported("its first state is not zero")


def _stored(node: Node, position: int) -> Any:
    """Weights of each direction; None for biases that it does not have."""
    if position == 3 and not node.has(3):
        return None
    value = node.input(position)
    if not isinstance(value, Known) or not value.fixed:
        raise Unsupported("its weights are computed from the images")
    return value.small


def _ordered(rows: Any, gates: tuple[int, ...]) -> Any:
    """The rows of each gate in PyTorch's order."""
    parts = np.split(rows, len(gates))
    return np.concatenate([parts[k] for k in gates])


def _lstm(x: Tensor, *weights: Tensor, hidden: int, directions: int) -> tuple[Tensor, ...]:
    state = x.new_zeros(directions, x.shape[1], hidden)
    found, last, cell = torch.lstm(x, (state, state), weights, True, 1, 0.0, False, directions == 2, False)
    return _by_direction(found, directions), last, cell


def _gru(x: Tensor, *weights: Tensor, hidden: int, directions: int) -> tuple[Tensor, ...]:
    state = x.new_zeros(directions, x.shape[1], hidden)
    found, last = torch.gru(x, state, weights, True, 1, 0.0, False, directions == 2, False)
    return _by_direction(found, directions), last


def _by_direction(found: Tensor, directions: int) -> Tensor:
    """What ONNX gives, [T, directions, N, C], of PyTorch's [T, N, directions * C]."""
    return found.reshape(*found.shape[:2], directions, found.shape[2] // directions).transpose(1, 2)
