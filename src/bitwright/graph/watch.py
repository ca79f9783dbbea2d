"""Runs a graph and shows chosen values to a callback as they pass: nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from bitwright.errors import debugging
from bitwright.graph.products import fast_products

Callback = Callable[[fx.Node, Any], Tensor | None]


class Watcher(fx.Interpreter):
    """Interprets a graph; calls back with the value of each watched node.

    Args:
        module: the graph.
        callbacks: by node name. A callback that returns a tensor replaces the value.

    Memory: values are released after their last reader, as in a plain forward pass.
    """

    def __init__(self, module: fx.GraphModule, callbacks: Mapping[str, Callback]) -> None:
        super().__init__(module)
        self.callbacks = callbacks
        self.extra_traceback = debugging()  # else the line that a callback raises would get the node's source behind it

    def run_node(self, n: fx.Node) -> Any:
        """One operator, then its callback."""
        result = super().run_node(n)
        callback = self.callbacks.get(n.name)
        if callback is None:
            return result
        replaced = callback(n, result)
        return result if replaced is None else replaced


def watch(module: fx.GraphModule, images: Tensor, callbacks: Mapping[str, Callback]) -> list[Tensor]:
    """Outputs of the graph for a batch, [B, C, H, W], without gradients; see :class:`Watcher`."""
    with torch.no_grad(), fast_products(module):
        outputs = Watcher(module, callbacks).run(images)
    return list(outputs)


def values_of(module: fx.GraphModule, images: Tensor, names: Iterable[str]) -> tuple[dict[str, Any], list[Any]]:
    """Values of nodes, by name, and the outputs of the graph, for a batch, [B, C, H, W]."""
    found: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        found[node.name] = value

    outputs = watch(module, images, dict.fromkeys(names, keep))
    return found, outputs


def watch_both(
    reference: fx.GraphModule,
    other: fx.GraphModule,
    images: Tensor,
    pairs: Mapping[str, str],
    see: Callable[[str, Any, Any], None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of two networks for a batch, [B, C, H, W], without gradients, and some of their values side by side.

    Both run at the same time, so that no more is in memory than what they compute with.

    Args:
        reference: a network.
        other: made from it, in the same order.
        images: the batch.
        pairs: names of nodes of ``other``, and of their twins in ``reference``.
        see: shown the first name, the reference's value and the other's.
    """
    waiting = set(pairs.values())
    kept: dict[str, Any] = {}
    with torch.no_grad(), fast_products(reference):
        theirs = _steps(reference, images)
        found: Any = None
        for node, found in _steps(other, images):
            twin = pairs.get(node.name)
            while twin in waiting:
                before, value = next(theirs)
                if before.name in waiting:
                    kept[before.name] = value
                    waiting.remove(before.name)
            if twin is not None:
                see(node.name, kept.pop(twin), found)
        *_, (_, expected) = theirs
    return list(expected), list(found)


def _steps(module: fx.GraphModule, images: Tensor) -> Iterator[tuple[fx.Node, Any]]:
    """Nodes in order with their values, which are released after their last reader; the last gives the outputs."""
    runner = fx.Interpreter(module)
    runner.args_iter = iter([images])
    for node in module.graph.nodes:
        runner.env[node] = value = runner.run_node(node)
        for read in runner.user_to_last_uses.get(node, []):
            del runner.env[read]
        yield node, value


class Observer(Protocol):
    """What sums up tensors as they pass."""

    def update(self, value: Tensor, /) -> None:
        """Takes one more in."""


def updating(*observers: Observer) -> Callback:
    """A callback that shows every value to all of them."""

    def update(_: fx.Node, value: Tensor) -> None:
        for observer in observers:
            observer.update(value)

    return update
