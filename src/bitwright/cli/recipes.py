"""`bitwright recipes`: what there is, and each as text to start one's own from."""

from __future__ import annotations

from bitwright import recipes as known
from bitwright.cli import tables
from bitwright.cli.calls import RecipesCall
from bitwright.terminal import Terminal


def recipes(call: RecipesCall, terminal: Terminal) -> None:
    """Shows all recipes with their papers, or one with all its settings."""
    if call.name is not None:
        found = known.recipe(call.name)
        terminal.result(found.settings())
        terminal.show(found.to_yaml().rstrip("\n"))
        return
    all_there = known.builtin_recipes().values()
    rows = [
        {"name": r.name, "summary": r.summary, "paper": r.paper, "default": r.name == known.DEFAULT} for r in all_there
    ]
    terminal.result({"recipes": rows})
    made = tables.table("recipe", "what it does", "paper")
    for r in all_there:
        made.add_row(r.name + (" (default)" if r.name == known.DEFAULT else ""), r.summary, r.paper)
    terminal.show(made)
