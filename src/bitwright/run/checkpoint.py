"""Tensors on disk with a checksum, so that a damaged file is found and never computed with."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitwright import together
from bitwright.run.files import DamagedError, whole

DIGEST = "sha256"
"""Key of the checksum in the header: of all names, types, shapes and values, and of the rest of the header."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    header: dict[str, str]
    tensors: dict[str, Tensor]


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str], *, previous: bool = False) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        header: text beside them.
        previous: keep the file of before too, for :func:`read_last`.

    Raises:
        BitwrightError: it cannot be written.
    """
    if not together.is_first():
        return
    plain = _separate(tensors)
    with whole(path) as fresh:
        save_tensors(plain, fresh, header | {DIGEST: _digest(plain, header)})
        if previous and path.is_file():
            path.replace(before(path))


def read(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """What :func:`write` wrote.

    Raises:
        DamagedError: the file does not hold that, to the last bit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        expected = header.pop(DIGEST, None)
        if expected is not None and _digest(tensors, header) == expected:
            return Checkpoint(header, {name: tensor.to(device, copy=True) for name, tensor in tensors.items()})
        reason = "it has no checksum" if expected is None else "its checksum differs"
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
    raise DamagedError(f"{path} is damaged ({reason}).")


def read_last(path: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The last good one of a file and the one before it, None if there is none; a damaged one is left and said."""
    for place in (path, before(path)):
        kept = read_good(place, "What was kept before it is used.", device)
        if kept is not None:
            return kept
    return None


def read_good(path: Path, instead: str, device: torch.device | str = "cpu") -> Checkpoint | None:
    """What a checkpoint holds; None if there is no file, or a damaged one, which a warning says with ``instead``.

    Of several processes the first reads it for all.
    """

    def found() -> Checkpoint | None:
        if not path.is_file():
            return None
        try:
            return read(path)
        except DamagedError as error:
            warnings.warn(f"{error} {instead}", UserWarning, stacklevel=5)
            return None

    kept = together.from_first(found)
    return None if kept is None else Checkpoint(kept.header, {n: t.to(device) for n, t in kept.tensors.items()})


def before(path: Path) -> Path:
    """Where the checkpoint before the last lies.

    Example:
        >>> before(Path("evolve.safetensors")).name
        'evolve.before.safetensors'
    """
    return path.with_name(f"{path.stem}.before{path.suffix}")


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """As ``safetensors.torch.save_file``, which does not raise OSError when the disk is full.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and no two in the same memory, as the format asks for."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
