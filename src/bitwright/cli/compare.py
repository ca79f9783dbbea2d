"""`bitwright compare`: several recipes on the same network, images, bits, seed and budget, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bitwright import report as pages
from bitwright.cli import quantize
from bitwright.cli import report as report_command
from bitwright.cli.calls import CompareCall, QuantizeCall
from bitwright.cli.options import BudgetOptions
from bitwright.cli.sources import empty_removed
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
        with _begun(call, out, folders.values(), terminal) as record:
            for recipe, folder in folders.items():
                each = call_for(recipe, call.each, folder)
                each = replace(each, force=True, resume=False) if folder.name in record.old else each
                entries.append(_one(each, folder, terminal))
                rows = [figures_of(e) for e in entries]
                record.write([r.to_dict() for r in rows])
        page = pages.save_page(comparison.comparison(entries), out / PAGE)
    verdict = comparison.comparison_verdict(entries)
    terminal.result({"verdict": verdict, "runs": record.runs, "out": str(out), "page": str(page)})
    show(rows, verdict, page, terminal)
    failed = [f"{e.name} ({e.error})" for e in entries if e.error is not None]
    if failed:
        raise BitwrightError(f"{len(failed)} of {len(entries)} recipes failed: {'; '.join(failed)}")


@dataclass
class Comparing:
    """The file of a comparison: what the runs share, what came of them, and which folders hold runs of before."""

    path: Path
    settings: dict[str, Any]
    old: list[str]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def write(self, runs: list[dict[str, Any]]) -> None:
        """The file once more, after a run; what was made now is not of before."""
        self.runs, made = runs, {r["run"] for r in runs if r["error"] is None}
        self.old = [name for name in self.old if name not in made]
        old = {"old": self.old} if self.old else {}
        write_json(self.path, {"settings": self.settings, "runs": runs} | old)


@contextmanager
def _begun(call: CompareCall, out: Path, folders: Collection[Path], terminal: Terminal) -> Iterator[Comparing]:
    """While a comparison runs its file is there, by which ``--resume`` knows what it goes on with.

    Where nothing else is kept after an interruption, the file is not kept either.
    """
    path = out / RECORD
    going_on = call.resume and not call.force and path.is_file()
    if going_on:
        old = [str(name) for name in read_json(path).get("old", [])]
    else:
        old = [folder.name for folder in folders if _finished(folder)]
    record = Comparing(path, settings(call.each), old)
    with empty_removed(out):
        try:
            if not going_on:
                out.mkdir(parents=True, exist_ok=True)
                record.write([])
            yield record
        except KeyboardInterrupt:
            if any(folder.exists() for folder in folders):
                terminal.farewell = "Interrupted. The same command with --resume goes on where it was."
            elif not going_on:
                path.unlink(missing_ok=True)
            raise


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
    if _finished(out):
        raise UsageError(f"Expected a folder for several runs, {out} is a run itself. Choose another --out.")
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
