"""The frame of every page: one file that needs nothing else and asks nobody for anything, and the pieces in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitwright.report.markup import Child, Markup, tag
from bitwright.run.files import write_text


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    key: str
    title: str
    body: Child


def document(
    title: str,
    name: str,
    under: str,
    said: Sequence[str],
    sections: Sequence[Section | None],
    *,
    foot: str = "",
    scripted: bool = False,
) -> str:
    """A whole page.

    Args:
        title: of the window.
        name: what it is about.
        under: the line below that.
        said: the verdict, in sentences; several are a list.
        sections: in order; None is left out.
        foot: small print at the end.
        scripted: whether a section brings scripts of its own, as plotly's figures do. Nothing is fetched then either.
    """
    script, style = Markup(_file("script.js")), Markup(_file("style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = "'unsafe-inline' 'unsafe-eval'; worker-src blob:" if scripted else f"'sha256-{digest}'"
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    shown = [s for s in sections if s is not None]
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
            tag("header", tag("h1", name), tag("p", under, class_="under"), _verdict(said)),
            tag(
                "nav", tag("ul", (tag("li", tag("a", s.title, href=f"#{s.key}")) for s in shown)), aria_label="Contents"
            ),
            [_section(s) for s in shown],
            tag("footer", paragraph(foot, quiet=True)) if foot else None,
            id="report",
            tabindex=-1,
        ),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _verdict(said: Sequence[str]) -> Markup | None:
    return bullets(said, class_="verdict") if len(said) > 1 else tag("p", said, class_="verdict") if said else None


def _section(section: Section) -> Markup:
    heading = tag("h2", section.title, id=f"{section.key}-title")
    return tag("section", heading, section.body, id=section.key, aria_labelledby=f"{section.key}-title")


def _file(name: str) -> str:
    return files("bitwright.report").joinpath(name).read_text(encoding="utf-8")


def save_page(text: str, path: Path) -> Path:
    """Writes a page.

    Raises:
        BitwrightError: it cannot be written.
    """
    path = path.expanduser()
    write_text(path, text)
    return path


# ------------------------------------------------------------------------------------------------------ pieces


def paragraph(*said: Child, quiet: bool = False) -> Markup:
    """Text."""
    return tag("p", said, class_="quiet" if quiet else None)


def bullets(said: Sequence[Child], class_: str | None = None) -> Markup:
    """A list."""
    return tag("ul", (tag("li", each) for each in said), class_=class_)


def definitions(pairs: Sequence[tuple[str, Child]]) -> Markup:
    """Names and what they stand for."""
    return tag("dl", [[tag("dt", name), tag("dd", said)] for name, said in pairs])


def shell(said: str) -> Markup:
    """A command line that breaks between its words."""
    return tag("code", [[tag("span", word, class_="word"), " "] for word in said.split(" ")])


def versions(facts: Mapping[str, Any]) -> str:
    """What made a page, for its small print.

    Example:
        >>> versions({"bitwright": "0.1.0", "torch": "2.9.1"})
        'bitwright 0.1.0, torch 2.9.1.'
    """
    return f"bitwright {facts['bitwright']}, torch {facts['torch']}."
