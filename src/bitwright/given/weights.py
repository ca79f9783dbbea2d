"""Reads weights from files without running code from them, and fills a network with them."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, ModelError
from bitwright.given.text import short

CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".safetensors")
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_NESTED = (*_AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Bookkeeping that some trainers save and no forward pass reads.
_IDLE_KEYS = ("num_batches_tracked", "n_averaged", "relative_position_index", "attn_mask")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, on the CPU, without running any code from it.

    A state dict nested under ``state_dict``, ``model``, ``model_ema`` or ``ema`` is taken out; averaged (ema)
    weights win where both are there, with a warning.

    Raises:
        ModelError: the file is missing, unreadable, wants to run code, or holds no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"Expected a file of weights, {path} does not exist. Check the path.")
    if path.suffix not in CHECKPOINTS:
        raise ModelError(f"Expected weights in a file {', '.join(CHECKPOINTS)}, found {path}.")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _innermost(loaded, path)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f"Expected a state dict (names and tensors) in {path}, found {_contents(loaded)}. Save model.state_dict()."
        )
    for name, value in tensors.items():
        kind = _unusual(value)
        if kind:
            raise ModelError(f"Expected dense real numbers in {path}, {name!r} is a {kind} tensor. Save it dense.")
    return tensors


def _unusual(value: Tensor) -> str:
    """What keeps a tensor from being a weight; empty if nothing does."""
    if value.is_meta:
        return "meta"
    if value.is_quantized:
        return "quantized"
    if value.is_nested or value.layout is not torch.strided:
        return "nested" if value.is_nested else "sparse"
    return "complex" if value.is_complex() else ""


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except Exception as error:
        raise ModelError(
            f"Expected safetensors, cannot read {path} ({on_one_line(error)}). Fetch or save it again."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None and "weights_only" not in str(error):
            raise _unreadable(path, error) from error
        code = f" ({wanted[1]})" if wanted else ""
        raise ModelError(
            f"Expected plain tensors, {path} wants to run code when read{code} and is refused. "
            "Save model.state_dict() where the model was made."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"Expected a PyTorch checkpoint, cannot read {path} ({on_one_line(error)}). Fetch or save it again."
    )


def _innermost(loaded: Any, path: Path) -> Mapping[str, Any]:
    state = loaded
    for _ in range(3):
        if not isinstance(state, Mapping):
            break
        inner = [name for name in _NESTED if isinstance(state.get(name), Mapping)]
        if not inner:
            return state
        if inner[0] in _AVERAGED and len(inner) > 1:
            warnings.warn(
                f"{path} holds {', '.join(inner)}: the averaged weights {inner[0]} are used.",
                UserWarning,
                stacklevel=7,
            )
        state = state[inner[0]]
    if not isinstance(state, Mapping):
        raise ModelError(
            f"Expected a state dict (names and tensors) in {path}, found {_contents(loaded)}. Save model.state_dict()."
        )
    return state


def _contents(loaded: Any) -> str:
    if isinstance(loaded, Mapping):
        names = [str(name) for name in loaded]
        return f"a dict of {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "an empty dict"
    return f"a {type(loaded).__name__}"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str | Path = "the weights") -> None:
    """Put every tensor of ``state`` into ``module``; both must have the same names and shapes.

    The prefixes ``module.``, ``_orig_mod.`` and ``model.`` are taken off when that makes the names match.
    Values take the type of the module's own, so that a float16 file gives a float32 network.

    Raises:
        ModelError: with the count and the first three of the names that are missing, unexpected or of another
            shape.
    """
    wanted = module.state_dict()
    found = under_known_names(state, wanted)
    problems = [
        _listed("missing", [name for name in wanted if name not in found]),
        _listed("unexpected", [name for name in found if name not in wanted]),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
                for name in found
                if name in wanted and found[name].shape != wanted[name].shape
            ],
        ),
    ]
    if any(problems):
        raise ModelError(
            f"Expected {len(wanted)} tensors of {type(module).__name__} in {where}, found "
            f"{'; '.join(problem for problem in problems if problem)}. Give the weights of this very network."
        )
    module.load_state_dict(found)


def under_known_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with those known prefixes taken off that make it share most names with the module."""
    versions = [{_modern(name): value for name, value in state.items() if name != "n_averaged"}]
    while True:
        names = list(versions[-1])
        prefix = next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        versions.append({name.removeprefix(prefix): value for name, value in versions[-1].items()})
    best = max(versions, key=lambda version: len(version.keys() & wanted.keys()))
    kept = {name: value for name, value in best.items() if name in wanted or not _idle(name, wanted)}
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):  # absent in old checkpoints, and read in training only
            kept.setdefault(name, value)
    return kept


def _idle(name: str, wanted: Mapping[str, Tensor]) -> bool:
    # torchvision's segmentation checkpoints carry a second head that only training reads.
    second_head = name.startswith("aux_classifier.") and any(key.startswith("classifier.") for key in wanted)
    return second_head or name.rsplit(".", 1)[-1] in _IDLE_KEYS


def _modern(name: str) -> str:
    # torchvision's published DenseNet files still say norm.1 where its modules say norm1.
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def other_classes_of(module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the checkpoint, when that is all in which the shapes differ."""
    wanted = module.state_dict()
    found = under_known_names(state, wanted)
    if found.keys() != wanted.keys():
        return None
    pairs = [(found[name].shape, wanted[name].shape) for name in wanted if found[name].shape != wanted[name].shape]
    rows = {(have[0], want[0]) for have, want in pairs if len(have) == len(want) > 0 and have[1:] == want[1:]}
    whole = all(len(have) == len(want) > 0 and have[1:] == want[1:] for have, want in pairs)
    return int(next(iter(rows))[0]) if whole and len(rows) == 1 else None


def check_on_a_device(state: Mapping[str, Any], model: str) -> None:
    """Values without memory can neither be moved nor read.

    Raises:
        ModelError: one is on the meta device; it is named.
    """
    empty = next((name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta), None)
    if empty is not None:
        raise ModelError(f"Expected weights in {model}, {empty} is on the meta device. Load them first.")


def on_one_line(error: BaseException) -> str:
    """What it says, for a message of our own."""
    return str(error) if isinstance(error, BitwrightError) else short(error)
