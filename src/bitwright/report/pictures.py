"""Images on which the two networks give different answers."""

from __future__ import annotations

from bitwright import words
from bitwright.report.frame import Section, paragraph
from bitwright.report.kept import DifferingImage, GivenAnswer, Overlay
from bitwright.report.markup import Markup, tag
from bitwright.report.shown import Shown


def disagreements(run: Shown) -> Section | None:
    """A few images side by side with both answers; nothing for networks that give no classes."""
    found = None if run.facts is None else run.facts.answers
    if found is None:
        return None
    title, images = "Where the answers differ", words.plural(found.count, "image")
    if not found.shown:
        return Section("images", title, paragraph(f"They differ on none of {images}."))
    lead = (
        f"They differ on {found.differing:,} of {images} "
        f"({words.percent(found.differing / found.count)}). Below are those on which the float network's class "
        "lost the most probability."
    )
    kept = (
        "Small copies of these images are embedded in this page and in report.json: mind where you send them. "
        "--no-images leaves them out."
        if found.pictures
        else "Images were left out (--no-images), or are videos, signals or vectors, of which none is drawn."
    )
    shown = tag("ul", (_one(row, found.classes or {}) for row in found.shown), class_="pictures")
    return Section("images", title, [paragraph(lead), shown, paragraph(kept, quiet=True)])


def _one(row: DifferingImage, classes: dict[str, str]) -> Markup:
    right = row.label
    drawn = (
        tag("img", src=row.picture, alt=f"the image {row.name}", width=112, height=112)
        if row.picture is not None and row.picture.startswith("data:image/")
        else None
    )
    answers = [
        _answer("float", row.reference, right, classes),
        _answer("quantized", row.quantized, right, classes),
    ]
    if right is not None:
        answers.append([tag("dt", "label"), tag("dd", name_of(right, classes))])
    name = f"image {row.name}" if row.name.isdecimal() else row.name
    name += f", output {row.output}" if row.output else ""
    return tag("li", drawn, tag("div", tag("p", name, class_="layer"), tag("dl", answers)))


def _answer(who: str, found: GivenAnswer, right: int | None, classes: dict[str, str]) -> list[Markup]:
    mark = "" if right is None else "✓" if found.number == right else "✗"
    said = f"{name_of(found.number, classes)}, {words.percent(found.probability, 0)}"
    judged = tag("span", mark, role="img", aria_label="right:" if mark == "✓" else "wrong:") if mark else None
    return [tag("dt", who), tag("dd", judged, " " if judged else None, said)]


def name_of(number: int, classes: dict[str, str]) -> str:
    """A class by its folder's name where there is one.

    Example:
        >>> name_of(3, {"3": "dress"}), name_of(4, {})
        ('dress', 'class 4')
    """
    return classes.get(str(number), f"class {number}")


def differing_overlays(run: Shown) -> Section | None:
    """The section; nothing where there are no masks or boxes, or no picture was kept."""
    found = (None if run.facts is None else run.facts.overlays) or []
    if not found:
        return None
    lead = paragraph(
        "The images on which the networks differ most, as the network sees them, with the labels beside them. A colour "
        "is a class; boxes are those with a score above 0.3. Small copies are embedded in this page and in "
        "report.json: mind where you send them. --no-images leaves them out."
    )
    return Section("overlays", "Where masks or boxes differ most", [lead, *(_overlay(each) for each in found)])


def _overlay(each: Overlay) -> Markup:
    pictures = [
        tag("li", tag("img", src=picture, alt=f"{each.name}: {who}", width=112, height=112), tag("p", who))
        for who, picture in (each.pictures or {}).items()
        if picture.startswith("data:image/")
    ]
    return tag("div", paragraph(f"{each.name}: {each.said}."), tag("ul", pictures, class_="pictures"))
