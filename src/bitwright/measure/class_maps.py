"""Which class of the network a number or a name in masks or boxes stands for."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from bitwright.errors import DataError, UsageError
from bitwright.given.entries import MOST_CLASSES
from bitwright.given.text import read_json, short
from bitwright.given.truth import IGNORED

GivenClassMap: TypeAlias = "ClassMap | Mapping[Any, int | None] | str | Path | None"
OTHERS = "*"
NUMBERS = "ids"
CLASS_MAP_FILES = ("classes.json", "classes.csv")
"""A class map that lies in a folder of masks or boxes is read without being named."""
_BESIDE = 'such as {"7": 0, "8": 1, "255": null, "*": null}'


@dataclass(frozen=True)
class ClassMap:
    """Classes by what masks or boxes hold; None for what does not count.

    Attributes:
        table: classes by value, as text. ``"*"`` stands for all that are not in it.
        names: of classes, where they are known.
        identity: whether a number that is not in the table is its class; otherwise it is an error.

    Example:
        >>> found = ClassMap.read({7: 0, "*": None})
        >>> found.of(7, "a mask"), found.of(3, "a mask")
        (0, None)
        >>> ClassMap().of(3, "a mask"), ClassMap().of(255, "a mask")
        (3, 255)
    """

    table: Mapping[str, int | None] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    identity: bool = True

    @classmethod
    def read(cls, given: GivenClassMap, folder: Path | None = None) -> ClassMap:
        """What was given, or lies in a folder; numbers as they are if nothing was.

        Raises:
            DataError: it cannot be read, or a class is no whole number.
        """
        if isinstance(given, ClassMap):
            return given
        if given is None:
            beside = (
                None if folder is None else next((folder / n for n in CLASS_MAP_FILES if (folder / n).is_file()), None)
            )
            return cls() if beside is None else cls.read(beside)
        if given == NUMBERS:
            return cls()
        if isinstance(given, str | os.PathLike):
            path = Path(given).expanduser()
            return _from_csv(path) if path.suffix.lower() == ".csv" else _checked(_json(path), f"{path}")
        if not isinstance(given, Mapping):
            raise DataError(f"Expected a dict or a file as class_map=, found {type(given).__name__}.")
        return _checked(given, "class_map=")

    def of(self, value: Any, where: str) -> int | None:
        """The class of a value.

        Raises:
            DataError: it is not in the table, and nothing is said of all others.
        """
        key = str(value)
        if key in self.table:
            return self.table[key]
        if OTHERS in self.table:
            return self.table[OTHERS]
        if self.identity and not isinstance(value, str):
            if int(value) >= MOST_CLASSES:
                raise DataError(f"Expected a class below {MOST_CLASSES} in {where}, found {int(value)}.")
            return int(value)
        raise DataError(
            f"Expected values of the class map, found {key!r} in {where}. Add it, or '{OTHERS}' for all others."
        )

    def applied(self, mask: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
        """A mask of values as one of classes; None becomes -1, and :data:`IGNORED` stays if nothing is said of it."""
        values, places = np.unique(mask, return_inverse=True)
        found = [self._pixel(int(v), where) for v in values]
        return np.asarray(found, np.int64)[places].reshape(mask.shape)

    def _pixel(self, value: int, where: str) -> int:
        if value == IGNORED and str(value) not in self.table:
            return IGNORED
        found = self.of(value, where)
        return -1 if found is None else found


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except UsageError as error:
        raise DataError(str(error)) from error


def _checked(given: Any, where: str) -> ClassMap:
    if not isinstance(given, Mapping) or not given:
        raise DataError(f"Expected classes by value in {where}, {_BESIDE}, found {type(given).__name__}.")
    wrong = next((v for v in given.values() if v is not None and (isinstance(v, bool) or not isinstance(v, int))), None)
    sizes = [v for v in given.values() if v is not None]
    wrong = wrong if wrong is not None else next((v for v in sizes if not 0 <= v < MOST_CLASSES), None)
    if wrong is not None:
        raise DataError(f"Expected class indices (0, 1, ...) or null in {where}, found {str(wrong)[:40]!r}.")
    table = {str(k): v for k, v in given.items()}
    names = {v: k for k, v in table.items() if v is not None and not k.isdecimal() and k != OTHERS}
    return ClassMap(table, names, identity=False)


def _from_csv(path: Path) -> ClassMap:
    """Lines of value, name and ignore, with a header; a column ``class`` says more than the value itself."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=";" if ";" in header and "," not in header else ","))
        kept = {r["value"].strip(): r for r in rows}
        table = {v: None if _is_yes(r.get("ignore")) else int(r.get("class") or v) for v, r in kept.items()}
        names = {c: kept[v]["name"].strip() for v, c in table.items() if c is not None and kept[v].get("name")}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"Expected columns value, name and ignore (and perhaps class) in {path}, cannot read it ({short(error)})."
        ) from error
    return ClassMap(_checked(table, str(path)).table, names, identity=False)


def _is_yes(text: str | None) -> bool:
    return (text or "").strip().lower() in {"1", "true", "yes", "ignore"}
