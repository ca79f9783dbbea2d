"""`bitwright compare`: several recipes on the same network, images, bits, seed and budget, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitwright import report as pages
from bitwright.cli import quantize
from bitwright.cli import report as report_command
from bitwright.cli.calls import CompareCall, QuantizeCall
from bitwright.cli.options import BudgetOptions
from bitwright.errors import BitwrightError, UsageError, one_line
from bitwright.given.references import absolute_reference, absolute_source
from bitwright.given.text import read_json
from bitwright.recipes import builtin_recipes
from bitwright.recipes import recipe as find_recipe
from bitwright.report import comparison
from bitwright.report.comparison import Entry, RunFigures, figures_of
from bitwright.report.shown import read_run
from bitwright.run import folder as run_folder
from bitwright.run.files import write_json
from bitwright.run.lock import held
from bitwright.terminal import Terminal

RECORD, PAGE = "compare.json", "compare.html"
ALL = "all"
"""Stands for every recipe that needs no labels."""


def parse_recipes(text: str) -> tuple[str, ...]:
    """Names out of ``"rtn,mse,eptq"``, checked; ``all`` are those that need no labels.

    Raises:
        UsageError: fewer than two, one twice, or one that does not exist.

    Example:
        >>> parse_recipes("rtn, mse")
        ('rtn', 'mse')
    """
    if text.strip() == ALL:
        return tuple(name for name, made in builtin_recipes().items() if not made.reads_labels)
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if len(names) < 2:
        raise UsageError(f"Expected at least two recipes to compare, found '{text}'. Such as --recipes rtn,mse,eptq.")
    folders = [folder_of_recipe(n) for n in names]
    twice = next((n for n, f in zip(names, folders, strict=True) if folders.count(f) > 1), None)
    if twice is not None:
        raise UsageError(f"Expected different recipes, found {twice} twice. Name each once.")
    for name in names:
        find_recipe(name)
    return names


def folder_of_recipe(recipe: str) -> str:
    """The folder of a recipe's run.

    Example:
        >>> folder_of_recipe("eptq+evolq"), folder_of_recipe("mine/my recipe.yaml")
        ('eptq+evolq', 'my_recipe')
    """
    stem = Path(recipe).stem if Path(recipe).suffix in {".yaml", ".yml", ".py"} else recipe
    return re.sub(r"[^\w.+-]+", "_", stem)


def compare(call: CompareCall, terminal: Terminal) -> None:
    """Runs every recipe, each into its folder; one that fails does not stop the others.

    With ``--resume``, runs that are finished are taken as they are and an unfinished one goes on.

    Raises:
        UsageError: the call is wrong, or something is in the way in the folder.
        BitwrightError: some of the runs failed, all of which it names.
    """
    recipes = parse_recipes(call.recipes)
    if call.recipes.strip() == ALL and call.steps is None and call.minutes is None:
        raise UsageError("Expected --minutes or --steps with --recipes all: the papers' own settings take hours each.")
    quantize.check_shared(call.each)
    out = (call.out or Path("comparison")).expanduser().absolute()
    folders = {recipe: out / folder_of_recipe(recipe) for recipe in recipes}
    entries: list[Entry] = []
    with held(out):
        check_folders(call, folders.values(), out)
        for recipe, folder in folders.items():
            entries.append(_one(call_for(recipe, call.each, folder), folder, terminal))
            rows = [figures_of(e) for e in entries]
            record = {"settings": settings(call.each), "runs": [r.to_dict() for r in rows]}
            write_json(out / RECORD, record)
        page = pages.save_page(comparison.comparison(entries), out / PAGE)
    verdict = comparison.comparison_verdict(entries)
    terminal.result({"verdict": verdict, "runs": record["runs"], "out": str(out), "page": str(page)})
    show(rows, verdict, page, terminal)
    failed = [f"{e.name} ({e.error})" for e in entries if e.error is not None]
    if failed:
        raise BitwrightError(f"{len(failed)} of {len(entries)} recipes failed: {'; '.join(failed)}")


def call_for(recipe: str, shared: QuantizeCall, folder: Path) -> QuantizeCall:
    """A recipe's run: what all share, without a budget where nothing is optimised."""
    unlimited = BudgetOptions(precision=shared.budget.precision)
    budget = shared.budget if find_recipe(recipe).optimises else unlimited
    return replace(shared, recipe=recipe, out=folder, budget=budget)


