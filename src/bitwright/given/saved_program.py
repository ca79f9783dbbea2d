"""A saved ``torch.export`` program, read without running anything of it.

``torch.export.load`` unpickles entries of the archive, evaluates the text of expressions, looks targets of nodes up by
name anywhere in ``torch`` and puts names into code. So an archive is copied entry by entry after each was looked at,
and only the copy is loaded.
"""

from __future__ import annotations

import ast
import io
import json
import math
import operator
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.export import ExportedProgram

from bitwright.errors import ModelError
from bitwright.given.names import is_path, is_pure, read_arrangement

_DATA = re.compile(
    r"(data/(weights|constants)/(weight|tensor)_\d+|data/(weights|constants)/\w+_config\.json|models/model\.json"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|version|(\.data/|extra/|extra_files/).+"
    r"|serialized_exported_program\.json|serialized_(state_dict|constants|example_inputs)\.pt"
    r"|data/(weights|constants)/model\.pt)"
)
_FUNCTIONS = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "PythonMod", "FloorDiv",
    "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "ModularIndexing", "Where", "TruncToInt", "TruncToFloat",
    "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural",
    "LShift", "RShift",
    "IsNonOverlappingAndDenseIndicator", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
    "GreaterThan", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor", "ceiling",
}  # fmt: skip
_EXPRESSION = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.cmpop,
)  # fmt: skip
_OPERATORS = {
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "pow",
    "and_", "or_", "not_",
}  # fmt: skip
_SYMBOLIC = re.compile(r"(torch\.)?sym_(int|float|max|min|not|ite|sum|sqrt)")


def load_program(path: Path) -> ExportedProgram:
    """The program in a file of ``torch.export.save``.

    Raises:
        ModelError: the file is no such archive, or something in it would run as code.
    """
    try:
        copy = _checked_copy(path)
    except ModelError as error:
        raise ModelError(
            f"Expected a program of tensors and operators in {path}, {error} It is refused, since reading it could run "
            "code. Save the network again, from plain tensors, with "
            "torch.export.save(torch.export.export(network, (images,)), path)."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(copy)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(
        f"Expected a program saved by torch.export.save, cannot read {path} ({text}). Save it again, with this torch."
    )


def _checked_copy(path: Path) -> io.BytesIO:
    """The archive again, of nothing but entries that were looked at."""
    copy, seen = io.BytesIO(), set()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        rooted = not any(name in {"version", "serialized_exported_program.json"} for name in source.namelist())
        for entry in source.infolist():
            parts = PurePosixPath(entry.filename).parts
            name = "/".join(parts[1:] if rooted else parts)
            if name.lower() in seen or _DATA.fullmatch(name) is None:
                raise ModelError(f"its entry {entry.filename} is of an unknown kind.")
            seen.add(name.lower())
            target.writestr(f"program/{name}" if rooted else name, _checked(name, source.read(entry)))
    copy.seek(0)
    return copy


def _checked(name: str, content: bytes) -> bytes:
    """What an entry holds, once it is known to be data."""
    if name.endswith(".pt"):
        return _tensors(name, content)
    if name.endswith("_config.json"):
        config = json.loads(content)
        for what, entry in config["config"].items():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise ModelError(f"{what} in it is a pickle.")
        return json.dumps(config).encode()
    if name in {"models/model.json", "serialized_exported_program.json"}:
        program = json.loads(content)
        program["guards_code"] = []  # Python text, which torch would run; the sizes of inputs are checked besides
        for key, value in _leaves("", program):
            _check(key, value)
        return json.dumps(program).encode()
    return content


def _tensors(name: str, content: bytes) -> bytes:
    """What the safe loader reads of a pickle, written again."""
    if not content:
        return content
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{name} in it holds more than tensors.") from error
    again = io.BytesIO()
    torch.save(loaded, again)
    return again.getvalue()


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every scalar with the name it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(key, inner)
    else:
        yield key, value


def _check(key: str, value: Any) -> None:
    """Raises if a value under a name would be run, imported or written into code."""
    if key in {"target", "as_operator"} and not _is_operator(value):
        raise ModelError(f"it calls {str(value)[:80]!r}, which is no operator on tensors.")
    if key == "expr_str" and not _is_expression(value):
        raise ModelError(f"it holds {str(value)[:80]!r} where a size should stand.")
    if key in {"in_spec", "out_spec"} and value:
        read_arrangement(value)
        if not is_path("".join(re.findall(r"[^\"\\\[\]{},: ]+", value))):
            raise ModelError(f"it arranges tensors by {value[:80]!r}.")
    if key in {"name", "as_name", "forward_arg_names"} and value and not str(value).isidentifier():
        raise ModelError(f"it names a value {str(value)[:80]!r}.")
    if (key.endswith(("_name", "fqn"))) and value is not None and not is_path(value):
        raise ModelError(f"it names a tensor {str(value)[:80]!r}.")


def _is_operator(text: Any) -> bool:
    space, *parts = str(text).split(".")
    if space == "_operator":
        return len(parts) == 1 and parts[0] in _OPERATORS and hasattr(operator, parts[0])
    if space == "math":
        return len(parts) == 1 and not parts[0].startswith("_") and callable(getattr(math, parts[0], None))
    if _SYMBOLIC.fullmatch(str(text)):
        return True
    if space != "torch" or len(parts) not in {3, 4} or parts[0] != "ops":
        return False
    found: Any = torch.ops
    for part in parts[1:]:
        found = getattr(found, part, None)
    return is_pure(found)


def _is_expression(text: Any) -> bool:
    """Whether a text is arithmetic on sizes, which sympy may evaluate.

    Example:
        >>> _is_expression("Mul(Integer(8), Symbol('s0', integer=True))"), _is_expression("print('s0')")
        (True, False)
    """
    if not isinstance(text, str) or len(text) > 10_000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _EXPRESSION) and _is_plain(node) for node in ast.walk(tree))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        texts = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return named and (not texts or node.func.id in {"Symbol", "Float"})  # type: ignore[attr-defined]
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or re.fullmatch(r"[a-z]{1,3}\d+|int_oo|oo|true|false", node.id) is not None
    if isinstance(node, ast.Constant):
        text = not isinstance(node.value, str) or re.fullmatch(r"[\w.+-]{0,40}", node.value) is not None
        return text and not isinstance(node.value, bytes | complex)
    return True
