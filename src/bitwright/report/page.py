"""The page around the sections: one file that needs nothing else and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files

from bitwright.report import latency, layers, making, pictures, plans, summary
from bitwright.report.markup import Child, Markup, tag
from bitwright.report.shown import Section, Shown
from bitwright.report.verdict import verdict

SECTIONS: tuple[Callable[[Shown], Section | None], ...] = (
    summary.accuracy,
    summary.size,
    plans.plan,
    latency.latency,
    layers.diagnosis,
    layers.depth,
    layers.worst,
    pictures.disagreements,
    layers.every_layer,
    making.training,
    making.parity,
    making.floats,
    making.time,
    making.warnings,
    making.repeat,
)
"""In the order of the page; one without anything to say returns None."""


def page(run: Shown) -> str:
    """The report of one run."""
    result = run.result
    name = result["model"]["name"]
    under = f"{run.bits} · recipe {result['recipe']['name']} · {run.folder}".strip(" ·")
    sections = [s for s in (make(run) for make in SECTIONS) if s is not None]
    return document(f"{name} · bitwright", name, under, verdict(result, run.facts), sections)


def document(title: str, name: str, under: str, sentence: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: of the window.
        name: what it is about.
        under: the line below that.
        sentence: the verdict.
        sections: in order.
    """
    script, style = Markup(_file("script.js")), Markup(_file("style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("a", "Skip to the report", href="#report", class_="skip"),
        tag("button", "Dark", type="button", id="scheme", class_="control", aria_pressed="false", hidden=True),
        tag(
            "main",
            tag("header", tag("h1", name), tag("p", under, class_="under"), tag("p", sentence, class_="verdict")),
            tag("nav", _contents(sections), aria_label="Contents"),
            [_section(s) for s in sections],
            id="report",
            tabindex=-1,
        ),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _contents(sections: Sequence[Section]) -> Markup:
    return tag("ul", (tag("li", tag("a", s.title, href=f"#{s.key}")) for s in sections))


def _section(section: Section) -> Markup:
    heading: Child = tag("h2", section.title, id=f"{section.key}-title")
    return tag("section", heading, section.body, id=section.key, aria_labelledby=f"{section.key}-title")


def _file(name: str) -> str:
    return files("bitwright.report").joinpath(name).read_text(encoding="utf-8")
