"""Figures of tasks as people read them."""

from __future__ import annotations

from bitwright import words
from bitwright.measure.metrics import Metrics, PairedDifference
from bitwright.measure.tasks import TASKS


def named_figures(key: str) -> str:
    """What a figure is called; a metric of the user's own has the name that it gave.

    Example:
        >>> named_figures("miou"), named_figures("psnr")
        ('mean IoU of classes', 'psnr')
    """
    return next((t.figures[key] for t in TASKS.values() if key in t.figures), key)


def is_share(key: str) -> bool:
    """Whether a figure is a fraction that is shown in percent, as those of all tasks are."""
    return any(key in t.figures for t in TASKS.values())


def shown_figures(key: str, metrics: Metrics | None) -> str:
    """A figure with its interval.

    Example:
        >>> found = Metrics({"miou": 0.5, "psnr": 31.25}, {"miou": [0.4, 0.6]})
        >>> shown_figures("miou", found), shown_figures("psnr", found)
        ('50.00 % (40.0 to 60.0)', '31.2')
    """
    value, ends = (None, None) if metrics is None else (metrics.get(key), metrics.intervals.get(key))
    if value is None or is_share(key):
        return words.estimate(value, ends)
    return words.number(value) + ("" if ends is None else f" ({words.number(ends[0])} to {words.number(ends[1])})")


def shown_change(key: str, change: PairedDifference) -> str:
    """How much a figure changed, with its paired interval.

    Example:
        >>> shown_change("miou", PairedDifference(-0.012, [-0.02, 0.001]))
        '−1.20 points (−2.00 to +0.10 points)'
    """
    say = words.points if is_share(key) else (lambda v: words.signed(f"{v:+.3g}"))
    said = say(change.value)
    if change.interval is None:
        return said
    low, high = (say(end) for end in change.interval)
    return f"{said} ({low.removesuffix(' points')} to {high})"
