"""`bitwright compare`: several recipes on the same network, images, bits, seed and budget, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright import report as pages
from bitwright.commands import quantize
from bitwright.commands import report as report_command
from bitwright.commands.sources import absolute_reference, absolute_source
from bitwright.errors import BitwrightError, UsageError
from bitwright.given.text import read_json
from bitwright.recipes import recipe as find_recipe
from bitwright.report import comparison
from bitwright.report.comparison import Entry
from bitwright.report.shown import read_run as read
from bitwright.run import folder as run_folder
from bitwright.run.files import write_json
from bitwright.run.lock import held
from bitwright.terminal import Terminal, one_line

RECORD, PAGE = "compare.json", "compare.html"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        job: what all runs share.
        recipes: names or files, in order.
        out: folder of the runs.
    """

    job: quantize.Job
    recipes: tuple[str, ...]
    out: Path

    @property
    def folders(self) -> dict[str, Path]:
        """The run folder of each recipe."""
        return {r: self.out / folder_name(r) for r in self.recipes}


def parse_recipes(text: str) -> tuple[str, ...]:
    """Names out of ``"rtn,mse,eptq"``, checked.

    Raises:
        UsageError: fewer than two, one twice, or one that does not exist.

    Example:
        >>> parse_recipes("rtn, mse")
        ('rtn', 'mse')
    """
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if len(names) < 2:
        raise UsageError(f"Expected at least two recipes to compare, found '{text}'. Such as --recipes rtn,mse,eptq.")
    folders = [folder_name(n) for n in names]
    twice = next((n for n, f in zip(names, folders, strict=True) if folders.count(f) > 1), None)
    if twice is not None:
        raise UsageError(f"Expected different recipes, found {twice} twice. Name each once.")
    for name in names:
        find_recipe(name)
    return names


def folder_name(recipe: str) -> str:
    """The folder of a recipe's run.

    Example:
        >>> folder_name("eptq+evolq"), folder_name("mine/my recipe.yaml")
        ('eptq+evolq', 'my_recipe')
    """
    stem = Path(recipe).stem if Path(recipe).suffix in {".yaml", ".yml", ".py"} else recipe
    return re.sub(r"[^\w.+-]+", "_", stem)


def compare(comparing: Comparison, terminal: Terminal) -> tuple[dict[str, Any], Path, BitwrightError | None]:
    """Runs every recipe, each into its folder; one that fails does not stop the others.

    With ``resume``, runs that are finished are taken as they are and an unfinished one goes on.

    Returns:
        The figures of all, the page, and an error that names what failed, if something did.

    Raises:
        UsageError: the call is wrong, or something is in the way in the folder.
    """
    with held(comparing.out):
        return _compare(comparing, terminal)


def _compare(comparing: Comparison, terminal: Terminal) -> tuple[dict[str, Any], Path, BitwrightError | None]:
    """The runs and the page, while nobody else writes there."""
    check(comparing)
    entries: list[Entry] = []
    for recipe, folder in comparing.folders.items():
        entries.append(_one(comparing, recipe, folder, terminal))
        _record(comparing, entries)
    page = pages.save(comparison.comparison(entries), comparing.out / PAGE)
    rows = [comparison.row(e) for e in entries]
    failed = [f"{e.name} ({e.error})" for e in entries if e.error is not None]
    failure = BitwrightError(f"{len(failed)} of {len(entries)} recipes failed: {'; '.join(failed)}") if failed else None
    return {"verdict": comparison.verdict(entries), "runs": rows, "out": str(comparing.out)}, page, failure


def check(comparing: Comparison) -> None:
    """Looks at every folder before the first run begins.

    Raises:
        UsageError: a run is in the way, or what is there to be resumed was made with other settings.
    """
    job, out = comparing.job, comparing.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"Expected a folder at {out}, found a file. Choose another --out.")
    there = (out / RECORD).is_file() or any(f.exists() for f in comparing.folders.values())
    if there and not job.resume and not job.force:
        raise UsageError(f"There are runs in {out} already. Go on with --resume, or replace them with --force.")
    if job.resume and not job.force and there:
        _check_same(comparing)
    for folder in comparing.folders.values():
        if job.force or not _finished(folder):
            run_folder.check_target(folder, force=job.force, resume=job.resume)


def _check_same(comparing: Comparison) -> None:
    path = comparing.out / RECORD
    try:
        before = dict(read_json(path)["settings"])
    except (UsageError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"Expected {RECORD} of an earlier comparison in {comparing.out}, found none. Use --force."
        ) from None
    now = settings(comparing)
    changed = next((k for k in now if before.get(k) != now[k]), None)
    if changed is not None:
        raise UsageError(
            f"The comparison in {comparing.out} had other settings ({changed}: {before.get(changed)}, now "
            f"{now[changed]}). Repeat its command, or use --force."
        )


def settings(comparing: Comparison) -> dict[str, Any]:
    """What all runs of a comparison share; the recipes may grow in number."""
    job = comparing.job
    found = {
        "model": absolute_reference(job.model),
        "images": absolute_source(job.images),
        "evaluate": None if job.evaluate is None else absolute_source(job.evaluate),
        "labels": job.labels,
        "scheme": job.scheme.model_dump(mode="json"),
        "samples": job.samples,
        "steps": job.steps,
        "minutes": job.minutes,
        "precision": job.precision,
        "seed": job.seed,
        "device": job.device,
        "output": job.output,
        "preprocessing": job.settings,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _one(comparing: Comparison, recipe: str, folder: Path, terminal: Terminal) -> Entry:
    """One recipe's run, or why there is none."""
    job = comparing.job
    name = folder.name
    if job.resume and not job.force and _finished(folder):
        terminal.say(f"{name}: finished before")
        return Entry(name, read(folder))
    terminal.say(f"{name}:")
    warned, logged = len(terminal.warnings), len(terminal.events)
    try:
        quantize.quantize(replace(job, recipe=recipe, out=folder), terminal)
        return Entry(name, read(folder))
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


def _record(comparing: Comparison, entries: Sequence[Entry]) -> None:
    """``compare.json``: what the runs share, and their figures so far."""
    found = {"settings": settings(comparing), "runs": [comparison.row(e) for e in entries]}
    write_json(comparing.out / RECORD, found)


def show(found: dict[str, Any], page: Path, terminal: Terminal) -> None:
    """The table, what it says, and where the page is."""
    terminal.show(report_command.table(found["runs"]))
    terminal.show(found["verdict"].replace("\u00a0", " "))
    for row in found["runs"]:
        if row["error"] is not None:
            terminal.show(f"{row['run']} failed: {row['error']}")
    terminal.show(f"Written: {page}, and a run folder for each recipe beside it")
