"""`bitwright study`: a paper's analysis, repeated on a network and written as data and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from bitwright import studies
from bitwright.cli import tables
from bitwright.cli.calls import StudyCall
from bitwright.cli.sources import check_output, empty_removed
from bitwright.errors import UsageError
from bitwright.given.models import load_model
from bitwright.given.references import absolute_reference, absolute_source
from bitwright.run.lock import held
from bitwright.studies import figures
from bitwright.terminal import Terminal
from bitwright.words import short_path


def study(call: StudyCall, terminal: Terminal) -> None:
    """Lists the studies, or runs one, writes NAME.json and NAME.html, and shows what they say.

    Raises:
        UsageError: the call is wrong, or something is in the way in ``--out``.
    """
    if call.name is None:
        _list(terminal)
        return
    name = studies.find_study(call.name, as_published=call.as_published).name
    reading = call.reading.named
    if call.model is None and reading:
        raise UsageError(f"Expected MODEL and IMAGES for --{next(iter(reading)).replace('_', '-')}, found none.")
    folder = (call.out or Path("studies")).expanduser().absolute()
    with held(folder / name):
        result, paths = _written(call, folder, folder / f"{name}.partial.json", terminal)
    terminal.result({**result.to_dict(), "files": [str(p) for p in paths]})
    show(result, paths, terminal)


def _written(call: StudyCall, folder: Path, kept: Path, terminal: Terminal) -> tuple[studies.StudyResult, list[Path]]:
    """The study and its two files, while nobody else writes them."""
    if kept.is_file() and not call.resume and not call.force:
        raise UsageError(f"An unfinished study is in {kept}. Go on with --resume, or start again with --force.")
    name = kept.name.removesuffix(".partial.json")
    resumed = call.resume and kept.is_file()
    check_output(folder, (f"{name}.json", f"{name}.html"), force=call.force or resumed)
    try:
        with empty_removed(folder):
            result = _run(call, kept, terminal)
            terminal.begin("Drawing")
            paths = result.save(folder)
    except KeyboardInterrupt:
        terminal.farewell = (
            f"Interrupted. The same command with --resume goes on after the rows in {kept.name}."
            if kept.is_file()
            else "Interrupted before the first row was measured: nothing is kept."
        )
        raise
    kept.unlink(missing_ok=True)
    terminal.finish()
    return result, list(paths)


def _run(call: StudyCall, kept: Path, terminal: Terminal) -> studies.StudyResult:
    assert call.name is not None
    model: Any = None
    if call.model is not None:
        terminal.begin("Loading the network")
        model = load_model(call.model, **call.reading.preprocessing)
    result = studies.study(
        call.name,
        model,
        call.images,
        steps=call.steps,
        weights=call.weights,
        activations=call.activations,
        seeds=_seeds(call.seeds),
        samples=call.samples,
        recipe=call.recipe,
        as_published=call.as_published,
        evaluate=call.evaluate,
        labels=call.labels,
        device=call.device,
        output=call.output,
        input_key=call.reading.input_key,
        skip_unreadable=call.reading.skip_unreadable,
        progress=terminal.progress,
        kept=kept,
        resume=call.resume,
    )
    result.facts["warnings"] = list(terminal.warnings)
    result.facts["sources"] = {
        "model": None if call.model is None else absolute_reference(call.model),
        "calibration": absolute_source(call.images or studies.ZOO_IMAGES),
        "held_out": None if call.evaluate is None else absolute_source(call.evaluate),
        "preprocessing": call.reading.preprocessing,
        **({} if call.reading.input_key is None else {"input_key": call.reading.input_key}),
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


def show(result: studies.StudyResult, paths: list[Path], terminal: Terminal) -> None:
    """The summary as a table, how to read it, what it says, and the files."""
    summary = result.summary if result.study.brief is None else result.study.brief(result.summary)
    heads, lines = figures.summary_table(summary)
    texts = {key for row in summary for key, value in row.items() if isinstance(value, str)}
    made: Table = tables.table(*(h if h in texts else f">{h}" for h in heads), title=result.study.name)
    for line in lines:
        made.add_row(*line)
    terminal.show(made, result.study.reading, *result.verdict, f"Written: {', '.join(map(short_path, paths))}")


def _list(terminal: Terminal) -> None:
    """Name, summary, paper and what is reproduced, of every study."""
    keys = ("name", "summary", "paper", "reproduces")
    terminal.result({"studies": [{key: getattr(s, key) for key in keys} for s in studies.builtin_studies().values()]})
    made = tables.table("study", "what it compares", "paper")
    for each in studies.builtin_studies().values():
        made.add_row(each.name, each.summary, each.paper)
    terminal.show(made)
