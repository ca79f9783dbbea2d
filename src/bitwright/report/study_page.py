"""The page of a study: its figure with how to read it, what it says here, the summary as a table, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitwright.report.frame import Section, bullets, document, paragraph, versions
from bitwright.report.tables import page_table

if TYPE_CHECKING:
    from bitwright.studies.base import StudyResult


def study_page(result: StudyResult, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The page; ``heads`` and ``lines`` are its summary as a table."""
    study, drawn = result.study, result.figure()
    settings = ", ".join(f"{k} {v}" for k, v in result.facts["settings"].items() if k != "study")
    sections = [
        Section("says", "What it says here", bullets(result.verdict)) if result.verdict else None,
        Section("figure", "How to read it", [paragraph(study.reading), drawn.markup()]),
        Section(
            "summary", "The figures", page_table("Means over seeds, with their deviation", heads, lines, wide=True)
        ),
    ]
    return document(
        f"{study.name} - bitwright",
        study.name,
        study.summary,
        (),
        sections,
        foot=f"{study.reproduces} {study.paper}. Settings: {settings}. {versions(result.facts)}",
        scripted=drawn.scripted,
    )
