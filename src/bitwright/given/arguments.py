"""Arguments of a call, checked by type and range before anything is done; messages name them as ``steps=``."""

from __future__ import annotations

import difflib
import operator
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from bitwright.errors import UsageError

SEEDS = 2**63
_FLAGS = {
    "float_model": "float",
    "recipe": "recipe",
    "rules": "rule",
    "preprocessing": "input-size",
    "folder": "out",
    "path": "out",
}
OPTIONS = frozenset([
    "activations", "as_published", "batch", "bits", "blocks", "by", "cache", "channel_order", "channels", "check",
    "class_map", "classes", "compression", "crop_mode", "crop_pct", "decode", "device", "dry_run", "eigenvalues",
    "evaluate", "float_model", "force", "granularity", "group_size", "images", "input_key", "interpolation", "labels",
    "matrix",
    "max_activation_size", "max_bops", "max_drop", "max_latency", "max_total_size", "mean", "measure", "metric",
    "minutes", "output", "pixel_bits", "plan", "point", "points", "precision", "probes", "recipe", "recipes", "resume",
    "rules", "runtime", "samples", "seconds", "seed", "seeds", "skip_unreadable", "spectrum_samples", "std",
    "steps", "target_size", "task", "threads", "to", "tolerance", "weights", "input_size", "preprocess",
    "preprocessing", "folder", "path",
])  # fmt: skip
"""Arguments that the command line has as options; what else looks like one stays as it is."""
_TEXT = "'[^']*'|\"[^\"]*\""
_LOADING = re.compile(rf"bw\.load_model\((?:{_TEXT}), (?P<settings>[^()]*)\)")
"""A network that is loaded with settings, which a command has as options beside its name."""
_NAMED = re.compile(
    r"(?<![\w.'\"-])(?P<name>[a-z]+(?:_[a-z]+)*)="
    rf"(?:(?P<value>{_TEXT}|\d+)|\[(?P<several>(?:{_TEXT})(?:, (?:{_TEXT}))*)\]|True"
    r"|(?=[,;:)?]|\s|\.(?:\s|$)|$))"
)
Given: TypeAlias = tuple[Any, tuple[Any, ...]]
"""The value of an argument, and the values that say nothing."""


def as_flags(text: str) -> str:
    """A message for somebody who typed a command: arguments as its options.

    Example:
        >>> as_flags("Expected steps= or minutes=, found both. Use device='cpu' or force=True.")
        'Expected --steps or --minutes, found both. Use --device cpu or --force.'
        >>> print(as_flags("Give " + as_rules(["stem=a16", "head*=w8"])))
        Give --rule 'stem=a16' --rule 'head*=w8'
        >>> as_flags("Give bw.load_model('free.onnx', input_size='224x320'), with your height and width.")
        'Give --input-size 224x320, with your height and width.'
    """

    def spelled(match: re.Match[str]) -> str:
        if match["name"] not in OPTIONS:
            return match[0]
        flag = "--" + _FLAGS.get(match["name"], match["name"].replace("_", "-"))
        if match["several"] is not None:
            return " ".join(f"{flag} {text}" for text in re.findall(_TEXT, match["several"]))
        return flag if match["value"] is None else f"{flag} {match['value'].strip(chr(39))}"

    return _NAMED.sub(spelled, _LOADING.sub(r"\g<settings>", text))


def as_rules(rules: Iterable[str]) -> str:
    """Rules as an argument, for a message.

    Example:
        >>> as_rules(["stem=a16", "head=w8"])
        "rules=['stem=a16', 'head=w8']"
    """
    return f"rules={list(rules)!r}"


def whole_number(name: str, value: Any, *, least: int, below: int | None = None) -> int:
    """A whole number in range.

    Raises:
        UsageError: it is none.

    Example:
        >>> whole_number("samples", 4, least=1)
        4
    """
    try:
        found = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if found < least or (below is not None and found >= below):
        limits = f"of at least {least}" if below is None else f"from {least} to {below - 1}"
        raise UsageError(f"Expected a whole number {limits} as {name}=, found {_said(value)}.")
    return found


def one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    """One of a few texts.

    Raises:
        UsageError: it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        choices = ", ".join(f"'{each}'" for each in known)
        raise UsageError(f"Expected one of {choices} as {name}=, found {_said(value)}.")
    return value


def a_path(name: str, value: Any) -> Path:
    """A path, with ``~`` spelled out.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(value, str | os.PathLike) or not str(value).strip() or not isinstance(os.fspath(value), str):
        raise UsageError(f"Expected a path as {name}=, found {_said(value)}.")
    return Path(value).expanduser()


def of_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """What is given, if anything is, must be of a type.

    Raises:
        UsageError: it is of another.
    """
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"Expected {what} as {name}=, found {_said(value)}.")


def a_time(name: str, value: Any, unit: str = "minutes") -> float:
    """A finite number above 0.

    Raises:
        UsageError: it is none.
    """
    number = not isinstance(value, bool | str) and hasattr(value, "__float__")
    if not number or not 0 < float(value) < float("inf"):
        raise UsageError(f"Expected a positive number of {unit} as {name}=, found {_said(value)}.")
    return float(value)


def check_alone(name: str, value: Any, others: Mapping[str, Given]) -> None:
    """An argument that stands instead of others may not be given together with them.

    Args:
        name: of it.
        value: None if it is not given.
        others: by name what was given, and the values that say nothing.

    Raises:
        UsageError: one of the others is given too.
    """
    given = [each for each, (found, idle) in others.items() if not any(found is i or found == i for i in idle)]
    if value is not None and given:
        raise UsageError(f"Expected {name}= or {given[0]}=, found both. Say it in {name}= alone.")


def choices(literal: Any) -> tuple[str, ...]:
    """The texts of a ``Literal``."""
    return tuple(get_args(literal))


def _said(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A question for the end of an error about a name that there is not; empty where no name is like it.

    Example:
        >>> nearest("msee", ["mse", "eptq"]), nearest("zzz", ["mse", "eptq"])
        (" Did you mean 'mse'?", '')
    """
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
