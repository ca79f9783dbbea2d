"""HTML that is escaped by construction: plain strings are text, only :class:`Markup` is written as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]

VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})
"""Elements of HTML without an end; those of SVG have one."""
_WITHIN_NUMBER = re.compile(
    r"(?<=[\d⁰¹²³⁴⁵⁶⁷⁸⁹]) (?=(?:%|[kMG]?B|dB|[mµ]?s|min|h|nats|[kMGT]|×|x)(?!\w))|(?<=\d ×) (?=\d)"
)


def text(child: Child) -> Markup:
    r"""Children as HTML; None is nothing. No line ends between a number and its unit.

    Example:
        >>> text(["a < b ", tag("b", "c")]), text("3.5 MB of 12 images"), text("1.2 × 10⁻⁴")
        ('a &lt; b <b>c</b>', '3.5\xa0MB of 12 images', '1.2\xa0×\xa010⁻⁴')
    """
    if child is None:
        return Markup()
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int):
        return Markup(_WITHIN_NUMBER.sub("\u00a0", html.escape(str(child), quote=True)))
    return Markup("".join(text(c) for c in child))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. ``class_`` and ``aria_label`` are written ``class`` and ``aria-label``; None and False are left out.

    Example:
        >>> tag("td", "<x>", class_="n", data_v=3, hidden=True, title=None)
        '<td class="n" data-v="3" hidden>&lt;x&gt;</td>'
    """
    written = "".join(_attribute(k, v) for k, v in attributes.items() if v is not None and v is not False)
    if name in VOID and not children:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{text(children)}</{name}>")


def _attribute(name: str, value: str | float | bool) -> str:
    key = name.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"'
