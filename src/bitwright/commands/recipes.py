"""`bitwright recipes`: what there is, and each as text to start one's own from."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from bitwright import recipes
from bitwright.commands import tables
from bitwright.recipes import builtin
from bitwright.recipes import recipe as find_recipe


def listed() -> list[dict[str, Any]]:
    """Name, summary and paper of every recipe."""
    return [
        {"name": r.name, "summary": r.summary, "paper": r.paper, "default": r.name == recipes.DEFAULT}
        for r in builtin().values()
    ]


def table() -> Table:
    """The same for people."""
    made = tables.table("recipe", "what it does", "paper")
    for row in listed():
        made.add_row(row["name"] + (" (default)" if row["default"] else ""), row["summary"], row["paper"])
    return made


def printed(name: str) -> tuple[dict[str, Any], str]:
    """One recipe with all its settings, as data and as YAML.

    Raises:
        UsageError: there is none of the name; the nearest is named.
    """
    found = find_recipe(name)
    return found.settings(), found.to_yaml().rstrip("\n")
