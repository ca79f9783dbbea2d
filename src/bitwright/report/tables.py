"""Tables of a page: numbers to the right, wide ones scroll by themselves, long ones are sorted and searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.report.markup import Child, Markup, tag

SEARCHED = 8
"""Rows up to which a sortable table needs no search."""


@dataclass(frozen=True)
class TableCell:
    """What a cell says, and the number that it is sorted by."""

    said: Child
    value: float | None = None


def page_table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[TableCell | str]],
    *,
    sortable: bool = False,
    name: str = "",
    wide: bool = False,
) -> Markup:
    """A table with a caption.

    Args:
        caption: read aloud, and shown.
        heads: of the columns; one that starts with ``>`` holds numbers.
        rows: of cells; the first is the row's name.
        sortable: by any column, and searched if it is long.
        name: of the table on the page, if it is sortable.
        wide: keeps each cell on one line and scrolls.
    """
    numbers = [h.startswith(">") for h in heads]
    titles = [h.lstrip(">") for h in heads]
    body = [tag("tr", *(_cell(c, i, n) for i, (c, n) in enumerate(zip(row, numbers, strict=True)))) for row in rows]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(_head(t, n, sortable) for t, n in zip(titles, numbers, strict=True)))),
        tag("tbody", body),
        class_="sortable" if sortable else None,
        id=name or None,
    )
    if not (wide or sortable):
        return tag("div", made, class_="fit")
    scrolling = tag("div", made, class_="scroll", role="region", tabindex=0, aria_label=caption)
    return Markup(_search(name, len(rows)) + scrolling) if sortable and len(rows) > SEARCHED else scrolling


def _search(name: str, count: int) -> Markup:
    return tag(
        "div",
        tag("label", "Search ", tag("input", type="search", data_table=name, autocomplete="off")),
        tag("span", f"{count} of {count}", class_="found", role="status"),
        class_="search control",
    )


def _head(title: str, number: bool, sortable: bool) -> Markup:
    shown: Child = tag("button", title, type="button") if sortable and title else title
    return tag("th", shown, scope="col", class_="n" if number else None)


def _cell(cell: TableCell | str, column: int, number: bool) -> Markup:
    cell = cell if isinstance(cell, TableCell) else TableCell(cell)
    value = None if cell.value is None else f"{cell.value:.9g}"
    if column == 0:
        return tag("th", cell.said, scope="row", data_v=value, class_="n" if number else None)
    return tag("td", cell.said, class_="n" if number else None, data_v=value)
