"""`bitwright recipes`: what there is, and each as text to start one's own from.

The list is read from the files of the recipes and their settings from ``recipes.json``, which holds those that ship, so
that PyTorch is imported for a recipe of the user's alone. ``python -m bitwright.cli.recipes`` writes that file anew.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bitwright.cli import tables
from bitwright.cli.calls import RecipesCall
from bitwright.terminal import Terminal

FOLDER = Path(__file__).parents[1] / "recipes"
SETTINGS = Path(__file__).with_suffix(".json")


class ListedRecipe(NamedTuple):
    """What a recipe's file says of it."""

    name: str
    summary: str
    paper: str
    default: bool


def recipes(call: RecipesCall, terminal: Terminal) -> None:
    """Shows all recipes with their papers, or one with all its settings."""
    if call.name is not None:
        settings = json.loads(SETTINGS.read_text(encoding="utf-8")).get(call.name) or _settings(call.name)
        terminal.result(settings)
        terminal.show(str(yaml.safe_dump(settings, sort_keys=False)).rstrip("\n"))
        return
    rows = list(listed_recipes())
    terminal.result({"recipes": [row._asdict() for row in rows]})
    made = tables.table("recipe", "what it does", "paper")
    for row in rows:
        made.add_row(row.name + (" (default)" if row.default else ""), row.summary, row.paper)
    terminal.show(made)


def _settings(name: str) -> dict[str, Any]:
    """Of a recipe in a file, or an error that names the nearest."""
    from bitwright.recipes import recipe

    return recipe(name).settings()


def write_settings() -> None:
    """Writes down the settings of the recipes that ship."""
    from bitwright.recipes import builtin_recipes

    found = {name: made.settings() for name, made in builtin_recipes().items()}
    SETTINGS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def listed_recipes() -> Iterator[ListedRecipe]:
    """Every recipe that ships, in the order of their files."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.py"))}
    default = next(
        ast.literal_eval(node.value)
        for node in trees.pop("__init__").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT"
    )
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Recipe":
                said = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg in ListedRecipe._fields}
                name = str(said["name"])
                yield ListedRecipe(name, said.get("summary", ""), said.get("paper", ""), name == default)


if __name__ == "__main__":
    write_settings()
