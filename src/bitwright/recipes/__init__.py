"""Recipes: one file a paper. A recipe is a name and a tuple of stages; everything else is in the stages."""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, field_validator

from bitwright.errors import UsageError
from bitwright.given.arguments import nearest
from bitwright.given.text import read_yaml, short
from bitwright.stages.base import Optimising, Stage

DEFAULT = "eptq"


class Recipe(BaseModel):
    """Stages in order.

    Example:
        >>> from bitwright.stages.calibrate import Calibrate
        >>> print(Recipe(name="plain", summary="An example.", stages=(Calibrate(weights="minmax"),)).to_yaml())
        name: plain
        summary: An example.
        paper: ''
        stages:
        - calibrate:
            weights: minmax
            activations: mse
            percentile: 0.9999
            weight_power: 4.0
            activation_power: 2.0
            bias_correction: none
            score_probes: 8
            norm_inputs: tensor
            match_spread: false
        <BLANKLINE>
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str = ""
    paper: str = ""
    stages: tuple[SerializeAsAny[Stage], ...]

    @field_validator("stages", mode="before")
    @classmethod
    def _read_stages(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of stages, found {value!r}")
        return tuple(part for v in value for part in _read_stage(v).parts())

    @property
    def optimises(self) -> bool:
        """Whether a stage takes steps."""
        return self.counts > 0

    @property
    def reads_labels(self) -> bool:
        """Whether a stage trains with labels."""
        return any(stage.reads_labels for stage in self.stages)

    @property
    def counts(self) -> int:
        """How many stages take steps."""
        return sum(isinstance(stage, Optimising) for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """Name, paper and every stage with every setting, as plain data."""
        data = self.model_dump(mode="json")
        data["stages"] = [{stage.kind: stage.model_dump(mode="json")} for stage in self.stages]
        return data

    def to_yaml(self) -> str:
        """Text that :func:`recipe` reads back."""
        return str(yaml.safe_dump(self.settings(), sort_keys=False))


def _read_stage(value: Any) -> Stage:
    if isinstance(value, Stage):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"expected a stage like 'calibrate: {{weights: mse}}', found {value!r}")
    ((kind, settings),) = value.items()
    if kind not in Stage.registry:
        raise ValueError(f"unknown stage '{kind}'; there are {', '.join(sorted(Stage.registry))}")
    if not isinstance(settings or {}, dict):
        raise ValueError(f"expected settings of '{kind}' like '{{weights: mse}}', found {settings!r}")
    try:
        return Stage.registry[kind](**(settings or {}))
    except ValidationError as error:
        raise ValueError(f"{kind}.{_fault(error)}") from error


def _fault(error: ValidationError) -> str:
    """The first setting that is wrong, everything that it may be, and what was found."""
    errors = sorted(error.errors(), key=lambda e: e["type"] == "extra_forbidden")  # another kind of value may have it
    path = [str(part) for part in errors[0]["loc"]]
    setting = list(takewhile(lambda part: re.fullmatch(r"\w+", part), path))  # what follows names a kind of value
    kinds = [e for e in errors if len(e["loc"]) == len(path) and list(map(str, e["loc"][: len(setting)])) == setting]
    text = " or ".join(dict.fromkeys(_wanted(e["msg"]) for e in (kinds if len(setting) < len(path) else kinds[:1])))
    found = errors[0]["input"]
    if text.startswith("expected ") and errors[0]["type"] != "value_error":
        text = f"{text.replace(' or expected ', ' or ')}, found {repr(found)[:80]}"
    named = [part for part in setting if not part[0].isupper()]  # others are classes
    return f"{'.'.join(named)[:80] or 'the file'}: {text}"


def _wanted(message: str) -> str:
    """A message of pydantic in our words, on one line."""
    text = " ".join(message.split())[:300].removeprefix("Value error, ")
    text = re.sub(r"^Input should be (?=greater|less)", "expected a number ", text)
    text = re.sub(r"^Input should be ", "expected ", text)
    text = re.sub(r"^(expected .*?), (unable to|got a) .*", r"\1", text)
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text


_WORDS = {
    "Extra inputs are not permitted": "there is no such setting",
    "Field required": "expected, found none",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
    "a valid tuple": "a list",
}
"""What pydantic says, and what a reader of YAML knows."""


@cache
def builtin_recipes() -> dict[str, Recipe]:
    """Every recipe in this folder, by name: each module holds one in ``RECIPE``, or several in ``RECIPES``."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for made in (*getattr(module, "RECIPES", ()), *filter(None, [getattr(module, "RECIPE", None)])):
            found[made.name] = made
    return found


def recipe(reference: str | Path | Recipe | None = None) -> Recipe:
    """A recipe by name, by YAML file, or by Python file that defines ``RECIPE``; the default one if none is given.

    Raises:
        UsageError: there is no such recipe (the nearest is named), or the file is not one (the field is named).
    """
    reference = DEFAULT if reference is None else reference
    if isinstance(reference, Recipe):
        return reference
    if not isinstance(reference, str | Path):
        raise UsageError(f"Expected a recipe by name or file as recipe=, found {type(reference).__name__}.")
    if not str(reference).strip():
        raise UsageError("Expected the name of a recipe, or a file, as recipe=, found an empty text.")
    path = Path(reference)
    if path.suffix in {".yaml", ".yml", ".py"}:
        if not path.is_file():
            raise UsageError(f"Expected a recipe file at {path}, found none.")
        return _from_python(path) if path.suffix == ".py" else _from_yaml(path)
    known = builtin_recipes()
    if str(reference) not in known:
        raise UsageError(f"There is no recipe '{reference}'.{nearest(str(reference), known)} All: {', '.join(known)}.")
    return known[str(reference)]


def _from_python(path: Path) -> Recipe:
    try:
        made = runpy.run_path(str(path), run_name=f"_bitwright_{path.stem}").get("RECIPE")
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"Expected {path} to run, it raised {type(error).__name__} ({short(error)}). Try it: python {path}"
        ) from error
    if not isinstance(made, Recipe):
        raise UsageError(f"Expected {path} to define RECIPE, a bitwright.Recipe.")
    return made


def _from_yaml(path: Path) -> Recipe:
    builtin_recipes()  # so that all stages are known
    data = read_yaml(path)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"In the recipe {path}, {_fault(error)}.") from error