def check_folders(call: CompareCall, folders: Collection[Path], out: Path) -> None:
    """Looks at every folder before the first run begins.

    Raises:
        UsageError: a run is in the way, or what is there to be resumed was made with other settings.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"Expected a folder at {out}, found a file. Choose another --out.")
    there = (out / RECORD).is_file() or any(f.exists() for f in folders)
    if there and not call.resume and not call.force:
        raise UsageError(f"There are runs in {out} already. Go on with --resume, or replace them with --force.")
    if call.resume and not call.force and there:
        _check_same(call.each, out)
    for folder in folders:
        if call.force or not _finished(folder):
            run_folder.check_target(folder, force=call.force, resume=call.resume)


def _check_same(shared: QuantizeCall, out: Path) -> None:
    try:
        before = dict(read_json(out / RECORD)["settings"])
    except (UsageError, ValueError, KeyError, TypeError):
        raise UsageError(f"Expected {RECORD} of an earlier comparison in {out}, found none. Use --force.") from None
    now = settings(shared)
    changed = next((k for k in now if before.get(k) != now[k]), None)
    if changed is not None:
        raise UsageError(
            f"The comparison in {out} had other settings ({changed}: {before.get(changed)}, now {now[changed]}). "
            "Repeat its command, or use --force."
        )


def settings(shared: QuantizeCall) -> dict[str, Any]:
    """What all runs of a comparison share; the recipes may grow in number."""
    data = shared.data
    found = {
        "model": absolute_reference(shared.network.model),
        "images": absolute_source(shared.network.images),
        "evaluate": None if data.evaluate is None else absolute_source(data.evaluate),
        "labels": data.labels,
        **asdict(data.compared),
        "scheme": shared.scheme.model_dump(mode="json"),
        "samples": data.samples,
        "steps": shared.budget.numbers,
        "minutes": shared.budget.minutes,
        "precision": shared.budget.precision,
        "seed": shared.seed,
        "device": shared.device,
        "output": shared.output,
        "preprocessing": shared.reading.named,
    }
    return dict(json.loads(json.dumps(found, default=str)))


def _one(call: QuantizeCall, folder: Path, terminal: Terminal) -> Entry:
    """One recipe's run, or why there is none."""
    name = folder.name
    if call.resume and not call.force and _finished(folder):
        terminal.say(f"{name}: finished before")
        return Entry(name, read_run(folder))
    terminal.say(f"{name}:")
    warned, logged = len(terminal.warnings), len(terminal.events)
    try:
        quantize.make_run(call, terminal)
        return Entry(name, read_run(folder))
    except Exception as error:
        said = one_line(str(error)) or type(error).__name__
        if not isinstance(error, BitwrightError):
            said = f"unexpected {type(error).__name__}: {said}"
        terminal.finish()
        terminal.say(f"{name} failed: {said}")
        return Entry(name, error=said)
    finally:
        del terminal.warnings[warned:], terminal.events[logged:]


def _finished(folder: Path) -> bool:
    return (folder / run_folder.RESULT).is_file()


def show(rows: Sequence[RunFigures], verdict: str, page: Path, terminal: Terminal) -> None:
    """The table, what it says, and where the page is."""
    terminal.show(report_command.runs_table(rows), verdict)
    for row in rows:
        if row.error is not None:
            terminal.show(f"{row.run} failed: {row.error}")
    failed = [row.error is not None for row in rows]
    beside = f", and a run folder for each {'other ' if any(failed) else ''}recipe beside it"
    terminal.show(f"Written: {page}{'' if all(failed) else beside}")
