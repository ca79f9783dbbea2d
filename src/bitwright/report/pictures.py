"""Images on which the two networks give different answers."""

from __future__ import annotations

from bitwright import words
from bitwright.report.frame import Section, paragraph
from bitwright.report.kept import DifferingImage, GivenAnswer
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
        else "Images were left out (--no-images)."
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
