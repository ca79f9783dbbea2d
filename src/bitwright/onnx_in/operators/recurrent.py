"""Recurrent operators, whose gates ONNX has in another order than PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.operators.moves import for_each_image
from bitwright.onnx_in.values import Known, Node, NodeCall, Operand, Unsupported, call, shape_of

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Places in ONNX of PyTorch's gates: input, forget, cell, output of an LSTM; reset, update, new of a GRU."""
FUNCTIONS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("LSTM", "sigmoid", "tanh", "tanh"): torch.lstm,
    ("GRU", "sigmoid", "tanh"): torch.gru,
    ("RNN", "tanh"): torch.rnn_tanh,
    ("RNN", "relu"): torch.rnn_relu,
}
"""PyTorch's operator for an operator and its activations; the first of each is what a node has that names none."""
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
WEIGHTS = (1, 2, 3, 3)
"""Inputs that the weights of one direction are made of; both vectors that are added stand in the last."""
STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Inputs that are first states: of what it gives, and of an LSTM's cells."""


@operator("LSTM", "GRU", "RNN")
def recurrent(node: Node) -> NodeCall:
    """Steps along the first axis [T, N, C], from the end on if ``reverse``, by PyTorch's own gates."""
    _check_settings(node)
    direction = node.text("direction", "forward")
    states = {k: _first_state(node, k) for k in STATES[node.kind]}
    given = {k: state for k, state in states.items() if state is not None}
    made = call(
        _steps,
        node.input(0),
        *given.values(),
        *_weights(node, DIRECTIONS[direction]),
        compute=_function(node),
        hidden=shape_of(node.input(2))[-1],
        direction=direction,
        given=tuple(k in given for k in states),
    )
    return replace(made, sources=(0, *given, *WEIGHTS * DIRECTIONS[direction]))


def _check_settings(node: Node) -> None:
    if node.text("direction", "forward") not in DIRECTIONS or node.whole("layout", 0):
        raise Unsupported("it has the images first, which ONNX Runtime does not compute")
    if node.whole("input_forget", 0) or "clip" in node.settings:
        raise Unsupported("it has other functions than PyTorch's")
    if not _of_one_length(node) or node.has(7):
        raise Unsupported("it takes sequences of several lengths, or has peepholes")
    if node.kind == "GRU" and not node.whole("linear_before_reset", 0):
        raise Unsupported("it resets its state before the product, as PyTorch's does not")
    if node.traced().batch_axis == 0:
        raise Unsupported("it takes the images of a batch for its steps")


def _of_one_length(node: Node) -> bool:
    """Whether every sequence is as long as the first axis."""
    lengths = node.input(4) if node.has(4) else None
    steps = shape_of(node.input(0))[0]
    return lengths is None or (isinstance(lengths, Known) and bool((lengths.large == steps).all()))


def _function(node: Node) -> Callable[..., Any]:
    """PyTorch's operator of the node's activations, which are the same in both directions.

    Raises:
        Unsupported: PyTorch has none of them.
    """
    names = [bytes(name).decode().lower() for name in node.settings.get("activations", [])]
    for (kind, *functions), found in FUNCTIONS.items():
        if kind == node.kind and names in ([], functions, functions * 2):
            return found
    raise Unsupported("it has other functions than PyTorch's")


def _first_state(node: Node, position: int) -> Operand | None:
    """The state before the first step [directions, N, C]; None where it is zero.

    Raises:
        Unsupported: its second axis is not that of the images.
    """
    value = node.input(position) if node.has(position) else None
    if value is None or (isinstance(value, Known) and not value.small.any()):
        return None
    if isinstance(value, Known):
        return for_each_image(value, 1, node.traced())
    if value.batch_axis != 1:
        raise Unsupported("its first state has no axis of images, or another one than the second")
    return value


def _weights(node: Node, directions: int) -> list[Known]:
    """The weights of each direction, as PyTorch has them."""
    gates = GATES[node.kind]
    weights, products = (_stored(node, k) for k in (1, 2))
    biases = _stored(node, 3) if node.has(3) else np.zeros((directions, 2 * products.shape[1]), np.float32)
    return [
        Known.of(_ordered(each, gates))
        for k in range(directions)
        for each in (weights[k], products[k], *np.split(biases[k], 2))
    ]


def _stored(node: Node, position: int) -> Any:
    """Weights [directions, ...]."""
    value = node.input(position)
    if not isinstance(value, Known) or not value.fixed:
        raise Unsupported("its weights are computed from the images")
    return value.small


def _ordered(rows: Any, gates: tuple[int, ...]) -> Any:
    """The rows of each gate in PyTorch's order."""
    parts = np.split(rows, len(gates))
    return np.concatenate([parts[k] for k in gates])


def _steps(
    x: Tensor, *operands: Tensor, compute: Callable[..., Any], hidden: int, direction: str, given: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """What ONNX gives: [T, directions, N, C], and each last state [directions, N, C].

    Args:
        x: [T, N, C].
        operands: the first states that are given, then weights.
        compute: of PyTorch.
        hidden: C of what it gives.
        direction: of ``DIRECTIONS``.
        given: for each first state whether it is among the operands; others are zero.
    """
    directions = DIRECTIONS[direction]
    rest = iter(operands)
    states = [next(rest) if each else x.new_zeros(directions, x.shape[1], hidden) for each in given]
    first = tuple(states) if len(states) > 1 else states[0]
    turned = x.flip(0) if direction == "reverse" else x
    found, *last = compute(turned, first, tuple(rest), True, 1, 0.0, False, directions == 2, False)
    found = found.flip(0) if direction == "reverse" else found
    by_direction = found.reshape(*found.shape[:2], directions, hidden).transpose(1, 2)
    return by_direction, *last
