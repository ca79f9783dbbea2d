"""`bitwright study`: a paper's analysis, repeated on a network and written as data and as a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from bitwright import studies
from bitwright.commands import tables
from bitwright.commands.sources import Settings, absolute_reference, absolute_source, remove_empty
from bitwright.errors import UsageError
from bitwright.given.models import load_model
from bitwright.run.folder import check_writable
from bitwright.run.lock import held
from bitwright.studies import figures
from bitwright.terminal import Terminal


@dataclass(frozen=True)
class Job:
    """The arguments of one study, as the command line takes them."""

    name: str
    model: str | None = None
    images: str | None = None
    steps: int | None = None
    weights: str | None = None
    activations: str | None = None
    seeds: str | None = None
    samples: int | None = None
    recipe: str | None = None
    evaluate: str | None = None
    labels: str | None = None
    out: Path | None = None
    device: str = "auto"
    output: str | None = None
    settings: Settings = field(default_factory=dict)
    """Of preprocessing."""
    skip_unreadable: bool = False
    resume: bool = False
    force: bool = False


def study(job: Job, terminal: Terminal) -> tuple[studies.Result, list[Path]]:
    """Runs the study and writes NAME.json and NAME.html.

    Returns:
        The result and the two paths.

    Raises:
        UsageError: the call is wrong, or something is in the way in ``--out``.
    """
    chosen = studies.find(job.name)
    if job.model is None and job.settings:
        raise UsageError(f"Expected MODEL and IMAGES for --{next(iter(job.settings)).replace('_', '-')}, found none.")
    folder = (job.out or Path("studies")).expanduser().absolute()
    kept = folder / f"{chosen.name}.partial.json"
    with held(folder / chosen.name):
        return _study(job, chosen.name, folder, kept, terminal)


def _study(job: Job, name: str, folder: Path, kept: Path, terminal: Terminal) -> tuple[studies.Result, list[Path]]:
    """The study, while nobody else writes its files."""
    _check_target(folder, name, kept, job)
    until = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        result = _run(job, kept, terminal)
        terminal.begin("Drawing")
        paths = result.save(folder)
    except BaseException as error:
        remove_empty(folder, until)
        if isinstance(error, KeyboardInterrupt):
            terminal.farewell = (
                f"Interrupted. The same command with --resume goes on after the rows in {kept.name}."
                if kept.is_file()
                else "Interrupted before the first row was measured: nothing is kept."
            )
        raise
    kept.unlink(missing_ok=True)
    terminal.finish()
    return result, list(paths)


def _check_target(folder: Path, name: str, kept: Path, job: Job) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"Expected a folder at {folder}, found a file. Choose another --out.")
    if kept.is_file() and not job.resume and not job.force:
        raise UsageError(f"An unfinished study is in {kept}. Go on with --resume, or start again with --force.")
    there = [p for p in (folder / f"{name}.json", folder / f"{name}.html") if p.exists()]
    if there and not job.force and not (job.resume and kept.is_file()):
        raise UsageError(f"{there[0]} is there already. Choose another --out, or replace it with --force.")
    check_writable(folder)


def _run(job: Job, kept: Path, terminal: Terminal) -> studies.Result:
    model: Any = None
    if job.model is not None:
        terminal.begin("Loading the network")
        model = load_model(job.model, **job.settings)
    result = studies.study(
        job.name,
        model,
        job.images,
        steps=job.steps,
        weights=job.weights,
        activations=job.activations,
        seeds=_seeds(job.seeds),
        samples=job.samples,
        recipe=job.recipe,
        evaluate=job.evaluate,
        labels=job.labels,
        device=job.device,
        output=job.output,
        skip_unreadable=job.skip_unreadable,
        progress=terminal.progress,
        kept=kept,
        resume=job.resume,
    )
    result.facts["warnings"] = list(terminal.warnings)
    result.facts["sources"] = {
        "model": None if job.model is None else absolute_reference(job.model),
        "calibration": absolute_source(job.images or studies.ZOO_IMAGES),
        "held_out": None if job.evaluate is None else absolute_source(job.evaluate),
        "preprocessing": job.settings,
    }
    return result


def _seeds(text: str | None) -> list[int] | None:
    """Whole numbers out of ``"0,1,2"``.

    Example:
        >>> _seeds("0, 1,2")
        [0, 1, 2]
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"Expected seeds like '0,1,2', found '{text}'.") from error


def show(result: studies.Result, paths: list[Path], terminal: Terminal) -> None:
    """The summary as a table, how to read it, what it says, and the files."""
    summary = result.summary if result.study.brief is None else result.study.brief(result.summary)
    heads, lines = figures.table(summary)
    texts = {key for row in summary for key, value in row.items() if isinstance(value, str)}
    made: Table = tables.table(*(h if h in texts else f">{h}" for h in heads), title=result.study.name)
    for line in lines:
        made.add_row(*line)
    here = Path.cwd()
    names = [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in paths]
    terminal.show(made, result.study.reading, *result.verdict, f"Written: {', '.join(names)}")


def listed() -> list[dict[str, Any]]:
    """Name, summary, paper and what is reproduced, of every study."""
    keys = ("name", "summary", "paper", "reproduces")
    return [{key: getattr(s, key) for key in keys} for s in studies.builtin().values()]


def table() -> Table:
    """The same for people."""
    made = tables.table("study", "what it compares", "paper")
    for row in listed():
        made.add_row(row["name"], row["summary"], row["paper"])
    return made
