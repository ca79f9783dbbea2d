"""What a study is: cells to measure, how to sum them up, how to draw them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.errors import UsageError
from bitwright.given.models import Model
from bitwright.progress import Progress
from bitwright.quant.scheme import parse_activation_bits, parse_weight_bits
from bitwright.report.frame import Section, bullets, document, paragraph, versions
from bitwright.report.panels import Figure
from bitwright.report.tables import page_table
from bitwright.run.files import DamagedError, read_checked, write_checked, write_text
from bitwright.studies.figures import summary_table
from bitwright.studies.rows import Row, plain, text_of
from bitwright.studies.subject import Subject
from bitwright.studies.surfaces import Interactive


@dataclass(frozen=True)
class StudySettings:
    """What all cells of a study share. None, or nothing, in a study's defaults: the setting has no meaning there.

    Attributes:
        steps: of the optimisation; the most, where steps are what is studied.
        weights: bits, one panel each.
        activations: bits, None for float.
        seeds: of all random choices; spreads are over these.
        samples: images to calibrate on; the most, where their number is studied.
        recipe: what quantizes, where any recipe can.
    """

    steps: int | None = None
    weights: tuple[int, ...] = ()
    activations: int | None = None
    seeds: tuple[int, ...] = (0,)
    samples: int = 256
    recipe: str | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement to be made: ``key`` tells it from the others, ``measure(progress)`` makes it."""

    key: Row
    measure: Callable[[Progress], Row]


@dataclass(frozen=True)
class Study:
    """An analysis of a paper, for any network.

    Attributes:
        name: on the command line, and of the files.
        summary: what it compares, in one line.
        paper: where the analysis is from.
        reproduces: the figure or table.
        reading: how to read the plot, in a line or two.
        defaults: sizes at which it takes a few minutes on the embedded networks.
        cells: what to measure on one network.
        summarise: rows to fewer rows, with spreads (:func:`group`).
        figure: of a result.
        networks: those to run on where the user names none; the embedded ones if not given.
        verdict: what the figures of a result say, in sentences.
        brief: of a summary, what fits a terminal; all of it if not given.
        recipe: whose stages it runs; kept in NAME.json where the study takes steps.
        published: the study with the paper's own start and settings in place of ours.
    """

    name: str
    summary: str
    paper: str
    reproduces: str
    reading: str
    defaults: StudySettings
    cells: Callable[[Subject, StudySettings], Iterable[Cell]]
    summarise: Callable[[list[Row]], list[Row]]
    figure: Callable[[StudyResult], Figure | Interactive]
    networks: Callable[[Progress], list[Model]] | None = None
    verdict: Callable[[StudyResult], list[str]] | None = None
    brief: Callable[[list[Row]], list[Row]] | None = None
    recipe: str = "eptq"
    published: Study | None = None

    def settle(
        self,
        *,
        steps: int | None = None,
        weights: int | str | Sequence[int] | None = None,
        activations: int | str | None = None,
        seeds: Sequence[int] | None = None,
        samples: int | None = None,
        recipe: str | None = None,
    ) -> StudySettings:
        """The defaults with what was asked for.

        Raises:
            UsageError: a setting is out of range, or means nothing to this study.
        """
        found = self.defaults
        if steps is not None:
            self._must_have("steps=", found.steps is not None)
            found = replace(found, steps=_at_least(1, steps, "step"))
        if weights is not None:
            self._must_have("weights=", bool(found.weights))
            found = replace(found, weights=_weight_bits(weights))
        if activations is not None:
            self._must_have("activations=", bool(found.weights))
            found = replace(found, activations=parse_activation_bits(activations))
        if seeds is not None:
            found = replace(found, seeds=tuple(dict.fromkeys(int(s) for s in seeds)))
        if samples is not None:
            found = replace(found, samples=_at_least(1, samples, "sample"))
        if recipe is not None:
            self._must_have("recipe=", found.recipe is not None)
            found = replace(found, recipe=recipe)
        if not found.seeds:
            raise UsageError("Expected at least one seed, found none.")
        return found

    def _must_have(self, option: str, known: bool) -> None:
        if not known:
            raise UsageError(f"Study '{self.name}' has no use for {option}. Leave it out.")


def _at_least(least: int, value: int, what: str) -> int:
    if value < least:
        raise UsageError(f"Expected at least {least} {what}, found {value}.")
    return value


