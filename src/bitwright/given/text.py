"""YAML and JSON of others: plain values of limited size and depth, or one line that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bitwright.errors import UsageError

BYTES = 1 << 20
"""Most bytes of a YAML file."""
VALUES = 10_000
"""Most values in a YAML file, with every alias written out."""


def read_json(path: Path, once: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON file holds.

    Args:
        path: of a file.
        once: as the ``object_pairs_hook`` of :func:`json.loads`.

    Raises:
        UsageError: it cannot be read, or is not JSON, which has no NaN and no infinity.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    if not path.is_file():
        raise UsageError(f"Expected a file of JSON at {path}, found none.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once, parse_constant=refuse)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({short(error)}).") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, in plain values under names.

    Raises:
        UsageError: it cannot be read, is not YAML, is too large, or has names that are no text or stand twice.
    """
    try:
        content = path.read_bytes()
        if len(content) > BYTES:
            raise UsageError(f"Expected a YAML file of at most {BYTES >> 10} KiB, {path} has {len(content) >> 10}.")
        text = content.decode("utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is None:
            return None
        if _count(tree, {}) > VALUES:
            raise UsageError(f"Expected at most {VALUES} values in {path}, found more (aliases written out).")
        _check_names(tree, path, set())
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {short(error)}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply, or holds an alias of itself.") from error
    except (OSError, ValueError, ArithmeticError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as YAML ({short(error)}).") from error
    _check_plain(found, path)
    return found


def _count(node: yaml.Node, seen: dict[int, int]) -> int:
    """Values below a node, with every alias written out; each node is visited once."""
    if id(node) in seen:
        return seen[id(node)]
    seen[id(node)] = VALUES + 1  # an alias of itself has no end
    parts: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    total = 1 + sum(_count(n, seen) for part in parts for n in (part if isinstance(part, tuple) else (part,)))
    seen[id(node)] = total
    return total


def _check_names(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """YAML's reader would take the last of two values of one name, without a word."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in (name for place, name in enumerate(names) if name in names[:place]):
            line = node.start_mark.line + 1
            raise UsageError(f"'{name[:80]}' stands twice in the same mapping in {path}, which begins in line {line}.")
    for part in node.value:
        for inner in part if isinstance(part, tuple) else (part,):
            _check_names(inner, path, seen)


def _check_plain(value: Any, path: Path) -> None:
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"Expected text in {path}, found half a character: {value[:80]!r}.")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UsageError(f"Expected names as keys in {path}, found {str(name)[:80]!r}.")
            _check_plain(name, path)
            _check_plain(inner, path)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, path)


def some(names: Sequence[str]) -> str:
    """The first three of many names.

    Example:
        >>> some(["a", "b", "c", "d"]), some(["a"])
        ('a, b, c, ...', 'a')
    """
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def short(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
