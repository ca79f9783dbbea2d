"""The user's own Python files: nothing else runs one, and only such as this very call names."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bitwright.errors import ModelError, UsageError
from bitwright.given.compat import with_torchvision
from bitwright.given.preprocessing import PreprocessFunction
from bitwright.given.weights import on_one_line


def seeded(build: Callable[[], nn.Module], reference: str) -> nn.Module:
    """The network that a function builds, in evaluation mode; its random numbers are the same every time.

    Raises:
        ModelError: the function fails.
    """
    with _same_random_numbers():
        try:
            return with_torchvision(build).eval()
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"Expected {reference} to build, it failed with {type(error).__name__}: {on_one_line(error)}."
            ) from error


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Seed torch inside, so that one reference always gives one network; leave the caller's numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def run_script(path: Path) -> ModuleType:
    """Runs a Python file that the user names.

    Raises:
        ModelError: there is none, or it raises an error.
    """
    if not path.is_file():
        raise ModelError(f"Expected a Python file, {path} does not exist. Check the path.")
    spec = importlib.util.spec_from_file_location(f"_bitwright_{path.stem}", path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes in it look themselves up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _same_random_numbers():
            with_torchvision(partial(spec.loader.exec_module, module))
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ModelError(
            f"Expected {path} to run, it raised {type(error).__name__} ({on_one_line(error)}). Try: python {path}"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def callables_in(path: Path) -> str:
    """Names of the functions and classes of a file, which is not run, for messages.

    Raises:
        ModelError: it is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(f"Expected a Python file, cannot read {path}: {on_one_line(error)}.") from error
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    return ", ".join(names) or "no function or class"


def load_function(reference: str, name: str) -> Callable[..., Any]:
    """A function, or an object, that the user names as ``file.py:function``; the file is run.

    Args:
        reference: file and function.
        name: of the argument, for messages.

    Raises:
        ModelError: there is no such file or function, or the file raises an error.
    """
    script = re.fullmatch(r"(.+\.py):([^:@]+)", reference)
    if script is None:
        raise UsageError(f"Expected file.py:function as {name}=, found {reference!r}.")
    path = Path(script[1]).expanduser()
    found = getattr(run_script(path), script[2], None)
    if found is None:
        raise ModelError(f"Expected {script[2]!r} in {path} as {name}=, it has {callables_in(path)}.")
    function: Callable[..., Any] = found
    return function


def reference_to(function: object) -> str | None:
    """The ``file.py:function`` that :func:`load_function` finds a user's function by; None for what is no such thing.

    Example:
        >>> reference_to(len) is None, reference_to(lambda outputs: outputs) is None
        (True, True)
    """
    code, name = getattr(function, "__code__", None), getattr(function, "__qualname__", "")
    if code is None or not name.isidentifier() or str(getattr(function, "__module__", "")).startswith("bitwright."):
        return None
    path = Path(code.co_filename)
    return f"{path.resolve()}:{name}" if path.suffix == ".py" and path.is_file() else None


def builder_of(made: Any, path: Path, name: str) -> Callable[[], nn.Module]:
    """A user's function as one that builds a network.

    Raises:
        ModelError: it cannot be called without arguments.
    """
    if not callable(made):
        raise ModelError(f"Expected a callable {name} in {path}, found {type(made).__name__}.")
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise ModelError(
            f"Expected {name} in {path} to need no arguments ({on_one_line(error)}). Give them defaults."
        ) from error
    except ValueError:
        pass  # no signature to look at

    def build() -> nn.Module:
        module = made()
        if not isinstance(module, nn.Module):
            raise TypeError(f"it returned {type(module).__name__} instead of an nn.Module")
        return module

    return build


def preprocessing_function(reference: str, settings: Mapping[str, Any]) -> PreprocessFunction:
    """The user's own preprocessing, in a file that this very call names.

    Raises:
        UsageError: there is no such function, or settings are given beside it.
    """
    file, colon, name = reference.rpartition(":")
    others = [key for key in settings if key != "input_size"]
    if others:
        raise UsageError(f"Expected preprocess= or {others[0]}=, found both. Leave one of them out.")
    if not colon or not file.endswith(".py"):
        raise UsageError(f"Expected file.py:function as preprocess=, found {reference!r}.")
    path = Path(file).expanduser()
    function = getattr(run_script(path), name, None)
    if not callable(function):
        raise UsageError(f"Expected a function {name!r} in {path} as preprocess=, it has {callables_in(path)}.")
    typed: PreprocessFunction = function
    return typed