def _weight_bits(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """One number of bits or several, as ``"3,4"`` or ``(3, 4)``.

    Example:
        >>> _weight_bits("3, 4"), _weight_bits(8)
        ((3, 4), (8,))
    """
    parts: Sequence[int | str] = (
        given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    )
    bits = [parse_weight_bits(p.strip() if isinstance(p, str) else p) for p in parts]
    found = tuple(dict.fromkeys(b for b in bits if b is not None))
    if len(found) == 0 or None in bits:
        raise UsageError("Expected 2 to 8 bits for weights in a study, found 'float'.")
    return found


# ------------------------------------------------------------------------------------------------ results


@dataclass
class StudyResult:
    """A study that was run.

    Attributes:
        study: which.
        facts: what NAME.json holds besides the rows: versions, settings, networks, images, seconds, warnings.
        rows: everything that was measured.
    """

    study: Study
    facts: dict[str, Any]
    rows: list[Row]

    @property
    def summary(self) -> list[Row]:
        """The rows with seeds taken together."""
        return self.study.summarise(self.rows)

    @property
    def verdict(self) -> list[str]:
        """What the figures say, in sentences; nothing where the study leaves that to the reader."""
        return [] if self.study.verdict is None else self.study.verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """What NAME.json holds."""
        about = {k: getattr(self.study, k) for k in ("name", "summary", "paper", "reproduces", "reading")}
        found = {"verdict": self.verdict} if self.study.verdict is not None else {}
        return {"study": about, **self.facts, **found, "summary": self.summary, "rows": self.rows}

    def figure(self) -> Figure | Interactive:
        """What is drawn of it: panels, or a figure that moves."""
        return self.study.figure(self)

    def page(self) -> str:
        """NAME.html: the figure with how to read it, what it says here, the summary as a table, the settings."""
        study = self.study
        settings = ", ".join(f"{k} {v}" for k, v in self.facts["settings"].items() if k != "study")
        foot = f"{study.reproduces} {study.paper}. Settings: {settings}. {versions(self.facts)}"
        drawn, (heads, lines) = self.figure(), summary_table(self.summary)
        sections = [
            Section("says", "What it says here", bullets(self.verdict)) if self.verdict else None,
            Section("figure", "How to read it", [paragraph(study.reading), drawn.markup()]),
            Section(
                "summary", "The figures", page_table("Means over seeds, with their deviation", heads, lines, wide=True)
            ),
        ]
        title = f"{study.name} - bitwright"
        return document(title, study.name, study.summary, (), sections, foot=foot, scripted=drawn.scripted)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes NAME.json and NAME.html: each is whole, or what it was before.

        Returns:
            The two paths.
        """
        folder = Path(folder)
        texts = {".json": json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", ".html": self.page()}
        paths = [folder / f"{self.study.name}{suffix}" for suffix in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            write_text(path, text)
        return paths[0], paths[1]


class KeptRows:
    """Rows by their keys, written to a file after each so that an interrupted study need not measure them again.

    Args:
        path: of the file; None keeps nothing on disk.
        identity: what the rows depend on.
        resume: take over what the file holds.

    Raises:
        UsageError: the file to resume from belongs to a study with other settings, networks or images.
    """

    def __init__(self, path: Path | None, identity: str, *, resume: bool = False) -> None:
        self.path, self.identity = path, identity
        self._rows: dict[str, Row] = {}
        if resume and path is not None and path.is_file():
            self._rows = _read(path, identity)

    def get(self, key: Row) -> Row | None:
        """The row of this key, if it was measured."""
        return self._rows.get(text_of(key))

    def add(self, key: Row, row: Row) -> None:
        """Keeps a row."""
        self._rows[text_of(key)] = row
        if self.path is not None:
            rows = [{"key": json.loads(k), "row": r} for k, r in self._rows.items()]
            write_checked(self.path, {"identity": self.identity, "rows": rows})


def _read(path: Path, identity: str) -> dict[str, Row]:
    try:
        found = read_checked(path)
        same, rows = found["identity"] == identity, {text_of(r["key"]): r["row"] for r in found["rows"]}
    except (DamagedError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no rows of a study. Delete it, or use force=True.") from error
    if not same:
        raise UsageError(f"The unfinished study in {path} had other settings. Repeat its command, or use force=True.")
    return rows


def settings_facts(study: Study, settings: StudySettings) -> dict[str, Any]:
    """The settings that mean something to the study, as plain data."""
    found = asdict(settings)
    if settings.steps is None:
        del found["steps"]
    if not settings.weights:
        del found["weights"], found["activations"]
    if settings.recipe is None:
        del found["recipe"]
    return {"study": study.name, **plain(found)}
