"""Figures of tasks as people read them."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright import words
from bitwright.measure.metrics import Evaluation, Metrics, OutputFidelity, PairedDifference
from bitwright.measure.named import TASK_FIGURES


def named_figures(key: str) -> str:
    """What a figure is called; a metric of the user's own has the name that it gave.

    Example:
        >>> named_figures("miou"), named_figures("psnr")
        ('mean IoU of classes', 'psnr')
    """
    return next((names[key] for names in TASK_FIGURES.values() if key in names), key)


def is_share(key: str) -> bool:
    """Whether a figure is a fraction that is shown in percent, as those of all tasks are."""
    return any(key in names for names in TASK_FIGURES.values())


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


def metric_rows(found: Evaluation) -> list[tuple[str, str, str]]:
    """(what, float, quantized) for everything that was measured."""
    theirs, ours = found.reference or Metrics(), found.quantized or Metrics()
    rows = []
    for key in dict.fromkeys([*theirs.values, *ours.values]):
        said = (
            f"{named_figures(key)} (95 % interval)"
            if {*theirs.intervals, *ours.intervals} & {key}
            else named_figures(key)
        )
        rows.append((said, shown_figures(key, theirs), shown_figures(key, ours)))
    for key, change in (found.loss.difference if found.loss else {}).items():
        if found.loss and found.loss.task != "classification" and key in ours.intervals:
            rows.append((f"{named_figures(key)}: change", "", shown_change(key, change)))
    return rows + [(what, "", figure) for what, figure in fidelity_rows(found.outputs)]


def fidelity_rows(outputs: Mapping[str, OutputFidelity]) -> list[tuple[str, str]]:
    """How closely the float network is followed: figure by figure, or output by output where there are several.

    Example:
        >>> good = OutputFidelity(agreement=0.99, kl=0.001, sqnr_db=31.0)
        >>> fidelity_rows({"output": good})[0]
        ('same answer as float', '99.00 %')
        >>> fidelity_rows({"a": good, "b": OutputFidelity(sqnr_db=12.0)})
        [('output a against float', '99.00 % same answer, KL 0.001, 31.0 dB'), ('output b against float', '12.0 dB')]
    """
    if len(outputs) > 1:
        said = {n: n if n.startswith("output") else f"output {n}" for n in outputs}
        return [(f"{said[n]} against float", ", ".join(in_short(found))) for n, found in outputs.items()]
    rows = []
    for found in outputs.values():
        if found.agreement is not None:
            rows.append(("same answer as float", words.percent(found.agreement)))
        if found.kl is not None:
            rows.append(("KL divergence from float", f"{words.number(found.kl, 2)} nats"))
        if found.exact or found.sqnr_db is not None:
            rows.append(("signal to quantization noise", words.signal_to_error(found.sqnr_db, exact=found.exact)))
    return rows


def in_short(found: OutputFidelity) -> list[str]:
    """What is known of one output among several."""
    said = [] if found.agreement is None else [f"{words.percent(found.agreement)} same answer"]
    said += [] if found.kl is None else [f"KL {words.number(found.kl, 2)}"]
    said += (
        [words.signal_to_error(found.sqnr_db, exact=found.exact)] if found.exact or found.sqnr_db is not None else []
    )
    return said or [words.NONE]
