"""One device for a network and all that it makes on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

_ONE_AT_A_TIME = threading.RLock()


def device_of(network: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU where it has none.

    Example:
        >>> device_of(nn.ReLU()), device_of(nn.Linear(1, 1).to("meta"))
        (device(type='cpu'), device(type='meta'))
    """
    tensors = (t for group in (network.buffers(), network.parameters()) for t in group)
    return next((t.device for t in tensors), torch.device("cpu"))


def place_on(graph: fx.GraphModule, device: torch.device | str) -> None:
    """Moves a graph, with the operators that make tensors of their own (zeros, an arange) as it runs."""
    graph.to(device)
    keep_together(graph)


def keep_together(graph: fx.GraphModule) -> None:
    """Lets the operators that make tensors make them where the graph's own tensors are."""
    device, changed = device_of(graph), False

    def here(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        args, kwargs = (fx.node.map_aggregate(a, here) for a in (node.args, node.kwargs))
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            changed = True
    if changed:
        graph.recompile()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 are float32 on a GPU too, while inside; also a decorator.

    PyTorch's own choice for convolutions is TF32, which keeps 10 bits of each factor. Who chose a precision by
    ``fp32_precision``, PyTorch's newer switch, keeps it.
    """
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        before = [s.allow_tf32 for s in switches] if torch.cuda.is_available() else []
    except RuntimeError:  # the newer switch was used, and this one cannot say what holds
        before = []
    try:
        for switch, _ in zip(switches, before, strict=False):
            switch.allow_tf32 = False
        yield
    finally:
        for switch, old in zip(switches, before, strict=False):
            switch.allow_tf32 = old


@contextmanager
def without_autocast() -> Iterator[None]:
    """Operators compute in the type of their tensors, also where the caller is under ``torch.autocast``."""
    with ExitStack() as switches:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            switches.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """What the caller has switched in PyTorch does not hold inside, and holds again behind; also a decorator.

    Gradients are recorded (not under ``torch.no_grad`` or ``torch.inference_mode``), no operator is under
    ``torch.autocast``, new tensors are float32 and on the CPU, and products of float32 are exact
    (:func:`exact_float32`). Random numbers that the caller draws afterwards are those that it would have drawn.

    These switches belong to the process, and PyTorch captures one network at a time: other threads wait.
    """
    with _ONE_AT_A_TIME, ExitStack() as switches:
        switches.enter_context(exact_float32())
        switches.enter_context(torch.inference_mode(False))
        switches.enter_context(torch.enable_grad())
        switches.enter_context(without_autocast())
        drawn_on = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        switches.enter_context(torch.random.fork_rng(devices=drawn_on))
        switches.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            switches.enter_context(torch.device("cpu"))
        yield
