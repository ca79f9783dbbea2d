"""Reads weights from files without running code from them, and fills a network with them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, ModelError
from bitwright.given.pickles import Skipped, read_pickle, runs_code
from bitwright.given.text import short, some

_Value = TypeVar("_Value")

CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".safetensors")
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_NESTED = (*_AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "net")
# What torch.compile, FSDP and activation checkpointing write into the path of a module.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
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
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    state = _innermost(loaded, path)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        _check_is_no_object(path, *state.values())
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


def _check_is_no_object(path: Path, *found: Any) -> None:
    # A whole network, or a checkpoint in a class of a trainer's own.
    for value in found:
        if isinstance(value, Skipped):
            raise runs_code(path, value.name)


def _innermost(loaded: Any, path: Path) -> Mapping[str, Any]:
    state = loaded
    for _ in range(3):
        if not isinstance(state, Mapping):
            break
        inner = [name for name in _NESTED if isinstance(state.get(name), Mapping)]
        if not inner:
            _check_is_no_object(path, *(state.get(name) for name in _NESTED))
            return state
        if inner[0] in _AVERAGED and len(inner) > 1:
            warnings.warn(
                f"{path} holds {', '.join(inner)}: the averaged weights {inner[0]} are used.",
                UserWarning,
                stacklevel=7,
            )
        state = state[inner[0]]
    if not isinstance(state, Mapping):
        _check_is_no_object(path, loaded)
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

    Prefixes that all names share and what wrappers add are taken off when that makes the names match.
    Values take the type of the module's own, so that a float16 file gives a float32 network.

    Raises:
        ModelError: with the count and the first three of the names that are missing, unexpected or of another
            shape; or the network is in the file more than once.
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
        _check_is_there_once(state, wanted, where)
        raise ModelError(
            f"Expected {len(wanted)} tensors of {type(module).__name__} in {where}, found "
            f"{'; '.join(problem for problem in problems if problem)}. Give the weights of this very network."
        )
    used = {id(value) for value in found.values()}
    left = [name for name, value in state.items() if id(value) not in used and not _idle(_bare(name), wanted)]
    if left:
        warnings.warn(
            f"{where} holds more than {type(module).__name__}: {len(left)} tensors ({some(left)}) are left out.",
            UserWarning,
            stacklevel=2,
        )
    module.load_state_dict(found)


def _check_is_there_once(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str | Path) -> None:
    places = _whole_under((_modern(_without(name, _WRAPPERS)) for name in state), wanted)
    if len(places) > 1:
        raise ModelError(
            f"Expected one network in {where}, found it under {' and under '.join(places)}. Save the state dict of one."
        )


def under_known_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` under the names of the module, as far as they are there.

    Wrappers (``module.``, ``_orig_mod.``) and prefixes that all names share are taken off, on either side, where that
    makes more names match. If the file holds more than the network, and the network once, the rest is left out.
    """
    own = {_without(name, _WRAPPERS): name for name in wanted}
    named = {_modern(_without(name, _WRAPPERS)): value for name, value in state.items() if name != "n_averaged"}
    bare = {_bare(name): value for name, value in named.items()}
    versions = [*_stripped(named), *(_stripped(bare) if len(bare) == len(named) else [])]
    pairs = [(version, names) for names in _stripped(own) for version in versions]
    best, names = max(pairs, key=lambda pair: len(pair[0].keys() & pair[1].keys()))
    places = _whole_under(named, own) if any(name not in best and not _idle(name, names) for name in names) else []
    if len(places) == 1:
        inside = f"{places[0]}."
        names, best = own, {name.removeprefix(inside): named[name] for name in named if name.startswith(inside)}
    found = {names.get(name, name): value for name, value in best.items()}
    kept = {name: value for name, value in found.items() if name in wanted or not _idle(name, wanted)}
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):  # absent in old checkpoints, and read in training only
            kept.setdefault(name, value)
    return kept


def _stripped(named: Mapping[str, _Value]) -> list[dict[str, _Value]]:
    """The names as they are, and without one after another of the prefixes that all of them share."""
    versions = [dict(named)]
    while versions[-1] and all("." in name for name in versions[-1]):
        if len({name.split(".", 1)[0] for name in versions[-1]}) > 1:
            break
        versions.append({name.split(".", 1)[1]: value for name, value in versions[-1].items()})
    return versions


def _whole_under(names: Iterable[str], wanted: Mapping[str, Any]) -> list[str]:
    """The prefixes under which every name of the module is there, as ``student.`` and ``teacher.``."""
    have, needed = set(names), [name for name in wanted if not _idle(name, wanted)]
    if not needed:
        return []
    prefixes = [name.removesuffix(needed[0]) for name in have if name.endswith(f".{needed[0]}")]
    return sorted(prefix[:-1] for prefix in prefixes if all(prefix + name in have for name in needed))


def _bare(name: str) -> str:
    return _without(name, (*_WRAPPERS, "module"))


def _without(name: str, parts: Sequence[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _idle(name: str, wanted: Iterable[str]) -> bool:
    # torchvision's segmentation checkpoints carry a second head that only training reads.
    second_head = name.startswith("aux_classifier.") and any(key.startswith("classifier.") for key in wanted)
    return second_head or name.rsplit(".", 1)[-1] in _IDLE_KEYS


def _modern(name: str) -> str:
    # torchvision's published DenseNet files still say norm.1 where its modules say norm1.
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({some(names)})" if names else ""


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
