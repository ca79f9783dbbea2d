"""Reads PyTorch's checkpoints without running code from them: objects that are no tensors are passed over."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import ModelError
from bitwright.given.text import short, some

SAVE_PLAIN = "Save model.state_dict() where the model was made."
# Packages whose objects in a checkpoint are bookkeeping that nobody misses.
_BOOKKEEPING = re.compile(
    "(argparse|builtins|collections|datetime|decimal|enum|fractions|functools|logging|numpy|pathlib|random|torch|types"
    r"|typing|uuid)\."
)
# Names of Python's own that stand for data. Its functions (eval, exec, ...) are in no honest checkpoint.
_BUILTINS = re.compile(
    "Ellipsis|NotImplemented|bool|bytes|dict|float|frozenset|getattr|int|list|object|range|slice|str|tuple|type"
)


class Skipped:
    """Stands where a checkpoint holds an object that is not read: it takes what the object took, and keeps nothing."""

    name = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what the object was made of."""

    def __setstate__(self, state: Any) -> None:
        """Takes what the object held."""


def read_pickle(path: Path) -> Any:
    """What a checkpoint holds, on the CPU, with :class:`Skipped` for every object that is no plain data.

    No class or function that the file names is imported or called, so that a file cannot run code.

    Raises:
        ModelError: it cannot be read, names a function to call, or holds tensors of a class of their own.
    """
    _check_is_no_program(path)
    kinds: dict[str, type] = {}
    while True:
        try:
            loaded = _read(path, kinds)
            break
        except pickle.UnpicklingError as error:
            found = _next_to_skip(str(error), kinds)
            if found is None:
                raise _refused(path, error) from error
            kinds[found[0]] = found[1]
        except Exception as error:
            raise _of_a_class(path, kinds) if "subclass" in str(error) else unreadable(path, error) from error
    foreign = [name for name in kinds if not _BOOKKEEPING.match(name)]
    if foreign:
        warnings.warn(f"{path} holds objects that are not read: {some(foreign)}.", UserWarning, stacklevel=6)
    return loaded


def _read(path: Path, kinds: dict[str, type]) -> Any:
    skipped: list[Any] = [(_stand_in(name, kind), name) for name, kind in kinds.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(skipped):
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str, kind: type) -> type:
    """A class that makes a ``kind`` of whatever it is given."""
    own: dict[str, Any] = {"name": name, "__module__": "skipped", "__qualname__": name}
    if kind is not Skipped:
        own["__new__"] = lambda cls, *_: kind()
    return type(name, (Skipped,), own)


def _next_to_skip(said: str, kinds: dict[str, type]) -> tuple[str, type] | None:
    """The name of the file's next object that is not read, and what stands for it; None if the file is refused."""
    wanted = re.search(r"Unsupported global: GLOBAL (\S+)", said)
    if wanted:
        bare = "." not in wanted[1]  # PyTorch's message leaves out where Python's own names come from
        name = f"builtins.{wanted[1]}" if bare else wanted[1]
        return (name, Skipped) if name not in kinds and (not bare or _BUILTINS.fullmatch(wanted[1])) else None
    filled = re.search(r"Can only (append|extend|SETITEM).*<class 'skipped\.(.+?)'>", said)
    if filled and kinds.get(filled[2]) is Skipped:  # a dict or a list of a class of its own
        return filled[2], OrderedDict if filled[1] == "SETITEM" else list
    return None


def _refused(path: Path, error: Exception) -> ModelError:
    said = str(error)
    wanted = re.search(r"GLOBAL (\S+)", said)
    if wanted:
        return runs_code(path, wanted[1])
    if "DTensor" in said or "NJT" in said:
        return ModelError(
            f"Expected plain tensors, {path} holds {'DTensors' if 'DTensor' in said else 'nested tensors'}. "
            "Save plain ones where the model was made (tensor.full_tensor() of a DTensor)."
        )
    if "Unsupported operand" in said:
        return ModelError(
            f"Expected a checkpoint as torch.save writes it, {path} is a pickle of another protocol. {SAVE_PLAIN}"
        )
    return runs_code(path) if "weights_only" in said else unreadable(path, error)


def runs_code(path: Path, name: str = "") -> ModelError:
    """What is said of a file that needs an object of a class, or a function, which is not taken from a file."""
    return ModelError(
        f"Expected plain tensors, {path} wants to run code when read{f' ({name})' if name else ''} and is refused. "
        f"{SAVE_PLAIN}"
    )


def _of_a_class(path: Path, kinds: Iterable[str]) -> ModelError:
    return ModelError(
        f"Expected plain tensors, {path} holds tensors of a class of their own (of {some(list(kinds))}). "
        "Save plain ones where the model was made."
    )


def unreadable(path: Path, error: Exception) -> ModelError:
    """What is said of a file that is no checkpoint, or a damaged one."""
    return ModelError(f"Expected a PyTorch checkpoint, cannot read {path} ({short(error)}). Fetch or save it again.")


def program_in(path: Path) -> str:
    """What wrote a program that has the form and the ending of a checkpoint; empty if the file is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return ""
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "TorchScript"
    return "torch.export" if "archive_format" in names else ""


def _check_is_no_program(path: Path) -> None:
    program = program_in(path)
    if program == "TorchScript":
        raise ModelError(
            f"Expected weights, {path} is a TorchScript program. Save what it holds: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')."
        )
    if program:
        raise ModelError(f"Expected weights, {path} is a program of {program}. Rename it to .pt2 and give it alone.")
