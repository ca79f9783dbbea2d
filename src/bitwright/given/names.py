"""Which operators, names and arrangements a file may ask for: tensors in, tensors out, and no code in a name."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bitwright.errors import ModelError

_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "map_impl", "scan", "while_loop")
_SPACES = ("aten", "prims", "torchvision", "quantized_decomposed")
_FILES = ("from_file",)
"""Operators of the dispatcher that touch files; those of TorchScript, such as save, are not in the dispatcher."""
_PATH = re.compile(r"[^\"'`\\()\[\]{};=\x00-\x1f]*")
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "bitwright.Fixed"}


def is_path(text: Any) -> bool:
    """Whether it can stand as the dotted name of a tensor or a module without being read as code.

    Example:
        >>> is_path("blocks.0.x-1.weight"), is_path("a'), print('b")
        (True, False)
    """
    return isinstance(text, str) and _PATH.fullmatch(text) is not None


def is_pure(operator: Any) -> bool:
    """Whether an operator only computes, rather than reading or writing files.

    Example:
        >>> is_pure(torch.ops.aten.relu.default), is_pure(torch.ops.aten.from_file.default)
        (True, False)
    """
    if isinstance(operator, torch._ops.HigherOrderOperator):
        return str(operator._name) in _HIGHER_ORDER
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    space, _, name = operator._schema.name.partition("::")
    known = name.startswith("sym_") or torch._C._dispatch_has_kernel(str(operator._name))
    return space in _SPACES and known and name not in _FILES


def read_arrangement(text: Any) -> pytree.TreeSpec:
    """An arrangement of outputs in plain containers, from the text that torch writes of it.

    Raises:
        ModelError: it names another type, which would be imported, or is no such text.
    """
    try:
        protocol, described = json.loads(text)
        _check_arrangement(described)
        return pytree.treespec_loads(json.dumps([protocol, described]))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"Expected an arrangement of tensors, found {str(text)[:80]!r}.") from error


def _check_arrangement(described: dict[str, Any]) -> None:
    kind, context = described["type"], described["context"]
    if kind is not None and kind not in _CONTAINERS and not str(kind).startswith("namedtuple"):
        raise ModelError(f"Expected tuples, lists and dicts around tensors, found {kind}.")
    if context is not None and ("__enum__" in context or not isinstance(json.loads(context), _PLAIN)):
        raise ModelError("Expected plain keys in an arrangement of tensors, found others.")
    for child in described["children_spec"]:
        _check_arrangement(child)


_PLAIN = (type(None), bool, int, float, str, list)
