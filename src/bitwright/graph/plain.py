"""The module that the user trained, out of what was put around it, in float32 on the CPU."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bitwright.errors import ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        ModelError: it is no module, or ``torch.jit`` compiled it or a part of it.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected an nn.Module, found {type(model).__name__}. Give the network itself.")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ModelError(f"Expected a float network, found a quantized layer at '{path}'. Give the network before.")
        if isinstance(module, torch.jit.ScriptModule):
            part = f" in '{path}'" if path else ""
            raise ModelError(
                f"Expected an nn.Module, found what torch.jit made of one{part}. Give the module that was passed to "
                "torch.jit.script or torch.jit.trace."
            )
    return model


def _inside(model: Any) -> nn.Module | None:
    """What one of the three holds; the compiler's is asked for only where it was imported, which takes a second."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return cast("nn.Module", model.module)
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or not isinstance(model, compiler.OptimizedModule):
        return None
    return cast("nn.Module", model._orig_mod)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers in float32 on the CPU inside, the model's own again after.

    Buffers inside are copies, since there are models that write into theirs whenever they run.

    Raises:
        ModelError: they have no values yet, or are tensors of a class that computes in a way of its own.
    """
    own = _tensors(model)
    written = set() if getattr(model, "never_changes", False) else _own_buffers(own)
    taken: dict[int, Tensor] = {}
    try:
        for held, path, tensor in own:
            if id(tensor) not in taken:
                found = _in_float32(_plain(tensor, path), path)
                taken[id(tensor)] = found.clone() if found is tensor and id(tensor) in written else found
            held[path.rpartition(".")[2]] = taken[id(tensor)]
        tell_of_types(tensor for _, _, tensor in own)
        yield
    finally:
        for held, path, tensor in own:
            held[path.rpartition(".")[2]] = tensor


def tell_of_types(tensors: Iterable[Tensor]) -> None:
    """Warns if floating tensors are not float32."""
    kinds = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"}
    if kinds:
        names = " and ".join(sorted(kinds))
        warnings.warn(f"The model has weights in {names}. A copy in float32 is quantized.", stacklevel=4)


def _tensors(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """What holds each tensor, and its path, which ends in the name that it has there."""
    return [
        (held, f"{path}.{name}" if path else name, tensor)
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if isinstance(tensor, Tensor)
    ]


def _own_buffers(own: Iterable[tuple[dict[str, Any], str, Tensor]]) -> set[int]:
    """The buffers whose memory is that of no other tensor, which would not follow a copy."""
    plain = (t for _, _, t in own if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta)
    tensors = {id(t): t for t in plain}
    memory = Counter(t.untyped_storage().data_ptr() for t in tensors.values())
    return {
        key
        for key, t in tensors.items()
        if not isinstance(t, nn.Parameter) and memory[t.untyped_storage().data_ptr()] == 1
    }


def _plain(tensor: Tensor, path: str) -> Tensor:
    """The same values in PyTorch's own class; a class that changes no operator may have others.

    Raises:
        ModelError: the class computes in a way of its own, as torchao's and DTensor do.
    """
    kind: Any = type(tensor)
    if kind in (Tensor, nn.Parameter) or torch.nn.parameter.is_lazy(tensor):
        return tensor
    if any(_overrides(kind, hook) for hook in ("__torch_function__", "__torch_dispatch__")):
        raise ModelError(
            f"Expected plain float tensors in the model, '{path}' is a {kind.__module__}.{kind.__qualname__}. Give the "
            "network as it was before, or put plain values there (full_tensor() of a DTensor, dequantize() of torchao)."
        )
    values = tensor.detach().as_subclass(Tensor)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _overrides(kind: type, hook: str) -> bool:
    found, *usual = (getattr(owner, hook) for owner in (kind, Tensor, nn.Parameter))
    return getattr(found, "__func__", found) not in [getattr(own, "__func__", own) for own in usual]


def _in_float32(tensor: Tensor, path: str) -> Tensor:
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        raise ModelError(f"Expected a model with weights, found none in '{path}'. Load them before quantizing.")
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    found = tensor.detach().to("cpu", kind)
    if found.dtype == tensor.dtype and found.device == tensor.device:
        return tensor
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
